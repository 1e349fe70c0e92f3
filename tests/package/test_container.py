"""Packages as files: byte for byte, alone, in pieces, and refused when damaged."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.errors import ModelError, OutputError
from onnxshrink.package import (
    Package,
    container,
    pack_bytes,
    pack_file,
    pack_parts,
    unpack,
)
from onnxshrink.package.reading import varint
from onnxshrink.tensors import ArrayTensor

Array = np.ndarray[Any, Any]
MODELS = Path(__file__).parents[2] / "models"


def graph_of(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [info], [info], list(tensors))
    return helper.make_model(graph, ir_version=8)


def every_type() -> onnx.ModelProto:
    """A tensor of each element type, in raw data and in typed fields."""
    rng = np.random.default_rng(0)
    tensors = []
    for name, data_type in TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING"):
            continue
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        values = rng.integers(0, 2, (16, 12)).astype(dtype)
        tensors.append(numpy_helper.from_array(values, name))
    floats = rng.normal(size=(20, 10))
    for data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64):
        values = floats if data_type != TensorProto.INT64 else (floats * 99).astype(int)
        flat = values.reshape(-1).tolist()
        tensors.append(
            helper.make_tensor(f"typed{data_type}", data_type, [20, 10], flat)
        )
    tensors.append(helper.make_tensor("text", TensorProto.STRING, [2], [b"a", b"\xff"]))
    return graph_of(*tensors)


def nested() -> onnx.ModelProto:
    """Weights in Constant nodes, in both branches of an If and in a function."""
    weight = numpy_helper.from_array(np.arange(600, dtype=np.float32), "w")
    inner = helper.make_node("Constant", [], ["c"], value=weight)
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [600])
    branch = helper.make_graph([inner], "branch", [], [out], [weight])
    node = helper.make_node("If", ["b"], ["y"], then_branch=branch, else_branch=branch)
    function = helper.make_function(
        "local", "f", [], ["c"], [inner], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("b", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [600])],
    )
    return helper.make_model(graph, functions=[function], ir_version=8)


def packed(path: Path, **options: bool) -> Package:
    return Package(b"".join(pack_file(path, **options)))


def content(package: Package, index: int = 0) -> bytes:
    return b"".join(bytes(chunk) for chunk in package.stream(package.files[index]))


def write(path: Path, proto: onnx.ModelProto) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("make", [every_type, nested])
@pytest.mark.parametrize("tiny", [False, True])
def test_a_file_comes_back_byte_for_byte(make: Any, tiny: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", make())
    package = packed(path, tiny=tiny)
    assert content(package) == path.read_bytes()
    taken_out = [piece for piece in package.files[0].pieces if isinstance(piece, int)]
    assert len(taken_out) > 3


@pytest.mark.parametrize("name", ["lenet-5", "residual-cnn"])
def test_a_trained_model_takes_at_most_87_percent(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    data = b"".join(pack_file(path))
    assert content(Package(data)) == path.read_bytes()
    assert len(data) < 0.87 * path.stat().st_size


def test_bytes_in_memory_give_the_same_package_as_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", every_type())
    assert b"".join(pack_bytes(path.read_bytes())) == b"".join(pack_file(path))


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", every_type())
    assert b"".join(pack_file(path)) == b"".join(pack_file(path))


@given(st.binary(max_size=3000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_no_model_comes_back_too(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(data)
    assert content(packed(path)) == data


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32)
    twins = [numpy_helper.from_array(weight, name) for name in ("a", "b")]
    path = write(tmp_path / "m.onnx", graph_of(*twins))
    package = packed(path)
    assert len(package.tensors) == 1
    assert content(package) == path.read_bytes()


def test_a_large_tensor_is_decoded_in_blocks_and_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_BLOCK_ITEMS", 5000)
    weight = np.random.default_rng(0).normal(size=(230, 100)).astype(np.float32)
    path = write(tmp_path / "m.onnx", graph_of(numpy_helper.from_array(weight, "w")))
    package = packed(path)
    assert [len(tensor.blocks) for tensor in package.tensors] == [5]
    assert content(package) == path.read_bytes()
    third = package.block(0, 2)
    assert third.tobytes() == weight[100:150].tobytes()
    found = package.tensor(
        onnx.TensorProto(dims=[230, 100], data_type=1, name="w"),
        package.files[0].starts[1],
        weight.nbytes,
    )
    assert found is not None
    assert np.array_equal(found.read(), weight)
    assert found.read() is not None
    pieces = list(found.chunks(4000))
    assert max(piece.nbytes for piece in pieces) <= 4000
    assert np.array_equal(np.concatenate(pieces), weight.reshape(-1))


# --- external data ----------------------------------------------------------------


def with_external(folder: Path) -> Path:
    """Two tensors of which one is read twice, a gap, and bytes that nobody reads."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(40, 50)).astype(np.float32)
    second = rng.integers(-3, 3, (64, 32)).astype(np.int8)
    data = first.tobytes() + bytes(96) + second.tobytes() + b"nobody reads this"
    (folder / "weights.bin").write_bytes(data)
    protos = []
    for name, values, offset in (
        ("a", first, 0),
        ("again", first, 0),
        ("b", second, first.nbytes + 96),
    ):
        proto = onnx.TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", "weights.bin"),
            ("offset", str(offset)),
            ("length", str(values.nbytes)),
        ):
            proto.external_data.add(key=key, value=value)
        protos.append(proto)
    return write(folder / "m.onnx", graph_of(*protos))


