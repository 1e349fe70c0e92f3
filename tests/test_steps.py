"""What a step works out once, and what other processes work out for it.

Every attempt at a step, its trials while it backs off and its weaker forms before a
repair read off what the first one found, and write the same bytes as if each had looked
for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxshrink import (
    Budget,
    Model,
    PassManager,
    Pipeline,
    Samples,
    Splits,
    runtime,
)
from onnxshrink.activations import gathering
from onnxshrink.base import Memory
from onnxshrink.engine import make_context
from onnxshrink.passes import prune, quantize
from onnxshrink.passes.fold import Fold
from onnxshrink.passes.recover import Recover
from onnxshrink.quantization import coding, smoothing, static
from onnxshrink.structure.inputs import InputStatistics

Array = np.ndarray[Any, Any]
_SCALED = InputStatistics.scaled


def _model(text: str, **weights: Array) -> Model:
    header = '<ir_version: 8, opset_import: ["" : 17]>\n'
    proto = parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in weights.items()
    )
    return Model.load(proto)


def _random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _dense() -> Model:
    """Two Gemm with biases and a MatMul between them."""
    return _model(
        """g (float[N,16] x) => (float[N,8] y) {
            a = Gemm<transB = 1>(x, w1, b1)  b = Relu(a)
            c = MatMul(b, w2)  d = Relu(c)
            y = Gemm<transB = 1>(d, w3, b3)
        }""",
        w1=_random(1, 20, 16),
        b1=_random(2, 20),
        w2=_random(3, 20, 12),
        w3=_random(4, 8, 12),
        b3=_random(5, 8),
    )


def _dense_splits() -> Splits:
    def draw(seed: int, rows: int) -> Samples:
        return Samples.from_arrays({"x": _random(seed, rows, 16)})

    return Splits(
        calibration=draw(6, 64),
        training=draw(7, 200),
        validation=draw(8, 64),
        evaluation=draw(9, 64),
    )


def _counted(
    monkeypatch: pytest.MonkeyPatch, places: dict[str, tuple[Any, str]]
) -> Counter[str]:
    """Count the calls of functions, by the place where they are looked up."""
    calls: Counter[str] = Counter()

    def wrapped(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[label] += 1
            return function(*args, **kwargs)

        return counting

    for label, (module, name) in places.items():
        monkeypatch.setattr(module, name, wrapped(label, getattr(module, name)))
    return calls


def _shrunk(model: Model, passes: str, splits: Splits, budget: Budget) -> bytes:
    manager = PassManager(
        Pipeline.parse(passes),
        splits=splits,
        budget=budget,
        jobs=1,
        measure_latency=False,
        measure_memory=False,
    )
    result = manager.run(model)
    assert any(step.left_out for step in result.report.steps), "it must back off"
    return result.model.to_bytes()


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every attempt work out everything anew."""
    monkeypatch.setattr(Memory, "put", lambda *_: None)


# --- once in a step -------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        "prune:sparsity=0.9",
        "prune:sparsity=0.9,recover:samples=64",
        "prune:sparsity=0.9,pattern=2x2",
        "prune:sparsity=0.9,importance=wanda",
    ],
)
def test_each_weight_is_studied_once_in_a_step(
    passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "studied": (prune, "_study"),
        "looked": (prune, "_most_samples"),
        "calibrated": (gathering, "_run"),
    }
    calls = _counted(monkeypatch, places)
    model, splits, budget = _dense(), _dense_splits(), Budget(min_sqnr=18.0)
    shared = _shrunk(model, passes, splits, budget)
    assert calls["studied"] == (0 if "wanda" in passes else 3)
    assert calls["looked"] == 1
    assert "recover" in passes or calls["calibrated"] == 1
    once = calls.copy()
    calls.clear()
    _forget(monkeypatch)
    alone = _shrunk(model, passes, splits, budget)
    assert shared == alone
    assert calls["looked"] >= 2 * once["looked"]
    assert calls["studied"] >= 2 * once["studied"]


@pytest.mark.parametrize(
    ("passes", "sqnr"),
    [
        ("quantize:activations=static", 40.0),
        ("quantize:activations=none,weights=int4", 19.0),
        ("quantize:activations=none,weights=int4,rounding=hqq", 19.0),
    ],
)
def test_each_weight_is_rounded_once_in_a_step(
    passes: str, sqnr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "rounded": (coding, "code_weight"),
        "rounded in static": (static, "round_weight"),
        "calibrated": (gathering, "_run"),
        "folded": (Fold, "apply"),
    }
    monkeypatch.setattr(quantize, "SMALLEST", 16)
    calls = _counted(monkeypatch, places)
    model, splits, budget = _dense(), _dense_splits(), Budget(min_sqnr=sqnr)
    shared = _shrunk(model, passes, splits, budget)
    assert calls["rounded"] + calls["rounded in static"] == 3
    assert calls["folded"] == 1
    once = calls.copy()
    calls.clear()
    _forget(monkeypatch)
    alone = _shrunk(model, passes, splits, budget)
    assert shared == alone
    assert calls["calibrated"] >= 2 * once["calibrated"]
    assert sum(calls.values()) > 2 * sum(once.values())


