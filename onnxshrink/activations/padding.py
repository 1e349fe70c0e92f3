"""Padding in calibration samples, which statistics must not count.

Sentences come padded to one length, with a mask by which the model ignores the padding.
What layers see there changes no output, but may be most of what they see: two thirds in
a common set of short sentences. Statistics that counted it would fit codes to values
that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.statistics import Multi, Statistic

__all__ = ["feed", "mask"]

Array = NDArray[Any]

_MASKS = ("attention_mask", "input_mask")
"""How names of masks end that are 1 for what counts (Hugging Face, Google's BERT)."""


def mask(inputs: Mapping[str, Array]) -> NDArray[np.bool_] | None:
    """Return which positions of each sample are real.

    Args:
        inputs: Inputs of a run by name; the mask is [samples, positions] of 0 and 1.

    Returns:
        bool [samples, positions], or ``None`` if there is no mask, nothing is padded,
        or a sample is nothing but padding.
    """
    masks = [array for name, array in inputs.items() if name.endswith(_MASKS)]
    if len(masks) != 1 or masks[0].ndim != 2 or not np.isin(masks[0], (0, 1)).all():
        return None
    real = masks[0] != 0
    return None if real.all() or not real.any(axis=1).all() else real


def feed(
    statistic: Statistic, value: Array, real: NDArray[np.bool_] | None = None
) -> None:
    """Update a statistic with the real positions of a value.

    A statistic whose rows are all axes but the last sees each real row once. Others
    need the shape as it is: they see the real positions of the same sample, repeated,
    in the place of its padding.

    Args:
        statistic: The statistic.
        value: [samples, positions, ...]; of another shape it is taken as it is.
        real: As ``mask`` gives it.
    """
    if isinstance(statistic, Multi):
        for part in statistic.parts.values():
            feed(part, value, real)
    elif real is None or value.ndim < 3 or value.shape[:2] != real.shape:
        statistic.update(value)
    elif getattr(statistic, "axis", None) == -1:
        statistic.update(value[real][None])
    else:
        statistic.update(value[np.arange(len(real))[:, None], _in_turn(real)])


def _in_turn(real: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the position to read at each: itself, or for padding a real one."""
    at = np.tile(np.arange(real.shape[1]), (len(real), 1))
    for row, here in zip(at, real, strict=True):
        row[~here] = np.resize(np.flatnonzero(here), np.count_nonzero(~here))
    return at
