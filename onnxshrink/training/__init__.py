"""Training without a framework: gradients, losses and optimizers as ONNX nodes."""

from __future__ import annotations

from onnxshrink.training.gradients import (
    GradContext,
    gradients,
    is_covered,
    rule,
    zero_gradient,
)
from onnxshrink.training.losses import (
    cosine,
    cross_entropy,
    mse,
    soft_cross_entropy,
    weighted,
)
from onnxshrink.training.optimizers import Adam, AdamW, Optimizer, Sgd, clip_by_norm
from onnxshrink.training.preparation import prepare
from onnxshrink.training.step import Loss, TrainingStep

__all__ = [
    "Adam",
    "AdamW",
    "GradContext",
    "Loss",
    "Optimizer",
    "Sgd",
    "TrainingStep",
    "clip_by_norm",
    "cosine",
    "cross_entropy",
    "gradients",
    "is_covered",
    "mse",
    "prepare",
    "rule",
    "soft_cross_entropy",
    "weighted",
    "zero_gradient",
]
