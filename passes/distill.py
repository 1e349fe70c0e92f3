"""distill: train what is left of a model to answer as the original does."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from onnxshrink import runtime
from onnxshrink._version import __version__
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Pass, Promise
from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.files import scratch_prefix
from onnxshrink.lineage import Origin
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.training import (
    Adam,
    AdamW,
    GradContext,
    Optimizer,
    Sgd,
    TrainingStep,
    augment,
    cross_entropy,
    teacher,
    weighted,
)
from onnxshrink.training.answers import (
    FileTeacher,
    Lookup,
    ModelTeacher,
    values_of,
)
from onnxshrink.training.heads import (
    Head,
    How,
    SoftHead,
    TopHead,
    head_of,
    head_of_largest,
)
from onnxshrink.training.loop import RATES, Checkpoint, Outcome, Plan, fit
from onnxshrink.training.norms import (
    Norms,
    estimate,
    find_norms,
    fold_norms,
    use_batch_statistics,
)
from onnxshrink.training.step import value_bytes
from onnxshrink.training.trainable import (
    Scales,
    Trainable,
    attach,
    find_trainable,
    summary,
    write,
)
from onnxshrink.training.transfer import AUTO, Link, Pair, blocks, link, pairs
from onnxshrink.training.widening import narrowed, widened

__all__ = ["Distill"]

Array = NDArray[Any]

_LABELS = "labels/hard"
_HARD = 0.5
"""Share of the labels in the loss, unless ``alpha`` is given."""
_BATCH = 64
"""Samples in a step, unless ``batch`` is given or memory is short."""
_STEP_BYTES = 4 << 30
"""A batch is halved while a step's values are estimated to take more bytes."""
_CACHED = 2 << 30
"""Bytes of a teacher's answers up to which they are computed in advance."""

_SHORT = "more memory than there is"
"""What ``runtime`` says where memory is short."""


