"""Weights that a linear operator multiplies: where they stand and what they mean.

A weight of Conv, Gemm, MatMul and their kin is, whatever its shape on disk, a stack of
matrices [groups, outputs, inputs]: entry [g, o, i] multiplies input i of group g in the
sum that is output o. ``Layout`` turns the array into that and back, ``find`` lists the
layers of a model, and ``Layer.statistics`` says which activations a pass must watch to
know the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.base import selected
from onnxshrink.model import Model, Node, Weight, attribute

__all__ = ["FLOATS", "Layer", "Layout", "Use", "find", "is_float"]

FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
)
"""Element types of weights that passes change."""

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
NORMALISATIONS = frozenset(
    {
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
    }
)
_THROUGH = frozenset(
    {"Cast", "DequantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators a weight may pass through on its way to a layer."""
_DEFAULT_DOMAINS = (None, "", "ai.onnx")

Role = Literal["weight", "table", "bias"]


@dataclass(frozen=True)
class Layout:
    """How an array is read as matrices [groups, outputs, inputs], and back.

    Attributes:
        shape: Shape of the array.
        split: Three factors the array is reshaped to.
        order: The order of these factors as (groups, outputs, inputs).
    """

    shape: tuple[int, ...]
    split: tuple[int, int, int]
    order: tuple[int, int, int] = (0, 1, 2)

    @property
    def matrices_shape(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs)."""
        groups, outputs, inputs = (self.split[axis] for axis in self.order)
        return groups, outputs, inputs

    def matrices(self, array: NDArray[Any]) -> NDArray[Any]:
        """View an array of ``shape`` as [groups, outputs, inputs]."""
        return array.reshape(self.split).transpose(self.order)

    def array(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """Return the array of ``shape`` that has these matrices."""
        back = np.argsort(self.order)
        return np.ascontiguousarray(matrices.transpose(back)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Use:
    """One reading of a weight by a node.

    Attributes:
        node: The node.
        index: Which of its inputs the weight is.
        role: ``weight``: it multiplies activations; ``table``: rows are looked up;
            ``bias``: it is added, or scales a normalised value.
        layout: How this node reads it.
    """

    node: Node
    index: int
    role: Role
    layout: Layout


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that linear operators read, or the reason why it is out of reach.

    Attributes:
        weight: The weight.
        uses: Every reading of it, if all are by known operators.
        why_not: Why no pass should change it; empty if one may.
    """

    weight: Weight
    uses: tuple[Use, ...]
    why_not: str = ""

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.weight.name

    @property
    def layout(self) -> Layout:
        """How the first use reads it."""
        return self.uses[0].layout

    @property
    def kind(self) -> str:
        """Operator type of the first use."""
        return str(self.uses[0].node.op)

    @property
    def names(self) -> tuple[str, ...]:
        """All that ``only`` and ``skip`` may call it: weight, nodes, op types."""
        nodes = [use.node for use in self.uses]
        return (self.name, *(n.name for n in nodes), *(n.op for n in nodes))


def is_float(weight: Weight) -> bool:
    """Whether the weight's values are float32, float64, float16 or bfloat16."""
    return weight.data_type in FLOATS


def find(
    model: Model,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    roles: Sequence[Role] = ("weight",),
) -> Iterator[Layer]:
    """Yield the layers of a model, each weight once, in file order.

    Weights of subgraphs and functions are among them. A weight that belongs to a layer
    but must not be changed is yielded with ``why_not``; one that no layer reads, or
    that ``only`` and ``skip`` leave out, is not yielded at all.

    Args:
        model: The model.
        only: Names or glob patterns of weights or nodes, or op types.
        skip: The same; wins over ``only``.
        roles: Which readings make a weight a layer.
    """
    called = _calls(model)
    for weight in model.weights():
        if len(weight.shape) == 0 or weight.size == 0:
            continue
        uses, others, behind = _readings(weight)
        wanted = [use for use in uses if use.role in roles]
        if not wanted and not (behind and "weight" in roles):
            continue
        nodes = [use.node for use in wanted] + [node for _, node in behind]
        names = [weight.name]
        names += [n for node in nodes for n in (node.name, node.op)]
        if not selected(names, only, skip):
            continue
        wanted += [use for use in uses if use.role not in roles]
        yield Layer(
            weight,
            tuple(wanted),
            _why_not(weight, wanted, roles, others, behind, called),
        )


def _calls(model: Model) -> Mapping[int, str]:
    """Name by identity the functions' graphs that are called more than once."""
    counts: dict[tuple[str, str], int] = {}
    for node in model.nodes():
        key = (node.domain or "", node.op)
        counts[key] = counts.get(key, 0) + 1
    return {
        id(function): function.name
        for function in model.graph.functions
        if counts.get((function.domain or "", function.name), 0) > 1
    }