@pytest.mark.parametrize(
    ("passes", "sqnr", "runs"),
    [
        ("quantize:activations=static", 40.0, 1),
        ("quantize:activations=none,weights=int4", 19.0, 1),
        # To choose scales of activations, and to round weights in what that gives.
        ("quantize:activations=dynamic", 44.0, 2),
        ("quantize:activations=dynamic,equalize=none", 44.0, 1),
        ("quantize:activations=none,weights=int4,equalize=awq", 19.0, 2),
    ],
)
def test_each_calibration_is_made_once_in_a_step(
    passes: str, sqnr: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 16)
    calls = _counted(monkeypatch, {"calibrated": (gathering, "_run")})
    _shrunk(_dense(), passes, _dense_splits(), Budget(min_sqnr=sqnr))
    assert calls["calibrated"] == runs


@pytest.mark.parametrize("equalize", ["smooth", "awq"])
def test_inputs_that_an_attempt_scales_otherwise_are_those_that_were_seen(
    equalize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 16)
    model, splits = _dense(), _dense_splits()
    outliers = np.ones((20, 1), np.float32)
    outliers[3] = 30
    model.set_weight("w1", model.weight("w1").read() * outliers)
    form = "dynamic" if equalize == "smooth" else "none"
    weights = "int8" if equalize == "smooth" else "int4"
    options: Any = {"activations": form, "weights": weights, "equalize": equalize}
    pass_ = quantize.Quantize(**options)
    context = make_context(samples=splits, reference=model)
    every = pass_.sites(model, context)
    scales = []
    monkeypatch.setattr(
        InputStatistics,
        "scaled",
        lambda self, by: scales.append(by) or _SCALED(self, by),
    )

    def codes(memory: Memory, sites: Any) -> Model:
        copy = model.copy()
        context = make_context(samples=splits, reference=model, memory=memory)
        pass_.rewrite_all(copy, sites, context)
        return copy

    memory = Memory()
    codes(memory, every)  # the first attempt scales what w2 reads
    monkeypatch.setattr(smoothing, "MUL_PAYS", 0.0)
    monkeypatch.setattr(smoothing, "_chain", lambda *_: None)
    again, alone = codes(memory, every), codes(Memory(), every)  # these do not
    assert any(len(by) == 20 for by in scales)
    x = _random(9, 64, 16)
    one, two = (runtime.session(m).run({"x": x})["y"] for m in (again, alone))
    assert np.abs(one - two).max() < 1e-3 * np.abs(two).max()


# --- in other processes ---------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


def _applied(text: str, model: Model, splits: Splits, executor: Any) -> bytes:
    (pass_,) = Pipeline.parse(text)
    copy = model.copy()
    copy.require_opset(pass_.opset)
    context = make_context(samples=splits, reference=model, executor=executor)
    pass_.apply(copy, context)
    assert context.done
    return copy.to_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "prune:sparsity=0.8",
        "prune:sparsity=0.8,pattern=4x1",
        "prune:sparsity=0.8,importance=wanda",
        "prune:sparsity=0.8,importance=magnitude",
        "prune:pattern=2:4",
        "quantize:activations=static",
        "quantize:activations=static,rounding=adaround",
        "quantize:activations=static,rounding=learned",
        "quantize:activations=dynamic",
        "quantize:activations=none,weights=int4",
        "quantize:activations=none,weights=int2,rounding=learned",
        "quantize:activations=none,weights=int4,rounding=adaround",
        "quantize:activations=none,weights=int4,rounding=hqq",
        "codebook",
        "lowrank",
        "lowrank:metric=weights,rank=4",
        "lowrank:scope=local,keep=0.8",
    ],
)
def test_other_processes_give_the_same_bytes(
    text: str, processes: ProcessPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 16)
    model, splits = _dense(), _dense_splits()
    serial = _applied(text, model, splits, None)
    assert _applied(text, model, splits, processes) == serial


def test_other_processes_recover_the_same_bytes(
    processes: ProcessPoolExecutor,
) -> None:
    model, splits = _dense(), _dense_splits()
    damaged = model.copy()
    for name in ("w1", "w2", "w3"):
        weight = damaged.weight(name)
        values = weight.read()
        damaged.set_weight(weight, np.where(np.abs(values) < 0.5, 0, values))
    found = []
    for executor in (None, processes):
        context = make_context(samples=splits, reference=model, executor=executor)
        copy = damaged.copy()
        Recover(samples=64).apply(copy, context)
        assert len(context.done) == 3
        found.append(copy.to_bytes())
    assert found[0] == found[1] != damaged.to_bytes()
