"""Losses as ONNX nodes; their gradients come from the rules, like any other node's.

Every function appends nodes through a ``GradContext`` and returns a scalar, the mean
over samples (and over positions, where there are several).
"""

from __future__ import annotations

import math

import numpy as np

from onnxshrink.errors import UsageError
from onnxshrink.training.gradients import GradContext, Tensor

__all__ = ["cosine", "cross_entropy", "mse", "soft_cross_entropy", "weighted"]


def cross_entropy(
    ctx: GradContext, logits: Tensor, labels: Tensor, axis: int = -1
) -> Tensor:
    """Return the mean cross-entropy between class scores and integer labels.

    Args:
        ctx: The context to build with.
        logits: Scores before softmax.
        labels: int64, of the shape of ``logits`` without the class axis. A negative
            label takes no part.
        axis: The class axis.

    Raises:
        UsageError: The labels do not have that shape.
    """
    shape = ctx.shape(logits)
    axis %= len(shape)
    if ctx.shape(labels) != (*shape[:axis], *shape[axis + 1 :]):
        raise UsageError(
            f"scores of shape {list(shape)} do not go with labels of shape "
            f"{list(ctx.shape(labels))}"
        )
    logs = ctx.op("LogSoftmax", logits, axis=axis)
    zero = ctx.constant(np.zeros((), np.int64))
    counted = ctx.op("GreaterOrEqual", labels, zero)
    safe = ctx.op("Unsqueeze", ctx.op("Max", labels, zero), ctx.ints([axis]))
    picked = ctx.op("GatherElements", logs, safe, axis=axis)
    kind = ctx.data_type(logits)
    weight = ctx.op("Cast", counted, to=kind)
    flat = ctx.reshape(picked, ctx.shape(labels))
    total = ctx.op("ReduceSum", ctx.op("Mul", flat, weight), keepdims=0)
    number = ctx.op("Max", ctx.op("ReduceSum", weight, keepdims=0), ctx.scalar(1, logs))
    return ctx.op("Neg", ctx.op("Div", total, number))


def soft_cross_entropy(
    ctx: GradContext,
    logits: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    axis: int = -1,
) -> Tensor:
    """Return the divergence from a teacher's softened distribution, times T squared.

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015,
    section 2: both sides are divided by the temperature T before softmax; the factor
    T^2 keeps the size of the gradients when T changes. It is the Kullback-Leibler
    divergence, zero where the two agree.

    Args:
        ctx: The context to build with.
        logits: Scores of the model before softmax.
        teacher: Scores of the teacher, of the same shape.
        temperature: T, above 0.
        axis: The class axis.

    Raises:
        UsageError: The temperature is not positive, or the shapes differ.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"a temperature is above 0, not {temperature}")
    _same_shape(ctx, logits, teacher)
    rate = 1.0 / temperature
    axis %= ctx.rank(logits)

    def softened(scores: Tensor) -> Tensor:
        cool = scores if temperature == 1.0 else ctx.op("Mul", scores, rate)
        return ctx.op("LogSoftmax", cool, axis=axis)

    mine, theirs = softened(logits), softened(teacher)
    parts = ctx.op("Mul", ctx.op("Exp", theirs), ctx.op("Sub", theirs, mine))
    total = ctx.op("ReduceSum", parts, keepdims=0)
    count = math.prod(n for i, n in enumerate(ctx.shape(logits)) if i != axis)
    return ctx.op("Mul", total, temperature**2 / count)


def mse(ctx: GradContext, output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over all elements.

    Raises:
        UsageError: The shapes differ.
    """
    _same_shape(ctx, output, target)
    off = ctx.op("Sub", output, target)
    return ctx.op("ReduceMean", ctx.op("Mul", off, off), keepdims=0)


def cosine(ctx: GradContext, output: Tensor, target: Tensor, axis: int = -1) -> Tensor:
    """Return one minus the mean cosine of the angle between vectors along an axis.

    Raises:
        UsageError: The shapes differ.
    """
    _same_shape(ctx, output, target)
    axes = ctx.ints([axis % ctx.rank(output)])

    def squared(tensor: Tensor) -> Tensor:
        total = ctx.op("ReduceSum", ctx.op("Mul", tensor, tensor), axes, keepdims=0)
        return ctx.op("Add", total, 1e-12)  # for vectors of zeros

    along = ctx.op("ReduceSum", ctx.op("Mul", output, target), axes, keepdims=0)
    length = ctx.op("Sqrt", ctx.op("Mul", squared(output), squared(target)))
    mean = ctx.op("ReduceMean", ctx.op("Div", along, length), keepdims=0)
    return ctx.op("Neg", ctx.op("Sub", mean, 1.0))


def weighted(ctx: GradContext, *parts: tuple[float, Tensor]) -> Tensor:
    """Return the weighted sum of losses, given as (weight, loss)."""
    terms = [
        loss if weight == 1.0 else ctx.op("Mul", loss, weight)
        for weight, loss in parts
        if weight != 0.0
    ]
    if not terms:
        raise UsageError("a loss needs at least one part whose weight is not 0")
    return terms[0] if len(terms) == 1 else ctx.op("Sum", *terms)


def _same_shape(ctx: GradContext, one: Tensor, two: Tensor) -> None:
    if ctx.shape(one) != ctx.shape(two):
        raise UsageError(
            f"{one.name!r} of shape {list(ctx.shape(one))} cannot be compared with "
            f"{two.name!r} of shape {list(ctx.shape(two))}"
        )
