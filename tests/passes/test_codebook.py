"""codebook: values are shared, files are smaller, and what is promised is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxshrink import Budget, runtime, shrink
from onnxshrink.base import Context, Savings, Site
from onnxshrink.engine import make_context
from onnxshrink.errors import PromiseError, UsageError
from onnxshrink.model import Model
from onnxshrink.passes.codebook import Codebook, CodebookSite
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.solvers.codebook import entropy

Array = NDArray[Any]
MODELS = Path(__file__).parents[2] / "models"
RNG = np.random.default_rng


def make(text: str, **weights: Array) -> Model:
    """Parse a graph body; arrays become initializers."""
    header = '<ir_version: 8, opset_import: ["" : 17]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def context(model: Model, **inputs: Array) -> Context:
    """Return a context with these calibration samples, or with random ones."""
    if not inputs:
        return make_context(Splits(random=True), model)
    return make_context(Splits(calibration=Samples.of(inputs)), model)


def run(model: Model, **feeds: Array) -> list[Array]:
    session = runtime.session(model, threads=1)
    return [np.asarray(value) for value in session.run(feeds).values()]


def correlated(count: int, width: int) -> Array:
    rng = RNG(1)
    mixed = rng.standard_normal((count, width)) @ rng.standard_normal((width, width))
    return (mixed + 0.3).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits is from 1 to 8"),
        ({"values": 257}, "values is from 2 to 256"),
        ({"bits": 4, "values": 16}, "say the same"),
        ({"bytes": 0.0}, "share above 0"),
        ({"bytes": 0.1, "bits": 4}, "bytes chooses the values"),
        ({"rate": 9.0}, "up to 8 bits"),
        ({"dim": 4, "scale": "channel"}, "dim=4 goes with scale=none only"),
        ({"dim": 2, "rate": 2.0}, "leave out dim"),
        ({"group": 0}, "group is from 1 on"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Codebook(**options)


def test_feedback_without_data_is_refused() -> None:
    model = make(
        "g (float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }",
        w=RNG(0).standard_normal((8, 8)).astype(np.float32),
    )
    with pytest.raises(UsageError, match=r"needed to see what .*--data.*or rounding="):
        Codebook(rounding="gptq").sites(model, context(model))


MATMUL = "g (float[N,64] x) => (float[N,96] y) { y = MatMul(x, w) }"
GEMM = "g (float[N,64] x) => (float[N,96] y) { y = Gemm<transB=1>(x, w) }"


def error(
    pass_: Codebook, text: str, shape: tuple[int, int], **weights: Array
) -> float:
    """Return the output error, as a share of the output's energy, on other data."""
    weight = RNG(0).standard_normal(shape).astype(np.float32)
    model = make(text, w=weight, **weights)
    x = correlated(600, 64)
    before = run(model, x=x[300:])[0]
    pass_.apply(model, context(model, x=x[:300]))
    after = run(model, x=x[300:])[0]
    return float(((after - before) ** 2).sum() / (before**2).sum())


@pytest.mark.parametrize("text", [MATMUL, GEMM])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"bits": 2, "dim": 2},
        {"bits": 6, "dim": 4},
        {"bits": 2, "granularity": "channel", "group": 8},
        {"bits": 2, "scale": "channel"},
        {"values": 3},
        {"values": 2, "scale": "channel"},
    ],
    ids=str,
)
def test_outputs_lose_less_where_inputs_are_known(
    text: str, options: dict[str, Any]
) -> None:
    shape = (64, 96) if text == MATMUL else (96, 64)
    blind = error(Codebook(**options, rounding="nearest"), text, shape)
    seen = error(Codebook(**options), text, shape)
    assert seen < 0.9 * blind


def test_a_convolution_in_groups_gets_feedback_in_each() -> None:
    rng = RNG(2)
    weight = rng.standard_normal((12, 4, 3, 3)).astype(np.float32)
    text = "g (float[N,8,9,9] x) => (float[N,12,7,7] y) { y = Conv<group=2>(x, w) }"
    base = rng.standard_normal((40, 1, 9, 9))
    x = (base + 0.3 * rng.standard_normal((40, 8, 9, 9))).astype(np.float32)
    found = []
    for rounding in ("nearest", "auto"):
        model = make(text, w=weight)
        before = run(model, x=x[20:])[0]
        Codebook(bits=2, rounding=rounding).apply(model, context(model, x=x[:20]))
        found.append(float(((run(model, x=x[20:])[0] - before) ** 2).sum()))
        assert len(np.unique(model.weight("w").read())) <= 4
    assert found[1] < 0.7 * found[0]


