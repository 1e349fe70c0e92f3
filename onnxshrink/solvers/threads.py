"""One BLAS thread for functions that run side by side.

Passes hand such functions to ``Context.map``, which has a thread or a process for each
processor. Two BLAS threads on busy cores burn many times the CPU time, and sums in
another order would make the bytes of a model depend on how many jobs there are.
"""

from __future__ import annotations

import functools
import threading
from contextlib import ContextDecorator
from typing import Any

from threadpoolctl import OpenBLASController, ThreadpoolController

__all__ = ["one_thread"]


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


class _OneThread(ContextDecorator):
    """Holds BLAS to one thread as long as anyone is inside.

    The limit is one for the whole process: who leaves while others are inside must not
    lift it, and who leaves last may be another thread than entered first.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.limiter: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                _let_any_thread_set_limits()
                self.limiter = _controller().limit(limits=1)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                _let_any_thread_set_limits()
                self.limiter.restore_original_limits()
                self.limiter = None
                _let_any_thread_set_limits()


def _let_any_thread_set_limits() -> None:
    """Undo that from threadpoolctl 3.8 on only the thread that set a limit may again.

    Others are ignored in silence while that thread lives, and a pool's thread lives on.
    """
    release = getattr(OpenBLASController, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)


one_thread = _OneThread()
"""``with one_thread:`` or ``@one_thread``: BLAS uses one thread, in whatever thread the
block or the function runs."""
