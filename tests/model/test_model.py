"""Model: lossless round trip, editing, and what a pass can ask of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxshrink
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.lineage import Lineage
from onnxshrink.model import MAX_IR_VERSION, Model, Variable
from onnxshrink.model.saving import encoded
from onnxshrink.model.topology import domain_key, is_onnx
from onnxshrink.tensors import ProtoTensor

WHEEL = Path(onnx.__file__).parent / "backend" / "test" / "data"
OURS = Path(__file__).parents[2] / "models"


def text(source: str) -> onnx.ModelProto:
    """Parse a model; the text form writes an empty domain into nodes, which goes."""
    proto = onnx.parser.parse_model(source)

    def clean(graph: Any) -> None:
        for node in graph.node:
            if not node.domain:
                node.ClearField("domain")
            for attr in node.attribute:
                if attr.type == onnx.AttributeProto.GRAPH:
                    clean(attr.g)

    clean(proto.graph)
    for function in proto.functions:
        clean(function)
    return proto


def canonical(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def streamed(model: Model) -> bytes:
    return b"".join(bytes(piece) for piece in encoded(model, "plain").stream())


def assert_round_trip(proto: onnx.ModelProto) -> Model:
    want = canonical(proto)
    model = Model.load(want)
    assert model.to_bytes() == want
    assert model.copy().to_bytes() == want
    assert streamed(model) == want
    return model


def run(model: Model, *inputs: np.ndarray[Any, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    names = [info.name for info in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=False))))


SMALL = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N,2] x) => (float[N,2] y)
<float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 1}>
{
    h = MatMul (x, w)
    y = Add (h, b)
}
"""

CONTROL = """
<ir_version: 8, opset_import: ["": 17]>
control (bool c, float[2] x) => (float[2] y)
<float[2] outer = {1, 2}>
{
    y = If (c) <
        then_branch = then_graph () => (float[2] a)
            <float[2] inner = {3, 4}> {
            t = Add (x, outer)
            a = Mul (t, inner)
        },
        else_branch = else_graph () => (float[2] e) {
            k = Constant <value = float[2] {5, 6}> ()
            e = Add (x, k)
        }
    >
}
"""

CALLED = """
<ir_version: 8, opset_import: ["": 17, "local": 1]>
called (float[2] x) => (float[2] y)
<float[2] w = {1, 2}>
{
    v = Identity (w)
    y = local.scale (x, v)
}
<domain: "local", opset_import: ["": 17]>
scale (a, f) => (r)
{
    g = Identity (f)
    r = Mul (a, g)
}
"""


# --- round trip -------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [*sorted(WHEEL.rglob("*.onnx")), *sorted(OURS.glob("*.onnx"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_model_of_the_onnx_wheel_and_ours_comes_back_byte_for_byte(
    path: Path, tmp_path: Path
) -> None:
    proto = onnx.ModelProto()
    proto.ParseFromString(path.read_bytes())
    want = canonical(proto)
    model = Model.load(path)
    saved = tmp_path / "out.onnx"
    model.save(saved, storage="plain")
    assert saved.read_bytes() == want
    if path.parent.parent == WHEEL or path.stat().st_size < 1 << 20:
        assert model.to_bytes() == want
        assert model.copy().to_bytes() == want


@pytest.mark.slow
def test_every_node_test_model_of_onnx_comes_back_byte_for_byte() -> None:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    assert len(cases) > 1500
    for case in cases:
        try:
            assert_round_trip(case.model)
        except AssertionError as error:
            raise AssertionError(case.name) from error


