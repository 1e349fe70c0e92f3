"""Sequences of small numbers, each by the shortest of a few coders.

Numbers of equal distribution go through one table of frequencies. Where the density of
rows and columns tells something, each row and each column has a class, the sum of both
is the context of a number, and each context has a table: all of that is sent along, so
that contexts are known before a number is decoded, and lanes run side by side.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

import lzma
import math
import zlib
from typing import Any

import numpy as np

from onnxshrink.package import adaptive, huffman, rans
from onnxshrink.package.reading import Damaged, Reader, varint

__all__ = ["decode_symbols", "encode_symbols", "repeats", "squeeze", "unlzma"]

Array = np.ndarray[Any, Any]

PACKED, CONSTANT, RANS, CONTEXTS, LZMA, HUFFMAN, ADAPTIVE, DEFLATE = range(8)

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 22}]
"""Of all LZMA streams in a package: a decoder takes 4 MiB, whatever they say."""

_MOST_CONTEXTS = 32
_BITS_A_LANE = 1600
"""A lane costs about 12 bits (0.75 %): more are faster, fewer are smaller."""
_SYMBOLS_A_LANE = 8192
"""Rare ones take few bits and many steps: some lanes for these, too."""
_MOST_LANES = 8192
_SAMPLE = 1 << 16
_WORTH = 0.99
"""Contexts take time: what saves less than a hundredth is left."""
_FEW = 4096
"""Numbers up to which every coder is tried."""
_QUICK = 0.004
"""Share of a block's bytes that deflate may take more: it decodes in no time."""
_QUICK_SMALL = 0.02
_SMALL = 1 << 15
"""The same for this many numbers at most: few lanes are slowest."""
_ADAPTIVE_MOST = 1 << 20
"""Numbers up to which the adaptive coder, about a microsecond a bit, is tried."""


def encode_symbols(
    symbols: Array,
    alphabet: int,
    width: int = 0,
    *,
    around: int = 0,
    worth: float = 0.995,
    tiny: bool = False,
) -> bytes:
    """Return the shortest coding, as far as estimates tell.

    Args:
        symbols: uint8 [count], below ``alphabet``; at most 2**25.
        alphabet: At most 256.
        width: Numbers in a row, if they are a matrix; 0 if not.
        around: Bytes of the same block beside these, of which lanes may take a share.
        worth: Share of the plain bytes above which coding does not pay its time.
        tiny: Try the adaptive coder as well, which decodes slowly.
    """
    count = symbols.size
    histogram = np.bincount(symbols, minlength=alphabet)
    if count == 0 or int(histogram.max()) == count:
        return bytes([CONSTANT, int(symbols[0]) if count else 0])
    plans: list[_TableCoding] = []
    entropy = _entropy(histogram)
    plain = count * _width(alphabet) / 8
    if entropy / 8 < worth * plain:
        plans.append(_TableCoding(symbols, histogram, entropy, around, tiny))
        if width > 1 and count > width and count % width == 0:
            classes = _best_contexts(symbols, alphabet, width, entropy)
            if classes is not None:
                plans.append(
                    _TableCoding(symbols, histogram, entropy, around, tiny, classes)
                )
    found: list[bytes] = []
    best = min([plan.estimate for plan in plans], default=plain)
    huffmans = huffman.size(histogram) if plans and count <= _FEW else math.inf
    if min(best, huffmans) >= worth * plain or count <= _FEW:
        found.append(bytes([PACKED]) + _packed(symbols, alphabet))
    if huffmans < min(1.02 * best, worth * plain):
        coded = huffman.encode(symbols, histogram)
        found.append(bytes([HUFFMAN]) + _used(histogram) + coded)
    if best < worth * plain and best < 1.02 * huffmans:
        found += [plan.encode() for plan in plans if plan.estimate == best]
    if repeats(symbols, min(len(one) for one in found) / count):
        coded = squeeze(symbols.tobytes())
        found.append(bytes([LZMA]) + varint(len(coded)) + coded)
    shortest = min(len(one) for one in found)
    if not tiny and shortest < worth * plain:
        share = _QUICK_SMALL if count <= _SMALL else _QUICK
        coded = _deflated(symbols)
        if len(coded) <= shortest + share * (shortest + around):
            return coded
    if tiny and count <= _ADAPTIVE_MOST and shortest < 0.97 * plain:
        coded = adaptive.encode(symbols, alphabet, width)
        found.append(bytes([ADAPTIVE]) + varint(width) + varint(len(coded)) + coded)
    return min(found, key=len)


