"""One layer written as several: factors of its weight in place of the weight.

Each function here replaces what one weight does at all nodes that read it. The node
that was there becomes the last of the new ones, so its name, its outputs and its bias
stay; nodes before it bear its name and a number. New weights have the element type of
the old one.

Tested in tests/passes/test_lowrank.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Node, Variable, Weight
from onnxshrink.model.topology import subgraphs_of
from onnxshrink.solvers.decompose import Chain
from onnxshrink.structure.bias import give_bias
from onnxshrink.structure.layers import LinearWeight, Use

__all__ = [
    "add_to_output",
    "decode",
    "place_kernels",
    "place_matrices",
    "place_recurrent",
    "place_table",
    "place_transposed",
    "why_not_conv",
    "why_not_decoded",
    "why_not_here",
    "why_not_product",
]

Array = NDArray[Any]

_WINDOW = ("strides", "dilations", "kernel_shape", "pads", "auto_pad")
_GEMM_FREE = 11
"""Opset from which Gemm needs no addend."""


def why_not_product(model: Model, use: Use) -> str:
    """Return why a MatMul or Gemm cannot be written as two."""
    node = use.node
    if node.op == "Gemm" and model.opset < 7:
        return f"Gemm of opset {model.opset} has a form of its own; raise the opset"
    if len(use.layout.shape) < 2:
        return "it is a vector, which has rank one already"
    return ""


def place_matrices(
    model: Model,
    weight: Weight,
    uses: Sequence[Use],
    factors: Sequence[tuple[Array, Array]],
    shared: gs.Tensor | None = None,
) -> gs.Tensor:
    """Let MatMul and Gemm nodes multiply by two factors, one after the other.

    Args:
        model: The model.
        weight: The weight that goes.
        uses: All readings of it, of one layout.
        factors: For each matrix of the layout ``left`` [outputs, rank] and ``right``
            [rank, inputs].
        shared: What the right factor has made of the inputs elsewhere already; the only
            use is then of a weight that stands on the right.

    Returns:
        What the first factor makes of the inputs, at the last node.
    """
    left = np.stack([pair[0] for pair in factors])
    right = np.stack([pair[1] for pair in factors])
    shape = weight.shape
    use = uses[0]
    # [.., inputs, rank] and [.., rank, outputs] of a weight on the right, as they are
    # multiplied; of one on the left the other way round.
    behind = bool(use.index)
    inner = np.swapaxes(right, 1, 2) if behind else right
    outer = np.swapaxes(left, 1, 2) if behind else left
    if use.is_transposed != behind:  # a Gemm transposes it
        outer = np.swapaxes(outer, 1, 2)
    one = _array(inner, weight, (*shape[:-2], *inner.shape[1:]))
    two = _array(outer, weight, (*shape[:-2], *outer.shape[1:]))
    first = None
    if shared is None:
        first = model.add_weight(f"{weight.name}_in", one, weight.graph)
    second = model.add_weight(f"{weight.name}_out", two, weight.graph)
    parts = [second] if first is None else [first, second]
    model.lineage.split(weight.name, [part.name for part in parts])
    made = shared
    for each in uses:
        node, graph = each.node, _graph_of(model, each.node)
        data = node.inputs[1 - each.index]
        if first is not None:
            made = _first_product(model, each, graph, first, data)
        assert made is not None
        node.inputs[1 - each.index] = made
        node.inputs[each.index] = second
        node.attrs.pop("transA" if behind else "transB", None)
    assert made is not None
    return made


def _first_product(
    model: Model,
    use: Use,
    graph: gs.Graph,
    weight: gs.Tensor,
    data: gs.Tensor,
) -> gs.Tensor:
    """Add the product of the inputs with the first factor before a node."""
    node, behind = use.node, bool(use.index)
    name = f"{node.name or node.op}_in"
    outputs = [Variable(model.fresh(f"{node.outputs[0].name}_in"))]
    pair = [data, weight] if behind else [weight, data]
    is_turned = (use.input_channels == -1) != behind  # a Gemm transposes the inputs
    if not is_turned:
        model.add_node(
            "MatMul", pair, outputs=outputs, name=name, graph=graph, before=node
        )
        return outputs[0]
    if node.op == "FusedMatMul":  # of more than two axes, unlike Gemm
        model.add_node(
            "FusedMatMul",
            pair,
            outputs=outputs,
            attrs={"transA" if behind else "transB": 1},
            domain="com.microsoft",
            name=name,
            graph=graph,
            before=node,
        )
        return outputs[0]
    if model.opset < _GEMM_FREE:
        dtype = weight.dtype
        nothing = np.zeros((1,), dtype)
        pair.append(model.add_weight(f"{name}_zero", nothing, graph))
    model.add_node(
        "Gemm",
        pair,
        outputs=outputs,
        attrs={"transA" if behind else "transB": 1},
        name=name,
        graph=graph,
        before=node,
    )
    return outputs[0]


def add_to_output(model: Model, node: Node, shift: Array, name: str) -> None:
    """Add a vector to what a node gives: through a Gemm's addend, or a new Add.

    Args:
        model: The model.
        node: MatMul, or Gemm without an addend, with ``alpha`` 1; fused or not.
        shift: One value for each output, on the last axis.
        name: Of the new weight.
    """
    graph = _graph_of(model, node)
    added = model.add_weight(name, shift, graph)
    if node.op in ("Gemm", "FusedGemm"):
        give_bias(node, added)
        node.attrs.pop("beta", None)
        return
    old = node.outputs[0]
    inner = Variable(model.fresh(f"{old.name}_plain"))
    node.outputs[0] = inner
    model.add_node(
        "Add",
        [inner, added],
        outputs=[old],
        name=f"{node.name or node.op}_bias",
        graph=graph,
        after=node,
    )


def place_table(
    model: Model, weight: Weight, uses: Sequence[Use], left: Array, right: Array
) -> None:
    """Let Gather nodes look up rows of ``left`` and multiply them by ``right``.

    Args:
        model: The model.
        weight: The table [rows, width].
        uses: Gather nodes that read it along axis 0.
        left: [rows, rank].
        right: [rank, width].
    """
    few = model.add_weight(
        f"{weight.name}_in", _array(left, weight, left.shape), weight.graph
    )
    wide = model.add_weight(
        f"{weight.name}_out", _array(right, weight, right.shape), weight.graph
    )
    model.lineage.split(weight.name, [few.name, wide.name])
    for use in uses:
        node, graph = use.node, _graph_of(model, use.node)
        old = node.outputs[0]
        inner = Variable(model.fresh(f"{old.name}_in"))
        node.inputs[0] = few
        node.outputs[0] = inner
        model.add_node(
            "MatMul",
            [inner, wide],
            outputs=[old],
            name=f"{node.name or node.op}_out",
            graph=graph,
            after=node,
        )


def place_recurrent(
    model: Model, weight: Weight, uses: Sequence[Use], left: Array, right: Array
) -> None:
    """Let recurrent nodes read fewer inputs, made by a product before them.

    Both directions share the product.

    Args:
        model: The model.
        weight: Input weights [directions, gates * hidden, inputs].
        uses: LSTM, GRU or RNN nodes that read it as their input weights.
        left: [directions * gates * hidden, rank].
        right: [rank, inputs].
    """
    first = model.add_weight(
        f"{weight.name}_in", _array(right.T, weight, right.T.shape), weight.graph
    )
    shape = (*weight.shape[:2], left.shape[1])
    second = model.add_weight(
        f"{weight.name}_out", _array(left, weight, shape), weight.graph
    )
    model.lineage.split(weight.name, [first.name, second.name])
    for use in uses:
        node, graph = use.node, _graph_of(model, use.node)
        label = next((t.name for t in node.outputs if t.name), node.op)
        made = Variable(model.fresh(f"{label}_in"))
        model.add_node(
            "MatMul",
            [node.inputs[0], first],
            outputs=[made],
            name=f"{node.name or node.op}_in",
            graph=graph,
            before=node,
        )
        node.inputs[0] = made
        node.inputs[1] = second


def why_not_decoded(layer: LinearWeight) -> str:
    """Return why floats cannot take the place of a layer's codes."""
    assert layer.codes is not None
    if layer.weight.model.constant(layer.codes.scale) is None:
        return "the scale of its codes is computed"
    if any(use.layout != layer.layout for use in layer.uses):
        return "its uses read it in different ways"
    return ""


