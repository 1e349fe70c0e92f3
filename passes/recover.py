"""recover: least squares on activations, layer by layer, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from onnxshrink.activations import regression
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.activations.regression import (
    Channels,
    ConvRows,
    MatrixRows,
    Moments,
    OutputRows,
    Rows,
)
from onnxshrink.activations.staged import HELD_BYTES, Span, Walk
from onnxshrink.activations.staged import batches as cut_into
from onnxshrink.base import Context, Promise, Site, SitePass
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.solvers.obs import Curvature, refit
from onnxshrink.statistics import ConvGram, ConvWindow
from onnxshrink.structure import layers
from onnxshrink.structure.codes import CODES, Decoder, decoder_of
from onnxshrink.structure.layers import LinearWeight, Use
from onnxshrink.structure.selection import selected
from onnxshrink.tensors import LazyTensor
from onnxshrink.training.norms import why_fixed

__all__ = ["Recover"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Mode = Literal["weights", "bias", "norm", "scale"]
Seen = tuple[dict[str, Moments], dict[str, Moments]]

MAX_INPUTS = 8192
"""Layers with more inputs get their bias corrected only: 512 MB of Gram matrix."""
HELD = 5
"""One of so many samples judges whether a layer gained by its new values."""
CONV_SAMPLES = 512
"""Samples for a Conv alone, which has many rows in each: more gained nothing."""
_POSITIONS = 64
"""Output positions of a sample that are used of a ConvTranspose."""
TABLE = 256
"""A weight with no more distinct values than this keeps them: it is stored by index."""
FEW_SAMPLES = 512
"""Samples for two numbers for each output: a factor and a bias."""
MEMO_BYTES = 256 << 20
_DEFAULT_DOMAINS = (None, "", "ai.onnx")
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_AFFINE = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
_THROUGH = frozenset({"Cast", "DequantizeLinear", "Identity", "QuantizeLinear"})


class _Matrices(Protocol):
    """How an array is read as matrices [groups, outputs, inputs], and back."""

    def matrices(self, array: Array) -> Array:
        """View an array as matrices."""

    def array(self, matrices: Array) -> Array:
        """Return the array that has these matrices."""


@dataclass(frozen=True)
class _Overlapping:
    """The weight of a ConvTranspose as that of the Conv over inputs set apart.

    Attributes:
        shape: [in, out / group, kernel...].
        group: Number of groups.
    """

    shape: tuple[int, ...]
    group: int

    def matrices(self, array: Array) -> Array:
        """Return [groups, outputs, inputs], the kernel turned round."""
        inputs, outputs = self.shape[0] // self.group, self.shape[1]
        apart = array.reshape(self.group, inputs, outputs, -1)[..., ::-1]
        return apart.swapaxes(1, 2).reshape(self.group, outputs, -1)

    def array(self, matrices: Array) -> Array:
        """Return the weight of the ConvTranspose."""
        inputs, outputs = self.shape[0] // self.group, self.shape[1]
        apart = matrices.reshape(self.group, outputs, inputs, -1).swapaxes(1, 2)
        return np.ascontiguousarray(apart[..., ::-1]).reshape(self.shape)


@dataclass(frozen=True)
class _OverlappingRows(Rows):
    """What a ConvTranspose reads for each output: inputs set apart by its strides.

    Attributes:
        strides: One for each spatial axis.
        rows: The rows of the Conv over that.
    """

    strides: tuple[int, ...]
    rows: ConvRows

    def pieces(
        self, inputs: Array, now: Array, wanted: Array
    ) -> Iterator[regression.Piece]:
        """Yield as many groups as the convolution has."""
        sizes = [
            (size - 1) * stride + 1
            for size, stride in zip(inputs.shape[2:], self.strides, strict=True)
        ]
        apart = np.zeros((*inputs.shape[:2], *sizes), inputs.dtype)
        steps = tuple(slice(None, None, stride) for stride in self.strides)
        apart[(slice(None), slice(None), *steps)] = inputs
        yield from self.rows.pieces(apart, now, wanted)


@dataclass(frozen=True)
class _StackRows(Rows):
    """Inputs and outputs of a product with a stack of matrices, one group each.

    Attributes:
        lead: Shape of the stack.
    """

    lead: tuple[int, ...]

    def pieces(
        self, inputs: Array, now: Array, wanted: Array
    ) -> Iterator[regression.Piece]:
        """Yield one piece."""
        if now.shape[-2 - len(self.lead) : -2] != self.lead:
            raise ModelError(f"outputs {list(now.shape)} repeat its matrices")
        x = np.broadcast_to(inputs, (*now.shape[:-1], inputs.shape[-1]))
        count = math.prod(self.lead)
        found = []
        for array in (x, now, wanted):
            apart = array.reshape(-1, count, *array.shape[-2:]).swapaxes(0, 1)
            found.append(apart.reshape(count, -1, array.shape[-1]))
        yield found[0], found[1], found[2]


@dataclass(frozen=True)
class _OutputChannels(Rows):
    """Each output alone, as it is against as it should be."""

    axis: int

    def pieces(
        self, inputs: Array, now: Array, wanted: Array
    ) -> Iterator[regression.Piece]:
        """Yield as many groups as there are outputs; ``inputs`` is not looked at."""
        yield from Channels(self.axis).pieces(now, now, wanted)


@dataclass(frozen=True, eq=False)
class _Factor:
    """The scale of a quantized weight, which multiplies the layer's outputs.

    Attributes:
        scale: The scale.
        shape: Shape of one factor for each output that broadcasts over the scale;
            empty if one factor serves all.
        has_bias: Whether the outputs compared have the bias in them.
    """

    scale: Weight
    shape: tuple[int, ...]
    has_bias: bool


@dataclass(frozen=True, eq=False)
class _Work:
    """One place to recover.

    Attributes:
        where: Name of the weight, or of a normalisation's running mean.
        mode: ``weights`` and bias, ``bias`` alone, statistics of a ``norm``, or the
            ``scale`` of codes and bias.
        node: The node.
        why_bias: Why weights stay as they are, where they do.
        request: What to watch.
        layout: How the weight is read, of a layer whose weights change.
        bias: The bias, if there is one that is free to change.
        bias_scale: Its scale, if it is stored as codes.
        factor: What multiplies the outputs, of a layer whose scale changes.
        may_add: Whether the node takes a bias and has none.
        scale: What outputs are, in products of inputs and weights (alpha of Gemm).
        samples: How many are enough, if there are so many.
    """

    where: str
    mode: Mode
    node: Node
    request: regression.Request
    why_bias: str = ""
    layout: _Matrices | None = None
    bias: Weight | None = None
    bias_scale: Weight | None = None
    factor: _Factor | None = None
    may_add: bool = False
    scale: float = 1.0
    samples: int = 1 << 62


@dataclass(frozen=True, kw_only=True)
class RecoverSite(Site):
    """A layer to bring back to what it gave.

    Attributes:
        changes: What of it may change.
        towards: Value of the reference that its outputs should be.
    """

    changes: Mode
    towards: str


@dataclass(frozen=True, kw_only=True)
class Recover(SitePass):
    """Bring altered layers back to what they gave in the reference, without labels.

    The reference is the model the run started from. Of each Conv, ConvTranspose, Gemm
    and MatMul whose weight is no longer the reference's, weights and bias become those
    that give its outputs best: the least squares of ``Y_reference - X W - b`` over
    samples, with ``X`` what the layer reads in the model as it is now (layer-wise
    reconstruction: He, Zhang and Sun 2017, "Channel Pruning", section 3.1).
    Zeros stay zero. Samples are those for calibration and training; labels are not
    looked at, and memory does not grow with the samples.

    Codes of quantized weights, and weights of so few values that they are stored by
    index, stay as they are; there the bias takes up the mean error (Nagel et al. 2019,
    "Data-Free Quantization through Weight Equalization and Bias Correction", section
    4.2), and scales become what gives the outputs best, by least squares of the wanted
    on the given outputs. A layer is changed only if its error on held-out samples
    falls.

    Attributes:
        ridge: Keeps weights near what they are: this share of the inputs' mean square
            is added to each.
        samples: Samples to use at most; a fifth of them judges.
        order: ``sequential`` lets each layer make up for what is left of the error of
            those before it, at about two runs of the model for all; ``parallel`` lets
            it read what it read in the reference, in one run.
        bias: Adjust biases, and give a Conv or Gemm without one a bias.
        norms: Estimate mean and variance of each BatchNormalization behind an altered
            layer again, from what it reads now. It helps where weights are left alone:
            least squares leaves nothing to it.
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
        found = self._works(model, ctx)
        if found and (ctx.samples.random or ctx.samples.calibration is None):
            raise UsageError(
                f"recover compares what {found[0].where} and others give with the "
                "reference on real samples, and there are none; give --data"
            )
        return [
            RecoverSite(
                work.where,
                work.node.op,
                changes=work.mode,
                towards=work.request.wanted,
            )
            for work in found
        ]

    def _works(self, model: Model, ctx: Context) -> list[_Work]:
        count = sum(map(len, _pool(ctx, self.samples)))
        finder = _Finder(model, ctx.reference, self, count)
        found = finder.find(ctx)
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
        works = [w for w in self._works(model, quiet) if w.where in chosen]
        if self.order == "parallel":
            self._recover(model, works, self._together(model, ctx), ctx)
            return
        look = _InSequence(model, works, self.samples, ctx)
        for index, work in enumerate(works):
            self._recover(model, [work], look, ctx)
            ctx.progress(index + 1, len(works), self.name)

    def _together(self, model: Model, ctx: Context) -> _Look:
        def look(works: Mapping[str, _Work]) -> Seen:
            count = min(self.samples, max(work.samples for work in works.values()))
            parts = [
                [span.samples.take(slice(span.start, span.stop)) for span in spans]
                for spans in _divided(_pool(ctx, count))
            ]
            requests = {where: work.request for where, work in works.items()}
            fit, held = regression.gather(model, ctx.reference, requests, parts, ctx)
            return fit, held

        return look

    def _recover(
        self, model: Model, works: Sequence[_Work], look: _Look, ctx: Context
    ) -> None:
        memo: _Memo = ctx.cache.setdefault(("recover", "results"), _Memo())
        mark = (fingerprint(model), self.ridge, self.samples, self.bias)
        new = {w.where: w for w in works if (*mark, w.where) not in memo.results}
        if new:
            moments, judged = look(new)
            tasks = [
                self._task(model, work, moments[where], judged[where])
                for where, work in new.items()
            ]
            with threadpool_limits(1):
                outcomes = ctx.map(_solve, tasks, self.name)
            for where, outcome in zip(new, outcomes, strict=True):
                memo.keep((*mark, where), outcome)
            fresh = dict(zip(new, outcomes, strict=True))
        for work in works:
            outcome = (
                fresh[work.where]
                if work.where in new
                else memo.results[*mark, work.where]
            )
            _write(model, work, outcome, ctx)

    def _task(self, model: Model, work: _Work, fit: Moments, held: Moments) -> _Task:
        shift = work.bias is not None or work.may_add
        tensor, parameters, dtype = None, None, np.dtype(np.float32)
        if work.mode == "weights":
            tensor = model.weight(work.where).tensor
            dtype = tensor.dtype
        if work.mode == "norm":
            parameters, dtype = _norm_parameters(model, work.node)
        return _Task(
            work.mode,
            fit,
            held,
            self.ridge,
            shift and self.bias,
            work.scale,
            dtype,
            tensor,
            work.layout,
            parameters,
            work.factor is not None and not work.factor.shape,
        )


