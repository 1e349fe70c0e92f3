"""The walk over the wire format: what stays in the file, and what is no model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelError
from onnxshrink.tensors.wire import LARGE, encode_varint, read_skeleton


def model(*weights: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [info], [info], tensors)
    return helper.make_model(graph, ir_version=8)


LARGE_WEIGHT = np.arange(LARGE // 4, dtype=np.float32)
SMALL_WEIGHT = np.arange(4, dtype=np.float32)


def test_large_raw_data_stays_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    proto = model(SMALL_WEIGHT, LARGE_WEIGHT, LARGE_WEIGHT[:-1], -LARGE_WEIGHT)
    path.write_bytes(proto.SerializeToString())
    skeleton, ranges = read_skeleton(path)
    assert sorted(ranges) == [1, 3]
    data = path.read_bytes()
    for index, want in ((1, LARGE_WEIGHT), (3, -LARGE_WEIGHT)):
        offset, length = ranges[index]
        np.testing.assert_array_equal(
            np.frombuffer(data[offset : offset + length], np.float32), want
        )
        tensor = skeleton.graph.initializer[index]
        assert not tensor.HasField("raw_data")
        tensor.raw_data = data[offset : offset + length]
    assert skeleton == proto


def test_everything_around_large_data_is_kept(tmp_path: Path) -> None:
    proto = model(LARGE_WEIGHT)
    proto.graph.initializer[0].doc_string = "behind the data"
    proto.graph.initializer[0].metadata_props.add(key="k", value="v")
    proto.doc_string = "before the graph"
    proto.metadata_props.add(key="behind", value="the graph")
    for holder in (proto, proto.graph, proto.graph.initializer[0]):
        holder.MergeFromString(b"\xfa\x07\x03new")
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    skeleton, ranges = read_skeleton(path)
    (offset, length), *_ = ranges.values()
    skeleton.graph.initializer[0].raw_data = path.read_bytes()[offset : offset + length]
    assert skeleton.SerializeToString(deterministic=True) == proto.SerializeToString(
        deterministic=True
    )


def test_a_model_in_two_graph_records_is_merged_as_protobuf_does(
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        model(LARGE_WEIGHT).SerializeToString()
        + model(LARGE_WEIGHT).SerializeToString()
    )
    skeleton, ranges = read_skeleton(path)
    assert not ranges
    assert len(skeleton.graph.initializer) == 2


def test_raw_data_that_stands_twice_is_left_to_protobuf(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(LARGE_WEIGHT, "w").SerializeToString()
    twice = tensor + tensor
    graph = b"\x2a" + encode_varint(len(twice)) + twice
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a" + encode_varint(len(graph)) + graph)
    skeleton, ranges = read_skeleton(path)
    assert not ranges
    assert len(skeleton.graph.initializer[0].raw_data) == LARGE


def test_group_records_are_left_to_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    group = encode_varint(200 << 3 | 3) + encode_varint(200 << 3 | 4)
    path.write_bytes(model(SMALL_WEIGHT).SerializeToString() + group)
    assert len(read_skeleton(path)[0].graph.initializer) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 20,
        b"\x3a\xff\xff\xff\xff\x0f",
        b"\x3a\x05ab",
        b"\x00\x01",
        b"\x08",
        b"\x0d\x01",
        b"\x0f",
        b"\x0b",
        b"not an onnx model at all, but some text",
    ],
)
def test_what_is_no_protobuf_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.onnx"):
        read_skeleton(path)


@given(data=st.binary(max_size=40))
def test_the_walk_takes_and_refuses_what_protobuf_does(data: bytes) -> None:
    path = Path(f"/tmp/wire-{os.getpid()}.onnx")
    path.write_bytes(data)
    try:
        want = onnx.ModelProto()
        try:
            want.ParseFromString(data)
        except Exception:
            with pytest.raises(ModelError):
                read_skeleton(path)
            return
        if data:
            assert read_skeleton(path)[0] == want
    finally:
        path.unlink()


@given(st.integers(0, 2**64 - 1))
def test_varints_have_protobufs_form(value: int) -> None:
    proto = onnx.TensorProto(uint64_data=[value])
    body = encode_varint(value)
    tag = encode_varint(11 << 3 | 2) + encode_varint(len(body))
    assert proto.SerializeToString() == tag + body
