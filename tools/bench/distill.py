"""Test error of pruned models before and after distillation, over several seeds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.passes.distill import Distill
from onnxshrink.passes.prune import Prune
from onnxshrink.samples import Samples, Splits

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
HELD_OUT = 55000
"""Training images from here on were seen by no model; they choose the best epoch."""


def main(arguments: Sequence[str]) -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(prog="distill", description=__doc__)
    parser.add_argument("--models", default="lenet-300-100,lenet-5")
    parser.add_argument("--sparsity", type=float, default=0.92)
    parser.add_argument("--importance", default="auto", help="of prune")
    parser.add_argument("--samples", type=int, default=HELD_OUT, help="to train on")
    parser.add_argument("--alphas", default="0,0.5,1", help="shares of the labels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--shift", type=int, default=0, help="pixels images move")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args(arguments)
    for name in given.models.split(","):
        Console(width=110).print(_table(name, given))


def _images(array: np.ndarray) -> np.ndarray:
    return array[:, None].astype(np.float32) / 255


def _table(name: str, given: argparse.Namespace) -> Table:
    model = Model.load(MODELS / f"{name}.onnx")
    with np.load(MODELS / "mnist.npz") as data:
        train, known = _images(data["train_x"]), data["train_y"]
        test, labels = _images(data["test_x"]), data["test_y"]
    data_all = Samples.from_arrays({"image": train, "labels": known})
    data_all = data_all.bind(model.inputs)
    start = _errors(model, test, labels)
    ways = {_words(alpha): alpha for alpha in map(float, given.alphas.split(","))}
    rows: dict[str, list[int]] = {"pruned": [], **{way: [] for way in ways}}
    held: dict[str, list[int]] = {key: [] for key in rows}
    seconds: dict[str, list[float]] = {key: [] for key in rows}
    for seed in range(given.seeds):
        chosen = np.random.default_rng(seed).permutation(HELD_OUT)[: given.samples]
        training = data_all.take(chosen)
        splits = Splits(
            calibration=training.take(slice(0, 2048)),
            training=training,
            validation=data_all.take(slice(HELD_OUT, None)),
        )

        def context(splits: Splits = splits, seed: int = seed) -> Context:
            return make_context(
                samples=splits, reference=model, seed=seed, threads=given.threads
            )

        pruned = model.copy()
        begin = time.perf_counter()
        Prune(sparsity=given.sparsity, importance=given.importance).apply(
            pruned, context()
        )
        seconds["pruned"].append(time.perf_counter() - begin)
        candidates = {"pruned": pruned}
        for way, alpha in ways.items():
            student, now = pruned.copy(), context()
            begin = time.perf_counter()
            Distill(
                alpha=alpha,
                epochs=given.epochs,
                batch=given.batch,
                shift=given.shift,
                temperature=given.temperature,
            ).apply(student, now)
            seconds[way].append(time.perf_counter() - begin)
            candidates[way] = student
            said = "; ".join(what for _, what in [*now.done, *now.skips])
            print(f"{name}, seed {seed}, {way}: {said}", flush=True)
        for way, candidate in candidates.items():
            rows[way].append(_errors(candidate, test, labels))
            held[way].append(_errors(candidate, train[HELD_OUT:], known[HELD_OUT:]))
    table = Table(
        title=f"{name}: {start} errors in {len(test):,} test images; "
        f"{given.sparsity:.0%} zeros; {given.samples:,} training images, "
        f"{given.epochs} epochs, shift {given.shift}"
    )
    for column in ("", "test errors by seed", "mean %", "from fp32", "held-out errors"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("s", justify="right")
    for way, counts in rows.items():
        percent = 100 * float(np.mean(counts)) / len(test)
        table.add_row(
            way,
            " ".join(map(str, counts)),
            f"{percent:.2f}",
            f"{percent - 100 * start / len(test):+.2f}",
            " ".join(map(str, held[way])),
            f"{np.mean(seconds[way]):.0f}",
        )
    return table


def _words(alpha: float) -> str:
    return {0.0: "no labels", 1.0: "labels only"}.get(alpha, f"both, alpha={alpha:g}")


def _errors(model: Model, images: np.ndarray, labels: np.ndarray) -> int:
    session = runtime.session(model)
    wrong = 0
    for at in range(0, len(images), 500):
        logits = session.run({"image": images[at : at + 500]})["logits"]
        wrong += int((logits.argmax(axis=1) != labels[at : at + 500]).sum())
    return wrong
