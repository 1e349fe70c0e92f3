"""Integer weights while they are trained: float masters, rounded in the graph.

The graph of a training copy computes ``clip(round(v / s + z)) - z) * s`` of a float
master ``v``, passes the gradient of ``v`` straight through the rounding, and with it
that of the scale ``s``: LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020,
equations 1 to 3). Values within half a step of the outermost code are rounded to it
and not clipped, so a master that starts on that code is free to move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink._topology import is_onnx
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.quantization.schemes import MIN_OPSET

__all__ = ["CODES", "Decoder", "decoder_of", "fake_quantized", "is_pruned"]

Array = np.ndarray[Any, Any]

CODES = frozenset(MIN_OPSET)
"""Element types of codes that are trained."""
MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only move codes about."""
_FEW = 16
"""Codes are of few bits if there are no more levels than this."""
_HALF = 0.499
"""How far beyond the outermost code a value may lie, in steps, and is rounded to it.
Just below a half, which would round to the next even code."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """The nodes that make real values of a weight's codes, and their parameters.

    Attributes:
        nodes: All of them, the last one gives the values.
        scale: What they read the scale from.
        zero: Zero point in a shape that broadcasts over the values, float32.
        shape: Shape of the values.
        places: For each value the position of its code in the flat weight; ``None`` if
            they are in the same order.
        axis: Axis of the channels or blocks; ``None`` where the scale broadcasts as it
            is.
        block: Values along ``axis`` that share a scale; 0: no blocks.
    """

    nodes: tuple[Node, ...]
    scale: gs.Tensor
    zero: Array
    shape: tuple[int, ...]
    places: Array | None
    axis: int | None
    block: int

    @property
    def values(self) -> gs.Tensor:
        """The tensor that holds the real values."""
        return self.nodes[-1].outputs[0]

    def spread(self, scale: Array) -> Array:
        """Return a scale or zero point in a shape that broadcasts over the values."""
        return _spread(scale, self.shape, self.axis, self.block)

    def decode(self, codes: Array, scale: Array) -> Array:
        """Return the real values of codes of the weight's shape, float32."""
        wide = codes.astype(np.float32).reshape(-1)
        wide = wide if self.places is None else wide[self.places.reshape(-1)]
        made: Array = (wide.reshape(self.shape) - self.zero) * self.spread(scale)
        return np.asarray(made, np.float32)

    def encode(
        self, values: Array, scale: Array, low: int, high: int, shape: Sequence[int]
    ) -> Array:
        """Return the codes, int32 of the weight's shape, nearest to real values."""
        codes = np.rint(values / self.spread(scale) + self.zero)
        flat = np.clip(codes, low, high).astype(np.int32).reshape(-1)
        if self.places is not None:
            back = np.empty_like(flat)
            back[self.places.reshape(-1)] = flat
            flat = back
        return flat.reshape(shape)


def _spread(array: Array, shape: Sequence[int], axis: int | None, block: int) -> Array:
    if array.size == 1:
        return array.reshape(())
    if axis is None:
        return array
    if block:
        wide = np.repeat(array, block, axis)
        return np.take(wide, np.arange(shape[axis]), axis)
    return array.reshape([-1 if at == axis else 1 for at in range(len(shape))])


