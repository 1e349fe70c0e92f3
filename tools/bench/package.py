"""Packages against zstd, xz, brotli and ZipNN: bytes, and how fast they are read.

Three tables. First, each model as it is, its floats as fp16 and as bf16, and with
weights of 16 values of which 90 % are zero: bytes of the package (and of the tiny one)
and of the same file in general compressors, as shares of the file, and CPU seconds.
Second, tensors of four million numbers: bits a number, and decoded numbers a second on
one core, beside `constriction` with one model for all of them. Third, how each model
loads: the plain file, the file with encodings in the graph, the package, in processes
of their own, in turn.

Peers are measured if they are installed: pip install zstandard brotli zipnn
constriction (ZipNN needs torch).
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink.model import Model
from onnxshrink.package import Package, forms, pack_bytes, reading
from tools.bench.storage import costs, pruned

Array = np.ndarray[Any, Any]
_COUNT = 1 << 22


def seconds(work: Callable[[], Any], rounds: int = 1) -> tuple[float, Any]:
    """Return the least CPU time of a few rounds, and the result."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        times.append(time.process_time() - start)
    return min(times), result


def module(name: str) -> Any:
    """Return a peer, or ``None`` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed; its column is left out (pip install {name})")
        return None


Peer = Callable[[bytes, str], tuple[int, float, float]]
"""Takes a file and its kind of weights; gives bytes, CPU seconds to write and read."""

_ZIPNN = """
import sys, time, warnings
warnings.simplefilter("ignore")
import zipnn
options = {"bytearray_dtype": sys.argv[1], "input_format": "byte", "threads": 1}
data = sys.stdin.buffer.read()
start = time.process_time()
# It works in place: on a copy.
coded = bytes(zipnn.ZipNN(**options).compress(bytearray(data)))
middle = time.process_time()
back = zipnn.ZipNN(**options).decompress(coded)
end = time.process_time()
assert bytes(back) == data
print(len(coded), middle - start, end - middle)
"""


def timed(
    data: bytes, write: Callable[[bytes], bytes], read: Callable[[bytes], bytes]
) -> tuple[int, float, float]:
    """Return bytes, and CPU seconds to write and to read."""
    writing, coded = seconds(partial(write, data))
    reading_, back = seconds(partial(read, coded), 3)
    assert back == data
    return len(coded), writing, reading_


def peers() -> dict[str, Peer]:
    """Return the peers that are installed, by name."""
    found: dict[str, Peer] = {}
    if (zstd := module("zstandard")) is not None:
        found["zstd -19"] = lambda data, kind: timed(
            data,
            zstd.ZstdCompressor(level=19).compress,
            zstd.ZstdDecompressor().decompress,
        )
    best = lzma.PRESET_EXTREME | 9
    found["xz -9e"] = lambda data, kind: timed(
        data, partial(lzma.compress, preset=best), lzma.decompress
    )
    if (brotli := module("brotli")) is not None:
        # Quality 11 takes minutes for models of 10 MB and more.
        found["brotli"] = lambda data, kind: timed(
            data,
            partial(
                brotli.compress, quality=11 if len(data) < 1 << 20 else 9, lgwin=24
            ),
            brotli.decompress,
        )
    if importlib.util.find_spec("zipnn") is not None:
        found["ZipNN"] = with_zipnn
    return found


def with_zipnn(data: bytes, kind: str) -> tuple[int, float, float]:
    """Run ZipNN in a process of its own: 0.5 ends some with a double free."""
    width = {"bf16": "bfloat16", "fp16": "float16"}.get(kind, "float32")
    done = subprocess.run(
        [sys.executable, "-c", _ZIPNN, width],
        input=data,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        return 0, 0.0, 0.0
    size, writing, reading_ = done.stdout.split()
    return int(size), float(writing), float(reading_)


def variants(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield kinds of weights and the bytes of the model with them."""
    yield "fp32", path.read_bytes()
    kinds = (
        ("fp16", np.float16, onnx.TensorProto.FLOAT16),
        ("bf16", ml_dtypes.bfloat16, onnx.TensorProto.BFLOAT16),
    )
    for name, dtype, data_type in kinds:
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                with np.errstate(over="ignore"):
                    values = numpy_helper.to_array(tensor).astype(dtype)
                twin = onnx.TensorProto(
                    name=tensor.name, dims=tensor.dims, data_type=data_type
                )
                twin.raw_data = values.tobytes()
                tensor.CopyFrom(twin)
        yield name, proto.SerializeToString()
    yield "16", pruned(Model.load(path), 0.9, 16).to_bytes()


def packed(data: bytes) -> bytes:
    """Return the package of a file."""
    return b"".join(pack_bytes(data))


def unpacked(coded: bytes) -> bytes:
    """Return the file of a package."""
    package = Package(coded)
    return b"".join(bytes(chunk) for chunk in package.stream(package.files[0]))


def block(coded: bytes, count: int) -> Array:
    """Return the bytes of a coded block."""
    return forms.decode_block(reading.Reader(coded), count)


