"""Codes by rate and by what a layer's outputs lose, against exhaustive search."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.solvers import codebook, kmeans

Array = NDArray[Any]


def layer(
    rows: int, inputs: int, seed: int = 0, stacks: int = 1
) -> tuple[Array, Array]:
    """Return weights and Gram matrices of correlated inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, inputs))
    mix = rng.standard_normal((stacks, inputs, inputs))
    seen = rng.standard_normal((stacks, 4 * inputs, inputs)) @ mix + 0.5
    gram = np.swapaxes(seen, 1, 2) @ seen
    return weight, gram[0] if stacks == 1 else gram


# --- rate -----------------------------------------------------------------------------


def test_a_code_costs_its_length() -> None:
    # 0.4 is nearer to 0 by .16 against .36; three bits more at .1 each turn that.
    centroids, lengths = np.array([0.0, 1.0]), np.array([4.0, 1.0])
    values = np.array([0.4])
    assert codebook.assign_by_rate(values, centroids, lengths, 0.05).tolist() == [0]
    assert codebook.assign_by_rate(values, centroids, lengths, 0.10).tolist() == [1]
    heavy = codebook.assign_by_rate(values, centroids, lengths, 0.1, np.array([2.0]))
    assert heavy.tolist() == [0]
    never = np.array([np.inf, 1.0])
    assert codebook.assign_by_rate(values, centroids, never, 0.0).tolist() == [1]


def test_entropy_is_that_of_shannon() -> None:
    assert codebook.entropy(np.array([4, 2, 1, 1])) == pytest.approx(1.75)
    assert codebook.entropy(np.array([0, 7])) == 0.0
    assert codebook.lengths_of(np.array([4, 2, 1, 1])).tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.0])
def test_a_rate_is_kept_at_less_error_than_by_fewer_centroids(rate: float) -> None:
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    centroids, lengths, trade = codebook.fit_by_rate(values, 64, rate=rate)
    codes = codebook.assign_by_rate(values, centroids, lengths, trade)
    bits = codebook.entropy(np.bincount(codes))
    assert rate * 0.93 <= bits <= rate * 1.02
    error = float(((values - centroids[codes]) ** 2).mean())
    few = kmeans.fit(values, int(2**rate))
    plain = kmeans.assign(values, few)
    assert codebook.entropy(np.bincount(plain)) <= rate
    # Entropy-coded Laplacian: a Lloyd quantizer of 2 levels has an error of .5 for 1
    # bit; the optimum is near the rate-distortion bound.
    assert error < 0.9 * float(((values - few[plain]) ** 2).mean())


def test_zero_stays_zero_whatever_the_rate() -> None:
    values = np.random.default_rng(1).standard_normal(10_000)
    values[:6000] = 0.0
    centroids, lengths, trade = codebook.fit_by_rate(values, 16, rate=0.8, zero=True)
    codes = codebook.assign_by_rate(values, centroids, lengths, trade)
    assert (centroids[codes[:6000]] == 0).all()
    with pytest.raises(UsageError, match="one of them"):
        codebook.fit_by_rate(values, 16)


# --- layers ---------------------------------------------------------------------------


def decoded(table: Array, codes: Array) -> Array:
    return np.asarray(table)[codes]


@pytest.mark.parametrize("stacks", [1, 3])
def test_feedback_loses_less_than_rounding(stacks: int) -> None:
    weight, gram = layer(24, 30, stacks=stacks)
    table = kmeans.fit(weight, 8)
    plain = codebook.output_error(
        weight, decoded(table, kmeans.assign(weight, table)), gram
    )
    codes = codebook.feedback(weight, gram, table)
    assert codebook.output_error(weight, decoded(table, codes), gram) < 0.7 * plain


def test_feedback_is_near_the_best_of_all_codes() -> None:
    table = np.array([-1.0, 0.0, 1.0])
    lost = best = 0.0
    for seed in range(20):
        weight, gram = layer(1, 6, seed)
        codes = codebook.feedback(weight, gram, table)
        lost += codebook.output_error(weight, decoded(table, codes), gram)
        change = np.array(list(product(table, repeat=6))) - weight
        best += float(((change @ gram) * change).sum(axis=1).min())
    assert best <= lost <= 2.5 * best


def test_without_correlation_feedback_is_rounding() -> None:
    weight, _ = layer(7, 12)
    table = kmeans.fit(weight, 5)
    codes = codebook.feedback(weight, np.diag(np.arange(1.0, 13.0)), table)
    np.testing.assert_array_equal(codes, kmeans.assign(weight, table))


def test_tables_of_rows_are_as_good_as_each_alone() -> None:
    weight, gram = layer(6, 20)
    owner = np.array([0, 0, 1, 1, 2, 2])
    tables = np.stack([kmeans.fit(weight[owner == i], 4) for i in range(3)])
    together = codebook.feedback(weight, gram, tables, owner=owner)
    for index in range(3):
        alone = codebook.feedback(weight[owner == index], gram, tables[index])
        np.testing.assert_array_equal(together[owner == index], alone)


