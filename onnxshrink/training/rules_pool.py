"""Gradients of pooling.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, attribute, rule
from onnxshrink.training.rules_conv import Window, window
from onnxshrink.training.rules_elementwise import output
from onnxshrink.training.rules_reduce import spread_extremum

Grads = list[Any]


@rule("MaxPool")
def _max_pool(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    if attribute(node, "storage_order", 0):
        raise ctx.refused(node, "its storage_order is 1")
    shape = ctx.shape(x)
    over = window(node, attribute(node, "kernel_shape", None), shape[2:])
    indices = output(ctx, node, 1)
    ctx.note_shape(indices, ctx.shape(g), g)
    if len(shape) == 4 and all(
        k <= s and d == 1 and (o - 1) * s + k <= n
        for k, s, d, o, n in zip(
            over.kernel,
            over.strides,
            over.dilations,
            ctx.shape(g)[2:],
            shape[2:],
            strict=True,
        )
    ):
        unpooled = ctx.op(
            "MaxUnpool",
            g,
            indices,
            ctx.ints(shape),
            like=x,
            kernel_shape=list(over.kernel),
            strides=list(over.strides),
        )
        return [unpooled]
    flat = ctx.op(
        "ScatterElements",
        ctx.zeros(x, [math.prod(shape)]),
        ctx.op("Reshape", indices, ctx.ints([-1])),
        ctx.reshape(g, [math.prod(ctx.shape(g))]),
        axis=0,
        reduction="add",
    )
    return [ctx.reshape(ctx.note_shape(flat, [math.prod(shape)], x), shape)]


@rule("AveragePool")
def _average_pool(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    shape, out = ctx.shape(x), ctx.shape(g)[2:]
    over = window(node, attribute(node, "kernel_shape", None), shape[2:])
    counts = _counts(
        over, shape[2:], out, bool(attribute(node, "count_include_pad", 0))
    )
    tiles = (
        not any(over.pads)
        and over.kernel == over.strides
        and set(over.dilations) == {1}
        and tuple(o * k for o, k in zip(out, over.kernel, strict=True)) == shape[2:]
    )
    if len(np.unique(counts)) == 1:
        part = ctx.op("Mul", g, 1.0 / float(counts.flat[0]))
    else:
        part = ctx.op("Mul", g, (1.0 / counts).astype(ctx.dtype(g)))
    if tiles:
        split: list[int] = [*shape[:2]]
        full: list[int] = [*shape[:2]]
        for o, k in zip(out, over.kernel, strict=True):
            split += [o, 1]
            full += [o, k]
        return [ctx.reshape(ctx.expand(ctx.reshape(part, split), full), shape)]
    # With ceil_mode the last window may reach beyond the padding.
    sizes = [
        (o - 1) * s + span
        for o, s, span in zip(out, over.strides, over.spans, strict=True)
    ]
    ends = [
        max(0, size - b - n)
        for size, b, n in zip(sizes, over.begin, shape[2:], strict=True)
    ]
    extra = [
        n - (size - b - e)
        for n, size, b, e in zip(shape[2:], sizes, over.begin, ends, strict=True)
    ]
    ones = np.ones((shape[1], 1, *over.kernel), ctx.dtype(g))
    spread = ctx.op(
        "ConvTranspose",
        part,
        ctx.constant(ones),
        group=shape[1],
        strides=list(over.strides),
        dilations=list(over.dilations),
        pads=[*over.begin, *ends],
        kernel_shape=list(over.kernel),
    )
    if any(extra):
        # Elements behind the last window, which no window sees.
        lead = [0] * len(shape)
        spread = ctx.op("Pad", spread, ctx.ints([*lead, 0, 0, *extra]))
    return [ctx.note(spread, x)]


def _counts(
    over: Window, sizes: tuple[int, ...], out: tuple[int, ...], with_pads: bool
) -> np.ndarray[Any, Any]:
    """Return by how much each window's sum is divided."""
    factors = []
    for axis, (n, o) in enumerate(zip(sizes, out, strict=True)):
        low = -over.begin[axis] if with_pads else 0
        high = n + over.end[axis] if with_pads else n
        starts = np.arange(o) * over.strides[axis] - over.begin[axis]
        taps = starts[:, None] + np.arange(over.kernel[axis]) * over.dilations[axis]
        factors.append(((taps >= low) & (taps < high)).sum(axis=1))
    counts = np.ones((), np.float64)
    for factor in factors:
        counts = counts[..., None] * factor
    return np.maximum(counts, 1)


@rule("GlobalAveragePool")
def _global_average_pool(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    shape = ctx.shape(node.inputs[0])
    part = ctx.op("Mul", grads[0], 1.0 / math.prod(shape[2:]))
    return [ctx.expand(part, shape)]


@rule("GlobalMaxPool")
def _global_max_pool(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x = node.inputs[0]
    axes = list(range(2, ctx.rank(x)))
    return [spread_extremum(ctx, x, node.outputs[0], grads[0], axes)]
