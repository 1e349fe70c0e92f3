"""Which 8-bit types are fast and exact where, and whether a layer's sums saturate.

x86 processors without VNNI multiply 8-bit integers with VPMADDUBSW, which adds two
products of an unsigned and a signed byte in 16 bits and clips the sum: with codes of
255 and 127, 64770 becomes 32767. ``PROCESSORS`` says where that happens, ``saturation``
whether it does for a layer's codes, and ``headroom`` how far to narrow them.

Everything here is a fixed table or arithmetic, so that what a pass writes never depends
on a stopwatch. Timings are in ``onnxshrink.measuring.timings`` and opt-in.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.errors import UsageError, nearest
from onnxshrink.statistics import (
    ChannelNorm,
    ConvNorm,
    ConvSample,
    Sample,
    Statistic,
)
from onnxshrink.structure.layers import LinearWeight

__all__ = [
    "NAMES",
    "PROCESSORS",
    "Cpu",
    "Processor",
    "Saturation",
    "adds_pairs",
    "detect",
    "headroom",
    "kernel_order",
    "resolve",
    "sampled",
    "saturation",
]

Name = Literal["auto", "avx2", "vnni", "arm", "gpu", "any"]
Codes = NDArray[Any]
Float64 = NDArray[np.float64]

_INT8, _UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
_TOP = 32767
"""Largest sum of two products that VPMADDUBSW holds."""
_LOST = 1e-3
"""Share of an output's deviation that clipping may take away: about a tenth of what
rounding 8-bit activations costs."""
_ROWS = 256
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Processor:
    """The rules for one kind of processor.

    Attributes:
        name: What one types.
        activation: Data type of activations, as in ``TensorProto``.
        weight: Data type of weights.
        symmetric_activations: Whether the zero point of activations has to be 0.
        saturation: ``never``: sums are exact. ``data``: sums may clip on this
            processor. ``bound``: sums may clip on some processor, and this one is not
            known. The static and dynamic forms narrow weights in both cases until no
            input could clip: each output gives up what it must and no more. That lost
            no accuracy against a test on the calibration data, and it holds for inputs
            that calibration did not see.
        note: What was taken for granted, for a report.
    """

    name: str
    activation: int
    weight: int
    symmetric_activations: bool
    saturation: Literal["never", "data", "bound"]
    note: str


def _processor(name: str, activation: int, saturation: str, note: str) -> Processor:
    return Processor(
        name=name,
        activation=activation,
        weight=_INT8,
        symmetric_activations=name == "gpu",
        saturation=cast(Literal["never", "data", "bound"], saturation),
        note=note,
    )


# Sources: onnxruntime's "Quantize ONNX models", sections "Data type selection", "When
# and why do I need to try U8U8?" and "When to use reduce-range" (AVX2 and AVX512 use
# VPMADDUBSW for U8S8 and clip; VNNI and ARM do not; GPUs take S8S8 only). onnxruntime
# turns S8S8 into U8S8 on x86, so that S8 activations clip there too.
PROCESSORS: Mapping[str, Processor] = {
    one.name: one
    for one in (
        _processor(
            "avx2",
            _UINT8,
            "data",
            "x86 without VNNI: uint8 activations, int8 weights, narrowed where a "
            "16-bit sum could clip for any activations",
        ),
        _processor("vnni", _UINT8, "never", "x86 with VNNI: uint8 activations, 8 bits"),
        # MLAS has kernels of signed activations and weights with SDOT, and of
        # symmetric convolutions (microsoft/onnxruntime#9772).
        _processor("arm", _INT8, "never", "ARM: int8 activations and weights, 8 bits"),
        # TensorRT takes zero points of 0 only.
        _processor("gpu", _INT8, "never", "GPU: int8 everywhere, zero points 0"),
        _processor(
            "any",
            _UINT8,
            "bound",
            "any CPU: uint8 activations, int8 weights that cannot clip 16-bit sums",
        ),
    )
}
NAMES: tuple[str, ...] = ("auto", *PROCESSORS)


# --- this machine -----------------------------------------------------------------


@dataclass(frozen=True)
class Cpu:
    """What is known of a processor.

    Attributes:
        model: Its name.
        machine: Its architecture as ``platform.machine`` says.
        target: The rules for it.
        known: Whether its instructions could be read; otherwise ``target`` is the
            careful choice.
    """

    model: str
    machine: str
    target: str
    known: bool


_X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})


def detect(cpuinfo: str | None = None, machine: str | None = None) -> Cpu:
    """Describe the processor that this process runs on.

    Args:
        cpuinfo: Text in the form of ``/proc/cpuinfo``; read from there if ``None``.
        machine: Architecture; ``platform.machine()`` if ``None``.
    """
    if machine is None:
        machine = platform.machine()
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            cpuinfo = ""
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    model = named.group(1).strip() if named else platform.processor() or machine
    if machine.lower() not in _X86:
        # 32-bit ARM has neither SDOT nor clipping; the rules hold for it as well.
        arm = machine.lower().startswith(("aarch64", "arm"))
        return Cpu(model, machine, "arm" if arm else "any", arm)
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    words = frozenset(flags.group(1).split()) if flags else frozenset()
    # MLAS (platform.cpp) takes its AVX512 kernels before those for AVX-VNNI.
    exact = "avx512_vnni" if words >= _AVX512 else "avx_vnni"
    return Cpu(model, machine, "vnni" if exact in words else "avx2", bool(words))


def resolve(name: str) -> tuple[Processor, str]:
    """Return the rules that a name stands for, and in words what they assume.

    Args:
        name: One of ``NAMES``; ``auto`` stands for the processor of this machine.

    Raises:
        UsageError: There is no such target.
    """
    if name in PROCESSORS:
        return PROCESSORS[name], f"target {name}: {PROCESSORS[name].note}"
    if name != "auto":
        raise UsageError(
            f"target is one of {', '.join(NAMES)}, not {name!r}.{nearest(name, NAMES)}"
        )
    cpu = detect()
    found = PROCESSORS[cpu.target]
    how = "this machine" if cpu.known else "instructions of this machine unknown"
    return found, f"target {found.name} ({how}, {cpu.model}): {found.note}"


# --- saturation -------------------------------------------------------------------


@dataclass(frozen=True)
class Saturation:
    """How far the sums of two products in a layer exceed 16 bits.

    All arrays are [groups * outputs], float64.

    Attributes:
        peak: Largest magnitude of a sum of two products: over the rows given, or over
            all activations there could be.
        share: Share of dot products in which a sum was clipped; 1 where it could be
            and no rows were given.
        lost: Root mean square of what clipping takes away, over the deviation of the
            exact dot products; as ``share`` if no rows were given.
    """

    peak: Float64
    share: Float64
    lost: Float64

    def bites(self, lost: float = _LOST) -> NDArray[np.bool_]:
        """Which outputs lose more than that share of their deviation, bool."""
        return self.lost > lost


def adds_pairs(layer: LinearWeight) -> bool:
    """Whether onnxruntime's kernel for a layer adds products in pairs.

    Depthwise convolutions have a kernel of their own that is exact; ConvTranspose and
    recurrent layers run in floating point.
    """
    groups, outputs, inputs = layer.layout.matrices_shape
    use = layer.uses[0]
    if use.index != 1 or use.node.op not in {"Conv", "Gemm", "MatMul"}:
        return False
    depthwise = groups > 1 and outputs == 1 and inputs == _taps(layer)
    return not (use.node.op == "Conv" and depthwise)


def saturation(
    layer: LinearWeight,
    codes: Codes,
    activations: Codes | None = None,
    *,
    tops: Codes | None = None,
) -> Saturation:
    """Measure how far the 16-bit sums of an x86 kernel without VNNI clip.

    The kernel takes the inputs of a dot product two by two, for Conv the channels at
    each position of the window first (checked against onnxruntime 1.31 on AVX2).

    Args:
        layer: The layer.
        codes: int8 codes in the shape of its weight, without zero point.
        activations: uint8 codes [rows, groups * inputs] of activations the layer sees,
            in the order of ``sampled``; add 128 to int8 codes, as onnxruntime does.
            ``None`` takes the worst there could be.
        tops: Largest uint8 code of each input, [groups * inputs], to bound the worst
            by; 255 if not given. A bound that holds for all of the calibration data
            where rows are a sample of it.
    """
    matrices = layer.layout.matrices(codes)
    groups, outputs, inputs = matrices.shape
    if not adds_pairs(layer):
        nothing = np.zeros(groups * outputs)
        return Saturation(nothing, nothing, nothing)
    order = kernel_order(layer)
    found = []
    for group in range(groups):
        weight = _paired(matrices[group][:, order].astype(np.int64))
        mine = slice(group * inputs, (group + 1) * inputs)
        if activations is None:
            top = np.full(inputs, 255) if tops is None else np.asarray(tops)[mine]
            found.append(_worst(weight, _paired(top[None, order].astype(np.int64))))
            continue
        rows = activations[:, mine]
        found.append(_seen(weight, _paired(rows[:, order].astype(np.int64))))
    peak, share, lost = (np.concatenate(part) for part in zip(*found, strict=True))
    return Saturation(peak, share, lost)


def headroom(peak: Float64, activation_top: int = 255) -> Float64:
    """Return the factor for the range of an output's codes so that no sum clips.

    Codes fill ``round(127 * factor)`` instead of 127: a scale of its own lets each
    output channel give up no more than it must, less than the bit that ``reduce_range``
    takes from all.

    Args:
        peak: ``Saturation.peak``, of int8 codes that use the whole range.
        activation_top: Largest code of an activation.

    Returns:
        Factors above 0 and at most 1, of the shape of ``peak``.
    """
    # Rounding to the narrower grid moves each of two codes by half a step at most.
    room = float(_TOP - activation_top)
    return np.minimum(1.0, room / np.maximum(peak, 1.0))


def sampled(
    layer: LinearWeight, samples: int = 1, seed: int = 0, rows: int = _ROWS
) -> tuple[tuple[gs.Tensor, Statistic], ...] | None:
    """Return the activations a layer reads, each with a statistic that keeps rows.

    Args:
        layer: The layer.
        samples: How many calibration samples there will be.
        seed: Of the choice of rows.
        rows: How many to keep.

    Returns:
        As ``LinearWeight.statistics_for``; the ``values`` of a statistic, float
        [rows, inputs], become the codes that ``saturation`` takes.
    """
    wanted = layer.statistics_for("norm")
    if wanted is None:
        return None
    found: list[tuple[gs.Tensor, Statistic]] = []
    for tensor, statistic in wanted:
        if isinstance(statistic, ConvNorm):
            few = max(1, -(-4 * rows // max(1, samples)))
            window = statistic.window
            patches = ConvSample(rows, seed=seed, window=window, positions=few)
            found.append((tensor, patches))
        elif isinstance(statistic, ChannelNorm):
            found.append((tensor, Sample(rows, statistic.axis, seed)))
    return tuple(found)


def _taps(layer: LinearWeight) -> int:
    """Values of a kernel: 1 for a matrix."""
    if layer.uses[0].node.op != "Conv":
        return 1
    return int(np.prod(layer.layout.shape[2:], dtype=np.int64))


def kernel_order(layer: LinearWeight) -> NDArray[np.intp]:
    """Return the inputs of a dot product in the order the kernel takes them.

    Of the matrices [groups, outputs, inputs] of ``Layout``; neighbours, two by two, are
    the pairs whose products are added in 16 bits.
    """
    inputs, taps = layer.layout.matrices_shape[2], _taps(layer)
    return np.arange(inputs).reshape(inputs // taps, taps).T.reshape(-1)


def _paired(rows: Codes) -> Codes:
    """Cut [n, inputs] into [n, pairs, 2]; an odd input has a partner of 0."""
    odd = rows.shape[1] % 2
    padded = np.pad(rows, ((0, 0), (0, odd))) if odd else rows
    return padded.reshape(len(rows), -1, 2)


def _worst(weight: Codes, tops: Codes) -> tuple[Float64, Float64, Float64]:
    """Bound the sums for activations from 0 to their largest codes [1, pairs, 2]."""
    up = (np.maximum(weight, 0) * tops).sum(axis=2).max(axis=1, initial=0)
    down = (np.maximum(-weight, 0) * tops).sum(axis=2).max(axis=1, initial=0)
    peak = np.maximum(up, down).astype(np.float64)
    could = (peak > _TOP).astype(np.float64)
    return peak, could, could


def _seen(weight: Codes, rows: Codes) -> tuple[Float64, Float64, Float64]:
    """Clip the sums of given rows [rows, pairs, 2] as the kernel does."""
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    deviation = (rows.reshape(len(rows), -1) @ flat.T).std(axis=0)
    peak = np.zeros(len(weight))
    share = np.zeros(len(weight))
    lost = np.zeros(len(weight))
    high = np.maximum(weight, 0).sum(axis=2)
    low = np.minimum(weight, 0).sum(axis=2)
    reach = 255 * np.maximum(high, -low)
    for output, sums_reach in enumerate(reach):
        # Only what could clip, and the pair that reaches farthest for the peak.
        risky = np.flatnonzero(sums_reach > _TOP)
        if not len(risky):
            peak[output] = sums_reach.max(initial=0)
            continue
        clipped = np.zeros(len(rows))
        step = max(1, _ELEMENTS // len(rows))
        for start in range(0, len(risky), step):
            at = risky[start : start + step]
            sums = (rows[:, at] * weight[output, at]).sum(axis=2)
            peak[output] = max(peak[output], np.abs(sums).max(initial=0))
            clipped += (sums - np.clip(sums, -_TOP - 1, _TOP)).sum(axis=1)
        share[output] = np.count_nonzero(clipped) / max(1, len(rows))
        damage = float(np.sqrt(np.mean(clipped**2))) if len(rows) else 0.0
        if damage:
            spread = float(deviation[output])
            lost[output] = damage / spread if spread else np.inf
    return peak, share, lost
