"""Tensors: values that stay where they are until somebody reads them."""

from __future__ import annotations

from onnxshrink.tensors.lazy import (
    CHUNK,
    ArrayTensor,
    FileTensor,
    LazyTensor,
    ProtoTensor,
    SparseTensor,
    bits_of,
    external_range,
    external_tensor,
    numpy_type,
    plain_bytes,
    refer_to,
    same_bits,
    values_of,
)

__all__ = [
    "ArrayTensor",
    "CHUNK",
    "FileTensor",
    "LazyTensor",
    "ProtoTensor",
    "SparseTensor",
    "bits_of",
    "external_range",
    "external_tensor",
    "numpy_type",
    "plain_bytes",
    "refer_to",
    "same_bits",
    "values_of",
]
