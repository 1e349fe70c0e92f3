"""Losses, optimizers and whole steps; the numbers are PyTorch 2.13's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import runtime
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.training import (
    Adam,
    AdamW,
    GradContext,
    Loss,
    Optimizer,
    Sgd,
    TrainingStep,
    cosine,
    cross_entropy,
    gradients,
    mse,
    soft_cross_entropy,
    weighted,
)
from onnxshrink.training.layout import block_size
from onnxshrink.training.step import value_bytes

Array = np.ndarray[Any, Any]

X = np.array([[1, 2, -1], [0.5, -1, 2]], np.float32)
T = np.array([[1, 0, 0], [0, 1, -1]], np.float32)
TEACHER = np.array([[2, 0, 1], [0, 1, -1]], np.float32)


def model_of(text: str) -> Model:
    header = '<ir_version: 10, opset_import: ["" : 20]>\n'
    return Model.load(onnx.parser.parse_model(header + text))


def scaled() -> Model:
    return model_of(
        """g (float[N,3] x) => (float[N,3] y) <float[3] w = {1, -2, 3}> {
          y = Mul(x, w)
        }"""
    )


def squared(ctx: GradContext, values: Any) -> Any:
    return mse(ctx, values["y"], values["t"])


def step_of(optimizer: Optimizer | None = None, **options: Any) -> TrainingStep:
    return TrainingStep(
        scaled(),
        {"x": (2, 3)},
        ["w"],
        squared,
        targets={"t": (np.float32, (2, 3))},
        optimizer=optimizer,
        threads=1,
        **options,
    )


@pytest.mark.parametrize(
    ("optimizer", "clip", "weights", "losses"),
    [
        (
            Sgd(momentum=0.9, weight_decay=0.01),
            None,
            [0.949534, -0.54034, 0.246623],
            [12.541667, 8.753232, 3.830197],
        ),
        (
            Sgd(momentum=0.9, nesterov=True),
            None,
            [0.937655, -0.223542, -0.355532],
            [12.541667, 5.966047, 1.564499],
        ),
        (
            Adam(weight_decay=0.05),
            None,
            [0.714756, -1.700709, 2.700331],
            [12.541667, 11.685417, 10.867649],
        ),
        (
            AdamW(weight_decay=0.1),
            None,
            [0.713866, -1.644484, 2.614333],
            [12.541667, 11.464439, 10.455537],
        ),
        (
            Sgd(momentum=0.0),
            0.5,
            [0.998031, -1.929823, 2.867443],
            [12.541667, 12.223132, 11.908765],
        ),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "clipped"],
)
def test_three_steps(
    optimizer: Optimizer, clip: float | None, weights: list[float], losses: list[float]
) -> None:
    step = step_of(optimizer, clip=clip)
    found = [step({"x": X, "t": T}, 0.1) for _ in range(3)]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(step.weights["w"], weights, rtol=1e-4, atol=2e-5)
    assert step.count == 3


def value_and_gradient(loss: Loss, *extra: tuple[str, Array]) -> tuple[float, Array]:
    model = model_of("g (float[2,3] x) => (float[2,3] y) { y = Identity(x) }")
    ctx = GradContext(model)
    values: dict[str, Any] = {"y": model.graph.nodes[0].outputs[0]}
    feeds = {"x": X}
    for name, array in extra:
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        values[name] = ctx.add_input(name, kind, array.shape)
        feeds[name] = array
    total = loss(ctx, values)
    grad = gradients(model, {total.name: None}, ["x"], ctx)["x"]
    session = runtime.session(model, threads=1, expose=[total.name, grad.name])
    answer = session.run(feeds)
    return float(answer[total.name]), answer[grad.name].reshape(-1)


def test_soft_targets() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: soft_cross_entropy(ctx, v["y"], v["t"], 4.0), ("t", TEACHER)
    )
    assert found == pytest.approx(1.693882, rel=1e-5)
    expected = [-0.146549, 0.379878, -0.233328, -0.016511, -0.401012, 0.417523]
    np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_soft_targets_of_an_equal_teacher_cost_nothing() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: soft_cross_entropy(ctx, v["y"], v["t"], 2.0), ("t", X)
    )
    assert found == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_integer_labels_of_which_one_is_left_out() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: cross_entropy(ctx, v["y"], v["t"]),
        ("t", np.array([2, -100], np.int64)),
    )
    assert found == pytest.approx(3.349012, rel=1e-5)
    expected = [0.259496, 0.705385, -0.964881, 0, 0, 0]
    np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_no_label_at_all_is_no_loss() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: cross_entropy(ctx, v["y"], v["t"]),
        ("t", np.array([-1, -1], np.int64)),
    )
    assert found == 0
    np.testing.assert_array_equal(grad, 0)


def test_cosine() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: cosine(ctx, v["y"], v["t"]), ("t", TEACHER)
    )
    assert found == pytest.approx(1.371623, rel=1e-5)
    expected = [-0.16736, 0.030429, -0.106502, -0.044087, -0.06613, -0.022043]
    np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_losses_add_up_by_weight() -> None:
    found, grad = value_and_gradient(
        lambda ctx, v: weighted(
            ctx,
            (0.5, mse(ctx, v["y"], v["t"])),
            (2.0, mse(ctx, v["y"], v["t"])),
            (0.0, cosine(ctx, v["y"], v["t"])),
        ),
        ("t", T),
    )
    off = X - T
    assert found == pytest.approx(2.5 * float(np.mean(off**2)), rel=1e-5)
    np.testing.assert_allclose(grad, (2.5 * 2 / 6 * off).reshape(-1), rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature"):
        value_and_gradient(
            lambda ctx, v: soft_cross_entropy(ctx, v["y"], v["t"], temperature),
            ("t", T),
        )


@pytest.mark.parametrize("loss", [mse, cosine, soft_cross_entropy])
def test_targets_of_another_shape_are_refused(loss: Any) -> None:
    other = np.zeros((2, 4), np.float32)
    with pytest.raises(UsageError, match="cannot be compared"):
        value_and_gradient(lambda c, v: loss(c, v["y"], v["t"]), ("t", other))


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="do not go with labels"):
        value_and_gradient(
            lambda c, v: cross_entropy(c, v["y"], v["t"]),
            ("t", np.zeros((3,), np.int64)),
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Sgd, {"momentum": 1.0}),
        (Sgd, {"weight_decay": -0.1}),
        (Adam, {"beta1": -0.1}),
        (Adam, {"beta2": 1.0}),
        (AdamW, {"epsilon": 0.0}),
    ],
)
def test_impossible_settings_are_refused(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        kind(**options)
    assert dataclasses.is_dataclass(kind())


# --- steps ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    step = step_of(Adam())
    step({"x": X, "t": T}, 0.1)
    before = {**step.weights, **step.state}
    with pytest.raises(ModelError, match="the loss became"):
        step({"x": X * np.float32(1e30), "t": T}, 0.1)
    after = {**step.weights, **step.state}
    assert step.count == 1
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_weights_go_back_into_the_model() -> None:
    model = scaled()
    step = step_of(Sgd())
    np.testing.assert_array_equal(model.weight("w").read(), [1, -2, 3])
    step({"x": X, "t": T}, 0.1)
    step.store(model)
    np.testing.assert_array_equal(model.weight("w").read(), step.weights["w"])


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match="was given float32"):
        step_of()({"x": X[:1], "t": T}, 0.1)


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no weight to train"):
        TrainingStep(scaled(), {"x": (2, 3)}, [], squared)


def test_a_weight_beside_the_loss_is_refused() -> None:
    model = model_of(
        """g (float[2,3] x) => (float[2,3] y, float[3] u)
        <float[3] w = {1, -2, 3}, float[3] v = {1, 1, 1}> {
          y = Mul(x, w)
          u = Exp(v)
        }"""
    )
    with pytest.raises(UsageError, match="does not depend on 'v'"):
        TrainingStep(
            model,
            {},
            ["w", "v"],
            squared,
            targets={"t": (np.float32, (2, 3))},
        )


def test_integers_are_not_trained() -> None:
    model = model_of(
        """g (float[2,3] x) => (float[2,3] y) <int8[3] w = {1, -2, 3}> {
          v = Cast <to = 1> (w)
          y = Mul(x, v)
        }"""
    )
    with pytest.raises(UsageError, match="only FLOAT can be trained"):
        TrainingStep(model, {}, ["w"], squared, targets={"t": (np.float32, (2, 3))})


def test_a_convolutional_net_learns_its_teacher() -> None:
    random = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(
        """g (float[N,1,8,8] x, float[4,1,3,3] w, float[4] b, float[64,3] f)
        => (float[N,3] y) {
          c = Conv <pads = [1,1,1,1]> (x, w, b)
          r = Relu(c)
          p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r)
          s = Flatten(p)
          y = MatMul(s, f)
        }"""
    )
    shapes = {"w": (4, 1, 3, 3), "b": (4,), "f": (64, 3)}

    def drawn() -> Model:
        made = onnx.GraphProto()
        made.CopyFrom(graph)
        for name, shape in shapes.items():
            values = random.normal(size=shape).astype(np.float32) * 0.3
            made.initializer.append(onnx.numpy_helper.from_array(values, name))
        inputs = [info for info in made.input if info.name == "x"]
        del made.input[:]
        made.input.extend(inputs)
        imports = [onnx.helper.make_opsetid("", 20)]
        return Model.load(
            onnx.helper.make_model(made, opset_imports=imports, ir_version=10)
        )

    teacher, student = drawn(), drawn()
    x = random.normal(size=(32, 1, 8, 8)).astype(np.float32)
    wanted = runtime.session(teacher, threads=1).run({"x": x})["y"]
    step = TrainingStep(
        student,
        {"x": x.shape},
        list(shapes),
        lambda ctx, v: soft_cross_entropy(ctx, v["y"], v["t"], 2.0),
        targets={"t": (np.float32, wanted.shape)},
        threads=1,
    )
    losses = [step({"x": x, "t": wanted}, 0.02) for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    step.store(student)
    mine = runtime.session(student, threads=1).run({"x": x})["y"]
    agreement = np.mean(mine.argmax(1) == wanted.argmax(1))
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        (3, "Conv <pads = [1,1,1,1]> (x, w, b)"),
        (32, "Conv <pads = [1,0,0,1], dilations = [2,1]> (x, w, b)"),
        (32, "Conv <strides = [2,1]> (x, w, b)"),
        (1, "Conv <pads = [2,1,1,0], group = 32> (x, w, b)"),
        (1, "Conv <strides = [2,2], group = 32> (x, w, b)"),
    ],
)
@pytest.mark.parametrize("follower", ["Relu", "Tanh"])
def test_the_blocked_layout_changes_nothing(
    channels: int, text: str, follower: str
) -> None:
    random = np.random.default_rng(0)
    inputs = 32 if channels == 1 else channels
    model = model_of(
        f"""g (float[2,{inputs},9,8] x) => (float[2,32,1,1] y)
        <float[1] w = {{0}}, float[1] b = {{0}}, float[1] u = {{0}}> {{
          i = Mul(x, u)
          c = {text.replace("(x,", "(i,")}
          r = {follower}(c)
          y = GlobalAveragePool(r)
        }}"""
    )
    shape = (32, channels, 3, 2)
    model.set_weight("w", random.normal(size=shape).astype(np.float32))
    model.set_weight("b", random.normal(size=32).astype(np.float32))
    model.set_weight("u", random.normal(size=(inputs, 1, 1)).astype(np.float32))
    feeds = {
        "x": random.normal(size=(2, inputs, 9, 8)).astype(np.float32),
        "t": random.normal(size=(2, 32, 1, 1)).astype(np.float32),
    }
    steps = [
        TrainingStep(
            model,
            {},
            ["w", "b", "u"],
            squared,
            targets={"t": (np.float32, (2, 32, 1, 1))},
            optimizer=Sgd(momentum=0.0),
            layout=layout,
            threads=1,
        )
        for layout in ("plain", "auto")
    ]
    losses = [[step(feeds, 0.1) for step in steps] for _ in range(2)]
    for plain, blocked in losses:
        assert blocked == pytest.approx(plain, rel=1e-5)
    for name, array in steps[0].weights.items():
        np.testing.assert_allclose(steps[1].weights[name], array, rtol=1e-4, atol=1e-6)
    # Where the processor has the layout, it was used.
    used = {node.op for node in steps[1].model.nodes()}
    assert ("ReorderOutput" in used) == bool(block_size())
    assert "ReorderOutput" not in {node.op for node in steps[0].model.nodes()}


def test_bytes_of_values_are_those_of_every_tensor_that_is_computed() -> None:
    model = model_of(
        "g (float[N,3] x) => (int64[N] z) <float[3,5] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,"
        "5,6}> { h = MatMul(x, w)  z = ArgMax<axis=1,keepdims=0>(h) }"
    )
    # Of two samples: 2 x 3 and 2 x 5 floats, 2 integers of 8 bytes.
    assert value_bytes(model, {"x": (2, 3)}) == 4 * (6 + 10) + 2 * 8
