"""Rules for what moves, copies or renames values without changing them.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Node
from onnxshrink.model.topology import is_onnx
from onnxshrink.rewriting.rewriter import Rewriter, RuleSet, float_type
from onnxshrink.rewriting.rules_linear import pads_nothing
from onnxshrink.structure.symbolic import Dims, broadcast, slice_plan

__all__ = ["LAYOUT", "reshape_target"]

LAYOUT = RuleSet()
_T = onnx.TensorProto
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def _drop(rewriter: Rewriter, node: Node, x: gs.Tensor | None = None) -> bool:
    """Let the readers of a node that changes nothing read its input."""
    source = node.inputs[0] if x is None else x
    return rewriter.replace(node.outputs[0], source)


def _same_shape(rewriter: Rewriter, a: gs.Tensor, b: gs.Tensor) -> bool:
    one, two = rewriter.shape(a), rewriter.shape(b)
    return one is not None and one == two


# --- copies -----------------------------------------------------------------------


@LAYOUT.rule("Identity removed", "Identity")
def identity(rewriter: Rewriter, node: Node) -> bool:
    """``Identity(x)`` -> ``x``."""
    return _drop(rewriter, node)


@LAYOUT.rule("Dropout removed", "Dropout")
def dropout(rewriter: Rewriter, node: Node) -> bool:
    """``Dropout(x)`` -> ``x`` at inference."""
    if 1 in rewriter.outputs_used(node):
        rewriter.skip(node.name or "Dropout", "its mask is read")
        return False
    opset = rewriter.opset(node)
    if opset < 7 and not node.attrs.get("is_test", 0):
        rewriter.skip(node.name or "Dropout", "it is in training mode")
        return False
    training = rewriter.input(node, 2)
    if training is not None:
        flag = rewriter.array(training)
        if flag is None or flag.any():
            rewriter.skip(node.name or "Dropout", "it is in training mode")
            return False
    return _drop(rewriter, node)


@LAYOUT.rule("single operand passed on", "Concat", "Sum", "Max", "Min", "Mean")
def single(rewriter: Rewriter, node: Node) -> bool:
    """``Concat(x)`` -> ``x``."""
    return len(node.inputs) == 1 and _drop(rewriter, node)


# --- Cast -------------------------------------------------------------------------

_MANTISSA: dict[int, int] = {
    _T.FLOAT16: 11,
    _T.BFLOAT16: 8,
    _T.FLOAT: 24,
    _T.DOUBLE: 53,
}
_EXPONENT: dict[int, int] = {_T.FLOAT16: 5, _T.BFLOAT16: 8, _T.FLOAT: 8, _T.DOUBLE: 11}
_SIGNED: dict[int, int] = {
    _T.INT4: 4,
    _T.INT8: 8,
    _T.INT16: 16,
    _T.INT32: 32,
    _T.INT64: 64,
}
_UNSIGNED: dict[int, int] = {
    _T.UINT4: 4,
    _T.UINT8: 8,
    _T.UINT16: 16,
    _T.UINT32: 32,
    _T.UINT64: 64,
}


def holds(wide: int, narrow: int) -> bool:
    """Whether every value of one element type is also one of another."""
    if wide == narrow:
        return True
    if narrow == _T.BOOL:
        return wide in {*_MANTISSA, *_SIGNED, *_UNSIGNED}
    if wide in _MANTISSA:
        if narrow in _MANTISSA:
            return (
                _MANTISSA[wide] >= _MANTISSA[narrow]
                and _EXPONENT[wide] >= _EXPONENT[narrow]
            )
        if narrow in _SIGNED:
            return _SIGNED[narrow] - 1 <= _MANTISSA[wide] and wide != _T.FLOAT16
        if narrow in _UNSIGNED:
            return _UNSIGNED[narrow] <= _MANTISSA[wide] and wide != _T.FLOAT16
        return False
    if wide in _SIGNED:
        if narrow in _SIGNED:
            return _SIGNED[wide] >= _SIGNED[narrow]
        return narrow in _UNSIGNED and _SIGNED[wide] > _UNSIGNED[narrow]
    if wide in _UNSIGNED:
        return narrow in _UNSIGNED and _UNSIGNED[wide] >= _UNSIGNED[narrow]
    return False


@LAYOUT.rule("Cast removed", "Cast")
def cast(rewriter: Rewriter, node: Node) -> bool:
    """``Cast(x)`` to the type of ``x`` -> ``x``; ``Cast(Cast(x))`` -> ``Cast(x)``."""
    target = node.attrs.get("to")
    x = node.inputs[0]
    if target and rewriter.type(x) == target:
        return _drop(rewriter, node)
    before = rewriter.producer(x, "Cast")
    if before is None:
        return False
    source, between = rewriter.type(before.inputs[0]), before.attrs.get("to")
    if not source or not between or not holds(int(between), source):
        return False
    if target == source:
        return _drop(rewriter, node, before.inputs[0])
    if {"saturate", "round_mode"} & {*node.attrs, *before.attrs}:
        return False
    rewriter.set_input(node, 0, before.inputs[0])
    return True


@LAYOUT.rule("CastLike made Cast", "CastLike")
def cast_like(rewriter: Rewriter, node: Node) -> bool:
    """``CastLike(x, y)`` -> ``Cast(x)`` where the type of ``y`` is known."""
    target = rewriter.type(node.inputs[1])
    if not target or "saturate" in node.attrs:
        return False
    rewriter.become(node, "Cast", [node.inputs[0]], {"to": target})
    return True


# --- Reshape and its kin ----------------------------------------------------------


def reshape_target(source: Dims | None, wanted: Dims) -> list[int] | None:
    """Return constants that make Reshape give ``wanted`` whatever the symbols are.

    0 copies a dimension of the source, and at most one -1 takes what is left.
    """
    result: list[int] = []
    for axis, dim in enumerate(wanted):
        if isinstance(dim, int):
            if dim <= 0:
                return None
            result.append(dim)
        elif source is not None and axis < len(source) and source[axis] == dim:
            result.append(0)
        elif -1 not in result:
            result.append(-1)
        else:
            return None
    return result


@LAYOUT.rule("shape made constant", "Reshape")
def constant_shape(rewriter: Rewriter, node: Node) -> bool:
    """Compute the second input of Reshape from what is known of the shapes."""
    if len(node.inputs) != 2 or node.attrs.get("allowzero", 0):
        return False
    if rewriter.constant(node.inputs[1]) is not None:
        return False
    wanted = rewriter.facts.value(node.inputs[1])
    source = rewriter.shape(node.inputs[0])
    if wanted is None or any(isinstance(dim, int) and dim <= 0 for dim in wanted):
        wanted = _resolved(rewriter, node, wanted)
    target = None if wanted is None else reshape_target(source, wanted)
    if target is None:
        return False
    shape = rewriter.add_constant(
        f"{node.name or node.outputs[0].name}_shape", np.array(target, np.int64)
    )
    rewriter.set_input(node, 1, shape)
    return True


def _resolved(rewriter: Rewriter, node: Node, wanted: Dims | None) -> Dims | None:
    """Return the output's dimensions where they are numbers or known products."""
    dims = rewriter.shape(node.outputs[0])
    if dims is None:
        return None
    numbers = all(isinstance(dim, int) and dim > 0 for dim in dims)
    if numbers:
        return dims
    if wanted is None or len(wanted) != len(dims):
        return None
    # Where the value is 0 or -1, the inferred shape has a number or a symbol.
    source = rewriter.shape(node.inputs[0])
    result: list[Any] = []
    for axis, (dim, found) in enumerate(zip(wanted, dims, strict=True)):
        if dim == 0 and (source is None or axis >= len(source)):
            return None
        result.append(found if isinstance(dim, int) and dim <= 0 else dim)
    return tuple(result)


