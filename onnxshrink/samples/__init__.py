"""Samples: data from files, arrays or a seed, and their disjoint splits."""

from __future__ import annotations

from onnxshrink.samples.samples import (
    Samples,
    Splits,
)

__all__ = [
    "Samples",
    "Splits",
]
