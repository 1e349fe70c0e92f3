"""BLAS keeps to one thread while any of several functions runs, and gets them back."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator

import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

from onnxshrink.solvers.rounding import gptq
from onnxshrink.solvers.threads import one_thread


def _blas_threads() -> set[int]:
    return {
        pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"
    }


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Start with two threads, on whatever machine."""
    limiter = ThreadpoolController().limit(limits=2)
    yield
    limiter.restore_original_limits()


@one_thread
def _threads_inside() -> set[int]:
    return _blas_threads()


@one_thread
def _nested() -> tuple[set[int], set[int]]:
    return _threads_inside(), _blas_threads()


def test_one_thread_inside_and_as_many_as_before_outside() -> None:
    assert _threads_inside() == {1}
    assert _nested() == ({1}, {1})
    assert _blas_threads() == {2}
    with one_thread:
        assert _threads_inside() == {1}
        assert _blas_threads() == {1}
    assert _blas_threads() == {2}


def test_who_leaves_first_does_not_lift_the_limit_of_who_stays() -> None:
    entered, may_leave = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    @one_thread
    def stays() -> None:
        entered.set()
        assert may_leave.wait(60)
        seen.append(_blas_threads())

    thread = threading.Thread(target=stays)
    thread.start()
    assert entered.wait(60)
    assert _threads_inside() == {1}
    may_leave.set()
    thread.join()
    assert seen == [{1}]
    assert _blas_threads() == {2}


def test_an_error_lifts_it_too() -> None:
    @one_thread
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert _blas_threads() == {2}


def test_a_limited_function_goes_to_other_processes_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(gptq)) is gptq


def test_who_leaves_last_lifts_it_though_a_living_thread_set_it() -> None:
    entered, may_leave, left, may_end = (threading.Event() for _ in range(4))

    @one_thread
    def leaves() -> None:
        entered.set()
        assert may_leave.wait(60)

    def lives() -> None:
        leaves()
        left.set()
        assert may_end.wait(60)

    @one_thread
    def stays() -> set[int]:
        may_leave.set()
        assert left.wait(60)
        return _blas_threads()

    thread = threading.Thread(target=lives)
    thread.start()
    assert entered.wait(60)
    assert stays() == {1}
    assert _blas_threads() == {2}
    may_end.set()
    thread.join()
