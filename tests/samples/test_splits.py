"""Splits: disjoint, seeded, and true to a fixed batch size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits

F32, I64, I32, BOOL = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
)


def whole(samples: Samples, size: int = 4) -> dict[str, np.ndarray]:
    batches = list(samples.batches(size))
    return {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}


def model(text: str) -> Model:
    return Model.load(onnx.parser.parse_model(text))


LINEAR = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{ y = MatMul(x, w) }
"""


def test_one_file_is_divided_into_disjoint_parts():
    m = model(LINEAR)
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    data = {"x": x, "labels": np.arange(100)}
    splits = Splits.build(m, data, seed=4, calibration_size=20)
    parts = [
        splits.calibration,
        splits.training,
        splits.validation,
        splits.evaluation,
    ]
    sizes = [len(p) for p in parts if p is not None]
    assert sizes == [20, 32, 8, 40]
    seen = [p.labels for p in parts if p is not None]
    assert sorted(np.concatenate(seen).tolist()) == list(range(100))  # type: ignore[arg-type]
    for part in parts:
        assert part is not None
        assert np.array_equal(whole(part)["x"][:, 0] // 2, part.labels)
    again = Splits.build(m, data, seed=4, calibration_size=20)
    assert np.array_equal(again.calibration.labels, seen[0])  # type: ignore[union-attr]
    assert splits.describe() == (
        "samples: calibration 20, training 32, validation 8, evaluation 40; evaluation "
        "is 40 of 100 samples, held out by a permutation with seed 4",
    )
    assert splits.labelled


def test_evaluation_data_is_used_exactly_as_given():
    m = model(LINEAR)
    data = np.zeros((50, 2), np.float32)
    held = {"x": np.ones((30, 2), np.float32), "labels": np.arange(30)}
    splits = Splits.build(m, data, held)
    assert splits.evaluation is not None
    assert splits.evaluation.labels is not None
    assert splits.evaluation.labels.tolist() == list(range(30))
    others = (splits.calibration, splits.training, splits.validation)
    assert sum(len(p) for p in others if p) == 50


def test_evaluation_data_alone_calibrates_nothing():
    splits = Splits.build(model(LINEAR), None, np.ones((3, 2), np.float32))
    assert splits.calibration is None
    assert splits.evaluation is not None


def test_a_single_sample_measures():
    splits = Splits.build(model(LINEAR), np.ones((1, 2), np.float32))
    assert splits.evaluation is not None
    assert splits.calibration is None


def test_no_data_is_a_smoke_test_with_disjoint_seeds():
    splits = Splits.build(model(LINEAR), shapes={"x": (3, 2)})
    assert splits.random
    assert splits.calibration is not None
    assert splits.evaluation is not None
    one, two = splits.calibration.read([0]), splits.evaluation.read([0])
    assert one["x"].shape == (3, 2)
    assert not np.array_equal(one["x"], two["x"])
    assert "smoke test" in splits.describe()[0]


def test_a_fixed_batch_size_is_kept_whole_in_every_split():
    m = model(LINEAR.replace("N, 2", "4, 2"))
    splits = Splits.build(m, np.ones((42, 2), np.float32), calibration_size=10)
    sizes = [len(s) for _, s in splits._named() if s is not None]
    assert sum(sizes) <= 42
    assert all(size % 4 == 0 for size in sizes)


def test_limits_of_the_splits_are_checked():
    m = model(LINEAR)
    with pytest.raises(UsageError, match="between 0 and 1"):
        Splits.build(m, np.ones((3, 2), np.float32), evaluation_share=1.0)
    with pytest.raises(UsageError, match="at least 1"):
        Splits.build(m, np.ones((3, 2), np.float32), calibration_size=0)
    with pytest.raises(UsageError, match="--shape"):
        Splits.build(m, np.ones((3, 2), np.float32), shapes={"x": (1, 2)})


def test_data_is_not_copied_when_it_is_divided():
    x = np.zeros((1000, 2), np.float32)
    splits = Splits.build(model(LINEAR), x)
    x[:] = 7
    assert splits.evaluation is not None
    assert whole(splits.evaluation)["x"].min() == 7


def test_positions_say_which_sample_of_the_source_each_is() -> None:
    x = np.arange(10, dtype=np.float32).reshape(10, 1)
    samples = Samples.from_arrays({"ids": x})
    part = samples.take([7, 2, 5]).take([2, 0])
    np.testing.assert_array_equal(part.positions, [5, 7])
    assert part.source_count == 10
    part.positions[0] = 9
    np.testing.assert_array_equal(part.positions, [5, 7])


def sizes(count: int, *, evaluation: int = 0, trains: bool = False) -> list[int]:
    """Return how many samples calibrate, train, choose and measure."""
    model = Model.load(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 17]> '
            "g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }"
        )
    )
    x = np.zeros((count, 3), np.float32)
    held = {"x": x[:evaluation]} if evaluation else None
    made = Splits.build(model, {"x": x}, held, trains=trains)
    parts = (made.calibration, made.training, made.validation, made.evaluation)
    return [0 if part is None else len(part) for part in parts]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [1, 0, 1, 1]),
        (20, [5, 0, 7, 8]),
        (48, [13, 0, 16, 19]),
        (200, [96, 0, 24, 80]),
        (2000, [512, 448, 240, 800]),
    ],
)
def test_where_nothing_trains_no_samples_lie_idle(count: int, expected: list[int]):
    assert sizes(count) == expected


def test_of_samples_given_for_it_calibration_gets_two_thirds_of_few():
    assert sizes(48, evaluation=10) == [32, 0, 16, 10]
    assert sizes(1, evaluation=1) == [1, 0, 0, 1]


def test_where_something_trains_half_may_calibrate_at_most():
    assert sizes(200, trains=True) == [60, 48, 12, 80]


def test_parts_of_one_source_can_be_joined():
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    whole = Samples.of({"x": x})
    joined = whole.take([4, 1]).joined(whole.take([0]))
    assert joined.positions.tolist() == [4, 1, 0]
    with pytest.raises(UsageError, match="the same samples"):
        joined.joined(Samples.of({"x": x}))
