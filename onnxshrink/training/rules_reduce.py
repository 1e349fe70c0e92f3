"""Gradients of reductions and running sums.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule

Grads = list[Any]
Body = Callable[[GradContext, Tensor, Tensor, Tensor, list[int]], Tensor]


def reduced_axes(ctx: GradContext, node: Node) -> list[int]:
    """Return the axes that a reduction removes, counted from the front."""
    rank = ctx.rank(node.inputs[0])
    axes = ctx.integers(given(node, 1), node)
    if axes is None:
        axes = attribute(node, "axes", None)
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return []
        axes = list(range(rank))
    return sorted({int(axis) % max(1, rank) for axis in axes} if rank else set())


def _reduction(op: str) -> Callable[[Body], Body]:
    """Register a function of (ctx, x, y, g, axes) where y and g have kept their axes.

    What it returns is broadcast to the shape of x.
    """

    def register(body: Body) -> Body:
        def apply(ctx: GradContext, node: Node, grads: Grads) -> Grads:
            x = node.inputs[0]
            axes = reduced_axes(ctx, node)
            shape = ctx.shape(x)
            kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
            y = ctx.reshape(node.outputs[0], kept)
            g = ctx.reshape(grads[0], kept)
            return [ctx.expand(body(ctx, x, y, g, axes), shape)]

        rule(op)(apply)
        return body

    return register


def _count(ctx: GradContext, x: Tensor, axes: Sequence[int]) -> int:
    shape = ctx.shape(x)
    return max(1, math.prod(shape[axis] for axis in axes))


@_reduction("ReduceSum")
def _sum(ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    return g


@_reduction("ReduceMean")
def _mean(ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    return ctx.op("Mul", g, 1.0 / _count(ctx, x, axes))


def spread_extremum(
    ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: Sequence[int]
) -> Tensor:
    """Return the gradient of a maximum or minimum; values that tie share it."""
    hits = ctx.op("Cast", ctx.op("Equal", x, y), to=ctx.data_type(x))
    part = ctx.op("Div", g, ctx.total(hits, axes, keepdims=True))
    return ctx.op("Mul", hits, part)


_reduction("ReduceMax")(spread_extremum)
_reduction("ReduceMin")(spread_extremum)


@_reduction("ReduceProd")
def _prod(ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    # The gradient of an element is the product of all others. That is y / x only
    # where no element is zero.
    zero = ctx.op("Equal", x, 0.0)
    safe = ctx.op("Where", zero, ctx.scalar(1.0, x), x)
    zeros = ctx.op("Cast", zero, to=ctx.data_type(x))
    rest = ctx.op("ReduceProd", safe, ctx.ints(axes), keepdims=1) if axes else safe
    # The product of all others is not zero for two kinds of elements: any, if there
    # is no zero at all; and a zero, if it is the only one.
    alone = ctx.op("Equal", ctx.total(zeros, axes, keepdims=True), zeros)
    return ctx.mask(alone, ctx.op("Mul", g, ctx.op("Div", rest, safe)))


@_reduction("ReduceL1")
def _l1(ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    return ctx.op("Mul", g, ctx.op("Sign", x))


@_reduction("ReduceL2")
def _l2(ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]) -> Tensor:
    zero = ctx.op("Equal", y, 0.0)
    safe = ctx.op("Where", zero, ctx.scalar(1.0, y), y)
    return ctx.op("Mul", ctx.op("Div", g, safe), x)


@_reduction("ReduceSumSquare")
def _sum_square(
    ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]
) -> Tensor:
    return ctx.op("Mul", ctx.op("Mul", g, 2.0), x)


@_reduction("ReduceLogSum")
def _log_sum(
    ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]
) -> Tensor:
    return ctx.op("Div", g, ctx.op("Exp", y))


@_reduction("ReduceLogSumExp")
def _log_sum_exp(
    ctx: GradContext, x: Tensor, y: Tensor, g: Tensor, axes: list[int]
) -> Tensor:
    return ctx.op("Mul", g, ctx.op("Exp", ctx.op("Sub", x, y)))


@rule("CumSum")
def _cum_sum(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    made = ctx.op(
        "CumSum",
        grads[0],
        node.inputs[1],
        like=node.inputs[0],
        exclusive=attribute(node, "exclusive", 0),
        reverse=1 - attribute(node, "reverse", 0),
    )
    return [made]
