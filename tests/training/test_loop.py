"""The training loop: what it keeps, when it ends, and that it is repeatable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.model import Model
from onnxshrink.training import Optimizer, Sgd, TrainingStep, loop, mse
from onnxshrink.training.loop import (
    Checkpoint,
    Outcome,
    Plan,
    find_rate,
    fit,
    schedule,
)

Array = np.ndarray[Any, Any]

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(22, 3)).astype(np.float32)
WANTED = np.array([2, 0.5, -1], np.float32)


def step_of(optimizer: Optimizer | None = None) -> TrainingStep:
    """Return a step that learns to scale by WANTED, from (1, -2, 3)."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N,3] x) => (float[N,3] y) <float[3] w = {1, -2, 3}> { y = Mul(x, w) }"""
    return TrainingStep(
        Model.load(onnx.parser.parse_model(text)),
        {"x": (4, 3)},
        ["w"],
        lambda ctx, values: mse(ctx, values["y"], values["t"]),
        targets={"t": (np.float32, (4, 3))},
        optimizer=optimizer,
        threads=1,
    )


def feed(positions: Array, random: np.random.Generator) -> Mapping[str, Array]:
    return {"x": X[positions], "t": X[positions] * WANTED}


def distance(weights: Mapping[str, Array]) -> float:
    return float(np.abs(weights["w"] - WANTED).max())


def run(
    step: TrainingStep | None = None, judge: Any = distance, **plan: Any
) -> Outcome:
    settings = {"epochs": 5, "batch": 4, "rate": 0.1, **plan}
    return fit(step or step_of(), feed, len(X), judge, Plan(**settings))


