"""Shapes as polynomials of symbols, and the integers a graph computes from them.

onnx's own shape inference knows more operators; this knows more about each dimension.
``batch * 12`` stays what it is instead of becoming a fresh name, so that two shapes can
be proved equal, and what Shape, Gather, Concat and their kind compute from shapes is
followed as a list of such dimensions.

Tested in tests/passes/test_fold.py and tests/structure/test_channels.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Model, Node, ValueInfo
from onnxshrink.model.exporter import in_order
from onnxshrink.model.topology import is_onnx, subgraphs_of, tensor_of
from onnxshrink.structure.stand_ins import replace

__all__ = ["Dim", "Dims", "Facts", "Poly", "broadcast", "facts_of", "product"]

_VALUE_LIMIT = 64
"""Elements up to which an integer tensor is followed."""
_TERM_LIMIT = 16
_INT = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
_MEANINGLESS = frozenset({"", "?", "-1", "None", "none", "unk", "unknown", "dynamic"})
"""Names that exporters give to every dimension they do not know."""

Monomial: TypeAlias = "tuple[str, ...]"


@dataclass(frozen=True)
class Poly:
    """A sum of products of symbols with integer factors; never a plain number.

    Symbols stand for sizes, so they are never negative.

    Attributes:
        terms: (symbols, factor) in order, no factor zero.
    """

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def symbol(name: str) -> Poly:
        """Return the polynomial that is one symbol."""
        return Poly((((name,), 1),))

    def __add__(self, other: Dim) -> Dim:
        total = dict(self.terms)
        for monomial, factor in _terms(other):
            total[monomial] = total.get(monomial, 0) + factor
        return _normal(total)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return _normal({monomial: -factor for monomial, factor in self.terms})

    def __sub__(self, other: Dim) -> Dim:
        return self + -other

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        total: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in _terms(other):
                monomial = tuple(sorted(left + right))
                total[monomial] = total.get(monomial, 0) + a * b
        return _normal(total)

    __rmul__ = __mul__

    @property
    def is_size(self) -> bool:
        """Whether it cannot be negative."""
        return all(factor > 0 for _, factor in self.terms)

    def __str__(self) -> str:
        return "+".join(
            "*".join([str(factor), *monomial]) for monomial, factor in self.terms
        )


Dim: TypeAlias = "int | Poly"
Dims: TypeAlias = "tuple[Dim, ...]"


def _terms(dim: Dim) -> Iterable[tuple[Monomial, int]]:
    return [((), dim)] if isinstance(dim, int) else dim.terms


def _normal(terms: Mapping[Monomial, int]) -> Dim:
    kept = tuple(sorted((m, f) for m, f in terms.items() if f))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    if len(kept) > _TERM_LIMIT or any(len(m) > _TERM_LIMIT for m, _ in kept):
        return Poly.symbol(f"({Poly(kept)})")
    return Poly(kept)


def quotient(a: Dim, b: Dim) -> Dim:
    """Return ``a // b`` for sizes; exact where ``b`` divides every term."""
    if isinstance(a, int) and isinstance(b, int) and b > 0:
        return a // b
    parts = list(_terms(b))
    if len(parts) == 1:
        monomial, factor = parts[0]
        result: dict[Monomial, int] = {}
        for symbols, count in _terms(a):
            rest = list(symbols)
            for symbol in monomial:
                if symbol not in rest:
                    break
                rest.remove(symbol)
            else:
                if factor and count % factor == 0:
                    result[tuple(rest)] = count // factor
                    continue
            break
        else:
            return _normal(result)
    return Poly.symbol(f"({a})//({b})")


