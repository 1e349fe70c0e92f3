"""What the author of a pass is given: sites, costs, and a context that remembers."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import onnxshrink.base
from onnxshrink import Model, Samples, Savings, Site, Splits, UsageError
from onnxshrink.base import Context, Cost, Memory
from onnxshrink.structure.selection import selected
from onnxshrink.testing import example_models, make_context


@dataclass(frozen=True, kw_only=True)
class Ranked(Site):
    """A weight that gets a rank."""

    rank: int
    pattern: str = ""
    least: float | None = None
    factors: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)


def context(splits: Splits | None = None) -> Context:
    model = Model.load(example_models()["convolutions"])
    return make_context(samples=splits or Splits.build(model), reference=model)


# --- sites ------------------------------------------------------------------------


def test_a_site_shows_its_own_fields_but_for_those_it_hides() -> None:
    site = Ranked("w", "MatMul", Savings(8), rank=3, factors=np.zeros((2, 2)))

    assert site.how() == {"rank": 3}
    assert Ranked("w", "MatMul", rank=3, pattern="2:4").how() == {
        "rank": 3,
        "pattern": "2:4",
    }
    assert dataclasses.replace(site, rank=2).how() == {"rank": 2}
    assert hash(site) == hash(Ranked("w", "MatMul", Savings(8), rank=3))
    assert repr(site) == (
        "Ranked(where='w', kind='MatMul', savings=Savings(bytes=8, macs=0, "
        "seconds=None), rank=3, pattern='', least=None)"
    )


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ((8, 4, {"share": 0.5}), {}),
        ((8,), {"macs_saved": 4, "detail": {"share": 0.5}}),
        ((), {"bytes_saved": 8, "macs_saved": 4, "detail": {"share": 0.5}}),
    ],
)
def test_what_a_site_took_before_works_and_warns(
    place: tuple[Any, ...], names: dict[str, Any]
) -> None:
    with pytest.warns(DeprecationWarning, match="goes in the next release"):
        site = Site("w", "Gemm", *place, **names)

    assert site.savings == Savings(bytes=8, macs=4)
    assert site.how() == {"share": 0.5}
    assert dataclasses.replace(site, kind="Conv").how() == {"share": 0.5}
    with pytest.warns(DeprecationWarning, match=r"savings\.bytes"):
        assert site.bytes_saved == 8
    with pytest.warns(DeprecationWarning, match=r"savings\.macs"):
        assert site.macs_saved == 4
    with pytest.warns(DeprecationWarning, match="fields of a subclass"):
        assert site.detail == {"share": 0.5}


def test_a_warning_points_at_the_line_that_uses_the_old_name() -> None:
    for use in (
        lambda: Site("w", "Gemm", 8),
        lambda: Site("w", "Gemm", Savings(8)).bytes_saved,
        lambda: context().left,
    ):
        with pytest.warns(DeprecationWarning, match="next release") as caught:
            use()
        assert [warning.filename for warning in caught] == [__file__]


def test_a_subclass_takes_the_old_arguments_too() -> None:
    with pytest.warns(DeprecationWarning, match="Ranked"):
        site = Ranked("w", "Gemm", detail={"share": 0.5}, bytes_saved=8, rank=2)
    assert site.savings.bytes == 8
    assert site.how() == {"rank": 2, "share": 0.5}


def test_a_share_of_savings_keeps_what_is_not_known() -> None:
    assert Savings(10, 7, 0.5) * 0.5 == Savings(5, 4, 0.25)
    assert Savings(10, 7) * 0.5 == Savings(5, 4, None)


def test_costs_add_up_and_their_difference_is_saved() -> None:
    whole, part = Cost(100, 50, 3.0), Cost(20, 10, 1.0)

    assert whole - (part + part) == Savings(60, 30, 1.0)
    assert whole - Cost(20, 10) == Savings(80, 40, None)
    assert part + Cost(1, 1) == Cost(21, 11, None)


# --- names that moved -------------------------------------------------------------


def test_names_that_moved_are_found_here_for_one_more_release() -> None:
    with pytest.warns(DeprecationWarning, match="structure.selection"):
        assert onnxshrink.base.selected is selected  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'chosen'"):
        onnxshrink.base.chosen  # type: ignore[attr-defined]  # noqa: B018


def test_left_is_skips_under_its_old_name() -> None:
    ctx = context()
    ctx.skipped("w", "is shared")
    with pytest.warns(DeprecationWarning, match="skips"):
        assert ctx.left == [("w", "is shared")]
    with pytest.warns(DeprecationWarning, match="skips"):
        quiet = dataclasses.replace(ctx, left=[])  # type: ignore[call-arg]
    quiet.skipped("v", "is shared")
    assert (quiet.skips, ctx.skips) == ([("v", "is shared")], [("w", "is shared")])


# --- memory -----------------------------------------------------------------------


def test_what_is_remembered_is_made_once() -> None:
    ctx, made = context(), []

    def make() -> list[int]:
        made.append(1)
        return made

    assert ctx.remember(("a", 1), make) is ctx.remember(("a", 1), make)
    assert made == [1]
    ctx.remember(("a", 2), make)
    assert made == [1, 1]


def test_nothing_is_remembered_as_well() -> None:
    ctx, made = context(), []
    for _ in range(2):
        assert ctx.remember("nothing", lambda: made.append(1)) is None
    assert made == [1]


def test_threads_wait_for_the_one_that_makes_it() -> None:
    memory, made, started = Memory(), [], threading.Barrier(4)

    def make() -> int:
        made.append(1)
        return len(made)

    def ask(_: int) -> int:
        started.wait(10)
        return memory.remember("key", make)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1] * 4
    assert made == [1]


def test_a_failure_is_not_remembered() -> None:
    memory = Memory()

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        memory.remember("key", fail)
    assert memory.remember("key", lambda: 3) == 3


def test_the_large_entry_used_longest_ago_makes_room() -> None:
    mega = 1 << 20
    memory = Memory(limit=10 * mega)
    memory.put("small", "a few words")
    for name in "abc":
        memory.put(name, {"values": [np.zeros(3 * mega, np.uint8)]})
    assert memory.get("a") is not None
    memory.put("d", np.zeros(3 * mega, np.uint8))

    assert [name for name in ("small", *"abcd") if name in memory] == [
        "small",
        "a",
        "c",
        "d",
    ]
    memory.put("whole", np.zeros(11 * mega, np.uint8))
    assert "whole" not in memory
    assert "a" in memory


def test_many_small_entries_have_a_limit_too() -> None:
    memory = Memory(limit=1 << 20)
    for number in range(64):
        memory.put(number, np.zeros(1 << 15, np.uint8))
    assert 20 < sum(number in memory for number in range(64)) <= 32
    assert 63 in memory


# --- data -------------------------------------------------------------------------


def test_a_pass_that_needs_data_says_what_for_and_how_to_give_it() -> None:
    with pytest.raises(UsageError) as caught:
        context().need_data("to see what layers read")
    assert str(caught.value) == (
        "calibration samples are needed to see what layers read, and there is no data; "
        "give samples with --data, such as --data samples.npz (data= in Python)"
    )


def test_data_that_leaves_none_for_training_is_told_from_none() -> None:
    samples = Samples.from_arrays({"x": np.zeros((4, 2), np.float32)})
    ctx = context(Splits(calibration=samples))

    assert ctx.need_data("to see what layers read") is samples
    assert ctx.has_data
    assert not context().has_data
    with pytest.raises(UsageError, match=r"or importance=magnitude$"):
        context().need_data("to rank", instead="importance=magnitude")
    with pytest.raises(UsageError, match="the data given leaves none; give more with"):
        ctx.need_data("to learn scales", "training")
