"""What the author of a pass imports: Pass, SitePass, Site, Promise and Context."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

if TYPE_CHECKING:
    from onnxshrink.model import Model
    from onnxshrink.samples import Samples, Splits
    from onnxshrink.statistics import Statistic

__all__ = ["Context", "Pass", "Progress", "Promise", "Site", "SitePass"]

_MOVED = {"selected": "onnxshrink.structure.selection"}
"""Names that lived here before: (name, where it lives now)."""


def __getattr__(name: str) -> Any:
    """Find a name that moved; it works here for one more release."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"import {name} from {_MOVED[name]}; onnxshrink.base loses it in the next "
        "release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(_MOVED[name]), name)


T = TypeVar("T")
R = TypeVar("R")


class Promise(Enum):
    """What a pass leaves as it was; the validator holds the pass to it."""

    SAME = "same"
    """Same outputs up to float noise."""
    CLOSE = "close"
    """Outputs move, within the budget."""
    SIGNATURE = "signature"
    """Only the names, types and shapes of inputs and outputs are kept.

    The budget holds for the run all the same: after the passes that repair.
    """


@dataclass(frozen=True)
class Site:
    """One place where a pass can act: a weight, a node, a group of channels.

    Attributes:
        where: Name of the weight or node, unique within one plan.
        kind: What stands there, usually the op type that uses it.
        bytes_saved: Estimate of the bytes the file loses, for the plan only.
        macs_saved: Estimate of the multiply-accumulates saved for one sample.
        detail: Everything ``rewrite`` needs to act here, printable.
    """

    where: str
    kind: str
    bytes_saved: int = 0
    macs_saved: int = 0
    detail: Mapping[str, object] = field(default_factory=dict)


class Progress(Protocol):
    """Receives how far a long piece of work has come."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are finished."""


class Engine(Protocol):
    """What a context offers from rooms above; handed in by whoever makes it."""

    def statistics(
        self, ctx: Context, model: Model, wanted: Mapping[str, Statistic]
    ) -> Mapping[str, Statistic]:
        """Feed statistics with calibration data, see ``Context.statistics``."""


def _silent(done: int, total: int, what: str) -> None:
    """Discard progress."""


@dataclass
class Context:
    """What a pass may use besides the model; made by the manager, one for each step.

    Attributes:
        samples: Disjoint splits ``calibration``, ``training``, ``validation`` and
            ``evaluation``. A pass reads the first three and never the last.
        reference: The model the run started from; never to be changed.
        seed: Seed of every random draw.
        threads: onnxruntime's intra-op threads, 0 for its own choice.
        providers: onnxruntime execution providers.
        executor: Where ``map`` runs; ``None`` runs in the calling thread.
        progress: Receives progress of long work.
        done: What the pass said it did, in order.
        left: What the pass said it left alone, and why.
        cache: Statistics that an earlier request of the same model already gathered.
        folder: An existing folder of this step's own, whose files are there again when
            an interrupted run is resumed; a pass that keeps its progress here must see
            for itself that what it finds was left by the same work. It is deleted once
            the step is done. ``None`` where nothing could be resumed.
    """

    samples: Splits
    reference: Model
    seed: int = 0
    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    executor: Executor | None = None
    progress: Progress = _silent
    done: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)
    folder: Path | None = None
    engine: Engine | None = None

    def did(self, where: str, what: str) -> None:
        """Record what was done at a weight or node."""
        self.done.append((where, what))

    def skipped(self, where: str, why: str) -> None:
        """Record a weight or node that was left alone, and why."""
        self.left.append((where, why))

    def map(
        self, function: Callable[[T], R], tasks: Iterable[T], what: str = ""
    ) -> list[R]:
        """Return ``[function(task) for task in tasks]``, run on the executor.

        Results come in the order of the tasks and do not depend on the executor.
        For an executor of processes, ``function`` and each task must be picklable.
        """
        work = list(tasks)
        if self.executor is None:
            results = []
            for index, task in enumerate(work):
                results.append(function(task))
                self.progress(index + 1, len(work), what)
            return results
        futures = [self.executor.submit(function, task) for task in work]
        results = []
        try:
            for index, future in enumerate(futures):
                results.append(future.result())
                self.progress(index + 1, len(futures), what)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return results

    def statistics(
        self, model: Model, wanted: Mapping[str, Statistic]
    ) -> Mapping[str, Statistic]:
        """Feed each statistic with the values its tensor takes on calibration data.

        One streaming run over ``samples.calibration`` serves every statistic asked
        for. A statistic that was gathered before for the same model is not run again.

        Args:
            model: The model whose tensors are watched; it is not changed.
            wanted: A fresh statistic for each tensor name.

        Returns:
            The statistics under the same names, fed.
        """
        return self._engine().statistics(self, model, wanted)

    def _engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError(
                "this context has no engine behind it; the manager makes one that has, "
                "and so does onnxshrink.testing.make_context"
            )
        return self.engine


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A rewrite of a model; its fields are its options, its docstring is its help.

    Option types are read from the annotations: ``bool``, ``int``, ``float``, ``str``,
    ``Path``, an ``Enum``, a ``Literal``, ``tuple[T, ...]`` and unions with ``None``.
    Bad values are refused in ``__post_init__`` with a ``UsageError``.
    """

    name: ClassVar[str]
    promise: ClassVar[Promise]
    example: ClassVar[str] = ""
    opset: ClassVar[int] = 0
    """Lowest ai.onnx opset the rewritten model needs; the manager raises it first."""
    repairs: ClassVar[bool] = False
    """Whether it undoes damage: a pass that breaks the budget is judged after it."""

    @abstractmethod
    def apply(self, model: Model, ctx: Context) -> None:
        """Rewrite ``model`` in place; it is the manager's copy."""

    def options(self) -> dict[str, object]:
        """Return the options by name, in declaration order."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def answers(
        self, model: Model, samples: Samples, ctx: Context
    ) -> Mapping[str, Any] | None:
        """Return what outputs should be, if not what they were when the run began.

        A pass that teaches a model something else (distill, by the file of another
        teacher) cannot keep its outputs; it is accepted if it brings them nearer to
        these. The passes after it are held to the taught model.

        Args:
            model: The model before the pass.
            samples: Evaluation samples.
            ctx: Of the step.

        Returns:
            An array by output name, its first axis the samples; or ``None``.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class SitePass(Pass):
    """A pass that acts at many places: list them first, then rewrite each.

    Sites are independent: leaving one out changes nothing at the others.

    Attributes:
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @abstractmethod
    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the places this pass would act at; the model is not changed."""

    @abstractmethod
    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Act at one site, in place."""

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return a gentler form of the site, or ``None`` to leave it out.

        Args:
            site: A site this pass listed.
            strength: Between 0 (leave alone) and 1 (the site as listed).
        """
        return site if strength >= 1.0 else None

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Act at the given sites; override it where they can be worked on together."""
        for index, site in enumerate(sites):
            self.rewrite(model, site, ctx)
            ctx.progress(index + 1, len(sites), self.name)

    def apply(self, model: Model, ctx: Context) -> None:
        """Rewrite every site."""
        self.rewrite_all(model, self.sites(model, ctx), ctx)
