"""Small integers in machine words: several digits of one base in each word.

Tested in tests/storage/test_storage.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BITS", "PACKINGS", "PLANES", "Packing", "Planes", "plane_for", "tightest"]

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

Bytes and 16-bit words are unpacked by a table, 31-bit words by division. A packing that
takes as many bits as one of a larger base is left out, such as 8 digits below 14 in 31
bits.
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


@dataclass(frozen=True)
class Planes:
    """Digits in two streams: the remainders and the quotients by a base.

    Codes of 3, 5 and 6 bits then take no more than these. A word of ``high`` has the
    digits of one or more whole words of ``low``.

    Attributes:
        low: Packing of ``digit % low.base``, a byte.
        high: Packing of ``digit // low.base``, a byte.
    """

    low: Packing
    high: Packing

    @property
    def base(self) -> int:
        """Digits are 0 to ``base - 1``."""
        return self.low.base * self.high.base

    @property
    def group(self) -> int:
        """Digits that are packed together."""
        return self.high.group

    @property
    def bits(self) -> float:
        """Bits a digit takes."""
        return self.low.bits + self.high.bits

    def words(self, count: int) -> int:
        """Return how many words of ``high`` the digits take."""
        return self.high.words(count)

    def nbytes(self, count: int) -> int:
        """Return how many bytes ``count`` digits take."""
        words = self.words(count)
        return words + words * self.high.group // self.low.group

    def pack(self, digits: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Return the words of both streams, padded with 0."""
        padded = np.zeros(self.words(digits.size) * self.group, digits.dtype)
        padded[: digits.size] = digits
        high, low = np.divmod(padded, padded.dtype.type(self.low.base))
        return self.low.pack(low), self.high.pack(high)


_BY_BASE = {packing.base: packing for packing in PACKINGS}
PLANES = (
    Planes(_BY_BASE[4], _BY_BASE[2]),
    Planes(_BY_BASE[16], _BY_BASE[2]),
    Planes(_BY_BASE[16], _BY_BASE[4]),
)
"""For up to 8, 32 and 64 different digits."""


def plane_for(count: int, opset: int) -> Planes | None:
    """Return planes of fewer bits than ``tightest``, if there are such."""
    for planes in PLANES:
        if planes.base >= count:
            return planes if planes.bits < tightest(count, opset).bits else None
    return None
