"""distill: what it trains, what it leaves, whom it believes, and what it refuses."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.manager import shrink
from onnxshrink.model import Model
from onnxshrink.passes import distill
from onnxshrink.passes.distill import Distill
from onnxshrink.passes.prune import Prune
from onnxshrink.quantization.schemes import Scheme, affine, quantize
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing import example_models
from onnxshrink.training import augment, teacher

Array = np.ndarray[Any, Any]

X = np.random.default_rng(1).normal(size=(160, 6)).astype(np.float32)
REFUSED = {
    "loop_weights",
    "no_weights",
    "only_identity",
    "opset_9",
    "subgraph_weights",
    "weight_is_graph_input",
    "weight_is_graph_output",
}
"""Example models without a float32 weight that gradients reach and that is free."""
COMMON = {"convolutions", "transformer", "unnamed_and_fixed", "opset_9", "no_weights"}
QUICK: dict[str, Any] = {"epochs": 8, "batch": 16, "lr": 0.01}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a test leaves behind, stay out of the source tree."""
    monkeypatch.chdir(tmp_path)


def model_of(text: str, opset: int = 17, **weights: Array) -> Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def classifier(end: str = "y = Gemm(r, w2, b2)") -> Model:
    return model_of(
        "g (float[N,6] x) => (float[N,4] y) "
        f"{{ h = Gemm(x, w1, b1)  r = Relu(h)  {end} }}",
        w1=draw(2, 6, 12),
        b1=draw(3, 12),
        w2=draw(4, 12, 4),
        b2=draw(5, 4),
    )


def context(
    reference: Model, x: Array = X, labels: Array | None = None, seed: int = 0
) -> Context:
    arrays = {"x": x} if labels is None else {"x": x, "labels": labels}
    samples = Samples.from_arrays(arrays).bind(reference.inputs)
    cut = len(x) * 3 // 4
    splits = Splits(
        training=samples.take(slice(0, cut)), validation=samples.take(slice(cut, None))
    )
    return make_context(samples=splits, reference=reference, threads=1, seed=seed)


def damaged(model: Model, names: tuple[str, ...] = ("w1", "w2")) -> Model:
    copy = model.copy()
    for index, name in enumerate(names):
        values = copy.weight(name).read()
        noise = np.random.default_rng(index).normal(1, 0.3, values.shape)
        copy.set_weight(name, (values * noise).astype(np.float32))
    return copy


def gap(one: Model, two: Model, x: Array = X) -> float:
    first, second = (runtime.session(m, threads=1).run({"x": x}) for m in (one, two))
    return float(
        np.abs(next(iter(first.values())) - next(iter(second.values()))).mean()
    )


def values(model: Model) -> dict[str, Array]:
    return {weight.name: np.array(weight.read()) for weight in model.weights()}


def run(student: Model, ctx: Context, **options: Any) -> str:
    """Distill in place; return what was said."""
    Distill(**{**QUICK, **options}).apply(student, ctx)
    student.check()
    return "\n".join(what for _, what in [*ctx.done, *ctx.skips])


# --- it learns --------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        "y = Gemm(r, w2, b2)",
        "l = Gemm(r, w2, b2)  y = Softmax<axis=1>(l)",
        "l = Gemm(r, w2, b2)  t = Tanh(l)  y = Identity(t)",
    ],
)
@pytest.mark.parametrize("loss", ["auto", "mse", "cosine"])
def test_a_damaged_model_comes_closer_to_the_original(end: str, loss: str) -> None:
    model = classifier(end)
    student = damaged(model)
    before = gap(model, student)
    said = run(student, context(model), loss=loss)
    assert gap(model, student) < 0.7 * before
    assert said.startswith("trained ")


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_learning_rate_is_found(optimizer: str) -> None:
    model = classifier()
    student = damaged(model)
    before = gap(model, student)
    run(student, context(model), lr=None, optimizer=optimizer, epochs=12)
    assert gap(model, student) < 0.5 * before


def test_labels_alone_teach() -> None:
    model = classifier()
    labels = (X[:, 0] > 0).astype(np.uint8) + 2 * (X[:, 1] > 0).astype(np.uint8)
    ctx = context(model, labels=labels)
    said = run(model.copy(), ctx, alpha=1.0, epochs=20, lr=0.03)
    accuracy = float(said.splitlines()[0].rpartition("top1 ")[2].rstrip("%"))
    assert accuracy > 65  # it starts at 25


def test_labels_alone_train_only_what_the_scores_need() -> None:
    model = model_of(
        "g (float[N,6] x) => (float[N,4] y, float[N,3] z) "
        "{ h = MatMul(x, w1)  y = MatMul(h, w2)  z = MatMul(h, w3) }",
        w1=draw(2, 6, 6),
        w2=draw(3, 6, 4),
        w3=draw(4, 6, 3),
    )
    student = damaged(model)
    run(student, context(model, labels=np.arange(160) % 4), alpha=1.0, epochs=2)
    after, before = values(student), values(damaged(model))
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    assert moved == {"w1", "w2"}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "end", ["y = Gemm(r, w2, b2)", "l = Gemm(r, w2, b2) y = Softmax(l)"]
)
def test_what_is_minimised_is_what_is_judged(
    tmp_path: Path, alpha: float, end: str
) -> None:
    model = classifier(end)
    labels = np.arange(len(X)) % 4
    ctx = context(model, labels=labels)
    ctx.samples = dataclasses.replace(ctx.samples, validation=ctx.samples.training)
    options = Distill(alpha=alpha, batch=120)
    training = ctx.samples.training
    assert training is not None
    made = distill._Training(options, damaged(model), ctx, training, tmp_path)
    lookup = made.teacher.lookup(training, ["y"])
    feed = distill._Feed(made, lookup)
    step = made._step(120, feed)
    judged = distill._Judge(made, training, lookup)(step.weights)
    loss = step(feed(np.arange(120), np.random.default_rng(0)), 0.0)
    assert loss == pytest.approx(judged, rel=1e-4)


