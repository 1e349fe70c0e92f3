"""How a pass gives way when it breaks the budget: a search over its sites.

The search sees sites, what each saves, and a function that measures damage. Damage is
the share of the budget that is used up: what is at most 1 fits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from onnxshrink.base import Saved, Site, SitePass

__all__ = ["Plan", "back_off", "blend", "nothing", "rank", "tighten"]

_PROBES = 128
"""Most sites measured one by one; more are measured in groups of neighbours."""
_GROUPS = 8
"""Sites are strengthened one by one, or in this many groups."""
MILDER = 0.5
"""Strength of the one milder form that sites of a pass may have."""
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
        order: Indices of the sites in the order in which they are given up: first those
            that do not save what counts, if that is known, then the most damaging.
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

    def at(self, strengths: Iterable[float]) -> Plan:
        """Return the plan with other strengths."""
        return replace(self, strengths=tuple(strengths))

    def without(self, count: int) -> Plan:
        """Return the plan that leaves out the first to be given up, no others."""
        out = set(self.order[:count])
        return self.at([0.0 if i in out else 1.0 for i in range(len(self.sites))])


def _difference(listed: Site, kept: Site, strength: float) -> str:
    """Say how a weaker form of a site differs from the one listed, field by field."""
    before, after = listed.how(), kept.how()
    changed = [
        f"{key} {_short(value)} -> {_short(after[key])}"
        for key, value in before.items()
        if key in after and after[key] != value
    ]
    return ", ".join(changed) or f"weakened to {strength:.0%}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def back_off(
    pass_: SitePass,
    sites: Sequence[Site],
    damage: Damage,
    *,
    saved: Saved = "bytes",
    harm: Damage | None = None,
) -> Plan | None:
    """Find how far a pass that breaks the budget can still go.

    Where sites can be weakened, one strength for all is found by bisection, so that a
    pass which divided its work among them keeps its shares. Then sites that bear more
    are given more, where that saves more in all. Where sites cannot be weakened, the
    harm of each alone is measured, and the fewest of the most harmful take their milder
    form, if there is one, or are left out, by bisection too. Both take for granted that
    more does more damage.

    Where MACs or time count, sites that save none are given up first: they only cost.
    A site may even take longer than before; without it, time and damage both get less.

    Args:
        pass_: The pass, for ``weaken``.
        sites: All its sites; doing them all breaks the budget.
        damage: Measures acting at some sites, from 0 on; at most 1 fits.
        saved: Which of a site's savings counts.
        harm: Measures what acting at some sites does to the outputs, for the order; by
            default ``damage``. It differs where time is part of the damage.

    Returns:
        A plan that fits, or ``None`` if no site at all fits.
    """
    everything = tuple(sites)
    order = tuple(range(len(everything)))
    idle = [i for i in order if saved != "bytes" and _saves(everything[i], saved) <= 0]
    idle = idle if len(idle) < len(everything) else []
    plan = Plan(everything, (1.0,) * len(everything), order)
    if harm is not None and saved == "seconds":
        useful = _with(plan, set(idle), 0.0).chosen(pass_)
        if harm(useful) <= 1 < damage(useful):
            return (
                None  # It is the time that breaks the budget, and no site saves more.
            )
    if _is_gentle(pass_, everything):
        found = _weakened(pass_, plan, idle, damage)
        if found is not None:
            return _strengthen(pass_, found, damage, saved)
    order, _ = rank(everything, harm or damage)
    first = set(idle)
    order = tuple(sorted(order, key=lambda index: index not in first))
    return _leave_out(pass_, replace(plan, order=order), len(idle), damage)


def _is_gentle(pass_: SitePass, sites: Sequence[Site]) -> bool:
    """Whether some site has weaker forms, one for each strength."""
    return pass_.gradual and _has_milder(pass_, sites)


def _has_milder(pass_: SitePass, sites: Sequence[Site]) -> bool:
    return any(pass_.weaken(site, MILDER) is not None for site in sites)


def tighten(pass_: SitePass, plan: Plan) -> Plan | None:
    """Return a more careful plan, or ``None`` if there is nothing left to give up.

    Weakened sites lose a tenth of their strength; where there is none to weaken, an
    eighth of the sites that are left takes its milder form or is left out, the first in
    the plan's order.
    """
    if _is_gentle(pass_, plan.sites):
        weaker = [s * 0.9 if s > 0.05 else 0.0 for s in plan.strengths]
        return plan.at(weaker) if any(weaker) else None
    alive = [index for index in plan.order if plan.strengths[index] > 0]
    whole = [index for index in alive if plan.strengths[index] >= 1]
    drop = set((whole or alive)[: max(1, len(alive) // 8)])
    strengths = list(plan.strengths)
    for index in drop:
        milder = pass_.weaken(plan.sites[index], MILDER) if whole else None
        strengths[index] = MILDER if milder is not None else 0.0
    return plan.at(strengths) if any(strengths) else None


def nothing(sites: Sequence[Site]) -> Plan:
    """Return the plan that leaves every site out."""
    return Plan(tuple(sites), (0.0,) * len(sites), tuple(range(len(sites))))


def blend(pass_: SitePass, plan: Plan, share: float) -> Plan:
    """Return what lies between a plan and acting at every site as listed.

    Args:
        pass_: The pass, for ``weaken``.
        plan: A plan; what it weakens or leaves out is given back in part.
        share: From 0, the plan as it is, to 1, every site as listed. Where sites cannot
            be weakened, this share of those left out takes part again, the last in the
            plan's order first.
    """
    if _is_gentle(pass_, plan.sites):
        return plan.at([s + share * (1 - s) for s in plan.strengths])
    out = [index for index in plan.order if plan.strengths[index] < 1]
    still = set(out[: round((1 - share) * len(out))])
    return plan.at(
        strength if index in still else 1.0
        for index, strength in enumerate(plan.strengths)
    )


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


# --- sites that can be weakened ---------------------------------------------------


def _weakened(
    pass_: SitePass, plan: Plan, idle: Sequence[int], damage: Damage
) -> Plan | None:
    """Find one strength for all sites, or for all but the idle, that fits.

    Idle sites are left out at first. If the others fit as listed, it is the strength of
    the idle ones that is looked for.
    """
    active = set(plan.order) - set(idle)
    if idle:
        plan = _with(plan, set(idle), 0.0)
        if damage(plan.chosen(pass_)) <= 1:
            return _strongest(pass_, plan, set(idle), damage)
    found = _strongest(pass_, plan, active, damage)
    return found if any(found.strengths) else None


def _with(plan: Plan, which: Collection[int], strength: float) -> Plan:
    """Return the plan with one strength at some sites."""
    return plan.at(strength if i in which else s for i, s in enumerate(plan.strengths))


def _strongest(
    pass_: SitePass, plan: Plan, which: Collection[int], damage: Damage
) -> Plan:
    """Return the plan with the highest strength of some sites that fits with others."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if damage(_with(plan, which, middle).chosen(pass_)) <= 1:
            low = middle
        else:
            high = middle
    return _with(plan, which, low)


