"""What a plan shows of a pass before it runs."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from onnxshrink.base import Cost, Saved, Savings, Site
from onnxshrink.registry import get
from onnxshrink.reporting.plan import Planned, render_plan


@dataclass(frozen=True, kw_only=True)
class Shared(Site):
    """A place with a share."""

    share: float


def shown(*planned: Planned) -> str:
    screen = Console(file=io.StringIO(), width=120, markup=False)
    render_plan(screen, "prune,fold", planned)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_plan_shows_the_largest_sites_first_and_says_what_it_hides() -> None:
    sites = tuple(
        Shared(f"w{n}", "Gemm", Savings(n, 2 * n), share=0.5) for n in range(30)
    )
    skipped = (("tiny", "has 3 values"),)
    text = shown(
        Planned(get("prune")(), sites, skipped, "planned without fold"),
        Planned(get("fold")(), None),
    )
    assert text.index("w29") < text.index("w28")
    assert "29 B" in text
    assert "58" in text
    assert "share=0.5" in text
    assert "w3 " not in text
    assert "... and 10 more; -v lists all" in text
    assert "leaves tiny alone: has 3 values" in text
    assert "planned without fold" in text
    assert "acts on the whole model" in text
    assert "time saved" not in text


def test_a_plan_shows_before_and_after_where_each_site_says_what_it_costs() -> None:
    dense = Cost(4000, 9000, 2e-5)
    sites = (
        Site("one", "Conv", Savings(1000, 2000, 5e-6), cost=dense),
        Site("two", "Gather", Savings(500), cost=Cost(4000)),
    )
    text = shown(Planned(get("prune")(), sites))
    assert "bytes saved" not in text
    rows = {row.split()[0]: row for row in text.splitlines() if "->" in row}
    assert "4.00 kB -> 3.00 kB" in rows["one"]
    assert "9.00 k -> 7.00 k" in rows["one"]
    assert "20 µs -> 15 µs" in rows["one"]
    assert rows["two"].count("->") == 1
    mixed = shown(Planned(get("prune")(), (*sites, Site("three", "Conv"))))
    assert "bytes saved" in mixed
    assert "->" not in mixed


@pytest.mark.parametrize(
    ("ranked_by", "order"),
    [
        ("bytes", ["large", "slow", "known", "quick"]),
        ("seconds", ["quick", "known", "large", "slow"]),
    ],
)
def test_a_plan_is_ranked_by_what_the_budget_asks_for(
    ranked_by: Saved, order: list[str]
) -> None:
    sites = (
        Site("quick", "Conv", Savings(1, 0, 2.5e-3)),
        Site("slow", "Conv", Savings(3, 0, -4e-6)),
        Site("large", "Conv", Savings(4, 0, 0.0)),
        # Without a time, MACs stand for it: 47 million are a millisecond.
        Site("known", "Conv", Savings(2, 47_000_000)),
    )
    text = shown(Planned(get("prune")(), sites, ranked_by=ranked_by))
    assert sorted(order, key=text.index) == order
    assert "time saved" in text
    assert "2.5 ms" in text
    assert "-4 µs" in text
