"""Attention and com.microsoft: heads and channels that are free, and that they can go.

Each claim is held against onnxruntime: removed is the same as weighed with zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.structure import channels
from onnxshrink.structure.channels import Group

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A graph with weights, seeded random where they are given by shape.

    Attributes:
        text: Nodes.
        weights: Constants by name.
        free: For groups, by the weight that makes them, how many channels they have.
        fixed: For others part of the reason why they cannot be removed.
        inexact: Part of the reason why outputs change, for all of them; or empty.
        x: Type and shape of the input.
        y: The same of the first output.
        more: Further inputs, as text.
        feeds: Their values.
        outs: Further outputs, as text.
        opset: Version of ai.onnx.
    """

    text: str
    weights: Mapping[str, Sequence[int] | Array]
    free: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    inexact: str = ""
    x: str = "float[2,5,8] x"
    y: str = "float[A,B,C] y"
    more: str = ""
    feeds: Mapping[str, Array] = field(default_factory=dict)
    outs: str = ""
    opset: int = 17

    def model(self) -> Model:
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {self.opset}, "com.microsoft" : 1]> '
            f"example ({self.x}{self.more}) => ({self.y}{self.outs}) {{ {self.text} }}"
        )
        rng = np.random.default_rng(0)
        for name, value in self.weights.items():
            array = (
                value
                if isinstance(value, np.ndarray)
                else rng.standard_normal(value).astype(np.float32)
            )
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return Model.load(proto)


def angles(width: int, positions: int = 16) -> dict[str, Array]:
    turns = np.outer(np.arange(positions), 10000.0 ** -(np.arange(width) / width))
    return {
        "cosines": np.cos(turns).astype(np.float32),
        "sines": np.sin(turns).astype(np.float32),
    }


QKV = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
OUT = "y = MatMul(a, out)"
SQUARE: dict[str, Any] = {"wq": (8, 12), "wk": (8, 12), "wv": (8, 12), "out": (12, 8)}
SHARED: dict[str, Any] = {
    "wq": (8, 32),
    "wk": (8, 16),
    "wv": (8, 16),
    "out": (32, 8),
}
PAST = (
    ", float[1,2,3,8] past_k, float[1,2,3,8] past_v",
    {n: np.ones((1, 2, 3, 8), np.float32) for n in ("past_k", "past_v")},
    ", float[1,2,8,8] now_k, float[1,2,8,8] now_v",
)
LENGTHS = {
    "last": np.array([4, 4], np.int32),
    "total": np.array(5, np.int32),
    "last8": np.array([7], np.int32),
    "total8": np.array(8, np.int32),
}
FEED = "u = MatMul(x, w) "
BACK = " y = MatMul(a, out)"
WIDE: dict[str, Any] = {"w": (8, 6), "out": (6, 8)}
MS = "com.microsoft"

