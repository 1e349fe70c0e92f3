"""What Python hands over: loaders, rows, tensors, frames, lengths; nothing imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import ValueInfo
from onnxshrink.samples import Samples, Splits
from onnxshrink.samples.given import to_array

F32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
VECTOR = (ValueInfo("x", F32, ("N", 4)),)
TWO = (ValueInfo("a", F32, ("N", 4)), ValueInfo("b", F32, ("N", 1)))
SERIES = (ValueInfo("x", F32, ("N", "t", 4)),)
TOKENS = (
    ValueInfo("input_ids", I64, ("batch", "seq")),
    ValueInfo("attention_mask", I64, ("batch", "seq")),
    ValueInfo("token_type_ids", I64, ("batch", "seq")),
)
X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10) % 3


class Tensor:
    """A tensor that needs gradients and lies on a device, as PyTorch refuses it."""

    def __init__(self, value: Any, tracked: bool = True, far: bool = True) -> None:
        self.value, self.tracked, self.far = np.asarray(value), tracked, far
        self.shape, self.dtype = self.value.shape, f"torch.{self.value.dtype}"

    def detach(self) -> Tensor:
        return Tensor(self.value, False, self.far)

    def cpu(self) -> Tensor:
        return Tensor(self.value, self.tracked, False)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.tracked or self.far:
            raise RuntimeError("cannot convert")
        return self.value

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Tensor]:
        return (Tensor(part) for part in self.value)


class Exchanged:
    """What has only ``__dlpack__``."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.shape = value, value.shape

    def __dlpack__(self, **words: Any) -> Any:
        return self.value.__dlpack__(**words)

    def __dlpack_device__(self) -> Any:
        return self.value.__dlpack_device__()


class Encoding:
    """As ``tokenizers`` gives it."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.type_ids = ids, [0] * len(ids)
        self.attention_mask = [1] * len(ids)


class Frame:
    """As pandas shows itself."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns
        self.columns = list(columns)
        self.shape = (len(next(iter(columns.values()))), len(columns))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._columns[name])

    def to_numpy(self) -> np.ndarray:
        return np.stack([np.asarray(c) for c in self._columns.values()], 1)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.to_numpy()