def product(dims: Iterable[Dim]) -> Dim:
    """Return the product of dimensions."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def broadcast(*shapes: Dims) -> Dims | None:
    """Return the shape that shapes broadcast to; ``None`` where that is not certain.

    Two different symbols may or may not be equal, and one of them may be 1.
    """
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        dims = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        numbers = [dim for dim in dims if isinstance(dim, int)]
        if not dims:
            result.append(1)
        elif len(dims) == 1:
            result.append(dims.pop())
        elif len(numbers) == 1:
            # A size that broadcasts with a number above 1 is that number or 1.
            result.append(numbers[0])
        else:
            return None
    return tuple(result)


@dataclass
class Facts:
    """What is known about the values of a model.

    Attributes:
        types: ONNX element type of each tensor.
        dims: Shape of each tensor whose rank is known.
        values: The elements of small integer tensors of rank 0 or 1.
        hidden: Constants that a caller may override, so that their values say nothing.
    """

    types: dict[gs.Tensor, int] = field(default_factory=dict)
    dims: dict[gs.Tensor, Dims] = field(default_factory=dict)
    values: dict[gs.Tensor, Dims] = field(default_factory=dict)
    hidden: frozenset[gs.Tensor] = frozenset()
    _fresh: int = 0

    def fresh(self) -> Poly:
        """Return a symbol that equals no other."""
        self._fresh += 1
        return Poly.symbol(f"?{self._fresh}")

    def type(self, tensor: gs.Tensor) -> int:
        """Return the element type; 0 if unknown."""
        if isinstance(tensor, gs.Constant):
            return tensor_of(tensor).data_type
        return self.types.get(tensor, 0)

    def shape(self, tensor: gs.Tensor) -> Dims | None:
        """Return the dimensions; ``None`` for unknown rank."""
        if isinstance(tensor, gs.Constant):
            return tensor_of(tensor).shape
        return self.dims.get(tensor)

    def value(self, tensor: gs.Tensor) -> Dims | None:
        """Return the elements of an integer tensor of rank 0 or 1 if known."""
        if tensor in self.values:
            return self.values[tensor]
        if not isinstance(tensor, gs.Constant) or tensor in self.hidden:
            return None
        values = tensor_of(tensor)
        if (
            values.data_type not in _INT
            or len(values.shape) > 1
            or values.size > _VALUE_LIMIT
        ):
            return None
        found = tuple(int(v) for v in values.read().reshape(-1))
        self.values[tensor] = found
        return found

    def copy(self, source: gs.Tensor, target: gs.Tensor) -> None:
        """Record that ``target`` has the type, shape and value of ``source``."""
        self.types[target] = self.type(source)
        shape, value = self.shape(source), self.value(source)
        if shape is not None:
            self.dims[target] = shape
        if value is not None:
            self.values[target] = value

    def describe(self, tensor: gs.Tensor, data_type: int, dims: Dims | None) -> None:
        """Record type and shape of a tensor that a rewrite made."""
        self.types[tensor] = data_type
        if dims is not None:
            self.dims[tensor] = dims


def facts_of(model: Model, unknown: Iterable[gs.Tensor] = ()) -> Facts:
    """Infer types, shapes and small integer values of all tensors.

    Args:
        model: The model; it is not changed.
        unknown: Constants whose values a caller may override: never followed.
    """
    facts = Facts(hidden=frozenset(unknown))
    infos = _inferred(model, facts.hidden)
    owner: dict[str, gs.Tensor] = {}
    ambiguous: set[str] = set()
    for graph in model.graphs():
        for tensor in _defined(graph):
            if owner.setdefault(tensor.name, tensor) is not tensor:
                ambiguous.add(tensor.name)
    for name in ambiguous:
        infos.pop(name, None)
    inside_functions = _inside(model.graph.functions)

    def visit(graph: gs.Graph) -> None:
        named = {} if graph in inside_functions else infos
        for tensor in graph.inputs:
            _adopt(facts, tensor, named.get(tensor.name))
        for node in in_order(graph.nodes):
            for subgraph in subgraphs_of(node):
                visit(subgraph)
            for tensor in node.outputs:
                if tensor.name:
                    _adopt(facts, tensor, named.get(tensor.name))
            if is_onnx(node.domain) and not _refers(node):
                _derive(facts, node)

    visit(model.graph)
    for function in model.graph.functions:
        visit(function)
    return facts


def _inferred(model: Model, hidden: frozenset[gs.Tensor]) -> dict[str, ValueInfo]:
    """Return what onnx infers, from the model's inputs and operators alone.

    What a file states about outputs and inner values is often wrong or out of date, and
    onnxruntime does not check it. It is used only for operators that onnx does not
    know.
    """
    proto = model.skeleton()
    found: dict[str, ValueInfo] = {}
    if any(tensor_of(tensor).data_type in _INT for tensor in hidden):
        # onnx would take the default of an input for its value.
        for info in proto.graph.input:
            found[info.name] = ValueInfo.from_proto(info)
        return found
    _forget(proto.graph, True)
    replace(proto.graph)
    failures = (onnx.shape_inference.InferenceError, RuntimeError, ValueError)
    # Where it fails, what is stated of inputs and unknown operators is still true.
    with contextlib.suppress(*failures):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)

    def visit(graph: onnx.GraphProto) -> None:
        for info in [*graph.input, *graph.output, *graph.value_info]:
            found.setdefault(info.name, ValueInfo.from_proto(info))
        for node in graph.node:
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    visit(attr.g)

    visit(proto.graph)
    return found


def _forget(graph: onnx.GraphProto, is_main: bool) -> None:
    """Drop what a file states about the results of ONNX's own operators."""
    foreign = {
        name for node in graph.node if not is_onnx(node.domain) for name in node.output
    }
    kept = [info for info in graph.value_info if info.name in foreign]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for info in [*graph.output, *([] if is_main else graph.input)]:
        if info.name not in foreign and info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attr in node.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                _forget(attr.g, False)


