"""separable: dense convolutions become a kernel per channel and a matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Cost, Promise, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight
from onnxshrink.solvers.separable import (
    ORDERS,
    Order,
    most_branches,
    separate,
)
from onnxshrink.solvers.separable import (
    Separable as Kernels,
)
from onnxshrink.structure import layers
from onnxshrink.structure.bias import addend
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight, Use
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.terminal import count_text, size_text

__all__ = ["Separable"]

Array = NDArray[Any]

_THIN = 8
"""Input channels below which a layer is a stem: a kernel a channel sees too little."""
_WORTH = 0.9
"""Share of the time from which a replacement does not pay."""
_LARGEST = 4096
"""Inputs times taps up to which a layer's inputs are looked at."""
_EPSILON = 1e-5
"""Added to variances by the BatchNormalization that the pass writes."""


@dataclass(frozen=True, kw_only=True)
class DenseConvolution(Site):
    """A convolution to replace.

    Attributes:
        branches: Separable convolutions that are added.
        orders: The orders that pay, of which the better fit is taken.
    """

    branches: int = 1
    orders: tuple[Order, ...] = field(default=ORDERS, repr=False)


@dataclass(frozen=True, kw_only=True)
class Separable(SitePass):
    """Replace dense convolutions by a kernel for each channel and a 1x1 convolution.

    A depthwise-separable convolution (Howard et al. 2017, MobileNets) takes about a
    k*k-th of the arithmetic of a dense k x k one. It begins with the best separable
    form of the dense kernel (Network Decoupling, Guo et al. 2018); where data is given,
    with the one that changes the layer's outputs least, and the bias takes up the mean
    of what is missing. Either the 1x1 convolution or the kernels may come first; the
    one that fits better is taken.

    One branch alone ruins most networks: let ``recover`` and ``distill`` follow, which
    are judged together with it. Layers that cannot be replaced within the budget stay
    dense, the most damaging first. More branches fit better and cost more; as many as
    the kernel has entries are exact.

    Stems, 1x1, grouped and depthwise convolutions stay, and so does every layer that
    would gain nothing.

    Attributes:
        branches: Separable convolutions whose sum takes the place of each dense one.
        order: Which part comes first: ``pointwise`` (1x1, then kernels), ``depthwise``
            (kernels, then 1x1), or ``auto``, the better fit.
        norm: ``add`` puts a BatchNormalization that changes nothing behind each
            replaced layer that has none, for ``distill:norms=estimate``; needs data.
        only: Replace only these: names of weights or nodes, glob patterns or op types.
        skip: Leave these alone: names of weights or nodes, glob patterns or op types.
    """

    name: ClassVar[str] = "separable"
    promise: ClassVar[Promise] = Promise.SIGNATURE
    folds: ClassVar[Literal["", "weights", "fused"]] = "fused"
    example: ClassVar[str] = "separable recover distill:epochs=10"

    branches: int = 1
    order: Literal["auto", "pointwise", "depthwise"] = "auto"
    norm: Literal["keep", "add"] = "keep"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 1 <= self.branches <= 1024:
            raise UsageError(f"branches is from 1 to 1024, not {self.branches}")

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the convolutions that a separable form pays for."""
        if self.norm == "add" and not ctx.has_data:
            ctx.need_data("to write down means and variances of outputs (norm=add)")
        shapes = _shapes(model, ctx)
        found: list[Site] = []
        for layer in layers.find(model, only=self.only, skip=self.skip):
            if layer.uses and all(use.node.op != "Conv" for use in layer.uses):
                continue
            why = _why_not(layer)
            if why:
                ctx.skipped(layer.name, why)
                continue
            site = self._site(layer, shapes, ctx)
            if isinstance(site, str):
                ctx.skipped(layer.name, site)
            else:
                found.append(site)
        if not found:
            ctx.skipped(self.name, "there is no dense convolution to replace")
        return found

    def _site(
        self, layer: LinearWeight, shapes: Mapping[str, Sequence[int]], ctx: Context
    ) -> Site | str:
        """Return a site, or why a separable form would gain nothing."""
        orders = ORDERS if self.order == "auto" else (self.order,)
        options: list[tuple[float, Order, Cost, Cost]] = []
        told = ""
        for order in orders:
            before, after = self._costs(layer, order, shapes, ctx)
            shares = [_share(after.bytes, before.bytes)]
            if before.macs:
                shares.append(_share(after.macs, before.macs))
            if before.seconds and after.seconds is not None:
                shares.append(after.seconds / before.seconds)
            told = told or _change(before, after)
            if max(shares) < _WORTH:
                options.append((max(shares), order, before, after))
        if not options:
            return f"it stays dense: a separable form would gain too little ({told})"
        # What costs more than half as much again as the other order is not tried.
        best = min(worst for worst, *_ in options)
        options = [one for one in options if one[0] <= 1.5 * best]
        _, _, before, after = max(options, key=lambda one: one[0])
        return DenseConvolution(
            layer.name,
            layer.kind,
            before - after,
            cost=before,
            branches=self.branches,
            orders=tuple(order for _, order, *_ in options),
        )

    def _costs(
        self,
        layer: LinearWeight,
        order: Order,
        shapes: Mapping[str, Sequence[int]],
        ctx: Context,
    ) -> tuple[Cost, Cost]:
        """Return what the dense and the separable form cost, of all uses."""
        outputs, inputs, taps, kernel = _geometry(layer.weight)
        count = min(self.branches, most_branches((outputs, inputs, taps), order))
        itemsize = layer.weight.dtype.itemsize
        dense = Cost(layer.weight.nbytes, 0, 0.0)
        middle = inputs if order == "depthwise" else outputs
        entries = count * (middle * taps + inputs * outputs)
        made = Cost(entries * itemsize, 0, 0.0)
        ones = (1,) * len(kernel)
        for use in layer.uses:
            node = use.node
            after = _size(shapes, node.outputs[0])
            before = _size(shapes, node.inputs[0])
            if after is None or before is None:
                return replace(dense, seconds=None), replace(made, seconds=None)
            where = after if order == "depthwise" else before
            conv = ctx.costs.conv
            old = conv(inputs, outputs, kernel, after, itemsize=itemsize)
            matrix = conv(inputs, outputs, ones, where, itemsize=itemsize)
            kernels = conv(
                middle, middle, kernel, after, groups=middle, itemsize=itemsize
            )
            new = matrix + kernels
            dense += replace(old, bytes=0)
            for _ in range(count):
                made += replace(new, bytes=0)
        return dense, made

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Replace one convolution."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Replace convolutions, each fitted to what it reads in the model as it is."""
        chosen = {s.where: s for s in sites if isinstance(s, DenseConvolution)}
        found = [
            layer
            for layer in layers.find(model, only=self.only, skip=self.skip)
            if layer.name in chosen
        ]
        small = [layer for layer in found if _patch(layer) <= _LARGEST]
        seen = ctx.inputs(small) if ctx.has_data and small else {}
        mark = fingerprint(model)
        fits = []
        for number, layer in enumerate(found):
            site = chosen[layer.name]
            # Attempts of a step differ in what they replace, not in how.
            key = ("separable", mark, layer.name, site.branches, site.orders)
            make = functools.partial(_fit, layer, site, seen)
            fits.append(ctx.remember(key, make))
            ctx.progress(number + 1, len(found), f"{self.name}: fitting")
        for layer, fit in zip(found, fits, strict=True):
            self._replace(model, layer, fit, ctx)
        if found:
            model.drop_unused()

    def _replace(
        self, model: Model, layer: LinearWeight, fit: _Fit, ctx: Context
    ) -> None:
        """Put the separable form where the nodes of a layer stand."""
        weight, kernels = layer.weight, fit.kernels
        outputs, inputs, _, extent = _geometry(weight)
        dtype, home = weight.dtype, weight.graph
        parts = []
        for branch in range(kernels.branches):
            label = weight.name + (f"/{branch}" if kernels.branches > 1 else "")
            matrix = kernels.pointwise[branch].astype(dtype)
            kernel = kernels.depthwise[branch].astype(dtype)
            ones = (1,) * len(extent)
            point = model.add_weight(
                f"{label}/pointwise", matrix.reshape(outputs, inputs, *ones), home
            )
            depth = model.add_weight(
                f"{label}/depthwise", kernel.reshape(len(kernel), 1, *extent), home
            )
            parts.append((point, depth))
        model.lineage.split(weight.name, [made.name for pair in parts for made in pair])
        for use in layer.uses:
            _replace_node(model, use, parts, fit, self.norm == "add")
        what = "outputs" if fit.has_data else "weights"
        many = f", {kernels.branches} branches" if kernels.branches > 1 else ""
        ctx.did(
            weight.name,
            f"{'x'.join(map(str, extent))}, {inputs} -> {outputs}: {kernels.order} "
            f"first{many}; {kernels.error:.1%} of the energy of its {what} is missing",
        )


