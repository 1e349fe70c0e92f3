"""Validation: what a model may lose, and whether it lost more."""

from __future__ import annotations

from onnxshrink.validation.validator import (
    Budget,
    Metric,
    MetricChange,
    OutputMetrics,
    Validator,
    Verdict,
    grown,
)

__all__ = [
    "Budget",
    "Metric",
    "MetricChange",
    "OutputMetrics",
    "Validator",
    "Verdict",
    "grown",
]
