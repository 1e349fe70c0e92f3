"""Malformed models: never a crash, a hang, or an error that is not ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import OnnxshrinkError
from onnxshrink.model import Model

SOURCES = [
    """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    everything (bool c, float[N,2] x) => (float[N,2] y, float[2] w)
    <float[2] w = {1, 2}, int64[1] s = {0}>
    {
        v = Identity (w)
        h = local.scale (x, v)
        y = If (c) <
            then_branch = then_graph () => (float[N,2] a)
                <float[2] inner = {3, 4}> { a = Mul (h, inner) },
            else_branch = else_graph () => (float[N,2] e) {
                k = Constant <value = float[2] {5, 6}> ()
                e = Add (h, k)
            }
        >
    }
    <domain: "local", opset_import: ["": 21]>
    scale (a, f) => (r) { g = Identity (f) r = Mul (a, g) }
    """,
    """
    <ir_version: 3, opset_import: ["": 7]>
    plain (float[2,3] x, float[3,2] w) => (float[2,2] y)
    { h = MatMul (x, w) r = Relu (h) y = Dropout <ratio = 0.5> (r) }
    """,
]


def _seeds() -> list[bytes]:
    protos = [onnx.parser.parse_model(source) for source in SOURCES]
    first = protos[0].graph
    sparse = first.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1, 2]), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.int64([0, 3])))
    words = helper.make_tensor("words", TensorProto.STRING, [1], [b"\xff"])
    outside = TensorProto(name="o", dims=[2], data_type=TensorProto.FLOAT)
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="data.bin")
    outside.external_data.add(key="offset", value="8")
    outside.external_data.add(key="length", value="8")
    typed = helper.make_tensor("typed", TensorProto.FLOAT16, [2], [1.0, 2.0])
    packed = helper.make_tensor("q", TensorProto.INT4, [3], [1, 2, 3])
    first.initializer.extend([words, outside, typed, packed])
    protos[1].graph.initializer.append(
        numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    )
    protos[1].metadata_props.add(key="k", value="v")
    return [proto.SerializeToString() for proto in protos]


SEEDS = _seeds()


def exercise(source: bytes | onnx.ModelProto) -> bool:
    """Do all that a run does with a model; return whether it could be loaded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.bin").write_bytes(bytes(range(32)))
        given: Any = source
        if isinstance(source, bytes):
            given = folder / "m.onnx"
            given.write_bytes(source)
        loaded = False
        refusals: list[str] = []
        for check in (True, False):
            try:
                model = Model.load(given, check=check)
                loaded = loaded or check
                twin = model.copy().to_bytes()
                # What the checker refuses need not make sense, only end well.
                assert twin == model.to_bytes() or not check
                for weight in model.weights():
                    assert len(weight.uses) >= 0
                    assert weight.is_input in (True, False)
                    weight.read()
                    list(weight.chunks())
                for node in model.nodes():
                    for tensor in node.inputs:
                        model.constant(tensor)
                model.infer_shapes()
                model.save(folder / "out.onnx")
                model.drop_unused()
                model.fit_runtime()
                for graph in model.graphs():
                    for tensor in list(graph.outputs):
                        model.replace_uses(tensor, model.add_weight("n", np.ones(2)))
                model.to_bytes()
            except OnnxshrinkError as error:
                refusals.append(str(error))
        assert all(text and "\n" not in text for text in refusals), refusals
        return loaded