def _inside(functions: Iterable[gs.Graph]) -> set[gs.Graph]:
    found: set[gs.Graph] = set()
    stack = list(functions)
    while stack:
        graph = stack.pop()
        found.add(graph)
        for node in graph.nodes:
            stack.extend(subgraphs_of(node))
    return found


def _defined(graph: gs.Graph) -> Iterable[gs.Tensor]:
    yield from graph.inputs
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name:
                yield tensor


def _refers(node: gs.Node) -> bool:
    return any(isinstance(v, gs.Node.AttributeRef) for v in node.attrs.values())


def _adopt(facts: Facts, tensor: gs.Tensor, info: ValueInfo | None) -> None:
    if info is None or info.kind != "tensor" or isinstance(tensor, gs.Constant):
        return
    facts.types[tensor] = info.data_type
    if info.shape is None:
        return
    dims: list[Dim] = []
    for dim in info.shape:
        if isinstance(dim, int) and dim >= 0:
            dims.append(dim)
        elif isinstance(dim, str) and dim not in _MEANINGLESS:
            dims.append(Poly.symbol(dim))
        else:
            dims.append(facts.fresh())
    facts.dims[tensor] = tuple(dims)


# --- one operator at a time -------------------------------------------------------

_Shape = Callable[[Facts, Node], "Dims | None"]
_Value = Callable[[Facts, Node], "Dims | None"]
_SHAPES: dict[str, _Shape] = {}
_VALUES: dict[str, _Value] = {}


def _shape_of(*ops: str) -> Callable[[_Shape], _Shape]:
    def register(function: _Shape) -> _Shape:
        _SHAPES.update(dict.fromkeys(ops, function))
        return function

    return register


def _value_of(*ops: str) -> Callable[[_Value], _Value]:
    def register(function: _Value) -> _Value:
        _VALUES.update(dict.fromkeys(ops, function))
        return function

    return register


