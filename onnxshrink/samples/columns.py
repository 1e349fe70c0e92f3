"""Columns of samples: one array over all samples, wherever it lies, read by index.

Tested in tests/samples/test_samples.py.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError, nearest

__all__ = [
    "Column",
    "Computed",
    "Constant",
    "Expression",
    "Fitted",
    "Spool",
    "Stored",
    "cast",
    "listing",
    "open_arrays",
    "parse_expression",
    "split_path",
]

Array = NDArray[Any]
Indices = NDArray[np.int64]

MAPPED = 64 << 20
"""Bytes from which a compressed array is unpacked to a temporary file."""
UNNAMED = ""
"""Name of the array of a ``.npy``."""


class Column(ABC):
    """Values of one name for every sample.

    Attributes:
        count: Number of samples.
        shape: Shape of one sample.
        dtype: Dtype of what ``rows`` returns.
    """

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def rows(self, indices: Indices) -> Array:
        """Return [len(indices), *shape]; may be a view of the data."""

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, (self.count, *self.shape)))}]"


class Stored(Column):
    """An array in memory, mapped, or read from a file when first needed."""

    def __init__(self, array: Array) -> None:
        if array.ndim == 0:
            raise ModelError("an array of samples needs a first axis to count them")
        if array.dtype.kind == "O" and not all(
            isinstance(value, str) for value in array.flat
        ):
            raise ModelError("an array of samples cannot hold Python objects")
        self._array = array
        self.count, self.shape, self.dtype = len(array), array.shape[1:], array.dtype

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        if len(indices) and indices[-1] - indices[0] == len(indices) - 1:
            first = int(indices[0])
            if np.array_equal(indices, np.arange(first, first + len(indices))):
                return np.asarray(self._array[first : first + len(indices)])
        return np.asarray(self._array[indices])


class Member(Column):
    """An array inside a ``.npz``, mapped if stored plainly, else unpacked once."""

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        self._path, self._info = path, info
        self._array: Array | None = None
        name = f"{path}: array {info.filename.removesuffix('.npy')!r}"
        if info.flag_bits & 1:
            raise ModelError(f"{name} is encrypted")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(info) as file:
                shape, fortran, dtype, self._start = _npy_header(file)
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelError(f"{name} cannot be read: {error}") from error
        if dtype.hasobject:
            raise ModelError(f"{name} holds Python objects, which are never loaded")
        self._whole, self._fortran = shape, fortran
        self._nbytes = math.prod(shape) * dtype.itemsize
        if self._start + self._nbytes != info.file_size:
            raise ModelError(
                f"{name} claims {self._nbytes:,} bytes of values and has "
                f"{info.file_size - self._start:,}"
            )
        # Deflate never shrinks more than 1,032 to 1.
        if info.file_size > 1100 * max(info.compress_size, 64):
            raise ModelError(f"{name} claims to unpack to {info.file_size:,} bytes")
        if not shape:
            raise ModelError(f"{name} is a single value, not an array of samples")
        self.count, self.shape, self.dtype = shape[0], tuple(shape[1:]), dtype

    def rows(self, indices: Indices) -> Array:
        if self._array is None:
            self._array = self._read()
        return np.asarray(self._array[indices])

    def _read(self) -> Array:
        order: Literal["C", "F"] = "F" if self._fortran else "C"
        try:
            if self._info.compress_type == zipfile.ZIP_STORED and self._nbytes:
                with self._path.open("rb") as file:
                    file.seek(self._info.header_offset + 26)
                    sizes = file.read(4)
                skip = int.from_bytes(sizes[:2], "little")
                skip += int.from_bytes(sizes[2:], "little")
                start = self._info.header_offset + 30 + skip + self._start
                return np.memmap(
                    self._path, self.dtype, "r", start, self._whole, order=order
                )
            with (
                zipfile.ZipFile(self._path) as archive,
                archive.open(self._info) as file,
            ):
                if self._nbytes < MAPPED:
                    return np.asarray(
                        np.lib.format.read_array(file, allow_pickle=False)
                    )
                # Lives as long as the mapping; it has no name on disk.
                with tempfile.TemporaryFile() as scratch:
                    shutil.copyfileobj(file, scratch, 1 << 20)
                    return np.memmap(
                        scratch, self.dtype, "r", self._start, self._whole, order=order
                    )
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelError(
                f"{self._path}: array {self._info.filename.removesuffix('.npy')!r} "
                f"cannot be read: {error}"
            ) from error


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, Fortran order, dtype and bytes of the header of an npy stream."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"format version {version} is not supported")
    return tuple(shape), fortran, dtype, file.tell()


class Joined(Column):
    """Several columns behind each other."""

    def __init__(self, parts: Sequence[Column]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.count for part in parts])
        self.count = int(self._ends[-1])
        self.shape, self.dtype = parts[0].shape, parts[0].dtype

    def rows(self, indices: Indices) -> Array:
        out = np.empty((len(indices), *self.shape), self.dtype)
        which = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(which):
            start = self._ends[number] - self._parts[number].count
            chosen = which == number
            out[chosen] = self._parts[number].rows(indices[chosen] - start)
        return out


@dataclass(frozen=True)
class Step:
    """One step of an expression: an operator of ``+-*/`` or ``@chw``, ``@mask``."""

    what: str
    number: float = 0.0


class Computed(Column):
    """A column after the steps of an expression, in a given dtype."""

    def __init__(
        self, source: Column, steps: Sequence[Step], dtype: np.dtype[Any], what: str
    ) -> None:
        self._source, self._steps, self._what = source, steps, what
        self.count, self.dtype = source.count, dtype
        shape = list(source.shape)
        for step in steps:
            if step.what == "@chw":
                if len(shape) < 2:
                    raise UsageError(
                        f"{what}: @chw needs samples with at least two axes, "
                        f"these are {shape}"
                    )
                shape.insert(0, shape.pop())
            elif step.what != "@mask" and source.dtype.kind not in "biuf":
                raise UsageError(f"{what}: there is no arithmetic on {source.dtype}")
            elif dtype.kind in "iub" and (
                step.what == "/" or not float(step.number).is_integer()
            ):
                raise UsageError(
                    f"{what}: the input takes {dtype}, so it can be computed with "
                    "+, - and * of whole numbers only"
                )
        self.shape = tuple(shape)

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        values = self._source.rows(indices)
        work = np.dtype(np.int64) if self.dtype.kind in "iub" else self.dtype
        if work.itemsize < 4:
            work = np.dtype(np.float32)
        for step in self._steps:
            if step.what == "@chw":
                values = np.moveaxis(values, -1, 1)
                continue
            if step.what == "@mask":
                values = values != 0
                continue
            values = values.astype(work, copy=False)
            number = work.type(step.number)
            if step.what == "+":
                values = values + number
            elif step.what == "-":
                values = values - number
            elif step.what == "*":
                values = values * number
            else:
                values = values / number
        return cast(values, self.dtype, self._what)


class Constant(Column):
    """The same number everywhere."""

    def __init__(
        self, value: float, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._value = value
        self.count, self.shape, self.dtype = count, shape, dtype

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        return np.full((len(indices), *self.shape), self._value, self.dtype)


class Fitted(Column):
    """A column in the dtype and shape that an input takes."""

    def __init__(
        self, source: Column, shape: tuple[int, ...], dtype: np.dtype[Any], what: str
    ) -> None:
        self._source, self._what = source, what
        self.count, self.shape, self.dtype = source.count, shape, dtype

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        values = self._source.rows(indices)
        fitted = cast(values, self.dtype, self._what)
        return fitted.reshape(len(values), *self.shape)


def cast(values: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Change the dtype; integers must keep their values."""
    if values.dtype == dtype:
        return values
    if dtype.kind == "O":
        return values.astype(object)
    if dtype.kind in "iub" and values.dtype.kind in "iub":
        low, high = (0, 1) if dtype.kind == "b" else _limits(dtype)
        if values.size and (values.min() < low or values.max() > high):
            raise ModelError(
                f"{what} holds values from {values.min()} to {values.max()}, "
                f"which do not fit {dtype}"
            )
    return values.astype(dtype)


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