def decoder_of(model: Model, weight: Weight) -> Decoder | str:
    """Return what decodes the codes of a weight, or why it cannot be told.

    That is DequantizeLinear, with one scale, one for each channel or for each block, or
    Cast to float, perhaps Sub of a zero point, and Mul with a scale; Reshape, Transpose
    and their like may stand before and between. The scale may be computed.
    """
    uses = weight.uses
    if len(uses) != 1:
        return "several nodes read its codes"
    node = uses[0][0]
    nodes: list[Node] = []
    places: Array | None = None
    if uses[0][1] != 0:
        return f"{node.op} reads its codes"
    is_cast = False
    while True:
        if not is_onnx(node.domain):
            return f"{node.op} reads its codes"
        nodes.append(node)
        if node.op == "Cast" and not is_cast:
            if node.attrs.get("to") not in (onnx.TensorProto.FLOAT, np.float32):
                return "its codes are cast to another type than float32"
            is_cast = True
        elif node.op in MOVES:
            if places is None:
                places = np.arange(weight.size, dtype=np.int32).reshape(weight.shape)
            moved = _moved(model, node, places)
            if moved is None:
                return f"{node.op} {node.name!r} moves its codes by what is computed"
            places = moved
        elif node.op == "DequantizeLinear" and not is_cast:
            return _dequantized(model, nodes, places, weight)
        elif node.op in ("Mul", "Sub") and is_cast:
            return _multiplied(model, nodes, places, weight)
        else:
            return f"{node.op} reads its codes before they are decoded"
        readers = list(dict.fromkeys(node.outputs[0].outputs))
        if len(readers) != 1 or _is_output(model, node.outputs[0]):
            return "several nodes read its codes"
        node = readers[0]


def _is_output(model: Model, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in model.graph.outputs)


def _dequantized(
    model: Model, nodes: Sequence[Node], places: Array | None, weight: Weight
) -> Decoder | str:
    node = nodes[-1]
    shape = weight.shape if places is None else places.shape
    zero = np.zeros((), np.float32)
    if len(node.inputs) > 2 and (node.inputs[2].name or node.inputs[2].inputs):
        known = model.constant(node.inputs[2])
        if known is None:
            return "its zero point is computed from data"
        zero = known.read().astype(np.float32)
    axis = int(attribute(node, "axis", 1))
    axis += len(shape) if axis < 0 else 0
    if not 0 <= axis < max(len(shape), 1):
        axis = 0
    block = int(attribute(node, "block_size", 0))
    wide = _spread(zero, shape, axis, block)
    return Decoder(tuple(nodes), node.inputs[1], wide, shape, places, axis, block)


def _multiplied(
    model: Model, nodes: list[Node], places: Array | None, weight: Weight
) -> Decoder | str:
    """Describe Cast, Sub, Mul; ``nodes`` ends with the first of Sub and Mul."""
    node = nodes[-1]
    zero = np.zeros((), np.float32)
    before = nodes[-2].outputs[0]
    if node.op == "Sub":
        known = model.constant(node.inputs[1])
        if node.inputs[0] is not before or known is None:
            return "its zero point is computed from data"
        zero = known.read().astype(np.float32)
        before = node.outputs[0]
        readers = list(dict.fromkeys(before.outputs))
        if len(readers) != 1 or readers[0].op != "Mul" or _is_output(model, before):
            return "several nodes read its codes"
        node = readers[0]
        nodes.append(node)
    rest = [tensor for tensor in node.inputs if tensor is not before]
    if len(rest) != 1:
        return "Mul reads its codes before they are decoded"
    shape = weight.shape if places is None else places.shape
    return Decoder(tuple(nodes), rest[0], zero, shape, places, None, 0)


def _moved(model: Model, node: Node, array: Array) -> Array | None:
    """Return what a node makes of an array that it only moves about."""
    if node.op == "Identity":
        return array
    if node.op == "Transpose":
        return array.transpose(attribute(node, "perm", None))
    named = node.attrs.get("axes") if node.op != "Reshape" else None
    if named is None and len(node.inputs) > 1 and node.inputs[1].name:
        known = model.constant(node.inputs[1])
        if known is None:
            return None
        named = known.read().reshape(-1).tolist()
    if node.op == "Squeeze":
        return array.squeeze(None if named is None else tuple(named))
    if named is None:
        return None
    if node.op == "Unsqueeze":
        return np.expand_dims(array, tuple(named))
    wanted = [
        array.shape[at] if size == 0 and not attribute(node, "allowzero", 0) else size
        for at, size in enumerate(named)
    ]
    return array.reshape(wanted)