def mutations(seed: bytes) -> st.SearchStrategy[bytes]:
    position = st.integers(0, len(seed) - 1)
    edit = st.one_of(
        st.tuples(st.just("set"), position, st.integers(0, 255)),
        st.tuples(st.just("flip"), position, st.integers(0, 7)),
        st.tuples(st.just("cut"), position, st.integers(1, 30)),
        st.tuples(st.just("copy"), position, st.integers(1, 60)),
        st.tuples(st.just("end"), position, st.just(0)),
        st.tuples(st.just("huge"), position, st.just(0)),
    )

    def apply(edits: list[tuple[str, int, int]]) -> bytes:
        data = bytearray(seed)
        for kind, at, amount in edits:
            at = min(at, max(0, len(data) - 1))
            if not data:
                break
            if kind == "set":
                data[at] = amount
            elif kind == "flip":
                data[at] ^= 1 << amount
            elif kind == "cut":
                del data[at : at + amount]
            elif kind == "copy":
                data[at:at] = data[at : at + amount]
            elif kind == "huge":
                data[at : at + 1] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
            else:
                del data[at:]
        return bytes(data)

    return st.lists(edit, min_size=1, max_size=4).map(apply)


FUZZED = st.sampled_from(SEEDS).flatmap(mutations)

NAMES = st.sampled_from(["", "x", "y", "w", "b", "h", "k"])
SIZES = st.sampled_from([0, 1, 2, 3, -1, 1 << 31, 1 << 40, 1 << 62])
TYPES = st.sampled_from([0, 1, 1, 1, 6, 7, 8, 9, 10, 16, 19, 21, 22, 23, 25, 27, 99])


@st.composite
def tensors(draw: Any) -> TensorProto:
    proto = TensorProto(name=draw(NAMES), data_type=draw(TYPES))
    proto.dims.extend(draw(st.lists(SIZES, max_size=3)))
    kind = draw(st.sampled_from(["raw", "float", "int32", "int64", "none", "external"]))
    if kind == "raw":
        proto.raw_data = draw(st.binary(max_size=24))
    elif kind == "external":
        proto.data_location = TensorProto.EXTERNAL
        for key in draw(st.lists(st.sampled_from(["location", "offset", "length"]))):
            value = draw(
                st.sampled_from(["data.bin", "../x", "0", "8", "-1", "", "9" * 30])
            )
            proto.external_data.add(key=key, value=value)
    elif kind != "none":
        getattr(proto, f"{kind}_data").extend(
            draw(st.lists(st.integers(-3, 3), max_size=6))
        )
    return proto


@st.composite
def infos(draw: Any) -> onnx.ValueInfoProto:
    shape = draw(st.one_of(st.none(), st.lists(SIZES | st.just("N"), max_size=3)))
    info = helper.make_tensor_value_info(draw(NAMES), draw(TYPES), shape)
    if draw(st.integers(0, 9)) == 0:
        info.ClearField("type")
    return info


@st.composite
def attributes(draw: Any, depth: int) -> onnx.AttributeProto:
    proto = onnx.AttributeProto()
    proto.name = draw(
        st.sampled_from(["value", "axis", "then_branch", "else_branch", "body", "to"])
    )
    proto.type = draw(st.integers(0, 14))
    kind = draw(st.sampled_from(["i", "f", "s", "ints", "t", "g", "ref"]))
    if kind == "i":
        proto.i = draw(SIZES)
    elif kind == "f":
        proto.f = draw(st.floats(width=32))
    elif kind == "s":
        proto.s = draw(st.binary(max_size=4))
    elif kind == "ints":
        proto.ints.extend(draw(st.lists(SIZES, max_size=3)))
    elif kind == "t":
        proto.t.CopyFrom(draw(tensors()))
    elif kind == "ref":
        proto.ref_attr_name = "value"
    elif depth:
        proto.g.CopyFrom(draw(graphs(depth - 1)))
    return proto


@st.composite
def nodes(draw: Any, depth: int) -> onnx.NodeProto:
    proto = onnx.NodeProto()
    proto.op_type = draw(
        st.sampled_from(["Identity", "Constant", "Add", "MatMul", "If", "Loop", "call"])
    )
    proto.domain = draw(st.sampled_from(["", "", "", "local", "ai.onnx"]))
    proto.input.extend(draw(st.lists(NAMES, max_size=3)))
    proto.output.extend(draw(st.lists(NAMES, max_size=2)))
    proto.attribute.extend(draw(st.lists(attributes(depth), max_size=2)))
    return proto


