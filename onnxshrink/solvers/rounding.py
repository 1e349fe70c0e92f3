"""From real weights to codes: which scale, and which way each weight is rounded.

Everything works on matrices [outputs, inputs]. A ``Grid`` says which values codes stand
for: row ``r``, column ``c`` with code ``q`` is ``(q - zero) * scale``, with a scale and
a zero point for each row or for each block of columns of a row. ``fit`` chooses the
grid; ``nearest``, ``gptq``, ``adaround`` and ``descend`` choose the codes.

With ``X`` [rows, inputs] the layer's inputs on calibration data and ``G = X^T X``, a
change ``D`` of the weights changes the outputs by ``|X D^T|^2 = tr(D G D^T)``. All
errors here are meant in this sense; without ``G`` the error is ``tr(D D^T)``. Rows are
independent: where a method does worse in a row than rounding to nearest, that row is
rounded to nearest.

Where several layers of the same shape are one stack (the groups of a convolution),
``weight`` is their rows one below the other and ``gram`` [stacks, inputs, inputs].

Nothing here is random: the same arguments give the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.solvers.threads import one_thread

__all__ = [
    "Factors",
    "Grid",
    "adaround",
    "decode",
    "descend",
    "error",
    "factors_of",
    "fit",
    "gptq",
    "nearest",
]

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Fit = Literal["minmax", "mse", "hqq", "learned"]

DAMPING = 0.01
"""Share of the mean diagonal that GPTQ adds to it, as Frantar et al. do."""
_SMALL = 64
"""Inputs up to which the matrices of a stack are inverted together."""
_COLUMNS = 128
"""Columns whose effect on those behind them is summed up before it is applied."""
_CHUNK = 1 << 21
"""Weights worked on at a time: 16 MB as float64."""
_FIT_CHUNK = 1 << 17
"""Weights whose grid is searched at a time: what fits a processor's cache."""
_TINY = float(np.finfo(np.float32).tiny)


# --- grids ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grid:
    """The values of codes: ``(code - zero) * scale``.

    Attributes:
        scale: float32 [rows, groups], positive.
        zero: int32 [rows, groups], the code of 0.
        low: Smallest code.
        high: Largest code.
        block: Columns that share a scale; the last block may have fewer. 0: all columns
            of a row.
        step: Distance between codes: 2 with codes -1 and 1 for binary weights.
    """

    scale: Float32
    zero: Int32
    low: int
    high: int
    block: int = 0
    step: int = 1

    def columns(self, inputs: int) -> tuple[Float32, Int32]:
        """Return scale and zero of each weight, [rows, inputs] or [rows, 1]."""
        if self.scale.shape[1] == 1:
            return self.scale, self.zero
        scale = np.repeat(self.scale, self.block, axis=1)[:, :inputs]
        zero = np.repeat(self.zero, self.block, axis=1)[:, :inputs]
        return scale, zero

    def rows(self, chosen: slice) -> Grid:
        """Return the grid of some rows."""
        return replace(self, scale=self.scale[chosen], zero=self.zero[chosen])


