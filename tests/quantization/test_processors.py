"""Targets: rules for processors, and sums of two products in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.quantization import processors
from onnxshrink.structure import layers

AVX512 = "avx512f avx512bw avx512dq avx512vl"
AVX2 = "processor : 0\nmodel name : Some CPU\nflags : fpu avx avx2\n"


def layer_of(
    weight: np.ndarray, op: str = "MatMul", **attributes: Any
) -> layers.LinearWeight:
    """Return the layer that multiplies ``x`` with a weight."""
    rank = weight.ndim
    shape = ["N", *[None] * (rank - 1)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    (layer,) = layers.find(Model.load(made))
    return layer


@pytest.mark.parametrize(
    ("machine", "flags", "target", "known"),
    [
        ("x86_64", "avx2", "avx2", True),
        ("AMD64", f"avx2 {AVX512} avx512_vnni", "vnni", True),
        ("x86_64", f"avx2 {AVX512}", "avx2", True),
        ("x86_64", f"avx2 avx_vnni {AVX512}", "avx2", True),
        ("x86_64", "avx2 avx_vnni", "vnni", True),
        ("x86_64", "", "avx2", False),
        ("aarch64", "", "arm", True),
        ("arm64", "", "arm", True),
        ("riscv64", "", "any", False),
    ],
)
def test_flags_of_a_processor_choose_its_rules(
    machine: str, flags: str, target: str, known: bool
) -> None:
    text = f"model name\t: X\nflags\t\t: fpu {flags}\n" if flags else ""
    cpu = processors.detect(text, machine)
    assert (cpu.target, cpu.known) == (target, known)


def test_auto_is_this_machine_and_says_so() -> None:
    found, words = processors.resolve("auto")
    assert found is processors.PROCESSORS[processors.detect().target]
    assert found.note in words
    assert processors.detect(AVX2, "x86_64").model == "Some CPU"


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'avx2'"):
        processors.resolve("avx1")


def test_the_bound_is_that_of_the_worst_pair_of_neighbours() -> None:
    codes = np.array([[127, 127, 0, 0], [127, 0, 127, 0], [100, -100, 28, 28]]).T
    found = processors.saturation(layer_of(codes), codes)
    np.testing.assert_array_equal(found.peak, [255 * 254, 255 * 127, 255 * 100])
    np.testing.assert_array_equal(found.bites(), [True, False, False])


def test_inputs_that_stay_small_lower_the_bound() -> None:
    codes = np.array([[127, 127, 5], [-127, -127, 5]]).T
    layer = layer_of(codes)
    found = processors.saturation(layer, codes, tops=np.array([255, 3, 255]))
    np.testing.assert_array_equal(found.peak, [258 * 127, 258 * 127])
    assert not found.bites().any()


def test_clipping_is_counted_on_the_activations_given() -> None:
    codes = np.array([[127], [127], [1]])
    rows = np.array([[255, 255, 0], [255, 0, 0], [128, 128, 7], [129, 130, 0]])
    found = processors.saturation(layer_of(codes), codes, rows)
    exact = (rows @ codes)[:, 0]
    lost = np.array([255 * 254 - 32767, 0, 0, 259 * 127 - 32767])
    assert found.peak == 255 * 254
    assert found.share == 0.5
    np.testing.assert_allclose(found.lost, np.sqrt((lost**2.0).mean()) / exact.std())


def test_activations_that_stay_small_do_not_saturate() -> None:
    codes = np.full((4, 2), 127)
    layer = layer_of(codes)
    rows = np.full((8, 4), 100)
    rows[0] = 0
    assert not processors.saturation(layer, codes, rows).bites().any()
    assert processors.saturation(layer, codes).bites().all()


@pytest.mark.parametrize("bits", [7, 8])
def test_seven_bits_never_clip(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = np.array([[top, -top], [top, -top]])
    found = processors.saturation(layer_of(codes), codes)
    assert found.bites().all() == (bits == 8)


def test_headroom_leaves_no_pair_that_clips() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((64, 32)) * rng.uniform(0.1, 1, 32)
    scale = np.abs(real).max(axis=0) / 127
    codes = np.round(real / scale).astype(np.int64)
    layer = layer_of(codes)
    found = processors.saturation(layer, codes)
    assert found.bites().any()
    factor = processors.headroom(found.peak)
    narrow = np.round(real / scale * factor).astype(np.int64)
    assert processors.saturation(layer, narrow).peak.max() <= 32767
    # No channel gives up more than the bit that a reduced range takes from all.
    assert np.round(127 * factor).min() >= 63


def test_a_depthwise_convolution_does_not_add_in_pairs() -> None:
    codes = np.full((4, 1, 3, 3), 127)
    assert not processors.adds_pairs(layer_of(codes, "Conv", group=4))
    assert processors.adds_pairs(layer_of(np.full((8, 1, 3, 3), 127), "Conv", group=4))
    assert not processors.saturation(layer_of(codes, "Conv", group=4), codes).peak.any()


def test_rows_of_a_convolution_fit_its_codes() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-127, 128, (4, 3, 2, 2))
    layer = layer_of(codes, "Conv")
    pairs = processors.sampled(layer, samples=2)
    assert pairs is not None
    ((tensor, statistic),) = pairs
    x = rng.integers(0, 256, (2, 3, 2, 2))
    statistic.update(x.astype(np.float32))
    rows = statistic.values.astype(np.int64)  # type: ignore[attr-defined]
    assert tensor.name == "x"
    matrix = codes.reshape(4, -1)
    np.testing.assert_array_equal(rows @ matrix.T, x.reshape(2, -1) @ matrix.T)
    order = np.arange(12).reshape(3, 4).T.reshape(-1)
    products = (rows[:, None, order] * matrix[None, :, order]).reshape(2, 4, 6, 2)
    wanted = np.abs(products.sum(axis=3)).max(axis=(0, 2))
    found = processors.saturation(layer, codes, rows)
    clipped = wanted > 32767
    assert clipped.any()
    np.testing.assert_array_equal(found.peak[clipped], wanted[clipped])


@pytest.mark.skipif(
    processors.detect().target != "avx2" or not processors.detect().known,
    reason="only x86 without VNNI clips",
)
@pytest.mark.parametrize(
    ("op", "shape", "group"),
    [
        ("MatMul", (7, 8), 1),
        ("Conv", (8, 3, 1, 1), 1),
        ("Conv", (8, 3, 3, 3), 1),
        ("Conv", (8, 4, 3, 3), 2),
        ("Conv", (8, 1, 3, 3), 8),
    ],
)
def test_onnxruntime_clips_exactly_what_is_said(
    op: str, shape: tuple[int, ...], group: int
) -> None:
    rng = np.random.default_rng(2)
    codes = rng.integers(60, 128, shape)
    attributes: dict[str, Any] = {"group": group} if op == "Conv" else {}
    layer = layer_of(codes, op, **attributes)
    channels = shape[0] if op == "MatMul" else shape[1] * group
    x = rng.integers(100, 256, (1, channels, *shape[2:]))
    scale = 2.0**14
    proto = integer_model(op, codes, attributes, scale)
    fast = runtime.session(proto, threads=1).run({"x": x.astype(np.float32)})["y"]
    inputs = layer.layout.matrices_shape[2]
    rows = x.reshape(1, -1)
    exact = np.concatenate(
        [
            rows[:, g * inputs : (g + 1) * inputs] @ m.T
            for g, m in enumerate(layer.layout.matrices(codes))
        ],
        axis=1,
    )[0]
    found = processors.saturation(layer, codes, rows)
    if found.share.any():
        # One row: the deviation is 0, so the clipped sums are added up here.
        exact -= clipped_sums(layer, codes, rows)
    assert bool(found.share.any()) == (group != shape[0])
    wanted = np.clip(np.round(exact / scale), 0, 255) * scale
    np.testing.assert_array_equal(fast.reshape(-1), wanted)


def clipped_sums(
    layer: layers.LinearWeight, codes: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Return what clipping takes from each output for one row of activations."""
    found = []
    taps = int(np.prod(codes.shape[2:]))
    for group, matrix in enumerate(layer.layout.matrices(codes)):
        inputs = matrix.shape[1]
        part = rows[0, group * inputs : (group + 1) * inputs]
        products = (matrix * part).reshape(len(matrix), -1, taps).swapaxes(1, 2)
        flat = products.reshape(len(matrix), -1)
        flat = np.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))
        sums = flat.reshape(len(matrix), -1, 2).sum(axis=2)
        found.append((sums - np.minimum(sums, 32767)).sum(axis=1))
    return np.concatenate(found)


def integer_model(
    op: str, codes: np.ndarray, attributes: dict[str, Any], scale: float
) -> onnx.ModelProto:
    """Return a QDQ model whose codes are its values, with a coarse output."""
    rank = codes.ndim
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "one"], ["wd"]),
        helper.make_node(op, ["xd", "wd"], ["p"], **attributes),
        helper.make_node("QuantizeLinear", ["p", "scale", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [
            numpy_helper.from_array(np.array(np.float32(1)), "one"),
            numpy_helper.from_array(np.array(np.uint8(0)), "zero"),
            numpy_helper.from_array(np.array(np.float32(scale)), "scale"),
            numpy_helper.from_array(codes.astype(np.int8), "w"),
        ],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
