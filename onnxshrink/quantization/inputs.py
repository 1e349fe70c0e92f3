"""What layers see: Gram matrices of their inputs, a bounded number at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from onnxshrink.activations import kept
from onnxshrink.activations.gathering import gather
from onnxshrink.base import Context
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.statistics import Multi, Statistic, Stored
from onnxshrink.structure.layers import LinearWeight

__all__ = ["groups", "input_grams"]

_HELD = 128 << 20
"""Bytes of Gram matrices that are held at the same time."""
_SLICE = 32 << 20
"""Bytes of activations that are held at the same time."""
_LARGEST = 256 << 20
"""Bytes of a Gram matrix from which a layer is not watched."""


def groups(layers: Iterable[LinearWeight]) -> Iterator[list[LinearWeight]]:
    """Cut layers that can be watched into groups for one run each."""
    group: list[LinearWeight] = []
    held = 0
    for layer in layers:
        size = _bytes(layer)
        if size > _LARGEST or layer.statistics_for("gram") is None:
            continue
        if group and held + size > _HELD:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


def _bytes(layer: LinearWeight) -> int:
    """Bytes of the float64 Gram matrices of a layer."""
    stacks, _, inputs = layer.layout.matrices_shape
    return stacks * inputs * inputs * 8


def input_grams(
    model: Model,
    layers: Iterable[LinearWeight],
    ctx: Context,
    beside: Mapping[str, Stored] | None = None,
    *,
    cache: Path | None = None,
) -> tuple[dict[str, list[Statistic]], dict[str, Statistic]]:
    """Gather the Gram matrices of layers in one run over the calibration samples.

    They are not put into the cache of the context: one use is all they are for.

    Args:
        model: The model.
        layers: The layers, as ``groups`` gives them.
        ctx: Samples and session options.
        beside: Further statistics, by the name of their tensor, for the same run.
        cache: Folder to keep what is gathered in. Without one it is kept in the folder
            of the context until the step is done, if there is such.

    Returns:
        Statistics as ``layers.gram`` takes them, by the name of the weight; a layer
        whose inputs cannot be seen from outside is absent. And those of ``beside``.

    Raises:
        ModelError: A layer reads NaN or infinity on a sample.
    """
    samples = ctx.samples.calibration
    count = len(samples) if samples is not None else 1
    wanted: dict[str, dict[str, Statistic]] = {
        name: {"beside": one} for name, one in (beside or {}).items()
    }
    places: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        for tensor, statistic in layer.statistics_for("gram", count) or ():
            # Layers that read the same values in the same way share the matrix.
            label = str(statistic.key)
            wanted.setdefault(tensor.name, {})[label] = statistic
            places.setdefault(layer.name, []).append((tensor.name, label))
    if not wanted:
        return {}, {}
    asked = {name: Multi(**parts) for name, parts in wanted.items()}
    found = {
        name: one
        for name, one in _gathered(model, asked, ctx, cache).items()
        if isinstance(one, Multi)
    }
    seen = {
        name: [found[tensor][label] for tensor, label in at]
        for name, at in places.items()
        if all(tensor in found for tensor, _ in at)
    }
    for name, parts in seen.items():
        if not all(_is_finite(part) for part in parts):
            raise ModelError(
                f"{name} multiplies NaN or infinity on the calibration data; "
                f"skip={name} leaves it alone"
            )
    others = {name: found[name]["beside"] for name in beside or {} if name in found}
    return seen, others


def _is_finite(statistic: Statistic) -> bool:
    matrix = getattr(statistic, "matrix", None)
    return matrix is None or bool(np.isfinite(matrix).all())


def _gathered(
    model: Model, asked: Mapping[str, Multi], ctx: Context, cache: Path | None
) -> dict[str, Statistic]:
    """Run over the samples, or read what an earlier run has kept."""
    samples = ctx.samples.calibration
    folder = cache or ctx.folder
    if folder is None or samples is None or samples.random:
        alone = dataclasses.replace(ctx, cache={})
        return gather(model, asked, alone, slice_bytes=_SLICE)
    # What is deleted with the step is worth writing only where it took long.
    least = 0.0 if cache is not None else kept.SAVE_SECONDS
    return kept.gather_cached(
        model, asked, ctx, folder, slice_bytes=_SLICE, least=least
    )
