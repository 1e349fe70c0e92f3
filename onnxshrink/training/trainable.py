"""What training may touch: the graph itself says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink._topology import is_onnx, subgraphs_of
from onnxshrink.base import selected
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.training.gradients import _ZERO, is_covered

__all__ = ["Trainable", "attach", "find_trainable", "values_of"]

Array = np.ndarray[Any, Any]
Note = Callable[[str, str], None]

_READ: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Einsum": (0, 1),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GRU": (1, 2, 3),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LSTM": (1, 2, 3),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "Mul": (0, 1),
    "PRelu": (1,),
    "RMSNormalization": (1,),
    "RNN": (1, 2, 3),
}
"""Inputs of operators that hold what was learnt; anything else is a setting."""
_THROUGH = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_LARGEST = 1e4
"""Constants with entries above this are masks, not weights."""
_CODES = frozenset({onnx.TensorProto.INT8, onnx.TensorProto.UINT8})
_PRUNED = 0.5
"""Share of zero codes from which a quantized weight counts as pruned."""


@dataclass(frozen=True, eq=False)
class Trainable:
    """A weight that training may change.

    Attributes:
        name: Name of the weight.
        start: Its values, float32.
        keep: 1 where it may change and 0 where it is zero and stays so, float32;
            ``None`` if all of it may change.
        is_quantized: Whether it is stored as codes that DequantizeLinear reads.
        codes: The least and the largest code it may have: those it has, so that codes
            of few bits stay such.
    """

    name: str
    start: Array
    keep: Array | None = None
    is_quantized: bool = False
    codes: tuple[int, int] = (0, 0)


def find_trainable(
    model: Model,
    outputs: Iterable[str],
    only: Sequence[str],
    skip: Sequence[str],
    note: Note,
) -> list[Trainable]:
    """List the weights that gradients of some outputs reach and that may change.

    Kernels, matrices, tables, biases, scales and shifts of float32 in the main graph
    are trained, and int8 and uint8 ones behind DequantizeLinear. A single number is a
    setting. Zeros of a weight that
    has others stay zero. A vector of zeros is a bias that starts there and may change.
    Statistics of BatchNormalization, scales of quantization and whatever is neither
    learnt nor float are left alone.

    Args:
        model: The model; it is not changed.
        outputs: Names of the outputs that the loss reads.
        only: Names or glob patterns of weights or nodes, or op types; empty is all.
        skip: The same; wins over ``only``.
        note: Receives (weight, reason) for what is frozen and might have been trained.
    """
    reached, blocked = _reach(model, outputs)
    found = []
    for weight in model.weights():
        if not weight.size or not weight.shape:
            continue
        readers = list(_readers(weight.uses))
        learnt = [node for node, index in readers if index in _indices(node)]
        if not learnt:
            continue
        names = [weight.name, *(n for node in learnt for n in (node.name, node.op))]
        if not selected(names, only, skip):
            continue
        key = id(weight.value)
        why = _why_not(weight, readers)
        if not why and key in blocked:
            why = f"gradients cannot pass {blocked[key]}, which has no gradient rule"
        elif not why and key not in reached:
            why = "no output that is taught depends on it"
        if why:
            note(weight.name, why)
            continue
        made = _made(model, weight)
        if isinstance(made, str):
            note(weight.name, made)
        else:
            found.append(made)
    return found


def attach(model: Model, chosen: Sequence[Trainable]) -> None:
    """Rewrite a copy for training: zeros held by masks, integers by float masters.

    Each weight keeps its name and is float32 afterwards, so that a training step can
    make it an input. A masked weight is multiplied with its mask, so that its gradient
    is zero where it is zero. A quantized one is quantized in the graph, which passes
    gradients straight through.
    """
    for one in chosen:
        weight = model.weight(one.name)
        value = weight.value
        if one.is_quantized:
            (reader, _), *_ = weight.uses
            attrs = {key: given for key, given in reader.attrs.items() if key == "axis"}
            model.set_weight(weight, one.start)
            value = model.weight(one.name).value
            node = model.add_node(
                "QuantizeLinear",
                [*reader.inputs],
                attrs=attrs,
                name=f"{one.name}_codes",
                before=reader,
            )
            scale, zero = _scale(model, reader, one.start.ndim)
            ends = [(code - zero) * scale for code in one.codes]
            least, largest = (np.asarray(end, np.float32) for end in ends)
            above = model.add_node(
                "Max", [value, model.add_weight(f"{one.name}_least", least)]
            ).outputs[0]
            node.inputs[0] = model.add_node(
                "Min", [above, model.add_weight(f"{one.name}_largest", largest)]
            ).outputs[0]
            reader.inputs[0] = node.outputs[0]
        if one.keep is None:
            continue
        mask = model.add_weight(f"{one.name}_mask", one.keep)
        node = model.add_node("Mul", [mask, mask], name=f"{one.name}_kept")
        model.replace_uses(value, node.outputs[0])
        node.inputs[0] = value


def values_of(one: Trainable, model: Model, trained: Array) -> Array:
    """Return what is written for a weight: trained values, as codes if it has them."""
    if not one.is_quantized:
        return trained
    weight = model.weight(one.name)
    ((node, _),) = weight.uses
    scale, zero = _scale(model, node, len(weight.shape))
    low, high = one.codes
    codes = np.rint(trained / scale) + zero
    made: Array = np.clip(codes, low, high).astype(weight.dtype)
    return made


def _reach(model: Model, outputs: Iterable[str]) -> tuple[set[int], dict[int, str]]:
    """Return tensors that gradients reach, and those an operator without rule needs."""
    wanted = set(outputs)
    reached: set[int] = set()
    blocked: dict[int, str] = {}
    stack: list[Any] = [t for t in model.graph.outputs if t.name in wanted]
    closed: list[tuple[Node, str]] = []
    while stack:
        tensor = stack.pop()
        if id(tensor) in reached:
            continue
        reached.add(id(tensor))
        for node in tensor.inputs:
            if is_onnx(node.domain) and ("", node.op) in _ZERO:
                continue
            call = any(
                f.name == node.op and (f.domain or "") == (node.domain or "")
                for f in model.graph.functions
            )
            if not call and not is_covered(node.op, node.domain or ""):
                closed.append((node, f"{node.op} {node.name!r}"))
            else:
                stack.extend(node.inputs)
    seen: set[int] = set()
    while closed:
        node, words = closed.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        reads = list(node.inputs)
        inner: list[gs.Graph] = list(subgraphs_of(node))
        while inner:
            graph = inner.pop()
            for child in graph.nodes:
                reads.extend(child.inputs)
                inner.extend(subgraphs_of(child))
        for tensor in reads:
            blocked.setdefault(id(tensor), words)
            closed.extend((maker, words) for maker in tensor.inputs)
    return reached, blocked


def _indices(node: Node) -> tuple[int, ...]:
    return _READ.get(node.op, ()) if is_onnx(node.domain) else ()


def _readers(
    uses: Iterable[tuple[Node, int]], depth: int = 5
) -> Iterable[tuple[Node, int]]:
    """Yield what reads a weight, behind nodes that only move or decode it."""
    for node, index in uses:
        through = node.op in _THROUGH or node.op == "DequantizeLinear"
        if not (through and is_onnx(node.domain) and index == 0 and depth):
            yield node, index
            continue
        after = [
            (reader, at)
            for reader in dict.fromkeys(node.outputs[0].outputs)
            for at, tensor in enumerate(reader.inputs)
            if tensor is node.outputs[0]
        ]
        yield from _readers(after, depth - 1)


def _why_not(weight: Weight, readers: Sequence[tuple[Node, int]]) -> str:
    kind = onnx.TensorProto.DataType.Name(weight.data_type)
    direct = [node for node, _ in weight.uses]
    quantized = [n for n in direct if n.op == "DequantizeLinear"]
    if weight.data_type != onnx.TensorProto.FLOAT and not (
        weight.data_type in _CODES and quantized
    ):
        return f"its values are {kind.lower()}; float32 is trained, or 8-bit codes"
    if weight.is_input:
        return "it is also a graph input, so a caller may override it; run fold first"
    if weight.is_output:
        return "it is also an output of the graph"
    if weight.graph is not weight._model.graph:
        return "it is inside a subgraph or function"
    if quantized and len(direct) > 1:
        return "several nodes read its codes"
    strange = [node for node, index in readers if index not in _indices(node)]
    if strange:
        node = strange[0]
        return f"it is shared with {node.name or 'a node'} ({node.op})"
    return ""


def _made(model: Model, weight: Weight) -> Trainable | str:
    values = weight.read()
    node: Node | None = None
    codes = (0, 0)
    if weight.data_type in _CODES:
        ((node, _),) = weight.uses
        if attribute(node, "block_size", 0):
            return "it has a scale for each block"
        decoded = _scale(model, node, values.ndim)
        if isinstance(decoded, str):
            return decoded
        scale, zero = decoded
        if scale.dtype != np.float32:
            return f"its scale is {scale.dtype}, not float32"
        codes = int(values.min()), int(values.max())
        values = (values.astype(np.float32) - zero) * scale
    if not np.isfinite(values).all():
        return "it holds NaN or infinity"
    if np.abs(values).max() > _LARGEST:
        return f"it holds values above {_LARGEST:g}, as masks do"
    zeros = values == 0
    share = float(zeros.mean())
    if share == 1.0:
        if values.ndim > 1 or node is not None:
            return "all of it is zero, and zeros stay"
        return Trainable(weight.name, np.array(values, np.float32))
    held = share >= _PRUNED if node is not None else share > 0
    keep = (~zeros).astype(np.float32) if held else None
    return Trainable(
        weight.name, np.array(values, np.float32), keep, node is not None, codes
    )


def _scale(model: Model, node: Node, rank: int) -> Any:
    """Return scale and zero point that broadcast over the codes, or why not."""
    parts: list[Array] = []
    for tensor in node.inputs[1:3]:
        known = model.constant(tensor) if tensor.name or tensor.inputs else None
        if known is None:
            if isinstance(tensor, gs.Variable) and not tensor.name:
                continue
            return "its scale is computed from data"
        parts.append(np.asarray(known.read()))
    scale = parts[0]
    zero = parts[1] if len(parts) > 1 else np.zeros((), np.int8)
    axis = int(attribute(node, "axis", 1))
    if scale.size > 1:
        shape = [1] * rank
        shape[axis] = scale.size
        scale, zero = scale.reshape(shape), zero.reshape(shape if zero.size > 1 else ())
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    return scale, zero.astype(np.float32)
