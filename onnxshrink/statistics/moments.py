"""Sums and squares of channels: norms, means and variances.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics.base import (
    Array,
    Float64,
    Statistic,
    Stored,
    around,
    chunks,
    finite_places,
    gathered,
    grown,
    numeric,
    stored,
)

__all__ = ["ChannelNorm", "Mean", "Moments"]


class Norms(Stored):
    """A statistic that holds sums of squares, sums and a number of rows."""

    squares: Float64 | None
    sums: Float64 | None
    rows: int

    @property
    def _axes(self) -> int:
        """How many axes the sums have."""
        return 1

    def state(self) -> dict[str, Array]:
        """Return the sums as arrays."""
        nothing = np.zeros((0,) * self._axes)
        return {
            "squares": nothing if self.squares is None else self.squares,
            "sums": nothing if self.sums is None else self.sums,
            "rows": np.array([self.rows]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored sums."""
        squares = stored(state, "squares", "f", *(None,) * self._axes)
        sums = stored(state, "sums", "f", *squares.shape)
        rows = int(stored(state, "rows", "i", 1)[0])
        if rows < 0 or (rows > 0) > (squares.size > 0):
            raise UsageError("a stored norm contradicts itself")
        if np.any(squares < 0):
            raise UsageError("a stored norm has negative squares")
        self.rows = rows
        self.squares, self.sums = (squares, sums) if squares.size else (None, None)


@dataclass(eq=False)
class ChannelNorm(Norms):
    """Sum of squares of each channel: the activation norm of Wanda.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language
    Models", section 3: a weight's importance is ``|W_ij| * ||X_j||_2`` with the norm
    over all rows of the calibration data.

    Attributes:
        axis: Axis of the channels, -1 for the input of ``X @ W``.
        squares: float64 [channels], or ``None`` before the first batch.
        sums: float64 [channels], sum of the values.
        rows: Number of values in each channel; rows with NaN or infinity do not count.
    """

    axis: int = -1
    squares: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    @property
    def norm(self) -> Float64:
        """Euclidean norm of each channel, float64 [channels]."""
        return np.sqrt(gathered(self.squares, "a channel norm"))

    def update(self, array: Array) -> None:
        """Add one batch."""
        view = finite_places(around(numeric(array), self.axis))
        total, sums = np.zeros(view.shape[1]), np.zeros(view.shape[1])
        for piece in chunks(view):
            values = piece.astype(np.float64)
            total += np.einsum("acb,acb->c", values, values)
            sums += values.sum(axis=(0, 2))
        self.squares = grown(self.squares, total, "a channel norm") + total
        self.sums = grown(self.sums, sums, "a channel norm") + sums
        self.rows += view.shape[0] * view.shape[2]

    def _merge(self, other: ChannelNorm) -> None:
        if other.squares is not None and other.sums is not None:
            self.squares = grown(self.squares, other.squares, "a channel norm")
            self.squares = self.squares + other.squares
            self.sums = grown(self.sums, other.sums, "a channel norm") + other.sums
        self.rows += other.rows


@dataclass(eq=False)
class Moments(Statistic):
    """Count, mean and variance, of the tensor or of each channel.

    Accumulated as in Chan, Golub and LeVeque 1979 (pairwise updating), so that a mean
    far from zero costs no precision.

    Attributes:
        axis: Axis of the channels; ``None`` looks at the whole tensor.
        count: Number of values, in each channel, without rows of NaN or infinity.
        mean: float64, shape [] or [channels].
    """

    axis: int | None = None
    count: int = field(init=False, default=0)
    mean: Float64 = field(init=False, default_factory=lambda: np.zeros(()))
    _deviation: Float64 = field(init=False, default_factory=lambda: np.zeros(()))

    @property
    def variance(self) -> Float64:
        """Population variance, float64, shape [] or [channels]."""
        return self._deviation / max(self.count, 1)

    def update(self, array: Array) -> None:
        """Add one batch."""
        values = numeric(array)
        view = (
            values.reshape(1, 1, -1) if self.axis is None else around(values, self.axis)
        )
        view = finite_places(view)
        for piece in chunks(view):
            part = piece.astype(np.float64)
            mean = part.mean(axis=(0, 2))
            spread = part - mean[None, :, None]
            deviation = np.einsum("acb,acb->c", spread, spread)
            if self.axis is None:
                mean, deviation = mean[0], deviation[0]
            self._add(part.shape[0] * part.shape[2], mean, deviation)

    def _add(self, count: int, mean: Float64, deviation: Float64) -> None:
        if not count:
            return
        if self.count and np.shape(mean) != self.mean.shape:
            raise ModelError(
                f"moments saw {list(self.mean.shape)} before and "
                f"{list(np.shape(mean))} now: the number of channels changes"
            )
        total = self.count + count
        step = mean - self.mean
        between = step * step * (self.count * count / total)
        self._deviation = np.asarray(self._deviation + deviation + between)
        self.mean = np.asarray(self.mean + step * (count / total))
        self.count = total

    def _merge(self, other: Moments) -> None:
        self._add(other.count, other.mean, other._deviation)


@dataclass(eq=False)
class Mean(Moments):
    """Mean of the tensor or of each channel, summed in float64."""
