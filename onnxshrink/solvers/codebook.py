"""From values to codes of a table: by rate, and so that a layer's outputs stay.

A code of length ``l`` bits costs ``trade * l`` more than its squared error: entropy-
constrained scalar quantization (Chou, Lookabaugh and Gray 1989). Lengths are those an
ideal coder gives, ``-log2`` of the share of each code, and follow from the codes in
turn, so that both are iterated.

``feedback`` chooses codes column by column and lets the columns that follow make up for
the error (GPTQ, Frantar et al. 2023, algorithm 1, onto a table instead of a grid; for
tables of vectors GPTVQ, van Baalen et al. 2024, section 3). With a rate it is the
quantization step of CERWU (Conzelmann and Bamler 2025): what a code costs a column is
its error over the square of the Cholesky factor's diagonal, what the layer's outputs
lose by it after all that follow have made up for it. ``refit`` then moves the table to
where codes, as they stand, change the outputs least.

Rows are outputs of a layer and columns its inputs, ``gram`` is ``X^T X`` of the inputs.
Where several layers of one shape are a stack (the groups of a convolution), ``weight``
is their rows one below the other and ``gram`` [stacks, inputs, inputs]. Nothing here is
random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.solvers import kmeans
from onnxshrink.solvers.threads import one_thread

__all__ = [
    "RateCurve",
    "assign_by_rate",
    "descend",
    "entropy",
    "feedback",
    "fit_by_rate",
    "lengths_of",
    "output_error",
    "refit",
    "trade_for",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Codes = NDArray[np.uint8]

DAMPING = 0.01
"""Share of the mean diagonal of the Gram matrix that is added to it (GPTQ)."""
_COLUMNS = 128
"""Columns whose effect on those behind them is summed up before it is applied."""
_POINTS = 4096
_CURVE_POINTS = 1024
_ROUNDS = 12
"""Iterations of codes, lengths and centroids."""
_BISECTIONS = 24
_CHUNK = 1 << 17
_CONJUGATE = 12
"""Steps towards the best table."""


# --- rate -----------------------------------------------------------------------------


def lengths_of(counts: Array) -> Float64:
    """Return the bits an ideal coder takes for each code; infinite for one not used.

    Args:
        counts: How often each is used, or its share.
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum()
    found = np.full(counts.shape, np.inf)
    used = counts > 0
    found[used] = np.log2(total) - np.log2(counts[used])
    return found


def entropy(counts: Array) -> float:
    """Return the bits a code of these frequencies takes on average."""
    counts = np.asarray(counts, np.float64)
    used = counts[counts > 0]
    if not used.size:
        return 0.0
    return float((used * lengths_of(used)).sum() / used.sum())