@st.composite
def graphs(draw: Any, depth: int = 2) -> onnx.GraphProto:
    proto = onnx.GraphProto(name=draw(st.sampled_from(["", "g"])))
    proto.node.extend(draw(st.lists(nodes(depth), max_size=4)))
    proto.initializer.extend(draw(st.lists(tensors(), max_size=3)))
    proto.input.extend(draw(st.lists(infos(), max_size=2)))
    proto.output.extend(draw(st.lists(infos(), max_size=2)))
    proto.value_info.extend(draw(st.lists(infos(), max_size=1)))
    if draw(st.integers(0, 5)) == 0:
        sparse = proto.sparse_initializer.add()
        sparse.dims.extend(draw(st.lists(SIZES, max_size=2)))
        sparse.values.CopyFrom(draw(tensors()))
        sparse.indices.CopyFrom(draw(tensors()))
    return proto


@st.composite
def models(draw: Any) -> onnx.ModelProto:
    proto = onnx.ModelProto(ir_version=draw(st.sampled_from([0, 1, 3, 8, 10, 13, 99])))
    for domain in draw(
        st.lists(st.sampled_from(["", "", "local", "ai.onnx"]), max_size=2)
    ):
        version = draw(st.sampled_from([-1, 0, 1, 7, 17, 26, 1 << 40]))
        proto.opset_import.add(domain=domain, version=version)
    proto.graph.CopyFrom(draw(graphs()))
    for _ in range(draw(st.integers(0, 2))):
        function = proto.functions.add(name="call", domain="local")
        function.input.extend(draw(st.lists(NAMES, max_size=2)))
        function.output.extend(draw(st.lists(NAMES, max_size=2)))
        function.node.extend(draw(st.lists(nodes(1), max_size=3)))
    return proto


def test_the_seeds_are_whole() -> None:
    assert all(exercise(seed) for seed in SEEDS)


@settings(max_examples=250)
@given(FUZZED)
def test_fuzzed_bytes_are_refused_or_survive_a_run(data: bytes) -> None:
    exercise(data)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(models())
def test_fuzzed_protos_are_refused_or_survive_a_run(proto: onnx.ModelProto) -> None:
    exercise(proto)
    exercise(proto.SerializeToString())


@pytest.mark.slow
@settings(max_examples=5000)
@given(FUZZED)
def test_many_more_fuzzed_bytes(data: bytes) -> None:
    exercise(data)


@pytest.mark.slow
@settings(max_examples=2500, suppress_health_check=list(HealthCheck))
@given(models())
def test_many_more_fuzzed_protos(proto: onnx.ModelProto) -> None:
    exercise(proto)


@pytest.mark.parametrize("depth", [5, 33])
def test_nested_subgraphs_end_in_a_model_or_an_error(depth: int) -> None:
    inner = onnx.GraphProto(name="g")
    inner.node.add(op_type="Identity", input=["x"], output=["y"])
    inner.output.add(name="y")
    for _ in range(depth):
        outer = onnx.GraphProto(name="g")
        node = outer.node.add(op_type="If", input=["c"], output=["y"])
        for branch in ("then_branch", "else_branch")[: 2 if depth < 6 else 1]:
            attr = node.attribute.add(name=branch, type=onnx.AttributeProto.GRAPH)
            attr.g.MergeFrom(inner)
        outer.output.add(name="y")
        inner = outer
    for name, kind in (("x", TensorProto.FLOAT), ("c", TensorProto.BOOL)):
        inner.input.append(helper.make_tensor_value_info(name, kind, []))
    proto = onnx.ModelProto(ir_version=8, graph=inner)
    proto.opset_import.add(version=17)
    exercise(proto)


def test_long_varints_and_deep_groups_end() -> None:
    for data in (b"\x08" + b"\xff" * 1000, b"\x0b" * 10_000, b"\x3a\x80" * 5_000):
        assert not exercise(data)