def decode(model: Model, layer: LinearWeight) -> None:
    """Store a quantized weight as the floats that its codes stand for.

    Its name stays. The nodes that decoded it are left for ``drop_unused``.

    Args:
        model: The model.
        layer: A layer that ``find`` yields with codes, for which ``why_not_decoded``
            has nothing to say.
    """
    decoder, weight = layer.codes, layer.weight
    assert decoder is not None
    known = model.constant(decoder.scale)
    assert known is not None
    scale = known.read()
    values = decoder.decode(weight.read(), scale.astype(np.float32))
    model.set_weight(weight, values.reshape(layer.layout.shape).astype(scale.dtype))
    made = model.weight(weight.name).value
    for use in layer.uses:
        if not any(use.node is node for node in decoder.nodes):
            use.node.inputs[use.index] = made
    # Rows that are looked up before they are decoded are looked up in the floats.
    if any(rows is not None for _, rows in decoder.ends):
        decoder.replace(model, made)


def why_not_here(model: Model, weight: Weight, node: Node) -> str:
    """Return why a node cannot read factors instead of a weight, whatever it is."""
    graph = _graph_of(model, node)
    if graph is weight.graph or not _is_in_function(model, graph):
        return ""
    if _is_in_function(model, weight.graph):
        return ""
    return f"it is handed to function {graph.name}; run fold first"