def decode_symbols(
    reader: Reader, count: int, alphabet: int, *, inside: bool = False
) -> Array:
    """Return uint8 [count], each below ``alphabet``.

    Args:
        reader: Where the coding starts.
        count: Numbers to decode.
        alphabet: What they are below.
        inside: Whether they are classes of contexts, which have no contexts.

    Raises:
        Damaged: The coding is not what ``encode_symbols`` writes.
    """
    coder = reader.byte()
    if coder == CONSTANT:
        value = reader.byte()
        if value >= alphabet:
            raise Damaged("a symbol is outside its alphabet")
        return np.full(count, value, np.uint8)
    if coder == PACKED:
        symbols = _unpacked(reader, count, alphabet)
    elif coder == LZMA:
        data = reader.take(reader.number(reader.left))
        symbols = np.frombuffer(unlzma(data, count), np.uint8)
    elif coder == DEFLATE:
        data = reader.take(reader.number(reader.left))
        symbols = np.frombuffer(_inflated(data, count), np.uint8)
    elif coder == ADAPTIVE:
        width = reader.number(1 << 32)
        data = reader.take(reader.number(reader.left))
        return adaptive.decode(data, count, alphabet, width)
    elif coder in (RANS, HUFFMAN) or (coder == CONTEXTS and not inside):
        return _from_table(reader, coder, count, alphabet)
    else:
        raise Damaged(f"there is no coder {coder}")
    if int(symbols.max(initial=0)) >= alphabet:
        raise Damaged("a symbol is outside its alphabet")
    return symbols


def unlzma(data: bytes | memoryview, count: int) -> bytes:
    """Return exactly ``count`` bytes.

    Raises:
        Damaged: There are fewer or more, or it is no LZMA.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    try:
        out = decoder.decompress(data, max_length=count)
        whole = decoder.eof or not decoder.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise Damaged(f"LZMA data are broken: {error}") from error
    if len(out) != count or not whole:
        raise Damaged("LZMA data are not of the length they should have")
    return out


def squeeze(data: bytes) -> bytes:
    """Return LZMA data that ``unlzma`` takes."""
    # An encoder's memory, and the time to clear it, follow the dictionary.
    size = min(1 << 22, max(1 << 12, 1 << len(data).bit_length()))
    filters = [{**LZMA_FILTERS[0], "dict_size": size}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def _deflated(symbols: Array) -> bytes:
    """Return Huffman codes as zlib writes them, without a search for repeats."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(symbols.data) + coder.flush()
    return bytes([DEFLATE]) + varint(len(coded)) + coded


def _inflated(data: bytes | memoryview, count: int) -> bytes:
    """Return exactly ``count`` bytes.

    Raises:
        Damaged: There are fewer or more, or it is no deflate.
    """
    decoder = zlib.decompressobj(-15)
    try:
        out = decoder.decompress(data, count + 1)
    except zlib.error as error:
        raise Damaged(f"deflate data are broken: {error}") from error
    if len(out) != count or not decoder.eof or decoder.unused_data:
        raise Damaged("deflate data are not of the length they should have")
    return out


def repeats(values: Array, ratio: float) -> bool:
    """Whether LZMA may take less than ``ratio`` of the bytes, by zlib on a part."""
    start = max(0, values.nbytes - _SAMPLE) // 16 * 8
    sample = values.view(np.uint8)[start : start + _SAMPLE].tobytes()
    close = 1.05 if values.nbytes <= 1 << 10 else 0.98
    return len(zlib.compress(sample, 6)) < close * ratio * len(sample)


def _entropy(histogram: Array) -> float:
    """Return the bits of all counted numbers, an ideal coder for each row taken."""
    counts = histogram.reshape(-1, histogram.shape[-1]).astype(np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, totals, out=np.ones_like(counts), where=counts > 0)
    return float(-(counts * np.log2(share)).sum())


# --- plain forms ------------------------------------------------------------------


