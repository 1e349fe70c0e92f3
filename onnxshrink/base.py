"""What the author of a pass imports: Pass, SitePass, Site, Promise and Context."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from onnxshrink.errors import UsageError

if TYPE_CHECKING:
    from onnxshrink.model import Model
    from onnxshrink.samples import Samples, Splits
    from onnxshrink.statistics import Statistic
    from onnxshrink.structure.inputs import InputStatistics
    from onnxshrink.structure.layers import LinearWeight

__all__ = [
    "Context",
    "Cost",
    "Costs",
    "Form",
    "Memory",
    "Pass",
    "Progress",
    "Promise",
    "Saved",
    "Savings",
    "Site",
    "SitePass",
]

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


Saved = Literal["bytes", "macs", "seconds"]
"""What sites are ranked by: what the budget asks for."""
_MACS_A_SECOND = 47e9
"""Of a matrix product on the reference processor of ``measuring.costs``."""


@dataclass(frozen=True)
class Savings:
    """What acting at a site saves, as far as it is known before it is done.

    Attributes:
        bytes: Bytes the file loses before encoding; negative if it grows.
        macs: Multiply-accumulates saved for one sample.
        seconds: Time saved in a run on one sample; ``None`` if that is not known.
    """

    bytes: int = 0
    macs: int = 0
    seconds: float | None = None

    def of(self, what: Saved) -> float:
        """Return one of them; seconds that are not known follow from the MACs."""
        if what == "seconds" and self.seconds is None:
            return self.macs / _MACS_A_SECOND
        return float(getattr(self, what))

    def __mul__(self, share: float) -> Savings:
        """Return a share of each."""
        seconds = None if self.seconds is None else self.seconds * share
        return Savings(round(self.bytes * share), round(self.macs * share), seconds)


@dataclass(frozen=True)
class Cost:
    """What a form of a layer costs.

    Attributes:
        bytes: Bytes of its weights.
        macs: Multiply-accumulates for one sample.
        seconds: Time of a run on one sample; ``None`` if that is not known.
    """

    bytes: int = 0
    macs: int = 0
    seconds: float | None = None

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one after the other."""
        known = self.seconds is not None and other.seconds is not None
        return Cost(
            self.bytes + other.bytes,
            self.macs + other.macs,
            (self.seconds or 0.0) + (other.seconds or 0.0) if known else None,
        )

    def __sub__(self, other: Cost) -> Savings:
        """Return what is saved by the other form in place of this one."""
        known = self.seconds is not None and other.seconds is not None
        return Savings(
            self.bytes - other.bytes,
            self.macs - other.macs,
            (self.seconds or 0.0) - (other.seconds or 0.0) if known else None,
        )