@pytest.mark.parametrize("across", [False, True])
def test_vectors_get_feedback_too(across: bool) -> None:
    weight, gram = layer(64, 24)
    vectors = weight.T.reshape(-1, 4) if across else weight.reshape(-1, 4)
    table = kmeans.fit_vectors(vectors, 32)

    def back(codes: Array) -> Array:
        entries = table[codes]
        if across:
            return np.asarray(entries.transpose(0, 2, 1).reshape(weight.shape))
        return entries.reshape(weight.shape)

    plain_codes = kmeans.assign_vectors(vectors, table)
    plain = plain_codes.reshape(24, 16).T if across else plain_codes.reshape(64, 6)
    codes = codebook.feedback(weight, gram, table, across=across)
    assert codes.shape == plain.shape
    lost = codebook.output_error(weight, back(codes), gram)
    assert lost < 0.85 * codebook.output_error(weight, back(plain), gram)


def test_pruned_weights_stay_zero_and_rate_saves_bits() -> None:
    weight, gram = layer(40, 50)
    weight[np.abs(weight) < 0.8] = 0.0
    table = kmeans.fit(weight, 9, zero=True)
    codes = codebook.feedback(weight, gram, table)
    assert (decoded(table, codes)[weight == 0] == 0).all()
    lengths = codebook.lengths_of(np.bincount(codes.reshape(-1), minlength=9))
    cheap = codebook.feedback(
        weight, gram, table, lengths=lengths, trade=0.05 * float(np.trace(gram)) / 50
    )
    assert (decoded(table, cheap)[weight == 0] == 0).all()
    assert codebook.entropy(np.bincount(cheap.reshape(-1))) < codebook.entropy(
        np.bincount(codes.reshape(-1))
    )


def test_a_refitted_table_is_the_least_squares_solution() -> None:
    weight, gram = layer(10, 16)
    table = kmeans.fit(weight, 6)
    codes = kmeans.assign(weight, table)
    found = codebook.refit(weight, gram, table, codes)
    root = np.linalg.cholesky(gram)
    one_hot = np.eye(6)[codes]  # [rows, inputs, 6]
    design = np.einsum("rik,ij->rjk", one_hot, root).reshape(-1, 6)
    best, *_ = np.linalg.lstsq(design, (weight @ root).reshape(-1), rcond=None)
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-5)
    pinned = np.where(np.arange(6) == 2, 0.0, table)
    assert codebook.refit(weight, gram, pinned, codes)[2] == 0.0


@pytest.mark.parametrize("stacks", [1, 2])
@pytest.mark.parametrize("trade", [0.0, 20.0])
def test_descent_never_loses_and_no_single_change_would_gain(
    trade: float, stacks: int
) -> None:
    weight, gram = layer(8, 12, stacks=stacks)
    weight[np.abs(weight) < 0.5] = 0.0
    table = np.array([-1.0, 0.0, 1.0])
    lengths = np.array([3.0, 1.0, 2.0])

    def total(codes: Array) -> float:
        bits = float(lengths[codes].sum())
        return codebook.output_error(weight, table[codes], gram) + trade * bits

    start = kmeans.assign(weight, table)
    codes = codebook.descend(
        weight, gram, table, start, lengths=lengths, trade=trade, sweeps=50
    )
    assert total(codes) < total(start)
    assert (table[codes][weight == 0] == 0).all()
    for row, column in zip(*np.nonzero(weight), strict=True):
        for code in range(3):
            other = codes.copy()
            other[row, column] = code
            assert total(other) >= total(codes) - 1e-6 * total(codes)


def test_a_curve_of_rates_says_what_a_fit_takes() -> None:
    values = np.random.default_rng(2).standard_normal(50_000)
    curve = codebook.RateCurve(values, 16, zero=False)
    assert curve.energy == pytest.approx(float(values @ values))
    rates = [curve.bits(trade) for trade in (0.0, 0.01, 0.1, 1.0)]
    assert rates == sorted(rates, reverse=True)
    centroids, lengths, trade = codebook.fit_by_rate(values, 16, trade=0.1)
    codes = codebook.assign_by_rate(values, centroids, lengths, trade)
    bits = 50_000 * codebook.entropy(np.bincount(codes))
    assert bits == pytest.approx(rates[2], rel=0.15)


def test_inputs_that_never_vary_do_no_harm() -> None:
    weight, gram = layer(5, 8)
    gram[3], gram[:, 3] = 0.0, 0.0
    table = kmeans.fit(weight, 4)
    codes = codebook.feedback(weight, gram, table)
    assert codes[:, 3].tolist() == kmeans.assign(weight[:, 3], table).tolist()
    nothing = codebook.feedback(weight, np.zeros_like(gram), table)
    np.testing.assert_array_equal(nothing, kmeans.assign(weight, table))


def test_what_does_not_fit_is_refused() -> None:
    weight, gram = layer(4, 6)
    with pytest.raises(UsageError, match="does not belong"):
        codebook.feedback(weight, gram[:5, :5], np.ones(2))
    with pytest.raises(UsageError, match="4 does not divide"):
        codebook.feedback(weight, gram, np.ones((2, 4)))
    with pytest.raises(ModelError, match="NaN or infinity"):
        codebook.feedback(weight, gram * np.nan, np.ones(2))
