"""Structured pruning: coverage, speed and accuracy after channels were removed.

    python tools/bench channels images --model cifar.onnx --data cifar10.npz

``images`` prints top-1, arithmetic and time after each pass of ``--passes``, for a
classifier of images; data hold ``train_x``, ``train_y``, ``test_x`` and ``test_y``
([samples, channels, height, width], 0 to 255). Training images calibrate and train,
some of them choose the best epoch; test images only count, once for each row. Times
are interleaved with those of the model as it came.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, Pipeline, runtime
from onnxshrink.engine import make_context
from onnxshrink.measuring.measure import latencies
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure.shapes import macs

Array = NDArray[Any]
MODELS = Path(__file__).resolve().parent.parent.parent / "models"


def main(arguments: Sequence[str]) -> None:
    """Measure one of several things."""
    parser = argparse.ArgumentParser(prog="channels", description=__doc__)
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--passes", default="fold,channels:macs=0.5,recover,distill")
    parser.add_argument("--train", type=int, default=0, help="images; 0: all")
    parser.add_argument("--test", type=int, default=0, help="images; 0: all")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the last model is written")
    given = parser.parse_args(arguments)
    WHAT[given.what](given)


# --- images ---------------------------------------------------------------------------


def _images(given: argparse.Namespace) -> None:
    path = given.model or MODELS / "residual-cnn.onnx"
    model = Model.load(path)
    with np.load(given.data or MODELS / "mnist.npz") as data:
        train, labels = data["train_x"], data["train_y"].astype(np.int64)
        test, wanted = data["test_x"], data["test_y"].astype(np.int64)
    if given.test:
        test, wanted = test[: given.test], wanted[: given.test]
    count = given.train or len(train)
    x = _scaled(test, model)
    name = model.inputs[0].name
    table = Table(title=f"{path.parent.name}/{path.name}: {count:,} images to train on")
    heads = ("seed", "bytes", "MACs", "time", "top-1 %", "s", "after")
    for head in heads:
        table.add_column(head, justify="left" if head == "after" else "right")
    base = runtime.session(model, threads=1)
    dense = macs(model, {name: x[:1]})
    for seed in map(int, given.seeds.split(",")):
        chosen = np.random.default_rng(seed).permutation(len(train))[:count]
        cut = max(round(count * 0.9), count - 1000)
        images = Samples.from_arrays(
            {name: _scaled(train, model), "labels": labels}
        ).bind(model.inputs)
        splits = Splits(
            calibration=images.take(chosen[: given.calibration]),
            training=images.take(chosen[:cut]),
            validation=images.take(chosen[cut:]),
        )
        made = model.copy()
        for pass_ in (None, *Pipeline.parse(given.passes)):
            begin = time.perf_counter()
            if pass_ is not None:
                ctx = make_context(splits, model, seed=seed, threads=given.threads)
                made.require_opset(pass_.opset)
                pass_.apply(made, ctx)
            seconds = time.perf_counter() - begin
            session = runtime.session(made, threads=1)
            _, ratio = latencies(session, base, {name: x[:1]})
            left = macs(made, {name: x[:1]})
            row = (
                str(seed),
                f"{len(made.to_bytes('plain')):,}",
                f"{(left or 0) / (dense or 1):.3f}",
                f"{ratio:.2f}",
                f"{_top1(session, name, x, wanted):.2f}",
                f"{seconds:.0f}",
                "as it came" if pass_ is None else pass_.name,
            )
            table.add_row(*row)
            print(*row, sep="  ", flush=True)
        if given.output:
            made.save(given.output)
    Console(width=110).print(table)


def _scaled(images: Array, model: Model) -> Array:
    rank = len(model.inputs[0].shape or ())
    images = images if images.ndim == rank else images[:, None]
    return images.astype(np.float32) / 255


def _top1(session: runtime.Session, name: str, x: Array, labels: Array) -> float:
    hits = 0
    for at in range(0, len(labels), 250):
        (scores,) = session.run({name: x[at : at + 250]}).values()
        hits += int((scores.argmax(axis=1) == labels[at : at + 250]).sum())
    return 100 * hits / len(labels)


WHAT = {"images": _images}
