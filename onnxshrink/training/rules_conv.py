"""Gradients of Conv and ConvTranspose, in the forms onnxruntime runs fast.

Tested in tests/training/test_gradients.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.model import Node
from onnxshrink.training.gradients import GradContext, Tensor, attribute, given, rule
from onnxshrink.training.rules_linear import matmul, swapped

_MOST_COLUMNS = 16 << 20
"""Elements of the buffer of what the windows see."""

Grads = list[Any]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """How a window slides over the spatial axes, everything explicit.

    Attributes:
        kernel: Size along each axis.
        strides: Step along each axis.
        dilations: Distance of its elements along each axis.
        begin: Padding before the first element.
        end: Padding after the last element.
    """

    kernel: Ints
    strides: Ints
    dilations: Ints
    begin: Ints
    end: Ints

    @property
    def pads(self) -> list[int]:
        """Padding as ONNX writes it."""
        return [*self.begin, *self.end]

    @property
    def spans(self) -> Ints:
        """Size of the window with its gaps."""
        return tuple(
            (k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)
        )


def window(node: Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """Return the window of a convolution or pooling node over an input.

    Args:
        node: The node.
        kernel: Its kernel's size.
        sizes: The input's spatial sizes.
    """
    count = len(kernel)
    strides = tuple(attribute(node, "strides", None) or [1] * count)
    dilations = tuple(attribute(node, "dilations", None) or [1] * count)
    mode = attribute(node, "auto_pad", "NOTSET")
    pads = list(attribute(node, "pads", None) or [0] * (2 * count))
    if mode == "VALID":
        pads = [0] * (2 * count)
    elif mode.startswith("SAME"):
        begin, end = [], []
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
            span = (k - 1) * d + 1
            total = max(0, (-(-size // s) - 1) * s + span - size)
            small, large = total // 2, total - total // 2
            begin.append(small if mode == "SAME_UPPER" else large)
            end.append(large if mode == "SAME_UPPER" else small)
        pads = [*begin, *end]
    return Window(
        tuple(int(k) for k in kernel),
        tuple(int(s) for s in strides),
        tuple(int(d) for d in dilations),
        tuple(int(p) for p in pads[:count]),
        tuple(int(p) for p in pads[count:]),
    )


@rule("Conv")
def _conv(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, w = node.inputs[:2]
    g = grads[0]
    group = int(attribute(node, "group", 1))
    shape = ctx.shape(x)
    over = window(node, ctx.shape(w)[2:], shape[2:])
    found: Grads = [None, None, None]
    if ctx.wants(0):
        found[0] = conv_input(ctx, g, w, over, group, x)
    if ctx.wants(1):
        found[1] = conv_weight(ctx, x, g, over, group, ctx.shape(w))
    if given(node, 2) is not None and ctx.wants(2):
        found[2] = channel_sum(ctx, g)
    return found


def channel_sum(ctx: GradContext, g: Tensor) -> Tensor:
    """Return the sum over all axes but the second."""
    return ctx.total(g, [axis for axis in range(ctx.rank(g)) if axis != 1])


def is_pointwise(over: Window) -> bool:
    """Whether each output element sees one input element, without padding."""
    return all(k == 1 for k in over.kernel) and not any(over.pads)


def conv_input(
    ctx: GradContext, g: Tensor, w: Tensor, over: Window, group: int, x: Tensor
) -> Tensor:
    """Return the gradient of a convolution's input, of the shape of ``x``."""
    shape, out, kernel = ctx.shape(x), ctx.shape(g), ctx.shape(w)
    if is_pointwise(over) and group == 1 and set(over.strides) == {1}:
        count = math.prod(out[2:])
        flat = ctx.reshape(g, (out[0], out[1], count))
        matrix = ctx.reshape(w, kernel[:2])
        product = ctx.op("MatMul", swapped(ctx, matrix), flat)
        return ctx.reshape(product, shape)
    extra = [
        size - ((o - 1) * s + span - b - e)
        for size, o, s, span, b, e in zip(
            shape[2:],
            out[2:],
            over.strides,
            over.spans,
            over.begin,
            over.end,
            strict=True,
        )
    ]
    attrs: dict[str, Any] = {}
    if any(extra):
        attrs["output_padding"] = extra
    return ctx.op(
        "ConvTranspose",
        g,
        w,
        like=x,
        group=group,
        strides=list(over.strides),
        dilations=list(over.dilations),
        pads=over.pads,
        kernel_shape=list(over.kernel),
        **attrs,
    )


