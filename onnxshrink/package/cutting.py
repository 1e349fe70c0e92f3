"""Where the values of tensors lie in the bytes of a model: a walk over its protobuf.

Everything else is left alone, so that the pieces put together again are the file that
was there, byte for byte.

Tested in tests/package/test_container.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from onnxshrink.tensors.wire import Bytes

__all__ = ["Cut", "External", "cuts"]

_SMALLEST = 128
"""Bytes of values from which a tensor is taken out; fewer stay with the graph."""
_DEEPEST = 100

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_BELOW: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION, 20: _TRAINING},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""What the length-delimited fields of a message are that lead to tensors."""
_TYPES = onnx.TensorProto
_DATA = {4: _TYPES.FLOAT, 9: None, 10: _TYPES.DOUBLE}
"""Fields of a tensor that are its little-endian values; of float_data and double_data
the type of the elements."""


@dataclass(frozen=True)
class Cut:
    """Values of a tensor.

    Attributes:
        start: First byte in the file.
        stop: The byte behind the last.
        data_type: ONNX element type.
        shape: Dimensions, as far as they fit the number of bytes; else empty.
    """

    start: int
    stop: int
    data_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class External:
    """A tensor whose values are in another file.

    Attributes:
        entries: ``location``, ``offset``, ``length``.
        data_type: ONNX element type.
        shape: Dimensions.
    """

    entries: dict[str, str]
    data_type: int
    shape: tuple[int, ...]


class _Unreadable(Exception):  # noqa: N818  # what cannot be walked stays whole
    """These bytes are no protobuf that can be walked."""


def cuts(data: Bytes, size: int) -> tuple[list[Cut], list[External]]:
    """Return the tensors of a model of ``size`` bytes, in the order of the file.

    What is no protobuf has none.
    """
    found: list[Cut] = []
    outside: list[External] = []
    # What was found before the end of the walk is right all the same.
    with contextlib.suppress(_Unreadable):
        _walk(data, 0, size, _MODEL, found, outside, 0)
    return found, outside


def _walk(
    data: Bytes,
    at: int,
    end: int,
    message: int,
    found: list[Cut],
    outside: list[External],
    depth: int,
) -> None:
    if depth > _DEEPEST:
        raise _Unreadable
    below = _BELOW[message]
    for number, wire, body, stop in _fields(data, at, end):
        kind = below.get(number) if wire == 2 else None
        if kind is None:
            continue
        if kind == _TENSOR:
            _tensor(data, body, stop, found, outside)
        else:
            _walk(data, body, stop, kind, found, outside, depth + 1)


def _tensor(
    data: Bytes, at: int, end: int, found: list[Cut], outside: list[External]
) -> None:
    dims: list[int] = []
    data_type = 0
    values: tuple[int, int, int] | None = None
    external: dict[str, str] = {}
    for number, wire, body, stop in _fields(data, at, end):
        if number == 1 and wire == 0:
            dims.append(_varint(data, body, stop)[0])
        elif number == 1 and wire == 2:
            while body < stop:
                value, body = _varint(data, body, stop)
                dims.append(value)
        elif number == 2 and wire == 0:
            data_type = _varint(data, body, stop)[0]
        elif number in _DATA and wire == 2 and stop - body >= _SMALLEST:
            values = body, stop, number
        elif number == 13 and wire == 2:
            pair = onnx.StringStringEntryProto.FromString(data.span(body, stop))
            external[pair.key] = pair.value
    if external:
        outside.append(External(external, data_type, tuple(dims)))
    if values is not None:
        start, stop, number = values
        found.append(Cut(start, stop, _DATA[number] or data_type, tuple(dims)))


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data.byte(at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Unreadable


def _fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, start of payload, end of record)."""
    while at < end:
        tag, body = _varint(data, at, end)
        wire = tag & 7
        stop = body
        if wire == 0:
            _, stop = _varint(data, body, end)
        elif wire == 1:
            stop = body + 8
        elif wire == 2:
            length, body = _varint(data, body, end)
            stop = body + length
        elif wire == 5:
            stop = body + 4
        else:
            raise _Unreadable  # protobuf's old groups, or no protobuf
        if stop > end or tag >> 3 == 0:
            raise _Unreadable
        yield tag >> 3, wire, body, stop
        at = stop
