"""Half: 16-bit floating point, for the file alone or for the arithmetic as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.activations.gathering import unavailable
from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.statistics import Range
from onnxshrink.storage.encoder import Encoder, Encoding, plain_nbytes
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.selection import selected
from onnxshrink.tensors import numpy_type

__all__ = ["Half"]

Array = np.ndarray[Any, Any]

_FLOAT = onnx.TensorProto.FLOAT
_KINDS = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
_NAMES = {"fp16": "float16", "bf16": "bfloat16"}
_LARGEST = 65504.0
_MARGIN = 2.0
"""How much larger than in calibration an activation may get."""
_SMALLEST_NORMAL = 2.0**-14
_NODE_BYTES = 60
"""Bytes of the Cast that turns a stored half into a float, and of its names."""
_UNDERFLOW = {"fp16": 2.0**-10, "bf16": 2.0**-7}
"""Relative error of a tensor beyond which rounding alone, twice the unit roundoff at
most, cannot be the cause: values got lost below the smallest number."""
_TYPED = frozenset(
    {
        "Cast",
        "CastLike",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "EyeLike",
        "QuantizeLinear",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "If",
        "Loop",
        "Scan",
        "Optional",
        "OptionalGetElement",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceMap",
        "ConcatFromSequence",
        "SplitToSequence",
    }
)
"""Operators whose result has the type that an attribute, a scale or a body states."""
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear", "MatMulNBits"})
FRAGILE = (
    "BatchNormalization",
    "CumSum",
    "Exp",
    "GRU",
    "GroupNormalization",
    "InstanceNormalization",
    "LSTM",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "NonMaxSuppression",
    "Pow",
    "RNN",
    "Range",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Resize",
    "RoiAlign",
    "Softmax",
    "TopK",
    "Upsample",
)
"""Sums of many terms, exponentials, coordinates and indices: 11 bits do harm to them,
and they take little of the time. LeakyRelu in fp16 runs as three operators on a CPU.
"""


@dataclass(frozen=True, kw_only=True)
class Half(SitePass):
    """Use 16-bit floating point: half the bytes, three to four digits.

    ``mode=storage`` rounds weights to values that a half holds; the file stores them as
    such behind a Cast that folds at load, so that nothing else changes and any runtime
    computes as before. ``mode=compute`` runs the operators themselves in halves, inputs
    and outputs stay float32. onnxruntime's CPU provider has few kernels for halves and
    puts Casts around the others, which costs time: it pays on GPUs and on processors
    that have them.

    What does not fit stays float32, and is named: values beyond 65504, tensors that
    would vanish, and with data, operators whose activations are too large or too small.

    Attributes:
        type: ``fp16`` has 11 bits of precision up to 65504, ``bf16`` 8 bits and the
            range of float32.
        mode: ``storage`` for the file alone, ``compute`` for the arithmetic as well.
        float32: Operator types that ``mode=compute`` leaves in float32: by default
            sums of many terms, exponentials, recurrent layers, coordinates and indices.
    """

    name: ClassVar[str] = "half"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "half:mode=compute"
    renamed: ClassVar[Mapping[str, str]] = {"keep": "float32=OPERATOR"}

    type: Literal["fp16", "bf16"] = "fp16"
    mode: Literal["storage", "compute"] = "storage"
    float32: tuple[str, ...] = FRAGILE

    def sites(self, model: Model, ctx: Context) -> list[Site]:
        """List the weights to round, or the nodes to run in halves."""
        if self.mode == "storage":
            return list(self._weights(model, ctx))
        if self.type == "bf16" and set(ctx.providers) <= {"CPUExecutionProvider"}:
            ctx.skipped(
                "model",
                "onnxruntime's CPU provider has no bfloat16 kernels of arithmetic; "
                "take type=fp16, mode=storage or another --provider",
            )
            return []
        return self._nodes(model, ctx)

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Round one weight, or run one node in halves."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Act at the given sites."""
        if not sites:
            return
        if self.mode == "compute":
            if set(ctx.providers) <= {"CPUExecutionProvider"}:
                ctx.warn(
                    "half:mode=compute pays on GPUs: on most processors onnxruntime "
                    "puts Casts around operators in fp16, and the model takes longer"
                )
            _Conversion(model, self.type).convert({site.where for site in sites}, ctx)
            return
        weights = {weight.name: weight for weight in model.weights()}
        for index, site in enumerate(sites):
            weight = weights[site.where]
            rounded = _rounded(weight.read(), self.type)
            model.set_weight(weight, rounded.astype(np.float32))
            ctx.did(site.where, f"rounded to {_NAMES[self.type]}")
            ctx.progress(index + 1, len(sites), self.name)

    # --- storage ------------------------------------------------------------------

    def _weights(self, model: Model, ctx: Context) -> Iterator[Site]:
        encoder = Encoder(opset=model.opset, fresh=lambda name: name)
        found = False
        others: Counter[str] = Counter()
        for weight in model.weights():
            nodes = [node for node, _ in weight.uses]
            names = [weight.name]
            names += [name for node in nodes for name in (node.name, node.op)]
            if not selected(names, self.only, self.skip):
                continue
            found = True
            if weight.data_type != _FLOAT:
                others[onnx.TensorProto.DataType.Name(weight.data_type).lower()] += 1
                continue
            why = _not_stored(weight) or self._stored(weight, encoder)
            if why:
                ctx.skipped(weight.name, why)
                continue
            saved = plain_nbytes(weight.name, weight.tensor) - weight.nbytes // 2
            kind = nodes[0].op if nodes else "unused"
            yield Site(weight.name, kind, Savings(bytes=saved - _NODE_BYTES))
        for name, count in others.items():
            ctx.skipped(name, f"{count} weights hold {name}, not float32")
        if not found:
            ctx.skipped("model", "it has no weight that was chosen")

    def _stored(self, weight: Weight, encoder: Encoder) -> str:
        """Why rounding a weight would be in vain or wrong, or nothing."""
        plain = plain_nbytes(weight.name, weight.tensor)
        if weight.nbytes // 2 <= _NODE_BYTES:
            return f"has {weight.nbytes} bytes, too few to save any"
        encoded: Encoding | None = encoder.encode(weight.name, weight.tensor)
        if encoded is not None and encoded.nbytes <= plain - weight.nbytes // 2:
            return f"is stored in {encoded.nbytes} bytes already ({encoded.kind})"
        return _misfit(weight.chunks(), self.type) or (
            f"holds {_NAMES[self.type]} values already"
            if all(
                np.array_equal(_rounded(chunk, self.type).astype(np.float32), chunk)
                for chunk in weight.chunks()
            )
            else ""
        )

    # --- compute ------------------------------------------------------------------

    def _nodes(self, model: Model, ctx: Context) -> list[Site]:
        conversion = _Conversion(model, self.type)
        found: list[tuple[str, Node, _Reads]] = []
        kept: Counter[str] = Counter()
        for where, node in conversion.named():
            if not selected([where, node.name, node.op], self.only, self.skip):
                continue
            if node.op in self.float32:
                kept[node.op] += 1
                continue
            if _in_codes(node):
                ctx.skipped(where, "it computes with codes, or between them")
                continue
            if _is_depthwise(node):
                ctx.skipped(where, "fp16 kernels of depthwise Conv are slow")
                continue
            reads = conversion.reads(node)
            why = reads if isinstance(reads, str) else conversion.misfit(reads)
            if why:
                ctx.skipped(where, why)
            elif not isinstance(reads, str):
                found.append((where, node, reads))
        for op, count in kept.items():
            ctx.skipped(op, f"{count} of them stay; float32= says which do")
        if model.graph.functions:
            ctx.skipped("functions", "nodes inside keep their types; run fold first")
        if self.type == "fp16":
            found = self._within(model, found, ctx)
        if not found:
            ctx.skipped("model", "no operator in float32 is left to run in halves")
        return [
            Site(where, node.op, Savings(bytes=conversion.saved(reads)))
            for where, node, reads in found
        ]

    def _within(
        self,
        model: Model,
        found: Sequence[tuple[str, Node, _Reads]],
        ctx: Context,
    ) -> list[tuple[str, Node, _Reads]]:
        """Leave out nodes with values that calibration shows not to fit a half."""
        samples = ctx.samples.calibration
        if samples is None or not samples.used:
            return list(found)
        names = {
            tensor.name
            for _, _, reads in found
            for tensor in (*reads.inputs.values(), *reads.outputs.values())
            if model.constant(tensor) is None
        }
        hidden = unavailable(model, sorted(names))
        wanted = {name: Range() for name in sorted(names - hidden.keys())}
        seen = ctx.statistics(model, wanted) if wanted else {}
        wide = {name: _out_of_range(seen[name]) for name in seen}
        fits = []
        for where, node, reads in found:
            tensors = (*reads.inputs.values(), *reads.outputs.values())
            why = next((w for t in tensors if (w := wide.get(t.name, ""))), "")
            if why:
                ctx.skipped(where, why)
            else:
                fits.append((where, node, reads))
        return fits


