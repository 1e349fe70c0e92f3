"""Statistics of activations: fed batch by batch, mergeable, of bounded size.

A pass asks for them through ``Context.statistics``; it never runs a session of its own
to look at a tensor. Feeding the same values in any split gives the same statistic, up
to the rounding of sums.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError

__all__ = [
    "ChannelNorm",
    "ChannelRange",
    "ConvGram",
    "ConvNorm",
    "ConvSample",
    "ConvWindow",
    "Gram",
    "Histogram",
    "Mean",
    "Moments",
    "Multi",
    "Range",
    "Sample",
    "Statistic",
    "Stored",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_CHUNK = 1 << 21
"""Elements that are converted at a time: 16 MB as float64."""
_CACHED = 1 << 16
"""Elements that are counted at a time: they stay in the processor's cache."""
_FILL = 1e30
"""Values beyond this are fills of a mask, not activations (FLT_MIN, -inf)."""


def _numeric(array: Array) -> Array:
    """Return the values as float32 or float64, without a copy where possible."""
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind in "OSUVMm" and array.dtype.name not in _EXTENDED:
        raise ModelError(
            f"statistics are for numbers, but the tensor holds {array.dtype}"
        )
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    return array.astype(np.float32)


_EXTENDED = frozenset(
    {
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn",
        "int4",
        "uint4",
        "int2",
        "uint2",
    }
)
"""Types of ml_dtypes; numpy gives several of them the kind of raw bytes."""


def _around(array: Array, axis: int) -> Array:
    """View an array as [before, channels, after] the axis."""
    if not -array.ndim <= axis < array.ndim:
        raise UsageError(
            f"axis {axis} of a statistic does not exist in a value of shape "
            f"{list(array.shape)}"
        )
    axis %= array.ndim
    before = math.prod(array.shape[:axis])
    after = math.prod(array.shape[axis + 1 :])
    return np.ascontiguousarray(array).reshape(before, array.shape[axis], after)


