"""Rounding: grids hold what they promise, and clever codes are never worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.solvers.rounding import (
    Grid,
    adaround,
    decode,
    descend,
    error,
    fit,
    gptq,
    nearest,
)

METHODS = ("minmax", "mse", "hqq", "learned")
CODES = [(-127, 127), (-63, 63), (-8, 7), (0, 15), (0, 3), (-1, 1)]

weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-8, 8, width=32),
)
codes_of = st.sampled_from(CODES)


def layer(
    outputs: int = 6, inputs: int = 40, seed: int = 0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Weights, and the Gram matrix of inputs that depend on each other."""
    draws = np.random.default_rng(seed)
    mixed = draws.normal(size=(3 * inputs, inputs)) @ draws.normal(
        size=(inputs, inputs)
    )
    x = np.maximum(mixed, 0)
    return draws.normal(size=(outputs, inputs)).astype(np.float32), x.T @ x


# --- grids ----------------------------------------------------------------------------


@given(weights, codes_of, st.booleans(), st.integers(0, 4))
def test_nearest_of_the_whole_range_is_off_by_half_a_step_at_most(
    weight, codes, symmetric, block
):
    low, high = codes
    if (low, high) == (-1, 1):
        return
    grid = fit(weight, low, high, symmetric=symmetric, block=block)
    found = nearest(weight, grid)
    assert found.min(initial=0) >= low
    assert found.max(initial=0) <= high
    scale, zero = (
        np.broadcast_to(a, weight.shape) for a in grid.columns(weight.shape[1])
    )
    least, most = (low - zero) * scale, (high - zero) * scale
    inside = (weight >= least) & (weight <= most)
    off = np.abs(decode(found, grid) - weight)
    assert np.all(off[inside] <= scale[inside] * 0.5001 + 1e-30)
    # The zero point's own rounding leaves half a step outside at most.
    assert np.all(off <= scale * 0.5001 + 1e-30)


