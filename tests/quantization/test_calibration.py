"""Calibration: ranges are those that kept values give, and a run can be resumed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.activations import gathering, kept
from onnxshrink.activations.kept import gather_cached
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.model import Model
from onnxshrink.quantization.calibration import METHODS, bounds, observer
from onnxshrink.samples import Samples, Splits
from onnxshrink.statistics import (
    ChannelNorm,
    ChannelRange,
    ConvGram,
    ConvNorm,
    ConvWindow,
    Gram,
    Histogram,
    Mean,
    Multi,
    Range,
)


def fed(*batches):
    found = observer()
    for batch in batches:
        found.update(np.asarray(batch, np.float32))
    return found


def normal(count=20000, seed=0):
    return np.random.default_rng(seed).normal(size=(4, count // 4)).astype(np.float32)


DATA = {
    "normal": normal(),
    "relu": np.maximum(normal(), 0),
    "negative": -np.abs(normal()) - 0.01,
    "shifted": normal() * 0.2 + 3,
    "skewed": np.maximum(normal(), -0.3) * 2,
    "heavy": np.random.default_rng(1).standard_t(3, size=(4, 5000)).astype(np.float32),
    "relu6": np.clip(normal() * 4, 0, 6),
}


def rounded(values, low, high, levels, symmetric):
    """Quantize and decode with the range of a method."""
    if symmetric:
        top = max((levels - 1) // 2, 1)
        step = high / top
        return np.clip(np.rint(values / step), -top, top) * step
    step = (high - low) / (levels - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, levels - 1) - zero) * step


# --- the methods ----------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_holds_zero_and_no_more_than_was_seen(name, method, symmetric):
    values = DATA[name]
    low, high = bounds(fed(values), method, symmetric=symmetric)
    assert type(low) is float
    assert low <= 0 <= high
    assert low < high
    if symmetric:
        assert low == -high
        assert high <= np.abs(values).max()
    else:
        assert low >= min(values.min(), 0)
        assert high <= max(values.max(), 0)


def test_minmax_is_exact():
    assert bounds(fed([[1.5, 2.0]], [[-0.25, 1.0]]), "minmax") == (-0.25, 2.0)
    assert bounds(fed([[1.5, 2.0]], [[-0.25, 1.0]]), "minmax", symmetric=True) == (
        -2.0,
        2.0,
    )


def test_moving_average_is_the_mean_over_samples_however_they_are_batched():
    rows = np.array([[-1, 2], [-3, 4], [0, 9]], np.float32)
    for batches in ([rows], [rows[:1], rows[1:]], [rows[2:], rows[:2]]):
        low, high = bounds(fed(*batches), "moving-average")
        assert low == pytest.approx(-4 / 3)
        assert high == pytest.approx(5)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentiles_are_those_of_kept_values(name, percentile):
    values = DATA[name]
    found = fed(values)
    width = found.histogram.width
    wanted = (1 - percentile / 100) * values.size

    def assert_cuts(values, low, high):
        # Neighbouring values may be bins apart, so ranks are compared, not values.
        narrow = np.sum((values < low - 2 * width) | (values > high + 2 * width))
        wide = np.sum((values < low + 2 * width) | (values > high - 2 * width))
        assert narrow <= wanted + 2
        assert wide >= wanted - 2

    low, high = bounds(found, "percentile", percentile=percentile)
    assert_cuts(values, low, high)
    _, size = bounds(found, "percentile", percentile=percentile, symmetric=True)
    assert_cuts(np.abs(values), -np.inf, size)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("levels", [256, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_best_of_a_dense_search_over_kept_values(name, levels, symmetric):
    values = DATA[name].astype(np.float64)

    def loss(low, high):
        kept = rounded(values, low, high, levels, symmetric)
        return float(np.square(kept - values).mean())

    low, high = min(values.min(), 0), max(values.max(), 0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    best = min(
        loss(low * a, high * b)
        for a in np.linspace(0.1, 1, 25)
        for b in ([a] if symmetric else np.linspace(0.1, 1, 25))
        if high > 0 or a == b or not symmetric
    )
    found = bounds(fed(values), "mse", levels=levels, symmetric=symmetric)
    assert loss(*found) <= 1.03 * best


def divergence(values, low, high, levels, width):
    """KL divergence as TensorRT defines it, bin by bin; outliers go to the edges."""
    values = values[values != 0]
    first, last = round(low / width), round(high / width)
    places = np.floor(values / width).astype(int)
    inside = places[(places >= first) & (places < last)]
    counts = np.bincount(inside - first, minlength=last - first).astype(float)
    reference = counts.copy()
    reference[0] += np.sum(places < first)
    reference[-1] += np.sum(places >= last)
    quantized = np.zeros_like(counts)
    size = last - first
    for level in range(levels):
        part = slice(level * size // levels, (level + 1) * size // levels)
        held = reference[part] > 0
        if held.any():
            quantized[part][held] = counts[part].sum() / held.sum()
    for edge in (0, -1):
        if reference[edge] > 0 and quantized[edge] == 0:
            quantized[edge] = 1e-4 * counts.sum()
    p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1)
    if np.any((p > 0) & (q == 0)):
        return np.inf
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.mark.parametrize("name", ["normal", "relu", "negative", "skewed", "heavy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_is_the_best_of_all_ranges_bin_by_bin(name, symmetric):
    values = DATA[name].astype(np.float64)
    found = fed(values)
    width, levels = found.histogram.width, 64
    if symmetric:
        values, levels = np.abs(values), 32
    first = np.floor(min(values.min(), 0) / width)
    last = np.floor(max(values.max(), 0) / width) + 1
    losses = {}
    for size in range(1, int(max(-first, last)) + 1, 7):
        low, high = max(first, -size) * width, min(last, size) * width
        if round((high - low) / width) >= levels:
            losses[low, high] = divergence(values, low, high, levels, width)
    low, high = bounds(found, "entropy", levels=64, symmetric=symmetric)
    if symmetric:
        low = 0.0
    # Ends that reach the last value seen stand for the whole of its bin.
    low, high = (
        np.floor(low / width + 1e-9) * width,
        np.ceil(high / width - 1e-9) * width,
    )
    ours = divergence(values, low, high, levels, width)
    assert ours <= 1.05 * min(losses.values()) + 1e-6


def test_entropy_cuts_lone_outliers_off():
    values = normal().copy()
    values[0, 0] = 500
    low, high = bounds(fed(values), "entropy")
    assert 3 < high < 100
    assert -6 < low < -2


def test_zeros_of_relu_do_not_move_the_range():
    dense = np.abs(normal())
    sparse = np.concatenate([dense, np.zeros((4, 50000), np.float32)], axis=1)
    for method in ("entropy", "mse"):
        assert bounds(fed(sparse), method) == bounds(fed(dense), method)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_zeros_has_an_empty_range(method):
    assert bounds(fed(np.zeros((2, 3))), method) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [5.0, -5.0, 1e20, 1e-30])
def test_one_value_is_in_its_range(method, value):
    low, high = bounds(fed(np.full((2, 3), value)), method)
    assert low <= 0 <= high
    assert max(high, -low) == pytest.approx(abs(value), rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_values_in_a_narrow_band_far_from_zero_are_held(method):
    values = (1000 + np.random.default_rng(0).random((2, 500)) * 1e-2).astype(
        np.float32
    )
    low, high = bounds(fed(values), method)
    assert low == 0
    assert high == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_fills_of_a_mask_are_no_activations(method):
    values = normal().copy()
    plain = bounds(fed(values), method)
    values = np.concatenate(
        [values, np.full((4, 100), np.finfo(np.float32).min)], axis=1
    )
    assert bounds(fed(values), method) == plain


def test_a_tensor_that_was_never_finite_is_an_error():
    with pytest.raises(ModelError, match="no finite value"):
        bounds(fed(np.full((1, 3), -np.inf)), "minmax")
    with pytest.raises(ModelError, match="no finite value"):
        bounds(observer(), "mse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "max"}, "there are minmax, moving-average"),
        ({"method": "mse", "levels": 1}, "at least 2 levels"),
        ({"method": "percentile", "percentile": 50}, "above 50"),
    ],
)
def test_senseless_requests_are_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        bounds(fed([[1.0]]), **arguments)


def test_an_observer_is_asked_for():
    with pytest.raises(UsageError, match="not an observer"):
        bounds(Gram(), "minmax")


# --- the statistics -------------------------------------------------------------------


def test_histograms_count_every_value_of_a_large_array():
    values = np.zeros(700_001, np.float32)
    values[-1], values[300_000] = 3, -2
    found = Histogram()
    found.update(values)
    assert found.count == len(values)
    assert (found.low, found.high) == (-2, 3)
    assert found.counts.sum() == len(values)


def test_large_samples_are_counted_in_part_but_their_range_is_exact():
    values = np.random.default_rng(0).laplace(size=(2, 300, 1000)).astype(np.float32)
    values[:, 7, 7] = [31, -29]
    values[1, 9, 9] = -3e38
    found = fed(values)
    assert found.histogram.apart == 1
    values[1, 9, 9] = 0
    assert 2 * 40_000 < found.histogram.count <= 2 * 65_536
    assert bounds(found, "minmax") == (-29, 31)
    assert found.histogram.counts.sum() == found.histogram.count
    low, high = bounds(found, "percentile", percentile=99)
    assert low == pytest.approx(np.percentile(values, 0.5), rel=0.03)
    assert high == pytest.approx(np.percentile(values, 99.5), rel=0.03)


@given(
    hnp.arrays(np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32)),
    st.integers(0, 5),
)
def test_observers_merge_to_what_they_saw_together(values, cut):
    one, other = fed(values[:cut]), fed(values[cut:])
    one.merge(other)
    whole = fed(values)
    for name, array in whole.state().items():
        assert np.allclose(one.state()[name], array, rtol=1e-12), name


def test_an_observer_holds_no_more_after_many_batches():
    values = normal(100_000)
    found = fed(values)
    tracemalloc.start()
    try:
        for seed in range(20):
            found.update(values * np.float32(1 + seed))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 64 << 10


def test_ranges_of_channels_leave_fills_out():
    found = ChannelRange(axis=1)
    found.update(np.array([[[1, 2], [-3e38, 4]]], np.float32))
    found.update(np.array([[[0, 5], [np.nan, -np.inf]]], np.float32))
    assert found.low is not None
    assert found.low.tolist() == [0, 4]
    assert found.high.tolist() == [5, 4]  # type: ignore[union-attr]
    assert found.apart == 3
    with pytest.raises(ModelError, match="channels changes"):
        found.update(np.ones((1, 3, 1), np.float32))


@pytest.mark.parametrize(
    "make",
    [
        observer,
        lambda: ChannelRange(1),
        Histogram,
        Range,
        lambda: Range(axis=-1),
        Gram,
        ChannelNorm,
        lambda: Multi(a=observer(), b=Gram(), c=Range()),
    ],
)
def test_a_stored_statistic_goes_on_as_it_was(make):
    values = DATA["heavy"].reshape(4, 1250, 4)
    whole, first = make(), make()
    whole.update(values)
    first.update(values[:1])
    again = make()
    again.restore(first.state())
    again.update(values[1:])
    for name, array in whole.state().items():
        assert np.allclose(again.state()[name], array), name
    empty = make()
    empty.restore(make().state())
    assert all(map(np.array_equal, empty.state().values(), make().state().values()))


def test_a_stored_gram_of_patches_goes_on_as_it_was():
    x = np.random.default_rng(0).normal(size=(4, 4, 5, 5)).astype(np.float32)
    make = lambda: ConvGram(ConvWindow((3, 3), group=2))  # noqa: E731
    whole, first, again = make(), make(), make()
    whole.update(x)
    again.restore(first.state())
    again.update(x[:2])
    first.restore(again.state())
    first.update(x[2:])
    assert np.allclose(first.matrix, whole.matrix)  # type: ignore[arg-type]
    assert first.rows == whole.rows


def test_a_stored_norm_of_patches_goes_on_as_it_was():
    x = np.random.default_rng(0).normal(size=(4, 4, 5, 5)).astype(np.float32)
    make = lambda: ConvNorm(ConvWindow((3, 3), group=2))  # noqa: E731
    whole, first, again = make(), make(), make()
    whole.update(x)
    first.update(x[:2])
    again.restore(first.state())
    again.update(x[2:])
    assert np.allclose(again.squares, whole.squares)  # type: ignore[arg-type]
    assert np.allclose(again.sums, whole.sums)  # type: ignore[arg-type]
    assert again.rows == whole.rows


@pytest.mark.parametrize(
    "change",
    [
        {"squares": -np.ones(2)},
        {"squares": np.zeros((2, 2))},
        {"squares": np.zeros(0), "sums": np.zeros(0)},
        {"sums": np.zeros(3)},
        {"rows": np.array([-1])},
    ],
)
def test_a_stored_norm_that_contradicts_itself_is_refused(change):
    found = ChannelNorm()
    found.update(np.ones((3, 2), np.float32))
    with pytest.raises(UsageError, match="stored"):
        ChannelNorm().restore(found.state() | change)


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": np.zeros((2, 3))},
        {"matrix": -np.eye(2)},
        {"matrix": np.eye(2, dtype=np.float32)},
        {"sums": np.zeros(3)},
        {"rows": np.array([-1])},
        {"matrix": np.full((2, 2), np.nan)},
    ],
)
def test_a_stored_gram_that_contradicts_itself_is_refused(change):
    found = Gram()
    found.update(np.ones((3, 2), np.float32))
    with pytest.raises(UsageError, match="stored"):
        Gram().restore(found.state() | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("counts", lambda a: -a),
        ("counts", lambda a: a.astype(np.float64)),
        ("counts", lambda a: np.concatenate([a, np.zeros(9999, np.int64)])),
        ("whole", lambda a: a[:3]),
        ("whole", lambda a: a + 1),
        ("ends", lambda a: a[::-1]),
        ("ends", lambda a: a * np.nan),
        ("ends", lambda a: a * 1e300),
        ("sums", lambda a: a * np.inf),
        ("sums", lambda a: a * 1e6),
        ("samples", lambda a: -a),
        ("samples", lambda a: a * 0),
    ],
)
def test_a_stored_observer_that_contradicts_itself_is_refused(name, change):
    state = fed(DATA["normal"]).state()
    state[name] = change(state[name])
    with pytest.raises(UsageError, match="stored"):
        observer().restore(state)


@given(st.data())
def test_no_stored_state_at_all_makes_an_observer_fail_otherwise(data):
    state = fed(DATA["normal"][:, :50]).state()
    for name in data.draw(st.sets(st.sampled_from(sorted(state)), min_size=1)):
        state[name] = data.draw(
            hnp.arrays(
                st.sampled_from([np.int64, np.float64]), hnp.array_shapes(max_dims=2)
            )
        )
    found = observer()
    try:
        found.restore(state)
    except UsageError:
        return
    if not found.empty:
        for method in METHODS:
            low, high = bounds(found, method)
            assert low <= 0 <= high


# --- kept in a folder -----------------------------------------------------------------

CHAIN = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  h = MatMul(x, w)
  y = Relu(h)
}
"""
X = np.random.default_rng(0).normal(size=(90, 2)).astype(np.float32)


