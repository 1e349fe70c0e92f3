"""Archives: whatever a file claims, reading it is bounded and ends in a clear error."""

from __future__ import annotations

import bz2
import contextlib
import io
import json
import lzma
import os
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxshrink.errors import ModelError
from onnxshrink.model import ValueInfo
from onnxshrink.samples import Samples
from onnxshrink.samples.archives import open_npy, open_npz, open_safetensors

F32 = onnx.TensorProto.FLOAT
X = np.arange(12, dtype=np.float32).reshape(4, 3)
EVERY = np.arange(4)


def npy(array: np.ndarray = X, header: bytes | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    raw = file.getvalue()
    if header is None:
        return raw
    size = struct.pack("<H", len(header))
    return raw[:8] + size + header + raw[10 + int.from_bytes(raw[8:10], "little") :]


def zipped(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", data)
    return path


HEADERS = [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -3)}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3)}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 12)}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': 12}\n",
    b"{'descr': '<f4', 'fortran_order': False}\n",
    b"{'descr': 'nothing', 'fortran_order': False, 'shape': (4, 3)}\n",
    b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4, 3)}\n",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 3)}\n",
    b"{'descr': '<U99999999999', 'fortran_order': False, 'shape': (4, 3)}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000, 0)}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': ()}\n",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 99 + b")}\n",
    b"((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
    b"'''\n",
    b"\x00\xff\x00",
    b"",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_cannot_be_is_one_clear_error(tmp_path: Path, header: bytes):
    raw = npy(header=header)
    (tmp_path / "d.npy").write_bytes(raw)
    with pytest.raises(ModelError, match=r"d\.npy"):
        open_npy(tmp_path / "d.npy")
    if b"()" not in header:
        with pytest.raises(ModelError, match=r"array 'x'"):
            open_npz(zipped(tmp_path / "d.npz", raw))


def test_headers_of_python_2_and_all_versions_are_read(tmp_path: Path):
    raw = npy(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (4L, 3L)}\n")
    (tmp_path / "d.npy").write_bytes(raw)
    assert np.array_equal(open_npy(tmp_path / "d.npy").rows(EVERY), X)
    for version in [(1, 0), (2, 0), (3, 0)]:
        with (tmp_path / "v.npy").open("wb") as file:
            np.lib.format.write_array(file, X, version)
        assert np.array_equal(open_npy(tmp_path / "v.npy").rows(EVERY), X)


METHODS = [
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
    zipfile.ZIP_BZIP2,
    zipfile.ZIP_LZMA,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_method_gives_the_same_values(tmp_path: Path, method: int, order: str):
    x = np.random.default_rng(0).normal(size=(700, 9))
    path = zipped(tmp_path / "d.npz", npy(np.asarray(x, order=order)), method)  # type: ignore[call-overload]
    column = open_npz(path)["x"]
    assert np.array_equal(
        column.rows(np.array([699, 0, 1, 2, 5])), x[[699, 0, 1, 2, 5]]
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_changed_byte_is_one_clear_error_or_none(tmp_path: Path, method: int):
    x = np.random.default_rng(0).normal(size=(40, 9)).astype(np.float32)
    raw = zipped(tmp_path / "d.npz", npy(x), method).read_bytes()
    random = np.random.default_rng(1)
    path = tmp_path / "e.npz"
    for _ in range(150):
        data = bytearray(raw)
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] = random.integers(256)
        path.write_bytes(data[: random.integers(len(data) // 2, len(data) + 1)])
        with contextlib.suppress(ModelError):
            for column in open_npz(path).values():
                column.rows(np.arange(min(column.count, 40)))


def bomb(path: Path, method: int, claimed: int | None = None) -> Path:
    """2 GB of zeros in a few kB; the archive may say that it is less."""
    size = 2 << 30
    header = (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % (size // 4)
    ).ljust(117) + b"\n"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    if method == zipfile.ZIP_BZIP2:
        packer: bz2.BZ2Compressor | lzma.LZMACompressor = bz2.BZ2Compressor()
        prefix = b""
    else:
        filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16}]
        packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
        prefix = b"\x09\x04\x05\x00" + bytes([93]) + struct.pack("<I", 1 << 16)
    packed = prefix + packer.compress(head)
    zeros = bytes(1 << 24)
    for _ in range(2 if method == zipfile.ZIP_BZIP2 else 1):
        packed += packer.compress(zeros)
    packed += packer.flush()
    name = b"x.npy"
    said = len(head) + size if claimed is None else claimed
    local = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 46, 0, method, 0, 0, 0, len(packed), said, 5, 0
    )
    central = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        *(b"PK\1\2", 46, 46, 0, method, 0, 0, 0, len(packed), said, 5, 0, 0, 0, 0, 0),
        0,
    )
    body = local + name + packed
    end = struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central) + 5, len(body), 0
    )
    path.write_bytes(body + central + name + end)
    return path


