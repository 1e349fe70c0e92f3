"""From protos to a graphsurgeon graph; each object keeps its proto as its origin.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import Message

from onnxshrink.errors import ModelError
from onnxshrink.model.topology import (
    Constant,
    Function,
    FunctionList,
    Graph,
    Node,
    Variable,
    domain_key,
    is_onnx,
    own,
)
from onnxshrink.package import Package
from onnxshrink.tensors import (
    FileTensor,
    LazyTensor,
    ProtoTensor,
    SparseTensor,
    external_tensor,
    numpy_type,
)

__all__ = ["Importer", "check_functions", "check_order", "dims_of"]

_ATTR = onnx.AttributeProto
MOST_NODES = 2_000_000
"""Nodes that functions may unfold to."""
_DEEPEST = 40
"""Subgraphs inside one another; protobuf itself parses at most 33."""


def dims_of(info: onnx.TypeProto.Tensor) -> tuple[int | str | None, ...] | None:
    """Return a tensor type's dimensions; ``None`` if even the rank is unknown."""
    if not info.HasField("shape"):
        return None
    return tuple(_size(dim) for dim in info.shape.dim)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """Return a dimension; -1 and ``?`` are how some exporters write an open one.

    onnxruntime takes any negative size for an open one; ``_refuse_sizes`` does not.
    """
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param if dim.dim_param not in ("", "?") else None


def _refuse_sizes(info: onnx.ValueInfoProto, what: str) -> None:
    """Refuse a negative size other than -1, and a name that is not UTF-8.

    Raises:
        ModelError: Names the input or output.
    """
    _refuse_bytes([info.name])
    if info.type.WhichOneof("value") != "tensor_type":
        return
    for axis, dim in enumerate(info.type.tensor_type.shape.dim):
        _refuse_bytes([dim.dim_param])
        if dim.dim_value < -1:
            raise ModelError(
                f"{what} {info.name!r} has the size {dim.dim_value} in axis {axis}; an "
                "open dimension is -1 or has a name"
            )


def _describe(info: onnx.ValueInfoProto) -> tuple[Any, list[Any] | None]:
    if info.type.WhichOneof("value") != "tensor_type":
        return None, None
    tensor = info.type.tensor_type
    dims = dims_of(tensor)
    _refuse_bytes(dim for dim in dims or () if isinstance(dim, (str, bytes)))
    try:
        dtype = numpy_type(tensor.elem_type) if tensor.elem_type else None
    except ModelError:
        dtype = None
    return dtype, None if dims is None else list(dims)


class _Scope:
    """Names that a graph can read: its own, then those of the graphs around it."""

    __slots__ = ("_outer", "_own")

    def __init__(self, own: Mapping[str, Any], outer: _Scope | None = None) -> None:
        self._own = own
        self._outer = outer

    def __getitem__(self, name: str) -> Any:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope._own:
                return scope._own[name]
            scope = scope._outer
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope._own:
                return True
            scope = scope._outer
        return False


