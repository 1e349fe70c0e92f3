"""Decoders in a loaded model are found and replaced by the weights they compute.

A decoder is recognised by the first character of every name inside it, and by its
nodes: only operators that the encoder writes, which read initializers only. Its value
is what ONNX says these operators compute. A decoder is never trusted, since somebody
else may have written or broken it: the shape of every intermediate tensor is computed
and bounded before anything is allocated, and indices are checked. One that fails is
left alone or refused.

Tested in tests/storage/test_storage.py.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError
from onnxshrink.model.topology import Constant, Graph, is_onnx, tensor_of
from onnxshrink.storage.census import cast_type
from onnxshrink.storage.encoder import MAX_INFLATION, PREFIX, SLACK, SUPPORTED
from onnxshrink.tensors import ArrayTensor, LazyTensor, SparseTensor

__all__ = ["DecodedTensor", "recognise"]

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

_MAX_STEPS = 64
_MAX_RANK = 16
_MAX_GROWTH = 64
"""An intermediate tensor has at most this many times the bytes of the result."""
_TABLES = 4 << 20
"""Bytes that an intermediate tensor may have whatever the size of the result."""


class _RefusedError(Exception):
    """This is not a decoder of ours."""


@dataclass(frozen=True)
class _Kind:
    """Shape and dtype of a value, and the value itself if it is small and known."""

    shape: Shape
    dtype: np.dtype[Any]
    value: Array | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def known(self) -> Array:
        """Return the value; refuse if it is computed or large."""
        if self.value is None:
            raise _RefusedError
        return self.value


@dataclass(frozen=True)
class _Step:
    """One operation; values are known by name."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any]


def _require(condition: bool) -> None:
    if not condition:
        raise _RefusedError


# --- operators: what comes out, and how -----------------------------------------------
#
# `infer` sees shapes only and refuses what the encoder would not write; `run` computes.
# Both get the step's attributes after the inputs.


def _cast_target(attrs: Mapping[str, Any]) -> np.dtype[Any]:
    target = attrs.get("to")
    _require(isinstance(target, int) and target in SUPPORTED)
    return cast_type(int(attrs["to"]))


def _infer_cast(x: _Kind, **attrs: Any) -> _Kind:
    _require(set(attrs) == {"to"})
    return _Kind(x.shape, _cast_target(attrs))


def _run_cast(x: Array, **attrs: Any) -> Array:
    with np.errstate(all="ignore"):
        return x.astype(_cast_target(attrs))


def _infer_gather(data: _Kind, index: _Kind, axis: int = 0) -> _Kind:
    _require(index.dtype == np.int32 and axis in (0, 1) and axis < len(data.shape))
    return _Kind(data.shape[:axis] + index.shape + data.shape[axis + 1 :], data.dtype)


def _run_gather(data: Array, index: Array, axis: int = 0) -> Array:
    return np.take(data, index, axis=axis)


def _infer_reshape(data: _Kind, shape: _Kind) -> _Kind:
    _require(shape.dtype == np.int64 and len(shape.shape) == 1)
    wanted = [int(dim) for dim in shape.known()]
    size = math.prod(data.shape)
    if wanted.count(-1) == 1:
        rest = math.prod(dim for dim in wanted if dim != -1)
        _require(rest > 0 and size % rest == 0)
        wanted[wanted.index(-1)] = size // rest
    _require(all(dim > 0 for dim in wanted) and math.prod(wanted) == size)
    return _Kind(tuple(wanted), data.dtype)


def _run_reshape(data: Array, shape: Array) -> Array:
    return data.reshape([int(dim) for dim in shape])


def _infer_cumsum(x: _Kind, axis: _Kind, exclusive: int = 0) -> _Kind:
    _require(x.dtype == np.int32 and axis.shape == () and exclusive in (0, 1))
    _require(0 <= int(axis.known()) < len(x.shape))
    return _Kind(x.shape, x.dtype)


def _run_cumsum(x: Array, axis: Array, exclusive: int = 0) -> Array:
    total = np.cumsum(x, axis=int(axis), dtype=np.int32)
    return total - x if exclusive else total


def _infer_integer(a: _Kind, b: _Kind) -> _Kind:
    _require(a.dtype == b.dtype == np.int32)
    return _Kind(_broadcast(a, b), a.dtype)


def _broadcast(*kinds: _Kind) -> Shape:
    try:
        return np.broadcast_shapes(*(kind.shape for kind in kinds))
    except ValueError as error:
        raise _RefusedError from error


