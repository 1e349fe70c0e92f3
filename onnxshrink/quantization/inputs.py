"""What layers read, within the bounds of quantization, and once in a step.

The attempts of a step start from the same model, and differ in what they equalize: each
divides other inputs by other scales. ``Seen`` knows that model and those scales. What
the first attempt has gathered then serves all that follow: a Gram matrix of scaled
inputs is the matrix with its rows and columns scaled.

Tested in tests/passes/test_quantize.py and tests/test_steps.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxshrink.activations.inputs import (
    gather_inputs,
    gram_bytes,
    groups_of,
    seen_from_outside,
)
from onnxshrink.base import Context
from onnxshrink.model import Model
from onnxshrink.quantization.smoothing import Smoothed
from onnxshrink.statistics import Statistic, Stored
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight

__all__ = ["Seen", "groups", "input_grams"]

Float64 = NDArray[np.float64]

_HELD = 128 << 20
_HELD_MOST = 1 << 30
"""Bytes of Gram matrices that are held at the same time: as many as the model's weights
take, within these bounds. Each group is a run of all that lies before its layers."""
_SLICE = 32 << 20
"""Bytes of activations that are held at the same time."""
_LARGEST = 256 << 20
"""Bytes of a Gram matrix from which a layer is not watched."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The model that all attempts of a step start from, and what this one has scaled.

    Attributes:
        start: The digest of that model, and the samples.
        inputs: What the inputs of a layer are divided by, float64 [inputs], by the name
            of its weight.
        values: The same for every other value that is divided.
    """

    start: tuple[Hashable, ...]
    inputs: Mapping[str, Float64]
    values: Mapping[str, Float64]

    @classmethod
    def of(cls, start: str, smoothed: Iterable[Smoothed], ctx: Context) -> Seen:
        """Return what there is to know of an attempt.

        Args:
            start: The ``fingerprint`` of the model before anything was smoothed.
            smoothed: What was.
            ctx: The samples.
        """
        found = list(smoothed)
        return cls(
            ("quantize", start, ctx.samples.calibration),
            {name: one.scales for one in found for name in one.layers},
            {name: one.scales for one in found for name in one.values},
        )

    def of_value(self, name: str) -> tuple[Hashable, ...]:
        """Return what tells a value from those of other attempts."""
        scales = self.values.get(name)
        return (*self.start, name, b"" if scales is None else scales.tobytes())

    def of_inputs(self, name: str) -> tuple[Hashable, ...]:
        """Return what tells the inputs of a layer from those of other attempts."""
        scales = self.inputs.get(name)
        return (*self.start, name, b"" if scales is None else scales.tobytes())

    def recall(self, name: str, ctx: Context) -> InputStatistics | None:
        """Return what a layer reads, from what an earlier attempt has gathered."""
        kept = ctx.memory.get((*self.start, "inputs", name))
        if kept is None:
            return None
        known: InputStatistics
        known, before = kept
        ratio = before / self._scales(name)
        return known if (ratio == 1.0).all() else known.scaled(ratio)

    def keep(self, found: Mapping[str, InputStatistics], ctx: Context) -> None:
        """Keep what layers read for the attempts that follow."""
        for name, one in found.items():
            ctx.memory.put((*self.start, "inputs", name), (one, self._scales(name)))

    def _scales(self, name: str) -> Float64:
        return self.inputs.get(name, np.ones(()))


def groups(layers: Iterable[LinearWeight]) -> Iterator[list[LinearWeight]]:
    """Cut layers that can be watched into groups for one run each."""
    small = [layer for layer in layers if gram_bytes(layer) <= _LARGEST]
    if not small:
        return iter(())
    weights = sum(weight.nbytes for weight in small[0].weight.model.weights())
    held = min(max(_HELD, weights), _HELD_MOST)
    return groups_of(seen_from_outside(small), held)


def input_grams(
    model: Model,
    layers: Sequence[LinearWeight],
    ctx: Context,
    beside: Mapping[str, Stored] | None = None,
    *,
    seen: Seen | None = None,
    cache: Path | None = None,
) -> tuple[dict[str, InputStatistics], dict[str, Statistic]]:
    """Gather the Gram matrices of layers in one run over the calibration samples.

    Args:
        model: The model.
        layers: The layers, as ``groups`` gives them.
        ctx: Samples, session options and memory.
        beside: Further statistics, by the name of their tensor, for the same run.
        seen: What the step knows of the inputs, if it is to keep the matrices.
        cache: Folder to keep what is gathered in; see ``gather_inputs``.

    Returns:
        What layers read, by the name of the weight; and the statistics of ``beside``.
        A layer that saw no finite row, or values too large to be squared, is absent.
    """
    known: dict[str, InputStatistics] = {}
    for layer in layers if seen is not None else ():
        assert seen is not None
        one = seen.recall(layer.name, ctx)
        if one is not None:
            known[layer.name] = one
    missing = [layer for layer in layers if layer.name not in known]
    if not missing and not beside:
        return known, {}
    found, others = gather_inputs(
        ctx, missing, beside, model=model, slice_bytes=_SLICE, folder=cache
    )
    usable = {name: one for name, one in found.items() if one.is_finite and one.count}
    if seen is not None:
        seen.keep(usable, ctx)
    return {**known, **usable}, others
