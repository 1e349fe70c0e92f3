"""What goes between the run and its child: a JSON header, then the arrays' bytes.

No pickle: what the child says is read as data. Values are arrays, texts, numbers,
lists, maps and ``None``, as onnxruntime takes and gives them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["receive", "send"]

_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message; arrays may be anywhere in it.

    Raises:
        OSError: Nobody reads any more.
        TypeError: It holds something that is none of the values above.
    """
    buffers: list[memoryview] = []
    header = json.dumps(_packed(message, buffers)).encode()
    stream.write(_LENGTH.pack(len(header)))
    stream.write(header)
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read a message.

    Raises:
        EOFError: The other side ended.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return _unpacked(json.loads(_exactly(stream, length)), stream)


def _exactly(stream: IO[bytes], count: int) -> bytearray:
    data = bytearray(count)
    _fill(stream, memoryview(data))
    return data


def _fill(stream: IO[bytes], view: memoryview) -> None:
    at = 0
    while at < len(view):
        got = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the other side ended")
        at += got


def _packed(value: Any, buffers: list[memoryview]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return _packed(value.item(), buffers)
    if isinstance(value, bytes):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, np.ndarray):
        return _packed_array(value, buffers)
    if isinstance(value, (list, tuple)):
        return {"list": [_packed(item, buffers) for item in value]}
    if isinstance(value, Mapping):
        pairs = [
            [_packed(key, buffers), _packed(item, buffers)]
            for key, item in value.items()
        ]
        return {"map": pairs}
    raise TypeError(f"a {type(value).__name__} cannot go to another process")


def _packed_array(value: NDArray[Any], buffers: list[memoryview]) -> Any:
    if value.dtype.kind == "O":
        items = [_packed(item, buffers) for item in value.reshape(-1).tolist()]
        return {"objects": items, "shape": list(value.shape)}
    flat = np.ascontiguousarray(value).reshape(-1)
    if flat.size:
        buffers.append(flat.view(np.uint8).data)
    plain = value.dtype.isbuiltin == 1 or value.dtype.kind in "US"
    dtype = value.dtype.str if plain else value.dtype.name
    return {"array": dtype, "plain": plain, "shape": list(value.shape)}


def _unpacked(value: Any, stream: IO[bytes]) -> Any:
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return value["bytes"].encode("latin-1")
    if "list" in value:
        return [_unpacked(item, stream) for item in value["list"]]
    if "map" in value:
        return {
            _unpacked(key, stream): _unpacked(item, stream)
            for key, item in value["map"]
        }
    if "objects" in value:
        items = np.empty(len(value["objects"]), object)
        items[:] = [_unpacked(item, stream) for item in value["objects"]]
        return items.reshape(value["shape"])
    dtype = _dtype(value["array"], value["plain"])
    array = np.empty(value["shape"], dtype)
    if array.size:
        _fill(stream, array.reshape(-1).view(np.uint8).data)
    return array


def _dtype(name: str, plain: bool) -> np.dtype[Any]:
    if plain:
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype
