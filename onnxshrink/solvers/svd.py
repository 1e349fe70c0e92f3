"""Low-rank factors of a matrix: truncated SVD, plain and in the metric of data.

Arrays in, arrays out. ``split`` takes a layer's matrix ``W`` [outputs, inputs] and
finds, for every rank at once, the ``W_r`` that minimises

    ``E |F^(1/2) (W - W_r) x|^2``

over inputs ``x`` with second moment ``S`` (plain SVD where neither metric is given).
Whitening by ``S`` is the truncation-aware whitening of SVD-LLM (Wang et al. 2024,
section 3.1; 2025, "SVD-LLM V2", section 3.2). The smaller side of ``W`` decides how:

- no more outputs than inputs: the eigenvectors ``U`` of ``W S W^T`` are the principal
  directions of the outputs, and ``W_r = U_r (U_r^T W)``. Nothing is inverted, so inputs
  that are dead or depend on each other do no harm.
- more outputs: with a Cholesky factor ``S = L L^T`` and the eigenvectors ``V`` of
  ``L^T W^T F W L``, ``W_r = (W L V_r) (V_r^T L^-1)``. ``S`` is damped first.

No singular value is ever divided by, so full rank gives ``W`` back to float64 noise
however badly it is conditioned. The Gram matrix that is decomposed squares condition
numbers: directions below 1e-8 of the largest come in no particular order, with a
squared error below 1e-16 of the whole. ``truncated``, which promises orthonormal
factors, checks them and falls back to LAPACK's gesdd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, eigh, lapack, solve_triangular

from onnxshrink.errors import ModelError

__all__ = ["DAMPING", "Split", "balanced", "moment", "split", "truncated"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

DAMPING = 1e-3
"""Share of the mean diagonal of a second moment that is added to its diagonal."""
_ORTHONORMAL = 1e-8
_EVD = 2048
"""Order up to which all eigenvectors are found by divide and conquer."""
_ROWS = 512
"""Rows of a matrix that are held in float64 at a time."""


@dataclass(frozen=True, eq=False)
class Split:
    """Low-rank factors of one matrix, of every rank up to that of ``basis``.

    Attributes:
        side: Which side of the matrix ``basis`` stands on.
        basis: float64 [outputs, ranks] or [inputs, ranks], the best direction first.
        dual: The same shape; ``dual^T basis`` is the identity.
        energies: What each direction holds of ``E |F^(1/2) W x|^2``, float64 [ranks],
            falling.
        total: All of it.
    """

    side: Literal["outputs", "inputs"]
    basis: Float64
    dual: Float64
    energies: Float64
    total: float

    @property
    def ranks(self) -> int:
        """The largest rank there are factors of."""
        return int(self.basis.shape[1])

    def lost(self, rank: int) -> float:
        """Return the energy that factors of a rank do not hold."""
        return max(0.0, self.total - float(self.energies[:rank].sum()))

    def factors(self, matrix: Array, rank: int) -> tuple[Float64, Float64]:
        """Return ``left`` [outputs, rank] and ``right`` [rank, inputs], balanced.

        Args:
            matrix: The matrix that was split, [outputs, inputs].
            rank: From 1 to ``ranks``.
        """
        basis, dual = self.basis[:, :rank], self.dual[:, :rank]
        if self.side == "outputs":
            return balanced(basis, _product(matrix.T, dual).T)
        return balanced(_product(matrix, basis), dual.T)


def split(
    matrix: Array,
    *,
    inputs: Array | None = None,
    outputs: Array | None = None,
    rank: int | None = None,
    damping: float = DAMPING,
) -> Split:
    """Find the best factors of every rank.

    Besides what is given this holds at most three float64 matrices of the order of the
    smaller side, and one of the order of the other if that has a metric; two more where
    the smaller side is of order 2,048 or less.

    Args:
        matrix: ``W``, floats [outputs, inputs].
        inputs: Second moment ``S`` of the inputs, [inputs, inputs] or its diagonal
            [inputs]; ``None`` is the identity.
        outputs: ``F``, what an error of the outputs weighs: [outputs, outputs] or its
            diagonal [outputs]; ``None`` is the identity.
        rank: Largest rank needed; ``None`` finds all of them.
        damping: Share of the mean diagonal of either metric added to its diagonal.

    Raises:
        ModelError: The matrix or a metric holds NaN or infinity, or overflows float64.
    """
    for what, array in (("matrix", matrix), ("inputs", inputs), ("outputs", outputs)):
        if array is not None and not _is_finite(array):
            raise ModelError(f"cannot be split: its {what} holds NaN or infinity")
    if matrix.shape[0] <= matrix.shape[1]:
        return _on_side("outputs", matrix.T, inputs, outputs, rank, damping)
    return _on_side("inputs", matrix, outputs, inputs, rank, damping)


def _on_side(
    side: Literal["outputs", "inputs"],
    matrix: Array,
    across: Array | None,
    along: Array | None,
    rank: int | None,
    damping: float,
) -> Split:
    """Decompose ``L^T A^T M A L`` with ``L L^T`` the metric of the columns of ``A``.

    Each array takes the place of the one before it; a large one is never held twice.

    Args:
        side: Which side of the layer's matrix the columns of ``matrix`` are.
        matrix: ``A``.
        across: ``M``, the metric of its rows, not damped yet.
        along: The metric of its columns, not damped yet.
        rank: As for ``split``.
        damping: As for ``split``.
    """
    moments = _congruent(matrix, None if across is None else _damped(across, damping))
    if along is None:
        vectors, values, total = _leading(moments, rank)
        return Split(side, vectors, vectors, values, total)
    if along.ndim == 1:
        root = np.sqrt(_damped(along, damping))
        moments *= root
        moments *= root[:, None]
        vectors, values, total = _leading(moments, rank)
        upon, under = vectors * root[:, None], vectors / root[:, None]
    else:
        factor = _cholesky(_damped(along, damping))
        moments = blas.dtrmm(1.0, factor, moments, side=1, lower=1, overwrite_b=1)
        moments = blas.dtrmm(1.0, factor, moments, lower=1, trans_a=1, overwrite_b=1)
        vectors, values, total = _leading(moments, rank)
        del moments
        under = solve_triangular(
            factor, vectors, lower=True, trans="T", check_finite=False
        )
        upon = blas.dtrmm(1.0, factor, vectors, lower=1, overwrite_b=1)
    # W L V V^T L^-1 where inputs are whitened, L^-T U U^T L^T W where outputs are.
    basis, dual = (upon, under) if side == "inputs" else (under, upon)
    return Split(side, np.asarray(basis), np.asarray(dual), values, total)


def _leading(matrix: Float64, rank: int | None) -> tuple[Float64, Float64, float]:
    """Return the leading eigenvectors, eigenvalues and the trace; ``matrix`` is lost.

    Signs are fixed: the largest entry of each eigenvector is positive.
    """
    order = len(matrix)
    total = float(np.trace(matrix))
    if not np.isfinite(total):
        raise ModelError("cannot be split: products of its values overflow")
    is_whole = rank is None or rank >= order
    values, vectors = eigh(
        matrix,
        overwrite_a=True,
        check_finite=False,
        # evd is a little faster and works in two matrices more.
        driver="evd" if is_whole and order <= _EVD else "evr",
        subset_by_index=None if is_whole else [order - (rank or 0), order - 1],
    )
    count = vectors.shape[1]
    for at in range(count // 2):
        vectors[:, [at, count - 1 - at]] = vectors[:, [count - 1 - at, at]]
    for at in range(count):
        column = vectors[:, at]
        if column[np.abs(column).argmax()] < 0:
            np.negative(column, out=column)
    return vectors, np.maximum(values[::-1], 0.0), max(total, 0.0)


def truncated(matrix: Array, rank: int) -> tuple[Float64, Float64, Float64]:
    """Return ``u`` [m, rank], ``s`` [rank] and ``vt`` [rank, n] of the truncated SVD.

    By the leading eigenvectors of the Gram matrix of the smaller side: far cheaper
    than a full SVD where few are wanted. Where that costs orthonormality, as it does
    below about 1e-7 of the largest singular value, LAPACK's gesdd is used instead.

    Args:
        matrix: Floats [m, n].
        rank: From 1 to ``min(m, n)``.

    Raises:
        ModelError: The matrix holds NaN or infinity, or overflows float64.
    """
    if not _is_finite(matrix):
        raise ModelError("has no SVD: it holds NaN or infinity")
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = truncated(matrix.T, rank)
        return vt.T, s, u.T
    vectors, _, _ = _leading(_congruent(matrix, None), rank)
    u = _product(matrix, vectors)
    s = np.linalg.norm(u, axis=0)
    if s.size and s.min() > 0 and (np.diff(s) <= 0).all():
        u /= s
        if np.abs(u.T @ u - np.eye(rank)).max() < _ORTHONORMAL:
            return u, s, vectors.T
    u, s, vt, failed = lapack.dgesdd(matrix.astype(np.float64), full_matrices=0)
    if failed:
        raise ModelError("has no SVD: LAPACK's gesdd does not converge on it")
    return u[:, :rank], s[:rank], vt[:rank]


def balanced(left: Array, right: Array) -> tuple[Float64, Float64]:
    """Scale each pair of a column and a row so that both have the same norm.

    The product stays. Values then fit half precision if the matrix did, and gradients
    of both factors are of one size.

    Args:
        left: [outputs, rank].
        right: [rank, inputs].
    """
    tall, wide = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    usable = (tall > 0) & (wide > 0)
    scale = np.ones(tall.shape)
    scale[usable] = np.sqrt(wide[usable] / tall[usable])
    return left * scale, right / scale[:, None]


def moment(gram: Array, mean: Array, rows: int, *, centred: bool) -> Float64:
    """Return the second moment of inputs, about their mean if ``centred``.

    Args:
        gram: ``X^T X``, [..., inputs, inputs].
        mean: Mean of the rows of ``X``, [..., inputs].
        rows: How many rows ``X`` has.
        centred: Whether a bias takes up what the factors lose of the mean.
    """
    found = np.asarray(gram, np.float64) / max(rows, 1)
    if centred:
        found = found - mean[..., :, None] * mean[..., None, :]
    return np.asarray(found)


def _is_finite(array: Array) -> bool:
    step = max(1, (1 << 22) // max(1, array[:1].size))
    return all(
        bool(np.isfinite(array[start : start + step].astype(np.float64)).all())
        for start in range(0, len(array), step)
    )


def _damped(metric: Array, share: float) -> Float64:
    """Return a positive metric: a share of its mean diagonal added to its diagonal."""
    wide = np.array(metric, np.float64, order="F")
    diagonal = wide if wide.ndim == 1 else np.einsum("ii->i", wide)
    mean = max(float(diagonal.mean()), 0.0) if diagonal.size else 0.0
    diagonal += share * mean if mean > 0 else 1.0
    if wide.ndim == 1:
        np.maximum(wide, 1e-12 * mean, out=wide)
    return wide


def _cholesky(metric: Float64) -> Float64:
    """Return the lower Cholesky factor, with as much damping as it takes."""
    mean = float(np.trace(metric)) / len(metric)
    extra = 1e-10 * mean
    while True:
        factor, failed = lapack.dpotrf(metric, lower=1, clean=1)
        if not failed:
            return np.asarray(factor)
        np.einsum("ii->i", metric)[:] += extra
        extra *= 10


def _congruent(matrix: Array, metric: Float64 | None) -> Float64:
    """Return ``A^T M A`` of [rows, columns], in pieces of few rows.

    Args:
        matrix: ``A``.
        metric: ``M`` [rows, rows] or its diagonal [rows]; ``None`` is the identity.
    """
    rows, columns = matrix.shape
    total = np.zeros((columns, columns), order="F")
    if metric is not None and metric.ndim == 2:
        # By columns of M, each needs all of A: A^T (M A), symmetric up to rounding.
        for start in range(0, columns, _ROWS):
            block = slice(start, start + _ROWS)
            piece = metric @ matrix[:, block].astype(np.float64)
            for at in range(0, rows, _ROWS):
                part = matrix[at : at + _ROWS].astype(np.float64)
                total[:, block] += part.T @ piece[at : at + _ROWS]
    else:
        for start in range(0, rows, _ROWS):
            piece = matrix[start : start + _ROWS].astype(np.float64)
            if metric is not None:
                piece *= np.sqrt(metric[start : start + _ROWS])[:, None]
            total = blas.dsyrk(
                1.0, np.ascontiguousarray(piece).T, 1.0, total, overwrite_c=1
            )
        # Only the upper triangle was filled.
        for start in range(0, columns, _ROWS):
            block = slice(start, min(start + _ROWS, columns))
            corner = np.triu(total[block, block])
            total[block, block] = corner + np.triu(corner, 1).T
            total[block.stop :, block] = total[block, block.stop :].T
    return total


def _product(matrix: Array, other: Float64) -> Float64:
    """Return ``matrix @ other`` in float64, in pieces of few rows."""
    found = np.empty((matrix.shape[0], other.shape[1]))
    for start in range(0, matrix.shape[0], _ROWS):
        piece = matrix[start : start + _ROWS].astype(np.float64)
        np.matmul(piece, other, out=found[start : start + _ROWS])
    return found
