"""A model computed in float32, to be trained where it is stored in halves or doubles.

Gradients of halves vanish: masters of float32 are trained and rounded to the model's
type when they are written back (Micikevicius et al. 2018, Mixed Precision Training,
section 3.1).

Tested in tests/passes/test_distill.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Model
from onnxshrink.model.topology import is_onnx
from onnxshrink.tensors import numpy_type

__all__ = ["narrowed", "widened"]

_T = onnx.TensorProto
_OTHERS = frozenset({_T.FLOAT16, _T.BFLOAT16, _T.DOUBLE})
_TYPED = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype"}
"""Operators that name the type of what they give, and in which attribute."""


def widened(model: Model) -> Model:
    """Return a copy that computes in float32; the model itself if it does already.

    Inputs keep their types, behind a Cast; outputs of other float types are float32.
    """
    if not any(w.data_type in _OTHERS for w in model.weights() if w.size > 1):
        return model
    twin = model.copy()
    for weight in list(twin.weights()):
        if weight.data_type in _OTHERS:
            twin.set_weight(weight, weight.read().astype(np.float32))
    for node in twin.nodes():
        name = _TYPED.get(node.op, "") if is_onnx(node.domain) else ""
        if name and node.attrs.get(name) in _OTHERS:
            node.attrs[name] = int(_T.FLOAT)
        if node.op == "ConstantOfShape" and isinstance(
            node.attrs.get("value"), gs.Constant
        ):
            value = node.attrs["value"]
            if _is_other(value.dtype):
                array = np.asarray(value.values).astype(np.float32)
                node.attrs["value"] = gs.Constant("", array)
    for graph in twin.graphs():
        for tensor in graph.inputs:
            if not isinstance(tensor, gs.Variable) or not _is_other(tensor.dtype):
                continue
            if graph is not twin.graph:
                tensor.dtype = np.dtype(np.float32)
                continue
            cast = twin.add_node("Cast", [tensor], attrs={"to": int(_T.FLOAT)})
            twin.replace_uses(tensor, cast.outputs[0])
            cast.inputs[0] = tensor
        for tensor in graph.outputs:
            if isinstance(tensor, gs.Variable) and _is_other(tensor.dtype):
                tensor.dtype = np.dtype(np.float32)
        for node in graph.nodes:
            for tensor in node.outputs:
                if isinstance(tensor, gs.Variable) and _is_other(tensor.dtype):
                    tensor.dtype = np.dtype(np.float32)
    twin.forget_shapes()
    return twin


def _is_other(dtype: Any) -> bool:
    if dtype is None:
        return False
    if isinstance(dtype, int):
        return dtype in _OTHERS
    return np.dtype(dtype) in {numpy_type(kind) for kind in _OTHERS}


def narrowed(model: Model, wide: Model, trained: Model) -> int:
    """Write what training changed back into a model, in its own types.

    Args:
        model: The model, changed in place.
        wide: ``widened`` of it, before the training.
        trained: The same after it.

    Returns:
        How many weights changed.
    """
    before = {weight.name: weight for weight in wide.weights()}
    after = {weight.name: weight for weight in trained.weights()}
    changed = 0
    for weight in list(model.weights()):
        old, new = before.get(weight.name), after.get(weight.name)
        if old is None or new is None or new.tensor is old.tensor:
            continue
        values = new.read().astype(weight.dtype)
        if np.array_equal(values, weight.read()):
            continue
        model.set_weight(weight, values)
        changed += 1
    return changed
