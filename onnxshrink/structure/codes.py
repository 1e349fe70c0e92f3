"""How weights are stored: floats, or integer codes and the nodes that decode them.

Tested in tests/structure/test_layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx

__all__ = ["CODES", "FLOATS", "MOVES", "Decoder", "decoder_of", "is_float"]

Array = np.ndarray[Any, Any]

_T = onnx.TensorProto
FLOATS = frozenset({_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16})
"""Element types of weights that passes change."""
CODES = frozenset(
    {_T.INT2, _T.INT4, _T.INT8, _T.INT16, _T.UINT2, _T.UINT4, _T.UINT8, _T.UINT16}
)
"""Element types of codes."""
MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only move codes about."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """How real values are made of a weight's codes.

    Attributes:
        nodes: The nodes that do it.
        ends: What they give: tensors that hold the values, each with the indices of the
            rows that are looked up, or ``None`` for all.
        scale: What they read the scale from.
        zero: Zero point in a shape that broadcasts over the values, float32.
        parameters: Names of the constants that hold scale and zero point.
        shape: Shape of the values.
        places: For each value the position of its code in the flat weight; ``None`` if
            they are in the same order.
        axis: Axis of the channels or blocks; ``None`` where the scale broadcasts as it
            is.
        block: Values along ``axis`` that share a scale; 0: no blocks.
    """

    nodes: tuple[Node, ...]
    ends: tuple[tuple[gs.Tensor, gs.Tensor | None], ...]
    scale: gs.Tensor
    zero: Array
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    places: Array | None = None
    axis: int | None = None
    block: int = 0

    def spread(self, scale: Array) -> Array:
        """Return a scale or zero point in a shape that broadcasts over the values."""
        return _spread(scale, self.shape, self.axis, self.block)

    def decode(self, codes: Array, scale: Array) -> Array:
        """Return the real values of codes of the weight's shape, float32."""
        wide = codes.astype(np.float32).reshape(-1)
        wide = wide if self.places is None else wide[self.places.reshape(-1)]
        made: Array = (wide.reshape(self.shape) - self.zero) * self.spread(scale)
        return np.asarray(made, np.float32)

    def encode(
        self, values: Array, scale: Array, levels: range, shape: Sequence[int]
    ) -> Array:
        """Return the codes, int32 of the weight's shape, nearest to real values."""
        step = levels.step
        steps = values / (self.spread(scale) * np.float32(step))
        places = np.rint(steps + (self.zero - levels[0]) / np.float32(step))
        flat = np.clip(places, 0, len(levels) - 1).astype(np.int32).reshape(-1)
        flat = flat * step + levels[0]
        if self.places is not None:
            back = np.empty_like(flat)
            back[self.places.reshape(-1)] = flat
            flat = back
        return flat.reshape(shape)

    def replace(self, model: Model, values: gs.Tensor) -> None:
        """Let all that reads the decoded values read others; remove the decoder."""
        for end, indices in self.ends:
            made = values
            if indices is not None:
                made = model.add_node("Gather", [values, indices]).outputs[0]
            model.replace_uses(end, made)
        for node in self.nodes:
            model.remove(node)


def is_float(weight: Weight) -> bool:
    """Whether the weight's values are float32, float64, float16 or bfloat16."""
    return weight.data_type in FLOATS


def _spread(array: Array, shape: Sequence[int], axis: int | None, block: int) -> Array:
    if array.size == 1:
        return array.reshape(())
    if axis is None:
        return array
    if block:
        wide = np.repeat(array, block, axis)
        return np.take(wide, np.arange(shape[axis]), axis)
    return array.reshape([-1 if at == axis else 1 for at in range(len(shape))])


def decoder_of(model: Model, weight: Weight) -> Decoder | str:
    """Return what decodes the codes of a weight, or why that is not known.

    That is DequantizeLinear, with one scale, one for each channel or for each block, or
    Cast to float, perhaps Sub of a zero point, and Mul with a scale; Reshape, Transpose
    and their like may stand before and between. Gather of rows may stand before Cast,
    and of the same rows of the scale. Several such readers decode alike. The scale may
    be computed.
    """
    found: list[Decoder] = []
    for node, index in weight.uses:
        try:
            one = _DecoderSearch(model, weight).decoder(node, index)
        except (IndexError, ValueError):  # as a file may say anything
            one = "its shape does not fit what decodes it"
        if isinstance(one, str):
            return one
        found.append(one)
    if not found:
        return "nothing reads its codes"
    first = found[0]
    if not all(_alike(first, other) for other in found[1:]):
        return "several nodes read its codes, each in its way"
    return replace(
        first,
        nodes=tuple(node for one in found for node in one.nodes),
        ends=tuple(end for one in found for end in one.ends),
    )


def _alike(one: Decoder, two: Decoder) -> bool:
    places = [p if p is None else p.tobytes() for p in (one.places, two.places)]
    return (
        one.scale is two.scale
        and one.shape == two.shape
        and np.array_equal(one.zero, two.zero)
        and places[0] == places[1]
        and (one.axis, one.block) == (two.axis, two.block)
    )


