"""The pieces of a model that is there already: graph, tensors, data files.

Tested in tests/package/test_container.py.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxshrink.errors import ModelError
from onnxshrink.files import read_at
from onnxshrink.package.container import LONGEST_LITERAL, Part, pack_parts
from onnxshrink.package.cutting import Cut, External, cuts
from onnxshrink.tensors import (
    ArrayTensor,
    FileTensor,
    LazyTensor,
    ProtoTensor,
    external_tensor,
)

__all__ = ["pack_bytes", "pack_file", "pack_model"]


def pack_file(path: Path, *, tiny: bool = False) -> Iterator[bytes]:
    """Yield a package of a model file and of its external data, byte for byte.

    Args:
        path: The model.
        tiny: Try the coders that decode slowly as well.

    Raises:
        ModelError: It, or a file it refers to, cannot be read.
    """
    parts, outside = _parts_of_file(path)
    files = [("", parts)]
    ranges: dict[str, dict[int, Cut]] = {}
    places: dict[str, Path] = {}
    for tensor in outside:
        location, data = _external(path, tensor)
        places[location] = data.path
        cut = Cut(data.offset, data.offset + data.length, data.data_type, data.shape)
        ranges.setdefault(location, {})[data.offset] = cut
    for location, cuts_ in ranges.items():
        files.append((location, _parts_of_data(places[location], cuts_)))
    return pack_parts(files, tiny=tiny)


def pack_bytes(data: bytes, *, tiny: bool = False) -> Iterator[bytes]:
    """Yield a package of a serialized model without external data.

    Raises:
        ModelError: It has external data.
    """
    return pack_model([data], tiny=tiny)


def pack_model(
    parts: Sequence[Part],
    files: Sequence[tuple[str, Sequence[Part]]] = (),
    *,
    tiny: bool = False,
    max_decode_ratio: float | None = None,
) -> Iterator[bytes]:
    """Yield a package of a model that is not in a file.

    Args:
        parts: What its bytes are made of; tensors in its plain bytes are found.
        files: Name and parts of each file of external data.
        tiny: Try the coders that decode slowly as well.
        max_decode_ratio: As for ``pack_parts``.

    Raises:
        ModelError: It has external data that is not among ``files``.
    """
    pieces = _Pieces(parts)
    found, outside = cuts(pieces, pieces.size)
    names = {name for name, _ in files}
    if any(tensor.entries.get("location") not in names for tensor in outside):
        raise ModelError("a model with external data is packed from its file")
    every = [("", pieces.cut(found)), *files]
    return pack_parts(every, tiny=tiny, max_decode_ratio=max_decode_ratio)


class _Pieces:
    """Random access to what is plain among the pieces of a file."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        sizes = [len(p) if isinstance(p, bytes) else p.nbytes for p in parts]
        self._starts = [0, *accumulate(sizes)]
        self.size = self._starts[-1]
        self._place = 0

    def _find(self, at: int) -> tuple[bytes, int]:
        """Return the plain bytes that hold a byte, and where they start."""
        if not self._starts[self._place] <= at < self._starts[self._place + 1]:
            self._place = bisect.bisect_right(self._starts, at) - 1
        part = self._parts[self._place]
        if not isinstance(part, bytes):
            raise ModelError("a tensor stands where a model has a record")
        return part, self._starts[self._place]

    def byte(self, at: int) -> int:
        part, start = self._find(at)
        return part[at - start]

    def span(self, start: int, stop: int) -> bytes:
        out = b""
        while start < stop:
            part, begin = self._find(start)
            out += part[start - begin : stop - begin]
            start = begin + len(part)
        return out

    def cut(self, found: Sequence[Cut]) -> list[Part]:
        """Return the parts, with tensors taken out of plain bytes."""
        places = iter(sorted(found, key=lambda cut: cut.start))
        cut = next(places, None)
        out: list[Part] = []
        for part, start in zip(self._parts, self._starts, strict=False):
            if not isinstance(part, bytes):
                out.append(part)
                continue
            at, stop = start, start + len(part)
            view = np.frombuffer(part, np.uint8)
            while cut is not None and cut.start < stop:
                if at <= cut.start and cut.stop <= stop:
                    values = view[cut.start - start : cut.stop - start]
                    out += [part[at - start : cut.start - start]]
                    out += [_array_tensor(values, cut)]
                    at = cut.stop
                cut = next(places, None)
            out.append(part[at - start :])
        return out


