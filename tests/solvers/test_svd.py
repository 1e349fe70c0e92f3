"""Low-rank factors against what the papers and numpy say they are."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxshrink.errors import ModelError
from onnxshrink.solvers import svd

Array = NDArray[Any]


def draw(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def second_moment(inputs: int, seed: int = 1) -> tuple[Array, Array]:
    """Inputs, one of them dead and two the same, and their second moment."""
    x = draw((3 * inputs, inputs), seed) @ draw((inputs, inputs), seed + 1)
    x[:, 0] = 0
    x[:, -1] = x[:, inputs // 2]
    return x, x.T @ x / len(x)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (9, 5), (1, 7), (7, 1), (64, 64)])
def test_a_truncated_svd_is_numpys(shape: tuple[int, int]) -> None:
    matrix = draw(shape)
    rank = max(1, min(shape) // 2)
    u, s, vt = svd.truncated(matrix, rank)
    full_u, full_s, full_vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(s, full_s[:rank], rtol=1e-12)
    best = (full_u[:, :rank] * full_s[:rank]) @ full_vt[:rank]
    np.testing.assert_allclose((u * s) @ vt, best, atol=1e-12)


@pytest.mark.parametrize("smallest", [1e-12, 0.0])
def test_an_ill_conditioned_matrix_still_gets_orthonormal_factors(
    smallest: float,
) -> None:
    left, _ = np.linalg.qr(draw((40, 8)))
    right, _ = np.linalg.qr(draw((12, 8), 1))
    values = np.array([1, 1e-2, 1e-4, 1e-7, 1e-9, 1e-10, 1e-11, smallest])
    u, s, vt = svd.truncated((left * values) @ right.T, 8)
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-8)
    np.testing.assert_allclose(vt @ vt.T, np.eye(8), atol=1e-8)
    np.testing.assert_allclose(s, values, atol=1e-15)


@given(
    outputs=st.integers(1, 12),
    inputs=st.integers(1, 12),
    seed=st.integers(0, 99),
    whitened=st.booleans(),
    weighted=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_full_rank_gives_the_matrix_back(
    outputs: int, inputs: int, seed: int, whitened: bool, weighted: bool
) -> None:
    matrix = draw((outputs, inputs), seed)
    found = svd.split(
        matrix,
        inputs=second_moment(inputs)[1] if whitened else None,
        outputs=np.arange(outputs) + 1.0 if weighted else None,
    )
    left, right = found.factors(matrix, found.ranks)
    assert found.ranks == min(outputs, inputs)
    np.testing.assert_allclose(left @ right, matrix, atol=1e-9)
    norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(*norms, rtol=1e-9)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_what_is_lost_is_the_error_of_the_outputs(shape: tuple[int, int]) -> None:
    matrix = draw(shape)
    x, moment = second_moment(shape[1])
    weight = np.abs(draw((shape[0],), 3)) + 0.1
    found = svd.split(matrix, inputs=moment, outputs=weight, damping=1e-9)
    left, right = found.factors(matrix, 3)
    missing = x @ (matrix - left @ right).T
    error = float((np.square(missing) @ weight).sum() / len(x))
    assert found.lost(3) == pytest.approx(error, rel=1e-5)
    # No other factors of that rank do better: Eckart and Young in the metric.
    rng = np.random.default_rng(5)
    for _ in range(20):
        other = (left + 0.05 * rng.standard_normal(left.shape)) @ right
        worse = np.square(x @ (matrix - other).T) @ weight
        assert worse.sum() / len(x) > error


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_whitened_factors_are_those_of_two_svds(shape: tuple[int, int]) -> None:
    """Wang et al. 2025, algorithm 1: SVD of W U S^(1/2), full-rank inputs."""
    matrix = draw(shape)
    x = draw((60, shape[1]), 2) @ draw((shape[1], shape[1]), 3)
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(values)
    u, s, vt = np.linalg.svd(matrix @ root, full_matrices=False)
    theirs = (u[:, :4] * s[:4]) @ vt[:4] @ np.linalg.inv(root)
    found = svd.split(matrix, inputs=moment, damping=0.0, rank=4)
    left, right = found.factors(matrix, 4)
    np.testing.assert_allclose(left @ right, theirs, atol=1e-8)


def test_rows_that_weigh_nothing_are_fitted_last() -> None:
    table = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    found = svd.split(table, outputs=np.array([1.0, 0.1, 0.0]), damping=0.0, rank=1)
    left, right = found.factors(table, 1)
    np.testing.assert_allclose(left @ right, [[3, 0], [0, 0], [0, 0]], atol=1e-12)


def test_ranks_lose_the_energies_that_are_left() -> None:
    found = svd.split(np.diag([3.0, 2.0, 1.0]))
    np.testing.assert_allclose(found.energies, [9, 4, 1])
    assert [found.lost(rank) for rank in range(4)] == [14, 5, 1, 0]


def test_inputs_that_were_never_seen_keep_the_matrix_at_full_rank() -> None:
    matrix = draw((9, 5))
    found = svd.split(matrix, inputs=np.zeros((5, 5)))
    left, right = found.factors(matrix, 5)
    np.testing.assert_allclose(left @ right, matrix, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    matrix = draw((3, 4))
    matrix[1, 1] = bad
    for call in (lambda: svd.split(matrix), lambda: svd.truncated(matrix, 2)):
        with pytest.raises(ModelError, match="NaN or infinity"):
            call()
    with pytest.raises(ModelError, match="overflow"):
        svd.split(np.full((3, 4), 1e200))


def test_a_moment_is_about_the_mean_where_a_bias_takes_that_up() -> None:
    x = draw((50, 3)) + 2
    args = x.T @ x, x.mean(axis=0), len(x)
    np.testing.assert_allclose(svd.moment(*args, centred=False), x.T @ x / 50)
    np.testing.assert_allclose(
        svd.moment(*args, centred=True), np.cov(x.T, bias=True), atol=1e-12
    )


@pytest.mark.parametrize("rank", [None, 64])
@pytest.mark.parametrize("shape", [(700, 512), (512, 700)])
def test_a_large_layer_is_split_in_the_room_of_three_matrices_of_its_smaller_side(
    shape: tuple[int, int], rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "_EVD", 256)
    monkeypatch.setattr(svd, "_ROWS", 32)
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((2000, shape[1]))
    moment = x.T @ x / 2000
    tracemalloc.start()
    found = svd.split(matrix, inputs=moment, rank=rank)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    other = 700**2 if shape[1] == 700 else 0
    assert peak < 1.1 * 8 * (3 * 512**2 + other)
    left, right = found.factors(matrix, 64)
    missing = (matrix - left @ right) @ np.linalg.cholesky(moment)
    assert np.square(missing).sum() == pytest.approx(found.lost(64), rel=5e-3)
