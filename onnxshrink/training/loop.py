"""The training loop: minibatches, a schedule, a rate, the best weights kept."""

from __future__ import annotations

import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxshrink.base import Progress
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.files import replacing
from onnxshrink.training.step import TrainingStep

__all__ = ["Checkpoint", "Outcome", "Plan", "find_rate", "fit", "schedule"]

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
STATE_FORMAT = 2
"""Grows whenever numbers in the kept state change their meaning. In 2, Adam's moments
are divided by one minus their decay."""
_PROBE = 60
_EXPLODED = 10.0
"""Training is lost at a loss of this many times that of its first ten steps (or 1, if
that is less)."""
_FALLING = 0.05
"""The loss is still falling if it lost this share in the last fifth of the epochs."""


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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a training keeps its state, so that one that was killed goes on.

    Attributes:
        path: A file; it is replaced at once or not at all.
        key: Says which training it is; state of another is ignored.
        seconds: How much work may be lost: at most this and one step.
    """

    path: Path
    key: str
    seconds: float = 20.0


@dataclass
class _TrainingProgress:
    """All that a training has come to, besides the step's own weights and state.

    Attributes:
        random: Draws the order of samples and augmentation.
        rate: The highest learning rate.
        start: Judgement of the weights before training.
        best: Judgement of ``kept``.
        kept: The best weights.
        best_epoch: After which epoch they were seen.
        epoch: Epochs finished.
        order: Positions of samples in the epoch under way; empty before it.
        seen: Loss of each step of the epoch under way.
        first: Loss of the first ten steps.
        losses: Mean loss of each epoch finished.
        judged: Judgement after each of them.
    """

    random: np.random.Generator
    rate: float
    start: float
    best: float
    kept: dict[str, Array]
    best_epoch: int = 0
    epoch: int = 0
    order: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    seen: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """The loss from which training is lost; looser while little was seen."""
        if not self.first:
            return sys.float_info.max
        times = _EXPLODED if len(self.first) == 10 else _EXPLODED**2
        return times * max(1.0, float(np.mean(self.first)))

    def consider(self, value: float, weights: Weights, epoch: int) -> None:
        """Keep the weights if they are judged better than the best so far."""
        self.judged.append(value)
        # Whatever is finite is better than a start that is not.
        if value < self.best or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.kept, self.best_epoch = value, dict(weights), epoch

    def is_stale(self, plan: Plan) -> bool:
        """Whether patience is at an end."""
        return len(self.judged) - self.best_epoch >= plan.patience

    def is_falling(self, plan: Plan) -> bool:
        """Whether the loss was still falling in the last of the epochs."""
        tail = max(1, plan.epochs // 5)
        losses = self.losses
        return (
            len(losses) > tail
            and self.best_epoch > plan.epochs - tail
            and losses[-1] < (1 - _FALLING) * losses[-1 - tail]
            and losses[-1] > 1e-6
        )


def fit(
    step: TrainingStep,
    feed: Feed,
    count: int,
    judge: Judge,
    plan: Plan,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
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
        checkpoint: Where the state is kept; if there is some of this training, it goes
            on there and ends with the same bits as if it had not been interrupted.

    Raises:
        UsageError: There are fewer samples than one batch takes.
        ModelError: A step cannot be run. A loss that is not finite is no error: the
            best weights are returned, with ``ending`` saying so.
        OutputError: The state cannot be written.
    """
    if count < plan.batch:
        raise UsageError(f"{count} samples do not fill a batch of {plan.batch}")
    keeper = None if checkpoint is None else _Keeper(checkpoint, step, plan, count)
    state = None if keeper is None else keeper.load()
    if state is None:
        rate = plan.rate
        if rate is None:
            rate = find_rate(step, feed, count, plan, progress)
        start = judge(step.weights)
        random = np.random.default_rng(plan.seed)
        state = _TrainingProgress(random, rate, start, start, dict(step.weights))
        if keeper is not None:
            keeper.save_if_due(state)
    ending: Ending = ""
    try:
        while state.epoch < plan.epochs and not state.is_stale(plan):
            if not _epoch(step, feed, count, plan, state, progress, keeper):
                ending = "diverged"
                break
            state.losses.append(float(np.mean(state.seen)))
            state.epoch += 1
            state.order, state.seen = np.zeros(0, np.int64), []
            state.consider(judge(step.weights), step.weights, state.epoch)
            if keeper is not None:
                keeper.save_if_due(state)
        if not ending and state.epoch < plan.epochs:
            ending = "early"
    except KeyboardInterrupt:
        ending = "interrupted"
        state.consider(judge(step.weights), step.weights, state.epoch + 1)
    return Outcome(
        weights=state.kept,
        rate=state.rate,
        start=state.start,
        best=state.best,
        best_epoch=state.best_epoch,
        losses=tuple(state.losses),
        judged=tuple(state.judged),
        ending=ending,
        is_falling=not ending and state.is_falling(plan),
    )