def _chunks(array: Array) -> Iterator[Array]:
    """Cut a [before, channels, after] view into pieces of bounded size."""
    before, channels, after = array.shape
    if not array.size:
        return
    step = max(1, _CHUNK // (channels * after))
    width = max(1, _CHUNK // channels)
    for start in range(0, before, step):
        piece = array[start : start + step]
        for left in range(0, after, width):
            yield piece[:, :, left : left + width]


def _grown(sums: Float64 | None, like: Float64, what: str) -> Float64:
    """Return the accumulator, made of zeros the first time it is needed."""
    if sums is None:
        return np.zeros_like(like)
    if sums.shape != like.shape:
        raise ModelError(
            f"{what} saw {list(sums.shape)} before and {list(like.shape)} now: the "
            "number of channels changes between batches"
        )
    return sums


@dataclass(eq=False)
class Statistic(ABC):
    """An accumulator over the values one tensor takes.

    The fields of a subclass that its constructor takes are its parameters; all others
    are what it has gathered so far.
    """

    @property
    def key(self) -> Hashable:
        """Kind and parameters; equal keys gather the same thing."""
        parameters = (
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init
        )
        return (type(self).__name__, *parameters)

    def fresh(self) -> Self:
        """Return an empty statistic with the same parameters."""
        parameters = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init
        }
        return type(self)(**parameters)

    @abstractmethod
    def update(self, array: Array) -> None:
        """Take in the values of one batch; the array is neither kept nor changed."""

    def merge(self, other: Self) -> None:
        """Take in what another statistic with the same key has gathered."""
        if self.key != other.key:
            raise UsageError(f"cannot merge {other.key!r} into {self.key!r}")
        self._merge(other)

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Add the gathered fields of ``other``, whose key is the same."""


class Stored(Statistic):
    """A statistic that can be written to a file and read back."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return what was gathered, as arrays by name."""

    @abstractmethod
    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what ``state`` of another statistic with the same key returned.

        Raises:
            UsageError: This is no such state; nothing was taken over.
        """


def _stored(
    state: Mapping[str, Array], name: str, kind: str, *shape: int | None
) -> Array:
    """Return an array of a stored state, if it is what it has to be.

    Args:
        state: The state, which may be anything.
        name: Name of the array.
        kind: ``f`` for float64, ``i`` for int64.
        *shape: Its shape, ``None`` for any size.
    """
    array = state.get(name)
    dtype = {"f": np.float64, "i": np.int64}[kind]
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.ndim != len(shape)
        or any(
            want not in (None, have)
            for want, have in zip(shape, array.shape, strict=True)
        )
    ):
        raise UsageError(f"a stored statistic has no usable {name!r}")
    if kind == "f" and np.isnan(array).any():
        raise UsageError(f"a stored statistic has NaN in {name!r}")
    return array


@dataclass(eq=False)
class Range(Stored):
    """Smallest and largest finite value, of the tensor or of each channel.

    Attributes:
        axis: Axis of the channels; ``None`` looks at the whole tensor.
        low: float64, shape [] or [channels]; ``+inf`` where nothing finite was seen.
        high: The same with ``-inf``.
        count: Values seen, finite or not.
        nan: How many were NaN.
        inf: How many were infinite.
        fills: How many were finite but beyond 1e30 in size, as in attention masks.
    """

    axis: int | None = None
    low: Float64 = field(init=False, default_factory=lambda: np.array(np.inf))
    high: Float64 = field(init=False, default_factory=lambda: np.array(-np.inf))
    count: int = field(init=False, default=0)
    nan: int = field(init=False, default=0)
    inf: int = field(init=False, default=0)
    fills: int = field(init=False, default=0)

    @property
    def empty(self) -> bool:
        """Whether no finite value was seen at all."""
        return not bool(np.any(self.low <= self.high))

    def update(self, array: Array) -> None:
        """Widen the range by one batch."""
        values = _numeric(array)
        if not values.size:
            return
        if self.axis is not None:
            values = _around(values, self.axis)
        axes = None if self.axis is None else (0, 2)
        low, high = np.min(values, axis=axes), np.max(values, axis=axes)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(values)
            nan = int(np.isnan(values).sum())
            self.nan += nan
            self.inf += values.size - int(finite.sum()) - nan
            low = np.min(values, axis=axes, where=finite, initial=np.inf)
            high = np.max(values, axis=axes, where=finite, initial=-np.inf)
        if np.any(low < -_FILL) or np.any(high > _FILL):
            size = np.abs(values)
            self.fills += int(((size > _FILL) & np.isfinite(size)).sum())
        self.count += values.size
        self._widen(
            np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        )

    def _widen(self, low: Float64, high: Float64) -> None:
        if self.low.ndim and low.ndim and self.low.shape != low.shape:
            raise ModelError(
                f"a range saw {len(self.low)} channels before and {len(low)} now"
            )
        self.low = np.asarray(np.minimum(self.low, low))
        self.high = np.asarray(np.maximum(self.high, high))

    def _merge(self, other: Range) -> None:
        self._widen(other.low, other.high)
        self.count += other.count
        self.nan += other.nan
        self.inf += other.inf
        self.fills += other.fills

    def state(self) -> dict[str, Array]:
        """Return the range as arrays."""
        whole = [self.count, self.nan, self.inf, self.fills]
        return {
            "low": self.low.reshape(-1),
            "high": self.high.reshape(-1),
            "whole": np.array(whole, np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over a stored range."""
        low = _stored(state, "low", "f", None)
        high = _stored(state, "high", "f", len(low))
        whole = [int(number) for number in _stored(state, "whole", "i", 4)]
        if min(whole) < 0 or sum(whole[1:]) > whole[0]:
            raise UsageError("a stored range counts what it has not seen")
        if not len(low) or (self.axis is None and len(low) != 1):
            raise UsageError("a stored range has no usable 'low'")
        # Before the first batch, a range has no channels yet.
        shape = () if self.axis is None or not whole[0] else low.shape
        if not whole[0] and len(low) != 1:
            raise UsageError("a stored range counts what it has not seen")
        self.low, self.high = low.reshape(shape), high.reshape(shape)
        self.count, self.nan, self.inf, self.fills = whole


@dataclass(eq=False)
class ChannelRange(Stored):
    """Smallest and largest value of each channel, mask fills left out.

    Attributes:
        axis: Axis of the channels.
        low: float64 [channels], ``+inf`` where nothing was seen; ``None`` at first.
        high: The same with ``-inf``.
        count: Values seen in each channel.
        apart: Values left out: not finite, or beyond 1e30 in size.
    """

    axis: int = 1
    low: Float64 | None = field(init=False, default=None)
    high: Float64 | None = field(init=False, default=None)
    count: int = field(init=False, default=0)
    apart: int = field(init=False, default=0)

    def update(self, array: Array) -> None:
        """Widen the ranges by one batch."""
        values = _around(_numeric(array), self.axis)
        if not values.size:
            return
        low, high = values.min(axis=(0, 2)), values.max(axis=(0, 2))
        if not (np.all(low >= -_FILL) and np.all(high <= _FILL)):
            with np.errstate(invalid="ignore"):
                kept = np.abs(values) <= _FILL
            self.apart += kept.size - int(np.count_nonzero(kept))
            low = values.min(axis=(0, 2), where=kept, initial=np.inf)
            high = values.max(axis=(0, 2), where=kept, initial=-np.inf)
        self._widen(low.astype(np.float64), high.astype(np.float64))
        self.count += values.shape[0] * values.shape[2]

    def _widen(self, low: Float64, high: Float64) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        _grown(self.low, low, "a range of channels")
        self.low = np.minimum(self.low, low)
        self.high = np.maximum(self.high, high)

    def _merge(self, other: ChannelRange) -> None:
        if other.low is not None and other.high is not None:
            self._widen(other.low, other.high)
        self.count += other.count
        self.apart += other.apart

    def state(self) -> dict[str, Array]:
        """Return the ranges as arrays."""
        none = np.zeros(0)
        return {
            "low": none if self.low is None else self.low,
            "high": none if self.high is None else self.high,
            "count": np.array([self.count, self.apart]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored ranges."""
        low = _stored(state, "low", "f", None)
        high = _stored(state, "high", "f", len(low))
        count, apart = (int(n) for n in _stored(state, "count", "i", 2))
        whole = count * len(low)
        if count < 0 or (count > 0) != (len(low) > 0) or not 0 <= apart <= whole:
            raise UsageError("a stored range counts what it has not seen")
        if len(low):
            self.low, self.high = low, high
        self.count, self.apart = count, apart


@dataclass(eq=False)
class ChannelNorm(Statistic):
    """Sum of squares of each channel: the activation norm of Wanda.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language
    Models", section 3: a weight's importance is ``|W_ij| * ||X_j||_2`` with the norm
    over all rows of the calibration data.

    Attributes:
        axis: Axis of the channels, -1 for the input of ``X @ W``.
        squares: float64 [channels], or ``None`` before the first batch.
        sums: float64 [channels], sum of the values.
        rows: Number of values in each channel.
    """

    axis: int = -1
    squares: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    @property
    def norm(self) -> Float64:
        """Euclidean norm of each channel, float64 [channels]."""
        return np.sqrt(_gathered(self.squares, "a channel norm"))

    def update(self, array: Array) -> None:
        """Add one batch."""
        view = _around(_numeric(array), self.axis)
        total, sums = np.zeros(view.shape[1]), np.zeros(view.shape[1])
        for piece in _chunks(view):
            values = piece.astype(np.float64)
            total += np.einsum("acb,acb->c", values, values)
            sums += values.sum(axis=(0, 2))
        self.squares = _grown(self.squares, total, "a channel norm") + total
        self.sums = _grown(self.sums, sums, "a channel norm") + sums
        self.rows += view.shape[0] * view.shape[2]

    def _merge(self, other: ChannelNorm) -> None:
        if other.squares is not None and other.sums is not None:
            self.squares = _grown(self.squares, other.squares, "a channel norm")
            self.squares = self.squares + other.squares
            self.sums = _grown(self.sums, other.sums, "a channel norm") + other.sums
        self.rows += other.rows


@dataclass(eq=False)
class Moments(Statistic):
    """Count, mean and variance, of the tensor or of each channel.

    Accumulated as in Chan, Golub and LeVeque 1979 (pairwise updating), so that a mean
    far from zero costs no precision.

    Attributes:
        axis: Axis of the channels; ``None`` looks at the whole tensor.
        count: Number of values, in each channel.
        mean: float64, shape [] or [channels].
    """

    axis: int | None = None
    count: int = field(init=False, default=0)
    mean: Float64 = field(init=False, default_factory=lambda: np.zeros(()))
    _deviation: Float64 = field(init=False, default_factory=lambda: np.zeros(()))

    @property
    def variance(self) -> Float64:
        """Population variance, float64, shape [] or [channels]."""
        return self._deviation / max(self.count, 1)

    def update(self, array: Array) -> None:
        """Add one batch."""
        values = _numeric(array)
        view = (
            values.reshape(1, 1, -1)
            if self.axis is None
            else _around(values, self.axis)
        )
        for piece in _chunks(view):
            part = piece.astype(np.float64)
            mean = part.mean(axis=(0, 2))
            spread = part - mean[None, :, None]
            deviation = np.einsum("acb,acb->c", spread, spread)
            if self.axis is None:
                mean, deviation = mean[0], deviation[0]
            self._add(part.shape[0] * part.shape[2], mean, deviation)

    def _add(self, count: int, mean: Float64, deviation: Float64) -> None:
        if not count:
            return
        if self.count and np.shape(mean) != self.mean.shape:
            raise ModelError(
                f"moments saw {list(self.mean.shape)} before and "
                f"{list(np.shape(mean))} now: the number of channels changes"
            )
        total = self.count + count
        step = mean - self.mean
        between = step * step * (self.count * count / total)
        self._deviation = np.asarray(self._deviation + deviation + between)
        self.mean = np.asarray(self.mean + step * (count / total))
        self.count = total

    def _merge(self, other: Moments) -> None:
        self._add(other.count, other.mean, other._deviation)


@dataclass(eq=False)
class Mean(Moments):
    """Mean of the tensor or of each channel, summed in float64."""


class _Products(Stored):
    """A statistic that holds ``X^T X``, sums and a number of rows."""

    matrix: Float64 | None
    sums: Float64 | None
    rows: int
    _stacked: ClassVar[bool] = False

    def state(self) -> dict[str, Array]:
        """Return the sums as arrays."""
        axes = 3 if self._stacked else 2
        return {
            "matrix": np.zeros((0,) * axes) if self.matrix is None else self.matrix,
            "sums": np.zeros((0,) * (axes - 1)) if self.sums is None else self.sums,
            "rows": np.array([self.rows]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored sums."""
        matrix = _stored(state, "matrix", "f", *(None,) * (3 if self._stacked else 2))
        size = matrix.shape[-1]
        sums = _stored(state, "sums", "f", *matrix.shape[:-1])
        rows = int(_stored(state, "rows", "i", 1)[0])
        usable = rows >= 0 and (rows > 0) <= (matrix.size > 0)
        if matrix.shape[-2] != size or not usable:
            raise UsageError("a stored Gram matrix contradicts itself")
        if np.any(np.einsum("...ii->...i", matrix) < 0):
            raise UsageError("a stored Gram matrix has negative squares")
        self.rows = rows
        self.matrix, self.sums = (matrix, sums) if matrix.size else (None, None)


@dataclass(eq=False)
class Gram(_Products):
    """``X^T X`` over all rows of a tensor, for layer-wise least squares.

    This is the Hessian of the layer-wise error up to a factor (Frantar and Alistarh
    2023, SparseGPT, section 3; Frantar et al. 2023, GPTQ). It is not damped.

    Products are made in float32 over at most 4,096 rows and summed in float64, or in
    float64 throughout with ``exact``.

    Attributes:
        axis: Axis of the channels; every other axis counts as rows.
        exact: Multiply in float64, at half the speed.
        limit_bytes: A larger matrix is refused.
        matrix: float64 [channels, channels], or ``None`` before the first batch.
        sums: float64 [channels], sum of the rows.
        rows: Number of rows.
    """

    axis: int = -1
    exact: bool = False
    limit_bytes: int = 1 << 31
    matrix: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    def update(self, array: Array) -> None:
        """Add one batch."""
        view = _around(_numeric(array), self.axis)
        channels = view.shape[1]
        _refuse_large((channels, channels), self.limit_bytes)
        rows = np.moveaxis(view, 1, 2).reshape(-1, channels)
        sums = rows.sum(axis=0, dtype=np.float64)
        self.sums = _grown(self.sums, sums, "a Gram matrix") + sums
        if self.matrix is None:
            self.matrix = np.zeros((channels, channels))
        step = max(1, min(4096, _CHUNK // max(channels, 1)))
        for start in range(0, len(rows), step):
            self.matrix += _product(rows[start : start + step], self.exact)
        self.rows += len(rows)

    def _merge(self, other: Gram) -> None:
        if other.matrix is not None and other.sums is not None:
            self.matrix = _grown(self.matrix, other.matrix, "a Gram matrix")
            self.matrix += other.matrix
            self.sums = _grown(self.sums, other.sums, "a Gram matrix") + other.sums
        self.rows += other.rows


def _refuse_large(shape: tuple[int, ...], limit: int) -> None:
    """Raise where a float64 accumulator of this shape is larger than the limit."""
    if math.prod(shape) * 8 > limit:
        raise ModelError(
            f"a Gram matrix of shape {list(shape)} needs {math.prod(shape) * 8:,} "
            f"bytes, more than the limit of {limit:,}: use channel norms instead"
        )


def _product(rows: Array, exact: bool) -> Array:
    """``X^T X`` of [..., rows, channels], in float64 where asked for or needed."""
    if not exact:
        narrow = rows.astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.swapaxes(narrow, -1, -2) @ narrow
        # Squares of values beyond 1e19 do not fit float32.
        if np.isfinite(product).all():
            return product
    wide = rows.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.swapaxes(wide, -1, -2) @ wide)


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
class ConvNorm(Statistic):
    """Sum of squares that each weight of a Conv's kernel meets: Wanda for Conv.

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
    def norm(self) -> Float64:
        """Euclidean norms, float64 [group, in / group, kernel...]."""
        return np.sqrt(_gathered(self.squares, "a convolution norm"))

    def update(self, array: Array) -> None:
        """Add one batch, [samples, channels, spatial...]."""
        values = _numeric(array)
        _check_groups(values, self.window)
        channels = values.shape[1]
        total = np.zeros((channels, *self.window.kernel))
        sums = np.zeros_like(total)
        step = max(1, _CHUNK // max(1, math.prod(values.shape[1:])))
        for start in range(0, len(values), step):
            part = self.window.padded(values[start : start + step])
            part = part.astype(np.float64)
            squared = np.square(part)
            out = self.window.output(part.shape[2:])
            for offset in np.ndindex(*self.window.kernel):
                at = (slice(None), *offset)
                total[at] += self._at(squared, offset, out)
                sums[at] += self._at(part, offset, out)
            self.rows += len(part) * math.prod(out)
        shape = (self.window.group, -1, *self.window.kernel)
        total, sums = total.reshape(shape), sums.reshape(shape)
        self.squares = _grown(self.squares, total, "a convolution norm") + total
        self.sums = _grown(self.sums, sums, "a convolution norm") + sums

    def _at(
        self, values: Float64, offset: tuple[int, ...], out: tuple[int, ...]
    ) -> Float64:
        """Sum per channel of what one kernel entry meets."""
        window = tuple(
            slice(at * spread, at * spread + (size - 1) * stride + 1, stride)
            if size
            else slice(0, 0)
            for at, spread, stride, size in zip(
                offset, self.window.spreads, self.window.steps, out, strict=True
            )
        )
        seen = values[(slice(None), slice(None), *window)]
        return np.asarray(seen.sum(axis=(0, *range(2, values.ndim))))

    def _merge(self, other: ConvNorm) -> None:
        if other.squares is not None and other.sums is not None:
            what = "a convolution norm"
            self.squares = _grown(self.squares, other.squares, what) + other.squares
            self.sums = _grown(self.sums, other.sums, what) + other.sums
        self.rows += other.rows


@dataclass(eq=False)
class ConvGram(_Products):
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
        values = _numeric(array)
        _check_groups(values, self.window)
        group = self.window.group
        width = values.shape[1] // group * math.prod(self.window.kernel)
        _refuse_large((group, width, width), self.limit_bytes)
        sums = np.zeros((group, width))
        self.sums = _grown(self.sums, sums, "a convolution's Gram matrix")
        if self.matrix is None:
            self.matrix = np.zeros((group, width, width))
        for patches in self._rows(values):
            self.matrix += _product(patches, self.exact)
            self.sums += patches.sum(axis=1, dtype=np.float64)
            self.rows += patches.shape[1]

    def _rows(self, values: Array) -> Iterator[Array]:
        """Patches as [group, rows, in / group * kernel], in pieces of bounded size."""
        window = self.window
        axes = len(window.kernel)
        per_sample = max(1, math.prod(values.shape[1:]))
        step = max(1, _CHUNK // per_sample)
        for start in range(0, len(values), step):
            view = window.patches(window.padded(values[start : start + step]))
            out = view.shape[2 : 2 + axes]
            chosen = self._chosen(math.prod(out))
            reach = view.shape[1] * math.prod(window.kernel)
            count = max(1, min(4096, _CHUNK // max(1, reach)))
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
            self.matrix = _grown(self.matrix, other.matrix, what)
            self.matrix += other.matrix
            self.sums = _grown(self.sums, other.sums, what) + other.sums
        self.rows += other.rows


def _check_groups(values: Array, window: ConvWindow) -> None:
    if values.ndim < 3 or values.shape[1] % window.group:
        raise ModelError(
            f"a convolution with {window.group} groups cannot read a value of shape "
            f"{list(values.shape)}"
        )


def _gathered(value: Float64 | None, what: str) -> Float64:
    """Return the accumulator of a statistic that was fed."""
    if value is None:
        raise UsageError(f"{what} was read before it was fed")
    return value


@dataclass(eq=False)
class Histogram(Stored):
    """Counts in bins of equal width, over a range that grows as values come.

    The width is a power of two and every edge a multiple of it, the smallest for which
    the range fits ``bins``; growing adds neighbouring bins and loses nothing. So the
    result depends on the values alone, not on their order or split. Values that are
    not finite or beyond 1e30 in size (mask fills) are counted apart.

    Attributes:
        bins: Most bins kept, a power of two.
        counts: int64 [at most bins]; bin ``i`` holds ``[edges[i], edges[i + 1])``.
        count: Values in the bins.
        zeros: How many of them were exactly zero.
        apart: Values counted in no bin.
        low: Smallest value in a bin.
        high: Largest value in a bin.
    """

    bins: int = 2048
    counts: NDArray[np.int64] = field(
        init=False, default_factory=lambda: np.zeros(0, np.int64)
    )
    count: int = field(init=False, default=0)
    zeros: int = field(init=False, default=0)
    apart: int = field(init=False, default=0)
    low: float = field(init=False, default=math.inf)
    high: float = field(init=False, default=-math.inf)
    _exponent: int = field(init=False, default=0)
    _first: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Refuse a number of bins that cannot be halved."""
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise UsageError(f"bins must be a power of two, not {self.bins}")

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self._exponent)

    @property
    def edges(self) -> Float64:
        """Edges of the bins, float64 [len(counts) + 1]."""
        places = self._first + np.arange(len(self.counts) + 1)
        return np.asarray(places * self.width, dtype=np.float64)

    def quantile(self, share: float) -> float:
        """Value below which this share of the values lies, linear within a bin."""
        if not self.count:
            raise UsageError("a histogram was read before it was fed")
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"a quantile is a share from 0 to 1, not {share}")
        below = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.float64)
        value = float(np.interp(share * self.count, below, self.edges))
        return min(max(value, self.low), self.high)

    def update(self, array: Array) -> None:
        """Count one batch."""
        values = _numeric(array).reshape(-1)
        for start in range(0, values.size, _CACHED):
            self._count(values[start : start + _CACHED])

    def _count(self, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        if not (-_FILL <= low <= high <= _FILL):
            with np.errstate(invalid="ignore"):
                kept = values[np.abs(values) <= _FILL]
            self.apart += values.size - kept.size
            if not kept.size:
                return
            values, low, high = kept, float(kept.min()), float(kept.max())
        self._cover(low, high)
        if abs(self._exponent) > 100 or abs(self._first) >= 1 << 24:
            values = values.astype(np.float64)
        # Scaling by a power of two is exact, so floor gives the true bin, and so is the
        # difference: an integer smaller than the number of bins.
        scaled = values * values.dtype.type(math.ldexp(1.0, -self._exponent))
        np.floor(scaled, out=scaled)
        scaled -= values.dtype.type(self._first)
        places = scaled.astype(np.intp)
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.count += values.size
        self.zeros += int(np.count_nonzero(values == 0))

    def reach(self, low: float, high: float) -> None:
        """Make ``low``, ``high`` and the bins reach over values not counted."""
        if not -_FILL <= low <= high <= _FILL:
            raise UsageError(f"a histogram cannot reach from {low} to {high}")
        self._cover(low, high)

    def _cover(self, low: float, high: float) -> None:
        """Make the bins reach over [low, high] and everything seen before."""
        low, high = min(low, self.low), max(high, self.high)
        exponent = self._needed(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        last = math.floor(math.ldexp(high, -exponent))
        counts = np.zeros(last - first + 1, np.int64)
        if self.count:
            old = np.arange(len(self.counts)) + self._first
            shift = exponent - self._exponent
            places = (old >> min(shift, 62)) - first
            np.add.at(counts, places, self.counts)
        self.counts, self._exponent, self._first = counts, exponent, first
        self.low, self.high = low, high

    def _needed(self, low: float, high: float) -> int:
        """Smallest exponent of the width for which the range fits the bins.

        It is at least 2**-40 of the largest value, so that indices stay small, and it
        never falls when the range grows.
        """
        size = max(abs(low), abs(high))
        exponent = max(math.frexp(size)[1] - 40, -900) if size else -900
        spread = high - low
        if spread > 0:
            guess = math.frexp(spread)[1] - self.bins.bit_length() - 1
            exponent = max(exponent, guess)
        while (
            math.floor(math.ldexp(high, -exponent))
            - math.floor(math.ldexp(low, -exponent))
            >= self.bins
        ):
            exponent += 1
        return exponent

    def _merge(self, other: Histogram) -> None:
        self.apart += other.apart
        if not other.count:
            return
        self._cover(other.low, other.high)
        shift = self._exponent - other._exponent
        places = ((np.arange(len(other.counts)) + other._first) >> min(shift, 62)) - (
            self._first
        )
        np.add.at(self.counts, places, other.counts)
        self.count += other.count
        self.zeros += other.zeros

    def state(self) -> dict[str, Array]:
        """Return the bins as arrays."""
        whole = [self.count, self.zeros, self.apart, self._exponent, self._first]
        return {
            "counts": self.counts,
            "whole": np.array(whole, np.int64),
            "ends": np.array([self.low, self.high]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored bins."""
        counts = _stored(state, "counts", "i", None)
        whole = [int(number) for number in _stored(state, "whole", "i", 5)]
        low, high = (float(end) for end in _stored(state, "ends", "f", 2))
        count, zeros, apart, exponent, first = whole
        usable = (
            len(counts) <= self.bins
            and bool(np.all(counts >= 0))
            and int(counts.sum()) == count
            and 0 <= zeros <= count
            and apart >= 0
            and (count > 0) == (len(counts) > 0)
        )
        if usable and count:
            usable = -_FILL <= low <= high <= _FILL
            usable = usable and exponent == self._needed(low, high)
            usable = usable and first == math.floor(math.ldexp(low, -exponent))
            last = math.floor(math.ldexp(high, -exponent)) if usable else 0
            usable = usable and len(counts) == last - first + 1
        if not usable:
            raise UsageError("a stored histogram contradicts itself")
        self.counts, self.count, self.zeros, self.apart = counts, count, zeros, apart
        self._exponent, self._first, self.low, self.high = exponent, first, low, high


@dataclass(eq=False)
class Sample(Statistic):
    """A seeded random choice of rows, each as likely as any other.

    Every row draws a number; the rows with the largest numbers stay (Vitter 1985's
    reservoir, in the form with priorities). Rows keep the order in which they came.

    Attributes:
        size: Rows kept at most.
        axis: Axis of the channels; every other axis counts as rows.
        seed: Seed of the draws.
        rows: Rows seen.
    """

    size: int = 256
    axis: int = -1
    seed: int = 0
    rows: int = field(init=False, default=0)
    _kept: Array | None = field(init=False, default=None)
    _priority: Float64 = field(init=False, default_factory=lambda: np.zeros(0))
    _draws: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Start the stream of draws."""
        if self.size < 1:
            raise UsageError(f"a sample keeps at least 1 row, not {self.size}")
        self._draws = np.random.default_rng(self.seed)

    @property
    def values(self) -> Array:
        """The chosen rows, [at most size, channels], in the dtype they came in."""
        if self._kept is None:
            raise UsageError("a sample was read before it was fed")
        return self._kept

    def update(self, array: Array) -> None:
        """Offer the rows of one batch."""
        view = _around(array, self.axis)
        rows = np.moveaxis(view, 1, 2).reshape(-1, view.shape[1])
        self.rows += len(rows)
        self._offer(rows, self._draws.random(len(rows)))

    def _offer(self, rows: Array, priority: Float64) -> None:
        if self._kept is None:
            self._kept = rows[:0].copy()
        elif self._kept.shape[1] != rows.shape[1]:
            raise ModelError(
                f"a sample saw {self._kept.shape[1]} channels before and "
                f"{rows.shape[1]} now"
            )
        everything = np.concatenate([self._priority, priority])
        best = np.sort(np.argsort(-everything, kind="stable")[: self.size])
        old = best[best < len(self._priority)]
        new = best[best >= len(self._priority)] - len(self._priority)
        self._kept = np.concatenate([self._kept[old], rows[new]])
        self._priority = everything[best]

    def _merge(self, other: Sample) -> None:
        if other._kept is not None:
            self._offer(other._kept, other._priority)
        self.rows += other.rows


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
            self.rows += len(rows)
            self._offer(rows, self._draws.random(len(rows)))


class Multi(Stored):
    """Several statistics of one tensor, gathered together.

    Attributes:
        parts: The statistics by name; each is also an item, ``multi["range"]``.
    """

    def __init__(self, **parts: Statistic) -> None:
        """Hold these statistics."""
        if not parts:
            raise UsageError("Multi needs at least one statistic")
        self.parts = parts

    @property
    def key(self) -> Hashable:
        """Names and keys of the parts."""
        return ("Multi", *((name, part.key) for name, part in self.parts.items()))

    def fresh(self) -> Multi:
        """Return an empty statistic with the same parts."""
        return Multi(**{name: part.fresh() for name, part in self.parts.items()})

    def __getitem__(self, name: str) -> Statistic:
        """Return one part."""
        return self.parts[name]

    def update(self, array: Array) -> None:
        """Feed every part."""
        for part in self.parts.values():
            part.update(array)

    def _merge(self, other: Multi) -> None:
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def state(self) -> dict[str, Array]:
        """Return what the parts have gathered, named by their number."""
        return {
            f"{number}.{key}": array
            for number, part in enumerate(self.parts.values())
            for key, array in _storable(part).state().items()
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over the stored states of all parts."""
        for number, part in enumerate(self.parts.values()):
            start = f"{number}."
            _storable(part).restore(
                {
                    key.removeprefix(start): array
                    for key, array in state.items()
                    if key.startswith(start)
                }
            )


def _storable(part: Statistic) -> Stored:
    if not isinstance(part, Stored):
        raise UsageError(f"a {type(part).__name__} cannot be stored")
    return part
