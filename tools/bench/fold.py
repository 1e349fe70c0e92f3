"""Nodes, bytes, time and latency of the fold pass against onnxslim, model by model.

Each tool reads the same file in a process of its own. onnxslim runs in its own Python:
give one with ``--peer-python``, or a folder for ``--peer-env``, where a virtual
environment is made with the pinned version. Bytes are of files with plain weights;
``auto`` is what ``Model.save`` writes by default. Outputs are compared with those of
the original model on seeded inputs, optimisations off, relative to the largest output.
Latency is CPU time of one run at full optimisation, sessions run in turn, as ratio to
the original. With no model named, those of the onnx wheel are taken: small files whose
weights are filled in by ConstantOfShape nodes, which onnxslim always writes out and
fold only with ``--bytes``, a share that allows the file to grow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.samples import Samples

PEER = ("onnxslim==0.1.98", "onnx", "onnxruntime")

_PEER_PROGRAM = """
import json, sys, time
import onnx, onnxslim
start = time.process_time()
model = onnxslim.slim(sys.argv[1])
seconds = time.process_time() - start
onnx.save(model, sys.argv[2])
print(json.dumps({"seconds": seconds, "version": onnxslim.__version__}))
"""
_OUR_PROGRAM = """
import json, sys, time
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.passes.fold import Fold
from onnxshrink.samples import Splits
start = time.process_time()
model = Model.load(sys.argv[1])
context = make_context(samples=Splits(), reference=model)
share = float(sys.argv[4]) if len(sys.argv) > 4 else 1.0
Fold(bytes=share).apply(model, context)
seconds = time.process_time() - start
nodes = sum(1 for _ in model.nodes())
model.save(sys.argv[2], storage="plain", external="never")
model.save(sys.argv[3], storage="auto", external="never")
print(json.dumps({"seconds": seconds, "nodes": nodes}))
"""


@dataclass
class Outcome:
    """What a tool made of a model.

    Attributes:
        path: The file it wrote, with plain weights.
        nodes: Nodes of all graphs in it.
        nbytes: Bytes of the file.
        seconds: CPU seconds from reading the file to the rewritten model.
        auto: Bytes of the file with encoded weights, for ours.
    """

    path: Path
    nodes: int
    nbytes: int
    seconds: float
    auto: int = 0


def count_nodes(graph: onnx.GraphProto) -> int:
    """Return the nodes of a graph and those inside it."""
    return sum(
        1
        + sum(
            count_nodes(sub)
            for attr in node.attribute
            for sub in ([attr.g] if attr.HasField("g") else attr.graphs)
        )
        for node in graph.node
    )


def run_tool(
    python: str, program: str, source: Path, *more: Path | float
) -> dict[str, Any] | str:
    """Run a program in a process of its own; return its figures or what went wrong."""
    made = subprocess.run(
        [python, "-c", program, str(source), *map(str, more)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode or not made.stdout.strip():
        lines = made.stderr.strip().splitlines() or ["no output"]
        return lines[-1][:200]
    figures: dict[str, Any] = json.loads(made.stdout.strip().splitlines()[-1])
    return figures


def outcome(target: Path, figures: Mapping[str, Any], auto: Path | None) -> Outcome:
    """Measure a file."""
    proto = onnx.load(target, load_external_data=False)
    return Outcome(
        target,
        count_nodes(proto.graph),
        target.stat().st_size,
        float(figures["seconds"]),
        auto.stat().st_size if auto is not None else 0,
    )


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return the largest difference of outputs, relative to the largest output."""
    worst = 0.0
    for name, one in a.items():
        two = b[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            return float("inf")
        one, two = one.astype(np.float64), two.astype(np.float64)
        scale = float(np.abs(one).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(one - two).max(initial=0.0)) / scale)
    return worst


