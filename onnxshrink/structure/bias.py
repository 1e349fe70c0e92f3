"""What is added to the outputs of a linear operator, however it is attached.

Tested in tests/structure/test_layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx, returned_by
from onnxshrink.structure.codes import is_float

__all__ = [
    "Bias",
    "add_behind",
    "addend",
    "addend_factor",
    "bias_at",
    "give_bias",
    "is_shift",
    "takes_bias",
]

Array = NDArray[np.float64]

_WITH_BIAS = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators that add a bias themselves, their third input."""
_FUSED_WITH_BIAS = frozenset({"FusedConv", "FusedGemm"})
"""The same of com.microsoft; what is behind them is not linear any more."""
_CODED = frozenset({"DequantizeLinear", "QuantizeLinear"})
_STEPS = 4
"""Nodes between an operator and the Add behind it at most."""


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to the outputs of a layer, wherever that is done.

    Attributes:
        node: The node that adds it: the layer's own, or an Add behind it.
        index: Which input of that node it is.
        channels: Outputs of the layer.
        weight: Its values, or the int32 codes of them; ``None`` if it is computed.
        scale: What a code stands for, one value or one for each; ``None`` of floats.
        factor: What the node multiplies it with: beta of Gemm.
        why_unknown: What keeps its values from being known, after "the bias"; empty if
            it is a constant with one value for each output.
        why_not: What keeps it from being changed, after "the bias"; empty if it is
            known, no caller sees it, and nothing else reads it.
    """

    node: Node
    index: int
    channels: int
    weight: Weight | None = None
    scale: Weight | None = None
    factor: float = 1.0
    why_unknown: str = ""
    why_not: str = ""

    @property
    def tensor(self) -> gs.Tensor:
        """The tensor that the node reads."""
        return self.node.inputs[self.index]

    @property
    def output(self) -> gs.Tensor:
        """The outputs of the layer with the bias in them."""
        return self.node.outputs[0]

    def read(self) -> Array:
        """Return its values before ``factor``, float64 [channels].

        Raises:
            ModelError: It is not a constant with one value for each output.
        """
        weight = self.weight
        if weight is None or self.why_unknown:
            label = self.node.name or self.node.op
            raise ModelError(f"the bias of {label} {self.why_unknown}")
        return (weight.read().astype(np.float64) * self._step()).reshape(-1)

    def write(self, values: NDArray[Any]) -> Array:
        """Set its values, [channels]; return what they became by rounding, float64.

        Raises:
            ModelError: It is not free to change.
        """
        weight = self.weight
        if weight is None or self.why_not:
            label = self.node.name or self.node.op
            raise ModelError(f"the bias of {label} {self.why_not}")
        wanted = np.asarray(values, np.float64).reshape(weight.shape) / self._step()
        if weight.dtype.kind == "i":
            room = np.iinfo(weight.dtype)
            wanted = np.clip(np.rint(wanted), room.min, room.max)
        weight.model.set_weight(weight, wanted.astype(weight.dtype))
        return self.read()

    def add(self, shift: NDArray[Any]) -> Array:
        """Add to the outputs; return what was added in the end, float64 [channels]."""
        old = self.read()
        wanted = old + np.asarray(shift, np.float64).reshape(-1) / self.factor
        return (self.write(wanted) - old) * self.factor

    def _step(self) -> Array:
        """Return what a code stands for, in a shape that goes with the weight."""
        if self.scale is None or self.weight is None:
            return np.ones(())
        step = self.scale.read().astype(np.float64).reshape(-1)
        return np.broadcast_to(step, self.weight.size).reshape(self.weight.shape)


def bias_at(model: Model, node: Node, channels: int, axis: int) -> Bias | None:
    """Return what is added to the outputs of a linear operator, if anything is.

    That is its own input, or the constant of an Add that alone reads what it gives, as
    it is or behind QuantizeLinear and DequantizeLinear. The constant may stand behind
    Identity, be a Constant node, or be int32 codes behind DequantizeLinear.

    Args:
        model: The model.
        node: A Conv, ConvTranspose, Gemm or MatMul, or one of these that is fused.
        channels: Channels of what it gives.
        axis: Axis of these, counted from the end: negative.
    """
    if addend(node) is not None:
        is_gemm = node.op in ("Gemm", "FusedGemm")
        factor = addend_factor(node)
        return _described(model, node, 2, channels, axis if is_gemm else -1, factor)
    is_known = is_onnx(node.domain) or node.domain == "com.microsoft"
    if not is_known or node.op not in (*_WITH_BIAS, "MatMul", "FusedMatMul"):
        return None
    found = add_behind(model, node)
    return None if found is None else _described(model, *found, channels, axis)


def addend(node: Node) -> gs.Tensor | None:
    """Return what a linear operator adds by itself, its third input, if anything."""
    if not _adds_bias(node) or len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    tensor: gs.Tensor = node.inputs[2]
    return tensor


def addend_factor(node: Node) -> float:
    """Return what a node multiplies that with, or would: beta of Gemm, or 1."""
    is_gemm = node.op in ("Gemm", "FusedGemm")
    return float(attribute(node, "beta", 1.0)) if is_gemm else 1.0


def takes_bias(node: Node) -> bool:
    """Whether a node has an input for a bias that nothing is connected to.

    Before opset 11 a Gemm must have one, so it takes no other.
    """
    return _adds_bias(node) and addend(node) is None


def give_bias(node: Node, bias: gs.Tensor) -> None:
    """Let a Conv, ConvTranspose or Gemm add a bias instead of what it adds."""
    if len(node.inputs) > 2:
        node.inputs[2] = bias
    else:
        node.inputs.append(bias)


def _adds_bias(node: Node) -> bool:
    if node.domain == "com.microsoft":
        return node.op in _FUSED_WITH_BIAS
    return node.op in _WITH_BIAS and is_onnx(node.domain)


def add_behind(model: Model, node: Node) -> tuple[Node, int] | None:
    """Return the Add of a constant that alone reads what a node gives.

    QuantizeLinear and DequantizeLinear may stand between.

    Returns:
        The Add, and which of its inputs is the constant; ``None`` if there is none.
    """
    tensor = node.outputs[0]
    for _ in range(_STEPS):
        readers = list(tensor.outputs)
        if len(readers) != 1 or returned_by(tensor) or not is_onnx(readers[0].domain):
            return None
        reader: Node = readers[0]
        if reader.op == "Add" and len(reader.inputs) == 2:
            index = 1 if reader.inputs[0] is tensor else 0
            return (reader, index) if _held(model, reader, index) else None
        if reader.op not in _CODED or reader.inputs[0] is not tensor:
            return None
        tensor = reader.outputs[0]
    return None


def _held(
    model: Model, node: Node, index: int
) -> tuple[Weight, Weight | None, Node, int] | None:
    """Return the constant that an input holds, its scale, and who reads it where."""
    tensor = node.inputs[index]
    known = model.constant(tensor)
    if known is not None:
        return known, None, node, index
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "DequantizeLinear" or not is_onnx(maker.domain):
        return None
    codes, scale = (model.constant(t) for t in maker.inputs[:2])
    return None if codes is None or scale is None else (codes, scale, maker, 0)


def _described(
    model: Model,
    node: Node,
    index: int,
    channels: int,
    axis: int,
    factor: float = 1.0,
) -> Bias:
    held = _held(model, node, index)
    if held is None:
        why = "is not constant"
        return Bias(node, index, channels, None, None, factor, why, why)
    weight, scale, reader, at = held
    why = _why_unknown(model, weight, scale, reader, channels, axis)
    return Bias(
        node,
        index,
        channels,
        weight,
        scale,
        factor,
        why,
        why or _why_not(weight, node, reader, at),
    )


def is_shift(weight: Weight, channels: int, axis: int) -> bool:
    """Whether a constant has one value for each channel along an axis.

    Args:
        weight: The constant.
        channels: How many channels there are.
        axis: Their axis in what it is added to, counted from the end: negative.
    """
    shape = weight.shape
    is_along = len(shape) >= -axis and shape[axis] == channels
    return weight.size == channels and (is_along or channels == 1)


def _why_unknown(
    model: Model,
    weight: Weight,
    scale: Weight | None,
    reader: Node,
    channels: int,
    axis: int,
) -> str:
    """Return why a constant does not tell the bias of each output."""
    if weight.is_input:
        return "is a graph input that a caller may set"
    if scale is None and not is_float(weight):
        return f"holds {weight.dtype}"
    if scale is not None:
        if weight.dtype.kind != "i":
            return f"has codes of {weight.dtype}"
        if scale.size not in (1, channels) or _shifts(model, reader):
            return "has codes with a zero point, or with a scale that does not fit"
    if not is_shift(weight, channels, axis):
        return "is not one value for each output"
    return ""


def _why_not(weight: Weight, node: Node, reader: Node, at: int) -> str:
    """Return why a change of a constant would be seen elsewhere."""
    if weight.is_output:
        return "is also an output of its graph"
    if weight.uses != ((reader, at),):
        return "is read by other nodes too"
    made = reader.outputs[0]
    if reader is not node and (list(made.outputs) != [node] or returned_by(made)):
        return "is read by other nodes too"
    return ""


def _shifts(model: Model, decoder: Node) -> bool:
    """Whether a DequantizeLinear has a zero point other than 0."""
    if len(decoder.inputs) < 3 or not decoder.inputs[2].name:
        return False
    zero = model.constant(decoder.inputs[2])
    return zero is None or bool(zero.read().any())
