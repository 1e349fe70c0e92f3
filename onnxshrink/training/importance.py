"""What an error of an inner value costs the model's outputs, by gradients.

To second order, an error ``d`` at a value moves the outputs ``y`` by ``J d``. With

    f_c = sum over outputs of E[sum over positions of (J^T J)_cc] / E|y|^2

the outputs lose ``sum_c f_c E[d_c^2]`` of their energy, if errors at different
positions, channels and layers are independent: the diagonal of the Gauss-Newton matrix
(Martens and Grosse 2015, section 3), of the outputs instead of a loss. So errors of
different layers can be compared, which errors of layers by themselves cannot.
``J^T J`` is found without a row of ``J`` for each output: gradients of ``s^T y`` for
random signs ``s`` have it as their second moment (Hutchinson 1990).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.activations.padding import mask
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.tensors import numpy_type
from onnxshrink.training.gradients import GradContext, gradients
from onnxshrink.training.preparation import prepare

__all__ = ["mask_gradients", "output_metrics"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

BATCH = 16
"""Samples of a run at most."""
SLICE_BYTES = 256 << 20
"""Bytes of gradients that one run gives at most."""
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE})


def output_metrics(
    model: Model,
    values: Mapping[str, int],
    samples: Samples,
    *,
    seed: int = 0,
    probes: int = 2,
    threads: int = 0,
) -> dict[str, Float64]:
    """Return what errors of each channel of values cost the outputs.

    Args:
        model: The model; it is not changed.
        values: For each value of the main graph the axis of its channels.
        samples: What the model is run on, in batches of one shape.
        seed: Of the random signs.
        probes: Times that each sample is run, with other signs.
        threads: onnxruntime's threads; 0 for its own choice.

    Returns:
        ``f`` by value, float64 [channels]; all zeros where no output depends on it.

    Raises:
        ModelError: There is no float output, or an operator between a value and the
            outputs has no gradient.
    """
    size = samples.batch or max(1, min(BATCH, samples.used))
    batches = [batch for batch in samples.batches(size) if _count(batch) == size]
    if not batches:
        raise ModelError("there are no samples to run")
    shapes = {name: array.shape for name, array in batches[0].items()}
    batches = [b for b in batches if {n: a.shape for n, a in b.items()} == shapes]
    outputs, energies = _outputs(model, batches, threads)
    found: dict[str, Float64] = {}
    for names in _slices(model, shapes, values):
        graph = prepare(model, shapes, keep=names)
        ctx = GradContext(graph)
        upstream = {}
        for tensor in list(graph.graph.outputs):
            if tensor.name in outputs:
                kind = ctx.data_type(tensor)
                shape = ctx.shape(tensor)
                upstream[tensor.name] = ctx.add_input(
                    graph.fresh(f"{tensor.name}_signs"), kind, shape
                )
        grads = gradients(graph, upstream, names, ctx)
        for tensor in grads.values():
            tensor.shape, tensor.dtype = list(ctx.shape(tensor)), ctx.dtype(tensor)
        graph.graph.outputs = list(grads.values())
        for name in names:
            found[name] = np.zeros(1)
        if not grads:
            continue
        graph.drop_unused()
        session = runtime.session(graph, threads=threads, training=True)
        known = {info.name for info in session.inputs}
        rng = np.random.default_rng(seed)
        for batch in batches:
            real = mask(batch)
            for _ in range(probes):
                feeds = {n: a for n, a in batch.items() if n in known}
                for name, tensor in upstream.items():
                    signs = _signs(rng, ctx.shape(tensor), real)
                    scaled = signs / math.sqrt(energies[name])
                    feeds[tensor.name] = scaled.astype(ctx.dtype(tensor))
                answer = session.run(feeds)
                for name, tensor in grads.items():
                    part = _squares(answer[tensor.name], values[name])
                    found[name] = found[name] + part
    total = probes * sum(_count(batch) for batch in batches)
    return {name: np.asarray(matrix / total) for name, matrix in found.items()}


def mask_gradients(
    model: Model,
    values: Mapping[str, int],
    samples: Samples,
    *,
    labels: bool = False,
    seed: int = 0,
    threads: int = 0,
) -> dict[str, Float64]:
    """Return gradients with respect to a mask of ones on each channel of values.

    That is what masking the channel changes to first order, with its sign: the sum
    over positions of a value times its gradient.

    Args:
        model: The model; it is not changed.
        values: For each value of the main graph the axis of its channels.
        samples: What the model is run on, one by one.
        labels: Gradients of the cross-entropy with the samples' labels, where there
            are labels and one output of scores; else of ``s^T y / |y|`` for random
            signs ``s``, whose mean square is what the outputs lose, relative to what
            they are.
        seed: Of the random signs.
        threads: onnxruntime's threads; 0 for its own choice.

    Returns:
        float64 [samples, channels] by value.

    Raises:
        ModelError: As ``output_metrics``.
    """
    batches = list(samples.batches(1))
    if not batches:
        raise ModelError("there are no samples to run")
    shapes = {name: array.shape for name, array in batches[0].items()}
    batches = [b for b in batches if {n: a.shape for n, a in b.items()} == shapes]
    outputs, energies = _outputs(model, batches, threads)
    wanted = samples.labels if labels else None
    if wanted is not None and (len(outputs) != 1 or np.ndim(wanted) != 1):
        wanted = None
    rows: dict[str, list[Array]] = {name: [] for name in values}
    for names in _slices(model, shapes, values):
        graph = prepare(model, shapes, keep=names)
        ctx = GradContext(graph)
        kept = {
            t.name: t
            for node in graph.graph.nodes
            for t in node.outputs
            if t.name in names
        }
        upstream = {}
        scores = [t for t in graph.graph.outputs if t.name in outputs]
        for tensor in scores:
            upstream[tensor.name] = ctx.add_input(
                graph.fresh(f"{tensor.name}_signs"),
                ctx.data_type(tensor),
                ctx.shape(tensor),
            )
        grads = gradients(graph, upstream, [n for n in names if n in kept], ctx)
        for tensor in (*grads.values(), *(kept[name] for name in grads)):
            tensor.shape, tensor.dtype = list(ctx.shape(tensor)), ctx.dtype(tensor)
        held = {t.name: t for t in [*grads.values(), *(kept[n] for n in grads)]}
        graph.graph.outputs = list(held.values())
        if not grads:
            continue
        graph.drop_unused()
        session = runtime.session(graph, threads=threads, training=True)
        known = {info.name for info in session.inputs}
        plain = runtime.session(model, threads=threads) if wanted is not None else None
        rng = np.random.default_rng(seed)
        for number, batch in enumerate(batches):
            real = mask(batch)
            feeds = {n: a for n, a in batch.items() if n in known}
            for name, tensor in upstream.items():
                shape = ctx.shape(tensor)
                up = _signs(rng, shape, real) / math.sqrt(energies[name])
                if plain is not None and wanted is not None:
                    answer = np.asarray(plain.run(batch, [name])[name], np.float64)
                    label = int(wanted[number])
                    if answer.ndim == 2 and 0 <= label < answer.shape[1]:
                        raised = np.exp(answer - answer.max())
                        up = raised / raised.sum()
                        up[0, label] -= 1
                feeds[tensor.name] = np.asarray(up, ctx.dtype(tensor))
            answer_of = session.run(feeds)
            for name, tensor in grads.items():
                both = np.asarray(answer_of[name], np.float64)
                both = both * answer_of[tensor.name]
                moved = np.moveaxis(both, values[name], -1)
                rows[name].append(moved.reshape(-1, moved.shape[-1]).sum(0))
    return {name: np.stack(found) for name, found in rows.items() if found}


def _count(batch: Mapping[str, Array]) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def _signs(
    rng: np.random.Generator, shape: Sequence[int], real: NDArray[np.bool_] | None
) -> Array:
    """Draw signs; what an output gives for padding does not count."""
    signs = rng.integers(0, 2, tuple(shape)) * 2.0 - 1.0
    if real is not None and len(shape) >= 3 and tuple(shape[:2]) == real.shape:
        signs[~real] = 0.0
    return np.asarray(signs)


def _outputs(
    model: Model, batches: Sequence[Mapping[str, Array]], threads: int
) -> tuple[set[str], dict[str, float]]:
    """Return the outputs that count, and the mean energy of each for a sample."""
    names = [info.name for info in model.outputs if info.data_type in _FLOATS]
    if not names:
        raise ModelError("it has no float output, and only these have gradients")
    session = runtime.session(model, threads=threads)
    energies = dict.fromkeys(names, 0.0)
    for batch in batches:
        real = mask(batch)
        for name, value in session.run(batch, names).items():
            wide = np.asarray(value, np.float64)
            if real is not None and wide.ndim >= 3 and wide.shape[:2] == real.shape:
                wide = wide[real]
            energies[name] += float(np.square(wide).sum())
    count = sum(_count(batch) for batch in batches)
    usable = {n: e / count for n, e in energies.items() if 0 < e < math.inf}
    if not usable:
        raise ModelError("it has no float output that is finite and not all zeros")
    return set(usable), usable


def _slices(
    model: Model, shapes: Mapping[str, Sequence[int]], values: Mapping[str, int]
) -> list[list[str]]:
    """Cut the values into groups whose gradients fit a bounded amount of memory."""
    infos = prepare(model, shapes, keep=list(values)).infer_shapes()
    groups: list[list[str]] = []
    room = 0
    for name in values:
        info = infos.get(name)
        if info is None or info.shape is None:
            raise ModelError(f"the shape of {name} cannot be found")
        if info.data_type not in _FLOATS:
            raise ModelError(f"{name} is of a type without gradients")
        count = math.prod(n if isinstance(n, int) else 1 for n in info.shape)
        nbytes = count * numpy_type(info.data_type).itemsize
        if not groups or nbytes > room:
            groups.append([])
            room = SLICE_BYTES
        groups[-1].append(name)
        room -= nbytes
    return groups


def _squares(gradient: Array, axis: int) -> Float64:
    """Return the sum of squares of each channel over all positions."""
    rows = np.moveaxis(gradient, axis, -1)
    wide = np.square(rows.reshape(-1, rows.shape[-1]), dtype=np.float64)
    return np.asarray(wide.sum(axis=0))