def _codes(values: Array, scale: Array, zero: Array, grid: Grid) -> Array:
    """Nearest codes of values, as floats; ties go to the even code."""
    codes = values / scale
    if grid.step == 1:
        np.rint(codes, out=codes)
        codes += zero
        return np.clip(codes, grid.low, grid.high, out=codes)
    codes += zero - grid.low
    codes *= 1.0 / grid.step
    np.rint(codes, out=codes)
    np.clip(codes, 0, (grid.high - grid.low) // grid.step, out=codes)
    codes *= grid.step
    codes += grid.low
    return codes


def nearest(weight: Array, grid: Grid) -> Int32:
    """Round each weight to the nearest value of the grid.

    Args:
        weight: Float [rows, inputs].
        grid: The grid.

    Returns:
        Codes, int32 [rows, inputs]. Halves go to the even code, and the quotient is
        float32, as in QuantizeLinear.

    Raises:
        ModelError: A weight is not finite.
        UsageError: The grid is not one for this weight.
    """
    _check(weight, None, grid)
    result = np.empty(weight.shape, np.int32)
    for rows in _row_chunks(weight.shape):
        part = grid.rows(rows)
        values = weight[rows].astype(np.float32)
        result[rows] = _codes(values, *part.columns(weight.shape[1]), grid)
    return result


def decode(codes: Array, grid: Grid) -> Float32:
    """Return the values of codes, float32 [rows, inputs], as DequantizeLinear does."""
    scale, zero = grid.columns(codes.shape[1])
    return np.asarray((codes - zero).astype(np.float32) * scale, np.float32)


@one_thread
def error(
    weight: Array, codes: Array, grid: Grid, gram: Float64 | None = None
) -> float:
    """Return ``tr(D G D^T)`` of what the codes change: the squared output error.

    Args:
        weight: Float [rows, inputs].
        codes: Int [rows, inputs].
        grid: The grid.
        gram: [inputs, inputs] or [stacks, inputs, inputs]; ``None`` for the identity.
    """
    gram = _check(weight, gram, grid)
    return float(_row_errors(weight, codes, grid, gram).sum())


def _row_errors(
    weight: Array, codes: Array, grid: Grid, gram: Float64 | None
) -> Float64:
    found = np.empty(len(weight))
    for piece in _pieces(weight, gram):
        rows = piece.rows
        decoded = decode(codes[rows], grid.rows(rows))
        change = (decoded - weight[rows]).astype(np.float64)
        product = change
        if piece.gram is not None:
            product = (piece.stacked(change) @ piece.gram).reshape(change.shape)
        found[rows] = np.einsum("oi,oi->o", change, product)
    return found


# --- checks and pieces ----------------------------------------------------------------


def _check(weight: Array, gram: Float64 | None, grid: Grid | None) -> Float64 | None:
    """Refuse what cannot be rounded; return the Gram matrices as a stack."""
    if weight.ndim != 2:
        raise UsageError(
            f"rounding takes a matrix [outputs, inputs], not shape {list(weight.shape)}"
        )
    rows, inputs = weight.shape
    if not np.isfinite(weight).all():
        bad = int(weight.size - np.isfinite(weight).sum())
        raise ModelError(f"{bad} weights are NaN or infinite; they have no code")
    if grid is not None:
        groups = -(-inputs // grid.block) if grid.block else 1
        if grid.scale.shape != (rows, groups) or grid.zero.shape != (rows, groups):
            raise UsageError(
                f"a weight of shape {[rows, inputs]} in blocks of {grid.block} has "
                f"{[rows, groups]} scales, not {list(grid.scale.shape)}"
            )
    if gram is None:
        return None
    stack = gram[None] if gram.ndim == 2 else gram
    if stack.shape[1:] != (inputs, inputs) or not len(stack) or rows % len(stack):
        raise UsageError(
            f"a Gram matrix of shape {list(gram.shape)} does not belong to a weight of "
            f"shape {[rows, inputs]}"
        )
    _check_finite(stack)
    return stack


def _check_finite(stack: Float64) -> None:
    if not np.isfinite(stack).all():
        raise ModelError(
            "the Gram matrix of the inputs holds NaN or infinity: activations of the "
            "layer are not finite on the calibration data"
        )


def _check_damping(damping: float) -> None:
    if not (damping >= 0 and math.isfinite(damping)):
        raise UsageError(f"damping is a number from 0 on, not {damping}")


def _row_chunks(shape: tuple[int, ...], size: int = _CHUNK) -> Iterator[slice]:
    step = max(1, size // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


@dataclass(frozen=True, eq=False)
class _RowPiece:
    """Some rows, and their Gram matrices [stacks, inputs, inputs]."""

    rows: slice
    gram: Float64 | None
    stacks: int = 1

    def stacked(self, array: Array) -> Array:
        """View rows as [stacks, rows of one, inputs]."""
        return array.reshape(self.stacks, -1, array.shape[-1])


def _pieces(
    weight: Array, gram: Float64 | None, size: int = _CHUNK
) -> Iterator[_RowPiece]:
    """Cut the rows into pieces of bounded size, along stacks where there are some."""
    if gram is None or len(gram) == 1:
        for rows in _row_chunks(weight.shape, size):
            yield _RowPiece(rows, gram)
        return
    rows_each, inputs = len(weight) // len(gram), weight.shape[1]
    step = max(1, _CHUNK // max(1, inputs * max(inputs, rows_each)))
    for start in range(0, len(gram), step):
        some = gram[start : start + step]
        rows = slice(start * rows_each, (start + len(some)) * rows_each)
        yield _RowPiece(rows, some, len(some))


# --- fitting a grid -------------------------------------------------------------------


@one_thread
def fit(
    weight: Array,
    low: int,
    high: int,
    *,
    symmetric: bool = True,
    block: int = 0,
    step: int = 1,
    method: Fit = "minmax",
    gram: Float64 | None = None,
) -> Grid:
    """Choose scale and zero point of each row, or of each block of a row.

    - ``minmax`` reaches from the smallest to the largest weight. For codes -1, 0, 1 it
      is instead the scale of ternary weight networks (Li and Liu 2016, section 2.2),
      for -1 and 1 (``step=2``) the mean size (Rastegari et al. 2016, XNOR-Net, eq. 6).
    - ``mse`` searches shares of that range for the smallest squared error and then
      alternates between codes and the scale that is best for them.
    - ``hqq`` alternates between codes and the grid that is best for the weights less
      their outliers, found by shrinkage with p = 0.7 (Badri and Shaji 2023,
      "Half-Quadratic Quantization of Large Machine Learning Models").
    - ``learned`` chooses the share of the range, of either end where the grid is
      asymmetric, by the output error: with all of ``gram`` (the clipping OmniQuant
      learns by gradients, Shao et al. 2023, section 3.2, found here by search).

    The grid always has an exact 0 unless it is binary.

    Args:
        weight: Float [rows, inputs].
        low: Smallest code.
        high: Largest code.
        symmetric: The zero point is the middle code, else it is chosen too.
        block: Columns that share a scale; 0: all of a row.
        step: Distance between codes.
        method: See above.
        gram: [inputs, inputs] or [stacks, inputs, inputs]: weighs the error, with its
            diagonal in ``mse`` and all of it in ``learned``.

    Raises:
        ModelError: A weight is not finite.
        UsageError: The arguments make no grid.
    """
    gram = _check(weight, gram, None)
    if not (low < high and step >= 1 and (high - low) % step == 0):
        raise UsageError(f"codes from {low} to {high} by {step} make no grid")
    if block < 0:
        raise UsageError(f"block is a number of columns, or 0, not {block}")
    if method not in ("minmax", "mse", "hqq", "learned"):
        raise UsageError(
            f"no way to fit a grid is called {method!r}; there are minmax, mse, hqq "
            "and learned"
        )
    rows, inputs = weight.shape
    block = 0 if block >= inputs else block
    groups = -(-inputs // block) if block else 1
    grid = Grid(
        np.ones((rows, groups), np.float32),
        np.zeros((rows, groups), np.int32),
        low,
        high,
        block,
        step,
    )
    for piece in _pieces(weight, gram, _FIT_CHUNK):
        search = _GridSearch.of(weight[piece.rows], piece, grid, symmetric)
        ranges = search.start()
        # An error that does not fit float32 is never the smallest.
        with np.errstate(over="ignore", invalid="ignore"):
            if method in ("mse", "learned"):
                search.mse(ranges)
            elif method == "hqq":
                search.hqq(ranges)
        scale, zero = search.best
        grid.scale[piece.rows], grid.zero[piece.rows] = scale, zero
    if method == "learned" and gram is not None:
        _learn(weight, grid, gram, symmetric)
    return grid


def _affine(
    low: Array, high: Array, grid: Grid, symmetric: bool
) -> tuple[Float32, Int32]:
    """Return scale and zero of ranges, which are made to include 0."""
    low = np.minimum(low, 0.0).astype(np.float64)
    high = np.maximum(high, 0.0).astype(np.float64)
    if symmetric:
        middle = (grid.low + grid.high + 1) // 2
        scale = high / (grid.high - middle) if grid.high > middle else 0 * high
        if middle > grid.low:
            scale = np.maximum(scale, low / (grid.low - middle))
        zero = np.full(scale.shape, middle, np.int32)
        return _positive(scale), zero
    scale = _positive((high - low) / (grid.high - grid.low))
    zero = np.clip(np.rint(grid.low - low / scale), grid.low, grid.high)
    return scale, zero.astype(np.int32)


def _positive(scale: Array) -> Float32:
    """Return float32 scales; 1 where nothing is to be scaled."""
    with np.errstate(under="ignore"):
        narrow = np.maximum(scale, _TINY).astype(np.float32)
    return np.where(scale > 0, narrow, np.float32(1))


@dataclass(eq=False)
class _GridSearch:
    """The search for the grid of some rows.

    Attributes:
        blocks: The weights, float32 [rows, groups, block], padded with zeros.
        importance: Weight of each one's squared error, broadcast to ``blocks``; zero
            for the padding.
        grid: Codes.
        symmetric: Whether the zero point stays.
        best: Scale and zero found so far, [rows, groups].
        errors: Their error, [rows, groups].
    """

    blocks: Float32
    importance: Float32
    grid: Grid
    symmetric: bool
    best: tuple[Float32, Int32]
    errors: Float32

    @classmethod
    def of(
        cls, weight: Array, piece: _RowPiece, grid: Grid, symmetric: bool
    ) -> _GridSearch:
        """Cut rows into blocks."""
        rows, inputs = weight.shape
        groups, width = grid.scale.shape[1], grid.block or inputs
        padded = np.zeros((rows, groups * width), np.float32)
        padded[:, :inputs] = weight
        shares = np.zeros((1 if piece.gram is None else rows, groups * width))
        shares[:, :inputs] = 1.0
        if piece.gram is not None:
            diagonal = np.maximum(np.einsum("gii->gi", piece.gram), 0.0)
            mean = diagonal.mean(axis=1, keepdims=True)
            # Inputs that are always zero count a little: they choose the grid of a row
            # whose other weights are all zero.
            diagonal = np.where(mean > 0, diagonal / np.where(mean > 0, mean, 1), 1.0)
            each = rows // len(piece.gram)
            shares[:, :inputs] = np.repeat(diagonal + 1e-6, each, axis=0)
        empty = np.zeros((rows, groups), np.float32)
        return cls(
            padded.reshape(rows, groups, width),
            shares.astype(np.float32).reshape(-1, groups, width),
            grid,
            symmetric,
            (empty + 1, empty.astype(np.int32)),
            empty,
        )

    @property
    def few(self) -> bool:
        """Whether codes are -1, (0) and 1; no range tells their scale."""
        return self.grid.high - self.grid.low == 2 and self.symmetric

    def start(self) -> tuple[Float32, Float32]:
        """Set the best grid to that of the whole range and return the range."""
        low, high = self.blocks.min(axis=2), self.blocks.max(axis=2)
        if self.few:
            count = np.count_nonzero(self.importance[:1], axis=2)
            size = np.abs(self.blocks)
            high = (size.sum(axis=2, dtype=np.float64) / count).astype(np.float32)
            if self.grid.step == 1:
                large = size > 0.7 * high[:, :, None]
                total = np.where(large, size, 0).sum(axis=2, dtype=np.float64)
                high = (total / np.maximum(large.sum(axis=2), 1)).astype(np.float32)
            low = -high
        self.best = _affine(low, high, self.grid, self.symmetric)
        return low, high

    def codes(self, scale: Float32, zero: Int32) -> Float32:
        """Nearest codes of all weights, float32, less the zero point."""
        codes = _codes(self.blocks, scale[:, :, None], zero[:, :, None], self.grid)
        codes -= zero[:, :, None]
        return codes

    def measure(self, codes: Float32, scale: Float32) -> Float32:
        """Squared error of each block."""
        change = codes * scale[:, :, None]
        change -= self.blocks
        np.square(change, out=change)
        if len(self.importance) == 1:
            return np.asarray(np.einsum("ogb,gb->og", change, self.importance[0]))
        return np.asarray(np.einsum("ogb,ogb->og", change, self.importance))

    def offer(self, scale: Float32, zero: Int32) -> Array:
        """Take a grid in the blocks where it is better; return which these are."""
        errors = self.measure(self.codes(scale, zero), scale)
        better = errors < self.errors
        self.best = (
            np.where(better, scale, self.best[0]),
            np.where(better, zero, self.best[1]),
        )
        self.errors = np.where(better, errors, self.errors)
        return better

    def mse(self, ranges: tuple[Float32, Float32]) -> None:
        """Search the share of the range with the smallest squared error."""
        low, high = ranges
        self.errors = self.measure(self.codes(*self.best), self.best[0])
        coarse, fine = _shares(self.grid, self.few)
        chosen = np.ones(low.shape, np.float32)

        def offer(share: Float32) -> None:
            nonlocal chosen
            scale, zero = _affine(low * share, high * share, self.grid, self.symmetric)
            chosen = np.where(self.offer(scale, zero), share, chosen)

        for share in coarse:
            offer(np.full(low.shape, share, np.float32))
        middle = chosen
        for step in fine:
            offer(np.maximum(middle + np.float32(step), np.float32(0.01)))
        for _ in range(2):
            self.offer(self.refitted(self.blocks), self.best[1])

    def refitted(self, target: Float32) -> Float32:
        """Return the least-squares scale for the codes of the best grid."""
        codes = self.codes(*self.best)
        above = np.einsum("ogb,ogb->og", codes * self.importance, target)
        below = np.einsum("ogb,ogb->og", codes * self.importance, codes)
        usable = (below > 0) & (above > 0)
        with np.errstate(over="ignore"):
            found = above / np.where(usable, below, 1)
        usable &= np.isfinite(found)
        return _positive(np.where(usable, found, self.best[0]))

    def hqq(self, ranges: tuple[Float32, Float32]) -> None:
        """Half-quadratic splitting: outliers, then the grid of what is left.

        Everything is in units of the scale, so that shrinkage does not depend on the
        size of the weights.
        """
        power, beta = 0.7, 4.0
        scale, zero = self.best
        unit = scale
        best, found = np.full(scale.shape, np.inf, np.float32), self.best
        mask = (self.importance > 0).astype(np.float32)
        for _ in range(20):
            codes = self.codes(scale, zero)
            rest = (self.blocks - codes * scale[:, :, None]) / unit[:, :, None]
            size = np.abs(rest)
            # size ** (power - 1); exp and log are vectorised where pow is not.
            with np.errstate(divide="ignore"):
                slope = np.exp(np.float32(power - 1) * np.log(size))
            lost = np.where(size > 0, size * slope, 0)
            loss = np.einsum("ogb,ogb->og", lost, np.broadcast_to(mask, size.shape))
            better = loss < best
            best = np.where(better, loss, best)
            found = np.where(better, scale, found[0]), np.where(better, zero, found[1])
            self.best = scale, zero
            kept = np.maximum(size - slope / np.float32(beta), 0.0)
            outliers = np.copysign(kept, rest) * unit[:, :, None]
            target = (self.blocks - outliers).astype(np.float32)
            if not self.symmetric:
                raw = codes + zero[:, :, None] - target / scale[:, :, None]
                count = mask.sum(axis=2)
                shift = np.einsum("ogb,ogb->og", raw, np.broadcast_to(mask, raw.shape))
                shift = np.clip(shift / count, self.grid.low, self.grid.high)
                zero = np.rint(shift).astype(np.int32)
                self.best = scale, zero
            scale = self.refitted(target)
            beta *= 1.05
        self.best = found


def _shares(grid: Grid, few: bool) -> tuple[Float64, Float64]:
    """Shares of the range to try first, and steps around the best of them."""
    levels = (grid.high - grid.low) // grid.step + 1
    if few:
        coarse = np.linspace(0.5, 1.5, 11)
    else:
        # The fewer the levels, the more clipping pays: at 8 bits hardly any.
        least = min(0.6, max(0.15, 0.075 * math.log2(levels)))
        coarse = np.linspace(1.0, least, 13)[1:]
    width = abs(float(coarse[1] - coarse[0]))
    return coarse, np.array([-0.67, -0.33, 0.33, 0.67]) * width


def _learn(weight: Array, grid: Grid, gram: Float64, symmetric: bool) -> None:
    """Improve the ranges of a grid by the output error, group by group, in place.

    While the other groups stay, the error of a change ``d`` in group ``b`` is
    ``d G_bb d^T + 2 d r^T``. Here ``r`` is what the changes of the other groups, times
    ``G``, add in group ``b``.
    """
    inputs = weight.shape[1]
    width = grid.block or inputs
    before = replace(grid, scale=grid.scale.copy(), zero=grid.zero.copy())
    for piece in _pieces(weight, gram):
        assert piece.gram is not None
        wide = piece.stacked(weight[piece.rows].astype(np.float32))
        part = grid.rows(piece.rows)
        matrix = _unit(piece.gram).astype(np.float32)
        change = piece.stacked(decode(nearest(weight[piece.rows], part), part)) - wide
        sent = change @ matrix
        for sweep in range(2):
            for number, start in enumerate(range(0, inputs, width)):
                at = slice(start, min(start + width, inputs))
                fresh = _learned_group(
                    wide[:, :, at],
                    part,
                    number,
                    matrix[:, at, at],
                    sent[:, :, at] - change[:, :, at] @ matrix[:, at, at],
                    symmetric,
                    sweep,
                )
                sent += (fresh - change[:, :, at]) @ matrix[:, at, :]
                change[:, :, at] = fresh
    # The search summed in float32; sums in float64 confirm it.
    after_errors = _row_errors(weight, nearest(weight, grid), grid, gram)
    before_errors = _row_errors(weight, nearest(weight, before), before, gram)
    worse = (after_errors > before_errors)[:, None]
    grid.scale[:] = np.where(worse, before.scale, grid.scale)
    grid.zero[:] = np.where(worse, before.zero, grid.zero)


def _learned_group(
    wide: Float32,
    grid: Grid,
    number: int,
    matrix: Float32,
    sent: Array,
    symmetric: bool,
    sweep: int,
) -> Float32:
    """Choose one group's range anew; return the change of its weights."""
    shape = wide.shape[:2]
    scale = grid.scale[:, number].reshape(shape)
    zero = grid.zero[:, number].reshape(shape)

    def changed(scale: Float32, zero: Int32) -> Float32:
        codes = _codes(wide, scale[:, :, None], zero[:, :, None], grid)
        codes -= zero[:, :, None]
        codes *= scale[:, :, None]
        codes -= wide
        return codes

    best = changed(scale, zero)

    def cost(change: Float32) -> Float32:
        return np.asarray(np.einsum("goi,goi->go", change, change @ matrix + 2 * sent))

    least = cost(best)
    low = (grid.low - zero) * scale
    high = (grid.high - zero) * scale
    ends = [(1, 1)] if symmetric else [(1, 1), (1, 0), (0, 1)]
    step = (0.06, 0.015)[sweep]
    for moves_low, moves_high in ends:
        for factor in 1 + step * np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32):
            if symmetric:
                found = _positive(scale * factor), zero
            else:
                found = _affine(
                    low * (factor if moves_low else 1),
                    high * (factor if moves_high else 1),
                    grid,
                    False,
                )
            change = changed(*found)
            costs = cost(change)
            better = costs < least
            least = np.where(better, costs, least)
            best = np.where(better[:, :, None], change, best)
            scale_, zero_ = grid.scale[:, number], grid.zero[:, number]
            chosen = better.reshape(-1)
            scale_[chosen] = found[0].reshape(-1)[chosen]
            zero_[chosen] = found[1].reshape(-1)[chosen]
        scale = grid.scale[:, number].reshape(shape).copy()
        zero = grid.zero[:, number].reshape(shape).copy()
        low, high = (grid.low - zero) * scale, (grid.high - zero) * scale
    return best


def _unit(gram: Float64) -> Float64:
    """Scale Gram matrices to a mean diagonal of 1."""
    mean = np.einsum("gii->g", gram) / max(1, gram.shape[1])
    return gram / np.where(mean > 0, mean, 1.0)[:, None, None]


# --- choosing codes -------------------------------------------------------------------

Factors = tuple[Float64, NDArray[np.intp]]
"""What ``gptq`` needs of a Gram matrix: ``U`` with ``G^-1 = U^T U`` for ``G`` in the
order of its columns, [stacks, inputs, inputs], and that order, [stacks, inputs]."""


@one_thread
def factors_of(
    gram: Float64, *, act_order: bool = True, damping: float = DAMPING
) -> Factors:
    """Factor a Gram matrix for all layers that read the same inputs.

    Args:
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        act_order: As for ``gptq``.
        damping: As for ``gptq``.

    Raises:
        ModelError: An entry is not finite.
        UsageError: ``damping`` is negative.
    """
    _check_damping(damping)
    stack = gram[None] if gram.ndim == 2 else gram
    _check_finite(stack)
    return _factors(stack, act_order, damping)


@one_thread
def gptq(
    weight: Array,
    gram: Float64,
    grid: Grid,
    *,
    act_order: bool = True,
    damping: float = DAMPING,
    factors: Factors | None = None,
) -> Int32:
    """Round column by column, letting those that follow make up for the error.

    Frantar et al. 2023, "GPTQ", algorithm 1, with the upper Cholesky factor ``U`` of
    the damped ``G^-1``: each column's error is divided by its diagonal entry of ``U``
    and multiplied by the entries to the right of that; the columns to the right are
    lowered by the product, in lazy blocks. The grid is fixed beforehand, so columns may
    go in any order.

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        grid: The grid.
        act_order: Take inputs with large squares first.
        damping: Share of the mean diagonal that is added to it.
        factors: What ``factors_of`` gives for ``gram``, if it is known.

    Returns:
        Codes, int32 [rows, inputs]. A row that has a larger error than rounded to
        nearest is rounded to nearest. Weights that are zero stay zero.

    Raises:
        ModelError: A weight or an entry of ``gram`` is not finite.
        UsageError: Shapes do not fit.
    """
    stack = _check(weight, gram, grid)
    assert stack is not None
    _check_damping(damping)
    result = np.empty(weight.shape, np.int32)
    inputs = weight.shape[1]
    known = factors
    for piece in _pieces(weight, stack):
        assert piece.gram is not None
        if known is not None and len(stack) == 1:
            factors = known
        elif factors is None or len(stack) > 1:
            factors = _factors(piece.gram, act_order, damping)
        result[piece.rows] = _columnwise(
            piece.stacked(weight[piece.rows]),
            *factors,
            grid.rows(piece.rows),
        ).reshape(-1, inputs)
    return _no_worse(weight, result, grid, stack)


def _factors(
    gram: Float64, act_order: bool, damping: float
) -> tuple[Float64, NDArray[np.intp]]:
    """Return ``U`` with ``G^-1 = U^T U``, for permuted ``G``, and the order."""
    stacks, inputs, _ = gram.shape
    diagonal = np.einsum("gii->gi", gram)
    order = np.broadcast_to(np.arange(inputs), (stacks, inputs))
    if act_order:
        order = np.argsort(-diagonal, axis=1, kind="stable")
    which = np.arange(stacks)[:, None, None]
    turned = gram[which, order[:, :, None], order[:, None, :]]
    if inputs <= _SMALL and stacks > 1:
        with suppress(np.linalg.LinAlgError):
            return _uppers(turned, damping), order
    for index, matrix in enumerate(turned):
        turned[index] = _upper(matrix, damping)
    return turned, order


def _uppers(gram: Float64, damping: float) -> Float64:
    """Return what ``_upper`` does, for many small matrices at a time.

    Raises:
        LinAlgError: One of them needs more damping.
    """
    matrix = gram.copy()
    diagonal = np.einsum("gii->gi", matrix)
    live = diagonal > 0
    count = live.sum(axis=1, keepdims=True)
    mean = diagonal.sum(axis=1, keepdims=True, where=live) / np.maximum(count, 1)
    mean = np.where(count > 0, mean, 1.0)
    matrix[~live.any(axis=1)] = 0.0
    diagonal[...] = np.where(live, diagonal, mean) + damping * mean
    lower = np.linalg.cholesky(matrix[:, ::-1, ::-1])
    inverse = np.linalg.inv(lower[:, ::-1, ::-1])
    # Where all inputs are always zero, every column stands alone.
    inverse[~live.any(axis=1)] = np.eye(gram.shape[1])
    return np.triu(inverse)


def _upper(gram: Float64, damping: float) -> Float64:
    """Return upper ``U`` with ``(G + damping)^-1 = U^T U``.

    From ``J G J = L L^T`` with ``J`` the reversal follows ``G = R R^T`` with upper
    ``R = J L J``, and ``U = R^-1``: the inverse itself is never formed.
    """
    matrix = gram.copy()
    diagonal = np.einsum("ii->i", matrix)
    live = diagonal > 0
    if not live.any():
        return np.eye(len(gram))
    extra = damping * float(diagonal[live].mean())
    # An input that is always zero does not interact with the others.
    diagonal[~live] = float(diagonal[live].mean())
    diagonal += extra
    extra = max(extra, 1e-10 * float(diagonal.mean()))
    while True:
        lower, failed = lapack.dpotrf(matrix[::-1, ::-1], lower=1)
        if not failed:
            break
        diagonal += extra
        extra *= 10
    root = np.ascontiguousarray(lower[::-1, ::-1])
    inverse, _ = lapack.dtrtri(root, lower=0)
    return np.triu(inverse)


def _columnwise(
    weight: Array, upper: Float64, order: NDArray[np.intp], grid: Grid
) -> Int32:
    """Round [stacks, rows, inputs] column by column in the given order.

    A weight that is zero was pruned. It stays zero, and the columns to the right make
    up for it as for any other error.
    """
    stacks, rows, inputs = weight.shape
    # Columns lie one behind the other, so that one is worked on in one go.
    turned = np.swapaxes(weight, 1, 2).astype(np.float64)
    left = np.take_along_axis(turned, order[:, :, None], axis=1)
    held = left == 0
    groups = order // grid.block if grid.block else np.zeros_like(order)
    scales = np.swapaxes(grid.scale.reshape(stacks, rows, -1), 1, 2)
    zeros = np.swapaxes(grid.zero.reshape(stacks, rows, -1), 1, 2)
    codes = np.empty(left.shape, np.int32)
    which = np.arange(stacks)
    for start in range(0, inputs, _COLUMNS):
        stop = min(start + _COLUMNS, inputs)
        errors = np.empty((stacks, stop - start, rows))
        for at in range(start, stop):
            scale = scales[which, groups[:, at]].astype(np.float64)
            zero = zeros[which, groups[:, at]]
            code = _codes(left[:, at], scale, zero, grid)
            np.copyto(code, zero, where=held[:, at] & _has_zero(zero, grid))
            codes[:, at] = code
            lost = left[:, at] - (code - zero) * scale
            lost /= upper[:, at, at, None]
            errors[:, at - start] = lost
            if at + 1 < stop:
                share = upper[:, at, at + 1 : stop, None]
                left[:, at + 1 : stop] -= share * lost[:, None, :]
        behind = np.swapaxes(upper[:, start:stop, stop:], 1, 2)
        left[:, stop:] -= behind @ errors
    found = np.empty_like(codes)
    np.put_along_axis(found, order[:, :, None], codes, axis=1)
    return np.swapaxes(found, 1, 2)


def _has_zero(zero: Array, grid: Grid) -> Array:
    """Whether a code stands for zero."""
    inside = (grid.low <= zero) & (zero <= grid.high)
    return np.asarray(inside & ((zero - grid.low) % grid.step == 0))


def _no_worse(weight: Array, codes: Int32, grid: Grid, gram: Float64) -> Int32:
    """Round rows to nearest where the codes are worse than that."""
    plain = nearest(weight, grid)
    worse = _row_errors(weight, codes, grid, gram) > _row_errors(
        weight, plain, grid, gram
    )
    codes[worse] = plain[worse]
    return codes


@one_thread
def descend(
    weight: Array,
    gram: Float64,
    grid: Grid,
    codes: Int32 | None = None,
    *,
    sweeps: int = 8,
    damping: float = DAMPING,
) -> Int32:
    """Improve codes by exact coordinate descent on the output error.

    While all other codes stay, the error is a parabola in one code, so the best value
    on the grid is known. Columns take turns, all rows at once, until no code moves
    (Behdin et al. 2023, "QuantEase", section 3). The damped error never rises. Damping
    keeps the codes from fitting the noise of few samples.

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        grid: The grid.
        codes: Where to start; ``None``: from rounding to nearest.
        sweeps: Turns of all columns at most.
        damping: Share of the mean diagonal that is added to it.

    Returns:
        Codes, int32 [rows, inputs]. A row that has a larger error than rounded to
        nearest is rounded to nearest. Weights that are zero stay zero.

    Raises:
        ModelError: A weight or an entry of ``gram`` is not finite.
        UsageError: Shapes do not fit.
    """
    stack = _check(weight, gram, grid)
    assert stack is not None
    _check_damping(damping)
    start = nearest(weight, grid) if codes is None else codes
    result = np.empty(weight.shape, np.int32)
    for piece in _pieces(weight, stack):
        assert piece.gram is not None
        found = _descended(
            piece.stacked(weight[piece.rows]),
            piece.stacked(start[piece.rows]),
            _unit(piece.gram) + damping * np.eye(weight.shape[1]),
            grid.rows(piece.rows),
            sweeps,
        )
        result[piece.rows] = found.reshape(-1, weight.shape[1])
    return _no_worse(weight, result, grid, stack)


def _descended(
    weight: Array, codes: Int32, gram: Float64, grid: Grid, sweeps: int
) -> Int32:
    """Descend from codes [stacks, rows, inputs]."""
    stacks, rows, inputs = weight.shape
    scales, zeros = (
        np.swapaxes(array.reshape(stacks, rows, -1), 1, 2)
        for array in (grid.scale.astype(np.float64), grid.zero)
    )
    target = np.swapaxes(weight, 1, 2).astype(np.float64)
    now = np.swapaxes(codes, 1, 2).astype(np.float64)
    held = target == 0
    width = grid.block or inputs
    wide = np.arange(inputs) // width
    change = (now - zeros[:, wide]) * scales[:, wide] - target
    sent = gram @ change
    diagonal = np.einsum("gii->gi", gram)
    for _ in range(sweeps):
        moved = False
        for start in range(0, inputs, _COLUMNS):
            stop = min(start + _COLUMNS, inputs)
            moves = np.zeros((stacks, stop - start, rows))
            for at in range(start, stop):
                scale, zero = scales[:, at // width], zeros[:, at // width]
                curve = diagonal[:, at, None]
                # The parabola's lowest point, as a real weight, then on the grid.
                pull = sent[:, at] / np.where(curve > 0, curve, 1.0)
                best = target[:, at] + change[:, at] - pull
                code = _codes(best, scale, zero, grid)
                free = (curve > 0) & ~(held[:, at] & _has_zero(zero, grid))
                move = np.where(free, (code - now[:, at]) * scale, 0.0)
                # Ties would move back and forth for ever.
                gain = -move * (2 * sent[:, at] + curve * move)
                move[gain <= 1e-12 * curve * scale**2] = 0.0
                if not move.any():
                    continue
                moved = True
                now[:, at] = np.where(move != 0, code, now[:, at])
                change[:, at] += move
                moves[:, at - start] = move
                share = gram[:, at, start:stop, None]
                sent[:, start:stop] += share * move[:, None, :]
            if moves.any():
                for part in (slice(0, start), slice(stop, inputs)):
                    sent[:, part] += gram[:, part, start:stop] @ moves
        if not moved:
            break
    return np.swapaxes(now, 1, 2).astype(np.int32)


@one_thread
def adaround(
    weight: Array,
    gram: Float64,
    grid: Grid,
    *,
    iterations: int = 500,
    rate: float = 0.02,
    strength: float = 0.02,
) -> Int32:
    """Learn for each weight whether it is rounded up or down.

    Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
    section 3.2: the weight is ``scale * (floor(w / scale) + h(V))`` with the rectified
    sigmoid ``h``, and ``V`` minimises the output error plus
    ``strength * sum(1 - |2 h - 1|^beta)``, with beta falling from 20 to 2 after the
    first fifth of the iterations. The error is the quadratic form of the Gram matrix,
    so no batches are drawn; the optimizer is Adam (Kingma and Ba 2015). ``descend``
    from ``gptq`` usually finds a smaller error in less time.

    Args:
        weight: Float [rows, inputs].
        gram: float64 [inputs, inputs] or [stacks, inputs, inputs].
        grid: The grid, with ``step`` 1.
        iterations: Steps of Adam.
        rate: Its learning rate.
        strength: Of the regularisation, where the error is in units of the scale.

    Returns:
        Codes, int32 [rows, inputs]. A row that has a larger error than rounded to
        nearest is rounded to nearest. Weights that are zero stay zero.

    Raises:
        ModelError: A weight or an entry of ``gram`` is not finite.
        UsageError: Shapes do not fit, or the grid is binary.
    """
    stack = _check(weight, gram, grid)
    assert stack is not None
    if grid.step != 1:
        raise UsageError("binary weights are not rounded up or down; use descend")
    result = np.empty(weight.shape, np.int32)
    for piece in _pieces(weight, stack):
        assert piece.gram is not None
        found = _learned_rounding(
            piece.stacked(weight[piece.rows].astype(np.float32)),
            _unit(piece.gram).astype(np.float32),
            grid.rows(piece.rows),
            _AdaRoundSchedule(iterations, rate, strength),
        )
        result[piece.rows] = found.reshape(-1, weight.shape[1])
    return _no_worse(weight, result, grid, stack)


@dataclass(frozen=True)
class _AdaRoundSchedule:
    """How AdaRound learns."""

    iterations: int
    rate: float
    strength: float

    def beta(self, iteration: int) -> float:
        """Exponent of the regularisation; 0 during the warm-up: none."""
        warm = self.iterations // 5
        if iteration < warm:
            return 0.0
        done = (iteration - warm) / max(1, self.iterations - warm)
        return 2.0 + 9.0 * (1.0 + math.cos(math.pi * done))


_LOW, _HIGH = np.float32(-0.1), np.float32(1.1)
"""The sigmoid is stretched over these and cut to [0, 1] (Louizos et al. 2018)."""


def _learned_rounding(
    weight: Float32, gram: Float32, grid: Grid, schedule: _AdaRoundSchedule
) -> Int32:
    """AdaRound of [stacks, rows, inputs]."""
    stacks, rows, inputs = weight.shape
    scale, zero = (
        np.broadcast_to(array, (stacks * rows, inputs)).reshape(weight.shape)
        for array in grid.columns(inputs)
    )
    # Errors are in units of the mean scale of each row, since rows are independent.
    share = scale / scale.mean(axis=2, keepdims=True)
    exact = weight / scale
    floor = np.floor(exact)
    rest = np.clip((exact - floor - _LOW) / (_HIGH - _LOW), 1e-4, 1 - 1e-4)
    learned = np.log(rest / (1 - rest))
    least, most = grid.low - zero, grid.high - zero
    first, second = np.zeros_like(learned), np.zeros_like(learned)
    for iteration in range(schedule.iterations):
        sigmoid = 1 / (1 + np.exp(-learned))
        raw = sigmoid * (_HIGH - _LOW) + _LOW
        up = np.clip(raw, 0, 1)
        codes = floor + up
        free = (raw > 0) & (raw < 1) & (codes >= least) & (codes <= most)
        change = (np.clip(codes, least, most) - exact) * share
        slope = 2 * (change @ gram) * share
        beta = schedule.beta(iteration)
        if beta:
            away = 2 * up - 1
            pull = np.abs(away) ** np.float32(beta - 1) * np.sign(away)
            slope -= np.float32(2 * beta * schedule.strength) * pull
        slope *= sigmoid * (1 - sigmoid) * (_HIGH - _LOW)
        slope *= free
        first += np.float32(0.1) * (slope - first)
        second += np.float32(0.001) * (np.square(slope) - second)
        count = iteration + 1
        size = schedule.rate * math.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        learned -= np.float32(size) * first / (np.sqrt(second) + np.float32(1e-8))
    codes = np.where(weight == 0, 0, floor + (learned >= 0))
    return np.asarray(np.clip(codes + zero, grid.low, grid.high), np.int32)
