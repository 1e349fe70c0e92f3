"""Folders of images: ``photos/:input=rgb/255@chw,edge=224``.

The arrays of such a folder are ``rgb`` (uint8, [height, width, 3]) and ``gray`` (uint8,
[height, width]). Labels are the folders that the images lie in, numbered in the order
of their names, or the second column of ``labels.csv`` beside the images, by file name.
With ``edge=``, images are scaled so that their shorter side has so many pixels, then
cut in the middle to a square; without, all have to be of one size.

Tested in tests/samples/test_images.py.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.errors import ModelError, UsageError
from onnxshrink.samples.columns import Array, Column, Stored
from onnxshrink.samples.records import Made

__all__ = ["SUFFIXES", "labelled_files", "open_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
"""What names of image files may end in."""
_MOST_PIXELS = 100_000_000
"""Pixels of one image that are decoded."""
_LARGEST_EDGE = 8192
_LABEL_FILES = ("labels.csv", "labels.txt")


def labelled_files(
    folder: Path, suffixes: Sequence[str]
) -> tuple[list[Path], Array | None, list[str]]:
    """Return files below a folder in order, their labels, and the names of classes.

    Raises:
        ModelError: A labels file does not fit the files.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in suffixes and file.is_file()
    )
    if files:
        for name in _LABEL_FILES:
            if (folder / name).is_file():
                return files, *_from_file(folder / name, files)
        return files, None, []
    classes = sorted(part for part in folder.iterdir() if part.is_dir())
    labels: list[int] = []
    for number, part in enumerate(classes):
        mine = sorted(
            file
            for file in part.rglob("*")
            if file.suffix.lower() in suffixes and file.is_file()
        )
        files += mine
        labels += [number] * len(mine)
    names = [part.name for part in classes]
    return files, np.array(labels, np.int64) if files else None, names


def _from_file(path: Path, files: Sequence[Path]) -> tuple[Array, list[str]]:
    """Read the labels of files: lines of a name and a label."""
    known: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(1 << 16)
            mark = max(",;\t ", key=first.count)
            file.seek(0)
            for line in csv.reader(file, delimiter=mark):
                if len(line) >= 2:
                    known[line[0].strip()] = line[1].strip()
    except (OSError, ValueError, csv.Error) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    words = []
    for one in files:
        word = known.get(one.name, known.get(one.stem))
        if word is None:
            raise ModelError(f"{path} has no label for {one.name}")
        words.append(word)
    try:
        return np.array([int(word) for word in words], np.int64), []
    except (ValueError, OverflowError):
        names = sorted(set(words))
        return np.array([names.index(word) for word in words], np.int64), names


def open_images(folder: Path, edge: int | None) -> tuple[dict[str, Column], list[str]]:
    """Open a folder of images; pixels are decoded when they are read.

    Args:
        folder: The folder.
        edge: Pixels of a side; ``None`` takes the images as they are.

    Returns:
        Columns by name, and what there is to say about them.

    Raises:
        UsageError: Pillow is not installed, or the images differ in size.
        ModelError: An image cannot be read.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError(
            f"{folder}: images are read with Pillow: pip install 'onnxshrink[data]'"
        ) from error
    if edge is not None and not 1 <= edge <= _LARGEST_EDGE:
        raise UsageError(f"edge is from 1 to {_LARGEST_EDGE}, not {edge}")
    files, labels, names = labelled_files(folder, SUFFIXES)
    notes = []
    if names:
        shown = ", ".join(f"{n} {name}" for n, name in enumerate(names[:8]))
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        notes.append(f"labels of the images, by name: {shown}{more}")
    if edge is not None:
        size = (edge, edge)
    else:
        sizes: dict[tuple[int, int], Path] = {}
        for file in files:
            sizes.setdefault(_size_of(Image, file), file)
            if len(sizes) > 1:
                (one, first), (two, second) = list(sizes.items())[:2]
                raise UsageError(
                    f"{first} has {one[1]}x{one[0]} pixels and {second} "
                    f"{two[1]}x{two[0]}; edge=224 after the folder scales and cuts them"
                )
        size = next(iter(sizes))
    columns: dict[str, Column] = {
        "rgb": _Images(files, (*size, 3), edge),
        "gray": _Images(files, size, edge),
    }
    if labels is not None:
        columns["labels"] = Stored(labels)
    return columns, notes


def _size_of(image: Any, file: Path) -> tuple[int, int]:
    def look() -> tuple[int, int]:
        with image.open(file) as opened:
            width, height = opened.size
            if opened.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # turned
                width, height = height, width
        return height, width

    found: tuple[int, int] = _guarded(file, look)
    return found


def _guarded(file: Path, work: Callable[[], Any]) -> Any:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except ModelError:
        raise
    except Exception as error:  # decoders of images raise anything
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{file} cannot be read as an image: {words}") from error


class _Images(Made):
    """Pixels, decoded once and kept in a temporary file."""

    def __init__(
        self, files: Sequence[Path], shape: tuple[int, ...], edge: int | None
    ) -> None:
        super().__init__(len(files), shape, np.dtype(np.uint8))
        self._files, self._edge = files, edge

    def make(self, index: int) -> Array:
        """Return the pixels of one image."""
        found: Array = _guarded(
            self._files[index], functools.partial(self._decoded, index)
        )
        return found

    def _decoded(self, index: int) -> Array:
        from PIL import Image, ImageOps

        file = self._files[index]
        with Image.open(file) as opened:
            if opened.size[0] * opened.size[1] > _MOST_PIXELS:
                raise ModelError(
                    f"{file} claims {opened.size[0]}x{opened.size[1]} pixels"
                )
            if self._edge is not None and opened.format == "JPEG":
                opened.draft(None, (2 * self._edge, 2 * self._edge))
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode == "I":
                image = Image.fromarray(
                    (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
                )
            image = image.convert("RGB" if len(self.shape) == 3 else "L")
        if self._edge is not None:
            scale = self._edge / min(image.size)
            wide, high = (max(self._edge, round(side * scale)) for side in image.size)
            if (wide, high) != image.size:
                image = image.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = (wide - self._edge) // 2, (high - self._edge) // 2
            image = image.crop((left, top, left + self._edge, top + self._edge))
        return np.asarray(image, np.uint8)

    def digest(self, feed: Callable[[bytes], object]) -> None:
        """Feed a hash with the files."""
        feed(f"{self.shape} {self._edge}".encode())
        for file in self._files:
            feed(file.name.encode(errors="replace"))
            try:
                with file.open("rb") as stream:
                    while piece := stream.read(1 << 20):
                        feed(piece)
            except OSError as error:
                raise ModelError(f"{file} cannot be read: {error.strerror}") from error