# --- which layers ---------------------------------------------------------------------


@dataclass(eq=False)
class _Finder:
    """Finds what is altered, and where the reference has the same value."""

    model: Model
    reference: Model
    options: Recover
    samples: int
    theirs: dict[str, gs.Tensor] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)

    def find(self, ctx: Context) -> list[_Work]:
        """Return the places to recover in the order of the graph."""
        self.theirs = {
            tensor.name: tensor
            for node in self.reference.graph.nodes
            for tensor in node.outputs
            if tensor.name
        }
        self.weights = {weight.name: weight for weight in self.reference.weights()}
        at = {id(node): i for i, node in enumerate(self.model.graph.nodes)}
        found: list[_Work] = []
        frozen = set()
        for node, weight, decoder in self._quantized():
            if weight.name in frozen:
                continue
            frozen.add(weight.name)
            work = self._frozen(node, weight, decoder)
            if isinstance(work, str):
                ctx.skipped(weight.name, work)
            else:
                found.append(work)
        only, skip = self.options.only, self.options.skip
        for layer in layers.find(self.model, only=only, skip=skip):
            if layer.name in frozen:
                continue
            made = self._layer(layer, at)
            if isinstance(made, str):
                ctx.skipped(layer.name, made)
            else:
                found.append(made)
        if self.options.norms:
            found += self._norms(ctx)
        found.sort(key=lambda work: at[id(work.node)])
        if self.options.order == "parallel":
            return [self._as_there(work, at[id(work.node)]) for work in found]
        return found

    def _as_there(self, work: _Work, node: int) -> _Work:
        """Let a layer read what it reads in the reference, where that is known.

        What it will read once all layers are recovered is nearer to that than to what
        it reads now.
        """
        index = next(
            (i for i in (0, 1) if self._is_activation(work.node.inputs[i])), None
        )
        if index is None:
            return work
        tensor = work.node.inputs[index]
        request = replace(
            work.request, inputs=tensor.name, source=tensor.name, at=(node, index)
        )
        return replace(work, request=request)

    def _is_activation(self, tensor: gs.Tensor) -> bool:
        """Whether both models compute it, and not from weights alone."""
        maker = tensor.inputs
        return (
            tensor.name in self.theirs
            and self.model.constant(tensor) is None
            and bool(maker)
            and maker[0].op != "DequantizeLinear"
        )

    def _layer(self, layer: LinearWeight, at: Mapping[int, int]) -> _Work | str:
        why = layer.why_not
        if not why and layer.kind not in _LINEAR:
            why = f"least squares is not for the weights of {layer.kind}"
        if not why and len(layer.uses) > 1:
            why = f"it is shared by {len(layer.uses)} nodes"
        if not why and id(layer.uses[0].node) not in at:
            why = "it is inside a subgraph or function, where nothing can be watched"
        if not why and self._same(layer.weight):
            why = "it is as it was in the reference"
        if why:
            return why
        use = layer.uses[0]
        node = use.node
        groups, outputs, inputs = layer.layout.matrices_shape
        scale = float(attribute(node, "alpha", 1.0)) if node.op == "Gemm" else 1.0
        if not scale:
            return "its node multiplies it by zero"
        if node.op == "ConvTranspose" or (node.op == "MatMul" and groups > 1):
            return self._unlike(layer, use)
        enough = self.samples
        if node.op == "Conv" and self.options.order == "sequential":
            enough = min(enough, max(CONV_SAMPLES, 2 * inputs))
        seen = layer.statistics_for("gram", enough)
        if seen is None:
            return "its inputs cannot be watched"
        tensor, statistic = seen[0]
        if self.model.constant(tensor) is not None:
            return "it multiplies a constant"
        target = self._target(node, layer.name)
        if isinstance(target, str):
            return target
        free = layers.free_bias(layer) if self.options.bias else None
        bias = free.weight if free is not None else None
        plain = (scale, attribute(node, "beta", 1.0)) == (1.0, 1.0)
        no_bias = len(node.inputs) < 3 or not node.inputs[2].name
        may_add = (
            self.options.bias
            and node.op in ("Conv", "Gemm")
            and use.index == 1
            and plain
            and no_bias
            and (node.op == "Conv" or self.model.opset >= 11)
        )
        why_bias = _why_frozen(layer.weight, inputs)
        if why_bias:
            if bias is None and not may_add:
                return f"{why_bias}, and it has no bias that is free to change"
            axis = 1 if node.op == "Conv" else -1
            request = regression.Request("", *target, OutputRows(axis))
            return _Work(
                layer.name,
                "bias",
                node,
                request,
                why_bias,
                bias=bias,
                may_add=may_add,
            )
        rows: Rows
        if isinstance(statistic, ConvGram):
            rows = ConvRows(statistic.window, statistic.positions)
        else:
            vector = len(layer.layout.shape) == 1
            rows = MatrixRows(
                int(getattr(statistic, "axis", -1)),
                None if vector else -1 if use.index else -2,
            )
        nbytes = 16 * groups * inputs * (inputs + outputs)
        request = regression.Request(tensor.name, *target, rows, nbytes)
        return _Work(
            layer.name,
            "weights",
            node,
            request,
            layout=layer.layout,
            bias=bias,
            may_add=may_add,
            scale=scale,
            samples=enough,
        )

    def _unlike(self, layer: LinearWeight, use: Use) -> _Work | str:
        """Describe a ConvTranspose, or a product with a stack of matrices."""
        node, shape = use.node, layer.weight.shape
        target = self._target(node, layer.name)
        if isinstance(target, str):
            return target
        source = node.inputs[0]
        rows: Rows
        layout: _Matrices = layer.layout
        bias, may_add = None, False
        if node.op == "MatMul":
            if use.index != 1:
                return "it is a stack of matrices that multiplies from the left"
            rows = _StackRows(shape[:-2])
        else:
            window = ConvWindow.of(node.attrs, shape)
            if window.auto_pad != "NOTSET" or node.attrs.get("output_shape"):
                return "its padding follows from the size of its output"
            extra = node.attrs.get("output_padding") or (0,) * len(window.kernel)
            rows = _overlapping_rows(window, [int(n) for n in extra])
            layout = _Overlapping(shape, window.group)
            if self.options.bias:
                bias = self._own_bias(node)
                may_add = len(node.inputs) < 3 or not node.inputs[2].name
        groups, outputs, inputs = layout.matrices(np.empty(shape, np.bool_)).shape
        why = _why_frozen(layer.weight, inputs)
        if why:
            return why
        nbytes = 16 * groups * inputs * (inputs + outputs)
        request = regression.Request(source.name, *target, rows, nbytes)
        return _Work(
            layer.name,
            "weights",
            node,
            request,
            layout=layout,
            bias=bias,
            may_add=may_add,
        )

    def _own_bias(self, node: Node) -> Weight | None:
        """Return the bias that only this node reads, as its third input."""
        known = self.model.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if known is None or not layers.is_float(known):
            return None
        is_free = not (known.is_input or known.is_output) and known.uses == ((node, 2),)
        return known if is_free else None

    def _quantized(
        self, everywhere: bool = False
    ) -> Iterator[tuple[Node, Weight, Decoder]]:
        """Yield nodes of the main graph that read decoded codes, and the weight.

        Args:
            everywhere: Those too that ``only`` and ``skip`` leave out.
        """
        here = {id(node) for node in self.model.graph.nodes}
        for weight in self.model.weights():
            if weight.data_type not in CODES or len(weight.shape) < 2:
                continue
            decoder = decoder_of(self.model, weight)
            if isinstance(decoder, str):
                continue
            for node in _linear_behind([end for end, _ in decoder.ends]):
                names = [weight.name, node.name, node.op]
                chosen = selected(names, self.options.only, self.options.skip)
                if id(node) in here and (chosen or everywhere):
                    yield node, weight, decoder

    def _frozen(self, node: Node, weight: Weight, decoder: Decoder) -> _Work | str:
        if self._same(weight):
            return "it is as it was in the reference"
        target = self._target(node, weight.name)
        if isinstance(target, str):
            return target
        bias, bias_scale = self._bias_of_codes(node)
        factor = self._factor(node, decoder, target[0], bias is not None)
        why = "it is quantized"
        if bias is None and factor is None:
            return f"{why}, and it has no bias or scale that is free to change"
        axis = 1 if node.op in ("Conv", "ConvTranspose") else -1
        rows = OutputRows(axis) if factor is None else _OutputChannels(axis)
        return _Work(
            weight.name,
            "bias" if factor is None else "scale",
            node,
            regression.Request("", *target, rows),
            why,
            bias=bias,
            bias_scale=bias_scale,
            factor=factor,
            samples=FEW_SAMPLES,
        )

    def _bias_of_codes(self, node: Node) -> tuple[Weight | None, Weight | None]:
        """Return the bias behind decoded codes that is free to change; its scale."""
        if not self.options.bias:
            return None, None
        tensor, reader, at = None, node, 2
        plain = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0))
        if node.op == "MatMul":
            made = _outputs(self.model, node)
            if len(made) > 1:
                reader = made[1].inputs[0]
                at = 1 if reader.inputs[0] is made[0] else 0
                tensor = reader.inputs[at]
        elif plain == (1.0, 1.0) and len(node.inputs) > 2:
            tensor = node.inputs[2]
        if tensor is None or not tensor.name:
            return None, None
        known, scale = self.model.constant(tensor), None
        maker = tensor.inputs[0] if tensor.inputs else None
        if known is None and maker is not None and maker.op == "DequantizeLinear":
            known = self.model.constant(maker.inputs[0])
            scale = self.model.constant(maker.inputs[1])
            is_alone = list(tensor.outputs) == [reader]
            if scale is None or not is_alone or scale.uses != ((maker, 1),):
                return None, None
            reader, at = maker, 0
        if known is None or (scale is None and not layers.is_float(known)):
            return None, None
        if known.is_input or known.is_output or known.uses != ((reader, at),):
            return None, None
        return (known, scale) if len(known.shape) == 1 else (None, None)

    def _factor(
        self, node: Node, decoder: Decoder, ours: str, is_bias_free: bool
    ) -> _Factor | None:
        """Return the scale of a weight's codes, if it is one for each output."""
        scale = self.model.constant(decoder.scale)
        if scale is None or scale.dtype != np.float32:
            return None
        if scale.is_input or scale.is_output:
            return None
        if not all(any(n is d for d in decoder.nodes) for n, _ in scale.uses):
            return None
        readers = [reader for _, reader in _read([end for end, _ in decoder.ends])]
        if any(reader is not node for reader in readers):
            return None  # an embedding, say, would change with it
        has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
        has_bias |= ours != node.outputs[0].name
        if has_bias and not is_bias_free:
            return None
        if scale.size == 1:
            return _Factor(scale, (), has_bias)
        if int(attribute(node, "group", 1)) > 1 and node.op == "ConvTranspose":
            return None
        axis = _output_axis(node) % len(decoder.shape)
        outputs = decoder.shape[axis]
        if decoder.axis is not None and not decoder.block:
            fits = decoder.axis == axis and scale.size == outputs
            return _Factor(scale, (outputs,), has_bias) if fits else None
        at = axis - len(decoder.shape)  # the scale may have fewer axes in front
        if -at > len(scale.shape) or scale.shape[at] != outputs:
            return None
        wide = tuple(outputs if i == at else 1 for i in range(-len(scale.shape), 0))
        return _Factor(scale, wide, has_bias)

    def _altered(self) -> set[int]:
        """Return the nodes with altered weights, those left alone among them."""
        readers = [
            (use.node, layer.weight)
            for layer in layers.find(self.model)
            for use in layer.uses
        ]
        readers += [(node, weight) for node, weight, _ in self._quantized(True)]
        return {id(node) for node, weight in readers if not self._same(weight)}

    def _norms(self, ctx: Context) -> list[_Work]:
        """Return the normalisations that something altered leads to."""
        found = []
        altered = self._altered()
        moved: set[int] = set()
        for node in self.model.graph.nodes:
            if id(node) not in altered and not any(id(t) in moved for t in node.inputs):
                continue
            moved |= {id(tensor) for tensor in node.outputs}
            if node.op != "BatchNormalization" or node.domain not in _DEFAULT_DOMAINS:
                continue
            if len(node.inputs) < 5:
                continue
            mean = self.model.constant(node.inputs[3])
            label = mean.name if mean is not None else node.name or node.op
            names = [label, node.name, node.op]
            if not selected(names, self.options.only, self.options.skip):
                continue
            why = why_fixed(self.model, node)
            target = self._target(node, "")
            if why or isinstance(target, str):
                ctx.skipped(label, why or str(target))
                continue
            request = regression.Request(node.inputs[0].name, *target, Channels())
            found.append(_Work(label, "norm", node, request))
        return found

    def _same(self, weight: Weight) -> bool:
        """Whether the reference has a weight of this name with the same values."""
        other = self.weights.get(weight.name)
        if other is None:
            return False
        if other.tensor is weight.tensor:
            return True
        if (other.shape, other.data_type) != (weight.shape, weight.data_type):
            return False
        pairs = zip(other.chunks(), weight.chunks(), strict=True)
        return all(a.tobytes() == b.tobytes() for a, b in pairs)

    # --- the same value in the reference ------------------------------------------

    def _target(self, node: Node, weight: str) -> tuple[str, str] | str:
        """Return the values to compare, ours and theirs, or why there are none."""
        ours = _outputs(self.model, node)
        out = next((t for t in reversed(ours) if t.name in self.theirs), None)
        if out is not None:
            other = self.theirs[out.name]
        else:
            maker = self._maker(weight)
            if maker is None:
                return (
                    f"the reference has neither a value {ours[0].name!r} nor a layer "
                    "with this weight"
                )
            out, other = ours[-1], _outputs(self.reference, maker)[-1]
        return out.name, self._behind(out, other).name

    def _maker(self, name: str) -> Node | None:
        weight = self.weights.get(name)
        if weight is None or len(weight.uses) != 1:
            return None
        node = weight.uses[0][0]
        known = any(node is other for other in self.reference.graph.nodes)
        return node if known and node.op in _LINEAR else None

    def _behind(self, ours: gs.Tensor, theirs: gs.Tensor) -> gs.Tensor:
        """Follow what the reference still does and our layer has taken in.

        Where a normalisation was folded into our layer, what that gives is what the
        layer should give.
        """
        kinds = {node.op for node in _readers(ours)}
        for _ in range(4):
            readers = list(dict.fromkeys(theirs.outputs))
            is_output = any(theirs is t for t in self.reference.graph.outputs)
            if len(readers) != 1 or is_output or readers[0].op in kinds:
                break
            node = readers[0]
            if node.op not in _AFFINE or node.domain not in _DEFAULT_DOMAINS:
                break
            rest = [tensor for tensor in node.inputs if tensor is not theirs]
            if any(self.reference.constant(tensor) is None for tensor in rest):
                break
            theirs = node.outputs[0]
        return theirs


