"""Least squares of a layer's outputs: arrays in, arrays out.

``RegressionSums`` holds what the normal equations need (Golub and Van Loan 2013,
section 5.3): ``X^T X`` of the inputs that a layer reads, ``X^T E`` of what its outputs
miss, ``E = Y_wanted - Y``, and their means. A ``Problem`` says what of the layer may
change. ``solve`` returns the new values, if they lower the error on samples that were
held out.

``FactorProblem`` is for a layer that was written as a product of several: its factors
are fitted jointly, by alternating least squares. With all others fixed the outputs are
linear in one factor, so each step is a least-squares problem in closed form; it is
solved by Cholesky where the outputs do not depend on each other, else by conjugate
gradients from where the factor stands. No step makes the error larger.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from onnxshrink.errors import ModelError
from onnxshrink.solvers.obs import Curvature, refit
from onnxshrink.solvers.threads import one_thread

__all__ = [
    "BiasProblem",
    "Factor",
    "FactorProblem",
    "NormProblem",
    "Problem",
    "RegressionSums",
    "ScaleProblem",
    "Solution",
    "WeightProblem",
    "compose",
    "solve",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

SWEEPS = 30
"""Rounds of alternating least squares over all factors, at most."""
STEPS = 40
"""Steps of conjugate gradients for one factor in one round, at most."""
_SETTLED = 1e-4
"""A round that lowers the squared error by a smaller share is the last."""
_CLOSE = 1e-7
"""Conjugate gradients stop where the squared residual is this share of the first."""
_FEW = 512
"""Free entries in a row of a factor up to which each row has a system of its own."""
_DIRECT = 3072
"""Free entries of a factor up to which all are solved for at once."""
_EXACT = 1e-10
"""A share of the outputs' variance below which a layer gives what it should."""


