"""The decoder that is the format once more, against the one that is used."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.package import container, forms, pack_bytes, plain, symbols
from onnxshrink.package.reading import Reader

Array = np.ndarray[Any, Any]
MODULE = Path(plain.__file__)
KINDS = [np.float32, np.float16, np.float64, np.int8, np.int64, np.uint16]


def model_of(*arrays: Array) -> bytes:
    tensors = [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(arrays)]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "g", [info], [info], tensors)
    return bytes(helper.make_model(graph, ir_version=8).SerializeToString())


def pruned(rows: int, width: int, levels: int, kept: float, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    density = rng.gamma(1.0, kept, (rows, 1)) * rng.gamma(1.0, 1.0, (1, width))
    table = rng.normal(size=levels).astype(np.float32)
    values = table[rng.integers(0, levels, (rows, width))]
    values[rng.random((rows, width)) > density] = 0
    return values


def test_it_is_plain_and_short() -> None:
    text = MODULE.read_text()
    assert len(text.splitlines()) < 300
    own = [line for line in text.splitlines() if line.startswith("from onnxshrink")]
    assert own == ["from onnxshrink.package.words import WORDS"]


@given(
    st.integers(2, 30),
    st.integers(2, 30),
    st.integers(1, 20),
    st.floats(0.01, 2),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_both_decoders_give_pruned_weights_back(
    rows: int, width: int, levels: int, kept: float, tiny: bool, seed: int
) -> None:
    data = model_of(pruned(rows, width, levels, kept, seed))
    package = b"".join(pack_bytes(data, tiny=tiny))
    assert list(plain.decode_files(package)) == [("", data)]


@pytest.mark.parametrize("dtype", KINDS, ids=lambda dtype: dtype.__name__)
def test_both_decoders_give_any_type_back(dtype: Any) -> None:
    values = (np.random.default_rng(0).normal(size=(60, 50)) * 30).astype(dtype)
    data = model_of(values, values[:3], np.zeros((40, 40), dtype))
    package = b"".join(pack_bytes(data))
    assert list(plain.decode_files(package)) == [("", data)]


def test_tensors_of_several_blocks_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_BLOCK_ITEMS", 2000)
    rng = np.random.default_rng(0)
    kept = rng.random((64, 96)) < np.exp(rng.normal(-2, 1.5, (64, 1)))
    small = np.where(kept, rng.integers(1, 7, (64, 96)), 0)
    int4 = small.astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
    data = model_of(int4, rng.normal(size=(70, 100)).astype(np.float32))
    package = b"".join(pack_bytes(data))
    assert list(plain.decode_files(package)) == [("", data)]


def shared_values(kind: str) -> Array:
    """Weights whose channels or blocks have tables of their own, or vectors one."""
    rng = np.random.default_rng(7)
    codes = rng.binomial(15, 0.5, (120, 90))
    if kind == "vectors":
        table = rng.normal(size=(40, 2)).astype(np.float32)
        return table[codes[:, :45] + 8].reshape(120, 90)
    table = rng.normal(size=16).astype(np.float32)
    scale = rng.random(120 if kind == "rows" else 90).astype(np.float32)
    return table[codes] * (scale[:, None] if kind == "rows" else scale)


@pytest.mark.parametrize("kind", ["rows", "columns", "vectors"])
def test_tables_of_channels_and_of_vectors_are_in_both(kind: str) -> None:
    values = shared_values(kind)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    layout = forms.Layout(4, True, 90, inner=(90,))
    coded = forms.encode_block(raw, layout)
    assert coded[0] == (forms.TABLE if kind == "vectors" else forms.PARTS)
    assert len(coded) < 0.4 * raw.size
    assert np.array_equal(forms.decode_block(Reader(coded), raw.size), raw)
    assert plain.block(plain._Stream(coded), raw.size) == raw.tobytes()
    data = model_of(values)
    assert list(plain.decode_files(b"".join(pack_bytes(data)))) == [("", data)]


def coded_by(coder: int, coded: bytes, count: int, alphabet: int) -> None:
    assert coded[0] == coder
    fast = symbols.decode_symbols(Reader(coded), count, alphabet)
    stream = plain._Stream(coded)
    assert plain.symbols(stream, count, alphabet) == fast.tolist()
    assert stream.at == len(coded)


def test_every_coder_is_in_both() -> None:
    rng = np.random.default_rng(3)
    bell = np.clip(rng.normal(20, 0.5, 20_000), 0, 39).astype(np.uint8)
    coded_by(symbols.RANS, symbols.encode_symbols(bell, 40), bell.size, 40)
    few = np.array([0] * 150 + [1] * 80 + [2] * 40 + [7] * 30, np.uint8)
    few = rng.permutation(few)
    counts = np.bincount(few)
    code = symbols._used(counts) + symbols.huffman.encode(few, counts)
    coded_by(symbols.HUFFMAN, bytes([symbols.HUFFMAN]) + code, few.size, 8)
    level = rng.binomial(200, 0.4, 3000).astype(np.uint8)
    coded_by(symbols.DEFLATE, symbols.encode_symbols(level, 256), level.size, 256)
    flat = rng.integers(0, 16, 999).astype(np.uint8)
    coded_by(symbols.PACKED, symbols.encode_symbols(flat, 16), flat.size, 16)
    coded_by(symbols.CONSTANT, symbols.encode_symbols(flat * 0 + 3, 4), flat.size, 4)
    again = np.tile(rng.integers(0, 200, 60).astype(np.uint8), 50)
    coded_by(symbols.LZMA, symbols.encode_symbols(again, 256), again.size, 256)
    mask = (pruned(200, 150, 1, 0.1, 5) != 0).astype(np.uint8).reshape(-1)
    coded_by(symbols.CONTEXTS, symbols.encode_symbols(mask, 2, 150), mask.size, 2)
    slow = symbols.encode_symbols(mask[:9000], 2, 150, tiny=True)
    coded_by(symbols.ADAPTIVE, slow, 9000, 2)
    codes = rng.binomial(7, 0.3, 2000).astype(np.uint8)
    slow = symbols.encode_symbols(codes, 8, tiny=True)
    coded_by(symbols.ADAPTIVE, slow, codes.size, 8)


def test_extreme_guesses_are_the_same_in_both() -> None:
    """Long runs drive every probability to its limit."""
    bits = np.zeros(3000, np.uint8)
    bits[[1000, 2500, 2501, 2999]] = 1
    codes = bits * 5
    few = np.random.default_rng(0).binomial(5, 0.3, 3000).astype(np.uint8)
    for values, alphabet, width in (
        (bits, 2, 60),
        (codes, 6, 0),
        (codes, 6, 60),
        (few, 6, 60),
    ):
        coded = symbols.adaptive.encode(values, alphabet, width)
        assert (symbols.adaptive.decode(coded, 3000, alphabet, width) == values).all()
        head = bytes([symbols.ADAPTIVE]) + bytes([width]) + symbols.varint(len(coded))
        found = plain.symbols(plain._Stream(head + coded), 3000, alphabet)
        assert found == values.tolist()


def test_forms_of_the_writer_are_those_of_the_page() -> None:
    assert (forms.RAW, forms.LZMA, forms.PLANES) == (0, 1, 2)
    assert (forms.TABLE, forms.MASK, forms.BITS, forms.PARTS) == (3, 4, 5, 6)


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    data = model_of(np.arange(500, dtype=np.float32).reshape(20, 25))
    (tmp_path / "m.onnxz").write_bytes(b"".join(pack_bytes(data)))
    command = [sys.executable, "-m", "onnxshrink.package.plain"]
    done = subprocess.run(
        [*command, tmp_path / "m.onnxz", tmp_path / "m.onnx"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.onnx").read_bytes() == data


@pytest.mark.parametrize("place", [0, 5, 40, -20, -3])
def test_damage_is_noticed(place: int) -> None:
    data = bytearray(b"".join(pack_bytes(model_of(np.arange(500.0)))))
    data[place] ^= 1
    with pytest.raises((ValueError, StopIteration, IndexError, lzma.LZMAError)):
        list(plain.decode_files(bytes(data)))
