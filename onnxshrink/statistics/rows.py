"""A bounded sample of the rows of a tensor.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics.base import (
    Array,
    Float64,
    Statistic,
    around,
    finite_rows,
)

__all__ = ["Sample"]


@dataclass(eq=False)
class Sample(Statistic):
    """A seeded random choice of rows, each as likely as any other.

    Every row draws a number; the rows with the largest numbers stay (Vitter 1985's
    reservoir, in the form with priorities). Rows keep the order in which they came.

    Attributes:
        size: Rows kept at most.
        axis: Axis of the channels; every other axis counts as rows.
        seed: Seed of the draws.
        rows: Rows seen, those with NaN or infinity left out.
    """

    size: int = 256
    axis: int = -1
    seed: int = 0
    rows: int = field(init=False, default=0)
    _kept: Array | None = field(init=False, default=None)
    _priority: Float64 = field(init=False, default_factory=lambda: np.zeros(0))
    _draws: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Start the stream of draws."""
        if self.size < 1:
            raise UsageError(f"a sample keeps at least 1 row, not {self.size}")
        self._draws = np.random.default_rng(self.seed)

    @property
    def values(self) -> Array:
        """The chosen rows, [at most size, channels], in the dtype they came in."""
        if self._kept is None:
            raise UsageError("a sample was read before it was fed")
        return self._kept

    def update(self, array: Array) -> None:
        """Offer the rows of one batch."""
        view = around(array, self.axis)
        rows = np.moveaxis(view, 1, 2).reshape(-1, view.shape[1])
        rows = finite_rows(rows) if rows.dtype.kind == "f" else rows
        self.rows += len(rows)
        self._offer(rows, self._draws.random(len(rows)))

    def _offer(self, rows: Array, priority: Float64) -> None:
        if self._kept is None:
            self._kept = rows[:0].copy()
        elif self._kept.shape[1] != rows.shape[1]:
            raise ModelError(
                f"a sample saw {self._kept.shape[1]} channels before and "
                f"{rows.shape[1]} now"
            )
        everything = np.concatenate([self._priority, priority])
        best = np.sort(np.argsort(-everything, kind="stable")[: self.size])
        old = best[best < len(self._priority)]
        new = best[best >= len(self._priority)] - len(self._priority)
        self._kept = np.concatenate([self._kept[old], rows[new]])
        self._priority = everything[best]

    def _merge(self, other: Sample) -> None:
        if other._kept is not None:
            self._offer(other._kept, other._priority)
        self.rows += other.rows