@LAYOUT.rule(
    "Reshape removed", *_RESHAPES, "Expand", "Slice", "Pad", "Transpose", "Tile"
)
def no_change(rewriter: Rewriter, node: Node) -> bool:
    """Drop a node whose output has the shape and the values of its input."""
    x, y = node.inputs[0], node.outputs[0]
    if not _same_shape(rewriter, x, y):
        return False
    if node.op == "Transpose":
        return _keeps_order(rewriter, node) and _drop(rewriter, node)
    if node.op == "Slice":
        plan = slice_plan(rewriter.facts, node)
        if plan is None or any(step != 1 for _, _, _, step in plan):
            return False
    if node.op == "Pad":
        pads = _pads(rewriter, node)
        if pads is None or any(pads):
            return False
    if node.op == "Tile":
        repeats = rewriter.integers(node.inputs[1])
        if repeats is None or any(count != 1 for count in repeats):
            return False
    return _drop(rewriter, node)


def _keeps_order(rewriter: Rewriter, node: Node) -> bool:
    """Whether a Transpose moves only dimensions of size 1."""
    dims = rewriter.shape(node.inputs[0])
    if dims is None:
        return False
    perm = node.attrs.get("perm") or list(range(len(dims)))[::-1]
    moved = [axis for axis in perm if dims[axis] != 1]
    return moved == sorted(moved)


