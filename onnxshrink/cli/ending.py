"""How a command ends: errors in one line each, and the exit code.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click

from onnxshrink.errors import OnnxshrinkError

EXIT_CODES = """\
0    written, or shown
1    an error of the request, the model or the data, or a broken promise;
     nothing was written and nothing is lost
2    the command line cannot be read
130  interrupted
"""


def guarded(work: Callable[[], Any], *, verbose: bool) -> int:
    """Run the command line; return the exit code, having said what went wrong."""
    with suppress(ValueError):  # not in the main thread
        # Leaving by an exception tidies up, as after an interrupt.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = work()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted")
        return 130
    except OnnxshrinkError as error:
        if verbose and error.__cause__ is not None:
            _trace(error)
        complain(str(error))
        return 1
    except OSError as error:
        if verbose:
            _trace(error)
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}")
        return 1
    except MemoryError:
        complain("there is not enough memory; nothing was written")
        return 1
    except Exception as error:  # a bug, said in one line
        if verbose:
            _trace(error)
        hint = "" if verbose else "; -v shows where"
        complain(
            f"this is a bug of onnxshrink or of a pass: {type(error).__name__}: "
            f"{error}{hint}"
        )
        return 1
    return code if isinstance(code, int) else 0


def complain(message: str) -> None:
    """Print an error; lines are kept, control characters are not."""
    from onnxshrink.terminal import clean, console

    lines = [clean(line, 2000) for line in message.splitlines() or [""]]
    console(stderr=True).print(
        "\n".join(["error: " + lines[0], *lines[1:]]), soft_wrap=True
    )


def _trace(error: BaseException) -> None:
    from onnxshrink.terminal import console

    console(stderr=True).print(
        "".join(traceback.format_exception(error)).rstrip(), soft_wrap=True
    )
