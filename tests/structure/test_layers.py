"""One view of a linear layer: its axes, its bias and its codes, by what they do."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import ModelError
from onnxshrink.model import Model
from onnxshrink.quantization.schemes import MIN_OPSET
from onnxshrink.structure.bias import bias_at, takes_bias
from onnxshrink.structure.codes import CODES
from onnxshrink.structure.layers import LinearWeight, find, free_bias, layer_at

Array = np.ndarray[Any, Any]


def built(
    nodes: str,
    weights: Mapping[str, Sequence[int] | Array],
    inputs: str = "float[2,3] x",
    opset: int = 17,
) -> Model:
    """Return a model; weights given by shape are seeded random."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
        f"g ({inputs}) => (float[] y) {{ {nodes} }}"
    )
    for name, value in weights.items():
        if not isinstance(value, np.ndarray):
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            value = rng.standard_normal(value).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    proto.graph.output[0].CopyFrom(inferred.graph.output[0])
    kind = proto.graph.output[0].type.tensor_type
    if not kind.HasField("shape"):  # onnx does not know com.microsoft
        for _ in proto.graph.input[0].type.tensor_type.shape.dim:
            kind.shape.dim.add()
    return Model.load(proto)


def the_layer(model: Model, **options: Any) -> LinearWeight:
    (layer,) = find(model, **options)
    return layer


def run(model: Model, x: Array, expose: Sequence[str] = ()) -> dict[str, Array]:
    session = runtime.session(model, expose=list(expose))
    return {name: np.asarray(value) for name, value in session.run({"x": x}).items()}


def samples(shape: Sequence[int]) -> Array:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


