"""Activations coded at run time: right sums, fused kernels, no saturation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.quantization import dynamic
from onnxshrink.quantization.dynamic import (
    PAIR,
    quantized,
    rewrite,
    safe_codes,
    safe_scale,
)
from onnxshrink.samples import Splits
from onnxshrink.solvers.rounding import Grid
from onnxshrink.structure.layers import LinearWeight, find
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
Array = np.ndarray[Any, Any]


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(text: str, opset: int = 17, **weights: Array) -> Model:
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    return Model.load(proto)


def layer_of(model: Model, name: str = "w") -> LinearWeight:
    layers = find(model, roles=("weight", "table"))
    return next(layer for layer in layers if layer.name == name)


def quantize(model: Model, name: str = "w") -> tuple[Grid, Array]:
    layer = layer_of(model, name)
    grid, codes = quantized(layer.layout.matrices(layer.weight.read())[0])
    rewrite(model, layer, grid, codes)
    model.drop_unused()
    return grid, codes


def run(model: Model, **feeds: Array) -> list[Array]:
    return list(runtime.session(model, threads=1).run(feeds).values())


def optimized(model: Model, tmp_path: Path) -> list[str]:
    """Return the operators onnxruntime really runs, sorted."""
    options = runtime._options(1, "all")
    target = tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(target)
    runtime._open(model.to_bytes(), options, ("CPUExecutionProvider",), "it")
    return sorted(node.op_type for node in onnx.load(target).graph.node)


def activation_codes(x: Array) -> tuple[Array, np.float32, Array]:
    """Codes, scale and zero point as the standard defines DynamicQuantizeLinear."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255), scale, zero


def reference(x: Array, grid: Grid, codes: Array) -> Array:
    rows, scale, zero = activation_codes(x)
    exact = (rows - zero).astype(np.int64) @ codes.T.astype(np.int64)
    product: Array = exact.astype(np.float32) * (scale * grid.scale[:, 0])
    return product


