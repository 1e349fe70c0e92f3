"""Rules that move multiplications and additions by constants into weights.

A linear operator followed by ``scale * y + shift`` per output channel is a linear
operator with other weights and another bias. The same is true of ``scale * x + shift``
in front of one, unless padding comes between. New weights are computed in float64 and
rounded once.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Node
from onnxshrink.model.topology import is_onnx
from onnxshrink.rewriting.rewriter import (
    Rewriter,
    RuleSet,
    compacted,
    float_type,
    is_uniform,
    stored_bytes,
)
from onnxshrink.structure.bias import addend, addend_factor
from onnxshrink.structure.layers import Use, use_of
from onnxshrink.tensors import ArrayTensor, LazyTensor

__all__ = ["LINEAR"]

LINEAR = RuleSet()
Array = np.ndarray[Any, Any]
_AFFINE = ("BatchNormalization", "Mul", "Div", "Add", "Sub")
_OVERHEAD = 64
"""About how many bytes a node takes in a file."""
_LARGEST_REWRITE = 32 << 20
"""Bytes of a weight that is read and written again to save one multiplication."""
_LARGEST_SHIFT = 1e3
"""Shift in front of a linear operator, in units of its scaled input's spread."""


@dataclass
class Affine:
    """``scale * x + shift`` for each channel, in float64.

    Attributes:
        x: What it reads.
        scale: Scalar or one value for each channel.
        shift: Scalar or one value for each channel.
        freed: Bytes of constants that go with it.
    """

    x: gs.Tensor
    scale: Array
    shift: Array
    freed: int


def _exclusive(rewriter: Rewriter, tensor: gs.Tensor) -> int:
    """Return the bytes that go when one reader of a constant goes."""
    values = rewriter.constant(tensor)
    return stored_bytes(values) if values and len(tensor.outputs) == 1 else 0


def _per_channel(
    rewriter: Rewriter, tensor: gs.Tensor, rank: int | None, axis: int, channels: int
) -> Array | None:
    """Return a constant as a scalar or one float64 for each entry along ``axis``.

    ``None`` if it is no constant, varies along another axis or would add axes.
    """
    values = rewriter.constant(tensor)
    if values is None or not float_type(values.data_type):
        return None
    shape = values.shape
    if values.size == 1 and (len(shape) <= 1 or (rank and len(shape) <= rank)):
        found = rewriter.array(tensor)
        return None if found is None else found.astype(np.float64).reshape(())
    if values.size != channels or len(shape) > (rank or 1):
        return None
    if rank is None:
        from_end = 1 if axis == -1 else 0
    else:
        from_end = rank - axis if axis >= 0 else -axis
    if not from_end or from_end > len(shape) or shape[-from_end] != channels:
        return None
    found = rewriter.array(tensor)
    return None if found is None else found.astype(np.float64).reshape(-1)


def norm_affine(rewriter: Rewriter, node: Node) -> Affine | None:
    """Return what a BatchNormalization computes at inference, or ``None``."""
    if node.op != "BatchNormalization" or len(node.inputs) < 5:
        return None
    where = node.name or node.outputs[0].name
    if node.attrs.get("training_mode", 0):
        rewriter.skip(where, "the BatchNormalization is in training mode")
        return None
    if rewriter.outputs_used(node) != [0] or len(node.outputs) > 1:
        rewriter.skip(where, "the BatchNormalization has more outputs than one")
        return None
    if rewriter.opset(node) < 9 and not node.attrs.get("spatial", 1):
        rewriter.skip(where, "the BatchNormalization is not per channel (spatial=0)")
        return None
    if rewriter.opset(node) < 7 and not node.attrs.get("is_test", 0):
        rewriter.skip(where, "the BatchNormalization is in training mode")
        return None
    arrays = [rewriter.array(tensor) for tensor in node.inputs[1:5]]
    known = [array.astype(np.float64) for array in arrays if array is not None]
    if len(known) != 4:
        rewriter.skip(where, "a parameter of the BatchNormalization is not constant")
        return None
    gamma, beta, mean, variance = known
    epsilon = float(np.float32(node.attrs.get("epsilon", 1e-5)))
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        rewriter.skip(where, "the BatchNormalization's parameters are not finite")
        return None
    freed = sum(_exclusive(rewriter, tensor) for tensor in node.inputs[1:5])
    return Affine(node.inputs[0], scale, shift, freed)


