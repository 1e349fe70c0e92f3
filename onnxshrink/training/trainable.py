"""Which weights training may change, and how; the graph itself tells."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Node, Weight
from onnxshrink.model.topology import is_onnx, subgraphs_of
from onnxshrink.quantization.schemes import limits
from onnxshrink.rewriting.expansion import expand
from onnxshrink.storage.census import VECTORS, group_tables, vector_table
from onnxshrink.structure.codes import CODES, MOVES, Decoder, decoder_of
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.layers import layer_at
from onnxshrink.structure.selection import selected
from onnxshrink.training.fakequant import (
    fake_quantized,
    float_products,
    is_pruned,
    levels_of,
)
from onnxshrink.training.gradients import _ZERO, is_covered
from onnxshrink.training.rules_quant import lsq_factor

__all__ = [
    "Scales",
    "Trainable",
    "attach",
    "find_trainable",
    "summary",
    "write",
]

Array = np.ndarray[Any, Any]
_T = onnx.TensorProto
Note = Callable[[str, str], None]
_EXPANDED_OPSET = 18
"""Lowest opset of what training graphs are written in."""

_READ: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GRU": (1, 2, 3),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3),
}
"""Inputs of operators that hold what was learnt; anything else is a setting."""
_LARGEST = 1e4
"""Constants with entries above this are masks, not weights."""
_INTEGER = {
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
"""Operators that multiply codes as they are, and which input the weight is."""
_TABLE = 256
"""A weight with no more distinct values than this is stored by index."""
_SMALLEST = 32
"""Entries from which a weight may have a table."""
_REPEATS = 16
"""Entries there are at least for each value of such a weight."""
_ASSIGNED = 64
"""Values up to which an entry may be assigned to another: all are compared."""
_STRAIGHT = 2.0**24
"""Masters are rounded to this part of 1 where only their gradient is wanted."""
_LOW_BITS = 16
"""Levels up to which ``scales=auto`` learns the scale of a weight."""
_TINY = float(np.finfo(np.float32).tiny)
_LEAST_HALF = np.finfo(np.float16).tiny

Scales = Literal["auto", "fixed", "learned"]


@dataclass(frozen=True, eq=False)
class Trainable:
    """A float weight that training may change as it is.

    Attributes:
        name: Name of the weight that a training step makes an input.
        start: Its values, float32.
        keep: 1 where it may change and 0 where it is zero and stays so, float32;
            ``None`` if all of it may change.
    """

    name: str
    start: Array
    keep: Array | None = None

    @property
    def held(self) -> int:
        """How many zeros stay zero."""
        return 0 if self.keep is None else int((self.keep == 0).sum())

    def attach(self, model: Model) -> gs.Tensor:
        """Rewrite a training copy; return what stands for the weight's values."""
        value = model.weight(self.name).value
        if self.keep is None:
            return value
        mask = model.add_weight(f"{self.name}_mask", self.keep)
        node = model.add_node("Mul", [mask, mask], name=f"{self.name}_kept")
        model.replace_uses(value, node.outputs[0])
        node.inputs[0] = value
        return node.outputs[0]

    def write(self, model: Model, trained: Array) -> None:
        """Write what was trained into a model that is not a training copy."""
        model.set_weight(self.name, trained)


@dataclass(frozen=True, eq=False)
class Tied(Trainable):
    """A weight of few distinct values; entries that are equal stay equal.

    The table of its values is trained. Each value gets the sum of the gradients of the
    entries that have it (Han, Mao and Dally, Deep Compression, ICLR 2016, section 3).
    Zero stays zero.

    Attributes:
        index: Position in ``start`` of each entry, int32 of the weight's shape.
    """

    index: Array = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def held(self) -> int:
        """How many zeros stay zero."""
        return int((self.start[self.index] == 0).sum())

    def attach(self, model: Model) -> gs.Tensor:
        """Look the entries up in the table."""
        model.set_weight(self.name, self.start)
        table = super().attach(model)
        index = model.add_weight(f"{self.name}_index", self.index)
        node = model.add_node("Gather", [index, index], name=f"{self.name}_tied")
        model.replace_uses(table, node.outputs[0])
        node.inputs[0] = table
        return node.outputs[0]

    def write(self, model: Model, trained: Array) -> None:
        """Write every entry."""
        model.set_weight(self.name, trained[self.index])