def _in_codes(node: Node) -> bool:
    """Whether a node stands between QuantizeLinear and DequantizeLinear.

    With its floats in fp16, onnxruntime finds no integer kernel for it.
    """
    near = [maker for tensor in node.inputs for maker in tensor.inputs]
    near += [reader for tensor in node.outputs for reader in tensor.outputs]
    return any(
        other.op in _SCALED or other.op in ("DynamicQuantizeLinear", "MatMulInteger")
        for other in near
    )


def _is_depthwise(node: Node) -> bool:
    """Whether a Conv has as many groups as channels."""
    groups = int(attribute(node, "group", 1)) if node.op == "Conv" else 1
    shape = getattr(node.inputs[1], "shape", None) if groups > 1 else None
    return bool(shape) and shape is not None and shape[1] == 1


def _rounded(values: Array, kind: str) -> Array:
    # Values beyond the range become infinite, which callers look for.
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(numpy_type(_KINDS[kind]))


def _misfit(chunks: Iterator[Array], kind: str) -> str:
    """Why values cannot be halves, or nothing."""
    lost = total = 0.0
    for chunk in chunks:
        rounded = _rounded(chunk, kind).astype(np.float64)
        broken = np.isinf(rounded) & np.isfinite(chunk)
        if broken.any():
            value = float(np.abs(chunk[broken]).max())
            return f"holds {value:.4g}, beyond the range of {_NAMES[kind]}"
        finite = np.isfinite(chunk)
        exact = chunk[finite].astype(np.float64)
        lost += float(((exact - rounded[finite]) ** 2).sum())
        total += float((exact**2).sum())
    if lost > _UNDERFLOW[kind] ** 2 * total:
        return f"holds values too small for {_NAMES[kind]}"
    return ""


