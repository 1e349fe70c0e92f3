"""What a Context offers from rooms above its own, put together.

Tested in tests/test_base.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from onnxshrink.activations.gathering import gather
from onnxshrink.activations.inputs import Inputs
from onnxshrink.base import Context, Costs, Memory
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
        cache = _StepCache(ctx.cache, ctx.memory)
        return gather(model, wanted, dataclasses.replace(ctx, cache=cache))

    def inputs(
        self, ctx: Context, layers: Iterable[LinearWeight], grams: bool
    ) -> Mapping[str, InputStatistics]:
        """Gather what layers read, see ``Context.inputs``."""
        return Inputs(ctx, layers) if grams else Inputs(ctx, layers, largest=0)


class _StepCache(dict[Any, Any]):
    """A cache of statistics that the next attempts of the step find too."""

    def __init__(self, cache: dict[Any, Any], memory: Memory) -> None:
        super().__init__()
        self.cache, self.memory = cache, memory

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what this attempt gathered, or an earlier one."""
        found = self.cache.get(key)
        return self.memory.get(("statistics", key), default) if found is None else found

    def __setitem__(self, key: Any, statistic: Any) -> None:
        """Keep a statistic."""
        self.cache[key] = statistic
        self.memory.put(("statistics", key), statistic)


def make_context(samples: Splits, reference: Model, **fields: Any) -> Context:
    """Return a context with an engine behind it.

    Args:
        samples: Disjoint splits.
        reference: The model the run started from.
        **fields: Every other field of ``Context``.
    """
    fields.setdefault("engine", Engine())
    return Context(samples=samples, reference=reference, **fields)
