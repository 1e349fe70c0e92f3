"""Products: linear operators that together stand for one linear operator.

A pass that writes ``Y = X W`` as ``(X A) B`` leaves two operators for one, and a value
between them that nothing else reads. So do convolutions k x 1 and 1 x k, a depthwise
and a pointwise one, and several such branches whose outputs are added. ``find`` follows
a value upwards through such values and returns the whole as a ``Product`` of factors,
each of which is one matrix, or one for each tap of a kernel. ``fan`` is for operators
that read one input and share the first factor, as query, key and value may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.model import Model, Node
from onnxshrink.model.topology import is_onnx, returned_by
from onnxshrink.statistics import ConvWindow
from onnxshrink.structure.layers import LinearWeight

__all__ = ["Place", "Product", "fan", "find"]

Array = NDArray[Any]

_LONGEST = 8
"""Operators in a row at most."""
_MOST = 64
"""Branches at most."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the weight of an operator stands in a factor.

    Attributes:
        layer: The operator's weight.
        outputs: First row of the factor that it has.
        inputs: First column of the factor that it has.
    """

    layer: LinearWeight
    outputs: int
    inputs: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs of all groups together."""
        groups, outputs, inputs = self.layer.layout.matrices_shape
        taps = math.prod(self.taps)
        return groups * outputs, groups * inputs // taps

    @property
    def taps(self) -> tuple[int, ...]:
        """Sizes of the kernel; empty for a matrix."""
        is_conv = self.layer.kind == "Conv"
        return self.layer.weight.shape[2:] if is_conv else ()

    @property
    def slices(self) -> tuple[Any, ...]:
        """Where it is in an array [*taps, outputs, inputs]."""
        outputs, inputs = self.sizes
        return (
            ...,
            slice(self.outputs, self.outputs + outputs),
            slice(self.inputs, self.inputs + inputs),
        )

    def dense(self, array: Array) -> Array:
        """Return an array of the weight's shape as matrices without groups.

        Returns:
            [*taps, outputs, inputs], zeros between groups; times alpha of Gemm.
        """
        if self.layer.kind != "Conv":
            matrix = self.layer.layout.matrices(array)[0]
            alpha = self.layer.uses[0].alpha
            scaled = matrix if alpha == 1.0 else matrix * array.dtype.type(alpha)
            return np.asarray(scaled)
        outputs, inputs = self.sizes
        made = np.zeros((*self.taps, outputs, inputs), array.dtype)
        moved = np.moveaxis(array, (0, 1), (-2, -1))
        for rows, columns in self._groups():
            made[..., rows, columns] = moved[..., rows, :]
        return made

    def weight(self, dense: Array) -> Array:
        """Return the array of the weight's shape that ``dense`` makes this of."""
        if self.layer.kind != "Conv":
            alpha = self.layer.uses[0].alpha
            matrix = dense if alpha == 1.0 else dense / dense.dtype.type(alpha)
            return self.layer.layout.array(matrix[None])
        shape = self.layer.weight.shape
        moved = np.zeros((*shape[2:], *shape[:2]), dense.dtype)
        for rows, columns in self._groups():
            moved[..., rows, :] = dense[..., rows, columns]
        return np.ascontiguousarray(np.moveaxis(moved, (-2, -1), (0, 1)))

    def _groups(self) -> list[tuple[slice, slice]]:
        outputs, inputs = self.sizes
        groups = self.layer.groups
        rows, columns = outputs // groups, inputs // groups
        return [
            (slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns))
            for g in range(groups)
        ]


