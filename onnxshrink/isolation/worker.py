"""The child that opens and runs models: ``python -m onnxshrink.isolation.worker``.

It imports numpy and onnxruntime and little else, so that it is there soon. Requests
come in on standard input, answers go out on what was standard output; anything that a
library prints goes nowhere.

Tested in tests/isolation/test_host.py.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from onnxshrink.isolation import turns, wire

__all__ = ["main"]

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}


class Sessions:
    """The sessions that are open, by number."""

    def __init__(self) -> None:
        """Import onnxruntime, quiet and without telemetry."""
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        self._ort: Any = onnxruntime
        onnxruntime.set_default_logger_severity(4)
        onnxruntime.disable_telemetry_events()
        self._open: dict[int, Any] = {}
        self._run_options = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4

    def open(
        self,
        number: int,
        source: Any,
        folder: str | None,
        threads: int,
        optimize: str,
        large: bool,
        providers: list[str],
        libraries: list[str],
    ) -> dict[str, Any]:
        """Open a file or a model's bytes; return what its inputs and outputs are."""
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, _LEVELS[optimize]
        )
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if large:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if folder is not None:
            place = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(place, folder)
        for library in libraries:
            options.register_custom_ops_library(library)
        if not isinstance(source, str):
            source = source.tobytes()
        made = ort.InferenceSession(
            source, options, providers=providers, enable_fallback=0
        )
        self._open[number] = made
        return {
            "inputs": [_described(arg) for arg in made.get_inputs()],
            "optional": [_described(a) for a in made.get_overridable_initializers()],
            "outputs": [_described(arg) for arg in made.get_outputs()],
        }

    def run(self, number: int, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Run once; return the outputs that are named."""
        found: list[Any] = self._open[number].run(names, feeds, self._run_options)
        return found

    def time(self, numbers: list[int], feeds: list[dict[str, Any]]) -> list[Any]:
        """Time one session, or two in turns; return milliseconds and the ratio."""
        runs = [self._timed(*one) for one in zip(numbers, feeds, strict=True)]
        return list(turns.in_turns(runs))

    def seconds(self, number: int, feed: dict[str, Any]) -> float:
        """Run once; return seconds of wall time."""
        return self._timed(number, feed)()

    def _timed(self, number: int, feed: dict[str, Any]) -> Callable[[], float]:
        run, options = self._open[number].run, self._run_options

        def seconds() -> float:
            start = time.perf_counter()
            run(None, feed, options)
            return time.perf_counter() - start

        return seconds

    def close(self, numbers: list[int]) -> None:
        """Let sessions go."""
        for number in numbers:
            self._open.pop(number, None)


def _described(arg: Any) -> list[Any]:
    return [arg.name, arg.type, list(arg.shape or [])]


def main() -> None:
    """Answer requests until the other side ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    _end_with(os.getppid())
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    requests: IO[bytes] = sys.stdin.buffer
    sessions = Sessions()
    words: dict[str, Callable[..., Any]] = {
        "open": sessions.open,
        "run": sessions.run,
        "seconds": sessions.seconds,
        "time": sessions.time,
        "close": sessions.close,
    }
    wire.send(answers, {"answer": "ready"})
    while True:
        try:
            word, arguments = wire.receive(requests)
        except EOFError:
            return
        try:
            answer = {"answer": words[word](*arguments)}
        except Exception as error:
            # All that a model or its inputs can raise goes back as words.
            answer = {"error": str(error) or type(error).__name__}
        wire.send(answers, answer)


def _end_with(parent: int) -> None:
    """End when the parent does, in the middle of a run too."""
    if sys.platform == "linux":
        import ctypes

        killed = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(killed, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
