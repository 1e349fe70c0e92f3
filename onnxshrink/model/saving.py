"""Writing a model: encodings, external data, packages and text, whole or not at all.

Tested in tests/model/test_external.py and tests/model/test_model.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.files import followed, sync, write_file
from onnxshrink.model.exporter import Export, Piece, export
from onnxshrink.model.topology import tensor_of
from onnxshrink.package import SUFFIX, Part, pack_model
from onnxshrink.tensors import refer_to
from onnxshrink.tensors.wire import read_skeleton

if TYPE_CHECKING:
    from onnxshrink.model.model import Model

__all__ = [
    "External",
    "Storage",
    "check_target",
    "encoded",
    "is_unchanged",
    "publish",
    "save",
]

INLINE_LIMIT = 2**31 - 2**24
"""Bytes of weights from which a file must use external data (protobuf's 2 GiB)."""
_EXTERNAL_MINIMUM = 1024
_ALIGNMENT = 4096

Storage = Literal["auto", "plain", "tiny"]
External = Literal["auto", "never", "always"]


def encoded(
    model: Model, storage: Storage, max_decode_ratio: float | None = None
) -> Export:
    """Return the pieces of the file that a model is written as.

    Args:
        model: The model.
        storage: ``auto`` or ``plain``, as for ``Model.save``.
        max_decode_ratio: As for ``Model.save``.

    Raises:
        UsageError: One of them is something else.
    """
    if storage == "plain":
        return export(model)
    if storage == "tiny":
        raise UsageError("storage 'tiny' is for packages; write a .onnxz file")
    if storage != "auto":
        raise UsageError(f"storage is 'auto' or 'plain', not {storage!r}")
    from onnxshrink.storage import Encoder

    ratio = _ratio(max_decode_ratio)
    lent: set[str] = set()
    model.lineage.forget([model.fresh("")])  # notes the names that are there
    numbers = dict(model._numbers)

    def fresh(name: str) -> str:
        lent.add(unused := model.fresh(name))
        return unused

    encoder = Encoder(opset=model.opset, fresh=fresh, max_decode_ratio=ratio)

    def encode(
        constant: gs.Constant,
    ) -> tuple[list[onnx.NodeProto], list[Piece]] | None:
        origin = getattr(constant, "origin", None)
        if isinstance(origin, onnx.TensorProto) and (
            origin.doc_string or origin.metadata_props
        ):
            return None  # decoder nodes have no place for these
        found = encoder.encode(constant.name, tensor_of(constant))
        if found is None:
            return None
        return list(found.nodes), [Piece(proto) for proto in found.initializers]

    try:
        return export(model, encode)
    finally:
        # The model itself does not hold them: the next save uses them again.
        if model._names is not None:
            model._names -= lent
        model.lineage.forget(lent)
        model._numbers = numbers


def _ratio(given: float | None) -> float:
    from onnxshrink.storage import MAX_DECODE_RATIO

    ratio = MAX_DECODE_RATIO if given is None else given
    if not ratio > 0:
        raise UsageError(f"max_decode_ratio is greater than 0, not {ratio}")
    return ratio


def save(
    model: Model,
    path: str | os.PathLike[str],
    storage: Storage = "auto",
    external: External = "auto",
    max_decode_ratio: float | None = None,
) -> tuple[Path, ...]:
    """Do what ``Model.save`` says."""
    check_target(model, path)
    target = followed(path)
    if target.suffix == SUFFIX:
        return _save_package(model, target, storage, external, max_decode_ratio)
    parts = encoded(model, storage, max_decode_ratio)
    total = sum(piece.data_bytes for piece in parts.pieces)
    is_text = target.suffix == ".onnxtxt"
    outside = external == "always" or (
        external == "auto" and (model.external or total >= INLINE_LIMIT)
    )
    if is_text and outside and total < INLINE_LIMIT and external == "auto":
        outside = False
    if is_text and outside:
        raise OutputError(f"cannot write {target}: ONNX text has no external data")
    if not outside and total >= INLINE_LIMIT:
        raise ModelError(
            f"{total / 2**30:.1f} GiB of weights do not fit into one file; "
            "use external='auto'"
        )
    old = _external_files(target)
    data = None
    if is_text:
        write_file(target, [_text(parts.proto())], model.source)
    else:
        if outside:
            data = _write_external(model, target, parts)
        write_file(target, parts.stream(), model.source)
    _remove_stale(model, old - {data})
    return (target, data) if data is not None else (target,)


def _save_package(
    model: Model,
    target: Path,
    storage: Storage,
    external: External,
    max_decode_ratio: float | None,
) -> tuple[Path, ...]:
    """Write a package, one file; ``external`` counts when it is unpacked."""
    if storage not in ("auto", "plain", "tiny"):
        raise UsageError(f"storage is 'auto', 'plain' or 'tiny', not {storage!r}")
    _ratio(max_decode_ratio)
    parts = export(model)
    total = sum(piece.data_bytes for piece in parts.pieces)
    if external == "never" and total >= INLINE_LIMIT:
        raise ModelError(
            f"{total / 2**30:.1f} GiB of weights do not fit into one protobuf, "
            "not even inside a package; use external='auto'"
        )
    files: list[tuple[str, Sequence[Part]]] = []
    if external == "always" or total >= INLINE_LIMIT:
        spans = _external_spans(model, parts)
        data = list(_with_gaps(spans))
        checksum = 0
        for part in data:
            for chunk in [part] if isinstance(part, bytes) else part.raw_chunks():
                checksum = zlib.crc32(chunk, checksum)
        name = f"{target.stem}.onnx.{checksum:08x}.data"
        _point_at(spans, name)
        files.append((name, data))
    content = pack_model(
        list(parts.parts()),
        files,
        tiny=storage == "tiny",
        max_decode_ratio=max_decode_ratio,
    )
    old = _external_files(target)
    write_file(target, content, model.source)
    _remove_stale(model, old)
    return (target,)


def _external_spans(model: Model, parts: Export) -> list[tuple[Piece, int]]:
    """Return the large pieces, and the place of each in the data file."""
    spans: list[tuple[Piece, int]] = []
    offset = 0
    for index, piece in enumerate(parts.pieces):
        source = piece.tensor
        if source is None and piece.header.HasField("raw_data"):
            from onnxshrink.tensors import ProtoTensor

            source = ProtoTensor(piece.header)
        if source is None or source.nbytes < _EXTERNAL_MINIMUM:
            continue
        header = onnx.TensorProto()
        header.CopyFrom(piece.header)
        header.ClearField("raw_data")
        piece = Piece(header, source, piece.constant)
        parts.pieces[index] = piece
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        spans.append((piece, offset))
        offset += source.nbytes
    return spans


def _write_external(model: Model, target: Path, parts: Export) -> Path | None:
    """Write large pieces to a data file and point their headers at it."""
    spans = _external_spans(model, parts)
    if not spans:
        return None
    checksum = 0

    def content() -> Iterator[bytes | memoryview]:
        nonlocal checksum
        for part in _with_gaps(spans):
            for chunk in [part] if isinstance(part, bytes) else part.raw_chunks():
                checksum = zlib.crc32(chunk, checksum)
                yield chunk

    # The name follows from the content: replacing a model never changes the data
    # under the old graph, so a crash between the two renames breaks neither.
    data = write_file(
        target.with_name(f"{target.name}.data"),
        content(),
        model.source,
        lambda: target.with_name(f"{target.name}.{checksum:08x}.data"),
    )
    _point_at(spans, data.name)
    return data


def check_target(model: Model, target: str | os.PathLike[str]) -> None:
    """Do what ``Model.check_target`` says."""
    if "\0" in str(target):
        raise OutputError(f"cannot write {str(target)!r}: it is no file name")
    try:
        final = followed(target)
        if final.is_dir():
            raise OutputError(f"cannot write {target}: it is a folder")
        if not final.parent.is_dir():
            raise OutputError(f"cannot write {target}: there is no such folder")
        exists = final.exists()
        if exists and not final.is_file():
            raise OutputError(f"cannot write {target}: it is not a regular file")
        own = exists and any(
            file.exists() and os.path.samefile(final, file) for file in model._files
        )
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
    if own:
        raise OutputError(
            f"{target} is the input itself, which is never overwritten; "
            "choose another output"
        )


def publish(
    model: Model, files: Sequence[Path], target: str | os.PathLike[str]
) -> tuple[Path, ...]:
    """Do what ``Model.publish`` says."""
    check_target(model, target)
    place = followed(target)
    old = _external_files(place)
    moved = []
    try:
        mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else None
        for file in [*files[1:], files[0]]:
            final = place if file is files[0] else place.with_name(file.name)
            if mode is not None:
                os.chmod(file, mode)
            os.replace(file, final)
            moved.append(final)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
    sync(place.parent)
    _remove_stale(model, old - set(moved))
    return (moved[-1], *moved[:-1])


def _remove_stale(model: Model, files: set[Path | None]) -> None:
    """Delete the data files of the model that was replaced; ours stay."""
    for file in files:
        if file is None:
            continue
        with contextlib.suppress(OSError):
            if not any(os.path.samefile(file, own) for own in model._files):
                file.unlink()


def is_unchanged(model: Model) -> bool:
    """Do what ``Model.is_unchanged`` says."""
    if model.source is None:
        return False
    try:
        fresh = type(model).load(model.source, check=False)
    except ModelError:
        return False
    ours, theirs = export(model), export(fresh)
    return (
        ours.template == theirs.template
        and ours.head == theirs.head
        and ours.tail == theirs.tail
        and len(ours.pieces) == len(theirs.pieces)
        and all(a.same(b) for a, b in zip(ours.pieces, theirs.pieces, strict=True))
    )


def _with_gaps(spans: Sequence[tuple[Piece, int]]) -> Iterator[Part]:
    """Yield the bytes of a data file: values, with zeros between to align them."""
    at = 0
    for piece, start in spans:
        if start > at:
            yield bytes(start - at)
        assert piece.tensor is not None
        yield piece.tensor
        at = start + piece.tensor.nbytes


def _point_at(spans: Sequence[tuple[Piece, int]], name: str) -> None:
    """Make pieces refer to a data file."""
    for piece, start in spans:
        assert piece.tensor is not None
        refer_to(piece.header, name, start, piece.tensor.nbytes)
        piece.tensor = None


def _text(proto: onnx.ModelProto) -> bytes:
    """Return ONNX text that reads back as the same nodes and weights.

    Raises:
        OutputError: The text form cannot hold this model.
    """
    reason = "it reads back differently"
    try:
        text = onnx.printer.to_text(proto)
        back = onnx.parser.parse_model(text)
        if _essence(back.graph) == _essence(proto.graph):
            return str(text).encode()
    except (onnx.parser.ParseError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    raise OutputError(
        f"ONNX text cannot hold this model ({reason}); write a .onnx file instead"
    )


def _essence(graph: onnx.GraphProto) -> list[Any]:
    """Return a graph without its notes and without where its data is stored."""

    def tensor(proto: onnx.TensorProto) -> tuple[Any, ...]:
        values = onnx.numpy_helper.to_array(proto)
        data = values.tolist() if values.dtype == object else values.tobytes()
        return proto.data_type, tuple(proto.dims), data

    def attr(proto: onnx.AttributeProto) -> tuple[Any, ...]:
        if proto.type == onnx.AttributeProto.TENSOR:
            return proto.name, tensor(proto.t)
        if proto.type == onnx.AttributeProto.GRAPH:
            return proto.name, _essence(proto.g)
        plain = onnx.AttributeProto()
        plain.CopyFrom(proto)
        plain.ClearField("doc_string")
        return proto.name, plain.SerializeToString(deterministic=True)

    return [
        [
            (
                node.op_type,
                node.domain,
                list(node.input),
                list(node.output),
                [attr(a) for a in node.attribute],
            )
            for node in graph.node
        ],
        [info.name for info in graph.input],
        [info.name for info in graph.output],
        {t.name: tensor(t) for t in graph.initializer},
        len(graph.sparse_initializer),
    ]


def _external_files(path: Path) -> set[Path | None]:
    """Return the data files that a model refers to, of those we named."""
    try:
        if not path.is_file():
            return set()
        proto, _ = read_skeleton(path)
    except (ModelError, OSError):
        return set()
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return {
        path.with_name(entry.value)
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and ours.fullmatch(str(entry.value))
    }