class _WithOldNames(type):
    """Takes arguments that a class took before, for one more release."""

    if not TYPE_CHECKING:  # type checkers see the new arguments only

        def __call__(cls, *args: Any, **fields: Any) -> Any:
            """Make an object from old or new arguments."""
            return super().__call__(*cls._renewed(args, fields), **fields)

    def _renewed(cls, args: tuple[Any, ...], fields: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError


def _deprecated(old: str, new: str, level: int = 3) -> None:
    warnings.warn(
        f"{old} goes in the next release; use {new}",
        DeprecationWarning,
        stacklevel=level,
    )


class _SiteType(_WithOldNames):
    """Takes ``bytes_saved``, ``macs_saved`` and ``detail``, by place or by name."""

    def _renewed(cls, args: tuple[Any, ...], fields: dict[str, Any]) -> tuple[Any, ...]:
        names = ("bytes_saved", "macs_saved", "detail")
        by_place = args[2:5] if len(args) > 2 and isinstance(args[2], int) else ()
        old = dict(zip(names, by_place, strict=False))
        old |= {name: fields.pop(name) for name in names if name in fields}
        if not old:
            return args
        for name in old:
            new = "savings=Savings(...)" if name != "detail" else "fields of a subclass"
            _deprecated(f"{cls.__name__}({name}=...)", new, 4)
        if "detail" in old:
            fields["_detail"] = old["detail"]
        if "bytes_saved" in old or "macs_saved" in old:
            before = fields.get("savings", Savings())
            fields["savings"] = Savings(
                old.get("bytes_saved", before.bytes),
                old.get("macs_saved", before.macs),
            )
        return args[:2] if by_place else args


@dataclass(frozen=True)
class Site(metaclass=_SiteType):
    """One place where a pass can act: a weight, a node, a group of channels.

    A pass derives from it where ``rewrite`` needs to know more than the place::

        @dataclass(frozen=True, kw_only=True)
        class PrunedWeight(Site):
            sparsity: float
            order: NDArray[np.int64] = field(repr=False, compare=False)

    The plan shows these fields, and the report names those that back-off changed, but
    for fields with ``repr=False``.

    Attributes:
        where: Name of the weight or node, unique within one plan.
        kind: What stands there, usually the op type that uses it.
        savings: What acting here saves; what back-off and the plan rank by.
        cost: What stands here costs before; with it the plan shows before and after.
    """

    where: str
    kind: str
    savings: Savings = Savings()
    cost: Cost | None = field(default=None, repr=False, kw_only=True)
    _detail: Mapping[str, object] | None = field(default=None, repr=False, kw_only=True)

    def how(self) -> dict[str, object]:
        """Return how the pass acts here: the fields of a subclass that are shown."""
        known = {f.name for f in dataclasses.fields(Site)}
        own = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.repr and f.name not in known
        }
        shown = {
            key: value
            for key, value in own.items()
            if value is not None and not (isinstance(value, str) and not value)
        }
        return {**shown, **(self._detail or {})}

    @property
    def bytes_saved(self) -> int:
        """``savings.bytes``; the name goes in the next release."""
        _deprecated("Site.bytes_saved", "savings.bytes")
        return self.savings.bytes

    @property
    def macs_saved(self) -> int:
        """``savings.macs``; the name goes in the next release."""
        _deprecated("Site.macs_saved", "savings.macs")
        return self.savings.macs

    @property
    def detail(self) -> Mapping[str, object]:
        """What ``how`` returns; the name goes in the next release."""
        _deprecated("Site.detail", "fields of a subclass")
        return self.how()


class Progress(Protocol):
    """Receives how far a long piece of work has come."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are finished."""


Form = Literal["float", "static", "dynamic", "codes"]
"""How a layer computes: in floats; in 8-bit integers, its input and output coded by
fixed scales (QDQ); the same, the input coded at run time; or in floats from weights in
codes (of a MatMul: MatMulNBits; a convolution decodes them when a model is loaded)."""


class Costs(Protocol):
    """What forms of a layer cost: of one that is there, and of those it may become.

    Seconds come from a fixed table, the same on every machine, unless a budget of
    latency asks for what this machine takes; then they are measured.
    """

    @property
    def is_measured(self) -> bool:
        """Whether seconds are those of this machine."""

    def measured(self) -> Costs:
        """Return costs that are measured here, for options such as ``latency=``.

        The report says so, since other machines may decide otherwise.
        """

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        size: Sequence[int],
        *,
        groups: int = 1,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a convolution, its bias not counted.

        Args:
            inputs: Channels in, of all groups.
            outputs: Channels out, of all groups.
            kernel: Extent of the kernel along each axis.
            size: Extent of its output along each axis, for one sample.
            groups: As the attribute ``group`` of Conv.
            form: How it computes.
            itemsize: Bytes of a stored weight.
        """

    def matmul(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        *,
        form: Form = "float",
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a product ``[rows, inputs] @ [inputs, outputs]``.

        Args:
            rows: Rows of the activations of one sample: tokens, or 1.
            inputs: Rows of the weight.
            outputs: Columns of the weight.
            form: How it computes.
            itemsize: Bytes of a stored weight.
        """


class Engine(Protocol):
    """What a context offers from rooms above; handed in by whoever makes it."""

    @property
    def costs(self) -> Costs:
        """What layers cost, see ``Context.costs``."""

    def statistics(
        self, ctx: Context, model: Model, wanted: Mapping[str, Statistic]
    ) -> Mapping[str, Statistic]:
        """Feed statistics with calibration data, see ``Context.statistics``."""

    def inputs(
        self, ctx: Context, layers: Iterable[LinearWeight], grams: bool
    ) -> Mapping[str, InputStatistics]:
        """Gather what layers read, see ``Context.inputs``."""


