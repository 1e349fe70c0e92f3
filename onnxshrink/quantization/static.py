"""The static form: weights and activations as codes whose scales are known before.

Weights are rounded one layer after the other against the inputs the layer sees, so that
the sums of products come out right (``rounding.gptq``); the shift in the mean that is
left goes into the bias (Nagel et al. 2019, "Data-Free Quantization Through Weight
Equalization and Bias Correction", section 4.2). Because a bias can hold any shift, the
inputs are taken relative to their mean, and rounding is free to shift outputs.

Tested in tests/passes/test_quantize.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.activations.gathering import fingerprint, values_digest
from onnxshrink.base import Context
from onnxshrink.model import Model
from onnxshrink.model.topology import is_onnx
from onnxshrink.quantization import calibration, dynamic, inputs, placement, processors
from onnxshrink.quantization.calibration import Observer
from onnxshrink.quantization.correction import expected_shift
from onnxshrink.quantization.inputs import Seen
from onnxshrink.quantization.placement import Coded, Codes, Linear, Plan, Planner
from onnxshrink.quantization.processors import Processor
from onnxshrink.quantization.schemes import Scheme, affine
from onnxshrink.solvers import rounding
from onnxshrink.solvers.rounding import Fit, Grid
from onnxshrink.solvers.threads import one_thread
from onnxshrink.statistics import Range, Statistic, Stored
from onnxshrink.structure.codes import MOVES
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import Layout, LinearWeight
from onnxshrink.tensors import LazyTensor

__all__ = [
    "LEVELS",
    "Recipe",
    "RoundedWeight",
    "RoundingTask",
    "quantize_static",
    "round_weight",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Rounding = Literal["nearest", "mse", "hqq", "learned", "gptq", "adaround"]

_T = onnx.TensorProto
LEVELS: Mapping[str, tuple[int, int, int]] = {
    "int8": (_T.INT8, -127, 127),
    "uint8": (_T.UINT8, 1, 255),
    "int4": (_T.INT8, -8, 7),
    "int2": (_T.INT8, -2, 1),
    "ternary": (_T.INT8, -1, 1),
}
"""Type, smallest and largest code of weights. Integer kernels take 8-bit types only;
what stores few distinct codes in few bits is the file format."""
_TOGETHER = 8
"""Layers that are rounded at a time."""
_MOVES = MOVES | {"Flatten"}
"""Operators that give what they read, in another shape or order."""


@dataclass(frozen=True)
class Recipe:
    """How values become codes.

    Attributes:
        activation: Codes of activations.
        weights: Key of ``LEVELS``.
        per_channel: Whether each output of a layer has a scale of its own.
        method: How ranges of activations are found.
        percentile: For the method of that name.
        rounding: How weights are rounded.
        bias_correction: Whether biases take up the shift of the mean.
        processor: What the codes will run on.
        cache: Folder to keep what calibration saw in.
    """

    activation: Scheme
    weights: str
    per_channel: bool
    method: calibration.Method
    percentile: float
    rounding: Rounding
    bias_correction: bool
    processor: Processor
    cache: Path | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether inputs of layers are watched, not only their ranges."""
        by_inputs = self.rounding in ("learned", "gptq", "adaround")
        return self.bias_correction or by_inputs

    @property
    def fit(self) -> Fit:
        """How the scales of weights are found."""
        return self.rounding if self.rounding in ("mse", "hqq", "learned") else "minmax"


def quantize_static(
    model: Model,
    chosen: Sequence[str],
    recipe: Recipe,
    ctx: Context,
    seen: Seen | None = None,
) -> dict[str, str]:
    """Let layers run on codes.

    Ranges of activations and codes of weights are worked out once in a step.

    Args:
        model: The model; changed.
        chosen: Names of weights.
        recipe: How.
        ctx: Samples, memory and notes.
        seen: What the step knows of the model; by default that it is not equalized.

    Returns:
        Weights that were left alone, and why.
    """
    seen = Seen.of(fingerprint(model), (), ctx) if seen is None else seen
    return _StaticForm(model, frozenset(chosen), recipe, ctx, seen).write()


