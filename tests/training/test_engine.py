"""The walk over the graph: fan-out, what is skipped, errors, preparation, QDQ."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import runtime
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.training import gradients, is_covered, prepare, rule
from onnxshrink.training.gradients import _RULES

Array = np.ndarray[Any, Any]


def model_of(text: str, opset: int = 20) -> Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1]>\n'
    return Model.load(onnx.parser.parse_model(header + text))


def gradient(
    model: Model, output: str, wrt: Sequence[str], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """Return gradients of the sum of an output."""
    found = gradients(model, {output: None}, wrt)
    names = [tensor.name for tensor in found.values()]
    answer = runtime.session(model, threads=1, expose=names).run(feeds)
    return {name: answer[tensor.name] for name, tensor in found.items()}


def row(*values: float) -> Array:
    return np.array([values], np.float32)


def test_uses_of_one_value_add_up() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y) {
          a = Mul(x, x)
          b = Add(a, x)
          c = Sub(b, x)
          y = Mul(c, x)
        }"""
    )
    found = gradient(model, "y", ["x"], {"x": row(2, 3)})
    np.testing.assert_allclose(found["x"], row(12, 27))  # of x cubed


def test_three_uses_and_an_inner_value() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y) {
          a = Mul(x, x)
          y = Sum(a, a, a)
        }"""
    )
    found = gradient(model, "y", ["x", "a"], {"x": row(2, 3)})
    np.testing.assert_allclose(found["x"], row(12, 18))
    np.testing.assert_allclose(found["a"], row(3, 3))


def test_a_weight_used_twice_and_its_own_gradient_as_upstream() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1, 2, 3, 4}> {
          a = MatMul(x, w)
          y = MatMul(a, w)
        }"""
    )
    found = gradient(model, "y", ["w"], {"x": row(1, 0)})
    # y = x w w; a = (1, 2), w summed over columns = (3, 7).
    np.testing.assert_allclose(found["w"], [[1 + 3, 1 + 7], [2, 2]])


def test_what_the_loss_does_not_depend_on_has_no_gradient() -> None:
    model = model_of(
        """g (float[1,2] x, float[1,2] z) => (float[1,2] y, float[1,2] u) {
          y = Exp(x)
          u = Exp(z)
        }"""
    )
    assert set(gradients(model, {"y": None}, ["x", "z"])) == {"x"}


def test_gradients_stop_where_they_are_zero() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y) {
          a = Floor(x)
          y = Mul(a, x)
        }"""
    )
    found = gradient(model, "y", ["x"], {"x": row(1.5, 2.5)})
    np.testing.assert_allclose(found["x"], row(1, 2))


def test_frozen_branches_cost_nothing() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y)
        <float[2,2] v = {1, 2, 3, 4}, float[2,2] w = {1, 0, 0, 1}> {
          a = MatMul(x, v)
          y = MatMul(a, w)
        }"""
    )
    before = len(model.graph.nodes)
    gradients(model, {"y": None}, ["w"])
    added = [node.op for node in model.graph.nodes[before:]]
    assert added.count("Gemm") == 1