def context(model, x=X):
    samples = Samples.of(x).bind(model.inputs)
    splits = Splits(calibration=samples, evaluation=samples)
    return make_context(samples=splits, reference=model)


def chain():
    return Model.load(onnx.parser.parse_model(CHAIN))


def wanted():
    both = Multi(range=ChannelRange(1), gram=Gram())
    return {"x": observer(), "h": observer(), "y": both, "w": observer()}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        for key, array in expected[name].state().items():
            assert np.allclose(found[name].state()[key], array), (name, key)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch):
    """Count the batches that are run."""
    made: list[int] = []
    real = gathering.runtime.Session.run

    def run(self, feeds, *rest):
        made.append(len(feeds["x"]))
        return real(self, feeds, *rest)

    monkeypatch.setattr(gathering.runtime.Session, "run", run)
    return made


def test_a_repeated_calibration_is_read(tmp_path: Path, runs):
    model = chain()
    expected = gathering.gather(model, wanted(), context(model))
    assert_same(gather_cached(model, wanted(), context(model), tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 1
    runs.clear()
    assert_same(gather_cached(model, wanted(), context(model), tmp_path), expected)
    assert runs == []


def test_an_interrupted_calibration_goes_on_at_its_batch(
    tmp_path: Path, runs, monkeypatch: pytest.MonkeyPatch
):
    model = chain()
    expected = gathering.gather(model, wanted(), context(model))
    runs.clear()
    monkeypatch.setattr(kept, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(kept, "SAVE_SHARE", 0.0)
    ctx = context(model)

    def stop(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    ctx.progress = stop
    with pytest.raises(KeyboardInterrupt):
        gather_cached(model, wanted(), ctx, tmp_path)
    assert runs == [32, 32]
    runs.clear()
    assert_same(gather_cached(model, wanted(), context(model), tmp_path), expected)
    assert runs == [26]


def test_other_samples_models_and_statistics_have_other_files(tmp_path: Path, runs):
    model = chain()
    gather_cached(model, wanted(), context(model), tmp_path)
    other = X.copy()
    other[0, 0] += 1
    gather_cached(model, wanted(), context(model, other), tmp_path)
    gather_cached(model, wanted(), context(model, X[:50]), tmp_path)
    gather_cached(model, {"h": observer()}, context(model), tmp_path)
    model.set_weight("w", np.eye(2, dtype=np.float32))
    gather_cached(model, wanted(), context(model), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not a zip at all",
        lambda data: data[:200] + bytes(50) + data[250:],
    ],
)
def test_a_damaged_file_is_ignored_with_a_note(tmp_path: Path, damage):
    model = chain()
    expected = gather_cached(model, wanted(), context(model), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    ctx = context(model)
    assert_same(gather_cached(model, wanted(), ctx, tmp_path), expected)
    assert ctx.skips[0][0] == file.name
    assert "ignored" in ctx.skips[0][1]


def test_a_file_with_anothers_content_is_not_believed(tmp_path: Path):
    model = chain()
    expected = gather_cached(model, wanted(), context(model), tmp_path / "a")
    gather_cached(model, wanted(), context(model, X + 1), tmp_path / "b")
    (file,), (foreign,) = (list((tmp_path / name).iterdir()) for name in "ab")
    file.write_bytes(foreign.read_bytes())
    ctx = context(model)
    assert_same(gather_cached(model, wanted(), ctx, tmp_path / "a"), expected)
    assert "belongs to another model" in ctx.skips[0][1]


def test_a_file_with_pickled_objects_is_ignored(tmp_path: Path):
    model = chain()
    gather_cached(model, wanted(), context(model), tmp_path)
    (file,) = tmp_path.iterdir()
    np.savez(file, about=np.array([{}], object), allow_pickle=True)
    ctx = context(model)
    gather_cached(model, wanted(), ctx, tmp_path)
    assert "ignored" in ctx.skips[0][1]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="folder that can be written"):
        gather_cached(chain(), wanted(), context(chain()), tmp_path / "file")


def test_statistics_that_cannot_be_stored_are_refused(tmp_path: Path):
    model = chain()
    for statistic in (Mean(), Multi(a=observer(), b=Mean())):
        with pytest.raises(UsageError, match=r"Mean.* cannot be"):
            gather_cached(model, {"h": statistic}, context(model), tmp_path)  # type: ignore[dict-item]
