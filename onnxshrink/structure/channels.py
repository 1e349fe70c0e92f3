"""Channels: which slices of which weights have to go together.

A channel is one position along one axis of a tensor. Operators tie positions of their
inputs to positions of their outputs. Output channel 3 of a Conv is row 3 of its weight,
entry 3 of its bias, channel 3 of every BatchNormalization, Relu and pool behind it, and
column 3 of the next weight. Where branches meet in Add, it is channel 3 of both; Concat
shifts it; Flatten makes it a run of columns. An attention head, which Reshape makes, is
a run of channels of three projections.

Positions that are tied can be removed together, and the graph stays valid. DepGraph
(Fang et al. 2023) ties whole axes; here single positions are tied, so that Concat,
Split, Flatten, heads and groups need nothing special.

``find`` builds the graph of all positions once and takes its connected components.
Components that run through the same axes make a ``Group``. Inputs and outputs of the
model are fixed, and so is what an operator without a rule reads or makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx, subgraphs_of
from onnxshrink.structure.layers import is_float
from onnxshrink.structure.symbolic import Dims, Facts, facts_of, static

__all__ = ["Group", "Role", "Slices", "find", "remove", "remove_all"]

Indices = NDArray[np.int64]
Role = Literal["producer", "consumer", "filter", "scale", "shift", "variance"]
"""What a weight does with a channel.

``producer`` makes it, ``consumer`` multiplies it and sums it up with others, ``filter``
makes it from the channel of the same number (depthwise). ``scale``, ``shift`` and
``variance`` are those of biases and normalisations.
"""


@dataclass(frozen=True, eq=False)
class Slices:
    """Where the channels of a group are in one weight.

    Attributes:
        weight: The weight.
        axis: The axis along which it is cut.
        role: What the weight does with the channels.
        offsets: Positions along the axis, [channels of the group, positions each].
    """

    weight: Weight
    axis: int
    role: Role
    offsets: Indices


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that run through the same axes; any of them can be removed.

    Attributes:
        name: Name of the first weight that has them; unique within one ``find``.
        size: How many channels, each of which may be several positions of an axis.
        where: Their slices of every weight, in node order.
        why: Why none of them can be removed; empty if they can.
        inexact: Why outputs change even where all consumers weigh a removed channel
            with zero: LayerNormalization takes a mean over it, for one. Empty if they
            do not change.
        nodes: The nodes that read the weights.
    """

    name: str
    size: int
    where: tuple[Slices, ...]
    why: str
    inexact: str
    nodes: tuple[Node, ...]
    _ties: _Ties
    _positions: Mapping[int, Indices]

    @property
    def is_fixed(self) -> bool:
        """Whether none of its channels can be removed."""
        return bool(self.why)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that ``only`` and ``skip`` may use: weights, nodes, op types."""
        weights = [part.weight.name for part in self.where]
        nodes = [name for node in self.nodes for name in (node.name, node.op)]
        return tuple(dict.fromkeys([self.name, *weights, *nodes]))

    @property
    def width(self) -> int:
        """The fewest positions that a channel has in one of the weights."""
        return min(int(part.offsets.shape[1]) for part in self.where)

    def __repr__(self) -> str:
        """Show name, size and the weights."""
        parts = [f"{p.weight.name}[{p.axis}] {p.role}" for p in self.where]
        fixed = f"; fixed: {self.why}" if self.why else ""
        return f"Group({self.name!r}, {self.size}: {', '.join(parts)}{fixed})"


def find(model: Model) -> list[Group]:
    """Return the groups of channels that weights of the main graph have.

    Groups of one channel are left out, and so are those of weights in subgraphs and
    functions. Time and memory grow linearly with the sizes of all axes. The groups hold
    for the model as it is now: find them again after a change.
    """
    ties = _Ties(model)
    return ties.groups()


def remove(model: Model, group: Group, keep: Sequence[int]) -> None:
    """Remove the channels of a group that ``keep`` does not list, in place.

    Args:
        model: The model the group was found in, unchanged since.
        group: The group.
        keep: Indices of the channels that stay, below ``group.size``.

    Raises:
        UsageError: The group is fixed, of another model, or nothing would stay.
    """
    remove_all(model, [(group, keep)])


def remove_all(model: Model, kept: Iterable[tuple[Group, Sequence[int]]]) -> None:
    """Remove channels of several groups of one ``find`` at once, as ``remove`` does."""
    gone: dict[int, list[Indices]] = {}
    ties: _Ties | None = None
    for group, keep in kept:
        ties = group._ties
        for axis, positions in group._positions.items():
            gone.setdefault(axis, []).append(positions[_gone(model, group, keep)])
    if ties is None:
        return
    ties.cut({axis: np.concatenate(parts).ravel() for axis, parts in gone.items()})


def _gone(model: Model, group: Group, keep: Sequence[int]) -> NDArray[np.bool_]:
    if group._ties.model is not model:
        raise UsageError(f"{group.name} is a group of another model")
    if group.why:
        raise UsageError(f"channels of {group.name} cannot be removed: {group.why}")
    chosen = sorted(set(keep))
    if not chosen or chosen[0] < 0 or chosen[-1] >= group.size:
        raise UsageError(
            f"keep some of the {group.size} channels of {group.name}, not {keep}"
        )
    gone = np.ones(group.size, dtype=bool)
    gone[chosen] = False
    return gone


# --- the graph of positions -----------------------------------------------------------


class _UnknownError(Exception):
    """A node whose effect on channels is not known; the message says why."""


Edit = Callable[[Callable[[int], int]], None]
"""Adapts a node to new sizes of axes.