LIMITED = """
import resource, sys
from onnxshrink.samples.archives import open_npz
from onnxshrink.errors import ModelError
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_npz(__import__("pathlib").Path(sys.argv[1]))["x"].rows(np.arange(1))
except ModelError as error:
    print(error)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert after - before < 100_000, (before, after)
"""


@pytest.mark.parametrize(
    ("method", "claimed"),
    [
        (zipfile.ZIP_BZIP2, None),
        (zipfile.ZIP_BZIP2, 15 << 20),
        (zipfile.ZIP_LZMA, 5000),
    ],
)
def test_bombs_are_refused_in_little_memory(
    tmp_path: Path, method: int, claimed: int | None
):
    path = bomb(tmp_path / "bomb.npz", method, claimed)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "claims" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path):
    x = np.ones((1000, 64), np.float32)
    np.save(tmp_path / "d.npy", x)
    np.savez(tmp_path / "d.npz", x=x)
    plain = Samples.from_path(tmp_path / "d.npy")
    packed = Samples.from_path(tmp_path / "d.npz")
    for samples, name in ((plain, "d.npy"), (packed, "d.npz")):
        bound = samples.bind([ValueInfo("x", F32, ("N", 64))])
        bound.read([0])
        os.truncate(tmp_path / name, 4096)
        with pytest.raises(ModelError, match="cut short while it was read"):
            bound.read([900])


@pytest.mark.parametrize("name", ["d.npy", "d.npz", "d.pkl", "d.pt"])
def test_pickles_are_refused_in_words(tmp_path: Path, name: str):
    import pickle

    (tmp_path / name).write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(ModelError, match=r"pickle.*never loaded.*numpy\.savez"):
        Samples.from_path(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "d.npz")
    with pytest.raises(ModelError, match="no regular file"):
        Samples.from_path(tmp_path / "d.npz")


def test_safetensors_are_read_without_a_library(tmp_path: Path):
    labels = np.arange(4, dtype=np.int64)
    head = json.dumps(
        {
            "__metadata__": {"format": "np"},
            "x": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]},
            "labels": {"dtype": "I64", "shape": [4], "data_offsets": [48, 80]},
            "h": {"dtype": "BF16", "shape": [4, 1], "data_offsets": [80, 88]},
        }
    ).encode()
    path = tmp_path / "d.safetensors"
    body = X.tobytes() + labels.tobytes() + bytes.fromhex("803f0040404080c0")
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    samples = Samples.from_path(path)
    bound = samples.bind([ValueInfo("x", F32, ("N", 3)), ValueInfo("h", F32, ("N", 1))])
    assert np.array_equal(bound.read(EVERY)["x"], X)
    assert bound.read(EVERY)["h"].tolist() == [[1], [2], [3], [-4]]
    assert bound.labels is not None
    assert bound.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([-4, -3], [0, 48]),
        ([4, 3], [0, 48000]),
        ([4, 3], [48, 0]),
        ([4, 3], [0, 40]),
        ([1 << 60, 0], [0, 0]),
        ([4, 3], "ab"),
        ("4", [0, 48]),
        ([4.0, 3], [0, 48]),
    ],
)
def test_hostile_safetensors_are_refused(
    tmp_path: Path, shape: object, offsets: object
):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    head = json.dumps({"x": entry}).encode()
    path = tmp_path / "d.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + X.tobytes())
    with pytest.raises(ModelError, match="array 'x'"):
        open_safetensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + head)
    with pytest.raises(ModelError, match="header claims"):
        open_safetensors(path)
