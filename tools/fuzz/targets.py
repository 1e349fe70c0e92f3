"""What is fuzzed: whole files of each kind, and what reads them."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

__all__ = ["TARGETS", "Target", "changed"]

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF)


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        whole: Files that are sound: where they lie while they are read, and content.
        read: Reads one.
        words: Pieces of text that are put in.
    """

    whole: Sequence[tuple[Path, bytes]]
    read: Callable[[Path], object]
    words: Sequence[bytes] = ()


def changed(
    data: bytes, random: np.random.Generator, words: Sequence[bytes] = ()
) -> bytes:
    """Return data with one to three small changes."""
    found = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(found) + 1))
        kind = int(random.integers(8))
        stop = min(len(found), at + int(random.integers(1, 9)))
        if kind == 0:
            found[at:stop] = b""
        elif kind == 1:
            found[at:at] = found[at:stop] * int(random.integers(1, 4))
        elif kind == 2 and random.random() < 0.2:
            del found[at:]
        elif kind == 3 and at < len(found):
            found[at] ^= 1 << int(random.integers(8))
        elif kind == 4 and at < len(found):
            found[at] = _NUMBERS[random.integers(len(_NUMBERS))]
        elif kind == 5 and at + 4 <= len(found):
            number = int(random.integers(-(2**31), 2**31))
            found[at : at + 4] = struct.pack("<i", number)
        elif kind == 6 and words:
            found[at:stop] = words[int(random.integers(len(words)))]
        else:
            found[at:stop] = random.integers(0, 256, stop - at, np.uint8).tobytes()
    return bytes(found)


def _data(folder: Path) -> Target:
    from onnxshrink.errors import ModelError
    from onnxshrink.samples.sources import open_arrays

    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x": random.normal(size=(6, 3)).astype(np.float32),
        "labels": np.arange(6),
        "text": np.array(["a", "b", "c", "d", "e", "f"]),
    }
    whole = []
    for method in (0, 8, 12, 14):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            for name, array in arrays.items():
                piece = io.BytesIO()
                np.save(piece, array)
                archive.writestr(f"{name}.npy", piece.getvalue())
        whole.append((folder / "d.npz", packed.getvalue()))
    for order in ("C", "F"):
        plain = io.BytesIO()
        np.save(plain, np.asarray(arrays["x"], order=order))
        whole.append((folder / "d.npy", plain.getvalue()))
    head = json.dumps(
        {"x": {"dtype": "F32", "shape": [6, 3], "data_offsets": [0, 72]}}
    ).encode()
    tensors = struct.pack("<Q", len(head)) + head + arrays["x"].tobytes()
    whole.append((folder / "d.safetensors", tensors))
    whole.append((folder / "d.csv", b'a,b,label\n1,2.5,0\n"3",4,1\n5,-6e3,2\n'))
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        pass
    else:
        table = pyarrow.table({"x": [[1.0, 2.0], [3.0]], "label": [0, 1]})
        written = io.BytesIO()
        parquet.write_table(table, written)
        whole.append((folder / "d.parquet", written.getvalue()))

    def read(path: Path) -> None:
        for column in open_arrays(path).values():
            if column.count:
                try:
                    column.rows(np.arange(min(column.count, 6)))
                except ModelError:
                    if column.kinds is None:
                        raise

    words = (b"-1", b"9" * 30, b"(", b"'", b"\\", b"|O", b"<U99", b",", b"nan", b"[[[")
    return Target(whole, read, words)


def _recipes(folder: Path) -> Target:
    from onnxshrink.pipeline import Pipeline

    whole = [
        (
            folder / "r.toml",
            b'description = "x"\n[budget]\nmax_drop = 0.5\n[[pass]]\nname = "fold"\n'
            b'[[pass]]\nname = "prune"\nsparsity = 0.8\nonly = ["a", "b*"]\n',
        ),
        (
            folder / "r.txt",
            b"fold,prune:sparsity=0.8,scope=global,quantize distill:lr=1e-3",
        ),
    ]

    def read(path: Path) -> None:
        if path.suffix == ".toml":
            Pipeline.from_toml(path)
            return
        text = path.read_bytes().decode("utf-8", "replace")
        Pipeline.parse(str(Pipeline.parse(text)))

    words = (b"=", b"[[pass]]", b"1e999", b"-", b"a.b.c", b"{", b"nan", b":", b"skip=")
    return Target(whole, read, words)


def _state(folder: Path) -> Target:
    from onnxshrink.measuring.measure import Stats
    from onnxshrink.reporting.report import Report, Step
    from onnxshrink.state import SavedRun, StateFolder
    from onnxshrink.validation import Verdict

    run = {"input": ["ab"], "seed": 0, "pipeline": "fold"}
    place = folder / "state"
    place.mkdir()
    stats = Stats(100, 10, 5, 20, 0.5, None, None)
    step = Step("fold", {"a": 1}, True, "ok", 0.5, stats, stats, Verdict(ok=True))
    (place / "0-m.onnx").write_bytes(b"model")
    StateFolder(place, run).write(
        SavedRun(1, None, {"values": {}}, None, stats, [step])
    )
    report = Report("m", "0", "fold", 0, stats, (step,), stats)
    files = [
        (place / "state.json", (place / "state.json").read_bytes()),
        (folder / "report.json", json.dumps(report.to_json()).encode()),
    ]

    def read(path: Path) -> None:
        if path.name == "state.json":
            StateFolder(place, run).read(2)
            return
        from onnxshrink.errors import UsageError

        try:
            said = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UsageError("no JSON") from error
        Report.from_json(said)

    words = (
        b"null",
        b"-1",
        b"[]",
        b"{}",
        b'""',
        b"1e999",
        b"NaN",
        b'"../x"',
        b"[" * 99,
    )
    return Target(files, read, words)


def _models(folder: Path) -> Target:
    from onnxshrink.model import Model

    text = """
    <ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (bool c, float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> {
        v = Identity (w)
        h = local.scale (x, v)
        y = If (c) <
            then_branch = one () => (float[N,2] a) { a = Mul (h, v) },
            else_branch = two () => (float[N,2] e) {
                k = Constant <value = float[2] {5, 6}> () e = Add (h, k) }
        >
    }
    <domain: "local", opset_import: ["": 21]>
    scale (a, f) => (r) { g = Identity (f) r = Mul (a, g) }
    """
    proto = onnx.parser.parse_model(text)
    plain = folder / "m.onnx"
    whole = [(plain, proto.SerializeToString()), (folder / "m.onnxtxt", text.encode())]
    onnx.save(proto, plain)
    packed = folder / "m.onnxz"
    Model.load(plain).save(packed)
    whole.append((packed, packed.read_bytes()))

    def read(path: Path) -> None:
        model = Model.load(path)
        for weight in model.weights():
            if weight.nbytes < 1 << 20:
                weight.read()
        model.to_bytes()

    return Target(
        whole, read, (b"Loop", b"\xff\xff\xff\xff\x0f", b"Add", b"{", b"9" * 20)
    )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "data": _data,
    "recipes": _recipes,
    "state": _state,
    "models": _models,
}