@dataclass(frozen=True, eq=False)
class Assigned(Tied):
    """A weight of few distinct values; an entry may change to another of them.

    Two things are trained, in one flat parameter: a float master of each entry that is
    not zero, and the table of values. In the graph an entry is the value of the table
    that is nearest to its master. Its gradient goes to that value, and straight through
    to the master (as the gradient of a rounded weight does: Bengio, Leonard and
    Courville 2013). An entry that is zero stays zero; another one may become zero.

    Attributes:
        start: The masters; then the table, ascending.
        index: Position in the table of each entry at the start, int32 of the weight's
            shape.
        places: Where in the flat weight the masters' entries are, int64, ascending.
    """

    places: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def _count(self) -> int:
        return int(self.places.size)

    @property
    def held(self) -> int:
        """How many zeros stay zero."""
        return int(self.index.size - self.places.size)

    def attach(self, model: Model) -> gs.Tensor:
        """Look each entry up by its master."""
        model.set_weight(self.name, self.start)
        whole = Trainable.attach(self, model)
        make = partial(_node, model, self.name)
        count, total = self._count, self.start.size
        # The weight's readers are to read what is made of it, and that reads it.
        made = make("Add", [whole, whole])
        model.replace_uses(whole, made)
        ends = [_vector(model, at) for at in (0, count, total)]
        master = make("Slice", [whole, ends[0], ends[1]])
        table = make("Slice", [whole, ends[1], ends[2]])
        below = make("Slice", [whole, ends[1], _vector(model, total - 1)])
        above = make("Slice", [whole, _vector(model, count + 1), ends[2]])
        half = model.add_weight("half", np.array(0.5, np.float32))
        middles = make("Mul", [make("Add", [below, above]), half])
        # Entries lie along the last axis, which onnxruntime walks through fast.
        row = make("Reshape", [master, _vector(model, 1, -1)])
        middles = make("Reshape", [middles, _vector(model, -1, 1)])
        passed = make("Cast", [make("Greater", [row, middles])], to=_T.FLOAT)
        index = make("ReduceSum", [passed, _vector(model, 0)], keepdims=0)
        index = make("Cast", [index], to=_T.INT32)
        found = make("Gather", [table, index])
        # Nothing is added but the gradient: that of Round is zero.
        large = model.add_weight("large", np.array(_STRAIGHT, np.float32))
        small = model.add_weight("small", np.array(1 / _STRAIGHT, np.float32))
        rounded = make("Mul", [make("Round", [make("Mul", [master, large])]), small])
        found = make("Add", [found, make("Sub", [master, rounded])])
        if self.held:
            zeros = model.add_weight("zeros", np.zeros(self.index.size, np.float32))
            places = model.add_weight("places", self.places)
            found = make("ScatterElements", [zeros, places, found], axis=0)
        shape = _vector(model, *self.index.shape)
        last = made.inputs[0]
        last.inputs[0] = make("Reshape", [found, shape])
        last.inputs[1] = model.add_weight("nothing", np.zeros((), np.float32))
        return model.weight(self.name).value

    def write(self, model: Model, trained: Array) -> None:
        """Write the nearest value for every entry."""
        count = self._count
        master, table = trained[:count], trained[count:]
        middles = (table[:-1] + table[1:]) * np.float32(0.5)
        index = np.zeros(count, np.int32)
        for middle in middles:
            index += master > middle
        values = np.zeros(self.index.size, np.float32)
        values[self.places] = table[index]
        model.set_weight(self.name, values.reshape(self.index.shape))


def _node(model: Model, name: str, op: str, inputs: Any, **attrs: Any) -> gs.Tensor:
    made = model.add_node(op, inputs, attrs=attrs, name=f"{name}_{op}")
    return made.outputs[0]


def _vector(model: Model, *values: int) -> gs.Tensor:
    return model.add_weight("vector", np.array(values, np.int64))


@dataclass(frozen=True, eq=False, kw_only=True)
class Codes(Trainable):
    """A weight stored as integer codes: a float master is trained and then rounded.

    Attributes:
        decoder: How the codes are read.
        scale: Name of the scale.
        levels: The codes it may have.
    """

    decoder: Decoder
    scale: str
    levels: range

    def attach(self, model: Model) -> gs.Tensor:
        """Round the master in the graph, in place of what decodes the codes."""
        decoder = _decoder(model, self.name)
        model.set_weight(self.name, self.start)
        value = model.weight(self.name).value
        decoder.replace(model, fake_quantized(model, value, decoder, self.levels))
        return super().attach(model)

    def write(self, model: Model, trained: Array) -> None:
        """Write codes, at the scale that the model has now."""
        weight = model.weight(self.name)
        scale = model.weight(self.scale).read()
        codes = self.decoder.encode(trained, scale, self.levels, weight.shape)
        model.set_weight(weight, codes.astype(weight.dtype))