def _derive(facts: Facts, node: Node) -> None:
    """Improve on what is known of a node's first output."""
    if not node.outputs or not node.outputs[0].name:
        return
    output = node.outputs[0]
    shape_rule = _SHAPES.get(node.op)
    if shape_rule is not None:
        mine = shape_rule(facts, node)
        theirs = facts.dims.get(output)
        if mine is not None:
            if theirs is not None and len(theirs) == len(mine):
                mine = tuple(
                    b if isinstance(b, int) else a
                    for a, b in zip(mine, theirs, strict=True)
                )
            facts.dims[output] = mine
        same = _SAME_TYPE.get(node.op)
        if same is not None and not facts.types.get(output):
            facts.types[output] = facts.type(node.inputs[same])
    value_rule = _VALUES.get(node.op)
    if value_rule is None:
        return
    value = value_rule(facts, node)
    if value is None or len(value) > _VALUE_LIMIT:
        return
    if facts.types.get(output, onnx.TensorProto.INT64) not in (
        *_INT,
        onnx.TensorProto.BOOL,
    ):
        return
    bound = 2**31 if facts.types.get(output) == onnx.TensorProto.INT32 else 2**63
    if any(isinstance(v, int) and not -bound <= v < bound for v in value):
        return
    facts.values[output] = value
    if output not in facts.dims and node.op in ("Shape", "Concat", "Slice"):
        facts.dims[output] = (len(value),)


def _input(node: Node, index: int) -> gs.Tensor | None:
    if index < len(node.inputs):
        tensor = node.inputs[index]
        if tensor.name or isinstance(tensor, gs.Constant):
            return tensor
    return None


def _axes(facts: Facts, node: Node, index: int = 1) -> list[int] | None:
    """Return constant axes given as an input or an attribute; ``None`` if unknown."""
    given = node.attrs.get("axes")
    if given is not None:
        return [int(axis) for axis in given]
    tensor = _input(node, index)
    if tensor is None:
        return []
    value = facts.value(tensor)
    if value is None or not all(isinstance(v, int) for v in value):
        return None
    return [int(v) for v in value if isinstance(v, int)]


_SAME = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Neg"),
    *("Abs", "Reciprocal", "Clip", "Softmax", "LogSoftmax", "Identity", "Dropout"),
    *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "Elu"),
    *("Selu", "HardSigmoid", "HardSwish", "Gelu", "Softplus", "Floor", "Ceil"),
    *("Round", "Sign", "LRN", "LpNormalization", "Cast", "Not", "Sin", "Cos"),
    *("GroupNormalization", "RMSNormalization", "Mish", "ThresholdedRelu", "CumSum"),
    *("QuantizeLinear", "DequantizeLinear", "Celu", "Softsign", "IsNaN", "IsInf"),
    *("Trilu", "ScatterElements", "ScatterND", "Hardmax", "Swish"),
    *("SimplifiedLayerNormalization", "RotaryEmbedding"),
)
_KEEPS_TYPE = tuple(
    op
    for op in _SAME
    if op not in ("Cast", "IsNaN", "IsInf", "QuantizeLinear", "DequantizeLinear")
)
_BROADCASTS = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "PRelu", "Max", "Min", "Mean", "Sum"),
    *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor"),
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift", "Where"),
)
_SAME_TYPE = {
    **dict.fromkeys(_KEEPS_TYPE, 0),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mod", "PRelu"), 0
    ),
    **dict.fromkeys(
        ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Slice", "Gather"),
        0,
    ),
    **dict.fromkeys(("Concat", "MatMul", "Flatten", "Tile", "Conv"), 0),
    "Where": 1,
}


@_shape_of(*_SAME)
def _same(facts: Facts, node: Node) -> Dims | None:
    return facts.shape(node.inputs[0])