Its argument returns the new size of an axis, given the axis's number.
"""


@dataclass(frozen=True)
class _MergedAxis:
    """An axis that a reshape merges from others, or splits into others.

    Attributes:
        whole: Number of the merged axis; its size is the product of their sizes.
        parts: Numbers of the others, the outermost first.
        why: Why only one of the others can be followed.
    """

    whole: int
    parts: tuple[int, ...]
    why: str


@dataclass
class _Axes:
    """Numbers for axes, and for the positions along them.

    Attributes:
        of: Number by (identity of the tensor, axis).
        sizes: Size of each axis.
        starts: Number of the first position of each.
        tensors: The tensor of each.
        total: Positions in all.
    """

    of: dict[tuple[int, int], int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tensors: list[gs.Tensor] = field(default_factory=list)
    total: int = 0

    def number(self, tensor: gs.Tensor, axis: int, size: int) -> int:
        key = (id(tensor), axis)
        if key not in self.of:
            self.of[key] = len(self.sizes)
            self.tensors.append(tensor)
            self.sizes.append(size)
            self.starts.append(self.total)
            self.total += size
        return self.of[key]


class _Ties:
    """The positions of all axes of a model, and which of them go together."""

    def __init__(self, model: Model) -> None:
        self.model = model
        overridable = [w.constant for w in model.weights() if w.is_input]
        self.facts: Facts = facts_of(model, overridable)
        self.axes = _Axes()
        self.edges: list[tuple[Indices, Indices]] = []
        self.fixed: dict[int, str] = {}
        self.mixed: dict[int, str] = {}
        self.uses: dict[int, list[tuple[Weight, int, Role, Node]]] = {}
        self.edits: list[Edit] = []
        self.merged: list[_MergedAxis] = []
        self._weights: dict[int, Weight | None] = {}
        self._known: dict[int, Weight] = {}
        self._aliases: dict[int, list[gs.Tensor]] = {}
        self._none: Indices = np.zeros(0, np.int64)
        for tensor in model.graph.inputs:
            self.fix(tensor, f"{tensor.name!r} is an input of the model")
        for tensor in model.graph.outputs:
            self.fix(tensor, f"{tensor.name!r} is an output of the model")
        for node in model.graph.nodes:
            self._read(node)
        self._tie_merged()

    def _read(self, node: Node) -> None:
        rule = _RULES.get(node.op) if is_onnx(node.domain) else None
        label = f"{node.op} ({node.name or _first_output(node)})"
        if node.op in {"Constant", "Identity"} and self.weight(node.outputs[0]):
            return
        try:
            if rule is None:
                raise _UnknownError("reads or makes it")
            if any(isinstance(v, gs.Node.AttributeRef) for v in node.attrs.values()):
                raise _UnknownError("takes attributes from its function")
            rule(self, node)
        except _UnknownError as error:
            for tensor in (*node.inputs, *node.outputs):
                self.fix(tensor, f"{label} {error}")
        for graph in subgraphs_of(node):
            self._fix_captured(graph, label)

    def _fix_captured(self, graph: gs.Graph, label: str) -> None:
        for node in graph.nodes:
            for tensor in node.inputs:
                self.fix(tensor, f"a branch or body of {label} reads it")
            for inner in subgraphs_of(node):
                self._fix_captured(inner, label)
        for tensor in graph.outputs:
            self.fix(tensor, f"a branch or body of {label} returns it")

    # --- what rules ask and say -----------------------------------------------------

    def weight(self, tensor: gs.Tensor) -> Weight | None:
        """Return the constant a tensor is."""
        if id(tensor) not in self._weights:
            found = self.model.constant(tensor) if tensor.name else None
            if found is not None:
                found = self._known.setdefault(id(found.constant), found)
                self._aliases.setdefault(id(found.constant), []).append(tensor)
            self._weights[id(tensor)] = found
        return self._weights[id(tensor)]

    def shape(self, tensor: gs.Tensor) -> Dims:
        """Return the shape, of which single sizes may be unknown."""
        weight = self.weight(tensor)
        if weight is not None:
            return weight.shape
        shape = self.facts.shape(tensor)
        if shape is None:
            raise _UnknownError(f"has {tensor.name!r}, whose rank is unknown")
        return shape

    def sizes(self, tensor: gs.Tensor) -> list[int | None]:
        """Return the shape with ``None`` where a size is unknown."""
        return [dim if isinstance(dim, int) else None for dim in self.shape(tensor)]

    def axis(self, tensor: gs.Tensor, axis: int) -> int | None:
        """Return the number of an axis, or ``None`` if its size is unknown."""
        size = self.sizes(tensor)[axis]
        if size is None:
            return None
        weight = self.weight(tensor)
        root = tensor if weight is None else weight.constant
        return self.axes.number(root, axis, size)

    def positions(self, axis: int) -> Indices:
        """Return the numbers of an axis's positions."""
        start = self.axes.starts[axis]
        return np.arange(start, start + self.axes.sizes[axis])

    def fix(self, tensor: gs.Tensor, why: str, *axes: int) -> None:
        """Forbid any removal along axes, by default all."""
        try:
            every = range(len(self.shape(tensor))) if tensor.name else ()
        except _UnknownError:
            return  # nothing is ever tied to an axis of unknown rank
        for axis in axes or every:
            number = self.axis(tensor, axis)
            if number is not None:
                self.fixed.setdefault(number, why)

    def mix(self, tensor: gs.Tensor, axis: int, why: str) -> None:
        """Say that values at one position of an axis change if another is removed."""
        number = self.axis(tensor, axis)
        if number is not None:
            self.mixed.setdefault(number, why)

    def use(self, node: Node, tensor: gs.Tensor, axis: int, role: Role) -> None:
        """Record what a weight does along an axis; ignore what is no weight."""
        weight = self.weight(tensor)
        if weight is None or not is_float(weight):
            return
        number = self.axis(tensor, axis)
        if number is not None:
            self.uses.setdefault(number, []).append((weight, axis, role, node))

    def join(self, a: Indices, b: Indices) -> None:
        """Tie positions one by one."""
        if a.size:
            self.edges.append((a, b))

    def tie(self, a: gs.Tensor, i: int, b: gs.Tensor, j: int) -> None:
        """Tie two axes position by position; size 1 is broadcast and ties nothing."""
        one, two = self.axis(a, i), self.axis(b, j)
        why = f"its size and that of {a.name!r} or {b.name!r} are not known to be equal"
        if one is None or two is None:
            for number in (one, two):
                if number is not None and self.axes.sizes[number] != 1:
                    self.fixed.setdefault(number, why)
        elif self.axes.sizes[one] == self.axes.sizes[two]:
            self.join(self.positions(one), self.positions(two))
        elif 1 not in (self.axes.sizes[one], self.axes.sizes[two]):
            self.fixed.setdefault(one, why)
            self.fixed.setdefault(two, why)

    def components(self) -> Indices:
        """Return for each position which connected component it is in."""
        one, two = (
            np.concatenate([edge[side] for edge in self.edges] or [self._none])
            for side in (0, 1)
        )
        shape = (self.axes.total, self.axes.total)
        matrix = coo_array((np.ones(len(one), np.int8), (one, two)), shape=shape)
        _, labels = connected_components(matrix, directed=False)
        return labels.astype(np.int64)

    def _tie_merged(self) -> None:
        """Tie each merged axis to one of the axes it is merged from.

        The others are fixed, and then any choice is sound. The one to take is one that
        can still change, which is known only once all nodes were read: the heads of an
        attention, or the channels inside them, but not the axis of three that holds
        query, key and value, nor rows and columns of an image.
        """
        if not self.merged:
            return
        labels = self.components()
        is_fixed = np.zeros(int(labels.max(initial=-1)) + 1, dtype=bool)
        for axis in self.fixed:
            is_fixed[labels[self.positions(axis)]] = True
        for merged in self.merged:
            free = [
                a for a in merged.parts if not is_fixed[labels[self.positions(a)]].any()
            ]
            chosen = free[0] if free else merged.parts[0]
            for axis in merged.parts:
                if axis != chosen:
                    self.fixed.setdefault(axis, merged.why)
            sizes = [self.axes.sizes[axis] for axis in merged.parts]
            place = merged.parts.index(chosen)
            stride = math.prod(sizes[place + 1 :])
            whole = self.positions(merged.whole)
            part = np.arange(len(whole)) // stride % sizes[place]
            self.join(whole, self.positions(chosen)[part])

    # --- the result -------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Collect the connected components into groups."""
        axes, total = self.axes, self.axes.total
        if not self.uses:
            return []
        labels = self.components()
        count = int(labels.max()) + 1
        axis_of = np.repeat(np.arange(len(axes.sizes)), axes.sizes)
        # Channels belong to one group if they have as many positions on each axis.
        marks = np.random.default_rng(0).integers(
            0, 2**63, len(axes.sizes), dtype=np.uint64
        )
        keys = np.zeros(count, np.uint64)
        np.add.at(keys, labels, marks[axis_of])
        _, kind = np.unique(keys, return_inverse=True)
        first = np.full(count, total)
        np.minimum.at(first, labels, np.arange(total))
        order = np.lexsort((np.arange(total), first[labels], axis_of, kind[labels]))
        sizes = np.bincount(kind)
        starts = np.concatenate([[0], np.cumsum(np.bincount(kind[labels]))])
        found = []
        for number, size in enumerate(sizes):
            if size < 2:
                continue
            members = order[starts[number] : starts[number + 1]]
            cuts = np.flatnonzero(np.diff(axis_of[members])) + 1
            positions = {
                int(axis_of[part[0]]): (part - axes.starts[axis_of[part[0]]]).reshape(
                    size, -1
                )
                for part in np.split(members, cuts)
            }
            if any(axis in self.uses for axis in positions):
                found.append((int(size), positions))
        return self._named(found)

    def _named(self, found: list[tuple[int, dict[int, Indices]]]) -> list[Group]:
        ranks = {axis: rank for rank, axis in enumerate(self.uses)}
        found.sort(
            key=lambda one: min(
                (ranks[axis], int(p.min()))
                for axis, p in one[1].items()
                if axis in ranks
            )
        )
        taken: set[str] = set()
        groups = []
        for size, positions in found:
            used = sorted((a for a in positions if a in ranks), key=ranks.__getitem__)
            uses = [(use, positions[axis]) for axis in used for use in self.uses[axis]]
            makers = [use for use, _ in uses if use[2] == "producer"]
            base = (makers or [use for use, _ in uses])[0]
            name = base[0].name
            if name in taken:
                name = f"{base[0].name}[{base[1]}]"
            number = 2
            while name in taken:
                name = f"{base[0].name}[{base[1]}]#{number}"
                number += 1
            taken.add(name)
            groups.append(
                Group(
                    name,
                    size,
                    tuple(_distinct(uses)),
                    self._reason(self.fixed, positions),
                    self._reason(self.mixed, positions),
                    tuple({id(use[3]): use[3] for use, _ in uses}.values()),
                    self,
                    positions,
                )
            )
        return groups

    @staticmethod
    def _reason(reasons: Mapping[int, str], axes: Iterable[int]) -> str:
        return next((reasons[axis] for axis in sorted(axes) if axis in reasons), "")

    def cut(self, gone: Mapping[int, Indices]) -> None:
        """Remove positions of axes from weights, and adapt nodes to what is left."""
        by_root: dict[int, dict[int, Indices]] = {}
        for (root, axis), number in self.axes.of.items():
            if number not in gone:
                continue
            left = np.delete(np.arange(self.axes.sizes[number]), gone[number])
            named = [self.axes.tensors[number], *self._aliases.get(root, ())]
            for value in dict.fromkeys(tensor.name for tensor in named):
                self.model.lineage.keep(value, axis, left)
            if root in self._known:
                by_root.setdefault(root, {})[axis] = gone[number]
        for root, cuts in by_root.items():
            values = self._known[root].read()
            for axis, positions in cuts.items():
                values = np.delete(values, positions, axis)
            self.model.set_weight(self._known[root], values)
        sizes = {
            axis: self.axes.sizes[axis] - len(np.unique(positions))
            for axis, positions in gone.items()
        }
        for edit in self.edits:
            edit(lambda axis: sizes.get(axis, self.axes.sizes[axis]))
        self.model.forget_shapes()


