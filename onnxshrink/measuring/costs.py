"""What forms of a layer cost: bytes, multiply-accumulates and seconds.

``FixedCosts`` follows from shapes alone, so that what a pass decides by it gives the
same bytes on every machine. Its seconds are those of a reference processor: an AVX2
core without VNNI at about 3 GHz, one thread, onnxruntime 1.32, one more layer in a
chain of such layers. Of the 114 layers that ``tools/bench costs`` times, 9 in 10 took
between 0.77 and 1.60 times as long on such a machine. What counts is which form is
faster and by how much, not the seconds themselves.

``MeasuredCosts`` times small graphs on this machine, for budgets of latency. Times are
kept in the user's cache folder.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context, Cost, Costs, Form
from onnxshrink.errors import ModelError
from onnxshrink.measuring.figures import KeptFigures, cache_folder, machine
from onnxshrink.model import Model
from onnxshrink.quantization.processors import PROCESSORS, detect
from onnxshrink.structure.layers import LinearWeight
from onnxshrink.structure.shapes import value_shapes

__all__ = ["FixedCosts", "LayerCosts", "MeasuredCosts", "layer_cost"]

Array = np.ndarray[Any, Any]

_BLOCK = 8
"""Channels that onnxruntime's blocked convolution (NCHWc) computes at once on AVX2."""
_BLOCKED = {1: 21.0, 2: 37.0, 3: 44.0, 4: 49.0}
"""Multiply-accumulates in a nanosecond, by how many blocks of outputs go together."""


