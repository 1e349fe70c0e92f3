"""Reading a model's proto from wherever it is, without its large tensors.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
from google.protobuf.message import DecodeError

from onnxshrink.errors import ModelError
from onnxshrink.package import MAGIC, Package, is_package
from onnxshrink.tensors.wire import read_skeleton

__all__ = ["SupportsModelProto", "read_source"]


class SupportsModelProto(Protocol):
    """Anything that carries a ModelProto, such as a framework's export result."""

    @property
    def model_proto(self) -> Any:
        """The proto, or a method that returns it."""


def read_source(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto | SupportsModelProto,
) -> tuple[onnx.ModelProto, Mapping[int, tuple[int, int]], Package | None, Path | None]:
    """Return the proto of a model, where its raw data lies, its package and its path.

    Raises:
        ModelError: It is none of what ``Model.load`` takes, or cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        package = _package(path)
        proto, ranges = package.skeleton() if package else _read_path(path)
        return proto, ranges, package, path
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        if data[: len(MAGIC) - 1] == MAGIC[:-1]:
            package = Package(data)
            return *package.skeleton(), package, None
        return _parse(data, "the given bytes"), {}, None, None
    return _proto_of(source), {}, None, None


def _package(path: Path) -> Package | None:
    """Return the package that a path leads to, if it is one."""
    try:
        if path.is_file() and is_package(path):
            return Package(path.absolute())
    except (OSError, ValueError):
        pass  # said by what reads it next
    return None


def _read_path(path: Path) -> tuple[onnx.ModelProto, dict[int, tuple[int, int]]]:
    try:
        if not path.exists():
            raise ModelError(f"{path} does not exist")
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file")
        if path.suffix == ".onnxtxt":
            return _parse_text(path.read_bytes(), str(path)), {}
        return read_skeleton(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error


def _parse_text(data: bytes, label: str) -> onnx.ModelProto:
    try:
        return onnx.parser.parse_model(data.decode())
    except (onnx.parser.ParseError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{label} is not ONNX text: {reason[:300]}") from error


def _parse(data: bytes, label: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{label} are empty; expected an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{label} are not an ONNX model or are truncated") from error
    return proto


def _proto_of(source: object) -> onnx.ModelProto:
    for name in ("model_proto", "to_model_proto", "to_proto", "proto"):
        found = getattr(source, name, None)
        if callable(found) and not isinstance(found, onnx.ModelProto):
            found = found()
        if isinstance(found, onnx.ModelProto):
            return found
    if isinstance(source, onnx.ModelProto):
        return source
    # onnx_ir writes its models with a function of its own; it is there if they are.
    package = sys.modules.get(type(source).__module__.partition(".")[0])
    write = getattr(package, "to_proto", None)
    if callable(write) and hasattr(source, "graph"):
        found = write(source)
        if isinstance(found, onnx.ModelProto):
            return found
    raise ModelError(
        f"cannot load a model from {type(source).__name__}; expected a path, bytes, "
        "a ModelProto or an object with model_proto"
    )
