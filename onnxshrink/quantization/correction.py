"""Repairs around quantization that need no training.

- ``equalize`` makes the channels between two layers alike before weights are quantized
  (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
  Correction", section 4.1).
- ``expected_shift`` and ``correct_bias`` take the mean error that quantization causes
  out of each output channel (the same, section 4.2 and appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.activations import regression
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.structure.layers import is_float

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["correct_bias", "equalize", "expected_shift"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

SWEEPS = 50
"""Rounds over all pairs at most."""
SETTLED = 1e-3
"""Pairs are done when no channel changes by more than this share."""
LARGEST_SCALE = 1e3
"""A channel is scaled by no more: its activations would drown all others."""
HELD = 5
"""One of so many samples judges a corrected bias."""
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
    """A weight and the channels of it that lie between two layers.

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


def _sides(node: Node, weight: Weight) -> tuple[_Side, _Side]:
    """Return a layer's weight by output channels and by input channels."""
    shape = weight.shape
    group = int(attribute(node, "group", 1)) if node.op.startswith("Conv") else 1
    reach = math.prod(shape[2:])
    split = (group, shape[0] // group, shape[1], reach)
    by_output = node.op == "Conv" or bool(attribute(node, "transB", 0))
    first, second = (1, 2) if by_output else (2, 1)
    return _Side(weight, node, split, first), _Side(weight, node, split, second)


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two layers with nothing between them that a scale cannot pass.

    Attributes:
        first: The layer whose outputs are divided.
        second: The layer whose inputs are multiplied.
        shifts: Constants that are added on the way: divided too.
    """

    first: _Side
    second: _Side
    shifts: tuple[Weight, ...]


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
    """Scale a bias or added constant; its one long axis is that of the channels."""
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
    """Return the pair that starts at a node, or why there is none; empty: no layer."""
    weight = _own_weight(model, node)
    if weight is None:
        return ""
    first = _sides(node, weight)[0]
    shifts = []
    bias = _bias_input(model, node)
    if isinstance(bias, str):
        return bias
    if bias is not None:
        if not _is_shift(model, node, 2, bias, first.channels, node.op, None):
            return "its bias is shared, or not one value for each channel"
        shifts.append(bias)
    spatial = len(weight.shape) - 2 if node.op.startswith("Conv") else 0
    tensor = node.outputs[0]
    while True:
        if id(tensor) in outputs:
            return "its channels are an output of the model"
        readers = list(tensor.outputs)
        if len(readers) != 1:
            return f"its channels are read by {len(readers)} nodes"
        reader = readers[0]
        if reader.op in _LINEAR and reader.inputs[0] is tensor:
            return _ended(model, first, reader, tuple(shifts))
        step = _passes(model, reader, tensor, first.channels, spatial)
        if isinstance(step, str):
            return step
        if step is not None:
            shifts.append(step)
        if reader.op in ("Flatten", "Squeeze"):
            spatial = 0
        tensor = reader.outputs[0]


def _own_weight(model: Model, node: Node) -> Weight | None:
    """Return the weight of a layer that may be changed."""
    if node.op not in _LINEAR or not is_onnx(node.domain):
        return None
    if len(node.inputs) < 2 or model.constant(node.inputs[0]) is not None:
        return None
    weight = model.constant(node.inputs[1])
    if weight is None or not is_float(weight) or not weight.size:
        return None
    if weight.is_input or weight.is_output or weight.uses != ((node, 1),):
        return None
    rank = len(weight.shape)
    if node.op == "Gemm" and attribute(node, "transA", 0):
        return None
    return weight if (rank > 2 if node.op.startswith("Conv") else rank == 2) else None


def _bias_input(model: Model, node: Node) -> Weight | str | None:
    if node.op == "MatMul" or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    return model.constant(node.inputs[2]) or "its bias is not constant"


def _is_shift(
    model: Model,
    node: Node,
    index: int,
    shift: Weight,
    channels: int,
    op: str,
    spatial: int | None,
) -> bool:
    """Whether a constant is one free value for each channel.

    Args:
        model: The model.
        node: What reads it.
        index: At which input.
        shift: The constant.
        channels: How many channels there are.
        op: Operator type of ``node``.
        spatial: Axes behind that of the channels; ``None`` for a bias.
    """
    if shift.is_input or shift.is_output or not is_float(shift):
        return False
    if shift.uses != ((node, index),) or shift.size != channels:
        return False
    if spatial is None:
        return op.startswith("Conv") or shift.shape[-1] == channels
    at = len(shift.shape) - 1 - spatial
    return at >= 0 and shift.shape[at] == channels


def _passes(
    model: Model, node: Node, tensor: gs.Tensor, channels: int, spatial: int
) -> Weight | str | None:
    """Return what a node on the way adds, ``None`` for nothing, or why it is no way."""
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
    if not _is_shift(model, node, index, constant, channels, node.op, spatial):
        return f"{label} does not add one value of its own to each channel"
    return constant


def _ended(
    model: Model, first: _Side, node: Node, shifts: tuple[Weight, ...]
) -> _Pair | str:
    weight = _own_weight(model, node)
    if weight is None:
        return f"the weight of the {node.op} behind it is shared, or not constant"
    second = _sides(node, weight)[1]
    if second.channels != first.channels:
        return f"the {node.op} behind it reads them as {second.channels} channels"
    return _Pair(first, second, shifts)


# --- bias correction ------------------------------------------------------------------


def expected_shift(weight: Array, decoded: Array, mean: Array) -> Float64:
    """Return what quantized weights take from the mean of each output.

    Nagel et al. 2019, equation 17: ``(W - W_q) E[x]``. Added to the bias it gives the
    outputs the mean they had.

    Args:
        weight: Float [..., outputs, inputs].
        decoded: The values its codes stand for.
        mean: Mean inputs, float64 [..., inputs], as ``layers.gram`` returns them.

    Returns:
        float64 [..., outputs].
    """
    lost = weight.astype(np.float64) - decoded
    return np.asarray(np.einsum("...oi,...i->...o", lost, mean))


@dataclass(frozen=True, eq=False)
class _Bias:
    """Where the bias of a layer is.

    Attributes:
        weight: Its values: float, or int32 codes.
        scale: What a code stands for, float64 of the shape of the bias; 1 for floats.
    """

    weight: Weight
    scale: Float64

    def add(self, model: Model, shift: Float64) -> Float64:
        """Add to the bias; return what was really added, after rounding."""
        old = self.weight.read()
        wanted = shift.reshape(old.shape) / self.scale
        if old.dtype.kind == "i":
            info = np.iinfo(old.dtype)
            wide = np.rint(old.astype(np.float64) + wanted)
            new = np.clip(wide, info.min, info.max).astype(old.dtype)
        else:
            new = (old.astype(np.float64) + wanted).astype(old.dtype)
        model.set_weight(self.weight, new)
        added = (new.astype(np.float64) - old.astype(np.float64)) * self.scale
        return np.asarray(added.reshape(-1))


def correct_bias(
    float_model: Model, quantized: Model, ctx: Context, *, samples: int = 128
) -> int:
    """Take the mean error of each output channel of quantized layers into their biases.

    Each layer is given what it reads in the float model, so that its own error is
    measured, that of its inputs' codes included, and errors of layers before it are not
    corrected twice; all layers are then served by one run over the samples. (Nagel et
    al. 2019, appendix D, feed layer after layer what the corrected ones before it give,
    one run each.) A bias is changed only if the layer's squared error on held-out
    samples falls.

    Layers are Conv, ConvTranspose, Gemm and MatMul whose weight a DequantizeLinear
    makes. They are found in the float model by node name, else by output name. The bias
    is float, or int32 codes behind DequantizeLinear, at the node or in the Add behind a
    MatMul.

    Args:
        float_model: The model before quantization; not changed.
        quantized: The model with QuantizeLinear and DequantizeLinear; biases change.
        ctx: Calibration samples and notes.
        samples: Samples to use at most; a fifth of them judges.

    Returns:
        How many biases were changed.

    Raises:
        UsageError: There are no real calibration samples.
        ModelError: A model does not run on them.
    """
    pool = ctx.samples.calibration
    if pool is None or not pool.used or pool.random:
        raise UsageError(
            "bias correction compares outputs on real samples, and there are none; "
            "give --data"
        )
    requests, biases = _requests(float_model, quantized, ctx)
    pool = pool.take(slice(0, max(1, samples, pool.batch or 1)))
    unit = pool.batch or 1
    cut = pool.used - max(1, pool.used // unit // HELD) * unit
    parts = [pool.take(slice(0, cut)), pool.take(slice(cut, pool.used))]
    if not cut:
        parts = [pool, pool]
    fit, held = regression.gather(
        quantized,
        float_model,
        requests,
        [[part] for part in parts],
        replace(ctx, cache={}),
    )
    changed = 0
    for name, bias in biases.items():
        changed += _corrected(quantized, name, bias, fit[name], held[name], ctx)
    return changed


def _corrected(
    model: Model,
    name: str,
    bias: _Bias,
    fit: regression.Moments,
    held: regression.Moments,
    ctx: Context,
) -> bool:
    why = fit.why_not or held.why_not
    if why or not fit.rows or not held.rows:
        ctx.skipped(name, why or "nothing was seen of it")
        return False
    shift = (fit.errors / fit.rows).reshape(-1)
    none = np.zeros((*held.errors.shape, 0))
    before = held.error(none, np.zeros_like(held.errors))
    after = held.error(none, shift.reshape(held.errors.shape))
    if not after < before:
        ctx.skipped(name, "a corrected bias would not help on held-out samples")
        return False
    bias.add(model, shift)
    scale = max(held.variance, 1e-300)
    ctx.did(name, f"bias corrected: error {before / scale:.3%} -> {after / scale:.3%}")
    return True


def _requests(
    float_model: Model, quantized: Model, ctx: Context
) -> tuple[dict[str, regression.Request], dict[str, _Bias]]:
    by_name, by_output = _index(float_model)
    visible = {t.name for t in float_model.graph.inputs} | set(by_output)
    at = {id(node): index for index, node in enumerate(quantized.graph.nodes)}
    requests, biases = {}, {}
    for node in _quantized_layers(quantized):
        label = node.name or node.outputs[0].name
        theirs = by_name.get((node.op, node.name)) if node.name else None
        theirs = theirs or by_output.get(node.outputs[0].name)
        if theirs is None or theirs.op != node.op:
            ctx.skipped(label, "the float model has no such layer")
            continue
        outputs = _output_channels(quantized, node)
        bias = _bias(quantized, node, outputs)
        if bias is None:
            ctx.skipped(label, "it has no bias that is free to change")
            continue
        reader = _quantizer(node.inputs[0])
        source = ""
        if reader is not None and reader.inputs[0].name in visible:
            source = reader.inputs[0].name
        requests[label] = regression.Request(
            reader.inputs[0].name if reader is not None and source else "",
            node.outputs[0].name,
            theirs.outputs[0].name,
            regression.OutputRows(1 if node.op.startswith("Conv") else -1),
            source=source,
            at=(at[id(reader)], 0) if reader is not None and source else (0, 0),
        )
        biases[label] = bias
    return requests, biases


def _index(model: Model) -> tuple[Mapping[tuple[str, str], Node], Mapping[str, Node]]:
    """Return nodes by type and name, where that is unique, and by output."""
    by_name: dict[tuple[str, str], Node] = {}
    doubles = set()
    by_output: dict[str, Node] = {}
    for node in model.graph.nodes:
        key = (node.op, node.name)
        if key in by_name:
            doubles.add(key)
        by_name[key] = node
        by_output |= {tensor.name: node for tensor in node.outputs if tensor.name}
    return {key: n for key, n in by_name.items() if key not in doubles}, by_output


def _quantized_layers(model: Model) -> Iterator[Node]:
    for node in model.graph.nodes:
        if node.op not in _LINEAR or not is_onnx(node.domain):
            continue
        if len(node.inputs) > 1 and _maker(node.inputs[1]) == "DequantizeLinear":
            yield node


def _maker(tensor: gs.Tensor) -> str:
    return tensor.inputs[0].op if tensor.inputs else ""


def _quantizer(tensor: gs.Tensor) -> Node | None:
    """Return the QuantizeLinear whose codes a value is decoded from."""
    if _maker(tensor) != "DequantizeLinear":
        return None
    codes = tensor.inputs[0].inputs[0]
    return codes.inputs[0] if _maker(codes) == "QuantizeLinear" else None


def _output_channels(model: Model, node: Node) -> int:
    """Return how many outputs the layer has, from its codes; 0 if that is unknown."""
    codes = model.constant(node.inputs[1].inputs[0].inputs[0])
    if codes is None or len(codes.shape) < 2:
        return 0
    if node.op == "ConvTranspose":
        return codes.shape[1] * int(attribute(node, "group", 1))
    straight = node.op == "Conv" or bool(attribute(node, "transB", 0))
    return codes.shape[0] if straight else codes.shape[-1]


def _bias(model: Model, node: Node, outputs: int) -> _Bias | None:
    """Return the bias of a layer if it is one free value for each output."""
    reader, index = node, 2
    if node.op == "MatMul":
        tensor = node.outputs[0]
        while len(tensor.outputs) == 1 and tensor.outputs[0].op in (
            "QuantizeLinear",
            "DequantizeLinear",
        ):
            tensor = tensor.outputs[0].outputs[0]
        if len(tensor.outputs) != 1 or tensor.outputs[0].op != "Add":
            return None
        reader = tensor.outputs[0]
        index = 1 if reader.inputs[0] is tensor else 0
    if node.op == "Gemm" and attribute(node, "beta", 1.0) != 1.0:
        return None
    if len(reader.inputs) <= index or not outputs:
        return None
    tensor = reader.inputs[index]
    scale: Float64 = np.ones(1)
    if _maker(tensor) == "DequantizeLinear" and len(tensor.outputs) == 1:
        reader, index = tensor.inputs[0], 0
        known = model.constant(reader.inputs[1])
        if known is None:
            return None
        scale, tensor = known.read().astype(np.float64), reader.inputs[0]
    weight = model.constant(tensor) if tensor.name else None
    if weight is None or weight.is_input or weight.is_output:
        return None
    if weight.uses != ((reader, index),) or weight.size != outputs:
        return None
    shape = weight.shape
    if not shape or shape[-1] != outputs or scale.size not in (1, outputs):
        return None
    if not (is_float(weight) or weight.dtype == np.int32):
        return None
    return _Bias(weight, np.broadcast_to(scale.reshape(-1), outputs).reshape(shape))
