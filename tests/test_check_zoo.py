"""tools/check_zoo: every pass on every model of a folder, as a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_zoo"


@pytest.mark.slow
def test_the_table_says_what_came_of_each_pass(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}>
        { h = Identity(x) y = MatMul(h, w) }"""
    )
    onnx.save(proto, tmp_path / "small.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    words = ["--passes", "fold", "student:keep=0.5", "--seconds", "120"]
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path), *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert ["fold", "refused"] in rows
    assert ["fold", "done"] in rows
    assert ["student:keep=0.5", "nothing"] in rows
    assert "nothing to do: there is no residual block" in done.stdout


def test_a_folder_without_models_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.count("no .onnx file")) == (2, 1)
