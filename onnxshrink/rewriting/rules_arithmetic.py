"""Rules that drop arithmetic without effect, or put one operator for several.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Node, Variable
from onnxshrink.model.topology import is_onnx
from onnxshrink.rewriting.rewriter import Rewriter, RuleSet, float_type

__all__ = ["ARITHMETIC", "OUTPUTS"]

ARITHMETIC = RuleSet()
OUTPUTS = RuleSet()
Array = np.ndarray[Any, Any]


def _neutral(rewriter: Rewriter, node: Node, index: int) -> gs.Tensor | None:
    """Return the other operand if this one is constant and keeps its type and shape.

    Then the values of this one decide whether the node has an effect.
    """
    x = node.inputs[1 - index]
    constant = rewriter.constant(node.inputs[index])
    wanted = rewriter.shape(x)
    if constant is None or wanted is None or constant.nbytes > 1 << 22:
        return None
    if node.op != "Pow" and rewriter.type(x) != constant.data_type:
        return None
    if len(constant.shape) > len(wanted) or any(
        dim not in (1, full)
        for dim, full in zip(constant.shape[::-1], wanted[::-1], strict=False)
    ):
        return None
    return x


def _all(rewriter: Rewriter, tensor: gs.Tensor, value: float) -> bool:
    array = rewriter.array(tensor)
    if array is None or array.dtype.kind in "Ob" or not array.size:
        return False
    return bool((array == np.asarray(value, array.dtype)).all())


@ARITHMETIC.rule("arithmetic without effect removed", "Mul", "Div", "Pow")
def times_one(rewriter: Rewriter, node: Node) -> bool:
    """``x * 1``, ``x / 1`` and ``x ** 1`` -> ``x``."""
    for index in (0, 1) if node.op == "Mul" else (1,):
        if not _all(rewriter, node.inputs[index], 1.0):
            continue
        x = _neutral(rewriter, node, index)
        if x is not None:
            return rewriter.replace(node.outputs[0], x)
    return False


@ARITHMETIC.rule("arithmetic without effect removed", "Add", "Sub")
def plus_zero(rewriter: Rewriter, node: Node) -> bool:
    """``x + 0`` -> ``x`` for integers, and for floats where -0.0 stays -0.0."""
    for index in (0, 1) if node.op == "Add" else (1,):
        if not _all(rewriter, node.inputs[index], 0.0):
            continue
        x = _neutral(rewriter, node, index)
        array = rewriter.array(node.inputs[index])
        if x is None or array is None:
            continue
        if float_type(rewriter.type(x)):
            negative = np.signbit(array.astype(np.float64))
            exact = negative.all() if node.op == "Add" else not negative.any()
            if not exact and not _sign_is_lost(rewriter, node):
                continue
        return rewriter.replace(node.outputs[0], x)
    return False


def _sign_is_lost(rewriter: Rewriter, node: Node) -> bool:
    """Whether all that reads a sum treats -0.0 as 0.0."""
    if rewriter.is_result(node.outputs[0]):
        return False
    return all(
        reader.op in ("Conv", "Gemm", "MatMul", "Softmax", "Relu", "Sigmoid", "Exp")
        for reader in node.outputs[0].outputs
    )


@ARITHMETIC.rule("arithmetic without effect removed", "Max", "Min")
def against_infinity(rewriter: Rewriter, node: Node) -> bool:
    """``Max(x, -inf)`` -> ``x`` and ``Min(x, inf)`` -> ``x``."""
    if len(node.inputs) != 2:
        return False
    bound = -np.inf if node.op == "Max" else np.inf
    for index in (0, 1):
        values = rewriter.constant(node.inputs[index])
        if values is None or not float_type(values.data_type):
            continue
        if not _all(rewriter, node.inputs[index], bound):
            continue
        x = _neutral(rewriter, node, index)
        if x is not None:
            return rewriter.replace(node.outputs[0], x)
    return False


# --- clipping ---------------------------------------------------------------------


def _bounds(rewriter: Rewriter, node: Node) -> tuple[float, float] | None:
    """Return the range a Relu or Clip leaves, ``None`` if it is not constant."""
    if node.op == "Relu":
        return 0.0, np.inf
    if rewriter.opset(node) < 11:
        low = float(node.attrs.get("min", -np.inf))
        return low, float(node.attrs.get("max", np.inf))
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        tensor = rewriter.input(node, index)
        value = default if tensor is None else rewriter.scalar(tensor)
        if value is None:
            return None
        bounds.append(float(value))
    return bounds[0], bounds[1]


@ARITHMETIC.rule("Clip or Relu without effect removed", "Relu", "Clip")
def clip_twice(rewriter: Rewriter, node: Node) -> bool:
    """Drop a Relu or Clip that its neighbour makes superfluous."""
    mine = _bounds(rewriter, node)
    if mine is None:
        return False
    if mine == (-np.inf, np.inf):
        return rewriter.replace(node.outputs[0], node.inputs[0])
    y = node.inputs[0]
    before = rewriter.producer(y)
    if before is None or not is_onnx(before.domain):
        return False
    if before.op not in ("Relu", "Clip"):
        return False
    theirs = _bounds(rewriter, before)
    if theirs is None or theirs[0] > theirs[1] or mine[0] > mine[1]:
        return False
    if theirs[0] >= mine[0] and theirs[1] <= mine[1]:
        return rewriter.replace(node.outputs[0], y)
    if theirs[0] <= mine[0] and theirs[1] >= mine[1]:
        rewriter.set_input(node, 0, before.inputs[0])
        return True
    return False


# --- one operator for several -----------------------------------------------------

FUSION = RuleSet()


@FUSION.rule("ReduceMean in place of a scaled ReduceSum", "Mul", "Div")
def mean_of_sum(rewriter: Rewriter, node: Node) -> bool:
    """``ReduceSum(x) * (1 / n)`` -> ``ReduceMean(x)`` for ``n`` summed entries."""
    for index in (0, 1) if node.op == "Mul" else (0,):
        y = node.inputs[index]
        total = rewriter.producer(y, "ReduceSum")
        factor = rewriter.scalar(node.inputs[1 - index])
        if total is None or factor is None or not rewriter.is_only_for(y, node):
            continue
        shape, rank = rewriter.shape(y), rewriter.rank(y)
        constant = rewriter.constant(node.inputs[1 - index])
        if shape is None or constant is None or len(constant.shape) > (rank or 0):
            continue
        if not float_type(constant.data_type):
            continue
        axes, dims = _reduced(rewriter, total), rewriter.shape(total.inputs[0])
        if not axes or dims is None:
            continue
        count = 1
        for axis in axes:
            dim = dims[axis]
            if not isinstance(dim, int):
                break
            count *= dim
        else:
            wanted = 1.0 / count if node.op == "Mul" else float(count)
            if count and abs(factor - wanted) <= 1e-7 * wanted:
                keep = int(total.attrs.get("keepdims", 1))
                _reduce(rewriter, node, "ReduceMean", total.inputs[0], axes, keep)
                return True
    return False


def _reduced(rewriter: Rewriter, node: Node) -> list[int] | None:
    """Return the axes of a reduction, not negative; ``None`` if unknown."""
    rank = rewriter.rank(node.inputs[0])
    axes = node.attrs.get("axes")
    if axes is None and rewriter.input(node, 1) is not None:
        axes = rewriter.integers(node.inputs[1])
        if axes is None:
            return None
    if rank is None:
        return None
    if not axes:
        if node.attrs.get("noop_with_empty_axes", 0):
            return None
        return list(range(rank))
    return sorted({int(axis) % rank for axis in axes})


def _reduce(
    rewriter: Rewriter, node: Node, op: str, x: gs.Tensor, axes: list[int], keep: int
) -> None:
    attrs: dict[str, Any] = {} if keep else {"keepdims": 0}
    inputs = [x]
    as_input = rewriter.opset(node) >= (13 if op == "ReduceSum" else 18)
    if as_input:
        inputs.append(
            rewriter.add_constant(
                f"{node.name or node.outputs[0].name}_axes", np.array(axes, np.int64)
            )
        )
    else:
        attrs["axes"] = axes
    rewriter.become(node, op, inputs, attrs)


@FUSION.rule("Softmax in place of its parts", "Div")
def softmax(rewriter: Rewriter, node: Node) -> bool:
    """``e / ReduceSum(e)`` with ``e = Exp(x - ReduceMax(x))`` -> ``Softmax(x)``."""
    e, s = node.inputs
    exp, total = rewriter.producer(e, "Exp"), rewriter.producer(s)
    total = _through(rewriter, total)
    if exp is None or total is None or total.op != "ReduceSum":
        return False
    if total.inputs[0] is not e or rewriter.is_result(e) or len(e.outputs) != 2:
        return False
    difference = rewriter.producer(exp.inputs[0], "Sub")
    if difference is None or not rewriter.is_only_for(exp.inputs[0], exp):
        return False
    x = difference.inputs[0]
    peak = _through(rewriter, rewriter.producer(difference.inputs[1]))
    if peak is None or peak.op != "ReduceMax" or peak.inputs[0] is not x:
        return False
    rank, shape = rewriter.rank(x), rewriter.shape(x)
    if rank is None or _reduced(rewriter, total) != [rank - 1]:
        return False
    if _reduced(rewriter, peak) != [rank - 1] or shape is None:
        return False
    lower = (*shape[:-1], 1)
    # Nodes between the reduction and the arithmetic only restore the last axis.
    if rewriter.shape(difference.inputs[1]) != lower or rewriter.shape(s) != lower:
        return False
    if rewriter.shape(node.outputs[0]) != shape:
        return False
    rewriter.become(node, "Softmax", [x], {"axis": -1 if rank > 1 else 0})
    if rewriter.opset(node) < 11:
        node.attrs["axis"] = rank - 1
    return True


def _through(rewriter: Rewriter, node: Node | None) -> Node | None:
    """Look through reshapes to the reduction in front of them."""
    for _ in range(3):
        if node is None or not is_onnx(node.domain):
            return None
        if node.op not in ("Reshape", "Unsqueeze"):
            return node
        node = rewriter.producer(node.inputs[0])
    return node


@ARITHMETIC.rule("Div in place of Mul by a Reciprocal", "Mul")
def divided_by_root(rewriter: Rewriter, node: Node) -> bool:
    """``x * Reciprocal(Sqrt(v))`` -> ``x / Sqrt(v)``, as onnxruntime looks for it."""
    for index in (0, 1):
        inverse = node.inputs[index]
        maker = rewriter.producer(inverse, "Reciprocal")
        if maker is None or not rewriter.is_only_for(inverse, node):
            continue
        if rewriter.producer(maker.inputs[0], "Sqrt") is None:
            continue
        rewriter.become(node, "Div", [node.inputs[1 - index], maker.inputs[0]])
        return True
    return False


@FUSION.rule("RMSNormalization in place of its parts", "Mul")
def rms_norm(rewriter: Rewriter, node: Node) -> bool:
    """``x / sqrt(mean(x^2) + eps) * scale`` -> ``RMSNormalization`` (opset 23).

    Only over the last axis, with a constant scale of its length.
    """
    if rewriter.opset(node) < 23:
        return False
    for index in (0, 1):
        scale = rewriter.constant(node.inputs[1 - index])
        fraction = rewriter.producer(node.inputs[index], "Div")
        if scale is None or fraction is None:
            continue
        if not rewriter.is_only_for(node.inputs[index], node):
            continue
        found = _root_mean_square(rewriter, fraction)
        if found is None:
            continue
        x, epsilon = found
        dims = rewriter.shape(x)
        if dims is None or rewriter.type(x) != onnx.TensorProto.FLOAT:
            continue
        if scale.shape != dims[-1:]:
            continue
        rewriter.become(
            node,
            "RMSNormalization",
            [x, node.inputs[1 - index]],
            {"axis": -1, "epsilon": epsilon},
        )
        return True
    return False


def _root_mean_square(
    rewriter: Rewriter, fraction: Node
) -> tuple[gs.Tensor, float] | None:
    """Match ``x / sqrt(mean(x^2) + eps)``."""
    x, rank = fraction.inputs[0], rewriter.rank(fraction.inputs[0])
    root = rewriter.producer(fraction.inputs[1], "Sqrt")
    raised = None if root is None else rewriter.producer(root.inputs[0], "Add")
    if root is None or raised is None or rank is None:
        return None
    for index in (0, 1):
        epsilon = rewriter.scalar(raised.inputs[1 - index])
        mean = rewriter.producer(raised.inputs[index], "ReduceMean")
        square = None if mean is None else rewriter.producer(mean.inputs[0])
        if epsilon is None or mean is None or square is None:
            continue
        squares = square.op == "Mul" and square.inputs[1] is x
        if square.op == "Pow":
            squares = rewriter.scalar(square.inputs[1]) == 2.0
        if not squares or square.inputs[0] is not x:
            continue
        if _last(rewriter, mean, mean.inputs[0], rank):
            inner = [square, mean, raised, root, fraction]
            return (x, epsilon) if _closed(rewriter, inner, fraction) else None
    return None


@FUSION.rule("LayerNormalization in place of its parts", "Add", "Mul", "Div")
def layer_norm(rewriter: Rewriter, node: Node) -> bool:
    """``(x - mean) / sqrt(var + eps) * scale + bias`` -> ``LayerNormalization``.

    Only over the last axis, with constant scale and bias of its length (opset 17).
    """
    if rewriter.opset(node) < 17 or node.op != "Add":
        return False
    for index in (0, 1):
        beta = node.inputs[1 - index]
        product = rewriter.producer(node.inputs[index], "Mul")
        if product is None or rewriter.constant(beta) is None:
            continue
        if not rewriter.is_only_for(node.inputs[index], node):
            continue
        for side in (0, 1):
            gamma = product.inputs[1 - side]
            fraction = rewriter.producer(product.inputs[side], "Div")
            if fraction is None or rewriter.constant(gamma) is None:
                continue
            if not rewriter.is_only_for(product.inputs[side], product):
                continue
            found = _normalised(rewriter, fraction)
            if found is None:
                continue
            x, epsilon = found
            dims = rewriter.shape(x)
            if dims is None or rewriter.type(x) != onnx.TensorProto.FLOAT:
                continue
            shapes = [rewriter.constant(t) for t in (gamma, beta)]
            if any(s is None or s.shape != dims[-1:] for s in shapes):
                continue
            rewriter.become(
                node,
                "LayerNormalization",
                [x, gamma, beta],
                {"axis": -1, "epsilon": epsilon},
            )
            return True
    return False


def _normalised(rewriter: Rewriter, fraction: Node) -> tuple[gs.Tensor, float] | None:
    """Match ``(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)``."""
    centred = rewriter.producer(fraction.inputs[0], "Sub")
    root = rewriter.producer(fraction.inputs[1], "Sqrt")
    if centred is None or root is None:
        return None
    y = centred.outputs[0]
    x = centred.inputs[0]
    rank = rewriter.rank(x)
    mean = rewriter.producer(centred.inputs[1], "ReduceMean")
    if mean is None or rank is None or not _last(rewriter, mean, x, rank):
        return None
    raised = rewriter.producer(root.inputs[0], "Add")
    if raised is None:
        return None
    for index in (0, 1):
        epsilon = rewriter.scalar(raised.inputs[1 - index])
        variance = rewriter.producer(raised.inputs[index], "ReduceMean")
        if epsilon is None or variance is None:
            continue
        square = rewriter.producer(variance.inputs[0])
        if square is None or square.inputs[0] is not y:
            continue
        squares = square.op == "Mul" and square.inputs[1] is y
        if square.op == "Pow":
            squares = rewriter.scalar(square.inputs[1]) == 2.0
        if squares and _last(rewriter, variance, variance.inputs[0], rank):
            inner = [centred, root, mean, raised, variance, square, fraction]
            return (x, epsilon) if _closed(rewriter, inner, fraction) else None
    return None


def _last(rewriter: Rewriter, node: Node, x: gs.Tensor, rank: int) -> bool:
    return (
        node.inputs[0] is x
        and bool(node.attrs.get("keepdims", 1))
        and _reduced(rewriter, node) == [rank - 1]
    )


def _closed(rewriter: Rewriter, nodes: list[Node], last: Node) -> bool:
    """Whether no other node reads what these compute but the last one."""
    inside = set(nodes)
    return all(
        not rewriter.is_result(tensor)
        and all(reader in inside for reader in tensor.outputs)
        for node in nodes
        if node is not last
        for tensor in node.outputs
    )


@FUSION.rule("Gelu in place of its parts", "Mul")
def gelu(rewriter: Rewriter, node: Node) -> bool:
    """``x * (1 + erf(x / sqrt 2)) * 0.5``, in any order, -> ``Gelu(x)`` (opset 20)."""
    if rewriter.opset(node) < 20:
        return False
    factors: list[gs.Tensor] = []
    inner: list[Node] = []
    stack = list(node.inputs)
    while stack:
        tensor = stack.pop()
        source = rewriter.producer(tensor, "Mul")
        if (
            source is not None
            and len(factors) < 4
            and rewriter.only_reader(tensor) in (node, *inner)
            and _has_parts(rewriter, source)
        ):
            inner.append(source)
            stack.extend(source.inputs)
            continue
        factors.append(tensor)
    if len(factors) != 3:
        return False
    half = [t for t in factors if _is(rewriter, t, 0.5)]
    ones = [t for t in factors if _erf_of(rewriter, t) is not None]
    rest = [t for t in factors if t not in half and t not in ones]
    if not (len(half) == len(ones) == len(rest) == 1):
        return False
    found = _erf_of(rewriter, ones[0])
    x = rest[0]
    if found is None or found is not x or rewriter.shape(x) is None:
        return False
    if rewriter.shape(node.outputs[0]) != rewriter.shape(x):
        return False
    rewriter.become(node, "Gelu", [x])
    return True


def _has_parts(rewriter: Rewriter, node: Node) -> bool:
    return any(
        _is(rewriter, tensor, 0.5) or _erf_of(rewriter, tensor) is not None
        for tensor in node.inputs
    )


def _is(rewriter: Rewriter, tensor: gs.Tensor, value: float) -> bool:
    found = rewriter.scalar(tensor)
    return found is not None and abs(found - value) <= 1e-6 * abs(value)


def _erf_of(rewriter: Rewriter, tensor: gs.Tensor) -> gs.Tensor | None:
    """Match ``1 + erf(x / sqrt 2)`` for one reader and return ``x``."""
    add = rewriter.producer(tensor, "Add")
    if add is None or rewriter.only_reader(tensor) is None:
        return None
    for index in (0, 1):
        erf = rewriter.producer(add.inputs[index], "Erf")
        if erf is None or not _is(rewriter, add.inputs[1 - index], 1.0):
            continue
        if not rewriter.is_only_for(add.inputs[index], add):
            continue
        scaled = rewriter.producer(erf.inputs[0])
        if scaled is None or not rewriter.is_only_for(erf.inputs[0], erf):
            continue
        if scaled.op == "Div" and _is(rewriter, scaled.inputs[1], 2**0.5):
            return scaled.inputs[0]
        if scaled.op == "Mul":
            for side in (0, 1):
                if _is(rewriter, scaled.inputs[side], 0.5**0.5):
                    return scaled.inputs[1 - side]
    return None


# --- outputs nobody reads ---------------------------------------------------------


@OUTPUTS.rule(
    "unused outputs dropped",
    *("Dropout", "MaxPool", "LayerNormalization", "LSTM", "GRU", "RNN", "Unique"),
    *("BatchNormalization", "SimplifiedLayerNormalization", "RMSNormalization"),
)
def unused_outputs(rewriter: Rewriter, node: Node) -> bool:
    """Take off or unname optional outputs that nothing reads."""
    # More than one output of BatchNormalization means training before opset 14.
    if node.op == "BatchNormalization" and (
        rewriter.opset(node) < 14 or node.attrs.get("training_mode", 0)
    ):
        return False
    used = set(rewriter.outputs_used(node))
    last = max(used, default=0)
    required = 0 if node.op in ("LSTM", "GRU", "RNN") else 1
    changed = False
    while len(node.outputs) > max(last + 1, 1):
        del node.outputs[-1]
        changed = True
    for index, tensor in enumerate(node.outputs):
        if index >= required and index not in used and tensor.name:
            node.outputs[index] = Variable.empty()
            changed = True
    return changed
