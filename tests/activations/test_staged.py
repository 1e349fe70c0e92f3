from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import runtime, testing
from onnxshrink.activations.staged import Span, StagedRun, batches
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits

MODELS = testing.example_models()


def _spans(samples: Samples, size: int = 2) -> list[Span]:
    return batches([Span(samples, 0, samples.used)], size)


@pytest.mark.parametrize("limit", [1 << 30, 600, 0])
@pytest.mark.parametrize("name", MODELS)
def test_a_staged_run_gives_what_whole_runs_give(name: str, limit: int) -> None:
    model = Model.load(MODELS[name])
    splits = Splits.build(model)
    assert splits.calibration is not None
    samples = splits.calibration.take(slice(0, 4))
    names = [t.name for node in model.graph.nodes for t in node.outputs if t.name]
    session = runtime.session(model, threads=1, expose=names, only_exposed=True)
    whole = [session.run(span.read(), names) for span in _spans(samples)]
    run = StagedRun(
        model, make_context(samples=splits, reference=model, threads=1), limit
    )
    for at, value in enumerate(names):
        seen = run.values([value], [value], names[at + 1 :], _spans(samples))
        for now, wanted in zip(seen, whole, strict=True):
            if (
                isinstance(wanted[value], np.ndarray)
                and wanted[value].dtype.kind == "f"
            ):
                np.testing.assert_allclose(
                    now[value], wanted[value], rtol=1e-3, atol=1e-4
                )
            elif isinstance(wanted[value], np.ndarray):
                assert now[value].dtype == wanted[value].dtype
                assert now[value].shape == wanted[value].shape
        assert run._held <= limit


def _chain() -> tuple[Model, Samples, Context]:
    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in range(4)]
    text = "\n".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(4))
    header = '<ir_version: 8, opset_import: ["" : 17]>\n'
    proto = onnx.parser.parse_model(
        f"{header} g (float[N,8] h0) => (float[N,8] h4) {{ {text} }}"
    )
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), name)
        for name in names
    )
    model = Model.load(proto)
    samples = Samples.from_arrays({"h0": rng.normal(size=(10, 8)).astype(np.float32)})
    context = make_context(samples=Splits(), reference=model, threads=1)
    return model, samples.bind(model.inputs), context


def test_weights_behind_what_is_settled_may_change() -> None:
    model, samples, context = _chain()
    run, spans = StagedRun(model, context), _spans(samples, 4)
    list(run.values(["h2"], ["h1"], ["h3"], spans))
    weight = model.weight("w1").read()
    model.set_weight("w1", 2 * weight)
    values = run.values(["h3"], ["h2"], ["h4"], spans)
    wanted = samples.read(range(10))["h0"] @ model.weight("w0").read() @ (2 * weight)
    wanted = wanted @ model.weight("w2").read()
    np.testing.assert_allclose(
        np.concatenate([v["h3"] for v in values]), wanted, rtol=1e-4, atol=1e-4
    )


def test_nodes_before_what_is_held_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, samples, context = _chain()
    counts: list[int] = []
    make: Any = runtime.session

    def session(part: Model, **options: Any) -> runtime.Session:
        counts.append(len(part.graph.nodes))
        made: runtime.Session = make(part, **options)
        return made

    monkeypatch.setattr(runtime, "session", session)
    run = StagedRun(model, context)
    for at in range(1, 5):
        later = [f"h{i}" for i in range(at + 1, 5)]
        list(run.values([f"h{at}"], [f"h{at}"], later, _spans(samples)))
    assert counts == [1, 1, 1, 1]


def test_stretches_are_cut_where_one_of_them_ends() -> None:
    samples = Samples.from_arrays({"x": np.zeros((20, 1), np.float32)})
    found = batches([Span(samples, 0, 8), Span(samples, 3, 10)], 4)
    ends = [(span.start, span.stop) for span in found]
    assert ends == [(0, 3), (3, 7), (7, 8), (8, 10)]
