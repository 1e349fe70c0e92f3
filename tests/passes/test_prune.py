from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from onnxshrink import testing
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.passes.prune import Prune, _stored_bytes
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.solvers.magnitude import (
    Pattern,
)
from onnxshrink.solvers.obs import place_bits
from onnxshrink.structure import layers

Array = np.ndarray[Any, Any]

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]),
)


def _model(text: str, **weights: Array) -> Model:
    """Parse a graph body; arrays become initializers."""
    header = '<ir_version: 8, opset_import: ["" : 17]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def _matmul(weight: Array) -> Model:
    inputs, outputs = weight.shape
    return _model(
        f"g (float[N,{inputs}] x) => (float[N,{outputs}] y) {{ y = MatMul(x, w) }}",
        w=weight,
    )


def _splits(**arrays: Array) -> Splits:
    return Splits(calibration=Samples.from_arrays(arrays))


def _context(model: Model, splits: Splits | None = None) -> Context:
    return make_context(samples=splits or Splits(random=True), reference=model)


def _pruned(pass_: Prune, model: Model, splits: Splits | None = None) -> Model:
    copy = model.copy()
    pass_.apply(copy, _context(model, splits))
    return copy


def _zeros(model: Model, name: str = "w") -> int:
    return int((model.weight(name).read() == 0).sum())


