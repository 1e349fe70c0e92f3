"""Quantized models by this tool and by others: agreement, size, cost, speed.

Every tool runs in a process of its own, on the same file and the same calibration
samples; what is measured on was seen by none. Files are given folded (``fold``), since
no tool does well on unfolded ones; ``--raw`` gives them as they are. Other tools live
in environments under ``--peers``, made there with ``--install``; one that is missing or
fails is listed with the reason. Time is of one run of one sample on one thread, in
turns with fp32, as a ratio to it.

The models of ``models/`` are always there; for the others, give the folder with
``model.onnx`` and the file of samples: ``--efficientnet FOLDER SAMPLES``, ``--minilm``,
``--magika``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from onnxshrink import Model, runtime
from onnxshrink.engine import make_context
from onnxshrink.measuring.measure import file_bytes, latencies
from onnxshrink.passes.fold import Fold
from onnxshrink.samples import Splits

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
CALIBRATION = 128
BATCH = 32
SENTENCES = 300
"""Sentences whose embeddings are compared one by one."""

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
Score = Callable[[Sequence[Array], Sequence[Array]], dict[str, float]]

_HEAD = """
import json, sys, time
import numpy as np
source, samples, target, options = sys.argv[1:5]
options = json.loads(options)
with np.load(samples) as data:
    arrays = {name: data[name] for name in data.files}
count = len(next(iter(arrays.values())))
feeds = [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)]
class Reader:
    def __init__(self):
        self.rewind()
    def rewind(self):
        self.left = iter(feeds)
    def get_next(self):
        return next(self.left, None)
    def __iter__(self):
        return iter(feeds)
    def __len__(self):
        return len(feeds)
"""
_TAIL = """
with open("/proc/self/status") as status:
    # Not getrusage: its peak is at least that of the process that started this one.
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
peak /= 1024
print(json.dumps({"seconds": time.process_time() - start, "peak": peak}))
"""
_OURS = """
from onnxshrink import Model, Pipeline
from onnxshrink.base import Context
from onnxshrink.samples import Samples, Splits
start = time.process_time()
model = Model.load(source)
given = Samples.from_arrays(arrays).bind(model.inputs)
splits = Splits(calibration=given)
for step in Pipeline.parse(options["passes"]):
    model.require_opset(step.opset)
    ctx = make_context(samples=splits, reference=model.copy(), threads=1)
    step.apply(model, ctx)
model.fit_runtime()
model.save(target, external="never")
"""
_ORT = """
from onnxruntime import quantization as q
start = time.process_time()
if options["form"] == "static":
    q.quantize_static(
        source, target, Reader(), quant_format=q.QuantFormat.QDQ,
        activation_type=q.QuantType[options["activations"]],
        weight_type=q.QuantType[options["weights"]],
        per_channel=options["channel"], reduce_range=options["reduce"],
    )
elif options["form"] == "dynamic":
    q.quantize_dynamic(
        source, target, per_channel=options["channel"],
        reduce_range=options["reduce"],
    )
else:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    made = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(target)
"""
_INC = """
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import config, quantize, QuantFormat
class Given(Reader, data_reader.CalibrationDataReader):
    pass
start = time.process_time()
if options["form"] == "static":
    asked = config.StaticQuantConfig(
        Given(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True
    )
else:
    asked = config.DynamicQuantConfig(per_channel=True, reduce_range=True)
quantize(source, target, asked)
"""
_NNCF = """
import nncf, onnx
start = time.process_time()
model = onnx.load(source)
if options["form"] == "static":
    kind = nncf.ModelType.TRANSFORMER if options["transformer"] else None
    made = nncf.quantize(
        model, nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds)
    )
else:
    made = nncf.compress_weights(model)
