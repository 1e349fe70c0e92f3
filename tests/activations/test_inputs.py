"""What layers read: one run for all, shared, bounded, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.activations import inputs
from onnxshrink.activations.inputs import Inputs
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.statistics import ChannelNorm, Gram, Statistic
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import find

Array = np.ndarray[Any, Any]


def built(nodes: str, given: str, weights: dict[str, Array]) -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        f"g (float[{given}] x) => (float[] y) {{ {nodes} }}"
    )
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    made = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    proto.graph.output[0].CopyFrom(made.graph.output[0])
    return Model.load(proto)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def context(model: Model, x: Array | None) -> Context:
    if x is None:
        splits = Splits()
    else:
        samples = Samples.of(x).bind(model.inputs)
        splits = Splits(calibration=samples, evaluation=samples)
    return make_context(samples=splits, reference=model)


TWO = (
    "a = MatMul (x, v) b = MatMul (x, w) r = Relu (a) c = MatMul (r, u) y = Add (b, c)"
)


def two() -> Model:
    weights = {"v": random(3, 4), "w": random(3, 2, seed=1), "u": random(4, 2, seed=2)}
    return built(TWO, "N,5,3", weights)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Names of the values that each run over the samples was asked for."""
    asked: list[tuple[str, ...]] = []
    whole = inputs.gather

    def counted(model: Model, wanted: Any, *args: Any, **options: Any) -> Any:
        asked.append(tuple(wanted))
        return whole(model, wanted, *args, **options)

    monkeypatch.setattr(inputs, "gather", counted)
    return asked


def test_sums_are_those_of_the_rows_that_a_weight_multiplies() -> None:
    model, x = two(), random(6, 5, 3, seed=3)
    seen = context(model, x).inputs(list(find(model)))
    hidden = np.maximum(x @ model.weight("v").read(), 0).reshape(-1, 4)
    for name, rows in (("v", x.reshape(-1, 3)), ("u", hidden)):
        rows = rows.astype(np.float64)
        assert seen[name].count == len(rows)
        assert seen[name].gram is not None
        np.testing.assert_allclose(seen[name].gram[0], rows.T @ rows, rtol=1e-5)
        np.testing.assert_allclose(seen[name].mean[0], rows.mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(
            seen[name].norms[0], np.linalg.norm(rows, axis=0), rtol=1e-5
        )


def test_sums_of_scaled_inputs_are_the_sums_scaled() -> None:
    model, x = two(), random(6, 5, 3, seed=3)
    factors = np.array([0.5, 3.0, 1.0])
    seen = context(model, x).inputs(list(find(model)))["v"].scaled(factors)
    wanted = context(model, (x * factors).astype(np.float32)).inputs(find(model))["v"]
    assert seen.count == wanted.count
    assert seen.gram is not None
    assert wanted.gram is not None
    np.testing.assert_allclose(seen.gram, wanted.gram, rtol=1e-5)
    np.testing.assert_allclose(seen.sums, wanted.sums, rtol=1e-5)
    np.testing.assert_allclose(seen.squares, wanted.squares, rtol=1e-5)


def test_layers_that_read_one_tensor_share_one_matrix_of_one_run(
    runs: list[tuple[str, ...]],
) -> None:
    model = two()
    seen = context(model, random(6, 5, 3)).inputs(find(model))
    v, w = seen["v"].gram, seen["w"].gram
    assert v is not None
    assert w is not None
    assert np.shares_memory(v, w)
    assert runs == [("x", "r")]


def test_an_attempt_that_follows_runs_nothing(runs: list[tuple[str, ...]]) -> None:
    model = two()
    ctx = context(model, random(6, 5, 3))
    first = ctx.inputs(find(model))["u"].gram
    again = replace(ctx, cache={}).inputs(find(model.copy()))["u"].gram
    assert len(runs) == 1
    assert first is not None
    np.testing.assert_array_equal(first, again)


def test_another_model_is_run_again(runs: list[tuple[str, ...]]) -> None:
    model = two()
    ctx = context(model, random(6, 5, 3))
    before = ctx.inputs(find(model))["u"].squares
    model.set_weight("v", model.weight("v").read() * 2)
    after = ctx.inputs(find(model))["u"].squares
    np.testing.assert_allclose(after, 4 * before, rtol=1e-6)
    assert len(runs) == 2


def test_large_matrices_are_gathered_in_groups_as_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, ...]]
) -> None:
    model, x = two(), random(6, 5, 3)
    whole = context(model, x).inputs(find(model))
    runs.clear()
    monkeypatch.setattr(inputs, "HELD", 2 * 3 * 3 * 8)
    parts = context(model, x).inputs(find(model))
    assert runs == []
    assert list(parts) == ["v", "w", "u"]
    for name, part in parts.items():
        assert part.gram is not None
        np.testing.assert_array_equal(part.gram, whole[name].gram)
    assert runs == [("x",), ("r",)]


