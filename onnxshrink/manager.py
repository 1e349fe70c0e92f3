"""PassManager: run a pipeline, hold every pass to its promise and to the budget."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import glob
import inspect
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnxshrink import registry, runtime
from onnxshrink._version import __version__
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.activations.reach import unreached
from onnxshrink.base import (
    Context,
    Memory,
    Pass,
    Progress,
    Promise,
    Saved,
    Site,
    SitePass,
)
from onnxshrink.engine import Engine, make_context
from onnxshrink.errors import (
    Cancelled,
    ModelError,
    OnnxshrinkError,
    OutputError,
    PromiseError,
    UsageError,
    nearest,
)
from onnxshrink.executors import check_executor, executing
from onnxshrink.files import (
    keep_apart,
    made_folders,
    scratch_prefix,
    sweep_scratch,
)
from onnxshrink.isolation.host import SessionHost, hosting
from onnxshrink.lineage import Lineage
from onnxshrink.measuring.costs import FixedCosts
from onnxshrink.measuring.measure import Stats, measure
from onnxshrink.model import External, Model, Storage, SupportsModelProto
from onnxshrink.passes.fold import fold_first, why_fold
from onnxshrink.pipeline import Pipeline
from onnxshrink.quantization.processors import detect, resolve
from onnxshrink.reporting.plan import Planned
from onnxshrink.reporting.proof import LayerSize, Proof, layer_sizes
from onnxshrink.reporting.report import (
    NOTHING_TO_DO,
    SUFFIXES,
    Report,
    Step,
    step_line,
)
from onnxshrink.samples import Splits
from onnxshrink.samples.random_inputs import MAX_INPUT_BYTES
from onnxshrink.samples.sources import split_path
from onnxshrink.samples.splits import CHOOSING
from onnxshrink.search import backoff
from onnxshrink.solvers.threads import one_thread
from onnxshrink.state import SavedRun, StateFolder, Workspace, digest
from onnxshrink.structure.layers import FLOATS, find
from onnxshrink.terminal import Bar, console, size_text
from onnxshrink.validation import Budget, Metric, Validator, Verdict, grown
from onnxshrink.validation.batching import without_batches
from onnxshrink.validation.metrics import fingerprint_of

__all__ = ["OnBreach", "PassManager", "Planned", "Result", "shrink"]

OnBreach = Literal["back-off", "rollback", "abort", "keep"]
"""What happens when a pass breaks the budget.

``back-off`` leaves out or weakens its most damaging sites until it fits, and rolls it
back if none fits; ``rollback`` goes on without the pass; ``abort`` stops with an error
and writes nothing; ``keep`` keeps it and says so. A model that is broken (NaN where
there was none, another signature, changed outputs where the pass promised the same) is
never kept.

Where passes that repair come later (``Pass.repairs``: distill, recover), all four wait
for them: what counts is whether the repaired model holds.
"""

MAX_MODEL_BYTES = 32 * 10**9
"""Bytes of weights that are worked on without being asked."""
_LOG = logging.getLogger("onnxshrink")
_TIGHTENINGS = 24
_GAINED = 0.98
"""Share of a file's bytes above which nothing to speak of was gained."""
_WORTH_SAYING = 10
"""Percent of a file that something else would save at least, to be named."""
_FEW = 32
"""Calibration samples below which the last lines say that they are few."""
_FEWEST = 8
"""The same of evaluation samples, where outputs are compared in dB."""
_SLOWER = 1.1
"""Latency from which a written model counts as slower, after three measurements."""
_PACING = ("channels", "codebook", "half", "lowrank", "quantize", "separable")
"""Passes after which operators run in another way; weights alone cost no time."""
_NAMED = 8
"""Places that a warning names."""
_NO_SLOWER = 1.05
"""Latency up to which a model is as fast as it came, but for noise."""
_REPAIRS = 2
"""Weaker forms of a pass that are repaired and judged, after the full one failed."""


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        model: The model as written.
        report: What happened, in figures measured from the written file.
        files: The files written, the model first; empty without an output.
    """

    model: Model
    report: Report
    files: tuple[Path, ...] = ()

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the report."""
        return self.report._repr_html_()


@dataclass
class _Attempt:
    """One way of doing a step: the model, its file, and what the validator says."""

    model: Model
    path: Path
    verdict: Verdict
    done: list[tuple[str, str]]
    skips: list[tuple[str, str]]
    plan: backoff.Plan | None = None
    """How strongly it acted at each site, where that is not as listed."""
    grown: str = ""
    """How the file grew, whatever else the verdict says."""
    idle: str = ""
    """Why the pass had nothing to do; the model is then the one before it."""
    is_taught: bool = False
    """Whether it was accepted for what its pass taught, not for what it kept."""
    warnings: tuple[str, ...] = ()
    """What its pass says that a user must not miss."""


@dataclass(frozen=True)
class _Accepted:
    """What is accepted so far: a model, the file that holds it, its figures."""

    model: Model
    path: Path
    stats: Stats


@dataclass
class _TriedPass:
    """A pass that was run at its place in the pipeline, before that is recorded."""

    index: int
    pass_: Pass
    attempt: _Attempt
    seconds: float
    kept: bool
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        return self.attempt.verdict

    @property
    def may_be_repaired(self) -> bool:
        """Whether it breaks the budget and nothing that no repair can mend."""
        return self.verdict.problem == "budget" and not self.attempt.grown

    @property
    def label(self) -> str:
        return _label(self.index, self.pass_)


