"""Pairs of tensors: how they are named, chosen and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.training.answers import values_of
from onnxshrink.training.transfer import Pair, blocks, link, pairs

MODELS = Path(__file__).parents[2] / "models"
MINE, THEIRS = ["a", "b:0", "c"], ["a", "x:0", "y"]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a", Pair("a", "a", "mse", 2.0)),
        ("a:y", Pair("a", "y", "mse", 2.0)),
        ("b:0:x:0", Pair("b:0", "x:0", "mse", 2.0)),
        ("c:x:0:attention", Pair("c", "x:0", "attention", 2.0)),
        ("a:cosine", Pair("a", "a", "cosine", 2.0)),
        ("b:0:a:mse:0.5", Pair("b:0", "a", "mse", 0.5)),
    ],
)
def test_a_pair_is_cut_where_both_names_are_known(text: str, pair: Pair) -> None:
    assert pairs([text], MINE, THEIRS, 2.0) == [pair]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("d:a", "the model has no value 'd'"),
        ("a:yy", "the teacher has no value 'yy'. Did you mean 'y'"),
        ("c", "the teacher has no value 'c'"),
        ("a:a:mse:0", "a weight is above 0, not '0'"),
        ("a:a:mse:nan", "a weight is above 0, not 'nan'"),
        ("a:a:mse:big", "a weight is above 0, not 'big'"),
    ],
)
def test_a_pair_that_names_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        pairs([text], MINE, THEIRS, 1.0)


@pytest.mark.parametrize("name", ["residual-cnn", "vit"])
def test_ends_of_blocks_are_sums_of_two_computed_values(name: str) -> None:
    model = Model.load(MODELS / f"{name}.onnx")
    found = blocks(model, values_of(model))
    assert 2 <= len(found) <= 4
    makers = {t.name: node for node in model.graph.nodes for t in node.outputs}
    for one in found:
        assert makers[one].op == "Add"
        assert all(tensor.inputs for tensor in makers[one].inputs)
    assert blocks(model, found[1:]) == found[1:]


def test_without_sums_activations_are_taken() -> None:
    model = Model.load(MODELS / "lenet-5.onnx")
    found = blocks(model, values_of(model))
    makers = {t.name: node.op for node in model.graph.nodes for t in node.outputs}
    assert found
    assert {makers[name] for name in found} <= {"Relu", "Tanh"}
    assert blocks(model, []) == []


@pytest.mark.parametrize(
    ("mine", "theirs", "axis"),
    [
        ((4, 3), (4, 5), 1),
        ((4, 3, 8, 8), (4, 5, 8, 8), 1),
        ((4, 8, 8, 3), (4, 8, 8, 5), 3),
        ((4, 7, 3), (4, 7, 5), 2),
        ((4, 3, 7), (4, 5, 7), 1),
        ((4, 3, 8, 8), (4, 3, 8, 8), 1),
        ((4, 7, 3), (4, 7, 3), 2),
    ],
)
def test_the_axis_that_differs_is_that_of_channels(
    mine: tuple[int, ...], theirs: tuple[int, ...], axis: int
) -> None:
    made = link(Pair("a", "b"), 0, np.zeros(mine), np.ones(theirs))
    assert (made.axis, made.widths) == (axis, (mine[axis], theirs[axis]))
    assert made.is_projected == (mine != theirs)
    assert not link(
        Pair("a", "b", "cosine"), 0, np.zeros(mine), np.ones(mine)
    ).is_projected


@pytest.mark.parametrize(
    ("kind", "mine", "theirs", "says"),
    [
        ("mse", (4, 3, 8, 8), (4, 5, 4, 4), r"\[3, 8, 8\] for a sample"),
        ("mse", (4, 3, 8, 8), (4, 3, 4, 8), "only the number of channels"),
        ("mse", (4, 3), (4, 3, 1), "only the number of channels"),
        ("mse", (4,), (4,), "only the number of channels"),
        ("attention", (4, 3), (4, 3), "channels and positions"),
        ("mse", (4, 3, 1, 1, 1, 1), (4, 2, 1, 1, 1, 1), "cannot be mapped"),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(
    kind: Any, mine: tuple[int, ...], theirs: tuple[int, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        link(Pair("a", "b", kind), 0, np.zeros(mine), np.zeros(theirs))