@dataclass(frozen=True)
class _Fit:
    """The separable form of a layer, and what biases and norms are made of.

    Attributes:
        kernels: The factors.
        has_data: Whether its inputs were looked at.
        shift: What the bias takes up, float64 [outputs].
        mean: Mean of each output of the dense layer, its bias not counted.
        variance: Variance of each output of the separable form.
    """

    kernels: Kernels
    has_data: bool
    shift: Array
    mean: Array
    variance: Array


def _fit(
    layer: LinearWeight,
    site: DenseConvolution,
    seen: Mapping[str, InputStatistics],
) -> _Fit:
    """Fit a layer, in the better of the orders that pay."""
    outputs, inputs, taps, _ = _geometry(layer.weight)
    dense = layer.weight.read().astype(np.float64).reshape(outputs, inputs, taps)
    moments, centre = None, np.zeros(inputs * taps)
    found = seen.get(layer.name)
    # Otherwise it overflows on this data, or sees nothing of it.
    if found is not None and found.gram is not None and found.count and found.is_finite:
        moments = found.gram[0] / found.count
        if all(_bias_is_free(layer, use) for use in layer.uses):
            centre = found.mean[0]
            moments = moments - np.outer(centre, centre)
    tried = [separate(dense, site.branches, order, moments) for order in site.orders]
    kernels = min(tried, key=lambda one: one.error)
    made = kernels.kernel().reshape(outputs, -1)
    flat = dense.reshape(outputs, -1)
    spread = np.ones(outputs)
    if moments is not None:
        spread = np.maximum(np.einsum("ox,ox->o", made @ moments, made), 0.0)
    return _Fit(
        kernels, moments is not None, (flat - made) @ centre, flat @ centre, spread
    )


