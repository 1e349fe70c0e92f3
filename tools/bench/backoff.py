"""How often a step that backs off studies, rounds and calibrates, by release.

Each case runs in two processes: with this tree, and with a release before it, checked
out by ``git worktree`` into a folder of its own that is removed again. Both count the
same calls and the CPU seconds inside them, on one thread, and both write a file; the
last column says whether the bytes of the files are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
RELEASE = "fc1a67f"


@dataclass(frozen=True)
class Case:
    """A run whose budget binds.

    Attributes:
        model: Name in ``models``.
        passes: What is run.
        budget: Fields of ``Budget``.
        images: Training images that are given to it; 0: all 60,000.
    """

    model: str
    passes: str
    budget: dict[str, Any]
    images: int = 0


CASES = {
    "prune": Case("lenet-300-100", "prune:sparsity=0.97", {"max_drop": 0.1}),
    "repair": Case(
        "lenet-300-100",
        "prune:sparsity=0.98,recover:samples=256",
        {"max_drop": 0.1},
    ),
    "static": Case("residual-cnn", "quantize", {"min_sqnr": 45.0}, 8_000),
    "dynamic": Case("vit", "quantize", {"min_sqnr": 45.0}, 8_000),
    "weights": Case(
        "vit", "quantize:activations=none,weights=int4", {"min_sqnr": 42.0}, 8_000
    ),
}
COUNTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "studied": (
        ("solvers.obs", "analysis.surgeon"),
        ("removal_order", "pattern_mask"),
    ),
    "rounded": (
        ("solvers.rounding", "quantization.rounding"),
        ("gptq", "adaround", "descend"),
    ),
    "calibrated": (("activations.gathering", "analysis.activations"), ("_run",)),
}
"""What is counted: the modules where a function may be, newest first, and its names."""


def main(arguments: Sequence[str]) -> None:
    """Print one table for all cases."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="backoff", description=__doc__)
    parser.add_argument("commit", nargs="?", default=RELEASE, help="the release before")
    parser.add_argument("--cases", default=",".join(CASES))
    given = parser.parse_args(arguments)
    table = Table(title=f"calls (CPU seconds), {given.commit} -> this tree")
    table.add_column("run")
    for column in (*COUNTED, "CPU s", "bytes of the file"):
        table.add_column(column, justify="right")
    with _checked_out(given.commit) as before:
        for name in given.cases.split(","):
            case = CASES[name]
            old, new = _measured(before, name), _measured(ROOT, name)
            calls = [
                f"{old[what]['calls']} ({old[what]['seconds']:.1f}) -> "
                f"{new[what]['calls']} ({new[what]['seconds']:.1f})"
                if old[what]["calls"] or new[what]["calls"]
                else ""
                for what in COUNTED
            ]
            same = "same" if old["digest"] == new["digest"] else "DIFFERENT"
            limits = ", ".join(f"{key}={value:g}" for key, value in case.budget.items())
            print(f"{name}: {calls}, {same}", file=sys.stderr, flush=True)
            table.add_row(
                f"{case.model}: {case.passes}\n{limits}",
                *calls,
                f"{old['seconds']:.1f} -> {new['seconds']:.1f}",
                f"{new['bytes']:,}, {same}",
            )
    Console(width=130).print(table)


@contextlib.contextmanager
def _checked_out(commit: str) -> Iterator[Path]:
    """Yield a worktree of a commit, and remove it."""
    with tempfile.TemporaryDirectory(prefix="onnxshrink-bench-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _measured(tree: Path, case: str) -> dict[str, Any]:
    """Run a case with the code of a tree, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, case],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- in the process of a case ---------------------------------------------------------


@dataclass
class Count:
    """Calls of some functions, and the CPU seconds inside them."""

    calls: int = 0
    seconds: float = 0.0

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - begin

        return counted


def _counted() -> dict[str, Count]:
    """Count calls by every name under which a module knows a function."""
    importlib.import_module("onnxshrink.passes.prune")
    importlib.import_module("onnxshrink.passes.quantize")
    importlib.import_module("onnxshrink.passes.recover")
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("onnxshrink.")
    ]
    counts = {what: Count() for what in COUNTED}
    for what, (places, names) in COUNTED.items():
        home = next(
            sys.modules[f"onnxshrink.{place}"]
            for place in places
            if f"onnxshrink.{place}" in sys.modules
        )
        for name in names:
            function = getattr(home, name)
            wrapper = counts[what].wrapped(function)
            for module in modules:
                for key, value in list(vars(module).items()):
                    if value is function:
                        setattr(module, key, wrapper)
    return counts


def _run(case: Case) -> dict[str, Any]:
    from onnxshrink import Budget, shrink

    counts = _counted()
    with np.load(ROOT / "models" / "mnist.npz") as file:
        images = file["train_x"][: case.images or None, None] / np.float32(255)
        data = {"image": images, "labels": file["train_y"][: len(images)]}
        images = file["test_x"][: len(images), None] / np.float32(255)
        evaluation = {"image": images, "labels": file["test_y"][: len(images)]}
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        result = shrink(
            ROOT / "models" / f"{case.model}.onnx",
            case.passes,
            data=data,
            evaluation=evaluation,
            budget=Budget(**case.budget),
            output=path,
            threads=1,
            jobs=1,
            measure_latency=False,
            measure_memory=False,
        )
        content = path.read_bytes()
    for step in result.report.steps:
        print(step.pass_name, step.accepted, step.reason, step.left_out)
    return {
        "seconds": time.process_time() - begin,
        "digest": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        **{
            what: {"calls": count.calls, "seconds": count.seconds}
            for what, count in counts.items()
        },
    }


if __name__ == "__main__":
    print(json.dumps(_run(CASES[sys.argv[1]])))