def columns(ctx: GradContext, x: Tensor, over: Window, out: Sequence[int]) -> Tensor:
    """Return what each window sees: (batch, channels * taps, output positions)."""
    shape = ctx.shape(x)
    batch, channels = shape[:2]
    taps = math.prod(over.kernel)
    count = math.prod(out)
    if is_pointwise(over):
        if set(over.strides) != {1}:
            axes = range(2, len(shape))
            x = ctx.op(
                "Slice",
                x,
                ctx.ints([0] * len(out)),
                ctx.ints(shape[2:]),
                ctx.ints(axes),
                ctx.ints(over.strides),
            )
        return ctx.reshape(x, (batch, channels, count))
    return ctx.reshape(_seen(ctx, x, over), (batch, channels * taps, count))


def _seen(ctx: GradContext, x: Tensor, over: Window, is_turned: bool = False) -> Tensor:
    """Return a channel for each tap of each channel: what that tap sees.

    Args:
        ctx: The context to build with.
        x: Batch, channels and spatial axes.
        over: The window.
        is_turned: Taps are counted from the last one.
    """
    channels = ctx.shape(x)[1]
    taps = math.prod(over.kernel)
    # A grouped convolution with one-hot kernels copies faster than slices do.
    hot = np.zeros((channels, taps, taps), ctx.dtype(x))
    order = np.arange(taps)
    hot[:, order, order[::-1] if is_turned else order] = 1
    return ctx.op(
        "Conv",
        x,
        ctx.constant(hot.reshape(channels * taps, 1, *over.kernel)),
        group=channels,
        strides=list(over.strides),
        dilations=list(over.dilations),
        pads=over.pads,
        kernel_shape=list(over.kernel),
    )


