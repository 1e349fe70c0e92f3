"""From the graph back to protos; what is unchanged is written as it was read.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from onnxshrink.errors import ModelError
from onnxshrink.model.topology import (
    Constant,
    Function,
    Graph,
    domain_key,
    subgraphs_of,
    tensor_of,
)
from onnxshrink.package import PackedTensor
from onnxshrink.tensors import (
    ArrayTensor,
    FileTensor,
    LazyTensor,
    SparseTensor,
    same_bits,
)
from onnxshrink.tensors.wire import encode_varint

__all__ = ["Export", "Piece", "attribute_proto", "graph_proto", "in_order"]

_ATTR = onnx.AttributeProto
_RAW_DATA_TAG = encode_varint(9 << 3 | 2)
_INITIALIZER_TAG = encode_varint(5 << 3 | 2)
_GRAPH_TAG = encode_varint(7 << 3 | 2)
_BEHIND_DATA = (
    "doc_string",
    "double_data",
    "uint64_data",
    "external_data",
    "data_location",
    "metadata_props",
)
"""Fields of a tensor with numbers above that of raw_data."""
_BEFORE_GRAPH = (
    "ir_version",
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
)
"""Fields of a model with numbers below that of graph."""


def unknown_fields(message: Message) -> bytes:
    """Return the fields of a message that the installed onnx does not know."""
    out = bytearray()
    entries: Any = UnknownFieldSet(message)
    for entry in entries:
        out += encode_varint(entry.field_number << 3 | entry.wire_type)
        if entry.wire_type == 0:
            out += encode_varint(entry.data)
        elif entry.wire_type == 2:
            out += encode_varint(len(entry.data)) + entry.data
        elif entry.wire_type in (1, 5):
            out += entry.data.to_bytes(8 if entry.wire_type == 1 else 4, "little")
        else:
            raise ModelError("a field of protobuf's old group form cannot be kept")
    return bytes(out)


def partial(message: Any, names: Iterable[str], *, keep: bool = False) -> Any:
    """Return a copy of a proto without some fields, or with ``keep`` of only these.

    Unknown fields are always left out. What is left out is never copied.
    """
    twin = type(message)()
    chosen = frozenset(names)
    for field, value in message.ListFields():
        if (field.name in chosen) is not keep:
            continue
        if isinstance(value, Message):
            getattr(twin, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(twin, field.name).extend(value)
        else:
            setattr(twin, field.name, value)
    return twin


@dataclass
class Piece:
    """One initializer to write.

    Attributes:
        header: The proto; complete if ``tensor`` is ``None``, else without data.
        tensor: The values to write as raw data behind the header.
        constant: The graph's constant that it was made from, if any.
    """

    header: onnx.TensorProto
    tensor: LazyTensor | None = None
    constant: gs.Constant | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes of its values, in the header or behind it."""
        return self.header.ByteSize() if self.tensor is None else self.tensor.nbytes

    def parts(self) -> tuple[bytes, bytes]:
        """Return the bytes before the raw data, and those behind it."""
        late = partial(self.header, _BEHIND_DATA, keep=True)
        late.MergeFromString(unknown_fields(self.header))
        early = partial(self.header, _BEHIND_DATA)
        return early.SerializeToString(deterministic=True), late.SerializeToString(
            deterministic=True
        )

    def same(self, other: Piece) -> bool:
        """Whether another piece would write the same bytes."""
        if self.header != other.header:
            return False
        if self.tensor is None or other.tensor is None:
            return self.tensor is other.tensor
        return same_bits(self.tensor, other.tensor)

    def whole(self) -> onnx.TensorProto:
        """Return a proto with the data in it."""
        if self.tensor is None:
            return self.header
        proto = onnx.TensorProto()
        proto.CopyFrom(self.header)
        proto.raw_data = b"".join(self.tensor.raw_chunks())
        return proto


