"""How large the channels of a value are, as far as the graph itself says.

What a normalisation gives has channels of the size of its gain, whatever the data: the
rest is of size one. Language models have gains that differ by factors of ten and more,
so that what a layer reads is known well enough to weigh its weights by, without a run.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.model import Model

__all__ = ["squares_of"]

Float64 = NDArray[np.float64]

_GAINS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2, None),
}
"""Inputs that are gain and shift, by operator."""
_SCALED = frozenset({"Cast", "Div", "Mul", *_GAINS})
"""What makes a normalised value that a Mul gives its gain."""


def squares_of(model: Model, value: gs.Tensor, channels: int) -> Float64 | None:
    """Return the mean square of each channel of a normalised value.

    Args:
        model: The model.
        value: A value, whose channels are its last axis.
        channels: How many there are.

    Returns:
        float64 [channels], finite and positive in places; ``None`` if no normalisation
        makes the value.
    """
    if not value.inputs:
        return None
    node = value.inputs[0]
    if node.op in _GAINS:
        gain, shift = _GAINS[node.op]
        found = _vector(model, node, gain, channels)
        if found is None or node.outputs[0] is not value:
            return None
        squares = found**2
        moved = None if shift is None else _vector(model, node, shift, channels)
        return _usable(squares if moved is None else squares + moved**2)
    if node.op != "Mul" or len(node.inputs) != 2:
        return None
    for index in (0, 1):
        found = _vector(model, node, index, channels)
        makers = node.inputs[1 - index].inputs
        if found is not None and makers and makers[0].op in _SCALED:
            return _usable(found**2)
    return None


def _vector(model: Model, node: gs.Node, index: int, channels: int) -> Float64 | None:
    """Return a constant with one value for each channel, the last axis."""
    if index >= len(node.inputs):
        return None
    known = model.constant(node.inputs[index])
    if known is None or known.size != channels or known.shape[-1:] != (channels,):
        return None
    if known.dtype.kind != "f":
        return None
    return known.read().astype(np.float64).reshape(-1)


def _usable(squares: Float64) -> Float64 | None:
    good = np.isfinite(squares).all() and squares.max(initial=0.0) > 0
    return squares if good else None