onnx.save(made, target)
"""
_SIM = """
import onnx, onnxsim
start = time.process_time()
onnx.save(onnxsim.quantize_static(source, feeds), target)
"""
_RAY = """
import onnx, onnx_graphsurgeon
from onnx_shrink_ray import shrink
start = time.process_time()
made = shrink.quantize_weights(onnx.load(source))
onnx.save(made, target)
"""
_PEERS = {
    "onnx-neural-compressor": (
        "onnx-neural-compressor==1.0",
        "onnxruntime",
        "onnx",
        # What it imports and does not ask for.
        "prettytable",
        "pyyaml",
        "psutil",
        "py-cpuinfo",
        "scipy",
        "pandas",
    ),
    "nncf": ("nncf==3.4.0", "onnxruntime", "onnx"),
    "onnxsim": ("onnxsim==0.8.1", "onnxruntime", "onnx"),
    "onnx-shrink-ray": ("onnx-shrink-ray==0.0.11", "onnxruntime", "onnx"),
}


@dataclass(frozen=True)
class Tool:
    """One way to quantize.

    Attributes:
        name: What the table calls it.
        program: What runs after the samples are read.
        options: Given to the program.
        home: Environment it needs; empty is the one of this benchmark.
    """

    name: str
    program: str
    options: Mapping[str, Any] = field(default_factory=dict)
    home: str = ""


@dataclass(frozen=True)
class Task:
    """A model and what it is measured by.

    Attributes:
        name: What the table calls it.
        model: Its file.
        calibration: Arrays by input name, the first axis samples.
        evaluation: Feeds that no tool sees.
        output: Name of the output that is compared.
        score: Compares outputs of fp32 with others, both one array for each feed.
        once: One sample, for the time of a run.
        tools: What runs on it.
    """

    name: str
    model: Path
    calibration: Feed
    evaluation: Sequence[Feed]
    output: str
    score: Score
    once: Feed
    tools: Sequence[Tool]


def main(arguments: Sequence[str]) -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(prog="quantize", description=__doc__)
    for name in ("efficientnet", "minilm", "magika"):
        parser.add_argument(
            f"--{name}", nargs=2, type=Path, metavar=("FOLDER", "SAMPLES")
        )
    parser.add_argument("--models", default="lenet-300-100,lenet-5,residual-cnn,vit")
    parser.add_argument("--passes", action="append", help="of ours; may be repeated")
    parser.add_argument("--only-ours", action="store_true", help="no other tools")
    parser.add_argument("--raw", action="store_true", help="do not fold beforehand")
    parser.add_argument("--peers", type=Path, help="folder of environments")
    parser.add_argument("--install", action="store_true", help="make missing ones")
    given = parser.parse_args(arguments)
    if given.install and given.peers is not None:
        _install(given.peers)
    makers = {"efficientnet": _efficientnet, "minilm": _minilm, "magika": _magika}
    tasks = []
    for name, maker in makers.items():
        if getattr(given, name):
            folder_of, samples = getattr(given, name)
            tasks.append(maker(folder_of, samples, given.passes))
    tasks += [_digits(name, given.passes) for name in given.models.split(",") if name]
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            Console(width=140).print(_table(task, given, Path(folder)))


# --- tools ------------------------------------------------------------------------


def _ours(passes: Sequence[str]) -> list[Tool]:
    return [Tool(f"onnxshrink {text}", _OURS, {"passes": text}) for text in passes]


def _static(transformer: bool) -> list[Tool]:
    def ort(name: str, activations: str, weights: str, reduce: bool) -> Tool:
        options = {
            "form": "static",
            "activations": activations,
            "weights": weights,
            "channel": True,
            "reduce": reduce,
        }
        return Tool(f"onnxruntime static {name}", _ORT, options)

    return [
        ort("U8S8", "QUInt8", "QInt8", False),
        ort("U8S8, 7-bit weights", "QUInt8", "QInt8", True),
        ort("S8S8", "QInt8", "QInt8", False),
        ort("U8U8", "QUInt8", "QUInt8", False),
        Tool(
            "onnx-neural-compressor static",
            _INC,
            {"form": "static"},
            "onnx-neural-compressor",
        ),
        Tool(
            "NNCF static",
            _NNCF,
            {"form": "static", "transformer": transformer},
            "nncf",
        ),
        Tool("onnxsim static", _SIM, {}, "onnxsim"),
    ]


def _dynamic() -> list[Tool]:
    options = {"form": "dynamic", "channel": True, "reduce": False}
    return [
        Tool("onnxruntime dynamic, per tensor", _ORT, {**options, "channel": False}),
        Tool("onnxruntime dynamic, per channel", _ORT, options),
        Tool("onnxruntime dynamic, 7-bit weights", _ORT, {**options, "reduce": True}),
        Tool(
            "onnx-neural-compressor dynamic",
            _INC,
            {"form": "dynamic"},
            "onnx-neural-compressor",
        ),
        Tool("onnxruntime MatMulNBits, 4 bits", _ORT, {"form": "nbits"}),
        Tool("NNCF weights", _NNCF, {"form": "weights"}, "nncf"),
    ]


def _weights() -> list[Tool]:
    return [Tool("onnx-shrink-ray", _RAY, {}, "onnx-shrink-ray")]


def _install(folder: Path) -> None:
    for name, packages in _PEERS.items():
        home = folder / name
        binary = home / "bin" / "python"
        if binary.exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        command = [str(binary), "-m", "pip", "install", "-q", *packages]
        if subprocess.run(command, check=False).returncode:
            print(f"{name} could not be installed", file=sys.stderr)


def _python(tool: Tool, peers: Path | None) -> Path | None:
    if not tool.home:
        return Path(sys.executable)
    if peers is None:
        return None
    binary = peers / tool.home / "bin" / "python"
    return binary if binary.exists() else None


# --- tasks ------------------------------------------------------------------------


def _efficientnet(folder: Path, samples: Path, passes: Sequence[str] | None) -> Task:
    with np.load(samples) as data:
        images, labels = data["x"], data["labels"]
    scaled = ((images.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)
    scaled = np.ascontiguousarray(scaled)
    path = folder / "model.onnx"
    model = Model.load(path)
    name, output = model.inputs[0].name, model.outputs[0].name
    return Task(
        f"{folder.name}, {CALIBRATION} images to calibrate, "
        f"{len(labels) - CALIBRATION} to measure",
        path,
        {name: scaled[:CALIBRATION]},
        _batches({name: scaled[CALIBRATION:]}, 12),
        output,
        _classes(labels[CALIBRATION:]),
        {name: scaled[:1]},
        [*_ours(passes or ["quantize"]), *_static(False), *_weights()],
    )


def _magika(folder: Path, samples: Path, passes: Sequence[str] | None) -> Task:
    with np.load(samples) as data:
        files, labels = data["bytes"].astype(np.int32), data["labels"]
    path = folder / "model.onnx"
    model = Model.load(path)
    name = model.inputs[0].name
    return Task(
        f"{folder.name}, {CALIBRATION} files to calibrate, "
        f"{len(labels) - CALIBRATION} to measure",
        path,
        {name: files[:CALIBRATION]},
        _batches({name: files[CALIBRATION:]}, BATCH),
        model.outputs[0].name,
        _classes(labels[CALIBRATION:]),
        {name: files[:1]},
        [*_ours(passes or ["quantize"]), *_static(False), *_dynamic(), *_weights()],
    )


def _digits(name: str, passes: Sequence[str] | None) -> Task:
    with np.load(MODELS / "mnist.npz") as data:
        train, test, labels = data["train_x"], data["test_x"], data["test_y"]

    def images(array: Array) -> Array:
        return array[:, None].astype(np.float32) / 255

    return Task(
        f"{name}, {CALIBRATION} training images to calibrate, {len(labels):,} test "
        "images to measure",
        MODELS / f"{name}.onnx",
        {"image": images(train[:CALIBRATION])},
        _batches({"image": images(test)}, 100),
        "logits",
        _classes(labels),
        {"image": images(test[:1])},
        [*_ours(passes or ["quantize"]), *_static(name == "vit"), *_weights()],
    )


def _minilm(folder: Path, samples: Path, passes: Sequence[str] | None) -> Task:
    with np.load(samples) as data:
        one, two, score = data["ids1"], data["ids2"], data["score"]
    half = len(score)

    def feed(ids: Array) -> dict[str, Array]:
        ids = ids.astype(np.int64)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).astype(np.int64),
            "token_type_ids": np.zeros_like(ids),
        }

    def judge(wanted: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
        fp32, other = np.concatenate(wanted), np.concatenate(found)
        some, same = fp32[half : half + SENTENCES], other[half : half + SENTENCES]
        near = [(a @ a.T - 4 * np.eye(len(a))).argmax(1) for a in (some, same)]
        alike = (other[:half] * other[half:]).sum(1)
        return {
            "cosine": _cosine(some, same),
            "neighbour": float((near[0] == near[1]).mean()),
            "Spearman": float(spearmanr(alike, score).statistic),
        }

    return Task(
        f"{folder.name}, {CALIBRATION} sentences to calibrate, {SENTENCES} others "
        f"to measure (Spearman: {half:,} pairs)",
        folder / "model.onnx",
        feed(one[:CALIBRATION]),
        # Alone: what is coded at run time depends on what else is in the batch.
        [feed(row[None, : np.count_nonzero(row)]) for row in (*one, *two)],
        "sentence_embedding",
        judge,
        feed(np.where(two[:1, :1] > 0, np.arange(1000, 1032)[None], 0)),
        [*_ours(passes or ["quantize"]), *_dynamic(), *_static(True)],
    )


def _batches(arrays: Feed, size: int) -> list[Feed]:
    count = len(next(iter(arrays.values())))
    return [
        {name: array[at : at + size] for name, array in arrays.items()}
        for at in range(0, count, size)
    ]


def _classes(labels: Array) -> Score:
    def judge(wanted: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
        fp32, other = (
            np.concatenate(a).reshape(len(labels), -1) for a in (wanted, found)
        )
        guess = other.argmax(1)
        return {
            "agreement": float((fp32.argmax(1) == guess).mean()),
            "top-1": float((guess == labels).mean()),
            "cosine": _cosine(fp32, other),
        }

    return judge


def _cosine(one: Array, two: Array) -> float:
    """Return the mean cosine between rows; class scores without their mean."""
    wide, narrow = one.astype(np.float64), two.astype(np.float64)
    sizes = np.linalg.norm(wide, axis=1) * np.linalg.norm(narrow, axis=1)
    return float(((wide * narrow).sum(1) / np.maximum(sizes, 1e-30)).mean())


# --- the table --------------------------------------------------------------------


def _table(task: Task, given: argparse.Namespace, folder: Path) -> Table:
    source = task.model if given.raw else _folded(task.model, folder)
    samples = folder / "samples.npz"
    np.savez(samples, **dict(task.calibration))  # type: ignore[arg-type]
    reference = runtime.session(source, threads=1)
    wanted = [reference.run(feed)[task.output] for feed in task.evaluation]
    start = task.score(wanted, wanted)
    table = Table(title=task.name)
    table.add_column("")
    for column in [*start, "MB", "CPU s", "peak MB", "time"]:
        table.add_column(column, justify="right")
    size = f"{file_bytes(task.model) / 1e6:.2f}"
    table.add_row("fp32", *map("{:.4f}".format, start.values()), size, "", "", "1")
    for tool in task.tools:
        if given.only_ours and tool.program is not _OURS:
            continue
        row = _row(task, tool, source, samples, wanted, reference, given.peers, folder)
        table.add_row(tool.name, *row)
        print(tool.name, *row, flush=True)
    return table


def _row(
    task: Task,
    tool: Tool,
    source: Path,
    samples: Path,
    wanted: Sequence[Array],
    reference: runtime.Session,
    peers: Path | None,
    folder: Path,
) -> list[str]:
    python = _python(tool, peers)
    if python is None:
        return ["missing: give --peers"]
    target = folder / "out.onnx"
    target.unlink(missing_ok=True)
    command = [str(python), "-W", "ignore", "-c", _HEAD + tool.program + _TAIL]
    command += [str(source), str(samples), str(target), json.dumps(dict(tool.options))]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode or not target.exists():
        lines = made.stderr.strip().splitlines() or ["no output"]
        return [lines[-1][:60]]
    cost = json.loads(made.stdout.strip().splitlines()[-1])
    try:
        session = runtime.session(target, threads=1)
        found = [session.run(feed)[task.output] for feed in task.evaluation]
        _, ratio = latencies(session, reference, task.once)
    except Exception as error:  # whatever is wrong with another tool's file
        return [str(error)[:60]]
    return [
        *map("{:.4f}".format, task.score(wanted, found).values()),
        f"{file_bytes(target) / 1e6:.2f}",
        f"{cost['seconds']:.1f}",
        f"{cost['peak']:.0f}",
        f"{ratio:.2f}",
    ]


def _folded(path: Path, folder: Path) -> Path:
    model = Model.load(path)
    Fold().apply(model, make_context(samples=Splits(), reference=model))
    target = folder / f"folded-{path.parent.name}-{path.name}"
    model.fit_runtime()
    model.save(target, storage="plain", external="never")
    return target
