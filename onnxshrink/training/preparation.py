"""A model made ready for gradients: static shapes, one flat graph, a recent opset.

Tested in tests/training/test_trainable.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.model import Model, Node
from onnxshrink.model.topology import is_onnx, subgraphs_of
from onnxshrink.rewriting.expansion import expand
from onnxshrink.rewriting.inlining import inline_functions
from onnxshrink.structure.inferred import state_foreign
from onnxshrink.training.gradients import sorted_nodes
from onnxshrink.training.rules_recurrent import unroll

__all__ = ["OPSET", "prepare"]

OPSET = 18
"""Lowest ai.onnx opset of the nodes that the rules emit."""
_SMALL = 1 << 16
"""Elements up to which a value of the shape arithmetic is computed in advance."""
_RANDOM = frozenset(
    [
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
    ]
)


def prepare(
    model: Model, shapes: Mapping[str, Sequence[int]], keep: Collection[str] = ()
) -> Model:
    """Return a copy whose shapes are static, for one size of the batch.

    Functions are inlined, operators of com.microsoft become the ONNX operators they are
    made of, the opset is raised to 18 where it is lower, and what
    computes shapes (Shape, Gather, Concat, ...) becomes constants, as do other small
    values that depend on no input. LSTM, GRU and RNN nodes that depend on a value of
    ``keep`` are unrolled.

    Args:
        model: The model; it is not changed.
        shapes: The full shape of every input by name.
        keep: Names of values that must stay as they are, such as the weights that will
            be trained: nothing that depends on them is computed in advance.

    Raises:
        UsageError: A shape is missing or does not fit its input.
        ModelError: The functions or the opset are in the way.
    """
    twin = model.copy()
    twin.freeze_inputs()
    inline_functions(twin)
    twin.require_opset(OPSET)
    known = {info.name: info for info in twin.inputs}
    for name in shapes:
        if name not in known:
            raise UsageError(f"the model has no input {name!r}.{nearest(name, known)}")
    for tensor in twin.graph.inputs:
        info = known[tensor.name]
        if tensor.name in shapes:
            shape = [int(n) for n in shapes[tensor.name]]
        elif info.shape is not None and all(isinstance(n, int) for n in info.shape):
            shape = [int(n) for n in info.shape if n is not None]
        else:
            raise UsageError(f"no shape is given for input {tensor.name!r}")
        fits = info.shape is None or (
            len(info.shape) == len(shape)
            and all(
                not isinstance(a, int) or a == b
                for a, b in zip(info.shape, shape, strict=True)
            )
        )
        if not fits:
            raise UsageError(
                f"input {tensor.name!r} has the shape {list(info.shape or ())}, which "
                f"{shape} does not fit"
            )
        tensor.shape = shape
    twin.forget_shapes()
    for tensor in twin.graph.outputs:
        if isinstance(tensor, gs.Variable):
            tensor.shape = None
    expand(twin, training=True)
    state_foreign(twin)
    while _fold(twin, frozenset(keep)):
        pass
    if unroll(twin, keep):
        while _fold(twin, frozenset(keep)):
            pass
    twin.drop_unused()
    return twin


def _fold(model: Model, keep: frozenset[str]) -> int:
    """Compute in advance what is known by now; return how many nodes went."""
    infos = model.infer_shapes()
    values: dict[int, np.ndarray[Any, Any]] = {}
    count = 0

    def shape_of(tensor: gs.Tensor) -> tuple[int, ...] | None:
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        info = infos.get(tensor.name)
        if info is None or info.shape is None:
            return None
        if not all(isinstance(n, int) for n in info.shape):
            return None
        return tuple(int(n or 0) for n in info.shape)

    def value_of(tensor: gs.Tensor) -> np.ndarray[Any, Any] | None:
        if id(tensor) in values:
            return values[id(tensor)]
        if tensor.name in keep:
            return None
        weight = model.constant(tensor)
        if weight is None or weight.size > _SMALL or weight.name in keep:
            return None
        return weight.read()

    for node in sorted_nodes(model):
        if not is_onnx(node.domain) or len(node.outputs) != 1:
            continue
        if node.op in _RANDOM or node.op == "Constant" or any(subgraphs_of(node)):
            continue
        out = node.outputs[0]
        if out.name in keep:
            continue
        if node.op == "Identity" and any(out is one for one in model.graph.outputs):
            continue  # it carries a constant to an output, as folding would again
        result: np.ndarray[Any, Any] | None = None
        if node.op in ("Shape", "Size"):
            shape = shape_of(node.inputs[0])
            if shape is None:
                continue
            start = node.attrs.get("start", 0)
            end = node.attrs.get("end", len(shape))
            cut = shape[start:end]
            result = np.asarray(cut, np.int64)
            if node.op == "Size":
                result = np.asarray(np.prod(shape, dtype=np.int64))
        else:
            reads = [t for t in node.inputs if t.name or isinstance(t, gs.Constant)]
            found = [value_of(t) for t in reads]
            if any(v is None for v in found):
                continue
            shape = shape_of(out)
            if shape is not None and np.prod(shape) > _SMALL:
                continue
            result = _evaluate(model, node, [v for v in found if v is not None], reads)
            if result is None or result.size > _SMALL:
                continue
        values[id(out)] = result
        constant = model.add_weight(f"{out.name}_value", result)
        values[id(constant)] = result
        model.replace_uses(out, constant)
        model.remove(node, model.graph)
        count += 1
    return count


def _evaluate(
    model: Model,
    node: Node,
    values: Sequence[np.ndarray[Any, Any]],
    reads: Sequence[gs.Tensor],
) -> np.ndarray[Any, Any] | None:
    """Return what a node makes of known inputs, or ``None`` if it cannot be run."""
    from onnxshrink import runtime

    names = {id(tensor): f"x{index}" for index, tensor in enumerate(reads)}
    try:
        attrs: dict[str, Any] = {
            key: onnx.numpy_helper.from_array(np.asarray(value.values))
            if isinstance(value, gs.Tensor)
            else value
            for key, value in node.attrs.items()
        }
        proto = onnx.helper.make_node(
            node.op, [names.get(id(t), "") for t in node.inputs], ["y"], **attrs
        )
        feeds = {
            names[id(tensor)]: np.asarray(value)
            for tensor, value in zip(reads, values, strict=True)
        }
        graph = onnx.helper.make_graph(
            [proto],
            "fold",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
                )
                for name, value in feeds.items()
            ],
            [onnx.ValueInfoProto(name="y")],
        )
        made = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", model.opset)],
            ir_version=min(model.ir_version, 10),
        )
        answer = runtime.run_proto(made, feeds)[0]
    except (ModelError, TypeError, ValueError):
        return None
    return answer if isinstance(answer, np.ndarray) else None
