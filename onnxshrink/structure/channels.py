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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight
from onnxshrink.structure.tie_fused import ALL_RULES
from onnxshrink.structure.ties import Indices, Role, Ties

__all__ = ["Group", "Role", "Slices", "find", "remove", "remove_all"]


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
    _ties: Ties
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

    @property
    def members(self) -> list[str]:
        """The weights with the axis, and the positions of a channel where several."""
        found = []
        for part in self.where:
            each = part.offsets.shape[1]
            found.append(
                f"{part.weight.name}[{part.axis}]" + (f"*{each}" if each > 1 else "")
            )
        return list(dict.fromkeys(found))

    def describe(self) -> str:
        """Return a line for each member: role, axis, positions, bytes of a channel.

        What a group saves in arithmetic and time depends on what the model is run on:
        the sites of the pass ``channels`` have both.
        """
        lines = [f"{self.name}: {self.size} channels" + self._remark]
        for part in self.where:
            size, each = part.weight.shape[part.axis], part.offsets.shape[1]
            positions = "each" if each == 1 else f"{each} for each"
            if part.offsets.size != size:
                positions += f", of {size} from {int(part.offsets.min())} on"
            nbytes = part.weight.nbytes * each // size
            lines.append(
                f"  {part.role} {part.weight.name}{list(part.weight.shape)}, axis "
                f"{part.axis}: {positions}, {nbytes:,} bytes a channel"
            )
        return "\n".join(lines)

    __str__ = describe

    @property
    def _remark(self) -> str:
        if self.why:
            return f"; they stay: {self.why}"
        return f"; not exact: {self.inexact}" if self.inexact else ""

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
    ties = Ties(model, ALL_RULES)
    found = _named(ties)
    if not ties.has_choice:
        return found
    # Whole groups of a convolution can go, or the same channels of each of its groups,
    # which is what a shuffle leaves.
    inner = _named(Ties(model, ALL_RULES, prefers="inner"))
    return max((found, inner), key=_removable)


def _removable(groups: Sequence[Group]) -> int:
    """Return how many entries of weights channels could be removed from."""
    sizes = {
        id(part.weight.constant): part.weight.size
        for group in groups
        if not group.why
        for part in group.where
    }
    return sum(sizes.values())


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
    ties: Ties | None = None
    for group, keep in kept:
        ties = group._ties
        for axis, positions in group._positions.items():
            gone.setdefault(axis, []).append(positions[_gone(model, group, keep)])
    if ties is None:
        return
    # Channels of different groups may take different numbers of positions of an axis.
    ties.cut({a: np.concatenate([p.ravel() for p in ps]) for a, ps in gone.items()})


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


def _named(ties: Ties) -> list[Group]:
    """Make groups, each under the name of the first weight that has its channels."""
    found = ties.alike()
    ranks = {axis: rank for rank, axis in enumerate(ties.uses)}
    found.sort(
        key=lambda one: min(
            (ranks[axis], int(p.min())) for axis, p in one[1].items() if axis in ranks
        )
    )
    taken: set[str] = set()
    groups = []
    for size, positions in found:
        used = sorted((a for a in positions if a in ranks), key=ranks.__getitem__)
        uses = [(use, positions[axis]) for axis in used for use in ties.uses[axis]]
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
                _reason(ties.fixed, positions),
                _reason(ties.mixed, positions),
                tuple({id(use[3]): use[3] for use, _ in uses}.values()),
                ties,
                positions,
            )
        )
    return groups


def _reason(reasons: Mapping[int, str], axes: Iterable[int]) -> str:
    """Return the first reason; what the signature fixes comes before operators."""
    found = [reasons[axis] for axis in sorted(axes) if axis in reasons]
    return min(found, key=lambda why: not why.endswith("of the model"), default="")


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