def _array_tensor(data: np.ndarray[Any, Any], cut: Cut) -> LazyTensor:
    """Return values in memory; plain bytes if type and shape do not fit them."""
    try:
        proto = onnx.TensorProto(
            dims=cut.shape, data_type=cut.data_type, raw_data=data.tobytes()
        )
        return ProtoTensor(proto)
    except (ModelError, ValueError, OverflowError):
        return ArrayTensor(data)


def _external(path: Path, tensor: External) -> tuple[str, FileTensor]:
    """Return where a tensor lies outside of the model, once that proves harmless."""
    proto = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    try:
        proto.data_type = tensor.data_type
        proto.dims.extend(tensor.shape)
    except (ValueError, OverflowError) as error:
        raise ModelError(f"{path}: a tensor has an impossible shape") from error
    for key, value in tensor.entries.items():
        proto.external_data.add(key=key, value=value)
    try:
        return tensor.entries["location"], external_tensor(proto, path.parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


class _File:
    """Random access to a file of any size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = 0
        self._data = b""
        try:
            self._handle = path.open("rb", buffering=0)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        self.size = os.fstat(self._handle.fileno()).st_size

    def close(self) -> None:
        self._handle.close()

    def byte(self, at: int) -> int:
        offset = at - self._start
        if not 0 <= offset < len(self._data):
            self._start, self._data, offset = at, self._read(at, 1 << 16), 0
        return self._data[offset]

    def span(self, start: int, stop: int) -> bytes:
        data = self._read(start, stop - start)
        while len(data) < stop - start:
            data += self._read(start + len(data), stop - start - len(data))
        return data

    def _read(self, at: int, count: int) -> bytes:
        try:
            data = read_at(self._handle.fileno(), min(count, 1 << 30), at)
        except OSError as error:
            raise ModelError(f"cannot read {self._path}: {error.strerror}") from error
        if not data and count:
            raise ModelError(f"{self._path} was cut short while it was being read")
        return data


def _parts_of_file(path: Path) -> tuple[list[Part], list[External]]:
    """Return the pieces of a model file, and the tensors it keeps in other files.

    Raises:
        ModelError: It cannot be read.
    """
    file = _File(path)
    try:
        found, outside = cuts(file, file.size)
        tensors = [_cut_tensor(path, cut) for cut in found]
        spans = [(cut.start, cut.stop) for cut in found]
        return _between(path, file, spans, tensors), outside
    finally:
        file.close()


def _parts_of_data(path: Path, ranges: Mapping[int, Cut]) -> list[Part]:
    """Return the pieces of an external data file.

    Args:
        path: The file.
        ranges: Its tensors by where they start. One that overlaps the one before is
            left to be plain bytes.

    Raises:
        ModelError: It cannot be read.
    """
    file = _File(path)
    try:
        spans, tensors, end = [], [], 0
        for start, cut in sorted(ranges.items()):
            if start < end or cut.stop > file.size or cut.stop == start:
                continue
            end = cut.stop
            spans.append((start, end))
            tensors.append(_cut_tensor(path, cut))
        return _between(path, file, spans, tensors)
    finally:
        file.close()


def _cut_tensor(path: Path, cut: Cut) -> LazyTensor:
    """Return values in a file; plain bytes if type and shape do not fit them."""
    length = cut.stop - cut.start
    try:
        if all(0 <= dim < 1 << 40 for dim in cut.shape):
            return FileTensor(path, cut.start, length, cut.shape, cut.data_type)
    except (ModelError, OverflowError):
        pass
    return _opaque(path, cut.start, length)


def _opaque(path: Path, start: int, length: int) -> LazyTensor:
    return FileTensor(path, start, length, (length,), onnx.TensorProto.UINT8)


def _between(
    path: Path,
    file: _File,
    spans: Sequence[tuple[int, int]],
    tensors: Sequence[LazyTensor],
) -> list[Part]:
    parts: list[Part] = []
    at = 0
    for (start, stop), tensor in zip(
        [*spans, (file.size, file.size)], [*tensors, None], strict=True
    ):
        if start - at > LONGEST_LITERAL:
            parts.append(_opaque(path, at, start - at))
        elif start > at:
            parts.append(file.span(at, start))
        if tensor is not None:
            parts.append(tensor)
        at = stop
    return parts
