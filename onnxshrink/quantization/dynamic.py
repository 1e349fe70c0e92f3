"""Activations as int8 codes whose range is found at run time.

``rewrite`` turns a MatMul or Gemm with a known weight into standard ONNX:
DynamicQuantizeLinear of the activations (one for all that read the same value),
MatMulInteger with int8 codes of the weight, Cast, and Mul with the product of both
scales. onnxruntime 1.31 fuses this, and an Add behind it, into DynamicQuantizeMatMul,
or MatMulIntegerToFloat where several readers share the codes (looked up in its
optimized graphs).

Only weights a linear operator multiplies are touched, so attention masks stay float.

On x86 without VNNI the kernel multiplies uint8 activations with int8 weights two by two
and adds each pair in 16 bits, which saturates: with Gaussian weights that fill int8 the
error is 1.5 times that of exact sums. ``safe_scale`` widens the scale of an output just
far enough that no pair of neighbours saturates: by a factor of about 1.3, where 7-bit
weights would take 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node
from onnxshrink.quantization import weightonly
from onnxshrink.quantization.weightonly import home, within_reach
from onnxshrink.solvers.rounding import Factors, Grid, gptq, nearest
from onnxshrink.structure.bias import addend, addend_factor
from onnxshrink.structure.layers import LinearWeight, Use

__all__ = [
    "OPSET",
    "largest_pair",
    "pays",
    "quantized",
    "rewrite",
    "safe_codes",
    "safe_scale",
    "why_not",
]

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

OPSET = 11
"""ai.onnx opset from which there is DynamicQuantizeLinear."""
PAIR = 128
"""Largest sum of two codes of one sign whose products with 255 fit 16 bits."""
_TOP = 127
_TINY = float(np.finfo(np.float32).tiny)
PAYS_FROM = 1 << 12
"""Entries of a weight from which integer products make up for finding ranges. Alone,
64 by 64 takes 1.1 times as long as in float, 300 by 100 the same, 512 by 512 0.65
times; but a whole vision transformer of 64 channels gains a tenth, for biases are added
inside."""
_FLOATING = {
    "Conv": "ConvInteger is no faster than Conv in float",
    "ConvTranspose": "there is no integer operator for it",
    "GRU": "there is no integer operator for it",
    "LSTM": "standard ONNX has no integer operator for it",
    "RNN": "there is no integer operator for it",
}


def why_not(model: Model, layer: LinearWeight) -> str:
    """Return why a layer cannot multiply codes found at run time, or nothing."""
    tied = weightonly.is_tied(layer)
    reason = weightonly.why_not(layer) if tied else layer.why_not
    if reason:
        return reason
    if layer.weight.data_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(layer.weight.data_type).lower()
        return f"its values are {kind}, not float32"
    if model.opset < OPSET:
        return f"DynamicQuantizeLinear needs opset {OPSET}, not {model.opset}"
    for use in layer.uses:
        node = use.node
        if node.op in _FLOATING:
            return _FLOATING[node.op]
        if use.role != "weight":
            if tied and weightonly.looks_up_rows(use):
                continue
            return f"{node.op} looks its rows up"
        if use.index != 1:
            return "the weight is on the left"
        if len(use.layout.shape) != 2:
            return "it is a stack of matrices, whose outputs cannot share a scale"
        if use.layout != layer.layout:
            return "its readers have its rows along different axes"
        if use.input_channels != -1:
            return "Gemm transposes its activations"
        if model.constant(node.inputs[0]) is not None:
            return "it multiplies a constant"
        if not within_reach(model, layer, use):
            return "it is handed to a function"
    return ""


def pays(layer: LinearWeight) -> bool:
    """Whether a weight is large enough for integer products to be faster."""
    return layer.weight.size >= PAYS_FROM


# --- codes ----------------------------------------------------------------------------


def safe_scale(weight: Array, *, pairs: bool = True) -> Float32:
    """Return a scale for each output at which int8 codes never saturate.

    Args:
        weight: Float [outputs, inputs].
        pairs: Whether the kernel adds products of neighbours in 16 bits (x86 without
            VNNI); otherwise codes just fill -127 to 127.

    Returns:
        float32 [outputs]; 1 for an output without weights.
    """
    rows = np.asarray(weight, np.float64)
    scale = np.abs(rows).max(axis=1, initial=0.0) / _TOP
    if pairs:
        scale = np.maximum(scale, largest_pair(rows).max(axis=1, initial=0.0) / PAIR)
    return np.where(scale > 0, np.maximum(scale, _TINY), 1.0).astype(np.float32)


def largest_pair(rows: Array) -> Array:
    """Return the larger sum of one sign in neighbouring columns, [outputs, pairs]."""
    odd = rows.shape[1] % 2
    padded = np.pad(rows, ((0, 0), (0, odd))) if odd else rows
    pairs = padded.reshape(len(rows), -1, 2)
    above = np.maximum(pairs, 0).sum(axis=2)
    below = np.maximum(-pairs, 0).sum(axis=2)
    return np.asarray(np.maximum(above, below))


def safe_codes(codes: Int32) -> Int32:
    """Bring pairs of codes that rounding made too large back within bounds.

    In such a pair the larger code becomes smaller.
    """
    safe = codes.copy()
    while True:
        rows, pairs = np.nonzero(largest_pair(safe) > PAIR)
        if not rows.size:
            return safe
        first, second = 2 * pairs, np.minimum(2 * pairs + 1, codes.shape[1] - 1)
        larger = np.where(
            np.abs(safe[rows, first]) >= np.abs(safe[rows, second]), first, second
        )
        safe[rows, larger] -= np.sign(safe[rows, larger])


def quantized(
    weight: Array,
    *,
    gram: NDArray[np.float64] | None = None,
    pairs: bool = True,
    factors: Factors | None = None,
) -> tuple[Grid, Int32]:
    """Choose int8 codes with one scale for each output.

    Args:
        weight: Float [outputs, inputs].
        gram: [inputs, inputs] of the layer's inputs: codes are GPTQ's (Frantar et al.
            2023); without, the nearest.
        pairs: As for ``safe_scale``.
        factors: Of ``gram``, if they are known.
    """
    scale = safe_scale(weight, pairs=pairs)[:, None]
    grid = Grid(scale, np.zeros(scale.shape, np.int32), -_TOP, _TOP)
    if gram is None:
        codes = nearest(weight, grid)
    else:
        codes = gptq(weight, gram, grid, factors=factors)
    return grid, safe_codes(codes) if pairs else codes


# --- writing --------------------------------------------------------------------------


def rewrite(model: Model, layer: LinearWeight, grid: Grid, codes: Array) -> str:
    """Let all readers of a weight multiply int8 codes.

    Args:
        model: The model; ``drop_unused`` then removes the float weight.
        layer: The layer.
        grid: One scale for each output, zero points of 0, codes of int8.
        codes: Int [outputs, inputs].

    Returns:
        What was done, in words.

    Raises:
        UsageError: ``why_not`` gives a reason, or the grid is another.
    """
    reason = why_not(model, layer)
    if reason:
        raise UsageError(f"{layer.name} cannot run on codes: {reason}")
    _, outputs, inputs = layer.layout.matrices_shape
    if grid.scale.shape != (outputs, 1) or grid.zero.any() or grid.low < -128:
        raise UsageError(
            f"{layer.name} needs int8 codes with one scale for each of its {outputs} "
            "outputs and no zero points"
        )
    if codes.shape != (outputs, inputs):
        raise UsageError(
            f"codes of {layer.name} have shape {list(codes.shape)}, not "
            f"{[outputs, inputs]}"
        )
    if weightonly.is_tied(layer):
        _rewrite_tied(model, layer, grid, codes)
        return (
            f"int8 codes for {outputs} outputs, activations coded at run time, and for "
            "rows, decoded after they are gathered"
        )
    graph, name = layer.weight.graph, layer.weight.value.name or "weight"
    right = np.ascontiguousarray(codes.T.astype(np.int8))
    weight = model.add_weight(f"{name}_codes", right, graph)
    for use in layer.uses:
        factor = np.float32(use.alpha)
        scale = model.add_weight(f"{name}_scale", grid.scale[:, 0] * factor, graph)
        _IntegerProduct(model, use).write(weight, scale)
    return f"int8 codes for {outputs} outputs, activations coded at run time"


def _rewrite_tied(model: Model, layer: LinearWeight, grid: Grid, codes: Array) -> None:
    """Let products and lookups of rows read one copy of the codes."""
    shared = weightonly.SharedCodes(model, layer, grid, codes)
    uses = weightonly.multiplied(layer).uses
    weight, scale = shared.matrix(), shared.scales()
    for use in uses:
        factor = scale
        if use.alpha != 1.0:
            scaled = grid.scale[:, 0] * np.float32(use.alpha)
            factor = model.add_weight("scale", scaled, layer.weight.graph)
        _IntegerProduct(model, use).write(weight, factor)
    for use in layer.uses:
        if use not in uses:
            shared.rows(use)


class _IntegerProduct:
    """One MatMul or Gemm that becomes a MatMulInteger."""

    def __init__(self, model: Model, use: Use) -> None:
        self.model, self.node = model, use.node
        self.graph = home(model, use.node)

    def write(self, weight: gs.Tensor, scale: gs.Tensor) -> None:
        node = self.node
        codes, step, zero = self._activations(node.inputs[0])
        product = self._add("MatMulInteger", [codes, weight, zero])
        real = self._add("Cast", [product], to=onnx.TensorProto.FLOAT)
        value = self._add("Mul", [real, self._add("Mul", [step, scale])])
        bias = self._bias()
        if bias is not None:
            value = self._add("Add", [value, bias])
        self.model.replace_uses(node.outputs[0], value)
        self.model.remove(node, self.graph)

    def _activations(self, tensor: gs.Tensor) -> Sequence[gs.Tensor]:
        """Return codes, scale and zero point of a value, made once for a graph."""
        for reader in tensor.outputs:
            if reader.op == "DynamicQuantizeLinear" and any(
                other is reader for other in self.graph.nodes
            ):
                return list(reader.outputs)
        node: Node = self.model.add_node(
            "DynamicQuantizeLinear",
            [tensor],
            outputs=3,
            name=f"{tensor.name}_codes",
            graph=self.graph,
        )
        return list(node.outputs)

    def _bias(self) -> gs.Tensor | None:
        """Return what Gemm adds, times ``beta``."""
        bias, beta = addend(self.node), addend_factor(self.node)
        if bias is None or beta == 1.0:
            return bias
        factor = self.model.add_weight("beta", np.array(beta, np.float32), self.graph)
        return self._add("Mul", [bias, factor])

    def _add(self, op: str, inputs: Sequence[gs.Tensor], **attrs: Any) -> gs.Tensor:
        name = f"{self.node.name or self.node.op}_{op}"
        node = self.model.add_node(op, inputs, attrs=attrs, name=name, graph=self.graph)
        return node.outputs[0]