def _replace_node(
    model: Model,
    use: Use,
    parts: Sequence[tuple[gs.Tensor, gs.Tensor]],
    fit: _Fit,
    has_norm: bool,
) -> None:
    """Put the separable form of one Conv in its place; its output keeps its name."""
    node = use.node
    graph = model._graph_of(node)
    source, final = node.inputs[0], node.outputs[0]
    bias = addend(node)
    label = node.name or final.name or node.op
    window = {
        key: value
        for key, value in node.attrs.items()
        if key in {"auto_pad", "dilations", "kernel_shape", "pads", "strides"}
    }
    channels = parts[0][1].shape[0]
    dtype = parts[0][0].dtype
    if fit.shift.any():
        known = None if bias is None else use.bias(model)
        values = fit.shift if known is None else known.read() + fit.shift
        # A bias that others read, or that was none, becomes one of the node's own.
        bias = model.add_weight(f"{label}/bias", values.astype(dtype), graph)
    add_norm = has_norm and fit.has_data and not _is_normalised(final)
    ends: list[gs.Tensor] = []
    before = node
    for number, (point, depth) in enumerate(parts):
        steps = [
            (point, {"kernel_shape": [1] * (len(point.shape) - 2)}),
            (depth, {**window, "group": channels}),
        ]
        if fit.kernels.order == "depthwise":
            steps.reverse()
        value = source
        for place, (weight, attrs) in enumerate(steps):
            last = place == 1 and number == 0 and bias is not None
            made = model.add_node(
                "Conv",
                [value, weight, *([bias] if last else [])],
                attrs=attrs,
                name=f"{label}/{'pointwise' if weight is point else 'depthwise'}",
                graph=graph,
                before=before,
            )
            value = made.outputs[0]
            model.lineage.add(value.name)
        ends.append(value)
    while len(ends) > 1:
        joined = model.add_node(
            "Add", ends[:2], name=f"{label}/sum", graph=graph, before=before
        )
        model.lineage.add(joined.outputs[0].name)
        ends = [joined.outputs[0], *ends[2:]]
    value = ends[0]
    if add_norm:
        # What the norm leaves as it is stands for what the layer gave.
        model.lineage.replace(final.name, value.name)
        value = _normalised(model, node, value, fit, bias, graph, dtype)
    maker = value.inputs[0]
    model.remove(node, graph)
    maker.outputs[0] = final