@given(weights, codes_of, st.booleans(), st.integers(0, 4), st.sampled_from(METHODS))
def test_every_grid_is_usable_and_the_same_each_time(
    weight, codes, symmetric, block, method
):
    low, high = codes
    make = [
        fit(weight, low, high, symmetric=symmetric, block=block, method=method)
        for _ in range(2)
    ]
    assert np.array_equal(make[0].scale, make[1].scale)
    assert np.array_equal(make[0].zero, make[1].zero)
    grid = make[0]
    assert np.all(np.isfinite(grid.scale))
    assert np.all(grid.scale > 0)
    assert np.all((grid.zero >= low) & (grid.zero <= high))
    groups = -(-weight.shape[1] // grid.block) if grid.block else 1
    assert grid.scale.shape == grid.zero.shape == (len(weight), groups)
    assert grid.scale.dtype == np.float32
    zeros = np.zeros_like(weight)
    assert np.array_equal(decode(nearest(zeros, grid), grid), zeros)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_stay_zeros(method, symmetric):
    weight = np.zeros((2, 5), np.float32)
    grid = fit(weight, -8, 7, symmetric=symmetric, method=method, block=2)
    assert np.array_equal(decode(nearest(weight, grid), grid), weight)
    assert np.array_equal(nearest(weight, grid), grid.columns(5)[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-44, 1e38])
def test_constant_rows_keep_their_value(method, value):
    weight = np.full((2, 4), value, np.float32)
    grid = fit(weight, -127, 127, method=method)
    assert np.allclose(
        decode(nearest(weight, grid), grid), weight, rtol=0.005, atol=1e-37
    )


def test_a_single_column_is_exact():
    weight = np.array([[1.5], [-2.25], [0.0]], np.float32)
    grid = fit(weight, -127, 127)
    assert np.allclose(decode(nearest(weight, grid), grid), weight, rtol=1e-6)
    gram = np.array([[4.0]])
    for codes in (gptq(weight, gram, grid), descend(weight, gram, grid)):
        assert error(weight, codes, grid, gram) < 1e-10


def test_symmetric_grids_have_the_middle_code_for_zero():
    weight = np.array([[-1.0, 2.0]], np.float32)
    assert fit(weight, 0, 255).zero[0, 0] == 128
    assert fit(weight, -127, 127).zero[0, 0] == 0
    assert fit(weight, -127, 127).scale[0, 0] == np.float32(2 / 127)
    # -8 reaches further than 7.
    assert fit(-weight, -8, 7).scale[0, 0] == np.float32(2 / 8)


def test_asymmetric_grids_reach_from_end_to_end():
    weight = np.array([[-1.0, 2.0, 0.5]], np.float32)
    grid = fit(weight, 0, 3, symmetric=False)
    assert grid.scale[0, 0] == 1.0
    assert nearest(weight, grid).tolist() == [[0, 3, 1]]  # 0.5 + 1: halves to even + 1


def test_the_last_block_may_have_fewer_columns():
    weight = np.array([[1.0, 7.0, 2.0, 14.0, 0.7]], np.float32)
    grid = fit(weight, -7, 7, block=2)
    assert np.allclose(grid.scale, [[1, 2, 0.1]])
    assert nearest(weight, grid).tolist() == [[1, 7, 1, 7, 7]]
    assert np.allclose(decode(nearest(weight, grid), grid), weight)


def test_ternary_scale_is_that_of_ternary_weight_networks():
    weight = np.array([[0.1, -0.2, 1.0, -1.2]], np.float32)
    grid = fit(weight, -1, 1)
    # Threshold .7 * mean = .4375; the scale is the mean size beyond it.
    assert grid.scale[0, 0] == pytest.approx(1.1)
    assert nearest(weight, grid).tolist() == [[0, 0, 1, -1]]


def test_binary_weights_are_the_sign_times_the_mean_size():
    weight = np.array([[0.1, -0.2, 1.0, -1.1]], np.float32)
    grid = fit(weight, -1, 1, step=2)
    assert grid.scale[0, 0] == pytest.approx(0.6)
    assert nearest(weight, grid).tolist() == [[1, -1, 1, -1]]


@given(weights, codes_of, st.booleans(), st.integers(0, 4))
def test_mse_is_no_worse_than_the_whole_range(weight, codes, symmetric, block):
    def squared(method):
        grid = fit(weight, *codes, symmetric=symmetric, block=block, method=method)
        return error(weight, nearest(weight, grid), grid)

    assert squared("mse") <= squared("minmax") * 1.00001 + 1e-9


def test_mse_finds_what_a_dense_search_finds():
    weight = np.random.default_rng(1).standard_t(4, size=(1, 400)).astype(np.float32)
    grid = fit(weight, -8, 7, method="mse")
    best = min(
        float(np.square(np.clip(np.rint(weight / s), -8, 7) * s - weight).sum())
        for s in np.abs(weight).max() / 7 * np.linspace(0.05, 1.1, 2000)
    )
    assert error(weight, nearest(weight, grid), grid) <= 1.01 * best


def test_hqq_cares_less_about_outliers_than_mse():
    draws = np.random.default_rng(0)
    weight = draws.normal(size=(4, 256)).astype(np.float32)
    weight[:, :3] *= 12

    def median(method):
        grid = fit(weight, 0, 7, symmetric=False, method=method)
        return np.median(np.abs(decode(nearest(weight, grid), grid) - weight))

    assert median("hqq") < 0.5 * median("minmax")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [0, 16])
def test_learned_ranges_beat_mse_in_the_output_error(symmetric, block):
    weight, gram = layer()

    def output_error(method):
        grid = fit(
            weight, 0, 15, symmetric=symmetric, block=block, method=method, gram=gram
        )
        return error(weight, nearest(weight, grid), grid, gram)

    assert output_error("learned") < 0.95 * output_error("mse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"low": 3, "high": 3}, "make no grid"),
        ({"low": -1, "high": 2, "step": 2}, "make no grid"),
        ({"block": -1}, "block is a number"),
        ({"method": "kl"}, "minmax, mse, hqq and learned"),
    ],
)
def test_senseless_grids_are_refused(arguments, said):
    options = {"low": -8, "high": 7, **arguments}
    with pytest.raises(UsageError, match=said):
        fit(np.ones((2, 2), np.float32), **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = np.array([[1.0, bad]], np.float32)
    grid = Grid(np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), -8, 7)
    with pytest.raises(ModelError, match="1 weights are NaN or infinite"):
        fit(weight, -8, 7)
    with pytest.raises(ModelError, match="NaN or infinite"):
        nearest(weight, grid)
    with pytest.raises(ModelError, match="activations"):
        gptq(np.ones((1, 2), np.float32), np.full((2, 2), bad), grid)


