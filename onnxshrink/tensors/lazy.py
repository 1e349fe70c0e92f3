"""Tensor values that are read only when someone asks, whole or in chunks."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import onnx
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxshrink.errors import ModelError

__all__ = [
    "ArrayTensor",
    "FileTensor",
    "LazyTensor",
    "ProtoTensor",
    "SparseTensor",
    "bits_of",
    "external_range",
    "numpy_type",
    "plain_bytes",
    "refer_to",
    "values_of",
]

CHUNK = 8 << 20
"""Bytes of decoded values that one chunk holds unless told otherwise."""

_SUB_BYTE: dict[int, int] = {
    onnx.TensorProto.DataType.Value(name): bits
    for name, bits in {
        "INT4": 4,
        "UINT4": 4,
        "FLOAT4E2M1": 4,
        "INT2": 2,
        "UINT2": 2,
        "FLOAT6E2M3": 6,
        "FLOAT6E3M2": 6,
    }.items()
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118  # an enum, no mapping
}
"""Bits of the element types that ONNX packs; an older onnx knows fewer of them."""

_COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
_TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
_MAX_BYTES = 1 << 60
_MAX_DENSE = 1 << 31
"""A sparse tensor of more dense bytes is never made dense: no plain ONNX file could
hold it, and a few bytes of a hostile file could ask for any amount of memory."""


@functools.cache
def numpy_type(data_type: int) -> np.dtype[Any]:
    """Return the numpy dtype of an ONNX element type; ``object`` for strings.

    Raises:
        ModelError: The element type is unknown to the installed onnx.
    """
    if data_type == onnx.TensorProto.STRING:
        return np.dtype(object)
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"element type {data_type} is unknown to onnx {onnx.__version__}"
        ) from error


def bits_of(data_type: int) -> int:
    """Return the bits one element takes in ONNX raw data; 0 for strings."""
    if data_type == onnx.TensorProto.STRING:
        return 0
    return _SUB_BYTE.get(data_type) or numpy_type(data_type).itemsize * 8


def plain_bytes(shape: tuple[int, ...], data_type: int) -> int:
    """Return the bytes of raw data that a tensor of this shape and type takes."""
    return (math.prod(shape) * bits_of(data_type) + 7) // 8


class LazyTensor(LazyValues):  # type: ignore[misc]  # graphsurgeon is untyped
    """Values of known shape and type that have not been read yet.

    A graphsurgeon ``LazyValues``, so that ``gs.Constant`` takes one as it is.

    Attributes:
        shape: Static shape.
        data_type: ONNX element type (``TensorProto.DataType``).
        dtype: numpy dtype of what ``read`` returns (ml_dtypes for what numpy lacks).
        size: Number of elements.
        nbytes: Bytes as plain ONNX raw data (a 4-bit element is half a byte).
        cheap_to_reread: Whether reading twice costs less than keeping a copy.
    """

    shape: tuple[int, ...]
    data_type: int
    dtype: np.dtype[Any]
    nbytes: int
    cheap_to_reread: ClassVar[bool] = True

    def __init__(self, shape: tuple[int, ...], data_type: int) -> None:
        """Describe a tensor.

        Raises:
            ModelError: A negative or impossible dimension, an unknown element type.
        """
        if any(dim < 0 for dim in shape):
            raise ModelError(f"a tensor has the negative dimension {min(shape)}")
        # numpy multiplies the dimensions of an empty tensor too, the zeros left out.
        if math.prod(dim or 1 for dim in shape) * 16 > _MAX_BYTES:
            raise ModelError(f"a tensor has the impossible shape {list(shape)}")
        self.shape = shape
        self.data_type = data_type
        self.dtype = numpy_type(data_type)
        self.nbytes = plain_bytes(shape, data_type)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def lies_with(self, other: LazyTensor) -> bool:
        """Whether both are known, without a look at them, to be the same bytes."""
        return self is other

    @abstractmethod
    def read(self) -> np.ndarray[Any, Any]:
        """Return all values; the array may be shared, so do not write into it."""

    def chunks(self, nbytes: int = CHUNK) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the values as flat arrays of at most ``nbytes`` bytes, in C order."""
        flat = self.read().reshape(-1)
        step = _step(nbytes, self.dtype)
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def raw_chunks(self, nbytes: int = CHUNK) -> Iterator[bytes | memoryview]:
        """Yield the values as pieces of ONNX raw data (little-endian, packed).

        Raises:
            ModelError: Strings have no raw data.
        """
        if self.data_type == onnx.TensorProto.STRING:
            raise ModelError("a tensor of strings has no raw data")
        for chunk in self.chunks(nbytes):
            if self.data_type in _SUB_BYTE:
                yield numpy_helper.from_array(np.ascontiguousarray(chunk)).raw_data
                continue
            little = chunk.astype(self.dtype.newbyteorder("<"), copy=False)
            yield np.ascontiguousarray(little).view(np.uint8).data

    def load(self) -> np.ndarray[Any, Any]:
        """Return a fresh array of all values (graphsurgeon's name)."""
        return np.array(self.read())

    def __str__(self) -> str:
        """Show shape and type, never values."""
        kind = onnx.TensorProto.DataType.Name(self.data_type).lower()
        return f"{type(self).__name__}({kind}{list(self.shape)})"

    __repr__ = __str__


