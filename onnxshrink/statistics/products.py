"""Gram matrices of the rows of a tensor.

Tested in tests/statistics/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.statistics import base
from onnxshrink.statistics.base import (
    Array,
    Float64,
    Stored,
    around,
    finite_rows,
    grown,
    numeric,
    stored,
)

__all__ = ["Gram"]


class Products(Stored):
    """A statistic that holds ``X^T X``, sums and a number of rows."""

    matrix: Float64 | None
    sums: Float64 | None
    rows: int
    _stacked: ClassVar[bool] = False

    def state(self) -> dict[str, Array]:
        """Return the sums as arrays."""
        axes = 3 if self._stacked else 2
        return {
            "matrix": np.zeros((0,) * axes) if self.matrix is None else self.matrix,
            "sums": np.zeros((0,) * (axes - 1)) if self.sums is None else self.sums,
            "rows": np.array([self.rows]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over stored sums."""
        matrix = stored(state, "matrix", "f", *(None,) * (3 if self._stacked else 2))
        size = matrix.shape[-1]
        sums = stored(state, "sums", "f", *matrix.shape[:-1])
        rows = int(stored(state, "rows", "i", 1)[0])
        usable = rows >= 0 and (rows > 0) <= (matrix.size > 0)
        if matrix.shape[-2] != size or not usable:
            raise UsageError("a stored Gram matrix contradicts itself")
        if np.any(np.einsum("...ii->...i", matrix) < 0):
            raise UsageError("a stored Gram matrix has negative squares")
        self.rows = rows
        self.matrix, self.sums = (matrix, sums) if matrix.size else (None, None)


@dataclass(eq=False)
class Gram(Products):
    """``X^T X`` over all rows of a tensor, for layer-wise least squares.

    Rows with NaN or infinity are left out.

    This is the Hessian of the layer-wise error up to a factor (Frantar and Alistarh
    2023, SparseGPT, section 3; Frantar et al. 2023, GPTQ). It is not damped.

    Products are made in float32 over at most 4,096 rows and summed in float64, or in
    float64 throughout with ``exact``.

    Attributes:
        axis: Axis of the channels; every other axis counts as rows.
        exact: Multiply in float64, at half the speed.
        limit_bytes: A larger matrix is refused.
        matrix: float64 [channels, channels], or ``None`` before the first batch.
        sums: float64 [channels], sum of the rows.
        rows: Number of rows.
    """

    axis: int = -1
    exact: bool = False
    limit_bytes: int = 1 << 31
    matrix: Float64 | None = field(init=False, default=None)
    sums: Float64 | None = field(init=False, default=None)
    rows: int = field(init=False, default=0)

    def update(self, array: Array) -> None:
        """Add one batch."""
        view = around(numeric(array), self.axis)
        channels = view.shape[1]
        refuse_large((channels, channels), self.limit_bytes)
        rows = finite_rows(np.moveaxis(view, 1, 2).reshape(-1, channels))
        sums = rows.sum(axis=0, dtype=np.float64)
        self.sums = grown(self.sums, sums, "a Gram matrix") + sums
        if self.matrix is None:
            self.matrix = np.zeros((channels, channels))
        step = max(1, min(4096, base.CHUNK // max(channels, 1)))
        for start in range(0, len(rows), step):
            self.matrix += product(rows[start : start + step], self.exact)
        self.rows += len(rows)

    def _merge(self, other: Gram) -> None:
        if other.matrix is not None and other.sums is not None:
            self.matrix = grown(self.matrix, other.matrix, "a Gram matrix")
            self.matrix += other.matrix
            self.sums = grown(self.sums, other.sums, "a Gram matrix") + other.sums
        self.rows += other.rows


def refuse_large(shape: tuple[int, ...], limit: int) -> None:
    """Raise where a float64 accumulator of this shape is larger than the limit."""
    if math.prod(shape) * 8 > limit:
        raise ModelError(
            f"a Gram matrix of shape {list(shape)} needs {math.prod(shape) * 8:,} "
            f"bytes, more than the limit of {limit:,}: use channel norms instead"
        )


def product(rows: Array, exact: bool) -> Array:
    """Return ``X^T X`` of [..., rows, channels], in float64 if asked for or needed."""
    if not exact:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = rows.astype(np.float32, copy=False)
            product = np.swapaxes(narrow, -1, -2) @ narrow
        # Squares of values beyond 1e19 do not fit float32.
        if np.isfinite(product).all():
            return product
    wide = rows.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.swapaxes(wide, -1, -2) @ wide)
