"""Which values of tensors are smallest, exactly and without holding them all.

The bit pattern of a float's magnitude orders like the magnitude, so two histograms of
half a pattern each find the k-th smallest of any number of values in two passes over
chunks (a radix selection). Ties are settled by order: earlier tensors and lower flat
indices go first, so a count is always met exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError

__all__ = ["Pattern", "Source", "is_finite", "smallest", "zero_below", "zero_smallest"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = 0x7F800000
_LOW_BITS = 15
_LOW = np.uint32((1 << _LOW_BITS) - 1)
_HIGH_BINS = 1 << 16
_CHUNK = 4 << 20

Floats = NDArray[Any]
Indices = NDArray[np.intp]


class Source(Protocol):
    """What is read in flat pieces: a lazy tensor, or scores made on the way."""

    @property
    def size(self) -> int:
        """Number of values."""

    def chunks(self, nbytes: int = ..., /) -> Iterable[NDArray[Any]]:
        """Yield the values in C order."""


def magnitude_bits(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Return integers that order like ``abs(float32(values))``; NaN comes last."""
    narrow = np.ascontiguousarray(values, dtype=np.float32)
    return narrow.view(np.uint32) & _MAGNITUDE


def _histogram(task: tuple[Source, int | None]) -> NDArray[np.int64]:
    """Count patterns by their high half, or by the low half within one high half."""
    source, high = task
    bins = _HIGH_BINS if high is None else 1 << _LOW_BITS
    counts = np.zeros(bins, np.int64)
    for chunk in source.chunks(_CHUNK):
        bits = magnitude_bits(chunk)
        top = bits >> np.uint32(_LOW_BITS)
        if high is None:
            part = top
        else:
            part = bits[top == high] & _LOW
        counts += np.bincount(part, minlength=bins)
    return counts


def smallest(
    sources: Sequence[Source],
    count: int,
    run: Callable[..., list[NDArray[np.int64]]] | None = None,
) -> tuple[int, ...]:
    """Return how many of each source are among the ``count`` smallest magnitudes.

    Values are compared as float32. Two passes over the data, whatever its size.

    Args:
        sources: Where the values are.
        count: How many are chosen, of all sources together.
        run: ``run(function, tasks)``, such as ``Context.map``.

    Raises:
        ModelError: There is a NaN among the values.
    """
    total = sum(source.size for source in sources)
    count = min(max(count, 0), total)
    if not count:
        return (0,) * len(sources)

    def histograms(high: int | None) -> list[NDArray[np.int64]]:
        tasks = [(source, high) for source in sources]
        return [_histogram(t) for t in tasks] if run is None else run(_histogram, tasks)

    coarse = histograms(None)
    whole = np.sum(coarse, axis=0)
    if whole[(_INFINITY >> _LOW_BITS) + 1 :].any():
        raise ModelError("a weight holds NaN")
    high = int(np.searchsorted(np.cumsum(whole), count))
    below = [int(part[:high].sum()) for part in coarse]
    fine = histograms(high)
    whole = np.sum(fine, axis=0)
    missing = count - sum(below)
    low = int(np.searchsorted(np.cumsum(whole), missing))
    chosen = [b + int(f[:low].sum()) for b, f in zip(below, fine, strict=True)]
    ties = count - sum(chosen)
    for index, part in enumerate(fine):
        taken = min(ties, int(part[low]))
        chosen[index] += taken
        ties -= taken
    return tuple(chosen)


def _cut(source: Source, count: int) -> tuple[int, int]:
    """Return the pattern of the count-th smallest, and how many equal to it to take."""
    coarse = _histogram((source, None))
    if coarse[(_INFINITY >> _LOW_BITS) + 1 :].any():
        raise ModelError("a weight holds NaN")
    high = int(np.searchsorted(np.cumsum(coarse), count))
    missing = count - int(coarse[:high].sum())
    fine = _histogram((source, high))
    low = int(np.searchsorted(np.cumsum(fine), missing))
    return (high << _LOW_BITS) | low, missing - int(fine[:low].sum())


