"""Python reads like the command line: words, budgets, progress, cancelling, exports.

Tested here: ``shrink`` of onnxshrink/manager.py, and what ``import onnxshrink`` gives.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxshrink
from onnxshrink import Budget, Model, shrink
from onnxshrink.errors import Cancelled, OutputError, UsageError

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 16)).astype(np.float32)
FAST: dict[str, Any] = {"measure_latency": False, "measure_memory": False}


def proto() -> onnx.ModelProto:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,16] x) => (float[N,64] y) '
        "{ y = MatMul(x, w) }"
    )
    w = RANDOM.normal(size=(16, 64)).astype(np.float32)
    made.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return made


def test_the_words_are_those_of_the_command_line(tmp_path: Path) -> None:
    result = shrink(
        proto(),
        recipe="int8",
        data={"x": X},
        max_drop=None,
        min_sqnr=20,
        target="arm",
        report=tmp_path / "a" / "run.md",
        **FAST,
    )
    assert "quantize:target=arm" in result.report.pipeline
    assert result.report.proof.budget["min_sqnr"] == 20
    assert "target arm" in (tmp_path / "a" / "run.md").read_text()
    assert "<table>" in result._repr_html_()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"max_dorp": 1}, "no option 'max_dorp'.*Did you mean 'max_drop'"),
        ({"thread": 1}, "no option 'thread'.*Did you mean 'threads'"),
        ({"budget": {"max_dop": 1}}, "no 'max_dop'.*Did you mean 'max_drop'"),
        ({"budget": {"max_drop": "1"}}, "max_drop is a number"),
        ({"budget": {"max_drop": 1}, "min_sqnr": 3}, "not both"),
        ({"recipe": "int8"}, "either passes or recipe"),
        ({"target": "arm"}, "for passes that write for a processor"),
        ({"report": "run.pdf"}, "a report ends in"),
        ({"on_breach": "panic"}, "on_breach is"),
    ],
    ids=str,
)
def test_unknown_words_are_answered_with_the_nearest(
    words: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        shrink(proto(), "fold", **words)


def test_a_recipe_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'int8'"):
        shrink(proto(), recipe="int9")


def test_budgets_are_mappings_too() -> None:
    assert Budget.of({"max_drop": 0.5, "max_latency": 2}) == Budget(
        max_drop=0.5, max_latency_ratio=2
    )


def test_a_report_that_cannot_be_written_says_that_the_model_was(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*the model was written to .*o\.onnx"):
        shrink(
            proto(),
            "fold",
            output=tmp_path / "o.onnx",
            report=tmp_path / "file" / "run.json",
            **FAST,
        )
    assert (tmp_path / "o.onnx").is_file()


class Program:
    """As an exporter returns it."""

    def __init__(self, made: onnx.ModelProto) -> None:
        self.model_proto = made


class Function:
    """As onnxscript has it."""

    def __init__(self, made: onnx.ModelProto) -> None:
        self._made = made

    def to_model_proto(self) -> onnx.ModelProto:
        return self._made


@pytest.mark.parametrize("kind", [Program, Function])
def test_what_exporters_return_is_a_model(kind: Any) -> None:
    assert shrink(kind(proto()), "fold", **FAST).model.outputs[0].name == "y"


def test_a_model_that_its_package_writes_is_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Ir:
        graph = None

    package = type(sys)("an_ir")
    package.to_proto = lambda model: proto()  # type: ignore[attr-defined]
    Ir.__module__ = "an_ir._core"
    monkeypatch.setitem(sys.modules, "an_ir", package)
    assert Model.load(Ir()).outputs[0].name == "y"  # type: ignore[arg-type]


def test_progress_is_told_and_may_end_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    shrink(proto(), "fold", progress=lambda *what: told.append(what[2]), **FAST)
    assert "fold" in told

    class EnoughError(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        shrink(proto(), "fold", progress=stop, output=tmp_path / "o.onnx", **FAST)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_a_thread_is_cancelled_from_another(tmp_path: Path) -> None:
    cancel, begun = threading.Event(), threading.Event()
    ended: list[BaseException] = []

    def progress(done: int, total: int, what: str) -> None:
        begun.set()
        time.sleep(0.01)

    def work() -> None:
        try:
            shrink(
                proto(),
                "fold,prune:sparsity=0.5",
                data={"x": X},
                output=tmp_path / "o.onnx",
                progress=progress,
                cancel=cancel,
            )
        except Cancelled as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(30)
    cancel.set()
    thread.join(30)
    assert not thread.is_alive()
    assert "cancelled" in str(ended[0])
    assert list(tmp_path.iterdir()) == []


def test_what_the_terminal_says_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "onnxshrink"):
        shrink(proto(), "fold", **FAST)
    assert any(record.message.startswith("fold: ") for record in caplog.records)


def test_public_names_are_listed_before_they_are_imported() -> None:
    code = (
        "import sys, onnxshrink\n"
        "assert set(onnxshrink.__all__) <= set(dir(onnxshrink))\n"
        "assert 'onnxruntime' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"shrink", "Budget", "Result"} <= set(dir(onnxshrink))


def test_importing_takes_less_than_a_third_of_a_second() -> None:
    code = (
        "import time; start = time.process_time(); import onnxshrink\n"
        "print(time.process_time() - start)"
    )
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.3


def test_nothing_is_sent_and_no_file_appears_at_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    model = tmp_path / "m.onnx"
    onnx.save(proto(), model)
    # Whoever asks for a name or connects, in this process, is found out.
    code = (
        "import os, socket, sys\n"
        "def refuse(event, args):\n"
        "    if event.startswith('socket.') and event[7:] in (\n"
        "        'getaddrinfo', 'connect', 'gethostbyname'):\n"
        "        os._exit(77)\n"
        "sys.addaudithook(refuse)\n"
        "import onnxshrink\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "from onnxshrink import cli\n"
        "cli.main([sys.argv[1], '-q', '--measure', 'none'])\n"
    )
    hidden = {"HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "ORT_DISABLE_TELEMETRY"}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env={**env, "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