def _special() -> Iterator[tuple[str, onnx.ModelProto]]:
    proto = text(SMALL)
    proto.doc_string = proto.graph.doc_string = "model\nand graph"
    proto.producer_name, proto.producer_version = "p", "1"
    proto.domain, proto.model_version = "d", 3
    proto.ir_version = 10
    for holder in (
        proto,
        proto.graph,
        proto.graph.node[0],
        proto.graph.initializer[0],
        proto.graph.input[0],
        proto.graph.output[0],
    ):
        holder.metadata_props.add(key="k", value="v")
    proto.graph.node[1].doc_string = "node"
    proto.graph.initializer[1].doc_string = "tensor"
    proto.graph.input[0].doc_string = "input"
    yield "notes on every level", proto

    proto = text(SMALL)
    proto.metadata_props.add(key="k", value="1")
    proto.metadata_props.add(key="k2", value="2")
    yield "model metadata", proto

    proto = text(SMALL)
    note = proto.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="b")
    yield "quantization_annotation", proto

    for ir_version in (3, 8):
        proto = text(SMALL)
        proto.ir_version = ir_version
        for name, shape in (("w", (2, 2)), ("b", (2,))):
            info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            proto.graph.input.append(info)
        yield f"initializers that are inputs, IR {ir_version}", proto

    proto = text(SMALL)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.zeros(3, np.float32), "nobody")
    )
    for name, shape in (("w", (2, 2)), ("h", ("N", 2)), ("nowhere", (1,))):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        proto.graph.value_info.append(info)
    yield "unused initializer, value_info of weights and of nothing", proto

    proto = text(SMALL)
    for info in (proto.graph.input[0], proto.graph.initializer[0]):
        copy = helper.make_tensor_value_info(info.name, TensorProto.FLOAT, None)
        proto.graph.output.append(copy)
    yield "outputs that are an input and an initializer", proto

    proto = text(CONTROL)
    yield "captured constants", proto

    proto = text(CALLED)
    yield "functions", proto

    proto = text(SMALL)
    sparse = onnx.SparseTensorProto(dims=[2, 2])
    sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1, 2]), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.int64([0, 3])))
    del proto.graph.initializer[0]
    proto.graph.sparse_initializer.append(sparse)
    yield "sparse initializer", proto

    proto = text(SMALL)
    for node in proto.graph.node:
        node.name = "same"
    yield "duplicate node names", proto

    proto = text(SMALL)
    proto.graph.ClearField("name")
    proto.graph.name = "g"
    del proto.graph.initializer[1].dims[:]
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32(1), "b"))
    empty = numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty")
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"\xff\xfe"])
    large = numpy_helper.from_array(np.arange(1 << 15, dtype=np.float32), "large")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    proto.graph.initializer.extend([empty, words, large, typed])
    yield "scalar, empty, string, large and typed-field tensors", proto

    proto = text(SMALL)
    clip = helper.make_node("Clip", ["y", "", ""], ["z"])
    custom = helper.make_node("Thing", ["z"], ["t", ""], domain="vendor")
    custom.attribute.extend(
        [
            helper.make_attribute("bytes", b"\xff\x00"),
            onnx.AttributeProto(name="no_ints", type=onnx.AttributeProto.INTS),
            onnx.AttributeProto(name="no_floats", type=onnx.AttributeProto.FLOATS),
            onnx.AttributeProto(name="no_strings", type=onnx.AttributeProto.STRINGS),
            onnx.AttributeProto(name="no_graphs", type=onnx.AttributeProto.GRAPHS),
            helper.make_attribute("strings", [b"a", b"\xff"]),
            helper.make_attribute(
                "type", helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
            ),
            helper.make_attribute("tensors", [helper.make_tensor("", 1, [1], [1.0])]),
            helper.make_attribute("graphs", [proto.graph, proto.graph]),
        ]
    )
    proto.graph.node.extend([clip, custom])
    proto.opset_import.add(domain="vendor", version=1)
    yield "trailing empty inputs and every kind of attribute", proto

    proto = text(CALLED)
    proto.ir_version = 10
    proto.functions[0].overload = "one"
    proto.graph.node[1].overload = "one"
    second = proto.functions.add()
    second.CopyFrom(proto.functions[0])
    second.overload = "two"
    second.doc_string = "the other"
    second.attribute.append("alpha")
    relu = second.node.add(op_type="LeakyRelu", input=["r"], output=["q"])
    relu.attribute.add(
        name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT
    )
    second.output[0] = "q"
    yield "function overloads and attribute references", proto

    proto = text(SMALL)
    training = proto.training_info.add()
    training.initialization.name = "init"
    training.initialization.node.append(
        helper.make_node(
            "Constant", [], ["start"], value=helper.make_tensor("", 1, [1], [0.0])
        )
    )
    training.initialization.output.append(
        helper.make_tensor_value_info("start", TensorProto.FLOAT, [1])
    )
    training.initialization_binding.add(key="b", value="start")
    yield "training_info", proto

    proto = text(SMALL)
    proto.ir_version = 1
    proto.ClearField("opset_import")
    yield "no opset, as in the first IR version", proto

    proto = text(SMALL)
    proto.ir_version = 11
    proto.configuration.add(name="devices", num_devices=2)
    yield "device configuration", proto


SPECIAL = dict(_special())


@pytest.mark.parametrize("name", SPECIAL)
def test_special_constructs_come_back_byte_for_byte(name: str) -> None:
    model = Model.load(canonical(SPECIAL[name]), check=False)
    want = canonical(SPECIAL[name])
    assert model.to_bytes() == want
    assert model.copy().to_bytes() == want
    assert model.copy().copy().to_bytes() == want
    assert streamed(model) == want


def test_fields_that_this_onnx_does_not_know_are_kept() -> None:
    strange = b"\xfa\x07\x03new\xf8\x07\x05"
    proto = text(SMALL)
    for holder in (
        proto,
        proto.graph,
        proto.graph.node[0],
        proto.graph.initializer[0],
        proto.graph.input[0],
    ):
        holder.MergeFromString(strange)
    model = assert_round_trip(proto)
    assert model.to_bytes().count(b"\x03new") == 5


def test_unsorted_nodes_load_and_are_written_in_a_runnable_order() -> None:
    proto = text(SMALL)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = Model.load(canonical(proto))
    assert [node.op_type for node in model.to_proto().graph.node] == ["MatMul", "Add"]


def test_an_edit_leaves_every_other_node_byte_identical() -> None:
    model = Model.load(OURS / "lenet-5.onnx")
    before = {tuple(n.output): n for n in model.to_proto().graph.node}
    node = next(node for node in model.graph.nodes if node.op == "Conv")
    made = model.add_node("Identity", [node.outputs[0]], after=node)
    model.replace_uses(node.outputs[0], made.outputs[0])
    after = model.to_proto().graph.node
    changed = [n for n in after if before.get(tuple(n.output)) != n]
    assert len(after) == len(before) + 1
    assert len(changed) == 2  # the new node and the one that reads it


# --- what is there ----------------------------------------------------------------


def test_sources_may_be_paths_bytes_protos_and_exporters_results(
    tmp_path: Path,
) -> None:
    proto = text(SMALL)
    path = tmp_path / "m.onnx"
    path.write_bytes(canonical(proto))

    class Attribute:
        model_proto = proto

    class Method:
        def model_proto(self) -> onnx.ModelProto:
            return proto

    sources = [path, str(path), canonical(proto), bytearray(canonical(proto)), proto]
    for source in [*sources, Attribute(), Method()]:
        assert Model.load(source).to_bytes() == canonical(proto)  # type: ignore[arg-type]
    for wrong in (3, None, object()):
        with pytest.raises(ModelError, match="expected a path, bytes, a ModelProto"):
            Model.load(wrong)  # type: ignore[arg-type]