def _step(nbytes: int, dtype: np.dtype[Any]) -> int:
    """Return elements in a chunk; a multiple of 8, so that packed ones fill bytes."""
    return max(8, nbytes // max(1, dtype.itemsize) // 8 * 8)


def _unpacked(
    raw: bytes | memoryview, count: int, data_type: int
) -> np.ndarray[Any, Any]:
    """Return ``count`` elements of less than a byte each from packed raw data."""
    proto = onnx.TensorProto(dims=[count], data_type=data_type, raw_data=bytes(raw))
    return np.asarray(numpy_helper.to_array(proto))


def values_of(
    raw: np.ndarray[Any, Any], count: int, data_type: int
) -> np.ndarray[Any, Any]:
    """Return ``count`` values, flat, from little-endian raw data, uint8 [bytes]."""
    if data_type in _SUB_BYTE:
        return _unpacked(raw.data, count, data_type)
    dtype = numpy_type(data_type)
    little = raw.view(dtype.newbyteorder("<"))
    return little.astype(dtype, copy=False)


class ProtoTensor(LazyTensor):
    """Values held in memory by a ``TensorProto``."""

    def __init__(self, proto: onnx.TensorProto) -> None:
        """Wrap a tensor that is not external.

        Raises:
            ModelError: Its data does not have the size its shape asks for, or it keeps
                data in two places.
        """
        name = proto.name
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"tensor {name!r} has external data, which cannot be here")
        if proto.HasField("segment"):
            raise ModelError(f"tensor {name!r} is one segment of a larger one")
        super().__init__(tuple(proto.dims), proto.data_type)
        self.tensor = proto
        has_raw = proto.HasField("raw_data")
        filled = [field for field in _TYPED_FIELDS if len(getattr(proto, field))]
        if len(filled) + (has_raw and bool(proto.raw_data)) > 1:
            raise ModelError(f"tensor {name!r} keeps its data in two fields")
        if has_raw and not filled:
            held, asked, unit = len(proto.raw_data), self.nbytes, "bytes"
            if proto.data_type == onnx.TensorProto.STRING:
                raise ModelError(f"tensor {name!r}: strings cannot be raw data")
        else:
            field = onnx.helper.tensor_dtype_to_field(proto.data_type)
            held, asked, unit = len(getattr(proto, field)), self.size, "values"
            if proto.data_type in _COMPLEX:
                asked *= 2
            elif bits_of(proto.data_type) in (2, 4):
                asked = self.nbytes  # one packed byte in each int32
            if filled and filled != [field]:
                raise ModelError(
                    f"tensor {name!r} keeps its data in {filled[0]}, "
                    f"its element type asks for {field}"
                )
        if held != asked:
            raise ModelError(
                f"tensor {name!r} has {held} {unit} of data, "
                f"its shape {list(self.shape)} asks for {asked}"
            )

    def read(self) -> np.ndarray[Any, Any]:
        """Return all values; strings that are not UTF-8 stay bytes.

        Raises:
            ModelError: The data cannot be decoded.
        """
        try:
            return np.asarray(numpy_helper.to_array(self.tensor))
        except UnicodeDecodeError:
            strings = np.empty(self.size, dtype=object)
            strings[:] = list(self.tensor.string_data)
            return strings.reshape(self.shape)
        except (ValueError, TypeError) as error:
            name = self.tensor.name
            raise ModelError(f"tensor {name!r} cannot be read: {error}") from error

    def raw_chunks(self, nbytes: int = CHUNK) -> Iterator[bytes | memoryview]:
        """Yield the raw data as it is, where the proto has it."""
        if not self.tensor.HasField("raw_data"):
            yield from super().raw_chunks(nbytes)
            return
        raw = memoryview(self.tensor.raw_data)
        for start in range(0, len(raw), nbytes):
            yield raw[start : start + nbytes]


