"""One training step as one ONNX graph: forward, loss, backward, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink import runtime
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model, Variable
from onnxshrink.tensors import numpy_type
from onnxshrink.training.gradients import GradContext, Tensor, gradients
from onnxshrink.training.layout import block_convolutions, block_size
from onnxshrink.training.optimizers import Adam, Optimizer, clip_by_norm
from onnxshrink.training.preparation import prepare

__all__ = ["Loss", "TrainingStep", "value_bytes"]

Array = np.ndarray[Any, Any]
Layout = Literal["auto", "plain"]
Loss = Callable[[GradContext, Mapping[str, Tensor]], Tensor]
"""Appends a loss, given the values of the graph by name; returns it, a scalar."""


class TrainingStep:
    """A step that onnxruntime runs: samples in, loss out, weights a little better.

    Attributes:
        weights: Current values by name.
        state: The optimizer's state by weight and slot, each a flat array.
        count: Steps done.
        model: The graph of the step.
    """

    def __init__(
        self,
        model: Model,
        shapes: Mapping[str, Sequence[int]],
        weights: Sequence[str],
        loss: Loss,
        *,
        targets: Mapping[str, tuple[Any, Sequence[int]]] | None = None,
        optimizer: Optimizer | None = None,
        clip: float | None = None,
        threads: int = 0,
        layout: Layout = "auto",
    ) -> None:
        """Build the graph and load it.

        Args:
            model: The model; it is not changed.
            shapes: The full shape of each of its inputs, the batch included.
            weights: Names of the float32 weights to train.
            loss: Appends the loss.
            targets: numpy dtype and shape of further inputs that the loss uses, by
                name, such as labels or a teacher's scores.
            optimizer: How weights change; Adam if ``None``.
            clip: Largest norm of all gradients together.
            threads: onnxruntime's threads; 0 for its own choice.
            layout: ``auto`` lets convolutions use onnxruntime's blocked layout where
                it has one, ``plain`` keeps to standard ONNX.

        Raises:
            UsageError: A name is wrong, there is nothing to train, or a weight is not
                of float type.
            ModelError: An operator on the way to a weight has no gradient rule.
        """
        if not weights:
            raise UsageError("there is no weight to train")
        self._optimizer = optimizer if optimizer is not None else Adam()
        graph = prepare(model, shapes, keep=weights)
        # Whatever the model gives is dropped in favour of the loss; keep it by name.
        outputs = list(graph.graph.outputs)
        self.weights: dict[str, Array] = {}
        for name in weights:
            self.weights[name] = _make_input(graph, name)
        ctx = GradContext(graph)
        ctx.is_blocked = layout == "auto" and block_size() > 0
        values: dict[str, Tensor] = {}
        for node in graph.graph.nodes:
            values.update((t.name, t) for t in node.outputs if t.name)
        values.update((t.name, t) for t in graph.graph.inputs)
        values.update((t.name, t) for t in outputs)
        for name, (dtype, shape) in (targets or {}).items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            if name in values:
                raise UsageError(f"the model already has a value {name!r}")
            values[name] = ctx.add_input(name, kind, shape)
        total = loss(ctx, values)
        if ctx.shape(total) != ():
            raise UsageError(f"a loss is a scalar, not of shape {ctx.shape(total)}")
        found = gradients(graph, {total.name: None}, list(weights), ctx)
        missing = [name for name in weights if name not in found]
        if missing:
            raise UsageError(
                f"the loss does not depend on {', '.join(map(repr, missing[:5]))}; "
                "freeze it"
            )
        if clip is not None:
            found = clip_by_norm(ctx, found, clip)
        self._rate = ctx.add_input("learning_rate", onnx.TensorProto.FLOAT, ())
        self._step = ctx.add_input("step", onnx.TensorProto.DOUBLE, ())
        made: list[Tensor] = [total]
        self._renewed: dict[str, str] = {}
        self.state: dict[str, Array] = {}
        for name, grad in found.items():
            weight = values[name]
            # Flat: onnxruntime broadcasts scalars slowly over axes of size 1.
            size = [math.prod(ctx.shape(weight))]
            slots = [
                ctx.add_input(f"{name}/{slot}", ctx.data_type(weight), size)
                for slot in self._optimizer.slots
            ]
            new, fresh = self._optimizer.update(
                ctx,
                ctx.reshape(weight, size),
                ctx.reshape(grad, size),
                slots,
                self._rate,
                self._step,
            )
            new = ctx.reshape(new, ctx.shape(weight))
            made += [new, *fresh]
            self._renewed[name] = new.name
            for slot, tensor in zip(slots, fresh, strict=True):
                self.state[slot.name] = np.zeros(size, np.float32)
                self._renewed[slot.name] = tensor.name
        for tensor in made:
            tensor.shape, tensor.dtype = list(ctx.shape(tensor)), ctx.dtype(tensor)
        graph.graph.outputs = made
        graph.drop_unused()
        if ctx.is_blocked:
            block_convolutions(ctx)
        self._loss = total.name
        self.model = graph
        self.count = 0
        self._session = runtime.session(graph, threads=threads, training=True)

    def __call__(self, feeds: Mapping[str, Array], rate: float) -> float:
        """Do one step.

        Args:
            feeds: An array for each input of the model and each target.
            rate: Learning rate.

        Returns:
            The loss before the step.

        Raises:
            ModelError: The arrays do not fit, or the loss is not finite; then weights
                and state are as before.
        """
        given = {
            **feeds,
            **self.weights,
            **self.state,
            self._rate.name: np.asarray(rate, np.float32),
            self._step.name: np.asarray(self.count + 1, np.float64),
        }
        known = {info.name for info in self._session.inputs}
        answer = self._session.run({k: v for k, v in given.items() if k in known})
        loss = float(answer[self._loss])
        if not np.isfinite(loss):
            raise ModelError(
                f"the loss became {loss} at step {self.count + 1}; lower the learning "
                "rate or clip the gradients"
            )
        self.weights = {name: answer[self._renewed[name]] for name in self.weights}
        self.state = {name: answer[self._renewed[name]] for name in self.state}
        self.count += 1
        return loss

    def store(self, model: Model) -> None:
        """Write the current weights into a model, by name."""
        for name, array in self.weights.items():
            model.set_weight(name, array)


def value_bytes(model: Model, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the bytes of all values that a run of a model computes.

    Args:
        model: The model.
        shapes: The full shape of each of its inputs, the batch included.
    """
    graph = prepare(model, shapes)
    total = 0
    for name, info in graph.infer_shapes().items():
        known = info.shape is not None and all(isinstance(n, int) for n in info.shape)
        if known and info.data_type and name not in graph.graph.initializers:
            count = math.prod(int(n or 0) for n in info.shape or ())
            total += count * numpy_type(info.data_type).itemsize
    return total


def _make_input(model: Model, name: str) -> Array:
    """Turn a weight into an input of the same name; return its values."""
    weight = model.weight(name)
    if weight.data_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(weight.data_type)
        raise UsageError(f"weight {name!r} is {kind}; only FLOAT can be trained")
    if weight.graph is not model.graph:
        raise UsageError(f"weight {name!r} is inside a subgraph; freeze it")
    array = np.array(weight.read())
    old = weight.value
    tensor = Variable(name, np.dtype(np.float32), list(array.shape))
    model.replace_uses(old, tensor)
    if weight.node is not None:
        model.remove(weight.node, model.graph)
    elif isinstance(old, gs.Constant):
        model.graph.initializers.pop(old.name, None)
    model.graph.inputs.append(tensor)
    return array
