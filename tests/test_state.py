"""State folders: one run an output, private, no links; hostile ones are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import Model, shrink
from onnxshrink.errors import OutputError, UsageError
from onnxshrink.files import keep_apart, made_folders, read_at, sweep_scratch
from onnxshrink.state import Workspace

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 8)).astype(np.float32)
FAST: dict[str, Any] = {"measure_latency": False, "measure_memory": False}
PASSES = "fold,prune:sparsity=0.5,importance=magnitude"


def saved(folder: Path, name: str = "m.onnx", scale: float = 1) -> Path:
    w = (RANDOM.normal(size=(8, 64)) * scale).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,8] x) => (float[N,64] y) '
        "{ y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(proto, folder / name)
    return folder / name


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, **words: Any) -> Path:
    """Leave the state of a run whose second pass was interrupted."""
    from onnxshrink import registry

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    given = {"data": {"x": X}, **words}
    with monkeypatch.context() as context:
        context.setattr(registry.get("prune"), "sites", stop)
        with pytest.raises(KeyboardInterrupt):
            shrink(folder / "m.onnx", PASSES, output=folder / "o.onnx", **FAST, **given)
    return folder / ".o.onnx.onnxshrink"


def resumed(folder: Path, **words: Any) -> Any:
    given = {"data": {"x": X}, "passes": PASSES, **words}
    passes = given.pop("passes")
    return shrink(
        folder / "m.onnx",
        passes,
        output=folder / "o.onnx",
        resume=True,
        **FAST,
        **given,
    )


def test_a_run_continues_only_what_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    metric = tmp_path / "metric.py"
    metric.write_text("def score(outputs, labels):\n    return 1.0\n")
    words = {"metric": f"{metric}:score", "data": {"x": X, "labels": np.arange(40) % 3}}
    interrupted(tmp_path, monkeypatch, **words)
    changed = X.copy()
    changed[-1, -1] += 1
    labels = np.arange(40)[::-1] % 3
    for other, says in (
        ({"data": {"x": changed, "labels": np.arange(40) % 3}}, "other data"),
        ({"data": {"x": X, "labels": labels}}, "other data"),
        ({"passes": "fold,prune:sparsity=0.4,importance=magnitude"}, "other passes"),
        ({"threads": 1}, "other runtime"),
    ):
        with pytest.raises(UsageError, match=says):
            resumed(tmp_path, **{**words, **other})
    metric.write_text("def score(outputs, labels):\n    return 1.0 + 0\n")
    with pytest.raises(UsageError, match="other metric"):
        resumed(tmp_path, **words)
    metric.write_text("def score(outputs, labels):\n    return 1.0\n")
    before = path.read_bytes()
    saved(tmp_path, scale=2)
    with pytest.raises(UsageError, match="other input"):
        resumed(tmp_path, **words)
    path.write_bytes(before)
    result = resumed(tmp_path, **words)
    assert [step.pass_name for step in result.report.steps] == ["fold", "prune"]
    left = {file.name for file in tmp_path.iterdir()}
    assert left - {"__pycache__"} == {"m.onnx", "o.onnx", "metric.py"}


def test_changed_external_weights_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    proto = onnx.load(path)
    onnx.save(
        proto, path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    interrupted(tmp_path, monkeypatch)
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "w.bin").write_bytes(bytes(data))
    with pytest.raises(UsageError, match="other input"):
        resumed(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../m.onnx"},
        {"path": "/etc/passwd"},
        {"path": 7},
        {"next": 99},
        {"next": -1},
        {"next": "1"},
        {"sha256": "0"},
        {"steps": [{}]},
        {"steps": 3},
        {"stats": {"file_bytes": "x"}},
        {"lineage": {"a": [1]}},
        {"baseline": "../m.onnx"},
    ],
    ids=str,
)
def test_hostile_state_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    saved(tmp_path)
    state = interrupted(tmp_path, monkeypatch) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    with pytest.raises(UsageError, match=r"cannot be read.*run without --resume"):
        resumed(tmp_path)
    state.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="cannot be read"):
        resumed(tmp_path)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_state_never_leads_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    folder = interrupted(tmp_path, monkeypatch)
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="'link', which is no file of a run"):
        resumed(tmp_path)
    (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError, match="'pipe'"):
        resumed(tmp_path)
    (folder / "pipe").unlink()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"):
        resumed(tmp_path)
    folder.chmod(0o700)
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    for resume in (True, False):
        with pytest.raises(OutputError, match="is a link"):
            shrink(
                tmp_path / "m.onnx", "fold", output=tmp_path / "o.onnx", resume=resume
            )
    assert (elsewhere / "state.json").exists()


def test_one_run_an_output(tmp_path: Path) -> None:
    with Workspace(tmp_path / "o.onnx", resume=False):
        code = (
            "import sys; from pathlib import Path\n"
            "from onnxshrink.state import Workspace\n"
            "Workspace(Path(sys.argv[1]), resume=False).__enter__()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "o.onnx")],
            capture_output=True,
            text=True,
        )
        assert f"another run (process {os.getpid()}) is writing" in done.stderr
        with Workspace(tmp_path / "other.onnx", resume=False):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    saved(tmp_path)
    folder = tmp_path / ".o.onnx.onnxshrink"
    (folder / "step-0").mkdir(parents=True)
    (folder / "lock").write_text("999999999\n")
    (folder / "0-o.onnx").write_bytes(b"half")
    (tmp_path / ".o.onnx.onnxshrink-0123456789ab").write_bytes(b"half")
    shrink(tmp_path / "m.onnx", "fold", output=tmp_path / "o.onnx", **FAST)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "o.onnx"}


def test_scratch_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    for name in ("onnxshrink-999999999-ab", f"onnxshrink-{os.getpid()}-ab", "other"):
        (tmp_path / name).mkdir()
    sweep_scratch(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"onnxshrink-{os.getpid()}-ab", "other"}


def test_an_output_is_no_input(tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, x=X)
    (tmp_path / "link").symlink_to(data)
    for output in (data, tmp_path / "link"):
        with pytest.raises(OutputError, match="never overwritten"):
            shrink(saved(tmp_path), "fold", data=data, output=output, **FAST)
    os.link(data, tmp_path / "hard")
    with pytest.raises(OutputError, match="is the data"):
        keep_apart(tmp_path / "hard", {"the data": data})
    with pytest.raises(OutputError, match="is the data"):
        keep_apart(data, {"the data": tmp_path})
    keep_apart(tmp_path / "new", {"the data": tmp_path, "nothing": None})


def test_a_missing_folder_is_made_and_goes_again_if_the_work_fails(
    tmp_path: Path,
) -> None:
    model = saved(tmp_path)
    shrink(model, "fold", output=tmp_path / "a" / "b" / "o.onnx", **FAST)
    assert (tmp_path / "a" / "b" / "o.onnx").is_file()
    with pytest.raises(RuntimeError), made_folders(tmp_path / "c" / "d"):
        raise RuntimeError
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs two file systems")
def test_an_output_on_another_file_system_works(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        link = tmp_path / "o.onnx"
        link.symlink_to(Path(other) / "real.onnx")
        shrink(saved(tmp_path), "fold", output=link, **FAST)
        assert link.is_symlink()
        assert Model.load(link).outputs[0].name == "y"
        assert os.listdir(other) == ["real.onnx"]


def test_files_are_read_at_a_place_without_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = Model.load(path).weight("w").read()
    monkeypatch.delattr(os, "pread")
    with path.open("rb") as file:
        assert read_at(file.fileno(), 4, 2) == path.read_bytes()[2:6]
    assert np.array_equal(Model.load(path).weight("w").read(), before)
    packed = tmp_path / "p.onnxz"
    Model.load(path).save(packed)
    assert np.array_equal(Model.load(packed).weight("w").read(), before)


SLEEPER = """
    import sys, time
    from onnxshrink import cli, registry
    def busy(*args):
        print("working", flush=True)
        {work}
    registry.get("prune").sites = busy
    cli.main([sys.argv[1], "--passes", "prune:sparsity=0.5", "-o", sys.argv[2], "-q"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(60)",
        pytest.param(
            "import threading; t = threading.Thread(target=time.sleep, args=(60,)); "
            "t.start(); t.join()",
            marks=pytest.mark.slow,  # it has five seconds to end
        ),
    ],
    ids=["asleep", "in a thread"],
)
def test_a_signal_ends_the_run_at_once_and_leaves_nothing(
    tmp_path: Path, number: str, code: int, work: str
) -> None:
    script = textwrap.dedent(SLEEPER).replace("{work}", work)
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(saved(tmp_path)), str(tmp_path / "o.onnx")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "working\n"
    run.send_signal(getattr(signal, number))
    _, said = run.communicate(timeout=30)
    assert run.returncode == code
    assert said.splitlines() == ["error: interrupted"]
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
