"""prune: set the least important weights to zero."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.analysis import layers
from onnxshrink.analysis.layers import Layer, Role
from onnxshrink.analysis.sparsity import (
    Pattern,
    choose_smallest,
    smallest,
    zero_below,
    zero_smallest,
)
from onnxshrink.base import Context, Promise, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Weight
from onnxshrink.tensors import ArrayTensor, bits_of

__all__ = ["Prune"]

_STEPS = 32
"""Points of a site's path from untouched to as listed."""
_PATTERN = re.compile(r"(?:(\d+):(\d+))|(?:(\d+)x(\d+))")


@dataclass(frozen=True)
class PruneSite(Site):
    """A weight to prune, and how far it is pruned on the way there.

    Attributes:
        path: Zeros of this weight at strengths 0, 1/32, ..., 1; empty if there is
            nothing in between.
    """

    path: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prune(SitePass):
    """Set the least important weights to zero.

    Attributes:
        sparsity: Fraction of the weights that are zero afterwards; zeros that are
            there count. 0.5 unless a threshold or an N:M pattern says otherwise.
        threshold: Set every weight to zero that is smaller than this in magnitude.
        scope: ``local`` gives every weight tensor that sparsity, ``global`` all of
            them together.
        pattern: ``2:4`` keeps at most 2 of 4 neighbours along the inputs, ``4x1`` sets
            whole blocks of 4 outputs x 1 input to zero; empty leaves zeros free.
        importance: ``magnitude``.
        also: ``tables``: embedding tables read by Gather; ``biases``: biases, and
            scale and shift of normalisations.
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "prune"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "prune:sparsity=0.8,scope=global"

    sparsity: float | None = None
    threshold: float | None = None
    scope: Literal["local", "global"] = "global"
    pattern: str = ""
    importance: Literal["auto", "magnitude"] = "auto"
    also: tuple[Literal["tables", "biases"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity is a fraction from 0 to 1, not {self.sparsity}")
        if self.threshold is not None:
            if not (self.threshold >= 0 and math.isfinite(self.threshold)):
                raise UsageError(f"threshold is at least 0, not {self.threshold}")
            if self.sparsity is not None or self.pattern:
                raise UsageError("threshold goes with neither sparsity nor pattern")
        if self.zeros.of and self.sparsity is not None:
            raise UsageError(f"pattern {self.pattern} leaves no choice of sparsity")

    @cached_property
    def zeros(self) -> Pattern:
        """The pattern, read."""
        found = _PATTERN.fullmatch(self.pattern)
        if not self.pattern:
            return Pattern()
        if found is None:
            raise UsageError(
                f"pattern is N:M such as 2:4, or blocks such as 4x1, not {self.pattern}"
            )
        keep, of, rows, columns = (int(part or 0) for part in found.groups())
        if of:
            if not 0 < keep < of <= 1024:
                raise UsageError(
                    f"pattern {self.pattern} keeps {keep} of {of}; 0 < N < M <= 1024"
                )
            return Pattern(keep=keep, of=of)
        if not (0 < rows <= 4096 and 0 < columns <= 4096):
            raise UsageError(f"blocks of {self.pattern} do not exist; sizes are 1-4096")
        return Pattern(rows=rows, columns=columns)

    @property
    def target(self) -> float:
        """The sparsity asked for, or its default."""
        return 0.5 if self.sparsity is None else self.sparsity

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the weights to prune, each with its share of the zeros."""
        found = self._layers(model, ctx)
        if not found:
            return []
        weights = [layer.weight for layer in found]
        present = [_count_zeros(weight) for weight in weights]
        paths = self._paths(found, present, ctx)
        sites = []
        for layer, path, zero in zip(found, paths, present, strict=True):
            size = layer.weight.size
            detail: dict[str, object] = {
                "sparsity": path[-1] / size,
                "importance": "magnitude",
            }
            if self.pattern:
                detail["pattern"] = self.pattern
            if path[-1] <= zero:
                ctx.skipped(layer.name, f"{zero / size:.1%} of it is zero already")
                continue
            bits = bits_of(layer.weight.data_type)
            saved = _stored_bytes(size, zero, bits) - _stored_bytes(
                size, path[-1], bits
            )
            sites.append(
                PruneSite(
                    layer.name,
                    layer.kind,
                    max(0, saved),
                    detail=detail,
                    path=() if self.zeros.of else tuple(path),
                )
            )
        return sites

    def _layers(self, model: Model, ctx: Context) -> list[Layer]:
        roles: list[Role] = ["weight"]
        if "tables" in self.also:
            roles.append("table")
        if "biases" in self.also:
            roles.append("bias")
        found = []
        for layer in layers.find(model, only=self.only, skip=self.skip, roles=roles):
            why = layer.why_not or _unusable(layer.weight) or self._unfit(layer)
            if why:
                ctx.skipped(layer.name, why)
            else:
                found.append(layer)
        return found

    def _unfit(self, layer: Layer) -> str:
        """Return why the pattern does not go with the layer."""
        if not self.pattern:
            return ""
        if any(use.layout != layer.layout for use in layer.uses):
            return "its uses read it along different axes, so no pattern serves all"
        _, _, inputs = layer.layout.matrices_shape
        if self.zeros.of and inputs <= self.zeros.keep:
            return f"it has {inputs} inputs, too few for {self.pattern}"
        return ""

    def _paths(
        self, found: Sequence[Layer], present: Sequence[int], ctx: Context
    ) -> list[list[int]]:
        """Return for each layer its zeros at strengths 0, 1/32, ..., 1."""
        sizes = [layer.weight.size for layer in found]
        if self.threshold is not None:
            ends = [_count_below(layer.weight, self.threshold) for layer in found]
            return [
                _counts(size, zero, end / size)
                for size, zero, end in zip(sizes, present, ends, strict=True)
            ]
        if self.zeros.of:
            kept = [self._kept(layer) for layer in found]
            return [[s - k] for s, k in zip(sizes, kept, strict=True)]
        if self.scope == "local" or len(found) == 1:
            return [
                _counts(size, zero, self.target)
                for size, zero in zip(sizes, present, strict=True)
            ]
        totals = _counts(sum(sizes), sum(present), self.target)
        sources = [layer.weight.tensor for layer in found]
        shares = [smallest(sources, total, ctx.map) for total in totals]
        return [list(path) for path in zip(*shares, strict=True)]

    def _kept(self, layer: Layer) -> int:
        """Return how many entries an N:M pattern keeps at most."""
        groups, outputs, inputs = layer.layout.matrices_shape
        runs, rest = divmod(inputs, self.zeros.of)
        keep = self.zeros.keep
        return groups * outputs * (runs * keep + min(rest, keep))

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with fewer zeros.

        The share of weights that stay goes from all to as listed in equal ratios, not
        in equal steps: what a file's size depends on is what stays. Under
        ``scope=global`` all sites at one strength are the global choice at a lower
        sparsity. An N:M pattern has nothing in between.
        """
        if strength >= 1:
            return site
        if strength <= 0 or not isinstance(site, PruneSite) or not site.path:
            return None
        at = np.interp(strength * _STEPS, np.arange(len(site.path)), site.path)
        size = site.path[-1] / float(str(site.detail["sparsity"]))
        sparsity = int(at) / size
        return PruneSite(
            site.where,
            site.kind,
            int(site.bytes_saved * strength),
            detail={**site.detail, "sparsity": sparsity},
            path=site.path,
        )

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Zero one weight's least important entries."""
        weight = model.weight(site.where)
        sparsity = float(str(site.detail["sparsity"]))
        count = round(sparsity * weight.size)
        if self.pattern:
            layer = next(layers.find(model, only=[site.where]))
            values = self._patterned(layer, count)
        else:
            values = zero_smallest(weight.tensor, count, weight.dtype)
        model.set_weight(weight, values.reshape(weight.shape))
        ctx.did(weight.name, f"{sparsity:.1%} zero, by magnitude")

    def _patterned(self, layer: Layer, count: int) -> NDArray[Any]:
        values = layer.weight.read()
        matrices = layer.layout.matrices(values)
        energy = np.square(matrices.astype(np.float32))
        if self.zeros.of:
            mask = self.zeros.drop(energy)
        else:
            scores = self.zeros.scores(energy)
            blocks = round(count / values.size * scores.size)
            chosen = choose_smallest(ArrayTensor(scores), blocks)
            mask = self.zeros.spread(chosen.reshape(scores.shape), matrices.shape)
        pruned = np.where(mask, matrices.dtype.type(0), matrices)
        return layer.layout.array(pruned)