def test_external_data_comes_along_and_comes_back(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    package = packed(path)
    assert [file.name for file in package.files] == ["", "weights.bin"]
    out = tmp_path / "out"
    out.mkdir()
    written = unpack(package, out / "m.onnx")
    assert written == (out / "m.onnx", out / "weights.bin")
    for name in ("m.onnx", "weights.bin"):
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
    # Again: the data is there, only the model is written.
    assert unpack(package, out / "m.onnx") == (out / "m.onnx",)


def test_data_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    package = packed(with_external(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights.bin").write_bytes(b"of another model")
    with pytest.raises(OutputError, match=r"weights.bin exists and holds other data"):
        unpack(package, out / "m.onnx")
    assert (out / "weights.bin").read_bytes() == b"of another model"
    assert not (out / "m.onnx").exists()


def test_external_data_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = with_external(tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../weights.bin"
    with pytest.raises(ModelError, match="climbs out of the model's folder"):
        list(pack_file(write(path, proto)))


# --- damage -----------------------------------------------------------------------


def small() -> bytes:
    rng = np.random.default_rng(0)
    pruned = rng.normal(size=(40, 30)).astype(np.float32)
    pruned[rng.random(pruned.shape) < 0.8] = 0
    codes = rng.integers(0, 9, (40, 30)).astype(np.float32)
    plain = rng.normal(size=(40, 30)).astype(np.float32)
    tensors = [
        numpy_helper.from_array(values, f"w{place}")
        for place, values in enumerate((pruned, codes, plain, np.arange(500)))
    ]
    return graph_of(*tensors).SerializeToString()


PACKED = b"".join(pack_bytes(small()))


def opened(data: bytes) -> bytes:
    return content(Package(data))


def test_an_intact_package_opens() -> None:
    assert opened(PACKED) == small()


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
@settings(max_examples=200)
def test_a_changed_byte_is_one_clear_error(place: int, change: int) -> None:
    data = bytearray(PACKED)
    data[place] ^= change
    try:
        found = opened(bytes(data))
    except ModelError as error:
        assert re.search("damaged|no package|version", str(error))  # noqa: PT017
    else:
        assert found == small()  # bits that fill up a byte say nothing


@given(st.integers(0, len(PACKED) - 1))
def test_a_package_cut_short_is_one_clear_error(length: int) -> None:
    with pytest.raises(ModelError, match=r"cut short|damaged|no package"):
        opened(PACKED[:length])


@given(st.binary(max_size=300))
def test_bytes_behind_the_magic_are_one_clear_error(data: bytes) -> None:
    with pytest.raises(ModelError):
        opened(container.MAGIC + data)


def with_index(index: bytes, blocks: bytes = b"", method: bytes = b"\0") -> bytes:
    """A package whose checksum is right and whose index is not."""
    stored = method + index
    return (
        container.MAGIC
        + blocks
        + stored
        + container._FOOTER.pack(len(stored), zlib.crc32(stored))
    )


ONE_FILE = b"\1" + b"\0" + b"\1" + varint(1)  # its only piece: tensor 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_index(b"\0\0"), "holds no model"),
        (with_index(varint(1 << 40)), "greater than"),
        (with_index(b"\1\0" + b"\1" + varint(99 << 1) + b"\0"), "bytes are asked for"),
        (with_index(ONE_FILE + b"\0"), "there is no tensor 0"),
        # A tensor that says it has 2**50 bytes in one block; then in as many as fit.
        (with_index(ONE_FILE + b"\1" + varint(1 << 50) + b"\1" + bytes(9)),
         "are not 1 blocks"),
        (
            with_index(
                ONE_FILE + b"\1" + varint(1 << 26) + b"\1" + varint(3) + bytes(4),
                b"\0\1\0",
            ),
            "bytes are asked for",
        ),
        # Four bytes that claim 64 MiB, named 100 times: 6.4 GB in all.
        (
            with_index(
                b"\1\0" + varint(100) + b"\1" * 100 + b"\1"
                + varint(1 << 26) + b"\1" + varint(3) + bytes(4),
                b"\0\1\0",
            ),
            "claim to stand for more than",
        ),
        (with_index(varint(1 << 40), method=b"\1"), "greater than"),
        (with_index(varint(1 << 19) + b"abc", method=b"\1"), "cannot be read|length"),
        (with_index(varint(1 << 19) + b"abc", method=b"\2"), "LZMA"),
        (with_index(b"\0", method=b"\7"), "unknown form 7"),
        (with_index(b"\2" + b"\0\0" + b"\0\0" + b"\0"), "one name"),
        (with_index(b"\2" + b"\0\0" + b"\4../a\0" + b"\0"), "leaves the folder"),
        (with_index(b"\2" + b"\0\0" + b"\2/a\0" + b"\0"), "leaves the folder"),
        (b"ONNXZ\x02" + bytes(20), "version 2 of the format; this onnxshrink"),
        (b"PK\3\4" + bytes(20), "no package of onnxshrink"),
    ],
)  # fmt: skip
def test_sizes_that_lie_are_refused_before_memory_is_taken(
    data: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(data)


@given(st.binary(max_size=200), st.sampled_from([8, 512, 4096]))
def test_hostile_blocks_with_a_right_checksum_are_one_kind_of_error(
    block: bytes, nbytes: int
) -> None:
    entry = varint(len(block)) + bytes(4)
    data = with_index(ONE_FILE + b"\1" + varint(nbytes) + b"\1" + entry, block)
    with pytest.raises(ModelError):
        opened(data)


def test_a_package_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnxz"
    path.write_bytes(PACKED)
    package = Package(path)
    path.write_bytes(PACKED + b"x")
    with pytest.raises(ModelError, match="was changed while it was in use"):
        package.read(0)


def test_a_low_decode_ratio_leaves_blocks_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(container, "_SMALL_DECODE", 0)
    rng = np.random.default_rng(0)
    values = ArrayTensor((rng.normal(size=9000) * 0.1).astype(np.float32))
    small = b"".join(pack_parts([("", [b"x", values])]))
    plain = b"".join(pack_parts([("", [b"x", values])], max_decode_ratio=1.5))
    assert len(small) < 0.9 * values.nbytes < len(plain)
    for data in (small, plain):
        assert np.array_equal(Package(data).read(0), values.read().view(np.uint8))
