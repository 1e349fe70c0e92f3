from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.solvers.allocation import share_out

CHOICES = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=4
)


@given(st.lists(CHOICES, min_size=1, max_size=4), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_the_budget_is_kept_and_no_cheaper_choice_is_as_good(
    items: list[list[tuple[float, float]]], budget: int
) -> None:
    chosen = share_out(items, budget)
    cost = sum(item[i][0] for item, i in zip(items, chosen, strict=True))
    loss = sum(item[i][1] for item, i in zip(items, chosen, strict=True))
    cheapest = sum(min(cost for cost, _ in item) for item in items)
    assert cost <= max(budget, cheapest)
    for other in itertools.product(*(range(len(item)) for item in items)):
        their_cost = sum(item[i][0] for item, i in zip(items, other, strict=True))
        their_loss = sum(item[i][1] for item, i in zip(items, other, strict=True))
        # On the hull it is the best there is; a knapsack may be off by one step.
        if their_cost <= cost and their_loss < loss:
            steps = [
                max(loss for _, loss in item) - min(loss for _, loss in item)
                for item in items
            ]
            assert loss - their_loss <= max(steps)


def test_what_gains_most_for_its_cost_is_chosen() -> None:
    steep, flat = [(0, 10), (1, 1), (5, 0)], [(0, 4), (3, 2), (6, 0)]
    assert share_out([steep, flat], 1) == [1, 0]
    assert share_out([steep, flat], 4) == [1, 1]
    assert share_out([steep, flat], 11) == [2, 2]
    assert share_out([steep, flat], -1) == [0, 0]


@pytest.mark.parametrize("budget", [0, 3, 100])
def test_one_choice_is_taken(budget: int) -> None:
    assert share_out([[(3, 1)]], budget) == [0]
