"""Models in halves and doubles are worked on, and stay in their type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import Budget, shrink
from onnxshrink.manager import Result

KINDS = {"float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


def perceptron(kind: str, keeps_io: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    data_type = KINDS[kind]
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 64)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(s) / 8).astype(kind), name)
        for name, s in shapes.items()
    ]
    first, last = ("x", "y") if not keeps_io else ("inner_x", "inner_y")
    nodes = [
        helper.make_node("MatMul", [first, "w1"], ["h"]),
        helper.make_node("Add", ["h", "b1"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], [last]),
    ]
    if keeps_io:
        nodes.insert(0, helper.make_node("Cast", ["x"], [first], to=data_type))
        nodes.append(helper.make_node("Cast", [last], ["y"], to=TensorProto.FLOAT))
    outside = TensorProto.FLOAT if keeps_io else data_type
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", outside, ["N", 32])],
        [helper.make_tensor_value_info("y", outside, ["N", 64])],
        weights,
    )
    opsets = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, ir_version=9, opset_imports=opsets)


def shrunk(kind: str, keeps_io: bool, passes: str, **options: Any) -> Result:
    x = np.random.default_rng(1).standard_normal((128, 32))
    data = {"x": x.astype(np.float32 if keeps_io else kind)}
    options = {"measure_latency": False, "measure_memory": False, **options}
    return shrink(perceptron(kind, keeps_io), passes, data=data, **options)


CASES = [(kind, keeps) for kind in KINDS for keeps in (False, True)]


@pytest.mark.parametrize(("kind", "keeps_io"), CASES)
def test_weights_are_coded_with_scales_of_the_models_type(
    kind: str, keeps_io: bool
) -> None:
    result = shrunk(kind, keeps_io, "quantize", budget=Budget(min_sqnr=30))
    held = {w.name: w for w in result.model.weights()}
    for name in ("w1", "w2"):
        assert held[f"{name}_codes"].dtype == np.int8
        scale = held[f"{name}_scale"].read()
        np.testing.assert_array_equal(scale, scale.astype(kind).astype(scale.dtype))
    assert result.report.steps[0].accepted


@pytest.mark.parametrize(("kind", "keeps_io"), CASES)
def test_masters_of_float32_are_trained_and_rounded(kind: str, keeps_io: bool) -> None:
    passes = "prune:sparsity=0.8,distill:epochs=12"
    wild = Budget(min_sqnr=-50)
    result = shrunk(kind, keeps_io, passes, budget=wild)
    last = result.report.steps[-1]
    assert any("trained" in what for _, what in last.did)
    weights = [result.model.weight(name) for name in ("w1", "w2")]
    assert all(weight.dtype == np.dtype(kind) for weight in weights)
    held = np.concatenate([weight.read().reshape(-1) for weight in weights]) == 0
    assert held.mean() == pytest.approx(0.8, abs=0.001)  # training moves no zero
    x = next(info for info in result.model.inputs)
    assert x.data_type == (TensorProto.FLOAT if keeps_io else KINDS[kind])
