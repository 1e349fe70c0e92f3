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
from onnxshrink.samples import Samples, Splits, columns

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


LINEAR = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{ y = MatMul(x, w) }
"""


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
    monkeypatch.setattr(columns, "MAPPED", 10)
    samples = Samples.from_path(tmp_path / "d.npz:x=x")
    fed = whole(samples.bind([ValueInfo("x", F32, (None, 3))]))
    assert np.array_equal(fed["x"], x)


def test_a_npy_feeds_the_only_input(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((3, 1, 2, 2), np.float32))
    assert whole(Samples.from_path(tmp_path / "x.npy").bind(IMAGE))["image"].sum() == 12


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
    with pytest.raises(ModelError, match="cannot be read"):
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


def test_a_folder_mixing_kinds_or_shapes_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)))
    np.savez(tmp_path / "b.npz", x=np.ones((2, 4)))
    with pytest.raises(ModelError, match="pad the samples"):
        Samples.from_path(tmp_path)
    np.save(tmp_path / "c.npy", np.ones(2))
    with pytest.raises(ModelError, match="mixes"):
        Samples.from_path(tmp_path)


def test_batches_of_different_shapes_are_refused():
    with pytest.raises(ModelError, match="pad the samples to one shape"):
        Samples.from_batches([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(ModelError, match="gave no batch"):
        Samples.from_batches([])


# Random inputs


def test_random_token_ids_stay_inside_the_table():
    m = model(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (int64[batch, seq] ids, int64[batch, seq] attention_mask)
          => (float[batch, seq, 2] y)
        <float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[1] minus = {-1}>
        {
          narrow = Cast<to = 6>(ids)
          rows = Gather(table, narrow)
          wide = Unsqueeze(attention_mask, minus)
          keep = Cast<to = 1>(wide)
          y = Mul(rows, keep)
        }
        """
    )
    samples = Samples.random_for(m, seed=3, count=20)
    feeds = list(samples.batches())
    ids = np.stack([f["ids"] for f in feeds])
    assert ids.shape == (20, 2, 16)
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3, 4}
    assert all((f["attention_mask"] == 1).all() for f in feeds)
    assert samples.random
    assert samples.whole


@pytest.mark.parametrize(
    "body",
    [
        "y = OneHot<axis = -1>(ids, depth, values)",
        "wide = Unsqueeze(ids, minus) same = Equal(wide, list) y = Cast<to = 1>(same)",
    ],
)
def test_random_ids_for_one_hot_coding_stay_below_its_depth(body: str):
    m = model(
        f"""
        <ir_version: 10, opset_import: ["" : 17]>
        g (int64[N, 3] ids) => (float[N, 3, 4] y)
        <int64 depth = {{4}}, float[2] values = {{0, 1}}, int64[1] minus = {{-1}},
         int64[4] list = {{0, 1, 2, 3}}>
        {{ {body} }}
        """
    )
    feeds = Samples.random_for(m, count=20).batches()
    ids = np.stack([feed["ids"] for feed in feeds])
    assert set(ids.ravel().tolist()) == {0, 1, 2, 3}


def test_random_inputs_are_the_same_for_the_same_seed_in_any_order():
    one = Samples.random_for(model(LINEAR), seed=1, count=4)
    two = Samples.random_for(model(LINEAR), seed=1, count=4)
    assert np.array_equal(one.read([2])["x"], list(two.batches())[2]["x"])
    other = Samples.random_for(model(LINEAR), seed=2, count=4)
    assert not np.array_equal(one.read([2])["x"], other.read([2])["x"])


def test_shapes_of_random_inputs_can_be_set():
    samples = Samples.random_for(model(LINEAR), shapes={"x": (7, 2)})
    assert samples.read([0])["x"].shape == (7, 2)
    assert "--shape" in samples.hint
    with pytest.raises(UsageError, match="does not fit the input 'x'"):
        Samples.random_for(model(LINEAR), shapes={"x": (7, 3)})
    with pytest.raises(UsageError, match="no input 'xx'"):
        Samples.random_for(model(LINEAR), shapes={"xx": (7, 3)})


def test_equal_symbols_get_equal_sizes_and_sums_add_up():
    m = model(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (float[batch, past] a, float[batch, now] b) => (float[c, d] y)
        { y = Concat<axis = 1>(a, b) }
        """
    )
    m.graph.inputs[1].shape = ["batch", "past + 1"]
    infos = [ValueInfo("a", F32, ("B", "past")), ValueInfo("b", F32, ("B", "past + 1"))]
    from onnxshrink.samples.random_inputs import random_shapes

    assert random_shapes(infos, {"a": (3, 4)}) == {"a": (3, 4), "b": (3, 5)}
    with pytest.raises(UsageError, match="'B' is 3 and 2"):
        random_shapes(infos, {"a": (3, 4), "b": (2, 5)})


def test_random_values_respect_every_type():
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (TYPE[N] x) => (TYPE[N] y) { y = Identity(x) }
    """
    kinds = {}
    for name in ("float", "double", "float16", "uint8", "int64", "bool", "string"):
        samples = Samples.random_for(model(text.replace("TYPE", name)))
        kinds[name] = samples.read([0])["x"]
    assert kinds["float16"].dtype == np.float16
    assert len(np.unique(kinds["float"])) == 2
    assert kinds["bool"].all()
    assert kinds["int64"].tolist() == [1, 1]
    assert all(isinstance(v, str) for v in kinds["string"])


# Splits


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
