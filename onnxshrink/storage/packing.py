"""Small integers in machine words: several digits of one base in each word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BITS", "PACKINGS", "Packing", "tightest"]

_WORDS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Packing:
    """``group`` digits below ``base`` in each word, the lowest digit first.

    Attributes:
        base: Digits are 0 to ``base - 1``.
        group: Digits in a word; ``base**group`` fits the word.
        word: numpy type of a word: ``u1``, ``u2``, or ``i4`` (31 bits are used).
    """

    base: int
    group: int
    word: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of a word."""
        return np.dtype(self.word)

    @property
    def rows(self) -> int:
        """Values a word can take; rows of the table that unpacks it."""
        return 1 << 8 * self.dtype.itemsize

    @property
    def bits(self) -> float:
        """Bits a digit takes."""
        return 8 * self.dtype.itemsize / self.group

    @property
    def powers(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Place values, int32 [group]."""
        return np.array([self.base**place for place in range(self.group)], np.int32)

    def words(self, count: int) -> int:
        """Return how many words ``count`` digits take."""
        return -(-count // self.group)

    def nbytes(self, count: int) -> int:
        """Return how many bytes ``count`` digits take."""
        return self.words(count) * self.dtype.itemsize

    def pack(self, digits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the words of flat unsigned digits; the last word is padded with 0."""
        count = self.words(digits.size)
        if self.group == 1:
            return digits.astype(self.dtype)
        words = np.empty(count, self.dtype)
        powers = self.powers
        for start in range(0, count, _WORDS_AT_ONCE):
            stop = min(start + _WORDS_AT_ONCE, count)
            part = digits[start * self.group : stop * self.group].astype(np.int32)
            if part.size < (stop - start) * self.group:
                part = np.pad(part, (0, (stop - start) * self.group - part.size))
            words[start:stop] = part.reshape(-1, self.group) @ powers
        return words


PACKINGS = (
    Packing(2, 8, "u1"),
    Packing(3, 5, "u1"),
    Packing(4, 4, "u1"),
    Packing(5, 13, "i4"),
    Packing(6, 3, "u1"),
    Packing(7, 11, "i4"),
    Packing(9, 5, "u2"),
    Packing(10, 9, "i4"),
    Packing(16, 2, "u1"),
    Packing(21, 7, "i4"),
    Packing(40, 3, "u2"),
    Packing(73, 5, "i4"),
    Packing(256, 1, "u1"),
)
"""By base; a larger base always takes more bits a digit.

Bytes and 16-bit words are unpacked by a table, 31-bit words by division. Left out is
what would not beat its neighbour, such as 8 digits below 14 in 31 bits.
"""

BITS = PACKINGS[0]
"""Eight bits in a byte, the lowest first."""


def tightest(count: int, opset: int) -> Packing:
    """Return the packing of fewest bits for digits below ``count`` (at most 256).

    16-bit words are left out below opset 11, where their table cannot be computed.
    """
    return next(
        packing
        for packing in PACKINGS
        if packing.base >= count and (packing.word != "u2" or opset >= 11)
    )
