"""Columns of samples: one array over all samples, wherever it lies, read by index.

Tested in tests/samples/test_samples.py.
"""

from __future__ import annotations

import math
import re
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    "Stacked",
    "Stored",
    "cast",
    "listing",
    "parse_expression",
]

Array = NDArray[Any]
Indices = NDArray[np.int64]

UNNAMED = ""
"""Name of the array of a ``.npy``."""


class Column(ABC):
    """Values of one name for every sample.

    Attributes:
        count: Number of samples.
        shape: Shape of one sample; of the first, where they differ.
        dtype: Dtype of what ``rows`` returns.
        shapes: The shapes that there are, where samples differ; else empty.
        kinds: Which of them each sample has, int64 [count]; ``None`` where all are
            alike.
    """

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    kinds: Indices | None = None

    @abstractmethod
    def rows(self, indices: Indices) -> Array:
        """Return [len(indices), *shape]; may be a view of the data.

        Raises:
            ModelError: The samples have different shapes, or cannot be read.
        """

    def digest(self, feed: Callable[[bytes], object]) -> None:
        """Feed a hash with all that is in it."""
        one = max(1, math.prod(self.shape) * self.dtype.itemsize)
        step = max(1, (8 << 20) // one) if self.kinds is None else 1
        feed(f"{self.dtype} {self.count} {self.shape}".encode())
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            values = self.rows(np.arange(start, stop))
            if values.dtype.hasobject:
                feed(repr(values.tolist()).encode())
            else:
                feed(f"{values.shape}".encode())
                feed(np.ascontiguousarray(values).tobytes())

    def __str__(self) -> str:
        if self.kinds is not None:
            return f"{self.dtype}, {self.count} of {len(self.shapes)} shapes"
        return f"{self.dtype} [{', '.join(map(str, (self.count, *self.shape)))}]"


class Stored(Column):
    """An array in memory, mapped, or read from a file when first needed."""

    def __init__(self, array: Array) -> None:
        if array.ndim == 0:
            array = array.reshape(1)  # one number, which may serve every sample
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


class Stacked(Column):
    """Columns of single numbers side by side: the features of a table."""

    def __init__(self, columns: Sequence[Column], dtype: np.dtype[Any]) -> None:
        """Join columns over the same samples, for an input of this dtype."""
        self._columns = columns
        self.count, self.shape = columns[0].count, (len(columns),)
        self.dtype = np.result_type(*(column.dtype for column in columns))
        if dtype.kind == "f":
            self.dtype = np.result_type(self.dtype, np.float64)

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        each = [column.rows(indices) for column in self._columns]
        return np.stack(each, axis=1).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Step:
    """One step of an expression: an operator of ``+-*/`` or ``@chw``, ``@mask``.

    Attributes:
        what: The operator.
        numbers: One, or one for each value along the last axis.
    """

    what: str
    numbers: tuple[float, ...] = ()


class Computed(Column):
    """A column after the steps of an expression, in a given dtype."""

    def __init__(
        self, source: Column, steps: Sequence[Step], dtype: np.dtype[Any], what: str
    ) -> None:
        self._source, self._steps, self._what = source, steps, what
        self.count, self.dtype = source.count, dtype
        for step in steps:
            if step.what == "@chw":
                continue
            if step.what != "@mask" and source.dtype.kind not in "biuf":
                raise UsageError(f"{what}: there is no arithmetic on {source.dtype}")
            elif dtype.kind in "iub" and (
                step.what == "/" or not all(n.is_integer() for n in step.numbers)
            ):
                raise UsageError(
                    f"{what}: the input takes {dtype}, so it can be computed with "
                    "+, - and * of whole numbers only"
                )
        self.shape, self.kinds = self._moved(source.shape), source.kinds
        self.shapes = tuple(self._moved(shape) for shape in source.shapes)

    def _moved(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a sample has after the steps."""
        for step in self._steps:
            if step.what == "@chw":
                if len(shape) < 2:
                    raise UsageError(
                        f"{self._what}: @chw needs samples with at least two axes, "
                        f"these are {list(shape)}"
                    )
                shape = (shape[-1], *shape[:-1])
            elif len(step.numbers) > 1 and shape[-1:] != (len(step.numbers),):
                raise UsageError(
                    f"{self._what}: there are {len(step.numbers)} numbers for "
                    f"{shape[-1] if shape else 1} values along the last axis"
                )
        return shape

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
            number = np.array(step.numbers, np.float64).astype(work)
            number = number[0] if len(number) == 1 else number
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
        self._added = len(shape) - len(source.shape)
        self.kinds = source.kinds
        if self.kinds is not None:
            self.shapes = tuple((1,) * self._added + s for s in source.shapes)

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        values = self._source.rows(indices)
        fitted = cast(values, self.dtype, self._what)
        if self.kinds is not None:
            added = (1,) * self._added
            return fitted.reshape(len(values), *added, *fitted.shape[1:])
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
_STEP = re.compile(rf"([-+*/])((?:{_NUMBER})(?::(?:{_NUMBER}))*)|(@\w+)")


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
                f"{where}: cannot read {rest!r} in {text!r}; a step is +N, -N, *N, /N "
                "(or a number for each channel, /N:N:N), @chw or @mask"
            )
        sign, operand, word = match.groups()
        numbers = tuple(float(number) for number in (operand or "0").split(":"))
        if not all(math.isfinite(number) for number in numbers):
            raise UsageError(f"{where}: {text!r} holds a number out of range")
        if sign == "/" and 0 in numbers:
            raise UsageError(f"{where}: {text!r} divides by zero")
        steps.append(Step(word or sign, numbers))
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
