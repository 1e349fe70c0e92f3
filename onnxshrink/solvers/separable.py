"""Dense convolution kernels as sums of separable ones: arrays in, arrays out.

A kernel ``W [outputs, inputs, taps]`` is written as a sum of ``branches`` products of a
kernel per channel (depthwise) and a matrix (pointwise: Howard et al. 2017, MobileNets).
Two orders are possible (Guo et al. 2018, Network Decoupling, section 3):

* depthwise first: ``W[o, c, t] = sum_b P[b, o, c] D[b, c, t]``. For each input channel
  the best form is a truncated SVD of ``W[:, c, :]``.
* pointwise first: ``W[o, c, t] = sum_b D[b, o, t] P[b, o, c]``. For each output channel
  the best form is a truncated SVD of ``W[o, :, :]``.

Both are exact from ``taps`` branches on. With the second moments of what the
convolution reads, the error that is minimised is that of its output: alternating least
squares over the two factors begins at the SVD and never makes the error larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["ORDERS", "Order", "Separable", "most_branches", "separate"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Order = Literal["depthwise", "pointwise"]
"""Which of the two factors the input meets first."""

ORDERS: tuple[Order, ...] = ("pointwise", "depthwise")

_RIDGE = 1e-9
"""Share of the mean diagonal that is added before a system is solved."""
_DIRECT = 3072
"""Unknowns up to which all depthwise kernels are solved for at once."""
_STEPS = 40
"""Steps of conjugate gradients beyond that."""
_ENOUGH = 1e-4
"""A sweep that lowers the error by a smaller share is the last."""
_CHUNK = 1 << 24
"""Elements of the normal matrices that are held at a time."""


@dataclass(frozen=True)
class Separable:
    """A sum of separable kernels.

    Attributes:
        order: Which factor the input meets first.
        depthwise: float64 [branches, channels, taps]; the channels are the inputs if
            it comes first, else the outputs.
        pointwise: float64 [branches, outputs, inputs].
        error: What is missing: a share of the energy of the dense output, by the
            moments given; 0 is exact.
    """

    order: Order
    depthwise: Float64
    pointwise: Float64
    error: float

    @property
    def branches(self) -> int:
        """Number of separable kernels that are added."""
        return len(self.depthwise)

    def kernel(self) -> Float64:
        """Return the dense kernel [outputs, inputs, taps] that it stands for."""
        return _dense(self.order, self.depthwise, self.pointwise)


def most_branches(shape: tuple[int, int, int], order: Order) -> int:
    """Return how many branches are exact for a kernel [outputs, inputs, taps]."""
    outputs, inputs, taps = shape
    return min(taps, outputs if order == "depthwise" else inputs)


def separate(
    kernel: Array,
    branches: int,
    order: Order,
    moments: Array | None = None,
    *,
    sweeps: int = 8,
) -> Separable:
    """Return the best sum of separable kernels that was found.

    Args:
        kernel: [outputs, inputs, taps], finite.
        branches: Separable kernels to add, from 1 on; more than exact ones are not
            made.
        order: Which factor comes first.
        moments: float64 [inputs * taps, inputs * taps], the second moments of the
            patches that the convolution reads, by rows or by their number (the scale
            does not matter); ``None`` weighs every weight alike. Dead inputs and
            fewer patches than inputs are fine.
        sweeps: Most rounds of alternating least squares.
    """
    dense = np.asarray(kernel, np.float64)
    outputs, inputs, taps = dense.shape
    count = min(branches, most_branches((outputs, inputs, taps), order))
    if moments is None:
        depthwise, pointwise = _by_svd(dense, count, order, None)
        made = _dense(order, depthwise, pointwise)
        total = float(np.square(dense).sum())
        error = float(np.square(dense - made).sum()) / total if total else 0.0
        return Separable(order, depthwise, pointwise, error)
    metric = np.asarray(moments, np.float64)
    size = inputs * taps
    if metric.shape != (size, size):
        raise ValueError(f"moments are {metric.shape}, not {(size, size)}")
    scale = float(np.trace(metric)) / size
    if not scale > 0:  # nothing was ever read: all weights count alike
        return separate(kernel, branches, order)
    metric = metric / scale
    target = dense.reshape(outputs, size)
    pulled = target @ metric
    total = float(np.einsum("ox,ox->", pulled, target))

    def error_of(depthwise: Float64, pointwise: Float64) -> float:
        gap = target - _dense(order, depthwise, pointwise).reshape(outputs, size)
        return float(np.einsum("ox,ox->", gap @ metric, gap)) / total if total else 0.0

    improve = _improved_depthwise if order == "depthwise" else _improved_pointwise
    found: Separable | None = None
    for weighing in (metric, None):  # where the fit begins
        pair = _by_svd(dense, count, order, weighing)
        begun = Separable(order, *pair, error_of(*pair))
        if found is None or begun.error < found.error:
            found = begun
    assert found is not None
    for _ in range(sweeps):
        pair = improve(
            found.depthwise, found.pointwise, metric, pulled.reshape(dense.shape)
        )
        error = error_of(*pair)
        if not error < found.error:
            break
        last, found = found.error, Separable(order, *pair, error)
        if last - error < _ENOUGH * last:
            break
    return found


def _dense(order: Order, depthwise: Float64, pointwise: Float64) -> Float64:
    if order == "depthwise":
        made = np.einsum("boc,bct->oct", pointwise, depthwise, optimize=True)
    else:
        made = np.einsum("boc,bot->oct", pointwise, depthwise, optimize=True)
    return np.asarray(made)


def _by_svd(
    dense: Float64, count: int, order: Order, metric: Float64 | None
) -> tuple[Float64, Float64]:
    """Return factors from one truncated SVD a channel.

    With a metric, only what the taps of one input channel have to do with each other is
    taken into account, which leaves the channels independent.
    """
    _, inputs, taps = dense.shape
    if metric is None:
        roots = np.broadcast_to(np.eye(taps), (inputs, taps, taps))
    else:
        blocks = metric.reshape(inputs, taps, inputs, taps)
        roots = _roots(np.einsum("cick->cik", blocks))
    if order == "depthwise":
        # [inputs, outputs, taps], whitened on the side of the taps.
        stack = np.swapaxes(dense, 0, 1) @ roots
        left, values, right = np.linalg.svd(stack, full_matrices=False)
        kept = left[:, :, :count] * values[:, None, :count]
        depthwise = right[:, :count] @ np.linalg.inv(roots)
        return (
            np.ascontiguousarray(np.swapaxes(depthwise, 0, 1)),
            np.ascontiguousarray(np.transpose(kept, (2, 1, 0))),
        )
    # One kernel for all inputs of an output: the mean block whitens the taps, the
    # energy of an input weighs its row.
    root = _roots(np.mean(roots @ np.swapaxes(roots, 1, 2), axis=0)[None])[0]
    energy = np.sqrt(np.einsum("cik,cik->c", roots, roots) / taps)
    energy = np.maximum(energy, 1e-6 * max(float(energy.max()), 1e-300))
    stack = energy[None, :, None] * (dense @ root)
    left, values, right = np.linalg.svd(stack, full_matrices=False)
    kept = left[:, :, :count] * values[:, None, :count] / energy[None, :, None]
    depthwise = right[:, :count] @ np.linalg.inv(root)
    return (
        np.ascontiguousarray(np.swapaxes(depthwise, 0, 1)),
        np.ascontiguousarray(np.transpose(kept, (2, 0, 1))),
    )


def _roots(blocks: Float64) -> Float64:
    """Return symmetric roots of positive semidefinite blocks, kept invertible."""
    values, vectors = np.linalg.eigh((blocks + np.swapaxes(blocks, 1, 2)) / 2)
    floor = np.maximum(values.max(axis=1, keepdims=True) * 1e-6, 1e-12)
    roots = np.sqrt(np.maximum(values, floor))
    return np.asarray((vectors * roots[:, None, :]) @ np.swapaxes(vectors, 1, 2))


def _solved(matrix: Float64, right: Float64) -> Float64:
    """Solve symmetric systems [..., n, n] x = [..., n], a little damped."""
    size = matrix.shape[-1]
    mean = np.einsum("...ii->...", matrix) / size
    damping = np.maximum(mean * _RIDGE, np.finfo(np.float64).tiny)
    places = np.arange(size)
    matrix[..., places, places] += damping[..., None]
    return np.asarray(np.linalg.solve(matrix, right[..., None])[..., 0])


def _improved_depthwise(
    depthwise: Float64, pointwise: Float64, metric: Float64, pulled: Float64
) -> tuple[Float64, Float64]:
    """Solve for the matrices, then for the kernels; the depthwise part is first.

    ``pulled`` is the dense kernel times the metric, [outputs, inputs, taps].
    """
    outputs, inputs, taps = pulled.shape
    branches = len(depthwise)
    blocks = metric.reshape(inputs, taps, inputs, taps)
    # Moments of what the depthwise kernels give: [branches * inputs] squared.
    half = np.einsum("bct,ctek->bcek", depthwise, blocks, optimize=True)
    seen = np.einsum("bcek,aek->bcae", half, depthwise, optimize=True)
    seen = seen.reshape(branches * inputs, branches * inputs)
    cross = np.einsum("oct,bct->obc", pulled, depthwise, optimize=True)
    mean = np.trace(seen) / len(seen)
    seen[np.diag_indices_from(seen)] += max(mean * _RIDGE, np.finfo(np.float64).tiny)
    solved = scipy.linalg.solve(
        seen, cross.reshape(outputs, -1).T, assume_a="pos", overwrite_a=True
    )
    new = np.ascontiguousarray(
        solved.T.reshape(outputs, branches, inputs).transpose(1, 0, 2)
    )
    # The normal matrix of the kernels is that of the matrices times the metric, entry
    # by entry over pairs of channels.
    shared = np.einsum("boc,aoe->bcae", new, new, optimize=True)
    right = np.einsum("boc,oct->bct", new, pulled, optimize=True)
    if right.size <= _DIRECT:
        normal = np.einsum("bcae,ctek->bctaek", shared, blocks, optimize=True)
        kernels = _solved(
            normal.reshape(right.size, right.size), right.reshape(-1)
        ).reshape(right.shape)
    else:
        kernels = _by_gradients(depthwise, shared, blocks, right)
    return kernels, new


def _by_gradients(
    start: Float64, shared: Float64, blocks: Float64, right: Float64
) -> Float64:
    """Solve for depthwise kernels by preconditioned conjugate gradients."""
    inputs = len(blocks)

    def times(x: Float64) -> Float64:
        out = np.empty_like(x)
        for channel in range(inputs):
            # [taps, inputs, taps] with the kernels of all inputs: [a, inputs, taps].
            met = np.einsum("tek,aek->ate", blocks[channel], x, optimize=True)
            out[:, channel] = np.einsum(
                "bae,ate->bt", shared[:, channel], met, optimize=True
            )
        return out

    diagonal = np.einsum("bcbc,ctct->bct", shared, blocks)
    diagonal = np.maximum(diagonal, 1e-12 * max(float(diagonal.max()), 1e-300))
    x = start.copy()
    residue = right - times(x)
    step = residue / diagonal
    weight = float((residue * step).sum())
    for _ in range(_STEPS):
        if not weight > 0:
            break
        image = times(step)
        length = weight / max(float((step * image).sum()), np.finfo(np.float64).tiny)
        x += length * step
        residue -= length * image
        scaled = residue / diagonal
        fresh = float((residue * scaled).sum())
        step = scaled + fresh / weight * step
        weight = fresh
    return x


def _improved_pointwise(
    depthwise: Float64, pointwise: Float64, metric: Float64, pulled: Float64
) -> tuple[Float64, Float64]:
    """Solve for the matrices, then for the kernels; the pointwise part is first.

    Each output has a system of its own. ``pulled`` is the dense kernel times the
    metric, [outputs, inputs, taps].
    """
    outputs, inputs, taps = pulled.shape
    branches = len(depthwise)
    blocks = metric.reshape(inputs, taps, inputs, taps)
    by_taps = np.ascontiguousarray(blocks.transpose(1, 3, 0, 2)).reshape(
        taps * taps, inputs * inputs
    )
    by_inputs = blocks.reshape(inputs, taps * inputs * taps)
    new = np.empty_like(pointwise)
    kernels = np.empty_like(depthwise)
    each = branches * branches * inputs * inputs + branches * taps * inputs * taps
    size = max(1, _CHUNK // each)
    for begin in range(0, outputs, size):
        part = slice(begin, min(begin + size, outputs))
        here = depthwise[:, part]
        count = here.shape[1]
        pairs = np.einsum("bot,aok->obatk", here, here, optimize=True)
        normal = pairs.reshape(count * branches * branches, -1) @ by_taps
        normal = normal.reshape(count, branches, branches, inputs, inputs)
        normal = normal.transpose(0, 1, 3, 2, 4).reshape(
            count, branches * inputs, branches * inputs
        )
        right = np.einsum("oct,bot->obc", pulled[part], here, optimize=True)
        solved = _solved(np.ascontiguousarray(normal), right.reshape(count, -1))
        matrices = solved.reshape(count, branches, inputs)
        new[:, part] = matrices.transpose(1, 0, 2)
        met = matrices.reshape(count * branches, inputs) @ by_inputs
        met = met.reshape(count, branches, taps, inputs, taps)
        normal = np.einsum("obtek,oae->obtak", met, matrices, optimize=True)
        right = np.einsum("oct,obc->obt", pulled[part], matrices, optimize=True)
        solved = _solved(
            np.ascontiguousarray(normal).reshape(
                count, branches * taps, branches * taps
            ),
            right.reshape(count, -1),
        )
        kernels[:, part] = solved.reshape(count, branches, taps).transpose(1, 0, 2)
    return kernels, new