@dataclass
class Export:
    """A model taken apart for writing: protos around a list of initializers."""

    template: onnx.ModelProto
    head: onnx.GraphProto
    pieces: list[Piece]
    tail: onnx.GraphProto

    def proto(self) -> onnx.ModelProto:
        """Return one proto with all data inline.

        Raises:
            ModelError: It would exceed protobuf's limit of 2 GiB.
        """
        total = sum(piece.data_bytes for piece in self.pieces)
        if total >= 2**31 - 2**20:
            raise ModelError(
                f"{total / 2**30:.1f} GiB of weights do not fit into one protobuf; "
                "save the model to a file with external data instead"
            )
        proto = onnx.ModelProto()
        proto.CopyFrom(self.template)
        graph = proto.graph
        graph.CopyFrom(self.head)
        graph.initializer.extend(piece.whole() for piece in self.pieces)
        graph.MergeFrom(self.tail)
        return proto

    def stream(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes of ``proto()``, one chunk of one tensor at a time."""
        for part in self.parts():
            if isinstance(part, bytes):
                yield part
            else:
                yield from part.raw_chunks()

    def parts(self) -> Iterator[bytes | LazyTensor]:
        """Yield the bytes of ``proto()`` in parts; tensors are yielded unread."""
        head = self.head.SerializeToString(deterministic=True)
        tail = self.tail.SerializeToString(deterministic=True)
        frames: list[tuple[bytes, bytes]] = []
        length = len(head) + len(tail)
        for piece in self.pieces:
            if piece.tensor is None:
                body = piece.header.ByteSize()
                frames.append((_INITIALIZER_TAG + encode_varint(body), b""))
                length += len(frames[-1][0]) + body
                continue
            early, late = piece.parts()
            early += _RAW_DATA_TAG + encode_varint(piece.tensor.nbytes)
            body = len(early) + piece.tensor.nbytes + len(late)
            frames.append((_INITIALIZER_TAG + encode_varint(body) + early, late))
            length += len(frames[-1][0]) + piece.tensor.nbytes + len(late)
        yield partial(self.template, _BEFORE_GRAPH, keep=True).SerializeToString(
            deterministic=True
        )
        yield _GRAPH_TAG + encode_varint(length)
        yield head
        for piece, (before, late) in zip(self.pieces, frames, strict=True):
            yield before
            if piece.tensor is None:
                yield piece.header.SerializeToString(deterministic=True)
                continue
            yield piece.tensor
            yield late
        yield tail
        behind = partial(self.template, _BEFORE_GRAPH)
        behind.MergeFromString(unknown_fields(self.template))
        yield behind.SerializeToString(deterministic=True)


# --- attributes and nodes ---------------------------------------------------------


def attribute_proto(name: str, value: Any) -> onnx.AttributeProto:
    """Return the attribute for a Python value.

    Raises:
        ModelError: The value has no attribute type.
    """
    if isinstance(value, onnx.AttributeProto):
        proto = onnx.AttributeProto()
        proto.CopyFrom(value)
        proto.name = name
        return proto
    if isinstance(value, gs.Node.AttributeRef):
        kind: Any = value.type if isinstance(value.type, int) else 0
        return onnx.AttributeProto(name=name, ref_attr_name=value.name, type=kind)
    if isinstance(value, gs.Graph):
        return onnx.AttributeProto(name=name, type=_ATTR.GRAPH, g=graph_proto(value))
    if isinstance(value, list) and value and isinstance(value[0], gs.Graph):
        proto = onnx.AttributeProto(name=name, type=_ATTR.GRAPHS)
        proto.graphs.extend(graph_proto(graph) for graph in value)
        return proto
    if isinstance(value, gs.Constant):
        return onnx.AttributeProto(
            name=name, type=_ATTR.TENSOR, t=_piece(value).whole()
        )
    if isinstance(value, np.ndarray):
        tensor = _piece(Constant("", ArrayTensor(value))).whole()
        return onnx.AttributeProto(name=name, type=_ATTR.TENSOR, t=tensor)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)) and not len(value):
        return onnx.AttributeProto(name=name, type=_ATTR.INTS)
    try:
        return onnx.helper.make_attribute(name, value)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"attribute {name!r} has the value {value!r}, which ONNX cannot hold"
        ) from error


def _same_attribute(value: Any, before: Any) -> bool:
    if isinstance(value, Constant):
        return value is before and value._values is value.origin_tensor
    if isinstance(value, list):
        if value and isinstance(value[0], gs.Graph):
            return False
        return isinstance(before, tuple) and (
            tuple(value) == before and [*map(type, value)] == [*map(type, before)]
        )
    if isinstance(value, (gs.Graph, np.ndarray)):
        return False
    if value is before:
        return True
    # Zero and minus zero are equal, and not the same.
    return type(value) is type(before) and repr(value) == repr(before)


def _node_proto(node: gs.Node) -> onnx.NodeProto:
    origin: onnx.NodeProto | None = getattr(node, "origin", None)
    inputs = [tensor.name for tensor in node.inputs]
    outputs = [tensor.name for tensor in node.outputs]
    if origin is None:
        proto = onnx.NodeProto(op_type=node.op, input=inputs, output=outputs)
        if node.name:
            proto.name = node.name
        if node.domain:
            proto.domain = node.domain
        if getattr(node, "overload", ""):
            proto.overload = node.overload
        proto.attribute.extend(
            attribute_proto(key, value)
            for key, value in node.attrs.items()
            if value is not None
        )
        return proto
    before = node.origin_attrs
    old = {attr.name: attr for attr in origin.attribute}
    same = {
        key: key in before and _same_attribute(value, before[key])
        for key, value in node.attrs.items()
    }
    attrs_same = list(node.attrs) == list(old) and all(same.values())
    if (
        attrs_same
        and node.op == origin.op_type
        and node.name == origin.name
        and (node.domain or "") == origin.domain
        and node.overload == origin.overload
        and inputs == list(origin.input)
        and outputs == list(origin.output)
    ):
        return origin
    changed: onnx.NodeProto = partial(origin, () if attrs_same else ("attribute",))
    changed.MergeFromString(unknown_fields(origin))
    if node.op != origin.op_type:
        changed.op_type = node.op
    if node.name != origin.name:
        changed.name = node.name
    if (node.domain or "") != origin.domain:
        changed.domain = node.domain or ""
    if node.overload != origin.overload:
        changed.overload = node.overload
    if inputs != list(origin.input):
        del changed.input[:]
        changed.input.extend(inputs)
    if outputs != list(origin.output):
        del changed.output[:]
        changed.output.extend(outputs)
    if not attrs_same:
        for key, value in node.attrs.items():
            if value is None:
                continue
            if key not in old:
                changed.attribute.append(attribute_proto(key, value))
            elif same[key]:
                changed.attribute.append(old[key])
            else:
                changed.attribute.append(_changed_attribute(old[key], value))
    return changed


def _changed_attribute(old: onnx.AttributeProto, value: Any) -> onnx.AttributeProto:
    """Return the attribute for a new value; doc string and type stay if they fit."""
    if isinstance(value, (list, tuple)) and not len(value):
        proto = onnx.AttributeProto(name=old.name, type=old.type)
    else:
        if isinstance(value, (int, np.integer)) and old.type == _ATTR.FLOAT:
            value = float(value)
        elif old.type == _ATTR.FLOATS and isinstance(value, (list, tuple)):
            value = [float(number) for number in value]
        proto = attribute_proto(old.name, value)
    if old.HasField("doc_string"):
        proto.doc_string = old.doc_string
    proto.MergeFromString(unknown_fields(old))
    return proto


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node and the subgraphs inside it read."""
    yield from node.inputs
    for graph in subgraphs_of(node):
        yield from graph.outputs
        for inner in graph.nodes:
            yield from _reads(inner)


def in_order(nodes: Sequence[gs.Node]) -> Sequence[gs.Node]:
    """Sort nodes so that each stands behind what it reads; others keep their order.

    Raises:
        ModelError: There is no such order.
    """
    producer = {id(t): i for i, node in enumerate(nodes) for t in node.outputs}
    needs = [
        {producer[id(t)] for t in _reads(node) if id(t) in producer and t.name}
        for node in nodes
    ]
    if all(source < index for index, need in enumerate(needs) for source in need):
        return nodes
    users: dict[int, list[int]] = {}
    for index, need in enumerate(needs):
        need.discard(index)
        for source in need:
            users.setdefault(source, []).append(index)
    ready = [index for index, need in enumerate(needs) if not need]
    heapq.heapify(ready)
    order: list[gs.Node] = []
    while ready:
        source = heapq.heappop(ready)
        order.append(nodes[source])
        for user in users.get(source, ()):
            needs[user].discard(source)
            if not needs[user]:
                heapq.heappush(ready, user)
    if len(order) != len(nodes):
        stuck = [nodes[i].name or nodes[i].op for i, need in enumerate(needs) if need]
        raise ModelError(f"the graph has a cycle through {', '.join(stuck[:5])}")
    return order


# --- tensors ----------------------------------------------------------------------


def _piece(constant: gs.Constant) -> Piece:
    tensor = tensor_of(constant)
    origin = getattr(constant, "origin", None)
    if isinstance(origin, onnx.TensorProto):
        before = constant.origin_tensor
        if tensor is before or (before is not None and same_bits(tensor, before)):
            stored = origin.data_location == onnx.TensorProto.EXTERNAL
            if not isinstance(before, (FileTensor, PackedTensor)):
                if constant.name == origin.name:
                    return Piece(origin, None, constant)
                renamed = onnx.TensorProto()
                renamed.CopyFrom(origin)
                renamed.name = constant.name
                return Piece(renamed, None, constant)
            header = onnx.TensorProto()
            header.CopyFrom(origin)
            if stored:
                header.ClearField("data_location")
                del header.external_data[:]
            if header.name != constant.name:
                header.name = constant.name
            return Piece(header, before, constant)
    header = onnx.TensorProto(
        dims=tensor.shape, data_type=tensor.data_type, name=constant.name
    )
    if isinstance(origin, onnx.TensorProto):
        if origin.HasField("doc_string"):
            header.doc_string = origin.doc_string
        header.metadata_props.extend(origin.metadata_props)
    if tensor.data_type == onnx.TensorProto.STRING:
        for value in tensor.read().reshape(-1):
            header.string_data.append(
                value if isinstance(value, bytes) else str(value).encode()
            )
        return Piece(header, None, constant)
    return Piece(header, tensor, constant)


def _kept_sparse(constant: gs.Constant) -> bool:
    return (
        isinstance(getattr(constant, "origin", None), onnx.SparseTensorProto)
        and isinstance(constant._values, SparseTensor)
        and constant._values is constant.origin_tensor
        and constant.name == constant.origin.values.name
    )


def owned_constants(
    graph: gs.Graph, strays: Iterable[gs.Constant] = ()
) -> list[gs.Constant]:
    """Return the initializers a graph is to be written with, in order."""
    kept: list[gs.Constant] = []
    pinned = {id(t) for t in graph.inputs} | {id(t) for t in graph.outputs}
    used_at_load: frozenset[str] = getattr(graph, "used_at_load", frozenset())
    for name, constant in getattr(graph, "initializers", {}).items():
        if not isinstance(constant, gs.Constant):
            continue  # a pass turned it into a variable
        # What nothing reads goes, unless it came that way.
        if (
            constant.outputs
            or id(constant) in pinned
            or not (name in used_at_load or constant.__dict__.get("_is_new"))
        ):
            kept.append(constant)
    kept.extend(strays)
    return kept


def stray_constants(root: gs.Graph) -> list[gs.Constant]:
    """Return constants that a main graph or function reads but none owns.

    A pass has made them.
    """
    owned: set[int] = set()
    found: dict[int, gs.Constant] = {}

    def visit(graph: gs.Graph) -> None:
        owned.update(id(c) for c in getattr(graph, "initializers", {}).values())
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Constant):
                found.setdefault(id(tensor), tensor)
        for node in graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    found.setdefault(id(tensor), tensor)
            for subgraph in subgraphs_of(node):
                visit(subgraph)

    visit(root)
    return [constant for key, constant in found.items() if key not in owned]


