"""Damage and what repairs it: test errors of models by pass, over several seeds.

Every damage is followed by least squares alone, by distillation without and with
labels, by labels alone, and by least squares before distillation. Training images are
drawn from the first 55,000 by seed, some after them choose the best epoch, test images
only count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, Pipeline, runtime
from onnxshrink.engine import make_context
from onnxshrink.samples import Samples, Splits

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
HELD_OUT = 55_000
DAMAGES = (
    "prune:sparsity=0.5,importance=magnitude",
    "prune:sparsity=0.75,importance=magnitude",
    "quantize:activations=none,weights=int8,granularity=channel",
    "quantize:activations=none,weights=int4,granularity=channel",
)

Array = np.ndarray[Any, Any]


def main(arguments: Sequence[str]) -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(prog="repair", description=__doc__)
    parser.add_argument("--models", default="residual-cnn,vit")
    parser.add_argument("--damage", action="append", help="passes; may be repeated")
    parser.add_argument("--samples", type=int, default=3_000, help="to train on")
    parser.add_argument("--held", type=int, default=1_500, help="to choose by")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.5, help="share of labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    with np.load(MODELS / "mnist.npz") as data:
        train = {"image": _images(data["train_x"]), "labels": data["train_y"]}
        test = {"image": _images(data["test_x"]), "labels": data["test_y"]}
    for name in given.models.split(","):
        Console(width=120).print(_table(name, train, test, given))


def _remedies(given: argparse.Namespace) -> dict[str, str]:
    """Return passes by what they are called; each starts from the damaged model."""
    train = f"distill:epochs={given.epochs},batch={given.batch}"
    labels = f"{train},alpha={given.alpha:g}"
    return {
        "nothing": "",
        "least squares": "recover",
        "distilled, no labels": f"{train},alpha=0",
        "distilled, with labels": labels,
        "labels only": f"{train},alpha=1",
        "least squares, then distilled with labels": f"recover,{labels}",
    }


def _table(
    name: str,
    train: dict[str, Array],
    test: dict[str, Array],
    given: argparse.Namespace,
) -> Table:
    model = Model.load(MODELS / f"{name}.onnx")
    damages = given.damage or list(DAMAGES)
    remedies = _remedies(given)
    start = _errors(model, test)
    table = Table(
        title=f"{name}: {start} errors in {len(test['labels']):,} test images; mean of "
        f"{given.seeds} seeds; {given.samples:,} training images, {given.epochs} epochs"
    )
    table.add_column("")
    for damage in damages:
        table.add_column(damage, justify="right")
    cells: dict[str, list[str]] = {way: [] for way in remedies}
    samples = Samples.from_arrays(train).bind(model.inputs)
    for damage in damages:
        counts: dict[str, list[int]] = {way: [] for way in remedies}
        for seed in range(given.seeds):
            chosen = np.random.default_rng(seed).permutation(HELD_OUT)[: given.samples]
            training = samples.take(chosen)
            splits = Splits(
                calibration=training.take(slice(0, 1024)),
                training=training,
                validation=samples.take(slice(HELD_OUT, HELD_OUT + given.held)),
            )
            damaged = _after(model, damage, model, splits, seed, given.threads)
            for way, passes in remedies.items():
                begin = time.perf_counter()
                mended = _after(damaged, passes, model, splits, seed, given.threads)
                counts[way].append(_errors(mended, test))
                print(
                    f"{name}, {damage}, seed {seed}, {way}: {counts[way][-1]} errors, "
                    f"{time.perf_counter() - begin:.0f} s",
                    flush=True,
                )
        for way, found in counts.items():
            percent = 100 * np.mean(found) / len(test["labels"])
            cells[way].append(f"{percent:.2f} % ({' '.join(map(str, found))})")
    for way, row in cells.items():
        table.add_row(way, *row)
    return table


def _after(
    model: Model, passes: str, teacher: Model, splits: Splits, seed: int, threads: int
) -> Model:
    """Return a copy with passes applied, one after the other, and nothing judged."""
    copy = model.copy()
    for step in Pipeline.parse(passes):
        ctx = make_context(
            samples=splits, reference=teacher, seed=seed, threads=threads
        )
        copy.require_opset(step.opset)
        step.apply(copy, ctx)
    return copy


def _images(array: Array) -> Array:
    return array[:, None].astype(np.float32) / 255


def _errors(model: Model, data: dict[str, Array]) -> int:
    session = runtime.session(model)
    wrong = 0
    for at in range(0, len(data["labels"]), 500):
        logits = session.run({"image": data["image"][at : at + 500]})["logits"]
        wrong += int((logits.argmax(axis=1) != data["labels"][at : at + 500]).sum())
    return wrong
