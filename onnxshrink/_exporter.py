"""From the graph back to protos and files, reusing the origin of all that is unchanged."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxshrink._topology import Constant, Function, Graph, subgraphs_of, tensor_of
from onnxshrink.errors import ModelError
from onnxshrink.tensors import FileTensor, LazyTensor, SparseTensor, same_bits
from onnxshrink.wire import encode_varint

if TYPE_CHECKING:
    from onnxshrink.model import Model

__all__ = ["Export", "Piece", "attribute_proto", "graph_proto", "in_order"]

_ATTR = onnx.AttributeProto
_RAW_DATA_TAG = encode_varint(9 << 3 | 2)
_INITIALIZER_TAG = encode_varint(5 << 3 | 2)
_GRAPH_TAG = encode_varint(7 << 3 | 2)


@dataclass
class Piece:
    """One initializer on its way out.

    Attributes:
        header: The proto; complete if ``tensor`` is ``None``, else without data.
        tensor: The values to write as raw data behind the header.
    """

    header: onnx.TensorProto
    tensor: LazyTensor | None = None

    @property
    def data_bytes(self) -> int:
        """Bytes of values, wherever they are."""
        return self.header.ByteSize() if self.tensor is None else self.tensor.nbytes

    def parts(self) -> tuple[bytes, bytes]:
        """Return what stands before and behind the raw data."""
        late = onnx.TensorProto()
        early = onnx.TensorProto()
        early.CopyFrom(self.header)
        for name in ("doc_string", "data_location"):
            if early.HasField(name):
                setattr(late, name, getattr(early, name))
                early.ClearField(name)
        for name in ("external_data", "metadata_props"):
            getattr(late, name).extend(getattr(early, name))
            early.ClearField(name)
        return early.SerializeToString(deterministic=True), late.SerializeToString(
            deterministic=True
        )

    def same(self, other: Piece) -> bool:
        """Whether both would write the same bytes."""
        if self.header != other.header:
            return False
        if self.tensor is None or other.tensor is None:
            return self.tensor is other.tensor
        mine, theirs = self.tensor, other.tensor
        if isinstance(mine, FileTensor) and isinstance(theirs, FileTensor):
            return (mine.path, mine.offset) == (theirs.path, theirs.offset)
        return same_bits(mine, theirs)

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
        head = self.head.SerializeToString(deterministic=True)
        tail = self.tail.SerializeToString(deterministic=True)
        frames: list[tuple[bytes, bytes]] = []
        length = len(head) + len(tail)
        for piece in self.pieces:
            early, late = piece.parts()
            if piece.tensor is not None:
                early += _RAW_DATA_TAG + encode_varint(piece.tensor.nbytes)
            body = len(early) + len(late)
            body += piece.tensor.nbytes if piece.tensor is not None else 0
            before = _INITIALIZER_TAG + encode_varint(body) + early
            frames.append((before, late))
            length += len(before) + len(late)
            length += piece.tensor.nbytes if piece.tensor is not None else 0
        early_model, late_model = _split_model(self.template)
        yield early_model
        yield _GRAPH_TAG + encode_varint(length)
        yield head
        for piece, (before, late) in zip(self.pieces, frames, strict=True):
            yield before
            if piece.tensor is not None:
                yield from piece.tensor.raw_chunks()
            yield late
        yield tail
        yield late_model


def _split_model(template: onnx.ModelProto) -> tuple[bytes, bytes]:
    early, late = onnx.ModelProto(), onnx.ModelProto()
    late.CopyFrom(template)
    late.ClearField("graph")
    for name in (
        "ir_version",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
    ):
        if late.HasField(name):
            setattr(early, name, getattr(late, name))
            late.ClearField(name)
    return early.SerializeToString(deterministic=True), late.SerializeToString(
        deterministic=True
    )


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
        kind = value.type if isinstance(value.type, int) else 0
        return onnx.AttributeProto(name=name, ref_attr_name=value.name, type=kind)
    if isinstance(value, gs.Graph):
        return onnx.AttributeProto(name=name, type=_ATTR.GRAPH, g=graph_proto(value))
    if isinstance(value, gs.Constant):
        return onnx.AttributeProto(
            name=name, type=_ATTR.TENSOR, t=_piece(value).whole()
        )
    if isinstance(value, np.ndarray):
        tensor = numpy_helper.from_array(value)
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
    if isinstance(value, gs.Graph):
        return False
    if isinstance(value, Constant):
        return value is before and value._values is value.origin_tensor
    if isinstance(value, list):
        return isinstance(before, tuple) and tuple(value) == before
    if value is before:
        return True
    return type(value) is type(before) and bool(value == before)


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
        and inputs == list(origin.input)
        and outputs == list(origin.output)
    ):
        return origin
    proto = onnx.NodeProto()
    proto.CopyFrom(origin)
    if node.op != origin.op_type:
        proto.op_type = node.op
    if node.name != origin.name:
        proto.name = node.name
    if (node.domain or "") != origin.domain:
        proto.domain = node.domain or ""
    if inputs != list(origin.input):
        del proto.input[:]
        proto.input.extend(inputs)
    if outputs != list(origin.output):
        del proto.output[:]
        proto.output.extend(outputs)
    if not attrs_same:
        del proto.attribute[:]
        for key, value in node.attrs.items():
            if value is None:
                continue
            if same[key]:
                proto.attribute.add().CopyFrom(old[key])
            elif isinstance(value, gs.Graph) and key in old:
                kept = proto.attribute.add()
                kept.CopyFrom(old[key])
                kept.g.CopyFrom(graph_proto(value))
            elif isinstance(value, list) and not value and key in old:
                empty = proto.attribute.add(name=key, type=old[key].type)
                empty.doc_string = old[key].doc_string
            else:
                proto.attribute.add().CopyFrom(attribute_proto(key, value))
    return proto


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yield what a node and the subgraphs inside it read."""
    yield from node.inputs
    for graph in subgraphs_of(node):
        yield from graph.outputs
        for inner in graph.nodes:
            yield from _reads(inner)