@dataclass(frozen=True, kw_only=True)
class Distill(Pass):
    """Train the weights so that the model answers as it did before it was shrunk.

    The teacher is the model that the run started from, or a file of answers. Class
    scores are taught as soft targets (Hinton, Vinyals and Dean 2015): the loss is the
    divergence from the teacher's softmax at a temperature T, times T squared. Other
    outputs of float32 are taught by their squared error, in units of the teacher's
    variance. Labels take part if the samples have them. With ``match``, tensors inside
    of the model are taught too (hints: Romero et al. 2015; attention: Zagoruyko and
    Komodakis 2017).

    Training keeps what the graph says. Zeros of a pruned weight stay zero. A weight of
    few distinct values keeps them: entries that are equal stay equal (Han, Mao and
    Dally 2016). A weight that is used twice stays one weight. A weight stored as codes
    of 2 to 16 bits is trained through the rounding and written as codes again, in the
    range of its old codes (quantization-aware training). Scales of quantization can be
    learned (LSQ: Esser et al. 2020). The int32 bias of a layer follows the scales that
    it is made of.

    It needs ``--data``: training samples for the gradients, validation samples to
    choose the best epoch. The weights of that epoch are kept; those of the start, if
    none was better. Ctrl-C ends training and keeps the best so far. A run that was
    killed goes on with ``--resume`` where it was.

    In Python, a subclass may override ``augment``.

    Attributes:
        teacher: File of a teacher's answers to the same data, from ``onnxshrink
            teacher``, instead of the model the run started from.
        temperature: T of the soft targets; higher tells more of the wrong classes.
        alpha: Share of the labels in the loss: 0 needs none, 1 is plain training. By
            default 0.5 where labels fit, else 0.
        loss: How outputs are taught: ``auto``, ``soft`` for scores along the last axis,
            ``mse``, or ``cosine`` for directions along the last axis.
        outputs: Outputs that are taught, names or glob patterns; by default all of
            float32 whose first axis counts samples.
        match: Tensors inside that are to be alike: two names, ``student:teacher``, or
            one name, of a tensor that is taught what it was in the teacher. ``:mse``
            (the default), ``:cosine`` or ``:attention`` may follow, and ``:weight``.
            ``auto`` takes ends of blocks that both have. Repeat it for more.
        match_weight: Weight in the loss of pairs that state none.
        epochs: Times that every training sample is seen.
        lr: Highest learning rate; by default short runs look for one.
        batch: Samples in a step; by default 64, fewer where these would need more than
            4 GB. What does not fit into memory is halved.
        optimizer: ``adamw``, ``adam`` or ``sgd``.
        momentum: That of ``sgd``.
        weight_decay: How strongly weights are pulled to zero.
        clip: Largest norm of all gradients together; 0 does not clip.
        shift: Most pixels that images [samples, channels, height, width] are moved by,
            anew in each step; borders are repeated. The teacher sees what the model
            sees, except from a file.
        crop: The same with zeros beyond the border.
        flip: Mirror half of the images, left to right.
        mixup: Mix pairs of samples, with shares from a Beta distribution of this
            parameter, and their labels (Zhang et al. 2018); 0 does not.
        scales: Whether scales of quantization are learned: ``auto`` those of weights
            of 16 levels or fewer, ``fixed`` none, ``learned`` those of activations too.
        norms: What happens to each BatchNormalization: ``freeze`` keeps mean and
            variance, ``fold`` moves it into the layer in front of it, ``estimate``
            trains with the statistics of each batch, and then takes those of 2,048
            training samples (Wu and Johnson 2021).
        ties: Whether equal values of a matrix or kernel of at most 256 distinct ones
            stay equal.
        reassign: Whether an entry of such a weight may change to another of its
            values, if it has no more than 64.
        only: Train only these weights: names of weights or nodes, glob patterns or op
            types.
        skip: Leave these weights alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "distill"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "distill:epochs=20,temperature=4"
    repairs: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    teacher: Path | None = None
    temperature: float = 4.0
    alpha: float | None = None
    loss: How = "auto"
    outputs: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    match_weight: float = 1.0
    epochs: int = 20
    lr: float | None = None
    batch: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float = 1.0
    shift: int = 0
    crop: int = 0
    flip: bool = False
    mixup: float = 0.0
    scales: Scales = "auto"
    norms: Norms = "freeze"
    ties: bool = True
    reassign: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 < self.temperature < 1e4:
            raise UsageError(f"temperature is above 0, not {self.temperature}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is a share from 0 to 1, not {self.alpha}")
        if self.teacher is not None and self.alpha == 1 and not self.match:
            raise UsageError("alpha=1 asks no teacher; leave one of the two out")
        if not 0 < self.match_weight < float("inf"):
            raise UsageError(f"match_weight is above 0, not {self.match_weight}")
        if not 0 <= self.clip < float("inf"):
            raise UsageError(f"clip is at least 0, not {self.clip}")
        for name, pixels in (("shift", self.shift), ("crop", self.crop)):
            if not 0 <= pixels <= 1024:
                raise UsageError(
                    f"{name} is a number of pixels from 0 on, not {pixels}"
                )
        if not 0 <= self.mixup < 100:
            raise UsageError(f"mixup is from 0 to 100, not {self.mixup}")
        self._optimizer()
        Plan(epochs=self.epochs, batch=self._size, rate=self.lr)

    @property
    def _size(self) -> int:
        return _BATCH if self.batch is None else self.batch

    def _optimizer(self) -> Optimizer:
        kinds: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam": Adam}
        if self.optimizer == "sgd":
            return Sgd(weight_decay=self.weight_decay, momentum=self.momentum)
        return kinds[self.optimizer](weight_decay=self.weight_decay)

    def augment(
        self, feed: Mapping[str, Array], random: np.random.Generator
    ) -> dict[str, Array]:
        """Return changed samples for one step; a subclass may do something else.

        Args:
            feed: Arrays by input name, the first axis samples; they stay as they are.
            random: Where random numbers come from.

        Returns:
            Arrays of the same names, shapes and dtypes.

        Raises:
            UsageError: An option asks for images, and no input is that.
        """
        made = dict(feed)
        if self.shift:
            made = augment.shift(made, self.shift, random)
        if self.crop:
            made = augment.crop(made, self.crop, random)
        if self.flip:
            made = augment.flip(made, random)
        return made

    @property
    def _is_augmenting(self) -> bool:
        own = type(self).augment is not Distill.augment
        return own or bool(self.shift or self.crop or self.flip or self.mixup)

    def answers(
        self, model: Model, samples: Samples, ctx: Context
    ) -> Mapping[str, Array] | None:
        """Return what the teacher's file says of these samples, if it has them."""
        if self.teacher is None or samples.whole:
            return None
        file = FileTeacher(self.teacher, model, ctx)
        try:
            file.check(samples)
        except UsageError:  # samples of their own, --eval, that no teacher answered
            return None
        names = [
            n for n, theirs in file.shared.items() if theirs in file.recorded.outputs
        ]
        return {name: rows[""] for name, rows in file.ask(samples, names).items()}

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
        if self.norms == "fold":
            count = fold_norms(model, ctx.skipped)
            if count:
                ctx.did("norms", f"folded {count} into the layers in front of them")
        with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as folder:
            run = _Training(self, model, ctx, training, Path(folder))
            outcome, judge = run.train()
        self._report(model, ctx, run, outcome, judge)

    def _report(
        self,
        model: Model,
        ctx: Context,
        run: _Training,
        outcome: Outcome,
        judge: _Judge,
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
            changed = run.write_back(model, outcome.weights)
        start = {one.name: one.start for one in run.chosen}
        before = judge.words(outcome.start, start)
        after = judge.words(outcome.best, outcome.weights)
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


class _Training:
    """One training: what is taught, by whom, on which samples."""

    def __init__(
        self,
        options: Distill,
        model: Model,
        ctx: Context,
        training: Samples,
        folder: Path,
    ) -> None:
        self.options, self.ctx = options, ctx
        self.model = widened(model)
        self.is_wide = self.model is not model
        self.notes: list[str] = []
        held = ctx.samples.validation
        if training.varied:
            every, training = len(training), training.commonest()
            held = None if held is None else held.commonest()
            self.notes.append(
                "a training step takes one shape: it learns from the "
                f"{len(training):,} of {every:,} samples that have the commonest one"
            )
        self.training = training
        if held is None or not held.used:
            held = training
            self.notes.append(
                "there are too few samples to hold some out, so the best epoch is "
                "chosen on the training samples"
            )
        self.held = held
        few = training.batch if training.batch and not training.whole else _BATCH
        self.few = training.take(slice(0, few))
        self.labels: Array | None = None
        self.teacher: FileTeacher | ModelTeacher
        if options.teacher is None:
            self.teacher = ModelTeacher(ctx, folder)
        else:
            self.teacher = FileTeacher(options.teacher, model, ctx)
            self.teacher.check(held, training)
        self.heads = self._heads()
        self.links = self._links()
        self.alpha = self._alpha()
        self._check_augmentation()
        labelled = self._labelled
        taught = self.heads if self.alpha < 1 or labelled is None else [labelled]
        self.chosen: list[Trainable] = find_trainable(
            self.model,
            [head.output for head in taught],
            options.only,
            options.skip,
            ctx.skipped,
            scales=options.scales,
            ties=options.ties,
            reassign=options.reassign,
            shapes={
                name: value.shape
                for name, value in training.read(np.arange(training.batch or 1)).items()
            },
        )
        self.norms: list[str] = []
        if options.norms == "estimate":
            self.norms = find_norms(self.model, options.only, options.skip, ctx.skipped)
        if not self.chosen:
            why = f": {ctx.skips[0][0]}: {ctx.skips[0][1]}" if ctx.skips else ""
            picked = (
                " that only and skip choose" if options.only or options.skip else ""
            )
            raise UsageError(f"the model has no weight to train{picked}{why}")
        self.notes += self.teacher.notes

    # --- what is taught -----------------------------------------------------------

    def _heads(self) -> list[Head]:
        source = self.teacher
        names = self._taught()
        if isinstance(source, FileTeacher):
            names = [name for name in names if name in source.shared]
            if not names:
                raise UsageError(
                    "the teacher's file has no answer for "
                    f"{', '.join(self.options.outputs) or 'any output'}"
                )
        mine = teacher.answers(self.model, self.few, names, threads=self.ctx.threads)
        if isinstance(source, FileTeacher):
            source.classes = {n: a.shape[-1] for n, a in mine.items() if a.ndim > 1}
        given = source.ask(self.few, names)
        heads = []
        for name in names:
            if mine[name].dtype != np.float32:
                self.notes.append(
                    f"output {name!r} is {mine[name].dtype}; float32 is taught"
                )
                continue
            is_top = "values" in given[name]
            shape, theirs = (
                mine[name].shape,
                given[name]["rest" if is_top else ""].shape,
            )
            if (shape[:-1] if is_top else shape) != theirs:
                raise UsageError(
                    f"output {name!r} is {list(shape[1:])} for a sample and the "
                    f"teacher's is {list(theirs[1:])}"
                    + (" and its largest scores" if is_top else "")
                )
            how, heat = self.options.loss, self.options.temperature
            if is_top:
                top = given[name]["values"].shape[-1]
                heads.append(head_of_largest(name, mine[name], top, how, heat))
                continue
            rows = given[name][""]
            if self.training.whole:
                rows = rows.reshape(-1, *rows.shape[2:])
            heads.append(head_of(name, rows, how, heat))
        if not heads:
            raise UsageError("the model has no output of float32 that could be taught")
        return heads

    def _taught(self) -> list[str]:
        """Return the outputs that can be taught; say why others are left out.

        Raises:
            UsageError: There is none, or one that was asked for is not there.
        """
        wanted = self.options.outputs
        known = [info.name for info in self.model.outputs]
        for pattern in wanted:
            if not fnmatch.filter(known, pattern):
                raise UsageError(
                    f"outputs: the model has no output {pattern!r}; it has "
                    f"{', '.join(known)}.{nearest(pattern, known)}"
                )
        asked = [
            name
            for name in known
            if not wanted or any(fnmatch.fnmatchcase(name, one) for one in wanted)
        ]
        unfit = teacher.uncounted(self.model, self.few, asked, threads=self.ctx.threads)
        for name, why in unfit.items():
            self.ctx.skipped(name, f"it is not taught: {why}")
        names = [name for name in asked if name not in unfit]
        if not names:
            whys = "; ".join(f"{name!r}: {why}" for name, why in unfit.items())
            raise UsageError(f"the model has no output that could be taught: {whys}")
        return names

    def _links(self) -> list[Link]:
        options = self.options
        if not options.match:
            return []
        if self.training.whole:
            raise UsageError("match needs inputs whose first axis counts the samples")
        mine, theirs = values_of(self.model), self.teacher.values
        named = [text for text in options.match if text != AUTO]
        origins = self._origins(mine, theirs)
        try:
            found = pairs(named, mine, theirs, options.match_weight, origins)
        except UsageError as error:
            if options.teacher is None:
                raise
            raise UsageError(
                f"{error} A file has what onnxshrink teacher --tensor NAME keeps"
            ) from error
        chosen: list[str] = []
        if AUTO in options.match:
            chosen = blocks(self.model, origins)
            if not chosen:
                raise UsageError(
                    "match=auto finds no ends of blocks that the model and its teacher "
                    "both have; name pairs with match=student:teacher"
                )
            weight = options.match_weight
            found += [
                Pair(name, origins[name].name, weight=weight, origin=origins[name])
                for name in chosen
            ]
        one = teacher.answers(
            self.model,
            self.few,
            list(dict.fromkeys(pair.student for pair in found)),
            threads=self.ctx.threads,
        )
        two = self.teacher.ask(
            self.few, list(dict.fromkeys(pair.teacher for pair in found))
        )
        links: list[Link] = []
        for pair in found:
            ours = one[pair.student]
            if ours.dtype != np.float32:
                raise UsageError(
                    f"match: {pair.student!r} is {ours.dtype}, not float32"
                )
            try:
                wanted = pair.wanted(two[pair.teacher][""])
                links.append(link(pair, len(links), ours, wanted))
            except UsageError as error:
                if pair.student not in chosen:
                    raise
                self.ctx.skipped(pair.student, f"match=auto: {error}")
        if chosen:
            taken = [name for name in chosen if name in {o.pair.student for o in links}]
            self.notes.append(f"match=auto: {', '.join(taken) or 'nothing fits'}")
        return links

    def _origins(self, mine: Sequence[str], theirs: Sequence[str]) -> dict[str, Origin]:
        """Return what values of the model are in the teacher, as far as it is known.

        A teacher that is the model the run started from is known by lineage, another
        one by names.
        """
        known = set(theirs)
        found = {}
        for name in mine:
            origin: Origin | None = Origin(name)
            if self.teacher.is_reference:
                origin = self.model.lineage.origin(name)
            if origin is not None and not origin.is_part and origin.name in known:
                found[name] = origin
        return found

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
        elif not _are_whole(labels):
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
    def _labelled(self) -> Head | None:
        soft = (SoftHead, TopHead)
        found = [h for h in self.heads if h.classes and isinstance(h, soft)]
        return found[0] if found else None

    def _check_augmentation(self) -> None:
        options = self.options
        if options.mixup and self.training.whole:
            raise UsageError("mixup needs inputs whose first axis counts the samples")
        if options.teacher is None or not options._is_augmenting:
            return
        if self.links:
            raise UsageError(
                "match compares with tensors that a file holds of the samples as they "
                "are; leave shift, crop, flip and mixup out, or teacher"
            )
        tops = [head.output for head in self.heads if isinstance(head, TopHead)]
        if options.mixup and tops:
            raise UsageError(
                f"mixup mixes whole answers, and {options.teacher} has only the "
                f"largest scores of {tops[0]!r}"
            )

    # --- training -----------------------------------------------------------------

    def train(self) -> tuple[Outcome, _Judge]:
        """Train with batches as large as memory allows."""
        outputs = [head.output for head in self.heads]
        judge = _Judge(self, self.held, self.teacher.lookup(self.held, outputs))
        feed = _Feed(self, self._lookup())
        first = size = self._batch()
        while True:
            try:
                outcome = self._fit(size, feed, judge)
            except (ModelError, MemoryError) as error:
                fixed = self.training.batch is not None or size == 1
                short = isinstance(error, MemoryError) or _SHORT in str(error)
                if fixed or not short:
                    raise
                size //= 2
            else:
                if size < first:
                    self.notes.append(f"memory was short: batches of {size} instead")
                return outcome, judge

    def _lookup(self) -> Lookup:
        """Return where a step's batch finds the teacher's answers."""
        names = [head.output for head in self.heads] if self.alpha < 1 else []
        names += [one.pair.teacher for one in self.links]
        names = list(dict.fromkeys(names))
        if not names:
            return lambda positions, feed: {}
        source = self.teacher
        if isinstance(source, ModelTeacher):
            few = source.ask(self.few, names)
            size = sum(a.nbytes for rows in few.values() for a in rows.values())
            is_large = size // len(self.few) * len(self.training) > _CACHED
            if self.options._is_augmenting or is_large:
                return source.live(self.training, names)
        return source.lookup(self.training, names)

    def _batch(self) -> int:
        """Return how many samples a step takes at first."""
        if self.training.batch:
            return self.training.batch
        size = min(self.options._size, len(self.training))
        if self.options.batch is not None:
            return size
        one = self.training.read(np.arange(size))
        shapes = {name: array.shape for name, array in one.items()}
        # Values of the forward run are kept until the backward run has used them, and
        # gradients come on top.
        each = 2 * value_bytes(self.model, shapes) / size
        while size > 1 and size * each > _STEP_BYTES:
            size //= 2
        if size < min(_BATCH, len(self.training)):
            self.notes.append(f"a step would be large: batches of {size}")
        return size

    def _fit(self, size: int, feed: _Feed, judge: _Judge) -> Outcome:
        options, ctx = self.options, self.ctx
        rates = RATES
        if options.optimizer == "sgd":
            rates = tuple(10 * rate for rate in RATES)
        plan = Plan(
            epochs=options.epochs,
            batch=size,
            rate=options.lr,
            rates=rates,
            seed=ctx.seed,
        )
        count = len(self.training) // size * size
        count = len(self.training) if count else 0
        kept = None
        if ctx.folder is not None:
            kept = Checkpoint(path=ctx.folder / "training.npz", key=self._key)
        step = self._step(size, feed)
        return fit(step, feed, count, judge, plan, ctx.progress, kept)

    @functools.cached_property
    def _key(self) -> str:
        """What must be equal for a training to go on where a killed one was."""
        options, ctx = self.options, self.ctx
        file = options.teacher.stat() if options.teacher is not None else None
        facts = [
            __version__,
            type(options).__qualname__,
            options,
            file and (file.st_size, file.st_mtime_ns),
            (ctx.seed, ctx.threads, ctx.providers),
            (self.heads, self.links),
            [(type(one).__qualname__, one.name) for one in self.chosen],
        ]
        code = hashlib.sha256(repr(facts).encode())
        code.update(fingerprint(ctx.reference).encode())
        for samples in (self.training, self.held):
            code.update(teacher.checksums(samples).tobytes())
        arrays = [array for one in self.chosen for array in (one.start, one.keep)]
        for array in (*arrays, self.labels):
            code.update(b"-" if array is None else np.ascontiguousarray(array).data)
        return code.hexdigest()

    def write(self, model: Model, weights: Mapping[str, Array]) -> int:
        """Write what was trained; return how many weights it changed."""
        changed = write(model, self.chosen, weights)
        if changed:  # the start is judged as it is
            estimate(model, self.norms, self.training, self.ctx)
        return changed

    def write_back(self, model: Model, weights: Mapping[str, Array]) -> int:
        """Write what was trained into the model itself, in the types it has."""
        if not self.is_wide:
            return self.write(model, weights)
        trained = self.model.copy()
        self.write(trained, weights)
        return narrowed(model, self.model, trained)

    def _step(self, size: int, feed: _Feed) -> TrainingStep:
        work = self.model.copy()
        attach(work, self.chosen)
        use_batch_statistics(work, self.norms)
        learned = [n for one in self.links for n in one.attach(work, self.ctx.seed)]
        first = feed(np.arange(size), np.random.default_rng(0))
        inputs = self.training.names
        return TrainingStep(
            work,
            {name: array.shape for name, array in first.items() if name in inputs},
            [*(one.name for one in self.chosen), *learned],
            self._loss,
            targets={
                name: (array.dtype, array.shape)
                for name, array in first.items()
                if name not in inputs
            },
            optimizer=self.options._optimizer(),
            clip=self.options.clip or None,
            threads=self.ctx.threads,
        )

    def _loss(self, ctx: GradContext, values: Mapping[str, Any]) -> Any:
        parts = []
        scores: dict[str, Any] = {}
        for head in self.heads:
            scores[head.output] = head.scores_of(ctx, values[head.output])
            if self.alpha < 1:
                wanted = {part: values[head.target(part)] for part in head.parts}
                part = head.loss(ctx, scores[head.output], wanted)
                parts.append((1 - self.alpha, part))
        labelled = self._labelled
        if self.alpha > 0 and labelled is not None:
            logits = scores[labelled.output]
            shape = ctx.shape(logits)
            if len(shape) > 2:
                logits = ctx.reshape(logits, shape[:2])
            parts.append((self.alpha, cross_entropy(ctx, logits, values[_LABELS])))
        parts += [(one.pair.weight, one.loss(ctx, values)) for one in self.links]
        return weighted(ctx, *parts)


def _are_whole(labels: Array) -> bool:
    """Whether labels are one whole number for each sample."""
    if labels.size != len(labels) or labels.dtype.kind not in "iubf":
        return False
    return bool(np.array_equal(labels, np.rint(labels)))


class _Feed:
    """What a training step is fed with."""

    def __init__(self, run: _Training, lookup: Lookup) -> None:
        self._run, self._lookup = run, lookup

    def __call__(
        self, positions: Array, random: np.random.Generator
    ) -> dict[str, Array]:
        run = self._run
        options = run.options
        given = options.augment(run.training.read(positions), random)
        mixing: tuple[Array, Array] | None = None
        if options.mixup:
            given, partner, share = augment.mixup(given, options.mixup, random)
            mixing = partner, share
        made = dict(given)
        answers = self._lookup(positions, given)
        if run.training.whole:
            answers = {
                name: {part: array[0] for part, array in rows.items()}
                for name, rows in answers.items()
            }
        for head in run.heads if run.alpha < 1 else ():
            rows = head.prepared(answers[head.output])
            if mixing and options.teacher is not None:
                rows = head.mixed(rows, *mixing)
            made.update((head.target(part), array) for part, array in rows.items())
        for one in run.links:
            made[one.target] = one.pair.wanted(answers[one.pair.teacher][""])
        if run.labels is not None and run._labelled is not None:
            made[_LABELS] = labels = run.labels[positions]
            if mixing:
                sure = np.eye(run._labelled.classes, dtype=np.float32)[labels]
                made[_LABELS] = augment.mixed(sure, *mixing)
        return made


class _Judge:
    """The loss of weights on samples that are held out."""

    def __init__(self, run: _Training, samples: Samples, lookup: Lookup) -> None:
        self._run, self._samples, self._lookup = run, samples, lookup
        labels = samples.labels if run.labels is not None else None
        self._labels = None if labels is None else labels.reshape(-1).astype(np.int64)
        self._seen: dict[float, str] = {}

    def words(self, value: float, weights: Mapping[str, Array]) -> str:
        """Return a judgement of weights in words."""
        if value not in self._seen and np.isfinite(value):
            self(weights)  # by the part of the training before it was killed
        return self._seen.get(value, f"held-out loss {value:.4f}")

    def __call__(self, weights: Mapping[str, Array]) -> float:
        """Return the loss; NaN if the model gives NaN."""
        run, samples = self._run, self._samples
        model = run.model.copy()
        run.write(model, weights)
        session = runtime.session(
            model, threads=run.ctx.threads, providers=run.ctx.providers
        )
        names = [head.output for head in run.heads]
        label = run._labelled
        total, agreed, right, count = 0.0, 0.0, 0, 0
        for start, stop in samples.spans(_BATCH):
            positions = np.arange(start, stop)
            feed = samples.read(positions)
            outputs = session.run(feed, names)
            answers = self._lookup(positions, feed)
            size = stop - start
            count += size
            for number, head in enumerate(run.heads):
                if not np.isfinite(outputs[head.output]).all():
                    return float("nan")
                out = head.scores(outputs[head.output]).astype(np.float64)
                rows = head.prepared(answers[head.output])
                if samples.whole:
                    rows = {part: array[0] for part, array in rows.items()}
                total += (1 - run.alpha) * head.distance(out, rows) * size
                guess = out.reshape(len(out), -1)
                if number == 0 and head.classes:
                    same = guess.argmax(axis=1) == head.best(rows)
                    agreed += float(same.mean()) * size
                if self._labels is not None and head is label:
                    wanted = self._labels[positions]
                    logs = log_softmax(guess, axis=1)[np.arange(size), wanted]
                    total -= run.alpha * float(logs.sum())
                    right += int((guess.argmax(axis=1) == wanted).sum())
        loss = total / count
        words = f"held-out loss {loss:.4g}"
        if run.heads[0].classes:
            words += f", agreement {agreed / count:.2%}"
        if self._labels is not None:
            words += f", top1 {right / count:.2%}"
        self._seen[loss] = words
        return loss
