"""What a statistic is: fed batch by batch, mergeable, of bounded size.

A pass asks for them through ``Context.statistics``; it never runs a session of its own
to look at a tensor. Feeding the same values in any split gives the same statistic, up
to the rounding of sums.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError

__all__ = ["Multi", "Statistic", "Stored"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

CHUNK = 1 << 21
"""Elements that are converted at a time: 16 MB as float64."""


def numeric(array: Array) -> Array:
    """Return the values as float32 or float64, without a copy where possible."""
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind in "OSUVMm" and array.dtype.name not in _EXTENDED:
        raise ModelError(
            f"statistics are for numbers, but the tensor holds {array.dtype}"
        )
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    return array.astype(np.float32)


_EXTENDED = frozenset(
    {
        "bfloat16",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn",
        "int4",
        "uint4",
        "int2",
        "uint2",
    }
)
"""Types of ml_dtypes; numpy gives several of them the kind of raw bytes."""


def around(array: Array, axis: int) -> Array:
    """View an array as [before, channels, after] the axis."""
    if not -array.ndim <= axis < array.ndim:
        raise UsageError(
            f"axis {axis} of a statistic does not exist in a value of shape "
            f"{list(array.shape)}"
        )
    axis %= array.ndim
    before = math.prod(array.shape[:axis])
    after = math.prod(array.shape[axis + 1 :])
    return np.ascontiguousarray(array).reshape(before, array.shape[axis], after)


def chunks(array: Array) -> Iterator[Array]:
    """Cut a [before, channels, after] view into pieces of bounded size."""
    before, channels, after = array.shape
    if not array.size:
        return
    step = max(1, CHUNK // (channels * after))
    width = max(1, CHUNK // channels)
    for start in range(0, before, step):
        piece = array[start : start + step]
        for left in range(0, after, width):
            yield piece[:, :, left : left + width]


def finite_rows(rows: Array) -> Array:
    """Return the rows of [..., rows, channels] without NaN and infinity.

    Padding, empty masks and counts of 0 make such rows; they say nothing about what a
    layer reads elsewhere. A row of one group goes with that row of all groups.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(rows.sum(dtype=np.float64)):
            return rows
    kept = np.isfinite(rows).all(axis=-1)
    kept = kept.reshape(-1, kept.shape[-1]).all(axis=0)
    return rows if kept.all() else np.ascontiguousarray(rows[..., kept, :])


def finite_places(view: Array) -> Array:
    """Return [before, channels, after] as one with only places all finite along it.

    Where all are, the view comes back; else it is [1, channels, places].
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(view.sum(dtype=np.float64)):
            return view
    kept = np.isfinite(view).all(axis=1)
    if kept.all():
        return view
    return np.ascontiguousarray(np.moveaxis(view, 1, 0)[:, kept])[None]


def grown(sums: Float64 | None, like: Float64, what: str) -> Float64:
    """Return the accumulator, made of zeros the first time it is needed."""
    if sums is None:
        return np.zeros_like(like)
    if sums.shape != like.shape:
        raise ModelError(
            f"{what} saw {list(sums.shape)} before and {list(like.shape)} now: the "
            "number of channels changes between batches"
        )
    return sums


def gathered(value: Float64 | None, what: str) -> Float64:
    """Return the accumulator of a statistic that was fed."""
    if value is None:
        raise UsageError(f"{what} was read before it was fed")
    return value


@dataclass(eq=False)
class Statistic(ABC):
    """An accumulator over the values one tensor takes.

    The fields of a subclass that its constructor takes are its parameters; all others
    are what it has gathered so far.
    """

    @property
    def key(self) -> Hashable:
        """Kind and parameters; equal keys gather the same thing."""
        parameters = (
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.init
        )
        return (type(self).__name__, *parameters)

    def fresh(self) -> Self:
        """Return an empty statistic with the same parameters."""
        parameters = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init
        }
        return type(self)(**parameters)

    @abstractmethod
    def update(self, array: Array) -> None:
        """Take in the values of one batch; the array is neither kept nor changed."""

    def merge(self, other: Self) -> None:
        """Take in what another statistic with the same key has gathered."""
        if self.key != other.key:
            raise UsageError(f"cannot merge {other.key!r} into {self.key!r}")
        self._merge(other)

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Add the gathered fields of ``other``, whose key is the same."""


class Stored(Statistic):
    """A statistic that can be written to a file and read back."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return what was gathered, as arrays by name."""

    @abstractmethod
    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what ``state`` of another statistic with the same key returned.

        Raises:
            UsageError: This is no such state; nothing was taken over.
        """


def stored(
    state: Mapping[str, Array], name: str, kind: str, *shape: int | None
) -> Array:
    """Return an array of a stored state, if it is what it has to be.

    Args:
        state: The state, which may be anything.
        name: Name of the array.
        kind: ``f`` for float64, ``i`` for int64.
        *shape: Its shape, ``None`` for any size.
    """
    array = state.get(name)
    dtype = {"f": np.float64, "i": np.int64}[kind]
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.ndim != len(shape)
        or any(
            want not in (None, have)
            for want, have in zip(shape, array.shape, strict=True)
        )
    ):
        raise UsageError(f"a stored statistic has no usable {name!r}")
    if kind == "f" and np.isnan(array).any():
        raise UsageError(f"a stored statistic has NaN in {name!r}")
    return array


class Multi(Stored):
    """Several statistics of one tensor, gathered together.

    Attributes:
        parts: The statistics by name; each is also an item, ``multi["range"]``.
    """

    def __init__(self, **parts: Statistic) -> None:
        """Hold these statistics."""
        if not parts:
            raise UsageError("Multi needs at least one statistic")
        self.parts = parts

    @property
    def key(self) -> Hashable:
        """Names and keys of the parts."""
        return ("Multi", *((name, part.key) for name, part in self.parts.items()))

    def fresh(self) -> Multi:
        """Return an empty statistic with the same parts."""
        return Multi(**{name: part.fresh() for name, part in self.parts.items()})

    def __getitem__(self, name: str) -> Statistic:
        """Return one part."""
        return self.parts[name]

    def update(self, array: Array) -> None:
        """Feed every part."""
        for part in self.parts.values():
            part.update(array)

    def _merge(self, other: Multi) -> None:
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def state(self) -> dict[str, Array]:
        """Return what the parts have gathered, named by their number."""
        return {
            f"{number}.{key}": array
            for number, part in enumerate(self.parts.values())
            for key, array in _storable(part).state().items()
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over the stored states of all parts."""
        for number, part in enumerate(self.parts.values()):
            start = f"{number}."
            _storable(part).restore(
                {
                    key.removeprefix(start): array
                    for key, array in state.items()
                    if key.startswith(start)
                }
            )


def _storable(part: Statistic) -> Stored:
    if not isinstance(part, Stored):
        raise UsageError(f"a {type(part).__name__} cannot be stored")
    return part
