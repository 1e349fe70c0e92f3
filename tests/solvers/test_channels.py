"""Losses of removed inputs against solving every case on its own."""

from __future__ import annotations

import numpy as np
import pytest

from onnxshrink.solvers.channels import block_losses, energies, refit


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    rows = draw.standard_normal((400, 12)) @ draw.standard_normal((12, 12))
    return draw.standard_normal((5, 12)), rows, rows.T @ rows / len(rows)


@pytest.mark.parametrize("width", [1, 3])
def test_a_loss_is_what_least_squares_leaves(width: int) -> None:
    weights, rows, moments = problem()
    blocks = np.arange(12).reshape(-1, width)
    counts = np.array([1.0, 2.0, 0.0, 0.5, 1.0])
    found = block_losses(weights, moments, blocks, counts)
    wanted = rows @ weights.T
    for block, loss in zip(blocks, found, strict=True):
        rest = np.delete(rows, block, axis=1)
        fitted = rest @ np.linalg.lstsq(rest, wanted, rcond=None)[0]
        gap = np.square(wanted - fitted).mean(axis=0) @ counts
        assert loss == pytest.approx(gap, rel=0.1)  # it is damped


def test_refitted_weights_are_those_of_least_squares() -> None:
    weights, rows, moments = problem(1)
    kept = np.array([True, False, True, True] * 3)
    found = refit(weights, moments, kept)
    best = np.linalg.lstsq(rows[:, kept], rows @ weights.T, rcond=None)[0].T
    np.testing.assert_allclose(found[:, kept], best, rtol=0.02, atol=0.01)
    assert not found[:, ~kept].any()


def test_an_energy_is_what_a_block_adds_to_the_outputs() -> None:
    weights, rows, moments = problem(2)
    blocks = np.arange(12).reshape(-1, 2)
    found = energies(weights, moments, blocks)
    for block, energy in zip(blocks, found, strict=True):
        part = rows[:, block] @ weights[:, block].T
        assert energy == pytest.approx(np.square(part).sum(axis=1).mean())
    alone = energies(weights, None, blocks)
    assert alone[0] == pytest.approx(np.square(weights[:, :2]).sum())


def test_dead_inputs_cost_nothing_and_change_nothing() -> None:
    weights, _, moments = problem(3)
    moments[4] = moments[:, 4] = 0
    losses = block_losses(weights, moments, np.arange(12)[:, None])
    assert losses[4] < 1e-3 * losses.max()
    kept = np.ones(12, dtype=bool)
    kept[4] = False
    np.testing.assert_allclose(
        refit(weights, moments, kept)[:, kept], weights[:, kept], rtol=1e-9
    )
    assert not refit(weights, moments, np.zeros(12, dtype=bool)).any()
