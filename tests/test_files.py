"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxshrink import files
from onnxshrink.errors import OutputError
from onnxshrink.files import replacing, write_file, write_text


@pytest.fixture(params=["without a name", "with a name"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder where temporary files have no name, as on Linux, or have one."""
    if request.param == "with a name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return tmp_path


def test_a_file_is_replaced_when_all_of_it_is_written(folder: Path) -> None:
    target = folder / "a.bin"
    target.write_bytes(b"old")
    with replacing(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert os.listdir(folder) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_as_it_was(folder: Path, error: BaseException) -> None:
    target = folder / "a.bin"
    target.write_bytes(b"old")

    def content() -> Iterator[bytes]:
        yield b"new"
        raise error

    with pytest.raises(type(error)):
        write_file(target, content())
    assert target.read_bytes() == b"old"
    assert os.listdir(folder) == ["a.bin"]


def test_a_file_is_on_disk_before_it_takes_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    flush, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        flush(handle)

    def replaced(*paths: Any, **options: Any) -> None:
        steps.append("name")
        replace(*paths, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write_text(folder / "a.txt", "text")
    assert steps == ["file", "name", "folder"]


def test_a_full_disk_is_an_error_in_words(folder: Path) -> None:
    target = folder / "a.bin"
    with (
        pytest.raises(OutputError, match=r"cannot keep it in .*: the disk is full"),
        replacing(target, what="cannot keep it in"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(folder) == []


def test_a_missing_folder_is_an_error_in_words(tmp_path: Path) -> None:
    target = tmp_path / "none" / "a.txt"
    wanted = re.escape(f"cannot write {target}: No such file or directory")
    with pytest.raises(OutputError, match=wanted):
        write_text(target, "text")


def test_permission_bits_stay_those_of_the_file_that_is_replaced(folder: Path) -> None:
    target = folder / "a.txt"
    write_text(target, "old")
    target.chmod(0o640)
    write_text(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert target.read_text() == "new"


def test_a_new_file_gets_the_bits_of_its_source_less_the_umask(folder: Path) -> None:
    source = folder / "source"
    source.write_bytes(b"")
    source.chmod(0o600)
    write_file(folder / "a.bin", [b"1", b"2"], source)
    assert stat.S_IMODE((folder / "a.bin").stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        write_text(folder / "b.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "b.txt").stat().st_mode) == 0o640


def test_a_file_may_be_named_by_what_it_holds(folder: Path) -> None:
    total = 0

    def content() -> list[bytes]:
        nonlocal total
        total += 3
        return [b"123"]

    made = write_file(
        folder / "a.data", content(), None, lambda: folder / f"a.{total}.data"
    )
    assert made == folder / "a.3.data"
    assert os.listdir(folder) == ["a.3.data"]


def test_a_folder_is_flushed_where_the_system_can(tmp_path: Path) -> None:
    files.sync(tmp_path)
    files.sync(tmp_path / "none")


def test_nothing_else_in_the_package_renames_a_temporary_file() -> None:
    package = Path(files.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "passes").glob("*.py")]
    guilty = {
        path.name
        for path in sources
        if path.name not in ("files.py", "runtime.py")
        and re.search(r"mkstemp|NamedTemporaryFile|os\.rename", path.read_text())
    }
    assert guilty == set()
