"""LSTM, GRU and RNN unrolled into elementary nodes, whose rules then apply.

``prepare`` calls ``unroll``. The projection of the whole sequence stays one product, so
that the gradient of the input weights is one as well; each step adds the recurrent
product and the elementwise nodes of the cell.

Tested in tests/training/test_recurrent.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, Node
from onnxshrink.model.topology import is_onnx
from onnxshrink.training.gradients import (
    GradContext,
    Tensor,
    attribute,
    depends_on,
    given,
    rule,
    sorted_nodes,
    values_of,
)

__all__ = ["MOST_STEPS", "unroll"]

MOST_STEPS = 512
"""Steps of one node, over all its directions, up to which it is unrolled.

A step and its gradient become about 40 nodes. The time in which onnxruntime loads a
graph grows with the square of their number.
"""

Activation = Callable[[GradContext, Tensor], Tensor]
Grads = list[Any]

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULT = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_PLAIN = {
    name.lower(): name for name in ("Relu", "Sigmoid", "Softplus", "Softsign", "Tanh")
}
_WITH_NUMBERS: dict[str, tuple[str, dict[str, float]]] = {
    "elu": ("Elu", {"alpha": 1.0}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 0.2, "beta": 0.5}),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.01}),
    "thresholdedrelu": ("ThresholdedRelu", {"alpha": 1.0}),
    "affine": ("", {"alpha": 1.0, "beta": 0.0}),
    "scaledtanh": ("", {"alpha": 1.0, "beta": 1.0}),
}
"""Operator and default numbers of the activations that have some."""


def unroll(model: Model, trained: Collection[str]) -> int:
    """Rewrite the recurrent nodes of the main graph that gradients will go through.

    A node that depends on no trained value stays as it is, as does one that cannot be
    unrolled: its gradient rule says why, if a loss needs it.

    Args:
        model: Changed in place. Shapes must be static.
        trained: Names of the values that gradients are wanted for.

    Returns:
        How many nodes were unrolled.
    """
    order = sorted_nodes(model)
    if not any(_is_recurrent(node) for node in order):
        return 0
    ctx = GradContext(model)
    values = values_of(model)
    moving = depends_on(ctx, order, [values[n] for n in trained if n in values])
    count = 0
    for node in order:
        if not _is_recurrent(node) or not any(id(t) in moving for t in node.inputs):
            continue
        if _obstacle(ctx, node):
            continue
        _Layer(ctx, node).unroll()
        count += 1
    return count


@rule(*_GATES)
def _refuse(ctx: GradContext, node: Node, grads: Grads) -> Grads:
    why = _obstacle(ctx, node)
    raise ctx.refused(node, why or "prepare was not told of the weights to train")


def _is_recurrent(node: Node) -> bool:
    return node.op in _GATES and is_onnx(node.domain)


def _obstacle(ctx: GradContext, node: Node) -> str:
    """Say why a node cannot be unrolled; nothing if it can."""
    try:
        shape = ctx.shape(node.inputs[0])
        ctx.shape(node.inputs[1])
        _activations(node)
    except ModelError as error:
        return str(error)
    steps = shape[1 if attribute(node, "layout", 0) else 0]
    most = MOST_STEPS // len(_directions(node))
    if steps > most:
        return (
            f"its {steps} steps are more than the {most} that are unrolled; train on "
            "shorter sequences"
        )
    lengths = given(node, 4)
    if lengths is not None:
        known = ctx.value(lengths)
        if known is None or bool((known != steps).any()):
            return f"its sequence_lens {lengths.name!r} are not all {steps}"
    return ""


def _directions(node: Node) -> tuple[bool, ...]:
    """Return for each direction whether it runs from the end."""
    found: dict[str, tuple[bool, ...]] = {
        "reverse": (True,),
        "bidirectional": (False, True),
    }
    return found.get(str(attribute(node, "direction", "forward")), (False,))


def _activations(node: Node) -> list[Activation]:
    """Return the activations of a node, those of each direction after the other.

    ``activation_alpha`` and ``activation_beta`` list numbers for those activations that
    take them, as onnxruntime reads them.

    Raises:
        ModelError: One is not known.
    """
    names = attribute(node, "activations", None)
    if not names:
        names = _DEFAULT[node.op] * len(_directions(node))
    numbers = {
        "alpha": iter(attribute(node, "activation_alpha", None) or ()),
        "beta": iter(attribute(node, "activation_beta", None) or ()),
    }
    found: list[Activation] = []
    for raw in names:
        name = raw.decode() if isinstance(raw, bytes) else str(raw)
        key = name.lower()
        if key in _PLAIN:
            found.append(_plain(_PLAIN[key]))
        elif key in _WITH_NUMBERS:
            op, defaults = _WITH_NUMBERS[key]
            read = {k: float(next(numbers[k], v)) for k, v in defaults.items()}
            found.append(_with_numbers(key, op, read))
        else:
            raise ModelError(f"its activation {name!r} is not known")
    return found


def _plain(op: str) -> Activation:
    return lambda ctx, x: ctx.op(op, x, like=x)


def _with_numbers(key: str, op: str, read: dict[str, float]) -> Activation:
    if op:
        return lambda ctx, x: ctx.op(op, x, like=x, **read)
    alpha, beta = read["alpha"], read["beta"]
    if key == "affine":
        return lambda ctx, x: ctx.op("Add", ctx.op("Mul", x, alpha), beta, like=x)
    return lambda ctx, x: ctx.op(
        "Mul", ctx.op("Tanh", ctx.op("Mul", x, beta)), alpha, like=x
    )


@dataclass(frozen=True)
class _Weights:
    """Of one direction; vectors have a leading axis of 1, or are absent.

    Attributes:
        w: (gates * hidden, inputs)
        r: (gates * hidden, hidden)
        input_bias: Of the projection of the input.
        hidden_bias: Of the recurrent product.
        peephole: (1, 3 * hidden)
        hidden: (batch, hidden), before the first step.
        cell: The same, of LSTM.
    """

    w: Tensor
    r: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    peephole: Tensor | None
    hidden: Tensor
    cell: Tensor


class _Layer:
    """A recurrent node on its way to elementary ones."""

    def __init__(self, ctx: GradContext, node: Node) -> None:
        """Read the attributes."""
        self.ctx, self.node = ctx, node
        self.ways = _directions(node)
        self.batched = bool(attribute(node, "layout", 0))
        self.clip = attribute(node, "clip", None)
        self.gates = _GATES[node.op]
        shape = ctx.shape(node.inputs[0])
        self.steps, self.batch = (
            (shape[1], shape[0]) if self.batched else (shape[0], shape[1])
        )
        self.width = shape[2]
        self.size = ctx.shape(node.inputs[2])[2]
        found = _activations(node)
        each = len(_DEFAULT[node.op])
        self.activations = [
            found[way * each : (way + 1) * each] for way in range(len(self.ways))
        ]

    def unroll(self) -> None:
        """Put elementary nodes in the node's place."""
        ctx, node = self.ctx, self.node
        x = node.inputs[0]
        if self.batched:
            x = ctx.transpose(x, [1, 0, 2])
        rows = ctx.reshape(x, (self.steps * self.batch, self.width))
        hidden: list[list[Tensor]] = []
        cells: list[Tensor] = []
        for way, backwards in enumerate(self.ways):
            weights = self._weights(way)
            states, cell = self._run(rows, weights, self.activations[way], backwards)
            hidden.append(states)
            cells.append(cell)
        last = [
            states[0] if backwards else states[-1]
            for states, backwards in zip(hidden, self.ways, strict=True)
        ]
        outputs = list(node.outputs)
        ctx.model.remove(node, ctx.model.graph)
        made = (self._sequence(hidden), self._state(last), self._state(cells))
        for tensor, value in zip(outputs, made, strict=False):
            if tensor.name:
                ctx.model.add_node("Identity", [value], outputs=[tensor])

    def _split(self, tensor: Tensor, axis: int, parts: int) -> list[Tensor]:
        """Return equal parts along an axis."""
        shape = list(self.ctx.shape(tensor))
        if parts == 1:
            return [tensor]
        shape[axis] //= parts
        sizes = self.ctx.ints([shape[axis]] * parts)
        found = self.ctx.ops("Split", tensor, sizes, axis=axis, outputs=parts)
        return [self.ctx.note_shape(part, shape, tensor) for part in found]

    def _of(self, index: int, way: int, axis: int = 0) -> Tensor | None:
        """Return a direction's part of an input, without the axis of directions."""
        tensor = given(self.node, index)
        if tensor is None:
            return None
        part = self._split(tensor, axis, len(self.ways))[way]
        shape = list(self.ctx.shape(part))
        del shape[axis]
        return self.ctx.reshape(part, shape if len(shape) > 1 else [1, *shape])

    def _weights(self, way: int) -> _Weights:
        ctx = self.ctx
        biases = self._of(3, way)
        pair = [None, None] if biases is None else self._split(biases, 1, 2)
        axis = 1 if self.batched else 0
        w, r = self._of(1, way), self._of(2, way)
        assert w is not None
        assert r is not None
        zeros = ctx.constant(np.zeros((self.batch, self.size), ctx.dtype(w)))
        hidden, cell, peephole = self._of(5, way, axis), None, None
        if self.node.op == "LSTM":
            cell, peephole = self._of(6, way, axis), self._of(7, way)
        return _Weights(
            w,
            r,
            pair[0],
            pair[1],
            peephole,
            zeros if hidden is None else hidden,
            zeros if cell is None else cell,
        )

    def _run(
        self,
        rows: Tensor,
        weights: _Weights,
        activations: Sequence[Activation],
        backwards: bool,
    ) -> tuple[list[Tensor], Tensor]:
        """Return what each step gives, in the order of the sequence, and the cell."""
        ctx = self.ctx
        bias, apart = weights.input_bias, None
        if weights.hidden_bias is not None:
            if self.node.op == "GRU":
                apart = weights.hidden_bias
            else:
                bias = ctx.op("Add", bias, weights.hidden_bias)
        projected = self._split(self._product(rows, weights.w, bias), 0, self.steps)
        hidden, cell = weights.hidden, weights.cell
        made: list[Tensor] = [None] * self.steps
        for step in reversed(range(self.steps)) if backwards else range(self.steps):
            seen = projected[step]
            if self.node.op == "LSTM":
                hidden, cell = self._lstm(seen, hidden, cell, weights, activations)
            elif self.node.op == "GRU":
                hidden = self._gru(seen, hidden, weights, apart, activations)
            else:
                total = ctx.op("Add", seen, self._product(hidden, weights.r))
                hidden = activations[0](ctx, self._clipped(total))
            made[step] = hidden
        return made, cell

    def _product(
        self, rows: Tensor, matrix: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self.ctx.op("Gemm", rows, matrix, bias, transB=1)

    def _clipped(self, x: Tensor) -> Tensor:
        if not self.clip:
            return x
        low, high = (self.ctx.scalar(sign * self.clip, x) for sign in (-1, 1))
        return self.ctx.op("Clip", x, low, high, like=x)

    def _lstm(
        self,
        seen: Tensor,
        hidden: Tensor,
        cell: Tensor,
        weights: _Weights,
        activations: Sequence[Activation],
    ) -> tuple[Tensor, Tensor]:
        ctx = self.ctx
        gate, candidate, squash = activations
        total = ctx.op("Add", seen, self._product(hidden, weights.r))
        enter, leave, keep, new = self._split(total, 1, 4)
        holes = [None] * 3
        if weights.peephole is not None:
            holes = self._split(weights.peephole, 1, 3)

        def opened(x: Tensor, hole: Tensor | None, state: Tensor) -> Tensor:
            if hole is not None:
                x = ctx.op("Add", x, ctx.op("Mul", hole, state))
            return gate(ctx, self._clipped(x))

        enter = opened(enter, holes[0], cell)
        if attribute(self.node, "input_forget", 0):
            keep = ctx.op("Neg", ctx.op("Sub", enter, 1.0))
        else:
            keep = opened(keep, holes[2], cell)
        new = candidate(ctx, self._clipped(new))
        cell = ctx.op("Add", ctx.op("Mul", keep, cell), ctx.op("Mul", enter, new))
        leave = opened(leave, holes[1], cell)
        return ctx.op("Mul", leave, squash(ctx, self._clipped(cell))), cell

    def _gru(
        self,
        seen: Tensor,
        hidden: Tensor,
        weights: _Weights,
        bias: Tensor | None,
        activations: Sequence[Activation],
    ) -> Tensor:
        ctx = self.ctx
        gate, candidate = activations
        x = self._split(seen, 1, 3)
        if attribute(self.node, "linear_before_reset", 0):
            h = self._split(self._product(hidden, weights.r, bias), 1, 3)
            update, reset = (
                gate(ctx, self._clipped(ctx.op("Add", x[i], h[i]))) for i in (0, 1)
            )
            within = ctx.op("Mul", reset, h[2])
        else:
            r = self._split(weights.r, 0, 3)
            biases = [None] * 3 if bias is None else self._split(bias, 1, 3)
            update, reset = (
                gate(
                    ctx,
                    self._clipped(
                        ctx.op("Add", x[i], self._product(hidden, r[i], biases[i]))
                    ),
                )
                for i in (0, 1)
            )
            within = self._product(ctx.op("Mul", reset, hidden), r[2], biases[2])
        new = candidate(ctx, self._clipped(ctx.op("Add", x[2], within)))
        # (1 - z) n + z h
        return ctx.op(
            "Add", new, ctx.op("Mul", update, ctx.op("Sub", hidden, new)), like=hidden
        )

    def _sequence(self, hidden: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return Y: (steps, directions, batch, hidden), or batch first."""
        ctx = self.ctx
        shape = [self.steps, 1, self.batch, self.size]
        ways = []
        for made in hidden:
            rows = made[0] if len(made) == 1 else ctx.op("Concat", *made, axis=0)
            ways.append(ctx.reshape(rows, shape))
        full = ways[0] if len(ways) == 1 else ctx.op("Concat", *ways, axis=1)
        return ctx.transpose(full, [2, 0, 1, 3]) if self.batched else full

    def _state(self, states: Sequence[Tensor]) -> Tensor:
        """Return Y_h or Y_c: (directions, batch, hidden), or batch first."""
        ctx = self.ctx
        axis = 1 if self.batched else 0
        shape = [self.batch, self.size]
        shape.insert(axis, 1)
        ways = [ctx.reshape(state, shape) for state in states]
        return ways[0] if len(ways) == 1 else ctx.op("Concat", *ways, axis=axis)