def _infer_quotient(a: _Kind, b: _Kind) -> _Kind:
    _require(bool((b.known() > 0).all()))
    return _infer_integer(a, b)


def _run_div(a: Array, b: Array) -> Array:
    # ONNX rounds towards zero, numpy down; they agree from zero on.
    if a.size and a.min() < 0:
        raise ValueError("a packed word is negative")
    return a // b


def _infer_less(a: _Kind, b: _Kind) -> _Kind:
    return _Kind(_infer_integer(a, b).shape, np.dtype(bool))


def _infer_where(condition: _Kind, a: _Kind, b: _Kind) -> _Kind:
    _require(condition.dtype == bool and a.dtype == b.dtype == np.int32)
    return _Kind(_broadcast(condition, a, b), a.dtype)


def _infer_concat(a: _Kind, b: _Kind, axis: int) -> _Kind:
    _require(axis == 0 and len(a.shape) == len(b.shape) == 1 and a.dtype == b.dtype)
    return _Kind((a.shape[0] + b.shape[0],), a.dtype)


def _run_concat(a: Array, b: Array, axis: int) -> Array:
    return np.concatenate([a, b])


def _infer_slice(x: _Kind, *bounds: _Kind, **attrs: Any) -> _Kind:
    if bounds:
        _require(len(bounds) == 2 and not attrs)
        _require(all(kind.dtype == np.int64 for kind in bounds))
        starts, ends = (kind.known().tolist() for kind in bounds)
    else:
        _require(set(attrs) == {"starts", "ends", "axes"} and attrs["axes"] == [0])
        starts, ends = attrs["starts"], attrs["ends"]
    _require(starts == [0] and isinstance(ends, list) and len(ends) == 1)
    _require(len(x.shape) == 1 and 0 < int(ends[0]) <= x.shape[0])
    return _Kind((int(ends[0]),), x.dtype)


def _run_slice(x: Array, *bounds: Array, **attrs: Any) -> Array:
    return x[: int(bounds[1][0] if bounds else attrs["ends"][0])]


def _infer_fill(shape: _Kind, value: Any = None) -> _Kind:
    _require(shape.dtype == np.int64 and len(shape.shape) == 1)
    dims = tuple(int(dim) for dim in shape.known())
    _require(all(dim > 0 for dim in dims))
    filler = _filler(value)
    _require(filler.size == 1)
    return _Kind(dims, filler.dtype)


def _filler(value: Any) -> Array:
    if value is None:
        return np.zeros(1, np.float32)
    if isinstance(value, gs.Constant):
        values = value._values
        value = values.read() if isinstance(values, LazyTensor) else values
    _require(isinstance(value, np.ndarray))
    return np.asarray(value)


def _run_fill(shape: Array, value: Any = None) -> Array:
    filler = _filler(value).reshape(())
    result = np.empty([int(dim) for dim in shape], filler.dtype)
    result[...] = filler
    return result


def _infer_scatter(data: _Kind, index: _Kind, updates: _Kind) -> _Kind:
    _require(index.dtype == np.int32 and data.dtype == updates.dtype)
    _require(len(data.shape) == 1 and index.shape == updates.shape)
    _require(len(index.shape) == 1)
    return data


def _run_scatter(data: Array, index: Array, updates: Array) -> Array:
    result = data.copy()
    result[index] = updates
    return result


def _infer_range(start: _Kind, limit: _Kind, delta: _Kind) -> _Kind:
    _require(start.dtype == limit.dtype == delta.dtype == np.int32)
    _require(all(kind.shape == () for kind in (start, limit, delta)))
    _require(int(start.known()) == 0 and int(delta.known()) == 1)
    end = int(limit.known())
    _require(0 < end <= 1 << 16)
    return _Kind((end,), np.dtype(np.int32))


def _run_range(start: Array, limit: Array, delta: Array) -> Array:
    return np.arange(int(limit), dtype=np.int32)


