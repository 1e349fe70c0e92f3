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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.quantization.schemes import MIN_OPSET

__all__ = [
    "CODES",
    "Decoder",
    "decoder_of",
    "fake_quantized",
    "float_products",
    "is_pruned",
    "levels_of",
]

Array = np.ndarray[Any, Any]

CODES = frozenset(MIN_OPSET)
"""Element types of codes that are trained."""
MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only move codes about."""
_FEW = 16
"""Codes are of few bits if there are no more levels than this."""
_TOLD = 4
"""Entries for each level from which gaps between codes are not by chance."""
_HALF = 0.499
"""How far beyond the outermost code a value may lie, in steps, and is rounded to it.
Just below a half, which would round to the next even code."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """How real values are made of a weight's codes.

    Attributes:
        nodes: The nodes that do it.
        ends: What they give: tensors that hold the values, each with the indices of the
            rows that are looked up, or ``None`` for all.
        scale: What they read the scale from.
        zero: Zero point in a shape that broadcasts over the values, float32.
        parameters: Names of the constants that hold scale and zero point.
        shape: Shape of the values.
        places: For each value the position of its code in the flat weight; ``None`` if
            they are in the same order.
        axis: Axis of the channels or blocks; ``None`` where the scale broadcasts as it
            is.
        block: Values along ``axis`` that share a scale; 0: no blocks.
    """

    nodes: tuple[Node, ...]
    ends: tuple[tuple[gs.Tensor, gs.Tensor | None], ...]
    scale: gs.Tensor
    zero: Array
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    places: Array | None = None
    axis: int | None = None
    block: int = 0

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
        self, values: Array, scale: Array, levels: range, shape: Sequence[int]
    ) -> Array:
        """Return the codes, int32 of the weight's shape, nearest to real values."""
        step = levels.step
        steps = values / (self.spread(scale) * np.float32(step))
        places = np.rint(steps + (self.zero - levels[0]) / np.float32(step))
        flat = np.clip(places, 0, len(levels) - 1).astype(np.int32).reshape(-1)
        flat = flat * step + levels[0]
        if self.places is not None:
            back = np.empty_like(flat)
            back[self.places.reshape(-1)] = flat
            flat = back
        return flat.reshape(shape)

    def replace(self, model: Model, values: gs.Tensor) -> None:
        """Let whoever reads the decoded values read others; remove what decoded."""
        for end, indices in self.ends:
            made = values
            if indices is not None:
                made = model.add_node("Gather", [values, indices]).outputs[0]
            model.replace_uses(end, made)
        for node in self.nodes:
            model.remove(node)