def lossless(paths: Sequence[Path], tiny: bool, wanted: Sequence[str]) -> Table:
    """Return the table of bytes."""
    others = peers()
    table = Table(title="share of the file; CPU s to write / MB a CPU second read back")
    for column in ("model", "weights", "bytes", "package", *(["tiny"] if tiny else [])):
        table.add_column(column, justify="right")
    for name in others:
        table.add_column(name, justify="right")
    for path in paths:
        for kind, data in variants(path):
            if kind not in wanted:
                continue
            cells = [path.parent.name if path.stem == "model" else path.stem, kind]
            cells.append(f"{len(data):,}")
            writing, coded = seconds(partial(packed, data))
            reading_, back = seconds(partial(unpacked, coded), 3)
            assert back == data
            rate = len(data) / 1e6 / max(reading_, 1e-6)
            cells.append(f"{len(coded) / len(data):.4f} {writing:.1f}/{rate:.0f}")
            if tiny:
                size = sum(map(len, pack_bytes(data, tiny=True)))
                cells.append(f"{size / len(data):.4f}")
            for peer in others.values():
                size, writing, reading_ = peer(data, kind)
                rate = len(data) / 1e6 / max(reading_, 1e-6)
                share = f"{size / len(data):.4f} {writing:.1f}/{rate:.0f}"
                cells.append(share if size else "crashed")
            table.add_row(*cells)
    return table


def tensors() -> Iterator[tuple[str, Array, bool]]:
    """Yield a name, four million numbers in rows of 1024, and whether they float."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(_COUNT) * 0.05).astype(np.float32)
    yield "fp32", values, True
    yield "bf16", values.astype(ml_dtypes.bfloat16), True
    yield "int8", np.clip(np.rint(values * 600), -127, 127).astype(np.int8), False
    codes = np.clip(np.rint(values * 60), -8, 7).astype(np.int8)
    yield "16 codes", codes, False
    kept = np.abs(values) > np.quantile(np.abs(values), 0.9)
    yield "90 % zeros, 16 codes", np.where(kept, codes, 0).astype(np.int8), False
    table = (np.arange(16) - 7.5).astype(np.float32) * np.float32(0.0123)
    yield "16 values in fp32", table[codes + 8], True
    scale = np.exp(rng.normal(-3, 1, (_COUNT // 1024, 1)))
    density = np.clip(scale * np.exp(rng.normal(0, 1, (1, 1024))), 0, 1)
    mask = rng.random(density.shape) < density
    yield (
        "rows and columns differ, 16 values",
        np.where(mask, table[codes + 8].reshape(mask.shape), np.float32(0)).reshape(-1),
        True,
    )


def speeds() -> Table:
    """Return the table of speeds."""
    table = Table(title=f"{_COUNT:,} numbers, one core, decoded")
    columns = "numbers|bits|entropy|M numbers/s|MB/s|constriction, M numbers/s"
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    peer = module("constriction")
    for name, array, floating in tensors():
        raw = np.frombuffer(array.tobytes(), np.uint8)
        layout = forms.Layout(array.itemsize, floating, 1024)
        coded = forms.encode_block(raw, layout)
        taken, back = seconds(partial(block, coded, raw.size), 5)
        assert np.array_equal(back, raw)
        distinct, places = np.unique(
            array.view(f"u{array.itemsize}"), return_inverse=True
        )
        other = bound = "-"
        if distinct.size <= 256:
            share = np.bincount(places) / places.size
            bound = f"{-(share * np.log2(share)).sum():.3f}"
            if peer is not None:
                kind = peer.stream.model.Categorical(
                    share.astype(np.float32), perfect=False
                )
                coder = peer.stream.stack.AnsCoder()
                coder.encode_reverse(places.astype(np.int32), kind)
                words = coder.get_compressed()

                def decode(words: Array = words, kind: Any = kind) -> Any:
                    return peer.stream.stack.AnsCoder(words).decode(kind, _COUNT)

                other = f"{_COUNT / 1e6 / seconds(decode, 3)[0]:.0f}"
        table.add_row(
            name,
            f"{8 * len(coded) / array.size:.3f}",
            bound,
            f"{array.size / 1e6 / taken:.0f}",
            f"{raw.size / 1e6 / taken:.0f}",
            other,
        )
    return table


def loading(paths: Sequence[Path], rounds: int) -> Table:
    """Return the table of load time and memory."""
    table = Table(title="a session opened: bytes, ms, peak MB")
    for column in ("model", "weights", "plain", "encoded", "package"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            model = Model.load(path)
            for kind, twin in (("fp32", model), ("90 %, 16", pruned(model, 0.9, 16))):
                files = [Path(folder) / f"m{n}.onnx" for n in (0, 1)]
                files.append(Path(folder) / "m.onnxz")
                twin.save(files[0], storage="plain", external="never")
                twin.save(files[1], storage="auto", external="never")
                twin.save(files[2])
                cells = [
                    f"{file.stat().st_size:,}  {cost[0] * 1e3:.0f}  {cost[1] / 1e6:.0f}"
                    for file, cost in zip(files, costs(files, rounds), strict=True)
                ]
                name = path.parent.name if path.stem == "model" else path.stem
                table.add_row(name, kind, *cells)
    return table


def main(arguments: Sequence[str]) -> None:
    """Print the tables for the models named, or for those that ship."""
    parser = argparse.ArgumentParser(prog="tools/bench package", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--tiny", action="store_true", help="measure tiny, too")
    parser.add_argument(
        "--weights",
        default="fp32,fp16,bf16,16",
        metavar="KINDS",
        help="kinds of weights, of fp32, fp16, bf16 and 16 (90 %% zeros, 16 values)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="loads of each file")
    parser.add_argument(
        "--only", choices=["bytes", "speed", "load"], help="one of the tables"
    )
    options = parser.parse_args(arguments)
    shipped = Path(__file__).parents[2] / "models"
    paths = options.models or [
        shipped / f"{name}.onnx" for name in ("lenet-5", "residual-cnn", "vit")
    ]
    console = Console(width=170)
    if options.only in (None, "bytes"):
        console.print(lossless(paths, options.tiny, options.weights.split(",")))
    if options.only in (None, "speed"):
        console.print(speeds())
    if options.only in (None, "load"):
        console.print(loading(paths, options.rounds))
