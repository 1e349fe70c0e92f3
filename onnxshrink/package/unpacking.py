"""A package back into the files it was made of.

Tested in tests/package/test_container.py.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from onnxshrink.errors import OutputError
from onnxshrink.files import write_file
from onnxshrink.package.container import Contents, Package

__all__ = ["unpack"]


def unpack(package: Package, target: Path) -> tuple[Path, ...]:
    """Write the model and its external data, byte for byte as they were packed.

    Each file is whole or not there, and the model comes last.

    Args:
        package: The package.
        target: Where the model goes. Its external data goes beside it, by the names
            that the model knows them by.

    Returns:
        The files written, the model first; data that was there already is left out.

    Raises:
        ModelError: The package is damaged.
        OutputError: A file cannot be written, or one of the same name holds other data.
    """
    written = []
    for file in package.files[1:]:
        place = target.parent / file.name
        if _climbs(place, target.parent) or place == target:
            raise OutputError(
                f"cannot write {place}: it is a symbolic link or the model itself; "
                "unpack into another folder"
            )
        if place.exists():
            if _holds(place, package, file):
                continue
            raise OutputError(
                f"{place} exists and holds other data, which another model may need; "
                "unpack into another folder"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        written.append(write_file(place, package.stream(file), package.path))
    model = write_file(target, package.stream(package.files[0]), package.path)
    return (model, *written)


def _climbs(place: Path, folder: Path) -> bool:
    """Whether a symbolic link stands between the folder and the file."""
    return any(
        parent.is_symlink()
        for parent in chain([place], place.parents)
        if parent != folder and folder in parent.parents
    )


def _holds(place: Path, package: Package, file: Contents) -> bool:
    """Whether a file on disk is the same as one in a package."""
    try:
        if not place.is_file() or place.stat().st_size != file.size:
            return False
        with place.open("rb") as found:
            return all(
                found.read(len(chunk)) == chunk for chunk in package.stream(file)
            )
    except OSError as error:
        raise OutputError(f"cannot read {place}: {error.strerror}") from error
