"""What a Context offers from rooms above its own, put together.

Tested in tests/test_base.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from onnxshrink.activations.gathering import gather
from onnxshrink.activations.inputs import Inputs
from onnxshrink.base import Context, Costs
from onnxshrink.measuring.costs import FixedCosts
from onnxshrink.model import Model
from onnxshrink.samples import Splits
from onnxshrink.statistics import Statistic
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight

__all__ = ["Engine", "make_context"]


class Engine:
    """Runs models on behalf of a pass, for ``Context``."""

    def __init__(self, costs: Costs | None = None) -> None:
        """Set up.

        Args:
            costs: What layers cost; by default a fixed table.
        """
        self.costs = costs or FixedCosts()

    def statistics(
        self, ctx: Context, model: Model, wanted: Mapping[str, Statistic]
    ) -> Mapping[str, Statistic]:
        """Feed statistics with calibration data, see ``Context.statistics``."""
        return gather(model, wanted, ctx)

    def inputs(
        self, ctx: Context, layers: Iterable[LinearWeight], grams: bool
    ) -> Mapping[str, InputStatistics]:
        """Gather what layers read, see ``Context.inputs``."""
        return Inputs(ctx, layers) if grams else Inputs(ctx, layers, largest=0)


def make_context(samples: Splits, reference: Model, **fields: Any) -> Context:
    """Return a context with an engine behind it.

    Args:
        samples: Disjoint splits.
        reference: The model the run started from.
        **fields: Every other field of ``Context``.
    """
    fields.setdefault("engine", Engine())
    return Context(samples=samples, reference=reference, **fields)