def test_samples_may_be_whole_feeds() -> None:
    text = (
        "g (float[5,6] x) => (float[5,4] y) "
        "{ h = Gemm(x, w1)  r = Relu(h)  y = Gemm(r, w2) }"
    )
    model = model_of(text, w1=draw(2, 6, 12), w2=draw(4, 12, 4))
    student = damaged(model)
    x = draw(1, 40, 5, 6)
    before = gap(model, student, x[0])
    said = run(student, context(model, x), epochs=12)
    assert gap(model, student, x[0]) < 0.7 * before
    agreement = float(said.splitlines()[0].rpartition("agreement ")[2].rstrip("%"))
    assert 50 < agreement <= 100


def test_the_same_seed_gives_the_same_bytes() -> None:
    model = classifier()
    made = []
    for seed in (0, 0, 1):
        student = damaged(model)
        run(student, context(model, seed=seed), epochs=2)
        made.append(student.to_bytes())
    assert made[0] == made[1] != made[2]


# --- what the graph says may be touched -------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_zeros_stay_zero_and_the_rest_moves(optimizer: str) -> None:
    model = classifier()
    student = model.copy()
    ctx = context(model)
    Prune(sparsity=0.6, importance="magnitude").apply(student, ctx)
    pruned = values(student)
    before = gap(model, student)
    said = run(student, ctx, optimizer=optimizer, weight_decay=0.01)
    after = values(student)
    zeros = 0
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(after[name] == 0, pruned[name] == 0)
        assert (after[name] != pruned[name])[pruned[name] != 0].all()
        zeros += int((pruned[name] == 0).sum())
    assert f"{zeros:,} zeros kept" in said
    assert gap(model, student) < before


def test_a_bias_that_starts_at_zero_is_trained() -> None:
    model = classifier()
    student = damaged(model)
    student.set_weight("b1", np.zeros(12, np.float32))
    run(student, context(model))
    assert values(student)["b1"].all()


def test_a_matrix_of_zeros_stays() -> None:
    model = classifier()
    student = damaged(model)
    student.set_weight("w1", np.zeros((6, 12), np.float32))
    ctx = context(model)
    run(student, ctx)
    assert ("w1", "all of it is zero, and zeros stay") in ctx.skips
    assert not values(student)["w1"].any()


@pytest.mark.parametrize(
    ("choice", "moved"),
    [
        ({"only": ("w1",)}, {"w1"}),
        ({"only": ("b*",)}, {"b1", "b2"}),
        ({"skip": ("w2", "b1")}, {"w1", "b2"}),
    ],
)
def test_only_and_skip_freeze_the_rest(
    choice: Mapping[str, tuple[str, ...]], moved: set[str]
) -> None:
    model = classifier()
    student = damaged(model)
    before = values(student)
    run(student, context(model), **choice)
    after = values(student)
    assert {n for n in before if not np.array_equal(before[n], after[n])} == moved


def test_a_weight_that_is_used_twice_stays_one() -> None:
    model = model_of(
        "g (float[N,6] x) => (float[N,6] y) { a = MatMul(x, w) t = Tanh(a) "
        "y = MatMul(t, w) }",
        w=draw(0, 6, 6),
    )
    student = damaged(model, ("w",))
    before = gap(model, student)
    run(student, context(model))
    assert len(list(student.weights())) == 1
    assert gap(model, student) < before


def test_statistics_of_a_normalisation_stay() -> None:
    model = model_of(
        "g (float[N,6] x) => (float[N,6] y) "
        "{ h = MatMul(x, w)  y = BatchNormalization(h, scale, shift, mean, var) }",
        w=draw(0, 6, 6),
        scale=np.ones(6, np.float32),
        shift=np.zeros(6, np.float32),
        mean=draw(1, 6),
        var=np.abs(draw(2, 6)) + 1,
    )
    student = damaged(model, ("w",))
    before = values(student)
    run(student, context(model))
    after = values(student)
    moved = {n for n in before if not np.array_equal(before[n], after[n])}
    assert moved == {"w", "scale", "shift"}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_codes_are_trained_through_the_rounding_and_stay_codes(
    dtype: type[Any], per_channel: bool
) -> None:
    model = classifier()
    weights = values(damaged(model))
    zero = 0 if dtype is np.int8 else 128
    largest = np.abs(weights["w1"]).max(axis=0 if per_channel else None)
    scale = np.asarray(largest / 120, np.float32)
    codes = (np.rint(weights["w1"] / scale) + zero).astype(dtype)
    student = model_of(
        "g (float[N,6] x) => (float[N,4] y) "
        "{ d = DequantizeLinear<axis=1>(q, s, z)  h = Gemm(x, d, b1)  r = Relu(h)  "
        "y = Gemm(r, w2, b2) }",
        q=codes,
        s=scale,
        z=np.full(scale.shape, zero, dtype),
        b1=weights["b1"],
        w2=values(model)["w2"],
        b2=weights["b2"],
    )
    before = gap(model, student)
    run(student, context(model), only=("q",))
    after = values(student)
    assert after["q"].dtype == dtype
    assert codes.min() <= after["q"].min() < after["q"].max() <= codes.max()
    np.testing.assert_array_equal(after["s"], scale)
    assert gap(model, student) < 0.7 * before


