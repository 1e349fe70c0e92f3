"""Which axis counts samples, what is given once, and how many run at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import shrink
from onnxshrink.errors import UsageError
from onnxshrink.manager import Result
from onnxshrink.model import Model
from onnxshrink.samples import Splits

RANDOM = np.random.default_rng(0)


def model(text: str) -> Model:
    head = '<ir_version: 8, opset_import: ["" : 17]>\n'
    return Model.load(onnx.parser.parse_model(head + text))


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ran(text: str, data: Any, **options: Any) -> Result:
    quick = {"measure_memory": False, "measure_latency": False}
    return shrink(model(text), "fold", data=data, **quick, **options)


ANCHORS = """g (float[N,4] x, float[3,4] a) => (float[N,3] y)
{ t = Transpose<perm = [1, 0]>(a) y = MatMul(x, t) }"""
STATE = """g (float[batch,5,4] x, float[2,batch,4] h) => (float[batch,5,4] y)
<int64[1] first = {0}, int64[1] second = {1}>
{ s = ReduceSum<keepdims = 0>(h, first) u = Unsqueeze(s, second) y = Add(x, u) }"""
RATE = """g (float[N,4] x, int64 rate) => (float[N,4] y)
{ c = Cast<to = 1>(rate) y = Mul(x, c) }"""
FIXED = """g (float[N,4] x) => (float[1,4] y)
<int64[2] shape = {1, 4}> { y = Reshape(x, shape) }"""


@pytest.mark.parametrize("count", [3, 20])
def test_an_array_in_the_shape_of_its_input_is_given_once(count: int) -> None:
    anchors = normal(3, 4)
    splits = Splits.build(model(ANCHORS), {"x": normal(count, 4), "a": anchors})
    assert splits.calibration is not None
    feed = splits.calibration.read(np.arange(len(splits.calibration)))
    np.testing.assert_array_equal(feed["a"], anchors)
    assert "a: given once, for every run" in splits.calibration.notes
    result = ran(ANCHORS, {"x": normal(count, 4), "a": anchors})
    assert "data: a: given once, for every run" in result.report.notes


@pytest.mark.parametrize("given", [np.int64(3), np.int64([3])])
def test_one_number_serves_every_sample(given: Any) -> None:
    splits = Splits.build(model(RATE), {"x": normal(20, 4), "rate": given})
    assert splits.evaluation is not None
    assert splits.evaluation.read([0, 1])["rate"].shape == ()
    assert ran(RATE, {"x": normal(20, 4), "rate": given}).report.steps[0].accepted


def test_a_scalar_of_every_sample_lets_each_run_alone() -> None:
    data = {"x": normal(20, 4), "rate": np.arange(20)}
    splits = Splits.build(model(RATE), data)
    assert splits.evaluation is not None
    assert splits.evaluation.whole
    assert ran(RATE, data).report.steps[0].accepted


@pytest.mark.parametrize("data", [None, {"x": normal(20, 4)}])
def test_a_number_stands_beside_data_and_random_inputs(data: Any) -> None:
    splits = Splits.build(model(RATE), data, values={"rate": [16000]})
    assert splits.evaluation is not None
    assert splits.evaluation.read([0])["rate"] == np.int64(16000)
    assert set(splits.evaluation.names) == {"x", "rate"}
    assert ran(RATE, data, values={"rate": [16000]}).report.steps[0].accepted


def test_numbers_that_fit_no_input_are_refused() -> None:
    with pytest.raises(UsageError, match="no input 'rat'"):
        Splits.build(model(RATE), None, values={"rat": [1]})
    with pytest.raises(UsageError, match="takes one number"):
        Splits.build(model(RATE), None, values={"rate": [1, 2]})
    with pytest.raises(UsageError, match="takes int64"):
        Splits.build(model(RATE), None, values={"rate": [0.5]})


@pytest.mark.parametrize("first", [True, False])
def test_the_symbol_of_others_says_where_samples_lie(first: bool) -> None:
    x, h = normal(20, 5, 4), normal(20, 2, 4)
    given = h if first else np.moveaxis(h, 0, 1)
    splits = Splits.build(model(STATE), {"x": x, "h": given})
    assert splits.evaluation is not None
    places = splits.evaluation.positions[:3]
    feed = splits.evaluation.read([0, 1, 2])
    np.testing.assert_array_equal(feed["x"], x[places])
    np.testing.assert_array_equal(feed["h"], np.moveaxis(h[places], 0, 1))
    assert ran(STATE, {"x": x, "h": given}).report.steps[0].accepted


def test_axes_of_one_sample_are_put_where_the_model_has_them() -> None:
    text = STATE.replace("batch", "1")
    splits = Splits.build(model(text), {"x": normal(8, 5, 4), "h": normal(8, 2, 4)})
    assert splits.evaluation is not None
    feed = splits.evaluation.read([0])
    assert (feed["x"].shape, feed["h"].shape) == ((1, 5, 4), (2, 1, 4))


@pytest.mark.parametrize("data", [None, {"x": normal(20, 4)}])
def test_a_model_of_one_sample_a_run_is_found_out(data: Any) -> None:
    result = ran(FIXED, data)
    assert result.report.steps[0].accepted
    notes = " ".join(result.report.notes)
    assert "each run takes one sample, since two at a time do not run (Reshape" in notes


@pytest.mark.parametrize("data", [None, {"x": normal(20, 4)}])
def test_a_batch_that_is_asked_for_is_the_batch_of_every_run(data: Any) -> None:
    text = "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"
    splits = Splits.build(model(text), data, batch=3)
    for samples in (splits.calibration, splits.evaluation):
        assert samples is not None
        assert {len(feed["x"]) for feed in samples.batches()} == {3}
    with pytest.raises(UsageError, match="the model takes 2 samples at a time"):
        Splits.build(model(text.replace("N", "2")), {"x": normal(20, 4)}, batch=3)