@dataclass(frozen=True, eq=False, kw_only=True)
class Bias(Trainable):
    """A bias of int32 codes. Its scale is the inputs' scale times the weight's.

    Its steps are so fine that rounding does not matter: a float master takes its place
    while it is trained.

    Attributes:
        decoder: How the codes are read.
        scale: Name of the scale.
        factors: Names of the scales that multiply to it; empty if it has its own.
    """

    decoder: Decoder
    scale: str
    factors: tuple[str, ...] = ()

    def attach(self, model: Model) -> gs.Tensor:
        """Let the layer read the master."""
        decoder = _decoder(model, self.name)
        model.set_weight(self.name, self.start)
        decoder.replace(model, model.weight(self.name).value)
        return super().attach(model)

    def write(self, model: Model, trained: Array) -> None:
        """Write codes, and the scale that the others have come to."""
        weight, own = model.weight(self.name), model.weight(self.scale)
        scale = own.read()
        if self.factors:
            scale = _product(model, self.factors, scale.shape)
            model.set_weight(own, scale)
        wide = self.decoder.spread(scale).astype(np.float64)
        limits = np.iinfo(np.int32)
        codes = np.clip(np.rint(trained / wide), limits.min, limits.max)
        model.set_weight(weight, codes.astype(np.int32))


@dataclass(frozen=True, eq=False)
class Scale(Trainable):
    """The scale of a quantization. The logarithm of its change is trained.

    The scale therefore stays positive, and a step changes it by the same share whatever
    its size. ``slope`` is the root of LSQ's factor: the parameter is multiplied with
    it, and so is its gradient, which makes the factor.

    Attributes:
        names: The weights that hold this scale, which stay equal.
        slope: What the parameter is multiplied with.
    """

    names: tuple[str, ...] = ()
    slope: float = 1.0

    def attach(self, model: Model) -> gs.Tensor:
        """Multiply the scale by the exponential of the parameter."""
        parameter = model.add_weight(self.name, self.start)
        assert parameter.name == self.name
        slope = model.add_weight("slope", np.asarray(self.slope, np.float32))
        change = model.add_node("Mul", [parameter, slope]).outputs[0]
        change = model.add_node("Exp", [change]).outputs[0]
        for name in self.names:
            old = model.weight(name).value
            node = model.add_node("Mul", [change, change], name=f"{name}_learned")
            model.replace_uses(old, node.outputs[0])
            node.inputs[0] = old
        return parameter

    def write(self, model: Model, trained: Array) -> None:
        """Write the scale."""
        factor = np.exp(trained * np.float32(self.slope))
        for name in self.names:
            scale = model.weight(name).read()
            made = np.maximum(scale * factor, np.float32(_TINY))
            if _fits_half(scale):  # then it is stored as such
                made = np.maximum(made.astype(np.float16), _LEAST_HALF)
            model.set_weight(name, made.astype(scale.dtype))


def _fits_half(scale: Array) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(scale.astype(np.float16).astype(np.float32), scale)


def _decoder(model: Model, name: str) -> Decoder:
    made = decoder_of(model, model.weight(name))
    assert isinstance(made, Decoder), made  # it was one when it was found
    return made


def _product(model: Model, names: Sequence[str], shape: Sequence[int]) -> Array:
    """Return the product of scales as float32 of a shape."""
    first, second = (model.weight(name).read().reshape(-1) for name in names)
    return np.broadcast_to(first * second, [math.prod(shape)]).reshape(shape).copy()


