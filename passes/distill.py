"""distill: train what is left of a model to answer as the original does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from onnxshrink import runtime, teacher
from onnxshrink._differences import Seen
from onnxshrink.base import Context, Pass, Promise
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.training import (
    Adam,
    AdamW,
    GradContext,
    Optimizer,
    Sgd,
    TrainingStep,
    cosine,
    cross_entropy,
    mse,
    soft_cross_entropy,
    weighted,
)
from onnxshrink.training.loop import RATES, Outcome, Plan, fit
from onnxshrink.training.trainable import (
    Scales,
    Trainable,
    attach,
    find_trainable,
    summary,
    write,
)

__all__ = ["Distill"]

Array = NDArray[Any]
Kind = Literal["soft", "mse", "cosine"]

_FLOOR = 1e-7
"""Least probability whose logarithm is taken."""
_LABELS = "labels/hard"
_HARD = 0.5
"""Share of labels in the loss unless alpha says otherwise."""


@dataclass(frozen=True)
class _Head:
    """How one output is taught.

    Attributes:
        output: Its name.
        kind: Which loss.
        classes: Number of class scores [samples, classes], or 0.
        is_probability: Whether scores are probabilities already.
        scale: What a squared error is multiplied with: 1 / variance of the teacher.
    """

    output: str
    kind: Kind
    classes: int = 0
    is_probability: bool = False
    scale: float = 1.0

    @property
    def target(self) -> str:
        return f"{self.output}/teacher"


@dataclass(frozen=True, kw_only=True)
class Distill(Pass):
    """Train the weights so that the model answers as it did before it was shrunk.

    The teacher is the model that the run started from, or a file of answers. Class
    scores are taught as soft targets (Hinton, Vinyals and Dean 2015): the divergence
    from the teacher's softmax at a temperature T, times T squared. Other outputs of
    float32 are taught by their squared error, in units of the teacher's variance. Where
    samples have labels, these take part.

    What the graph says is kept: zeros of a pruned weight stay zero, equal values of a
    weight with few stay equal (Han, Mao and Dally 2016), a weight used twice stays one,
    statistics of BatchNormalization stay. Weights stored as codes of 2 to 16 bits are
    trained through the rounding and written as codes again (quantization-aware
    training), within the range of the codes they have. Scales of quantization can be
    learned (LSQ: Esser et al. 2020); an int32 bias follows those it is made of.

    It needs ``--data``: training samples for the gradients, validation samples to
    choose the learning rate's best epoch. The weights of the best epoch are kept, which
    may be those of the start. Ctrl-C ends training and keeps the best so far.

    Attributes:
        teacher: File of a teacher's answers to the same data, from ``onnxshrink
            teacher``, instead of the model the run started from.
        temperature: T of the soft targets; higher tells more of the wrong classes.
        alpha: Share of the labels in the loss: 0 needs none, 1 is plain training. By
            default 0.5 where labels fit, else 0.
        loss: How outputs are taught: ``auto``, ``soft`` for scores along the last axis,
            ``mse``, or ``cosine`` for directions along the last axis.
        epochs: Times that every training sample is seen.
        lr: Highest learning rate; by default short runs look for one.
        batch: Samples in a step.
        optimizer: ``adamw``, ``adam``, or ``sgd`` with momentum 0.9.
        weight_decay: How strongly weights are pulled to zero.
        clip: Largest norm of all gradients together; 0 does not clip.
        shift: Most pixels that images [samples, channels, height, width] are moved by,
            anew in each step; the teacher sees the same image, except from a file.
        scales: Whether scales of quantization are learned: ``auto`` those of weights
            of 16 levels or fewer, ``fixed`` none, ``learned`` those of activations too.
        ties: Whether equal values of a matrix or kernel of at most 256 distinct ones
            stay equal.
        only: Train only these weights: names of weights or nodes, glob patterns or op
            types.
        skip: Leave these weights alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "distill"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "distill:epochs=20,temperature=4"
    repairs: ClassVar[bool] = True

    teacher: Path | None = None
    temperature: float = 4.0
    alpha: float | None = None
    loss: Literal["auto", "soft", "mse", "cosine"] = "auto"
    epochs: int = 20
    lr: float | None = None
    batch: int = 64
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    shift: int = 0
    scales: Scales = "auto"
    ties: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 < self.temperature < 1e4:
            raise UsageError(f"temperature is above 0, not {self.temperature}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is a share from 0 to 1, not {self.alpha}")
        if self.teacher is not None and self.alpha == 1:
            raise UsageError("alpha=1 asks no teacher; leave one of the two out")
        if not 0 <= self.clip < float("inf"):
            raise UsageError(f"clip is at least 0, not {self.clip}")
        if not 0 <= self.shift <= 1024:
            raise UsageError(f"shift is a number of pixels from 0 on, not {self.shift}")
        self._optimizer()
        Plan(epochs=self.epochs, batch=self.batch, rate=self.lr)

    def _optimizer(self) -> Optimizer:
        kinds: dict[str, Callable[..., Optimizer]] = {
            "adamw": AdamW,
            "adam": Adam,
            "sgd": Sgd,
        }
        return kinds[self.optimizer](weight_decay=self.weight_decay)

    def apply(self, model: Model, ctx: Context) -> None:
        """Train, and set the weights to the best that were seen.

        Raises:
            UsageError: There are no samples to train on, no weights to train, or the
                options do not fit the data.
            ModelError: An operator has no gradient, or a sample holds NaN.
        """
        training = ctx.samples.training
        if ctx.samples.random or training is None or not training.used:
            has = "only random" if ctx.samples.random else "too few"
            raise UsageError(
                f"{self.name} needs samples to train on, and there are {has} ones; "
                "give more with --data"
            )
        with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
            run = _Run(self, model, ctx, training, Path(folder))
            outcome, judge = run.train()
        self._report(model, ctx, run, outcome, judge)

    def _report(
        self, model: Model, ctx: Context, run: _Run, outcome: Outcome, judge: _Judge
    ) -> None:
        where, notes = "training", list(run.notes)
        if outcome.ending == "diverged":
            notes.append(
                f"went wrong after {len(outcome.losses)} epochs at a learning rate of "
                f"{outcome.rate:g}: set lr to a third of that, or a lower clip"
            )
        if outcome.ending == "interrupted":
            notes.append(f"interrupted after {len(outcome.losses)} epochs")
        if outcome.is_falling:
            notes.append(
                "the loss was still falling at the end: more epochs may do better "
                f"(epochs={2 * self.epochs})"
            )
        changed = 0
        if outcome.best_epoch:
            changed = write(model, run.chosen, outcome.weights)
        before, after = judge.words(outcome.start), judge.words(outcome.best)
        if not changed:
            why = f"no epoch was better than the start, {before}, lr {outcome.rate:g}"
            for words in [why, *notes]:
                ctx.skipped(where, words)
            return
        special = summary(run.chosen)
        special = f" ({special})" if special else ""
        ctx.did(
            where,
            f"trained {changed} weights{special}; best in epoch "
            f"{outcome.best_epoch} of {self.epochs}, lr {outcome.rate:g}: "
            f"{before} -> {after}",
        )
        for words in notes:
            ctx.did(where, words)


