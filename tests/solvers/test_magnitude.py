"""Which values are smallest, against sorting them all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.errors import ModelError
from onnxshrink.solvers.magnitude import (
    choose_smallest,
    energies,
    smallest,
    smallest_of_rows,
    zero_smallest,
)
from onnxshrink.tensors import ArrayTensor, FileTensor

Array = np.ndarray[Any, Any]

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(FLOATS, min_size=1, max_size=4), st.floats(0, 1))
def test_global_is_the_sorted_concatenation(arrays: list[Array], share: float) -> None:
    everything = np.concatenate([array.reshape(-1) for array in arrays])
    count = int(share * everything.size)
    order = np.argsort(np.abs(everything), kind="stable")[:count]
    owner = np.repeat(np.arange(len(arrays)), [array.size for array in arrays])
    expected = np.bincount(owner[order], minlength=len(arrays))
    (found,) = smallest([ArrayTensor(array) for array in arrays], [count])
    assert found == expected.tolist()


@settings(deadline=None, max_examples=40)
@given(FLOATS, st.integers(0, 100))
def test_a_selection_takes_low_indices_first(weight: Array, count: int) -> None:
    expected = np.zeros(weight.size, np.bool_)
    expected[np.argsort(np.abs(weight), axis=None, kind="stable")[:count]] = True
    assert np.array_equal(choose_smallest(ArrayTensor(weight), count), expected)


def test_chunks_do_not_change_a_selection(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-9, 9, 3_000_000).astype(np.float32)
    path = tmp_path / "values"
    path.write_bytes(values.tobytes())
    lazy = FileTensor(
        path, 0, values.nbytes, values.shape, onnx.TensorProto.FLOAT, "values"
    )
    assert len(list(lazy.chunks(4 << 20))) > 1
    expected = values.copy()
    expected[np.argsort(np.abs(values), kind="stable")[:1_234_567]] = 0
    found = zero_smallest(lazy, 1_234_567, values.dtype)
    assert np.array_equal(found, expected)


def test_a_nan_is_not_compared() -> None:
    with pytest.raises(ModelError, match="NaN"):
        smallest([ArrayTensor(np.array([1, np.nan], np.float32))], [1])


def test_the_energy_of_an_entry_is_that_of_what_it_adds_to_the_output() -> None:
    random = np.random.default_rng(1)
    weight, x = random.standard_normal((1, 3, 4)), random.standard_normal((50, 4))
    parts = x[:, None, :] * weight[0]
    found = energies(weight, np.square(x).sum(axis=0)[None])
    assert np.allclose(found[0], np.square(parts).sum(axis=0), rtol=1e-5)


def test_every_row_loses_as_many_and_the_first_rows_what_is_left() -> None:
    energy = np.array([[3, 1, 2], [5, 5, 4]], np.float32)
    assert smallest_of_rows(energy, 3).tolist() == [
        [False, True, True],
        [False, False, True],
    ]


def test_many_small_tensors_take_memory_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(16, 16)).astype(np.float32) for _ in range(200)]
    everything = np.sort(np.abs(np.concatenate(arrays, axis=None)))
    count = everything.size // 2
    tracemalloc.start()
    (found,) = smallest([ArrayTensor(array) for array in arrays], [count])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    limit = everything[count - 1]
    assert found == [int((np.abs(array) <= limit).sum()) for array in arrays]
    assert peak < 10e6  # 200 whole histograms are 105 MB
