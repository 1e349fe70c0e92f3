"""A folder of models taken whole, as Optimum and onnxruntime-genai write them.

Every ``.onnx`` file is shrunk, with its external data. All else is copied as it is:
configuration, tokenizer, licence. The new folder is there whole, or not at all.

Tested in tests/cli/test_folder.py.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.files import made_folders, scratch_prefix
from onnxshrink.package import skeleton_of

__all__ = ["shrink_folder"]


def shrink_folder(
    folder: Path, output: Path | None, shrink: Callable[[Path, Path], int]
) -> int:
    """Write a folder anew, its models shrunk.

    Args:
        folder: The folder.
        output: The new folder, which is not there yet or empty; by default beside the
            old one, ``NAME-shrunk``.
        shrink: Shrinks one model into another file; returns an exit code.

    Returns:
        0; 3 if no step of any model was kept.

    Raises:
        OutputError: The new folder cannot be written, or is there.
        UsageError: There is no model in the folder.
    """
    source = folder.resolve()
    target = source.with_name(f"{source.name}-shrunk") if output is None else output
    target = target.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputError(
            f"{target} and {folder} are one, or inside one another; choose another "
            "output"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} is there already; choose another output")
    files = sorted(_files(source))
    models = [path for path in files if path.suffix == ".onnx"]
    if not models:
        raise UsageError(f"{folder} is a folder without an .onnx file; give a model")
    data = {place for model in models for place in _external(model)}
    codes = []
    with made_folders(target.parent):
        scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix(), dir=target.parent))
        try:
            for path in files:
                place = scratch / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                if path in models:
                    codes.append(shrink(path, place))
                elif path not in data:
                    shutil.copyfile(path, place)
            scratch.chmod(0o777 & ~_umask())
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        except OSError as error:
            raise OutputError(
                f"cannot write {target}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    click.echo(f"wrote the folder {target}", err=True)
    return 0 if any(code == 0 for code in codes) else 3


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, but for hidden ones; links to folders are left."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _external(model: Path) -> Iterator[Path]:
    """Yield the files of external data that a model in a folder has."""
    try:
        proto = skeleton_of(model)
    except ModelError:
        return  # said when it is shrunk
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield model.parent / str(entry.value)


def _umask() -> int:
    """Return the file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
