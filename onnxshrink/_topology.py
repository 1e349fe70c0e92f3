"""graphsurgeon's graph classes, with identity instead of deep equality and an origin.

graphsurgeon compares nodes and tensors by name and attributes, which makes its own list
operations quadratic and unnamed nodes interchangeable; here an object equals itself.
Each object remembers the proto it was read from, so that what nobody touched is written
back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.function import Function as GsFunction

from onnxshrink.tensors import ArrayTensor, LazyTensor

__all__ = ["Constant", "Function", "Graph", "Node", "Variable"]


class Node(gs.Node):  # type: ignore[misc]  # graphsurgeon is untyped
    """An operation; equal to itself only.

    Attributes:
        origin: The proto it was read from; ``None`` for a node made by a pass.
        origin_attrs: The attribute values as they were read, to see what changed.
    """

    origin: onnx.NodeProto | None = None
    origin_attrs: dict[str, Any] | None = None

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


def tensor_of(constant: gs.Constant) -> LazyTensor:
    """Return a constant's values as a lazy tensor, also after gs ``.values``."""
    values = constant._values
    if isinstance(values, LazyTensor):
        return values
    wrapped = constant.__dict__.get("_wrapped")
    if not isinstance(wrapped, ArrayTensor) or wrapped.array is not values:
        export = constant._export_dtype
        wrapped = ArrayTensor(values, export if isinstance(export, int) else None)
        constant.__dict__["_wrapped"] = wrapped
    return wrapped


class Graph(gs.Graph):  # type: ignore[misc]
    """A graph or subgraph; equal to itself only.

    Attributes:
        origin: The proto it was read from, emptied of what is kept elsewhere.
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

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Function(GsFunction):  # type: ignore[misc]
    """A model-local function; equal to itself only.

    Attributes:
        origin: The proto it was read from, without its nodes.
        overload: Its overload name (IR version 10).
    """

    origin: onnx.FunctionProto | None = None
    overload: str = ""
    initializers: dict[str, Constant]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a function; arguments are graphsurgeon's."""
        self.initializers = {}
        super().__init__(*args, **kwargs)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def subgraphs_of(node: gs.Node) -> Iterable[gs.Graph]:
    """Yield the graphs in a node's attributes."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield value
