"""Samples of different lengths go through passes, validation and training."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink import shrink
from onnxshrink.model import Model

RANDOM = np.random.default_rng(0)


def model() -> Model:
    w = RANDOM.normal(size=(16, 32)).astype(np.float32)
    v = RANDOM.normal(size=(32, 10)).astype(np.float32)
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,T,16] x) => '
        "(float[N,10] o) { m = ReduceMean <axes = [1], keepdims = 0> (x) "
        "a = MatMul(m, w) r = Relu(a) o = MatMul(r, v) }"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(v, "v"))
    return Model.load(proto)


@pytest.mark.parametrize(
    "passes",
    [
        "quantize",
        "prune:sparsity=0.5,recover",
        "prune:sparsity=0.9,distill:epochs=1,batch=4",
    ],
)
def test_no_length_is_refused(passes: str):
    lengths = RANDOM.integers(3, 6, 60)
    x = [RANDOM.normal(size=(int(n), 16)).astype(np.float32) for n in lengths]
    result = shrink(
        model(), passes, data={"x": x}, measure_latency=False, measure_memory=False
    )
    assert any("those of one shape run together" in n for n in result.report.notes)
    verdict = result.report.steps[-1].verdict
    assert verdict is not None
    assert verdict.samples == 24
