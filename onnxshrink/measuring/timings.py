"""How integer kernels compare with float ones on this processor, measured and kept.

The tables of ``quantization.processors`` make the choices, so that the same
input gives the same bytes everywhere. What is here tells what holds on this machine:
``Timings.ratio`` for two whole models, which is what counts, and ``Timings.layers`` for
kernels one by one. A kernel that loses alone may still win in a model, where a layer
left in float costs two conversions.

Ratios are kept in the user's cache folder, by processor, onnxruntime, threads, and
operators with their shapes and types (``figures``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from rich.console import Console

from onnxshrink import runtime
from onnxshrink.base import Progress
from onnxshrink.measuring.figures import KeptFigures, cache_folder, machine
from onnxshrink.measuring.measure import latencies
from onnxshrink.model import Model
from onnxshrink.quantization.processors import Processor, detect
from onnxshrink.structure.layers import LinearWeight, find
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.terminal import clean, middle, table

__all__ = ["Kernel", "Kernels", "Timings", "structure"]

Array = np.ndarray[Any, Any]

_KEPT = ("auto_pad", "dilations", "group", "pads", "strides", "transB")
"""Attributes that say how much a kernel has to do."""
_SMALL = 64
"""Integer constants up to this size are shapes and axes, and part of a structure."""
_OPSET = 17
_IR = 8


def structure(model: Model) -> str:
    """Return a digest of operators, attributes, shapes and types, not of values.

    Two models with the same structure do the same work. Names do not count; small
    integer constants do, as they are shapes and axes.
    """
    digest = hashlib.blake2b(digest_size=16)
    numbers: dict[int, int] = {}

    def note(tensor: gs.Tensor) -> str:
        known = id(tensor) in numbers
        number = numbers.setdefault(id(tensor), len(numbers))
        if known or not tensor.name:
            return f"{number if tensor.name else ''}"
        weight = model.constant(tensor)
        if weight is None:
            return str(number)
        text = f"{number}:{weight.data_type}{weight.shape}"
        small = weight.size <= _SMALL and weight.dtype.kind in "iub"
        return text + (str(weight.read().tolist()) if small else "")

    for graph in model.graphs():
        digest.update(f"g{[note(tensor) for tensor in graph.inputs]}".encode())
        for node in graph.nodes:
            words = [node.domain or "", node.op]
            words += [note(tensor) for tensor in node.inputs]
            words += ["="] + [note(tensor) for tensor in node.outputs]
            words += [
                f"{key}={value!r}"
                for key, value in sorted(node.attrs.items())
                if isinstance(value, (bool, int, float, str, bytes, list, tuple))
            ]
            digest.update("\0".join([*words, ""]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kernel:
    """Time of one layer in integers over its time in float.

    Attributes:
        where: Name of the weight.
        kind: Operator type.
        ratio: Below 1 integers are faster; codes come in and codes go out.
    """

    where: str
    kind: str
    ratio: float


@dataclass(frozen=True)
class Kernels:
    """What was measured of a model's layers.

    Attributes:
        machine: The processor, and the types of codes.
        kernels: In file order.
        skipped: Layers that were not timed, and why.
    """

    machine: str
    kernels: tuple[Kernel, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON can hold."""
        return {
            "machine": self.machine,
            "kernels": [vars(kernel) for kernel in self.kernels],
            "skipped": [list(one) for one in self.skipped],
        }

    def render(self, console: Console, *, top: int = 15) -> None:
        """Print the ``top`` layers that gain least; 0 prints all."""
        console.print(
            f"Layers alone in integers, time over that in float: {clean(self.machine)}",
            soft_wrap=True,
        )
        made = table(["layer", "operator", "ratio"], left=(0, 1))
        ordered = sorted(self.kernels, key=lambda kernel: -kernel.ratio)
        for kernel in ordered[: top or None]:
            made.add_row(
                middle(kernel.where, 60), clean(kernel.kind, 30), f"{kernel.ratio:.2f}"
            )
        console.print(made)
        hidden = len(ordered) - (top or len(ordered))
        if hidden > 0:
            console.print(f"{hidden} more gain more; --top 0 shows them")
        for where, why in self.skipped[: top or None]:
            console.print(f"not timed: {clean(where)}: {clean(why)}")