def test_the_rate_rises_and_then_falls_as_a_cosine() -> None:
    shares = [schedule(at, 12, 0.25) for at in range(13)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert shares[6] == pytest.approx(0.75)  # a third of the way: cos 60 degrees
    assert shares[12] == pytest.approx(0)


def test_it_learns() -> None:
    outcome = run(epochs=60)
    np.testing.assert_allclose(outcome.weights["w"], WANTED, atol=1e-2)
    assert outcome.ending == ""
    assert outcome.start == 4.0
    assert outcome.losses[-1] < 1e-3 * outcome.losses[0]


def test_it_learns_at_a_rate_that_it_finds() -> None:
    outcome = run(epochs=60, rate=None, rates=(1e-3, 1e-2, 1e-1, 1.0))
    assert outcome.rate in (1e-1, 1.0)
    np.testing.assert_allclose(outcome.weights["w"], WANTED, atol=2e-2)


def test_the_same_seed_gives_the_same_bits() -> None:
    one, two, other = run(), run(), run(seed=1)
    assert one.weights["w"].tobytes() == two.weights["w"].tobytes()
    assert one.losses == two.losses
    assert one.losses != other.losses


def test_an_epoch_takes_each_sample_once_at_most_in_whole_batches() -> None:
    seen: list[Array] = []

    def watched(positions: Array, random: np.random.Generator) -> Mapping[str, Array]:
        seen.append(positions)
        return feed(positions, random)

    fit(step_of(), watched, len(X), distance, Plan(epochs=2, batch=4, rate=0.1))
    assert [len(positions) for positions in seen] == [4] * 10
    for epoch in (seen[:5], seen[5:]):
        assert len(np.unique(np.concatenate(epoch))) == 20
    assert not np.array_equal(np.concatenate(seen[:5]), np.concatenate(seen[5:]))


def test_looking_for_a_rate_leaves_the_step_as_it_was() -> None:
    step = step_of()
    find_rate(step, feed, len(X), Plan(batch=4, rates=(1e-3, 1e-2)))
    np.testing.assert_array_equal(step.weights["w"], [1, -2, 3])
    assert not any(state.any() for state in step.state.values())
    assert step.count == 0


def test_a_rate_at_which_the_loss_explodes_is_not_chosen() -> None:
    step = step_of(Sgd())
    rates = (1e-3, 1e-1, 1e4)
    assert find_rate(step, feed, len(X), Plan(batch=4, rates=rates)) == 1e-1


def test_no_rate_is_found_where_the_loss_is_never_finite() -> None:
    def huge(positions: Array, random: np.random.Generator) -> Mapping[str, Array]:
        return {"x": X[positions] * np.float32(1e38), "t": X[positions]}

    with pytest.raises(UsageError, match="not finite at any learning rate"):
        find_rate(step_of(), huge, len(X), Plan(batch=4))


def test_the_best_epoch_is_kept_not_the_last() -> None:
    judged = iter([5.0, 4.0, 2.0, 3.0, 3.0, 3.0])
    kept: list[Array] = []

    def judge(weights: Mapping[str, Array]) -> float:
        kept.append(weights["w"])
        return next(judged)

    outcome = run(judge=judge)
    assert (outcome.start, outcome.best, outcome.best_epoch) == (5.0, 2.0, 2)
    assert outcome.judged == (4.0, 2.0, 3.0, 3.0, 3.0)
    np.testing.assert_array_equal(outcome.weights["w"], kept[2])


def test_the_start_is_kept_if_nothing_is_better() -> None:
    outcome = run(judge=lambda weights: 1.0)
    assert outcome.best_epoch == 0
    np.testing.assert_array_equal(outcome.weights["w"], [1, -2, 3])


def test_training_ends_early_when_nothing_gets_better() -> None:
    counter = itertools.count()
    outcome = run(judge=lambda w: float(next(counter)), epochs=30, patience=3)
    assert outcome.ending == "early"
    assert len(outcome.losses) == 3


def test_whatever_is_finite_is_better_than_a_start_that_is_not() -> None:
    judged = itertools.chain([math.nan], itertools.repeat(9.0))
    assert run(judge=lambda w: next(judged)).best_epoch == 1


def test_an_explosion_in_the_first_steps_is_one_too() -> None:
    # A loss of 1e10 in one of so few steps must not pass for what is usual.
    outcome = run(step_of(Sgd()), rate=1e5, epochs=1, warmup=0.0)
    assert outcome.ending == "diverged"
    assert outcome.best_epoch == 0


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_training_that_explodes_ends_with_the_best_so_far(rate: float) -> None:
    outcome = run(step_of(Sgd()), rate=rate, epochs=20, warmup=0.0)
    assert outcome.ending == "diverged"
    assert outcome.best <= outcome.start
    assert np.isfinite(outcome.weights["w"]).all()


def test_ctrl_c_keeps_the_best_so_far() -> None:
    def progress(done: int, total: int, what: str) -> None:
        if done == 33:
            raise KeyboardInterrupt

    plan = Plan(epochs=50, batch=4, rate=0.05)
    outcome = fit(step_of(), feed, len(X), distance, plan, progress)
    assert outcome.ending == "interrupted"
    assert len(outcome.losses) == 6
    assert outcome.best < outcome.start
    assert distance(outcome.weights) == outcome.best


class KilledError(BaseException):
    """Ends a training as a signal would: nothing catches it."""


def noisy(positions: Array, random: np.random.Generator) -> Mapping[str, Array]:
    x = X[positions] + random.normal(0, 0.1, (4, 3)).astype(np.float32)
    return {"x": x, "t": x * WANTED}


def kept(path: Path, stop: int | None, key: str = "k", **plan: Any) -> Outcome:
    """Train with state kept after every step; die in step ``stop``."""

    def progress(done: int, total: int, what: str) -> None:
        if done == stop and what.startswith("epoch"):
            raise KilledError

    settings = {"epochs": 6, "batch": 4, "rate": None, "rates": (1e-2, 1e-1), **plan}
    checkpoint = Checkpoint(path=path, key=key, seconds=0.0)
    return fit(
        step_of(), noisy, len(X), distance, Plan(**settings), progress, checkpoint
    )


def same(one: Outcome, two: Outcome) -> bool:
    weights = one.weights["w"].tobytes() == two.weights["w"].tobytes()
    others = [{k: v for k, v in vars(o).items() if k != "weights"} for o in (one, two)]
    return weights and others[0] == others[1]


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 13, 30])
def test_a_killed_training_goes_on_with_the_same_bits(
    tmp_path: Path, stop: int
) -> None:
    whole = kept(tmp_path / "whole", None)
    with pytest.raises(KilledError):
        kept(tmp_path / "state", stop)
    steps: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        steps.append(done)

    plan = Plan(epochs=6, batch=4, rates=(1e-2, 1e-1))
    checkpoint = Checkpoint(path=tmp_path / "state", key="k", seconds=0.0)
    step = step_of()
    resumed = fit(step, noisy, len(X), distance, plan, progress, checkpoint)
    assert same(whole, resumed)
    # The step that was killed is done again, and no other; no rate is looked for.
    assert steps == list(range(stop, 31))
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


