"""Gradients of LSTM, GRU and RNN against central differences in float64.

The reference is the operators' definition, one sample and one gate at a time, which
onnxruntime's own kernels confirm on every case they take.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.testing import examples
from onnxshrink.training import TrainingStep, gradients, mse, prepare
from onnxshrink.training import rules_recurrent as recurrent

Array = np.ndarray[Any, Any]
STEPS, BATCH, WIDTH, HIDDEN = 4, 2, 3, 2
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
NAMES = ("x", "w", "r", "b", "lengths", "h", "c", "p")


@dataclass(frozen=True)
class Case:
    """A recurrent node; ``given`` are its optional inputs by the names above."""

    op: str
    given: str = "b"
    attrs: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items())
        return f"{self.op}-{self.given}-{attrs}".replace(" ", "")

    @property
    def ways(self) -> int:
        return 2 if self.attrs.get("direction") == "bidirectional" else 1


def drawn(case: Case) -> dict[str, Array]:
    random = np.random.default_rng(zlib.crc32(str(case).encode()))
    rows = GATES[case.op] * HIDDEN
    shapes = {
        "x": (STEPS, BATCH, WIDTH),
        "w": (case.ways, rows, WIDTH),
        "r": (case.ways, rows, HIDDEN),
        "b": (case.ways, 2 * rows),
        "h": (case.ways, BATCH, HIDDEN),
        "c": (case.ways, BATCH, HIDDEN),
        "p": (case.ways, 3 * HIDDEN),
    }
    found = {}
    for name in ("x", "w", "r", *case.given):
        value = random.normal(size=shapes[name]).astype(np.float32)
        if case.attrs.get("layout") and name in "xhc":
            value = np.ascontiguousarray(value.swapaxes(0, 1))
        found[name] = value
    return found


def model_of(case: Case, inputs: Mapping[str, Array]) -> onnx.ModelProto:
    known = NAMES if case.op == "LSTM" else NAMES[:6]
    names = [n if n in inputs else "" for n in known]
    constants = []
    if case.lengths:
        names[4] = "lengths"
        constants.append(
            numpy_helper.from_array(np.array(case.lengths, np.int32), "lengths")
        )
    outs = ["y", "yh", "yc"][: 3 if case.op == "LSTM" else 2]
    node = helper.make_node(
        case.op, names, outs, name="it", hidden_size=HIDDEN, **case.attrs
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape)
            for k, v in inputs.items()
        ],
        [
            helper.make_tensor_value_info(o, TensorProto.FLOAT, [None] * rank)
            for o, rank in zip(outs, (4, 3, 3), strict=False)
        ],
        constants,
    )
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


# --- the definition ---------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Softplus": lambda x: np.log1p(np.exp(x)),
    "HardSigmoid": lambda x: np.clip(0.3 * x + 0.45, 0, 1),
    "LeakyRelu": lambda x: np.where(x > 0, x, 0.1 * x),
    "ThresholdedRelu": lambda x: np.where(x > 0.4, x, 0),
    "Elu": lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)),
    "Affine": lambda x: 0.6 * x + 0.2,
    "ScaledTanh": lambda x: 1.2 * np.tanh(0.8 * x),
}
DEFAULT = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}


def defined(case: Case, v: Mapping[str, Array]) -> list[Array]:
    """Return Y, Y_h and Y_c as the operators' documentation writes them."""
    if case.attrs.get("layout"):
        v = {k: a.swapaxes(0, 1) if k in "xhc" else a for k, a in v.items()}
    size, count = HIDDEN, GATES[case.op]
    each = DEFAULT.get(case.op, ["Tanh"])
    names = case.attrs.get("activations", each * case.ways)
    ys, hs, cs = [], [], []
    for way in range(case.ways):
        act = [ACTIVATIONS[n] for n in names[way * len(each) : (way + 1) * len(each)]]
        w = v["w"][way].reshape(count, size, WIDTH)
        r = v["r"][way].reshape(count, size, size)
        b = v["b"][way] if "b" in v else np.zeros(2 * count * size)
        wb, rb = b.reshape(2, count, size)
        p = (v["p"][way] if "p" in v else np.zeros(3 * size)).reshape(3, size)
        h = v["h"][way] if "h" in v else np.zeros((BATCH, size))
        c = v["c"][way] if "c" in v else np.zeros((BATCH, size))
        direction = case.attrs.get("direction", "forward")
        order = range(len(v["x"]))
        if direction == "reverse" or way:
            order = order[::-1]
        y = np.zeros((len(v["x"]), BATCH, size))
        for t in order:
            x = v["x"][t]
            h, c = cell(case, act, x, h, c, w, r, wb, rb, p)
            y[t] = h
        ys.append(y)
        hs.append(h)
        cs.append(c)
    out = [np.stack(ys, 1), np.stack(hs), np.stack(cs)]
    if case.attrs.get("layout"):
        out = [out[0].transpose(2, 0, 1, 3), *(o.swapaxes(0, 1) for o in out[1:])]
    return out[: 3 if case.op == "LSTM" else 2]


