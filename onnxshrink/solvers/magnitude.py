"""Which values of tensors are smallest, exactly and without holding them all.

The bit pattern of a float's magnitude orders like the magnitude, so two histograms of
half a pattern each find the k-th smallest of any number of values in two passes over
chunks (a radix selection). Ties are settled by order: earlier tensors and lower flat
indices go first, so a count is always met exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError

__all__ = [
    "Pattern",
    "Source",
    "choose_smallest",
    "energies",
    "smallest",
    "smallest_of_rows",
    "zero_smallest",
]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = 0x7F800000
_LOW_BITS = 15
_LOW = np.uint32((1 << _LOW_BITS) - 1)
_HIGH_BINS = 1 << 16
_CHUNK = 4 << 20

Floats = NDArray[Any]


class Source(Protocol):
    """Values read in flat pieces: a lazy tensor, or scores computed when read."""

    @property
    def size(self) -> int:
        """Number of values."""

    def chunks(self, nbytes: int, /) -> Iterable[NDArray[Any]]:
        """Yield the values in C order."""


def magnitude_bits(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Return integers that order like ``abs(float32(values))``; NaN comes last."""
    narrow = np.ascontiguousarray(values, dtype=np.float32)
    return narrow.view(np.uint32) & _MAGNITUDE


class _Counts(NamedTuple):
    """The bins of a histogram that are not empty, in order, and what each holds.

    Kept for every tensor of a model at once: a tensor of 256 weights fills at most 256
    of the 65,536 bins.
    """

    bins: NDArray[np.uint16]
    held: NDArray[np.int64]

    def below(self, end: int) -> int:
        """Return how many values are in bins before ``end``."""
        return int(self.held[: int(np.searchsorted(self.bins, end))].sum())

    def at(self, place: int) -> int:
        """Return how many values are in the bin ``place``."""
        return self.below(place + 1) - self.below(place)


def _counts(task: tuple[Source, int | None]) -> _Counts:
    """Return the histogram of one source without its empty bins."""
    histogram = _histogram(task)
    bins = np.flatnonzero(histogram)
    return _Counts(bins.astype(np.uint16), histogram[bins])


def _summed(parts: Iterable[_Counts], bins: int) -> NDArray[np.int64]:
    """Return the whole histogram of all parts."""
    whole = np.zeros(bins, np.int64)
    for part in parts:
        whole[part.bins] += part.held
    return whole


def _histogram(task: tuple[Source, int | None]) -> NDArray[np.int64]:
    """Count patterns by their high half, or by the low half within one high half."""
    source, high = task
    bins = _HIGH_BINS if high is None else 1 << _LOW_BITS
    counts = np.zeros(bins, np.int64)
    for chunk in source.chunks(_CHUNK):
        bits = magnitude_bits(chunk)
        top = bits >> np.uint32(_LOW_BITS)
        part = top if high is None else bits[top == high] & _LOW
        counts += np.bincount(part, minlength=bins)
    return counts


def smallest(
    sources: Sequence[Source],
    counts: Sequence[int],
    run: Callable[..., list[Any]] | None = None,
) -> list[list[int]]:
    """Return how many of each source are among the smallest magnitudes of all.

    Values are compared as float32. Two passes over the data, whatever its size; for
    each source its histogram's filled bins are kept. The
    last count is divided exactly; for the others, magnitudes that differ by less than
    1/256 are taken from all sources in proportion.

    Args:
        sources: Where the values are.
        counts: How many are chosen, of all sources together.
        run: ``run(function, tasks)``, such as ``Context.map``.

    Returns:
        For each count, the number from each source. Those of the last add up to it.

    Raises:
        ModelError: There is a NaN among the values.
    """
    run = run or (lambda function, tasks: [function(task) for task in tasks])
    total = sum(source.size for source in sources)
    coarse: list[_Counts] = run(_counts, [(source, None) for source in sources])
    whole = _summed(coarse, _HIGH_BINS)
    if whole[(_INFINITY >> _LOW_BITS) + 1 :].any():
        raise ModelError("a weight holds NaN")
    ends = np.cumsum(whole)
    divisions = []
    for place, count in enumerate(counts):
        count = min(max(count, 0), total)
        high = int(np.searchsorted(ends, count))
        below = [part.below(high) for part in coarse]
        missing = count - sum(below)
        if not missing:
            divisions.append(below)
        elif place < len(counts) - 1:
            inside = [part.at(high) * missing // int(whole[high]) for part in coarse]
            divisions.append([b + i for b, i in zip(below, inside, strict=True)])
        else:
            fine = run(_counts, [(source, high) for source in sources])
            divisions.append(_divided(below, fine, missing))
    return divisions


def _divided(
    below: Sequence[int], halves: Sequence[_Counts], missing: int
) -> list[int]:
    """Finish a selection from the counts of low halves within one high half."""
    whole = _summed(halves, 1 << _LOW_BITS)
    low = int(np.searchsorted(np.cumsum(whole), missing))
    inside = [half.below(low) for half in halves]
    ties = missing - sum(inside)
    for index, half in enumerate(halves):
        taken = min(ties, half.at(low))
        inside[index] += taken
        ties -= taken
    return [b + i for b, i in zip(below, inside, strict=True)]


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


def energies(weights: Floats, squares: Floats | None = None) -> NDArray[np.float32]:
    """Return the energy each entry adds to the outputs: ``w^2``, times ``|x|^2``.

    Its root is the measure of Wanda (Sun et al. 2023, equation 1).

    Args:
        weights: Floats [groups, outputs, inputs].
        squares: Sum of the squares of each input, [groups, inputs]; ``None`` counts
            all inputs alike.
    """
    energy = np.square(weights.astype(np.float32))
    if squares is not None:
        energy = energy * squares[:, None, :].astype(np.float32)
    return np.asarray(energy)


def smallest_of_rows(energy: Floats, count: int) -> NDArray[np.bool_]:
    """Return a mask of the ``count`` smallest entries, as many in each row.

    Args:
        energy: [..., inputs].
        count: How many of all rows together; the first rows lose one more each where
            the rows do not divide it.
    """
    mask = np.zeros(energy.shape, np.bool_)
    rows = energy.reshape(-1, energy.shape[-1])
    flat = mask.reshape(rows.shape)
    each, more = divmod(count, len(rows))
    for index, row in enumerate(rows):
        wanted = each + (index < more)
        flat[index, np.argsort(row, kind="stable")[:wanted]] = True
    return mask


@dataclass(frozen=True)
class Pattern:
    """Which entries become zero together.

    Attributes:
        keep: How many of ``of`` neighbours along the inputs stay at most.
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
        """Return which entries go so that ``keep`` of every ``of`` neighbours stay.

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
