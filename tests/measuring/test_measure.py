"""Measurement: figures counted by hand on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import runtime
from onnxshrink.measuring.measure import (
    Stats,
    count_parameters,
    file_bytes,
    latencies,
    measure,
)
from onnxshrink.model import Model
from onnxshrink.samples import Samples, Splits
from onnxshrink.structure.shapes import macs, macs_by_value, value_shapes


def model(text: str, header: str = "", opset: int = 17) -> Model:
    return Model.load(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : {opset}{header}]> {text}'
        )
    )


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


LINEAR = """
g (float[N, 2] x) => (float[N, 3] y)
<float[2, 3] w = {1, 0, 2, 0, 0, 3}, float[3] b = {0, 1, 0}>
{ h = MatMul(x, w) y = Add(h, b) }
"""


# Multiply-accumulates


@pytest.mark.parametrize(
    ("text", "feed", "expected"),
    [
        (LINEAR, {"x": zeros(1, 2)}, 6),
        (LINEAR, {"x": zeros(5, 2)}, 30),
        (
            "g (float[N, 4, 8, 8] x, float[6, 2, 3, 3] w) => (float[N, 6, a, b] y) "
            "{ y = Conv<group = 2, pads = [1, 1, 1, 1], strides = [2, 2]>(x, w) }",
            {"x": zeros(1, 4, 8, 8), "w": zeros(6, 2, 3, 3)},
            6 * 4 * 4 * 2 * 9,
        ),
        (
            "g (float[N, 4, 5] x, float[4, 6, 3] w) => (float[N, 6, a] y) "
            "{ y = ConvTranspose(x, w) }",
            {"x": zeros(1, 4, 5), "w": zeros(4, 6, 3)},
            4 * 5 * 6 * 3,
        ),
        (
            "g (float[K, M] a, float[P, K] b) => (float[M, P] y) "
            "{ y = Gemm<transA = 1, transB = 1>(a, b) }",
            {"a": zeros(7, 2), "b": zeros(3, 7)},
            2 * 7 * 3,
        ),
        (
            "g (float[2, 1, 3, 4] a, float[5, 4, 6] b) => (float[c, d, e, f] y) "
            "{ y = MatMul(a, b) }",
            {"a": zeros(2, 1, 3, 4), "b": zeros(5, 4, 6)},
            2 * 5 * 3 * 4 * 6,
        ),
        (
            "g (float[4] a, float[2, 4, 6] b) => (float[c, d] y) { y = MatMul(a, b) }",
            {"a": zeros(4), "b": zeros(2, 4, 6)},
            2 * 4 * 6,
        ),
        (
            "g (float[3, 4] a, float[4] b) => (float[c] y) { y = MatMul(a, b) }",
            {"a": zeros(3, 4), "b": zeros(4)},
            12,
        ),
        (
            "g (float[2, 3, 4] a, float[2, 4, 5] b) => (float[c, d, e] y) "
            '{ y = Einsum<equation = "bij, bjk -> bik">(a, b) }',
            {"a": zeros(2, 3, 4), "b": zeros(2, 4, 5)},
            2 * 3 * 4 * 5,
        ),
        (
            "g (float[7, 2, 3, 4] a, float[1, 4, 5] b) => (float[c, d, e, f] y) "
            '{ y = Einsum<equation = "...ij,...jk->...ik">(a, b) }',
            {"a": zeros(7, 2, 3, 4), "b": zeros(1, 4, 5)},
            7 * 2 * 3 * 4 * 5,
        ),
        (
            'g (float[3, 3] a) => (float[c] y) { y = Einsum<equation = "ii->i">(a) }',
            {"a": zeros(3, 3)},
            0,
        ),
        (
            "g (float[6, 2, 3] x, float[1, 16, 3] w, float[1, 16, 4] r) "
            "=> (float[a, b, c, d] y) { y = LSTM<hidden_size = 4>(x, w, r) }",
            {"x": zeros(6, 2, 3), "w": zeros(1, 16, 3), "r": zeros(1, 16, 4)},
            6 * 2 * (16 * 3 + 16 * 4),
        ),
        (
            "g (float[6, 2, 3] x, float[2, 12, 3] w, float[2, 12, 4] r) "
            "=> (float[a, b, c, d] y) "
            '{ y = GRU<hidden_size = 4, direction = "bidirectional">(x, w, r) }',
            {"x": zeros(6, 2, 3), "w": zeros(2, 12, 3), "r": zeros(2, 12, 4)},
            6 * 2 * 2 * (12 * 3 + 12 * 4),
        ),
        (
            "g (float[N] x) => (float[N] y) { y = Relu(x) }",
            {"x": zeros(3)},
            0,
        ),
    ],
)
def test_multiply_accumulates_are_those_of_the_formula(
    text: str, feed: Any, expected: int
):
    assert macs(model(text), feed) == expected


def test_integer_products_count_like_float_ones():
    text = """
    g (uint8[N, 4] x, int8[4, 5] w) => (int32[N, 5] y) { y = MatMulInteger(x, w) }
    """
    feed = {"x": zeros(3, 4, dtype=np.uint8), "w": zeros(4, 5, dtype=np.int8)}
    assert macs(model(text), feed) == 60


def test_packed_weights_count_by_their_shape():
    text = """
    g (float[N, 32] x, uint8[8, 1, 16] w, float[8] s) => (float[N, 8] y)
    { y = com.microsoft.MatMulNBits<K = 32, N = 8, bits = 4, block_size = 32>(x, w, s) }
    """
    feed = {
        "x": zeros(2, 32),
        "w": zeros(8, 1, 16, dtype=np.uint8),
        "s": zeros(8),
    }
    assert macs(model(text, ', "com.microsoft" : 1'), feed) == 2 * 32 * 8


def test_attention_counts_scores_and_weighted_sum():
    text = """
    g (float[2, 5, 8] q, float[2, 7, 8] k, float[2, 7, 8] v) => (float[a, b, c] y)
    { y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, v) }
    """
    feed = {"q": zeros(2, 5, 8), "k": zeros(2, 7, 8), "v": zeros(2, 7, 8)}
    assert macs(model(text, opset=23), feed) == 2 * (2 * 5 * 7 * 8)


def test_the_dearer_branch_counts_and_a_function_is_looked_into():
    m = model(
        """
        g (float[N, 2] x, bool c, float[2, 2] w) => (float[N, 2] y)
        {
          s = local.twice(x, w)
          y = If (c) <
            then_branch = t () => (float[N, 2] a) { a = MatMul(s, w) },
            else_branch = e () => (float[N, 2] b) { b = Neg(s) }
          >
        }
        <domain: "local", opset_import: ["" : 17]>
        twice (p, v) => (q) { q = MatMul(p, v) }
        """,
        ', "local" : 1',
    )
    feed = {"x": zeros(3, 2), "c": np.array(True), "w": zeros(2, 2)}
    assert macs(m, feed) == 2 * 3 * 4


SHAPED_BY_DATA = """
g (float[N, 4] x, float[4, 2] w) => (float[a, b] y)
<int64[1] one = {1}, float zero = {0}>
{
  keep = Greater(x, zero)
  where = NonZero(keep)
  rows, rest = Split<axis = 0, num_outputs = 2>(where)
  flat = Squeeze(rows)
  few = Gather(x, flat)
  y = MatMul(few, w)
}
"""


def test_a_shape_that_follows_the_data_is_found_by_running():
    x = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], np.float32)
    m = model(SHAPED_BY_DATA, opset=18)
    assert "few" not in value_shapes(m, {"x": (3, 4), "w": (4, 2)})
    assert macs(m, {"x": x, "w": zeros(4, 2)}) == 3 * 4 * 2


def test_a_shape_that_cannot_be_found_gives_none_not_a_guess():
    m = model(SHAPED_BY_DATA, opset=18)
    wrong = {"x": zeros(3, 5), "w": zeros(4, 2)}
    assert macs(m, wrong) is None


def test_multiply_accumulates_are_told_by_value():
    m = model(
        "g (float[N, 2] x, float[2, 2] w) => (float[N, 2] y) "
        "{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    )
    feed = {"x": zeros(3, 2), "w": zeros(2, 2)}
    assert macs_by_value(m, feed) == {"h": 12, "y": 12}


def test_value_shapes_bind_symbols_and_recorded_shapes_do_not_hinder():
    text = "g (float[N, 2] x) => (float[N, 2] y) <float[N, 2] h> "
    m = model(text + "{ h = Relu(x) y = Neg(h) }")
    assert value_shapes(m, {"x": (7, 2)})["h"] == (7, 2)


# Parameters


def test_parameters_and_nonzeros_are_those_of_float_weights():
    assert count_parameters(model(LINEAR)) == (9, 4)


def test_shapes_indices_and_scalars_are_no_parameters():
    m = model(
        """
        g (float[N, 2] x) => (float[c, d] y)
        <int64[2] shape = {-1, 2}, float half = {0.5}, float[5, 2] unused =
         {1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
        { a = Reshape(x, shape) y = Mul(a, half) }
        """
    )
    assert count_parameters(m) == (0, 0)


def test_constants_and_weights_of_subgraphs_count_once():
    m = model(
        """
        g (float[N, 2] x, bool c) => (float[N, 2] y) <float[2] w = {1, 2}>
        {
          k = Constant<value = float[2] {0, 5}>()
          s = Add(x, w)
          t = Add(s, w)
          y = If (c) <
            then_branch = t () => (float[N, 2] a) <float[2] v = {3, 0}>
              { a = Add(t, v) },
            else_branch = e () => (float[N, 2] b) { b = Add(t, k) }
          >
        }
        """
    )
    assert count_parameters(m) == (6, 4)


def test_codes_that_cast_decodes_count_without_their_scales():
    made = model(
        """
        g (float[N, 2] x, int64[N] ids) => (float[N, 3] y, float[N, 2] rows)
        <int8[2, 3] w = {1, 0, 2, 0, 0, 3}, float[1, 3] s = {1, 2, 3},
         int8[4, 2] table = {1, 0, 0, 0, 0, 0, 0, 2}, float[1] t = {2}>
        {
          f = Cast<to = 1>(w)
          m = Mul(f, s)
          y = MatMul(x, m)
          some = Gather(table, ids)
          g = Cast<to = 1>(some)
          rows = Mul(g, t)
        }
        """
    )

    assert count_parameters(made) == (14, 5)


def test_quantized_weights_count_without_their_scales():
    m = model(
        """
        g (float[N, 2] x) => (float[N, 3] y)
        <int8[2, 3] q = {1, 0, 2, 0, 0, 3}, float[3] s = {1, 1, 1},
         int8[3] z = {0, 0, 3}>
        { w = DequantizeLinear<axis = 1>(q, s, z) y = MatMul(x, w) }
        """
    )
    # Column 2 has zero point 3, so 2 is not zero and 3 is.
    assert count_parameters(m) == (6, 2)


def test_one_zero_point_serves_all():
    m = model(
        """
        g (float[N, 2] x) => (float[N, 2] y)
        <uint8[2, 2] q = {128, 0, 128, 129}, float s = {1}, uint8 z = {128}>
        { w = DequantizeLinear(q, s, z) y = MatMul(x, w) }
        """
    )
    assert count_parameters(m) == (4, 2)


def test_packed_values_equal_to_their_zero_point_are_zero():
    packed = np.full((2, 1, 8), 0x88, np.uint8)
    packed[0, 0, 0] = 0x98
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=16,
            N=2,
            bits=4,
            block_size=16,
        )
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [
            onnx.numpy_helper.from_array(packed, "w"),
            onnx.numpy_helper.from_array(np.ones(2, np.float32), "s"),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    assert count_parameters(Model.load(proto)) == (32, 1)


# Bytes


def test_file_bytes_include_external_data(tmp_path: Path):
    m = model(
        "g (float[N, 32] x) => (float[N, 32] y) <float[1] b = {1}> { y = Add(x, b) }"
    )
    m.set_weight("b", np.ones((32, 32), np.float32))
    files = m.save(tmp_path / "m.onnx", storage="plain", external="always")
    assert len(files) == 2
    (tmp_path / "other.bin").write_bytes(b"not of this model")
    expected = sum(file.stat().st_size for file in files)
    assert expected > 4096
    assert file_bytes(tmp_path / "m.onnx") == expected


# The whole


def test_measure_gives_exactly_the_figures_of_a_report(tmp_path: Path):
    m = model(LINEAR)
    path = tmp_path / "m.onnx"
    m.save(path)
    stats = measure(path, Splits.build(m), baseline=path)
    data = stats.to_json()
    assert list(data) == [
        "file_bytes",
        "parameters",
        "nonzeros",
        "macs",
        "latency_ms",
        "latency_ratio",
        "peak_memory_bytes",
        "metric",
    ]
    assert data["file_bytes"] == path.stat().st_size
    assert (data["parameters"], data["nonzeros"]) == (9, 4)
    # Random samples are feeds of two; MACs are those of one.
    assert data["macs"] == 6
    assert data["latency_ms"] > 0
    assert data["latency_ratio"] > 0
    assert data["peak_memory_bytes"] >= 0
    assert data["metric"] == {}
    assert Stats.from_json(json.loads(json.dumps(data))) == stats


def test_what_is_not_measured_is_none(tmp_path: Path):
    path = tmp_path / "m.onnx"
    model(LINEAR).save(path)
    stats = measure(path, latency=False, memory=False)
    assert stats.macs is None
    assert stats.latency_ms is None
    assert stats.latency_ratio is None
    assert stats.peak_memory_bytes is None


def test_one_sample_is_measured_whatever_the_number_of_samples(tmp_path: Path):
    m = model(LINEAR)
    path = tmp_path / "m.onnx"
    m.save(path)
    samples = Samples.of(np.ones((9, 2), np.float32)).bind(m.inputs)
    assert measure(path, samples, latency=False, memory=False).macs == 6


def test_a_slower_model_has_a_larger_ratio():
    text = "g (float[N, 512] x, float[512, 512] w) => (float[N, 512] y) "
    quick = runtime.session(model(text + "{ y = MatMul(x, w) }"), threads=1)
    steps = " ".join(f"h{i + 1} = MatMul(h{i}, w)" for i in range(8))
    slow = runtime.session(
        model(text + "{ h0 = MatMul(x, w) " + steps + " y = Identity(h8) }"), threads=1
    )
    feed = {"x": np.ones((64, 512), np.float32), "w": np.eye(512, dtype=np.float32)}
    milliseconds, ratio = latencies(slow, quick, feed)
    assert milliseconds > 0
    # Nine products against one; half of that would already be a wrong answer.
    assert ratio is not None
    assert 4.5 < ratio < 18


def test_macs_are_those_of_one_sample_with_and_without_data(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[N, 8] x) => (float[N, 4] y)'
        " { y = MatMul(x, w) }"
    )
    weight = np.ones((8, 4), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    model = Model.load(proto)
    data = Splits.build(model, {"x": np.zeros((10, 8), np.float32)})
    for splits in (data, Splits.build(model)):
        assert measure(tmp_path / "m.onnx", splits, latency=False).macs == 32
