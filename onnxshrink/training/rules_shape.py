"""Gradients of operators that move values about, and of Resize.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule

Grads = list[Any]
Array = np.ndarray[Any, Any]


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    return [ctx.reshape(grads[0], ctx.shape(node.inputs[0]))]


@rule("Transpose")
def _transpose(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    rank = ctx.rank(node.inputs[0])
    perm = attribute(node, "perm", None) or list(reversed(range(rank)))
    return [ctx.transpose(grads[0], [int(i) for i in np.argsort(perm)])]


@rule("Concat")
def _concat(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    axis = attribute(node, "axis", 0) % ctx.rank(grads[0])
    sizes = [ctx.shape(x)[axis] for x in node.inputs]
    if len(sizes) == 1:
        return [grads[0]]
    return ctx.ops("Split", grads[0], ctx.ints(sizes), axis=axis, outputs=len(sizes))


@rule("Split")
def _split(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    axis = attribute(node, "axis", 0) % ctx.rank(node.inputs[0])
    like = next(g for g in grads if g is not None)
    parts = [
        ctx.zeros(like, ctx.shape(y)) if g is None else g
        for g, y in zip(grads, node.outputs, strict=True)
    ]
    return [ctx.op("Concat", *parts, axis=axis)]


@rule("Slice")
def _slice(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    shape = ctx.shape(x)
    starts = ctx.integers(node.inputs[1], node) or []
    ends = ctx.integers(node.inputs[2], node) or []
    axes = ctx.integers(given(node, 3), node)
    steps = ctx.integers(given(node, 4), node) or [1] * len(starts)
    axes = list(range(len(starts))) if axes is None else [a % len(shape) for a in axes]
    before, after = [0] * len(shape), [0] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        taken = range(shape[axis])[slice(start, end, step)]
        if len(taken) == 0:
            return [ctx.zeros(g, shape)]
        if step < 0:
            g = _reversed(ctx, g, axis)
            taken = taken[::-1]
        if abs(step) > 1 and len(taken) > 1:
            g = _stuffed(ctx, g, axis, abs(step))
        before[axis] = taken[0]
        after[axis] = shape[axis] - 1 - taken[-1]
    if any(before) or any(after):
        g = ctx.note_shape(ctx.op("Pad", g, ctx.ints([*before, *after])), shape, g)
    return [g]


def _reversed(ctx: GradContext, g: Tensor, axis: int) -> Tensor:
    size = ctx.shape(g)[axis]
    made = ctx.op(
        "Slice",
        g,
        ctx.ints([-1]),
        ctx.ints([-size - 1]),
        ctx.ints([axis]),
        ctx.ints([-1]),
    )
    return ctx.note(made, g)


def _stuffed(ctx: GradContext, g: Tensor, axis: int, step: int) -> Tensor:
    """Return the tensor with ``step - 1`` zeros between its elements along an axis."""
    shape = list(ctx.shape(g))
    wide = ctx.reshape(g, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
    pads = [0] * (2 * (len(shape) + 1))
    pads[len(shape) + 1 + axis + 1] = step - 1
    wide = ctx.op("Pad", wide, ctx.ints(pads))
    full = [*shape]
    full[axis] *= step
    long = ctx.reshape(wide, full)
    size = full[axis] - (step - 1)
    return ctx.op("Slice", long, ctx.ints([0]), ctx.ints([size]), ctx.ints([axis]))


@rule("Pad")
def _pad(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    shape = ctx.shape(x)
    rank = len(shape)
    pads = ctx.integers(node.inputs[1], node) or []
    axes = ctx.integers(given(node, 3), node)
    axes = list(range(rank)) if axes is None else [a % rank for a in axes]
    begin, end = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        begin[axis], end[axis] = pads[index], pads[len(axes) + index]
    mode = attribute(node, "mode", "constant")
    if mode != "constant":
        for axis in range(rank):
            if begin[axis] or end[axis]:
                size = shape[axis]
                if min(begin[axis], end[axis]) < 0:
                    raise ctx.refused(node, f"{mode} padding that is negative")
                source = np.pad(np.arange(size), (begin[axis], end[axis]), mode)
                matrix = np.eye(size)[source]
                g = along(ctx, g, axis, matrix)
        return [g]
    found: Grads = [None]
    if ctx.wants(0):
        inner = ctx.op("Pad", g, ctx.ints([-n for n in [*begin, *end]]))
        found[0] = ctx.note(inner, x)
    if given(node, 2) is not None and ctx.wants(2):
        raise ctx.refused(node, "its padding value is trained")
    return found


def along(ctx: GradContext, g: Tensor, axis: int, matrix: Array) -> Tensor:
    """Return the gradient of ``matrix @ x`` along one axis: ``matrix.T @ g``.

    Args:
        ctx: The context.
        g: The gradient of the product.
        axis: The axis.
        matrix: Of shape (size of g along the axis, size of x along it).
    """
    shape = ctx.shape(g)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    size = matrix.shape[1]
    dtype = ctx.dtype(g)
    if after == 1:
        flat = ctx.reshape(g, [before, shape[axis]])
        made = ctx.op("MatMul", flat, ctx.constant(matrix.astype(dtype)))
    else:
        flat = ctx.reshape(g, [before, shape[axis], after])
        across = np.ascontiguousarray(matrix.T).astype(dtype)
        made = ctx.ops("MatMul", ctx.constant(across), flat)[0]
    return ctx.reshape(made, [*shape[:axis], size, *shape[axis + 1 :]])


@rule("Expand")
def _expand(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    return [ctx.reduce_to(grads[0], node.inputs[0])]


@rule("Tile")
def _tile(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    shape = ctx.shape(node.inputs[0])
    repeats = [
        o // n if n else 0 for o, n in zip(ctx.shape(grads[0]), shape, strict=True)
    ]
    split = [n for pair in zip(repeats, shape, strict=True) for n in pair]
    axes = [2 * axis for axis, times in enumerate(repeats) if times > 1]
    total = ctx.total(ctx.reshape(grads[0], split), axes)
    return [ctx.reshape(total, shape)]


@rule("DepthToSpace")
def _depth_to_space(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    block = int(attribute(node, "blocksize", 1))
    if attribute(node, "mode", "DCR") == "DCR":
        return [ctx.op("SpaceToDepth", g, like=x, blocksize=block)]
    n, c, h, w = ctx.shape(x)
    parts = ctx.reshape(g, [n, c // block**2, h, block, w, block])
    return [ctx.reshape(ctx.transpose(parts, [0, 1, 3, 5, 2, 4]), [n, c, h, w])]


@rule("SpaceToDepth")
def _space_to_depth(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    block = int(attribute(node, "blocksize", 1))
    made = ctx.op(
        "DepthToSpace", grads[0], like=node.inputs[0], blocksize=block, mode="DCR"
    )
    return [made]


@rule("Trilu")
def _trilu(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    k = given(node, 1)
    return [ctx.op("Trilu", grads[0], k, upper=attribute(node, "upper", 1))]


# --- Resize -----------------------------------------------------------------------


@rule("Resize")
def _resize(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, g = node.inputs[0], grads[0]
    shape, out = ctx.shape(x), ctx.shape(g)
    rank = len(shape)
    policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        raise ctx.refused(node, f"its keep_aspect_ratio_policy is {policy}")
    axes = [int(a) % rank for a in attribute(node, "axes", None) or range(rank)]
    scales = ctx.value(given(node, 2))
    roi = ctx.value(given(node, 1))
    if (given(node, 2) is not None and scales is None) or (
        given(node, 1) is not None and roi is None
    ):
        raise ctx.refused(node, "its scales or roi depend on data")
    if scales is not None and not scales.size:
        scales = None
    for place, axis in enumerate(axes):
        corners = None
        if roi is not None and roi.size:
            corners = (float(roi[place]), float(roi[len(axes) + place]))
        scale = None if scales is None else float(scales[place])
        cropped = attribute(node, "coordinate_transformation_mode", "") == (
            "tf_crop_and_resize"
        )
        if shape[axis] == out[axis] and scale in (None, 1.0) and not cropped:
            continue
        g = _unresized(ctx, node, g, axis, shape[axis], scale, corners)
    return [g]


def _unresized(
    ctx: GradContext,
    node: Node,
    g: Tensor,
    axis: int,
    size: int,
    scale: float | None,
    corners: tuple[float, float] | None,
) -> Tensor:
    shape = ctx.shape(g)
    matrix = _resize_matrix(ctx, node, size, shape[axis], scale, corners)
    times = shape[axis] // size
    repeated = np.repeat(np.eye(size), times, axis=0)
    if repeated.shape == matrix.shape and np.array_equal(matrix, repeated):
        split = [*shape[:axis], size, times, *shape[axis + 1 :]]
        return ctx.total(ctx.reshape(g, split), [axis + 1])
    return along(ctx, g, axis, matrix)


def _resize_matrix(
    ctx: GradContext,
    node: Node,
    size: int,
    out: int,
    scale: float | None,
    corners: tuple[float, float] | None,
) -> Array:
    """Return what the node does along one axis, as a matrix.

    Every mode is linear in each axis by itself, so that onnxruntime's own answer to
    unit vectors is the matrix, whatever the mode and the coordinates.
    """
    from onnxshrink import runtime

    def known(name: str, array: Array) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(array, name)

    given_roi = corners is not None
    values = [known("roi", np.zeros(0, np.float32))]
    if corners is not None:
        low, high = corners
        values = [known("roi", np.array([0, 0, 0, low, 1, 1, 1, high], np.float32))]
    reads = ["x", "roi" if given_roi else ""]
    if scale is not None:
        values.append(known("scales", np.array([1, 1, 1, scale], np.float32)))
        reads += ["scales"]
    else:
        values.append(known("sizes", np.array([1, size + 1, 1, out], np.int64)))
        reads += ["", "sizes"]
    attrs = {
        key: value
        for key, value in node.attrs.items()
        if key not in ("axes", "keep_aspect_ratio_policy")
    }
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Resize", reads, ["y"], **attrs)],
        "resize",
        [onnx.helper.make_tensor_value_info("x", 1, [1, size + 1, 1, size])],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [v for v in values if v.name in reads],
    )
    proto = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", ctx.model.opset)],
        ir_version=8,
    )
    # The row of zeros shows what extrapolation_value adds.
    probes = np.concatenate([np.eye(size), np.zeros((1, size))]).astype(np.float32)
    answer = runtime.run_proto(proto, {"x": probes[None, :, None, :]})[0]
    rows = np.asarray(answer, np.float64)[0, :, 0, :]
    found: Array = np.ascontiguousarray((rows[:-1] - rows[-1]).T)
    return found