def _distinct(
    uses: Iterable[tuple[tuple[Weight, int, Role, Node], Indices]],
) -> Iterable[Slices]:
    """Yield each slice once, also where several nodes read the weight."""
    seen = set()
    for (weight, axis, role, _), offsets in uses:
        key = (id(weight.constant), axis, role)
        if key not in seen:
            seen.add(key)
            yield Slices(weight, axis, role, offsets)


def _first_output(node: Node) -> str:
    return next((t.name for t in node.outputs if t.name), "without outputs")


# --- rules: what an operator ties -----------------------------------------------------

Rule = Callable[[_Ties, Node], None]


def _input(node: Node, index: int) -> gs.Tensor | None:
    """Return an input, or ``None`` where it is left out."""
    if index < len(node.inputs) and node.inputs[index].name:
        tensor: gs.Tensor = node.inputs[index]
        return tensor
    return None


def _outputs(node: Node) -> list[gs.Tensor]:
    return [tensor for tensor in node.outputs if tensor.name]


def _pointwise(ties: _Ties, node: Node) -> None:
    """Every input is broadcast to every output."""
    for out in _outputs(node):
        for tensor in node.inputs:
            if tensor.name:
                _align(ties, tensor, out)
    role = _POINTWISE_ROLES.get(node.op)
    if role is None:
        return
    for tensor in node.inputs:
        for axis in range(len(ties.shape(tensor))):
            ties.use(node, tensor, axis, role)