def is_pruned(codes: Array, zero: Array) -> bool:
    """Whether the zeros of a quantized weight were made by pruning, not by rounding.

    Rounding leaves many zeros where the step is wide: a ternary weight has half of
    them. Of 8-bit codes more zeros are due to pruning than the codes next to zero
    explain: at most as many again as a two-sided exponential distribution through the
    shares of 1 and 2 steps from zero has. Of codes of 16 levels or fewer only a hole
    around zero tells, which magnitude pruning leaves, or nine zeros in ten.

    Args:
        codes: Codes, of any shape.
        zero: Zero point that broadcasts over them.
    """
    steps = np.abs(codes.astype(np.int32) - zero.astype(np.int32))
    none, one, two = (float((steps == step).mean()) for step in range(3))
    if int(codes.max()) - int(codes.min()) < _FEW:
        has_hole = one < two and none > one
        return has_hole or none > 0.9
    if not one:
        return none > 0
    ratio = math.sqrt(min(1.0, two / one))
    # Laplace: P(0) / P(1) with P(2) / P(1) = ratio**2; no bound where P(2) is 0.
    explained = one / (ratio * (1 + ratio)) if ratio else 1.0
    return none > 2 * explained + 0.05


def fake_quantized(
    model: Model, value: gs.Tensor, decoder: Decoder, low: int, high: int
) -> gs.Tensor:
    """Append nodes that round values to what codes from ``low`` to ``high`` can say.

    Args:
        model: The training copy; its opset is 21 or later if there are more than 256
            levels.
        value: float32 of ``decoder.shape``.
        decoder: Scale and zero point.
        low: Smallest code.
        high: Largest code.
    """

    def add(op: str, *inputs: Any, **attrs: Any) -> gs.Tensor:
        read = [
            model.add_weight(f"{op}_constant", given)
            if isinstance(given, np.ndarray)
            else given
            for given in inputs
        ]
        return model.add_node(op, read, attrs=attrs).outputs[0]

    scale = _spread_in_graph(add, decoder, model)
    has_zero = bool(decoder.zero.any())
    code = add("Div", value, scale)
    if has_zero:
        code = add("Add", code, decoder.zero)
    ends = [np.asarray(low - _HALF, np.float32), np.asarray(high + _HALF, np.float32)]
    code = add("Clip", code, *ends)
    dtype: Any = np.int16
    if low >= -128 and high <= 127:
        dtype = np.int8
    elif low >= 0 and high <= 255:
        dtype = np.uint8
    one, none = np.ones((), np.float32), np.zeros((), dtype)
    code = add("QuantizeLinear", code, one, none)
    code = add("DequantizeLinear", code, one, none)
    if has_zero:
        code = add("Sub", code, decoder.zero)
    return add("Mul", code, scale)


def _spread_in_graph(add: Any, decoder: Decoder, model: Model) -> gs.Tensor:
    """Append what ``Decoder.spread`` does."""
    known = model.constant(decoder.scale)
    if known is not None:
        return model.add_weight(f"{known.name}_wide", decoder.spread(known.read()))
    shape, axis, block = decoder.shape, decoder.axis, decoder.block
    if axis is None:
        return decoder.scale
    wide = np.ones(len(shape), np.int64)
    wide[axis] = -1
    if not block:
        # A single scale becomes [1, ..., 1], which broadcasts too.
        return add("Reshape", decoder.scale, wide)
    count = -(-shape[axis] // block)
    before, after = list(shape[:axis]), list(shape[axis + 1 :])
    tensor = add(
        "Reshape", decoder.scale, np.asarray([*before, count, 1, *after], np.int64)
    )
    tensor = add("Expand", tensor, np.asarray([*before, count, block, *after]))
    tensor = add(
        "Reshape", tensor, np.asarray([*before, count * block, *after], np.int64)
    )
    if count * block == shape[axis]:
        return tensor
    ends = [np.asarray([n], np.int64) for n in (0, shape[axis], axis)]
    return add("Slice", tensor, *ends)
