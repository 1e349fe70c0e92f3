"""Codes of weights whose activations get no scale beforehand, one weight at a time.

``code_weight`` is what takes long in the forms ``dynamic`` and ``weightonly``: a pure
function of a task that any process can take. What stands for how is a ``Coding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.quantization import dynamic, weightonly
from onnxshrink.solvers.rounding import (
    Factors,
    Fit,
    Grid,
    adaround,
    factors_of,
    nearest,
)
from onnxshrink.solvers.threads import one_thread
from onnxshrink.structure.layers import Layout
from onnxshrink.tensors import LazyTensor

__all__ = ["Coding", "CodingTask", "Rounding", "code_weight", "code_weights"]

Rounding = Literal["auto", "nearest", "mse", "hqq", "learned", "gptq", "adaround"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Coding:
    """How a weight becomes codes.

    Attributes:
        form: ``dynamic``: int8 codes that an integer kernel multiplies; ``none``: codes
            that are decoded before they are used.
        weights: Key of ``weightonly.LEVELS``, for the form ``none``.
        block: Columns that share a scale, about; 0: all of a row.
        shared: All rows have one scale.
        rounding: How weights are rounded; ``auto`` is GPTQ where there is a Gram matrix
            and the scales of least squared error where there is none.
        pairs: As for ``dynamic.safe_scale``.
        zero_points: As for ``weightonly.levels_of``.
    """

    form: Literal["dynamic", "none"]
    weights: str = "int8"
    block: int = 0
    shared: bool = False
    rounding: Rounding = "auto"
    pairs: bool = True
    zero_points: bool | None = None

    @property
    def levels(self) -> weightonly.Levels:
        """The codes."""
        return weightonly.levels_of(self.weights, self.zero_points)


@dataclass(frozen=True, eq=False)
class CodingTask:
    """One weight to code, with all that this takes.

    Attributes:
        tensor: The weight.
        layout: How it is matrices [groups, outputs, inputs].
        coding: How it becomes codes.
        gram: float64 [groups, inputs, inputs] of the layer's inputs, if rounding is to
            look at them.
        squares: float64 [inputs], how large the inputs are as far as the graph says,
            where there is no Gram matrix.
    """

    tensor: LazyTensor
    layout: Layout
    coding: Coding
    gram: NDArray[np.float64] | None = None
    squares: NDArray[np.float64] | None = None


def code_weights(tasks: Sequence[CodingTask]) -> list[tuple[Grid, Array]]:
    """Choose grids and codes of weights that multiply the same inputs.

    Their Gram matrix is that of the first, and is factored once.
    """
    gram = tasks[0].gram
    uses = gram is not None and tasks[0].coding.rounding in ("auto", "gptq")
    factors = None
    if uses and gram is not None and len(tasks) > 1:
        factors = factors_of(gram)
    return [code_weight(replace(task, gram=gram), factors) for task in tasks]


@one_thread
def code_weight(task: CodingTask, factors: Factors | None = None) -> tuple[Grid, Array]:
    """Choose the grid and the codes of one weight.

    Args:
        task: The weight.
        factors: Of its Gram matrix, if they are known.

    Returns:
        Scales and zero points of its rows, and the codes [groups * outputs, inputs],
        int8 or uint8.
    """
    matrices = task.layout.matrices(task.tensor.read())
    rows = np.ascontiguousarray(matrices, np.float32).reshape(-1, matrices.shape[2])
    coding = task.coding
    if coding.form == "dynamic":
        grid, codes = dynamic.quantized(
            rows, gram=task.gram, pairs=coding.pairs, factors=factors
        )
    else:
        grid, codes = _coded(rows, task, factors)
    return grid, codes.astype(np.int8 if grid.low < 0 else np.uint8)


def _coded(
    rows: Array, task: CodingTask, factors: Factors | None
) -> tuple[Grid, NDArray[np.int32]]:
    """Choose the codes of a weight that is decoded before it is used."""
    coding, gram = task.coding, task.gram
    levels = coding.levels
    block = weightonly.block_of(rows.shape[1], coding.block)
    method: Fit = "hqq" if coding.rounding == "hqq" else "mse"
    if coding.rounding == "nearest":
        method = "minmax"
    by_learning = coding.rounding == "adaround" and levels.step == 1
    if coding.rounding == "learned" and gram is not None and not coding.shared:
        grid, _ = weightonly.quantized(
            rows, levels, block=block, method="learned", gram=gram
        )
        return grid, nearest(rows, grid)
    if by_learning and not coding.shared:
        grid, codes = weightonly.quantized(rows, levels, block=block)
    else:
        grid, codes = weightonly.quantized(
            rows,
            levels,
            block=block,
            method=method,
            gram=gram,
            shared=coding.shared,
            factors=factors,
            squares=task.squares,
        )
    if by_learning and gram is not None:
        codes = adaround(rows, gram, grid)
    return grid, codes
