"""Storage: how the values of an initializer are written, decided last and exactly.

Passes change values; ``Encoder`` writes each initializer in the fewest bytes that
standard ONNX nodes turn back, bit for bit, when onnxruntime loads the file and folds
constants. ``recognise`` finds these nodes when a model is loaded and puts the plain
weights back, unread until someone asks.
"""

from __future__ import annotations

from onnxshrink.storage.decoder import DecodedTensor, recognise
from onnxshrink.storage.encoder import MAX_DECODE_RATIO, Encoder, Encoding, plain_nbytes

__all__ = [
    "MAX_DECODE_RATIO",
    "DecodedTensor",
    "Encoder",
    "Encoding",
    "plain_nbytes",
    "recognise",
]