def _outputs(model: Model, node: Node) -> list[gs.Tensor]:
    """Return what a layer gives; then that plus its bias if another node adds it."""
    found = [node.outputs[0]]
    if node.op == "MatMul":
        readers = list(dict.fromkeys(found[0].outputs))
        is_output = any(found[0] is t for t in model.graph.outputs)
        if len(readers) == 1 and readers[0].op == "Add" and not is_output:
            rest = [t for t in readers[0].inputs if t is not found[0]]
            if len(rest) == 1 and model.constant(rest[0]) is not None:
                found.append(readers[0].outputs[0])
    return found


def _output_axis(node: Node) -> int:
    """Return the axis of a weight, the second input, that is the outputs."""
    if node.op == "ConvTranspose":
        return 1
    straight = node.op == "Conv" or bool(attribute(node, "transB", 0))
    return 0 if straight else -1


def _read(tensors: Iterable[gs.Tensor]) -> Iterator[tuple[gs.Tensor, Node]]:
    """Yield nodes that read these tensors, perhaps reshaped, and what they read."""
    for tensor in tensors:
        for node in dict.fromkeys(tensor.outputs):
            if node.op == "Reshape" and node.domain in _DEFAULT_DOMAINS:
                yield from _read(node.outputs)
            else:
                yield tensor, node


