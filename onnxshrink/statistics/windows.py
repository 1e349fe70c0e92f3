"""What a convolution reads: its window, and norms, Gram matrices, rows of patches.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics import base
from onnxshrink.statistics.base import (
    Array,
    Float64,
    gathered,
    grown,
    numeric,
)
from onnxshrink.statistics.moments import Norms
from onnxshrink.statistics.products import Products, product, refuse_large
from onnxshrink.statistics.rows import Sample

__all__ = ["ConvGram", "ConvNorm", "ConvSample", "ConvWindow"]


@dataclass(frozen=True)
class ConvWindow:
    """The window of an ONNX Conv: which inputs each output position reads.

    Attributes:
        kernel: Size of the kernel along each spatial axis.
        strides: Empty for all ones.
        pads: All beginnings, then all ends; empty for zeros.
        dilations: Empty for all ones.
        group: Number of groups the input channels are cut into.
        auto_pad: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    group: int = 1
    auto_pad: str = "NOTSET"

    @classmethod
    def of(cls, attrs: Mapping[str, Any], weight: Sequence[int]) -> ConvWindow:
        """Read the window from the attributes of a Conv and its weight's shape.

        Args:
            attrs: The node's attributes.
            weight: Shape of the weight, [out, in / group, kernel...].
        """
        auto_pad = attrs.get("auto_pad", "NOTSET")
        if isinstance(auto_pad, bytes):
            auto_pad = auto_pad.decode()

        def ints(name: str) -> tuple[int, ...]:
            return tuple(int(value) for value in attrs.get(name) or ())

        return cls(
            kernel=tuple(int(size) for size in weight[2:]),
            strides=ints("strides"),
            pads=ints("pads") if auto_pad in ("NOTSET", "") else (),
            dilations=ints("dilations"),
            group=int(attrs.get("group", 1)),
            auto_pad=str(auto_pad) or "NOTSET",
        )

    def padded(self, array: Array) -> Array:
        """Return [samples, channels, spatial...] with the padding written out."""
        spatial = array.shape[2:]
        if len(spatial) != len(self.kernel):
            raise ModelError(
                f"a convolution with a kernel of {len(self.kernel)} axes reads a value "
                f"of shape {list(array.shape)}"
            )
        begins, ends = self._pads(spatial)
        if not any(begins) and not any(ends):
            return array
        widths = [(0, 0), (0, 0), *zip(begins, ends, strict=True)]
        if all(low >= 0 and high >= 0 for low, high in widths):
            return np.pad(array, widths)
        kept = tuple(
            slice(max(0, -low), size - max(0, -high))
            for (low, high), size in zip(widths, array.shape, strict=True)
        )
        return np.pad(
            array[kept], [(max(0, low), max(0, high)) for low, high in widths]
        )

    def _pads(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        axes = len(self.kernel)
        if self.auto_pad == "VALID":
            return (0,) * axes, (0,) * axes
        if self.auto_pad == "NOTSET":
            pads = self.pads or (0,) * (2 * axes)
            return pads[:axes], pads[axes:]
        begins, ends = [], []
        for size, kernel, stride, dilation in zip(
            spatial, self.kernel, self.steps, self.spreads, strict=True
        ):
            reach = (kernel - 1) * dilation + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            small, large = total // 2, total - total // 2
            begins.append(small if self.auto_pad == "SAME_UPPER" else large)
            ends.append(large if self.auto_pad == "SAME_UPPER" else small)
        return tuple(begins), tuple(ends)

    @property
    def steps(self) -> tuple[int, ...]:
        """Strides, one for each spatial axis."""
        return self.strides or (1,) * len(self.kernel)

    @property
    def spreads(self) -> tuple[int, ...]:
        """Dilations, one for each spatial axis."""
        return self.dilations or (1,) * len(self.kernel)

    def output(self, padded: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the output for a padded spatial shape."""
        return tuple(
            max(0, (size - (kernel - 1) * dilation - 1) // stride + 1)
            for size, kernel, stride, dilation in zip(
                padded, self.kernel, self.steps, self.spreads, strict=True
            )
        )

    def patches(self, padded: Array) -> Array:
        """View a padded input as [samples, channels, output..., kernel...]."""
        out = self.output(padded.shape[2:])
        strides = padded.strides[2:]
        return np.lib.stride_tricks.as_strided(
            padded,
            shape=(*padded.shape[:2], *out, *self.kernel),
            strides=(
                *padded.strides[:2],
                *(s * step for s, step in zip(strides, self.steps, strict=True)),
                *(s * step for s, step in zip(strides, self.spreads, strict=True)),
            ),
            writeable=False,
        )


@dataclass(eq=False)
class ConvNorm(Norms):
    """Sum of squares of what each entry of a kernel multiplies: Wanda for Conv.

    The input is unfolded into patches as im2col does; entry [g, c, k...] is the sum
    over all samples and output positions of the squared input that weight
    ``W[any output channel of group g, c, k...]`` is multiplied with.

    Attributes:
        window: The convolution's window.
        squares: float64 [group, in / group, kernel...], or ``None`` at first.
        sums: The same of the inputs themselves.
        rows: Number of patches.
    """

    window: ConvWindow
    squares: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    @property
    def _axes(self) -> int:
        return 2 + len(self.window.kernel)

    @property
    def norm(self) -> Float64:
        """Euclidean norms, float64 [group, in / group, kernel...]."""
        return np.sqrt(gathered(self.squares, "a convolution norm"))

    def update(self, array: Array) -> None:
        """Add one batch, [samples, channels, spatial...]."""
        values = numeric(array)
        _check_groups(values, self.window)
        channels = values.shape[1]
        total = np.zeros((channels, *self.window.kernel))
        sums = np.zeros_like(total)
        step = max(1, base.CHUNK // max(1, math.prod(values.shape[1:])))
        for start in range(0, len(values), step):
            part = self.window.padded(values[start : start + step])
            part = part.astype(np.float64)
            out = self.window.output(part.shape[2:])
            whole = self._whole(part, out)
            if whole is not None:
                part = np.where(np.isfinite(part), part, 0)
            squared = np.square(part)
            for offset in np.ndindex(*self.window.kernel):
                at = (slice(None), *offset)
                total[at] += self._at(squared, offset, out, whole)
                sums[at] += self._at(part, offset, out, whole)
            count = len(part) * math.prod(out)
            self.rows += count if whole is None else int(whole.sum())
        shape = (self.window.group, -1, *self.window.kernel)
        total, sums = total.reshape(shape), sums.reshape(shape)
        self.squares = grown(self.squares, total, "a convolution norm") + total
        self.sums = grown(self.sums, sums, "a convolution norm") + sums

    def _whole(self, part: Float64, out: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Return which patches are finite, [samples, output...]; ``None``: all."""
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(part.sum()):
                return None
        broken = ~np.isfinite(part)
        if not broken.any():
            return None
        found = np.zeros((len(part), *out), bool)
        for offset in np.ndindex(*self.window.kernel):
            seen = broken[(slice(None), slice(None), *self._window(offset, out))]
            found |= seen.any(axis=1)
        return ~found

    def _window(
        self, offset: tuple[int, ...], out: tuple[int, ...]
    ) -> tuple[slice, ...]:
        """Return what one kernel entry reads along each spatial axis."""
        return tuple(
            slice(at * spread, at * spread + (size - 1) * stride + 1, stride)
            if size
            else slice(0, 0)
            for at, spread, stride, size in zip(
                offset, self.window.spreads, self.window.steps, out, strict=True
            )
        )

    def _at(
        self,
        values: Float64,
        offset: tuple[int, ...],
        out: tuple[int, ...],
        whole: NDArray[np.bool_] | None,
    ) -> Float64:
        """Return the sum, by channel, of what one kernel entry multiplies."""
        seen = values[(slice(None), slice(None), *self._window(offset, out))]
        if whole is not None:
            seen = seen * whole[:, None]
        return np.asarray(seen.sum(axis=(0, *range(2, values.ndim))))

    def _merge(self, other: ConvNorm) -> None:
        if other.squares is not None and other.sums is not None:
            what = "a convolution norm"
            self.squares = grown(self.squares, other.squares, what) + other.squares
            self.sums = grown(self.sums, other.sums, what) + other.sums
        self.rows += other.rows


@dataclass(eq=False)
class ConvGram(Products):
    """``P^T P`` of the patches a Conv reads, for each group: SparseGPT for Conv.

    Column ``c * kernel + k`` of a patch is what ``W[out, c, k...]`` is multiplied with,
    so row ``out`` of ``W.reshape(out, -1)`` and the matrix of its group belong
    together. Precision is that of ``Gram``.

    Attributes:
        window: The convolution's window.
        positions: At most this many output positions of a sample are used, on an even
            grid over the flattened output; ``None`` uses all.
        exact: Multiply in float64.
        limit_bytes: A larger matrix is refused.
        matrix: float64 [group, in / group * kernel, the same], ``None`` at first.
        sums: float64 [group, in / group * kernel], sum of the patches.
        rows: Number of patches used.
    """

    _stacked: ClassVar[bool] = True

    window: ConvWindow
    positions: int | None = None
    exact: bool = False
    limit_bytes: int = 1 << 31
    matrix: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Refuse a number of positions that leaves nothing."""
        if self.positions is not None and self.positions < 1:
            raise UsageError(f"positions must be at least 1, not {self.positions}")

    def update(self, array: Array) -> None:
        """Add one batch, [samples, channels, spatial...]."""
        values = numeric(array)
        _check_groups(values, self.window)
        group = self.window.group
        width = values.shape[1] // group * math.prod(self.window.kernel)
        refuse_large((group, width, width), self.limit_bytes)
        sums = np.zeros((group, width))
        self.sums = grown(self.sums, sums, "a convolution's Gram matrix")
        if self.matrix is None:
            self.matrix = np.zeros((group, width, width))
        for patches in map(base.finite_rows, self._rows(values)):
            self.matrix += product(patches, self.exact)
            self.sums += patches.sum(axis=1, dtype=np.float64)
            self.rows += patches.shape[1]

    def _rows(self, values: Array) -> Iterator[Array]:
        """Patches as [group, rows, in / group * kernel], in pieces of bounded size."""
        window = self.window
        axes = len(window.kernel)
        per_sample = max(1, math.prod(values.shape[1:]))
        step = max(1, base.CHUNK // per_sample)
        for start in range(0, len(values), step):
            view = window.patches(window.padded(values[start : start + step]))
            out = view.shape[2 : 2 + axes]
            chosen = self._chosen(math.prod(out))
            reach = view.shape[1] * math.prod(window.kernel)
            count = max(1, min(4096, base.CHUNK // max(1, reach)))
            few = max(1, count // max(1, len(chosen)))
            for first in range(0, len(view), few):
                part = view[first : first + few]
                if count >= len(chosen) == math.prod(out):
                    # Nothing to choose: indexing would copy once more.
                    shape = (*part.shape[:2], len(chosen), math.prod(window.kernel))
                    yield self._by_group(part.reshape(shape))
                    continue
                for left in range(0, len(chosen), count):
                    at = np.unravel_index(chosen[left : left + count], out)
                    # Index arrays on adjacent axes: [n, channels, rows, kernel...].
                    index: tuple[Any, ...] = (slice(None), slice(None), *at)
                    taken = part[index]
                    yield self._by_group(taken)

    def _by_group(self, taken: Array) -> Array:
        samples, channels, positions = taken.shape[:3]
        group = self.window.group
        reach = math.prod(self.window.kernel)
        split = taken.reshape(samples, group, channels // group, positions, reach)
        ordered = split.transpose(1, 0, 3, 2, 4)
        return ordered.reshape(group, samples * positions, channels // group * reach)

    def _chosen(self, total: int) -> NDArray[np.int64]:
        """Output positions that are used: all, or an even grid."""
        if self.positions is None or total <= self.positions:
            return np.arange(total)
        middle = np.arange(self.positions) * 2 + 1
        return middle * total // (2 * self.positions)

    def _merge(self, other: ConvGram) -> None:
        if other.matrix is not None and other.sums is not None:
            what = "a convolution's Gram matrix"
            self.matrix = grown(self.matrix, other.matrix, what)
            self.matrix += other.matrix
            self.sums = grown(self.sums, other.sums, what) + other.sums
        self.rows += other.rows


def _check_groups(values: Array, window: ConvWindow) -> None:
    if values.ndim < 3 or values.shape[1] % window.group:
        raise ModelError(
            f"a convolution with {window.group} groups cannot read a value of shape "
            f"{list(values.shape)}"
        )


@dataclass(eq=False)
class ConvSample(Sample):
    """A seeded random choice of the patches a Conv reads.

    A row is a patch: column ``c * kernel + k`` is what ``W[out, c, k...]`` of the
    group that channel ``c`` belongs to is multiplied with; groups come one after the
    other. Padding is zeros.

    Attributes:
        window: The convolution's window.
        positions: At most this many output positions of a sample are offered, on an
            even grid.
    """

    window: ConvWindow = field(default_factory=lambda: ConvWindow((1, 1)))
    positions: int = 16

    def update(self, array: Array) -> None:
        """Offer the patches of one batch, [samples, channels, spatial...]."""
        _check_groups(array, self.window)
        source = ConvGram(self.window, positions=self.positions)
        for patches in source._rows(array):
            rows = patches.swapaxes(0, 1).reshape(patches.shape[1], -1)
            rows = base.finite_rows(rows) if rows.dtype.kind == "f" else rows
            self.rows += len(rows)
            self._offer(rows, self._draws.random(len(rows)))
