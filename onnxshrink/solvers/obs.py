"""Optimal Brain Surgeon, layer by layer: which weights to remove, and what stays.

A layer's weights ``W`` [outputs, inputs] are changed to ``V`` so that its outputs on
calibration data move least: the error is ``sum_r (w_r - v_r)^T H (w_r - v_r)`` with
``H = X^T X`` (damped). Removing entry ``p`` of a row and letting the others of that row
make up for it costs ``w_p^2 / [H^-1]_pp`` (Hassibi and Stork 1993; layer-wise: Dong et
al. 2017; Frantar, Singh and Alistarh 2022, "Optimal Brain Compression", section 4).

- ``removal_order`` removes entries greedily, over all rows at once and in rounds. After
  each round it recomputes exactly, for each row, ``H^-1`` over the entries that stay
  and their best values. As long as that would take too long, it takes rounds of
  SparseGPT instead.
- ``sparsegpt`` is that method (Frantar and Alistarh 2023, algorithm 1 and section 3.4):
  columns from left to right, one inverse for all rows, updates of what lies right of
  the column only.
- ``refit`` finds the best values of the entries that stay, exactly or by conjugate
  gradients. ``remove_entries`` does so in the type of the weights, and shifts the bias.

The order of removal does not depend on how many entries will go. A layer is therefore
studied once, by ``removal_order``, and every sparsity is read off: the entries whose
rank is below a number go, and ``remove_entries`` gives the others their values.

Everything is float64, on one BLAS thread, and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from onnxshrink.solvers.magnitude import Pattern
from onnxshrink.solvers.threads import one_thread

__all__ = [
    "Curvature",
    "Removal",
    "allocate",
    "pattern_mask",
    "place_bits",
    "refit",
    "removal_order",
    "remove_entries",
    "sparsegpt",
]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in SparseGPT."""
EXACT_WORK = 1.5e9
"""Multiplications a round of exact removal may take: a good part of a second."""
EXACT_INPUTS = 512
"""Rows with more entries left than this are refitted by conjugate gradients."""
ROUND = 0.8
"""Share of the entries that an exact round keeps; small layers take finer rounds."""
FINE_ROUND = 0.9
FINE_WORK = EXACT_WORK / 20
FAST_ROUND = 0.7
"""Share of the entries that a round of SparseGPT keeps."""
COLUMNS = 128
"""Columns of a block of SparseGPT."""
SWEEPS = 30
"""Steps of conjugate gradients."""
VALUE_BITS = 3.0
"""What the value of an entry that stays takes, in a coder of few shared values."""
FEW_SWEEPS = 8
"""The same between rounds, where only the order depends on them."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """How much a change of a layer's weights changes its outputs: ``H`` by group.

    Attributes:
        matrix: Damped ``H``, float64 [groups, inputs, inputs].
        dead: Inputs that were zero in all data, bool [groups, inputs].
    """

    matrix: Array
    dead: Mask

    @classmethod
    @one_thread
    def of(cls, gram: Array, mean: Array | None, rows: int) -> Curvature:
        """Damp a Gram matrix.

        Args:
            gram: ``X^T X``, [groups, inputs, inputs].
            mean: Mean input [groups, inputs] of a layer whose bias may be shifted: the
                error is then taken around the mean. ``None`` if no bias may.
            rows: Rows of ``X``.
        """
        matrix = gram / max(rows, 1)
        diagonal = np.diagonal(matrix, axis1=1, axis2=2)
        largest = diagonal.max(axis=1, initial=0.0, keepdims=True)
        dead = diagonal <= 1e-12 * largest
        if mean is not None:
            matrix = matrix - mean[:, :, None] * mean[:, None, :]
        diagonal = np.einsum("gii->gi", matrix)
        live = np.maximum((~dead).sum(axis=1), 1)
        damping = DAMPING * np.where(dead, 0.0, diagonal).sum(axis=1) / live
        diagonal += np.where(damping > 0, damping, 1.0)[:, None]
        for part, top in zip(matrix, largest[:, 0] / max(rows, 1), strict=True):
            _make_definite(part, float(top))
        return cls(matrix, dead)

    def inverse(self, group: int) -> Array:
        """Return ``H^-1`` of one group."""
        factor, _ = lapack.dpotrf(self.matrix[group], lower=1)
        inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
        return np.asarray(np.tril(inverse) + np.tril(inverse, -1).T)


def _make_definite(matrix: Array, largest: float) -> None:
    """Raise the diagonal until there is a Cholesky factor.

    If the mean is far larger than the variation around it, subtracting it leaves
    nothing but rounding errors.
    """
    extra = 1e-8 * largest
    while lapack.dpotrf(matrix, lower=1)[1]:
        np.einsum("ii->i", matrix)[:] += extra
        extra *= 10


@dataclass(frozen=True, eq=False)
class Removal:
    """The order in which a layer's entries, or blocks of them, go.

    Attributes:
        rank: int32 [groups, outputs, inputs], or of the blocks: 0 goes first.
        zeros: Number of entries removed at each point that was measured, ascending.
        errors: Output error at these points, as a share of the outputs' energy.
    """

    rank: NDArray[np.int32]
    zeros: NDArray[np.int64]
    errors: Array


class _RemovalRounds:
    """Builds the order of removal, round by round."""

    def __init__(self, keep: Mask) -> None:
        self.keep = keep
        self.rank = np.full(keep.size, keep.size, np.int32)
        self.gone = 0
        self.zeros: list[int] = []
        self.errors: list[float] = []

    def take(self, chosen: NDArray[np.intp], scores: Array) -> None:
        """Remove the entries at these flat indices, the lowest score first."""
        ordered = chosen[np.argsort(scores.reshape(-1)[chosen], kind="stable")]
        self.rank[ordered] = np.arange(self.gone, self.gone + len(ordered))
        self.keep.reshape(-1)[ordered] = False
        self.gone += len(ordered)

    def point(self, error: float) -> None:
        """Record the error at this point; errors never fall along the way."""
        last = self.errors[-1] if self.errors else 0.0
        self.zeros.append(self.gone)
        self.errors.append(min(max(error, last), 1.0))

    def removal(self, shape: tuple[int, ...]) -> Removal:
        """Return the order; entries that no round removed come last, together."""
        rest = np.flatnonzero(self.rank == self.keep.size)
        self.rank[rest] = np.arange(self.gone, self.gone + len(rest))
        if len(rest):
            self.zeros.append(self.keep.size)
            self.errors.append(1.0)
        return Removal(
            self.rank.reshape(shape), np.asarray(self.zeros), np.asarray(self.errors)
        )


@one_thread
def removal_order(
    weights: Array,
    curvature: Curvature,
    blocks: Pattern | None = None,
    *,
    by_bits: bool = False,
) -> Removal:
    """Return in which order the entries of a layer should go.

    Entries that are zero already, or multiply an input that always is, go first.

    Args:
        weights: float64 [groups, outputs, inputs].
        curvature: Of the layer.
        blocks: Whole blocks go, if given.
        by_bits: In exact rounds, an entry's cost is divided by the bits that it takes
            (``place_bits``): what costs least for a bit that is saved goes first, the
            rate term of rate-distortion pruning (CERWU: Conzelmann and Bamler 2025).
    """
    if blocks is not None:
        return _block_order(weights, curvature, blocks)
    return _entry_order(weights, curvature, by_bits)


def place_bits(keep: Mask) -> Array:
    """Return about the bits that a coder needs for each entry that stays.

    The place costs what it is surprising by the densities of its row and column; the
    value costs ``VALUE_BITS``.

    Args:
        keep: Which entries stay, [groups, outputs, inputs].
    """
    rows = keep.mean(axis=2, keepdims=True)
    columns = keep.mean(axis=(0, 1), keepdims=True)
    density = rows * columns / max(float(keep.mean()), 1e-12)
    bits: Array = VALUE_BITS - np.log2(np.clip(density, 2.0**-14, 1.0))
    return bits


def _entry_order(weights: Array, curvature: Curvature, by_bits: bool) -> Removal:
    groups, outputs, inputs = weights.shape
    targets = weights @ curvature.matrix
    energy = float((weights * targets).sum()) or 1.0
    order = _RemovalRounds(np.ones(weights.shape, np.bool_))
    order.take(np.flatnonzero(weights == 0), np.zeros(weights.shape))
    order.point(0.0)
    dead = order.keep & curvature.dead[:, None, :]
    order.take(np.flatnonzero(dead), np.square(weights))
    order.point(0.0)

    work = groups * outputs * inputs**3
    start = int(weights.size * min(1.0, (EXACT_WORK / work) ** (1 / 3)))
    left = weights.size - order.gone
    now = weights * order.keep
    inverses: list[Array] = []
    while left > max(start, 1) / ROUND:
        inverses = inverses or [_factor(curvature, g) for g in range(groups)]
        left = max(start, int(left * FAST_ROUND))
        quota = weights.size - left
        mask, scores = _fast_round(now, inverses, order.keep, quota)
        now = _conjugate(targets, curvature, ~mask, now, FEW_SWEEPS)
        order.take(np.flatnonzero(order.keep & mask), scores)
        left = weights.size - order.gone
        order.point(1.0 - float((now * targets).sum()) / energy)
    floor = max(groups * outputs // 2, weights.size // 500)
    share = FINE_ROUND if work < FINE_WORK else ROUND
    while True:
        scores, explained = _exact_round(targets, curvature, order.keep)
        order.point(1.0 - explained / energy)
        left = weights.size - order.gone
        if left <= floor or not left:
            return order.removal(weights.shape)
        count = max(1, left - int(left * share))
        if by_bits:
            scores = scores / place_bits(order.keep)
        order.take(np.argpartition(scores.reshape(-1), count - 1)[:count], scores)


def _exact_round(
    targets: Array, curvature: Curvature, keep: Mask
) -> tuple[Array, float]:
    """Return the saliency of the entries that stay, and the energy they explain."""
    scores = np.full(keep.shape, np.inf)
    explained = 0.0
    for group, row in np.ndindex(*keep.shape[:2]):
        alive = np.flatnonzero(keep[group, row])
        if not alive.size:
            continue
        wanted = targets[group, row, alive]
        inverse = _inverse(curvature.matrix[group], alive)
        values = blas.dsymv(1.0, inverse, wanted, lower=1)
        scores[group, row, alive] = values * values / np.diagonal(inverse)
        explained += float(values @ wanted)
    return scores, explained


def _inverse(matrix: Array, alive: NDArray[np.intp]) -> Array:
    """Return the lower triangle of the inverse of a principal submatrix."""
    part = matrix[alive[:, None], alive]
    factor, _ = lapack.dpotrf(part.T, lower=1, overwrite_a=1)
    inverse, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
    return np.asarray(inverse)


def _factor(curvature: Curvature, group: int) -> Array:
    """Return the upper Cholesky factor of ``H^-1``."""
    return np.asarray(np.linalg.cholesky(curvature.inverse(group)).T)


def _fast_round(
    weights: Array, factors: list[Array], keep: Mask, quota: int
) -> tuple[Mask, Array]:
    """Choose ``quota`` entries as SparseGPT does, with those removed before."""
    scores = np.empty(weights.shape)
    for group, factor in enumerate(factors):
        scores[group] = np.square(weights[group] / np.diagonal(factor))
    scores[~keep] = -1.0
    limit = np.partition(scores.reshape(-1), quota - 1)[quota - 1]
    mask = np.zeros(weights.shape, np.bool_)
    final = np.empty(weights.shape)
    for group, factor in enumerate(factors):
        counts = (scores[group] <= limit).sum(axis=0)

        def choose(
            block: Array, start: int, group: int = group, counts: Any = counts
        ) -> Mask:
            stop = start + block.shape[1]
            block = np.where(keep[group, :, start:stop], block, -1.0)
            final[group, :, start:stop] = block
            chosen = np.zeros(block.size, np.bool_)
            count = int(counts[start:stop].sum())
            chosen[np.argsort(block, axis=None, kind="stable")[:count]] = True
            return chosen.reshape(block.shape)

        mask[group] = sparsegpt(weights[group], factor, choose)[1]
    return mask, final


def sparsegpt(
    weights: Array,
    factor: Array,
    choose: Callable[[Array, int], Mask],
    step: int = 1,
) -> tuple[Array, Mask]:
    """Remove entries column by column; columns to the right make up for each error.

    Args:
        weights: [outputs, inputs].
        factor: Upper Cholesky factor of ``H^-1``.
        choose: Given the saliency of a block of columns, and its first column, returns
            which entries go.
        step: Columns that ``choose`` decides together; ``COLUMNS`` is rounded up to a
            multiple of it, and for more than 1 each run is chosen when it is reached.

    Returns:
        The new weights, and which entries are zero.
    """
    values = weights.copy()
    mask = np.zeros(weights.shape, np.bool_)
    diagonal = np.diagonal(factor)
    inputs = weights.shape[1]
    width = -(-COLUMNS // step) * step
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        block = values[:, start:stop]
        errors = np.empty(block.shape)
        for column in range(start, stop):
            at = column - start
            if at == 0 if step == 1 else at % step == 0:
                end = stop if step == 1 else min(column + step, stop)
                scores = np.square(values[:, column:end] / diagonal[column:end])
                mask[:, column:end] = choose(scores, column)
            gone = mask[:, column]
            error = np.where(gone, block[:, at], 0.0) / diagonal[column]
            block[:, at:] -= np.outer(error, factor[column, column:stop])
            block[gone, at] = 0.0
            errors[:, at] = error
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    return values, mask


def _block_order(weights: Array, curvature: Curvature, blocks: Pattern) -> Removal:
    """Remove whole blocks, a share of them in each round, and refit after each."""
    targets = weights @ curvature.matrix
    energy = float((weights * targets).sum()) or 1.0
    diagonals = np.stack(
        [np.diagonal(curvature.inverse(g)) for g in range(len(weights))]
    )
    shape = blocks.blocks(weights.shape)
    order = _RemovalRounds(np.ones(shape, np.bool_))
    order.take(np.flatnonzero(blocks.scores(np.abs(weights)) == 0), np.zeros(shape))
    order.point(0.0)
    now = weights
    floor = max(order.keep.size // 50, 1)
    while True:
        left = order.keep.size - order.gone
        if left <= floor:
            return order.removal(shape)
        scores = blocks.scores(np.square(now) / diagonals[:, None, :])
        scores[~order.keep] = np.inf
        count = max(1, left - int(left * 0.7))
        order.take(np.argpartition(scores.reshape(-1), count - 1)[:count], scores)
        keep = blocks.spread(order.keep, weights.shape)
        now = _conjugate(targets, curvature, keep, now, FEW_SWEEPS)
        order.point(1.0 - float((now * targets).sum()) / energy)


@one_thread
def pattern_mask(weights: Array, curvature: Curvature, pattern: Pattern) -> Mask:
    """Return what an N:M pattern removes; SparseGPT chooses in each run."""
    mask = np.empty(weights.shape, np.bool_)
    for group, rows in enumerate(weights):
        factor = _factor(curvature, group)
        mask[group] = sparsegpt(
            rows, factor, lambda scores, _: pattern.drop(scores), pattern.of
        )[1]
    return mask


@one_thread
def remove_entries(
    weights: NDArray[Any], gone: Mask, curvature: Curvature, mean: Array | None = None
) -> tuple[NDArray[Any], Array | None]:
    """Remove entries; the other weights and the bias make up for them.

    Args:
        weights: Floats [groups, outputs, inputs].
        gone: Which entries are zero afterwards.
        curvature: Of the layer.
        mean: Mean input float64 [groups, inputs], if the layer has a bias to shift.

    Returns:
        The new weights, of the type given, and what the bias gains, float64
        [groups, outputs], if there is a mean.
    """
    wide = weights.astype(np.float64)
    # Half precision has little room: where the new values do not fit, the old ones do.
    with np.errstate(over="ignore"):
        new = refit(wide, curvature, ~gone).astype(weights.dtype)
    if not np.isfinite(new.astype(np.float64)).all():
        new = np.where(gone, np.zeros((), weights.dtype), weights)
    if mean is None:
        return new, None
    change = wide - new.astype(np.float64)
    return new, np.einsum("goi,gi->go", change, mean)


def refit(weights: Array, curvature: Curvature, keep: Mask) -> Array:
    """Return values for the entries that stay so that the outputs move least.

    Args:
        weights: The weights as they were, [groups, outputs, inputs].
        curvature: Of the layer.
        keep: Which entries stay.
    """
    targets = weights @ curvature.matrix
    counts = keep.sum(axis=2)
    if float((counts.astype(np.float64) ** 3).sum()) > 3 * EXACT_WORK or (
        int(counts.max(initial=0)) > EXACT_INPUTS
    ):
        return _conjugate(targets, curvature, keep, weights, SWEEPS)
    values = np.zeros(weights.shape)
    for group, row in np.ndindex(*counts.shape):
        alive = np.flatnonzero(keep[group, row])
        if not alive.size:
            continue
        part = curvature.matrix[group][alive[:, None], alive]
        wanted = targets[group, row, alive]
        _, found, _ = lapack.dposv(part.T, wanted, lower=1, overwrite_a=1)
        values[group, row, alive] = found
    return values


def _conjugate(
    targets: Array, curvature: Curvature, keep: Mask, start: Array, sweeps: int
) -> Array:
    """Solve for every row at once, with the diagonal as preconditioner."""
    matrix = curvature.matrix
    scale = keep / np.diagonal(matrix, axis1=1, axis2=2)[:, None, :]
    values = np.where(keep, start, 0.0)
    residual = np.where(keep, targets - values @ matrix, 0.0)
    towards = scale * residual
    direction = towards.copy()
    size = (residual * towards).sum(axis=2, keepdims=True)
    for _ in range(sweeps):
        image = np.where(keep, direction @ matrix, 0.0)
        bend = (direction * image).sum(axis=2, keepdims=True)
        length = np.divide(size, bend, out=np.zeros_like(size), where=bend > 0)
        values += length * direction
        residual -= length * image
        towards = scale * residual
        before, size = size, (residual * towards).sum(axis=2, keepdims=True)
        ratio = np.divide(size, before, out=np.zeros_like(size), where=before > 0)
        direction = towards + ratio * direction
    return values


def allocate(removals: Sequence[Removal], totals: Sequence[int]) -> list[list[int]]:
    """Divide zeros among layers so that the sum of their errors is least.

    Each layer's error over its zeros is taken as the lower convex hull of the points
    that were measured, so that the best division goes down the steepest slopes first
    (Lagrange: all layers end at one slope).

    Args:
        removals: Of each layer; zeros that a layer has already stay.
        totals: Zeros of all layers together, for each division wanted.

    Returns:
        For each total the zeros of each layer.
    """
    steps: list[tuple[float, int, int]] = []
    begin = []
    for index, removal in enumerate(removals):
        hull = _hull(removal.zeros, removal.errors)
        begin.append(hull[0][0])
        for (z0, e0), (z1, e1) in pairwise(hull):
            steps.append(((e1 - e0) / (z1 - z0), index, z1 - z0))
    steps.sort()
    divisions = []
    for total in totals:
        zeros = list(begin)
        missing = total - sum(zeros)
        for _, index, length in steps:
            if missing <= 0:
                break
            taken = min(length, missing)
            zeros[index] += taken
            missing -= taken
        divisions.append(zeros)
    return divisions


def _hull(zeros: NDArray[np.int64], errors: Array) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for point in zip(zeros.tolist(), errors.tolist(), strict=True):
        if hull and point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (point[0] - x0) < (point[1] - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(point)
    return hull