FORMS = {
    "matmul": ("{ y = MatMul(x, w) }", (64, 24), 1.0, 0.0),
    "gemm": ("{ y = Gemm(x, w, b) }", (64, 24), 1.0, 1.0),
    "gemm without bias": ("{ y = Gemm(x, w) }", (64, 24), 1.0, 0.0),
    "gemm transposed": ("{ y = Gemm<transB = 1>(x, w, b) }", (24, 64), 1.0, 1.0),
    "gemm scaled": (
        "{ y = Gemm<alpha = 0.5, beta = -2.0>(x, w, b) }",
        (64, 24),
        0.5,
        -2.0,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_codes(form: str, tmp_path: Path) -> None:
    body, shape, alpha, beta = FORMS[form]
    bias = values(24, seed=2)
    model = model_of(
        f"(float[5,64] x) => (float[5,24] y) {body}", w=values(*shape), b=bias
    )
    grid, codes = quantize(model)
    x = values(5, 64, seed=1)
    wanted = reference(x, grid, codes) * np.float32(alpha) + np.float32(beta) * bias
    np.testing.assert_allclose(run(model, x=x)[0], wanted, rtol=1e-5, atol=1e-5)
    fused = optimized(model, tmp_path)
    assert "DynamicQuantizeMatMul" in fused
    if form != "gemm scaled":
        assert fused == ["DynamicQuantizeMatMul"]
    assert not any(weight.nbytes == 4 * 64 * 24 for weight in model.weights())


def test_batches_of_matrices_share_one_scale() -> None:
    model = model_of(
        "(float[3,5,64] x) => (float[3,5,24] y) { y = MatMul(x, w) }", w=values(64, 24)
    )
    grid, codes = quantize(model)
    x = values(3, 5, 64, seed=1)
    np.testing.assert_allclose(
        run(model, x=x)[0], reference(x, grid, codes), rtol=1e-5, atol=1e-5
    )


def test_readers_of_one_value_share_its_codes(tmp_path: Path) -> None:
    model = model_of(
        """(float[5,64] x) => (float[5,24] q, float[5,24] k, float[5,24] v) {
            q = MatMul(x, a)
            k = MatMul(x, b)
            v = MatMul(x, c)
        }""",
        a=values(64, 24),
        b=values(64, 24, seed=1),
        c=values(64, 24, seed=2),
    )
    wanted = {name: quantize(model, name) for name in "abc"}
    x = values(5, 64, seed=3)
    for found, pair in zip(run(model, x=x), wanted.values(), strict=True):
        np.testing.assert_allclose(found, reference(x, *pair), rtol=1e-5, atol=1e-5)
    fused = optimized(model, tmp_path)
    assert fused == ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 3]


def test_a_weight_read_twice_is_kept_once() -> None:
    model = model_of(
        """(float[5,64] x) => (float[5,64] y) {
            a = MatMul(x, w)
            b = Relu(a)
            y = MatMul(b, w)
        }""",
        w=values(64, 64),
    )
    grid, codes = quantize(model)
    x = values(5, 64, seed=1)
    inner = np.maximum(reference(x, grid, codes), 0)
    wanted = reference(inner, grid, codes)
    np.testing.assert_allclose(run(model, x=x)[0], wanted, rtol=2e-2, atol=2.0)
    assert sum(weight.size == 64 * 64 for weight in model.weights()) == 1


def test_a_branch_reads_codes_from_outside() -> None:
    model = model_of(
        """(float[5,64] x, bool go) => (float[5,24] y) {
            y = If(go) <
                then_branch = yes () => (float[5,24] a) { a = MatMul(x, w) },
                else_branch = no () => (float[5,24] b) { b = MatMul(x, w) }
            >
        }""",
        w=values(64, 24),
    )
    grid, codes = quantize(model)
    x = values(5, 64, seed=1)
    wanted = reference(x, grid, codes)
    for go in (True, False):
        found = run(model, x=x, go=np.array(go))[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sums_never_saturate_whatever_the_activations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Neighbours of one sign meet activations of 255 and of zero point 0.
    weight = np.abs(values(64, 24, seed=seed)) * rng.choice([-1, 1], (1, 24))
    model = model_of(
        "(float[5,64] x) => (float[5,24] y) { y = MatMul(x, w) }",
        w=weight.astype(np.float32),
    )
    grid, codes = quantize(model)
    x = np.ones((5, 64), np.float32)
    np.testing.assert_allclose(
        run(model, x=x)[0], reference(x, grid, codes), rtol=1e-6, atol=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
)
def test_pairs_stay_within_sixteen_bits(
    outputs: int, inputs: int, seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((outputs, inputs)) * size).astype(np.float32)
    grid, codes = quantized(weight)
    assert (grid.scale > 0).all()
    assert np.isfinite(grid.scale).all()
    assert np.abs(codes).max() <= 127
    padded = np.pad(codes, ((0, 0), (0, inputs % 2))).reshape(outputs, -1, 2)
    sums = np.maximum(
        np.maximum(padded, 0).sum(axis=2), np.maximum(-padded, 0).sum(axis=2)
    )
    assert sums.max(initial=0) <= PAIR
    off = np.abs(codes * grid.scale.astype(np.float64) - weight)
    assert (off <= 1.51 * grid.scale).all()


def test_an_output_gives_up_no_more_range_than_it_must() -> None:
    weight = np.array([[1, 0, -1, 1], [1, 0.5, 0, 0], [1, 1, 0, 0]], np.float32)
    # Alone: 127 steps; 1.5 in 128 steps; 2 in 128 steps.
    wanted = np.array([1 / 127, 1.5 / 128, 2 / 128], np.float32)
    np.testing.assert_allclose(safe_scale(weight), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        safe_scale(weight, pairs=False), np.full(3, 1 / 127), rtol=1e-6
    )


def test_the_larger_of_a_pair_gives_way() -> None:
    codes = np.array([[100, 30, -127, -127, 127, -127, 127]], np.int32)
    wanted = np.array([[98, 30, -64, -64, 127, -127, 127]])
    np.testing.assert_array_equal(safe_codes(codes), wanted)


REFUSED = {
    "conv": (
        "(float[1,4,8,8] x) => (float y) { y = Conv(x, w) }",
        (4, 4, 3, 3),
        "no faster",
    ),
    "lstm": (
        "(float[5,2,8] x) => (float y) { y, h, c = LSTM<hidden_size = 4>(x, w, r) }",
        (1, 16, 8),
        "no integer operator",
    ),
    "left": ("(float[8,4] x) => (float y) { y = MatMul(w, x) }", (4, 8), "left"),
    "stack": ("(float[3,5,8] x) => (float y) { y = MatMul(x, w) }", (3, 8, 4), "stack"),
    "transposed": (
        "(float[8,5] x) => (float y) { y = Gemm<transA = 1>(x, w) }",
        (8, 4),
        "transposes",
    ),
    "table": ("(int64[5] x) => (float y) { y = Gather(w, x) }", (8, 4), "looks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_integer_form_says_why(kind: str) -> None:
    text, shape, reason = REFUSED[kind]
    model = model_of(text, w=values(*shape), r=values(1, 16, 4))
    layer = layer_of(model)
    assert reason in dynamic.why_not(model, layer)
    before = model.to_bytes()
    grid = Grid(np.ones((4, 1), np.float32), np.zeros((4, 1), np.int32), -127, 127)
    with pytest.raises(UsageError, match=reason):
        rewrite(model, layer, grid, np.zeros((4, 8), np.int32))
    assert model.to_bytes() == before


def test_an_old_opset_is_named() -> None:
    model = model_of(
        "(float[5,8] x) => (float y) { y = MatMul(x, w) }", opset=10, w=values(8, 4)
    )
    assert "needs opset 11, not 10" in dynamic.why_not(model, layer_of(model))


@pytest.mark.parametrize(
    ("scale", "zero", "codes"),
    [((4, 2), 0, (4, 8)), ((4, 1), 1, (4, 8)), ((4, 1), 0, (8, 4))],
)
def test_a_grid_of_another_kind_is_refused(
    scale: tuple[int, int], zero: int, codes: tuple[int, int]
) -> None:
    model = model_of("(float[5,8] x) => (float y) { y = MatMul(x, w) }", w=values(8, 4))
    grid = Grid(
        np.ones(scale, np.float32), np.full(scale, zero, np.int32), -127, 127, 4
    )
    with pytest.raises(UsageError, match=r"outputs|shape"):
        rewrite(model, layer_of(model), grid, np.zeros(codes, np.int32))


def test_a_trained_transformer_keeps_its_answers() -> None:
    plain = Model.load(MODELS / "vit.onnx")
    model = plain.copy()
    for layer in list(find(model)):
        if not dynamic.why_not(model, layer):
            grid, codes = quantized(layer.layout.matrices(layer.weight.read())[0])
            rewrite(model, layer, grid, codes)
    model.drop_unused()
    with np.load(MODELS / "mnist.npz") as data:
        x = data["train_x"][-200:, None].astype(np.float32) / 255
    same = run(plain, image=x)[0].argmax(1) == run(model, image=x)[0].argmax(1)
    assert same.mean() >= 0.985
    assert len(model.to_bytes()) < len(plain.to_bytes()) / 2.5


@pytest.mark.parametrize("name", sorted(example_models()))
def test_any_model_computes_nearly_the_same(name: str) -> None:
    plain = Model.load(example_models()[name])
    model = plain.copy()
    calibration = Splits.build(model, seed=0).calibration
    assert calibration is not None
    for layer in list(find(model, roles=("weight", "table"))):
        if not dynamic.why_not(model, layer):
            grid, codes = quantized(layer.layout.matrices(layer.weight.read())[0])
            rewrite(model, layer, grid, codes)
    model.drop_unused()
    feeds = next(calibration.batches(8))
    found = runtime.session(model, threads=1).run(feeds)
    for key, value in runtime.session(plain, threads=1).run(feeds).items():
        wanted = np.asarray(value)
        assert found[key].shape == wanted.shape
        if wanted.dtype.kind == "f":
            error = np.abs(found[key] - wanted).max(initial=0)
            assert error <= 0.05 * np.abs(wanted).max(initial=0)