@dataclass(frozen=True)
class _CalibratedRange:
    """The range that calibration found for a value.

    Attributes:
        low: Lower end of its range.
        high: Upper end.
        why_not: Why it cannot become codes; empty if it can.
    """

    low: float
    high: float
    why_not: str = ""


@dataclass(eq=False)
class _StaticForm:
    """The layers of a model that get the static form together."""

    model: Model
    names: frozenset[str]
    recipe: Recipe
    ctx: Context
    seen: Seen
    left: dict[str, str] = field(default_factory=dict)
    _grams: dict[str, InputStatistics] = field(default_factory=dict)
    _keeps: bool = False

    def __post_init__(self) -> None:
        self.planner = Planner(self.model)
        self.chosen = [o for o in self.planner.linear if o.layer.name in self.names]
        self.left.update((n, w) for n, w in self.planner.skips if n in self.names)

    def write(self) -> dict[str, str]:
        plan = self.planner.plan(self.chosen)
        groups: list[list[LinearWeight]] = []
        if self.recipe.needs_gram:
            groups = list(inputs.groups(_layers(plan)))
        # What takes more than one run takes too much room to be kept.
        self._keeps = len(groups) == 1
        seen = self._ranges(plan, groups[0] if groups else ())
        plan = self._settle(plan, seen)
        if not plan.linear:
            return self.left
        activations = self._activations(plan, seen)
        rounded = self._rounded(plan, _inputs(plan, activations), groups)
        self._put(plan, activations, rounded)
        return self.left

    # What activations look like.

    def _range_key(self, name: str) -> tuple[Any, ...]:
        """Return what the range of a value depends on."""
        recipe = self.recipe
        levels = recipe.activation.high - recipe.activation.low + 1
        how = (recipe.method, recipe.percentile, levels, recipe.activation.symmetric)
        return (*self.seen.of_value(name), "range", *how)

    def _ranges(
        self, plan: Plan, watched: Sequence[LinearWeight]
    ) -> dict[gs.Tensor, _CalibratedRange]:
        """Return the range of each value.

        The same run gathers the Gram matrices of the layers ``watched``.
        """
        memory = self.ctx.memory
        tensors = [tensor for group in plan.ranges.values() for tensor in group]
        keys = {tensor.name: self._range_key(tensor.name) for tensor in tensors}
        seen = {
            tensor.name: memory.get(keys[tensor.name])
            or memory.get(self._range_key(self._moved(tensor).name))
            for tensor in tensors
        }
        simple = self.recipe.method == "minmax"
        unknown: dict[str, Stored] = {
            name: Range() if simple else calibration.observer()
            for name, one in seen.items()
            if one is None
        }
        if unknown:
            self._grams, found = self._watch(watched, unknown)
            for name, statistic in found.items():
                seen[name] = self._seen(statistic)
                memory.put(keys[name], seen[name])
        unseen = _CalibratedRange(0, 0, "its values cannot be watched")
        return {tensor: seen[tensor.name] or unseen for tensor in tensors}

    def _moved(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return the value whose entries a value has in another shape or order.

        Where a layer is left out, Flatten may stand at the edge of what runs on codes.
        """
        scales = self.seen.values
        first = tensor
        while first.inputs and first.inputs[0].op in _MOVES:
            if not is_onnx(first.inputs[0].domain):
                break
            first = first.inputs[0].inputs[0]
        same = scales.get(first.name) is scales.get(tensor.name)
        return first if same else tensor

    def _seen(self, statistic: Statistic) -> _CalibratedRange:
        apart = 0
        if isinstance(statistic, Range):
            apart = statistic.nan + statistic.inf + statistic.fills
            empty = statistic.empty
        else:
            assert isinstance(statistic, Observer)
            apart, empty = statistic.histogram.apart, statistic.empty
        if apart:
            return _CalibratedRange(0, 0, "it holds values beyond 1e30, as a mask does")
        if empty:
            return _CalibratedRange(0, 0, "calibration saw no value of it")
        recipe = self.recipe
        if isinstance(statistic, Range):
            low, high = float(statistic.low), float(statistic.high)
        else:
            low, high = calibration.bounds(
                statistic,
                recipe.method,
                levels=recipe.activation.high - recipe.activation.low + 1,
                symmetric=recipe.activation.symmetric,
                percentile=recipe.percentile,
            )
        if low == high == 0:
            return _CalibratedRange(0, 0, "it is 0 in all calibration samples")
        return _CalibratedRange(low, high)

    def _settle(self, plan: Plan, seen: Mapping[gs.Tensor, _CalibratedRange]) -> Plan:
        """Leave out layers that read or make values which cannot become codes."""
        refused = {tensor: one.why_not for tensor, one in seen.items() if one.why_not}
        if refused:
            plan = self.planner.plan(self.chosen, refused)
        kept = {id(one.node) for one in plan.linear}
        for one in self.chosen:
            if id(one.node) in kept:
                continue
            near = [one.node.inputs[0], *one.node.outputs]
            near += [t for node in one.node.outputs[0].outputs for t in node.outputs]
            why = next(
                (f"{t.name}: {refused[t]}" for t in near if t in refused),
                "a value it reads or makes cannot become codes",
            )
            self.left[one.layer.name] = why
        # A weight stays as it was if one of its readers needs it so.
        whole = [one for one in plan.linear if one.layer.name not in self.left]
        if len(whole) < len(plan.linear):
            plan = self.planner.plan(whole, refused)
        return plan

    def _activations(
        self, plan: Plan, seen: Mapping[gs.Tensor, _CalibratedRange]
    ) -> dict[gs.Tensor, Coded]:
        scheme = self.recipe.activation
        made = {}
        for source, tensors in plan.ranges.items():
            low = min(seen[tensor].low for tensor in tensors)
            high = max(seen[tensor].high for tensor in tensors)
            made[source] = Coded(scheme, *affine(low, high, scheme))
        return made

    # Weights.

    def _rounded(
        self,
        plan: Plan,
        coded: Mapping[str, Coded],
        groups: Sequence[Sequence[LinearWeight]],
    ) -> dict[str, RoundedWeight]:
        """Return the codes of every layer of a plan, from the memory where known."""
        memory = self.ctx.memory
        todo = {one.layer.name: one for one in plan.linear}
        keys = {
            name: self._codes_key(one, float(coded[name].scale))
            for name, one in todo.items()
        }
        known = {name: memory.get(key) for name, key in keys.items()}
        found = {name: one for name, one in known.items() if one is not None}
        watched = {layer.name for group in groups for layer in group}
        others = [one.layer for name, one in todo.items() if name not in watched]
        for group in (*groups, others):
            missing = [
                layer.name
                for layer in group
                if layer.name in todo and layer.name not in found
            ]
            grams = self._of_group([todo[n].layer for n in missing if n in watched])
            for start in range(0, len(missing), _TOGETHER):
                part = missing[start : start + _TOGETHER]
                # Matrices that were used make room for what rounding needs.
                tasks = [
                    self._task(todo[n], float(coded[n].scale), grams.pop(n, None))
                    for n in part
                ]
                results = self.ctx.map(round_weight, tasks, "rounding")
                for name, one in zip(part, results, strict=True):
                    found[name] = one
                    memory.put(keys[name], one)
        return found

    def _codes_key(self, one: Linear, scale: float) -> tuple[Any, ...]:
        """Return what the codes of a layer depend on, whatever else is left out."""
        layer = one.layer
        bias = None if one.bias is None else one.bias.read().tobytes()
        key = self.seen.of_inputs(layer.name)
        own = (values_digest(layer.weight.tensor), bias, scale)
        return (*key, "codes", self.recipe, *own)

    def _of_group(self, group: Sequence[LinearWeight]) -> dict[str, InputStatistics]:
        """Return Gram matrices: of the run that found the ranges, or of a new one."""
        grams, self._grams = self._grams, {}
        if all(layer.name in grams for layer in group):
            return grams
        return self._watch(group, {})[0]

    def _watch(
        self, group: Sequence[LinearWeight], beside: Mapping[str, Stored]
    ) -> tuple[dict[str, InputStatistics], dict[str, Statistic]]:
        return inputs.input_grams(
            self.model,
            group,
            self.ctx,
            beside,
            seen=self.seen if self._keeps else None,
            cache=self.recipe.cache,
        )

    def _task(
        self, one: Linear, scale: float, seen: InputStatistics | None
    ) -> RoundingTask:
        """Describe how a weight is rounded whose inputs have this scale."""
        layer, recipe = one.layer, self.recipe
        least = None
        if one.bias is not None:
            least = placement.smallest_scale(one.bias.read(), scale)
        # A shift needs a node that takes a bias, and a weight that no other node reads.
        shifts = one.node.op != "MatMul" and len(layer.uses) == 1
        known = seen is not None and seen.gram is not None
        return RoundingTask(
            layer.weight.tensor,
            layer.layout,
            layer.output_axis,
            recipe,
            seen if known else None,
            recipe.bias_correction and shifts,
            least,
            processors.kernel_order(layer) if self._clips(layer) else None,
        )

    def _clips(self, layer: LinearWeight) -> bool:
        """Whether sums of two products could clip on the processor."""
        wide = LEVELS[self.recipe.weights] == LEVELS["int8"]
        narrow = self.recipe.processor.saturation != "never"
        return wide and narrow and processors.adds_pairs(layer)

    # Writing.

    def _put(
        self,
        plan: Plan,
        activations: Mapping[gs.Tensor, Coded],
        rounded: Mapping[str, RoundedWeight],
    ) -> None:
        weights = {name: one.codes for name, one in rounded.items()}
        biases = {}
        for one in plan.linear:
            shift = rounded[one.layer.name].shift
            if shift is None:
                continue
            bias = one.bias
            plain = 0.0 if bias is None else bias.read()
            biases[one.name] = (plain + shift).astype(np.float32)
        outputs = sum(len(rounded[name].codes.scale.reshape(-1)) for name in rounded)
        narrowed = sum(one.narrowed for one in rounded.values())
        dropped = placement.write(self.model, plan, activations, weights, biases)
        for name in rounded:
            self.ctx.did(name, f"static, {self.recipe.weights} weights")
        if plan.others:
            kinds = sorted({str(node.op) for node in plan.others})
            self.ctx.did(
                "other operators", f"{len(plan.others)} on codes: {', '.join(kinds)}"
            )
        if dropped:
            self.ctx.did("Relu and Clip", f"{dropped} became part of a QuantizeLinear")
        if narrowed:
            self.ctx.did(
                "weights",
                f"codes of {narrowed} of {outputs} outputs narrowed so that sums of "
                "two products fit 16 bits, whatever the activations",
            )


# --- one weight -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RoundingTask:
    """One weight to round, with all that this takes.

    Attributes:
        tensor: The weight.
        layout: How it is matrices [groups, outputs, inputs].
        axis: Its axis of outputs.
        recipe: How it is rounded.
        seen: What the layer reads, with Gram matrices, if that is known.
        shifts: Whether a bias takes up the shift of the mean.
        least: float64 [groups * outputs]: how small scales may be for the bias to fit.
        order: int [inputs]: the inputs in the order of the kernel, if that adds
            products of neighbours in 16 bits.
    """

    tensor: LazyTensor
    layout: Layout
    axis: int | None
    recipe: Recipe
    seen: InputStatistics | None
    shifts: bool
    least: Float64 | None
    order: NDArray[np.intp] | None


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A layer's codes.

    Attributes:
        codes: The weight.
        shift: What to add to the bias, float32 [outputs].
        narrowed: Outputs whose codes were narrowed for the processor.
    """

    codes: Codes
    shift: NDArray[np.float32] | None
    narrowed: int


@one_thread
def round_weight(task: RoundingTask) -> RoundedWeight:
    """Choose the codes of one weight."""
    recipe, seen = task.recipe, task.seen
    groups, outputs, columns = task.layout.matrices_shape
    matrices = task.layout.matrices(task.tensor.read())
    rows = np.ascontiguousarray(matrices).reshape(groups * outputs, columns)
    gram: Float64 | None = None
    mean: Float64 | None = None
    if seen is not None and seen.gram is not None:
        gram = seen.gram
        if task.shifts:
            mean = seen.mean
            gram = gram - seen.count * mean[:, :, None] * mean[:, None, :]
    grid, narrowed = _grid(task, rows, gram)
    grid = _raised(task, grid)
    if gram is not None and recipe.rounding == "gptq":
        codes = rounding.gptq(rows, gram, grid)
    elif gram is not None and recipe.rounding == "adaround":
        codes = rounding.adaround(rows, gram, grid)
    else:
        codes = rounding.nearest(rows, grid)
    if task.order is not None:
        codes[:, task.order] = dynamic.safe_codes(codes[:, task.order])
    shift = None
    if mean is not None:
        decoded = rounding.decode(codes, grid).reshape(matrices.shape)
        shift = expected_shift(matrices, decoded, mean).reshape(-1).astype(np.float32)
    return RoundedWeight(_shaped(task, codes, grid), shift, narrowed)


def _grid(task: RoundingTask, rows: Array, gram: Float64 | None) -> tuple[Grid, int]:
    """Choose scales; narrow the codes of outputs whose sums could clip."""
    recipe = task.recipe
    _, low, high = LEVELS[recipe.weights]
    grid = rounding.fit(
        rows,
        low,
        high,
        method=recipe.fit,
        gram=gram if recipe.fit in ("mse", "learned") else None,
    )
    used = np.asarray(rows.any(axis=1))[:, None]
    scale: Array = np.where(used, grid.scale, np.float32(0))
    if not recipe.per_channel:
        scale = np.full_like(scale, scale.max(initial=0))
    if not scale.any():
        return grid, 0
    # Any scale serves a row of zeros; a small one keeps its bias exact.
    positive: Array = np.greater(scale, 0)
    scale = np.where(positive, scale, scale[positive].min())
    grid = dataclasses.replace(grid, scale=scale.astype(np.float32))
    factor = _headroom(task, rows, grid)
    if not recipe.per_channel:
        factor = np.full_like(factor, factor.min(initial=1))
    # The largest code is a whole number, so that the largest weight reaches it.
    wide = np.maximum(np.floor(high * factor) / high, 1 / high)
    scale = grid.scale / wide[:, None]
    grid = dataclasses.replace(grid, scale=scale.astype(np.float32))
    return grid, int((factor < 1).sum())


def _headroom(task: RoundingTask, rows: Array, grid: Grid) -> Float64:
    """Return by what factor to narrow each output's codes; 1 leaves them as they are.

    The bound holds for any activations, so that no later input makes a sum clip. It
    costs less than a bit, which rounding wins back.
    """
    if task.order is None:
        return np.ones(len(rows))
    codes = rounding.nearest(rows, grid)[:, task.order]
    pairs = dynamic.largest_pair(codes).max(axis=1, initial=0)
    return processors.headroom(255.0 * pairs)


def _raised(task: RoundingTask, grid: Grid) -> Grid:
    """Raise scales so that the bias fits int32."""
    if task.least is None:
        return grid
    raised = np.maximum(grid.scale, task.least[:, None]).astype(np.float32)
    if not task.recipe.per_channel:
        raised = np.full_like(raised, raised.max(initial=0))
    return dataclasses.replace(grid, scale=raised)


def _shaped(task: RoundingTask, codes: Array, grid: Grid) -> Codes:
    """Give codes the shape and type of the weight."""
    data_type, low, high = LEVELS[task.recipe.weights]
    whole = not task.recipe.per_channel
    scheme = Scheme(data_type, low, high, True, None if whole else task.axis)
    shaped = task.layout.array(codes.reshape(task.layout.matrices_shape))
    scale, zero = grid.scale[:, 0], grid.zero[:, 0].astype(scheme.dtype)
    if whole:
        scale, zero = scale[0], zero[0]
    return Codes(
        scheme, shaped.astype(scheme.dtype), np.asarray(scale), np.asarray(zero)
    )


# --- layers and their inputs ----------------------------------------------------------


def _layers(plan: Plan) -> list[LinearWeight]:
    """Return the layers of a plan, each once."""
    return list({one.layer.name: one.layer for one in plan.linear}.values())


def _inputs(plan: Plan, activations: Mapping[gs.Tensor, Coded]) -> dict[str, Coded]:
    """Return how the inputs of each weight are coded, by its name."""
    sources = {id(one.tensor): one.source for one in plan.readings}
    found: dict[str, Coded] = {}
    for one in plan.linear:
        coded = activations[sources[id(one.node.inputs[0])]]
        known = found.get(one.layer.name)
        # The smallest scale asks most of a bias.
        if known is None or coded.scale < known.scale:
            found[one.layer.name] = coded
    return found
