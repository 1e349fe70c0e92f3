"""A coder that learns as it goes: smallest for small tensors, microseconds a bit.

Every number is a path of yes-or-no decisions, its highest bit first. Several contexts
guess each decision: what came before in row and column, and how the row, the column
and the last row went so far. A mixer weighs the guesses by how well they did, in the
logistic domain (Mahoney, "Adaptive weighing of context models", 2005), in integers, so
that every machine decodes the same; an arithmetic coder writes what is left.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from onnxshrink.package.reading import Damaged

__all__ = ["decode", "encode"]

Array = np.ndarray[Any, Any]

_TOP = 0xFFFFFFFF
_INPUTS = 6
_ONE = 1 << 16
_LIMIT = 250
_SQUASH = [
    min(_ONE - 32, max(32, round(_ONE / (1 + math.exp(-value / 256)))))
    for value in range(-2047, 2048)
]
"""Probability in 1/65536 by its logit + 2047, a logit in 1/256; no rounding is near a
half, so that no machine differs."""


def _stretched() -> list[int]:
    """Return logits by probability in 1/4096."""
    out = []
    at = 0
    for probability in range(4096):
        middle = probability * 16 + 8
        while at < len(_SQUASH) - 1 and _SQUASH[at] < middle:
            at += 1
        out.append(at - 2047)
    return out


_STRETCH = _stretched()
_RATE = [round(_ONE / (count + 1.5)) for count in range(_LIMIT + 1)]
"""How far a guess moves towards what was seen, by how often it was asked."""


def encode(symbols: Array, alphabet: int, width: int) -> bytes:
    """Return the bytes of ``symbols``, uint8 [count], in rows of ``width`` (0: one)."""
    out = bytearray()
    _run(symbols.tolist(), symbols.size, alphabet, width, None, out)
    return bytes(out)


def decode(data: bytes | memoryview, count: int, alphabet: int, width: int) -> Array:
    """Return uint8 [count], below ``alphabet``.

    Raises:
        Damaged: A number is outside the alphabet, or too few bytes are there.
    """
    found = _run(None, count, alphabet, width, bytes(data), bytearray())
    symbols = np.array(found, np.uint8)
    if int(symbols.max(initial=0)) >= alphabet:
        raise Damaged("a symbol is outside its alphabet")
    return symbols


def _run(
    symbols: list[int] | None,
    count: int,
    alphabet: int,
    width: int,
    data: bytes | None,
    out: bytearray,
) -> list[int]:
    """Encode ``symbols`` into ``out``, or decode ``count`` of them from ``data``.

    One function, because both must take the same steps, and inlined, because a call
    for each bit would double its time.
    """
    bits = max(1, (alphabet - 1).bit_length())
    nodes = 1 << bits
    width = min(width, count) or max(1, count)
    squash, stretch, rate = _SQUASH, _STRETCH, _RATE
    low, high, at = 0, _TOP, 4
    value = int.from_bytes(data[:4].ljust(4, b"\0")) if data is not None else 0
    tables: list[dict[int, int]] = [{} for _ in range(_INPUTS)]
    t0, t1, t2, t3, t4, t5 = tables
    weights: dict[int, list[int]] = {}
    result: list[int] = [0] * count
    above = [0] * width
    columns = [0] * width
    row = row_seen = last_density = 0
    left = left2 = left3 = 0
    for place in range(count):
        column = place % width
        if column == 0:
            row = place // width
            last_density = (row_seen * 64 // width).bit_length()
            row_seen = left = left2 = left3 = 0
        up = above[column]
        up_next = above[column + 1] if column + 1 < width else 0
        density = (columns[column] * 32 // (row + 1)).bit_length()
        here = (row_seen * 64 // (column + 1)).bit_length()
        near = (left > 0) + (left2 > 0) + (left3 > 0)
        k1 = (left << 8 | up) << bits
        k2 = (density << 8 | here << 4 | last_density) << bits
        k3 = column << bits
        k4 = row << bits
        k5 = (near << 8 | (up > 0) << 5 | (up_next > 0) << 4 | density) << bits
        node = 1
        symbol = symbols[place] if symbols is not None else 0
        for shift in range(bits - 1, -1, -1):
            v0 = t0.get(node, 32768 << 8)
            start = v0 & ~255 | 1
            v1 = t1.get(k1 | node, start)
            v2 = t2.get(k2 | node, start)
            v3 = t3.get(k3 | node, start)
            v4 = t4.get(k4 | node, start)
            v5 = t5.get(k5 | node, start)
            s0, s1, s2 = stretch[v0 >> 12], stretch[v1 >> 12], stretch[v2 >> 12]
            s3, s4, s5 = stretch[v3 >> 12], stretch[v4 >> 12], stretch[v5 >> 12]
            weight = weights.get(node)
            if weight is None:
                weight = weights[node] = [16000] * _INPUTS
            w0, w1, w2, w3, w4, w5 = weight
            total = w0 * s0 + w1 * s1 + w2 * s2 + w3 * s3 + w4 * s4 + w5 * s5 >> 16
            total = -2047 if total < -2047 else 2047 if total > 2047 else total
            mixed = squash[total + 2047]
            middle = low + ((high - low) * mixed >> 16)
            if symbols is None:
                bit = 1 if value <= middle else 0
            else:
                bit = symbol >> shift & 1
            if bit:
                high = middle
                aim = _ONE - 1
            else:
                low = middle + 1
                aim = 0
            while not (low ^ high) >> 24:
                if data is None:
                    out.append(high >> 24)
                else:
                    value = value << 8 & _TOP | (data[at] if at < len(data) else 0)
                    at += 1
                low = low << 8 & _TOP
                high = high << 8 & _TOP | 255
            error = (aim - mixed) * 3
            weights[node] = [
                w0 + (s0 * error >> 14),
                w1 + (s1 * error >> 14),
                w2 + (s2 * error >> 14),
                w3 + (s3 * error >> 14),
                w4 + (s4 * error >> 14),
                w5 + (s5 * error >> 14),
            ]
            for table, key, held in (
                (t0, node, v0),
                (t1, k1 | node, v1),
                (t2, k2 | node, v2),
                (t3, k3 | node, v3),
                (t4, k4 | node, v4),
                (t5, k5 | node, v5),
            ):
                asked = held & 255
                guess = held >> 8
                guess += (aim - guess) * rate[asked] >> 16
                table[key] = guess << 8 | (asked + 1 if asked < _LIMIT else asked)
            node = node << 1 | bit
        symbol = node - nodes
        result[place] = symbol
        left3, left2, left = left2, left, symbol
        above[column] = symbol
        if symbol:
            row_seen += 1
            columns[column] += 1
    if data is None:
        # As few bytes as tell the interval; a decoder reads zeros behind them.
        for size in range(5):
            unit = 1 << 32 - 8 * size
            reached = -(-low // unit) * unit
            if reached <= high:
                out += (reached >> 32 - 8 * size).to_bytes(size) if size else b""
                break
    elif at > len(data) + 8:
        raise Damaged("the bytes of a stream end early")
    return result