def test_onnx_text_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "m.onnxtxt"
    path.write_text(SMALL)
    model = Model.load(path)
    again = tmp_path / "again.onnxtxt"
    model.save(again)
    x = np.float32([[1, 2]])
    np.testing.assert_array_equal(run(Model.load(again), x)[0], run(model, x)[0])
    np.testing.assert_array_equal(run(model, x)[0], [[8, 11]])


def test_weights_are_found_in_subgraphs_and_functions_and_constant_nodes() -> None:
    model = Model.load(canonical(text(CONTROL)))
    assert [w.name for w in model.weights()] == ["outer", "inner", "k"]
    assert [type(w.node).__name__ for w in model.weights()] == [
        "NoneType",
        "NoneType",
        "Node",
    ]
    for weight in model.weights():
        assert [(node.op, index) for node, index in weight.uses] == [
            ("Mul" if weight.name == "inner" else "Add", 1)
        ]


def test_uses_look_through_identity_and_calls() -> None:
    model = Model.load(canonical(text(CALLED)))
    (weight,) = model.weights()
    assert [(node.op, index) for node, index in weight.uses] == [("Mul", 1)]
    mul = model.graph.functions[0].nodes[1]
    known = model.constant(mul.inputs[1])
    assert known is not None
    assert known.name == "w"


def test_a_formal_input_is_unknown_where_the_function_is_called_twice() -> None:
    model = Model.load(canonical(text(CALLED)))
    call = model.graph.nodes[1]
    mul = model.graph.functions[0].nodes[1]
    assert model.constant(mul.inputs[1]) is not None
    other = model.add_node("scale", [call.outputs[0], call.inputs[0]], domain="local")
    assert model.constant(mul.inputs[1]) is None
    model.remove(other)
    assert model.constant(mul.inputs[1]) is not None


def test_an_unknown_weight_is_named_with_the_nearest() -> None:
    model = Model.load(canonical(text(CONTROL)))
    assert model.weight("inner").size == 2
    with pytest.raises(UsageError, match="Did you mean 'outer'"):
        model.weight("outr")


def test_constant_knows_inputs_with_defaults() -> None:
    model = Model.load(canonical(SPECIAL["initializers that are inputs, IR 8"]))
    weight = model.constant(model.graph.nodes[0].inputs[1])
    assert weight is not None
    assert weight.is_input
    assert [info.name for info in model.inputs] == ["x"]
    assert model.inputs[0].shape == ("N", 2)
    assert model.freeze_inputs() == ["w", "b"]
    assert not model.weight("w").is_input
    assert [info.name for info in model.to_proto().graph.input] == ["x"]


def test_the_name_of_a_weight_that_occurs_twice_is_a_path() -> None:
    model = Model.load(canonical(text(CONTROL.replace("inner", "outer"))), check=False)
    names = [weight.name for weight in model.weights()]
    assert names[0] == "outer"
    assert names[1].endswith("/outer")
    np.testing.assert_array_equal(model.weight(names[1]).read(), [3, 4])


def test_infer_shapes_sees_through_large_weights() -> None:
    proto = text(SMALL)
    large = numpy_helper.from_array(np.zeros((2, 500), np.float32), "w")
    proto.graph.initializer[0].CopyFrom(large)
    proto.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(np.zeros(500, np.float32), "b")
    )
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 500
    model = Model.load(canonical(proto))
    shapes = model.infer_shapes()
    assert shapes["h"].shape == ("N", 500)
    assert shapes["w"].shape == (2, 500)


# --- editing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.float32([[1, 0], [0, 1]]),
        np.float16([[1, 0], [0, 1]]),
        np.float32(3),
        np.zeros((0, 2), np.float32),
        np.asfortranarray(np.float32([[1, 2], [3, 4]])),
        np.array([[1, 2]], dtype=">f4"),
        np.array([1, -2, 3], dtype=ml_dtypes.int4),
        np.array([1, 2], dtype=ml_dtypes.bfloat16),
        np.array([1, 2], dtype=ml_dtypes.float8_e4m3fnuz),
        np.array(["a", "bc"], dtype=object),
        np.array([True, False]),
    ],
    ids=str,
)
def test_a_weight_takes_any_array_exactly(array: np.ndarray[Any, Any]) -> None:
    model = Model.load(canonical(text(SMALL)))
    model.set_weight("w", array)
    back = Model.load(model.to_proto(), check=False).weight("w").read()
    assert back.shape == array.shape
    np.testing.assert_array_equal(back.astype(object), array.astype(object))


def test_setting_the_same_values_keeps_the_bytes() -> None:
    model = Model.load(canonical(SPECIAL["notes on every level"]))
    want = model.to_bytes()
    model.set_weight("w", model.weight("w").read().copy())
    assert model.to_bytes() == want


def test_weights_in_subgraphs_functions_and_scalar_constants_can_be_set() -> None:
    model = Model.load(canonical(text(CONTROL)))
    model.set_weight("inner", np.float32([0, 1]))
    model.set_weight("k", np.float32([7, 7]))
    x = np.float32([1, 1])
    np.testing.assert_array_equal(run(model, np.array(True), x)[0], [0, 3])
    np.testing.assert_array_equal(run(model, np.array(False), x)[0], [8, 8])
    copied = model.copy()
    copied.set_weight("inner", np.float32([9, 9]))
    np.testing.assert_array_equal(model.weight("inner").read(), [0, 1])


