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
    for the cost spent (Lagrangian relaxation; Shoham and Gersho 1988). Where the
    next step of an item does not fit any more, its best single choice that does takes
    its place.

    Args:
        items: The choices of each item, at least one.
        budget: What the costs may come to. If not even the cheapest choices fit, they
            are what is returned.

    Returns:
        The index of the choice for each item.
    """
    hulls = [_hull(choices) for choices in items]
    chosen = [hull[0] for hull in hulls]
    spent = sum(items[i][at][0] for i, at in enumerate(chosen))
    queue: list[tuple[float, int, int]] = []

    def push(index: int) -> None:
        """Queue the next step of an item: on its hull, or the best that fits."""
        choices = items[index]
        cost, loss = choices[chosen[index]]
        ahead = [at for at in hulls[index] if choices[at][0] > cost][:1]
        if ahead and spent + choices[ahead[0]][0] - cost > budget:
            ahead = [
                at
                for at, (dearer, _) in enumerate(choices)
                if dearer > cost and spent + dearer - cost <= budget
            ]
        gains = [
            ((loss - choices[at][1]) / (choices[at][0] - cost), at) for at in ahead
        ]
        gain, at = max(gains, default=(0.0, 0))
        if gain > 0:
            heapq.heappush(queue, (-gain, index, at))

    for index in range(len(items)):
        push(index)
    while queue:
        _, index, at = heapq.heappop(queue)
        step = items[index][at][0] - items[index][chosen[index]][0]
        if spent + step <= budget:
            spent += step
            chosen[index] = at
        push(index)
    return chosen


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
