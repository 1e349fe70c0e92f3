"""What a channel is worth: ways to compare channels, to choose those that stay.

An ``Importance`` says for each group what each of its channels is worth. Figures of
different groups are compared where an amount is of the whole model, so they are shares:
of what the outputs lose, of what the layers that read the channels lose, or of a
group's norm. Another package adds its own to ``IMPORTANCES``; importing it is enough.

========== =====================================================================
outputs    what the model's outputs lose once the readers are fitted anew
           (Optimal Brain Surgeon for blocks: Hassibi and Stork 1993, section 3)
inputs     what the layers that read the channels lose once fitted anew
energy     what the channels add to what these layers give
taylor     change of the loss to first order, squared (Molchanov et al. 2019,
           equation 8); of the outputs where there are no labels
fisher     what the outputs lose if a channel is masked, to second order
           (Theis et al. 2018, section 2.1), nothing fitted anew
norm       L2 norm of what makes a channel, times that of what reads it
median     sum of distances to the other channels' weights: those next to the
           geometric median can be made up for by the others (He et al. 2019)
scale      scales of BatchNormalization (Liu et al. 2017)
========== =====================================================================

Tested in tests/passes/test_channels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.base import Context
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.solvers.channels import block_losses, energies
from onnxshrink.structure import layers, thinning
from onnxshrink.structure.channels import Group, Slices
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight
from onnxshrink.training.importance import mask_gradients, output_metrics

__all__ = [
    "IMPORTANCES",
    "LARGEST",
    "Importance",
    "blocks_of",
    "has_free_bias",
    "moments_of",
    "readers_of",
    "width_of",
]

Array = NDArray[Any]
Score = Callable[[Model, Sequence[Group], Context], "list[Array]"]

LARGEST = 4608
"""Inputs of a layer up to which removed ones are made up for."""
_SHRUNK = 0.1
"""Share by which products of different inputs are shrunk at least."""
_SEEN = 64
"""Samples that gradients are taken on."""


@dataclass(frozen=True)
class Importance:
    """A way to compare channels.

    Attributes:
        score: Returns for each group what each channel is worth, float64 [channels],
            at least 0.
        needs_data: Whether it runs the model on calibration samples.
    """

    score: Score
    needs_data: bool = False

    def __call__(
        self, model: Model, groups: Sequence[Group], ctx: Context
    ) -> list[Array]:
        """Return what each channel of each group is worth."""
        return self.score(model, groups, ctx)


def _by_norm(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """Norm of what makes a channel times norm of what reads it; shares of a group."""
    return [_share(thinning.norms(group)) for group in groups]


def _share(score: Array) -> Array:
    total = float(score.sum())
    return np.asarray(score / total if total > 0 else score)


def _by_median(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """Distances to the other channels of what makes a channel; shares of a group."""
    found = []
    for group in groups:
        made = [part for part in group.where if part.role in ("producer", "filter")]
        squares = np.zeros((group.size, group.size))
        for part in made:
            rows = thinning.slices(part)
            norms = np.square(rows).sum(1)
            squares += norms[:, None] + norms - 2 * rows @ rows.T
        found.append(_share(np.sqrt(np.maximum(squares, 0)).sum(1)))
    return found


def _by_scale(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """Scales of BatchNormalization; groups without one by norm. Shares of a group."""
    found = []
    for group in groups:
        has_norm = any(part.role == "variance" for part in group.where)
        scales = [part for part in group.where if part.role == "scale"]
        if not has_norm or not scales:
            found.append(_share(thinning.norms(group)))
            continue
        sizes = sum(np.abs(thinning.slices(part)).sum(1) for part in scales)
        found.append(_share(np.asarray(sizes)))
    return found


def _by_taylor(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """Change of the loss to first order where a channel is masked, squared."""
    return _by_masks(model, groups, ctx, labels=True)


def _by_fisher(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What the outputs lose where a channel is masked, to second order."""
    return _by_masks(model, groups, ctx, labels=False)


