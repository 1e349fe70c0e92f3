"""Placement: what becomes codes, what stays float, what shares a scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from onnxshrink.model import Model
from onnxshrink.quantization.placement import (
    Coded,
    Codes,
    Plan,
    Planner,
    bias_codes,
    loses,
    smallest_scale,
    write,
)
from onnxshrink.quantization.schemes import UINT8, Scheme, affine
from onnxshrink.structure.layers import find

Array = np.ndarray[Any, Any]
W = np.ones((4, 4, 1, 1), np.float32)
M = np.ones((4, 4), np.float32)


def model(body: str, **weights: Array) -> Model:
    """A graph of the given nodes on x float[1,4,8,8] with output y."""
    dims = "A, B" if "Gemm" in body else "A, B, C, D"
    text = (
        '<ir_version: 10, opset_import: ["" : 17]>\n'
        f"g (float[1,4,8,8] x) => (float[{dims}] y) {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def plan(made: Model, refused: tuple[str, ...] = ()) -> Plan:
    planner = Planner(made)
    tensors = [t for n in made.graph.nodes for t in n.outputs if t.name in refused]
    tensors += [t for t in made.graph.inputs if t.name in refused]
    return planner.plan(planner.linear, tensors)


def coded(found: Plan) -> set[str]:
    return {reading.tensor.name for reading in found.readings}


def source(found: Plan, name: str) -> str:
    return str(next(r.source.name for r in found.readings if r.tensor.name == name))


def put(made: Model, found: Plan) -> Model:
    """Write a plan with ranges of 0 to 6 and weights that fill int8."""
    scheme = Scheme(TensorProto.INT8, -127, 127, symmetric=True)
    activations = {key: Coded(UINT8, *affine(0, 6, UINT8)) for key in found.ranges}
    weights = {}
    for one in found.linear:
        weight = one.layer.weight.read()
        codes = np.full(weight.shape, 127, np.int8)
        scale = np.float32(1 / 127)
        weights[one.layer.name] = Codes(
            scheme, codes, np.asarray(scale), np.asarray(np.int8(0))
        )
    write(made, found, activations, weights, {})
    made.drop_unused()
    return made


def kernels(made: Model, folder: Path) -> list[str]:
    """Operators of the graph that onnxruntime optimizes a model to."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        made.to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    graph = onnx.load(options.optimized_model_filepath).graph
    return [node.op_type for node in graph.node]


def test_a_residual_block_has_no_hole(tmp_path: Path) -> None:
    made = model(
        "a = Conv(x, w) r = Relu(a) b = Conv(r, v) s = Add(b, r) t = Relu(s) "
        "p = MaxPool<kernel_shape = [2, 2]>(t) g = GlobalAveragePool(p) "
        "f = Flatten(g) y = Gemm(f, m)",
        w=W,
        v=2 * W,
        m=M,
    )
    found = plan(made)
    assert [node.op for node in found.others] == [
        "Add",
        "MaxPool",
        "GlobalAveragePool",
        "Flatten",
    ]
    assert coded(found) == {"x", "r", "b", "t", "p", "g", "f"}
    run = kernels(put(made, found), tmp_path)
    assert run.count("QuantizeLinear") == 1
    assert run.count("QLinearConv") == 2
    assert {"QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= set(run)
    # Gemm gives floats at the end; nothing else does.
    assert not {"DequantizeLinear", "Conv", "Relu", "Add", "Gemm"} & set(run)
    assert not [node for node in made.graph.nodes if node.op == "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        "p = MaxPool<kernel_shape = [2, 2]>(a)",
        "p = Transpose<perm = [0, 1, 3, 2]>(a)",
        "n = Constant<value_ints = [1, 4, 4, 16]>() p = Reshape(a, n)",
        "p = DepthToSpace<blocksize = 1>(a)",
    ],
)
def test_what_moves_values_keeps_their_scale(body: str) -> None:
    found = plan(model(f"a = Conv(x, w) {body} y = Conv(p, v)", w=W, v=2 * W))
    assert source(found, "p") == source(found, "a")
    assert [t.name for t in found.ranges[found.readings[1].source]] == ["a"]


def test_concat_and_its_own_inputs_share_a_scale() -> None:
    wide = np.ones((4, 12, 1, 1), np.float32)
    made = model(
        "a = Conv(x, w) b = Conv(x, v) k = Conv(a, u) "
        "c = Concat<axis = 1>(a, b, k) y = Conv(c, z)",
        w=W,
        v=2 * W,
        u=3 * W,
        z=wide,
    )
    found = plan(made)
    assert source(found, "b") == source(found, "k") == source(found, "c")
    # Another convolution reads it too: that keeps the finer scale.
    assert source(found, "a") == "a"


def test_what_leads_nowhere_stays_float() -> None:
    found = plan(model("a = Conv(x, w) s = Sigmoid(a) y = Exp(s)", w=W))
    assert not found.others
    assert coded(found) == {"x", "a"}


def test_a_last_matmul_gives_floats() -> None:
    assert coded(plan(model("y = MatMul(x, m)", m=np.ones((8, 8), np.float32)))) == {
        "x"
    }


def test_a_clip_that_codes_do_not_end_at_stays() -> None:
    low, high = np.zeros((), np.float32), np.full((), 3, np.float32)
    body = "a = Conv(x, w) r = Clip(a, lo, hi) y = Conv(r, v)"
    wide = model(body, w=W, v=2 * W, lo=low, hi=high)
    assert "Clip" in [node.op for node in put(wide, plan(wide)).graph.nodes]
    close = model(body, w=W, v=2 * W, lo=low, hi=2 * high)
    assert "Clip" not in [node.op for node in put(close, plan(close)).graph.nodes]