class ArrayTensor(LazyTensor):
    """Values held by a numpy array."""

    def __init__(
        self, array: np.ndarray[Any, Any], data_type: int | None = None
    ) -> None:
        """Wrap an array; ``data_type`` only where the dtype does not tell it.

        Raises:
            ModelError: The array's dtype has no ONNX element type, or cannot be
                taken for the given one (floats are converted, bit patterns of its
                size, such as uint16, are taken as they are).
        """
        array = np.asarray(array)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if data_type is None:
            try:
                data_type = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
            except (KeyError, ValueError) as error:
                raise ModelError(
                    f"numpy dtype {array.dtype} has no ONNX element type"
                ) from error
        super().__init__(tuple(array.shape), data_type)
        if self.dtype != array.dtype and self.dtype != object:
            if array.dtype.kind == "f":  # graphsurgeon's export_dtype: a conversion
                array = array.astype(self.dtype)
            elif self.dtype.itemsize == array.dtype.itemsize:
                array = np.ascontiguousarray(array).reshape(array.shape)
                array = array.view(self.dtype)
            else:
                raise ModelError(
                    f"an array of {array.dtype} cannot be the values of a tensor of "
                    f"{onnx.TensorProto.DataType.Name(data_type)}"
                )
        self.array = array

    def read(self) -> np.ndarray[Any, Any]:
        """Return the array itself."""
        return self.array


