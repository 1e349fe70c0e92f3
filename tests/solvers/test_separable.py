"""Separable kernels: exact at full rank, best by an independent search below it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.solvers import separable
from onnxshrink.solvers.separable import ORDERS, Order, most_branches, separate


def moments(inputs: int, taps: int, rows: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((inputs * taps, inputs * taps))
    patches = draw.standard_normal((rows, inputs * taps)) @ mixed
    return patches.T @ patches


def error(kernel: np.ndarray, made: np.ndarray, metric: np.ndarray) -> float:
    gap = (kernel - made).reshape(len(kernel), -1)
    flat = kernel.reshape(len(kernel), -1)
    return float(np.sum((gap @ metric) * gap) / np.sum((flat @ metric) * flat))


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(ORDERS),
    st.booleans(),
)
def test_enough_branches_give_the_kernel_back(
    outputs: int, inputs: int, taps: int, order: Order, has_data: bool
) -> None:
    draw = np.random.default_rng(outputs + 10 * inputs + 100 * taps)
    kernel = draw.standard_normal((outputs, inputs, taps))
    metric = moments(inputs, taps, 200) if has_data else None
    found = separate(kernel, taps, order, metric)
    assert found.branches == most_branches(kernel.shape, order)
    np.testing.assert_allclose(found.kernel(), kernel, atol=1e-6)
    assert found.error < 1e-9


@pytest.mark.parametrize("order", ORDERS)
def test_without_data_it_is_one_svd_a_channel(order: Order) -> None:
    kernel = np.random.default_rng(1).standard_normal((6, 4, 9))
    found = separate(kernel, 2, order)
    axis = 1 if order == "depthwise" else 0
    lost = 0.0
    for channel in range(kernel.shape[axis]):
        values = np.linalg.svd(np.take(kernel, channel, axis), compute_uv=False)
        lost += np.square(values[2:]).sum()
    assert found.error == pytest.approx(lost / np.square(kernel).sum())


@pytest.mark.parametrize("order", ORDERS)
def test_the_error_is_that_of_the_output(order: Order) -> None:
    kernel = np.random.default_rng(2).standard_normal((5, 3, 4))
    metric = moments(3, 4, 50)
    found = separate(kernel, 1, order, metric)
    assert found.error == pytest.approx(error(kernel, found.kernel(), metric))


@pytest.mark.parametrize("order", ORDERS)
def test_data_make_the_output_better_than_the_svd_of_the_weights(order: Order) -> None:
    kernel = np.random.default_rng(3).standard_normal((8, 6, 9))
    metric = moments(6, 9, 500)
    plain = error(kernel, separate(kernel, 1, order).kernel(), metric)
    assert separate(kernel, 1, order, metric).error < 0.9 * plain


@pytest.mark.parametrize("order", ORDERS)
def test_it_is_as_good_as_a_general_minimiser_finds(order: Order) -> None:
    kernel = np.random.default_rng(4).standard_normal((3, 3, 4))
    metric = moments(3, 4, 100)
    found = separate(kernel, 1, order, metric, sweeps=200)
    channels = 3
    flat = kernel.reshape(3, -1)
    root = np.linalg.cholesky(metric)
    scale = np.sqrt(np.sum((flat @ root) ** 2))

    def gap(x: np.ndarray) -> np.ndarray:
        depthwise = x[: channels * 4].reshape(1, channels, 4)
        pointwise = x[channels * 4 :].reshape(1, 3, 3)
        made = separable._dense(order, depthwise, pointwise).reshape(3, -1)
        return ((flat - made) @ root).ravel() / scale

    # There are several local minima: it is in one of them, and in a good one.
    here = np.concatenate([found.depthwise.ravel(), found.pointwise.ravel()])
    assert found.error <= 2 * scipy.optimize.least_squares(gap, here).cost * 1.001
    draw = np.random.default_rng(5)
    best = min(
        2 * scipy.optimize.least_squares(gap, draw.standard_normal(21)).cost
        for _ in range(8)
    )
    assert found.error <= best * 1.15


@pytest.mark.parametrize("order", ORDERS)
def test_dead_inputs_and_few_patches_are_fine(order: Order) -> None:
    kernel = np.random.default_rng(6).standard_normal((4, 5, 9))
    metric = moments(5, 9, 7)
    metric[9:18] = metric[:, 9:18] = 0
    found = separate(kernel, 1, order, metric)
    assert np.isfinite(found.kernel()).all()
    assert found.error <= 1
    nothing = separate(kernel, 1, order, np.zeros_like(metric))
    np.testing.assert_array_equal(nothing.kernel(), separate(kernel, 1, order).kernel())


def test_many_kernels_are_solved_for_by_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = np.random.default_rng(7).standard_normal((7, 6, 9))
    metric = moments(6, 9, 400)
    at_once = separate(kernel, 2, "depthwise", metric)
    monkeypatch.setattr(separable, "_DIRECT", 0)
    stepwise = separate(kernel, 2, "depthwise", metric)
    assert stepwise.error == pytest.approx(at_once.error, rel=0.05)


def test_outputs_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = np.random.default_rng(8).standard_normal((7, 4, 9))
    metric = moments(4, 9, 400)
    whole = separate(kernel, 2, "pointwise", metric)
    monkeypatch.setattr(separable, "_CHUNK", 1)
    parts = separate(kernel, 2, "pointwise", metric)
    np.testing.assert_allclose(parts.kernel(), whole.kernel(), rtol=1e-9, atol=1e-9)


def test_moments_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="not"):
        separate(np.ones((2, 2, 3)), 1, "depthwise", np.eye(5))
