"""Few values that stand for many: k-means, exact in one dimension.

One dimension. Values are counted into 65,536 bins, finer where they are dense, each
known by its weight, mean and spread; up to 65,536 values are taken as they are. Bins
are merged to at most 8,192 by the density of centroids that is best for many of them,
the cube root of the density of values (Panter and Dite 1951). On these the best
partition is found by dynamic programming, and Lloyd's iteration (1982) on the bins
corrects what merging has cost. The dynamic program goes row by row: the best last cut
moves right as more values are covered (Wu 1991; Grønlund et al. 2017, "Fast Exact
k-Means, k-Medians and Bregman Divergence Clustering in 1D"), so that each row takes
``O(n log n)`` by divide and conquer. It knows the best error of every smaller number of
centroids too (``errors``).

``zero=True`` keeps 0 as a centroid, which pruned weights need: the program then runs
from either end towards 0, and the centroids are divided between the sides.

Several dimensions. Centroids start by cutting the cluster of the largest error through
its mean, across its principal axis (Su and Dy 2007, "In search of deterministic methods
for initializing K-means"), and move by Lloyd's iteration.

Every squared error may have a weight of its own (``importance``). Nothing here is
random: the same arguments give the same centroids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError

__all__ = [
    "MAX_VALUES",
    "Initial",
    "Points",
    "assign",
    "assign_vectors",
    "distortion",
    "errors",
    "fit",
    "fit_vectors",
    "merged",
    "points_of",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Initial = Literal["optimal", "linear", "quantile"]

MAX_VALUES = 256
"""Most centroids."""
_BINS = 1 << 16
_DEPTH = 4
"""How often crowded bins are divided into 65,536 again."""
_CROWDED = 32 * MAX_VALUES
"""A bin with more than this part of the weight is crowded."""
_MERGED = 8192
"""Bins that the dynamic program sees at most."""
_MERGED_EACH = 48
"""Bins it sees for each centroid, so that few centroids are found sooner."""
_CURVE = 2048
"""Bins for errors of all numbers of centroids."""
_CHUNK = 1 << 20
_LLOYD = 300
"""Most iterations on bins."""
_SAMPLE = 1 << 16
"""Vectors that Lloyd's iteration starts on, if there are more."""
_VECTOR_LLOYD = 40
_FULL_LLOYD = 3
"""Iterations on all vectors after those on a sample."""


# --- one dimension: values as points --------------------------------------------------


@dataclass(frozen=True, eq=False)
class Points:
    """Distinct values or bins in ascending order.

    Attributes:
        mean: Weighted mean of each.
        weight: Sum of weights, positive.
        spread: Sum of weighted squared distances from the means, of all of them
            together: what no choice of centroids on bins can change.
    """

    mean: Float64
    weight: Float64
    spread: float

    def sums(self) -> tuple[Float64, Float64, Float64]:
        """Return cumulated weight, first and second moment, each from 0 on."""
        sums = np.zeros((3, self.mean.size + 1))
        np.cumsum(self.weight, out=sums[0, 1:])
        first = self.weight * self.mean
        np.cumsum(first, out=sums[1, 1:])
        np.cumsum(first * self.mean, out=sums[2, 1:])
        return sums[0], sums[1], sums[2]


def _chunks(
    values: Array, importance: Array | None
) -> Iterator[tuple[Float64, Float64 | None]]:
    """Yield flat values and weights, float64."""
    if importance is not None:
        importance = np.broadcast_to(importance, values.shape)
    if values.flags.c_contiguous and importance is None:
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            yield flat[start : start + _CHUNK].astype(np.float64), None
        return
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values[None]
    shares = None
    if importance is not None:
        shares = importance.reshape(rows.shape)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    width = max(1, _CHUNK)
    for top in range(0, len(rows), step):
        for left in range(0, rows.shape[1], width):
            cut = (slice(top, top + step), slice(left, left + width))
            part = rows[cut].astype(np.float64).reshape(-1)
            yield (
                part,
                None if shares is None else shares[cut].astype(np.float64).reshape(-1),
            )


