"""Gradients of normalization.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule
from onnxshrink.training.rules_elementwise import output

Grads = list[Any]


def _standardized(
    ctx: GradContext, x: Tensor, axes: Sequence[int], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + epsilon), and the factor."""
    centred = ctx.op("Sub", x, ctx.mean(x, axes))
    variance = ctx.mean(ctx.op("Mul", centred, centred), axes)
    root = ctx.op("Sqrt", ctx.op("Add", variance, epsilon))
    factor = ctx.op("Reciprocal", root)
    return ctx.op("Mul", centred, factor), factor


def _through(
    ctx: GradContext, g: Tensor, hat: Tensor, factor: Tensor, axes: Sequence[int]
) -> Tensor:
    """Return the gradient of x, given that of its standardized values."""
    along = ctx.mean(ctx.op("Mul", g, hat), axes)
    rest = ctx.op("Sub", ctx.op("Sub", g, ctx.mean(g, axes)), ctx.op("Mul", hat, along))
    return ctx.op("Mul", rest, factor)


@rule("LayerNormalization")
def _layer_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale = node.inputs[:2]
    bias = given(node, 2)
    g = grads[0]
    rank = ctx.rank(x)
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    if ctx.data_type(x) == onnx.TensorProto.FLOAT:
        mean, factor = output(ctx, node, 1), output(ctx, node, 2)
        kept = [1 if i in axes else n for i, n in enumerate(ctx.shape(x))]
        ctx.note_shape(mean, kept, x)
        ctx.note_shape(factor, kept, x)
        hat = ctx.op("Mul", ctx.op("Sub", x, mean), factor)
    else:
        hat, factor = _standardized(ctx, x, axes, attribute(node, "epsilon", 1e-5))
    found: Grads = [None, None, None]
    if ctx.wants(0):
        found[0] = _through(ctx, ctx.op("Mul", g, scale), hat, factor, axes)
    if ctx.wants(1):
        found[1] = ctx.reduce_to(ctx.op("Mul", g, hat), scale)
    if bias is not None and ctx.wants(2):
        found[2] = ctx.reduce_to(g, bias)
    return found


@rule("RMSNormalization")
def _rms_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale = node.inputs[:2]
    g = grads[0]
    rank = ctx.rank(x)
    axes = list(range(attribute(node, "axis", -1) % rank, rank))
    square = ctx.mean(ctx.op("Mul", x, x), axes)
    root = ctx.op("Sqrt", ctx.op("Add", square, attribute(node, "epsilon", 1e-5)))
    factor = ctx.op("Reciprocal", root)
    hat = ctx.op("Mul", x, factor)
    found: Grads = [None, None]
    if ctx.wants(0):
        scaled = ctx.op("Mul", g, scale)
        along = ctx.mean(ctx.op("Mul", scaled, hat), axes)
        rest = ctx.op("Sub", scaled, ctx.op("Mul", hat, along))
        found[0] = ctx.op("Mul", rest, factor)
    if ctx.wants(1):
        found[1] = ctx.reduce_to(ctx.op("Mul", g, hat), scale)
    return found


def _channelwise(ctx: GradContext, tensor: Tensor, rank: int) -> Tensor:
    """Return a value for each channel in a shape that broadcasts over (N, C, ...)."""
    return ctx.reshape(tensor, [1, *ctx.shape(tensor), *[1] * (rank - 2)])


@rule("InstanceNormalization")
def _instance_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale = node.inputs[:2]
    g = grads[0]
    rank = ctx.rank(x)
    axes = list(range(2, rank))
    hat, factor = _standardized(ctx, x, axes, attribute(node, "epsilon", 1e-5))
    others = [0, *axes]
    found: Grads = [None, None, None]
    if ctx.wants(0):
        scaled = ctx.op("Mul", g, _channelwise(ctx, scale, rank))
        found[0] = _through(ctx, scaled, hat, factor, axes)
    if ctx.wants(1):
        found[1] = ctx.total(ctx.op("Mul", g, hat), others)
    if ctx.wants(2):
        found[2] = ctx.total(g, others)
    return found


