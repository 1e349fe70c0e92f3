"""What a model is made of: where its bytes, parameters and multiply-accumulates are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxshrink.base import Progress
from onnxshrink.errors import OnnxshrinkError
from onnxshrink.measuring.measure import count_parameters, file_bytes
from onnxshrink.model import Model, Node, ValueInfo, Weight
from onnxshrink.samples import Samples
from onnxshrink.samples.random_inputs import random_shapes
from onnxshrink.storage import Encoder
from onnxshrink.storage.census import MAX_CODES, Codes, bits_view
from onnxshrink.structure.shapes import macs_by_value
from onnxshrink.tensors import ArrayTensor, LazyTensor
from onnxshrink.terminal import (
    clean,
    count_text,
    middle,
    percent_text,
    size_text,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["Group", "Inventory", "Layer", "WeightEntry", "inventory", "type_name"]

_FIRST_BLOCK = 1 << 11
"""Values read first; most weights have too many distinct ones already in these."""
_BLOCK = 1 << 16
_SAMPLED = 64 << 20
"""Bytes from which a part of a weight is encoded to see what that saves."""
_SAMPLE = 32 << 20


@dataclass(frozen=True)
class WeightEntry:
    """One value that the model carries.

    Attributes:
        name: Name of the initializer or of the Constant node's output.
        used_by: ``op type`` of each node that reads it, sorted, without repetition.
        nodes: How many inputs of nodes read it; above one it is shared.
        dtype: ONNX element type in small letters.
        shape: Static shape.
        nbytes: Bytes as plain ONNX raw data.
        size: Number of elements.
        nonzeros: Elements that are not zero; ``None`` for strings.
        distinct: Number of distinct bit patterns, ``None`` if there are more than 256.
        encoding: Smallest exact in-graph encoding, ``plain`` if nothing is smaller;
            ``None`` if none was tried.
        encoded: Bytes with that encoding, nodes and tables included.
        estimated: Whether only a sample of a large weight was encoded.
    """

    name: str
    used_by: tuple[str, ...]
    nodes: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    size: int
    nonzeros: int | None
    distinct: int | None
    encoding: str | None
    encoded: int
    estimated: bool


@dataclass(frozen=True)
class Layer:
    """One node that does multiply-accumulates or reads weights.

    Attributes:
        name: Name of the node; made from its output where it has none.
        op: Operator type, with its domain unless that is ai.onnx.
        values: Elements of the weights that it is the first to read.
        nbytes: Plain bytes of these.
        macs: Multiply-accumulates with the inputs assumed; ``None`` if unknown.
    """

    name: str
    op: str
    values: int
    nbytes: int
    macs: int | None


@dataclass(frozen=True)
class Group:
    """Totals over all nodes of one operator type, or all weights of one element type.

    Attributes:
        name: Operator or element type.
        count: Nodes or weights.
        values: Elements of weights.
        nbytes: Plain bytes of these.
        macs: Multiply-accumulates; 0 for element types.
    """

    name: str
    count: int
    values: int
    nbytes: int
    macs: int = 0


@dataclass(frozen=True)
class Inventory:
    """Everything ``onnxshrink inspect`` shows.

    Attributes:
        model: What was inspected.
        file_bytes: Bytes of the model file and of its external data.
        ir_version: IR version.
        opsets: Operator set versions by domain.
        producer: Who made the file, if it says so.
        inputs: Required inputs as (name, type, shape).
        outputs: Outputs as (name, type, shape).
        nodes: Nodes of the main graph, of subgraphs and of functions.
        subgraphs: Bodies of If, Loop and Scan.
        functions: Model-local functions.
        parameters: As a report counts them: values of weights, not of shapes.
        nonzeros: Those that are not zero.
        weight_bytes: Plain bytes of all weights.
        encoded_bytes: Bytes of all weights in their smallest exact encoding.
        macs: Multiply-accumulates of one run with the inputs assumed, as far as known;
            ``None`` if no input could be made up.
        macs_unknown: Nodes whose multiply-accumulates could not be told.
        assumed: Shape assumed for each input that leaves dimensions open.
        ops: By operator type, most bytes first.
        dtypes: By element type, most bytes first.
        layers: Nodes, most bytes first.
        weights: Weights, most bytes first.
    """

    model: str
    file_bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    nodes: int
    subgraphs: int
    functions: int
    parameters: int
    nonzeros: int
    weight_bytes: int
    encoded_bytes: int
    macs: int | None
    macs_unknown: int
    assumed: Mapping[str, tuple[int, ...]]
    ops: tuple[Group, ...]
    dtypes: tuple[Group, ...]
    layers: tuple[Layer, ...]
    weights: tuple[WeightEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        return asdict(self)

    def render(self, console: Console, *, top: int = 15) -> None:
        """Print it; each table shows ``top`` rows, 0 shows all."""
        for line in self._facts():
            console.print(line, soft_wrap=True)
        _cut(console, "operators", self._op_table(top), len(self.ops), top)
        _cut(console, "types", self._dtype_table(), len(self.dtypes), 0)
        _cut(console, "layers", self._layer_table(top), len(self.layers), top)
        _cut(console, "weights", self._weight_table(top), len(self.weights), top)
        console.print(self._saving(), soft_wrap=True)

    def _facts(self) -> list[str]:
        opsets = ", ".join(
            f"{clean(domain) or 'ai.onnx'} {version}"
            for domain, version in self.opsets.items()
        )
        lines = [
            f"{clean(self.model)}: {size_text(self.file_bytes)}, "
            f"{count_text(self.parameters)} parameters, "
            f"{percent_text(self.parameters - self.nonzeros, self.parameters)} zeros, "
            f"{count_text(self.macs)} MACs, {self.nodes} nodes",
            f"opset {opsets}; IR version {self.ir_version}"
            + (f"; made by {clean(self.producer, 80)}" if self.producer else ""),
        ]
        if self.subgraphs or self.functions:
            lines.append(f"{self.subgraphs} subgraphs, {self.functions} functions")
        for what, values in (("input", self.inputs), ("output", self.outputs)):
            lines += [
                f"{what} {clean(name, 80)}: {dtype} {shape}"
                for name, dtype, shape in values
            ]
        if self.assumed:
            shapes = ", ".join(
                f"{clean(name, 80)}={'x'.join(map(str, shape))}"
                for name, shape in self.assumed.items()
            )
            lines.append(f"MACs are for {shapes}")
        if self.macs_unknown:
            lines.append(
                f"MACs of {self.macs_unknown} nodes are unknown and not counted"
            )
        return lines

    def _op_table(self, top: int) -> Table:
        made = table(["operator", "nodes", "values", "bytes", "share", "MACs"])
        for group in self.ops[: top or None]:
            made.add_row(
                clean(group.name, 60),
                str(group.count),
                count_text(group.values),
                size_text(group.nbytes),
                percent_text(group.nbytes, self.weight_bytes),
                count_text(group.macs),
            )
        return made

    def _dtype_table(self) -> Table:
        made = table(["weight type", "weights", "values", "bytes", "share"])
        for group in self.dtypes:
            made.add_row(
                group.name,
                str(group.count),
                count_text(group.values),
                size_text(group.nbytes),
                percent_text(group.nbytes, self.weight_bytes),
            )
        return made

    def _layer_table(self, top: int) -> Table:
        made = table(
            ["layer", "operator", "values", "bytes", "share", "MACs", "share"],
            left=(0, 1),
        )
        for layer in self.layers[: top or None]:
            made.add_row(
                middle(layer.name, 60),
                clean(layer.op, 40),
                count_text(layer.values),
                size_text(layer.nbytes),
                percent_text(layer.nbytes, self.weight_bytes),
                count_text(layer.macs),
                percent_text(layer.macs or 0, self.macs or 0),
            )
        return made

    def _weight_table(self, top: int) -> Table:
        made = table(
            [
                "weight",
                "used by",
                "type",
                "shape",
                "bytes",
                "zeros",
                "distinct",
                "could be",
            ],
            left=(0, 1, 2, 7),
            wrap=(0, 1),
        )
        for weight in self.weights[: top or None]:
            zeros = "-"
            if weight.nonzeros is not None:
                zeros = percent_text(weight.size - weight.nonzeros, weight.size)
            used = ", ".join(weight.used_by) or "nothing"
            made.add_row(
                middle(weight.name, 60),
                clean(used, 30) + (f" ({weight.nodes}x)" if weight.nodes > 1 else ""),
                weight.dtype,
                "x".join(map(str, weight.shape)) or "scalar",
                size_text(weight.nbytes),
                zeros,
                ">256" if weight.distinct is None else str(weight.distinct),
                _could_be(weight),
            )
        return made

    def _saving(self) -> str:
        saved = self.weight_bytes - self.encoded_bytes
        about = "about " if any(w.estimated for w in self.weights) else ""
        return (
            f"Weights take {size_text(self.weight_bytes)} plain and {about}"
            f"{size_text(self.encoded_bytes)} in their smallest exact encoding "
            f"({percent_text(saved, self.weight_bytes)} less)."
        )


def _could_be(weight: WeightEntry) -> str:
    if weight.encoding in (None, "plain"):
        return size_text(weight.encoded)
    about = "~" if weight.estimated else ""
    return f"{about}{size_text(weight.encoded)} {weight.encoding}"


def _cut(console: Console, what: str, shown: Table, total: int, top: int) -> None:
    if not total:
        return
    console.print(shown)
    if top and total > top:
        console.print(f"... {total - top} more {what}; --top 0 shows all")


def inventory(
    model: Model,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
) -> Inventory:
    """Take stock of a model; tensors are read in chunks, one after the other.

    Args:
        model: The model; it is not changed.
        shapes: Shapes of inputs that leave dimensions open; open dimensions are 1
            where nothing is said.
        progress: Receives how many weights are done.
    """
    weights = list(model.weights())
    encoder = Encoder(opset=model.opset, fresh=lambda name: name)
    entries = []
    for index, weight in enumerate(weights):
        if progress is not None:
            progress(index, len(weights), "reading weights")
        entries.append(_entry(weight, encoder))
    assumed, macs = _macs(model, shapes or {})
    parameters, nonzeros = count_parameters(model)
    nodes = list(model.nodes())
    read = _reads(weights)
    layers = [_layer(node, read.get(id(node), []), macs or {}) for node in nodes]
    infos = [model.inputs, model.outputs]
    inputs, outputs = (tuple(_described(info) for info in some) for some in infos)
    graphs = list(model.graphs())
    functions = len(model.graph.functions)
    counted = [number for number in (macs or {}).values() if number is not None]
    return Inventory(
        model=str(model.source or "model"),
        file_bytes=_file_bytes(model),
        ir_version=model.ir_version,
        opsets=model.opsets,
        producer=" ".join(
            filter(None, (model.graph.producer_name, model.graph.producer_version))
        ),
        inputs=inputs,
        outputs=outputs,
        nodes=len(nodes),
        subgraphs=len(graphs) - 1 - functions,
        functions=functions,
        parameters=parameters,
        nonzeros=nonzeros,
        weight_bytes=sum(entry.nbytes for entry in entries),
        encoded_bytes=sum(entry.encoded for entry in entries),
        macs=None if macs is None else sum(counted),
        macs_unknown=0 if macs is None else len(macs) - len(counted),
        assumed=assumed,
        ops=_by_op(layers),
        dtypes=_by_type(entries),
        layers=tuple(
            sorted(
                (layer for layer in layers if layer.values or layer.macs),
                key=lambda layer: (-layer.nbytes, -(layer.macs or 0)),
            )
        ),
        weights=tuple(sorted(entries, key=lambda entry: -entry.nbytes)),
    )


def type_name(data_type: int) -> str:
    """Return an ONNX element type in small letters; ``?`` if it is unknown."""
    try:
        return str(onnx.TensorProto.DataType.Name(data_type)).lower()
    except ValueError:
        return "?"


@dataclass(frozen=True)
class Values:
    """What one reading of a tensor counts.

    Attributes:
        nonzeros: Values that are not zero; ``None`` for strings.
        distinct: Distinct bit patterns, ``None`` if there are more than 256.
        sample: The tensor itself, or evenly spaced parts of a large one.
    """

    nonzeros: int | None
    distinct: int | None
    sample: LazyTensor


def count_values(tensor: LazyTensor, sampled: int = _SAMPLED) -> Values:
    """Read a tensor once, in chunks, and count its values.

    Args:
        tensor: Any tensor.
        sampled: Bytes from which ``sample`` holds a part only.
    """
    if tensor.data_type == onnx.TensorProto.STRING:
        texts = set(tensor.read().reshape(-1).tolist())
        return Values(None, _few(len(texts)), tensor)
    patterns = _Distinct()
    nonzeros = 0
    stride = -(-tensor.nbytes // _SAMPLE) if tensor.nbytes >= sampled else 0
    kept = []
    for number, chunk in enumerate(tensor.chunks()):
        # In types that are not its own, numpy counts bits, so that -0.0 is not zero.
        own = chunk.dtype.isbuiltin == 1
        nonzeros += int(np.count_nonzero(chunk if own else chunk.astype(np.float32)))
        patterns.update(chunk)
        if stride and number % stride == 0:
            kept.append(chunk)
    sample = ArrayTensor(np.concatenate(kept), tensor.data_type) if kept else tensor
    return Values(nonzeros, patterns.count, sample)


class _Distinct:
    """Counts distinct bit patterns until there are too many."""

    def __init__(self) -> None:
        self._codes: Codes | None = None
        self._many = False
        self._block = _FIRST_BLOCK

    @property
    def count(self) -> int | None:
        """How many there are, ``None`` if there are more than 256."""
        if self._many:
            return None
        return 0 if self._codes is None else int(self._codes.keys.size)

    def update(self, chunk: np.ndarray[Any, Any]) -> None:
        """Count the patterns of a flat array too."""
        start = 0
        while start < chunk.size and not self._many:
            found = bits_view(chunk[start : start + self._block])
            start, self._block = start + self._block, _BLOCK
            codes = self._codes
            new = np.unique(found if codes is None else codes.unknown(found))
            if not new.size:
                continue
            keys = new if codes is None else np.union1d(codes.keys, new)
            self._many = _few(keys.size) is None
            if not self._many:
                self._codes = Codes(keys)


def _few(count: int) -> int | None:
    return count if count <= MAX_CODES else None


def _macs(
    model: Model, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int | None] | None]:
    """Return the shapes assumed, and multiply-accumulates by a node's first output."""
    inputs = model.inputs
    try:
        chosen = random_shapes(inputs, shapes)
        if not shapes:
            # Inputs of a smoke test have two samples; the figures are for one.
            for info in inputs:
                if info.shape and not isinstance(info.shape[0], int):
                    chosen[info.name] = (1, *chosen[info.name][1:])
        samples = Samples.random_for(model, seed=0, count=1, shapes=chosen)
        found = macs_by_value(model, samples.read(np.arange(1)))
    except OnnxshrinkError:
        return {}, None
    opened = {
        info.name: chosen[info.name]
        for info in inputs
        if info.shape is None or not all(isinstance(dim, int) for dim in info.shape)
    }
    return opened, found


