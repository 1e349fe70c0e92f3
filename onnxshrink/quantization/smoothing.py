"""Scales that make one factor of a product easier to quantize at the other's cost.

``X W = (X / s) (s W)`` for any positive scale of each input channel. Both methods here
choose ``s`` from calibration data, multiply it into the weights, and divide the
activations by it in what produces them (a normalisation, a bias, a linear layer), or in
a Mul where that has other readers too. The model computes the same as before, up to
float rounding: it only becomes easier to quantize.

- ``smooth`` (Xiao et al. 2023, "SmoothQuant", eq. 4) narrows activations whose outlier
  channels use up the range of a tensor, for activations of 8 bits.
- ``awq`` (Lin et al. 2024, "AWQ", section 3.2) widens the weights that large
  activations multiply, for weights of few bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.base import Context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.quantization.dynamic import safe_scale
from onnxshrink.quantization.weightonly import Levels, block_of
from onnxshrink.solvers.rounding import Fit, decode, fit, nearest
from onnxshrink.statistics import ChannelRange, Multi, Sample
from onnxshrink.structure.bias import addend
from onnxshrink.structure.layers import LinearWeight, find, is_float, layer_at

__all__ = ["Group", "Smoothed", "apply", "awq", "groups", "smooth"]

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROWS = 256
"""Rows of activations on which a choice of scales is tried."""
OUTPUTS = 256
"""Outputs of a layer on which AWQ tries its scales."""
ALPHAS = tuple(step / 10 for step in range(1, 11))
CEILINGS = 12
"""Heights at which outlier channels are cut, tried beside eq. 4."""
MUL_PAYS = 0.5
"""Share of the error that must be left at most for a Mul at run time to be added."""
_NORMS = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
)
_TINY = 1e-5
_QUIETEST = 64.0
"""How far below the largest activation a channel may count."""
_NOTHING = 1e-30


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that multiply the same activations and so share the scales of channels.

    Attributes:
        tensor: The activations, channels last.
        layers: The weights, each read by MatMul or Gemm only.
    """

    tensor: gs.Tensor
    layers: tuple[LinearWeight, ...]

    @property
    def readers(self) -> tuple[Node, ...]:
        """Nodes that multiply the activations."""
        return tuple(use.node for layer in self.layers for use in layer.uses)

    def weights(self) -> list[Array]:
        """Return the weights, float32 [outputs, inputs]."""
        return [
            layer.layout.matrices(layer.weight.read())[0].astype(np.float32)
            for layer in self.layers
        ]


@dataclass(frozen=True, eq=False)
class Smoothed:
    """Layers whose inputs were divided by a scale for each channel.

    Attributes:
        layers: Names of the weights.
        scales: What the inputs were divided by, float64 [inputs].
        values: Names of all values that were divided on the way.
        where: Nodes that divide them now, in words.
    """

    layers: tuple[str, ...]
    scales: Float64
    values: tuple[str, ...]
    where: str


