"""What is true of every pass: ``onnxshrink.testing.check_laws`` says what that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from onnxshrink import registry
from onnxshrink.base import Context, Pass, Promise, Site, SitePass
from onnxshrink.model import Model
from onnxshrink.pipeline import Pipeline
from onnxshrink.testing import check_laws, example_models

MODELS = example_models()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", registry.passes())
def test_every_pass_keeps_the_laws(name: str, model: str) -> None:
    check_laws(registry.get(name), {model: MODELS[model]})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "text",
    [
        "quantize:activations=static",
        pytest.param("quantize", marks=pytest.mark.slow),
        pytest.param("quantize:activations=dynamic", marks=pytest.mark.slow),
        pytest.param("half:mode=compute", marks=pytest.mark.slow),
        pytest.param("distill:epochs=1,lr=0.01", marks=pytest.mark.slow),
        pytest.param("codebook:bits=3", marks=pytest.mark.slow),
        pytest.param("codebook:values=4,scale=channel", marks=pytest.mark.slow),
        pytest.param("codebook:dim=2,values=8", marks=pytest.mark.slow),
        pytest.param("codebook:rate=1.5,also=biases", marks=pytest.mark.slow),
        pytest.param("codebook:bytes=0.3", marks=pytest.mark.slow),
    ],
)
def test_passes_that_learn_from_data_keep_the_laws(text: str, model: str) -> None:
    (pass_,) = Pipeline.parse(text).passes
    check_laws(pass_, {model: MODELS[model]}, data=True)


@dataclass(frozen=True, kw_only=True)
class Nothing(Pass):
    """Do nothing."""

    name: ClassVar[str] = "nothing"
    promise: ClassVar[Promise] = Promise.SAME

    def apply(self, model: Model, ctx: Context) -> None: ...


class Double(Nothing):
    """Change outputs in spite of the promise."""

    def apply(self, model: Model, ctx: Context) -> None:
        weight = model.weight("fc1_weight")
        model.set_weight(weight, weight.read() * 2)
        ctx.did("fc1_weight", "doubled")


class Silent(Double):
    """Change a weight and say nothing of it."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def apply(self, model: Model, ctx: Context) -> None:
        super().apply(model, ctx)
        ctx.done.clear()


class Boast(Nothing):
    """Say that something was done."""

    def apply(self, model: Model, ctx: Context) -> None:
        ctx.did("fc1_weight", "nothing at all")


class Renamed(Nothing):
    """Give an output another name."""

    def apply(self, model: Model, ctx: Context) -> None:
        model.graph.outputs[0].name = "other"
        ctx.did("logits", "renamed")


class Broken(Nothing):
    """Leave a node without inputs."""

    promise: ClassVar[Promise] = Promise.SIGNATURE

    def apply(self, model: Model, ctx: Context) -> None:
        model.graph.nodes[0].inputs.clear()
        ctx.did("", "broken")


class NotFinite(Double):
    """Put NaN into a weight."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def apply(self, model: Model, ctx: Context) -> None:
        model.set_weight("fc2_bias", np.full(4, np.nan, np.float32))
        ctx.did("fc2_bias", "lost")


class Dice(Double):
    """Draw without a seed."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def apply(self, model: Model, ctx: Context) -> None:
        values = np.random.default_rng().normal(size=4).astype(np.float32)
        model.set_weight("fc2_bias", values)
        ctx.did("fc2_bias", "drawn")


class Mute(Double):
    """Leave a weight alone for no reason."""

    def apply(self, model: Model, ctx: Context) -> None:
        ctx.skipped("fc2_bias", "")


@dataclass(frozen=True, kw_only=True)
class Undocumented(Nothing):
    """Have an option that nothing explains."""

    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Sites(SitePass):
    """Zero every bias."""

    name: ClassVar[str] = "sites"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> list[Site]:
        return [Site("fc1_bias", "Gemm"), Site("fc2_bias", "Gemm")]

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        weight = model.weight(site.where)
        model.set_weight(weight, np.zeros_like(weight.read()))
        ctx.did(site.where, "zeroed")


class Eager(Sites):
    """Change the model while listing."""

    def sites(self, model: Model, ctx: Context) -> list[Site]:
        model.set_weight("fc1_bias", np.ones(16, np.float32))
        return super().sites(model, ctx)


class Twins(Sites):
    """List two sites under one name."""

    def sites(self, model: Model, ctx: Context) -> list[Site]:
        if self.skip or self.only:
            return []
        return [Site("fc1_bias", "Gemm"), Site("fc1_bias", "Gemm")]


class Lazy(Sites):
    """Find no site and give no reason."""

    def sites(self, model: Model, ctx: Context) -> list[Site]:
        return []


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (Double, "output logits moved by"),
        (Silent, r"was changed, and the pass says it did nothing"),
        (Boast, r"was not changed, and the pass says it did"),
        (Renamed, "outputs were"),
        (Broken, "the model is broken"),
        (NotFinite, "no longer finite"),
        (Dice, "gave other bytes"),
        (Mute, "says nothing"),
        (Undocumented, "option size is missing from the docstring"),
        (Sites, "still lists"),
        (Eager, r"sites\(\) changed the model"),
        (Twins, "two sites have one name"),
        (Lazy, "nothing says why"),
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_a_pass_that_breaks_a_law_is_caught(
    faulty: type[Pass], message: str, data: bool
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_laws(faulty, {"perceptron": MODELS["perceptron"]}, data=data)


def test_a_pass_that_does_nothing_keeps_the_laws_on_every_model() -> None:
    check_laws(Nothing())
