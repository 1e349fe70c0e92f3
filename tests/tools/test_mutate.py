"""The mutation check: what it changes, and that it tells who notices."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    path = ROOT / "tools" / "mutate.py"
    spec = importlib.util.spec_from_file_location("mutate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    return module


mutate = load()

SOURCE = b'''"""Text with a < b and 1 + 1."""

def smaller(a: "int | None", b: int = 1) -> bool:
    if a is None:
        raise ValueError(f"none of {1 + 1}")
    return a + b < 10 and not b == 7
'''


def test_every_kind_of_change_is_a_program_and_texts_are_left_alone() -> None:
    found = mutate.mutations(SOURCE)
    changed = {(one.line, one.what) for one in found}
    assert changed == {
        (3, "whole number off by one"),
        (4, "comparison is is not"),
        (4, "condition negated"),
        (6, "operator is or"),
        (6, "only the first condition"),
        (6, "comparison is <="),
        (6, "second term dropped"),
        (6, "operator is -"),
        (6, "whole number off by one"),
        (6, "not dropped"),
        (6, "comparison is !="),
    }
    one = next(m for m in found if m.what == "comparison is <=")
    assert b"return ((a + b) <= (10)) and not b == 7" in one.applied(SOURCE)


def test_a_module_knows_its_tests() -> None:
    backoff = ROOT / "onnxshrink" / "search" / "backoff.py"
    assert mutate.tests_of(backoff) == ["tests/search/test_backoff.py"]
    worker = ROOT / "onnxshrink" / "isolation" / "worker.py"
    assert mutate.tests_of(worker) == ["tests/isolation/test_host.py"]


@pytest.mark.slow
def test_what_no_test_notices_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnxshrink").mkdir()
    (tmp_path / "tests").mkdir()
    module = tmp_path / "onnxshrink" / "limits.py"
    module.write_text("def fits(a):\n    return a < 3\n")
    tests = tmp_path / "tests" / "test_limits.py"
    tests.write_text(
        "from onnxshrink.limits import fits\n\ndef test_it():\n"
        "    assert fits(1)\n    assert not fits(9)\n"
    )
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    assert mutate.main([str(module)]) == 1
    said = capsys.readouterr().out
    assert "2 of 2 changes tried, 2 survived" in said
    assert "onnxshrink/limits.py:2: comparison is <=: a < 3" in said

    with tests.open("a") as file:
        file.write("    assert fits(2)\n    assert not fits(3)\n")
    assert mutate.main([str(module)]) == 0
    assert module.read_text() == "def fits(a):\n    return a < 3\n"

    tests.write_text("def test_it():\n    assert False\n")
    assert mutate.main([str(module)]) == 2
    assert mutate.main([str(tmp_path / "none.py")]) == 2
