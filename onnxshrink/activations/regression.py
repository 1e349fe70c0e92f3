"""Moments of a layer's inputs together with what its outputs miss, from two models.

For each linear layer of a model, ``gather`` streams samples through that model and a
reference and sums up what least squares needs: ``X^T X`` of the inputs the layer sees
now, ``X^T E`` with ``E = Y_reference - Y_now``, and their means (the normal equations,
Golub and Van Loan 2013, section 5.3). Memory does not grow with the samples.

Tested in tests/passes/test_recover.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.model.topology import Variable
from onnxshrink.samples import Samples
from onnxshrink.statistics import ConvWindow
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.tensors import numpy_type

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = [
    "Channels",
    "ConvRows",
    "MatrixRows",
    "Moments",
    "OutputRows",
    "Request",
    "Rows",
    "batch_size",
    "gather",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)
Piece = tuple[Array, Array, Array]

GROUP_BYTES = 128 << 20
"""Bytes of activations of one batch, and of moments, that are held at a time."""
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
class Channels(Rows):
    """Each channel alone: one input, one output; for normalisations."""

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


@dataclass(eq=False)
class Moments:
    """Sums over rows of inputs ``x`` and of what outputs miss, ``e``.

    Products are made in float32 over at most 4,096 rows and summed in float64.

    Attributes:
        rows: Number of rows.
        gram: Sum of ``x x^T``, float64 [groups, inputs, inputs].
        cross: Sum of ``x e^T``, float64 [groups, inputs, outputs].
        inputs: Sum of ``x``, float64 [groups, inputs].
        errors: Sum of ``e``, float64 [groups, outputs].
        squares: Sum of ``e^2``, float64 [groups, outputs].
        wanted: Sum of the reference's outputs, float64 [groups, outputs].
        energy: Sum of their squares, float64 [groups, outputs].
        why_not: Why nothing can be made of it; empty if something can.
    """

    rows: int = 0
    gram: Float64 = field(default_factory=lambda: np.zeros(0))
    cross: Float64 = field(default_factory=lambda: np.zeros(0))
    inputs: Float64 = field(default_factory=lambda: np.zeros(0))
    errors: Float64 = field(default_factory=lambda: np.zeros(0))
    squares: Float64 = field(default_factory=lambda: np.zeros(0))
    wanted: Float64 = field(default_factory=lambda: np.zeros(0))
    energy: Float64 = field(default_factory=lambda: np.zeros(0))
    why_not: str = ""

    @property
    def variance(self) -> float:
        """Variance of the reference's outputs, summed over outputs."""
        rows = max(self.rows, 1)
        spread = self.energy / rows - np.square(self.wanted / rows)
        return float(np.maximum(spread, 0.0).sum())

    def update(self, rows: Rows, inputs: Array, now: Array, wanted: Array) -> None:
        """Add one batch."""
        if self.why_not:
            return
        if now.shape != wanted.shape:
            self.why_not = (
                f"its outputs are {list(now.shape)}, and those of the reference "
                f"{list(wanted.shape)}"
            )
            return
        try:
            for piece in rows.pieces(*map(_numeric, (inputs, now, wanted))):
                self._add(*piece)
        except ModelError as error:
            self.why_not = str(error)
            return
        if not all(
            np.isfinite(part).all() for part in (self.gram, self.cross, self.energy)
        ):
            self.why_not = "its values are not finite, or too large to be squared"

    def _add(self, x: Array, now: Array, wanted: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            error = wanted - now
            across = np.swapaxes(x, 1, 2)
            parts = (
                ("gram", across @ x),
                ("cross", across @ error),
                ("inputs", x.sum(axis=1, dtype=np.float64)),
                ("errors", error.sum(axis=1, dtype=np.float64)),
                ("squares", np.square(error, dtype=np.float64).sum(axis=1)),
                ("wanted", wanted.sum(axis=1, dtype=np.float64)),
                ("energy", np.square(wanted, dtype=np.float64).sum(axis=1)),
            )
        for name, part in parts:
            before = getattr(self, name)
            if not self.rows:
                setattr(self, name, part.astype(np.float64))
            elif before.shape != part.shape:
                raise ModelError("the number of its inputs changes between batches")
            else:
                before += part
        self.rows += x.shape[1]

    def error(self, change: Float64, shift: Float64) -> float:
        """Return the mean squared output error after a change, summed over outputs.

        Args:
            change: What is added to the weights, [groups, outputs, inputs].
            shift: What is added to the outputs, [groups, outputs].
        """
        weights = np.swapaxes(change, 1, 2)
        total = self.squares - 2 * (weights * self.cross).sum(axis=1)
        total += (weights * (self.gram @ weights)).sum(axis=1)
        total += self.rows * shift * shift - 2 * shift * self.errors
        total += 2 * shift * np.einsum("goi,gi->go", change, self.inputs)
        return float(total.sum()) / max(self.rows, 1)


def _numeric(array: Array) -> Array:
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Request:
    """What to watch for one layer.

    Attributes:
        inputs: Value the layer reads; empty if ``rows`` does not look at it.
        outputs: Value it gives.
        wanted: Value of the reference that ``outputs`` should be.
        rows: How they are rows.
        nbytes: Estimate of the moments' size.
        source: Value of the reference that the layer is given to read instead of
            ``inputs``; empty leaves it what the model computes.
        at: Where the layer reads it: index of the node in the graph, and of its input.
    """

    inputs: str
    outputs: str
    wanted: str
    rows: Rows
    nbytes: int = 0
    source: str = ""
    at: tuple[int, int] = (0, 0)


def gather(
    model: Model,
    reference: Model,
    requests: Mapping[Key, Request],
    parts: Sequence[Sequence[Samples]],
    ctx: Context,
) -> list[dict[Key, Moments]]:
    """Run both models on the same batches and gather moments for each request.

    Values are exposed in groups of bounded size; each group is one session of either
    model, which computes no more than the group needs.

    Args:
        model: The model as it is.
        reference: The model it should be like; it takes the same inputs.
        requests: What to watch.
        parts: For each set of moments the samples that feed it.
        ctx: Session options and progress.

    Returns:
        The moments of each part, under the same keys.

    Raises:
        ModelError: A model does not run on the samples.
    """
    found: list[dict[Key, Moments]] = [
        {key: Moments() for key in requests} for _ in parts
    ]
    first = next((s for part in parts for s in part if s.used), None)
    if first is None or not requests:
        return found
    size = first.batch or batch_size(model, requests, first)
    feed = first.read(np.arange(min(size, first.used)))
    sizes = {name: value.shape for name, value in feed.items()}
    shapes = value_shapes(model, sizes)
    theirs = value_shapes(reference, sizes)
    types = {name: info.data_type for name, info in model.infer_shapes().items()}

    def nbytes(request: Request) -> int:
        names = (request.inputs, request.outputs, request.outputs)
        known = [4 * math.prod(shapes[n]) for n in names if n in shapes]
        return sum(known) + (3 - len(known)) * _UNKNOWN_BYTES + request.nbytes

    groups = list(_groups({key: nbytes(r) for key, r in requests.items()}))
    total, done = sum(len(part) for part in parts) * len(groups), 0
    for group in groups:
        chosen = {key: requests[key] for key in group}
        given = {
            key: r.source
            for key, r in chosen.items()
            if r.source not in ("", *feed)
            and r.inputs in types
            and shapes.get(r.inputs, ()) == theirs.get(r.source)
        }
        cut, names = _cut(model, {key: chosen[key] for key in given}, types, shapes)
        inputs = {key: names.get(key, r.inputs) for key, r in chosen.items()}
        fed = set(feed) | set(names.values()) | {""}
        watched = [*inputs.values(), *(r.outputs for r in chosen.values())]
        ours = _session(cut, [name for name in watched if name not in fed], ctx)
        wished = [r.wanted for r in chosen.values()] + list(given.values())
        other = _session(reference, wished, ctx)
        for samples, moments in zip(parts, found, strict=True):
            for some in samples:
                for batch in some.batches(size):
                    wanted = other.run(batch)
                    feeds = {**batch}
                    feeds |= {names[key]: wanted[name] for key, name in given.items()}
                    now = {**feeds, **ours.run(feeds)}
                    for key, request in chosen.items():
                        outputs = now[request.outputs]
                        moments[key].update(
                            request.rows,
                            now[inputs[key]] if inputs[key] else outputs,
                            outputs,
                            wanted[request.wanted],
                        )
                done += 1
                ctx.progress(done, total, "comparing with the reference")
    return found


def batch_size(model: Model, requests: Mapping[Key, Request], samples: Samples) -> int:
    """Return samples in a run: many, as each costs an update of the moments."""
    feed = samples.read([0])
    shapes = value_shapes(model, {name: value.shape for name, value in feed.items()})
    names = {r.inputs for r in requests.values()} | {
        r.outputs for r in requests.values()
    }
    largest = max((4 * math.prod(shapes[n]) for n in names if n in shapes), default=0)
    one = max(largest, *(value.nbytes for value in feed.values()), 1)
    return max(4, min(_BATCH, GROUP_BYTES // 16 // one))


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
