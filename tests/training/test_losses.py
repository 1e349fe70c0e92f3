"""Losses against numpy in float64, and their gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from onnxshrink import runtime
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.training import GradContext, gradients
from onnxshrink.training.losses import attention, cross_entropy, top_cross_entropy

Array = np.ndarray[Any, Any]
Numpy = Callable[[Array], float]
RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> Array:
    return RANDOM.normal(size=shape).astype(np.float32)


def loss_and_gradient(
    loss: Any, x: Array, extra: dict[str, Array]
) -> tuple[float, Array]:
    shape = ",".join(map(str, x.shape))
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[{shape}] x) => (float[{shape}] y) {{ y = Identity(x) }}"""
    model = Model.load(onnx.parser.parse_model(text))
    ctx = GradContext(model)
    given = []
    for name, array in extra.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        given.append(ctx.add_input(name, kind, array.shape))
    total = loss(ctx, model.graph.nodes[0].outputs[0], *given)
    grad = gradients(model, {total.name: None}, ["x"], ctx)["x"]
    session = runtime.session(model, threads=1, expose=[total.name, grad.name])
    answer = session.run({"x": x, **extra})
    return float(answer[total.name]), answer[grad.name]


def check(loss: Any, plain: Numpy, x: Array, **extra: Array) -> None:
    """Compare with a float64 formula and its central differences."""
    found, grad = loss_and_gradient(loss, x, extra)
    exact = x.astype(np.float64)
    assert found == pytest.approx(plain(exact), rel=1e-5, abs=1e-6)
    expected = np.zeros_like(exact)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(exact)
        step[place] = 1e-5
        expected[place] = (plain(exact + step) - plain(exact - step)) / 2e-5
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((5, 4), -1), ((3, 4, 2), 1)])
def test_labels_may_be_shares_of_classes(shape: tuple[int, ...], axis: int) -> None:
    shares = softmax(draw(*shape), axis=axis).astype(np.float32)

    def plain(x: Array) -> float:
        return -float((shares * log_softmax(x, axis=axis)).sum(axis).mean())

    check(
        lambda ctx, y, t: cross_entropy(ctx, y, t, axis),
        plain,
        draw(*shape),
        shares=shares,
    )


def coarse(x: Array, indices: Array) -> Array:
    """Return the scores of the classes chosen and of all others together."""
    top = np.take_along_axis(x, indices, -1)
    others = x.copy()
    np.put_along_axis(others, indices, -np.inf, -1)
    return np.concatenate([top, logsumexp(others, axis=-1, keepdims=True)], -1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)])
def test_the_largest_scores_and_a_rest_teach(
    shape: tuple[int, ...], temperature: float
) -> None:
    told = draw(*shape) * 3
    indices = np.argsort(-told, axis=-1)[..., :3]
    known = coarse(told.astype(np.float64), indices)

    def plain(x: Array) -> float:
        mine = log_softmax(coarse(x, indices) / temperature, axis=-1)
        theirs = log_softmax(known / temperature, axis=-1)
        apart = (np.exp(theirs) * (theirs - mine)).sum(-1)
        return float(apart.mean()) * temperature**2

    check(
        lambda ctx, y, *t: top_cross_entropy(ctx, y, t[0], t[1], t[2], temperature),
        plain,
        draw(*shape),
        top=known[..., :3].astype(np.float32),
        indices=indices,
        rest=known[..., 3].astype(np.float32),
    )


def test_the_rest_is_exact_where_one_class_has_nearly_all() -> None:
    x = np.array([[40.0, 1.0, 2.0, 3.0]], np.float32)
    rest = np.array([3.4], np.float32)
    found, grad = loss_and_gradient(
        lambda ctx, y, *t: top_cross_entropy(ctx, y, t[0], t[1], t[2], 20.0),
        x,
        {"top": x[:, :1], "indices": np.zeros((1, 1), np.int64), "rest": rest},
    )
    two = [np.array([40.0, r]) / 20 for r in (3.4, logsumexp([1, 2, 3]))]
    theirs, mine = (log_softmax(scores) for scores in two)
    expected = float((np.exp(theirs) * (theirs - mine)).sum()) * 400
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("mine", "theirs", "axis"),
    [
        ((2, 3, 2, 2), (2, 5, 2, 2), 1),
        ((2, 4, 3), (2, 4, 6), 2),
        ((2, 3, 4), (2, 3, 4), 1),
    ],
)
def test_attention_is_where_the_energy_lies(
    mine: tuple[int, ...], theirs: tuple[int, ...], axis: int
) -> None:
    told = draw(*theirs)

    def scaled(x: Array) -> Array:
        energy = np.square(x).sum(axis).reshape(len(x), -1)
        made: Array = energy / np.linalg.norm(energy, axis=1, keepdims=True)
        return made

    def plain(x: Array) -> float:
        off = scaled(x) - scaled(told.astype(np.float64))
        return float(np.square(off).sum(1).mean())

    check(lambda ctx, y, t: attention(ctx, y, t, axis), plain, draw(*mine), told=told)


def test_attention_of_nothing_is_finite() -> None:
    found, grad = loss_and_gradient(
        lambda ctx, y, t: attention(ctx, y, t, 1),
        np.zeros((1, 2, 3), np.float32),
        {"told": np.ones((1, 2, 3), np.float32)},
    )
    assert found == pytest.approx(1.0)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("loss", "shapes", "says"),
    [
        (lambda c, y, t: attention(c, y, t, 1), [(2, 3, 5)], "cannot be compared"),
        (lambda c, y, t: attention(c, y, t, 2), [(2, 5, 4)], "cannot be compared"),
        (cross_entropy, [(2, 3, 5)], "cannot be compared"),
        (top_cross_entropy, [(2, 3, 2), (2, 3, 2), (2, 2)], "do not go with"),
        (top_cross_entropy, [(2, 3, 4), (2, 3, 4), (2, 3)], "do not go with"),
        (top_cross_entropy, [(2, 2, 2), (2, 2, 2), (2, 2)], "do not go with"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(
    loss: Any, shapes: list[tuple[int, ...]], says: str
) -> None:
    extra = {
        f"t{at}": np.zeros(shape, np.int64 if at == 1 else np.float32)
        for at, shape in enumerate(shapes)
    }
    with pytest.raises(UsageError, match=says):
        loss_and_gradient(loss, draw(2, 3, 4), extra)
