"""Bytes, load time, load memory and latency of encoded weights against plain ones.

Weights of a model (or of a generated convolutional network) are pruned to several
shares of zeros, with fp32 values or 16 distinct ones, and written three ways: plain, as
``sparse_initializer`` with int64 indices (what a naive tool writes), and by
``Model.save``. Each file is loaded by onnxruntime in processes of their own, several
times in turn; latencies are CPU time of runs in turn in one process. Ratios are of the
smallest figure of each, to the plain file of the same values.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.storage import Encoder

Array = np.ndarray[Any, Any]
ZEROS = (0.0, 0.5, 0.75, 0.9, 0.95)
_SMALLEST = 1000


def network() -> onnx.ModelProto:
    """Return a convolutional network of 6.9 million weights, drawn at random."""
    draw = np.random.default_rng(0)
    widths = (3, 64, 128, 256, 512, 512)
    nodes, tensors, value = [], [], "x"

    def weight(name: str, *shape: int) -> str:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        array = (draw.standard_normal(shape) * scale).astype(np.float32)
        tensors.append(numpy_helper.from_array(array, name))
        return name

    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        kernel = weight(f"conv{layer}.weight", fan_out, fan_in, 3, 3)
        nodes.append(
            helper.make_node(
                "Conv", [value, kernel], [f"c{layer}"], pads=[1] * 4, strides=[2, 2]
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        value = f"r{layer}"
    nodes.append(helper.make_node("Flatten", [value], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", weight("fc.weight", 4608, 640)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 96, 96])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 640])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def pruned(model: Model, zeros: float, codes: int) -> Model:
    """Return a copy whose large weights have so many zeros and distinct values."""
    twin = model.copy()
    for weight in list(twin.weights()):
        if weight.dtype != np.float32 or weight.size < _SMALLEST:
            continue
        array = weight.read()
        limit = np.quantile(np.abs(array), zeros) if zeros else -1.0
        kept = np.abs(array) > limit
        if codes:
            marks = np.quantile(array[kept], (np.arange(codes) + 0.5) / codes)
            edges = (marks[1:] + marks[:-1]) / 2
            array = marks.astype(np.float32)[np.searchsorted(edges, array)]
        twin.set_weight(weight, np.where(kept, array, np.float32(0)))
    return twin


def naive(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every sparse weight as a ``sparse_initializer``."""
    sparse = onnx.ModelProto()
    sparse.CopyFrom(proto)
    del sparse.graph.initializer[:]
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        places = np.flatnonzero(array)
        if array.dtype != np.float32 or 3 * places.size >= array.size:
            sparse.graph.initializer.append(tensor)
            continue
        found = sparse.graph.sparse_initializer.add(dims=array.shape)
        values = array.reshape(-1)[places]
        found.values.CopyFrom(numpy_helper.from_array(values, tensor.name))
        found.indices.CopyFrom(numpy_helper.from_array(places))
    return sparse


def latencies(model: Model, paths: Sequence[Path], seconds: float) -> list[float]:
    """Return the least CPU time of one inference for each file, run in turn."""
    feeds = next(iter(Samples.random_for(model, count=1).batches(1)))
    sessions = [runtime.session(path, threads=1) for path in paths]
    times: list[list[float]] = [[] for _ in paths]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times[0]) < 5:
        for session, taken in zip(sessions, times, strict=True):
            start = time.process_time()
            session.run(feeds)
            taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


def costs(paths: Sequence[Path], rounds: int) -> list[tuple[float, float]]:
    """Return least load seconds and peak bytes for each file, loaded in turn."""
    found: list[list[runtime.LoadCost]] = [[] for _ in paths]
    for _ in range(rounds):
        for path, seen in zip(paths, found, strict=True):
            cost = runtime.load_cost(path, threads=1)
            if cost is not None:
                seen.append(cost)
    return [
        (
            min(cost.seconds for cost in seen),
            min(cost.peak_memory_bytes for cost in seen),
        )
        for seen in found
    ]


def forms(model: Model) -> str:
    """Return the form that takes most of the weights."""
    encoder = Encoder(opset=model.opset, fresh=lambda name: name)
    sizes: dict[str, int] = {}
    for weight in model.weights():
        if weight.node is None:
            found = encoder.encode(weight.name, weight.tensor)
            kind = "plain" if found is None else found.kind
            sizes[kind] = sizes.get(kind, 0) + weight.nbytes
    return max(sizes, key=lambda kind: sizes[kind])


def rows(
    model: Model, folder: Path, rounds: int, seconds: float
) -> Iterator[list[str]]:
    """Yield the cells of the table."""
    parameters = sum(weight.size for weight in model.weights())
    for zeros in ZEROS:
        for codes in (0, 16):
            twin = pruned(model, zeros, codes)
            names = ("plain.onnx", "naive.onnx", "encoded.onnx")
            plain, other, ours = (folder / name for name in names)
            twin.save(plain, storage="plain", external="never")
            twin.save(ours, storage="auto", external="never")
            onnx.save(naive(onnx.load(plain)), other)
            is_sparse = other.stat().st_size < plain.stat().st_size
            paths = [plain, ours, other] if is_sparse else [plain, ours]
            loads = costs(paths, rounds)
            runs = latencies(twin, paths, seconds)

            def share(bytes_: int, parameters: int = parameters) -> str:
                return f"{bytes_ / parameters:.3f}"

            def ratios(values: Sequence[float]) -> list[str]:
                cells = [f"{value / values[0]:.2f}" for value in values[1:]]
                return [*cells, "-"][:2]

            yield [
                f"{zeros:.0%}",
                f"{codes} codes" if codes else "fp32",
                forms(twin),
                share(other.stat().st_size) if is_sparse else "-",
                share(ours.stat().st_size),
                *ratios([load[0] for load in loads]),
                *ratios([load[1] for load in loads]),
                *ratios(runs),
            ]
            for path in (plain, other, ours):
                path.unlink()


def main(arguments: Sequence[str]) -> None:
    """Print a table for each model named, or for a generated network."""
    parser = argparse.ArgumentParser(prog="tools/bench storage", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="loads of each file")
    parser.add_argument("--seconds", type=float, default=2.0, help="of inference")
    options = parser.parse_args(arguments)
    for path in options.models or [None]:
        model = Model.load(network() if path is None else path)
        parameters = sum(weight.size for weight in model.weights())
        label = "generated network" if path is None else path.name
        table = Table(title=f"{label}, {parameters:,} weights")
        columns = "zeros|values|form|sparse B/w|B/w|load|(sparse)|peak|(sparse)"
        for column in f"{columns}|latency|(sparse)".split("|"):
            table.add_column(column, justify="right")
        with tempfile.TemporaryDirectory() as folder:
            for cells in rows(model, Path(folder), options.rounds, options.seconds):
                table.add_row(*cells)
        Console(width=120).print(table)
