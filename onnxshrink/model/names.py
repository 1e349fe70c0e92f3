"""Short names for values and weights that only the model itself refers to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model.exporter import is_function
from onnxshrink.storage.encoder import PREFIX

if TYPE_CHECKING:
    from onnxshrink.model.model import Model

__all__ = ["shorten"]

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def shorten(model: Model) -> int:
    """Give inner values and weights the shortest names, and nodes no names.

    Inputs and outputs of the graph and of functions keep theirs. What is recorded of
    values inside, their types and shapes, goes: a runtime infers it. A graph that has
    annotations of values by name is left as it is.

    Returns:
        How many names are shorter.
    """
    graphs = list(model.graphs())
    for graph in graphs:
        origin = getattr(graph, "origin", None)
        if isinstance(origin, onnx.GraphProto) and origin.quantization_annotation:
            return 0
    fixed = {id(tensor) for tensor in [*model.graph.inputs, *model.graph.outputs]}
    for graph in graphs:
        if is_function(graph):
            fixed |= {id(tensor) for tensor in [*graph.inputs, *graph.outputs]}
    taken = {t.name for t in [*model.graph.inputs, *model.graph.outputs]}
    inside: dict[int, gs.Tensor] = {}
    for graph in graphs:
        for tensor in _values(graph):
            if id(tensor) not in fixed and tensor.name:
                inside[id(tensor)] = tensor
            else:
                taken.add(tensor.name)
        for node in graph.nodes:
            node.name = ""
        graph.value_infos = []
    # Names of all at once: a short one may be another's old one.
    renamed = 0
    spare = _names(taken)
    chosen = [(tensor, next(spare)) for tensor in inside.values()]
    for number, (tensor, _) in enumerate(chosen):
        model._rename(tensor, f"{PREFIX}{PREFIX}{number}")
    for tensor, name in chosen:
        renamed += 1
        model._rename(tensor, name)
        if not isinstance(tensor, gs.Constant):
            tensor.origin = None
    model._names = None
    return renamed


def _values(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """Yield what stands in a graph, weights first."""
    yield from graph.initializers.values()
    yield from graph.inputs
    for node in graph.nodes:
        for tensor in [*node.inputs, *node.outputs]:
            if isinstance(tensor, gs.Variable) or not tensor.inputs:
                yield tensor


def _names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        rest, text = number, ""
        while True:
            rest, digit = divmod(rest, len(_LETTERS))
            text = _LETTERS[digit] + text
            if not rest:
                break
            rest -= 1
        number += 1
        if text not in taken:
            yield text