def _is_in_function(model: Model, graph: gs.Graph) -> bool:
    """Whether a graph is the body of a function, or inside one."""

    def holds(outer: gs.Graph) -> bool:
        return outer is graph or any(
            holds(inner) for node in outer.nodes for inner in subgraphs_of(node)
        )

    return any(holds(function) for function in model.graph.functions)


def why_not_conv(node: Node, form: str) -> str:
    """Return why a convolution cannot be written as several in this form."""
    pads = str(_text(node.attrs.get("auto_pad", "NOTSET"))) or "NOTSET"
    if pads not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        return f"auto_pad={pads} is unknown"
    if node.op == "ConvTranspose" and form != "channel":
        return "a ConvTranspose is split by conv=channel only"
    return ""


def place_kernels(
    model: Model, weight: Weight, uses: Sequence[Use], chains: Sequence[Chain]
) -> None:
    """Let Conv nodes convolve by several kernels, one after the other.

    Each axis is strided, dilated and padded by the one kernel that is long along it,
    so padding stays the zeros it was: no kernel but the last has a bias.

    Args:
        model: The model.
        weight: The kernel [outputs, inputs / group, k1, ..., kn].
        uses: Conv nodes that read it, alike in ``group``.
        chains: The kernels of each group, all of one form and of the same ranks.
    """
    count = len(chains[0].kernels)
    arrays = [
        np.concatenate([chain.kernels[index] for chain in chains])
        for index in range(count)
    ]
    axes = weight.shape[2:]
    owners = _owners(chains[0], len(axes))
    made = [
        model.add_weight(
            f"{weight.name}_{_place(index, count)}",
            _array(array, weight, array.shape),
            weight.graph,
        )
        for index, array in enumerate(arrays)
    ]
    model.lineage.split(weight.name, [part.name for part in made])
    for use in uses:
        node, graph = use.node, _graph_of(model, use.node)
        old = dict(node.attrs)
        data = node.inputs[0]
        for index, tensor in enumerate(made):
            attrs = _window(old, arrays[index].shape[2:], owners, index)
            groups = len(chains)
            if chains[0].form == "cp" and index == 1:  # a kernel for each channel
                groups = len(arrays[index])
            if groups > 1:
                attrs["group"] = groups
            else:
                node.attrs.pop("group", None)
            if index < count - 1:
                name = f"{node.name or node.op}_{_place(index, count)}"
                label = f"{node.outputs[0].name}_{_place(index, count)}"
                made_here = Variable(model.fresh(label))
                model.add_node(
                    "Conv",
                    [data, tensor],
                    outputs=[made_here],
                    attrs=attrs,
                    name=name,
                    graph=graph,
                    before=node,
                )
                data = made_here
                continue
            node.inputs[0], node.inputs[1] = data, tensor
            for key in _WINDOW:
                node.attrs.pop(key, None)
            node.attrs.update(attrs)


