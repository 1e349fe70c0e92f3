"""One-dimensional k-means: CPU seconds and distortion against scikit-learn's KMeans.

Distortion is the sum of squared distances to the nearest of the values; 1 is ours. The
best known is a dynamic program on 32,768 bins, or, for few distinct values, on the
values themselves. The peer is skipped where it would take minutes, and where it is not
installed: ``pip install scikit-learn``.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import Model
from onnxshrink.solvers import kmeans

Array = np.ndarray[Any, Any]
PEER_LIMIT = 1 << 19
"""Values up to which the peer is run."""


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="codebook", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="models/lenet-300-100.onnx")
    options = parser.parse_args(arguments)
    peer = _peer()
    table = Table(
        "values",
        "count",
        "k",
        "fit",
        "assign",
        "peer",
        "distortion of the peer",
        "bound",
    )
    for name, values, count in _cases(options.model):
        centroids, seconds = _timed(partial(kmeans.fit, values, count), options.repeats)
        _, more = _timed(partial(kmeans.assign, values, centroids), options.repeats)
        ours = kmeans.distortion(values, centroids)
        theirs, spent = "", ""
        if peer is not None and values.size <= PEER_LIMIT:
            found, took = _timed(partial(peer, values, count), 1)
            theirs = f"{found / ours:.4f}"
            spent = f"{took:.2f} s"
        table.add_row(
            name,
            f"{values.size:,}",
            str(count),
            f"{seconds:.3f} s",
            f"{more:.3f} s",
            spent,
            theirs,
            _bound(values, count, ours),
        )
    Console(width=110).print(table)
    if peer is None:
        print("scikit-learn is not installed: pip install scikit-learn")


def _cases(model: str) -> list[tuple[str, Array, int]]:
    rng = np.random.default_rng(0)
    weight = next(
        one.read() for one in Model.load(model).weights() if one.size > 1 << 16
    )
    big = rng.standard_normal(1 << 24).astype(np.float32)
    return [
        ("normal", big, 256),
        ("normal", big, 16),
        ("normal", big[:200_000], 256),
        ("normal", big[:200_000], 64),
        ("normal", big[:200_000], 16),
        ("Student t, 2", rng.standard_t(2, 200_000).astype(np.float32), 64),
        ("Laplace", rng.laplace(size=1 << 24).astype(np.float32), 256),
        ("Laplace", rng.laplace(size=200_000).astype(np.float32), 32),
        ("a LeNet's fc1", weight.reshape(-1), 16),
        ("800 repeated", np.repeat(big[:800], 200), 16),
    ]


def _bound(values: Array, count: int, ours: float) -> str:
    """Return our distortion over the least there is, or the least that is known."""
    few = np.unique(values)
    if len(few) <= 1000:
        return f"{ours / (_exact(few, count) * (values.size // len(few))):.6f}"
    finer = kmeans.fit(values, count, bins=1 << 15)
    return f"{ours / kmeans.distortion(values, finer):.5f}"


def _exact(values: Array, count: int) -> float:
    """Return the least distortion of sorted values, by all cuts."""
    x = values.astype(np.float64)
    first = np.concatenate([[0.0], np.cumsum(x)])
    second = np.concatenate([[0.0], np.cumsum(x * x)])
    ends = np.arange(1, len(x) + 1)
    error = second[1:] - first[1:] ** 2 / ends
    for _ in range(count - 1):
        before = np.concatenate([[0.0], error])
        error = np.array(
            [
                (
                    before[:end]
                    + second[end]
                    - second[:end]
                    - (first[end] - first[:end]) ** 2 / (end - np.arange(end))
                ).min()
                for end in ends
            ]
        )
    return float(error[-1])


def _timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return a result and the least CPU seconds it took."""
    best, result = np.inf, None
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        best = min(best, time.process_time() - start)
    return result, best


def _peer() -> Callable[[Array, int], float] | None:
    try:
        peer = importlib.import_module("sklearn.cluster").KMeans
    except ImportError:
        return None

    def run(values: Array, count: int) -> float:
        model = peer(count, n_init=1, random_state=0)
        model.fit(values.reshape(-1, 1).astype(np.float64))
        centers = np.sort(model.cluster_centers_.reshape(-1))
        return kmeans.distortion(values, centers)

    return run
