"""Comparison: two models side by side, the first being the reference.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxshrink.base import Progress, Promise
from onnxshrink.errors import UsageError
from onnxshrink.isolation.host import hosting
from onnxshrink.measuring.measure import Stats, measure
from onnxshrink.model import Model, ValueInfo
from onnxshrink.runtime import describe
from onnxshrink.samples import Splits
from onnxshrink.terminal import clean, count_text, size_text, table
from onnxshrink.validation import Budget, Metric, Validator, Verdict

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Comparison", "compare", "signature_differences"]


def signature_differences(a: Model, b: Model) -> list[str]:
    """Say how the inputs and outputs of two models differ; empty if they do not.

    A symbolic dimension fits another whatever its name; a fixed one fits only itself.
    An output dimension about which the first model says nothing fits any.
    """
    found = []
    for what, ours, theirs in (
        ("input", a.inputs, b.inputs),
        ("output", a.outputs, b.outputs),
    ):
        known = {info.name: info for info in theirs}
        names = {info.name for info in ours}
        for info in ours:
            other = known.get(info.name)
            if other is None:
                found.append(f"{what} {info.name!r} is missing in the second model")
            elif not _fits(info, other, what == "output"):
                found.append(f"{what} {describe(info)} is {describe(other)}")
        found += [
            f"{what} {info.name!r} is new in the second model"
            for info in theirs
            if info.name not in names
        ]
    return found


def _fits(a: ValueInfo, b: ValueInfo, is_output: bool) -> bool:
    if (a.kind, a.data_type) != (b.kind, b.data_type):
        return False
    if a.shape is None or b.shape is None:
        return a.shape == b.shape or (is_output and a.shape is None)
    return len(a.shape) == len(b.shape) and all(
        left == right
        or (is_output and left is None)
        or not (isinstance(left, int) or isinstance(right, int))
        for left, right in zip(a.shape, b.shape, strict=True)
    )


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        a: The reference.
        b: The other model.
        differences: How inputs and outputs differ; then nothing was run.
        stats_a: Figures of the reference.
        stats_b: Figures of the other; its latency ratio is against the reference.
        verdict: How the outputs differ; ``None`` if nothing was run.
        checked: Whether limits were given.
        notes: Which samples were used.
    """

    a: str
    b: str
    differences: tuple[str, ...]
    stats_a: Stats
    stats_b: Stats
    verdict: Verdict | None
    checked: bool
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether signatures are the same, outputs are sane and the limits hold."""
        if self.differences or self.verdict is None:
            return False
        return self.verdict.ok

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON can hold."""
        verdict = self.verdict
        return {
            "ok": self.ok,
            "differences": list(self.differences),
            "a": {"model": self.a, **self.stats_a.to_json()},
            "b": {"model": self.b, **self.stats_b.to_json()},
            "verdict": None if verdict is None else verdict.to_json(),
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print it."""
        made = table(["", clean(self.a, 60), clean(self.b, 60), "ratio"])
        for row in self._rows():
            made.add_row(*row)
        console.print(made)
        for difference in self.differences:
            console.print(clean(difference), soft_wrap=True)
        if self.verdict is not None and self.verdict.outputs:
            console.print(self._outputs(self.verdict))
        for note in self.notes:
            console.print(clean(note), soft_wrap=True)
        console.print(clean(self._conclusion()), soft_wrap=True, style="bold")

    def _rows(self) -> list[list[str]]:
        a, b = self.stats_a, self.stats_b
        rows = [
            [
                "file",
                size_text(a.file_bytes),
                size_text(b.file_bytes),
                _ratio(b.file_bytes, a.file_bytes),
            ]
        ]
        for name, one, two in (
            ("parameters", a.parameters, b.parameters),
            ("non-zeros", a.nonzeros, b.nonzeros),
            ("MACs", a.macs, b.macs),
        ):
            rows.append([name, count_text(one), count_text(two), _ratio(two, one)])
        if b.latency_ratio is not None:
            rows.append(
                [
                    "latency",
                    _milliseconds(a.latency_ms),
                    _milliseconds(b.latency_ms),
                    f"{b.latency_ratio:.2f}",
                ]
            )
        metric = self.verdict.metric if self.verdict is not None else None
        if metric is not None:
            rows.append(
                [
                    clean(metric.name, 40),
                    f"{metric.before:.5g}",
                    f"{metric.after:.5g}",
                    f"{metric.after - metric.before:+.3g}",
                ]
            )
        return rows

    def _outputs(self, verdict: Verdict) -> Any:
        made = table(
            ["output", "max error", "relative", "SQNR", "cosine", "same top class"]
        )
        for name, found in verdict.outputs.items():
            if found.note:
                made.add_row(clean(name, 60), clean(found.note, 60), *[""] * 4)
                continue
            exact = math.isinf(found.sqnr_db) and found.sqnr_db > 0
            made.add_row(
                clean(name, 60),
                f"{found.max_abs:.3g}",
                f"{found.max_rel:.3g}",
                "exact" if exact else f"{found.sqnr_db:.1f} dB",
                "-" if found.cosine is None else f"{found.cosine:.6f}",
                "-" if found.agreement is None else f"{100 * found.agreement:.2f} %",
            )
        return made

    def _conclusion(self) -> str:
        if self.differences:
            return "The models do not have the same inputs and outputs."
        if self.verdict is None or not self.verdict.ok:
            return f"Failed: {self.verdict.reason if self.verdict else 'not run'}."
        return "All checks hold." if self.checked else "Compared; no limit was given."


def compare(
    a: Model,
    b: Model,
    splits: Callable[[], Splits],
    *,
    budget: Budget | None = None,
    metric: Metric = None,
    outputs: Sequence[str] = (),
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Run two models on the same samples and put them side by side.

    Args:
        a: The reference, loaded from a file.
        b: The other model, loaded from a file.
        splits: Returns the samples to compare on; called only if the signatures are the
            same.
        budget: Limits that ``b`` must hold; without, only sane outputs are asked for.
        metric: Task metric, as for ``Validator``.
        outputs: Outputs that the budget bounds, as for ``Validator``.
        providers: onnxruntime execution providers.
        threads: onnxruntime's threads; 0 lets it choose.
        seed: Seed of random inputs, for the report.
        progress: Receives progress.

    Raises:
        UsageError: A model that comes from memory, or samples that do not fit.
        ModelError: onnxruntime cannot run the reference.
    """
    if a.source is None or b.source is None:
        raise UsageError("compare needs models from files: their sizes are compared")
    differences = signature_differences(a, b)
    samples = None if differences else splits()
    with hosting() as host:
        settings: dict[str, Any] = {
            "threads": threads,
            "providers": providers,
            "host": host,
        }
        verdict = None
        if samples is not None:
            validator = Validator(
                a.source,
                samples,
                budget or Budget(),
                metric=metric,
                outputs=outputs,
                seed=seed,
                progress=progress,
                **settings,
            )
            verdict = validator.check(b.source, Promise.CLOSE)
        runs = verdict is not None and verdict.problem not in ("broken", "signature")
        stats_a = measure(a.source, samples, latency=runs, **settings)
        other = a.source if runs else None
        stats_b = measure(b.source, samples, baseline=other, latency=runs, **settings)
    if stats_b.latency_ms is not None and stats_b.latency_ratio:
        # Both were timed in turn for the ratio, so that time is what stands beside it.
        stats_a = dataclasses.replace(
            stats_a, latency_ms=stats_b.latency_ms / stats_b.latency_ratio
        )
    return Comparison(
        a=str(a.source),
        b=str(b.source),
        differences=tuple(differences),
        stats_a=stats_a,
        stats_b=stats_b,
        verdict=verdict,
        checked=budget is not None,
        notes=() if samples is None else tuple(samples.describe()),
    )


def _ratio(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.3g}" if part is not None and whole else "-"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms"
