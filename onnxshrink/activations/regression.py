"""Inputs of a layer together with what its outputs miss, from two models.

Samples run through a model and a reference, and ``RegressionSums`` collect what least
squares needs. A ``Request`` says which values belong together, and its ``Rows`` how
they are rows of a regression. ``gather`` serves many layers in one run. ``StagedSums``
serves one layer after the other, each as those before it are by then. Memory does not
grow with the samples.

Tested in tests/passes/test_recover.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.activations.staged import HELD_BYTES, Span, StagedRun
from onnxshrink.activations.staged import batches as cut_into
from onnxshrink.errors import ModelError
from onnxshrink.lineage import Origin
from onnxshrink.model import Model
from onnxshrink.model.topology import Variable
from onnxshrink.samples import Samples
from onnxshrink.solvers.least_squares import RegressionSums
from onnxshrink.statistics import ConvWindow
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.tensors import numpy_type

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = [
    "ConvRows",
    "EachChannel",
    "EachOutput",
    "MatrixRows",
    "OutputRows",
    "Request",
    "Rows",
    "StackRows",
    "StagedSums",
    "TransposedConvRows",
    "add",
    "batch_size",
    "divided",
    "gather",
    "pool",
]

Array = NDArray[Any]
Key = TypeVar("Key", bound=Hashable)
Piece = tuple[Array, Array, Array]

GROUP_BYTES = 128 << 20
"""Bytes of activations of one batch, and of sums, that are held at a time."""
HELD = 5
"""One of so many samples judges whether a layer gained by its new values."""
_BATCH = 256
_UNKNOWN_BYTES = 16 << 20
_ROWS = 4096
_CHUNK = 1 << 21


class Rows(ABC):
    """How a layer's inputs and outputs are rows of a regression."""

    @abstractmethod
    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield (inputs, now, wanted) as [groups, rows, ...], few rows at a time.

        Args:
            inputs: What the layer reads.
            now: What it gives, of any shape the layer can have.
            wanted: What it should give, of the same shape.
        """


@dataclass(frozen=True)
class MatrixRows(Rows):
    """Inputs and outputs of a product with a matrix.

    Attributes:
        inputs: Axis of the inputs.
        outputs: Axis of the outputs; ``None`` if there is one output without an axis.
    """

    inputs: int = -1
    outputs: int | None = -1

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield one group."""
        x = _last(inputs, self.inputs)
        y, t = (_last(array, self.outputs) for array in (now, wanted))
        if len(x) != len(y):
            raise ModelError(f"{len(x)} rows of inputs have {len(y)} rows of outputs")
        step = max(1, min(_ROWS, _CHUNK // max(x.shape[1], y.shape[1], 1)))
        for at in range(0, len(x), step):
            rows = slice(at, at + step)
            yield x[None, rows], y[None, rows], t[None, rows]


@dataclass(frozen=True)
class ConvRows(Rows):
    """Patches a Conv reads, and its output there.

    Attributes:
        window: The convolution's window.
        positions: At most this many output positions of a sample are used, on an even
            grid; ``None`` uses all.
    """

    window: ConvWindow
    positions: int | None = None

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield as many groups as the convolution has."""
        window, group = self.window, self.window.group
        patches = window.patches(window.padded(inputs))
        samples, channels = patches.shape[:2]
        axes, reach = len(window.kernel), math.prod(window.kernel)
        out = patches.shape[2 : 2 + axes]
        if now.shape[2:] != out or now.shape[0] != samples:
            raise ModelError(
                f"outputs {list(now.shape)} do not fit patches {list(out)}"
            )
        chosen = np.arange(math.prod(out))
        if self.positions is not None and len(chosen) > self.positions:
            middle = np.arange(self.positions) * 2 + 1
            chosen = middle * len(chosen) // (2 * self.positions)
        count = max(1, min(_ROWS, _CHUNK // max(1, channels * reach)))
        few = max(1, count // max(1, len(chosen)))
        flat = [
            array.reshape(samples, group, -1, math.prod(out)) for array in (now, wanted)
        ]
        for first in range(0, samples, few):
            for left in range(0, len(chosen), count):
                at = chosen[left : left + count]
                spots = np.unravel_index(at, out)
                # Index arrays on adjacent axes: [n, channels, rows, kernel...].
                index: tuple[Any, ...] = (
                    slice(first, first + few),
                    slice(None),
                    *spots,
                )
                taken = patches[index]
                n = len(taken)
                x = taken.reshape(n, group, channels // group, len(at), reach)
                x = x.transpose(1, 0, 3, 2, 4).reshape(group, n * len(at), -1)
                y, t = (
                    array[first : first + few][..., at]
                    .transpose(1, 0, 3, 2)
                    .reshape(group, n * len(at), -1)
                    for array in flat
                )
                yield x, y, t


@dataclass(frozen=True)
class EachChannel(Rows):
    """Each channel is a group: one input, one output; for normalisations."""

    axis: int = 1

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield as many groups as there are channels."""
        x, y, t = (
            _last(array, self.axis).T[..., None] for array in (inputs, now, wanted)
        )
        step = max(1, _CHUNK // max(1, len(x)))
        for at in range(0, x.shape[1], step):
            rows = slice(at, at + step)
            yield x[:, rows], y[:, rows], t[:, rows]


@dataclass(frozen=True)
class EachOutput(Rows):
    """Each output is a group, whose one input is that output as it is."""

    axis: int

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield as many groups as there are outputs; ``inputs`` is not looked at."""
        yield from EachChannel(self.axis).pieces(now, now, wanted)


@dataclass(frozen=True)
class TransposedConvRows(Rows):
    """What a ConvTranspose reads for each output: inputs set apart by its strides.

    Attributes:
        strides: One for each spatial axis.
        rows: The rows of the Conv over that.
    """

    strides: tuple[int, ...]
    rows: ConvRows

    @classmethod
    def of(
        cls, window: ConvWindow, extra: Sequence[int], positions: int
    ) -> TransposedConvRows:
        """Return the rows of a ConvTranspose.

        Args:
            window: Its kernel, strides, pads, dilations and groups.
            extra: Its ``output_padding``.
            positions: At most this many output positions of a sample are used.
        """
        axes = len(window.kernel)
        sizes = zip(window.kernel, window.spreads, strict=True)
        reach = [(size - 1) * spread for size, spread in sizes]
        pads = window.pads or (0,) * (2 * axes)
        begins = [r - p for r, p in zip(reach, pads[:axes], strict=True)]
        ends = [r - p + e for r, p, e in zip(reach, pads[axes:], extra, strict=True)]
        conv = ConvWindow(
            window.kernel, (), (*begins, *ends), window.dilations, window.group
        )
        return cls(window.steps, ConvRows(conv, positions))

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield as many groups as the convolution has."""
        sizes = [
            (size - 1) * stride + 1
            for size, stride in zip(inputs.shape[2:], self.strides, strict=True)
        ]
        apart = np.zeros((*inputs.shape[:2], *sizes), inputs.dtype)
        steps = tuple(slice(None, None, stride) for stride in self.strides)
        apart[(slice(None), slice(None), *steps)] = inputs
        yield from self.rows.pieces(apart, now, wanted)


@dataclass(frozen=True)
class StackRows(Rows):
    """Inputs and outputs of a product with a stack of matrices, a group for each.

    Attributes:
        lead: Shape of the stack.
    """

    lead: tuple[int, ...]

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield one piece."""
        if now.shape[-2 - len(self.lead) : -2] != self.lead:
            raise ModelError(f"outputs {list(now.shape)} repeat its matrices")
        x = np.broadcast_to(inputs, (*now.shape[:-1], inputs.shape[-1]))
        count = math.prod(self.lead)
        found = []
        for array in (x, now, wanted):
            apart = array.reshape(-1, count, *array.shape[-2:]).swapaxes(0, 1)
            found.append(apart.reshape(count, -1, array.shape[-1]))
        yield found[0], found[1], found[2]


@dataclass(frozen=True)
class OutputRows(Rows):
    """Outputs alone, where nothing but a bias may change; inputs have no columns."""

    axis: int = -1

    def pieces(self, inputs: Array, now: Array, wanted: Array) -> Iterator[Piece]:
        """Yield one group; ``inputs`` is not looked at."""
        y, t = (_last(array, self.axis) for array in (now, wanted))
        step = max(1, _CHUNK // max(1, y.shape[1]))
        for at in range(0, len(y), step):
            rows = slice(at, at + step)
            few = y[None, rows]
            yield few[..., :0], few, t[None, rows]


def _last(array: Array, axis: int | None) -> Array:
    """View an array as [rows, channels]."""
    if axis is None:
        return array.reshape(-1, 1)
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def add(
    sums: RegressionSums, rows: Rows, inputs: Array, now: Array, wanted: Array
) -> None:
    """Add the rows of one batch to sums, or note there why that cannot be done.

    Args:
        sums: The sums.
        rows: How the arrays are rows.
        inputs: What the layer reads.
        now: What it gives.
        wanted: What it should give.
    """
    if sums.why_not:
        return
    if now.shape != wanted.shape:
        sums.why_not = _differ(now, wanted)
        return
    try:
        for piece in rows.pieces(*map(_numeric, (inputs, now, wanted))):
            sums.add(*_finite(*piece))
    except ModelError as error:
        sums.why_not = str(error)
        return
    sums.check_finite()


def _finite(inputs: Array, now: Array, wanted: Array) -> Piece:
    """Return a piece without the rows in which one of the three is not finite."""
    whole = [inputs, now, wanted]
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(sum(float(part.sum(dtype=np.float64)) for part in whole)):
            return inputs, now, wanted
    # A row of one group goes with that row of all groups.
    kept = np.logical_and.reduce([np.isfinite(part).all(axis=(0, 2)) for part in whole])
    inputs, now, wanted = (part[:, kept] for part in whole)
    return inputs, now, wanted


def _differ(now: Array, wanted: Array) -> str:
    return (
        f"its outputs are {list(now.shape)}, and those of the reference "
        f"{list(wanted.shape)}"
    )


def _numeric(array: Array) -> Array:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Request:
    """What to watch for one layer.

    Attributes:
        inputs: Value the layer reads; empty if ``rows`` does not look at it.
        outputs: Value it gives.
        wanted: What ``outputs`` was in the reference, and should be.
        rows: How they are rows.
        nbytes: Estimate of the sums' size.
        source: What ``inputs`` was in the reference, if the layer is given that to read
            instead of what the model computes.
        at: Where the layer reads it: index of the node in the graph, and of its input.
        more: Further outputs and what they were, of several layers that are fitted
            together; they are put behind ``outputs``.
        axis: Along which they are.
    """

    inputs: str
    outputs: str
    wanted: Origin
    rows: Rows
    nbytes: int = 0
    source: Origin | None = None
    at: tuple[int, int] = (0, 0)
    more: tuple[tuple[str, Origin], ...] = ()
    axis: int = -1

    @property
    def given(self) -> list[str]:
        """Names of the outputs."""
        return [self.outputs, *(name for name, _ in self.more)]

    @property
    def values(self) -> list[str]:
        """Names of the model's values that it looks at."""
        return [name for name in (self.inputs, *self.given) if name]

    @property
    def references(self) -> list[str]:
        """Names of the reference's values that it looks at."""
        return [self.wanted.name, *(origin.name for _, origin in self.more)]

    def add(
        self,
        sums: RegressionSums,
        inputs: Array | None,
        now: Mapping[str, Any],
        wanted: Mapping[str, Any],
    ) -> None:
        """Add one batch to sums.

        Args:
            sums: The sums.
            inputs: What the layer reads; ``None`` if ``rows`` does not look at it.
            now: Values of the model by name.
            wanted: Values of the reference by name.
        """
        parts = [now[name] for name in self.given]
        origins = [self.wanted, *(origin for _, origin in self.more)]
        should = [origin.take(wanted[origin.name]) for origin in origins]
        for one, other in zip(parts, should, strict=True):
            if one.shape != other.shape:
                sums.why_not = sums.why_not or _differ(one, other)
                return
        outputs = parts[0] if not self.more else np.concatenate(parts, self.axis)
        whole = should[0] if not self.more else np.concatenate(should, self.axis)
        add(sums, self.rows, outputs if inputs is None else inputs, outputs, whole)


def gather(
    model: Model,
    reference: Model,
    requests: Mapping[Key, Request],
    parts: Sequence[Sequence[Samples]],
    ctx: Context,
) -> list[dict[Key, RegressionSums]]:
    """Run both models on the same batches and sum up what each request asks for.

    Values are exposed in groups of bounded size; each group is one session of either
    model, which computes no more than the group needs.

    Args:
        model: The model as it is.
        reference: The model it should be like; it takes the same inputs.
        requests: What to watch.
        parts: For each set of sums the samples that feed it.
        ctx: Session options and progress.

    Returns:
        The sums of each part, under the same keys.

    Raises:
        ModelError: A model does not run on the samples.
    """
    found: list[dict[Key, RegressionSums]] = [
        {key: RegressionSums() for key in requests} for _ in parts
    ]
    first = next((s for part in parts for s in part if s.used), None)
    if first is None or not requests:
        return found
    size = first.batch or batch_size(model, requests, first)
    feed = first.first(size)
    sizes = {name: value.shape for name, value in feed.items()}
    shapes = value_shapes(model, sizes)
    theirs = value_shapes(reference, sizes)
    types = {name: info.data_type for name, info in value_infos(model).items()}

    def nbytes(request: Request) -> int:
        names = [request.inputs, *request.given, *request.given]
        known = [4 * math.prod(shapes[n]) for n in names if n in shapes]
        unknown = len(names) - len(known)
        return sum(known) + unknown * _UNKNOWN_BYTES + request.nbytes

    groups = list(_groups({key: nbytes(r) for key, r in requests.items()}))
    total, done = sum(len(part) for part in parts) * len(groups), 0
    for group in groups:
        chosen = {key: requests[key] for key in group}
        given = {
            key: r.source
            for key, r in chosen.items()
            if r.source is not None
            and r.source.name not in feed
            and r.inputs in types
            and _is_of(r.source, theirs.get(r.source.name), shapes.get(r.inputs))
        }
        cut, names = _cut(model, {key: chosen[key] for key in given}, types, shapes)
        inputs = {key: names.get(key, r.inputs) for key, r in chosen.items()}
        fed = set(feed) | set(names.values()) | {""}
        watched = [*inputs.values(), *(n for r in chosen.values() for n in r.given)]
        ours = _session(cut, [name for name in watched if name not in fed], ctx)
        wished = [name for r in chosen.values() for name in r.references]
        wished += [source.name for source in given.values()]
        other = _session(reference, wished, ctx)
        for samples, sums in zip(parts, found, strict=True):
            for some in samples:
                for batch in some.batches(size):
                    wanted = other.run(batch)
                    feeds = {**batch}
                    feeds |= {
                        names[key]: source.take(wanted[source.name])
                        for key, source in given.items()
                    }
                    now = {**feeds, **ours.run(feeds)}
                    for key, request in chosen.items():
                        read = now[inputs[key]] if inputs[key] else None
                        request.add(sums[key], read, now, wanted)
                done += 1
                ctx.progress(done, total, "comparing with the reference")
    return found


def batch_size(model: Model, requests: Mapping[Key, Request], samples: Samples) -> int:
    """Return samples in a run: many, as each costs an update of the sums."""
    feed = samples.read([0])
    shapes = value_shapes(model, {name: value.shape for name, value in feed.items()})
    names = {name for r in requests.values() for name in (r.inputs, *r.given)}
    largest = max((4 * math.prod(shapes[n]) for n in names if n in shapes), default=0)
    one = max(largest, *(value.nbytes for value in feed.values()), 1)
    return max(4, min(_BATCH, GROUP_BYTES // 16 // one))


class StagedSums:
    """Sums for layers one after the other, in the order of the graph.

    Either model runs once for all of them, a layer's operator twice: before and after
    it is changed. Between calls, weights of the layers asked for so far may change.
    """

    def __init__(
        self,
        model: Model,
        requests: Mapping[str, tuple[Request, Sequence[str], int]],
        ctx: Context,
    ) -> None:
        """Prepare.

        Args:
            model: The model.
            requests: By layer, in the order of the graph: what to watch, the values it
                reads, which no later change has an effect on, and the samples to use at
                most.
            ctx: Samples, reference and session options.
        """
        self._requests = dict(requests)
        self._parts = {
            name: divided(pool(ctx, count)) for name, (_, _, count) in requests.items()
        }
        everything = [s for both in self._parts.values() for part in both for s in part]
        size = 1
        if everything:
            watched = {name: request for name, (request, _, _) in requests.items()}
            size = batch_size(model, watched, everything[0].samples)
        self._batches = cut_into(everything, size)
        half = HELD_BYTES // 2
        self._ours = StagedRun(model, ctx, half)
        self._theirs = StagedRun(ctx.reference, ctx, half)

    def of(self, name: str) -> tuple[RegressionSums, RegressionSums]:
        """Return the sums of a layer; all layers before it are as they will be.

        Args:
            name: The layer; those before it are not asked for any more.

        Returns:
            Sums over the samples to fit, and over those that judge.
        """
        parts = self._parts[name]
        request, settled, _ = self._requests[name]
        for known in list(self._requests):
            del self._requests[known]
            if known == name:
                break
        # What later layers read of other samples may wait.
        mine = [b for b in self._batches if any(b.is_in(s) for p in parts for s in p)]
        later = [other for other, _, _ in self._requests.values()]
        ours = self._ours.values(
            request.values,
            settled,
            [value for other in later for value in other.values],
            mine,
        )
        theirs = self._theirs.values(
            request.references,
            request.references,
            [value for other in later for value in other.references],
            mine,
        )
        fit, held = RegressionSums(), RegressionSums()
        for batch, now, wanted in zip(mine, ours, theirs, strict=True):
            read = now[request.inputs] if request.inputs else None
            for spans, sums in zip(parts, (fit, held), strict=True):
                if any(batch.is_in(span) for span in spans):
                    request.add(sums, read, now, wanted)
        return fit, held


def pool(ctx: Context, count: int) -> list[Span]:
    """Return at most so many samples for calibration and training."""
    parts = []
    for samples in (ctx.samples.calibration, ctx.samples.training):
        if samples is not None and count > 0 and samples.used:
            unit = samples.batch or 1
            some = min(max(count, unit), samples.used) // unit * unit
            parts.append(Span(samples, 0, some))
            count -= some
    return parts


def divided(samples: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Divide samples into those to fit and those to judge; one sample does both."""
    total = sum(map(len, samples))
    unit = samples[0].samples.batch or 1
    held = max(1, total // unit // HELD) * unit
    if total <= held:
        return list(samples), list(samples)
    fit: list[Span] = []
    judge: list[Span] = []
    for span in reversed(samples):
        cut = max(span.start, span.stop - held)
        held -= span.stop - cut
        if cut < span.stop:
            judge.insert(0, replace(span, start=cut))
        if cut > span.start:
            fit.insert(0, replace(span, stop=cut))
    return fit, judge


def _session(model: Model, names: Sequence[str], ctx: Context) -> runtime.Session:
    return runtime.session(
        model,
        threads=ctx.threads,
        providers=ctx.providers,
        expose=list(dict.fromkeys(names)),
        only_exposed=True,
    )


def _cut(
    model: Model,
    requests: Mapping[Key, Request],
    types: Mapping[str, int],
    shapes: Mapping[str, Sequence[int]],
) -> tuple[Model, dict[Key, str]]:
    """Return a copy where layers read new graph inputs, and the names of these."""
    if not requests:
        return model, {}
    copy = model.copy()
    names = {}
    for key, request in requests.items():
        node, index = request.at
        names[key] = copy.fresh("given")
        # The last batch may be smaller.
        shape = [f"{names[key]}_{axis}" for axis in range(len(shapes[request.inputs]))]
        made = Variable(names[key], numpy_type(types[request.inputs]), shape)
        copy.graph.inputs.append(made)
        copy.graph.nodes[node].inputs[index] = made
    return copy, names


def _is_of(
    origin: Origin, theirs: Sequence[int] | None, ours: Sequence[int] | None
) -> bool:
    """Whether a value has the shape that its lineage says."""
    if theirs is None or ours is None:
        return False
    left = [
        len(origin.kept[axis]) if axis in origin.kept else size
        for axis, size in enumerate(theirs)
    ]
    return left == list(ours)


def _groups(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    group: list[Key] = []
    held = 0
    for key, size in sizes.items():
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(key)
        held += size
    if group:
        yield group
