"""Weights as codes with activations left in float, in the form each reader is fast in.

``rewrite`` puts the codes of a layer into the graph:

======== =========================================================================
form     what the readers see
======== =========================================================================
rows     Gather takes rows of codes, and only these rows are decoded
folded   Cast, Mul (and Reshape): constant, so onnxruntime decodes once at load, and
         computes in float as before: same speed, same kernels, same fusions
packed   DequantizeLinear in front of MatMul, which onnxruntime 1.31 fuses into
         MatMulNBits (checked for 2, 4 and 8 bits, with and without zero points,
         per channel and in blocks along the inputs): memory stays low-bit, few rows
         are fast, and activations are rounded to int8 inside (accuracy level 4,
         relative error about 0.006)
======== =========================================================================

A table that is also the head of a language model has one copy of codes: rows are
gathered from it, and what multiplies reads it through Transpose, which onnxruntime
folds when it loads the model, decoded (``folded``) or as codes (``packed``).

Codes of fewer than eight bits are int8 values, of which the storage layer writes a
few distinct ones with a few bits each and any opset reads; only ``packed`` needs the
types INT4 (opset 21) and INT2 (opset 25).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, attribute
from onnxshrink.quantization.schemes import MIN_OPSET, limits
from onnxshrink.solvers.rounding import (
    Factors,
    Fit,
    Grid,
    descend,
    fit,
    gptq,
    nearest,
)
from onnxshrink.structure.bias import addend, addend_factor
from onnxshrink.structure.layers import FLOATS, Layout, LinearWeight, Use
from onnxshrink.tensors import numpy_type

__all__ = [
    "LEVELS",
    "Form",
    "Levels",
    "SharedCodes",
    "block_of",
    "chosen_form",
    "half_scales",
    "home",
    "is_tied",
    "levels_of",
    "looks_up_rows",
    "multiplied",
    "opset_for",
    "packing_pays",
    "quantized",
    "rewrite",
    "why_not",
    "why_not_packed",
    "within_reach",
]

Array = NDArray[Any]
Form = Literal["auto", "folded", "decoded", "packed"]

PACKED_FROM = 1 << 22
"""Entries of a matrix from which MatMulNBits is no slower for up to 100 rows."""
FEW_ROWS = 2
"""Rows up to which MatMulNBits is faster than floats from ``FEW_FROM`` entries on: one
thread, AVX2, 4 bits and 8, K of 576, N of 576 .56 and .63 for one row, .84 and .97 for
two, 1.16 and 1.38 for four; N of 16384 .27 and .48, .27 and .46, .51 and .67."""
FEW_FROM = 1 << 18
SMALL_TABLE = 1 << 18
"""Entries of a table up to which memory is not worth seven nodes at run time."""
MIN_BLOCK = 16
"""Shortest block of MatMulNBits."""
MAX_BLOCK = 256
_SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-126}
"""Smallest normal numbers of the halves."""
_FEW_CODES = 16
"""Codes of a four-bit type."""
_PRUNED = 0.5
_DESCENDED = 4
"""Numbers of codes up to which coordinate descent after GPTQ is worth its time: of 16
it took as long as all else for a hundredth of the error."""


@dataclass(frozen=True)
class Levels:
    """The codes a kind of weight uses.

    Attributes:
        low: Smallest code.
        high: Largest code.
        step: Distance between two.
        symmetric: Whether the zero point is 0.
    """

    low: int
    high: int
    step: int = 1
    symmetric: bool = True


LEVELS = {
    "int8": Levels(-127, 127),
    "uint8": Levels(0, 255, symmetric=False),
    "int4": Levels(-8, 7, symmetric=False),
    "int2": Levels(-2, 1, symmetric=False),
    "ternary": Levels(-1, 1),
    "binary": Levels(-1, 1, step=2),
}
"""What the names of weight types stand for. With few codes, a zero point for each row
or block is worth its bits: MiniLM's embeddings in blocks of 32, rounded to 4 bits, have
cosine .9984 with and .9966 without."""


def levels_of(weights: str, zero_points: bool | None = None) -> Levels:
    """Return the codes of a weight type.

    Args:
        weights: Key of ``LEVELS``.
        zero_points: Whether rows or blocks have zero points of their own; ``None``:
            as ``LEVELS`` says.

    Raises:
        UsageError: Zero points are asked for where codes are -1, (0) and 1.
    """
    levels = LEVELS[weights]
    if zero_points is None or zero_points is not levels.symmetric:
        return levels
    if weights in ("ternary", "binary"):
        raise UsageError(f"{weights} codes have no zero points; weights=int2 has")
    if not zero_points and levels.low == 0:
        return replace(levels, symmetric=True)
    low = -levels.high - 1 if zero_points else levels.low
    return replace(levels, low=low, symmetric=not zero_points)


# --- choosing codes -------------------------------------------------------------------


def block_of(inputs: int, wanted: int) -> int:
    """Return the length of blocks that cut a row into equal ones.

    Args:
        inputs: Length of a row.
        wanted: Length asked for; 0: no blocks.

    Returns:
        ``wanted`` if it divides the row, else the divisor nearest to it, of 16 to 256
        and at most twice as long; 0, the whole row, if there is none.
    """
    if wanted <= 0 or wanted >= inputs:
        return 0
    top = min(2 * wanted, MAX_BLOCK, inputs - 1)
    divisors = [n for n in range(MIN_BLOCK, top + 1) if inputs % n == 0]
    return min(divisors, key=lambda n: (abs(math.log(n / wanted)), n), default=0)


def half_scales(grid: Grid) -> Grid:
    """Return the grid with scales that float16 holds exactly, which halves them.

    A scale that float16 holds with less than its full precision leaves all as it was.
    """
    half = grid.scale.astype(np.float16)
    normal = half >= np.finfo(np.float16).tiny
    if not (normal & np.isfinite(half)).all():
        return grid
    return replace(grid, scale=half.astype(np.float32))


def quantized(
    weight: Array,
    levels: Levels,
    *,
    block: int = 0,
    method: Fit = "mse",
    gram: NDArray[np.float64] | None = None,
    shared: bool = False,
    factors: Factors | None = None,
    squares: NDArray[np.float64] | None = None,
) -> tuple[Grid, NDArray[np.int32]]:
    """Choose a grid with scales that are cheap to keep, and the codes of a matrix.

    With ``gram`` the codes are GPTQ's, for four codes or fewer improved by coordinate
    descent; without they are the nearest.

    Args:
        weight: Float [rows, inputs].
        levels: The codes.
        block: Columns that share a scale; 0: a row.
        method: How ``rounding.fit`` chooses scales.
        gram: [inputs, inputs] or [stacks, inputs, inputs] of the layer's inputs.
        shared: All rows have one scale; ``block`` and ``learned`` mean nothing then.
        factors: Of ``gram``, if they are known.
        squares: Without ``gram``: [inputs], how large inputs are, which scales go by.
    """
    weighed = gram
    if gram is None and squares is not None and method == "mse":
        weighed = np.diag(squares)
    grid = fit(
        weight.reshape(1, -1) if shared else weight,
        levels.low,
        levels.high,
        symmetric=levels.symmetric or _is_pruned(weight, levels),
        block=0 if shared else block,
        step=levels.step,
        method="mse" if shared and method == "learned" else method,
        gram=None if shared else weighed,
    )
    if shared:
        rows = np.zeros((len(weight), 1), np.intp)
        grid = replace(grid, scale=grid.scale[rows, 0], zero=grid.zero[rows, 0])
    if grid.scale.shape[1] > 1 or levels.high - levels.low < _FEW_CODES:
        grid = half_scales(grid)
    if gram is None:
        return grid, nearest(weight, grid)
    codes = gptq(weight, gram, grid, factors=factors)
    if levels.high - levels.low < _DESCENDED:
        codes = descend(weight, gram, grid, codes)
    return grid, codes


def _is_pruned(weight: Array, levels: Levels) -> bool:
    """Whether zeros are so many that code 0 should stand for them.

    Zeros of all rows then have one code, which is stored in few bits; with a zero point
    for each row they would have a different code in each.
    """
    return levels.low < 0 < levels.high and bool((weight == 0).mean() >= _PRUNED)


# --- what form ------------------------------------------------------------------------


def why_not(layer: LinearWeight) -> str:
    """Return why codes cannot take the place of a layer's weight, or nothing."""
    if layer.why_not and not _only_known(layer):
        return layer.why_not
    if layer.weight.data_type not in FLOATS:
        kind = onnx.TensorProto.DataType.Name(layer.weight.data_type).lower()
        return f"its values are {kind}, and codes decode to floating point"
    if any(_rows(use.layout) != _rows(layer.layout) for use in layer.uses):
        return "its readers have its rows along different axes"
    return ""