class _DecoderSearch:
    """Follows the readers of codes to the node that gives real values."""

    def __init__(self, model: Model, weight: Weight) -> None:
        self.model, self.weight = model, weight
        self.nodes: list[Node] = []
        self.places: Array | None = None
        self.rows: gs.Tensor | None = None
        self.parameters: list[str] = []

    def decoder(self, node: Node, index: int) -> Decoder | str:
        """Describe what starts with a reader of the codes."""
        if index != 0:
            return f"{node.op} reads its codes"
        is_cast = False
        while True:
            if not is_onnx(node.domain):
                return f"{node.op} reads its codes"
            self.nodes.append(node)
            if node.op == "Cast" and not is_cast:
                if node.attrs.get("to") not in (onnx.TensorProto.FLOAT, np.float32):
                    return "its codes are cast to another type than float32"
                is_cast = True
            elif node.op in MOVES and self.rows is None:
                if not self._move(node):
                    return (
                        f"{node.op} {node.name!r} moves its codes by what is computed"
                    )
            elif node.op == "Gather" and self._looks_up(node) and not is_cast:
                self.rows = node.inputs[1]
            elif node.op == "DequantizeLinear" and not is_cast and self.rows is None:
                return self._dequantized(node)
            elif node.op in ("Mul", "Sub") and is_cast:
                return self._multiplied(node)
            else:
                return f"{node.op} reads its codes before they are decoded"
            reader = self._only_reader(node.outputs[0])
            if reader is None:
                return "several nodes read its codes, each in its way"
            node = reader

    def _looks_up(self, node: Node) -> bool:
        first = self.rows is None and self.places is None
        return first and int(attribute(node, "axis", 0)) % len(self.weight.shape) == 0

    def _move(self, node: Node) -> bool:
        places = self.places
        if places is None:
            count = np.arange(self.weight.size, dtype=np.int32)
            places = count.reshape(self.weight.shape)
        moved = _moved(self.model, node, places)
        if moved is not None:
            self.places = moved
        return moved is not None

    def _only_reader(self, tensor: gs.Tensor) -> Node | None:
        readers = list(dict.fromkeys(tensor.outputs))
        is_output = any(tensor is output for output in self.model.graph.outputs)
        return readers[0] if len(readers) == 1 and not is_output else None

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.weight.shape if self.places is None else self.places.shape

    def _known(self, tensor: gs.Tensor) -> Array | None:
        """Return a constant, or one behind Cast and the Gather of the same rows."""
        for _ in range(3):
            known = self.model.constant(tensor)
            if known is not None:
                self.parameters.append(known.name)
                return known.read().astype(np.float32)
            maker = tensor.inputs[0] if tensor.inputs else None
            if maker is None or maker.op not in ("Cast", "Gather"):
                return None
            if maker.op == "Gather" and maker.inputs[1] is not self.rows:
                return None
            tensor = maker.inputs[0]
        return None

    def _made(
        self,
        values: gs.Tensor,
        scale: gs.Tensor,
        zero: Array,
        axis: int | None = None,
        block: int = 0,
    ) -> Decoder:
        known = self.model.constant(scale)
        if known is not None:
            self.parameters.append(known.name)
        return Decoder(
            tuple(self.nodes),
            ((values, self.rows),),
            scale,
            zero,
            tuple(self.parameters),
            self._shape,
            self.places,
            axis,
            block,
        )

    def _dequantized(self, node: Node) -> Decoder | str:
        shape = self._shape
        zero: Array | None = np.zeros((), np.float32)
        if len(node.inputs) > 2 and (node.inputs[2].name or node.inputs[2].inputs):
            zero = self._known(node.inputs[2])
        if zero is None:
            return "its zero point is computed from data"
        axis = int(attribute(node, "axis", 1))
        axis += len(shape) if axis < 0 else 0
        if not 0 <= axis < max(len(shape), 1):
            axis = 0
        block = int(attribute(node, "block_size", 0))
        wide = _spread(zero, shape, axis, block)
        return self._made(node.outputs[0], node.inputs[1], wide, axis, block)

    def _multiplied(self, node: Node) -> Decoder | str:
        """Describe Cast, Sub, Mul; ``node`` is the first of Sub and Mul."""
        zero: Array = np.zeros((), np.float32)
        before = self.nodes[-2].outputs[0]
        if node.op == "Sub":
            known = self._known(node.inputs[1])
            if node.inputs[0] is not before or known is None:
                return "its zero point is computed from data"
            zero = known
            before = node.outputs[0]
            reader = self._only_reader(before)
            if reader is None or reader.op != "Mul":
                return "several nodes read its codes, each in its way"
            node = reader
            self.nodes.append(node)
        rest = [tensor for tensor in node.inputs if tensor is not before]
        if len(rest) != 1:
            return "Mul reads its codes before they are decoded"
        scale = rest[0]
        maker = scale.inputs[0] if scale.inputs else None
        if self.rows is not None and maker is not None and maker.op == "Gather":
            if maker.inputs[1] is not self.rows:
                return "its scale is computed from data"
            scale = maker.inputs[0]
        elif self.rows is not None:
            one = self.model.constant(scale)
            if one is None or one.size > 1:
                return "its scale is computed from data"
        return self._made(node.outputs[0], scale, zero)


def _moved(model: Model, node: Node, array: Array) -> Array | None:
    """Return what a node makes of an array that it only moves about."""
    if node.op == "Identity":
        return array
    if node.op == "Transpose":
        return array.transpose(attribute(node, "perm", None))
    named = node.attrs.get("axes") if node.op != "Reshape" else None
    if named is None and len(node.inputs) > 1 and node.inputs[1].name:
        known = model.constant(node.inputs[1])
        if known is None:
            return None
        named = known.read().reshape(-1).tolist()
    if node.op == "Squeeze":
        return array.squeeze(None if named is None else tuple(named))
    if named is None:
        return None
    if node.op == "Unsqueeze":
        return np.expand_dims(array, tuple(named))
    wanted = [
        array.shape[at] if size == 0 and not attribute(node, "allowzero", 0) else size
        for at, size in enumerate(named)
    ]
    return array.reshape(wanted)