_OPERATORS: dict[str, tuple[Callable[..., _Kind], Callable[..., Array]]] = {
    "Add": (_infer_integer, np.add),
    "Cast": (_infer_cast, _run_cast),
    "Concat": (_infer_concat, _run_concat),
    "ConstantOfShape": (_infer_fill, _run_fill),
    "CumSum": (_infer_cumsum, _run_cumsum),
    "Div": (_infer_quotient, _run_div),
    "Gather": (_infer_gather, _run_gather),
    "Identity": (lambda x: _Kind(x.shape, x.dtype), lambda x: x),
    "Less": (_infer_less, np.less),
    "Mod": (_infer_quotient, np.mod),
    "Mul": (_infer_integer, np.multiply),
    "Range": (_infer_range, _run_range),
    "Reshape": (_infer_reshape, _run_reshape),
    "ScatterElements": (_infer_scatter, _run_scatter),
    "Slice": (_infer_slice, _run_slice),
    "Sub": (_infer_integer, np.subtract),
    "Where": (_infer_where, np.where),
}


# --- the weight -----------------------------------------------------------------------


class DecodedTensor(LazyTensor):
    """The values of a decoder, computed when they are read.

    Attributes:
        encoded_nbytes: Bytes of the initializers that the decoder reads.
    """

    cheap_to_reread: ClassVar[bool] = False

    def __init__(
        self, steps: Sequence[_Step], leaves: Mapping[str, LazyTensor]
    ) -> None:
        """Take a decoder: steps in order, and the values they start from.

        Raises:
            ModelError: It is none of ours, or too many values for its data.
        """
        self.steps = tuple(steps)
        self.leaves = dict(leaves)
        self.encoded_nbytes = sum(leaf.nbytes for leaf in self.leaves.values())
        try:
            result = self._infer()
        except _RefusedError:
            raise ModelError("these nodes are not a decoder of onnxshrink") from None
        data_type = onnx.helper.np_dtype_to_tensor_dtype(result.dtype)
        super().__init__(result.shape, data_type)
        self._last: weakref.ref[Array] | None = None

    def _infer(self) -> _Kind:
        _require(0 < len(self.steps) <= _MAX_STEPS)
        kinds = {name: _leaf_kind(leaf) for name, leaf in self.leaves.items()}
        sizes = []
        for step in self.steps:
            infer, _ = _OPERATORS[step.op]
            try:
                kind = infer(*(kinds[name] for name in step.inputs), **step.attrs)
            except (TypeError, ValueError, KeyError) as error:
                raise _RefusedError from error
            kinds[step.output] = kind
            _require(len(kind.shape) <= _MAX_RANK)
            sizes.append(kind.nbytes)
        result = kinds[self.steps[-1].output]
        _require(result.nbytes <= SLACK + MAX_INFLATION * self.encoded_nbytes)
        _require(max(sizes) <= _TABLES + _MAX_GROWTH * result.nbytes)
        return result

    def read(self) -> Array:
        """Return all values, computed again unless somebody still holds them.

        Raises:
            ModelError: The encoded data are broken: an index is out of range.
        """
        last = self._last() if self._last is not None else None
        if last is not None:
            return last
        uses: dict[str, int] = {}
        for step in self.steps:
            for name in step.inputs:
                uses[name] = uses.get(name, 0) + 1
        values = {name: leaf.read() for name, leaf in self.leaves.items()}
        for step in self.steps:
            _, run = _OPERATORS[step.op]
            try:
                result = run(*(values[name] for name in step.inputs), **step.attrs)
            except (IndexError, ValueError, OverflowError, MemoryError) as error:
                raise ModelError(
                    f"the decoder of {self.steps[-1].output!r} is broken: "
                    f"{step.op} fails: {error}"
                ) from error
            for name in step.inputs:
                uses[name] -= 1
                if not uses[name]:
                    del values[name]
            values[step.output] = np.asarray(result)
        array = np.ascontiguousarray(values[self.steps[-1].output])
        array = array.reshape(self.shape)
        array.flags.writeable = False
        self._last = weakref.ref(array)
        return array


def _leaf_kind(leaf: LazyTensor) -> _Kind:
    small = leaf.size <= _MAX_RANK and leaf.dtype.kind == "i"
    return _Kind(leaf.shape, leaf.dtype, leaf.read() if small else None)


def decode(
    nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]
) -> DecodedTensor:
    """Return the weight that the last node of a decoder gives.

    Args:
        nodes: The nodes of one encoding, and of earlier ones that it builds on.
        initializers: What they read.

    Raises:
        ModelError: They are not a decoder, or are broken.
    """
    producer = {node.output[0]: node for node in nodes}
    tensors = {tensor.name: tensor for tensor in initializers}
    last = next(reversed(producer.values()))
    steps: dict[str, _Step] = {}
    leaves: dict[str, LazyTensor] = {}

    def visit(name: str) -> None:
        if name in steps or name in leaves:
            return
        if name not in producer:
            if name not in tensors:
                raise ModelError(f"nothing produces {name!r}")
            leaves[name] = ArrayTensor(onnx.numpy_helper.to_array(tensors[name]))
            return
        node = producer[name]
        for source in node.input:
            visit(source)
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "value" in attrs:
            attrs["value"] = onnx.numpy_helper.to_array(attrs["value"])
        steps[name] = _Step(node.op_type, tuple(node.input), name, attrs)

    visit(last.output[0])
    return DecodedTensor(tuple(steps.values()), leaves)