def _width(alphabet: int) -> int:
    """Return the bits of a packed symbol: 1, 2, 4 or 8."""
    bits = max(1, (alphabet - 1).bit_length())
    return 1 << (bits - 1).bit_length()


def _packed(symbols: Array, alphabet: int) -> bytes:
    bits = _width(alphabet)
    if bits == 8:
        return symbols.tobytes()
    group = 8 // bits
    padded = np.zeros(-(-symbols.size // group) * group, np.uint8)
    padded[: symbols.size] = symbols
    packed = np.zeros(padded.size // group, np.uint8)
    for place in range(group):
        packed |= padded[place::group] << (bits * place)
    return packed.tobytes()


def _unpacked(reader: Reader, count: int, alphabet: int) -> Array:
    bits = _width(alphabet)
    packed = reader.array((count * bits + 7) // 8, "u1")
    if bits == 8:
        return packed
    group = 8 // bits
    out = np.empty((packed.size, group), np.uint8)
    for place in range(group):
        out[:, place] = (packed >> (bits * place)) & ((1 << bits) - 1)
    return out.reshape(-1)[:count]


# --- tables of frequencies --------------------------------------------------------


def _used(histogram: Array) -> bytes:
    """Return which symbols occur: runs, each as a gap and a length."""
    present = np.flatnonzero(histogram)
    breaks = np.flatnonzero(np.diff(present) > 1)
    starts = present[np.concatenate([[0], breaks + 1])]
    stops = present[np.concatenate([breaks, [present.size - 1]])] + 1
    out = varint(starts.size - 1)
    before = 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        out += varint(start - before) + varint(stop - start - 1)
        before = stop
    return out


def _read_used(reader: Reader, alphabet: int) -> Array:
    runs = reader.number(alphabet) + 1
    present: list[int] = []
    at = 0
    for _ in range(runs):
        start = at + reader.number(alphabet)
        at = start + reader.number(alphabet) + 1
        if at > alphabet:
            raise Damaged("a symbol is outside its alphabet")
        present.extend(range(start, at))
    return np.array(present, np.uint8)


class _TableCoding:
    """Coding by tables of frequencies, known by its size before it is done.

    Attributes:
        estimate: Bytes it will take, but for a few.
    """

    def __init__(
        self,
        symbols: Array,
        histogram: Array,
        entropy: float,
        around: int,
        tiny: bool,
        classes: tuple[Array, Array, int, float] | None = None,
    ) -> None:
        self._symbols = symbols
        self._histogram = histogram
        self._classes = classes
        present = int(np.count_nonzero(histogram))
        bits = entropy
        side = 1.3 * present
        if classes is not None:
            bits = classes[3]
            side = 0.0
        tail = rans.tail_symbols(present)[1]
        most = min(_MOST_LANES, symbols.size // tail)
        lanes = int((bits + 2 * around) / _BITS_A_LANE)
        lanes += symbols.size // _SYMBOLS_A_LANE
        if tiny:
            lanes //= 16
        self._lanes = min(most, max(1, lanes))
        self.estimate = (bits + 12 * self._lanes) / 8 + side
        if self._lanes == 0:
            self.estimate = math.inf  # a few symbols; others are shorter

    def encode(self) -> bytes:
        """Do it."""
        histogram, symbols = self._histogram, self._symbols
        present = np.flatnonzero(histogram)
        rank = np.zeros(histogram.size, np.uint8)
        rank[present] = np.arange(present.size)
        ranked = rank[symbols]
        contexts = None
        counts = histogram[present][None]
        if self._classes is None:
            out = bytes([RANS]) + _used(histogram)
        else:
            rows, columns, number, _ = self._classes
            contexts = _contexts(rows, columns, number)
            counts = _counted(ranked, contexts, present.size, number)
            out = bytes([CONTEXTS]) + _used(histogram) + varint(columns.size)
            out += bytes([number - 1])
            out += encode_symbols(rows, number) + encode_symbols(columns, number)
        freqs = np.stack([rans.frequencies(row) for row in counts])
        out += b"".join(varint(one) for row in freqs[:, :-1].tolist() for one in row)
        states, words = rans.encode(ranked, freqs, self._lanes, contexts)
        out += varint(self._lanes) + varint(words.size)
        return out + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def _from_table(reader: Reader, coder: int, count: int, alphabet: int) -> Array:
    present = _read_used(reader, alphabet)
    if coder == HUFFMAN:
        return present[huffman.decode(reader, count, present.size)]
    contexts = None
    number = 1
    if coder == CONTEXTS:
        width = reader.number(count)
        number = reader.byte() + 1
        if width == 0 or count % width or number > _MOST_CONTEXTS:
            raise Damaged("contexts do not fit their numbers")
        rows = decode_symbols(reader, count // width, number, inside=True)
        columns = decode_symbols(reader, width, number, inside=True)
        contexts = _contexts(rows, columns, number)
    freqs = np.empty((number, present.size), np.int64)
    for row in freqs:
        for place in range(present.size - 1):
            row[place] = reader.number(rans.TOTAL)
        row[-1] = rans.TOTAL - int(row[:-1].sum())
        if row[-1] < 0:
            raise Damaged("frequencies are more than they may be")
    lanes = reader.number(count)
    size = reader.number(count)
    states = reader.array(lanes, "<u4")
    words = reader.array(size, "<u2")
    if lanes == 0:
        raise Damaged("a stream has no lanes")
    return present[rans.decode(states, words, freqs, count, contexts)]


# --- contexts ---------------------------------------------------------------------


def _contexts(rows: Array, columns: Array, number: int) -> Array:
    """Return the context of each number of a matrix, uint8 [rows * columns]."""
    total = rows[:, None] + columns  # below 64
    return np.asarray(np.minimum(total, number - 1).reshape(-1))


def _counted(ranked: Array, contexts: Array, size: int, number: int) -> Array:
    joint = contexts.astype(np.int32) * size + ranked
    return np.bincount(joint, minlength=number * size).reshape(number, size)


def _best_contexts(
    symbols: Array, alphabet: int, width: int, entropy: float
) -> tuple[Array, Array, int, float] | None:
    """Return classes of rows and columns, contexts, and all bits, if they pay."""
    matrix = symbols.reshape(-1, width)
    present = np.flatnonzero(np.bincount(symbols, minlength=alphabet))
    best = entropy * _WORTH - 8 * 16
    chosen = None
    for rows, columns in _effects(matrix, alphabet):
        spread = float(np.ptp(rows) + np.ptp(columns))
        if not math.isfinite(spread) or spread == 0:
            continue
        for number in (4, 8, 16, 24):
            step = spread / number
            row_class = _classes(rows, step)
            column_class = _classes(columns, step)
            # The sum's extremes are rare: they join their neighbours.
            top = int(row_class.max()) + int(column_class.max())
            size = min(top + 1, _MOST_CONTEXTS)
            contexts = _contexts(row_class, column_class, size)
            counts = _counted(symbols, contexts, alphabet, size)
            cost = _entropy(counts) + 12 * size * (present.size - 1)
            for part in (row_class, column_class):
                cost += _entropy(np.bincount(part)) + 64
            if cost < best:
                best = cost
                chosen = row_class, column_class, size, cost
    return chosen


def _classes(effects: Array, step: float) -> Array:
    scaled = np.rint((effects - effects.min()) / step)
    return np.asarray(np.minimum(scaled, _MOST_CONTEXTS - 1).astype(np.uint8))


def _effects(matrix: Array, alphabet: int) -> list[tuple[Array, Array]]:
    """Return what rows and columns add up to, in a scale where that is a context."""
    if alphabet == 2:
        return [(_log_odds(matrix.mean(axis=1)), _log_odds(matrix.mean(axis=0)))]
    middle = np.bincount(matrix.reshape(-1), minlength=alphabet).argmax()
    away = np.abs(np.arange(alphabet) - middle).astype(np.float32)[matrix]
    with np.errstate(divide="ignore"):
        spread = tuple(
            np.log2(np.maximum(away.mean(axis=axis), 2.0**-10)) for axis in (1, 0)
        )
    # Exponents: the mean itself is the logarithm of a scale.
    level = matrix.mean(axis=1), matrix.mean(axis=0)
    return [(spread[0], spread[1]), (level[0], level[1])]


def _log_odds(share: Array) -> Array:
    kept = np.clip(share, 2.0**-12, 1 - 2.0**-12)
    return np.asarray(np.log2(kept / (1 - kept)))
