"""Shapes of values for one given feed, and the multiply-accumulates they make.

Tested in tests/measuring/test_measure.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.model.topology import is_onnx

__all__ = ["macs", "macs_by_value", "value_shapes"]

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def value_shapes(model: Model, inputs: Mapping[str, Sequence[int]]) -> Shapes:
    """Return the shape of every value that follows from the shapes of the inputs.

    Args:
        model: The model.
        inputs: Shapes of its inputs by name.

    Returns:
        Static shapes by value name, of the main graph and of subgraphs. A value whose
        shape depends on data is absent.
    """
    return _shapes(_inferred(model, inputs).graph)


def macs(model: Model, feed: Mapping[str, np.ndarray[Any, Any]]) -> int | None:
    """Return the multiply-accumulates of one run on a feed.

    Counted are convolutions, matrix products, Einsum, recurrent layers and attention,
    in their dense form, whatever the weights hold. Of an If the dearer branch counts;
    the body of a Loop or Scan counts once.

    Returns:
        The number, or ``None`` where a shape that matters cannot be found.
    """
    found = macs_by_value(model, feed)
    return None if None in found.values() else sum(n or 0 for n in found.values())


def macs_by_value(
    model: Model, feed: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, int | None]:
    """Return the multiply-accumulates of every node that has some, by its first output.

    Nodes inside subgraphs are summed up at the node that holds them. ``None`` stands
    where a shape that matters cannot be found.
    """
    proto = _inferred(model, {name: array.shape for name, array in feed.items()})
    shapes = _shapes(proto.graph)
    found = _count(proto.graph, shapes)
    unknown = {name for name, number in found.items() if number is None}
    if unknown:
        _run_for_shapes(model, proto.graph, unknown, feed, shapes)
        found = _count(proto.graph, shapes)
    return found


def _inferred(model: Model, inputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """Return a skeleton of the model with functions inlined and shapes inferred."""
    proto = model.skeleton()
    for info in proto.graph.input:
        shape = inputs.get(info.name)
        if shape is not None and info.type.HasField("tensor_type"):
            dims = info.type.tensor_type.shape
            del dims.dim[:]
            for size in shape:
                dims.dim.add(dim_value=size)
            info.type.tensor_type.shape.CopyFrom(dims)
    # Recorded shapes of inner values hold symbols that the given sizes now replace.
    del proto.graph.value_info[:]
    for info in proto.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    try:
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return proto


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _shapes(graph: onnx.GraphProto) -> Shapes:
    found: Shapes = {}

    def visit(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            found[tensor.name] = tuple(tensor.dims)
        for sparse in graph.sparse_initializer:
            found[sparse.values.name] = tuple(sparse.dims)
        for info in (*graph.input, *graph.value_info, *graph.output):
            if not info.type.HasField("tensor_type"):
                continue
            tensor_type = info.type.tensor_type
            if tensor_type.HasField("shape") and all(
                dim.HasField("dim_value") for dim in tensor_type.shape.dim
            ):
                found[info.name] = tuple(d.dim_value for d in tensor_type.shape.dim)
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    found[node.output[0]] = tuple(attribute.t.dims)
            for subgraph in _subgraphs(node):
                visit(subgraph)

    visit(graph)
    return found


def _run_for_shapes(
    model: Model,
    graph: onnx.GraphProto,
    unknown: set[str],
    feed: Mapping[str, np.ndarray[Any, Any]],
    shapes: Shapes,
) -> None:
    """Fill in missing shapes around some nodes by running the model once."""
    from onnxshrink import runtime

    produced = {name for node in graph.node for name in node.output if name}
    wanted = {
        name
        for node in graph.node
        if node.output and node.output[0] in unknown
        for name in (*node.input, *node.output)
        if name in produced and name not in shapes
    }
    try:
        session = runtime.session(
            model, expose=sorted(wanted), only_exposed=True, optimize="off"
        )
        for name, value in session.run(feed).items():
            if isinstance(value, np.ndarray):
                shapes[name] = value.shape
    except ModelError:
        return


# --- counting ---------------------------------------------------------------------


def _count(
    graph: onnx.GraphProto, shapes: Mapping[str, Shape]
) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for node in graph.node:
        number = _node(node, shapes)
        if number != 0 and node.output:
            found[next(name for name in node.output if name)] = number
    return found


def _node(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    inner = []
    for subgraph in _subgraphs(node):
        counts = _count(subgraph, shapes).values()
        inner.append(None if None in counts else sum(n or 0 for n in counts))
    if inner:
        known = [number for number in inner if number is not None]
        return max(known) if len(known) == len(inner) else None
    rule = _RULES.get(node.op_type)
    if rule is None or not (is_onnx(node.domain) or node.domain == "com.microsoft"):
        return 0
    try:
        return rule(node, [shapes.get(n) for n in node.input], shapes)
    except (_UnknownError, IndexError, ValueError):
        return None


class _UnknownError(Exception):
    """A shape that a rule needs is not known."""


Inputs = Sequence[Shape | None]
Rule = Callable[[onnx.NodeProto, Inputs, Mapping[str, Shape]], int]


def _at(inputs: Inputs, index: int) -> Shape:
    shape = inputs[index] if index < len(inputs) else None
    if shape is None:
        raise _UnknownError
    return shape


def _out(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> Shape:
    shape = shapes.get(node.output[0])
    if shape is None:
        raise _UnknownError
    return shape


def _int(node: onnx.NodeProto, name: str, default: int | None = None) -> int:
    for attribute in node.attribute:
        if attribute.name == name:
            return int(attribute.i)
    if default is None:
        raise _UnknownError
    return default


def _conv(weight: int) -> Rule:
    def rule(node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]) -> int:
        return math.prod(_out(node, shapes)) * math.prod(_at(inputs, weight)[1:])

    return rule


def _conv_transpose(
    node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]
) -> int:
    return math.prod(_at(inputs, 0)) * math.prod(_at(inputs, 1)[1:])


def _matmul(left: int, right: int, trans: str = "", trans_right: str = "") -> Rule:
    def rule(node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]) -> int:
        one, two = _at(inputs, left), _at(inputs, right)
        swapped = bool(trans and _int(node, trans, 0))
        depth = one[-2] if swapped else one[-1]
        if len(two) == 1:
            return math.prod(one)
        if len(one) == 1:
            return math.prod(two)
        rows = one[-1] if swapped else one[-2]
        other = bool(trans_right and _int(node, trans_right, 0))
        columns = two[-2] if other else two[-1]
        batch = math.prod(np.broadcast_shapes(one[:-2], two[:-2]))
        return batch * rows * depth * columns

    return rule


def _einsum(node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]) -> int:
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for place, term in enumerate(terms):
        shape = _at(inputs, place)
        before, dots, after = term.partition("...")
        rest = len(shape) - len(before) - len(after)
        # Broadcast axes are counted from the right, so that terms line up.
        middle = [f".{number}" for number in range(rest, 0, -1)] if dots else []
        for letter, size in zip([*before, *middle, *after], shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values()) if len(terms) > 1 else 0


def _recurrent(
    node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]
) -> int:
    steps = math.prod(_at(inputs, 0)[:2])
    return steps * (math.prod(_at(inputs, 1)) + math.prod(_at(inputs, 2)))


def _packed(node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]) -> int:
    return math.prod(_at(inputs, 0)[:-1]) * _int(node, "K") * _int(node, "N")


def _attention(
    node: onnx.NodeProto, inputs: Inputs, shapes: Mapping[str, Shape]
) -> int:
    """Scores and weighted sum; the projection too where the operator contains it."""
    query = _at(inputs, 0)
    if node.op_type == "Attention" and node.domain == "com.microsoft":
        batch, length, width = query
        weight = _at(inputs, 1)
        inner = weight[1] // 3
        project = batch * length * math.prod(weight)
        return project + 2 * batch * length * length * inner
    key = _at(inputs, 1)
    value = _at(inputs, 2)
    if len(query) == 4:
        batch, heads, length, depth = query
        return batch * heads * length * key[2] * (depth + value[3])
    batch, length, width = query
    if node.op_type == "Attention":
        ratio = _int(node, "q_num_heads") // max(1, _int(node, "kv_num_heads"))
        return batch * length * key[1] * (width + value[2] * ratio)
    return batch * length * key[1] * (width + value[2])


_RULES: Mapping[str, Rule] = {
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "DeformConv": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul(0, 1),
    "MatMulInteger": _matmul(0, 1),
    "MatMulIntegerToFloat": _matmul(0, 1),
    "DynamicQuantizeMatMul": _matmul(0, 1),
    "QLinearMatMul": _matmul(0, 3),
    "FusedMatMul": _matmul(0, 1, "transA", "transB"),
    "Gemm": _matmul(0, 1, "transA", "transB"),
    "FusedGemm": _matmul(0, 1, "transA", "transB"),
    "QGemm": _matmul(0, 3, "transA", "transB"),
    "MatMulNBits": _packed,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}