def in_order(nodes: Sequence[gs.Node]) -> Sequence[gs.Node]:
    """Return nodes so that each stands behind what it reads; stable.

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
        if tensor is before or same_bits(tensor, before):
            stored = origin.data_location == onnx.TensorProto.EXTERNAL
            if not isinstance(before, FileTensor):
                if constant.name == origin.name:
                    return Piece(origin)
                renamed = onnx.TensorProto()
                renamed.CopyFrom(origin)
                renamed.name = constant.name
                return Piece(renamed)
            header = onnx.TensorProto()
            header.CopyFrom(origin)
            if stored:
                header.ClearField("data_location")
                del header.external_data[:]
            if header.name != constant.name:
                header.name = constant.name
            return Piece(header, before)
    header = onnx.TensorProto(
        dims=tensor.shape, data_type=tensor.data_type, name=constant.name
    )
    if isinstance(origin, onnx.TensorProto) and origin.doc_string:
        header.doc_string = origin.doc_string
    if tensor.data_type == onnx.TensorProto.STRING:
        for value in tensor.read().reshape(-1):
            header.string_data.append(
                value if isinstance(value, bytes) else str(value).encode()
            )
        return Piece(header)
    return Piece(header, tensor)


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
        if constant.outputs or id(constant) in pinned or name not in used_at_load:
            kept.append(constant)
    kept.extend(strays)
    return kept


def stray_constants(model_graph: gs.Graph) -> list[gs.Constant]:
    """Find constants that nodes read but no graph owns yet: new ones of a pass."""
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

    visit(model_graph)
    return [constant for key, constant in found.items() if key not in owned]


# --- graphs -----------------------------------------------------------------------


def _value_info(
    tensor: gs.Tensor, origin: onnx.ValueInfoProto | None
) -> onnx.ValueInfoProto:
    if isinstance(tensor, gs.Constant):
        values = tensor_of(tensor)
        if origin is not None and origin.name == tensor.name:
            before = getattr(tensor, "origin_tensor", None)
            if values is before or (
                before is not None
                and (values.shape, values.data_type) == (before.shape, before.data_type)
            ):
                return origin
        return onnx.helper.make_tensor_value_info(
            tensor.name, values.data_type, values.shape
        )
    shape = None if tensor.shape is None else tuple(tensor.shape)
    if origin is not None and origin.name == tensor.name:
        before_info = getattr(tensor, "origin_info", None)
        if before_info is None or before_info == (tensor.dtype, shape):
            return origin
    if tensor.dtype is None:
        if origin is None:
            return onnx.ValueInfoProto(name=tensor.name)
        renamed = onnx.ValueInfoProto()
        renamed.CopyFrom(origin)
        renamed.name = tensor.name
        return renamed
    data_type = (
        tensor.dtype
        if isinstance(tensor.dtype, int)
        else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    )
    return onnx.helper.make_tensor_value_info(tensor.name, data_type, shape)


def _graph_parts(
    graph: gs.Graph, constants: Iterable[gs.Constant]
) -> tuple[onnx.GraphProto, list[Piece], onnx.GraphProto]:
    head, tail = onnx.GraphProto(), onnx.GraphProto()
    origin: onnx.GraphProto | None = getattr(graph, "origin", None)
    if origin is not None:
        tail.quantization_annotation.extend(origin.quantization_annotation)
        tail.metadata_props.extend(origin.metadata_props)
        if origin.HasField("doc_string"):
            tail.doc_string = origin.doc_string
        if origin.HasField("name"):
            head.name = origin.name
    if graph.name != (origin.name if origin is not None else None):
        head.name = graph.name
    if graph.doc_string and graph.doc_string != tail.doc_string:
        tail.doc_string = graph.doc_string
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
        if listed is not None and (
            isinstance(tensor, gs.Constant)
            or before is None
            or before == (tensor.dtype, tensor.shape and tuple(tensor.shape))
            or tensor.dtype is None
        ):
            tail.output.add().CopyFrom(listed)
        else:
            tail.output.add().CopyFrom(_value_info(tensor, listed))
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
    origin: onnx.GraphProto | None = getattr(graph, "origin", None)
    produced = set()
    if origin is not None:
        produced.update(name for node in origin.node for name in node.output)
        produced.update(tensor.name for tensor in origin.initializer)
        produced.update(info.name for info in origin.input)
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
    proto = onnx.FunctionProto()
    origin: onnx.FunctionProto | None = getattr(function, "origin", None)
    if origin is not None:
        proto.CopyFrom(origin)
        del proto.node[:]
    else:
        proto.name = function.name
        proto.domain = function.domain
        proto.opset_import.extend(function.import_domains or [])
    strays = {
        id(t): t
        for node in function.nodes
        for t in node.inputs
        if isinstance(t, gs.Constant)
    }
    for constant in strays.values():
        proto.node.add(op_type="Constant", output=[constant.name]).attribute.add(
            name="value", type=_ATTR.TENSOR
        ).t.CopyFrom(_piece(constant).whole())
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


Encode = Callable[[gs.Constant], "tuple[list[onnx.NodeProto], list[Piece]] | None"]


def export(model: Model, encode: Encode | None = None) -> Export:
    """Take a model apart for writing.

    Args:
        model: The model; it is not changed, but new constants get unused names.
        encode: Returns decoder nodes and the initializers they read in place of one
            initializer of the main graph, or ``None`` to write it plain.
    """
    graph = model.graph
    template = onnx.ModelProto()
    origin = model._origin
    for field, value in origin.ListFields():
        if field.name in ("graph", "functions", "opset_import", "metadata_props"):
            continue
        if field.name == "training_info":
            template.training_info.extend(value)
        else:
            setattr(template, field.name, value)
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
    if [(p.key, p.value) for p in origin.metadata_props] == list(
        model.metadata.items()
    ):
        template.metadata_props.extend(origin.metadata_props)
    else:
        for key, text in model.metadata.items():
            template.metadata_props.add(key=key, value=text)
    return Export(template, head, pieces, tail)


def _write_opsets(template: onnx.ModelProto, model: Model) -> None:
    wanted = dict(model.opsets)
    for entry in model._origin.opset_import:
        key = "" if entry.domain == "ai.onnx" else entry.domain
        if key not in wanted:
            continue
        version = wanted.pop(key)
        kept = template.opset_import.add()
        kept.CopyFrom(entry)
        if kept.version != version:
            kept.version = version
    for domain, version in wanted.items():
        template.opset_import.add(domain=domain, version=version)


def is_function(graph: gs.Graph) -> bool:
    """Whether a graph is the body of a model-local function."""
    return isinstance(graph, (Function, gs.Function))


def new_graph() -> Graph:
    """Return an empty graph of ours."""
    return Graph(name="graph")
