"""Report: what every pass did and what came of it, in figures and in words."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxshrink.errors import UsageError
from onnxshrink.files import write_text
from onnxshrink.measuring.measure import Stats
from onnxshrink.reporting.page import bars, escaped, page, steps_chart
from onnxshrink.reporting.proof import Proof
from onnxshrink.terminal import clean, count_text, size_text, table
from onnxshrink.validation import Verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


__all__ = ["SUFFIXES", "Report", "Step", "dump", "plain", "step_line"]

SCHEMA = 2
"""Version of the JSON form, docs/report.schema.json; it changes when a name goes."""
SUFFIXES = (".json", ".md", ".html")
"""What the name of a report file may end in."""

Notes = tuple[tuple[str, str], ...]
_FEW = 12
"""Weakened places that the terminal shows for each pass."""
_SLOWER = 1.1
"""Share of the time above which a model is called slower; less is noise."""
_LAYERS = 24
"""Layers that Markdown lists."""
_WIDE = 110
"""Columns from which figures of quality stand side by side."""
_HEADERS = (
    "pass",
    "file",
    "params",
    "non-zeros",
    "MACs",
    "latency",
    "quality",
    "kept",
)


NOTHING_TO_DO = "nothing to do"
"""How the reason of a pass begins that changed nothing."""


@dataclass(frozen=True)
class Step:
    """One pass of a run.

    Attributes:
        pass_name: The pass.
        options: Its options by name.
        accepted: Whether its result was kept.
        reason: Why it was not, or what there is to say although it was.
        seconds: Wall time of the pass, its validation and any back-off.
        before: Figures before it.
        after: Figures after it; those before if it was not kept.
        verdict: What the validator said, if it was asked.
        did: (where, what) it did.
        skipped: (where, why) of what it left alone.
        left_out: (where, how) of what back-off left out or weakened.
    """

    pass_name: str
    options: dict[str, Any]
    accepted: bool
    reason: str
    seconds: float
    before: Stats
    after: Stats
    verdict: Verdict | None = None
    did: Notes = ()
    skipped: Notes = ()
    left_out: Notes = ()

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can hold, under the names of the report."""
        return {
            "pass": self.pass_name,
            "options": plain(self.options),
            "accepted": self.accepted,
            "reason": self.reason,
            "seconds": self.seconds,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "did": plain(self.did),
            "skipped": plain(self.skipped),
            "left_out": plain(self.left_out),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        """Return the step that ``to_json`` wrote.

        Raises:
            KeyError, TypeError, ValueError: It is no such thing.
        """
        verdict = data["verdict"]
        return cls(
            pass_name=str(data["pass"]),
            options=dict(data["options"]),
            accepted=bool(data["accepted"]),
            reason=str(data["reason"]),
            seconds=float(data["seconds"]),
            before=Stats.from_json(data["before"]),
            after=Stats.from_json(data["after"]),
            verdict=None if verdict is None else Verdict.from_json(verdict),
            did=_pairs(data["did"]),
            skipped=_pairs(data["skipped"]),
            left_out=_pairs(data["left_out"]),
        )


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        model: What was shrunk.
        onnxshrink: Version of onnxshrink.
        pipeline: The passes as text.
        seed: Seed of every random draw.
        baseline: Figures of the model as it came.
        steps: The passes in order.
        final: Figures of the file that was written.
        notes: What else one must know, such as which samples measure.
        output: The files written, the model first.
        warnings: What a reader must not miss: shown last, before the summary.
        advice: What would help where nothing was gained, said in the summary.
    """

    model: str
    onnxshrink: str
    pipeline: str
    seed: int
    baseline: Stats
    steps: tuple[Step, ...]
    final: Stats
    notes: tuple[str, ...] = ()
    output: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = ()
    proof: Proof = field(default_factory=Proof)
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can hold.

        A number that JSON cannot hold is a string: ``inf``, ``-inf`` or ``nan``.
        """
        return {
            "schema": SCHEMA,
            "model": self.model,
            "onnxshrink": self.onnxshrink,
            "pipeline": self.pipeline,
            "seed": self.seed,
            "baseline": self.baseline.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "final": self.final.to_json(),
            "notes": list(self.notes),
            "output": list(self.output),
            "warnings": list(self.warnings),
            "advice": self.advice,
            **self.proof.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that ``to_json`` wrote.

        Raises:
            UsageError: It is not a report.
        """
        try:
            return cls(
                model=str(data["model"]),
                onnxshrink=str(data["onnxshrink"]),
                pipeline=str(data["pipeline"]),
                seed=int(data["seed"]),
                baseline=Stats.from_json(data["baseline"]),
                steps=tuple(Step.from_json(step) for step in data["steps"]),
                final=Stats.from_json(data["final"]),
                notes=tuple(str(note) for note in data.get("notes", ())),
                output=tuple(str(name) for name in data.get("output", ())),
                warnings=tuple(str(line) for line in data.get("warnings", ())),
                proof=Proof.from_json(data),
                advice=str(data.get("advice", "")),
            )
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise UsageError(
                f"this is not a report of onnxshrink: {type(error).__name__} {error}"
            ) from error

    def rows(self) -> list[list[str]]:
        """Return the table of the report, a row for the start and for each pass."""
        rows = [["before", *_figures(self.baseline), ""]]
        for step in self.steps:
            rows.append([step.pass_name, *_figures(step.after), _kept(step)])
        rows.append(["after", *_figures(self.final), ""])
        return rows

    def remarks(self, most: int = 0) -> list[str]:
        """Return what the figures do not say: rejections, weakened places, notes.

        Args:
            most: How many places are named for each pass: those it weakened or, if it
                did nothing, those it left alone. 0 names all weakened places and no
                others, which ``details`` has.
        """
        lines = []
        for step in self.steps:
            if step.reason != "ok":
                lines.append(f"{step.pass_name}: {step.reason}")
            # If a step did nothing, the reader wants to know why.
            shown = [
                _left(step, where, why)
                for where, why in step.skipped
                if most and step.accepted and not step.did and not _is_idle(step)
            ]
            shown += [
                f"{step.pass_name}, to stay within the budget: {where}: {how}"
                for where, how in step.left_out
            ]
            lines += shown[: most or None]
            if most and len(shown) > most:
                lines.append(f"... and {len(shown) - most} more; -v names all")
        before, after = self.baseline.peak_memory_bytes, self.final.peak_memory_bytes
        if before is not None and after is not None:
            lines.append(
                f"memory to load it: {size_text(before)} -> {size_text(after)}"
            )
        budget = self.proof.budget_text()
        return [*lines, *([budget] if budget else []), *self.notes]

    def summary(self) -> str:
        """Return one paragraph: what became smaller, and what that cost."""
        before, after = self.baseline, self.final
        ratio = before.file_bytes / after.file_bytes if after.file_bytes else math.inf
        words = f"{ratio:.3g}x smaller" if ratio >= 1.005 else "no smaller"
        parts = [
            f"{size_text(before.file_bytes)} -> {size_text(after.file_bytes)} ({words})"
        ]
        quality = _quality_change(before.metric, after.metric)
        seen = [step.verdict for step in self.steps if step.verdict is not None]
        if quality and seen:
            quality += f" on {_samples(seen[-1])}"
        if quality:
            parts.append(quality)
        if after.latency_ratio is not None:
            slower = ", slower than it came" if after.latency_ratio > _SLOWER else ""
            parts.append(f"{after.latency_ratio:.2f}x the latency{slower}")
        text = ", ".join(parts)
        if self.output:
            text += f"; wrote {', '.join(self.output)}"
        if self.advice:
            text += f"; {self.advice}"
        return text

    def render(self, console: Console, *, verbose: bool = False) -> None:
        """Print the table, the remarks and the summary."""
        made = self._table(console)
        # A table that is narrower than its cells would cut them.
        room = console.options.update(width=1000)
        if console.measure(made, options=room).minimum > console.width:
            self._render_list(console)
        else:
            console.print(made)
        if verbose:
            for line in self.details():
                console.print(clean(line, 2000), soft_wrap=True)
        for line in self.remarks(0 if verbose else _FEW):
            console.print(clean(line, 2000), soft_wrap=True)
        for line in self.warnings:
            console.print(f"warning: {clean(line, 2000)}", soft_wrap=True)
        console.print(clean(self.summary(), 4000), soft_wrap=True, style="bold")

    def _render_list(self, console: Console) -> None:
        """Print each row as lines, which wrap."""
        for row in self.rows():
            console.print(clean(row[0], 80), style="bold")
            for name, cell in zip(_HEADERS[1:], row[1:], strict=True):
                if cell and cell != "-":
                    console.print(f"  {name}: {clean(cell, 200)}")

    def _table(self, console: Console) -> Table:
        made = table(_HEADERS, left=(0, 6, 7), wrap=(6,))
        narrow = console.width < _WIDE
        for row in self.rows():
            cells = [clean(cell, 80) for cell in row]
            if narrow:
                cells[6] = cells[6].replace(", ", "\n")
            made.add_row(*cells)
        return made

    def details(self) -> list[str]:
        """Return everything the passes said."""
        lines = []
        for step in self.steps:
            for where, what in step.did:
                lines.append(f"{step.pass_name}: {where}: {what}")
            for where, why in step.skipped:
                lines.append(_left(step, where, why))
        return lines

    def _text(self) -> str:
        return dump(self.to_json()) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown."""
        head = "| " + " | ".join(_HEADERS) + " |"
        rule = "|---|" + "---:|" * (len(_HEADERS) - 2) + "---|"
        rows = [
            "| " + " | ".join(_markdown(cell) for cell in row) + " |"
            for row in self.rows()
        ]
        lines = [
            f"# {_markdown(Path(self.model).name)}",
            "",
            _markdown(self.summary()),
            "",
            *(f"**Warning:** {_markdown(line)}\n" for line in self.warnings),
            head,
            rule,
            *rows,
            "",
            *(f"- {_markdown(line)}" for line in self.remarks()),
        ]
        if self.proof.layers:
            lines += ["", "## Size by layer", "", "| layer | before | after |"]
            lines += ["|---|---:|---:|"]
            lines += [
                f"| {_markdown(layer.name)} | {size_text(layer.before)} | "
                f"{size_text(layer.after)} |"
                for layer in self.proof.layers[:_LAYERS]
            ]
        lines += ["", "## Of what, where and when", ""]
        lines += [f"- {_markdown(line)}" for line in self.facts()]
        details = self.details()
        if details:
            lines += ["", "## What the passes did", ""]
            lines += [f"- {_markdown(line)}" for line in details]
        return "\n".join(lines) + "\n"

    def to_html(self) -> str:
        """Return the report as one HTML page that needs nothing else."""
        measured = [("before", self.baseline.metric)]
        measured += [(s.pass_name, s.after.metric) for s in self.steps if s.accepted]
        return page(
            Path(self.model).name,
            self.summary(),
            _HEADERS,
            self.rows(),
            [bars(self.proof.layers), steps_chart(measured)],
            self.warnings,
            self.remarks(),
            self.facts(),
            self.details(),
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table and what goes with it."""
        head = "".join(f"<th>{escaped(cell)}</th>" for cell in _HEADERS)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows()
        )
        lines = [*(f"warning: {line}" for line in self.warnings), *self.remarks(_FEW)]
        more = "".join(f"<li>{escaped(line)}</li>" for line in lines)
        return (
            f"<p><strong>{escaped(self.summary())}</strong></p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<ul>{more}</ul>"
        )

    def facts(self) -> list[str]:
        """Return of what, where and when the figures are."""
        return [
            f"passes: {self.pipeline}",
            f"onnxshrink {self.onnxshrink}, seed {self.seed}",
            *self.proof.lines(),
        ]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report, atomically, in the form its suffix says.

        Raises:
            UsageError: The suffix is none of ``.json``, ``.md`` and ``.html``.
            OutputError: It cannot be written.
        """
        target = Path(path)
        forms = dict(
            zip(SUFFIXES, (self._text, self.to_markdown, self.to_html), strict=True)
        )
        if target.suffix not in forms:
            raise UsageError(
                f"a report is written by its suffix, and {target} has none of "
                f"{', '.join(SUFFIXES)}"
            )
        write_text(target, forms[target.suffix]())


def step_line(step: Step) -> str:
    """Return one line about a pass that has just ended."""
    figures = (
        f"{size_text(step.before.file_bytes)} -> {size_text(step.after.file_bytes)}"
    )
    if not step.accepted or _is_idle(step):
        figures = clean(step.reason, 300)
    return f"{step.pass_name}: {figures} ({step.seconds:.1f} s)"


# --- values -----------------------------------------------------------------------


def plain(value: object) -> Any:
    """Return a value that JSON can hold, and that reads back to the same text."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(
            {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        )
    return str(value)


def dump(value: object) -> str:
    """Return JSON text for a value: ASCII, and without NaN or Infinity."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def _pairs(values: Any) -> Notes:
    return tuple((str(where), str(what)) for where, what in values)


def _markdown(text: str) -> str:
    shown = clean(text, 4000)
    for mark in "\\`*_{}[]<>|#":
        shown = shown.replace(mark, "\\" + mark)
    return shown


def _html(text: str, limit: int = 4000) -> str:
    return html.escape(clean(text, limit))


# --- figures ----------------------------------------------------------------------

_OUTPUT_FIGURES = ("agreement", "sqnr_db", "exact")
"""Figures in ``Stats.metric`` that are no task metric."""
_ERRORS = {"top1": "error", "top5": "top-5 error"}
"""Metrics in percent that are shown as errors, 100 less the metric."""


def _figures(stats: Stats) -> list[str]:
    """Return the cells of one row of the table."""
    latency = "-"
    if stats.latency_ratio is not None:
        latency = f"{stats.latency_ratio:.2f}x"
    elif stats.latency_ms is not None:
        latency = f"{stats.latency_ms:.3g} ms"
    return [
        size_text(stats.file_bytes),
        count_text(stats.parameters),
        count_text(stats.nonzeros),
        count_text(stats.macs),
        latency,
        ", ".join(quality_texts(stats.metric)) or "-",
    ]


def quality_texts(metric: Mapping[str, float]) -> list[str]:
    """Return figures of quality in words, the task metric first."""
    found = [
        f"{_ERRORS.get(name, clean(name, 40))} {_metric_value(name, value)}"
        for name, value in metric.items()
        if name not in _OUTPUT_FIGURES
    ]
    if "agreement" in metric:
        found.append(f"agrees {_share(metric['agreement'])}")
    if "sqnr_db" in metric:
        found.append(f"{metric['sqnr_db']:.1f} dB")
    if "exact" in metric:
        found.append("outputs equal")
    return found


def _metric_value(name: str, value: float) -> str:
    return f"{100 - value:.2f} %" if name in _ERRORS else f"{value:.5g}"


def _share(value: float) -> str:
    """Return a share in percent; nothing less than all reads 100 %."""
    percent = 100 * value
    return "100 %" if percent == 100 else f"{min(percent, 99.99):.2f} %"


def _quality_change(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    for name in before:
        if name in after and name not in _OUTPUT_FIGURES:
            shown = _ERRORS.get(name, clean(name, 40))
            change = f"{_metric_value(name, before[name])} -> "
            return f"{shown} {change}{_metric_value(name, after[name])}"
    return " and ".join(quality_texts(after))


def _samples(verdict: Verdict) -> str:
    if verdict.smoke_test:
        return f"{verdict.samples:,} made-up inputs, a smoke test only"
    return f"{verdict.samples:,} samples no pass has seen"


def _left(step: Step, where: str, why: str) -> str:
    """Say what a step left alone; one place may be the pass itself, as a whole."""
    what = "" if where == step.pass_name else f"left {where} alone: "
    return f"{step.pass_name}: {what}{why}"


def _is_idle(step: Step) -> bool:
    return step.accepted and step.reason.startswith(NOTHING_TO_DO)


def _kept(step: Step) -> str:
    if not step.accepted:
        return "no"
    if _is_idle(step):
        return NOTHING_TO_DO
    return "partly" if step.left_out else "yes"
