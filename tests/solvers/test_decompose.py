"""Decomposed kernels: exact at full rank, and as large as the papers say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import correlate

from onnxshrink.errors import UsageError
from onnxshrink.solvers import decompose
from onnxshrink.solvers.decompose import Chain, Form

Array = NDArray[Any]
SHAPES = [(6, 4, 3, 3), (4, 7, 3, 5), (3, 9, 3), (5, 4, 1, 1), (4, 3, 2, 3, 2)]


def draw(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def second_moment(order: int) -> Array:
    x = draw((3 * order, order), 1) @ draw((order, order), 2)
    x[:, 0] = 0
    return np.asarray(x.T @ x / len(x))


def decomposed(
    form: Form, kernel: Array, ranks: tuple[int, ...], moment: Array | None = None
) -> Chain:
    if form == "tucker":
        return decompose.tucker(kernel, (ranks[0], ranks[1]), moment)
    if form == "channel":
        return decompose.channel(kernel, ranks[0], moment)
    make = decompose.cp if form == "cp" else decompose.spatial
    return make(kernel, ranks[0], moment)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", decompose.FORMS)
def test_full_rank_gives_the_kernel_back(
    form: Form, shape: tuple[int, ...], data: bool
) -> None:
    if form == "spatial" and len(shape) < 4:
        with pytest.raises(UsageError, match="two axes"):
            decompose.spatial(draw(shape), 1)
        return
    kernel = draw(shape)
    moment = second_moment(kernel[0].size) if data else None
    chain = decomposed(form, kernel, decompose.full_ranks(form, shape), moment)
    np.testing.assert_allclose(chain.composed(), kernel, atol=1e-10)
    assert decompose.refit(kernel, chain, moment).ranks == chain.ranks


@given(
    form=st.sampled_from(decompose.FORMS),
    shape=st.sampled_from([s for s in SHAPES if len(s) > 3]),
    share=st.floats(0.1, 1),
    data=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_refitting_never_makes_it_worse(
    form: Form, shape: tuple[int, ...], share: float, data: bool
) -> None:
    kernel = draw(shape)
    moment = second_moment(kernel[0].size) if data else None
    full = decompose.full_ranks(form, shape)
    ranks = tuple(max(1, round(share * rank)) for rank in full)
    chain = decomposed(form, kernel, ranks, moment)
    assert chain.ranks == ranks
    assert chain.parameters == decompose.parameters(form, shape, ranks)
    again = decompose.refit(kernel, chain, moment)
    before = decompose.error(kernel, chain, moment)
    assert decompose.error(kernel, again, moment) <= before * (1 + 1e-9) + 1e-9
    assert again.ranks == ranks


def test_parameters_are_those_of_the_papers() -> None:
    """Jaderberg et al. section 3.1, Zhang et al. 3.1, Kim et al. equation 7."""
    shape = (64, 32, 3, 3)
    assert decompose.parameters("spatial", shape, (10,)) == 10 * (32 * 3 + 64 * 3)
    assert decompose.parameters("channel", shape, (10,)) == 10 * (32 * 9 + 64)
    tucker = 32 * 5 + 5 * 7 * 9 + 7 * 64
    assert decompose.parameters("tucker", shape, (5, 7)) == tucker
    assert decompose.parameters("cp", shape, (10,)) == 10 * (32 + 9 + 64)


def test_the_channel_form_is_the_svd_of_the_flat_kernel() -> None:
    kernel = draw((6, 4, 3, 3))
    values = np.linalg.svd(kernel.reshape(6, -1))[1]
    for rank in range(1, 7):
        chain = decompose.channel(kernel, rank)
        wanted = float(np.square(values[rank:]).sum())
        assert decompose.error(kernel, chain) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_separable_kernels_need_one_channel_whichever_axis_is_first(
    turned: bool,
) -> None:
    kernels = []
    for seed in (0, 10):
        one, two = draw((1, 3, 3, 1), seed), draw((5, 1, 1, 3), seed + 1)
        kernel = np.einsum("rchw,orxy->ochy", one, two)
        kernels.append(np.swapaxes(kernel, 2, 3) if turned else kernel)
    chains = decompose.decomposed("spatial", kernels, (1,))
    shapes = {tuple(part.shape for part in chain.kernels) for chain in chains}
    along = ((1, 3, 1, 3), (5, 1, 3, 1)) if turned else ((1, 3, 3, 1), (5, 1, 1, 3))
    assert shapes == {along}
    image = draw((3, 7, 8), 4)
    for kernel, chain in zip(kernels, chains, strict=True):
        np.testing.assert_allclose(chain.composed(), kernel, atol=1e-12)
        values = image
        for part in chain.kernels:
            values = np.stack([correlate(values, k, "valid")[0] for k in part])
        wanted = np.stack([correlate(image, k, "valid")[0] for k in kernel])
        np.testing.assert_allclose(values, wanted, atol=1e-10)


@pytest.mark.parametrize("form", decompose.FORMS)
def test_outputs_that_weigh_more_are_fitted_better(form: Form) -> None:
    kernel = draw((8, 6, 3, 3))
    weights = np.array([[100.0] * 4 + [1.0] * 4])
    ranks = (4, 4) if form == "tucker" else (4,)
    errors = []
    for outputs in (None, weights):
        (chain,) = decompose.decomposed(form, [kernel], ranks, None, outputs)
        missing = np.square(kernel - chain.composed()).sum(axis=(1, 2, 3))
        errors.append(missing)
    assert errors[1][:4].sum() < 0.7 * errors[0][:4].sum()
    assert errors[1][4:].sum() > errors[0][4:].sum()


@pytest.mark.parametrize("form", decompose.FORMS)
@pytest.mark.parametrize("data", [False, True])
def test_losses_said_before_are_near_those_after(form: Form, data: bool) -> None:
    kernel = draw((8, 6, 3, 3))
    moment = second_moment(54) if data else None
    full = decompose.full_ranks(form, kernel.shape)
    choices = [tuple(max(1, r * n // 4) for r in full) for n in range(1, 5)]
    said = decompose.losses(form, kernel, choices, moment)
    assert said == sorted(said, reverse=True)
    assert said[-1] < 1e-9 * said[0]
    for ranks, loss in zip(choices[:-1], said, strict=False):
        chain = decomposed(form, kernel, ranks, moment)
        after = decompose.error(kernel, decompose.refit(kernel, chain, moment), moment)
        if form == "channel":
            assert after == pytest.approx(loss, rel=0.02)
        elif not data:
            assert after <= loss * (1 + 1e-9)


@pytest.mark.parametrize("form", decompose.FORMS)
def test_data_makes_the_outputs_better_not_the_kernel(form: Form) -> None:
    kernel = draw((8, 6, 3, 3))
    moment = second_moment(54)
    ranks = (3, 4) if form == "tucker" else (4,)
    plain, seen = (
        decompose.refit(kernel, decomposed(form, kernel, ranks, m), m)
        for m in (None, moment)
    )
    outputs = [decompose.error(kernel, chain, moment) for chain in (plain, seen)]
    values = [decompose.error(kernel, chain) for chain in (plain, seen)]
    assert outputs[1] < 0.8 * outputs[0]
    assert values[0] < values[1]


def test_tucker_refitted_is_at_least_as_good_as_each_of_its_sides() -> None:
    """HOOI ends in a stationary point: no other projection of one side is better."""
    kernel = draw((8, 6, 3, 3))
    chain = decompose.refit(kernel, decompose.tucker(kernel, (4, 5)), sweeps=20)
    again = decompose.refit(kernel, chain, sweeps=20, steps=60)
    first, last = (decompose.error(kernel, c) for c in (chain, again))
    assert last == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_that_there_is_not_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="ranks from 1 to 12"):
        decompose.spatial(draw((6, 4, 3, 3)), rank)