def _not_stored(weight: Weight) -> str:
    """Why a weight is not one to round, whatever its values, or nothing."""
    if weight.node is not None:
        return "is a Constant node, which is written as it is; run fold first"
    if weight.is_input:
        return (
            "is a graph input that a caller may set; fold:keep_defaults=false makes it "
            "a plain weight"
        )
    if weight.is_output:
        return "is an output of its graph"
    if any(node.op in _SCALED for node, _ in weight.uses):
        return "is a scale of quantized values"
    return ""


def _out_of_range(seen: object) -> str:
    if not isinstance(seen, Range) or seen.empty:
        return ""
    top = float(max(abs(seen.low.min()), abs(seen.high.max())))
    if top * _MARGIN > _LARGEST:
        return f"its values reach {top:.4g} on the samples, too near to 65504"
    if 0 < top < _SMALLEST_NORMAL:
        return f"its values stay below {top:.2g}, too small for float16"
    return ""


# --- running in halves ------------------------------------------------------------


@dataclass(frozen=True)
class _Reads:
    """Inputs and outputs of a node that change their type, by index."""

    inputs: Mapping[int, gs.Tensor]
    outputs: Mapping[int, gs.Tensor]


class _Conversion:
    """Runs nodes in halves, with Casts where they meet the others.

    Every float tensor keeps its name and type for whoever is not converted: graph
    outputs, bodies of If and Loop, nodes left alone. What is converted reads and writes
    a second tensor, so that any set of nodes gives a valid model.
    """

    def __init__(self, model: Model, kind: str) -> None:
        self.model = model
        self.kind = kind
        self._type = _KINDS[kind]
        self._types = {
            name: info.data_type for name, info in value_infos(model).items()
        }
        self._graphs = list(_bodies(model.graph))
        self._home: dict[int, gs.Graph] = {}
        for graph in self._graphs:
            for tensor in graph.inputs:
                self._home[id(tensor)] = graph
            for node in graph.nodes:
                for tensor in node.outputs:
                    self._home[id(tensor)] = graph

    def named(self) -> Iterator[tuple[str, Node]]:
        """Yield the nodes that might be converted, each under a name of its own."""
        taken: set[str] = set()
        for number, graph in enumerate(self._graphs):
            for node in graph.nodes:
                if node.op in _TYPED or not is_onnx(node.domain):
                    continue
                made = next((t.name for t in node.outputs if t.name), node.op)
                where = node.name or made
                if where in taken:
                    where = f"{graph.name or 'graph'}#{number}/{made}"
                taken.add(where)
                if any(self._is_float(t) for t in (*node.inputs, *node.outputs)):
                    yield where, node

    def reads(self, node: Node) -> _Reads | str:
        """Return which tensors change with a node, or why it cannot be converted."""
        try:
            schema = onnx.defs.get_schema(node.op, self.model.opset, "")
        except onnx.defs.SchemaError:
            return f"{node.op} is not an operator of opset {self.model.opset}"
        word = f"tensor({_NAMES[self.kind]})"
        halves = {
            c.type_param_str
            for c in schema.type_constraints
            if word in c.allowed_type_strs and "tensor(float)" in c.allowed_type_strs
        }
        sides = []
        for tensors, formals in (
            (node.inputs, schema.inputs),
            (node.outputs, schema.outputs),
        ):
            side: dict[int, gs.Tensor] = {}
            for index, tensor in enumerate(tensors):
                formal = formals[min(index, len(formals) - 1)]
                if not tensor.name or formal.type_str not in halves:
                    continue
                data_type = self._type_of(tensor)
                if not data_type:
                    return f"the type of {tensor.name!r} is not known"
                if data_type == _FLOAT:
                    side[index] = tensor
            sides.append(side)
        if not any(sides):
            return f"{node.op} takes no {_NAMES[self.kind]} here"
        return _Reads(*sides)

    def misfit(self, reads: _Reads) -> str:
        """Why the constants a node reads cannot be halves, or nothing."""
        for tensor in reads.inputs.values():
            weight = self.model.constant(tensor)
            if weight is None or weight.is_input:
                continue
            why = _misfit(weight.chunks(), self.kind)
            if why:
                return f"{weight.name!r} {why}"
        return ""

    def saved(self, reads: _Reads) -> int:
        """Bytes of the constants a node reads that halves do not need."""
        weights = [self.model.constant(t) for t in reads.inputs.values()]
        return sum(w.nbytes // 2 for w in weights if w is not None)

    def convert(self, chosen: set[str], ctx: Context) -> None:
        """Convert the nodes of these names."""
        work: list[tuple[str, Node, _Reads]] = []
        for where, node in self.named():
            reads = self.reads(node) if where in chosen else ""
            if not isinstance(reads, str):
                work.append((where, node, reads))
        for _, node, reads in work:
            for index, tensor in reads.outputs.items():
                self._make_half(node, index, tensor)
        for number, (where, node, reads) in enumerate(work):
            for index in reads.inputs:
                # Read again: a weight may have become a half for an earlier node.
                node.inputs[index] = self._half(node.inputs[index])
            ctx.did(where, f"runs in {_NAMES[self.kind]}")
            ctx.progress(number + 1, len(work), "half")
        self.model.drop_unused()

    def _make_half(self, node: Node, index: int, tensor: gs.Tensor) -> None:
        """Let a node make a half; a Cast of it gives what the node made before."""
        half = self._variable(tensor)
        node.outputs[index] = half
        self._cast(half, tensor, _FLOAT, self._home[id(tensor)])

    def _half(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return the half of a float tensor: what there is, or a new one."""
        while tensor.inputs and tensor.inputs[0].op == "Identity":
            tensor = tensor.inputs[0].inputs[0]
        weight = self.model.constant(tensor)
        if weight is not None and not weight.is_input and not weight.is_output:
            return self._constant(weight)
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is not None and maker.op == "Cast" and self._is_half(maker.inputs[0]):
            return maker.inputs[0]
        graph = self._home[id(tensor)] if weight is None else weight.graph
        for reader in tensor.outputs:
            made = reader.outputs[0] if reader.op == "Cast" else None
            if made is not None and self._is_half(made) and self._in(made, graph):
                return made
        half = self._variable(tensor)
        self._cast(tensor, half, self._type, graph)
        return half

    def _constant(self, weight: Weight) -> gs.Tensor:
        """Make a weight a half; readers that need floats read a Cast of it."""
        value, graph = weight.value, weight.graph
        half = self.model.add_weight(
            f"{value.name}_{self.kind}", _rounded(weight.read(), self.kind), graph
        )
        single = gs.Variable(
            self.model.fresh(f"{value.name}_float"), np.float32, list(weight.shape)
        )
        self._cast(half, single, _FLOAT, graph)
        self.model.replace_uses(value, single)
        return half

    def _cast(
        self, source: gs.Tensor, target: gs.Tensor, data_type: int, graph: gs.Graph
    ) -> None:
        attrs = {"to": data_type}
        self.model.add_node(
            "Cast", [source], outputs=[target], attrs=attrs, graph=graph
        )
        self._home[id(target)] = graph

    def _variable(self, tensor: gs.Tensor) -> gs.Variable:
        name = self.model.fresh(f"{tensor.name}_{self.kind}")
        shape = None if tensor.shape is None else list(tensor.shape)
        return gs.Variable(name, numpy_type(self._type), shape)

    def _in(self, tensor: gs.Tensor, graph: gs.Graph) -> bool:
        return self._home.get(id(tensor)) is graph

    def _type_of(self, tensor: gs.Tensor) -> int:
        """Return the element type of a tensor, 0 where nothing tells."""
        weight = self.model.constant(tensor)
        if weight is not None:
            return weight.data_type
        return int(self._types.get(tensor.name, 0))

    def _is_float(self, tensor: gs.Tensor) -> bool:
        return bool(tensor.name) and self._type_of(tensor) in (_FLOAT, 0)

    def _is_half(self, tensor: gs.Tensor) -> bool:
        weight = self.model.constant(tensor)
        if weight is not None:
            return weight.data_type == self._type
        known = self._types.get(tensor.name)
        if known is None and tensor.dtype is not None:
            return bool(np.dtype(tensor.dtype) == numpy_type(self._type))
        return known == self._type


def _bodies(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield a graph and the bodies inside it."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _bodies(value)
