"""Heads that are a table turned read the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.quantization.tying import tie

Array = np.ndarray[Any, Any]


def decoder(head: Array, table: Array, body: str = "y = MatMul(a, h)") -> Model:
    graph = onnx.parser.parse_graph(
        f"g (int64[N,T] i) => (float[N,T,C] y) {{ a = Gather(t, i) {body} }}"
    )
    graph.initializer.extend(
        [numpy_helper.from_array(table, "t"), numpy_helper.from_array(head, "h")]
    )
    opset = helper.make_opsetid("", 17)
    return Model.load(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def table() -> Array:
    return np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)


def test_a_head_with_the_values_of_the_table_reads_it() -> None:
    before = decoder(np.ascontiguousarray(table().T), table())
    after = before.copy()
    assert tie(after) == ["h"]
    assert [weight.name for weight in after.weights()] == ["t"]
    i = np.array([[3, 5]])
    wanted = runtime.session(before, threads=1).run({"i": i})["y"]
    np.testing.assert_array_equal(
        runtime.session(after, threads=1).run({"i": i})["y"], wanted
    )


def test_one_other_value_keeps_the_head() -> None:
    head = np.ascontiguousarray(table().T)
    head[63, 95] += 1
    model = decoder(head, table())
    assert tie(model) == []
    assert len(list(model.weights())) == 2


@pytest.mark.parametrize("chosen", [{"skip": ["h"]}, {"only": ["h"]}])
def test_what_is_not_chosen_is_not_tied(chosen: dict[str, list[str]]) -> None:
    model = decoder(np.ascontiguousarray(table().T), table())
    assert tie(model, **chosen) == []