@pytest.mark.parametrize(
    ("name", "value"), [("value_float", 2.0), ("value_floats", [2.0, 3.0])]
)
def test_constant_nodes_of_every_form_are_weights(name: str, value: Any) -> None:
    proto = text(SMALL)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], **{name: value}))
    proto.graph.node[2].input[1] = "c"
    model = Model.load(canonical(proto))
    np.testing.assert_array_equal(model.weight("c").read(), np.float32(value))
    assert model.to_bytes() == canonical(proto)
    model.set_weight("c", model.weight("c").read() * 2)
    (again,) = (w for w in Model.load(model.to_bytes()).weights() if w.name == "c")
    np.testing.assert_array_equal(again.read(), np.float32(value) * 2)


def test_new_names_never_clash() -> None:
    model = Model.load(canonical(text(SMALL)))
    assert model.fresh("w") == "w_1"
    assert model.fresh("w") == "w_2"
    assert model.fresh("new") == "new"
    constant = model.add_weight("w", np.float32([1, 1]))
    assert constant.name == "w_3"
    first = model.add_node("Add", [model.graph.inputs[0], constant])
    second = model.add_node("Add", [first.outputs[0], constant])
    assert first.outputs[0].name != second.outputs[0].name
    model.graph.nodes.append(gs.Node("Relu", "mine", outputs=[gs.Variable("mine_out")]))
    assert model.fresh("mine_out") == "mine_out_1"


def test_replace_uses_reaches_subgraphs() -> None:
    model = Model.load(canonical(text(CONTROL)))
    new = model.add_weight("new", np.float32([10, 10]))
    model.replace_uses(model.graph.inputs[1], new)
    assert model.drop_unused() == 0
    outputs = [
        run(model, np.array(value), np.float32([0, 0]))[0] for value in (True, False)
    ]
    np.testing.assert_array_equal(outputs, [[33, 48], [15, 16]])


def test_replace_uses_keeps_the_names_of_outputs() -> None:
    x = np.float32([[1, 2]])
    model = Model.load(canonical(text(SMALL)))
    old = model.graph.outputs[0]
    made = model.add_node("Neg", [old])
    model.replace_uses(old, made.outputs[0])
    assert [info.name for info in model.to_proto().graph.output] == ["y"]
    np.testing.assert_array_equal(run(model, x)[0], [[-8, -11]])
    model.replace_uses(model.graph.outputs[0], model.graph.nodes[0].outputs[0])
    assert [info.name for info in model.to_proto().graph.output] == ["y"]
    np.testing.assert_array_equal(run(model, x)[0], [[7, 10]])
    constant = model.add_weight("k", np.float32([[5, 5]]))
    model.replace_uses(model.graph.outputs[0], constant)
    assert [info.name for info in model.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, x)[0], [[5, 5]])


def test_an_output_that_is_an_input_stays() -> None:
    proto = text(SMALL)
    proto.graph.output.add().CopyFrom(proto.graph.input[0])
    model = Model.load(canonical(proto))
    made = model.add_node("Neg", [model.graph.inputs[0]])
    model.replace_uses(model.graph.inputs[0], made.outputs[0])
    y, x = run(model, np.float32([[1, 2]]))
    np.testing.assert_array_equal(x, [[1, 2]])
    np.testing.assert_array_equal(y, [[-6, -9]])


def test_the_output_of_a_subgraph_is_replaced() -> None:
    model = Model.load(canonical(text(CONTROL)))
    branch = next(graph for graph in model.graphs() if graph.name == "else_graph")
    made = model.add_node("Neg", [branch.outputs[0]], graph=branch)
    model.replace_uses(branch.outputs[0], made.outputs[0])
    result = run(model, np.array(False), np.float32([1, 1]))[0]
    np.testing.assert_array_equal(result, [-6, -7])


def test_a_removed_node_leaves_no_edges() -> None:
    model = Model.load(canonical(text(CONTROL)))
    x = model.graph.inputs[1]
    (node,) = model.graph.nodes
    assert len(x.outputs) == 2
    model.remove(node)
    assert not x.outputs
    assert not model.graph.nodes
    with pytest.raises(ModelError, match="is in no graph"):
        model.remove(node)


def test_drop_unused_takes_what_no_output_needs() -> None:
    model = Model.load(canonical(text(CALLED)))
    call = model.graph.nodes[1]
    model.replace_uses(call.outputs[0], model.graph.inputs[0])
    # y is carried by an Identity now; the call, its Identity, w and the function go.
    assert model.drop_unused() == 4
    assert [node.op for node in model.graph.nodes] == ["Identity"]
    assert not model.to_proto().functions
    assert not model.to_proto().graph.initializer


def test_a_new_weight_that_nothing_reads_is_not_written() -> None:
    model = Model.load(canonical(text(SMALL)))
    model.add_weight("idle", np.zeros(4, np.float32))
    assert len(model.to_proto().graph.initializer) == 2
    assert len(model.copy().to_proto().graph.initializer) == 2


def test_an_initializer_no_pass_reads_any_more_is_not_written() -> None:
    model = Model.load(canonical(text(SMALL)))
    add = model.graph.nodes[1]
    model.replace_uses(add.outputs[0], model.graph.nodes[0].outputs[0])
    model.remove(add)
    assert [t.name for t in model.to_proto().graph.initializer] == ["w"]