def find_trainable(
    model: Model,
    outputs: Iterable[str],
    only: Sequence[str],
    skip: Sequence[str],
    note: Note,
    *,
    scales: Scales = "auto",
    ties: bool = True,
    reassign: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Trainable]:
    """List the weights that gradients of some outputs reach and that may change.

    Kernels, matrices, tables, biases, scales and shifts of float32 in the main graph
    are trained, and integer codes that DequantizeLinear, or Cast and Mul, decode. A
    single number is a setting. Zeros of a weight that
    has others stay zero. A vector of zeros is a bias that starts there and may change.
    Statistics of BatchNormalization and whatever is neither
    learnt nor float are left alone.

    Args:
        model: The model; it is not changed.
        outputs: Names of the outputs that the loss reads.
        only: Names or glob patterns of weights or nodes, or op types; empty is all.
        skip: The same; wins over ``only``.
        note: Receives (weight, reason) for what is frozen and might have been trained.
        scales: Whether scales of quantization are trained: ``learned`` all that can,
            ``auto`` those of weights of 16 levels or fewer.
        ties: Whether equal values of a matrix, kernel or table of at most 256 values
            stay equal.
        reassign: Whether an entry of such a weight may go over to another of at most
            64 values.
        shapes: Shapes of a feed, which some operators of com.microsoft need to be known
            for what they are.

    Returns:
        Each to be a parameter of the training step; scales first.
    """
    names_as_given = {weight.name for weight in model.weights()}
    model = model.copy()
    float_products(model)
    _expand(model, shapes)
    reached, blocked = _reach(model, outputs)
    found: list[Trainable] = []
    of_codes = _parameters_of_codes(model)
    for weight in model.weights():
        if not weight.size or not weight.shape or weight.name in of_codes:
            continue
        if weight.name not in names_as_given:
            continue
        readers = list(_readers(model, weight))
        learnt = [
            node
            for node, index in readers
            if index in _indices(node) or _INTEGER.get(node.op) == index
        ]
        if not learnt:
            continue
        names = [weight.name, *(n for node in learnt for n in (node.name, node.op))]
        if not selected(names, only, skip):
            continue
        key = id(weight.value)
        why = _why_not(weight, readers)
        if not why and key in blocked:
            why = f"gradients cannot pass {blocked[key]}, which has no gradient rule"
        elif not why and key not in reached:
            why = "no output that is taught depends on it"
        if why:
            note(weight.name, why)
            continue
        made = _made(model, weight, ties, reassign)
        if isinstance(made, str):
            note(weight.name, made)
        else:
            found.append(made)
    if scales == "fixed":
        return found
    return [*_scales(model, found, reached, only, skip, scales), *found]


def _expand(model: Model, shapes: Mapping[str, Sequence[int]] | None) -> None:
    """Write operators of com.microsoft as what they are made of, at given sizes."""
    if not any(node.domain == "com.microsoft" for node in model.graph.nodes):
        return
    for tensor in model.graph.inputs:
        if shapes and tensor.name in shapes and isinstance(tensor, gs.Variable):
            tensor.shape = [int(size) for size in shapes[tensor.name]]
    model.forget_shapes()
    # prepare does the same; what it cannot raise to this opset it says.
    with contextlib.suppress(ModelError):
        model.require_opset(_EXPANDED_OPSET)
    expand(model, training=True)


def attach(model: Model, chosen: Sequence[Trainable]) -> None:
    """Rewrite a copy for training: zeros held by masks, integers by float masters.

    The parameter of each keeps its name and is float32 afterwards, so that a training
    step can make it an input. A masked weight is multiplied with its mask, so that its
    gradient is zero where it is zero. A quantized one is quantized in the graph, which
    passes gradients straight through.
    """
    if any(isinstance(one, Codes) and len(one.levels) > 256 for one in chosen):
        model.require_opset(21)
    if any(isinstance(one, Assigned) for one in chosen):
        model.require_opset(13)  # ReduceSum
    float_products(model)
    for one in chosen:
        one.attach(model)


def write(
    model: Model, chosen: Sequence[Trainable], trained: Mapping[str, Array]
) -> int:
    """Write trained parameters into a model; return how many weights they changed.

    Args:
        model: The model, as it was when ``find_trainable`` saw it.
        chosen: What was trained, or some of it.
        trained: Values by name.
    """
    changed = 0
    # Codes are made at the scales that come out, and those of a bias at both.
    order = sorted(
        chosen, key=lambda o: (not isinstance(o, Scale), isinstance(o, Bias))
    )
    for one in order:
        names = one.names if isinstance(one, Scale) else (one.name,)
        before = [model.weight(name).read() for name in names]
        one.write(model, trained[one.name])
        pairs = zip(before, names, strict=True)
        changed += sum(not np.array_equal(a, model.weight(n).read()) for a, n in pairs)
    return changed


