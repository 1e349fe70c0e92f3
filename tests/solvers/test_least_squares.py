"""Least squares of a layer's outputs, against independent references."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.solvers import decompose
from onnxshrink.solvers.least_squares import (
    Factor,
    FactorProblem,
    RegressionSums,
    ScaleProblem,
    Solution,
    WeightProblem,
    compose,
    solve,
)

Array = np.ndarray[Any, Any]


def dense_of(factors: list[Array]) -> Array:
    """Return the product as [outputs, inputs * taps], tap by tap."""
    taps = np.broadcast_shapes(*(factor.shape[:-2] for factor in factors))
    wide = [np.broadcast_to(f, (*taps, *f.shape[-2:])) for f in factors]
    found = np.zeros((wide[-1].shape[-2], wide[0].shape[-1], *taps))
    for tap in np.ndindex(*taps):
        product = wide[0][tap]
        for factor in wide[1:]:
            product = factor[tap] @ product
        found[(slice(None), slice(None), *tap)] = product
    return found.reshape(len(found), -1)


def full(values: Array) -> Factor:
    return Factor(values, np.ones(values.shape, np.bool_))


def depthwise(values: Array) -> Factor:
    """Return [*taps, channels] as matrices with zeros that stay."""
    channels = values.shape[-1]
    made = np.zeros((*values.shape, channels))
    made[..., np.arange(channels), np.arange(channels)] = values
    return Factor(made, np.broadcast_to(np.eye(channels, dtype=bool), made.shape))


def sums_of(x: Array, now: Array, wanted: Array) -> RegressionSums:
    sums = RegressionSums()
    sums.add(x[None], now[None], wanted[None])
    return sums


def solved(
    factors: list[Factor], x: Array, wanted: Array, *, shift: bool = False, ridge: float
) -> Solution:
    """Fit factors to all rows, and judge them by the same."""
    now = x @ dense_of([factor.values for factor in factors]).T
    sums = sums_of(x, now, wanted)
    return solve(
        FactorProblem(
            fit=sums, held=sums, shift=shift, factors=tuple(factors), ridge=ridge
        )
    )


def inputs(seed: int, rows: int, count: int) -> Array:
    """Return inputs that depend on each other, some strong and some weak."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(count, count)) * np.linspace(0.05, 1, count)
    return np.asarray(random.normal(size=(rows, count)) @ mix)


# --- several factors ------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_two_matrices_reach_the_best_product_of_their_rank(shift: bool) -> None:
    x = inputs(0, 2000, 24) + (3.0 if shift else 0.0)
    random = np.random.default_rng(1)
    target = random.normal(size=(20, 24))
    wanted = x @ target.T + (random.normal(size=20) if shift else 0.0)
    u, s, v = np.linalg.svd(target)
    start = [full(s[:5, None] * v[:5]), full(u[:, :5])]

    found = solved(start, x, wanted, shift=shift, ridge=0.0)

    # Reduced-rank regression (Izenman 1975): the SVD of the fitted outputs.
    apart = x - x.mean(0) if shift else x
    energies = np.linalg.svd(apart @ target.T, compute_uv=False) ** 2
    best = energies[5:].sum() / len(x)
    spread = wanted.var(axis=0).sum()
    assert found.before * spread > 1.3 * best
    assert found.after * spread == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker"])
