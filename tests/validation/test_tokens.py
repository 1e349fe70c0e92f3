"""Perplexity and agreement of language models: which positions count, what bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from scipy.special import log_softmax

from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing.decoders import decoder
from onnxshrink.validation import Budget
from onnxshrink.validation.tokens import tokens_of
from onnxshrink.validation.validator import Validator

Array = np.ndarray[Any, Any]
IDS = np.random.default_rng(0).integers(0, 500, (6, 10))


def feeds(past: int = 0) -> dict[str, Array]:
    """Six samples, the last with three positions of padding; with a past if asked."""
    if not past:
        return {"input_ids": IDS}
    mask = np.ones((6, past + 10), np.int64)
    mask[5, -3:] = 0
    draw = np.random.default_rng(1)
    found = {"input_ids": IDS, "attention_mask": mask}
    for layer in range(2):
        for kind in ("key", "value"):
            shape = (6, 2, past, 16)
            name = f"past_key_values.{layer}.{kind}"
            found[name] = draw.normal(size=shape).astype(np.float32)
    return found


def told(proto: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """Let the model continue the first token of each sample, so that it knows it."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    ids = feed["input_ids"].copy()
    for at in range(ids.shape[1] - 1):
        logits = session.run(["logits"], {**feed, "input_ids": ids})[0]
        ids[:, at + 1] = logits[:, at].argsort(axis=-1)[:, -2]
    return {**feed, "input_ids": ids}


def judge(proto: onnx.ModelProto, feed: dict[str, Array], **options: Any) -> Validator:
    samples = Samples.of(feed).bind(Model.load(proto).inputs)
    budget = options.pop("budget", None)
    return Validator(proto, Splits(evaluation=samples), budget, **options)


def run(proto: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return np.asarray(session.run(["logits"], feed)[0])


def changed(proto: onnx.ModelProto, name: str, noise: float) -> onnx.ModelProto:
    """Add noise to a weight."""
    found = onnx.ModelProto.FromString(proto.SerializeToString())
    for tensor in found.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor)
            draw = np.random.default_rng(3).normal(0, noise, value.shape)
            new = (value + draw).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(new, name))
    return found


def perplexity(logits: Array, ids: Array, real: Array) -> float:
    losses = []
    for row, tokens, known in zip(logits, ids, real, strict=True):
        for at in range(len(tokens) - 1):
            if known[at] and known[at + 1]:
                losses.append(-log_softmax(row[at].astype(float))[tokens[at + 1]])
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize("past", [0, 4])
def test_perplexity_is_chosen_and_counts_what_a_mask_leaves(past: int) -> None:
    proto = decoder(past=bool(past))
    feed = told(proto, feeds(past))
    ids = feed["input_ids"]
    real = np.ones(IDS.shape, bool)
    if past:
        real[5, -3:] = False
    validator = judge(proto, feed)
    expected = perplexity(run(proto, feed), ids, real)
    assert validator.reference_metric() == {"perplexity": pytest.approx(expected)}
    assert validator.budget.max_drop == pytest.approx(0.05 * expected)
    other = changed(proto, "layers.0.up.weight", 0.05)
    verdict = validator.check(other)
    wanted, found = run(proto, feed), run(other, feed)
    assert verdict.metric is not None
    assert verdict.metric.after == pytest.approx(perplexity(found, ids, real))
    same = wanted.argmax(-1)[real] == found.argmax(-1)[real]
    assert 0 < same.mean() < 1
    assert verdict.outputs["logits"].agreement == pytest.approx(same.mean())
    noise = np.square(wanted - found)[real].sum()
    sqnr = 10 * np.log10(np.square(wanted)[real].sum() / noise)
    assert verdict.outputs["logits"].sqnr_db == pytest.approx(sqnr, abs=0.01)