def summary(chosen: Sequence[Trainable]) -> str:
    """Say in words what is special about what is trained; empty if nothing is."""
    scales = sum(len(one.names) for one in chosen if isinstance(one, Scale))
    counts = [
        (sum(isinstance(one, (Codes, Bias)) for one in chosen), "as codes"),
        (sum(isinstance(one, Tied) for one in chosen), "of tied values"),
        (scales, "scales of quantization"),
        (sum(one.held for one in chosen), "zeros kept"),
    ]
    return ", ".join(f"{count:,} {what}" for count, what in counts if count)


def _reach(model: Model, outputs: Iterable[str]) -> tuple[set[int], dict[int, str]]:
    """Return tensors that gradients reach, and those an operator without rule needs."""
    wanted = set(outputs)
    reached: set[int] = set()
    blocked: dict[int, str] = {}
    stack: list[Any] = [t for t in model.graph.outputs if t.name in wanted]
    closed: list[tuple[Node, str]] = []
    while stack:
        tensor = stack.pop()
        if id(tensor) in reached:
            continue
        reached.add(id(tensor))
        for node in tensor.inputs:
            if is_onnx(node.domain) and ("", node.op) in _ZERO:
                continue
            call = any(
                f.name == node.op and (f.domain or "") == (node.domain or "")
                for f in model.graph.functions
            )
            if not call and not is_covered(node.op, node.domain or ""):
                closed.append((node, f"{node.op} {node.name!r}"))
            else:
                stack.extend(node.inputs)
    seen: set[int] = set()
    while closed:
        node, words = closed.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        reads = list(node.inputs)
        inner: list[gs.Graph] = list(subgraphs_of(node))
        while inner:
            graph = inner.pop()
            for child in graph.nodes:
                reads.extend(child.inputs)
                inner.extend(subgraphs_of(child))
        for tensor in reads:
            blocked.setdefault(id(tensor), words)
            closed.extend((maker, words) for maker in tensor.inputs)
    return reached, blocked


def _indices(node: Node) -> tuple[int, ...]:
    return _READ.get(node.op, ()) if is_onnx(node.domain) else ()


def _parameters_of_codes(model: Model) -> set[str]:
    """Return the weights that are scales and zero points of others."""
    found: set[str] = set()
    for weight in model.weights():
        if weight.data_type in CODES and weight.shape:
            decoder = decoder_of(model, weight)
            if isinstance(decoder, Decoder):
                found.update(decoder.parameters)
    return found


def _readers(model: Model, weight: Weight) -> Iterable[tuple[Node, int]]:
    """Yield what reads a weight, behind nodes that only move or decode it."""
    if weight.data_type in CODES or weight.data_type == onnx.TensorProto.INT32:
        decoder = decoder_of(model, weight)
        if isinstance(decoder, str):
            yield from _behind(weight.uses, _DECODE)
        else:
            for tensor, _ in decoder.ends:
                yield from _behind(_reads(tensor))
    else:
        yield from _behind(weight.uses)


_DECODE = frozenset({"Cast", "DequantizeLinear", "Mul", "Sub"})


def _reads(tensor: gs.Tensor) -> Iterator[tuple[Node, int]]:
    for reader in dict.fromkeys(tensor.outputs):
        for at, read in enumerate(reader.inputs):
            if read is tensor:
                yield reader, at


def _behind(
    uses: Iterable[tuple[Node, int]],
    more: frozenset[str] = frozenset(),
    depth: int = 5,
) -> Iterable[tuple[Node, int]]:
    for node, index in uses:
        through = node.op in MOVES or node.op in more
        if through and is_onnx(node.domain) and index == 0 and depth:
            yield from _behind(_reads(node.outputs[0]), more, depth - 1)
        else:
            yield node, index


def _why_not(weight: Weight, readers: Sequence[tuple[Node, int]]) -> str:
    kind = onnx.TensorProto.DataType.Name(weight.data_type)
    integer = [node for node, at in readers if _INTEGER.get(node.op) == at]
    if integer:
        return f"{integer[0].op} multiplies its codes, which has no gradient rule"
    is_bias = weight.data_type == onnx.TensorProto.INT32 and all(
        node.op == "DequantizeLinear" for node, _ in weight.uses
    )
    if weight.data_type not in (onnx.TensorProto.FLOAT, *CODES) and not is_bias:
        return f"its values are {kind.lower()}; float32 is trained, or integer codes"
    if weight.is_input:
        return (
            "it is also a graph input, so a caller may override it; "
            "fold:keep_defaults=false makes it a plain initializer"
        )
    if weight.is_output:
        return "it is also an output of the graph"
    if weight.graph is not weight._model.graph:
        return "it is inside a subgraph or function"
    strange = [node for node, index in readers if index not in _indices(node)]
    if strange:
        node = strange[0]
        return f"it is shared with {node.name or 'a node'} ({node.op})"
    return ""


