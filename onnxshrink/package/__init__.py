"""Packages: entropy-coded files (``.onnxz``) that give a model back bit for bit.

``docs/package-format.md`` describes the format. Works on bytes, protos and lazy
tensors; ``Model`` loads and saves packages by this room.
"""

from __future__ import annotations

from onnxshrink.package.container import (
    MAGIC,
    SUFFIX,
    Package,
    PackedTensor,
    Part,
    is_package,
    pack_parts,
    skeleton_of,
)
from onnxshrink.package.sources import pack_bytes, pack_file, pack_model
from onnxshrink.package.unpacking import unpack

__all__ = [
    "MAGIC",
    "SUFFIX",
    "Package",
    "PackedTensor",
    "Part",
    "is_package",
    "pack_bytes",
    "pack_file",
    "pack_model",
    "pack_parts",
    "skeleton_of",
    "unpack",
]