def groups(
    model: Model, *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[Group]:
    """List the activations of the main graph whose channels can be divided by scales.

    Args:
        model: The model.
        only: As for ``layers.find``.
        skip: As for ``layers.find``.
    """
    found: dict[int, tuple[gs.Tensor, list[LinearWeight]]] = {}
    here = {id(node) for node in model.graph.nodes}
    for layer in find(model, only=only, skip=skip):
        tensors = {id(use.node.inputs[0]): use.node.inputs[0] for use in layer.uses}
        if layer.why_not or len(tensors) != 1 or not all(_multiplies(layer)):
            continue
        if any(id(use.node) not in here for use in layer.uses):
            continue
        tensor = next(iter(tensors.values()))
        if model.constant(tensor) is None:
            found.setdefault(id(tensor), (tensor, []))[1].append(layer)
    return [Group(tensor, tuple(layers)) for tensor, layers in found.values()]


def _multiplies(layer: LinearWeight) -> Iterator[bool]:
    for use in layer.uses:
        yield (
            use.node.op in {"Gemm", "MatMul"}
            and use.index == 1
            and len(use.layout.shape) == 2
            and use.input_channels == -1
            and use.layout == layer.layout
        )


# --- SmoothQuant ----------------------------------------------------------------------


def smooth(
    model: Model,
    ctx: Context,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    pairs: bool = True,
) -> list[Smoothed]:
    """Take outlier channels out of activations that are about to become 8 bits.

    Scales are those of eq. 4, ``max|X_j|^alpha / max|W_j|^(1 - alpha)``, or
    ``max(1, max|X_j| / ceiling)``, which only touches outliers; of both the one with
    the smallest error of outputs computed with uint8 activations (one range) and int8
    weights (one scale for each output), on rows of the calibration data.

    Args:
        model: The model, changed in place.
        ctx: Calibration samples; receives what was done and what was not.
        only: Names or glob patterns of weights or nodes, or op types.
        skip: The same; wins over ``only``.
        pairs: As for ``dynamic.safe_scale``.

    Returns:
        The groups of layers that were changed.
    """
    wanted = groups(model, only=only, skip=skip)
    changed: list[Smoothed] = []
    for index, (group, seen) in enumerate(_with_statistics(model, wanted, ctx)):
        rows, channels = _parts(seen)
        scales, share = _smoothest(group, rows, channels, pairs)
        changed += _settle(model, group, scales, share, ctx, "smoothed")
        ctx.progress(index + 1, len(wanted), "smoothing")
    return changed


def _smoothest(
    group: Group, rows: Float32, channels: ChannelRange, pairs: bool
) -> tuple[Float32, float]:
    """Return the best scales, and the share of the error that they leave."""
    assert channels.low is not None
    assert channels.high is not None
    low, high = np.minimum(channels.low, 0.0), np.maximum(channels.high, 0.0)
    weights = group.weights()
    wanted = [rows @ weight.T for weight in weights]

    def error(scales: Float32) -> float:
        seen = _coded(rows / scales, (low / scales).min(), (high / scales).max())
        total = 0.0
        for weight, outputs in zip(weights, wanted, strict=True):
            scaled = weight * scales
            step = safe_scale(scaled, pairs=pairs)[:, None]
            change = seen @ (np.rint(scaled / step) * step).T - outputs
            total += _energy(change) / (_energy(outputs) + _NOTHING)
        return total

    size = np.maximum(high, -low)
    # A channel that is quiet in the samples need not stay so: it is never amplified.
    size = np.maximum(size, max(np.median(size), size.max() / _QUIETEST, _TINY))
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    return _best(_smoothing(size, np.maximum(largest, _TINY)), len(size), error)


def _smoothing(size: Float64, largest: Float64) -> Iterator[Float64]:
    """Yield scales to try, made of the largest activation and weight of channels."""
    for alpha in ALPHAS:
        scales = size**alpha / largest ** (1.0 - alpha)
        yield scales / np.exp(np.log(scales).mean())
    for ceiling in np.geomspace(np.median(size), size.max(), CEILINGS, endpoint=False):
        yield np.maximum(1.0, size / ceiling)


def _best(
    candidates: Iterable[Float64], channels: int, error: Callable[[Float32], float]
) -> tuple[Float32, float]:
    """Return the scales with the smallest error, as a share of the error without."""
    scales = np.ones(channels, np.float32)
    before = least = error(scales)
    for candidate in candidates:
        tried = candidate.astype(np.float32)
        found = error(tried)
        if found < least:
            scales, least = tried, found
    return scales, least / before if before > 0 else 1.0


def _coded(values: Float32, low: float, high: float) -> Float32:
    """Return values as uint8 codes of a range give them back."""
    step = np.float32(max((high - low) / 255.0, _NOTHING))
    zero = np.rint(np.float32(-low) / step)
    codes = np.clip(np.rint(values / step) + zero, 0, 255)
    return np.asarray((codes - zero) * step)


def _energy(values: Array) -> float:
    return float(np.square(values).sum(dtype=np.float64))


# --- AWQ ------------------------------------------------------------------------------


def awq(
    model: Model,
    ctx: Context,
    levels: Levels,
    *,
    block: int = 0,
    method: Fit = "minmax",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> list[Smoothed]:
    """Widen the weights that large activations multiply, before they get few codes.

    Scales are ``mean|X_j|^alpha``, normalised as in the authors' code by the root of
    the largest times the smallest, with the ``alpha`` of 0, 0.05, ... 1 that moves the
    outputs least on rows of the calibration data. The search for clipped ranges that
    the paper adds is ``rounding.fit``'s.

    Args:
        model: The model, changed in place.
        ctx: Calibration samples; receives what was done and what was not.
        levels: Codes the weights will get.
        block: Inputs that will share a scale; 0: all of a row.
        method: How ``rounding.fit`` will choose scales.
        only: Names or glob patterns of weights or nodes, or op types.
        skip: The same; wins over ``only``.

    Returns:
        The groups of layers that were changed.
    """
    wanted = groups(model, only=only, skip=skip)
    changed: list[Smoothed] = []
    for index, (group, seen) in enumerate(_with_statistics(model, wanted, ctx)):
        rows, _ = _parts(seen)
        weights = [_some(weight) for weight in group.weights()]

        def error(
            scales: Float32, rows: Float32 = rows, weights: list[Array] = weights
        ) -> float:
            return sum(
                _moved(rows, weight, scales, levels, block, method)
                for weight in weights
            )

        size = np.maximum(np.abs(rows).mean(axis=0), _TINY)
        tried = (size ** (step / 20) for step in range(1, 21))
        candidates = (s / np.sqrt(s.max() * s.min()) for s in tried)
        scales, share = _best(candidates, len(size), error)
        changed += _settle(model, group, scales, share, ctx, "scaled by activations")
        ctx.progress(index + 1, len(wanted), "activation-aware scales")
    return changed


def _some(weight: Array) -> Array:
    """Return rows of a matrix, evenly chosen where it has many."""
    step = -(-len(weight) // OUTPUTS)
    return weight[::step]


def _moved(
    rows: Float32,
    weight: Array,
    scales: Float32,
    levels: Levels,
    block: int,
    method: Fit,
) -> float:
    """Return the energy of the outputs' error, as a share of that of the outputs."""
    scaled = weight * scales
    grid = fit(
        scaled,
        levels.low,
        levels.high,
        symmetric=levels.symmetric,
        block=block_of(scaled.shape[1], block),
        step=levels.step,
        method=method,
    )
    change = decode(nearest(scaled, grid), grid) / scales - weight
    return _energy(rows @ change.T) / (_energy(rows @ weight.T) + _NOTHING)


# --- looking --------------------------------------------------------------------------


def _with_statistics(
    model: Model, wanted: Sequence[Group], ctx: Context
) -> list[tuple[Group, Multi]]:
    """Return the groups whose activations a run shows, each with its statistics."""
    statistics: Mapping[str, Any] = {
        group.tensor.name: Multi(
            rows=Sample(ROWS, -1, ctx.seed), channels=ChannelRange(-1)
        )
        for group in wanted
    }
    seen = ctx.statistics(model, statistics) if statistics else {}
    found = []
    for group in wanted:
        statistic = seen.get(group.tensor.name)
        if isinstance(statistic, Multi) and _is_fed(group, statistic):
            found.append((group, statistic))
        else:
            ctx.skipped(group.tensor.name, "its values cannot be seen")
    return found


def _is_fed(group: Group, statistic: Multi) -> bool:
    channels = statistic["channels"]
    if not isinstance(channels, ChannelRange) or channels.low is None:
        return False
    assert channels.high is not None
    usual = np.isfinite(channels.low).all() and np.isfinite(channels.high).all()
    return bool(usual) and len(channels.low) == group.layers[0].layout.matrices_shape[2]


def _parts(statistic: Multi) -> tuple[Float32, ChannelRange]:
    rows, channels = statistic["rows"], statistic["channels"]
    assert isinstance(rows, Sample)
    assert isinstance(channels, ChannelRange)
    return rows.values.astype(np.float32), channels


# --- writing --------------------------------------------------------------------------


def _settle(
    model: Model,
    group: Group,
    scales: Float32,
    share: float,
    ctx: Context,
    what: str,
) -> list[Smoothed]:
    """Apply scales if they pay, and note either; return the group if it changed."""
    name = group.tensor.name
    free = _chain(model, group) is not None
    limit = 1.0 if free else MUL_PAYS
    if share >= limit or (scales == 1.0).all():
        ctx.skipped(name, f"{what}, {share:.0%} of the error would be left")
        return []
    made = apply(model, group, scales)
    ctx.did(name, f"{what} in {made.where}: {share:.0%} of the error is left")
    return [made]


def apply(model: Model, group: Group, scales: NDArray[Any]) -> Smoothed:
    """Divide activations by a scale for each channel, and multiply the weights by it.

    Args:
        model: The model, changed in place.
        group: The layers.
        scales: Positive, [inputs].

    Returns:
        What was divided, and where.

    Raises:
        UsageError: The scales do not fit, or are not positive and finite.
    """
    factors = np.asarray(scales, np.float64)
    inputs = group.layers[0].layout.matrices_shape[2]
    if factors.shape != (inputs,) or not (
        np.isfinite(factors).all() and (factors > 0).all()
    ):
        raise UsageError(
            f"{group.tensor.name} needs {inputs} positive scales, not "
            f"{list(factors.shape)}"
        )
    chain = _chain(model, group)
    for layer in group.layers:
        matrices = layer.layout.matrices(layer.weight.read()) * factors
        model.set_weight(
            layer.weight, layer.layout.array(matrices).astype(layer.weight.dtype)
        )
    names = tuple(layer.name for layer in group.layers)
    if chain is not None:
        for divided in chain:
            divided.divide(model, factors)
        nodes = [part.node for part in chain]
        values = _say_divided(model, nodes, group.tensor, factors)
        where = ", ".join(dict.fromkeys(node.name or node.op for node in nodes))
        return Smoothed(names, factors, values, where)
    dtype = group.layers[0].weight.dtype
    factor = model.add_weight(
        f"{group.tensor.name}_smoothing", (1.0 / factors).astype(dtype)
    )
    node = model.add_node(
        "Mul", [group.tensor, factor], name=f"{group.tensor.name}_smooth"
    )
    for reader in group.readers:
        reader.inputs[0] = node.outputs[0]
    return Smoothed(names, factors, (node.outputs[0].name,), "a Mul")


def _say_divided(
    model: Model, nodes: Sequence[Node], last: gs.Tensor, factors: Float64
) -> tuple[str, ...]:
    """Say in the lineage which values are divided: those from some nodes to a value.

    Each is read by one node. Their channels come last, but for those between the two
    Reshapes around heads, which are taken for new. Their names are returned.
    """
    divided: dict[str, bool] = {last.name: True}
    for node in nodes:
        tensor, is_last = node.outputs[0], True
        while tensor is not last:
            divided[tensor.name] = is_last
            reader = tensor.outputs[0]
            is_last = is_last and reader.op != "Reshape"
            tensor = reader.outputs[0]
    for name, is_last in divided.items():
        if is_last:
            model.lineage.scale(name, 1 / factors, -1)
        else:
            model.lineage.add(name)
    return tuple(divided)


@dataclass(frozen=True, eq=False)
class _Divided:
    """A parameter whose last axis is the channels of its node's output.

    Attributes:
        node: The node, its only reader.
        weight: The parameter, [..., channels] or, transposed, [channels, ...].
        transposed: Whether channels come first.
    """

    node: Node
    weight: Weight
    transposed: bool = False

    def divide(self, model: Model, factors: Float64) -> None:
        """Divide each channel."""
        values = self.weight.read()
        by = factors[:, None] if self.transposed else factors
        model.set_weight(self.weight, (values / by).astype(values.dtype))


def _chain(model: Model, group: Group) -> list[_Divided] | None:
    """Return the parameters to divide so that only this group sees the change."""
    readers = {id(node) for node in group.readers}
    return _above(model, group.tensor, readers, len(group.weights()[0][0]))


def _above(
    model: Model, tensor: gs.Tensor, readers: set[int], channels: int
) -> list[_Divided] | None:
    if any(id(node) not in readers for node in tensor.outputs) or not tensor.inputs:
        return None
    if any(tensor is output for output in model.graph.outputs):
        return None
    node = tensor.inputs[0]
    if not is_onnx(node.domain) or tensor is not node.outputs[0]:
        return None

    def parameter(index: int, *, transposed: bool = False) -> _Divided | None:
        weight = model.constant(node.inputs[index])
        if weight is None or weight.is_input or weight.is_output:
            return None
        if not is_float(weight) or weight.uses != ((node, index),):
            return None
        axis = 0 if transposed else -1
        if not weight.shape or weight.shape[axis] != channels:
            return None
        return _Divided(node, weight, transposed)

    def further(index: int) -> list[_Divided] | None:
        return _above(model, node.inputs[index], {id(node)}, channels)

    if node.op in _NORMS:
        wanted = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i].name]
        parts = [parameter(index) for index in wanted]
        single = all(p is not None and p.weight.size == channels for p in parts)
        return _all(parts) if single else None
    if node.op == "Relu":
        return further(0)
    if node.op == "Reshape":
        joined = _values(model, node, channels)
        return joined and _above(model, joined[0], {id(joined[1])}, channels)
    if node.op in {"Gemm", "MatMul"}:
        layer = layer_at(model, node)
        use = None if layer is None else layer.uses[0]
        if use is None or use.index != 1 or use.output_axis is None:
            return None
        parts = [parameter(1, transposed=not use.is_transposed)]
        if addend(node) is not None:
            parts.append(parameter(2))
        return _all(parts)
    if node.op in {"Add", "Mul"}:
        for index in (0, 1):
            part = parameter(index)
            if part is None:
                continue
            rest = [] if node.op == "Mul" else further(1 - index)
            return None if rest is None else [part, *rest]
    return None


def _values(model: Model, node: Node, channels: int) -> tuple[gs.Tensor, Node] | None:
    """Return the values of an attention whose heads a Reshape joins again.

    In attention, output channel ``(head, d)`` at each position is a mean of channel
    ``(head, d)`` of the values, so both are divided by the same. The exported form is
    Reshape, Transpose, MatMul with the weights on the left, Transpose, Reshape.

    Returns:
        The values as [..., channels] and the node that cuts them into heads.
    """
    path: list[Node] = [node]
    for op, index in (
        ("Transpose", 0),
        ("MatMul", 0),
        ("Transpose", 1),
        ("Reshape", 0),
    ):
        tensor = path[-1].inputs[index]
        made_by = tensor.inputs[0] if tensor.inputs else None
        if made_by is None or made_by.op != op or len(tensor.outputs) != 1:
            return None
        if any(tensor is output for output in model.graph.outputs):
            return None
        path.append(made_by)
    if any(attribute(path[at], "perm") != [0, 2, 1, 3] for at in (1, 3)):
        return None
    shapes = [model.constant(path[at].inputs[1]) for at in (0, 4)]
    if any(shape is None for shape in shapes):
        return None
    joined, cut = ([int(n) for n in shape.read()] for shape in shapes if shape)
    if len(joined) != 3 or not (joined[2] == channels or joined == [0, 0, -1]):
        return None
    if len(cut) != 4 or min(cut[2:]) < 1 or cut[2] * cut[3] != channels:
        return None
    return path[4].inputs[0], path[4]


def _all(parts: Sequence[_Divided | None]) -> list[_Divided] | None:
    found = [part for part in parts if part is not None]
    return found if found and len(found) == len(parts) else None
