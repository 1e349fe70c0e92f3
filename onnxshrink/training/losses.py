"""Losses as ONNX nodes; their gradients come from the rules, like any other node's.

Every function appends nodes through a ``GradContext`` and returns a scalar, the mean
over samples (and over positions, where there are several).
"""

from __future__ import annotations

import math

import numpy as np

from onnxshrink.errors import UsageError
from onnxshrink.training.gradients import GradContext, Tensor

__all__ = [
    "attention",
    "cosine",
    "cross_entropy",
    "mse",
    "soft_cross_entropy",
    "top_cross_entropy",
    "weighted",
]


def cross_entropy(
    ctx: GradContext, logits: Tensor, labels: Tensor, axis: int = -1
) -> Tensor:
    """Return the mean cross-entropy between class scores and labels.

    Args:
        ctx: The context to build with.
        logits: Scores before softmax.
        labels: int64, of the shape of ``logits`` without the class axis. A negative
            label takes no part. Or the share of each class, of the type and shape of
            ``logits``.
        axis: The class axis.

    Raises:
        UsageError: The labels do not have such a shape.
    """
    shape = ctx.shape(logits)
    axis %= len(shape)
    if ctx.dtype(labels).kind == "f":
        _same_shape(ctx, logits, labels)
        logs = ctx.op("LogSoftmax", logits, axis=axis)
        total = ctx.op("ReduceSum", ctx.op("Mul", logs, labels), keepdims=0)
        return ctx.op("Mul", total, -1.0 / (math.prod(shape) // shape[axis]))
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


def top_cross_entropy(
    ctx: GradContext,
    logits: Tensor,
    top: Tensor,
    indices: Tensor,
    rest: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return the divergence from a teacher of whom only the largest scores are known.

    All other classes count as one more class, for both sides: its probability is what
    is left. The result is that of ``soft_cross_entropy`` for these k + 1 classes.

    Args:
        ctx: The context to build with.
        logits: Scores of the model before softmax, [..., classes].
        top: The teacher's largest scores, [..., k].
        indices: Of which classes they are, int64 [..., k].
        rest: The score of all other classes together, the logarithm of the sum of
            their exponentials, [...].
        temperature: T, above 0.

    Raises:
        UsageError: The shapes do not go together.
    """
    shape, many = ctx.shape(logits), ctx.shape(top)
    known = ctx.shape(indices) == many and (*ctx.shape(rest), many[-1]) == many
    if not known or shape[:-1] != many[:-1] or many[-1] >= shape[-1]:
        raise UsageError(
            f"scores of shape {list(shape)} do not go with the largest ones of a "
            f"teacher, of shapes {list(many)}, {list(ctx.shape(indices))} and "
            f"{list(ctx.shape(rest))}"
        )
    last = len(shape) - 1
    axes = ctx.ints([last])
    # The scores that are known are left out of this sum. To subtract their mass from
    # the whole instead would leave nothing but rounding.
    hole = ctx.constant(np.full(many, -1e30, np.float32))
    others = ctx.op("ScatterElements", logits, indices, hole, axis=last)
    left = ctx.op("ReduceLogSumExp", others, axes, keepdims=1)
    mine = ctx.op(
        "Concat",
        ctx.op("GatherElements", logits, indices, axis=last),
        left,
        axis=last,
    )
    theirs = ctx.op("Concat", top, ctx.op("Unsqueeze", rest, axes), axis=last)
    return soft_cross_entropy(ctx, mine, theirs, temperature)


def attention(ctx: GradContext, output: Tensor, target: Tensor, axis: int) -> Tensor:
    """Return the mean squared distance between two tensors' maps of attention.

    Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1:
    the map of a sample is the sum of squares over its channels, scaled to length one as
    a vector over positions. The two sides may have different numbers of channels.

    Args:
        ctx: The context to build with.
        output: The model's tensor; its first axis is samples.
        target: The teacher's.
        axis: The axis of channels.

    Raises:
        UsageError: Something else than the number of channels differs, or there are no
            positions.
    """

    def positions(tensor: Tensor) -> list[int]:
        shape = list(ctx.shape(tensor))
        del shape[axis]
        return shape

    if positions(output) != positions(target) or len(positions(output)) < 2:
        raise UsageError(
            f"maps of attention of {output.name!r} of shape {list(ctx.shape(output))} "
            f"and {target.name!r} of shape {list(ctx.shape(target))} cannot be compared"
        )

    def scaled(tensor: Tensor) -> Tensor:
        energy = ctx.op("ReduceSumSquare", tensor, ctx.ints([axis]), keepdims=0)
        count, *others = positions(tensor)
        flat = ctx.reshape(energy, [count, math.prod(others)])
        size = ctx.op("ReduceSumSquare", flat, ctx.ints([1]), keepdims=1)
        # A map of zeros has no direction; it stays one.
        return ctx.op("Div", flat, ctx.op("Sqrt", ctx.op("Add", size, 1e-24)))

    off = ctx.op("Sub", scaled(output), scaled(target))
    total = ctx.op("ReduceSumSquare", off, keepdims=0)
    return ctx.op("Mul", total, 1.0 / positions(output)[0])


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