def test_weights_of_functions_are_written_as_constant_nodes() -> None:
    model = Model.load(canonical(text(CALLED)))
    function = model.graph.functions[0]
    weight = model.add_weight("two", np.float32([2, 2]), graph=function)
    relu = model.add_node("Add", [function.outputs[0], weight], graph=function)
    function.outputs = [relu.outputs[0]]
    expected = [[3, 4]]
    for candidate in (model, model.copy(), Model.load(model.to_bytes())):
        np.testing.assert_array_equal(run(candidate, np.float32([1, 1])), expected)
        assert "two" in {w.name for w in candidate.weights()}


def test_plain_graphsurgeon_edits_are_written() -> None:
    model = Model.load(canonical(text(SMALL)))
    graph = model.graph
    stray = gs.Constant("w", np.float32([10, 10]))  # the name is taken
    y = graph.outputs[0]
    middle = gs.Variable("middle", np.float32, ["N", 2])
    graph.nodes[1].outputs = [middle]
    graph.nodes.append(gs.Node("Mul", "times", inputs=[middle, stray], outputs=[y]))
    graph.initializers["b"].values *= 3
    graph.nodes[0].name = "first"
    graph.cleanup().toposort()
    model.check()
    np.testing.assert_array_equal(run(model, np.float32([[1, 2]]))[0], [[100, 130]])
    assert len({w.name for w in model.weights()}) == 3
    np.testing.assert_array_equal(
        run(model.copy(), np.float32([[1, 2]]))[0], [[100, 130]]
    )


def test_touched_but_unchanged_values_keep_the_bytes() -> None:
    for name in (
        "notes on every level",
        "scalar, empty, string, large and typed-field tensors",
    ):
        model = Model.load(canonical(SPECIAL[name]), check=False)
        for constant in model.graph.initializers.values():
            assert constant.values is not None
        assert model.to_bytes() == canonical(SPECIAL[name])


def test_a_large_stray_constant_passes_the_checker() -> None:
    model = Model.load(canonical(text(SMALL)))
    stray = gs.Constant("big", np.zeros((5000, 1, 2), np.float32))
    add = model.graph.nodes[1]
    add.inputs[1] = stray
    model.graph.outputs[0].shape = [None, None, 2]
    model.check()


def test_plain_graphsurgeon_subgraphs_are_taken_in() -> None:
    model = Model.load(canonical(text(SMALL)))
    y = model.graph.outputs[0]

    def branch(factor: float) -> gs.Graph:
        out = gs.Variable("", np.float32)
        out.name = f"branch_{factor:g}"
        node = gs.Node(
            "Mul", inputs=[y, gs.Constant("", np.float32([factor]))], outputs=[out]
        )
        return gs.Graph(nodes=[node], outputs=[out], name="branch")

    flag = model.add_weight("flag", np.array(True))
    made = model.add_node("If", [flag])
    made.attrs.update(then_branch=branch(2), else_branch=branch(3))
    model.replace_uses(y, made.outputs[0])
    # The branches capture the old y, which the new output must not replace in them.
    for graph in model.graphs():
        for node in graph.nodes:
            if node.op == "Mul":
                node.inputs[0] = model.graph.nodes[1].outputs[0]
    assert sorted(w.size for w in model.weights()) == [1, 1, 1, 2, 4]
    np.testing.assert_array_equal(run(model, np.float32([[1, 2]]))[0], [[16, 22]])


def test_attribute_edits_are_seen_however_small() -> None:
    node = helper.make_node("LeakyRelu", ["y"], ["z"], alpha=0.0)
    proto = text(SMALL)
    proto.graph.node.append(node)
    proto.graph.output[0].name = "z"
    model = Model.load(canonical(proto))
    relu = model.graph.nodes[2]
    for value in (-0.0, 1, 0.5):
        relu.attrs["alpha"] = value
        (written,) = model.to_proto().graph.node[2].attribute
        assert written.type == onnx.AttributeProto.FLOAT
        assert repr(written.f) == repr(float(value))
    relu.attrs["alpha"] = 0.0
    assert model.to_bytes() == canonical(proto)


def test_metadata_can_be_edited() -> None:
    model = Model.load(canonical(SPECIAL["model metadata"]))
    model.metadata["new"] = "3"
    del model.metadata["k"]
    props = [(p.key, p.value) for p in model.to_proto().metadata_props]
    assert props == [("k2", "2"), ("new", "3")]


def test_a_copy_is_independent() -> None:
    for source in (CONTROL, CALLED, SMALL):
        model = Model.load(canonical(text(source)))
        want = model.to_bytes()
        twin = model.copy()
        for node in list(twin.nodes()):
            node.name = twin.fresh("renamed")
            node.attrs["alpha"] = 1.0
        for weight in list(twin.weights()):
            twin.set_weight(weight, np.zeros(3, np.float32))
        twin.metadata["k"] = "v"
        twin.ir_version = 9
        assert model.to_bytes() == want


def test_a_model_becomes_another_and_both_go_on_alone() -> None:
    for source in (CONTROL, CALLED, SMALL):
        model = Model.load(canonical(text(source)))
        worked = model.copy()
        for node in list(worked.nodes()):
            node.name = worked.fresh("renamed")
        worked.metadata["k"] = "v"
        worked.lineage = Lineage()
        want = worked.to_bytes()
        model.source = Path("here.onnx")
        model.become(worked)
        assert model.to_bytes() == want
        assert model.source == Path("here.onnx")
        assert model.lineage is not worked.lineage
        # The next name is the one that the other would have chosen.
        assert model.fresh("renamed") == worked.fresh("renamed")
        for node in list(model.nodes()):
            node.name = model.fresh("other")
        model.metadata["k"] = "w"
        assert worked.to_bytes() == want