def _count_zeros(weight: Weight) -> int:
    return sum(int((chunk == 0).sum()) for chunk in weight.chunks())


def _count_below(weight: Weight, threshold: float) -> int:
    return sum(int((np.abs(chunk) < threshold).sum()) for chunk in weight.chunks())


def _unusable(weight: Weight) -> str:
    for chunk in weight.chunks():
        wide = chunk if chunk.dtype.itemsize >= 4 else chunk.astype(np.float32)
        if not np.isfinite(wide).all():
            return "it holds NaN or infinity"
    return ""


def _counts(size: int, present: int, sparsity: float) -> list[int]:
    """Return the zeros at strengths 0, 1/32, ..., 1 on the way to a sparsity.

    What stays goes down in equal ratios; to nothing, in ratios to a single weight.
    """
    end = max(present, math.floor(sparsity * size + 0.5))
    left, last = size - present, size - end
    if not left:
        return [size] * (_STEPS + 1)
    ratio = max(last, 1) / left
    path = [size - round(left * ratio ** (k / _STEPS)) for k in range(_STEPS)]
    return [*path, end]


def _stored_bytes(size: int, zeros: int, bits: int) -> int:
    """Estimate what a tensor takes in a file: plain, bit mask, or gaps."""
    left = size - zeros
    values = left * bits
    mask = size + values
    gaps = [left * g + values + size * g // (1 << g) for g in (4, 8)]
    return min(size * bits, mask, *gaps) // 8
