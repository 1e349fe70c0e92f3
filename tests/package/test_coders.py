"""The coders of packages: every one gives back what it was given."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxshrink.package import adaptive, huffman, rans, symbols
from onnxshrink.package.forms import (
    BITS,
    MASK,
    PARTS,
    PLANES,
    RAW,
    TABLE,
    Layout,
    decode_block,
    decode_nbytes,
    encode_block,
)
from onnxshrink.package.reading import Damaged, Reader, varint

Array = np.ndarray[Any, Any]


def entropy(values: Array) -> float:
    """Shannon's bound in bits, independent of the code under test."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / values.size)).sum())


def skewed(count: int, alphabet: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(alphabet, 0.3))
    return rng.choice(alphabet, count, p=share).astype(np.uint8)


def back(coded: bytes, count: int, alphabet: int) -> Array:
    reader = Reader(coded)
    found = symbols.decode_symbols(reader, count, alphabet)
    reader.end()
    return found


def block_back(coded: bytes, count: int) -> Array:
    reader = Reader(coded)
    found = decode_block(reader, count)
    reader.end()
    return found


@given(st.lists(st.integers(0, 2**62), min_size=1))
def test_numbers_of_seven_bits_a_byte_come_back(values: list[int]) -> None:
    reader = Reader(b"".join(varint(value) for value in values))
    assert [reader.number(2**62) for _ in values] == values
    reader.end()


@pytest.mark.parametrize("lanes", [1, 3, 12, 13, 64, 700])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 256])
def test_lanes_of_any_number_give_the_symbols_back(lanes: int, alphabet: int) -> None:
    count = lanes * 16 + 5000
    values = skewed(count, alphabet)
    counts = np.bincount(values, minlength=alphabet)
    freqs = rans.frequencies(counts)[None]
    states, words = rans.encode(values, freqs, lanes)
    assert np.array_equal(rans.decode(states, words, freqs, count), values)


def test_contexts_each_have_their_own_frequencies() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 3, 20000).astype(np.uint8)
    values = (rng.random(20000) < np.array([0.01, 0.3, 0.9])[contexts]).astype(np.uint8)
    freqs = np.stack(
        [
            rans.frequencies(np.bincount(values[contexts == c], minlength=2))
            for c in range(3)
        ]
    )
    for lanes in (5, 100):
        states, words = rans.encode(values, freqs, lanes, contexts)
        found = rans.decode(states, words, freqs, values.size, contexts)
        assert np.array_equal(found, values)
    bound = sum(entropy(values[contexts == c]) for c in range(3))
    assert 16 * words.size + 32 * states.size < 1.01 * bound + 24 * 100


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=256).filter(any))
def test_frequencies_sum_to_4096_and_leave_out_nothing(counts: list[int]) -> None:
    found = rans.frequencies(np.array(counts))
    assert found.sum() == 4096
    assert ((found > 0) == (np.array(counts) > 0)).all()


def test_a_coded_stream_is_within_two_percent_of_shannon_and_fast_lanes_are_many() -> (
    None
):
    values = np.clip(np.random.default_rng(0).normal(20, 2, 1 << 18), 0, 39)
    coded = symbols.encode_symbols(values.astype(np.uint8), 40)
    assert coded[0] == symbols.RANS
    assert 8 * len(coded) < 1.02 * entropy(values.astype(np.uint8))


def test_huffman_lengths_are_those_on_paper() -> None:
    # 8 4 2 1 1: 1, 2, 3, 4 and 4 bits.
    counts = np.array([1, 4, 8, 1, 2])
    assert huffman.lengths(counts).tolist() == [4, 2, 1, 4, 3]


def test_huffman_codes_are_at_most_twelve_bits_long() -> None:
    counts = 2 ** np.arange(30)
    lengths = huffman.lengths(counts)
    assert lengths.max() <= 12
    assert (0.5**lengths).sum() == 1


@pytest.mark.parametrize("count", [1, 2, 17, 5000, 300_000])
@pytest.mark.parametrize("alphabet", [2, 5, 256])
def test_huffman_codes_give_the_symbols_back(count: int, alphabet: int) -> None:
    values = skewed(count, alphabet)
    values[: min(count, 2)] = np.arange(min(count, 2))
    if count == 1:
        return
    histogram = np.bincount(values, minlength=alphabet)
    reader = Reader(huffman.encode(values, histogram))
    present = np.flatnonzero(histogram).astype(np.uint8)
    found = huffman.decode(reader, count, present.size)
    reader.end()
    assert np.array_equal(present[found], values)


