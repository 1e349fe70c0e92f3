"""What can be changed of a layer so that it gives what it gave before.

A ``Repair`` names one place and what to watch there. It makes the ``Problem`` of plain
arrays that ``solvers.least_squares`` solves, and writes what comes of it.

Tested in tests/passes/test_recover.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxshrink.activations.regression import Request
from onnxshrink.base import Context
from onnxshrink.model import Model, Node, Weight, attribute
from onnxshrink.solvers.least_squares import (
    BiasProblem,
    Factor,
    FactorProblem,
    NormProblem,
    Problem,
    RegressionSums,
    ScaleProblem,
    Solution,
    WeightProblem,
)
from onnxshrink.structure.bias import Bias, give_bias
from onnxshrink.structure.products import Product

__all__ = [
    "BiasRepair",
    "Changes",
    "Matrices",
    "NormRepair",
    "ProductRepair",
    "Repair",
    "Scale",
    "ScaleRepair",
    "TransposedConv",
    "WeightRepair",
]

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Changes = Literal["weights", "factors", "bias", "norm", "scale"]
"""What of a layer may change."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Repair(ABC):
    """One place to recover.

    Attributes:
        where: Name of the weight, or of a normalisation's running mean.
        node: The node that gives the outputs, before a bias behind it.
        request: What to watch.
        settled: Names of the values it reads, which no later repair has an effect on.
        bias: The bias, if there is one that is free to change.
        adds_bias: A node that takes a bias and has none; ``None`` if there is no such.
        samples: How many are enough, if there are so many.
    """

    changes: ClassVar[Changes]

    where: str
    node: Node
    request: Request
    settled: Sequence[str]
    bias: Bias | None = None
    adds_bias: Node | None = None
    samples: int = 1 << 62

    @property
    def shifts(self) -> bool:
        """Whether a bias may take up the mean of what the outputs miss."""
        return self.bias is not None or self.adds_bias is not None

    @abstractmethod
    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved, as plain arrays."""

    def write(self, model: Model, solution: Solution, ctx: Context) -> None:
        """Write new values, and say what was done."""
        if solution.why_not:
            ctx.skipped(self.where, solution.why_not)
            return
        words = f"output error {solution.before:.3%} -> {solution.after:.3%}"
        if solution.values is None:
            words += ", bias only"
        else:
            self.write_values(model, solution.values)
        if solution.shift is not None:
            self.write_shift(model, solution.shift.reshape(-1))
        self.tell(ctx, words, solution)

    @abstractmethod
    def write_values(self, model: Model, values: Any) -> None:
        """Write new values."""

    def tell(self, ctx: Context, words: str, solution: Solution) -> None:
        """Say what was done."""
        ctx.did(self.where, words)

    def write_shift(self, model: Model, shift: Float64) -> None:
        """Add to the outputs, [outputs]."""
        _shift(model, shift, self.bias, self.adds_bias)


def _shift(model: Model, shift: Float64, bias: Bias | None, node: Node | None) -> None:
    """Add to the outputs of a layer through its bias, or give a node one."""
    if bias is not None:
        bias.write(bias.read() + shift / bias.factor)
        return
    weight = None if node is None else model.constant(node.inputs[1])
    assert node is not None
    assert weight is not None
    made = model.add_weight(f"{weight.name}_bias", shift.astype(weight.dtype))
    give_bias(node, made)


class Matrices(Protocol):
    """How an array is read as matrices [groups, outputs, inputs], and back."""

    def matrices(self, array: Array) -> Array:
        """View an array as matrices."""

    def array(self, matrices: Array) -> Array:
        """Return the array that has these matrices."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightRepair(Repair):
    """Weights and bias of a layer.

    Attributes:
        layout: How the weight is read.
        factor: What outputs are, in products of inputs and weights (alpha of Gemm).
    """

    changes: ClassVar[Changes] = "weights"

    layout: Matrices
    factor: float = 1.0

    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved."""
        return WeightProblem(
            fit=fit,
            held=held,
            shift=self.shifts,
            weights=self.layout.matrices(model.weight(self.where).read()),
            ridge=ridge,
            factor=self.factor,
        )

    def write_values(self, model: Model, values: Any) -> None:
        """Write the weights."""
        model.set_weight(self.where, self.layout.array(values))


@dataclass(frozen=True, eq=False, kw_only=True)
class ProductRepair(Repair):
    """All factors that a layer was split into, and its bias.

    Attributes:
        product: The factors.
        fixed: Names of the weights among them that stay, and why.
        ends: Which outputs there are, and for each what takes up a shift: a bias, or a
            node that can be given one.
    """

    changes: ClassVar[Changes] = "factors"

    product: Product
    fixed: Mapping[str, str]
    ends: tuple[tuple[slice, Bias | None, Node | None], ...]

    @property
    def shifts(self) -> bool:
        """Whether biases may take up the mean of what the outputs miss."""
        return all(bias or node for _, bias, node in self.ends)

    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved."""
        factors = []
        for index, places in enumerate(self.product.factors):
            shape = self.product.shape(index)
            dtype = places[0].layer.weight.dtype
            values, free = np.zeros(shape, dtype), np.zeros(shape, np.bool_)
            for place in places:
                array = model.weight(place.layer.name).read()
                at = place.slices
                values[at] = place.dense(array)
                if place.layer.name not in self.fixed:
                    free[at] = place.dense(array != 0)
            factors.append(Factor(values, free))
        return FactorProblem(
            fit=fit,
            held=held,
            shift=self.shifts,
            factors=tuple(factors),
            ridge=ridge,
        )

    def write_values(self, model: Model, values: Any) -> None:
        """Write the weights of all factors."""
        for places, factor in zip(self.product.factors, values, strict=True):
            for place in places:
                if place.layer.name not in self.fixed:
                    made = place.weight(factor[place.slices])
                    model.set_weight(place.layer.name, made)

    def write_shift(self, model: Model, shift: Float64) -> None:
        """Add to the outputs, [outputs]."""
        for part, bias, node in self.ends:
            _shift(model, shift[part], bias, node)

    def tell(self, ctx: Context, words: str, solution: Solution) -> None:
        """Say it of each weight, with the reason of those that stay."""
        names = [layer.name for layer in self.product.layers]
        for name in names:
            if name in self.fixed:
                ctx.skipped(name, self.fixed[name])
            elif solution.values is None:
                ctx.did(name, words)
            else:
                others = [other for other in names if other != name]
                some = ", ".join(others[:3]) + (", ..." if others[3:] else "")
                ctx.did(name, f"{words}, jointly with {some}")