def _made(
    model: Model, weight: Weight, ties: bool, reassign: bool = False
) -> Trainable | str:
    if weight.data_type != onnx.TensorProto.FLOAT:
        return _made_of_codes(model, weight)
    values = np.array(weight.read(), np.float32)
    why = _unfit(values)
    if why:
        return why
    zeros = values == 0
    if zeros.all():
        if values.ndim > 1:
            return "all of it is zero, and zeros stay"
        return Trainable(weight.name, values)
    table = _table(values) if ties else None
    if table is not None:
        (kept,) = np.nonzero(table == 0)
        index = np.searchsorted(table, values).astype(np.int32)
        keep = (table != 0).astype(np.float32) if kept.size else None
        if reassign and len(table) <= _ASSIGNED:
            places = np.flatnonzero(values)
            start = np.concatenate([values.reshape(-1)[places], table])
            held = (start != 0).astype(np.float32) if kept.size else None
            return Assigned(weight.name, start, held, index, places)
        return Tied(weight.name, table, keep, index)
    tables = _tables(values) if ties else None
    if tables is not None:
        table, index = tables
        keep = (table != 0).astype(np.float32) if (table == 0).any() else None
        return Tied(weight.name, table, keep, index)
    return Trainable(weight.name, values, _mask(zeros) if zeros.any() else None)


def _mask(zeros: Array) -> Array:
    return np.asarray(~zeros, np.float32)


def _unfit(values: Array) -> str:
    if not np.isfinite(values).all():
        return "it holds NaN or infinity"
    if np.abs(values).max() > _LARGEST:
        return f"it holds values above {_LARGEST:g}, as masks do"
    return ""


def _table(values: Array) -> Array | None:
    """Return the distinct values of a weight that has few, each many times."""
    if values.size < _SMALLEST:
        return None
    few: Array = np.zeros(0, np.float32)
    flat = values.reshape(-1)
    for at in range(0, flat.size, 1 << 16):
        few = np.union1d(few, flat[at : at + (1 << 16)])
        if len(few) > _TABLE:
            return None
    is_table = len(few) > 1 and flat.size >= _REPEATS * len(few)
    return np.asarray(few, np.float32) if is_table else None


def _tables(values: Array) -> tuple[Array, Array] | None:
    """Return the entries of a table of vectors, or of tables of parts, and their uses.

    The second is int32 of the shape of the values: which entry each of them is.
    """
    if sum(size > 1 for size in values.shape) < 2:
        return None
    patterns = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    for dim in VECTORS:
        found = vector_table(patterns, dim)
        if found is None:
            continue
        vectors, ranks = found
        if len(vectors) < 2 or vectors.size * _REPEATS > values.size:
            continue
        index = ranks.astype(np.int32)[:, None] * dim + np.arange(dim, dtype=np.int32)
        return vectors.reshape(-1).view(np.float32), index.reshape(values.shape)
    groups = group_tables(patterns, values.shape)
    if groups is None or groups.tables.size * _REPEATS > values.size:
        return None
    if groups.tables.shape[1] < 2:
        return None
    _, parts, _ = groups.split
    count = groups.tables.shape[1]
    first = (count * np.arange(parts, dtype=np.int32))[None, :, None]
    index = groups.ranks.astype(np.int32) + first
    return groups.tables.reshape(-1).view(np.float32), index.reshape(values.shape)


def _made_of_codes(model: Model, weight: Weight) -> Trainable | str:
    decoder = decoder_of(model, weight)
    if isinstance(decoder, str):
        return decoder
    scale = model.constant(decoder.scale)
    if scale is None:
        return "its scale is computed from data"
    if scale.dtype != np.float32:
        return f"its scale is {scale.dtype}, not float32"
    scales, codes = scale.read(), weight.read().astype(np.int32)
    try:
        values = decoder.decode(codes, scales)
    except ValueError:
        return "its scale does not fit its shape"
    if values.shape != decoder.shape:
        return "its scale has more axes than it"
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        return "its scale is not above zero"
    why = _unfit(values)
    if why:
        return why
    if weight.data_type == onnx.TensorProto.INT32:
        factors = _factors(model, decoder, scale)
        return Bias(
            weight.name, values, decoder=decoder, scale=scale.name, factors=factors
        )
    zeros = values == 0
    if zeros.all():
        return "all of it is zero, and zeros stay"
    is_held = is_pruned(codes, _zero_codes(decoder, codes))
    return Codes(
        weight.name,
        values,
        _mask(zeros) if is_held else None,
        decoder=decoder,
        scale=scale.name,
        levels=levels_of(codes),
    )


