"""Tensor values that are read only when someone asks, whole or in chunks."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "numpy_type",
    "plain_bytes",
]

CHUNK = 8 << 20
"""Bytes of decoded values that one chunk holds unless told otherwise."""

_SUB_BYTE = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
}


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
    """

    shape: tuple[int, ...]
    data_type: int
    dtype: np.dtype[Any]
    nbytes: int

    def __init__(self, shape: tuple[int, ...], data_type: int) -> None:
        """Describe a tensor.

        Raises:
            ModelError: A negative dimension or an unknown element type.
        """
        if any(dim < 0 for dim in shape):
            raise ModelError(f"a tensor has the negative dimension {min(shape)}")
        self.shape = shape
        self.data_type = data_type
        self.dtype = numpy_type(data_type)
        self.nbytes = plain_bytes(shape, data_type)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @abstractmethod
    def read(self) -> np.ndarray[Any, Any]:
        """Return all values; the array may be shared, so do not write into it."""

    def chunks(self, nbytes: int = CHUNK) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the values as flat arrays of at most ``nbytes`` bytes, in C order."""
        flat = self.read().reshape(-1)
        step = max(1, nbytes // max(1, self.dtype.itemsize))
        for start in range(0, flat.size, step):
            yield flat[start : start + step]

    def raw_chunks(self, nbytes: int = CHUNK) -> Iterator[bytes | memoryview]:
        """Yield the values as pieces of ONNX raw data (little-endian, packed)."""
        if self.data_type in _SUB_BYTE:
            yield numpy_helper.from_array(np.ascontiguousarray(self.read())).raw_data
            return
        for chunk in self.chunks(nbytes):
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


class ProtoTensor(LazyTensor):
    """Values held in memory by a ``TensorProto``."""

    def __init__(self, proto: onnx.TensorProto) -> None:
        """Wrap a tensor that is not external.

        Raises:
            ModelError: Its data does not have the size its shape asks for.
        """
        super().__init__(tuple(proto.dims), proto.data_type)
        self.tensor = proto
        if proto.HasField("raw_data") and len(proto.raw_data) != self.nbytes:
            raise ModelError(
                f"tensor {proto.name!r} has {len(proto.raw_data)} bytes of data, "
                f"its shape {list(self.shape)} asks for {self.nbytes}"
            )

    def read(self) -> np.ndarray[Any, Any]:
        """Return all values.

        Raises:
            ModelError: The typed fields do not hold what the shape asks for.
        """
        try:
            return np.asarray(numpy_helper.to_array(self.tensor))
        except (ValueError, TypeError, UnicodeDecodeError) as error:
            name = self.tensor.name
            raise ModelError(f"tensor {name!r} cannot be read: {error}") from error


class ArrayTensor(LazyTensor):
    """Values held by a numpy array."""

    def __init__(
        self, array: np.ndarray[Any, Any], data_type: int | None = None
    ) -> None:
        """Wrap an array; ``data_type`` only where the dtype does not tell it.

        Raises:
            ModelError: The array's dtype has no ONNX element type.
        """
        if data_type is None:
            try:
                data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            except (KeyError, ValueError) as error:
                raise ModelError(
                    f"numpy dtype {array.dtype} has no ONNX element type"
                ) from error
        super().__init__(tuple(array.shape), data_type)
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
        available = path.stat().st_size
        if offset < 0 or offset + length > available:
            raise ModelError(
                f"tensor {name!r} lies at bytes {offset} to {offset + length} of "
                f"{path.name}, which has {available}"
            )

    def _bytes(self, start: int, count: int) -> np.ndarray[Any, Any]:
        try:
            piece = np.fromfile(
                self.path, dtype=np.uint8, count=count, offset=self.offset + start
            )
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        if piece.size != count:
            raise ModelError(f"{self.path} was cut short while it was being read")
        return piece

    def read(self) -> np.ndarray[Any, Any]:
        """Return all values in a fresh array."""
        data = self._bytes(0, self.length)
        if self.data_type in _SUB_BYTE:
            proto = onnx.TensorProto(dims=self.shape, data_type=self.data_type)
            proto.raw_data = data.tobytes()
            return np.asarray(numpy_helper.to_array(proto))
        little = data.view(self.dtype.newbyteorder("<"))
        return little.astype(self.dtype, copy=False).reshape(self.shape)

    def chunks(self, nbytes: int = CHUNK) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the values piece by piece, each read when it is asked for."""
        if self.data_type in _SUB_BYTE:
            yield from super().chunks(nbytes)
            return
        item = self.dtype.itemsize
        step = max(1, nbytes // item) * item
        for start in range(0, self.length, step):
            piece = self._bytes(start, min(step, self.length - start))
            little = piece.view(self.dtype.newbyteorder("<"))
            yield little.astype(self.dtype, copy=False)

    def raw_chunks(self, nbytes: int = CHUNK) -> Iterator[bytes | memoryview]:
        """Yield the bytes of the file as they are."""
        for start in range(0, self.length, nbytes):
            yield self._bytes(start, min(nbytes, self.length - start)).data


class SparseTensor(LazyTensor):
    """Values of a ``SparseTensorProto``; dense when read."""

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        """Wrap a sparse initializer.

        Raises:
            ModelError: An index lies outside the dense shape.
        """
        super().__init__(tuple(proto.dims), proto.values.data_type)
        self.tensor = proto

    def read(self) -> np.ndarray[Any, Any]:
        """Return the dense values in a fresh array."""
        values = np.asarray(numpy_helper.to_array(self.tensor.values))
        indices = np.asarray(numpy_helper.to_array(self.tensor.indices))
        try:
            dense = np.zeros(self.size, dtype=self.dtype)
            if indices.ndim == 2:
                indices = np.ravel_multi_index(tuple(indices.T), self.shape)
            if indices.size and indices.min() < 0:
                raise IndexError(f"index {indices.min()} is negative")
            dense[indices] = values.reshape(-1)
        except (IndexError, ValueError, MemoryError) as error:
            name = self.tensor.values.name
            raise ModelError(f"sparse tensor {name!r} is broken: {error}") from error
        return dense.reshape(self.shape)


def external_tensor(
    proto: onnx.TensorProto, folder: Path | None, default_length: bool = True
) -> FileTensor:
    """Return the values of an external tensor, once its location proves harmless.

    Args:
        proto: A tensor whose ``data_location`` is EXTERNAL.
        folder: Folder of the model file; ``None`` if the model came from memory.
        default_length: Take the size of the shape when no length is given.

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
    parts = Path(location).parts
    if not location or "\0" in location:
        raise ModelError(f"{where} is empty or not a file name")
    if Path(location).is_absolute() or "\\" in location or ":" in location[:3]:
        raise ModelError(f"{where} is absolute; it must be relative to the model")
    if ".." in parts:
        raise ModelError(f"{where} climbs out of the model's folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ModelError(f"{where} goes through the symbolic link {path.name!r}")
    if not path.exists():
        raise ModelError(f"{where} does not exist in {folder}")
    if not path.is_file():
        raise ModelError(f"{where} is not a regular file")
    shape = tuple(proto.dims)
    needed = plain_bytes(shape, proto.data_type)
    try:
        offset = int(entries.get("offset", "0") or 0)
        length = int(entries.get("length", "") or needed)
    except ValueError as error:
        raise ModelError(
            f"{where} has an offset or length that is no number"
        ) from error
    if length < 0 or offset < 0:
        raise ModelError(f"{where} has a negative offset or length")
    return FileTensor(path, offset, length, shape, proto.data_type, name)


def same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same type, shape and bit pattern."""
    if a is b:
        return True
    if (a.data_type, a.shape) != (b.data_type, b.shape):
        return False
    if a.data_type == onnx.TensorProto.STRING:
        return bool(np.array_equal(a.read(), b.read()))
    pairs = zip(a.raw_chunks(), b.raw_chunks(), strict=False)
    return all(bytes(x) == bytes(y) for x, y in pairs)


def sync(path: Path) -> None:
    """Flush a folder's entries to disk where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