@_shape_of(*_BROADCASTS)
def _broadcasting(facts: Facts, node: Node) -> Dims | None:
    shapes = [facts.shape(tensor) for tensor in node.inputs]
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes):
        return None
    rank = max((len(shape) for shape in known), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        # One axis that is not certain leaves the others as they are.
        one = broadcast(*[(shape[axis],) for shape in known if len(shape) >= -axis])
        result.append(facts.fresh() if one is None else one[0])
    return tuple(result)


@_shape_of("Transpose")
def _transpose(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    if dims is None:
        return None
    perm = node.attrs.get("perm") or range(len(dims) - 1, -1, -1)
    return tuple(dims[axis] for axis in perm)


@_shape_of("Unsqueeze")
def _unsqueeze(facts: Facts, node: Node) -> Dims | None:
    dims, axes = facts.shape(node.inputs[0]), _axes(facts, node)
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    places = {axis % rank for axis in axes if -rank <= axis < rank}
    rest = iter(dims)
    if len(places) != len(axes):
        return None
    return tuple(1 if axis in places else next(rest) for axis in range(rank))


@_shape_of("Squeeze")
def _squeeze(facts: Facts, node: Node) -> Dims | None:
    dims, axes = facts.shape(node.inputs[0]), _axes(facts, node)
    if dims is None or axes is None:
        return None
    if not axes:
        if not all(isinstance(dim, int) for dim in dims):
            return None
        return tuple(dim for dim in dims if dim != 1)
    places = {axis % len(dims) for axis in axes} if dims else set()
    return tuple(dim for axis, dim in enumerate(dims) if axis not in places)


@_shape_of("Reshape")
def _reshape(facts: Facts, node: Node) -> Dims | None:
    if len(node.inputs) < 2:
        return None
    dims, wanted = facts.shape(node.inputs[0]), facts.value(node.inputs[1])
    if wanted is None:
        return None
    result: list[Dim | None] = []
    for axis, dim in enumerate(wanted):
        if dim == 0 and not node.attrs.get("allowzero", 0):
            result.append(dims[axis] if dims and axis < len(dims) else facts.fresh())
        elif dim == -1:
            result.append(None)
        else:
            result.append(dim)
    known = [dim for dim in result if dim is not None]
    if len(known) == len(result):
        return tuple(known)
    if len(known) + 1 < len(result):
        return None
    missing: Dim = facts.fresh()
    if dims is not None:
        exact = _exact(product(dims), product(known))
        missing = missing if exact is None else exact
    return tuple(missing if dim is None else dim for dim in result)


def _exact(a: Dim, b: Dim) -> Dim | None:
    """Return ``a / b`` where the division is certain to leave no rest."""
    if b == 0:
        return None
    found = quotient(a, b)
    return found if found * b == a else None


@_shape_of("Flatten")
def _flatten(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    if dims is None:
        return None
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(dims) if axis < 0 else axis
    return product(dims[:axis]), product(dims[axis:])


@_shape_of("Expand")
def _expand(facts: Facts, node: Node) -> Dims | None:
    dims, wanted = facts.shape(node.inputs[0]), facts.value(node.inputs[1])
    if dims is None or wanted is None:
        return None
    return broadcast(dims, wanted)


@_shape_of("ConstantOfShape")
def _constant_of_shape(facts: Facts, node: Node) -> Dims | None:
    return facts.value(node.inputs[0])


@_shape_of("Shape")
def _shape(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    return None if dims is None else (len(_span(node, dims)),)


@_shape_of("Concat")
def _concat(facts: Facts, node: Node) -> Dims | None:
    shapes = [facts.shape(tensor) for tensor in node.inputs]
    known = [shape for shape in shapes if shape is not None]
    if len(known) != len(shapes) or len({len(shape) for shape in known}) != 1:
        return None
    rank = len(known[0])
    axis = int(node.attrs.get("axis", 0))
    if not -rank <= axis < rank:
        return None
    result: list[Dim] = []
    for place in range(rank):
        dims = [shape[place] for shape in known]
        if place == axis % rank:
            total: Dim = 0
            for dim in dims:
                total = total + dim
            result.append(total)
        else:
            numbers = [dim for dim in dims if isinstance(dim, int)]
            result.append(numbers[0] if numbers else dims[0])
    return tuple(result)


@_shape_of("Gather")
def _gather(facts: Facts, node: Node) -> Dims | None:
    dims, index = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if dims is None or index is None or not dims:
        return None
    axis = int(node.attrs.get("axis", 0)) % len(dims)
    return dims[:axis] + index + dims[axis + 1 :]


@_shape_of("MatMul")
def _matmul(facts: Facts, node: Node) -> Dims | None:
    a, b = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if a is None or b is None or not a or not b:
        return None
    batch = broadcast(a[:-2], b[:-2])
    if batch is None:
        return None
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return batch + rows + columns


@_shape_of("Slice")
def _slice(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    plan = slice_plan(facts, node)
    if dims is None or plan is None:
        return None
    result = list(dims)
    for axis, start, end, step in plan:
        if not -len(dims) <= axis < len(dims):
            return None
        size = sliced(dims[axis], start, end, step)
        result[axis] = facts.fresh() if size is None else size
    return tuple(result)


def slice_plan(facts: Facts, node: Node) -> list[tuple[int, int, int, int]] | None:
    """Return constant (axis, start, end, step) of a Slice, any opset, or ``None``."""
    if "starts" in node.attrs:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes = node.attrs.get("axes") or range(len(starts))
        given = [starts, ends, axes, [1] * len(starts)]
    else:
        given = []
        for index in range(1, 5):
            tensor = _input(node, index)
            if tensor is None:
                size = len(given[0]) if given else 0
                given.append(list(range(size)) if index == 3 else [1] * size)
                continue
            value = facts.value(tensor)
            if value is None or not all(isinstance(v, int) for v in value):
                return None
            given.append(value)
    starts, ends, axes, steps = ([int(v) for v in part] for part in given)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    return list(zip(axes, starts, ends, steps, strict=True))


def sliced(dim: Dim, start: int, end: int, step: int) -> Dim | None:
    """Return how many of ``dim`` entries a slice takes, if certain."""
    if step == 0:
        return None
    if isinstance(dim, int):
        return len(range(*slice(start, end, step).indices(dim))) if step > 0 else None
    if start == 0 and step == 1 and end >= 2**31 - 1:
        return dim
    return None


@_shape_of("Conv")
def _conv(facts: Facts, node: Node) -> Dims | None:
    dims, weight = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    theirs = facts.dims.get(node.outputs[0])
    if dims is None or weight is None or len(dims) < 2 or len(dims) != len(weight):
        return None
    if theirs is None or len(theirs) != len(dims):
        # onnx knows nothing where it does not know an operator in front.
        theirs = tuple(facts.fresh() for _ in dims)
    return (dims[0], weight[0], *theirs[2:])


@_shape_of(
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"),
    "ConvTranspose",
)
def _batch_only(facts: Facts, node: Node) -> Dims | None:
    """Keep onnx's answer with our symbol for the batch, which no pool changes."""
    dims, theirs = facts.shape(node.inputs[0]), facts.dims.get(node.outputs[0])
    if dims is None or theirs is None or not dims or not theirs:
        return None
    return (dims[0], *theirs[1:])


@_shape_of("Tile")
def _tile(facts: Facts, node: Node) -> Dims | None:
    if len(node.inputs) != 2:
        return None
    dims, repeats = facts.shape(node.inputs[0]), facts.value(node.inputs[1])
    if dims is None or repeats is None or len(dims) != len(repeats):
        return None
    return tuple(dim * count for dim, count in zip(dims, repeats, strict=True))


@_shape_of(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1"),
    *("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceLogSum"),
)
def _reduce(facts: Facts, node: Node) -> Dims | None:
    dims, axes = facts.shape(node.inputs[0]), _axes(facts, node)
    if dims is None or axes is None:
        return None
    if not axes:
        if node.attrs.get("noop_with_empty_axes", 0):
            return dims
        axes = list(range(len(dims)))
    if any(not -len(dims) <= axis < len(dims) for axis in axes):
        return None
    places = {axis % len(dims) for axis in axes}
    if node.attrs.get("keepdims", 1):
        return tuple(1 if axis in places else dim for axis, dim in enumerate(dims))
    return tuple(dim for axis, dim in enumerate(dims) if axis not in places)


# --- values -----------------------------------------------------------------------


def _span(node: Node, dims: Dims) -> Dims:
    start, end = node.attrs.get("start", 0), node.attrs.get("end")
    return dims[slice(start, end)]


@_value_of("Constant")
def _constant_value(facts: Facts, node: Node) -> Dims | None:
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return facts.value(value)
    found = node.attrs.get("value_ints", node.attrs.get("value_int"))
    if isinstance(found, (int, list, tuple)):
        return tuple(int(v) for v in np.ravel(found))
    return None


@_value_of("Shape")
def _shape_value(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    return None if dims is None else _span(node, dims)


@_value_of("Size")
def _size_value(facts: Facts, node: Node) -> Dims | None:
    dims = facts.shape(node.inputs[0])
    return None if dims is None else (product(dims),)


@_value_of("Gather")
def _gather_value(facts: Facts, node: Node) -> Dims | None:
    value, index = facts.value(node.inputs[0]), facts.value(node.inputs[1])
    rank = facts.shape(node.inputs[0])
    if value is None or index is None or rank is None or len(rank) != 1:
        return None
    picked: list[Dim] = []
    for place in index:
        if not isinstance(place, int) or not -len(value) <= place < len(value):
            return None
        picked.append(value[place])
    return tuple(picked)


@_value_of("Slice")
def _slice_value(facts: Facts, node: Node) -> Dims | None:
    value, plan = facts.value(node.inputs[0]), slice_plan(facts, node)
    if value is None or plan is None or len(plan) != 1 or plan[0][3] == 0:
        return None
    axis, start, end, step = plan[0]
    if axis not in (0, -1) or facts.shape(node.inputs[0]) is None:
        return None
    if step < 0 and end < -len(value):
        return value[start::step]
    return value[start:end:step]


@_value_of("Concat")
def _concat_value(facts: Facts, node: Node) -> Dims | None:
    parts: list[Dim] = []
    for tensor in node.inputs:
        value = facts.value(tensor)
        if value is None:
            return None
        parts.extend(value)
    return tuple(parts)


@_value_of("Unsqueeze", "Squeeze", "Identity", "Reshape")
def _kept_value(facts: Facts, node: Node) -> Dims | None:
    dims = facts.dims.get(node.outputs[0])
    if dims is None or len(dims) > 1:
        return None
    return facts.value(node.inputs[0])


@_value_of("Cast")
def _cast_value(facts: Facts, node: Node) -> Dims | None:
    return facts.value(node.inputs[0]) if node.attrs.get("to") in _INT else None


@_value_of("Expand")
def _expand_value(facts: Facts, node: Node) -> Dims | None:
    value, dims = facts.value(node.inputs[0]), facts.dims.get(node.outputs[0])
    if value is None or dims is None or len(dims) > 1:
        return None
    size = product(dims)
    if size == len(value):
        return value
    fits = len(value) == 1 and isinstance(size, int) and size <= _VALUE_LIMIT
    return value * size if fits and isinstance(size, int) else None


@_value_of("ConstantOfShape")
def _filled_value(facts: Facts, node: Node) -> Dims | None:
    size = facts.value(node.inputs[0])
    filler = node.attrs.get("value")
    if size is None or len(size) > 1 or not isinstance(filler, gs.Constant):
        return None
    tensor = tensor_of(filler)
    if tensor.data_type not in _INT or tensor.size != 1:
        return None
    count = size[0] if size else 1
    if not isinstance(count, int) or not 0 <= count <= _VALUE_LIMIT:
        return None
    return (int(tensor.read().reshape(-1)[0]),) * count


def _pairs(facts: Facts, node: Node) -> list[tuple[Dim, Dim]] | None:
    if len(node.inputs) != 2:
        return None
    a, b = facts.value(node.inputs[0]), facts.value(node.inputs[1])
    if a is None or b is None:
        return None
    if len(a) != len(b):
        if len(a) == 1:
            a = a * len(b)
        elif len(b) == 1:
            b = b * len(a)
        else:
            return None
    return list(zip(a, b, strict=True))


@_value_of("Add", "Sub", "Mul", "Div", "Min", "Max", "Mod")
def _arithmetic(facts: Facts, node: Node) -> Dims | None:
    pairs = _pairs(facts, node)
    if pairs is None:
        return None
    results = [_combine(node.op, a, b) for a, b in pairs]
    known = tuple(result for result in results if result is not None)
    return known if len(known) == len(results) else None


def _combine(op: str, a: Dim, b: Dim) -> Dim | None:
    if op == "Add":
        return a + b
    if op == "Sub":
        return a - b
    if op == "Mul":
        return a * b
    if a == b and op in ("Min", "Max"):
        return a
    if isinstance(a, int) and isinstance(b, int):
        if op in ("Min", "Max"):
            return min(a, b) if op == "Min" else max(a, b)
        if a >= 0 and b > 0:
            return a // b if op == "Div" else a % b
        return None
    sizes = all((isinstance(x, int) and x > 0) or _is_size(x) for x in (a, b))
    # ONNX truncates towards zero, which is rounding down for sizes alone.
    return quotient(a, b) if op == "Div" and sizes else None


def _is_size(dim: Dim) -> bool:
    return dim >= 0 if isinstance(dim, int) else dim.is_size


@_value_of("ReduceProd", "ReduceSum")
def _reduced_value(facts: Facts, node: Node) -> Dims | None:
    value, shape = facts.value(node.inputs[0]), facts.shape(node.inputs[0])
    if value is None or shape is None or len(shape) != 1:
        return None
    if node.attrs.get("noop_with_empty_axes", 0):
        return None
    if node.op == "ReduceProd":
        return (product(value),)
    total: Dim = 0
    for dim in value:
        total = total + dim
    return (total,)


@_value_of("Equal")
def _equal_value(facts: Facts, node: Node) -> Dims | None:
    """Compare sizes; a size never equals a negative number."""
    pairs = _pairs(facts, node)
    if pairs is None:
        return None
    results: list[Dim] = []
    for a, b in pairs:
        if a == b:
            results.append(1)
            continue
        both = isinstance(a, int) and isinstance(b, int)
        apart = any(
            isinstance(x, int) and x < 0 and isinstance(y, Poly) and y.is_size
            for x, y in ((a, b), (b, a))
        )
        if not both and not apart:
            return None
        results.append(0)
    return tuple(results)


@_value_of("Where")
def _where_value(facts: Facts, node: Node) -> Dims | None:
    parts = [facts.value(tensor) for tensor in node.inputs]
    if len(parts) != 3:
        return None
    known = [part for part in parts if part is not None]
    if len(known) != 3:
        return None
    size = max(len(part) for part in known)
    if any(len(part) not in (1, size) for part in known):
        return None
    condition, a, b = (part * (size if len(part) == 1 else 1) for part in known)
    if any(not isinstance(flag, int) for flag in condition):
        return None
    return tuple(x if flag else y for flag, x, y in zip(condition, a, b, strict=True))


def as_array(value: Sequence[Dim], rank: int, data_type: int) -> np.ndarray[Any, Any]:
    """Return fully known elements as an array of the tensor's type and rank."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    array = np.array([int(v) for v in value if isinstance(v, int)], dtype)
    if array.size != len(value):
        raise ValueError("the value holds a symbol")
    return array.reshape(()) if rank == 0 else array


def static(dims: Dims | None) -> tuple[int, ...] | None:
    """Return a shape that has no symbol, or ``None``."""
    if dims is None:
        return None
    numbers = tuple(dim for dim in dims if isinstance(dim, int))
    return numbers if len(numbers) == len(dims) else None
