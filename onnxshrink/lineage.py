"""Lineage: what each value was in the model that the run started from.

A pass that follows another one compares values of the model as it is with those of the
model the run started from, the reference. ``model.lineage`` tells which belong
together. By default a value is the value of the same name, whole. A pass that does
something else to a value says so:

- ``replace(old, new)``: ``new`` stands where ``old`` stood, as the output of a Conv
  stands for that of the BatchNormalization folded into it;
- ``keep(value, axis, positions)``: only some positions of an axis are left, as of
  channels that are removed;
- ``scale(value, factor, axis)``: the value is a multiple of what it was, the same
  everywhere or one for each position of an axis;
- ``split(value, into)``: a weight became several, as ``W`` became ``A`` and ``B`` in
  ``(X A) B``;
- ``add(value)``: the value is new, such as ``X A``, or it changed so much that the
  reference has nothing like it.

What was said before is taken into account: positions are those of the value as it was
just before the call, and ``origin`` answers with positions in the reference.
``Model.fresh``, ``Model.replace_uses`` and the rules of ``fold`` keep lineage by
themselves: every name that ``fresh`` makes is new, and where a new value replaces an
old one it is what that was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lineage", "Origin"]

Indices = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Origin:
    """What a value was in the reference.

    Attributes:
        name: Name of the value there.
        kept: Positions there of each position here, int64 [size], for the axes that
            are not as they were.
        factor: What the value there is multiplied with.
        factors: The same for each position here, float64 [size], by axis; axes may be
            counted from the end.
        is_part: Whether the value there was split, and this is one of the parts.
    """

    name: str
    kept: Mapping[int, Indices] = field(default_factory=dict)
    factor: float = 1.0
    factors: Mapping[int, Float64] = field(default_factory=dict)
    is_part: bool = False

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return what the value should be, from the array that it was."""
        for axis, positions in self.kept.items():
            array = array.take(positions, axis)
        for axis, factors in self.factors.items():
            shape = [1] * array.ndim
            shape[axis] = -1
            array = array * factors.reshape(shape).astype(array.dtype)
        return array if self.factor == 1.0 else array * array.dtype.type(self.factor)

    @property
    def is_whole(self) -> bool:
        """Whether the value is just what it was, but for its name."""
        is_scaled = bool(self.factors) or self.factor != 1.0
        return not (self.kept or self.is_part or is_scaled)

    def __str__(self) -> str:
        """Say it in a few words."""
        words = [f"a part of {self.name}" if self.is_part else self.name]
        if self.factor != 1.0:
            words[0] += f" * {self.factor:.6g}"
        words += [
            f"axis {axis}: {_ranges(positions)}"
            for axis, positions in sorted(self.kept.items())
        ]
        words += [f"axis {axis}: scaled" for axis in sorted(self.factors)]
        return ", ".join(words)


