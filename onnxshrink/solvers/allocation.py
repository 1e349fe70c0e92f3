"""One budget shared out among choices: what costs least for what it loses."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["share_out"]

Choices = Sequence[tuple[float, float]]
"""(cost, loss) of each way to treat one item."""


def share_out(items: Sequence[Choices], budget: float) -> list[int]:
    """Choose one way for each item so that the losses' sum is small.

    From the cheapest choice of each item on, the step that gains most for what it costs
    is taken next, along the lower convex hull of the item's choices: the best there is
    for the cost spent (Lagrangian relaxation; Shoham and Gersho 1988). What is left of
    the budget in the end goes to single choices that still fit.

    Args:
        items: The choices of each item, at least one.
        budget: What the costs may come to. If not even the cheapest choices fit, they
            are what is returned.

    Returns:
        The index of the choice for each item.
    """
    hulls = [_hull(choices) for choices in items]
    at = [0] * len(items)
    spent = sum(items[i][hull[0]][0] for i, hull in enumerate(hulls))
    queue: list[tuple[float, int]] = []

    def push(index: int) -> None:
        hull, place = hulls[index], at[index]
        if place + 1 < len(hull):
            now, then = items[index][hull[place]], items[index][hull[place + 1]]
            gain = (now[1] - then[1]) / (then[0] - now[0])
            heapq.heappush(queue, (-gain, index))

    for index in range(len(items)):
        push(index)
    while queue:
        _, index = heapq.heappop(queue)
        hull = hulls[index]
        step = items[index][hull[at[index] + 1]][0] - items[index][hull[at[index]]][0]
        if spent + step > budget:
            continue  # others may still fit
        spent += step
        at[index] += 1
        push(index)
    chosen = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    while True:
        best: tuple[float, int, int] | None = None
        for index, choices in enumerate(items):
            cost, loss = choices[chosen[index]]
            for other, (dearer, less) in enumerate(choices):
                step = dearer - cost
                if not 0 < step <= budget - spent or less >= loss:
                    continue
                gain = (loss - less) / step
                if best is None or gain > best[0]:
                    best = (gain, index, other)
        if best is None:
            return chosen
        _, index, other = best
        spent += items[index][other][0] - items[index][chosen[index]][0]
        chosen[index] = other


def _hull(choices: Choices) -> list[int]:
    """Return the choices on the lower convex hull, from the cheapest on."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i][0], choices[i][1], i))
    hull: list[int] = []
    for index in order:
        cost, loss = choices[index]
        if hull and (loss >= choices[hull[-1]][1] or cost == choices[hull[-1]][0]):
            continue
        while len(hull) > 1:
            (c0, l0), (c1, l1) = choices[hull[-2]], choices[hull[-1]]
            if (l0 - l1) * (cost - c1) > (l1 - loss) * (c1 - c0):
                break
            hull.pop()
        hull.append(index)
    return hull
