"""The parent's side of the child that opens and runs models.

A session of onnxruntime can end its process: a kernel that reads where it must not, a
loop without an end, memory that runs out. In a child it ends the child, and the run
goes on with the reason. One child serves a whole run: a file that is opened to be
checked is open when it is measured.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.files import scratch_prefix
from onnxshrink.isolation import wire
from onnxshrink.model import Model
from onnxshrink.package import is_package

__all__ = ["SECONDS", "HostedSession", "SessionHost", "hosting"]

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

_CPU = ("CPUExecutionProvider",)
_OPEN_BYTES = 512 << 20
"""Bytes of files that stay open at most, beside the one in use."""
SECONDS = 300.0
"""How long a model may take to open, or to run on one batch, where nobody says."""
_START_SECONDS = 120.0
_LOOK = 0.02
"""Seconds between two looks at the child's memory and the clock."""


@dataclass(frozen=True)
class _Recipe:
    """How a session is opened, once more where the child that held it is gone.

    Attributes:
        source: The file, or the bytes of a model that is in none.
        folder: Where a model of bytes has its external data.
        label: What errors call it.
    """

    source: Path | NDArray[np.uint8]
    label: str
    threads: int
    optimize: runtime.Optimize
    providers: tuple[str, ...]
    libraries: tuple[str, ...]
    nbytes: int
    folder: Path | None = None

    def arguments(self) -> list[Any]:
        large = self.nbytes >= runtime.NO_PREPACKING
        source = str(self.source) if isinstance(self.source, Path) else self.source
        return [
            source,
            None if self.folder is None else str(self.folder),
            self.threads,
            self.optimize,
            large,
            list(self.providers),
            list(self.libraries),
        ]