def _by_masks(
    model: Model, groups: Sequence[Group], ctx: Context, *, labels: bool
) -> list[Array]:
    samples = ctx.need_data("to see what masking a channel does", "calibration")
    readers = readers_of(model, groups)
    places: dict[str, int] = {}
    shapes = value_infos(model)
    for layer in readers.values():
        tensor, axis = layer.input, layer.uses[0].input_channels
        info = None if tensor is None else shapes.get(tensor.name)
        if tensor is None or info is None or info.shape is None:
            continue
        places[tensor.name] = axis % len(info.shape)
    try:
        found = mask_gradients(
            model,
            places,
            samples.take(slice(0, _SEEN)),
            labels=labels,
            seed=ctx.seed,
            threads=ctx.threads,
        )
    except ModelError as error:
        ctx.skipped("channels", f"channels are compared by their norms: {error}")
        return _by_norm(model, groups, ctx)
    scores = []
    for group, plain in zip(groups, _by_norm(model, groups, ctx), strict=True):
        total: Array | None = None
        for part in group.where:
            if part.role != "consumer" or part.weight.name not in readers:
                continue
            layer = readers[part.weight.name]
            tensor = layer.input
            mine = None if tensor is None else found.get(tensor.name)
            axis = part.weight.shape[part.axis]
            if mine is None or mine.shape[1] != axis:
                continue
            # What is masked together adds up before it is squared.
            masked = np.square(mine[:, part.offsets].sum(2)).mean(0)
            total = masked if total is None else total + masked
        scores.append(plain * 0.0 if total is None else np.asarray(total))
        if total is None:
            scores[-1] = plain
    return scores


