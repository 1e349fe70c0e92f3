"""Validation: a candidate against the model the run started from, on samples.

A pass never judges itself. Here its promise and the user's budget are held against what
onnxruntime says on evaluation samples that no pass has seen. Reference outputs are
computed once; candidates are compared batch by batch, so that memory does not grow with
the number of samples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxshrink import runtime
from onnxshrink.base import Progress, Promise
from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.isolation.host import SessionHost
from onnxshrink.measuring.differences import (
    Difference,
    Seen,
    Store,
    is_float,
    plain,
)
from onnxshrink.model import ValueInfo
from onnxshrink.samples import Samples, Splits
from onnxshrink.samples.columns import Array
from onnxshrink.validation.budget import (
    DEFAULT_AGREEMENT,
    DEFAULT_PERPLEXITY,
    DEFAULT_SQNR,
    SMOKE_AGREEMENT,
    Bound,
    Budget,
)
from onnxshrink.validation.kinds import Kinds, kinds_of
from onnxshrink.validation.metrics import (
    BUILT_IN,
    TOKENS,
    Custom,
    Metric,
    MetricChange,
    NextToken,
    Perplexity,
    Spearman,
    Squared,
    Task,
    Top,
    imported,
)
from onnxshrink.validation.signature import (
    Source,
    check_form,
    signature_of,
    signature_problem,
)
from onnxshrink.validation.tokens import Tokens, may_be_tokens, tokens_of
from onnxshrink.validation.verdict import Problem, Verdict, judge, moved

__all__ = ["Validator"]

_BATCH_BYTES = 8 << 20
_GUESSED = 0.5
"""Share of the vocabulary from which perplexity is near that of blind guesses."""
_BATCH = 32
"""Larger batches were no faster for any of the models tried."""


@dataclass
class _Reference:
    """A model's outputs on the samples, and what they are like."""

    source: Source
    store: Store
    seen: dict[str, Seen]
    spans: list[tuple[int, int]]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    kinds: Kinds = field(default_factory=Kinds)
    tokens: Tokens | None = None
    task: Task | None = None
    before: float = 0.0
    noise: dict[str, tuple[float, float]] | None = None


