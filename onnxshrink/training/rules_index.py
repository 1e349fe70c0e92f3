"""Gradients of gathering and scattering.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, rule

Grads = list[Any]


@rule("Gather")
def _gather(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    data, indices = node.inputs
    g = grads[0]
    shape = ctx.shape(data)
    axis = attribute(node, "axis", 0) % len(shape)
    picked = ctx.shape(indices)
    rank, width = len(ctx.shape(g)), len(picked)
    known = ctx.value(indices)
    if known is not None and known.size == 1:
        at = int(known.reshape(())) % shape[axis]
        pads = [0] * (2 * len(shape))
        pads[axis], pads[len(shape) + axis] = at, shape[axis] - 1 - at
        one = ctx.reshape(g, [*shape[:axis], 1, *shape[axis + 1 :]])
        return [ctx.note_shape(ctx.op("Pad", one, ctx.ints(pads)), shape, g)]
    # Rows to the front, so that whole rows are added.
    front = [*range(axis, axis + width), *range(axis), *range(axis + width, rank)]
    rest = [*shape[:axis], *shape[axis + 1 :]]
    count = math.prod(picked)
    rows = ctx.reshape(ctx.transpose(g, front), [count, *rest])
    wide = [shape[axis], *rest]
    places = ctx.op("Reshape", indices, ctx.ints([count, 1]))
    if ctx.data_type(places) != 7:
        places = ctx.op("Cast", places, to=7)
    added = ctx.op("ScatterND", ctx.zeros(g, wide), places, rows, reduction="add")
    ctx.note_shape(added, wide, g)
    back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    return [ctx.transpose(added, back)]


@rule("GatherElements")
def _gather_elements(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    data, indices = node.inputs
    g = grads[0]
    added = ctx.op(
        "ScatterElements",
        ctx.zeros(g, ctx.shape(data)),
        indices,
        g,
        axis=attribute(node, "axis", 0),
        reduction="add",
    )
    return [ctx.note_shape(added, ctx.shape(data), g)]


@rule("GatherND")
def _gather_nd(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    data, indices = node.inputs
    g = grads[0]
    shape, picked = ctx.shape(data), ctx.shape(indices)
    batch = int(attribute(node, "batch_dims", 0))
    if batch:
        # The batch's own position becomes part of the index.
        lead = picked[:batch]
        grid = np.indices(lead, np.int64)
        grid = np.moveaxis(grid, 0, -1)
        grid = grid.reshape(*lead, *[1] * (len(picked) - 1 - batch), batch)
        full = np.broadcast_to(grid, (*picked[:-1], batch))
        indices = ctx.op("Concat", ctx.constant(full), indices, axis=-1)
    added = ctx.op("ScatterND", ctx.zeros(g, shape), indices, g, reduction="add")
    return [ctx.note_shape(added, shape, g)]


@rule("ScatterElements")
def _scatter_elements(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    _, indices, updates = node.inputs
    axis = attribute(node, "axis", 0)

    def gathered(tensor: Tensor) -> Tensor:
        return ctx.op("GatherElements", tensor, indices, axis=axis, like=updates)

    def scattered(tensor: Tensor, zeros: Tensor) -> Tensor:
        return ctx.op("ScatterElements", tensor, indices, zeros, axis=axis)

    return _scatter(ctx, node, grads[0], gathered, scattered)


@rule("ScatterND")
def _scatter_nd(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    _, indices, updates = node.inputs

    def gathered(tensor: Tensor) -> Tensor:
        return ctx.op("GatherND", tensor, indices, like=updates)

    def scattered(tensor: Tensor, zeros: Tensor) -> Tensor:
        return ctx.op("ScatterND", tensor, indices, zeros)

    return _scatter(ctx, node, grads[0], gathered, scattered)


def _scatter(
    ctx: GradContext,
    node: Node,
    g: Tensor,
    gathered: Callable[[Tensor], Tensor],
    scattered: Callable[[Tensor, Tensor], Tensor],
) -> Grads:
    """Return the gradients of data and updates.

    Args:
        ctx: The context to build with.
        node: The node.
        g: The gradient of its output.
        gathered: Reads the places that the node writes.
        scattered: Writes to them.
    """
    data, _, updates = node.inputs
    y = node.outputs[0]
    kind = attribute(node, "reduction", "none")
    if kind not in ("none", "add", "max", "min"):
        raise ctx.refused(node, f"its reduction is {kind}")
    found: Grads = [None, None, None]
    if ctx.wants(0):
        found[0] = g
        if kind == "none":
            found[0] = scattered(g, ctx.zeros(g, ctx.shape(updates)))
        elif kind != "add":
            found[0] = ctx.mask(ctx.op("Equal", data, y), g)
    if ctx.wants(2):
        found[2] = gathered(g)
        if kind in ("max", "min"):
            won = ctx.op("Equal", updates, gathered(y))
            found[2] = ctx.mask(won, found[2])
    return found
