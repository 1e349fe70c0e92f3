"""Figures of this machine that are measured once and kept in the user's cache folder.

A cache that cannot be read is as good as none, and so is a folder that cannot be
written to.

Tested in tests/measuring/test_timings.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxshrink import runtime
from onnxshrink.errors import OutputError
from onnxshrink.files import write_text
from onnxshrink.quantization.processors import detect

__all__ = ["KeptFigures", "cache_folder", "machine"]

_FORMAT = 1
_MOST_BYTES = 4 << 20
"""A larger cache file is not one of ours."""


def cache_folder() -> Path | None:
    """Return the user's folder for what can be computed again, if there is one."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if sys.platform == "win32":
        given = given or os.environ.get("LOCALAPPDATA", "")
    if given and Path(given).is_absolute():
        return Path(given) / "onnxshrink"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    mac = sys.platform == "darwin"
    return home.joinpath(*(("Library", "Caches") if mac else (".cache",)), "onnxshrink")


def machine(threads: int, providers: Sequence[str]) -> list[object]:
    """Return what a time depends on besides the work: processor, runtime, threads."""
    cpu = detect()
    where = [cpu.model, cpu.machine, cpu.target, os.cpu_count()]
    return [*where, runtime.version(), threads, list(providers)]


class KeptFigures:
    """A file of positive numbers by what they are of."""

    def __init__(self, file: Path | None, what: str) -> None:
        """Use a file.

        Args:
            file: Where it is or will be; without one, nothing is kept.
            what: What the numbers are, a word of the file's format.
        """
        self._file = file
        self._what = what
        self._known: dict[str, float] = {}

    def get(self, key: Sequence[object], measure: Callable[[], float]) -> float:
        """Return the number of a key, measured where the file does not have it.

        Args:
            key: All that the number depends on; what JSON can hold.
            measure: Gives the number.
        """
        text = json.dumps(key)
        mark = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if mark not in self._known:
            kept = self._read()
            if mark not in kept:
                kept[mark] = measure()
                self._write({**self._read(), mark: kept[mark]})
            self._known[mark] = kept[mark]
        return self._known[mark]

    def _read(self) -> dict[str, float]:
        """Return what the file holds; nothing where it makes no sense."""
        if self._file is None:
            return {}
        try:
            if self._file.stat().st_size > _MOST_BYTES:
                return {}
            data = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            return {}
        numbers = data.get(self._what)
        return {
            str(mark): float(number)
            for mark, number in (numbers if isinstance(numbers, dict) else {}).items()
            if isinstance(number, float) and 0 < number < math.inf
        }

    def _write(self, numbers: Mapping[str, float]) -> None:
        """Keep numbers, or do without where nothing can be written."""
        if self._file is None:
            return
        data = {"format": _FORMAT, self._what: dict(sorted(numbers.items()))}
        text = json.dumps(data)
        if len(text) > _MOST_BYTES:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, text)
        except (OSError, OutputError):
            return