@given(
    st.integers(1, 256).flatmap(
        lambda alphabet: st.tuples(
            st.just(alphabet),
            st.lists(st.integers(0, alphabet - 1), max_size=300),
            st.integers(0, 40),
        )
    )
)
def test_any_symbols_come_back(given_: tuple[int, list[int], int]) -> None:
    alphabet, listed, width = given_
    values = np.array(listed, np.uint8)
    for tiny in (False, True):
        coded = symbols.encode_symbols(values, alphabet, width, tiny=tiny)
        assert np.array_equal(back(coded, values.size, alphabet), values)


@given(st.integers(1, 16), st.integers(0, 50), st.data())
def test_the_adaptive_coder_gives_any_symbols_back(
    alphabet: int, width: int, data: st.DataObject
) -> None:
    listed = data.draw(st.lists(st.integers(0, alphabet - 1), max_size=200))
    values = np.array(listed, np.uint8)
    coded = adaptive.encode(values, alphabet, width)
    found = adaptive.decode(coded, values.size, alphabet, width)
    assert np.array_equal(found, values)


def test_densities_of_rows_and_columns_are_worth_contexts() -> None:
    rng = np.random.default_rng(1)
    density = np.exp(rng.normal(-3, 1, (300, 1)) + rng.normal(0, 1, (1, 400)))
    mask = (rng.random((300, 400)) < np.clip(density, 0, 0.9)).astype(np.uint8)
    flat = mask.reshape(-1)
    with_rows = symbols.encode_symbols(flat, 2, 400)
    without = symbols.encode_symbols(flat, 2)
    assert with_rows[0] == symbols.CONTEXTS
    assert len(with_rows) < 0.85 * len(without)
    assert np.array_equal(back(with_rows, flat.size, 2), flat)


# --- forms ------------------------------------------------------------------------


def odd_floats(dtype: Any, count: int) -> Array:
    """NaNs with payloads, negative zeros, infinities, subnormals between numbers."""
    rng = np.random.default_rng(2)
    values = (rng.normal(size=count) * 0.05).astype(dtype)
    bits = values.view(f"u{values.itemsize}")
    top = np.array(1 << 8 * values.itemsize - 1, bits.dtype)
    bits[::7] = 0
    bits[1::11] = top
    bits[2::13] = ~np.array(0, bits.dtype)
    bits[3::17] = 1
    return values


FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_floats_of_any_kind_come_back_bit_for_bit(dtype: Any) -> None:
    raw = np.frombuffer(odd_floats(dtype, 5000).tobytes(), np.uint8)
    layout = Layout(np.dtype(dtype).itemsize, True, 50)
    coded = encode_block(raw, layout)
    assert np.array_equal(block_back(coded, raw.size), raw)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(np.float32, 0.87), (ml_dtypes.bfloat16, 0.70), (np.float16, 0.87)],
)
def test_exponents_of_trained_floats_are_worth_their_own_plane(
    dtype: Any, most: float
) -> None:
    values = (np.random.default_rng(0).normal(size=1 << 17) * 0.05).astype(dtype)
    raw = np.frombuffer(values.tobytes(), np.uint8)
    coded = encode_block(raw, Layout(values.itemsize, True))
    assert len(coded) < most * raw.size


@given(
    st.binary(max_size=600),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.integers(0, 20),
    st.sampled_from([1, 2, 4, 8]),
)
def test_any_bytes_come_back_whatever_they_are_said_to_be(
    data: bytes, size: int, floating: bool, width: int, bits: int
) -> None:
    raw = np.frombuffer(data, np.uint8)
    layout = Layout(1 if bits < 8 else size, floating, width, bits)
    coded = encode_block(raw, layout)
    assert np.array_equal(block_back(coded, raw.size), raw)
    assert len(coded) <= raw.size + 1


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 20),
    st.floats(0, 1),
    st.sampled_from(FLOATS),
    st.integers(0, 2**32 - 1),
)
def test_pruned_and_shared_values_come_back(
    rows: int, width: int, levels: int, zeros: float, dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=levels).astype(dtype)
    values = table[rng.integers(0, levels, rows * width)]
    values[rng.random(values.size) < zeros] = 0
    raw = np.frombuffer(values.tobytes(), np.uint8)
    coded = encode_block(raw, Layout(values.itemsize, True, width))
    assert np.array_equal(block_back(coded, raw.size), raw)


