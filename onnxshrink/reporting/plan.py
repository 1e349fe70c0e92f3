"""What a pipeline would do, before it does anything.

Tested in tests/reporting/test_report.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from onnxshrink.base import Pass, Saved, Site
from onnxshrink.terminal import clean, count_text, size_text, table

__all__ = ["Planned", "render_plan"]


@dataclass(frozen=True)
class Planned:
    """What a pass would do.

    Attributes:
        pass_: The pass.
        sites: Where it would act; ``None`` if it does not list places.
        skipped: (where, why) of what it would leave alone.
        note: What the plan cannot say.
        ranked_by: Which savings count: what the budget asks for.
        outlook: Lines of the pass's own, such as a curve of costs.
    """

    pass_: Pass
    sites: tuple[Site, ...] | None
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
    ranked_by: Saved = "bytes"
    outlook: tuple[str, ...] = ()


def render_plan(
    console: Console,
    pipeline: str,
    planned: Sequence[Planned],
    *,
    verbose: bool = False,
) -> None:
    """Print what each pass would do.

    Args:
        console: Where to.
        pipeline: The passes as text.
        planned: The plan.
        verbose: Print every site, not the largest.
    """
    most = 1_000_000 if verbose else 20
    console.print(f"Plan for {clean(pipeline, 4000)}; nothing was changed.")
    for index, step in enumerate(planned):
        console.print()
        console.print(f"{index + 1}. {step.pass_.name}", style="bold")
        if step.sites is None:
            console.print("   acts on the whole model")
        elif not step.sites:
            console.print("   nothing to do")
        else:
            _render_sites(console, step, most)
        for line in step.outlook:
            console.print(f"   {clean(line, 200)}", soft_wrap=True, highlight=False)
        for line in step.note.split("; ") if step.note else ():
            console.print(f"   {clean(line, 2000)}", soft_wrap=True)
        for where, why in step.skipped[:most]:
            console.print(
                f"   leaves {clean(where, 80)} alone: {clean(why)}", soft_wrap=True
            )
        if len(step.skipped) > most:
            console.print(f"   ... and {len(step.skipped) - most} more; -v lists all")


def _render_sites(console: Console, step: Planned, most: int) -> None:
    sites = sorted(
        step.sites or (),
        key=lambda site: (-site.savings.of(step.ranked_by), -site.savings.bytes),
    )
    timed = any(site.savings.seconds is not None for site in sites)
    more = "" if all(site.cost for site in sites) else " saved"
    made = table(
        ["where", "kind", f"bytes{more}", f"MACs{more}"]
        + ([f"time{more}"] if timed else [])
        + ["how"],
        left=(0, 1, 5 if timed else 4),
        wrap=(0, 5 if timed else 4),
    )
    for site in sites[:most]:
        how = ", ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in site.how().items()
        )
        made.add_row(
            clean(site.where, 60),
            clean(site.kind, 30),
            *_figures(site, with_time=timed, with_before=not more),
            clean(how, 160),
        )
    console.print(made)
    if len(sites) > most:
        console.print(f"   ... and {len(sites) - most} more; -v lists all")
    total = sum(site.savings.bytes for site in sites)
    console.print(
        f"   {len(sites)} sites, about {size_text(total)} saved before encoding"
    )


def _figures(site: Site, *, with_time: bool, with_before: bool) -> list[str]:
    """Return bytes, MACs and time: what is saved, or before and after."""
    saved, cost = site.savings, site.cost
    found = [size_text(saved.bytes), count_text(saved.macs), _time_text(saved.seconds)]
    if cost is not None and with_before:
        found = [_change(size_text, cost.bytes, saved.bytes), "", ""]
        if cost.macs:
            found[1] = _change(count_text, cost.macs, saved.macs)
        if cost.seconds is not None and saved.seconds is not None:
            found[2] = _change(_time_text, cost.seconds, saved.seconds)
    return found if with_time else found[:2]


def _change(text: Callable[[float], str], before: float, saved: float) -> str:
    return f"{text(before)} -> {text(before - saved)}"


def _time_text(seconds: float | None) -> str:
    """Return a time as text; what is not known is left open."""
    if seconds is None:
        return ""
    large = abs(seconds) >= 1e-3
    return f"{seconds * 1e3:.3g} ms" if large else f"{seconds * 1e6:.3g} µs"
