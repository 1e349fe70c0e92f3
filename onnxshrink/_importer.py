"""From protos to a graphsurgeon graph, keeping every proto as the origin of its object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxshrink._topology import Constant, Function, Graph, Node, Variable
from onnxshrink.errors import ModelError
from onnxshrink.tensors import (
    FileTensor,
    LazyTensor,
    ProtoTensor,
    SparseTensor,
    external_tensor,
    numpy_type,
)

__all__ = ["Importer", "check_order", "dims_of"]

_ATTR = onnx.AttributeProto


def dims_of(info: onnx.TypeProto.Tensor) -> tuple[int | str | None, ...] | None:
    """Return a tensor type's dimensions; ``None`` if even the rank is unknown."""
    if not info.HasField("shape"):
        return None
    return tuple(
        dim.dim_value
        if dim.HasField("dim_value")
        else dim.dim_param
        if dim.HasField("dim_param")
        else None
        for dim in info.shape.dim
    )


def _describe(info: onnx.ValueInfoProto) -> tuple[Any, list[Any] | None]:
    if info.type.WhichOneof("value") != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    dims = dims_of(tensor)
    try:
        dtype = numpy_type(tensor.elem_type) if tensor.elem_type else None
    except ModelError:
        dtype = None
    return dtype, None if dims is None else list(dims)