def test_a_layer_that_is_too_wide_has_norms_and_a_mean() -> None:
    model, x = two(), random(6, 5, 3)
    ctx = context(model, x)
    seen = Inputs(ctx, find(model), largest=3 * 3 * 8)
    assert seen["v"].gram is not None
    assert seen["u"].gram is None
    whole = ctx.inputs(find(model))["u"]
    np.testing.assert_allclose(seen["u"].squares, whole.squares, rtol=1e-6)
    np.testing.assert_allclose(seen["u"].mean, whole.mean, rtol=1e-6)
    assert all(
        one.gram is None for one in ctx.inputs(find(model), grams=False).values()
    )


def test_a_folder_keeps_what_took_long_or_what_it_was_given_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two()
    own, given = tmp_path / "own", tmp_path / "given"
    ctx = replace(context(model, random(6, 5, 3)), folder=own)
    inputs.gather_inputs(ctx, list(find(model)))
    assert list(own.iterdir()) == []  # it was done at once
    inputs.gather_inputs(ctx, list(find(model)), folder=given)
    assert len(list(given.iterdir())) == 1
    monkeypatch.setattr(inputs.kept, "SAVE_SECONDS", 0.0)
    inputs.gather_inputs(ctx, list(find(model)))
    assert len(list(own.iterdir())) == 1


