"""Weights that no sample reaches: found in branches, bodies, ways and rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import Budget, Model, runtime, shrink
from onnxshrink.activations import reach
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing import make_context

RNG = np.random.default_rng(3)
SIZE = 8


def parsed(text: str, *names: str, size: int = SIZE) -> onnx.ModelProto:
    """Parse a graph; weights of these names are random [size, size]."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 17]> {text}')
    for name in names:
        values = RNG.normal(size=(size, size)).astype(np.float32) / size**0.5
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def unreached(proto: onnx.ModelProto, **data: Any) -> dict[str, str]:
    model = Model.load(proto)
    samples = Samples.of(data).bind(model.inputs)
    splits = Splits(calibration=samples)
    ctx = make_context(splits, model)
    return reach.unreached(model, [samples], ctx)


X = RNG.normal(size=(40, SIZE)).astype(np.float32)

BRANCHES = """
g (float[N, 8] x, float[8, 8] w1, float[8, 8] w2) => (float[N, 8] y)
<float eight = {8}>
{
  most = ReduceMax<keepdims = 0>(x)
  low = Less(most, eight)
  y = If(low) <
    then_branch = a () => (float[N, 8] a) { a = MatMul(x, w1) },
    else_branch = b () => (float[N, 8] b) { b = MatMul(x, w2) }
  >
}
"""