def cell(
    case: Case,
    act: Any,
    x: Any,
    h: Any,
    c: Any,
    w: Any,
    r: Any,
    wb: Any,
    rb: Any,
    p: Any,
) -> tuple[Array, Array]:
    limit = case.attrs.get("clip", np.inf)

    def cut(z: Array) -> Array:
        return np.clip(z, -limit, limit)

    def part(k: int) -> Array:
        return x @ w[k].T + h @ r[k].T + wb[k] + rb[k]

    if case.op == "RNN":
        return act[0](cut(part(0))), c
    if case.op == "GRU":
        z, s = act[0](cut(part(0))), act[0](cut(part(1)))
        if case.attrs.get("linear_before_reset"):
            within = s * (h @ r[2].T + rb[2])
        else:
            within = (s * h) @ r[2].T + rb[2]
        n = act[1](cut(x @ w[2].T + within + wb[2]))
        return (1 - z) * n + z * h, c
    enter = act[0](cut(part(0) + p[0] * c))
    keep = act[0](cut(part(2) + p[2] * c))
    if case.attrs.get("input_forget"):
        keep = 1 - enter
    c = keep * c + enter * act[1](cut(part(3)))
    leave = act[0](cut(part(1) + p[1] * c))
    return leave * act[2](cut(c)), c


