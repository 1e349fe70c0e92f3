"""How one output is taught: as targets of a step, as a loss, and as a judgement.

What a teacher says of an output is one array for each part of its answer. There is one
part, ``""``, if the whole output is known. There are three, ``values``, ``indices`` and
``rest``, if only the largest scores are: see ``onnxshrink.training.teacher``.

Tested in tests/passes/test_distill.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.special import log_softmax, logsumexp

from onnxshrink.errors import UsageError
from onnxshrink.measuring.differences import Seen
from onnxshrink.training.augment import mixed
from onnxshrink.training.gradients import GradContext, Tensor
from onnxshrink.training.losses import (
    cosine,
    mse,
    soft_cross_entropy,
    top_cross_entropy,
)
from onnxshrink.training.teacher import SHARE_FLOOR, are_shares

__all__ = [
    "CosineHead",
    "Head",
    "How",
    "Rows",
    "SoftHead",
    "SquaredHead",
    "TopHead",
    "axis_of",
    "head_of",
    "head_of_largest",
]

Array = np.ndarray[Any, Any]
Rows = Mapping[str, Array]
How = Literal["auto", "soft", "mse", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Head(ABC):
    """How one output is taught.

    Attributes:
        output: Its name.
        classes: Number of class scores [samples, classes], or 0.
        parts: The arrays of a teacher's rows.
    """

    parts: ClassVar[tuple[str, ...]] = ("",)

    output: str
    classes: int = 0

    def target(self, part: str = "") -> str:
        """Return the name under which a step is fed with a part."""
        return f"{self.output}/teacher" + (f"/{part}" if part else "")

    def prepared(self, rows: Rows) -> dict[str, Array]:
        """Return a teacher's rows as the loss and the judgement take them."""
        return dict(rows)

    def scores(self, output: Array) -> Array:
        """Return the model's output as the judgement takes it."""
        return output

    def scores_of(self, ctx: GradContext, output: Tensor) -> Tensor:
        """Return the model's output as the loss takes it."""
        return output

    def mixed(self, rows: Rows, partner: Array, share: Array) -> dict[str, Array]:
        """Return the targets of mixed samples, from prepared rows.

        Args:
            rows: What the teacher says of each sample.
            partner: Which sample each is mixed with, int64 [samples].
            share: The share of the sample itself, float32 [samples].
        """
        return {part: mixed(array, partner, share) for part, array in rows.items()}

    def best(self, rows: Rows) -> Array:
        """Return the teacher's class for each sample, from prepared rows."""
        made: Array = rows[""].reshape(len(rows[""]), -1).argmax(axis=1)
        return made

    @abstractmethod
    def loss(
        self, ctx: GradContext, scores: Tensor, targets: Mapping[str, Tensor]
    ) -> Tensor:
        """Append the loss; ``targets`` are prepared rows by part."""

    @abstractmethod
    def distance(self, scores: Array, rows: Rows) -> float:
        """Return what the loss is, from float64 scores and prepared rows."""


@dataclass(frozen=True, kw_only=True)
class SquaredHead(Head):
    """By its squared error.

    Attributes:
        scale: What that is multiplied with: 1 / variance of the teacher.
    """

    scale: float = 1.0

    def loss(
        self, ctx: GradContext, scores: Tensor, targets: Mapping[str, Tensor]
    ) -> Tensor:
        """Append the loss."""
        return ctx.op("Mul", mse(ctx, scores, targets[""]), self.scale)

    def distance(self, scores: Array, rows: Rows) -> float:
        """Return what the loss is."""
        return float(np.square(scores - rows[""]).mean()) * self.scale


@dataclass(frozen=True, kw_only=True)
class CosineHead(Head):
    """By its direction along the last axis."""

    def loss(
        self, ctx: GradContext, scores: Tensor, targets: Mapping[str, Tensor]
    ) -> Tensor:
        """Append the loss."""
        return cosine(ctx, scores, targets[""])

    def distance(self, scores: Array, rows: Rows) -> float:
        """Return what the loss is."""
        want = rows[""].astype(np.float64)
        along = (scores * want).sum(-1)
        size = np.linalg.norm(scores, axis=-1) * np.linalg.norm(want, axis=-1)
        return float(1 - (along / np.maximum(size, 1e-12)).mean())


@dataclass(frozen=True, kw_only=True)
class _ScoresHead(Head):
    """By what a teacher thinks of the classes.

    Attributes:
        temperature: What scores are divided by before softmax.
        is_share: Whether the model's output is probabilities already.
    """

    temperature: float
    is_share: bool = False

    def scores(self, output: Array) -> Array:
        """Return logits."""
        return _logs(output) if self.is_share else output

    def scores_of(self, ctx: GradContext, output: Tensor) -> Tensor:
        """Return logits."""
        if not self.is_share:
            return output
        return ctx.op("Log", ctx.op("Max", output, ctx.scalar(SHARE_FLOOR, output)))


