"""Executors by name; that passes give the same bytes is tested in test_steps.py."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from onnxshrink.errors import UsageError
from onnxshrink.executors import check_executor, executing


def test_threads_unless_there_is_one_job() -> None:
    for name in (None, "threads"):
        with executing(name, 2) as executor:
            assert executor is not None
            assert (
                executor.submit(threading.current_thread)
                .result()
                .name.startswith("onnxshrink")
            )
        with executing(name, 1) as executor:
            assert executor is None


def test_processes_are_others() -> None:
    with executing("processes", 2) as executor:
        assert executor is not None
        assert executor.submit(os.getpid).result() != os.getpid()


def test_an_executor_of_the_caller_goes_on() -> None:
    with ThreadPoolExecutor(1) as own:
        with executing(own, 4) as executor:
            assert executor is own
        assert own.submit(abs, -1).result() == 1


@pytest.mark.parametrize("name", ["thread", "dask:", "ray", ""])
def test_what_is_no_executor_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="there is no executor"):
        check_executor(name)


def test_dask_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UsageError, match=r"pip install 'onnxshrink\[dask\]'"),
        executing("dask:tcp://127.0.0.1:1", 2),
    ):
        pass


def test_a_dask_cluster_is_used_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Client:
        def __init__(self, address: str, **settings: Any) -> None:
            if address == "nobody":
                raise OSError("Timed out trying to connect")
            said.append(address)

        def get_executor(self, **settings: Any) -> str:
            return "theirs"

        def close(self) -> None:
            said.append("closed")

    module = ModuleType("distributed")
    module.Client = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "distributed", module)
    with executing("dask:tcp://host:8786", 2) as executor:
        assert executor == "theirs"
    assert said == ["tcp://host:8786", "closed"]
    with (
        pytest.raises(UsageError, match="no Dask scheduler answers at nobody: Timed"),
        executing("dask:nobody", 2),
    ):
        pass