# --- finding decoders -----------------------------------------------------------------


def _trace(
    root: gs.Node, forbidden: set[int]
) -> tuple[dict[int, gs.Node], dict[str, gs.Constant]]:
    """Return the nodes of a decoder, sources first, and the constants it reads."""
    order: dict[int, gs.Node] = {}
    leaves: dict[str, gs.Constant] = {}
    stack: list[tuple[gs.Node, bool]] = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if id(node) in order:
            continue
        if ready:
            order[id(node)] = node
            continue
        _require(len(order) + len(stack) <= 4 * _MAX_STEPS)
        is_known = is_onnx(node.domain) and node.op in _OPERATORS
        _require(is_known and len(node.outputs) == 1)
        stack.append((node, True))
        for tensor in reversed(node.inputs):
            _require(tensor.name.startswith(PREFIX) and id(tensor) not in forbidden)
            if isinstance(tensor, gs.Constant):
                leaves[tensor.name] = tensor
                continue
            _require(len(tensor.inputs) == 1)
            stack.append((tensor.inputs[0], False))
    return order, leaves


def recognise(graph: Graph) -> None:
    """Replace the decoders in the main graph by the weights they stand for.

    The weights are read lazily. Nodes that only look like a decoder stay as they are.
    """
    forbidden = {id(tensor) for tensor in [*graph.inputs, *graph.outputs]}
    found: list[tuple[gs.Node, DecodedTensor, dict[str, gs.Constant]]] = []
    traced: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if (
            node.op not in _OPERATORS
            or len(node.outputs) != 1
            or node.outputs[0].name.startswith(PREFIX)
            or id(node.outputs[0]) in forbidden
            or not any(tensor.name.startswith(PREFIX) for tensor in node.inputs)
        ):
            continue
        try:
            order, leaves = _trace(node, forbidden)
            steps = [
                _Step(
                    inner.op,
                    tuple(tensor.name for tensor in inner.inputs),
                    inner.outputs[0].name,
                    dict(inner.attrs),
                )
                for inner in order.values()
            ]
            tensors = {name: tensor_of(leaf) for name, leaf in leaves.items()}
            _require(not any(isinstance(t, SparseTensor) for t in tensors.values()))
            decoded = DecodedTensor(steps, tensors)
        except (_RefusedError, ModelError):
            continue
        found.append((node, decoded, leaves))
        traced.update(order)
    if not found:
        return
    placed: dict[str, list[Constant]] = {}
    claimed: set[str] = set()
    names = list(graph.initializers)
    anchor = names[0] if names else ""
    for node, decoded, leaves in found:
        own = [name for name in names if name in leaves and name not in claimed]
        claimed.update(own)
        anchor = own[0] if own else anchor
        variable = node.outputs[0]
        constant = Constant(variable.name, decoded)
        for user in list(dict.fromkeys(variable.outputs)):
            for index, tensor in enumerate(user.inputs):
                if tensor is variable:
                    user.inputs[index] = constant
        placed.setdefault(anchor, []).append(constant)
    _drop(graph, traced)
    initializers: dict[str, Constant] = {}
    for name, constant in graph.initializers.items():
        if name not in claimed or constant.outputs or id(constant) in forbidden:
            initializers[name] = constant
        for weight in placed.get(name, ()):
            initializers[weight.name] = weight
    graph.initializers = initializers
    graph.used_at_load |= {weight.name for ws in placed.values() for weight in ws}


def _drop(graph: gs.Graph, traced: Mapping[int, gs.Node]) -> None:
    """Remove the traced nodes that nothing reads any more.

    A node that several decoders share is listed once, before all its readers.
    """
    pinned = {id(tensor) for tensor in graph.outputs}
    gone: set[int] = set()
    for node in reversed(list(traced.values())):
        output = node.outputs[0]
        if not output.outputs and id(output) not in pinned:
            gone.add(id(node))
            node.inputs.clear()
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
    for key in gone:
        traced[key].outputs.clear()
