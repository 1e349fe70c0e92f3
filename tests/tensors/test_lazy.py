"""Lazy tensors: what they read, in which pieces, and what they refuse."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelError
from onnxshrink.tensors import (
    ArrayTensor,
    FileTensor,
    LazyTensor,
    ProtoTensor,
    SparseTensor,
    bits_of,
    numpy_type,
    plain_bytes,
    same_bits,
)

TYPES = [
    value for name, value in TensorProto.DataType.items() if name not in ("UNDEFINED",)
]
NUMBERS = [value for value in TYPES if value != TensorProto.STRING]


def example(data_type: int, *shape: int) -> np.ndarray[Any, Any]:
    """Return values that differ, are finite, and fit the type."""
    size = int(np.prod(shape))
    if data_type == TensorProto.STRING:
        strings = np.empty(size, dtype=object)
        strings[:] = [f"word {i}" for i in range(size)]
        return strings.reshape(shape)
    lowest = 1 if data_type == TensorProto.FLOAT8E8M0 else 0  # it has no zero
    return (lowest + np.arange(size) % 2).astype(numpy_type(data_type)).reshape(shape)


def in_file(folder: Path, array: np.ndarray[Any, Any], before: int = 3) -> FileTensor:
    proto = numpy_helper.from_array(array)
    path = folder / "data"
    path.write_bytes(bytes(before) + proto.raw_data + b"behind")
    return FileTensor(path, before, len(proto.raw_data), array.shape, proto.data_type)


@pytest.mark.parametrize("data_type", TYPES, ids=TensorProto.DataType.Name)
def test_every_type_is_read_alike_from_protos_files_and_arrays(
    data_type: int, tmp_path: Path
) -> None:
    array = example(data_type, 3, 7)
    proto = numpy_helper.from_array(array)
    tensors: list[LazyTensor] = [ProtoTensor(proto), ArrayTensor(array)]
    if data_type != TensorProto.STRING:
        tensors.append(in_file(tmp_path, array))
    for tensor in tensors:
        assert (tensor.shape, tensor.data_type, tensor.size) == ((3, 7), data_type, 21)
        read = tensor.read()
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
        loaded = tensor.load()
        assert loaded is not read
        assert loaded.flags.writeable
        pieces = list(tensor.chunks(8))
        assert len(pieces) > 1 or array.dtype.itemsize == 0
        np.testing.assert_array_equal(np.concatenate(pieces), array.reshape(-1))
        assert all(same_bits(tensor, other) for other in tensors)
        if data_type != TensorProto.STRING:
            assert tensor.nbytes == len(proto.raw_data)
            raw = b"".join(bytes(piece) for piece in tensor.raw_chunks(8))
            assert raw == proto.raw_data
        assert type(tensor).__name__ in repr(tensor)


@pytest.mark.parametrize("data_type", NUMBERS, ids=TensorProto.DataType.Name)
def test_typed_fields_are_read_as_raw_data_is(data_type: int) -> None:
    array = example(data_type, 5)
    flat = array.astype(np.complex128) if array.dtype.kind == "c" else array
    typed = helper.make_tensor("t", data_type, [5], flat.tolist())
    assert not typed.HasField("raw_data")
    tensor = ProtoTensor(typed)
    np.testing.assert_array_equal(tensor.read(), array)
    assert same_bits(tensor, ArrayTensor(array))


@given(
    data=st.binary(max_size=300),
    data_type=st.sampled_from(NUMBERS),
    nbytes=st.integers(1, 64),
)
def test_any_bits_survive_chunking(data: bytes, data_type: int, nbytes: int) -> None:
    bits = bits_of(data_type)
    whole = bits // 8 if bits % 8 == 0 else bits  # bytes that hold whole elements
    data = data[: len(data) // whole * whole]
    size = len(data) * 8 // bits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        path.write_bytes(data)
        assert plain_bytes((size,), data_type) == len(data)
        tensor = FileTensor(path, 0, len(data), (size,), data_type)
        assert b"".join(map(bytes, tensor.raw_chunks(nbytes))) == data
        pieces = [piece.tobytes() for piece in tensor.chunks(nbytes)]
        assert b"".join(pieces) == tensor.read().tobytes()
        if data_type != TensorProto.BOOL:
            chunked = LazyTensor.raw_chunks(tensor, nbytes)
            assert b"".join(map(bytes, chunked)) == data


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_scalars_and_empty_tensors_keep_their_shape(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.ones(shape, np.float32)
    for tensor in (
        in_file(tmp_path, array),
        ArrayTensor(array),
        ProtoTensor(numpy_helper.from_array(array)),
    ):
        assert tensor.read().shape == shape
        assert tensor.size == array.size
        assert b"".join(map(bytes, tensor.raw_chunks())) == array.tobytes()


def test_strings_that_are_not_text_stay_bytes() -> None:
    proto = helper.make_tensor("s", TensorProto.STRING, [2], [b"ok", b"\xff"])
    assert ProtoTensor(proto).read().tolist() == [b"ok", b"\xff"]
    with pytest.raises(ModelError, match="no raw data"):
        list(ProtoTensor(proto).raw_chunks())


def test_big_endian_arrays_become_native() -> None:
    tensor = ArrayTensor(np.array([1, 2], ">i4"))
    assert tensor.data_type == TensorProto.INT32
    assert b"".join(map(bytes, tensor.raw_chunks())) == np.int32([1, 2]).tobytes()


def test_an_element_type_is_put_on_bits_or_floats_are_converted() -> None:
    bits = ArrayTensor(np.uint16([0x3F80]), TensorProto.BFLOAT16)
    assert bits.read().dtype == ml_dtypes.bfloat16
    assert float(bits.read()[0]) == 1.0
    floats = ArrayTensor(np.float32([1.5]), TensorProto.BFLOAT16)
    assert float(floats.read()[0]) == 1.5
    with pytest.raises(ModelError, match="cannot be the values"):
        ArrayTensor(np.int64([1]), TensorProto.BFLOAT16)
    with pytest.raises(ModelError, match="no ONNX element type"):
        ArrayTensor(np.array(["2020-01-01"], "datetime64[s]"))


# --- sizes are checked before they are believed -----------------------------------


@pytest.mark.parametrize(
    ("dims", "fields", "words"),
    [
        ([1 << 40], {"raw_data": b"abcd"}, "has 4 bytes"),
        ([1 << 40], {"float_data": [1.0]}, "has 1 values"),
        ([1 << 40], {}, "has 0 values"),
        ([1 << 62, 1 << 62], {}, "impossible shape"),
        ([0, 1 << 62], {}, "impossible shape"),
        ([-1], {}, "negative dimension"),
        ([1], {"raw_data": b"abcd", "float_data": [1.0]}, "two fields"),
        ([1], {"float_data": [1.0], "int32_data": [1]}, "two fields"),
        ([1], {"int64_data": [1]}, "asks for float_data"),
        ([2], {"raw_data": b"abcd"}, "asks for 8"),
        ([1], {"data_type": 77}, "element type 77"),
        ([1], {"data_type": 0}, "element type 0"),
        ([1], {"data_type": TensorProto.STRING, "raw_data": b"a"}, "raw data"),
        ([1], {"data_type": TensorProto.STRING}, "has 0 values"),
        ([1], {"data_location": TensorProto.EXTERNAL}, "external data"),
        ([1], {"segment": TensorProto.Segment(begin=0, end=1)}, "segment"),
        ([3], {"data_type": TensorProto.INT4, "raw_data": b"a"}, "asks for 2"),
    ],
)
def test_a_tensor_of_the_wrong_size_is_refused(
    dims: list[int], fields: dict[str, Any], words: str
) -> None:
    proto = TensorProto(
        **{"name": "t", "dims": dims, "data_type": TensorProto.FLOAT, **fields}
    )
    with pytest.raises(ModelError, match=words):
        ProtoTensor(proto)


def test_more_dimensions_than_numpy_has_are_refused_when_read(tmp_path: Path) -> None:
    dims = [1] * 70
    proto = TensorProto(dims=dims, data_type=TensorProto.UINT8, raw_data=b"a")
    with pytest.raises(ModelError, match="dimension"):
        ProtoTensor(proto).read()
    (tmp_path / "data").write_bytes(b"a")
    tensor = FileTensor(tmp_path / "data", 0, 1, tuple(dims), TensorProto.UINT8)
    with pytest.raises(ModelError, match="dimension"):
        tensor.read()


@pytest.mark.parametrize(
    ("offset", "length", "shape", "words"),
    [
        (0, 8, (2,), None),
        (2, 8, (2,), None),
        (3, 8, (2,), "lies at bytes 3 to 11 of data, which has 10"),
        (-1, 8, (2,), "lies at bytes -1"),
        (1 << 62, 8, (2,), "lies at bytes"),
        (0, 4, (2,), "asks for 8"),
        (0, 8, (1 << 40,), "asks for 4398046511104"),
    ],
)
def test_a_range_must_lie_in_the_file_and_fit_the_shape(
    offset: int, length: int, shape: tuple[int, ...], words: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(10))
    if words is None:
        tensor = FileTensor(path, offset, length, shape, TensorProto.FLOAT)
        assert tensor.read().tolist() == [0, 0]
        return
    with pytest.raises(ModelError, match=words):
        FileTensor(path, offset, length, shape, TensorProto.FLOAT, "t")


def test_a_file_that_changes_or_goes_is_noticed(tmp_path: Path) -> None:
    tensor = in_file(tmp_path, np.arange(4, dtype=np.float32))
    pieces = tensor.chunks(8)
    stream = tensor.raw_chunks(4)
    next(stream)
    path = tensor.path
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:5])
    for read in (tensor.read, lambda: list(pieces), lambda: list(stream)):
        with pytest.raises(ModelError, match="changed while it was in use"):
            read()
    path.write_bytes(bytes(100))
    os.utime(path, ns=(time, time + 1))
    with pytest.raises(ModelError, match="changed while it was in use"):
        tensor.read()
    path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        tensor.read()
    with pytest.raises(ModelError, match="cannot read"):
        FileTensor(path, 0, 4, (1,), TensorProto.FLOAT)


def sparse(
    dims: list[int], values: Any, indices: Any, data_type: int = TensorProto.FLOAT
) -> onnx.SparseTensorProto:
    proto = onnx.SparseTensorProto(dims=dims)
    proto.values.CopyFrom(
        numpy_helper.from_array(np.asarray(values, numpy_type(data_type)), "s")
    )
    proto.indices.CopyFrom(numpy_helper.from_array(np.asarray(indices, np.int64)))
    return proto


def test_sparse_tensors_are_read_in_both_forms() -> None:
    want = [[0, 5], [7, 0]]
    linear = SparseTensor(sparse([2, 2], [5, 7], [1, 2]))
    pairs = SparseTensor(sparse([2, 2], [5, 7], [[0, 1], [1, 0]]))
    np.testing.assert_array_equal(linear.read(), want)
    np.testing.assert_array_equal(pairs.read(), want)
    assert same_bits(linear, ArrayTensor(np.float32(want)))
    assert SparseTensor(sparse([2], [], [])).read().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("dims", "values", "indices", "words"),
    [
        ([1 << 40], [1], [0], "too large to be made dense"),
        ([1 << 30], [1], [0], "too large to be made dense"),
        ([4], [1], [4], "out of bounds"),
        ([4], [1], [-1], "negative"),
        ([4], [1, 2], [1], "1 indices for 2 values"),
        ([2, 2], [1], [[0, 2]], "broken"),
        ([2, 2], [1], [[0, 1, 1]], "3 columns"),
        ([2, 2], [1], [[[0]]], "broken"),
    ],
)
def test_a_sparse_tensor_outside_its_shape_is_refused(
    dims: list[int], values: Any, indices: Any, words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        SparseTensor(sparse(dims, values, indices)).read()


def test_a_sparse_tensor_with_external_values_is_refused() -> None:
    proto = sparse([4], [1], [0])
    proto.indices.ClearField("raw_data")
    proto.indices.data_location = TensorProto.EXTERNAL
    proto.indices.external_data.add(key="location", value="x")
    with pytest.raises(ModelError, match="external"):
        SparseTensor(proto)


def test_the_same_values_of_another_type_or_shape_are_not_the_same_bits() -> None:
    base = ArrayTensor(np.float32([0, 1]))
    assert same_bits(base, base)
    assert not same_bits(base, ArrayTensor(np.float32([[0, 1]])))
    assert not same_bits(base, ArrayTensor(np.float64([0, 1])))
    assert not same_bits(base, ArrayTensor(np.float32([-0.0, 1])))
    nan = np.float32([np.nan])
    assert same_bits(ArrayTensor(nan), ArrayTensor(nan.copy()))
    long = np.zeros(3 << 20, np.float64)
    other = long.copy()
    other[-1] = 1
    assert not same_bits(ArrayTensor(long), ArrayTensor(other))


def test_a_graphsurgeon_constant_takes_a_lazy_tensor() -> None:
    import onnx_graphsurgeon as gs

    constant = gs.Constant("c", ArrayTensor(np.float32([1, 2])))
    assert constant.shape == (2,)
    assert constant.dtype == np.float32
    assert constant.values.tolist() == [1, 2]


def test_a_reference_reads_a_copy_of_the_file_but_no_other(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = in_file(tmp_path, array)
    data = tensor.path.read_bytes()
    sent = pickle.dumps(tensor)

    # As on another host: the same path, another file.
    tensor.path.unlink()
    tensor.path.write_bytes(data)
    os.utime(tensor.path, (1, 1))
    there = pickle.loads(sent)
    assert np.array_equal(there.read(), array)
    assert np.array_equal(np.concatenate(list(there.chunks(8))), array.reshape(-1))
    with pytest.raises(ModelError, match="was changed while it was in use"):
        tensor.read()

    tensor.path.write_bytes(data[:10] + b"\x7f" + data[11:])
    with pytest.raises(ModelError, match="was changed while it was in use"):
        there.read()
    with pytest.raises(ModelError, match="holds other values here"):
        pickle.loads(sent).read()
    tensor.path.write_bytes(data[:20])
    with pytest.raises(ModelError, match="holds other values here"):
        pickle.loads(sent).read()
    tensor.path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        pickle.loads(sent).read()


def test_copies_of_a_reference_are_itself(tmp_path: Path) -> None:
    tensor = in_file(tmp_path, np.zeros(3, np.float32))
    assert copy.deepcopy([tensor])[0] is copy.copy(tensor) is tensor
