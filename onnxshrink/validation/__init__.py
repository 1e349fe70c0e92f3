"""Validation: what a model may lose, and whether it lost more."""

from __future__ import annotations

from onnxshrink.measuring.differences import OutputMetrics
from onnxshrink.validation.budget import Budget, grown
from onnxshrink.validation.metrics import Metric, MetricChange
from onnxshrink.validation.validator import Validator
from onnxshrink.validation.verdict import Verdict

__all__ = [
    "Budget",
    "Metric",
    "MetricChange",
    "OutputMetrics",
    "Validator",
    "Verdict",
    "grown",
]
