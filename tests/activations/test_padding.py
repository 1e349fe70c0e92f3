"""Padding of calibration samples: what is seen there counts for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.activations.gathering import gather
from onnxshrink.activations.padding import feed, mask
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.statistics import (
    ChannelRange,
    Gram,
    Multi,
    Sample,
    Statistic,
)

Array = np.ndarray[Any, Any]

MASK = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], np.int64)
EMBEDDED = """
<ir_version: 10, opset_import: ["" : 17]>
g (int64[N, S] ids, int64[N, S] attention_mask) => (float[N, 3] y)
<float[4, 3] table = {9, 9, 9, 1, 2, 3, 4, 5, 6, 7, 8, -9}>
{
  rows = Gather(table, ids)
  factor = Cast<to = 1>(attention_mask)
  axes = Constant<value = int64[1] {2}>()
  column = Unsqueeze(factor, axes)
  some = Mul(rows, column)
  first = Constant<value = int64[1] {1}>()
  y = ReduceSum<keepdims = 0>(some, first)
}
"""


class Seen(Statistic):
    """Keeps what it is fed; without ``axis`` or with another, shapes matter to it."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.value = np.zeros(0)

    def update(self, array: Array) -> None:
        self.value = array

    def _merge(self, other: Seen) -> None:
        raise AssertionError


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_where_axes_mean_something_padding_repeats_what_is_real(
    axis: int | None,
) -> None:
    value = np.arange(30.0).reshape(3, 5, 2)
    statistic = Seen(axis)
    feed(Multi(one=statistic), value, mask({"attention_mask": MASK}))
    assert np.array_equal(statistic.value[0], value[0][[0, 1, 0, 1, 0]])
    assert np.array_equal(statistic.value[1], value[1])
    assert np.array_equal(statistic.value[2], value[2][[1, 1, 2, 3, 2]])


def test_rows_count_once_each() -> None:
    value = np.arange(30.0).reshape(3, 5, 2)
    statistic = Seen(-1)
    feed(statistic, value, mask({"attention_mask": MASK}))
    wanted = [*value[0, :2], *value[1], *value[2, 1:4]]
    assert np.array_equal(statistic.value, [wanted])


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (5, 3, 2), (15, 2)])
def test_values_without_a_row_for_each_position_stay(shape: tuple[int, ...]) -> None:
    value = np.arange(float(np.prod(shape))).reshape(shape)
    statistic = Seen(-1)
    feed(statistic, value, mask({"attention_mask": MASK}))
    assert statistic.value is value


@pytest.mark.parametrize(
    "inputs",
    [
        {"mask": MASK},
        {"attention_mask": np.ones((3, 5), np.int64)},
        {"attention_mask": MASK * 2},
        {"attention_mask": MASK[:, None]},
        {"attention_mask": MASK, "other_attention_mask": MASK},
        {"input_mask": MASK * np.array([[0], [1], [1]])},
    ],
)
def test_what_is_no_mask_of_padding_is_not_taken_for_it(
    inputs: dict[str, Array],
) -> None:
    assert mask(inputs) is None


def test_statistics_do_not_see_padding() -> None:
    model = Model.load(onnx.parser.parse_model(EMBEDDED))
    ids = np.array([[1, 2, 0, 0], [1, 0, 0, 0], [2, 3, 1, 2]], np.int64)
    data = {"ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    samples = Samples.from_arrays(data).bind(model.inputs)
    ctx = make_context(samples=Splits(calibration=samples), reference=model.copy())
    wanted = Multi(gram=Gram(), rows=Sample(), range=ChannelRange(-1))
    seen = gather(model, {"rows": wanted}, ctx)["rows"]
    assert isinstance(seen, Multi)
    rows = np.array([1, 2, 1, 2, 3, 1, 2])
    table = np.array([[9, 9, 9], [1, 2, 3], [4, 5, 6], [7, 8, -9]], np.float32)
    used = table[rows]
    assert np.array_equal(seen["rows"].values, used)  # type: ignore[attr-defined]
    assert np.array_equal(seen["gram"].matrix, used.T @ used)  # type: ignore[attr-defined]
    assert seen["range"].high.tolist() == [7, 8, 6]  # type: ignore[attr-defined]
