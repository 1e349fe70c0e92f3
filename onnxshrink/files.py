"""The one way in which files are written: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from onnxshrink.errors import OutputError

__all__ = ["followed", "replacing", "sync", "write_file", "write_text"]


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the file to replace: where a symbolic link leads to, else the path."""
    target = Path(path)
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _open_temporary(folder: Path, name: str, mode: int) -> tuple[int, str]:
    """Open a new file, without a name where the system can: a crash leaves nothing.

    Returns:
        Its handle, and its path or an empty string.
    """
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, mode), ""
    path = _temporary_name(folder, name)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, mode), path


def _temporary_name(folder: Path, name: str) -> str:
    return str(folder / f".{name[:200]}.onnxshrink-{secrets.token_hex(6)}")


def write_file(
    target: Path,
    content: Iterable[bytes | memoryview],
    source: Path | None = None,
    rename: Callable[[], Path] | None = None,
) -> Path:
    """Write a file from pieces, as ``replacing`` does.

    Args:
        target: The file.
        content: What it holds, in pieces.
        source: Whose permission bits it gets if it is new.
        rename: Says, once all is written, what it is called instead, in its folder.

    Returns:
        The file's path.

    Raises:
        OutputError: It cannot be written.
    """
    with replacing(target, source=source, rename=rename) as file:
        for chunk in content:
            file.write(chunk)
    return rename() if rename is not None else target


@contextlib.contextmanager
def replacing(
    target: Path,
    *,
    what: str = "cannot write",
    source: Path | None = None,
    rename: Callable[[], Path] | None = None,
) -> Iterator[BinaryIO]:
    """Open a new file beside ``target``; flush it and rename it into place at the end.

    Where the body raises, nothing is left and ``target`` is as it was. The file gets
    the permission bits of the one it replaces, else those of ``source`` less the umask.

    Args:
        target: The file.
        what: How an error begins, before the path.
        source: See above.
        rename: Says, once all is written, what it is called instead, in its folder.

    Raises:
        OutputError: It cannot be written, or the body raises an ``OSError``.
    """
    temporary = ""
    try:
        replaced: int | None = None
        mode = 0o666
        if target.exists():
            replaced = stat.S_IMODE(target.stat().st_mode)
        elif source is not None:
            with contextlib.suppress(OSError):
                mode = stat.S_IMODE(source.stat().st_mode) & 0o777
        handle, temporary = _open_temporary(target.parent, target.name, mode)
        with os.fdopen(handle, "w+b", buffering=1 << 20) as file:
            yield file
            file.flush()
            if replaced is not None:
                os.chmod(temporary or file.fileno(), replaced)
            os.fsync(file.fileno())
            if not temporary:
                temporary = _temporary_name(target.parent, target.name)
                # Without a folder handle, Python asks for a link to the link itself.
                os.link(
                    f"/proc/self/fd/{file.fileno()}",
                    temporary,
                    src_dir_fd=file.fileno(),
                )
        os.replace(temporary, rename() if rename is not None else target)
        temporary = ""
        sync(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; nothing was written"
        raise OutputError(f"{what} {target}: {reason}") from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_text(target: Path, text: str, *, what: str = "cannot write") -> None:
    """Write a file of UTF-8 text, as ``replacing`` does.

    Raises:
        OutputError: It cannot be written.
    """
    with replacing(target, what=what) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flush a folder's entries to disk where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