def test_what_lies_above_an_operator_without_a_rule_is_frozen() -> None:
    model = model_of(
        "g (float[N,6] x) => (float[N,4] y) "
        "{ a = MatMul(x, w1)  d = Det(m)  b = Mul(a, d)  y = MatMul(b, w2) }",
        w1=draw(0, 6, 6),
        w2=draw(1, 6, 4),
        m=draw(2, 2, 2),
    )
    student = damaged(model)
    student.set_weight("m", student.weight("m").read() * np.float32(1.1))
    before = values(student)
    run(student, context(model))
    np.testing.assert_array_equal(values(student)["m"], before["m"])
    assert (values(student)["w1"] != before["w1"]).any()


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMMON else pytest.param(name, marks=pytest.mark.slow)
        for name in example_models()
    ],
)
def test_every_example_is_trained_or_refused_in_words(name: str) -> None:
    model = Model.load(example_models()[name])
    samples = Samples.random_for(model, seed=1, count=6)
    splits = Splits(
        training=samples.take(slice(0, 4)), validation=samples.take(slice(4, 6))
    )
    student = model.copy()
    for weight in list(student.weights()):
        if weight.dtype in (np.float16, np.float32) and weight.size > 1:
            values = np.array(weight.read())
            student.set_weight(weight, values * values.dtype.type(0.9))
    start = student.to_bytes()
    ctx = make_context(samples=splits, reference=model, threads=1)
    trained = Distill(epochs=2, lr=1e-3)
    if name in REFUSED:
        with pytest.raises(UsageError, match="no weight to train"):
            trained.apply(student, ctx)
        assert student.to_bytes() == start
        return
    trained.apply(student, ctx)
    student.check()
    assert (student.inputs, student.outputs) == (model.inputs, model.outputs)
    assert (student.to_bytes() != start) == bool(ctx.done)


# --- the teacher ------------------------------------------------------------------


def test_a_teacher_from_a_file_teaches_the_same(tmp_path: Path) -> None:
    model = classifier()
    everything = Samples.from_arrays({"x": X}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", model, everything)
    splits = Splits.build(model, {"x": X}, seed=5, calibration_size=8)
    made = []
    for options in ({}, {"teacher": tmp_path / "t.npz"}):
        student = damaged(model)
        ctx = make_context(samples=splits, reference=model, threads=1)
        run(student, ctx, epochs=2, **options)
        made.append(student.to_bytes())
    assert made[0] == made[1]


def test_a_file_is_believed_not_the_model_it_started_from(tmp_path: Path) -> None:
    model, other = classifier(), damaged(classifier())
    everything = Samples.from_arrays({"x": X}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", other, everything)
    student = model.copy()
    before = gap(other, student)
    run(student, context(model), teacher=tmp_path / "t.npz")
    assert gap(other, student) < 0.7 * before


def test_a_file_of_one_output_may_call_it_otherwise(tmp_path: Path) -> None:
    model = classifier()
    out = runtime.session(model, threads=1).run({"x": X})["y"]
    np.savez(tmp_path / "t.npz", other_name=out)
    student = damaged(model)
    said = run(student, context(model), teacher=tmp_path / "t.npz", epochs=2)
    assert "taken on trust: it holds no checksums" in said


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((160, 5))}, r"'y' is \[4\] for a sample.*teacher's is \[5\]"),
        ({"y": np.zeros((159, 4))}, "has 159 samples and arrays has 160"),
        ({"a": np.zeros((160, 4)), "b": np.zeros((160, 4))}, "none of that is an out"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, Array], says: str
) -> None:
    np.savez(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    model = classifier()
    with pytest.raises(UsageError, match=says):
        run(damaged(model), context(model), teacher=tmp_path / "t.npz")


def test_a_teacher_that_does_not_exist_is_said_not_to(tmp_path: Path) -> None:
    model = classifier()
    missing = tmp_path / "t.npz"
    with pytest.raises(ModelError, match=r"t\.npz does not exist"):
        run(damaged(model), context(model), teacher=missing)


# --- images -----------------------------------------------------------------------


def test_with_shift_the_teacher_sees_the_moved_image() -> None:
    model = model_of(
        "g (float[N,1,4,4] x) => (float[N,3] y) { f = Flatten(x)  y = MatMul(f, w) }",
        w=draw(0, 16, 3),
    )
    images = draw(1, 64, 1, 4, 4)
    ctx = context(model, images)
    training = ctx.samples.training
    assert training is not None
    made = distill._Training(Distill(shift=1), model, ctx, training, Path())
    session = runtime.session(model, threads=1)
    feed = distill._Feed(made, made._lookup())
    fed = feed(np.arange(8), np.random.default_rng(0))
    assert not np.array_equal(fed["x"], images[:8])
    np.testing.assert_array_equal(fed["y/teacher"], session.run({"x": fed["x"]})["y"])
    student = damaged(model, ("w",))
    before = gap(model, student, images)
    run(student, ctx, shift=1, loss="mse")
    assert gap(model, student, images) < 0.9 * before


def test_shift_without_images_is_refused() -> None:
    model = classifier()
    with pytest.raises(UsageError, match="no input is that"):
        run(damaged(model), context(model), shift=1)


IMAGES = draw(11, 64, 1, 4, 4)


def seeing(width: int = 3, end: str = "y = MatMul(p, w2)") -> Model:
    """Return a model of one convolution whose channels are its features."""
    return model_of(
        "g (float[N,1,4,4] x) => (float[N,5] y) "
        "{ c = Conv<kernel_shape=[3,3]>(x, w1)  r = Relu(c)  g = GlobalAveragePool(r)  "
        f"p = Flatten(g)  {end} }}",
        w1=draw(0, width, 1, 3, 3),
        w2=draw(1, width, 5),
    )


def run_of(student: Model, ctx: Context, **options: Any) -> distill._Training:
    training = ctx.samples.training
    assert training is not None
    return distill._Training(Distill(**options), student, ctx, training, Path())


def fed(
    run: distill._Training, count: int = 8
) -> tuple[distill._Feed, dict[str, Array]]:
    feed = distill._Feed(run, run._lookup())
    return feed, feed(np.arange(count), np.random.default_rng(0))


def test_with_mixup_the_teacher_sees_what_the_model_sees() -> None:
    model = seeing()
    ctx = context(model, IMAGES, labels=np.arange(64) % 5)
    _, given = fed(run_of(model, ctx, mixup=1.0))
    assert (given["x"] != IMAGES[:8]).mean() > 0.5
    answer = runtime.session(model, threads=1).run({"x": given["x"]})["y"]
    np.testing.assert_allclose(given["y/teacher"], answer, rtol=1e-5)
    shares = given["labels/hard"]
    assert (shares.dtype, shares.shape) == (np.float32, (8, 5))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    # Where nothing else is known, a mixed image has its own label and its partner's.
    assert ((shares > 0).sum(1) <= 2).all()


def test_with_mixup_answers_of_a_file_are_mixed_as_distributions(
    tmp_path: Path,
) -> None:
    model = seeing()
    told = runtime.session(model, threads=1).run({"x": IMAGES})["y"]
    np.savez(tmp_path / "t.npz", y=told)
    ctx = context(model, IMAGES, labels=np.arange(64) % 5)
    made = run_of(model, ctx, mixup=1.0, teacher=tmp_path / "t.npz", temperature=3.0)
    _, given = fed(made)
    shares = np.exp(told[:8] / 3) / np.exp(told[:8] / 3).sum(1, keepdims=True)
    _, partner, share = augment.mixup({"x": IMAGES[:8]}, 1.0, np.random.default_rng(0))
    wanted = share[:, None] * shares + (1 - share[:, None]) * shares[partner]
    mine = np.exp(given["y/teacher"] / 3)
    np.testing.assert_allclose(mine / mine.sum(1, keepdims=True), wanted, rtol=1e-4)


@pytest.mark.parametrize("change", [{"mixup": 0.3}, {"flip": True}, {"crop": 1}])
def test_it_learns_from_changed_images(change: dict[str, Any]) -> None:
    model = seeing()
    student = damaged(model)
    before = gap(model, student, IMAGES)
    ctx = context(model, IMAGES, labels=np.arange(64) % 5)
    run(student, ctx, loss="mse", alpha=0.0, epochs=12, **change)
    assert gap(model, student, IMAGES) < 0.8 * before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inverted(Distill):
    """Distill on negatives."""

    def augment(
        self, feed: Mapping[str, Array], random: np.random.Generator
    ) -> dict[str, Array]:
        """Return negatives."""
        return {name: -array for name, array in feed.items()}


def test_a_subclass_may_augment_as_it_likes() -> None:
    model = seeing()
    ctx = context(model, IMAGES)
    training = ctx.samples.training
    assert training is not None
    made = distill._Training(Inverted(), model, ctx, training, Path())
    _, given = fed(made)
    np.testing.assert_array_equal(given["x"], -IMAGES[:8])
    answer = runtime.session(model, threads=1).run({"x": -IMAGES[:8]})["y"]
    np.testing.assert_allclose(given["y/teacher"], answer, rtol=1e-5)


# --- tensors inside ---------------------------------------------------------------


def inner(model: Model, name: str, x: Array) -> Array:
    session = runtime.session(model, threads=1, expose=[name])
    found: Array = session.run({"x": x})[name].astype(np.float64)
    return found


@pytest.mark.parametrize("text", ["c", "p", "p:cosine", "c:attention", "p:p:mse:3"])
def test_the_loss_of_a_pair_is_its_formula(text: str) -> None:
    model, student = seeing(7), seeing(3)
    made = run_of(student, context(model, IMAGES), match=(text,), alpha=0.0)
    feed, given = fed(made, 48)
    step = made._step(48, feed)
    weights = dict(step.weights)
    plain = run_of(student, context(model, IMAGES), alpha=0.0)
    plain_feed, plain_given = fed(plain, 48)
    found = step(given, 0.0) - plain._step(48, plain_feed)(plain_given, 0.0)
    name = text[0]
    one, two = (inner(m, name, IMAGES[:48]) for m in (student, model))
    spare = [weights[n] for n in weights if n.startswith("match/")]
    if spare:
        matrix, shift = spare
        matrix = matrix.reshape(7, 3).T if name == "c" else matrix
        assert (matrix.shape, shift.shape) == ((3, 7), (7,))
        one = np.moveaxis(np.moveaxis(one, 1, -1) @ matrix + shift, -1, 1)
    if "attention" in text:
        assert not spare
        maps = [np.square(a).sum(1).reshape(48, -1) for a in (one, two)]
        maps = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in maps]
        expected = float(np.square(maps[0] - maps[1]).sum(1).mean())
    elif "cosine" in text:
        size = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
        expected = 1 - float(((one * two).sum(1) / size).mean())
    else:
        expected = float(np.square(one - two).mean() / two.var())
    assert found == pytest.approx(expected * (3 if "3" in text else 1), rel=2e-4)