def _linear_behind(tensors: Iterable[gs.Tensor]) -> Iterator[Node]:
    """Yield linear operators whose weight is one of these, perhaps reshaped."""
    for tensor, node in _read(tensors):
        is_linear = node.op in _LINEAR and node.domain in _DEFAULT_DOMAINS
        if is_linear and node.inputs[1] is tensor:
            yield node


def _overlapping_rows(window: ConvWindow, extra: Sequence[int]) -> _OverlappingRows:
    """Return the rows of a ConvTranspose; ``extra`` is its output_padding."""
    axes = len(window.kernel)
    reach = [(k - 1) * d for k, d in zip(window.kernel, window.spreads, strict=True)]
    pads = window.pads or (0,) * (2 * axes)
    begins = [r - p for r, p in zip(reach, pads[:axes], strict=True)]
    ends = [r - p + e for r, p, e in zip(reach, pads[axes:], extra, strict=True)]
    conv = ConvWindow(
        window.kernel, (), (*begins, *ends), window.dilations, window.group
    )
    return _OverlappingRows(window.steps, ConvRows(conv, _POSITIONS))


def _readers(tensor: gs.Tensor, depth: int = 4) -> Iterator[Node]:
    for node in tensor.outputs:
        if node.op in _THROUGH and depth:
            for output in node.outputs:
                yield from _readers(output, depth - 1)
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