def test_kernels_are_fitted_as_well_as_by_another_solver(form: decompose.Form) -> None:
    random = np.random.default_rng(2)
    kernel = random.normal(size=(12, 10, 3, 3))
    x = inputs(3, 1500, 90)
    make: Any = getattr(decompose, form)
    ranks = [max(2, rank // 3) for rank in decompose.full_ranks(form, kernel.shape)]
    chain = make(kernel, tuple(ranks)) if form == "tucker" else make(kernel, *ranks)
    factors = [full(np.moveaxis(k, (0, 1), (-2, -1)).copy()) for k in chain.kernels]
    wanted = x @ kernel.reshape(12, -1).T

    found = solved(factors, x, wanted, ridge=0.0)

    moment = x.T @ x / len(x)
    other = decompose.refit(kernel, chain, moment, sweeps=6)
    theirs = decompose.error(kernel, other, moment)
    assert found.after < found.before
    assert found.after * wanted.var(axis=0).sum() < 1.1 * theirs


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("first", ["depthwise", "pointwise"])
def test_separable_branches_are_fitted_and_stay_separable(
    first: str, branches: int
) -> None:
    random = np.random.default_rng(4)
    kernel = random.normal(size=(8, 8, 3, 3))
    x = inputs(5, 1000, 72)
    depth = [depthwise(random.normal(size=(3, 3, 8))) for _ in range(branches)]
    point = [random.normal(size=(1, 1, 8, 8)) for _ in range(branches)]
    if first == "depthwise":
        factors = [
            Factor(
                np.concatenate([d.values for d in depth], -2),
                np.concatenate([d.free for d in depth], -2),
            ),
            full(np.concatenate(point, -1)),
        ]
    else:
        factors = [
            full(np.concatenate(point, -2)),
            Factor(
                np.concatenate([d.values for d in depth], -1),
                np.concatenate([d.free for d in depth], -1),
            ),
        ]
    found = solved(factors, x, x @ kernel.reshape(8, -1).T, ridge=0.0)

    assert found.after < 0.7 * min(found.before, 1.0)
    for factor, values in zip(factors, found.values, strict=True):
        assert (values[~factor.free] == 0).all()
    again = [Factor(v, f.free) for v, f in zip(found.values, factors, strict=True)]
    now = x @ dense_of([factor.values for factor in again]).T
    missing = x @ kernel.reshape(8, -1).T - now
    spread = (x @ kernel.reshape(8, -1).T).var(axis=0).sum()
    np.testing.assert_allclose(
        np.square(missing).sum(1).mean() / spread, found.after, rtol=1e-3
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    taps=st.lists(st.sampled_from([(1, 1), (3, 1), (1, 2)]), min_size=3, max_size=3),
    density=st.floats(0.3, 1.0),
    ridge=st.sampled_from([0.0, 0.1]),
    shift=st.booleans(),
)
def test_no_round_makes_the_error_larger_and_zeros_stay(
    seed: int,
    sizes: list[int],
    taps: list[tuple[int, int]],
    density: float,
    ridge: float,
    shift: bool,
) -> None:
    random = np.random.default_rng(seed)
    used: set[int] = set()
    factors = []
    for number, (few, many) in enumerate(pairwise(sizes)):
        own = [1, 1]
        for axis, size in enumerate(taps[number]):
            if size > 1 and axis not in used:
                own[axis] = size
                used.add(axis)
        values = random.normal(size=(*own, many, few))
        free = random.random(values.shape) < density
        factors.append(Factor(np.where(free, values, 0.0), free))
    dense = dense_of([factor.values for factor in factors])
    x = inputs(seed, 60, dense.shape[1]) + 1
    wanted = x @ random.normal(size=dense.shape).T

    found = solved(factors, x, wanted, shift=shift, ridge=ridge)

    assert found.after <= found.before
    if found.values is not None:
        for factor, values in zip(factors, found.values, strict=True):
            assert values.shape == factor.values.shape
            assert (values[~factor.free] == 0).all()


def test_the_ridge_pulls_factors_back_to_where_they_began() -> None:
    x = np.tile([[1.0], [-1.0]], (10, 1))
    one = full(np.ones((1, 1)))
    sums = sums_of(x, x, 4 * x)
    problem = FactorProblem(
        fit=sums, held=sums, shift=False, factors=(one, one), ridge=1.0
    )
    products = [(c.values[0] * c.values[1]).item() for c in problem.candidates()]
    # The last factor: 2 d = 3. The first: 2 * 2.5^2 d = 2.5 * 1.5.
    assert products[0] == pytest.approx(2.5 * 1.3)
    # Then, with a = 1.3: 2 a^2 d = a (4 - 3.25) - 1.5 a^2, and so on from b.
    assert products[-1] < products[0]


def test_the_factor_that_is_free_is_fitted_to_one_that_is_not() -> None:
    random = np.random.default_rng(6)
    one, two = random.normal(size=(4, 9)), random.normal(size=(7, 4))
    x = inputs(7, 300, 9)
    wanted = x @ random.normal(size=(7, 9)).T
    fixed = Factor(one, np.zeros(one.shape, np.bool_))

    found = solved([fixed, full(two)], x, wanted, ridge=0.0)

    np.testing.assert_array_equal(found.values[0], one)
    best = np.linalg.lstsq(x @ one.T, wanted, rcond=None)[0]
    np.testing.assert_allclose(found.values[1], best.T, atol=1e-4)


def test_a_product_of_one_kernel_a_tap_is_the_kernel() -> None:
    random = np.random.default_rng(8)
    one, two = random.normal(size=(3, 1, 4, 2)), random.normal(size=(1, 2, 5, 4))
    whole = compose([one, two])
    assert whole.shape == (3, 2, 5, 2)
    np.testing.assert_allclose(whole[2, 1], two[0, 1] @ one[2, 0])


# --- the rest -------------------------------------------------------------------------


def test_a_scale_never_turns_negative() -> None:
    wanted = np.array([[1.0, -2.0, 3.0, -1.5]])
    now = np.stack([-wanted[0], 0.5 * wanted[0]])[..., None]  # [outputs, rows, 1]
    sums = RegressionSums()
    sums.add(now, now, np.stack([wanted[0]] * 2)[..., None])
    for is_pooled in (False, True):
        problem = ScaleProblem(fit=sums, held=sums, shift=False, is_pooled=is_pooled)
        for candidate in problem.candidates():
            assert (candidate.values > 0).all()
    problem = ScaleProblem(fit=sums, held=sums, shift=False, is_pooled=False)
    found = solve(problem)
    # Least squares would be -1 and 2: the first stays, the second is taken.
    np.testing.assert_allclose(found.values, [1, 2])


def test_problems_and_solutions_can_be_sent_to_another_process() -> None:
    random = np.random.default_rng(9)
    x, weights = inputs(10, 200, 6), random.normal(size=(1, 4, 6))
    sums = sums_of(x, x @ weights[0].T, x @ random.normal(size=(4, 6)).T + 1)
    problem = WeightProblem(
        fit=sums, held=sums, shift=True, weights=weights.astype(np.float32), ridge=0.1
    )

    here = solve(problem)
    there = pickle.loads(pickle.dumps(solve(pickle.loads(pickle.dumps(problem)))))

    np.testing.assert_array_equal(here.values, there.values)
    np.testing.assert_array_equal(here.shift, there.shift)
    assert (here.before, here.after) == (there.before, there.after)