PRODUCTS = {
    "Conv": ("y = Conv (x, w)", (4, 3, 2, 2), (2, 3, 5, 5), {}),
    "grouped Conv": ("y = Conv <group = 2> (x, w)", (6, 2, 3), (2, 4, 5), {}),
    "depthwise Conv": ("y = Conv <group = 4> (x, w)", (4, 1, 3), (2, 4, 5), {}),
    "ConvTranspose": ("y = ConvTranspose (x, w)", (3, 5, 2, 2), (2, 3, 4, 4), {}),
    "Gemm": ("y = Gemm (x, w)", (3, 5), (2, 3), {}),
    "Gemm transB": ("y = Gemm <transB = 1> (x, w)", (5, 3), (2, 3), {}),
    "Gemm transA": ("y = Gemm <transA = 1> (x, w)", (3, 5), (3, 2), {}),
    "Gemm on the left": ("y = Gemm (w, x)", (5, 3), (3, 2), {}),
    "Gemm on the left, transA": ("y = Gemm <transA=1> (w, x)", (3, 5), (3, 2), {}),
    "Gemm on the left, transB": ("y = Gemm <transB=1> (w, x)", (5, 3), (2, 3), {}),
    "MatMul": ("y = MatMul (x, w)", (3, 5), (2, 4, 3), {}),
    "MatMul on the left": ("y = MatMul (w, x)", (5, 3), (2, 3, 4), {}),
    "stack": ("y = MatMul (x, w)", (2, 3, 5), (2, 4, 3), {}),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul (x, w)", (3, 5), (2, 4, 3), {}),
    "FusedMatMul transB": (
        "y = com.microsoft.FusedMatMul <transB = 1> (x, w)",
        (5, 3),
        (2, 4, 3),
        {},
    ),
    "FusedMatMul transA": (
        "y = com.microsoft.FusedMatMul <transA = 1> (x, w)",
        (3, 5),
        (2, 3, 4),
        {},
    ),
    "FusedMatMul on the left": (
        "y = com.microsoft.FusedMatMul <transA = 1, transB = 1> (w, x)",
        (3, 5),
        (2, 4, 3),
        {},
    ),
    "FusedGemm": (
        "y = com.microsoft.FusedGemm <alpha = 1.0, beta = 1.0, transA = 0, "
        'transB = 1, activation = "LeakyRelu", activation_alpha = 0.1> (x, w, c)',
        (5, 3),
        (2, 3),
        {"c": np.zeros(5, np.float32)},
    ),
    "FusedConv": (
        'y = com.microsoft.FusedConv <activation = "LeakyRelu", '
        "activation_params = [0.1]> (x, w)",
        (4, 3, 2, 2),
        (2, 3, 5, 5),
        {},
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_slices_along_the_axes_are_channels_of_outputs_and_inputs(name: str) -> None:
    nodes, shape, given, more = PRODUCTS[name]
    inputs = f"float[{','.join(map(str, given))}] x"
    model = built(nodes, {"w": shape, **more}, inputs)
    layer, x = the_layer(model, only=["w"], fused=True), samples(given)
    (use,) = layer.uses
    assert use.input is not None
    assert (use.input.name, use.output.name) == ("x", "y")
    assert layer.output_axis is not None
    plain = run(model, x)["y"]

    # An output that loses its slice is zero, and no other changes.
    last = shape[layer.output_axis] - 1
    values = layer.weight.read().copy()
    values[(slice(None),) * layer.output_axis + (last,)] = 0
    model.set_weight("w", values)
    changed = np.moveaxis(run(model, x)["y"] != plain, use.output_channels, 0)
    assert len(changed) == use.channels
    assert [at for at, part in enumerate(changed) if part.any()] == [last]

    # An input that is zero does what a zero slice of its weight does.
    x2 = x.copy()
    np.moveaxis(x2, use.input_channels, 0)[0] = 0
    model = built(nodes, {"w": shape, **more}, inputs)
    silenced = run(model, x2)["y"]
    values = model.weight("w").read().copy()
    at = (slice(None),) * layer.input_axis
    if name.endswith("Conv") and use.groups > 1:  # of the first group only
        values[: shape[0] // use.groups, 0] = 0
    else:
        values[(*at, 0)] = 0
    model.set_weight("w", values)
    np.testing.assert_allclose(run(model, x)["y"], silenced, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_factors_of_channels_go_with_the_matrices(name: str) -> None:
    nodes, shape, given, more = PRODUCTS[name]
    inputs = f"float[{','.join(map(str, given))}] x"
    if "activation" in nodes:
        pytest.skip("what it gives is not linear in the weight")
    more = {key: np.zeros_like(array) for key, array in more.items()}
    model = built(nodes, {"w": shape, **more}, inputs)
    layer, x = the_layer(model, only=["w"], fused=True), samples(given)
    (use,) = layer.uses
    plain = run(model, x)["y"]

    def scaled(over: Array) -> Array:
        matrices = use.layout.matrices(model.weight("w").read())
        other = built(nodes, {"w": shape, **more}, inputs)
        other.set_weight("w", use.layout.array((matrices * over).astype(np.float32)))
        return run(other, x)["y"]

    factors = np.arange(1.0, 1 + use.channels)
    wanted = np.moveaxis(plain, use.output_channels, -1) * factors
    now = np.moveaxis(scaled(use.over_outputs(factors)), use.output_channels, -1)
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-4)

    factors = np.arange(1.0, 1 + use.input_size)
    assert x.shape[use.input_channels] == use.input_size
    x2 = np.moveaxis(np.moveaxis(x, use.input_channels, -1) * factors, -1, 0)
    x2 = np.moveaxis(x2, 0, use.input_channels).astype(np.float32)
    wanted = run(model, x2)["y"]
    now = scaled(use.over_inputs(factors))
    np.testing.assert_allclose(now, wanted, rtol=1e-4, atol=1e-4)


def test_a_grouped_conv_transpose_has_channels_of_all_groups() -> None:
    model = built(
        "y = ConvTranspose <group = 2> (x, w)", {"w": (4, 3, 2)}, "float[1,4,5] x"
    )
    (use,) = the_layer(model).uses
    assert (use.groups, use.channels) == (2, 6)
    assert (use.output_axis, use.input_axis) == (1, 0)
    assert run(model, samples((1, 4, 5)))["y"].shape[use.output_channels] == 6


def test_a_weight_that_the_graph_returns_may_not_change() -> None:
    model = built("y = MatMul (x, w)", {"w": (3, 2)})
    assert the_layer(model).why_not == ""
    model.graph.outputs.append(model.weight("w").value)
    assert the_layer(model).why_not == "it is also an output of its graph"


def test_a_vector_has_one_output() -> None:
    (use,) = the_layer(built("y = MatMul (x, w)", {"w": (3,)})).uses
    assert (use.output_axis, use.input_axis, use.channels) == (None, 0, 1)


def test_a_recurrent_weight_has_inputs_last() -> None:
    model = built(
        "y, h = GRU <hidden_size = 2> (x, w, r)",
        {"w": (1, 6, 3), "r": (1, 6, 2)},
        "float[4,1,3] x",
    )
    given, own = find(model)
    assert given.input is not None
    assert own.input is not None
    assert [given.input.name, own.input.name] == ["x", "y"]
    assert [(one.output_axis, one.input_axis) for one in (given, own)] == [(1, 2)] * 2


@pytest.mark.parametrize("op", ["Gemm", "com.microsoft.FusedMatMul"])
def test_alpha_is_that_of_the_node(op: str) -> None:
    model = built(f"y = {op} <alpha = 0.5> (x, w)", {"w": (3, 2)})
    (use,) = the_layer(model, fused=True).uses
    assert use.alpha == 0.5
    model = built("y = MatMul (x, w)", {"w": (3, 2)})
    assert the_layer(model).uses[0].alpha == 1.0


def test_fused_products_are_layers_if_asked_for() -> None:
    model = built("y = com.microsoft.FusedMatMul (x, w)", {"w": (3, 2)})
    assert list(find(model)) == []
    assert the_layer(model, fused=True).kind == "FusedMatMul"
    batch = "y = com.microsoft.FusedMatMul <transBatchB = 1> (x, w)"
    assert list(find(built(batch, {"w": (3, 4, 2)}), fused=True)) == []


# --- bias -----------------------------------------------------------------------------

IMAGE = "float[2,3,4,4] x"
CODES_OF_BIAS = {
    "q": np.array([10, -20], np.int32),
    "s": np.array([0.5, 0.25], np.float32),
}
BIASES = {
    "of Conv": ("y = Conv (x, w, b)", {"w": (2, 3, 1, 1), "b": (2,)}, IMAGE),
    "of ConvTranspose": (
        "y = ConvTranspose (x, w, b)",
        {"w": (3, 2, 1, 1), "b": (2,)},
        IMAGE,
    ),
    "of Gemm": ("y = Gemm (x, w, b)", {"w": (3, 2), "b": (2,)}, ""),
    "of Gemm, a row": ("y = Gemm (x, w, b)", {"w": (3, 2), "b": (1, 2)}, ""),
    "of Gemm with beta": (
        "y = Gemm <beta = 0.25> (x, w, b)",
        {"w": (3, 2), "b": (2,)},
        "",
    ),
    "of Gemm on the left": (
        "y = Gemm (w, x, b)",
        {"w": (2, 3), "b": (2, 1)},
        "float[3,4] x",
    ),
    "behind MatMul": ("h = MatMul (x, w) y = Add (h, b)", {"w": (3, 2), "b": (2,)}, ""),
    "before MatMul": ("h = MatMul (x, w) y = Add (b, h)", {"w": (3, 2), "b": (2,)}, ""),
    "behind MatMul on the left": (
        "h = MatMul (w, x) y = Add (h, b)",
        {"w": (2, 3), "b": (2, 1)},
        "float[3,4] x",
    ),
    "behind a stack": (
        "h = MatMul (x, w) y = Add (h, b)",
        {"w": (2, 3, 2), "b": (2,)},
        "float[2,4,3] x",
    ),
    "behind Conv": (
        "h = Conv (x, w) y = Add (h, b)",
        {"w": (2, 3, 1, 1), "b": (2, 1, 1)},
        IMAGE,
    ),
    "behind Identity": (
        "c = Identity (b) h = MatMul (x, w) y = Add (h, c)",
        {"w": (3, 2), "b": (2,)},
        "",
    ),
    "a Constant": (
        "b = Constant <value = float[2] {1, 2}> () h = MatMul (x, w) y = Add (h, b)",
        {"w": (3, 2)},
        "",
    ),
    "of FusedConv": (
        'y = com.microsoft.FusedConv <activation = "LeakyRelu", '
        "activation_params = [1.0]> (x, w, b)",
        {"w": (2, 3, 1, 1), "b": (2,)},
        IMAGE,
    ),
    "behind FusedMatMul": (
        "h = com.microsoft.FusedMatMul (x, w) y = Add (h, b)",
        {"w": (3, 2), "b": (2,)},
        "",
    ),
    "one for one": ("h = MatMul (x, w) y = Add (h, b)", {"w": (3, 1), "b": ()}, ""),
    "codes": (
        "b = DequantizeLinear <axis = 0> (q, s) y = Gemm (x, w, b)",
        {"w": (3, 2), **CODES_OF_BIAS},
        "",
    ),
    "codes behind MatMul": (
        "b = DequantizeLinear <axis = 0> (q, s) h = MatMul (x, w) y = Add (h, b)",
        {"w": (3, 2), **CODES_OF_BIAS},
        "",
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_what_is_added_to_a_bias_is_added_to_the_outputs(name: str) -> None:
    nodes, weights, inputs = BIASES[name]
    model = built(nodes, weights, inputs or "float[2,3] x")
    x = samples([int(n) for n in (inputs or "float[2,3] x")[6:-3].split(",")])
    layer = the_layer(model, only=["w"], fused=True)
    bias = layer.bias
    assert bias is not None
    assert bias.why_not == ""
    (use,) = layer.uses
    before = run(model, x)[bias.output.name]
    asked = np.array([1.1, -2.3])[: use.channels]
    added = bias.add(asked)
    after = run(model, x)[bias.output.name]
    step = 0.5 if bias.scale is not None else 1e-6
    np.testing.assert_allclose(added, asked, atol=step / 2)
    moved = np.moveaxis(after - before, use.output_channels, -1)
    np.testing.assert_allclose(
        moved, np.broadcast_to(added, moved.shape), rtol=1e-5, atol=1e-5
    )


def test_a_bias_is_found_behind_codes_of_the_outputs() -> None:
    model = built(
        "h = MatMul (x, w) c = QuantizeLinear (h, s, z) d = DequantizeLinear (c, s, z) "
        "y = Add (d, b)",
        {
            "w": (3, 2),
            "b": (2,),
            "s": np.array(0.1, np.float32),
            "z": np.array(0, np.int8),
        },
    )
    bias = the_layer(model).bias
    assert bias is not None
    assert bias.weight is not None
    assert (bias.weight.name, bias.why_not) == ("b", "")


REFUSED = {
    "is not constant": ("c = Relu (x) y = Gemm (x, w, c)", {"w": (3, 3)}),
    "is also an output of its graph": (
        "y = Gemm (x, w, b)",
        {"w": (3, 2), "b": (2,)},
    ),
    "is not one value for each output": (
        "y = Gemm (x, w, b)",
        {"w": (3, 2), "b": (2, 2)},
    ),
    "is read by other nodes too": (
        "c = Gemm (x, w, b) y = Add (c, b)",
        {"w": (3, 2), "b": (2,)},
    ),
    "has codes with a zero point, or with a scale that does not fit": (
        "b = DequantizeLinear <axis = 0> (q, s, z) y = Gemm (x, w, b)",
        {"w": (3, 2), **CODES_OF_BIAS, "z": np.array([0, 1], np.int32)},
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_bias_that_is_not_free_says_why(why: str) -> None:
    nodes, weights = REFUSED[why]
    model = built(nodes, weights)
    if "an output" in why:
        model.graph.outputs.append(model.weight("b").value)
    layer = the_layer(model, only=["w"])
    bias = layer.bias
    assert bias is not None
    assert bias.why_not == why
    assert free_bias(layer) is None
    with pytest.raises(ModelError, match=f"the bias of .* {why}"):
        bias.write(np.zeros(2))


def test_a_bias_that_a_caller_may_set_is_not_known() -> None:
    model = built(
        "y = Gemm (x, w, b)", {"w": (3, 2), "b": (2,)}, "float[2,3] x, float[2] b"
    )
    bias = the_layer(model, only=["w"]).bias
    assert bias is not None
    assert bias.why_unknown == "is a graph input that a caller may set"


def test_codes_of_a_bias_end_where_their_type_does() -> None:
    nodes = "b = DequantizeLinear <axis = 0> (q, s) y = Gemm (x, w, b)"
    bias = the_layer(built(nodes, {"w": (3, 2), **CODES_OF_BIAS}), only=["w"]).bias
    assert bias is not None
    limits = np.iinfo(np.int32)
    written = bias.write(np.array([1e12, -1e12]))
    assert written.tolist() == [limits.max * 0.5, limits.min * 0.25]


def test_a_decoded_bias_that_others_read_is_not_free() -> None:
    nodes = """b = DequantizeLinear <axis = 0> (q, s)
    h = Gemm (x, w, b) y = Add (h, b)"""
    bias = the_layer(built(nodes, {"w": (3, 2), **CODES_OF_BIAS}), only=["w"]).bias
    assert bias is not None
    assert (bias.why_unknown, bias.why_not) == ("", "is read by other nodes too")


def test_an_operator_of_another_domain_has_no_bias() -> None:
    model = built("h = MatMul (x, w) y = Add (h, b)", {"w": (3, 2), "b": (2,)})
    node = the_layer(model, only=["w"]).node
    assert bias_at(model, node, 2, -1) is not None
    node.domain = "local"
    assert bias_at(model, node, 2, -1) is None


def test_a_bias_takes_up_changes_of_as_many_outputs_as_it_has() -> None:
    def layer_of(kernel: int) -> LinearWeight:
        shape = (3, 2, kernel, kernel)
        nodes = "y = ConvTranspose (x, w, b)"
        model = built(nodes, {"w": shape, "b": (2,)}, "float[2,3,4,4] x")
        return the_layer(model, only=["w"])

    assert free_bias(layer_of(1)) is not None
    assert free_bias(layer_of(2)) is None  # each place of the kernel is an output


def test_inputs_of_a_stack_have_no_statistic() -> None:
    stack = the_layer(built("y = MatMul (x, w)", {"w": (2, 3, 5)}, "float[2,4,3] x"))
    assert stack.statistics_for("gram") is None
    assert stack.uses[0].input is not None


def test_codes_of_a_bias_whose_scale_does_not_fit_are_refused() -> None:
    weights = {"w": (3, 2), **CODES_OF_BIAS, "s": np.ones(3, np.float32)}
    model = built("b = DequantizeLinear <axis = 0> (q, s) y = Gemm (x, w, b)", weights)
    bias = the_layer(model, only=["w"]).bias
    assert bias is not None
    assert "a scale that does not fit" in bias.why_not
    with pytest.raises(ModelError, match="a scale that does not fit"):
        bias.read()


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("h = MatMul (x, w) y = Add (h, b)", {"w": (3, 2), "b": (2, 1)}),
        ("h = MatMul (w, x) y = Add (h, b)", {"w": (3, 2), "b": (3,)}),
        ("y = Gemm (x, w, b)", {"w": (3, 2), "b": (2, 1)}),
    ],
)
def test_as_many_values_along_another_axis_are_no_bias_of_the_outputs(
    nodes: str, weights: dict[str, Any]
) -> None:
    bias = the_layer(built(nodes, weights), only=["w"]).bias
    assert bias is not None
    assert bias.why_not == bias.why_unknown == "is not one value for each output"


@pytest.mark.parametrize(
    "nodes",
    [
        "h = MatMul (x, w) y = Add (h, x)",  # of another value
        "h = MatMul (x, w) r = Relu (h) y = Add (r, b)",
        "h = MatMul (x, w) a = Add (h, b) y = Mul (a, h)",  # not its only reader
        "y = MatMul (x, w)",
    ],
)
def test_what_is_no_bias_is_none(nodes: str) -> None:
    model = built(nodes, {"w": (3, 3), "b": (3,)})
    assert the_layer(model, only=["w"]).bias is None


def test_a_product_that_the_graph_returns_has_no_bias_behind_it() -> None:
    model = built("h = MatMul (x, w) y = Add (h, b)", {"w": (3, 3), "b": (3,)})
    (layer,) = find(model)
    model.graph.outputs.append(layer.output)
    assert layer.bias is None


def test_a_shared_weight_has_no_bias_of_its_own() -> None:
    model = built("a = Gemm (x, w, b) y = Gemm (a, w)", {"w": (3, 3), "b": (3,)})
    layer = the_layer(model)
    assert layer.is_shared
    assert layer.bias is None


@pytest.mark.parametrize(
    ("nodes", "weights", "takes"),
    [
        ("y = Gemm (x, w)", {"w": (3, 2)}, True),
        ("y = Gemm (x, w, b)", {"w": (3, 2), "b": (2,)}, False),
        ("y = MatMul (x, w)", {"w": (3, 2)}, False),
    ],
)
def test_where_a_bias_may_be_added(
    nodes: str, weights: dict[str, Any], takes: bool
) -> None:
    model = built(nodes, weights)
    assert takes_bias(the_layer(model, only=["w"]).node) is takes


@pytest.mark.parametrize("attrs", ["alpha = 2.0", "beta = 2.0"])
def test_a_bias_beside_factors_takes_up_nothing(attrs: str) -> None:
    model = built(f"y = Gemm <{attrs}> (x, w, b)", {"w": (3, 2), "b": (2,)})
    assert free_bias(the_layer(model)) is None


# --- codes ----------------------------------------------------------------------------

SCALE = np.array([0.5, 0.25], np.float32)
WEIGHT_CODES = np.arange(-3, 3, dtype=np.int8).reshape(2, 3)
DECODED = {
    "DequantizeLinear": (
        "v = DequantizeLinear <axis = 0> (q, s) y = Gemm <transB = 1> (x, v)",
        {"q": WEIGHT_CODES, "s": SCALE},
    ),
    "Cast and Mul": (
        "c = Cast <to = 1> (q) v = Mul (c, s) y = Gemm <transB = 1> (x, v)",
        {"q": WEIGHT_CODES, "s": SCALE[:, None]},
    ),
    "blocks": (
        "c = Cast <to = 1> (q) m = Mul (c, s) v = Reshape (m, n) "
        "y = Gemm <transB = 1> (x, v)",
        {
            "q": WEIGHT_CODES.reshape(2, 1, 3),
            "s": SCALE[:, None, None],
            "n": np.array([0, -1]),
        },
    ),
}


@pytest.mark.parametrize("name", DECODED)
def test_a_weight_of_codes_is_a_layer_if_asked_for(name: str) -> None:
    nodes, weights = DECODED[name]
    model = built(nodes, weights)
    layer = the_layer(model, codes=True)
    assert (layer.name, layer.why_not, layer.kind) == ("q", "", "Gemm")
    assert layer.codes is not None
    assert layer.layout.matrices_shape == (1, 2, 3)
    assert layer.output_axis == 0
    scale = model.constant(layer.codes.scale)
    assert scale is not None
    values = layer.codes.decode(layer.weight.read(), scale.read())
    x = samples((2, 3))
    product = x @ layer.layout.matrices(values)[0].T
    np.testing.assert_allclose(run(model, x)["y"], product, rtol=1e-5)


def test_a_weight_of_codes_has_no_uses_otherwise() -> None:
    nodes, weights = DECODED["DequantizeLinear"]
    layer = the_layer(built(nodes, weights))
    assert (layer.uses, layer.codes) == ((), None)
    assert "quantized" in layer.why_not


def test_rows_of_codes_that_are_looked_up_are_a_table() -> None:
    model = built(
        "g = Gather (q, i) c = Cast <to = 1> (g) h = Gather (s, i) v = Mul (c, h) "
        "y = MatMul (x, v)",
        {
            "q": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
            "s": np.ones((4, 1), np.float32),
            "i": np.array([0, 2, 3]),
        },
    )
    layer = the_layer(model, only=["q"], codes=True, roles=["table"])
    assert [(use.kind, use.role) for use in layer.uses] == [("Gather", "table")]


def test_codes_are_of_the_types_that_quantizelinear_takes() -> None:
    assert set(MIN_OPSET) == CODES


# --- from a node ----------------------------------------------------------------------


def test_a_node_leads_to_its_weight_and_all_that_reads_it() -> None:
    model = built(
        "i = Identity (w) a = MatMul (x, i) y = Gemm <transB = 1> (a, w)", {"w": (3, 3)}
    )
    multiply, product = [n for n in model.graph.nodes if n.op != "Identity"]
    for node in (multiply, product):
        layer = layer_at(model, node)
        assert layer is not None
        assert layer.name == "w"
        assert {use.kind for use in layer.uses} == {"Gemm", "MatMul"}


@pytest.mark.parametrize("name", DECODED)
def test_a_node_leads_to_codes_if_asked_to(name: str) -> None:
    nodes, weights = DECODED[name]
    model = built(nodes, weights)
    node = model.graph.nodes[-1]
    assert layer_at(model, node) is None
    layer = layer_at(model, node, codes=True)
    assert layer is not None
    assert (layer.name, layer.uses[0].node) == ("q", node)


@pytest.mark.parametrize(
    "nodes", ["y = Relu (x)", "y = MatMul (x, x)", "y = Add(x, w)"]
)
def test_a_node_without_a_weight_leads_nowhere(nodes: str) -> None:
    model = built(nodes, {"w": (3, 3)}, "float[3,3] x")
    assert layer_at(model, model.graph.nodes[0]) is None