@pytest.mark.parametrize("width", [3, 7])
def test_a_projection_is_learned_and_thrown_away(width: int) -> None:
    model, student = seeing(width), damaged(seeing(3))
    names = [weight.name for weight in student.weights()]
    made = run_of(student, context(model, IMAGES), match=("c",), match_weight=10.0)
    feed, given = fed(made, 48)
    step = made._step(48, feed)
    first = step(given, 0.01)
    before = dict(step.weights)
    for _ in range(30):
        last = step(given, 0.01)
    assert last < 0.7 * first
    moved = {n for n in before if not np.array_equal(before[n], step.weights[n])}
    assert len([n for n in moved if n.startswith("match/")]) == (2 if width > 3 else 0)
    run(student, context(model, IMAGES), match=("c",), epochs=3)
    assert [weight.name for weight in student.weights()] == names
    assert [info.name for info in student.outputs] == ["y"]


def test_tensors_inside_come_closer() -> None:
    model = classifier()
    student = damaged(model)
    found = []
    for match in ((), ("r:r:mse:20",)):
        one = student.copy()
        run(one, context(model), match=match, epochs=16)
        off = inner(one, "r", X) - inner(model, "r", X)
        found.append(float(np.abs(off).mean()))
    assert found[1] < 0.9 * found[0]


def test_auto_takes_values_of_the_same_name() -> None:
    model = classifier()
    said = run(damaged(model), context(model), match=("auto",), epochs=1)
    assert "match=auto: r" in said
    other = model_of(
        "g (float[N,6] x) => (float[N,4] y) { h = MatMul(x, w1)  y = Neg(h) }",
        w1=draw(2, 6, 4),
    )
    with pytest.raises(UsageError, match="match=auto finds no ends of blocks"):
        run(other, context(model), match=("auto",))