def _align(ties: _Ties, tensor: gs.Tensor, out: gs.Tensor) -> None:
    """Tie the axes of an operand to those of the result, counted from the right."""
    rank, whole = len(ties.shape(tensor)), len(ties.shape(out))
    if rank > whole:
        raise _UnknownError(f"broadcasts {tensor.name!r} in a way that is not known")
    for axis in range(rank):
        ties.tie(tensor, axis, out, whole - rank + axis)


def _same(ties: _Ties, node: Node) -> None:
    """The first input keeps its shape; further inputs are settings."""
    x = node.inputs[0]
    for out in _outputs(node):
        _same_axes(ties, x, out, range(len(ties.shape(x))))
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as a setting")


def _same_axes(ties: _Ties, x: gs.Tensor, y: gs.Tensor, axes: Iterable[int]) -> None:
    if len(ties.shape(x)) != len(ties.shape(y)):
        raise _UnknownError("changes the rank in a way that is not known")
    for axis in axes:
        ties.tie(x, axis, y, axis)


def _spatial(ties: _Ties, node: Node, *tensors: gs.Tensor) -> None:
    for tensor in tensors:
        axes = range(2, len(ties.shape(tensor)))
        if axes:
            ties.fix(tensor, f"{node.op} moves along it", *axes)