def test_next_token_is_the_share_of_positions_that_agree() -> None:
    proto = decoder()
    other = changed(proto, "layers.1.down.weight", 0.2)
    budget = Budget(max_drop=0.1)
    validator = judge(proto, feeds(), metric="next-token", budget=budget)
    verdict = validator.check(other)
    wanted, found = run(proto, feeds()), run(other, feeds())
    same = 100 * (wanted.argmax(-1) == found.argmax(-1)).mean()
    assert verdict.metric is not None
    assert (verdict.metric.before, verdict.metric.after) == (100, pytest.approx(same))
    assert "next-token went from 100" in verdict.reason
    assert validator.check(proto).ok


def test_limits_of_perplexity_and_agreement_bind() -> None:
    proto = decoder()
    feed = told(proto, feeds())
    other = changed(proto, "layers.1.down.weight", 0.5)
    assert "perplexity" in judge(proto, feed).check(other).reason
    verdict = judge(proto, feed, budget=Budget(max_drop=0.5)).check(other)
    assert "perplexity" in verdict.reason
    verdict = judge(proto, feed, budget=Budget(min_agreement=0.99)).check(other)
    assert "agreement of 'logits'" in verdict.reason


def test_state_is_bounded_only_if_it_is_asked_for() -> None:
    proto, feed = decoder(past=True), feeds(4)
    other = changed(proto, "layers.1.v.weight", 0.02)
    loose = {"budget": Budget(min_sqnr=20)}
    tight = {"budget": Budget(min_sqnr=60)}
    assert judge(proto, feed, **loose).check(other).ok
    assert "'logits'" in judge(proto, feed, **tight).check(other).reason
    verdict = judge(proto, feed, outputs=["present.1.value"], **tight).check(other)
    assert "'present.1.value'" in verdict.reason
    assert judge(proto, feed, outputs=["present.0.*"], **tight).check(other).ok
    with pytest.raises(UsageError, match=r"no output is called 'logit'.*logits"):
        judge(proto, feed, outputs=["logit"], **tight).check(other)


def test_text_that_the_model_does_not_know_falls_back_to_decibels() -> None:
    proto = decoder()
    validator = judge(proto, feeds())
    assert validator.reference_metric() == {}
    other = changed(proto, "layers.1.down.weight", 0.5)
    assert "SQNR of 'logits'" in validator.check(other).reason


def test_one_token_a_sample_falls_back_to_decibels() -> None:
    proto = decoder()
    feed = {"input_ids": IDS[:, :1]}
    validator = judge(proto, feed)
    assert validator.reference_metric() == {}
    other = changed(proto, "layers.1.down.weight", 0.5)
    assert "SQNR of 'logits'" in validator.check(other).reason
    with pytest.raises(UsageError, match="perplexity needs samples of two tokens"):
        judge(proto, feed, metric="perplexity").check(proto)


def test_a_model_that_looks_ahead_has_no_perplexity() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    g (int64[N, T] input_ids) => (float[N, T, 500] logits)
    <int64[1] one = {1}>
    { a = Gather(w, input_ids) s = ReduceMean<axes = [1]>(a) logits = Add(a, s) }
    """
    proto = onnx.parser.parse_model(text)
    table = np.random.default_rng(0).normal(size=(500, 500)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(table, "w"))
    validator = judge(proto, feeds())
    assert validator.reference_metric() == {}
    assert validator.check(proto).outputs["logits"].agreement == 1
    with pytest.raises(UsageError, match="tokens behind them"):
        judge(proto, feeds(), metric="perplexity").check(proto)


def test_hidden_states_are_no_logits() -> None:
    feed = {"input_ids": IDS % 8}
    value = np.zeros((6, 10, 64), np.float32)
    assert tokens_of(feed, {"last_hidden_state": value}, lambda _: {}) is None
    assert tokens_of({"input_ids": IDS}, {"y": value}, lambda _: {}) is None
    text = '<ir_version: 9, opset_import: ["" : 17]> g (float[N, 3] x) => '
    proto = onnx.parser.parse_model(text + "(float[N, 3] y) { y = Relu(x) }")
    validator = judge(proto, {"x": np.ones((4, 3), np.float32)}, metric="next-token")
    with pytest.raises(UsageError, match="next-token needs token ids"):
        validator.check(proto)