@pytest.mark.parametrize("choose", [gptq, descend])
def test_negative_damping_is_refused(choose):
    weight, gram = layer()
    with pytest.raises(UsageError, match="damping is a number from 0 on"):
        choose(weight, gram, fit(weight, -8, 7), damping=-1)


def test_damped_descent_gives_more_on_other_samples():
    draws = np.random.default_rng(0)
    weight = draws.normal(size=(20, 60)).astype(np.float32)
    few, many = (draws.normal(size=(rows, 60)) for rows in (70, 5000))
    grid = fit(weight, -8, 7, method="mse")
    seen, unseen = few.T @ few, many.T @ many
    errors = [
        error(weight, descend(weight, seen, grid, damping=d), grid, unseen)
        for d in (0.0, 0.3)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_gram_matrix_of_another_layer_is_refused():
    weight, gram = layer()
    grid = fit(weight, -8, 7)
    with pytest.raises(UsageError, match="does not belong"):
        gptq(weight, gram[:-1, :-1], grid)


# --- codes ----------------------------------------------------------------------------


def naive_gptq(weight, gram, grid, damping=0.01):
    """Optimal brain quantization from left to right, with dense inverses."""
    left = weight.astype(np.float64).copy()
    n = weight.shape[1]
    scale, zero = (np.broadcast_to(a, weight.shape) for a in grid.columns(n))
    damped = gram + damping * np.mean(np.diag(gram)) * np.eye(n)
    codes = np.zeros(weight.shape, np.int32)
    for at in range(n):
        # The inverse over the columns that are still free.
        inverse = np.linalg.inv(damped[at:, at:])
        code = np.rint(left[:, at] / scale[:, at].astype(np.float64)) + zero[:, at]
        codes[:, at] = np.clip(code, grid.low, grid.high)
        lost = left[:, at] - (codes[:, at] - zero[:, at]) * scale[:, at].astype(float)
        left[:, at:] -= np.outer(lost / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("block", [0, 16])
def test_gptq_is_what_dense_inverses_give(block):
    weight, gram = layer(outputs=5, inputs=150)
    grid = fit(weight, -8, 7, block=block, method="mse")
    ours = gptq(weight, gram, grid, act_order=False)
    assert np.array_equal(ours, naive_gptq(weight, gram, grid))


def test_act_order_takes_large_inputs_first_with_their_own_scales():
    weight, gram = layer(inputs=24)
    grid = fit(weight, -8, 7, block=8)
    order = np.argsort(-np.diag(gram), kind="stable")
    scale, zero = grid.columns(24)
    turned = Grid(scale[:, order], zero[:, order], -8, 7, block=1)
    expected = np.empty(weight.shape, np.int32)
    expected[:, order] = naive_gptq(
        weight[:, order], gram[np.ix_(order, order)], turned
    )
    assert np.array_equal(gptq(weight, gram, grid), expected)


CHOOSERS = {
    "gptq": gptq,
    "adaround": lambda w, g, grid: adaround(w, g, grid, iterations=40),
    "descend": descend,
}


@pytest.mark.parametrize("name", CHOOSERS)
@settings(max_examples=40)
@given(weights, codes_of, st.integers(0, 4), st.integers(0, 10), st.integers(0, 3))
def test_no_row_is_worse_than_rounded_to_nearest(
    name, weight, codes, block, seed, dead
):
    inputs = weight.shape[1]
    x = np.random.default_rng(seed).normal(size=(5, inputs))
    x[:, :dead] = 0
    gram = x.T @ x
    grid = fit(weight, *codes, block=block)
    found = CHOOSERS[name](weight, gram, grid)
    assert found.dtype == np.int32
    assert np.all((found >= codes[0]) & (found <= codes[1]))
    assert np.array_equal(found, CHOOSERS[name](weight, gram, grid))
    plain = nearest(weight, grid)
    for row in range(len(weight)):
        at = slice(row, row + 1)
        errors = [error(weight[at], c[at], grid.rows(at), gram) for c in (found, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("codes", [(-127, 127), (-8, 7), (-1, 1)])
def test_gptq_then_descent_beats_each_alone(codes):
    weight, gram = layer(outputs=30, inputs=60)
    grid = fit(weight, *codes, method="mse")
    errors = {
        "nearest": error(weight, nearest(weight, grid), grid, gram),
        "gptq": error(weight, gptq(weight, gram, grid), grid, gram),
        "descend": error(weight, descend(weight, gram, grid, damping=0), grid, gram),
    }
    both = descend(weight, gram, grid, gptq(weight, gram, grid), damping=0)
    assert errors["gptq"] < 0.7 * errors["nearest"]
    assert error(weight, both, grid, gram) < min(errors.values())


def test_descent_ends_where_no_single_code_can_move():
    weight, gram = layer(outputs=3, inputs=12)
    grid = fit(weight, -4, 3, method="mse")
    codes = descend(weight, gram, grid, sweeps=100, damping=0)
    for row in range(3):
        at = slice(row, row + 1)
        least = error(weight[at], codes[at], grid.rows(at), gram)
        for column in range(12):
            for code in range(-4, 4):
                other = codes[at].copy()
                other[0, column] = code
                moved = error(weight[at], other, grid.rows(at), gram)
                assert moved >= least * (1 - 1e-9)


def test_adaround_rounds_up_or_down_and_gains():
    weight, gram = layer(outputs=8, inputs=30)
    grid = fit(weight, -8, 7, method="mse")
    codes = adaround(weight, gram, grid)
    exact = weight / grid.scale
    inside = (exact > -8) & (exact < 7)
    assert np.all(np.abs(codes - exact)[inside] < 1)
    plain = error(weight, nearest(weight, grid), grid, gram)
    assert error(weight, codes, grid, gram) < 0.8 * plain


def test_adaround_finds_nearly_the_best_of_all_roundings():
    weight, gram = layer(outputs=1, inputs=10, seed=3)
    grid = fit(weight, -4, 3)
    floor = np.floor(weight / grid.scale).astype(np.int32)
    ups = np.indices((2,) * 10).reshape(10, -1).T
    tried = np.clip(floor + ups, -4, 3)
    change = decode(tried, Grid(grid.scale, grid.zero, -4, 3)) - weight
    best = np.einsum("oi,ij,oj->o", change, gram, change).min()
    plain = error(weight, nearest(weight, grid), grid, gram)
    found = error(weight, adaround(weight, gram, grid), grid, gram)
    assert best <= found * (1 + 1e-6)
    assert found <= best + 0.3 * (plain - best)


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_stack_of_layers_is_each_layer_by_itself(name):
    parts = [layer(outputs=2, inputs=9, seed=seed) for seed in range(3)]
    weight = np.concatenate([w for w, _ in parts])
    gram = np.stack([g for _, g in parts])
    grid = fit(weight, -8, 7, block=4, method="learned", gram=gram)
    together = CHOOSERS[name](weight, gram, grid)
    for index, (one, matrix) in enumerate(parts):
        rows = slice(2 * index, 2 * index + 2)
        alone = fit(one, -8, 7, block=4, method="learned", gram=matrix)
        assert np.allclose(grid.scale[rows], alone.scale)
        assert np.array_equal(
            together[rows], CHOOSERS[name](one, matrix, grid.rows(rows))
        )
    total = sum(
        error(w, together[2 * i : 2 * i + 2], grid.rows(slice(2 * i, 2 * i + 2)), g)
        for i, (w, g) in enumerate(parts)
    )
    assert error(weight, together, grid, gram) == pytest.approx(total)


def test_pieces_of_bounded_size_give_the_same(monkeypatch: pytest.MonkeyPatch):
    weight, gram = layer(outputs=7, inputs=20)
    stack = np.stack([gram] * 7)

    def everything():
        grid = fit(weight, -8, 7, block=8, method="learned", gram=gram)
        return [
            grid.scale,
            nearest(weight, grid),
            *(choose(weight, gram, grid) for choose in CHOOSERS.values()),
            gptq(weight, stack, grid),
            np.array(error(weight, nearest(weight, grid), grid, gram)),
        ]

    whole = everything()
    monkeypatch.setattr("onnxshrink.solvers.rounding._CHUNK", 45)
    for one, other in zip(whole, everything(), strict=True):
        assert np.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("method", [gptq, descend, adaround])
@pytest.mark.parametrize(("low", "high", "symmetric"), [(-7, 7, True), (0, 15, False)])
def test_pruned_weights_stay_zero(method, low, high, symmetric):
    weight, gram = layer(8, 48)
    weight[np.random.default_rng(1).random(weight.shape) < 0.8] = 0
    grid = fit(weight, low, high, symmetric=symmetric, block=16)

    codes = method(weight, gram, grid)

    assert np.all(decode(codes, grid)[weight == 0] == 0)
    plain = nearest(weight, grid)
    assert error(weight, codes, grid, gram) <= error(weight, plain, grid, gram)


def test_many_small_matrices_are_inverted_as_one_is():
    draws = np.random.default_rng(0)
    x = draws.normal(size=(40, 60, 9)) @ draws.normal(size=(9, 9))
    gram = np.einsum("gri,grj->gij", x, x)
    gram[3] = 0
    gram[5, 2] = gram[5, :, 2] = 0
    weight = draws.normal(size=(80, 9)).astype(np.float32)
    grid = fit(weight, -7, 7)

    together = gptq(weight, gram, grid)

    alone = [
        gptq(weight[2 * i : 2 * i + 2], gram[i], grid.rows(slice(2 * i, 2 * i + 2)))
        for i in range(40)
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))


# --- inputs that are always zero ------------------------------------------------------


@pytest.mark.parametrize("stacks", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("method", [gptq, descend])
def test_inputs_that_are_always_zero_change_nothing_for_the_others(
    method, damping, stacks
):
    pairs = [layer(40, 12, seed) for seed in range(stacks)]
    weight = np.concatenate([one for one, _ in pairs])
    gram = np.stack([matrix for _, matrix in pairs])
    grid = fit(weight, -8, 7, method="mse", gram=gram)
    alive = np.ones(20, bool)
    alive[[0, 2, 3, 7, 12, 17, 18, 19]] = False
    wide = np.random.default_rng(9).normal(size=(len(weight), 20)).astype(np.float32)
    wide[:, alive] = weight
    with_dead = np.zeros((stacks, 20, 20))
    with_dead[np.ix_(range(stacks), alive, alive)] = gram
    # Of descend, damping is a share of the mean over all inputs, dead or not.
    more = 20 / 12 if method is descend else 1
    plain = method(weight, gram, grid, damping=damping)
    found = method(wide, with_dead, grid, damping=damping * more)
    assert np.array_equal(found[:, alive], plain)
    assert np.array_equal(found[:, ~alive], nearest(wide, grid)[:, ~alive])


def test_units_change_no_code_beside_an_input_that_is_always_zero():
    weight, gram = layer(5, 12)
    row = fit(weight, -8, 7, method="mse").scale.repeat(13, axis=1)
    grid = Grid(row[:, 1:], np.zeros((5, 12), np.int32), -8, 7, block=1)
    plain = gptq(weight, gram, grid, act_order=False, damping=0.0)
    unit = np.ones(13)
    unit[[5, 9]] = 2.0**-20, 2.0**-16
    with_dead, wide = np.zeros((13, 13)), np.ones((5, 13))
    with_dead[1:, 1:], wide[:, 1:] = gram, weight
    with_dead *= np.outer(unit, unit)
    wide = (wide / unit).astype(np.float32)
    scale = (row / unit).astype(np.float32)
    grid = Grid(scale, np.zeros((5, 13), np.int32), -8, 7, block=1)
    found = gptq(wide, with_dead, grid, act_order=False, damping=0.0)
    assert np.array_equal(found[:, 1:], plain)


def test_weights_of_inputs_that_are_always_zero_choose_the_grid_where_no_other_does():
    weight = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    weight[:, :3] = 0
    gram = np.zeros((9, 9))
    gram[:3, :3] = np.eye(3)
    found = fit(weight, -2, 1, symmetric=False, method="mse", gram=gram)
    alone = fit(weight, -2, 1, symmetric=False, method="mse")
    assert np.allclose(found.scale, alone.scale, rtol=1e-5)
    assert not np.allclose(found.scale, fit(weight, -2, 1, symmetric=False).scale)
