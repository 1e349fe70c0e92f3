"""Gradients of whole models: as steep along them as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.training import GradContext, cross_entropy, gradients, prepare

MODELS = sorted((Path(__file__).parents[2] / "models").glob("*.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=[path.stem for path in MODELS])
def test_the_loss_falls_as_the_gradients_say(path: Path) -> None:
    random = np.random.default_rng(0)
    model = Model.load(path)
    info = model.inputs[0]
    shape = [8, *(int(n) for n in (info.shape or ())[1:] if isinstance(n, int))]
    x = random.random(shape).astype(np.float32)
    weights = {
        weight.name: weight.read()
        for weight in model.weights()
        if weight.data_type == onnx.TensorProto.FLOAT and weight.size > 1
    }
    ready = prepare(model, {info.name: shape}, keep=list(weights))
    ctx = GradContext(ready)
    scores = ready.graph.outputs[0]
    labels = ctx.add_input("labels", onnx.TensorProto.INT64, [8])
    loss = cross_entropy(ctx, scores, labels)
    found = gradients(ready, {loss.name: None}, list(weights), ctx)
    assert set(found) == set(weights)
    names = [tensor.name for tensor in found.values()]
    feeds = {info.name: x, "labels": random.integers(0, 10, 8)}
    session = runtime.session(ready, threads=1, expose=[loss.name, *names])
    answer = session.run(feeds)
    grads = {name: answer[tensor.name] for name, tensor in found.items()}
    for name, grad in grads.items():
        assert grad.shape == weights[name].shape
        assert np.isfinite(grad).all()
        slope = float(np.sum(np.float64(grad) ** 2))
        if slope < 1e-10:
            continue
        # A step that moves the loss by about 0.2 %, both ways.
        size = 0.002 * float(answer[loss.name]) / slope
        ends = []
        for sign in (1, -1):
            ready.set_weight(name, weights[name] + np.float32(sign * size) * grad)
            moved = runtime.session(ready, threads=1, expose=[loss.name])
            ends.append(float(moved.run(feeds, [loss.name])[loss.name]))
        ready.set_weight(name, weights[name])
        assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=0.05), name
