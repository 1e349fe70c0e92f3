"""How many samples a model runs on at a time, found out where batches fail.

Tested in tests/test_manager.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.samples import Splits

__all__ = ["without_batches"]


def without_batches(
    splits: Splits,
    session: Callable[[], runtime.Session],
    again: Callable[[], Splits] | None = None,
) -> Splits | None:
    """Return splits whose samples run alone, if that is what the model needs.

    Such are models with a Reshape to a fixed size, an initial state of one row, or a
    GroupQueryAttention behind a past.

    Args:
        splits: Samples on which a run failed.
        session: Opens the model.
        again: Makes random inputs again, of one sample each.

    Returns:
        ``None`` where the samples run as they are, or single ones fail too.
    """
    samples = splits.evaluation or splits.calibration
    if samples is None or samples.batch not in (None, 1) or len(samples) < 2:
        return None
    single = splits
    try:
        opened = session()
        if samples.random:
            if again is None:
                return None
            few, single = samples.read([0]), again()
            assert single.evaluation is not None
            one = single.evaluation.read([0])
        elif samples.whole or samples.batch is not None:
            return None
        else:
            few, one = samples.first(2), samples.read(np.array([0]))
    except ModelError:
        return None
    try:
        opened.run(few)
    except ModelError as error:
        why = str(error).removeprefix("onnxruntime cannot run it: ")
    else:
        return None
    try:
        opened.run(one)
    except ModelError:
        return None
    return single.one_by_one(
        f"each run takes one sample, since two at a time do not run ({why[:160]})"
    )