def test_recurrent_weights_are_coded() -> None:
    rng = RNG(3)
    model = make(
        """g (float[5,N,8] x) => (float[5,1,N,16] y)
        { y, h, c = LSTM<hidden_size=16>(x, w, r) }""",
        w=rng.standard_normal((1, 64, 8)).astype(np.float32),
        r=rng.standard_normal((1, 64, 16)).astype(np.float32),
    )
    Codebook(bits=3).apply(model, context(model))
    for name in ("w", "r"):
        assert len(np.unique(model.weight(name).read())) == 8


def test_half_precision_stays_half_precision() -> None:
    weight = RNG(4).standard_normal((32, 32)).astype(np.float16)
    model = make(
        "g (float16[N,32] x) => (float16[N,32] y) { y = MatMul(x, w) }", w=weight
    )
    Codebook(bits=3).apply(model, context(model))
    found = model.weight("w").read()
    assert found.dtype == np.float16
    assert len(np.unique(found)) == 8


def test_rows_of_a_large_table_are_gathered_before_they_are_decoded() -> None:
    table = RNG(5).standard_normal((6000, 64)).astype(np.float32)
    text = "g (int64[N] i) => (float[N,64] y) { y = Gather(w, i) }"
    model = make(text, w=table)
    ctx = context(model)
    Codebook(bits=4).apply(model, ctx)
    assert "after they are gathered" in ctx.done[0][1]
    codes = model.weight("w_codes")
    assert codes.dtype == np.uint8
    values = model.weight("w_values").read()
    index = np.array([0, 5999, 17], np.int64)
    expected = values[codes.read()[index]]
    np.testing.assert_array_equal(run(model, i=index)[0], expected)
    assert float(((expected - table[index]) ** 2).mean()) < 0.015
    # Again, it is a codebook already.
    again = context(model)
    assert not Codebook(bits=4).sites(model, again)


def test_a_table_that_is_multiplied_too_keeps_both_uses() -> None:
    table = RNG(6).standard_normal((6000, 64)).astype(np.float32)
    text = """g (int64[N] i, float[N,6000] p) => (float[N,64] y, float[N,64] z)
    { y = Gather(w, i)
      z = MatMul(p, w) }"""
    model = make(text, w=table)
    Codebook(bits=2).apply(model, context(model))
    assert len(np.unique(model.weight("w").read())) == 4
    assert [node.op for node in model.nodes()] == ["Gather", "MatMul"]


def test_a_budget_is_kept_and_printed_as_a_pipeline() -> None:
    rng = RNG(7)
    text = """g (float[N,64] x) => (float[N,64] y)
    { h = MatMul(x, a)
      y = MatMul(h, b) }"""
    weights = {
        "a": rng.standard_normal((64, 64)).astype(np.float32),
        "b": rng.standard_t(1.5, (64, 64)).astype(np.float32),
    }
    model = make(text, **weights)
    ctx = context(model)
    pass_ = Codebook(bytes=0.12)
    sites = pass_.sites(model, ctx)
    left = sum(model.weight(s.where).nbytes - s.savings.bytes for s in sites)
    assert left <= 0.12 * 2 * 64 * 64 * 4
    by_name = {s.where: s.values for s in sites if isinstance(s, CodebookSite)}
    # The heavy tail needs more values for the same share of its energy.
    assert len(by_name) == 2
    (said,) = [what for where, what in ctx.done if where == "bytes"]
    printed = Pipeline.parse(said.removeprefix("as a pipeline: "))
    pass_.apply(model, context(model))
    other = make(text, **weights)
    for one in printed.passes:
        one.apply(other, context(other))
    for name in weights:
        np.testing.assert_array_equal(
            other.weight(name).read(), model.weight(name).read()
        )


def test_weakening_raises_the_number_of_values() -> None:
    pass_ = Codebook(bits=2)
    site = CodebookSite("w", "MatMul", Savings(bytes=1000), values=4)
    counts = []
    for strength in (1.0, 0.75, 0.5, 0.25, 0.01):
        weaker = pass_.weaken(site, strength)
        assert isinstance(weaker, CodebookSite)
        counts.append(weaker.values)
    assert counts == sorted(counts)
    assert counts[0] == 4
    assert counts[-1] > 200
    assert pass_.weaken(site, 0.0) is None
    assert pass_.weaken(Site("w", "MatMul"), 0.5) is None


def test_a_rate_is_kept() -> None:
    weight = RNG(8).laplace(size=(128, 128)).astype(np.float32)
    model = make(
        "g (float[N,128] x) => (float[N,128] y) { y = MatMul(x, w) }", w=weight
    )
    Codebook(rate=1.5).apply(model, context(model))
    _, counts = np.unique(model.weight("w").read(), return_counts=True)
    assert 1.2 < entropy(counts) < 1.55


