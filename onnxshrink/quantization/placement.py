"""Where to put QuantizeLinear and DequantizeLinear so that integer kernels run.

``Planner`` decides which operators of the main graph run on codes, and which values
become codes for them. ``Plan`` is its answer. ``write`` puts a plan into the graph, and
only there are numbers looked at.

onnxruntime 1.31's optimized graphs show what its CPU provider makes of an operator
between DequantizeLinear and QuantizeLinear:

- Conv, Gemm and MatMul of a weight get integer kernels; Gemm and MatMul give floats
  where no QuantizeLinear follows, Conv needs one;
- Add, Mul, Concat, AveragePool, GlobalAveragePool, Sigmoid, LeakyRelu and Softmax get
  integer kernels with scales of their own;
- MaxPool, Reshape, Transpose and others that only move values run on codes if both
  sides have one scale;
- Relu and Clip behind an integer operator cost nothing if the codes end where they
  clip: QuantizeLinear clips there. Any other operator between two integer operators
  makes them decode and encode again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.model import Model, Node, ValueInfo, attribute
from onnxshrink.model.exporter import in_order
from onnxshrink.model.topology import is_onnx
from onnxshrink.quantization.schemes import Scheme, limits, quantize
from onnxshrink.structure.bias import Bias, bias_at, give_bias
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.layers import LinearWeight, find

__all__ = [
    "Coded",
    "Codes",
    "Linear",
    "Plan",
    "Planner",
    "Reading",
    "bias_codes",
    "clipped_range",
    "loses",
    "smallest_scale",
    "write",
]

Array = NDArray[Any]

LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
RESCALING = frozenset(
    {
        "Add",
        "AveragePool",
        "Concat",
        "GlobalAveragePool",
        "LeakyRelu",
        "Mul",
        "Sigmoid",
        "Softmax",
    }
)
"""Operators with an integer kernel that reads and writes scales of their own."""
MOVING = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that hand on values of their first input, and so its codes."""
CLIPPING = frozenset({"Clip", "Relu"})
_MANY = frozenset({"Add", "Concat", "Mul"})
_INT32_ROOM = 2.0**30
"""Largest code of a bias: half of what int32 holds, the other half for the sums."""


@dataclass(frozen=True, eq=False)
class Linear:
    """An operator that multiplies activations with a weight, and may do so in codes.

    Attributes:
        node: The Conv, Gemm or MatMul.
        layer: Its weight, with all that reads it.
    """

    node: Node
    layer: LinearWeight

    @property
    def name(self) -> str:
        """Name of the node, or of its output where it has none."""
        return str(self.node.name or self.node.outputs[0].name)

    @property
    def names(self) -> tuple[str, ...]:
        """All that ``only`` and ``skip`` may call it."""
        return self.name, self.layer.name, str(self.node.op)

    @property
    def bias(self) -> Bias | None:
        """The bias the operator itself adds, if it has one."""
        model = self.layer.weight.model
        channels = self.layer.uses[0].channels
        found = bias_at(model, self.node, channels, -1)
        return found if found is not None and found.node is self.node else None


