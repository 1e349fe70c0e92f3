"""Weights that a linear operator multiplies: where they stand and what they mean.

A weight of Conv, Gemm, MatMul and their kin is, whatever its shape on disk, a stack of
matrices [groups, outputs, inputs]: entry [g, o, i] multiplies input i of group g in the
sum that is output o. ``Layout`` turns the array into that and back.

``find`` lists the weights of a model, each with every node that reads it:

======================== ==========================================================
``LinearWeight``         name, values, ``codes`` if it is quantized, whether it may be
                         changed, ``bias`` of its only node
its ``uses``, one a node operator, axes of the weight, alpha, what the node reads and
                         gives, and along which axes their channels lie
======================== ==========================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx, returned_by
from onnxshrink.statistics import (
    ChannelNorm,
    ConvGram,
    ConvNorm,
    ConvWindow,
    Gram,
    Statistic,
)
from onnxshrink.structure.bias import Bias, bias_at
from onnxshrink.structure.codes import CODES, FLOATS, Decoder, decoder_of, is_float
from onnxshrink.structure.selection import selected

__all__ = [
    "FLOATS",
    "FOLD_HELPS",
    "Layout",
    "LinearWeight",
    "Use",
    "find",
    "free_bias",
    "is_float",
    "layer_at",
    "use_of",
]

Array = NDArray[np.float64]

ROWS = 32
"""Rows of inputs, for each of them, that a convolution's Gram matrix is made of."""
POSITIONS = 16
"""Output positions of a sample that are used at least."""

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
    {
        "Cast",
        "Concat",
        "DequantizeLinear",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators a weight may pass through on its way to a layer."""
_FARTHEST = 8
"""Such operators in a row."""
_FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}
"""Products of com.microsoft that onnxruntime's optimizer writes, and what they are."""
_DECODING = 8
"""Nodes between codes and the layer that multiplies what they stand for, at most."""

FOLD_HELPS = "; run fold first"
"""How a reason ends that folding takes away."""

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
        turned: The Transpose through which it reads the weight, if ``find`` was asked
            to look behind such; ``layout`` is still of the weight as it is stored.
    """

    node: Node
    index: int
    role: Role
    layout: Layout
    turned: Node | None = None

    @property
    def kind(self) -> str:
        """Operator type of the node."""
        return str(self.node.op)

    @property
    def product(self) -> str:
        """The same in operators of ONNX: Conv of a FusedConv."""
        return _product_of(self.node)

    # --- the weight ---------------------------------------------------------------

    @property
    def output_axis(self) -> int | None:
        """Axis of the weight that counts outputs, of all groups for a Conv.

        ``None`` for a vector, which has one output, and for a bias.
        """
        rank = len(self.layout.shape)
        if self.product in ("Conv", "ConvTranspose") and self.role == "weight":
            return 0 if self.product == "Conv" else 1
        if self.role == "bias" or rank < 2:
            return None
        return rank - 1 if self.is_transposed else rank - 2

    @property
    def input_axis(self) -> int:
        """Axis of the weight that counts inputs, of one group for a Conv.

        A kernel's axes follow those of outputs and inputs. Of a bias: the last axis.
        """
        rank = len(self.layout.shape)
        if self.product in ("Conv", "ConvTranspose") and self.role == "weight":
            return 1 if self.product == "Conv" else 0
        if self.role == "bias" or rank < 2:
            return rank - 1
        return rank - 2 if self.is_transposed else rank - 1

    @property
    def is_transposed(self) -> bool:
        """Whether the weight holds inputs before outputs, as that of a MatMul does."""
        return self.layout.order != (0, 1, 2)

    @property
    def groups(self) -> int:
        """Groups of a convolution, matrices of a stack; 1 for a single matrix."""
        return self.layout.matrices_shape[0]

    @property
    def channels(self) -> int:
        """Channels of what the node gives."""
        if self.product == "ConvTranspose" and self.role == "weight":
            return self.layout.shape[1] * self.groups
        if self.product == "Conv" and self.role == "weight":
            return self.layout.shape[0]
        axis = self.output_axis
        return 1 if axis is None else self.layout.shape[axis]

    @property
    def input_size(self) -> int:
        """Channels of what the node multiplies."""
        if self.product == "Conv" and self.role == "weight":
            return self.layout.shape[1] * self.groups
        if self.product == "ConvTranspose" and self.role == "weight":
            return self.layout.shape[0]
        return self.layout.matrices_shape[2]

    def over_outputs(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a value for each output channel so that it goes with the matrices.

        Args:
            values: [channels].

        Returns:
            [groups or 1, outputs, 1].
        """
        groups, outputs, _ = self.layout.matrices_shape
        if self.product == "ConvTranspose":  # each tap of the kernel is an output
            values = np.repeat(values, groups * outputs // max(1, self.channels))
        return values.reshape(-1, outputs, 1)

    def over_inputs(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return a value for each input channel so that it goes with the matrices.

        Args:
            values: [input_size].

        Returns:
            [groups or 1, 1, inputs].
        """
        groups, _, inputs = self.layout.matrices_shape
        if self.product == "Conv":  # each tap of the kernel is an input
            values = np.repeat(values, groups * inputs // max(1, self.input_size))
        return values.reshape(-1, 1, inputs)

    def bias(self, model: Model) -> Bias | None:
        """Return what is added to what the node gives, if anything is."""
        axis = self.output_channels
        if axis > 0:
            axis -= len(self.layout.shape)
        return bias_at(model, self.node, self.channels, axis)

    @property
    def alpha(self) -> float:
        """What the node multiplies the product with: alpha of Gemm, FusedMatMul."""
        has = self.product == "Gemm" or self.kind in _FUSED
        return float(attribute(self.node, "alpha", 1.0)) if has else 1.0

    # --- the activations ----------------------------------------------------------

    @property
    def input(self) -> gs.Tensor | None:
        """What the weight is multiplied with; ``None`` of a table or a bias.

        Of the recurrent weight of an LSTM, GRU or RNN: its states, all but the first
        and the last of which it is multiplied with; ``None`` if the node does not give
        them, or has two directions.
        """
        found = _multiplied(self)
        return None if found is None else found[0]

    @property
    def input_channels(self) -> int:
        """Axis of ``input`` along which its channels lie; -1 if there is no input."""
        found = _multiplied(self)
        return -1 if found is None else found[1]

    @property
    def output(self) -> gs.Tensor:
        """What the node gives: a bias behind it not counted, what is fused applied."""
        return self.node.outputs[0]

    @property
    def output_channels(self) -> int:
        """Axis of ``output`` along which its channels lie."""
        if self.product in ("Conv", "ConvTranspose"):
            return 1
        return -2 if self.product in ("Gemm", "MatMul") and self.index == 0 else -1


@dataclass(frozen=True, eq=False)
class LinearWeight:
    """A weight that linear operators read, or the reason why it is out of reach.

    Attributes:
        weight: The weight.
        uses: Every reading of it, if all are by known operators.
        why_not: Why no pass should change it; empty if one may.
        codes: What decodes it, if it is stored as integer codes and ``find`` was asked
            for such: then ``layout`` is that of the decoded values.
    """

    weight: Weight
    uses: tuple[Use, ...]
    why_not: str = ""
    codes: Decoder | None = None

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
        return self.uses[0].kind

    @property
    def node(self) -> Node:
        """The node of the first use."""
        return self.uses[0].node

    @property
    def is_shared(self) -> bool:
        """Whether it is read more than once."""
        return len(self.uses) > 1

    @property
    def output_axis(self) -> int | None:
        """Axis of the weight that counts outputs, for the first use."""
        return self.uses[0].output_axis

    @property
    def input_axis(self) -> int:
        """Axis of the weight that counts inputs, for the first use."""
        return self.uses[0].input_axis

    @property
    def groups(self) -> int:
        """Groups of a convolution, matrices of a stack; 1 for a single matrix."""
        return self.uses[0].groups

    @property
    def input(self) -> gs.Tensor | None:
        """What the first use multiplies it with."""
        return self.uses[0].input

    @property
    def output(self) -> gs.Tensor:
        """What the first use gives."""
        return self.uses[0].output

    @property
    def bias(self) -> Bias | None:
        """What is added to the outputs of its only use; ``None`` if it has several."""
        if self.is_shared or not self.uses or self.uses[0].role != "weight":
            return None
        return self.uses[0].bias(self.weight.model)

    def statistics_for(
        self, what: Literal["gram", "norm"], samples: int = 1
    ) -> tuple[tuple[gs.Tensor, Statistic], ...] | None:
        """Return the activations the weight multiplies, each with an empty statistic.

        Args:
            what: ``gram`` for Gram matrices, ``norm`` for sums of squares alone.
            samples: How many there will be: of many, a convolution's Gram matrix takes
                only some positions each.

        Returns:
            ``None`` if a use has inputs that no statistic covers: a table, a bias, a
            stack of matrices, a recurrent layer that does not give its states.
        """
        if any(use.layout != self.layout for use in self.uses):
            return None
        found = []
        for use in self.uses:
            tensor = use.input
            is_stack = use.product == "MatMul" and use.groups > 1
            if tensor is None or is_stack:
                return None
            found.append((tensor, _statistic(use, what, samples)))
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        """All that ``only`` and ``skip`` may call it: weight, nodes, op types."""
        nodes = [use.node for use in self.uses]
        return (self.name, *(n.name for n in nodes), *(n.op for n in nodes))


def find(
    model: Model,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    roles: Sequence[Role] = ("weight",),
    codes: bool = False,
    fused: bool = False,
    turned: bool = False,
) -> Iterator[LinearWeight]:
    """Yield the layers of a model, each weight once, in file order.

    Weights of subgraphs and functions are among them. A weight that belongs to a layer
    but must not be changed is yielded with ``why_not``; one that no layer reads, or
    that ``only`` and ``skip`` leave out, is not yielded at all.

    Args:
        model: The model.
        only: Names or glob patterns of weights or nodes, or op types.
        skip: The same; wins over ``only``.
        roles: Which readings make a weight a layer.
        codes: Whether weights that are stored as codes are wanted with what decodes
            them. Otherwise they have no uses, and ``why_not`` says what they are.
        fused: Whether products of com.microsoft count, which onnxruntime's optimizer
            writes: FusedConv, FusedGemm and FusedMatMul. An activation may be part of
            them, so that what they give is not linear in the weight.
        turned: Whether matrices are wanted too that a Transpose turns for some of their
            readers: a table whose rows are looked up and that scores, in one copy. What
            reads the Transpose then has ``Use.turned``.
    """
    for weight in model.weights():
        found = _layer(model, weight, roles, codes, fused, turned)
        if found is None:
            continue
        layer, names = found
        if selected(names, only, skip):
            yield layer


def layer_at(model: Model, node: Node, *, codes: bool = False) -> LinearWeight | None:
    """Return the weight that a node multiplies, with all that reads it.

    Args:
        model: The model.
        node: A node of it.
        codes: As for ``find``.

    Returns:
        ``None`` if the node multiplies no constant, or is no linear operator.
    """
    for index in (1, 0):
        if index >= len(node.inputs):
            continue
        weight = _held(model, node.inputs[index], codes)
        found = None if weight is None else _layer(model, weight, ("weight",), codes)
        if found is not None:
            layer, _ = found
            uses = [use for use in layer.uses if (use.node, use.index) == (node, index)]
            if uses and uses[0].role == "weight":
                return layer
    return None


def _held(model: Model, tensor: gs.Tensor, codes: bool) -> Weight | None:
    """Return the constant that a tensor is, or the codes that it is decoded from."""
    for _ in range(_DECODING):
        known = model.constant(tensor)
        if known is not None or not codes or not tensor.inputs:
            return known
        tensor = tensor.inputs[0].inputs[0]
    return None


def _layer(
    model: Model,
    weight: Weight,
    roles: Sequence[Role],
    codes: bool,
    fused: bool = False,
    turned: bool = False,
) -> tuple[LinearWeight, list[str]] | None:
    """Return the layer of a weight and all its names; ``None`` if it is none."""
    if len(weight.shape) == 0 or weight.size == 0:
        return None
    decoder = _decoder(model, weight) if codes else None
    if decoder is not None:
        uses, others = _readings_of_codes(model, decoder)
        behind: list[tuple[str, Node]] = []
    else:
        uses, others, behind = _readings(weight, fused, turned)
    wanted = [use for use in uses if use.role in roles]
    if not wanted and not (behind and "weight" in roles):
        return None
    nodes = [use.node for use in wanted] + [node for _, node in behind]
    names = [weight.name]
    names += [n for node in nodes for n in (node.name, node.op)]
    wanted += [use for use in uses if use.role not in roles]
    why_not = _why_not(weight, wanted, roles, others, behind, decoder is not None)
    why_not = why_not or model.unreached.get(weight.name, "")
    return LinearWeight(weight, tuple(wanted), why_not, decoder), names


def _decoder(model: Model, weight: Weight) -> Decoder | None:
    if weight.data_type not in CODES or len(weight.shape) < 2:
        return None
    found = decoder_of(model, weight)
    return found if isinstance(found, Decoder) else None


def _readings(
    weight: Weight, fused: bool, turned: bool
) -> tuple[list[Use], list[Node], list[tuple[str, Node]]]:
    """Sort what reads a weight: layers, other nodes, layers behind another node."""
    uses: list[Use] = []
    others: list[Node] = []
    behind: list[tuple[str, Node]] = []
    for node, index in weight.uses:
        use = use_of(node, index, weight.shape, fused)
        if use is not None:
            uses.append(use)
            continue
        found = _turned(weight, node, fused) if turned else None
        if found:
            uses += found
            continue
        others.append(node)
        # A shape, a scale or a zero point is no weight.
        if index == 0 or node.op == "Concat":
            behind += [
                (node.op, reader) for reader in _layers_behind(weight.model, node)
            ]
    return uses, others, behind


def _turned(weight: Weight, node: Node, fused: bool) -> list[Use] | None:
    """Return what reads a matrix through a Transpose; ``None`` if something else does.

    The layout of a use is that of the matrix in front of the Transpose.
    """
    shape = weight.shape
    if node.op != "Transpose" or not is_onnx(node.domain) or len(shape) != 2:
        return None
    value = node.outputs[0]
    if attribute(node, "perm", None) not in (None, [1, 0], (1, 0)):
        return None
    if returned_by(value):
        return None
    uses: list[Use] = []
    for reader in dict.fromkeys(value.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is not value:
                continue
            use = use_of(reader, index, shape[::-1], fused)
            if use is None:
                return None
            groups, *split = use.layout.split
            order = (0, 2, 1) if use.layout.order == (0, 1, 2) else (0, 1, 2)
            layout = Layout(shape, (groups, split[1], split[0]), order)
            uses.append(replace(use, layout=layout, turned=node))
    return uses or None


def _readings_of_codes(model: Model, decoder: Decoder) -> tuple[list[Use], list[Node]]:
    """Sort what reads decoded values: layers and lookups, and other nodes.

    A Reshape between is looked through: what is decoded in blocks has one.
    """
    uses: list[Use] = []
    others: list[Node] = []

    def visit(tensor: gs.Tensor, shape: tuple[int, ...]) -> None:
        for node in dict.fromkeys(tensor.outputs):
            if node.op == "Reshape" and node.inputs[0] is tensor:
                known = model.constant(node.inputs[1])
                wanted = None if known is None else known.read().reshape(-1).tolist()
                made = None if wanted is None else _reshaped(shape, wanted)
                if made is not None:
                    visit(node.outputs[0], made)
                    continue
            for index, read in enumerate(node.inputs):
                if read is tensor:
                    use = use_of(node, index, shape)
                    if use is None:
                        others.append(node)
                    else:
                        uses.append(use)

    for end, rows in decoder.ends:
        if rows is None:
            visit(end, decoder.shape)
            continue
        lookup = next(n for n in decoder.nodes if n.op == "Gather")
        use = use_of(lookup, 0, decoder.shape)
        if use is None:
            others.append(lookup)
        else:
            uses.append(use)
    return uses, others


def _reshaped(shape: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape that Reshape gives, or ``None`` if it does not fit."""
    sizes = [
        shape[at] if size == 0 and at < len(shape) else size
        for at, size in enumerate(wanted)
    ]
    rest = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and rest:
        sizes[sizes.index(-1)] = math.prod(shape) // rest
    return tuple(sizes) if math.prod(sizes) == math.prod(shape) else None


def _layers_behind(model: Model, node: Node, depth: int = _FARTHEST) -> Iterator[Node]:
    """Yield the layers whose weight is what this node makes of its input."""
    if node.op not in _THROUGH or not is_onnx(node.domain) or not depth:
        return
    if not all(_is_fixed(model, tensor, depth) for tensor in node.inputs):
        return
    for made in node.outputs:
        for reader in dict.fromkeys(made.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is not made:
                    continue
                if reader.op in {"Conv", "ConvTranspose", "Gemm"}:
                    if index == 1:
                        yield reader
                elif reader.op in RECURRENT:
                    if index in (1, 2):
                        yield reader
                elif reader.op == "MatMul":
                    yield reader
                elif index == 0 or reader.op == "Concat":
                    yield from _layers_behind(model, reader, depth - 1)


def _is_fixed(model: Model, tensor: gs.Tensor, depth: int) -> bool:
    """Whether a value is made of constants alone, by operators that move them."""
    if isinstance(tensor, gs.Constant) or not tensor.name:
        return True
    if model.constant(tensor) is not None:
        return True
    if not tensor.inputs or not depth:
        return False
    maker = tensor.inputs[0]
    return (
        maker.op in _THROUGH
        and is_onnx(maker.domain)
        and all(_is_fixed(model, read, depth - 1) for read in maker.inputs)
    )


def _why_not(
    weight: Weight,
    uses: Sequence[Use],
    roles: Sequence[Role],
    others: Sequence[Node],
    behind: Sequence[tuple[str, Node]],
    is_decoded: bool,
) -> str:
    if behind:
        op, reader = behind[0]
        label = reader.name or reader.op
        if op == "DequantizeLinear":
            return f"it is quantized for {label}; change weights before quantizing them"
        if uses and op == "Transpose":
            other = uses[0].node.name or uses[0].node.op
            return (
                f"{label} reads it through Transpose and {other} as it is; only "
                "quantize changes one copy for both"
            )
        return f"it reaches {label} through {op}{FOLD_HELPS}"
    if weight.data_type not in FLOATS and not is_decoded:
        kind = onnx.TensorProto.DataType.Name(weight.data_type).lower()
        return f"its values are {kind}, not floating point"
    if weight.is_input and weight.model.ir_version < 4:
        return f"it is listed as a graph input too{FOLD_HELPS}"
    if weight.is_input:
        return (
            "it is also a graph input, so a caller may override it; "
            "fold:keep_defaults=false makes it a plain initializer"
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


def use_of(
    node: Node, index: int, shape: tuple[int, ...], fused: bool = False
) -> Use | None:
    """Describe how a node reads a constant, or ``None`` if it is no layer.

    Args:
        node: The node.
        index: Which of its inputs the constant is.
        shape: Shape of the constant.
        fused: As for ``find``.
    """
    if not _product_of(node) or (node.op in _FUSED and not fused):
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


def _product_of(node: Node) -> str:
    """Return the operator of ONNX that a node is, or that it is made of; or nothing."""
    if is_onnx(node.domain):
        return str(node.op)
    return _FUSED.get(node.op, "") if node.domain == "com.microsoft" else ""


def _multiplied(use: Use) -> tuple[gs.Tensor, int] | None:
    """Return what a use multiplies the weight with, and the axis of its channels."""
    node, index = use.node, use.index
    if use.role != "weight":
        return None
    if use.product in {"Conv", "ConvTranspose"}:
        return node.inputs[0], 1
    if use.product in {"Gemm", "MatMul"}:
        if len(use.layout.shape) == 1:
            return node.inputs[1 - index], -1
        transposed = _is_transposed(node, 1 - index)
        return node.inputs[1 - index], -1 if transposed != bool(index) else -2
    if index == 1:
        return node.inputs[0], -1
    if use.groups == 1 and node.outputs and node.outputs[0].name:
        # Every state but the first and the last is an input of the next step.
        return node.outputs[0], -1
    return None


def _is_transposed(node: Node, index: int) -> bool:
    """Whether Gemm or FusedMatMul transposes an input; MatMul has no such attribute."""
    if node.op == "MatMul":
        return False
    return bool(attribute(node, "transB" if index else "transA", 0))


def _statistic(use: Use, what: Literal["gram", "norm"], samples: int) -> Statistic:
    # ConvTranspose: what one input pixel gives each output pixel is an output of its
    # own; that outputs of neighbours overlap is left out of account.
    if use.product == "Conv":
        window = ConvWindow.of(use.node.attrs, use.layout.shape)
        if what == "gram":
            needed = -(-ROWS * use.layout.matrices_shape[2] // max(samples, 1))
            return ConvGram(window, positions=max(POSITIONS, needed))
        return ConvNorm(window)
    axis = use.input_channels
    return Gram(axis) if what == "gram" else ChannelNorm(axis)


def free_bias(layer: LinearWeight) -> Bias | None:
    """Return the bias that can take up a change of the layer's outputs.

    That is a float constant, added as it is to what the layer's only node gives, with
    one value for each output, [groups * outputs], that nothing else reads.
    """
    bias = layer.bias
    if bias is None or bias.why_not or bias.scale is not None:
        return None
    groups, outputs, _ = layer.layout.matrices_shape
    is_plain = layer.uses[0].alpha == bias.factor == 1.0
    return bias if is_plain and bias.channels == groups * outputs else None


def _is_bias(node: Node, index: int) -> bool:
    if _product_of(node) in {"Conv", "ConvTranspose", "Gemm"}:
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
    rank, product = len(shape), _product_of(node)
    if product in ("Conv", "ConvTranspose") and index == 1 and rank >= 3:
        group = int(attribute(node, "group", 1))
        if group < 1 or shape[0] % group:
            return None
        split = (group, shape[0] // group, math.prod(shape[1:]))
        return Layout(shape, split, (0, 1, 2) if product == "Conv" else (0, 2, 1))
    if product in ("Gemm", "MatMul") and index in (0, 1):
        if rank == 1 and product == "MatMul":
            return Layout(shape, (1, 1, shape[0]))
        if rank < 2 or (product == "Gemm" and rank > 2):
            return None
        if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
            return None
        # [outputs, inputs] is the right factor transposed, or the left as it is.
        straight = _is_transposed(node, index) == bool(index)
        stacked = (math.prod(shape[:-2]), shape[-2], shape[-1])
        return Layout(shape, stacked, (0, 1, 2) if straight else (0, 2, 1))
    if node.op in RECURRENT and index in (1, 2) and rank == 3:
        return Layout(shape, (shape[0], shape[1], shape[2]))
    return None