def test_a_training_that_lost_patience_is_not_taken_up_again(tmp_path: Path) -> None:
    judged = itertools.count()
    plan = Plan(epochs=9, batch=4, rate=0.1, patience=2)
    checkpoint = Checkpoint(path=tmp_path / "state", key="k", seconds=0.0)

    def judge(weights: Mapping[str, Array]) -> float:
        return float(next(judged))

    outcomes = [
        fit(step_of(), feed, len(X), judge, plan, None, checkpoint) for _ in range(2)
    ]
    assert same(*outcomes)
    assert outcomes[1].ending == "early"
    assert next(judged) == 3  # the start and two epochs, once


@pytest.mark.parametrize("change", [{"key": "other"}, {"seed": 1}, {"epochs": 7}])
def test_state_of_another_training_is_ignored(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(KilledError):
        kept(tmp_path / "state", 13)
    found = kept(tmp_path / "state", None, **change)
    assert same(found, kept(tmp_path / "fresh", None, **change))


def test_state_of_another_format_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "STATE_FORMAT", loop.STATE_FORMAT - 1)
        with pytest.raises(KilledError):
            kept(tmp_path / "state", 13)
    steps: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        steps.append(done)

    plan = Plan(epochs=6, batch=4, rates=(1e-2, 1e-1))
    checkpoint = Checkpoint(path=tmp_path / "state", key="k", seconds=0.0)
    fit(step_of(), noisy, len(X), distance, plan, progress, checkpoint)
    assert len(steps) > 30  # from the beginning, the search of a rate included


@pytest.mark.parametrize("size", [0, 40, 1000])
def test_state_that_cannot_be_read_is_ignored(tmp_path: Path, size: int) -> None:
    whole = kept(tmp_path / "state", None)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:size])
    assert same(whole, kept(tmp_path / "state", None))


def test_state_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot keep the state of training"):
        kept(tmp_path / "no" / "state", None)


def test_a_loss_that_still_falls_is_seen() -> None:
    assert run(rate=0.01, epochs=10).is_falling
    assert not run(rate=0.3, epochs=200, patience=200).is_falling


def test_progress_tells_loss_and_judgement() -> None:
    said: list[tuple[int, int, str]] = []
    plan = Plan(epochs=2, batch=4, rate=0.1)
    fit(step_of(), feed, len(X), distance, plan, lambda *words: said.append(words))
    assert [done for done, _, _ in said] == list(range(1, 11))
    assert {total for _, total, _ in said} == {10}
    assert said[0][2].startswith("epoch 1, loss ")
    assert said[0][2].endswith("held out 4.0000")


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="22 samples do not fill a batch of 32"):
        run(batch=32)


def test_an_error_that_is_not_the_loss_is_not_hidden() -> None:
    def wrong(positions: Array, random: np.random.Generator) -> Mapping[str, Array]:
        return {"x": X[:2], "t": X[:2]}

    with pytest.raises(ModelError, match=r"was given float32 \[2, 3\]"):
        fit(step_of(), wrong, len(X), distance, Plan(batch=4, rate=0.1))


@pytest.mark.parametrize(
    "plan",
    [
        {"epochs": 0},
        {"batch": 0},
        {"patience": 0},
        {"warmup": 1.0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"rates": (0.1, -1.0)},
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(plan)).removesuffix("s")):
        Plan(**plan)
