"""How a command ends: errors in one line each, and the exit code.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from onnxshrink.errors import OnnxshrinkError

EXIT_CODES = """\
0    written, or shown
1    an error of the request, the model or the data, or a broken promise;
     nothing was written and nothing is lost
2    the command line cannot be read: an unknown option, pass or recipe
3    written, but no pass was kept
130  interrupted (143: asked to end); nothing was written
"""
_GRACE = 5.0
"""Seconds that work has to come to an end after a signal, before the process does."""
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(BaseException):
    """An interrupt, as click does not know it: it would print an empty line."""


class Signals:
    """Says at once that a signal was heard, also while other code keeps Python busy.

    A signal is an exception in the main thread, so that everything is tidied up. Where
    that takes too long, or a second signal comes, the process ends all the same.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.heard = threading.Event()
        self._saying, self._is_said = threading.Lock(), False
        self._before: dict[int, Any] = {}
        self._pair: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = [getattr(signal, n) for n in _ENDING if hasattr(signal, n)]
        with suppress(ValueError, OSError):
            self._pair = socket.socketpair()
            for end in self._pair:
                end.setblocking(False)
            signal.set_wakeup_fd(self._pair[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(
                target=self._listen, args=(self._pair[0], numbers), daemon=True
            ).start()
        for number in numbers:
            if number == signal.SIGINT:
                continue
            if signal.getsignal(number) is not signal.SIG_IGN:  # not of nohup
                self._before[number] = signal.signal(number, _leave)
        return self

    def __exit__(self, *_: object) -> None:
        if self.heard.is_set() or self._pair is None:
            return  # whoever listens sees to the end
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._pair[1].close()

    def say(self) -> None:
        """Say that the work stops, once; the console may be in use by other code."""
        with self._saying:
            if not self._is_said:
                self._is_said = True
                with suppress(OSError, ValueError, AttributeError):
                    if threading.current_thread() is threading.main_thread():
                        sys.stderr.write("error: interrupted\n")
                        sys.stderr.flush()
                    else:
                        os.write(2, b"error: interrupted\n")

    def _listen(self, end: socket.socket, numbers: Sequence[int]) -> None:
        end.setblocking(True)
        number = 0
        while number not in numbers:
            word = end.recv(1)
            if not word:
                end.close()
                return
            number = word[0]
        self.say()
        self.heard.set()
        end.settimeout(_GRACE)
        with suppress(OSError):
            while end.recv(1)[0] not in numbers:
                pass
        # Too late, or asked twice: children end with this process.
        from onnxshrink.state import abandon

        abandon()
        os._exit(128 + number)


def _leave(number: int, frame: object) -> None:
    # Leaving by an exception tidies up, as after an interrupt.
    sys.exit(128 + number)


def guarded(work: Callable[[], Any], *, verbose: bool) -> int:
    """Run the command line; return the exit code, having said what went wrong."""
    with Signals() as signals:
        return _ended(work, signals, verbose=verbose)


def _ended(work: Callable[[], Any], signals: Signals, *, verbose: bool) -> int:
    try:
        code = work()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt, Interrupted):
        signals.say()
        return 130
    except SystemExit as leaving:
        if leaving.code not in (128 + signal.SIGTERM, 129):
            raise
        signals.say()
        return int(leaving.code)
    except OnnxshrinkError as error:
        if verbose and error.__cause__ is not None:
            _trace(error)
        complain(str(error))
        return error.exit_code
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
