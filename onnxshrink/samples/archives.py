"""Arrays in files: ``.npy``, ``.npz`` and ``.safetensors``, read with bounds.

Nothing that a file claims is believed before it is checked against the size of the
file, so that a damaged or hostile file costs no memory. Files are read, not mapped: one
that is cut short while it is read is an error, where a mapped page would end the
process.

Tested in tests/samples/test_archives.py.
"""

from __future__ import annotations

import ast
import bz2
import itertools
import json
import lzma
import math
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnxshrink.errors import ModelError
from onnxshrink.samples.columns import Array, Column, Indices
from onnxshrink.tensors import numpy_type

__all__ = ["FileArray", "open_npy", "open_npz", "open_safetensors", "refuse_pickle"]

MAPPED = 64 << 20
"""Bytes from which an unpacked array is kept in a temporary file."""
MOST_SAMPLES = 1 << 40
"""Samples that are believed where the values of a sample take no bytes."""
_LONGEST_HEADER = 1 << 16
_STEP = 1 << 20
_RATIO = {zipfile.ZIP_DEFLATED: 1100, zipfile.ZIP_BZIP2: 10_000}
"""Most that a method is believed to shrink; deflate cannot do more than 1,032."""
_MOST_RATIO = 10_000
_SMALL = 16 << 20
"""Bytes that are believed whatever the ratio."""
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".ckpt")
_KINDS = "biufcSU"

