"""Operators of com.microsoft written as the ONNX operators they are made of.

onnxruntime's optimizer writes such operators when it saves what it optimised, and puts
ONNX operators together again when it loads them. ``expand`` goes back, so that passes
find the products, residual sums and activations inside. What each operator computes is
in onnxruntime's ``docs/ContribOperators.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Node, ValueInfo, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.structure.inferred import value_infos
from onnxshrink.tensors import numpy_type

__all__ = ["expand", "is_fused"]

Array = np.ndarray[Any, Any]
_MICROSOFT = "com.microsoft"
_NORMS_OPSET = 17
"""Opset that brought LayerNormalization."""


class _KeptError(Exception):
    """A node has a form that is not written in ONNX operators; says why."""


class _Writer:
    """Writes nodes in front of one that they stand for."""

    def __init__(
        self, model: Model, graph: gs.Graph, infos: Mapping[str, ValueInfo], node: Node
    ) -> None:
        self.model, self.graph, self.infos, self.node = model, graph, infos, node
        self.opset = model.opset

    def input(self, index: int) -> gs.Tensor | None:
        """An input that is connected, or ``None``."""
        inputs = self.node.inputs
        known = index < len(inputs) and (
            inputs[index].name or isinstance(inputs[index], gs.Constant)
        )
        return inputs[index] if known else None

    def needed(self, index: int) -> gs.Tensor:
        found = self.input(index)
        if found is None:
            raise _KeptError(f"its input {index} is missing")
        return found

    def absent(self, *indices: int) -> None:
        for index in indices:
            if self.input(index) is not None:
                raise _KeptError(f"it reads its input {index}")

    def unused(self, *indices: int) -> None:
        results = {id(tensor) for tensor in self.graph.outputs}
        for index in indices:
            if index >= len(self.node.outputs):
                continue
            tensor = self.node.outputs[index]
            if tensor.name and (tensor.outputs or id(tensor) in results):
                raise _KeptError(f"its output {index} is used")

    def shape(self, tensor: gs.Tensor) -> tuple[int | str | None, ...]:
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        info = self.infos.get(tensor.name)
        if info is None or info.shape is None:
            raise _KeptError(f"the shape of {tensor.name!r} is not known")
        return info.shape

    def size(self, tensor: gs.Tensor, axis: int) -> int:
        size = self.shape(tensor)[axis]
        if not isinstance(size, int):
            raise _KeptError(f"axis {axis} of {tensor.name!r} has no fixed size")
        return size

    def dtype(self, tensor: gs.Tensor) -> np.dtype[Any]:
        known = self.model.constant(tensor)
        if known is not None:
            return known.dtype
        info = self.infos.get(tensor.name)
        if info is None or not info.data_type:
            raise _KeptError(f"the type of {tensor.name!r} is not known")
        return numpy_type(info.data_type)

    def constant(self, value: Any, dtype: Any, name: str = "value") -> gs.Constant:
        label = f"{self.node.name or self.node.outputs[0].name}_{name}"
        array = np.asarray(value, np.float64 if np.dtype(dtype).kind != "i" else dtype)
        return self.model.add_weight(label, array.astype(dtype), self.graph)

    def op(
        self, op: str, *inputs: gs.Tensor | None, domain: str = "", **attrs: Any
    ) -> gs.Tensor:
        return self.several(op, *inputs, count=1, domain=domain, **attrs)[0]

    def several(
        self,
        op: str,
        *inputs: gs.Tensor | None,
        count: int,
        domain: str = "",
        **attrs: Any,
    ) -> list[gs.Tensor]:
        given = [gs.Variable.empty() if t is None else t for t in inputs]
        made = self.model.add_node(
            op,
            given,
            outputs=count,
            attrs=attrs,
            name=f"{self.node.name or self.node.op}_{op}",
            domain=domain,
            graph=self.graph,
            before=self.node,
        )
        return list(made.outputs)

    def add(self, first: gs.Tensor, second: gs.Tensor | None) -> gs.Tensor:
        return first if second is None else self.op("Add", first, second)

    def times(self, tensor: gs.Tensor, factor: float) -> gs.Tensor:
        if factor == 1.0:
            return tensor
        return self.op("Mul", tensor, self.constant(factor, self.dtype(self.first)))

    @property
    def first(self) -> gs.Tensor:
        """The first input, whose type is that of all that is computed."""
        return self.needed(0)

    def give(self, made: Mapping[int, gs.Tensor]) -> None:
        for index, tensor in made.items():
            if index < len(self.node.outputs) and self.node.outputs[index].name:
                self.model.replace_uses(self.node.outputs[index], tensor)
        self.model.remove(self.node, self.graph)


Expansion = Callable[[_Writer], Mapping[int, gs.Tensor]]


def _swapped(writer: _Writer, tensor: gs.Tensor, wanted: bool) -> gs.Tensor:
    """Return a tensor with its last two axes swapped, where that is wanted."""
    rank = len(writer.shape(tensor))
    if not wanted or rank < 2:
        return tensor
    order = [*range(rank - 2), rank - 1, rank - 2]
    return writer.op("Transpose", tensor, perm=order)


def _fused_matmul(writer: _Writer) -> Mapping[int, gs.Tensor]:
    node = writer.node
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise _KeptError("it moves its batch axes")
    left = _swapped(writer, writer.needed(0), bool(attribute(node, "transA", 0)))
    right = _swapped(writer, writer.needed(1), bool(attribute(node, "transB", 0)))
    factor = float(attribute(node, "alpha", 1.0))
    return {0: writer.times(writer.op("MatMul", left, right), factor)}


def _activated(
    writer: _Writer, tensor: gs.Tensor, params: Sequence[float]
) -> gs.Tensor:
    """Return what the activation of a fused product makes of it."""
    name = attribute(writer.node, "activation", "")
    name = name.decode() if isinstance(name, bytes) else str(name)
    if name in ("", "Relu", "Sigmoid", "Tanh"):
        return writer.op(name, tensor) if name else tensor
    if name == "LeakyRelu":
        return writer.op(name, tensor, alpha=params[0] if params else 0.01)
    if name == "HardSigmoid":
        alpha, beta = params if len(params) == 2 else (0.2, 0.5)
        return writer.op(name, tensor, alpha=alpha, beta=beta)
    if name == "Clip" and len(params) == 2 and writer.opset >= 11:
        dtype = writer.dtype(writer.first)
        ends = [writer.constant(value, dtype) for value in params]
        return writer.op(name, tensor, *ends)
    raise _KeptError(f"its activation is {name}")


def _plain_attrs(node: Node, *names: str) -> dict[str, Any]:
    return {name: node.attrs[name] for name in names if name in node.attrs}


def _fused_gemm(writer: _Writer) -> Mapping[int, gs.Tensor]:
    node = writer.node
    attrs = _plain_attrs(node, "alpha", "beta", "transA", "transB")
    bias = [tensor for tensor in [writer.input(2)] if tensor is not None]
    made = writer.op("Gemm", writer.needed(0), writer.needed(1), *bias, **attrs)
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    params = [float(node.attrs[name]) for name in names if name in node.attrs]
    return {0: _activated(writer, made, params)}


def _fused_conv(writer: _Writer) -> Mapping[int, gs.Tensor]:
    node = writer.node
    attrs = _plain_attrs(
        node, "auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"
    )
    bias = [tensor for tensor in [writer.input(2)] if tensor is not None]
    made = writer.op("Conv", writer.needed(0), writer.needed(1), *bias, **attrs)
    made = writer.add(made, writer.input(3))
    params = [float(value) for value in attribute(node, "activation_params", [])]
    return {0: _activated(writer, made, params)}


def _gelu_of(writer: _Writer, x: gs.Tensor) -> gs.Tensor:
    if writer.opset >= 20:
        return writer.op("Gelu", x)
    dtype = writer.dtype(writer.first)
    inner = writer.op("Div", x, writer.constant(math.sqrt(2.0), dtype))
    inner = writer.op("Add", writer.op("Erf", inner), writer.constant(1.0, dtype))
    return writer.times(writer.op("Mul", x, inner), 0.5)


def _gelu(writer: _Writer) -> Mapping[int, gs.Tensor]:
    return {0: _gelu_of(writer, writer.first)}


def _bias_gelu(writer: _Writer) -> Mapping[int, gs.Tensor]:
    return {0: _gelu_of(writer, writer.add(writer.first, writer.needed(1)))}


def _fast_gelu(writer: _Writer) -> Mapping[int, gs.Tensor]:
    x = writer.add(writer.first, writer.input(1))
    if writer.opset >= 20:
        return {0: writer.op("Gelu", x, approximate="tanh")}
    dtype = writer.dtype(writer.first)
    cube = writer.op("Pow", x, writer.constant(3.0, dtype))
    inner = writer.op("Add", x, writer.times(cube, 0.044715))
    bent = writer.op("Tanh", writer.times(inner, math.sqrt(2.0 / math.pi)))
    bent = writer.op("Add", bent, writer.constant(1.0, dtype))
    return {0: writer.op("Mul", writer.times(x, 0.5), bent)}


def _quick_gelu(writer: _Writer) -> Mapping[int, gs.Tensor]:
    x = writer.first
    alpha = float(attribute(writer.node, "alpha", 1.702))
    return {0: writer.op("Mul", x, writer.op("Sigmoid", writer.times(x, alpha)))}


def _normalised(
    writer: _Writer, x: gs.Tensor, scale: gs.Tensor, shift: gs.Tensor | None
) -> gs.Tensor:
    epsilon = float(attribute(writer.node, "epsilon", 1e-12))
    if writer.opset < _NORMS_OPSET:
        raise _KeptError(f"LayerNormalization needs opset {_NORMS_OPSET}")
    rest = [] if shift is None else [shift]
    return writer.op("LayerNormalization", x, scale, *rest, axis=-1, epsilon=epsilon)


def _skip_norm(writer: _Writer) -> Mapping[int, gs.Tensor]:
    writer.unused(1, 2)
    total = writer.add(writer.first, writer.needed(1))
    total = writer.add(total, writer.input(4))
    made = _normalised(writer, total, writer.needed(2), writer.input(3))
    return {0: made, 3: total}


def _rms(writer: _Writer, x: gs.Tensor, scale: gs.Tensor) -> gs.Tensor:
    """Root mean square normalisation over the last axis (Zhang & Sennrich 2019)."""
    dtype = writer.dtype(writer.first)
    epsilon = float(attribute(writer.node, "epsilon", 1e-5))
    # In the form that onnxruntime looks for, to put it together again.
    square = writer.op("Pow", x, writer.constant(2.0, dtype))
    if writer.opset >= 18:
        axes = writer.constant([-1], np.int64, "axes")
        mean = writer.op("ReduceMean", square, axes, keepdims=1)
    else:
        mean = writer.op("ReduceMean", square, axes=[-1], keepdims=1)
    root = writer.op("Sqrt", writer.op("Add", mean, writer.constant(epsilon, dtype)))
    return writer.op("Mul", writer.op("Div", x, root), scale)


def _simplified_norm(writer: _Writer) -> Mapping[int, gs.Tensor]:
    writer.unused(1)
    axis = int(attribute(writer.node, "axis", -1))
    if axis != -1 and axis != len(writer.shape(writer.first)) - 1:
        raise _KeptError("it normalises several axes")
    return {0: _rms(writer, writer.first, writer.needed(1))}


def _skip_simplified_norm(writer: _Writer) -> Mapping[int, gs.Tensor]:
    writer.unused(1, 2)
    total = writer.add(writer.first, writer.needed(1))
    total = writer.add(total, writer.input(3))
    return {0: _rms(writer, total, writer.needed(2)), 3: total}


def _embedding(writer: _Writer) -> Mapping[int, gs.Tensor]:
    """Words, positions and segments looked up, added and normalised."""
    ids, segments = writer.needed(0), writer.input(1)
    total = writer.op("Gather", writer.needed(2), ids)
    places = writer.input(8)
    if places is None:
        length = writer.op("Gather", writer.op("Shape", ids), writer.constant(1, "i8"))
        ends = (writer.constant(0, "i8"), length, writer.constant(1, "i8"))
        places = writer.op("Range", *ends)
    total = writer.add(total, writer.op("Gather", writer.needed(3), places))
    if segments is not None:
        total = writer.add(total, writer.op("Gather", writer.needed(4), segments))
    shape = writer.needed(5), writer.needed(6)
    # The type of all that is computed is that of the tables, not of the words.
    made = {0: _normalised(writer, total, *shape), 2: total}
    try:
        writer.unused(1)
    except _KeptError:
        mask = writer.needed(7)
        axes = writer.constant([1], np.int64, "axes")
        made[1] = writer.op("ReduceSum", mask, axes, keepdims=0)
    return made


def _attention(writer: _Writer) -> Mapping[int, gs.Tensor]:
    """The product in front written apart: MatMul, then MultiHeadAttention."""
    node = writer.node
    writer.unused(1)
    writer.absent(4, 6)
    if attribute(node, "do_rotary", 0) or attribute(
        node, "past_present_share_buffer", 0
    ):
        raise _KeptError("it turns or keeps its keys")
    width = writer.size(writer.needed(1), 1)
    sizes = [int(n) for n in attribute(node, "qkv_hidden_sizes", [])]
    sizes = sizes or [width // 3] * 3
    mask = writer.input(3)
    if mask is not None and len(writer.shape(mask)) != 2:
        raise _KeptError("its mask is no [batch, length]")
    made = writer.op("MatMul", writer.first, writer.needed(1))
    made = writer.add(made, writer.input(2))
    parts = writer.several(
        "Split", made, writer.constant(sizes, np.int64, "sizes"), count=3, axis=-1
    )
    attrs = _plain_attrs(
        node, "num_heads", "mask_filter_value", "scale", "unidirectional"
    )
    rest = [None, mask, writer.input(5)]
    while rest and rest[-1] is None:
        rest.pop()
    core = writer.op("MultiHeadAttention", *parts, *rest, domain=_MICROSOFT, **attrs)
    return {0: core}


def _heads(writer: _Writer, tensor: gs.Tensor, heads: int) -> gs.Tensor:
    """[batch, length, heads * width] -> [batch, heads, length, width]."""
    shape = writer.constant([0, 0, heads, -1], np.int64, "heads")
    split = writer.op("Reshape", tensor, shape)
    return writer.op("Transpose", split, perm=[0, 2, 1, 3])


def _joined(writer: _Writer, tensor: gs.Tensor) -> gs.Tensor:
    """[batch, heads, length, width] -> [batch, length, heads * width]."""
    flat = writer.op("Transpose", tensor, perm=[0, 2, 1, 3])
    return writer.op("Reshape", flat, writer.constant([0, 0, -1], np.int64, "flat"))


def _attended(
    writer: _Writer,
    query: gs.Tensor,
    key: gs.Tensor,
    value: gs.Tensor,
    scale: float,
    added: Sequence[gs.Tensor],
) -> gs.Tensor:
    """Scaled dot products of [batch, heads, length, width] (Vaswani et al. 2017)."""
    turned = writer.op("Transpose", key, perm=[0, 1, 3, 2])
    scores = writer.times(writer.op("MatMul", query, turned), scale)
    for tensor in added:
        scores = writer.op("Add", scores, tensor)
    return writer.op("MatMul", writer.op("Softmax", scores, axis=-1), value)


def _later(writer: _Writer, rows: int, columns: int, span: int = 0) -> gs.Tensor:
    """What is added so that no position sees a later one: [1, 1, rows, columns]."""
    place = np.arange(rows)[:, None] + columns - rows
    other = np.arange(columns)[None]
    hidden = other > place
    if span > 0:
        hidden |= other <= place - span
    values = np.where(hidden, -10000.0, 0.0)[None, None]
    return writer.constant(values, writer.dtype(writer.first), "causal")


def _multi_head(writer: _Writer) -> Mapping[int, gs.Tensor]:
    node = writer.node
    writer.absent(6, 7, 8, 9)
    writer.unused(1, 2, 3)
    heads = int(attribute(node, "num_heads", 0))
    sides = [writer.needed(index) for index in range(3)]
    if any(len(writer.shape(tensor)) != 3 for tensor in sides):
        raise _KeptError("its queries, keys and values are packed")
    bias = writer.input(3)
    sizes = [writer.size(tensor, 2) for tensor in sides]
    length = writer.size(sides[0], 1), writer.size(sides[1], 1)
    if bias is not None:
        cut = writer.constant(sizes, np.int64, "sizes")
        parts = writer.several("Split", bias, cut, count=3, axis=0)
        sides = [writer.op("Add", *pair) for pair in zip(sides, parts, strict=True)]
    query, key, value = (_heads(writer, tensor, heads) for tensor in sides)
    added: list[gs.Tensor] = []
    mask = writer.input(4)
    if mask is not None:
        if len(writer.shape(mask)) != 2:
            raise _KeptError("its mask is no [batch, length]")
        dtype = writer.dtype(writer.first)
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        hidden = writer.op("Cast", mask, to=kind)
        hidden = writer.op("Sub", writer.constant(1.0, dtype), hidden)
        hidden = writer.times(
            hidden, float(attribute(node, "mask_filter_value", -10000.0))
        )
        axes = writer.constant([1, 2], np.int64, "axes")
        added.append(writer.op("Unsqueeze", hidden, axes))
    bent = writer.input(5)
    if bent is not None:
        added.append(bent)
    if attribute(node, "unidirectional", 0):
        added.append(_later(writer, *length))
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(sizes[0] // heads)
    return {0: _joined(writer, _attended(writer, query, key, value, scale, added))}


def _turned(
    writer: _Writer, tensor: gs.Tensor, tables: Sequence[gs.Tensor]
) -> gs.Tensor:
    """Rotary position embedding of [batch, heads, length, width] (Su et al. 2021)."""
    cosines, sines = tables
    half = writer.size(writer.needed(7), 1)
    cut = writer.constant([half, half], np.int64, "halves")
    low, high = writer.several("Split", tensor, cut, count=2, axis=-1)
    left = writer.op(
        "Sub", writer.op("Mul", low, cosines), writer.op("Mul", high, sines)
    )
    right = writer.op(
        "Add", writer.op("Mul", high, cosines), writer.op("Mul", low, sines)
    )
    return writer.op("Concat", left, right, axis=-1)


def _group_query(writer: _Writer) -> Mapping[int, gs.Tensor]:
    """Attention of several queries on one key; every position before counts.

    Only where all samples are as long as the batch, without padding.
    """
    node = writer.node
    writer.absent(*range(9, 14))
    heads = int(attribute(node, "num_heads", 0))
    shared = int(attribute(node, "kv_num_heads", 0))
    if attribute(node, "rotary_interleaved", 0) or attribute(node, "softcap", 0.0):
        raise _KeptError("it has interleaved rotation or a soft cap")
    sides = [writer.needed(index) for index in range(3)]
    length = writer.size(sides[0], 1)
    width = writer.size(sides[0], 2) // heads
    query, key, value = (
        _heads(writer, tensor, count)
        for tensor, count in zip(sides, (heads, shared, shared), strict=True)
    )
    past_key, past_value = writer.input(3), writer.input(4)
    before = 0 if past_key is None else writer.size(past_key, 2)
    if attribute(node, "do_rotary", 0):
        if 2 * writer.size(writer.needed(7), 1) != width:
            raise _KeptError("it turns a part of each head")
        places = writer.constant(np.arange(before, before + length), np.int64, "places")
        tables = [writer.op("Gather", writer.needed(at), places) for at in (7, 8)]
        query, key = (_turned(writer, tensor, tables) for tensor in (query, key))
    if past_key is not None and past_value is not None:
        key = writer.op("Concat", past_key, key, axis=2)
        value = writer.op("Concat", past_value, value, axis=2)
    present = {1: key, 2: value}
    if heads != shared:
        # Each key serves a run of queries that lie side by side.
        order = writer.constant(
            np.repeat(np.arange(shared), heads // shared), np.int64, "served"
        )
        key, value = (writer.op("Gather", t, order, axis=1) for t in (key, value))
    span = int(attribute(node, "local_window_size", -1))
    hidden = _later(writer, length, before + length, span)
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(width)
    made = _attended(writer, query, key, value, scale, [hidden])
    return {0: _joined(writer, made), **present}


def _low_bits(writer: _Writer) -> Mapping[int, gs.Tensor]:
    """The weight decoded: (code - zero) * scale, in blocks of inputs."""
    node = writer.node
    writer.absent(4)
    inner, outputs = (int(attribute(node, name)) for name in ("K", "N"))
    bits = int(attribute(node, "bits", 4))
    block = int(attribute(node, "block_size"))
    held = [None if t is None else writer.model.constant(t) for t in node.inputs[1:4]]
    if bits not in (2, 4, 8) or any(weight is None for weight in held[:2]):
        raise _KeptError("its codes are not constant, or of a width of their own")
    codes, scale = (weight.read() for weight in held[:2] if weight is not None)
    blocks = -(-inner // block)
    whole = _unpacked(codes.reshape(outputs, blocks, -1), bits)[..., :block]
    zero: Array = np.full((outputs, blocks), 1 << (bits - 1), np.float64)
    if len(held) > 2 and held[2] is not None:
        given = held[2].read()
        if given.dtype.kind == "f":
            zero = given.reshape(outputs, blocks).astype(np.float64)
        else:
            zero = _unpacked(given.reshape(outputs, -1), bits)[:, :blocks]
    steps = scale.reshape(outputs, blocks, 1).astype(np.float64)
    values = ((whole - zero[..., None]) * steps).reshape(outputs, -1)[:, :inner]
    weight = writer.constant(values.T, writer.dtype(writer.first), "weight")
    made = writer.op("MatMul", writer.first, weight)
    return {0: writer.add(made, writer.input(5))}


def _unpacked(codes: Array, bits: int) -> Array:
    """Return codes packed along the last axis, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = codes[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return apart.reshape(*codes.shape[:-1], -1).astype(np.float64)


_OPTIMIZED: Mapping[str, Expansion] = {
    "Attention": _attention,
    "BiasGelu": _bias_gelu,
    "EmbedLayerNormalization": _embedding,
    "FastGelu": _fast_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_norm,
}
"""What onnxruntime's optimizer writes, and puts together again when it loads."""

_OTHERS: Mapping[str, Expansion] = {
    "GroupQueryAttention": _group_query,
    "MatMulNBits": _low_bits,
    "MultiHeadAttention": _multi_head,
    "SimplifiedLayerNormalization": _simplified_norm,
}
"""What is expanded for training alone."""


def is_fused(node: gs.Node) -> bool:
    """Whether onnxruntime's optimizer makes such nodes of several ONNX operators."""
    return node.domain == _MICROSOFT and node.op in _OPTIMIZED


def expand(model: Model, *, training: bool = False) -> dict[str, str]:
    """Write operators of com.microsoft as the ONNX operators they are made of.

    Args:
        model: The model, changed in place.
        training: Write all that is known, for gradients; else only what onnxruntime's
            optimizer puts together again when it loads the model.

    Returns:
        Why a node was left as it is, by its name or first output.
    """
    kept: dict[str, str] = {}
    rules = {**_OPTIMIZED, **(_OTHERS if training else {})}
    done: set[int] = set()
    while True:
        found = [
            (graph, node)
            for graph in model.graphs()
            for node in graph.nodes
            if node.op in rules and id(node) not in done
            if node.domain == _MICROSOFT
            or (node.op == "SimplifiedLayerNormalization" and is_onnx(node.domain))
        ]
        if not found:
            return kept
        infos = value_infos(model)
        for graph, node in found:
            done.add(id(node))
            where = node.name or node.outputs[0].name
            before = list(graph.nodes)
            writer = _Writer(model, graph, infos, node)
            try:
                made = rules[node.op](writer)
            except (_KeptError, ModelError, IndexError, KeyError) as error:
                kept[where] = f"{node.op} stays as it is: {error}"
                for other in [n for n in graph.nodes if n not in before]:
                    model.remove(other, graph)
                continue
            writer.give(made)
