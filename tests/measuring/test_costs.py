"""Costs of layer forms: figures worked out on paper, orders that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from onnxshrink import runtime
from onnxshrink.base import Cost, Form
from onnxshrink.errors import ModelError
from onnxshrink.measuring import costs
from onnxshrink.measuring.costs import FixedCosts, LayerCosts, MeasuredCosts, layer_cost
from onnxshrink.model import Model
from onnxshrink.samples import Splits
from onnxshrink.structure.layers import find
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.testing import make_context

FIXED = FixedCosts()


def seconds(cost: Cost) -> float:
    assert cost.seconds is not None
    return cost.seconds


def conv(inputs: int, outputs: int, kernel: int, size: int, **rest: Any) -> float:
    shape = (kernel, kernel), (size, size)
    return seconds(FIXED.conv(inputs, outputs, *shape, **rest))


# --- the fixed table --------------------------------------------------------------


def test_bytes_and_macs_of_a_convolution() -> None:
    found = FIXED.conv(16, 32, (3, 3), (10, 5), groups=4, itemsize=0.5)
    # 32 outputs see 4 channels of 9 weights each, at 50 places.
    assert (found.bytes, found.macs) == (32 * 4 * 9 // 2, 32 * 4 * 9 * 50)


def test_bytes_and_macs_of_a_product() -> None:
    found = FIXED.matmul(7, 10, 20)
    assert (found.bytes, found.macs) == (800, 1400)


def test_channels_in_steps_of_8_are_faster_than_fewer_of_them() -> None:
    assert conv(64, 64, 3, 14) < conv(62, 62, 3, 14)
    assert conv(32, 32, 3, 28) < conv(30, 30, 3, 28)


def test_depthwise_and_pointwise_are_faster_than_a_dense_kernel() -> None:
    for channels, size in ((32, 28), (64, 28), (128, 14), (256, 7)):
        apart = conv(channels, channels, 3, size, groups=channels)
        apart += conv(channels, channels, 1, size)
        assert 0.1 < apart / conv(channels, channels, 3, size) < 0.3


def test_half_a_rank_takes_about_half_the_time() -> None:
    for rows in (1, 16, 64):
        dense = seconds(FIXED.matmul(rows, 384, 384))
        low = seconds(FIXED.matmul(rows, 384, 96) + FIXED.matmul(rows, 96, 384))
        assert 0.4 < low / dense < 0.8


@pytest.mark.parametrize(
    ("shape", "groups", "gains"),
    [
        ((64, 64, 3, 28), 1, True),
        ((256, 256, 1, 14), 1, True),
        ((1, 6, 5, 28), 1, False),
        ((8, 8, 3, 28), 1, False),
        ((144, 144, 3, 28), 144, False),
        ((64, 64, 3, 28), 8, False),
    ],
)
def test_integers_pay_for_wide_convolutions_only(
    shape: tuple[int, int, int, int], groups: int, gains: bool
) -> None:
    coded = conv(*shape, groups=groups, form="static")
    assert (coded < conv(*shape, groups=groups)) == gains


def test_codes_of_weights_pay_for_single_rows_only() -> None:
    for rows, gains in ((1, True), (64, False)):
        coded = FIXED.matmul(rows, 768, 768, form="codes", itemsize=0.5)
        assert (seconds(coded) < seconds(FIXED.matmul(rows, 768, 768))) == gains


# --- measured ---------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Count measurements; how long something takes is not for a test to say."""
    taken: list[float] = []

    def shortest(
        sessions: Sequence[runtime.Session], feed: Mapping[str, Any]
    ) -> list[float]:
        for session in sessions:
            (made,) = session.run(feed).values()
            assert np.isfinite(made).all()
            assert 0.01 < made.std() < 100
        taken.append(3e-3)
        return [5e-3, 6e-3, 9e-3]

    monkeypatch.setattr(costs, "_shortest", shortest)
    return taken


@pytest.mark.parametrize("form", ["float", "static", "codes"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, 8, (3, 3), (9, 9)), 1),
        ((8, 8, (5, 5), (7, 7)), 8),
        ((8, 16, (1,), (12,)), 2),
        ((4, 4, (3, 3, 3), (4, 4, 4)), 1),
    ],
)
def test_every_convolution_can_be_measured(
    shape: Any, groups: int, form: Form, tmp_path: Path, runs: list[float]
) -> None:
    found = MeasuredCosts(tmp_path, threads=1).conv(*shape, groups=groups, form=form)
    assert found.seconds == pytest.approx(3e-3)
    fixed = FIXED.conv(*shape, groups=groups)
    assert (found.bytes, found.macs) == (fixed.bytes, fixed.macs)


@pytest.mark.parametrize(
    ("form", "itemsize"),
    [("float", 4), ("static", 1), ("dynamic", 1), ("codes", 1), ("codes", 0.5)],
)
@pytest.mark.parametrize("shape", [(1, 64, 10), (5, 33, 64), (7, 32, 32)])
def test_every_product_can_be_measured(
    shape: Any, form: Form, itemsize: float, tmp_path: Path, runs: list[float]
) -> None:
    measured = MeasuredCosts(tmp_path, threads=1)
    found = measured.matmul(*shape, form=form, itemsize=itemsize)
    assert found.seconds == pytest.approx(3e-3)
    assert measured.measured_some