class Importer:
    """Reads one model; knows where its tensors' bytes are."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path | None,
        ranges: Mapping[int, tuple[int, int]],
    ) -> None:
        """Prepare to read ``proto``.

        Args:
            proto: The model, without the raw data that ``ranges`` names.
            path: The file it came from, for external data; ``None`` for memory.
            ranges: (offset, length) in that file, by index of the initializer.
        """
        self.proto = proto
        self.path = path
        self.ranges = ranges
        self.functions: list[Function] = []
        self.external_files: set[Path] = set()

    def model(self) -> Graph:
        """Return the main graph, with functions attached."""
        domains = list(self.proto.opset_import)
        opset = next((o.version for o in domains if o.domain in ("", "ai.onnx")), 1)
        for function in self.proto.functions:
            self.functions.append(self._function(function))
        graph = self._graph(self.proto.graph, {}, self.ranges)
        graph.opset = opset
        graph.import_domains = domains
        graph.ir_version = self.proto.ir_version
        graph.producer_name = self.proto.producer_name
        graph.producer_version = self.proto.producer_version
        graph._functions = self.functions
        return graph

    def _tensor(
        self, proto: onnx.TensorProto, span: tuple[int, int] | None = None
    ) -> LazyTensor:
        if span is not None and self.path is not None:
            offset, length = span
            shape = tuple(proto.dims)
            return FileTensor(
                self.path, offset, length, shape, proto.data_type, proto.name
            )
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            folder = None if self.path is None else self.path.parent
            tensor = external_tensor(proto, folder)
            self.external_files.add(tensor.path)
            return tensor
        return ProtoTensor(proto)

    def _constant(
        self, proto: onnx.TensorProto, span: tuple[int, int] | None = None
    ) -> Constant:
        tensor = self._tensor(proto, span)
        constant = Constant(proto.name, tensor)
        constant.origin = proto
        constant.origin_tensor = tensor
        return constant

    def _sparse(self, proto: onnx.SparseTensorProto) -> Constant:
        tensor = SparseTensor(proto)
        constant = Constant(proto.values.name, tensor)
        constant.origin = proto
        constant.origin_tensor = tensor
        return constant

    def _variable(
        self, name: str, info: onnx.ValueInfoProto | None, listed: bool
    ) -> Variable:
        dtype, shape = (None, None) if info is None else _describe(info)
        variable = Variable(name, dtype, shape)
        variable.origin = info if listed else None
        variable.origin_info = (dtype, None if shape is None else tuple(shape))
        return variable

    def _graph(
        self,
        proto: onnx.GraphProto,
        outer: Mapping[str, Any],
        ranges: Mapping[int, tuple[int, int]] | None = None,
    ) -> Graph:
        graph = Graph(name=proto.name, doc_string=proto.doc_string)
        graph._functions = self.functions
        graph.origin = proto
        scope: dict[str, Any] = {}
        for index, tensor in enumerate(proto.initializer):
            span = None if ranges is None else ranges.get(index)
            constant = self._constant(tensor, span)
            if tensor.name in graph.initializers:
                raise ModelError(f"two initializers are named {tensor.name!r}")
            graph.initializers[tensor.name] = scope[tensor.name] = constant
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            if name in graph.initializers:
                raise ModelError(f"two initializers are named {name!r}")
            graph.initializers[name] = scope[name] = self._sparse(sparse)
        graph.value_infos = list(proto.value_info)
        infos = {info.name: info for info in proto.value_info}
        graph.input_info = {info.name: info for info in proto.input}
        graph.output_info = {info.name: info for info in proto.output}
        for info in proto.input:
            if info.name not in scope:
                scope[info.name] = self._variable(info.name, info, False)
            graph.inputs.append(scope[info.name])
        for node in proto.node:
            for name in node.output:
                if name and name not in scope:
                    listed = name in infos
                    info = infos[name] if listed else graph.output_info.get(name)
                    scope[name] = self._variable(name, info, listed)
        inner = {**outer, **scope} if outer else scope
        self._nodes(proto.node, graph.nodes, inner)
        for info in proto.output:
            if info.name not in inner:
                raise ModelError(
                    f"graph {proto.name!r} returns {info.name!r}, which nothing produces"
                )
            graph.outputs.append(inner[info.name])
        used = {id(tensor) for tensor in graph.outputs}
        graph.used_at_load = frozenset(
            name
            for name, constant in graph.initializers.items()
            if constant.outputs or id(constant) in used
        )
        return graph

    def _nodes(
        self,
        protos: Iterable[onnx.NodeProto],
        nodes: list[Node],
        scope: Mapping[str, Any],
    ) -> None:
        for proto in protos:
            attrs: dict[str, Any] = {}
            for attr in proto.attribute:
                attrs[attr.name] = self._attribute(attr, scope)
            try:
                inputs = [scope[n] if n else Variable.empty() for n in proto.input]
            except KeyError as error:
                name = proto.name or proto.op_type
                raise ModelError(
                    f"node {name!r} reads {error.args[0]!r}, which nothing produces"
                ) from None
            outputs = [scope[n] if n else Variable.empty() for n in proto.output]
            node = Node(
                proto.op_type, proto.name, attrs, inputs, outputs, proto.domain or None
            )
            node.origin = proto
            node.origin_attrs = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in attrs.items()
            }
            nodes.append(node)

    def _attribute(self, attr: onnx.AttributeProto, scope: Mapping[str, Any]) -> Any:
        if attr.ref_attr_name:
            return gs.Node.AttributeRef(attr.ref_attr_name, attr.type)
        if attr.type == _ATTR.STRING:
            try:
                return attr.s.decode()
            except UnicodeDecodeError:
                return attr.s
        if attr.type == _ATTR.STRINGS:
            try:
                return [s.decode() for s in attr.strings]
            except UnicodeDecodeError:
                return list(attr.strings)
        if attr.type == _ATTR.TENSOR:
            return self._constant(attr.t)
        if attr.type == _ATTR.GRAPH:
            return self._graph(attr.g, scope)
        simple = {_ATTR.FLOAT: "f", _ATTR.INT: "i"}.get(attr.type)
        if simple is not None:
            return getattr(attr, simple)
        several = {_ATTR.FLOATS: "floats", _ATTR.INTS: "ints"}.get(attr.type)
        if several is not None:
            return list(getattr(attr, several))
        return attr

    def _function(self, proto: onnx.FunctionProto) -> Function:
        scope: dict[str, Any] = {}
        infos = {info.name: info for info in proto.value_info}
        for name in proto.input:
            scope[name] = self._variable(name, infos.get(name), name in infos)
        for node in proto.node:
            for name in node.output:
                if name and name not in scope:
                    scope[name] = self._variable(name, infos.get(name), name in infos)
        nodes: list[Node] = []
        self._nodes(proto.node, nodes, scope)
        missing = [name for name in proto.output if name not in scope]
        if missing:
            raise ModelError(
                f"function {proto.name!r} returns {missing[0]!r}, "
                "which nothing produces"
            )
        domains = list(proto.opset_import)
        opset = next((o.version for o in domains if o.domain in ("", "ai.onnx")), None)
        function = Function(
            proto.name,
            domain=proto.domain,
            nodes=nodes,
            inputs=[scope[name] for name in proto.input],
            outputs=[scope[name] for name in proto.output],
            doc_string=proto.doc_string,
            opset=opset,
            import_domains=domains,
        )
        function.origin = proto
        function.overload = proto.overload
        return function


def check_order(proto: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> None:
    """Refuse a graph that reads what nothing produces, or that runs in a circle.

    Nodes may stand in any order as long as some order can run.

    Raises:
        ModelError: Names the node and the value, or the nodes of a cycle.
    """
    known = set(outer)
    known.update(info.name for info in proto.input)
    known.update(tensor.name for tensor in proto.initializer)
    known.update(tensor.values.name for tensor in proto.sparse_initializer)
    producer: dict[str, int] = {}
    for index, node in enumerate(proto.node):
        for name in node.output:
            if name in producer:
                label = node.name or node.op_type
                raise ModelError(f"node {label!r} produces {name!r} a second time")
            if name:
                producer[name] = index
    everything = frozenset(known | set(producer))
    needs: list[set[int]] = []
    for index, node in enumerate(proto.node):
        wanted = set(node.input)
        for attr in node.attribute:
            if attr.type == _ATTR.GRAPH:
                check_order(attr.g, everything)
                wanted |= _captured(attr.g)
        label = node.name or f"{node.op_type} number {index}"
        for name in wanted:
            if name and name not in everything:
                raise ModelError(
                    f"node {label!r} reads {name!r}, which nothing produces"
                )
        needs.append({producer[n] for n in wanted if n in producer and n not in known})
    if all(all(n < index for n in need) for index, need in enumerate(needs)):
        return
    waiting = {index: set(need) for index, need in enumerate(needs)}
    users: dict[int, list[int]] = {}
    for index, need in waiting.items():
        for source in need:
            users.setdefault(source, []).append(index)
    ready = [index for index, need in waiting.items() if not need]
    while ready:
        source = ready.pop()
        waiting.pop(source)
        for user in users.get(source, ()):
            waiting[user].discard(source)
            if not waiting[user]:
                ready.append(user)
    if waiting:
        names = [proto.node[i].name or proto.node[i].op_type for i in waiting]
        raise ModelError(
            f"graph {proto.name!r} has a cycle through {', '.join(names[:5])}"
        )


def _captured(proto: onnx.GraphProto) -> set[str]:
    """Names that a subgraph takes from outside."""
    own = {info.name for info in proto.input}
    own.update(tensor.name for tensor in proto.initializer)
    own.update(tensor.values.name for tensor in proto.sparse_initializer)
    own.update(name for node in proto.node for name in node.output)
    wanted = {info.name for info in proto.output}
    for node in proto.node:
        wanted.update(node.input)
        for attr in node.attribute:
            if attr.type == _ATTR.GRAPH:
                wanted |= _captured(attr.g)
    return wanted - own - {""}
