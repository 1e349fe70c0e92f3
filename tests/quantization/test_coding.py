"""Codes of one weight, as the forms that read them choose them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnxshrink.quantization import dynamic, weightonly
from onnxshrink.quantization.coding import (
    Coding,
    CodingTask,
    Rounding,
    code_weight,
    code_weights,
)
from onnxshrink.solvers import rounding
from onnxshrink.solvers.rounding import decode, error
from onnxshrink.structure.layers import Layout
from onnxshrink.tensors import ArrayTensor

Array = np.ndarray[Any, Any]


def _weight() -> tuple[Array, Array]:
    """A MatMul's weight [inputs, outputs], and the Gram matrix of its inputs."""
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 32)) @ random.standard_normal((32, 32))
    return random.standard_normal((32, 10)).astype(np.float32), (x.T @ x)[None]


def _task(coding: Coding, gram: Array | None = None) -> CodingTask:
    weight, _ = _weight()
    layout = Layout(weight.shape, (1, *weight.shape), (0, 2, 1))
    return CodingTask(ArrayTensor(weight), layout, coding, gram)


def test_dynamic_codes_are_int8_with_a_scale_for_each_output() -> None:
    weight, gram = _weight()
    grid, codes = code_weight(_task(Coding("dynamic", "int4"), gram))
    assert codes.dtype == np.int8
    assert codes.shape == (10, 32)
    assert grid.scale.shape == (10, 1)
    wanted, same = dynamic.quantized(weight.T, gram=gram)
    assert np.array_equal(codes, same)
    assert np.array_equal(grid.scale, wanted.scale)
    # The sums of neighbours fit 16 bits, whatever the activations.
    assert dynamic.largest_pair(codes.astype(int)).max() <= dynamic.PAIR


@pytest.mark.parametrize("rounding", ["nearest", "mse", "hqq", "auto"])
def test_without_inputs_every_weight_is_next_to_its_value(rounding: Rounding) -> None:
    coding = Coding("none", "int4", block=16, rounding=rounding)
    grid, codes = code_weight(_task(coding))
    assert grid.block == 16
    assert grid.scale.shape == (10, 2)
    scale, zero = (np.broadcast_to(a, codes.shape) for a in grid.columns(32))
    values = np.arange(-8, 8)[:, None, None]
    off = np.abs((values - zero) * scale - _weight()[0].T).min(axis=0)
    found = np.abs(decode(codes, grid) - _weight()[0].T)
    assert np.allclose(found, off, atol=1e-6)


@pytest.mark.parametrize("rounding", ["auto", "gptq", "learned", "adaround"])
def test_with_inputs_the_outputs_move_less(rounding: Rounding) -> None:
    weight, gram = _weight()
    coding = Coding("none", "int4", rounding=rounding)
    grid, codes = code_weight(_task(coding, gram))
    clever = error(weight.T, codes, grid, gram)
    grid, codes = code_weight(_task(coding))
    assert clever < 0.9 * error(weight.T, codes, grid, gram)


@pytest.mark.parametrize("rounding", ["auto", "learned", "adaround", "hqq"])
def test_one_scale_serves_all_rows_if_it_is_shared(rounding: Rounding) -> None:
    _, gram = _weight()
    coding = Coding("none", "int4", block=16, shared=True, rounding=rounding)
    grid, _ = code_weight(_task(coding, gram))
    assert grid.scale.shape == (10, 1)
    assert len(np.unique(grid.scale)) == len(np.unique(grid.zero)) == 1


@pytest.mark.parametrize("weights", sorted(weightonly.LEVELS))
def test_codes_keep_to_their_levels_in_one_byte(weights: str) -> None:
    grid, codes = code_weight(_task(Coding("none", weights)))
    levels = weightonly.LEVELS[weights]
    assert codes.dtype == (np.int8 if levels.low < 0 else np.uint8)
    assert codes.min() >= levels.low
    assert codes.max() <= levels.high
    assert (grid.low, grid.high) == (levels.low, levels.high)


def test_weights_of_one_value_are_coded_as_alone_with_one_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, gram = _weight()
    tasks = [
        _task(Coding("none", "int4", block=16), gram),
        _task(Coding("dynamic"), gram),
        _task(Coding("none", "int8"), gram),
    ]
    alone = [code_weight(task) for task in tasks]
    made = []
    factor = rounding._factors
    monkeypatch.setattr(
        rounding, "_factors", lambda *given: made.append(1) or factor(*given)
    )
    for (one, codes), (two, same) in zip(code_weights(tasks), alone, strict=True):
        assert np.array_equal(codes, same)
        assert np.array_equal(one.scale, two.scale)
    assert len(made) == 1


def test_what_is_known_of_inputs_weighs_the_weights() -> None:
    weight, _ = _weight()
    squares = np.where(np.arange(32) % 4 == 0, 100.0, 0.01)
    gram = np.diag(squares)
    coding = Coding("none", "int4", block=16)
    blind = error(weight.T, *reversed(code_weight(_task(coding))), gram)
    task = replace(_task(coding), squares=squares)
    assert error(weight.T, *reversed(code_weight(task)), gram) < 0.7 * blind
