"""Expansions compute what onnxruntime's own kernels compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.rewriting.expansion import expand, is_fused
from onnxshrink.structure.inferred import value_infos
from onnxshrink.training.preparation import prepare

RANDOM = np.random.default_rng(0)
F = np.float32


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(F)


def model_of(
    op: str,
    feeds: dict[str, Any],
    weights: dict[str, Any],
    order: str,
    outputs: int = 1,
    opset: int = 20,
    domain: str = "com.microsoft",
    **attrs: Any,
) -> Model:
    """A node in front of Tanh, so that nothing behind gives away its type."""
    names = ["" if name == "-" else name for name in order.split()]
    made = [f"n{i}" for i in range(outputs)]
    outputs -= op == "EmbedLayerNormalization"  # its second is a number, not read here
    node = helper.make_node(op, names, made, "node", domain=domain, **attrs)
    behind = [
        helper.make_node("Tanh", [name], [f"y{i}"])
        for i, name in enumerate(made[:outputs])
    ]
    types = {k: helper.np_dtype_to_tensor_dtype(v.dtype) for k, v in feeds.items()}
    graph = helper.make_graph(
        [node, *behind],
        "one",
        [helper.make_tensor_value_info(k, types[k], v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(outputs)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return Model.load(helper.make_model(graph, ir_version=9, opset_imports=opsets))


X = {"x": normal(2, 5, 16)}
IMAGE = {"x": normal(2, 4, 7, 7)}
MASK = np.int32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
CODES = RANDOM.integers(0, 256, (8, 1, 16)).astype(np.uint8)

FUSED = {
    "matmul": (
        "FusedMatMul",
        X,
        {"w": normal(8, 16)},
        "x w",
        {"transB": 1, "alpha": 0.5},
    ),
    "matmul of two": (
        "FusedMatMul",
        {**X, "k": normal(2, 5, 16)},
        {},
        "x k",
        {"transB": 1},
    ),
    "gemm": (
        "FusedGemm",
        {"x": normal(3, 16)},
        {"w": normal(8, 16), "b": normal(8)},
        "x w b",
        {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.2},
    ),
    "conv": (
        "FusedConv",
        IMAGE,
        {"w": normal(6, 4, 3, 3), "b": normal(6)},
        "x w b",
        {"activation": "Relu", "pads": [1, 1, 1, 1]},
    ),
    "conv and sum": (
        "FusedConv",
        {**IMAGE, "z": normal(2, 6, 7, 7)},
        {"w": normal(6, 4, 3, 3), "b": normal(6)},
        "x w b z",
        {"activation": "Relu", "pads": [1, 1, 1, 1]},
    ),
    "conv and clip": (
        "FusedConv",
        IMAGE,
        {"w": normal(6, 2, 3, 3)},
        "x w",
        {"activation": "Clip", "activation_params": [0.0, 6.0], "group": 2},
    ),
    "gelu": ("Gelu", X, {}, "x", {}),
    "bias gelu": ("BiasGelu", X, {"b": normal(16)}, "x b", {}),
    "fast gelu": ("FastGelu", X, {"b": normal(16)}, "x b", {}),
    "quick gelu": ("QuickGelu", X, {}, "x", {"alpha": 1.5}),
    "skip norm": (
        "SkipLayerNormalization",
        {**X, "s": normal(2, 5, 16)},
        {"g": normal(16), "b": normal(16), "c": normal(16)},
        "x s g b c",
        {"epsilon": 1e-5},
    ),
    "skip rms": (
        "SkipSimplifiedLayerNormalization",
        {**X, "s": normal(2, 5, 16)},
        {"g": normal(16)},
        "x s g",
        {"epsilon": 1e-5},
    ),
    "attention": (
        "Attention",
        {**X, "m": MASK},
        {"w": normal(16, 48) / F(4), "b": normal(48)},
        "x w b m",
        {"num_heads": 4},
    ),
    "causal attention": (
        "Attention",
        X,
        {"w": normal(16, 48) / F(4), "b": normal(48)},
        "x w b",
        {"num_heads": 4, "unidirectional": 1},
    ),
    "embedding": (
        "EmbedLayerNormalization",
        {"i": np.int32([[1, 2, 3], [4, 5, 6]]), "t": np.int32([[0, 0, 1], [0, 1, 1]])},
        {
            "w": normal(9, 16),
            "p": normal(7, 16),
            "s": normal(2, 16),
            "g": normal(16),
            "b": normal(16),
        },
        "i t w p s g b",
        {"epsilon": 1e-5},
    ),
}
TRAINED = {
    "rms": ("SimplifiedLayerNormalization", X, {"g": normal(16)}, "x g", {"axis": -1}),
    "heads": (
        "MultiHeadAttention",
        {"x": normal(2, 5, 16), "k": normal(2, 5, 16), "v": normal(2, 5, 8), "m": MASK},
        {"b": normal(40)},
        "x k v b m",
        {"num_heads": 4},
    ),
    "causal heads": (
        "MultiHeadAttention",
        {"x": normal(2, 5, 16), "k": normal(2, 5, 16), "v": normal(2, 5, 16)},
        {},
        "x k v",
        {"num_heads": 4, "unidirectional": 1, "scale": 0.3},
    ),
    "shared keys": (
        "GroupQueryAttention",
        {
            "x": normal(1, 5, 64),
            "k": normal(1, 5, 32),
            "v": normal(1, 5, 32),
            "pk": normal(1, 2, 3, 16),
            "pv": normal(1, 2, 3, 16),
        },
        {
            "n": np.int32([7]),
            "t": np.int32(8),
            "cos": np.cos(np.arange(96, dtype=F)).reshape(12, 8),
            "sin": np.sin(np.arange(96, dtype=F)).reshape(12, 8),
        },
        "x k v pk pv n t cos sin",
        {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
    ),
    "low bits": (
        "MatMulNBits",
        {"x": normal(3, 32)},
        {"q": CODES, "s": np.abs(normal(8))},
        "x q s",
        {"K": 32, "N": 8, "bits": 4, "block_size": 32},
    ),
    "low bits and zeros": (
        "MatMulNBits",
        {"x": normal(3, 32)},
        {"q": CODES, "s": np.abs(normal(8)), "z": np.arange(8, dtype=np.uint8)},
        "x q s z",
        {"K": 32, "N": 8, "bits": 4, "block_size": 32},
    ),
}


def answers(model: Model, feeds: dict[str, Any]) -> list[Any]:
    made = runtime.session(model, threads=1, optimize="off")
    return list(made.run(feeds).values())


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("name", FUSED)
def test_what_the_optimizer_writes_is_written_apart(name: str, opset: int) -> None:
    op, feeds, weights, order, attrs = FUSED[name]
    count = 2 if op == "EmbedLayerNormalization" else 1
    model = model_of(op, feeds, weights, order, count, opset, **attrs)
    wanted = answers(model, feeds)
    assert expand(model) == {}
    assert not any(is_fused(node) for node in model.nodes())
    model.graph.output_info.clear()
    model.graph.outputs[0].shape = wanted[0].shape
    onnx.checker.check_model(model.to_proto())
    np.testing.assert_allclose(answers(model, feeds)[0], wanted[0], atol=2e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_training_sees_onnx_operators_alone(name: str) -> None:
    op, feeds, weights, order, attrs = TRAINED[name]
    count = 3 if op == "GroupQueryAttention" else 1
    domain = "" if op == "SimplifiedLayerNormalization" else "com.microsoft"
    model = model_of(op, feeds, weights, order, count, domain=domain, **attrs)
    wanted = answers(model, feeds)
    assert expand(model.copy()) == {}
    prepared = prepare(model, {k: v.shape for k, v in feeds.items()})
    assert not any(node.domain for node in prepared.nodes())
    used = {info.name for info in prepared.inputs}
    got = answers(prepared, {k: v for k, v in feeds.items() if k in used})
    for one, two in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_what_has_no_form_in_onnx_stays_and_says_why() -> None:
    weights = {"w": normal(16, 48), "b": normal(48)}
    model = model_of("Attention", X, weights, "x w b", num_heads=4, do_rotary=1)
    before = model.to_bytes()
    (why,) = expand(model).values()
    assert why == "Attention stays as it is: it turns or keeps its keys"
    assert model.to_bytes() == before


def test_types_behind_operators_of_onnxruntime_come_from_it() -> None:
    op, feeds, weights, order, attrs = FUSED["attention"]
    model = model_of(op, feeds, weights, order, **attrs)
    before = model.to_bytes()
    assert "n0" not in model.infer_shapes()
    info = value_infos(model)["n0"]
    assert (info.data_type, info.shape) == (TensorProto.FLOAT, (2, 5, 16))
    assert value_infos(model)["y0"].shape == (2, 5, 16)
    assert model.to_bytes() == before