def test_a_pruned_weight_of_16_values_takes_what_shannon_says() -> None:
    rng = np.random.default_rng(0)
    codes = rng.binomial(15, 0.5, 1 << 17)
    kept = rng.random(1 << 17) < 0.1
    table = np.concatenate([[0], rng.normal(size=16)]).astype(np.float32)
    values = table[np.where(kept, codes + 1, 0)]
    raw = np.frombuffer(values.tobytes(), np.uint8)
    coded = encode_block(raw, Layout(4, True))
    assert 8 * len(coded) < 1.03 * (entropy(values) + 17 * 32)


def test_small_integers_packed_in_bytes_are_seen_one_by_one() -> None:
    rng = np.random.default_rng(0)
    density = np.exp(rng.normal(-2, 1.5, (512, 1)))
    kept = rng.random((512, 128)) < np.clip(density, 0, 1)
    items = np.where(kept, rng.integers(1, 16, (512, 128)), 0).astype(np.uint8)
    flat = items.reshape(-1)
    raw = flat[::2] | flat[1::2] << 4
    coded = encode_block(raw, Layout(1, False, 128, 4))
    assert np.array_equal(block_back(coded, raw.size), raw)
    assert len(coded) < 0.95 * len(encode_block(raw, Layout(1)))


def test_the_same_values_give_the_same_bytes() -> None:
    raw = np.frombuffer(odd_floats(np.float32, 20000).tobytes(), np.uint8)
    layout = Layout(4, True, 100)
    assert encode_block(raw, layout) == encode_block(raw.copy(), layout)


def test_tables_larger_than_their_block_are_refused() -> None:
    """Parts of one element with 256 values each, from a few bytes."""
    head = bytes([PARTS, 8, 255]) + varint(1000) + varint(1)
    with pytest.raises(Damaged, match="are not 1000 parts"):
        decode_block(Reader(head + bytes([PLANES, 8]) + bytes([1, 0] * 8)), 8000)


@given(st.binary(max_size=200), st.integers(0, 100))
def test_bytes_of_no_block_are_one_kind_of_error(data: bytes, count: int) -> None:
    reader = Reader(data)
    try:
        found = decode_block(reader, count)
    except Damaged:
        return
    assert found.size == count


def blocks(form: int) -> tuple[Array, Layout]:
    """A block of many elements that is coded in this form."""
    rng = np.random.default_rng(4)
    count = 1 << 18
    if form == BITS:
        share = rng.uniform(0.02, 0.5, (256, 1))
        packed = rng.binomial(15, share, (256, 2048)).astype(np.uint8).reshape(-1)
        return packed[::2] | packed[1::2] << 4, Layout(1, width=2048, bits=4)
    values = rng.normal(size=count).astype(np.float32)
    if form == TABLE:
        values = np.round(values)
    if form == MASK:
        density = np.exp(rng.normal(-3, 1, (256, 1)))
        values[(rng.random((256, 1024)) > density).reshape(-1)] = 0
    return values.view(np.uint8), Layout(4, True, 1024)


@pytest.mark.parametrize("form", [PLANES, TABLE, MASK, BITS])
def test_decoding_holds_no_more_than_is_said(form: int) -> None:
    raw, layout = blocks(form)
    coded = encode_block(raw, layout)
    assert coded[0] == form
    tracemalloc.start()
    decode_block(Reader(coded), raw.size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = decode_nbytes(form, layout.size, raw.size)
    inside = decode_nbytes(TABLE, 1, 2 * raw.size) if form == BITS else 0
    assert raw.size < peak < said + inside + (3 << 19)
    less = encode_block(raw, layout, most=said - 1)
    assert less[0] != form
    assert len(less) > len(coded)
    assert np.array_equal(block_back(less, raw.size), raw)
    assert encode_block(raw, layout, most=raw.size)[0] == RAW
