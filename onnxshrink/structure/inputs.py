"""What the inputs of a layer add up to, in the order of its matrices.

Tested in tests/activations/test_inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import ModelError
from onnxshrink.statistics import ChannelNorm, ConvGram, ConvNorm, Gram, Statistic
from onnxshrink.structure.layers import RECURRENT, LinearWeight

__all__ = ["InputStatistics"]

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over all rows a weight was multiplied with, in the order of its matrices.

    A row holds what one output is the product of: of a Conv a patch, as im2col cuts it.
    A weight that several nodes read counts the rows of all. Arrays are float64 and
    read-only, since layers that read one tensor share them.

    Attributes:
        count: Rows.
        sums: Sum of the rows, [groups, inputs].
        squares: Sum of their squares, [groups, inputs].
        gram: ``X^T X``, [groups, inputs, inputs]; ``None`` where it would be too large
            or was not asked for.
    """

    count: int
    sums: Float64
    squares: Float64
    gram: Float64 | None = None

    @property
    def mean(self) -> Float64:
        """Mean row, [groups, inputs]."""
        return self.sums / max(self.count, 1)

    @property
    def norms(self) -> Float64:
        """Euclidean norm of each input over all rows, [groups, inputs].

        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language
        Models" (Wanda), section 3.
        """
        return np.sqrt(self.squares)

    @property
    def is_finite(self) -> bool:
        """Whether no row held NaN or infinity."""
        parts = [self.sums, self.squares, *([] if self.gram is None else [self.gram])]
        return all(bool(np.isfinite(part).all()) for part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        gram = 0 if self.gram is None else self.gram.nbytes
        return self.sums.nbytes + self.squares.nbytes + gram

    def scaled(self, factors: Float64) -> InputStatistics:
        """Return the sums over rows whose entries are multiplied by factors, [inputs].

        Factors of one group serve all.
        """
        gram = None
        if self.gram is not None:
            gram = _frozen(self.gram * factors * factors[..., None])
        return InputStatistics(
            self.count,
            _frozen(self.sums * factors),
            _frozen(self.squares * factors**2),
            gram,
        )

    @classmethod
    def of(cls, layer: LinearWeight, fed: Sequence[Statistic]) -> InputStatistics:
        """Return what statistics of a layer's inputs say.

        Args:
            layer: The layer.
            fed: Those of ``layer.statistics_for``, fed.

        Raises:
            ModelError: They saw nothing, or other inputs than the layer has.
        """
        parts = [_one(layer, statistic) for statistic in fed]
        if len(parts) == 1:
            return parts[0]
        grams = [part.gram for part in parts if part.gram is not None]
        return cls(
            sum(part.count for part in parts),
            _frozen(np.sum([part.sums for part in parts], axis=0)),
            _frozen(np.sum([part.squares for part in parts], axis=0)),
            _frozen(_total(grams)) if len(grams) == len(parts) else None,
        )


def _one(layer: LinearWeight, statistic: Statistic) -> InputStatistics:
    groups, _, inputs = layer.layout.matrices_shape
    # Both directions of a recurrent layer read the same inputs.
    apart = 1 if layer.kind in RECURRENT else groups
    sums = getattr(statistic, "sums", None)
    if sums is None:
        raise ModelError(f"nothing was seen of the inputs of {layer.name}")
    if sums.size != apart * inputs:
        raise ModelError(
            f"{layer.name} has {apart * inputs} inputs, but {sums.size} were seen in "
            "its activations"
        )
    shape = (groups, inputs)
    sums = np.broadcast_to(sums.reshape(apart, inputs), shape)
    if isinstance(statistic, (ChannelNorm, ConvNorm)):
        assert statistic.squares is not None
        squares = statistic.squares.reshape(apart, inputs)
        return InputStatistics(
            statistic.rows, _frozen(sums), _frozen(np.broadcast_to(squares, shape))
        )
    assert isinstance(statistic, (Gram, ConvGram))
    assert statistic.matrix is not None
    matrix = statistic.matrix
    if layer.kind == "ConvTranspose" and groups > 1:
        blocks = matrix.reshape(groups, inputs, groups, inputs)
        matrix = np.einsum("gigj->gij", blocks)
    matrix = np.broadcast_to(matrix, (groups, inputs, inputs))
    squares = np.einsum("gii->gi", matrix)
    return InputStatistics(
        statistic.rows, _frozen(sums), _frozen(squares), _frozen(matrix)
    )


def _total(matrices: Sequence[Float64]) -> Float64:
    total = matrices[0].copy()
    for matrix in matrices[1:]:
        total += matrix
    return total


def _frozen(array: Float64) -> Float64:
    view = array.view()
    view.flags.writeable = False
    return view
