"""Packages: a model's files as a graph and blocks of coded tensors.

``docs/package-format.md`` describes the format on one page; ``plain.py`` is a decoder
of its own that shares no code with this one.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import struct
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxshrink.errors import ModelError
from onnxshrink.files import read_at
from onnxshrink.package.forms import Layout, decode_block, encode_block
from onnxshrink.package.reading import Damaged, Reader, varint
from onnxshrink.package.symbols import squeeze, unlzma
from onnxshrink.package.words import WORDS
from onnxshrink.storage.encoder import MAX_DECODE_RATIO
from onnxshrink.tensors import (
    ArrayTensor,
    LazyTensor,
    ProtoTensor,
    bits_of,
    external_range,
    plain_bytes,
    values_of,
)
from onnxshrink.tensors.wire import parse_skeleton, read_skeleton

__all__ = [
    "LONGEST_LITERAL",
    "MAGIC",
    "SUFFIX",
    "Contents",
    "Package",
    "PackedTensor",
    "Part",
    "Window",
    "is_package",
    "pack_parts",
    "skeleton_of",
]

Array = np.ndarray[Any, Any]
Part = bytes | LazyTensor
"""A piece of a file: plain bytes, or values to be coded."""

SUFFIX = ".onnxz"
"""What the name of a package ends with."""
MAGIC = b"ONNXZ\x01"
"""Name and version."""
_FOOTER = struct.Struct("<II")
_BLOCK_ITEMS = 1 << 22
_BLOCK_BYTES = 1 << 25
"""Most bytes of a block when decoded; what decoding takes is a small multiple."""
LONGEST_LITERAL = 1 << 20
"""Plain bytes of more than this are coded in blocks like a tensor."""
_EXPANSION = 1000
_ALWAYS = 1 << 30
"""A package may decode to this many bytes, or to 1000 times its own if that is more:
a file of a few bytes must not ask for any amount of memory or disk."""
_INDEX_EXPANSION = 200
_INDEX_ALWAYS = 1 << 20
_NAMES = 255
_SMALL_DECODE = 16 << 20
"""Bytes that decoding may hold whatever the size of a block."""

_FLOATS = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in onnx.TensorProto.DataType.keys()  # noqa: SIM118  # an enum, no mapping
    if name.startswith(("FLOAT", "BFLOAT", "DOUBLE", "COMPLEX"))
)


# --- write ------------------------------------------------------------------------


def pack_parts(
    files: Sequence[tuple[str, Sequence[Part]]],
    *,
    tiny: bool = False,
    max_decode_ratio: float | None = None,
) -> Iterator[bytes]:
    """Yield the bytes of a package.

    Args:
        files: Name and pieces of each file. The first is the model and has no name;
            the others are its external data.
        tiny: Try the coders that decode slowly as well.
        max_decode_ratio: Decoding a block holds at most this multiple of its bytes at
            a time, itself included, or 16 MiB if that is more; by default 10.

    Raises:
        ModelError: Something cannot be read.
    """
    ratio = MAX_DECODE_RATIO if max_decode_ratio is None else max_decode_ratio
    writer = _Writer(tiny, ratio)
    yield MAGIC
    for name, parts in files:
        yield from writer.file(name, parts)
    yield writer.end()


class _Writer:
    """Codes parts, remembers where they went."""

    def __init__(self, tiny: bool, ratio: float) -> None:
        self._tiny, self._ratio = tiny, ratio
        self._files: list[bytes] = []
        self._tensors: list[bytes] = []
        self._literals: list[bytes] = []
        self._known: dict[tuple[int, bytes], int] = {}

    def file(self, name: str, parts: Sequence[Part]) -> Iterator[bytes]:
        """Yield the blocks of a file."""
        segments: list[bytes] = []
        sizes = Counter(part.nbytes for part in parts if isinstance(part, LazyTensor))
        for part in _joined(parts):
            if isinstance(part, bytes):
                self._literals.append(part)
                segments.append(varint(len(part) << 1))
                continue
            number, key = None, None
            if sizes[part.nbytes] > 1 or self._known:
                key = part.nbytes, _digest(part)
                number = self._known.get(key)
            if number is None:
                number = len(self._tensors)
                if key is not None:
                    self._known[key] = number
                yield from self._tensor(part)
            segments.append(varint(number << 1 | 1))
        encoded = name.encode()
        self._files.append(
            varint(len(encoded)) + encoded + varint(len(segments)) + b"".join(segments)
        )

    def _tensor(self, tensor: LazyTensor) -> Iterator[bytes]:
        layout = _layout(tensor.data_type, tensor.shape)
        size = _block_bytes(layout)
        blocks = 0
        entries = b""
        for raw in _blocks(tensor, size):
            data = np.frombuffer(raw, np.uint8)
            most = max(self._ratio * data.size, _SMALL_DECODE)
            coded = encode_block(data, layout, tiny=self._tiny, most=most)
            entries += varint(len(coded)) + struct.pack("<I", zlib.crc32(raw))
            blocks += 1
            yield coded
        head = varint(tensor.nbytes) + varint(blocks)
        self._tensors.append(head + (varint(size) if blocks > 1 else b"") + entries)

    def end(self) -> bytes:
        """Return the index and the footer."""
        index = b"".join(
            [
                varint(len(self._files)),
                *self._files,
                varint(len(self._tensors)),
                *self._tensors,
                *self._literals,
            ]
        )
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=WORDS)
        forms = [b"\0" + index]
        if len(index) < 1 << 24:
            short = deflate.compress(index) + deflate.flush()
            forms.append(b"\1" + varint(len(index)) + short)
        forms.append(b"\2" + varint(len(index)) + squeeze(index))
        stored = min((form for form in forms if _fits(form, index)), key=len)
        return stored + _FOOTER.pack(len(stored), zlib.crc32(stored))


def _fits(stored: bytes, index: bytes) -> bool:
    return len(index) <= _INDEX_ALWAYS + _INDEX_EXPANSION * len(stored)


def _joined(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield parts, neighbouring bytes in one, long ones as values."""
    kept: list[bytes] = []
    for part in [*parts, ArrayTensor(np.zeros(0, np.uint8))]:
        if isinstance(part, bytes):
            kept.append(part)
            continue
        literal = b"".join(kept)
        kept = []
        if len(literal) > LONGEST_LITERAL:
            yield ArrayTensor(np.frombuffer(literal, np.uint8))
        elif literal:
            yield literal
        if part.nbytes:
            yield part