@dataclass(eq=False)
class RegressionSums:
    """Sums over rows of inputs ``x`` and of what outputs miss, ``e``.

    Products are made in float32 over the rows of one call and summed in float64.

    Attributes:
        rows: Number of rows.
        gram: Sum of ``x x^T``, float64 [groups, inputs, inputs].
        cross: Sum of ``x e^T``, float64 [groups, inputs, outputs].
        inputs: Sum of ``x``, float64 [groups, inputs].
        errors: Sum of ``e``, float64 [groups, outputs].
        squares: Sum of ``e^2``, float64 [groups, outputs].
        wanted: Sum of the outputs as they should be, float64 [groups, outputs].
        energy: Sum of their squares, float64 [groups, outputs].
        why_not: Why nothing can be made of it; empty if something can.
    """

    rows: int = 0
    gram: Float64 = field(default_factory=lambda: np.zeros(0))
    cross: Float64 = field(default_factory=lambda: np.zeros(0))
    inputs: Float64 = field(default_factory=lambda: np.zeros(0))
    errors: Float64 = field(default_factory=lambda: np.zeros(0))
    squares: Float64 = field(default_factory=lambda: np.zeros(0))
    wanted: Float64 = field(default_factory=lambda: np.zeros(0))
    energy: Float64 = field(default_factory=lambda: np.zeros(0))
    why_not: str = ""

    @property
    def variance(self) -> float:
        """Variance of the outputs as they should be, summed over outputs."""
        rows = max(self.rows, 1)
        spread = self.energy / rows - np.square(self.wanted / rows)
        return float(np.maximum(spread, 0.0).sum())

    def add(self, x: Array, now: Array, wanted: Array) -> None:
        """Add rows.

        Args:
            x: Inputs, floats [groups, rows, inputs].
            now: Outputs as they are, floats [groups, rows, outputs].
            wanted: Outputs as they should be, of the same shape.

        Raises:
            ModelError: The number of inputs is not that of rows before.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            error = wanted - now
            across = np.swapaxes(x, 1, 2)
            parts = (
                ("gram", across @ x),
                ("cross", across @ error),
                ("inputs", x.sum(axis=1, dtype=np.float64)),
                ("errors", error.sum(axis=1, dtype=np.float64)),
                ("squares", np.square(error, dtype=np.float64).sum(axis=1)),
                ("wanted", wanted.sum(axis=1, dtype=np.float64)),
                ("energy", np.square(wanted, dtype=np.float64).sum(axis=1)),
            )
        for name, part in parts:
            before = getattr(self, name)
            if not self.rows:
                setattr(self, name, part.astype(np.float64))
            elif before.shape != part.shape:
                raise ModelError("the number of its inputs changes between batches")
            else:
                before += part
        self.rows += x.shape[1]

    def check_finite(self) -> None:
        """Note why nothing can be made of sums that are not finite."""
        parts = (self.gram, self.cross, self.energy)
        if not all(np.isfinite(part).all() for part in parts):
            self.why_not = "its values are not finite, or too large to be squared"

    def error(self, change: Float64, shift: Float64) -> float:
        """Return the mean squared output error after a change, summed over outputs.

        Args:
            change: What is added to the weights, [groups, outputs, inputs].
            shift: What is added to the outputs, [groups, outputs].
        """
        weights = np.swapaxes(change, 1, 2)
        total = self.squares - 2 * (weights * self.cross).sum(axis=1)
        total += (weights * (self.gram @ weights)).sum(axis=1)
        total += self.rows * shift * shift - 2 * shift * self.errors
        total += 2 * shift * np.einsum("goi,gi->go", change, self.inputs)
        return float(total.sum()) / max(self.rows, 1)

    @property
    def no_change(self) -> Float64:
        """Zeros [groups, outputs, inputs]."""
        return np.zeros(np.swapaxes(self.cross, 1, 2).shape)


# --- problems -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidate:
    """Values worth a try.

    Attributes:
        values: The values; ``None`` leaves all but the bias.
        change: What that changes of the weights, [groups, outputs, inputs].
        shift: What is added to the outputs, [groups, outputs].
    """

    values: Any
    change: Float64
    shift: Float64


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(ABC):
    """A layer, what is known of its inputs and outputs, and what may change.

    Attributes:
        fit: Sums over the samples that values are fitted to.
        held: Sums over the samples that judge them.
        shift: Whether the outputs may be shifted, through a bias.
    """

    fit: RegressionSums
    held: RegressionSums
    shift: bool

    @property
    def mean(self) -> Float64:
        """Mean inputs, [groups, inputs]."""
        return self.fit.inputs / self.fit.rows

    @property
    def missing(self) -> Float64:
        """Mean of what outputs miss, [groups, outputs]."""
        return self.fit.errors / self.fit.rows

    @abstractmethod
    def candidates(self) -> Iterator[Candidate]:
        """Yield values worth a try; a bias alone is tried anyway."""

    def centred(self) -> tuple[Float64, Float64]:
        """Return means of ``x x^T`` and ``x e^T``, around the mean if a bias is free.

        Returns:
            [groups, inputs, inputs] and [groups, inputs, outputs].
        """
        gram, cross = self.fit.gram / self.fit.rows, self.fit.cross / self.fit.rows
        if self.shift:
            gram = gram - self.mean[:, :, None] * self.mean[:, None, :]
            cross = cross - self.mean[:, :, None] * self.missing[:, None, :]
        return gram, cross

    def shift_for(self, change: Float64) -> Float64:
        """Return the shift that goes best with a change, [groups, outputs]."""
        if not self.shift:
            return np.zeros_like(self.missing)
        taken = np.einsum("goi,gi->go", change, self.mean)
        return np.asarray(self.missing - taken)


@dataclass(frozen=True, eq=False)
class Solution:
    """What is best.

    Attributes:
        values: New values, as the problem's class says; ``None`` leaves them.
        shift: What is added to the outputs, [groups, outputs]; ``None`` adds nothing.
        before: Output error on the samples that judge, as a share of the variance.
        after: The same with the new values.
        why_not: Why nothing should change.
    """

    values: Any = None
    shift: Float64 | None = None
    before: float = 0.0
    after: float = 0.0
    why_not: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        parts = self.values if isinstance(self.values, tuple) else (self.values,)
        return sum(part.nbytes for part in parts if part is not None)


@one_thread
def solve(problem: Problem) -> Solution:
    """Find the values that give the wanted outputs best, on samples held out.

    It is pure, and both the problem and its solution can be pickled.
    """
    fit, held = problem.fit, problem.held
    why = fit.why_not or held.why_not
    if why or not fit.rows or not held.rows:
        return Solution(why_not=why or "nothing was seen of it")
    variance = max(held.variance, 1e-300)
    before = held.error(held.no_change, np.zeros(held.errors.shape)) / variance
    if before < _EXACT:
        return Solution(
            why_not=f"it gives what it gave in the reference ({before:.1g})"
        )
    best = Solution(
        before=before,
        after=before,
        why_not=f"its error of {before:.3%} on held-out samples would not fall",
    )
    for made in _with_bias_alone(problem):
        after = held.error(made.change, made.shift) / variance
        if after < best.after * (1 - 1e-6):
            shift = made.shift if problem.shift else None
            best = Solution(made.values, shift, before, after)
    return best


def _with_bias_alone(problem: Problem) -> Iterator[Candidate]:
    yield from problem.candidates()
    if problem.shift:
        yield Candidate(None, problem.fit.no_change, problem.missing)


@dataclass(frozen=True, eq=False, kw_only=True)
class BiasProblem(Problem):
    """Nothing but the bias may change."""

    def candidates(self) -> Iterator[Candidate]:
        """Yield nothing: the bias alone is tried anyway."""
        return iter(())


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleProblem(Problem):
    """What multiplies each output may change: the scale of codes.

    Groups are outputs, and the one input of each is the output as it is. The values of
    a solution are factors, float64 [outputs], all above 0.

    Attributes:
        is_pooled: Whether one factor serves all outputs.
    """

    is_pooled: bool

    def candidates(self) -> Iterator[Candidate]:
        """Yield least squares of wanted on given outputs, with and without a shift."""
        fit = self.fit
        square, product = (
            m[:, 0] / fit.rows for m in (fit.gram[..., 0], fit.cross[..., 0])
        )
        for with_shift in (True, False) if self.shift else (False,):
            spread, along = square[:, None], product[:, None]
            if with_shift:
                spread = spread - self.mean * self.mean
                along = along - self.mean * self.missing
            if self.is_pooled:
                spread, along = spread.sum(keepdims=True), along.sum(keepdims=True)
            change = np.where(spread > 1e-12 * square.max(), along, 0.0)
            change = change / np.maximum(spread, 1e-300)
            change = np.where(change > -0.9, change, 0.0)  # scales stay positive
            change = np.broadcast_to(change, self.mean.shape)
            shift = np.zeros_like(self.missing)
            if with_shift:
                shift = self.missing - change * self.mean
            yield Candidate(1 + change[:, 0], change[:, :, None].copy(), shift)


@dataclass(frozen=True, eq=False, kw_only=True)
class NormProblem(Problem):
    """Mean and variance of a BatchNormalization may change.

    Groups are channels, and the one input of each is what the node reads. The values of
    a solution are [2, channels]: mean and variance.

    Attributes:
        parameters: Scale, bias, mean, variance and epsilon, float64 [5, channels].
        dtype: Of mean and variance.
    """

    parameters: Float64
    dtype: np.dtype[Any]

    def candidates(self) -> Iterator[Candidate]:
        """Yield the statistics of what the node reads now."""
        scale, _, old_mean, old_variance, epsilon = self.parameters
        fresh_mean = self.mean[:, 0]
        spread = self.fit.gram[:, 0, 0] / self.fit.rows - np.square(fresh_mean)
        new = np.stack([fresh_mean, np.maximum(spread, 0.0)]).astype(self.dtype)
        new_mean, new_variance = new.astype(np.float64)
        before = scale / np.sqrt(old_variance + epsilon)
        after = scale / np.sqrt(new_variance + epsilon)
        shift = before * old_mean - after * new_mean
        if np.isfinite(after).all() and np.isfinite(shift).all():
            yield Candidate(new, (after - before)[:, None, None], shift[:, None])


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightProblem(Problem):
    """All weights that are not zero may change.

    Attributes:
        weights: The weights, floats [groups, outputs, inputs].
        ridge: Keeps weights near what they are: this share of the inputs' mean square
            is added to each.
        factor: What the layer multiplies products of inputs and weights with.
    """

    weights: Array
    ridge: float
    factor: float = 1.0

    def candidates(self) -> Iterator[Candidate]:
        """Yield the weights that fit best; zeros stay zeros."""
        old = self.weights
        if old.shape != self.fit.no_change.shape:
            return
        keep = old != 0
        gram, cross = self.centred()
        dead = _dead(self.fit.gram)
        wide = old.astype(np.float64)
        change = np.zeros(old.shape)
        for group, matrix in enumerate(gram):
            change[group] = _fitted(
                matrix, cross[group], keep[group], dead[group], self.ridge
            )
        # -0.0 + 0.0 is 0.0: what is zero stays the zero that compresses best.
        new = np.where(keep, wide + change / self.factor, 0.0).astype(old.dtype) + 0
        new = new.astype(old.dtype)
        moved = (new.astype(np.float64) - wide) * self.factor
        if np.isfinite(moved).all():
            yield Candidate(new, moved, self.shift_for(moved))


def _dead(gram: Float64) -> Mask:
    """Return which inputs were always zero, [groups, inputs]."""
    squares = np.einsum("gii->gi", gram)
    dead: Mask = squares <= 1e-12 * squares.max(axis=1, initial=0.0, keepdims=True)
    return dead


def _fitted(
    gram: Float64, wanted: Float64, keep: Mask, dead: Mask, ridge: float
) -> Float64:
    """Minimise ``tr(D G D^T) - 2 tr(D C) + damping |D|^2`` over ``D`` where it is free.

    Args:
        gram: ``G``, [inputs, inputs].
        wanted: ``C``, [inputs, outputs].
        keep: Which entries are free, [outputs, inputs].
        dead: Inputs that were always zero.
        ridge: The damping, as a share of the mean diagonal of ``G``.
    """
    matrix, factor = _damped(gram, dead, ridge)
    free, _ = lapack.dpotrs(factor, wanted, lower=1)
    best = np.asarray(free).T
    if keep.all():
        return best
    change = np.zeros(keep.shape)
    if (keep == keep[0]).all():
        at = np.flatnonzero(keep[0])
        if at.size:
            _, found, _ = lapack.dposv(matrix[np.ix_(at, at)], wanted[at], lower=1)
            change[:, at] = found.T
        return change
    # The distance to the free optimum in the metric of ``matrix`` is what is left.
    curvature = Curvature(matrix[None], dead[None])
    return np.asarray(refit(best[None], curvature, keep[None])[0])


def _damping(gram: Float64, dead: Mask, ridge: float) -> float:
    """Return a share of the mean diagonal of a Gram matrix."""
    diagonal = np.einsum("ii->i", gram)
    live = max(int((~dead).sum()), 1)
    return ridge * max(float(diagonal[~dead].sum()), 0.0) / live


def _damped(gram: Float64, dead: Mask, ridge: float) -> tuple[Float64, Float64]:
    """Return a damped Gram matrix and its lower Cholesky factor."""
    matrix = gram.copy()
    diagonal = np.einsum("ii->i", matrix)
    top = float(diagonal.max(initial=0.0))
    diagonal += _damping(gram, dead, ridge)
    diagonal[dead] += 1.0
    extra = 1e-10 * max(top, 1e-30)
    while True:
        factor, failed = lapack.dpotrf(matrix, lower=1)
        if not failed:
            return matrix, np.asarray(factor)
        diagonal += extra
        extra *= 10


# --- several factors of one layer -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class Factor:
    """One of several matrices, or kernels, whose product a layer is.

    A kernel is one matrix for each tap. The axes of taps are those of the kernel that
    the product has; along each, at most one factor has more than one tap. Kernels of
    single channels (depthwise, groups) are matrices with zeros that are not free.

    Attributes:
        values: [*taps, outputs, inputs], floats.
        free: Which of them may change, of the same shape.
    """

    values: Array
    free: Mask

    @property
    def taps(self) -> tuple[int, ...]:
        """Taps along each axis."""
        return tuple(int(size) for size in self.values.shape[:-2])


def compose(factors: list[Float64]) -> Float64:
    """Return the product of factors, the one that runs first coming first.

    Args:
        factors: Each [*taps, outputs, inputs].

    Returns:
        [*taps, outputs, inputs]; an axis has the taps of the factor that has several.
    """
    whole = factors[0]
    for factor in factors[1:]:
        whole = factor @ whole
    return whole


@dataclass(frozen=True, eq=False, kw_only=True)
class FactorProblem(Problem):
    """The factors of one product may change, jointly.

    There is one group; the inputs of the sums are [inputs, *taps], flat. The values of
    a solution are a tuple: new values of each factor, in its dtype.

    Attributes:
        factors: The factors, the one that reads the inputs first.
        ridge: Keeps each factor near what it is: a share of the mean curvature.
    """

    factors: tuple[Factor, ...]
    ridge: float

    def candidates(self) -> Iterator[Candidate]:
        """Yield the factors after one round, and after all."""
        start = [factor.values.astype(np.float64) for factor in self.factors]
        gram, cross = (part[0] for part in self.centred())
        whole = compose(start)
        if whole[..., 0, :].size != len(gram) or whole.shape[-2] != cross.shape[1]:
            return
        rounds = _Alternation(self.factors, start, gram, cross, self.ridge)
        last = 0.0
        for number in range(SWEEPS):
            for index in reversed(range(len(start))):
                if self.factors[index].free.any():
                    rounds.improve(index)
            settled = rounds.gained - last <= _SETTLED * (rounds.most - last)
            if number == 0 or settled or number == SWEEPS - 1:
                candidate = self._rounded(rounds.now, whole)
                if candidate is not None:
                    yield candidate
            if settled:
                return
            last = rounds.gained

    def _rounded(self, now: list[Float64], before: Float64) -> Candidate | None:
        values = tuple(
            np.where(factor.free, new, factor.values).astype(factor.values.dtype)
            for factor, new in zip(self.factors, now, strict=True)
        )
        if not all(np.isfinite(part).all() for part in values):
            return None
        whole = compose([part.astype(np.float64) for part in values])
        change = _flat(whole - before)[None]
        return Candidate(values, change, self.shift_for(change))


def _flat(whole: Float64) -> Float64:
    """View [*taps, outputs, inputs] as [outputs, inputs * taps]."""
    moved = np.moveaxis(whole, (-2, -1), (0, 1))
    return moved.reshape(len(moved), -1)


class _Alternation:
    """Least squares for one factor after the other, all others as they are.

    ``G`` is the Gram matrix of the inputs, ``C`` their products with what outputs miss
    at the start. The loss of a change ``D`` of the product is
    ``tr(D G D^T) - 2 tr(D C)``, plus a damping for the distance of each factor from
    where it began.

    Attributes:
        now: The factors.
        gained: By how much the squared error is smaller than at the start.
        most: By how much it would be with a free kernel in place of the factors.
    """

    def __init__(
        self,
        factors: tuple[Factor, ...],
        start: list[Float64],
        gram: Float64,
        cross: Float64,
        ridge: float,
    ) -> None:
        self.now = list(start)
        self.gained = 0.0
        self._factors, self._start, self._ridge = factors, start, ridge
        self._gram, self._cross = gram, cross
        self._before = compose(start)
        self._taps = self._before.shape[:-2]
        self._start_image = self._times_gram()
        self._image = np.zeros_like(cross.T)
        _, lower = _damped(gram, _dead(gram[None])[0], 1e-6)
        best, _ = lapack.dpotrs(lower, cross, lower=1)
        self.most = float((np.asarray(best) * cross).sum())

    def improve(self, index: int) -> None:
        """Improve one factor."""
        old = self.now[index]
        mask = _rows(self._factors[index].free)
        away = _rows(old - self._start[index])
        seen, rest = self._read(index)
        if index + 1 == len(self.now):
            step = self._last(seen[0, :, 0], rest[:, 0], mask, away)
        else:
            behind = _listed(compose(self.now[index + 1 :]))
            weighing = np.einsum("boc,aod->bacd", behind, behind, optimize=True)
            wanted = np.einsum("boc,obf->cf", behind, rest, optimize=True)
            step = self._inner(seen, weighing, wanted, mask, away)
        self.now[index] = old + _back(step, old.shape)
        change = _flat(compose(self.now) - self._before)
        self._image = self._times_gram() - self._start_image
        self.gained = float((change * (2 * self._cross.T - self._image)).sum())

    def _times_gram(self) -> Float64:
        """Return the product of the factors times ``G``, [outputs, inputs * taps].

        Through the few values between the factors, where that is less work.
        """
        outputs, inputs = self._before.shape[-2:]
        taps, size = math.prod(self._taps), len(self._gram)
        first, rest = self.now[0], compose(self.now[1:])
        inner = first.shape[-2]
        if inner * (size + taps * outputs) > outputs * size:
            return np.asarray(_flat(compose(self.now)) @ self._gram)
        wide = np.broadcast_to(first, (*self._taps, *first.shape[-2:]))
        behind = np.broadcast_to(rest, (*self._taps, *rest.shape[-2:]))
        by_tap = self._gram.reshape(inputs, taps, size).transpose(1, 0, 2)
        given = _listed(wide) @ by_tap
        joined = _listed(behind).transpose(1, 0, 2).reshape(outputs, -1)
        return np.asarray(joined @ given.reshape(-1, size))

    def _read(self, index: int) -> tuple[Float64, Float64]:
        """Return what a factor reads at each tap of those behind it.

        Returns:
            The Gram matrix [behind, features, behind, features], with features the own
            taps times the inputs of the factor; and products of what outputs still miss
            with that, [outputs, behind, features].
        """
        own = [size > 1 for size in self._factors[index].taps]
        later = [f.taps for f in self._factors[index + 1 :]]
        after = [any(taps[axis] > 1 for taps in later) for axis in range(len(own))]
        axes = range(len(own))
        order = [axis for axis in axes if after[axis]]
        order += [axis for axis in axes if own[axis]]
        order += [axis for axis in axes if not (after[axis] or own[axis])]
        outer = math.prod(self._taps[axis] for axis in axes if after[axis])
        inner = math.prod(self._taps[axis] for axis in axes if own[axis])
        inputs = self._before.shape[-1]
        before = _rows(compose(self.now[:index])) if index else None

        def read(array: Float64) -> Float64:
            """Turn [rows, inputs * taps] into [rows, behind * features]."""
            apart = array.reshape(-1, inputs, *self._taps)
            apart = apart.transpose(0, *(axis + 2 for axis in order), 1)
            apart = apart.reshape(len(array) * outer * inner, -1)
            made = apart if before is None else apart @ before.T
            return made.reshape(len(array), -1)

        rest = read(self._cross.T - self._image)
        seen = read(read(self._gram).T.copy())
        width = seen.shape[1] // outer
        return seen.reshape(outer, width, outer, width), rest.reshape(-1, outer, width)

    def _last(self, seen: Float64, rest: Float64, mask: Mask, away: Float64) -> Float64:
        """Return a step of the factor whose outputs are those of all: exact."""
        dead = _dead(seen[None])[0]
        wanted = (rest - _damping(seen, dead, self._ridge) * away).T.copy()
        counts = mask.sum(axis=1)
        if mask.all() or counts.max(initial=0) > _FEW:
            return _fitted(seen, wanted, mask, dead, self._ridge)
        matrix, _ = _damped(seen, dead, self._ridge)
        step = np.zeros(mask.shape)
        for row in np.flatnonzero(counts):
            at = np.flatnonzero(mask[row])
            _, found, _ = lapack.dposv(matrix[np.ix_(at, at)], wanted[at, row], lower=1)
            step[row, at] = found
        return step

    def _inner(
        self,
        seen: Float64,
        weighing: Float64,
        wanted: Float64,
        mask: Mask,
        away: Float64,
    ) -> Float64:
        """Return a step of a factor that others are behind.

        It lowers ``sum_ab tr(M_ab D K_ab D^T) - 2 tr(D C)``, where ``a`` and ``b`` are
        taps of the factors behind, ``M_ab`` products of those, and ``K_ab`` of what the
        factor reads.
        """
        taps = range(len(seen))
        blocks = np.ascontiguousarray(seen.transpose(0, 2, 1, 3))
        diagonal = sum(
            np.outer(np.diagonal(weighing[tap, tap]), np.diagonal(blocks[tap, tap]))
            for tap in taps
        )
        curved = np.asarray(diagonal)
        damping = self._ridge * float(curved[mask].mean())
        damping = max(damping, 1e-10 * float(curved[mask].max()), 1e-300)
        wanted = np.where(mask, wanted - damping * away, 0.0)
        if mask.sum() <= _DIRECT:
            return _direct(blocks, weighing, wanted, mask, damping)

        def times(step: Float64) -> Float64:
            made = damping * step
            for one in taps:
                for two in taps:
                    made += weighing[one, two] @ (step @ blocks[one, two].T)
            return np.where(mask, made, 0.0)

        precondition: Callable[[Float64], Float64]
        if mask.all():
            means = [part[taps, taps].mean(axis=0) for part in (weighing, blocks)]
            precondition = _kronecker(len(seen) * means[0], means[1], damping)
        else:

            def precondition(step: Float64) -> Float64:
                return np.asarray(np.where(mask, step / (curved + damping), 0.0))

        return _conjugate(times, wanted, precondition)


def _direct(
    blocks: Float64, weighing: Float64, wanted: Float64, mask: Mask, damping: float
) -> Float64:
    """Solve for few free entries by their normal matrix."""
    rows, columns = np.nonzero(mask)
    normal = np.zeros((len(rows), len(rows)))
    for one in range(len(blocks)):
        for two in range(len(blocks)):
            by_row = weighing[one, two][rows[:, None], rows]
            normal += by_row * blocks[one, two][columns[:, None], columns]
    normal = (normal + normal.T) / 2
    normal[np.diag_indices_from(normal)] += damping
    extra = 1e-12 * float(np.trace(normal)) / max(len(normal), 1)
    step = np.zeros(mask.shape)
    while True:
        _, found, failed = lapack.dposv(normal, wanted[rows, columns], lower=1)
        if not failed:
            step[rows, columns] = found
            return step
        normal[np.diag_indices_from(normal)] += extra
        extra *= 10


def _rows(values: Array) -> Array:
    """View [*taps, outputs, inputs] as [outputs, taps * inputs]."""
    moved = np.moveaxis(values, -2, 0)
    return moved.reshape(len(moved), -1)


def _back(rows: Float64, shape: tuple[int, ...]) -> Float64:
    """Return the array [*taps, outputs, inputs] that ``_rows`` views so."""
    *taps, outputs, inputs = shape
    return np.moveaxis(rows.reshape(outputs, *taps, inputs), 0, -2)


def _listed(values: Float64) -> Float64:
    """View [*taps, outputs, inputs] as [taps, outputs, inputs]."""
    return values.reshape(-1, *values.shape[-2:])


def _kronecker(
    left: Float64, right: Float64, damping: float
) -> Callable[[Float64], Float64]:
    """Return what solves ``left D right = Z`` nearly, both damped a little."""
    factors = []
    for matrix, other in ((left, right), (right, left)):
        mean = max(float(np.trace(other)) / len(other), 1e-300)
        dead = _dead(matrix[None])[0]
        wide = matrix.copy()
        np.einsum("ii->i", wide)[:] += math.sqrt(damping) * math.sqrt(
            max(float(np.trace(matrix)) / len(matrix), 1e-300) / mean
        )
        factors.append(_damped(wide, dead, 1e-9)[1])

    def precondition(step: Float64) -> Float64:
        half, _ = lapack.dpotrs(factors[0], step, lower=1)
        whole, _ = lapack.dpotrs(factors[1], np.asarray(half).T.copy(), lower=1)
        return np.asarray(whole).T

    return precondition


def _conjugate(
    times: Callable[[Float64], Float64],
    wanted: Float64,
    precondition: Callable[[Float64], Float64],
) -> Float64:
    """Solve ``times(x) = wanted`` by conjugate gradients, from zero."""
    found = np.zeros_like(wanted)
    rest = wanted.copy()
    towards = precondition(rest)
    direction = towards.copy()
    size = first = float((rest * towards).sum())
    for _ in range(STEPS):
        if not size > _CLOSE * first:
            break
        image = times(direction)
        bend = float((direction * image).sum())
        if not bend > 0:
            break
        found += size / bend * direction
        rest -= size / bend * image
        towards = precondition(rest)
        before, size = size, float((rest * towards).sum())
        direction = towards + size / before * direction
    return found
