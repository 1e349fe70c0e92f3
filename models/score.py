"""Measure the models of this folder on the 10,000 test images with onnxruntime.

Writes ``scores.json``; with ``--check`` compares it with what is measured instead and
exits 1 when they differ. Needs numpy and onnxruntime only.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).parent
SCORES = HERE / "scores.json"
BATCH = 1000


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The protobuf integer at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def integers(data: bytes) -> Iterator[int]:
    """The integers of a packed protobuf field."""
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        yield value


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of every field of a protobuf message."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(message, at)
            yield number, value
            continue
        size, at = varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        yield number, message[at : at + size]
        at += size


def messages(message: bytes, number: int) -> list[bytes]:
    """The messages in one field of a protobuf message."""
    return [v for n, v in fields(message) if n == number and isinstance(v, bytes)]


def opset(model: bytes) -> int:
    """Version of the ONNX operators that a serialized model uses."""
    # ModelProto.opset_import is field 8: a domain (1), which ONNX leaves out, and a
    # version (2).
    found = [dict(fields(entry)) for entry in messages(model, 8)]
    (version,) = [entry[2] for entry in found if not entry.get(1)]
    assert isinstance(version, int)
    return version


def parameters(model: bytes) -> int:
    """Number of values in the initializers of a serialized model."""
    # ModelProto.graph is field 7, GraphProto.initializer field 5, TensorProto.dims
    # field 1, one integer a field or all of them packed into one.
    (graph,) = messages(model, 7)
    total = 0
    for tensor in messages(graph, 5):
        dims = [value for number, value in fields(tensor) if number == 1]
        total += math.prod(
            math.prod(integers(dim)) if isinstance(dim, bytes) else dim for dim in dims
        )
    return total


def errors(model: bytes, images: np.ndarray, labels: np.ndarray) -> int:
    """How many images a serialized model gets wrong."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    wrong = 0
    for at in range(0, len(images), BATCH):
        batch = images[at : at + BATCH, None].astype(np.float32) / 255
        (logits,) = session.run(["logits"], {"image": batch})
        wrong += int((logits.argmax(axis=1) != labels[at : at + BATCH]).sum())
    return wrong


def measure() -> dict[str, dict[str, float]]:
    """The scores of every model of this folder, by name."""
    with np.load(HERE / "mnist.npz") as data:
        images, labels = data["test_x"], data["test_y"]
    scores: dict[str, dict[str, float]] = {}
    for path in sorted(HERE.glob("*.onnx")):
        model = path.read_bytes()
        wrong = errors(model, images, labels)
        scores[path.stem] = {
            "test_errors": wrong,
            "top1_percent": round(100 * (1 - wrong / len(images)), 2),
            "parameters": parameters(model),
            "bytes": len(model),
            "opset": opset(model),
        }
    return scores


def main() -> None:
    """Write the scores, or hold the written ones to what is measured."""
    parser = argparse.ArgumentParser(description="Measure the models of this folder.")
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    measured = measure()
    for name, score in measured.items():
        print(f"{name:15}", *(f"{key} {value}" for key, value in score.items()))
    if not check:
        SCORES.write_text(json.dumps(measured, indent=2) + "\n")
        return
    stored = json.loads(SCORES.read_text())
    wrong = sorted(
        name
        for name in stored.keys() | measured.keys()
        if stored.get(name) != measured.get(name)
    )
    if wrong:
        sys.exit(f"{SCORES.name} differs from what was measured: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