@rule("GroupNormalization")
def _group_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale, bias = node.inputs
    g = grads[0]
    shape = ctx.shape(x)
    groups = int(attribute(node, "num_groups", 1))
    inner = [shape[0], groups, shape[1] // groups, math.prod(shape[2:])]
    width = inner[2]
    hat, factor = _standardized(
        ctx, ctx.reshape(x, inner), [2, 3], attribute(node, "epsilon", 1e-5)
    )
    g = ctx.reshape(g, inner)
    found: Grads = [None, None, None]
    if ctx.wants(0):
        factors = ctx.reshape(scale, [1, groups, width, 1])
        scaled = ctx.op("Mul", g, factors)
        found[0] = ctx.reshape(_through(ctx, scaled, hat, factor, [2, 3]), shape)
    if ctx.wants(1):
        total = ctx.reduce_to(ctx.op("Mul", g, hat), [1, groups, width, 1])
        found[1] = ctx.reshape(total, ctx.shape(scale))
    if ctx.wants(2):
        total = ctx.reduce_to(g, [1, groups, width, 1])
        found[2] = ctx.reshape(total, ctx.shape(bias))
    return found


@rule("BatchNormalization")
def _batch_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, scale, _, mean, variance = node.inputs
    g = grads[0]
    if g is None or any(other is not None for other in grads[1:]):
        raise ctx.refused(node, "its running statistics are used")
    rank = ctx.rank(x)
    epsilon = attribute(node, "epsilon", 1e-5)
    others = [axis for axis in range(rank) if axis != 1]
    found: Grads = [None] * 5
    if attribute(node, "training_mode", 0):
        hat, factor = _standardized(ctx, x, others, epsilon)
        if ctx.wants(0):
            scaled = ctx.op("Mul", g, _channelwise(ctx, scale, rank))
            found[0] = _through(ctx, scaled, hat, factor, others)
        if ctx.wants(1):
            found[1] = ctx.total(ctx.op("Mul", g, hat), others)
        if ctx.wants(2):
            found[2] = ctx.total(g, others)
        return found
    root = ctx.op("Sqrt", ctx.op("Add", variance, epsilon))
    factor = ctx.op("Reciprocal", root)
    slope = ctx.op("Mul", scale, factor)
    if ctx.wants(0):
        found[0] = ctx.op("Mul", g, _channelwise(ctx, slope, rank))
    if not any(ctx.wants(index) for index in range(1, 5)):
        return found
    total = ctx.total(g, others)
    if ctx.wants(2):
        found[2] = total
    if ctx.wants(1) or ctx.wants(4):
        centred = ctx.op("Sub", x, _channelwise(ctx, mean, rank))
        product = ctx.total(ctx.op("Mul", g, centred), others)
        if ctx.wants(1):
            found[1] = ctx.op("Mul", product, factor)
        if ctx.wants(4):
            cube = ctx.op("Mul", ctx.op("Mul", factor, factor), slope)
            found[4] = ctx.op("Mul", ctx.op("Mul", product, cube), -0.5)
    if ctx.wants(3):
        found[3] = ctx.op("Neg", ctx.op("Mul", total, slope))
    return found


@rule("LpNormalization")
def _lp_norm(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, y, g = node.inputs[0], node.outputs[0], grads[0]
    axis = attribute(node, "axis", -1) % ctx.rank(x)
    if attribute(node, "p", 2) != 2:
        raise ctx.refused(node, "only p = 2 is covered")
    length = ctx.op("ReduceL2", x, ctx.ints([axis]), keepdims=1)
    along = ctx.total(ctx.op("Mul", g, y), [axis], keepdims=True)
    return [ctx.op("Div", ctx.op("Sub", g, ctx.op("Mul", y, along)), length)]
