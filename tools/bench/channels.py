"""Structured pruning: coverage, speed and accuracy after channels were removed.

    python tools/bench exports FOLDER
    python tools/bench channels coverage --folder FOLDER --also magika.onnx
    python tools/bench channels decoder
    python tools/bench channels pipelines --model minilm.onnx --data stsb.npz --passes
         "fold,channels:latency=0.5;fold,channels:macs=0.5"
    python tools/bench channels images --model cifar.onnx --data cifar10.npz

``coverage`` removes 30 % of the channels of every group, and compares: outputs with
those of masks of zeros where groups are exact (``moved``: what the masks change), bytes
with those expected. It reads the
exports, ``models/`` and the light models of the onnx package, with random weights.
``prunable`` is the share of parameters in weights that can get smaller, ``of
free`` the same without those that the signature holds. ``decoder`` times the analysis
of a decoder of 6,000 nodes. ``pipelines`` calibrates on few samples and measures on
others how alike the answers are: the same top class of images (``x`` uint8 [n, height,
width, channels]), or the cosine of embeddings (``ids1``, ``ids2``).

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
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink import Model, Pipeline, runtime
from onnxshrink.engine import make_context
from onnxshrink.measuring.measure import latencies
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure import channels, layers
from onnxshrink.structure.shapes import macs

Array = NDArray[Any]
ONES = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
MODELS = Path(__file__).resolve().parent.parent.parent / "models"


def main(arguments: Sequence[str]) -> None:
    """Measure one of several things."""
    parser = argparse.ArgumentParser(prog="channels", description=__doc__)
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--passes", default="fold,channels:macs=0.5,recover,distill")
    parser.add_argument("--folder", type=Path, help="of exports")
    parser.add_argument("--also", action="append", default=[], help="another model")
    parser.add_argument("--only", default="", help="parts of names of models")
    parser.add_argument("--train", type=int, default=0, help="images; 0: all")
    parser.add_argument("--test", type=int, default=0, help="images; 0: all")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the last model is written")
    given = parser.parse_args(arguments)
    WHAT[given.what](given)


# --- coverage -------------------------------------------------------------------------


def _coverage(given: argparse.Namespace) -> None:
    paths = sorted(given.folder.glob("*.onnx")) if given.folder else []
    paths += [Path(p) for p in given.also]
    paths += sorted(MODELS.glob("*.onnx"))
    light = Path(onnx.__file__).parent / "backend/test/data/light"
    paths += sorted(light.glob("*.onnx"))
    table = Table(title="30 % of the channels removed, counts in single channels")
    heads = (
        "model",
        "parameters",
        "prunable",
        "of free",
        "groups",
        "inexact",
        "error",
        "moved",
        "bytes",
        "expected",
        "s",
        "what stops most of the rest",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == heads[-1] else "right")
    for path in paths:
        name = path.stem if path.stem != "model" else path.parent.name
        if given.only and not any(part in name for part in given.only.split(",")):
            continue
        try:
            row = _covered(_written_out(path))
        except Exception as error:  # a row that failed is a finding, the rest goes on
            row = [""] * 10 + [f"FAILED: {error}"[:160]]
        table.add_row(name, *row)
        print(name, *row, sep="  ", flush=True)
    Console(width=200).print(table)


def _written_out(path: Path) -> Model:
    """Load a model; weights that ConstantOfShape makes get random values."""
    proto = onnx.load(path, load_external_data=False)
    if not any(node.op_type == "ConstantOfShape" for node in proto.graph.node):
        return Model.load(path)
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    rng = np.random.default_rng(0)
    kept = []
    for node in proto.graph.node:
        shape = known.get(node.input[0]) if node.input else None
        if node.op_type != "ConstantOfShape" or shape is None:
            kept.append(node)
            continue
        sizes = numpy_helper.to_array(shape).tolist()
        values = rng.random(sizes, np.float32) + np.float32(0.5)
        if len(sizes) > 1:
            values = rng.standard_normal(sizes, np.float32)
            values *= np.float32(np.sqrt(2 / np.prod(sizes[1:])))
        proto.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return Model.load(proto)


def _covered(model: Model) -> list[str]:
    """Remove 30 % of the channels of every group; compare with masks of zeros."""
    splits = Splits.build(model, seed=0)
    samples = splits.calibration
    assert samples is not None
    feed = samples.read(np.arange(samples.batch or 1))
    ctx = make_context(splits, model.copy(), threads=1)
    for pass_ in Pipeline.parse("fold"):
        model.require_opset(pass_.opset)
        pass_.apply(model, ctx)
    start = time.process_time()
    groups = channels.find(model)
    seconds = time.process_time() - start
    total, prunable, bound, stops = _stopped(model, groups)
    free = [g for g in groups if not g.why and _is_made(g)]
    gone = {g.name: max(1, round(0.3 * g.size)) for g in free}
    session = runtime.session(model, threads=1)
    outputs = session.run(feed)

    masked, cut = model.copy(), model.copy()
    exact = []
    for group in channels.find(masked):
        if group.name in gone and not group.inexact:
            exact.append(group.name)
            for part in group.where:
                if part.role == "consumer":
                    values = part.weight.read().copy()
                    places = part.offsets[: gone[group.name]].ravel()
                    np.moveaxis(values, part.axis, 0)[places] = 0
                    masked.set_weight(part.weight, values)
    if exact:
        channels.remove_all(
            cut,
            [
                (g, range(gone[g.name], g.size))
                for g in channels.find(cut)
                if g.name in exact
            ],
        )
    wanted = runtime.session(masked, threads=1).run(feed)
    found = runtime.session(cut, threads=1).run(feed)
    error = moved = 0.0
    for key, value in wanted.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            whole = max(float(np.abs(value).max()), 1e-30)
            gaps = [
                float(np.abs(value.astype(np.float64) - other[key]).max()) / whole
                for other in (found, outputs)
            ]
            error, moved = max(error, gaps[0]), max(moved, gaps[1])

    before = _nbytes(model)
    pass_ = Pipeline.parse("channels:keep=0.7,round_to=1").passes[0]
    sites = pass_.sites(model, ctx)  # type: ignore[attr-defined]
    gone_bytes = _expected(sites, groups)
    pass_.rewrite_all(model, sites, ctx)  # type: ignore[attr-defined]
    after = runtime.session(model, threads=1).run(feed)
    for key, value in outputs.items():
        assert np.shape(after[key]) == np.shape(value), f"{key} has another shape"
    most = max(stops.items(), key=lambda one: one[1], default=("", 0))
    return [
        f"{total:,}",
        f"{prunable / total:.3f}",
        f"{prunable / max(1, total - bound):.3f}",
        str(len(free)),
        str(sum(bool(g.inexact) for g in free)),
        f"{error:.1e}",
        f"{moved:.1e}",
        f"{_nbytes(model) / before:.4f}",
        f"{1 - gone_bytes / before:.4f}",
        f"{seconds:.2f}",
        f"{most[1] / total:.3f} {most[0]}" if most[0] else "",
    ]


def _is_made(group: channels.Group) -> bool:
    return any(part.role == "producer" for part in group.where)


def _nbytes(model: Model) -> int:
    return sum(w.nbytes for w in model.weights() if layers.is_float(w))


def _expected(sites: Sequence[Any], groups: Sequence[channels.Group]) -> float:
    """Return the bytes that should go: each weight, less what stays along its axes."""
    kept = {site.where: site for site in sites}
    shares: dict[int, dict[int, float]] = {}
    sizes: dict[int, int] = {}
    for group in groups:
        site = kept.get(group.name)
        if site is None:
            continue
        seen: set[tuple[int, int]] = set()
        for part in group.where:
            key = id(part.weight.constant)
            if (key, part.axis) in seen:
                continue  # it makes the channels at one node and reads them at another
            seen.add((key, part.axis))
            sizes[key] = part.weight.nbytes
            gone = (group.size - site.kept) * part.offsets.shape[1]
            axes = shares.setdefault(key, {})
            place = part.weight.shape[part.axis]
            axes[part.axis] = axes.get(part.axis, 1.0) - gone / place
    return sum(
        sizes[key] * (1 - float(np.prod(list(axes.values()))))
        for key, axes in shares.items()
    )


def _stopped(
    model: Model, groups: Sequence[channels.Group]
) -> tuple[int, int, int, dict[str, int]]:
    """Return parameters: all, prunable, bound by the signature, and what stops some."""
    sizes = {
        id(w.constant): w.size
        for w in model.weights()
        if w.graph is model.graph and layers.is_float(w)
    }
    free: set[int] = set()
    whys: dict[int, set[str]] = {}
    for group in groups:
        for part in group.where:
            key = id(part.weight.constant)
            sizes.setdefault(key, part.weight.size)
            if group.why:
                whys.setdefault(key, set()).add(group.why)
            else:
                free.add(key)
    bound = 0
    stops: dict[str, int] = {}
    for key, reasons in whys.items():
        if key in free:
            continue
        if any(why.endswith("of the model") for why in reasons):
            bound += sizes[key]
        for why in reasons:
            stops[why] = stops.get(why, 0) + sizes[key]
    prunable = sum(size for key, size in sizes.items() if key in free)
    return sum(sizes.values()), prunable, bound, stops


# --- the decoder ----------------------------------------------------------------------


def _analysis(given: argparse.Namespace) -> None:
    """Time the analysis of decoders of growing depth."""
    for depth in (11, 22, 44):
        model = Model.load(_decoder(depth))
        found, best = [], np.inf
        for _ in range(3):
            start = time.process_time()
            found = channels.find(model)
            best = min(best, time.process_time() - start)
        free = sum(not group.why for group in found)
        print(
            f"{len(model.graph.nodes):,} nodes: {best:.2f} s of processor time, "
            f"{free} of {len(found)} groups free"
        )


def _decoder(depth: int = 44, width: int = 64) -> onnx.ModelProto:
    """Return a Llama-like decoder of about 200 nodes a layer, as exporters write it.

    RMSNorm in pieces, grouped-query attention with rotary embeddings by halves, keys
    and values repeated by Expand, sizes read off by Shape, a gated feed-forward.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, Any] = {}
    heads, shared = 8, 4
    each = width // heads

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def weight(name: str, *shape: int) -> str:
        tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        return name

    def ints(*values: int) -> str:
        name = "i" + "_".join(map(str, values))
        tensors[name] = np.array(values, np.int64)
        return name

    def size(x: str, axis: int) -> str:
        tensors[f"s{axis}"] = np.array(axis, np.int64)
        found = node("Gather", node("Shape", x), f"s{axis}", axis=0)
        return node("Unsqueeze", found, ints(0))

    def norm(x: str, name: str) -> str:
        tensors["two"], tensors["tiny"] = np.float32(2), np.float32(1e-6)
        mean = node("ReduceMean", node("Pow", x, "two"), axes=[-1])
        root = node("Sqrt", node("Add", mean, "tiny"))
        scaled = node("Mul", x, node("Reciprocal", root))
        return node("Mul", weight(name, width), node("Cast", scaled, to=1))

    def split(x: str, count: int) -> str:
        shape = node("Concat", size(x, 0), size(x, 1), ints(count), ints(each), axis=0)
        return node("Transpose", node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def turned(x: str, cosines: str, sines: str) -> str:
        tensors["half"] = np.array(2, np.int64)
        last = node("Gather", node("Shape", x), "s3", axis=0)
        middle = node("Unsqueeze", node("Div", last, "half"), ints(0))
        one = node("Slice", x, ints(0), middle, ints(3), ints(1))
        two = node("Slice", x, middle, ints(2**62), ints(3), ints(1))
        other = node("Concat", node("Neg", two), one, axis=-1)
        return node("Add", node("Mul", x, cosines), node("Mul", other, sines))

    def repeated(x: str) -> str:
        wide = [size(x, 0), ints(shared), ints(heads // shared), size(x, 2), ints(each)]
        opened = node("Unsqueeze", x, ints(2))
        more = node("Expand", opened, node("Concat", *wide, axis=0))
        back = [size(x, 0), ints(heads), size(x, 2), ints(each)]
        return node("Reshape", more, node("Concat", *back, axis=0))

    tensors["s3"] = np.array(3, np.int64)
    x = node("Gather", weight("table", 256, width), "ids")
    positions = node("Cast", node("Range", "s0", "length", "s1"), to=1)
    tensors["s0"], tensors["s1"] = np.array(0, np.int64), np.array(1, np.int64)
    turns = node("MatMul", node("Unsqueeze", positions, ints(1)), "speeds")
    tensors["speeds"] = rng.random((1, each // 2), np.float32)
    turns = node("Concat", turns, turns, axis=-1)
    cosines, sines = node("Cos", turns), node("Sin", turns)
    for number in range(depth):
        at = f"layer{number}."
        y = norm(x, at + "norm1")
        q = node("MatMul", y, weight(at + "q", width, width))
        k = node("MatMul", y, weight(at + "k", width, shared * each))
        v = node("MatMul", y, weight(at + "v", width, shared * each))
        q = turned(split(q, heads), cosines, sines)
        k = repeated(turned(split(k, shared), cosines, sines))
        v = repeated(split(v, shared))
        tensors["scale"] = np.float32(each**-0.25)
        k = node("Mul", node("Transpose", k, perm=[0, 1, 3, 2]), "scale")
        scores = node("MatMul", node("Mul", q, "scale"), k)
        tensors["low"] = np.float32(-1e4)
        length = [size(x, 1), size(x, 1)]
        one = node("ConstantOfShape", node("Concat", *length, axis=0), value=ONES)
        mask = node("Mul", node("Sub", one, node("Trilu", one, upper=0)), "low")
        mixed = node("MatMul", node("Softmax", node("Add", scores, mask)), v)
        mixed = node("Transpose", mixed, perm=[0, 2, 1, 3])
        shape = node("Concat", size(mixed, 0), size(mixed, 1), ints(-1), axis=0)
        mixed = node("Reshape", mixed, shape)
        x = node("Add", x, node("MatMul", mixed, weight(at + "o", width, width)))
        y = norm(x, at + "norm2")
        gate = node("MatMul", y, weight(at + "gate", width, 3 * width))
        gate = node("Mul", gate, node("Sigmoid", gate))
        up = node("MatMul", y, weight(at + "up", width, 3 * width))
        down = weight(at + "down", 3 * width, width)
        x = node("Add", x, node("MatMul", node("Mul", gate, up), down))
    x = norm(x, "norm")
    logits = node("MatMul", x, weight("head", width, 256))
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["ids"], ["shape"]),
            helper.make_node("Gather", ["shape", "s1"], ["length"], axis=0),
            *nodes,
        ],
        "decoder",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "S"])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["N", "S", 256])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