# --- samples --------------------------------------------------------------------------


def _pool(ctx: Context, count: int) -> list[Span]:
    """Return at most so many samples for calibration and training."""
    parts = []
    for samples in (ctx.samples.calibration, ctx.samples.training):
        if samples is not None and count > 0 and samples.used:
            unit = samples.batch or 1
            some = min(max(count, unit), samples.used) // unit * unit
            parts.append(Span(samples, 0, some))
            count -= some
    return parts


def _divided(pool: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Divide samples into those to fit and those to judge; one sample does both."""
    total = sum(map(len, pool))
    unit = pool[0].samples.batch or 1
    held = max(1, total // unit // HELD) * unit
    if total <= held:
        return list(pool), list(pool)
    fit: list[Span] = []
    judge: list[Span] = []
    for span in reversed(pool):
        cut = max(span.start, span.stop - held)
        held -= span.stop - cut
        if cut < span.stop:
            judge.insert(0, replace(span, start=cut))
        if cut > span.start:
            fit.insert(0, replace(span, stop=cut))
    return fit, judge


class _Look(Protocol):
    """How moments are gathered."""

    def __call__(self, works: Mapping[str, _Work]) -> Seen:
        """Return moments of the samples to fit, and of those that judge."""


class _InSequence:
    """Looks at layers one after the other, in the order of the graph.

    Either model runs once for all of them, a layer's operator twice: before and after
    it is recovered.
    """

    def __init__(
        self, model: Model, works: Sequence[_Work], samples: int, ctx: Context
    ) -> None:
        self._parts = {
            work.where: _divided(_pool(ctx, min(samples, work.samples)))
            for work in works
        }
        self._left = list(works)
        everything = [s for both in self._parts.values() for part in both for s in part]
        requests = {work.where: work.request for work in works}
        size = 1
        if everything:
            size = regression.batch_size(model, requests, everything[0].samples)
        self._batches = cut_into(everything, size)
        half = HELD_BYTES // 2
        self._ours, self._theirs = (
            Walk(model, ctx, half),
            Walk(ctx.reference, ctx, half),
        )

    def __call__(self, works: Mapping[str, _Work]) -> Seen:
        """Look at one layer; all before it are as they will be."""
        (work,) = works.values()
        at = next(i for i, other in enumerate(self._left) if other is work)
        self._left = self._left[at + 1 :]
        request = work.request
        parts = self._parts[work.where]
        # What later layers read of other samples may wait.
        mine = [b for b in self._batches if any(b.is_in(s) for p in parts for s in p)]
        later = [other.request for other in self._left]
        names = [name for name in (request.inputs, request.outputs) if name]
        ours = self._ours.values(
            names,
            [tensor.name for tensor in work.node.inputs],
            [name for r in later for name in (r.inputs, r.outputs) if name],
            mine,
        )
        theirs = self._theirs.values(
            [request.wanted], [request.wanted], [r.wanted for r in later], mine
        )
        fit, held = Moments(), Moments()
        for batch, now, wanted in zip(mine, ours, theirs, strict=True):
            outputs = now[request.outputs]
            for spans, moments in zip(parts, (fit, held), strict=True):
                if any(batch.is_in(span) for span in spans):
                    moments.update(
                        request.rows,
                        now[request.inputs] if request.inputs else outputs,
                        outputs,
                        wanted[request.wanted],
                    )
        return {work.where: fit}, {work.where: held}


# --- one layer ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Task:
    """One place to recover, with all that this takes."""

    mode: Mode
    fit: Moments
    held: Moments
    ridge: float
    shift: bool
    scale: float
    dtype: np.dtype[Any]
    tensor: LazyTensor | None
    layout: _Matrices | None
    parameters: Float64 | None
    is_pooled: bool


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What to write.

    Attributes:
        values: New weights; of a normalisation mean and variance; of a scale what
            multiplies it.
        shift: What is added to the outputs, [groups, outputs].
        before: Output error on the samples that judge, as a share of the variance.
        after: The same with the new values.
        why_not: Why nothing is written.
    """

    values: Array | None = None
    shift: Float64 | None = None
    before: float = 0.0
    after: float = 0.0
    why_not: str = ""


class _Memo:
    """Outcomes for models seen before, within a bounded amount of memory.

    Back-off asks for the same layers of the same model again and again.
    """

    def __init__(self) -> None:
        self.results: dict[tuple[object, ...], _Outcome] = {}
        self.nbytes = 0

    def keep(self, key: tuple[object, ...], outcome: _Outcome) -> None:
        """Remember an outcome if there is room."""
        size = 0 if outcome.values is None else outcome.values.nbytes
        if self.nbytes + size <= MEMO_BYTES:
            self.results[key] = outcome
            self.nbytes += size


def _solve(task: _Task) -> _Outcome:
    """Find the values that give the reference's outputs best."""
    fit, held = task.fit, task.held
    why = fit.why_not or held.why_not
    if why or not fit.rows or not held.rows:
        return _Outcome(why_not=why or "nothing was seen of it")
    none = np.zeros(np.swapaxes(held.cross, 1, 2).shape), np.zeros(held.errors.shape)
    variance = max(held.variance, 1e-300)
    before = held.error(*none) / variance
    if before < 1e-10:
        return _Outcome(
            why_not=f"it gives what it gave in the reference ({before:.1g})"
        )
    best = _Outcome(
        before=before,
        after=before,
        why_not=f"its error of {before:.3%} on held-out samples would not fall",
    )
    for values, change, shift in _candidates(task):
        after = held.error(change, shift) / variance
        if after < best.after * (1 - 1e-6):
            gained = shift if task.shift else None
            best = _Outcome(values, gained, before, after)
    return best


def _candidates(
    task: _Task,
) -> Iterator[tuple[Array | None, Float64, Float64]]:
    """Yield (new values, change of the weights, change of the bias) worth a try."""
    fit = task.fit
    rows = fit.rows
    mean, missing = fit.inputs / rows, fit.errors / rows
    if task.mode == "norm":
        yield from _norm_candidate(task, mean)
        return
    if task.mode == "scale":
        yield from _scale_candidates(task, mean, missing)
    if task.mode == "weights":
        found = _least_squares(task, mean, missing)
        if found is not None:
            values, change = found
            shift = np.zeros_like(missing)
            if task.shift:
                shift = missing - np.einsum("goi,gi->go", change, mean)
            yield values, change, shift
    if task.shift:
        yield None, np.zeros(np.swapaxes(fit.cross, 1, 2).shape), missing


def _scale_candidates(
    task: _Task, mean: Float64, missing: Float64
) -> Iterator[tuple[Array, Float64, Float64]]:
    """Yield factors of the outputs: least squares of wanted on given ones."""
    fit = task.fit
    square, product = (
        m[:, 0] / fit.rows for m in (fit.gram[..., 0], fit.cross[..., 0])
    )
    for with_shift in (True, False) if task.shift else (False,):
        spread, along = square[:, None], product[:, None]
        if with_shift:
            spread, along = spread - mean * mean, along - mean * missing
        if task.is_pooled:
            spread, along = spread.sum(keepdims=True), along.sum(keepdims=True)
        change = np.where(spread > 1e-12 * square.max(), along, 0.0)
        change = change / np.maximum(spread, 1e-300)
        change = np.where(change > -0.9, change, 0.0)  # scales stay positive
        change = np.broadcast_to(change, mean.shape)
        shift = missing - change * mean if with_shift else np.zeros_like(missing)
        yield 1 + change[:, 0], change[:, :, None].copy(), shift


def _least_squares(
    task: _Task, mean: Float64, missing: Float64
) -> tuple[Array, Float64] | None:
    """Return the new weight and its change, in products with the inputs."""
    fit, layout, tensor = task.fit, task.layout, task.tensor
    assert layout is not None
    assert tensor is not None
    old = layout.matrices(tensor.read())
    if old.shape != np.swapaxes(fit.cross, 1, 2).shape:
        return None
    keep = old != 0
    gram, cross_ = fit.gram / fit.rows, fit.cross / fit.rows
    squares = np.einsum("gii->gi", gram)
    dead = squares <= 1e-12 * squares.max(axis=1, initial=0.0, keepdims=True)
    if task.shift:
        gram = gram - mean[:, :, None] * mean[:, None, :]
        cross_ = cross_ - mean[:, :, None] * missing[:, None, :]
    wide = old.astype(np.float64)
    change = np.zeros(old.shape)
    for group, matrix in enumerate(gram):
        change[group] = _one_group(
            matrix, cross_[group], keep[group], dead[group], task.ridge
        )
    # -0.0 + 0.0 is 0.0: what is zero stays the zero that compresses best.
    new = np.where(keep, wide + change / task.scale, 0.0).astype(old.dtype) + 0
    new = new.astype(old.dtype)
    moved = (new.astype(np.float64) - wide) * task.scale
    if not np.isfinite(moved).all():
        return None
    return layout.array(new), moved


def _one_group(
    gram: Float64,
    wanted: Float64,
    keep: NDArray[np.bool_],
    dead: NDArray[np.bool_],
    ridge: float,
) -> Float64:
    """Minimise ``tr(D G D^T) - 2 tr(D C) + ridge |D|^2`` over ``D`` where it is free.

    Args:
        gram: ``G``, [inputs, inputs].
        wanted: ``C``, [inputs, outputs].
        keep: Which entries are free, [outputs, inputs].
        dead: Inputs that were always zero.
        ridge: As a share of the mean diagonal of ``G``.
    """
    diagonal = np.einsum("ii->i", gram)
    live = max(int((~dead).sum()), 1)
    damping = ridge * max(float(diagonal[~dead].sum()), 0.0) / live
    matrix = gram.copy()
    np.einsum("ii->i", matrix)[:] += damping
    np.einsum("ii->i", matrix)[dead] += 1.0
    extra = 1e-10 * max(float(diagonal.max(initial=0.0)), 1e-30)
    while True:
        factor, failed = lapack.dpotrf(matrix, lower=1)
        if not failed:
            break
        np.einsum("ii->i", matrix)[:] += extra
        extra *= 10
    free, _ = lapack.dpotrs(factor, wanted, lower=1)
    best = np.asarray(free).T
    if keep.all():
        return best
    change = np.zeros(keep.shape)
    if (keep == keep[0]).all():
        at = np.flatnonzero(keep[0])
        if at.size:
            _, found, _ = lapack.dposv(matrix[np.ix_(at, at)], wanted[at], lower=1)
            change[:, at] = found.T
        return change
    # The distance to the free optimum in the metric of ``matrix`` is what is left.
    curvature = Curvature(matrix[None], dead[None])
    return np.asarray(refit(best[None], curvature, keep[None])[0])


def _norm_parameters(model: Model, node: Node) -> tuple[Float64, np.dtype[Any]]:
    """Return scale, bias, mean, variance and epsilon, [5, channels]."""
    weights = [model.constant(node.inputs[index]) for index in range(1, 5)]
    arrays = [w.read().astype(np.float64) for w in weights if w is not None]
    epsilon = np.full_like(arrays[0], float(attribute(node, "epsilon", 1e-5)))
    dtype = weights[2].dtype if weights[2] is not None else np.dtype(np.float32)
    return np.stack([*arrays, epsilon]), dtype


def _norm_candidate(
    task: _Task, mean: Float64
) -> Iterator[tuple[Array, Float64, Float64]]:
    assert task.parameters is not None
    scale, _, old_mean, old_variance, epsilon = task.parameters
    fresh_mean = mean[:, 0]
    spread = task.fit.gram[:, 0, 0] / task.fit.rows - np.square(fresh_mean)
    new = np.stack([fresh_mean, np.maximum(spread, 0.0)]).astype(task.dtype)
    new_mean, new_variance = new.astype(np.float64)
    before = scale / np.sqrt(old_variance + epsilon)
    after = scale / np.sqrt(new_variance + epsilon)
    shift = before * old_mean - after * new_mean
    if np.isfinite(after).all() and np.isfinite(shift).all():
        yield new, (after - before)[:, None, None], shift[:, None]


def _write(model: Model, work: _Work, outcome: _Outcome, ctx: Context) -> None:
    if outcome.why_not:
        ctx.skipped(work.where, outcome.why_not)
        return
    words = f"output error {outcome.before:.3%} -> {outcome.after:.3%}"
    if outcome.values is not None and work.mode == "norm":
        for index, values in zip((3, 4), outcome.values, strict=True):
            weight = model.constant(work.node.inputs[index])
            assert weight is not None
            model.set_weight(weight, values.reshape(weight.shape))
    elif outcome.values is not None and work.factor is not None:
        _multiply(model, work, work.factor, outcome.values)
        words += ", scale only" if outcome.shift is None else ", scale and bias"
        words += f": {work.why_bias}"
    elif outcome.values is not None:
        model.set_weight(work.where, outcome.values)
    elif work.why_bias:
        words += f", bias only: {work.why_bias}"
    else:
        words += ", bias only"
    if outcome.shift is not None:
        _shift(model, work, outcome.shift)
    ctx.did(work.where, words)


def _multiply(model: Model, work: _Work, factor: _Factor, values: Array) -> None:
    """Multiply the outputs of a layer of codes through its scale."""
    if work.bias is not None and factor.has_bias:
        old = _decoded_bias(work)
        if work.bias_scale is not None:
            scale = work.bias_scale.read()
            wide = values if scale.size == values.size else values[:1]
            model.set_weight(
                work.bias_scale, (scale * wide.reshape(scale.shape)).astype(np.float32)
            )
        _set_bias(model, work, old * values)
    scale = factor.scale.read()
    by = values.reshape(factor.shape) if factor.shape else values[0]
    model.set_weight(factor.scale, (scale * by).astype(scale.dtype))


def _decoded_bias(work: _Work) -> Float64:
    assert work.bias is not None
    values = np.asarray(work.bias.read(), np.float64)
    if work.bias_scale is not None:
        values = values * work.bias_scale.read()
    return values


def _set_bias(model: Model, work: _Work, values: Float64) -> None:
    bias = work.bias
    assert bias is not None
    if work.bias_scale is not None:
        limits = np.iinfo(bias.dtype)
        codes = np.rint(values / work.bias_scale.read())
        values = np.clip(codes, limits.min, limits.max)
    model.set_weight(bias, values.astype(bias.dtype))


def _shift(model: Model, work: _Work, shift: Float64) -> None:
    """Add to the outputs of a layer through its bias."""
    if work.bias is not None:
        wide = _decoded_bias(work)
        _set_bias(model, work, wide + shift.reshape(wide.shape))
        return
    weight = model.weight(work.where)
    values = shift.reshape(-1).astype(weight.dtype)
    made = model.add_weight(f"{work.where}_bias", values)
    if len(work.node.inputs) > 2:
        work.node.inputs[2] = made
    else:
        work.node.inputs.append(made)
