"""onnxruntime's blocked layout in a training graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.model import Model
from onnxshrink.training import GradContext, Sgd, TrainingStep, mse
from onnxshrink.training.layout import block_size


def squared(ctx: GradContext, values: Mapping[str, Any]) -> Any:
    return mse(ctx, values["y"], values["t"])


def test_blocks_are_not_put_in_order_between_two_convolutions() -> None:
    random = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[2,16,6,5] x) => (float[2,16,1,1] y)
        <float[1] v = {0}, float[1] w = {0}> {
          c = Conv <pads = [1,1,1,1]> (x, v)
          r = Relu(c)
          d = Conv <pads = [1,1,1,1]> (r, w)
          y = GlobalAveragePool(d)
        }"""
    model = Model.load(onnx.parser.parse_model(text))
    for name in ("v", "w"):
        model.set_weight(name, random.normal(size=(16, 16, 3, 3)).astype(np.float32))
    feeds = {
        "x": random.normal(size=(2, 16, 6, 5)).astype(np.float32),
        "t": random.normal(size=(2, 16, 1, 1)).astype(np.float32),
    }
    plain, blocked = (
        TrainingStep(
            model,
            {},
            ["v", "w"],
            squared,
            targets={"t": (np.float32, (2, 16, 1, 1))},
            optimizer=Sgd(momentum=0.0),
            layout=layout,
            threads=1,
        )
        for layout in ("plain", "auto")
    )
    assert blocked(feeds, 0.1) == pytest.approx(plain(feeds, 0.1), rel=1e-5)
    for name, array in plain.weights.items():
        np.testing.assert_allclose(blocked.weights[name], array, rtol=1e-4, atol=1e-6)
    used = [node.op for node in blocked.model.nodes()]
    # Of x and of the gradient, but not between the two.
    assert used.count("ReorderInput") == (2 if block_size() else 0)