_FAILURES = (
    OSError,
    ValueError,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    KeyError,
    IndexError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What zipfile and the decoders raise on damaged files."""


def refuse_pickle(path: Path) -> None:
    """Refuse files that hold Python objects.

    Raises:
        ModelError: It is a pickle, by its name or its first bytes.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix.lower() in _PICKLES or (
        head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"
    ):
        raise ModelError(
            f"{path} is a pickle of Python objects, which are never loaded: they can "
            "run any code; save the arrays with numpy.savez"
        )


class FileArray(Column):
    """An array that lies in a file as it is, in the order of C."""

    def __init__(
        self, path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Take a part of a file; nothing is read.

        Args:
            path: The file.
            start: Where the values begin.
            shape: [samples, *sample].
            dtype: Of the values.
        """
        self._path, self._start = path, start
        self.count, self.shape, self.dtype = shape[0], shape[1:], dtype
        self._stride = math.prod(self.shape) * dtype.itemsize

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order.

        Raises:
            ModelError: The file became shorter.
        """
        out = np.empty((len(indices), *self.shape), self.dtype)
        if not out.nbytes:
            return out
        target: Any = out.reshape(-1).view(np.uint8).reshape(len(indices), -1)
        try:
            with self._path.open("rb", buffering=0) as file:
                for first, last in _runs(indices):
                    file.seek(self._start + int(indices[first]) * self._stride)
                    _fill(file, memoryview(target[first:last]).cast("B"))
        except EOFError as error:
            raise ModelError(f"{self._path} was cut short while it was read") from error
        except OSError as error:
            raise ModelError(
                f"{self._path} cannot be read: {error.strerror or error}"
            ) from error
        return out


def _runs(indices: Indices) -> Iterator[tuple[int, int]]:
    """Yield positions [first, last) of indices that follow each other."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    ends = [0, *breaks.tolist(), len(indices)]
    yield from itertools.pairwise(ends)


def _fill(file: Any, target: memoryview) -> None:
    """Read so many bytes; a file may give fewer at a time."""
    while target.nbytes:
        got = file.readinto(target[: 1 << 30])
        if not got:
            raise EOFError("it ends too early")
        target = target[got:]


# --- npy --------------------------------------------------------------------------


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, Fortran order, dtype and bytes of the header of an npy stream.

    Raises:
        ValueError: It is none.
    """
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or len(magic) < 8:
        raise ValueError("it does not begin like an .npy")
    version = magic[6]
    if version not in (1, 2, 3):
        raise ValueError(f"its format version {version} is not known")
    width = 2 if version == 1 else 4
    size = int.from_bytes(file.read(width), "little")
    if size > _LONGEST_HEADER:
        raise ValueError(f"its header claims {size:,} bytes")
    raw = file.read(size)
    if len(raw) < size:
        raise ValueError("it ends inside its header")
    try:
        text = raw.decode("utf-8" if version == 3 else "latin-1").strip()
        if version == 1:  # of Python 2
            text = re.sub(r"(\d)L\b", r"\1", text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("its header cannot be read") from error
    if not isinstance(said, dict) or said.keys() != {
        "descr",
        "fortran_order",
        "shape",
    }:
        raise ValueError("its header cannot be read")
    shape = said["shape"]
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise ValueError("its header gives no shape")
    if any(size < 0 for size in shape):
        raise ValueError(f"its header gives the shape {_shown(shape)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = np.lib.format.descr_to_dtype(said["descr"])
    except (
        TypeError,
        ValueError,
        SyntaxError,
        KeyError,
        IndexError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError("its header gives no type that is known") from error
    return shape, bool(said["fortran_order"]), dtype, 8 + width + size


def _shown(shape: tuple[int, ...]) -> str:
    words = [str(size) if abs(size) < 10**15 else f"{size:.1e}" for size in shape[:8]]
    return f"[{', '.join(words)}{', ...' if len(shape) > 8 else ''}]"


def _checked(
    what: str, shape: tuple[int, ...], dtype: np.dtype[Any], start: int, size: int
) -> None:
    """Hold what a header claims to the bytes that are there."""
    if dtype.hasobject:
        raise ModelError(
            f"{what} holds Python objects, which are never loaded: they can run any "
            "code; save numbers or text, such as array.astype(str)"
        )
    if dtype.names is not None or dtype.kind not in _KINDS:
        raise ModelError(f"{what} holds {dtype}, and samples are numbers or text")
    if len(shape) > 32:
        raise ModelError(f"{what} claims {len(shape)} axes")
    claimed = math.prod(shape) * dtype.itemsize
    if start + claimed != size:
        raise ModelError(
            f"{what} claims {_bytes(claimed)} of values and has {size - start:,}"
        )
    if shape and (shape[0] > MOST_SAMPLES or max(shape) >= 1 << 62):
        raise ModelError(f"{what} claims the shape {_shown(shape)}")
    if shape and not claimed and shape[0] > size:
        raise ModelError(f"{what} claims {_shown(shape)} without any value")


def _bytes(count: int) -> str:
    return (
        f"{count:,} bytes"
        if count < 10**18
        else f"{float(min(count, 10**300)):.0e} bytes"
    )


def open_npy(path: Path) -> Column:
    """Open an ``.npy``; only the header is read.

    Raises:
        ModelError: It cannot be read, or holds no array of samples.
    """
    array = open_item(path)
    if array is None:
        raise ModelError(f"{path} is a single value, not an array of samples")
    return array


def open_item(path: Path) -> Column | None:
    """Open an ``.npy``; ``None`` is a single value, which ``single`` reads."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            shape, fortran, dtype, start = _header(file)
    except (OSError, ValueError) as error:
        refuse_pickle(path)
        raise ModelError(f"{path} cannot be read: {error}") from error
    _checked(str(path), shape, dtype, start, size)
    if not shape:
        return None
    if fortran and len(shape) > 1:
        return Unpacked(str(path), lambda: path.open("rb"), start, shape, dtype, True)
    return FileArray(path, start, shape, dtype)


def single(path: Path) -> Array:
    """Read the ``.npy`` of a single value, as an array without axes."""
    try:
        with path.open("rb") as file:
            _, _, dtype, start = _header(file)
        values = FileArray(path, start, (1,), dtype).rows(np.zeros(1, np.int64))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return values[0:1].reshape(())


class Unpacked(Column):
    """An array that is read once into memory, or into a temporary file if large."""

    def __init__(
        self,
        what: str,
        opened: Callable[[], Any],
        start: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        fortran: bool,
    ) -> None:
        self._what, self._opened, self._start = what, opened, start
        self._whole, self._fortran = shape, fortran
        self.count, self.shape, self.dtype = shape[0], shape[1:], dtype
        self._array: Array | None = None

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        if self._array is None:
            self._array = self._read()
        return np.asarray(self._array[indices])

    def _read(self) -> Array:
        size = math.prod(self._whole) * self.dtype.itemsize
        try:
            with self._opened() as file:
                _fill_skip(file, self._start)
                if size < MAPPED:
                    buffer = bytearray(size)
                    _fill(file, memoryview(buffer))
                    flat: Array = np.frombuffer(buffer, self.dtype)
                else:
                    # It has no name on disk, and nobody else can cut it short.
                    with tempfile.TemporaryFile() as scratch:
                        left = size
                        while left:
                            piece = file.read(min(_STEP, left))
                            if not piece:
                                raise EOFError("it ends too early")
                            scratch.write(piece)
                            left -= len(piece)
                        scratch.flush()
                        flat = np.memmap(scratch, self.dtype, "r")
                if file.read(1):
                    raise ValueError("it holds more than it claims")
        except _FAILURES as error:
            raise ModelError(f"{self._what} cannot be read: {_why(error)}") from error
        return flat.reshape(self._whole, order="F" if self._fortran else "C")


def _fill_skip(file: Any, count: int) -> None:
    _fill(file, memoryview(bytearray(count)))


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or {"EOFError": "it ends too early"}.get(
        type(error).__name__, "it is damaged"
    )


# --- npz --------------------------------------------------------------------------


def open_npz(path: Path) -> dict[str, Column]:
    """Open the arrays of an ``.npz`` by name; nothing but headers is read.

    Raises:
        ModelError: It cannot be read, or claims more than can be in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _FAILURES as error:
        refuse_pickle(path)
        raise ModelError(f"{path} is not an .npz file: {_why(error)}") from error
    arrays: dict[str, Column] = {}
    for info in infos:
        if not info.filename.endswith(".npy"):
            continue
        name = info.filename.removesuffix(".npy")
        if name in arrays:
            raise ModelError(f"{path} has two arrays {name!r}")
        arrays[name] = _member(path, info, f"{path}: array {name!r}")
    if not arrays:
        raise ModelError(f"{path} holds no arrays")
    return arrays


def _member(path: Path, info: zipfile.ZipInfo, what: str) -> Column:
    if info.flag_bits & 1:
        raise ModelError(f"{what} is encrypted")
    ratio = _RATIO.get(info.compress_type, _MOST_RATIO)
    if info.file_size > max(ratio * info.compress_size, _SMALL) or (
        info.compress_type == zipfile.ZIP_STORED
        and info.file_size != info.compress_size
    ):
        raise ModelError(
            f"{what} claims to unpack from {info.compress_size:,} bytes to "
            f"{info.file_size:,}"
        )

    def opened() -> Any:
        return _Member(path, info)

    try:
        with opened() as file:
            shape, fortran, dtype, start = _header(file)
            place = file.start
    except _FAILURES as error:
        raise ModelError(f"{what} cannot be read: {_why(error)}") from error
    _checked(what, shape, dtype, start, info.file_size)
    if not shape:
        return Unpacked(what, opened, start, (1,), dtype, False)
    plain = info.compress_type == zipfile.ZIP_STORED
    if plain and not (fortran and len(shape) > 1):
        return FileArray(path, place + start, shape, dtype)
    return Unpacked(what, opened, start, shape, dtype, fortran)


class _Member:
    """The unpacked bytes of a member, made a bounded piece at a time.

    zipfile asks bzip2 and LZMA for everything that a piece of input unpacks to.
    """

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        self._file: BinaryIO = path.open("rb")
        try:
            self._file.seek(info.header_offset)
            head = self._file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise ValueError("its place in the archive is wrong")
            skip = sum(struct.unpack("<HH", head[26:30]))
            self.start = info.header_offset + 30 + skip
            self._file.seek(self.start)
            self._packed = info.compress_size
            self._left = info.file_size
            self._crc, self._wanted = 0, info.CRC
            self._pending = b""
            self._engine = self._made(info)
        except BaseException:
            self._file.close()
            raise

    def _made(self, info: zipfile.ZipInfo) -> Any:
        if info.compress_type == zipfile.ZIP_STORED:
            return None
        if info.compress_type == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-15)
        if info.compress_type == zipfile.ZIP_BZIP2:
            return bz2.BZ2Decompressor()
        if info.compress_type == zipfile.ZIP_LZMA:
            head = self._take(9)
            if len(head) < 9 or head[2:4] != b"\x05\x00" or head[4] >= 225:
                raise ValueError("its LZMA properties are not known")
            code, dictionary = head[4], int.from_bytes(head[5:9], "little")
            # More than it unpacks to is never looked back at.
            bounded = min(dictionary, max(4096, info.file_size))
            properties = {
                "id": lzma.FILTER_LZMA1,
                "dict_size": max(4096, bounded),
                "lc": code % 9,
                "lp": code // 9 % 5,
                "pb": code // 45,
            }
            return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[properties])
        raise ValueError(f"its method of compression, {info.compress_type}, is unknown")

    def _take(self, count: int) -> bytes:
        piece = self._file.read(min(count, self._packed))
        self._packed -= len(piece)
        return piece

    def _more(self, most: int) -> bytes:
        """Return at least one byte and at most so many, or nothing at the end."""
        engine = self._engine
        if engine is None:
            return self._take(most)
        while True:
            if isinstance(self._engine, (bz2.BZ2Decompressor, lzma.LZMADecompressor)):
                if engine.eof:
                    return b""
                fed = self._take(_STEP // 16) if engine.needs_input else b""
                if engine.needs_input and not fed:
                    return b""
                made = engine.decompress(fed, max_length=most)
            else:
                fed = engine.unconsumed_tail or self._take(_STEP // 16)
                if engine.eof or not fed:
                    return b""
                made = engine.decompress(fed, most)
            if made:
                return bytes(made)

    def readinto(self, target: memoryview) -> int:
        piece = self.read(min(target.nbytes, _STEP))
        target[: len(piece)] = piece
        return len(piece)

    def read(self, count: int) -> bytes:
        """Return so many bytes, fewer at the end only."""
        pieces = []
        while count and self._left:
            piece = self._more(min(count, self._left, _STEP))
            if not piece:
                raise EOFError("it ends too early")
            self._left -= len(piece)
            count -= len(piece)
            self._crc = zlib.crc32(piece, self._crc)
            pieces.append(piece)
            if not self._left and self._crc != self._wanted:
                raise ValueError("its checksum is wrong")
        return b"".join(pieces)

    def __enter__(self) -> _Member:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


# --- safetensors ------------------------------------------------------------------

_BFLOAT16 = 16
"""``onnx.TensorProto.BFLOAT16``."""
_SAFE = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


def open_safetensors(path: Path) -> dict[str, Column]:
    """Open the tensors of a ``.safetensors`` by name; only the header is read.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, 100 << 20):
                raise ValueError(f"its header claims {length:,} bytes")
            said = json.loads(file.read(length))
        if not isinstance(said, dict):
            raise ValueError("its header is no table")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {_why(error)}") from error
    arrays: dict[str, Column] = {}
    for name, entry in said.items():
        if name == "__metadata__":
            continue
        what = f"{path}: array {name!r}"
        try:
            shape, kind = tuple(entry["shape"]), str(entry["dtype"])
            first, last = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{what}: its header cannot be read") from error
        if kind == "BF16":
            dtype = numpy_type(_BFLOAT16)
        elif kind in _SAFE:
            dtype = np.dtype(_SAFE[kind])
        else:
            raise ModelError(f"{what} holds {kind}, and samples are plain numbers")
        if not 8 + length + last <= size or first > last:
            raise ModelError(f"{what} lies outside of the file")
        if not shape:
            shape = (1,)
        claimed = math.prod(shape) * dtype.itemsize
        if claimed != last - first or len(shape) > 32 or shape[0] > MOST_SAMPLES:
            raise ModelError(
                f"{what} claims {_bytes(claimed)} and has {last - first:,}"
            )
        if not claimed and shape[0] > size:
            raise ModelError(f"{what} claims {_shown(shape)} without any value")
        arrays[name] = FileArray(path, 8 + length + first, shape, dtype)
    if not arrays:
        raise ModelError(f"{path} holds no arrays")
    return arrays
