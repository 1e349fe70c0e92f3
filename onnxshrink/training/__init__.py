"""Training without a framework: gradients, losses and optimizers as ONNX nodes."""

from __future__ import annotations

from onnxshrink.training.gradients import (
    GradContext,
    gradients,
    is_covered,
    rule,
    zero_gradient,
)
from onnxshrink.training.preparation import prepare

__all__ = [
    "GradContext",
    "gradients",
    "is_covered",
    "prepare",
    "rule",
    "zero_gradient",
]
