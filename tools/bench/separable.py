"""Separable replacement: error, arithmetic and time after each step of the recipe.

``python tools/bench separable`` works on the residual CNN of ``models/``; with
``--model FILE --data FILE`` on any classifier of images whose data hold ``train_x``,
``train_y``, ``test_x`` and ``test_y`` ([samples, channels, height, width], 0 to 255).
Data with ``train_jpeg``, ``train_offsets`` and so on are decoded (needs Pillow).

Training images calibrate and train, some of them choose the best epoch; test images
only count, once for each row. Times are interleaved with the dense model's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, Pipeline, runtime
from onnxshrink.engine import make_context
from onnxshrink.measuring.measure import latencies
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure.shapes import macs_by_value

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
Array = np.ndarray[Any, Any]


def main(arguments: Sequence[str]) -> None:
    """Print a table with a row for each step and seed."""
    parser = argparse.ArgumentParser(prog="separable", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODELS / "residual-cnn.onnx")
    parser.add_argument("--data", type=Path, default=MODELS / "mnist.npz")
    parser.add_argument("--branches", type=int, default=1)
    parser.add_argument("--separable", help="passes that replace, with norm=add")
    parser.add_argument("--samples", type=int, default=0, help="to train on; 0: all")
    parser.add_argument("--held", type=float, default=0.1, help="share to choose by")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", default="flip=true,shift=2", help="of distill")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    train, test = _data(given.data)
    model = Model.load(given.model)
    name = model.inputs[0].name
    images = Samples.from_arrays(
        {name: _scaled(train[0], model), "labels": train[1]}
    ).bind(model.inputs)
    count = given.samples or len(train[1])
    steps = {
        "fold": "fold",
        "separable": given.separable or f"separable:norm=add,branches={given.branches}",
        "recover": "recover",
        "distill": f"distill:norms=estimate,epochs={given.epochs},{given.train}",
        "folded": "fold",
    }
    table = Table(
        title=f"{given.model}: {count:,} training images, {len(test[1]):,} test"
    )
    for head in (
        "seed",
        "bytes",
        "MACs",
        "k x k MACs",
        "time",
        "top-1 %",
        "s",
        "after",
    ):
        table.add_column(head, justify="right" if head != "after" else "left")
    x = _scaled(test[0], model)
    for seed in map(int, given.seeds.split(",")):
        chosen = np.random.default_rng(seed).permutation(len(train[1]))[:count]
        cut = round(count * (1 - given.held))
        splits = Splits(
            calibration=images.take(chosen[:512]),
            training=images.take(chosen[:cut]),
            validation=images.take(chosen[cut:]),
        )
        made = model.copy()
        dense = _kernel_macs(model, name, x[:1])
        for step, passes in {"": "", **steps}.items():
            begin = time.perf_counter()
            for pass_ in Pipeline.parse(passes):
                ctx = make_context(splits, model, seed=seed, threads=given.threads)
                made.require_opset(pass_.opset)
                pass_.apply(made, ctx)
            seconds = time.perf_counter() - begin
            total, kernels = _kernel_macs(made, name, x[:1])
            session = runtime.session(made, threads=1)
            base = runtime.session(model, threads=1)
            _, ratio = latencies(session, base, {name: x[:1]})
            top = _top1(session, name, x, test[1])
            row = (
                str(seed),
                f"{len(made.to_bytes('auto')):,}",
                f"{total / dense[0]:.3f}",
                f"{kernels / dense[1]:.3f}",
                f"{ratio:.3f}",
                f"{top:.2f}",
                f"{seconds:.0f}",
                step or "as it came",
            )
            table.add_row(*row)
            print(*row, sep="  ", flush=True)
    Console(width=110).print(table)


def _kernel_macs(model: Model, name: str, image: Array) -> tuple[int, int]:
    """Return multiply-accumulates of a run, and of its dense k x k convolutions.

    Stems do not count as these; a depthwise kernel and the 1x1 convolution that takes
    part in it do.
    """
    found = macs_by_value(model, {name: image})
    total = sum(count or 0 for count in found.values())
    kernels = 0
    for node in model.nodes():
        if node.op != "Conv":
            continue
        weight = model.constant(node.inputs[1])
        count = found.get(node.outputs[0].name) or 0
        if weight is None or weight.shape[1] * int(node.attrs.get("group", 1)) < 8:
            continue
        is_part = "/pointwise" in weight.name or "/depthwise" in weight.name
        if np.prod(weight.shape[2:]) > 1 or is_part:
            kernels += count
    return total, kernels


def _top1(session: runtime.Session, name: str, x: Array, labels: Array) -> float:
    hits = 0
    for at in range(0, len(labels), 250):
        (scores,) = session.run({name: x[at : at + 250]}).values()
        hits += int((scores.argmax(axis=1) == labels[at : at + 250]).sum())
    return 100 * hits / len(labels)


def _scaled(images: Array, model: Model) -> Array:
    rank = len(model.inputs[0].shape or ())
    images = images if images.ndim == rank else images[:, None]
    return images.astype(np.float32) / 255


def _data(path: Path) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    with np.load(path) as data:
        parts = []
        for part in ("train", "test"):
            if f"{part}_jpeg" in data:
                images = _decoded(data[f"{part}_jpeg"], data[f"{part}_offsets"])
            else:
                images = data[f"{part}_x"]
            parts.append((images, data[f"{part}_y"].astype(np.int64)))
    return parts[0], parts[1]


def _decoded(data: Array, offsets: Array) -> Array:
    from PIL import Image

    images = []
    for first, last in itertools.pairwise(offsets):
        image = Image.open(io.BytesIO(data[first:last].tobytes())).convert("RGB")
        images.append(np.asarray(image).transpose(2, 0, 1))
    return np.stack(images)
