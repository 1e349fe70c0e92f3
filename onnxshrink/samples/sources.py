"""Data by path: which file or folder holds what.

Tested in tests/samples/test_samples.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from onnxshrink.errors import ModelError, nearest
from onnxshrink.samples.archives import (
    open_item,
    open_npy,
    open_npz,
    open_safetensors,
    refuse_pickle,
    single,
)
from onnxshrink.samples.columns import UNNAMED, Column, Stored
from onnxshrink.samples.images import SUFFIXES as IMAGES
from onnxshrink.samples.images import labelled_files, open_images
from onnxshrink.samples.records import Filed, Item, Records
from onnxshrink.samples.tables import open_csv, open_parquet

__all__ = ["open_arrays", "split_path"]

_READERS: dict[str, Callable[[Path], dict[str, Column]]] = {
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".csv": open_csv,
    ".tsv": open_csv,
    ".parquet": open_parquet,
    ".pq": open_parquet,
}
_MANY = 64
"""Files of a folder above which they are samples, and no inputs by name."""


def _missing(path: str) -> ModelError:
    siblings: list[str] = []
    try:
        parent = Path(path).parent
        if parent.is_dir():
            siblings = [str(parent / p.name) for p in parent.iterdir()]
    except (OSError, ValueError):
        pass
    return ModelError(f"{path} does not exist.{nearest(path, siblings)}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a null byte
        return False


def split_path(text: str) -> tuple[Path, str | None]:
    """Split ``path:words`` where the path exists; a colon may be part of it."""
    if _exists(Path(text)):
        return Path(text), None
    for match in re.finditer(":", text):
        path = Path(text[: match.start()])
        if match.start() and _exists(path):
            return path, text[match.end() :]
    raise _missing(text.partition(":")[0])


def open_arrays(
    path: Path, edge: int | None = None, notes: list[str] | None = None
) -> dict[str, Column]:
    """Open a file or folder of arrays; of plain arrays only headers are read.

    Args:
        path: The file or folder.
        edge: Pixels of a side that images are scaled and cut to.
        notes: Gets what there is to say.

    Raises:
        UsageError: What reads the file is not installed.
        ModelError: It cannot be read.
    """
    if not _exists(path):
        raise _missing(str(path))
    try:
        if path.is_dir():
            return _open_folder(path, edge, [] if notes is None else notes)
        if not path.is_file():
            raise ModelError(f"{path} is no regular file")
        suffix = path.suffix.lower()
        if suffix == ".npy":
            return {UNNAMED: open_npy(path)}
        if suffix in _READERS:
            return _READERS[suffix](path)
        refuse_pickle(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    raise ModelError(
        f"{path} is no data: give a .npz, .npy, .safetensors, .csv or .parquet, or a "
        "folder of images, .npz or .npy"
    )


def _open_folder(path: Path, edge: int | None, notes: list[str]) -> dict[str, Column]:
    packed = sorted(path.glob("*.npz"))
    plain = sorted(path.glob("*.npy"))
    if packed and plain:
        raise ModelError(f"{path} mixes .npz and .npy files; use one kind")
    if plain:
        return _open_npys(path, plain, None)
    if packed:
        return _open_npzs(packed)
    pictures, _, _ = labelled_files(path, IMAGES)
    if pictures:
        columns, said = open_images(path, edge)
        notes += said
        return columns
    files, labels, names = labelled_files(path, (".npy",))
    if files:
        if names:
            shown = ", ".join(f"{n} {name}" for n, name in enumerate(names[:8]))
            notes.append(f"labels of the files, by name: {shown}")
        columns = _open_npys(path, files, labels)
        return columns
    raise ModelError(f"{path} holds no images, .npz or .npy files")


def _open_npys(folder: Path, files: list[Path], labels: object) -> dict[str, Column]:
    """Open a file for each input or, if names do not fit, a file for each sample."""
    records = Records(UNNAMED)
    arrays: dict[str, Column] = {}
    few = len(files) <= _MANY and labels is None
    for file in files:
        column = open_item(file)
        records.append(Filed(column) if column is not None else _value(file))
        if few and column is not None:
            arrays[file.stem] = column
    if labels is None:
        same, found, _ = labelled_files(folder, (".npy",))
        labels = found if same == files else None
    if not few or labels is not None:
        arrays = {}
    arrays[UNNAMED] = records
    if labels is not None:
        arrays["labels"] = Stored(labels)  # type: ignore[arg-type]  # an array
    return arrays


def _value(file: Path) -> Item:
    from onnxshrink.samples.records import held

    return held(single(file))


def _open_npzs(files: list[Path]) -> dict[str, Column]:
    """Open files that continue each other: each is a batch or a sample."""
    parts = [open_npz(file) for file in files]
    columns: dict[str, Records] = {name: Records(name) for name in parts[0]}
    for file, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            raise ModelError(
                f"{file} has arrays {sorted(part)}, {files[0]} has {sorted(parts[0])}"
            )
        for name, column in part.items():
            columns[name].append(Filed(column))
    return dict(columns)