class PassManager:
    """Runs a pipeline over a model; the model given is never changed."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        splits: Splits | None = None,
        budget: Budget | None = None,
        metric: Metric = None,
        outputs: Sequence[str] = (),
        on_breach: OnBreach = "back-off",
        storage: Storage = "auto",
        names: Literal["keep", "short"] = "keep",
        external: External = "auto",
        max_decode_ratio: float | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
        threads: int = 0,
        seed: int = 0,
        jobs: int = 0,
        executor: Executor | str | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        max_input_bytes: int = MAX_INPUT_BYTES,
        values: Mapping[str, Sequence[float]] | None = None,
        batch: int | None = None,
        progress: Progress | None = None,
        on_step: Callable[[Step], None] | None = None,
        measure_latency: bool = True,
        measure_memory: bool = True,
        custom_ops: Sequence[str | os.PathLike[str]] = (),
        isolate: bool | None = None,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        cancel: threading.Event | None = None,
        max_model_bytes: int = MAX_MODEL_BYTES,
        command: str = "",
    ) -> None:
        """Set up a run.

        Args:
            pipeline: The passes.
            splits: Samples; without them seeded random inputs serve as a smoke test.
            budget: What a pass may cost; by default the recipe's, else one that fits
                the kind of samples (``Budget.default``).
            metric: Task metric: a name, ``module:function`` or a callable.
            outputs: Names or patterns of the outputs that the budget bounds; by default
                all but state that goes into the next run.
            on_breach: What happens when a pass breaks the budget.
            storage: How weights are written, see ``Model.save``.
            names: ``short`` gives what is inside the written model the shortest names
                there are and leaves out the record of the run, for the smallest file.
            external: Whether weights go to a second file, see ``Model.save``.
            max_decode_ratio: Most memory that decoding one weight may take, see
                ``Model.save``.
            providers: onnxruntime execution providers.
            threads: onnxruntime's threads in one operator; 0 lets it choose.
            seed: Seed of every random draw.
            jobs: Threads that passes share work among; 0 is one for each processor.
            executor: Who does the work that passes share: ``threads``, ``processes``
                (in a script, behind a main guard), ``dask:ADDRESS`` of a scheduler
                whose workers have onnxshrink and see the model's files under the same
                paths, or an executor, which is not shut down. Results do not depend
                on it.
            shapes: Input shapes for random inputs and measurement.
            values: Numbers for inputs by name, beside random inputs; data that is given
                has its own, see ``Splits.build``.
            batch: Samples in every run of the model, likewise.
            max_input_bytes: Most bytes of one set of random inputs that a model's word
                is enough for.
            progress: Receives progress of long work: (done, total, what). It may be
                called from other threads; where it raises, the run ends with that.
            on_step: Receives each step's report as soon as it is there.
            measure_latency: Measure latency against the model the run started from: of
                the model that came in and the one that is written; after each pass too
                where the budget bounds it.
            cancel: When another thread sets it, the run ends with ``Cancelled``.
            max_model_bytes: Most bytes of weights that are worked on; a file that is
                all holes claims any number.
            command: What was called, for the report.
            measure_memory: Measure the memory that opening the model takes, before and
                after, in processes of their own.
            custom_ops: Shared libraries with operators that the model needs.
            isolate: Whether models are checked, run and timed in a child process, so
                that a crash of onnxruntime rolls a pass back instead of ending the
                run; by default if the system has processes and the environment does
                not say ``ONNXSHRINK_ISOLATE=0``.
            time_limit: Seconds that opening a model, or running it on one batch, may
                take in the child; by default 300.
            memory_limit: Bytes of resident memory that the child may need.

        Raises:
            UsageError: An unknown value for ``on_breach`` or ``names``; a limit that
                cannot be held.
        """
        if names not in ("keep", "short"):
            raise UsageError(f"names is keep or short, not {names!r}")
        if on_breach not in ("back-off", "rollback", "abort", "keep"):
            raise UsageError(
                f"on_breach is back-off, rollback, abort or keep, not {on_breach!r}"
            )
        self.pipeline = pipeline
        self.splits = splits
        self.budget = budget
        self.metric = metric
        self.outputs = tuple(outputs)
        self.on_breach = on_breach
        self.storage: Storage = storage
        self.names = names
        self.external: External = external
        self.max_decode_ratio = max_decode_ratio
        self.providers = providers
        self.threads = threads
        self.seed = seed
        self.jobs = jobs or os.cpu_count() or 1
        check_executor(executor)
        self.executor = executor
        self.shapes = dict(shapes or {})
        self.max_input_bytes = max_input_bytes
        self.cancel = cancel
        self.command = command
        self.max_model_bytes = max_model_bytes
        self._told: BaseException | None = None
        self._progress = progress
        self.progress: Progress = self._report
        self.values = dict(values or {})
        self.batch = batch
        self.on_step = on_step
        self.measure_latency = measure_latency
        self.measure_memory = measure_memory
        self.custom_ops = tuple(custom_ops)
        if isolate is False and (time_limit is not None or memory_limit is not None):
            raise UsageError("limits of time and memory need isolate=True")
        self.isolate = isolate
        self.time_limit = time_limit
        self.memory_limit = memory_limit

    def _report(self, done: int, total: int, what: str) -> None:
        """Pass progress on, to the log too; end where the caller wants that.

        Raises:
            Cancelled: ``cancel`` is set, or whoever receives progress raised.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("cancelled; nothing was written")
        _LOG.debug("%s: %d of %d", what, done, total)
        if self._progress is None:
            return
        try:
            self._progress(done, total, what)
        except Exception as error:
            self._told = error
            raise Cancelled(f"progress ended the run: {error}") from error

    # --- plan ---------------------------------------------------------------------

    def plan(self, model: Model) -> list[Planned]:
        """Say what each pass would do, doing only what later passes need to plan.

        Passes that promise the same outputs are run on a copy, since what follows is
        planned on their result; the others are only asked for their sites.
        """
        with runtime.custom_operators(self.custom_ops):
            return self._plan(model)

    def _plan(self, model: Model) -> list[Planned]:
        planned: list[Planned] = []
        costs = FixedCosts(threads=self.threads, providers=self.providers)
        with self._executor() as executor:
            current = model.copy()
            changed: list[str] = []
            for index, pass_ in enumerate(self.pipeline):
                splits = self._splits(model)
                ctx = self._context(model, splits, executor, costs)
                current = self._prepared(current, pass_, ctx)
                note = ""
                if changed:
                    note = f"planned without the effect of {', '.join(changed)}"
                sites: tuple[Site, ...] | None = None
                outlook: tuple[str, ...] = ()
                with _naming(index, pass_, ctx):
                    if isinstance(pass_, SitePass):
                        sites = tuple(pass_.sites(current, ctx))
                        outlook = tuple(pass_.outlook(current, ctx))
                    if pass_.promise is Promise.SAME:
                        pass_.apply(current, ctx)
                if pass_.promise is Promise.SAME:
                    done = tuple(f"{where}: {what}" for where, what in ctx.done)
                    note = "; ".join([*done, *([note] if note else [])])
                else:
                    changed.append(pass_.name)
                skips = tuple(ctx.skips)
                planned.append(
                    Planned(pass_, sites, skips, note, self._ranked_by, outlook)
                )
        return planned

    # --- run ----------------------------------------------------------------------

    def run(
        self,
        model: Model | str | os.PathLike[str] | SupportsModelProto,
        output: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
    ) -> Result:
        """Run every pass, validate after each, and write the result.

        Args:
            model: A model or anything ``Model.load`` takes; it is not changed.
            output: Where to write; without it the model is only returned.
            resume: Continue an interrupted run of the same input, pipeline, options
                and output after its last accepted pass.

        Raises:
            PromiseError: With ``on_breach="abort"``, a pass broke the budget or its
                promise; or a pass failed. Nothing was written.
            OutputError: The output cannot be written.
            UsageError: ``resume`` without an output, or nothing fits to resume.
            ModelError: A pass cannot take the model or the data.
        """
        self._told = None
        try:
            with runtime.custom_operators(self.custom_ops):
                target = None if output is None else Path(output)
                return self._run(model, target, resume)
        except Cancelled:
            if self._told is not None:  # what the caller's own function raised
                raise self._told from None
            raise

    def _run(
        self,
        model: Model | str | os.PathLike[str] | SupportsModelProto,
        target: Path | None,
        resume: bool,
    ) -> Result:
        source = model if isinstance(model, Model) else Model.load(model)
        nbytes = sum(weight.nbytes for weight in source.weights())
        if nbytes > self.max_model_bytes:
            raise UsageError(
                f"the model's weights take {size_text(nbytes)}, more than the "
                f"{size_text(self.max_model_bytes)} that are worked on without being "
                "asked; --max-model-bytes (max_model_bytes=) raises that"
            )
        if resume and target is None:
            raise UsageError("resume needs an output: the state is kept beside it")
        if target is not None and target.parent.is_dir():
            source.check_target(target)
        with (
            hosting(self.isolate, self.time_limit, self.memory_limit) as host,
            self._workspace(target, resume) as folder,
            self._executor() as executor,
            one_thread,  # sums, and so bytes, differ with the number of threads
        ):
            run = _PipelineRun(self, source, target, folder, executor, host)
            return run.run(resume)

    # --- shared with the run ------------------------------------------------------

    def _executor(self) -> AbstractContextManager[Executor | None]:
        return executing(self.executor, self.jobs)

    @contextlib.contextmanager
    def _workspace(self, target: Path | None, resume: bool) -> Iterator[Path]:
        """Yield a folder for candidates; beside the output, so that a rename moves."""
        if target is None:
            sweep_scratch(tempfile.gettempdir())
            with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as name:
                yield Path(name)
            return
        with (
            made_folders(target.parent),
            Workspace(target, resume=resume) as folder,
        ):
            yield folder

    def _splits(self, model: Model, batch: int | None = None) -> Splits:
        if self.splits is not None:
            return self.splits
        return Splits.build(
            model,
            seed=self.seed,
            shapes=self.shapes,
            max_input_bytes=self.max_input_bytes,
            values=self.values,
            batch=batch or self.batch,
        )

    @property
    def _ranked_by(self) -> Saved:
        """What sites are ranked by: what the budget asks for."""
        latency = self.budget is not None and self.budget.max_latency_ratio is not None
        return "seconds" if latency else "bytes"

    def _context(
        self,
        reference: Model,
        splits: Splits,
        executor: Executor | None,
        costs: FixedCosts,
    ) -> Context:
        """Return a context; layers are timed here only where the latency is bounded."""
        return make_context(
            engine=Engine(costs.measured() if self._ranked_by == "seconds" else costs),
            samples=splits,
            reference=reference,
            seed=self.seed,
            threads=self.threads,
            providers=self.providers,
            executor=executor,
            progress=self.progress,
            max_bytes=None if self.budget is None else self.budget.max_bytes,
        )

    def _prepared(self, model: Model, pass_: Pass, ctx: Context) -> Model:
        """Return a copy with the opset the pass needs, folded where it must be."""
        copy = model.copy()
        copy.require_opset(pass_.opset)
        copy.fit_runtime()
        if pass_.folds:
            expands = pass_.folds == "fused"
            why = why_fold(copy, expands=expands)
            words = fold_first(copy, ctx, expands=expands) if why else ""
            if words:
                ctx.did("model", f"{words}, since {why}")
        return copy


