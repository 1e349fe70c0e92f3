"""Hinton, Vinyals and Dean's MNIST experiment (2015, section 3), with this tool alone.

A net with two hidden layers of 1200 units, trained with dropout and images moved by up
to two pixels, teaches one of two layers of 800 that has neither. Three students: alone,
taught, and taught without ever seeing a 3, whose bias for that class is then raised.
The last 5,000 training images choose every epoch and that bias; test images only count.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, runtime
from onnxshrink.engine import make_context
from onnxshrink.passes.distill import Distill
from onnxshrink.samples import Samples, Splits
from onnxshrink.training import Adam, TrainingStep, cross_entropy
from onnxshrink.training.augment import crop

MNIST = Path(__file__).resolve().parent.parent.parent / "models" / "mnist.npz"
HELD_OUT = 55_000
BATCH = 256
UNSEEN = 3

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Digits:
    """Images float32 [count, 1, 28, 28] from 0 to 1, and their classes."""

    images: Array
    labels: Array

    def take(self, chosen: Any) -> Digits:
        """Return some of them."""
        return Digits(self.images[chosen], self.labels[chosen])

    def samples(self, model: Model) -> Samples:
        """Return them as a model's samples."""
        arrays = {"image": self.images, "labels": self.labels}
        return Samples.from_arrays(arrays).bind(model.inputs)