def _digest(tensor: LazyTensor) -> bytes:
    digest = hashlib.sha256()
    for chunk in tensor.raw_chunks():
        digest.update(chunk)
    return digest.digest()


def _blocks(tensor: LazyTensor, size: int) -> Iterator[bytes]:
    """Yield the raw data in pieces of exactly ``size`` bytes, the last one shorter."""
    kept = bytearray()
    for chunk in tensor.raw_chunks():
        kept += chunk
        while len(kept) >= size:
            yield bytes(memoryview(kept)[:size])
            del kept[:size]
    if kept:
        yield bytes(kept)


def _layout(data_type: int, shape: tuple[int, ...]) -> Layout:
    """Return how the bytes of a tensor are to be seen."""
    try:
        bits = bits_of(data_type)
    except ModelError:
        bits = 0
    while shape[:1] == (1,):
        shape = shape[1:]
    inner = shape[1:]
    width = math.prod(inner) if inner else 0
    if width > 1 << 20:
        inner = shape[-1:]
        width = shape[-1]
    if not 2 <= width <= 1 << 20:
        width = 0
    inner = inner if width else ()
    if bits in (1, 2, 4):
        return Layout(1, False, width, bits)
    if bits not in (8, 16, 32, 64, 128):
        return Layout(1)
    size = bits // 8
    floating = data_type in _FLOATS
    if data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return Layout(size // 2, floating, 2 * width)
    if bits == 128:
        return Layout(8)
    return Layout(size, floating, width, inner=inner)


def _block_bytes(layout: Layout) -> int:
    """Return the bytes of a block: whole rows, and whole bytes of small elements."""
    most = min(_BLOCK_ITEMS, _BLOCK_BYTES // layout.size)
    row = max(1, layout.width) * (8 if layout.bits < 8 else 1)
    items = max(row, most // row * row)
    return items * layout.size * layout.bits // 8


# --- read -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A coded tensor.

    Attributes:
        nbytes: Its bytes when decoded.
        block: Bytes of each block but the last when decoded.
        blocks: (offset, length, CRC-32 of the decoded bytes) of each.
    """

    nbytes: int
    block: int
    blocks: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Contents:
    """A file in a package.

    Attributes:
        name: Its name; empty for the model.
        starts: Where each piece starts in the file; last, its size.
        pieces: Plain bytes, or the number of a tensor.
    """

    name: str
    starts: tuple[int, ...]
    pieces: tuple[memoryview | int, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.starts[-1]


def is_package(path: Path) -> bool:
    """Whether a file is to be read as a package: by its name or its first bytes."""
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(5) == MAGIC[:5]
    except OSError:
        return False


def skeleton_of(path: Path) -> onnx.ModelProto:
    """Return the model in a file or a package, without its large tensors.

    Raises:
        ModelError: It is no model.
    """
    if is_package(path):
        return Package(path).skeleton()[0]
    return read_skeleton(path)[0]


class Package:
    """A package that is open: its index is in memory, its tensors are not.

    Attributes:
        path: Where it is; ``None`` if it is held in memory.
        files: The model, then its external data.
        tensors: What is coded.
    """

    _state: tuple[int, ...] = ()

    def __init__(self, source: Path | bytes) -> None:
        """Read the index.

        Raises:
            ModelError: It cannot be read, is damaged, or is of another version.
        """
        self.path = source.absolute() if isinstance(source, Path) else None
        self._memory = source if isinstance(source, bytes) else None
        self.label = str(source) if isinstance(source, Path) else "the package"
        try:
            if isinstance(source, Path):
                status = source.stat()
                self._state = _state(status)
                size = status.st_size
            else:
                size = len(source)
            self._open(size)
        except OSError as error:
            raise ModelError(f"cannot read {self.label}: {error.strerror}") from error
        except Damaged as error:
            raise ModelError(f"{self.label} is damaged: {error}") from error

    def _open(self, size: int) -> None:
        smallest = len(MAGIC) + _FOOTER.size
        head = self._bytes(0, min(size, len(MAGIC)))
        if head[:5] != MAGIC[:5]:
            raise ModelError(f"{self.label} is no package of onnxshrink (.onnxz)")
        if len(head) < len(MAGIC) or size < smallest:
            raise Damaged("it is cut short")
        if head != MAGIC:
            raise ModelError(
                f"{self.label} has version {head[5]} of the format; this onnxshrink "
                f"reads version {MAGIC[5]}"
            )
        length, checksum = _FOOTER.unpack(self._bytes(size - _FOOTER.size, 8))
        start = size - _FOOTER.size - length
        if start < len(MAGIC):
            raise Damaged("it is cut short, or its last bytes were changed")
        stored = self._bytes(start, length)
        if zlib.crc32(stored) != checksum:
            raise Damaged("it is cut short, or its index was changed")
        reader = Reader(_index(stored))
        files = [_read_file(reader) for _ in range(_count(reader, 2))]
        offset = len(MAGIC)
        tensors = []
        for _ in range(_count(reader, 2)):
            tensor, offset = _read_tensor(reader, offset)
            tensors.append(tensor)
        if offset != start:
            raise Damaged("its blocks do not fill it")
        self.tensors = tuple(tensors)
        self.files = tuple(self._contents(*file, reader) for file in files)
        reader.end()
        most = max(_ALWAYS, _EXPANSION * size)
        total = sum(file.size for file in self.files)
        if total > most or any(tensor.nbytes > most for tensor in self.tensors):
            raise Damaged(
                f"its {size} bytes claim to stand for more than {most}; expected at "
                f"most {_EXPANSION} times as many"
            )
        if not self.files or self.files[0].name:
            raise Damaged("it holds no model")
        names = [file.name for file in self.files]
        if len(set(names)) != len(names):
            raise Damaged("two of its files have one name")

    def _contents(self, name: str, segments: Sequence[int], reader: Reader) -> Contents:
        starts = [0]
        pieces: list[memoryview | int] = []
        for segment in segments:
            value = segment >> 1
            if segment & 1:
                if value >= len(self.tensors):
                    raise Damaged(f"there is no tensor {value}")
                pieces.append(value)
                starts.append(starts[-1] + self.tensors[value].nbytes)
            else:
                pieces.append(reader.take(value))
                starts.append(starts[-1] + value)
        return Contents(name, tuple(starts), tuple(pieces))

    def _bytes(self, start: int, count: int) -> bytes:
        if self._memory is not None:
            return self._memory[start : start + count]
        assert self.path is not None
        try:
            with self.path.open("rb", buffering=0) as file:
                if _state(os.fstat(file.fileno())) != self._state:
                    raise ModelError(f"{self.path} was changed while it was in use")
                data = read_at(file.fileno(), count, start)
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) != count:
            raise ModelError(f"{self.path} was cut short while it was being read")
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process by path, or by the bytes if there is none."""
        return Package, (self.path if self._memory is None else self._memory,)

    def same_file(self, other: Package) -> bool:
        """Whether both read the same file in the same state."""
        return self is other or (
            self.path is not None
            and other.path is not None
            and self._state == other._state
        )

    # --- tensors ------------------------------------------------------------------

    def block(self, number: int, index: int) -> Array:
        """Return one decoded block of a tensor, uint8; nothing else is decoded.

        Raises:
            ModelError: It is damaged.
        """
        tensor = self.tensors[number]
        offset, length, checksum = tensor.blocks[index]
        count = min(tensor.block, tensor.nbytes - index * tensor.block)
        reader = Reader(self._bytes(offset, length))
        try:
            data = np.ascontiguousarray(decode_block(reader, count))
            reader.end()
        except (Damaged, ArithmeticError, LookupError, ValueError) as error:
            raise ModelError(
                f"{self.label} is damaged: tensor {number}, block {index}: {error}"
            ) from error
        if zlib.crc32(data.data) != checksum:
            raise ModelError(
                f"{self.label} is damaged: tensor {number}, block {index} has another "
                "checksum than it had"
            )
        return data

    def read(self, number: int) -> Array:
        """Return the bytes of a tensor, uint8.

        Raises:
            ModelError: It is damaged.
        """
        tensor = self.tensors[number]
        if len(tensor.blocks) == 1:
            return self.block(number, 0)
        out = np.empty(tensor.nbytes, np.uint8)
        for index in range(len(tensor.blocks)):
            start = index * tensor.block
            out[start : start + tensor.block] = self.block(number, index)
        return out

    # --- files --------------------------------------------------------------------

    def stream(self, file: Contents) -> Iterator[bytes | memoryview]:
        """Yield the bytes of a file, as they were, a block at a time."""
        for piece in file.pieces:
            if isinstance(piece, int):
                for index in range(len(self.tensors[piece].blocks)):
                    yield self.block(piece, index).data
            else:
                yield piece

    def skeleton(self) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
        """Return the model without its large tensors, as ``read_skeleton`` does.

        Raises:
            ModelError: It is damaged, or the package holds no model.
        """
        file = self.files[0]
        if not file.size:
            raise ModelError(f"{self.label} holds no ONNX model")
        return parse_skeleton(Window(self, file), file.size, self.label)

    def external(self, proto: onnx.TensorProto) -> LazyTensor:
        """Return the values of an external tensor from the file that was packed too.

        Raises:
            ModelError: The package has no such file, or the range does not fit.
        """
        entries = {entry.key: entry.value for entry in proto.external_data}
        location = entries.get("location", "")
        if not location or all(file.name != location for file in self.files):
            raise ModelError(
                f"tensor {proto.name!r}: external data location {location!r} is not "
                "in the package"
            )
        return self.tensor(proto, *external_range(proto), location)

    def tensor(
        self, proto: onnx.TensorProto, offset: int, length: int, name: str = ""
    ) -> LazyTensor:
        """Return the values in a range of a file.

        Args:
            proto: Type, shape and name.
            offset: First byte.
            length: Number of bytes.
            name: The file; empty for the model.

        Raises:
            ModelError: The range is outside the file, or not of the size that the
                shape asks for.
        """
        file = next(file for file in self.files if file.name == name)
        if offset + length > file.size:
            raise ModelError(
                f"tensor {proto.name!r} lies at bytes {offset} to {offset + length} of "
                f"{name}, which has {file.size}"
            )
        shape = tuple(proto.dims)
        place = bisect.bisect_left(file.starts, offset)
        piece = file.pieces[place] if place < len(file.pieces) else None
        if (
            isinstance(piece, int)
            and file.starts[place] == offset
            and self.tensors[piece].nbytes == length
        ):
            return PackedTensor(self, piece, shape, proto.data_type, proto.name)
        # A few bytes, which stay with the graph, or a part of a tensor.
        if plain_bytes(shape, proto.data_type) != length:
            raise ModelError(
                f"tensor {proto.name!r} has {length} bytes of data, its shape "
                f"{list(shape)} asks for {plain_bytes(shape, proto.data_type)}"
            )
        raw = Window(self, file).span(offset, offset + length)
        return ProtoTensor(
            onnx.TensorProto(
                dims=shape, data_type=proto.data_type, name=proto.name, raw_data=raw
            )
        )


class Window:
    """Random access to the bytes of a file in a package, for a walk over them."""

    def __init__(self, package: Package, file: Contents) -> None:
        """Start with nothing decoded."""
        self._package = package
        self._file = file
        self._start = 0
        self._data: memoryview | bytes = b""
        self.size = file.size

    def byte(self, at: int) -> int:
        """Return one byte."""
        offset = at - self._start
        if not 0 <= offset < len(self._data):
            self._at(at)
            offset = at - self._start
        return self._data[offset]

    def span(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` up to ``stop``."""
        out = []
        while start < stop:
            self._at(start)
            piece = self._data[start - self._start : stop - self._start]
            out.append(bytes(piece))
            start += len(piece)
        return b"".join(out)

    def _at(self, at: int) -> None:
        """Have the piece in hand that holds a byte."""
        if 0 <= at - self._start < len(self._data):
            return
        place = bisect.bisect_right(self._file.starts, at) - 1
        if not 0 <= place < len(self._file.pieces):
            raise ModelError(f"{self._package.label} ends within a record")
        piece = self._file.pieces[place]
        self._start = self._file.starts[place]
        if isinstance(piece, int):
            self._data = self._package.read(piece).data
        else:
            self._data = piece


class PackedTensor(LazyTensor):
    """Values in a package, decoded when somebody asks."""

    def __init__(
        self,
        package: Package,
        number: int,
        shape: tuple[int, ...],
        data_type: int,
        name: str = "",
    ) -> None:
        """Point at a tensor of a package.

        Raises:
            ModelError: It has not the bytes that its shape asks for.
        """
        super().__init__(shape, data_type)
        held = package.tensors[number].nbytes
        if data_type == onnx.TensorProto.STRING or held != self.nbytes:
            raise ModelError(
                f"tensor {name!r} has {held} bytes of data, its shape {list(shape)} "
                f"asks for {self.nbytes}"
            )
        self._package = package
        self._number = number
        self._kept: weakref.ref[Array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is decoded behind."""
        return {**self.__dict__, "_kept": None}

    def lies_with(self, other: LazyTensor) -> bool:
        """Whether both are the same tensor of the same package."""
        return isinstance(other, PackedTensor) and (
            self._number == other._number and self._package.same_file(other._package)
        )

    def read(self) -> Array:
        """Return all values; the array is shared by all who hold it at a time.

        Raises:
            ModelError: They are damaged, or the package was changed.
        """
        kept = self._kept() if self._kept is not None else None
        if kept is None:
            raw = self._package.read(self._number)
            kept = values_of(raw, self.size, self.data_type).reshape(self.shape)
            self._kept = weakref.ref(kept)
        return kept

    def raw_chunks(self, nbytes: int = 8 << 20) -> Iterator[bytes | memoryview]:
        """Yield the raw data, at most a block of it decoded at a time."""
        for index in range(len(self._package.tensors[self._number].blocks)):
            data = self._package.block(self._number, index).data
            for start in range(0, len(data), nbytes):
                yield data[start : start + nbytes]

    def chunks(self, nbytes: int = 8 << 20) -> Iterator[Array]:
        """Yield the values, at most a block of them decoded at a time."""
        bits = bits_of(self.data_type)
        left = self.size
        for data in self.raw_chunks(max(8, nbytes * bits // (8 * self.dtype.itemsize))):
            count = min(left, len(data) * 8 // bits)
            left -= count
            yield values_of(np.frombuffer(data, np.uint8), count, self.data_type)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _index(stored: bytes) -> bytes:
    """Return the index, decompressed."""
    reader = Reader(stored)
    method = reader.byte()
    if method == 0:
        return stored[1:]
    size = reader.number(_INDEX_ALWAYS + _INDEX_EXPANSION * len(stored))
    data = reader.take(reader.left)
    if method == 2:
        return unlzma(data, size)
    if method != 1:
        raise Damaged(f"its index has the unknown form {method}")
    inflate = zlib.decompressobj(-15, zdict=WORDS)
    try:
        index = inflate.decompress(data, size)
    except zlib.error as error:
        raise Damaged(f"its index cannot be read: {error}") from error
    if len(index) != size:
        raise Damaged("its index is not of the length it should have")
    return index


def _count(reader: Reader, least: int) -> int:
    """Return how many entries follow, each of at least so many bytes."""
    return reader.number(reader.left // least)


def _read_file(reader: Reader) -> tuple[str, list[int]]:
    try:
        name = str(reader.take(reader.number(_NAMES)), "utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("the name of a file is no text") from error
    parts = Path(name).parts
    if (
        name.startswith("/")
        or any(sign in name for sign in "\\:\0\n")
        or ".." in parts
        or (name and not parts)
    ):
        raise Damaged(f"the file name {name!r} leaves the folder or is not portable")
    return name, [reader.number(1 << 62) for _ in range(_count(reader, 1))]


def _read_tensor(reader: Reader, offset: int) -> tuple[Stored, int]:
    nbytes = reader.number(1 << 60)
    count = reader.number(reader.left // 5)
    block = nbytes
    if count > 1:
        block = reader.number(1 << 60)
    if not 0 < block <= 2 * _BLOCK_BYTES or -(-nbytes // block) != count:
        raise Damaged(f"{nbytes} bytes are not {count} blocks")
    blocks = []
    for _ in range(count):
        length = reader.number(1 << 60)
        blocks.append((offset, length, int(reader.array(1, "<u4")[0])))
        offset += length
    return Stored(nbytes, block, tuple(blocks)), offset
