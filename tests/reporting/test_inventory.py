"""The inventory counts what is there, in every graph of a model."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import parser

from onnxshrink.model import Model
from onnxshrink.reporting.inventory import (
    count_values,
    inventory,
)
from onnxshrink.reporting.report import dump
from onnxshrink.tensors import ArrayTensor
from onnxshrink.testing import example_models

SHARED = """
<ir_version: 8, opset_import: ["": 17]>
shared (float[N,2] x) => (float[N,2] y)
<float[2,2] w = {1, 0, 0, 2}, float[2] b = {0, 5}>
{
  first = MatMul(x, w)
  second = MatMul(first, w)
  y = Add(second, b)
}
"""


def shared() -> Model:
    return Model.load(parser.parse_model(SHARED))


def test_a_shared_weight_counts_once_and_belongs_to_its_first_reader() -> None:
    found = inventory(shared())
    assert found.parameters == 6
    assert found.weight_bytes == 24
    assert [layer.values for layer in found.layers] == [4, 2, 0]
    weight = found.weights[0]
    assert (weight.name, weight.nodes, weight.used_by) == ("w", 2, ("MatMul",))


def test_zeros_and_distinct_values_are_counted() -> None:
    w, b = inventory(shared()).weights
    assert (w.size, w.nonzeros, w.distinct) == (4, 2, 3)
    assert (b.size, b.nonzeros, b.distinct) == (2, 1, 2)


def test_multiply_accumulates_are_those_of_the_shape_given() -> None:
    assert inventory(shared(), shapes={"x": (1, 2)}).macs == 8
    found = inventory(shared(), shapes={"x": (10, 2)})
    assert found.macs == 80
    assert found.assumed == {"x": (10, 2)}
    assert [group.macs for group in found.ops if group.name == "MatMul"] == [80]


def test_totals_are_the_sums_of_the_parts() -> None:
    found = inventory(shared())
    assert sum(group.nbytes for group in found.ops) == found.weight_bytes
    assert sum(group.nbytes for group in found.dtypes) == found.weight_bytes
    assert sum(group.count for group in found.ops) == found.nodes
    assert sum(group.values for group in found.dtypes) == found.parameters
    assert sum(layer.macs or 0 for layer in found.layers) == found.macs


def test_a_sparse_weight_could_be_smaller() -> None:
    w = np.zeros((64, 64), np.float32)
    w[::8, 3] = np.arange(8) + 1
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,64] x) => (float[N,64] y)'
        "{ y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    found = inventory(Model.load(proto))
    assert found.encoded_bytes < 0.1 * found.weight_bytes
    assert found.weights[0].encoding not in (None, "plain")


@pytest.mark.parametrize("name", example_models())
def test_every_kind_of_model_has_an_inventory(name: str) -> None:
    found = inventory(Model.load(example_models()[name]))
    assert found.nodes > 0
    assert json.loads(dump(found.to_json()))["nodes"] == found.nodes


@pytest.mark.parametrize(
    ("array", "distinct", "nonzeros"),
    [
        (np.array([0.0, -0.0, 1.0], np.float32), 3, 1),
        (np.array([np.nan, np.nan, 0.0], np.float64), 2, 2),
        (np.zeros((0, 3), np.float32), 0, 0),
        (np.array(7, np.int64), 1, 1),
        (np.array([1, 0, 1], ml_dtypes.bfloat16), 2, 2),
        (np.array([1, 0, -8], ml_dtypes.int4), 3, 2),
        (np.array([1, 0, 1], ml_dtypes.float8_e4m3fn), 2, 2),
        (np.array([True, False]), 2, 1),
        (np.arange(256), 256, 255),
        (np.arange(257), None, 256),
        (np.array(["a", "b", "a"], object), 2, None),
        (np.array([1 + 2j, 0], np.complex64), 2, 1),
    ],
    ids=str,
)
def test_values_of_every_type_are_counted(
    array: np.ndarray, distinct: int | None, nonzeros: int | None
) -> None:
    found = count_values(ArrayTensor(array))
    assert (found.distinct, found.nonzeros) == (distinct, nonzeros)


def test_a_value_that_comes_late_is_counted() -> None:
    array = np.zeros(3_000_000, np.float32)
    array[-1], array[70_000] = 1, 2
    assert count_values(ArrayTensor(array)).distinct == 3


def test_a_large_tensor_is_counted_whole_and_sampled_evenly() -> None:
    array = np.zeros(12 << 20, np.float32)
    array[8 << 20 :] = 1
    tensor = ArrayTensor(array)
    found = count_values(tensor, sampled=40 << 20)
    assert (found.nonzeros, found.distinct) == (4 << 20, 2)
    assert found.sample.nbytes == 24 << 20
    assert np.count_nonzero(found.sample.read()) == 2 << 20
    assert count_values(tensor).sample is tensor


def test_external_data_counts_as_part_of_the_file(tmp_path: Path) -> None:
    model = Model.load(parser.parse_model(SHARED))
    model.set_weight("w", np.ones((2, 2), np.float32))
    big = np.arange(1000, dtype=np.float32)
    model.add_node("Add", [model.graph.outputs[0], model.add_weight("big", big)])
    files = model.save(tmp_path / "m.onnx", storage="plain", external="always")
    assert len(files) == 2
    found = inventory(Model.load(files[0]))
    assert found.file_bytes == sum(file.stat().st_size for file in files)
