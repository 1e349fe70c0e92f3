"""Load and save without passes: time and peak memory against onnx + graphsurgeon.

Each measurement runs in a process of its own: ours through ``Model.load(a).save(b,
storage="plain")``, the peer through ``onnx.load``, ``import_onnx``, ``export_onnx`` and
``onnx.save``. Where the weights are external the peer runs a second time, lazily: it
reads the topology alone and copies the data file, as a careful user would. Memory is
the peak resident set; the first line says what importing onnx and numpy alone takes.
Models come from ``tools/large_model.py`` and are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SUBJECTS = ("imports alone", "onnxshrink", "onnx + gs", "onnx + gs, lazy")


@dataclass(frozen=True)
class Outcome:
    """What one process did.

    Attributes:
        seconds: Wall time of load and save, without imports.
        cpu: Processor seconds of the same.
        peak: Peak resident set in bytes.
        failed: Why it failed; empty if it did not.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    failed: str = ""


def _work(subject: str, source: Path, target: Path) -> None:
    """Load and save once, in this process."""
    if subject == "imports alone":
        return
    if subject == "onnxshrink":
        from onnxshrink.model import Model

        Model.load(source).save(target, storage="plain")
        return
    import onnx
    import onnx_graphsurgeon as gs

    outside = subject.endswith("lazy")
    graph = gs.import_onnx(onnx.load(source, load_external_data=not outside))
    model = gs.export_onnx(graph)
    big = outside or source.with_name(f"{source.name}.data").exists()
    if outside:
        onnx.save(model, target)
        # The topology went through alone; the weights are copied as they are.
        data = source.with_name(f"{source.name}.data")
        if data.exists():
            shutil.copyfile(data, target.with_name(data.name))
    elif big:
        onnx.save(
            model, target, save_as_external_data=True, location=f"{target.name}.data"
        )
    else:
        onnx.save(model, target)


def _child(subject: str, source: Path, target: Path) -> None:
    """Measure ``_work`` and print the outcome as JSON."""
    import numpy as np  # noqa: F401  # both sides need them; imports are not timed
    import onnx
    import onnx_graphsurgeon as gs  # noqa: F401

    if subject == "onnxshrink":
        from onnxshrink import storage  # noqa: F401
        from onnxshrink.model import Model  # noqa: F401
    onnx.__version__  # noqa: B018
    start, cpu = time.perf_counter(), time.process_time()
    failed = ""
    try:
        _work(subject, source, target)
    except MemoryError:
        failed = "out of memory"
    except Exception as error:  # a peer may fail with anything; the table says how
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "cpu": time.process_time() - cpu,
                # Linux counts in KiB.
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "failed": failed,
            }
        )
    )


def measure(subject: str, source: Path, target: Path, memory: int) -> Outcome:
    """Run one subject in its own process with at most ``memory`` bytes of addresses."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.nice(5)

    command = [sys.executable, __file__, "--child", subject, str(source), str(target)]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=limit,  # no threads here
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        if done.returncode < 0:
            words = [f"killed by signal {-done.returncode}"]
        return Outcome(failed=words[-1][:80])


def _row(subject: str, outcome: Outcome, ours: Outcome | None) -> str:
    if outcome.failed:
        what = f"failed: {outcome.failed} (peak {outcome.peak / 1e6:.0f} MB)"
        return f"  {subject:18}{what}"
    ratio = ""
    if ours is not None and not ours.failed and ours.peak and ours.seconds:
        ratio = (
            f"{outcome.peak / ours.peak:8.1f}x memory"
            f"{outcome.seconds / ours.seconds:7.1f}x time"
        )
    return (
        f"  {subject:18}{outcome.peak / 1e6:9.0f} MB{outcome.seconds:8.1f} s"
        f"{outcome.cpu:8.1f} s cpu{ratio}"
    )


def main(arguments: Sequence[str]) -> int:
    """Generate the models, measure, and print one table for each."""
    from tools.large_model import parse_size, write

    parser = argparse.ArgumentParser(prog="bench model", description=__doc__)
    parser.add_argument(
        "--inline", type=parse_size, default=parse_size("1.5GB"), help="0 to leave out"
    )
    parser.add_argument(
        "--external", type=parse_size, default=parse_size("6GB"), help="0 to leave out"
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument(
        "--memory", type=parse_size, default=parse_size("12GB"), help="of each process"
    )
    options = parser.parse_args(arguments)
    for size, inline in ((options.inline, True), (options.external, False)):
        if not size:
            continue
        with tempfile.TemporaryDirectory(prefix="onnxshrink-bench-") as name:
            folder = Path(name)
            source = folder / "large.onnx"
            written = write(source, size=size, layers=options.layers, inline=inline)
            where = "in one file" if inline else "external"
            print(f"{written / 1e9:.2f} GB of weights, {where}", flush=True)
            ours: Outcome | None = None
            for subject in SUBJECTS:
                if subject.endswith("lazy") and inline:
                    continue
                out = folder / "out"
                out.mkdir()
                outcome = measure(subject, source, out / "out.onnx", options.memory)
                print(_row(subject, outcome, ours), flush=True)
                if subject == "onnxshrink":
                    ours = outcome
                shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main(sys.argv[1:]))
