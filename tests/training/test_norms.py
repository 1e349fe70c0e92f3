"""BatchNormalization in training: folded, normalizing with the batch, estimated."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.training import TrainingStep, mse
from onnxshrink.training.norms import (
    estimate,
    find_norms,
    fold_norms,
    use_batch_statistics,
)

Array = np.ndarray[Any, Any]


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_of(text: str, opset: int = 17, **weights: Array) -> Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def stack(opset: int = 17) -> Model:
    return model_of(
        """g (float[N,2,6,6] x) => (float[N,4,6,6] y) {
          a = Conv<pads = [1, 1, 1, 1]>(x, w)
          b = BatchNormalization(a, s1, b1, m1, v1)
          r = Relu(b)
          c = Conv(r, u)
          y = BatchNormalization(c, s2, b2, m2, v2)
        }""",
        opset,
        w=draw(1, 3, 2, 3, 3),
        u=draw(2, 4, 3, 1, 1),
        s1=np.abs(draw(3, 3)) + np.float32(0.5),
        b1=draw(4, 3),
        m1=np.zeros(3, np.float32),
        v1=np.ones(3, np.float32),
        s2=np.abs(draw(5, 4)) + np.float32(0.5),
        b2=draw(6, 4),
        m2=np.zeros(4, np.float32),
        v2=np.ones(4, np.float32),
    )


def context(x: Array, model: Model) -> tuple[Samples, Context]:
    samples = Samples.from_arrays({"x": x}).bind(model.inputs)
    splits = Splits(training=samples)
    return samples, make_context(samples=splits, reference=model, threads=1)


def outputs_of(model: Model, x: Array, *names: str) -> dict[str, Any]:
    return runtime.session(model, threads=1, expose=names).run({"x": x})


def all_of(model: Model) -> list[str]:
    return find_norms(model, (), (), lambda *_: None)


@pytest.mark.parametrize("opset", [11, 17])
def test_estimated_statistics_are_those_of_what_a_norm_reads(opset: int) -> None:
    model = stack(opset)
    samples, ctx = context(draw(7, 100, 2, 6, 6), model)
    estimate(model, all_of(model), samples, ctx)
    model.check()
    assert model.opset == opset
    seen = outputs_of(model, draw(7, 100, 2, 6, 6), "a", "c")
    for value, mean, variance in [("a", "m1", "v1"), ("c", "m2", "v2")]:
        axes = (0, 2, 3)
        np.testing.assert_allclose(
            model.weight(mean).read(), seen[value].mean(axes), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            model.weight(variance).read(), seen[value].var(axes), rtol=1e-4
        )


def test_batches_count_by_their_samples_and_their_means_spread() -> None:
    model = model_of(
        "g (float[N,1] x) => (float[N,1] y) { y = BatchNormalization(x, s, b, m, v) }",
        s=np.ones(1, np.float32),
        b=np.zeros(1, np.float32),
        m=np.zeros(1, np.float32),
        v=np.ones(1, np.float32),
    )
    x = np.arange(200, dtype=np.float32)[:, None]  # batches of 128 and 72
    samples, ctx = context(x, model)
    estimate(model, ["m"], samples, ctx)
    np.testing.assert_allclose(model.weight("m").read(), [99.5], rtol=1e-6)
    np.testing.assert_allclose(model.weight("v").read(), [x.var()], rtol=1e-5)


def test_training_normalizes_with_the_batch_and_its_gradient_knows() -> None:
    model = stack()
    work = model.copy()
    use_batch_statistics(work, all_of(work))
    work.check()
    x, target = draw(7, 16, 2, 6, 6), draw(8, 16, 4, 6, 6)
    step = TrainingStep(
        work,
        {"x": x.shape},
        ["w", "s1", "b2"],
        lambda ctx, values: mse(ctx, values["y"], values["t"]),
        targets={"t": (np.float32, target.shape)},
        threads=1,
    )
    estimated = model.copy()
    samples, ctx = context(x, model)
    estimate(estimated, all_of(estimated), samples, ctx)
    loss = float(np.square(outputs_of(estimated, x)["y"] - target).mean())
    losses = [step({"x": x, "t": target}, 0.02) for _ in range(30)]
    assert losses[0] == pytest.approx(loss, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_folding_moves_norms_into_kernels_and_keeps_what_is_computed() -> None:
    model = stack()
    x = draw(7, 3, 2, 6, 6)
    before = outputs_of(model, x)["y"]
    assert fold_norms(model, lambda *_: None) == 2
    model.check()
    assert {node.op for node in model.nodes()} == {"Conv", "Relu"}
    np.testing.assert_allclose(outputs_of(model, x)["y"], before, rtol=1e-4, atol=1e-4)


def test_a_norm_that_cannot_be_folded_says_why() -> None:
    model = model_of(
        "g (float[N,3] x) => (float[N,3] y) "
        "{ r = Relu(x)  y = BatchNormalization(r, s, s, s, s) }",
        s=np.ones(3, np.float32),
    )
    notes: list[str] = []
    assert fold_norms(model, lambda *what: notes.append(" ".join(what))) == 0
    assert {node.op for node in model.nodes()} == {"Relu", "BatchNormalization"}
    found = find_norms(model, (), (), lambda *what: notes.append(" ".join(what)))
    assert found == []
    assert "read by other nodes" in notes[-1]


@pytest.mark.parametrize(("returned", "found"), [("m2", ["m1"]), ("b2", ["m1", "m2"])])
def test_a_mean_that_is_also_an_output_stays(returned: str, found: list[str]) -> None:
    model = stack()
    model.graph.outputs.append(model.weight(returned).value)
    assert find_norms(model, (), (), lambda *_: None) == found


def test_names_choose_norms() -> None:
    model = stack()
    assert find_norms(model, ("m1",), (), print) == ["m1"]
    assert find_norms(model, (), ("m1",), print) == ["m2"]
    assert find_norms(model, ("Conv",), (), print) == []
