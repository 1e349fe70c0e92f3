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
from onnxshrink.quantization.dynamic import largest_pair
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


def test_headroom_leaves_no_pair_that_clips() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((64, 32)) * rng.uniform(0.1, 1, 32)
    scale = np.abs(real).max(axis=0) / 127
    codes = np.round(real / scale).astype(np.int64)

    def peaks(codes: Any) -> Any:
        return 255.0 * largest_pair(codes.T).max(axis=1)

    assert (peaks(codes) > 32767).any()
    factor = processors.headroom(peaks(codes))
    narrow = np.round(real / scale * factor).astype(np.int64)
    assert peaks(narrow).max() <= 32767
    # No channel gives up more than the bit that a reduced range takes from all.
    assert np.round(127 * factor).min() >= 63


def test_a_depthwise_convolution_does_not_add_in_pairs() -> None:
    codes = np.full((4, 1, 3, 3), 127)
    assert not processors.adds_pairs(layer_of(codes, "Conv", group=4))
    assert processors.adds_pairs(layer_of(np.full((8, 1, 3, 3), 127), "Conv", group=4))


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
    assert processors.adds_pairs(layer) == (group != shape[0])
    if processors.adds_pairs(layer):
        clipped = clipped_sums(layer, codes, rows)
        assert clipped.any()
        exact -= clipped
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