def _zero_codes(decoder: Decoder, codes: Array) -> Array:
    """Return the zero point of each code, in the shape of the weight."""
    wide = np.broadcast_to(decoder.zero, decoder.shape).reshape(-1)
    if decoder.places is None:
        return wide.reshape(codes.shape)
    made = np.empty(codes.size, np.float32)
    made[decoder.places.reshape(-1)] = wide
    return made.reshape(codes.shape)


# --- scales ---------------------------------------------------------------------------


def _factors(model: Model, decoder: Decoder, scale: Weight) -> tuple[str, ...]:
    """Return the scales of a layer's inputs and weight if a bias's is their product."""
    readers = [node for end, _ in decoder.ends for node in dict.fromkeys(end.outputs)]
    if len(readers) != 1 or readers[0].op not in ("Conv", "ConvTranspose", "Gemm"):
        return ()
    layer = layer_at(model, readers[0], codes=True)
    if layer is None or layer.codes is None:
        return ()
    tensor = next(use.input for use in layer.uses if use.node is readers[0])
    for _ in range(3):
        maker = None if tensor is None or not tensor.inputs else tensor.inputs[0]
        if maker is None or maker.op not in MOVES:
            break
        tensor = maker.inputs[0]
    if maker is None or maker.op != "DequantizeLinear":
        return ()
    names = []
    for step in (maker.inputs[1], layer.codes.scale):
        known = model.constant(step)
        if known is None or known.dtype != np.float32:
            return ()
        names.append(known.name)
    sizes = {model.weight(name).size for name in names} - {1}
    if len(sizes) > 1 or not sizes <= {scale.size}:
        return ()
    product = _product(model, names, scale.shape)
    same = np.allclose(product, scale.read(), rtol=1e-4, atol=0)
    return tuple(names) if same else ()


