"""The validator: what it lets pass, what it stops, and the figures it gives."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy.stats import spearmanr

from onnxshrink.base import Promise
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.measuring import differences
from onnxshrink.model import Model
from onnxshrink.runtime import Session
from onnxshrink.samples import Samples, Splits
from onnxshrink.validation import Budget, OutputMetrics, Validator, Verdict
from onnxshrink.validation import validator as validators

RNG = np.random.default_rng(11)
X = RNG.normal(size=(50, 3)).astype(np.float32)
W = RNG.normal(size=(3, 4)).astype(np.float32)
SCORES = X @ W
LABELS = SCORES.argmax(1)


def linear(weight: np.ndarray = W, **changes: Any) -> onnx.ModelProto:
    """y = x @ w, with the names, types and shapes of its signature as given."""
    shape = {"x": ["N", 3], "y": ["N", 4], **changes.get("shapes", {})}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node(changes.get("op", "Identity"), ["h"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape["x"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape["y"])],
        [onnx.numpy_helper.from_array(np.asarray(weight, np.float32), "w")],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> {text}')


def splits(reference: onnx.ModelProto, x: Any = X, labels: Any = None) -> Splits:
    data = x if isinstance(x, dict) else {Model.load(reference).inputs[0].name: x}
    if labels is not None:
        data = {**data, "labels": labels}
    return Splits(evaluation=Samples.of(data).bind(Model.load(reference).inputs))


def validator(
    reference: onnx.ModelProto | None = None,
    x: Any = X,
    labels: Any = None,
    budget: Budget | None = None,
    **options: Any,
) -> Validator:
    model = linear() if reference is None else reference
    given = Budget() if budget is None else budget
    return Validator(model, splits(model, x, labels), given, **options)


def metrics(verdict: Verdict, name: str = "y") -> OutputMetrics:
    return verdict.outputs[name]


# Figures


def test_an_equal_model_is_the_same():
    verdict = validator(labels=LABELS).check(linear(), Promise.SAME)
    assert verdict.ok
    assert verdict.reason == "ok"
    assert verdict.samples == 50
    assert metrics(verdict) == OutputMetrics(cosine=1.0, agreement=1.0)
    assert verdict.metric is not None
    assert (verdict.metric.name, verdict.metric.after) == ("top1", 100.0)
    assert verdict.damage == 0.0


def test_the_figures_are_those_of_their_formulas():
    other = W + RNG.normal(size=W.shape, scale=0.3).astype(np.float32)
    out = (X @ other).astype(np.float64)
    ref = SCORES.astype(np.float64)
    verdict = validator(labels=LABELS, batch_size=7).check(linear(other))
    m = metrics(verdict)
    assert m.max_abs == pytest.approx(abs(out - ref).max(), rel=1e-5)
    assert m.max_rel == pytest.approx(abs(out - ref).max() / abs(ref).max(), rel=1e-5)
    sqnr = 10 * np.log10((ref**2).sum() / ((out - ref) ** 2).sum())
    assert m.sqnr_db == pytest.approx(sqnr, rel=1e-5)
    sizes = np.linalg.norm(out, axis=1) * np.linalg.norm(ref, axis=1)
    assert m.cosine == pytest.approx(((out * ref).sum(1) / sizes).mean(), rel=1e-5)
    same = (out.argmax(1) == ref.argmax(1)).mean()
    assert m.agreement == pytest.approx(same)
    assert verdict.metric is not None
    assert verdict.metric.drop == pytest.approx(100 - 100 * same)
    assert verdict.quality() == {
        "top1": verdict.metric.after,
        "agreement": m.agreement,
        "sqnr_db": m.sqnr_db,
    }
    assert 0 < same < 1


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_figures_do_not_depend_on_the_batch_size_or_where_outputs_are_kept(
    monkeypatch: pytest.MonkeyPatch, batch_size: int
):
    other = linear(W * 1.1)
    whole = validator(labels=LABELS).check(other)
    monkeypatch.setattr(differences, "_IN_MEMORY", 100)
    cut = validator(labels=LABELS, batch_size=batch_size).check(other)
    assert metrics(cut).sqnr_db == pytest.approx(metrics(whole).sqnr_db)
    assert metrics(cut).cosine == pytest.approx(metrics(whole).cosine)
    assert cut.metric == whole.metric


@pytest.mark.parametrize(("side", "samples"), [(0, 50), (1, 4)])
def test_a_batch_is_bounded_by_the_bytes_that_go_in_and_that_come_out(
    monkeypatch: pytest.MonkeyPatch, side: int, samples: int
):
    # Twenty-five floats are a sample's outputs here: 100 bytes.
    weight = np.random.default_rng(3).normal(size=(3, 25)).astype(np.float32)
    wide = linear(weight, shapes={"y": ["N", 25]})
    monkeypatch.setattr(validators, "_BATCH", 1000)
    monkeypatch.setattr(validators, "_BATCH_BYTES", [10**6, 400][side])
    sizes: list[int] = []
    run = Session.run

    def counted(self: Session, feeds: Any, names: Any = None) -> dict[str, Any]:
        sizes.append(len(feeds["x"]))
        return run(self, feeds, names)

    monkeypatch.setattr(Session, "run", counted)
    assert validator(wide).check(wide).ok
    assert max(sizes) == samples


def test_a_tie_of_the_reference_may_fall_either_way():
    tied = np.array([[1, 1], [0, 0], [0, 0]])
    reference = linear(tied, shapes={"y": ["N", 2]})
    nudged = np.add(tied, [[0, 1e-3], [0, 0], [0, 0]])
    labels = np.zeros(len(X), np.int64)
    verdict = validator(reference, np.abs(X), labels).check(
        linear(nudged, shapes={"y": ["N", 2]})
    )
    assert metrics(verdict).agreement == 1.0


def test_an_embedding_is_not_class_scores():
    # What it is called says nothing, and neither do rows that all agree.
    assert metrics(validator().check(linear())).agreement is None
    text = """
    g (float[N, 3] x) => (float[N, 3] y) { y = LpNormalization<axis = -1>(x) }
    """
    assert metrics(validator(parsed(text)).check(parsed(text))).agreement is None
    judge = validator(parsed(text), budget=Budget(min_agreement=0.5))
    with pytest.raises(UsageError, match="--min-agreement needs an output"):
        judge.check(parsed(text))


def test_class_scores_may_have_axes_of_size_one():
    text = """
    g (float[N, 3] x) => (float[N, 3, 1, 1] y) <int64[2] axes = {2, 3}>
    { y = Unsqueeze(x, axes) }
    """
    verdict = validator(parsed(text), labels=X.argmax(1)).check(parsed(text))
    assert verdict.metric is not None
    assert verdict.metric.before == 100.0


def test_integers_and_strings_agree_by_equality():
    reference = parsed("g (int64[N] x) => (int64[N] y) { y = Identity(x) }")
    other = parsed(
        """
        g (int64[N] x) => (int64[N] y) <int64 top = {8}> { y = Min(x, top) }
        """
    )
    x = np.arange(10)
    verdict = validator(reference, x).check(other)
    assert metrics(verdict).agreement == 0.9
    held = validator(reference, x).check(other, Promise.SAME)
    assert held.problem == "same"
    assert "10.00% of the values of 'y' differ" in held.reason


def test_sequences_are_compared_item_by_item():
    text = "g (float[N] x) => (seq(float[N]) y) { a = OP(x) y = SequenceConstruct(a) }"
    reference = parsed(text.replace("OP", "Identity"))
    same = validator(reference, X[:, 0]).check(reference, Promise.SAME)
    assert same.ok
    other = parsed(text.replace("OP", "Neg"))
    verdict = validator(reference, X[:, 0]).check(other)
    assert metrics(verdict).sqnr_db == pytest.approx(-6.0206, abs=1e-3)
    assert not validator(reference, X[:, 0]).check(other, Promise.SAME).ok


def test_maps_are_compared_key_by_key():
    node = helper.make_node(
        "ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[7, 8, 9]
    )
    kind = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    output = helper.make_value_info("y", helper.make_sequence_type_proto(kind))

    def zipped(first: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            [helper.make_node(first, ["in"], ["x"]), node],
            "g",
            [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["N", 3])],
            [output],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    judge = validator(zipped("Identity"))
    assert judge.check(zipped("Identity"), Promise.SAME).ok
    verdict = judge.check(zipped("Neg"))
    assert metrics(verdict).sqnr_db == pytest.approx(-6.0206, abs=1e-3)
    assert not judge.check(zipped("Neg"), Promise.SAME).ok


def test_a_random_output_is_not_compared():
    text = """
    g (float[N, 3] x) => (float[N, 3] y, float[N, 3] z)
    { y = RandomNormalLike(x) z = Neg(x) }
    """
    verdict = validator(parsed(text)).check(parsed(text), Promise.SAME)
    assert verdict.ok
    assert metrics(verdict).note.startswith("random")
    assert metrics(verdict, "z").cosine == 1.0


# SAME


@pytest.mark.parametrize(("error", "ok"), [(1e-6, True), (3e-3, False), (1e-2, False)])
def test_the_same_outputs_means_up_to_float_noise(error: float, ok: bool):
    other = linear(W + error * abs(SCORES).max() / 3)
    verdict = validator().check(other, Promise.SAME)
    assert verdict.ok == ok
    if not ok:
        assert verdict.problem == "same"
        assert "promised the same outputs, but 'y' differs by up to" in verdict.reason
        assert not verdict.keepable
        assert verdict.damage == math.inf


def test_one_wrong_value_among_many_is_not_the_same():
    other = parsed(
        """
        g (float[N, 3] x) => (float[N, 3] y) <float high = {2.3}>
        { y = Min(x, high) }
        """
    )
    reference = parsed("g (float[N, 3] x) => (float[N, 3] y) { y = Identity(x) }")
    assert 1 <= (X > 2.3).sum() <= 3
    assert not validator(reference).check(other, Promise.SAME).ok


def test_the_same_is_measured_against_the_model_before_the_pass():
    judge = validator(budget=Budget(min_sqnr=30))
    pruned = linear(np.where(abs(W) < 0.5, 0, W))
    verdict = judge.check(pruned, Promise.SAME, before=pruned)
    assert verdict.ok
    assert metrics(verdict).sqnr_db < 30
    assert not judge.check(pruned, Promise.SAME).ok
    assert not judge.check(linear(), Promise.SAME, before=pruned).ok


def test_a_file_before_the_pass_is_read_again_when_it_changes(tmp_path: Path):
    judge = validator()
    before = tmp_path / "before.onnx"
    for factor in (2, 3):
        onnx.save(linear(W * factor), before)
        assert judge.check(linear(W * factor), Promise.SAME, before=before).ok


def test_a_file_that_was_judged_need_not_run_again_to_be_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    judge = validator()
    path = tmp_path / "pruned.onnx"
    onnx.save(linear(np.where(abs(W) < 0.5, 0, W)), path)
    judge.check(path)
    monkeypatch.setattr(judge, "_observe", None)
    assert judge.check(onnx.load(path), Promise.SAME, before=path).ok
    assert not judge.check(linear(), Promise.SAME, before=path).ok


def test_a_model_noisy_of_itself_may_differ_by_ten_times_its_own_noise(
    monkeypatch: pytest.MonkeyPatch,
):
    judge = validator()
    scale = abs(SCORES).max()
    own = {"y": (2e-4, 65.0)}
    monkeypatch.setattr(judge, "_own_noise", lambda start: own)
    assert judge.check(linear(W + 3e-4 * scale), Promise.SAME).ok
    assert not judge.check(linear(W + 2e-3 * scale), Promise.SAME).ok
    # However noisy it is, an error of more than a hundredth is another output.
    own["y"] = (1.0, 0.0)
    assert not judge.check(linear(W + 1e-2 * scale), Promise.SAME).ok


def test_the_noise_of_a_model_is_that_of_its_run_without_optimisations():
    judge = validator()
    relative, level = judge._own_noise(judge._reference())["y"]
    assert 0 <= relative < 1e-5
    assert level > 100


def test_half_precision_has_a_tolerance_of_its_own():
    text = """
    g (float16[N, 3] x) => (float16[N, 3] y) <float c = {C}>
    { h = Cast<to = 10>(c) y = Mul(x, h) }
    """
    one, two = text.replace("{C}", "{1.0}"), text.replace("{C}", "{1.002}")
    x = X.astype(np.float16)
    assert validator(parsed(one), x).check(parsed(two), Promise.SAME).ok
    two = text.replace("{C}", "{1.05}")
    assert not validator(parsed(one), x).check(parsed(two), Promise.SAME).ok


def test_quantized_outputs_may_round_a_few_ties_differently():
    text = """
    g (float[N, 3] x) => (uint8[N, 3] y) <float s = {S}, uint8 z = {128}>
    { y = QuantizeLinear(x, s, z) }
    """
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    one = parsed(text.replace("S", "0.05"))
    near = parsed(text.replace("S", "0.050001"))
    far = parsed(text.replace("S", "0.06"))
    assert validator(one, x).check(near, Promise.SAME).ok
    assert not validator(one, x).check(far, Promise.SAME).ok


# Budgets


def test_a_drop_within_the_budget_is_kept_and_one_beyond_it_named():
    weight = W.copy()
    weight[:, 0] += 0.4
    after = 100 * np.mean((X @ weight).argmax(1) == LABELS)
    drop = 100 - after
    assert drop > 0
    within = validator(labels=LABELS, budget=Budget(max_drop=drop)).check(
        linear(weight)
    )
    assert within.ok
    assert within.damage <= 1
    beyond = validator(labels=LABELS, budget=Budget(max_drop=drop - 0.1)).check(
        linear(weight)
    )
    assert beyond.problem == "budget"
    assert beyond.keepable
    assert beyond.damage > 1
    assert beyond.reason == (
        f"top1 went from 100 to {after:.6g}, {drop:.3g} worse where {drop - 0.1:g} is "
        "allowed"
    )


def test_agreement_and_sqnr_bind():
    other = linear(W + RNG.normal(size=W.shape, scale=0.5))
    verdict = validator(budget=Budget(min_agreement=1.0)).check(other)
    assert "agreement of 'y' is 0." in verdict.reason
    verdict = validator(budget=Budget(min_sqnr=60)).check(other)
    assert "SQNR of 'y' is" in verdict.reason
    assert validator(budget=Budget(min_agreement=0.0, min_sqnr=-20)).check(other).ok


def test_damage_grows_with_the_noise_even_where_the_metric_stays():
    judge = validator(labels=LABELS, budget=Budget(max_drop=5))
    damages = [
        judge.check(linear(W * factor)).damage for factor in (1, 1.01, 1.1, 1.5, 2)
    ]
    assert damages == sorted(damages)
    assert len(set(damages)) == 5
    assert damages[-1] <= 1


def test_a_better_metric_costs_nothing():
    wrong = linear(W[:, ::-1])
    judge = validator(wrong, labels=LABELS, budget=Budget(max_drop=0))
    verdict = judge.check(linear())
    assert verdict.ok
    assert verdict.metric is not None
    assert verdict.metric.drop < 0


def test_only_the_signature_is_promised_before_recovery():
    judge = validator(labels=LABELS, budget=Budget(max_drop=0, min_sqnr=90))
    verdict = judge.check(linear(-W), Promise.SIGNATURE)
    assert verdict.ok
    assert verdict.metric is not None
    assert verdict.metric.drop > 50


def test_a_budget_that_nothing_measures_is_refused():
    with pytest.raises(UsageError, match="--max-drop needs labels"):
        validator(budget=Budget(max_drop=1))
    with pytest.raises(UsageError, match="no output is class scores that fit"):
        validator(labels=LABELS * 100, budget=Budget(max_drop=1)).check(linear())
    text = parsed("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    with pytest.raises(UsageError, match="--min-agreement needs an output of class"):
        validator(text, X[:, 0], budget=Budget(min_agreement=0.9)).check(text)


def test_the_default_budget_follows_the_samples():
    m = Model.load(linear())
    smoke = Budget.default(Splits.build(m))
    assert (smoke.max_drop, smoke.min_agreement, smoke.min_sqnr) == (None, None, None)
    labelled = splits(linear(), labels=LABELS)
    judge = Validator(linear(), labelled, Budget.default(labelled))
    assert (judge.budget.max_drop, judge.budget.min_agreement) == (1.0, None)
    bare = splits(linear())
    judge = Validator(linear(), bare, Budget.default(bare))
    assert (judge.budget.max_drop, judge.budget.min_agreement) == (None, None)
    scores = linear(op="Softmax")
    judge = Validator(scores, bare, Budget.default(bare))
    assert (judge.budget.max_drop, judge.budget.min_agreement) == (None, 0.98)
    assert judge.budget.min_sqnr is None
    text = parsed("g (float[N] x) => (float[N] y) { y = Neg(x) }")
    judge = Validator(text, splits(text, X[:, 0]))
    assert (judge.budget.min_agreement, judge.budget.min_sqnr) == (None, 20.0)


def test_labels_that_fit_no_output_fall_back_to_agreement_by_default():
    scores = linear(op="Softmax")
    odd = splits(scores, labels=np.linspace(0, 1, 50))
    judge = Validator(scores, odd, Budget.default(odd))
    assert judge.budget.min_agreement == 0.98
    assert judge.reference_metric() == {}


TWO = """
g (float[N, 3] x) => (float[N, 3] y, float[N, 3] z, int64[N] top)
<float one = {ONE}, float two = {TWO}, float[3] three = {THREE}>
{
  a = Mul(x, one)
  y = Softmax<axis = -1>(a)
  z = Mul(x, two)
  b = Add(x, three)
  top = ArgMax<axis = 1, keepdims = 0>(b)
}
"""


def outputs(one: str = "1", two: str = "1", three: str = "0, 0, 0") -> onnx.ModelProto:
    changes = {"ONE": one, "TWO": two, "THREE": three}
    text = TWO
    for name, value in changes.items():
        text = text.replace("{" + name + "}", "{" + value + "}")
    return parsed(text)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "ok"),
        ({"one": "0.5"}, "ok"),
        ({"two": "2"}, "SQNR of 'z' is 0.0 dB, less than 20"),
        ({"three": "9, 0, 0"}, "agreement of 'top' is"),
    ],
)
def test_the_default_bounds_every_output(changed: Any, reason: str, labelled: bool):
    given = splits(outputs(), labels=X.argmax(1) if labelled else None)
    judge = Validator(outputs(), given)
    assert judge.check(outputs(**changed)).reason.startswith(reason)
    assert judge.check(outputs(one="-1")).problem == "budget"


def test_limits_asked_for_leave_no_output_unbounded():
    def reason(candidate: onnx.ModelProto, **limits: float) -> str:
        judge = validator(outputs(), labels=X.argmax(1), budget=Budget(**limits))
        return judge.check(candidate).reason

    wrong = outputs(three="9, 0, 0")
    assert "agreement of 'top'" in reason(wrong, min_sqnr=40)
    assert "agreement of 'top'" in reason(wrong, max_drop=1)
    assert reason(outputs(two="2"), min_agreement=0.9) == (
        "SQNR of 'z' is 0.0 dB, less than 20"
    )
    assert reason(outputs(two="2"), max_drop=1).startswith("SQNR of 'z'")
    assert "SQNR of 'y'" in reason(outputs(one="0.5"), min_sqnr=40)
    assert reason(outputs(one="0.5"), max_drop=0) == "ok"


def test_state_is_not_bounded_unless_it_is_all_there_is():
    text = """
    g (float[N, 3] x, float[N, 3] state_in) => (OUTPUTS)
    <float one = {ONE}>
    { y = Identity(x) a = Add(x, state_in) state_out = Mul(a, one) }
    """
    one, two = text.replace("ONE", "1"), text.replace("ONE", "3")
    x = {"x": X, "state_in": X}
    both = "float[N, 3] y, float[N, 3] state_out"
    judge = validator(parsed(one.replace("OUTPUTS", both)), x, budget=None)
    judge = Validator(
        parsed(one.replace("OUTPUTS", both)),
        splits(parsed(one.replace("OUTPUTS", both)), x),
    )
    assert judge.check(parsed(two.replace("OUTPUTS", both))).ok
    alone = "float[N, 3] state_out"
    reference = parsed(one.replace("OUTPUTS", alone))
    judge = Validator(reference, splits(reference, x))
    assert not judge.check(parsed(two.replace("OUTPUTS", alone))).ok


@pytest.mark.parametrize("kind", ["int64", "bool", "string"])
def test_integers_booleans_and_strings_are_bounded_without_data(kind: str):
    made = {
        "int64": "y = Identity(i)",
        "bool": "zero = Constant<value_ints = [0, 0, 0, 0]>() y = Greater(i, zero)",
        "string": """
        names = Constant<value_strings = ["a", "b", "c", "d"]>() y = Gather(names, i)
        """,
    }
    text = f"""
    g (float[N, 3] x) => ({kind}[N, 4] y) <float[3, 4] w = {{WEIGHT}}>
    {{ h = MatMul(x, w) d, i = TopK<axis = 1>(h, k) {made[kind]} }}
    """.replace("{ h =", "{ k = Constant<value_ints = [4]>() h =")

    def model(weight: np.ndarray) -> onnx.ModelProto:
        values = ", ".join(f"{value:.6f}" for value in weight.ravel())
        return parsed(text.replace("WEIGHT", values))

    given = Splits.build(Model.load(model(W)))
    judge = Validator(model(W), given)
    assert judge.check(model(W)).ok
    verdict = judge.check(model(-W))
    assert "agreement of 'y' is" in verdict.reason
    assert "less than 0.9" in verdict.reason
    assert verdict.keepable


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = RandomNormalLike(x)", "'y' is random"),
        ("s, t, u, v = NOTHING y = Slice(x, s, t, u, v)", "'y' is empty"),
    ],
)
def test_where_nothing_can_be_compared_nothing_is_ok(body: str, why: str):
    nothing = "Constant<value_ints = [0]>()"
    body = body.replace(
        "s, t, u, v = NOTHING",
        f"s = {nothing} t = {nothing} u = {nothing} v = Constant<value_ints = [1]>()",
    )
    model = parsed(f"g (float[N, 3] x) => (float[N, M] y) {{ {body} }}")
    given = splits(model)
    for limits in ({"min_sqnr": 40.0}, {"min_agreement": 0.5}):
        with pytest.raises(UsageError, match=f"can be measured.*{why}"):
            Validator(model, given, Budget(**limits)).check(model)
    judge = Validator(model, given)
    verdict = judge.check(model)
    assert (verdict.ok, verdict.problem) == (False, "unmeasured")
    assert verdict.reason.startswith(f"nothing comparable was compared: {why}")
    assert verdict.keepable
    same = judge.check(model, Promise.SAME)
    assert same.ok
    assert same.reason == verdict.reason


def test_decibels_of_integers_are_refused():
    text = "g (float[N, 3] x) => (int64[N, 1] y) { y = ArgMax<axis = 1>(x) }"
    with pytest.raises(UsageError, match="--min-sqnr needs an output of floats"):
        validator(parsed(text), budget=Budget(min_sqnr=40)).check(parsed(text))


# Task metrics


def test_top5_counts_labels_among_the_five_highest():
    reference = parsed("g (float[N, 9] x) => (float[N, 9] y) { y = Identity(x) }")
    x = RNG.normal(size=(40, 9)).astype(np.float32)
    labels = RNG.integers(0, 9, 40)
    judge = validator(reference, x, labels, metric="top5")
    order = np.argsort(-x, axis=1)[:, :5]
    expected = 100 * np.mean(
        [label in row for label, row in zip(labels, order, strict=True)]
    )
    assert judge.reference_metric() == {"top5": pytest.approx(expected)}


def test_mse_and_spearman_compare_an_output_with_labels():
    reference = parsed("g (float[N] x) => (float[N] y) { y = Identity(x) }")
    x, labels = X[:, 0], X[:, 0] + X[:, 1]
    judge = validator(reference, x, labels, metric="mse", budget=Budget(max_drop=0.5))
    assert judge.reference_metric()["mse"] == pytest.approx(np.mean((x - labels) ** 2))
    verdict = judge.check(parsed("g (float[N] x) => (float[N] y) { y = Neg(x) }"))
    assert verdict.metric is not None
    assert verdict.metric.lower_is_better
    assert verdict.metric.drop > 0.5
    assert verdict.problem == "budget"
    judge = validator(reference, x, labels, metric="spearman")
    expected = spearmanr(x, labels).statistic
    assert judge.reference_metric()["spearman"] == pytest.approx(expected)


def worst(outputs: Any, labels: Any) -> float:
    return float(abs(outputs["y"]).max())


def test_a_function_gets_all_outputs_and_labels():
    seen: list[Any] = []

    def shape(outputs: Any, labels: Any) -> float:
        seen.append((outputs["y"].shape, labels.shape))
        return float(outputs["y"].mean())

    judge = validator(labels=LABELS, metric=shape, budget=Budget(max_drop=1))
    verdict = judge.check(linear())
    assert seen == [((50, 4), (50,))] * 2
    assert verdict.metric is not None
    assert verdict.metric.name == "shape"
    assert verdict.metric.before == pytest.approx(SCORES.mean(), rel=1e-5)


def test_a_function_needs_no_labels_and_may_be_lower_is_better():
    def largest(outputs: Any, labels: Any) -> float:
        assert labels is None
        return worst(outputs, labels)

    largest.lower_is_better = True  # type: ignore[attr-defined]
    judge = validator(metric=largest, budget=Budget(max_drop=0.1))
    assert judge.check(linear(W * 0.5)).ok
    assert judge.check(linear(W * 2)).problem == "budget"


def test_a_metric_is_imported_from_a_file_or_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = "def worst(outputs, labels):\n    return abs(outputs['y']).max()\n"
    (tmp_path / "task_metric_file.py").write_text(source)
    judge = validator(metric=f"{tmp_path}/task_metric_file.py:worst")
    expected = {"worst": pytest.approx(abs(SCORES).max(), rel=1e-5)}
    assert judge.reference_metric() == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert validator(metric="task_metric_file:worst").reference_metric() == expected


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("top2", "no metric 'top2'; there are top1, top5, .*Did you mean 'top"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("math:sinus", r"math has no function 'sinus'"),
        ("top1", "metric top1 needs labels"),
    ],
)
def test_a_metric_that_does_not_exist_is_named(metric: str, message: str):
    with pytest.raises(UsageError, match=message):
        validator(metric=metric)


def test_a_metric_that_fails_or_is_not_finite_is_named():
    def broken(outputs: Any, labels: Any) -> float:
        raise KeyError("logits")

    with pytest.raises(ModelError, match="metric broken failed: KeyError: 'logits'"):
        validator(metric=broken).check(linear())
    with pytest.raises(ModelError, match="gave nan, not a finite number"):
        validator(metric=lambda outputs, labels: math.nan).check(linear())


def test_labels_that_no_output_fits_are_explained():
    judge = validator(labels=LABELS + 100, metric="top1")
    with pytest.raises(UsageError, match=r"more classes than the largest label.*'y'"):
        judge.check(linear())


# What is broken


def test_nan_and_infinity_fail_where_the_reference_has_none():
    nan = W.copy()
    nan[0, 0] = np.nan
    for promise in Promise:
        verdict = validator().check(linear(nan), promise)
        assert verdict.problem == "broken"
        assert "output 'y' has 50 NaN values" in verdict.reason
        assert not verdict.keepable
    inf = W.copy()
    inf[0, 0] = np.inf
    assert "50 infinite values" in validator().check(linear(inf)).reason


def test_infinities_and_mask_fills_of_the_reference_may_stay():
    text = """
    g (float[N, 3] x) => (float[N, 3] y)
    <float top = {TOP}, float one = {ONE}, float zero = {0}>
    { low = Div(top, one) c = Less(x, zero) y = Where(c, low, x) }
    """
    for one in ("1", "0"):
        model = parsed(text.replace("TOP", "-3.4e38").replace("ONE", one))
        verdict = validator(model).check(model, Promise.SAME)
        assert verdict.ok
        assert metrics(verdict).sqnr_db == math.inf
    lost = parsed(text.replace("TOP", "0").replace("ONE", "1"))
    verdict = validator(model).check(lost, Promise.SAME)
    assert "values of 'y' are finite that were not" in verdict.reason


def test_a_candidate_that_does_not_load_or_run_is_broken():
    model = linear()
    model.graph.node[0].op_type = "Nonsense"
    assert validator().check(model).problem == "broken"
    verdict = validator().check(linear(np.ones((5, 4))))
    assert verdict.problem == "broken"
    assert verdict.damage == math.inf
    verdict = validator().check(Path("/nowhere/at/all.onnx"))
    assert "does not exist" in verdict.reason


def test_what_the_checker_refuses_is_broken():
    model = linear()
    model.graph.node[1].input[0] = "unknown"
    verdict = validator().check(model)
    assert verdict.problem == "broken"
    assert "onnx.checker refuses it" in verdict.reason


def test_a_shape_that_follows_the_data_may_change_unless_the_same_is_promised():
    text = """
    g (float[N, 3] x) => (int64[R, K] y) <float c = {C}>
    { m = Greater(x, c) y = NonZero(m) }
    """
    one, two = parsed(text.replace("C", "0")), parsed(text.replace("C", "0.5"))
    verdict = validator(one, batch_size=50).check(two)
    assert verdict.ok
    assert metrics(verdict).reshaped == 1
    verdict = validator(one, batch_size=50).check(two, Promise.SAME)
    assert verdict.reason == "promised the same outputs, but the shape of 'y' differs"


# Signatures


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda m: m.graph.input[0].CopyFrom(_info("x", 1, [50, 3])),
            "input 'x'.*N, 3",
        ),
        (lambda m: m.graph.output[0].CopyFrom(_info("y", 1, [50, 4])), "output 'y'"),
        (lambda m: m.graph.output[0].CopyFrom(_info("y", 1, ["M", 4])), ""),
        (lambda m: m.graph.output[0].CopyFrom(_info("y", 1, ["N", "M"])), "output 'y'"),
        (
            lambda m: m.graph.output.add().CopyFrom(_info("h", 1, ["N", 4])),
            "'h' is new",
        ),
        (lambda m: m.graph.input.add().CopyFrom(_info("z", 1, ["N"])), "'z' is new"),
    ],
)
def test_the_signature_must_stay(change: Any, problem: str):
    model = linear()
    change(model)
    verdict = validator().check(model)
    assert verdict.ok == (not problem)
    if problem:
        assert verdict.problem == "signature"
        import re

        assert re.search(problem, verdict.reason)


def _info(name: str, kind: int, shape: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def test_a_renamed_or_reordered_output_is_a_broken_signature():
    text = "g (float[N] x) => (float[N] a, float[N] b) { a = Neg(x) b = Abs(x) }"
    other = text.replace("(float[N] a, float[N] b)", "(float[N] b, float[N] a)")
    verdict = validator(parsed(text), X[:, 0]).check(parsed(other))
    assert verdict.reason == "the order of the outputs changed to b, a"
    gone = text.replace(", float[N] b", "")
    verdict = validator(parsed(text), X[:, 0]).check(parsed(gone))
    assert verdict.reason == "output 'b' is gone"


def test_another_type_is_a_broken_signature():
    text = "g (float[N] x) => (TYPE[N] y) { y = Cast<to = NUMBER>(x) }"
    one = text.replace("TYPE", "float").replace("NUMBER", "1")
    two = text.replace("TYPE", "double").replace("NUMBER", "11")
    verdict = validator(parsed(one), X[:, 0]).check(parsed(two))
    assert "'y' (float32 [N]) became 'y' (float64 [N])" in verdict.reason


def test_an_output_shape_that_was_unknown_may_become_known():
    unknown = linear(shapes={"y": [None, 4]})
    assert validator(unknown).check(linear(shapes={"y": [50, 4]}), Promise.CLOSE).ok


# Bytes and latency


def test_a_file_that_grows_is_refused_beyond_a_little():
    judge = validator()
    model = linear()

    def grown(after: int) -> Verdict:
        return judge.check(model, before_bytes=1_000_000, after_bytes=after)

    assert grown(900_000).ok
    assert grown(1_010_000).ok
    verdict = grown(1_010_001)
    assert verdict.problem == "bytes"
    assert verdict.reason == "the file grew from 1,000,000 to 1,010,001 bytes"
    assert verdict.keepable
    assert judge.check(model, before_bytes=100, after_bytes=4000).ok


def test_latency_binds_when_asked():
    judge = validator(budget=Budget(max_latency_ratio=1.05))
    assert judge.check(linear(), latency_ratio=1.04).ok
    verdict = judge.check(linear(), latency_ratio=1.2)
    assert verdict.problem == "latency"
    assert "1.20 of the reference's" in verdict.reason


def test_latency_is_measured_where_the_budget_asks_for_it():
    judge = validator(budget=Budget(max_latency_ratio=1000))
    assert judge.check(linear()).ok


# Sources, samples, reports


def test_files_models_bytes_and_protos_are_judged_alike(tmp_path: Path):
    path = tmp_path / "m.onnx"
    onnx.save(linear(W * 1.5), path)
    judge = validator(linear())
    found = [
        judge.check(source)
        for source in (path, Model.load(path), path.read_bytes(), onnx.load(path))
    ]
    assert len({str(v) for v in found}) == 1
    assert found[0].outputs["y"].sqnr_db < math.inf


def test_random_samples_are_a_smoke_test():
    given = Splits.build(Model.load(linear()))
    verdict = Validator(linear(), given).check(linear(-W))
    assert verdict.ok
    assert verdict.smoke_test
    assert verdict.samples == 4


def test_no_evaluation_samples_is_a_clear_error():
    with pytest.raises(UsageError, match="no evaluation samples"):
        Validator(linear(), Splits())


def test_a_reference_that_cannot_run_on_random_samples_gets_a_hint():
    model = parsed(
        "g (float[N, K] x) => (float[N, 4] y) <float[2, 1] w = {1, 2}> "
        "{ a = MatMul(x, w) b = Concat<axis = 1>(a, a) y = Concat<axis = 1>(b, b) }"
    )
    with pytest.raises(ModelError, match="--shape name=2x128"):
        Validator(model, Splits.build(Model.load(model))).check(model)


def test_whole_feeds_are_judged():
    x = {"x": np.stack([X[:5], X[5:10]])}
    model = linear(shapes={"x": [5, 3], "y": [5, 4]})
    given = splits(model, x)
    assert given.evaluation is not None
    assert given.evaluation.whole
    other = linear(W * 2, shapes={"x": [5, 3], "y": [5, 4]})
    verdict = Validator(model, given, Budget(min_agreement=0.5)).check(other)
    assert metrics(verdict).agreement == 1.0
    assert metrics(verdict).sqnr_db == pytest.approx(0, abs=1e-4)


def test_a_verdict_survives_json():
    judge = validator(labels=LABELS, budget=Budget(max_drop=1))
    for candidate in (linear(), linear(W * 1.5), linear(W * np.nan)):
        verdict = judge.check(candidate)
        data = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
        assert Verdict.from_json(data) == dataclasses.replace(
            verdict, outputs=dict(verdict.outputs)
        )


def test_progress_is_reported():
    seen: list[tuple[int, int, str]] = []
    judge = validator(batch_size=20, progress=lambda *args: seen.append(args))
    judge.check(linear())
    assert seen[:3] == [(1, 3, "reference"), (2, 3, "reference"), (3, 3, "reference")]
    assert seen[-1] == (3, 3, "check")


def test_latency_is_a_multiple_of_the_model_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model that was taught is the reference, and another one is what came.
    def latencies(session: Any, baseline: Any, feed: Any) -> tuple[float, float]:
        (one,), (other,) = session.run(feed).values(), baseline.run(feed).values()
        return 1.0, float(one.ravel()[0] / other.ravel()[0])

    monkeypatch.setattr("onnxshrink.measuring.measure.latencies", latencies)
    taught = linear(2 * W)
    judge = Validator(
        taught,
        splits(taught),
        Budget(max_latency_ratio=1.5),
        timed_against=linear(W),
    )
    verdict = judge.check(taught)
    assert "latency is 2.00 of the reference's, more than 1.50" in verdict.reason


@pytest.mark.parametrize(("times", "ok"), [([2.0, 1.0], True), ([2.0, 1.6], False)])
def test_a_latency_beyond_its_bound_is_measured_once_more(
    times: list[float], ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(times)
    monkeypatch.setattr(Validator, "_latency_ratio", lambda *_: next(measured))
    verdict = validator(budget=Budget(max_latency_ratio=1.5)).check(linear())
    assert verdict.ok == ok
    assert not list(measured)
    assert ok or "latency is 1.60" in verdict.reason


def test_equal_outputs_of_more_axes_say_so():
    text = "g (float[N, 2, 3] x) => (float[N, 2, 3] y) { y = OP(x) }"
    one = parsed(text.replace("OP", "Neg"))
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    assert validator(one, x).check(one).quality() == {"exact": 1.0}
    other = parsed(text.replace("OP", "Abs"))
    assert set(validator(one, x).check(other).quality()) == {"sqnr_db"}