def is_tied(layer: LinearWeight) -> bool:
    """Whether rows of a matrix are looked up, and products read it too."""
    roles = {use.role for use in layer.uses}
    return roles == {"weight", "table"} and len(layer.layout.shape) == 2


def multiplied(layer: LinearWeight) -> LinearWeight:
    """Return a layer without the lookups of its rows."""
    uses = tuple(use for use in layer.uses if use.role == "weight")
    return replace(layer, uses=uses)


def _only_known(layer: LinearWeight) -> bool:
    """Whether only layers and lookups read the weight."""
    weight = layer.weight
    if (
        weight.is_input
        or weight.is_output
        or weight.data_type not in FLOATS
        or weight.name in weight.model.unreached
    ):
        return False
    known = {(id(use.turned or use.node), use.index) for use in layer.uses}
    known |= {(id(use.turned), 0) for use in layer.uses if use.turned is not None}
    roles = {use.role for use in layer.uses}
    return roles <= {"weight", "table"} and known >= {
        (id(node), index) for node, index in weight.uses
    }


def _rows(layout: Layout) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What two readings of a weight must share for one set of codes to serve both."""
    return layout.matrices_shape[2], layout.split, layout.order


def why_not_packed(layer: LinearWeight, levels: Levels, block: int = 0) -> str:
    """Return why no MatMulNBits can run on the codes of a layer, or nothing."""
    if layer.layout.matrices_shape[0] != 1 or len(layer.layout.shape) != 2:
        return "it is not a matrix"
    if layer.weight.data_type != onnx.TensorProto.FLOAT:
        return "the kernel is that of float32"
    for use in layer.uses:
        if use.role != "weight" or use.node.op not in {"Gemm", "MatMul"}:
            return f"{use.node.op} has no kernel for packed codes"
        if use.index != 1:
            return "the kernel wants codes on the right"
        if use.node.op == "Gemm" and _plain_gemm(use) != "":
            return _plain_gemm(use)
        if _is_clipped(use.node):
            return "onnxruntime does not fuse codes whose product goes into a Relu"
    if block and (block < MIN_BLOCK or block & (block - 1)):
        return f"blocks of {block} are not a power of two from {MIN_BLOCK} on"
    if not _fits(levels):
        return f"codes from {levels.low} to {levels.high} fit no packed type"
    return ""


def _is_clipped(node: Node) -> bool:
    """Whether a product, with or without a bias, goes into Relu or Clip.

    onnxruntime 1.31 leaves DequantizeLinear as it is where such a Relu feeds another
    product of codes, and decodes the weight at every run.
    """
    readers = list(node.outputs[0].outputs)
    for reader in list(readers):
        if reader.op == "Add":
            readers += reader.outputs[0].outputs
    return any(reader.op in {"Clip", "Relu"} for reader in readers)


def _plain_gemm(use: Use) -> str:
    if use.input_channels != -1:
        return "Gemm transposes its activations"
    is_added = addend(use.node) is not None
    if use.alpha != 1.0 or (is_added and addend_factor(use.node) != 1.0):
        return "Gemm scales its product"
    return ""


def _fits(levels: Levels) -> int:
    """Return the smallest type DequantizeLinear takes for these codes, or 0."""
    types = onnx.TensorProto
    signed = levels.low < 0
    for data_type in (
        (types.INT2, types.INT4, types.INT8)
        if signed
        else (types.UINT2, types.UINT4, types.UINT8)
    ):
        low, high = limits(data_type)
        if low <= levels.low and levels.high <= high:
            return int(data_type)
    return 0


def chosen_form(
    model: Model,
    layer: LinearWeight,
    levels: Levels,
    block: int = 0,
    form: Form = "auto",
    rows: int | None = None,
) -> Literal["folded", "packed"]:
    """Return the form a layer's weight gets.

    ``auto`` packs codes of at most four bits of large matrices: there, reading weights
    is what takes time (4 bits, 2048 by 2048: 0.25 of float's time for one row, 0.8 for
    32, 1.0 for 128). Below ``PACKED_FROM`` entries, and for eight bits, MatMulNBits is
    up to 1.9 times slower than float for 32 rows or more (K, N of 384 and 1536, AVX2).
    Where a run has a row or two, as one token has, smaller ones are packed as well.

    Args:
        model: The model the layer is in.
        layer: The layer.
        levels: Its codes.
        block: Columns that share a scale; 0: a row.
        form: What is asked for.
        rows: Rows of a run, if they are known.

    Raises:
        UsageError: ``packed`` is asked for, but not to be had.
    """
    if form in ("folded", "decoded"):
        return "folded"
    reason = why_not_packed(layer, levels, block)
    if not reason and not all(within_reach(model, layer, use) for use in layer.uses):
        reason = "it is handed to a function"
    needed = 0 if reason else _opset(levels, block)
    if not reason and model.opset < needed:
        reason = f"the type of its codes needs opset {needed}, not {model.opset}"
    if form == "packed":
        if reason:
            raise UsageError(f"{layer.name} cannot stay packed: {reason}")
        return "packed"
    return "packed" if not reason and packing_pays(layer, levels, rows) else "folded"


def opset_for(layer: LinearWeight, levels: Levels, block: int = 0) -> int:
    """Return the opset that a packed layer needs; 0: it cannot be packed."""
    return 0 if why_not_packed(layer, levels, block) else _opset(levels, block)


def _opset(levels: Levels, block: int) -> int:
    return max(MIN_OPSET[_fits(levels)], 21 if block else 13)


def packing_pays(layer: LinearWeight, levels: Levels, rows: int | None = None) -> bool:
    """Whether products of codes are as fast as of floats, or faster.

    Args:
        layer: The layer.
        levels: Its codes.
        rows: Rows of a run, if they are known.
    """
    if rows is not None and rows <= FEW_ROWS and layer.weight.size >= FEW_FROM:
        return True
    few = levels.high - levels.low < _FEW_CODES
    return few and layer.weight.size >= PACKED_FROM


# --- writing --------------------------------------------------------------------------


def rewrite(
    model: Model,
    layer: LinearWeight,
    grid: Grid,
    codes: Array,
    *,
    form: Form = "auto",
    accuracy: int = 0,
) -> str:
    """Put codes in the place of a weight.

    Args:
        model: The model; ``drop_unused`` then removes what nothing reads any more.
        layer: The layer; of a table, found with the role ``table``.
        grid: Scales and zero points of the rows of ``layer.layout.matrices``, one
            below the other; blocks cut rows into equal parts.
        codes: Int [groups * outputs, inputs].
        form: ``folded`` decodes at load whatever reads the weight; ``decoded`` all but
            rows of large tables; ``packed`` keeps codes at run time, of tables as
            ``rows``; ``auto`` where that pays.
        accuracy: Level of MatMulNBits, which is then written as that operator of
            com.microsoft: 1 multiplies floats, 4 rounds activations to int8; 0: in
            standard ONNX, and onnxruntime takes 4 unless its session says otherwise.

    Returns:
        What was done, in words.

    Raises:
        UsageError: ``why_not`` gives a reason, the grid does not fit the layer, or
            ``packed`` is not to be had.
    """
    reason = why_not(layer)
    if reason:
        raise UsageError(f"{layer.name} cannot be coded: {reason}")
    groups, outputs, inputs = layer.layout.matrices_shape
    if codes.shape != (groups * outputs, inputs):
        raise UsageError(
            f"codes of {layer.name} have shape {list(codes.shape)}, its rows "
            f"{[groups * outputs, inputs]}"
        )
    if grid.scale.shape[1] > 1 and inputs % grid.block:
        raise UsageError(
            f"blocks of {grid.block} do not cut {inputs} inputs of {layer.name} into "
            f"equal parts; {block_of(inputs, grid.block) or 'none'} would"
        )
    tables = [
        use
        for use in layer.uses
        if looks_up_rows(use) and within_reach(model, layer, use)
    ]
    others = [use for use in layer.uses if use not in tables]
    block = grid.block if grid.scale.shape[1] > 1 else 0
    chosen = ""
    if others:
        rest = replace(layer, uses=tuple(others))
        chosen = chosen_form(model, rest, _levels(grid), block, form)
    if chosen == "packed" and not tables and not any(use.turned for use in others):
        if accuracy:
            _pack_blocks(model, layer, grid, codes, accuracy)
        else:
            _pack(model, layer, grid, codes)
        return f"{_described(grid)}, kept as codes for MatMulNBits"
    is_small = layer.weight.size <= SMALL_TABLE
    if chosen != "packed" and form != "packed" and (form == "folded" or is_small):
        tables, others = [], list(layer.uses)
    written = SharedCodes(model, layer, grid, codes)
    done = []
    for use in tables:
        written.rows(use)
    if tables:
        done.append("rows decoded after they are gathered")
    if chosen == "packed":
        written.packed(others)
        done.append("the same codes kept for MatMulNBits")
    elif others:
        written.folded()
        done.append("decoded at load")
    return f"{_described(grid)}, {' and '.join(done)}"


def _levels(grid: Grid) -> Levels:
    return Levels(grid.low, grid.high, grid.step, not grid.zero.any())


def _described(grid: Grid) -> str:
    values = (grid.high - grid.low) // grid.step + 1
    shared = f"blocks of {grid.block}" if grid.scale.shape[1] > 1 else "rows"
    if grid.scale.size > 1 and _is_constant(grid.scale):
        return f"{values} levels for the whole weight"
    return f"{values} levels for {shared}"


def looks_up_rows(use: Use) -> bool:
    """Whether a node takes whole rows of a matrix."""
    return (
        use.role == "table"
        and len(use.layout.shape) == 2
        and int(attribute(use.node, "axis", 0)) % 2 == 0
    )


class SharedCodes:
    """The codes of one weight, and the ways in which nodes read them.

    Each way reads the same copy. With one scale for a row they have the shape of the
    weight, and scales broadcast against it; otherwise the inputs are two axes, blocks
    and places in a block, and decoded values are reshaped.
    """

    def __init__(
        self, model: Model, layer: LinearWeight, grid: Grid, codes: Array
    ) -> None:
        self.model, self.layer = model, layer
        self.graph = layer.weight.graph
        self.name = layer.weight.value.name or "weight"
        layout, blocks = layer.layout, grid.scale.shape[1]
        self.data_type = layer.weight.data_type
        # Scales are numbers of the model's type. On processors onnxruntime multiplies
        # no halves, so that it decodes at every run what it could not fold.
        is_half = layer.weight.dtype.itemsize == 2
        self.decoded_type = onnx.TensorProto.FLOAT if is_half else self.data_type
        kind = numpy_type(self.decoded_type)
        exact = representable(grid.scale, layer.weight.dtype)
        grid = replace(grid, scale=exact.astype(kind))
        dtype = np.int8 if grid.low < 0 else np.uint8
        scales = _scale_shape(layout) if blocks == 1 else None
        self.is_shaped = scales is not None
        self.block = grid.block

        def add(what: str, rows: Array, shape: tuple[int, ...] | None) -> gs.Tensor:
            placed = _placed(layout, rows, blocks)
            array = placed if shape is None else placed.reshape(shape)
            return model.add_weight(f"{self.name}_{what}", array, self.graph)

        self.codes = add("codes", codes.astype(dtype), scales and layout.shape)
        one = grid.scale.size > 1 and _is_constant(grid.scale)
        self.is_shared = self.is_shaped and one and _is_constant(grid.zero)
        if self.is_shared:
            self.scale = self._single("scale", grid.scale)
        else:
            self.scale = add("scale", grid.scale, scales)
        self.zero: gs.Tensor | None = None
        if not grid.zero.any():
            return
        # Floats save a Cast at each lookup; storage writes few values as codes.
        zero = grid.zero.astype(kind)
        if self.is_shared:
            self.zero = self._single("zero", zero)
        else:
            self.zero = add("zero", zero, scales)

    def _single(self, what: str, rows: Array) -> gs.Tensor:
        """Add what all rows share."""
        value = np.array(rows.flat[0], rows.dtype)
        return self.model.add_weight(f"{self.name}_{what}", value, self.graph)

    def folded(self) -> None:
        """Let all readers have a constant expression that is the decoded weight."""
        value = self._decoded(self.codes, self.scale, self.zero, self.graph)
        if not self.is_shaped:
            value = self._reshaped(value, self.layer.layout.shape)
        self.model.replace_uses(self.layer.weight.value, value)

    def rows(self, use: Use) -> None:
        """Let a lookup gather codes, scales and zero points, and decode these."""
        node, graph = use.node, home(self.model, use.node)
        indices = node.inputs[1]

        def gathered(tensor: gs.Tensor) -> gs.Tensor:
            if self.is_shared and tensor is not self.codes:
                return tensor
            if self.layer.layout.order != (0, 1, 2):
                perm = [1, 0] if self.is_shaped else [2, 0, 1]
                tensor = self._node("Transpose", [tensor], self.graph, perm=perm)
            return self._node("Gather", [tensor, indices], graph, axis=0)

        zero = None if self.zero is None else gathered(self.zero)
        value = self._decoded(gathered(self.codes), gathered(self.scale), zero, graph)
        if not self.is_shaped:
            shape = self._row_shape(indices, graph)
            value = self._node("Reshape", [value, shape], graph)
        self.model.replace_uses(node.outputs[0], value)
        self.model.remove(node, graph)

    def matrix(self) -> gs.Tensor:
        """Return the codes as MatMul multiplies them from the right."""
        return self._right(self.codes, self.layer.layout.shape)

    def packed(self, uses: Sequence[Use]) -> None:
        """Let products read DequantizeLinear, which becomes part of their kernel."""
        inputs = [self.matrix(), self.scales()]
        if self.zero is not None:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.codes.dtype))
            zero = self._per_output(self.zero)
            inputs.append(self._node("Cast", [zero], self.graph, to=kind))
        attrs = {"axis": 1} if self.is_shaped else {"axis": 0, "block_size": self.block}
        value = self._node("DequantizeLinear", inputs, self.graph, **attrs)
        for use in uses:
            _read(self.model, use.node, value)

    def scales(self) -> gs.Tensor:
        """Return the scales of outputs, [outputs], or of blocks, [blocks, outputs]."""
        return self._per_output(self.scale)

    def _per_output(self, tensor: gs.Tensor) -> gs.Tensor:
        outputs, inputs = self.layer.layout.matrices_shape[1:]
        if self.is_shared:
            shape = self._constant(np.array([outputs]))
            return self._node("Expand", [tensor, shape], self.graph)
        if self.is_shaped:
            return self._reshaped(tensor, (outputs,))
        blocks = inputs // self.block
        is_straight = self.layer.layout.order == (0, 1, 2)
        return self._right(
            tensor, (outputs, blocks) if is_straight else (blocks, outputs)
        )

    def _right(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        """Give a tensor a shape along the weight's axes, then inputs before outputs."""
        value = tensor if self.is_shaped else self._reshaped(tensor, shape)
        if self.layer.layout.order == (0, 1, 2):
            value = self._node("Transpose", [value], self.graph, perm=[1, 0])
        return value

    def _row_shape(self, indices: gs.Tensor, graph: gs.Graph) -> gs.Tensor:
        """Shape of the rows looked up: that of the indices and the width of a row."""
        width = self.layer.layout.matrices_shape[2]
        if indices.shape is not None:
            return self._constant(np.array([0] * len(indices.shape) + [width]))
        outer = self._node("Shape", [indices], graph)
        return self._node(
            "Concat", [outer, self._constant(np.array([width]))], graph, axis=0
        )

    def _decoded(
        self,
        codes: gs.Tensor,
        scale: gs.Tensor,
        zero: gs.Tensor | None,
        graph: gs.Graph,
    ) -> gs.Tensor:
        value = self._node("Cast", [codes], graph, to=self.decoded_type)
        if zero is not None:
            value = self._node("Sub", [value, zero], graph)
        value = self._node("Mul", [value, scale], graph)
        if self.data_type == self.decoded_type:
            return value
        return self._node("Cast", [value], graph, to=self.data_type)

    def _reshaped(self, value: gs.Tensor, shape: Sequence[int]) -> gs.Tensor:
        wanted = self._constant(np.array(shape, np.int64))
        return self._node("Reshape", [value, wanted], self.graph)

    def _constant(self, values: NDArray[np.int64]) -> gs.Tensor:
        return self.model.add_weight(f"{self.name}_shape", values, self.graph)

    def _node(
        self, op: str, inputs: Sequence[gs.Tensor], graph: gs.Graph, **attrs: Any
    ) -> gs.Tensor:
        name = f"{self.name}_{op}"
        node = self.model.add_node(op, inputs, attrs=attrs, name=name, graph=graph)
        return node.outputs[0]