class FileTensor(LazyTensor):
    """Values in a range of a file, read piece by piece and never mapped.

    A mapping would end the process if another one cut the file short; a read fails
    with an error instead.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        length: int,
        shape: tuple[int, ...],
        data_type: int,
        name: str = "",
    ) -> None:
        """Point at ``length`` bytes from ``offset`` on.

        Raises:
            ModelError: The range is outside the file or not of the tensor's size.
        """
        super().__init__(shape, data_type)
        self.path = path
        self.offset = offset
        self.length = length
        self.label = name
        if data_type == onnx.TensorProto.STRING:
            raise ModelError(f"tensor {name!r}: strings cannot be external data")
        if length != self.nbytes:
            raise ModelError(
                f"tensor {name!r} has {length} bytes of data in {path.name}, "
                f"its shape {list(shape)} asks for {self.nbytes}"
            )
        try:
            status = path.stat()
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        available = status.st_size
        if offset < 0 or offset + length > available:
            raise ModelError(
                f"tensor {name!r} lies at bytes {offset} to {offset + length} of "
                f"{path.name}, which has {available}"
            )
        self._state = _state(status)
        self._digest: bytes | None = None

    def lies_with(self, other: LazyTensor) -> bool:
        """Whether both are the same bytes of the same file."""
        return isinstance(other, FileTensor) and (self.offset, self._state) == (
            other.offset,
            other._state,
        )

    def __copy__(self) -> FileTensor:
        """Return the tensor itself: it does not change."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FileTensor:
        """Return the tensor itself: it does not change."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return a reference that another process takes, on another host too.

        That is the file's path, the range, and a digest of the values: a copy of the
        file on another host, or in another file system there, is as good.
        """
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.raw_chunks():
            digest.update(chunk)
        return {**self.__dict__, "_digest": digest.digest()}

    def _accept(self, file: BinaryIO) -> None:
        """Refuse a file that is not in the state it was in, or no copy of it.

        Raises:
            ModelError: The file was changed, or holds other values.
        """
        state = _state(os.fstat(file.fileno()))
        if state == self._state:
            return
        if self._digest is None:
            raise ModelError(f"{self.path} was changed while it was in use")
        digest, left = hashlib.blake2b(digest_size=16), self.length
        file.seek(self.offset)
        while left > 0 and (piece := file.read(min(CHUNK, left))):
            digest.update(piece)
            left -= len(piece)
        if left or digest.digest() != self._digest:
            raise ModelError(
                f"{self.path} holds other values here than where the run was started"
            )
        self._state, self._digest = state, None
        file.seek(0)

    def _bytes(self, start: int, count: int) -> np.ndarray[Any, Any]:
        try:
            with self.path.open("rb", buffering=0) as file:
                self._accept(file)
                piece = np.fromfile(
                    file, dtype=np.uint8, count=count, offset=self.offset + start
                )
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        if piece.size != count:
            raise ModelError(f"{self.path} was cut short while it was being read")
        return piece

    def _decoded(self, piece: np.ndarray[Any, Any], count: int) -> Any:
        return values_of(piece, count, self.data_type)

    def read(self) -> np.ndarray[Any, Any]:
        """Return all values in a fresh array.

        Raises:
            ModelError: The file cannot be read or was changed, or numpy cannot take
                the shape.
        """
        flat = self._decoded(self._bytes(0, self.length), self.size)
        try:
            return np.asarray(flat.reshape(self.shape))
        except ValueError as error:
            raise ModelError(f"tensor {self.label!r}: {error}") from error

    def chunks(self, nbytes: int = CHUNK) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the values piece by piece, each read when it is asked for."""
        step = _step(nbytes, self.dtype)
        bits = bits_of(self.data_type)
        for start in range(0, self.size, step):
            count = min(step, self.size - start)
            piece = self._bytes(start * bits // 8, (count * bits + 7) // 8)
            yield self._decoded(piece, count)

    def raw_chunks(self, nbytes: int = CHUNK) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the file as they are."""
        for start in range(0, self.length, nbytes):
            yield self._bytes(start, min(nbytes, self.length - start)).data


