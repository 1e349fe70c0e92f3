"""Separable convolutions: exact with enough branches, cheaper, and why others stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxshrink import runtime, testing
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.passes.separable import DenseConvolution, Separable
from onnxshrink.samples import Splits

MODELS = Path(__file__).parents[2] / "models"


def model_of(
    *nodes: onnx.NodeProto,
    weights: dict[str, np.ndarray],
    shape: tuple[int | str, ...],
    opset: int = 17,
) -> Model:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(
                "y", onnx.TensorProto.FLOAT, [f"d{i}" for i in range(len(shape))]
            )
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )
    return Model.load(proto)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng([seed, *shape])
    return draw.standard_normal(shape).astype(np.float32)


def conv(
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    *,
    inputs: int = 8,
    outputs: int = 8,
    bias: bool = True,
    **attrs: Any,
) -> Model:
    weights = {"w": random(outputs, inputs, *kernel)}
    if bias:
        weights["b"] = random(outputs)
    node = helper.make_node("Conv", ["x", *weights], ["y"], name="conv", **attrs)
    return model_of(node, weights=weights, shape=("N", inputs, *size))


def context(model: Model, count: int = 16, *, data: bool = True) -> Context:
    if not data:
        return make_context(Splits.build(model), model.copy(), threads=1)
    shapes = {"x": tuple(d for d in model.inputs[0].shape or () if isinstance(d, int))}
    arrays = {"x": random(count, *shapes["x"], seed=1)}
    splits = Splits.build(model, arrays, seed=0)
    return make_context(splits, model.copy(), threads=1)


def run(model: Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(runtime.session(model, threads=1).run({"x": x})["y"])


def applied(pass_: Separable, model: Model, ctx: Context) -> Model:
    made = model.copy()
    pass_.apply(made, ctx)
    onnx.checker.check_model(made.to_proto())
    return made


def noise(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    rank = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    if max(kernel) == 1:
        kernel = (3, *kernel[1:])
    attrs: dict[str, Any] = {
        "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
    }
    padding = draw(st.sampled_from(["pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        attrs["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    else:
        attrs["auto_pad"] = padding
        if padding.startswith("SAME"):
            attrs["dilations"] = [1] * rank
    return kernel, (8,) * rank, attrs


@settings(max_examples=25)
@given(windows(), st.sampled_from(["pointwise", "depthwise"]), st.booleans())
def test_enough_branches_give_the_same_outputs(
    window: Any, order: Any, bias: bool
) -> None:
    kernel, size, attrs = window
    model = conv(kernel, size, bias=bias, **attrs)
    x = random(2, 8, *size, seed=2)
    taps = int(np.prod(kernel))
    made = model.copy()
    pass_ = Separable(branches=taps, order=order)
    # It saves nothing, so that the plan has to be made by hand.
    site = DenseConvolution("w", "Conv", branches=taps, orders=(order,))
    pass_.rewrite(made, site, context(model, data=False))
    assert noise(run(model, x), run(made, x)) < 1e-5


@pytest.mark.parametrize("order", ["pointwise", "depthwise"])
@pytest.mark.parametrize("data", [False, True])
def test_parameters_and_arithmetic_are_those_of_the_paper(
    order: Any, data: bool
) -> None:
    model = conv((3, 3), (8, 8), inputs=16, outputs=32, pads=[1] * 4)
    ctx = context(model, data=data)
    pass_ = Separable(order=order)
    (site,) = pass_.sites(model, ctx)
    assert isinstance(site, DenseConvolution)
    middle = 32 if order == "pointwise" else 16
    # Howard et al. 2017, section 3.1: Dk*Dk*M*Df*Df + M*N*Df*Df.
    entries = middle * 9 + 16 * 32
    assert site.savings.bytes == 4 * (16 * 32 * 9 - entries)
    assert site.savings.macs == (16 * 32 * 9 - entries) * 64
    assert site.cost is not None
    assert (site.cost.bytes, site.cost.macs) == (4 * 16 * 32 * 9, 16 * 32 * 9 * 64)
    made = applied(pass_, model, ctx)
    sizes = sum(w.size for w in made.weights() if len(w.shape) == 4)
    assert sizes == entries


def test_data_make_it_fit_what_the_layer_reads() -> None:
    model = conv((3, 3), (10, 10), inputs=12, outputs=12, pads=[1] * 4)
    x = random(40, 12, 10, 10, seed=3) + random(12, 1, 1, seed=4) * 3
    x[:, 1:] += x[:, :1]  # channels have to do with each other
    splits = Splits.build(model, {"x": x[:32]}, seed=0)
    ctx = make_context(splits, model.copy(), threads=1)
    wanted, held = run(model, x[32:]), x[32:]
    fitted = applied(Separable(), model, ctx)
    plain = applied(Separable(), model, context(model, data=False))
    assert noise(wanted, run(fitted, held)) < 0.8 * noise(wanted, run(plain, held))
    # The bias takes up the mean of what is missing.
    gap = (wanted - run(fitted, held)).mean(axis=(0, 2, 3))
    assert np.abs(gap).max() < 0.2 * np.abs(wanted).mean()


def test_a_shared_kernel_is_split_once() -> None:
    weights = {"w": random(32, 32, 3, 3)}
    model = model_of(
        helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"], pads=[1] * 4),
        weights=weights,
        shape=("N", 32, 16, 16),
    )
    made = applied(Separable(), model, context(model))
    assert sorted(w.shape for w in made.weights() if len(w.shape) == 4) == [
        (32, 1, 3, 3),
        (32, 32, 1, 1),
    ]
    assert [n.op for n in made.graph.nodes] == ["Conv", "Conv", "Relu", "Conv", "Conv"]


def test_a_branch_of_the_graph_is_replaced_by_its_weights_alone() -> None:
    inner = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["t"], pads=[1] * 4)],
        "then",
        [],
        [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [1, 32, 16, 16])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])],
        "else",
        [],
        [helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, [1, 32, 16, 16])],
    )
    model = model_of(
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other),
        weights={"w": random(32, 32, 3, 3), "zero": np.zeros((), np.float32)},
        shape=(1, 32, 16, 16),
    )
    made = applied(Separable(), model, context(model, data=False))
    x = np.abs(random(1, 32, 16, 16))
    assert run(made, x).shape == run(model, x).shape
    assert sum(node.op == "Conv" for node in made.nodes()) == 2


def test_a_norm_that_is_added_changes_nothing() -> None:
    model = conv((3, 3), (8, 8), pads=[1] * 4)
    ctx = context(model)
    without = applied(Separable(), model, ctx)
    with_norm = applied(Separable(norm="add"), model, ctx)
    assert [n.op for n in with_norm.graph.nodes][-1] == "BatchNormalization"
    x = random(4, 8, 8, 8, seed=5)
    assert noise(run(without, x), run(with_norm, x)) < 1e-5
    # Its statistics are those of what it reads.
    samples = ctx.samples.calibration
    assert samples is not None
    outputs = run(without, samples.read(np.arange(samples.used))["x"])
    norm = with_norm.graph.nodes[-1]
    mean = with_norm.constant(norm.inputs[3])
    assert mean is not None
    np.testing.assert_allclose(
        mean.read(), outputs.mean(axis=(0, 2, 3)), rtol=0.05, atol=0.05
    )


def test_the_better_order_is_taken() -> None:
    draw = np.random.default_rng(6)
    # One kernel for each output: pointwise first is exact.
    weights = {
        "w": np.einsum(
            "oc,ok->ock", draw.standard_normal((16, 8)), draw.standard_normal((16, 9))
        )
        .reshape(16, 8, 3, 3)
        .astype(np.float32)
    }
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    model = model_of(node, weights=weights, shape=("N", 8, 8, 8))
    x = random(2, 8, 8, 8)
    made = applied(Separable(), model, context(model, data=False))
    assert noise(run(model, x), run(made, x)) < 1e-5
    worse = applied(Separable(order="depthwise"), model, context(model, data=False))
    assert noise(run(model, x), run(worse, x)) > 0.1


def test_half_precision_stays() -> None:
    weights = {"w": random(16, 16, 3, 3).astype(np.float16)}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Cast", ["c"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    model = model_of(*nodes, weights=weights, shape=("N", 16, 8, 8))
    made = applied(Separable(), model, context(model))
    assert {w.dtype for w in made.weights()} == {np.dtype(np.float16)}
    x = random(2, 16, 8, 8)
    assert np.isfinite(run(made, x)).all()


@pytest.mark.parametrize(
    ("model", "branches", "why"),
    [
        (conv((1, 1), (8, 8)), 1, "pointwise already"),
        (conv((3, 3), (8, 8), inputs=3), 1, "fewer than"),
        (
            conv((3, 3), (8, 8)),
            4,
            "stays dense: .* gain too little .2.30 kB -> 2.18 kB",
        ),
    ],
)
def test_what_would_gain_nothing_stays_with_a_reason(
    model: Model, branches: int, why: str
) -> None:
    ctx = context(model, data=False)
    assert not Separable(branches=branches).sites(model, ctx)
    assert any(re.search(why, reason) for _, reason in ctx.skips), ctx.skips


def test_grouped_and_broken_weights_stay() -> None:
    weights = {
        "grouped": random(8, 4, 3, 3),
        "broken": np.full((8, 8, 3, 3), np.nan, np.float32),
    }
    model = model_of(
        helper.make_node("Conv", ["x", "grouped"], ["a"], group=2),
        helper.make_node("Conv", ["a", "broken"], ["y"]),
        weights=weights,
        shape=("N", 8, 8, 8),
    )
    ctx = context(model, data=False)
    assert not Separable().sites(model, ctx)
    reasons = dict(ctx.skips)
    assert "groups already" in reasons["grouped"]
    assert "NaN" in reasons["broken"]


@pytest.mark.parametrize("branches", [0, 2000])
def test_branches_out_of_range_are_refused(branches: int) -> None:
    with pytest.raises(UsageError, match="branches"):
        Separable(branches=branches)


def test_a_norm_without_data_is_refused() -> None:
    model = conv((3, 3), (8, 8))
    with pytest.raises(UsageError, match="data"):
        Separable(norm="add").sites(model, context(model, data=False))


def test_laws() -> None:
    testing.check_laws(Separable())


def test_laws_with_data() -> None:
    testing.check_laws(Separable(branches=2, norm="add"), data=True)
