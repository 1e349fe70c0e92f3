"""Operators of ONNX with the shapes of those of com.microsoft, for shape inference.

onnx infers nothing behind an operator that it does not know. ``replace`` puts operators
in their place that compute something else with the same types and shapes.

Tested in tests/structure/test_tie_fused.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["replace"]

Shape = tuple[int, ...]
Made = list[onnx.NodeProto]

_SAME = frozenset(
    {
        *("BiasDropout", "BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "GroupNorm"),
        *("QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BiasAdd"),
    }
)
"""Operators whose outputs, but for statistics, have the shape of the first input."""
_FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
_KEPT = {
    "Conv": ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"),
    "Gemm": ("alpha", "beta", "transA", "transB"),
}


def replace(graph: onnx.GraphProto) -> None:
    """Replace nodes of a graph without its tensors' data, in place."""
    shapes: dict[str, Shape] = {
        tensor.name: tuple(tensor.dims) for tensor in graph.initializer
    }
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        if info.type.HasField("tensor_type") and all(
            d.HasField("dim_value") for d in dims
        ):
            shapes.setdefault(info.name, tuple(d.dim_value for d in dims))
    nodes: Made = []
    added: list[onnx.TensorProto] = []
    for node in graph.node:
        made = _stand_in(node, shapes, added)
        nodes.extend([node] if made is None else made)
    if any(node.domain == "com.microsoft" for node in graph.node) or added:
        copies = [_copy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        graph.initializer.extend(added)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    """Return a node that does not belong to a graph."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _stand_in(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made | None:
    """Return nodes in the place of one, or ``None`` to keep it."""
    is_foreign = node.domain == "com.microsoft"
    if not is_foreign and node.op_type != "SimplifiedLayerNormalization":
        return None
    if node.op_type in _SAME:
        return _same(node)
    rule = _RULES.get(node.op_type) if is_foreign else None
    return None if rule is None else rule(node, shapes, added)


def _same(node: onnx.NodeProto) -> Made:
    made = [helper.make_node("Identity", node.input[:1], node.output[:1])]
    if node.op_type.startswith("Skip") and len(node.output) > 3 and node.output[3]:
        made.append(helper.make_node("Identity", node.input[:1], node.output[3:4]))
    return made


def _attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _fused(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made:
    op = _FUSED[node.op_type]
    made = helper.make_node(op, node.input[:3], node.output[:1])
    made.attribute.extend(a for a in node.attribute if a.name in _KEPT[op])
    return [made]


def _matmul(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made | None:
    if any(_attribute(node, f"transBatch{side}") for side in "AB"):
        return None
    left = "mk" if not _attribute(node, "transA") else "km"
    right = "kn" if not _attribute(node, "transB") else "nk"
    if (left, right) == ("mk", "kn"):
        return [helper.make_node("MatMul", node.input[:2], node.output[:1])]
    weight = shapes.get(node.input[1])
    if left == "mk" and weight is not None and len(weight) == 2:
        return [_product(node, (weight[1], weight[0]), added)]
    equation = f"...{left},...{right}->...mn"
    return [
        helper.make_node("Einsum", node.input[:2], node.output[:1], equation=equation)
    ]


def _packed_attention(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made | None:
    weight = shapes.get(node.input[1])
    if weight is None or len(weight) != 2:
        return None
    sizes = next(
        (list(a.ints) for a in node.attribute if a.name == "qkv_hidden_sizes"), []
    )
    width = sizes[2] if len(sizes) == 3 else weight[1] // 3
    return [_product(node, (weight[0], width), added)]


def _product(
    node: onnx.NodeProto, shape: Shape, added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    """Return a product with a matrix of which only the shape is there."""
    name = f"{node.output[0]}/stand_in"
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    added.append(tensor)
    return helper.make_node("MatMul", [node.input[0], name], node.output[:1])


def _multi_head(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made | None:
    if len(node.input) < 3 or not node.input[2]:
        if len(node.input) > 1 and node.input[1]:
            return [helper.make_node("Identity", node.input[:1], node.output[:1])]
        # All packed: [batch, length, heads, 3, width].
        inner = f"{node.output[0]}/heads"
        pick = helper.make_node(
            "Einsum", node.input[:1], [inner], equation="bshcd->bshd"
        )
        return [pick, _reshaped(inner, node.output[0], (0, 0, -1), added)]
    inputs = [node.input[0], node.input[2]]
    return [
        helper.make_node("Einsum", inputs, node.output[:1], equation="bsh,blv->bsv")
    ]


def _reshaped(
    source: str, target: str, shape: Sequence[int], added: list[onnx.TensorProto]
) -> onnx.NodeProto:
    name = f"{target}/shape/{source}"
    added.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return helper.make_node("Reshape", [source, name], [target])


def _grouped_query(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made:
    if len(node.input) > 1 and node.input[1]:
        return [helper.make_node("Identity", node.input[:1], node.output[:1])]
    count, shared = _attribute(node, "num_heads"), _attribute(node, "kv_num_heads")
    whole, part = f"{node.output[0]}/all", f"{node.output[0]}/heads"
    bounds = {}
    for label, value in (("start", 0), ("end", count), ("axis", 2)):
        bounds[label] = f"{node.output[0]}/{label}"
        added.append(
            numpy_helper.from_array(np.array([value], np.int64), bounds[label])
        )
    return [
        _reshaped(node.input[0], whole, (0, 0, count + 2 * shared, -1), added),
        helper.make_node("Slice", [whole, *bounds.values()], [part]),
        _reshaped(part, node.output[0], (0, 0, -1), added),
    ]


def _embed_norm(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made:
    made = [helper.make_node("Gather", [node.input[2], node.input[0]], node.output[:1])]
    if len(node.output) > 2 and node.output[2]:
        made.append(helper.make_node("Identity", node.output[:1], node.output[2:3]))
    return made


def _packed_product(
    node: onnx.NodeProto, shapes: Mapping[str, Shape], added: list[onnx.TensorProto]
) -> Made:
    return [_product(node, (_attribute(node, "K"), _attribute(node, "N")), added)]


_RULES: dict[
    str,
    Callable[
        [onnx.NodeProto, Mapping[str, Shape], list[onnx.TensorProto]], Made | None
    ],
] = {
    "Attention": _packed_attention,
    "EmbedLayerNormalization": _embed_norm,
    "FusedConv": _fused,
    "FusedGemm": _fused,
    "FusedMatMul": _matmul,
    "GroupQueryAttention": _grouped_query,
    "MatMulNBits": _packed_product,
    "MultiHeadAttention": _multi_head,
    "TransposeMatMul": _matmul,
}
