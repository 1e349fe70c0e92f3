"""Optimal Brain Surgeon against exhaustive search and plain least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from onnxshrink.solvers import obs
from onnxshrink.solvers.magnitude import Pattern
from onnxshrink.solvers.obs import (
    VALUE_BITS,
    Curvature,
    Removal,
    allocate,
    pattern_mask,
    place_bits,
    refit,
    removal_order,
    remove_entries,
)

Array = np.ndarray[Any, Any]


def _inputs(rows: int, inputs: int, seed: int = 0) -> Array:
    """Make inputs that depend on each other, as activations do."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((rows, inputs)) @ random.standard_normal(
        (inputs, inputs)
    )
    return mixed.astype(np.float32)


def _error(before: Array, after: Array, x: Array) -> float:
    return float(np.square(x.astype(np.float64) @ (before - after)).sum())


def test_obs_of_one_weight_is_the_best_of_all_single_removals() -> None:
    random = np.random.default_rng(4)
    weight = random.standard_normal((1, 1, 5))
    x = _inputs(50, 5).astype(np.float64)
    gram = (x.T @ x)[None]
    curvature = Curvature.of(gram, None, len(x))
    first = int(removal_order(weight, curvature).rank.argmin())
    losses = []
    for gone in range(5):
        keep = np.ones(weight.shape, np.bool_)
        keep[..., gone] = False
        # Least squares with the damping written as further rows of data.
        damping = np.diagonal(curvature.matrix[0]) - np.diagonal(gram[0]) / len(x)
        rows = np.vstack([x / np.sqrt(len(x)), np.diag(np.sqrt(damping))])
        best, *_ = np.linalg.lstsq(rows[:, keep[0, 0]], rows @ weight[0, 0])
        values = np.zeros(5)
        values[keep[0, 0]] = best
        assert np.allclose(refit(weight, curvature, keep), values, atol=1e-9)
        losses.append(np.square(rows @ (values - weight[0, 0])).sum())
    assert first == int(np.argmin(losses))


def test_obs_is_close_to_the_best_subset_of_all() -> None:
    random = np.random.default_rng(5)
    weight = random.standard_normal((1, 1, 8))
    x = _inputs(60, 8)
    curvature = Curvature.of((x.T @ x).astype(np.float64)[None], None, len(x))

    def loss(keep: Array) -> float:
        change = (refit(weight, curvature, keep) - weight)[0, 0]
        return float(change @ curvature.matrix[0] @ change)

    found = loss(removal_order(weight, curvature).rank >= 5)
    subsets = []
    for kept in itertools.combinations(range(8), 3):
        keep = np.zeros(weight.shape, np.bool_)
        keep[..., list(kept)] = True
        subsets.append(loss(keep))
    subsets.sort()
    assert subsets[0] - 1e-9 <= found <= subsets[5]


def test_conjugate_gradients_agree_with_the_exact_refit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(6)
    weight = random.standard_normal((2, 5, 12))
    x = random.standard_normal((2, 300, 12))
    curvature = Curvature.of(np.swapaxes(x, 1, 2) @ x, None, 300)
    keep = random.random(weight.shape) < 0.5
    exact = refit(weight, curvature, keep)
    monkeypatch.setattr(obs, "EXACT_INPUTS", 0)
    assert np.allclose(refit(weight, curvature, keep), exact, atol=1e-8)


def test_sparsegpt_of_n_to_m_reduces_the_error_of_magnitude() -> None:
    weight = np.random.default_rng(8).standard_normal((1, 16, 40))
    x = _inputs(300, 40)
    gram = (x.T @ x).astype(np.float64)[None]
    curvature = Curvature.of(gram, None, len(x))
    pattern = Pattern(keep=2, of=4)
    mask = pattern_mask(weight, curvature, pattern)
    best = refit(weight, curvature, ~mask)
    plain = np.where(pattern.drop(np.square(weight)), 0, weight)
    masked = refit(weight, curvature, plain != 0)
    errors = [_error(weight[0].T, w[0].T, x) for w in (best, masked, plain)]
    assert errors[0] < errors[1] < errors[2]


def test_zeros_go_where_the_errors_grow_least() -> None:
    flat = Removal(
        np.zeros((1, 1, 10), np.int32), np.array([0, 10]), np.array([0, 0.1])
    )
    bent = Removal(
        np.zeros((1, 1, 10), np.int32), np.array([0, 5, 10]), np.array([0, 0.01, 1.0])
    )
    assert allocate([flat, bent], [3, 5, 12, 20]) == [[0, 3], [0, 5], [7, 5], [10, 10]]


