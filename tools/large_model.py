"""Write a model of any size from a seed, in pieces: for measuring memory and time.

``python tools/large_model.py OUT.onnx --size 6GB`` writes square MatMul layers with
their weights in OUT.onnx.data; ``--inline`` puts them into OUT.onnx itself, which must
stay below 2 GB. At no time is more than a few megabytes of weights in memory.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

CHUNK = 1 << 20
"""Elements drawn at a time."""
ALIGNMENT = 4096
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "GIB": 2**30, "MIB": 2**20}
TYPES = {
    "float32": (TensorProto.FLOAT, np.dtype(np.float32)),
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}


def parse_size(text: str) -> int:
    """Return bytes for a text such as ``1.5GB``.

    Raises:
        ValueError: It is no number with a known unit.
    """
    match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]*)", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no size; try 6GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def width_for(size: int, layers: int, dtype: str) -> int:
    """Return the side of the square layers that together take about ``size`` bytes."""
    elements = size / layers / TYPES[dtype][1].itemsize
    return max(8, round(math.sqrt(elements) / 8) * 8)


def _values(
    rng: np.random.Generator, width: int, dtype: np.dtype[np.generic]
) -> Iterator[bytes]:
    """Yield one layer that keeps the scale of what it multiplies."""
    left = width * width
    while left:
        count = min(left, CHUNK)
        values = rng.standard_normal(count, np.float32) / np.float32(math.sqrt(width))
        yield values.astype(dtype).tobytes()
        left -= count


def _skeleton(width: int, layers: int, data_type: int) -> onnx.ModelProto:
    infos = [
        helper.make_tensor_value_info(name, data_type, ["N", width])
        for name in ("x", f"h{layers}")
    ]
    nodes = [
        helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"])
        for i in range(layers)
    ]
    graph = helper.make_graph(nodes, "large", infos[:1], infos[1:])
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, ir_version=8, opset_imports=opset)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write(
    path: Path,
    *,
    size: int,
    layers: int = 24,
    dtype: str = "float32",
    seed: int = 0,
    inline: bool = False,
) -> int:
    """Write the model and return the bytes of its weights.

    Args:
        path: The model; external data goes beside it, with ``.data`` behind its name.
        size: Bytes of all weights, about.
        layers: Number of MatMul layers.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        seed: Seed of the weights.
        inline: Keep the weights in the model file; protobuf allows less than 2 GiB.

    Raises:
        ValueError: An inline model of 2 GiB or more.
    """
    data_type, kind = TYPES[dtype]
    width = width_for(size, layers, dtype)
    each: int = width * width * kind.itemsize
    if inline and each * layers >= 2**31 - 2**20:
        raise ValueError(f"{each * layers} bytes do not fit into one file")
    rng = np.random.default_rng(seed)
    model = _skeleton(width, layers, data_type)

    def fill(file: BinaryIO) -> None:
        for piece in _values(rng, width, kind):
            file.write(piece)

    headers = [
        TensorProto(name=f"w{i}", dims=[width, width], data_type=data_type)
        for i in range(layers)
    ]
    if inline:
        graph = model.graph.SerializeToString()
        raw = b"\x4a" + _varint(each)
        records = []
        for header in headers:
            body = header.SerializeToString() + raw
            records.append(b"\x2a" + _varint(len(body) + each) + body)
        model.ClearField("graph")
        length = len(graph) + sum(len(record) + each for record in records)
        with path.open("wb") as file:
            file.write(model.SerializeToString())
            file.write(b"\x3a" + _varint(length) + graph)
            for record in records:
                file.write(record)
                fill(file)
        return each * layers
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        for header in headers:
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            header.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", data.name),
                ("offset", str(file.tell())),
                ("length", str(each)),
            ):
                header.external_data.add(key=key, value=value)
            fill(file)
    model.graph.initializer.extend(headers)
    path.write_bytes(model.SerializeToString())
    return each * layers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=parse_size, default=parse_size("6GB"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", choices=sorted(TYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inline", action="store_true", help="one file, below 2 GiB")
    options = parser.parse_args(arguments)
    try:
        written = write(
            options.out,
            size=options.size,
            layers=options.layers,
            dtype=options.dtype,
            seed=options.seed,
            inline=options.inline,
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {options.layers} layers, {written / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
