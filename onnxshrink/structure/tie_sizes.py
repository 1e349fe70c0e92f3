"""Sizes that a graph states or works out, and how they change with the channels.

A Reshape states sizes: as a constant, as a Concat of constants and of sizes that Shape
reads off other tensors, or computed in another way. A stated size is rewritten when
channels go; one that is read off another tensor follows by itself, if the channels of
both tensors are tied.

Tested in tests/structure/test_channels.py and test_tie_rules.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxshrink.model import Node, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.structure.ties import Ties

__all__ = ["Sizes", "fix_sizes_read"]

Source = tuple[gs.Tensor, int]
"""A tensor and one of its axes, whose size an entry is."""
_LONGEST = 12
"""Nodes between Shape and what takes the sizes, at most."""
_KEEPING = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape"})
"""Operators that hand on the entries of a list of sizes as they are."""
_TAKERS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}
"""Operators that take a list of sizes, and as which input."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes that a node takes from an input.

    Attributes:
        index: Which input.
        entries: What each entry is: a number, the axis of a tensor whose size it is,
            or ``None`` where it is computed in another way.
        parts: The inputs of the Concat that makes it, one for each entry, or empty.
    """

    index: int
    entries: tuple[int | Source | None, ...]
    parts: tuple[gs.Tensor, ...] = ()

    @staticmethod
    def of(ties: Ties, node: Node, index: int, rank: int) -> Sizes | None:
        """Return what is known; ``None`` if there are not ``rank`` entries."""
        tensor = node.inputs[index]
        found = _entries(ties, tensor, _LONGEST)
        values = ties.ints(tensor)
        if found is None:
            found = [None] * rank if values is None else list(values)
        if len(found) != rank:
            return None
        if values is not None and len(values) == rank:
            # Numbers that are worked out from other sizes; those are fixed.
            found = [
                value if entry is None else entry
                for entry, value in zip(found, values, strict=True)
            ]
        maker = tensor.inputs[0] if tensor.inputs else None
        parts: tuple[gs.Tensor, ...] = ()
        if maker is not None and maker.op == "Concat" and is_onnx(maker.domain):
            parts = tuple(maker.inputs)
        return Sizes(index, tuple(found), parts if len(parts) == rank else ())

    def number(self, axis: int) -> int | None:
        """Return the number that an entry states, if it does."""
        entry = self.entries[axis]
        return entry if isinstance(entry, int) else None

    def source(self, axis: int) -> Source | None:
        """Return the tensor and axis whose size an entry is, if it is one."""
        entry = self.entries[axis]
        return entry if isinstance(entry, tuple) else None

    def change(self, ties: Ties, node: Node, sizes: Mapping[int, int]) -> None:
        """Give the node sizes of its own; other nodes may read the old ones."""
        model, old = ties.model, node.inputs[self.index]
        label = old.name or f"{node.outputs[0].name}_shape"
        if all(isinstance(e, int) or a in sizes for a, e in enumerate(self.entries)):
            values = [sizes.get(axis, e) for axis, e in enumerate(self.entries)]
            node.inputs[self.index] = model.add_weight(
                label, np.array(values, np.int64)
            )
            return
        pieces: list[gs.Tensor] = []
        for axis in range(len(self.entries)):
            if axis in sizes:
                given = np.array([sizes[axis]], np.int64)
                pieces.append(model.add_weight(f"{label}_{axis}", given))
            elif self.parts:
                pieces.append(self.parts[axis])
            else:
                at = model.add_weight(f"{label}_at{axis}", np.array([axis], np.int64))
                picked = model.add_node("Gather", [old, at], before=node)
                pieces.append(picked.outputs[0])
        shape = model.add_node("Concat", pieces, attrs={"axis": 0}, before=node)
        node.inputs[self.index] = shape.outputs[0]


def _entries(
    ties: Ties, tensor: gs.Tensor, depth: int
) -> list[int | Source | None] | None:
    """Return what the entries of a list of sizes are; ``None`` if not even how many."""
    weight = ties.weight(tensor)
    if weight is not None:
        if weight.is_input:
            return [None] * int(np.prod(weight.shape, dtype=np.int64))
        if weight.size > 64:
            return None
        return [int(value) for value in weight.read().ravel()]
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is None or not is_onnx(maker.domain) or depth == 0:
        return None
    if maker.op == "Shape":
        source = maker.inputs[0]
        axes = range(len(ties.shape(source)))
        return [(source, axis) for axis in axes[_span(maker)]]
    if maker.op == "Concat":
        found: list[int | Source | None] = []
        for part in maker.inputs:
            entries = _entries(ties, part, depth - 1)
            if entries is None:
                return None
            found += entries
        return found
    if maker.op in _KEEPING:
        return _entries(ties, maker.inputs[0], depth - 1)
    picked = _picked(ties, maker)
    if picked is not None:
        before = _entries(ties, maker.inputs[0], depth - 1)
        if before is None or any(not -len(before) <= p < len(before) for p in picked):
            return None
        return [before[place] for place in picked]
    size = ties.facts.shape(tensor)
    if size is not None and (not size or size == (1,)):
        return [None]
    return None


def _span(node: Node) -> slice:
    return slice(attribute(node, "start", None), attribute(node, "end", None))


def _picked(ties: Ties, node: Node) -> list[int] | None:
    """Return which entries of a list a node picks; ``None`` if that is not known."""
    if not is_onnx(node.domain) or node.op not in ("Gather", "Slice"):
        return None
    settings: list[list[int]] = []
    for tensor in node.inputs[1:]:
        weight = ties.weight(tensor)
        if weight is None or weight.is_input or weight.size > 64:
            return None
        settings.append([int(value) for value in weight.read().reshape(-1)])
    if node.op == "Gather":
        return settings[0]
    if "starts" in node.attrs:
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        settings = [[int(v) for v in starts], [int(v) for v in ends]]
    if len(settings) not in (2, 3, 4) or len(settings[0]) != 1:
        return None
    count = ties.sizes(node.inputs[0])
    if len(count) != 1 or count[0] is None:
        return None
    step = settings[3][0] if len(settings) == 4 else 1
    return list(range(count[0])[settings[0][0] : settings[1][0] : step])


def fix_sizes_read(ties: Ties, node: Node) -> None:
    """Fix the axes whose sizes a graph computes with.

    Sizes that a Reshape or its like takes as they are follow by themselves.
    """
    x, y = node.inputs[0], node.outputs[0]
    given: Sequence[int] = range(len(ties.shape(x)))[_span(node)]
    ties.fix(y, "it holds sizes")
    read: set[int] = set()
    _collect(ties, x, y, list(given), read, _LONGEST)
    if read:
        ties.fix(x, "the graph reads off its size", *sorted(read))


def _collect(
    ties: Ties,
    source: gs.Tensor,
    tensor: gs.Tensor,
    axes: Sequence[int],
    read: set[int],
    depth: int,
) -> None:
    """Collect the axes whose sizes go anywhere but into a list of sizes."""
    if not axes:
        return
    if depth == 0 or any(tensor is output for output in ties.model.graph.outputs):
        read.update(axes)
        return
    for node in tensor.outputs:
        place = next(i for i, given in enumerate(node.inputs) if given is tensor)
        if not is_onnx(node.domain):
            read.update(axes)
        elif _TAKERS.get(node.op) == place:
            entries = _entries(ties, tensor, _LONGEST) or []
            named = {e[1] for e in entries if isinstance(e, tuple) and e[0] is source}
            read.update(set(axes) - named)
        elif node.op == "Concat" or (node.op in _KEEPING and place == 0):
            _collect(ties, source, node.outputs[0], axes, read, depth - 1)
        elif node.op in ("Gather", "Slice") and place == 0:
            picked = _picked(ties, node)
            if picked is None or ties.sizes(tensor) != [len(axes)]:
                read.update(axes)
                continue
            taken = [axes[place] for place in picked]
            _collect(ties, source, node.outputs[0], taken, read, depth - 1)
        elif node.op != "Shape":
            read.update(axes)
