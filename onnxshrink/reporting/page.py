"""A report as one HTML page: any width, light or dark, and nothing to load.

Tested in tests/reporting/test_page.py.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from onnxshrink.reporting.proof import LayerSize
from onnxshrink.terminal import clean, middle, size_text

__all__ = ["bars", "escaped", "page", "steps_chart"]

_MOST = 24
"""Layers that have a bar of their own."""

_STYLE = """\
:root { color-scheme: light dark; --ink: #1c2128; --paper: #fff; --line: #d0d7de;
  --soft: #57606a; --before: #9aa4b2; --after: #1f6feb; --bad: #b42318 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #9da7b3;
    --before: #6e7681; --after: #58a6ff; --bad: #ff7b72 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem;
  padding: 1rem; color: var(--ink); background: var(--paper) }
h1, p, li, td, code { overflow-wrap: anywhere }
h2 { margin-top: 2rem }
table { border-collapse: collapse; margin: 1.5rem 0; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
ul { padding-left: 1.2rem }
svg { display: block; width: 100%; height: auto; margin: 1rem 0 }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif }
svg .soft { fill: var(--soft) }
.warning { color: var(--bad) }
.facts { color: var(--soft); font-size: .9rem }
@media (max-width: 44rem) {
  thead { position: absolute; left: -9999px }
  table, tbody, tr, td { display: block; width: 100% }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  td { border: 0; display: flex; gap: 1rem; justify-content: space-between;
    padding: .1rem 0 }
  td:empty { display: none }
  td:first-child { font-weight: bold }
  td:not(:first-child)::before { content: attr(data-label); color: var(--soft) } }
"""


def escaped(text: object, limit: int = 4000) -> str:
    """Return text that HTML shows as it is, without control characters."""
    return html.escape(clean(text, limit))


def page(
    title: str,
    summary: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    charts: Sequence[str],
    warnings: Sequence[str],
    remarks: Sequence[str],
    facts: Sequence[str],
    details: Sequence[str],
) -> str:
    """Return the page.

    Args:
        title: Name of the model.
        summary: One paragraph.
        headers: Heads of the table.
        rows: Its cells.
        charts: SVG images.
        warnings: What must not be missed.
        remarks: A list.
        facts: Another one, in small print.
        details: What the passes said.
    """
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in headers)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escaped(label)}">{escaped(cell)}</td>'
            for label, cell in zip(headers, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )

    def listed(lines: Sequence[str], kind: str = "") -> str:
        items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
        return f"<ul{kind}>{items}</ul>" if lines else ""

    warned = "".join(
        f'<p class="warning"><strong>Warning:</strong> {escaped(line)}</p>'
        for line in warnings
    )
    more = "<h2>What the passes did</h2>" + listed(details) if details else ""
    proof = "<h2>Of what, where and when</h2>" + listed(facts, ' class="facts"')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>onnxshrink: {escaped(title)}</title>\n"
        f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{escaped(title)}</h1>\n"
        f"<p><strong>{escaped(summary)}</strong></p>\n{warned}\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        f"{listed(remarks)}\n{''.join(charts)}\n{proof}\n{more}\n</body>\n</html>\n"
    )


def bars(layers: Sequence[LayerSize]) -> str:
    """Return a chart of the bytes of each layer, before and after."""
    shown = [layer for layer in layers if max(layer.before, layer.after) > 0]
    rest = shown[_MOST:]
    shown = shown[:_MOST]
    if rest:
        before, after = sum(r.before for r in rest), sum(r.after for r in rest)
        shown.append(LayerSize(f"{len(rest)} more", before, after))
    if not shown:
        return ""
    largest = max(max(layer.before, layer.after) for layer in shown)
    lines = []
    for number, layer in enumerate(shown):
        top = 44 * number
        words = f"{size_text(layer.before)} -> {size_text(layer.after)}"
        lines.append(
            f'<text x="0" y="{top + 12}">{escaped(middle(layer.name, 30))}</text>'
            f'<text class="soft" x="360" y="{top + 12}" text-anchor="end">'
            f"{escaped(words)}</text>"
            + _bar(top + 18, layer.before / largest, "--before")
            + _bar(top + 27, layer.after / largest, "--after")
        )
    return (
        "<h2>Size by layer</h2>"
        f'<svg viewBox="0 0 360 {44 * len(shown)}" role="img" '
        'aria-label="Bytes of each layer before and after" '
        f'style="max-width: 40rem">{"".join(lines)}</svg>'
    )


def _bar(top: int, share: float, color: str) -> str:
    return (
        f'<rect x="0" y="{top}" width="{360 * share:.1f}" height="8" rx="2" '
        f'style="fill: var({color})"/>'
    )


def steps_chart(steps: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return a chart of the first figure of quality that all steps have.

    Args:
        steps: Names of the steps, the first for the model as it came, and figures.
    """
    # Before the first step a model agrees with itself, and no figure says so.
    names = list(steps[-1][1]) if steps else []
    name = next((n for n in names if sum(n in f for _, f in steps) >= 2), None)
    if name is None:
        return ""
    known = [(step, figures[name]) for step, figures in steps if name in figures]
    values = [value for _, value in known]
    low, high = min(values), max(values)
    room = (high - low) or max(abs(high), 1.0)
    wide = 360 / max(1, len(known) - 1)
    points = [
        (wide * at if len(known) > 1 else 180, 84 - 60 * (value - low) / room)
        for at, (_, value) in enumerate(known)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = []
    for number, ((step, value), (x, y)) in enumerate(zip(known, points, strict=True)):
        anchor = "middle"
        if number == 0:
            anchor = "start"
        elif number == len(known) - 1:
            anchor = "end"
        few = len(known) <= 6 or number in (0, len(known) - 1)
        words = (
            f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">'
            f"{value:.4g}</text>"
            f'<text class="soft" x="{x:.1f}" y="106" text-anchor="{anchor}">'
            f"{escaped(middle(step, 12))}</text>"
        )
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: var(--after)"/>'
            + (words if few else "")
        )
    return (
        f"<h2>Quality by step: {escaped(name, 40)}</h2>"
        '<svg viewBox="-4 0 368 112" role="img" aria-label="Quality after each step" '
        'style="max-width: 40rem">'
        f'<polyline points="{line}" fill="none" style="stroke: var(--after)" '
        f'stroke-width="2"/>{"".join(marks)}</svg>'
    )