def place_transposed(
    model: Model,
    weight: Weight,
    uses: Sequence[Use],
    factors: Sequence[tuple[Array, Array]],
) -> None:
    """Let a 1 x .. x 1 convolution make fewer inputs for ConvTranspose nodes.

    Args:
        model: The model.
        weight: The kernel [inputs, outputs / group, k1, ..., kn].
        uses: ConvTranspose nodes that read it, alike in ``group``.
        factors: For each group ``left`` [outputs / group * k, rank] and ``right``
            [rank, inputs / group].
    """
    ones = (1,) * (len(weight.shape) - 2)
    right = np.concatenate([pair[1] for pair in factors])
    left = np.concatenate([pair[0].T for pair in factors])
    first = model.add_weight(
        f"{weight.name}_in",
        _array(right, weight, (*right.shape, *ones)),
        weight.graph,
    )
    second = model.add_weight(
        f"{weight.name}_out",
        _array(left, weight, (len(left), *weight.shape[1:])),
        weight.graph,
    )
    model.lineage.split(weight.name, [first.name, second.name])
    for use in uses:
        node, graph = use.node, _graph_of(model, use.node)
        attrs: dict[str, Any] = {"kernel_shape": list(ones)}
        if len(factors) > 1:
            attrs["group"] = len(factors)
        made = Variable(model.fresh(f"{node.outputs[0].name}_in"))
        model.add_node(
            "Conv",
            [node.inputs[0], first],
            outputs=[made],
            attrs=attrs,
            name=f"{node.name or node.op}_in",
            graph=graph,
            before=node,
        )
        node.inputs[0], node.inputs[1] = made, second


def _place(index: int, count: int) -> str:
    """Return what a kernel of a chain is called: in, mid, out."""
    if index == count - 1:
        return "out"
    return "in" if index == 0 else "mid"


def _owners(chain: Chain, axes: int) -> list[int]:
    """Return which kernel of a chain steps along each axis.

    It is the one that is long there; along an axis where all are of size 1, the one
    that computes least if it skips positions: the first.
    """
    sizes = [kernel.shape[2:] for kernel in chain.kernels]
    if chain.form == "spatial":
        long = [max(range(2), key=lambda i: sizes[i][axis]) for axis in range(axes)]
        return long
    return [0 if chain.form == "channel" else 1] * axes


def _window(
    old: Mapping[str, Any], kernel: Sequence[int], owners: Sequence[int], index: int
) -> dict[str, Any]:
    """Return the attributes of one convolution of several."""
    axes = len(kernel)
    mine = [owner == index for owner in owners]
    found: dict[str, Any] = {"kernel_shape": [int(size) for size in kernel]}
    if not any(mine):
        return found
    for key in ("strides", "dilations"):
        given = [int(value) for value in old.get(key) or ()]
        values = [v if own else 1 for v, own in zip(given, mine, strict=bool(given))]
        if any(value != 1 for value in values):
            found[key] = values
    pads = [int(value) for value in old.get("pads") or ()]
    automatic = str(_text(old.get("auto_pad", "NOTSET"))) or "NOTSET"
    if automatic != "NOTSET":
        found["auto_pad"] = automatic
    elif any(pads):
        kept = itertools.cycle(mine)
        found["pads"] = [
            pad if own else 0 for pad, own in zip(pads, kept, strict=False)
        ]
        assert len(pads) == 2 * axes
    return found


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def _array(values: Array, weight: Weight, shape: Sequence[int]) -> Array:
    """Return values in the element type of a weight.

    Raises:
        ModelError: They do not fit it.
    """
    assert values.size == math.prod(shape)
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(values).astype(weight.dtype).reshape(tuple(shape))
    if not np.isfinite(found.astype(np.float64)).all():
        raise ModelError(
            f"factors of {weight.name} do not fit {weight.dtype}; leave it out with "
            f"skip={weight.name}"
        )
    return found


def _graph_of(model: Model, node: Node) -> gs.Graph:
    for graph in model.graphs():
        if any(other is node for other in graph.nodes):
            return graph
    raise ModelError(f"node {node.name or node.op} is in no graph of the model")
