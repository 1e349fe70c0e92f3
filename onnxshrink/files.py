"""The one way in which files are written: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from onnxshrink.errors import OutputError

__all__ = [
    "followed",
    "is_alive",
    "keep_apart",
    "made_folders",
    "read_at",
    "replacing",
    "scratch_prefix",
    "sweep_scratch",
    "sync",
    "write_file",
    "write_text",
]

_SEEKING = threading.Lock()


def read_at(handle: int, count: int, start: int) -> bytes:
    """Return at most so many bytes of an open file from a place on.

    Where the system cannot read at a place (Windows), the file's own place is moved,
    by one thread at a time.
    """
    if hasattr(os, "pread"):
        return os.pread(handle, count, start)
    with _SEEKING:
        os.lseek(handle, start, os.SEEK_SET)
        return os.read(handle, count)


def scratch_prefix() -> str:
    """Return how folders for temporary files of this process begin."""
    return f"onnxshrink-{os.getpid()}-"


def sweep_scratch(folder: str | os.PathLike[str]) -> None:
    """Delete temporary folders of our own that processes left that were killed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"onnxshrink-(\d{1,9})-\w+", entry.name)
            if match is None or not entry.is_dir(follow_symlinks=False):
                continue
            own = not hasattr(os, "getuid") or (
                entry.stat(follow_symlinks=False).st_uid == os.getuid()
            )
            if own and not is_alive(int(match[1])):
                shutil.rmtree(entry.path, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process runs, as far as the system says."""
    if pid <= 0 or os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def keep_apart(target: Path, inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output that is one of the inputs.

    Args:
        target: The output.
        inputs: Files and folders that are read, by what to call them.

    Raises:
        OutputError: It is one of them, or a file inside of a folder of them.
    """
    place = followed(target)
    for what, path in inputs.items():
        if path is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            same = place.exists() and path.exists() and os.path.samefile(place, path)
            inside = (
                path.is_dir()
                and place.exists()
                and path.resolve() in place.resolve().parents
            )
            if same or inside:
                raise OutputError(
                    f"{target} is {what}, which is never overwritten; choose another "
                    "output"
                )


@contextlib.contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Make a folder with those above it; where the body raises, they go again.

    Raises:
        OutputError: They cannot be made.
    """
    missing: list[Path] = []
    at = folder
    while not at.exists() and at != at.parent:
        missing.append(at)
        at = at.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from (
            error
        )
    try:
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):  # others may have put something there
                one.rmdir()
        raise


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
