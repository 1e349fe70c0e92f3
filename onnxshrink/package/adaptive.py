"""A coder that learns as it goes: smallest for small tensors, microseconds a bit.

Whether a number of a mask is one is guessed from its column so far and from how its row
does against its columns, and twice more from that guess and its neighbours; numbers of
more than two values are paths of yes-or-no decisions, the highest bit first. A mixer
weighs the guesses by how well they did, in the logistic domain (Mahoney, "Adaptive
weighing of context models for lossless data compression", 2005); an arithmetic coder
writes what is left. All of it is integers, so that every machine decodes the same.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxshrink.package.reading import Damaged

__all__ = ["decode", "encode"]

Array = np.ndarray[Any, Any]
Code = Callable[[int, int], int]
"""Code one bit, given the probability of a one in 1/65536; return the bit."""

_TOP = 0xFFFFFFFF
_ONE = 1 << 16
_ROW, _COLUMN = 160, 10
"""Numbers that what is known beforehand of a row, and of a column, counts for."""
_LIMIT = 255
"""A guess that was asked this often moves no slower than then."""


@functools.cache
def _tables() -> tuple[list[int], list[int]]:
    """Return probabilities in 1/65536 by logit + 2047, and logits by probability / 4.

    A logit is in 1/256. No value is nearer than 3e-4 to where rounding turns, so that
    exp is the same on every machine.
    """
    squash = [
        min(_ONE - 32, max(32, round(_ONE / (1 + math.exp(-logit / 256)))))
        for logit in range(-2047, 2048)
    ]
    stretch = []
    at = 0
    for quarter in range(_ONE // 4):
        while at < len(squash) - 1 and squash[at] < 4 * quarter + 2:
            at += 1
        stretch.append(at - 2047)
    return squash, stretch


def encode(symbols: Array, alphabet: int, width: int) -> bytes:
    """Return the bytes of ``symbols``, uint8 [count], in rows of ``width`` (0: one)."""
    coder = _Encoder()
    _model(symbols.tolist(), symbols.size, alphabet, width, coder.code)
    return coder.end()


def decode(data: bytes | memoryview, count: int, alphabet: int, width: int) -> Array:
    """Return uint8 [count], below ``alphabet``.

    Raises:
        Damaged: A number is outside the alphabet, or too few bytes are there.
    """
    coder = _Decoder(bytes(data))
    found = _model(None, count, alphabet, width, coder.code)
    coder.end()
    symbols = np.array(found, np.uint8)
    if int(symbols.max(initial=0)) >= alphabet:
        raise Damaged("a symbol is outside its alphabet")
    return symbols


class _Encoder:
    """An arithmetic coder: the interval from ``low`` to ``high`` gets narrower."""

    def __init__(self) -> None:
        self._low, self._high = 0, _TOP
        self._out = bytearray()

    def code(self, probability: int, bit: int) -> int:
        middle = self._low + ((self._high - self._low) * probability >> 16)
        if bit:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) >> 24:
            self._out.append(self._high >> 24)
            self._low = self._low << 8 & _TOP
            self._high = self._high << 8 & _TOP | 255
        return bit

    def end(self) -> bytes:
        """Return all bytes, the last ones as few as tell the interval."""
        for size in range(5):
            unit = 1 << 32 - 8 * size
            reached = -(-self._low // unit) * unit
            if reached <= self._high:
                last = (reached >> 32 - 8 * size).to_bytes(size) if size else b""
                return bytes(self._out) + last
        raise AssertionError("four bytes always tell")


class _Decoder:
    """Follows the encoder's interval; zeros stand behind the bytes."""

    def __init__(self, data: bytes) -> None:
        self._low, self._high = 0, _TOP
        self._data = data
        self._at = 4
        self._value = int.from_bytes(data[:4].ljust(4, b"\0"))

    def code(self, probability: int, bit: int) -> int:
        middle = self._low + ((self._high - self._low) * probability >> 16)
        found = 1 if self._value <= middle else 0
        if found:
            self._high = middle
        else:
            self._low = middle + 1
        while not (self._low ^ self._high) >> 24:
            byte = self._data[self._at] if self._at < len(self._data) else 0
            self._at += 1
            self._value = self._value << 8 & _TOP | byte
            self._low = self._low << 8 & _TOP
            self._high = self._high << 8 & _TOP | 255
        return found

    def end(self) -> None:
        """Hold that the bytes were as many as the numbers needed."""
        if not self._at - 4 <= len(self._data) <= self._at:
            raise Damaged("the bytes of a stream end early, or late")


def _model(
    symbols: list[int] | None, count: int, alphabet: int, width: int, code: Code
) -> list[int]:
    width = min(width, count) or max(1, count)
    if alphabet == 2:
        return _mask(symbols, count, width, code)
    return _tree(symbols, count, alphabet, width, code)