def test_what_random_inputs_show_is_not_kept(tmp_path: Path) -> None:
    model = two()
    splits = Splits.build(model, None)
    ctx = make_context(samples=splits, reference=model)
    inputs.gather_inputs(ctx, list(find(model)), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_width_are_refused() -> None:
    (layer, *_) = find(two())
    wrong = Gram(-1)
    with pytest.raises(ModelError, match="nothing was seen"):
        InputStatistics.of(layer, [wrong])
    wrong.update(np.ones((2, 4), np.float32))
    with pytest.raises(ModelError, match="v has 3 inputs, but 4 were seen"):
        InputStatistics.of(layer, [wrong])


def test_one_reading_without_a_matrix_leaves_norms_only() -> None:
    (layer, *_) = find(two())
    parts: list[Statistic] = [Gram(-1), ChannelNorm(-1)]
    for part in parts:
        part.update(np.ones((2, 3), np.float32))
    both = InputStatistics.of(layer, parts)
    assert (both.count, both.gram) == (4, None)
    assert both.squares.tolist() == both.sums.tolist() == [[4, 4, 4]]


def test_groups_are_cut_by_the_bytes_of_their_matrices() -> None:
    # 3, 3 and 4 inputs, 72 and 128 bytes: the first two share a matrix.
    every = list(find(two()))

    def cut(held: int, largest: int) -> list[list[str]]:
        parts = inputs.groups_of(every, held, largest)
        return [[layer.name for layer in part] for part in parts]

    assert cut(200, 1000) == [["v", "w", "u"]]
    assert cut(199, 1000) == [["v", "w"], ["u"]]
    assert cut(10, 1000) == [["v", "w"], ["u"]]
    assert cut(144, 100) == [["v", "w", "u"]]  # u has norms only, which are small


CONVS = {
    "plain": ("y = Conv <pads = [1, 0, 0, 1], strides = [2, 1]> (x, w)", (5, 4, 2, 2)),
    "groups": ("y = Conv <group = 2, dilations = [1, 2]> (x, w)", (6, 2, 2, 2)),
    "depthwise": ("y = Conv <group = 4> (x, w)", (4, 1, 3, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_rows_of_a_convolution_are_its_patches(name: str) -> None:
    """An output is a row times the weight: so sums of outputs follow from the Gram."""
    nodes, shape = CONVS[name]
    model, x = built(nodes, "2,4,6,5", {"w": random(*shape)}), random(2, 4, 6, 5)
    ctx = context(model, x)
    (layer,) = find(model)
    for seen in (ctx.inputs([layer]), ctx.inputs([layer], grams=False)):
        one = seen["w"]
        matrices = layer.layout.matrices(layer.weight.read()).astype(np.float64)
        (y,) = runtime.session(model).run({"x": x}).values()
        outputs = np.moveaxis(np.asarray(y, np.float64), 1, 0).reshape(shape[0], -1)
        assert one.count == outputs.shape[1]
        sums = np.einsum("goi,gi->go", matrices, one.sums).reshape(-1)
        np.testing.assert_allclose(sums, outputs.sum(axis=1), rtol=1e-4, atol=1e-4)
        if one.gram is not None:
            squares = np.einsum("goi,gij,goj->go", matrices, one.gram, matrices)
            np.testing.assert_allclose(
                squares.reshape(-1), np.square(outputs).sum(axis=1), rtol=1e-4
            )
    np.testing.assert_allclose(
        ctx.inputs([layer])["w"].squares, seen["w"].squares, rtol=1e-5
    )


def test_a_weight_of_two_nodes_counts_the_rows_of_both() -> None:
    w = random(3, 3)
    model = built("a = MatMul (x, w) y = MatMul (a, w)", "N,3", {"w": w})
    x = random(7, 3, seed=1)
    one = context(model, x).inputs(find(model))["w"]
    rows = np.concatenate([x, x @ w]).astype(np.float64)
    assert one.count == 14
    assert one.gram is not None
    np.testing.assert_allclose(one.gram[0], rows.T @ rows, rtol=1e-5)


def test_what_cannot_be_seen_is_absent() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,3] x, bool c) => (float[N,2] y)
        <float[3,2] w = {1, 2, 3, 4, 5, 6}, float[3,2] v = {1, 2, 3, 4, 5, 6},
         float[2,3] k = {1, 0, 0, 0, 1, 0}, float[2,2] p = {1, 0, 0, 1}> {
            z = If (c) <
                then_branch = t () => (float[N,2] a) {
                    r = Relu (x)  a = MatMul (r, w)
                },
                else_branch = e () => (float[N,2] b) { b = MatMul (x, v) }
            >
            f = MatMul (k, w)
            s = MatMul (f, p)
            q = MatMul (z, s)
            y = Identity (q)
        }"""
    )
    model = Model.load(proto)
    names = [one.name for one in inputs.seen_from_outside(find(model))]
    assert names == ["v", "p"]  # w multiplies what is inside a branch, and a constant


def test_without_samples_it_says_so() -> None:
    model = two()
    with pytest.raises(ModelError, match="give --data"):
        context(model, None).inputs(find(model))


def test_arrays_are_read_only_as_they_are_shared() -> None:
    model = two()
    one = context(model, random(6, 5, 3)).inputs(find(model))["v"]
    assert one.gram is not None
    with pytest.raises(ValueError, match="read-only"):
        one.gram[0, 0, 0] = 1


def test_each_group_of_a_transposed_convolution_has_its_own_matrix() -> None:
    nodes = "y = ConvTranspose <group = 2> (x, w)"
    model, x = built(nodes, "3,4,5", {"w": random(4, 3, 2)}), random(3, 4, 5)
    one = context(model, x).inputs(find(model))["w"]
    rows = np.moveaxis(x, 1, 2).reshape(-1, 4).astype(np.float64)
    assert one.gram is not None
    for group, part in enumerate((rows[:, :2], rows[:, 2:])):
        np.testing.assert_allclose(one.gram[group], part.T @ part, rtol=1e-5)
        np.testing.assert_allclose(one.mean[group], part.mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(one.squares[group], np.square(part).sum(axis=0))


def test_both_directions_of_a_recurrent_layer_read_the_same() -> None:
    model = built(
        'y = LSTM <hidden_size = 2, direction = "bidirectional"> (x, w, r)',
        "N,2,3",
        {"w": random(2, 8, 3), "r": random(2, 8, 2)},
    )
    x = random(4, 2, 3)
    seen = context(model, x).inputs(find(model))
    rows = x.reshape(-1, 3).astype(np.float64)
    one = seen["w"]
    assert one.gram is not None
    assert one.gram.shape == (2, 3, 3)
    for matrix in one.gram:
        np.testing.assert_allclose(matrix, rows.T @ rows, rtol=1e-5)
    assert "r" not in seen  # of two directions, states are not told apart


def test_rows_of_nan_are_left_out() -> None:
    nodes = "h = Log (x) y = MatMul (h, w)"
    model = built(nodes, "N,3", {"w": random(3, 2)})
    x = np.abs(random(6, 3)) + 1
    assert context(model, x).inputs(find(model))["w"].is_finite
    x[0, 0] = -1
    seen = context(model, x).inputs(find(model))["w"]
    assert seen.is_finite
    assert seen.count == 5
