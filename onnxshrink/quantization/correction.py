"""Repairs around quantization that need no training.

- ``equalize`` makes the channels between two layers alike before weights are quantized
  (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
  Correction", section 4.1).
- ``expected_shift`` is the mean error that the codes of a weight cause in each output
  channel, for the bias to take up (the same, section 4.2). What quantization as a whole
  does to the means, ``recover`` takes out: it compares outputs with the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.structure.bias import is_shift
from onnxshrink.structure.codes import is_float
from onnxshrink.structure.layers import LinearWeight, layer_at

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["equalize", "expected_shift"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

SWEEPS = 50
"""Rounds over all pairs at most."""
SETTLED = 1e-3
"""Pairs are done when no channel changes by more than this share."""
LARGEST_SCALE = 1e3
"""A channel is scaled by no more: its activations would drown all others."""
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_HOMOGENEOUS = frozenset(
    {
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "Relu",
    }
)
"""For a positive ``s`` of each channel, ``f(s x) = s f(x)``."""
_WITH_CONSTANT = frozenset({"Add", "Mul", "PRelu", "Sub"})


# --- cross-layer equalization ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Side:
    """A weight, and which of its axes are the channels between two layers.

    Attributes:
        weight: The weight.
        node: The layer.
        split: Four factors of its shape: groups, two channel axes, the kernel.
        axis: Which of the two is counted, together with the groups.
    """

    weight: Weight
    node: Node
    split: tuple[int, int, int, int]
    axis: int

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.split[0] * self.split[self.axis]

    def spread(self, values: Float64) -> Float64:
        """Shape one value for each channel to go with the split weight."""
        shape = [1, 1, 1, 1]
        shape[0], shape[self.axis] = self.split[0], self.split[self.axis]
        return values.reshape(shape)

    def largest(self, size: Float64) -> Float64:
        """Largest entry of each channel; ``size`` is the split weight's."""
        other = 3 - self.axis
        return np.asarray(size.max(axis=(other, 3), initial=0.0)).reshape(-1)