def main(arguments: Sequence[str]) -> None:
    """Train teacher and students, print test errors."""
    parser = argparse.ArgumentParser(prog="hinton", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=12, help="of a student")
    parser.add_argument("--temperature", type=float, default=20.0)
    parser.add_argument("--alpha", type=float, default=0.1, help="share of labels")
    parser.add_argument("--samples", type=int, default=HELD_OUT, help="to train on")
    parser.add_argument("--wide", type=int, default=1200)
    parser.add_argument("--narrow", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="file to keep the teacher in")
    given = parser.parse_args(arguments)
    with np.load(MNIST) as data:
        every = Digits(_images(data["train_x"]), data["train_y"])
        test = Digits(_images(data["test_x"]), data["test_y"])
    training, held = every.take(slice(given.samples)), every.take(slice(HELD_OUT, None))
    teacher = _teacher(given, training, held)
    print(f"teacher: {_errors(teacher, test)} test errors", flush=True)
    rows: dict[str, list[str]] = {}
    for seed in range(given.seeds):
        for way, words in _students(given, teacher, training, held, test, seed):
            print(f"seed {seed}, {way}: {words}", flush=True)
            rows.setdefault(way, []).append(words)
    table = Table(
        title=f"MNIST, errors in {len(test.labels):,} test images; teacher "
        f"{given.wide}-{given.wide}: {_errors(teacher, test)}"
    )
    table.add_column(f"student {given.narrow}-{given.narrow}")
    for seed in range(given.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for way, cells in rows.items():
        table.add_row(way, *cells)
    Console(width=110).print(table)


def network(hidden: int, seed: int, *, dropout: bool = False) -> Model:
    """Return 784-hidden-hidden-10 with ReLU, weights as in He et al. (2015).

    Args:
        hidden: Units of each hidden layer.
        seed: Of the weights.
        dropout: Drop a fifth of the pixels and half of the units, always.
    """
    random = np.random.default_rng(seed)
    nodes = [helper.make_node("Flatten", ["image"], ["h0"])]
    weights: list[TensorProto] = []
    sizes = [784, hidden, hidden, 10]
    if dropout:
        weights.append(numpy_helper.from_array(np.asarray(True), "always"))
    value = "h0"
    for layer, (ins, outs) in enumerate(itertools.pairwise(sizes), start=1):
        if dropout:
            ratio = np.asarray(0.2 if layer == 1 else 0.5, np.float32)
            weights.append(numpy_helper.from_array(ratio, f"ratio{layer}"))
            inputs = [value, f"ratio{layer}", "always"]
            nodes.append(helper.make_node("Dropout", inputs, [f"d{layer}"], seed=layer))
            value = f"d{layer}"
        matrix = random.normal(size=(ins, outs)) * math.sqrt(2 / ins)
        weights += [
            numpy_helper.from_array(matrix.astype(np.float32), f"w{layer}"),
            numpy_helper.from_array(np.zeros(outs, np.float32), f"b{layer}"),
        ]
        out = "logits" if layer == 3 else f"h{layer}"
        nodes.append(
            helper.make_node(
                "Gemm",
                [value, f"w{layer}", f"b{layer}"],
                [f"{out}_" if layer < 3 else out],
            )
        )
        if layer < 3:
            nodes.append(helper.make_node("Relu", [f"{out}_"], [out]))
        value = out
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    opset = helper.make_opsetid("", 17)
    return Model.load(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def _teacher(given: argparse.Namespace, training: Digits, held: Digits) -> Model:
    """Train the wide net with dropout and moved images, or read it."""
    if given.keep is not None and given.keep.exists():
        return Model.load(given.keep)
    model = network(given.wide, seed=100)
    names = [f"{kind}{layer}" for layer in (1, 2, 3) for kind in "wb"]
    step = TrainingStep(
        network(given.wide, seed=100, dropout=True),
        {"image": (BATCH, 1, 28, 28)},
        names,
        lambda ctx, values: cross_entropy(ctx, values["logits"], values["labels"]),
        targets={"labels": (np.int64, (BATCH,))},
        optimizer=Adam(),
        threads=given.threads,
    )
    random = np.random.default_rng(100)
    steps = len(training.labels) // BATCH
    total = steps * given.teacher_epochs
    best = len(held.labels) + 1
    begin = time.perf_counter()
    chosen = model
    for epoch in range(given.teacher_epochs):
        order = random.permutation(len(training.labels))
        for at in range(steps):
            batch = training.take(order[at * BATCH : (at + 1) * BATCH])
            moved = crop({"image": batch.images}, 2, random)
            done = (epoch * steps + at) / total
            rate = 2e-3 * min(1.0, done * 20) * (1 + math.cos(math.pi * done)) / 2
            step({**moved, "labels": batch.labels.astype(np.int64)}, rate)
        now = model.copy()
        step.store(now)
        wrong = _errors(now, held)
        print(
            f"teacher, epoch {epoch + 1}: {wrong} of {len(held.labels):,} held-out "
            f"images wrong, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        if wrong <= best:
            best, chosen = wrong, now
    if given.keep is not None:
        chosen.save(given.keep, storage="plain")
    return chosen


def _students(
    given: argparse.Namespace,
    teacher: Model,
    training: Digits,
    held: Digits,
    test: Digits,
    seed: int,
) -> list[tuple[str, str]]:
    """Return (what was trained, its test errors) of one seed."""

    def taught(alpha: float, seen: Digits) -> Model:
        student = network(given.narrow, seed)
        options = Distill(
            alpha=alpha,
            temperature=given.temperature,
            epochs=given.epochs,
            batch=BATCH,
            lr=2e-3,
        )
        # The validation samples must not show what the student shall never see.
        kinds = np.isin(held.labels, np.unique(seen.labels))
        splits = Splits(
            training=seen.samples(student),
            validation=held.take(kinds).samples(student),
        )
        ctx = make_context(
            samples=splits, reference=teacher, seed=seed, threads=given.threads
        )
        options.apply(student, ctx)
        return student

    rows = []
    alone = taught(1.0, training)
    rows.append(("alone", f"{_errors(alone, test)}"))
    both = taught(given.alpha, training)
    rows.append((f"taught at T = {given.temperature:g}", f"{_errors(both, test)}"))
    without = training.take(training.labels != UNSEEN)
    blind = taught(given.alpha, without)
    rows.append((f"taught, no {UNSEEN}", _with_unseen(blind, test)))
    _raise_bias(blind, held)
    rows.append((f"the same, bias of {UNSEEN} raised", _with_unseen(blind, test)))
    return rows


def _raise_bias(student: Model, held: Digits) -> None:
    """Raise the bias of the class never seen to what is best on held-out images."""
    logits = _logits(student, held.images)
    bias = student.weight("b3").read().copy()

    def wrong(more: float) -> int:
        moved = logits.copy()
        moved[:, UNSEEN] += more
        return int((moved.argmax(axis=1) != held.labels).sum())

    bias[UNSEEN] += min(np.arange(0, 20, 0.05), key=wrong)
    student.set_weight("b3", bias)


def _with_unseen(model: Model, test: Digits) -> str:
    threes = test.take(test.labels == UNSEEN)
    return f"{_errors(model, test)} ({_errors(model, threes)} of them {UNSEEN})"


def _images(array: Array) -> Array:
    return array[:, None].astype(np.float32) / 255


def _logits(model: Model, images: Array) -> Array:
    session = runtime.session(model)
    return np.concatenate(
        [
            session.run({"image": images[at : at + 500]})["logits"]
            for at in range(0, len(images), 500)
        ]
    )


def _errors(model: Model, digits: Digits) -> int:
    guesses = _logits(model, digits.images).argmax(axis=1)
    return int((guesses != digits.labels).sum())