def weights(text: str, *names: str) -> onnx.ModelProto:
    """Parse a graph whose weights stand among the inputs, and give them values."""
    model = parsed(text, *names)
    kept = [info for info in model.graph.input if info.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def test_a_branch_that_never_ran_is_out_of_reach():
    model = weights(BRANCHES, "w1", "w2")
    assert unreached(model, x=X) == {"w2": reach.NEVER}
    # The last sample alone goes the other way.
    late = X.copy()
    late[-1, 0] = 9
    assert unreached(model, x=late) == {}
    assert unreached(model, x=X + 9) == {"w1": reach.NEVER}


def test_a_branch_inside_a_body_counts():
    text = """
    g (float[1, 8] x, float[8, 8] w1, float[8, 8] w2) => (float[1, 8] y)
    <int64 three = {3}, bool go = {1}>
    {
      y = Loop(three, go, x) <
        body = step (int64 i, bool before, float[1, 8] h) => (bool on, float[1, 8] next)
        <int64 last = {7}>
        {
          on = Identity(before)
          early = Less(i, last)
          next = If(early) <
            then_branch = a () => (float[1, 8] a) { a = MatMul(h, w1) },
            else_branch = b () => (float[1, 8] b) { b = MatMul(h, w2) }
          >
        }
      >
    }
    """
    assert unreached(weights(text, "w1", "w2"), x=X[:3]) == {"w2": reach.NEVER}
    assert unreached(weights(text.replace("{7}", "{2}"), "w1", "w2"), x=X[:3]) == {}
    never = text.replace("three = {3}", "three = {0}")
    assert set(unreached(weights(never, "w1", "w2"), x=X[:3])) == {"w1", "w2"}


def test_a_scan_with_a_branch_is_seen_into():
    text = """
    g (float[4, 8] x, float[8, 8] w1, float[8, 8] w2) => (float[8] last, float[4, 8] y)
    <float[8] zero = {0, 0, 0, 0, 0, 0, 0, 0}, float nine = {9}>
    {
      last, y = Scan(zero, x) <
        num_scan_inputs = 1,
        body = step (float[8] h, float[8] row) => (float[8] next, float[8] out)
        {
          most = ReduceMax<keepdims = 0>(row)
          low = Less(most, nine)
          out = If(low) <
            then_branch = a () => (float[8] a) { a = MatMul(row, w1) },
            else_branch = b () => (float[8] b) { b = MatMul(row, w2) }
          >
          next = Add(h, out)
        }
      >
    }
    """
    data = X[:16].reshape(4, 4, 8)
    model = weights(text, "w1", "w2")
    assert unreached(model, x=data) == {"w2": reach.NEVER}


EXPERTS = """
g (float[N, 8] x, float[8, 8] w1, float[8, 8] w2, float[8, 8] head) => (float[N, 8] y)
<float ten = {10}, int64[2] split = {1, 7}, float one = {1}>
{
  first, rest = Split<axis = 1>(x, split)
  low = Less(first, ten)
  a = MatMul(x, w1)
  b = MatMul(x, w2)
  WAY
  y = MatMul(mixed, head)
}
"""


@pytest.mark.parametrize(
    "way",
    [
        "mixed = Where(low, a, b)",
        """
        gate = Cast<to = 1>(low)
        other = Sub(one, gate)
        left = Mul(a, gate) right = Mul(other, b)
        mixed = Add(left, right)
        """,
    ],
)
def test_an_expert_that_no_sample_is_sent_to_is_out_of_reach(way: str):
    model = weights(EXPERTS.replace("WAY", way), "w1", "w2", "head")
    assert unreached(model, x=X) == {"w2": reach.NEVER}
    late = X.copy()
    late[-1, 0] = 11
    assert unreached(model, x=late) == {}


def test_an_expert_without_rows_is_out_of_reach():
    text = """
    g (float[N, 8] x, float[8, 8] w1, float[8, 8] w2) => (float[N, 8] y)
    <float ten = {10}, int64[2] split = {1, 7}, int64 axis = {0}>
    {
      first, rest = Split<axis = 1>(x, split)
      high = Greater(first, ten)
      column = NonZero(high)
      columns = Transpose(column)
      only, none = Split<axis = 1>(columns, ones)
      rows = GatherND(x, only)
      a = MatMul(x, w1)
      b = MatMul(rows, w2)
      y = ScatterND(a, only, b)
    }
    """.replace("int64 axis = {0}", "int64[2] ones = {1, 1}")
    model = weights(text, "w1", "w2")
    assert unreached(model, x=X) == {"w2": reach.NEVER}
    late = X.copy()
    late[-1, 0] = 11
    assert unreached(model, x=late) == {}


def test_a_layer_that_sees_nothing_but_nan_is_out_of_reach():
    text = """
    g (float[N, 8] x, float[8, 8] w1, float[8, 8] w2) => (float[N, 8] y)
    <float zero = {0}>
    {
      a = MatMul(x, w1)
      none = Mul(a, zero)
      nan = Div(none, none)
      b = MatMul(nan, w2)
      gone = IsNaN(b)
      y = Where(gone, a, b)
    }
    """
    model = weights(text, "w1", "w2")
    assert unreached(model, x=X) == {"w2": reach.SILENT}
    assert (
        unreached(weights(text.replace("Div(none, none)", "Abs(a)"), "w1", "w2"), x=X)
        == {}
    )


def test_models_without_branches_are_reached_in_full():
    text = """
    g (int64[N, 3] ids, float[8, 8] table, float[8, 8] w) => (float[N, 3, 8] y)
    { rows = Gather(table, ids) y = MatMul(rows, w) }
    """
    ids = np.arange(12).reshape(4, 3) % 8
    assert unreached(weights(text, "table", "w"), ids=ids) == {}


@pytest.mark.parametrize(
    "passes",
    [
        "prune:sparsity=0.97,scope=local",
        "quantize:activations=none,weights=int2",
        "codebook:bits=1",
        "lowrank:keep=0.3",
        "prune:sparsity=0.5,recover",
    ],
)
def test_what_no_sample_reached_is_left_alone_and_named(passes: str):
    text = BRANCHES.replace("8]", "64]").replace("8, 64]", "64, 64]")
    model = parsed(text, "w1", "w2", size=64)
    del model.graph.input[1:]
    x = np.random.default_rng(0).normal(size=(120, 64)).astype(np.float32)
    result = shrink(
        model,
        passes,
        data={"x": x},
        budget=Budget(min_sqnr=20),
        measure_memory=False,
    )
    wide = np.full((1, 64), 9, np.float32)

    def run(source: Any) -> Any:
        (found,) = runtime.session(source).run({"x": wide}).values()
        return found

    assert np.array_equal(run(result.model), run(model))
    (warning,) = (line for line in result.report.warnings if "w2" in line)
    assert reach.NEVER in warning