CASES = {
    "MultiHeadAttention": Case(
        QKV + f"a = {MS}.MultiHeadAttention<num_heads = 3>(q, k, v, b) " + OUT,
        {**SQUARE, "b": (36,)},
        {"wq": 3},
    ),
    "MultiHeadAttention with a mask for each head": Case(
        QKV + f'a = {MS}.MultiHeadAttention<num_heads = 3>(q, k, v, "", "", m) ' + OUT,
        {**SQUARE, "m": (1, 3, 5, 5)},
        {"wq": 3},
    ),
    "MultiHeadAttention with wider values": Case(
        QKV + f"a = {MS}.MultiHeadAttention<num_heads = 3>(q, k, v, b) " + OUT,
        {**SQUARE, "wv": (8, 18), "out": (18, 8), "b": (12 + 12 + 18,)},
        {"wv": 3},
    ),
    "Attention of com.microsoft": Case(
        f"a = {MS}.Attention<num_heads = 3>(x, w, b) " + OUT,
        {"w": (8, 36), "b": (36,), "out": (12, 8)},
        {"w": 3},
    ),
    "Attention of com.microsoft with sizes": Case(
        f"a = {MS}.Attention<num_heads = 3, qkv_hidden_sizes = [12, 12, 18]>(x, w, b) "
        + OUT,
        {"w": (8, 42), "b": (42,), "out": (18, 8)},
        {"w": 3},
    ),
    "Attention of com.microsoft behind a layer": Case(
        FEED + f"a = {MS}.Attention<num_heads = 3>(u, qkv, b) " + OUT,
        {"w": (8, 6), "qkv": (6, 36), "b": (36,), "out": (12, 8)},
        {"w": 6, "qkv": 3},
    ),
    "GroupQueryAttention": Case(
        QKV
        + f"a, nk, nv = {MS}.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>"
        + '(q, k, v, "", "", last, total) '
        + OUT,
        {**SHARED, **LENGTHS},
        {"wq": 2},
    ),
    "GroupQueryAttention, turned": Case(
        QKV
        + f"a, nk, nv = {MS}.GroupQueryAttention"
        + "<num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
        + '(q, k, v, "", "", last, total, cosines, sines) '
        + OUT,
        {
            **SHARED,
            **angles(8),
            **LENGTHS,
            "wq": (8, 64),
            "wk": (8, 32),
            "wv": (8, 32),
            "out": (64, 8),
        },
        {"wq": 2},
    ),
    "GroupQueryAttention, packed": Case(
        f"q = MatMul(x, wq) a, nk, nv = {MS}.GroupQueryAttention"
        '<num_heads = 4, kv_num_heads = 2>(q, "", "", "", "", last, total) ' + OUT,
        {"wq": (8, 64), "out": (32, 8), **LENGTHS},
        {"wq": 2},
    ),
    "GroupQueryAttention with a cache": Case(
        QKV
        + f"a, now_k, now_v = {MS}.GroupQueryAttention"
        + "<num_heads = 4, kv_num_heads = 2>"
        + "(q, k, v, past_k, past_v, last8, total8) "
        + OUT,
        {**SHARED, **LENGTHS},
        {"wq": 2},
        {"wk": "of the model"},
        x="float[1,5,8] x",
        more=PAST[0],
        feeds=PAST[1],
        outs=PAST[2],
    ),
    "Attention of ONNX": Case(
        QKV + "a = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v) " + OUT,
        SHARED,
        {"wq": 2},
        opset=23,
    ),
    "Attention of ONNX with four axes": Case(
        QKV
        + "q4 = Reshape(q, hq) k4 = Reshape(k, hk) v4 = Reshape(v, hk) "
        + "qt = Transpose<perm = [0, 2, 1, 3]>(q4) "
        + "kt = Transpose<perm = [0, 2, 1, 3]>(k4) "
        + "vt = Transpose<perm = [0, 2, 1, 3]>(v4) a4 = Attention(qt, kt, vt) "
        + "at = Transpose<perm = [0, 2, 1, 3]>(a4) a = Reshape(at, flat) "
        + OUT,
        {
            **SHARED,
            "hq": np.array([0, 0, 4, 8]),
            "hk": np.array([0, 0, 2, 8]),
            "flat": np.array([0, 0, -1]),
        },
        {"wq": 2},
        opset=23,
    ),
    "RotaryEmbedding of com.microsoft": Case(
        QKV
        + f"r = {MS}.RotaryEmbedding(q, at, cosines, sines) "
        + f"s = {MS}.RotaryEmbedding(k, at, cosines, sines) "
        + f"a = {MS}.MultiHeadAttention<num_heads = 3>(r, s, v) "
        + OUT,
        {
            **SQUARE,
            **angles(2),
            "at": np.tile(np.arange(5), (2, 1)),
        },
        {"wq": 3},
    ),
    "RotaryEmbedding of ONNX": Case(
        QKV
        + "r = RotaryEmbedding<num_heads = 4>(q, cosines, sines, at) "
        + "s = RotaryEmbedding<num_heads = 2>(k, cosines, sines, at) "
        + "a = Attention<q_num_heads = 4, kv_num_heads = 2>(r, s, v) "
        + OUT,
        {
            **SHARED,
            **angles(4),
            "at": np.tile(np.arange(5), (2, 1)),
        },
        {"wq": 2},
        opset=23,
    ),
    "keys and values repeated by Expand": Case(
        QKV
        + "q4 = Reshape(q, hq) k4 = Reshape(k, hk) v4 = Reshape(v, hk) "
        + "qt = Transpose<perm = [0, 2, 1, 3]>(q4) "
        + "kt = Transpose<perm = [0, 2, 1, 3]>(k4) "
        + "vt = Transpose<perm = [0, 2, 1, 3]>(v4) "
        + "ku = Unsqueeze(kt, two) ke = Expand(ku, wide) kr = Reshape(ke, all) "
        + "vu = Unsqueeze(vt, two) ve = Expand(vu, wide) vr = Reshape(ve, all) "
        + "kk = Transpose<perm = [0, 1, 3, 2]>(kr) s = MatMul(qt, kk) "
        + "p = Softmax(s) a4 = MatMul(p, vr) "
        + "at = Transpose<perm = [0, 2, 1, 3]>(a4) a = Reshape(at, flat) "
        + OUT,
        {
            **SHARED,
            "hq": np.array([0, 0, 4, 8]),
            "hk": np.array([0, 0, 2, 8]),
            "two": np.array([2]),
            "wide": np.array([2, 2, 2, 5, 8]),
            "all": np.array([2, 4, 5, 8]),
            "flat": np.array([0, 0, 32]),
        },
        {"wq": 2},
    ),
    "rotary embeddings by halves": Case(
        QKV
        + "q4 = Reshape(q, hq) k4 = Reshape(k, hq) v4 = Reshape(v, hq) "
        + "qt = Transpose<perm = [0, 2, 1, 3]>(q4) "
        + "kt = Transpose<perm = [0, 2, 1, 3]>(k4) "
        + "vt = Transpose<perm = [0, 2, 1, 3]>(v4) "
        + "q1 = Slice(qt, zero, half, last) q2 = Slice(qt, half, end, last) "
        + "qn = Neg(q2) qr = Concat<axis = -1>(qn, q1) "
        + "qc = Mul(qt, cosines) qs = Mul(qr, sines) qq = Add(qc, qs) "
        + "k1 = Slice(kt, zero, half, last) k2 = Slice(kt, half, end, last) "
        + "kn = Neg(k2) kr = Concat<axis = -1>(kn, k1) "
        + "kc = Mul(kt, cosines) ks = Mul(kr, sines) kk = Add(kc, ks) "
        + "kz = Transpose<perm = [0, 1, 3, 2]>(kk) s = MatMul(qq, kz) "
        + "p = Softmax(s) a4 = MatMul(p, vt) "
        + "at = Transpose<perm = [0, 2, 1, 3]>(a4) a = Reshape(at, flat) "
        + OUT,
        {
            **SQUARE,
            "hq": np.array([0, 0, 3, 4]),
            "zero": np.array([0]),
            "half": np.array([2]),
            "end": np.array([2**40]),
            "last": np.array([3]),
            "cosines": (5, 4),
            "sines": (5, 4),
            "flat": np.array([0, 0, 12]),
        },
        {"wq": 3},
    ),
    "SkipLayerNormalization": Case(
        FEED
        + "v = MatMul(x, w2) "
        + f'n, "", "", t = {MS}.SkipLayerNormalization(u, v, g, s, c) '
        + "a = Add(n, t)"
        + BACK,
        {**WIDE, "w2": (8, 6), "g": (6,), "s": (6,), "c": (6,)},
        {"w": 6},
        inexact="SkipLayerNormalization takes the variance along it",
    ),
    "SkipSimplifiedLayerNormalization": Case(
        FEED
        + f"v = MatMul(x, w2) a = {MS}.SkipSimplifiedLayerNormalization(u, v, g)"
        + BACK,
        {**WIDE, "w2": (8, 6), "g": (6,)},
        {"w": 6},
        inexact="takes the variance along it",
    ),
    "RMSNormalization": Case(
        FEED + "a = RMSNormalization(u, g)" + BACK,
        {**WIDE, "g": (6,)},
        {"w": 6},
        inexact="takes the variance along it",
        opset=23,
    ),
    "EmbedLayerNormalization": Case(
        f'n, m = {MS}.EmbedLayerNormalization(x, "", words, places, "", g, s) '
        "y = MatMul(n, out)",
        {"words": (9, 6), "places": (5, 6), "g": (6,), "s": (6,), "out": (6, 8)},
        {"words": 6},
        inexact="takes the variance along it",
        x="int32[2,5] x",
    ),
    "BiasGelu": Case(
        FEED + f"a = {MS}.BiasGelu(u, b)" + BACK, {**WIDE, "b": (6,)}, {"w": 6}
    ),
    "FastGelu": Case(
        FEED + f"a = {MS}.FastGelu(u, b)" + BACK, {**WIDE, "b": (6,)}, {"w": 6}
    ),
    "FastGelu without a bias": Case(
        FEED + f"a = {MS}.FastGelu(u)" + BACK, WIDE, {"w": 6}
    ),
    "QuickGelu": Case(FEED + f"a = {MS}.QuickGelu(u)" + BACK, WIDE, {"w": 6}),
    "Gelu of com.microsoft": Case(FEED + f"a = {MS}.Gelu(u)" + BACK, WIDE, {"w": 6}),
    "a gate of two halves": Case(
        FEED + "g, v = Split<axis = 2>(u, parts) s = Sigmoid(g) a = Mul(s, v)" + BACK,
        {"w": (8, 12), "parts": np.array([6, 6]), "out": (6, 8)},
        {"w": 6},
    ),
    "FusedMatMul": Case(
        f"u = {MS}.FusedMatMul<transB = 1, alpha = 0.5>(x, w) "
        f"y = {MS}.FusedMatMul<transB = 1>(u, out)",
        {"w": (6, 8), "out": (8, 6)},
        {"w": 6},
    ),
    "FusedGemm": Case(
        f'u = {MS}.FusedGemm<transB = 1, activation = "Relu">(x, w, b) '
        "y = MatMul(u, out)",
        {"w": (6, 8), "b": (6,), "out": (6, 8)},
        {"w": 6},
        x="float[5,8] x",
        y="float[A,B] y",
    ),
    "FusedConv": Case(
        f'u = {MS}.FusedConv<activation = "Relu">(x, w, b) v = Conv(x, w2) '
        f'a = {MS}.FusedConv<activation = "Relu", pads = [1, 1, 1, 1]>(u, m, b, v) '
        "p = MaxPool<kernel_shape = [2, 2]>(a) f = Flatten(p) y = MatMul(f, out)",
        {
            "w": (6, 8, 1, 1),
            "w2": (6, 8, 1, 1),
            "b": (6,),
            "m": (6, 6, 3, 3),
            "out": (96, 3),
        },
        {"w": 6},
        x="float[2,8,5,5] x",
        y="float[A,B] y",
    ),
    "codes with a scale for each block": Case(
        FEED + "d = DequantizeLinear<axis = 0, block_size = 2>(c, s) a = MatMul(u, d) "
        "y = MatMul(a, out)",
        {
            "w": (8, 6),
            "c": np.arange(-12, 12, dtype=np.int8).reshape(6, 4),
            "s": np.linspace(0.1, 1, 12, dtype=np.float32).reshape(3, 4),
            "out": (4, 2),
        },
        {"w": 3, "c": 4},
        opset=21,
    ),
    "codes that make and read": Case(
        "d = DequantizeLinear<axis = 1>(c, s, z) u = MatMul(x, d) r = Relu(u) "
        "e = DequantizeLinear<axis = 0>(c2, s2) f = Transpose<perm = [1, 0]>(e) "
        "y = MatMul(r, f)",
        {
            "c": np.arange(-24, 24, dtype=np.int8).reshape(8, 6),
            "s": np.linspace(0.1, 1, 6, dtype=np.float32),
            "z": np.arange(6, dtype=np.int8),
            "c2": np.arange(-9, 9, dtype=np.int8).reshape(3, 6),
            "s2": np.linspace(0.1, 1, 3, dtype=np.float32),
        },
        {"c": 6},
        opset=19,
    ),
}