def test_a_thinner_value_is_taught_the_channels_that_are_left() -> None:
    model, student = seeing(7), seeing(3)
    for value in ("c", "p"):
        student.lineage.keep(value, 1, [6, 0, 2])
    made = run_of(student, context(model, IMAGES), match=("c", "p:cosine"), alpha=0.0)
    assert not any(one.is_projected for one in made.links)
    feed, given = fed(made, 48)
    for number, name in enumerate("cp"):
        np.testing.assert_allclose(
            given[f"match/{number}/teacher"],
            inner(model, name, IMAGES[:48])[:, [6, 0, 2]],
            rtol=1e-5,
            atol=1e-6,
        )
    plain = run_of(student, context(model, IMAGES), alpha=0.0)
    plain_feed, plain_given = fed(plain, 48)
    found = made._step(48, feed)(given, 0.0) - plain._step(48, plain_feed)(
        plain_given, 0.0
    )
    one, two = (inner(m, "c", IMAGES[:48]) for m in (student, model))
    two = two[:, [6, 0, 2]]
    expected = float(np.square(one - two).mean() / two.var())
    one, two = (inner(m, "p", IMAGES[:48]) for m in (student, model))
    two = two[:, [6, 0, 2]]
    size = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    expected += 1 - float(((one * two).sum(1) / size).mean())
    assert found == pytest.approx(expected, rel=2e-4)


def test_what_stands_for_another_value_is_taught_that() -> None:
    model, student = classifier(), damaged(classifier())
    student.lineage.replace("r", "h")
    made = run_of(student, context(model), match=("h", "h:h"), alpha=0.0)
    assert [(one.pair.student, one.pair.teacher) for one in made.links] == [
        ("h", "r"),
        ("h", "h"),
    ]
    student.lineage.add("r")  # the only end of a block: nothing like it was there
    with pytest.raises(UsageError, match="match=auto finds no ends of blocks"):
        run_of(student, context(model), match=("auto", "h"), alpha=0.0)


def test_factors_of_a_layer_that_was_split_are_trained() -> None:
    model = classifier()
    student = model.copy()
    node = next(n for n in student.graph.nodes if n.op == "Gemm")
    weight = student.constant(node.inputs[1])
    assert weight is not None
    matrix = weight.read().T if node.attrs.get("transB", 0) else weight.read()
    left, values, right = np.linalg.svd(matrix)
    rank = 2 * len(values) // 3
    one = student.add_weight("one", (left[:, :rank] * values[:rank]).astype(np.float32))
    node.attrs.pop("transB", None)
    made = student.add_node("MatMul", [node.inputs[0], one], before=node)
    node.inputs[0] = made.outputs[0]
    student.set_weight(weight, right[:rank].astype(np.float32))
    student.lineage.split(weight.name, ["one", weight.name])
    wanted = runtime.session(model, threads=1).run({"x": X})["y"]

    off = []
    before = {name: student.weight(name).read() for name in ("one", weight.name)}
    for epochs in (0, 20):
        if epochs:
            run(student, context(model), epochs=epochs, lr=0.02, match=("auto",))
        found = runtime.session(student, threads=1).run({"x": X})["y"]
        off.append(np.square(found - wanted).mean())

    assert off[1] < 0.7 * off[0]
    for name, values in before.items():
        assert (student.weight(name).read() != values).mean() > 0.9


def test_auto_leaves_out_what_cannot_be_compared() -> None:
    model = model_of(
        "g (float[N,6] x) => (float[N,2] y) { a = MatMul(x, w1)  b = Relu(a)  "
        "s = Unsqueeze(b, one)  t = Tanh(s)  y = ReduceSum<keepdims=0>(t, one) }",
        w1=draw(0, 6, 2),
        one=np.array([1]),
    )
    # The same names, but t has another shape.
    student = model_of(
        "g (float[N,6] x) => (float[N,2] y) { a = MatMul(x, w1)  b = Relu(a)  "
        "s = Unsqueeze(b, two)  t = Tanh(s)  y = ReduceSum<keepdims=0>(t, two) }",
        w1=draw(1, 6, 2),
        two=np.array([2]),
    )
    ctx = context(model)
    said = run(student, ctx, match=("auto",), epochs=1)
    assert "match=auto: b\n" in f"{said}\n"
    assert [where for where, why in ctx.skips if "match=auto: 't'" in why] == ["t"]


@pytest.mark.parametrize("large", [False, True])
def test_a_file_with_tensors_teaches_as_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:  # the model is asked in every step instead of once
        monkeypatch.setattr(distill, "_CACHED", 0)
    model = classifier()
    everything = Samples.from_arrays({"x": X}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", model, everything, tensors=["h", "r"])
    made = []
    for options in ({}, {"teacher": tmp_path / "t.npz"}):
        student = damaged(model)
        said = run(student, context(model), epochs=2, match=("h", "r"), **options)
        made.append(values(student))
    assert "holds answers of the model that this run started from" in said
    for name in made[0]:
        np.testing.assert_allclose(made[0][name], made[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"match": ("hh",)}, "the model has no value 'hh'"),
        ({"match": ("h:w1",)}, "the teacher has no value 'w1'"),
        ({"match": ("h:y",), "match_weight": 0.0}, "match_weight is above 0"),
        ({"match": ("h:attention",)}, "channels and positions"),
    ],
)
def test_pairs_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    model = classifier()
    with pytest.raises(UsageError, match=says):
        run(damaged(model), context(model), **options)