def representable(scale: Array, dtype: np.dtype[Any]) -> Array:
    """Return scales in the type of a model, none of which becomes zero."""
    exact = scale.astype(dtype)
    if dtype.itemsize > 2:
        return exact
    least = dtype.type(_SMALLEST[dtype.name])
    return np.where(exact == 0, least, exact)


def _is_constant(values: Array) -> bool:
    return bool((values == values.flat[0]).all())


def _placed(layout: Layout, rows: Array, blocks: int) -> Array:
    """Reorder rows [rows, blocks * n] to the weight's axes; blocks become an axis."""
    groups, outputs, _ = layout.matrices_shape
    stacked = rows.reshape(groups, outputs, blocks, -1)
    axes: list[int] = []
    for axis in np.argsort(layout.order):
        axes += [2, 3] if axis == 2 else [int(axis)]
    placed = stacked.transpose(axes)
    if groups == 1:
        placed = placed.squeeze(axes.index(0))
    return np.ascontiguousarray(placed)


def _scale_shape(layout: Layout) -> tuple[int, ...] | None:
    """Return the shape in which a scale for each row broadcasts against the weight."""
    shape, at = layout.shape, layout.order[2]
    before, behind = math.prod(layout.split[:at]), math.prod(layout.split[at + 1 :])
    for start in range(len(shape) + 1):
        for stop in range(start, len(shape) + 1):
            if math.prod(shape[:start]) == before and math.prod(shape[stop:]) == behind:
                return shape[:start] + (1,) * (stop - start) + shape[stop:]
    return None