class HostedSession(runtime.Session):
    """A model that is open in the child."""

    def __init__(
        self, host: SessionHost, number: int, recipe: _Recipe, key: tuple[object, ...]
    ) -> None:
        """Use ``SessionHost.session``."""
        self._host = host
        self.number = number
        self.recipe = recipe
        self.key = key
        self.child = 0
        said = host.opened(self)
        self.describe(said["inputs"], said["optional"], said["outputs"])

    def describe(self, *described: Sequence[Sequence[Any]]) -> None:
        """Take inputs, optional inputs and outputs as the child describes them."""
        self.inputs, self.optional, self.outputs = (
            tuple(
                runtime.value_info(SimpleNamespace(name=name, type=kind, shape=shape))
                for name, kind, shape in part
            )
            for part in described
        )
        self._known = {info.name: info for info in (*self.inputs, *self.optional)}

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once in the child; see ``runtime.Session.run``."""
        self.check(feeds)
        wanted = [info.name for info in self.outputs] if names is None else list(names)
        values = self._host.ask(self, "run", wanted, dict(feeds))
        return dict(zip(wanted, values, strict=True))

    def seconds(self, feeds: Feeds) -> float:
        """Run once; return seconds of wall time, as the child measures them."""
        return float(self._host.ask(self, "seconds", dict(feeds)))

    def timed(
        self,
        feeds: Feeds,
        other: HostedSession | None = None,
        other_feeds: Feeds | None = None,
    ) -> tuple[float, float | None]:
        """Time it in the child, in turns with another; see ``isolation.in_turns``.

        Raises:
            ModelError: A run fails.
        """
        self.check(feeds)
        if other is None:
            return self._host.time([self], [dict(feeds)])
        given = feeds if other_feeds is None else other_feeds
        other.check(given)
        return self._host.time([self, other], [dict(feeds), dict(given)])


class SessionHost:
    """A child process for the sessions of a run; a context manager that ends it.

    A child that dies, takes too long or needs too much memory is a ``ModelError`` for
    whoever asked; the next request starts another one.
    """

    def __init__(
        self,
        *,
        time_limit: float | None = SECONDS,
        memory_limit: int | None = None,
    ) -> None:
        """Start the child, which gets ready while the caller goes on.

        Args:
            time_limit: Seconds that opening a model or running it on one batch may
                take; ``None`` for no limit.
            memory_limit: Bytes of resident memory that the child may need.

        Raises:
            UsageError: A limit that is not positive, or of memory where it cannot be
                seen.
            OSError: There are no processes here.
        """
        for what, limit in (("time", time_limit), ("memory", memory_limit)):
            if limit is not None and not limit > 0:
                raise UsageError(f"the {what} limit must be positive, not {limit}")
        if memory_limit is not None and not os.path.exists("/proc/self/statm"):
            raise UsageError("a memory limit needs /proc, which this system lacks")
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self._lock = threading.RLock()
        self._numbers = 0
        self._open: collections.OrderedDict[tuple[object, ...], HostedSession]
        self._open = collections.OrderedDict()
        self._unused: collections.deque[int] = collections.deque()
        self._child: subprocess.Popen[bytes] | None = None
        self._child_number = 0
        self._is_ready = False
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._start()

    def __enter__(self) -> SessionHost:
        """Return the host."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the child."""
        self.close()

    def close(self) -> None:
        """End the child, whatever it is doing."""
        child, self._child = self._child, None
        self._open.clear()
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    # --- sessions -----------------------------------------------------------------

    def session(
        self,
        source: runtime.Source,
        *,
        threads: int = 0,
        providers: Sequence[str] = _CPU,
        optimize: runtime.Optimize = "all",
    ) -> runtime.Session:
        """Open a model file in the child, or return it where it is open.

        A ``Model`` goes there as bytes, its weights through a mapped file if they are
        large. A package or a proto opens in this process.

        Raises:
            ModelError: onnxruntime cannot load it, or died.
            UsageError: A provider is not available.
        """
        runtime.check_providers(providers)
        if isinstance(source, Model):
            return self._of_model(source, threads, tuple(providers), optimize)
        path = Path(source) if isinstance(source, (str, Path)) else None
        plain = path is not None and path.is_file() and path.suffix != ".onnxtxt"
        if path is None or not plain or is_package(path):
            return runtime.session(
                source, threads=threads, providers=providers, optimize=optimize
            )
        state = path.stat()
        key = (
            *(str(path.resolve()), state.st_mtime_ns, state.st_size, state.st_ino),
            *(threads, optimize, tuple(providers)),
        )
        with self._lock:
            known = self._open.get(key)
            if known is not None:
                self._open.move_to_end(key)
                return known
            size = runtime.file_bytes_or_less(path)
            how = (threads, optimize, tuple(providers), runtime.libraries(), size)
            recipe = _Recipe(path.resolve(), str(path), *how)
            self._make_room(size)
            self._numbers += 1
            made = HostedSession(self, self._numbers, recipe, key)
            self._open[key] = made
            return made

    def _of_model(
        self,
        model: Model,
        threads: int,
        providers: tuple[str, ...],
        optimize: runtime.Optimize,
    ) -> HostedSession:
        """Open a model that is in no file; it is closed when nobody holds it."""
        with (
            self._lock,
            tempfile.TemporaryDirectory(
                prefix=scratch_prefix(), ignore_cleanup_errors=True
            ) as scratch,
        ):
            proto, folder, size = runtime.handed_over(model, Path(scratch))
            data = np.frombuffer(runtime.serialized(proto), np.uint8)
            label = str(model.source) if model.source else "the model"
            how = (threads, optimize, providers, runtime.libraries(), size, folder)
            recipe = _Recipe(data, label, *how)
            self._make_room(size)
            self._numbers += 1
            # onnxruntime keeps the mapping of the scratch file, so the name may go.
            made = HostedSession(self, self._numbers, recipe, ())
            weakref.finalize(made, self._unused.append, made.number)
            made.recipe = dataclasses.replace(recipe, source=np.empty(0, np.uint8))
            return made

    def _make_room(self, coming: int, keep: Sequence[HostedSession] = ()) -> None:
        """Close what was used longest ago; large models are not open at once."""
        held = coming + sum(made.recipe.nbytes for made in self._open.values())
        gone: list[int] = []
        for key, made in list(self._open.items()):
            if held <= _OPEN_BYTES:
                break
            if made in keep:
                continue
            del self._open[key]
            held -= made.recipe.nbytes
            gone.append(made.number)
            made.number = 0
        while self._unused:
            gone.append(self._unused.pop())
        if gone and self._child is not None:
            self._asked("close", gone)

    def opened(self, made: HostedSession) -> dict[str, Any]:
        """Open a session's file under its number; return what the child says of it."""
        said: dict[str, Any] = self._said(
            made.recipe.label, "open", made.number, *made.recipe.arguments()
        )
        made.child = self._child_number
        return said

    def ask(self, made: HostedSession, word: str, *arguments: Any) -> Any:
        """Ask the child something about a session, which is opened if it is not.

        Raises:
            ModelError: onnxruntime fails or died.
        """
        with self._lock:
            self._reopened(made)
            return self._said(made.recipe.label, word, made.number, *arguments)

    def time(
        self, sessions: Sequence[HostedSession], feeds: Sequence[Mapping[str, Array]]
    ) -> tuple[float, float | None]:
        """Time one session, or two in turns."""
        with self._lock:
            for made in sessions:
                self._reopened(made, keep=sessions)
            numbers = [made.number for made in sessions]
            first, ratio = self._said(
                sessions[0].recipe.label, "time", numbers, list(feeds)
            )
        return float(first), None if ratio is None else float(ratio)

    def _reopened(
        self, made: HostedSession, keep: Sequence[HostedSession] = ()
    ) -> None:
        """Open a session again that the child does not hold any more."""
        alive = self._child is not None and made.child == self._child_number
        if made.number and alive:
            return
        if not isinstance(made.recipe.source, Path):
            raise ModelError("the process that held the model ended")
        self._make_room(made.recipe.nbytes, keep)
        self._numbers += 1
        made.number = self._numbers
        self.opened(made)
        self._open[made.key] = made

    # --- the child ----------------------------------------------------------------

    def _start(self) -> None:
        command = [sys.executable, "-P", "-W", "ignore", "-m", worker_name()]
        env = {
            **os.environ,
            "PYTHONPATH": runtime.child_path(),
            "ORT_DISABLE_TELEMETRY": "1",
        }
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._child, self._answers = child, answers
        self._child_number += 1
        self._is_ready = False

        def listen() -> None:
            assert child.stdout is not None
            try:
                while True:
                    answers.put(wire.receive(child.stdout))
            except (EOFError, OSError, ValueError):
                answers.put(None)

        threading.Thread(target=listen, name="onnxshrink-host", daemon=True).start()

    def _said(self, what: str, word: str, *arguments: Any) -> Any:
        """Return an answer about a model; put what went wrong in words."""
        doing = "load" if word == "open" else "run"
        label = what if word == "open" else "it"
        try:
            with self._lock:
                answer = self._asked(word, *arguments)
        except _ChildError as gone:
            raise ModelError(
                f"onnxruntime cannot {doing} {label}: it {gone}; that was in a process "
                "of its own, nothing else was harmed"
            ) from None
        if "error" in answer:
            reason = runtime.reason_of(str(answer["error"]))
            raise ModelError(f"onnxruntime cannot {doing} {label}: {reason}")
        return answer["answer"]

    def _asked(self, word: str, *arguments: Any) -> Any:
        if self._child is None:
            self._start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        try:
            if not self._is_ready:
                self._answer(child, _START_SECONDS)
                self._is_ready = True
            try:
                wire.send(child.stdin, [word, list(arguments)])
            except OSError:
                raise _ChildError(self._ended(child)) from None
            return self._answer(child, self.time_limit)
        except BaseException:
            # An interrupt or an end: the next answer would be that of this request.
            self._forget()
            raise

    def _answer(self, child: subprocess.Popen[bytes], limit: float | None) -> Any:
        start = time.monotonic()
        while True:
            try:
                answer = self._answers.get(timeout=_LOOK)
            except queue.Empty:
                pass
            else:
                if answer is None:
                    raise _ChildError(self._ended(child))
                return answer
            spent = time.monotonic() - start
            if self.time_limit is not None and spent > self.time_limit:
                raise _ChildError(
                    f"took longer than the limit of {self.time_limit:g} s"
                )
            if self.memory_limit is not None and _resident(child) > self.memory_limit:
                limit = self.memory_limit / 1e6
                raise _ChildError(f"needed more memory than the limit of {limit:g} MB")

    def _forget(self) -> None:
        """End the child; the sessions it held are opened again when they are used."""
        self._unused.clear()
        self.close()

    @staticmethod
    def _ended(child: subprocess.Popen[bytes]) -> str:
        """Say how a child ended that nobody asked to."""
        try:
            code = child.wait(5)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code >= 0:
            return f"ended its process (exit code {code})"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        more = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"crashed ({name}{more})"