class _PipelineRun:
    """A pipeline on its way over a model, and the files of it.

    Attributes:
        original: File of the model as it was given; sizes and times are compared to it.
        baseline: File of the model that outputs are compared with: the original, or
            the last one that was taught to answer otherwise.
        final: Judges what is kept, on evaluation samples.
        selection: Judges where there is a choice, on validation samples; made when the
            first choice comes.
        steps: Reports of the steps that are decided.
        memory: What passes remember in the step that is being decided.
        reach: The fingerprint of the model that was last looked at for weights that no
            sample reaches, and these.
        untouched: All such weights that steps left alone, and why.
        cautions: What passes that were kept want a user not to miss.
        costs: What layers cost, for all steps.
    """

    def __init__(
        self,
        manager: PassManager,
        source: Model,
        target: Path | None,
        folder: Path,
        executor: Executor | None,
        host: SessionHost | None,
    ) -> None:
        self.manager = manager
        self.source = source.copy()
        self.source.lineage = Lineage()  # of another run, if it has one
        source = self.source
        self.target = target
        self.folder = folder
        self.executor = executor
        self.host = host
        self.splits = manager._splits(source)
        budget = manager.budget
        if budget is None and manager.pipeline.budget:
            proposed = manager.pipeline.budget
            budget = Budget(
                max_drop=proposed.get("max_drop"),
                min_agreement=proposed.get("min_agreement"),
                min_sqnr=proposed.get("min_sqnr"),
            )
        self.budget = budget or Budget.default(self.splits)
        quality = (
            self.budget.max_drop,
            self.budget.min_agreement,
            self.budget.min_sqnr,
        )
        if all(limit is None for limit in quality):
            self.budget = dataclasses.replace(
                Budget.default(self.splits),
                max_latency_ratio=self.budget.max_latency_ratio,
                max_bytes=self.budget.max_bytes,
            )
        self.name = target.name if target is not None else "model.onnx"
        self.reference = source.copy()
        self.reference.fit_runtime()
        self.original = self.baseline = self._as_given()
        self.final = self._validator(self.splits)
        self.selection: Validator | None = None
        self.steps: list[Step] = []
        self.memory = Memory()
        self.reach: tuple[str, Mapping[str, str]] | None = None
        self.untouched: dict[str, str] = {}
        self.cautions: list[str] = []
        self.costs = FixedCosts(threads=manager.threads, providers=manager.providers)

    def _as_given(self) -> Path:
        """Return a file onnxruntime can open that holds the model as it was given."""
        path = self.source.source
        untouched = self.reference.ir_version == self.source.ir_version
        text = path is not None and path.suffix == ".onnxtxt"
        if path is not None and not text and untouched and self.source.is_unchanged():
            return path
        path = self.folder / f"baseline-{self.name}"
        self.reference.save(path, storage="plain")
        return path

    def _validator(
        self, splits: Splits, answers: Mapping[str, Any] | None = None
    ) -> Validator:
        manager = self.manager
        return Validator(
            self.baseline,
            splits,
            self.budget,
            metric=manager.metric,
            outputs=manager.outputs,
            threads=manager.threads,
            providers=manager.providers,
            seed=manager.seed,
            progress=manager.progress,
            answers=answers,
            timed_against=self.original,
            host=self.host,
        )

    # --- the whole run ------------------------------------------------------------

    def run(self, resume: bool) -> Result:
        manager = self.manager
        try:
            baseline, quality = self._measured_as_given()
        except ModelError:
            if not self._runs_one_by_one():
                raise
            baseline, quality = self._measured_as_given()
        baseline = dataclasses.replace(baseline, metric=quality)
        accepted, index = _Accepted(self.source, self.original, baseline), 0
        resumed = self._resumed() if resume else None
        if resumed is not None:
            accepted, index = resumed
        else:
            self._save_state(-1, accepted)
        while index < len(manager.pipeline):
            tries = self._decided(index, accepted)
            accepted = self._record(tries, accepted)
            index += len(tries)
        return self._finish(accepted.model, baseline)

    def _measured_as_given(self) -> tuple[Stats, dict[str, float]]:
        return self._measure(self.original), self.final.reference_metric()

    def _runs_one_by_one(self) -> bool:
        """Whether samples run alone that do not run together; from now on they do."""
        manager = self.manager
        opened = runtime.session if self.host is None else self.host.session
        found = without_batches(
            self.splits,
            lambda: opened(
                self.original, threads=manager.threads, providers=manager.providers
            ),
            lambda: manager._splits(self.source, batch=1),
        )
        if found is None:
            return False
        self.splits = found
        self.final = self._validator(self.splits)
        return True

    def _decided(self, index: int, accepted: _Accepted) -> list[_TriedPass]:
        """Run a pass, or several that are judged together, and say what is kept."""
        manager = self.manager
        started = time.perf_counter()
        self.memory = Memory()
        manager.progress(
            index, len(manager.pipeline), manager.pipeline.passes[index].name
        )
        tries = self._tried_with_repair(index, accepted)
        first = tries[0]
        # The search for what fits belongs to the pass that made it necessary.
        first.seconds += (
            time.perf_counter() - started - sum(one.seconds for one in tries)
        )
        return tries

    def _tried_with_repair(self, index: int, accepted: _Accepted) -> list[_TriedPass]:
        on_breach = self.manager.on_breach
        first = self._tried(index, accepted.model, accepted.path)
        if first.kept:
            return [first]
        if on_breach == "keep" and first.verdict.keepable:
            first.kept, first.reason = True, f"kept although {first.verdict.reason}"
            return [first]
        last = self._last_repairer(index)
        failed = first
        if last is not None and first.may_be_repaired:
            together = self._repaired(first, last)
            if together[-1].verdict.ok:
                return together
            broke = [one for one in together if not one.verdict.ok]
            failed = min(broke, key=lambda one: one.verdict.damage)
        if on_breach == "abort":
            after = "" if failed is first else f", and still after {failed.label}"
            raise PromiseError(
                f"{first.label}{after}: {failed.verdict.reason}; nothing was written"
            )
        first.kept, first.reason = False, f"rolled back: {failed.verdict.reason}"
        if on_breach == "back-off" and first.verdict.problem != "unmeasured":
            return self._weakened(first, last, accepted)
        return [first]

    def _weakened(
        self, first: _TriedPass, last: int | None, accepted: _Accepted
    ) -> list[_TriedPass]:
        """Give way: as far as it must before a repair, or alone if none helps."""
        pass_ = first.pass_
        if not isinstance(pass_, SitePass) or pass_.promise is Promise.SAME:
            return [first]
        alone = self._backed_off(first, accepted)
        if last is not None and first.may_be_repaired:
            plan = alone.attempt.plan if alone is not None else None
            stronger = self._weakened_before_repair(first, plan, last, accepted)
            if stronger is not None:
                return stronger
        return [alone or first]

    def _weakened_before_repair(
        self,
        first: _TriedPass,
        plan: backoff.Plan | None,
        last: int,
        accepted: _Accepted,
    ) -> list[_TriedPass] | None:
        """Look for the strongest form of a pass that later passes can repair.

        It lies between what fits the budget without repair, which is known, and the
        pass as asked for, which does not. Each trial costs a whole repair.
        """
        pass_ = first.pass_
        assert isinstance(pass_, SitePass)
        ctx = self._context(first.index)
        prepared = self._prepared(accepted.model, pass_, ctx)
        if plan is None:
            with _naming(first.index, pass_, ctx):
                plan = backoff.nothing(pass_.sites(prepared, ctx))
        best: list[_TriedPass] | None = None
        low, high = 0.0, 1.0
        for number in range(_REPAIRS):
            share = (low + high) / 2
            blended = backoff.blend(pass_, plan, share)
            if not blended.chosen(pass_) or blended == plan:
                break
            tag = f"-weaker{number + 1}"
            tries = [
                self._tried(
                    first.index, accepted.model, accepted.path, blended, tag=tag
                )
            ]
            if not tries[0].verdict.ok:
                tries = self._repaired(tries[0], last, tag=tag)
            if tries[-1].verdict.ok:
                best, low = tries, share
            else:
                high = share
        return best

    def _last_repairer(self, index: int) -> int | None:
        """Return the last of the passes that repair what this one damages."""
        passes = self.manager.pipeline.passes
        if passes[index].repairs:
            return None
        later = range(index + 1, len(passes))
        first = next((i for i in later if passes[i].repairs), None)
        if first is None:
            return None
        last = first
        for i in range(first + 1, len(passes)):
            if passes[i].repairs:
                last = i
            elif passes[i].promise is not Promise.SAME:
                break
        return last

    def _repaired(
        self, first: _TriedPass, last: int, *, tag: str = ""
    ) -> list[_TriedPass]:
        """Go on from a pass that broke the budget until the model holds again.

        Passes on the way that damage further wait for the repair too; one that repairs
        is kept if it makes the damage smaller. The last verdict tells whether it held.
        One that promises the same outputs is judged by that alone, so that its verdict
        says nothing about the budget: the damage is what it was before.
        """
        first.kept = True
        tries, latest = [first], first.attempt
        damage = first.verdict.damage
        for index in range(first.index + 1, last + 1):
            one = self._tried(index, latest.model, latest.path, tag=tag)
            tries.append(one)
            verdict = one.verdict
            counts = one.pass_.promise is not Promise.SAME
            helps = verdict.damage < damage
            waits = one.may_be_repaired and not one.pass_.repairs
            if counts and verdict.keepable and (helps or waits):
                one.kept = True
            if not one.kept:
                one.reason = f"rolled back: {verdict.reason}"
                continue
            latest = one.attempt
            if counts:
                damage = verdict.damage
            if counts and verdict.ok:
                self._explain(tries)
                break
        return tries

    def _explain(self, tries: Sequence[_TriedPass]) -> None:
        """Say of passes that broke the budget who repaired it."""
        *broke, last = tries
        repairers = [one.pass_.name for one in tries if one.kept and one.pass_.repairs]
        names = " and ".join(dict.fromkeys(repairers)) or last.pass_.name
        for one in broke:
            if one.kept and not one.verdict.ok:
                one.reason = f"repaired by {names}: {one.verdict.reason} before"

    def _record(self, tries: Sequence[_TriedPass], accepted: _Accepted) -> _Accepted:
        """Note the steps that are decided; an interrupted run continues after them."""
        manager = self.manager
        for one in tries:
            before, attempt = accepted, one.attempt
            if one.kept:
                latency = self.budget.max_latency_ratio is not None
                stats = self._measure(attempt.path, latency=latency)
                stats = dataclasses.replace(stats, metric=one.verdict.quality())
                if attempt.idle:  # the file stays the one that was there
                    size = before.stats.file_bytes
                    stats = dataclasses.replace(stats, file_bytes=size)
                    accepted = _Accepted(before.model, before.path, stats)
                    one.reason = f"{NOTHING_TO_DO}: {attempt.idle}"
                else:
                    accepted = _Accepted(attempt.model, attempt.path, stats)
                self.cautions += attempt.warnings
                if attempt.is_taught:
                    self._hold_to(attempt.path)
            changes: list[tuple[str, str]] = []
            if attempt.plan is not None and isinstance(one.pass_, SitePass):
                changes = attempt.plan.changes(one.pass_)
            step = Step(
                pass_name=one.pass_.name,
                options=one.pass_.options(),
                accepted=one.kept,
                reason=one.reason or one.verdict.reason,
                seconds=one.seconds,
                before=before.stats,
                after=accepted.stats,
                verdict=one.verdict,
                did=tuple(attempt.done) if one.kept else (),
                skipped=tuple(attempt.skips),
                left_out=tuple(changes) if one.kept else (),
            )
            self.steps.append(step)
            _LOG.info("%s", step_line(step))
            if manager.on_step is not None:
                manager.on_step(step)
        self._tidy(tries, accepted)
        self._save_state(tries[-1].index, accepted)
        return accepted

    def _hold_to(self, path: Path) -> None:
        """Measure what follows against another model than the run started from."""
        self.baseline = path
        self.final, self.selection = self._validator(self.splits), None

    def _tidy(self, tries: Sequence[_TriedPass], accepted: _Accepted) -> None:
        """Delete the files of attempts that came to nothing, which can be large."""
        kept = {
            one.attempt.path.name for one in tries if one.kept and not one.attempt.idle
        } | {accepted.path.name}
        for one in tries:
            for file in self.folder.glob(f"{one.index}-*"):
                if file.is_file() and not any(file.name.startswith(k) for k in kept):
                    file.unlink(missing_ok=True)

    # --- one step -----------------------------------------------------------------

    def _tried(
        self,
        index: int,
        before: Model,
        before_path: Path,
        plan: backoff.Plan | None = None,
        *,
        tag: str = "",
    ) -> _TriedPass:
        """Run one pass and judge it; an error says which and leaves nothing behind."""
        started = time.perf_counter()
        pass_ = self.manager.pipeline.passes[index]
        ctx = self._context(index, tag)
        with _naming(index, pass_, ctx):
            attempt = self._attempt(index, pass_, before, before_path, ctx, plan, tag)
        seconds = time.perf_counter() - started
        return _TriedPass(index, pass_, attempt, seconds, attempt.verdict.ok)

    def _context(self, index: int, tag: str = "") -> Context:
        ctx = self.manager._context(
            self.reference, self.splits, self.executor, self.costs
        )
        ctx.memory = self.memory
        if self.target is not None:
            ctx.folder = self.folder / f"step-{index}{tag}"
            ctx.folder.mkdir(exist_ok=True)
        return ctx

    def _attempt(
        self,
        index: int,
        pass_: Pass,
        before: Model,
        before_path: Path,
        ctx: Context,
        plan: backoff.Plan | None,
        tag: str,
    ) -> _Attempt:
        prepared = self._prepared(before, pass_, ctx)
        folded = list(ctx.done)
        idle = ""
        if isinstance(pass_, SitePass):
            sites = list(pass_.sites(prepared, ctx))
            listed = list(ctx.skips)
            names = [site.where for site in sites]
            if len(set(names)) != len(names):
                raise PromiseError("the pass lists the same site twice")
            chosen = sites if plan is None else plan.chosen(pass_)
            candidate = self._rewritten(pass_, prepared, chosen, ctx, listed)
            ctx.done[:0] = folded
        else:
            candidate = prepared.copy()
            pass_.apply(candidate, ctx)
        if plan is None and len(ctx.done) == len(folded):
            idle = _idle(pass_, prepared, candidate, ctx)
        if idle:
            candidate = before.copy()
            ctx.done[:] = []
        attempt = self._judged(index, pass_, candidate, before_path, ctx, tag)
        attempt.plan = plan
        attempt.idle = idle
        if attempt.verdict.problem == "budget":
            self._forgive_taught(attempt, pass_, prepared, before_path, ctx)
        return attempt

    def _prepared(self, model: Model, pass_: Pass, ctx: Context) -> Model:
        """Return a copy that a pass may work on, and that says what is out of reach."""
        prepared = self.manager._prepared(model, pass_, ctx)
        if pass_.promise is not Promise.CLOSE or not ctx.has_data:
            return prepared
        samples = (self.splits.calibration,)
        mark = fingerprint(prepared)
        if self.reach is None or self.reach[0] != mark:
            self.reach = mark, unreached(prepared, samples, ctx)
        prepared.unreached = self.reach[1]
        self.untouched |= self.reach[1]
        return prepared

    def _forgive_taught(
        self,
        attempt: _Attempt,
        pass_: Pass,
        before: Model,
        before_path: Path,
        ctx: Context,
    ) -> None:
        """Accept a model that came nearer to what its pass was to teach."""
        samples = self.splits.evaluation
        answers = None if samples is None else pass_.answers(before, samples, ctx)
        if not answers:
            return
        taught = self._validator(self.splits, answers)
        first, last = taught.check(before_path), taught.check(attempt.path)
        if last.keepable and last.damage < first.damage:
            changes = [
                f"{name} {first.quality()[name]:.4g} -> {figure:.4g}"
                for name, figure in last.quality().items()
                if name in first.quality()
            ]
            words = f"nearer to what was taught: {', '.join(changes)}"
            attempt.verdict = dataclasses.replace(
                last, ok=True, problem="", reason=words
            )
            attempt.is_taught = True

    def _rewritten(
        self,
        pass_: SitePass,
        prepared: Model,
        sites: Sequence[Site],
        ctx: Context,
        listed: list[tuple[str, str]],
    ) -> Model:
        candidate = prepared.copy()
        ctx.done[:] = []
        ctx.skips[:] = listed
        pass_.rewrite_all(candidate, sites, ctx)
        return candidate

    def _judged(
        self,
        index: int,
        pass_: Pass,
        candidate: Model,
        before_path: Path,
        ctx: Context,
        tag: str = "",
    ) -> _Attempt:
        """Write the candidate and let the validator look at the file."""
        path = self.folder / f"{index}{tag}-{self.name}"
        candidate.fit_runtime()
        files = self._save(candidate, path)
        sizes = _bytes(before_path), sum(file.stat().st_size for file in files)
        verdict = self.final.check(
            path,
            _judged_by(pass_),
            before=before_path,
            before_bytes=sizes[0],
            after_bytes=sizes[1],
            max_latency=self._max_latency(index),
        )
        return _Attempt(
            candidate,
            path,
            verdict,
            list(ctx.done),
            list(ctx.skips),
            grown=grown(*sizes),
            warnings=tuple(ctx.warnings),
        )

    def _max_latency(self, index: int) -> float | None:
        """Return what bounds the latency after a step, if it is not the budget.

        A budget that asks for less time than the model took is for the last pass that
        changes the model to meet. Before that, a pass must not make it slower.
        """
        limit = self.budget.max_latency_ratio
        if limit is None or limit >= 1:
            return None
        passes = self.manager.pipeline.passes
        changing = [
            number
            for number, pass_ in enumerate(passes)
            if pass_.promise is not Promise.SAME and not pass_.repairs
        ]
        last = changing[-1] if changing else len(passes) - 1
        return _NO_SLOWER if index < last else None

    def _save(
        self, model: Model, path: Path, *, final: bool = False
    ) -> tuple[Path, ...]:
        """Write a model; coders that take microseconds a weight are for the last."""
        manager = self.manager
        between = "auto" if manager.storage == "tiny" else manager.storage
        return model.save(
            path,
            storage=manager.storage if final else between,
            external=manager.external,
            max_decode_ratio=manager.max_decode_ratio,
        )

    def _backed_off(self, failed: _TriedPass, accepted: _Accepted) -> _TriedPass | None:
        """Give way until the budget holds: choose on validation samples, then judge."""
        ctx = self._context(failed.index)
        with _naming(failed.index, failed.pass_, ctx):
            return self._least_weakened(failed, accepted, ctx)

    def _least_weakened(
        self, failed: _TriedPass, accepted: _Accepted, ctx: Context
    ) -> _TriedPass | None:
        index, pass_ = failed.index, failed.pass_
        assert isinstance(pass_, SitePass)
        prepared = self._prepared(accepted.model, pass_, ctx)
        sites = list(pass_.sites(prepared, ctx))
        listed = list(ctx.skips)
        if not sites:
            return None
        selection = self._selecting()
        tried = 0

        def damage(some: Sequence[Site], latency_ratio: float | None = None) -> float:
            nonlocal tried
            tried += 1
            self.manager.progress(tried, tried + 1, f"{pass_.name}: backing off")
            if not some:
                return 0.0
            trial = self._rewritten(pass_, prepared, some, ctx, listed)
            verdict = selection.check(
                trial,
                _judged_by(pass_),
                latency_ratio=latency_ratio,
                max_latency=self._max_latency(index),
            )
            return verdict.damage

        def harm(some: Sequence[Site]) -> float:
            return damage(some, latency_ratio=0.0)  # of the outputs alone

        plan = backoff.back_off(
            pass_, sites, damage, saved=self.manager._ranked_by, harm=harm
        )
        for _ in range(_TIGHTENINGS):
            if plan is None:
                break
            chosen = plan.chosen(pass_)
            if not chosen:
                break
            candidate = self._rewritten(pass_, prepared, chosen, ctx, listed)
            attempt = self._judged(index, pass_, candidate, accepted.path, ctx)
            if attempt.verdict.ok:
                attempt.plan = plan
                return _TriedPass(index, pass_, attempt, 0.0, kept=True)
            plan = backoff.tighten(pass_, plan)
        return None

    def _selecting(self) -> Validator:
        """The validator that choices are made with: never on evaluation samples."""
        if self.selection is None:
            samples, more = self.splits.validation, self.splits.training
            self.selection = self.final
            if samples is not None:
                missing = CHOOSING - len(samples)
                if missing > 0 and more is not None and not samples.whole:
                    # What trains comes later: so far nothing has seen these.
                    samples = samples.joined(more.take(slice(0, missing)))
                splits = dataclasses.replace(self.splits, evaluation=samples)
                self.selection = self._validator(splits)
        return self.selection

    def _measure(self, path: Path, *, latency: bool = True) -> Stats:
        manager = self.manager
        manager.progress(0, 1, "measuring")
        return measure(
            path,
            self.splits,
            baseline=None if path == self.original else self.original,
            threads=manager.threads,
            providers=manager.providers,
            latency=latency and manager.measure_latency,
            memory=False,
            host=self.host,
        )

    def _loading(self, *paths: Path) -> list[runtime.LoadCost]:
        """Measure how each file loads, in processes of their own; empty if it fails."""
        manager = self.manager
        if not manager.measure_memory:
            return []
        costs = [
            runtime.load_cost(
                path, threads=manager.threads, providers=manager.providers
            )
            for path in paths
        ]
        known = [cost for cost in costs if cost is not None]
        return known if len(known) == len(costs) else []

    # --- state for resume ---------------------------------------------------------

    @functools.cached_property
    def _state_folder(self) -> StateFolder:
        """Where this run can be continued, and what by."""
        manager = self.manager
        return StateFolder(
            self.folder,
            {
                "input": [digest(file) for file in self._given_files()],
                "pipeline": str(manager.pipeline),
                "files": _files_named(manager.pipeline),
                "seed": manager.seed,
                "budget": dataclasses.asdict(self.budget),
                "outputs": list(manager.outputs),
                "on_breach": manager.on_breach,
                "storage": [
                    manager.storage,
                    manager.names,
                    manager.external,
                    manager.max_decode_ratio,
                ],
                "samples": list(self.splits.describe()),
                "data": self.splits.digests(),
                "metric": fingerprint_of(manager.metric),
                "runtime": [
                    runtime.version(),
                    list(manager.providers),
                    manager.threads,
                    {name: list(shape) for name, shape in manager.shapes.items()},
                    [digest(Path(library)) for library in manager.custom_ops],
                ],
            },
        )

    def _given_files(self) -> list[Path]:
        """Return the files that hold the model as it was given."""
        if self.original != self.source.source:
            beside = self.original.parent.glob(f"{glob.escape(self.original.name)}*")
            return sorted(beside)
        return sorted(self.source.files, key=str)

    def _save_state(self, index: int, accepted: _Accepted) -> None:
        """Note the accepted model, after which an interrupted run can continue."""
        if self.target is None:
            return
        model = accepted.model
        self._state_folder.write(
            SavedRun(
                step=index + 1,
                model=accepted.path,
                lineage=model.lineage.to_json(model.value_names()),
                baseline=self.baseline,
                stats=accepted.stats,
                steps=self.steps,
            )
        )

    def _resumed(self) -> tuple[_Accepted, int] | None:
        saved = self._state_folder.read(len(self.manager.pipeline))
        if saved is None:
            return None
        try:
            model = self.source if saved.model is None else Model.load(saved.model)
            model.lineage = Lineage.from_json(saved.lineage)
        except (
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            TypeError,
            ValueError,
            ModelError,
        ) as error:
            raise self._state_folder.unreadable(error) from error
        self.steps = list(saved.steps)
        if saved.baseline is not None:
            self._hold_to(saved.baseline)
        accepted = _Accepted(model, saved.model or self.original, saved.stats)
        return accepted, saved.step

    # --- the end ------------------------------------------------------------------

    def _warnings(self) -> Iterator[str]:
        """Yield what a reader of the last lines must not miss."""
        whys: dict[str, list[str]] = {}
        for name, why in self.untouched.items():
            whys.setdefault(why, []).append(name)
        for why, names in whys.items():
            some = ", ".join(names[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"left alone: {some}{more}: {why}"
        yield from self._doubts()
        yield from dict.fromkeys(self.cautions)

    def _slower(self, path: Path, stats: Stats) -> list[str]:
        """Say that the written model is slower than what came in, beyond noise.

        A ratio that is too high is measured twice more, both models in turn: the least
        counts.
        """
        ratio = stats.latency_ratio
        for _ in range(2):
            if ratio is None or ratio <= _SLOWER:
                return []
            again = self._measure(path).latency_ratio
            ratio = min(ratio, again) if again is not None else ratio
        if ratio is None or ratio <= _SLOWER:
            return []
        changing = [s for s in self.steps if s.accepted and s.pass_name in _PACING]
        places = [
            where
            for step in changing
            for where, _ in step.did
            if where not in ("model", "norms", "training")
        ]
        some = ", ".join(places[:_NAMED])
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        names = " and ".join(dict.fromkeys(s.pass_name for s in changing))
        by = f": {names} changed how {some}{more} run" if places else ""
        return [
            f"slower than what came in, {ratio:.2f}x on this machine{by}; "
            "--max-latency 1 gives up what costs time"
        ]

    def _doubts(self) -> Iterator[str]:
        """Yield what the samples are too few to say."""
        splits = self.splits
        passes = self.manager.pipeline.passes
        if splits.random or all(pass_.promise is Promise.SAME for pass_ in passes):
            return
        seen = splits.calibration
        if seen is not None and seen.used < _FEW:
            yield (
                f"only {seen.used} samples calibrated: ranges and curvatures of so few "
                f"may not hold for others; {_FEW} or more are safer"
            )
        elif seen is None:
            yield "no samples are left to calibrate: what was given only measures"
        if splits.evaluation is None:
            return
        count, budget = splits.evaluation.used, self.final.budget
        step = 1 / max(1, count)
        metric = self.final.reference_metric()
        drop = budget.max_drop
        if (
            drop is not None
            and {"top1", "top5"} & set(metric)
            and (0 < drop < 100 * step)
        ):
            yield (
                f"{count} evaluation samples cannot tell a drop of {drop:g} points: "
                f"one sample is {100 * step:.3g}"
            )
        least = budget.min_agreement
        if least is not None and step > 1 - least > 0:
            yield (
                f"{count} evaluation samples cannot tell an agreement of {least:g}: "
                f"one sample is {step:.3g}"
            )
        if drop is None and least is None and count < _FEWEST:
            yield f"only {count} samples measured: they may not stand for others"

    def _note_run(self, written: Model) -> None:
        """Let a model say what was done to it."""
        manager = self.manager
        written.metadata["onnxshrink.version"] = __version__
        written.metadata["onnxshrink.pipeline"] = str(manager.pipeline)
        written.metadata["onnxshrink.seed"] = str(manager.seed)
        written.metadata["onnxshrink.steps"] = json.dumps(
            [
                {
                    "pass": step.pass_name,
                    "accepted": step.accepted,
                    "metric": step.after.metric,
                }
                for step in self.steps
            ],
            sort_keys=True,
        )

    def _hold_size(self, files: Sequence[Path]) -> None:
        """Refuse to write more than the budget has.

        Raises:
            PromiseError: It is more.
        """
        most = self.budget.max_bytes
        size = sum(file.stat().st_size for file in files)
        if most is None or size <= most:
            return
        gave_way = [step.pass_name for step in self.steps if step.left_out]
        hint = (
            f"{', '.join(gave_way)} gave way to keep the outputs: allow more loss"
            if gave_way
            else "codebook without bits, behind prune, chooses by --max-bytes"
        )
        raise PromiseError(
            f"the model takes {size:,} bytes, more than --max-bytes {most:,}; "
            f"nothing was written; {hint}, or more bytes"
        )

    def _finish(self, accepted: Model, baseline: Stats) -> Result:
        manager = self.manager
        written = accepted.copy()
        written.fit_runtime()
        if manager.names == "short":
            written.shorten_names()
        else:
            self._note_run(written)
        staging = self.folder / "final"
        staging.mkdir(exist_ok=True)
        path = staging / self.name
        files = self._save(written, path, final=True)
        if self._is_idle and _bytes(path) > _bytes(self.original):
            # Nothing was gained: neither notes nor another encoding may cost bytes.
            written = self.source.copy()
            written.fit_runtime()
            files = written.save(path, storage="plain", external=manager.external)
        verdict = self.final.check(path, Promise.CLOSE)
        insists = manager.on_breach == "keep" or verdict.problem == "unmeasured"
        if not verdict.ok and not (insists and verdict.keepable):
            raise PromiseError(f"the written model does not hold: {verdict.reason}")
        self._hold_size(files)
        stats = dataclasses.replace(self._measure(path), metric=verdict.quality())
        notes = list(self.splits.describe())
        if self.splits.labelled and not self.final.reference_metric():
            notes.append(
                "labels take no part: they fit no output as classes; --metric names "
                "what to measure with them"
            )
        gone = _optional_inputs(self.source) - _optional_inputs(written)
        if gone:
            names = sorted(gone)
            few = ", ".join(names[:3]) + (
                f" and {len(names) - 3} more" * (len(names) > 3)
            )
            notes.insert(
                0, f"no inputs any more, with what was their default built in: {few}"
            )
        if self.source.objection:
            notes.append(
                "onnx.checker objects to the model as it came, and onnxruntime runs "
                f"it, which counts: {self.source.objection}"
            )
        if self.baseline != self.original:
            notes.append(
                "agreement and SQNR of what follows the training are against the model "
                "that was taught, since another teacher changed what it answers"
            )
        if self.costs.measured_some:
            notes.append(
                "times of layers that choices were made by are those of this machine; "
                "another one may choose otherwise"
            )
        if stats.latency_ratio is not None:
            notes.append(f"latency is that of this machine: {detect().model}")
        if loading := self._loading(self.original, path):
            first, last = loading
            baseline = dataclasses.replace(
                baseline, peak_memory_bytes=first.peak_memory_bytes
            )
            stats = dataclasses.replace(stats, peak_memory_bytes=last.peak_memory_bytes)
            notes.insert(
                0,
                f"time to load it: {first.seconds * 1000:.1f} ms -> "
                f"{last.seconds * 1000:.1f} ms",
            )
        # Measured on the file that is still in its place.
        warnings = (*self._warnings(), *self._slower(path, stats))
        if self.target is not None:
            files = written.publish(files, self.target)
        report = Report(
            model=str(self.source.source or "model"),
            onnxshrink=__version__,
            pipeline=str(manager.pipeline),
            seed=manager.seed,
            baseline=baseline,
            steps=tuple(self.steps),
            final=stats,
            notes=tuple(notes),
            output=tuple(str(file) for file in files) if self.target else (),
            warnings=warnings,
            proof=self._proof(written, files),
            advice=self._advice(written, baseline, stats),
        )
        _LOG.info("%s", report.summary())
        for line in report.warnings:
            _LOG.warning("%s", line)
        written.source = self.target
        return Result(written, report, files if self.target is not None else ())

    @property
    def _is_idle(self) -> bool:
        """Whether no step changed anything, and a plain model is to be written."""
        changed = any(
            step.accepted and not step.reason.startswith(NOTHING_TO_DO)
            for step in self.steps
        )
        manager = self.manager
        return not (changed or manager.names == "short" or manager.storage == "tiny")

    def _advice(self, written: Model, before: Stats, after: Stats) -> str:
        """Say what would help where nothing was gained."""
        if after.file_bytes < _GAINED * before.file_bytes or not after.file_bytes:
            return ""
        if any(step.pass_name == "quantize" for step in self.steps):
            return ""
        layers = list(find(written, roles=("weight", "table"), fused=True))
        saved = sum(
            layer.weight.nbytes - layer.weight.size
            for layer in layers
            if layer.weight.data_type in FLOATS and not layer.why_not
        )
        share = 100 * saved / after.file_bytes
        if share < _WORTH_SAYING:
            return ""
        return f"int8 would save about {min(share, 99):.0f} %: --recipe int8"

    def _proof(self, written: Model, files: Sequence[Path]) -> Proof:
        """Say of what, where and when the figures are."""
        manager = self.manager
        asked = {
            str(value)
            for pass_ in manager.pipeline
            if (value := pass_.options().get("target")) is not None
        }
        named = [resolve(name)[1] for name in sorted(asked)]
        cpu = detect()
        read = [] if self.source.source is None else self._given_files()
        layers: tuple[LayerSize, ...] = ()
        if files:
            before = {one.name: one.nbytes for one in self.source.weights()}
            layers = layer_sizes(before, files[0])
        kept = files if self.target is not None else ()
        # Of an automatic budget, what the samples measure.
        bounds = {**self.final.budget.to_json(), "max_bytes": self.budget.max_bytes}
        return Proof(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=manager.command,
            budget=bounds,
            data=self.splits.to_json(),
            processor=f"{cpu.model} ({cpu.machine}, {cpu.target})",
            target="; ".join(named),
            onnxruntime=runtime.version(),
            sha256={str(file): digest(file) for file in (*read, *kept)},
            layers=layers,
        )


@contextlib.contextmanager
def _naming(index: int, pass_: Pass, ctx: Context) -> Iterator[None]:
    """Let an error say which step it comes from; any but our own is a bug in a pass."""
    label = _label(index, pass_)
    try:
        yield
    except Cancelled:
        raise
    except OnnxshrinkError as error:
        raise type(error)(f"{label}: {error}") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except Exception as error:
        where = ctx.done[-1][0] if ctx.done else "the start"
        raise PromiseError(
            f"{label} failed after {where}: {type(error).__name__}: {error}; "
            "the model before this step is unharmed and nothing was written"
        ) from error


def _idle(pass_: Pass, before: Model, after: Model, ctx: Context) -> str:
    """Say why a pass had nothing to do; nothing if it changed the model."""
    if fingerprint(before) != fingerprint(after):
        return ""
    nodes = [[node.op for node in model.nodes()] for model in (before, after)]
    if nodes[0] != nodes[1] or before.metadata != after.metadata:
        return ""
    reasons = [
        why if where in (pass_.name, "model") else f"{where}: {why}"
        for where, why in ctx.skips
    ]
    if not reasons:
        return "it found no place to act at"
    more = len(reasons) - 1
    return reasons[0] + (f"; and {more} more (-v names all)" if more else "")


def _optional_inputs(model: Model) -> set[str]:
    """Return the names of the inputs that have a default value."""
    required = {info.name for info in model.inputs}
    return {tensor.name for tensor in model.graph.inputs} - required


def _path_in(data: Any) -> Path | None:
    """Return the path that data was given by, if it was and is there."""
    if isinstance(data, (str, os.PathLike)):
        with contextlib.suppress(ModelError):
            return split_path(str(data))[0]
    return None


def _files_named(pipeline: Pipeline) -> dict[str, str]:
    """Return the digests of files that options of passes name."""
    found = {}
    for number, pass_ in enumerate(pipeline):
        for name, value in pass_.options().items():
            if isinstance(value, Path) and value.is_file():
                found[f"{number}.{name}"] = digest(value)
    return found


def _label(index: int, pass_: Pass) -> str:
    return f"step {index + 1} ({pass_.name})"


def _judged_by(pass_: Pass) -> Promise:
    """Return the promise a pass is judged by inside a run, which has a budget."""
    free = pass_.promise is Promise.SIGNATURE
    return Promise.CLOSE if free else pass_.promise


def _bytes(path: Path) -> int:
    """Bytes of a model file and the data files it refers to."""
    from onnxshrink.measuring.measure import file_bytes

    return file_bytes(path)


def shrink(
    model: Model | str | os.PathLike[str] | bytes | SupportsModelProto,
    passes: str | Sequence[str] | Sequence[Pass] | Pipeline | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    data: Any = None,
    evaluation: Any = None,
    labels: str | None = None,
    transform: Callable[[Any], Any] | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    min_sqnr: float | None = None,
    max_latency: float | None = None,
    max_bytes: int | None = None,
    target: str | None = None,
    output: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Result:
    """Shrink a model: the command line in one call, with the same words.

    Args:
        model: A path, bytes, a ModelProto, a Model or a framework's export result.
        passes: Pipeline text, passes, or a pipeline; by default those of the recipe,
            or ``fold``.
        recipe: Passes from a recipe: the name of one that ships, or a file.
        data: Samples for calibration and training: a path as on the command line, a
            mapping of arrays by input name, an array or tensor, a pair ``(x, y)``, a
            frame, an iterable of batches or rows, ``synthetic``, ``Samples`` or
            ``Splits``.
        evaluation: Samples that only measure; by default a part of ``data``.
        labels: Key of the labels in ``data`` and ``evaluation``.
        transform: What to do to each item of the data, see ``Samples.of``.
        budget: What each pass may cost: a ``Budget``, or a mapping of its fields.
        max_drop: See ``Budget``, like the next ones; not beside ``budget``.
        min_agreement: See ``Budget``.
        min_sqnr: See ``Budget``.
        max_latency: ``Budget.max_latency_ratio``.
        max_bytes: See ``Budget``.
        target: The processor that passes write for, such as ``arm``: their option of
            that name where it is not given.
        output: Where to write; without it the model is only returned.
        report: Where to write the report: ``.json``, ``.md`` or ``.html``.
        resume: Continue an interrupted run, see ``PassManager.run``.
        **options: Everything else ``PassManager`` takes. Progress is shown on a
            terminal and in a notebook unless ``progress`` is given; ``progress=None``
            shows none.

    Raises:
        UsageError: A word is not known; says the nearest one that is.
        OnnxshrinkError: As ``PassManager.run``.
    """
    check_words(options)
    pipeline = _pipeline_of(passes, recipe)
    if target is not None:
        pipeline = pipeline.with_target(target)
    limits = {
        "max_drop": max_drop,
        "min_agreement": min_agreement,
        "min_sqnr": min_sqnr,
        "max_latency_ratio": max_latency,
        "max_bytes": max_bytes,
    }
    limits = {name: value for name, value in limits.items() if value is not None}
    if budget is not None and limits:
        raise UsageError(f"give budget, or {' and '.join(limits)}, not both")
    if isinstance(budget, Mapping):
        limits = dict(budget)
    if limits:
        budget = Budget.of(limits)
    elif isinstance(budget, Mapping):
        budget = None
    place = None if report is None else Path(report)
    for path in (output, report):
        if path is not None:
            paths = {"the data": data, "the evaluation data": evaluation}
            own = None if not isinstance(model, (str, os.PathLike)) else Path(model)
            given = {what: _path_in(one) for what, one in paths.items()}
            keep_apart(Path(path), {"the input itself": own, **given})
    if place is not None and place.suffix not in SUFFIXES:
        raise UsageError(f"a report ends in {', '.join(SUFFIXES)}, not {place.name!r}")
    options.setdefault("command", _call(model, pipeline))
    splits = data if isinstance(data, Splits) else None
    with (
        runtime.custom_operators(options.get("custom_ops", ())),
        _shown(options) as progress,
    ):
        loaded = model if isinstance(model, Model) else Model.load(model)
        if splits is None and (data is not None or evaluation is not None):
            splits = Splits.build(
                loaded,
                data,
                evaluation,
                labels=labels,
                transform=transform,
                seed=int(options.get("seed", 0)),
                trains=pipeline.trains,
                values=options.get("values"),
                batch=options.get("batch"),
            )
        options["progress"] = progress
        manager = PassManager(pipeline, splits=splits, budget=budget, **options)
        result = manager.run(loaded, output, resume=resume)
    if place is not None:
        _write_report(result, place)
    return result


def check_words(options: Mapping[str, Any]) -> None:
    """Refuse options that ``PassManager`` does not have.

    Raises:
        UsageError: Names the nearest word that it has, or that ``shrink`` has.
    """
    own = set(inspect.signature(PassManager.__init__).parameters) - {
        "self",
        "pipeline",
        "splits",
    }
    known = sorted(own | set(inspect.signature(shrink).parameters) - {"options"})
    for name in options:
        if name not in own:
            raise UsageError(
                f"shrink has no option {name!r}.{nearest(name, known)} It has "
                f"{', '.join(known)}"
            )


def _pipeline_of(
    passes: str | Sequence[str] | Sequence[Pass] | Pipeline | None,
    recipe: str | os.PathLike[str] | None,
) -> Pipeline:
    if recipe is not None:
        if passes is not None:
            raise UsageError("give either passes or recipe, not both")
        return Pipeline.from_toml(registry.recipe(os.fspath(recipe)))
    if passes is None:
        return Pipeline.parse("fold")
    if isinstance(passes, Pipeline):
        return passes
    if isinstance(passes, str):
        return Pipeline.parse(passes)
    if isinstance(passes, Pass):
        return Pipeline((passes,))
    if all(isinstance(step, Pass) for step in passes):
        return Pipeline(tuple(passes))  # type: ignore[arg-type]
    return Pipeline.parse([str(step) for step in passes])


def _call(model: Any, pipeline: Pipeline) -> str:
    """Return the call in words, for the report."""
    what = repr(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else "model"
    return f"Python: shrink({what}, {str(pipeline)!r}, ...)"


@contextlib.contextmanager
def _shown(options: Mapping[str, Any]) -> Iterator[Progress | None]:
    """Yield what receives progress: by default a bar, where somebody looks at it."""
    if "progress" in options:
        yield options["progress"]
        return
    with Bar(console(stderr=True)) as bar:
        yield bar


def _write_report(result: Result, place: Path) -> None:
    try:
        with made_folders(place.parent):
            result.report.write(place)
    except OutputError as error:
        done = f"; the model was written to {result.files[0]}" if result.files else ""
        raise OutputError(f"{error}{done}") from error