class Timings:
    """Measures ratios of time, and remembers them."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Use a cache.

        Args:
            folder: Where it is; by default ``cache_folder()``.
            threads: onnxruntime's threads.
            providers: onnxruntime's execution providers.
        """
        folder = cache_folder() if folder is None else folder
        file = None if folder is None else folder / "timings.json"
        self._kept = KeptFigures(file, "ratios")
        self._threads = threads
        self._providers = tuple(providers)
        self._machine = machine(threads, providers)

    def ratio(
        self, candidate: Model, reference: Model, feed: Mapping[str, Array]
    ) -> float:
        """Return the time of a model over that of another, run in turns.

        Args:
            candidate: The model in question, such as a quantized one.
            reference: What it is compared with.
            feed: Inputs of both.

        Raises:
            ModelError: One of them does not run on the feed.
        """
        shapes = [[name, str(a.dtype), list(a.shape)] for name, a in feed.items()]
        key = ["models", structure(candidate), structure(reference), shapes]
        return self._known(key, candidate, reference, feed, None)

    def layers(
        self,
        model: Model,
        feed: Mapping[str, Array],
        processor: Processor,
        *,
        progress: Progress | None = None,
    ) -> Kernels:
        """Time each kind of layer of a model in integers and in float.

        Args:
            model: The model, in float.
            feed: Inputs, for their shapes.
            processor: Whose types of codes are used.
            progress: Receives progress.
        """
        shapes = value_shapes(model, {name: a.shape for name, a in feed.items()})
        found: list[Kernel] = []
        skipped: list[tuple[str, str]] = []
        chosen = list(find(model))
        for number, layer in enumerate(chosen):
            task = _kernel_task(layer, shapes)
            if isinstance(task, str):
                skipped.append((layer.name, task))
            else:
                found.append(
                    Kernel(layer.name, layer.kind, self._kernel(task, processor))
                )
            if progress is not None:
                progress(number + 1, len(chosen), "timing kernels")
        codes = [
            onnx.TensorProto.DataType.Name(kind).lower()
            for kind in (processor.activation, processor.weight)
        ]
        words = f"{detect().model}, {codes[0]} activations, {codes[1]} weights"
        return Kernels(words, tuple(found), tuple(skipped))

    def _kernel(self, task: _KernelTask, processor: Processor) -> float:
        key = ["kernel", *task.key, processor.activation, processor.weight]
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 128, task.input).astype(
            helper.tensor_dtype_to_np_dtype(processor.activation)
        )
        return self._known(
            key,
            _integer(task, processor),
            _single(task),
            {"x": codes},
            {"x": codes.astype(np.float32)},
        )

    def _known(
        self,
        key: Sequence[object],
        candidate: Model | onnx.ModelProto,
        reference: Model | onnx.ModelProto,
        feed: Mapping[str, Array],
        reference_feed: Mapping[str, Array] | None,
    ) -> float:
        """Return a ratio from the cache, or measure it."""

        def measure() -> float:
            one, two = (
                runtime.session(
                    source, threads=self._threads, providers=self._providers
                )
                for source in (candidate, reference)
            )
            _, ratio = latencies(one, two, feed, reference_feed)
            assert ratio is not None
            return round(ratio, 4)

        return self._kept.get([self._machine, key], measure)


# --- one kernel -------------------------------------------------------------------


@dataclass(frozen=True)
class _KernelTask:
    """What a kernel computes: operator, attributes, shapes of input and weight."""

    op: str
    attrs: Mapping[str, Any]
    input: tuple[int, ...]
    weight: tuple[int, ...]

    @property
    def key(self) -> list[object]:
        return [
            self.op,
            sorted(self.attrs.items()),
            list(self.input),
            list(self.weight),
        ]

    @property
    def axis(self) -> int:
        """Axis of the output channels of the weight."""
        rows = self.op == "Conv" or (self.op == "Gemm" and self.attrs.get("transB", 0))
        return 0 if rows else 1


def _kernel_task(
    layer: LinearWeight, shapes: Mapping[str, Sequence[int]]
) -> _KernelTask | str:
    """Describe a layer, or say why it has no integer kernel to time."""
    if layer.why_not:
        return layer.why_not
    use = layer.uses[0]
    node, index = use.node, use.index
    shape = layer.weight.shape
    if node.op not in {"Conv", "Gemm", "MatMul"} or index != 1:
        return f"{node.op} has no integer kernel"
    if node.op != "Conv" and len(shape) != 2:
        return "a stack of matrices has no integer kernel"
    if node.op == "Gemm" and use.input_channels != -1:
        return "its input is transposed"
    given = shapes.get(node.inputs[0].name)
    if given is None or 0 in given:
        return "the shape of its input is not known"
    attrs = {key: node.attrs[key] for key in _KEPT if key in node.attrs}
    return _KernelTask(node.op, attrs, tuple(given), tuple(shape))


def _single(task: _KernelTask) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal(task.weight).astype(np.float32)
    node = helper.make_node(task.op, ["x", "w"], ["y"])
    return _model(task, [node], onnx.TensorProto.FLOAT, {"w": weight})


def _integer(task: _KernelTask, processor: Processor) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    kinds = (processor.activation, processor.weight)
    act, wgt = (helper.tensor_dtype_to_np_dtype(kind) for kind in kinds)
    signed = act == np.int8
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=task.axis),
        helper.make_node(task.op, ["xf", "wf"], ["yf"]),
        helper.make_node("QuantizeLinear", ["yf", "sy", "z"], ["y"]),
    ]
    channels = task.weight[task.axis]
    inputs = math.prod(task.weight) / channels
    constants: dict[str, Array] = {
        "w": rng.integers(-63, 64, task.weight).astype(wgt),
        "sw": np.full(channels, 0.01, np.float32),
        "zw": np.zeros(channels, wgt),
        "sx": np.array(0.05, np.float32),
        # Outputs fill the codes as a calibrated layer's do.
        "sy": np.array(0.05 * 0.01 * 37 * 64 * math.sqrt(inputs) / 32, np.float32),
        "z": np.array(0 if signed else 128, act),
    }
    return _model(task, nodes, processor.activation, constants)


def _model(
    task: _KernelTask,
    nodes: Sequence[onnx.NodeProto],
    data_type: int,
    constants: Mapping[str, Array],
) -> onnx.ModelProto:
    for node in nodes:
        if node.op_type == task.op:
            node.attribute.extend(
                helper.make_attribute(key, value) for key, value in task.attrs.items()
            )
    rank = len(task.input)
    graph = helper.make_graph(
        list(nodes),
        "kernel",
        [helper.make_tensor_value_info("x", data_type, task.input)],
        [helper.make_tensor_value_info("y", data_type, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", _OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=_IR)
