"""Where a command shows things.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.terminal import Bar


@dataclass(frozen=True)
class Screen:
    """Where things are shown.

    Attributes:
        out: Results.
        err: Everything else.
        verbose: Show details.
    """

    out: Console
    err: Console
    verbose: bool

    @classmethod
    def open(cls, *, quiet: bool, verbose: bool) -> Screen:
        """Return the screen of this process."""
        from onnxshrink.terminal import console

        return cls(console(quiet=quiet), console(stderr=True, quiet=quiet), verbose)

    @contextmanager
    def bar(self, what: str) -> Iterator[Bar]:
        """Yield what shows progress."""
        from onnxshrink.terminal import Bar

        with Bar(self.err, quiet=self.err.quiet) as bar:
            bar(0, 0, what)
            yield bar

    def text(self, text: str, *, err: bool = False) -> None:
        """Print text as it is; a terminal wraps it, a file does not."""
        (self.err if err else self.out).print(text, soft_wrap=True)
