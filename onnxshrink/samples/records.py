"""Records: items as they come, batches or single samples, of any lengths.

Which of the two an item is shows only beside a model's input, so that items are kept as
they are until ``Records.column`` is asked.

Tested in tests/samples/test_given.py.
"""

from __future__ import annotations

import math
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.errors import ModelError
from onnxshrink.samples.columns import Array, Column, Indices, Stored

__all__ = [
    "Filed",
    "Item",
    "Lengths",
    "Made",
    "Mode",
    "Padded",
    "Pieces",
    "Records",
    "held",
]

Mode = Literal["batch", "row"]


class Item(ABC):
    """One item: a batch or a sample.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, places: Indices | None) -> Array:
        """Return some of its rows, or all of it."""


@dataclass(frozen=True)
class _Held(Item):
    """An item in memory."""

    value: Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]  # read only
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]  # read only
        return self.value.dtype

    def read(self, places: Indices | None) -> Array:
        return self.value if places is None else self.value[places]


def held(value: Array) -> Item:
    """Return an item in memory."""
    return _Held(value)


@dataclass(frozen=True)
class _Spooled(Item):
    """An item in a temporary file."""

    spool: _Spool
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, places: Indices | None) -> Array:
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = self.spool.mapped()[self.start : self.start + size]
        whole = np.frombuffer(raw, self.dtype).reshape(self.shape)
        return whole if places is None else whole[places]


@dataclass(frozen=True)
class Filed(Item):
    """An item that is an array of its own, such as a file."""

    column: Column

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]  # read only
        """Its shape."""
        return (self.column.count, *self.column.shape)

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]  # read only
        """Its dtype."""
        return self.column.dtype

    def read(self, places: Indices | None) -> Array:
        """Return some of its rows, or all of it."""
        every = np.arange(self.column.count) if places is None else places
        return self.column.rows(every)


class _Spool:
    """A temporary file without a name, which goes with the object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # see finalize
        weakref.finalize(self, self._file.close)
        self.size = 0
        self._map: Any = None

    def add(self, raw: bytes) -> int:
        start = self.size
        self._file.write(raw)
        self.size += len(raw)
        self._map = None
        return start

    def mapped(self) -> Any:
        if self._map is None or len(self._map) < self.size:
            self._file.flush()
            empty = np.zeros(0, np.uint8)
            self._map = np.memmap(self._file, np.uint8, "r") if self.size else empty
        return self._map


class Records(Column):
    """Items of one name; ``column`` says what samples they are."""

    def __init__(self, name: str) -> None:
        """Start empty."""
        self._name = name
        self._spool = _Spool()
        self.items: list[Item] = []
        self.count, self.shape = 0, ()
        self.dtype = np.dtype(np.float64)

    def add(self, array: Array) -> None:
        """Keep an array in the temporary file.

        Raises:
            ModelError: It holds Python objects.
        """
        if array.dtype.hasobject or array.dtype.kind in "SU":
            if not all(isinstance(value, (str, bytes)) for value in array.flat):
                raise ModelError(
                    f"batch {len(self.items)}, array {self._name!r}: Python objects "
                    "cannot be samples"
                )
            self.append(_Held(array))
            return
        start = self._spool.add(np.ascontiguousarray(array).tobytes())
        self.append(_Spooled(self._spool, start, array.shape, array.dtype))

    def append(self, item: Item) -> None:
        """Take an item."""
        if not self.items:
            self.shape, self.dtype = item.shape, item.dtype
        elif item.dtype != self.dtype:
            if (item.dtype.kind in "SUO") != (self.dtype.kind in "SUO"):
                raise ModelError(
                    f"batch {len(self.items)}, array {self._name!r} is {item.dtype}, "
                    f"the first was {self.dtype}"
                )
            text = item.dtype.kind in "SUO"
            both = np.dtype(object) if text else np.result_type(item.dtype, self.dtype)
            self.dtype = both
        self.items.append(item)
        self.count = len(self.items)

    @property
    def item_shapes(self) -> set[tuple[int, ...]]:
        """The shapes of items that there are."""
        return {item.shape for item in self.items}

    def column(self, mode: Mode) -> Column:
        """Return the samples, where items are batches or where each is a sample.

        Raises:
            ModelError: Items without an axis are no batches.
        """
        if mode == "batch" and any(not item.shape for item in self.items):
            raise ModelError(f"array {self._name!r}: a batch needs a first axis")
        pieces = Pieces(self._name, self.items, self.dtype, mode)
        if pieces.kinds is None and all(
            isinstance(item, _Spooled) and item.dtype == self.dtype
            for item in self.items
        ):
            whole = (pieces.count, *pieces.shape)
            if not math.prod(whole) * self.dtype.itemsize:
                return Stored(np.zeros(whole, self.dtype))
            return Stored(self._spool.mapped().view(self.dtype).reshape(whole))
        return pieces

    def rows(self, indices: Indices) -> Array:
        """Refuse: it is not known yet what a sample is."""
        raise ModelError(f"array {self._name!r} has to be tied to a model first")

    def digest(self, feed: Any) -> None:
        """Feed a hash with all items."""
        self.column("row").digest(feed)

    def __str__(self) -> str:
        shapes = self.item_shapes
        if len(shapes) == 1:
            return f"{self.dtype} {self.count} times {list(next(iter(shapes)))}"
        return f"{self.dtype}, {self.count} arrays of {len(shapes)} shapes"


