"""Verdicts: whether a candidate keeps its promise and the budget, and why not.

All of it is arithmetic on what was measured; nothing here runs a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onnxshrink.base import Promise
from onnxshrink.measuring.differences import (
    EMPTY,
    Difference,
    OutputMetrics,
    Seen,
    is_float,
)
from onnxshrink.validation.budget import Bound, Budget, amplitude, grown
from onnxshrink.validation.metrics import MetricChange

__all__ = ["Problem", "Verdict", "judge", "moved"]

Problem = Literal[
    "", "broken", "signature", "same", "budget", "bytes", "latency", "unmeasured"
]


@dataclass(frozen=True)
class Verdict:
    """What the validator says about a candidate.

    Attributes:
        ok: Whether it holds.
        reason: ``ok``, or what does not hold, with figures.
        problem: Kind of what does not hold.
        outputs: Metrics by output name; empty if it could not run.
        metric: The task metric, where there is one.
        samples: Samples that were compared.
        smoke_test: Whether they were random, which proves little.
        damage: Share of the budget that is used up; at most 1 fits. It moves with the
            noise in the outputs, so that candidates can be ranked by it even where
            the metric stays the same. Infinite if the candidate is broken.
        noise: Largest noise-to-signal amplitude ratio of a float output.
    """

    ok: bool
    reason: str = "ok"
    problem: Problem = ""
    outputs: Mapping[str, OutputMetrics] = field(default_factory=dict)
    metric: MetricChange | None = None
    samples: int = 0
    smoke_test: bool = False
    damage: float = 0.0
    noise: float = 0.0

    @property
    def keepable(self) -> bool:
        """Whether only the user's limits are broken, so that a user may insist."""
        return self.problem in ("", "budget", "bytes", "latency", "unmeasured")

    def quality(self) -> dict[str, float]:
        """Return the figures worth a place in a table, by name.

        The task metric under its name; the least ``agreement`` and ``sqnr_db`` (absent
        if exact) over outputs. Where nothing else tells that all are equal, ``exact``.
        """
        found: dict[str, float] = {}
        if self.metric is not None:
            found[self.metric.name] = self.metric.after
        agreements = [m.agreement for m in self.outputs.values()]
        known = [a for a in agreements if a is not None]
        if known:
            found["agreement"] = min(known)
        noisy = [m.sqnr_db for m in self.outputs.values() if m.sqnr_db < math.inf]
        if noisy:
            found["sqnr_db"] = min(noisy)
        if not known and not noisy and any(not m.note for m in self.outputs.values()):
            found["exact"] = 1.0
        return found

    def to_json(self) -> dict[str, object]:
        """Return the verdict for a report; infinities become null."""
        return {
            "ok": self.ok,
            "reason": self.reason,
            "problem": self.problem,
            "outputs": {name: m.to_json() for name, m in self.outputs.items()},
            "metric": None if self.metric is None else self.metric.to_json(),
            "samples": self.samples,
            "smoke_test": self.smoke_test,
            "damage": self.damage if math.isfinite(self.damage) else None,
            "noise": self.noise if math.isfinite(self.noise) else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Read what ``to_json`` gave."""
        metric = data["metric"]
        if metric is not None:
            names = [f.name for f in dataclasses.fields(MetricChange)]
            metric = MetricChange(**{name: metric[name] for name in names})
        return cls(
            ok=bool(data["ok"]),
            reason=str(data["reason"]),
            problem=data["problem"],
            outputs={
                name: OutputMetrics.from_json(m) for name, m in data["outputs"].items()
            },
            metric=metric,
            samples=int(data["samples"]),
            smoke_test=bool(data["smoke_test"]),
            damage=math.inf if data["damage"] is None else float(data["damage"]),
            noise=math.inf if data["noise"] is None else float(data["noise"]),
        )


def judge(
    promise: Promise,
    outputs: Mapping[str, OutputMetrics],
    *,
    budget: Budget,
    bounds: Mapping[str, Bound] | None = None,
    moved: str = "",
    change: MetricChange | None = None,
    samples: int = 0,
    smoke_test: bool = False,
    before_bytes: int | None = None,
    after_bytes: int | None = None,
    latency_ratio: float | None = None,
) -> Verdict:
    """Hold what was measured against promise and budget.

    Args:
        promise: What the pass claims.
        outputs: How each output differs from the reference, by name.
        budget: The limits.
        bounds: What each output is held to; by default all to the budget's limits.
        moved: What ``moved`` says; it counts for ``Promise.SAME`` only.
        change: The task metric before and after, where there is one.
        samples: Samples that were compared.
        smoke_test: Whether they were random.
        before_bytes: Size of the file before the pass.
        after_bytes: Size after it.
        latency_ratio: Latency against the reference's, if it was measured.
    """
    noise = max(
        (amplitude(m.sqnr_db) for m in outputs.values() if not m.note), default=0.0
    )
    problem: Problem = ""
    reason = _broken_values(outputs)
    usage = 0.0
    if reason:
        problem, usage = "broken", math.inf
    elif promise is Promise.SAME:
        reason = moved
        if reason:
            problem, usage = "same", math.inf
    elif promise is Promise.CLOSE:
        usage, reason = budget.used(outputs, change, bounds)
        if reason:
            problem = "budget"
    silent = _uncompared(outputs) if change is None else ""
    if silent and not problem and promise is Promise.CLOSE:
        problem, reason, usage = "unmeasured", silent, math.inf
    if not problem and promise is not Promise.SIGNATURE:
        reason = grown(before_bytes, after_bytes)
        problem = "bytes" if reason else ""
    limit = budget.max_latency_ratio
    if not problem and limit is not None and latency_ratio is not None:
        if latency_ratio > limit:
            problem = "latency"
            reason = (
                f"latency is {latency_ratio:.2f} of the reference's, more than "
                f"{limit:.2f}"
            )
        usage = max(usage, latency_ratio / limit)
    return Verdict(
        ok=not problem,
        reason=reason or silent or "ok",
        problem=problem,
        outputs=outputs,
        metric=change,
        samples=samples,
        smoke_test=smoke_test,
        damage=_damage(usage, noise),
        noise=noise,
    )


def moved(
    differences: Mapping[str, Difference],
    seen: Mapping[str, Seen],
    own_noise: Callable[[], Mapping[str, tuple[float, float]]],
) -> str:
    """Return how outputs differ by more than float noise, or ``""``.

    Float noise is an error of at most 1e-4 of the output's largest value, and 60 dB
    (1e-2 and 36 dB for fp16). A deep or ill-conditioned model may do worse on its own:
    then ten times the difference between onnxruntime's optimised and plain run of it is
    allowed, up to 1e-2 and 40 dB. Integers, booleans and strings must be equal; 8-bit
    values may differ by one step in 1 %.

    Args:
        differences: The candidate's outputs against those of the model before the pass.
        seen: What is known of those outputs.
        own_noise: Returns (relative error, SQNR in dB) of each output of the model
            before the pass when it runs without optimisations; called where needed.
    """
    for name, difference in differences.items():
        known = seen[name]
        m = difference.result(known)
        if m.note and (not known.stable or m.note == EMPTY):
            continue
        if m.note:
            return f"promised the same outputs, but {name!r}: {m.note}"
        if m.reshaped:
            return f"promised the same outputs, but the shape of {name!r} differs"
        if known.dtype is None or not is_float(np.zeros(0, known.dtype)):
            equal = m.agreement is None or m.agreement == 1
            small = difference.far == 0 and (m.agreement or 0) >= 0.99
            if equal or (small and known.dtype is not None):
                continue
            return (
                f"promised the same outputs, but {1 - (m.agreement or 0):.2%} of "
                f"the values of {name!r} differ"
            )
        if difference.far:
            return (
                f"promised the same outputs, but {difference.far:,} values of "
                f"{name!r} are finite that were not"
            )
        half = known.dtype.itemsize == 2
        error, level = (1e-2, 36.0) if half else (1e-4, 60.0)
        if m.max_abs <= error * known.scale + 1e-12 and m.sqnr_db >= level:
            continue
        own_error, own_level = own_noise()[name]
        error = max(error, min(10 * own_error, 1e-2))
        level = min(level, max(own_level - 20, 36.0 if half else 40.0))
        if m.max_abs <= error * known.scale + 1e-12 and m.sqnr_db >= level:
            continue
        return (
            f"promised the same outputs, but {name!r} differs by up to "
            f"{m.max_abs:.3g} where its values reach {known.scale:.3g} "
            f"({m.sqnr_db:.1f} dB)"
        )
    return ""


def _uncompared(metrics: Mapping[str, OutputMetrics]) -> str:
    """Say why no output tells anything, or ``""`` if one does."""
    if not metrics or any(not m.note for m in metrics.values()):
        return ""
    why = "; ".join(f"{name!r} is {m.note}" for name, m in metrics.items())
    return f"nothing comparable was compared: {why}"


def _damage(usage: float, noise: float) -> float:
    """Return the share of the budget used, which the output noise moves by a hundredth.

    A metric counts samples and often stays the same; the noise tells candidates apart.
    What fits is at most 1, what does not is above.
    """
    if math.isinf(usage):
        return math.inf
    tail = 1.0 if math.isinf(noise) else noise / (1 + noise)
    return 0.99 * usage + 0.01 * tail if usage <= 1 else usage + 0.01 * tail


def _broken_values(metrics: Mapping[str, OutputMetrics]) -> str:
    for name, m in metrics.items():
        if m.nan or m.inf:
            what = f"{m.nan:,} NaN" if m.nan else f"{m.inf:,} infinite"
            return f"output {name!r} has {what} values that the reference has not"
    return ""
