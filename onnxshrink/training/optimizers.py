"""Optimizers as ONNX nodes: they make a new weight and new state from the old.

Tested in tests/training/test_step.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxshrink.errors import UsageError
from onnxshrink.training.gradients import GradContext, Tensor

__all__ = ["Adam", "AdamW", "Optimizer", "Sgd", "clip_by_norm"]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """A rule that changes weights; state tensors start as zeros.

    Attributes:
        slots: Names of the state tensors of a weight, each of its shape.
        weight_decay: How strongly weights are pulled to zero.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.weight_decay < 1:
            raise UsageError(
                f"weight_decay is at least 0 and below 1, not {self.weight_decay}"
            )

    @abstractmethod
    def update(
        self,
        ctx: GradContext,
        weight: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        rate: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Append one update; return the new weight and the new state.

        Args:
            ctx: The context to build with.
            weight: The weight.
            grad: Its gradient, of the same shape.
            state: A tensor for each slot.
            rate: Learning rate, a scalar.
            step: Number of this step, a scalar double; the first is 1.
        """


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name} is at least 0 and below 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Gradient descent with momentum: v <- m v + g, w <- w - rate v.

    Attributes:
        momentum: m; 0 is plain gradient descent.
        nesterov: Look ahead: w <- w - rate (g + m v).
    """

    slots: ClassVar[tuple[str, ...]] = ("velocity",)

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        _fraction("momentum", self.momentum)

    def update(
        self,
        ctx: GradContext,
        weight: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        rate: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Append one update."""
        if self.weight_decay:
            grad = ctx.op("Add", grad, ctx.op("Mul", weight, self.weight_decay))
        velocity = ctx.op("Add", ctx.op("Mul", state[0], self.momentum), grad)
        ahead = velocity
        if self.nesterov:
            ahead = ctx.op("Add", ctx.op("Mul", velocity, self.momentum), grad)
        return ctx.op("Sub", weight, ctx.op("Mul", ahead, rate)), [velocity]


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Kingma and Ba, Adam, ICLR 2015, algorithm 1; decay is added to the gradient.

    Attributes:
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to the root of the latter.
    """

    slots: ClassVar[tuple[str, ...]] = ("mean", "square")
    decoupled: ClassVar[bool] = False

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        _fraction("beta1", self.beta1)
        _fraction("beta2", self.beta2)
        if not self.epsilon > 0:
            raise UsageError(f"epsilon is above 0, not {self.epsilon}")

    def update(
        self,
        ctx: GradContext,
        weight: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        rate: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Append one update."""
        if self.weight_decay and not self.decoupled:
            grad = ctx.op("Add", grad, ctx.op("Mul", weight, self.weight_decay))

        def correction(beta: float) -> Tensor:
            power = ctx.op("Pow", ctx.scalar(beta, step), step)
            rest = ctx.op("Neg", ctx.op("Sub", power, 1.0))
            return ctx.op("Cast", rest, to=ctx.data_type(rate))

        # For fewer passes over the weights, the state is m / (1 - b1) and
        # v / (1 - b2), and scalars are put together. With those as M and V and
        # s = sqrt(c2 / (1 - b2)), r (m / c1) / (sqrt(v / c2) + e) is the same as
        # (r (1 - b1) s / c1) M / (sqrt(V) + e s).
        mean = ctx.op("Add", ctx.op("Mul", state[0], self.beta1), grad)
        square = ctx.op(
            "Add", ctx.op("Mul", state[1], self.beta2), ctx.op("Mul", grad, grad)
        )
        root = ctx.op(
            "Sqrt", ctx.op("Mul", correction(self.beta2), 1 / (1 - self.beta2))
        )
        size = ctx.op("Mul", ctx.op("Mul", rate, root), 1 - self.beta1)
        size = ctx.op("Div", size, correction(self.beta1))
        below = ctx.op("Add", ctx.op("Sqrt", square), ctx.op("Mul", root, self.epsilon))
        change = ctx.op("Div", ctx.op("Mul", mean, size), below)
        if self.weight_decay and self.decoupled:
            kept = ctx.op(
                "Neg", ctx.op("Sub", ctx.op("Mul", rate, self.weight_decay), 1.0)
            )
            weight = ctx.op("Mul", weight, kept)
        return ctx.op("Sub", weight, change), [mean, square]


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.

    Attributes:
        weight_decay: Share of the weight that goes at each step, times the rate.
    """

    decoupled: ClassVar[bool] = True

    weight_decay: float = 0.01


def clip_by_norm(
    ctx: GradContext, grads: Mapping[str, Tensor], limit: float
) -> dict[str, Tensor]:
    """Return gradients scaled down where their norm, all together, is above a limit.

    Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural
    networks, ICML 2013, algorithm 1.

    Raises:
        UsageError: The limit is not positive.
    """
    if not limit > 0:
        raise UsageError(f"the limit of a gradient's norm is above 0, not {limit}")
    squares = [ctx.op("ReduceSumSquare", grad, keepdims=0) for grad in grads.values()]
    if not squares:
        return {}
    total = squares[0] if len(squares) == 1 else ctx.op("Sum", *squares)
    bounded = ctx.op("Max", ctx.op("Sqrt", total), ctx.scalar(limit, total))
    factor = ctx.op("Div", ctx.scalar(limit, total), bounded)
    return {
        name: ctx.note(ctx.op("Mul", grad, factor), grad)
        for name, grad in grads.items()
    }