def _checked(values: Array, importance: Array | None) -> None:
    if not values.size:
        raise UsageError("k-means needs at least one value")
    if importance is None:
        return
    try:
        np.broadcast_shapes(values.shape, importance.shape)
    except ValueError as error:
        raise UsageError(
            f"importance of shape {list(importance.shape)} does not broadcast to "
            f"values of shape {list(values.shape)}"
        ) from error
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise ModelError("importance holds NaN, infinity or negative numbers")


def points_of(values: Array, importance: Array | None) -> Points:
    """Gather values as they are, or as bins if there are many."""
    _checked(values, importance)
    if values.size <= _BINS:
        parts = list(_chunks(values, importance))
        flat = np.concatenate([part for part, _ in parts])
        if not np.isfinite(flat).all():
            raise ModelError("values hold NaN or infinity; they have no centroid")
        shares = [share for _, share in parts if share is not None]
        return _distinct(flat, np.concatenate(shares) if shares else None)
    low, high = np.inf, -np.inf
    for part, _ in _chunks(values, None):
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ModelError("values hold NaN or infinity; they have no centroid")
    return _binned(values, importance, low, high)


def _distinct(values: Float64, shares: Float64 | None) -> Points:
    mean, place = np.unique(values, return_inverse=True)
    weight = np.bincount(place, shares, minlength=mean.size).astype(np.float64)
    return _weighing(mean, weight, 0.0)


def _weighing(mean: Float64, weight: Float64, spread: float) -> Points:
    """Leave out what weighs nothing, unless nothing weighs anything."""
    some = weight > 0
    if not some.any():
        return Points(mean, np.ones(mean.size), spread)
    if some.all():
        return Points(mean, weight, spread)
    return Points(mean[some], weight[some], spread)


@dataclass(eq=False)
class _Histogram:
    """65,536 bins of equal width from ``low`` to ``high``."""

    low: float
    high: float

    def __post_init__(self) -> None:
        self.count = np.zeros(_BINS)
        self.weight = np.zeros(_BINS)
        self.first = np.zeros(_BINS)
        self.second = 0.0
        self.factor = (_BINS - 1) / max(self.high - self.low, 1e-300)

    def places(self, values: Float64) -> NDArray[np.intp]:
        places: NDArray[np.intp] = ((values - self.low) * self.factor).astype(np.intp)
        return places

    def add(self, values: Float64, shares: Float64 | None) -> None:
        values = values - self.low
        places = (values * self.factor).astype(np.intp)
        count = np.bincount(places, minlength=_BINS)
        self.count += count
        if shares is None:
            self.weight += count
            self.first += np.bincount(places, values, minlength=_BINS)
            self.second += float(values @ values)
            return
        weighted = values * shares
        self.weight += np.bincount(places, shares, minlength=_BINS)
        self.first += np.bincount(places, weighted, minlength=_BINS)
        self.second += float(weighted @ values)


def _binned(
    values: Array, importance: Array | None, low: float, high: float, depth: int = 0
) -> Points:
    bins = _Histogram(low, high)
    for part, share in _chunks(values, importance):
        bins.add(part, share)
    full = bins.count > 0
    mean = np.zeros(_BINS)
    np.divide(bins.first, bins.weight, out=mean, where=bins.weight > 0)
    if not bins.weight.any():
        bins.weight = bins.count
    crowded = bins.weight * _CROWDED > bins.weight.sum()
    crowded &= bins.count > 1
    if crowded.any() and depth < _DEPTH and high > low:
        return _refined(values, importance, bins, mean, crowded, depth)
    full &= bins.weight > 0
    weight, mean = bins.weight[full], mean[full]
    spread = max(0.0, bins.second - float(weight @ (mean * mean)))
    return Points(mean + low, weight, spread)


