"""Straight-through gradients of quantization, with learned scales.

LSQ: Esser et al., Learned Step Size Quantization, ICLR 2020, equations 1 to 3. The
gradient of an integer code stands for that of the real number the code was rounded
from. The two operators of a pair each give their part of the scale's gradient: where
they share one scale, the parts add up to the paper's. A number within half a step of
the outermost code is rounded to it like any other, and not clipped.

Tested in tests/training/test_trainable.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from onnxshrink.model import Node
from onnxshrink.training.gradients import (
    GradContext,
    Tensor,
    attribute,
    given,
    rule,
    zero_gradient,
)

Grads = list[Any]

_T = onnx.TensorProto
_RANGES: dict[int, tuple[int, int]] = {
    _T.UINT8: (0, 255),
    _T.INT8: (-128, 127),
    _T.UINT16: (0, 65535),
    _T.INT16: (-32768, 32767),
    _T.UINT4: (0, 15),
    _T.INT4: (-8, 7),
    _T.UINT2: (0, 3),
    _T.INT2: (-2, 1),
}

# A range found at run time counts as a constant.
zero_gradient("DynamicQuantizeLinear")


def lsq_factor(size: int, largest: int) -> float:
    """Return what LSQ multiplies a scale's gradient with: 1 / sqrt(N Q).

    Args:
        size: Number of values that share the scale.
        largest: The largest code.
    """
    return 1.0 / math.sqrt(size * largest)


def _broadcast(ctx: GradContext, node: Node, tensor: Tensor, like: Tensor) -> Tensor:
    """Return a scale or zero point in a shape that broadcasts over the values."""
    shape = ctx.shape(tensor)
    if attribute(node, "block_size", 0):
        raise ctx.refused(node, "it has a scale for each block")
    if len(shape) == 0 or shape == (1,):
        return ctx.reshape(tensor, ())
    rank = ctx.rank(like)
    axis = attribute(node, "axis", 1) % rank
    made = ctx.op(
        "Reshape", tensor, [shape[0] if i == axis else 1 for i in range(rank)]
    )
    return made


def _zero_point(ctx: GradContext, node: Node, like: Tensor) -> Tensor | None:
    zero = given(node, 2)
    if zero is None:
        return None
    known = ctx.value(zero)
    if known is not None and not np.any(known):
        return None
    return ctx.op(
        "Cast", _broadcast(ctx, node, zero, like), to=ctx.data_type(node.inputs[1])
    )


@rule("QuantizeLinear")
def _quantize(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale = node.inputs[:2]
    g = grads[0]
    zero = given(node, 2)
    kind = attribute(node, "output_dtype", 0) or (
        ctx.data_type(zero) if zero is not None else _T.UINT8
    )
    if kind not in _RANGES:
        raise ctx.refused(node, f"its codes are {_T.DataType.Name(kind)}")
    low, high = _RANGES[kind]
    wide = _broadcast(ctx, node, scale, x)
    ratio = ctx.op("Div", x, wide)
    offset = _zero_point(ctx, node, x)
    code = ratio if offset is None else ctx.op("Add", ratio, offset)
    inside = ctx.op(
        "And",
        ctx.op("GreaterOrEqual", code, low - 0.5),
        ctx.op("LessOrEqual", code, high + 0.5),
    )
    passed = ctx.op("Div", ctx.mask(inside, g), wide)
    found: Grads = [passed if ctx.wants(0) else None, None]
    if ctx.wants(1):
        part = ctx.op("Neg", ctx.op("Mul", passed, ratio))
        total = ctx.reduce_to(part, ctx.shape(wide))
        found[1] = ctx.reshape(total, ctx.shape(scale))
    return found


@rule("DequantizeLinear")
def _dequantize(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    codes, scale = node.inputs[:2]
    g = grads[0]
    wide = _broadcast(ctx, node, scale, codes)
    found: Grads = [ctx.op("Mul", g, wide) if ctx.wants(0) else None, None]
    if ctx.wants(1):
        real = ctx.op("Cast", codes, to=ctx.data_type(scale))
        offset = _zero_point(ctx, node, codes)
        steps = real if offset is None else ctx.op("Sub", real, offset)
        total = ctx.reduce_to(ctx.op("Mul", g, steps), ctx.shape(wide))
        found[1] = ctx.reshape(total, ctx.shape(scale))
    return found
