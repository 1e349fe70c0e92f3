"""Runs timed in turns, so that noise meets all of them.

Tested in tests/measuring/test_measure.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["in_turns"]

_PAIRS = 9
_MOST_PAIRS = 200
_ENOUGH_SECONDS = 0.5
_TOO_LONG_SECONDS = 5.0
_CONTENDED = 1.1
_SHORTEST = 1e-3
"""Seconds below which several runs are timed as one."""


def in_turns(
    runs: Sequence[Callable[[], float]], *, here: bool = True
) -> tuple[float, float | None]:
    """Time one run, or two in turns.

    Both are warmed up, then run in pairs of alternating order, for about half a second
    and at most five; runs shorter than a millisecond are timed several at once. Where
    other work takes the processors away (more wall time than processor time, although
    a run waits for nothing else), the ratio is of processor time: it varied by 2 %
    where wall time varied by 20 %.

    Args:
        runs: One or two functions that run once and return seconds of wall time.
        here: Whether all run in this process, so that its processor time is theirs.

    Returns:
        Median milliseconds of the first, and the median over pairs of its ratio to the
        second, or ``None`` without one.
    """
    for run in runs:
        run()
    longest = max(run() for run in runs)
    inner = max(1, min(1000, round(_SHORTEST / max(longest, 1e-6))))
    wall: list[list[float]] = [[] for _ in runs]
    busy: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for number in range(_MOST_PAIRS):
        spent = time.perf_counter() - start
        if spent > _TOO_LONG_SECONDS or (number >= _PAIRS and spent > _ENOUGH_SECONDS):
            break
        order = list(range(len(runs)))
        for which in order if number % 2 else reversed(order):
            before = time.process_time()
            total = sum(runs[which]() for _ in range(inner))
            busy[which].append((time.process_time() - before) / inner)
            wall[which].append(total / inner)
    milliseconds = statistics.median(wall[0]) * 1e3
    if len(runs) == 1:
        return milliseconds, None
    contended = here and sum(map(sum, wall)) > _CONTENDED * sum(map(sum, busy))
    times = busy if contended and min(map(min, busy)) > 0 else wall
    ratios = [one / max(two, 1e-9) for one, two in zip(*times, strict=True)]
    return milliseconds, statistics.median(ratios)