def _conv(ties: _Ties, node: Node) -> None:
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    is_transposed = node.op == "ConvTranspose"
    group = int(attribute(node, "group", 1))
    into, out = (0, 1) if is_transposed else (1, 0)
    sizes = ties.sizes(x)[1], ties.sizes(y)[1]
    if len(ties.shape(x)) < 3 or None in sizes or None in ties.sizes(w):
        raise _UnknownError("has channels whose number is unknown")
    ties.tie(x, 0, y, 0)
    _spatial(ties, node, x, y, w)
    bias = _input(node, 2)
    if bias is not None:
        ties.tie(bias, 0, y, 1)
        ties.use(node, bias, 0, "shift")
    if group == 1:
        ties.tie(x, 1, w, into)
        ties.tie(w, out, y, 1)
        ties.use(node, w, into, "consumer")
        ties.use(node, w, out, "producer")
        return
    inputs, outputs = sizes
    if group < 1 or not inputs or not outputs or inputs % group or outputs % group:
        raise _UnknownError("has groups that do not divide its channels")
    # Whole groups go: their inputs, outputs and rows of the weight.
    if is_transposed:
        ties.tie(x, 1, w, 0)
    else:
        ties.tie(w, 0, y, 1)
    ties.fix(w, f"{node.op} has {group} groups of it", 1)
    ties.use(node, w, 0, "filter")
    before, after = ties.axis(x, 1), ties.axis(y, 1)
    assert before is not None
    assert after is not None
    heads = ties.positions(after)[:: outputs // group]
    ties.join(ties.positions(before), np.repeat(heads, inputs // group))
    ties.join(ties.positions(after), np.repeat(heads, outputs // group))
    each = inputs // group

    def edit(size: Callable[[int], int]) -> None:
        if size(before) != inputs:
            node.attrs["group"] = size(before) // each

    ties.edits.append(edit)


def _batch_norm(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if len(_outputs(node)) > 1 or attribute(node, "training_mode", 0):
        raise _UnknownError("is in training mode")
    if len(ties.shape(x)) < 2:
        raise _UnknownError("has no channels")
    _same_axes(ties, x, y, range(len(ties.shape(x))))
    roles: tuple[Role, ...] = ("scale", "shift", "shift", "variance")
    for tensor, role in zip(node.inputs[1:], roles, strict=False):
        ties.tie(tensor, 0, y, 1)
        ties.use(node, tensor, 0, role)


def _instance_norm(ties: _Ties, node: Node) -> None:
    _batch_norm(ties, node)
    _spatial(ties, node, node.inputs[0])


def _layer_norm(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    _same_axes(ties, x, y, range(rank))
    for tensor in _outputs(node)[1:]:
        ties.fix(tensor, f"{node.op} gives it out")
    for axis in range(int(attribute(node, "axis", -1)) % rank, rank):
        ties.mix(x, axis, f"{node.op} takes the variance along it")
    roles: tuple[Role, ...] = ("scale", "shift")
    for tensor, role in zip(node.inputs[1:], roles, strict=False):
        if tensor.name:
            _align(ties, tensor, y)
            for axis in range(len(ties.shape(tensor))):
                ties.use(node, tensor, axis, role)


def _pool(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    _same_axes(ties, x, y, (0, 1))
    _spatial(ties, node, x, y)
    for tensor in _outputs(node)[1:]:
        ties.fix(tensor, f"{node.op} counts positions in it")


def _product(
    ties: _Ties, node: Node, a: gs.Tensor, b: gs.Tensor, axes: Sequence[int | None]
) -> None:
    """Tie a matrix product's axes.

    Args:
        ties: The ties.
        node: The node, whose first output is the product.
        a: Left operand.
        b: Right operand.
        axes: (row of a, inner of a, inner of b, column of b); ``None`` if there is none
            because the operand is a vector.
    """
    row, left, right, column = axes
    assert left is not None
    assert right is not None
    y = node.outputs[0]
    last = len(ties.shape(y)) - 1
    ties.tie(a, left, b, right)
    if row is not None:
        ties.tie(a, row, y, last if column is None else last - 1)
        ties.use(node, a, row, "producer")
    if column is not None:
        ties.tie(b, column, y, last)
        ties.use(node, b, column, "producer")
    ties.use(node, a, left, "consumer")
    ties.use(node, b, right, "consumer")
    if ties.weight(a) is None and ties.weight(b) is None:
        ties.mix(a, left, f"{node.op} sums products of two values along it")


def _gemm(ties: _Ties, node: Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    left = 0 if attribute(node, "transA", 0) else 1
    right = 1 if attribute(node, "transB", 0) else 0
    _product(ties, node, a, b, (1 - left, left, right, 1 - right))
    bias = _input(node, 2)
    if bias is not None:
        _align(ties, bias, node.outputs[0])
        for axis in range(len(ties.shape(bias))):
            ties.use(node, bias, axis, "shift")


def _matmul(ties: _Ties, node: Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ranks = len(ties.shape(a)), len(ties.shape(b))
    if 0 in ranks:
        raise _UnknownError("multiplies a scalar")
    row = ranks[0] - 2 if ranks[0] > 1 else None
    column = ranks[1] - 1 if ranks[1] > 1 else None
    right = ranks[1] - 2 if ranks[1] > 1 else 0
    _product(ties, node, a, b, (row, ranks[0] - 1, right, column))
    matrix = (row is not None) + (column is not None)
    batch = len(ties.shape(y)) - matrix
    for tensor, rank in zip((a, b), ranks, strict=True):
        for axis in range(rank - 2):
            ties.tie(tensor, axis, y, batch - (rank - 2) + axis)
            ties.use(node, tensor, axis, "producer")


def _einsum(ties: _Ties, node: Node) -> None:
    equation = attribute(node, "equation", "")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in text or any(len(set(t)) < len(t) for t in [*terms, right]):
        raise _UnknownError("has an equation that is not followed")
    places: dict[str, tuple[gs.Tensor, int]] = {
        letter: (node.outputs[0], axis) for axis, letter in enumerate(right)
    }
    for tensor, term in zip(node.inputs, terms, strict=True):
        for axis, letter in enumerate(term):
            ties.tie(tensor, axis, *places.setdefault(letter, (tensor, axis)))
            role: Role = "producer" if letter in right else "consumer"
            ties.use(node, tensor, axis, role)
    weighed = {
        letter
        for tensor, term in zip(node.inputs, terms, strict=True)
        if ties.weight(tensor) is not None
        for letter in term
    }
    for letter in set(left) - set(right) - weighed - {","}:
        ties.mix(*places[letter], "Einsum sums products of two values along it")


def _transpose(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    order = attribute(node, "perm", None) or list(range(rank))[::-1]
    for axis, source in enumerate(order):
        ties.tie(x, source, y, axis)


def _concat(ties: _Ties, node: Node) -> None:
    y = node.outputs[0]
    axis = int(attribute(node, "axis", 1)) % len(ties.shape(y))
    _consecutive(ties, node, [t for t in node.inputs if t.name], y, axis)


def _split(ties: _Ties, node: Node) -> None:
    x, parts = node.inputs[0], list(node.outputs)
    axis = int(attribute(node, "axis", 0)) % len(ties.shape(x))
    if any(not part.name for part in parts):
        raise _UnknownError("leaves out an output")
    _consecutive(ties, node, parts, x, axis)
    sizes = _input(node, 1)
    if sizes is not None:
        ties.fix(sizes, "Split takes it as sizes")
    numbers = [ties.axis(part, axis) for part in parts]
    known = [number for number in numbers if number is not None]
    old = [ties.axes.sizes[number] for number in known]

    def edit(size: Callable[[int], int]) -> None:
        new = [size(number) for number in known]
        if new == old:
            return
        node.attrs.pop("num_outputs", None)
        if ties.model.opset < 13:
            node.attrs["split"] = new
            return
        given = ties.model.add_weight(f"{parts[0].name}_sizes", np.array(new, np.int64))
        list_inputs = [node.inputs[0], given]
        node.inputs.clear()
        node.inputs.extend(list_inputs)

    ties.edits.append(edit)


def _consecutive(
    ties: _Ties, node: Node, parts: Sequence[gs.Tensor], whole: gs.Tensor, axis: int
) -> None:
    """Tie parts of an axis to the whole, and all other axes one to one."""
    rank = len(ties.shape(whole))
    for part in parts:
        _same_axes(ties, part, whole, (a for a in range(rank) if a != axis))
    target = ties.axis(whole, axis)
    sources = [ties.axis(part, axis) for part in parts]
    if target is None or None in sources:
        for tensor in (whole, *parts):
            ties.fix(tensor, f"{node.op} has parts of unknown size", axis)
        return
    start = 0
    positions = ties.positions(target)
    for source in sources:
        assert source is not None
        size = ties.axes.sizes[source]
        ties.join(ties.positions(source), positions[start : start + size])
        start += size


def _gather(ties: _Ties, node: Node) -> None:
    data, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    rank, more = len(ties.shape(data)), len(ties.shape(indices))
    axis = int(attribute(node, "axis", 0)) % max(rank, 1)
    ties.fix(data, "Gather picks from it by number", axis)
    ties.fix(indices, "Gather takes it as numbers")
    for place in range(more):
        ties.fix(y, "Gather makes it", axis + place)
    for place in range(rank):
        if place != axis:
            ties.tie(data, place, y, place if place < axis else place + more - 1)
            ties.use(node, data, place, "producer")


def _constant_axes(
    ties: _Ties, node: Node, index: int, name: str = "axes"
) -> list[int] | None:
    """Return axes from an attribute or a constant input; ``None`` if absent."""
    given = attribute(node, name, None)
    if given is not None:
        return [int(axis) for axis in given]
    tensor = _input(node, index)
    if tensor is None:
        return None
    ties.fix(tensor, f"{node.op} takes it as a setting")
    weight = ties.weight(tensor)
    if weight is None or weight.is_input:
        raise _UnknownError("computes its settings")
    return [int(axis) for axis in weight.read().reshape(-1)]


def _reduce(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    given = _constant_axes(ties, node, 1)
    if not given and attribute(node, "noop_with_empty_axes", 0):
        _same_axes(ties, x, y, range(rank))
        return
    axes = {axis % rank for axis in given} if given else set(range(rank))
    keeps = bool(attribute(node, "keepdims", 1))
    place = 0
    for axis in range(rank):
        if axis in axes:
            ties.mix(x, axis, f"{node.op} runs along it")
        else:
            ties.tie(x, axis, y, axis if keeps else place)
            place += 1


def _softmax(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    axis = int(attribute(node, "axis", -1 if ties.model.opset >= 13 else 1)) % rank
    _same_axes(ties, x, y, range(rank))
    last = rank if ties.model.opset < 13 else axis + 1
    ties.fix(x, f"{node.op} divides by the sum along it", *range(axis, last))


def _pad(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    pads = _constant_axes(ties, node, 1, "pads")
    if _input(node, 3) is not None or pads is None or len(pads) != 2 * rank:
        raise _UnknownError("has pads that are not followed")
    for axis in range(rank):
        if pads[axis] or pads[rank + axis]:
            ties.fix(x, "Pad extends it", axis)
            ties.fix(y, "Pad extends it", axis)
        else:
            ties.tie(x, axis, y, axis)


def _slice(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    for tensor in node.inputs[1:]:
        ties.fix(tensor, "Slice takes it as a setting")
    starts = _constant_axes(ties, node, 1, "starts")
    axes = _constant_axes(ties, node, 3)
    cut = {a % rank for a in (range(len(starts or ())) if axes is None else axes)}
    for axis in range(rank):
        if axis in cut:
            ties.fix(x, "Slice takes a part of it", axis)
            ties.fix(y, "Slice takes a part of it", axis)
        else:
            ties.tie(x, axis, y, axis)


def _resize(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    axes = attribute(node, "axes", None) or range(rank)
    if _input(node, 3) is not None and min(axis % rank for axis in axes) < 2:
        raise _UnknownError("states sizes")
    before, after = ties.sizes(x), ties.sizes(y)
    if len(before) != len(after) or before[1] != after[1] or before[1] is None:
        raise _UnknownError("may change the number of channels")
    ties.tie(x, 0, y, 0)
    ties.tie(x, 1, y, 1)
    _spatial(ties, node, x, y)
    for tensor in node.inputs[1:]:
        ties.fix(tensor, "Resize takes it as a setting")


def _shape(ties: _Ties, node: Node) -> None:
    """Fix the axes whose sizes the graph reads; Gather and Slice tell which."""
    x, y = node.inputs[0], node.outputs[0]
    every = range(len(ties.shape(x)))
    given = every[slice(attribute(node, "start", None), attribute(node, "end", None))]
    ties.fix(y, "it holds sizes")
    read: set[int] = set()
    if any(y is tensor for tensor in ties.model.graph.outputs):
        read.update(given)
    for reader in y.outputs:
        picked = _picked(ties, reader, y)
        read.update(given if picked is None else np.take(given, picked, mode="wrap"))
    if read:
        ties.fix(x, "the graph reads off its size", *sorted(map(int, read)))


def _picked(ties: _Ties, node: Node, shape: gs.Tensor) -> list[int] | None:
    """Return which entries of a shape a node picks; ``None`` if that is not known."""
    if not is_onnx(node.domain) or node.inputs[0] is not shape:
        return None
    settings = []
    for tensor in node.inputs[1:]:
        weight = ties.weight(tensor)
        if weight is None or weight.is_input:
            return None
        settings.append([int(value) for value in weight.read().reshape(-1)])
    if node.op == "Gather":
        return settings[0]
    if node.op == "Slice" and len(settings) in (2, 3, 4):
        step = settings[3][0] if len(settings) == 4 else 1
        count = len(ties.shape(shape)) and ties.sizes(shape)[0]
        return list(range(count or 0)[settings[0][0] : settings[1][0] : step])
    return None


def _expand(ties: _Ties, node: Node) -> None:
    """An axis keeps its size where Expand asks for size 1."""
    x, y = node.inputs[0], node.outputs[0]
    ties.fix(node.inputs[1], "Expand takes it as sizes")
    wanted = ties.facts.value(node.inputs[1])
    rank, whole = len(ties.shape(x)), len(ties.shape(y))
    if wanted is None or len(wanted) > whole:
        raise _UnknownError("computes sizes that are not followed")
    for axis in range(whole):
        before, entry = axis - whole + rank, axis - whole + len(wanted)
        if before >= 0 and (entry < 0 or wanted[entry] == 1):
            ties.tie(x, before, y, axis)
            continue
        ties.fix(y, "Expand states its size", axis)
        if before >= 0:
            ties.fix(x, "Expand states its size", before)


def _quantize(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(ties.shape(x))
    _same_axes(ties, x, y, range(rank))
    axis = int(attribute(node, "axis", 1))
    for tensor in node.inputs[1:]:
        if not tensor.name or not ties.shape(tensor):
            continue
        if len(ties.shape(tensor)) > 1 or attribute(node, "block_size", 0):
            raise _UnknownError("has a scale for each block")
        ties.tie(tensor, 0, y, axis % rank)


# --- Reshape and its kin --------------------------------------------------------------


def _reshape_kin(ties: _Ties, node: Node) -> None:
    """Flatten, Squeeze, Unsqueeze: the new shape follows from the old."""
    for tensor in node.inputs[1:]:
        ties.fix(tensor, f"{node.op} takes it as a setting")
    _regroup(ties, node, node.inputs[0], node.outputs[0])


def _reshape(ties: _Ties, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    ties.fix(node.inputs[1], "Reshape takes it as sizes")
    pairs = _regroup(ties, node, x, y)
    wanted = _Wanted.of(ties, node)
    stated: list[tuple[int, int]] = []
    for axis, size in enumerate(ties.sizes(y)):
        if size is None or size == 1:
            continue
        entry = wanted.entries[axis] if wanted is not None else None
        if entry == -1 or (entry == 0 and (axis, axis) in pairs):
            continue  # Reshape works the size out from the others
        number = ties.axis(y, axis)
        if entry == size and number is not None:
            stated.append((axis, number))
        else:
            ties.fix(y, f"Reshape ({node.name or y.name}) computes its size", axis)

    def edit(size: Callable[[int], int]) -> None:
        changes = {
            axis: size(number)
            for axis, number in stated
            if size(number) != ties.axes.sizes[number]
        }
        if changes and wanted is not None:
            wanted.change(ties, node, changes)

    ties.edits.append(edit)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The shape that a Reshape asks for.

    Attributes:
        entries: What each entry states; ``None`` where it is computed.
        parts: The inputs of the Concat that makes it, one for each entry; empty if it
            is one constant.
    """

    entries: tuple[int | None, ...]
    parts: tuple[gs.Tensor, ...] = ()

    @staticmethod
    def of(ties: _Ties, node: Node) -> _Wanted | None:
        tensor = node.inputs[1]
        weight = ties.weight(tensor)
        if weight is not None:
            if weight.is_input or len(weight.shape) != 1:
                return None
            return _Wanted(tuple(int(v) for v in weight.read()))
        if attribute(node, "allowzero", 0):
            return None
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or maker.op != "Concat" or not is_onnx(maker.domain):
            return None
        entries: list[int | None] = []
        for part in maker.inputs:
            if static(ties.facts.shape(part)) != (1,) and ties.weight(part) is None:
                return None
            known = ties.weight(part)
            if known is not None and known.shape != (1,):
                return None
            entries.append(
                None if known is None or known.is_input else int(known.read()[0])
            )
        if len(entries) != len(ties.shape(node.outputs[0])):
            return None
        return _Wanted(tuple(entries), tuple(maker.inputs))

    def change(self, ties: _Ties, node: Node, sizes: Mapping[int, int]) -> None:
        """Give the Reshape a shape of its own; other nodes may read the old one."""
        model, label = ties.model, node.inputs[1].name
        if not self.parts:
            values = [sizes.get(axis, v) for axis, v in enumerate(self.entries)]
            node.inputs[1] = model.add_weight(label, np.array(values, np.int64))
            return
        parts = list(self.parts)
        for axis, size in sizes.items():
            parts[axis] = model.add_weight(
                f"{label}_{axis}", np.array([size], np.int64)
            )
        shape = model.add_node("Concat", parts, attrs={"axis": 0}, before=node)
        node.inputs[1] = shape.outputs[0]


def _regroup(
    ties: _Ties, node: Node, x: gs.Tensor, y: gs.Tensor
) -> set[tuple[int, int]]:
    """Tie the axes that a row-major regrouping keeps, splits or merges.

    Where axes are merged or split, one is followed: see ``_Ties._tie_merged``.

    Returns:
        The pairs of axes that are tied one to one.
    """
    before, after = ties.shape(x), ties.shape(y)
    pairs: set[tuple[int, int]] = set()
    i, j = len(before), len(after)
    while (block := _block(before[:i], after[:j])) is not None:
        _tie_block(ties, node, (x, range(block[0], i)), (y, range(block[1], j)), pairs)
        i, j = block
    start = 0
    while start < min(i, j) and before[start] == after[start]:
        ties.tie(x, start, y, start)
        pairs.add((start, start))
        start += 1
    for tensor, end in ((x, i), (y, j)):
        rest = range(start, end)
        if rest:
            ties.fix(tensor, f"{node.op} regroups sizes that are unknown", *rest)
    return pairs


def _block(before: Dims, after: Dims) -> tuple[int, int] | None:
    """Return where the shortest last axes with equally many positions begin.

    Returns:
        The first of those axes in each of the two shapes, or ``None``.
    """
    i, j = len(before) - 1, len(after) - 1
    if i < 0 or j < 0:
        return None
    one, two = before[i], after[j]
    while True:
        if not isinstance(one, int) or not isinstance(two, int) or 0 in (one, two):
            return None
        if one == two:
            return i, j
        if one < two:
            i -= 1
            one = one * before[i] if i >= 0 else 0
        else:
            j -= 1
            two = two * after[j] if j >= 0 else 0


def _tie_block(
    ties: _Ties,
    node: Node,
    one: tuple[gs.Tensor, range],
    two: tuple[gs.Tensor, range],
    pairs: set[tuple[int, int]],
) -> None:
    (x, before), (y, after) = one, two
    ours = [a for a in before if ties.sizes(x)[a] != 1]
    theirs = [a for a in after if ties.sizes(y)[a] != 1]
    if not ours or not theirs:
        return
    if len(ours) == len(theirs) == 1:
        ties.tie(x, ours[0], y, theirs[0])
        pairs.add((ours[0], theirs[0]))
        return
    why = f"{node.op} merges or splits it with another axis"
    if 1 not in (len(ours), len(theirs)):
        ties.fix(x, why, *ours)
        ties.fix(y, why, *theirs)
        return
    left = [ties.axis(x, axis) for axis in ours]
    right = [ties.axis(y, axis) for axis in theirs]
    whole, parts = (left, right) if len(left) == 1 else (right, left)
    assert whole[0] is not None
    known = tuple(axis for axis in parts if axis is not None)
    ties.merged.append(_MergedAxis(whole[0], known, why))


_SAME = """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf
    Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not
    Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish
    Tan Tanh ThresholdedRelu
"""
_POINTWISE = """
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
    PRelu Pow Sub Sum Where Xor
"""
_POINTWISE_ROLES: dict[str, Role] = {"Add": "shift", "Mul": "scale", "Sub": "shift"}
"""What a constant operand does."""
_POOLS = """
    AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool
"""
_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceSum ReduceSumSquare
"""

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_POOLS.split(), _pool),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(["Conv", "ConvTranspose"], _conv),
    **dict.fromkeys(["LayerNormalization", "RMSNormalization"], _layer_norm),
    **dict.fromkeys(["LogSoftmax", "Softmax"], _softmax),
    **dict.fromkeys(["Resize", "Upsample"], _resize),
    **dict.fromkeys(["DequantizeLinear", "QuantizeLinear"], _quantize),
    **dict.fromkeys(["Flatten", "Squeeze", "Unsqueeze"], _reshape_kin),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "InstanceNormalization": _instance_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