@LAYOUT.rule("Reshapes joined", *_RESHAPES, "Transpose")
def join_reshapes(rewriter: Rewriter, node: Node) -> bool:
    """``Reshape(Reshape(x))`` -> ``Reshape(x)``, or ``x`` if that is its shape.

    Squeeze, Unsqueeze and Flatten are reshapes too, and so is a Transpose that moves
    only dimensions of size 1.
    """
    y = node.inputs[0]
    before = rewriter.producer(y)
    if before is None or not is_onnx(before.domain):
        return False
    if before.op not in (*_RESHAPES, "Transpose"):
        return False
    if before.op == "Transpose" and not _keeps_order(rewriter, before):
        return False
    if node.op == "Transpose" and not _keeps_order(rewriter, node):
        return False
    if node.op == before.op == "Transpose":
        return False
    x = before.inputs[0]
    if _same_shape(rewriter, x, node.outputs[0]):
        return _drop(rewriter, node, x)
    if not rewriter.is_only_for(y, node):
        return False
    if not float_type(rewriter.type(x)) and _attends(rewriter):
        # By these onnxruntime's transformers optimizer finds the mask of Attention.
        return False
    if node.op == before.op == "Unsqueeze":
        return _join_unsqueezes(rewriter, before, node)
    wanted, source = rewriter.shape(node.outputs[0]), rewriter.shape(x)
    if source is None or wanted is None:
        return False
    target = reshape_target(source, wanted)
    if target is None or rewriter.opset(node) < 5:
        return False
    shape = rewriter.add_constant(
        f"{node.name or node.outputs[0].name}_shape", np.array(target, np.int64)
    )
    rewriter.become(node, "Reshape", [x, shape])
    return True


def _attends(rewriter: Rewriter) -> bool:
    return any(node.op == "Softmax" for node in rewriter.nodes())


def _join_unsqueezes(rewriter: Rewriter, before: Node, node: Node) -> bool:
    first, second = _axes(rewriter, before), _axes(rewriter, node)
    rank = rewriter.rank(before.inputs[0])
    if first is None or second is None or rank is None:
        return False
    middle = rank + len(first)
    full = middle + len(second)
    inner = {axis % middle for axis in first}
    outer = {axis % full for axis in second}
    kept = [axis for axis in range(full) if axis not in outer]
    axes = sorted(outer | {kept[axis] for axis in inner})
    if rewriter.opset(node) < 13:
        rewriter.become(node, "Unsqueeze", [before.inputs[0]], {"axes": axes})
        return True
    constant = rewriter.add_constant(
        f"{node.name or node.outputs[0].name}_axes", np.array(axes, np.int64)
    )
    rewriter.become(node, "Unsqueeze", [before.inputs[0], constant])
    return True


