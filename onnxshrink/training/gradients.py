"""Reverse-mode differentiation of an ONNX graph into ONNX nodes.

``gradients`` walks the nodes backwards from given upstream gradients and lets one rule
per operator append the nodes that compute the gradients of its inputs. Shapes are
static: see ``onnxshrink.training.prepare``. Whatever a rule returns for an input has
exactly the shape of that input.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.model import Model, Node, Variable
from onnxshrink.model import attribute as attribute_of
from onnxshrink.model.topology import domain_key, is_onnx, subgraphs_of
from onnxshrink.tensors import numpy_type

__all__ = ["GradContext", "Rule", "gradients", "is_covered", "rule", "zero_gradient"]

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Tensor: TypeAlias = Any
Operand: TypeAlias = Any
"""A tensor, a number (of the type of the other operands), an array, or ``None``."""

Rule = Callable[["GradContext", Node, list[Any]], Sequence[Any]]
_R = TypeVar("_R", bound=Rule)

_RULES: dict[tuple[str, str], Rule] = {}
_ZERO: set[tuple[str, str]] = set()
_FILES = (
    "rules_elementwise",
    "rules_linear",
    "rules_conv",
    "rules_pool",
    "rules_norm",
    "rules_reduce",
    "rules_shape",
    "rules_index",
    "rules_quant",
    "rules_recurrent",
)
_REFUSED = "no gradient for"
_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}
_CODES = frozenset({"QuantizeLinear"})
"""Operators whose integer output carries the gradient of the number it stands for."""
_KEEPS_CODES = frozenset(
    [
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Concat",
        "Split",
        "Slice",
        "Expand",
        "Tile",
        "Gather",
        "DepthToSpace",
        "SpaceToDepth",
    ]
)
"""Operators that only move these integers; they may stand before DequantizeLinear."""


def rule(*ops: str, domain: str = "") -> Callable[[_R], _R]:
    """Register the gradient rule of operators; a later one replaces an earlier one.

    The rule is called as ``rule(ctx, node, grads)`` with one gradient for each output
    of the node, ``None`` where the loss does not depend on it. It returns a gradient
    for each input, ``None`` where there is none or ``ctx.wants(i)`` is false; inputs at
    the end may be left out. It must not change what the node computes.

    ``ctx.op`` appends a node, ``ctx.shape`` and ``ctx.dtype`` say what is known of a
    value, and ``ctx.reduce_to`` undoes broadcasting. The gradient of an input has
    exactly its shape. What a rule cannot take it refuses::

        @rule("Cube", domain="my")
        def cube(ctx, node, grads):
            x = node.inputs[0]
            if ctx.rank(x) > 4:
                raise ctx.refused(node, "its input has more than four axes")
            return [ctx.op("Mul", grads[0], ctx.op("Mul", ctx.op("Mul", x, x), 3.0))]

    Args:
        ops: Operator types.
        domain: Their domain; empty is ai.onnx.
    """

    def register(function: _R) -> _R:
        for op in ops:
            _RULES[domain_key(domain), op] = function
        return function

    return register


def zero_gradient(*ops: str, domain: str = "") -> None:
    """Declare that the gradient of operators is zero: it stops there, silently."""
    _ZERO.update((domain_key(domain), op) for op in ops)


zero_gradient(
    *[
        "ArgMax",
        "ArgMin",
        "Floor",
        "Ceil",
        "Round",
        "Sign",
        "Shape",
        "Size",
        "NonZero",
        "Equal",
        "Greater",
        "Less",
    ],
    *[
        "GreaterOrEqual",
        "LessOrEqual",
        "Not",
        "And",
        "Or",
        "Xor",
        "IsNaN",
        "IsInf",
        "ConstantOfShape",
    ],
    *["EyeLike", "RandomNormalLike", "RandomUniformLike", "OneHot"],
)


@functools.cache
def _load_rules() -> None:
    for name in _FILES:
        importlib.import_module(f"onnxshrink.training.{name}")


def is_covered(op: str, domain: str = "") -> bool:
    """Whether an operator has a gradient rule, or a gradient that is zero."""
    _load_rules()
    key = domain_key(domain), op
    return key in _RULES or key in _ZERO


class GradContext:
    """What a rule may ask, and the shorthand it builds nodes with.

    Attributes:
        model: The model that the nodes are appended to.
        is_blocked: Whether ``layout.block_convolutions`` will run over the model, so
            that rules may choose the forms that are fast then.
    """

    def __init__(self, model: Model) -> None:
        """Know the types of all values of the model as it is now."""
        self.model = model
        self.is_blocked = False
        self._shapes: dict[str, Shape] = {}
        self._types: dict[str, int] = {}
        self._wanted: tuple[bool, ...] = ()
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._label = "grad"
        for name, info in model.infer_shapes().items():
            if info.data_type:
                self._types[name] = info.data_type
            if info.shape is not None and all(isinstance(d, int) for d in info.shape):
                self._shapes[name] = tuple(int(d or 0) for d in info.shape)

    # --- what is known ------------------------------------------------------------

    def wants(self, index: int) -> bool:
        """Whether the gradient of this input of the current node is needed."""
        return index < len(self._wanted) and self._wanted[index]

    def shape(self, tensor: Tensor) -> Shape:
        """Return the static shape of a value.

        Raises:
            ModelError: It is not known.
        """
        if isinstance(tensor, gs.Constant):
            return tuple(int(n) for n in tensor.shape)
        found = self._shapes.get(tensor.name)
        if found is None:
            self._infer(tensor)
            found = self._shapes.get(tensor.name)
        if found is None:
            raise ModelError(
                f"the shape of {tensor.name!r} is not known, which its gradient needs: "
                f"{self._why_unknown(tensor)}"
            )
        return found

    def _why_unknown(self, tensor: Tensor) -> str:
        """Name the operator at which shapes end, or the input that has none."""
        seen: set[int] = set()
        while tensor.inputs and id(tensor) not in seen:
            seen.add(id(tensor))
            node = tensor.inputs[0]
            behind = [
                one
                for one in node.inputs
                if one.name
                and not isinstance(one, gs.Constant)
                and one.name not in self._shapes
            ]
            has_body = any(isinstance(v, gs.Graph) for v in node.attrs.values())
            if not behind or has_body:
                none = "" if is_covered(node.op, node.domain) else "has no rule and "
                return (
                    f"{node.op} {(node.name or tensor.name)!r} {none}gives a shape "
                    "that follows from values; only= and skip= choose other weights, "
                    "outputs= other outputs"
                )
            tensor = behind[0]
        return f"input {tensor.name!r} has no fixed shape, and none was given"

    def rank(self, tensor: Tensor) -> int:
        """Return the number of dimensions."""
        return len(self.shape(tensor))

    def data_type(self, tensor: Tensor) -> int:
        """Return the ONNX element type of a value, 0 if it is not known."""
        if isinstance(tensor, gs.Constant):
            weight = self.model.constant(tensor)
            assert weight is not None
            return weight.data_type
        if tensor.name not in self._types:
            self._infer(tensor)
        return self._types.get(tensor.name, 0)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """Return the numpy dtype of a value."""
        return numpy_type(self.data_type(tensor))

    def value(self, tensor: Tensor | None) -> Array | None:
        """Return the value of a constant, or ``None`` if it is absent or unknown."""
        if tensor is None or is_absent(tensor):
            return None
        weight = self.model.constant(tensor)
        return None if weight is None else weight.read()

    def integers(self, tensor: Tensor | None, node: Node) -> list[int] | None:
        """Return the value of an input of axes, sizes or the like.

        Returns:
            The integers, or ``None`` where the input is absent.

        Raises:
            ModelError: It is computed from data.
        """
        if tensor is None or is_absent(tensor):
            return None
        found = self.value(tensor)
        if found is None:
            raise self.refused(node, f"its input {tensor.name!r} depends on data")
        return [int(n) for n in found.reshape(-1)]

    def refused(self, node: Node, why: str) -> ModelError:
        """Return the error of a rule that cannot take a node."""
        return ModelError(f"{_REFUSED} {describe(node)}: {why}")

    def note(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Record that a new value has the shape and type of another."""
        self._shapes[tensor.name] = self.shape(like)
        self._types[tensor.name] = self.data_type(like)
        return tensor

    def note_shape(self, tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
        """Record the shape of a new value, which has the element type of another."""
        self._shapes[tensor.name] = tuple(shape)
        self._types[tensor.name] = self.data_type(like)
        return tensor

    def _infer(self, tensor: Tensor) -> None:
        """Infer the types of what a new node produces and of what it is made from."""
        stack, seen = [tensor], set()
        while stack:
            node = stack[-1].inputs[0] if stack[-1].inputs else None
            unknown = []
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                unknown = [
                    read
                    for read in node.inputs
                    if not isinstance(read, gs.Constant)
                    and not is_absent(read)
                    and not self._is_known(read.name)
                ]
            if unknown:
                stack.extend(unknown)
                continue
            made = stack.pop()
            if node is not None and not self._is_known(made.name):
                self._infer_node(node)

    def _is_known(self, name: str) -> bool:
        return name in self._shapes and name in self._types

    def _infer_node(self, node: Node) -> None:
        """Infer the types of what a node produces from those of its inputs."""
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for read in node.inputs:
            if is_absent(read):
                continue
            is_constant = isinstance(read, gs.Constant)
            shape = self.shape(read) if is_constant else self._shapes.get(read.name)
            element = (
                self.data_type(read) if is_constant else self._types.get(read.name, 0)
            )
            types[read.name] = onnx.helper.make_tensor_type_proto(element, shape)
            known = self.model.constant(read)
            if known is not None and known.size <= 1024 and known.dtype.kind in "iuf":
                data[read.name] = onnx.numpy_helper.from_array(
                    np.asarray(known.read()), read.name
                )
        opset = self.model.opset
        try:
            schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
            proto = onnx.helper.make_node(
                node.op,
                [read.name for read in node.inputs],
                [made.name for made in node.outputs],
                domain=node.domain or None,
                **{
                    key: value.values if isinstance(value, gs.Tensor) else value
                    for key, value in node.attrs.items()
                    if not isinstance(value, gs.Tensor)
                },
            )
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                proto,
                types,
                data,
                opset_imports=[onnx.helper.make_opsetid("", opset)],
            )
        except (
            onnx.shape_inference.InferenceError,
            onnx.defs.SchemaError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            return
        for name, kind in found.items():
            if not kind.HasField("tensor_type"):
                continue
            value = kind.tensor_type
            self._types[name] = value.elem_type
            if value.HasField("shape") and all(
                dim.HasField("dim_value") for dim in value.shape.dim
            ):
                self._shapes[name] = tuple(dim.dim_value for dim in value.shape.dim)

    # --- building -----------------------------------------------------------------

    def constant(self, array: Array) -> Tensor:
        """Return a constant; equal ones are shared."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest()
        if key not in self._constants:
            label = f"{self._label}_constant"
            self._constants[key] = self.model.add_weight(label, array)
        return self._constants[key]

    def ints(self, values: Iterable[int]) -> Tensor:
        """Return a constant vector of int64."""
        return self.constant(np.asarray(list(values), np.int64))

    def scalar(self, value: float, like: Tensor) -> Tensor:
        """Return a 0-d constant of the type of another value."""
        return self.constant(np.asarray(value, self.dtype(like)))

    def add_input(self, name: str, data_type: int, shape: Sequence[int]) -> Tensor:
        """Add an input to the graph and return it.

        Args:
            name: Its name; another one is made from it if it is taken.
            data_type: ONNX element type.
            shape: Static shape.
        """
        tensor = Variable(self.model.fresh(name), numpy_type(data_type), list(shape))
        self.model.graph.inputs.append(tensor)
        self._types[tensor.name] = data_type
        self._shapes[tensor.name] = tuple(shape)
        return tensor

    def zeros(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return zeros of the type of another value, without storing them."""
        wanted = self.shape(like) if shape is None else tuple(shape)
        zero = onnx.numpy_helper.from_array(np.zeros(1, self.dtype(like)))
        made = self._add(
            "ConstantOfShape",
            [self.ints(wanted)],
            1,
            {"value": onnx.numpy_helper.to_array(zero)},
        )[0]
        return self.note_shape(made, wanted, like)

    def ops(
        self,
        op: str,
        *inputs: Operand,
        outputs: int = 1,
        domain: str = "",
        **attrs: Any,
    ) -> list[Tensor]:
        """Append a node and return all its outputs.

        Args:
            op: Operator type.
            inputs: Tensors; a number becomes a constant of the type of the first
                tensor; an array becomes a constant; ``None`` is an absent input.
            outputs: How many outputs.
            domain: Operator domain.
            attrs: Attributes.
        """
        first = next(i for i in inputs if isinstance(i, gs.Tensor))
        made: list[Tensor] = []
        for operand in inputs:
            if operand is None:
                made.append(Variable.empty())
            elif isinstance(operand, gs.Tensor):
                made.append(operand)
            elif isinstance(operand, np.ndarray):
                made.append(self.constant(operand))
            elif isinstance(operand, (list, tuple)):
                made.append(self.ints(operand))
            else:
                made.append(self.scalar(operand, first))
        kept = {key: value for key, value in attrs.items() if value is not None}
        return self._add(op, made, outputs, kept, domain)

    def _add(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: int,
        attrs: Mapping[str, Any],
        domain: str = "",
    ) -> list[Tensor]:
        node = self.model.add_node(
            op,
            inputs,
            outputs=outputs,
            attrs=attrs,
            name=f"{self._label}_{op}",
            domain=domain,
        )
        return list(node.outputs)

    def op(
        self, op: str, *inputs: Operand, like: Tensor | None = None, **attrs: Any
    ) -> Tensor:
        """Append a node and return its only output.

        Args:
            op: Operator type.
            inputs: As in ``ops``.
            like: A value whose shape and type the output has, where shape inference
                would not find it.
            attrs: Attributes.
        """
        made = self.ops(op, *inputs, **attrs)[0]
        return made if like is None else self.note(made, like)

    def reshape(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the tensor in another shape; nothing if it has it already."""
        wanted = tuple(int(n) for n in shape)
        if self.shape(tensor) == wanted:
            return tensor
        made = self.op("Reshape", tensor, self.ints(wanted), allowzero=1)
        return self.note_shape(made, wanted, tensor)

    def expand(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the tensor broadcast to a shape."""
        if self.shape(tensor) == tuple(shape):
            return tensor
        made = self.op("Expand", tensor, self.ints(shape))
        return self.note_shape(made, tuple(shape), tensor)

    def transpose(self, tensor: Tensor, perm: Sequence[int]) -> Tensor:
        """Return the tensor with its axes in another order."""
        if list(perm) == sorted(perm):
            return tensor
        made = self.op("Transpose", tensor, perm=[int(n) for n in perm])
        shape = self.shape(tensor)
        return self.note_shape(made, [shape[axis] for axis in perm], tensor)

    def total(
        self, tensor: Tensor, axes: Sequence[int], keepdims: bool = False
    ) -> Tensor:
        """Return the sum over some axes."""
        if not axes:
            return tensor
        return self.op(
            "ReduceSum", tensor, self.ints(sorted(axes)), keepdims=int(keepdims)
        )

    def mean(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        """Return the mean over some axes, which stay with size 1."""
        return self.op("ReduceMean", tensor, self.ints(sorted(axes)), keepdims=1)

    def reduce_to(self, grad: Tensor, target: Tensor | Sequence[int]) -> Tensor:
        """Undo broadcasting: sum over the axes along which ``target`` was repeated."""
        shape = self.shape(grad)
        wanted = self.shape(target) if isinstance(target, gs.Tensor) else tuple(target)
        if shape == wanted:
            return grad
        extra = len(shape) - len(wanted)
        axes = [
            axis
            for axis, size in enumerate(shape)
            if axis < extra or (size != 1 and wanted[axis - extra] == 1)
        ]
        return self.reshape(self.total(grad, axes, keepdims=True), wanted)

    def mask(self, condition: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient where a condition of its shape holds, zero elsewhere."""
        # Twice as fast in onnxruntime as Where with a scalar.
        number = self.op("Cast", condition, to=self.data_type(grad))
        return self.op("Mul", grad, number)


def is_absent(tensor: Tensor) -> bool:
    """Whether it stands for an optional input or output that is left out."""
    return not tensor.name and not isinstance(tensor, gs.Constant)


def given(node: Node, index: int) -> Tensor | None:
    """Return an input of a node, or ``None`` where it is absent."""
    if index >= len(node.inputs) or is_absent(node.inputs[index]):
        return None
    return node.inputs[index]


def attribute(node: Node, name: str, default: Any) -> Any:
    """Return an attribute of a node; strings as text."""
    value = attribute_of(node, name, default)
    return value.decode() if isinstance(value, bytes) else value


def describe(node: gs.Node) -> str:
    """Return a node in words."""
    kind = node.op if is_onnx(node.domain) else f"{node.domain}.{node.op}"
    label = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{kind} node {label!r}"


# --- the walk ---------------------------------------------------------------------


def gradients(
    model: Model,
    upstream: Mapping[str, Tensor | None],
    wrt: Sequence[str],
    ctx: GradContext | None = None,
) -> dict[str, Tensor]:
    """Append the nodes that compute gradients; return the tensors that hold them.

    Only the main graph is walked, so functions must be inlined. Shapes must be static:
    see ``prepare``. Nodes may gain outputs they can compute anyway (the indices of
    MaxPool, the statistics of LayerNormalization).

    Args:
        model: The model; nodes are appended, its outputs stay as they are.
        upstream: The gradient of the loss with respect to values of the main graph, by
            name: a tensor of the model of the same shape, or ``None`` for ones (the
            value is itself the loss).
        wrt: Names of the weights, inputs or inner values that gradients are wanted for.
        ctx: The context to build with, if more is to be built with the same one.

    Returns:
        The gradient for each name in ``wrt`` that the loss depends on, each the output
        of a node.

    Raises:
        UsageError: There is no value of a name.
        ModelError: An operator on the way has no rule; says what could be frozen.
    """
    _load_rules()
    ctx = ctx if ctx is not None else GradContext(model)
    values = values_of(model)
    wanted = {name: _find(values, name) for name in wrt}
    starts = {name: _find(values, name) for name in upstream}
    order = sorted_nodes(model)
    moving = depends_on(ctx, order, list(wanted.values()))
    grads: dict[int, list[Tensor]] = {}
    for name, tensor in starts.items():
        start = upstream[name]
        if start is None:
            ones = np.ones((), ctx.dtype(tensor))
            start = ctx.expand(ctx.constant(ones), ctx.shape(tensor))
        grads.setdefault(id(tensor), []).append(start)
    ends = {id(tensor) for tensor in wanted.values()}
    done: dict[int, Tensor] = {}

    def collect(tensor: Tensor) -> Tensor | None:
        if id(tensor) in done:
            return done[id(tensor)]
        parts = grads.pop(id(tensor), None)
        if not parts:
            return None
        found = parts[0]
        if len(parts) == 2:
            found = ctx.note(ctx.op("Add", *parts), parts[0])
        elif len(parts) > 2:
            found = ctx.note(ctx.op("Sum", *parts), parts[0])
        if id(tensor) in ends:
            done[id(tensor)] = found
        return found

    for node in reversed(order):
        if not any(id(t) in grads for t in node.outputs):
            continue
        outputs = [collect(tensor) for tensor in node.outputs]
        needs = tuple(id(tensor) in moving for tensor in node.inputs)
        captured = any(
            id(t) in moving
            for graph in subgraphs_of(node)
            for inner in _inside(graph)
            for t in inner.inputs
        )
        if not any(needs) and not captured:
            continue
        for tensor, grad in zip(
            node.inputs, _apply(ctx, node, outputs, needs, wanted), strict=False
        ):
            if grad is not None and id(tensor) in moving and not is_absent(tensor):
                if isinstance(grad, gs.Variable):
                    ctx._shapes.setdefault(grad.name, ctx.shape(tensor))
                grads.setdefault(id(tensor), []).append(grad)
    found: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        grad = collect(tensor)
        if grad is not None and not grad.inputs:
            grad = ctx.op("Identity", grad)  # so that it can be made an output
        if grad is not None:
            found[name] = grad
    return found


def _apply(
    ctx: GradContext,
    node: Node,
    grads: list[Tensor | None],
    needs: tuple[bool, ...],
    wanted: Mapping[str, Tensor],
) -> Sequence[Tensor | None]:
    key = domain_key(node.domain), node.op
    if key in _ZERO:
        return ()
    function = _RULES.get(key)
    if function is None:
        raise ModelError(
            f"{describe(node)} has no gradient rule, and it lies between the loss and "
            f"{_above(node, wanted)}; freeze these, or register a rule for {node.op}"
        )
    ctx._wanted = needs
    ctx._label = f"{node.name or node.op}_grad"
    try:
        return function(ctx, node, grads)
    except ModelError as error:
        why = str(error)
        if not why.startswith(_REFUSED):
            why = f"{_REFUSED} {describe(node)}: {why}"
        raise ModelError(f"{why}; or freeze {_above(node, wanted)}") from error
    finally:
        ctx._wanted = ()
        ctx._label = "grad"


def values_of(model: Model) -> dict[str, Tensor]:
    """Return the values of the main graph by name."""
    found: dict[str, Tensor] = {}
    for constant in model.graph.initializers.values():
        found[constant.name] = constant
    for tensor in model.graph.inputs:
        found[tensor.name] = tensor
    for node in model.graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name:
                found[tensor.name] = tensor
    return found


def _find(values: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise UsageError(
            f"the main graph has no value {name!r}.{nearest(name, values)}"
        )
    return values[name]


def sorted_nodes(model: Model) -> list[Node]:
    """Return the nodes of the main graph, each after those it reads from."""
    here = {id(node) for node in model.graph.nodes}
    seen: set[int] = set()
    order: list[Node] = []

    def before(node: Node) -> list[Node]:
        reads = list(node.inputs)
        for graph in subgraphs_of(node):
            for inner in _inside(graph):
                reads.extend(inner.inputs)
            reads.extend(graph.outputs)
        return [m for tensor in reads for m in tensor.inputs if id(m) in here]

    for root in list(model.graph.nodes):
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, is_ready = stack.pop()
            if is_ready:
                order.append(node)
                continue
            if id(node) in seen:
                continue
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((m, False) for m in before(node) if id(m) not in seen)
    return order


def _inside(graph: gs.Graph) -> list[gs.Node]:
    found = list(graph.nodes)
    for node in graph.nodes:
        for inner in subgraphs_of(node):
            found.extend(_inside(inner))
    return found


def depends_on(
    ctx: GradContext, order: Sequence[Node], wanted: Sequence[Tensor]
) -> set[int]:
    """Return the ids of the real-valued tensors that depend on the wanted ones."""
    moving = {id(tensor) for tensor in wanted}
    for node in order:
        reads = list(node.inputs)
        for graph in subgraphs_of(node):
            reads.extend(t for inner in _inside(graph) for t in inner.inputs)
            reads.extend(graph.outputs)
        if not any(id(tensor) in moving for tensor in reads):
            continue
        if (domain_key(node.domain), node.op) in _ZERO:
            continue
        carries = node.op in _CODES or node.op in _KEEPS_CODES
        for tensor in node.outputs:
            if carries or ctx.data_type(tensor) in (*_FLOATS, 0):
                moving.add(id(tensor))
    return moving


def _above(node: Node, wanted: Mapping[str, Tensor]) -> str:
    """Name the wanted tensors that a node depends on."""
    seen: set[int] = set()
    stack: list[gs.Node] = [node]
    tensors: set[int] = set()
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        reads = list(current.inputs)
        for graph in subgraphs_of(current):
            reads.extend(t for inner in _inside(graph) for t in inner.inputs)
        for tensor in reads:
            tensors.add(id(tensor))
            stack.extend(tensor.inputs)
    above = [name for name, tensor in wanted.items() if id(tensor) in tensors]
    more = f" and {len(above) - 5} more" if len(above) > 5 else ""
    return ", ".join(repr(name) for name in above[:5]) + more
