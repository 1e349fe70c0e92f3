"""Synthetic images: seeded, like photographs, and never a proof of quality."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink import shrink
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Splits
from onnxshrink.samples.synthetic import leaves


def model(kind: str = "float", shape: str = "N,3,16,16") -> Model:
    return Model.load(
        onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[{shape}] x) => '
            f"({kind}[{shape}] y) {{ y = Identity(x) }}"
        )
    )


def test_an_image_has_edges_and_surfaces_and_a_seed():
    one, two = leaves((0, 1), 64, 64, 3), leaves((0, 2), 64, 64, 3)
    assert np.array_equal(one, leaves((0, 1), 64, 64, 3))
    assert not np.array_equal(one, two)
    assert one.shape == (64, 64, 3)
    steps = np.abs(np.diff(one[..., 0].astype(int), axis=1))
    # Noise would differ from pixel to pixel; leaves are smooth but at their edges.
    assert np.median(steps) < 10
    assert steps.max() > 40


@pytest.mark.parametrize(
    ("kind", "shape", "low", "high"),
    [
        ("float", "N,3,16,16", -1, 1),
        ("float", "N,16,16,3", -1, 1),
        ("float", "N,1,16,16", -1, 1),
        ("uint8", "N,3,16,16", 0, 255),
    ],
)
def test_images_fit_the_input(kind: str, shape: str, low: float, high: float):
    splits = Splits.build(model(kind, shape), "synthetic")
    assert splits.made_up
    assert not splits.random
    assert "prove nothing about quality" in splits.describe()[0]
    assert splits.calibration is not None
    fed = splits.calibration.read([0, 1])["x"]
    assert low <= fed.min() < fed.max() <= high
    assert fed.shape[1:] == tuple(map(int, shape.split(",")[1:]))


def test_the_scale_is_said_after_the_word():
    splits = Splits.build(model(), "synthetic:x=rgb/255@chw")
    assert splits.calibration is not None
    fed = splits.calibration.read([0])["x"]
    assert 0 <= fed.min() < fed.max() <= 1


def test_a_model_without_images_is_refused():
    with pytest.raises(UsageError, match="synthetic data are images"):
        Splits.build(model("float", "N,8"), "synthetic")


def test_a_verdict_on_them_is_a_smoke_test():
    options = {"measure_latency": False, "measure_memory": False}
    result = shrink(model(), "fold", data="synthetic", **options)
    verdict = result.report.steps[0].verdict
    assert verdict is not None
    assert verdict.smoke_test
    real = np.zeros((4, 3, 16, 16), np.float32)
    measured = shrink(
        model(), "fold", data="synthetic", evaluation={"x": real}, **options
    )
    verdict = measured.report.steps[0].verdict
    assert verdict is not None
    assert not verdict.smoke_test
