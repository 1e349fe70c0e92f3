"""Which 8-bit types are fast and exact where, and whose sums may saturate.

x86 processors without VNNI multiply 8-bit integers with VPMADDUBSW, which adds two
products of an unsigned and a signed byte in 16 bits and clips the sum: with codes of
255 and 127, 64770 becomes 32767. ``PROCESSORS`` says where that happens, ``adds_pairs``
for which layers, and ``headroom`` how far to narrow their codes.

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
from numpy.typing import NDArray

from onnxshrink.errors import UsageError, nearest
from onnxshrink.structure.layers import LinearWeight

__all__ = [
    "NAMES",
    "PROCESSORS",
    "Cpu",
    "Processor",
    "adds_pairs",
    "detect",
    "headroom",
    "kernel_order",
    "resolve",
]

Name = Literal["auto", "avx2", "vnni", "arm", "gpu", "any"]
Codes = NDArray[Any]
Float64 = NDArray[np.float64]

_INT8, _UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
_TOP = 32767
"""Largest sum of two products that VPMADDUBSW holds."""


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


def headroom(peak: Float64, activation_top: int = 255) -> Float64:
    """Return the factor for the range of an output's codes so that no sum clips.

    Codes fill ``round(127 * factor)`` instead of 127: a scale of its own lets each
    output channel give up no more than it must, less than the bit that ``reduce_range``
    takes from all.

    Args:
        peak: Largest magnitude of a sum of two products, of int8 codes that use the
            whole range.
        activation_top: Largest code of an activation.

    Returns:
        Factors above 0 and at most 1, of the shape of ``peak``.
    """
    # Rounding to the narrower grid moves each of two codes by half a step at most.
    room = float(_TOP - activation_top)
    return np.minimum(1.0, room / np.maximum(peak, 1.0))


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
