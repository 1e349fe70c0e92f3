"""Schemes: codes are those of onnxruntime, and ranges give usable scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxshrink.errors import UsageError
from onnxshrink.quantization.schemes import (
    INT8,
    UINT8,
    Scheme,
    affine,
    limits,
    quantize,
)
from onnxshrink.runtime import run_proto

TYPES = [
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT4,
    TensorProto.UINT4,
]


def whole(data_type: int, **options: Any) -> Scheme:
    """A scheme that uses every code of a type."""
    return Scheme(data_type, *limits(data_type), symmetric=False, **options)


def runtime(
    values: np.ndarray, scale: np.ndarray, zero: np.ndarray, scheme: Scheme
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (as int32) and real values that onnxruntime gives."""
    attrs: dict[str, Any] = {} if scheme.axis is None else {"axis": scheme.axis}
    if scheme.block:
        attrs["block_size"] = scheme.block
    point = helper.make_tensor(
        "z", scheme.data_type, zero.shape, zero.astype(np.int32).reshape(-1).tolist()
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attrs),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attrs),
        helper.make_node("Cast", ["q"], ["c"], to=TensorProto.INT32),
    ]
    graph = helper.make_graph(
        nodes,
        "codes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [
            helper.make_tensor_value_info("c", TensorProto.INT32, values.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape),
        ],
        [onnx.numpy_helper.from_array(scale, "s"), point],
    )
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    codes, real = run_proto(model, {"x": values})
    return codes, real


def decoded(codes: Any, scale: Any, zero: Any) -> Any:
    """Return what codes of one scale stand for, in float32 as the runtime computes."""
    steps = codes.astype(np.int32) - zero.astype(np.int32)
    return (steps.astype(np.float32) * scale).astype(np.float64)


@pytest.mark.parametrize("data_type", TYPES)
def test_codes_are_those_of_the_runtime(data_type: int) -> None:
    scheme = whole(data_type)
    rng = np.random.default_rng(data_type)
    values = rng.normal(0, 3, 4000).astype(np.float32)
    scale, zero = affine(-2.5, 4.0, scheme)
    values[:512] = (np.arange(512) - 256 + 0.5) * scale
    codes = quantize(values, scale, zero, scheme)
    expected, real = runtime(values, scale, zero, scheme)
    np.testing.assert_array_equal(codes.astype(np.int32), expected)
    np.testing.assert_array_equal(decoded(codes, scale, zero), real)


def test_codes_of_channels_are_those_of_the_runtime() -> None:
    scheme = whole(TensorProto.INT8, axis=1)
    values = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
    values *= np.array([0.01, 1, 100], np.float32)[:, None]
    scale, zero = affine(values.min((0, 2)), values.max((0, 2)), scheme)
    codes = quantize(values, scale, zero, scheme)
    expected, _ = runtime(values, scale, zero, scheme)
    np.testing.assert_array_equal(codes, expected)


def test_codes_of_blocks_are_those_of_the_runtime() -> None:
    scheme = whole(TensorProto.UINT4, axis=0, block=16)
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    padded = np.concatenate([values, np.zeros((8, 3), np.float32)])
    blocks = padded.reshape(3, 16, 3)
    scale, zero = affine(blocks.min(1), blocks.max(1), scheme)
    codes = quantize(values, scale, zero, scheme)
    expected, _ = runtime(values, scale, zero, scheme)
    np.testing.assert_array_equal(codes.astype(np.int32), expected)


def test_infinities_take_the_outermost_codes() -> None:
    scale, zero = affine(-1, 1, UINT8)
    values = np.array([-np.inf, np.inf, 3e38, -3e38], np.float32)
    assert quantize(values, scale, zero, UINT8).tolist() == [0, 255, 255, 0]


bounds = st.floats(-(2.0**127), 2.0**127, width=32)


@given(bounds, bounds, st.sampled_from(TYPES))
def test_zero_is_exact_and_the_range_is_covered(
    first: float, second: float, data_type: int
) -> None:
    scheme = whole(data_type)
    low, high = min(first, second, 0.0), max(first, second, 0.0)
    scale, zero = affine(low, high, scheme)
    assert np.isfinite(scale)
    assert scale >= np.finfo(np.float32).tiny
    codes = quantize(np.array([low, 0, high], np.float32), scale, zero, scheme)
    real = decoded(codes, scale, zero)
    assert real[1] == 0
    # Half a step of rounding, half a step because the zero point is whole.
    room = 1.001 * float(scale) + 1e-6 * max(-low, high)
    assert abs(real[0] - low) <= room
    assert abs(real[2] - high) <= room


@given(bounds, bounds)
def test_symmetric_ranges_have_the_middle_as_zero(first: float, second: float) -> None:
    for scheme, middle in (
        (INT8, 0),
        (Scheme(TensorProto.INT8, -64, 63, symmetric=True), 0),
        (Scheme(TensorProto.UINT8, 1, 255, symmetric=True), 128),
    ):
        low, high = min(first, second), max(first, second)
        scale, zero = affine(low, high, scheme)
        assert zero == middle
        edge = np.array([low, high], np.float32)
        codes = quantize(edge, scale, zero, scheme)
        real = decoded(codes, scale, zero)
        assert (np.abs(real - edge) <= 0.51 * float(scale) + 1e-6 * np.abs(edge)).all()


def test_a_range_of_nothing_gets_scale_one() -> None:
    scale, zero = affine([0, 0], [0, 2], Scheme(TensorProto.INT8, -127, 127, True, 0))
    assert scale.tolist() == [1, np.float32(2 / 127)]
    assert zero.tolist() == [0, 0]


def test_a_range_above_zero_is_widened_to_zero() -> None:
    scale, zero = affine(100, 255, UINT8)
    assert (float(scale), int(zero)) == (1, 0)


@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1), (0, np.inf), (-np.inf, 0), (2, 1)]
)
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="bound"):
        affine(low, high, UINT8)


@pytest.mark.parametrize(
    ("data_type", "low", "high", "axis", "block"),
    [
        (TensorProto.FLOAT, 0, 1, None, 0),
        (TensorProto.UINT8, -1, 255, None, 0),
        (TensorProto.INT8, 3, 3, None, 0),
        (TensorProto.INT4, -8, 8, None, 0),
        (TensorProto.INT8, -8, 8, None, 32),
    ],
)
def test_a_scheme_that_cannot_be_is_refused(
    data_type: int, low: int, high: int, axis: int | None, block: int
) -> None:
    with pytest.raises(UsageError):
        Scheme(data_type, low, high, True, axis, block)


def test_scales_that_do_not_fit_are_refused() -> None:
    scheme = Scheme(TensorProto.INT8, -127, 127, symmetric=True, axis=0)
    with pytest.raises(UsageError, match="3 scales do not fit axis 0"):
        quantize(np.zeros((2, 2)), np.ones(3), np.zeros(3), scheme)
    scheme = Scheme(TensorProto.INT8, -127, 127, symmetric=True, axis=2)
    with pytest.raises(UsageError, match="no axis 2"):
        quantize(np.zeros((2, 2)), np.ones(2), np.zeros(2), scheme)


def test_the_opset_a_scheme_needs() -> None:
    assert UINT8.opset == 10
    assert Scheme(TensorProto.INT8, -127, 127, symmetric=True, axis=0).opset == 13
    assert whole(TensorProto.INT16).opset == 21
    assert whole(TensorProto.INT8, axis=0, block=16).opset == 21
    assert whole(TensorProto.INT2).opset == 25