class Rows:
    """A data set that knows its length and never says where it ends."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Tensor(X[index % 10]), int(Y[index % 10])


def fed(data: Any, inputs: Any = VECTOR, **words: Any) -> Samples:
    return Samples.of(data, **words).bind(inputs)


def read(samples: Samples) -> np.ndarray:
    return samples.read(np.arange(len(samples)))["x"]


PAIRS = {
    "loader of pairs": [(Tensor(X[:5]), Tensor(Y[:5])), (Tensor(X[5:]), Tensor(Y[5:]))],
    "loader of lists": [[Tensor(X[:5]), Y[:5]], [Tensor(X[5:]), Y[5:]]],
    "rows of pairs": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "rows of lists": [(x.tolist(), y) for x, y in zip(X, Y, strict=True)],
    "dicts by batch": [{"x": X[:5], "labels": Y[:5]}, {"x": X[5:], "labels": Y[5:]}],
    "dicts by row": [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    "a pair of arrays": (X, Y),
    "a pair of tensors": (Tensor(X), Tensor(Y)),
    "a data set": Rows(),
    "a frame": Frame(a=X[:, 0], b=X[:, 1], c=X[:, 2], d=X[:, 3], target=Y),
    "a mapping of lists": {"x": X.tolist(), "class": Y.tolist()},
    "a mapping of tensors": {"x": Tensor(X), "label": Tensor(Y)},
    "pairs of a mapping": [({"x": X[:5]}, Y[:5]), ({"x": X[5:]}, Y[5:])],
}


@pytest.mark.parametrize("name", PAIRS)
def test_samples_and_labels_are_found_in(name: str):
    given = PAIRS[name]
    if name == "a mapping of lists":
        given = {"x": X, "class": Y.tolist()}
    samples = fed(given)
    assert np.array_equal(read(samples), X)
    assert samples.labels is not None
    assert samples.labels.tolist() == Y.tolist()


def test_generators_are_read_once():
    samples = fed(pair for pair in [(X[:5], Y[:5]), (X[5:], Y[5:])])
    assert np.array_equal(read(samples), X)
    assert np.array_equal(read(samples), X)


@pytest.mark.parametrize("value", [Tensor(X), Exchanged(X), X.tolist(), list(X)])
def test_tensors_of_any_kind_are_arrays(value: Any):
    assert np.array_equal(to_array(value), X)


def test_a_tensor_that_cannot_be_read_is_named():
    class Broken:
        shape = (3,)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            raise RuntimeError("no memory on the device")

    with pytest.raises(ModelError, match=r"Broken cannot be read.*no memory"):
        Samples.of([Broken()])


def test_two_inputs_come_in_their_order_with_labels_behind_or_not():
    b = np.ones((10, 1), np.float32)
    with_labels = Samples.of([(X[:5], b[:5], Y[:5]), (X[5:], b[5:], Y[5:])]).bind(TWO)
    assert with_labels.labels is not None
    assert np.array_equal(with_labels.read([0, 9])["a"], X[[0, 9]])
    without = Samples.of([(X, b)]).bind(TWO)
    assert without.labels is None
    with pytest.raises(UsageError, match=r"items of 4 arrays.*takes 2 inputs: a, b"):
        Samples.of([(X, b, Y, Y)]).bind(TWO)


def test_a_transform_changes_every_item():
    loader = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    samples = fed(loader, transform=lambda item: {"x": item[0] * 2, "labels": item[1]})
    assert np.array_equal(read(samples), X * 2)
    rows = fed({"raw": X, "y": Y}, transform=lambda row: (row["raw"] + 1, row["y"]))
    assert np.array_equal(read(rows), X + 1)
    assert rows.labels is not None
    frame = fed(Frame(p=Y), transform=lambda row: np.full(4, row["p"], np.float32))
    assert np.array_equal(read(frame), np.repeat(Y[:, None], 4, 1))


def test_labels_that_were_found_and_columns_that_nothing_uses_are_said():
    samples = fed({"x": X, "target": Y, "id": np.arange(10), "split": np.arange(10)})
    assert samples.notes == (
        "labels: taken from 'target'",
        "nothing uses 'id', 'split'",
    )


def test_an_input_is_no_label():
    inputs = (*VECTOR, ValueInfo("y", I64, ("N",)))
    samples = Samples.of({"x": X, "y": Y}).bind(inputs)
    assert samples.labels is None
    assert samples.read([4])["y"].tolist() == [1]


def test_parts_of_a_data_set_are_asked_for():
    class Part:
        column_names = ("x",)

    with pytest.raises(UsageError, match=r"parts 'train', 'test'; give one"):
        Samples.of({"train": Part(), "test": Part()})


# Lengths


def series(lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(size=(n, 4)).astype(np.float32) for n in lengths]


LENGTHS = [3, 5, 3, 4, 5, 3, 4, 5, 9, 3]


@pytest.mark.parametrize("form", ["mapping", "rows", "pairs", "batches", "objects"])
def test_samples_of_different_lengths_run_with_those_of_their_length(form: str):
    given = series(LENGTHS)
    objects = np.empty(10, object)
    objects[:] = given
    data: Any = {
        "mapping": {"x": given, "labels": Y},
        "rows": [{"x": one, "labels": y} for one, y in zip(given, Y, strict=True)],
        "pairs": list(zip(given, Y, strict=True)),
        "batches": [(one[None], [y]) for one, y in zip(given, Y, strict=True)],
        "objects": {"x": objects, "labels": Y},
    }[form]
    samples = Samples.of(data).bind(SERIES).grouped()
    assert "4 shapes; those of one shape run together" in samples.notes[-1]
    shapes = [batch["x"].shape for batch in samples.batches(3)]
    assert shapes == [(3, 3, 4), (1, 3, 4), (2, 4, 4), (3, 5, 4), (1, 9, 4)]
    assert samples.labels is not None
    for place, position in enumerate(samples.positions):
        assert np.array_equal(samples.read([place])["x"][0], given[position])
        assert samples.labels[place] == Y[position]
    with pytest.raises(ModelError, match="different shapes"):
        samples.read([0, 9])


def test_splits_keep_samples_of_one_length_together():
    splits = Splits.build(_model(SERIES), {"x": series(LENGTHS * 4)})
    for part in (splits.calibration, splits.evaluation):
        assert part is not None
        lengths = [batch["x"].shape[1] for batch in part.batches(100)]
        assert lengths == sorted(set(lengths))


IDS = [[5, 6, 7], [8], [9, 10, 11, 12], [3, 4]]


@pytest.mark.parametrize("form", ["encodings", "rows", "columns", "mask missing"])
def test_a_mask_covers_what_is_filled_up(form: str):
    ones = [[1] * len(row) for row in IDS]
    zeros = [[0] * len(row) for row in IDS]
    columns = {"input_ids": IDS, "attention_mask": ones, "token_type_ids": zeros}
    data: Any = {
        "encodings": [Encoding(row) for row in IDS],
        "rows": [{n: c[i] for n, c in columns.items()} for i in range(4)],
        "columns": columns,
        "mask missing": {"input_ids": IDS, "token_type_ids": zeros},
    }[form]
    samples = Samples.of(data).bind(TOKENS)
    feed = samples.read([0, 1, 2, 3])
    assert feed["input_ids"].tolist() == [
        [5, 6, 7, 0],
        [8, 0, 0, 0],
        [9, 10, 11, 12],
        [3, 4, 0, 0],
    ]
    assert feed["attention_mask"].sum(1).tolist() == [3, 1, 4, 2]
    assert feed["attention_mask"][:, 0].tolist() == [1, 1, 1, 1]
    assert {v.dtype for v in feed.values()} == {np.dtype(np.int64)}
    assert any("filled up with zeros" in note for note in samples.notes)


def test_samples_are_filled_up_to_a_fixed_length():
    inputs = [ValueInfo(i.name, I64, ("batch", 6)) for i in TOKENS[:2]]
    samples = Samples.of([{"input_ids": row} for row in IDS]).bind(inputs)
    assert samples.read([1])["input_ids"].tolist() == [[8, 0, 0, 0, 0, 0]]
    assert samples.read([1])["attention_mask"].tolist() == [[1, 0, 0, 0, 0, 0]]
    long = [{"input_ids": [1] * n} for n in (3, 7)]
    with pytest.raises(UsageError, match="do not fit the input 'input_ids'"):
        Samples.of(long).bind(inputs)


def test_items_are_batches_or_samples_as_the_model_takes_them():
    image = (ValueInfo("x", F32, ("N", 1, 4, 4)),)
    batch = np.ones((3, 4, 4), np.float32)
    assert len(Samples.of([batch, batch]).bind(image)) == 6
    assert len(Samples.of([batch[0], batch[1]]).bind(image)) == 2
    assert len(Samples.of([batch[:, None]]).bind(image)) == 3
    fixed = (ValueInfo("x", F32, (1, 4)),)
    assert len(Samples.of([X[:1], X[1:2]]).bind(fixed)) == 2
    assert len(Samples.of(list(X)).bind(fixed)) == 10


def test_rows_that_differ_in_names_or_kind_are_named():
    with pytest.raises(ModelError, match=r"batch 1 has arrays \['y'\]"):
        Samples.of([{"x": X[0]}, {"y": X[0]}])
    with pytest.raises(ModelError, match="batch 1, array 'x' is <U1"):
        Samples.of([{"x": X[0]}, {"x": np.array(["a"])}])
    with pytest.raises(ModelError, match="Python objects"):
        Samples.of({"x": [{}, []]})
    with pytest.raises(ModelError, match="batch 0 is object"):
        Samples.of([object()])


def test_columns_of_whole_numbers_feed_floats_beside_each_other():
    frame = Frame(age=np.arange(10), height=np.arange(10) / 2)
    inputs = (ValueInfo("x", F32, ("N", 2)),)
    samples = Samples.of(frame).bind(inputs)
    assert samples.read([3])["x"].tolist() == [[3, 1.5]]
    assert samples.notes[0] == "x: the columns age, height side by side"
    by_name = (ValueInfo("age", F32, ("N", 1)), ValueInfo("height", F32, ("N", 1)))
    assert Samples.of(frame).bind(by_name).read([3])["age"].tolist() == [[3]]


def test_the_digest_is_of_values_and_labels():
    one = fed({"x": X, "labels": Y}).digest
    assert fed({"x": X.copy(), "labels": Y}).digest == one
    changed = X.copy()
    changed[9, 3] += 1
    assert fed({"x": changed, "labels": Y}).digest != one
    assert fed({"x": X, "labels": Y[::-1].copy()}).digest != one


def _model(inputs: Any) -> Any:
    from onnxshrink.model import Model

    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,t,4] x) => '
        "(float[N,t,4] y) { y = Relu(x) }"
    )
    return Model.load(onnx.parser.parse_model(text))