def levels_of(codes: Array) -> range:
    """Return the codes that a weight may have: those it has, and between them.

    Codes of few bits stay such, and those of a binary weight are -1 and 1 without 0.
    """
    values = np.unique(codes.astype(np.int32))
    step = int(np.gcd.reduce(values - values[0])) or 1
    if codes.size < _TOLD * (int(values[-1] - values[0]) // step + 1):
        step = 1
    return range(int(values[0]), int(values[-1]) + 1, step)


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
    and their like may stand before and between. Gather of rows may stand before Cast,
    and of the same rows of the scale. Several such readers decode alike. The scale may
    be computed.
    """
    found: list[Decoder] = []
    for node, index in weight.uses:
        try:
            one = _Walk(model, weight).decoder(node, index)
        except (IndexError, ValueError):  # as a file may say anything
            one = "its shape does not fit what decodes it"
        if isinstance(one, str):
            return one
        found.append(one)
    if not found:
        return "nothing reads its codes"
    first = found[0]
    if not all(_alike(first, other) for other in found[1:]):
        return "several nodes read its codes, each in its way"
    return replace(
        first,
        nodes=tuple(node for one in found for node in one.nodes),
        ends=tuple(end for one in found for end in one.ends),
    )


def _alike(one: Decoder, two: Decoder) -> bool:
    places = [p if p is None else p.tobytes() for p in (one.places, two.places)]
    return (
        one.scale is two.scale
        and one.shape == two.shape
        and np.array_equal(one.zero, two.zero)
        and places[0] == places[1]
        and (one.axis, one.block) == (two.axis, two.block)
    )


class _Walk:
    """From codes along their readers to the node that gives real values."""

    def __init__(self, model: Model, weight: Weight) -> None:
        self.model, self.weight = model, weight
        self.nodes: list[Node] = []
        self.places: Array | None = None
        self.rows: gs.Tensor | None = None
        self.parameters: list[str] = []

    def decoder(self, node: Node, index: int) -> Decoder | str:
        """Describe what starts with a reader of the codes."""
        if index != 0:
            return f"{node.op} reads its codes"
        is_cast = False
        while True:
            if not is_onnx(node.domain):
                return f"{node.op} reads its codes"
            self.nodes.append(node)
            if node.op == "Cast" and not is_cast:
                if node.attrs.get("to") not in (onnx.TensorProto.FLOAT, np.float32):
                    return "its codes are cast to another type than float32"
                is_cast = True
            elif node.op in MOVES and self.rows is None:
                if not self._move(node):
                    return (
                        f"{node.op} {node.name!r} moves its codes by what is computed"
                    )
            elif node.op == "Gather" and self._looks_up(node) and not is_cast:
                self.rows = node.inputs[1]
            elif node.op == "DequantizeLinear" and not is_cast and self.rows is None:
                return self._dequantized(node)
            elif node.op in ("Mul", "Sub") and is_cast:
                return self._multiplied(node)
            else:
                return f"{node.op} reads its codes before they are decoded"
            reader = self._only_reader(node.outputs[0])
            if reader is None:
                return "several nodes read its codes, each in its way"
            node = reader

    def _looks_up(self, node: Node) -> bool:
        first = self.rows is None and self.places is None
        return first and int(attribute(node, "axis", 0)) % len(self.weight.shape) == 0

    def _move(self, node: Node) -> bool:
        places = self.places
        if places is None:
            count = np.arange(self.weight.size, dtype=np.int32)
            places = count.reshape(self.weight.shape)
        moved = _moved(self.model, node, places)
        if moved is not None:
            self.places = moved
        return moved is not None

    def _only_reader(self, tensor: gs.Tensor) -> Node | None:
        readers = list(dict.fromkeys(tensor.outputs))
        is_output = any(tensor is output for output in self.model.graph.outputs)
        return readers[0] if len(readers) == 1 and not is_output else None

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.weight.shape if self.places is None else self.places.shape

    def _known(self, tensor: gs.Tensor) -> Array | None:
        """Return a constant, or one behind Cast and the Gather of the same rows."""
        for _ in range(3):
            known = self.model.constant(tensor)
            if known is not None:
                self.parameters.append(known.name)
                return known.read().astype(np.float32)
            maker = tensor.inputs[0] if tensor.inputs else None
            if maker is None or maker.op not in ("Cast", "Gather"):
                return None
            if maker.op == "Gather" and maker.inputs[1] is not self.rows:
                return None
            tensor = maker.inputs[0]
        return None

    def _made(
        self,
        values: gs.Tensor,
        scale: gs.Tensor,
        zero: Array,
        axis: int | None = None,
        block: int = 0,
    ) -> Decoder:
        known = self.model.constant(scale)
        if known is not None:
            self.parameters.append(known.name)
        return Decoder(
            tuple(self.nodes),
            ((values, self.rows),),
            scale,
            zero,
            tuple(self.parameters),
            self._shape,
            self.places,
            axis,
            block,
        )

    def _dequantized(self, node: Node) -> Decoder | str:
        shape = self._shape
        zero: Array | None = np.zeros((), np.float32)
        if len(node.inputs) > 2 and (node.inputs[2].name or node.inputs[2].inputs):
            zero = self._known(node.inputs[2])
        if zero is None:
            return "its zero point is computed from data"
        axis = int(attribute(node, "axis", 1))
        axis += len(shape) if axis < 0 else 0
        if not 0 <= axis < max(len(shape), 1):
            axis = 0
        block = int(attribute(node, "block_size", 0))
        wide = _spread(zero, shape, axis, block)
        return self._made(node.outputs[0], node.inputs[1], wide, axis, block)

    def _multiplied(self, node: Node) -> Decoder | str:
        """Describe Cast, Sub, Mul; ``node`` is the first of Sub and Mul."""
        zero: Array = np.zeros((), np.float32)
        before = self.nodes[-2].outputs[0]
        if node.op == "Sub":
            known = self._known(node.inputs[1])
            if node.inputs[0] is not before or known is None:
                return "its zero point is computed from data"
            zero = known
            before = node.outputs[0]
            reader = self._only_reader(before)
            if reader is None or reader.op != "Mul":
                return "several nodes read its codes, each in its way"
            node = reader
            self.nodes.append(node)
        rest = [tensor for tensor in node.inputs if tensor is not before]
        if len(rest) != 1:
            return "Mul reads its codes before they are decoded"
        scale = rest[0]
        maker = scale.inputs[0] if scale.inputs else None
        if self.rows is not None and maker is not None and maker.op == "Gather":
            if maker.inputs[1] is not self.rows:
                return "its scale is computed from data"
            scale = maker.inputs[0]
        elif self.rows is not None:
            one = self.model.constant(scale)
            if one is None or one.size > 1:
                return "its scale is computed from data"
        return self._made(node.outputs[0], scale, zero)


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
    model: Model, value: gs.Tensor, decoder: Decoder, levels: range
) -> gs.Tensor:
    """Append nodes that round values to what codes can say.

    Args:
        model: The training copy; its opset is 21 or later if there are more than 256
            levels.
        value: float32 of ``decoder.shape``.
        decoder: Scale and zero point.
        levels: The codes.
    """

    def add(op: str, *inputs: Any) -> gs.Tensor:
        read = [
            model.add_weight(f"{op}_constant", given)
            if isinstance(given, np.ndarray)
            else given
            for given in inputs
        ]
        return model.add_node(op, read).outputs[0]

    scale = _spread_in_graph(add, decoder, model)
    zero, low, high = decoder.zero, levels[0], levels[-1]
    if levels.step > 1:
        step = np.float32(levels.step)
        scale = add("Mul", scale, np.asarray(step))
        zero, low, high = (zero - np.float32(low)) / step, 0, len(levels) - 1
    zero = np.asarray(zero, np.float32)
    code = add("Div", value, scale)
    if zero.any():
        code = add("Add", code, zero)
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
    if zero.any():
        code = add("Sub", code, zero)
    return add("Mul", code, scale)


def float_products(model: Model) -> None:
    """Let products of integers be products of the real numbers they stand for.

    DynamicQuantizeLinear, MatMulInteger, Cast and Mul with the product of both scales
    become QuantizeLinear and DequantizeLinear, which pass gradients, DequantizeLinear
    of the weight, and MatMul. The range of the activations counts as a constant.

    Args:
        model: A copy to look at or to train, edited in place.
    """
    for node in list(model.graph.nodes):
        if node.op == "MatMulInteger" and is_onnx(node.domain):
            _float_product(model, node)


def _float_product(model: Model, node: Node) -> None:
    maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    weight = model.constant(node.inputs[1])
    if maker is None or weight is None or maker.op != "DynamicQuantizeLinear":
        return
    step, zero = maker.outputs[1:3]
    if len(node.inputs) != 3 or node.inputs[2] is not zero or len(weight.shape) < 2:
        return
    cast, product = _reader(node.outputs[0], "Cast"), None
    product = None if cast is None else _reader(cast.outputs[0], "Mul")
    if cast is None or product is None:
        return
    rest = [t for t in product.inputs if t is not cast.outputs[0]]
    both = rest[0].inputs[0] if len(rest) == 1 and rest[0].inputs else None
    if both is None or both.op != "Mul" or step not in both.inputs:
        return
    scales = [tensor for tensor in both.inputs if tensor is not step]
    scale = model.constant(scales[0]) if len(scales) == 1 else None
    if scale is None or scale.size not in (1, weight.shape[-1]):
        return
    codes = model.add_node("QuantizeLinear", [maker.inputs[0], step, zero]).outputs[0]
    left = model.add_node("DequantizeLinear", [codes, step, zero]).outputs[0]
    attrs = {"axis": len(weight.shape) - 1}
    flat = scale.read().reshape(-1)
    if scale.shape != flat.shape[: len(scale.shape)] or len(scale.shape) > 1:
        return
    right = model.add_node(
        "DequantizeLinear", [node.inputs[1], scales[0]], attrs=attrs
    ).outputs[0]
    made = model.add_node("MatMul", [left, right]).outputs[0]
    model.replace_uses(product.outputs[0], made)
    for old in (product, cast, node):
        model.remove(old)
    if not both.outputs[0].outputs:
        model.remove(both)


def _reader(tensor: gs.Tensor, op: str) -> Node | None:
    readers = list(dict.fromkeys(tensor.outputs))
    return readers[0] if len(readers) == 1 and readers[0].op == op else None


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