def test_an_operator_without_a_rule_names_itself_and_what_to_freeze() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y)
        <float[2,2] v = {1, 2, 3, 4}, float[2,2] w = {1, 0, 0, 1}> {
          a = MatMul(x, v)
          b = Det(v)
          c = Mul(a, b)
          y = MatMul(c, w)
        }"""
    )
    with pytest.raises(ModelError, match=r"Det node .* 'v'; freeze") as caught:
        gradients(model.copy(), {"y": None}, ["v", "w"])
    assert "'w'" not in str(caught.value)
    assert set(gradients(model, {"y": None}, ["w"])) == {"w"}


def test_a_weight_inside_a_branch_is_refused_not_ignored() -> None:
    model = model_of(
        """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
          y = If (c) <
            then_branch = t () => (float[2] p) { p = Mul(x, w) },
            else_branch = e () => (float[2] q) { q = Add(x, w) }>
        }"""
    )
    with pytest.raises(ModelError, match=r"If node .* 'w'"):
        gradients(model, {"y": None}, ["w"])


def test_an_unknown_name_gets_a_suggestion() -> None:
    model = model_of("g (float[1,2] x) => (float[1,2] y) { y = Exp(x) }")
    with pytest.raises(UsageError, match="no value 'z'"):
        gradients(model, {"y": None}, ["z"])


def test_an_unknown_shape_says_what_to_give() -> None:
    model = model_of(
        """g (float[N,2] x, float[1,2] z) => (float[N,2] y) { y = Mul(x, z) }"""
    )
    with pytest.raises(ModelError, match="input 'x' has no fixed shape"):
        gradients(model, {"y": None}, ["z"])


CUBED = "g (float{} x) => (float{} y) {{ y = my.Cube(x) }}"


def test_the_documented_rule_of_ones_own() -> None:
    lines = str(rule.__doc__).partition("refuses::")[2].partition("Args:")[0]
    try:
        exec(textwrap.dedent(lines), {"rule": rule})
        assert is_covered("Cube", "my")
        assert not is_covered("Cube")
        model = model_of(CUBED.format("[1,2]", "[1,2]"))
        gradients(model, {"y": model.add_weight("one", row(1, 1))}, ["x"])
        # onnxruntime has no such operator: only what the rule added is run.
        slope = next(n for n in model.graph.nodes if n.op == "Mul")
        assert slope.name == "Cube_grad_Mul"
        model.graph.outputs = [model.graph.nodes[-1].outputs[0]]
        model.drop_unused()
        answer = runtime.session(model, threads=1).run({"x": row(2, -1)})
        np.testing.assert_allclose(next(iter(answer.values())), row(12, 3))
        large = model_of(CUBED.format("[1,1,1,1,2]", "[1,1,1,1,2]"))
        one = large.add_weight("one", np.ones((1, 1, 1, 1, 2), np.float32))
        with pytest.raises(ModelError, match="more than four axes; or freeze 'x'"):
            gradients(large, {"y": one}, ["x"])
    finally:
        del _RULES["my", "Cube"]


def test_the_same_model_gives_the_same_bytes() -> None:
    def made() -> bytes:
        model = model_of(
            """g (float[2,3,8,8] x) => (float y)
            <int64[4] s = {4, 3, 3, 3}> {
              w = ConstantOfShape <value = float[1] {0.5}> (s)
              a = Conv <pads = [1,1,1,1]> (x, w)
              b = Relu(a)
              y = ReduceMean <keepdims = 0> (b)
            }"""
        )
        gradients(model, {"y": None}, ["w", "x"])
        return model.to_bytes()

    assert made() == made()


# --- preparation ------------------------------------------------------------------


def test_shape_arithmetic_becomes_constants() -> None:
    model = model_of(
        """g (float[N,2,3] x) => (float[N,M] y)
        <int64[1] zero = {0}, int64[1] rest = {-1}> {
          s = Shape(x)
          n = Gather(s, zero)
          t = Concat <axis = 0> (n, rest)
          f = Reshape(x, t)
          y = Exp(f)
        }"""
    )
    ready = prepare(model, {"x": (4, 2, 3)})
    assert [node.op for node in ready.graph.nodes] == ["Reshape", "Exp"]
    assert len(model.graph.nodes) == 5
    x = np.zeros((4, 2, 3), np.float32)
    found = gradient(ready, "y", ["x"], {"x": x})
    np.testing.assert_array_equal(found["x"], np.ones_like(x))


def test_what_depends_on_a_trained_weight_is_not_folded() -> None:
    text = """g (float[1,2] x) => (float[1,2] y) <float[2] w = {1, 2}> {
          v = Neg(w)
          y = Mul(x, v)
        }"""
    kept = prepare(model_of(text), {"x": (1, 2)}, keep=["w"])
    assert [node.op for node in kept.graph.nodes] == ["Neg", "Mul"]
    folded = prepare(model_of(text), {"x": (1, 2)})
    assert [node.op for node in folded.graph.nodes] == ["Mul"]
    found = gradient(kept, "y", ["w"], {"x": row(3, 4)})
    np.testing.assert_allclose(found["w"], [-3, -4])


def test_functions_are_walked_into() -> None:
    header = '<ir_version: 10, opset_import: ["" : 20, "f" : 1]>\n'
    model = Model.load(
        onnx.parser.parse_model(
            header
            + """g (float[1,2] x) => (float[1,2] y) { y = f.square(x) }
            <domain: "f", opset_import: ["" : 20]>
            square (a) => (b) { b = Mul(a, a) }"""
        )
    )
    ready = prepare(model, {"x": (1, 2)})
    found = gradient(ready, "y", ["x"], {"x": row(2, 3)})
    np.testing.assert_allclose(found["x"], row(4, 6))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "no shape is given for input 'x'"),
        ({"x": (2, 3)}, "does not fit"),
        ({"x": (2, 2, 2)}, "does not fit"),
        ({"x": (2, 2), "xx": (1,)}, "no input 'xx'"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    model = model_of("g (float[N,2] x) => (float[N,2] y) { y = Exp(x) }")
    with pytest.raises(UsageError, match=message):
        prepare(model, shapes)


def test_an_old_opset_is_raised() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,1] y) {
          a = Exp(x)
          y = ReduceSum <axes = [1]> (a)
        }""",
        opset=11,
    )
    ready = prepare(model, {"x": (1, 2)})
    assert ready.opset >= 18
    found = gradient(ready, "y", ["x"], {"x": row(0, 1)})
    np.testing.assert_allclose(found["x"], row(1, np.e), rtol=1e-6)


