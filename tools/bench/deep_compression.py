"""Deep Compression's table (Han, Mao and Dally 2016): LeNets against 39x and 40x.

Weights are pruned in steps, with training in between, then share values, and these are
trained too. Of all stages the smallest file is chosen whose error on 5,000 held out
training images is within a limit: Han's error, or .1 point more than the model came
with. Every byte of a file counts. Test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, runtime
from onnxshrink.engine import make_context
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits

Digits = tuple[np.ndarray, np.ndarray]
MODELS = Path(__file__).resolve().parent.parent.parent / "models"
HELD_OUT = 55_000
CALIBRATION = 2_048
BATCH = 500

PUBLISHED = {"lenet-300-100": (40, 1.58), "lenet-5": (39, 0.74)}
"""How many times smaller, and the error in percent: their table 1."""


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned and coded.

    Attributes:
        path: (share of zeros, epochs of training behind it).
        counts: Numbers of values that are tried at the ends.
        ends: From how many zeros on values are shared.
        epochs: Of training behind that.
        options: Of ``distill`` between the steps.
    """

    path: tuple[tuple[float, int], ...]
    counts: tuple[int, ...]
    ends: float
    epochs: int
    options: str


RECIPES = {
    "lenet-300-100": Recipe(
        ((0.8, 4), (0.88, 6), (0.93, 8), (0.955, 10), (0.97, 10)),
        (8, 4),
        0.95,
        5,
        "shift=1,lr=0.001",
    ),
    "lenet-5": Recipe(
        ((0.93, 2), (0.97, 3), (0.98, 4)),
        (8,),
        0.965,
        3,
        "shift=1,lr=0.001",
    ),
}
LAST = "shift=1,lr=0.002,batch=256"
"""Options of ``distill`` once values are shared."""


@dataclass(frozen=True)
class Stage:
    """One file and what it does.

    Attributes:
        text: How it was made.
        plain: Bytes of the file.
        package: Bytes of the package.
        held_out: Error in percent on the images that choose.
        test: Error in percent on the test images.
        path: Where it is.
    """

    text: str
    plain: int
    package: int
    held_out: float
    test: float
    path: str


def main(arguments: Sequence[str]) -> None:
    """Shrink the LeNets and print the table."""
    parser = argparse.ArgumentParser(prog="deep-compression", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/deep-compression"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    table = Table("model", "seed", "limit", "chosen", "error", "plain", "package")
    with np.load(MODELS / "mnist.npz") as data:
        digits = {name: data[name] for name in data.files}
    for name in options.models:
        for seed in range(options.seeds):
            for row in _rows(name, seed, options.folder, options.threads, digits):
                table.add_row(name, str(seed), *row)
    Console(width=120).print(table)


def _rows(
    name: str,
    seed: int,
    folder: Path,
    threads: int,
    digits: dict[str, np.ndarray],
) -> Sequence[tuple[str, ...]]:
    original = MODELS / f"{name}.onnx"
    size = original.stat().st_size
    model = Model.load(original)
    train = _images(digits["train_x"]), digits["train_y"].astype(np.int64)
    test = _images(digits["test_x"]), digits["test_y"].astype(np.int64)
    held = train[0][HELD_OUT:], train[1][HELD_OUT:]
    folder = folder / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    stages = _stages(model, name, seed, folder, threads, train, held)
    before = _error(model, *test, threads)
    _, their_error = PUBLISHED[name]
    limits = {
        f"Han's {their_error} %": their_error,
        "fp32 + .1 point": _error(model, *held, threads) + 0.1,
    }
    rows = [("", "as it came", f"{before:.2f} %", "1x", "")]
    for words, limit in limits.items():
        fits = [stage for stage in stages if stage.held_out <= limit + 1e-9]
        for what in ("plain", "package"):
            sizes = [stage for stage in fits if getattr(stage, what)]
            if not sizes:
                continue
            best = min(sizes, key=lambda stage: getattr(stage, what))
            error = _error(Model.load(best.path), *test, threads)
            ratio = f"{size / getattr(best, what):.1f}x, {getattr(best, what):,} B"
            columns = (ratio, "") if what == "plain" else ("", ratio)
            rows.append((words, best.text, f"{error:.2f} %", *columns))
    return rows


def _images(array: np.ndarray) -> np.ndarray:
    return (array.reshape(-1, 1, 28, 28) / np.float32(255)).astype(np.float32)


def _stages(
    model: Model,
    name: str,
    seed: int,
    folder: Path,
    threads: int,
    train: Digits,
    held: Digits,
) -> list[Stage]:
    """Run the recipe; what an earlier run of the same has left is used again."""
    recipe = RECIPES[name]
    (image,) = (info.name for info in model.inputs)
    reference = model.copy()

    def samples(images: np.ndarray, labels: np.ndarray) -> Samples:
        arrays = {image: images, "labels": labels}
        return Samples.from_arrays(arrays).bind(model.inputs)

    training = samples(train[0][:HELD_OUT], train[1][:HELD_OUT])
    splits = Splits(
        calibration=training.take(slice(0, CALIBRATION)),
        training=training,
        validation=samples(held[0], held[1]),
    )

    def applied(start: Model, text: str, path: Path) -> Model:
        if path.exists():
            return Model.load(path)
        copy = start.copy()
        began = time.process_time()
        for pass_ in Pipeline.parse(text).passes:
            ctx = make_context(splits, reference, seed=seed, threads=threads)
            pass_.apply(copy, ctx)
        copy.shorten_names()
        copy.save(path)
        print(f"{path.name}: {time.process_time() - began:.0f} CPU s", flush=True)
        return Model.load(path)

    def stage(made: Model, text: str, path: Path) -> Stage:
        note = path.with_suffix(".json")
        if note.exists():
            return Stage(**json.loads(note.read_text()))
        error = _error(made, held[0], held[1], threads)
        found = Stage(
            text, path.stat().st_size, _package(made, path), error, 0.0, str(path)
        )
        note.write_text(json.dumps(asdict(found)))
        print(f"{text}: {found.plain:,} B, {error:.2f} % held out", flush=True)
        return found

    stages = []
    now = applied(model, "fold", folder / "fold.onnx")
    for zeros, epochs in recipe.path:
        text = f"prune:sparsity={zeros},distill:epochs={epochs},{recipe.options}"
        path = folder / f"zeros-{zeros}.onnx"
        now = applied(now, text, path)
        stages.append(stage(now, f"{zeros:.1%} zeros", path))
        if zeros < recipe.ends:
            continue
        for count in recipe.counts:
            text = (
                f"codebook:values={count},codebook:values=16,also=biases,"
                f"distill:epochs={recipe.epochs},{LAST}"
            )
            path = folder / f"zeros-{zeros}-values-{count}.onnx"
            end = applied(now, text, path)
            stages.append(stage(end, f"{zeros:.1%} zeros, {count} values", path))
    return stages


def _package(model: Model, path: Path) -> int:
    """Return the bytes of a package of the model, with the coders of fewest bytes."""
    target = path.with_suffix(".onnxz")
    model.save(target, storage="tiny")
    return target.stat().st_size


def _error(model: Model, images: np.ndarray, labels: np.ndarray, threads: int) -> float:
    """Return the share of wrong answers in percent."""
    session = runtime.session(model, threads=threads)
    (image,) = (info.name for info in model.inputs)
    wrong = 0
    for start in range(0, len(images), BATCH):
        (scores,) = session.run({image: images[start : start + BATCH]}).values()
        wrong += int((scores.argmax(axis=1) != labels[start : start + BATCH]).sum())
    return 100 * wrong / len(images)