def _normalised(
    model: Model,
    node: Node,
    value: gs.Tensor,
    fit: _Fit,
    bias: gs.Tensor | None,
    graph: gs.Graph,
    dtype: np.dtype[Any],
) -> gs.Tensor:
    """Put a BatchNormalization behind a value that leaves it as it is."""
    label = node.name or node.outputs[0].name or node.op
    known = None if bias is None else model.constant(bias)
    mean = fit.mean - fit.shift + (0 if known is None else known.read())
    floor = np.maximum(fit.variance, _EPSILON)
    rows = {
        "scale": np.sqrt(floor + _EPSILON),
        "shift": mean,
        "mean": mean,
        "variance": floor,
    }
    weights = [
        model.add_weight(f"{label}/norm/{name}", row.astype(dtype), graph)
        for name, row in rows.items()
    ]
    made = model.add_node(
        "BatchNormalization",
        [value, *weights],
        attrs={"epsilon": _EPSILON},
        name=f"{label}/norm",
        graph=graph,
        before=node,
    )
    model.lineage.add(made.outputs[0].name)
    return made.outputs[0]


def _is_normalised(value: gs.Tensor) -> bool:
    readers = list(value.outputs)
    return len(readers) == 1 and readers[0].op == "BatchNormalization"


def _bias_is_free(layer: LinearWeight, use: Use) -> bool:
    """Whether the node itself adds no bias, or one that is known."""
    bias = use.bias(layer.weight.model)
    return bias is None or bias.node is not use.node or not bias.why_unknown


# --- what a layer is ------------------------------------------------------------------


def _geometry(weight: Weight) -> tuple[int, int, int, tuple[int, ...]]:
    """Return outputs, inputs, taps and the kernel's extent of a Conv of one group."""
    outputs, inputs, *extent = weight.shape
    return outputs, inputs, math.prod(extent), tuple(extent)


def _patch(layer: LinearWeight) -> int:
    """Return how many inputs an output of a layer sums up."""
    return layer.layout.matrices_shape[2]


def _why_not(layer: LinearWeight) -> str:
    """Say why a layer cannot be replaced, or nothing."""
    if layer.why_not:
        return layer.why_not
    for use in layer.uses:
        if use.node.op != "Conv" or use.role != "weight":
            return f"{use.node.name or use.node.op} ({use.node.op}) reads it too"
    groups = layer.layout.matrices_shape[0]
    _, inputs, taps, _ = _geometry(layer.weight)
    if groups > 1:
        return f"its convolution has {groups} groups already"
    if taps == 1:
        return "its kernel has one entry: it is pointwise already"
    if inputs < _THIN:
        return f"it reads {inputs} channels; a layer of fewer than {_THIN} stays dense"
    if not np.isfinite(layer.weight.read()).all():
        return "it holds NaN or infinity"
    return ""


def _shapes(model: Model, ctx: Context) -> Mapping[str, Sequence[int]]:
    """Return the shapes of values for one sample, as far as they are known."""
    samples = ctx.samples.calibration or ctx.samples.evaluation
    if samples is None or not samples.used:
        return {}
    feed = samples.read(np.arange(1))
    return value_shapes(model, {name: array.shape for name, array in feed.items()})


def _size(
    shapes: Mapping[str, Sequence[int]], value: gs.Tensor
) -> tuple[int, ...] | None:
    """Return the extent of a value of shape [samples, channels, extent...]."""
    shape = shapes.get(value.name)
    return None if shape is None else tuple(shape[2:])


def _change(before: Cost, after: Cost) -> str:
    """Say what a layer costs before and after."""
    words = [f"{size_text(before.bytes)} -> {size_text(after.bytes)}"]
    if before.macs:
        words.append(f"{count_text(before.macs)} -> {count_text(after.macs)} MACs")
    if before.seconds and after.seconds is not None:
        words.append(f"{before.seconds * 1e6:.3g} -> {after.seconds * 1e6:.3g} us")
    return ", ".join(words)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
