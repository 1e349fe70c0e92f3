"""Read a model file without its big tensors: a walk over the protobuf wire format.

Protocol Buffers, "Encoding" (field tags, varints, length-delimited records). Only the
path model -> graph -> initializer -> raw_data is followed; the rest is left to protobuf.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxshrink.errors import ModelError

__all__ = ["encode_varint", "read_skeleton"]

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LENGTH_DELIMITED = 2
LARGE = 1 << 16
"""Initializers with at least this many bytes of raw data stay in the file."""

Buffer = mmap.mmap | bytes


def encode_varint(value: int) -> bytes:
    """Return an unsigned integer as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ModelError("broken varint")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
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
        else:
            raise ModelError(f"unknown wire type {kind}")
        if at > end or tag >> 3 == 0:
            raise ModelError("a record runs past its end")
        yield (tag >> 3 if kind == _LENGTH_DELIMITED else -1), start, body, at


def _record(number: int, payload: bytes) -> bytes:
    tag = encode_varint(number << 3 | _LENGTH_DELIMITED)
    return tag + encode_varint(len(payload)) + payload


def _strip_tensor(data: Buffer, at: int, end: int) -> tuple[bytes, int, int] | None:
    """Return the tensor without raw data, and where that lies, if it is large."""
    found = [r for r in _fields(data, at, end) if r[0] == _RAW_DATA]
    if len(found) != 1:
        return None
    _, start, body, stop = found[0]
    if stop - body < LARGE:
        return None
    return data[at:start] + data[stop:end], body, stop - body


def _strip_graph(
    data: Buffer, at: int, end: int
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
            pieces.append(data[kept:start])
            pieces.append(_record(_INITIALIZER, stripped[0]))
            ranges[index] = stripped[1:]
            kept = stop
        index += 1
    pieces.append(data[kept:end])
    return b"".join(pieces), ranges


def read_skeleton(path: Path) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
    """Parse a model file, leaving large raw data of its main graph where it is.

    Returns:
        The model without that data, and (offset, length) in the file by the index
        of the initializer.

    Raises:
        ModelError: The file is empty, truncated or not an ONNX model.
    """
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path} is empty; expected an ONNX model")
    ranges: dict[int, tuple[int, int]] = {}
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            records = list(_fields(data, 0, size))
            graphs = [record for record in records if record[0] == _GRAPH]
            if len(graphs) == 1:
                _, start, body, stop = graphs[0]
                graph, ranges = _strip_graph(data, body, stop)
                skeleton = data[:start] + _record(_GRAPH, graph) + data[stop:]
            else:
                skeleton = data[:]
        proto.ParseFromString(skeleton)
    except (ModelError, DecodeError) as error:
        raise ModelError(
            f"{path} is not an ONNX model or is truncated ({error})"
        ) from error
    return proto, ranges
