"""Statistics of activations against formulas written out with numpy and scipy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.signal import correlate

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics import (
    ChannelNorm,
    ConvGram,
    ConvNorm,
    ConvSample,
    ConvWindow,
    Counts,
    Gram,
    Histogram,
    Mean,
    Moments,
    Multi,
    Range,
    Sample,
    Statistic,
)

RNG = np.random.default_rng(5)


def fed(statistic: Statistic, *batches: np.ndarray) -> Any:
    for batch in batches:
        statistic.update(np.asarray(batch))
    return statistic


def unfold(x: np.ndarray, window: ConvWindow) -> np.ndarray:
    """im2col by loops: [rows, group, in / group * kernel], rows in output order."""
    padded = window.padded(x)
    out = window.output(padded.shape[2:])
    rows = []
    for sample in padded:
        for at in np.ndindex(*out):
            index = tuple(
                slice(a * s, a * s + (k - 1) * d + 1, d)
                for a, s, k, d in zip(
                    at, window.steps, window.kernel, window.spreads, strict=True
                )
            )
            rows.append(sample[(slice(None), *index)].reshape(window.group, -1))
    return np.stack(rows).astype(np.float64)


# Range


def test_range_of_a_tensor_is_its_minimum_and_maximum():
    r = fed(Range(), [[1.0, -3.0]], [[2.0, 0.0]])
    assert (float(r.low), float(r.high), r.count) == (-3.0, 2.0, 4)


def test_range_by_channel_follows_the_axis():
    r = fed(Range(axis=1), np.arange(12.0).reshape(2, 3, 2))
    assert r.low.tolist() == [0, 2, 4]
    assert r.high.tolist() == [7, 9, 11]


def test_range_leaves_out_nan_and_infinity_and_counts_them():
    r = fed(Range(), np.array([1.0, np.nan, np.inf, -np.inf, -2.0], np.float32))
    assert (float(r.low), float(r.high)) == (-2.0, 1.0)
    assert (r.nan, r.inf) == (1, 2)


def test_range_counts_the_fills_of_an_attention_mask():
    mask = np.array([0, np.finfo(np.float32).min], np.float32)
    assert fed(Range(), mask).fills == 1


def test_range_of_nothing_is_empty():
    assert fed(Range(), np.zeros((0, 3))).empty
    assert not fed(Range(), np.zeros(1)).empty


def test_range_reads_float16_and_integers():
    assert float(fed(Range(), np.array([1, 2], np.float16)).high) == 2
    assert float(fed(Range(), np.array([1, 255], np.uint8)).high) == 255


def test_a_channel_count_that_changes_is_refused():
    with pytest.raises(ModelError, match="channels"):
        fed(Range(axis=1), np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ModelError, match="number of channels changes"):
        fed(ChannelNorm(), np.zeros((2, 3)), np.zeros((2, 4)))


def test_strings_are_refused():
    with pytest.raises(ModelError, match="numbers"):
        fed(Range(), np.array(["a"]))


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="axis 3"):
        fed(ChannelNorm(axis=3), np.zeros((2, 3)))


# ChannelNorm, Moments, Mean


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channel_norm_is_the_euclidean_norm_over_all_other_axes(axis: int):
    x = RNG.normal(size=(4, 5, 6)).astype(np.float32)
    others = tuple(a for a in range(3) if a != axis % 3)
    n = fed(ChannelNorm(axis=axis), x[:1], x[1:]) if axis else fed(ChannelNorm(0), x)
    np.testing.assert_allclose(n.norm, np.linalg.norm(x, axis=others), rtol=1e-6)
    assert n.rows == x.size // x.shape[axis]


def test_channel_norm_reads_many_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onnxshrink.statistics.base.CHUNK", 7)
    x = RNG.normal(size=(3, 2, 5))
    n = fed(ChannelNorm(axis=1), x)
    np.testing.assert_allclose(n.squares, (x * x).sum((0, 2)))


def test_moments_far_from_zero_keep_their_variance():
    x = RNG.normal(size=(200, 3)) + 1e8
    m = fed(Moments(axis=1), x[:70], x[70:71], x[71:])
    np.testing.assert_allclose(m.mean, x.mean(0))
    np.testing.assert_allclose(m.variance, x.var(0), rtol=1e-6)
    assert m.count == 200


def test_mean_of_a_tensor_is_a_scalar():
    m = fed(Mean(), np.full((2, 2), 3.0), np.full((2, 2), 5.0))
    assert m.mean.shape == ()
    assert float(m.mean) == 4.0


# Gram


def test_gram_is_the_matrix_of_inner_products():
    x = RNG.normal(size=(3, 50, 7)).astype(np.float32)
    g = fed(Gram(), x[:1], x[1:])
    flat = x.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(g.matrix, flat.T @ flat, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(g.sums, flat.sum(0), rtol=1e-6, atol=1e-6)
    assert g.rows == 150


def test_gram_of_a_middle_axis_takes_the_rest_as_rows():
    x = RNG.normal(size=(3, 4, 5))
    flat = np.moveaxis(x, 1, 2).reshape(-1, 4)
    np.testing.assert_allclose(fed(Gram(axis=1, exact=True), x).matrix, flat.T @ flat)


def test_gram_of_huge_values_does_not_overflow():
    g = fed(Gram(), np.full((2, 1), 1e25, np.float32))
    np.testing.assert_allclose(g.matrix, [[2e50]], rtol=1e-6)


def test_gram_of_a_value_too_large_to_square_is_not_finite():
    g = fed(Gram(), np.array([[1e200, 0.0]]))
    assert not np.isfinite(g.matrix).all()


def test_a_gram_matrix_beyond_the_limit_is_refused():
    with pytest.raises(ModelError, match="more than the limit"):
        fed(Gram(limit_bytes=100), np.zeros((1, 4)))


# Convolutions

WINDOWS = [
    ((2, 3, 9), ConvWindow((3,))),
    ((2, 4, 9), ConvWindow((3,), strides=(2,), pads=(1, 2), group=2)),
    ((2, 3, 7, 6), ConvWindow((3, 2), pads=(1, 0, 1, 1))),
    ((3, 4, 7, 6), ConvWindow((3, 3), strides=(2, 1), dilations=(1, 2), group=4)),
    ((2, 2, 7, 6), ConvWindow((3, 2), strides=(2, 2), auto_pad="SAME_UPPER")),
    ((2, 2, 7, 6), ConvWindow((2, 2), strides=(2, 2), auto_pad="SAME_LOWER")),
    ((2, 2, 7, 6), ConvWindow((1, 1), strides=(2, 2), auto_pad="VALID")),
    ((1, 2, 5, 4, 5), ConvWindow((3, 2, 2), pads=(1,) * 6)),
]


@pytest.mark.parametrize(("shape", "window"), WINDOWS)
def test_conv_gram_is_the_gram_matrix_of_im2col(shape: Any, window: ConvWindow):
    x = RNG.normal(size=shape).astype(np.float32)
    patches = unfold(x, window)
    expected = np.einsum("rgi,rgj->gij", patches, patches)
    g = fed(ConvGram(window), x[:1], x[1:])
    np.testing.assert_allclose(g.matrix, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(g.sums, patches.sum(0), rtol=1e-5, atol=1e-5)
    assert g.rows == len(patches)


@pytest.mark.parametrize(("shape", "window"), WINDOWS)
def test_conv_norm_is_the_diagonal_of_conv_gram(shape: Any, window: ConvWindow):
    x = RNG.normal(size=shape)
    g = fed(ConvGram(window, exact=True), x)
    n = fed(ConvNorm(window), x)
    assert n.squares.shape == (window.group, shape[1] // window.group, *window.kernel)
    diagonal = np.einsum("gii->gi", g.matrix).reshape(n.squares.shape)
    np.testing.assert_allclose(n.squares, diagonal, rtol=1e-9)
    assert n.rows == g.rows


def test_conv_gram_gives_the_output_of_the_convolution():
    # w^T G w is the summed square of the output, computed here by scipy.
    x = RNG.normal(size=(1, 2, 6, 6))
    w = RNG.normal(size=(1, 2, 3, 3))
    out = correlate(x, w, mode="valid")
    g = fed(ConvGram(ConvWindow((3, 3)), exact=True), x).matrix[0]
    np.testing.assert_allclose(w.ravel() @ g @ w.ravel(), (out**2).sum())


@pytest.mark.parametrize("chunk", [1, 50, 400])
def test_conv_statistics_do_not_depend_on_the_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int
):
    window = ConvWindow((3, 3), pads=(1, 1, 1, 1), group=2)
    x = RNG.normal(size=(3, 4, 5, 6))
    gram = fed(ConvGram(window, exact=True), x).matrix
    norm = fed(ConvNorm(window), x).squares
    monkeypatch.setattr("onnxshrink.statistics.base.CHUNK", chunk)
    np.testing.assert_allclose(fed(ConvGram(window, exact=True), x).matrix, gram)
    np.testing.assert_allclose(fed(ConvNorm(window), x).squares, norm)


def test_conv_gram_on_a_grid_uses_that_many_positions_of_each_sample():
    x = RNG.normal(size=(2, 1, 8, 8))
    window = ConvWindow((1, 1))
    g = fed(ConvGram(window, positions=4, exact=True), x)
    chosen = x.reshape(2, 64)[:, [8, 24, 40, 56]]
    assert g.rows == 8
    np.testing.assert_allclose(g.matrix, [[[(chosen**2).sum()]]])


def test_negative_pads_crop():
    x = np.arange(5.0).reshape(1, 1, 5)
    assert ConvWindow((1,), pads=(-1, 1)).padded(x).tolist() == [[[1, 2, 3, 4, 0]]]


def test_a_window_reads_the_attributes_of_a_conv():
    attrs = {"strides": [2, 1], "pads": [1, 2, 3, 4], "group": 3, "auto_pad": "NOTSET"}
    assert ConvWindow.of(attrs, (6, 2, 3, 5)) == ConvWindow(
        (3, 5), (2, 1), (1, 2, 3, 4), (), 3
    )
    same = ConvWindow.of({"auto_pad": b"SAME_LOWER"}, (6, 2, 3, 5))
    assert same.auto_pad == "SAME_LOWER"


def test_a_conv_statistic_refuses_a_value_of_the_wrong_rank():
    with pytest.raises(ModelError, match="shape"):
        fed(ConvGram(ConvWindow((3, 3))), np.zeros((2, 3, 4)))
    with pytest.raises(ModelError, match="2 groups"):
        fed(ConvNorm(ConvWindow((3,), group=2)), np.zeros((2, 3, 4)))


def test_conv_statistics_take_no_positions_from_an_input_smaller_than_the_kernel():
    window = ConvWindow((5, 5))
    assert fed(ConvGram(window), np.ones((1, 1, 3, 3))).rows == 0
    assert fed(ConvNorm(window), np.ones((1, 1, 3, 3))).rows == 0


# Histogram


def test_histogram_counts_every_value_in_its_bin():
    x = RNG.normal(size=5000)
    h = fed(Histogram(bins=64), x[:17], x[17:3000] * 1.0, x[3000:])
    expected, _ = np.histogram(x, h.edges)
    assert h.counts.tolist() == expected.tolist()
    assert len(h.counts) <= 64
    assert len(h.counts) > 30
    assert np.log2(h.width) % 1 == 0


def test_histogram_keeps_zeros_and_mask_fills_apart():
    fill = np.finfo(np.float32).min
    h = fed(Histogram(), np.array([0, 0, 1.5, fill, np.nan, np.inf], np.float32))
    assert (h.zeros, h.count, h.apart) == (2, 3, 3)
    assert (h.low, h.high) == (0.0, 1.5)


def test_histogram_quantiles_are_within_a_bin():
    x = RNG.exponential(size=20000)
    h = fed(Histogram(bins=1024), x)
    for share in (0.0, 0.01, 0.5, 0.999, 1.0):
        assert abs(h.quantile(share) - np.quantile(x, share)) <= 2 * h.width


def test_histogram_of_one_value_is_one_bin():
    h = fed(Histogram(), np.full(10, 0.3))
    assert h.counts.tolist() == [10]
    assert h.edges[0] <= 0.3 < h.edges[1]


def test_histogram_of_zeros_grows_to_any_later_range():
    h = fed(Histogram(bins=4), np.zeros(3), np.array([1e-40, 1e20, -1e20]))
    assert h.counts.sum() == 6
    assert h.edges[0] <= -1e20
    assert h.edges[-1] > 1e20


def test_a_number_of_bins_that_cannot_be_halved_is_refused():
    with pytest.raises(UsageError, match="power of two"):
        Histogram(bins=100)


# Sample


def test_sample_keeps_everything_that_fits_in_order():
    s = fed(Sample(size=5), [[1.0], [2.0]], [[3.0]])
    assert s.values.tolist() == [[1], [2], [3]]


def test_sample_takes_each_row_equally_often():
    rows = np.arange(40.0)[:, None]
    seen = np.zeros(40)
    for seed in range(400):
        seen[fed(Sample(size=10, seed=seed), rows).values[:, 0].astype(int)] += 1
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; 5 deviations.
    assert abs(seen - 100).max() < 44


def test_sample_does_not_depend_on_the_split():
    rows = RNG.normal(size=(100, 2))
    whole = fed(Sample(size=7), rows).values
    assert np.array_equal(fed(Sample(size=7), *np.array_split(rows, 9)).values, whole)


# Laws of every statistic

KINDS: list[Callable[[], Statistic]] = [
    Range,
    lambda: Range(axis=1),
    ChannelNorm,
    lambda: Moments(axis=1),
    Mean,
    lambda: Gram(exact=True),
    lambda: Histogram(bins=16),
    lambda: ConvNorm(ConvWindow((2,), pads=(1, 0))),
    lambda: ConvGram(ConvWindow((2,), group=3), exact=True),
    lambda: Multi(range=Range(), norm=ChannelNorm(axis=1)),
]

VALUES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 9), st.just(3), st.integers(1, 4)),
    elements=st.floats(-1e3, 1e3, width=32),
)


def state(statistic: Statistic) -> dict[str, Any]:
    if isinstance(statistic, Multi):
        return {name: state(part) for name, part in statistic.parts.items()}
    names = [f.name for f in dataclasses.fields(statistic)]
    return {n: getattr(statistic, n) for n in names if n != "_draws"}


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, np.ndarray) and one.dtype.kind == "f":
        np.testing.assert_allclose(one, two, rtol=1e-7, atol=1e-4)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two)
    else:
        assert one == two


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make().key[0])
@given(values=VALUES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_split_and_any_merge_give_what_one_batch_gives(
    make: Callable[[], Statistic], values: np.ndarray, data: st.DataObject
):
    one = data.draw(st.integers(0, len(values)))
    two = data.draw(st.integers(one, len(values)))
    parts = [values[:one], values[one:two], values[two:]]
    whole = fed(make(), values)
    split = fed(make(), *parts)
    left, right = fed(make(), parts[0]), fed(make(), parts[1])
    left.merge(right)
    left.merge(fed(make(), parts[2]))
    right = fed(make(), parts[1])
    right.merge(fed(make(), parts[2]))
    nested = fed(make(), parts[0])
    nested.merge(right)
    for other in (split, left, nested):
        assert_same(state(whole), state(other))


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make().key[0])
def test_a_fresh_statistic_has_the_same_key_and_nothing_gathered(
    make: Callable[[], Statistic],
):
    used = fed(make(), np.ones((2, 3, 4)))
    fresh = used.fresh()
    assert fresh.key == used.key
    assert hash(fresh.key) == hash(used.key)
    assert_same(state(fresh), state(make()))


def test_statistics_with_other_parameters_do_not_merge():
    with pytest.raises(UsageError, match="cannot merge"):
        Range(axis=1).merge(Range(axis=0))


def test_an_update_changes_neither_the_array_nor_keeps_it():
    x = np.ones((2, 3, 4), np.float32)
    for make in [*KINDS, Sample]:
        statistic = fed(make(), x)
        assert (x == 1).all()
        before = repr(state(statistic))
        x[:] = 7
        assert repr(state(statistic)) == before
        x[:] = 1


def test_a_sample_of_patches_gives_a_convolution_its_outputs() -> None:
    x = np.arange(2 * 4 * 3 * 3, dtype=np.float32).reshape(2, 4, 3, 3)
    window = ConvWindow((2, 2), pads=(1, 1, 0, 0), group=2)
    rows = fed(ConvSample(1000, window=window, positions=9), x).values
    weight = np.arange(2 * 2 * 2 * 2, dtype=np.float32).reshape(2, 2, 2, 2)
    products = np.einsum("rgi,gi->rg", rows.reshape(-1, 2, 8), weight.reshape(2, 8))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (1, 0)))
    for index, (n, i, j) in enumerate(np.ndindex(2, 3, 3)):
        patch = padded[n, :, i : i + 2, j : j + 2]
        wanted = [(patch[:2] * weight[0]).sum(), (patch[2:] * weight[1]).sum()]
        np.testing.assert_array_equal(products[index], wanted)


def test_counts_are_of_rows_that_are_looked_up_from_either_end() -> None:
    one, two = Counts(4), Counts(4)
    one.update(np.array([[0, 3, -1], [2, 2, -4]]))
    two.update(np.array([1, 4, -5]))  # the last two are no rows
    one.merge(two)
    assert one.counts.tolist() == [2, 1, 2, 2]


# --- NaN and infinity -----------------------------------------------------------------

ODD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "make", [Gram, ChannelNorm, lambda: Moments(axis=-1), lambda: Sample(axis=-1)]
)
def test_rows_of_nan_and_infinity_are_left_out(make: Any, odd: float):
    rows = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    spoilt = rows.copy()
    spoilt[1, 2, 0] = spoilt[4, 3] = odd
    kept = np.delete(rows.reshape(-1, 3), [6, 19], axis=0)
    found, expected = make(), make()
    found.update(spoilt)
    expected.update(kept[None])
    parts = ("matrix", "sums", "squares", "rows", "count", "mean", "variance")
    seen = [part for part in parts if hasattr(found, part)]
    assert seen
    for part in seen:
        assert np.allclose(getattr(found, part), getattr(expected, part))
    if isinstance(found, Sample):
        assert np.array_equal(found.values, kept)


@pytest.mark.parametrize("odd", ODD)
def test_patches_with_nan_or_infinity_are_left_out(odd: float):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 2, 6, 6)).astype(np.float32)
    spoilt = image.copy()
    spoilt[0, 1, 2, 3] = odd
    window = ConvWindow((3, 3), pads=(1, 1, 1, 1), group=2)
    patches = window.patches(window.padded(image))
    broken = np.zeros((2, 6, 6), bool)
    broken[0, 1:4, 2:5] = True  # what a 3x3 window at row 2, column 3 belongs to
    kept = patches[:, :, :, :].transpose(0, 2, 3, 1, 4, 5)[~broken].reshape(-1, 2, 9)
    gram, norm, sample = ConvGram(window), ConvNorm(window), ConvSample(window=window)
    for statistic in (gram, norm):
        statistic.update(spoilt)
        assert statistic.rows == 72 - 9
    assert gram.matrix is not None
    assert norm.squares is not None
    for group in range(2):
        mine = kept[:, group].astype(np.float64)
        assert np.allclose(gram.matrix[group], mine.T @ mine, rtol=1e-5, atol=1e-5)
        squares = np.square(mine).sum(0).reshape(1, 3, 3)
        assert np.allclose(norm.squares[group], squares)
    sample.update(spoilt)
    assert np.isfinite(sample.values).all()


def test_a_tensor_of_nan_alone_adds_no_row():
    found = Gram()
    found.update(np.full((3, 4), np.nan, np.float32))
    assert found.rows == 0
    assert found.matrix is not None
    assert not found.matrix.any()