def _file_bytes(model: Model) -> int:
    if model.source is not None:
        return file_bytes(model.source)
    return len(model.to_bytes())


def _entry(weight: Weight, encoder: Encoder) -> WeightEntry:
    tensor = weight.tensor
    values = count_values(tensor)
    kind, encoded = None, tensor.nbytes
    # Only initializers are encoded when a model is written.
    if weight.node is None:
        encoding = encoder.encode(weight.name, values.sample)
        kind = "plain" if encoding is None else encoding.kind
        if encoding is not None:
            encoded = encoding.nbytes * tensor.nbytes // values.sample.nbytes
    uses = weight.uses
    return WeightEntry(
        name=weight.name,
        used_by=tuple(sorted({_op(node) for node, _ in uses})),
        nodes=len(uses),
        dtype=type_name(tensor.data_type),
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        size=tensor.size,
        nonzeros=values.nonzeros,
        distinct=values.distinct,
        encoding=kind,
        encoded=encoded,
        estimated=values.sample is not tensor,
    )


def _reads(weights: Sequence[Weight]) -> dict[int, list[Weight]]:
    """Return the weights of each node by its id, each at its first reader."""
    read: dict[int, list[Weight]] = defaultdict(list)
    for weight in weights:
        for node, _ in weight.uses[:1]:
            read[id(node)].append(weight)
    return read


