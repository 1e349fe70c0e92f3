"""Statistics: what is summed up over the values of a tensor, batch by batch."""

from __future__ import annotations

from onnxshrink.statistics.base import Multi, Statistic, Stored
from onnxshrink.statistics.moments import ChannelNorm, Mean, Moments
from onnxshrink.statistics.products import Gram
from onnxshrink.statistics.ranges import ChannelRange, Counts, Histogram, Range
from onnxshrink.statistics.rows import Sample
from onnxshrink.statistics.windows import ConvGram, ConvNorm, ConvSample, ConvWindow

__all__ = [
    "ChannelNorm",
    "ChannelRange",
    "ConvGram",
    "ConvNorm",
    "ConvSample",
    "ConvWindow",
    "Counts",
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
