"""Small language models as exporters write them, with seeded weights.

Of the Llama kind: RMS norm, rotary positions, grouped keys and values, a gated feed
forward, and a table of tokens that is also the head. ``fused`` writes the operators of
com.microsoft that onnxruntime-genai's models have.

Tested in tests/validation/test_tokens.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["decoder"]

Array = NDArray[Any]


def decoder(
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    groups: int = 2,
    inner: int = 128,
    vocabulary: int = 500,
    past: bool = False,
    fused: bool = False,
    seed: int = 0,
) -> onnx.ModelProto:
    """Return a decoder: ``input_ids`` [batch, sequence] to ``logits``.

    Args:
        layers: Blocks.
        width: Channels between blocks.
        heads: Heads of queries.
        groups: Heads of keys and values.
        inner: Channels inside the feed forward.
        vocabulary: Tokens.
        past: Keys and values of earlier tokens are inputs, ``past_key_values.0.key``
            [batch, groups, past, width / heads], and with the new ones outputs,
            ``present.0.key``; ``attention_mask`` covers both.
        fused: GroupQueryAttention and SkipSimplifiedLayerNormalization, with a past.
        seed: Of the weights.
    """
    build = _Build(width // heads, heads, groups, past or fused, seed)
    table = build.weight("embed", (vocabulary, width), 0.5)
    x = build.node("Gather", table, "input_ids")
    if build.past:
        build.inputs.append(_info("attention_mask", ["batch", "total"], True))
    if fused:
        build.lengths()
    else:
        build.positions()
    skip = ""
    for index in range(layers):
        block = _Block(build, f"layers.{index}.", width, inner, fused)
        x, skip = block.write(x, skip, index)
    if fused:
        y = build.norm(x, "norm", width, skip)[0]
    else:
        y = build.norm(x, "norm", width)[0]
    head = build.node("Transpose", table, perm=[1, 0])
    build.node("MatMul", y, head, out="logits")
    graph = helper.make_graph(
        build.nodes,
        "decoder",
        [_info("input_ids", ["batch", "sequence"], True), *build.inputs],
        [_info("logits", ["batch", "sequence", vocabulary]), *build.outputs],
        build.initializers,
    )
    opsets = [helper.make_opsetid("", 17)]
    if fused:
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _info(name: str, shape: list[Any], whole: bool = False) -> onnx.ValueInfoProto:
    kind = TensorProto.INT64 if whole else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, shape)


@dataclass
class _Build:
    """Nodes and weights as they are put together."""

    size: int
    heads: int
    groups: int
    past: bool
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(self.seed)

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        if not any(one.name == name for one in self.initializers):
            self.initializers.append(
                numpy_helper.from_array(np.asarray(value, dtype), name)
            )
        return name

    def weight(self, name: str, shape: tuple[int, ...], scale: float = 0.0) -> str:
        scale = scale or 1 / np.sqrt(shape[0])
        return self.constant(name, self.draw.normal(0, scale, shape), np.float32)

    def node(
        self, op: str, *inputs: str, out: str = "", domain: str = "", **attrs: Any
    ) -> str:
        out = out or f"{op}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(
                op, list(inputs), [out], f"/{out}", domain=domain or None, **attrs
            )
        )
        return out

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        return self.node("MatMul", x, self.weight(f"{name}.weight", (inputs, outputs)))

    def norm(self, x: str, name: str, width: int, skip: str = "") -> tuple[str, str]:
        """Return the normalised value, and the sum with what is skipped."""
        gain = self.constant(
            f"{name}.weight", 1 + 0.1 * self.draw.normal(size=width), np.float32
        )
        if skip:
            made = [f"{name}.out", "", "", f"{name}.sum"]
            self.nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    [x, skip, gain],
                    made,
                    f"/{name}",
                    domain="com.microsoft",
                    epsilon=1e-5,
                )
            )
            return made[0], made[3]
        square = self.node("Pow", x, self.constant("two", 2.0, np.float32))
        mean = self.node("ReduceMean", square, axes=[-1])
        mean = self.node("Add", mean, self.constant("eps", 1e-5, np.float32))
        scaled = self.node("Div", x, self.node("Sqrt", mean))
        return self.node("Mul", scaled, gain), x

    def _angles(self, count: int = 512) -> Array:
        steps = 10000.0 ** (np.arange(0, self.size, 2) / self.size)
        return np.asarray(np.arange(count)[:, None] / steps)

    def lengths(self) -> None:
        """Write what GroupQueryAttention asks: lengths and angles."""
        one = self.constant("one", [1])
        total = self.node("ReduceSum", "attention_mask", one, keepdims=1)
        behind = self.node("Sub", total, one)
        self.node("Cast", behind, out="lengths", to=TensorProto.INT32)
        shape = self.node("Shape", "attention_mask")
        size = self.node("Gather", shape, self.constant("first", 1))
        self.node("Cast", size, out="total", to=TensorProto.INT32)
        self.constant("cos", np.cos(self._angles()), np.float32)
        self.constant("sin", np.sin(self._angles()), np.float32)

    def positions(self) -> None:
        """Write angles of the new positions, and the mask of what they may see."""
        one, zero = self.constant("one", [1]), self.constant("zero", [0])
        shape = self.node("Shape", "input_ids")
        new = self.node("Slice", shape, one, self.constant("two_", [2]), zero)
        start = zero
        if self.past:
            full = self.node("Shape", "past_key_values.0.key")
            start = self.node("Slice", full, self.constant("two_", [2]), "three", zero)
            self.constant("three", [3])
        stop = self.node("Add", start, new)
        angles = np.tile(self._angles(), 2)
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            whole = self.constant(f"{name}.table", table, np.float32)
            self.node("Slice", whole, start, stop, zero, out=name)
        scalar = self.constant("none", 0)
        end = self.node("Squeeze", stop)
        step = self.constant("step", 1)
        keys = self.node("Range", scalar, end, step)
        queries = self.node("Range", self.node("Squeeze", start), end, step)
        later = self.node("Greater", keys, self.node("Unsqueeze", queries, one))
        minus = self.constant("minus", -1e4, np.float32)
        nothing = self.constant("nothing", 0.0, np.float32)
        mask = self.node("Where", later, minus, nothing)
        if not self.past:
            self.node("Identity", mask, out="mask")
            return
        shown = self.node("Cast", "attention_mask", to=TensorProto.BOOL)
        hidden = self.node("Where", shown, nothing, minus)
        axes = self.constant("middle", [1, 2])
        self.node("Add", mask, self.node("Unsqueeze", hidden, axes), out="mask")


@dataclass
class _Block:
    """One block of the decoder."""

    build: _Build
    name: str
    width: int
    inner: int
    fused: bool

    def write(self, x: str, skip: str, index: int) -> tuple[str, str]:
        build = self.build
        y, x = build.norm(x, f"{self.name}input_norm", self.width, skip)
        attended = self._attention(y, index)
        if not self.fused:
            x = build.node("Add", x, attended)
            y, _ = build.norm(x, f"{self.name}post_norm", self.width)
            return build.node("Add", x, self._forward(y)), ""
        y, x = build.norm(x, f"{self.name}post_norm", self.width, attended)
        return x, self._forward(y)

    def _forward(self, x: str) -> str:
        build = self.build
        gate = build.linear(x, f"{self.name}gate", self.width, self.inner)
        up = build.linear(x, f"{self.name}up", self.width, self.inner)
        silu = build.node("Mul", gate, build.node("Sigmoid", gate))
        both = build.node("Mul", silu, up)
        return build.linear(both, f"{self.name}down", self.inner, self.width)

    def _attention(self, x: str, index: int) -> str:
        build = self.build
        size, heads, groups = build.size, build.heads, build.groups
        q = build.linear(x, f"{self.name}q", self.width, heads * size)
        k = build.linear(x, f"{self.name}k", self.width, groups * size)
        v = build.linear(x, f"{self.name}v", self.width, groups * size)
        cache = []
        if build.past:
            for kind in ("key", "value"):
                shape = ["batch", groups, "past", size]
                cache.append(f"past_key_values.{index}.{kind}")
                build.inputs.append(_info(cache[-1], shape))
                shape = ["batch", groups, "total", size]
                build.outputs.append(_info(f"present.{index}.{kind}", shape))
        if self.fused:
            build.nodes.append(
                helper.make_node(
                    "GroupQueryAttention",
                    [q, k, v, *cache, "lengths", "total", "cos", "sin"],
                    [
                        f"{self.name}out",
                        f"present.{index}.key",
                        f"present.{index}.value",
                    ],
                    f"/{self.name}attention",
                    domain="com.microsoft",
                    num_heads=heads,
                    kv_num_heads=groups,
                    do_rotary=1,
                )
            )
            found = f"{self.name}out"
        else:
            found = self._plain_attention(q, k, v, cache, index)
        return build.linear(found, f"{self.name}o", heads * size, self.width)

    def _plain_attention(
        self, q: str, k: str, v: str, cache: list[str], index: int
    ) -> str:
        build, size = self.build, self.build.size

        def split(x: str, heads: int) -> str:
            shape = build.constant(f"heads.{heads}", [0, 0, heads, size])
            return build.node(
                "Transpose", build.node("Reshape", x, shape), perm=[0, 2, 1, 3]
            )

        def turned(x: str) -> str:
            low, high = build.constant("low", [0]), build.constant("half", [size // 2])
            end, axis = build.constant("size", [size]), build.constant("axis", [3])
            first = build.node("Slice", x, low, high, axis)
            second = build.node("Slice", x, high, end, axis)
            rotated = build.node("Concat", build.node("Neg", second), first, axis=-1)
            return build.node(
                "Add", build.node("Mul", x, "cos"), build.node("Mul", rotated, "sin")
            )

        q, k = turned(split(q, build.heads)), turned(split(k, build.groups))
        v = split(v, build.groups)
        if cache:
            k = build.node("Concat", cache[0], k, axis=2, out=f"present.{index}.key")
            v = build.node("Concat", cache[1], v, axis=2, out=f"present.{index}.value")
        k, v = self._repeated(k), self._repeated(v)
        scores = build.node("MatMul", q, build.node("Transpose", k, perm=[0, 1, 3, 2]))
        scale = build.constant("scale", size**-0.5, np.float32)
        scores = build.node("Add", build.node("Mul", scores, scale), "mask")
        mixed = build.node("MatMul", build.node("Softmax", scores, axis=-1), v)
        mixed = build.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return build.node(
            "Reshape", mixed, build.constant("join", [0, 0, build.heads * size])
        )

    def _repeated(self, x: str) -> str:
        """Repeat keys or values for the queries of a group."""
        build = self.build
        each = build.heads // build.groups
        wide = build.node("Unsqueeze", x, build.constant("axis_2", [2]))
        wide = build.node("Expand", wide, build.constant("each", [1, 1, each, 1, 1]))
        shape = build.constant("all_heads", [0, build.heads, -1, build.size])
        return build.node("Reshape", wide, shape)
