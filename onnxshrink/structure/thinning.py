"""How many channels of a group stay, and which by their weights alone.

Tested in tests/passes/test_channels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.model import Model
from onnxshrink.structure import channels
from onnxshrink.structure.channels import Group, Slices
from onnxshrink.structure.layers import is_float
from onnxshrink.structure.selection import selected

__all__ = [
    "dead",
    "energy",
    "norms",
    "removable",
    "rounded",
    "slices",
    "step",
    "strongest",
]

Array = NDArray[Any]

_EPSILON = 1e-5
"""Added to a variance of BatchNormalization before its root is taken."""


def removable(
    model: Model,
    only: Sequence[str],
    skip: Sequence[str],
    skipped: Callable[[str, str], None],
) -> list[Group]:
    """Return the groups whose channels may become fewer; say why others may not.

    Args:
        model: The model.
        only: Names, glob patterns or op types of groups, nodes or weights; empty: all.
        skip: The same; wins over ``only``.
        skipped: Receives (name, why) of what cannot be.
    """
    chosen = [g for g in channels.find(model) if selected(g.names, only, skip)]
    found = []
    for group in chosen:
        if not group.why:
            if any(part.role == "producer" for part in group.where):
                found.append(group)
            else:
                skipped(group.name, "its channels are not made by a weight")
    # What holds parameters that nothing else makes smaller comes first.
    held = {id(part.weight.constant) for group in found for part in group.where}
    stopped = [(_held(group, held), group) for group in chosen if group.why]
    for (all_, alone), group in sorted(stopped, key=lambda one: -one[0][1]):
        skipped(
            group.name,
            f"its {group.size} channels stay, {all_:,} parameters, {alone:,} of them "
            f"in no other group: {group.why}",
        )
    if not found and not stopped:
        skipped("channels", "there are no channels that could be fewer")
    return found


def tell_of_bodies(model: Model, skipped: Callable[[str, str], None]) -> None:
    """Say that weights of branches, bodies and functions are left alone."""
    for weight in model.weights():
        if weight.graph is not model.graph and is_float(weight):
            skipped(weight.name, "it is inside a branch, a body or a function")


def _held(group: Group, held: set[int]) -> tuple[int, int]:
    """Return how many parameters a group has, and how many nothing makes fewer."""
    sizes = {id(part.weight.constant): part.weight.size for part in group.where}
    return sum(sizes.values()), sum(n for key, n in sizes.items() if key not in held)


def step(group: Group, round_to: int) -> int:
    """Return in which steps channels go: one by one if few, or many positions each.

    A few channels of a longer axis, as a Concat or Pad leaves, go by half a step.
    """
    if group.width > 1:
        return 1
    if group.size > round_to:
        return round_to
    longest = max(part.weight.shape[part.axis] for part in group.where)
    half = max(1, round_to // 2)
    return half if longest > round_to and group.size > half else 1


def rounded(group: Group, wanted: float, round_to: int) -> int:
    """Return how many channels stay, next to ``wanted``; at least one step."""
    by = step(group, round_to)
    return min(group.size, max(by, int(wanted / by + 0.5) * by))


def strongest(score: Array, count: int) -> list[int]:
    """Return the ``count`` channels with the highest scores, in their order."""
    return sorted(int(c) for c in np.argsort(-score, kind="stable")[:count])


def norms(group: Group) -> Array:
    """Return the norm of what makes a channel, times the norm of what reads it.

    A normalisation behind the channel scales the first. A channel that no weight makes
    or reads any more has 0.

    Returns:
        Products of squared norms, float64 [channels], not normalised.
    """
    score = np.ones(group.size)
    for role in ("producer", "consumer", "filter", "scale"):
        parts = [part for part in group.where if part.role == role]
        if parts:
            score *= sum(energy(part) for part in parts)
    for part in group.where:
        if part.role == "variance":
            variance = np.abs(part.weight.read().astype(np.float64))
            score /= variance[part.offsets].mean(1) + _EPSILON
    return score


def dead(group: Group) -> NDArray[np.bool_]:
    """Return which channels no weight reads any more: they go without any loss.

    Every weight that would read one is zero there. Channels of inexact groups are never
    dead: a mean is taken over them, or they are multiplied by each other.
    """
    readers = [part for part in group.where if part.role == "consumer"]
    if not readers or group.inexact:
        return np.zeros(group.size, bool)
    return np.asarray(sum(energy(part) for part in readers) == 0)


def slices(part: Slices) -> Array:
    """Return the values of each channel, float64 [channels, values each]."""
    values = np.moveaxis(part.weight.read().astype(np.float64), part.axis, 0)
    rows = values.reshape(len(values), -1)[part.offsets]
    return np.asarray(rows.reshape(len(part.offsets), -1))


def energy(part: Slices) -> Array:
    """Return the sum of squares of each channel's slice."""
    values = part.weight.read().astype(np.float64)
    others = tuple(axis for axis in range(values.ndim) if axis != part.axis)
    found: Array = np.square(values).sum(others)[part.offsets].sum(1)
    return found
