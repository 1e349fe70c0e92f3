"""Feeding statistics with the values that tensors take on calibration data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.activations import padding
from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Weight
from onnxshrink.samples import Samples
from onnxshrink.statistics import Statistic
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.tensors import LazyTensor, numpy_type

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["fingerprint", "gather", "unavailable", "values_digest"]

After = Callable[[Iterable[str], int], None]

SLICE_BYTES = 128 << 20
"""Bytes of exposed activations of one batch that are held at a time."""
_BATCH = 32
"""Samples in a run at most, so that progress is reported and kept now and then."""
_FEWEST = 2
"""Samples in a run at least, unless all that is wanted then fits: with fewer, sums cost
more than the sessions that are saved."""
_UNKNOWN_BYTES = 16 << 20


def gather(
    model: Model,
    wanted: Mapping[str, Statistic],
    ctx: Context,
    *,
    slice_bytes: int = SLICE_BYTES,
    samples: Samples | None = None,
    after: After | None = None,
) -> dict[str, Statistic]:
    """Feed each statistic with what its tensor holds on the calibration samples.

    Inputs of the graph are fed without a run. Other values are exposed in groups whose
    activations for one batch fit ``slice_bytes``; each group is a session that computes
    no more than the group needs, and one run over the samples. Known values (weights)
    are fed once. What was gathered before for the same model, samples and statistic is
    taken from ``ctx.cache``. Padding that a mask covers does not count (``padding``).

    Args:
        model: The model; it is not changed.
        wanted: A fresh statistic for each tensor name.
        ctx: Samples, session options, cache and progress.
        slice_bytes: Bytes of activations held at a time.
        samples: Samples to use instead of ``ctx.samples.calibration``.
        after: Called after each batch with the names that were fed and the number of
            samples they have seen so far.

    Returns:
        The statistics under the same names, fed. A tensor that cannot be seen from
        outside, one inside a subgraph or function, is absent; ``unavailable`` says why.

    Raises:
        ModelError: There are no calibration samples, or the model does not run on
            them.
    """
    samples = samples if samples is not None else ctx.samples.calibration
    if samples is None or not samples.used:
        raise ModelError(
            "this needs calibration samples, and there are none; give --data"
        )
    missing = unavailable(model, wanted)
    mark = fingerprint(model)
    found: dict[str, Statistic] = {}
    asked: dict[str, Statistic] = {}
    for name, statistic in wanted.items():
        if name in missing:
            continue
        known = ctx.cache.get((mark, samples, name, statistic.key))
        if known is not None:
            found[name] = known
        else:
            asked[name] = statistic
    constants = _constants(model, asked)
    for name, weight in constants.items():
        _feed(asked[name], name, weight.read())
    if after is not None and constants:
        after(constants, samples.used)
    runs = {name: s for name, s in asked.items() if name not in constants}
    if runs:
        _run(model, runs, samples, ctx, slice_bytes, after)
    for name, statistic in asked.items():
        ctx.cache[mark, samples, name, statistic.key] = statistic
        found[name] = statistic
    return {name: found[name] for name in wanted if name in found}


def unavailable(
    model: Model, names: Mapping[str, Any] | Sequence[str]
) -> dict[str, str]:
    """Return, for each tensor whose values cannot be watched, the reason."""
    reasons: dict[str, str] = {}
    visible = _visible(model)
    inner: dict[str, str] = {}
    for graph in model.graphs():
        if graph is model.graph:
            continue
        kind = "function" if isinstance(graph, gs.Function) else "subgraph"
        for node in graph.nodes:
            for tensor in node.outputs:
                inner.setdefault(tensor.name, kind)
    for name in names:
        if name not in visible:
            reasons[name] = (
                f"it is inside a {inner[name]}"
                if name in inner
                else "the model has no such value"
            )
    return reasons


def _visible(model: Model) -> set[str]:
    graph = model.graph
    names = {tensor.name for tensor in graph.inputs}
    names |= {tensor.name for node in graph.nodes for tensor in node.outputs}
    names |= set(graph.initializers)
    names.discard("")
    return names


def _constants(model: Model, names: Mapping[str, Any]) -> dict[str, Weight]:
    """Return those of some tensors that are weights, whose values no run changes."""
    found: dict[str, Weight] = {}
    tensors = dict(model.graph.initializers)
    for node in model.graph.nodes:
        if node.op == "Constant" and node.outputs:
            tensors[node.outputs[0].name] = node.outputs[0]
    for name in names:
        weight = model.constant(tensors[name]) if name in tensors else None
        if weight is not None and not weight.is_input:
            found[name] = weight
    return found


# --- running ----------------------------------------------------------------------


def _run(
    model: Model,
    wanted: Mapping[str, Statistic],
    samples: Samples,
    ctx: Context,
    slice_bytes: int,
    after: After | None,
) -> None:
    size = _batch_size(model, wanted, samples, slice_bytes)
    feed = samples.first(size)
    sizes = _sizes(model, feed)
    exposed = {name: size for name, size in sizes.items() if name in wanted}
    groups = list(_groups(exposed, slice_bytes))
    inputs = {name: s for name, s in wanted.items() if name in feed}
    total = max(1, len(groups)) * -(-samples.used // size)
    done = 0
    for number, group in enumerate(groups or [()]):
        session = None
        if group:
            session = runtime.session(
                model,
                threads=ctx.threads,
                providers=ctx.providers,
                expose=group,
                only_exposed=True,
            )
        for (_, stop), batch in zip(
            samples.spans(size), samples.batches(size), strict=True
        ):
            real = padding.mask(batch)
            if number == 0:
                for name, statistic in inputs.items():
                    _feed(statistic, name, batch[name], real)
            if session is not None:
                try:
                    values = session.run(batch)
                except ModelError as error:
                    raise ModelError(f"{error}{samples.hint}") from error
                for name in group:
                    _feed(wanted[name], name, values.pop(name), real)
            done += 1
            if after is not None:
                after([*group, *(inputs if number == 0 else ())], stop)
            ctx.progress(min(done, total), total, "calibration")


def _feed(
    statistic: Statistic,
    name: str,
    value: Any,
    real: NDArray[np.bool_] | None = None,
) -> None:
    if not isinstance(value, np.ndarray):
        raise ModelError(
            f"{name!r} holds a {type(value).__name__}, and statistics are of tensors"
        )
    try:
        padding.feed(statistic, value, real)
    except ModelError as error:
        raise ModelError(f"{name!r}: {error}") from error


def _batch_size(
    model: Model, wanted: Mapping[str, Statistic], samples: Samples, limit: int
) -> int:
    """Return how many samples' values fit the limit, within bounds.

    Counted are what is wanted, what is fed, and what the run itself holds: the values
    that the largest node reads and makes.
    """
    if samples.batch:
        return samples.batch
    feed = samples.read([0])
    sizes = _sizes(model, feed)
    one = sum(sizes[name] for name in wanted if name in sizes)
    one += sum(value.nbytes for value in feed.values())
    one += max(
        (
            sum(sizes.get(tensor.name, 0) for tensor in (*node.inputs, *node.outputs))
            for node in model.graph.nodes
        ),
        default=0,
    )
    fit = min(_BATCH, limit // max(1, one))
    return min(max(_FEWEST, fit), samples.used)


def _sizes(model: Model, feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, int]:
    """Return the bytes of each value that nodes make of one feed, in graph order."""
    shapes = value_shapes(model, {name: value.shape for name, value in feed.items()})
    types = {name: info.data_type for name, info in value_infos(model, feed).items()}
    sizes: dict[str, int] = {}
    for name in (t.name for node in model.graph.nodes for t in node.outputs):
        if not name or name in feed:
            continue
        sizes[name] = _UNKNOWN_BYTES
        if name in shapes and types.get(name):
            item = max(1, numpy_type(types[name]).itemsize)
            sizes[name] = math.prod(shapes[name]) * item
    return sizes


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[tuple[str, ...]]:
    """Cut the values to expose into groups of bounded size, in graph order."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield tuple(group)
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield tuple(group)