def _readings(
    weight: Weight,
) -> tuple[list[Use], list[Node], list[tuple[str, Node]]]:
    """Sort what reads a weight: layers, other nodes, layers behind another node."""
    uses: list[Use] = []
    others: list[Node] = []
    behind: list[tuple[str, Node]] = []
    for node, index in weight.uses:
        use = _use(node, index, weight.shape)
        if use is not None:
            uses.append(use)
            continue
        others.append(node)
        behind += [(node.op, reader) for reader in _layers_behind(node)]
    return uses, others, behind


def _layers_behind(node: Node, depth: int = 4) -> Iterator[Node]:
    """Yield the layers whose weight is what this node makes of its input."""
    if node.op not in _THROUGH or node.domain not in _DEFAULT_DOMAINS or not depth:
        return
    for reader in dict.fromkeys(node.outputs[0].outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is not node.outputs[0]:
                continue
            if reader.op in {"Conv", "ConvTranspose", "Gemm", *RECURRENT}:
                if index == 1:
                    yield reader
            elif reader.op == "MatMul":
                yield reader
            elif index == 0:
                yield from _layers_behind(reader, depth - 1)


def _why_not(
    weight: Weight,
    uses: Sequence[Use],
    roles: Sequence[Role],
    others: Sequence[Node],
    behind: Sequence[tuple[str, Node]],
    called: Mapping[int, str],
) -> str:
    if behind:
        op, reader = behind[0]
        label = reader.name or reader.op
        if op == "DequantizeLinear":
            return f"it is quantized for {label}; change weights before quantizing them"
        return f"it reaches {label} through {op}; run fold first"
    if weight.data_type not in FLOATS:
        kind = onnx.TensorProto.DataType.Name(weight.data_type).lower()
        return f"its values are {kind}, not floating point"
    if weight.is_input:
        return (
            "it is also a graph input, so a caller may override it; run fold first "
            "to make it a plain initializer"
        )
    if weight.is_output:
        return "it is also an output of its graph"
    if others:
        other = others[0]
        return f"it is shared with {other.name or 'a node'} ({other.op})"
    stray = [use for use in uses if use.role not in roles]
    if stray:
        return (
            f"it is shared with {stray[0].node.name or 'a node'} "
            f"({stray[0].node.op}), where it is a {stray[0].role}"
        )
    return ""


def _use(node: Node, index: int, shape: tuple[int, ...]) -> Use | None:
    """Describe how a node reads a weight, or ``None`` if it is no layer."""
    if node.domain not in _DEFAULT_DOMAINS:
        return None
    layout = _weight_layout(node, index, shape)
    if layout is not None:
        return Use(node, index, "weight", layout)
    if node.op == "Gather" and index == 0 and len(shape) > 1:
        rows = math.prod(shape[:-1])
        return Use(node, index, "table", Layout(shape, (1, rows, shape[-1])))
    if _is_bias(node, index):
        return Use(node, index, "bias", Layout(shape, (1, 1, math.prod(shape))))
    return None


def _is_bias(node: Node, index: int) -> bool:
    if node.op in {"Conv", "ConvTranspose", "Gemm"}:
        return index == 2
    if node.op in RECURRENT:
        return index == 3
    if node.op in NORMALISATIONS:
        return index in (1, 2)
    if node.op == "Add" and len(node.inputs) == 2:
        makers = node.inputs[1 - index].inputs
        return bool(makers) and makers[0].op in {"MatMul", "Conv", "Gemm"}
    return False


def _weight_layout(node: Node, index: int, shape: tuple[int, ...]) -> Layout | None:
    rank = len(shape)
    if node.op == "Conv" and index == 1 and rank >= 3:
        group = int(attribute(node, "group", 1))
        if group < 1 or shape[0] % group:
            return None
        return Layout(shape, (group, shape[0] // group, math.prod(shape[1:])))
    if node.op == "ConvTranspose" and index == 1 and rank >= 3:
        group = int(attribute(node, "group", 1))
        if group < 1 or shape[0] % group:
            return None
        split = (group, shape[0] // group, math.prod(shape[1:]))
        return Layout(shape, split, (0, 2, 1))
    if node.op == "Gemm" and index in (0, 1) and rank == 2:
        transposed = bool(attribute(node, "transB" if index else "transA", 0))
        # [outputs, inputs] is B transposed, or A as it is.
        straight = transposed == bool(index)
        return Layout(shape, (1, *shape), (0, 1, 2) if straight else (0, 2, 1))
    if node.op == "MatMul" and index in (0, 1):
        if rank == 1:
            return Layout(shape, (1, 1, shape[0]))
        split = (math.prod(shape[:-2]), shape[-2], shape[-1])
        return Layout(shape, split, (0, 2, 1) if index else (0, 1, 2))
    if node.op in RECURRENT and index in (1, 2) and rank == 3:
        return Layout(shape, (shape[0], shape[1], shape[2]))
    return None
