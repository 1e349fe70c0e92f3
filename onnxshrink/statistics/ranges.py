"""Which values a tensor takes: ranges, histograms, indices of a table.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics.base import (
    Array,
    Float64,
    Statistic,
    Stored,
    around,
    grown,
    numeric,
    stored,
)

__all__ = ["ChannelRange", "Counts", "Histogram", "Range"]

_CACHED = 1 << 16
"""Elements that are counted at a time: they stay in the processor's cache."""
_FILL = 1e30
"""Values beyond this are fills of a mask, not activations (FLT_MIN, -inf)."""


@dataclass(eq=False)
class Range(Stored):
    """Smallest and largest finite value, of the tensor or of each channel.

    Attributes:
        axis: Axis of the channels; ``None`` looks at the whole tensor.
        low: float64, shape [] or [channels]; ``+inf`` where nothing finite was seen.
        high: The same with ``-inf``.
        count: Values seen, finite or not.
        nan: How many were NaN.
        inf: How many were infinite.
        fills: How many were finite but beyond 1e30 in size, as in attention masks.
    """

    axis: int | None = None
    low: Float64 = field(init=False, default_factory=lambda: np.array(np.inf))
    high: Float64 = field(init=False, default_factory=lambda: np.array(-np.inf))
    count: int = field(init=False, default=0)
    nan: int = field(init=False, default=0)
    inf: int = field(init=False, default=0)
    fills: int = field(init=False, default=0)

    @property
    def empty(self) -> bool:
        """Whether no finite value was seen at all."""
        return not bool(np.any(self.low <= self.high))

    def update(self, array: Array) -> None:
        """Widen the range by one batch."""
        values = numeric(array)
        if not values.size:
            return
        if self.axis is not None:
            values = around(values, self.axis)
        axes = None if self.axis is None else (0, 2)
        low, high = np.min(values, axis=axes), np.max(values, axis=axes)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(values)
            nan = int(np.isnan(values).sum())
            self.nan += nan
            self.inf += values.size - int(finite.sum()) - nan
            low = np.min(values, axis=axes, where=finite, initial=np.inf)
            high = np.max(values, axis=axes, where=finite, initial=-np.inf)
        if np.any(low < -_FILL) or np.any(high > _FILL):
            size = np.abs(values)
            self.fills += int(((size > _FILL) & np.isfinite(size)).sum())
        self.count += values.size
        self._widen(
            np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        )

    def _widen(self, low: Float64, high: Float64) -> None:
        if self.low.ndim and low.ndim and self.low.shape != low.shape:
            raise ModelError(
                f"a range saw {len(self.low)} channels before and {len(low)} now"
            )
        self.low = np.asarray(np.minimum(self.low, low))
        self.high = np.asarray(np.maximum(self.high, high))

    def _merge(self, other: Range) -> None:
        self._widen(other.low, other.high)
        self.count += other.count
        self.nan += other.nan
        self.inf += other.inf
        self.fills += other.fills

    def state(self) -> dict[str, Array]:
        """Return the range as arrays."""
        whole = [self.count, self.nan, self.inf, self.fills]
        return {
            "low": self.low.reshape(-1),
            "high": self.high.reshape(-1),
            "whole": np.array(whole, np.int64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over a stored range."""
        low = stored(state, "low", "f", None)
        high = stored(state, "high", "f", len(low))
        whole = [int(number) for number in stored(state, "whole", "i", 4)]
        if min(whole) < 0 or sum(whole[1:]) > whole[0]:
            raise UsageError("a stored range counts what it has not seen")
        if not len(low) or (self.axis is None and len(low) != 1):
            raise UsageError("a stored range has no usable 'low'")
        # Before the first batch, a range has no channels yet.
        shape = () if self.axis is None or not whole[0] else low.shape
        if not whole[0] and len(low) != 1:
            raise UsageError("a stored range counts what it has not seen")
        self.low, self.high = low.reshape(shape), high.reshape(shape)
        self.count, self.nan, self.inf, self.fills = whole


@dataclass(eq=False)
class ChannelRange(Stored):
    """Smallest and largest value of each channel, mask fills left out.

    Attributes:
        axis: Axis of the channels.
        low: float64 [channels], ``+inf`` where nothing was seen; ``None`` at first.
        high: The same with ``-inf``.
        count: Values seen in each channel.
        apart: Values left out: not finite, or beyond 1e30 in size.
    """

    axis: int = 1
    low: Float64 | None = field(init=False, default=None)
    high: Float64 | None = field(init=False, default=None)
    count: int = field(init=False, default=0)
    apart: int = field(init=False, default=0)

    def update(self, array: Array) -> None:
        """Widen the ranges by one batch."""
        values = around(numeric(array), self.axis)
        if not values.size:
            return
        low, high = values.min(axis=(0, 2)), values.max(axis=(0, 2))
        if not (np.all(low >= -_FILL) and np.all(high <= _FILL)):
            with np.errstate(invalid="ignore"):
                kept = np.abs(values) <= _FILL
            self.apart += kept.size - int(np.count_nonzero(kept))
            low = values.min(axis=(0, 2), where=kept, initial=np.inf)
            high = values.max(axis=(0, 2), where=kept, initial=-np.inf)
        self._widen(low.astype(np.float64), high.astype(np.float64))
        self.count += values.shape[0] * values.shape[2]

    def _widen(self, low: Float64, high: Float64) -> None:
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        grown(self.low, low, "a range of channels")
        self.low = np.minimum(self.low, low)
        self.high = np.maximum(self.high, high)

    def _merge(self, other: ChannelRange) -> None:
        if other.low is not None and other.high is not None:
            self._widen(other.low, other.high)
        self.count += other.count
        self.apart += other.apart

    def state(self) -> dict[str, Array]:
        """Return the ranges as arrays."""
        none = np.zeros(0)
        return {
            "low": none if self.low is None else self.low,
            "high": none if self.high is None else self.high,
            "count": np.array([self.count, self.apart]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored ranges."""
        low = stored(state, "low", "f", None)
        high = stored(state, "high", "f", len(low))
        count, apart = (int(n) for n in stored(state, "count", "i", 2))
        whole = count * len(low)
        if count < 0 or (count > 0) != (len(low) > 0) or not 0 <= apart <= whole:
            raise UsageError("a stored range counts what it has not seen")
        if len(low):
            self.low, self.high = low, high
        self.count, self.apart = count, apart


@dataclass(eq=False)
class Histogram(Stored):
    """Counts in bins of equal width, over a range that grows as values come.

    The width is a power of two and every edge a multiple of it, the smallest for which
    the range fits ``bins``; growing adds neighbouring bins and loses nothing. So the
    result depends on the values alone, not on their order or split. Values that are
    not finite or beyond 1e30 in size (mask fills) are counted apart.

    Attributes:
        bins: Most bins kept, a power of two.
        counts: int64 [at most bins]; bin ``i`` holds ``[edges[i], edges[i + 1])``.
        count: Values in the bins.
        zeros: How many of them were exactly zero.
        apart: Values counted in no bin.
        low: Smallest value in a bin.
        high: Largest value in a bin.
    """

    bins: int = 2048
    counts: NDArray[np.int64] = field(
        init=False, default_factory=lambda: np.zeros(0, np.int64)
    )
    count: int = field(init=False, default=0)
    zeros: int = field(init=False, default=0)
    apart: int = field(init=False, default=0)
    low: float = field(init=False, default=math.inf)
    high: float = field(init=False, default=-math.inf)
    _exponent: int = field(init=False, default=0)
    _first: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Refuse a number of bins that cannot be halved."""
        if self.bins < 2 or self.bins & (self.bins - 1):
            raise UsageError(f"bins must be a power of two, not {self.bins}")

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(1.0, self._exponent)

    @property
    def edges(self) -> Float64:
        """Edges of the bins, float64 [len(counts) + 1]."""
        places = self._first + np.arange(len(self.counts) + 1)
        return np.asarray(places * self.width, dtype=np.float64)

    def quantile(self, share: float) -> float:
        """Return the value below which this share lies, interpolated within a bin."""
        if not self.count:
            raise UsageError("a histogram was read before it was fed")
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"a quantile is a share from 0 to 1, not {share}")
        below = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.float64)
        value = float(np.interp(share * self.count, below, self.edges))
        return min(max(value, self.low), self.high)

    def update(self, array: Array) -> None:
        """Count one batch."""
        values = numeric(array).reshape(-1)
        for start in range(0, values.size, _CACHED):
            self._count(values[start : start + _CACHED])

    def _count(self, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        if not (-_FILL <= low <= high <= _FILL):
            with np.errstate(invalid="ignore"):
                kept = values[np.abs(values) <= _FILL]
            self.apart += values.size - kept.size
            if not kept.size:
                return
            values, low, high = kept, float(kept.min()), float(kept.max())
        self._cover(low, high)
        if abs(self._exponent) > 100 or abs(self._first) >= 1 << 24:
            values = values.astype(np.float64)
        # Scaling by a power of two is exact, so floor gives the true bin, and so is the
        # difference: an integer smaller than the number of bins.
        scaled = values * values.dtype.type(math.ldexp(1.0, -self._exponent))
        np.floor(scaled, out=scaled)
        scaled -= values.dtype.type(self._first)
        places = scaled.astype(np.intp)
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.count += values.size
        self.zeros += int(np.count_nonzero(values == 0))

    def reach(self, low: float, high: float) -> None:
        """Widen ``low``, ``high`` and the bins to a range, counting nothing."""
        if not -_FILL <= low <= high <= _FILL:
            raise UsageError(f"a histogram cannot reach from {low} to {high}")
        self._cover(low, high)

    def _cover(self, low: float, high: float) -> None:
        """Make the bins reach over [low, high] and everything seen before."""
        low, high = min(low, self.low), max(high, self.high)
        exponent = self._needed(low, high)
        first = math.floor(math.ldexp(low, -exponent))
        last = math.floor(math.ldexp(high, -exponent))
        counts = np.zeros(last - first + 1, np.int64)
        if self.count:
            old = np.arange(len(self.counts)) + self._first
            shift = exponent - self._exponent
            places = (old >> min(shift, 62)) - first
            np.add.at(counts, places, self.counts)
        self.counts, self._exponent, self._first = counts, exponent, first
        self.low, self.high = low, high

    def _needed(self, low: float, high: float) -> int:
        """Smallest exponent of the width for which the range fits the bins.

        It is at least 2**-40 of the largest value, so that indices stay small, and it
        never falls when the range grows.
        """
        size = max(abs(low), abs(high))
        exponent = max(math.frexp(size)[1] - 40, -900) if size else -900
        spread = high - low
        if spread > 0:
            guess = math.frexp(spread)[1] - self.bins.bit_length() - 1
            exponent = max(exponent, guess)
        while (
            math.floor(math.ldexp(high, -exponent))
            - math.floor(math.ldexp(low, -exponent))
            >= self.bins
        ):
            exponent += 1
        return exponent

    def _merge(self, other: Histogram) -> None:
        self.apart += other.apart
        if not other.count:
            return
        self._cover(other.low, other.high)
        shift = self._exponent - other._exponent
        places = ((np.arange(len(other.counts)) + other._first) >> min(shift, 62)) - (
            self._first
        )
        np.add.at(self.counts, places, other.counts)
        self.count += other.count
        self.zeros += other.zeros

    def state(self) -> dict[str, Array]:
        """Return the bins as arrays."""
        whole = [self.count, self.zeros, self.apart, self._exponent, self._first]
        return {
            "counts": self.counts,
            "whole": np.array(whole, np.int64),
            "ends": np.array([self.low, self.high]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored bins."""
        counts = stored(state, "counts", "i", None)
        whole = [int(number) for number in stored(state, "whole", "i", 5)]
        low, high = (float(end) for end in stored(state, "ends", "f", 2))
        count, zeros, apart, exponent, first = whole
        usable = (
            len(counts) <= self.bins
            and bool(np.all(counts >= 0))
            and int(counts.sum()) == count
            and 0 <= zeros <= count
            and apart >= 0
            and (count > 0) == (len(counts) > 0)
        )
        if usable and count:
            usable = -_FILL <= low <= high <= _FILL
            usable = usable and exponent == self._needed(low, high)
            usable = usable and first == math.floor(math.ldexp(low, -exponent))
            last = math.floor(math.ldexp(high, -exponent)) if usable else 0
            usable = usable and len(counts) == last - first + 1
        if not usable:
            raise UsageError("a stored histogram contradicts itself")
        self.counts, self.count, self.zeros, self.apart = counts, count, zeros, apart
        self._exponent, self._first, self.low, self.high = exponent, first, low, high


@dataclass(eq=False)
class Counts(Statistic):
    """How often each row of a table is looked up.

    Attributes:
        rows: Rows of the table; indices below zero count from its end.
        counts: int64 [rows].
    """

    rows: int
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.counts = np.zeros(self.rows, np.int64)

    def update(self, array: Array) -> None:
        """Add one batch of indices; those outside the table are left out."""
        at = np.asarray(array).astype(np.int64).reshape(-1)
        at = np.where(at < 0, at + self.rows, at)
        at = at[(at >= 0) & (at < self.rows)]
        self.counts += np.bincount(at, minlength=self.rows)

    def _merge(self, other: Counts) -> None:
        self.counts += other.counts