# --- identity ---------------------------------------------------------------------

_DIGESTS: WeakKeyDictionary[LazyTensor, bytes] = WeakKeyDictionary()
"""Digests of tensors, which never change their values."""


def fingerprint(model: Model) -> str:
    """Return a digest of the graph and of every weight's values.

    A tensor is read once in its life: its digest is remembered.
    """
    digest = hashlib.blake2b(digest_size=16)

    def visit(graph: gs.Graph) -> None:
        for tensor in (*graph.inputs, *graph.outputs):
            digest.update(f"i{tensor.name}\0".encode())
        for name, constant in graph.initializers.items():
            digest.update(f"w{name}\0".encode() + values_digest(constant._values))
        for node in graph.nodes:
            words = [node.domain or "", node.op]
            words += [t.name for t in node.inputs] + ["="]
            words += [t.name for t in node.outputs]
            digest.update(("n" + "\0".join(words) + "\0").encode())
            for key in sorted(node.attrs):
                value = node.attrs[key]
                digest.update(f"a{key}\0".encode())
                if isinstance(value, gs.Constant):
                    digest.update(values_digest(value._values))
                elif isinstance(value, gs.Graph):
                    visit(value)
                elif isinstance(value, np.ndarray):
                    digest.update(np.ascontiguousarray(value).tobytes())
                else:
                    digest.update(repr(value).encode())

    visit(model.graph)
    for function in model.graph.functions:
        digest.update(f"f{function.domain}\0{function.name}\0".encode())
        visit(function)
    return digest.hexdigest()


def values_digest(values: Any) -> bytes:
    """Return a digest of type, shape and values; of a tensor, read once in its life."""
    if not isinstance(values, LazyTensor):
        return hashlib.blake2b(
            np.ascontiguousarray(values).tobytes(), digest_size=16
        ).digest()
    known = _DIGESTS.get(values)
    if known is None:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{values.data_type}{values.shape}".encode())
        if values.dtype.kind == "O":
            digest.update(repr(values.read().tolist()).encode())
        else:
            for chunk in values.raw_chunks():
                digest.update(chunk)
        known = digest.digest()
        _DIGESTS[values] = known
    return known