class Pieces(Column):
    """Samples in items."""

    def __init__(
        self, name: str, items: Sequence[Item], dtype: np.dtype[Any], mode: Mode
    ) -> None:
        """Take items as batches or as samples."""
        self._name, self._items, self._rows = name, items, mode == "row"
        self.dtype = dtype
        each = [
            (1, item.shape) if self._rows else (item.shape[0], item.shape[1:])
            for item in items
        ]
        counts = np.array([count for count, _ in each], np.int64)
        self._ends = np.cumsum(counts)
        self.count = int(self._ends[-1]) if len(counts) else 0
        numbers: dict[tuple[int, ...], int] = {}
        codes = [numbers.setdefault(shape, len(numbers)) for _, shape in each]
        self.shape = each[0][1] if each else ()
        if len(numbers) > 1:
            self.shapes = tuple(numbers)
            self.kinds = np.repeat(np.array(codes, np.int64), counts)

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, which have one shape."""
        shape = self.shape
        if self.kinds is not None and len(indices):
            kinds = self.kinds[indices]
            if (kinds != kinds[0]).any():
                raise ModelError(
                    f"{self._name!r} holds samples of different shapes, which do not "
                    "run in one batch"
                )
            shape = self.shapes[int(kinds[0])]
        out = np.empty((len(indices), *shape), self.dtype)
        which = np.searchsorted(self._ends, indices, side="right")
        if self._rows:
            for place, number in enumerate(which):
                out[place] = self._items[int(number)].read(None)
            return out
        for number in np.unique(which):
            item = self._items[int(number)]
            chosen = which == number
            begin = int(self._ends[number]) - item.shape[0]
            out[chosen] = item.read(indices[chosen] - begin)
        return out


class Padded(Column):
    """Samples of different shapes, each with zeros behind it."""

    def __init__(self, source: Column, shape: tuple[int, ...]) -> None:
        """Fill up to a shape."""
        self._source = source
        self.count, self.shape, self.dtype = source.count, shape, source.dtype

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        out = np.zeros((len(indices), *self.shape), self.dtype)
        if self.dtype.kind == "O":
            out[:] = ""
        kinds = self._source.kinds
        assert kinds is not None
        mine = kinds[indices]
        for kind in np.unique(mine):
            chosen = np.flatnonzero(mine == kind)
            values = self._source.rows(indices[chosen])
            place: Any = (chosen, *(slice(0, size) for size in values.shape[1:]))
            out[place] = values
        return out


class Made(Column):
    """Samples that are made when they are first read, and kept in a temporary file."""

    def __init__(
        self, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        """Make none yet."""
        self.count, self.shape, self.dtype = count, shape, dtype
        self._known = np.zeros(count, bool)
        self._kept: Any = None
        self._lock = threading.Lock()

    @abstractmethod
    def make(self, index: int) -> Array:
        """Return one sample."""

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        with self._lock:
            if self._kept is None:
                # Without a name, and sparse: only what is made takes room.
                with tempfile.TemporaryFile() as scratch:
                    whole = (self.count, *self.shape)
                    self._kept = np.memmap(scratch, self.dtype, "w+", 0, whole)
            for index in indices[~self._known[indices]]:
                self._kept[index] = self.make(int(index))
                self._known[index] = True
            return np.asarray(self._kept[indices])


class Lengths(Column):
    """Ones where another column has values, and zeros where it is filled up."""

    def __init__(self, source: Column, shape: tuple[int, ...]) -> None:
        """Say where a column that is filled up to a shape has values."""
        self._source = source
        self.count, self.shape, self.dtype = source.count, shape, np.dtype(np.int64)

    def rows(self, indices: Indices) -> Array:
        """Return the values of these samples, in this order."""
        out = np.zeros((len(indices), *self.shape), self.dtype)
        for place, index in enumerate(indices):
            kinds = self._source.kinds
            real = self._source.shape
            if kinds is not None:
                real = self._source.shapes[int(kinds[index])]
            inside: Any = (place, *(slice(0, size) for size in real))
            out[inside] = 1
        return out
