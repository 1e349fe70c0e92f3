"""Measurement: bytes, parameters, multiply-accumulates, latency, memory of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.isolation.host import HostedSession, SessionHost
from onnxshrink.isolation.turns import in_turns
from onnxshrink.model import Model, Node, Weight
from onnxshrink.runtime import file_bytes
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure.shapes import macs

__all__ = ["Stats", "count_parameters", "file_bytes", "latencies", "measure"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stats:
    """What a model costs; ``None`` stands for what was not measured.

    Attributes:
        file_bytes: Bytes on disk, external data included.
        parameters: Values of weights that nodes read.
        nonzeros: How many of them are not zero.
        macs: Multiply-accumulates for one sample.
        latency_ms: Median time of a run on one sample.
        latency_ratio: Median of the time over the baseline's, run in turns.
        peak_memory_bytes: Most memory that opening a session takes.
        metric: Quality by name, such as ``top1``, ``agreement``, ``sqnr_db``.
    """

    file_bytes: int
    parameters: int
    nonzeros: int
    macs: int | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    peak_memory_bytes: int | None = None
    metric: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the figures for a report."""
        return {**dataclasses.asdict(self), "metric": dict(self.metric)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stats:
        """Read what ``to_json`` gave."""
        return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})


def measure(
    path: Path,
    samples: Splits | Samples | Mapping[str, Array] | None = None,
    *,
    baseline: Path | None = None,
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    latency: bool = True,
    memory: bool = True,
    host: SessionHost | None = None,
) -> Stats:
    """Measure a written model.

    Args:
        path: The file.
        samples: What to run it on: the first sample counts. Without any, neither MACs
            nor latency are measured.
        baseline: Model whose latency is compared, run in turns with this one.
        threads: onnxruntime's threads.
        providers: onnxruntime's execution providers.
        latency: Whether to measure latency.
        memory: Whether to measure the memory of loading, in a process of its own.
        host: Where sessions are; ``None`` for this process.

    Raises:
        ModelError: The file cannot be read, or cannot run on the samples.
    """
    path = Path(path)
    model = Model.load(path, check=False)
    parameters, nonzeros = count_parameters(model)
    feed = _first(samples)
    milliseconds = ratio = None
    if latency and feed is not None:
        opened = runtime.session if host is None else host.session
        session = opened(path, threads=threads, providers=providers)
        other = None
        if baseline is not None:
            other = opened(baseline, threads=threads, providers=providers)
        try:
            milliseconds, ratio = latencies(session, other, feed)
        except ModelError as error:
            hint = _hint(samples)
            raise ModelError(f"{error}{hint}") from error
    cost = None
    if memory:
        cost = runtime.load_cost(path, threads=threads, providers=providers)
    total = None if feed is None else macs(model, feed)
    count = 1 if feed is None else _count(model, samples, feed)
    return Stats(
        file_bytes=file_bytes(path),
        parameters=parameters,
        nonzeros=nonzeros,
        macs=None if total is None else total // count,
        latency_ms=milliseconds,
        latency_ratio=ratio,
        peak_memory_bytes=None if cost is None else cost.peak_memory_bytes,
    )


def _first(
    samples: Splits | Samples | Mapping[str, Array] | None,
) -> Mapping[str, Array] | None:
    """Return the feed of the first sample, or the fewest the model takes at once."""
    if isinstance(samples, Splits):
        samples = samples.evaluation or samples.calibration
    if isinstance(samples, Samples):
        return samples.read(np.arange(samples.batch or 1)) if samples.used else None
    return samples


def _count(model: Model, samples: object, feed: Mapping[str, Array]) -> int:
    """Return how many samples a feed holds; of random inputs, by their symbols."""
    if isinstance(samples, Splits):
        samples = samples.evaluation or samples.calibration
    if not isinstance(samples, Samples):
        return 1
    if not samples.whole:
        return samples.batch or 1
    counts = {
        feed[info.name].shape[0]
        for info in model.inputs
        if info.shape and not isinstance(info.shape[0], int) and info.name in feed
    }
    return max(1, counts.pop()) if samples.random and len(counts) == 1 else 1


