"""What nodes carry and read: weights, types of values, attributes.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model.importer import dims_of
from onnxshrink.model.topology import Node, tensor_of
from onnxshrink.tensors import LazyTensor

if TYPE_CHECKING:
    from onnxshrink.model.model import Model

__all__ = ["ValueInfo", "Weight", "attribute"]


@dataclass(frozen=True)
class ValueInfo:
    """Name and type of a value.

    Attributes:
        name: Name of the value.
        data_type: ONNX element type; 0 if unknown or not a tensor.
        shape: An int, a symbol or ``None`` for each dimension; ``None``: unknown rank.
        kind: ``tensor``, ``sequence``, ``optional``, ``map`` or ``sparse_tensor``.
    """

    name: str
    data_type: int
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"

    @classmethod
    def from_proto(cls, info: onnx.ValueInfoProto) -> ValueInfo:
        """Read one from a proto."""
        which = info.type.WhichOneof("value") or "tensor_type"
        kind = which.removesuffix("_type")
        if which != "tensor_type":
            return cls(info.name, 0, None, kind)
        tensor = info.type.tensor_type
        return cls(info.name, tensor.elem_type, dims_of(tensor))


class Weight:
    """A value the model carries, wherever it stands: an initializer or a Constant node.

    Attributes:
        name: Its name; behind a path of graph names where a name occurs twice.
        constant: The graph's constant, or the attribute value of the Constant node.
        node: The Constant node, if it is one.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        constant: gs.Constant,
        node: Node | None,
        graph: gs.Graph | None = None,
    ) -> None:
        """Made by ``Model.weights``."""
        self._model = model
        self.name = name
        self.constant = constant
        self.node = node
        self._graph = graph

    @property
    def model(self) -> Model:
        """The model it belongs to."""
        return self._model

    @property
    def graph(self) -> gs.Graph:
        """The graph it belongs to."""
        if self._graph is None:
            self._graph = (
                self._model._graph_of(self.node)
                if self.node is not None
                else self._model._owner(self.constant)
            )
        return self._graph

    @property
    def tensor(self) -> LazyTensor:
        """The values, not read yet."""
        return tensor_of(self.constant)

    @property
    def value(self) -> gs.Tensor:
        """The tensor that nodes read."""
        return self.node.outputs[0] if self.node is not None else self.constant

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what ``read`` returns."""
        return self.tensor.dtype

    @property
    def data_type(self) -> int:
        """ONNX element type."""
        return self.tensor.data_type

    @property
    def nbytes(self) -> int:
        """Bytes as plain raw data."""
        return self.tensor.nbytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.tensor.size

    @property
    def is_input(self) -> bool:
        """Whether it is also a graph input, so that a caller may override it."""
        return any(tensor is self.constant for tensor in self.graph.inputs)

    @property
    def is_output(self) -> bool:
        """Whether it is itself an output of its graph."""
        return any(tensor is self.value for tensor in self.graph.outputs)

    @property
    def uses(self) -> tuple[tuple[Node, int], ...]:
        """(node, input index) of all that reads it.

        Identity nodes and calls of model-local functions are looked through.
        """
        return tuple(self._model._uses(self.value))

    def read(self) -> np.ndarray[Any, Any]:
        """Return all values; do not write into the array."""
        return self.tensor.read()

    def chunks(self, nbytes: int = 8 << 20) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the values as flat pieces of at most ``nbytes`` bytes."""
        return self.tensor.chunks(nbytes)

    def __repr__(self) -> str:
        """Show name and type."""
        return f"Weight({self.name!r}, {self.tensor})"


def attribute(node: gs.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or the default where it is absent or a reference."""
    value = node.attrs.get(name, default)
    return default if isinstance(value, gs.Node.AttributeRef) else value