def test_a_layer_is_measured_once_on_a_machine(
    tmp_path: Path, runs: list[float]
) -> None:
    for _ in range(2):
        MeasuredCosts(tmp_path, threads=1).matmul(1, 8, 8)
    MeasuredCosts(tmp_path, threads=2).matmul(1, 8, 8)
    MeasuredCosts(tmp_path, threads=1).matmul(2, 8, 8)
    assert len(runs) == 3


def test_without_a_folder_a_layer_is_measured_once_in_a_run(
    tmp_path: Path, runs: list[float]
) -> None:
    (tmp_path / "file").write_text("")
    measured = MeasuredCosts(tmp_path / "file", threads=1)
    assert measured.matmul(1, 8, 8) == measured.matmul(1, 8, 8)
    assert len(runs) == 1


def test_what_does_not_run_has_the_seconds_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("no such kernel")

    monkeypatch.setattr(runtime, "session", fail)
    measured = MeasuredCosts(tmp_path)
    assert measured.matmul(1, 8, 8) == FIXED.matmul(1, 8, 8)
    assert not measured.measured_some


def test_a_real_measurement_is_of_the_right_order(tmp_path: Path) -> None:
    measured = MeasuredCosts(tmp_path, threads=1)
    small, large = measured.matmul(1, 16, 16), measured.matmul(64, 512, 512)
    assert 0 < 10 * seconds(small) < seconds(large) < 1


def test_measured_costs_are_those_of_the_same_machine() -> None:
    fixed = FixedCosts(threads=1)
    assert not fixed.is_measured
    assert fixed.measured().is_measured
    assert fixed.measured() is fixed.measured()
    assert fixed.measured().measured() is fixed.measured()
    assert not fixed.measured_some


# --- layers of a model ------------------------------------------------------------

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
layers (float[N,2,6,6] x) => (float[N,8] y)
<float[4,2,3,3] k = {0}, float[4,16] m = {0}, float[8,16] g = {0}> {
    c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, k)
    t = Transpose <perm = [0,2,3,1]> (c)
    a = MatMul(t, m)
    r = ReduceMean <axes = [1,2], keepdims = 0> (a)
    y = Gemm <transB = 1> (r, g)
}
"""


def layered(text: str) -> Model:
    proto = parser.parse_model(text)
    for tensor in proto.graph.initializer:
        del tensor.float_data[:]
        tensor.raw_data = np.ones(tuple(tensor.dims), np.float32).tobytes()
    return Model.load(proto)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cost_of_layers_that_are_there(batch: int) -> None:
    model = layered(TEXT)
    shapes = value_shapes(model, {"x": (batch, 2, 6, 6)})
    found = {
        layer.name: layer_cost(FIXED, layer, shapes, form="float")
        for layer in find(model)
    }
    one = FIXED.conv(2, 4, (3, 3), (3, 3))
    assert found["k"] is not None
    assert (found["k"].bytes, found["k"].macs) == (288, batch * one.macs)
    assert found["k"].seconds == pytest.approx(batch * seconds(one))
    assert found["m"] == FIXED.matmul(batch * 9, 4, 16)
    assert found["g"] == FIXED.matmul(batch, 16, 8)


def test_conversions_are_of_what_a_layer_reads_and_gives() -> None:
    model = layered(TEXT)
    ctx = make_context(samples=Splits.build(model), reference=model)
    samples = ctx.samples.calibration
    assert samples is not None
    batch = len(samples.read([0])["x"])
    made = LayerCosts(model, ctx)
    found = {layer.name: made.conversions(layer) for layer in find(model)}
    # The convolution reads an input of the model, and gives 4 channels of 3 x 3.
    assert found["k"] == pytest.approx(batch * 4 * 9 * 0.29e-9)
    assert found["m"] == pytest.approx(batch * 9 * (4 + 16) * 0.29e-9)
    assert found["g"] == pytest.approx(batch * (16 + 8) * 0.29e-9)


def test_a_weight_of_two_layers_is_stored_once() -> None:
    model = layered(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        twice (float[N,4] x) => (float[N,4] y)
        <float[4,4] w = {0}> { h = MatMul(x, w)  y = MatMul(h, w) }
        """
    )
    (layer,) = find(model)
    shapes = value_shapes(model, {"x": (5, 4)})
    found, one = layer_cost(FIXED, layer, shapes), FIXED.matmul(5, 4, 4)
    assert found is not None
    assert (found.bytes, found.macs) == (64, 2 * one.macs)
    assert found.seconds == pytest.approx(2 * seconds(one))
    assert layer_cost(FIXED, layer, {}) is None
    codes = layer_cost(FIXED, layer, shapes, form="codes", itemsize=1)
    assert codes is not None
    assert codes.bytes == 16


def test_a_pass_finds_costs_in_its_context() -> None:
    model = layered(TEXT)
    ctx = make_context(samples=Splits.build(model), reference=model)
    assert ctx.costs.matmul(1, 8, 8) == FIXED.matmul(1, 8, 8)
    low = ctx.costs.matmul(16, 512, 64) + ctx.costs.matmul(16, 64, 512)
    saved = ctx.costs.matmul(16, 512, 512) - low
    assert saved.bytes == 4 * (512 * 512 - 2 * 64 * 512)
    assert saved.macs == 16 * (512 * 512 - 2 * 64 * 512)
    assert saved.seconds is not None
    assert saved.seconds > 0
