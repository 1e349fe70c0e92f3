"""Activations: statistics see what onnxruntime computes, once, in bounded slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import runtime
from onnxshrink.activations import gathering
from onnxshrink.activations.gathering import fingerprint, gather, unavailable
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.samples import Splits
from onnxshrink.statistics import Gram, Mean, Multi, Range, Sample

CHAIN = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  h = MatMul(x, w)
  r = Relu(h)
  y = Neg(r)
}
"""
X = np.array([[1, -1], [0, 1], [2, 0], [-3, 1], [1, 1]], np.float32)
H = X @ np.array([[1, 2], [3, 4]], np.float32)


def model(text: str = CHAIN) -> Model:
    return Model.load(onnx.parser.parse_model(text))


def context(m: Model, x: Any = X) -> Context:
    given = Splits.build(m, x)
    # All samples calibrate: the tests check sums by eye.
    from onnxshrink.samples import Samples

    samples = Samples.of(x).bind(m.inputs)
    return make_context(
        samples=Splits(calibration=samples, evaluation=given.evaluation), reference=m
    )


def sessions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Record which values each session exposes."""
    made: list[tuple[str, ...]] = []
    real = runtime.session

    def session(*args: Any, **kwargs: Any) -> runtime.Session:
        made.append(tuple(kwargs.get("expose", ())))
        return real(*args, **kwargs)

    monkeypatch.setattr(runtime, "session", session)
    return made


def test_statistics_see_inputs_inner_values_outputs_and_weights():
    m = model()
    wanted = {name: Sample(size=9) for name in ("x", "h", "r", "y", "w")}
    seen = {n: s.values for n, s in context(m).statistics(m, wanted).items()}  # type: ignore[attr-defined]
    assert list(seen) == ["x", "h", "r", "y", "w"]
    assert np.array_equal(seen["x"], X)
    assert np.array_equal(seen["h"], H)
    assert np.array_equal(seen["r"], np.maximum(H, 0))
    assert np.array_equal(seen["y"], -np.maximum(H, 0))
    assert seen["w"].tolist() == [[1, 2], [3, 4]]


def test_inputs_and_weights_need_no_session(monkeypatch: pytest.MonkeyPatch):
    made = sessions(monkeypatch)
    m = model()
    found = gather(m, {"x": Mean(), "w": Range()}, context(m))
    assert found["x"].mean == pytest.approx(X.mean(dtype=float))  # type: ignore[attr-defined]
    assert made == []


def test_values_are_asked_for_in_slices(monkeypatch: pytest.MonkeyPatch):
    made = sessions(monkeypatch)
    m = model()
    wanted = {name: Gram(exact=True) for name in ("y", "r", "h")}
    # A batch of 2 samples takes 16 bytes a value: two fit 32 bytes, three do not.
    found = gather(m, wanted, context(m), slice_bytes=32)
    assert made == [("h", "r"), ("y",)]
    np.testing.assert_allclose(found["h"].matrix, H.T @ H)  # type: ignore[attr-defined]
    assert found["y"].rows == 5  # type: ignore[attr-defined]


def test_a_statistic_is_gathered_once_for_the_same_model(
    monkeypatch: pytest.MonkeyPatch,
):
    made = sessions(monkeypatch)
    m = model()
    ctx = context(m)
    first = gather(m, {"h": Range()}, ctx)["h"]
    assert gather(m.copy(), {"h": Range(), "x": Mean()}, ctx)["h"] is first
    assert made == [("h",)]
    gather(m, {"h": Range(axis=1)}, ctx)
    changed = m.copy()
    changed.set_weight("w", np.eye(2, dtype=np.float32))
    other = gather(changed, {"h": Range()}, ctx)["h"]
    assert made == [("h",)] * 3
    assert float(other.high) == 2.0  # type: ignore[attr-defined]


def test_several_statistics_of_one_tensor_cost_one_run(monkeypatch: pytest.MonkeyPatch):
    made = sessions(monkeypatch)
    m = model()
    found = gather(m, {"h": Multi(range=Range(), mean=Mean())}, context(m))["h"]
    assert made == [("h",)]
    np.testing.assert_allclose(found["mean"].mean, H.mean())  # type: ignore[index]


def test_the_model_is_not_changed():
    m = model()
    before = m.to_bytes()
    gather(m, {"h": Range()}, context(m))
    assert m.to_bytes() == before


BRANCHES = """
<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
g (float[N, 2] x, bool c) => (float[N, 2] y)
{
  s = local.twice(x)
  y = If (c) <
    then_branch = t () => (float[N, 2] a) { inside = Neg(s)  a = Neg(inside) },
    else_branch = e () => (float[N, 2] b) { b = Identity(s) }
  >
}
<domain: "local", opset_import: ["" : 17]>
twice (p) => (q) { within = Add(p, p)  q = Identity(within) }
"""


def test_values_inside_subgraphs_and_functions_are_absent_with_a_reason():
    m = model(BRANCHES)
    x = {"x": X[:, None], "c": np.ones(5, bool)}
    ctx = context(m, x)
    wanted = {name: Mean() for name in ("s", "inside", "within", "nowhere")}
    found = gather(m, wanted, ctx)
    assert list(found) == ["s"]
    np.testing.assert_allclose(found["s"].mean, 2 * X.mean(), rtol=1e-6)
    assert unavailable(m, wanted) == {
        "inside": "it is inside a subgraph",
        "within": "it is inside a function",
        "nowhere": "the model has no such value",
    }


def test_no_calibration_samples_is_a_clear_error():
    m = model()
    ctx = make_context(samples=Splits(), reference=m)
    with pytest.raises(ModelError, match=r"calibration samples.*--data"):
        gather(m, {"h": Range()}, ctx)


def test_random_samples_that_do_not_fit_get_a_hint():
    m = model(CHAIN.replace("float[N, 2] x", "float[N, K] x"))
    ctx = make_context(samples=Splits.build(m), reference=m)
    with pytest.raises(ModelError, match="--shape name=2x128 sets it"):
        gather(m, {"h": Range()}, ctx)


def test_text_has_no_statistics():
    text = CHAIN.replace("float", "string").split("<string")[0]
    m = model(f"{text} {{ h = Identity(x)  y = Identity(h) }}")
    with pytest.raises(ModelError, match="'h': statistics are for numbers"):
        gather(m, {"h": Range()}, context(m, np.array([["a", "b"]])))


def test_a_fixed_batch_size_is_kept():
    m = model(CHAIN.replace("N, 2", "2, 2"))
    found = gather(m, {"h": Sample(size=9)}, context(m, X[:4]))["h"]
    assert np.array_equal(found.values, H[:4])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("limit", "first"), [(1, 2), (160, 5), (1 << 20, 32)])
def test_a_batch_is_as_large_as_its_bytes_allow(
    monkeypatch: pytest.MonkeyPatch, limit: int, first: int
):
    fed: list[int] = []
    real = runtime.Session.run

    def run(self: Any, feeds: Any, *rest: Any) -> Any:
        fed.append(len(feeds["x"]))
        return real(self, feeds, *rest)

    monkeypatch.setattr(runtime.Session, "run", run)
    m = model()
    # One sample: 8 bytes wanted, 8 fed, and 16 that Relu reads and makes.
    x = np.zeros((40, 2), np.float32)
    found = gather(m, {"h": Gram()}, context(m, x), slice_bytes=limit)
    assert fed[0] == first
    assert sum(fed) == found["h"].rows == 40  # type: ignore[attr-defined]


@pytest.mark.parametrize("samples", [1, 5])
def test_any_number_of_samples_is_seen_once(
    monkeypatch: pytest.MonkeyPatch, samples: int
):
    monkeypatch.setattr(gathering, "_BATCH", 2)
    m = model()
    found = gather(m, {"h": Gram()}, context(m, X[:samples]), slice_bytes=1)
    assert found["h"].rows == samples  # type: ignore[attr-defined]


# Identity of a model


def test_a_fingerprint_follows_values_and_topology_not_objects():
    m = model()
    mark = fingerprint(m)
    assert fingerprint(m.copy()) == mark
    assert fingerprint(model()) == mark
    weight = m.copy()
    weight.set_weight("w", np.array([[1, 2], [3, 5]], np.float32))
    assert fingerprint(weight) != mark
    node = m.copy()
    node.graph.nodes[1].op = "Sigmoid"
    assert fingerprint(node) != mark


def test_a_fingerprint_sees_attributes_and_subgraphs():
    text = CHAIN.replace("Relu(h)", "LeakyRelu<alpha = 0.1>(h)")
    assert fingerprint(model(text)) != fingerprint(model(text.replace("0.1", "0.2")))
    other = BRANCHES.replace("a = Neg(inside)", "a = Abs(inside)")
    assert fingerprint(model(BRANCHES)) != fingerprint(model(other))
    other = BRANCHES.replace("Add(p, p)", "Sub(p, p)")
    assert fingerprint(model(BRANCHES)) != fingerprint(model(other))