class Validator:
    """Holds candidates to their promise and to the budget.

    The reference runs at the first check, once.
    """

    def __init__(
        self,
        reference: Source,
        splits: Splits,
        budget: Budget | None = None,
        *,
        metric: Metric = None,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        batch_size: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        answers: Mapping[str, Array] | None = None,
        timed_against: Source | None = None,
        outputs: Sequence[str] = (),
        host: SessionHost | None = None,
    ) -> None:
        """Set up the judge; nothing runs yet.

        Args:
            reference: The model the run started from.
            splits: Only ``evaluation`` is used.
            budget: The user's limits; ``None`` is ``Budget.default``.
            metric: ``top1``, ``top5``, ``mse``, ``spearman``, ``module:function`` or
                ``file.py:function`` called as ``f(outputs, labels)`` with all outputs
                by name, or such a callable. Bigger is better unless the function has
                a true attribute ``lower_is_better``. ``next-token`` (positions whose
                most likely token stays, in percent) and ``perplexity`` read token ids
                and logits, and need no labels. ``None`` takes ``top1`` where labels and
                an output fit, ``perplexity`` where logits and token ids do.
            threads: onnxruntime's threads.
            providers: onnxruntime's execution providers.
            batch_size: Samples in a run; by default as many as have at most 8 MB of
                inputs and of outputs, at most 32.
            seed: Kept for the report; nothing is drawn here.
            progress: Receives progress.
            answers: What outputs should be, by name, the first axis evaluation samples;
                by default what the reference gives. Other outputs do not count then.
            timed_against: What the latency is a multiple of; by default the reference.
            outputs: Names or glob patterns of the outputs that budgets bound; by
                default all but state that goes into the next run.
            host: Where sessions of files are; ``None`` for this process.

        Raises:
            UsageError: No evaluation samples, or a metric that does not exist.
        """
        if splits.evaluation is None or not splits.evaluation.used:
            raise UsageError("there are no evaluation samples to validate with")
        self.samples: Samples = splits.evaluation
        self.smoke_test = splits.random or splits.made_up
        self.seed = seed
        self._source = reference
        self._asked = budget if budget is not None else Budget.default(splits)
        self._threads = threads
        self._providers = tuple(providers)
        self._batch_size = batch_size
        self._progress = progress
        self._answers = answers
        self._timed_against = reference if timed_against is None else timed_against
        self._host = host
        self._labels = self.samples.labels
        self._outputs = tuple(outputs)
        self._metric = metric
        if isinstance(metric, str) and ":" in metric:
            self._metric = imported(metric)
        if isinstance(self._metric, str) and self._metric not in BUILT_IN:
            raise UsageError(
                f"there is no metric {metric!r}; there are {', '.join(BUILT_IN)} and "
                f"module:function.{nearest(self._metric, BUILT_IN)}"
            )
        reads_tokens = self._metric in TOKENS or (
            self._metric is None and may_be_tokens(self.samples.read([0]))
        )
        needs_labels = not reads_tokens and (
            isinstance(self._metric, str)
            or (self._metric is None and self._asked.max_drop is not None)
        )
        if needs_labels and self._labels is None and not self._asked.automatic:
            what = f"metric {metric}" if metric is not None else "--max-drop"
            raise UsageError(
                f"{what} needs labels for the evaluation samples, an array 'labels' or "
                "--labels KEY; without them use --min-agreement or --min-sqnr"
            )
        is_named = isinstance(self._metric, str) and self._metric not in TOKENS
        if is_named and self._labels is None:
            raise UsageError(f"metric {metric} needs labels")
        self._known: _Reference | None = None
        self._last: tuple[object, _Reference] | None = None

    # --- the reference ------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        """The limits that apply, once the reference has been looked at.

        An automatic budget leaves out what the samples cannot measure: the drop of a
        metric that is not in percent, agreement or SQNR where no output has it.
        """
        asked = self._asked
        if not asked.automatic or self.smoke_test:
            return asked
        bounds = self.bounds.values()
        return Budget(
            max_drop=self._max_drop(self._reference()),
            min_agreement=asked.min_agreement
            if any(b.agreement is not None for b in bounds)
            else None,
            min_sqnr=asked.min_sqnr
            if any(b.sqnr is not None for b in bounds)
            else None,
            max_latency_ratio=asked.max_latency_ratio,
            automatic=True,
        )

    def _max_drop(self, reference: _Reference) -> float | None:
        """Return the limit of the task metric's loss, if it applies.

        An automatic budget bounds metrics in percent, and perplexity by a share of it.
        """
        asked, task = self._asked, reference.task
        if task is None or not asked.automatic:
            return asked.max_drop
        if isinstance(task, Perplexity):
            return None if self.smoke_test else DEFAULT_PERPLEXITY * reference.before
        return asked.max_drop if task.percent else None

    @property
    def bounds(self) -> dict[str, Bound]:
        """What each output is held to, beside the task metric.

        A limit that was asked for holds for every output that has it. Outputs that are
        bounded by none, nor read by the metric, nor state, are held to the default.
        """
        asked, reference = self._asked, self._reference()
        limits = (asked.max_drop, asked.min_agreement, asked.min_sqnr)
        unlimited = all(limit is None for limit in limits)
        if unlimited and not (asked.automatic and self.smoke_test):
            return {}
        task, random = reference.task, self.smoke_test
        read: frozenset[str] = frozenset()
        if task is not None and self._max_drop(reference) is not None:
            read = frozenset(reference.seen) if task.reads is None else task.reads
        given = (
            Bound() if asked.automatic else Bound(asked.min_agreement, asked.min_sqnr)
        )
        found = {}
        for name, seen in reference.seen.items():
            kind = self._kind(name, seen, reference)
            if not self._counts(name, kind, reference):
                found[name] = Bound()
                continue
            agreement = given.agreement if kind in ("scores", "equal") else None
            sqnr = None if kind == "equal" else given.sqnr
            if agreement is None and sqnr is None and name not in read:
                if kind == "equal":
                    agreement = SMOKE_AGREEMENT if random else DEFAULT_AGREEMENT
                elif kind == "scores" and not random and not self._is_logits(name):
                    agreement = DEFAULT_AGREEMENT
                elif not random:
                    sqnr = DEFAULT_SQNR
            found[name] = Bound(agreement, sqnr)
        return found

    def _counts(self, name: str, kind: str, reference: _Reference) -> bool:
        """Whether budgets bound an output: state only if it is asked for."""
        if not self._outputs:
            return kind != "state" and name not in reference.kinds.state
        return any(fnmatchcase(name, pattern) for pattern in self._outputs)

    def _is_logits(self, name: str) -> bool:
        tokens = self._reference().tokens
        return tokens is not None and tokens.logits == name

    def _kind(
        self, name: str, seen: Seen, reference: _Reference
    ) -> Literal["scores", "equal", "state", "float"]:
        """Return how an output is compared: its top class, its values, its noise."""
        if seen.dtype is not None and not is_float(np.zeros(0, seen.dtype)):
            return "equal"
        if name in self._scores(reference):
            return "scores"
        return "state" if name in reference.kinds.state else "float"

    def _scores(self, reference: _Reference) -> frozenset[str]:
        """Return the outputs that are class scores, [samples, classes, 1...].

        The graph says so, or labels read it. Who asks for agreement and has no such
        output means the rows that may be scores.
        """
        shaped = {name for name, seen in reference.seen.items() if seen.scores}
        found = shaped & reference.kinds.scores
        if reference.tokens is not None:
            found |= {reference.tokens.logits}
        if self._labels is not None:
            read = self._scores_for(reference, self._labels)
            found |= {read} if read is not None else set()
        asked = self._asked
        if not found and asked.min_agreement is not None and not asked.automatic:
            found = {n for n in shaped if reference.seen[n].is_scores}
        return frozenset(found)

    def reference_metric(self) -> dict[str, float]:
        """Return the task metric of the reference by name; empty if there is none."""
        reference = self._reference()
        if reference.task is None:
            return {}
        return {reference.task.name: reference.before}

    def _reference(self) -> _Reference:
        if self._known is None:
            self._known = self._run_reference()
        return self._known

    def _run_reference(self) -> _Reference:
        reference = self._observe(self._source, "reference")
        if self._answers is not None:
            reference = _answering(reference, self._answers)
        task = self._task(reference)
        if task is not None:
            reference.task = task
            task.start()
            for index, span in enumerate(reference.spans):
                if task.wants_inputs:
                    task.read(self.samples.read(np.arange(*span)))
                task.feed(reference.store.read(index), self._labels_of(span))
            reference.before = task.value(self._used_labels(reference.spans))
            if self._metric is None and isinstance(task, Perplexity):
                assert reference.tokens is not None
                words = reference.store.read(0)[reference.tokens.logits].shape[-1]
                if not reference.before < _GUESSED * words:
                    reference.task = None  # no text of this model's, whose loss is luck
        self._check_budget(reference)
        return reference

    def _observe(self, source: Source, what: str) -> _Reference:
        """Run a model over the samples and keep what it says."""
        session = self._session(source)
        inputs, outputs = signature_of(source, session)
        kinds = kinds_of(source, inputs, outputs)
        few = self.samples.read(np.arange(self.samples.batch or 1))
        one, two = self._run(session, few), self._run(session, few)
        seen = {info.name: Seen() for info in session.outputs}
        for name, value in one.items():
            seen[name].stable = _repeats(value, two[name])
        if self._known is not None:
            spans, tokens = self._known.spans, self._known.tokens
        else:
            spans = list(self.samples.spans(self._size(few, one)))
            tokens = tokens_of(few, one, functools.partial(self._run, session))
        del one, two
        store = Store()
        for feed, span in self._feeds(spans, what):
            out = self._run(session, feed)
            count = _count(feed, span, self.samples)
            for name, value in out.items():
                _learn(seen[name], name, value, count, feed, tokens)
            store.add(out)
        return _Reference(source, store, seen, spans, inputs, outputs, kinds, tokens)

    def _start(self, before: Source | None) -> _Reference:
        """Return what SAME is measured against: the model before the pass."""
        reference = self._reference()
        if before is None or _identity(before) == _identity(self._source):
            return reference
        key = _identity(before)
        if self._last is None or self._last[0] != key:
            self._last = key, self._observe(before, "before the pass")
        return self._last[1]

    def _check_budget(self, reference: _Reference) -> None:
        """Refuse a budget that nothing could be measured for."""
        for pattern in self._outputs:
            if not any(fnmatchcase(name, pattern) for name in reference.seen):
                raise UsageError(
                    f"no output is called {pattern!r}; there are "
                    f"{', '.join(reference.seen)}{nearest(pattern, reference.seen)}"
                )
        asked = self._asked
        limits = (asked.max_drop, asked.min_agreement, asked.min_sqnr)
        if asked.automatic or all(limit is None for limit in limits):
            return
        if asked.max_drop is not None and reference.task is None:
            raise UsageError(
                "--max-drop needs a metric, and no output is class scores that fit the "
                "labels; name one with --metric, or use --min-sqnr"
            )
        comparable = {
            name: self._kind(name, seen, reference)
            for name, seen in reference.seen.items()
            if seen.stable and seen.values
        }
        why = "; ".join(
            f"{name!r} is {'empty' if seen.stable else 'random'}"
            for name, seen in reference.seen.items()
            if name not in comparable
        )
        if not comparable and asked.max_drop is None:
            raise UsageError(
                f"no budget can be measured on this model: {why}; without "
                "--min-agreement and --min-sqnr it is simplified only"
            )
        kinds = set(comparable.values())
        if asked.min_agreement is not None and not kinds & {"scores", "equal"}:
            raise UsageError(
                "--min-agreement needs an output of class scores, [samples, classes], "
                "or of integers, booleans or strings; this model has none to compare, "
                "use --min-sqnr"
            )
        if asked.min_sqnr is not None and not kinds - {"equal"}:
            raise UsageError(
                "--min-sqnr needs an output of floats, and this model has none to "
                "compare, use --min-agreement"
            )

    @functools.cached_property
    def _takes_objections(self) -> bool:
        """Whether onnx.checker refuses the reference, which onnxruntime runs."""
        try:
            check_form(self._source)
        except ModelError:
            return True
        return False

    def _run(self, session: runtime.Session, feed: Mapping[str, Array]) -> Any:
        try:
            return session.run(feed)
        except ModelError as error:
            raise ModelError(f"{error}{self.samples.hint}") from error

    def _session(
        self, source: Source, optimize: runtime.Optimize = "all"
    ) -> runtime.Session:
        opened = runtime.session if self._host is None else self._host.session
        return opened(
            source, threads=self._threads, providers=self._providers, optimize=optimize
        )

    def _size(self, feed: Mapping[str, Array], out: Mapping[str, Any]) -> int:
        """Return how many samples run at once, by the bytes of what goes in and out."""
        if self._batch_size is not None:
            return max(1, self._batch_size)
        samples = self.samples.batch or 1
        sides = [
            sum(
                value.nbytes for value in side.values() if isinstance(value, np.ndarray)
            )
            for side in (feed, out)
        ]
        return max(1, min(_BATCH, _BATCH_BYTES * samples // max(1, *sides)))

    def _feeds(
        self, spans: Sequence[tuple[int, int]], what: str
    ) -> Iterator[tuple[dict[str, Array], tuple[int, int]]]:
        for number, (start, stop) in enumerate(spans):
            yield self.samples.read(np.arange(start, stop)), (start, stop)
            if self._progress is not None:
                self._progress(number + 1, len(spans), what)

    def _labels_of(self, span: tuple[int, int]) -> Array | None:
        return None if self._labels is None else self._labels[span[0] : span[1]]

    def _used_labels(self, spans: Sequence[tuple[int, int]]) -> Array | None:
        return None if self._labels is None else self._labels[: spans[-1][1]]

    # --- the task metric ----------------------------------------------------------

    def _task(self, reference: _Reference) -> Task | None:
        metric = self._metric
        if metric is not None and not isinstance(metric, str):
            return Custom(metric)
        labels = self._labels
        if metric in TOKENS or (metric is None and labels is None):
            return self._token_task(metric, reference)
        if labels is None:
            return None
        if metric in (None, "top1", "top5"):
            k = 5 if metric == "top5" else 1
            output = self._scores_for(reference, labels)
            if output is not None:
                return Top(output, k)
            if metric is None:
                return self._token_task(metric, reference)
            raise UsageError(
                f"metric {metric} needs whole-numbered labels, one a sample, and an "
                "output [samples, classes] with more classes than the largest label; "
                f"the labels are {labels.dtype} {list(labels.shape)}"
                f"{self._shapes(reference)}"
            )
        for info in reference.outputs:
            first = reference.store.read(0)[info.name]
            samples = reference.spans[0][1] - reference.spans[0][0]
            size = labels[:samples].size
            if is_float(first) and first.size == size:
                return Squared(info.name) if metric == "mse" else Spearman(info.name)
        raise UsageError(
            f"metric {metric} needs a float output with as many values as labels "
            f"{list(labels.shape)}{self._shapes(reference)}"
        )

    def _token_task(self, metric: str | None, reference: _Reference) -> Task | None:
        tokens = reference.tokens
        if tokens is None and metric is not None:
            raise UsageError(
                f"metric {metric} needs token ids [samples, positions] and an output "
                "of logits [samples, positions, vocabulary]" + self._shapes(reference)
            )
        if tokens is None or (metric is None and self.smoke_test):
            return None
        if metric == "next-token":
            return NextToken(tokens)
        positions = reference.store.read(0)[tokens.logits].shape[1]
        if tokens.is_causal and positions > 1:
            return Perplexity(tokens)
        if metric is None:
            return None
        raise UsageError(
            "metric perplexity needs samples of two tokens or more, whose logits do "
            "not depend on tokens behind them; next-token needs neither"
        )

    def _shapes(self, reference: _Reference) -> str:
        words = ", ".join(runtime.describe(info) for info in reference.outputs)
        return f"; the outputs are {words}"

    def _scores_for(self, reference: _Reference, labels: Array) -> str | None:
        """Return the first output that the labels index; known scores come first."""
        if labels.size != len(labels) or labels.dtype.kind not in "iubf":
            return None
        if not np.array_equal(labels, np.floor(labels)) or labels.min() < 0:
            return None
        known = reference.kinds.scores
        for name in sorted(reference.seen, key=lambda name: name not in known):
            seen = reference.seen[name]
            if seen.scores and seen.classes > labels.max():
                return name
        return None

    # --- candidates ---------------------------------------------------------------

    def check(
        self,
        candidate: Source,
        promise: Promise = Promise.CLOSE,
        *,
        before: Source | None = None,
        before_bytes: int | None = None,
        after_bytes: int | None = None,
        latency_ratio: float | None = None,
        max_latency: float | None = None,
    ) -> Verdict:
        """Judge a candidate.

        Args:
            candidate: A model, or the file that holds it.
            promise: What the pass claims. SAME allows float noise only; CLOSE is held
                to the budget; SIGNATURE only to names, types, shapes and finiteness.
            before: The model before the pass, for SAME; the reference if not given.
                Metrics and budget are always those against the reference.
            before_bytes: Size of the file before the pass.
            after_bytes: Size after; it must not grow by more than 1 % (or 4 KiB).
            latency_ratio: Latency against the reference's, if it was measured; it is
                measured here where the budget asks for it and it is not given.
            max_latency: Instead of the budget's bound of the latency, if it has one.

        Raises:
            ModelError: The reference itself cannot run on these samples.
        """
        reference = self._reference()
        used = reference.spans[-1][1] if reference.spans else 0

        def refused(problem: Problem, reason: str) -> Verdict:
            return Verdict(
                ok=False,
                reason=reason,
                problem=problem,
                samples=used,
                smoke_test=self.smoke_test,
                damage=math.inf,
                noise=math.inf,
            )

        try:
            try:
                check_form(candidate)
            except ModelError:
                if not self._takes_objections:
                    raise
            session = self._session(candidate)
        except ModelError as error:
            return refused("broken", str(error))
        inputs, outputs = signature_of(candidate, session)
        problem = signature_problem(
            reference.inputs, reference.outputs, inputs, outputs
        )
        if problem:
            return refused("signature", problem)
        start = self._start(before) if promise is Promise.SAME else reference
        change = None
        try:
            keep = candidate if isinstance(candidate, Path) else None
            differences, from_start = self._compare(reference, start, session, keep)
            if reference.task is not None:
                change = MetricChange(
                    reference.task.name,
                    reference.before,
                    reference.task.value(self._used_labels(reference.spans)),
                    reference.task.lower_is_better,
                )
        except ModelError as error:
            return refused("broken", str(error))
        metrics = {
            name: difference.result(reference.seen[name])
            for name, difference in differences.items()
        }
        budget = self.budget
        if budget.max_latency_ratio is not None:
            limit = budget.max_latency_ratio if max_latency is None else max_latency
            budget = dataclasses.replace(budget, max_latency_ratio=limit)
            if latency_ratio is None:
                latency_ratio = self._latency_ratio(session)
                if latency_ratio > limit:  # by noise, perhaps: no run is too fast
                    again = self._latency_ratio(session)
                    latency_ratio = min(latency_ratio, again)
        return judge(
            promise,
            metrics,
            budget=budget,
            bounds=self.bounds,
            moved=moved(from_start, start.seen, lambda: self._own_noise(start))
            if promise is Promise.SAME
            else "",
            change=change,
            samples=used,
            smoke_test=self.smoke_test,
            before_bytes=before_bytes,
            after_bytes=after_bytes,
            latency_ratio=latency_ratio,
        )

    def _compare(
        self,
        reference: _Reference,
        start: _Reference,
        session: runtime.Session,
        keep: Path | None,
    ) -> tuple[dict[str, Difference], dict[str, Difference]]:
        """Run the candidate once; compare it with the reference and with the start.

        Outputs of a candidate in a file are kept: if it is accepted, the next pass
        starts from it.
        """
        against = [reference] if start is reference else [reference, start]
        scores = self._scores(reference)
        found = [
            {name: Difference(name in scores) for name in known.seen}
            for known in against
        ]
        store = Store()
        seen = {name: Seen() for name in reference.seen}
        if reference.task is not None:
            reference.task.start()
        for index, (feed, span) in enumerate(self._feeds(reference.spans, "check")):
            out = session.run(feed)
            count = _count(feed, span, self.samples)
            if keep is not None:
                store.add(out)
                for name, value in out.items():
                    _learn(seen[name], name, value, count, feed, reference.tokens)
            for known, differences in zip(against, found, strict=True):
                wanted = known.store.read(index)
                for name, difference in differences.items():
                    _same_kind(name, wanted[name], out[name])
                    pair = _compared(
                        name, wanted[name], out[name], count, feed, reference.tokens
                    )
                    difference.update(*pair)
            if reference.task is not None:
                reference.task.read(feed)
                reference.task.feed(out, self._labels_of(span))
        if keep is not None:
            for name, known_output in reference.seen.items():
                seen[name].stable = known_output.stable
            self._last = (
                _identity(keep),
                dataclasses.replace(
                    reference,
                    source=keep,
                    store=store,
                    seen=seen,
                    task=None,
                    noise=None,
                ),
            )
        return found[0], found[-1]

    def _latency_ratio(self, session: runtime.Session) -> float:
        from onnxshrink.measuring.measure import latencies

        reference = self._session(self._timed_against)
        _, ratio = latencies(session, reference, self.samples.read([0]))
        return ratio if ratio is not None else 1.0

    def _own_noise(self, start: _Reference) -> dict[str, tuple[float, float]]:
        """Return relative error and SQNR of outputs in a run without optimisations."""
        if start.noise is None:
            unoptimised = self._session(start.source, "off")
            differences = {name: Difference(False) for name in start.seen}
            power = dict.fromkeys(start.seen, 0.0)
            for index, (first, last) in enumerate(start.spans[:8]):
                feed = self.samples.read(np.arange(first, last))
                out, wanted = self._run(unoptimised, feed), start.store.read(index)
                for name, difference in differences.items():
                    difference.update(wanted[name], out[name], last - first)
                    if is_float(wanted[name]):
                        wide = plain(wanted[name].astype(np.float64))
                        power[name] += float(wide @ wide)
            found = {}
            for name, difference in differences.items():
                scale = start.seen[name].scale or 1.0
                noise = difference.noise
                level = math.inf
                if noise > 0:
                    level = 10 * math.log10(power[name] / noise) if power[name] else 0.0
                found[name] = (difference.max_abs / scale, level)
            start.noise = found
        return start.noise


def _answering(reference: _Reference, answers: Mapping[str, Array]) -> _Reference:
    """Return a reference whose outputs are the answers; other outputs are left out."""
    store, seen = Store(), {name: Seen() for name in reference.seen if name in answers}
    for index, (start, stop) in enumerate(reference.spans):
        own = reference.store.read(index)
        batch = {
            name: np.asarray(answers[name][start:stop], own[name].dtype)
            for name in seen
        }
        for name, value in batch.items():
            seen[name].update(name, value, stop - start)
        store.add(batch)
    return dataclasses.replace(reference, store=store, seen=seen)


def _learn(
    seen: Seen,
    name: str,
    value: Any,
    count: int,
    feed: Mapping[str, Array],
    tokens: Tokens | None,
) -> None:
    """Take in one batch of an output; of logits the positions that count."""
    if tokens is None or name != tokens.logits or not isinstance(value, np.ndarray):
        seen.update(name, value, count)
        return
    rows = tokens.rows(feed, value)
    seen.update(name, rows, len(rows))
    seen.scores = False


def _compared(
    name: str,
    wanted: Any,
    value: Any,
    count: int,
    feed: Mapping[str, Array],
    tokens: Tokens | None,
) -> tuple[Any, Any, int]:
    """Return what is compared of an output, and how many rows it has."""
    if tokens is None or name != tokens.logits or np.shape(wanted) != np.shape(value):
        return wanted, value, count
    rows = tokens.rows(feed, wanted)
    return rows, tokens.rows(feed, value), len(rows)


def _identity(source: Source) -> object:
    """Return what tells two sources apart: a file's state, or the object."""
    if isinstance(source, Path) and source.exists():
        state = source.stat()
        return str(source.resolve()), state.st_mtime_ns, state.st_size
    return id(source)


def _repeats(one: Any, two: Any) -> bool:
    """Whether two runs on one feed gave the same."""
    if isinstance(one, np.ndarray):
        numbers = one.dtype.kind in "fc"
        return one.shape == two.shape and np.array_equal(one, two, equal_nan=numbers)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_repeats, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_repeats(one[k], two[k]) for k in one)
    return bool(one == two)


def _same_kind(name: str, reference: Any, value: Any) -> None:
    """Refuse an output of another dtype or rank than the reference's."""
    if not isinstance(reference, np.ndarray) or not isinstance(value, np.ndarray):
        return
    if reference.dtype != value.dtype or reference.ndim != value.ndim:
        raise ModelError(
            f"output {name!r} is {value.dtype} {list(value.shape)}, the "
            f"reference gives {reference.dtype} {list(reference.shape)}"
        )


def _count(feed: Mapping[str, Array], span: tuple[int, int], samples: Samples) -> int:
    """Return how many samples the first axis of the outputs counts."""
    if not samples.whole:
        return span[1] - span[0]
    first = next(iter(feed.values()), None)
    return len(first) if first is not None and first.ndim else 1
