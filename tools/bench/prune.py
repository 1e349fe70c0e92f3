"""Test error, bytes and seconds of pruned models, against sparse_initializer."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink import runtime
from onnxshrink.base import Memory
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.passes.prune import Prune
from onnxshrink.samples import Samples, Splits

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
METHODS: dict[str, dict[str, str]] = {
    "magnitude local": {"importance": "magnitude", "scope": "local"},
    "magnitude global": {"importance": "magnitude", "scope": "global"},
    "wanda local": {"importance": "wanda", "scope": "local"},
    "wanda global": {"importance": "wanda", "scope": "global"},
    "obs local": {"importance": "obs", "scope": "local"},
    "obs global": {"importance": "obs", "scope": "global"},
}


def main(arguments: Sequence[str]) -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(prog="prune", description=__doc__)
    parser.add_argument("--models", default="lenet-300-100,lenet-5")
    parser.add_argument("--samples", type=int, default=2048, help="to calibrate with")
    parser.add_argument("--sparsities", default="0.5,0.75,0.9,0.95")
    parser.add_argument("--patterns", default="2:4,4:8")
    given = parser.parse_args(arguments)
    with np.load(MODELS / "mnist.npz") as data:
        chosen = np.random.default_rng(0).permutation(len(data["train_x"]))
        train = _images(data["train_x"][np.sort(chosen[: given.samples])])
        test, labels = _images(data["test_x"]), data["test_y"]
    for name in given.models.split(","):
        model = Model.load(MODELS / f"{name}.onnx")
        table = _table(model, name, given, train, test, labels)
        Console(width=110).print(table)


def _images(array: np.ndarray) -> np.ndarray:
    return array[:, None].astype(np.float32) / 255


def _table(
    model: Model,
    name: str,
    given: argparse.Namespace,
    train: np.ndarray,
    test: np.ndarray,
    labels: np.ndarray,
) -> Table:
    plain = len(model.to_bytes())
    start = _error(model, test, labels)
    table = Table(
        title=f"{name}: test error {start:.2f} %, {plain:,} bytes; "
        f"calibrated on {given.samples} training images"
    )
    for column in ("method", "zeros", "error %", "plan s", "prune s", "bytes"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_column("of plain", justify="right")
    table.add_column("of sparse_initializer", justify="right")
    splits = Splits(calibration=Samples.from_arrays({"image": train}))
    # Studies are shared, as they are while a run backs off; the first one pays.
    memory = Memory()
    choices: list[tuple[str, dict[str, object]]] = [
        (method, {**options, "sparsity": float(sparsity)})
        for method, options in METHODS.items()
        for sparsity in filter(None, given.sparsities.split(","))
    ]
    choices += [
        (f"{importance} {pattern}", {"importance": importance, "pattern": pattern})
        for pattern in filter(None, given.patterns.split(","))
        for importance in ("magnitude", "wanda", "obs")
    ]
    for method, options in choices:
        pass_ = Prune(**options)  # type: ignore[arg-type]
        context = make_context(samples=splits, reference=model, memory=memory)
        begin = time.perf_counter()
        sites = pass_.sites(model, context)
        planned = time.perf_counter()
        copy = model.copy()
        pass_.rewrite_all(copy, sites, context)
        end = time.perf_counter()
        size = _saved(copy)
        table.add_row(
            method,
            f"{_zeros(copy):.1%}",
            f"{_error(copy, test, labels):.2f}",
            f"{planned - begin:.2f}",
            f"{end - planned:.2f}",
            f"{size:,}",
            f"{size / plain:.3f}",
            f"{size / _sparse_bytes(copy):.3f}",
        )
    return table


def _error(model: Model, images: np.ndarray, labels: np.ndarray) -> float:
    session = runtime.session(model)
    wrong = 0
    for at in range(0, len(images), 500):
        logits = session.run({"image": images[at : at + 500]})["logits"]
        wrong += int((logits.argmax(axis=1) != labels[at : at + 500]).sum())
    return 100 * wrong / len(images)


def _zeros(model: Model) -> float:
    arrays = [weight.read() for weight in model.weights()]
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


def _saved(model: Model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = model.save(Path(folder) / "model.onnx")
        return sum(file.stat().st_size for file in files)


def _sparse_bytes(model: Model) -> int:
    """Bytes with every weight that gains by it as a sparse_initializer."""
    proto = model.to_proto()
    dense = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    for tensor in dense:
        array = numpy_helper.to_array(tensor)
        at = np.flatnonzero(array)
        sparse = onnx.SparseTensorProto(dims=tensor.dims)
        values = array.reshape(-1)[at]
        sparse.values.CopyFrom(numpy_helper.from_array(values, tensor.name))
        indices = numpy_helper.from_array(at.astype(np.int64), f"{tensor.name}_at")
        sparse.indices.CopyFrom(indices)
        if sparse.ByteSize() < tensor.ByteSize():
            proto.graph.sparse_initializer.append(sparse)
        else:
            proto.graph.initializer.append(tensor)
    return proto.ByteSize()
