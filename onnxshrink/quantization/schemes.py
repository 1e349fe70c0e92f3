"""How real values become integer codes: types, ranges, scales and zero points.

A code ``q`` stands for the real value ``(q - zero_point) * scale``: the affine scheme
of Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1. ``quantize`` gives the bits that
onnxruntime's QuantizeLinear gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

from onnxshrink.errors import UsageError
from onnxshrink.tensors import bits_of, numpy_type

__all__ = [
    "INT8",
    "MIN_OPSET",
    "UINT8",
    "Scheme",
    "affine",
    "limits",
    "quantize",
]

Array = NDArray[Any]
Float32 = NDArray[np.float32]
_Type = onnx.TensorProto

MIN_OPSET: dict[int, int] = {
    _Type.INT8: 10,
    _Type.UINT8: 10,
    _Type.INT16: 21,
    _Type.UINT16: 21,
    _Type.INT4: 21,
    _Type.UINT4: 21,
    _Type.INT2: 25,
    _Type.UINT2: 25,
}
"""ai.onnx opset from which QuantizeLinear and DequantizeLinear take a type of codes;
scales for each channel need 13, for blocks 21."""

_TINY = float(np.finfo(np.float32).tiny)
"""Smallest scale: a smaller one is denormal, and kernels may flush it to zero."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Scheme:
    """A type of codes, those of its values that are used, and what shares a scale.

    Attributes:
        data_type: ONNX element type: one of INT8, UINT8, INT16, UINT16, INT4, UINT4,
            INT2, UINT2.
        low: Smallest code used; above the type's for 7 bits, ternary and binary codes.
        high: Largest code used.
        symmetric: Whether the zero point is the middle: 0, or of an unsigned type the
            upper middle of ``low`` and ``high``.
        axis: Axis of the channels with a scale of their own, or that blocks are cut
            along; ``None``: one scale for all.
        block: Values along ``axis`` that share a scale; 0: no blocks.
    """

    data_type: int
    low: int
    high: int
    symmetric: bool
    axis: int | None = None
    block: int = 0

    def __post_init__(self) -> None:
        """Refuse what the type cannot hold.

        Raises:
            UsageError: The type is none of codes, its range does not hold ``low`` and
                ``high`` in this order, or a block has no axis.
        """
        if self.data_type not in MIN_OPSET:
            name = _Type.DataType.Name(self.data_type)
            raise UsageError(
                f"{name} is no type of codes; there are "
                f"{', '.join(_Type.DataType.Name(known) for known in MIN_OPSET)}"
            )
        least, most = limits(self.data_type)
        if not least <= self.low < self.high <= most:
            raise UsageError(
                f"codes from {self.low} to {self.high} do not fit "
                f"{_Type.DataType.Name(self.data_type)} ({least} to {most})"
            )
        if self.block < 0 or (self.block and self.axis is None):
            raise UsageError(f"blocks of {self.block} values need an axis")

    @property
    def signed(self) -> bool:
        """Whether the type has negative codes."""
        return limits(self.data_type)[0] < 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy type of the codes (ml_dtypes below 8 bits)."""
        return numpy_type(self.data_type)

    @property
    def middle(self) -> int:
        """Zero point of a symmetric scheme."""
        return 0 if self.signed else (self.low + self.high + 1) // 2

    @property
    def opset(self) -> int:
        """Lowest ai.onnx opset that has this scheme."""
        needed = MIN_OPSET[self.data_type]
        if self.axis is not None:
            needed = max(needed, 13)
        return max(needed, 21) if self.block else needed


def limits(data_type: int) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer type of codes."""
    bits = bits_of(data_type)
    if _Type.DataType.Name(data_type).startswith("U"):
        return 0, (1 << bits) - 1
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


INT8 = Scheme(_Type.INT8, -127, 127, symmetric=True)
"""Weights; -128 is left out so that the range is the same on both sides."""
UINT8 = Scheme(_Type.UINT8, 0, 255, symmetric=False)
"""Activations."""