def latencies(
    paths: Sequence[Path], feeds: Mapping[str, Any], seconds: float
) -> list[float]:
    """Return the median CPU time of a run for each file, run in turn."""
    sessions = [runtime.session(path, threads=1) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 3:
        for session, taken in zip(sessions, times, strict=True):
            start = time.process_time()
            session.run(feeds)
            taken.append(time.process_time() - start)
    return [float(np.median(taken)) for taken in times]


def peer_python(python: str | None, folder: Path | None) -> str | None:
    """Return the interpreter that has onnxslim, made in ``folder`` if need be."""
    if python is not None:
        return python
    if folder is None:
        return None
    binary = folder / "bin" / "python"
    if not binary.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(binary), "-m", "pip", "install", "-q", *PEER], check=True)
    return str(binary)


def wheel_models() -> list[Path]:
    """Return the light models that come with the onnx package."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return sorted(folder.glob("*.onnx"))


def label_of(path: Path) -> str:
    """Return a short name; the folder's for a file that is just called model."""
    return path.parent.name if path.stem == "model" else path.stem


def row(
    path: Path, python: str | None, folder: Path, options: argparse.Namespace
) -> list[str]:
    """Return the cells for one model."""
    before = onnx.load(path, load_external_data=False)
    cells = [label_of(path), str(count_nodes(before.graph))]
    ours_path, auto_path, peer_path = (
        folder / name for name in ("ours.onnx", "auto.onnx", "peer.onnx")
    )
    ours: Outcome | str
    peer: Outcome | str = "missing"
    share = [] if options.bytes is None else [options.bytes]
    made = run_tool(sys.executable, _OUR_PROGRAM, path, ours_path, auto_path, *share)
    ours = made if isinstance(made, str) else outcome(ours_path, made, auto_path)
    if python is not None:
        made = run_tool(python, _PEER_PROGRAM, path, peer_path)
        peer = made if isinstance(made, str) else outcome(peer_path, made, None)
    if isinstance(ours, str):
        return [*cells, ours, *[""] * 11]
    files = [path, ours.path]
    if isinstance(peer, Outcome):
        files.append(peer.path)
        theirs = [str(peer.nodes), f"{peer.nbytes:,}", f"{peer.seconds:.2f}"]
    else:
        theirs = [peer, "", ""]
    model = Model.load(path)
    feeds = next(iter(Samples.random_for(model, count=1).batches(1)))
    apart, ratios = ["", ""], ["", ""]
    try:
        results = [
            runtime.session(file, threads=1, optimize="off").run(feeds)
            for file in files
        ]
        apart = [f"{difference(results[0], r):.1e}" for r in results[1:]]
        if max(file.stat().st_size for file in files) <= options.large:
            times = latencies(files, feeds, options.seconds)
            ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
    except ModelError as error:
        apart = [str(error)[:60], ""]
    apart, ratios = [*apart, "-"][:2], [*ratios, "-"][:2]
    cells += [theirs[0], str(ours.nodes), f"{path.stat().st_size:,}", theirs[1]]
    cells += [f"{ours.nbytes:,}", f"{ours.auto:,}", theirs[2], f"{ours.seconds:.2f}"]
    return [*cells, apart[1], apart[0], ratios[1], ratios[0]]


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="tools/bench fold", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--peer-python", help="a Python that has onnxslim")
    parser.add_argument(
        "--peer-env", type=Path, help="folder of an environment for onnxslim"
    )
    parser.add_argument("--bytes", type=float, help="fold's option; 1 by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="of inference")
    parser.add_argument(
        "--large", type=int, default=300 << 20, help="bytes not to time beyond"
    )
    options = parser.parse_args(arguments)
    python = peer_python(options.peer_python, options.peer_env)
    table = Table(title="fold against onnxslim", caption=", ".join(PEER[:1]))
    columns = "model|nodes|slim|ours|bytes|slim|ours|ours, auto|slim s|ours s"
    for index, name in enumerate(columns.split("|")):
        table.add_column(name, justify="left" if index == 0 else "right")
    for name in ("slim diff", "our diff", "slim time", "our time"):
        table.add_column(name, justify="right")
    for path in options.models or wheel_models():
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*row(path, python, Path(folder), options))
    Console(width=190).print(table)
    if python is None:
        print("onnxslim was not measured: give --peer-python or --peer-env")