def assign_by_rate(
    values: Array,
    centroids: Array,
    lengths: Array,
    trade: float,
    importance: Array | None = None,
) -> Codes:
    """Return the code of least squared error plus ``trade`` times length.

    Args:
        values: Finite floats of any shape.
        centroids: Ascending, at most 256.
        lengths: Bits of each code; an infinite one is not used.
        trade: Squared error that a bit is worth, from 0 on.
        importance: Weight of each value's squared error, broadcast to ``values``.

    Returns:
        uint8 of the shape of ``values``.
    """
    costs = np.where(
        np.isinf(lengths), np.inf, trade * np.where(np.isinf(lengths), 0.0, lengths)
    )
    flat = np.ascontiguousarray(values).reshape(-1)
    share = None
    if importance is not None:
        share = np.broadcast_to(importance, values.shape)
    codes = np.empty(flat.size, np.uint8)
    step = max(1, _CHUNK // max(1, len(centroids)))
    wide = np.asarray(centroids, np.float64)
    for start in range(0, flat.size, step):
        part = flat[start : start + step].astype(np.float64)[:, None]
        missed = (part - wide) ** 2
        if share is not None:
            missed *= share.flat[start : start + step].astype(np.float64)[:, None]
        codes[start : start + step] = (missed + costs).argmin(axis=1)
    return codes.reshape(values.shape)


def _iterate(
    points: kmeans.Points, centroids: Float64, trade: float, zero: bool, rounds: int
) -> tuple[Float64, Float64]:
    """Return centroids and the weight of each, after some iterations.

    A point's weight is also how often its code is written.
    """
    lengths = np.zeros(centroids.size)
    weight = np.zeros(centroids.size)
    for _ in range(rounds):
        codes = assign_by_rate(points.mean, centroids, lengths, trade)
        weight = np.bincount(codes, points.weight, centroids.size).astype(float)
        sums = np.bincount(codes, points.weight * points.mean, minlength=centroids.size)
        moved = centroids.copy()
        np.divide(sums, weight, out=moved, where=weight > 0)
        if zero:
            moved[centroids == 0] = 0.0
            weight = np.where((weight == 0) & (centroids == 0), 1e-300, weight)
        used = weight > 0
        moved, weight = moved[used], weight[used]
        still = moved.size == centroids.size and np.allclose(
            moved, centroids, rtol=1e-6, atol=0
        )
        centroids, lengths = moved, lengths_of(weight)
        if still:
            break
    return centroids, weight


def fit_by_rate(
    values: Array,
    count: int,
    *,
    rate: float | None = None,
    trade: float | None = None,
    zero: bool = False,
) -> tuple[Float64, Float64, float]:
    """Return centroids whose codes cost few bits, instead of those nearest to all.

    Args:
        values: Finite floats of any shape.
        count: Most centroids, 1 to 256.
        rate: Bits a value that an ideal coder may take; what the smallest trade-off
            that keeps to it gives.
        trade: Or the squared error that a bit is worth.
        zero: 0 is one of the centroids, and exactly 0.

    Returns:
        Centroids float64, ascending, their lengths in bits, and the trade-off.

    Raises:
        UsageError: Neither or both of ``rate`` and ``trade`` are given, or one is
            negative.
    """
    if (rate is None) == (trade is None):
        raise UsageError("coding by rate takes a rate or a trade-off, one of them")
    if (rate if trade is None else trade or 0.0) < 0:  # type: ignore[operator]
        raise UsageError("a rate and a trade-off are numbers from 0 on")
    points = kmeans.merged(kmeans.points_of(values, None), _POINTS)
    found: list[tuple[float, Float64, Float64, float]] = []
    for start in _starts(values, count, zero):
        chosen = trade
        if rate is not None:
            chosen = trade_for(
                lambda trial, start=start: entropy(
                    _iterate(points, start, trial, zero, _ROUNDS)[1]
                ),
                rate,
                float(np.average(points.mean**2, weights=points.weight)),
            )
        assert chosen is not None
        centroids, weight = _iterate(points, start, chosen, zero, _ROUNDS)
        order = np.argsort(centroids, kind="stable")
        centroids, lengths = centroids[order], lengths_of(weight[order])
        codes = assign_by_rate(points.mean, centroids, lengths, chosen)
        missed = points.weight @ (points.mean - centroids[codes]) ** 2
        cost = float(missed / points.weight.sum())
        if rate is None:
            cost += chosen * float(points.weight @ lengths[codes]) / points.weight.sum()
        found.append((cost, centroids, lengths, chosen))
    # What a start ends at depends on it: the fewer codes are left, the fewer ways out.
    _, centroids, lengths, chosen = min(found, key=lambda one: one[0])
    return centroids, lengths, chosen


def _starts(values: Array, count: int, zero: bool) -> list[Float64]:
    """Return centroids for different numbers of codes, the most first."""
    found: list[Float64] = []
    while count > 1 and len(found) < 5:
        found.append(kmeans.fit(values, count, zero=zero))
        count = min(count - 1, len(found[-1]) * 2 // 3)
    return found or [kmeans.fit(values, count, zero=zero)]


class RateCurve:
    """What codes of some values take at any trade-off, worked out on 1,024 bins.

    Attributes:
        size: Number of values.
        energy: Sum of their squares.
    """

    def __init__(self, values: Array, count: int, zero: bool) -> None:
        """Take values, finite floats of any shape, and as many centroids as in a fit.

        Args:
            values: The values.
            count: Most centroids, 1 to 256.
            zero: 0 is one of the centroids.
        """
        points = kmeans.points_of(values, None)
        self.size = values.size
        self.energy = float(points.weight @ points.mean**2) + points.spread
        self._start = kmeans.fit(values, count, zero=zero)
        self._points = kmeans.merged(points, _CURVE_POINTS)
        self._zero = zero

    def bits(self, trade: float) -> float:
        """Return the bits of all codes where one is worth ``trade`` squared error."""
        _, weight = _iterate(self._points, self._start, trade, self._zero, _ROUNDS)
        return self.size * entropy(weight)


def trade_for(rate_of: Any, rate: float, energy: float) -> float:
    """Return the least trade-off whose rate is at most ``rate``, to a few percent.

    Args:
        rate_of: Bits a value at a trade-off; falls as that rises, more or less.
        rate: Bits a value that are wanted.
        energy: Mean square of the values: what a bit is worth at most.
    """
    if rate_of(0.0) <= rate:
        return 0.0
    low, high = 1e-12 * energy, 4.0 * energy
    if rate_of(high) > rate:
        return high
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        if rate_of(middle) <= rate:
            high = middle
        else:
            low = middle
        if high < 1.02 * low:
            break
    return high


# --- layers ---------------------------------------------------------------------------


def _stack(weight: Array, gram: Array) -> Float64:
    if weight.ndim != 2:
        raise UsageError(
            f"codes are for a matrix [outputs, inputs], not {list(weight.shape)}"
        )
    stack = np.asarray(gram, np.float64)
    stack = stack[None] if stack.ndim == 2 else stack
    rows, inputs = weight.shape
    if stack.shape[1:] != (inputs, inputs) or rows % len(stack):
        raise UsageError(
            f"a Gram matrix of shape {list(gram.shape)} does not belong to a weight of "
            f"shape {[rows, inputs]}"
        )
    if not np.isfinite(stack).all():
        raise ModelError("the Gram matrix of the inputs holds NaN or infinity")
    return stack


def output_error(weight: Array, decoded: Array, gram: Array) -> float:
    """Return the squared change of a layer's outputs, ``tr(D G D^T)``.

    Args:
        weight: Float [rows, inputs].
        decoded: What stands in its place.
        gram: [inputs, inputs] or [stacks, inputs, inputs].
    """
    stack = _stack(weight, gram)
    change = (decoded.astype(np.float64) - weight).reshape(
        len(stack), -1, weight.shape[1]
    )
    with one_thread:
        return float(((change @ stack) * change).sum())


def _root(gram: Float64) -> Float64:
    """Return upper ``U`` with ``(G + damping)^-1 = U^T U``."""
    matrix = gram.copy()
    diagonal = np.einsum("ii->i", matrix)
    live = diagonal > 0
    if not live.any():
        return np.eye(len(gram))
    mean = float(diagonal[live].mean())
    diagonal[~live] = mean
    extra = DAMPING * mean
    while True:
        diagonal += extra
        lower, failed = lapack.dpotrf(matrix[::-1, ::-1], lower=1)
        if not failed:
            break
        extra *= 10
    inverse, _ = lapack.dtrtri(np.ascontiguousarray(lower[::-1, ::-1]), lower=0)
    return np.triu(inverse)


def feedback(
    weight: Array,
    gram: Array,
    table: Array,
    *,
    owner: Array | None = None,
    across: bool = False,
    lengths: Array | None = None,
    trade: float = 0.0,
) -> Codes:
    """Choose a code for each weight; those that follow make up for the error.

    A weight that is zero was pruned: it gets the code of 0 if there is one, and others
    make up for it too. (Of vectors: one of zeros.)

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        table: Values [codes], ascending; one for each group of rows [groups, codes];
            or vectors [codes, dim] with ``dim`` from 2 on if ``owner`` is ``None``.
        owner: Which table each row uses, int [rows].
        across: Vectors take neighbouring rows of one column instead of neighbouring
            columns of one row.
        lengths: Bits of each code, of the table's shape less ``dim``.
        trade: Output error that a bit is worth, in the unit of ``gram`` times squared
            weights.

    Returns:
        uint8 [rows, inputs]; of vectors [rows, inputs / dim] or [rows / dim, inputs].

    Raises:
        ModelError: ``gram`` is not finite.
        UsageError: Shapes do not fit.
    """
    stack = _stack(weight, gram)
    table = np.asarray(table, np.float64)
    dim = table.shape[1] if table.ndim == 2 and owner is None else 1
    rows, inputs = weight.shape
    each = rows // len(stack)
    if (inputs % dim and not across) or (each % dim and across):
        raise UsageError(f"{dim} does not divide a weight of shape {[rows, inputs]}")
    bits = np.zeros(table.shape[: 1 if owner is None else 2])
    if lengths is not None:
        bits = np.asarray(lengths, np.float64)
    costs = np.where(np.isinf(bits), np.inf, trade * np.where(np.isinf(bits), 0, bits))
    found = []
    with one_thread:
        for index, matrix in enumerate(stack):
            own = slice(index * each, (index + 1) * each)
            chooser = _Chooser(
                table, costs, None if owner is None else owner[own], dim, across
            )
            root = _root(matrix)
            found.append(_columnwise(weight[own], root, matrix, chooser))
    return np.concatenate(found)


class _Chooser:
    """Chooses codes for columns of values, [width, rows]."""

    def __init__(
        self,
        table: Float64,
        costs: Float64,
        owner: Array | None,
        dim: int,
        across: bool,
    ) -> None:
        self.table, self.costs, self.dim, self.across = table, costs, dim, across
        self.owner = owner
        self.width = 1 if across else dim
        self.rate = bool(costs.any())
        self.middles = None
        if owner is None and dim == 1 and not self.rate:
            self.middles = (table[1:] + table[:-1]) / 2

    def choose(
        self, values: Float64, held: NDArray[np.bool_], root: Float64
    ) -> tuple[Codes, Float64]:
        """Return codes and what they stand for.

        Args:
            values: [width, rows].
            held: Which are zero and stay so.
            root: The diagonal block of the Cholesky factor, [width, width].
        """
        if self.dim == 1:
            codes = self._scalars(values[0], held[0], float(root[0, 0]))
            table = self.table if self.owner is None else self.table[self.owner]
            if self.owner is None:
                return codes, table[codes][None]
            return codes, np.take_along_axis(table, codes[:, None].astype(int), 1).T
        vectors = values[0].reshape(-1, self.dim) if self.across else values.T
        zeros = held[0].reshape(-1, self.dim) if self.across else held.T
        if self.across:
            turned, entries = vectors / root[0, 0], self.table / root[0, 0]
        else:
            # The error is ``e U^-1``, squared.
            inverse = np.linalg.inv(root)
            turned, entries = vectors @ inverse, self.table @ inverse
        scores = turned @ (-2.0 * entries.T)
        scores += np.einsum("kd,kd->k", entries, entries) + self.costs
        none = ~self.table.any(axis=1)
        if none.any():
            scores[np.ix_(zeros.all(axis=1), ~none)] = np.inf
        codes = scores.argmin(axis=1).astype(np.uint8)
        decoded = self.table[codes]
        return codes, decoded.reshape(1, -1) if self.across else decoded.T

    def _scalars(self, values: Float64, held: NDArray[np.bool_], root: float) -> Codes:
        if self.middles is not None:
            codes = np.searchsorted(self.middles, values).astype(np.uint8)
            at = np.flatnonzero(self.table == 0)
            if at.size:
                codes[held] = at[0]
            return codes
        table = self.table if self.owner is None else self.table[self.owner]
        costs = self.costs if self.owner is None else self.costs[self.owner]
        scores = ((values[:, None] - table) / root) ** 2 + costs
        some = (np.atleast_2d(table) == 0).any(axis=1) & held
        scores[some[:, None] & (table != 0)] = np.inf
        return np.asarray(scores.argmin(axis=1).astype(np.uint8))


def _columnwise(
    weight: Array, root: Float64, gram: Float64, chooser: _Chooser
) -> Codes:
    """Choose for [rows, inputs]; single columns go by their squares, largest first."""
    rows, inputs = weight.shape
    width = chooser.width
    if width == 1:
        order = np.argsort(-np.diagonal(gram), kind="stable")
        if not (order == np.arange(inputs)).all():
            root = _root(gram[np.ix_(order, order)])
    else:
        order = np.arange(inputs)
    left = weight.T.astype(np.float64)[order]
    held = left == 0
    codes = np.empty(
        (inputs // width, rows // chooser.dim if chooser.across else rows), np.uint8
    )
    step = max(width, _COLUMNS // width * width)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        errors = np.empty((stop - start, rows))
        for at in range(start, stop, width):
            end = at + width
            block = root[at:end, at:end]
            chosen, decoded = chooser.choose(left[at:end], held[at:end], block)
            codes[at // width] = chosen
            lost = left[at:end] - decoded
            if width == 1:
                lost = lost / block[0, 0]
            else:
                lost = np.asarray(np.linalg.solve(block.T, lost), np.float64)
            errors[at - start : end - start] = lost
            if end < stop:
                left[end:stop] -= root[at:end, end:stop].T @ lost
        if stop < inputs:
            left[stop:] -= root[start:stop, stop:].T @ errors
    found = np.empty_like(codes)
    found[order if width == 1 else slice(None)] = codes
    return np.ascontiguousarray(found.T)


def descend(
    weight: Array,
    gram: Array,
    table: Array,
    codes: Array,
    *,
    lengths: Array | None = None,
    trade: float = 0.0,
    sweeps: int = 2,
) -> Codes:
    """Change codes one column after the other while outputs lose less by it.

    Coordinate descent on the output error, and what the codes cost, with all other
    codes as they are (Behdin et al. 2023, "QuantEase"). It takes into account that a
    weight which is zero stays zero and makes up for nothing, which ``feedback`` does
    not. The sum never rises.

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        table: Values, ascending.
        codes: Where to start, [rows, inputs].
        lengths: Bits of each code; an infinite one is not taken up.
        trade: Output error that a bit is worth.
        sweeps: Times that every column is visited.

    Returns:
        uint8 [rows, inputs].
    """
    stack = _stack(weight, gram)
    values = np.asarray(table, np.float64)
    bits = np.zeros(len(values)) if lengths is None else np.asarray(lengths, np.float64)
    costs = np.where(np.isinf(bits), np.inf, trade * np.where(np.isinf(bits), 0, bits))
    each = len(weight) // len(stack)
    found = codes.astype(np.uint8)
    with one_thread:
        for index, matrix in enumerate(stack):
            own = slice(index * each, (index + 1) * each)
            _descend(weight[own], matrix, values, found[own], costs, sweeps)
    return found


def _descend(
    weight: Array,
    gram: Float64,
    table: Float64,
    codes: Codes,
    costs: Float64,
    sweeps: int,
) -> None:
    """Improve codes [rows, inputs] in place."""
    decoded = table[codes]
    change = decoded - weight
    image = change @ gram
    held = (weight == 0) & (decoded == 0)
    plain = not costs.any()
    middles = (table[1:] + table[:-1]) / 2
    diagonal = np.diagonal(gram)
    order = [int(at) for at in np.argsort(-diagonal, kind="stable") if diagonal[at] > 0]
    for _ in range(sweeps):
        moved = False
        for at in order:
            free = np.flatnonzero(~held[:, at])
            if not free.size:
                continue
            best = decoded[free, at] - image[free, at] / diagonal[at]
            if plain:
                chosen = np.searchsorted(middles, best).astype(np.uint8)
            else:
                scores = diagonal[at] * (best[:, None] - table) ** 2 + costs
                chosen = scores.argmin(axis=1).astype(np.uint8)
            step = table[chosen] - decoded[free, at]
            some = np.flatnonzero(step)
            if not some.size:
                continue
            moved = True
            rows, steps = free[some], step[some]
            codes[rows, at] = chosen[some]
            decoded[rows, at] += steps
            image[rows] += steps[:, None] * gram[at]
        if not moved:
            return


def refit(
    weight: Array,
    gram: Array,
    table: Array,
    index: Array,
    *,
    held: Array | None = None,
    share: Array | None = None,
) -> Float64:
    """Return the values of a table that change a layer's outputs least.

    Least squares in as many unknowns as the table has entries, by conjugate gradients
    from the table as it is: its error never rises.

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        table: Values of any shape.
        index: Which of them, flat, stands for each weight, int [rows, inputs].
        held: Which of them stay, bool of the table's shape; ``None``: zeros.
        share: Factor of each row's errors, [rows, 1].
    """
    stack = _stack(weight, gram)
    flat = np.asarray(table, np.float64).reshape(-1)
    free = (flat != 0) if held is None else ~held.reshape(-1)
    places = np.asarray(index, np.intp).reshape(-1)
    shape = (len(stack), -1, weight.shape[1])
    squares = None if share is None else np.square(share).reshape(len(stack), -1, 1)

    def gradient(values: Float64) -> Float64:
        with one_thread:
            image = values.reshape(shape) @ stack
        if squares is not None:
            image *= squares
        summed = np.bincount(places, image.reshape(-1), minlength=flat.size)
        return np.where(free, summed, 0.0)

    now = flat.copy()
    residual = gradient((weight.reshape(-1) - now[places]).astype(np.float64))
    each = len(weight) // len(stack)
    diagonal = np.einsum("gii->gi", stack)[:, None, :]
    if squares is not None:
        diagonal = diagonal * squares
    spread = np.broadcast_to(diagonal, (len(stack), each, weight.shape[1]))
    used = np.bincount(places, spread.reshape(-1), minlength=flat.size)
    scale = np.divide(1.0, used, out=np.zeros(flat.size), where=used > 0)
    towards = scale * residual
    direction, size = towards.copy(), float(residual @ towards)
    for _ in range(min(_CONJUGATE, int(free.sum()))):
        if size <= 0:
            break
        image = gradient(direction[places])
        bend = float(direction @ image)
        if bend <= 0:
            break
        now += size / bend * direction
        residual -= size / bend * image
        towards = scale * residual
        before, size = size, float(residual @ towards)
        direction = towards + size / before * direction
    return now.reshape(np.shape(table))
