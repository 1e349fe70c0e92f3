"""recover: least squares on activations, layer by layer, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.activations import regression
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.activations.regression import (
    ConvRows,
    EachChannel,
    EachOutput,
    MatrixRows,
    OutputRows,
    Request,
    Rows,
    StackRows,
    StagedSums,
    TransposedConvRows,
)
from onnxshrink.base import Context, Promise, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.lineage import Origin
from onnxshrink.model import Model, Node, Weight
from onnxshrink.model.topology import is_onnx
from onnxshrink.rewriting.repairs import (
    BiasRepair,
    Changes,
    Matrices,
    NormRepair,
    ProductRepair,
    Repair,
    Scale,
    ScaleRepair,
    TransposedConv,
    WeightRepair,
)
from onnxshrink.solvers.least_squares import RegressionSums, solve
from onnxshrink.solvers.threads import one_thread
from onnxshrink.statistics import ConvGram, ConvWindow
from onnxshrink.structure import layers, products
from onnxshrink.structure.bias import (
    Bias,
    add_behind,
    addend,
    addend_factor,
    takes_bias,
)
from onnxshrink.structure.codes import Decoder
from onnxshrink.structure.layers import LinearWeight, Use
from onnxshrink.structure.products import Product
from onnxshrink.structure.selection import selected
from onnxshrink.training.norms import why_fixed

__all__ = ["Recover", "RecoverSite"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Target = tuple[str, Origin]
"""A value of the model, and what it was in the reference."""
Sums = tuple[RegressionSums, RegressionSums]
"""Over the samples to fit, and over those that judge."""

MAX_INPUTS = 8192
"""Layers with more inputs get their bias corrected only: 512 MB of Gram matrix."""
CONV_SAMPLES = 512
"""Samples for a Conv alone, which has many rows in each: more gained nothing."""
_POSITIONS = 64
"""Output positions of a sample that are used of a ConvTranspose."""
TABLE = 256
"""A weight with no more distinct values than this keeps them: it is stored by index."""
FEW_SAMPLES = 512
"""Samples for two numbers for each output: a factor and a bias."""
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, kw_only=True)
class RecoverSite(Site):
    """A layer to bring back to what it gave.

    Attributes:
        changes: What of it may change.
        towards: Value of the reference that its outputs should be.
    """

    changes: Changes
    towards: str


@dataclass(frozen=True, kw_only=True)
class Recover(SitePass):
    """Bring altered layers back to what they gave in the reference, without labels.

    The reference is the model the run started from. A layer is a Conv, ConvTranspose,
    Gemm or MatMul; it is altered if its weight is no longer the reference's. Weights
    and bias of an altered layer become those that give its outputs in the reference
    best: the least squares of ``Y_reference - X W - b`` over samples. ``X`` is what the
    layer reads in the model as it is now (layer-wise reconstruction: He, Zhang and Sun
    2017, "Channel Pruning", section 3.1). Of a layer that lost outputs, those that are
    left are compared. Factors that a layer was split into are fitted together, by
    alternating least squares. Zeros stay zero. Samples are those for calibration and
    training. Labels are not looked at. Memory does not grow with the samples.

    Codes of quantized weights stay as they are, and so do weights of so few values that
    they are stored by index. There the bias takes up the mean error (Nagel et al. 2019,
    "Data-Free Quantization through Weight Equalization and Bias Correction", section
    4.2), and scales become what gives the outputs best, by least squares of the wanted
    on the given outputs. A layer is changed only if its error on held-out samples
    falls.

    Attributes:
        ridge: Keeps weights near what they are: this share of the inputs' mean square
            is added to each.
        samples: Samples to use at most; a fifth of them judges.
        order: With ``sequential`` each layer reads what the recovered layers before it
            give, and makes up for the error they leave; all layers together take about
            two runs of the model. With ``parallel`` each layer reads what it read in
            the reference; all layers are done in one run.
        bias: Adjust biases, and give a Conv or Gemm without one a bias.
        norms: Estimate mean and variance of each BatchNormalization behind an altered
            layer again, from what it reads now. That helps where weights are left
            alone; behind weights that were fitted there is nothing left to gain.
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "recover"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "recover:samples=4096"
    repairs: ClassVar[bool] = True

    ridge: float = 0.1
    samples: int = 2048
    order: Literal["sequential", "parallel"] = "sequential"
    bias: bool = True
    norms: bool = False

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        if not (self.ridge >= 0 and math.isfinite(self.ridge)):
            raise UsageError(f"ridge is a number from 0 on, not {self.ridge}")
        if self.samples < 1:
            raise UsageError(f"samples is at least 1, not {self.samples}")

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the altered layers, in the order they are computed in.

        Raises:
            UsageError: There are some, but no real data.
        """
        found = self._repairs(model, ctx)
        if found:
            ctx.need_data(
                f"to compare what {found[0].where} and others give with the reference"
            )
        return [
            RecoverSite(
                repair.where,
                repair.node.op,
                changes=repair.changes,
                towards=str(repair.request.wanted),
            )
            for repair in found
        ]

    def _repairs(self, model: Model, ctx: Context) -> list[Repair]:
        count = sum(map(len, regression.pool(ctx, self.samples)))
        found = _Finder(model, ctx.reference, self, count).find(ctx)
        if not found and not ctx.skips:
            what = "only and skip choose" if self.only or self.skip else "there is"
            ctx.skipped(self.name, f"{what} no weight of a Conv, Gemm or MatMul")
        return found

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Recover one layer."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Recover several layers, first to last."""
        chosen = {site.where for site in sites}
        quiet = replace(ctx, skips=[])
        repairs = [r for r in self._repairs(model, quiet) if r.where in chosen]
        if self.order == "parallel":
            self._recover(
                model, repairs, lambda new: self._together(model, new, ctx), ctx
            )
            return
        staged = StagedSums(
            model,
            {
                r.where: (r.request, r.settled, min(self.samples, r.samples))
                for r in repairs
            },
            ctx,
        )
        for index, repair in enumerate(repairs):
            self._recover(
                model, [repair], lambda new: [staged.of(r.where) for r in new], ctx
            )
            ctx.progress(index + 1, len(repairs), self.name)

    def _together(
        self, model: Model, repairs: Sequence[Repair], ctx: Context
    ) -> list[Sums]:
        """Return the sums of several layers, from one run."""
        count = min(self.samples, max(repair.samples for repair in repairs))
        parts = [
            [span.samples.take(slice(span.start, span.stop)) for span in spans]
            for spans in regression.divided(regression.pool(ctx, count))
        ]
        requests = {repair.where: repair.request for repair in repairs}
        fit, held = regression.gather(model, ctx.reference, requests, parts, ctx)
        return [(fit[repair.where], held[repair.where]) for repair in repairs]

    def _recover(
        self,
        model: Model,
        repairs: Sequence[Repair],
        sums_of: Callable[[Sequence[Repair]], list[Sums]],
        ctx: Context,
    ) -> None:
        """Work out what is best, unless an attempt before did, and write it."""
        mark = ("recover", fingerprint(model), self.ridge, self.samples, self.bias)
        known = {r.where: ctx.memory.get((*mark, r.where)) for r in repairs}
        new = [repair for repair in repairs if known[repair.where] is None]
        if new:
            problems = [
                repair.problem(model, self.ridge, *sums)
                for repair, sums in zip(new, sums_of(new), strict=True)
            ]
            with one_thread:
                solutions = ctx.map(solve, problems, self.name)
            for repair, solution in zip(new, solutions, strict=True):
                known[repair.where] = solution
                ctx.memory.put((*mark, repair.where), solution)
        for repair in repairs:
            solution = known[repair.where]
            assert solution is not None
            repair.write(model, solution, ctx)