def test_lists_of_nodes_find_and_remove_after_any_edits() -> None:
    rng = np.random.default_rng(0)
    model = Model.load(canonical(text(SMALL)))
    nodes = model.graph.nodes
    mirror = list(nodes)
    for step in range(1500):
        choice = rng.integers(4)
        at = int(rng.integers(len(mirror) + 1))
        if choice == 0 or len(mirror) < 3:
            node = gs.Node("Relu", str(step))
            nodes.insert(at, node)
            mirror.insert(at, node)
        elif choice == 1:
            node = gs.Node("Relu", str(step))
            nodes.append(node)
            mirror.append(node)
        elif choice == 2:
            node = mirror.pop(at - 1)
            nodes.remove(node)
            assert node not in nodes
        else:
            node = mirror[at - 1]
            assert nodes.index(node) == next(
                i for i, other in enumerate(mirror) if other is node
            )
    assert all(a is b for a, b in zip(nodes, mirror, strict=True))


# --- opset and IR version ---------------------------------------------------------


OLD = """
<ir_version: 3, opset_import: ["": 7]>
old (float[2,400] x, float[400,300] w, int64[2] s) => (float[600] y)
{
    h = MatMul (x, w)
    r = Relu (h)
    d = Dropout <ratio = 0.5> (r)
    y = Squeeze <axes = [0]> (d)
}
"""


def _old() -> onnx.ModelProto:
    proto = onnx.parser.parse_model(OLD.replace("float[600]", "float[A,B,C]"))
    proto.graph.node[3].op_type = "Unsqueeze"
    weight = np.random.default_rng(0).normal(size=(400, 300)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.int64([2, 3]), "s"))
    proto.graph.node[1].doc_string = "kept"
    proto.graph.metadata_props.add(key="k", value="v")
    proto.metadata_props.add(key="m", value="v")
    return proto


def test_an_old_opset_is_raised_with_large_weights_and_the_same_outputs() -> None:
    model = Model.load(canonical(_old()))
    x = np.random.default_rng(1).normal(size=(2, 400)).astype(np.float32)
    before = run(model, x)
    model.require_opset(7)
    assert model.opset == 7
    model.require_opset(17)
    assert (model.opset, model.opsets[""]) == (17, 17)
    assert model.ir_version >= 4
    assert [info.name for info in model.inputs] == ["x"]
    proto = model.to_proto()
    assert [info.name for info in proto.graph.input] == ["x"]
    assert {p.key for p in (*proto.metadata_props, *proto.graph.metadata_props)} == {
        "m",
        "k",
    }
    assert [n.doc_string for n in proto.graph.node if n.op_type == "Relu"] == ["kept"]
    model.check()
    np.testing.assert_array_equal(run(model, x), before)
    np.testing.assert_array_equal(run(model.copy(), x), before)


@pytest.mark.parametrize(
    ("source", "version", "words"),
    [
        (SMALL, 99, "newer than onnxruntime's"),
        (CALLED, 18, "model-local functions"),
    ],
)
def test_an_opset_that_cannot_be_raised_is_refused(
    source: str, version: int, words: str
) -> None:
    model = Model.load(canonical(text(source)))
    want = model.to_bytes()
    with pytest.raises(ModelError) as caught:
        model.require_opset(version)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.to_bytes() == want


def test_newer_ir_versions_pass_through_and_fit_the_runtime_on_request() -> None:
    for ir_version in (MAX_IR_VERSION + 1, MAX_IR_VERSION + 2):
        proto = text(SMALL)
        proto.ir_version = ir_version
        model = assert_round_trip(proto)
        model.fit_runtime()
        assert model.ir_version == MAX_IR_VERSION
        np.testing.assert_array_equal(run(model, np.float32([[1, 2]]))[0], [[8, 11]])


def test_a_newer_opset_passes_through_and_is_refused_for_the_runtime() -> None:
    proto = text(SMALL)
    proto.ir_version = 13
    proto.opset_import[0].version = 27
    model = assert_round_trip(proto)
    with pytest.raises(ModelError, match=r"opset 27.*at most 26"):
        model.fit_runtime()


def test_a_type_that_the_runtime_has_no_ir_version_for_is_refused() -> None:
    proto = text(SMALL)
    proto.ir_version = MAX_IR_VERSION + 1
    new = helper.make_tensor("f6", TensorProto.FLOAT6E2M3, [4], b"\0\0\0", raw=True)
    proto.graph.initializer.append(new)
    model = Model.load(canonical(proto))
    with pytest.raises(ModelError, match="FLOAT6E2M3"):
        model.fit_runtime()


def test_an_initializer_in_an_old_ir_version_gets_a_newer_one() -> None:
    model = Model.load(canonical(SPECIAL["initializers that are inputs, IR 3"]))
    constant = model.add_weight("k", np.float32([2, 2]))
    made = model.add_node("Mul", [model.graph.outputs[0], constant])
    model.replace_uses(model.graph.outputs[0], made.outputs[0])
    assert model.ir_version == 4
    assert [info.name for info in model.to_proto().graph.input] == ["x"]
    np.testing.assert_array_equal(run(model, np.float32([[1, 2]]))[0], [[16, 22]])


# --- what is refused --------------------------------------------------------------


