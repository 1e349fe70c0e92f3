"""What forms of a layer cost: bytes, multiply-accumulates and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxshrink.base import Cost

__all__ = ["FixedCosts"]


class FixedCosts:
    """Costs that follow from shapes alone, the same on every machine."""

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        size: Sequence[int],
        *,
        groups: int = 1,
        itemsize: float = 4,
    ) -> Cost:
        """Return the cost of a convolution, see ``base.Costs.conv``."""
        weights = inputs // groups * outputs * math.prod(kernel)
        return Cost(round(weights * itemsize), weights * math.prod(size))

    def matmul(
        self, rows: int, inputs: int, outputs: int, *, itemsize: float = 4
    ) -> Cost:
        """Return the cost of a matrix product, see ``base.Costs.matmul``."""
        weights = inputs * outputs
        return Cost(round(weights * itemsize), weights * rows)