def _axes(rewriter: Rewriter, node: Node) -> list[int] | None:
    given = node.attrs.get("axes")
    if given is not None:
        return [int(axis) for axis in given]
    return rewriter.integers(rewriter.input(node, 1))


@LAYOUT.rule("Transposes joined", "Transpose")
def join_transposes(rewriter: Rewriter, node: Node) -> bool:
    """``Transpose(Transpose(x))`` -> one Transpose, or ``x``."""
    y = node.inputs[0]
    before = rewriter.producer(y, "Transpose")
    perm = node.attrs.get("perm")
    if perm is not None and list(perm) == list(range(len(perm))):
        return _drop(rewriter, node)
    if before is None:
        return False
    rank = rewriter.rank(y)
    inner = before.attrs.get("perm")
    size = rank or len(perm or inner or ())
    if not size:
        return False
    backwards = list(range(size))[::-1]
    outer, first = list(perm or backwards), list(inner or backwards)
    if len(outer) != len(first):
        return False
    joined = [first[axis] for axis in outer]
    if joined == sorted(joined):
        return _drop(rewriter, node, before.inputs[0])
    if not rewriter.is_only_for(y, node):
        return False
    rewriter.become(node, "Transpose", [before.inputs[0]], {"perm": joined})
    return True


# --- broadcasting -----------------------------------------------------------------


@LAYOUT.rule(
    "Expand left to broadcasting",
    *("Add", "Sub", "Mul", "Div", "Where", "Equal", "Less", "Greater", "And", "Or"),
    *("Pow", "LessOrEqual", "GreaterOrEqual", "Xor", "Min", "Max"),
)
def expanded_operand(rewriter: Rewriter, node: Node) -> bool:
    """``a + Expand(b)`` -> ``a + b`` where that broadcasts to the same shape."""
    wanted = rewriter.shape(node.outputs[0])
    if wanted is None:
        return False
    for index, tensor in enumerate(node.inputs):
        expand = rewriter.producer(tensor, "Expand")
        if expand is None:
            continue
        x = expand.inputs[0]
        shapes = [
            rewriter.shape(x if place == index else other)
            for place, other in enumerate(node.inputs)
        ]
        known = [shape for shape in shapes if shape is not None]
        if len(known) != len(shapes) or not _covers(known, wanted):
            continue
        rewriter.set_input(node, index, x)
        return True
    return False


def _covers(shapes: list[Dims], wanted: Dims) -> bool:
    """Whether shapes certainly broadcast to ``wanted``.

    For each dimension, one operand must have exactly that size: a symbol could be 1 and
    leave the size to another operand.
    """
    if broadcast(*shapes) != wanted:
        return False
    return all(
        dim == 1 or any(len(s) >= back and s[-back] == dim for s in shapes)
        for back, dim in zip(range(len(wanted), 0, -1), wanted, strict=True)
    )


# --- Pad --------------------------------------------------------------------------


def _pads(rewriter: Rewriter, node: Node) -> list[int] | None:
    """Return all pads of a Pad, starts of all axes first, if they are constant."""
    if node.inputs[1:]:
        pads = rewriter.integers(node.inputs[1])
    else:
        pads = node.attrs.get("pads")
    if pads is None:
        return None
    axes_input = rewriter.input(node, 3)
    if axes_input is None:
        return [int(pad) for pad in pads]
    axes, rank = rewriter.integers(axes_input), rewriter.rank(node.inputs[0])
    if axes is None or rank is None or len(pads) != 2 * len(axes):
        return None
    full = [0] * (2 * rank)
    for place, axis in enumerate(axes):
        full[axis % rank] = int(pads[place])
        full[axis % rank + rank] = int(pads[place + len(axes)])
    return full


def _pad_value(rewriter: Rewriter, node: Node) -> float | None:
    """Return the constant a Pad fills with, ``None`` if it does something else."""
    if (node.attrs.get("mode") or "constant") != "constant":
        return None
    if rewriter.opset(node) < 11:
        return float(node.attrs.get("value", 0.0))
    tensor = rewriter.input(node, 2)
    return 0.0 if tensor is None else rewriter.scalar(tensor)


