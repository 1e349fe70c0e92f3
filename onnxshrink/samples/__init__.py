"""Samples: data from files, arrays or a seed, and their disjoint splits."""

from __future__ import annotations

from onnxshrink.samples.samples import Samples
from onnxshrink.samples.splits import Splits

__all__ = ["Samples", "Splits"]
