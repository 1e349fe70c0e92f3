"""Which parts of a graph can be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.structure import blocks
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
Array = np.ndarray[Any, Any]


def built(
    text: str, weights: Mapping[str, Sequence[int] | Array], *, opset: int = 17
) -> Model:
    """Return the model of an ONNX text; weights given by shape are of ones."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> example {text}'
    )
    for name, value in weights.items():
        if not isinstance(value, np.ndarray):
            value = np.full(value, 0.25, np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.load(proto)


def spans(model: Model) -> list[list[tuple[str, str]]]:
    """Return (start, end) of the units of each run."""
    return [
        [(unit.start.name, unit.end.name) for unit in run.units]
        for run in blocks.find(model)
    ]


def test_layers_of_a_transformer_are_attention_and_what_follows() -> None:
    (run,) = blocks.find(Model.load(MODELS / "vit.onnx"))
    assert [unit.end.name for unit in run.units] == [
        f"/blocks.{number}/Add_1_output_0" for number in range(4)
    ]
    ops = [node.op for node in run.units[1].nodes]
    assert ops.count("MatMul") == 8
    assert ops.count("LayerNormalization") == 2


def test_a_block_takes_the_activation_behind_its_join() -> None:
    found = spans(Model.load(MODELS / "residual-cnn.onnx"))
    assert found == [
        [("/down1/relu/Relu_output_0", "/depthwise/relu/Relu_output_0")],
        [("/down2/relu/Relu_output_0", "/grouped/relu/Relu_output_0")],
    ]


def test_a_projected_shortcut_makes_no_block() -> None:
    model = built(
        """(float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w)
            s = MatMul(x, v)
            y = Add(a, s)
        }""",
        {"w": (4, 4), "v": (4, 4)},
    )
    assert spans(model) == []


def test_post_norm_blocks_end_behind_the_norm() -> None:
    body = "n0 = LayerNormalization(x, scale, bias)"
    for at in range(3):
        body += f"""
            h{at} = MatMul(n{at}, w{at})
            s{at} = Add(n{at}, h{at})
            n{at + 1} = LayerNormalization(s{at}, scale, bias)"""
    model = built(
        f"(float[N,4] x) => (float[N,2] y) {{ {body}\ny = MatMul(n3, out) }}",
        {"scale": (4,), "bias": (4,), "out": (4, 2)}
        | {f"w{at}": (4, 4) for at in range(3)},
    )
    assert spans(model) == [[("n0", "n1"), ("n1", "n2"), ("n2", "n3")]]


def test_layers_in_a_row_that_are_alike_are_blocks() -> None:
    model = built(
        """(float[N,4] x) => (float[N,2] y) {
            a = Gemm(x, w1, b1)
            ar = Relu(a)
            b = Gemm(ar, w2, b2)
            br = Relu(b)
            c = Gemm(br, w3, b3)
            cr = Tanh(c)
            y = MatMul(cr, out)
        }""",
        {
            **{f"w{at}": (4, 4) for at in (1, 2, 3)},
            **{f"b{at}": (4,) for at in (1, 2, 3)},
            "out": (4, 2),
        },
    )
    assert spans(model) == [[("x", "ar"), ("ar", "br")]]


def test_a_block_whose_inside_is_an_output_is_none() -> None:
    model = built(
        """(float[N,4] x) => (float[N,4] y, float[N,4] inner) {
            inner = MatMul(x, w)
            r = Relu(inner)
            h = MatMul(r, w)
            y = Add(x, h)
        }""",
        {"w": (4, 4)},
    )
    # A path from x to an output does not lead through the Add.
    assert spans(model) == []


def test_shared_weights_make_blocks_too() -> None:
    model = built(
        """(float[N,4] x) => (float[N,4] y) {
            a = MatMul(x, w)
            p = Add(x, a)
            b = MatMul(p, w)
            q = Add(p, b)
            y = Relu(q)
        }""",
        {"w": (4, 4)},
    )
    assert spans(model) == [[("x", "p"), ("p", "q")]]


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_removing_blocks_leads_around_them(gone: list[int]) -> None:
    text, left = "", "x"
    for at in range(3):
        text += f"""
            h{at} = MatMul({left}, w{at})
            r{at} = Add({left}, h{at})"""
        left = f"r{at}"
    weights = {f"w{at}": np.eye(4, dtype=np.float32) * (at + 1) for at in range(3)}
    model = built(
        f"(float[N,4] x) => (float[N,4] r2) {{ {text} }}",
        weights,
    )
    units = [unit for run in blocks.find(model) for unit in run.units]
    blocks.remove(model, [units[at] for at in gone])
    model.drop_unused()
    model.check()
    x = np.ones((2, 4), np.float32)
    output = runtime.session(model, threads=1).run({"x": x})
    wanted = np.prod([at + 2 for at in range(3) if at not in gone])
    np.testing.assert_array_equal(output["r2"], x * wanted)
    matmuls = [node for node in model.graph.nodes if node.op == "MatMul"]
    assert len(matmuls) == 3 - len(gone)


def test_a_value_of_a_branch_is_no_block() -> None:
    model = built(
        """(float[N,4] x, bool go) => (float[N,4] y) {
            a = MatMul(x, w)
            p = Add(x, a)
            y = If(go) <
                then_branch = yes () => (float[N,4] s) { s = Relu(x) },
                else_branch = no () => (float[N,4] t) { t = Relu(p) }
            >
        }""",
        {"w": (4, 4)},
    )
    assert spans(model) == []


def test_every_example_survives_the_removal_of_all_its_blocks() -> None:
    for name, proto in example_models().items():
        model = Model.load(proto)
        units = [unit for run in blocks.find(model) for unit in run.units]
        outputs = model.outputs
        blocks.remove(model, units)
        model.drop_unused()
        model.forget_shapes()
        model.check(name)
        assert model.outputs == outputs


def long_chain(count: int) -> onnx.ModelProto:
    """Return residual blocks in a row that all read one mask from the start."""
    nodes, left = [helper.make_node("Relu", ["m"], ["mask"])], "x"
    for at in range(count):
        nodes += [
            helper.make_node("MatMul", [left, "w"], [f"h{at}"]),
            helper.make_node("Mul", [f"h{at}", "mask"], [f"g{at}"]),
            helper.make_node("Add", [left, f"g{at}"], [f"r{at}"]),
        ]
        left = f"r{at}"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4])
        for name in ("x", "m", left)
    ]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "chain", values[:2], values[2:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_mask_that_all_blocks_read_does_not_hide_them() -> None:
    (run,) = blocks.find(Model.load(long_chain(5)))
    assert len(run.units) == 5


def test_twice_the_blocks_take_about_twice_the_steps() -> None:
    counts = []
    for count in (100, 200):
        graph = blocks._Graph(Model.load(long_chain(count)))
        counts.append(sum(len(links) for links in graph._up))
    assert counts[1] < 3 * counts[0]


def test_a_size_that_is_read_off_does_not_hide_a_block() -> None:
    model = built(
        """(float[N,4] x) => (float[N,4] y, int64[2] size) {
            h = Relu(x)
            a = MatMul(h, w)
            p = Add(h, a)
            size = Shape(h)
            y = Tanh(p)
        }""",
        {"w": (4, 4)},
    )
    assert spans(model) == [[("h", "p")]]