# --- graphs -----------------------------------------------------------------------


def _agrees(origin: onnx.ValueInfoProto, data_type: int, shape: Sequence[Any]) -> bool:
    """Whether a shape fits a recorded type, which may leave sizes open."""
    if origin.type.WhichOneof("value") != "tensor_type":
        return False
    tensor = origin.type.tensor_type
    if tensor.elem_type != data_type:
        return False
    if not tensor.HasField("shape"):
        return True
    return len(tensor.shape.dim) == len(shape) and all(
        not dim.HasField("dim_value") or dim.dim_value == size
        for dim, size in zip(tensor.shape.dim, shape, strict=True)
    )


def _value_info(
    tensor: gs.Tensor, origin: onnx.ValueInfoProto | None
) -> onnx.ValueInfoProto:
    named = origin is not None and origin.name == tensor.name
    if isinstance(tensor, gs.Constant):
        values = tensor_of(tensor)
        if origin is not None and named:
            before = getattr(tensor, "origin_tensor", None)
            if values is before or _agrees(origin, values.data_type, values.shape):
                return origin
        fresh = onnx.helper.make_tensor_value_info(
            tensor.name, values.data_type, values.shape
        )
        return _described(fresh, origin)
    shape = None if tensor.shape is None else tuple(tensor.shape)
    if origin is not None and named:
        before_info = getattr(tensor, "origin_info", None)
        if before_info is None or before_info == (tensor.dtype, shape):
            return origin
    if tensor.dtype is None:
        renamed = onnx.ValueInfoProto()
        if origin is not None:
            renamed.CopyFrom(origin)
        renamed.name = tensor.name
        return renamed
    data_type = (
        tensor.dtype
        if isinstance(tensor.dtype, int)
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    fresh = onnx.helper.make_tensor_value_info(tensor.name, data_type, shape)
    return _described(fresh, origin)


def _described(
    fresh: onnx.ValueInfoProto, origin: onnx.ValueInfoProto | None
) -> onnx.ValueInfoProto:
    """Take over the fields of an entry besides name and type."""
    if origin is not None:
        if origin.HasField("doc_string"):
            fresh.doc_string = origin.doc_string
        fresh.metadata_props.extend(origin.metadata_props)
    return fresh


def _graph_parts(
    graph: gs.Graph, constants: Iterable[gs.Constant]
) -> tuple[onnx.GraphProto, list[Piece], onnx.GraphProto]:
    head, tail = onnx.GraphProto(), onnx.GraphProto()
    origin: onnx.GraphProto | None = getattr(graph, "origin", None)
    if origin is not None:
        tail.quantization_annotation.extend(origin.quantization_annotation)
        tail.metadata_props.extend(origin.metadata_props)
        tail.MergeFromString(unknown_fields(origin))
        if origin.HasField("doc_string"):
            tail.doc_string = origin.doc_string
        if origin.HasField("name"):
            head.name = origin.name
    if graph.name != (origin.name if origin is not None else None):
        head.name = graph.name
    if (graph.doc_string or "") != tail.doc_string:
        tail.doc_string = graph.doc_string or ""
    head.node.extend(_node_proto(node) for node in in_order(graph.nodes))
    pieces: list[Piece] = []
    for constant in constants:
        if _kept_sparse(constant):
            tail.sparse_initializer.add().CopyFrom(constant.origin)
        else:
            pieces.append(_piece(constant))
    input_info = getattr(graph, "input_info", {})
    output_info = getattr(graph, "output_info", {})
    tail.input.extend(_value_info(t, input_info.get(t.name)) for t in graph.inputs)
    for tensor in graph.outputs:
        listed = output_info.get(tensor.name)
        before = getattr(tensor, "origin_info", None)
        # An output may be described better in `output` than in `value_info`.
        if (
            listed is not None
            and not isinstance(tensor, gs.Constant)
            and (
                before is None
                or tensor.dtype is None
                or before == (tensor.dtype, tensor.shape and tuple(tensor.shape))
            )
        ):
            tail.output.append(listed)
        else:
            tail.output.append(_value_info(tensor, listed))
    tail.value_info.extend(_kept_infos(graph, constants))
    return head, pieces, tail


def _kept_infos(
    graph: gs.Graph, constants: Iterable[gs.Constant]
) -> Iterator[onnx.ValueInfoProto]:
    """Yield the value_info entries that are still true, in their order."""
    infos = getattr(graph, "value_infos", [])
    if not infos:
        return
    here: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        for tensor in node.outputs:
            here[tensor.name] = tensor
    for tensor in [*graph.inputs, *constants]:
        here[tensor.name] = tensor
    origin = getattr(graph, "origin", None)
    produced: set[str] = set()
    if origin is not None:
        produced.update(name for node in origin.node for name in node.output)
    if isinstance(origin, onnx.GraphProto):
        produced.update(tensor.name for tensor in origin.initializer)
        produced.update(info.name for info in origin.input)
    elif origin is not None:
        produced.update(origin.input)
    for info in infos:
        tensor = here.get(info.name)
        if tensor is None:
            if info.name not in produced:
                yield info
        elif isinstance(tensor, gs.Constant):
            yield _value_info(tensor, info)
        else:
            shape = None if tensor.shape is None else tuple(tensor.shape)
            before = getattr(tensor, "origin_info", None)
            if before == (tensor.dtype, shape):
                yield info


def graph_proto(graph: gs.Graph) -> onnx.GraphProto:
    """Return a subgraph with its initializers inline."""
    head, pieces, tail = _graph_parts(graph, owned_constants(graph))
    head.initializer.extend(piece.whole() for piece in pieces)
    head.MergeFrom(tail)
    return head


def _function_proto(function: gs.Graph) -> onnx.FunctionProto:
    origin: onnx.FunctionProto | None = getattr(function, "origin", None)
    if origin is not None:
        proto: onnx.FunctionProto = partial(origin, ("node", "value_info"))
        proto.MergeFromString(unknown_fields(origin))
    else:
        proto = onnx.FunctionProto()
        proto.domain = function.domain
        proto.opset_import.extend(function.import_domains or [])
        if function.doc_string:
            proto.doc_string = function.doc_string
        if getattr(function, "overload", ""):
            proto.overload = function.overload
    if proto.name != function.name:
        proto.name = function.name
    constants = owned_constants(function, stray_constants(function))
    proto.value_info.extend(_kept_infos(function, constants))
    for constant in constants:
        node = proto.node.add(op_type="Constant", output=[constant.name])
        value = node.attribute.add(name="value", type=_ATTR.TENSOR)
        value.t.CopyFrom(_piece(constant).whole())
    proto.node.extend(_node_proto(node) for node in in_order(function.nodes))
    names = [tensor.name for tensor in function.inputs]
    if names != list(proto.input):
        proto.ClearField("input")
        proto.input.extend(names)
    names = [tensor.name for tensor in function.outputs]
    if names != list(proto.output):
        proto.ClearField("output")
        proto.output.extend(names)
    return proto


class Exportable(Protocol):
    """What writing needs of a model."""

    graph: Graph
    metadata: dict[str, str]
    ir_version: int
    _origin: onnx.ModelProto

    @property
    def opsets(self) -> dict[str, int]:
        """Operator set versions by domain."""

    def graphs(self) -> Iterator[gs.Graph]:
        """Yield all graphs."""

    def _name_strays(self) -> None: ...


Encode = Callable[[gs.Constant], "tuple[list[onnx.NodeProto], list[Piece]] | None"]


def export(model: Exportable, encode: Encode | None = None) -> Export:
    """Take a model apart for writing.

    Args:
        model: The model; it is not changed, but new constants get unused names.
        encode: Returns decoder nodes and the initializers they read in place of one
            initializer of the main graph, or ``None`` to write it plain.

    Raises:
        ModelError: A constant or attribute has no ONNX form, the graph has a cycle, or
            a name in it is not UTF-8.
    """
    try:
        return _export(model, encode)
    except UnicodeDecodeError as error:
        raise ModelError(f"a name or note in it is not UTF-8: {error}") from error


def _export(model: Exportable, encode: Encode | None) -> Export:
    for _ in model.graphs():
        pass  # plain graphsurgeon graphs become ours on the way
    graph = model.graph
    origin = model._origin
    template = partial(origin, ("graph", "functions", "opset_import", "metadata_props"))
    template.MergeFromString(unknown_fields(origin))
    if template.ir_version != model.ir_version:
        template.ir_version = model.ir_version
    model._name_strays()
    strays = stray_constants(graph)
    constants = owned_constants(graph, strays)
    decoders: list[onnx.NodeProto] = []
    encoded: dict[int, list[Piece]] = {}
    if encode is not None:
        inputs = {id(tensor) for tensor in graph.inputs}
        outputs = {id(tensor) for tensor in graph.outputs}
        for constant in constants:
            if id(constant) in inputs or id(constant) in outputs:
                continue
            replacement = encode(constant)
            if replacement is not None:
                nodes, pieces = replacement
                decoders.extend(nodes)
                encoded[id(constant)] = pieces
    plain = [constant for constant in constants if id(constant) not in encoded]
    head, pieces, tail = _graph_parts(graph, plain)
    if encoded:
        nodes = list(head.node)
        first = onnx.GraphProto(name=head.name)
        first.node.extend(decoders)
        first.node.extend(nodes)
        head = first
        plainly = iter(pieces)
        pieces = []
        for constant in constants:
            if id(constant) in encoded:
                pieces.extend(encoded[id(constant)])
            elif not _kept_sparse(constant):
                pieces.append(next(plainly))
    _write_opsets(template, model)
    template.functions.extend(_function_proto(f) for f in graph.functions)
    before = {entry.key: entry.value for entry in origin.metadata_props}
    if list(before.items()) == list(model.metadata.items()):
        template.metadata_props.extend(origin.metadata_props)
    else:
        for key, text in model.metadata.items():
            template.metadata_props.add(key=key, value=text)
    return Export(template, head, pieces, tail)


def _write_opsets(template: onnx.ModelProto, model: Exportable) -> None:
    wanted = dict(model.opsets)
    written = set()
    for entry in model._origin.opset_import:
        key = domain_key(entry.domain)
        if key not in wanted:
            continue
        version = wanted[key]
        written.add(key)
        kept = template.opset_import.add()
        kept.CopyFrom(entry)
        if kept.version != version:
            kept.version = version
    if not written and wanted == {"": 1}:
        return  # before IR version 3 there was one opset, and nothing said so
    for domain, version in wanted.items():
        if domain in written:
            continue
        template.opset_import.add(domain=domain, version=version)


def is_function(graph: gs.Graph) -> bool:
    """Whether a graph is the body of a model-local function."""
    return isinstance(graph, (Function, gs.Function))