class Lineage:
    """Origins of the values of one model, by their names in its main graph."""

    def __init__(self) -> None:
        """Begin with a model in which every value is what it was."""
        self._origins: dict[str, Origin | None] = {}

    # --- what is known ------------------------------------------------------------

    def origin(self, value: str) -> Origin | None:
        """Return what a value was; ``None`` if the reference has nothing like it.

        A value that no pass said anything of has an origin of its own name. Whether the
        reference does have a value of that name is for the caller to see.
        """
        found = self._origins.get(value, self)
        return Origin(value) if found is self else found  # type: ignore[return-value]

    def is_new(self, value: str) -> bool:
        """Whether a value is known to have no counterpart in the reference."""
        return self._origins.get(value, self) is None

    def changes(self) -> Iterator[tuple[str, Origin | None]]:
        """Yield each value that is not the value of its own name, with its origin."""
        for value, origin in self._origins.items():
            if origin is None or not origin.is_whole or origin.name != value:
                yield value, origin

    def words(self, values: Iterable[str]) -> list[str]:
        """Return a line for each value that changed, and one that counts new ones.

        Args:
            values: Names of the values to tell of, in order.
        """
        lines, new = [], 0
        changed = dict(self.changes())
        for value in dict.fromkeys(values):
            origin = changed.get(value, self)
            if origin is None:
                new += 1
            elif isinstance(origin, Origin):
                lines.append(f"{value}: was {origin}")
        if new:
            lines.append(f"{new} values are new")
        return lines

    # --- what passes say ----------------------------------------------------------

    def add(self, *values: str) -> None:
        """Say that values have no counterpart in the reference."""
        self._origins.update(dict.fromkeys(values))

    def replace(self, old: str, new: str) -> None:
        """Say that one value stands where another stood, and is what that was."""
        self._origins[new] = self.origin(old)

    def keep(self, value: str, axis: int, positions: Sequence[int] | Indices) -> None:
        """Say which positions are left along an axis of a value.

        Args:
            value: The value.
            axis: The axis, counted from 0.
            positions: For each position that there is now the position it had before.
        """
        origin = self.origin(value)
        if origin is None:
            return
        if axis < 0:
            raise ValueError(f"axis is counted from 0, not {axis}")
        chosen = np.asarray(positions, np.int64)
        if any(other < 0 for other in origin.factors):
            self.add(value)  # which axis is scaled depends on how many there are
            return
        before = origin.kept.get(axis)
        now = chosen if before is None else before[chosen]
        factors = dict(origin.factors)
        if axis in factors:
            factors[axis] = factors[axis][chosen]
        kept = {**origin.kept, axis: now}
        self._origins[value] = replace(origin, kept=kept, factors=factors)

    def scale(
        self, value: str, factor: float | Float64, axis: int | None = None
    ) -> None:
        """Say that a value is a multiple of what it was just before.

        Args:
            value: The value.
            factor: One number, or with ``axis`` one for each position.
            axis: The axis; it may be counted from the end.
        """
        origin = self.origin(value)
        if origin is None:
            return
        if axis is None:
            whole = replace(origin, factor=origin.factor * float(factor))
        else:
            factors = dict(origin.factors)
            factors[axis] = np.asarray(factor, np.float64) * factors.get(axis, 1.0)
            whole = replace(origin, factors=factors)
        self._origins[value] = whole

    def split(self, value: str, into: Iterable[str]) -> None:
        """Say that a weight, or another value, was split into several."""
        origin = self.origin(value)
        part = None if origin is None else replace(origin, is_part=True)
        self._origins.update(dict.fromkeys(into, part))

    def forget(self, values: Iterable[str]) -> None:
        """Drop what was said of values."""
        for value in values:
            self._origins.pop(value, None)

    # --- copies -------------------------------------------------------------------

    def copy(self) -> Lineage:
        """Return an independent copy."""
        twin = Lineage()
        twin._origins = dict(self._origins)
        return twin

    def to_json(self, values: Iterable[str]) -> dict[str, Any]:
        """Return what JSON can hold.

        Args:
            values: Names of the values that the model has; others are left out.
        """
        there = set(values)
        found: dict[str, Any] = {}
        for value, origin in self.changes():
            if value not in there:
                continue
            found[value] = None
            if origin is not None:
                kept = {str(axis): p.tolist() for axis, p in origin.kept.items()}
                by = {str(axis): f.tolist() for axis, f in origin.factors.items()}
                found[value] = [origin.name, kept, origin.factor, by, origin.is_part]
        return found

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Lineage:
        """Read what ``to_json`` returned.

        Raises:
            ValueError: It is something else.
        """
        made = cls()
        for value, entry in given.items():
            if entry is None:
                made.add(value)
                continue
            name, kept, factor, by, is_part = entry
            made._origins[value] = Origin(
                str(name),
                {int(axis): np.asarray(p, np.int64) for axis, p in kept.items()},
                float(factor),
                {int(axis): np.asarray(f, np.float64) for axis, f in by.items()},
                bool(is_part),
            )
        return made


def _ranges(positions: Indices) -> str:
    """Return positions as text: 0-3,8,10-11; long lists are cut."""
    if not positions.size:
        return "none"
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, cuts)
    words = [f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs[:8]]
    more = f",... ({len(positions)} in all)" if len(runs) > 8 else ""
    return ",".join(words) + more