def made_by(model: Model, weight: str) -> Group:
    """Return the group of the channels that a weight makes."""
    return next(
        one
        for one in channels.find(model)
        for part in one.where
        if part.weight.name == weight and part.role == "producer"
    )


def run(model: Model, case: Case) -> Array:
    info = next(i for i in model.inputs if i.name == "x")
    shape = [dim if isinstance(dim, int) else 2 for dim in info.shape or ()]
    rng = np.random.default_rng(1)
    x: Array = rng.standard_normal(shape).astype(np.float32)
    if "int32" in case.x:
        x = rng.integers(0, 9, shape, np.int32)
    session = runtime.session(model, threads=1, optimize="off")
    return np.asarray(session.run({"x": x, **case.feeds})["y"])


@pytest.mark.parametrize("name", CASES)
def test_heads_and_channels_that_are_free_can_go(name: str) -> None:
    case = CASES[name]
    for weight, size in case.free.items():
        model = case.model()
        one = made_by(model, weight)
        assert (one.size, one.why) == (size, "")
        assert case.inexact in one.inexact
        assert bool(one.inexact) == bool(case.inexact)
        # Channels that nothing weighs can go without a change of the outputs.
        for part in one.where:
            if part.role == "consumer":
                values = part.weight.read().copy()
                np.moveaxis(values, part.axis, 0)[part.offsets[1].ravel()] = 0
                model.set_weight(part.weight.name, values)
        wanted = run(model, case)
        one = made_by(model, weight)
        before = {part.weight.name: part.weight.shape for part in one.where}
        channels.remove(model, one, [i for i in range(one.size) if i != 1])
        model.check()
        found = run(model, case)
        assert found.shape == wanted.shape
        if not case.inexact:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert any(w.shape != before.get(w.name, w.shape) for w in model.weights())
    for weight, why in case.fixed.items():
        one = made_by(case.model(), weight)
        assert why in one.why
