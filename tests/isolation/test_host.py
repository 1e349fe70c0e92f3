"""Sessions in a child: the same answers, and its end is not ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from onnxshrink import PassManager, Pipeline, runtime
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.isolation import host as hosts
from onnxshrink.isolation.host import HostedSession, SessionHost, hosting
from onnxshrink.measuring.measure import latencies
from onnxshrink.model import Model

PRODUCT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3] x) => (float[n, 2] y)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}>
{ y = MatMul(x, w) }
"""
ENDLESS = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x) => (float[2] y)
<int64 most = {9000000000000}, bool go = {1}>
{
  y = Loop(most, go, x) <body = b (int64 i, bool c, float[2] a) => (bool d, float[2] e)
    { d = Identity(c) e = Neg(a) }>
}
"""
WIDE = """
<ir_version: 8, opset_import: ["" : 17]>
g (int64[1] size) => (float[1] y)
{
  wide = ConstantOfShape<value = float[1] {1}>(size)
  more = Exp(wide)
  all = ReduceMax<keepdims = 0>(more)
  shape = Constant<value = int64[1] {1}>()
  y = Reshape(all, shape)
}
"""
DIES_IN_HALF = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[4, 8, 16] x) => (float[8, 4, 8] y)
{ t = Transpose<perm = [1, 0, 2]>(x) y = MatMul(t, w) }
"""


def written(text: str, path: Path, **weights: tuple[int, ...]) -> Path:
    proto = parser.parse_model(text)
    for name, shape in weights.items():
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, path)
    return path


@pytest.fixture
def host() -> Iterator[SessionHost]:
    with SessionHost() as made:
        yield made


def child_of(host: SessionHost) -> int:
    assert host._child is not None
    return host._child.pid


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_hosted_session_is_like_one_of_our_own(
    host: SessionHost, tmp_path: Path
) -> None:
    path = written(PRODUCT, tmp_path / "m.onnx")
    own, hosted = runtime.session(path), host.session(path)
    assert isinstance(hosted, HostedSession)
    assert hosted.inputs == own.inputs
    assert hosted.outputs == own.outputs
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(hosted.run({"x": x})["y"], own.run({"x": x})["y"])
    with pytest.raises(ModelError, match="no array for input 'x'"):
        hosted.run({})
    milliseconds, ratio = hosted.timed({"x": x}, host.session(path))
    assert milliseconds > 0
    assert ratio is not None
    assert ratio > 0


