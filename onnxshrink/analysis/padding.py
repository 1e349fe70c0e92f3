"""Places of padding in calibration samples: they must not count.

Sentences come padded to one length, with a mask that lets the model look away from the
padding. What layers see there changes nothing in the output, but often is most of what
they see: two thirds in a common set of short sentences. Counted in a Gram matrix, a
range or a sample of rows, it makes codes fit values nobody reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["places", "without"]

Array = NDArray[Any]

_MASKS = ("attention_mask", "input_mask")
"""How names of masks end that are 1 for what counts (Hugging Face, Google's BERT)."""


def places(feed: Mapping[str, Array]) -> NDArray[np.int64] | None:
    """Return for each position which one of its sample to look at instead.

    Real positions stand for themselves; those of padding for the real ones in turn. So
    shapes stay as they are and every sample weighs the same, however long.

    Args:
        feed: Inputs of a run by name; the mask is [samples, positions] of 0 and 1.

    Returns:
        [samples, positions], or ``None`` if there is no mask or nothing is padded.
    """
    masks = [array for name, array in feed.items() if name.endswith(_MASKS)]
    if len(masks) != 1 or masks[0].ndim != 2 or not np.isin(masks[0], (0, 1)).all():
        return None
    real = masks[0] != 0
    if real.all():
        return None
    at = np.tile(np.arange(real.shape[1]), (len(real), 1))
    for row, mask in zip(at, real, strict=True):
        if mask.any():
            row[~mask] = np.resize(np.flatnonzero(mask), np.count_nonzero(~mask))
    return at


def without(value: Array, at: NDArray[np.int64] | None) -> Array:
    """Return [samples, positions, ...] with padding replaced, as ``places`` says.

    Values of other shapes are returned as they are.
    """
    if at is None or value.ndim < 3 or value.shape[:2] != at.shape:
        return value
    return np.asarray(value[np.arange(len(at))[:, None], at])
