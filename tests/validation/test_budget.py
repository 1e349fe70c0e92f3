"""Budgets: limits that can be meant, and the share of them that is used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from onnxshrink.errors import UsageError
from onnxshrink.samples import Samples, Splits
from onnxshrink.validation import Budget, MetricChange, OutputMetrics, grown
from onnxshrink.validation.budget import amplitude


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_drop": -1}, "--max-drop is at least 0"),
        ({"max_drop": math.nan}, "--max-drop is at least 0"),
        ({"min_agreement": 98}, r"from 0 to 1, not 98; did you mean 0\.98"),
        ({"min_agreement": -0.1}, "from 0 to 1"),
        ({"min_sqnr": math.inf}, "a number of dB"),
        ({"max_latency_ratio": 0}, "latency ratio"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused(limits: Any, message: str):
    with pytest.raises(UsageError, match=message):
        Budget(**limits)


@pytest.mark.parametrize(
    ("drop", "share", "words"),
    [
        (0.05, 0.5, ""),
        (0.1, 1.0, ""),
        (0.2, 2.0, "top1 went from 90 to 89.8, 0.2 worse where 0.1 is allowed"),
        (-3.0, 0.0, ""),
    ],
)
def test_a_drop_uses_its_share_of_what_is_allowed(
    drop: float, share: float, words: str
):
    change = MetricChange("top1", 90, 90 - drop)
    assert Budget(max_drop=0.1).used({}, change) == (pytest.approx(share), words)


def test_an_error_that_falls_is_no_drop():
    better = MetricChange("mse", 0.3, 0.2, lower_is_better=True)
    worse = MetricChange("mse", 0.3, 0.5, lower_is_better=True)
    assert Budget(max_drop=0.1).used({}, better) == (0.0, "")
    assert Budget(max_drop=0.1).used({}, worse)[0] == pytest.approx(2)


def test_the_limit_that_is_used_most_is_named():
    outputs = {
        "a": OutputMetrics(agreement=0.97, sqnr_db=14),
        "b": OutputMetrics(agreement=0.90, sqnr_db=math.inf),
        "random": OutputMetrics(agreement=0.0, sqnr_db=-math.inf, note="random"),
    }
    share, words = Budget(min_agreement=0.98, min_sqnr=20).used(outputs, None)
    assert share == pytest.approx(5)  # 10 % of samples changed where 2 % may
    assert words == "agreement of 'b' is 0.9000, less than 0.98"
    share, words = Budget(min_sqnr=20).used(outputs, None)
    assert share == pytest.approx(10 ** (6 / 20))
    assert words == "SQNR of 'a' is 14.0 dB, less than 20"
    assert Budget().used(outputs, None) == (0.0, "")


def test_what_nothing_measured_uses_nothing_up():
    silent = {"y": OutputMetrics(sqnr_db=3)}
    everything = Budget(max_drop=0, min_agreement=1.0)
    assert everything.used(silent, None) == (0.0, "")
    drop = MetricChange("top1", 90, 10)
    assert Budget(min_agreement=0.5).used(silent, drop) == (0.0, "")


@pytest.mark.parametrize("agreement", [-0.5, 101, 1.5])
def test_a_percentage_is_suggested_only_where_one_was_meant(agreement: float):
    with pytest.raises(UsageError) as caught:
        Budget(min_agreement=agreement)
    assert ("did you mean" in str(caught.value)) == (1 < agreement <= 100)


def test_limits_that_can_be_meant_are_taken():
    budget = Budget(max_drop=0, min_agreement=1, min_sqnr=-3, max_latency_ratio=0.5)
    assert budget.to_json() == {
        "max_drop": 0,
        "min_agreement": 1,
        "min_sqnr": -3,
        "max_latency_ratio": 0.5,
        "max_bytes": None,
        "automatic": False,
    }


@pytest.mark.parametrize(
    ("random", "labels", "limits"),
    [
        (True, False, (None, None, None)),
        (False, False, (None, 0.98, 20.0)),
        (False, True, (1.0, 0.98, 20.0)),
    ],
)
def test_the_default_asks_for_what_may_be_measured(
    random: bool, labels: bool, limits: tuple[float | None, ...]
):
    data = {"x": np.zeros((3, 2)), **({"labels": np.zeros(3)} if labels else {})}
    splits = Splits(evaluation=Samples.of(data), random=random)
    found = Budget.default(splits)
    assert found.automatic
    assert (found.max_drop, found.min_agreement, found.min_sqnr) == limits


def test_nothing_allowed_is_used_up_by_anything():
    drop = MetricChange("top1", 90, 89.99)
    share, words = Budget(max_drop=0).used({}, drop)
    assert share > 1
    assert words


def test_amplitudes_are_those_of_the_decibels():
    assert amplitude(20) == pytest.approx(0.1)
    assert amplitude(math.inf) == 0
    assert amplitude(-math.inf) == math.inf


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (1_000_000, 1_010_000, ""),
        (1_000_000, 1_010_001, "the file grew from 1,000,000 to 1,010,001 bytes"),
        (100, 4196, ""),  # nodes and metadata of a tiny model
        (100, 4197, "the file grew from 100 to 4,197 bytes"),
        (None, 100, ""),
        (100, None, ""),
    ],
)
def test_a_file_may_grow_by_a_little(before: Any, after: Any, problem: str):
    assert grown(before, after) == problem
