"""Small language models: quality per byte and per token, here and by onnxruntime.

A decoder whose table is also its head is quantized by this tool and by the quantizers
of onnxruntime (MatMulNBits of 4 and 8 bits, with and without Gather, and
quantize_dynamic), each in a process of its own. Shown are bytes, perplexity and how
often the most likely next token stays (on windows of text that no tool has seen), the
time of one token and of prompts of 64 and 128 as ratios to fp32 (one thread, CPU time,
the shortest of runs in turns), the memory that opening takes, and the tool's CPU
seconds and largest memory.

Without ``--model`` a small decoder is trained first, by ``distill``, on the
documentation of this repository: the next tokens are the answers of its teacher. Give
any other with ``--model FILE --text FILE.npz --calibration FILE.npz``; both hold token
ids [windows, positions] under ``input_ids``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from onnxshrink.testing.decoders import decoder

Array = NDArray[Any]

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = 2000
WINDOW = 64
OURS = (
    "quantize:activations=none,weights=int4,form=packed",
    "quantize:activations=none,weights=int4,form=decoded",
    "quantize:activations=none,weights=int4,form=packed,rounding=mse",
    "quantize:activations=none,weights=int4,form=packed,rounding=hqq",
    "quantize:activations=none,form=packed",
    "quantize",
    "half",
)
_NBITS = """
import sys, onnx
from onnxruntime.quantization import matmul_nbits_quantizer as q
model = onnx.load(sys.argv[1])
bits, symmetric, kinds = int(sys.argv[3]), sys.argv[4] == "1", sys.argv[5].split("+")
config = q.DefaultWeightOnlyQuantConfig(
    block_size=32, is_symmetric=symmetric, bits=bits, accuracy_level=4,
    op_types_to_quantize=tuple(kinds),
)
work = q.MatMulNBitsQuantizer(model, algo_config=config)
work.process()
work.model.save_model_to_file(sys.argv[2], False)
"""
_DYNAMIC = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2], weight_type=QuantType.QInt8)
"""
PEERS: Mapping[str, Sequence[str]] = {
    "MatMulNBits 4 bits": (_NBITS, "4", "1", "MatMul"),
    "MatMulNBits 4 bits, asymmetric": (_NBITS, "4", "0", "MatMul"),
    "MatMulNBits 4 bits and Gather": (_NBITS, "4", "0", "MatMul+Gather"),
    "MatMulNBits 8 bits": (_NBITS, "8", "1", "MatMul"),
    "quantize_dynamic": (_DYNAMIC,),
}
_OPEN = """
import sys
import onnxruntime
def now(key):
    with open("/proc/self/status") as lines:
        return next(int(l.split()[1]) for l in lines if l.startswith(key))
before = now("VmRSS")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
onnxruntime.InferenceSession(sys.argv[1], options)
print((now("VmHWM") - before) / 1024)
"""


# --- the decoder of our own -----------------------------------------------------------


def text() -> dict[str, str]:
    """Return the documentation of the repository, by file."""
    found = {}
    for path in sorted([*ROOT.rglob("*.md"), *(ROOT / "onnxshrink").rglob("*.py")]):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            content = path.read_text(encoding="utf8")
            if path.suffix == ".py":
                content = "\n\n".join(re.findall(r'"""(.*?)"""', content, re.DOTALL))
            found[str(path.relative_to(ROOT))] = content
    return found


def windows(texts: Mapping[str, str]) -> tuple[Array, Array]:
    """Return windows of token ids to train on and of other files to measure on.

    Tokens are the most frequent words, with the space in front, and all characters.
    """
    pieces = {name: re.findall(r" ?\w+|\W", one) for name, one in texts.items()}
    characters = sorted({char for one in texts.values() for char in one})
    counts = Counter(piece for one in pieces.values() for piece in one)
    words = [word for word, _ in counts.most_common() if len(word) > 1]
    known = {token: i for i, token in enumerate([*characters, *words][:VOCABULARY])}
    split: dict[bool, list[int]] = {False: [], True: []}
    for name, one in pieces.items():
        held = hashlib.sha256(name.encode()).digest()[0] < 26
        for piece in one:
            tokens = [piece] if piece in known else list(piece)
            split[held] += [known.get(token, 0) for token in tokens]
    train, test = (
        np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
        for ids in (split[False], split[True])
    )
    return train, test[:64]


def trained(folder: Path, epochs: int, count: int) -> Path:
    """Train a small decoder with this tool; what was trained before is kept."""
    target = folder / "decoder.onnx"
    train, test = windows(text())
    np.savez(folder / "text.npz", input_ids=test)
    np.savez(folder / "calibration.npz", input_ids=train[-64:])
    if target.exists():
        return target
    train = train[np.random.default_rng(0).permutation(len(train) - 64)[:count]]
    start = folder / "start.onnx"
    proto = decoder(
        layers=3, width=96, heads=6, groups=2, inner=256, vocabulary=VOCABULARY
    )
    for tensor in proto.graph.initializer:
        if tensor.name == "embed":  # small logits at first
            value = onnx.numpy_helper.to_array(tensor) * np.float32(0.1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, "embed"))
    onnx.save(proto, start)
    data = folder / "train.npz"
    np.savez(data, input_ids=train)
    # All of the next token, nothing of any other: plain training on text.
    following = np.roll(train, -1, axis=1)
    values = np.full((*train.shape, 1), 20, np.float32)
    rest = np.zeros(train.shape, np.float32)
    values[:, -1], rest[:, -1] = 0, np.log(VOCABULARY - 1)  # what follows is not known
    answers: dict[str, Any] = {
        "logits/values": values,
        "logits/indices": following[..., None].astype(np.int32),
        "logits/rest": rest,
    }
    np.savez(folder / "next.npz", **answers)
    passes = f"distill:teacher={folder / 'next.npz'},temperature=1,epochs={epochs}"
    _ours(start, target, f"{passes},lr=0.003,batch=16", data)
    return target