@contextlib.contextmanager
def hosting(
    isolate: bool | None = None,
    time_limit: float | None = None,
    memory_limit: int | None = None,
) -> Iterator[SessionHost | None]:
    """Yield a host for sessions, or ``None`` where this process holds them.

    Args:
        isolate: Whether there is one; by default if a process can be started and the
            environment does not say ``ONNXSHRINK_ISOLATE=0``.
        time_limit: See ``SessionHost``.
        memory_limit: See ``SessionHost``.

    Raises:
        UsageError: A limit that cannot be held, or no process can be started although
            one was asked for.
    """
    asked = bool(isolate) or time_limit is not None or memory_limit is not None
    wanted = asked or os.environ.get("ONNXSHRINK_ISOLATE", "1") != "0"
    host = None
    if isolate is not False and wanted:
        try:
            if not sys.executable:
                raise OSError(0, "this Python does not know its own program")
            most = SECONDS if time_limit is None else time_limit
            host = SessionHost(time_limit=most, memory_limit=memory_limit)
        except OSError as error:
            if asked:
                raise UsageError(
                    f"no child process can be started: {error.strerror}; without "
                    "isolation and limits models run in this one"
                ) from error
    if host is None:
        yield None
        return
    with host:
        yield host


class _ChildError(Exception):
    """The child ended, or had to; says what it did."""


def worker_name() -> str:
    """Return the module that the child runs."""
    return "onnxshrink.isolation.worker"


def _resident(child: subprocess.Popen[bytes]) -> int:
    """Return the child's resident memory in bytes; 0 where it is gone."""
    try:
        with open(f"/proc/{child.pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