# --- expressions ------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """``array`` or a number, then steps."""

    text: str
    array: str | None
    number: float = 0.0
    steps: tuple[Step, ...] = ()

    @property
    def arithmetic(self) -> bool:
        """Whether the values are computed, so that the dtype is the input's own."""
        return any(step.what != "@chw" for step in self.steps)


_NUMBER = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+"
_STEP = re.compile(rf"([-+*/])({_NUMBER})|(@\w+)")


def parse_expression(text: str, arrays: Mapping[str, Column], where: str) -> Expression:
    """Parse ``array[step...]``; the longest array name that fits is taken."""
    names = [name for name in arrays if name and text.startswith(name)]
    rest, array, number = text, None, 0.0
    for name in sorted(names, key=len, reverse=True):
        if not text[len(name) :] or text[len(name)] in "+-*/@":
            array, rest = name, text[len(name) :]
            break
    else:
        match = re.match(rf"-?(?:{_NUMBER})", text)
        if match is None:
            word = re.split(r"[-+*/@]", text)[0]
            raise UsageError(
                f"{where}: there is no array {word!r}; there are {listing(arrays)}."
                f"{nearest(word, arrays)}"
            )
        number, rest = float(match.group()), text[match.end() :]
    steps = []
    while rest:
        match = _STEP.match(rest)
        if match is None or (match.group(3) or "@chw") not in ("@chw", "@mask"):
            raise UsageError(
                f"{where}: cannot read {rest!r} in {text!r}; a step is +N, -N, *N, /N, "
                "@chw or @mask"
            )
        sign, operand, word = match.groups()
        if sign == "/" and float(operand) == 0:
            raise UsageError(f"{where}: {text!r} divides by zero")
        steps.append(Step(word or sign, float(operand or 0)))
        rest = rest[match.end() :]
    return Expression(text, array, number, tuple(steps))


