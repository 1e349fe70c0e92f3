"""The pass that removes channels: what goes, what is fitted anew, and by how much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink import runtime, testing
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.passes.channels import IMPORTANCES, Channels, ChannelSite
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Splits

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