def _by_energy(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What channels add to the layers that read them, as a share of what these give."""
    return _by_consumers(model, groups, ctx, fits=False, counts=None)


def _by_inputs(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What the layers that read channels lose once they are fitted anew; a share."""
    return _by_consumers(model, groups, ctx, fits=True, counts=None)


def _by_outputs(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What the model's outputs lose once the layers that read channels are fitted."""
    samples = ctx.need_data("to see what errors cost the outputs", "calibration")
    readers = readers_of(model, groups)
    values = {
        layer.output.name: layer.uses[0].output_channels
        for layer in readers.values()
        if not layer.is_shared and layer.kind in ("Conv", "Gemm", "MatMul")
    }
    shapes = value_infos(model)
    places = {}
    for name, axis in values.items():
        info = shapes.get(name)
        rank = None if info is None or info.shape is None else len(info.shape)
        if axis >= 0 or rank is not None:
            places[name] = axis if axis >= 0 else (rank or 0) + axis
    try:
        counts = output_metrics(
            model,
            places,
            samples.take(slice(0, _SEEN)),
            seed=ctx.seed,
            threads=ctx.threads,
        )
    except ModelError as error:
        ctx.skipped("channels", f"layers are compared by their own outputs: {error}")
        counts = {}
    return _by_consumers(model, groups, ctx, fits=True, counts=counts or None)


def _by_consumers(
    model: Model,
    groups: Sequence[Group],
    ctx: Context,
    *,
    fits: bool,
    counts: Mapping[str, Array] | None,
) -> list[Array]:
    readers = readers_of(model, groups)
    small = [layer for layer in readers.values() if width_of(layer) <= LARGEST]
    seen = ctx.inputs(small) if small else {}
    totals = [np.zeros(group.size) for group in groups]
    known = [False] * len(groups)
    by_weight: dict[str, list[tuple[int, Slices]]] = {}
    for number, group in enumerate(groups):
        for part in group.where:
            if part.role == "consumer":
                by_weight.setdefault(part.weight.name, []).append((number, part))
    for name in seen:
        layer, inputs = readers[name], seen[name]
        moments = moments_of(layer, inputs)
        if moments is None:
            continue
        weights = layer.layout.matrices(layer.weight.read())[0].astype(np.float64)
        output = None
        if counts is not None:
            output = counts.get(layer.output.name)
            if output is not None and output.shape != (len(weights),):
                output = None
        if output is None:
            total = float(np.einsum("oi,ij,oj->", weights, moments, weights))
            mean = np.mean([c.mean() for c in counts.values()]) if counts else 1.0
            output = np.full(len(weights), float(mean) / max(total, 1e-30))
            if counts:
                output *= max(total, 1e-30)
        for number, part in by_weight[name]:
            blocks = blocks_of(layer, part)
            loss = block_losses if fits else energies
            totals[number] += loss(weights, moments, blocks, output)
            known[number] = True
    plain = _by_norm(model, groups, ctx)
    some = [float(t.sum()) for t, k in zip(totals, known, strict=True) if k]
    typical = float(np.median(some)) if some else 1.0
    return [
        total if is_known else norm * typical
        for total, norm, is_known in zip(totals, plain, known, strict=True)
    ]


def readers_of(model: Model, groups: Sequence[Group]) -> dict[str, LinearWeight]:
    """Return the layers that sum up channels of groups, by the name of the weight."""
    wanted = {
        id(part.weight.constant)
        for group in groups
        for part in group.where
        if part.role == "consumer"
    }
    return {
        layer.name: layer
        for layer in layers.find(model)
        if id(layer.weight.constant) in wanted
        and not layer.why_not
        and layer.groups == 1
        and layer.kind in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and not any(use.layout != layer.layout for use in layer.uses)
    }


def moments_of(layer: LinearWeight, seen: InputStatistics) -> Array | None:
    """Return second moments of inputs, about their mean if the bias is free.

    Few samples make inputs look as if others could stand in for them: with fewer
    samples than inputs, all of them. Products of different inputs are shrunk by the
    share ``inputs / (inputs + samples)``, a plain form of the shrinkage of Ledoit and
    Wolf (2004), and by a tenth at least, since positions of an image are no
    independent samples.
    """
    if seen.gram is None or not seen.count or not seen.is_finite:
        return None
    moments = seen.gram[0] / seen.count
    if has_free_bias(layer):
        mean = seen.mean[0]
        moments = moments - np.outer(mean, mean)
    shrunk = max(_SHRUNK, len(moments) / (len(moments) + seen.count))
    diagonal = np.diag(moments).copy()
    moments = moments * (1 - shrunk)
    moments[np.diag_indices_from(moments)] = diagonal
    return np.asarray(moments)


def has_free_bias(layer: LinearWeight) -> bool:
    """Whether a layer has a bias that can take up means."""
    bias = layer.bias
    return bias is not None and not bias.why_not


def blocks_of(layer: LinearWeight, part: Slices) -> Array:
    """Return which inputs of a layer each channel is, int64 [channels, inputs each]."""
    shape = [1] * len(layer.weight.shape)
    shape[part.axis] = -1
    along = np.arange(layer.weight.shape[part.axis]).reshape(shape)
    places = layer.layout.matrices(np.broadcast_to(along, layer.weight.shape))[0, 0]
    order = np.argsort(places, kind="stable").reshape(layer.weight.shape[part.axis], -1)
    return order[part.offsets].reshape(len(part.offsets), -1)


def width_of(layer: LinearWeight) -> int:
    """Return how many inputs a layer sums up."""
    return layer.layout.matrices_shape[2]


IMPORTANCES: dict[str, Callable[[Model, Sequence[Group], Context], list[Array]]] = {
    "outputs": Importance(_by_outputs, needs_data=True),
    "inputs": Importance(_by_inputs, needs_data=True),
    "energy": Importance(_by_energy, needs_data=True),
    "taylor": Importance(_by_taylor, needs_data=True),
    "fisher": Importance(_by_fisher, needs_data=True),
    "norm": Importance(_by_norm),
    "median": Importance(_by_median),
    "scale": Importance(_by_scale),
}
"""Ways to compare channels, by name; another package may add its own."""
