from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.training.importance import output_metrics


def model(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_channels_cost_what_the_outputs_make_of_them() -> None:
    behind = draw(6, 5, seed=1)
    net = model(
        "g (float[N,4] x) => (float[N,5] y) { h = MatMul(x, a) y = MatMul(h, b) }",
        a=draw(4, 6),
        b=behind,
    )
    x = draw(320, 4, seed=2)
    samples = Samples.from_arrays({"x": x}).bind(net.inputs)
    (found,) = output_metrics(net, {"h": -1}, samples, probes=40).values()
    outputs = x @ draw(4, 6) @ behind
    wanted = np.square(behind).sum(axis=1) / np.square(outputs).sum(axis=1).mean()
    np.testing.assert_allclose(found, wanted, rtol=0.1)


def test_positions_add_up_and_every_output_counts_as_a_share_of_itself() -> None:
    net = model(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] z) "
        "{ h = Identity(x) y = Mul(h, small) z = Mul(h, large) }",
        small=np.array(0.01, np.float32),
        large=np.array([1, 2, 0], np.float32).reshape(3, 1, 1),
    )
    samples = Samples.from_arrays({"x": draw(32, 3, 8, 8)}).bind(net.inputs)
    (found,) = output_metrics(net, {"h": 1}, samples, probes=8).values()
    # Of y each channel is a third; of z one and four fifths, and nothing.
    wanted = np.array([1 / 3 + 1 / 5, 1 / 3 + 4 / 5, 1 / 3])
    np.testing.assert_allclose(found, wanted, rtol=0.15)


def test_a_value_that_no_output_depends_on_costs_nothing() -> None:
    net = model(
        "g (float[N,4] x) => (float[N,4] y) { h = Relu(x) s = Sign(h) y = Add(x, s) }"
    )
    samples = Samples.from_arrays({"x": draw(32, 4)}).bind(net.inputs)
    (found,) = output_metrics(net, {"h": -1}, samples).values()
    assert not found.any()


def test_an_operator_without_a_gradient_is_named() -> None:
    net = model(
        "g (float[N,4,4] x) => (float[N] y) { h = Relu(x) y = Det(h) }",
    )
    samples = Samples.from_arrays({"x": draw(32, 4, 4)}).bind(net.inputs)
    with pytest.raises(ModelError, match="Det"):
        output_metrics(net, {"h": -1}, samples)


def test_outputs_of_nothing_are_refused() -> None:
    net = model(
        "g (float[N,4] x) => (int64[N,1] y) { h = Relu(x) y = ArgMax<axis = 1>(h) }"
    )
    samples = Samples.from_arrays({"x": draw(32, 4)}).bind(net.inputs)
    with pytest.raises(ModelError, match="no float output"):
        output_metrics(net, {"h": -1}, samples)
