"""graphsurgeon's graph classes, with identity instead of deep equality and an origin.

graphsurgeon compares nodes and tensors by name and attributes, which makes its own list
operations quadratic and unnamed nodes interchangeable; here an object equals itself.
Each object remembers the proto it was read from, so that what nobody touched is written
back byte for byte.

Objects that a pass makes with plain graphsurgeon become ours as soon as they enter a
graph. Lists of nodes and outputs leave hints on their items, so that finding an item
does not walk the whole model; a hint is checked whenever it is used, never trusted.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.function import Function as GsFunction

from onnxshrink.tensors import ArrayTensor, LazyTensor

__all__ = ["Constant", "Function", "FunctionList", "Graph", "Node", "Variable"]


class Node(gs.Node):  # type: ignore[misc]  # graphsurgeon is untyped
    """An operation; equal to itself only.

    Attributes:
        origin: The proto it was read from; ``None`` for a node made by a pass.
        origin_attrs: The attribute values as they were read, to see what changed.
        overload: Which overload of a model-local function it calls.
    """

    origin: onnx.NodeProto | None = None
    origin_attrs: dict[str, Any] | None = None
    overload: str = ""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Variable(gs.Variable):  # type: ignore[misc]
    """A value known only at run time; equal to itself only.

    Attributes:
        origin: Its entry in ``value_info``, if it had one.
        origin_info: (dtype, shape) as read, to see what changed.
    """

    origin: onnx.ValueInfoProto | None = None
    origin_info: tuple[Any, Any] | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @staticmethod
    def empty() -> Variable:
        """Return what stands for an input or output that is left out."""
        return Variable("")

    def to_constant(self, *args: Any, **kwargs: Any) -> Any:
        """Become a constant, in place (graphsurgeon's name)."""
        super().to_constant(*args, **kwargs)
        self.__class__ = Constant
        return self


class Constant(gs.Constant):  # type: ignore[misc]
    """A value known now, read when asked for; equal to itself only.

    Attributes:
        origin: The tensor proto it was read from (without data that stayed in a file).
        origin_tensor: Its values as they were read, to see what changed.
    """

    origin: onnx.TensorProto | onnx.SparseTensorProto | None = None
    origin_tensor: LazyTensor | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def tensor(self) -> LazyTensor:
        """The values, not read yet."""
        return tensor_of(self)

    def to_variable(self, *args: Any, **kwargs: Any) -> Any:
        """Become a variable, in place (graphsurgeon's name)."""
        super().to_variable(*args, **kwargs)
        self.__class__ = Variable
        return self


def tensor_of(constant: gs.Constant) -> LazyTensor:
    """Return a constant's values as a lazy tensor, even if gs has read ``.values``."""
    values = constant._values
    if isinstance(values, LazyTensor):
        return values
    wrapped = constant.__dict__.get("_wrapped")
    if wrapped is None or wrapped[0] is not values:
        export = constant._export_dtype
        data_type = int(export) if isinstance(export, int) else None
        wrapped = values, ArrayTensor(values, data_type)
        constant.__dict__["_wrapped"] = wrapped
    lazy: LazyTensor = wrapped[1]
    return lazy


def adopt_tensor(tensor: gs.Tensor) -> None:
    """Turn a plain graphsurgeon tensor into ours, in place."""
    kind = type(tensor)
    if kind is gs.Variable:
        tensor.__class__ = Variable
    elif kind is gs.Constant:
        tensor.__class__ = Constant


def adopt_graph(graph: gs.Graph) -> None:
    """Turn a plain graphsurgeon graph or function into ours, in place."""
    if isinstance(graph, (Graph, Function)):
        return
    graph.__class__ = Function if isinstance(graph, GsFunction) else Graph
    for name in ("initializers", "input_info", "output_info"):
        graph.__dict__.setdefault(name, {})
    graph.__dict__.setdefault("value_infos", [])
    graph.nodes = graph.nodes
    graph.inputs = graph.inputs
    graph.outputs = graph.outputs


class FunctionList(list[Any]):
    """The functions of a model; one list that all its graphs share.

    Attributes:
        arrivals: Nodes that entered one of the graphs and whose names nobody has
            noted yet.
        edits: Grows with every node that enters or leaves.
        calls: The callers of each function, and how many edits there were by then.
    """

    def __init__(self, functions: Iterable[Any] = ()) -> None:
        """Make a list."""
        super().__init__(functions)
        self.arrivals: list[gs.Node] = []
        self.edits = 0
        self.calls: tuple[int, dict[Any, list[gs.Node]]] | None = None


class NodeList(list[Any]):
    """The nodes of a graph; finds, inserts and removes one without comparing them all.

    Each node carries the place where it was last seen. Edits shift places, so the
    search starts there, corrected by the last shift found, and looks around.
    """

    _REACH = 512

    def __init__(self, owner: Any, nodes: Iterable[gs.Node] = ()) -> None:
        """Make the list of ``owner``."""
        super().__init__()
        self._owner = owner
        self._drift = 0
        self.extend(nodes)

    def load(self, nodes: Iterable[gs.Node]) -> None:
        """Append nodes whose names are known, such as those of a file."""
        for at, node in enumerate(nodes, len(self)):
            node.__dict__["_home"] = self._owner
            node.__dict__["_at"] = at
            super().append(node)

    def _adopt(self, node: gs.Node, at: int) -> None:
        if type(node) is gs.Node:
            node.__class__ = Node
        for tensor in (*node.inputs, *node.outputs):
            adopt_tensor(tensor)
        for graph in subgraphs_of(node):
            adopt_graph(graph)
        node.__dict__["_home"] = self._owner
        node.__dict__["_at"] = at
        shared = self._owner.__dict__.get("_functions")
        if isinstance(shared, FunctionList):
            shared.arrivals.append(node)
            shared.edits += 1

    def _leave(self, node: gs.Node) -> None:
        if node.__dict__.get("_home") is self._owner:
            node.__dict__["_home"] = None
        shared = self._owner.__dict__.get("_functions")
        if isinstance(shared, FunctionList):
            shared.edits += 1

    def _place(self, node: Any) -> int:
        """Return where a node stands, or -1."""
        notes = getattr(node, "__dict__", {})
        home = notes.get("_home")
        if home is None:
            return next((i for i, other in enumerate(self) if other is node), -1)
        if home is not self._owner:
            return -1
        guess = notes["_at"] + self._drift
        count = len(self)
        for step in range(self._REACH):
            for at in (guess + step, guess - step):
                if 0 <= at < count and self[at] is node:
                    self._drift = at - int(notes["_at"])
                    return int(at)
        self._drift = 0
        for at, other in enumerate(self):
            other.__dict__["_at"] = at
        at = int(notes["_at"])
        return at if at < count and self[at] is node else -1

    def __contains__(self, node: object) -> bool:
        return self._place(node) >= 0

    def index(
        self,
        node: Any,
        start: SupportsIndex = 0,
        stop: SupportsIndex = 1 << 62,
        /,
    ) -> int:
        """Return where a node stands.

        Raises:
            ValueError: It is not there.
        """
        at = self._place(node)
        if at < 0 or at not in range(*slice(start, stop).indices(len(self))):
            raise ValueError(f"node {node.name or node.op!r} is not in this graph")
        return at

    def append(self, node: Any) -> None:
        """Add a node at the end."""
        self._adopt(node, len(self) - self._drift)
        super().append(node)

    def insert(self, at: SupportsIndex, node: Any) -> None:
        """Add a node before place ``at``."""
        place = slice(at, None).indices(len(self))[0]
        super().insert(place, node)
        self._adopt(node, place - self._drift)

    def extend(self, nodes: Iterable[Any]) -> None:
        """Add nodes at the end."""
        for node in list(nodes):
            self.append(node)

    def __iadd__(self, nodes: Iterable[Any]) -> NodeList:  # type: ignore[misc]
        self.extend(nodes)
        return self

    def __setitem__(self, at: Any, value: Any) -> None:
        gone = self[at] if isinstance(at, slice) else [self[at]]
        for node in gone:
            self._leave(node)
        super().__setitem__(at, value)
        if isinstance(at, slice):
            self._drift = 0
            for place, node in enumerate(self):
                if node.__dict__.get("_home") is self._owner:
                    node.__dict__["_at"] = place
                else:
                    self._adopt(node, place)
        else:
            place = at if at >= 0 else at + len(self)
            self._adopt(value, place - self._drift)

    def __delitem__(self, at: Any) -> None:
        for node in self[at] if isinstance(at, slice) else [self[at]]:
            self._leave(node)
        super().__delitem__(at)

    def remove(self, node: Any) -> None:
        """Take a node out; its edges stay.

        Raises:
            ValueError: It is not there.
        """
        del self[self.index(node)]

    def pop(self, at: SupportsIndex = -1) -> Any:
        """Take out and return the node at a place."""
        node = self[at]
        del self[at]
        return node

    def clear(self) -> None:
        """Take all nodes out; their edges stay."""
        del self[:]

    def keep(self, nodes: list[gs.Node]) -> None:
        """Leave only ``nodes``, which are all in the list and in its order."""
        if len(nodes) == len(self):
            return
        kept = {id(node) for node in nodes}
        for node in self:
            if id(node) not in kept:
                self._leave(node)
        super().__setitem__(slice(None), nodes)
        self._drift = 0
        for at, node in enumerate(self):
            node.__dict__["_at"] = at


class OutputList(list[Any]):
    """The outputs of a graph; each tensor in it knows which graphs may return it."""

    def __init__(self, owner: Any, tensors: Iterable[gs.Tensor] = ()) -> None:
        """Make the list of ``owner``."""
        super().__init__()
        self._owner = owner
        self.extend(tensors)

    def _note(self, tensor: gs.Tensor) -> None:
        adopt_tensor(tensor)
        graphs = tensor.__dict__.setdefault("_returned_by", [])
        if not any(graph is self._owner for graph in graphs):
            graphs.append(self._owner)

    def append(self, tensor: Any) -> None:
        """Add an output at the end."""
        self._note(tensor)
        super().append(tensor)

    def insert(self, at: SupportsIndex, tensor: Any) -> None:
        """Add an output before place ``at``."""
        self._note(tensor)
        super().insert(at, tensor)

    def extend(self, tensors: Iterable[Any]) -> None:
        """Add outputs at the end."""
        for tensor in list(tensors):
            self.append(tensor)

    def __iadd__(self, tensors: Iterable[Any]) -> OutputList:  # type: ignore[misc]
        self.extend(tensors)
        return self

    def __setitem__(self, at: Any, value: Any) -> None:
        for tensor in value if isinstance(at, slice) else [value]:
            self._note(tensor)
        super().__setitem__(at, value)


def returned_by(tensor: gs.Tensor) -> list[gs.Graph]:
    """Return the graphs of which a tensor is an output."""
    return [
        graph
        for graph in tensor.__dict__.get("_returned_by", ())
        if any(output is tensor for output in graph.outputs)
    ]


class _Lists:
    """Keeps the lists of a graph of the kinds above, whatever is assigned."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "nodes":
            if not (isinstance(value, NodeList) and value._owner is self):
                value = NodeList(self, value)
            object.__setattr__(self, name, value)
        elif name == "outputs":
            if not (isinstance(value, OutputList) and value._owner is self):
                value = OutputList(self, value)
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Graph(_Lists, gs.Graph):  # type: ignore[misc]
    """A graph or subgraph; equal to itself only.

    Attributes:
        origin: The proto it was read from.
        initializers: Its initializers by name, in file order, used or not.
        used_at_load: Names of those initializers that something used when it was read.
        input_info: The original entries of ``input`` by name.
        output_info: The original entries of ``output`` by name.
        value_infos: The original ``value_info`` entries, in file order.
    """

    origin: onnx.GraphProto | None = None
    initializers: dict[str, Constant]
    used_at_load: frozenset[str] = frozenset()
    input_info: dict[str, onnx.ValueInfoProto]
    output_info: dict[str, onnx.ValueInfoProto]
    value_infos: list[onnx.ValueInfoProto]

    def __init__(self, **kwargs: Any) -> None:
        """Make an empty graph; arguments are graphsurgeon's."""
        self.initializers = {}
        self.input_info = {}
        self.output_info = {}
        self.value_infos = []
        super().__init__(**kwargs)
        self._functions: Any = FunctionList(self.__dict__["_functions"])

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Function(_Lists, GsFunction):  # type: ignore[misc]
    """A model-local function; equal to itself only.

    Attributes:
        origin: The proto it was read from.
        overload: Its overload name (IR version 10).
        initializers: Constants of its body that have no node yet; written as Constant
            nodes, because a function has no initializers.
        value_infos: The original ``value_info`` entries, in file order.
    """

    origin: onnx.FunctionProto | None = None
    overload: str = ""
    used_at_load: frozenset[str] = frozenset()
    initializers: dict[str, Constant]
    value_infos: list[onnx.ValueInfoProto]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a function; arguments are graphsurgeon's."""
        self.initializers = {}
        self.value_infos = []
        super().__init__(*args, **kwargs)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def own(graph: gs.Graph, constant: gs.Constant, key: str | None = None) -> None:
    """Enter a constant among the initializers of a graph."""
    adopt_tensor(constant)
    graph.initializers[constant.name if key is None else key] = constant
    constant.__dict__["_home"] = graph


def domain_key(domain: str | None) -> str:
    """Return a domain's name; ONNX's own, however it is written, is ``""``."""
    return "" if domain is None or domain == "ai.onnx" else domain


def is_onnx(domain: str | None) -> bool:
    """Whether a domain is ONNX's own."""
    return not domain_key(domain)


def call_key(node: gs.Node) -> tuple[str, str, str]:
    """Return domain, name and overload of the function that a node would call."""
    return domain_key(node.domain), node.op, getattr(node, "overload", "")


def function_key(function: gs.Graph) -> tuple[str, str, str]:
    """Return domain, name and overload of a function."""
    return domain_key(function.domain), function.name, getattr(function, "overload", "")


def subgraphs_of(node: gs.Node) -> Iterator[gs.Graph]:
    """Yield the graphs in a node's attributes."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value
        elif isinstance(value, list) and value and isinstance(value[0], gs.Graph):
            yield from value
