"""Which range of a tensor its codes should cover.

One statistic, ``observer()``, is fed with calibration data in a single streaming run
and holds as much after 10,000 images as after 10; ``bounds`` resolves every method from
it afterwards. ``activations.kept`` keeps what was gathered on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics import ChannelRange, Histogram, Statistic, Stored

__all__ = ["METHODS", "Observer", "bounds", "observer"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]

METHODS: tuple[Method, ...] = (
    "minmax",
    "moving-average",
    "percentile",
    "entropy",
    "mse",
)
BINS = 2048
"""Bins of an observer's histogram: at least 4 for each of 256 codes."""
POSITIONS = 1 << 16
"""Values of a sample that are counted: after 100 samples, millions."""
SMOOTHING = 1e-4
"""Share of Q in a bin that holds clipped values alone, as in onnxruntime."""
CANDIDATES = 512
"""Ranges that entropy compares at least, if there are so many bins."""


# --- observing ------------------------------------------------------------------------


@dataclass(eq=False)
class Observer(Stored):
    """What every calibration method needs to know of one tensor.

    Values that are not finite or beyond 1e30 in size (mask fills) are left out.

    Attributes:
        bins: Bins of the histogram, a power of two.
        positions: Values of one sample that are counted at most, evenly spread; its
            smallest and largest value are those of all.
        histogram: Counts; its ``low``, ``high`` and ``apart`` are those of all values.
        lows: Sum of the smallest values of each sample (entry of axis 0).
        highs: Sum of the largest.
        samples: Samples seen that have a usable value.
    """

    bins: int = BINS
    positions: int = POSITIONS
    histogram: Histogram = field(init=False)
    lows: float = field(init=False, default=0.0)
    highs: float = field(init=False, default=0.0)
    samples: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Start with an empty histogram."""
        self.histogram = Histogram(self.bins)

    @property
    def empty(self) -> bool:
        """Whether no usable value was seen."""
        return self.histogram.count == 0

    def update(self, array: Array) -> None:
        """Take in one batch; a value with fewer than two axes is one sample."""
        rows = array if array.ndim > 1 else array.reshape(1, -1)
        rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))
        each = ChannelRange(axis=0)
        each.update(rows)
        if each.low is None or each.high is None:
            return
        apart = self.histogram.apart + each.apart
        seen = each.low <= each.high
        if seen.any():
            step = _stride(rows.shape[1], self.positions)
            self.histogram.update(rows[:, ::step])
            if not self.histogram.count:
                self.histogram.update(rows)
            self.histogram.reach(float(each.low.min()), float(each.high.max()))
        self.histogram.apart = apart
        self.lows += float(each.low[seen].sum())
        self.highs += float(each.high[seen].sum())
        self.samples += int(seen.sum())

    def _merge(self, other: Observer) -> None:
        self.histogram.merge(other.histogram)
        self.lows += other.lows
        self.highs += other.highs
        self.samples += other.samples

    def state(self) -> dict[str, Array]:
        """Return what was gathered as arrays."""
        return {
            **self.histogram.state(),
            "sums": np.array([self.lows, self.highs]),
            "samples": np.array([self.samples]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over a stored state."""
        sums, samples = state.get("sums"), state.get("samples")
        if (
            sums is None
            or samples is None
            or (sums.dtype, sums.shape) != (np.dtype(np.float64), (2,))
            or (samples.dtype, samples.shape) != (np.dtype(np.int64), (1,))
            or not np.isfinite(sums).all()
        ):
            raise UsageError("a stored observer has no usable sums")
        histogram = Histogram(self.bins)
        histogram.restore(state)
        low, high = float(sums[0]), float(sums[1])
        count = int(samples[0])
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        usable = 0 <= count <= histogram.count and (count > 0) == (histogram.count > 0)
        if usable and count:
            usable = count * histogram.low <= low + slack
            usable = (
                usable and low <= high + slack <= count * histogram.high + 2 * slack
            )
        if not usable:
            raise UsageError("a stored observer contradicts itself")
        self.histogram, self.lows, self.highs = histogram, low, high
        self.samples = count


