"""Bytes of a package read in order; every length is checked before it is used.

Tested in tests/package/test_container.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Damaged", "Reader", "varint"]


class Damaged(Exception):  # noqa: N818  # becomes a ModelError that names the package
    """The bytes are no package, or not the ones that were written."""


def varint(value: int) -> bytes:
    """Return a number from 0 on as a base-128 varint, the lowest seven bits first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """A position in a piece of a package.

    Attributes:
        at: Bytes read so far.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        """Start at the first byte."""
        self._data = memoryview(data)
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.at

    def take(self, count: int) -> memoryview:
        """Return the next ``count`` bytes.

        Raises:
            Damaged: There are fewer.
        """
        if count < 0 or count > self.left:
            raise Damaged(f"{count} bytes are asked for where {self.left} are left")
        piece = self._data[self.at : self.at + count]
        self.at += count
        return piece

    def byte(self) -> int:
        """Return the next byte as a number."""
        return self.take(1)[0]

    def number(self, most: int) -> int:
        """Return the next varint.

        Raises:
            Damaged: It is broken or greater than ``most``.
        """
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if value > most:
                raise Damaged(f"a number is greater than {most}")
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise Damaged("a number has no end")

    def array(self, count: int, kind: str) -> np.ndarray[Any, Any]:
        """Return the next ``count`` little-endian numbers of a numpy type."""
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def end(self) -> None:
        """Hold that nothing is left.

        Raises:
            Damaged: Something is.
        """
        if self.left:
            raise Damaged(f"{self.left} bytes are left over")