def test_a_file_without_the_tensor_says_how_to_keep_it(tmp_path: Path) -> None:
    model = classifier()
    everything = Samples.from_arrays({"x": X}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", model, everything)
    options = {"teacher": tmp_path / "t.npz", "match": ("h",)}
    with pytest.raises(UsageError, match="onnxshrink teacher --tensor NAME"):
        run(damaged(model), context(model), **options)
    teacher.write(tmp_path / "t.npz", model, everything, tensors=["h"])
    with pytest.raises(UsageError, match="leave shift, crop, flip and mixup out"):
        run(damaged(model), context(model), mixup=0.5, **options)


# --- the largest scores -----------------------------------------------------------


@pytest.mark.parametrize(
    "end", ["y = Gemm(r, w2, b2)", "l = Gemm(r, w2, b2) y = Softmax(l)"]
)
def test_the_largest_scores_teach(tmp_path: Path, end: str) -> None:
    model = classifier(end)
    everything = Samples.from_arrays({"x": X}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", model, everything, top_k=2)
    student = damaged(model)
    before = gap(model, student)
    ctx = context(model)
    said = run(student, ctx, teacher=tmp_path / "t.npz", epochs=16)
    assert gap(model, student) < 0.7 * before
    assert ", agreement " in said


@pytest.mark.parametrize("top", [1, 2])
def test_of_largest_scores_too_what_is_minimised_is_judged(
    tmp_path: Path, top: int
) -> None:
    text = "g (float[N,3,6] x) => (float[N,3,5] y) { y = MatMul(x, w) }"
    model = model_of(text, w=draw(0, 6, 5))
    x = draw(1, 40, 3, 6)
    everything = Samples.from_arrays({"x": x}).bind(model.inputs)
    teacher.write(tmp_path / "t.npz", model, everything, top_k=top)
    ctx = context(model, x)
    ctx.samples = dataclasses.replace(ctx.samples, validation=ctx.samples.training)
    student = damaged(model, ("w",))
    made = run_of(student, ctx, teacher=tmp_path / "t.npz", temperature=2.0)
    feed, given = fed(made, 30)
    step = made._step(30, feed)
    judge = distill._Judge(made, made.training, made._lookup())
    assert judge(step.weights) == pytest.approx(step(given, 0.0), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, {"loss": "mse"}, "loss=mse needs whole outputs"),
        ({}, {"mixup": 0.5}, "mixup mixes whole answers"),
        ({"y/indices": np.full((160, 2), [4, 5])}, {}, "of class 5, and there are 4"),
        (
            {"y/rest": np.zeros((160, 3)), "y/values": np.zeros((160, 3, 2))},
            {},
            r"is \[4\] for a sample and the teacher's is \[3\] and its largest",
        ),
    ],
)
def test_largest_scores_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Array], options: dict[str, Any], says: str
) -> None:
    arrays = {
        "y/values": np.zeros((160, 2)),
        "y/indices": np.full((160, 2), [0, 1]),
        "y/rest": np.zeros(160),
        **change,
    }
    if arrays["y/values"].ndim == 3:
        arrays["y/indices"] = np.full((160, 3, 2), [0, 1])
    np.savez(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    model = classifier()
    with pytest.raises(UsageError, match=says):
        run(damaged(model), context(model), teacher=tmp_path / "t.npz", **options)


# --- what is refused, and what is said --------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"alpha": 1.5}, "alpha is a share"),
        ({"epochs": 0}, "epochs is at least 1"),
        ({"batch": 0}, "batch is at least 1"),
        ({"lr": -1.0}, "a learning rate is above 0"),
        ({"clip": -1.0}, "clip is at least 0"),
        ({"shift": -1}, "shift is a number of pixels"),
        ({"crop": -1}, "crop is a number of pixels"),
        ({"mixup": -0.1}, "mixup is from 0"),
        ({"mixup": float("nan")}, "mixup is from 0"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum is at least 0"),
        ({"weight_decay": 1.0}, "weight_decay"),
        ({"teacher": Path("t.npz"), "alpha": 1.0}, "asks no teacher"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Distill(**options)


def test_random_samples_are_refused() -> None:
    model = classifier()
    ctx = make_context(samples=Splits.build(model), reference=model)
    with pytest.raises(UsageError, match="only random ones; give more with --data"):
        Distill().apply(model.copy(), ctx)


def test_no_training_samples_are_refused() -> None:
    model = classifier()
    splits = Splits.build(model, {"x": X[:2]})
    assert splits.training is None
    with pytest.raises(UsageError, match="too few ones; give more with --data"):
        Distill().apply(model.copy(), make_context(samples=splits, reference=model))


def test_nothing_to_train_is_refused() -> None:
    model = classifier()
    with pytest.raises(UsageError, match="no weight to train that only and skip"):
        run(model.copy(), context(model), skip=("*",))


def test_nan_in_a_sample_is_refused_and_the_model_is_as_it_was() -> None:
    model = classifier()
    bad = X.copy()
    bad[70, 2] = np.nan
    student = damaged(model)
    before = student.to_bytes()
    with pytest.raises(ModelError, match="sample 70 of 'x' holds NaN"):
        run(student, context(model, bad))
    assert student.to_bytes() == before


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "the samples have no labels"),
        (np.full(160, 4), "labels go from 4 to 4, and 'y' has 4 classes"),
        (np.full(160, 0.5), "not one whole number"),
        (np.zeros((160, 2)), "not one whole number"),
        (np.full(160, "cat"), "not one whole number"),
    ],
)
def test_alpha_needs_labels_that_fit(labels: Array | None, says: str) -> None:
    model = classifier()
    with pytest.raises(UsageError, match=says):
        run(damaged(model), context(model, labels=labels), alpha=0.5)
    ctx = context(model, labels=labels)
    said = run(damaged(model), ctx, epochs=1)
    assert (says in said) == (labels is not None)


def test_training_that_explodes_leaves_the_model_and_says_what_to_change() -> None:
    model = classifier()
    student = damaged(model)
    before = student.to_bytes()
    ctx = context(model)
    said = run(student, ctx, lr=1e6, optimizer="sgd", clip=0.0)
    assert "went wrong after 0 epochs" in said
    assert "set lr to a third of that" in said
    assert student.to_bytes() == before
    assert not ctx.done