def _state(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells one state of a file from another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class SparseTensor(LazyTensor):
    """Values of a ``SparseTensorProto``; dense when read."""

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        """Wrap a sparse initializer.

        Raises:
            ModelError: Its values or indices are external or not of their own shape.
        """
        super().__init__(tuple(proto.dims), proto.values.data_type)
        self.tensor = proto
        self._values = ProtoTensor(proto.values)
        self._indices = ProtoTensor(proto.indices)

    def read(self) -> np.ndarray[Any, Any]:
        """Return the dense values in a fresh array.

        Raises:
            ModelError: An index lies outside the dense shape, or that takes 2 GiB or
                more.
        """
        name = self.tensor.values.name
        if self.nbytes >= _MAX_DENSE:
            raise ModelError(
                f"sparse tensor {name!r} of shape {list(self.shape)} is too large to "
                "be made dense"
            )
        values = self._values.read()
        indices = self._indices.read()
        try:
            if indices.dtype.kind not in "iu":
                raise ValueError(f"its indices are {indices.dtype}")
            dense = np.zeros(self.size, dtype=self.dtype)
            if indices.ndim == 2:
                if indices.shape[1] != len(self.shape):
                    raise ValueError(f"its indices have {indices.shape[1]} columns")
                indices = np.ravel_multi_index(tuple(indices.T), self.shape)
            if indices.size and indices.min() < 0:
                raise IndexError(f"index {indices.min()} is negative")
            if indices.shape != (values.size,):
                raise ValueError(f"{indices.size} indices for {values.size} values")
            dense[indices] = values.reshape(-1)
        except (IndexError, ValueError, MemoryError) as error:
            raise ModelError(f"sparse tensor {name!r} is broken: {error}") from error
        return dense.reshape(self.shape)


def external_tensor(proto: onnx.TensorProto, folder: Path | None) -> FileTensor:
    """Return the values of an external tensor, once its location proves harmless.

    Args:
        proto: A tensor whose ``data_location`` is EXTERNAL. Without a length it takes
            what its shape asks for.
        folder: Folder of the model file; ``None`` if the model came from memory.

    Raises:
        ModelError: The location is absolute, leaves the folder, goes through a
            symbolic link, is no regular file, or the range does not fit.
    """
    entries = {entry.key: entry.value for entry in proto.external_data}
    name = proto.name
    location = entries.get("location", "")
    where = f"tensor {name!r}: external data location {location!r}"
    if folder is None:
        raise ModelError(
            f"{where} needs a folder; load the model by its path instead of its bytes"
        )
    if proto.HasField("raw_data") or any(len(getattr(proto, f)) for f in _TYPED_FIELDS):
        raise ModelError(f"{where} stands beside data in the model itself")
    # protobuf gives bytes for text that is no UTF-8.
    if any(isinstance(text, bytes) for pair in entries.items() for text in pair):
        raise ModelError(f"{where} or an entry beside it is not UTF-8")
    parts = Path(location).parts
    if not location or "\0" in location:
        raise ModelError(f"{where} is empty or not a file name")
    if Path(location).is_absolute() or "\\" in location or location[1:2] == ":":
        raise ModelError(
            f"{where} is absolute or not portable; it must be relative to the model, "
            "with forward slashes"
        )
    if ".." in parts:
        raise ModelError(f"{where} climbs out of the model's folder")
    path = folder
    try:
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise ModelError(
                    f"{where} goes through the symbolic link {path.name!r}"
                )
        if not path.exists():
            raise ModelError(f"{where} does not exist in {folder}")
        if not path.is_file():
            raise ModelError(f"{where} is not a regular file")
    except OSError as error:
        raise ModelError(f"{where} cannot be read: {error.strerror}") from error
    offset, length = external_range(proto)
    shape = tuple(proto.dims)
    return FileTensor(path, offset, length, shape, proto.data_type, name)


def external_range(proto: onnx.TensorProto) -> tuple[int, int]:
    """Return first byte and number of bytes of an external tensor in its file.

    Raises:
        ModelError: One of them is no number.
    """
    entries = {entry.key: entry.value for entry in proto.external_data}
    offset, length = entries.get("offset") or "0", entries.get("length")
    if not length:
        length = str(plain_bytes(tuple(proto.dims), proto.data_type))
    for number in (offset, length):
        # int() takes underscores, spaces, signs and other scripts' digits as well.
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise ModelError(
                f"tensor {proto.name!r}: external data location "
                f"{entries.get('location', '')!r} has the offset or length "
                f"{number[:40]!r}; expected a number of bytes"
            )
    return int(offset), int(length)


def refer_to(proto: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor without data refer to a range of a file."""
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (
        ("location", location),
        ("offset", str(offset)),
        ("length", str(length)),
    ):
        proto.external_data.add(key=key, value=value)


def same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same type, shape and bit pattern."""
    if a is b:
        return True
    if (a.data_type, a.shape) != (b.data_type, b.shape):
        return False
    if a.lies_with(b):
        return True
    if a.data_type == onnx.TensorProto.STRING:
        return a.read().reshape(-1).tolist() == b.read().reshape(-1).tolist()
    pairs = zip(_even(a), _even(b), strict=True)
    return all(x == y for x, y in pairs)


def _even(tensor: LazyTensor, size: int = CHUNK) -> Iterator[bytes]:
    """Yield raw data in pieces of exactly ``size`` bytes, the last one shorter."""
    kept = b""
    for chunk in tensor.raw_chunks(size):
        kept = kept + bytes(chunk) if kept else bytes(chunk)
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    if kept:
        yield kept
