"""BatchNormalization while weights are trained: folded, or estimated again.

``freeze`` keeps mean and variance; nothing need be done. ``estimate`` normalizes with
the statistics of each batch while weights are trained. Afterwards the model runs in
that form over all samples, batch by batch, and mean and variance become the averages
(Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3.2: PreciseBN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.model import Model, Node, Variable, attribute
from onnxshrink.model.topology import is_onnx
from onnxshrink.rewriting.rewriter import Rewriter, Rule
from onnxshrink.rewriting.rules_linear import fold_behind
from onnxshrink.samples import Samples
from onnxshrink.structure.layers import is_float
from onnxshrink.structure.selection import selected

__all__ = [
    "Norms",
    "estimate",
    "find_norms",
    "fold_norms",
    "use_batch_statistics",
    "why_fixed",
]

Norms = Literal["freeze", "fold", "estimate"]
Note = Callable[[str, str], None]

SAMPLES = 2048
"""Samples that statistics are estimated from, if there are as many."""
_BATCH = 128
_OPSET = 15
"""First opset whose training mode gives mean and variance as outputs."""


def fold_norms(model: Model, note: Note) -> int:
    """Move each BatchNormalization behind a linear operator into its weights.

    Zeros of a weight stay zero; equal values of one do not stay equal.

    Args:
        model: The model, edited in place.
        note: Receives (node, reason) for what stays.

    Returns:
        How many are gone.
    """
    rewriter = Rewriter(model, note)
    rewriter.refresh()
    rule = Rule("BatchNormalization folded", ("BatchNormalization",), fold_behind)
    before = _count(model)
    rewriter.run((rule,))
    rewriter.flush()
    model.drop_unused()
    return before - _count(model)


def _count(model: Model) -> int:
    return sum(node.op == "BatchNormalization" for node in model.nodes())


def why_fixed(model: Model, node: Node) -> str:
    """Say why mean and variance of a BatchNormalization cannot change, or nothing."""
    if attribute(node, "training_mode", 0) or len(node.outputs) > 1:
        return "its node is in training mode"
    if model.opset < 9 and not attribute(node, "spatial", 1):
        return "its node does not normalise channels"
    for index in range(1, 5):
        weight = model.constant(node.inputs[index])
        if weight is None or not is_float(weight) or weight.is_input:
            return "a parameter of its node is not a constant"
        if index > 2 and (weight.is_output or weight.uses != ((node, index),)):
            return f"{weight.name} is read by other nodes too"
    return ""


def find_norms(
    model: Model, only: Sequence[str], skip: Sequence[str], note: Note
) -> list[str]:
    """Return the names of the running means that can be estimated again.

    Args:
        model: The model.
        only: Names or glob patterns of means or nodes, or op types; empty is all.
        skip: The same; wins over ``only``.
        note: Receives (mean, reason) for what stays as it is.
    """
    found = []
    for node in model.graph.nodes:
        if not _is_norm(node):
            continue
        mean = model.constant(node.inputs[3])
        label = mean.name if mean is not None else node.name or node.op
        if not selected([label, node.name, node.op], only, skip):
            continue
        why = why_fixed(model, node)
        if why:
            note(label, why)
        else:
            found.append(label)
    return found


def _is_norm(node: Node) -> bool:
    is_norm = node.op == "BatchNormalization" and is_onnx(node.domain)
    return is_norm and len(node.inputs) >= 5


def _nodes(model: Model, names: Sequence[str]) -> dict[str, Node]:
    """Return the nodes of the main graph that read these means."""
    found = {}
    for node in model.graph.nodes:
        mean = model.constant(node.inputs[3]) if _is_norm(node) else None
        if mean is not None and mean.name in names:
            found[mean.name] = node
    return found


def use_batch_statistics(
    model: Model, names: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Let norms of a training copy normalize with the statistics of each batch.

    Args:
        model: The copy, edited in place.
        names: Running means, from ``find_norms``.

    Returns:
        For each the values that hold the batch's mean and variance, [channels] each.
    """
    made = {}
    if names:
        model.require_opset(_OPSET)
    for name, node in _nodes(model, names).items():
        node.attrs["training_mode"] = 1
        # The new running statistics are then those of the batch alone.
        node.attrs["momentum"] = 0.0
        pair = model.fresh(f"{name}_batch_mean"), model.fresh(f"{name}_batch_variance")
        node.outputs.extend(Variable(value) for value in pair)
        made[name] = pair
    return made


def estimate(
    model: Model, names: Sequence[str], samples: Samples, ctx: Context
) -> None:
    """Set running means and variances to those that the model has on samples.

    Args:
        model: The model, edited in place.
        names: Running means, from ``find_norms``.
        samples: At most 2,048 of them are used.
        ctx: Session options.

    Raises:
        ModelError: The model does not run on the samples.
    """
    if not names:
        return
    copy = model.copy()
    values = use_batch_statistics(copy, names)
    exposed = [value for pair in values.values() for value in pair]
    session = runtime.session(
        copy,
        threads=ctx.threads,
        providers=ctx.providers,
        expose=exposed,
        only_exposed=True,
    )
    batch = samples.batch or min(_BATCH, samples.used)
    few = samples.take(slice(0, max(SAMPLES, batch)))
    sizes: list[int] = []
    seen: dict[str, list[NDArray[np.float64]]] = {name: [] for name in exposed}
    for feed in few.batches(batch):
        sizes.append(len(next(iter(feed.values()))))
        for name, value in session.run(feed).items():
            seen[name].append(np.asarray(value, np.float64))
    share = np.asarray(sizes, np.float64) / max(sum(sizes), 1)
    for name, node in _nodes(model, list(values)).items():
        means, variances = (np.stack(seen[value]) for value in values[name])
        mean = share @ means
        variance = share @ (variances + np.square(means - mean))
        _set(model, node, mean, np.maximum(variance, 0.0))


def _set(model: Model, node: Node, *values: NDArray[Any]) -> None:
    for index, array in zip((3, 4), values, strict=True):
        weight = model.constant(node.inputs[index])
        assert weight is not None
        if np.isfinite(array).all():
            model.set_weight(weight, array.astype(weight.dtype).reshape(weight.shape))