def test_ctrl_c_keeps_the_best_so_far() -> None:
    model = classifier()
    student = damaged(model)
    before = gap(model, student)
    ctx = context(model)

    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("epoch 6"):
            raise KeyboardInterrupt

    ctx.progress = progress
    said = run(student, ctx)
    assert "interrupted after 5 epochs" in said
    assert gap(model, student) < before


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    real = distill._Training._step

    def step(self: distill._Training, size: int, feed: Any) -> Any:
        sizes.append(size)
        if size > 4:
            raise ModelError(
                "onnxruntime cannot run it: it needs more memory than there is"
            )
        return real(self, size, feed)

    monkeypatch.setattr(distill._Training, "_step", step)
    model = classifier()
    said = run(damaged(model), context(model), epochs=1)
    assert sizes == [16, 8, 4]
    assert "memory was short: batches of 4 instead" in said


@pytest.mark.parametrize(
    ("batch", "limit", "size"),
    [(None, 1 << 32, 64), (None, 1 << 14, 32), (50, 1, 50), (200, 1 << 32, 120)],
)
def test_a_batch_is_as_large_as_an_estimate_allows(
    monkeypatch: pytest.MonkeyPatch, batch: int | None, limit: int, size: int
) -> None:
    monkeypatch.setattr(distill, "_STEP_BYTES", limit)
    model = classifier()
    made = run_of(damaged(model), context(model), batch=batch)
    # Of 64 samples 12 + 12 + 4 computed values and 6 given ones, twice: 17 kB.
    assert made._batch() == size
    small = "a step would be large: batches of 32"
    assert made.notes == ([small] if size == 32 else [])


def test_memory_that_numpy_lacks_halves_the_batch_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = distill._Feed.__call__

    def feed(self: distill._Feed, positions: Array, random: Any) -> Any:
        if len(positions) > 8:
            raise MemoryError
        return real(self, positions, random)

    monkeypatch.setattr(distill._Feed, "__call__", feed)
    model = classifier()
    said = run(damaged(model), context(model), epochs=1, batch=32)
    assert "memory was short: batches of 8 instead" in said


def test_momentum_is_that_of_sgd() -> None:
    model = classifier()
    made = []
    for momentum in (0.0, 0.9):
        student = damaged(model)
        run(student, context(model), optimizer="sgd", momentum=momentum, epochs=2)
        made.append(student.to_bytes())
    assert made[0] != made[1]


KILLED = """
import functools, os, signal, sys
import numpy as np
from onnxshrink.manager import shrink
from onnxshrink.passes import distill
from onnxshrink.training.loop import Checkpoint

distill.Checkpoint = functools.partial(Checkpoint, seconds=0.0)
model, data, output, stop = sys.argv[1:]
seen = []

def progress(done, total, what):
    if what.startswith("epoch ") or what.startswith("learning rate"):
        seen.append(what.split(",")[0])
    if what.startswith(stop):
        os.kill(os.getpid(), signal.SIGKILL)

shrink(
    model,
    "prune:sparsity=0.5,importance=magnitude,distill:epochs=5,match=r,momentum=0.8",
    data=data, output=output, on_breach="keep", threads=1, seed=3, progress=progress,
    measure_latency=False, measure_memory=False, resume=stop == "resume",
)
print(seen[0], *dict.fromkeys(seen), sep="|")
"""