ODD = ["HardSigmoid", "LeakyRelu", "Affine", "HardSigmoid", "ScaledTanh", "Elu"]
CASES = [
    *(
        Case(op, given, {"direction": direction})
        for op, given in (("LSTM", "bhc"), ("GRU", "bh"), ("RNN", "bh"))
        for direction in ("forward", "reverse", "bidirectional")
    ),
    *(Case(op, "") for op in GATES),
    Case("LSTM", "bhcp"),
    Case("LSTM", "p", {"direction": "bidirectional"}),
    Case("LSTM", "b", {"clip": 0.5}),
    Case("LSTM", "b", {"input_forget": 1}),
    Case("GRU", "b", {"linear_before_reset": 1}),
    Case("GRU", "bh", {"linear_before_reset": 1, "direction": "bidirectional"}),
    Case("GRU", "", {"linear_before_reset": 1}),
    Case("GRU", "b", {"clip": 0.5}),
    Case("RNN", "b", {"clip": 0.5}),
    Case(
        "LSTM",
        "b",
        {
            "direction": "bidirectional",
            "activations": ODD,
            "activation_alpha": [0.3, 0.1, 0.6, 0.3, 1.2, 0.7],
            "activation_beta": [0.45, 0.2, 0.45, 0.8],
        },
    ),
    *(Case("RNN", "b", {"activations": [n]}) for n in ("Relu", "Softsign", "Softplus")),
    Case(
        "RNN",
        "b",
        {"activations": ["ThresholdedRelu"], "activation_alpha": [0.4]},
    ),
    Case("LSTM", "b", lengths=(STEPS, STEPS)),
    *(
        Case(op, given, {"layout": 1, "direction": "bidirectional"})
        for op, given in (("LSTM", "bhcp"), ("GRU", "bh"), ("RNN", "bh"))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_definition(case: Case) -> None:
    inputs = drawn(case)
    point = {k: v.astype(np.float64) for k, v in inputs.items()}
    outs = defined(case, point)
    random = np.random.default_rng(3)
    pulls = [random.normal(size=y.shape).astype(np.float32) for y in outs]
    proto = model_of(case, inputs)
    if not case.attrs.get("layout"):  # which onnxruntime does not run
        own = runtime.session(proto, threads=1, optimize="off").run(inputs)
        for y, value in zip(outs, own.values(), strict=True):
            np.testing.assert_allclose(value, y, atol=1e-5)

    model = prepare(Model.load(proto), {k: v.shape for k, v in inputs.items()}, inputs)
    assert case.op not in [node.op for node in model.graph.nodes]
    names = [tensor.name for tensor in model.graph.outputs]
    upstream = {
        name: model.add_weight(f"pull_{name}", pull)
        for name, pull in zip(names, pulls, strict=True)
    }
    found = gradients(model, upstream, list(inputs))
    assert set(found) == set(inputs)
    session = runtime.session(
        model, threads=1, expose=[tensor.name for tensor in found.values()]
    )
    answer = session.run(inputs)
    for name, y in zip(names, outs, strict=True):
        np.testing.assert_allclose(answer[name], y, atol=1e-5)

    def loss(values: Mapping[str, Array]) -> float:
        ys = defined(case, values)
        return sum(float(np.sum(y * p)) for y, p in zip(ys, pulls, strict=True))

    for name, tensor in found.items():
        grad = answer[tensor.name]
        assert grad.shape == inputs[name].shape
        most = min(grad.size, 12)
        for place in random.choice(grad.size, most, replace=False):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {k: v.copy() for k, v in point.items()}
                moved[name].reshape(-1)[place] += step
                ends.append(loss(moved))
            expected = (ends[0] - ends[1]) / 2e-6
            assert grad.reshape(-1)[place] == pytest.approx(expected, abs=2e-4), name


def built(case: Case) -> tuple[Model, dict[str, Array]]:
    """Return a model of a Gemm before and a recurrent node, weights inside."""
    inputs = drawn(case)
    proto = model_of(case, inputs)
    for name in ("w", "r", "b"):
        proto.graph.initializer.append(numpy_helper.from_array(inputs[name], name))
    kept = [info for info in proto.graph.input if info.name == "x"]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.node[0].input[0] = "seen"
    proto.graph.node.insert(0, helper.make_node("MatMul", ["x", "before"], ["seen"]))
    eye = np.eye(WIDTH, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(eye, "before"))
    proto.graph.node.append(helper.make_node("MatMul", ["yh", "after"], ["out"]))
    two = np.eye(HIDDEN, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(two, "after"))
    del proto.graph.output[:]
    proto.graph.output.append(
        helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 3)
    )
    return Model.load(proto), {"x": inputs["x"]}


def step_of(model: Model, feeds: Mapping[str, Array], *weights: str) -> TrainingStep:
    shape = (1, BATCH, HIDDEN)
    return TrainingStep(
        model,
        {"x": feeds["x"].shape},
        weights,
        lambda ctx, v: mse(ctx, v["out"], v["target"]),
        targets={"target": (np.float32, shape)},
        threads=1,
    )


@pytest.mark.parametrize("op", list(GATES))
def test_a_recurrent_layer_learns(op: str) -> None:
    model, feeds = built(Case(op))
    step = step_of(model, feeds, "w", "r", "b", "before", "after")
    target = np.full((1, BATCH, HIDDEN), 0.3, np.float32)
    losses = [step({**feeds, "target": target}, 0.02) for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]


def test_a_frozen_recurrent_layer_stays_as_it_is() -> None:
    model, feeds = built(Case("LSTM"))
    step = step_of(model, feeds, "after")
    assert "LSTM" in [node.op for node in step.model.graph.nodes]
    target = np.full((1, BATCH, HIDDEN), 0.3, np.float32)
    losses = [step({**feeds, "target": target}, 0.02) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("GRU", lengths=(STEPS, 1)), "sequence_lens 'lengths' are not all 4"),
        (Case("GRU"), "4 steps are more than the 3 that are unrolled"),
    ],
)
def test_what_cannot_be_unrolled_says_what_to_freeze(
    case: Case, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "MOST_STEPS", 8 if case.lengths else 3)
    model, feeds = built(case)
    with pytest.raises(ModelError, match=why) as caught:
        step_of(model, feeds, "before", "after", "w")
    assert "GRU node 'it'" in str(caught.value)
    assert "freeze 'before', 'w'" in str(caught.value)
    assert "'after'" not in str(caught.value)
    step_of(model, feeds, "after")


def test_recurrent_layers_behind_each_other_learn_together() -> None:
    model = Model.load(examples.recurrent())
    weights = ["lw", "lr", "lb", "gw", "gr", "rw", "rr"]
    step = TrainingStep(
        model,
        {"x": (5, 3, 4)},
        weights,
        lambda ctx, v: mse(ctx, v["y"], v["target"]),
        targets={"target": (np.float32, (1, 3, 4))},
        threads=1,
    )
    random = np.random.default_rng(0)
    feeds = {
        "x": random.normal(size=(5, 3, 4)).astype(np.float32),
        "target": np.full((1, 3, 4), 0.2, np.float32),
    }
    before = {name: step.weights[name].copy() for name in weights}
    losses = [step(feeds, 0.01) for _ in range(40)]
    assert losses[-1] < 0.05 * losses[0]
    assert all((step.weights[name] != before[name]).any() for name in weights)