def _silent(done: int, total: int, what: str) -> None:
    """Discard progress."""


class Memory:
    """What a step has worked out, kept for its next attempts within a limit.

    Where room is short, the large entry that was asked for longest ago goes first. An
    entry that is larger than the limit is not kept.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        """Start with nothing.

        Args:
            limit: Bytes kept at most, counted roughly.
        """
        self.limit = limit
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}
        self._entries: dict[Hashable, tuple[Any, int]] = {}

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is an entry."""
        return key in self._entries

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return an entry, or the default."""
        with self._lock:
            if key not in self._entries:
                return default
            self._entries[key] = entry = self._entries.pop(key)
            return entry[0]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep an entry, if it fits."""
        size = _bytes(value)
        with self._lock:
            self._entries.pop(key, None)
            if size > self.limit:
                return
            self._entries[key] = value, size
            held = sum(size for _, size in self._entries.values())
            for old, (_, freed) in list(self._entries.items()):
                if held <= self.limit:
                    break
                if freed >= _LARGE or held - freed <= self.limit:
                    del self._entries[old]
                    held -= freed

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return an entry; make it if there is none.

        Of several threads that ask at once, one makes it and the others wait.
        """
        with self._lock:
            alone = self._making.setdefault(key, threading.Lock())
        with alone:
            found = self.get(key, _MISSING)
            if found is _MISSING:
                found = make()
                self.put(key, found)
        return found  # type: ignore[no-any-return]


_MISSING = object()
_LARGE = 1 << 20
"""Bytes from which an entry is dropped before those that take less."""


def _bytes(value: object) -> int:
    """Count the bytes of arrays, text and containers that an object holds, roughly."""
    total = 0
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += 64
        size = getattr(one, "nbytes", None)
        if isinstance(size, int):
            total += size
        elif isinstance(one, (bytes, bytearray, str)):
            total += len(one)
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            left += one
        else:
            left += getattr(one, "__dict__", {}).values()
    return total


class _ContextType(_WithOldNames):
    """Takes ``left``."""

    def _renewed(cls, args: tuple[Any, ...], fields: dict[str, Any]) -> tuple[Any, ...]:
        if "left" in fields:
            _deprecated("Context(left=...)", "skips", 4)
            fields["skips"] = fields.pop("left")
        return args


@dataclass
class Context(metaclass=_ContextType):
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
        done: (where, what) of what the pass said it did, in order.
        skips: (where, why) of what the pass said it left alone.
        warnings: What the pass said that a user must not miss.
        cache: Statistics that were gathered already, by model, samples and tensor.
        folder: A folder for files of this step, or ``None`` where no run can be
            resumed. It exists, and is deleted once the step is done. A resumed run
            finds the files again: a pass that keeps its progress here checks that what
            it finds belongs to the same work.
        memory: What ``remember`` keeps; one for all attempts of a step.
        engine: Does what rooms above this one know how to do.
        max_bytes: Bytes that the file may take in the end, if the budget bounds them.
    """

    samples: Splits
    reference: Model
    seed: int = 0
    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    executor: Executor | None = None
    progress: Progress = _silent
    done: list[tuple[str, str]] = field(default_factory=list)
    skips: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)
    folder: Path | None = None
    memory: Memory = field(default_factory=Memory)
    engine: Engine | None = None
    max_bytes: int | None = None

    @property
    def left(self) -> list[tuple[str, str]]:
        """``skips``; the name goes in the next release."""
        _deprecated("Context.left", "skips")
        return self.skips

    def did(self, where: str, what: str) -> None:
        """Record what was done at a weight or node."""
        self.done.append((where, what))

    def skipped(self, where: str, why: str) -> None:
        """Record a weight or node that was left alone, and why."""
        self.skips.append((where, why))

    def warn(self, what: str) -> None:
        """Record what a user must not miss: it stands in the last lines."""
        if what not in self.warnings:
            self.warnings.append(what)

    @property
    def has_data(self) -> bool:
        """Whether there are calibration samples; random inputs are none."""
        samples = self.samples.calibration
        return samples is not None and bool(samples.used) and not self.samples.random

    def need_data(
        self,
        why: str,
        split: Literal["calibration", "training", "validation"] = "calibration",
        *,
        instead: str = "",
    ) -> Samples:
        """Return samples the pass cannot do without; random inputs are none.

        Args:
            why: What they are for, after "to": ``"to see what the layers read"``.
            split: Which of the samples.
            instead: What would do without, such as ``importance=magnitude``.

        Raises:
            UsageError: There are none; says what for, and how to give them.
        """
        samples: Samples | None = getattr(self.samples, split)
        random = self.samples.random
        if samples is not None and samples.used and not random:
            return samples
        words = "there is no data" if random else "the data given leaves none"
        raise UsageError(
            f"{split} samples are needed {why}, and {words}; give "
            f"{'samples' if random else 'more'} with --data, such as --data "
            f"samples.npz (data= in Python){f', or {instead}' if instead else ''}"
        )

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, worked out once for all attempts of the step.

        The manager runs a pass several times before it decides on a step: as asked for,
        weakened while it backs off, and again before each repair. All of them, and the
        passes that repair, see the same memory; the next step starts with none.

        Args:
            key: Says what it is and everything it depends on: the pass and the idea by
                name, options that matter, and the model where it is read
                (``activations.gathering.fingerprint``).
            make: Works it out; pure, since an entry may be forgotten and made again
                where memory is short. Nobody changes what it returns.
        """
        return self.memory.remember(key, make)

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

    def inputs(
        self, layers: Iterable[LinearWeight], *, grams: bool = True
    ) -> Mapping[str, InputStatistics]:
        """Return what layers read on calibration data: Gram matrix, mean and norms.

        Layers that read one tensor in one way share a statistic. Where the matrices of
        all take 256 MB or less, one run gathers them, and the attempts of the step that
        follow find them in memory. Otherwise they are gathered in groups of that size
        when they are asked for, from the model as it is by then; take the layers in
        order, so that the model runs once for each group.

        Args:
            layers: Layers of one model, as ``structure.layers.find`` yields them.
            grams: Whether Gram matrices are wanted, or norms and means are enough.
                A layer with more than 8,192 inputs has none in any case.

        Returns:
            What is known of the inputs of each layer, by the name of its weight; a
            layer whose inputs cannot be seen from outside is absent: a table, one that
            multiplies a constant, one inside a subgraph or function.

        Raises:
            ModelError: There are no calibration samples, or the model does not run.
        """
        return self._engine().inputs(self, layers, grams)

    @property
    def costs(self) -> Costs:
        """Bytes, multiply-accumulates and seconds of forms of a layer.

        Such as ``ctx.costs.matmul(rows, 512, 512) - (ctx.costs.matmul(rows, 512, 64) +
        ctx.costs.matmul(rows, 64, 512))``, which are the ``Savings`` of a low rank;
        ``measuring.costs.layer_cost`` has the cost of a layer of a model.
        """
        return self._engine().costs

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
    renamed: ClassVar[Mapping[str, str]] = {}
    """Options that went: old name -> what to write now, which the error says."""
    opset: ClassVar[int] = 0
    """Lowest ai.onnx opset the rewritten model needs; the manager raises it first."""
    folds: ClassVar[Literal["", "weights", "fused"]] = ""
    """What the manager folds first where it hides layers from the pass: weights behind
    Slice, Concat or Transpose; ``fused``: and operators of onnxruntime's optimizer."""
    repairs: ClassVar[bool] = False
    """Whether it undoes damage: a pass that breaks the budget is judged after it."""
    trains: ClassVar[bool] = False
    """Whether it learns from ``ctx.samples.training``. Where no pass of a pipeline
    does, these samples calibrate and choose instead."""

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

    gradual: ClassVar[bool] = True
    """Whether ``weaken`` gives more the higher the strength. Otherwise it gives one
    milder form for all strengths below 1, which sites fall back to one by one."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @abstractmethod
    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the places this pass would act at; the model is not changed."""

    @abstractmethod
    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Act at one site, in place."""

    def outlook(self, model: Model, ctx: Context) -> Sequence[str]:
        """Return lines that a plan shows below the sites, such as a curve of costs."""
        return ()

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