# --- pipelines ------------------------------------------------------------------------


def _pipelines(given: argparse.Namespace) -> None:
    """Print size, arithmetic, time and likeness after each of several pipelines."""
    model = Model.load(given.model)
    with np.load(given.data) as data:
        if "ids1" in data:
            name, rows = "cosine", [data["ids1"], data["ids2"]]
            width = max(a.shape[1] for a in rows)
            ids = np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in rows]
            )
            arrays = _tokens(ids)
        else:
            name = "agreement"
            pixels = (data["x"].astype(np.float32) - 127) / 128
            arrays = {model.inputs[0].name: pixels.transpose(0, 3, 1, 2)}
    count = len(next(iter(arrays.values())))
    table = Table(title=f"{given.model.parent.name}/{given.model.name}")
    for head in ("seed", "bytes", "MACs", "time", name, "s", "passes"):
        table.add_column(head, justify="left" if head == "passes" else "right")
    base = runtime.session(model, threads=1)
    for seed in map(int, given.seeds.split(",")):
        order = np.random.default_rng(seed).permutation(count)
        seen = {k: a[order[: given.calibration]] for k, a in arrays.items()}
        rest = order[given.calibration :][: given.test or 300]
        held = {k: a[rest] for k, a in arrays.items()}
        few = Samples.from_arrays(seen).bind(model.inputs)
        splits = Splits(calibration=few, training=few, validation=few)
        wanted = _answers(base, held)
        one = {k: a[:1] for k, a in held.items()}
        if name == "cosine":
            one = _trimmed({k: a[:8] for k, a in held.items()})
        dense = macs(model, one)
        for text in given.passes.split(";"):
            made = model.copy()
            begin = time.process_time()
            for pass_ in Pipeline.parse(text):
                ctx = make_context(splits, model, seed=seed, threads=given.threads)
                made.require_opset(pass_.opset)
                pass_.apply(made, ctx)
            seconds = time.process_time() - begin
            session = runtime.session(made, threads=1)
            ratio = float(
                np.median([latencies(session, base, one)[1] for _ in range(3)])
            )
            answers = _answers(session, held)
            if name == "cosine":
                like = float((answers * wanted).sum(-1).mean())
            else:
                like = float((answers.argmax(-1) == wanted.argmax(-1)).mean())
            row = (
                str(seed),
                f"{len(made.to_bytes('plain')):,}",
                f"{(macs(made, one) or 0) / (dense or 1):.3f}",
                f"{ratio:.3f}",
                f"{like:.4f}",
                f"{seconds:.0f}",
                text,
            )
            table.add_row(*row)
            print(*row, sep="  ", flush=True)
    Console(width=140).print(table)


def _tokens(ids: Array) -> dict[str, Array]:
    ids = ids.astype(np.int64)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }


def _trimmed(feeds: dict[str, Array]) -> dict[str, Array]:
    """Cut off what is padding in every sentence of a batch."""
    longest = int(feeds["attention_mask"].sum(1).max())
    return {name: array[:, :longest] for name, array in feeds.items()}


def _answers(session: runtime.Session, feeds: dict[str, Array]) -> Array:
    """Return scores, or unit-length embeddings, of the last output."""
    names = [info.name for info in session.outputs]
    found = []
    for at in range(0, len(next(iter(feeds.values()))), 25):
        part = {name: array[at : at + 25] for name, array in feeds.items()}
        if "attention_mask" in part:
            part = _trimmed(part)
        answer = np.asarray(session.run(part)[names[-1]])
        if "attention_mask" in part:
            answer = answer / np.linalg.norm(answer, axis=-1, keepdims=True)
        found.append(answer)
    return np.concatenate(found)


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


WHAT = {
    "coverage": _coverage,
    "decoder": _analysis,
    "images": _images,
    "pipelines": _pipelines,
}
