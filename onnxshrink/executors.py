"""Who does the work that a pass shares out: threads, processes, or a Dask cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from onnxshrink.errors import UsageError, nearest

__all__ = ["check_executor", "executing"]

_DASK = "dask:"
_SECONDS = 30
"""How long a Dask scheduler may take to answer."""


def check_executor(executor: Executor | str | None) -> None:
    """Refuse what names no executor.

    Raises:
        UsageError: Says what there is.
    """
    if not isinstance(executor, str) or executor in ("threads", "processes"):
        return
    if not executor.startswith(_DASK) or executor == _DASK:
        hint = nearest(executor, ["threads", "processes"])
        raise UsageError(
            f"there is no executor {executor!r}; there are threads, processes and "
            f"dask:ADDRESS, such as dask:tcp://10.0.0.1:8786.{hint}"
        )


@contextlib.contextmanager
def executing(executor: Executor | str | None, jobs: int) -> Iterator[Executor | None]:
    """Yield an executor, or ``None`` where work is done one task after the other.

    Args:
        executor: ``threads``, ``processes``, ``dask:ADDRESS``, an executor of the
            caller's own, which is left running, or ``None`` for threads.
        jobs: How many threads or processes; with one, there are none.

    Raises:
        UsageError: It names no executor, Dask is not installed, or its scheduler does
            not answer.
    """
    check_executor(executor)
    if isinstance(executor, Executor):
        yield executor
    elif isinstance(executor, str) and executor.startswith(_DASK):
        client = _dask(executor.removeprefix(_DASK))
        try:
            yield client.get_executor(pure=False)
        finally:
            client.close()
    elif jobs <= 1:
        yield None
    elif executor == "processes":
        spawning = multiprocessing.get_context("spawn")
        with _ending(ProcessPoolExecutor(jobs, mp_context=spawning)) as processes:
            yield processes
    else:
        with _ending(ThreadPoolExecutor(jobs, "onnxshrink")) as threads:
            yield threads


@contextlib.contextmanager
def _ending(pool: Executor) -> Iterator[Executor]:
    """Shut an executor down; after an interrupt, without waiting for its tasks."""
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()


def _dask(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            f"the executor {_DASK}{address} needs Dask: pip install 'onnxshrink[dask]'"
        ) from error
    try:
        return Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address}: {error}") from error