@dataclass(frozen=True, kw_only=True)
class SoftHead(_ScoresHead):
    """By soft targets along the class axis."""

    def prepared(self, rows: Rows) -> dict[str, Array]:
        """Return the teacher's logits."""
        return {"": _logs(rows[""]) if self.is_share else rows[""]}

    def mixed(self, rows: Rows, partner: Array, share: Array) -> dict[str, Array]:
        """Return scores whose softened distribution is the mixture of two."""
        scores = rows[""].astype(np.float64) / self.temperature
        logs = log_softmax(scores, axis=axis_of(scores.shape))
        part = share.astype(np.float64).reshape(-1, *[1] * (logs.ndim - 1))
        with np.errstate(divide="ignore"):
            two = np.logaddexp(np.log(part) + logs, np.log1p(-part) + logs[partner])
        return {"": (two * self.temperature).astype(np.float32)}

    def loss(
        self, ctx: GradContext, scores: Tensor, targets: Mapping[str, Tensor]
    ) -> Tensor:
        """Append the loss."""
        axis = axis_of(ctx.shape(scores))
        return soft_cross_entropy(ctx, scores, targets[""], self.temperature, axis)

    def distance(self, scores: Array, rows: Rows) -> float:
        """Return what the loss is."""
        want = rows[""].astype(np.float64)
        return _divergence(scores, want, self.temperature, axis_of(scores.shape))


@dataclass(frozen=True, kw_only=True)
class TopHead(_ScoresHead):
    """By soft targets of the largest scores and of all others together."""

    parts: ClassVar[tuple[str, ...]] = ("values", "indices", "rest")

    def best(self, rows: Rows) -> Array:
        """Return the class of the largest score."""
        made: Array = rows["indices"].reshape(len(rows["indices"]), -1)[:, 0]
        return made

    def loss(
        self, ctx: GradContext, scores: Tensor, targets: Mapping[str, Tensor]
    ) -> Tensor:
        """Append the loss."""
        values, indices, rest = (targets[part] for part in self.parts)
        return top_cross_entropy(ctx, scores, values, indices, rest, self.temperature)

    def distance(self, scores: Array, rows: Rows) -> float:
        """Return what the loss is."""
        indices = rows["indices"]
        others = scores.copy()
        np.put_along_axis(others, indices, -np.inf, -1)
        left = logsumexp(others, axis=-1, keepdims=True)
        mine = np.concatenate([np.take_along_axis(scores, indices, -1), left], -1)
        theirs = np.concatenate([rows["values"], rows["rest"][..., None]], -1)
        return _divergence(mine, theirs.astype(np.float64), self.temperature, -1)


def head_of(output: str, given: Array, how: How, temperature: float) -> Head:
    """Choose how an output is taught.

    Args:
        output: Its name.
        given: What the teacher gives for some samples, the first axis.
        how: ``auto`` takes soft targets where the output looks like class scores, else
            the squared error.
        temperature: That of soft targets.

    Raises:
        UsageError: The output has no axis of classes or of features, and needs one.
    """
    seen = Seen()
    seen.update(output, given, len(given))
    classes = seen.classes if seen.is_scores else 0
    if how == "auto":
        how = "soft" if seen.is_scores else "mse"
    if how != "mse" and given.ndim < 2:
        raise UsageError(
            f"loss={how} needs an output of rank 2 or more; {output!r} has {given.ndim}"
        )
    if how == "soft":
        return SoftHead(
            output=output,
            classes=classes,
            temperature=temperature,
            is_share=are_shares(given, axis_of(given.shape)),
        )
    if how == "cosine":
        return CosineHead(output=output, classes=classes)
    spread = float(given.astype(np.float64).var())
    scale = 1 / spread if spread > 1e-12 else 1.0
    return SquaredHead(output=output, classes=classes, scale=scale)


def head_of_largest(
    output: str, mine: Array, count: int, how: How, temperature: float
) -> Head:
    """Return how an output is taught if only the teacher's largest scores are known.

    Args:
        output: Its name.
        mine: What the model gives for some samples, [..., classes].
        count: How many scores are known.
        how: ``auto`` or ``soft``.
        temperature: That of soft targets.

    Raises:
        UsageError: Something else is asked for, or there are no more classes.
    """
    classes = mine.shape[-1]
    if how not in ("auto", "soft"):
        raise UsageError(
            f"loss={how} needs whole outputs, and of {output!r} only the teacher's "
            f"{count} largest scores are known"
        )
    if count >= classes:
        raise UsageError(
            f"{count} largest scores are known of {output!r}, which has {classes} "
            "classes"
        )
    return TopHead(
        output=output,
        classes=classes if mine.ndim == 2 else 0,
        temperature=temperature,
        is_share=are_shares(mine),
    )


def axis_of(shape: Sequence[int]) -> int:
    """Return the class axis: 1 of [samples, classes, 1, ...], else the last."""
    trailing = len(shape) > 2 and all(size == 1 for size in shape[2:])
    return 1 if trailing else len(shape) - 1


def _logs(shares: Array) -> Array:
    return np.log(np.maximum(shares, np.float32(SHARE_FLOOR))).astype(shares.dtype)


def _divergence(mine: Array, theirs: Array, temperature: float, axis: int) -> float:
    one, two = (log_softmax(a / temperature, axis=axis) for a in (mine, theirs))
    apart = (np.exp(two) * (two - one)).sum(axis=axis)
    return float(apart.mean()) * temperature**2