class _Run:
    """One training: what is taught, by whom, on which samples."""

    def __init__(
        self,
        options: Distill,
        model: Model,
        ctx: Context,
        training: Samples,
        folder: Path,
    ) -> None:
        self.options, self.model, self.ctx = options, model, ctx
        self.training, self.folder = training, folder
        self.notes: list[str] = []
        self.held = ctx.samples.validation
        if self.held is None or not self.held.used:
            self.held = training
            self.notes.append(
                "there are too few samples to hold some out, so the best epoch is "
                "chosen on the training samples"
            )
        self.labels: Array | None = None
        self.recorded: teacher.Recorded | None = None
        self.file_names: dict[str, str] = {}
        self.heads = self._heads()
        names = [head.output for head in self.heads]
        self.chosen: list[Trainable] = find_trainable(
            model,
            names,
            options.only,
            options.skip,
            ctx.skipped,
            scales=options.scales,
            ties=options.ties,
        )
        if not self.chosen:
            why = f": {ctx.left[0][0]}: {ctx.left[0][1]}" if ctx.left else ""
            picked = (
                " that only and skip choose" if options.only or options.skip else ""
            )
            raise UsageError(f"the model has no weight to train{picked}{why}")
        self.alpha = self._alpha()

    # --- what is taught -----------------------------------------------------------

    def _heads(self) -> list[_Head]:
        options, ctx = self.options, self.ctx
        names = teacher._float_outputs(self.model)
        if options.teacher is not None:
            self.recorded = teacher.read(options.teacher)
            known = list(self.recorded.outputs)
            shared = [name for name in names if name in known]
            self.file_names = {name: name for name in shared}
            if not shared and len(names) == len(known) == 1:
                shared = names
                self.file_names = {names[0]: known[0]}
            if not shared:
                raise UsageError(
                    f"{options.teacher} has {', '.join(known)}, and none of that is an "
                    f"output of the model, which has {', '.join(names) or 'none'}"
                )
            names = shared
            note = self.recorded.check(self.training)
            if self.held is not self.training and self.held is not None:
                self.recorded.check(self.held)
            if note:
                self.notes.append(f"{options.teacher} is taken on trust: {note}")
        few = self.training.take(slice(0, 64 // (self.training.batch or 1) or 1))
        if self.training.batch and not self.training.whole:
            few = self.training.take(slice(0, self.training.batch))
        mine = teacher.answers(self.model, few, names, threads=ctx.threads)
        given = self._ask(few, names)
        heads = []
        for name in names:
            if mine[name].dtype != np.float32:
                self.notes.append(
                    f"output {name!r} is {mine[name].dtype}; float32 is taught"
                )
                continue
            if mine[name].shape != given[name].shape:
                raise UsageError(
                    f"output {name!r} is {list(mine[name].shape[1:])} for a sample and "
                    f"the teacher's is {list(given[name].shape[1:])}"
                )
            heads.append(self._head(name, given[name]))
        if not heads:
            raise UsageError("the model has no output of float32 that could be taught")
        return heads

    def _ask(self, samples: Samples, names: Sequence[str]) -> dict[str, Array]:
        """Return the teacher's answers to samples, float32."""
        if self.recorded is not None:
            return {
                name: self.recorded.rows(self.file_names[name], samples)
                for name in names
            }
        return teacher.answers(
            self.ctx.reference,
            samples,
            names,
            folder=self.folder,
            dtype=np.float32,
            threads=self.ctx.threads,
            providers=self.ctx.providers,
            progress=self.ctx.progress,
        )

    def _head(self, name: str, given: Array) -> _Head:
        flat = given.reshape(-1, *given.shape[2:]) if self.training.whole else given
        seen = Seen()
        seen.update(name, flat, len(flat))
        kind: Kind = "mse"
        if self.options.loss != "auto":
            kind = self.options.loss
        elif seen.is_scores:
            kind = "soft"
        if kind != "mse" and flat.ndim < 2:
            raise UsageError(
                f"loss={kind} needs an output of rank 2 or more; {name!r} has "
                f"{flat.ndim}"
            )
        # [samples, classes, 1, 1] has its classes on axis 1, else they come last.
        probability = bool(
            kind == "soft"
            and flat.min() >= 0
            and np.allclose(flat.sum(axis=_axis(flat.shape, kind)), 1, atol=1e-3)
        )
        scale = 1.0
        if kind == "mse":
            spread = float(flat.astype(np.float64).var())
            scale = 1 / spread if spread > 1e-12 else 1.0
        return _Head(
            name, kind, seen.classes if seen.is_scores else 0, probability, scale
        )

    def _alpha(self) -> float:
        """Return the share of the labels; read them if there is one."""
        options = self.options
        if options.alpha == 0:
            return 0.0
        labels = self.training.labels
        why = ""
        head = self._labelled
        if labels is None:
            why = "the samples have no labels"
        elif self.training.whole or head is None:
            why = "no output is class scores"
        elif labels.size != len(labels) or not np.array_equal(labels, np.rint(labels)):
            why = "labels are not one whole number for each sample"
        elif labels.min() < 0 or labels.max() >= head.classes:
            why = (
                f"labels go from {labels.min()} to {labels.max()}, and {head.output!r}"
            )
            why += f" has {head.classes} classes"
        if why or labels is None:
            if options.alpha is not None:
                raise UsageError(f"alpha={options.alpha:g} needs labels: {why}")
            if labels is not None:
                self.notes.append(f"labels take no part: {why}")
            return 0.0
        self.labels = labels.reshape(-1).astype(np.int64)
        return _HARD if options.alpha is None else options.alpha

    @property
    def _labelled(self) -> _Head | None:
        found = [h for h in self.heads if h.classes and h.kind == "soft"]
        return found[0] if found else None

    # --- training -----------------------------------------------------------------

    def train(self) -> tuple[Outcome, _Judge]:
        """Train with batches as large as memory allows."""
        size = min(self.options.batch, len(self.training))
        if self.training.batch:
            size = self.training.batch
        assert self.held is not None
        soft = self.alpha < 1
        outputs = [head.output for head in self.heads]
        moving = self.options.shift > 0 and self.recorded is None and soft
        own = self.held is self.training
        wanted: dict[str, Array] = {}
        if soft and (own or not moving):
            wanted = self._ask(self.training, outputs)
        held = wanted if own else self._ask(self.held, outputs)
        judge = _Judge(self, self.held, held)
        live = runtime.session(self.ctx.reference, threads=self.ctx.threads)
        feed = _Feed(self, wanted, live if moving else None)
        while True:
            try:
                step = self._step(size, feed)
                sgd = self.options.optimizer == "sgd"
                plan = Plan(
                    epochs=self.options.epochs,
                    batch=size,
                    rate=self.options.lr,
                    rates=tuple(10 * r for r in RATES) if sgd else RATES,
                    seed=self.ctx.seed,
                )
                count = len(self.training) // size * size
                count = len(self.training) if count else 0
                return fit(step, feed, count, judge, plan, self.ctx.progress), judge
            except ModelError as error:
                fixed = self.training.batch is not None or size == 1
                if fixed or "more memory than there is" not in str(error):
                    raise
                size //= 2
                self.notes.append(f"memory is short: batches of {size} instead")

    def _step(self, size: int, feed: _Feed) -> TrainingStep:
        work = self.model.copy()
        attach(work, self.chosen)
        random = np.random.default_rng(0)
        first = feed(np.arange(size), random)
        targets = {
            name: (value.dtype, value.shape)
            for name, value in first.items()
            if name == _LABELS or name in {head.target for head in self.heads}
        }
        shapes = {name: a.shape for name, a in first.items() if name not in targets}
        return TrainingStep(
            work,
            shapes,
            [one.name for one in self.chosen],
            self._loss,
            targets=targets,
            optimizer=self.options._optimizer(),
            clip=self.options.clip or None,
            threads=self.ctx.threads,
        )

    def _loss(self, ctx: GradContext, values: Mapping[str, Any]) -> Any:
        parts = []
        logits: dict[str, Any] = {}
        for head in self.heads:
            output = values[head.output]
            if head.is_probability:
                floor = ctx.scalar(_FLOOR, output)
                output = ctx.op("Log", ctx.op("Max", output, floor))
            logits[head.output] = output
            if self.alpha == 1:
                continue
            wanted = values[head.target]
            if head.kind == "soft":
                axis = _axis(ctx.shape(output), head.kind)
                part = soft_cross_entropy(
                    ctx, output, wanted, self.options.temperature, axis
                )
                parts.append((1 - self.alpha, part))
            elif head.kind == "cosine":
                parts.append((1 - self.alpha, cosine(ctx, output, wanted)))
            else:
                parts.append(((1 - self.alpha) * head.scale, mse(ctx, output, wanted)))
        head_ = self._labelled
        if self.alpha > 0 and head_ is not None:
            scores = logits[head_.output]
            shape = ctx.shape(scores)
            if len(shape) > 2:
                scores = ctx.reshape(scores, shape[:2])
            parts.append((self.alpha, cross_entropy(ctx, scores, values[_LABELS])))
        return weighted(ctx, *parts)

    def as_target(self, head: _Head, rows: Array) -> Array:
        """Return the teacher's answers as the loss takes them: logits, not shares."""
        if not head.is_probability:
            return rows
        return np.log(np.maximum(rows, np.float32(_FLOOR))).astype(np.float32)


class _Feed:
    """What a training step is fed with."""

    def __init__(
        self, run: _Run, wanted: Mapping[str, Array], live: runtime.Session | None
    ) -> None:
        self._run, self._wanted, self._live = run, wanted, live

    def __call__(
        self, positions: Array, random: np.random.Generator
    ) -> dict[str, Array]:
        run = self._run
        given = dict(run.training.read(positions))
        if run.options.shift:
            given = _shifted(given, run.options.shift, random)
        made = dict(given)
        if run.alpha < 1:
            names = [head.output for head in run.heads]
            live = self._live
            rows = (
                live.run(given, names)
                if live is not None
                else {name: self._wanted[name][positions] for name in names}
            )
            for head in run.heads:
                found = np.asarray(rows[head.output], np.float32)
                if run.training.whole and live is None:
                    found = found[0]
                made[head.target] = run.as_target(head, found)
        if run.labels is not None:
            made[_LABELS] = run.labels[positions]
        return made


class _Judge:
    """The loss of weights on samples that are held out."""

    def __init__(
        self, run: _Run, samples: Samples, wanted: Mapping[str, Array]
    ) -> None:
        self._run, self._samples, self._wanted = run, samples, wanted
        labels = samples.labels if run.labels is not None else None
        self._labels = None if labels is None else labels.reshape(-1).astype(np.int64)
        self._seen: dict[float, str] = {}

    def words(self, value: float) -> str:
        """Return a judgement in words."""
        return self._seen.get(value, f"held-out loss {value:.4f}")

    def __call__(self, weights: Mapping[str, Array]) -> float:
        """Return the loss; NaN if the model gives NaN."""
        run = self._run
        model = run.model.copy()
        write(model, run.chosen, weights)
        names = [head.output for head in run.heads]
        try:
            given = teacher.answers(
                model,
                self._samples,
                names,
                folder=None,
                threads=run.ctx.threads,
                providers=run.ctx.providers,
            )
        except ModelError as error:
            if "not finite" in str(error):
                return float("nan")
            raise
        total, words = 0.0, ""
        for head in run.heads:
            out = run.as_target(head, given[head.output]).astype(np.float64)
            want = run.as_target(head, self._wanted[head.output]).astype(np.float64)
            if self._samples.whole:
                out, want = (a.reshape(-1, *a.shape[2:]) for a in (out, want))
            total += (1 - run.alpha) * self._distance(head, out, want)
            if head.classes and not words:
                one, two = (a.reshape(len(a), -1).argmax(1) for a in (out, want))
                words = f", agreement {(one == two).mean():.2%}"
        label = run._labelled
        if self._labels is not None and label is not None:
            out = run.as_target(label, given[label.output]).astype(np.float64)
            out = out.reshape(len(out), -1)
            rows = np.arange(len(out))
            total -= run.alpha * float(
                log_softmax(out, axis=1)[rows, self._labels].mean()
            )
            words += f", top1 {(out.argmax(1) == self._labels).mean():.2%}"
        self._seen[total] = f"held-out loss {total:.4g}{words}"
        return total

    def _distance(self, head: _Head, out: Array, want: Array) -> float:
        if head.kind == "mse":
            return float(np.square(out - want).mean()) * head.scale
        if head.kind == "cosine":
            along = (out * want).sum(-1)
            size = np.linalg.norm(out, axis=-1) * np.linalg.norm(want, axis=-1)
            return float(1 - (along / np.maximum(size, 1e-12)).mean())
        heat = self._run.options.temperature
        axis = _axis(out.shape, head.kind)
        mine, theirs = (log_softmax(a / heat, axis=axis) for a in (out, want))
        apart = (np.exp(theirs) * (theirs - mine)).sum(axis=axis)
        return float(apart.mean()) * heat**2


def _axis(shape: Sequence[int], kind: Kind) -> int:
    """Return the class axis: 1 of [samples, classes, 1, ...], else the last."""
    trailing = len(shape) > 2 and all(size == 1 for size in shape[2:])
    return 1 if kind == "soft" and trailing else len(shape) - 1


def _shifted(
    feed: Mapping[str, Array], most: int, random: np.random.Generator
) -> dict[str, Array]:
    """Move every image by some pixels; its border is repeated.

    Raises:
        UsageError: No input is images.
    """
    images = [k for k, v in feed.items() if v.ndim == 4 and v.dtype.kind == "f"]
    if not images:
        raise UsageError(
            "shift moves images, float [samples, channels, height, width], and no "
            "input is that"
        )
    made = dict(feed)
    for name in images:
        batch = feed[name]
        count, _, height, width = batch.shape
        down = random.integers(-most, most + 1, (count, 1))
        right = random.integers(-most, most + 1, (count, 1))
        rows, columns = down + np.arange(height), right + np.arange(width)
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
        made[name] = np.ascontiguousarray(
            batch[
                np.arange(count)[:, None, None],
                :,
                rows[:, :, None],
                columns[:, None, :],
            ].transpose(0, 3, 1, 2)
        )
    return made
