"""What goes to the child comes back the same."""

from __future__ import annotations

import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.isolation import wire


def there_and_back(message: Any) -> Any:
    stream = io.BytesIO()
    wire.send(stream, message)
    stream.seek(0)
    back = wire.receive(stream)
    assert stream.read() == b""
    return back


PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=9)
VALUES = st.recursive(
    PLAIN | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=9,
)


@given(VALUES)
def test_values_that_are_no_arrays(value: Any) -> None:
    assert there_and_back(value) == value


@given(
    hnp.arrays(
        st.sampled_from(["f2", "f4", "f8", "i1", "u2", "i8", "?", "c8", "U3", "S2"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_keep_type_shape_and_bits(array: np.ndarray[Any, Any]) -> None:
    back = there_and_back({"x": [array]})["x"][0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_arrays_of_all_kinds_stay_apart() -> None:
    view = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, 1::2]
    narrow = np.asarray([1.5, -2], ml_dtypes.bfloat16)
    words = np.asarray([["a", b"\xff"], ["", "é"]], object)
    one, two, three = there_and_back([view, narrow, words])
    assert np.array_equal(one, view)
    assert two.dtype == narrow.dtype
    assert two.tolist() == [1.5, -2.0]
    assert three.tolist() == words.tolist()


def test_maps_keep_whole_numbers_as_keys() -> None:
    scores = [{0: 0.25, 1: 0.75}]
    assert there_and_back(scores) == scores


def test_what_is_no_value_is_refused() -> None:
    with pytest.raises(TypeError, match="object cannot go to another process"):
        wire.send(io.BytesIO(), [object()])


def test_a_stream_that_ends_early_is_an_end_of_file() -> None:
    stream = io.BytesIO()
    wire.send(stream, np.zeros(9))
    cut = io.BytesIO(stream.getvalue()[:-1])
    with pytest.raises(EOFError):
        wire.receive(cut)