# --- making and measuring -------------------------------------------------------------


@dataclass
class Row:
    """One model and what is known of it."""

    name: str
    path: Path
    cpu: float = 0.0
    peak: float = 0.0
    why_not: str = ""


def _waited(command: Sequence[str]) -> tuple[float, float, str]:
    """Run a command; return CPU seconds, largest memory in MB and why it failed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    why = said[-1] if process.returncode and said else ""
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, why


def _ours(source: Path, target: Path, passes: str, data: Path) -> Row:
    needs = "rounding=mse" not in passes and "rounding=hqq" not in passes
    command = [sys.executable, "-m", "onnxshrink", str(source), "-o", str(target)]
    command += ["--passes", passes, "--on-breach", "keep", "--measure", "none"]
    command += ["--threads", "1", "--jobs", "1"]
    command += ["--data", str(data)] if needs else []
    return Row(f"`{passes}`", target, *_waited(command))


def quality(session: Any, ids: Array, best: Array | None) -> tuple[float, float, Array]:
    """Return perplexity, agreement with other best tokens, and the best tokens."""
    lost, tokens = [], []
    for window in ids:
        logits = session.run(["logits"], {"input_ids": window[None]})[0][0]
        tokens.append(logits.argmax(axis=-1))
        rows = logits[:-1].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        total = np.log(np.exp(rows).sum(axis=-1))
        lost.append(total - rows[np.arange(len(rows)), window[1:]])
    found = np.stack(tokens)
    same = float((found == best).mean()) if best is not None else 1.0
    return float(np.exp(np.mean(lost))), same, found


def opened(path: Path) -> Any:
    """Open a model on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def ratios(session: Any, other: Any, ids: Array, tries: int) -> list[float]:
    """Return the CPU time of 1, 64 and 128 tokens as ratios to another session's."""
    found = []
    for length in (1, 64, 128):
        feed = {"input_ids": np.resize(ids.reshape(-1), (1, length))}
        least = [np.inf, np.inf]
        for _ in range(tries):
            for place, one in enumerate((session, other)):
                start = time.process_time()
                one.run(["logits"], feed)
                least[place] = min(least[place], time.process_time() - start)
        found.append(least[0] / least[1])
    return found


def nbytes(path: Path) -> int:
    """Bytes of a model with its external data."""
    return sum(
        one.stat().st_size
        for one in path.parent.iterdir()
        if one.name == path.name or one.name.startswith(f"{path.name}.")
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("decoder", description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--folder", type=Path, help="where models are kept")
    parser.add_argument("--ours", action="append", help="passes, or none")
    parser.add_argument("--file", action="append", type=Path, help="one made before")
    parser.add_argument("--peers", default="all", choices=["all", "none"])
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter of the peers: pip install onnx onnx_ir onnxruntime",
    )
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tries", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--count", type=int, default=1500, help="windows to train on")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        source = options.model or trained(folder, options.epochs, options.count)
        _print(source, folder, options)


def _print(source: Path, folder: Path, options: argparse.Namespace) -> None:
    with np.load(options.text or folder / "text.npz") as data:
        ids = data["input_ids"][: options.windows]
    calibration = options.calibration or folder / "calibration.npz"
    rows = [Row("fp32", source)]
    chosen = [one for one in options.ours or OURS if one != "none"]
    for place, passes in enumerate(chosen):
        rows.append(_ours(source, folder / f"ours-{place}.onnx", passes, calibration))
    rows += [Row(path.name, path) for path in options.file or ()]
    for place, (name, (code, *words)) in enumerate(
        PEERS.items() if options.peers == "all" else ()
    ):
        target = folder / f"peer-{place}.onnx"
        command = [options.python, "-c", code, str(source), str(target), *words]
        rows.append(Row(name, target, *_waited(command)))
    table = Table("", "MB", "perplexity", "agrees", "1", "64", "128", "opening MB")
    table.add_column("CPU s")
    table.add_column("peak MB")
    reference, best = opened(source), None
    for row in rows:
        if row.why_not or not row.path.exists():
            table.add_row(row.name, row.why_not or "not written")
            continue
        try:
            session = opened(row.path)
        except Exception as error:  # onnxruntime's own kinds are not public
            table.add_row(row.name, f"does not load: {str(error)[-90:]}")
            continue
        perplexity, same, tokens = quality(session, ids, best)
        best = tokens if best is None else best
        times = ratios(session, reference, ids, options.tries)
        memory = subprocess.run(
            [sys.executable, "-c", _OPEN, str(row.path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        table.add_row(
            row.name,
            f"{nbytes(row.path) / 1e6:.4g}",
            f"{perplexity:.4g}",
            f"{same:.3f}",
            *(f"{ratio:.2f}" for ratio in times),
            f"{float(memory):.0f}",
            f"{row.cpu:.1f}",
            f"{row.peak:.0f}",
        )
    Console(width=160).print(table)