def listing(arrays: Mapping[str, Column]) -> str:
    """Return names and types of arrays, for a message."""
    words = [f"{name!r} ({column})" for name, column in arrays.items() if name]
    return ", ".join(words) or "none with a name"


class Spool:
    """Collects batches of one array in a temporary file without a name."""

    def __init__(self, name: str) -> None:
        """Start empty; the file goes with the object, what is mapped stays."""
        self._name = name
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # see finalize
        weakref.finalize(self, self._file.close)
        self._count = 0
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype[Any] | None = None

    def add(self, array: Array, number: int) -> None:
        """Append one batch."""
        label = f"batch {number}, array {self._name!r}"
        if array.ndim == 0:
            raise ModelError(f"{label}: a batch needs a first axis to count samples")
        if array.dtype.hasobject:
            raise ModelError(f"{label}: Python objects cannot be samples")
        if self._dtype is None:
            self._shape, self._dtype = array.shape[1:], array.dtype
        if array.shape[1:] != self._shape or array.dtype != self._dtype:
            raise ModelError(
                f"{label} is {array.dtype} {list(array.shape)}, the first batch was "
                f"{self._dtype} {['n', *self._shape]}; pad the samples to one shape"
            )
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._count += len(array)

    def whole(self) -> Array:
        """Return all that was collected in one array, mapped."""
        assert self._dtype is not None
        shape = (self._count, *self._shape)
        if not math.prod(shape) * self._dtype.itemsize:
            return np.zeros(shape, self._dtype)
        self._file.flush()
        return np.memmap(self._file, self._dtype, "r", 0, shape)

    def column(self) -> Column:
        """Return all that was collected as a column."""
        return Stored(self.whole())


def _missing(path: str) -> ModelError:
    siblings = []
    parent = Path(path).parent
    if parent.is_dir():
        siblings = [str(parent / p.name) for p in parent.iterdir()]
    return ModelError(f"{path} does not exist.{nearest(path, siblings)}")


def split_path(text: str) -> tuple[Path, str | None]:
    """Split ``path:words`` where the path exists; a colon may be part of it."""
    if Path(text).exists():
        return Path(text), None
    for match in re.finditer(":", text):
        path = Path(text[: match.start()])
        if match.start() and path.exists():
            return path, text[match.end() :]
    raise _missing(text.partition(":")[0])


def open_arrays(path: Path) -> dict[str, Column]:
    """Open a file or folder of arrays; nothing is read yet."""
    if not path.exists():
        raise _missing(str(path))
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".npy":
        return {UNNAMED: Stored(_open_npy(path))}
    if path.suffix == ".npz":
        return _open_npz(path)
    raise ModelError(f"{path} is no data: give a .npz, a .npy, or a folder of either")


def _open_npy(path: Path) -> Array:
    try:
        # A file cut short later would end the process when mapped pages are read; the
        # user's own data is trusted that far.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        raise ModelError(f"{path} holds no array of samples")
    return array


def _open_npz(path: Path) -> dict[str, Column]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [i for i in archive.infolist() if i.filename.endswith(".npy")]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is not an .npz file: {error}") from error
    arrays: dict[str, Column] = {}
    for info in members:
        name = info.filename.removesuffix(".npy")
        arrays[name] = Member(path, info)
    if not arrays:
        raise ModelError(f"{path} holds no arrays")
    return arrays


def _open_folder(path: Path) -> dict[str, Column]:
    packed = sorted(path.glob("*.npz"))
    plain = sorted(path.glob("*.npy"))
    if packed and plain:
        raise ModelError(f"{path} mixes .npz and .npy files; use one kind")
    if plain:
        return {file.stem: Stored(_open_npy(file)) for file in plain}
    if not packed:
        raise ModelError(f"{path} holds no .npz or .npy files")
    parts = [_open_npz(file) for file in packed]
    for file, part in zip(packed, parts, strict=True):
        if part.keys() != parts[0].keys():
            raise ModelError(
                f"{file} has arrays {sorted(part)}, {packed[0]} has {sorted(parts[0])}"
            )
        for name, column in part.items():
            first = parts[0][name]
            if column.shape != first.shape or column.dtype != first.dtype:
                raise ModelError(
                    f"{file}: {name!r} is {column}, in {packed[0]} it is {first}; pad "
                    "the samples to one shape"
                )
    return {name: Joined([part[name] for part in parts]) for name in parts[0]}
