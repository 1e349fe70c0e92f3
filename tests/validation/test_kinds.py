"""What outputs are: scores and state, by the graph and not by numbers or names."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxshrink.model import Model
from onnxshrink.validation.kinds import Kinds, kinds_of


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 17, "ai.onnx.ml" : 3]> {text}'
    )


def found(proto: onnx.ModelProto) -> Kinds:
    model = Model.load(proto)
    return kinds_of(model, model.inputs, model.outputs)


@pytest.mark.parametrize(
    ("body", "is_scores"),
    [
        ("y = MatMul(x, w)", False),
        ("y = Softmax(x)", True),
        ("y = LogSoftmax(x)", True),
        ("y = Sigmoid(x)", True),
        ("a = Softmax(x) b = Unsqueeze(a, one) y = Squeeze(b, one)", True),
        ("a = Sigmoid(x) b = Sub(half, a) y = Concat<axis = 1>(b, a)", True),
        ("a = Softmax(x) b = Softmax(w) y = MatMul(a, b)", False),
        ("a = Sigmoid(x) y = Mul(a, x)", False),  # a gate, not a score
        ("y = MatMul(x, w) t = ArgMax(y)", True),
        ("a = MatMul(x, w) y = Identity(a) b = Identity(a) t = ArgMax(b)", True),
        ("y = MatMul(x, w) t = Softmax(y)", True),
        ("y = MatMul(x, w) a = MatMul(y, w) t = ArgMax(a)", False),
        ("y = LpNormalization(x)", False),
    ],
)
def test_scores_are_what_a_softmax_made_or_an_argmax_reads(body: str, is_scores: bool):
    model = parsed(
        f"""
        g (float[N, 3] x) => (float[N, M] y)
        <float[3, 3] w = {{1, 0, 0, 0, 1, 0, 0, 0, 1}}, float half = {{0.5}},
         int64[1] one = {{1}}>
        {{ {body} }}
        """
    )
    assert found(model).scores == ({"y"} if is_scores else set())


@pytest.mark.parametrize(("other", "is_scores"), [("Softmax", True), ("Relu", False)])
def test_scores_of_a_branch_are_scores_if_they_are_in_each(other: str, is_scores: bool):
    model = parsed(
        f"""
        g (float[N, 3] x, bool c) => (float[N, 3] y)
        {{ y = If(c) <
            then_branch = one () => (float[N, 3] a) {{ a = Softmax(x) }},
            else_branch = two () => (float[N, 3] b) {{ b = {other}(x) }}
        > }}
        """
    )
    assert found(model).scores == ({"y"} if is_scores else set())


def test_scores_made_in_a_function_are_scores():
    text = """
    <ir_version: 10, opset_import: ["" : 17, "d" : 1]>
    g (float[N, 3] x) => (float[N, 3] y) { y = d.head(x) }
    <domain: "d", opset_import: ["" : 17]>
    head (a) => (b) { b = Softmax(a) }
    """
    assert found(onnx.parser.parse_model(text)).scores == {"y"}


@pytest.mark.parametrize(
    ("given", "back", "is_state"),
    [
        ("past_key_values.0.key", "present.0.key", True),
        ("past_key_values.0.value", "present_key_values.0.value", True),
        ("state", "stateN", True),
        ("h0", "hn", True),
        ("cache_in", "cache_out", True),
        ("input", "output", False),  # what is left of such names says nothing
        ("image", "features", False),
        ("key", "present", False),
    ],
)
def test_state_is_the_next_value_of_an_input(given: str, back: str, is_state: bool):
    model = parsed(
        "g (float[N, 3] i) => (float[N, 3] o, float[N, 3] y) { o = A(i) y = A(i) }"
    )
    del model.graph.node[:]
    model.graph.input[0].name, model.graph.output[0].name = given, back
    del model.graph.value_info[:]
    for name in (back, "y"):
        model.graph.node.add(op_type="Relu", input=[given], output=[name])
    assert found(model).state == ({back} if is_state else set())


def test_the_last_state_of_a_recurrent_layer_is_state_whatever_its_name():
    text = """
    g (float[T, N, 2] x, float[1, N, 3] a, float[1, 9, 2] w, float[1, 9, 3] r)
      => (float[T, 1, N, 3] y, float[1, N, 3] b)
    { y, b = GRU<hidden_size = 3>(x, w, r, , , a) }
    """
    model = parsed(text)
    assert list(model.graph.node[0].input) == ["x", "w", "r", "", "", "a"]
    assert found(model).state == {"b"}
    del model.graph.node[0].input[3:]
    assert found(model).state == set()


def test_state_that_is_all_there_is_counts():
    model = parsed("g (float[N] s_in) => (float[N] s_out) { s_out = Relu(s_in) }")
    assert found(model).state == set()


def test_files_are_told_by_their_graph_too(tmp_path: Path):
    proto = parsed("g (float[N, 3] x) => (float[N, 3] y) { y = Softmax(x) }")
    onnx.save(proto, tmp_path / "m.onnx")
    model = Model.load(proto)
    for source in (tmp_path / "m.onnx", proto, proto.SerializeToString()):
        assert kinds_of(source, model.inputs, model.outputs).scores == {"y"}
