"""The pass that removes channels: what goes, what is fitted anew, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink import runtime, testing
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.passes.channels import (
    IMPORTANCES,
    Channels,
    ChannelSite,
    Importance,
)
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Splits
from onnxshrink.structure import channels
from onnxshrink.structure.channels import Group

MODELS = Path(__file__).parents[2] / "models"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng([seed, *shape])
    return draw.standard_normal(shape).astype(np.float32)


def network(*, wide: int = 32) -> Model:
    weights = {
        "a": random(wide, 6, seed=1),
        "a_bias": random(wide, seed=2),
        "b": random(wide, wide, seed=3),
        "b_bias": random(wide, seed=4),
        "c": random(4, wide, seed=5),
        "c_bias": random(4, seed=6),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "a", "a_bias"], ["p"], transB=1),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Gemm", ["q", "b", "b_bias"], ["r"], transB=1),
        helper.make_node("Relu", ["r"], ["s"]),
        helper.make_node("Gemm", ["s", "c", "c_bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return Model.load(proto)


def context(model: Model, *, data: bool = True) -> Context:
    arrays = {"x": random(400, 6, seed=7)} if data else None
    return make_context(Splits.build(model, arrays, seed=0), model.copy(), threads=1)


def run(model: Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(runtime.session(model, threads=1).run({"x": x})["y"])


def applied(pass_: Channels, model: Model, ctx: Context) -> Model:
    made = model.copy()
    pass_.apply(made, ctx)
    onnx.checker.check_model(made.to_proto())
    return made


def error(pass_: Channels) -> float:
    model = network()
    x = random(200, 6, seed=8)
    wanted = run(model, x)
    got = run(applied(pass_, model, context(model)), x)
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def test_counts_are_multiples_of_what_kernels_like() -> None:
    model = network(wide=40)
    sites = Channels(keep=0.7).sites(model, context(model))
    assert [s.kept for s in sites if isinstance(s, ChannelSite)] == [32, 32]
    sites = Channels(keep=0.7, round_to=1).sites(model, context(model))
    assert [s.kept for s in sites if isinstance(s, ChannelSite)] == [28, 28]


def test_tensors_get_smaller_everywhere() -> None:
    model = network()
    made = applied(Channels(keep=0.5), model, context(model))
    shapes = {weight.name: weight.shape for weight in made.weights()}
    assert shapes == {
        "a": (16, 6),
        "a_bias": (16,),
        "b": (16, 16),
        "b_bias": (16,),
        "c": (4, 16),
        "c_bias": (4,),
    }


def test_a_channel_that_nothing_reads_goes_first_and_costs_nothing() -> None:
    model = network()
    weight = model.weight("c")
    values = weight.read().copy()
    values[:, [1, 2, 5, 7, 11, 12, 20, 31]] = 0
    model.set_weight(weight, values)
    for importance in IMPORTANCES:
        ctx = context(model)
        pass_ = Channels(keep=0.75, importance=importance, repair=False, only=("b",))
        (site,) = [s for s in pass_.sites(model, ctx) if s.where == "b"]
        assert isinstance(site, ChannelSite)
        assert set(range(32)) - set(site.stay) == {1, 2, 5, 7, 11, 12, 20, 31}
        made = model.copy()
        pass_.rewrite(made, site, ctx)
        x = random(50, 6, seed=9)
        np.testing.assert_allclose(run(made, x), run(model, x), rtol=1e-4, atol=1e-4)


def test_layers_fitted_anew_lose_less() -> None:
    plain = error(Channels(keep=0.5, importance="norm", repair=False))
    fitted = error(Channels(keep=0.5, importance="norm"))
    chosen = error(Channels(keep=0.5))
    assert fitted < 0.5 * plain
    assert chosen < fitted


@pytest.mark.parametrize("amount", ["macs", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_one_number_for_the_whole_model_is_met(amount: str, share: float) -> None:
    model = network(wide=128)
    made = applied(Channels(**{amount: share}), model, context(model))

    def size(one: Model) -> int:
        return sum(w.size for w in one.weights() if len(w.shape) == 2)

    assert 0.75 * share <= size(made) / size(model) <= share * 1.02


def test_the_same_again_is_what_it_prints(tmp_path: Path) -> None:
    model = network()
    ctx = context(model)
    first = applied(Channels(keep=0.5), model, ctx)
    (text,) = [what for where, what in ctx.done if where == "channels"]
    recipe = tmp_path / "again.toml"
    recipe.write_text(text.removeprefix("the same again: "))
    again = Pipeline.from_toml(recipe)
    (pass_,) = again.passes
    assert isinstance(pass_, Channels)
    second = applied(pass_, model, context(model))
    assert first.to_bytes() == second.to_bytes()


def test_half_the_strength_keeps_half_of_what_would_go() -> None:
    site = ChannelSite("w", "Gemm", channels=64, kept=32, order=tuple(range(64)))
    weaker = Channels().weaken(site, 0.5)
    assert isinstance(weaker, ChannelSite)
    assert weaker.kept == 48
    assert Channels().weaken(site, 0.01) is None


def test_what_stops_the_channels_is_named() -> None:
    model = network()
    ctx = context(model)
    Channels().sites(model, ctx)
    reasons = dict(ctx.skips)
    assert "output of the model" in reasons["c"]
    assert "parameters" in reasons["c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.5, "macs": 0.5}, "each say how much"),
        ({"keep": 1.5}, "share between 0 and 1"),
        ({"importance": "nrom"}, "norm"),
        ({"round_to": 0}, "round_to"),
        ({"stay": ("w",)}, "name:channels"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Channels(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stay", ["d:0-3", "a:0-99"])
def test_channels_that_are_not_there_are_refused(stay: str) -> None:
    model = network()
    with pytest.raises(UsageError, match="stay"):
        Channels(stay=(stay,)).sites(model, context(model))


def test_what_needs_data_says_so() -> None:
    model = network()
    with pytest.raises(UsageError, match="--data"):
        Channels(importance="outputs").sites(model, context(model, data=False))
    assert Channels().sites(model, context(model, data=False))


def test_laws() -> None:
    testing.check_laws(Channels(round_to=1, keep=0.5))


def test_laws_with_data() -> None:
    testing.check_laws(Channels(macs=0.5, round_to=2), data=True)


# --- importances, dead channels, steps ------------------------------------------------


def test_a_third_party_adds_a_way_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(model: Model, groups: Sequence[Group], ctx: Context) -> list[np.ndarray]:
        return [np.arange(group.size, dtype=float) for group in groups]

    monkeypatch.setitem(IMPORTANCES, "last", Importance(last))
    model = network()
    pass_ = Channels(keep=0.5, importance="last", repair=False)
    for site in pass_.sites(model, context(model, data=False)):
        assert isinstance(site, ChannelSite)
        assert site.stay == list(range(16, 32))

    def short(model: Model, groups: Sequence[Group], ctx: Context) -> list[np.ndarray]:
        return [np.ones(3) for group in groups]

    monkeypatch.setitem(IMPORTANCES, "short", Importance(short))
    with pytest.raises(ModelError, match="short gives no figure for each channel"):
        Channels(importance="short").sites(model, context(model))


def test_a_channel_near_the_others_is_worth_least_by_the_median() -> None:
    model = network()
    weight = model.weight("a")
    values = random(32, 6, seed=1)
    values[9] = values.mean(0)
    model.set_weight(weight, values)
    ctx = context(model, data=False)
    groups = {g.name: g for g in channels.find(model) if not g.why}
    (score,) = IMPORTANCES["median"](model, [groups["a"]], ctx)
    assert int(score.argmin()) == 9
    # The sum of distances to all others, over that of all.
    gaps = np.linalg.norm(values[:, None].astype(float) - values, axis=-1)
    np.testing.assert_allclose(score, gaps.sum(1) / gaps.sum(), rtol=1e-6)


def test_scales_of_norms_say_what_a_channel_is_worth() -> None:
    model = Model.load(MODELS / "residual-cnn.onnx")
    group = next(
        g
        for g in channels.find(model)
        if not g.why and any(part.role == "variance" for part in g.where)
    )
    part = next(p for p in group.where if p.role == "scale")
    scales = np.abs(part.weight.read())[part.offsets[:, 0]]
    (score,) = IMPORTANCES["scale"](model, [group], context(network()))
    assert np.argmin(score) == np.argmin(scales)


def test_masks_cost_what_gradients_say() -> None:
    # One layer of channels, one linear output: the loss of a mask is exact.
    model = network()
    ctx = context(model)
    names = ["b"]
    groups = [g for g in channels.find(model) if g.name in names]
    (score,) = IMPORTANCES["fisher"](model, groups, ctx)
    x = x_of(ctx)[:64]
    session = runtime.session(model, threads=1, expose=["s"])
    found = session.run({"x": x})
    reads = model.weight("c").read().astype(float)
    outputs = np.square(np.asarray(found["y"], float)).sum(1).mean()
    wanted = np.square(np.asarray(found["s"], float)).mean(0)
    wanted *= np.square(reads).sum(0) / outputs
    # Random signs: an estimate, from one draw for each sample.
    assert np.corrcoef(score, wanted)[0, 1] > 0.9
    assert 0.7 < score.sum() / wanted.sum() < 1.4


def x_of(ctx: Context) -> np.ndarray:
    samples = ctx.samples.calibration
    assert samples is not None
    return np.asarray(samples.read(np.arange(samples.used))["x"])


def test_gradients_of_labels_count_where_there_are_some() -> None:
    model = network()
    labels = np.random.default_rng(0).integers(0, 4, 400)
    arrays = {"x": random(400, 6, seed=7), "labels": labels}
    ctx = make_context(Splits.build(model, arrays, seed=0), model.copy(), threads=1)
    groups = [g for g in channels.find(model) if g.name == "b"]
    (with_labels,) = IMPORTANCES["taylor"](model, groups, ctx)
    (without,) = IMPORTANCES["taylor"](model, groups, context(model))
    assert with_labels.shape == without.shape == (32,)
    assert (with_labels >= 0).all()
    assert not np.allclose(with_labels, without)


def dead_network(count: int) -> Model:
    model = network()
    weight = model.weight("c")
    values = weight.read().copy()
    values[:, :count] = 0
    model.set_weight(weight, values)
    return model


def test_dead_channels_go_without_loss_and_alone_if_all_others_are_kept() -> None:
    model = dead_network(11)
    ctx = context(model)
    made = model.copy()
    Channels(keep=1.0).apply(made, ctx)
    assert made.weight("b").shape == (21, 32)
    assert ("b", "32 -> 21 channels; nothing read 11 of them") in ctx.done
    x = random(50, 6, seed=9)
    np.testing.assert_allclose(run(made, x), run(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("importance", ["norm", "median", "outputs"])
def test_dead_channels_go_beyond_what_was_asked_for(importance: str) -> None:
    model = dead_network(11)
    pass_ = Channels(keep=0.9, importance=importance, only=("b",))
    (site,) = [s for s in pass_.sites(model, context(model)) if s.where == "b"]
    assert isinstance(site, ChannelSite)
    assert (site.dead, site.kept) == (11, 21)
    assert site.stay == list(range(11, 32))


def test_cuts_in_steps_end_with_the_same_counts(tmp_path: Path) -> None:
    model = network()
    ctx = context(model)
    made = applied(Channels(keep=0.5, steps=3, round_to=4), model, ctx)
    once = applied(Channels(keep=0.5, round_to=4), model, context(model))
    assert [w.shape for w in made.weights()] == [w.shape for w in once.weights()]
    fits = [where for where, what in ctx.done if what.startswith("fitted anew")]
    assert fits.count("c") == 3
    # The recipe repeats which channels are left, by their first numbers.
    (text,) = [what for where, what in ctx.done if where == "channels"]
    recipe = tmp_path / "again.toml"
    recipe.write_text(text.removeprefix("the same again: "))
    again = Pipeline.from_toml(recipe)
    plain = model.copy()
    for pass_ in again.passes:
        pass_.apply(plain, context(model, data=False))
    assert [w.shape for w in plain.weights()] == [w.shape for w in made.weights()]
    rows = {tuple(row) for row in plain.weight("a").read()}
    assert rows <= {tuple(row) for row in model.weight("a").read()}
    assert rows == {tuple(row) for row in made.weight("a").read()}
    with pytest.raises(UsageError, match="steps is from 1 to 100"):
        Channels(steps=0)


def test_a_plan_shows_the_curve_of_costs() -> None:
    model = network(wide=40)
    lines = Channels().outlook(model, context(model))
    shares = {float(line.split()[0]): line.split()[1:4] for line in lines[1:]}
    # 40 channels in steps of 8: 20 become 24, and 16 of 40 stay of each at 0.4.
    size = 4 * (40 * 6 + 40 + 40 * 40 + 40 + 4 * 40 + 4)
    half = 4 * (24 * 6 + 24 + 24 * 24 + 24 + 4 * 24 + 4)
    assert shares[0.5][0] == f"{half / size:.3f}"
    macs = (24 * 6 + 24 * 24 + 4 * 24) / (40 * 6 + 40 * 40 + 4 * 40)
    assert shares[0.5][1] == f"{macs:.3f}"
    assert 0 < float(shares[0.5][2]) < 1
    for column in range(3):
        figures = [float(share[column]) for share in shares.values()]
        assert figures == sorted(figures, reverse=True)


def test_a_group_prints_its_members() -> None:
    group = next(g for g in channels.find(network()) if g.name == "b")
    assert str(group).splitlines() == [
        "b: 32 channels",
        "  producer b[32, 32], axis 0: each, 128 bytes a channel",
        "  shift b_bias[32], axis 0: each, 4 bytes a channel",
        "  consumer c[4, 32], axis 1: each, 16 bytes a channel",
    ]


def test_nothing_slower_is_kept_for_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxshrink.passes import channels as module

    monkeypatch.setattr(module, "latencies", lambda *_: (1.0, 1.3))
    model = network()
    ctx = context(model)
    assert Channels(latency=0.5).sites(model, ctx) == []
    assert any("1.00 of the time was reached" in why for _, why in ctx.skips)


def test_what_stops_channels_is_named_with_what_it_holds() -> None:
    model = network()
    ctx = context(model)
    Channels().sites(model, ctx)
    skips = dict(ctx.skips)
    assert skips["c"].startswith("its 4 channels stay, 132 parameters, 4 of them")
    assert skips["c"].endswith("'y' is an output of the model")


def test_amounts_of_the_whole_model_are_met_at_about_the_least_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Steps of one group save much more than those of the other.
    model = network(wide=32)
    sizes = {"a": 32, "b": 32}
    for seed in range(8):
        draw = np.random.default_rng(seed)
        worth = {n: np.sort(draw.random(k) ** 3) for n, k in sizes.items()}

        def given(
            model: Model,
            groups: Sequence[Group],
            ctx: Context,
            worth: dict[str, np.ndarray] = worth,
        ) -> list[np.ndarray]:
            return [worth[group.name] for group in groups]

        monkeypatch.setitem(IMPORTANCES, "given", Importance(given))
        pass_ = Channels(macs=0.7, importance="given", repair=False)
        sites = pass_.sites(model, context(model))
        kept = {
            **sizes,
            **{s.where: s.kept for s in sites if isinstance(s, ChannelSite)},
        }

        def macs(a: int, b: int) -> int:
            return 6 * a + a * b + 4 * b

        def loss(a: int, b: int, worth: dict[str, np.ndarray] = worth) -> float:
            return float(worth["a"][: 32 - a].sum() + worth["b"][: 32 - b].sum())

        fits = [
            loss(a, b)
            for a in range(8, 33, 8)
            for b in range(8, 33, 8)
            if macs(a, b) <= 0.7 * macs(32, 32)
        ]
        assert macs(kept["a"], kept["b"]) <= 0.7 * macs(32, 32)
        assert loss(kept["a"], kept["b"]) <= 1.5 * min(fits) + 1e-12


def test_readers_behind_a_norm_are_fitted_to_what_they_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,6] x) => (float[N,4] y) {
            h = MatMul(x, a)
            n = LayerNormalization(h, scale, shift)
            y = Gemm(n, c, c_bias)
        }"""
    )
    weights = {
        "a": random(6, 32, seed=1),
        "scale": np.ones(32, np.float32),
        "shift": random(32, seed=2),
        "c": random(32, 4, seed=3),
        "c_bias": random(4, seed=4),
    }
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = Model.load(proto)
    x = random(200, 6, seed=8)
    wanted = run(model, x)

    def gap() -> float:
        ctx = context(model)
        made = applied(Channels(keep=0.5), model, ctx)
        assert any("takes the variance" in what for _, what in ctx.done)
        return float(np.square(run(made, x) - wanted).sum() / np.square(wanted).sum())

    fitted = gap()
    monkeypatch.setattr(Channels, "_reconstruct", lambda *_: None)
    assert fitted < 0.9 * gap()


def test_few_samples_do_not_make_channels_look_free() -> None:
    # Ten rows of 32 inputs: any ten of them give all others exactly.
    model = network()
    arrays = {"x": random(10, 6, seed=7)}
    ctx = make_context(Splits.build(model, arrays, seed=0), model.copy(), threads=1)
    groups = [g for g in channels.find(model) if g.name == "b"]
    (fitted,) = IMPORTANCES["inputs"](model, groups, ctx)
    (plain,) = IMPORTANCES["energy"](model, groups, ctx)
    assert fitted.sum() > 0.3 * plain.sum()