def _hint(samples: object) -> str:
    if isinstance(samples, Splits):
        samples = samples.evaluation
    return samples.hint if isinstance(samples, Samples) else ""


# --- parameters -------------------------------------------------------------------

_FLOATS = frozenset(
    getattr(onnx.TensorProto, name)
    for name in (
        "FLOAT",
        "DOUBLE",
        "FLOAT16",
        "BFLOAT16",
        "FLOAT8E4M3FN",
        "FLOAT8E4M3FNUZ",
        "FLOAT8E5M2",
        "FLOAT8E5M2FNUZ",
        "FLOAT4E2M1",
    )
    if hasattr(onnx.TensorProto, name)
)
_CODES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
)
_QUANTIZED: Mapping[str, Mapping[int, int]] = {
    "DequantizeLinear": {0: 2},
    "QLinearConv": {3: 5},
    "QLinearMatMul": {0: 2, 3: 5},
    "QGemm": {3: 5},
    "ConvInteger": {1: 3},
    "MatMulInteger": {0: 2, 1: 3},
    "MatMulIntegerToFloat": {1: 5},
    "DynamicQuantizeMatMul": {1: 3},
    "GatherBlockQuantized": {0: 3},
}
"""Operators that read integers as weights: input of the weight -> its zero point."""
_SCALES: Mapping[str, frozenset[int]] = {
    "DequantizeLinear": frozenset({1}),
    "QuantizeLinear": frozenset({1}),
    "QLinearConv": frozenset({1, 4, 6}),
    "QLinearMatMul": frozenset({1, 4, 6}),
    "MatMulNBits": frozenset({2}),
}
"""Inputs that hold scales, which are part of the encoding and no parameters."""


def count_parameters(model: Model) -> tuple[int, int]:
    """Return the number of parameters and how many of them are not zero.

    Parameters are values of float initializers and constants that a node reads, and of
    integer ones read as quantized weights; scales, zero points, shapes, indices and
    scalars are not. A weight that is stored once counts once. A quantized value counts
    as zero where it equals its zero point.
    """
    parameters = nonzeros = 0
    for weight in model.weights():
        if not weight.shape:
            continue
        uses = weight.uses
        if not uses and not weight.is_output:
            continue
        if weight.data_type in _FLOATS:
            if uses and all(
                index in _SCALES.get(node.op, frozenset()) or _scales_codes(node, index)
                for node, index in uses
            ):
                continue
            parameters += weight.size
            nonzeros += sum(_nonzeros(chunk) for chunk in weight.chunks())
            continue
        for node, index in uses:
            if node.op == "MatMulNBits" and index == 1:
                count = int(node.attrs["K"]) * int(node.attrs["N"])
                parameters += count
                nonzeros += min(count, _packed_nonzeros(model, node, weight))
                break
            if index in _QUANTIZED.get(node.op, {}):
                zero = _QUANTIZED[node.op][index]
                parameters += weight.size
                nonzeros += _quantized_nonzeros(model, node, zero, weight)
                break
            if _is_decoded_by_cast(node, index, weight):
                parameters += weight.size
                nonzeros += sum(_nonzeros(chunk) for chunk in weight.chunks())
                break
    return parameters, nonzeros


def _scales_codes(node: Node, index: int) -> bool:
    """Whether an input of Mul is the scale of codes that Cast made floats of."""
    if node.op != "Mul":
        return False
    made = node.inputs[1 - index].inputs
    if made and made[0].op == "Sub":
        made = made[0].inputs[0].inputs
    if not made or made[0].op != "Cast":
        return False
    cast = made[0].inputs[0]
    codes = cast.inputs[0].inputs[0] if cast.inputs else cast
    kind = codes.dtype
    return isinstance(codes, gs.Constant) and np.dtype(kind) in (np.int8, np.uint8)


