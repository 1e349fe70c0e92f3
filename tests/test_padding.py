"""Padding of calibration samples: what is seen there counts for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.analysis.activations import gather
from onnxshrink.analysis.padding import places, without
from onnxshrink.analysis.statistics import ChannelRange, Gram, Multi, Sample
from onnxshrink.base import Context
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits

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


def test_padding_stands_for_the_real_positions_in_turn() -> None:
    at = places({"attention_mask": MASK})
    assert at is not None
    assert at.tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4], [1, 1, 2, 3, 2]]
    value = np.arange(30.0).reshape(3, 5, 2)
    seen = without(value, at)
    assert np.array_equal(seen[0], value[0][[0, 1, 0, 1, 0]])
    assert np.array_equal(seen[1], value[1])


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 5), (5, 3, 2), (15, 2)])
def test_values_without_a_row_for_each_position_stay(
    shape: tuple[int, ...],
) -> None:
    value = np.arange(float(np.prod(shape))).reshape(shape)
    assert without(value, places({"attention_mask": MASK})) is value


@pytest.mark.parametrize(
    "feed",
    [
        {"mask": MASK},
        {"attention_mask": np.ones((3, 5), np.int64)},
        {"attention_mask": MASK * 2},
        {"attention_mask": MASK[:, None]},
        {"attention_mask": MASK, "other_attention_mask": MASK},
    ],
)
def test_what_is_no_mask_of_padding_is_not_taken_for_it(
    feed: dict[str, Array],
) -> None:
    assert places(feed) is None


def test_a_sample_that_is_all_padding_stays_as_it_is() -> None:
    at = places({"bert/input_mask": MASK * np.array([[0], [1], [1]])})
    assert at is not None
    assert at[0].tolist() == [0, 1, 2, 3, 4]


def test_statistics_do_not_see_padding() -> None:
    model = Model.load(onnx.parser.parse_model(EMBEDDED))
    ids = np.array([[1, 2, 0, 0], [1, 0, 0, 0], [2, 3, 1, 2]], np.int64)
    data = {"ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    samples = Samples.from_arrays(data).bind(model.inputs)
    ctx = Context(samples=Splits(calibration=samples), reference=model.copy())
    wanted = Multi(gram=Gram(), rows=Sample(), range=ChannelRange(-1))
    seen = gather(model, {"rows": wanted}, ctx)["rows"]
    assert isinstance(seen, Multi)
    rows = np.array([1, 2, 1, 2, 1, 1, 1, 1, 2, 3, 1, 2])
    table = np.array([[9, 9, 9], [1, 2, 3], [4, 5, 6], [7, 8, -9]], np.float32)
    used = table[rows]
    assert np.array_equal(seen["rows"].values, used)  # type: ignore[attr-defined]
    assert np.array_equal(seen["gram"].matrix, used.T @ used)  # type: ignore[attr-defined]
    assert seen["range"].high.tolist() == [7, 8, 6]  # type: ignore[attr-defined]