def conv_weight(
    ctx: GradContext,
    x: Tensor,
    g: Tensor,
    over: Window,
    group: int,
    shape: Sequence[int],
) -> Tensor:
    """Return the gradient of a convolution's kernel, of a given shape."""
    batch, outputs, *out = ctx.shape(g)
    inputs = ctx.shape(x)[1]
    count = math.prod(out)
    taps = math.prod(over.kernel)
    each = inputs // group
    if ctx.is_blocked and each == 1 and outputs == group and not is_pointwise(over):
        return _depthwise_weight(ctx, x, g, over, shape)
    wide = inputs * taps
    split = None
    if outputs > group:
        split = _divided(over, outputs, inputs, ctx.shape(x)[-1], out[-1])
    if split is not None:
        wide = inputs * math.prod(over.kernel[:-1]) + outputs * over.kernel[-1]
    # In pieces of the batch, so that the columns stay small; onnxruntime is as fast.
    parts = 1
    if not is_pointwise(over):
        parts = _divisor(batch, -(-batch * wide * count // _MOST_COLUMNS))
    size = batch // parts
    xs, gs = [x], [g]
    if parts > 1:
        sizes = ctx.ints([size] * parts)
        xs = ctx.ops("Split", x, sizes, axis=0, outputs=parts)
        gs = ctx.ops("Split", g, sizes, axis=0, outputs=parts)
    sums = []
    for piece, pull in zip(xs, gs, strict=True):
        if split is not None:
            sums.append(_both_sides(ctx, piece, pull, *split, group))
            continue
        seen = columns(ctx, piece, over, out)
        sums.append(_columns_product(ctx, seen, pull, group))
    total = sums[0] if len(sums) == 1 else ctx.op("Sum", *sums)
    if split is None:
        return ctx.reshape(total, shape)
    rest = math.prod(over.kernel[:-1])
    parted = ctx.reshape(total, (group, outputs // group, over.kernel[-1], each, rest))
    return ctx.reshape(ctx.transpose(parted, [0, 1, 3, 4, 2]), shape)


def _columns_product(ctx: GradContext, seen: Tensor, g: Tensor, group: int) -> Tensor:
    """Return the products of all outputs with all columns, summed over the batch."""
    size, outputs, *out = ctx.shape(g)
    count = math.prod(out)
    wide = ctx.shape(seen)[1]
    if group > 1:
        left = ctx.reshape(g, (size, group, outputs // group, count))
        right = ctx.reshape(seen, (size, group, wide // group, count))
        if outputs == group:
            left, right = right, ctx.reshape(left, (size, group, count, 1))
            product = ctx.op("MatMul", left, right)
        else:
            product = matmul(ctx, left, right, trans_b=True)
        return ctx.total(product, [0])
    flat = ctx.reshape(g, (size, outputs, count))
    if size > 1 and outputs * wide > 2 * count * (outputs + wide):
        # One product, where a product for each sample would be larger than what
        # it is made of.
        left = ctx.transpose(flat, [1, 0, 2])
        right = ctx.transpose(seen, [1, 0, 2])
        return ctx.op(
            "Gemm",
            ctx.reshape(left, (outputs, size * count)),
            ctx.reshape(right, (wide, size * count)),
            transB=1,
        )
    if wide > outputs:
        # onnxruntime rearranges the right side: let it be the small one.
        product = ctx.total(matmul(ctx, seen, flat, trans_b=True), [0])
        return ctx.transpose(product, [1, 0])
    return ctx.total(matmul(ctx, flat, seen, trans_b=True), [0])


def _divided(
    over: Window, outputs: int, inputs: int, width: int, out: int
) -> tuple[Window, Window] | None:
    """Return windows over input and gradient that together make all products.

    The kernel's gradient at a tap is a product of two arrays, the input and the
    output's gradient, one of them moved. The input is moved along all axes but the
    last, the gradient along the last. That makes kh + kw copies in place of kh * kw;
    the number of multiplications stays the same.

    Returns:
        ``None`` where that is not so, or is not less to copy.
    """
    *rest, last = over.kernel
    reach = over.spans[-1] - 1
    begin, end = reach - over.begin[-1], reach - over.end[-1]
    taps = math.prod(rest)
    if over.strides[-1] != 1 or begin < 0 or end < 0 or width > 2 * out:
        return None
    if last == 1 or inputs * taps + outputs * last >= inputs * taps * last:
        return None
    ones = (1,) * len(rest)
    zeros = (0,) * len(rest)
    return (
        Window(
            (*rest, 1),
            over.strides,
            (*over.dilations[:-1], 1),
            (*over.begin[:-1], 0),
            (*over.end[:-1], 0),
        ),
        Window(
            (*ones, last),
            (*ones, 1),
            (*ones, over.dilations[-1]),
            (*zeros, begin),
            (*zeros, end),
        ),
    )


def _both_sides(
    ctx: GradContext, x: Tensor, g: Tensor, rest: Window, last: Window, group: int
) -> Tensor:
    """Return the products that ``_divided`` is about, summed over the batch.

    Returns:
        (group, outputs of a group * last axis, inputs of a group * other axes)
    """
    is_moved = not is_pointwise(rest) or set(rest.strides) != {1}
    seen = _seen(ctx, x, rest) if is_moved else x
    pull = _seen(ctx, g, last, is_turned=True)
    size, wide, *positions = ctx.shape(seen)
    high = ctx.shape(pull)[1]
    count = math.prod(positions)
    product = matmul(
        ctx,
        ctx.reshape(pull, (size, group, high // group, count)),
        ctx.reshape(seen, (size, group, wide // group, count)),
        trans_b=True,
    )
    return ctx.total(product, [0])


def _depthwise_weight(
    ctx: GradContext, x: Tensor, g: Tensor, over: Window, shape: Sequence[int]
) -> Tensor:
    """Return the kernel's gradient where each channel has a kernel of its own.

    The textbook form, each channel of each sample convolved with its gradient: 3 to 9
    times faster than the columns in the blocked layout, and slower without.
    """
    batch, channels, *out = ctx.shape(g)
    many = batch * channels
    found = ctx.op(
        "Conv",
        ctx.reshape(x, (1, many, *ctx.shape(x)[2:])),
        ctx.reshape(g, (many, 1, *out)),
        group=many,
        kernel_shape=out,
        strides=list(over.dilations),
        dilations=list(over.strides),
        pads=over.pads,
    )
    # Rows that a stride leaves over make more products than there are taps.
    if ctx.shape(found)[2:] != tuple(over.kernel):
        zeros = ctx.ints([0] * len(out))
        axes = ctx.ints(range(2, 2 + len(out)))
        found = ctx.op("Slice", found, zeros, ctx.ints(over.kernel), axes)
    split = ctx.reshape(found, (batch, channels, math.prod(over.kernel)))
    return ctx.reshape(ctx.total(split, [0]), shape)


def _divisor(number: int, least: int) -> int:
    """Return the smallest divisor of a number that is at least ``least``, or itself."""
    return next((d for d in range(max(1, least), number) if number % d == 0), number)


@rule("ConvTranspose")
def _conv_transpose(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    x, w = node.inputs[:2]
    g = grads[0]
    group = int(attribute(node, "group", 1))
    sizes, out = ctx.shape(x)[2:], ctx.shape(g)[2:]
    over = _transposed_window(node, ctx.shape(w)[2:], sizes, out)
    found: Grads = [None, None, None]
    if ctx.wants(0) or ctx.wants(1):
        # Rows that output_padding adds beyond the reach of the kernel's last step.
        reach = [
            (size - 1) * s + span - b - e
            for size, s, span, b, e in zip(
                sizes, over.strides, over.spans, over.begin, over.end, strict=True
            )
        ]
        ends = [
            min(o, r) if o - r >= s else o
            for o, r, s in zip(out, reach, over.strides, strict=True)
        ]
        cut = g
        if list(ends) != list(out):
            axes = range(2, 2 + len(out))
            zeros = ctx.ints([0] * len(out))
            cut = ctx.op("Slice", g, zeros, ctx.ints(ends), ctx.ints(axes))
        if ctx.wants(0):
            found[0] = ctx.op(
                "Conv",
                cut,
                w,
                like=x,
                group=group,
                strides=list(over.strides),
                dilations=list(over.dilations),
                pads=over.pads,
                kernel_shape=list(over.kernel),
            )
        if ctx.wants(1):
            found[1] = conv_weight(ctx, cut, x, over, group, ctx.shape(w))
    if given(node, 2) is not None and ctx.wants(2):
        found[2] = channel_sum(ctx, g)
    return found


def _transposed_window(
    node: Node, kernel: Sequence[int], sizes: Sequence[int], out: Sequence[int]
) -> Window:
    """Return the window of the convolution that a ConvTranspose is the adjoint of."""
    plain = window(node, kernel, sizes)
    mode = attribute(node, "auto_pad", "NOTSET")
    stated = attribute(node, "output_shape", None)
    if mode == "VALID" or (mode == "NOTSET" and not stated):
        return plain
    added = attribute(node, "output_padding", None) or [0] * len(kernel)
    begin, end = [], []
    for size, o, s, span, more in zip(
        sizes, out, plain.strides, plain.spans, added, strict=True
    ):
        total = max(0, s * (size - 1) + more + span - o)
        small, large = total // 2, total - total // 2
        begin.append(small if mode == "SAME_UPPER" else large)
        end.append(large if mode == "SAME_UPPER" else small)
    return Window(
        plain.kernel, plain.strides, plain.dilations, tuple(begin), tuple(end)
    )
