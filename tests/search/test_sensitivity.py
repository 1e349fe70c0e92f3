"""Sensitivity: what making one layer coarse does to the outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxshrink import runtime
from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.cli import main
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.search.sensitivity import of_pass, of_weights, rank, rounded
from onnxshrink.structure.layers import LinearWeight, find
from onnxshrink.testing import example_models

EXAMPLES = example_models()


def context(model: Model, **arrays: np.ndarray) -> Context:
    samples = Samples.from_arrays(arrays) if arrays else None
    splits = Splits.build(model, samples)
    return make_context(samples=splits, reference=model, threads=1)


def two_layers() -> Model:
    """The first product counts a thousand times as much as the second."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        example (float[N,4] x) => (float[N,4] y)
        <float weak = {0.001}> {
            loud = MatMul(x, a)
            quiet = MatMul(x, b)
            scaled = Mul(quiet, weak)
            y = Add(loud, scaled)
        }"""
    )
    rng = np.random.default_rng(0)
    for name in ("b", "a"):
        array = rng.standard_normal((4, 4)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.load(proto)


def x_of(count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 4)).astype(np.float32)


def test_the_layer_that_the_output_hears_most_comes_first() -> None:
    model = two_layers()
    ctx = context(model, x=x_of())
    layers = list(find(model))
    found = rank(model, layers, ctx, bits=4)
    assert [layer.name for layer, _ in found] == ["a", "b"]
    assert 100 < found[0][1] / found[1][1] < 10000


def test_damage_is_noise_over_signal_of_the_models_own_output() -> None:
    model = two_layers()
    x = x_of()
    before = model.to_bytes()
    (effect,) = of_weights(model, context(model, x=x), bits=3, only=("a",)).effects
    assert model.to_bytes() == before
    samples = context(model, x=x).samples.validation
    assert samples is not None
    feed = next(samples.batches(len(samples)))
    trial = model.copy()
    (layer,) = find(trial, only=("a",))
    rounded(trial, layer, 3)
    wanted = runtime.session(model).run(feed)["y"].astype(np.float64)
    got = runtime.session(trial).run(feed)["y"].astype(np.float64)
    noise = np.sqrt(((got - wanted) ** 2).sum() / (wanted**2).sum())
    np.testing.assert_allclose(effect.damage, noise, rtol=1e-5)
    np.testing.assert_allclose(effect.sqnr_db, -20 * np.log10(noise), rtol=1e-5)


def test_a_change_of_ones_own_is_measured() -> None:
    model = two_layers()
    ctx = context(model, x=x_of())

    def erase_quiet(trial: Model, layer: LinearWeight) -> None:
        if layer.name == "b":
            trial.set_weight("b", np.zeros((4, 4), np.float32))

    found = rank(model, list(find(model)), ctx, erase_quiet)
    assert [layer.name for layer, _ in found] == ["b", "a"]
    assert found[1][1] == 0.0


def test_more_bits_do_less_damage() -> None:
    model = two_layers()
    ctx = context(model, x=x_of())
    damage = [of_weights(model, ctx, bits=bits).effects[0].damage for bits in (2, 4, 8)]
    assert damage[0] > 2 * damage[1] > 20 * damage[2] > 0


def test_all_together_is_measured_as_well() -> None:
    model = two_layers()
    found = of_weights(model, context(model, x=x_of()), bits=4)
    assert found.together is not None
    assert found.together.bytes_saved == 2 * (64 - 8)
    assert found.together.damage == pytest.approx(found.effects[0].damage, rel=0.1)


@dataclass(frozen=True, kw_only=True)
class Erase(SitePass):
    """Set weights to zero."""

    name: ClassVar[str] = "erase"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        ctx.skipped("weak", "is a scalar")
        return [Site(name, "MatMul", Savings(bytes=64)) for name in "ba"]

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        model.set_weight(site.where, np.zeros((4, 4), np.float32))
        ctx.did(site.where, "erased")


def test_the_sites_of_a_pass_are_ranked() -> None:
    model = two_layers()
    ctx = context(model, x=x_of())
    found = of_pass(Erase(), model, ctx)
    assert [effect.where for effect in found.effects] == ["a", "b"]
    assert found.effects[0].damage == pytest.approx(1.0, abs=0.01)
    assert found.skipped == (("weak", "is a scalar"),)
    assert found.change == "erase"
    assert not ctx.done


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_measured_or_says_why_not(name: str) -> None:
    model = Model.load(EXAMPLES[name])
    before = model.to_bytes()
    found = of_weights(model, context(model))
    assert found.random
    assert model.to_bytes() == before
    layers = list(find(model, roles=("weight", "table")))
    assert len(found.effects) + len(found.skipped) == len(layers)
    assert all(np.isfinite(effect.damage) for effect in found.effects)


def test_too_few_bits_are_refused() -> None:
    model = two_layers()
    with pytest.raises(UsageError, match="bits is from 2 to 8"):
        of_weights(model, context(model, x=x_of()), bits=1)


# --- the command ------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    two_layers().save(tmp_path / "two.onnx")
    np.savez(tmp_path / "x.npz", x=x_of(40))
    return str(tmp_path / "two.onnx"), str(tmp_path / "x.npz")


def test_inspect_prints_the_ranking(files: tuple[str, str]) -> None:
    model, data = files
    result = CliRunner().invoke(
        main, ["inspect", model, "--sensitivity", "--bits", "4", "--data", data]
    )
    assert result.exit_code == 0, result.output
    text = result.output.partition("Sensitivity: weights rounded to 4 bits")[2]
    assert "on 32 samples" in text
    rows = [line.split()[0] for line in text.splitlines() if "MatMul" in line]
    assert rows == ["a", "b"]


def test_inspect_gives_the_ranking_as_json(files: tuple[str, str]) -> None:
    model, data = files
    args = ["inspect", model, "--json", "--sensitivity", "--samples", "7"]
    result = CliRunner().invoke(main, [*args, "--data", data])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["weights"]
    assert [one["where"] for one in found["sensitivity"]["effects"]] == ["a", "b"]
    assert found["sensitivity"]["samples"] == 7


def test_inspect_measures_what_a_pass_does(files: tuple[str, str]) -> None:
    model, data = files
    args = ["inspect", model, "--json", "--sensitivity", "--by", "half:mode=compute"]
    result = CliRunner().invoke(main, [*args, "--data", data])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["sensitivity"]
    places = {one["where"] for one in found["effects"]}
    assert places == {"loud", "quiet", "scaled", "y"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "4"], "--bits is for --sensitivity"),
        (["--sensitivity", "--bits", "4", "--by", "half"], "take one of them"),
        (["--sensitivity", "--by", "fold"], "acts at sites"),
        (["--sensitivity", "--by", "hlaf"], "Did you mean 'half'"),
    ],
)
def test_inspect_refuses_what_does_not_fit(
    files: tuple[str, str], args: list[str], message: str
) -> None:
    result = CliRunner().invoke(main, ["inspect", files[0], *args])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