def _mask(symbols: list[int] | None, count: int, width: int, code: Code) -> list[int]:
    """Code a matrix of zeros and ones, row by row."""
    squash, stretch = _tables()
    out = [0] * count
    columns = [0] * width  # ones so far
    above, above2 = [0] * (width + 2), [0] * (width + 2)  # the rows before, padded
    now = [0] * (width + 2)
    first: dict[int, list[int]] = {}
    second: dict[int, list[int]] = {}
    w0, w1, w2 = 50000, 12000, 12000
    total = row = row_ones = expected = left = left2 = left3 = 0
    share = prior = 0
    for place in range(count):
        column = place % width
        if column == 0:
            row = place // width
            share = (2 * total + 1 << 16) // (2 * place + 2)
            prior = _ROW * share
            above2, above, now = above, now, [0] * (width + 2)
            row_ones = expected = left = left2 = left3 = 0
        # The column's share, its odds times how the row does against its columns.
        own = ((columns[column] << 16) + _COLUMN * share) // (row + _COLUMN)
        odds = own * ((row_ones << 16) + prior)
        rest = (_ONE - own) * (expected + prior)
        guess = min(65500, max(16, (odds << 16) // (odds + rest or 1)))
        s0 = stretch[guess >> 2]
        beside = above[column] + above[column + 2]
        key1 = (
            (s0 >> 6) << 4 | left << 3 | left2 << 2 | above[column + 1] << 1
        ) | above[column + 2]
        key2 = (
            (s0 >> 7) << 5
            | (left + left2 + left3) << 3
            | above2[column + 1] << 2
            | above[column + 1] + beside
        )
        v1 = first.get(key1)
        if v1 is None:
            v1 = first[key1] = [guess, 4]
        v2 = second.get(key2)
        if v2 is None:
            v2 = second[key2] = [guess, 4]
        s1, s2 = stretch[v1[0] >> 2], stretch[v2[0] >> 2]
        logit = w0 * s0 + w1 * s1 + w2 * s2 >> 16
        mixed = squash[(-2047 if logit < -2047 else min(logit, 2047)) + 2047]
        bit = code(mixed, 0 if symbols is None else symbols[place])
        out[place] = bit
        aim = _ONE - 1 if bit else 0
        error = aim - mixed
        w0 += s0 * error >> 16
        w1 += s1 * error >> 16
        w2 += s2 * error >> 16
        for v in (v1, v2):
            asked = v[1]
            v[0] += (aim - v[0]) * 2 // (2 * asked + 3)
            if asked < _LIMIT:
                v[1] = asked + 1
        expected += own
        left3, left2, left = left2, left, bit
        if bit:
            row_ones += 1
            columns[column] += 1
            total += 1
            now[column + 1] = 1
    return out


def _tree(
    symbols: list[int] | None, count: int, alphabet: int, width: int, code: Code
) -> list[int]:
    """Code numbers bit by bit; each bit is guessed alone, by column and by row."""
    squash, stretch = _tables()
    out = [0] * count
    bits = max(1, (alphabet - 1).bit_length())
    alone = [[_ONE // 2, 0] for _ in range(1 << bits)]
    weights = [[_ONE, 0, 0] for _ in range(1 << bits)]
    by_column: dict[int, list[int]] = {}
    by_row: dict[int, list[int]] = {}
    matrix = width < count
    for place in range(count):
        symbol = 0 if symbols is None else symbols[place]
        column, row = (place % width) << bits, (place // width) << bits
        node = 1
        for shift in range(bits - 1, -1, -1):
            v0 = alone[node]
            guess = min(65500, max(16, v0[0]))
            asked = [v0]
            if matrix:
                v1 = by_column.setdefault(column | node, [guess, 4])
                v2 = by_row.setdefault(row | node, [guess, 4])
                asked += [v1, v2]
                s0, s1, s2 = (
                    stretch[guess >> 2],
                    stretch[v1[0] >> 2],
                    stretch[v2[0] >> 2],
                )
                weight = weights[node]
                logit = weight[0] * s0 + weight[1] * s1 + weight[2] * s2 >> 16
                guess = squash[max(-2047, min(logit, 2047)) + 2047]
            bit = code(guess, symbol >> shift & 1)
            aim = _ONE - 1 if bit else 0
            if matrix:
                error = aim - guess
                weight[0] += s0 * error >> 16
                weight[1] += s1 * error >> 16
                weight[2] += s2 * error >> 16
            for v in asked:
                v[0] += (aim - v[0]) * 2 // (2 * v[1] + 3)
                if v[1] < (4 * _LIMIT if v is v0 else _LIMIT):
                    v[1] += 1
            node = node << 1 | bit
        out[place] = node - (1 << bits)
    return out
