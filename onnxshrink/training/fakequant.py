"""Integer weights while they are trained: float masters, rounded in the graph.

The graph of a training copy computes ``clip(round(v / s + z)) - z) * s`` of a float
master ``v``, passes the gradient of ``v`` straight through the rounding, and with it
that of the scale ``s``: LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020,
equations 1 to 3). Values within half a step of the outermost code are rounded to it
and not clipped, so a master that starts on that code is free to move.

Tested in tests/training/test_trainable.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxshrink.model import Model, Node
from onnxshrink.model.topology import is_onnx
from onnxshrink.structure.codes import Decoder

__all__ = [
    "fake_quantized",
    "float_products",
    "is_pruned",
    "levels_of",
]

Array = np.ndarray[Any, Any]

_FEW = 16
"""Codes are of few bits if there are no more levels than this."""
_TOLD = 4
"""Entries for each level from which gaps between codes are not by chance."""
_HALF = 0.499
"""A value this many steps beyond the outermost code is rounded to it, not clipped. It
is just below a half, which would round to the next even code."""


def levels_of(codes: Array) -> range:
    """Return the codes that a weight may have: from its smallest to its largest code.

    The range does not grow, so codes of few bits stay codes of few bits. A binary
    weight has -1 and 1, and not 0.
    """
    values = np.unique(codes.astype(np.int32))
    step = int(np.gcd.reduce(values - values[0])) or 1
    if codes.size < _TOLD * (int(values[-1] - values[0]) // step + 1):
        step = 1
    return range(int(values[0]), int(values[-1]) + 1, step)


def is_pruned(codes: Array, zero: Array) -> bool:
    """Whether the zeros of a quantized weight were made by pruning, not by rounding.

    Rounding leaves many zeros where the step is wide: half of a ternary weight is zero.
    For 8-bit codes, the codes next to zero tell how many zeros to expect: a two-sided
    exponential distribution is put through the shares of 1 and of 2 steps. The zeros
    are due to pruning if there are more than twice as many. For codes of 16 levels or
    fewer, they are due to pruning if there is a hole around zero, as magnitude pruning
    leaves it, or if nine in ten are zero.

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
    """Rewrite products of integers as products of the real numbers they stand for.

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