def _strengthen(pass_: SitePass, even: Plan, damage: Damage, saved: Saved) -> Plan:
    """Let sites that bear more take budget from the others, if that saves more.

    The strength all can bear leaves no budget to hand out, so it is lowered first.
    """
    base = max(s for s in even.strengths if s < 1) * _LOWERED
    strengths = [base if 0 < s < 1 else s for s in even.strengths]
    for group in _groups(even, saved):
        for bolder in (1.0, (1 + base) / 2, (1 + 3 * base) / 4):
            trial = list(strengths)
            for index in group:
                trial[index] = bolder
            if damage(even.at(trial).chosen(pass_)) <= 1:
                strengths = trial
                break
    uneven = even.at(strengths)
    return max(even, uneven, key=lambda plan: _all_saved(pass_, plan, saved))


def _saves(site: Site, saved: Saved) -> float:
    return site.savings.of(saved)


def _all_saved(pass_: SitePass, plan: Plan, saved: Saved) -> tuple[float, int]:
    """Return what a plan saves: of what counts, then bytes."""
    chosen = plan.chosen(pass_)
    return (
        sum(_saves(site, saved) for site in chosen),
        sum(site.savings.bytes for site in chosen),
    )


def _groups(plan: Plan, saved: Saved) -> list[list[int]]:
    """Cut sites that may be stronger into at most eight groups that save as much each.

    Those that save most come first; those that take more than before are left as weak.
    """
    sites = plan.sites
    savings = [_saves(site, saved) for site in sites]
    order = sorted(
        range(len(sites)), key=lambda i: (-savings[i], -sites[i].savings.bytes)
    )
    order = [i for i in order if plan.strengths[i] < 1 and savings[i] >= 0]
    if len(order) <= _GROUPS:
        return [[index] for index in order]
    share = sum(max(0, savings[i]) for i in order) / _GROUPS
    groups: list[list[int]] = [[]]
    total = 0.0
    for index in order:
        if groups[-1] and total >= share * len(groups) and len(groups) < _GROUPS:
            groups.append([])
        groups[-1].append(index)
        total += max(0, savings[index])
    return groups