# --- which layers ---------------------------------------------------------------------


@dataclass(eq=False)
class _Finder:
    """Finds what is altered, and what its outputs were in the reference."""

    model: Model
    reference: Model
    options: Recover
    samples: int
    theirs: frozenset[str] = frozenset()
    weights: dict[str, Weight] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)

    def find(self, ctx: Context) -> list[Repair]:
        """Return the places to recover in the order of the graph."""
        self.theirs = frozenset(
            tensor.name
            for node in self.reference.graph.nodes
            for tensor in node.outputs
            if tensor.name
        )
        self.weights = {weight.name: weight for weight in self.reference.weights()}
        self.at = {id(node): i for i, node in enumerate(self.model.graph.nodes)}
        every = list(layers.find(self.model, codes=True))
        found: list[Repair] = []
        taken: set[str] = set()
        for repair in self._products(every, ctx):
            taken |= {layer.name for layer in repair.product.layers}
            found.append(repair)
        for layer in every:
            if layer.name in taken or not self._is_chosen(layer.names):
                continue
            made = self._layer(layer)
            if isinstance(made, str):
                ctx.skipped(layer.name, made)
            else:
                found.append(made)
        if self.options.norms:
            found += self._norms(every, ctx)
        found.sort(key=self._place)
        if self.options.order == "parallel":
            return [self._as_there(repair) for repair in found]
        return found

    def _place(self, repair: Repair) -> int:
        """Return where in the graph the inputs of a repair are read first."""
        nodes = [repair.node]
        if isinstance(repair, ProductRepair):
            nodes = [layer.node for layer in repair.product.layers]
        return min(self.at[id(node)] for node in nodes)

    def _is_chosen(self, names: Sequence[str]) -> bool:
        return selected(names, self.options.only, self.options.skip)

    def _as_there(self, repair: Repair) -> Repair:
        """Let a layer read what it reads in the reference, where that is known.

        What it will read once all layers are recovered is nearer to that than to what
        it reads now.
        """
        node = repair.node
        if isinstance(repair, ProductRepair):
            node = repair.product.layers[0].node
            readers = {id(place.layer.node) for place in repair.product.factors[0]}
            if len(readers) > 1:
                return repair
        for index in (0, 1):
            tensor = node.inputs[index]
            origin = self._activation(tensor)
            if origin is not None:
                request = replace(
                    repair.request,
                    inputs=tensor.name,
                    source=origin,
                    at=(self.at[id(node)], index),
                )
                return replace(repair, request=request)
        return repair

    def _activation(self, tensor: gs.Tensor) -> Origin | None:
        """Return what a value was, if both models compute it from their inputs."""
        maker = tensor.inputs
        if not maker or maker[0].op == "DequantizeLinear":
            return None
        origin = self.model.lineage.origin(tensor.name)
        if origin is None or origin.name not in self.theirs:
            return None
        return None if self.model.constant(tensor) is not None else origin

    def _layer(self, layer: LinearWeight) -> Repair | str:
        if layer.codes is not None:
            return self._of_codes(layer, layer.codes)
        why = layer.why_not
        if not why and layer.kind not in _LINEAR:
            why = f"least squares is not for the weights of {layer.kind}"
        if not why and layer.is_shared:
            why = f"it is shared by {len(layer.uses)} nodes"
        if not why and id(layer.node) not in self.at:
            why = "it is inside a subgraph or function, where nothing can be watched"
        if not why and self._is_same(layer.weight):
            why = "it is as it was in the reference"
        if why:
            return why
        use, node = layer.uses[0], layer.node
        groups, outputs, inputs = layer.layout.matrices_shape
        if not use.alpha:
            return "its node multiplies it by zero"
        if node.op == "ConvTranspose" or (node.op == "MatMul" and groups > 1):
            return self._unlike(layer, use)
        enough = self._enough(node.op, inputs)
        seen = layer.statistics_for("gram", enough)
        if seen is None:
            return "its inputs cannot be watched"
        tensor, statistic = seen[0]
        if self.model.constant(tensor) is not None:
            return "it multiplies a constant"
        target = self._target(layer)
        if isinstance(target, str):
            return target
        free = layers.free_bias(layer) if self.options.bias else None
        adds = node if self._may_add(use) else None
        why = _why_frozen(layer.weight, inputs)
        settled = [tensor.name for tensor in node.inputs]
        if why:
            if free is None and adds is None:
                return f"{why}, and it has no bias that is free to change"
            axis = 1 if node.op == "Conv" else -1
            return BiasRepair(
                where=layer.name,
                node=node,
                request=Request("", *target, OutputRows(axis)),
                settled=settled,
                bias=free,
                adds_bias=adds,
                why=why,
            )
        rows: Rows
        if isinstance(statistic, ConvGram):
            rows = ConvRows(statistic.window, statistic.positions)
        else:
            vector = len(layer.layout.shape) == 1
            rows = MatrixRows(
                int(getattr(statistic, "axis", -1)),
                None if vector else use.output_channels,
            )
        nbytes = 16 * groups * inputs * (inputs + outputs)
        return WeightRepair(
            where=layer.name,
            node=node,
            request=Request(tensor.name, *target, rows, nbytes),
            settled=settled,
            layout=layer.layout,
            bias=free,
            adds_bias=adds,
            factor=use.alpha,
            samples=enough,
        )

    def _enough(self, op: str, inputs: int) -> int:
        """Return how many samples a layer needs."""
        if op == "Conv" and self.options.order == "sequential":
            return min(self.samples, max(CONV_SAMPLES, 2 * inputs))
        return self.samples

    def _may_add(self, use: Use) -> bool:
        """Whether a node may be given a bias: one that adds it as it is."""
        node = use.node
        plain = use.alpha == addend_factor(node) == 1.0
        fits = plain and use.index == 1 and takes_bias(node)
        return self.options.bias and fits

    def _unlike(self, layer: LinearWeight, use: Use) -> Repair | str:
        """Describe a ConvTranspose, or a product with a stack of matrices."""
        node, shape = use.node, layer.weight.shape
        target = self._target(layer)
        if isinstance(target, str):
            return target
        rows: Rows
        layout: Matrices = layer.layout
        bias, adds = None, None
        if node.op == "MatMul":
            if use.index != 1:
                return "it is a stack of matrices that multiplies from the left"
            rows = StackRows(shape[:-2])
        else:
            window = ConvWindow.of(node.attrs, shape)
            if window.auto_pad != "NOTSET" or node.attrs.get("output_shape"):
                return "its padding follows from the size of its output"
            extra = node.attrs.get("output_padding") or (0,) * len(window.kernel)
            rows = TransposedConvRows.of(window, [int(n) for n in extra], _POSITIONS)
            layout = TransposedConv(shape, window.group)
            if self.options.bias:
                bias = self._own_bias(layer)
                adds = node if self._may_add(use) else None
        groups, outputs, inputs = layout.matrices(np.empty(shape, np.bool_)).shape
        why = _why_frozen(layer.weight, inputs)
        if why:
            return why
        nbytes = 16 * groups * inputs * (inputs + outputs)
        return WeightRepair(
            where=layer.name,
            node=node,
            request=Request(node.inputs[0].name, *target, rows, nbytes),
            settled=[tensor.name for tensor in node.inputs],
            layout=layout,
            bias=bias,
            adds_bias=adds,
        )

    @staticmethod
    def _own_bias(layer: LinearWeight) -> Bias | None:
        """Return the bias that a ConvTranspose itself adds, if it is free to change."""
        bias = layer.bias
        if bias is None or bias.why_not or bias.scale is not None:
            return None
        return bias if bias.node is layer.node else None

    # --- layers that were split ---------------------------------------------------

    def _products(
        self, every: Sequence[LinearWeight], ctx: Context
    ) -> Iterator[ProductRepair]:
        """Yield the products of several factors that stand for one layer."""
        lineage = self.model.lineage
        by_node = {
            id(layer.node): layer
            for layer in every
            if not layer.why_not and not layer.is_shared and id(layer.node) in self.at
        }
        taken: set[int] = set()
        for node in reversed(list(self.model.graph.nodes)):
            if node.op not in ("Add", *_LINEAR) or id(node) in taken:
                continue
            output = node.outputs[0]
            target = self._known([output])
            if target is None:
                continue
            found = products.find(self.model, output, by_node, lineage.is_new)
            if isinstance(found, str):
                if found:
                    ctx.skipped(output.name, f"not fitted jointly: {found}")
                continue
            taken |= {id(layer.node) for layer in found.layers}
            bias, adds = self._bias_of(found.last)
            made = self._product(found, [target], [(slice(None), bias, adds)], ctx)
            if made is not None:
                yield made
        for layer in by_node.values():
            if id(layer.node) not in taken and lineage.is_new(layer.output.name):
                fan = self._fan(layer, by_node, taken, ctx)
                if fan is not None:
                    taken |= {id(part.node) for part in fan.product.layers}
                    yield fan

    def _fan(
        self,
        first: LinearWeight,
        by_node: Mapping[int, LinearWeight],
        taken: set[int],
        ctx: Context,
    ) -> ProductRepair | None:
        """Return the product of a factor and all that read what it gives."""
        value = first.output
        readers = list(dict.fromkeys(value.outputs))
        last = [by_node.get(id(node)) for node in readers]
        if len(readers) < 2 or any(value is t for t in self.model.graph.outputs):
            return None
        targets: list[Target] = []
        ends: list[tuple[slice, Bias | None, Node | None]] = []
        sharing: list[LinearWeight] = []
        row = 0
        for layer in last:
            if layer is None or id(layer.node) in taken or layer.input is not value:
                return None
            target = self._known(_outputs(self.model, layer.node))
            if target is None:
                return None
            count = layer.uses[0].channels
            targets.append(target)
            ends.append((slice(row, row + count), *self._bias_of([layer])))
            sharing.append(layer)
            row += count
        found = products.fan(first, sharing)
        if isinstance(found, str):
            if found:
                ctx.skipped(value.name, f"not fitted jointly: {found}")
            return None
        return self._product(found, targets, ends, ctx)

    def _product(
        self,
        product: Product,
        targets: Sequence[Target],
        ends: Sequence[tuple[slice, Bias | None, Node | None]],
        ctx: Context,
    ) -> ProductRepair | None:
        found = product.layers
        names = ", ".join(layer.name for layer in found)
        if product.inputs > MAX_INPUTS:
            why = f"{product.inputs} inputs, more than {MAX_INPUTS}"
            ctx.skipped(names, f"not fitted jointly: together they have {why}")
            return None
        if len({layer.weight.dtype for layer in found}) > 1:
            ctx.skipped(names, "not fitted jointly: their types are different")
            return None
        chosen = [layer for layer in found if self._is_chosen(layer.names)]
        if not chosen or all(self._is_same(layer.weight) for layer in found):
            return None
        fixed = {}
        for layer in found:
            why = _why_frozen(layer.weight, 0)
            if layer not in chosen:
                why = "only and skip leave it out"
            if why:
                fixed[layer.name] = why
        if len(fixed) == len(found):
            return None
        rows: Rows = MatrixRows()
        enough = self._enough(product.last[0].kind, product.inputs)
        if product.window is not None:
            needed = -(-layers.ROWS * product.inputs // max(enough, 1))
            rows = ConvRows(product.window, max(layers.POSITIONS, needed))
        outputs = product.shape(-1)[-2]
        nbytes = 16 * product.inputs * (product.inputs + outputs)
        request = Request(
            product.input.name,
            *targets[0],
            rows,
            nbytes,
            more=tuple(targets[1:]),
            axis=-1 if product.window is None else 1,
        )
        return ProductRepair(
            where=found[0].name,
            node=product.last[-1].node,
            request=request,
            settled=[product.input.name],
            samples=enough,
            product=product,
            fixed=fixed,
            ends=tuple(ends),
        )

    def _bias_of(self, last: Sequence[LinearWeight]) -> tuple[Bias | None, Node | None]:
        """Return a bias of one of several operators, or one that takes a bias."""
        if not self.options.bias:
            return None, None
        for layer in last:
            bias = layers.free_bias(layer)
            if bias is not None:
                return bias, None
        for layer in last:
            if self._may_add(layer.uses[0]):
                return None, layer.node
        return None, None

    # --- codes --------------------------------------------------------------------

    def _of_codes(self, layer: LinearWeight, decoder: Decoder) -> Repair | str:
        use = next((use for use in layer.uses if self._multiplies(use)), None)
        if use is None:
            return "no operator of the main graph multiplies it"
        if self._is_same(layer.weight):
            return "it is as it was in the reference"
        node = use.node
        target = self._target(layer, use)
        if isinstance(target, str):
            return target
        bias = self._bias_of_codes(layer, use)
        scale = self._scale(layer, use, decoder, target[0], bias is not None)
        why = "it is quantized"
        if bias is None and scale is None:
            return f"{why}, and it has no bias or scale that is free to change"
        axis = 1 if node.op in ("Conv", "ConvTranspose") else -1
        settled = [tensor.name for tensor in node.inputs]
        if scale is None:
            return BiasRepair(
                where=layer.name,
                node=node,
                request=Request("", *target, OutputRows(axis)),
                settled=settled,
                bias=bias,
                why=why,
                samples=FEW_SAMPLES,
            )
        return ScaleRepair(
            where=layer.name,
            node=node,
            request=Request("", *target, EachOutput(axis)),
            settled=settled,
            bias=bias,
            why=why,
            scale=scale,
            samples=FEW_SAMPLES,
        )

    def _multiplies(self, use: Use) -> bool:
        """Whether a linear operator of the main graph reads a weight as its second."""
        known = use.kind in _LINEAR and id(use.node) in self.at
        return known and use.role == "weight" and use.index == 1

    def _bias_of_codes(self, layer: LinearWeight, use: Use) -> Bias | None:
        """Return the bias that is free to change, as floats or as codes of its own."""
        if not self.options.bias:
            return None
        bias = replace(layer, uses=(use,)).bias
        if bias is None or bias.why_not or use.alpha != 1.0 or bias.factor != 1.0:
            return None
        if bias.weight is None or len(bias.weight.shape) != 1:
            return None
        if bias.scale is not None and len(bias.scale.uses) != 1:
            return None
        return bias

    def _scale(
        self,
        layer: LinearWeight,
        use: Use,
        decoder: Decoder,
        output: str,
        is_bias_free: bool,
    ) -> Scale | None:
        """Return the scale of a weight's codes, if it is one for each output."""
        node = use.node
        scale = self.model.constant(decoder.scale)
        if scale is None or scale.dtype != np.float32:
            return None
        if scale.is_input or scale.is_output:
            return None
        if not all(any(n is d for d in decoder.nodes) for n, _ in scale.uses):
            return None
        readers = _readers([end for end, _ in decoder.ends])
        if any(reader is not node for reader in readers):
            return None  # an embedding, say, would change with it
        has_bias = addend(node) is not None or output != node.outputs[0].name
        if has_bias and not is_bias_free:
            return None
        if scale.size == 1:
            return Scale(scale, (), has_bias)
        if use.groups > 1 and node.op == "ConvTranspose":
            return None
        axis = use.output_axis or 0
        if axis == len(use.layout.shape) - 1:
            axis = len(decoder.shape) - 1  # codes in blocks have another axis
        outputs = decoder.shape[axis]
        if decoder.axis is not None and not decoder.block:
            fits = decoder.axis == axis and scale.size == outputs
            return Scale(scale, (outputs,), has_bias) if fits else None
        at = axis - len(decoder.shape)  # the scale may have fewer axes in front
        if -at > len(scale.shape) or scale.shape[at] != outputs:
            return None
        wide = tuple(outputs if i == at else 1 for i in range(-len(scale.shape), 0))
        return Scale(scale, wide, has_bias)

    # --- normalisations -----------------------------------------------------------

    def _norms(
        self, every: Sequence[LinearWeight], ctx: Context
    ) -> Iterator[NormRepair]:
        """Yield the normalisations that something altered leads to."""
        altered = {
            id(use.node)
            for layer in every
            if not self._is_same(layer.weight)
            for use in layer.uses
        }
        moved: set[int] = set()
        for node in self.model.graph.nodes:
            if id(node) not in altered and not any(id(t) in moved for t in node.inputs):
                continue
            moved |= {id(tensor) for tensor in node.outputs}
            if node.op != "BatchNormalization" or not is_onnx(node.domain):
                continue
            if len(node.inputs) < 5:
                continue
            mean = self.model.constant(node.inputs[3])
            label = mean.name if mean is not None else node.name or node.op
            if not self._is_chosen([label, node.name, node.op]):
                continue
            why = why_fixed(self.model, node)
            target = self._known([node.outputs[0]])
            if why or target is None:
                ctx.skipped(label, why or _no_counterpart(node.outputs[0].name))
                continue
            yield NormRepair(
                where=label,
                node=node,
                request=Request(node.inputs[0].name, *target, EachChannel()),
                settled=[tensor.name for tensor in node.inputs],
            )

    # --- the reference ------------------------------------------------------------

    def _is_same(self, weight: Weight) -> bool:
        """Whether a weight is as it was in the reference, with the same values."""
        origin = self.model.lineage.origin(weight.name)
        if origin is None or not origin.is_whole:
            return False
        other = self.weights.get(origin.name)
        if other is None:
            return False
        if other.tensor is weight.tensor:
            return True
        if (other.shape, other.data_type) != (weight.shape, weight.data_type):
            return False
        pairs = zip(other.chunks(), weight.chunks(), strict=True)
        return all(a.tobytes() == b.tobytes() for a, b in pairs)

    def _target(self, layer: LinearWeight, use: Use | None = None) -> Target | str:
        """Return the value to compare, and what it was; or why there is none."""
        node = layer.node if use is None else use.node
        ours = _outputs(self.model, node)
        found = self._known(ours)
        if found is not None:
            return found
        if not any(self.model.lineage.is_new(tensor.name) for tensor in ours):
            # Nothing is said of it: what the layer with this weight gave, it gives.
            maker = self._maker(layer.name)
            if maker is not None:
                name = _outputs(self.reference, maker)[-1].name
                return ours[-1].name, Origin(name)
        return _no_counterpart(ours[0].name)

    def _known(self, ours: Sequence[gs.Tensor]) -> Target | None:
        """Return the last of these values that the reference has, and what it was."""
        for tensor in reversed(ours):
            origin = self.model.lineage.origin(tensor.name)
            if origin is not None and origin.name in self.theirs:
                return None if origin.is_part else (tensor.name, origin)
        return None

    def _maker(self, name: str) -> Node | None:
        """Return the node of the reference that reads what a weight was."""
        origin = self.model.lineage.origin(name)
        if origin is None or not origin.is_whole:
            return None
        weight = self.weights.get(origin.name)
        if weight is None or len(weight.uses) != 1:
            return None
        node = weight.uses[0][0]
        known = any(node is other for other in self.reference.graph.nodes)
        return node if known and node.op in _LINEAR else None


def _no_counterpart(value: str) -> str:
    return f"the reference has nothing like {value!r}, which it gives"


def _outputs(model: Model, node: Node) -> list[gs.Tensor]:
    """Return what a layer gives; then that plus its bias if another node adds it."""
    behind = add_behind(model, node) if node.op == "MatMul" else None
    return [node.outputs[0], *([] if behind is None else behind[0].outputs)]


def _readers(tensors: Iterable[gs.Tensor]) -> Iterator[Node]:
    """Yield the nodes that read these tensors, perhaps reshaped."""
    for tensor in tensors:
        for node in dict.fromkeys(tensor.outputs):
            if node.op == "Reshape" and is_onnx(node.domain):
                yield from _readers(node.outputs)
            else:
                yield node


def _why_frozen(weight: Weight, inputs: int) -> str:
    if inputs > MAX_INPUTS:
        return f"it has {inputs} inputs, more than {MAX_INPUTS}"
    seen: Array = np.zeros(0)
    for chunk in weight.chunks():
        wide = chunk if chunk.dtype.itemsize >= 4 else chunk.astype(np.float32)
        seen = np.union1d(seen, wide)
        if len(seen) > TABLE:
            return ""
    if len(seen) * 16 > weight.size:
        return ""
    return f"it has {len(seen)} distinct values, which stay"
