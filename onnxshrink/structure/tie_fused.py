"""What attention operators and those of com.microsoft tie.

onnxruntime's optimizer writes these, and so do exporters for language models. Whole
heads go, with the heads that share their keys and values; the width of a head stays.

Tested in tests/structure/test_tie_fused.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxshrink.model import Node, attribute
from onnxshrink.model.topology import returned_by
from onnxshrink.structure.tie_rules import (
    RULES,
    align,
    conv,
    fix_spatial,
    gemm,
    input_at,
    layer_norm,
    outputs_read,
    pointwise,
    product,
    same,
    same_axes,
)
from onnxshrink.structure.ties import (
    Indices,
    Role,
    Rule,
    Ties,
    UnknownError,
)

__all__ = ["ALL_RULES"]

_SIZES = "has heads whose number or width is unknown"


def _output_at(node: Node, index: int) -> gs.Tensor | None:
    if index < len(node.outputs) and node.outputs[index].name:
        tensor: gs.Tensor = node.outputs[index]
        return tensor
    return None


def _known(ties: Ties, tensor: gs.Tensor, axis: int) -> tuple[int, int]:
    """Return the number of an axis and its size."""
    number = ties.axis(tensor, axis)
    if number is None:
        raise UnknownError(_SIZES)
    return number, ties.axes.sizes[number]


# --- heads ----------------------------------------------------------------------------


class _Heads:
    """The heads of an attention: groups that share keys and values, each of some."""

    def __init__(self, ties: Ties, node: Node, shared: int, each: int) -> None:
        if shared < 1 or each < 1:
            raise UnknownError(_SIZES)
        self.ties, self.node = ties, node
        self.shared, self.each = shared, each
        self.groups = ties.extra(shared)
        self.members = self.groups if each == 1 else ties.extra(shared * each)
        self.inner = self.groups
        if each > 1:
            # Either whole groups go, or the same heads of each group.
            self.inner = ties.extra(each)
            parts = (self.groups, self.inner)
            why = f"{node.op} has {shared} groups of heads"
            ties.merge(self.members, parts, why)

    def along(
        self, tensor: gs.Tensor, axis: int, *, keys: bool = False, width: int = 0
    ) -> int:
        """Tie an axis that holds heads one after the other; return their width."""
        number, size = _known(self.ties, tensor, axis)
        heads = self.groups if keys else self.members
        count = self.ties.axes.sizes[heads]
        if size % count or (width and size != width * count):
            raise UnknownError(_SIZES)
        spread = np.repeat(self.ties.positions(heads), size // count)
        self.ties.join(self.ties.positions(number), spread)
        return size // count

    def packed(self, positions: Indices, heads: int) -> None:
        """Tie a run of positions to heads one after the other."""
        count = self.ties.axes.sizes[heads]
        if not len(positions) or len(positions) % count:
            raise UnknownError(_SIZES)
        spread = np.repeat(self.ties.positions(heads), len(positions) // count)
        self.ties.join(positions, spread)

    def masks(self, tensor: gs.Tensor | None) -> None:
        """Tie the heads of what is added to scores, [.., heads or 1, rows, columns]."""
        if tensor is None:
            return
        rank = len(self.ties.shape(tensor))
        for axis in range(rank):
            number, size = self.ties.axis(tensor, axis), self.ties.sizes(tensor)[axis]
            if axis == rank - 3 and number is not None and size != 1:
                self.along(tensor, axis, width=1)
            else:
                self.ties.fix(tensor, f"{self.node.op} adds it to scores", axis)

    def cached(self, tensor: gs.Tensor | None, axis: int = 1) -> None:
        """Tie the heads of keys or values of earlier calls."""
        if tensor is None:
            return
        if self.ties.facts.shape(tensor) is None:
            # Of an output that nobody describes; the caller gets its heads.
            if tensor.outputs or returned_by(tensor):
                why = f"{self.node.op} gives {tensor.name!r}"
                self.ties.fixed.setdefault(self.groups, why)
            return
        self.along(tensor, axis, keys=True, width=1)
        rest = [a for a in range(len(self.ties.shape(tensor))) if a != axis]
        self.ties.fix(tensor, f"{self.node.op} keeps it from call to call", *rest)

    def written(self, **names: tuple[int, int]) -> None:
        """Write counts back: attribute, number of an axis, and what it was."""
        node = self.node

        def edit(size: Callable[[int], int]) -> None:
            for name, (number, old) in names.items():
                if size(number) != old and name in node.attrs:
                    node.attrs[name] = size(number)

        self.ties.edits.append(edit)


def _settings(ties: Ties, node: Node, *indices: int) -> None:
    for index in indices:
        tensor = input_at(node, index)
        if tensor is not None:
            ties.fix(tensor, f"{node.op} takes it as a setting")


def _rest_is_settled(ties: Ties, node: Node, inputs: int, outputs: int) -> None:
    _settings(ties, node, *range(inputs, len(node.inputs)))
    for tensor in node.outputs[outputs:]:
        if tensor.name:
            ties.fix(tensor, f"{node.op} gives it out")


def _sequence(ties: Ties, node: Node, *tensors: gs.Tensor) -> None:
    for tensor in tensors:
        ties.fix(tensor, f"{node.op} runs along it", 0, 1)


def _packed_attention(ties: Ties, node: Node) -> None:
    """Attention of com.microsoft: projections of query, key and value are in it."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if len(ties.shape(x)) != 3 or ties.weight(w) is None:
        raise UnknownError(_SIZES)
    heads = _Heads(ties, node, int(attribute(node, "num_heads", 0)), 1)
    number, total = _known(ties, w, 1)
    given = attribute(node, "qkv_hidden_sizes", None)
    sizes = [int(s) for s in given] if given else [total // 3] * 3
    if len(sizes) != 3 or sum(sizes) != total:
        raise UnknownError(_SIZES)
    _sequence(ties, node, x, y)
    ties.tie(x, 2, w, 0)
    ties.use(node, w, 0, "consumer")
    ties.use(node, w, 1, "producer")
    starts = np.cumsum([0, *sizes])
    bias = input_at(node, 2)
    for place in range(3):
        span = slice(int(starts[place]), int(starts[place + 1]))
        heads.packed(ties.positions(number)[span], heads.members)
    if bias is not None:
        ties.tie(bias, 0, w, 1)
        ties.use(node, bias, 0, "shift")
    heads.along(y, 2, width=sizes[2] // max(1, heads.shared))
    _settings(ties, node, 3, 6)
    heads.cached(input_at(node, 4), 2)
    heads.cached(_output_at(node, 1), 2)
    heads.masks(input_at(node, 5))
    _rest_is_settled(ties, node, 7, 2)
    old = heads.shared
    heads.written(num_heads=(heads.groups, old))

    def edit(size: Callable[[int], int]) -> None:
        if given and size(heads.groups) != old:
            left = [s // old * size(heads.groups) for s in sizes]
            node.attrs["qkv_hidden_sizes"] = left

    ties.edits.append(edit)


def _multi_head(ties: Ties, node: Node) -> None:
    """MultiHeadAttention of com.microsoft."""
    query, y = node.inputs[0], node.outputs[0]
    key, value, bias = (input_at(node, index) for index in (1, 2, 3))
    heads = _Heads(ties, node, int(attribute(node, "num_heads", 0)), 1)
    widths = []
    for tensor in (query, key, value):
        if tensor is None:
            continue
        rank = len(ties.shape(tensor))
        if rank == 3:
            _sequence(ties, node, tensor)
            widths.append(heads.along(tensor, 2))
        elif rank in (4, 5):
            # [batch, heads, length, width], or all packed: [.., heads, 2 or 3, width].
            axis = 1 if rank == 4 else 2
            heads.along(tensor, axis, width=1)
            rest = [a for a in range(rank) if a != axis]
            ties.fix(tensor, f"{node.op} has heads of this width", *rest)
            widths.append(ties.sizes(tensor)[-1] or 0)
        else:
            raise UnknownError(_SIZES)
    if 0 in widths:
        raise UnknownError(_SIZES)
    if bias is not None:
        number, total = _known(ties, bias, 0)
        each = [widths[0], widths[0], widths[-1]]
        if total != sum(each) * heads.shared:
            raise UnknownError(_SIZES)
        start = 0
        for width in each:
            span = slice(start, start + width * heads.shared)
            heads.packed(ties.positions(number)[span], heads.members)
            start = span.stop
        ties.use(node, bias, 0, "shift")
    _sequence(ties, node, y)
    heads.along(y, 2, width=widths[-1])
    _settings(ties, node, 4)
    heads.masks(input_at(node, 5))
    for tensor in (input_at(node, 6), input_at(node, 7)):
        heads.cached(tensor)
    for tensor in (_output_at(node, 1), _output_at(node, 2)):
        heads.cached(tensor)
    _rest_is_settled(ties, node, 8, 3)
    heads.written(num_heads=(heads.groups, heads.shared))


def _grouped_query(ties: Ties, node: Node) -> None:
    """GroupQueryAttention of com.microsoft: query heads share keys and values."""
    query, y = node.inputs[0], node.outputs[0]
    key, value = input_at(node, 1), input_at(node, 2)
    count = int(attribute(node, "num_heads", 0))
    shared = int(attribute(node, "kv_num_heads", 0))
    if shared < 1 or count % shared or len(ties.shape(query)) != 3:
        raise UnknownError(_SIZES)
    heads = _Heads(ties, node, shared, count // shared)
    _sequence(ties, node, query, y)
    if key is not None and value is not None:
        width = heads.along(query, 2)
        for tensor in (key, value):
            if len(ties.shape(tensor)) != 3:
                raise UnknownError(_SIZES)
            _sequence(ties, node, tensor)
            heads.along(tensor, 2, keys=True, width=width)
    else:
        number, total = _known(ties, query, 2)
        if total % (count + 2 * shared):
            raise UnknownError(_SIZES)
        width = total // (count + 2 * shared)
        positions = ties.positions(number)
        cuts = np.cumsum([0, count, shared, shared]) * width
        for place, part in enumerate((heads.members, heads.groups, heads.groups)):
            heads.packed(positions[cuts[place] : cuts[place + 1]], part)
    heads.along(y, 2, width=width)
    for index in (3, 4):
        heads.cached(input_at(node, index))
    for index in (1, 2):
        heads.cached(_output_at(node, index))
    _settings(ties, node, 5, 6, 7, 8, 9)
    heads.masks(input_at(node, 10))
    sink = input_at(node, 11)
    if sink is not None:
        heads.along(sink, 0, width=1)
    _rest_is_settled(ties, node, 12, 3)
    heads.written(num_heads=(heads.members, count), kv_num_heads=(heads.groups, shared))


def _attention(ties: Ties, node: Node) -> None:
    """Attention of ONNX, from opset 23 on."""
    query, key, value = node.inputs[0], node.inputs[1], node.inputs[2]
    y = node.outputs[0]
    rank = len(ties.shape(query))
    axis = 1 if rank == 4 else 2
    if rank == 4:
        count, shared = _known(ties, query, 1)[1], _known(ties, key, 1)[1]
    else:
        count = int(attribute(node, "q_num_heads", 0))
        shared = int(attribute(node, "kv_num_heads", 0))
    if shared < 1 or count % shared or rank not in (3, 4):
        raise UnknownError(_SIZES)
    heads = _Heads(ties, node, shared, count // shared)
    why = f"{node.op} has heads of this width"
    for tensor in (query, key, value, y):
        keys = tensor is key or tensor is value
        heads.along(tensor, axis, keys=keys, width=1 if rank == 4 else 0)
        ties.fix(tensor, why, *(a for a in range(rank) if a != axis))
    heads.masks(input_at(node, 3))
    for index in (4, 5):
        heads.cached(input_at(node, index))
    for index in (1, 2):
        heads.cached(_output_at(node, index))
    _rest_is_settled(ties, node, 6, 3)
    heads.written(
        q_num_heads=(heads.members, count), kv_num_heads=(heads.groups, shared)
    )


def _rotary(ties: Ties, node: Node) -> None:
    """RotaryEmbedding, of ONNX (opset 23) or com.microsoft: whole heads may go."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank))
    _settings(ties, node, *range(1, len(node.inputs)))
    why = f"{node.op} turns pairs along it"
    if rank == 4:
        ties.fix(x, why, 2, 3)
        return
    count = int(attribute(node, "num_heads", 0))
    number, size = _known(ties, x, rank - 1)
    if not count:
        # com.microsoft tells the width from the table, which has half of it.
        place = 2 if node.domain == "com.microsoft" else 1
        half = ties.sizes(node.inputs[place])[-1]
        if attribute(node, "rotary_embedding_dim", 0) or not half:
            raise UnknownError(_SIZES)
        count = size // (2 * half)
    if count < 1 or size % count:
        raise UnknownError(_SIZES)
    whole = ties.extra(count)
    spread = np.repeat(ties.positions(whole), size // count)
    ties.join(ties.positions(number), spread)
    ties.fix(x, why, *range(1, rank - 1))

    def edit(left: Callable[[int], int]) -> None:
        if left(whole) != count and node.attrs.get("num_heads"):
            node.attrs["num_heads"] = left(whole)

    ties.edits.append(edit)


# --- norms, activations, products -----------------------------------------------------


def _skip_norm(roles: Sequence[Role]) -> Rule:
    """A sum, its norm, and the sum itself as the fourth output."""

    def rule(ties: Ties, node: Node) -> None:
        x, y = node.inputs[0], node.outputs[0]
        rank = len(ties.shape(x))
        same_axes(ties, x, y, range(rank))
        align(ties, node.inputs[1], y)
        ties.mix(x, rank - 1, f"{node.op} takes the variance along it")
        for tensor, role in zip(node.inputs[2:], roles, strict=False):
            if tensor.name:
                ties.tie(tensor, 0, y, rank - 1)
                ties.use(node, tensor, 0, role)
        for tensor in outputs_read(node)[1:]:
            if tensor is _output_at(node, 3):
                same_axes(ties, x, tensor, range(rank))
            else:
                ties.fix(tensor, f"{node.op} gives it out")

    return rule


def _embed_norm(ties: Ties, node: Node) -> None:
    """Rows of three tables, their sum and its norm."""
    y = node.outputs[0]
    rank = len(ties.shape(y))
    _settings(ties, node, 0, 1, 7, 8)
    ties.fix(y, f"{node.op} makes it", *range(rank - 1))
    for index in (2, 3, 4):
        table = input_at(node, index)
        if table is not None:
            ties.fix(table, f"{node.op} picks from it by number", 0)
            ties.tie(table, 1, y, rank - 1)
            ties.use(node, table, 1, "producer")
    roles: tuple[Role, ...] = ("scale", "shift")
    for index, role in zip((5, 6), roles, strict=True):
        tensor = input_at(node, index)
        if tensor is not None:
            ties.tie(tensor, 0, y, rank - 1)
            ties.use(node, tensor, 0, role)
    ties.mix(y, rank - 1, f"{node.op} takes the variance along it")
    for tensor in outputs_read(node)[1:]:
        if tensor is _output_at(node, 2):
            same_axes(ties, y, tensor, range(rank))
        else:
            ties.fix(tensor, f"{node.op} gives it out")


def _biased(ties: Ties, node: Node) -> None:
    """Further inputs are added: biases, skips."""
    pointwise(ties, node)
    for tensor in node.inputs[1:]:
        if tensor.name:
            ties.use(node, tensor, len(ties.shape(tensor)) - 1, "shift")


def _split_gelu(ties: Ties, node: Node) -> None:
    """One half, times the activation of the other."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    same_axes(ties, x, y, range(rank - 1))
    number, size = _known(ties, x, rank - 1)
    half, width = _known(ties, y, rank - 1)
    if size != 2 * width:
        raise UnknownError("has halves of a width that is unknown")
    ties.join(ties.positions(number), np.tile(ties.positions(half), 2))
    bias = input_at(node, 1)
    if bias is not None:
        ties.tie(bias, 0, x, rank - 1)
        ties.use(node, bias, 0, "shift")


def _fused_conv(ties: Ties, node: Node) -> None:
    """Conv, then a sum with a fourth input, then an activation."""
    conv(ties, node)
    added = input_at(node, 3)
    if added is not None:
        align(ties, added, node.outputs[0])
        fix_spatial(ties, node, added)


def _fused_matmul(ties: Ties, node: Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ranks = len(ties.shape(a)), len(ties.shape(b))
    if min(ranks) < 2 or any(attribute(node, f"transBatch{s}", 0) for s in "AB"):
        raise UnknownError("moves axes of batches")
    left = [ranks[0] - 2, ranks[0] - 1]
    right = [ranks[1] - 2, ranks[1] - 1]
    if attribute(node, "transA", 0):
        left.reverse()
    if attribute(node, "transB", 0):
        right.reverse()
    product(ties, node, a, b, (left[0], left[1], right[0], right[1]))
    batch = len(ties.shape(y)) - 2
    for tensor, rank in zip((a, b), ranks, strict=True):
        for axis in range(rank - 2):
            ties.tie(tensor, axis, y, batch - (rank - 2) + axis)
            ties.use(node, tensor, axis, "producer")


_MICROSOFT: dict[str, Rule] = {
    "Attention": _packed_attention,
    "BiasAdd": _biased,
    "BiasDropout": _biased,
    "BiasGelu": _biased,
    "BiasSplitGelu": _split_gelu,
    "DequantizeLinear": RULES["DequantizeLinear"],
    "EmbedLayerNormalization": _embed_norm,
    "FastGelu": _biased,
    "FusedConv": _fused_conv,
    "FusedGemm": gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": same,
    "GroupQueryAttention": _grouped_query,
    "MultiHeadAttention": _multi_head,
    "QuantizeLinear": RULES["QuantizeLinear"],
    "QuickGelu": same,
    "RotaryEmbedding": _rotary,
    "SkipLayerNormalization": _skip_norm(("scale", "shift", "shift")),
    "SkipSimplifiedLayerNormalization": _skip_norm(("scale", "shift")),
    "TransposeMatMul": _fused_matmul,
}

ALL_RULES: dict[str, Rule] = {
    **RULES,
    **{f"com.microsoft.{name}": rule for name, rule in _MICROSOFT.items()},
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
    "SimplifiedLayerNormalization": layer_norm,
}
"""What operators tie, those of ONNX and of com.microsoft."""
