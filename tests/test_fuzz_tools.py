"""Damaged data, recipes, state and models: a clear error or none, in bounded time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def fuzz(kind: str, count: int, seed: int) -> str:
    done = subprocess.run(
        [
            *[sys.executable, str(ROOT / "tools" / "fuzz"), kind],
            *["--count", str(count), "--seed", str(seed)],
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
@pytest.mark.parametrize(
    ("kind", "count"), [("data", 400), ("recipes", 150), ("state", 300), ("models", 40)]
)
def test_damage_is_one_clear_error(kind: str, count: int) -> None:
    assert fuzz(kind, count, 1).startswith(f"{kind}: ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
@pytest.mark.parametrize(
    ("kind", "count"),
    [("data", 50_000), ("recipes", 25_000), ("state", 25_000), ("models", 10_000)],
)
def test_much_damage_is_clear_errors(kind: str, count: int) -> None:
    fuzz(kind, count, 2)
