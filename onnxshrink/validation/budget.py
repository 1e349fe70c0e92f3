"""Budgets: what a model may lose, and how much of that is used up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxshrink.errors import UsageError, nearest
from onnxshrink.measuring.differences import OutputMetrics
from onnxshrink.samples import Splits
from onnxshrink.validation.metrics import MetricChange

__all__ = ["Bound", "Budget", "amplitude", "grown"]

DEFAULT_DROP = 1.0
DEFAULT_AGREEMENT = 0.98
DEFAULT_SQNR = 20.0
DEFAULT_PERPLEXITY = 0.05
"""Most that perplexity may rise, as a share of the reference's."""
SMOKE_AGREEMENT = 0.9
"""Least agreement of integers, booleans and strings on random inputs."""

_GROWTH = 4096
_GROWTH_SHARE = 0.01
"""A file may grow by this much, for metadata and nodes of tiny models."""


@dataclass(frozen=True)
class Bound:
    """What one output is held to; ``None`` does not limit.

    Attributes:
        agreement: Least share of rows with the same top class, or of equal values.
        sqnr: Least signal-to-noise ratio, dB.
    """

    agreement: float | None = None
    sqnr: float | None = None


@dataclass(frozen=True)
class Budget:
    """What a pass may cost; ``None`` does not limit.

    Attributes:
        max_drop: Most the task metric may get worse, in its own unit: ``top1`` is in
            percent, so 0.1 is a tenth of a point.
        min_agreement: Least share of samples (0 to 1) whose top class stays, and of
            values that stay in outputs of integers, booleans and strings.
        min_sqnr: Least signal to quantization noise ratio of every float output, dB.
        max_latency_ratio: Most the latency may be of the reference's.
        max_bytes: Most bytes that all that is written may take; a pass that divides
            bytes among layers does so with this, and no larger file is written.
        automatic: Whether it was chosen for the user; what the samples cannot measure
            is left out then.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None
    max_latency_ratio: float | None = None
    max_bytes: int | None = None
    automatic: bool = False

    def __post_init__(self) -> None:
        """Refuse limits that cannot be meant."""
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise UsageError(f"--max-drop is at least 0, not {self.max_drop}")
        agreement = self.min_agreement
        if agreement is not None and not 0 <= agreement <= 1:
            hint = f"; did you mean {agreement / 100}?" if 1 < agreement <= 100 else ""
            raise UsageError(
                f"--min-agreement is a share from 0 to 1, not {agreement}{hint}"
            )
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise UsageError(f"--min-sqnr is a number of dB, not {self.min_sqnr}")
        ratio = self.max_latency_ratio
        if ratio is not None and not 0 < ratio < math.inf:
            raise UsageError(f"a latency ratio is more than 0, not {ratio}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UsageError(f"--max-bytes is at least 1, not {self.max_bytes}")

    @classmethod
    def of(cls, limits: Mapping[str, Any]) -> Budget:
        """Return the budget of a mapping, as in ``{"max_drop": 0.5}``.

        Raises:
            UsageError: A name or value is none of a budget.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.name != "automatic"]
        values: dict[str, Any] = {}
        for name, value in limits.items():
            name = "max_latency_ratio" if name == "max_latency" else name
            if name not in known:
                raise UsageError(
                    f"a budget has no {name!r}.{nearest(name, known)} It has "
                    f"{', '.join(known)}"
                )
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise UsageError(f"{name} is a number, not {value!r}")
            values[name] = value
        return cls(**values)

    @classmethod
    def default(cls, splits: Splits) -> Budget:
        """Return the budget for users who give none.

        With labels, one point of a metric in percent. Of every output that the metric
        does not read and that is no state: 98 % of top classes unchanged where it is
        class scores, 98 % of values equal where it is integers, booleans or strings,
        else 20 dB. Of a language model, which has logits and token ids, perplexity may
        rise by 5 %, and logits are bounded by that. On random inputs only integers,
        booleans and strings are bounded, by 90 %.
        """
        if splits.random:
            return cls(automatic=True)
        return cls(
            max_drop=DEFAULT_DROP if splits.labelled else None,
            min_agreement=DEFAULT_AGREEMENT,
            min_sqnr=DEFAULT_SQNR,
            automatic=True,
        )

    def to_json(self) -> dict[str, object]:
        """Return the limits for a report."""
        return dataclasses.asdict(self)

    def used(
        self,
        outputs: Mapping[str, OutputMetrics],
        change: MetricChange | None,
        bounds: Mapping[str, Bound] | None = None,
    ) -> tuple[float, str]:
        """Return the share of the budget that is used up, and what goes beyond it.

        Args:
            outputs: How each output differs from the reference, by name; one with a
                note does not count.
            change: The task metric before and after, where there is one.
            bounds: What each output is held to; by default all to the limits here.

        Returns:
            The largest share over all limits, and words for that limit; the words are
            empty where the share is at most 1.
        """
        worst, reason = 0.0, ""

        def use(share: float, words: str) -> None:
            nonlocal worst, reason
            if share > max(1.0, worst):
                reason = words
            worst = max(worst, share)

        if self.max_drop is not None and change is not None:
            # 100 - 99.9 is a little more than 0.1 in floating point.
            allowed = self.max_drop + 1e-9 * max(1.0, abs(change.before))
            use(
                _share(change.drop, allowed),
                f"{change.name} went from {change.before:.6g} to {change.after:.6g}, "
                f"{change.drop:.3g} worse where {self.max_drop:g} is allowed",
            )
        every = Bound(self.min_agreement, self.min_sqnr)
        for name, m in outputs.items():
            bound = every if bounds is None else bounds.get(name, Bound())
            if m.note:
                continue
            if bound.agreement is not None and m.agreement is not None:
                use(
                    _share(1 - m.agreement, 1 - bound.agreement + 1e-12),
                    f"agreement of {name!r} is {m.agreement:.4f}, less than "
                    f"{bound.agreement:g}",
                )
            if bound.sqnr is not None:
                use(
                    amplitude(m.sqnr_db) / amplitude(bound.sqnr),
                    f"SQNR of {name!r} is {m.sqnr_db:.1f} dB, less than {bound.sqnr:g}",
                )
        return worst, reason


def amplitude(sqnr_db: float) -> float:
    """Return the noise-to-signal amplitude ratio of an SQNR in dB."""
    if math.isinf(sqnr_db):
        return 0.0 if sqnr_db > 0 else math.inf
    return float(10 ** min(-sqnr_db / 20, 300))


def _share(used: float, allowed: float) -> float:
    if used <= 0:
        return 0.0
    return used / allowed if allowed > 0 else math.inf


def grown(before: int | None, after: int | None) -> str:
    """Return how much a file grew, if by more than metadata and nodes take."""
    if before is None or after is None:
        return ""
    if after <= before + max(_GROWTH, before * _GROWTH_SHARE):
        return ""
    return f"the file grew from {before:,} to {after:,} bytes"