@dataclass(frozen=True, eq=False)
class Product:
    """Operators that together are linear in what they read.

    Attributes:
        input: What they read.
        factors: The weights in each factor, the one that reads the input first.
        window: The window of the convolution of one group that they are together;
            ``None`` for matrices.
        last: The operators that give the outputs: of several branches, those whose
            outputs are added; of a fan, those whose outputs stand side by side.
    """

    input: gs.Tensor
    factors: tuple[tuple[Place, ...], ...]
    window: ConvWindow | None
    last: tuple[LinearWeight, ...]

    @property
    def layers(self) -> tuple[LinearWeight, ...]:
        """All weights, factor by factor."""
        return tuple(place.layer for factor in self.factors for place in factor)

    @property
    def inputs(self) -> int:
        """Inputs of one output: channels times taps."""
        place = self.factors[0][0]
        taps = () if self.window is None else self.window.kernel
        return place.sizes[1] * math.prod(taps)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return [*taps, outputs, inputs] of a factor."""
        places = self.factors[index]
        outputs = max(place.outputs + place.sizes[0] for place in places)
        inputs = max(place.inputs + place.sizes[1] for place in places)
        return (*places[0].taps, outputs, inputs)


def find(
    model: Model,
    output: gs.Tensor,
    layers: Mapping[int, LinearWeight],
    is_inner: Callable[[str], bool],
) -> Product | str:
    """Return the product that gives a value.

    Args:
        model: The model.
        output: The value, in the main graph.
        layers: By the identity of the node that reads it, each weight of the main graph
            that one node reads.
        is_inner: Whether a value, by name, may be one that a product has inside.

    Returns:
        The product, or why the value is none; empty if there is nothing to say: it is
        what a single operator gives, or something else.
    """
    chains = _Tracer(model, layers, is_inner).chains(output, is_top=True)
    if isinstance(chains, str):
        return chains
    if not chains or max(len(chain.layers) for chain in chains) < 2:
        return ""
    first = chains[0]
    label = first.layers[-1].name
    if any(chain.input is not first.input for chain in chains):
        return f"the branches that end with {label} read different values"
    if any(len(chain.layers) != len(first.layers) for chain in chains):
        return f"the branches that end with {label} are of different lengths"
    factors: list[tuple[Place, ...]] = []
    for index in range(len(first.layers)):
        is_last = index == len(first.layers) - 1
        stacked = [chain.layers[index] for chain in chains]
        factors.append(_stacked(stacked, is_first=not index, is_last=is_last))
        if len({place.taps for place in factors[-1]}) > 1:
            return f"the branches that end with {label} have different kernels"
    window = _window([chain.layers for chain in chains])
    if isinstance(window, str):
        return window
    last = tuple(chain.layers[-1] for chain in chains)
    return Product(first.input, tuple(factors), window, last)


def fan(first: LinearWeight, last: Sequence[LinearWeight]) -> Product | str:
    """Return the product of a factor and of several that read what it gives.

    Args:
        first: The weight that they share; one node reads it.
        last: The weights behind it, each read by one node.

    Returns:
        The product, or why they are none; empty if there is nothing to say.
    """
    if not all(_is_plain(layer) for layer in (first, *last)):
        return ""
    if len({layer.kind == "Conv" for layer in (first, *last)}) > 1:
        return ""
    if first.bias is not None:
        return f"{first.name} adds a bias in between"
    window = _window([[first, layer] for layer in last])
    if isinstance(window, str):
        return window
    places, row = [], 0
    for layer in last:
        places.append(Place(layer, row, 0))
        row += places[-1].sizes[0]
    factors = (Place(first, 0, 0),), tuple(places)
    return Product(first.node.inputs[0], factors, window, tuple(last))


def _window(chains: Sequence[Sequence[LinearWeight]]) -> ConvWindow | str | None:
    """Return the one window of several rows of convolutions; ``None`` of matrices."""
    if chains[0][0].kind != "Conv":
        return None
    windows = [_composed(layers) for layers in chains]
    for found in windows:
        if isinstance(found, str):
            return found
    if any(found != windows[0] for found in windows):
        return f"the branches that end with {chains[0][-1].name} have different windows"
    return windows[0]


@dataclass(frozen=True, eq=False)
class _Chain:
    """Operators in a row, first to last, and what the first one reads."""

    input: gs.Tensor
    layers: tuple[LinearWeight, ...]


@dataclass(frozen=True, eq=False)
class _Tracer:
    """Follows a value upwards to what it is a linear function of."""

    model: Model
    layers: Mapping[int, LinearWeight]
    is_inner: Callable[[str], bool]

    def chains(
        self, tensor: gs.Tensor, *, is_top: bool = False, depth: int = _LONGEST
    ) -> list[_Chain] | str:
        """Return the branches whose sum a value is, or why it is none."""
        node: Node | None = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_onnx(node.domain) or not depth:
            return []
        if node.op == "Add" and len(node.inputs) == 2:
            return self._sum(node, is_top, depth)
        layer = self.layers.get(id(node))
        if layer is None or not _is_plain(layer):
            return []
        if not is_top and layer.bias is not None and layer.bias.node is node:
            # Padding behind it would not be that of one convolution.
            return f"{node.name or layer.name} adds a bias in between"
        source = node.inputs[0]
        if not self._is_between(source):
            return [_Chain(source, (layer,))]
        before = self.chains(source, depth=depth - 1)
        if isinstance(before, str):
            return before
        if not before:
            return [_Chain(source, (layer,))]
        return [replace(chain, layers=(*chain.layers, layer)) for chain in before]

    def _sum(self, node: Node, is_top: bool, depth: int) -> list[_Chain] | str:
        """Return the branches of an Add: of a bias, or of several products."""
        known = [self.model.constant(tensor) is not None for tensor in node.inputs]
        if any(known):
            tensor = node.inputs[known.index(False)] if not all(known) else None
            if tensor is None or not is_top or not self._is_alone(tensor):
                return []
            return self.chains(tensor, is_top=True, depth=depth - 1)
        found: list[_Chain] = []
        for tensor in node.inputs:
            if not self._is_between(tensor):
                return []
            part = self.chains(tensor, is_top=is_top, depth=depth - 1)
            if isinstance(part, str) or not part:
                return part
            found += part
        return found if len(found) <= _MOST else []

    def _is_between(self, tensor: gs.Tensor) -> bool:
        """Whether a value is new, and for one reader alone."""
        return (
            bool(tensor.inputs)
            and self.is_inner(tensor.name)
            and self._is_alone(tensor)
        )

    @staticmethod
    def _is_alone(tensor: gs.Tensor) -> bool:
        return len(tensor.outputs) == 1 and not returned_by(tensor)


def _is_plain(layer: LinearWeight) -> bool:
    """Whether a layer multiplies the last axis, or channels, by one matrix."""
    use = layer.uses[0]
    if layer.codes is not None or use.index != 1 or use.role != "weight":
        return False
    if layer.kind == "Conv":
        return True
    return (
        layer.kind in ("Gemm", "MatMul")
        and len(layer.weight.shape) == 2
        and use.input_channels == -1
        and use.alpha != 0
    )


def _stacked(
    layers: Sequence[LinearWeight], *, is_first: bool, is_last: bool
) -> tuple[Place, ...]:
    """Put the weights of all branches into one factor.

    The first ones read the same value and stand below each other. What the last ones
    give is added, so they stand side by side. Those between do neither.
    """
    places = []
    row = column = 0
    for layer in layers:
        place = Place(layer, 0 if is_last else row, 0 if is_first else column)
        places.append(place)
        row += place.sizes[0]
        column += place.sizes[1]
    return tuple(places)


def _composed(layers: Sequence[LinearWeight]) -> ConvWindow | str:
    """Return the window of convolutions in a row."""
    windows = [ConvWindow.of(one.node.attrs, one.weight.shape) for one in layers]
    axes = len(windows[0].kernel)
    label = layers[-1].name
    if any(len(window.kernel) != axes for window in windows):
        return f"the convolutions in front of {label} have different ranks"
    kernel, stride, spread = [1] * axes, [1] * axes, [1] * axes
    begins, ends = [0] * axes, [0] * axes
    automatic = set()
    for window in windows:
        pads = window.pads or (0,) * (2 * axes)
        for axis in range(axes):
            low, high = pads[axis], pads[axes + axis]
            is_long = window.kernel[axis] > 1
            if is_long and kernel[axis] > 1:
                return f"two kernels in front of {label} reach along the same axis"
            if is_long:
                kernel[axis] = window.kernel[axis]
                spread[axis] = window.spreads[axis] * stride[axis]
                automatic.add(window.auto_pad)
            is_padded = low or high or (is_long and window.auto_pad.startswith("SAME"))
            if is_padded and (stride[axis] > 1 or not is_long):
                return f"what is padded in front of {label} is not its input"
            if low or high:
                begins[axis], ends[axis] = low, high
            stride[axis] *= window.steps[axis]
    mode = next((m for m in automatic if m.startswith("SAME")), "NOTSET")
    if mode != "NOTSET" and len(automatic) > 1:
        return f"the convolutions in front of {label} are padded in different ways"
    pads = (*begins, *ends) if mode == "NOTSET" else ()
    return ConvWindow(tuple(kernel), tuple(stride), pads, tuple(spread), auto_pad=mode)