class Importer:
    """Reads one model; knows where its tensors' bytes are."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path | None,
        ranges: Mapping[int, tuple[int, int]],
        package: Package | None = None,
    ) -> None:
        """Prepare to read ``proto``.

        Args:
            proto: The model, without the raw data that ``ranges`` names.
            path: The file it came from, for external data; ``None`` for memory.
            ranges: (offset, length) in that file, by index of the initializer.
            package: What the file is read through if it is a package.
        """
        self.proto = proto
        self.path = path
        self.ranges = ranges
        self.functions = FunctionList()
        self.package = package
        self.external = False
        self.external_files: set[Path] = set()
        self.opset = 1

    def model(self) -> Graph:
        """Return the main graph, with functions attached."""
        domains = list(self.proto.opset_import)
        _refuse_two_versions(domains)
        opset = next((o.version for o in domains if is_onnx(o.domain)), 1)
        self.opset = opset
        for function in self.proto.functions:
            self.functions.append(self._function(function))
        for training in self.proto.training_info:
            _refuse_external(training.initialization)
            _refuse_external(training.algorithm)
        graph = self._graph(self.proto.graph, None, self.ranges)
        graph.import_domains = domains
        graph.ir_version = self.proto.ir_version
        graph.producer_name = self.proto.producer_name
        graph.producer_version = self.proto.producer_version
        graph._functions = self.functions
        return graph

    def _tensor(
        self, proto: onnx.TensorProto, span: tuple[int, int] | None = None
    ) -> LazyTensor:
        if span is not None and (self.package or self.path) is not None:
            offset, length = span
            shape = tuple(proto.dims)
            if proto.data_location == onnx.TensorProto.EXTERNAL or any(
                field.name.endswith("_data") and field.name != "external_data"
                for field, _ in proto.ListFields()
            ):
                raise ModelError(f"tensor {proto.name!r} keeps its data in two places")
            if self.package is not None:
                return self.package.tensor(proto, offset, length)
            assert self.path is not None
            return FileTensor(
                self.path, offset, length, shape, proto.data_type, proto.name
            )
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            self.external = True
            if self.package is not None:
                return self.package.external(proto)
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
        constant.__dict__.update(origin=proto, origin_tensor=tensor)
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
        # Past graphsurgeon's __setattr__, which takes a third of the time of a load.
        variable.__dict__["origin"] = info if listed else None
        variable.__dict__["origin_info"] = (
            dtype,
            None if shape is None else tuple(shape),
        )
        return variable

    def _graph(
        self,
        proto: onnx.GraphProto,
        outer: _Scope | None,
        ranges: Mapping[int, tuple[int, int]] | None = None,
    ) -> Graph:
        graph = Graph(name=proto.name, doc_string=proto.doc_string)
        graph._functions = self.functions
        graph.opset = self.opset
        graph.origin = proto
        scope: dict[str, Any] = {}
        for index, tensor in enumerate(proto.initializer):
            span = None if ranges is None else ranges.get(index)
            constant = self._constant(tensor, span)
            if tensor.name in graph.initializers:
                raise ModelError(f"two initializers are named {tensor.name!r}")
            scope[tensor.name] = constant
            own(graph, constant)
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            if name in graph.initializers:
                raise ModelError(f"two initializers are named {name!r}")
            scope[name] = self._sparse(sparse)
            own(graph, scope[name])
        _refuse_bytes(info.name for info in proto.value_info)
        graph.value_infos = list(proto.value_info)
        infos = {info.name: info for info in proto.value_info}
        for what, given in (("input", proto.input), ("output", proto.output)):
            _refuse_twice(given, what)
        graph.input_info = {info.name: info for info in proto.input}
        graph.output_info = {info.name: info for info in proto.output}
        for info in proto.input:
            if info.name not in scope:
                scope[info.name] = self._variable(info.name, info, False)
            graph.inputs.append(scope[info.name])
        for node in proto.node:
            _refuse_bytes(node.output)
            for name in node.output:
                if name and name not in scope:
                    listed = name in infos
                    known = infos.get(name) or graph.output_info.get(name)
                    scope[name] = self._variable(name, known, listed)
        inner = _Scope(scope, outer)
        graph.nodes.load(self._nodes(proto.node, inner))
        for info in proto.output:
            if info.name not in inner:
                raise ModelError(
                    f"graph {proto.name!r} returns {info.name!r}, "
                    "which nothing produces"
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
        scope: _Scope,
    ) -> Iterator[Node]:
        for proto in protos:
            attrs: dict[str, Any] = {}
            _refuse_bytes((proto.name, proto.op_type, proto.domain))
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
            before = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in attrs.items()
            }
            node.__dict__.update(origin=proto, origin_attrs=before)
            if proto.overload:
                node.overload = proto.overload
            yield node

    def _attribute(self, attr: onnx.AttributeProto, scope: _Scope) -> Any:
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
        if attr.type == _ATTR.GRAPHS and len(attr.graphs):
            return [self._graph(graph, scope) for graph in attr.graphs]
        simple = {_ATTR.FLOAT: "f", _ATTR.INT: "i"}.get(attr.type)
        if simple is not None:
            return getattr(attr, simple)
        several = {_ATTR.FLOATS: "floats", _ATTR.INTS: "ints"}.get(attr.type)
        if several is not None:
            return list(getattr(attr, several))
        _refuse_external(attr)
        return attr

    def _function(self, proto: onnx.FunctionProto) -> Function:
        scope: dict[str, Any] = {}
        infos = {info.name: info for info in proto.value_info}
        _refuse_bytes(proto.input)
        for name in proto.input:
            scope[name] = self._variable(name, infos.get(name), name in infos)
        for node in proto.node:
            _refuse_bytes(node.output)
            for name in node.output:
                if name and name not in scope:
                    scope[name] = self._variable(name, infos.get(name), name in infos)
        nodes = list(self._nodes(proto.node, _Scope(scope)))
        missing = [name for name in proto.output if name not in scope]
        if missing:
            raise ModelError(
                f"function {proto.name!r} returns {missing[0]!r}, "
                "which nothing produces"
            )
        domains = list(proto.opset_import)
        opset = next((o.version for o in domains if is_onnx(o.domain)), None)
        function = Function(
            proto.name,
            domain=proto.domain,
            inputs=[scope[name] for name in proto.input],
            outputs=[scope[name] for name in proto.output],
            doc_string=proto.doc_string,
            opset=opset,
            import_domains=domains,
        )
        function._functions = self.functions
        function.nodes.load(nodes)
        function.origin = proto
        function.value_infos = list(proto.value_info)
        function.overload = proto.overload
        return function


def _refuse_bytes(names: Iterable[object]) -> None:
    """Refuse names that are not UTF-8, which protobuf hands over as bytes.

    Raises:
        ModelError: Shows the name.
    """
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"the name {name!r} is not UTF-8")


def _refuse_two_versions(domains: Iterable[onnx.OperatorSetIdProto]) -> None:
    """Refuse two versions of one operator domain, of which only one could be saved.

    Raises:
        ModelError: Names the domain and the versions.
    """
    versions: dict[str, int] = {}
    for entry in domains:
        _refuse_bytes([entry.domain])
        known = versions.setdefault(domain_key(entry.domain), entry.version)
        if known != entry.version:
            raise ModelError(
                f"it imports two versions of the domain {entry.domain or 'ai.onnx'}, "
                f"{known} and {entry.version}; leave one of them out"
            )


def _refuse_twice(infos: Iterable[onnx.ValueInfoProto], what: str) -> None:
    """Refuse an input that is listed twice, or an output with two types.

    Raises:
        ModelError: Names it.
    """
    seen: dict[str, onnx.ValueInfoProto] = {}
    for info in infos:
        _refuse_sizes(info, what)
        before = seen.setdefault(info.name, info)
        if before is info:
            continue
        if what == "input" or before != info:
            raise ModelError(f"{what} {info.name!r} is listed twice; leave one out")


def _refuse_external(message: Any) -> None:
    """Refuse external data in places from which it would not be saved again.

    Raises:
        ModelError: A tensor anywhere inside the message has external data.
    """
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"tensor {message.name!r} has external data, which only initializers "
                "and values of Constant nodes may have"
            )
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if isinstance(value, Message) else value:
            _refuse_external(inner)


def check_order(proto: onnx.GraphProto) -> None:
    """Refuse a graph that reads what nothing produces, or that runs in a circle.

    Nodes may stand in any order as long as some order can run.

    Raises:
        ModelError: Names the node and the value, or the nodes of a cycle.
    """
    _check_graph(proto, None, 0)


def check_functions(proto: onnx.ModelProto) -> None:
    """Refuse functions with broken bodies, that call themselves, or that unfold hugely.

    Whoever runs the model writes functions out where they are called, so that ten that
    call each other ten times are ten billion nodes.

    Raises:
        ModelError: Names the function and what is wrong with it.
    """
    calls: dict[tuple[str, str, str], set[tuple[str, str, str]]] = {}
    every: dict[tuple[str, str, str], Counter[tuple[str, str, str]]] = {}
    for function in proto.functions:
        label = f"function {function.name!r}"
        _check_nodes(label, function.node, set(function.input), None, 0)
        key = (domain_key(function.domain), function.name, function.overload)
        every[key] = Counter(_called(function.node))
        calls[key] = set(every[key])
    sizes: dict[tuple[str, str, str], int] = {}
    done: set[tuple[str, str, str]] = set()
    for first in calls:
        path: dict[tuple[str, str, str], Iterator[tuple[str, str, str]]] = {}
        current: tuple[str, str, str] | None = first if first not in done else None
        while current is not None:
            if current not in path:
                path[current] = iter(sorted(calls[current] & calls.keys() - done))
            following = next(path[current], None)
            if following is None:
                done.add(current)
                sizes[current] = _unfolded(every[current], sizes)
                del path[current]
                current = next(reversed(path), None)
            elif following in path:
                raise ModelError(f"function {following[1]!r} calls itself")
            else:
                current = following
    total = _unfolded(Counter(_called(proto.graph.node)), sizes)
    if calls and total > MOST_NODES:
        shown = f"{total:,}" if total < 10**15 else "more than 10^15"
        raise ModelError(
            f"its functions unfold to {shown} nodes, more than the {MOST_NODES:,} that "
            "are taken"
        )


def _unfolded(
    called: Mapping[tuple[str, str, str], int],
    sizes: Mapping[tuple[str, str, str], int],
) -> int:
    return sum(count * sizes.get(key, 1) for key, count in called.items())


def _called(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str, str]]:
    for node in nodes:
        yield domain_key(node.domain), node.op_type, node.overload
        for graph in _graphs(node):
            yield from _called(graph.node)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attr in node.attribute:
        if attr.type == _ATTR.GRAPH:
            yield attr.g
        elif attr.type == _ATTR.GRAPHS:
            yield from attr.graphs


def _check_graph(proto: onnx.GraphProto, outer: _Scope | None, depth: int) -> None:
    label = f"graph {proto.name!r}"
    if depth > _DEEPEST:
        raise ModelError(f"{label} is the {depth}th subgraph inside another")
    known = {info.name for info in proto.input}
    known.update(tensor.name for tensor in proto.initializer)
    known.update(tensor.values.name for tensor in proto.sparse_initializer)
    _check_nodes(label, proto.node, known, outer, depth)


def _check_nodes(
    graph: str,
    nodes: Sequence[onnx.NodeProto],
    known: set[str],
    outer: _Scope | None,
    depth: int,
) -> None:
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        _refuse_bytes(node.output)
        for name in node.output:
            if name in producer:
                label = node.name or node.op_type
                raise ModelError(f"node {label!r} produces {name!r} a second time")
            if name:
                producer[name] = index
    scope = _Scope(dict.fromkeys(known), _Scope(producer, outer))
    needs: list[set[int]] = []
    for index, node in enumerate(nodes):
        wanted = dict.fromkeys(node.input)
        for subgraph in _graphs(node):
            _check_graph(subgraph, scope, depth + 1)
            wanted.update(dict.fromkeys(sorted(_captured(subgraph), key=str)))
        label = node.name or f"{node.op_type} number {index}"
        for name in wanted:
            if name and name not in scope:
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
        names = [nodes[i].name or nodes[i].op_type for i in waiting]
        raise ModelError(f"{graph} has a cycle through {', '.join(names[:5])}")


def _captured(proto: onnx.GraphProto) -> set[str]:
    """Return the names that a subgraph reads from outside."""
    own = {info.name for info in proto.input}
    own.update(tensor.name for tensor in proto.initializer)
    own.update(tensor.values.name for tensor in proto.sparse_initializer)
    own.update(name for node in proto.node for name in node.output)
    wanted = {info.name for info in proto.output}
    for node in proto.node:
        wanted.update(node.input)
        for subgraph in _graphs(node):
            wanted |= _captured(subgraph)
    return wanted - own - {""}