# --- casts and batch statistics ---------------------------------------------------


def test_casts_carry_gradients_between_float_types_only() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y) {
          d = Cast <to = 11> (x)
          e = Mul(d, d)
          f = Cast <to = 1> (e)
          i = Cast <to = 7> (x)
          j = Cast <to = 1> (i)
          y = Mul(f, j)
        }"""
    )
    found = gradient(model, "y", ["x"], {"x": row(2.5, 3.5)})
    np.testing.assert_allclose(found["x"], row(2 * 2.5 * 2, 2 * 3.5 * 3))


def test_batch_statistics() -> None:
    # Of PyTorch 2.13, batch_norm(training=True) of the same numbers, times the weights.
    model = model_of(
        """g (float[4,2] x, float[4,2] pull) => (float[4,2] y)
        <float[2] s = {2, -1}, float[2] b = {0.5, 0.25},
         float[2] m = {0, 0}, float[2] v = {1, 1}> {
          n, rm, rv = BatchNormalization <training_mode = 1> (x, s, b, m, v)
          y = Mul(n, pull)
        }"""
    )
    feeds = {
        "x": np.array([[1, 2], [2, 0], [4, -1], [0, 3]], np.float32),
        "pull": np.array([[1, 0], [0, 1], [2, -1], [0, 1]], np.float32),
    }
    found = gradient(model, "y", ["x", "s", "b"], feeds)
    np.testing.assert_allclose(found["x"], BATCH_X, atol=1e-5)
    np.testing.assert_allclose(found["s"], BATCH_S, atol=1e-5)
    np.testing.assert_allclose(found["b"], [3, 1], atol=1e-6)


BATCH_X = [
    [0.772709, 0.347849],
    [-1.159065, -0.664076],
    [0.386361, 0.411097],
    [-5e-06, -0.09487],
]
BATCH_S = [2.535457, 1.897363]


# --- quantization -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("is_per_channel", [False, True])
def test_quantization_is_straight_through_with_learned_scales(
    kind: str, is_per_channel: bool
) -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=(5, 3)).astype(np.float32) * 40
    pull = random.normal(size=(5, 3)).astype(np.float32)
    scale = np.array([0.1, 0.25, 0.5] if is_per_channel else 0.25, np.float32)
    low, high = (-128, 127) if kind == "int8" else (0, 255)
    zero = np.full(scale.shape, 0 if kind == "int8" else 100)
    size = "3" if is_per_channel else ""
    shape = f"[{size}]" if size else ""
    values = ", ".join(map(str, np.atleast_1d(scale)))
    zeros = ", ".join(map(str, np.atleast_1d(zero)))
    model = model_of(
        f"""g (float[5,3] x, float[5,3] pull) => (float[5,3] y)
        <float{shape} s = {{{values}}}, {kind}{shape} z = {{{zeros}}}> {{
          q = QuantizeLinear <axis = 1> (x, s, z)
          r = Identity(q)
          d = DequantizeLinear <axis = 1> (r, s, z)
          y = Mul(d, pull)
        }}"""
    )
    found = gradient(model, "y", ["x", "s"], {"x": x, "pull": pull})
    # Esser et al. 2020, equations 2 and 3.
    code = x / scale + zero
    inside = (code >= low - 0.5) & (code <= high + 0.5)
    assert inside.any()
    assert not inside.all()
    slope = np.where(
        inside, np.round(x / scale) - x / scale, np.clip(code, low, high) - zero
    )
    np.testing.assert_allclose(found["x"], pull * inside, rtol=1e-6)
    expected = (slope * pull).sum(axis=0 if is_per_channel else None)
    np.testing.assert_allclose(found["s"], expected, rtol=1e-4, atol=1e-3)


def test_integer_weights_have_a_gradient_for_their_scale() -> None:
    model = model_of(
        """g (float[1,2] x) => (float[1,2] y)
        <int8[2,2] q = {1, -2, 3, 4}, float[2] s = {0.5, 2}> {
          w = DequantizeLinear <axis = 1> (q, s)
          y = MatMul(x, w)
        }"""
    )
    found = gradient(model, "y", ["s"], {"x": row(1, 10)})
    np.testing.assert_allclose(found["s"], [1 + 30, -2 + 40])


def test_dropout_that_drops_passes_what_it_kept() -> None:
    model = model_of(
        """g (float[8,8] x) => (float[8,8] y) <float r = {0.25}, bool t = {1}> {
          y = Dropout <seed = 3> (x, r, t)
        }"""
    )
    found = gradients(model, {"y": None}, ["x"])["x"]
    x = np.ones((8, 8), np.float32)
    session = runtime.session(model, threads=1, expose=[found.name])
    answer = session.run({"x": x})
    assert 0 < np.count_nonzero(answer["y"]) < 64
    np.testing.assert_allclose(answer[found.name], answer["y"])