@dataclass(frozen=True, eq=False)
class Reading:
    """A value that becomes codes.

    Attributes:
        tensor: The value.
        source: The value whose scale it has: itself, or one of several that share a
            scale because moving operators or Concat tie them together.
        made_in_codes: Whether an operator on codes makes it. Then all that reads it
            reads the codes. Otherwise only operators on codes do.
    """

    tensor: gs.Tensor
    source: gs.Tensor
    made_in_codes: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """Which operators run on codes, and which values become codes for that.

    Attributes:
        linear: Operators with a weight, in graph order.
        others: Operators without one, in graph order.
        readings: Values that become codes, in graph order.
        clips: The Relu or Clip behind an operator on codes, and the value it makes.
        ranges: By source, the values whose ranges the shared scale must cover.
    """

    linear: tuple[Linear, ...]
    others: tuple[Node, ...]
    readings: tuple[Reading, ...]
    clips: Mapping[Node, gs.Tensor]
    ranges: Mapping[gs.Tensor, tuple[gs.Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Coded:
    """How one value becomes codes.

    Attributes:
        scheme: The codes.
        scale: float32 scalar.
        zero: Zero point, scalar of the codes' type.
    """

    scheme: Scheme
    scale: NDArray[np.float32]
    zero: Array


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight as codes.

    Attributes:
        scheme: The codes; its axis is that of the weight's output channels.
        codes: Of ``scheme.dtype``, in the shape of the weight.
        scale: float32, scalar or [channels].
        zero: Zero points, of the same shape.
    """

    scheme: Scheme
    codes: Array
    scale: NDArray[np.float32]
    zero: Array


# --- planning ---------------------------------------------------------------------


@dataclass(eq=False)
class Planner:
    """Knows which operators of a model can run on codes; makes plans for some of them.

    Attributes:
        model: The model; it is not changed.
        skips: (name, reason) of operators with a weight that cannot run on codes.
    """

    model: Model
    skips: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Look at the graph once."""
        graph = self.model.graph
        self._order: list[Node] = list(in_order(graph.nodes))
        self._infos = value_infos(self.model)
        self._outputs = {id(tensor) for tensor in graph.outputs}
        self._linear = {id(one.node): one for one in self._candidates()}

    @property
    def linear(self) -> tuple[Linear, ...]:
        """Operators with a weight that can run on codes, in graph order."""
        return tuple(
            self._linear[id(node)] for node in self._order if id(node) in self._linear
        )

    def _candidates(self) -> Iterator[Linear]:
        here = {id(node) for node in self._order}
        for layer in find(self.model):
            if layer.why_not:
                self.skips.append((layer.name, layer.why_not))
                continue
            for use in layer.uses:
                linear = Linear(use.node, layer)
                why = self._why_not(linear, use.index, id(use.node) in here)
                if why:
                    self.skips.append((linear.name, why))
                else:
                    yield linear

    def _why_not(self, linear: Linear, index: int, here: bool) -> str:
        node, layer = linear.node, linear.layer
        if not here:
            return "it is inside a branch, loop or function"
        if node.op not in LINEAR:
            return f"onnxruntime has no integer kernel of {node.op} on codes"
        if layer.weight.data_type != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(layer.weight.data_type).lower()
            return f"it computes in {kind}, and integer kernels stand for float32"
        if index != 1 or not self._is_float(node.inputs[0]):
            return "its weight is not the second factor of a float32 activation"
        if any(use.layout != layer.layout for use in layer.uses):
            return "its weight is shared by operators that read it differently"
        if node.op == "MatMul" and len(layer.layout.shape) != 2:
            return "its weight is a stack of matrices"
        if node.op == "Conv" and len(layer.layout.shape) > 5:
            return "onnxruntime convolves at most three spatial axes"
        return self._unusual(linear)

    def _unusual(self, linear: Linear) -> str:
        node, bias = linear.node, linear.bias
        if node.op == "Gemm" and (
            attribute(node, "transA", 0)
            or attribute(node, "alpha", 1.0) != 1.0
            or (bias is not None and bias.factor != 1.0)
        ):
            return "it has factors or a transposed input; run fold first"
        if bias is not None and bias.why_unknown:
            return f"its bias {bias.why_unknown}"
        return ""

    def _is_float(self, tensor: gs.Tensor) -> bool:
        """Whether a value is a float32 activation: no weight, and of that type."""
        if not tensor.name or self.model.constant(tensor) is not None:
            return False
        info = self._infos.get(tensor.name, ValueInfo(tensor.name, 0, None))
        return info.data_type == onnx.TensorProto.FLOAT

    def plan(self, chosen: Iterable[Linear], refused: Iterable[gs.Tensor] = ()) -> Plan:
        """Plan for these operators to run on codes.

        Args:
            chosen: Some of ``linear``.
            refused: Values that must stay floats, such as masks. What reads or makes
                them then runs on floats too.
        """
        return _Planning(self, chosen, refused).plan()


class _Planning:
    """One run of ``Planner.plan``."""

    def __init__(
        self, planner: Planner, chosen: Iterable[Linear], refused: Iterable[gs.Tensor]
    ) -> None:
        self.planner = planner
        self.refused = {id(tensor) for tensor in refused}
        self.linear = {
            id(one.node): one
            for one in chosen
            if not self._touches_refused(one.node, one.node.inputs[:1])
        }
        self.clips: dict[int, Node] = {}
        self.others: dict[int, Node] = {}

    def _touches_refused(self, node: Node, inputs: Sequence[gs.Tensor]) -> bool:
        made = list(node.outputs)
        clip = self._clip_behind(node)
        if clip is not None:
            made = [clip.outputs[0]]
        # Gemm and MatMul can leave what they make in floats.
        read = list(inputs) if node.op in ("Gemm", "MatMul") else [*inputs, *made]
        return any(id(tensor) in self.refused for tensor in read)

    def plan(self) -> Plan:
        wanted = self._wanted()
        coded = self._coded(wanted)
        readings = self._readings(coded)
        return Plan(
            tuple(one for one in self.planner.linear if id(one.node) in self.linear),
            tuple(n for n in self.planner._order if id(n) in self.others),
            *self._tied(readings),
        )

    # Backward: where would codes be read?

    def _wanted(self) -> set[int]:
        """Return values from which operators on codes lead to one with a weight."""
        wanted = {id(one.node.inputs[0]) for one in self.linear.values()}
        for node in reversed(self.planner._order):
            if not any(id(tensor) in wanted for tensor in node.outputs):
                continue
            if node.op in CLIPPING and self._maker_can(node):
                wanted.add(id(node.inputs[0]))
            elif self._runs_on_codes(node):
                wanted.update(id(tensor) for tensor in self._inputs(node))
        return wanted

    def _maker_can(self, clip: Node) -> bool:
        makers = clip.inputs[0].inputs
        return bool(makers) and self._clip_behind(makers[0]) is clip

    def _runs_on_codes(self, node: Node) -> bool:
        """Whether there is an integer kernel of an operator without weight."""
        if not is_onnx(node.domain) or len(node.outputs) < 1:
            return False
        inputs = self._inputs(node)
        if node.op in _MANY:
            if len(inputs) != len(node.inputs):
                return False  # a constant among them
        elif node.op not in RESCALING and node.op not in MOVING:
            return False
        if node.op == "Resize" and attribute(node, "mode", "nearest") != "nearest":
            return False
        if node.op == "MaxPool" and len([t for t in node.outputs if t.name]) > 1:
            return False
        if not inputs or not all(self.planner._is_float(tensor) for tensor in inputs):
            return False
        return not self._touches_refused(node, inputs)

    def _inputs(self, node: Node) -> list[gs.Tensor]:
        """Return the activations of an operator that would become codes."""
        read = node.inputs if node.op in _MANY else node.inputs[:1]
        return [t for t in read if self.planner.model.constant(t) is None and t.name]

    # Forward: where are codes made?

    def _coded(self, wanted: set[int]) -> dict[int, gs.Tensor]:
        """Note the operators on codes; return the values they make and read."""
        read = {
            id(one.node.inputs[0]): one.node.inputs[0] for one in self.linear.values()
        }
        coded = dict(read)
        for node in self.planner._order:
            if id(node) in self.linear:
                self._made(node, coded, wanted)
                continue
            leads = any(id(tensor) in wanted for tensor in self._results(node))
            if not leads or not self._runs_on_codes(node):
                continue
            if all(id(tensor) in coded for tensor in self._inputs(node)):
                self.others[id(node)] = node
                self._made(node, coded, wanted)
        return coded

    def _results(self, node: Node) -> list[gs.Tensor]:
        clip = self._clip_behind(node)
        return list(node.outputs) if clip is None else [clip.outputs[0]]

    def _made(self, node: Node, coded: dict[int, gs.Tensor], wanted: set[int]) -> None:
        """Note the values that an operator on codes makes."""
        results = self._results(node)
        if node.op in ("Gemm", "MatMul") and not any(
            id(tensor) in wanted and id(tensor) not in self.refused
            for tensor in results
        ):
            return
        clip = self._clip_behind(node)
        if clip is not None:
            self.clips[id(clip)] = clip
        coded.update((id(tensor), tensor) for tensor in results if tensor.name)

    def _clip_behind(self, node: Node) -> Node | None:
        """Return the Relu or constant Clip that alone reads what a node makes."""
        if node.op in MOVING or len(node.outputs) != 1:
            return None
        made = node.outputs[0]
        if len(made.outputs) != 1 or id(made) in self.planner._outputs:
            return None
        reader: Node = made.outputs[0]
        if reader.op not in CLIPPING or not is_onnx(reader.domain):
            return None
        known = clipped_range(self.planner.model, reader) is not None
        return reader if known and reader.inputs[0] is made else None

    # What follows for values.

    def _readings(self, coded: Mapping[int, gs.Tensor]) -> list[tuple[gs.Tensor, bool]]:
        """Return the values that become codes, and whether they are made in codes."""
        running = {**{k: one.node for k, one in self.linear.items()}, **self.others}
        read = {
            id(tensor)
            for node in running.values()
            for tensor in (
                self._inputs(node) if id(node) in self.others else node.inputs[:1]
            )
        }
        found: list[tuple[gs.Tensor, bool]] = []
        graph = self.planner.model.graph
        for tensor in graph.inputs:
            if id(tensor) in read:
                found.append((tensor, False))
        for node in self.planner._order:
            maker = node.inputs[0].inputs[0] if id(node) in self.clips else node
            made_in_codes = id(maker) in running and (
                id(node) in self.clips or self._clip_of(node) is None
            )
            for tensor in node.outputs:
                if id(tensor) not in coded:
                    continue
                needed = made_in_codes and maker.op not in ("Gemm", "MatMul")
                if needed or id(tensor) in read:
                    found.append((tensor, made_in_codes))
        kept = {id(tensor) for tensor, _ in found}
        for key, clip in list(self.clips.items()):
            if id(clip.outputs[0]) not in kept:
                del self.clips[key]
        return found

    def _clip_of(self, node: Node) -> Node | None:
        clip = self._clip_behind(node)
        return clip if clip is not None and id(clip) in self.clips else None

    def _tied(
        self, readings: Sequence[tuple[gs.Tensor, bool]]
    ) -> tuple[
        tuple[Reading, ...],
        dict[Node, gs.Tensor],
        dict[gs.Tensor, tuple[gs.Tensor, ...]],
    ]:
        """Give values that must have the same scale the same source."""
        here = {id(tensor): tensor for tensor, _ in readings}
        ties = _Ties(here)
        moved: set[int] = set()
        for node in self.others.values():
            if node.op in MOVING:
                for tensor in node.outputs:
                    if ties.join(node.inputs[0], tensor):
                        moved.add(id(tensor))
            elif node.op == "Concat" and self._clip_of(node) is None:
                for tensor in node.inputs:
                    # A value that others read as well keeps its finer scale.
                    if len(tensor.outputs) == 1:
                        ties.join(node.outputs[0], tensor)
        ranges: dict[gs.Tensor, list[gs.Tensor]] = {}
        found = []
        for tensor, made in readings:
            source = ties.source(tensor)
            found.append(Reading(tensor, source, made))
            covered = ranges.setdefault(source, [])
            if id(tensor) not in moved:
                covered.append(tensor)
        clips = {clip: clip.outputs[0] for clip in self.clips.values()}
        return tuple(found), clips, {key: tuple(v) for key, v in ranges.items()}


class _Ties:
    """Sets of values that share a scale (union-find)."""

    def __init__(self, tensors: Mapping[int, gs.Tensor]) -> None:
        self._tensors = tensors
        self._parent = {key: key for key in tensors}

    def _root(self, key: int) -> int:
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, first: gs.Tensor, second: gs.Tensor) -> bool:
        """Tie two values; ``False`` if one of them does not become codes."""
        if id(first) not in self._parent or id(second) not in self._parent:
            return False
        self._parent[self._root(id(second))] = self._root(id(first))
        return True

    def source(self, tensor: gs.Tensor) -> gs.Tensor:
        """Return the value that stands for all that are tied to this one."""
        return self._tensors[self._root(id(tensor))]


def loses(layer: LinearWeight) -> bool:
    """Whether an integer kernel takes longer than that in floats, by a fixed table.

    Times in codes over those in floats, one layer, x86 with VNNI: convolutions of one
    input channel 10.8 along three axes, 2.9 to 3.3 along two, 3.0 along one; of three
    input channels 4.4 along three axes, 1.84 along two with a stride of 2; depthwise
    7x7 1.45. Of the same kind on a processor without VNNI are 3x3 depthwise (1.5), but
    in between integer operators floats cost more than that.
    """
    if not layer.uses or layer.kind != "Conv":
        return False
    node = layer.node
    _, inputs, *kernel = layer.uses[0].layout.shape
    groups = int(attribute(node, "group", 1))
    strides = attribute(node, "strides", None) or [1]
    if groups == 1:
        few = inputs <= 3 and (len(kernel) == 3 or max(strides) > 1)
        return inputs == 1 or few
    if inputs > 1:
        return False
    return len(kernel) == 3 or int(np.prod(kernel)) >= 49


def clipped_range(model: Model, node: Node) -> tuple[float, float] | None:
    """Return what a Relu or Clip clips to; ``None`` if that is not constant."""
    if node.op == "Relu":
        return 0.0, np.inf
    low = float(attribute(node, "min", -np.inf))
    high = float(attribute(node, "max", np.inf))
    bounds = [low, high]
    for index in (1, 2):
        if len(node.inputs) > index and node.inputs[index].name:
            known = model.constant(node.inputs[index])
            if known is None or known.is_input or known.size != 1:
                return None
            bounds[index - 1] = float(known.read().reshape(()))
    return bounds[0], bounds[1]


def bias_codes(
    bias: Array, activation: NDArray[np.float32], weight: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return a bias as int32 codes with the scale of its layer's sums.

    Args:
        bias: float32 [outputs].
        activation: Scale of the activations, scalar.
        weight: Scale of the weight, scalar or [outputs].
    """
    scale = np.asarray(activation * weight, dtype=np.float32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    room = np.iinfo(np.int32)
    return np.clip(codes, room.min, room.max).astype(np.int32), scale


def smallest_scale(bias: Array, activation: float) -> NDArray[np.float64]:
    """Return the smallest scales of a weight with which its bias fits int32.

    Args:
        bias: float32 [outputs].
        activation: Scale of the activations.

    Returns:
        float64 [outputs].
    """
    return np.abs(bias.astype(np.float64)) / (activation * _INT32_ROOM)


# --- writing ----------------------------------------------------------------------


def write(
    model: Model,
    plan: Plan,
    activations: Mapping[gs.Tensor, Coded],
    weights: Mapping[str, Codes],
    biases: Mapping[str, Array],
) -> int:
    """Put a plan into the model it was made for.

    Args:
        model: The model the plan was made for; changed.
        plan: The plan.
        activations: For each source of ``plan.ranges``, how it becomes codes.
        weights: The codes of each weight, by its name.
        biases: float32 values of biases by the names of their nodes, where they differ
            from the model's; a node without bias may get one.

    Returns:
        How many Relu and Clip nodes went, being part of a QuantizeLinear now.
    """
    return _Writer(model, plan, activations, weights, biases).write()


class _Writer:
    """One run of ``write``."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        activations: Mapping[gs.Tensor, Coded],
        weights: Mapping[str, Codes],
        biases: Mapping[str, Array],
    ) -> None:
        self.model = model
        self.plan = plan
        self.activations = activations
        self.weights = weights
        self.biases = biases
        self.running = {
            *(id(one.node) for one in plan.linear),
            *(id(node) for node in plan.others),
        }
        self._zeros: dict[tuple[Any, ...], gs.Tensor] = {}
        self._scales: dict[gs.Tensor, gs.Tensor] = {}
        self._decoded: dict[str, gs.Tensor] = {}
        self._clipped: dict[int, tuple[str, str]] = {}

    def write(self) -> int:
        scales = {
            id(one.node.inputs[0]): one.node.inputs[0] for one in self.plan.linear
        }
        sources = {id(r.tensor): r.source for r in self.plan.readings}
        before = {key: self.activations[sources[key]] for key in scales}
        inputs = {id(one.node): id(one.node.inputs[0]) for one in self.plan.linear}
        for one in self.plan.linear:
            self._weight(one)
            self._bias(one, before[inputs[id(one.node)]])
        dropped = sum(self._drop_clip(clip) for clip in self.plan.clips)
        for reading in self.plan.readings:
            self._reading(reading)
        for clipped, name in self._clipped.values():
            self.model.lineage.replace(clipped, name)
        return dropped

    def _zero(self, values: Array) -> gs.Tensor:
        """Return a zero point. Equal ones are stored once.

        Equal scales are not: each may be learned later.
        """
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._zeros:
            self._zeros[key] = self.model.add_weight("zero_point", values)
        return self._zeros[key]

    def _scale(self, reading: Reading) -> gs.Tensor:
        """Return the scale of a value, one for all that are tied."""
        source = reading.source
        if source not in self._scales:
            scale = np.asarray(self.activations[source].scale, np.float32)
            name = f"{source.name}_scale"
            self._scales[source] = self.model.add_weight(name, scale)
        return self._scales[source]

    def _drop_clip(self, clip: Node) -> bool:
        """Remove a Relu or Clip if the QuantizeLinear behind it clips the same.

        What it read takes the name of what it gave; that is what the codes stand for.
        """
        made = self.plan.clips[clip]
        source = next(r.source for r in self.plan.readings if r.tensor is made)
        if not _clips_alike(clipped_range(self.model, clip), self.activations[source]):
            return False
        before = clip.inputs[0]
        maker = before.inputs[0]
        index = next(i for i, tensor in enumerate(maker.outputs) if tensor is before)
        self.model.remove(clip, self.model.graph)
        maker.outputs[index] = made
        self._clipped[id(made)] = before.name, made.name
        return True

    def _reading(self, reading: Reading) -> None:
        """Put QuantizeLinear and DequantizeLinear behind a value."""
        tensor, coded = reading.tensor, self.activations[reading.source]
        name = tensor.name or "value"
        scale, zero = self._scale(reading), self._zero(coded.zero)
        readers = list(dict.fromkeys(tensor.outputs))
        read = tensor
        if not reading.made_in_codes and any(n.op == "MaxPool" for n in tensor.inputs):
            # onnxruntime moves QuantizeLinear in front of MaxPool, whose kernel for
            # uint8 takes 4 to 59 times as long. It stays behind another operator.
            read = self.model.add_node("Max", [tensor], name=f"{name}_kept").outputs[0]
        quantizer = self.model.add_node(
            "QuantizeLinear", [read, scale, zero], name=f"{name}_QuantizeLinear"
        )
        dequantizer = self.model.add_node(
            "DequantizeLinear",
            [quantizer.outputs[0], scale, zero],
            name=f"{name}_DequantizeLinear",
        )
        real = dequantizer.outputs[0]
        if id(tensor) in self._clipped:
            self.model.lineage.replace(name, real.name)
        if reading.made_in_codes:
            self.model.replace_uses(tensor, real)
            # That included the new QuantizeLinear, which reads the value itself.
            quantizer.inputs[0] = tensor
            return
        for node in readers:
            if id(node) not in self.running:
                continue
            for index, read in enumerate(node.inputs):
                if read is tensor:
                    node.inputs[index] = real

    def _weight(self, linear: Linear) -> None:
        weight = linear.layer.weight
        coded = self.weights[linear.layer.name]
        if linear.layer.name not in self._decoded:
            self._decoded[linear.layer.name] = self._dequantized(
                weight.constant.name or "weight",
                coded.codes,
                coded.scale,
                coded.zero,
                coded.scheme.axis,
            )
        linear.node.inputs[1] = self._decoded[linear.layer.name]

    def _dequantized(
        self, name: str, codes: Array, scale: Array, zero: Array, axis: int | None
    ) -> gs.Tensor:
        parts = [
            self.model.add_weight(f"{name}_quantized", codes),
            self.model.add_weight(f"{name}_scale", scale),
            self._zero(zero),
        ]
        attrs = {} if axis is None or not scale.ndim else {"axis": axis}
        node = self.model.add_node(
            "DequantizeLinear", parts, attrs=attrs, name=f"{name}_DequantizeLinear"
        )
        made: gs.Tensor = node.outputs[0]
        return made

    def _bias(self, linear: Linear, activation: Coded) -> None:
        node, bias = linear.node, linear.bias
        if linear.name in self.biases:
            values = self.biases[linear.name]
        elif bias is not None:
            values = bias.read()
        else:
            return
        weight = self.weights[linear.layer.name]
        codes, scale = bias_codes(values, activation.scale, weight.scale)
        name = bias.tensor.name if bias is not None else f"{linear.name}_bias"
        made = self._dequantized(name, codes, scale, np.zeros(scale.shape, np.int32), 0)
        give_bias(node, made)


def _clips_alike(bounds: tuple[float, float] | None, coded: Coded) -> bool:
    """Whether codes end where a Clip clips, so that it changes no code."""
    if bounds is None:
        return False
    low, high = limits(coded.scheme.data_type)
    edges = np.clip(np.array(bounds, np.float32), -3e38, 3e38)
    whole = Scheme(coded.scheme.data_type, low, high, symmetric=False)
    ends = quantize(edges, coded.scale, coded.zero, whole).astype(np.int64)
    return bool(ends[0] == low and ends[1] == high)