def affine(low: ArrayLike, high: ArrayLike, scheme: Scheme) -> tuple[Float32, Array]:
    """Choose scale and zero point for a range of real values.

    The range is widened to include 0, which always has a code of its own: padding and
    Relu need it (Jacob et al. 2018, section 2.1). A range of zero width gets scale 1,
    a scale below the normal float32 numbers is raised to the smallest of them.

    Args:
        low: Smallest real value: one, or one for each channel (or block).
        high: Largest real value, of the same shape.
        scheme: The codes.

    Returns:
        Scale, float32, and zero point, of the codes' type, both of the shape of
        ``low``.

    Raises:
        UsageError: A bound is NaN or infinite, or above the other.
    """
    least = np.asarray(low, dtype=np.float64)
    most = np.asarray(high, dtype=np.float64)
    if not (np.isfinite(least).all() and np.isfinite(most).all()):
        raise UsageError("a range to quantize has a bound that is NaN or infinite")
    if (least > most).any():
        raise UsageError("a range to quantize has its lower bound above the upper")
    least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
    if scheme.symmetric:
        zero = np.full(least.shape, scheme.middle, dtype=np.int64)
        above = most / max(scheme.high - scheme.middle, 1)
        below = -least / max(scheme.middle - scheme.low, 1)
        scale = _normal(np.maximum(above, below))
    else:
        scale = _normal((most - least) / (scheme.high - scheme.low))
        exact = scheme.low - least / scale.astype(np.float64)
        zero = np.clip(np.rint(exact), scheme.low, scheme.high).astype(np.int64)
    return scale, zero.astype(scheme.dtype)


def _normal(scale: Array) -> Float32:
    """Return float32 scales that a kernel may divide by."""
    safe = np.where(scale > 0, np.clip(scale, _TINY, _LARGEST), 1.0)
    return np.asarray(safe, dtype=np.float32)


def quantize(
    values: Array, scale: ArrayLike, zero_point: ArrayLike, scheme: Scheme
) -> Array:
    """Return the nearest codes, halves to even, as QuantizeLinear does.

    Args:
        values: Real values of any shape; float32 is what the runtime computes with.
        scale: float32: a scalar, one for each channel of ``scheme.axis``, or one for
            each block (the shape of ``values`` with that axis divided by the block).
        zero_point: Of the same shape.
        scheme: The codes; what is beyond ``low`` and ``high`` becomes these.

    Returns:
        Codes of ``scheme.dtype``, of the shape of ``values``.
    """
    shape = np.shape(values)
    step = _spread(np.asarray(scale, np.float32), shape, scheme.axis, scheme.block)
    zero = _spread(
        np.asarray(zero_point).astype(np.int32), shape, scheme.axis, scheme.block
    )
    # A quotient beyond float32 is infinite in the runtime too, and saturates.
    with np.errstate(over="ignore"):
        quotient = np.asarray(values, dtype=np.float32) / step
    # Clipped before the zero point is added, where float32 still counts exactly.
    steps = np.rint(np.clip(quotient, scheme.low - zero, scheme.high - zero))
    codes = steps.astype(np.int32) + zero
    return np.asarray(codes.astype(scheme.dtype))


def _spread(
    parameters: Array, shape: tuple[int, ...], axis: int | None, block: int
) -> Array:
    """Shape scales or zero points so that they broadcast against values."""
    if axis is None or parameters.ndim == 0:
        return parameters.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise UsageError(f"values of shape {list(shape)} have no axis {axis}")
    axis %= len(shape)
    if block:
        repeated = np.repeat(parameters, block, axis=axis)
        return repeated.take(np.arange(shape[axis]), axis=axis)
    around = [1] * len(shape)
    around[axis] = shape[axis]
    if parameters.size != shape[axis]:
        raise UsageError(
            f"{parameters.size} scales do not fit axis {axis} of {list(shape)}"
        )
    return parameters.reshape(around)