def _layer(
    node: Node, weights: Sequence[Weight], macs: Mapping[str, int | None]
) -> Layer:
    made = next((tensor.name for tensor in node.outputs if tensor.name), "")
    return Layer(
        name=node.name or made or node.op,
        op=_op(node),
        values=sum(weight.size for weight in weights),
        nbytes=sum(weight.nbytes for weight in weights),
        macs=macs.get(node.outputs[0].name, 0) if node.outputs else 0,
    )


def _op(node: Node) -> str:
    return f"{node.domain}.{node.op}" if node.domain else str(node.op)


def _by_op(layers: Sequence[Layer]) -> tuple[Group, ...]:
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[layer.op].append(layer)
    return _ordered(
        Group(
            op,
            len(found),
            sum(layer.values for layer in found),
            sum(layer.nbytes for layer in found),
            sum(layer.macs or 0 for layer in found),
        )
        for op, found in groups.items()
    )


def _by_type(entries: Sequence[WeightEntry]) -> tuple[Group, ...]:
    groups: dict[str, list[WeightEntry]] = defaultdict(list)
    for entry in entries:
        groups[entry.dtype].append(entry)
    return _ordered(
        Group(
            dtype,
            len(found),
            sum(entry.size for entry in found),
            sum(entry.nbytes for entry in found),
        )
        for dtype, found in groups.items()
    )


def _ordered(groups: Iterable[Group]) -> tuple[Group, ...]:
    return tuple(sorted(groups, key=lambda g: (-g.nbytes, -g.macs, -g.count, g.name)))


def _described(info: ValueInfo) -> tuple[str, str, str]:
    if info.kind != "tensor":
        return info.name, info.kind, ""
    if info.shape is None:
        return info.name, type_name(info.data_type), "of unknown rank"
    dims = ", ".join("?" if dim is None else clean(dim, 40) for dim in info.shape)
    return info.name, type_name(info.data_type), f"[{dims}]"
