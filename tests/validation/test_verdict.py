"""Verdicts on given figures; on those of real models: test_validator.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnxshrink.base import Promise
from onnxshrink.measuring.differences import Difference, Seen
from onnxshrink.validation import Budget, MetricChange, OutputMetrics
from onnxshrink.validation.verdict import judge, moved

NOISY = {"y": OutputMetrics(max_abs=0.1, sqnr_db=20, agreement=0.9)}
NAN = {"y": OutputMetrics(nan=3)}
WORSE = MetricChange("top1", 90, 80)
STRICT = Budget(max_drop=1)
SLOW: dict[str, Any] = {"budget": Budget(max_latency_ratio=1.1), "latency_ratio": 1.2}
LARGE: dict[str, Any] = {"before_bytes": 100_000, "after_bytes": 200_000}


@pytest.mark.parametrize(
    ("promise", "outputs", "given", "problem"),
    [
        (Promise.SAME, NOISY, {}, ""),
        (Promise.SAME, NOISY, {"moved": "y moved"}, "same"),
        (Promise.CLOSE, NOISY, {"moved": "y moved"}, ""),
        (Promise.CLOSE, NOISY, {"budget": STRICT, "change": WORSE}, "budget"),
        (Promise.SAME, NOISY, {"budget": STRICT, "change": WORSE}, ""),
        (Promise.SIGNATURE, NOISY, {"budget": STRICT, "change": WORSE}, ""),
        (Promise.CLOSE, NOISY, LARGE, "bytes"),
        (Promise.SAME, NOISY, LARGE, "bytes"),
        (Promise.SIGNATURE, NOISY, LARGE, ""),
        (Promise.CLOSE, NOISY, SLOW, "latency"),
        (Promise.SIGNATURE, NOISY, SLOW, "latency"),
        (Promise.SIGNATURE, NAN, {}, "broken"),
        (Promise.CLOSE, NAN, {"budget": STRICT, "change": WORSE}, "broken"),
    ],
)
def test_what_a_promise_is_held_to(
    promise: Promise, outputs: Any, given: dict[str, Any], problem: str
):
    verdict = judge(promise, outputs, **{"budget": Budget(), **given})
    assert verdict.problem == problem
    assert verdict.ok == (not problem)
    assert (verdict.reason == "ok") == (not problem)
    assert verdict.keepable == (problem in ("", "budget", "bytes", "latency"))
    fits = problem in ("", "bytes")
    assert (verdict.damage <= 1) == fits


def test_damage_is_the_share_of_the_budget_and_a_little_noise():
    change = MetricChange("top1", 90, 89.5)
    verdict = judge(Promise.CLOSE, NOISY, budget=STRICT, change=change)
    # Half of the drop that is allowed; noise of a tenth of the signal.
    assert verdict.noise == pytest.approx(0.1)
    assert verdict.damage == pytest.approx(0.99 * 0.5 + 0.01 * 0.1 / 1.1)
    beyond = judge(Promise.CLOSE, NOISY, budget=STRICT, change=WORSE)
    assert beyond.damage == pytest.approx(10 + 0.01 * 0.1 / 1.1)
    assert judge(Promise.CLOSE, NAN, budget=STRICT).damage == math.inf


def test_figures_for_a_table_are_the_least_of_all_outputs():
    outputs = {
        "a": OutputMetrics(agreement=0.97, sqnr_db=14),
        "b": OutputMetrics(agreement=0.99, sqnr_db=math.inf),
        "c": OutputMetrics(sqnr_db=30),
    }
    verdict = judge(Promise.CLOSE, outputs, budget=Budget(), change=WORSE)
    assert verdict.quality() == {"top1": 80, "agreement": 0.97, "sqnr_db": 14}
    assert judge(Promise.CLOSE, {}, budget=Budget()).quality() == {}


def test_an_exact_model_has_no_ratio_to_show():
    exact = {"y": OutputMetrics(agreement=1.0)}
    assert judge(Promise.CLOSE, exact, budget=Budget()).quality() == {"agreement": 1.0}


def test_a_random_output_makes_no_noise():
    outputs = {**NOISY, "r": OutputMetrics(sqnr_db=-math.inf, note="random")}
    verdict = judge(Promise.CLOSE, outputs, budget=Budget(min_sqnr=10))
    assert verdict.ok
    assert verdict.noise == pytest.approx(0.1)


def test_the_first_problem_is_the_one_that_is_told():
    both = Budget(max_drop=1, max_latency_ratio=1.1)
    verdict = judge(
        Promise.CLOSE, NOISY, budget=both, change=WORSE, latency_ratio=1.2, **LARGE
    )
    assert verdict.problem == "budget"
    verdict = judge(Promise.CLOSE, NOISY, budget=both, latency_ratio=1.2, **LARGE)
    assert verdict.problem == "bytes"


def test_latency_binds_only_where_it_is_limited_and_measured():
    assert judge(Promise.CLOSE, NOISY, budget=Budget(), latency_ratio=9.0).ok
    assert judge(Promise.CLOSE, NOISY, budget=Budget(max_latency_ratio=1.1)).ok


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (None, None, ""),
        (np.zeros(0, np.int64), np.zeros(0, np.int64), ""),
        (np.array([1, 2]), np.array([1, 2]), ""),
        (np.array([1, 2]), np.array([1, 3]), "50.00% of the values of 'y' differ"),
        ([np.array([1.0])], {"a": 1.0}, "'y': list cannot be compared with dict"),
        (np.ones(3, np.float32), np.ones(3, np.float32), ""),
        (np.ones(3, np.float32), np.ones((3, 1), np.float32), "the shape of 'y'"),
        (np.array([np.inf, 1]), np.array([2.0, 1]), "1 values of 'y' are finite"),
        (np.array([1.0, 2.0]), np.array([1.0, 2.1]), "'y' differs by up to 0.1"),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0001]), ""),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0005]), "'y' differs by up to 0.0005"),
        (np.array([1.0, 2.0], np.float16), np.array([1.0, 2.006], np.float16), ""),
    ],
)
def test_the_same_is_float_noise_at_most(before: Any, after: Any, words: str):
    seen, difference = Seen(), Difference(False)
    seen.update("y", before, 1)
    difference.update(before, after, 1)
    said = moved({"y": difference}, {"y": seen}, lambda: {"y": (0.0, math.inf)})
    assert words in said
    assert bool(said) == bool(words)


def test_a_model_that_is_noisy_of_itself_may_move_ten_times_as_far():
    seen, difference = Seen(), Difference(False)
    before, after = np.array([1.0, 2.0]), np.array([1.0, 2.002])
    seen.update("y", before, 1)
    difference.update(before, after, 1)

    def said(error: float, level: float) -> str:
        return moved({"y": difference}, {"y": seen}, lambda: {"y": (error, level)})

    assert not said(2e-4, 80)
    assert said(2e-6, 80)


def test_an_output_that_differs_from_itself_is_not_compared():
    seen, difference = Seen(), Difference(False)
    seen.update("y", np.ones(2), 1)
    seen.stable = False
    difference.update(np.ones(2), np.zeros(2), 1)
    assert not moved({"y": difference}, {"y": seen}, lambda: {"y": (0.0, math.inf)})