class FixedCosts:
    """Costs that follow from shapes alone, the same on every machine."""

    is_measured = False

    def __init__(
        self, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        """Set up.

        Args:
            threads: onnxruntime's threads, for ``measured``.
            providers: onnxruntime's execution providers, for ``measured``.
        """
        self._threads = threads
        self._providers = tuple(providers)
        self._measured: MeasuredCosts | None = None

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        size: Sequence[int],
        *,
        groups: int = 1,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a convolution, see ``base.Costs.conv``."""
        weights = inputs // groups * outputs * math.prod(kernel)
        nanoseconds = _conv(inputs, outputs, kernel, size, groups, form)
        return Cost(
            round(weights * itemsize), weights * math.prod(size), nanoseconds * 1e-9
        )

    def matmul(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        *,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a matrix product, see ``base.Costs.matmul``."""
        weights = inputs * outputs
        nanoseconds = _matmul(rows, inputs, outputs, form, itemsize)
        return Cost(round(weights * itemsize), weights * rows, nanoseconds * 1e-9)

    def measured(self) -> Costs:
        """Return costs that are measured on this machine, the same each time."""
        if self._measured is None:
            self._measured = MeasuredCosts(
                threads=self._threads, providers=self._providers
            )
        return self._measured

    @property
    def measured_some(self) -> bool:
        """Whether a figure that was measured has been given to anyone."""
        return self._measured is not None and self._measured.measured_some


def _conv(
    inputs: int,
    outputs: int,
    kernel: Sequence[int],
    size: Sequence[int],
    groups: int,
    form: Form,
) -> float:
    """Return the nanoseconds of a convolution on the reference processor."""
    ins, outs = max(1, inputs // groups), max(1, outputs // groups)
    taps, positions = math.prod(kernel), math.prod(size)
    macs = ins * outputs * taps * positions
    is_depthwise = groups > 1 and ins == outs == 1
    if form == "static":
        if is_depthwise:
            return 1500 + macs / 14
        thin = min(ins, outs) < 2 * _BLOCK
        rate = 95 * outs / (outs + 6) / (1 if groups == 1 else 2)
        rate = 3.0 if ins == 1 else 12.0 if thin else rate
        return 1200 + macs / rate + 0.15 * outputs * positions
    if groups == 1:
        fits = inputs % 4 == 0 or inputs < _BLOCK
    else:
        fits = is_depthwise or (ins % _BLOCK == 0 and outs % _BLOCK == 0)
    if len(kernel) == 2 and outputs % 4 == 0 and fits:
        if is_depthwise:
            return 800 + macs / 24
        blocks = math.ceil(outs / _BLOCK)
        full, rest = divmod(blocks, 4)
        one = ins * taps * positions * _BLOCK
        together = full * 4 * one / _BLOCKED[4]
        if rest:
            together += rest * one / _BLOCKED[rest]
        written = 0.25 * outputs * positions if ins < _BLOCK else 0
        return 500 + written + max(groups * together, ins * outputs * taps * 4 / 40)
    if is_depthwise:
        return 800 + 400 * groups + macs / 4.3
    # A matrix product of the weight and the patches of the input, which are copied.
    patches = inputs * taps * positions if taps > 1 and len(kernel) > 1 else 0
    return 600 + 300 * (groups - 1) + macs / (45 * outs / (outs + 12)) + 0.3 * patches


def _matmul(rows: int, inputs: int, outputs: int, form: Form, itemsize: float) -> float:
    """Return the nanoseconds of a product on the reference processor.

    With few rows, what takes long is to read the weight.
    """
    weights = inputs * outputs
    macs = weights * rows
    if form == "static":
        return 1500 + max(macs / 88, weights / 45)
    if form == "dynamic":
        return 2200 + max(macs / 88, weights / 45) + 0.1 * rows * (inputs + outputs)
    if form == "codes":
        few, many = (27, 44) if itemsize <= 0.5 else (25, 28.5)
        return 1200 + max(macs / many, weights / few)
    return 500 + max(macs / 47, weights * 4 / 44)


# --- measured ---------------------------------------------------------------------

_SECONDS = 0.07
"""Time that goes into each of three graphs, and its fewest and most runs."""
_FEWEST, _MOST = 5, 1000
_OPSET = 17
_IR = 8
_BLOCK_SIZE = 32
"""Weights that share a scale, in MatMulNBits."""

Nodes = list[onnx.NodeProto]
Constants = dict[str, Array]
Layer = Callable[[str, str, bool, Constants], Nodes]
"""Appends a layer: input, output, whether it leads back, and where weights go."""


class MeasuredCosts(FixedCosts):
    """Costs whose seconds are measured on this machine.

    Measured is what a layer adds to a chain, where values stay in the form that kernels
    want: the time of three layers, there and back and there again, less that of the
    first two; or the time of the layer alone where that is less, since the difference
    is the noisier. What onnxruntime does not run has the seconds of ``FixedCosts``.
    """

    is_measured = True
    measured_some = False

    def __init__(
        self,
        folder: Path | None = None,
        *,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Use a cache.

        Args:
            folder: Where it is; by default the user's cache folder.
            threads: onnxruntime's threads.
            providers: onnxruntime's execution providers.
        """
        super().__init__(threads=threads, providers=providers)
        folder = cache_folder() if folder is None else folder
        file = None if folder is None else folder / "costs.json"
        self._kept = KeptFigures(file, "seconds")
        self._machine = machine(threads, providers)

    def measured(self) -> Costs:
        """Return these costs."""
        return self

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        size: Sequence[int],
        *,
        groups: int = 1,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a convolution, see ``base.Costs.conv``."""
        known = super().conv(
            inputs, outputs, kernel, size, groups=groups, form=form, itemsize=itemsize
        )
        coded = form == "static"
        there = (outputs, inputs // groups, *kernel)
        back = (inputs, outputs // groups, *kernel)

        def layer(x: str, y: str, leads_back: bool, constants: Constants) -> Nodes:
            shape = back if leads_back else there
            nodes = _weight(f"w{y}", shape, 0, coded, constants)
            made = helper.make_node(
                "Conv", [x, f"w{y}"], [y], auto_pad="SAME_UPPER", group=groups
            )
            return [*nodes, made]

        key = ["conv", inputs, outputs, list(kernel), list(size), groups, coded]
        return self._timed(known, key, layer, (1, inputs, *size), coded)

    def matmul(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        *,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a matrix product, see ``base.Costs.matmul``."""
        known = super().matmul(rows, inputs, outputs, form=form, itemsize=itemsize)
        bits = 4 if itemsize <= 0.5 else 8

        def layer(x: str, y: str, leads_back: bool, constants: Constants) -> Nodes:
            shape = (outputs, inputs) if leads_back else (inputs, outputs)
            if form == "codes":
                return _packed(x, y, shape, bits, constants)
            if form == "dynamic":
                return _dynamic(x, y, shape, constants)
            nodes = _weight(f"w{y}", shape, 1, form == "static", constants)
            return [*nodes, helper.make_node("MatMul", [x, f"w{y}"], [y])]

        key = ["matmul", rows, inputs, outputs, form, bits if form == "codes" else 0]
        return self._timed(known, key, layer, (rows, inputs), form == "static")

    def _timed(
        self,
        known: Cost,
        key: Sequence[object],
        layer: Layer,
        shape: tuple[int, ...],
        coded: bool,
    ) -> Cost:
        """Return the cost with the seconds that a layer takes here."""

        def measure() -> float:
            sessions = [
                runtime.session(
                    _chain(layer, count, shape, coded),
                    threads=self._threads,
                    providers=self._providers,
                )
                for count in (1, 2, 3)
            ]
            draws = np.random.default_rng(0).standard_normal(shape)
            one, two, three = _shortest(sessions, {"x": draws.astype(np.float32)})
            # Noise may be more than what a tiny layer takes.
            return float(f"{min(one, max(three - two, three / 20)):.3g}")

        try:
            seconds = self._kept.get([self._machine, *key], measure)
        except ModelError:
            return known
        self.measured_some = True
        return dataclasses.replace(known, seconds=seconds)


def _shortest(
    sessions: Sequence[runtime.Session], feed: Mapping[str, Array]
) -> list[float]:
    """Return the shortest run of each session, run in turns."""
    for session in sessions:
        session.check(feed)
        session.seconds(feed)
    found = [math.inf] * len(sessions)
    start = time.perf_counter()
    for number in range(_MOST):
        spent = time.perf_counter() - start
        if number >= _FEWEST and spent > len(sessions) * _SECONDS:
            break
        for index, session in enumerate(sessions):
            found[index] = min(found[index], session.seconds(feed))
    return found


def _chain(
    layer: Layer, count: int, shape: tuple[int, ...], coded: bool
) -> onnx.ModelProto:
    """Return a graph of layers in a row; between coded ones, activations are codes."""
    processor = PROCESSORS[detect().target]
    zero = helper.tensor_dtype_to_np_dtype(processor.activation)
    constants: Constants = {
        "s": np.array(0.05, np.float32),
        "z": np.array(0 if zero == np.int8 else 128, zero),
    }
    nodes: Nodes = []
    value = "x"

    def code(value: str) -> str:
        made = [f"{value}_codes", f"{value}_decoded"]
        nodes.append(helper.make_node("QuantizeLinear", [value, "s", "z"], made[:1]))
        nodes.append(
            helper.make_node("DequantizeLinear", [made[0], "s", "z"], made[1:])
        )
        return made[1]

    for number in range(count):
        value = code(value) if coded else value
        nodes += layer(value, f"y{number}", number % 2 == 1, constants)
        value = f"y{number}"
    value = code(value) if coded else value
    rank = len(shape)
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR)


def _weight(
    name: str, shape: tuple[int, ...], axis: int, coded: bool, constants: Constants
) -> Nodes:
    """Make a weight that keeps the size of what it multiplies, in codes or not."""
    rng = np.random.default_rng(len(constants))
    size = math.sqrt(shape[axis] / math.prod(shape))
    if not coded:
        values = rng.standard_normal(shape, np.float32)
        constants[name] = values * np.float32(size)
        return []
    kind = helper.tensor_dtype_to_np_dtype(PROCESSORS[detect().target].weight)
    constants[f"{name}_codes"] = rng.integers(-63, 64, shape).astype(kind)
    constants[f"{name}_scale"] = np.full(shape[axis], size / 37, np.float32)
    constants[f"{name}_zero"] = np.zeros(shape[axis], kind)
    inputs = [f"{name}_codes", f"{name}_scale", f"{name}_zero"]
    return [helper.make_node("DequantizeLinear", inputs, [name], axis=axis)]


def _dynamic(x: str, y: str, shape: tuple[int, ...], constants: Constants) -> Nodes:
    """Multiply by int8 codes, the input coded at run time."""
    rng = np.random.default_rng(len(constants))
    constants[f"{y}_w"] = rng.integers(-63, 64, shape).astype(np.int8)
    constants[f"{y}_s"] = np.full(shape[1], 1 / 37 / math.sqrt(shape[0]), np.float32)
    constants[f"{y}_z"] = np.zeros((), np.int8)
    return [
        helper.make_node(
            "DynamicQuantizeLinear", [x], [f"{y}_codes", f"{y}_scale", f"{y}_zero"]
        ),
        helper.make_node(
            "MatMulInteger",
            [f"{y}_codes", f"{y}_w", f"{y}_zero", f"{y}_z"],
            [f"{y}_sum"],
        ),
        helper.make_node(
            "Cast", [f"{y}_sum"], [f"{y}_float"], to=onnx.TensorProto.FLOAT
        ),
        helper.make_node("Mul", [f"{y}_scale", f"{y}_s"], [f"{y}_both"]),
        helper.make_node("Mul", [f"{y}_float", f"{y}_both"], [y]),
    ]


def _packed(
    x: str, y: str, shape: tuple[int, ...], bits: int, constants: Constants
) -> Nodes:
    """Multiply by codes of a few bits in blocks along the inputs, MatMulNBits."""
    rng = np.random.default_rng(len(constants))
    inputs, outputs = shape
    blocks = -(-inputs // _BLOCK_SIZE)
    block = _BLOCK_SIZE * bits // 8
    codes = rng.integers(0, 256, (outputs, blocks, block))
    constants[f"{y}_w"] = codes.astype(np.uint8)
    constants[f"{y}_s"] = np.full(
        outputs * blocks, 2.0 ** (1 - bits) / math.sqrt(inputs), np.float32
    )
    return [
        helper.make_node(
            "MatMulNBits",
            [x, f"{y}_w", f"{y}_s"],
            [y],
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=bits,
            block_size=_BLOCK_SIZE,
            accuracy_level=4,  # what DequantizeLinear before MatMul becomes
        )
    ]


# --- layers that are there --------------------------------------------------------

_CONVERSION = 0.29e-9
"""Seconds to code or decode a value, on the reference processor."""


class LayerCosts:
    """What the layers of one model cost, as they are and in other forms."""

    def __init__(self, model: Model, ctx: Context) -> None:
        """Look at a model.

        Args:
            model: The model; it is not changed.
            ctx: Its costs, and a sample, for the shapes of values.
        """
        self._model = model
        self._ctx = ctx

    @cached_property
    def _shapes(self) -> Mapping[str, Sequence[int]]:
        splits = self._ctx.samples
        samples = splits.calibration or splits.training
        if samples is None or not samples.used:
            return {}
        feed = samples.read(np.arange(samples.batch or 1))
        return value_shapes(self._model, {name: a.shape for name, a in feed.items()})

    def of(
        self, layer: LinearWeight, form: Form = "float", itemsize: float | None = None
    ) -> Cost | None:
        """Return what a layer costs for one sample, see ``layer_cost``."""
        costs = self._ctx.costs
        return layer_cost(costs, layer, self._shapes, form=form, itemsize=itemsize)

    def conversions(self, layer: LinearWeight) -> float:
        """Return the seconds that a layer in floats costs between coded neighbours.

        What it reads is decoded for it, but for an input of the model, and what it
        gives is coded again.
        """
        inputs = {tensor.name for tensor in self._model.graph.inputs}
        values = 0
        for use in layer.uses:
            read = use.input
            if read is not None and read.name not in inputs:
                values += math.prod(self._shapes.get(read.name, (0,)))
            values += math.prod(self._shapes.get(use.output.name, (0,)))
        return values * _CONVERSION


def layer_cost(
    costs: Costs,
    layer: LinearWeight,
    shapes: Mapping[str, Sequence[int]],
    *,
    form: Form = "float",
    itemsize: float | None = None,
) -> Cost | None:
    """Return what a layer of a model costs in some form, all its uses together.

    Args:
        costs: Fixed or measured ones, ``ctx.costs``.
        layer: A weight of Conv, Gemm or MatMul nodes.
        shapes: Shapes of values for one sample, of ``structure.shapes.value_shapes``.
        form: How it is computed.
        itemsize: Bytes of a stored weight; by default as it is stored now.

    Returns:
        ``None`` where an operator is another one or a shape is not known.
    """
    weight = layer.weight
    size = weight.nbytes / max(1, weight.size) if itemsize is None else itemsize
    total = Cost(seconds=0.0)
    for use in layer.uses:
        given = shapes.get(use.output.name)
        if use.role != "weight" or given is None or 0 in given:
            return None
        if use.kind == "Conv":
            outputs, ins, *kernel = layer.layout.shape
            groups = use.groups
            one = costs.conv(
                ins * groups,
                outputs,
                kernel,
                given[2:],
                groups=groups,
                form=form,
                itemsize=size,
            )
            runs = given[0]
        elif use.kind in ("Gemm", "MatMul") and len(layer.layout.shape) == 2:
            _, outputs, inputs = layer.layout.matrices_shape
            rows, runs = math.prod(given) // outputs, 1
            one = costs.matmul(rows, inputs, outputs, form=form, itemsize=size)
        else:
            return None
        seconds = None
        if total.seconds is not None and one.seconds is not None:
            seconds = total.seconds + runs * one.seconds
        total = Cost(one.bytes, total.macs + runs * one.macs, seconds)
    return total if layer.uses else None
