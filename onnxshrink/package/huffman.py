"""Canonical Huffman codes in many lanes, as Han, Mao, Dally (2016) store their weights.

Codes have at most 12 bits. Lane ``i % lanes`` has symbol ``i``; whenever a lane holds
fewer than 12 bits it takes the next 16-bit word, which all lanes share.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from onnxshrink.package.reading import Damaged, Reader, varint

__all__ = ["decode", "encode", "size"]

Array = np.ndarray[Any, Any]

_LONGEST = 12
_BITS_A_LANE = 1600
_FEW = 12


def lengths(counts: Array) -> Array:
    """Return code lengths, 1 to 12 bits, for counts above 0 of at least two symbols."""
    counts = counts.astype(np.int64)
    while True:
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (int(count), place, (place,)) for place, count in enumerate(counts)
        ]
        heapq.heapify(heap)
        found = np.zeros(counts.size, np.int64)
        number = counts.size
        while len(heap) > 1:
            first, second = heapq.heappop(heap), heapq.heappop(heap)
            members = first[2] + second[2]
            found[list(members)] += 1
            heapq.heappush(heap, (first[0] + second[0], number, members))
            number += 1
        if int(found.max()) <= _LONGEST:
            return found
        counts = counts // 2 + 1  # flatter, until no code is too long


def _codes(bits: Array) -> tuple[Array, Array]:
    """Return symbols in the order of their codes, and the code of each symbol."""
    order = np.lexsort((np.arange(bits.size), bits))
    steps = 1 << (_LONGEST - bits[order])
    starts = np.cumsum(steps) - steps
    codes = np.empty(bits.size, np.int64)
    codes[order] = starts >> (_LONGEST - bits[order])
    return order, codes


def size(histogram: Array) -> float:
    """Return about how many bytes ``encode`` will take."""
    counts = histogram[histogram > 0]
    bits = int((counts * lengths(counts)).sum())
    return (bits + 12 * (bits // _BITS_A_LANE + 1)) / 8 + counts.size / 2 + 3


def encode(symbols: Array, histogram: Array) -> bytes:
    """Return code lengths, lanes and words.

    Args:
        symbols: uint8 [count].
        histogram: How often each occurs, int64 [alphabet]; two or more do.
    """
    present = np.flatnonzero(histogram)
    rank = np.zeros(histogram.size, np.int64)
    rank[present] = np.arange(present.size)
    bits = lengths(histogram[present])
    _, codes = _codes(bits)
    spans = bits[rank[symbols]]
    code = codes[rank[symbols]]
    lanes = max(1, int(spans.sum()) // _BITS_A_LANE)
    steps = -(-symbols.size // lanes)
    grid = np.zeros(steps * lanes, np.int64)
    grid[: symbols.size] = spans
    spent = np.cumsum(grid.reshape(steps, lanes), axis=0)
    room = -(-spent[-1] // 16) + 2  # words of a lane, the last ones padding
    base = np.cumsum(room) - room
    before = (spent - grid.reshape(steps, lanes) + base * 16).reshape(-1)
    # All bits of all codes, at their places.
    owner = np.repeat(np.arange(symbols.size), spans)
    within = np.arange(owner.size) - np.repeat(np.cumsum(spans) - spans, spans)
    flags = np.zeros(int(room.sum()) * 16, np.uint8)
    flags[before[owner] + within] = code[owner] >> (spans[owner] - 1 - within) & 1
    words = np.packbits(flags).view(">u2")
    taken = np.zeros(lanes, np.int64)
    used = np.zeros(lanes, np.int64)
    out: list[Array] = []
    for step in range(steps):
        width = min(lanes, symbols.size - step * lanes)
        short = np.flatnonzero(16 * taken[:width] - used[:width] < _LONGEST)
        out.append(words[base[short] + taken[short]])
        taken[short] += 1
        used = spent[step]
    flat = np.concatenate(out).astype("<u2")
    if bits.size % 2:
        bits = np.append(bits, 0)
    table = (bits[::2] | bits[1::2] << 4).astype(np.uint8)
    return bytes(table) + varint(lanes) + varint(flat.size) + flat.tobytes()


def decode(reader: Reader, count: int, alphabet: int) -> Array:
    """Return uint8 [count], below ``alphabet``.

    Raises:
        Damaged: The lengths are no code, or the words do not fit.
    """
    table = reader.array((alphabet + 1) // 2, "u1")
    bits = np.stack([table & 15, table >> 4], axis=1).reshape(-1)[:alphabet]
    bits = bits.astype(np.int64)
    lanes = reader.number(count)
    size = reader.number(count + lanes)
    words = reader.array(size, "<u2")
    if alphabet < 2 or int(bits.min()) < 1 or int(bits.max()) > _LONGEST or not lanes:
        raise Damaged("lengths are those of no code")
    order, _ = _codes(bits)
    spans = 1 << (_LONGEST - bits[order])
    if int(spans.sum()) != 1 << _LONGEST:
        raise Damaged("lengths are those of no code")
    entries = np.repeat((order << 4 | bits[order]).astype(np.uint32), spans)
    if lanes <= _FEW:
        return _few(words, entries, count, lanes)
    out = np.empty(count, np.uint8)
    window = np.zeros(lanes, np.uint32)
    held = np.zeros(lanes, np.uint32)
    at = 0
    half, longest = np.uint32(16), np.uint32(_LONGEST)
    low = np.uint32((1 << _LONGEST) - 1)
    for start in range(0, count, lanes):
        width = min(lanes, count - start)
        now, have = window[:width], held[:width]
        short = (have < _LONGEST).nonzero()[0]
        stop = at + short.size
        if stop > words.size:
            raise Damaged("the words of a stream end early")
        now[short] = now[short] << half | words[at:stop]
        have[short] += half
        at = stop
        entry = entries[(now >> (have - longest)) & low]
        have -= entry & np.uint32(15)
        out[start : start + width] = entry >> np.uint32(4)
    if at != words.size:
        raise Damaged("words of a stream are left over")
    return out


def _few(words: Array, entries: Array, count: int, lanes: int) -> Array:
    """Decode symbol by symbol, which is faster for a few lanes."""
    supply = iter(words.tolist())
    table: list[int] = entries.tolist()
    window, held = [0] * lanes, [0] * lanes
    out = bytearray(count)
    lane = 0
    low = (1 << _LONGEST) - 1
    try:
        for place in range(count):
            now, have = window[lane], held[lane]
            if have < _LONGEST:
                now = (now << 16 | next(supply)) & 0xFFFFFFFF
                window[lane] = now
                have += 16
            entry = table[now >> (have - _LONGEST) & low]
            held[lane] = have - (entry & 15)
            out[place] = entry >> 4
            lane = lane + 1 if lane + 1 < lanes else 0
    except StopIteration:
        raise Damaged("the words of a stream end early") from None
    if next(supply, None) is not None:
        raise Damaged("words of a stream are left over")
    return np.frombuffer(out, np.uint8)
