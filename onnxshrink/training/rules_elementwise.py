"""Gradients of arithmetic with broadcasting and of activation functions.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule

Grads = list[Any]


# --- arithmetic -------------------------------------------------------------------


@rule("Add")
def _add(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    return [
        ctx.reduce_to(grads[0], x) if ctx.wants(i) else None
        for i, x in enumerate(node.inputs)
    ]


rule("Sum")(_add)


@rule("Sub")
def _sub(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    a, b = node.inputs
    return [
        ctx.reduce_to(grads[0], a) if ctx.wants(0) else None,
        ctx.op("Neg", ctx.reduce_to(grads[0], b)) if ctx.wants(1) else None,
    ]


@rule("Mul")
def _mul(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    a, b = node.inputs
    return [
        ctx.reduce_to(ctx.op("Mul", grads[0], b), a) if ctx.wants(0) else None,
        ctx.reduce_to(ctx.op("Mul", grads[0], a), b) if ctx.wants(1) else None,
    ]


@rule("Div")
def _div(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    a, b = node.inputs
    over = ctx.op("Div", grads[0], b)
    found: Grads = [ctx.reduce_to(over, a) if ctx.wants(0) else None, None]
    if ctx.wants(1):
        product = ctx.op("Mul", over, node.outputs[0])
        found[1] = ctx.op("Neg", ctx.reduce_to(product, b))
    return found


@rule("Mean")
def _mean(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    part = ctx.op("Div", grads[0], float(len(node.inputs)))
    return [
        ctx.reduce_to(part, x) if ctx.wants(i) else None
        for i, x in enumerate(node.inputs)
    ]


@rule("Pow")
def _power(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, p = node.inputs
    g, y = grads[0], node.outputs[0]
    found: Grads = [None, None]
    if ctx.wants(0):
        known = ctx.value(p)
        if known is not None and known.size == 1:
            exponent = float(known.reshape(()))
            less = x
            if exponent != 2.0:
                less = ctx.op(
                    "Pow", x, ctx.constant(np.asarray(exponent - 1, ctx.dtype(x)))
                )
            slope = ctx.op("Mul", less, exponent)
        else:
            real = ctx.op("CastLike", p, x)
            slope = ctx.op("Mul", ctx.op("Pow", x, ctx.op("Sub", real, 1.0)), real)
        found[0] = ctx.reduce_to(ctx.op("Mul", g, slope), x)
    if ctx.wants(1):
        # The derivative by the exponent exists for positive bases only.
        one = ctx.scalar(1.0, x)
        safe = ctx.op("Where", ctx.op("Greater", x, 0.0), x, one)
        slope = ctx.op("Mul", y, ctx.op("Log", safe))
        found[1] = ctx.reduce_to(ctx.op("Mul", g, slope), p)
    return found


@rule("Min", "Max")
def _extremum(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    g, y = grads[0], node.outputs[0]
    if len(node.inputs) == 1:
        return [g]
    kind = ctx.data_type(y)
    hits = [ctx.op("Cast", ctx.op("Equal", x, y), to=kind) for x in node.inputs]
    # Values that tie share the gradient.
    part = ctx.op("Div", g, ctx.op("Sum", *hits))
    return [
        ctx.reduce_to(ctx.op("Mul", part, hit), x) if ctx.wants(i) else None
        for i, (x, hit) in enumerate(zip(node.inputs, hits, strict=True))
    ]


@rule("Where")
def _where(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    condition, x, y = node.inputs
    g = grads[0]
    found: Grads = [None, None, None]
    if ctx.wants(1):
        found[1] = ctx.reduce_to(ctx.op("Where", condition, g, ctx.scalar(0, g)), x)
    if ctx.wants(2):
        found[2] = ctx.reduce_to(ctx.op("Where", condition, ctx.scalar(0, g), g), y)
    return found


@rule("Clip")
def _clip(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    low, high = given(node, 1), given(node, 2)
    inside = g
    found: Grads = [None, None, None]
    if low is not None:
        inside = ctx.mask(ctx.op("GreaterOrEqual", x, low), inside)
        if ctx.wants(1):
            found[1] = ctx.reduce_to(ctx.mask(ctx.op("Less", x, low), g), low)
    if high is not None:
        inside = ctx.mask(ctx.op("LessOrEqual", x, high), inside)
        if ctx.wants(2):
            found[2] = ctx.reduce_to(ctx.mask(ctx.op("Greater", x, high), g), high)
    found[0] = inside if ctx.wants(0) else None
    return found


@rule("Identity")
def _identity(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    return [grads[0]]


@rule("Cast", "CastLike")
def _cast(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    kind = ctx.data_type(node.inputs[0])
    return [
        grads[0]
        if ctx.data_type(grads[0]) == kind
        else ctx.op("Cast", grads[0], to=kind)
    ]


@rule("Dropout")
def _dropout(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    training = given(node, 2)
    if training is None or (
        ctx.value(training) is not None and not ctx.value(training)
    ):
        return [grads[0]]
    if ctx.value(training) is None:
        raise ctx.refused(node, "whether it drops anything depends on data")
    kept = output(ctx, node, 1)
    masked = ctx.mask(kept, grads[0])
    ratio = given(node, 1)
    rate = ctx.value(ratio) if ratio is not None else np.float32(0.5)
    if rate is None:
        raise ctx.refused(node, "its ratio depends on data")
    return [ctx.op("Mul", masked, 1.0 / (1.0 - float(np.reshape(rate, ()))))]


def output(ctx: GradContext, node: Node, index: int) -> Tensor:
    """Return an optional output of a node, which gains it if it has none."""
    from onnxshrink.model import Variable

    while len(node.outputs) <= index:
        node.outputs.append(Variable.empty())
    if not node.outputs[index].name:
        label = ctx.model.fresh(f"{node.name or node.op}_out{index}")
        node.outputs[index] = Variable(label)
    return node.outputs[index]


# --- functions of one value -------------------------------------------------------

Slope = Callable[[GradContext, Node, Tensor, Tensor, Tensor], Tensor]


def _unary(*ops: str, domain: str = "") -> Callable[[Slope], Slope]:
    """Register a function of (ctx, node, x, y, g) that returns the gradient of x."""

    def register(function: Slope) -> Slope:
        def apply(ctx: GradContext, node: Node, grads: Grads) -> Grads:
            return [function(ctx, node, node.inputs[0], node.outputs[0], grads[0])]

        rule(*ops, domain=domain)(apply)
        return function

    return register


@_unary("Neg")
def _neg(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Neg", g)


@_unary("Abs")
def _absolute(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Mul", g, ctx.op("Sign", x))


@_unary("Reciprocal")
def _reciprocal(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    return ctx.op("Neg", ctx.op("Mul", g, ctx.op("Mul", y, y)))


@_unary("Exp")
def _exp(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Mul", g, y)


@_unary("Log")
def _log(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Div", g, x)


@_unary("Sqrt")
def _sqrt(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Div", ctx.op("Mul", g, 0.5), y)


@_unary("Erf")
def _erf(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    bell = ctx.op("Exp", ctx.op("Neg", ctx.op("Mul", x, x)))
    return ctx.op("Mul", ctx.op("Mul", g, 2 / math.sqrt(math.pi)), bell)


@_unary("Relu")
def _relu(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    # From the output, so that onnxruntime may fuse the forward node into a Conv.
    return ctx.mask(ctx.op("Cast", y, to=9), g)


@_unary("LeakyRelu")
def _leaky_relu(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    alpha = attribute(node, "alpha", 0.01)
    return ctx.op("Where", ctx.op("Greater", x, 0.0), g, ctx.op("Mul", g, alpha))


@_unary("ThresholdedRelu")
def _thresholded_relu(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    return ctx.mask(ctx.op("Greater", x, attribute(node, "alpha", 1.0)), g)


@rule("PRelu")
def _prelu(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, slope = node.inputs
    g = grads[0]
    found: Grads = [None, None]
    if ctx.wants(0):
        positive = ctx.op("Greater", x, 0.0)
        found[0] = ctx.op("Where", positive, g, ctx.op("Mul", g, slope))
    if ctx.wants(1):
        negative = ctx.op("Min", x, ctx.scalar(0, x))
        found[1] = ctx.reduce_to(ctx.op("Mul", g, negative), slope)
    return found


@_unary("Sigmoid")
def _sigmoid(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    slope = ctx.op("Sub", y, ctx.op("Mul", y, y))
    return ctx.op("Mul", g, slope)


@_unary("Tanh")
def _tanh(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Sub", g, ctx.op("Mul", g, ctx.op("Mul", y, y)))


@_unary("HardSigmoid")
def _hard_sigmoid(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    rising = ctx.op(
        "And",
        ctx.op("Greater", y, 0.0),
        ctx.op("Less", y, 1.0),
    )
    return ctx.mask(rising, ctx.op("Mul", g, attribute(node, "alpha", 0.2)))


@_unary("HardSwish")
def _hard_swish(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    third = ctx.op("Add", ctx.op("Mul", x, 1 / 3), 0.5)
    upper = ctx.op("Where", ctx.op("Less", x, 3.0), third, ctx.scalar(1.0, x))
    slope = ctx.op("Where", ctx.op("Greater", x, -3.0), upper, ctx.scalar(0, x))
    return ctx.op("Mul", g, slope)


@_unary("Elu")
def _elu(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    below = ctx.op("Mul", g, ctx.op("Add", y, attribute(node, "alpha", 1.0)))
    return ctx.op("Where", ctx.op("Greater", x, 0.0), g, below)


@_unary("Selu")
def _selu(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    alpha = attribute(node, "alpha", 1.6732632423543772)
    gamma = attribute(node, "gamma", 1.0507009873554805)
    below = ctx.op("Mul", g, ctx.op("Add", y, gamma * alpha))
    above = ctx.op("Mul", g, gamma)
    return ctx.op("Where", ctx.op("Greater", x, 0.0), above, below)


@_unary("Celu")
def _celu(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    alpha = attribute(node, "alpha", 1.0)
    below = ctx.op("Mul", g, ctx.op("Add", ctx.op("Div", y, alpha), 1.0))
    return ctx.op("Where", ctx.op("Greater", x, 0.0), g, below)


@_unary("Softplus")
def _softplus(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Mul", g, ctx.op("Sigmoid", x))


@_unary("Softsign")
def _softsign(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    below = ctx.op("Add", ctx.op("Abs", x), 1.0)
    return ctx.op("Div", g, ctx.op("Mul", below, below))


@_unary("Mish")
def _mish(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    t = ctx.op("Tanh", ctx.op("Softplus", x))
    square = ctx.op("Neg", ctx.op("Sub", ctx.op("Mul", t, t), 1.0))
    inner = ctx.op("Mul", ctx.op("Mul", x, ctx.op("Sigmoid", x)), square)
    return ctx.op("Mul", g, ctx.op("Add", t, inner))


@_unary("Swish")
def _swish(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    alpha = attribute(node, "alpha", 1.0)
    s = ctx.op("Sigmoid", x if alpha == 1.0 else ctx.op("Mul", x, alpha))
    # s + alpha y (1 - s)
    rest = ctx.op("Mul", y, ctx.op("Neg", ctx.op("Sub", s, 1.0)))
    return ctx.op("Mul", g, ctx.op("Add", s, ctx.op("Mul", rest, alpha)))


@_unary("Gelu")
def _gelu(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    if attribute(node, "approximate", "none") == "tanh":
        # Of 0.5 x (1 + tanh(c (x + 0.044715 x^3))).
        c = math.sqrt(2 / math.pi)
        square = ctx.op("Mul", x, x)
        inside = ctx.op("Add", ctx.op("Mul", square, c * 0.044715), c)
        t = ctx.op("Tanh", ctx.op("Mul", x, inside))
        slope = ctx.op("Add", ctx.op("Mul", square, 3 * c * 0.044715), c)
        bell = ctx.op("Neg", ctx.op("Sub", ctx.op("Mul", t, t), 1.0))
        rest = ctx.op("Mul", ctx.op("Mul", x, bell), slope)
        both = ctx.op("Add", ctx.op("Add", t, 1.0), rest)
        return ctx.op("Mul", g, ctx.op("Mul", both, 0.5))
    cdf = ctx.op("Add", ctx.op("Erf", ctx.op("Mul", x, math.sqrt(0.5))), 1.0)
    half = ctx.op("Mul", cdf, 0.5)
    bell = ctx.op("Exp", ctx.op("Mul", ctx.op("Mul", x, x), -0.5))
    rest = ctx.op("Mul", ctx.op("Mul", x, bell), 1 / math.sqrt(2 * math.pi))
    return ctx.op("Mul", g, ctx.op("Add", half, rest))


_unary("Gelu", domain="com.microsoft")(_gelu)


@_unary("Sin")
def _sin(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Mul", g, ctx.op("Cos", x))


@_unary("Cos")
def _cos(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Neg", ctx.op("Mul", g, ctx.op("Sin", x)))


@_unary("Atan")
def _atan(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return ctx.op("Div", g, ctx.op("Add", ctx.op("Mul", x, x), 1.0))


# --- softmax ----------------------------------------------------------------------


@_unary("Softmax")
def _softmax(ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    product = ctx.op("Mul", g, y)
    axis = attribute(node, "axis", -1) % max(1, ctx.rank(x))
    total = ctx.total(product, [axis], keepdims=True)
    return ctx.op("Sub", product, ctx.op("Mul", y, total))


@_unary("LogSoftmax")
def _log_softmax(
    ctx: GradContext, node: Node, x: Tensor, y: Tensor, g: Tensor
) -> Tensor:
    axis = attribute(node, "axis", -1) % max(1, ctx.rank(x))
    total = ctx.total(g, [axis], keepdims=True)
    return ctx.op("Sub", g, ctx.op("Mul", ctx.op("Exp", y), total))