def _stride(size: int, most: int) -> int:
    """Return the step between the values that are counted.

    It does not divide the size, so that every row, column and channel is met.
    """
    step = -(-size // most)
    while math.gcd(step, size) > 1:
        step += 1
    return max(step, 1)


def observer() -> Observer:
    """Return a fresh statistic that serves every calibration method."""
    return Observer()


# --- resolving ------------------------------------------------------------------------


def bounds(
    statistic: Statistic,
    method: Method,
    *,
    levels: int = 256,
    symmetric: bool = False,
    percentile: float = 99.99,
) -> tuple[float, float]:
    """Return the range that codes should cover.

    - ``minmax``: the smallest and the largest value.
    - ``moving-average``: the means over samples of the smallest and largest value in
      each. (A running average would depend on the order of the samples.)
    - ``percentile``: cuts off ``100 - percentile`` percent of the values, half of them
      on each side, or all on one side where values have one sign.
    - ``entropy``: the range whose quantized distribution has the smallest
      Kullback-Leibler divergence from that of the values (Migacz 2017, "8-bit Inference
      with TensorRT"). Values out of the range count in its outermost bins.
    - ``mse``: the range with the smallest squared error, rounding and clipping
      together, taking values as spread evenly within each bin.

    Exact zeros, of which Relu makes many, have a code of their own in every range and
    so do not count in ``entropy`` and ``mse``. Where all values are on one side of
    zero, the other end is 0.

    Args:
        statistic: An ``observer()``, fed.
        method: See above.
        levels: Number of codes.
        symmetric: The range is ``(-x, x)``.
        percentile: For that method, above 50 and at most 100.

    Returns:
        ``low <= 0 <= high``; both 0 if there was nothing but zeros.

    Raises:
        ModelError: No usable value was seen.
        UsageError: An argument makes no sense.
    """
    if not isinstance(statistic, Observer):
        raise UsageError(f"{type(statistic).__name__} is not an observer()")
    if method not in METHODS:
        raise UsageError(
            f"no calibration method is called {method!r}; there are "
            f"{', '.join(METHODS)}"
        )
    if levels < 2:
        raise UsageError(f"there are at least 2 levels, not {levels}")
    if not 50 < percentile <= 100:
        raise UsageError(f"percentile is above 50 and at most 100, not {percentile}")
    if statistic.empty:
        raise ModelError(
            "calibration saw no finite value of this tensor; give samples that reach it"
        )
    histogram = statistic.histogram
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if method == "moving-average":
        low = min(statistic.lows / statistic.samples, 0.0)
        high = max(statistic.highs / statistic.samples, 0.0)
    elif method == "percentile":
        low, high = _percentile(histogram, percentile, symmetric)
    elif method in ("entropy", "mse") and low < high:
        bins = _Bins.of(histogram)
        resolve = _entropy if method == "entropy" else _mse
        found = resolve(bins, levels, symmetric)
        low, high = max(low, found[0]), min(high, found[1])
        if symmetric:
            high = min(found[1], max(histogram.high, -histogram.low))
            low = -high
    if symmetric:
        high = max(high, -low)
        low = -high
    return float(low), float(high)


def _percentile(
    histogram: Histogram, percentile: float, symmetric: bool
) -> tuple[float, float]:
    cut = 1 - percentile / 100
    if symmetric:
        bins = _Bins.of(histogram, zeros=True).folded()
        below = np.concatenate([[0.0], np.cumsum(bins.counts)])
        at = float(np.interp((1 - cut) * below[-1], below, bins.edges))
        at = min(at, max(histogram.high, -histogram.low))
        return -at, at
    if histogram.low < 0 < histogram.high:
        cut /= 2
    low = min(histogram.quantile(cut), 0.0) if histogram.low < 0 else 0.0
    high = max(histogram.quantile(1 - cut), 0.0) if histogram.high > 0 else 0.0
    return low, high


@dataclass(frozen=True, eq=False)
class _Bins:
    """A histogram whose bins reach to zero.

    Attributes:
        counts: float64 [n].
        first: Edge ``i`` is ``(first + i) * width``; ``first <= 0 <= first + n``.
        width: Width of a bin.
    """

    counts: Float64
    first: int
    width: float

    @classmethod
    def of(cls, histogram: Histogram, zeros: bool = False) -> _Bins:
        """Take the bins of a histogram, with or without exact zeros.

        Values far from zero have bins too narrow to reach there: neighbours are then
        added up, until the number is bounded again.
        """
        counts = histogram.counts.astype(np.float64)
        width, first = histogram.width, round(histogram.edges[0] / histogram.width)
        if not zeros and first <= 0 < first + len(counts):
            counts[-first] -= histogram.zeros
        while max(first + len(counts), 0) - min(first, 0) > 2 * histogram.bins:
            odd = first % 2
            padded = np.concatenate([np.zeros(odd), counts])
            padded = np.concatenate([padded, np.zeros(len(padded) % 2)])
            counts = padded.reshape(-1, 2).sum(axis=1)
            first, width = (first - odd) // 2, 2 * width
        before, after = max(first, 0), max(-(first + len(counts)), 0)
        counts = np.concatenate([np.zeros(before), counts, np.zeros(after)])
        return cls(counts, first - before, width)

    @property
    def edges(self) -> Float64:
        """Edges, float64 [n + 1]."""
        places = self.first + np.arange(len(self.counts) + 1, dtype=np.float64)
        return places * self.width

    def folded(self) -> _Bins:
        """Return the distribution of sizes: the negative side laid on the positive."""
        negative = self.counts[: -self.first][::-1] if self.first else self.counts[:0]
        positive = self.counts[-self.first :]
        total = np.zeros(max(len(negative), len(positive)))
        total[: len(negative)] += negative
        total[: len(positive)] += positive
        return _Bins(total, 0, self.width)


# --- entropy --------------------------------------------------------------------------


def _entropy(bins: _Bins, levels: int, symmetric: bool) -> tuple[float, float]:
    """Search the size beyond which values are clipped.

    A symmetric range spends half its levels on each side, so the sizes are quantized.
    """
    if symmetric:
        bins, levels = bins.folded(), max(2, levels // 2)
    counts, zero = bins.counts, -bins.first
    most = max(zero, len(counts) - zero)
    sizes = np.arange(most, 0, -max(1, most // CANDIDATES))[::-1]
    starts = np.maximum(zero - sizes, 0)
    stops = np.minimum(zero + sizes, len(counts))
    wide = stops - starts >= levels
    low, high = starts[0], stops[-1]
    low = starts[-1]
    if wide.any() and counts.sum() > 0:
        losses = _divergence(counts, starts[wide], stops[wide], levels)
        # Of equals the widest: it clips least.
        best = len(losses) - 1 - int(np.argmin(losses[::-1]))
        if np.isfinite(losses[best]):
            low, high = starts[wide][best], stops[wide][best]
    near, far = ((int(at) + bins.first) * bins.width for at in (low, high))
    return (-far, far) if symmetric else (near, far)


def _divergence(
    counts: Float64,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    levels: int,
) -> Float64:
    """KL divergence of each candidate range [start, stop) of bins.

    With ``P`` the counts of the range, those outside added to its outermost bins, and
    ``Q`` the counts inside, summed over the bins of a level and shared out evenly among
    those bins of it that are not empty in ``P``:
    ``KL = sum(P log P) - sum over levels of P_level log(Q_level / support_level)``,
    which cumulative sums give for all candidates at once.
    """
    total = counts.sum()
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    support = np.concatenate([[0], np.cumsum(counts > 0)])
    plogp = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    below, above = sums[starts], total - sums[stops]
    first, last = counts[starts], counts[stops - 1]
    entropy = plogp[stops] - plogp[starts]
    entropy += _xlogx(first + below) - _xlogx(first)
    entropy += _xlogx(last + above) - _xlogx(last)
    width = (stops - starts)[:, None]
    cuts = starts[:, None] + np.arange(levels + 1) * width // levels
    inside = np.diff(sums[cuts], axis=1)
    filled = np.diff(support[cuts], axis=1).astype(np.float64)
    outside = inside.copy()
    held = inside.sum(axis=1)
    for edge, added, bin_ in ((0, below, first), (-1, above, last)):
        outside[:, edge] += added
        filled[:, edge] += (added > 0) & (bin_ == 0)
        bare = (added > 0) & (inside[:, edge] == 0)
        inside[:, edge] = np.where(bare, SMOOTHING * held, inside[:, edge])
    held = inside.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(inside / np.maximum(filled, 1.0))
        crossed = np.where(outside > 0, outside * share, 0.0).sum(axis=1)
        # Both are normalised: P to the whole count, Q to what the range holds.
        found = (entropy - crossed) / total + np.log(held / total)
    return np.where(held > 0, found, np.inf)


def _xlogx(values: Float64) -> Float64:
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)))


# --- squared error --------------------------------------------------------------------


def _mse(bins: _Bins, levels: int, symmetric: bool) -> tuple[float, float]:
    """Search one size for both ends, then each end by itself."""
    if symmetric:
        bins = bins.folded()
    last = float(bins.edges[-1])
    first = -last if symmetric else float(bins.edges[0])
    size = max(-first, last)

    def try_all(low: Float64, high: Float64) -> tuple[float, float]:
        lows, highs = np.broadcast_arrays(np.maximum(low, first), high)
        highs = np.minimum(highs, last)
        losses = _squared(bins, lows, highs, levels, symmetric)
        best = int(np.argmin(losses))
        return float(lows[best]), float(highs[best])

    low, high = try_all(-size * _SHARES, size * _SHARES)
    for fine in (4.0, 1.0, 0.2):
        factors = _STEPS**fine
        if symmetric:
            low, high = try_all(-high * factors, high * factors)
            continue
        if high > 0:
            low, high = try_all(np.array(low), high * factors)
        if low < 0:
            low, high = try_all(low * factors, np.array(high))
    return low, high


_SHARES = np.exp2(-np.arange(41) / 5.0)
"""Shares of the largest size that are tried first: down to 1/256."""
_STEPS = np.exp2(np.array([0.0, *np.linspace(-0.25, 0.25, 10)]))
"""Factors tried around the best so far, itself first."""


def _squared(
    bins: _Bins, lows: Float64, highs: Float64, levels: int, symmetric: bool
) -> Float64:
    """Squared error of each candidate range, [candidates].

    The error of a value is integrated over each bin in closed form: with ``k`` the
    nearest code and ``r`` the distance from it, the integral from 0 is
    ``k s^3 / 12 + r^3 / 3`` inside the range and grows by cubes beyond it.
    """
    if symmetric:
        # As many codes on each side of zero: 127 of 256.
        top = np.full_like(highs, max((levels - 1) // 2, 1))
        bottom, steps = -top, highs / top
    else:
        steps = (highs - lows) / (levels - 1)
        steps = np.where(steps > 0, steps, 1.0)
        zeros = np.clip(np.rint(-lows / steps), 0, levels - 1)
        bottom, top = -zeros, levels - 1 - zeros
    edges, weights = bins.edges, bins.counts / bins.width
    losses = np.empty(len(steps))
    for index, step in enumerate(steps):
        integral = _integral(edges, step, bottom[index], top[index])
        losses[index] = np.diff(integral) @ weights
    return losses


def _integral(values: Float64, step: float, bottom: float, top: float) -> Float64:
    """Integral from 0 of the squared error, clipped to codes [bottom, top]."""
    rest = values * (1.0 / step)
    code = np.rint(rest)
    np.maximum(code, bottom, out=code)
    np.minimum(code, top, out=code)
    rest -= code
    found = rest * rest
    found *= rest
    found *= 4.0
    found += code
    found *= step**3 / 12.0
    return np.asarray(found)
