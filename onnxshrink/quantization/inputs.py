"""Gram matrices of what layers read, within the bounds of quantization.

Tested in tests/passes/test_quantize.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from onnxshrink.activations.inputs import (
    gather_inputs,
    gram_bytes,
    groups_of,
    seen_from_outside,
)
from onnxshrink.base import Context
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.statistics import Statistic, Stored
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight

__all__ = ["groups", "input_grams"]

_HELD = 128 << 20
"""Bytes of Gram matrices that are held at the same time."""
_SLICE = 32 << 20
"""Bytes of activations that are held at the same time."""
_LARGEST = 256 << 20
"""Bytes of a Gram matrix from which a layer is not watched."""


def groups(layers: Iterable[LinearWeight]) -> Iterator[list[LinearWeight]]:
    """Cut layers that can be watched into groups for one run each."""
    small = (layer for layer in layers if gram_bytes(layer) <= _LARGEST)
    return groups_of(seen_from_outside(small), _HELD)


def input_grams(
    model: Model,
    layers: Sequence[LinearWeight],
    ctx: Context,
    beside: Mapping[str, Stored] | None = None,
    *,
    cache: Path | None = None,
) -> tuple[dict[str, InputStatistics], dict[str, Statistic]]:
    """Gather the Gram matrices of layers in one run over the calibration samples.

    Args:
        model: The model.
        layers: The layers, as ``groups`` gives them.
        ctx: Samples and session options.
        beside: Further statistics, by the name of their tensor, for the same run.
        cache: Folder to keep what is gathered in; see ``gather_inputs``.

    Returns:
        What layers read, by the name of the weight; and the statistics of ``beside``.

    Raises:
        ModelError: A layer reads NaN or infinity on a sample.
    """
    seen, others = gather_inputs(
        ctx, layers, beside, model=model, slice_bytes=_SLICE, folder=cache
    )
    for name, one in seen.items():
        if not one.is_finite:
            raise ModelError(
                f"{name} multiplies NaN or infinity on the calibration data; "
                f"skip={name} leaves it alone"
            )
    return seen, others
