"""Test error before and after recover: pruned, thinner and split models."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import runtime
from onnxshrink.base import Pass
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.passes.prune import Prune
from onnxshrink.passes.recover import Recover
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
PRUNING: Mapping[str, Mapping[str, str]] = {
    "magnitude": {"importance": "magnitude", "scope": "global"},
    "obs": {"importance": "obs", "scope": "global"},
}
COLUMNS = ("damage", "seed", "damaged %", "recover", "%", "seconds")


def main(arguments: Sequence[str]) -> None:
    """Print a table: each model damaged, then recovered in different ways."""
    parser = argparse.ArgumentParser(prog="recover", description=__doc__)
    parser.add_argument("--models", default="lenet-300-100,lenet-5,residual-cnn")
    parser.add_argument("--sparsities", default="0.8,0.9")
    parser.add_argument("--prune", default="magnitude,obs")
    parser.add_argument(
        "--damage",
        action="append",
        metavar="PASSES",
        help="pipeline text of another damage, such as student:keep=1,width=0.5; "
        "takes the place of pruning",
    )
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--seeds", default="0", help="of the choice of samples")
    parser.add_argument("--ridge", default=str(Recover.ridge))
    parser.add_argument("--order", default="sequential,parallel")
    parser.add_argument("--norms", default="no", help="no, yes or no,yes")
    parser.add_argument("--validation", action="store_true", help="not the test images")
    given = parser.parse_args(arguments)
    with np.load(MODELS / "mnist.npz") as data:
        train = data["train_x"]
        test, labels = data["test_x"], data["test_y"]
        if given.validation:
            # The last training images are never among the samples.
            test, labels = train[-10000:], data["train_y"][-10000:]
    what = "the last 10,000 training images" if given.validation else "test images"
    console = Console(width=110)
    for name in given.models.split(","):
        model = Model.load(MODELS / f"{name}.onnx")
        start = _error(model, test, labels)
        table = Table(
            title=f"{name}: {start:.2f} % errors on {what}; "
            f"{given.samples} samples, no labels"
        )
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for (label, passes), seed in product(
            _damages(given).items(), given.seeds.split(",")
        ):
            splits = _splits(train[:-10000], given.samples, int(seed))
            damaged = model
            for pass_ in passes:
                damaged = _applied(pass_, damaged, model, splits)
            before = _error(damaged, test, labels)
            for repair in _choices(given):
                begin = time.perf_counter()
                recovered = _applied(repair, damaged, model, splits)
                seconds = time.perf_counter() - begin
                how = f"{repair.order} ridge {repair.ridge:g}"
                table.add_row(
                    label,
                    seed,
                    f"{before:.2f}",
                    how + (" norms" if repair.norms else ""),
                    f"{_error(recovered, test, labels):.2f}",
                    f"{seconds:.1f}",
                )
        console.print(table)


def _damages(given: argparse.Namespace) -> dict[str, tuple[Pass, ...]]:
    if given.damage:
        return {text: Pipeline.parse(text).passes for text in given.damage}
    found: dict[str, tuple[Pass, ...]] = {}
    for sparsity, kind in product(given.sparsities.split(","), given.prune.split(",")):
        prune = Prune(sparsity=float(sparsity), **PRUNING[kind])  # type: ignore[arg-type]
        found[f"{sparsity} by {kind}"] = (prune,)
    return found


def _choices(given: argparse.Namespace) -> list[Recover]:
    return [
        Recover(
            samples=given.samples, ridge=float(ridge), order=order, norms=norms == "yes"
        )
        for order in given.order.split(",")
        for ridge in given.ridge.split(",")
        for norms in given.norms.split(",")
    ]


def _splits(train: np.ndarray, count: int, seed: int) -> Splits:
    chosen = np.random.default_rng(seed).permutation(len(train))[:count]
    images = train[chosen][:, None].astype(np.float32) / 255
    return Splits(calibration=Samples.from_arrays({"image": images}))


def _applied(pass_: Pass, model: Model, reference: Model, splits: Splits) -> Model:
    copy = model.copy()
    pass_.apply(copy, make_context(samples=splits, reference=reference))
    return copy


def _error(model: Model, images: np.ndarray, labels: np.ndarray) -> float:
    session = runtime.session(model)
    wrong = 0
    for at in range(0, len(images), 500):
        batch = images[at : at + 500, None].astype(np.float32) / 255
        logits = session.run({"image": batch})["logits"]
        wrong += int((logits.argmax(axis=1) != labels[at : at + 500]).sum())
    return 100 * wrong / len(images)