def test_curvature_around_a_mean_is_the_covariance() -> None:
    x = _inputs(300, 6).astype(np.float64) + 5.0
    gram, mean = (x.T @ x)[None], x.mean(axis=0)[None]
    covariance = np.cov(x.T, bias=True)
    found = Curvature.of(gram, mean, len(x)).matrix[0]
    damping = obs.DAMPING * covariance.trace() / 6
    assert np.allclose(found, covariance + damping * np.eye(6), rtol=1e-9)
    raw = Curvature.of(gram, None, len(x)).matrix[0]
    damping = obs.DAMPING * gram[0].trace() / len(x) / 6
    assert np.allclose(raw, gram[0] / len(x) + damping * np.eye(6), rtol=1e-9)


def test_a_large_input_that_never_varies_goes_first_where_a_bias_holds_its_part() -> (
    None
):
    x = np.random.default_rng(9).standard_normal((200, 4))
    x[:, 2] = 50.0
    gram, mean = (x.T @ x)[None], x.mean(axis=0)[None]
    weight = np.ones((1, 3, 4))
    order = removal_order(weight, Curvature.of(gram, mean, len(x))).rank
    assert set(np.argwhere(order < 3)[:, 2]) == {2}
    order = removal_order(weight, Curvature.of(gram, None, len(x))).rank
    assert 2 not in np.argwhere(order < 3)[:, 2]


def test_removal_moves_the_outputs_no_more_than_least_squares_with_a_bias() -> None:
    x = _inputs(400, 7).astype(np.float64) + 3.0
    gram, mean = (x.T @ x)[None], x.mean(axis=0)[None]
    weight = np.random.default_rng(10).standard_normal((1, 2, 7))
    gone = np.zeros(weight.shape, np.bool_)
    gone[0, 0, :3], gone[0, 1, 4:] = True, True
    new, shift = remove_entries(weight, gone, Curvature.of(gram, mean, len(x)), mean)
    assert shift is not None
    assert not new[gone].any()
    before = x @ weight[0].T
    after = x @ new[0].T + shift[0]
    assert np.allclose(after.mean(axis=0), before.mean(axis=0))
    for row in range(2):
        columns = np.c_[x[:, ~gone[0, row]], np.ones(len(x))]
        best = columns @ np.linalg.lstsq(columns, before[:, row])[0]
        least = np.square(best - before[:, row]).sum()
        # The damping of one percent keeps it from being quite the best.
        assert np.square(after[:, row] - before[:, row]).sum() < 1.05 * least


def test_half_precision_that_overflows_keeps_the_values_it_had() -> None:
    weight = np.array([[[6e4, 6e4]]], np.float16)
    x = np.array([[1.0, 1.0], [1.0, 1.001]])
    curvature = Curvature.of((x.T @ x)[None], None, 2)
    gone = np.array([[[True, False]]])
    new, shift = remove_entries(weight, gone, curvature)
    assert shift is None
    assert new.dtype == np.float16
    assert new.tolist() == [[[0.0, weight[0, 0, 1]]]]


def test_what_costs_least_for_a_bit_goes_first() -> None:
    """An entry alone in its row and column takes more bits than one among others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 40))
    scale = np.exp(rng.normal(0, 1, (30, 1)) + rng.normal(0, 1, (1, 40)))
    weights = (rng.standard_normal((30, 40)) * scale)[None]
    curvature = Curvature.of((x.T @ x)[None], None, len(x))
    count = 1000
    bits, errors = [], []
    for by_bits in (False, True):
        keep = removal_order(weights, curvature, by_bits=by_bits).rank >= count
        bits.append(float(place_bits(keep)[keep].sum()))
        new, _ = remove_entries(weights, ~keep, curvature)
        errors.append(_error(weights[0].T, new[0].T, x))
    assert bits[1] < 0.98 * bits[0]
    assert errors[1] < 1.1 * errors[0]


def test_bits_of_a_place_are_those_on_paper() -> None:
    keep = np.zeros((1, 2, 4), np.bool_)
    keep[0, 0] = True
    keep[0, 1, 0] = True
    # 5 of 8 stay; rows 1 and 1/4, columns 1, 1/2, 1/2, 1/2.
    found = place_bits(keep)[0] - VALUE_BITS
    assert found[0, 0] == 0
    assert found[0, 1] == pytest.approx(-np.log2(1 * 0.5 / 0.625))
    assert found[1, 0] == pytest.approx(-np.log2(0.25 * 1 / 0.625))
