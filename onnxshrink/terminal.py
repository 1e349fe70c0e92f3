"""What the terminal shows: consoles that survive a closed pipe, progress, numbers.

Tested in tests/reporting/test_report.py.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

__all__ = [
    "Bar",
    "clean",
    "console",
    "count_text",
    "middle",
    "percent_text",
    "size_text",
    "table",
]

_PATIENCE = 1.0
"""Seconds of work after which a progress bar is shown."""
_WIDE = 200
"""Columns of a file or a pipe, where nothing needs to wrap."""


class _Stream:
    """A stream that goes quiet when its reader has left, as ``| head`` does.

    The work goes on and its exit code still says how it went.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._closed = False

    def write(self, text: str) -> int:
        """Write text; what the encoding cannot say is written as an escape."""
        if self._closed:
            return len(text)
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(
                text.encode(encoding, "backslashreplace").decode(encoding)
            )
        except BrokenPipeError:
            self._leave()
        return len(text)

    def flush(self) -> None:
        """Flush, unless nobody reads."""
        if self._closed:
            return
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        self._closed = True
        # Python flushes at exit and would complain about the closed pipe.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console for results (stdout) or for everything else (stderr)."""
    found: TextIO | None = sys.stderr if stderr else sys.stdout
    if found is None:  # closed by the caller: ``>&-``
        found, quiet = io.StringIO(), True
    stream: Any = _Stream(found)
    made = Console(file=stream, quiet=quiet, highlight=False, emoji=False, markup=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WIDE
    return made


class Bar:
    """A progress bar that appears after a second of work, if someone watches.

    It is a ``Progress`` as passes know it: call it with (done, total, what).
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        """Show it on this console, and nothing at all if that is no terminal."""
        self._console = console
        self._enabled = (
            console.is_terminal and not console.is_dumb_terminal and not quiet
        )
        self._lock = threading.Lock()
        self._state: tuple[int, int, str] = (0, 0, "")
        self._live: Progress | None = None
        self._timer: threading.Timer | None = None
        self._over = False

    def __call__(self, done: int, total: int, what: str) -> None:
        """Say that ``done`` of ``total`` steps of ``what`` are finished."""
        if not self._enabled:
            return
        with self._lock:
            self._state = (done, total, what)
            self._update()

    def __enter__(self) -> Bar:
        if self._enabled:
            self._timer = threading.Timer(_PATIENCE, self._start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._over = True
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _start(self) -> None:
        with self._lock:
            if self._over:
                return
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._live.add_task("", total=None)
            self._update()
            self._live.start()

    def _update(self) -> None:
        if self._live is None:
            return
        done, total, what = self._state
        self._live.update(
            self._live.task_ids[0],
            completed=done,
            total=total or None,
            description=clean(what, 40),
        )


def clean(text: object, limit: int = 400) -> str:
    """Return text on one line without control characters, cut to a length.

    Names come from the model and may hold anything, escape sequences included.
    """
    shown = str(text)[: 4 * limit]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def middle(text: object, limit: int) -> str:
    """Return clean text cut in the middle: the end of a path tells most."""
    shown = clean(text, 4000)
    if len(shown) <= limit:
        return shown
    tail = (limit - 3) * 2 // 3
    return f"{shown[: limit - 3 - tail]}...{shown[-tail:]}"


def table(
    headers: Sequence[str], *, left: Sequence[int] = (0,), wrap: Sequence[int] = (0,)
) -> Table:
    """Return an empty table.

    Args:
        headers: Heads of the columns.
        left: Columns that align left; the others align right.
        wrap: Columns that give way where the terminal is narrow.
    """
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        made.add_column(
            header,
            justify="left" if index in left else "right",
            no_wrap=index not in wrap,
            overflow="fold",
        )
    return made


def size_text(nbytes: float) -> str:
    """Return bytes as one reads them, in powers of ten: ``1.72 MB``."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float | None) -> str:
    """Return a count as one reads it: ``431 k``; ``-`` if it is unknown."""
    return "-" if count is None else _scaled(count, ("", "k", "M", "G", "T"))


def percent_text(part: float, whole: float) -> str:
    """Return a share in percent, ``-`` if there is no whole."""
    if not whole:
        return "-"
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 9.95 or share == 0 else f"{share:.1f} %"


def _scaled(value: float, units: Sequence[str]) -> str:
    number = float(value)
    unit = units[0]
    for name in units[1:]:
        if abs(number) < 999.5:
            break
        number /= 1000
        unit = name
    if unit == units[0]:
        return f"{number:.0f} {unit}".strip()
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"
