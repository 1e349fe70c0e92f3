"""What removing inputs of a linear layer costs, and how those that stay make up for it.

A layer gives ``Y = X W^T``; ``H = E[x x^T]`` is the second moment of its inputs, about
their mean where a bias takes up the mean. Removing the inputs ``P`` and fitting the
weights of all others anew adds

    sum over outputs of f_o * w_oP ([H^-1]_PP)^-1 w_oP^T

to ``sum_o f_o E[(y_o - y'_o)^2]``: Optimal Brain Surgeon for a block of weights
(Hassibi and Stork 1993, section 3; for channels: He et al. 2017, section 3.2). The best
weights of what stays, ``S``, are ``W H[:, S] (H[S, S])^-1``, a row for each output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["block_losses", "energies", "refit"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_DAMPING = 1e-6
"""Share of the mean diagonal that is added to moments before they are inverted."""


def energies(
    weights: Array, moments: Array | None, blocks: Array, outputs: Array | None = None
) -> Float64:
    """Return what each block of inputs adds to the outputs, nothing fitted anew.

    Args:
        weights: [outputs, inputs].
        moments: float64 [inputs, inputs]; ``None``: all inputs count alike.
        blocks: Inputs that go together, int64 [blocks, inputs of a block].
        outputs: Weight of an error of each output, [outputs]; ``None`` for ones.

    Returns:
        ``sum_o f_o w_oP H_PP w_oP^T`` by block, float64 [blocks].
    """
    scaled = _scaled(weights, outputs)
    parts = scaled[:, blocks]  # [outputs, blocks, inputs of a block]
    if moments is None:
        return np.asarray(np.square(parts).sum(axis=(0, 2)))
    inner = moments[blocks[:, :, None], blocks[:, None, :]]
    return np.asarray(np.einsum("obi,bij,obj->b", parts, inner, parts, optimize=True))


def block_losses(
    weights: Array, moments: Array, blocks: Array, outputs: Array | None = None
) -> Float64:
    """Return what removing each block of inputs costs once all others are fitted anew.

    Args:
        weights: [outputs, inputs].
        moments: float64 [inputs, inputs]; dead inputs are fine.
        blocks: Inputs that go together, int64 [blocks, inputs of a block].
        outputs: Weight of an error of each output, [outputs]; ``None`` for ones.

    Returns:
        Loss by block, float64 [blocks].
    """
    scaled = _scaled(weights, outputs)
    inverse = scipy.linalg.cho_solve(
        scipy.linalg.cho_factor(_damped(moments), lower=True), np.eye(len(moments))
    )
    inner = np.linalg.inv(inverse[blocks[:, :, None], blocks[:, None, :]])
    parts = scaled[:, blocks]
    found = np.einsum("obi,bij,obj->b", parts, inner, parts, optimize=True)
    return np.asarray(np.maximum(found, 0.0))


def refit(weights: Array, moments: Array, kept: Array) -> Float64:
    """Return weights of the inputs that stay; those of the others are zero.

    Args:
        weights: [outputs, inputs].
        moments: float64 [inputs, inputs].
        kept: Whether each input stays, bool [inputs].

    Returns:
        float64 [outputs, inputs].
    """
    found = np.zeros(weights.shape)
    if not kept.any():
        return found
    damped = _damped(moments)
    inner = damped[np.ix_(kept, kept)]
    # The damping pulls what stays to the weights that it had.
    gone = weights[:, ~kept].astype(np.float64) @ damped[np.ix_(~kept, kept)]
    factor = scipy.linalg.cho_factor(inner, lower=True)
    found[:, kept] = weights[:, kept] + scipy.linalg.cho_solve(factor, gone.T).T
    return found


def _scaled(weights: Array, outputs: Array | None) -> Float64:
    dense = np.asarray(weights, np.float64)
    if outputs is None:
        return dense
    return np.asarray(dense * np.sqrt(outputs)[:, None])


def _damped(moments: Array) -> Float64:
    damped = np.array(moments, np.float64)
    mean = float(np.trace(damped)) / max(1, len(damped))
    damped[np.diag_indices_from(damped)] += max(
        _DAMPING * mean, np.finfo(np.float64).tiny ** 0.5
    )
    return damped
