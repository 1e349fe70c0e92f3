"""Scales between activations and weights: exact before codes, better after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.passes.fold import Fold
from onnxshrink.quantization import dynamic, weightonly
from onnxshrink.quantization.smoothing import apply, awq, groups, smooth
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure.layers import find
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
Array = np.ndarray[Any, Any]


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(text: str, **weights: Array) -> Model:
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return Model.load(proto)


def context(model: Model, **data: Array) -> Context:
    samples = Samples.from_arrays(data).bind(model.inputs)
    splits = Splits.build(model, data=samples, seed=0)
    return make_context(samples=splits, reference=model.copy(), threads=1)


def run(model: Model, **feeds: Array) -> list[Array]:
    return list(runtime.session(model, threads=1).run(feeds).values())


BIAS = {"b": values(32, seed=5), "v": values(32, 32, seed=6)}
PRODUCERS = {
    "LayerNormalization": (
        "a = LayerNormalization(x, g, b)",
        {"g": values(32, seed=4), "b": BIAS["b"]},
        True,
    ),
    "linear with bias": ("p = MatMul(x, v) a = Add(b, p)", BIAS, True),
    "linear and Relu": ("p = Gemm(x, v, b) a = Relu(p)", BIAS, True),
    "transposed Gemm": (
        "a = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, v, b)",
        BIAS,
        True,
    ),
    "scaled by channel": ("p = Tanh(x) a = Mul(p, b)", {"b": BIAS["b"]}, True),
    "Tanh": ("a = Tanh(x)", {}, False),
    "sum of two": ("p = Tanh(x) a = Add(x, p)", {}, False),
    "scaled by one": ("a = Mul(x, b)", {"b": np.array(2, np.float32)}, False),
    "shared bias": (
        "p = MatMul(x, v) q = Add(p, b) r = Relu(q) a = Add(r, b)",
        BIAS,
        False,
    ),
    "vector": (
        "p = MatMul(x, u) q = Unsqueeze(p, one) a = Mul(x, q)",
        {"u": BIAS["b"], "one": np.array([1])},
        False,
    ),
}


@pytest.mark.parametrize("kind", PRODUCERS)
def test_scales_move_into_what_makes_the_activations(kind: str) -> None:
    made, weights, folds = PRODUCERS[kind]
    plain = model_of(
        f"(float[5,32] x) => (float[5,8] y, float[5,8] z) "
        f"{{ {made} y = MatMul(a, w) z = Gemm<transB = 1>(a, t) }}",
        w=values(32, 8),
        t=values(8, 32, seed=1),
        **weights,
    )
    model = plain.copy()
    group = next(g for g in groups(model) if g.tensor.name == "a")
    assert len(group.layers) == 2
    scales = np.exp(values(32, seed=2))
    where = apply(model, group, scales).where
    assert (where != "a Mul") == folds
    count = len(plain.graph.nodes)
    assert len(model.graph.nodes) == count + (not folds)
    x = values(5, 32, seed=3)
    for found, wanted in zip(run(model, x=x), run(plain, x=x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(
    "extra",
    ["r = Relu(a)", "r = Identity(a)", "k = Gemm<transA = 1>(a, s) r = Relu(k)"],
)
def test_activations_with_other_readers_get_a_mul(extra: str) -> None:
    plain = model_of(
        "(float[5,32] x) => (float[5,8] y, float r) "
        f"{{ a = LayerNormalization(x, g) y = MatMul(a, w) {extra} }}",
        g=values(32),
        w=values(32, 8),
        s=values(5, 3),
    )
    model = plain.copy()
    (group,) = groups(model)
    made = apply(model, group, np.exp(values(32, seed=2)))
    assert made.where == "a Mul"
    x = values(5, 32, seed=3)
    for found, wanted in zip(run(model, x=x), run(plain, x=x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("returned", ["v", "b"])
def test_a_weight_that_is_also_an_output_stays(returned: str) -> None:
    model = model_of(
        "(float[5,32] x) => (float[5,8] y) "
        "{ p = MatMul(x, v) a = Add(p, b) y = MatMul(a, w) }",
        w=values(32, 8),
        **BIAS,
    )
    model.graph.outputs.append(model.weight(returned).value)
    group = next(g for g in groups(model) if g.tensor.name == "a")
    made = apply(model, group, np.exp(values(32, seed=2)))
    assert made.where == "a Mul"
    np.testing.assert_array_equal(model.weight(returned).read(), BIAS[returned])


ATTENTION = """(float[2,5,32] x) => (float[2,5,8] y) {{
    q = MatMul(x, wq) v = MatMul(x, wv) b = Add(v, bv)
    qr = Reshape(q, cut) qt = Transpose<perm = [0, 2, 1, 3]>(qr)
    kt = Transpose<perm = [0, 2, 3, 1]>(qr)
    vr = Reshape(b, cut) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
    s = MatMul(qt, kt) p = Softmax(s)
    o = MatMul({product}) ot = Transpose<perm = [0, 2, 1, 3]>(o)
    a = Reshape(ot, join) y = MatMul(a, w)
}}"""


@pytest.mark.parametrize(
    ("cut", "join", "product", "folds"),
    [
        ([2, 5, 4, 8], [2, 5, 32], "p, vt", True),
        ([0, 0, 4, 8], [0, 0, -1], "p, vt", True),
        ([2, -1, 4, 8], [2, 5, 32], "p, vt", True),
        ([2, 5, 4, -1], [2, 5, 32], "p, vt", False),
    ],
)
def test_scales_pass_through_the_heads_of_attention(
    cut: list[int], join: list[int], product: str, folds: bool
) -> None:
    plain = model_of(
        ATTENTION.format(product=product),
        wq=values(32, 32) / 8,
        wv=values(32, 32, seed=1),
        bv=values(32, seed=2),
        w=values(32, 8, seed=3),
        cut=np.array(cut),
        join=np.array(join),
    )
    model = plain.copy()
    group = next(g for g in groups(model) if g.tensor.name == "a")
    where = apply(model, group, np.exp(values(32, seed=4))).where
    assert (where != "a Mul") == folds
    x = values(2, 5, 32, seed=5)
    np.testing.assert_allclose(
        run(model, x=x)[0], run(plain, x=x)[0], rtol=2e-5, atol=2e-4
    )


def test_layers_follow_one_another_in_any_order() -> None:
    plain = model_of(
        """(float[5,32] x) => (float[5,8] y) {
            a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v)
        }""",
        w=values(32, 32),
        b=values(32),
        v=values(32, 8),
    )
    x = values(5, 32, seed=3)
    for backwards in (False, True):
        model = plain.copy()
        found = groups(model)
        for group in reversed(found) if backwards else found:
            apply(model, group, np.exp(values(32, seed=2)))
        np.testing.assert_allclose(
            run(model, x=x)[0], run(plain, x=x)[0], rtol=2e-5, atol=2e-4
        )


@pytest.mark.parametrize("scales", [np.ones(31), np.zeros(32), np.full(32, np.inf)])
def test_scales_that_do_not_fit_are_refused(scales: Array) -> None:
    model = model_of(
        "(float[5,32] x) => (float y) { a = Relu(x) y = MatMul(a, w) }", w=values(32, 8)
    )
    with pytest.raises(UsageError, match="a needs 32 positive scales"):
        apply(model, groups(model)[0], scales)


def outliers(rows: int, seed: int = 7) -> Array:
    x = values(rows, 32, seed=seed)
    x[:, 3] *= 60
    return x


LINEAR = "(float[N,32] x) => (float[N,16] y) { a = Identity(x) y = MatMul(x, w) }"


def test_smoothing_makes_room_for_channels_beside_an_outlier() -> None:
    weight = values(32, 16)
    weight[3] /= 60
    plain = model_of(LINEAR, w=weight)
    x = outliers(64)
    wanted = x @ weight

    def error(model: Model) -> float:
        for layer in list(find(model)):
            matrix = layer.layout.matrices(layer.weight.read())[0]
            dynamic.rewrite(model, layer, *dynamic.quantized(matrix))
        model.drop_unused()
        return float(np.square(run(model, x=x)[0] - wanted).sum())

    model = plain.copy()
    ctx = context(model, x=outliers(128, seed=8))
    assert len(smooth(model, ctx)) == 1
    assert "smoothed in a Mul" in ctx.done[0][1]
    np.testing.assert_allclose(run(model, x=x)[0], wanted, rtol=1e-4, atol=1e-4)
    assert error(model) < 0.02 * error(plain)


def test_a_channel_that_is_quiet_in_the_samples_is_not_amplified() -> None:
    model = model_of(LINEAR, w=np.sign(values(32, 16)))
    x = values(128, 32, seed=8) * np.geomspace(0.1, 60, 32, dtype=np.float32)
    x[:, 20] *= 1e-6
    ctx = context(model, x=x)
    assert len(smooth(model, ctx)) == 1
    mul = next(node for node in model.nodes() if node.op == "Mul")
    factors = model.constant(mul.inputs[1]).read()  # type: ignore[union-attr]
    assert factors.max() > 5 * factors.min()
    assert factors[20] < 1.1 * np.median(factors)


def test_even_activations_are_left_alone() -> None:
    model = model_of(LINEAR, w=values(32, 16))
    before = model.to_bytes()
    ctx = context(model, x=np.clip(values(128, 32), -1, 1))
    assert len(smooth(model, ctx)) == 0
    assert "of the error would be left" in ctx.skips[0][1]
    assert model.to_bytes() == before


def test_awq_keeps_the_weights_that_large_activations_multiply() -> None:
    plain = model_of(LINEAR, w=values(32, 16))
    x = outliers(64)
    wanted = x @ plain.weight("w").read()
    levels = weightonly.LEVELS["int4"]

    def error(model: Model) -> float:
        (layer,) = find(model)
        rows = np.ascontiguousarray(layer.layout.matrices(layer.weight.read())[0])
        grid, codes = weightonly.quantized(rows, levels, method="minmax")
        weightonly.rewrite(model, layer, grid, codes)
        model.drop_unused()
        return float(np.square(run(model, x=x)[0] - wanted).sum())

    model = plain.copy()
    assert len(awq(model, context(model, x=outliers(128, seed=8)), levels)) == 1
    np.testing.assert_allclose(run(model, x=x)[0], wanted, rtol=1e-4, atol=1e-3)
    assert error(model) < 0.5 * error(plain)


@pytest.mark.parametrize("name", sorted(example_models()))
def test_any_model_computes_the_same_after_both(name: str) -> None:
    plain = Model.load(example_models()[name])
    model = plain.copy()
    splits = Splits.build(model, seed=0)
    ctx = make_context(samples=splits, reference=plain, threads=1)
    smooth(model, ctx)
    awq(model, ctx, weightonly.LEVELS["int4"], block=16)
    model.drop_unused()
    assert splits.calibration is not None
    feeds = next(splits.calibration.batches(8))
    for found, wanted in zip(run(model, **feeds), run(plain, **feeds), strict=True):
        if np.asarray(wanted).dtype.kind == "f":
            rough = np.asarray(wanted).dtype == np.float16
            np.testing.assert_allclose(
                found,
                wanted,
                rtol=1e-2 if rough else 1e-4,
                atol=1e-2 if rough else 1e-4,
            )
        else:
            np.testing.assert_array_equal(found, wanted)


def test_the_same_data_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        model = model_of(LINEAR, w=values(32, 16))
        smooth(model, context(model, x=outliers(128)))
        made.append(model.to_bytes())
    assert made[0] == made[1]


def test_a_transformer_with_norms_before_its_layers_needs_no_mul() -> None:
    model = Model.load(MODELS / "vit.onnx")
    with np.load(MODELS / "mnist.npz") as data:
        x = data["train_x"][:64, None].astype(np.float32) / 255
    ctx = context(model, image=x)
    Fold().apply(model, ctx)
    count = sum(node.op == "Mul" for node in model.nodes())
    wanted = run(model, image=x)[0]
    assert len(smooth(model, ctx)) > 8
    np.testing.assert_allclose(run(model, image=x)[0], wanted, rtol=1e-3, atol=1e-3)
    added = sum(node.op == "Mul" for node in model.nodes()) - count
    # Only what GELU makes has nowhere else to go.
    assert added <= 4