def _broken(change: Any) -> bytes:
    proto = text(SMALL)
    change(proto)
    return canonical(proto)


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def _function_cycle(proto: onnx.ModelProto) -> None:
    proto.CopyFrom(text(CALLED))
    proto.functions[0].node.add(
        op_type="scale", domain="local", input=["a", "f"], output=["z"]
    )


def _deep(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "missing"


def _dtype(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


def _dims(*dims: int) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def _twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])


def _produced_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].output[0] = "y"


def _not_text(proto: onnx.ModelProto) -> None:
    data = proto.SerializeToString().replace(b"\x01h", b"\x01\xff")
    proto.ParseFromString(data)


def _two_fields(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = bytes(16)


def _operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "NoSuchOperator"


def _sparse(proto: onnx.ModelProto) -> None:
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.name = "w2"
    sparse.values.data_type = TensorProto.FLOAT
    sparse.values.dims.append(1)
    sparse.values.data_location = TensorProto.EXTERNAL
    sparse.values.external_data.add(key="location", value="/etc/passwd")
    sparse.indices.CopyFrom(numpy_helper.from_array(np.int64([0])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cycle, "cycle through"),
        (_function_cycle, "function 'scale' calls itself"),
        (_deep, "reads 'missing', which nothing produces"),
        (_dtype, "element type 99"),
        (_dims(1 << 40), "its shape"),
        (_dims(1 << 62, 1 << 62, 16), "impossible shape"),
        (_dims(0, 1 << 62), "impossible shape"),
        (_dims(2, 3), "asks for 6"),
        (_dims(-2, -2), "negative dimension"),
        (_twice, "two initializers are named 'w'"),
        (_produced_twice, "a second time"),
        (_two_fields, "two fields"),
        (_not_text, "is not UTF-8"),
        (_operator, "not a valid ONNX model"),
        (_sparse, "external"),
        (lambda proto: proto.ClearField("graph"), "no graph"),
        (lambda proto: proto.ClearField("ir_version"), "Missing model IR version"),
        (lambda proto: proto.ClearField("opset_import"), "not a valid ONNX model"),
    ],
)
def test_a_broken_model_is_refused_in_one_line(change: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        Model.load(_broken(change))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_chain_of_identity_nodes_ends() -> None:
    model = Model.load(canonical(text(SMALL)))
    tensor = model.graph.nodes[1].inputs[1]
    for _ in range(900):
        tensor = model.add_node("Identity", [tensor]).outputs[0]
    known = model.constant(tensor)
    assert known is not None
    assert known.name == "b"
    for _ in range(200):
        tensor = model.add_node("Identity", [tensor]).outputs[0]
    assert model.constant(tensor) is None


def test_a_pass_that_makes_a_cycle_is_told() -> None:
    model = Model.load(canonical(text(SMALL)))
    model.graph.nodes[0].inputs[0] = model.graph.outputs[0]
    with pytest.raises(ModelError, match="cycle through MatMul, Add"):
        model.to_bytes()
    assert model.constant(model.graph.outputs[0]) is None


@pytest.mark.slow
def test_twenty_thousand_nodes_are_edited_in_bearable_time() -> None:
    count = 20_000
    nodes = [
        helper.make_node("Add", [f"x{i}", f"w{i % 10_000}"], [f"x{i + 1}"])
        for i in range(count)
    ]
    weights = [
        numpy_helper.from_array(np.float32([i]), f"w{i}") for i in range(count // 2)
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
        for name in ("x0", f"x{count}")
    ]
    graph = helper.make_graph(nodes, "long", infos[:1], infos[1:], weights)
    proto = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )
    model = Model.load(canonical(proto))
    twin = model.copy()
    assert twin.to_bytes() == canonical(proto)
    # Quadratic work would take a quarter of an hour here.
    for node in list(twin.graph.nodes):
        assert twin.constant(node.inputs[1]) is not None
        assert twin.constant(node.inputs[1]).graph is twin.graph  # type: ignore[union-attr]
        new = twin.add_node("Relu", [node.outputs[0]], after=node).outputs[0]
        twin.replace_uses(node.outputs[0], new)
    assert twin.drop_unused() == 0
    order = np.random.default_rng(0).permutation(count)
    relus = [node for node in twin.graph.nodes if node.op == "Relu"]
    for index in order:
        node = relus[index]
        twin.replace_uses(node.outputs[0], node.inputs[0])
        twin.remove(node)
    assert len(twin.graph.nodes) == count
    assert sum(len(weight.uses) for weight in twin.weights()) == count


def test_variables_and_constants_turn_into_one_another() -> None:
    model = Model.load(canonical(text(SMALL)))
    node = model.graph.nodes[0]
    h = node.outputs[0]
    node.outputs.clear()
    h.to_constant(np.float32([[1, 2]]))
    assert model.constant(h) is not None
    model.graph.nodes.remove(node)
    node.inputs.clear()
    np.testing.assert_array_equal(run(model, np.float32([[0, 0]]))[0], [[2, 3]])
    h.to_variable(np.float32, ["N", 2])
    assert isinstance(h, Variable)
    assert model.constant(h) is None


def test_a_weight_is_read_only_when_asked() -> None:
    model = Model.load(canonical(text(SMALL)))
    assert isinstance(model.weight("w").tensor, ProtoTensor)
    assert "array" not in repr(model.weight("w"))
    assert model.weight("w").nbytes == 16
    assert [list(chunk) for chunk in model.weight("w").chunks(8)] == [[1, 2, 3, 4]]


@pytest.mark.parametrize("name", [None, "", "ai.onnx"])
def test_a_domain_is_onnx_s_own_under_each_of_its_names(name: str | None) -> None:
    assert is_onnx(name)
    assert domain_key(name) == ""


@pytest.mark.parametrize("name", ["ai.onnx.ml", "com.microsoft"])
def test_other_domains_keep_their_names(name: str) -> None:
    assert not is_onnx(name)
    assert domain_key(name) == name


def test_one_function_knows_the_names_of_onnx_s_domain() -> None:
    package = Path(onnxshrink.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "passes").glob("*.py")]
    pattern = r'[,(=] ?"ai\.onnx"|if (not )?\w+\.domain\b(?!\.)( and| or|:)'
    guilty = {p.name for p in sources if re.search(pattern, p.read_text("utf-8"))}
    assert guilty <= {"topology.py", "exporter.py"}