def choose_smallest(source: Source, count: int) -> NDArray[np.bool_]:
    """Return a flat mask of the ``count`` smallest magnitudes; low indices win ties."""
    mask = np.zeros(source.size, np.bool_)
    count = min(max(count, 0), source.size)
    if not count:
        return mask
    limit, ties = _cut(source, count)
    at = 0
    for chunk in source.chunks(_CHUNK):
        bits = magnitude_bits(chunk)
        part = mask[at : at + bits.size]
        np.less(bits, limit, out=part)
        if ties:
            equal = np.flatnonzero(bits == limit)[:ties]
            part[equal] = True
            ties -= equal.size
        at += bits.size
    return mask


def zero_smallest(source: Source, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a flat copy in which the ``count`` smallest magnitudes are zero.

    Args:
        source: The values.
        count: How many are zero afterwards at least; zeros that are there count.
        dtype: Of the result, that of the values.

    Raises:
        ModelError: There is a NaN among the values.
    """
    out = np.empty(source.size, dtype)
    count = min(max(count, 0), source.size)
    limit, ties = _cut(source, count) if count else (0, 0)
    at = 0
    for chunk in source.chunks(_CHUNK):
        bits = magnitude_bits(chunk)
        part = out[at : at + bits.size]
        part[...] = chunk
        part[bits < limit] = 0
        if ties:
            equal = np.flatnonzero(bits == limit)[:ties]
            part[equal] = 0
            ties -= equal.size
        at += bits.size
    return out


def zero_below(source: Source, threshold: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a flat copy in which what is smaller than ``threshold`` is zero."""
    out = np.empty(source.size, dtype)
    at = 0
    for chunk in source.chunks(_CHUNK):
        part = out[at : at + chunk.size]
        part[...] = chunk
        part[np.abs(chunk) < threshold] = 0
        at += chunk.size
    return out


def is_finite(source: Source) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(np.isfinite(chunk).all()) for chunk in source.chunks(_CHUNK))


@dataclass(frozen=True)
class Pattern:
    """Which zeros belong together.

    Attributes:
        keep: With ``of``: at most ``keep`` of ``of`` neighbours along the inputs stay.
        of: 0 if zeros are not bound to neighbours.
        rows: With ``columns``: blocks of rows x columns of [outputs, inputs] are zero
            as a whole; 1 x 1 is no pattern at all.
        columns: See ``rows``.
    """

    keep: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def is_blocks(self) -> bool:
        """Whether whole blocks are zero."""
        return self.rows > 1 or self.columns > 1

    def blocks(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return how many blocks matrices of this shape have, on each axis."""
        groups, outputs, inputs = shape
        return groups, -(-outputs // self.rows), -(-inputs // self.columns)

    def scores(self, energy: Floats) -> Floats:
        """Return the mean of each block; blocks at the edge are smaller.

        Args:
            energy: What each entry of [groups, outputs, inputs] is worth.
        """
        _, outputs, inputs = energy.shape
        rows = np.arange(0, outputs, self.rows)
        columns = np.arange(0, inputs, self.columns)
        sums = np.add.reduceat(energy, rows, axis=1)
        sums = np.add.reduceat(sums, columns, axis=2)
        heights = np.diff([*rows, outputs])
        widths = np.diff([*columns, inputs])
        return np.asarray(sums / np.outer(heights, widths))

    def spread(
        self, chosen: NDArray[np.bool_], shape: Sequence[int]
    ) -> NDArray[np.bool_]:
        """Return the entries of matrices of this shape that chosen blocks cover."""
        wide = chosen.repeat(self.rows, axis=1).repeat(self.columns, axis=2)
        return wide[:, : shape[1], : shape[2]]

    def drop(self, scores: Floats) -> NDArray[np.bool_]:
        """Return which entries go so that ``keep`` of ``of`` neighbours stay.

        The entries with the smallest score of each run of ``of`` inputs go; the last
        run may be shorter.

        Args:
            scores: Shape [..., inputs].
        """
        inputs = scores.shape[-1]
        missing = -inputs % self.of
        widths = [(0, 0)] * (scores.ndim - 1) + [(0, missing)]
        padded = np.pad(scores, widths, constant_values=-1.0)
        runs = padded.reshape(*scores.shape[:-1], -1, self.of)
        order = np.argsort(runs, axis=-1, kind="stable")
        mask = np.zeros(runs.shape, np.bool_)
        np.put_along_axis(mask, order[..., : self.of - self.keep], True, axis=-1)
        return mask.reshape(padded.shape)[..., :inputs]