def test_a_session_here_and_one_in_the_child_are_timed_by_wall(
    host: SessionHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processor time of this process would say nothing of the child's.
    path = written(PRODUCT, tmp_path / "m.onnx")
    own, hosted = runtime.session(path), host.session(path)
    monkeypatch.setattr(own, "seconds", lambda feeds: 0.002)
    monkeypatch.setattr(hosted, "seconds", lambda feeds: 0.004)
    x = np.ones((1, 3), np.float32)
    assert latencies(own, hosted, {"x": x}) == (2.0, 0.5)
    monkeypatch.undo()
    assert 0 < hosted.seconds({"x": x}) < 60


def test_a_file_is_opened_once_until_it_changes(
    host: SessionHost, tmp_path: Path
) -> None:
    path = written(PRODUCT, tmp_path / "m.onnx")
    first = host.session(path)
    assert host.session(path) is first
    assert host.session(path, optimize="off") is not first
    written(PRODUCT.replace("1, 2", "7, 2"), path)
    again = host.session(path)
    assert again is not first
    x = np.ones((1, 3), np.float32)
    assert first.run({"x": x})["y"].tolist() == [[9, 12]]
    assert again.run({"x": x})["y"].tolist() == [[15, 12]]


def test_a_model_in_memory_goes_to_the_child(host: SessionHost) -> None:
    hosted = host.session(Model.load(parser.parse_model(PRODUCT)))
    assert isinstance(hosted, HostedSession)
    x = np.ones((1, 3), np.float32)
    assert hosted.run({"x": x})["y"].tolist() == [[9, 12]]


def test_large_models_are_not_open_at_once(
    host: SessionHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_OPEN_BYTES", 150)
    one = host.session(written(PRODUCT, tmp_path / "one.onnx"))
    two = host.session(written(PRODUCT, tmp_path / "two.onnx"))
    assert isinstance(one, HostedSession)
    assert isinstance(two, HostedSession)
    assert one.number == 0
    x = np.ones((1, 3), np.float32)
    assert one.run({"x": x})["y"].tolist() == [[9, 12]]
    assert (one.number > 0, two.number) == (True, 0)
    _, ratio = one.timed({"x": x}, two)  # both are needed for that
    assert ratio is not None


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_crash_is_an_error_and_the_next_request_works(
    host: SessionHost, tmp_path: Path
) -> None:
    path = written(PRODUCT, tmp_path / "m.onnx")
    hosted = host.session(path)
    os.kill(child_of(host), signal.SIGSEGV)
    x = np.ones((1, 3), np.float32)
    with pytest.raises(ModelError, match=r"cannot run it: it crashed \(SIGSEGV\)"):
        hosted.run({"x": x})
    assert hosted.run({"x": x})["y"].tolist() == [[9, 12]]
    assert host.session(path).run({"x": x})["y"].tolist() == [[9, 12]]


def test_a_loop_without_an_end_meets_the_time_limit(tmp_path: Path) -> None:
    with SessionHost(time_limit=300) as host:
        hosted = host.session(written(ENDLESS, tmp_path / "m.onnx"))
        host.time_limit = 1.0  # on a busy machine, opening it takes longer
        child = child_of(host)
        with pytest.raises(ModelError, match=r"longer than the limit of 1 s"):
            hosted.run({"x": np.ones(2, np.float32)})
        assert not is_alive(child)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_a_model_that_needs_too_much_meets_the_memory_limit(tmp_path: Path) -> None:
    with SessionHost(memory_limit=300 << 20) as host:
        hosted = host.session(written(WIDE, tmp_path / "m.onnx"))
        assert hosted.run({"size": np.asarray([9])})["y"].tolist() == [
            pytest.approx(np.e)
        ]
        with pytest.raises(ModelError, match="more memory than the limit of 314"):
            hosted.run({"size": np.asarray([400 << 20])})


def test_what_does_not_load_says_why(host: SessionHost, tmp_path: Path) -> None:
    path = written(PRODUCT.replace("MatMul", "Nothing"), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"cannot load .*m\.onnx: .*Nothing"):
        host.session(path)
    with pytest.raises(UsageError, match="no provider"):
        host.session(path, providers=["NoExecutionProvider"])


def test_limits_must_be_possible() -> None:
    with pytest.raises(UsageError, match="time limit must be positive"):
        SessionHost(time_limit=0)
    with pytest.raises(UsageError, match="need isolate=True"):
        PassManager(Pipeline.parse("fold"), isolate=False, time_limit=3)


def test_no_child_where_nobody_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with hosting(False) as host:
        assert host is None
    monkeypatch.setenv("ONNXSHRINK_ISOLATE", "0")
    with hosting() as host:
        assert host is None
    with hosting(True) as host:
        assert host is not None
        assert host.time_limit == 300  # a loop without an end is bounded


def test_no_child_where_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setenv("ONNXSHRINK_ISOLATE", "1")
    with hosting() as host:
        assert host is None
    with pytest.raises(UsageError, match="no child process can be started"):
        hosting(True).__enter__()


def test_a_run_survives_what_onnxruntime_may_not(tmp_path: Path) -> None:
    # onnxruntime 1.32 dies of an fp16 Transpose in front of a MatMul with a constant.
    path = written(DIES_IN_HALF, tmp_path / "m.onnx", w=(16, 8))
    manager = PassManager(
        Pipeline.parse("half:mode=compute"), isolate=True, measure_memory=False, jobs=1
    )
    result = manager.run(path, tmp_path / "out.onnx")
    assert result.report.final.latency_ms is not None
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    x = np.ones((4, 8, 16), np.float32)
    assert session.run(None, {"x": x})[0].shape == (8, 4, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_run_that_is_ended_leaves_no_process(tmp_path: Path) -> None:
    path = written(ENDLESS, tmp_path / "m.onnx")
    environment = {**os.environ, "ONNXSHRINK_ISOLATE": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "onnxshrink", path],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    children: list[int] = []
    while time.monotonic() < deadline and not children:
        time.sleep(0.1)
        listing = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
        children = [int(word) for word in listing.split()]
    assert children
    run.terminate()
    run.wait(10)
    gone = time.monotonic() + 5
    while time.monotonic() < gone and any(map(is_alive, children)):
        time.sleep(0.1)
    assert not any(map(is_alive, children))


def test_files_of_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "types.py").write_text("raise SystemExit('not a module of ours')")
    written(PRODUCT, tmp_path / "m.onnx")
    shown = subprocess.run(
        [sys.executable, "-m", "onnxshrink", "m.onnx"],
        env={**os.environ, "ONNXSHRINK_ISOLATE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "memory to load it" in shown.stdout or sys.platform != "linux"
