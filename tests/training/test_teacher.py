"""A teacher's answers: right, in order, checked, and refused where they do not fit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxshrink.cli import main
from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.training import teacher

Array = np.ndarray[Any, Any]
X = np.arange(22, dtype=np.float32).reshape(11, 2)


def model_of(text: str) -> Model:
    header = '<ir_version: 10, opset_import: ["" : 20]>\n'
    return Model.load(onnx.parser.parse_model(header + text))


def doubling(batch: str = "N") -> Model:
    return model_of(
        f"g (float[{batch},2] x) => (float[{batch},2] y, int64[{batch}] best) "
        "<float w = {2}> { y = Mul(x, w)  best = ArgMax<axis=1,keepdims=0>(y) }"
    )


def samples_of(x: Array, model: Model) -> Samples:
    return Samples.from_arrays({"x": x}).bind(model.inputs)


@pytest.mark.parametrize("batch", ["N", "4"])
def test_every_sample_is_answered_also_with_a_fixed_batch(batch: str) -> None:
    model = doubling(batch)
    found = teacher.answers(model, samples_of(X, model), ["y"])
    np.testing.assert_array_equal(found["y"], 2 * X)


def test_large_answers_lie_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(teacher, "_MAPPED", 8)
    model = doubling()
    found = teacher.answers(model, samples_of(X, model), ["y"], folder=tmp_path)
    assert isinstance(found["y"], np.memmap)
    np.testing.assert_array_equal(found["y"], 2 * X)


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = model_of("g (float[N,2] x) => (float[N,2] y) { y = Log(x) }")
    with pytest.raises(ModelError, match="not finite in float32 for sample 0"):
        teacher.answers(model, samples_of(X, model), ["y"])


def test_infinity_in_the_data_is_found_by_its_place_there() -> None:
    model = doubling()
    x = X.copy()
    x[7, 1] = np.inf
    chosen = samples_of(x, model).take([3, 9, 7, 5])
    with pytest.raises(ModelError, match="sample 7 of arrays, whose 'x' holds inf"):
        teacher.answers(model, chosen, ["y"])


def test_half_precision_that_overflows_is_refused() -> None:
    model = doubling()
    samples = samples_of(X * 1e4, model)
    with pytest.raises(ModelError, match="not finite in float16"):
        teacher.answers(model, samples, ["y"], dtype=np.float16)


def test_an_output_that_does_not_count_samples_is_refused() -> None:
    model = model_of(
        "g (float[N,2] x) => (float[1,2] y) <int64[1] a = {0}> { y = ReduceSum(x, a) }"
    )
    with pytest.raises(ModelError, match="its first axis must count them"):
        teacher.answers(model, samples_of(X, model), ["y"])


def written(path: Path, x: Array = X, **options: Any) -> Samples:
    model = doubling()
    samples = samples_of(x, model)
    teacher.write(path, model, samples, **options)
    return samples


def test_rows_of_a_split_are_those_of_its_samples(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    model = doubling()
    splits = Splits.build(model, {"x": X}, seed=3, calibration_size=1)
    recorded = teacher.read(tmp_path / "t.npz")
    for part in (splits.training, splits.evaluation):
        assert part is not None
        assert recorded.check(part) == ""
        rows = recorded.rows("y", part)
        np.testing.assert_array_equal(rows, 2 * part.read(np.arange(len(part)))["x"])


def test_the_file_keeps_float_outputs_and_is_the_same_twice(tmp_path: Path) -> None:
    one, two = tmp_path / "1.npz", tmp_path / "2.npz"
    written(one)
    written(two, dtype=np.float32)
    assert one.read_bytes() == two.read_bytes()
    assert list(teacher.read(one).outputs) == ["y"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz"]


def test_the_file_names_the_model_by_its_checksum(tmp_path: Path) -> None:
    doubling().save(tmp_path / "m.onnx")
    model = Model.load(tmp_path / "m.onnx")
    teacher.write(tmp_path / "t.npz", model, samples_of(X, model))
    with np.load(tmp_path / "t.npz") as file:
        about = str(file["_about"][0])
    assert hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest() in about


def test_a_changed_sample_is_found(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    other = X.copy()
    other[7, 1] += 1
    samples = samples_of(other, doubling())
    with pytest.raises(UsageError, match="1 of 11 samples, the first of them number 7"):
        teacher.read(tmp_path / "t.npz").check(samples)


def test_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    samples = samples_of(X[:10], doubling())
    with pytest.raises(UsageError, match="has 11 samples and arrays has 10"):
        teacher.read(tmp_path / "t.npz").check(samples)


def test_a_file_of_another_program_is_checked_by_its_number_only(
    tmp_path: Path,
) -> None:
    np.savez(tmp_path / "t.npz", y=X)
    samples = samples_of(X + 1, doubling())
    assert "no checksums" in teacher.read(tmp_path / "t.npz").check(samples)


def test_a_teacher_with_other_inputs_is_not_compared(tmp_path: Path) -> None:
    written(tmp_path / "t.npz")
    student = model_of("g (float[N,1] z) => (float[N,1] y) { y = Identity(z) }")
    samples = Samples.from_arrays({"z": X[:, :1]}).bind(student.inputs)
    assert "other inputs" in teacher.read(tmp_path / "t.npz").check(samples)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((3, 2), np.int64)}, "no array of floats"),
        ({"y": np.zeros((3, 2)), "z": np.zeros((4, 2))}, "differ"),
        ({"y": np.zeros((0, 2))}, "are 0"),
        ({"y": np.zeros((3, 2)), "_checksums": np.zeros(3)}, "_checksums is uint32"),
        ({"y": np.zeros((3, 2)), "_about": np.array(["{"])}, "cannot read _about"),
        ({"y": np.zeros((3, 2)), "_about": np.array(["3"])}, "not an object"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, arrays: dict[str, Array], says: str
) -> None:
    np.savez(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=says):
        teacher.read(tmp_path / "t.npz")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ModelError):
        teacher.read(tmp_path / "t.npz")


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", y=np.full((11, 2), np.nan))
    with pytest.raises(UsageError, match="NaN"):
        teacher.read(tmp_path / "t.npz").rows("y", samples_of(X, doubling()))


def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        written(tmp_path / "no" / "t.npz")


@pytest.mark.parametrize(
    ("name", "names", "says"),
    [("t.npy", (), "is a .npz"), ("t.npz", ("z",), "no output 'z'; it has y, best")],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, name: str, names: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        written(tmp_path / name, names=names)


# --- the largest scores -----------------------------------------------------------


SCORES = np.random.default_rng(0).normal(size=(11, 3, 9)).astype(np.float32) * 3


def speaking(end: str = "y = Identity(x)") -> Model:
    return model_of(f"g (float[N,3,9] x) => (float[N,3,9] y) {{ {end} }}")


def log_rest(scores: Array, indices: Array) -> Array:
    others = np.exp(scores.astype(np.float64))
    np.put_along_axis(others, indices.astype(np.int64), 0, -1)
    made: Array = np.log(others.sum(-1))
    return made


@pytest.mark.parametrize("end", ["y = Identity(x)", "y = Softmax<axis=2>(x)"])
def test_the_largest_scores_are_kept_with_the_mass_of_all_others(
    tmp_path: Path, end: str
) -> None:
    model = speaking(end)
    samples = samples_of(SCORES, model)
    teacher.write(tmp_path / "t.npz", model, samples, top_k=4)
    found = teacher.read(tmp_path / "t.npz")
    assert (found.names, list(found.outputs), found.count) == (["y"], [], 11)
    assert found.check(samples) == ""
    rows = found.top_rows("y", samples.take([3, 8]), 9)
    wanted = SCORES[[3, 8]]
    order = np.argsort(-wanted, axis=-1)[..., :4]
    np.testing.assert_array_equal(rows["indices"], order)
    # The largest scores of a softmax are logarithms of its shares.
    shift = 0 if "Identity" in end else np.log(np.exp(wanted).sum(-1))
    best = np.take_along_axis(wanted, order, -1)
    np.testing.assert_allclose(
        rows["values"], best - np.expand_dims(shift, -1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        rows["rest"], log_rest(wanted, order) - shift, rtol=1e-4, atol=1e-5
    )
    assert [a.dtype for a in rows.values()] == [np.float32, np.int64, np.float32]


def test_largest_scores_may_be_halves_and_come_in_order_where_they_tie(
    tmp_path: Path,
) -> None:
    model = speaking()
    samples = samples_of(np.zeros((2, 3, 9), np.float32), model)
    teacher.write(tmp_path / "t.npz", model, samples, top_k=8, dtype=np.float16)
    with np.load(tmp_path / "t.npz") as file:
        assert file["y/values"].dtype == np.float16
        assert (np.diff(file["y/indices"], axis=-1) > 0).all()
        np.testing.assert_array_equal(file["y/rest"], 0)


def test_an_output_without_more_scores_is_kept_whole(tmp_path: Path) -> None:
    written(tmp_path / "t.npz", top_k=2)
    assert list(teacher.read(tmp_path / "t.npz").outputs) == ["y"]


def test_large_outputs_are_computed_in_small_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "_OUTPUT_BYTES", 2 * SCORES[0].nbytes)
    steps: list[int] = []
    model = speaking()
    found = teacher.answers(
        model,
        samples_of(SCORES, model),
        ["y"],
        top={"y": 2},
        progress=lambda done, total, what: steps.append(done),
    )
    assert steps == [2, 4, 6, 8, 10, 11]
    np.testing.assert_array_equal(found["y/values"][..., 0], SCORES.max(-1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"y/indices": np.full((2, 3), 9)}, "class 9, and there are 9 classes"),
        ({"y/indices": np.full((2, 3), -1)}, "class -1"),
        ({"y/indices": np.ones((2, 3), np.int64)}, "two scores of one class"),
        ({"y/values": np.full((2, 3), np.inf)}, "NaN or infinity"),
        ({"y/rest": np.zeros((2, 3))}, r"floats \[\.\.\.\] for a sample"),
        ({"y/indices": np.zeros((2, 3))}, "integers"),
        ({"y/rest": np.zeros(3)}, "the numbers of samples differ"),
    ],
)
def test_largest_scores_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Array], says: str
) -> None:
    good = {
        "y/values": np.zeros((2, 3)),
        "y/indices": np.arange(6).reshape(2, 3),
        "y/rest": np.zeros(2),
    }
    samples = samples_of(np.zeros((2, 2), np.float32), doubling())
    np.savez(tmp_path / "t.npz", **good)  # type: ignore[arg-type]
    teacher.read(tmp_path / "t.npz").top_rows("y", samples, 9)
    np.savez(tmp_path / "t.npz", **{**good, **change})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=says):
        teacher.read(tmp_path / "t.npz").top_rows("y", samples, 9)


# --- tensors from inside ----------------------------------------------------------


def deep() -> Model:
    return model_of(
        "g (float[N,2] x) => (float[N,2] y) "
        "{ a1 = Neg(x)  a2 = Abs(a1)  n = Shape(a2)  y = Mul(a1, a2) }"
    )


@pytest.mark.parametrize(
    ("asked", "kept"),
    [(["a2"], ["a2"]), (["*"], ["a1", "a2"]), (["a*", "a1", "y"], ["a1", "a2"])],
)
def test_values_from_inside_are_kept(
    tmp_path: Path, asked: list[str], kept: list[str]
) -> None:
    model = deep()
    samples = samples_of(X, model)
    teacher.write(tmp_path / "t.npz", model, samples, tensors=asked)
    found = teacher.read(tmp_path / "t.npz")
    assert (list(found.outputs), list(found.tensors)) == (["y"], kept)
    expected = {"a1": -X, "a2": X, "y": -X * X}
    for name in ("y", *kept):
        rows = found.rows(name, samples.take([4, 2]))
        np.testing.assert_array_equal(rows, expected[name][[4, 2]])


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        (["a3"], UsageError, "computes no value 'a3'"),
        (["b*"], UsageError, r"computes no value 'b\*'"),
        (["n"], ModelError, "'n' is not a tensor of floats"),
    ],
)
def test_values_that_are_not_there_are_refused(
    tmp_path: Path, tensors: list[str], error: type[Exception], says: str
) -> None:
    model = deep()
    with pytest.raises(error, match=says):
        teacher.write(tmp_path / "t.npz", model, samples_of(X, model), tensors=tensors)
    assert not (tmp_path / "t.npz").exists()


def test_the_file_says_whose_answers_it_holds(tmp_path: Path) -> None:
    doubling().save(tmp_path / "m.onnx")
    deep().save(tmp_path / "other.onnx")
    model, other = (Model.load(tmp_path / n) for n in ("m.onnx", "other.onnx"))
    teacher.write(tmp_path / "t.npz", model, samples_of(X, model))
    found = teacher.read(tmp_path / "t.npz")
    assert found.whose(model) == "the model that this run started from"
    assert found.whose(other).startswith("another model, m.onnx, SHA-256 ")
    np.savez(tmp_path / "t.npz", y=X)
    assert teacher.read(tmp_path / "t.npz").whose(model) == ""


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    doubling().save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X, labels=np.zeros(11, np.int64))
    arguments = ["teacher", tmp_path / "m.onnx", "--data", tmp_path / "d.npz"]
    arguments += ["-o", tmp_path / "t.npz", "--half"]
    shown = CliRunner().invoke(main, [str(word) for word in arguments])
    assert shown.exit_code == 0, shown.stderr
    assert "y: 11 x 2" in shown.stdout
    with np.load(tmp_path / "t.npz") as file:
        assert file["y"].dtype == np.float16
        np.testing.assert_array_equal(file["y"], 2 * X)
    arguments = [*arguments[:-1], "--top-k", "1", "--tensor", "*"]
    shown = CliRunner().invoke(main, [str(word) for word in arguments])
    assert shown.exit_code == 0, shown.stderr
    assert "y/values: 11 x 1" in shown.stdout


def test_the_command_needs_data(tmp_path: Path) -> None:
    doubling().save(tmp_path / "m.onnx")
    arguments = ["teacher", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "t.npz")]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 1
    assert "add --data" in shown.stderr