def test_functions_of_one_name_leave_shapes_unknown() -> None:
    proto = onnx.ModelProto(ir_version=8)
    proto.graph.name = "g"
    proto.opset_import.add(domain="", version=17)
    for _ in range(2):
        proto.functions.add(name="call", domain="local")
    assert Model.load(proto, check=False).infer_shapes() == {}


def _no_output_type(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].ClearField("type")


def _no_output_shape(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.ClearField("shape")


def _no_input_shape(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.ClearField("shape")


def _no_graph_name(proto: onnx.ModelProto) -> None:
    proto.graph.ClearField("name")


def _two_notes_of_one_key(proto: onnx.ModelProto) -> None:
    for value in "ab":
        proto.metadata_props.add(key="k", value=value)


def _other_name_of_the_domain(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "ai.onnx"


def _domain_twice(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="ai.onnx", version=17)


def _output_twice(proto: onnx.ModelProto) -> None:
    proto.graph.output.add().CopyFrom(proto.graph.output[0])


def _contrib_in_the_default_domain(proto: onnx.ModelProto) -> None:
    node = proto.graph.node[-1]
    node.op_type = "SimplifiedLayerNormalization"
    node.attribute.add(name="axis", type=onnx.AttributeProto.INT, i=-1)


def _contrib_without_its_domain(proto: onnx.ModelProto) -> None:
    node = proto.graph.node[-1]
    node.op_type, node.domain = "BiasGelu", "com.microsoft"


def _open_dims(first: int | str, second: int | str) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        for info, size in (
            (proto.graph.input[0], first),
            (proto.graph.output[0], second),
        ):
            dim = info.type.tensor_type.shape.dim[0]
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size

    return change


@pytest.mark.parametrize(
    "change",
    [
        _no_output_type,
        _no_output_shape,
        _no_input_shape,
        _no_graph_name,
        _two_notes_of_one_key,
        _other_name_of_the_domain,
        _domain_twice,
        _output_twice,
        _contrib_in_the_default_domain,
        _contrib_without_its_domain,
        _open_dims(-1, "N"),
        _open_dims(-1, -1),
        _open_dims("?", "?"),
    ],
)
def test_what_onnxruntime_opens_is_taken_and_saved_as_it_came(change: Any) -> None:
    proto = text(SMALL)
    change(proto)
    data = canonical(proto)
    onnxruntime.InferenceSession(data)
    model = Model.load(data)
    assert model.to_bytes() == data
    assert model.copy().objection == model.objection
    values = np.float32([[1, 2], [3, 4], [-5, 6]])
    np.testing.assert_array_equal(
        run(model, values)[0], run(Model.load(data, check=False), values)[0]
    )
    assert model.inputs[0].shape is None or not isinstance(
        model.inputs[0].shape[0], int
    )


def test_what_the_checker_says_of_a_model_that_runs_is_kept() -> None:
    proto = text(SMALL)
    assert not Model.load(canonical(proto)).objection
    _no_graph_name(proto)
    assert "'name' of 'graph'" in Model.load(canonical(proto)).objection


def _negative(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -7


def _two_versions(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="ai.onnx", version=13)


def _two_types(proto: onnx.ModelProto) -> None:
    _output_twice(proto)
    proto.graph.output[1].type.tensor_type.elem_type = TensorProto.DOUBLE


def _input_twice(proto: onnx.ModelProto) -> None:
    proto.graph.input.add().CopyFrom(proto.graph.input[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_negative, "output 'y' has the size -7 in axis 0"),
        (_two_versions, "two versions of the domain ai.onnx, 17 and 13"),
        (_two_types, "output 'y' is listed twice"),
        (_input_twice, "input 'x' is listed twice"),
    ],
)
def test_what_could_not_be_saved_as_it_came_is_refused(change: Any, words: str) -> None:
    proto = text(SMALL)
    change(proto)
    with pytest.raises(ModelError, match=words):
        Model.load(proto)


@pytest.mark.parametrize(
    "place", ["input", "output", "dimension", "node", "value_info"]
)
def test_a_name_that_is_not_utf8_is_one_clear_error(place: str) -> None:
    proto = text(SMALL)
    name = "QQQQ"
    if place == "dimension":
        proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = name
    elif place == "input":
        proto.graph.input[0].name = name
        proto.graph.node[0].input[0] = name
    elif place == "output":
        proto.graph.output[0].name = name
        proto.graph.node[-1].output[0] = name
    elif place == "node":
        proto.graph.node[0].name = name
    else:
        proto.graph.value_info.add(name=name)
    data = proto.SerializeToString().replace(name.encode(), b"\x9fab\xb9")
    with pytest.raises(ModelError, match="UTF-8"):
        Model.load(data)
