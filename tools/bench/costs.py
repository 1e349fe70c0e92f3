"""Time of layers on this machine over that of the fixed table of ``measuring.costs``.

Layers of every kind are timed as ``ctx.costs.measured()`` does, in chains, with one
thread. A table that ranks forms rightly has the same ratio everywhere; on a processor
like the one it was made on, that is 1. Takes about a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.base import Cost
from onnxshrink.measuring.costs import FixedCosts, MeasuredCosts

CHANNELS = ((16, 32), (64, 64), (128, 256), (30, 60), (3, 32))
ROWS = (1, 16, 128)


def layers() -> Iterator[tuple[str, str, tuple[Any, ...], dict[str, Any]]]:
    """Yield (kind, method, arguments, options) of layers to time."""
    for form in ("float", "static"):
        for (inputs, outputs), kernel, size in product(CHANNELS, (1, 3), (7, 14, 28)):
            shape = inputs, outputs, (kernel, kernel), (size, size)
            yield f"conv, {form}", "conv", shape, {"form": form}
        for channels, kernel, size in product((32, 144), (3, 5), (7, 28)):
            shape = channels, channels, (kernel, kernel), (size, size)
            rest = {"groups": channels, "form": form}
            yield f"depthwise, {form}", "conv", shape, rest
        for channels, groups in product((64, 128), (2, 8)):
            shape = channels, channels, (3, 3), (14, 14)
            rest = {"groups": groups, "form": form}
            yield f"grouped, {form}", "conv", shape, rest
    forms = (("float", 4), ("static", 1), ("dynamic", 1), ("codes", 0.5), ("codes", 1))
    for (form, itemsize), rows, inner in product(
        forms, ROWS, ((256, 256), (384, 1536))
    ):
        kind = f"product, {form}" + (f" {itemsize * 8:g}" if form == "codes" else "")
        yield kind, "matmul", (rows, *inner), {"form": form, "itemsize": itemsize}


def main(arguments: list[str]) -> None:
    """Print quantiles of the ratio, for each kind."""
    fixed = FixedCosts()
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        measured = MeasuredCosts(Path(folder), threads=1)
        for kind, method, shape, options in layers():
            one, other = (
                _seconds(getattr(costs, method)(*shape, **options))
                for costs in (measured, fixed)
            )
            ratios.setdefault(kind, []).append(one / other)
            ratios.setdefault("all", []).append(one / other)
    print(f"{'layers':24} {'count':>5} {'5 %':>6} {'half':>6} {'95 %':>6}")
    for kind, found in ratios.items():
        low, middle, high = np.percentile(found, (5, 50, 95))
        print(f"{kind:24} {len(found):5} {low:6.2f} {middle:6.2f} {high:6.2f}")


def _seconds(cost: Cost) -> float:
    assert cost.seconds is not None
    return cost.seconds
