"""Statistics: what is summed up over the values of a tensor, batch by batch."""

from __future__ import annotations

from onnxshrink.statistics.statistics import (
    ChannelNorm,
    ChannelRange,
    ConvGram,
    ConvNorm,
    ConvSample,
    ConvWindow,
    Gram,
    Histogram,
    Mean,
    Moments,
    Multi,
    Range,
    Sample,
    Statistic,
    Stored,
)

__all__ = [
    "ChannelNorm",
    "ChannelRange",
    "ConvGram",
    "ConvNorm",
    "ConvSample",
    "ConvWindow",
    "Gram",
    "Histogram",
    "Mean",
    "Moments",
    "Multi",
    "Range",
    "Sample",
    "Statistic",
    "Stored",
]