def _inputs(rows: int, inputs: int, seed: int = 0) -> Array:
    """Make inputs that depend on each other, as activations do."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((rows, inputs)) @ random.standard_normal(
        (inputs, inputs)
    )
    return mixed.astype(np.float32)


def _error(before: Array, after: Array, x: Array) -> float:
    return float(np.square(x.astype(np.float64) @ (before - after)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(testing.example_models()))
@pytest.mark.parametrize(
    "text",
    [
        "prune:sparsity=0.75,scope=local,also=tables,also=biases",
        "prune:pattern=2x3,sparsity=0.6",
        "prune:threshold=0.3",
    ],
)
def test_the_laws_hold(text: str, name: str) -> None:
    (pass_,) = Pipeline.parse(text)
    testing.check_laws(pass_, {name: testing.example_models()[name]})


@pytest.mark.parametrize("importance", ["obs", "wanda"])
@pytest.mark.parametrize("pattern", ["", "1:2", "2x2"])
@pytest.mark.parametrize("name", sorted(testing.example_models()))
def test_every_example_is_pruned_with_data(
    name: str, pattern: str, importance: Any
) -> None:
    model = Model.load(testing.example_models()[name])
    random = Splits.build(model)
    splits = Splits(calibration=random.calibration, evaluation=random.evaluation)
    pass_ = Prune(importance=importance, pattern=pattern, scope="local")
    after = model.copy()
    context = _context(model, splits)
    sites = pass_.sites(after, context)
    pass_.rewrite_all(after, sites, context)
    after.check()
    assert len(context.done) == len(sites)
    for site in sites:
        values = after.weight(site.where).read().astype(np.float64)
        assert np.isfinite(values).all()
        if not pattern:
            assert (values == 0).mean() >= 0.5 - 0.5 / values.size


# --- by magnitude ---------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.floats(0, 1))
def test_local_zeros_exactly_the_fraction_asked_for(
    weight: Array, sparsity: float
) -> None:
    model = _pruned(Prune(sparsity=sparsity), _matmul(weight))
    wanted = int(np.floor(sparsity * weight.size + 0.5))
    assert _zeros(model) == max(wanted, int((weight == 0).sum()))


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.floats(0, 1))
def test_what_stays_is_as_large_as_all_that_went(
    weight: Array, sparsity: float
) -> None:
    after = _pruned(Prune(sparsity=sparsity), _matmul(weight)).weight("w").read()
    kept = after != 0
    assert np.array_equal(after[kept], weight[kept])
    went = np.abs(weight[~kept]).max(initial=0)
    assert np.abs(weight[kept]).min(initial=np.inf) >= went


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.floats(0, 1))
def test_pruning_again_changes_nothing(weight: Array, sparsity: float) -> None:
    pass_ = Prune(sparsity=sparsity)
    once = _pruned(pass_, _matmul(weight))
    assert not pass_.sites(once, _context(once))


def test_global_prunes_small_weights_wherever_they_are() -> None:
    model = _model(
        "g (float[N,2] x) => (float[N,2] y) { h = MatMul(x, a)  y = MatMul(h, b) }",
        a=np.array([[1, 2], [3, 4]], np.float32),
        b=np.array([[10, 20], [30, 40]], np.float32),
    )
    after = _pruned(Prune(sparsity=0.5), model)
    assert (_zeros(after, "a"), _zeros(after, "b")) == (4, 0)
    after = _pruned(Prune(sparsity=0.5, scope="local"), model)
    assert (_zeros(after, "a"), _zeros(after, "b")) == (2, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_keep_their_type(dtype: str) -> None:
    name = {"float64": "double"}.get(dtype, dtype)
    weight = np.array([[1, -2], [3, -4]]).astype(
        onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name.upper()))
    )
    model = _model(
        f"g ({name}[N,2] x) => ({name}[N,2] y) {{ y = MatMul(x, w) }}", w=weight
    )
    after = _pruned(Prune(), model).weight("w").read()
    assert after.dtype == weight.dtype
    assert after.astype(float).tolist() == [[0, 0], [3, -4]]


def test_the_executor_does_not_change_the_result() -> None:
    random = np.random.default_rng(0)
    shape = (40, 30)
    model = _model(
        "g (float[N,40] x) => (float[N,40] y) { h = MatMul(x, a)  y = MatMul(h, b) }",
        a=random.standard_normal(shape).astype(np.float32),
        b=random.standard_normal(shape[::-1]).astype(np.float32),
    )
    splits = _splits(x=_inputs(100, 40))
    alone = _pruned(Prune(), model, splits)
    with ThreadPoolExecutor(3) as executor:
        context = _context(model, splits)
        context.executor = executor
        together = model.copy()
        Prune().apply(together, context)
    assert alone.to_bytes() == together.to_bytes()


# --- patterns -------------------------------------------------------------------------


def _runs(values: Array, of: int) -> Array:
    """Count what is not zero in each run along the last axis."""
    padded = np.pad(values != 0, [(0, 0), (0, -values.shape[1] % of)])
    return np.asarray(padded.reshape(len(values), -1, of).sum(axis=2))


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 3)])
def test_n_of_m_holds_along_the_inputs(importance: Any, keep: int, of: int) -> None:
    weight = np.random.default_rng(1).standard_normal((21, 6)).astype(np.float32)
    pass_ = Prune(pattern=f"{keep}:{of}", importance=importance)
    after = _pruned(pass_, _matmul(weight), _splits(x=_inputs(64, 21)))
    assert _runs(after.weight("w").read().T, of).max() == keep


@settings(deadline=None, max_examples=40)
@given(FLOATS)
def test_n_of_m_keeps_the_largest(weight: Array) -> None:
    mask = Pattern(keep=1, of=2).drop(np.abs(weight))
    for row, gone in zip(np.abs(weight), mask, strict=True):
        for at in range(0, len(row) - 1, 2):
            assert gone[at] != gone[at + 1]
            assert row[at : at + 2][~gone[at : at + 2]] == row[at : at + 2].max()


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "obs"])
def test_whole_blocks_go(importance: Any) -> None:
    weight = np.random.default_rng(2).standard_normal((12, 8)).astype(np.float32)
    pass_ = Prune(pattern="2x3", sparsity=0.5, importance=importance)
    after = _pruned(pass_, _matmul(weight), _splits(x=_inputs(64, 12)))
    blocks = after.weight("w").read().T.reshape(4, 2, 4, 3).transpose(0, 2, 1, 3)
    zeros = (blocks.reshape(16, 6) == 0).sum(axis=1)
    assert sorted(zeros.tolist()) == [0] * 8 + [6] * 8


# --- with data ------------------------------------------------------------------------


def test_wanda_drops_large_weights_of_small_inputs() -> None:
    weight = np.array([[5, 1], [1, 1]], np.float32)
    x = np.array([[0.1, 10]], np.float32)
    pass_ = Prune(importance="wanda", scope="local")
    after = _pruned(pass_, _matmul(weight), _splits(x=x))
    assert after.weight("w").read().tolist() == [[0, 0], [1, 1]]


def test_obs_beats_magnitude_and_wanda_on_the_outputs() -> None:
    random = np.random.default_rng(3)
    weight = random.standard_normal((48, 20)).astype(np.float32)
    x = _inputs(400, 48)
    errors = {}
    for importance in ("magnitude", "wanda", "obs"):
        pass_ = Prune(sparsity=0.6, importance=importance)  # type: ignore[arg-type]
        after = _pruned(pass_, _matmul(weight), _splits(x=x))
        errors[importance] = _error(weight, after.weight("w").read(), x)
    assert errors["obs"] < 0.5 * errors["wanda"]
    assert errors["obs"] < 0.5 * errors["magnitude"]


def test_large_layers_take_sparsegpt_and_stay_better_than_magnitude(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxshrink.solvers import obs

    monkeypatch.setattr(obs, "EXACT_WORK", 1e4)
    monkeypatch.setattr(obs, "EXACT_INPUTS", 4)
    weight = np.random.default_rng(7).standard_normal((200, 24)).astype(np.float32)
    x = _inputs(800, 200)
    after = _pruned(Prune(sparsity=0.7), _matmul(weight), _splits(x=x))
    plain = _pruned(Prune(sparsity=0.7, importance="magnitude"), _matmul(weight))
    values = after.weight("w").read()
    assert (values == 0).sum() == round(0.7 * weight.size)
    worse = _error(weight, plain.weight("w").read(), x)
    assert _error(weight, values, x) < 0.55 * worse


def test_inputs_that_are_always_zero_go_first() -> None:
    weight = np.array([[9, 9], [1, 2], [3, 1]], np.float32)
    x = np.array([[0, 1, 2], [0, 2, 1], [0, 1, 1]], np.float32)
    pass_ = Prune(sparsity=1 / 3, importance="obs")
    after = _pruned(pass_, _matmul(weight), _splits(x=x)).weight("w").read()
    assert after[0].tolist() == [0, 0]
    assert np.allclose(after[1:], weight[1:], atol=1e-5)


def test_inputs_that_hardly_vary_do_no_harm() -> None:
    random = np.random.default_rng(16)
    weight = random.standard_normal((4, 10)).astype(np.float32)
    x = (1e4 + 1e-3 * random.standard_normal((200, 10))).astype(np.float32)
    model = _model(
        "g (float[N,10] x) => (float[N,4] y) { y = Gemm<transB = 1>(x, w, b) }",
        w=weight,
        b=np.zeros(4, np.float32),
    )
    after = _pruned(Prune(sparsity=0.8), model, _splits(x=x))
    y = x @ after.weight("w").read().T + after.weight("b").read()
    assert np.allclose(y, x @ weight.T, rtol=1e-3, atol=1.0)


def test_inputs_without_a_finite_row_leave_magnitude() -> None:
    model = _matmul(np.array([[1, 2], [3, 4]], np.float32))
    x = np.array([[np.inf, 1], [1, -np.inf]], np.float32)
    after = _pruned(Prune(), model, _splits(x=x))
    assert after.weight("w").read().tolist() == [[0, 0], [3, 4]]


def test_more_training_samples_are_studied_than_calibration_samples() -> None:
    weight = np.random.default_rng(17).standard_normal((8, 4)).astype(np.float32)
    few, many = _inputs(4, 8, seed=1), _inputs(500, 8, seed=2)
    pass_ = Prune(importance="obs")
    both = Splits(
        calibration=Samples.from_arrays({"x": few}),
        training=Samples.from_arrays({"x": many}),
    )
    found = _pruned(pass_, _matmul(weight), both)
    assert (
        found.to_bytes() == _pruned(pass_, _matmul(weight), _splits(x=many)).to_bytes()
    )


def test_the_bias_makes_up_for_the_mean_of_what_is_gone() -> None:
    random = np.random.default_rng(9)
    weight = random.standard_normal((4, 10)).astype(np.float32)
    x = (random.standard_normal((200, 10)) + 3).astype(np.float32)
    model = _model(
        "g (float[N,10] x) => (float[N,4] y) { y = Gemm<transB = 1>(x, w, b) }",
        w=weight,
        b=np.zeros(4, np.float32),
    )
    after = _pruned(Prune(sparsity=0.8), model, _splits(x=x))
    y = x @ after.weight("w").read().T + after.weight("b").read()
    assert np.allclose(y.mean(axis=0), (x @ weight.T).mean(axis=0), atol=1e-4)


def test_a_bias_of_two_layers_is_left_alone() -> None:
    weight = np.random.default_rng(10).standard_normal((3, 3)).astype(np.float32)
    model = _model(
        """g (float[N,3] x) => (float[N,3] y)
        { h = Gemm(x, w, b)  y = Gemm(h, v, b) }""",
        w=weight,
        v=weight.T.copy(),
        b=np.ones(3, np.float32),
    )
    after = _pruned(Prune(), model, _splits(x=_inputs(20, 3)))
    assert after.weight("b").read().tolist() == [1, 1, 1]


def test_a_bias_that_is_also_an_output_is_left_alone() -> None:
    weight = np.random.default_rng(10).standard_normal((3, 3)).astype(np.float32)
    model = _model(
        "g (float[N,3] x) => (float[N,3] y, float[3] b) { y = Gemm(x, w, b) }",
        w=weight,
        b=np.ones(3, np.float32),
    )
    after = _pruned(Prune(), model, _splits(x=_inputs(20, 3) + 3))
    assert _zeros(after) == 5
    assert after.weight("b").read().tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("zeros", "bits", "nbytes"),
    [
        (0, 32, 6400),  # plain
        (800, 32, 200 + 3200),  # a bit each, and the values
        (1440, 32, 80 + 50 + 640),  # 160 gaps of 4 bits, and 100 gaps that skip 16
        (1440, 16, 80 + 50 + 320),
        (1590, 32, 10 + 6 + 40),  # 10 gaps of 8 bits, and 6 that skip 256
    ],
)
def test_stored_bytes_are_those_of_the_smallest_form(
    zeros: int, bits: int, nbytes: int
) -> None:
    assert _stored_bytes(1600, zeros, bits) == nbytes


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_stored_bytes_are_near_those_of_the_file(sparsity: float) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(40_000).astype(np.float32)
    zeros = int(sparsity * values.size)
    values[random.permutation(values.size)[:zeros]] = 0
    model = _matmul(values.reshape(200, 200))
    nothing = len(_matmul(np.zeros((200, 200), np.float32)).to_bytes("auto"))
    written = len(model.to_bytes("auto")) - nothing
    assert _stored_bytes(40_000, zeros, 32) == pytest.approx(written, rel=0.06)


def test_sites_do_not_depend_on_which_others_are_done() -> None:
    random = np.random.default_rng(11)
    model = _model(
        "g (float[N,6] x) => (float[N,6] y) { h = MatMul(x, a)  y = MatMul(h, b) }",
        a=random.standard_normal((6, 6)).astype(np.float32),
        b=random.standard_normal((6, 6)).astype(np.float32),
    )
    context = _context(model, _splits(x=_inputs(40, 6)))
    pass_ = Prune(scope="local")
    sites = {site.where: site for site in pass_.sites(model, context)}
    alone, together = model.copy(), model.copy()
    pass_.rewrite(alone, sites["b"], context)
    pass_.rewrite_all(together, list(sites.values()), context)
    assert np.array_equal(alone.weight("b").read(), together.weight("b").read())


@pytest.mark.parametrize(
    ("graph", "shape"),
    [
        ("g (float[N,4,9,9] x) => (float[N,A,B,C] y) { y = Conv(x, w) }", (6, 4, 3, 3)),
        (
            "g (float[N,4,9,9] x) => (float[N,A,B,C] y) { y = Conv<group = 2>(x, w) }",
            (6, 2, 3, 3),
        ),
        (
            "g (float[N,4,9] x) => (float[N,A,B] y) { y = ConvTranspose(x, w) }",
            (4, 5, 3),
        ),
        (
            """g (float[N,4,9] x) => (float[N,A,B] y)
            { y = ConvTranspose<group = 2>(x, w) }""",
            (4, 5, 3),
        ),
        ("g (float[7,8] x) => (float[5,8] y) { y = MatMul(w, x) }", (5, 7)),
        ("g (float[7,8] x) => (float[5,8] y) { y = Gemm<transA = 1>(w, x) }", (7, 5)),
        ("g (float[8,7] x) => (float[5,8] y) { y = Gemm<transB = 1>(w, x) }", (5, 7)),
    ],
)
def test_obs_lowers_the_output_error_of_every_operator(
    graph: str, shape: tuple[int, ...]
) -> None:
    from onnxshrink import runtime

    random = np.random.default_rng(12)
    model = _model(graph, w=random.standard_normal(shape).astype(np.float32))
    dims = [d if isinstance(d, int) else 40 for d in model.inputs[0].shape or ()]
    # Neighbours along every axis depend on each other.
    noise = random.standard_normal(dims)
    for axis in range(len(dims)):
        noise = noise + 0.8 * np.roll(noise, 1, axis)
    x = noise.astype(np.float32)
    wanted = runtime.session(model, threads=1).run({"x": x})["y"]
    splits = _splits(x=x)
    if isinstance((model.inputs[0].shape or ())[0], int):
        samples = Samples.from_batches([{"x": x}]).bind(model.inputs)
        splits = Splits(calibration=samples)
    errors = []
    for importance in ("obs", "magnitude"):
        pass_ = Prune(importance=importance)  # type: ignore[arg-type]
        after = _pruned(pass_, model, splits)
        found = runtime.session(after, threads=1).run({"x": x})["y"]
        errors.append(np.square(found - wanted).sum())
    assert errors[0] < errors[1]


# --- plan and options -----------------------------------------------------------------


def test_weaker_sites_have_fewer_zeros_down_to_none() -> None:
    weight = np.random.default_rng(13).standard_normal((20, 20)).astype(np.float32)
    model = _matmul(weight)
    pass_ = Prune(sparsity=0.9)
    context = _context(model)
    (site,) = pass_.sites(model, context)
    before = 360
    for strength in (0.75, 0.5, 0.25):
        weaker = pass_.weaken(site, strength)
        assert weaker is not None
        copy = model.copy()
        pass_.rewrite(copy, weaker, context)
        assert 0 < _zeros(copy) < before
        before = _zeros(copy)
    assert pass_.weaken(site, 1.0) is site
    assert pass_.weaken(site, 0.0) is None


def test_an_n_to_m_site_has_no_weaker_form() -> None:
    model = _matmul(np.arange(16, dtype=np.float32).reshape(4, 4) + 1)
    pass_ = Prune(pattern="2:4")
    (site,) = pass_.sites(model, _context(model))
    assert pass_.weaken(site, 0.9) is None


def test_auto_takes_obs_only_with_real_data() -> None:
    model = _matmul(np.arange(16, dtype=np.float32).reshape(4, 4) + 1)

    def measure(splits: Splits | None, **options: Any) -> object:
        (site,) = Prune(**options).sites(model, _context(model, splits))
        return site.how()["importance"]

    data = _splits(x=_inputs(8, 4))
    assert measure(data) == "obs"
    assert measure(data, threshold=3.0) == "magnitude"
    assert measure(None) == "magnitude"
    assert measure(Splits.build(model)) == "magnitude"


def test_places_that_cost_fewer_bits_stay() -> None:
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(0, 1, (40, 1)) + rng.normal(0, 1, (1, 30)))
    weights = (rng.standard_normal((40, 30)) * scale).astype(np.float32)
    splits = _splits(x=_inputs(300, 40))
    bits = []
    for cost in ("same", "bits"):
        model = _matmul(weights)
        Prune(sparsity=0.85, cost=cost).apply(model, _context(model, splits))  # type: ignore[arg-type]
        keep = model.weight("w").read() != 0
        assert keep.sum() == 180
        bits.append(place_bits(keep[None])[0][keep].sum())
    assert bits[1] < bits[0]
    with pytest.raises(UsageError, match=r"cost=bits.*or cost=same"):
        Prune(cost="bits").sites(model, _context(model))


@pytest.mark.parametrize("importance", ["wanda", "obs", "sparsegpt"])
def test_importance_from_data_asks_for_data(importance: Any) -> None:
    model = _matmul(np.ones((2, 2), np.float32))
    words = rf"needed to see .*importance={importance}.*--data.*or importance=magnitude"
    with pytest.raises(UsageError, match=words):
        Prune(importance=importance).sites(model, _context(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.5}, "sparsity is a fraction"),
        ({"sparsity": float("nan")}, "sparsity is a fraction"),
        ({"threshold": -1.0}, "threshold is a number"),
        ({"threshold": 1.0, "sparsity": 0.5}, "neither sparsity nor pattern"),
        ({"threshold": 1.0, "importance": "obs"}, "leave out importance"),
        ({"pattern": "2:4", "sparsity": 0.5}, "no choice of sparsity"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "0x4"}, "1x1 to"),
        ({"pattern": "two of four"}, "N:M such as 2:4"),
        ({"cost": "bits", "importance": "wanda"}, "cost=bits goes with"),
        ({"cost": "bits", "pattern": "2:4"}, "cost=bits goes with"),
        ({"cost": "bits", "threshold": 0.1}, "leave out cost=bits"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Prune(**options)


# --- layers ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_layout_goes_there_and_back(data: st.DataObject) -> None:
    split = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    order = data.draw(st.permutations([0, 1, 2]))
    array = np.arange(np.prod(split)).reshape(split[0] * split[1], split[2])
    layout = layers.Layout(array.shape, split, tuple(order))  # type: ignore[arg-type]
    matrices = layout.matrices(array)
    assert matrices.shape == layout.matrices_shape
    assert np.array_equal(layout.array(matrices), array)
