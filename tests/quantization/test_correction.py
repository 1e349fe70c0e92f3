"""Corrections: equalized models compute what they did, biases take the mean error."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.quantization.correction import equalize, expected_shift
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing import example_models

Array = np.ndarray[Any, Any]


def parsed(nodes: str, shape: str, weights: dict[str, Array], opset: int = 17) -> Model:
    """Parse a graph from x to y with these weights."""
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        f"g (float[{shape}] x) => (float[] y) {{ {nodes} }}"
    )
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    known = onnx.ModelProto()
    known.CopyFrom(proto)
    known.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(known).graph.output[0]
    proto.graph.output[0].CopyFrom(inferred)
    return Model.load(proto)


def context(model: Model, x: Array | None = None, **options: Any) -> Context:
    if x is None:
        return make_context(samples=Splits.build(model, None), reference=model)
    samples = Samples.of(x).bind(model.inputs)
    splits = Splits(calibration=samples, evaluation=samples)
    return make_context(samples=splits, reference=model, **options)


def run(model: Model, x: Array) -> Array:
    name = model.inputs[0].name
    (value,) = runtime.session(model).run({name: x}).values()
    return np.asarray(value)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def uneven(array: Array, axis: int) -> Array:
    """Give channels very different ranges."""
    shape = [1] * array.ndim
    shape[axis] = -1
    return array * np.geomspace(0.05, 20, array.shape[axis]).reshape(shape).astype(
        np.float32
    )


# --- equalization ---------------------------------------------------------------------

CHAINS = {
    "conv relu conv": (
        "h = Conv(x, a, b) r = Relu(h) y = Conv(r, c)",
        "2, 3, 6, 6",
        {"a": random(8, 3, 3, 3), "b": random(8), "c": random(5, 8, 1, 1)},
    ),
    "depthwise": (
        "h = Conv(x, a) r = LeakyRelu<alpha = 0.1>(h) y = Conv<group = 8>(r, c)",
        "2, 3, 6, 6",
        {"a": random(8, 3, 1, 1), "c": random(8, 1, 3, 3)},
    ),
    "groups": (
        "h = Conv<group = 2>(x, a, b) s = PRelu(h, p) m = MaxPool<kernel_shape ="
        " [2, 2]>(s) y = Conv<group = 4>(m, c)",
        "2, 4, 6, 6",
        {
            "a": random(8, 2, 3, 3),
            "b": random(8),
            "c": random(12, 2, 1, 1),
            "p": random(8, 1, 1),
        },
    ),
    "transposed": (
        "h = ConvTranspose<group = 2>(x, a, b) r = Relu(h) y = ConvTranspose<group ="
        " 2>(r, c)",
        "2, 4, 4, 4",
        {"a": random(4, 4, 2, 2), "b": random(8), "c": random(8, 3, 2, 2)},
    ),
    "matmul": (
        "h = MatMul(x, a) s = Add(b, h) r = Relu(s) y = MatMul(r, c)",
        "2, 5, 6",
        {"a": random(6, 8), "b": random(8), "c": random(8, 3)},
    ),
    "gemm": (
        "h = Gemm<transB = 1>(x, a, b) r = Relu(h) m = Mul(r, k) y = Gemm(m, c)",
        "4, 6",
        {
            "a": random(8, 6),
            "b": random(1, 8),
            "c": random(8, 3),
            "k": random(8),
        },
    ),
    "pooled": (
        "h = Conv(x, a) s = Sub(h, b) r = Relu(s) g = GlobalAveragePool(r) f ="
        " Flatten(g) y = Gemm<transB = 1>(f, c)",
        "2, 3, 6, 6",
        {"a": random(8, 3, 3, 3), "b": random(8, 1, 1), "c": random(4, 8)},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_an_equalized_model_computes_what_it_did(name):
    nodes, shape, weights = CHAINS[name]
    axis = 1 if name in ("transposed", "matmul") else 0
    if name == "transposed":
        weights = weights | {"c": uneven(weights["c"], 0)}
    else:
        weights = weights | {"a": uneven(weights["a"], axis)}
    model = parsed(nodes, shape, weights)
    x = random(*map(int, shape.split(", ")), seed=5)
    before = run(model, x)
    ctx = context(model)
    assert equalize(model, ctx) == 1
    assert len(ctx.done) == 1
    after = run(model, x)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert not np.array_equal(model.weight("a").read(), weights["a"])
    # Done once, it is done.
    assert equalize(model, context(model)) == 0


def test_ranges_of_both_weights_agree_after_it():
    a, c = uneven(random(8, 3, 1, 1), 0), random(5, 8, 1, 1)
    model = parsed(*CHAINS["conv relu conv"][:2], {"a": a, "b": random(8), "c": c})
    equalize(model, context(model))
    ours = np.abs(model.weight("a").read()).max(axis=(1, 2, 3))
    theirs = np.abs(model.weight("c").read()).max(axis=(0, 2, 3))
    assert np.allclose(ours, theirs, rtol=1e-3)
    # The geometric mean of what they were, channel by channel.
    expected = np.sqrt(np.abs(a).max(axis=(1, 2, 3)) * np.abs(c).max(axis=(0, 2, 3)))
    assert np.allclose(ours, expected, rtol=2e-3)


def test_a_chain_of_three_layers_settles():
    weights = {
        "a": uneven(random(6, 3, 1, 1), 0),
        "c": random(6, 1, 3, 3),
        "d": uneven(random(4, 6, 1, 1), 1),
    }
    model = parsed(
        "h = Conv(x, a) r = Relu(h) i = Conv<group = 6>(r, c) s = Relu(i)"
        " y = Conv(s, d)",
        "1, 3, 6, 6",
        weights,
    )
    x = random(1, 3, 6, 6)
    before = run(model, x)
    assert equalize(model, context(model)) == 2
    assert np.allclose(run(model, x), before, atol=1e-4 * np.abs(before).max())
    a, c, d = (model.weight(name).read() for name in "acd")
    ranges = [
        np.abs(a).max(axis=(1, 2, 3)),
        np.abs(c).max(axis=(1, 2, 3)),
        np.abs(d).max(axis=(0, 2, 3)),
    ]
    assert np.allclose(ranges[0], ranges[1], rtol=5e-3)
    assert np.allclose(ranges[1], ranges[2], rtol=5e-3)


def test_channels_of_zeros_stay():
    a = random(4, 3, 1, 1)
    a[1] = 0
    c = uneven(random(2, 4, 1, 1), 1)
    c[:, 2] = 0
    model = parsed(
        "h = Conv(x, a) r = Relu(h) y = Conv(r, c)", "1, 3, 2, 2", {"a": a, "c": c}
    )
    equalize(model, context(model))
    assert np.array_equal(model.weight("a").read()[[1, 2]], a[[1, 2]])
    assert np.array_equal(model.weight("c").read()[:, [1, 2]], c[:, [1, 2]])


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ("h = Conv(x, a) r = Clip(h, zero, six) y = Conv(r, c)", "Clip"),
        ("h = Conv(x, a) r = Sigmoid(h) y = Conv(r, c)", "Sigmoid"),
        ("h = Conv(x, a) r = Relu(h) k = Conv(r, c) y = Add(k, r)", "read by 2"),
        ("h = Conv(x, a) r = Relu(h) k = Conv(r, c) y = Conv(k, c)", "shared"),
        ("h = Conv(x, a) y = Add(h, x)", "two inputs that are computed"),
        ("h = Conv(x, a) y = Relu(h)", "an output of the model"),
        ("h = Conv(x, a) r = Add(h, six) y = Conv(r, c)", "one value of its own"),
        ("h = Conv(x, a, x) r = Relu(h) y = Conv(r, c)", "not constant"),
    ],
)
def test_what_a_scale_cannot_pass_is_left_alone_with_a_reason(nodes, why):
    weights = {
        "a": uneven(random(4, 4, 1, 1), 0),
        "c": random(4, 4, 1, 1),
        "zero": np.float32(0) * np.ones((), np.float32),
        "six": np.full((), 6, np.float32),
    }
    model = parsed(
        nodes, "1, 4, 2, 2", {k: v for k, v in weights.items() if k in nodes}
    )
    ctx = context(model)
    assert equalize(model, ctx) == 0
    assert any(why in reason for _, reason in ctx.skips), ctx.skips
    assert np.array_equal(model.weight("a").read(), weights["a"])


@pytest.mark.parametrize("returned", ["a", "b", "c", "d"])
def test_a_weight_or_bias_that_is_also_an_output_stays(returned):
    """``a`` and ``c`` are weights, ``b`` and ``d`` what is added behind the first."""
    weights = {
        "a": uneven(random(4, 4, 1, 1), 0),
        "b": random(4),
        "c": random(4, 4, 1, 1),
        "d": random(1, 4, 1, 1),
    }
    nodes = "h = Conv(x, a, b) s = Add(h, d) r = Relu(s) y = Conv(r, c)"
    model = parsed(nodes, "1, 4, 2, 2", weights)
    assert equalize(model.copy(), context(model)) == 1
    model.graph.outputs.append(model.weight(returned).value)
    assert equalize(model, context(model)) == 0
    for name, array in weights.items():
        assert np.array_equal(model.weight(name).read(), array)


@pytest.mark.parametrize("name", example_models())
def test_example_models_compute_what_they_did(name):
    model = Model.load(example_models()[name])
    samples = Samples.random_for(model, count=2, seed=3)
    feed = samples.read([0, 1]) if not samples.whole else samples.read([0])
    before = runtime.session(model).run(feed)
    equalize(model, context(model))
    after = runtime.session(model).run(feed)
    for key, value in before.items():
        if np.asarray(value).dtype.kind == "f":
            noise = 1e-2 if np.asarray(value).dtype == np.float16 else 1e-4
            assert np.allclose(after[key], value, rtol=noise, atol=noise), key


# --- bias correction ------------------------------------------------------------------


def test_expected_shift_is_the_mean_of_what_is_lost():
    weight, decoded = random(3, 5), random(3, 5, seed=1)
    x = random(100, 5, seed=2) + 1
    lost = (x @ weight.T - x @ decoded.T).mean(axis=0)
    shift = expected_shift(weight, decoded, x.mean(axis=0, dtype=np.float64))
    assert np.allclose(shift, lost, atol=1e-5)
