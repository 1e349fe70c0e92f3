"""Convolution kernels as products of smaller ones: arrays in, arrays out.

A kernel is an array [outputs, inputs, k1, ..., kn] of one group; the metric of data is
the second moment of its patches, [inputs * k, inputs * k] in the order of
``kernel.reshape(outputs, -1)``. Four forms, each exact at full rank:

- ``channel``: k1 x .. x kn with few outputs, then 1 x .. x 1 (Zhang et al. 2016,
  "Accelerating Very Deep Convolutional Networks", section 3.1; for 1 x 1 and for
  matrices it is the SVD). With data, the principal directions of the outputs.
- ``spatial``: k1 x 1 x .. x 1, then 1 x k2 x .. x kn (Jaderberg et al. 2014, "Speeding
  up Convolutional Neural Networks with Low Rank Expansions", scheme 2). Axes that are
  as long may change places: ``decomposed`` takes what fits better.
- ``tucker``: 1 x .. x 1, k1 x .. x kn, 1 x .. x 1 (Kim et al. 2016, "Compression of
  Deep Convolutional Neural Networks", section 3.1: Tucker-2 by HOSVD, then sweeps).
- ``cp``: 1 x .. x 1, k1 x .. x kn of each channel by itself, 1 x .. x 1: canonical
  polyadic decomposition (Lebedev et al. 2015, "Speeding-up Convolutional Neural
  Networks Using Fine-tuned CP-Decomposition", section 3), axes of the kernel together.

``refit`` improves all factors jointly by alternating least squares on
``E |W x - W' x|^2``: each factor enters linearly, so each is a least-squares problem.
The last one is solved exactly, the others by conjugate gradients from where they are.
The error never rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack, solve_triangular

from onnxshrink.errors import UsageError
from onnxshrink.solvers.svd import DAMPING, balanced, split, truncated

__all__ = [
    "FORMS",
    "Chain",
    "Form",
    "channel",
    "decomposed",
    "error",
    "full_ranks",
    "losses",
    "parameters",
    "refit",
    "spatial",
    "tucker",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Form = Literal["channel", "spatial", "tucker", "cp"]

FORMS: tuple[Form, ...] = ("channel", "spatial", "tucker", "cp")
_SWEEPS = 3
_STEPS = 8
"""Steps of conjugate gradients for each factor in each sweep."""
_LEAST_GAIN = 1e-2
"""Share of the error that a sweep must take off for another to follow."""
_HOOI = 3
"""Sweeps of higher-order orthogonal iteration."""
_ALS = 40
"""Sweeps of alternating least squares for the factors of ``cp``."""
_POINTS = 5
"""Ranks of ``cp`` that are tried to know what others lose."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Kernels that, one after the other, do what one kernel did.

    Attributes:
        form: How they were found.
        kernels: Each float64 [outputs, inputs, k1, ..., kn], in the order they run.
    """

    form: Form
    kernels: tuple[Float64, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Channels between the kernels."""
        if self.form == "cp":
            return (len(self.kernels[0]),)
        return tuple(len(kernel) for kernel in self.kernels[:-1])

    @property
    def parameters(self) -> int:
        """Values in all kernels."""
        return sum(kernel.size for kernel in self.kernels)

    def composed(self) -> Float64:
        """Return the kernel they stand for, [outputs, inputs, k1, ..., kn]."""
        return np.asarray(np.einsum(_spec(self), *_small(self), optimize=True))