@dataclass(frozen=True, eq=False, kw_only=True)
class BiasRepair(Repair):
    """The bias of a layer whose weights stay.

    Attributes:
        why: Why they stay.
    """

    changes: ClassVar[Changes] = "bias"

    why: str

    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved."""
        return BiasProblem(fit=fit, held=held, shift=self.shifts)

    def write_values(self, model: Model, values: Any) -> None:
        """Write nothing: there are none."""

    def tell(self, ctx: Context, words: str, solution: Solution) -> None:
        """Say why no weight changed."""
        ctx.did(self.where, f"{words}: {self.why}")


@dataclass(frozen=True, eq=False)
class Scale:
    """The scale of a quantized weight, which multiplies the layer's outputs.

    Attributes:
        weight: The scale.
        shape: Shape of one factor for each output that broadcasts over the scale;
            empty if one factor serves all.
        has_bias: Whether the outputs compared have the bias in them.
    """

    weight: Weight
    shape: tuple[int, ...]
    has_bias: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleRepair(BiasRepair):
    """Scale and bias of a layer whose codes stay.

    Attributes:
        scale: The scale.
    """

    changes: ClassVar[Changes] = "scale"

    scale: Scale

    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved."""
        return ScaleProblem(
            fit=fit, held=held, shift=self.shifts, is_pooled=not self.scale.shape
        )

    def write_values(self, model: Model, values: Any) -> None:
        """Multiply the outputs through the scale, and the bias with them."""
        if self.bias is not None and self.scale.has_bias:
            bias = self.bias
            old = bias.read()
            if bias.scale is not None:
                step = bias.scale.read()
                wide = values if step.size == values.size else values[:1]
                model.set_weight(
                    bias.scale, (step * wide.reshape(step.shape)).astype(np.float32)
                )
            bias.write(old * values)
        scale = self.scale.weight.read()
        by = values.reshape(self.scale.shape) if self.scale.shape else values[0]
        model.set_weight(self.scale.weight, (scale * by).astype(scale.dtype))

    def tell(self, ctx: Context, words: str, solution: Solution) -> None:
        """Say what changed, and why no weight did."""
        if solution.values is not None:
            words += ", scale only" if solution.shift is None else ", scale and bias"
        super().tell(ctx, words, solution)


@dataclass(frozen=True, eq=False, kw_only=True)
class NormRepair(Repair):
    """Mean and variance of a BatchNormalization."""

    changes: ClassVar[Changes] = "norm"

    def problem(
        self, model: Model, ridge: float, fit: RegressionSums, held: RegressionSums
    ) -> Problem:
        """Return what is to be solved."""
        weights = [model.constant(self.node.inputs[index]) for index in range(1, 5)]
        arrays = [w.read().astype(np.float64) for w in weights if w is not None]
        epsilon = float(attribute(self.node, "epsilon", 1e-5))
        mean = weights[2]
        assert mean is not None
        return NormProblem(
            fit=fit,
            held=held,
            shift=False,
            parameters=np.stack([*arrays, np.full_like(arrays[0], epsilon)]),
            dtype=mean.dtype,
        )

    def write_values(self, model: Model, values: Any) -> None:
        """Write mean and variance."""
        for index, array in zip((3, 4), values, strict=True):
            weight = model.constant(self.node.inputs[index])
            assert weight is not None
            model.set_weight(weight, array.reshape(weight.shape))


@dataclass(frozen=True)
class TransposedConv:
    """The weight of a ConvTranspose as that of the Conv over inputs set apart.

    Attributes:
        shape: [in, out / group, kernel...].
        group: Number of groups.
    """

    shape: tuple[int, ...]
    group: int

    def matrices(self, array: Array) -> Array:
        """Return [groups, outputs, inputs], the kernel turned round."""
        inputs, outputs = self.shape[0] // self.group, self.shape[1]
        apart = array.reshape(self.group, inputs, outputs, -1)[..., ::-1]
        return apart.swapaxes(1, 2).reshape(self.group, outputs, -1)

    def array(self, matrices: Array) -> Array:
        """Return the weight of the ConvTranspose."""
        inputs, outputs = self.shape[0] // self.group, self.shape[1]
        apart = matrices.reshape(self.group, outputs, inputs, -1).swapaxes(1, 2)
        return np.ascontiguousarray(apart[..., ::-1]).reshape(self.shape)