# --- sites that cannot ------------------------------------------------------------


def _leave_out(pass_: SitePass, plan: Plan, idle: int, damage: Damage) -> Plan | None:
    """Leave out the fewest sites, in the plan's order, so that the rest fits.

    Args:
        pass_: The pass.
        plan: The plan, with its order.
        idle: How many sites come first since they save nothing that counts. Up to
            there leaving out makes all better; beyond, a time that was saved is lost.
        damage: Measures some sites.
    """
    milder = _milder(pass_, plan, damage)
    if milder is not None:
        return milder
    low, high = 0, len(plan.sites)
    if idle and damage(plan.without(idle).chosen(pass_)) <= 1:
        high = idle
    else:
        low = idle
    while high - low > 1:
        middle = (low + high) // 2
        if damage(plan.without(middle).chosen(pass_)) <= 1:
            high = middle
        else:
            low = middle
    found = plan.without(high)
    found = _milder(pass_, found, damage, high) or found
    return found if found.chosen(pass_) else None


def _milder(
    pass_: SitePass, plan: Plan, damage: Damage, count: int | None = None
) -> Plan | None:
    """Let the fewest sites take their milder form, in the plan's order, if that fits.

    Args:
        pass_: The pass.
        plan: The plan, with its order.
        damage: Measures some sites.
        count: How many sites come first that are left out: as many of them as fit get
            their milder form, the last first. Without, all sites are as listed so far.

    Returns:
        ``None`` if there is no such form or it does not fit.
    """
    if not _has_milder(pass_, plan.sites):
        return None
    total = len(plan.sites) if count is None else count
    order = plan.order if count is None else tuple(reversed(plan.order[:count]))

    def at(number: int) -> Plan:
        return _with(plan, set(order[:number]), MILDER)

    if count is None:
        if damage(at(total).chosen(pass_)) > 1:
            return None
        low, high = 0, total  # all milder fits, all as listed does not
        while high - low > 1:
            middle = (low + high) // 2
            if damage(at(middle).chosen(pass_)) <= 1:
                high = middle
            else:
                low = middle
        return at(high) if at(high).chosen(pass_) else None
    low, high = 0, total + 1  # none milder fits
    while high - low > 1:
        middle = (low + high) // 2
        if damage(at(middle).chosen(pass_)) <= 1:
            low = middle
        else:
            high = middle
    return at(low) if low else None
