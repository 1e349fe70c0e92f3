"""One copy of a table and of a head that is the table turned.

Exporters compute the Transpose between the table of a language model and its head, so
that both stand in the file: PyTorch's for ``lm_head.weight``, for one. ``tie`` finds
such pairs by their values and lets the head read the table through Transpose again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxshrink.model import Model, Weight
from onnxshrink.structure import layers
from onnxshrink.structure.layers import LinearWeight

__all__ = ["tie"]

FROM = 1 << 12
"""Entries of a table from which one copy is worth a node."""


def tie(
    model: Model, *, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[str]:
    """Let heads that are a table turned read the table, in place.

    Args:
        model: The model; what is not read any more is dropped.
        only: As for ``layers.find``, of tables and heads.
        skip: The same.

    Returns:
        Names of the weights that went.
    """
    found = [
        layer
        for layer in layers.find(
            model, only=only, skip=skip, roles=("weight", "table"), turned=True
        )
        if len(layer.weight.shape) == 2
        and layer.weight.size >= FROM
        and layer.weight.graph is model.graph
        and not (layer.weight.is_input or layer.weight.is_output)
    ]
    tables = [one for one in found if any(use.role == "table" for use in one.uses)]
    gone = []
    for head in found:
        if head in tables or head.why_not or not _is_matrix(head):
            continue
        table = next((t for t in tables if _is_turned(t.weight, head.weight)), None)
        if table is None:
            continue
        node = model.add_node(
            "Transpose",
            [table.weight.value],
            attrs={"perm": [1, 0]},
            name=f"{table.name}_turned",
        )
        gone.append(head.name)
        model.replace_uses(head.weight.value, node.outputs[0])
    if gone:
        model.drop_unused()
    return gone


def _is_matrix(layer: LinearWeight) -> bool:
    kinds: Sequence[str] = ("Gemm", "MatMul")
    return all(use.role == "weight" and use.kind in kinds for use in layer.uses)


def _is_turned(table: Weight, head: Weight) -> bool:
    """Whether a weight has the values of a table, turned."""
    if table.data_type != head.data_type or table.shape != head.shape[::-1]:
        return False
    return np.array_equal(table.read(), head.read().T)
