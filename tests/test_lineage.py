"""What each value was in the model that the run started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxshrink import Pipeline, runtime, shrink
from onnxshrink.base import Context, Pass, Promise
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.lineage import Lineage, Origin
from onnxshrink.model import Model
from onnxshrink.passes.quantize import Quantize
from onnxshrink.quantization import correction, smoothing
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure import channels
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[1] / "models"
EXAMPLES = example_models()
Array = np.ndarray[Any, Any]


# --- what is said and what is answered ------------------------------------------------


def test_a_value_is_the_value_of_its_name_unless_something_is_said() -> None:
    lineage = Lineage()

    origin = lineage.origin("y")

    assert origin is not None
    assert (origin.name, origin.is_whole) == ("y", True)
    assert not lineage.is_new("y")
    assert list(lineage.changes()) == []


def test_positions_of_two_passes_are_composed() -> None:
    lineage = Lineage()
    lineage.keep("y", 1, [0, 2, 4, 6])
    lineage.keep("y", 1, [3, 1])
    lineage.keep("y", 2, [5])

    origin = lineage.origin("y")

    assert origin is not None
    assert origin.kept[1].tolist() == [6, 2]
    old = np.arange(2 * 8 * 6).reshape(2, 8, 6)
    np.testing.assert_array_equal(origin.take(old), old[:, [6, 2]][:, :, [5]])


def test_what_stands_for_a_value_is_what_that_was() -> None:
    lineage = Lineage()
    lineage.keep("norm", 1, [1, 2])
    lineage.replace("norm", "conv")
    lineage.scale("conv", 0.5)
    lineage.scale("conv", 0.5)

    origin = lineage.origin("conv")

    assert origin is not None
    assert (origin.name, origin.factor) == ("norm", 0.25)
    assert str(origin) == "norm * 0.25, axis 1: 1-2"
    np.testing.assert_array_equal(origin.take(np.float32([[8, 4, 0]])), [[1, 0]])


def test_factors_of_an_axis_go_with_its_positions() -> None:
    lineage = Lineage()
    lineage.keep("y", 1, [0, 2, 3])
    lineage.scale("y", np.array([1.0, 2.0, 4.0]), 1)
    lineage.scale("y", np.array([1.0, 0.5, 1.0]), 1)
    lineage.keep("y", 1, [2, 1])
    lineage.keep("y", 0, [1])

    origin = lineage.origin("y")

    assert origin is not None
    old = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(origin.take(old), [[7 * 4, 6 * 1]])
    assert "axis 1: scaled" in str(origin)
    back = Lineage.from_json(json.loads(json.dumps(lineage.to_json(["y"]))))
    again = back.origin("y")
    assert again is not None
    np.testing.assert_array_equal(again.take(old), origin.take(old))
    # How many axes there are is not known.
    lineage.scale("y", np.array([2.0, 2.0]), -1)
    lineage.keep("y", 1, [0])
    assert lineage.is_new("y")


def test_a_new_value_stays_new_whatever_becomes_of_it() -> None:
    lineage = Lineage()
    lineage.add("inner")
    lineage.keep("inner", 0, [1])
    lineage.scale("inner", 2.0)
    lineage.split("inner", ["one", "two"])

    assert all(lineage.is_new(name) for name in ("inner", "one", "two"))
    assert lineage.words(["x", "inner", "one"]) == ["2 values are new"]


def test_both_factors_of_a_split_belong_to_the_old_weight() -> None:
    lineage = Lineage()
    lineage.split("w", ["a", "b"])

    for name in ("a", "b"):
        origin = lineage.origin(name)
        assert origin is not None
        assert (origin.name, origin.is_part) == ("w", True)
    assert lineage.words(["a", "w"]) == ["a: was a part of w"]


def test_json_gives_back_what_was_said_of_values_that_are_there() -> None:
    lineage = Lineage()
    lineage.keep("y", 1, [2, 0])
    lineage.replace("y", "z")
    lineage.scale("z", 3.0)
    lineage.split("w", ["a"])
    lineage.add("inner", "gone")
    values = ["x", "y", "z", "a", "inner"]

    text = json.dumps(lineage.to_json(values))
    back = Lineage.from_json(json.loads(text))

    assert "gone" not in text
    assert back.is_new("inner")
    assert back.words(values) == lineage.words(values)
    assert json.dumps(back.to_json(values)) == text


def test_long_lists_of_positions_are_cut() -> None:
    assert str(Origin("y", {0: np.arange(0, 40, 2)})) == (
        "y, axis 0: 0,2,4,6,8,10,12,14,... (20 in all)"
    )
    assert str(Origin("y", {0: np.array([], np.int64)})) == "y, axis 0: none"


# --- what a model keeps by itself -----------------------------------------------------


def tiny() -> Model:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "example (float[N,2] x) => (float[N,2] y) "
        "{ h = Relu(x) y = MatMul(h, w) }"
    )
    weight = np.eye(2, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return Model.load(proto)


def test_a_name_that_is_used_again_is_not_the_old_value() -> None:
    model = tiny()
    node = next(node for node in model.graph.nodes if node.op == "Relu")
    model.replace_uses(node.outputs[0], model.graph.inputs[0])
    model.drop_unused()

    assert not model.copy().lineage.is_new("h")
    twin = model.copy()
    made = twin.add_node("Relu", [twin.graph.inputs[0]], name="h").outputs[0]
    assert twin.lineage.is_new(made.name)
    assert twin.fresh("h") in ("h", "h_1")
    assert twin.lineage.is_new("h")


def test_what_replaces_a_value_is_what_that_was() -> None:
    model = tiny()
    relu = next(node for node in model.graph.nodes if node.op == "Relu")
    made = model.add_node("LeakyRelu", [relu.inputs[0]]).outputs[0]
    assert model.lineage.is_new(made.name)

    model.replace_uses(relu.outputs[0], made)

    origin = model.lineage.origin(made.name)
    assert origin is not None
    assert origin.name == "h"


def test_copies_keep_lineage_and_do_not_share_it() -> None:
    model = tiny()
    model.lineage.keep("h", 1, [1])
    twin = model.copy()
    twin.lineage.add("h")

    origin = model.lineage.origin("h")
    assert origin is not None
    assert origin.kept[1].tolist() == [1]
    assert twin.lineage.is_new("h")


def test_writing_a_model_leaves_its_lineage_alone(tmp_path: Path) -> None:
    model = tiny()
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    values[np.abs(values) < 2] = 0
    model.set_weight("w", values)
    model.lineage.add("h")

    model.save(tmp_path / "model.onnx")

    assert dict(model.lineage.changes()) == {"h": None}


# --- fold says the truth --------------------------------------------------------------


def values_of(model: Model, names: list[str], feed: dict[str, Array]) -> dict[str, Any]:
    fed = {name: feed[name] for name in names if name in feed}
    rest = [name for name in names if name not in feed]
    session = runtime.session(model, expose=rest, only_exposed=True)
    return fed | session.run(feed)


def assert_true(
    model: Model, reference: Model, feed: dict[str, Array], noise: float = 1e-4
) -> int:
    """Values must be what their lineage says; return how many were looked at.

    Args:
        model: The model.
        reference: What it was.
        feed: Inputs of both.
        noise: How far a value may be off, as a share of the largest one beside it.
    """
    theirs = {t.name for n in reference.graph.nodes for t in n.outputs if t.name}
    pairs = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            origin = model.lineage.origin(tensor.name) if tensor.name else None
            if origin is not None and origin.name in theirs:
                pairs[tensor.name] = origin
    known = reference.infer_shapes()
    floats = {
        name: origin
        for name, origin in pairs.items()
        if origin.name in known and known[origin.name].data_type == 1
    }
    ours = values_of(model, list(floats), feed)
    wanted = values_of(reference, [o.name for o in floats.values()], feed)
    for name, origin in floats.items():
        should = origin.take(wanted[origin.name])
        assert ours[name].shape == should.shape, (name, str(origin))
        scale = float(np.abs(should).max(initial=0.0)) or 1.0
        np.testing.assert_allclose(
            ours[name],
            should,
            rtol=1e-3,
            atol=noise * scale,
            err_msg=f"{name}: {origin}",
        )
    return len(floats)


def folded(model: Model) -> Model:
    ctx = make_context(Splits.build(model), model)
    twin = model.copy()
    for pass_ in Pipeline.parse("fold"):
        pass_.apply(twin, ctx)
    return twin


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_after_fold_values_are_what_lineage_says(name: str) -> None:
    model = Model.load(EXAMPLES[name])
    model.fit_runtime()
    samples = Splits.build(model).calibration
    assert samples is not None
    size = samples.batch or min(3, samples.used)
    feed = samples.read(np.arange(size))

    assert_true(folded(model), model, feed)


def test_what_a_product_gives_before_its_bias_is_lost_where_a_scale_is_folded_in() -> (
    None
):
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> '
        "example (float[2,3,2] x) => (float[2,3,2] y) "
        "<float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}, float[2] s = {7, 8}> "
        "{ h = MatMul(x, w) z = Add(h, b) k = Mul(z, s) y = Relu(k) }"
    )
    model = Model.load(proto)
    twin = folded(model)
    names = list(twin.value_names())
    assert not {"h", "k"} <= set(names)  # the scale went into w and b

    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert assert_true(twin, model, {"x": x}) == 2
    lost = [name for name in names if twin.lineage.is_new(name)]
    assert "h" in lost


@pytest.mark.parametrize("name", ["residual-cnn", "vit"])
def test_after_fold_values_of_real_models_are_what_lineage_says(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    samples = Splits.build(model).calibration
    assert samples is not None
    feed = samples.read(np.arange(samples.batch or 2))
    twin = folded(model)

    changed = sum(origin is not None for _, origin in twin.lineage.changes())

    assert assert_true(twin, model, feed) > 10
    if name == "residual-cnn":
        assert changed >= 5  # outputs of Convs are those of BatchNormalizations


# --- so does what is done before weights are quantized ------------------------------


def test_after_equalization_values_are_what_lineage_says() -> None:
    model = Model.load(MODELS / "lenet-5.onnx")
    twin = model.copy()
    ctx = make_context(Splits.build(model), model)
    assert correction.equalize(twin, ctx) > 1
    samples = ctx.samples.calibration
    assert samples is not None
    assert sum(o is not None for _, o in twin.lineage.changes()) > 3
    assert assert_true(twin, model, samples.read(np.arange(3))) > 5


def test_after_smoothing_values_are_what_lineage_says() -> None:
    model = folded(Model.load(MODELS / "vit.onnx"))
    model.lineage = Lineage()
    twin = model.copy()
    ctx = make_context(Splits.build(model), model)
    random = np.random.default_rng(0)
    count = 0
    for group in smoothing.groups(twin):
        width = group.weights()[0].shape[1]
        smoothing.apply(twin, group, random.uniform(0.5, 2.0, width))
        count += 1
    assert count > 8
    samples = ctx.samples.calibration
    assert samples is not None
    assert sum(o is not None for _, o in twin.lineage.changes()) > 8
    assert assert_true(twin, model, samples.read(np.arange(2))) > 20


@pytest.mark.parametrize("name", ["lenet-5", "residual-cnn"])
def test_after_quantization_values_are_what_lineage_says(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    twin = folded(model)
    splits = Splits.build(model, Samples.random_for(model, count=40, seed=1))
    ctx = make_context(splits, model)
    relus = sum(node.op == "Relu" for node in twin.nodes())
    pass_ = Quantize(activations="static", calibration="minmax", allow_random=True)
    pass_.apply(twin, ctx)
    samples = ctx.samples.calibration
    assert samples is not None

    # A QuantizeLinear clips what some of them gave: the value before is their input.
    assert sum(node.op == "Relu" for node in twin.nodes()) < relus
    assert assert_true(twin, model, samples.read(np.arange(4)), noise=0.1) > 8


# --- channels and blocks --------------------------------------------------------------


def test_channels_that_are_removed_are_known_by_their_old_numbers() -> None:
    model = Model.load(MODELS / "lenet-5.onnx")
    reference = model.copy()
    group = next(g for g in channels.find(model) if not g.why)
    channels.remove(model, group, [0, 3, 4])
    again = next(g for g in channels.find(model) if g.name == group.name)
    channels.remove(model, again, [1, 2])

    origin = model.lineage.origin(group.name)
    assert origin is not None
    assert origin.kept[0].tolist() == [3, 4]
    theirs = reference.weight(group.name).read()
    np.testing.assert_array_equal(model.weight(group.name).read(), origin.take(theirs))
    node = group.nodes[0]
    behind = model.lineage.origin(node.outputs[0].name)
    assert behind is not None
    assert behind.kept[1].tolist() == [3, 4]


@pytest.mark.parametrize("name", ["residual-cnn", "vit"])
def test_a_thinner_model_has_the_shapes_that_its_lineage_says(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    reference = model.copy()
    ctx = make_context(Splits.build(model), reference)
    for pass_ in Pipeline.parse("student:keep=1,width=0.5"):
        pass_.apply(model, ctx)
    samples = ctx.samples.calibration
    assert samples is not None
    feed = samples.read(np.arange(samples.batch or 2))
    theirs = {t.name for n in reference.graph.nodes for t in n.outputs if t.name}
    names = [t.name for n in model.graph.nodes for t in n.outputs if t.name in theirs]

    ours = values_of(model, names, feed)
    wanted = values_of(reference, names, feed)

    thinner = 0
    for value in names:
        origin = model.lineage.origin(value)
        assert origin is not None
        array = wanted[value]
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            continue
        assert origin.take(array).shape == ours[value].shape, (value, str(origin))
        thinner += bool(origin.kept)
    assert thinner > 5


def test_the_input_of_a_removed_block_stays_what_it_was() -> None:
    model = Model.load(MODELS / "residual-cnn.onnx")
    ctx = make_context(Splits.build(model), model.copy())
    for pass_ in Pipeline.parse("student:keep=0"):
        pass_.apply(model, ctx)

    names = list(model.value_names())
    assert "/down1/relu/Relu_output_0" in names
    assert "/depthwise/relu/Relu_output_0" not in names
    assert model.lineage.words(names) == []


# --- in a run -------------------------------------------------------------------------


class Splits2(Pass):
    """Write ``h W`` as ``(h A) B``, with ``A`` the identity."""

    name = "splits2"
    promise = Promise.SAME

    def apply(self, model: Model, ctx: Context) -> None:
        node = next(node for node in model.graph.nodes if node.op == "MatMul")
        first = model.add_weight("w_a", np.eye(2, dtype=np.float32))
        inner = model.add_node("MatMul", [node.inputs[0], first], before=node)
        node.inputs[0] = inner.outputs[0]
        model.lineage.split("w", ["w", first.name])


def test_a_run_begins_with_a_lineage_of_its_own_and_hands_it_out() -> None:
    model = tiny()
    model.lineage.add("x", "h", "y")

    result = shrink(model, [Splits2()])

    assert not result.model.lineage.is_new("h")
    words = result.model.lineage.words(result.model.value_names())
    assert words[-1] == "1 values are new"
    assert set(words[:-1]) == {"w: was a part of w", "w_a: was a part of w"}
    assert model.lineage.is_new("h")  # the argument is untouched


class Interrupted(Pass):
    """Stop a run."""

    name = "interrupted"
    promise = Promise.SAME

    def apply(self, model: Model, ctx: Context) -> None:
        raise KeyboardInterrupt


class Remembers(Pass):
    """Note what lineage a resumed run has."""

    name = "interrupted"
    promise = Promise.SAME

    def apply(self, model: Model, ctx: Context) -> None:
        for line in model.lineage.words(model.value_names()):
            ctx.did("lineage", line)


def interrupted(output: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        shrink(tiny(), [Splits2(), Interrupted()], output=output)
    return output.parent / f".{output.name}.onnxshrink" / "state.json"


def test_a_resumed_run_has_the_lineage_it_had(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    interrupted(output)

    result = shrink(tiny(), [Splits2(), Remembers()], output=output, resume=True)

    told = {what for _, what in result.report.steps[1].did}
    assert {"w: was a part of w", "w_a: was a part of w"} <= told


def test_the_state_of_an_older_version_is_refused_in_words(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    file = interrupted(output)
    state = json.loads(file.read_text())
    for missing in ("format", "lineage"):
        older = {key: value for key, value in state.items() if key != missing}
        file.write_text(json.dumps(older))
        with pytest.raises(UsageError, match="run without --resume"):
            shrink(tiny(), [Splits2(), Remembers()], output=output, resume=True)
