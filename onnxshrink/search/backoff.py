"""How a pass gives way when it breaks the budget: a search over its sites.

The search sees sites and a function that measures damage, nothing else. Damage is the
share of the budget that is used up: what is at most 1 fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onnxshrink.base import Site, SitePass

__all__ = ["Plan", "back_off", "blend", "nothing", "rank", "tighten"]

_PROBES = 128
"""Most sites measured one by one; more are measured in groups of neighbours."""
_GROUPS = 8
"""Sites are strengthened one by one, or in this many groups."""
_HALVINGS = 6
_LOWERED = 0.9

Damage = Callable[[Sequence[Site]], float]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How strongly to act at each site.

    Attributes:
        sites: The sites as the pass listed them.
        strengths: One for each site; 1 as listed, 0 left out.
        order: Indices of the sites, the most damaging first where that was measured.
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
    before, after = listed.how(), kept.how()
    changed = [
        f"{key} {_short(value)} -> {_short(after[key])}"
        for key, value in before.items()
        if key in after and after[key] != value
    ]
    return ", ".join(changed) or f"weakened to {strength:.0%}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def back_off(pass_: SitePass, sites: Sequence[Site], damage: Damage) -> Plan | None:
    """Find how far a pass that breaks the budget can still go.

    Where sites can be weakened, one strength for all is found by bisection, so that a
    pass which divided its work among them keeps its shares; sites that bear more are
    given more where that saves more together. Where they cannot, each site's damage
    alone is measured, and the fewest of the most damaging are left out, by bisection
    too. Both take for granted that more does more damage.

    Args:
        pass_: The pass, for ``weaken``.
        sites: All its sites; doing them all breaks the budget.
        damage: Measures acting at some sites, from 0 on; at most 1 fits.

    Returns:
        A plan that fits, or ``None`` if no site at all fits.
    """
    everything = tuple(sites)
    plan = Plan(everything, (1.0,) * len(everything), tuple(range(len(everything))))
    if any(pass_.weaken(site, 0.5) is not None for site in everything):
        strength = _common_strength(pass_, plan, damage)
        if strength > 0:
            even = _with(plan, [strength] * len(everything))
            return _strengthen(pass_, even, damage)
    return _leave_out(pass_, _ranked(plan, damage), damage)


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


def nothing(sites: Sequence[Site]) -> Plan:
    """Return the plan that leaves every site out."""
    return Plan(tuple(sites), (0.0,) * len(sites), tuple(range(len(sites))))


def blend(pass_: SitePass, plan: Plan, share: float) -> Plan:
    """Return what lies between a plan and acting at every site as listed.

    Args:
        pass_: The pass, for ``weaken``.
        plan: A plan; what it weakens or leaves out is given back in part.
        share: From 0, the plan as it is, to 1, every site as listed. Where sites cannot
            be weakened, this share of those left out takes part again, the least
            damaging first.
    """
    if any(pass_.weaken(site, 0.5) is not None for site in plan.sites):
        return _with(plan, [s + share * (1 - s) for s in plan.strengths])
    out = [index for index in plan.order if plan.strengths[index] == 0]
    still = set(out[: round((1 - share) * len(out))])
    strengths = [
        0.0 if index in still else 1.0 if index in out else strength
        for index, strength in enumerate(plan.strengths)
    ]
    return _with(plan, strengths)


def _with(plan: Plan, strengths: Sequence[float]) -> Plan:
    return Plan(plan.sites, tuple(strengths), plan.order)


def _ranked(plan: Plan, damage: Damage) -> Plan:
    """Measure each site alone; order the plan, the most damaging first."""
    order, _ = rank(plan.sites, damage)
    return Plan(plan.sites, plan.strengths, order)


def rank(
    items: Sequence[T], damage: Callable[[Sequence[T]], float], probes: int = _PROBES
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Measure the damage of each item alone.

    Args:
        items: Sites, layers, or what else there is a choice of.
        damage: Measures some of them together.
        probes: Most measurements; of more items, neighbours share one.

    Returns:
        The indices of the items, the most damaging first, and the damage of each item
        in the order of the items.
    """
    size = max(1, -(-len(items) // probes))
    harm: list[float] = []
    for start in range(0, len(items), size):
        group = items[start : start + size]
        harm.extend([damage(group)] * len(group))
    order = sorted(range(len(items)), key=lambda index: (-harm[index], index))
    return tuple(order), tuple(harm)


def _common_strength(pass_: SitePass, plan: Plan, damage: Damage) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        trial = _with(plan, [middle] * len(plan.sites))
        if damage(trial.chosen(pass_)) <= 1:
            low = middle
        else:
            high = middle
    return low


def _strengthen(pass_: SitePass, even: Plan, damage: Damage) -> Plan:
    """Let sites that bear more take budget from the others, if that saves more.

    The strength all can bear leaves no budget to hand out, so it is lowered first.
    """
    base = even.strengths[0] * _LOWERED
    strengths = [base] * len(even.sites)
    for group in _groups(even):
        for bolder in (1.0, (1 + base) / 2, (1 + 3 * base) / 4):
            trial = list(strengths)
            for index in group:
                trial[index] = bolder
            if damage(_with(even, trial).chosen(pass_)) <= 1:
                strengths = trial
                break
    uneven = _with(even, strengths)
    return max(even, uneven, key=lambda plan: _saved(pass_, plan))


def _saved(pass_: SitePass, plan: Plan) -> int:
    return sum(site.savings.bytes for site in plan.chosen(pass_))


def _groups(plan: Plan) -> list[list[int]]:
    """Cut the sites into at most eight groups that save about as much each."""
    sites = plan.sites
    order = sorted(range(len(sites)), key=lambda i: -sites[i].savings.bytes)
    if len(order) <= _GROUPS:
        return [[index] for index in order]
    share = sum(site.savings.bytes for site in sites) / _GROUPS
    groups: list[list[int]] = [[]]
    saved = 0
    for index in order:
        if groups[-1] and saved >= share * len(groups) and len(groups) < _GROUPS:
            groups.append([])
        groups[-1].append(index)
        saved += sites[index].savings.bytes
    return groups


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
