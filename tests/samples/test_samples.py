"""Samples: what is read, what is refused, and what is never done silently."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model, ValueInfo
from onnxshrink.samples import Samples, archives

F32, I64, I32, BOOL = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
)
IMAGE = (ValueInfo("image", F32, ("N", 1, 2, 2)),)
TOKENS = (
    ValueInfo("ids", I64, ("batch", "seq")),
    ValueInfo("mask", I64, ("batch", "seq")),
)


def images(count: int = 6) -> np.ndarray:
    return np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2)


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez_compressed(path, **arrays)
    return path


def whole(samples: Samples, size: int = 4) -> dict[str, np.ndarray]:
    batches = list(samples.batches(size))
    return {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}


def model(text: str) -> Model:
    return Model.load(onnx.parser.parse_model(text))


# Plain data


def test_an_npz_feeds_inputs_by_name_and_keeps_labels(tmp_path: Path):
    path = saved(tmp_path, image=np.ones((5, 1, 2, 2), np.float32), labels=np.arange(5))
    samples = Samples.from_path(path).bind(IMAGE)
    assert len(samples) == 5
    assert [len(b["image"]) for b in samples.batches(2)] == [2, 2, 1]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert samples.notes == ()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_members_are_read_whether_packed_or_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool, order: Any
):
    x = np.asarray(np.random.default_rng(0).normal(size=(9, 3)), np.float32, order)
    save = np.savez_compressed if compress else np.savez
    save(tmp_path / "d.npz", a=np.zeros(7), x=x)
    monkeypatch.setattr(archives, "MAPPED", 10)
    samples = Samples.from_path(tmp_path / "d.npz:x=x")
    fed = whole(samples.bind([ValueInfo("x", F32, (None, 3))]))
    assert np.array_equal(fed["x"], x)


def test_a_npy_feeds_the_only_input(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((3, 1, 2, 2), np.float32))
    assert whole(Samples.from_path(tmp_path / "x.npy").bind(IMAGE))["image"].sum() == 12


def test_a_folder_of_npz_may_hold_a_sample_each(tmp_path: Path):
    for number in range(3):
        one = np.full((1, 2, 2), number, np.float32)
        np.savez(tmp_path / f"{number}.npz", image=one, labels=number)
    samples = Samples.from_path(tmp_path).bind(IMAGE)
    assert whole(samples)["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2]


def test_a_folder_of_npy_may_hold_a_sample_each_with_labels_beside(tmp_path: Path):
    for number in range(3):
        np.save(tmp_path / f"s{number}.npy", np.full((1, 2, 2), number, np.float32))
    samples = Samples.from_path(tmp_path).bind(IMAGE)
    assert whole(samples)["image"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert samples.labels is None
    (tmp_path / "labels.csv").write_text("file,class\ns2.npy,dog\ns0,cat\ns1,dog\n")
    samples = Samples.from_path(tmp_path).bind(IMAGE)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 1]
    assert len(samples) == 3


def test_a_npy_does_not_feed_two_inputs(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.int64))
    with pytest.raises(UsageError, match="one input only"):
        Samples.from_path(tmp_path / "x.npy").bind(TOKENS)


def test_a_folder_of_npz_is_read_in_order(tmp_path: Path):
    for number in (1, 0, 2):
        part = np.full((2, 1, 2, 2), number, np.float32)
        np.savez(tmp_path / f"{number}.npz", image=part, labels=[number, number])
    samples = Samples.from_path(tmp_path).bind(IMAGE)
    assert whole(samples)["image"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.take([5, 0, 3]).labels.tolist() == [2, 0, 1]  # type: ignore[union-attr]
    picked = samples.read([5, 0, 3])["image"][:, 0, 0, 0]
    assert picked.tolist() == [2, 0, 1]


def test_a_folder_of_npy_has_one_file_for_each_input(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.ones((3, 4), np.int64))
    np.save(tmp_path / "mask.npy", np.zeros((3, 4), np.int64))
    assert Samples.from_path(tmp_path).bind(TOKENS).names == ("ids", "mask")


def test_arrays_and_batches_give_the_same_feeds():
    x = np.random.default_rng(0).normal(size=(5, 1, 2, 2)).astype(np.float32)
    one = whole(Samples.of({"image": x}).bind(IMAGE))
    two = whole(Samples.of(x).bind(IMAGE))
    three = whole(Samples.of(iter([{"image": x[:2]}, {"image": x[2:]}])).bind(IMAGE))
    for fed in (one, two, three):
        assert np.array_equal(fed["image"], x)


# The words after the path


def test_an_expression_is_computed_from_left_to_right_in_the_dtype_of_the_input(
    tmp_path: Path,
):
    path = saved(tmp_path, train_x=images(), train_y=np.arange(6))
    samples = Samples.from_path(f"{path}:image=train_x-127/128,labels=train_y")
    bound = samples.bind(IMAGE)
    fed = whole(bound)["image"]
    expected = (images().astype(np.float32) - np.float32(127)) / np.float32(128)
    assert fed.dtype == np.float32
    assert np.array_equal(fed, expected.reshape(6, 1, 2, 2))
    assert bound.notes == ("image: samples [2, 2] reshaped to [1, 2, 2]",)
    assert bound.labels is not None


def test_channels_move_in_front_when_asked(tmp_path: Path):
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    path = saved(tmp_path, x=x)
    info = [ValueInfo("input", F32, ("N", 3, 4, 5))]
    fed = whole(Samples.from_path(f"{path}:input=x@chw").bind(info))["input"]
    assert np.array_equal(fed, x.transpose(0, 3, 1, 2))
    with pytest.raises(UsageError, match="@chw moves the last axis"):
        Samples.from_path(f"{path}:input=x").bind(info)


def test_masks_and_constants_complete_token_ids(tmp_path: Path):
    ids = np.array([[5, 7, 0], [3, 0, 0]], np.int16)
    path = saved(tmp_path, ids1=ids)
    inputs = (*TOKENS, ValueInfo("kind", I64, ("batch", "seq")))
    samples = Samples.from_path(f"{path}:ids=ids1,mask=ids1@mask,kind=0")
    fed = whole(samples.bind(inputs))
    assert fed["ids"].tolist() == ids.tolist()
    assert fed["mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert fed["kind"].tolist() == [[0] * 3] * 2
    assert {v.dtype for v in fed.values()} == {np.dtype(np.int64)}


def test_the_longest_array_name_is_taken(tmp_path: Path):
    path = saved(tmp_path, **{"x": np.zeros((2, 3)), "x-1": np.ones((2, 3))})
    info = [ValueInfo("x", onnx.TensorProto.DOUBLE, ("N", 3))]
    assert whole(Samples.from_path(f"{path}:x=x-1").bind(info))["x"].max() == 1
    assert whole(Samples.from_path(f"{path}:x=x-2").bind(info))["x"].max() == -2


def test_labels_are_chosen_by_key(tmp_path: Path):
    path = saved(tmp_path, image=np.ones((3, 1, 2, 2), np.float32), y=[7, 8, 9])
    samples = Samples.from_path(path, labels="y").bind(IMAGE)
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 8, 9]
    with pytest.raises(UsageError, match=r"no labels 'yy'.*Did you mean 'y'"):
        Samples.from_path(path, labels="yy")


def test_a_path_may_hold_a_colon(tmp_path: Path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    path = saved(folder, image=np.ones((3, 1, 2, 2), np.float32))
    assert len(Samples.from_path(path).bind(IMAGE)) == 3
    assert len(Samples.from_path(f"{path}:image=image").bind(IMAGE)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("image", "cannot read 'image'; each part"),
        ("image=", "cannot read 'image='"),
        (
            "image=trainx",
            r"no array 'trainx'.*'train_x' \(uint8 \[6, 2, 2\]\).*Did you",
        ),
        ("image=train_x/0", "divides by zero"),
        ("image=train_x%2", "no array 'train_x%2'"),
        ("image=train_x/2%2", "cannot read '%2'"),
        ("image=train_x@hwc", "cannot read '@hwc'"),
        ("image=train_x,image=train_x", "'image' is given twice"),
        ("imgae=train_x/255", "no input 'imgae'.*Did you mean 'image'"),
        ("image=3", "at least one input needs an array"),
        ("image=train_x", r"train_x/255 \(or /1 to keep the values\)"),
        ("image=train_x/255,labels=4", "labels are a number"),
    ],
)
def test_words_that_cannot_be_read_are_explained(
    tmp_path: Path, words: str, message: str
):
    path = saved(tmp_path, train_x=images(), train_y=np.arange(6))
    with pytest.raises(UsageError, match=message):
        Samples.from_path(f"{path}:{words}").bind(IMAGE)


# Types and shapes


def test_integer_images_are_never_silently_rescaled(tmp_path: Path):
    path = saved(tmp_path, image=images().reshape(6, 1, 2, 2))
    with pytest.raises(UsageError, match=r"nothing is rescaled unless you say so"):
        Samples.from_path(path).bind(IMAGE)


def test_a_missing_input_shows_how_to_name_one(tmp_path: Path):
    path = saved(tmp_path, train_x=images(), test_x=images())
    with pytest.raises(UsageError, match=r"data\.npz:image=train_x"):
        Samples.from_path(path).bind(IMAGE)


def test_the_only_array_feeds_the_only_input_with_a_note(tmp_path: Path):
    path = saved(tmp_path, x=np.ones((2, 1, 2, 2), np.float32))
    assert Samples.from_path(path).bind(IMAGE).notes == (
        "array 'x' feeds the only input 'image'",
    )


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        (np.int16, I64, "x: int16 widened to int64"),
        (np.int64, I32, "x: int64 checked to fit int32"),
        (np.float64, F32, "x: float64 rounded to float32"),
        (np.float16, F32, "x: float16 widened to float32"),
        (bool, I64, "x: bool widened to int64"),
        (np.int64, BOOL, "x: int64 checked to fit bool"),
    ],
)
def test_exact_changes_of_dtype_are_made_and_noted(given: Any, wanted: int, note: str):
    samples = Samples.of({"x": np.array([[0], [1]], given)})
    bound = samples.bind([ValueInfo("x", wanted, ("N", 1))])
    assert bound.notes == (note,)
    fed = whole(bound)["x"]
    assert fed.dtype == onnx.helper.tensor_dtype_to_np_dtype(wanted)
    assert fed.tolist() == [[0], [1]]


def test_values_that_do_not_fit_a_narrower_type_are_refused():
    samples = Samples.of({"x": np.array([[0], [1 << 40]])})
    bound = samples.bind([ValueInfo("x", I32, ("N", 1))])
    with pytest.raises(ModelError, match="1099511627776, which do not fit int32"):
        list(bound.batches())


@pytest.mark.parametrize("given", [np.float32, "U3"])
def test_floats_and_text_do_not_feed_integers(given: Any):
    samples = Samples.of({"x": np.array([["1"], ["2"]]).astype(given)})
    with pytest.raises(UsageError, match="the input takes int64"):
        samples.bind([ValueInfo("x", I64, ("N", 1))])


def test_division_does_not_feed_integers(tmp_path: Path):
    path = saved(tmp_path, x=np.arange(4).reshape(2, 2))
    with pytest.raises(UsageError, match="whole numbers only"):
        Samples.from_path(f"{path}:x=x/2").bind([ValueInfo("x", I64, ("N", 2))])


@pytest.mark.parametrize("shape", [(28, 28), (784,), (28, 28, 1), (1, 28, 28)])
def test_axes_of_size_one_and_flat_samples_are_reshaped(shape: tuple[int, ...]):
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    bound = Samples.of(x).bind([ValueInfo("image", F32, ("N", 1, 28, 28))])
    assert np.array_equal(whole(bound)["image"], x.reshape(3, 1, 28, 28))
    assert bool(bound.notes) == (shape != (1, 28, 28))


@pytest.mark.parametrize("shape", [(4, 4, 3), (48, 1, 2), (2, 24)])
def test_other_shapes_are_refused_even_if_the_count_fits(shape: tuple[int, ...]):
    x = np.zeros((2, *shape), np.float32)
    with pytest.raises(UsageError, match="do not fit the input 'image'"):
        Samples.of(x).bind([ValueInfo("image", F32, ("N", 3, 4, 4))])


def test_a_symbol_has_one_size():
    data = {"ids": np.ones((2, 3), np.int64), "mask": np.ones((2, 4), np.int64)}
    with pytest.raises(UsageError, match="'seq' is 3 in 'ids' and 4 in 'mask'"):
        Samples.of(data).bind(TOKENS)


def test_a_fixed_batch_size_leaves_the_rest_out_with_a_note():
    x = np.ones((7, 2), np.float32)
    bound = Samples.of(x).bind([ValueInfo("x", F32, (3, 2))])
    assert [len(b["x"]) for b in bound.batches(100)] == [3, 3]
    assert bound.used == 6
    assert bound.notes == ("the model takes 3 samples at a time: 1 unused",)
    with pytest.raises(ModelError, match="takes 8 samples at a time and there are 7"):
        Samples.of(x).bind([ValueInfo("x", F32, (8, 2))])


def test_a_sample_may_be_a_whole_feed():
    data = {"x": np.arange(12, dtype=np.float32).reshape(3, 2, 2), "t": np.arange(3.0)}
    inputs = [
        ValueInfo("x", F32, (2, 2)),
        ValueInfo("t", onnx.TensorProto.DOUBLE, ()),
    ]
    bound = Samples.of(data).bind(inputs)
    feeds = list(bound.batches(8))
    assert bound.whole
    assert len(feeds) == 3
    assert feeds[1]["x"].tolist() == [[4, 5], [6, 7]]
    assert feeds[2]["t"].shape == ()
    assert feeds[2]["t"] == 2.0


def test_nan_is_named():
    x = np.ones((5, 2), np.float32)
    x[3, 1] = np.nan
    bound = Samples.of({"x": x}).bind([ValueInfo("x", F32, ("N", 2))])
    with pytest.raises(ModelError, match="sample 3 of 'x' holds NaN"):
        list(bound.batches(4))


def test_counts_must_agree():
    data = {"ids": np.ones((2, 3), np.int64), "mask": np.ones((3, 3), np.int64)}
    with pytest.raises(ModelError, match="'ids' has 2, 'mask' has 3"):
        Samples.of(data).bind(TOKENS)
    labelled = {"image": np.ones((2, 1, 2, 2), np.float32), "labels": np.arange(3)}
    with pytest.raises(ModelError, match="3 labels for 2 samples"):
        Samples.of(labelled).bind(IMAGE)


def test_a_model_without_inputs_cannot_be_fed():
    with pytest.raises(ModelError, match="no inputs"):
        Samples.of(np.ones((2, 2))).bind([])


# Files that are not what they claim


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path):
    saved(tmp_path, x=np.ones(2))
    with pytest.raises(ModelError, match=r"date\.npz does not exist.*data\.npz"):
        Samples.from_path(tmp_path / "date.npz")


def test_python_objects_are_never_loaded(tmp_path: Path):
    np.savez(tmp_path / "o.npz", x=np.array([{}, []], object))
    with pytest.raises(ModelError, match="Python objects"):
        Samples.from_path(tmp_path / "o.npz")
    np.save(tmp_path / "o.npy", np.array([{}, []], object))
    with pytest.raises(ModelError, match="Python objects, which are never loaded"):
        Samples.from_path(tmp_path / "o.npy")


@pytest.mark.parametrize("cut", [10, 60, 150, 300])
def test_a_truncated_npz_is_refused(tmp_path: Path, cut: int):
    path = saved(tmp_path, x=np.random.default_rng(0).normal(size=(9, 9)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"data\.npz"):
        Samples.from_path(path)


def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path):
    path = tmp_path / "lie.npz"
    np.save(tmp_path / "x.npy", np.zeros(4))
    data = (tmp_path / "x.npy").read_bytes().replace(b"(4,)", b"(9,)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(ModelError, match="claims 72 bytes of values and has 32"):
        Samples.from_path(path)


def test_a_broken_member_is_a_clear_error(tmp_path: Path):
    path = saved(tmp_path, x=np.random.default_rng(0).normal(size=(90, 2)))
    data = bytearray(path.read_bytes())
    data[700] ^= 0xFF
    path.write_bytes(bytes(data))
    info = [ValueInfo("x", onnx.TensorProto.DOUBLE, ("N", 2))]
    with pytest.raises(ModelError, match="cannot be read"):
        Samples.from_path(path).bind(info).read([0])


def test_a_folder_mixing_kinds_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)))
    np.save(tmp_path / "c.npy", np.ones(2))
    with pytest.raises(ModelError, match="mixes"):
        Samples.from_path(tmp_path)


def test_an_empty_iterable_is_refused():
    with pytest.raises(ModelError, match="gave no batch"):
        Samples.from_batches([])