def _epoch(
    step: TrainingStep,
    feed: Feed,
    count: int,
    plan: Plan,
    state: _TrainingProgress,
    progress: Progress | None,
    keeper: _Keeper | None,
) -> bool:
    """Do what is left of an epoch; return whether the loss stayed sound."""
    each = count // plan.batch
    total = each * plan.epochs
    if not len(state.order):
        state.order = state.random.permutation(count)
    for positions in list(_batches(state.order, plan.batch))[len(state.seen) :]:
        at = state.epoch * each + len(state.seen)
        rate = state.rate * schedule(at, total, plan.warmup)
        loss = _try(step, feed(positions, state.random), rate)
        if not loss <= state.limit:
            return False
        state.first += [loss] if len(state.first) < 10 else []
        state.seen.append(loss)
        if progress is not None:
            shown = state.judged[-1] if state.judged else state.start
            words = f"epoch {state.epoch + 1}, loss {loss:.4f}, held out {shown:.4f}"
            progress(at + 1, total, words)
        if keeper is not None and len(state.seen) < each:
            keeper.save_if_due(state)
    return True


class _Keeper:
    """Writes the state of a training to a file now and then, and reads it."""

    def __init__(
        self, checkpoint: Checkpoint, step: TrainingStep, plan: Plan, count: int
    ) -> None:
        self._checkpoint, self._step = checkpoint, step
        self._key = f"{STATE_FORMAT} {checkpoint.key} {plan} {count}"
        self._saved = time.monotonic()

    def save_if_due(self, state: _TrainingProgress) -> None:
        """Write the state if the last time is long enough ago.

        Raises:
            OutputError: It cannot be written.
        """
        if time.monotonic() - self._saved < self._checkpoint.seconds:
            return
        step, path = self._step, self._checkpoint.path
        facts = {
            **{name: getattr(state, name) for name in _FACTS},
            "key": self._key,
            "count": step.count,
            "random": state.random.bit_generator.state,
        }
        arrays = {"facts": np.asarray(json.dumps(facts)), "order": state.order}
        for group, named in (
            ("weight", step.weights),
            ("state", step.state),
            ("kept", state.kept),
        ):
            arrays.update({f"{group}/{name}": array for name, array in named.items()})
        with replacing(path, what="cannot keep the state of training in") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self._saved = time.monotonic()

    def load(self) -> _TrainingProgress | None:
        """Put the step where it was and return the state; ``None`` if there is none."""
        step = self._step
        try:
            with (
                self._checkpoint.path.open("rb") as raw,
                np.load(raw, allow_pickle=False) as file,
            ):
                facts = json.loads(str(file["facts"]))
                if facts.pop("key") != self._key:
                    return None
                weights, slots, kept = (
                    {name: _like(file[f"{group}/{name}"], now) for name, now in of}
                    for group, of in (
                        ("weight", step.weights.items()),
                        ("state", step.state.items()),
                        ("kept", step.weights.items()),
                    )
                )
                random = np.random.default_rng()
                random.bit_generator.state = facts.pop("random")
                count = int(facts.pop("count"))
                state = _TrainingProgress(
                    random, kept=kept, order=file["order"], **facts
                )
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            zipfile.BadZipFile,
        ):
            return None  # none, or not ours: training starts from the beginning
        step.weights, step.state, step.count = weights, slots, count
        return state


_FACTS = (
    "rate",
    "start",
    "best",
    "best_epoch",
    "epoch",
    "seen",
    "first",
    "losses",
    "judged",
)


def _like(array: Array, other: Array) -> Array:
    if array.shape != other.shape or array.dtype != other.dtype:
        raise ValueError("another shape or dtype")
    return array


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


def _batches(order: Array, size: int) -> Iterator[Array]:
    for start in range(0, len(order) - size + 1, size):
        yield np.sort(order[start : start + size])


def _endless(count: int, size: int, random: np.random.Generator) -> Iterator[Array]:
    while True:
        yield from _batches(random.permutation(count), size)
