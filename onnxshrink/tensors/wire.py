"""Read a model file without its big tensors: a walk over the protobuf wire format.

Protocol Buffers, "Encoding" (field tags, varints, length-delimited records). Only the
path model -> graph -> initializer -> raw_data is followed; the rest is protobuf's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import onnx
from google.protobuf.message import DecodeError

from onnxshrink.errors import ModelError
from onnxshrink.files import read_at

__all__ = ["Bytes", "encode_varint", "parse_skeleton", "read_skeleton"]

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2
LARGE = 1 << 16
"""Initializers with at least this many bytes of raw data stay in the file."""

_MOST = (1 << 31) - 1
"""Bytes that protobuf parses at most."""


class Bytes(Protocol):
    """Random access to the bytes of a file."""

    def byte(self, at: int) -> int:
        """Return one byte."""

    def span(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` up to ``stop``."""


class _Window:
    """Random access to a file through a buffer.

    Not a mapping: that would end the process if another one cut the file short.
    """

    def __init__(self, handle: int, size: int = 1 << 16) -> None:
        self._handle = handle
        self._size = size
        self._start = 0
        self._data = b""

    def byte(self, at: int) -> int:
        """Return one byte."""
        offset = at - self._start
        if not 0 <= offset < len(self._data):
            self._start = at
            self._data = read_at(self._handle, self._size, at)
            offset = 0
            if not self._data:
                raise _Broken("it was cut short while it was being read")
        return self._data[offset]

    def span(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` up to ``stop``."""
        offset = start - self._start
        if offset >= 0 and stop - self._start <= len(self._data):
            return self._data[offset : stop - self._start]
        pieces = []
        while start < stop:
            piece = read_at(self._handle, min(stop - start, 1 << 30), start)
            if not piece:
                raise _Broken("it was cut short while it was being read")
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)


class _Broken(Exception):  # noqa: N818  # becomes a ModelError that names the file
    """The bytes are no protobuf."""


class _Group(Exception):  # noqa: N818  # no error: protobuf may know what to do
    """A record of protobuf's old group form."""


def encode_varint(value: int) -> bytes:
    """Return an unsigned integer as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise _Broken("broken varint")
        byte = data.byte(at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, start of record, start of payload, end of record)."""
    while at < end:
        start = at
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            length, body = _varint(data, at, end)
            at = body + length
        elif kind == 0:
            body = at
            _, at = _varint(data, at, end)
        elif kind in (1, 5):
            body = at
            at = body + (8 if kind == 1 else 4)
        elif kind in (3, 4):
            raise _Group
        else:
            raise _Broken(f"unknown wire type {kind}")
        if at > end or tag >> 3 == 0:
            raise _Broken("a record runs past its end")
        yield (tag >> 3 if kind == _LENGTH_DELIMITED else -1), start, body, at


def _record(number: int, payload: bytes) -> bytes:
    tag = encode_varint(number << 3 | _LENGTH_DELIMITED)
    return tag + encode_varint(len(payload)) + payload


def _strip_tensor(data: Bytes, at: int, end: int) -> tuple[bytes, int, int] | None:
    """Return the tensor without raw data, and where that lies, if it is large."""
    found = [r for r in _fields(data, at, end) if r[0] == _RAW_DATA]
    if len(found) != 1:
        return None
    _, start, body, stop = found[0]
    if stop - body < LARGE:
        return None
    return data.span(at, start) + data.span(stop, end), body, stop - body


def _strip_graph(
    data: Bytes, at: int, end: int
) -> tuple[bytes, dict[int, tuple[int, int]]]:
    pieces: list[bytes] = []
    ranges: dict[int, tuple[int, int]] = {}
    index = 0
    kept = at
    for number, start, body, stop in _fields(data, at, end):
        if number != _INITIALIZER:
            continue
        stripped = _strip_tensor(data, body, stop) if stop - body > LARGE else None
        if stripped is not None:
            pieces.append(data.span(kept, start))
            pieces.append(_record(_INITIALIZER, stripped[0]))
            ranges[index] = stripped[1:]
            kept = stop
        index += 1
    pieces.append(data.span(kept, end))
    return b"".join(pieces), ranges


def read_skeleton(path: Path) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
    """Parse a model file, leaving large raw data of its main graph where it is.

    Returns:
        The model without that data, and (offset, length) in the file by the index
        of the initializer.

    Raises:
        ModelError: The file is empty, truncated or not an ONNX model.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(handle).st_size
        if size == 0:
            raise ModelError(f"{path} is empty; expected an ONNX model")
        return parse_skeleton(_Window(handle), size, str(path))
    finally:
        os.close(handle)


def parse_skeleton(
    data: Bytes, size: int, label: str
) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
    """Parse a model of ``size`` bytes as ``read_skeleton`` does, wherever they are.

    Raises:
        ModelError: They are no ONNX model; ``label`` names it.
    """
    proto = onnx.ModelProto()
    try:
        skeleton, ranges = _skeleton(data, size)
        proto.ParseFromString(skeleton)
    except (DecodeError, _Broken) as error:
        raise ModelError(
            f"{label} is not an ONNX model or is truncated ({error})"
        ) from error
    return proto, ranges


def _skeleton(data: Bytes, size: int) -> tuple[bytes, dict[int, tuple[int, int]]]:
    try:
        graphs = [record for record in _fields(data, 0, size) if record[0] == _GRAPH]
        if len(graphs) == 1:
            _, start, body, stop = graphs[0]
            graph, ranges = _strip_graph(data, body, stop)
            around = data.span(0, start), data.span(stop, size)
            return around[0] + _record(_GRAPH, graph) + around[1], ranges
    except _Group:
        pass  # unknown fields may have this form; protobuf decides
    if size > _MOST:
        raise _Broken(f"{size} bytes are more than a protobuf can have")
    return data.span(0, size), {}
