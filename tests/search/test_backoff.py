"""The search that makes a pass fit its budget, on damage functions known on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.model import Model
from onnxshrink.search.backoff import Plan, back_off, tighten


@dataclass(frozen=True, kw_only=True)
class AllOrNothing(SitePass):
    """Sites cannot be weakened."""

    name: ClassVar[str] = "all-or-nothing"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        return ()

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        raise AssertionError("the search never rewrites")


@dataclass(frozen=True, kw_only=True)
class Level(Site):
    """A place and how strongly it is acted at."""

    level: float


@dataclass(frozen=True, kw_only=True)
class Gentle(AllOrNothing):
    """Sites carry the strength they are done with."""

    name: ClassVar[str] = "gentle"

    def weaken(self, site: Site, strength: float) -> Site | None:
        savings = Savings(bytes=round(1000 * strength))
        return Level(site.where, site.kind, savings, level=strength)


def sites(count: int) -> list[Site]:
    return [Level(f"w{i}", "Gemm", Savings(1000), level=1.0) for i in range(count)]


def left_out(plan: Plan) -> set[str]:
    return {s.where for s, x in zip(plan.sites, plan.strengths, strict=True) if x == 0}


def test_only_the_most_damaging_sites_are_left_out() -> None:
    harm = {"w0": 0.1, "w1": 0.9, "w2": 0.2, "w3": 0.5, "w4": 0.1}

    plan = back_off(
        AllOrNothing(), sites(5), lambda some: sum(harm[s.where] for s in some)
    )

    assert plan is not None
    assert left_out(plan) == {"w1"}
    assert plan.changes(AllOrNothing()) == [("w1", "left out")]


def test_no_plan_where_every_site_alone_breaks_the_budget() -> None:
    assert back_off(AllOrNothing(), sites(4), lambda some: 2.0 * len(some)) is None


def test_many_sites_are_measured_in_groups() -> None:
    calls = 0

    def damage(some: Sequence[Site]) -> float:
        nonlocal calls
        calls += 1
        return sum(0.7 for s in some if s.where in ("w7", "w900"))

    plan = back_off(AllOrNothing(), sites(1000), damage)

    assert plan is not None
    assert damage(plan.chosen(AllOrNothing())) <= 1
    assert len(left_out(plan)) <= 8
    assert calls < 160


def level(some: Sequence[Site]) -> dict[str, float]:
    return {site.where: site.level for site in some if isinstance(site, Level)}


def test_one_strength_is_found_for_all() -> None:
    plan = back_off(Gentle(), sites(4), lambda some: sum(level(some).values()))

    assert plan is not None
    assert plan.strengths == (0.25,) * 4


def test_sturdy_sites_take_budget_where_that_saves_more() -> None:
    def damage(some: Sequence[Site]) -> float:
        found = level(some)
        return 2 * found.get("w0", 0.0) + 0.1 * found.get("w1", 0.0)

    plan = back_off(Gentle(), sites(2), damage)

    assert plan is not None
    assert plan.strengths[1] == 1.0
    assert 0.4 <= plan.strengths[0] <= 0.45  # 0.9 of the budget is left for it


def test_sites_that_save_most_are_strengthened_in_groups() -> None:
    many = [Level(f"w{i}", "Gemm", Savings(1000 - i), level=1.0) for i in range(60)]
    calls = 0

    def damage(some: Sequence[Site]) -> float:
        nonlocal calls
        calls += 1
        found = level(some)
        return 3 * found.get("w59", 0.0) + 0.001 * sum(found.values())

    plan = back_off(Gentle(), many, damage)

    assert plan is not None
    assert plan.strengths[:40] == (1.0,) * 40
    assert plan.strengths[59] < 0.34
    assert damage(plan.chosen(Gentle())) <= 1
    assert calls < 40


@pytest.mark.parametrize("pass_", [AllOrNothing(), Gentle()])
def test_tightening_ends_in_nothing_left_to_give(pass_: SitePass) -> None:
    plan: Plan | None = Plan(tuple(sites(9)), (1.0,) * 9, tuple(range(9)))
    before = 9.0
    for _ in range(200):
        assert plan is not None
        plan = tighten(pass_, plan)
        if plan is None:
            break
        assert sum(plan.strengths) < before
        before = sum(plan.strengths)
    assert plan is None


def test_tightening_leaves_out_an_eighth_the_most_damaging_first() -> None:
    order = (4, 1, *(i for i in range(20) if i not in (1, 4)))
    plan: Plan | None = Plan(tuple(sites(20)), (1.0,) * 20, order)

    plan = tighten(AllOrNothing(), plan)
    assert plan is not None
    assert left_out(plan) == {"w4", "w1"}
    plan = tighten(AllOrNothing(), plan)
    assert plan is not None
    assert left_out(plan) == {"w4", "w1", "w0", "w2"}


def test_a_change_names_the_field_that_became_gentler() -> None:
    plan = Plan(tuple(sites(1)), (0.5,), (0,))

    assert plan.changes(Gentle()) == [("w0", "level 1 -> 0.5")]


# --- where time counts ------------------------------------------------------------


def timed(**seconds: float) -> list[Site]:
    """Sites by the time they save; all save as many bytes."""
    return [
        Level(name, "Gemm", Savings(1000, seconds=saved), level=1.0)
        for name, saved in seconds.items()
    ]


def test_sites_that_save_no_time_are_given_up_first_where_time_counts() -> None:
    harm = {"w0": 0.7, "w1": 0.5, "w2": 0.2}
    found = timed(w0=1e-3, w1=0.0, w2=1e-3)

    def damage(some: Sequence[Site]) -> float:
        return sum(harm[site.where] for site in some)

    by_bytes = back_off(AllOrNothing(), found, damage)
    by_time = back_off(AllOrNothing(), found, damage, saved="seconds")

    assert by_bytes is not None
    assert by_time is not None
    assert left_out(by_bytes) == {"w0"}
    assert left_out(by_time) == {"w1"}


def test_where_that_is_not_enough_the_most_harmful_follow() -> None:
    harm = {"w0": 1.2, "w1": 0.1, "w2": 0.4, "w3": 0.3}
    found = timed(w0=1e-3, w1=-1e-3, w2=1e-3, w3=1e-3)
    plan = back_off(
        AllOrNothing(),
        found,
        lambda some: sum(harm[site.where] for site in some),
        saved="seconds",
    )
    assert plan is not None
    assert left_out(plan) == {"w0", "w1"}
    assert plan.changes(AllOrNothing())[0][0] == "w1"


def test_a_time_is_met_by_leaving_out_the_sites_that_lose_time() -> None:
    # Four sites save a tenth of the time, two lose three twentieths; 0.7 is allowed.
    seconds = {"w0": 0.1, "w1": -0.15, "w2": 0.1, "w3": 0.1, "w4": -0.15, "w5": 0.1}

    def damage(some: Sequence[Site]) -> float:
        return (1 - sum(seconds[site.where] for site in some)) / 0.7

    plan = back_off(AllOrNothing(), timed(**seconds), damage, saved="seconds")

    assert plan is not None
    assert left_out(plan) == {"w1", "w4"}


def test_only_as_many_as_it_takes_of_those_that_lose_time_are_left_out() -> None:
    seconds = {"w0": 0.4, "w1": -0.05, "w2": -0.05, "w3": -0.05}

    def damage(some: Sequence[Site]) -> float:
        return (1 - sum(seconds[site.where] for site in some)) / 0.71

    plan = back_off(
        AllOrNothing(),
        timed(**seconds),
        damage,
        saved="seconds",
        harm=lambda some: {"w1": 0.2, "w2": 0.3, "w3": 0.1}.get(some[0].where, 0.9),
    )

    assert plan is not None
    assert left_out(plan) == {"w2"}  # of those, the most harmful


@dataclass(frozen=True, kw_only=True)
class Slower(Gentle):
    """Weaker sites save less time, in proportion."""

    name: ClassVar[str] = "slower"

    def weaken(self, site: Site, strength: float) -> Site | None:
        savings = site.savings * strength
        return Level(site.where, site.kind, savings, level=strength)


def test_weakened_sites_keep_the_time_they_save() -> None:
    def damage(some: Sequence[Site]) -> float:
        found = level(some)
        return 0.8 * found.get("w0", 0.0) + 0.8 * found.get("w1", 0.0)

    found = timed(w0=1e-3, w1=0.0)
    by_bytes = back_off(Slower(), found, damage)
    by_time = back_off(Slower(), found, damage, saved="seconds")

    assert by_bytes is not None
    assert by_time is not None
    assert by_bytes.strengths[1] > 0.5
    assert by_time.strengths == (1.0, 0.25)  # what is left of the budget


def test_where_they_alone_break_it_the_others_have_nothing() -> None:
    def damage(some: Sequence[Site]) -> float:
        found = level(some)
        return 4 * found.get("w0", 0.0) + found.get("w1", 0.0)

    plan = back_off(Slower(), timed(w0=1e-3, w1=0.0), damage, saved="seconds")

    assert plan is not None
    # All of the budget is for the site that saves time: a quarter of its strength.
    assert plan.strengths == (0.25, 0.0)


def test_a_time_that_no_choice_of_sites_meets_is_given_up_at_once() -> None:
    calls = 0

    def damage(some: Sequence[Site]) -> float:
        nonlocal calls
        calls += 1
        return (1 - 0.1 * len(some)) / 0.2

    found = timed(**{f"w{i}": 0.1 for i in range(5)})
    for pass_ in (AllOrNothing(), Slower()):
        plan = back_off(pass_, found, damage, saved="seconds", harm=lambda some: 0.5)
        assert plan is None
    assert calls == 2


def test_a_site_that_loses_time_is_not_strengthened() -> None:
    harm = {"w0": 2.0, "w1": 0.01, "w2": 0.1}

    def damage(some: Sequence[Site]) -> float:
        return sum(harm[name] * strength for name, strength in level(some).items())

    found = timed(w0=1e-3, w1=-1e-3, w2=1e-3)
    plan = back_off(Slower(), found, damage, saved="seconds")

    assert plan is not None
    assert plan.strengths[1:] == (0.0, 1.0)
    assert 0.4 < plan.strengths[0] < 0.45  # 0.9 of what all could bear


def test_among_sites_that_save_no_time_bytes_count() -> None:
    harm = {"w0": 0.5, "w1": 0.1, "w2": 2.0}

    def damage(some: Sequence[Site]) -> float:
        return sum(harm[name] * strength for name, strength in level(some).items())

    plan = back_off(Slower(), timed(w0=1e-3, w1=0.0, w2=0.0), damage, saved="seconds")

    assert plan is not None
    assert plan.strengths[0] == 1.0
    assert plan.strengths[1] > 0.5 > 0.25 > plan.strengths[2] > 0.2


@dataclass(frozen=True, kw_only=True)
class TwoForms(Gentle):
    """Sites have one milder form, which may still be too much."""

    name: ClassVar[str] = "two-forms"
    gradual: ClassVar[bool] = False

    def weaken(self, site: Site, strength: float) -> Site | None:
        if strength >= 1:
            return site
        return None if site.where == "w3" else replace(site, level=0.5)


def strengths(harm: dict[str, tuple[float, float]]) -> tuple[float, ...] | None:
    """Back off where sites do so much harm as listed, and in their milder form."""

    def damage(some: Sequence[Site]) -> float:
        return sum(harm[s.where][0 if s.level == 1 else 1] for s in some)  # type: ignore[attr-defined]

    plan = back_off(TwoForms(), sites(4), damage)
    return None if plan is None else plan.strengths


def test_sites_that_harm_most_take_their_milder_form_first() -> None:
    fits = {"w0": (0.1, 0.0), "w1": (3.0, 0.1), "w2": (0.2, 0.0), "w3": (0.1, 0.1)}
    assert strengths(fits) == (1, 0.5, 1, 1)
    # Those that are left out get it back where it fits.
    worse = {"w0": (0.1, 0.0), "w1": (3.0, 2.0), "w2": (2.0, 0.2), "w3": (0.1, 0.1)}
    assert strengths(worse) == (1, 0, 0.5, 1)
    without = {"w0": (0.1, 0.0), "w1": (0.1, 0.1), "w2": (0.1, 0.0), "w3": (3.0, 3.0)}
    assert strengths(without) == (1, 1, 1, 0.5)  # w3 has none, so it is left out
    assert strengths({f"w{i}": (3.0, 2.0) for i in range(4)}) is None


def test_a_tighter_plan_takes_milder_forms_before_it_leaves_sites_out() -> None:
    plan = Plan(tuple(sites(4)), (1.0,) * 4, (1, 3, 0, 2))
    seen = []
    while plan is not None:
        plan = tighten(TwoForms(), plan)  # type: ignore[assignment]
        if plan is not None:
            seen.append(plan.strengths)
    assert seen == [
        (1, 0.5, 1, 1),
        (1, 0.5, 1, 0),
        (0.5, 0.5, 1, 0),
        (0.5, 0.5, 0.5, 0),
        (0.5, 0, 0.5, 0),
        (0, 0, 0.5, 0),
    ]