def _is_decoded_by_cast(node: Node, index: int, weight: Weight) -> bool:
    """Whether codes become floats by Cast, all of them or the rows that are asked for.

    That is how codes are written that fold to floats when a model is loaded.
    """
    if index or weight.data_type not in _CODES:
        return False
    if node.op == "Gather":
        return any(
            _is_decoded_by_cast(reader, 0, weight)
            for reader in node.outputs[0].outputs
            if reader.op != "Gather"
        )
    return node.op == "Cast" and node.attrs.get("to") in _FLOATS


def _nonzeros(values: Array) -> int:
    if values.dtype.kind != "V" and values.dtype.isbuiltin == 1:
        return int(np.count_nonzero(values))
    return int(np.count_nonzero(values.astype(np.float32)))


def _quantized_nonzeros(
    model: Model, node: Any, zero_input: int, weight: Weight
) -> int:
    """Count what differs from the zero point; unusual zero points count as 0."""
    zero: Array | None = None
    if zero_input < len(node.inputs):
        known = model.constant(node.inputs[zero_input])
        if known is not None and known.size:
            zero = known.read()
    if zero is None or not zero.astype(np.float32).any():
        return sum(_nonzeros(chunk) for chunk in weight.chunks())
    if zero.size == 1:
        point = zero.reshape(-1)[0]
        return sum(int((chunk != point).sum()) for chunk in weight.chunks())
    values = weight.read().astype(np.int32)
    axis = int(node.attrs.get("axis", 0 if "Conv" in node.op else -1))
    if node.op == "DequantizeLinear":
        axis = int(node.attrs.get("axis", 1))
    if zero.ndim == 1 and zero.size == values.shape[axis]:
        shape = [1] * values.ndim
        shape[axis] = -1
        return int((values != zero.astype(np.int32).reshape(shape)).sum())
    if zero.ndim == values.ndim:
        repeat = -(-values.shape[axis] // zero.shape[axis])
        full = np.repeat(zero.astype(np.int32), repeat, axis)
        full = np.take(full, np.arange(values.shape[axis]), axis)
        if full.shape == values.shape:
            return int((values != full).sum())
    return int(np.count_nonzero(values))


def _packed_nonzeros(model: Model, node: Any, weight: Weight) -> int:
    """Count the values of a MatMulNBits weight that are not its zero point.

    The padding behind the last block's values counts as zero only if it holds the zero
    point, as onnxruntime's own quantizer writes it.
    """
    bits = int(node.attrs.get("bits", 4))
    data = weight.read().reshape(-1).view(np.uint8)
    if bits not in (2, 4, 8) or (len(node.inputs) > 3 and node.inputs[3].name):
        return int(node.attrs["K"]) * int(node.attrs["N"])
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    values = (data[:, None] >> shifts) & ((1 << bits) - 1)
    return int((values != 1 << (bits - 1)).sum())


# --- latency ----------------------------------------------------------------------


def latencies(
    session: runtime.Session,
    baseline: runtime.Session | None,
    feed: Mapping[str, Array],
    baseline_feed: Mapping[str, Array] | None = None,
) -> tuple[float, float | None]:
    """Time a session, in turns with a baseline so that noise meets both.

    See ``isolation.turns.in_turns``; sessions of a host are timed in its child.

    Args:
        session: What is timed.
        baseline: What it is compared with.
        feed: Inputs of both.
        baseline_feed: Inputs of the baseline, where it takes others.

    Returns:
        Median milliseconds of a run, and the median over pairs of the ratio to the
        baseline, or ``None`` without one.

    Raises:
        ModelError: A run fails.
    """
    given = feed if baseline_feed is None else baseline_feed
    if isinstance(session, HostedSession) and (
        baseline is None or isinstance(baseline, HostedSession)
    ):
        return session.timed(feed, baseline, given)
    session.check(feed)
    runs = [partial(session.seconds, feed)]
    if baseline is not None:
        baseline.check(given)
        runs.append(partial(baseline.seconds, given))
    # A package is open in this process, and what it is compared with in the child.
    here = not any(isinstance(one, HostedSession) for one in (session, baseline))
    return in_turns(runs, here=here)