def _refined(
    values: Array,
    importance: Array | None,
    bins: _Histogram,
    mean: Float64,
    crowded: NDArray[np.bool_],
    depth: int,
) -> Points:
    """Divide crowded bins into bins of their own; single values stay one bin."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], crowded, [0]])))
    runs = edges.reshape(-1, 2)
    if len(runs) > 64:  # many peaks: from the first to the last
        runs = np.array([[runs[0, 0], runs[-1, 1]]])
    inside = np.zeros(_BINS, np.bool_)
    pieces: list[list[Float64]] = [[] for _ in runs]
    weights: list[list[Float64]] = [[] for _ in runs]
    for start, stop in runs:
        inside[start:stop] = True
    owner = np.full(_BINS, -1, np.int16)
    for index, (start, stop) in enumerate(runs):
        owner[start:stop] = index
    outside_second = 0.0
    for part, share in _chunks(values, importance):
        own = owner[bins.places(part)]
        rest = own < 0
        shifted = part[rest] - bins.low
        outside_second += float(
            shifted @ shifted if share is None else (shifted * share[rest]) @ shifted
        )
        for index in range(len(runs)):
            chosen = own == index
            pieces[index].append(part[chosen])
            if share is not None:
                weights[index].append(share[chosen])
    outside = ~inside & (bins.weight > 0)
    weight, own_mean = bins.weight[outside], mean[outside]
    spread = max(0.0, outside_second - float(weight @ (own_mean * own_mean)))
    means, all_weights = [own_mean + bins.low], [weight]
    for piece, share_ in zip(pieces, weights, strict=True):
        flat = np.concatenate(piece)
        shares = np.concatenate(share_) if share_ else None
        if flat.size <= _BINS:
            found = _distinct(flat, shares)
        else:
            low, high = float(flat.min()), float(flat.max())
            found = _binned(flat, shares, low, high, depth + 1)
        means.append(found.mean)
        all_weights.append(found.weight)
        spread += found.spread
    together = np.concatenate(means)
    order = np.argsort(together, kind="stable")
    return _weighing(together[order], np.concatenate(all_weights)[order], spread)


def merged(points: Points, limit: int) -> Points:
    """Join neighbours until at most ``limit`` are left."""
    size = points.mean.size
    if size <= limit:
        return points
    width = np.diff(points.mean, append=points.mean[-1])
    width[-1] = width[-2]
    dense = np.cbrt(points.weight * width * width)
    reach = points.mean[-1] - points.mean[0]
    # Two thirds of the bins where centroids will be dense, one third evenly.
    place = 2 / 3 * np.cumsum(dense) / dense.sum()
    place += 1 / 3 * (points.mean - points.mean[0]) / reach
    owner = np.minimum((place * (limit / place[-1])).astype(np.intp), limit - 1)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    weight = np.add.reduceat(points.weight, starts)
    mean = np.add.reduceat(points.weight * points.mean, starts) / weight
    return Points(mean, weight, 0.0)


# --- one dimension: the best partition ------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Program:
    """The best cuts of sorted points into 1, 2, ... clusters.

    Attributes:
        error: ``error[k - 1, j]``: least error of the first ``j`` points in at most
            ``k`` clusters.
        cut: Where the last of these clusters starts.
    """

    error: Float64
    cut: NDArray[np.int32]

    def starts(self, clusters: int, end: int) -> list[int]:
        """Return where each cluster of the first ``end`` points starts."""
        found = []
        for row in range(clusters - 1, -1, -1):
            if end <= 0:
                break
            end = int(self.cut[row, end])
            found.append(end)
        return found[::-1]


def _program(points: Points, clusters: int) -> _Program:
    size = points.mean.size
    zeroth, first, second = Points(
        points.mean - float(np.average(points.mean, weights=points.weight)),
        points.weight,
        0.0,
    ).sums()
    error = np.zeros((clusters, size + 1))
    cut = np.zeros((clusters, size + 1), np.int32)
    error[0, 1:] = np.maximum(second[1:] - first[1:] ** 2 / zeroth[1:], 0.0)
    order = _bisection(size)
    for row in range(1, clusters):
        _row(error[row - 1], error[row], cut[row], (zeroth, first, second), order)
    return _Program(error, cut)


def _bisection(size: int) -> list[NDArray[np.intp]]:
    """Return 1 to ``size`` in levels: middle, middles of both halves, and so on."""
    step = 1
    while step * 2 <= size:
        step *= 2
    levels = []
    while step:
        levels.append(np.arange(step, size + 1, 2 * step))
        step //= 2
    return levels


def _row(
    before: Float64,
    error: Float64,
    cut: NDArray[np.int32],
    sums: tuple[Float64, Float64, Float64],
    levels: list[NDArray[np.intp]],
) -> None:
    """Fill one row: for each number of points the best start of the last cluster.

    The best start never moves left as points are added, so that those of the level
    before bound the search.
    """
    zeroth, first, second = sums
    size = error.size - 1
    base = before - second[: size + 1]
    known = np.zeros(size + 2, np.intp)
    known[size + 1] = size
    step = int(levels[0][0])
    for ends in levels:
        left = known[ends - step]
        right = np.minimum(known[np.minimum(ends + step, size + 1)], ends - 1)
        right = np.maximum(right, left)
        counts = right - left + 1
        offsets = np.cumsum(counts) - counts
        flat = np.arange(int(counts.sum()))
        starts = flat - np.repeat(offsets - left, counts)
        total = np.repeat(first[ends], counts)
        total -= first[starts]
        total *= total
        weight = np.repeat(zeroth[ends], counts)
        weight -= zeroth[starts]
        total /= weight
        costs = base[starts]
        costs -= total
        best = np.minimum.reduceat(costs, offsets)
        hits = np.flatnonzero(costs == np.repeat(best, counts))
        # The first hit of each segment.
        at = hits[np.searchsorted(hits, offsets)]
        known[ends] = starts[at]
        error[ends] = np.maximum(best + second[ends], 0.0)
        cut[ends] = starts[at]
        step //= 2


def _means(points: Points, starts: list[int] | Array, stop: int) -> Float64:
    """Return the mean of each run of points."""
    bounds = np.append(np.asarray(starts, np.intp), stop)
    zeroth, first, _ = points.sums()
    return np.asarray(np.diff(first[bounds]) / np.diff(zeroth[bounds]))


def _without_zero(points: Points, clusters: int) -> Float64:
    clusters = min(clusters, points.mean.size)
    program = _program(points, clusters)
    return _means(points, program.starts(clusters, points.mean.size), points.mean.size)


@dataclass(frozen=True, eq=False)
class _Side:
    """The points on one side of 0, from the farthest to the nearest.

    Attributes:
        points: Their distances, negated, so that they ascend towards 0.
        program: Their cuts.
        best: Least error with 0, 1, ... centroids beside 0.
        ends: How many points these take; the rest goes to 0.
    """

    points: Points
    program: _Program | None
    best: Float64
    ends: list[int]

    @classmethod
    def of(cls, points: Points, clusters: int) -> _Side:
        clusters = min(clusters, points.mean.size)
        squares = points.weight * points.mean**2
        to_zero = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
        if not clusters:
            return cls(points, None, to_zero[:1], [0])
        program = _program(points, clusters)
        totals = program.error + to_zero
        ends = [0, *np.argmin(totals, axis=1).tolist()]
        best = [float(to_zero[0])]
        best += [float(totals[row, end]) for row, end in enumerate(ends[1:])]
        return cls(points, program, np.minimum.accumulate(best), ends)

    def centroids(self, clusters: int) -> Float64:
        end = self.ends[clusters] if clusters < len(self.ends) else self.ends[-1]
        if not clusters or self.program is None or not end:
            return np.empty(0)
        return _means(self.points, self.program.starts(clusters, end), end)


def _sides(points: Points, clusters: int) -> tuple[_Side, _Side]:
    low, high = points.mean < 0, points.mean > 0
    left = Points(points.mean[low], points.weight[low], 0.0)
    right = Points(-points.mean[high][::-1], points.weight[high][::-1], 0.0)
    return _Side.of(left, clusters - 1), _Side.of(right, clusters - 1)


def _divisions(left: _Side, right: _Side, others: int) -> tuple[float, int, int]:
    """Return least error, and how many of the other centroids each side gets."""
    counts = np.arange(min(others, left.best.size - 1) + 1)
    rest = np.minimum(others - counts, right.best.size - 1)
    totals = left.best[counts] + right.best[rest]
    chosen = int(totals.argmin())
    return float(totals[chosen]), int(counts[chosen]), int(rest[chosen])


def _with_zero(points: Points, clusters: int) -> Float64:
    left, right = _sides(points, clusters)
    _, low, high = _divisions(left, right, clusters - 1)
    return np.sort(np.concatenate([left.centroids(low), [0.0], -right.centroids(high)]))


def _started(points: Points, clusters: int, initial: Initial, zero: bool) -> Float64:
    """Return centroids that are evenly spread over the range, or over the weights."""
    count = min(clusters, points.mean.size)
    if initial == "linear":
        found = np.linspace(points.mean[0], points.mean[-1], count)
    else:
        shares = np.cumsum(points.weight) - points.weight / 2
        wanted = (np.arange(count) + 0.5) / count * points.weight.sum()
        found = np.interp(wanted, shares, points.mean)
    if zero:
        found[np.abs(found).argmin()] = 0.0
    return np.unique(found)


def _lloyd(points: Points, centroids: Float64, zero: bool) -> Float64:
    """Move each centroid to the mean of what is nearest to it, until none moves."""
    zeroth, first, _ = points.sums()
    for _ in range(_LLOYD):
        middles = (centroids[1:] + centroids[:-1]) / 2
        cuts = np.searchsorted(points.mean, middles)
        bounds = np.concatenate([[0], cuts, [points.mean.size]])
        weight = np.diff(zeroth[bounds])
        moved = centroids.copy()
        np.divide(np.diff(first[bounds]), weight, out=moved, where=weight > 0)
        if zero:
            moved[centroids == 0] = 0.0
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def _limit(count: int) -> int:
    if not 1 <= count <= MAX_VALUES:
        raise UsageError(f"there are 1 to {MAX_VALUES} centroids, not {count}")
    return min(_MERGED, max(1024, _MERGED_EACH * count))


def fit(
    values: Array,
    count: int,
    *,
    importance: Array | None = None,
    zero: bool = False,
    initial: Initial = "optimal",
    bins: int | None = None,
) -> Float64:
    """Return the centroids that stand for values with the least squared error.

    Args:
        values: Finite floats of any shape.
        count: Most centroids, 1 to 256.
        importance: Weight of each value's squared error, not negative; broadcast to
            ``values``.
        zero: 0 is one of the centroids, and exactly 0.
        initial: ``optimal``, or Lloyd's iteration from centroids spread evenly over the
            range (``linear``) or over the values (``quantile``), as in Han, Mao and
            Dally 2016, section 3.2.
        bins: Bins that the dynamic program sees; by default 1,024 to 8,192, by the
            number of centroids.

    Returns:
        float64 [at most ``count``], ascending; fewer where there are fewer distinct
        values.

    Raises:
        ModelError: A value is not finite, or an importance is not either or negative.
        UsageError: ``count`` or a shape is out of range.
    """
    limit = _limit(count)
    points = points_of(values, importance)
    if initial != "optimal":
        started = _started(points, count, initial, zero)
        return _lloyd(points, started, zero)
    few = merged(points, limit if bins is None else max(bins, count))
    found = _with_zero(few, count) if zero else _without_zero(few, count)
    if few is points:
        return np.unique(found)
    return np.unique(_lloyd(points, np.unique(found), zero))


def errors(
    values: Array,
    count: int,
    *,
    importance: Array | None = None,
    zero: bool = False,
) -> Float64:
    """Return the least squared error with 1, 2, ... ``count`` centroids.

    On at most 2,048 bins: above that many distinct values an estimate, 1 % too high for
    256 centroids.

    Args:
        values: As in ``fit``.
        count: As in ``fit``.
        importance: As in ``fit``.
        zero: As in ``fit``.

    Returns:
        float64 [count], never rising.

    Raises:
        ModelError: As in ``fit``.
        UsageError: As in ``fit``.
    """
    limit = _limit(count)
    points = points_of(values, importance)
    few = merged(points, min(limit, _CURVE))
    if zero:
        left, right = _sides(few, count)
        found = [_divisions(left, right, others)[0] for others in range(count)]
    else:
        program = _program(few, min(count, few.mean.size))
        found = program.error[:, -1].tolist()
    inside = points.spread
    if few is not points:
        all_second = float(points.weight @ points.mean**2)
        inside += max(0.0, all_second - float(few.weight @ few.mean**2))
    padded = np.full(count, found[-1])
    padded[: len(found)] = found
    return np.minimum.accumulate(padded) + inside


def assign(values: Array, centroids: Array) -> NDArray[np.uint8]:
    """Return which centroid is nearest to each value, the lower one of two.

    Args:
        values: Finite floats of any shape.
        centroids: Ascending, at most 256.

    Returns:
        uint8 of the shape of ``values``.
    """
    if not 1 <= centroids.size <= MAX_VALUES:
        raise UsageError(f"there are 1 to {MAX_VALUES} centroids, not {centroids.size}")
    middles = (centroids[1:] + centroids[:-1]) / 2
    codes = np.empty(values.size, np.uint8)
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.astype(np.float32)
    if not middles.size:
        return np.zeros(values.shape, np.uint8)
    reach = float(middles[-1] - middles[0])
    factor = (_BINS - 2) / reach if reach > 0 else 0.0
    edges = middles[0] + np.arange(_BINS) / factor if factor else np.empty(0)
    table = np.searchsorted(middles, edges, side="left") if factor else edges
    one_a_bin = bool(factor) and int(np.diff(table).max()) <= 1
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        if not one_a_bin or part.size < _BINS:
            found = np.searchsorted(middles, part, side="left")
        else:
            # A bin holds at most one edge: the table says which, one comparison if.
            places = np.clip((part - middles[0]) * factor, 0, _BINS - 1)
            found = _looked_up(part, middles, table, places.astype(np.intp))
        codes[start : start + part.size] = found
    return codes.reshape(values.shape)


def _looked_up(
    part: Float64, middles: Float64, table: Array, places: NDArray[np.intp]
) -> Array:
    padded = np.append(middles, np.inf)
    # Rounding may move a value to the next bin, never further.
    lower = np.maximum(table - 1, 0).astype(np.uint8)[places]
    found = lower + (part > padded[lower])
    found += part > padded[np.minimum(found, middles.size)]
    return np.asarray(found + (part > padded[np.minimum(found, middles.size)]))


def distortion(
    values: Array, centroids: Array, importance: Array | None = None
) -> float:
    """Return the squared error of values at their nearest centroids.

    Args:
        values: Finite floats of any shape.
        centroids: Ascending, at most 256.
        importance: Weight of each value's squared error, broadcast to ``values``.
    """
    _checked(values, importance)
    total = 0.0
    wide = np.asarray(centroids, np.float64)
    for part, share in _chunks(values, importance):
        missed = part - wide[assign(part, wide)]
        total += float(missed @ missed if share is None else (missed * share) @ missed)
    return total


# --- several dimensions ---------------------------------------------------------------


def fit_vectors(
    vectors: Array,
    count: int,
    *,
    importance: Array | None = None,
    zero: bool = False,
) -> Float64:
    """Return the vectors that stand for many with the least squared error found.

    Beyond 65,536 vectors, every n-th of them finds where centroids belong, and three
    iterations over all of them follow.

    Args:
        vectors: Finite floats [n, dim].
        count: Most centroids, 1 to 256.
        importance: Weight of each entry's squared error, not negative; broadcast to
            ``vectors``.
        zero: The vector of zeros is one of the centroids, and exactly zero.

    Returns:
        float64 [at most ``count``, dim], in the order of their entries.

    Raises:
        ModelError: A value is not finite, or an importance is not either or negative.
        UsageError: ``count`` or a shape is out of range.
    """
    _limit(count)
    if vectors.ndim != 2 or not vectors.size:
        raise UsageError(
            f"vectors are [n, dim] with at least one, not {list(vectors.shape)}"
        )
    _checked(vectors, importance)
    if not np.isfinite(vectors).all():
        raise ModelError("values hold NaN or infinity; they have no centroid")
    shares = None
    if importance is not None:
        shares = np.broadcast_to(importance, vectors.shape)
    step = max(1, -(-len(vectors) // _SAMPLE))
    some = vectors[::step].astype(np.float64)
    weight = None if shares is None else shares[::step].astype(np.float64)
    centroids = _split(some, weight, count, zero)
    centroids = _vector_lloyd(some, weight, centroids, zero, _VECTOR_LLOYD)
    if step > 1:
        centroids = _vector_lloyd(vectors, shares, centroids, zero, _FULL_LLOYD)
    return np.unique(centroids, axis=0)


def _split(vectors: Array, shares: Array | None, count: int, zero: bool) -> Float64:
    """Cut the cluster of the largest error in two until there are ``count``."""
    ones = np.ones(vectors.shape) if shares is None else shares
    clusters: list[tuple[float, Array, Float64]] = []
    found: list[Float64] = []
    if zero:
        found.append(np.zeros(vectors.shape[1]))
        some = np.flatnonzero(vectors.any(axis=1))
    else:
        some = np.arange(len(vectors))
    if not some.size:
        return np.asarray(found)

    def cluster(members: Array) -> tuple[float, Array, Float64]:
        own, share = vectors[members], ones[members]
        total = share.sum(axis=0)
        mean = np.divide(
            (own * share).sum(axis=0), total, out=own.mean(axis=0), where=total > 0
        )
        return float((share * (own - mean) ** 2).sum()), members, mean

    clusters.append(cluster(some))
    while len(clusters) + len(found) < count:
        worst = max(range(len(clusters)), key=lambda i: clusters[i][0])
        error, members, mean = clusters[worst]
        if error <= 0 or len(members) < 2:
            break
        apart = (vectors[members] - mean) * np.sqrt(ones[members])
        _, axes = np.linalg.eigh(apart.T @ apart)
        along = (vectors[members] - mean) @ axes[:, -1]
        right = along > 0
        if right.all() or not right.any():
            right = along > np.median(along)
        if right.all() or not right.any():
            clusters[worst] = (0.0, members, mean)
            continue
        clusters[worst] = cluster(members[~right])
        clusters.append(cluster(members[right]))
    return np.asarray([*found, *(mean for _, _, mean in clusters)])


def _vector_lloyd(
    vectors: Array,
    shares: Array | None,
    centroids: Float64,
    zero: bool,
    iterations: int,
) -> Float64:
    count, dim = centroids.shape
    held = zero & ~centroids.any(axis=1)
    last = np.inf
    for _ in range(iterations):
        sums, weight = np.zeros((dim, count)), np.zeros((dim, count))
        error = 0.0
        for rows in _row_chunks(len(vectors)):
            part = vectors[rows].astype(np.float64)
            share = None if shares is None else shares[rows].astype(np.float64)
            codes, missed = _nearest_vectors(part, centroids, share)
            error += missed
            for axis in range(dim):
                own = part[:, axis]
                if share is None:
                    if axis == 0:
                        weight += np.bincount(codes, minlength=count)
                    sums[axis] += np.bincount(codes, own, minlength=count)
                    continue
                weight[axis] += np.bincount(codes, share[:, axis], minlength=count)
                sums[axis] += np.bincount(codes, own * share[:, axis], minlength=count)
        moved = centroids.T.copy()
        np.divide(sums, weight, out=moved, where=weight > 0)
        moved = moved.T
        moved[held] = 0.0
        if np.array_equal(moved, centroids) or error >= last * (1 - 1e-5):
            return np.ascontiguousarray(moved)
        centroids, last = np.ascontiguousarray(moved), error
    return centroids


def _row_chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, 1 << 14):
        yield slice(start, start + (1 << 14))


def _nearest_vectors(
    part: Float64, centroids: Float64, shares: Float64 | None
) -> tuple[NDArray[np.intp], float]:
    """Return the nearest centroid of each vector and the sum of squared errors."""
    weighted = part if shares is None else part * shares
    scores = weighted @ (-2.0 * centroids.T)
    if shares is None:
        scores += np.einsum("kd,kd->k", centroids, centroids)
    else:
        scores += shares @ (centroids * centroids).T
    codes = scores.argmin(axis=1)
    best = scores[np.arange(len(part)), codes]
    return codes, float(best.sum() + (weighted * part).sum())


def assign_vectors(
    vectors: Array, centroids: Array, importance: Array | None = None
) -> NDArray[np.uint8]:
    """Return which centroid is nearest to each vector.

    Args:
        vectors: Finite floats [n, dim].
        centroids: [at most 256, dim].
        importance: Weight of each entry's squared error, broadcast to ``vectors``.

    Returns:
        uint8 [n].
    """
    codes = np.empty(len(vectors), np.uint8)
    shares = None
    if importance is not None:
        shares = np.broadcast_to(importance, vectors.shape)
    wide = np.asarray(centroids, np.float64)
    for rows in _row_chunks(len(vectors)):
        share = None if shares is None else shares[rows].astype(np.float64)
        part = vectors[rows].astype(np.float64)
        codes[rows] = _nearest_vectors(part, wide, share)[0]
    return codes