def full_ranks(form: Form, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks from which on a form is exact.

    Args:
        form: The form.
        shape: Of the kernel, [outputs, inputs, k1, ..., kn].
    """
    outputs, inputs, first, rest = _sizes(shape)
    if form == "channel":
        return (min(outputs, inputs * first * rest),)
    if form == "spatial":
        return (min(inputs * first, outputs * rest),)
    if form == "cp":
        size = first * rest
        return (min(inputs * min(outputs, size), outputs * min(inputs, size)),)
    return min(inputs, outputs * first * rest), min(outputs, inputs * first * rest)


def parameters(form: Form, shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Return how many values the kernels of a form have.

    ``r (c k + o)`` for ``channel``, ``r (c k1 + o k2..kn)`` for ``spatial``,
    ``c r + k r s + s o`` for ``tucker`` and ``r (c + k + o)`` for ``cp``, for ``c``
    inputs and ``o`` outputs.

    Args:
        form: The form.
        shape: Of the kernel, [outputs, inputs, k1, ..., kn].
        ranks: One, or for ``tucker`` two: of the inputs, then of the outputs.
    """
    outputs, inputs, first, rest = _sizes(shape)
    if form == "channel":
        return ranks[0] * (inputs * first * rest + outputs)
    if form == "spatial":
        return ranks[0] * (inputs * first + outputs * rest)
    if form == "cp":
        return ranks[0] * (inputs + first * rest + outputs)
    few, many = ranks
    return inputs * few + few * many * first * rest + many * outputs


def decomposed(
    form: Form,
    kernels: Sequence[Array],
    ranks: Sequence[int],
    moments: Array | None = None,
    outputs: Array | None = None,
) -> list[Chain]:
    """Return the kernels of all groups in a form, each chain fitted jointly.

    Args:
        form: The form.
        kernels: One of each group, [outputs, inputs, k1, ..., kn].
        ranks: One, or for ``tucker`` two: of the inputs, then of the outputs.
        moments: Second moments of the patches, one of each group; ``None`` minimises
            the kernels' error.
        outputs: What a squared error of each output weighs, [groups, outputs]; ``None``
            weighs all alike.

    Returns:
        A chain for each group, all with kernels of the same shapes.

    Raises:
        UsageError: There are no such ranks.
        ModelError: A kernel or a moment holds NaN or infinity.
    """
    tasks = []
    for group, kernel in enumerate(kernels):
        weighed, root = _weighed(kernel, None if outputs is None else outputs[group])
        tasks.append((weighed, root, None if moments is None else moments[group]))
    if form == "tucker":
        few, many = ranks
        chains = [tucker(kernel, (few, many), seen) for kernel, _, seen in tasks]
    elif form == "channel":
        chains = [channel(kernel, ranks[0], seen) for kernel, _, seen in tasks]
    elif form == "cp":
        chains = [cp(kernel, ranks[0], seen) for kernel, _, seen in tasks]
    else:
        orders = [
            [spatial(k, ranks[0], seen, first=axis) for k, _, seen in tasks]
            for axis in _orders(kernels[0].shape)
        ]
        chains = min(
            orders,
            key=lambda made: sum(
                error(task[0], chain, task[2])
                for task, chain in zip(tasks, made, strict=True)
            ),
        )
    found = []
    for (kernel, root, seen), chain in zip(tasks, chains, strict=True):
        better = refit(kernel, chain, seen)
        last = better.kernels[-1] / root.reshape(-1, *(1,) * (kernel.ndim - 1))
        found.append(_even(replace(better, kernels=(*better.kernels[:-1], last))))
    return found


def _orders(shape: Sequence[int]) -> tuple[int, ...]:
    """Return which axes the first kernel of the spatial form may have."""
    return (0, 1) if len(shape) == 4 and shape[2] == shape[3] > 1 else (0,)


def losses(
    form: Form,
    kernel: Array,
    choices: Sequence[Sequence[int]],
    moment: Array | None = None,
    outputs: Array | None = None,
) -> list[float]:
    """Return about what error each choice of ranks leaves, before ``refit``.

    It is exact for ``channel``. For ``spatial`` windows of the first kernel are taken
    to be independent; for ``tucker`` it is the sum of what either side loses, an upper
    bound (De Lathauwer et al. 2000, property 10).

    Args:
        form: The form.
        kernel: [outputs, inputs, k1, ..., kn].
        choices: Ranks, each as for ``decomposed``.
        moment: As for ``decomposed``.
        outputs: As for ``decomposed``.
    """
    weighed, _ = _weighed(kernel, outputs)
    flat = weighed.reshape(len(kernel), -1)
    if form == "channel":
        found = split(flat, inputs=moment)
        return [found.lost(ranks[0]) for ranks in choices]
    if form == "spatial":
        matrix, seen = _columns(weighed, moment)
        found = split(matrix, inputs=seen)
        return [found.lost(ranks[0]) for ranks in choices]
    if form == "cp":
        return _losses_of_cp(weighed, [ranks[0] for ranks in choices], moment)
    tall, seen = _inputs(weighed, moment)
    one, two = split(tall, inputs=seen), split(flat, inputs=moment)
    return [one.lost(ranks[0]) + two.lost(ranks[1]) for ranks in choices]


def _weighed(kernel: Array, outputs: Array | None) -> tuple[Float64, Float64]:
    """Return the kernel, outputs scaled by roots of their weights, and the roots."""
    wide = np.asarray(kernel, np.float64)
    if outputs is None:
        return wide, np.ones(len(kernel))
    mean = float(np.mean(outputs))
    if not mean > 0:
        return wide, np.ones(len(kernel))
    root = np.sqrt(np.asarray(outputs, np.float64) + DAMPING * mean)
    return wide * root.reshape(-1, *(1,) * (kernel.ndim - 1)), root


def channel(
    kernel: Array,
    rank: int,
    moment: Array | None = None,
    damping: float = DAMPING,
) -> Chain:
    """Return k1 x .. x kn with ``rank`` outputs, then 1 x .. x 1.

    Args:
        kernel: [outputs, inputs, k1, ..., kn].
        rank: Channels in between.
        moment: Second moment of the patches; ``None`` minimises the kernel's error.
        damping: As in ``svd.split``.
    """
    _check("channel", kernel.shape, (rank,))
    flat = kernel.reshape(len(kernel), -1)
    found = split(flat, inputs=moment, rank=rank, damping=damping)
    left, right = found.factors(flat, rank)
    ones = (1,) * (kernel.ndim - 2)
    first = right.reshape(rank, *kernel.shape[1:])
    return Chain("channel", (first, left.reshape(*left.shape, *ones)))


def spatial(
    kernel: Array,
    rank: int,
    moment: Array | None = None,
    damping: float = DAMPING,
    first: int = 0,
) -> Chain:
    """Return k1 x 1 x .. then 1 x k2 x .. x kn with ``rank`` channels in between.

    With data, what the first kernel reads is whitened; that its windows depend on each
    other is left to ``refit``.

    Args:
        kernel: [outputs, inputs, k1, ..., kn], n at least 2.
        rank: Channels in between.
        moment: Second moment of the patches; ``None`` minimises the kernel's error.
        damping: As in ``svd.split``.
        first: Axis of the first kernel: 0, or 1 where there are two as long.
    """
    _check("spatial", kernel.shape, (rank,))
    if kernel.ndim < 4:
        raise UsageError("the spatial form needs a kernel with at least two axes")
    if not first:
        return _along(kernel, rank, moment, damping)
    if first not in _orders(kernel.shape):
        raise UsageError(f"a kernel {list(kernel.shape)} is split along axis 0 first")
    over = moment
    if moment is not None:
        axes = (len(kernel[0]), *kernel.shape[2:])
        square = moment.reshape(*axes, *axes)
        over = np.swapaxes(np.swapaxes(square, 1, 2), 4, 5).reshape(moment.shape)
    other = _along(np.swapaxes(kernel, 2, 3), rank, over, damping)
    return replace(
        other, kernels=tuple(np.swapaxes(part, 2, 3) for part in other.kernels)
    )


def _along(kernel: Array, rank: int, moment: Array | None, damping: float) -> Chain:
    """Split a kernel into its first axis and the others."""
    outputs, inputs, first, rest = _sizes(kernel.shape)
    matrix, seen = _columns(kernel, moment)
    left, right = split(matrix, inputs=seen, rank=rank, damping=damping).factors(
        matrix, rank
    )
    ones = (1,) * (kernel.ndim - 3)
    one = right.reshape(rank, inputs, first, *ones)
    two = left.reshape(outputs, rest, rank).swapaxes(1, 2)
    return Chain(
        "spatial",
        (one, np.ascontiguousarray(two).reshape(outputs, rank, 1, *kernel.shape[3:])),
    )


def _columns(kernel: Array, moment: Array | None) -> tuple[Array, Array | None]:
    """Return a kernel as [outputs * rest, inputs * first], and the moment of that."""
    outputs, inputs, first, rest = _sizes(kernel.shape)
    apart = kernel.reshape(outputs, inputs, first, rest).transpose(0, 3, 1, 2)
    matrix = apart.reshape(outputs * rest, inputs * first)
    if moment is None:
        return matrix, None
    square = moment.reshape(inputs, first, rest, inputs, first, rest)
    seen = np.einsum("chwdiw->chdi", square).reshape(2 * (inputs * first,))
    return matrix, seen / rest


def tucker(
    kernel: Array,
    ranks: tuple[int, int],
    moment: Array | None = None,
    damping: float = DAMPING,
) -> Chain:
    """Return 1 x .. x 1, k1 x .. x kn and 1 x .. x 1.

    Args:
        kernel: [outputs, inputs, k1, ..., kn].
        ranks: Channels after the first and before the last.
        moment: Second moment of the patches; ``None`` minimises the kernel's error.
        damping: As in ``svd.split``.
    """
    _check("tucker", kernel.shape, ranks)
    few, many = ranks
    outputs, inputs, first, rest = _sizes(kernel.shape)
    k = first * rest
    wide = np.asarray(kernel, np.float64).reshape(outputs, inputs, k)
    tall, seen = _inputs(kernel, moment)
    by_input = split(tall, inputs=seen, damping=damping)
    flat = wide.reshape(outputs, -1)
    by_output = split(flat, inputs=moment, damping=damping)
    if by_input.side == "outputs" or by_output.side == "inputs":
        # Fewer outputs than inputs on either side: rare, and no better way is needed.
        right = np.linalg.qr(truncated(tall, few)[2].T)[0].T
        into, back = right, right.T
        out = truncated(flat, many)[0]
        lift, drop = out, out.T
    else:
        into, back = by_input.dual[:, :few].T, by_input.basis[:, :few]
        lift, drop = by_output.basis[:, :many], by_output.dual[:, :many].T
        for _ in range(_HOOI if moment is None else 0):
            reduced = np.einsum("so,ock->sck", drop, wide)
            right = truncated(
                reduced.transpose(0, 2, 1).reshape(many * k, inputs),
                min(few, many * k),
            )[2]
            if len(right) < few:
                break
            into, back = right, right.T
            reduced = np.einsum("ock,cr->ork", wide, back)
            found = truncated(reduced.reshape(outputs, -1), min(many, few * k))[0]
            if found.shape[1] < many:
                break
            lift, drop = found, found.T
    core = np.einsum("so,ock,cr->srk", drop, wide, back, optimize=True)
    ones = (1,) * (kernel.ndim - 2)
    return Chain(
        "tucker",
        (
            np.ascontiguousarray(into).reshape(few, inputs, *ones),
            core.reshape(many, few, *kernel.shape[2:]),
            np.ascontiguousarray(lift).reshape(outputs, many, *ones),
        ),
    )


def _inputs(kernel: Array, moment: Array | None) -> tuple[Array, Array | None]:
    """Return a kernel as [outputs * k, inputs], and the moment of that."""
    outputs, inputs, first, rest = _sizes(kernel.shape)
    k = first * rest
    wide = np.asarray(kernel, np.float64).reshape(outputs, inputs, k)
    tall = wide.transpose(0, 2, 1).reshape(outputs * k, inputs)
    if moment is None:
        return tall, None
    square = moment.reshape(inputs, k, inputs, k)
    return tall, np.einsum("ckdk->cd", square) / k


def cp(
    kernel: Array,
    rank: int,
    moment: Array | None = None,
    damping: float = DAMPING,
    sweeps: int = _ALS,
) -> Chain:
    """Return 1 x .. x 1, a kernel for each channel, and 1 x .. x 1.

    By alternating least squares from leading singular vectors, the inputs whitened
    where there is data. At full rank the factors are those of the SVD of what each
    input, or each output, does: exact.

    Args:
        kernel: [outputs, inputs, k1, ..., kn].
        rank: Channels in between.
        moment: Second moment of the patches; ``None`` minimises the kernel's error.
        damping: As in ``svd.split``.
        sweeps: Of alternating least squares.
    """
    _check("cp", kernel.shape, (rank,))
    tensor, root = _whitened(kernel, moment, damping)
    outs, ins, taps = _polyadic(tensor, rank, sweeps)
    into = (
        ins.T if root is None else solve_triangular(root, ins, lower=True, trans="T").T
    )
    ones = (1,) * (kernel.ndim - 2)
    return Chain(
        "cp",
        (
            np.ascontiguousarray(into).reshape(rank, kernel.shape[1], *ones),
            np.ascontiguousarray(taps.T).reshape(rank, 1, *kernel.shape[2:]),
            outs.reshape(len(kernel), rank, *ones),
        ),
    )


def _whitened(
    kernel: Array, moment: Array | None, damping: float
) -> tuple[Float64, Float64 | None]:
    """Return [outputs, inputs, k] times the root of what inputs are, and the root."""
    outputs, inputs, first, rest = _sizes(kernel.shape)
    tensor = np.asarray(kernel, np.float64).reshape(outputs, inputs, first * rest)
    _, seen = _inputs(kernel, moment)
    if seen is None:
        return tensor, None
    mean = max(float(np.trace(seen)) / inputs, 1e-300)
    damped = np.asarray(seen, np.float64) + (damping + 1e-9) * mean * np.eye(inputs)
    root = np.asarray(np.linalg.cholesky(damped), np.float64)
    return np.asarray(np.einsum("ock,cd->odk", tensor, root)), root


def _polyadic(
    tensor: Float64, rank: int, sweeps: int
) -> tuple[Float64, Float64, Float64]:
    """Return factors [outputs, rank], [inputs, rank] and [k, rank]."""
    outputs, inputs, taps = tensor.shape
    if rank == min(inputs * min(outputs, taps), outputs * min(inputs, taps)):
        return _exact(tensor)
    rng = np.random.default_rng(0)
    factors = []
    for axis, size in enumerate(tensor.shape):
        flat = np.moveaxis(tensor, axis, 0).reshape(size, -1)
        lead, _, _ = truncated(flat, min(rank, *flat.shape))
        more = rng.standard_normal((size, rank - lead.shape[1])) / math.sqrt(size)
        factors.append(np.concatenate([lead, more], axis=1))
    specs = ("ock,cr,kr->or", "ock,or,kr->cr", "ock,or,cr->kr")
    for _ in range(sweeps):
        for axis, spec in enumerate(specs):
            one, two = (factors[i] for i in range(3) if i != axis)
            normal = (one.T @ one) * (two.T @ two)
            wanted = np.einsum(spec, tensor, one, two, optimize=True)
            diagonal = np.einsum("ii->i", normal)
            # Enough that terms do not grow without bound against each other.
            diagonal += 1e-6 * max(float(diagonal.mean()), 1e-300)
            _, found, failed = lapack.dposv(normal, wanted.T, lower=1)
            if not failed:
                factors[axis] = np.asarray(found).T
    return factors[0], factors[1], factors[2]


def _exact(tensor: Float64) -> tuple[Float64, Float64, Float64]:
    """Return factors by an SVD of each input, or of each output if those are fewer."""
    outputs, inputs, taps = tensor.shape
    turned = outputs * min(inputs, taps) < inputs * min(outputs, taps)
    if turned:
        ins, outs, own = _exact(tensor.swapaxes(0, 1))
        return outs, ins, own
    found = []
    for at in range(inputs):
        u, s, vt = np.linalg.svd(tensor[:, at], full_matrices=False)
        pick = np.zeros((inputs, len(s)))
        pick[at] = 1.0
        found.append((u * s, pick, vt.T))
    parts = [np.concatenate(columns, axis=1) for columns in zip(*found, strict=True)]
    return parts[0], parts[1], parts[2]


def _losses_of_cp(
    kernel: Float64, ranks: Sequence[int], moment: Array | None
) -> list[float]:
    """Return about what each rank loses, interpolated between a few."""
    if not ranks:
        return []
    tensor, _ = _whitened(kernel, moment, DAMPING)
    whole = float(np.square(tensor).sum())
    total = whole
    if moment is not None:
        flat = kernel.reshape(len(kernel), -1)
        total = float(np.vdot(flat @ moment, flat))
    at = np.unique(np.geomspace(min(ranks), max(ranks), _POINTS).round().astype(int))
    shares = []
    for rank in at:
        outs, ins, taps = _polyadic(tensor, int(rank), _ALS // 4)
        made = np.einsum("or,cr,kr->ock", outs, ins, taps, optimize=True)
        shares.append(float(np.square(tensor - made).sum()) / max(whole, 1e-300))
    falling = np.maximum(np.minimum.accumulate(shares), 1e-12)
    logs = np.interp(np.log(ranks), np.log(at), np.log(falling))
    return [float(share) * total for share in np.exp(logs)]


def error(kernel: Array, chain: Chain, moment: Array | None = None) -> float:
    """Return ``E |W x - W' x|^2``, or ``|W - W'|^2`` without a moment."""
    missing = (kernel - chain.composed()).reshape(len(kernel), -1)
    if moment is None:
        return float(np.square(missing).sum())
    return max(0.0, float(np.vdot(missing @ moment, missing)))


def refit(
    kernel: Array,
    chain: Chain,
    moment: Array | None = None,
    *,
    sweeps: int = _SWEEPS,
    steps: int = _STEPS,
) -> Chain:
    """Improve all kernels of a chain jointly by alternating least squares.

    Args:
        kernel: What they should do together, [outputs, inputs, k1, ..., kn].
        chain: Where to start.
        moment: Second moment of the patches; ``None`` minimises the kernel's error.
        sweeps: Rounds over all kernels.
        steps: Steps of conjugate gradients for each.

    Returns:
        A chain whose error is at most that of ``chain``.
    """
    wide = np.asarray(kernel, np.float64)
    target = _through(wide, moment)
    best, least = chain, error(wide, chain, moment)
    if least <= 1e-20 * float(np.vdot(target, wide)):
        return chain
    now = chain
    for _ in range(sweeps):
        for index in range(len(now.kernels) - 1):
            now = _improved(now, index, target, moment, steps)
        now = _solved(now, target, moment)
        after = error(wide, now, moment)
        if not after < least * (1 - _LEAST_GAIN):
            best = now if after < least else best
            break
        best, least = now, after
    return _even(best)


def _solved(chain: Chain, target: Float64, moment: Array | None) -> Chain:
    """Give the last kernel its best values for those of the others.

    The kernel is ``L T`` with ``T`` what the others do, [channels in between and own
    axes, inputs and all axes], so ``L = (W G T^T) (T G T^T)^-1``.
    """
    last = chain.kernels[-1]
    own = _own_axes(chain)[-1]
    names = _axes(chain)
    left, _ = _spec(chain).split("->")
    parts = left.split(",")[:-1]
    others = "".join(name for axis, name in enumerate(names) if axis not in own)
    channels = parts[-1][0]
    spec = f"{','.join(parts)}->{channels}c{others}"
    before = np.einsum(spec, *_small(chain)[:-1], optimize=True)
    sizes = [last.shape[2 + axis] for axis in own]
    whole = target.shape[2:]
    spread = np.zeros((len(before), *sizes, target.shape[1], *whole))
    for at in np.ndindex(*sizes):
        place: list[Any] = [slice(None)] * len(whole)
        for axis, index in zip(own, at, strict=True):
            place[axis] = index
        spread[(slice(None), *at, slice(None), *place)] = before
    rows = spread.reshape(len(before) * math.prod(sizes), -1)
    seen = rows if moment is None else rows @ moment
    normal = seen @ rows.T
    wanted = rows @ target.reshape(len(target), -1).T
    diagonal = np.einsum("ii->i", normal)
    diagonal += 1e-10 * max(float(diagonal.mean()), 1e-300)
    _, found, failed = lapack.dposv(normal, wanted, lower=1)
    if failed:
        return chain
    return replace(
        chain, kernels=(*chain.kernels[:-1], np.asarray(found.T).reshape(last.shape))
    )


def _improved(
    chain: Chain, index: int, target: Float64, moment: Array | None, steps: int
) -> Chain:
    """Let conjugate gradients find better values of one kernel."""
    values = chain.kernels[index]

    def applied(x: Float64) -> Float64:
        whole = replace(chain, kernels=_with(chain.kernels, index, x)).composed()
        return _adjoint(chain, index, _through(whole, moment))

    wanted = _adjoint(chain, index, target)
    rest = wanted - applied(values)
    direction = rest.copy()
    size = start = float(np.vdot(rest, rest))
    for _ in range(steps):
        if size <= 1e-18 * start or size == 0:
            break
        image = applied(direction)
        curved = float(np.vdot(direction, image))
        if not curved > 0:
            break
        values = values + (size / curved) * direction
        rest = rest - (size / curved) * image
        fresh = float(np.vdot(rest, rest))
        direction = rest + (fresh / size) * direction
        size = fresh
    return replace(chain, kernels=_with(chain.kernels, index, values))


def _even(chain: Chain) -> Chain:
    """Give neighbouring kernels of a chain channels of the same norm."""
    kernels = list(chain.kernels)
    for at in range(len(kernels) - 1):
        one, two = kernels[at], kernels[at + 1]
        if chain.form == "cp" and at == 0:
            each = [part.reshape(len(part), -1) for part in (one, two)]
            left, right = balanced(each[1].T, each[0])
            kernels[:2] = right.reshape(one.shape), left.T.reshape(two.shape)
            continue
        flat = two.swapaxes(0, 1).reshape(len(one), -1)
        left, right = balanced(flat.T, one.reshape(len(one), -1))
        kernels[at] = right.reshape(one.shape)
        shape = (len(one), len(two), *two.shape[2:])
        kernels[at + 1] = np.ascontiguousarray(left.T.reshape(shape).swapaxes(0, 1))
    return replace(chain, kernels=tuple(kernels))


def _with(
    kernels: tuple[Float64, ...], index: int, new: Float64
) -> tuple[Float64, ...]:
    return (*kernels[:index], new, *kernels[index + 1 :])


def _through(kernel: Float64, moment: Array | None) -> Float64:
    """Return the kernel times the moment of its patches, in its own shape."""
    if moment is None:
        return kernel
    return np.asarray(kernel.reshape(len(kernel), -1) @ moment).reshape(kernel.shape)


def _adjoint(chain: Chain, index: int, kernel: Float64) -> Float64:
    """Return the derivative of ``<kernel, composed>`` with respect to one kernel."""
    left, right = _spec(chain).split("->")
    parts = left.split(",")
    small = _small(chain)
    others = [i for i in range(len(parts)) if i != index]
    spec = ",".join([right, *(parts[i] for i in others)]) + "->" + parts[index]
    found = np.einsum(spec, kernel, *(small[i] for i in others), optimize=True)
    return np.asarray(found).reshape(chain.kernels[index].shape)


def _spec(chain: Chain) -> str:
    """Return how einsum composes the kernels without their axes of size 1."""
    names = _axes(chain)
    if chain.form == "cp":
        first, own, last = (
            "".join(names[axis] for axis in axes) for axes in _own_axes(chain)
        )
        return f"rc{first},r{own},or{last}->oc{names}"
    channels = "cabdefg"[: len(chain.kernels)] + "o"
    parts = [
        channels[i + 1] + channels[i] + "".join(names[axis] for axis in axes)
        for i, axes in enumerate(_own_axes(chain))
    ]
    return f"{','.join(parts)}->oc{names}"


def _axes(chain: Chain) -> str:
    return "uvwxyz"[: chain.kernels[0].ndim - 2]


def _own_axes(chain: Chain) -> list[list[int]]:
    """Return the spatial axes that each kernel has the values of: each axis once."""
    count = chain.kernels[0].ndim - 2
    sizes = [kernel.shape[2:] for kernel in chain.kernels]
    owner = [
        max(range(len(sizes)), key=lambda i: sizes[i][axis]) for axis in range(count)
    ]
    return [[a for a in range(count) if owner[a] == i] for i in range(len(sizes))]


def _small(chain: Chain) -> list[Float64]:
    """Return the kernels without the axes of size 1 that others have."""
    found: list[Float64] = []
    for kernel, axes in zip(chain.kernels, _own_axes(chain), strict=True):
        shape = [kernel.shape[2 + axis] for axis in axes]
        is_each = chain.form == "cp" and len(found) == 1
        channels = kernel.shape[:1] if is_each else kernel.shape[:2]
        found.append(kernel.reshape(*channels, *shape))
    return found


def _sizes(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return outputs, inputs, the first kernel axis and all others together."""
    first = int(shape[2]) if len(shape) > 2 else 1
    return int(shape[0]), int(shape[1]), first, math.prod(shape[3:])


def _check(form: Form, shape: Sequence[int], ranks: Sequence[int]) -> None:
    for rank, full in zip(ranks, full_ranks(form, shape), strict=True):
        if not 1 <= rank <= full:
            raise UsageError(
                f"the {form} form of a kernel {list(shape)} has ranks from 1 to "
                f"{full}, not {rank}"
            )