def test_a_clip_that_others_read_in_front_of_stays() -> None:
    made = model("a = Conv(x, w) r = Relu(a) b = Conv(r, v) y = Add(a, b)", w=W, v=W)
    found = plan(made)
    assert not found.clips
    assert {"a", "r"} <= coded(found)


def test_refused_values_and_their_neighbours_stay_float() -> None:
    made = model("a = Conv(x, w) b = Add(a, a) y = Conv(b, v)", w=W, v=2 * W)
    found = plan(made, ("b",))
    assert [one.layer.name for one in found.linear] == ["w"]
    assert coded(found) == {"x", "a"}
    assert not plan(made, ("x",)).linear[1:]


def test_a_shared_weight_is_stored_once_and_not_as_floats() -> None:
    made = model("a = Conv(x, w) y = Conv(a, w)", w=W)
    put(made, plan(made))
    stored = [w for w in made.weights() if w.size == W.size]
    assert [w.data_type for w in stored] == [TensorProto.INT8]


def test_readers_in_floats_keep_a_float_input() -> None:
    made = model("a = Conv(x, w) e = Exp(x) y = Add(a, e)", w=W)
    put(made, plan(made))
    reader = next(node for node in made.graph.nodes if node.op == "Exp")
    assert reader.inputs[0].name == "x"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = ConvTranspose(x, w)", "no integer kernel of ConvTranspose"),
        ("y = Conv(x, w, b)", "bias is not constant"),
        ("y = MatMul(m, x)", "second factor"),
        ("y = MatMul(x, k)", "stack of matrices"),
    ],
)
def test_what_cannot_run_on_codes_says_why(body: str, why: str) -> None:
    if "b)" in body:
        body = "n = Constant<value_ints = [4]>() f = Flatten(x) " + (
            "i = Constant<value_ints = [0]>() j = Constant<value_ints = [4]>() "
            "h = Constant<value_ints = [1]>() q = Slice(f, i, j, h) "
            "b = Reshape(q, n) " + body
        )
    weights = {
        "w": W,
        "m": np.ones((8, 8), np.float32),
        "k": np.ones((4, 8, 8), np.float32),
    }
    used = {name: array for name, array in weights.items() if f"{name})" in body}
    used |= {name: weights[name] for name in ("w", "m") if f"{name}," in body}
    planner = Planner(model(body, **used))
    assert not planner.linear
    assert any(why in said for _, said in planner.skips)


def test_a_bias_fits_int32_with_the_smallest_scale() -> None:
    bias = np.array([1e6, -1e-3, 0], np.float32)
    least = smallest_scale(bias, 1e-4).astype(np.float32)
    weight = np.maximum(least, np.float32(1e-9))
    codes, scale = bias_codes(bias, np.asarray(1e-4, np.float32), weight)
    assert np.abs(codes.astype(np.int64)).max() <= 2**30 * 1.001
    np.testing.assert_allclose(codes * scale, bias, rtol=1e-6)


def test_codes_stay_behind_a_pool_of_floats(tmp_path: Path) -> None:
    made = model(
        "a = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(a) "
        "p = MaxPool<kernel_shape = [2, 2]>(r) b = Conv(p, v) y = Relu(b)",
        w=np.ones((4, 4, 3, 3), np.float32),
        v=2 * W,
    )
    planner = Planner(made)
    second = [one for one in planner.linear if one.layer.name == "v"]
    put(made, planner.plan(second))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        made.to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    (pool,) = (node for node in nodes if node.op_type == "MaxPool")
    makers = {name: node.op_type for node in nodes for name in node.output}
    assert makers[pool.input[0]] not in ("QuantizeLinear", "QLinearConv")
    assert "QLinearConv" in [node.op_type for node in nodes]


@pytest.mark.parametrize(
    ("shape", "group", "stride", "is_slower"),
    [
        ((8, 1, 3), 1, 1, True),
        ((8, 1, 3, 3), 1, 1, True),
        ((8, 1, 3, 3, 3), 1, 1, True),
        ((8, 3, 3, 3, 3), 1, 1, True),
        ((8, 3, 3, 3), 1, 2, True),
        ((8, 3, 3, 3), 1, 1, False),
        ((8, 4, 3, 3), 1, 2, False),
        ((8, 1, 3, 3), 8, 1, False),
        ((8, 1, 7, 7), 8, 1, True),
        ((8, 4, 1, 1), 2, 1, False),
    ],
)
def test_the_table_of_convolutions_that_lose(
    shape: tuple[int, ...], group: int, stride: int, is_slower: bool
) -> None:
    sizes = ", ".join(["N", str(shape[1] * group), *["16"] * (len(shape) - 2)])
    dims = ", ".join("NCDEF"[: len(shape)])
    strides = ", ".join([str(stride)] * (len(shape) - 2))
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 17]> '
        f"g (float[{sizes}] x) => (float[{dims}] y) "
        f"{{ y = Conv<group = {group}, strides = [{strides}]>(x, w) }}"
    )
    proto.graph.initializer.append(
        numpy_helper.from_array(np.ones(shape, np.float32), "w")
    )
    (layer,) = find(Model.load(proto))
    assert loses(layer) == is_slower
