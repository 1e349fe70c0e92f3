"""Ties: which positions of which axes of a model go together, as a graph.

``onnxshrink.structure.channels`` says what that is for, and ``tie_rules`` what each
operator ties.

Tested in tests/structure/test_channels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.model.topology import is_onnx, subgraphs_of
from onnxshrink.structure.layers import is_float
from onnxshrink.structure.symbolic import Dims, Facts, facts_of

__all__ = ["Indices", "MergedAxis", "Role", "Rule", "Ties", "UnknownError"]

Indices = NDArray[np.int64]
Role = Literal["producer", "consumer", "filter", "scale", "shift", "variance"]
"""What a weight does with a channel.

``producer`` makes it, ``consumer`` multiplies it and sums it up with others, ``filter``
makes it from the channel of the same number (depthwise). ``scale``, ``shift`` and
``variance`` are those of biases and normalisations.
"""


class UnknownError(Exception):
    """A node whose effect on channels is not known; the message says why."""


_LONGEST = 8
"""Nodes between a weight and the node that multiplies by it, at most."""
_THROUGH = frozenset({"Cast", "DequantizeLinear", "Identity", "Transpose"})

Edit = Callable[[Callable[[int], int]], None]
"""Adapts a node to new sizes of axes.

Its argument returns the new size of an axis, given the axis's number.
"""


@dataclass(frozen=True)
class MergedAxis:
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
class Axes:
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


class Ties:
    """The positions of all axes of a model, and which of them go together."""

    def __init__(
        self,
        model: Model,
        rules: Mapping[str, Rule],
        *,
        prefers: Literal["outer", "inner"] = "outer",
    ) -> None:
        """Read all nodes of the main graph.

        Args:
            model: The model; it is not changed.
            rules: What an operator ties, by its type; with the domain and a dot in
                front where it is not one of ONNX's own.
            prefers: Which part of a merged axis is followed where several could be:
                groups and heads, or the channels inside them.
        """
        self.model = model
        self.has_choice = False
        self._prefers = prefers
        self._rules = rules
        overridable = [w.constant for w in model.weights() if w.is_input]
        self.facts: Facts = facts_of(model, overridable)
        self.axes = Axes()
        self.edges: list[tuple[Indices, Indices]] = []
        self.fixed: dict[int, str] = {}
        self.mixed: dict[int, str] = {}
        self.uses: dict[int, list[tuple[Weight, int, Role, Node]]] = {}
        self.edits: list[Edit] = []
        self.merged: list[MergedAxis] = []
        self._weights: dict[int, Weight | None] = {}
        self._known: dict[int, Weight] = {}
        self._aliases: dict[int, list[gs.Tensor]] = {}
        self._none: Indices = np.zeros(0, np.int64)
        self._node = ""
        for tensor in model.graph.inputs:
            self.fix(tensor, f"{tensor.name!r} is an input of the model")
        for tensor in model.graph.outputs:
            self.fix(tensor, f"{tensor.name!r} is an output of the model")
        for node in model.graph.nodes:
            self._read(node)
        self._tie_merged()

    def _read(self, node: Node) -> None:
        key = node.op if is_onnx(node.domain) else f"{node.domain}.{node.op}"
        rule = self._rules.get(key)
        label = f"{node.op} ({node.name or _first_output(node)})"
        self._node = f", at {label}"
        if node.op in {"Constant", "Identity"} and self.weight(node.outputs[0]):
            return
        try:
            if rule is None:
                raise UnknownError("reads or makes it")
            if any(isinstance(v, gs.Node.AttributeRef) for v in node.attrs.values()):
                raise UnknownError("takes attributes from its function")
            rule(self, node)
        except UnknownError as error:
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
            raise UnknownError(f"has {tensor.name!r}, whose rank is unknown")
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

    def extra(self, size: int) -> int:
        """Return the number of a new axis that no tensor has: groups, hidden units."""
        return self.axes.number(gs.Variable(""), 0, size)

    def positions(self, axis: int) -> Indices:
        """Return the numbers of an axis's positions."""
        start = self.axes.starts[axis]
        return np.arange(start, start + self.axes.sizes[axis])

    def fix(self, tensor: gs.Tensor, why: str, *axes: int) -> None:
        """Forbid any removal along axes, by default all."""
        why = self._placed(why)
        try:
            every = range(len(self.shape(tensor))) if tensor.name else ()
        except UnknownError:
            return  # nothing is ever tied to an axis of unknown rank
        for axis in axes or every:
            number = self.axis(tensor, axis)
            if number is not None:
                self.fixed.setdefault(number, why)

    def mix(self, tensor: gs.Tensor, axis: int, why: str) -> None:
        """Say that values at one position of an axis change if another is removed."""
        number = self.axis(tensor, axis)
        if number is not None:
            self.mixed.setdefault(number, self._placed(why))

    def merge(self, whole: int, parts: tuple[int, ...], why: str) -> None:
        """Say that an axis is merged from others, or split into them."""
        self.merged.append(MergedAxis(whole, parts, self._placed(why)))

    def _placed(self, why: str) -> str:
        """Name the node that is read, unless the reason does."""
        return why if not self._node or self._node[5:] in why else why + self._node

    def use(self, node: Node, tensor: gs.Tensor, axis: int, role: Role) -> None:
        """Record what a weight does along an axis; ignore what is no weight.

        Codes count as what they stand for, and a cast or transposed weight as itself.
        """
        is_coded = False
        for _ in range(_LONGEST):
            weight = self.weight(tensor)
            if weight is not None:
                break
            maker = tensor.inputs[0] if tensor.inputs else None
            if maker is None or maker.op not in _THROUGH:
                return
            if maker.op == "Transpose":
                rank = len(self.shape(tensor))
                axis = (attribute(maker, "perm", None) or range(rank)[::-1])[axis]
            is_coded |= maker.op == "DequantizeLinear"
            tensor = maker.inputs[0]
        else:
            return
        if not is_coded and not is_float(weight):
            return
        number = self.axis(tensor, axis)
        if number is not None:
            self.uses.setdefault(number, []).append((weight, axis, role, node))

    def is_constant(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is a weight, or one that is decoded, cast or transposed."""
        for _ in range(_LONGEST):
            if self.weight(tensor) is not None:
                return True
            maker = tensor.inputs[0] if tensor.inputs else None
            if maker is None or maker.op not in _THROUGH:
                return False
            tensor = maker.inputs[0]
        return False

    def ints(self, tensor: gs.Tensor) -> list[int | None] | None:
        """Return the entries of a tensor of settings, ``None`` for an unknown one."""
        weight = self.weight(tensor)
        if weight is not None:
            return None if weight.is_input else [int(v) for v in weight.read().ravel()]
        found = self.facts.value(tensor)
        if found is None:
            return None
        return [entry if isinstance(entry, int) else None for entry in found]

    def join(self, a: Indices, b: Indices) -> None:
        """Tie positions one by one."""
        if a.size:
            self.edges.append((a, b))

    def tie(self, a: gs.Tensor, i: int, b: gs.Tensor, j: int) -> None:
        """Tie two axes position by position; size 1 is broadcast and ties nothing."""
        one, two = self.axis(a, i), self.axis(b, j)
        why = self._placed(
            f"its size and that of {a.name!r} or {b.name!r} are not known to be equal"
        )
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
                a
                for a in merged.parts
                if self.axes.sizes[a] > 1
                if not is_fixed[labels[self.positions(a)]].any()
            ]
            place = 0 if self._prefers == "outer" else -1
            chosen = free[place] if free else merged.parts[0]
            for axis in merged.parts:
                if axis != chosen:
                    self.fixed.setdefault(axis, merged.why)
                    # The next choice has to agree with this one.
                    is_fixed[labels[self.positions(axis)]] = True
            sizes = [self.axes.sizes[axis] for axis in merged.parts]
            place = merged.parts.index(chosen)
            stride = math.prod(sizes[place + 1 :])
            whole = self.positions(merged.whole)
            part = np.arange(len(whole)) // stride % sizes[place]
            self.join(whole, self.positions(chosen)[part])

    # --- the result -------------------------------------------------------------------

    def alike(self) -> list[tuple[int, dict[int, Indices]]]:
        """Collect connected components that have positions on the same axes.

        Returns:
            For each collection how many components it has, and their positions by the
            number of the axis, [components, positions each]. Single components and
            those that no weight uses are left out.
        """
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
        return found

    def cut(self, gone: Mapping[int, Indices]) -> None:
        """Remove positions of axes from weights, and adapt nodes to what is left."""
        by_root: dict[int, dict[int, Indices]] = {}
        for (root, axis), number in self.axes.of.items():
            if number not in gone:
                continue
            left = np.delete(np.arange(self.axes.sizes[number]), gone[number])
            named = [self.axes.tensors[number], *self._aliases.get(root, ())]
            for value in dict.fromkeys(t.name for t in named if t.name):
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


def _first_output(node: Node) -> str:
    return next((t.name for t in node.outputs if t.name), "without outputs")


Rule = Callable[[Ties, Node], None]
"""Says what a node ties; raises ``UnknownError`` where that is not known."""