def _sides(layer: LinearWeight) -> tuple[_Side, _Side]:
    """Return a layer's weight by output channels and by input channels."""
    weight, shape = layer.weight, layer.weight.shape
    split = (layer.groups, shape[0] // layer.groups, shape[1], math.prod(shape[2:]))
    first, second = (1, 2) if layer.output_axis == 0 else (2, 1)
    return (
        _Side(weight, layer.node, split, first),
        _Side(weight, layer.node, split, second),
    )


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two layers between which a scale of each channel can move.

    Attributes:
        first: The layer whose outputs are divided.
        second: The layer whose inputs are multiplied.
        shifts: Constants that are added on the way: divided too.
        between: Names of the values on the way: divided too.
    """

    first: _Side
    second: _Side
    shifts: tuple[Weight, ...]
    between: tuple[str, ...]


def equalize(model: Model, ctx: Context) -> int:
    """Give the channels between each two layers the same range in both weights.

    Channel ``i`` of the first layer's outputs is divided by
    ``s_i = sqrt(r1_i r2_i) / r2_i`` and that of the second's inputs multiplied, with
    ``r`` the largest weight of either, over all pairs until nothing changes. The model
    computes what it did, up to float noise.

    Layers are Conv, ConvTranspose, Gemm and MatMul; between them may be Relu,
    LeakyRelu, PRelu, pools, Flatten of single pixels, and Add, Sub and Mul with
    constants. A Clip with an upper bound (ReLU6) ends a chain: with one bound for each
    channel it would be another operator.

    Args:
        model: The model; weights and biases are changed.
        ctx: Takes the notes.

    Returns:
        How many pairs were equalized.
    """
    outputs = {id(tensor) for tensor in model.graph.outputs}
    pairs = []
    for node in model.graph.nodes:
        found = _follow(model, node, outputs)
        if isinstance(found, _Pair):
            pairs.append(found)
        elif found:
            ctx.skipped(node.name or node.outputs[0].name, found)
    totals = _scales(pairs)
    changes: dict[int, _Change] = {}
    done = 0
    for pair, scale in zip(pairs, totals, strict=True):
        if np.all(scale == 1.0):
            continue
        done += 1
        for side, factor in ((pair.first, 1 / scale), (pair.second, scale)):
            change = changes.setdefault(id(side.node), _Change(side.weight))
            change.factors.append((side.split, side.spread(factor)))
        for shift in pair.shifts:
            _scale_shift(model, shift, 1 / scale)
        axis = 1 if pair.first.node.op.startswith("Conv") else -1
        for value in pair.between:
            model.lineage.scale(value, 1 / scale, axis)
        ctx.did(
            pair.first.weight.name,
            f"{len(scale)} channels equalized with {pair.second.weight.name}, by "
            f"{scale.min():.3g} to {scale.max():.3g}",
        )
    for change in changes.values():
        change.apply(model)
    return done


@dataclass(eq=False)
class _Change:
    """What one weight is multiplied with."""

    weight: Weight

    def __post_init__(self) -> None:
        self.factors: list[tuple[tuple[int, ...], Float64]] = []

    def apply(self, model: Model) -> None:
        old = self.weight.read()
        values = old.astype(np.float64)
        for split, factor in self.factors:
            values = (values.reshape(split) * factor).reshape(old.shape)
        model.set_weight(self.weight, values.astype(old.dtype))


def _scale_shift(model: Model, shift: Weight, factor: Float64) -> None:
    """Scale a bias or added constant along its only axis longer than 1."""
    old = shift.read()
    values = old.astype(np.float64)
    long = next((i for i, n in enumerate(old.shape) if n != 1), old.ndim - 1)
    shape = [1] * old.ndim
    shape[long] = len(factor)
    model.set_weight(shift, (values * factor.reshape(shape)).astype(old.dtype))


def _scales(pairs: list[_Pair]) -> list[Float64]:
    """Iterate over all pairs until the ranges agree."""
    sizes: dict[int, Float64] = {}
    for pair in pairs:
        for side in (pair.first, pair.second):
            if id(side.node) not in sizes:
                size = np.abs(side.weight.read().astype(np.float64))
                sizes[id(side.node)] = size.reshape(side.split)
    totals = [np.ones(pair.first.channels) for pair in pairs]
    for _ in range(SWEEPS):
        moved = 0.0
        for index, pair in enumerate(pairs):
            first, second = sizes[id(pair.first.node)], sizes[id(pair.second.node)]
            ours, theirs = pair.first.largest(first), pair.second.largest(second)
            usable = (ours > 0) & (theirs > 0)
            scale = np.ones_like(ours)
            scale[usable] = np.sqrt(ours[usable]) / np.sqrt(theirs[usable])
            total = np.clip(totals[index] * scale, 1 / LARGEST_SCALE, LARGEST_SCALE)
            scale = total / totals[index]
            totals[index] = total
            first /= pair.first.spread(scale)
            second *= pair.second.spread(scale)
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0.0)))
        if moved < SETTLED:
            break
    return [np.where(np.abs(np.log(t)) < SETTLED, 1.0, t) for t in totals]


def _follow(model: Model, node: Node, outputs: set[int]) -> _Pair | str:
    """Return the pair that starts at a node, or why there is none.

    The reason is empty where the node is no layer.
    """
    layer = _own_layer(model, node)
    if layer is None:
        return ""
    first, weight = _sides(layer)[0], layer.weight
    shifts = []
    bias = layer.bias
    if bias is not None and bias.node is node:
        if bias.why_not or bias.weight is None or bias.scale is not None:
            return f"its bias {bias.why_not or 'is stored as codes'}"
        shifts.append(bias.weight)
    spatial = len(weight.shape) - 2 if node.op.startswith("Conv") else 0
    tensor = node.outputs[0]
    between: list[str] = []
    while True:
        between.append(tensor.name)
        if id(tensor) in outputs:
            return "its channels are an output of the model"
        readers = list(tensor.outputs)
        if len(readers) != 1:
            return f"its channels are read by {len(readers)} nodes"
        reader = readers[0]
        if reader.op in _LINEAR and reader.inputs[0] is tensor:
            return _ended(model, first, reader, tuple(shifts), tuple(between))
        step = _passes(model, reader, tensor, first.channels, spatial)
        if isinstance(step, str):
            return step
        if step is not None:
            shifts.append(step)
        if reader.op in ("Flatten", "Squeeze"):
            spatial = 0
        tensor = reader.outputs[0]


def _own_layer(model: Model, node: Node) -> LinearWeight | None:
    """Return the layer of a node, if its weight is its own and may be changed."""
    if node.op not in _LINEAR:
        return None
    layer = layer_at(model, node)
    if layer is None or layer.why_not or layer.is_shared or layer.uses[0].index != 1:
        return None
    if layer.input is None or model.constant(layer.input) is not None:
        return None
    is_plain = layer.uses[0].input_channels == -1
    if node.op in ("Gemm", "MatMul") and not (
        is_plain and len(layer.weight.shape) == 2
    ):
        return None
    return layer


def _is_free_shift(
    node: Node, index: int, shift: Weight, channels: int, spatial: int
) -> bool:
    """Whether an added constant is one free value for each channel.

    Args:
        node: What reads it.
        index: At which input.
        shift: The constant.
        channels: How many channels there are.
        spatial: Axes behind that of the channels.
    """
    if shift.is_input or shift.is_output or not is_float(shift):
        return False
    return shift.uses == ((node, index),) and is_shift(shift, channels, -1 - spatial)


def _passes(
    model: Model, node: Node, tensor: gs.Tensor, channels: int, spatial: int
) -> Weight | str | None:
    """Return what a node between two layers adds; ``None`` if it adds nothing.

    Or return why no scale passes it.
    """
    label = f"{node.op} behind it"
    if not is_onnx(node.domain):
        return f"{label} is of another domain"
    if node.op in _HOMOGENEOUS and len(node.outputs) == 1:
        return None
    if node.op in ("Flatten", "Squeeze"):
        plain = node.op == "Squeeze" or attribute(node, "axis", 1) == 1
        return None if plain else f"{label} moves channels"
    if node.op not in _WITH_CONSTANT:
        return f"a scale does not pass the {label}"
    index = 1 if node.inputs[0] is tensor else 0
    constant = model.constant(node.inputs[index])
    if constant is None:
        return f"{label} has two inputs that are computed"
    if node.op == "PRelu":
        return None if index == 1 else f"{label} has it as slope"
    if node.op == "Mul":
        grows = constant.size > 1 and len(constant.shape) > spatial + 2
        return f"{label} may change its shape" if grows else None
    if not _is_free_shift(node, index, constant, channels, spatial):
        return f"{label} does not add one value of its own to each channel"
    return constant


def _ended(
    model: Model,
    first: _Side,
    node: Node,
    shifts: tuple[Weight, ...],
    between: tuple[str, ...],
) -> _Pair | str:
    layer = _own_layer(model, node)
    if layer is None:
        return f"the weight of the {node.op} behind it is shared, or not constant"
    second = _sides(layer)[1]
    if second.channels != first.channels:
        return f"the {node.op} behind it reads them as {second.channels} channels"
    return _Pair(first, second, shifts, between)


# --- bias correction ------------------------------------------------------------------


def expected_shift(weight: Array, decoded: Array, mean: Array) -> Float64:
    """Return by how much quantized weights lower the mean of each output.

    Nagel et al. 2019, equation 17: ``(W - W_q) E[x]``. Added to the bias it gives the
    outputs the mean they had.

    Args:
        weight: Float [..., outputs, inputs].
        decoded: The values its codes stand for, of the same type.
        mean: Mean inputs, float64 [..., inputs], as ``InputStatistics.mean``.

    Returns:
        float64 [..., outputs].
    """
    lost = (weight - decoded).astype(np.float64)
    return np.asarray(np.einsum("...oi,...i->...o", lost, mean))