def affine_of(
    rewriter: Rewriter,
    node: Node,
    x: gs.Tensor,
    rank: int | None,
    axis: int,
    channels: int,
) -> Affine | None:
    """Return what a node computes from ``x`` as scale and shift along ``axis``."""
    if node.op == "BatchNormalization":
        if node.inputs[0] is not x or axis not in (1, (1 - rank) if rank else 1):
            return None
        found = norm_affine(rewriter, node)
        return found if found is not None and found.scale.size == channels else None
    if len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    first = node.inputs[0] is x
    other = node.inputs[1 if first else 0]
    value = _per_channel(rewriter, other, rank, axis, channels)
    if value is None or not np.isfinite(value).all():
        return None
    one, zero = np.ones(()), np.zeros(())
    if node.op == "Mul":
        scale, shift = value, zero
    elif node.op == "Add":
        scale, shift = one, value
    elif node.op == "Sub":
        scale, shift = (one, -value) if first else (-one, value)
    elif first and (np.abs(value) > 0).all():
        scale, shift = 1.0 / value, zero
    else:
        return None
    freed = _exclusive(rewriter, other)
    return Affine(x, np.asarray(scale), np.asarray(shift), freed)


# --- linear operators -------------------------------------------------------------


@dataclass
class Linear:
    """A linear operator whose weight is constant.

    Attributes:
        use: How the operator reads its weight.
        add: The Add of a constant behind a MatMul, if that serves as its bias.
        weight: Its weight.
        bias: Its bias, ``None`` if it has none. Unlike that of a layer it may be one
            value for all outputs, and is found as the rewriter knows constants.
        rank: Rank of its output if known.
        axis: Axis of the channels in its output.
    """

    use: Use
    add: Node | None
    weight: gs.Tensor
    bias: gs.Tensor | None
    rank: int | None
    axis: int

    @property
    def node(self) -> Node:
        """The operator itself."""
        return self.use.node

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.use.channels

    @property
    def where(self) -> str:
        """Name for notes."""
        return str(self.node.name or self.node.outputs[0].name)


def linear_of(rewriter: Rewriter, tensor: gs.Tensor) -> Linear | None:
    """Return the linear operator that computes a tensor, or ``None``."""
    node = rewriter.producer(tensor)
    if node is None:
        return None
    if node.op == "Add":
        for index in (0, 1):
            source = rewriter.producer(node.inputs[index], "MatMul")
            if source is None or not rewriter.is_only_for(node.inputs[index], node):
                continue
            found = _matmul_of(rewriter, source)
            bias = node.inputs[1 - index]
            if found is None or (found.rank is None and found.axis != -1):
                continue
            size = _per_channel(rewriter, bias, found.rank, found.axis, found.channels)
            if size is not None:
                found.add, found.bias = node, bias
                return found
        return None
    if node.op == "MatMul":
        return _matmul_of(rewriter, node)
    if node.op not in ("Conv", "ConvTranspose", "Gemm") or not is_onnx(node.domain):
        return None
    weight, bias = rewriter.input(node, 1), addend(node)
    values = rewriter.constant(weight)
    if weight is None or values is None or not float_type(values.data_type):
        return None
    if bias is not None and rewriter.constant(bias) is None:
        return None
    use = use_of(node, 1, values.shape)
    if use is None:
        return None
    if node.op == "Gemm":
        channels = use.channels
        if bias is not None and tensor_of_shape(rewriter, bias) not in (
            (),
            (1,),
            (channels,),
            (1, 1),
            (1, channels),
        ):
            return None
    return Linear(use, None, weight, bias, len(values.shape), 1)