@pytest.mark.slow
def test_back_off_raises_bits_where_it_hurts(tmp_path: Path) -> None:
    from onnxshrink import Budget, shrink

    x = correlated(64, 64)
    model = make(
        """g (float[N,64] x) => (float[N,64] y)
        { h = MatMul(x, a)
          y = MatMul(h, b) }""",
        a=RNG(9).standard_normal((64, 64)).astype(np.float32),
        b=RNG(10).standard_normal((64, 64)).astype(np.float32),
    )
    result = shrink(
        model,
        "codebook:bits=1",
        data={"x": x},
        budget=Budget(min_sqnr=20),
        output=tmp_path / "small.onnx",
    )
    (step,) = result.report.steps
    assert step.accepted
    counts = [len(np.unique(result.model.weight(name).read())) for name in ("a", "b")]
    assert all(2 < count < 256 for count in counts)


def test_the_file_of_a_real_model_is_as_small_as_its_codes(tmp_path: Path) -> None:
    model = Model.load(MODELS / "lenet-300-100.onnx")
    x = RNG(11).random((4, 1, 28, 28)).astype(np.float32)
    ctx = context(model)
    Codebook(bits=4).apply(model, ctx)
    model.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 266_200 / 2 + 3_500
    name = model.graph.inputs[0].name
    shape = [4 if isinstance(d, str) else d for d in model.graph.inputs[0].shape]
    feeds = {name: x.reshape(shape)}
    stored = Model.load(tmp_path / "small.onnx")
    np.testing.assert_array_equal(run(stored, **feeds)[0], run(model, **feeds)[0])
    # Loaded again, every weight has its codebook already.
    again = context(stored)
    assert not Codebook(bits=4).sites(stored, again)
    assert sum("codebook already" in why for _, why in again.skips) == 3


def test_values_of_a_bias_repeat_so_often_that_training_ties_them() -> None:
    from onnxshrink.training.trainable import Tied, find_trainable

    model = make(
        "g (float[N,8] x) => (float[N,300] y) { y = Gemm(x, w, b) }",
        w=RNG(12).standard_normal((8, 300)).astype(np.float32),
        b=RNG(13).standard_normal(300).astype(np.float32),
    )
    Codebook(values=64, also=("biases",)).apply(model, context(model))
    assert len(np.unique(model.weight("b").read())) == 300 // 16
    chosen = find_trainable(model, ["y"], (), (), lambda *_: None)
    assert {one.name for one in chosen if isinstance(one, Tied)} == {"w", "b"}


def test_a_budget_goes_to_the_layer_that_the_outputs_feel() -> None:
    rng = RNG(14)
    text = """g (float[N,64] x) => (float[N,64] y)
    { h = MatMul(x, a)
      l = MatMul(x, b)
      s = Mul(l, k)
      y = Add(h, s) }"""
    weights = {name: rng.standard_normal((64, 64)).astype(np.float32) for name in "ab"}
    model = make(text, **weights, k=np.array(0.01, np.float32))
    ctx = context(model, x=correlated(64, 64))
    counts = {
        site.where: site.values
        for site in Codebook(bytes=0.12).sites(model, ctx)
        if isinstance(site, CodebookSite)
    }
    # What b gives is a hundredth of what a gives.
    assert counts["a"] > 4 * counts["b"]


def test_a_budget_of_bytes_for_the_file_divides_values_and_is_held(
    tmp_path: Path,
) -> None:
    rng = RNG(3)
    text = """g (float[N,128] x) => (float[N,128] y)
    { h = MatMul(x, a)
      y = MatMul(h, b) }"""
    weights = {
        "a": rng.standard_normal((128, 128)).astype(np.float32),
        "b": rng.standard_t(1.5, (128, 128)).astype(np.float32),
    }
    budget = Budget(min_sqnr=1.0, max_bytes=14_000)
    found = shrink(make(text, **weights), "codebook", budget=budget, names="short")
    path = tmp_path / "m.onnx"
    found.model.save(path)
    assert 11_000 < path.stat().st_size <= 14_000
    counts = [len(np.unique(found.model.weight(name).read())) for name in "ab"]
    assert counts[0] != counts[1]
    # As asked for, more values are needed than fit.
    with pytest.raises(PromiseError, match=r"more than --max-bytes 14,000"):
        shrink(make(text, **weights), "codebook:bits=5", budget=budget)
    tight = Budget(min_sqnr=28.0, max_bytes=14_000)
    with pytest.raises(PromiseError, match="codebook gave way to keep the outputs"):
        shrink(make(text, **weights), "codebook", budget=tight)