def _scales(
    model: Model,
    found: Sequence[Trainable],
    reached: set[int],
    only: Sequence[str],
    skip: Sequence[str],
    scales: Scales,
) -> Iterator[Scale]:
    """Yield the scales that may be learned."""
    weights: dict[str, list[Codes]] = {}
    for one in found:
        if isinstance(one, Codes):
            weights.setdefault(one.scale, []).append(one)
    locked = _locked(model, found)
    for name, users in weights.items():
        few = max(len(one.levels) for one in users) <= _LOW_BITS
        scale = model.weight(name)
        if (scales == "auto" and not few) or name in locked:
            continue
        if not _only_decodes(scale, users) or scale.is_input or scale.is_output:
            continue
        count = max(1, sum(one.start.size for one in users) // scale.size)
        zero = float(users[0].decoder.zero.max())
        yield _scale(model, (name,), count, max(1.0, users[0].levels[-1] - zero))
    if scales != "learned":
        return
    for names, count, largest, labels in _activations(model, reached):
        if not set(names) & locked and selected([*names, *labels], only, skip):
            yield _scale(model, names, count, largest)


def _only_decodes(scale: Weight, users: Sequence[Codes]) -> bool:
    """Whether nothing but the decoders of some weights reads a scale."""
    nodes = [node for one in users for node in one.decoder.nodes]
    for node, _ in scale.uses:
        readers = list(node.outputs[0].outputs) if node.op == "Gather" else [node]
        if not all(any(reader is known for known in nodes) for reader in readers):
            return False
    return True


def _scale(model: Model, names: tuple[str, ...], count: int, largest: float) -> Scale:
    slope = math.sqrt(lsq_factor(count, max(1, round(largest))))
    start = np.zeros(model.weight(names[0]).shape, np.float32)
    return Scale(model.fresh(f"{names[0]}_log"), start, None, names, slope)


def _locked(model: Model, found: Sequence[Trainable]) -> set[str]:
    """Return the scales that must stay, as an int32 bias relies on them."""
    chosen = {one.name: one for one in found if isinstance(one, Bias)}
    locked: set[str] = set()
    for weight in model.weights():
        if weight.data_type != onnx.TensorProto.INT32 or len(weight.uses) != 1:
            continue
        node = weight.uses[0][0]
        if node.op != "DequantizeLinear" or weight.uses[0][1] != 0:
            continue
        bias = chosen.get(weight.name)
        own = model.constant(node.inputs[1])
        if bias is not None and bias.factors:
            if own is not None and len(own.uses) == 1:
                continue
            locked |= set(bias.factors)
            continue
        decoder = decoder_of(model, weight)
        if own is not None and isinstance(decoder, Decoder):
            locked |= set(_factors(model, decoder, own))
    return locked


def _activations(
    model: Model, reached: set[int]
) -> Iterator[tuple[tuple[str, ...], int, float, list[str]]]:
    """Yield scales of activations: their names, values, largest code, labels.

    Scales that stand on both sides of codes stay equal, and so do those on both sides
    of operators that only pass values on.
    """
    groups: dict[str, str] = {}

    def root(name: str) -> str:
        while groups[name] != name:
            name = groups[name]
        return name

    known: dict[int, Weight] = {}
    pairs = [
        n
        for n in model.graph.nodes
        if n.op in ("QuantizeLinear", "DequantizeLinear") and is_onnx(n.domain)
    ]
    for node in pairs:
        scale = model.constant(node.inputs[1])
        if scale is None or model.constant(node.inputs[0]) is not None:
            continue
        known[id(node)] = scale
        groups.setdefault(scale.name, scale.name)
    for node in pairs:
        for reader in _pass_on(node):
            if id(node) in known and id(reader) in known:
                one, two = known[id(node)], known[id(reader)]
                is_pair = node.op == "QuantizeLinear"
                if is_pair or np.array_equal(one.read(), two.read()):
                    groups[root(one.name)] = root(two.name)
    shapes = value_infos(model)
    for key in dict.fromkeys(root(name) for name in groups):
        names = tuple(name for name in groups if root(name) == key)
        nodes = [node for node in pairs if node.inputs[1].name and id(node) in known]
        nodes = [node for node in nodes if known[id(node)].name in names]
        if _is_free(model, names, nodes, reached):
            first = next((n for n in nodes if n.op == "QuantizeLinear"), nodes[0])
            info = shapes.get(first.inputs[0].name)
            sizes = [] if info is None or info.shape is None else info.shape[1:]
            count = math.prod(n for n in sizes if isinstance(n, int))
            labels = [n for node in nodes for n in (node.name, node.op)]
            yield names, max(1, count), _largest(model, first), labels


_PASSES = frozenset({"Flatten", "MaxPool", "Gather", "Slice", *MOVES})
"""Operators behind which codes keep their scale."""


def _pass_on(node: Node) -> Iterator[Node]:
    """Yield the nodes that quantize, or decode, what this node gives, unchanged."""
    wanted = "DequantizeLinear" if node.op == "QuantizeLinear" else "QuantizeLinear"
    stack = [node.outputs[0]]
    for _ in range(64):
        if not stack:
            return
        for reader, index in _reads(stack.pop()):
            if index == 0 and reader.op == wanted:
                yield reader
            elif index == 0 and reader.op in _PASSES:
                stack.append(reader.outputs[0])


def _is_free(
    model: Model, names: Sequence[str], nodes: Sequence[Node], reached: set[int]
) -> bool:
    """Whether scales of activations can be learned."""
    first = model.weight(names[0]).read()
    for name in names:
        scale = model.weight(name)
        uses = scale.uses
        if (
            scale.dtype != np.float32
            or scale.is_input
            or scale.is_output
            or scale.graph is not model.graph
            or id(scale.value) not in reached
            or not np.array_equal(scale.read(), first)
            or not (scale.read() > 0).all()
            or any(n.op not in ("QuantizeLinear", "DequantizeLinear") for n, _ in uses)
            or any(at != 1 or not any(n is m for m in nodes) for n, at in uses)
        ):
            return False
    return any(node.op == "QuantizeLinear" for node in nodes)


def _largest(model: Model, node: Node) -> float:
    """Return the largest code that an activation may have, counted from zero."""
    zero = model.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is None or zero.data_type not in CODES:
        return 255.0
    high = limits(zero.data_type)[1]
    return float(max(1, high - int(zero.read().astype(np.int32).max())))
