"""The training loop: minibatches, a schedule, a rate, the best weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxshrink.base import Progress
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.training.step import TrainingStep

__all__ = ["Outcome", "Plan", "find_rate", "fit", "schedule"]

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]
Feed = Callable[[Array, np.random.Generator], Mapping[str, Array]]
"""Returns what a step is fed with, for positions of samples; the generator serves
augmentation."""
Judge = Callable[[Weights], float]
"""Returns how bad weights are on samples that are not trained on."""
Ending = Literal["", "early", "diverged", "interrupted"]

RATES = tuple(float(f"{r:.1e}") for r in np.geomspace(1e-4, 3.2e-2, 6))
"""Rates that ``find_rate`` tries: a factor of about three from one to the next."""
_PROBE = 60
_EXPLODED = 10.0
"""Times the loss at the start, or 1 where that is less, from which training is lost."""
_FALLING = 0.05
"""Share that the loss loses in the last fifth of the epochs if it is still falling."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to train.

    Attributes:
        epochs: Times that every sample is seen.
        batch: Samples of a step; samples that do not fill one are left out of an epoch.
        rate: Highest learning rate; ``None`` looks for one.
        rates: Rates to look among, ascending.
        warmup: Share of the steps in which the rate rises from zero.
        patience: Epochs without a better judgement after which training ends.
        seed: Seed of the order of samples and of augmentation.
    """

    epochs: int = 20
    batch: int = 64
    rate: float | None = None
    rates: tuple[float, ...] = RATES
    warmup: float = 0.05
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.epochs < 1:
            raise UsageError(f"epochs is at least 1, not {self.epochs}")
        if self.batch < 1:
            raise UsageError(f"batch is at least 1, not {self.batch}")
        if self.patience < 1:
            raise UsageError(f"patience is at least 1, not {self.patience}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share from 0 to below 1, not {self.warmup}")
        for rate in (self.rate, *self.rates):
            if rate is not None and not (rate > 0 and math.isfinite(rate)):
                raise UsageError(f"a learning rate is above 0, not {rate}")


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        weights: The best ones that were judged; those of the start if none was better.
        rate: The highest learning rate.
        start: Judgement of the weights before training.
        best: Judgement of ``weights``.
        best_epoch: After which epoch they were seen; 0 is the start.
        losses: Mean training loss of each epoch that was finished.
        judged: Judgement after each of them.
        ending: Why training ended before the last epoch, if it did.
        is_falling: Whether the loss was still falling at the end.
    """

    weights: dict[str, Array]
    rate: float
    start: float
    best: float
    best_epoch: int
    losses: tuple[float, ...]
    judged: tuple[float, ...]
    ending: Ending
    is_falling: bool


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the share of the highest rate at a step: a rise, then half a cosine.

    Loshchilov and Hutter, SGDR, ICLR 2017, equation 5, with one cycle.

    Args:
        step: Number of the step, from 0.
        total: Steps in all.
        warmup: Share of them in which the rate rises.
    """
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def fit(
    step: TrainingStep,
    feed: Feed,
    count: int,
    judge: Judge,
    plan: Plan,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and keep the weights that ``judge`` likes best.

    Ctrl-C ends training early: the current weights are judged once more, and the best
    so far are returned.

    Args:
        step: One step; its batch is ``plan.batch``.
        feed: Gives what it is fed with.
        count: Number of samples.
        judge: Called before training and after each epoch.
        plan: How to train.
        progress: Receives steps done, with the loss and the last judgement in words.

    Raises:
        UsageError: There are fewer samples than one batch takes.
        ModelError: A step cannot be run. A loss that is not finite is no error: the
            best weights are returned, with ``ending`` saying so.
    """
    if count < plan.batch:
        raise UsageError(f"{count} samples do not fill a batch of {plan.batch}")
    rate = plan.rate
    if rate is None:
        rate = find_rate(step, feed, count, plan, progress)
    random = np.random.default_rng(plan.seed)
    each = count // plan.batch
    total = each * plan.epochs
    best = start = judge(step.weights)
    kept, best_epoch = dict(step.weights), 0
    losses: list[float] = []
    judged: list[float] = []
    first: list[float] = []
    ending: Ending = ""

    def consider(epoch: int) -> None:
        nonlocal best, kept, best_epoch
        value = judge(step.weights)
        judged.append(value)
        # Whatever is finite is better than a start that is not.
        if value < best or (math.isnan(best) and not math.isnan(value)):
            best, kept, best_epoch = value, dict(step.weights), epoch

    try:
        for epoch in range(plan.epochs):
            seen: list[float] = []
            for positions in _batches(count, plan.batch, random):
                at = epoch * each + len(seen)
                loss = _try(
                    step,
                    feed(positions, random),
                    rate * schedule(at, total, plan.warmup),
                )
                first += [loss] if len(first) < 10 else []
                if not loss <= _EXPLODED * max(1.0, float(np.mean(first))):
                    ending = "diverged"
                    break
                seen.append(loss)
                if progress is not None:
                    shown = judged[-1] if judged else start
                    words = f"epoch {epoch + 1}, loss {loss:.4f}, held out {shown:.4f}"
                    progress(at + 1, total, words)
            if ending:
                break
            losses.append(float(np.mean(seen)))
            consider(epoch + 1)
            if len(judged) - best_epoch >= plan.patience:
                ending = "early" if epoch + 1 < plan.epochs else ""
                break
    except KeyboardInterrupt:
        ending = "interrupted"
        consider(len(losses) + 1)
    tail = max(1, plan.epochs // 5)
    falling = (
        not ending
        and len(losses) > tail
        and best_epoch > plan.epochs - tail
        and losses[-1] < (1 - _FALLING) * losses[-1 - tail]
        and losses[-1] > 1e-6
    )
    return Outcome(
        weights=kept,
        rate=rate,
        start=start,
        best=best,
        best_epoch=best_epoch,
        losses=tuple(losses),
        judged=tuple(judged),
        ending=ending,
        is_falling=falling,
    )


def find_rate(
    step: TrainingStep,
    feed: Feed,
    count: int,
    plan: Plan,
    progress: Progress | None = None,
) -> float:
    """Return the rate at which the loss falls furthest in a short run from the start.

    Each rate, from the lowest up, gets the same few batches with the schedule of a
    whole training; the mean loss of the last third decides. The step is afterwards as
    it was.

    Raises:
        UsageError: The loss is not finite at any rate.
    """
    length = max(6, min(_PROBE, count // plan.batch * plan.epochs // 10))
    before = dict(step.weights), dict(step.state), step.count
    found: dict[float, float] = {}
    for number, rate in enumerate(plan.rates):
        random = np.random.default_rng((plan.seed, 1))
        losses: list[float] = []
        try:
            for positions in _endless(count, plan.batch, random):
                share = schedule(len(losses), length, plan.warmup)
                loss = _try(step, feed(positions, random), rate * share)
                losses.append(loss)
                if not math.isfinite(loss) or len(losses) == length:
                    break
                if progress is not None:
                    done = number * length + len(losses)
                    words = f"learning rate {rate:g}, loss {loss:.4f}"
                    progress(done, len(plan.rates) * length, words)
        finally:
            step.weights, step.state = dict(before[0]), dict(before[1])
            step.count = before[2]
        result = float(np.mean(losses[-(-2 * length // 3) :] or [math.inf]))
        found[rate] = result if math.isfinite(losses[-1]) else math.inf
        if found[rate] > 2 * min(found.values()):
            break  # higher rates are worse still
    best = min(found, key=lambda rate: found[rate])
    if not math.isfinite(found[best]):
        raise UsageError(
            f"the loss is not finite at any learning rate from {plan.rates[0]:g} to "
            f"{plan.rates[-1]:g}; look for extreme values in the data or the weights, "
            "or set a lower lr"
        )
    return best


def _try(step: TrainingStep, given: Mapping[str, Array], rate: float) -> float:
    """Do a step; return NaN where the loss is not finite."""
    try:
        return step(given, rate)
    except ModelError as error:
        if str(error).startswith("the loss became"):
            return math.nan
        raise


def _batches(count: int, size: int, random: np.random.Generator) -> Iterator[Array]:
    order = random.permutation(count)
    for start in range(0, count - size + 1, size):
        yield np.sort(order[start : start + size])


def _endless(count: int, size: int, random: np.random.Generator) -> Iterator[Array]:
    while True:
        yield from _batches(count, size, random)
