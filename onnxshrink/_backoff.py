"""How a pass gives way when it breaks the budget: a search over its sites.

The search sees sites and a function that measures damage, nothing else. Damage is the
share of the budget that is used up: what is at most 1 fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxshrink.base import Site, SitePass

__all__ = ["Plan", "back_off", "tighten"]

_PROBES = 128
"""Most sites measured one by one; more are measured in groups of neighbours."""
_INDIVIDUAL = 16
"""Up to this many sites each get a strength of their own."""
_HALVINGS = 5
_STURDY_SHARE = 0.3
"""Share of the budget that the sites left at full strength may use together."""

Damage = Callable[[Sequence[Site]], float]


@dataclass(frozen=True)
class Plan:
    """How strongly to act at each site.

    Attributes:
        sites: The sites as the pass listed them.
        strengths: One for each site; 1 as listed, 0 left out.
        order: Indices of the sites, the most damaging first.
    """

    sites: tuple[Site, ...]
    strengths: tuple[float, ...]
    order: tuple[int, ...]

    def chosen(self, pass_: SitePass) -> list[Site]:
        """Return the sites to act at, weakened where the plan says so."""
        found = []
        for site, strength in zip(self.sites, self.strengths, strict=True):
            kept = site if strength >= 1 else pass_.weaken(site, strength)
            if kept is not None and strength > 0:
                found.append(kept)
        return found

    def changes(self, pass_: SitePass) -> list[tuple[str, str]]:
        """Return (site, what became of it) for every site not done as listed."""
        said = []
        for index in self.order:
            site, strength = self.sites[index], self.strengths[index]
            if strength >= 1:
                continue
            kept = pass_.weaken(site, strength) if strength > 0 else None
            if kept is None:
                said.append((site.where, "left out"))
            else:
                said.append((site.where, _difference(site, kept, strength)))
        return said


def _difference(listed: Site, kept: Site, strength: float) -> str:
    changed = [
        f"{key} {_short(value)} -> {_short(kept.detail[key])}"
        for key, value in listed.detail.items()
        if key in kept.detail and isinstance(value, (int, float, str))
        if kept.detail[key] != value
    ]
    return ", ".join(changed) or f"weakened to {strength:.0%}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def back_off(pass_: SitePass, sites: Sequence[Site], damage: Damage) -> Plan | None:
    """Find how far a pass that breaks the budget can still go.

    Each site's damage alone is measured first. Where sites can be weakened, those that
    together do little stay as listed, one strength for the others is found by
    bisection, and each that bears more is strengthened again. Where they cannot, the
    fewest of the most damaging are left out, by bisection too. Both take for granted
    that more does more damage.

    Args:
        pass_: The pass, for ``weaken``.
        sites: All its sites; doing them all breaks the budget.
        damage: Measures acting at some sites, from 0 on; at most 1 fits.

    Returns:
        A plan that fits, or ``None`` if no site at all fits.
    """
    everything = tuple(sites)
    plan = Plan(everything, (1.0,) * len(everything), tuple(range(len(everything))))
    ranked, harm = _ranked(plan, damage)
    if any(pass_.weaken(site, 0.5) is not None for site in everything):
        for sturdy in (_sturdy(ranked, harm), frozenset[int]()):
            strength = _common_strength(pass_, ranked, sturdy, damage)
            if strength > 0:
                return _strengthen(pass_, ranked, sturdy, strength, damage)
    return _leave_out(pass_, ranked, damage)


def tighten(pass_: SitePass, plan: Plan) -> Plan | None:
    """Return a more careful plan, or ``None`` if there is nothing left to give up.

    Weakened sites lose a tenth of their strength; where there is none to weaken, the
    most damaging eighth of the sites that are left is left out.
    """
    gentle = any(pass_.weaken(site, 0.5) is not None for site in plan.sites)
    if gentle:
        weaker = tuple(s * 0.9 if s > 0.05 else 0.0 for s in plan.strengths)
        return Plan(plan.sites, weaker, plan.order) if any(weaker) else None
    alive = [index for index in plan.order if plan.strengths[index] > 0]
    drop = set(alive[: max(1, len(alive) // 8)])
    strengths = tuple(
        0.0 if index in drop else s for index, s in enumerate(plan.strengths)
    )
    return Plan(plan.sites, strengths, plan.order) if any(strengths) else None


def _with(plan: Plan, strengths: Sequence[float]) -> Plan:
    return Plan(plan.sites, tuple(strengths), plan.order)


def _ranked(plan: Plan, damage: Damage) -> tuple[Plan, list[float]]:
    """Measure each site alone; order the plan, the most damaging first."""
    count = len(plan.sites)
    size = -(-count // _PROBES)
    harm: list[float] = []
    for start in range(0, count, size):
        group = plan.sites[start : start + size]
        harm.extend([max(0.0, damage(group))] * len(group))
    order = sorted(range(count), key=lambda index: (-harm[index], index))
    return Plan(plan.sites, plan.strengths, tuple(order)), harm


def _sturdy(plan: Plan, harm: Sequence[float]) -> frozenset[int]:
    """Return the sites that together use little of the budget even as listed."""
    total, sturdy = 0.0, set()
    for index in reversed(plan.order):
        total += harm[index]
        if total > _STURDY_SHARE:
            break
        sturdy.add(index)
    return frozenset(sturdy)


def _common(plan: Plan, sturdy: frozenset[int], strength: float) -> Plan:
    """Weaken all but the sturdy sites to one strength."""
    count = len(plan.sites)
    return _with(plan, [1.0 if i in sturdy else strength for i in range(count)])


def _common_strength(
    pass_: SitePass, plan: Plan, sturdy: frozenset[int], damage: Damage
) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if damage(_common(plan, sturdy, middle).chosen(pass_)) <= 1:
            low = middle
        else:
            high = middle
    return low


def _strengthen(
    pass_: SitePass,
    plan: Plan,
    sturdy: frozenset[int],
    strength: float,
    damage: Damage,
) -> Plan:
    """Let each of a few sites take what budget is left, the largest first."""
    strengths = list(_common(plan, sturdy, strength).strengths)
    weak = [index for index in range(len(strengths)) if index not in sturdy]
    if len(weak) <= _INDIVIDUAL:
        for index in sorted(weak, key=lambda i: -plan.sites[i].bytes_saved):
            for bolder in (1.0, (1 + strength) / 2, (1 + 3 * strength) / 4):
                trial = list(strengths)
                trial[index] = bolder
                if damage(_with(plan, trial).chosen(pass_)) <= 1:
                    strengths[index] = bolder
                    break
    return _with(plan, strengths)


def _leave_out(pass_: SitePass, plan: Plan, damage: Damage) -> Plan | None:
    """Leave out the fewest of the most damaging sites so that the rest fits."""

    def without(count: int) -> Plan:
        out = set(plan.order[:count])
        return _with(plan, [0.0 if i in out else 1.0 for i in range(len(plan.sites))])

    low, high = 0, len(plan.sites)
    while high - low > 1:
        middle = (low + high) // 2
        if damage(without(middle).chosen(pass_)) <= 1:
            high = middle
        else:
            low = middle
    found = without(high)
    return found if any(found.strengths) else None