@pytest.mark.slow
def test_a_killed_training_is_taken_up_again_and_ends_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    classifier().save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=draw(9, 300, 6))

    def start(output: str, stop: str) -> subprocess.CompletedProcess[str]:
        words = [tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / output, stop]
        return subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
        )

    whole = start("whole.onnx", "never")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.startswith("learning rate")
    killed = start("killed.onnx", "epoch 4,")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.onnx").exists()
    resumed = start("killed.onnx", "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == "epoch 4|epoch 4|epoch 5"
    one, two = (tmp_path / name for name in ("whole.onnx", "killed.onnx"))
    assert one.read_bytes() == two.read_bytes()


def test_in_a_pipeline_it_makes_good_what_pruning_did() -> None:
    result = shrink(
        classifier(),
        "prune:sparsity=0.5,importance=magnitude,distill:epochs=10,batch=16,lr=0.01",
        data={"x": draw(9, 500, 6)},
        on_breach="keep",
        measure_latency=False,
        measure_memory=False,
    )
    pruned, distilled = result.report.steps
    assert distilled.accepted
    assert distilled.after.metric["sqnr_db"] > pruned.after.metric["sqnr_db"]
    assert distilled.after.nonzeros <= pruned.after.nonzeros


# --- norms ------------------------------------------------------------------------


def normalized() -> Model:
    return model_of(
        "g (float[N,6] x) => (float[N,4] y) "
        "{ h = Gemm(x, w1, b1)  n = BatchNormalization(h, s, t, mean, var)  "
        "r = Relu(n)  y = Gemm(r, w2, b2) }",
        w1=draw(2, 6, 12),
        b1=draw(3, 12),
        s=np.abs(draw(6, 12)) + np.float32(0.5),
        t=draw(7, 12),
        mean=draw(8, 12),
        var=np.full(12, 4, np.float32),
        w2=draw(4, 12, 4),
        b2=draw(5, 4),
    )


@pytest.mark.parametrize("norms", ["freeze", "fold", "estimate"])
def test_norms_are_kept_folded_or_estimated(norms: str) -> None:
    model = normalized()
    read = runtime.session(model, threads=1, expose=["h"]).run({"x": X})["h"]
    model.set_weight("mean", read.mean(0))
    model.set_weight("var", read.var(0))
    student = damaged(model)
    before = gap(model, student)
    said = run(student, context(model), norms=norms)
    assert gap(model, student) < 0.7 * before
    kinds = {node.op for node in student.nodes()}
    assert ("BatchNormalization" in kinds) == (norms != "fold")
    if norms == "fold":
        assert "folded 1" in said
        return
    mean = values(student)["mean"]
    seen = runtime.session(student, threads=1, expose=["h"]).run({"x": X[:120]})["h"]
    same = np.allclose(mean, seen.mean(0), atol=1e-3)
    assert same == (norms == "estimate")
    if norms == "freeze":
        np.testing.assert_array_equal(mean, values(model)["mean"])


# --- quantization-aware training ------------------------------------------------------


def coded_lenet(levels: int) -> tuple[Model, Model, dict[str, Array]]:
    """Return LeNet-300-100, itself with int4 codes for each output, and the digits."""
    folder = Path(__file__).parents[2] / "models"
    model = Model.load(folder / "lenet-300-100.onnx")
    student = model.copy()
    student.require_opset(21)
    scheme = Scheme(onnx.TensorProto.INT4, -levels, levels, symmetric=True, axis=0)
    for node in [node for node in student.nodes() if node.op == "Gemm"]:
        weight = student.constant(node.inputs[1])
        assert weight is not None
        values_ = weight.read()
        top = 2.5 * values_.std(axis=1)
        scale, zero = affine(-top, top, scheme)
        parts = [quantize(values_, scale, zero, scheme), scale]
        names = [f"{weight.name}_codes", f"{weight.name}_scale"]
        made = [
            student.add_weight(name, part)
            for name, part in zip(names, parts, strict=True)
        ]
        decoded = student.add_node("DequantizeLinear", made, attrs={"axis": 0})
        node.inputs[1] = decoded.outputs[0]
    student.drop_unused()
    with np.load(folder / "mnist.npz") as archive:
        digits = {name: archive[name] for name in archive.files}
    return model, student, digits


@pytest.mark.slow
@pytest.mark.parametrize("scales", ["fixed", "learned"])
def test_quantization_aware_training_repairs_codes_of_three_bits(scales: Any) -> None:
    model, student, digits = coded_lenet(3)

    def images(name: str, start: int, stop: int) -> Array:
        some = digits[name][start:stop].astype(np.float32) / 255
        return some[:, None]

    def errors(of: Model) -> float:
        answer = runtime.session(of, threads=1).run(
            {"image": images("test_x", 0, 3000)}
        )
        guess = next(iter(answer.values())).argmax(1)
        return float((guess != digits["test_y"][:3000]).mean())

    training, held = (
        Samples.from_arrays({"image": images("train_x", *span)}).bind(model.inputs)
        for span in ((0, 4000), (55_000, 56_000))
    )
    ctx = make_context(
        samples=Splits(training=training, validation=held), reference=model, threads=1
    )
    before = errors(student)
    start = {name: np.array(value) for name, value in values(student).items()}
    Distill(epochs=3, lr=3e-3, scales=scales).apply(student, ctx)
    student.check()
    assert before > 0.08
    assert errors(student) < 0.03
    after = Model.load(student.to_proto())
    for name, array in values(after).items():
        assert (array.dtype, array.shape) == (start[name].dtype, start[name].shape)
        if name.endswith("_codes"):
            assert after.weight(name).data_type == onnx.TensorProto.INT4
            assert np.abs(array.astype(int)).max() <= 3
        if name.endswith("_scale"):
            assert np.array_equal(array, start[name]) == (scales == "fixed")
            assert (array > 0).all()


# --- outputs that can be taught -------------------------------------------------------

SEVERAL = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 6] x) => (float[N, 4] y, float[K, 4] rows, float[6, 4] table, int64[N] top)
<float[6, 4] w, float zero = {0}>
{
  y = MatMul(x, w)
  high = ReduceMax<axes = [1], keepdims = 0>(y)
  on = Greater(high, zero)
  rows = Compress<axis = 0>(y, on)
  table = Identity(w)
  top = ArgMax<axis = 1, keepdims = 0>(y)
}
"""


def several(drop: int = 0) -> onnx.ModelProto:
    """One output for each sample, and three that are no such thing."""
    text = SEVERAL.replace("<float[6, 4] w, ", "<").replace(
        "[N, 6] x)", "[N, 6] x, float[6, 4] w)"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.input.pop()
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del proto.graph.output[:drop]
    return proto


def test_outputs_that_do_not_count_samples_are_left_out_and_named() -> None:
    result = shrink(
        several(),
        "prune:sparsity=0.3,distill:epochs=1",
        data={"x": draw(3, 200, 6)},
        on_breach="keep",
        measure_latency=False,
        measure_memory=False,
    )
    said = dict(result.report.steps[-1].skipped)
    assert "its first axis does not count them" in said["rows"]
    assert "its first axis does not count them" in said["table"]
    assert said["top"] == "it is not taught: it holds int64 values, no floats"
    assert "y" not in said


def test_outputs_are_chosen() -> None:
    def run(outputs: str, drop: int = 0) -> Any:
        return shrink(
            several(drop),
            f"distill:epochs=1{outputs}",
            data={"x": draw(3, 90, 6)},
            measure_latency=False,
            measure_memory=False,
        )

    run(",outputs=y")
    with pytest.raises(UsageError, match=r"no output 'z'; it has y, rows, table, top"):
        run(",outputs=z")
    with pytest.raises(UsageError, match=r"could be taught: 'top': it holds int64"):
        run(",outputs=top")
    with pytest.raises(
        UsageError, match=r"could be taught: 'top'.*; 'rows'.*; 'table'"
    ):
        run("", drop=1)


def test_a_shape_that_ends_at_a_loop_names_the_loop() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    g (float[N, 6] x, int64 n, float[6, 6] a, float[6, 5] o) => (float[N, 5] y)
    <bool go = {1}>
    {
      h = MatMul(x, a)
      s = Loop(n, go, h) <
        body = step (int64 i, bool before, float[N, 6] now)
          => (bool on, float[M, K] next)
        { on = Identity(before) next = Tanh(now) }
      >
      y = MatMul(s, o)
    }
    """
    proto = onnx.parser.parse_model(text)
    del proto.graph.input[2:]
    for name, size in (("a", 6), ("o", 5)):
        values = np.eye(6, size, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    data = {"x": draw(3, 90, 6), "n": np.full(90, 2)}
    with pytest.raises((ModelError, UsageError), match="Loop") as caught:
        shrink(proto, "distill:epochs=1", data=data)
    assert "give the shapes" not in str(caught.value)
