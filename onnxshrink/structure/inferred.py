"""Types and shapes of values, behind operators that ONNX inference does not know too.

onnx infers what follows from ONNX operators. Behind those of com.microsoft, or of a
library of one's own, it knows nothing; onnxruntime does, and says it of every value
that is made an output of an unoptimised session.

Tested in tests/rewriting/test_expansion.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model, ValueInfo

__all__ = ["foreign_values", "state_foreign", "value_infos"]

_CHUNK = 512
"""Values that one session is asked for; each costs it an output."""
_RUN_BYTES = 1 << 28
"""Bytes of feeds up to which a model is run to see shapes that nobody declares."""


def value_infos(
    model: Model, feed: Mapping[str, np.ndarray] | None = None
) -> dict[str, ValueInfo]:
    """Return type and shape of every value that onnx or onnxruntime knows.

    Args:
        model: The model.
        feed: What it is run on where neither knows a shape; that shape is then the one
            of this run.
    """
    infos = model.infer_shapes()
    asked = foreign_values(model, infos)
    if not asked:
        return infos
    twin = model.copy()
    stated = _state(twin, _told(model, asked, feed))
    # What follows from them, onnx infers: sizes that shape arithmetic gives as well.
    return {**stated, **twin.infer_shapes()} if stated else infos


def state_foreign(model: Model, feed: Mapping[str, np.ndarray] | None = None) -> int:
    """Write what onnxruntime knows behind operators that onnx does not into a model.

    ``Model.infer_shapes`` then goes on from there. For copies: it grows a file.

    Returns:
        How many values are stated.
    """
    asked = foreign_values(model, model.infer_shapes())
    return len(_state(model, _told(model, asked, feed))) if asked else 0


def foreign_values(model: Model, infos: Mapping[str, ValueInfo]) -> list[str]:
    """Return the values of the main graph that onnx does not know in full.

    Empty where all operators are ONNX's: what onnx does not know of these, onnxruntime
    does not either.
    """
    if all(_is_known(node.op, node.domain) for node in model.graph.nodes):
        return []
    return [
        tensor.name
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.name and not _is_full(infos.get(tensor.name))
    ]


def _is_known(op: str, domain: str | None) -> bool:
    return onnx.defs.has(op, domain or "") or onnx.defs.has(op, "ai.onnx.ml")


def _is_full(info: ValueInfo | None) -> bool:
    if info is None or not (info.data_type or info.kind != "tensor"):
        return False
    return info.shape is not None and None not in info.shape


def _told(
    model: Model, names: list[str], feed: Mapping[str, np.ndarray] | None
) -> dict[str, ValueInfo]:
    """Return what onnxruntime says of values; of a run where it knows no shape."""
    found: dict[str, ValueInfo] = {}
    for start in range(0, len(names), _CHUNK):
        part = names[start : start + _CHUNK]
        try:
            session = runtime.session(
                model, threads=1, optimize="off", expose=part, only_exposed=True
            )
        except ModelError:
            continue
        found.update((info.name, info) for info in session.outputs)
        open_ones = [n for n in part if n in found and found[n].kind == "tensor"]
        open_ones = [n for n in open_ones if not _is_full(found[n])]
        if not open_ones or feed is None:
            continue
        if sum(value.nbytes for value in feed.values()) > _RUN_BYTES:
            continue
        try:
            for name, value in session.run(feed, open_ones).items():
                if isinstance(value, np.ndarray):
                    known = found[name]
                    found[name] = ValueInfo(name, known.data_type, value.shape)
        except ModelError:
            continue
    return found


def _state(model: Model, told: Mapping[str, ValueInfo]) -> dict[str, ValueInfo]:
    """Enter values into a model's records; return them."""
    listed = {tensor.name for tensor in model.graph.outputs}
    listed |= {tensor.name for tensor in model.graph.inputs}
    stated = {
        name: info
        for name, info in told.items()
        if info.kind == "tensor" and info.data_type and name not in listed
    }
    kept = [info for info in model.graph.value_infos if info.name not in stated]
    for name, info in stated.items():
        kept.append(
            onnx.helper.make_tensor_value_info(name, info.data_type, info.shape)
        )
    model.graph.value_infos = kept
    for node in model.graph.nodes:
        for tensor in node.outputs:
            info_of = stated.get(tensor.name)
            if info_of is not None:
                # An entry counts as long as the value is as it was when it was read.
                tensor.__dict__["origin_info"] = (
                    tensor.dtype,
                    None if tensor.shape is None else tuple(tensor.shape),
                )
    return stated
