"""Storage: how the values of an initializer are written, decided last and exactly.

Passes change values; ``Encoder`` writes each initializer in the fewest bytes that
standard ONNX nodes turn back, bit for bit, when onnxruntime loads the file and folds
constants. ``onnxshrink.model.encodings`` finds them again when a model is loaded.
"""

from __future__ import annotations

from onnxshrink.storage.encoder import MAX_DECODE_RATIO, Encoder, Encoding, plain_nbytes

__all__ = [
    "MAX_DECODE_RATIO",
    "Encoder",
    "Encoding",
    "plain_nbytes",
]
