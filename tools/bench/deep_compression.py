"""Deep Compression's table (Han, Mao and Dally 2016): LeNets against 39x and 40x.

Weights are pruned in steps, with training in between, then share values, and these are
trained too. They are trained as the models were (``models/train.py``): on images moved,
turned and bent, with the answers of LeNet-5 beside the labels; both are made once. Of
all stages the smallest file is chosen whose error on 5,000 held out training images is
within a limit: Han's error, or .1 point more than the model came with. Every byte of a
file counts. Test images are looked at once, at the end.
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
from onnxshrink.training import teacher

Digits = tuple[np.ndarray, np.ndarray]
MODELS = Path(__file__).resolve().parent.parent.parent / "models"
HELD_OUT = 55_000
CALIBRATION = 2_048
BATCH = 500
COPIES = 4
"""Distorted copies of the training images, beside the images themselves."""

PUBLISHED = {"lenet-300-100": (40, 1.58), "lenet-5": (39, 0.74)}
"""How many times smaller, and the error in percent: their table 1."""

TAUGHT = "alpha=0.1,temperature=3,lr=0.002"


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned and coded.

    Attributes:
        path: (share of zeros, epochs of training behind it).
        ends: (share of zeros, epochs) at which values are shared, and of training
            behind that.
        count: How many values a weight then has.
        images: How many an epoch has, of all copies; 0 for all.
        batch: Images in a step.
    """

    path: tuple[tuple[float, int], ...]
    ends: tuple[tuple[float, int], ...]
    count: int
    images: int
    batch: int


RECIPES = {
    "lenet-300-100": Recipe(
        path=((0.85, 1), (0.92, 2), (0.935, 4), (0.95, 3), (0.965, 3)),
        ends=((0.935, 3), (0.95, 3), (0.965, 3)),
        count=8,
        images=0,
        batch=256,
    ),
    "lenet-5": Recipe(
        path=((0.95, 1), (0.985, 3)),
        ends=((0.985, 2),),
        count=8,
        images=25_000,
        batch=128,
    ),
}


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
    test = _images(digits["test_x"]), digits["test_y"].astype(np.int64)
    images, labels = digits["train_x"][HELD_OUT:], digits["train_y"][HELD_OUT:]
    held = _images(images), labels.astype(np.int64)
    _distort(digits, folder)
    stages = _stages(model, name, seed, folder, threads, held)
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


def _distort(digits: dict[str, np.ndarray], folder: Path) -> None:
    """Write training images, distorted copies, held out images, and LeNet-5's answers.

    Each image is turned, sheared, scaled, moved and bent by its own small amount
    (Simard, Steinkraus and Platt 2003), as ``models/train.py`` does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, answers = folder / "digits.npz", folder / "answers.npz"
    if answers.exists():
        return
    images, labels = digits["train_x"], digits["train_y"]
    random = np.random.default_rng(0)
    every = [images[:HELD_OUT]]
    for _ in range(COPIES):
        parts = [
            _bent(images[start : start + BATCH], random)
            for start in range(0, HELD_OUT, BATCH)
        ]
        every.append(np.concatenate(parts))
    names = [labels[:HELD_OUT]] * len(every)
    np.savez(
        data,
        x=np.concatenate([*every, images[HELD_OUT:]]),
        y=np.concatenate([*names, labels[HELD_OUT:]]),
    )
    big = Model.load(MODELS / "lenet-5.onnx")
    teacher.write(answers, big, _digits(folder).bind(big.inputs), threads=1)


def _digits(folder: Path) -> Samples:
    return Samples.from_path(f"{folder / 'digits.npz'}:image=x/255,labels=y")


def _bent(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return distorted images, uint8 [count, 28, 28]."""
    count, size = len(images), images.shape[-1]
    turn, shear, wide, high, right, down = (
        random.uniform(-1, 1, (6, count, 1, 1))
        * np.array([0.2, 0.2, 0.15, 0.15, 2, 2]).reshape(6, 1, 1, 1)
    ).astype(np.float32)
    smooth = _spline(6, size)
    bend = smooth @ random.normal(0, 0.7, (2, count, 6, 6)).astype(np.float32)
    bend = bend @ smooth.T
    at = np.arange(size, dtype=np.float32) - (size - 1) / 2
    across, along = at[None, None, :], at[None, :, None]
    x = (1 + wide) * np.cos(turn) * across + right + bend[0]
    x += (1 + high) * (shear - np.sin(turn)) * along
    y = (1 + wide) * np.sin(turn) * across + down + bend[1]
    y += (1 + high) * np.cos(turn) * along
    edge = 2
    ringed = np.pad(images, ((0, 0), (edge, edge), (edge, edge))).astype(np.float32)
    span = size + 2 * edge
    x, y = (np.clip(part + (span - 1) / 2, 0, span - 1.001) for part in (x, y))
    column, row = x.astype(np.int32), y.astype(np.int32)
    x, y = x - column, y - row
    first = np.arange(count, dtype=np.int32)[:, None, None] * span**2
    first = first + row * span + column
    flat = ringed.reshape(-1)
    upper = (1 - x) * flat[first] + x * flat[first + 1]
    lower = (1 - x) * flat[first + span] + x * flat[first + span + 1]
    grey: np.ndarray = np.rint((1 - y) * upper + y * lower).astype(np.uint8)
    return grey


def _spline(few: int, many: int) -> np.ndarray:
    """Return the matrix [many, few] of bicubic interpolation (Keys 1981, a = -3/4)."""
    at = (np.arange(many) + 0.5) * few / many - 0.5
    base = np.floor(at).astype(np.int64)
    matrix = np.zeros((many, few), np.float32)
    for step in range(-1, 3):
        far = np.abs(at - base - step)
        near = 1.25 * far**3 - 2.25 * far**2 + 1
        rest = -0.75 * far**3 + 3.75 * far**2 - 6 * far + 3
        place = np.clip(base + step, 0, few - 1)
        np.add.at(matrix, (np.arange(many), place), np.where(far <= 1, near, rest))
    return matrix


def _stages(
    model: Model, name: str, seed: int, folder: Path, threads: int, held: Digits
) -> list[Stage]:
    """Run the recipe; what an earlier run of the same has left is used again."""
    recipe = RECIPES[name]
    reference = model.copy()
    samples = _digits(folder).bind(model.inputs)
    count = (1 + COPIES) * HELD_OUT
    chosen = np.arange(count)
    if recipe.images:
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(count)[: recipe.images])
    splits = Splits(
        calibration=samples.take(slice(0, CALIBRATION)),
        training=samples.take(chosen),
        validation=samples.take(slice(count, None)),
    )
    answers = str(folder / "answers.npz").replace("%", "%25").replace(" ", "%20")
    distill = f"distill:teacher={answers},{TAUGHT},batch={recipe.batch}"
    folder = folder / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)

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
        path = folder / f"zeros-{zeros}.onnx"
        text = f"prune:sparsity={zeros},{distill},epochs={epochs}"
        now = applied(now, text, path)
        stages.append(stage(now, f"{zeros:.2%} zeros", path))
        for _, some in (end for end in recipe.ends if end[0] == zeros):
            shared = f"codebook:values={recipe.count},codebook:values=16,also=biases"
            path = folder / f"zeros-{zeros}-shared.onnx"
            text = f"{shared},{distill},epochs={some},reassign=true"
            end = applied(now, text, path)
            words = f"{zeros:.2%} zeros, {recipe.count} values"
            stages.append(stage(end, words, path))
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
