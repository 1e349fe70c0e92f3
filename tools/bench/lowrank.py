"""Low rank: a sentence encoder, image classifiers and the SVD itself, against peers.

    python tools/bench lowrank svd
    python tools/bench lowrank sentences --model minilm.onnx --data stsb.npz
    python tools/bench lowrank images --model cifar.onnx --data cifar10.npz
    python tools/bench lowrank digits

``sentences`` splits the MatMuls of an encoder of token ids. Sentences that calibrate or
train are of other pairs than those that measure; data has ``ids1``, ``ids2`` and
``score``. ``images`` splits the convolutions of a classifier but its first and measures
their summed kernel time in onnxruntime's profile; data has ``train_x`` and ``test_x``
uint8 [n, channels, height, width], and ``test_y``. Behind the split come the passes of
``--then``. ``digits`` does the same with the models in ``models/``. ``svd`` times
truncated SVDs; scikit-learn is measured where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.linalg import eigh
from scipy.sparse.linalg import svds
from scipy.stats import spearmanr

from onnxshrink import runtime
from onnxshrink.engine import make_context
from onnxshrink.model import Model
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.solvers import svd

Array = NDArray[Any]
MODELS = Path(__file__).resolve().parent.parent.parent / "models"
KEEP = {"lenet-300-100": "0.25", "lenet-5": "0.25", "residual-cnn": "0.5", "vit": "0.5"}
"""Share of the parameters that stay of the layers that are split."""
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv"})


def main(arguments: Sequence[str]) -> None:
    """Measure one of four things."""
    parser = argparse.ArgumentParser(prog="lowrank", description=__doc__)
    parser.add_argument("what", choices=["svd", "sentences", "images", "digits"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--passes", action="append", help="one of several pipelines")
    parser.add_argument("--then", default="", help="passes behind each of them")
    parser.add_argument("--train", type=int, help="images that train at most")
    parser.add_argument("--labels", action="store_true", help="train on them too")
    parser.add_argument("--models", default=",".join(KEEP), help="of digits")
    parser.add_argument("--seeds", default="0", help="of the choice of samples")
    parser.add_argument("--calibration", type=int, default=150)
    parser.add_argument("--test", type=int, default=400, help="pairs that measure")
    parser.add_argument("--in-order", action="store_true", help="pairs as they come")
    parser.add_argument("--sizes", default="1024x2752x128,4096x1024x256")
    parser.add_argument("--large", default="11008x4096", help="outputs x inputs; 0: no")
    given = parser.parse_args(arguments)
    {"svd": _svd, "sentences": _sentences, "images": _images, "digits": _digits}[
        given.what
    ](given)


# --- models ---------------------------------------------------------------------------


def _run(
    pipeline: str, model: Model, splits: Splits, seed: int
) -> tuple[Model, float, float]:
    """Return the model after a pipeline, with wall and processor seconds."""
    found = model.copy()
    start, cpu = time.perf_counter(), time.process_time()
    reference = model.copy()
    for pass_ in Pipeline.parse(pipeline).passes:
        ctx = make_context(splits, reference, seed=seed, threads=1)
        found.require_opset(pass_.opset)
        pass_.apply(found, ctx)
    return found, time.perf_counter() - start, time.process_time() - cpu


def _kernel_times(
    models: Mapping[str, Model],
    feeds: Mapping[str, Array],
    ops: frozenset[str],
    skip: str = "",
    rounds: int = 5,
) -> dict[str, float]:
    """Return the summed kernel time of operators in microseconds, one thread.

    Rounds go through all models in turn; of each node the least time counts.
    """
    import onnxruntime

    best: dict[str, dict[str, float]] = {name: {} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for name, model in models.items():
            path = Path(folder) / f"{len(paths)}.onnx"
            model.save(path, storage="plain")
            paths[name] = path
        for _ in range(rounds):
            for name, path in paths.items():
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                options.enable_profiling = True
                options.profile_file_prefix = str(Path(folder) / "profile")
                session = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
                for _ in range(4):
                    session.run(None, dict(feeds))
                events = json.loads(Path(session.end_profiling()).read_text())
                for event in events:
                    args = event.get("args", {})
                    if args.get("op_name") not in ops or "dur" not in event:
                        continue
                    if not event["name"].endswith("_kernel_time"):
                        continue
                    if skip and skip in event["name"]:
                        continue
                    least = best[name].get(event["name"], np.inf)
                    best[name][event["name"]] = min(least, float(event["dur"]))
    return {name: sum(times.values()) for name, times in best.items()}


def _size(model: Model) -> int:
    """Return the values in weights of at least two axes."""
    return sum(weight.size for weight in model.weights() if len(weight.shape) > 1)


# --- sentences ------------------------------------------------------------------------


def _sentences(given: argparse.Namespace) -> None:
    model = Model.load(given.model)
    with np.load(given.data) as data:
        width = max(data["ids1"].shape[1], data["ids2"].shape[1])
        pairs = [_padded(data[name], width) for name in ("ids1", "ids2")]
        scores = np.asarray(data["score"])
    pipelines = given.passes or [
        f"fold,lowrank:keep={keep}{how}"
        for keep in ("0.7", "0.5")
        for how in (
            ",metric=weights",
            ",metric=inputs",
            ",scope=local",
            "",
        )
    ]
    console = Console(width=120)
    for seed in map(int, given.seeds.split(",")):
        order = np.arange(len(scores))
        if not given.in_order:
            order = np.random.default_rng(seed).permutation(len(scores))
        # Pairs as they come: those behind the ones that calibrate, of the same kind.
        test = order[: given.test]
        rest = order[given.test :]
        if given.in_order:
            rest, test = order, order[given.calibration :][: given.test]
        few = pairs[0][rest[: given.calibration]]
        many = np.concatenate([side[rest] for side in pairs])
        if given.in_order:
            many = pairs[1][order[given.calibration + given.test :]]
        splits = Splits(
            calibration=Samples.from_arrays(_feed(few)).bind(model.inputs),
            training=Samples.from_arrays(_feed(many[:-200])).bind(model.inputs),
            validation=Samples.from_arrays(_feed(many[-200:])).bind(model.inputs),
            evaluation=None,
        )
        held = [side[test] for side in pairs]
        start = _embedded(model, held)
        spearman = _spearman(start, scores[test])
        table = Table(
            title=f"seed {seed}: Spearman {spearman:.4f} on {len(test)} pairs as it is"
        )
        for column in ("passes", "values", "time", "cosine", "Spearman", "seconds"):
            table.add_column(column, justify="left" if column == "passes" else "right")
        plain, _, _ = _run("fold", model, splits, seed)
        dense = _products(plain)
        models = {"": plain}
        rows = []
        for text in pipelines:
            whole = ",".join(part for part in (text, given.then) if part)
            found, seconds, _ = _run(whole, model, splits, seed)
            made = _embedded(found, held)
            cosine = float((made * start).sum(axis=1).mean())
            rows.append((whole, cosine, _spearman(made, scores[test]), seconds))
            share = (_size(found) - _size(plain) + dense) / dense
            models[whole] = found
            console.print(f"{whole}: {share:.3f} {cosine:.4f}", highlight=False)
        times = _kernel_times(models, _feed(held[0][:8]), PRODUCTS)
        for whole, cosine, correlation, seconds in rows:
            share = (_size(models[whole]) - _size(plain) + dense) / dense
            table.add_row(
                whole,
                f"{share:.3f}",
                f"{times[whole] / times['']:.2f}",
                f"{cosine:.4f}",
                f"{correlation:.4f}",
                f"{seconds:.0f}",
            )
        console.print(table)


def _products(model: Model) -> int:
    """Return the values that MatMul and Gemm multiply by."""
    return sum(
        weight.size
        for weight in model.weights()
        if len(weight.shape) > 1
        if any(node.op in ("MatMul", "Gemm") for node, _ in weight.uses)
    )


def _padded(ids: Array, width: int) -> Array:
    return np.pad(ids, ((0, 0), (0, width - ids.shape[1])))


def _feed(ids: Array) -> dict[str, Array]:
    longest = int((ids != 0).sum(axis=1).max())
    ids = ids[:, :longest].astype(np.int64)
    real = (ids != 0).astype(np.int64)
    return {
        "input_ids": ids,
        "attention_mask": real,
        "token_type_ids": np.zeros_like(ids),
    }


def _embedded(model: Model, sides: Sequence[Array]) -> Array:
    """Return the unit-length embeddings of both sides, one below the other."""
    session = runtime.session(model, threads=1)
    name = model.outputs[-1].name
    known = {info.name for info in model.inputs}
    found = []
    for side in sides:
        for start in range(0, len(side), 50):
            feeds = _feed(side[start : start + 50])
            made = session.run({n: a for n, a in feeds.items() if n in known})[name]
            found.append(made / np.linalg.norm(made, axis=1, keepdims=True))
    return np.concatenate(found)


def _spearman(embedded: Array, scores: Array) -> float:
    half = len(embedded) // 2
    cosines = (embedded[:half] * embedded[half:]).sum(axis=1)
    return float(spearmanr(cosines, scores).statistic)


# --- images ---------------------------------------------------------------------------


def _images(given: argparse.Namespace) -> None:
    model = Model.load(given.model)
    with np.load(given.data) as data:
        train, test, labels = data["train_x"], data["test_x"], data["test_y"]
        known = data["train_y"] if given.labels else None
    convolutions = [node for node in model.graph.nodes if node.op == "Conv"]
    stem = convolutions[0].name or convolutions[0].outputs[0].name
    pipelines = given.passes or [
        f"fold,lowrank:macs={share},skip={stem}" for share in ("0.4", "0.3", "0.2")
    ]
    _classifier(given, model, train, known, test, labels, pipelines, CONVOLUTIONS, stem)


def _digits(given: argparse.Namespace) -> None:
    with np.load(MODELS / "mnist.npz") as data:
        train, test, labels = data["train_x"], data["test_x"], data["test_y"]
        known = data["train_y"] if given.labels else None
    for name in given.models.split(","):
        keep = KEEP.get(name, "0.5")
        model = Model.load(MODELS / f"{name}.onnx")
        pipelines = given.passes or [f"fold,lowrank:keep={keep}"]
        Console().print(name)
        shape = [n for n in model.inputs[0].shape or () if isinstance(n, int)]
        seen, held = (a.reshape(len(a), *shape[-3:]) for a in (train, test))
        both = PRODUCTS | CONVOLUTIONS
        _classifier(given, model, seen, known, held, labels, pipelines, both, "")


def _classifier(
    given: argparse.Namespace,
    model: Model,
    train: Array,
    known: Array | None,
    test: Array,
    labels: Array,
    pipelines: Sequence[str],
    ops: frozenset[str],
    stem: str,
) -> None:
    name = model.inputs[0].name
    start = _correct(model, test, labels)
    console = Console(width=120)
    for seed in map(int, given.seeds.split(",")):
        order = np.random.default_rng(seed).permutation(len(train))

        def samples(chosen: Array) -> Samples:
            rows = np.sort(chosen)
            arrays = {name: train[rows].astype(np.float32) / 255}
            if known is not None:
                arrays["labels"] = known[rows].astype(np.int64)
            return Samples.from_arrays(arrays).bind(model.inputs)

        held = min(1000, len(order) // 10)
        splits = Splits(
            calibration=samples(order[:512]),
            training=samples(order[512:-held][: given.train]),
            validation=samples(order[-held:]),
            evaluation=None,
        )
        plain, _, _ = _run("fold", model, splits, seed)
        models, rows = {"": plain}, []
        for text in pipelines:
            for then in dict.fromkeys(("", given.then)):
                whole = ",".join(part for part in (text, then) if part)
                found, seconds, _ = _run(whole, model, splits, seed)
                models[whole] = found
                right = _correct(found, test, labels)
                rows.append((whole, right, seconds))
                console.print(f"{whole}: {right:.2f} %", highlight=False)
        # Few samples, many rounds: a kernel of a millisecond is rarely interrupted.
        feeds = {name: test[:4].astype(np.float32) / 255}
        times = _kernel_times(models, feeds, ops, stem, rounds=20)
        table = Table(title=f"seed {seed}: {start:.2f} % right as it is")
        for column in ("passes", "values", "kernels", "right %", "seconds"):
            table.add_column(column, justify="left" if column == "passes" else "right")
        for whole, right, seconds in rows:
            table.add_row(
                whole,
                f"{_size(models[whole]) / _size(plain):.3f}",
                f"{times[''] / times[whole]:.2f}x",
                f"{right:.2f}",
                f"{seconds:.0f}",
            )
        console.print(table)


def _correct(model: Model, images: Array, labels: Array) -> float:
    session = runtime.session(model, threads=1)
    name, output = model.inputs[0].name, model.outputs[0].name
    right = 0
    for start in range(0, len(images), 100):
        feeds = {name: images[start : start + 100].astype(np.float32) / 255}
        best = session.run(feeds)[output].argmax(axis=-1)
        right += int((best == labels[start : start + 100]).sum())
    return 100 * right / len(images)


# --- the SVD --------------------------------------------------------------------------


def _svd(given: argparse.Namespace) -> None:
    table = Table(title="truncated SVD: processor seconds, error over the optimum")
    for column in ("shape", "rank", "method", "seconds", "error"):
        table.add_column(column, justify="right")
    for text in given.sizes.split(","):
        rows, columns, rank = map(int, text.split("x"))
        rng = np.random.default_rng(0)
        left, right = rng.standard_normal((rows, columns)), np.arange(1, columns + 1)
        matrix = (left * right**-0.5).astype(np.float32).astype(np.float64)
        methods: dict[str, Callable[[], tuple[Array, Array, Array]]] = {
            "numpy (gesdd)": lambda m=matrix: np.linalg.svd(m, full_matrices=False),  # type: ignore[misc]
            "ours": lambda m=matrix, r=rank: svd.truncated(m, r),  # type: ignore[misc]
            "ARPACK": lambda m=matrix, r=rank: svds(m, r),  # type: ignore[misc]
        }
        if importlib.util.find_spec("sklearn"):
            peer = importlib.import_module("sklearn.utils.extmath").randomized_svd
            methods["randomized"] = lambda m=matrix, r=rank, f=peer: f(  # type: ignore[misc]
                m, r, random_state=0
            )
        least = None
        for name, method in methods.items():
            best = np.inf
            for _ in range(3):
                start = time.process_time()
                u, s, vt = method()
                best = min(best, time.process_time() - start)
            order = np.argsort(-s)[:rank]
            product = (u[:, order] * s[order]) @ vt[order]
            error = float(np.square(matrix - product).sum())
            least = error if least is None else least
            table.add_row(
                f"{rows} x {columns}",
                str(rank),
                name,
                f"{best:.2f}",
                f"{error / least:.4f}",
            )
    console = Console()
    console.print(table)
    if given.large != "0":
        _large(*map(int, given.large.split("x")))


def _large(outputs: int, inputs: int) -> None:
    """Split one large layer, against one Gram product and one eigh."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((outputs, inputs), np.float32)
    x = rng.standard_normal((2 * inputs, inputs), np.float32)
    moment = (x.T @ x / len(x)).astype(np.float64)
    del x
    start = time.process_time()
    product = np.zeros((inputs, inputs))
    for at in range(0, outputs, 512):
        part = matrix[at : at + 512].astype(np.float64)
        product += part.T @ part
    gram = time.process_time() - start
    start = time.process_time()
    eigh(product, overwrite_a=True, check_finite=False, driver="evr")
    one = time.process_time() - start
    del product
    for rank in (inputs // 4, None):
        tracemalloc.start()
        found = svd.split(matrix, inputs=moment, rank=rank)
        found.factors(matrix, inputs // 4)
        peak = tracemalloc.get_traced_memory()[1] + matrix.nbytes + moment.nbytes
        tracemalloc.stop()
        start = time.process_time()
        found = svd.split(matrix, inputs=moment, rank=rank)
        found.factors(matrix, inputs // 4)
        ours = time.process_time() - start
        del found
        print(
            f"whitened split of {outputs} x {inputs}, "
            f"{'all ranks' if rank is None else f'ranks up to {rank}'}: {ours:.1f} s, "
            f"{ours / (gram + one):.2f} times a Gram product ({gram:.1f} s) and an "
            f"eigh ({one:.1f} s); memory at most {peak / matrix.nbytes:.2f} times the "
            "layer, itself and the Gram matrix of its inputs counted"
        )
