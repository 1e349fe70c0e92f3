"""k-means against exhaustive dynamic programming and the best known figures."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.solvers import kmeans

Array = NDArray[Any]


def least_error(values: Array, weight: Array, count: int) -> float:
    """Try every way to cut sorted values into ``count`` runs."""
    order = np.argsort(values)
    x, w = values[order], weight[order]
    best = np.inf
    for cuts in combinations_with_replacement(range(len(x) + 1), count - 1):
        bounds = [0, *cuts, len(x)]
        total = 0.0
        for start, stop in pairwise(bounds):
            own, share = x[start:stop], w[start:stop]
            if share.sum() > 0:
                mean = (own * share).sum() / share.sum()
                total += float((share * (own - mean) ** 2).sum())
        best = min(best, total)
    return best


def least_error_with_zero(values: Array, weight: Array, count: int) -> float:
    """Try every way to give some values to zero and to cut the others into runs."""
    order = np.argsort(values)
    x, w = values[order], weight[order]
    best = np.inf
    for start in range(len(x) + 1):
        for stop in range(start, len(x) + 1):
            middle = float((w[start:stop] * x[start:stop] ** 2).sum())
            for left in range(count):
                right = count - 1 - left
                total = middle
                for part, share, own in (
                    (x[:start], w[:start], left),
                    (x[stop:], w[stop:], right),
                ):
                    if len(part) and not own:
                        total = np.inf
                    elif len(part):
                        total += least_error(part, share, own)
                best = min(best, total)
    return best


numbers = st.lists(
    st.tuples(st.integers(-9, 9), st.integers(1, 4)), min_size=1, max_size=8
)


@given(numbers, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_cut_of_few_values_is_better(
    pairs: list[tuple[int, int]], count: int
) -> None:
    values = np.array([pair[0] for pair in pairs], np.float64)
    weight = np.array([pair[1] for pair in pairs], np.float64)
    centroids = kmeans.fit(values, count, importance=weight)
    found = kmeans.distortion(values, centroids, weight)
    assert found == pytest.approx(least_error(values, weight, count), abs=1e-9)
    assert len(centroids) <= count
    curve = kmeans.errors(values, count, importance=weight)
    assert curve[-1] == pytest.approx(found, abs=1e-9)


@given(numbers, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_no_cut_with_a_zero_is_better(pairs: list[tuple[int, int]], count: int) -> None:
    values = np.array([pair[0] for pair in pairs[:6]], np.float64)
    weight = np.array([pair[1] for pair in pairs[:6]], np.float64)
    centroids = kmeans.fit(values, count, importance=weight, zero=True)
    assert 0.0 in centroids
    assert len(centroids) <= count
    found = kmeans.distortion(values, centroids, weight)
    best = least_error_with_zero(values, weight, count)
    assert found == pytest.approx(best, abs=1e-9)
    curve = kmeans.errors(values, count, importance=weight, zero=True)
    assert curve[-1] == pytest.approx(best, abs=1e-9)
    assert (np.diff(curve) <= 1e-12).all()


# Max, "Quantizing for Minimum Distortion" (1960), table I: unit normal.
MAX_1960 = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497, 32: 0.002499}


@pytest.mark.parametrize("count", sorted(MAX_1960))
def test_a_million_normal_values_reach_the_error_of_max(count: int) -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    centroids = kmeans.fit(values, count)
    error = kmeans.distortion(values, centroids) / values.size
    assert error == pytest.approx(MAX_1960[count], rel=6e-3)


def exact(values: Array, count: int) -> float:
    """Dynamic program over all cuts, one value at a time, in plain numpy."""
    x = np.sort(values.astype(np.float64))
    first = np.concatenate([[0.0], np.cumsum(x)])
    second = np.concatenate([[0.0], np.cumsum(x * x)])
    ends = np.arange(1, len(x) + 1)
    error = second[1:] - first[1:] ** 2 / ends
    for _ in range(count - 1):
        before = np.concatenate([[0.0], error])
        error = np.empty(len(x))
        for end in ends:
            start = np.arange(end)
            inside = first[end] - first[start]
            costs = second[end] - second[start] - inside**2 / (end - start)
            error[end - 1] = (before[start] + costs).min()
    return float(error[-1])


@pytest.mark.parametrize("tail", [False, True])
def test_bins_lose_less_than_three_in_a_thousand(tail: bool) -> None:
    # More values than bins, but few distinct ones, so that the optimum is known.
    rng = np.random.default_rng(1)
    few = rng.standard_t(1.5, 700) if tail else rng.standard_normal(700)
    values = np.repeat(few, 120).astype(np.float32)
    best = 120 * exact(few.astype(np.float32), 12)
    found = kmeans.distortion(values, kmeans.fit(values, 12))
    assert best * (1 - 1e-6) <= found <= 1.003 * best


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e30])
def test_one_far_value_does_not_cost_the_others_their_bins(scale: float) -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal(200_000)
    alone = kmeans.distortion(values, kmeans.fit(values, 15))
    far = np.append(values, 1e5) * scale
    centroids = kmeans.fit(far, 16)
    assert centroids[-1] == pytest.approx(1e5 * scale)
    assert kmeans.distortion(far, centroids) <= 1.003 * alone * scale**2


def test_zeros_of_a_pruned_weight_stay_zero_and_cost_nothing() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal(400_000).astype(np.float32)
    values[rng.random(values.size) < 0.9] = 0.0
    centroids = kmeans.fit(values, 16, zero=True)
    assert 0.0 in centroids
    codes = kmeans.assign(values, centroids)
    assert (centroids[codes][values == 0] == 0).all()
    # Fifteen others for what is left can only do better than fifteen for all of it.
    rest = values[values != 0]
    assert kmeans.distortion(values, centroids) <= 1.003 * kmeans.distortion(
        rest, kmeans.fit(rest, 15)
    )


def test_importance_broadcasts_and_moves_centroids() -> None:
    values = np.array([[0.0, 1.0], [0.0, 3.0]])
    even = kmeans.fit(values, 1)
    assert even.tolist() == [1.0]
    weighted = kmeans.fit(values, 1, importance=np.array([[0.0], [1.0]]))
    assert weighted.tolist() == [1.5]
    big = np.random.default_rng(4).standard_normal((400, 400))
    share = np.linspace(0, 2, 400)
    spread = kmeans.fit(big, 8, importance=share)
    full = kmeans.fit(big, 8, importance=np.broadcast_to(share, big.shape).copy())
    np.testing.assert_allclose(spread, full, rtol=1e-12)


@pytest.mark.parametrize("initial", ["linear", "quantile"])
def test_other_starts_end_at_a_local_optimum(initial: kmeans.Initial) -> None:
    values = np.random.default_rng(5).standard_normal(100_000).astype(np.float32)
    best = kmeans.distortion(values, kmeans.fit(values, 16))
    centroids = kmeans.fit(values, 16, initial=initial)
    found = kmeans.distortion(values, centroids)
    assert best <= found * (1 + 1e-9) <= 1.05 * best
    pinned = kmeans.fit(values, 16, initial=initial, zero=True)
    assert 0.0 in pinned


def test_nearest_is_nearest_whatever_the_centroids() -> None:
    rng = np.random.default_rng(6)
    values = rng.standard_normal(3_000_000).astype(np.float32)
    for centroids in (
        np.sort(rng.standard_normal(256)),
        np.array([-1e-7, 0.0, 1e-7, 5.0]),  # edges closer than bins
        np.array([-1.0, 1.0]),
        np.array([0.5]),
    ):
        codes = kmeans.assign(values, centroids)
        some = values[::97].astype(np.float64)
        distance = np.abs(some[:, None] - centroids)
        chosen = np.take_along_axis(distance, codes[::97, None].astype(int), 1)
        np.testing.assert_array_equal(chosen[:, 0], distance.min(axis=1))


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(ModelError, match="NaN or infinity"):
        kmeans.fit(np.array([1.0, np.nan]), 2)
    with pytest.raises(UsageError, match="1 to 256"):
        kmeans.fit(np.ones(3), 257)
    with pytest.raises(UsageError, match="at least one value"):
        kmeans.fit(np.empty(0), 2)
    with pytest.raises(UsageError, match="does not broadcast"):
        kmeans.fit(np.ones((2, 3)), 2, importance=np.ones(4))
    with pytest.raises(ModelError, match="negative"):
        kmeans.fit(np.ones(3), 2, importance=np.array([1.0, -1.0, 1.0]))
    with pytest.raises(ModelError, match="NaN or infinity"):
        kmeans.fit_vectors(np.array([[1.0, np.inf]]), 2)


# --- vectors --------------------------------------------------------------------------


def test_vectors_that_are_few_are_all_kept() -> None:
    rng = np.random.default_rng(7)
    few = rng.standard_normal((16, 4))
    vectors = few[rng.integers(0, 16, 5000)]
    centroids = kmeans.fit_vectors(vectors, 16)
    codes = kmeans.assign_vectors(vectors, centroids)
    np.testing.assert_allclose(centroids[codes], vectors, atol=1e-12)


def test_vectors_beat_random_starts() -> None:
    rng = np.random.default_rng(8)
    vectors = rng.standard_normal((4000, 2))

    def error(centroids: Array) -> float:
        apart = vectors[:, None] - centroids
        return float((apart**2).sum(axis=2).min(axis=1).sum())

    def lloyd(centroids: Array) -> Array:
        for _ in range(40):
            apart = ((vectors[:, None] - centroids) ** 2).sum(axis=2)
            codes = apart.argmin(axis=1)
            for code in range(len(centroids)):
                if (codes == code).any():
                    centroids[code] = vectors[codes == code].mean(axis=0)
        return centroids

    ours = error(kmeans.fit_vectors(vectors, 32))
    others = [
        error(lloyd(vectors[rng.choice(len(vectors), 32, replace=False)]))
        for _ in range(3)
    ]
    assert ours <= 1.01 * min(others)


def test_a_zero_vector_is_kept_and_importance_counts() -> None:
    rng = np.random.default_rng(9)
    vectors = rng.standard_normal((1000, 4))
    vectors[:500] = 0.0
    centroids = kmeans.fit_vectors(vectors, 8, zero=True)
    assert (centroids == 0).all(axis=1).sum() == 1
    share = np.array([1.0, 1.0, 1e-9, 1e-9])
    tight = kmeans.fit_vectors(vectors, 8, importance=share)
    codes = kmeans.assign_vectors(vectors, tight, share)
    plain = kmeans.fit_vectors(vectors, 8)
    missed = ((tight[codes] - vectors) ** 2).sum(axis=0)
    loose = ((plain[kmeans.assign_vectors(vectors, plain)] - vectors) ** 2).sum(axis=0)
    assert missed[:2].sum() < loose[:2].sum()


@pytest.mark.parametrize("dim", [1, 2])
def test_few_vectors_are_clustered_as_well_as_can_be(dim: int) -> None:
    vectors = np.array(list(product([0.0, 1.0, 10.0, 11.0], repeat=dim)))
    centroids = kmeans.fit_vectors(vectors, 2**dim)
    assert sorted(map(tuple, centroids)) == sorted(product([0.5, 10.5], repeat=dim))