def tensor_of_shape(rewriter: Rewriter, tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Return the shape of a constant."""
    values = rewriter.constant(tensor)
    return None if values is None else values.shape


def _matmul_of(rewriter: Rewriter, node: Node) -> Linear | None:
    if not is_onnx(node.domain):
        return None
    weight = node.inputs[1]
    values = rewriter.constant(weight)
    if values is None or not float_type(values.data_type) or len(values.shape) < 2:
        return None
    if rewriter.constant(node.inputs[0]) is not None:
        return None
    use = use_of(node, 1, values.shape)
    if use is None:
        return None
    return Linear(use, None, weight, None, rewriter.rank(node.outputs[0]), -1)


def _scale_axis(use: Use, weight: Array, scale: Array) -> Array:
    """Return float64 weights whose output channels are scaled."""
    wide = weight.astype(np.float64)
    if scale.ndim == 0:
        return wide * scale
    layout = use.layout
    return layout.array(layout.matrices(wide) * use.over_outputs(scale))


def _scaled(linear: Linear, values: LazyTensor, scale: Array) -> Array | None:
    """Return the weights of a linear operator whose output channels are scaled."""
    if is_uniform(values) and not (scale != scale.reshape(-1)[0]).any():
        one = values.read()[(slice(0, 1),) * len(values.shape)].astype(np.float64)
        found = _rounded(one * scale.reshape(-1)[0], values.dtype)
        return None if found is None else np.broadcast_to(found, values.shape)
    return _rounded(_scale_axis(linear.use, values.read(), scale), values.dtype)


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """Round float64 to the type of the weights, ``None`` if that overflows."""
    with np.errstate(over="ignore"):
        array = values.astype(dtype)
    return compacted(array) if np.isfinite(array.astype(np.float64)).all() else None


def absorb(rewriter: Rewriter, linear: Linear, affine: Affine) -> bool:
    """Move scale and shift into a linear operator's weight and bias.

    Refused, with a note, where the weight has other readers and a copy of it would
    take more bytes than are saved, or where a value overflows.
    """
    node = linear.node
    bias = None if linear.bias is None else rewriter.array(linear.bias)
    values = rewriter.constant(linear.weight)
    if values is None or (linear.bias is not None and bias is None):
        return False
    scales = bool((affine.scale != 1.0).any())
    shared = len(linear.weight.outputs) > 1 or rewriter.is_result(linear.weight)
    if scales and shared:
        copied = stored_bytes(values)
        if copied > affine.freed + _OVERHEAD:
            readers = {r.name or r.op for r in linear.weight.outputs if r is not node}
            rewriter.skip(
                linear.where,
                f"its weight {linear.weight.name!r} is shared with "
                f"{', '.join(sorted(readers)) or 'an output'}",
            )
            return False
    old: Array = np.zeros(())
    if bias is not None:
        old = bias.astype(np.float64) * addend_factor(node)
    if node.op != "Gemm" or old.size == linear.channels:
        old = old.reshape(-1) if old.size == linear.channels else old.reshape(())
    else:
        old = old.reshape(())
    shifted = old * affine.scale + affine.shift
    needs_bias = bool(shifted.any()) or linear.bias is not None
    if node.op == "MatMul" and needs_bias and linear.add is None:
        return False
    weight = _scaled(linear, values, affine.scale) if scales else None
    whole = np.broadcast_to(shifted, (linear.channels,))
    added = _rounded(whole, values.dtype) if needs_bias else None
    if (scales and weight is None) or (needs_bias and added is None):
        rewriter.skip(linear.where, f"its folded weights overflow {values.dtype}")
        return False
    spent = _growth(rewriter, linear.weight, weight) - affine.freed - _OVERHEAD
    spent += _growth(rewriter, linear.bias, added)
    if not _affordable(rewriter, linear.where, spent):
        return False
    if weight is not None:
        rewriter.set_array(node, 1, weight)
    if added is not None and linear.add is not None:
        index = 0 if linear.add.inputs[0] is linear.bias else 1
        rewriter.set_array(linear.add, index, added)
    elif added is not None:
        rewriter.set_array(node, 2, added, f"{linear.where}_bias")
    if node.op == "Gemm":
        node.attrs.pop("beta", None)
    return True


def _growth(rewriter: Rewriter, old: gs.Tensor | None, new: Array | None) -> int:
    """Return the bytes that a file gains when a node reads ``new`` instead."""
    if new is None:
        return 0
    gone = -_OVERHEAD if old is None else _exclusive(rewriter, old)
    return stored_bytes(ArrayTensor(new)) - gone


def _affordable(rewriter: Rewriter, where: str, added: int) -> bool:
    """Spend bytes of the budget, or say that they are not there.

    Folding mostly saves bytes. It adds some where a weight was one repeated value.
    """
    if rewriter.budget.take(added):
        return True
    if rewriter.budget.is_final:
        why = f"its folded weights would add {added} bytes, more than allowed"
        rewriter.skip(where, why)
    return False


@LINEAR.rule("scale and shift folded into weights", *_AFFINE)
def fold_behind(rewriter: Rewriter, node: Node) -> bool:
    """``linear(x) * scale + shift`` -> ``linear'(x)``."""
    for index in range(1 if node.op == "BatchNormalization" else 2):
        x = rewriter.input(node, index)
        linear = None if x is None else linear_of(rewriter, x)
        if x is None or linear is None:
            _explain(rewriter, node, x)
            continue
        affine = affine_of(rewriter, node, x, linear.rank, linear.axis, linear.channels)
        if affine is None:
            continue
        if not rewriter.is_only_for(x, node):
            if node.op == "BatchNormalization":
                rewriter.skip(
                    node.name or node.outputs[0].name,
                    f"{x.name!r} is read by others than the BatchNormalization",
                )
            continue
        if linear.node.op == "MatMul" and linear.add is None and affine.shift.any():
            if node.op != "BatchNormalization":
                return False
            return _shift_only(rewriter, node, linear, affine)
        if node.op in ("Add", "Sub") and linear.add is node:
            continue
        if not rewriter.can_replace(node.outputs[0], x):
            continue
        if absorb(rewriter, linear, affine):
            if linear.add is not None:
                rewriter.model.lineage.add(linear.node.outputs[0].name)
            return rewriter.supplant(node.outputs[0], x)
    return False


def _explain(rewriter: Rewriter, node: Node, x: gs.Tensor | None) -> None:
    """Say why a BatchNormalization behind a linear operator stays."""
    before = rewriter.producer(x)
    if node.op != "BatchNormalization" or before is None or len(before.inputs) < 2:
        return
    if before.op in ("Conv", "ConvTranspose", "Gemm") and is_onnx(before.domain):
        weight = before.inputs[1]
        why = "is computed"
        if rewriter.producer(weight, "DequantizeLinear"):
            why = "is quantized"
        elif weight in rewriter.overridable:
            why = "may be overridden by the caller"
        rewriter.skip(
            node.name or node.outputs[0].name,
            f"the weight of {before.name or before.op} in front of it {why}",
        )


def _shift_only(rewriter: Rewriter, node: Node, linear: Linear, affine: Affine) -> bool:
    """Replace a BatchNormalization behind a MatMul by an Add of its shift."""
    shift = np.broadcast_to(affine.shift, (linear.channels,))
    values = rewriter.constant(linear.weight)
    assert values is not None
    rounded = _rounded(shift, values.dtype)
    if linear.rank != 2 or rounded is None:
        return False
    scaled = Affine(affine.x, affine.scale, np.zeros(()), affine.freed)
    if not absorb(rewriter, linear, scaled):
        return False
    bias = rewriter.add_constant(f"{linear.where}_bias", rounded)
    rewriter.become(node, "Add", [node.inputs[0], bias])
    return True


@LINEAR.rule("scales and shifts joined", "Mul", "Div", "Add", "Sub")
def into_norm(rewriter: Rewriter, node: Node) -> bool:
    """``BatchNormalization(x) * scale + shift`` -> ``BatchNormalization'(x)``."""
    for index in (0, 1):
        x = rewriter.input(node, index)
        norm = rewriter.producer(x, "BatchNormalization")
        if x is None or norm is None or not rewriter.is_only_for(x, node):
            continue
        base = norm_affine(rewriter, norm)
        rank = rewriter.rank(x)
        if base is None or rank is None or rank < 2:
            continue
        affine = affine_of(rewriter, node, x, rank, 1, base.scale.size)
        gamma, beta = (rewriter.array(t) for t in norm.inputs[1:3])
        if affine is None or gamma is None or beta is None:
            continue
        new_gamma = _rounded(gamma.astype(np.float64) * affine.scale, gamma.dtype)
        new_beta = _rounded(
            beta.astype(np.float64) * affine.scale + affine.shift, beta.dtype
        )
        if new_gamma is None or new_beta is None:
            continue
        if not rewriter.can_replace(node.outputs[0], x):
            continue
        spent = _growth(rewriter, norm.inputs[1], new_gamma) - affine.freed - _OVERHEAD
        spent += _growth(rewriter, norm.inputs[2], new_beta)
        if not _affordable(rewriter, norm.name or x.name, spent):
            continue
        rewriter.set_array(norm, 1, new_gamma)
        rewriter.set_array(norm, 2, new_beta)
        return rewriter.supplant(node.outputs[0], x)
    return False


# --- in front of a linear operator ------------------------------------------------


@LINEAR.rule("scale and shift folded into weights", "Conv", "Gemm", "MatMul")
def fold_in_front(rewriter: Rewriter, node: Node) -> bool:
    """``linear(x * scale + shift)`` -> ``linear'(x)`` where nothing is padded.

    Done for a BatchNormalization, and for other arithmetic on a model's input: inside
    a model it may be part of a pattern that onnxruntime fuses (Gelu, LayerNorm).
    """
    linear = linear_of(rewriter, node.outputs[0])
    if linear is None or linear.node is not node:
        return False
    y = node.inputs[0]
    before = rewriter.producer(y)
    if before is None or before.op not in _AFFINE or not rewriter.is_only_for(y, node):
        return False
    if not is_onnx(before.domain) or (
        before.op != "BatchNormalization" and not _near_input(rewriter, before)
    ):
        return False
    if node.op == "Gemm" and linear.use.input_channels != -1:
        return False
    values = rewriter.constant(linear.weight)
    assert values is not None
    rank, axis, channels = rewriter.rank(y), 1, linear.use.input_size
    if node.op == "Conv":
        rank = len(values.shape)
    elif node.op == "Gemm":
        rank = 2
    elif len(values.shape) != 2 or rank is None:
        return False
    else:
        axis = rank - 1
    for index in range(1 if before.op == "BatchNormalization" else 2):
        x = rewriter.input(before, index)
        if x is None or rewriter.constant(x) is not None:
            continue
        dims = rewriter.shape(x)
        if dims is None or len(dims) != rank:
            continue
        # Arithmetic may broadcast a single channel; the weight reads the result.
        if before.op != "BatchNormalization" and dims[axis] != channels:
            continue
        affine = affine_of(rewriter, before, x, rank, axis, channels)
        if affine is not None and _absorb_input(rewriter, linear, affine, values):
            rewriter.set_input(node, 0, x)
            return True
    return False


def _near_input(rewriter: Rewriter, node: gs.Node) -> bool:
    """Whether a node is one of a few in a row from an input of the main graph."""
    main = rewriter.model.graph
    for _ in range(8):
        if node.op not in (*_AFFINE, "Transpose", "Cast", "Unsqueeze", "Reshape"):
            return False
        loose = [t for t in node.inputs if rewriter.constant(t) is None]
        if len(loose) != 1:
            return False
        if any(tensor is loose[0] for tensor in main.inputs):
            return True
        if not loose[0].inputs:
            return False
        node = loose[0].inputs[0]
    return False


def pads_nothing(node: Node) -> bool:
    """Whether a Conv or pool reads only what is there."""
    mode = node.attrs.get("auto_pad", "NOTSET") or "NOTSET"
    if mode == "VALID":
        return True
    return mode == "NOTSET" and not any(node.attrs.get("pads") or ())


def _absorb_input(
    rewriter: Rewriter, linear: Linear, affine: Affine, values: LazyTensor
) -> bool:
    node, use = linear.node, linear.use
    shifts = bool(affine.shift.any())
    if shifts and node.op == "Conv" and not pads_nothing(node):
        rewriter.skip(
            linear.where,
            "a shift in front of it would change what its padding stands for",
        )
        return False
    if shifts and node.op == "MatMul":
        return False
    if shifts and np.abs(affine.shift).max() > _LARGEST_SHIFT:
        rewriter.skip(linear.where, "folding the shift in front of it loses precision")
        return False
    if len(linear.weight.outputs) > 1 or rewriter.is_result(linear.weight):
        rewriter.skip(
            linear.where, f"its weight {linear.weight.name!r} has other readers"
        )
        return False
    matrices = use.layout.matrices(values.read().astype(np.float64))
    scaled = use.layout.array(matrices * _along_input(use, affine.scale))
    new_weight = _rounded(scaled, values.dtype)
    if new_weight is None:
        return False
    new_bias = None
    if shifts:
        shift = _along_input(use, affine.shift)
        added = (matrices * shift).sum(axis=2).reshape(-1) * use.alpha
        bias = None if linear.bias is None else rewriter.array(linear.bias)
        old: Array = np.zeros(1)
        if bias is not None:
            old = bias.astype(np.float64).reshape(-1) * addend_factor(node)
        rounded = _rounded(added + old, values.dtype)
        if rounded is None:
            return False
        new_bias = rounded
    rewriter.set_array(node, 1, new_weight)
    if new_bias is not None:
        node.attrs.pop("beta", None)
        rewriter.set_array(node, 2, new_bias, f"{linear.where}_bias")
    return True


def _along_input(use: Use, values: Array) -> Array:
    """Return values per input channel in a shape that goes with the matrices."""
    return values if values.ndim == 0 else use.over_inputs(values)


_TO_SOFTMAX = 3
"""Operators between scaled scores and their Softmax, such as that of a mask."""

# --- one factor through other operators -------------------------------------------


@LINEAR.rule("factor moved into weights", "Mul", "Div")
def factor_upwards(rewriter: Rewriter, node: Node) -> bool:
    """Move a factor through Transpose, Reshape and MatMul into a constant weight.

    The factor of ``softmax(q k / sqrt(d))`` stays where it is: onnxruntime finds
    Attention by it, and computes it for nothing then.
    """
    for index in (0, 1) if node.op == "Mul" else (0,):
        x = node.inputs[index]
        factor = rewriter.scalar(node.inputs[1 - index])
        values = rewriter.constant(node.inputs[1 - index])
        if factor is None or values is None or not float_type(values.data_type):
            continue
        if not math.isfinite(factor) or factor == 0.0 or not _above(rewriter, x):
            continue
        rank, other = rewriter.rank(x), len(values.shape)
        if other and (rank is None or other > rank):
            continue
        if not rewriter.is_only_for(x, node):
            continue
        if not rewriter.can_replace(node.outputs[0], x):
            continue
        if _are_scores(rewriter, x, node.outputs[0]):
            where = node.name or node.outputs[0].name
            rewriter.skip(where, "onnxruntime's optimizer looks for it in attention")
            continue
        scale = factor if node.op == "Mul" else 1.0 / factor
        between: list[gs.Tensor] = []
        linear = _linear_above(rewriter, x, 6, between)
        if linear is None:
            continue
        weight = rewriter.constant(linear.weight)
        if weight is None or weight.nbytes > _LARGEST_REWRITE:
            why = f"its weight {linear.weight.name!r} is too large to be rewritten"
            rewriter.skip(linear.where, f"{why} for one factor")
            continue
        affine = Affine(x, np.asarray(scale), np.zeros(()), _OVERHEAD)
        if absorb(rewriter, linear, affine):
            for tensor in between:
                rewriter.model.lineage.scale(tensor.name, scale)
            return rewriter.supplant(node.outputs[0], x)
    return False


def _are_scores(rewriter: Rewriter, x: gs.Tensor, scaled: gs.Tensor) -> bool:
    """Whether a value is a product of activations on its way to a Softmax."""
    product = rewriter.producer(x, "MatMul")
    if product is None or any(rewriter.constant(t) is not None for t in product.inputs):
        return False
    readers = list(scaled.outputs)
    for _ in range(_TO_SOFTMAX):
        if any(reader.op == "Softmax" for reader in readers):
            return True
        readers = [
            behind
            for reader in readers
            if reader.op in ("Add", "Cast", "Where") and is_onnx(reader.domain)
            for tensor in reader.outputs
            for behind in tensor.outputs
        ]
    return False


def _above(rewriter: Rewriter, tensor: gs.Tensor) -> bool:
    node = rewriter.producer(tensor)
    return node is not None and node.op in ("MatMul", "Transpose", "Reshape")


def _linear_above(
    rewriter: Rewriter, tensor: gs.Tensor, depth: int, between: list[gs.Tensor]
) -> Linear | None:
    """Find a linear operator that serves ``tensor`` alone, which is proportional to it.

    Args:
        rewriter: The graph.
        tensor: The value.
        depth: Nodes to go up at most.
        between: Receives the values that a factor of the operator reaches on the way.
    """
    node = rewriter.producer(tensor)
    if node is None or depth == 0 or not is_onnx(node.domain):
        return None
    found = linear_of(rewriter, tensor)
    if found is not None:
        values = rewriter.constant(found.weight)
        alone = len(found.weight.outputs) == 1 and not rewriter.is_result(found.weight)
        if not alone or values is None:
            return None
        if found.add is not None:
            between.append(found.node.outputs[0])
        return found
    if node.op == "MatMul":
        paths = [0, 1]
    elif node.op in ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten"):
        paths = [0]
    else:
        return None
    for path in paths:
        source = node.inputs[path]
        if not rewriter.is_only_for(source, node):
            continue
        found = _linear_above(rewriter, source, depth - 1, between)
        if found is not None:
            between.append(source)
            return found
    return None


# --- constants that meet ----------------------------------------------------------


@LINEAR.rule("constants joined", "Mul", "Div", "Add", "Sub")
def join_constants(rewriter: Rewriter, node: Node) -> bool:
    """``(x * a) * b`` -> ``x * (a * b)`` and ``(x + a) + b`` -> ``x + (a + b)``."""
    outer = _split(rewriter, node)
    if outer is None:
        return False
    y, b = outer
    before = rewriter.producer(y)
    if before is None or not is_onnx(before.domain):
        return False
    if not rewriter.is_only_for(y, node):
        return False
    multiplies = node.op in ("Mul", "Div")
    if (before.op in ("Mul", "Div")) != multiplies or before.op not in _AFFINE[1:]:
        return False
    inner = _split(rewriter, before)
    if inner is None or (before.op == "Sub" and before.inputs[0] is not inner[0]):
        return False
    x, a = inner
    for part, op in ((node, node.op), (before, before.op)):
        if op in ("Div", "Sub") and part.inputs[0] not in (x, y):
            return False
    left, right = rewriter.array(a), rewriter.array(b)
    if left is None or right is None or left.dtype != right.dtype:
        return False
    one, two = left.astype(np.float64), right.astype(np.float64)
    with np.errstate(all="ignore"):
        if multiplies:
            one = 1.0 / one if before.op == "Div" else one
            two = 1.0 / two if node.op == "Div" else two
        else:
            one = -one if before.op == "Sub" else one
            two = -two if node.op == "Sub" else two
    try:
        joined = one * two if multiplies else one + two
    except ValueError:
        return False
    if joined.size > max(left.size, right.size) or joined.ndim > max(
        left.ndim, right.ndim
    ):
        return False
    exact = np.isfinite(one).all() and np.isfinite(two).all()
    rounded = _rounded(joined, left.dtype) if exact else None
    if rounded is None or (multiplies and (np.abs(joined) < 1e-30).any()):
        return False
    constant = rewriter.add_constant(b.name, rounded)
    rewriter.become(node, "Mul" if multiplies else "Add", [x, constant])
    return True


def _split(rewriter: Rewriter, node: Node) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Return (variable, float constant) of a node with one of each."""
    if len(node.inputs) != 2:
        return None
    for index in (0, 1):
        values = rewriter.constant(node.inputs[index])
        other = node.inputs[1 - index]
        if values is not None and rewriter.constant(other) is None:
            known = float_type(values.data_type)
            return (other, node.inputs[index]) if known else None
    return None


# --- Gemm -------------------------------------------------------------------------

# These rules rewrite the attributes of any Gemm, of computed matrices too, which are no
# layers.

_GEMM_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@LINEAR.rule("MatMul and Add made Gemm", "Add")
def matmul_add(rewriter: Rewriter, node: Node) -> bool:
    """``MatMul(a, b) + c`` -> ``Gemm(a, b, c)`` for matrices."""
    for index in (0, 1):
        y, c = node.inputs[index], node.inputs[1 - index]
        matmul = rewriter.producer(y, "MatMul")
        if matmul is None or not rewriter.is_only_for(y, node):
            continue
        a, b = matmul.inputs
        if (
            rewriter.rank(a) != 2
            or rewriter.rank(b) != 2
            or _quantized(rewriter, matmul)
        ):
            continue
        if rewriter.type(node.outputs[0]) not in _GEMM_TYPES:
            continue
        wanted, given = rewriter.shape(y), rewriter.shape(c)
        if wanted is None or given is None or len(given) > 2:
            continue
        if any(
            dim not in (1, full)
            for dim, full in zip(given[::-1], wanted[::-1], strict=False)
        ):
            continue
        rewriter.become(node, "Gemm", [a, b, c])
        return True
    return False


@LINEAR.rule("Gemm and Add joined", "Add")
def gemm_add(rewriter: Rewriter, node: Node) -> bool:
    """``Gemm(a, b) + c`` -> ``Gemm(a, b, c)``."""
    for index in (0, 1):
        y, c = node.inputs[index], node.inputs[1 - index]
        gemm = rewriter.producer(y, "Gemm")
        if gemm is None or not rewriter.is_only_for(y, node):
            continue
        wanted, given = rewriter.shape(y), rewriter.shape(c)
        if rewriter.input(gemm, 2) is not None or wanted is None or given is None:
            continue
        if len(given) > 2 or any(
            dim not in (1, full)
            for dim, full in zip(given[::-1], wanted[::-1], strict=False)
        ):
            continue
        attrs = {k: v for k, v in gemm.attrs.items() if k in _GEMM_ATTRS}
        rewriter.become(node, "Gemm", [*gemm.inputs[:2], c], attrs)
        return True
    return False


def _quantized(rewriter: Rewriter, node: Node) -> bool:
    """Whether onnxruntime may run it on integers, which MatMul does better."""
    return any(rewriter.producer(t, "DequantizeLinear") for t in node.inputs[:2])


_GEMM_ATTRS = ("alpha", "transA", "transB")


@LINEAR.rule("Transpose joined with Gemm", "Gemm", "MatMul")
def transpose_gemm(rewriter: Rewriter, node: Node) -> bool:
    """Read the matrix in front of a Transpose, with transA or transB."""
    if node.op == "MatMul" and (
        rewriter.type(node.outputs[0]) not in _GEMM_TYPES
        or any(rewriter.rank(tensor) != 2 for tensor in node.inputs)
    ):
        return False
    if _quantized(rewriter, node):
        return False
    for index, name in ((0, "transA"), (1, "transB")):
        y = node.inputs[index]
        transpose = rewriter.producer(y, "Transpose")
        if transpose is None or not rewriter.is_only_for(y, node):
            continue
        if list(transpose.attrs.get("perm") or (1, 0)) != [1, 0]:
            continue
        inputs = list(node.inputs)
        inputs[index] = transpose.inputs[0]
        attrs = dict(node.attrs)
        flipped = 0 if attrs.pop(name, 0) else 1
        if flipped:
            attrs[name] = 1
        rewriter.become(node, "Gemm", inputs, attrs)
        return True
    return False


@LINEAR.rule("Gemm factors folded", "Gemm")
def gemm_factors(rewriter: Rewriter, node: Node) -> bool:
    """Fold alpha and beta into constants that nothing else reads."""
    changed = False
    for name, index in (("alpha", 1), ("beta", 2)):
        factor = float(node.attrs.get(name, 1.0))
        tensor = rewriter.input(node, index)
        if name not in node.attrs:
            continue
        if factor == 1.0 or tensor is None:
            if name == "beta" or factor == 1.0:
                del node.attrs[name]
                changed = True
            continue
        values = rewriter.constant(tensor)
        if values is None or len(tensor.outputs) > 1 or not math.isfinite(factor):
            continue
        if not float_type(values.data_type) or rewriter.is_result(tensor):
            continue
        wide = values.read().astype(np.float64) * float(np.float32(factor))
        rounded = _rounded(wide, values.dtype)
        if rounded is None:
            continue
        del node.attrs[name]
        rewriter.set_array(node, index, rounded)
        changed = True
    return changed


@LINEAR.rule("zero bias dropped", "Conv", "ConvTranspose", "Gemm")
def zero_bias(rewriter: Rewriter, node: Node) -> bool:
    """``linear(x, w, 0)`` -> ``linear(x, w)``."""
    if rewriter.opset(node) < 11 and node.op == "Gemm":
        return False  # the bias is not optional yet
    bias = rewriter.input(node, 2)
    values = rewriter.constant(bias)
    if bias is None or values is None or values.nbytes > 1 << 20:
        return False
    array = values.read()
    if array.dtype.kind == "O" or array.astype(np.float64).any():
        return False
    node.inputs.pop()
    rewriter.sweep(bias)
    return True