@LAYOUT.rule("Pad folded", "Conv", "AveragePool", "MaxPool")
def pad_into(rewriter: Rewriter, node: Node) -> bool:
    """``Conv(Pad(x))`` -> ``Conv(x)`` with larger pads, where that is exact."""
    y = node.inputs[0]
    pad = rewriter.producer(y, "Pad")
    if pad is None or not rewriter.is_only_for(y, node):
        return False
    pads, value = _pads(rewriter, pad), _pad_value(rewriter, pad)
    where = pad.name or y.name
    if pads is None or value is None or len(pads) < 6 or len(pads) % 2:
        return False
    rank = len(pads) // 2
    begins, ends = pads[2:rank], pads[rank + 2 :]
    if min(pads) < 0 or any((*pads[:2], *pads[rank : rank + 2])):
        rewriter.skip(where, "it pads batch or channels, or cuts off")
        return False
    mode = node.attrs.get("auto_pad") or "NOTSET"
    if mode not in ("NOTSET", "VALID"):
        rewriter.skip(where, f"what follows has auto_pad={mode}")
        return False
    own = list(node.attrs.get("pads") or [0] * (2 * (rank - 2)))
    if mode == "VALID":
        own = [0] * len(own)
    if len(own) != len(begins) + len(ends):
        return False
    total = [int(a) + int(b) for a, b in zip(own, begins + ends, strict=True)]
    attrs = dict(node.attrs)
    attrs.pop("auto_pad", None)
    attrs["pads"] = total
    if node.op == "Conv":
        if value != 0.0:
            rewriter.skip(where, f"it pads with {value}, a Conv with 0")
            return False
    else:
        why = _pool_refuses(rewriter, node, pad, value, total)
        if why:
            rewriter.skip(where, why)
            return False
        if node.op == "AveragePool":
            attrs["count_include_pad"] = 1
    inputs = [pad.inputs[0], *node.inputs[1:]]
    rewriter.become(node, node.op, inputs, attrs)
    return True


def _pool_refuses(
    rewriter: Rewriter, node: Node, pad: Node, value: float, total: list[int]
) -> str:
    """Return why a Pad cannot go into a pool, empty if it can."""
    kernel = list(node.attrs.get("kernel_shape") or ())
    half = len(total) // 2
    if node.attrs.get("ceil_mode", 0) or any(
        step != 1 for step in node.attrs.get("dilations") or ()
    ):
        return "the pool behind it rounds up or has dilations"
    if len(kernel) != half or any(
        pads >= size for pads, size in zip(total, kernel * 2, strict=True)
    ):
        return "its pads are not smaller than the window of the pool behind it"
    if node.op == "AveragePool":
        if value != 0.0:
            return f"it pads with {value}, an AveragePool with 0"
        includes = node.attrs.get("count_include_pad", 0)
        if not includes and not pads_nothing(node):
            return "the AveragePool behind it leaves its own pads out of the mean"
        return "" if rewriter.opset(node) >= 7 else "AveragePool cannot count pads yet"
    if 1 in rewriter.outputs_used(node):
        return "the indices of the MaxPool behind it are read"
    if value == -np.inf:
        return ""
    if value == 0.0 and _not_negative(rewriter, pad.inputs[0]):
        return ""
    return f"it pads with {value}, which a MaxPool might see as its maximum"


def _not_negative(rewriter: Rewriter, tensor: gs.Tensor) -> bool:
    node = rewriter.producer(tensor)
    if node is None or not is_onnx(node.domain):
        return False
    if node.op in ("Relu", "Sigmoid", "Softmax", "Abs", "Exp", "Sqrt", "HardSigmoid"):
        return True
    if node.op == "Clip":
        low = node.attrs.get("min")
        if rewriter.opset(node) >= 11:
            low = rewriter.scalar(rewriter.input(node, 1))
        return low is not None and float(low) >= 0.0
    return node.op in ("MaxPool", "Identity", "Dropout") and _not_negative(
        rewriter, node.inputs[0]
    )