def _pack(model: Model, layer: LinearWeight, grid: Grid, codes: Array) -> None:
    """Put DequantizeLinear in front of every MatMul; a Gemm becomes MatMul and Add."""
    graph, name = layer.weight.graph, layer.weight.value.name or "weight"
    blocks = grid.scale.shape[1]
    dtype = numpy_type(_fits(_levels(grid)))

    def add(what: str, rows: Array) -> gs.Tensor:
        array = np.ascontiguousarray(rows.T)
        if what != "codes" and blocks == 1:
            array = array[0]
        return model.add_weight(f"{name}_{what}", array, graph)

    inputs = [add("codes", codes.astype(dtype)), add("scale", grid.scale)]
    if grid.zero.any():
        inputs.append(add("zero", grid.zero.astype(dtype)))
    attrs = {"axis": 0, "block_size": grid.block} if blocks > 1 else {"axis": 1}
    decoder = model.add_node(
        "DequantizeLinear", inputs, attrs=attrs, name=f"{name}_decode", graph=graph
    )
    for use in layer.uses:
        _read(model, use.node, decoder.outputs[0])


def _pack_blocks(
    model: Model, layer: LinearWeight, grid: Grid, codes: Array, accuracy: int
) -> None:
    """Write MatMulNBits itself, whose blocks are ``MIN_BLOCK`` wide or more."""
    graph, name = layer.weight.graph, layer.weight.value.name or "weight"
    bits = 8 // _per_byte(_fits(_levels(grid)))
    outputs, inputs = codes.shape
    block = grid.block if grid.scale.shape[1] > 1 else 32
    blocks = -(-inputs // block)
    shift = 0 if grid.low >= 0 else 1 << (bits - 1)
    spread = (outputs, blocks)
    zero = np.broadcast_to(grid.zero + shift, spread).astype(np.uint8)
    wide = np.repeat(zero, block, axis=1)
    wide[:, :inputs] = codes + shift
    inputs_ = [
        model.add_weight(
            f"{name}_codes",
            _bit_rows(wide.reshape(-1, block), bits).reshape(outputs, blocks, -1),
            graph,
        ),
        model.add_weight(
            f"{name}_scale",
            np.broadcast_to(grid.scale, spread).astype(np.float32).reshape(-1),
            graph,
        ),
    ]
    if (zero != 1 << (bits - 1)).any():
        packed = _bit_rows(zero, bits).reshape(-1)
        inputs_.append(model.add_weight(f"{name}_zero", packed, graph))
    attrs = {
        "K": inputs,
        "N": outputs,
        "bits": bits,
        "block_size": block,
        "accuracy_level": accuracy,
    }
    for use in layer.uses:
        _read(model, use.node, *inputs_, attrs=attrs)


def _per_byte(data_type: int) -> int:
    """Codes of a type that a byte holds."""
    types = onnx.TensorProto
    if data_type in (types.INT2, types.UINT2):
        return 4
    return 2 if data_type in (types.INT4, types.UINT4) else 1


def _bit_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put codes of a row side by side into bytes, the first in the lowest bits."""
    each = 8 // bits
    rows = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    parts = rows.reshape(len(rows), -1, each).astype(np.uint8)
    packed = np.zeros(parts.shape[:2], np.uint8)
    for at in range(each):
        packed |= parts[..., at] << np.uint8(bits * at)
    return packed


def _read(
    model: Model,
    node: Node,
    *weight: gs.Tensor,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Let a MatMul or a plain Gemm multiply with a [inputs, outputs] weight.

    Args:
        model: The model.
        node: The product.
        weight: The weight; with ``attrs`` what MatMulNBits reads behind activations.
        attrs: Attributes of a MatMulNBits.
    """
    if node.op == "MatMul" and attrs is None:
        node.inputs[1] = weight[0]
        return
    graph = home(model, node)
    product = model.add_node(
        "MatMul" if attrs is None else "MatMulNBits",
        [node.inputs[0], *weight],
        attrs=attrs,
        name=f"{node.name}_product",
        domain="" if attrs is None else "com.microsoft",
        graph=graph,
    )
    value = product.outputs[0]
    bias = addend(node) if node.op == "Gemm" else None
    if bias is not None:
        total = model.add_node(
            "Add", [value, bias], name=f"{node.name}_sum", graph=graph
        )
        value = total.outputs[0]
    model.replace_uses(node.outputs[0], value)
    model.remove(node, graph)


def within_reach(model: Model, layer: LinearWeight, use: Use) -> bool:
    """Whether nodes beside a reader can read what stands beside the weight.

    A function sees nothing from outside but its inputs.
    """
    return not model.graph.functions or home(model, use.node) is layer.weight.graph


def home(model: Model, node: Node) -> gs.Graph:
    """Return the graph a node stands in."""
    return next(
        graph for graph in model.graphs() if any(other is node for other in graph.nodes)
    )
