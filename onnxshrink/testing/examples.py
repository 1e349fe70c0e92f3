"""Small models that hold one difficulty each.

Tested in tests/test_laws.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

_Array = np.ndarray[Any, np.dtype[Any]]
_Weights = Mapping[str, "Sequence[int] | _Array"]

__all__ = ["example_models"]

EXAMPLES: dict[str, Callable[[], onnx.ModelProto]] = {}


def example_models() -> dict[str, onnx.ModelProto]:
    """Return small models that hold one difficulty each, by name.

    All are valid, run in onnxruntime, and have seeded weights: weights that are shared,
    graph inputs, graph outputs, Constant nodes, behind Identity, in branches, loops and
    functions; convolutions with uneven pads, groups and strides; recurrent layers, a
    transformer, half precision, quantized weights, an opset 9 model, and more.
    """
    return {name: make() for name, make in EXAMPLES.items()}


def _example(function: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    EXAMPLES[function.__name__.strip("_")] = function
    return function


def _model(
    text: str,
    weights: _Weights,
    *,
    opset: int = 17,
    ir: int = 8,
    functions: str = "",
) -> onnx.ModelProto:
    """Return the model of an ONNX text; weights given by shape are seeded random."""
    imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
    header = f'<ir_version: {ir}, opset_import: [{imports}], producer_name: "examples">'
    model = onnx.parser.parse_model(f"{header} example {text} {functions}")
    for name, given in weights.items():
        array = given if isinstance(given, np.ndarray) else _random(name, tuple(given))
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def _random(name: str, shape: tuple[int, ...]) -> _Array:
    """Return weights of the size a trained layer has, so that outputs stay near 1."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    fan_in = int(np.prod(shape[1:])) if len(shape) > 3 else shape[-1]
    array: _Array = rng.standard_normal(shape) / np.sqrt(fan_in)
    return array.astype(np.float32)


def _positive(name: str, size: int) -> _Array:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.uniform(0.5, 1.5, size).astype(np.float32)


def _norm(prefix: str, size: int) -> dict[str, Sequence[int] | _Array]:
    """Return scale, bias, mean and variance of a BatchNormalization."""
    return {
        f"{prefix}_scale": _positive(prefix + "s", size),
        f"{prefix}_bias": (size,),
        f"{prefix}_mean": (size,),
        f"{prefix}_var": _positive(prefix + "v", size),
    }


@_example
def no_weights() -> onnx.ModelProto:
    return _model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", {})


@_example
def only_identity() -> onnx.ModelProto:
    return _model("(float[N,4] x) => (float[N,4] y) { y = Identity(x) }", {})


@_example
def perceptron() -> onnx.ModelProto:
    return _model(
        """(float[N,12] x) => (float[N,4] logits) {
            a = Gemm<transB = 1>(x, fc1_weight, fc1_bias)
            b = Relu(a)
            logits = Gemm<transB = 1>(b, fc2_weight, fc2_bias)
        }""",
        {
            "fc1_weight": (16, 12),
            "fc1_bias": (16,),
            "fc2_weight": (4, 16),
            "fc2_bias": (4,),
        },
    )


@_example
def gemm_forms() -> onnx.ModelProto:
    """Both transposes, scales that are not 1, and a missing bias."""
    return _model(
        """(float[6,N] x) => (float[N,4] y) {
            a = Gemm<transA = 1, alpha = 0.5>(x, w1)
            y = Gemm<alpha = 2.0, beta = 0.5>(a, w2, b2)
        }""",
        {"w1": (6, 8), "w2": (8, 4), "b2": (1, 4)},
    )


@_example
def matmul_add() -> onnx.ModelProto:
    """Inputs of three dimensions, and a bias that is the first operand of Add."""
    return _model(
        """(float[N,S,8] x) => (float[N,S,4] y) {
            a = MatMul(x, w1)
            b = Add(b1, a)
            c = Relu(b)
            y = MatMul(c, w2)
        }""",
        {"w1": (8, 8), "b1": (8,), "w2": (8, 4)},
    )


@_example
def matmul_weight_on_the_left() -> onnx.ModelProto:
    return _model(
        "(float[N,8,3] x) => (float[N,4,3] y) { y = MatMul(w, x) }", {"w": (4, 8)}
    )


@_example
def shared_weight() -> onnx.ModelProto:
    """One weight is read by two nodes, once transposed."""
    return _model(
        """(float[N,8] x) => (float[N,8] y) {
            a = Gemm(x, w)
            b = Relu(a)
            y = Gemm<transB = 1>(b, w)
        }""",
        {"w": (8, 8)},
    )


@_example
def tied_embedding() -> onnx.ModelProto:
    """A table that is gathered from, and transposed to score every entry."""
    return _model(
        """(int64[N,S] ids) => (float[N,S,16] y) {
            a = Gather(table, ids)
            t = Transpose<perm = [1, 0]>(table)
            y = MatMul(a, t)
        }""",
        {"table": (16, 8)},
    )


@_example
def weight_is_graph_input() -> onnx.ModelProto:
    """The weight is a default that a caller may override."""
    return _model(
        "(float[N,8] x, float[8,4] w) => (float[N,4] y) { y = MatMul(x, w) }",
        {"w": (8, 4)},
    )


@_example
def weight_is_graph_output() -> onnx.ModelProto:
    return _model(
        "(float[N,8] x) => (float[N,4] y, float[8,4] w) { y = MatMul(x, w) }",
        {"w": (8, 4)},
    )


@_example
def weight_is_constant_node() -> onnx.ModelProto:
    model = _model("(float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", {})
    value = numpy_helper.from_array(_random("w", (8, 4)), "value")
    node = onnx.helper.make_node("Constant", [], ["w"], value=value)
    model.graph.node.insert(0, node)
    return model


@_example
def weight_behind_identity() -> onnx.ModelProto:
    return _model(
        """(float[N,8] x) => (float[N,4] y) {
            a = Identity(w)
            b = Identity(a)
            y = MatMul(x, b)
        }""",
        {"w": (8, 4)},
    )


@_example
def weight_behind_transpose() -> onnx.ModelProto:
    return _model(
        """(float[N,8] x) => (float[N,4] y) {
            t = Transpose(w)
            y = MatMul(x, t)
        }""",
        {"w": (4, 8)},
    )


@_example
def subgraph_weights() -> onnx.ModelProto:
    """One branch has a weight of its own, the other reads one from outside."""
    model = _model(
        """(float[N,8] x) => (float[N,4] y) {
            total = ReduceSum<keepdims = 0>(x)
            positive = Greater(total, zero)
            y = If(positive) <
                then_branch = yes () => (float[N,4] a) { a = MatMul(x, inner) },
                else_branch = no () => (float[N,4] b) {
                    h = MatMul(x, outer)
                    b = Relu(h)
                }
            >
        }""",
        {"zero": np.zeros((), np.float32), "outer": (8, 4)},
    )
    branch = model.graph.node[-1].attribute[0].g
    branch.initializer.append(
        numpy_helper.from_array(_random("inner", (8, 4)), "inner")
    )
    return model


@_example
def loop_weights() -> onnx.ModelProto:
    """A loop runs three times over a weight from outside."""
    return _model(
        """(float[N,8] x) => (float[N,8] y) {
            y = Loop(trips, go, x) <
                body = step (int64 i, bool on, float[N,8] h) =>
                        (bool still, float[N,8] next) {
                    still = Identity(on)
                    a = MatMul(h, w)
                    next = Tanh(a)
                }
            >
        }""",
        {"trips": np.array(3), "go": np.array(True), "w": (8, 8)},
    )


@_example
def function_weights() -> onnx.ModelProto:
    """A model-local function is called twice, with weights handed in and one inside."""
    model = _model(
        """(float[N,8] x) => (float[N,8] y) {
            a = local.dense(x, w1)
            y = local.dense(a, w2)
        }""",
        {"w1": (8, 8), "w2": (8, 8)},
        functions="""<domain: "local", opset_import: ["" : 17]>
        dense (x, w) => (y) {
            a = MatMul(x, w)
            b = Add(a, bias)
            y = Relu(b)
        }""",
    )
    value = numpy_helper.from_array(_random("bias", (8,)), "value")
    node = onnx.helper.make_node("Constant", [], ["bias"], value=value)
    model.functions[0].node.insert(0, node)
    return model


@_example
def convolutions() -> onnx.ModelProto:
    """Pads that differ on each side, a stride, a dilation, and a missing bias."""
    return _model(
        """(float[N,3,9,9] x) => (float[N,10] y) {
            a = Conv<pads = [0, 1, 2, 1], strides = [2, 1]>(x, conv1_weight, conv1_bias)
            b = Relu(a)
            c = MaxPool<kernel_shape = [2, 2], strides = [1, 2]>(b)
            d = Conv<dilations = [2, 1]>(c, conv2_weight)
            e = LeakyRelu<alpha = 0.1>(d)
            h = Conv<auto_pad = "SAME_UPPER">(e, conv3_weight)
            g = GlobalAveragePool(h)
            f = Flatten(g)
            y = Gemm<transB = 1>(f, fc_weight, fc_bias)
        }""",
        {
            "conv1_weight": (8, 3, 3, 3),
            "conv1_bias": (8,),
            "conv2_weight": (8, 8, 2, 3),
            "conv3_weight": (8, 8, 2, 2),
            "fc_weight": (10, 8),
            "fc_bias": (10,),
        },
    )


@_example
def grouped_convolutions() -> onnx.ModelProto:
    """Two groups, a depthwise layer and a one-dimensional layer."""
    return _model(
        """(float[N,4,8,8] x) => (float[N,6,62] y) {
            a = Conv<group = 2, pads = [1, 1, 1, 1]>(x, grouped)
            b = Relu(a)
            c = Conv<group = 8, pads = [1, 1, 1, 1]>(b, depthwise, depthwise_bias)
            d = Reshape(c, shape)
            y = Conv(d, line)
        }""",
        {
            "grouped": (8, 2, 3, 3),
            "depthwise": (8, 1, 3, 3),
            "depthwise_bias": (8,),
            "shape": np.array([0, 8, 64]),
            "line": (6, 8, 3),
        },
    )


@_example
def transposed_convolutions() -> onnx.ModelProto:
    return _model(
        """(float[N,4,5,5] x) => (float[N,3,11,11] y) {
            a = ConvTranspose<strides = [2, 2], group = 2>(x, up1)
            b = Relu(a)
            y = ConvTranspose<pads = [1, 1, 1, 1]>(b, up2, up2_bias)
        }""",
        {"up1": (4, 3, 3, 3), "up2": (6, 3, 3, 3), "up2_bias": (3,)},
    )


@_example
def batch_normalization() -> onnx.ModelProto:
    """Behind Conv, ConvTranspose and Gemm, and one that nothing stands before."""
    return _model(
        """(float[N,3,6,6] x) => (float[N,4] y) {
            n = BatchNormalization(x, n_scale, n_bias, n_mean, n_var)
            a = Conv<pads = [1, 1, 1, 1]>(n, conv)
            b = BatchNormalization(a, b_scale, b_bias, b_mean, b_var)
            c = Relu(b)
            d = ConvTranspose<group = 2>(c, up, up_bias)
            e = BatchNormalization<epsilon = 0.001>(d, e_scale, e_bias, e_mean, e_var)
            f = GlobalAveragePool(e)
            g = Flatten(f)
            h = Gemm<transB = 1>(g, fc)
            y = BatchNormalization(h, y_scale, y_bias, y_mean, y_var)
        }""",
        {
            **_norm("n", 3),
            "conv": (8, 3, 3, 3),
            **_norm("b", 8),
            "up": (8, 3, 2, 2),
            "up_bias": (6,),
            **_norm("e", 6),
            "fc": (4, 6),
            **_norm("y", 4),
        },
    )


@_example
def residual_joins() -> onnx.ModelProto:
    """Add and Concat join branches; one output is read twice and returned as well."""
    return _model(
        """(float[N,4,6,6] x) => (float[N,5] y, float[N,4,6,6] joined) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
            r = Relu(a)
            b = Conv<pads = [1, 1, 1, 1]>(r, w2)
            joined = Add(b, x)
            c = Conv(joined, w3)
            d = Concat<axis = 1>(joined, c)
            g = GlobalMaxPool(d)
            f = Flatten(g)
            y = Gemm<transB = 1>(f, fc)
        }""",
        {
            "w1": (4, 4, 3, 3),
            "b1": (4,),
            "w2": (4, 4, 3, 3),
            "w3": (2, 4, 1, 1),
            "fc": (5, 6),
        },
    )


@_example
def recurrent() -> onnx.ModelProto:
    """LSTM in both directions without a length, then GRU and RNN."""
    return _model(
        """(float[5,N,4] x) => (float[1,N,4] y) {
            a = LSTM<hidden_size = 3, direction = "bidirectional">(x, lw, lr, lb)
            p = Transpose<perm = [0, 2, 1, 3]>(a)
            r = Reshape(p, shape)
            g = GRU<hidden_size = 4, linear_before_reset = 1>(r, gw, gr)
            s = Squeeze(g, axis)
            n, y = RNN<hidden_size = 4>(s, rw, rr)
        }""",
        {
            "lw": (2, 12, 4),
            "lr": (2, 12, 3),
            "lb": (2, 24),
            "shape": np.array([5, -1, 6]),
            "gw": (1, 12, 6),
            "gr": (1, 12, 4),
            "axis": np.array([1]),
            "rw": (1, 4, 4),
            "rr": (1, 4, 4),
        },
    )


@_example
def transformer() -> onnx.ModelProto:
    """Embedding, LayerNormalization, attention with two heads and a wide layer."""
    return _model(
        """(int64[N,6] ids) => (float[N,6,20] y) {
            e = Gather(table, ids)
            x = Add(e, positions)
            n = LayerNormalization(x, norm1_scale, norm1_bias)
            qkv = MatMul(n, qkv_weight)
            biased = Add(qkv, qkv_bias)
            q, k, v = Split<axis = 2>(biased, thirds)
            qr = Reshape(q, heads)
            kr = Reshape(k, heads)
            vr = Reshape(v, heads)
            qh = Transpose<perm = [0, 2, 1, 3]>(qr)
            kh = Transpose<perm = [0, 2, 3, 1]>(kr)
            vh = Transpose<perm = [0, 2, 1, 3]>(vr)
            scores = MatMul(qh, kh)
            scaled = Mul(scores, scale)
            weights = Softmax<axis = -1>(scaled)
            mixed = MatMul(weights, vh)
            back = Transpose<perm = [0, 2, 1, 3]>(mixed)
            flat = Reshape(back, width)
            out = MatMul(flat, out_weight)
            r = Add(x, out)
            m = LayerNormalization(r, norm2_scale, norm2_bias)
            up = MatMul(m, up_weight)
            gate = Sigmoid(up)
            act = Mul(up, gate)
            down = MatMul(act, down_weight)
            z = Add(r, down)
            y = MatMul(z, head_weight)
        }""",
        {
            "table": (20, 8),
            "positions": (6, 8),
            "norm1_scale": _positive("norm1_scale", 8),
            "norm1_bias": (8,),
            "qkv_weight": (8, 24),
            "qkv_bias": (24,),
            "thirds": np.array([8, 8, 8]),
            "heads": np.array([0, 0, 2, 4]),
            "scale": np.array(0.5, np.float32),
            "width": np.array([0, 0, 8]),
            "out_weight": (8, 8),
            "norm2_scale": _positive("norm2_scale", 8),
            "norm2_bias": (8,),
            "up_weight": (8, 16),
            "down_weight": (16, 8),
            "head_weight": (8, 20),
        },
    )


@_example
def leftovers() -> onnx.ModelProto:
    """What exporters leave behind: shapes to compute, pairs that undo each other."""
    return _model(
        """(float[N,3,4,4] x) => (float[N,10] y) {
            padded = Pad<mode = "constant">(x, pads, fill)
            a = Conv(padded, w, b)
            i = Identity(a)
            d = Dropout(i)
            up = Cast<to = 11>(d)
            down = Cast<to = 1>(up)
            t = Transpose<perm = [0, 2, 3, 1]>(down)
            u = Transpose<perm = [0, 3, 1, 2]>(t)
            shape = Shape(u)
            batch = Gather(shape, first)
            size = Unsqueeze(batch, axis)
            rest = Constant<value_ints = [-1]>()
            wanted = Concat<axis = 0>(size, rest)
            r = Reshape(u, wanted)
            s = Reshape(r, flat)
            m = MatMul(s, fc)
            unused = Relu(m)
            n = Mul(m, one)
            p = Add(n, fc_bias)
            sum = Add(two, two)
            y = Mul(p, sum)
        }""",
        {
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "fill": np.zeros((), np.float32),
            "w": (4, 3, 3, 3),
            "b": (4,),
            "first": np.array(0),
            "axis": np.array([0]),
            "flat": np.array([0, 64]),
            "fc": (64, 10),
            "one": np.ones((), np.float32),
            "fc_bias": (10,),
            "two": np.full((1,), 2, np.float32),
            "never_read": (5, 5),
        },
    )


@_example
def duplicates() -> onnx.ModelProto:
    """Equal weights under two names, and the same computation twice."""
    w = _random("w", (8, 8))
    return _model(
        """(float[N,8] x) => (float[N,8] y) {
            a = MatMul(x, w1)
            b = MatMul(x, w2)
            c = Relu(a)
            d = Relu(a)
            e = Add(b, c)
            y = Add(e, d)
        }""",
        {"w1": w, "w2": w.copy()},
    )


@_example
def half_precision() -> onnx.ModelProto:
    return _model(
        """(float16[N,8] x) => (float[N,4] y) {
            a = MatMul(x, w)
            y = Cast<to = 1>(a)
        }""",
        {"w": _random("w", (8, 4)).astype(np.float16)},
    )


@_example
def quantized() -> onnx.ModelProto:
    """An int8 weight for each channel, dequantized before Conv."""
    w = np.random.default_rng(0).integers(-127, 128, (6, 3, 3, 3), dtype=np.int8)
    return _model(
        """(float[N,3,6,6] x) => (float[N,6,4,4] y) {
            wide = DequantizeLinear<axis = 0>(w, w_scale, w_zero)
            y = Conv(x, wide, b)
        }""",
        {
            "w": w,
            "w_scale": _positive("w_scale", 6) / 64,
            "w_zero": np.zeros(6, np.int8),
            "b": (6,),
        },
    )


@_example
def empty_and_scalar() -> onnx.ModelProto:
    """A tensor without entries, scalars, and optional inputs that are left out."""
    return _model(
        """(float[N,4] x) => (float[N,4] y) {
            a = Concat<axis = 0>(x, none)
            b = Clip(a, , high)
            c = Mul(b, gain)
            y = MatMul(c, w)
        }""",
        {
            "none": np.zeros((0, 4), np.float32),
            "high": np.array(6, np.float32),
            "gain": np.array(0.5, np.float32),
            "w": (4, 4),
        },
    )


@_example
def several_outputs() -> onnx.ModelProto:
    """Outputs of three types; one is an intermediate value that is read as well."""
    return _model(
        """(float[N,8] x, bool[N,1] mask) =>
                (float[N,8] h, int64[N] best, bool[N,4] high) {
            h = Gemm<transB = 1>(x, w1, b1)
            kept = Where(mask, h, zero)
            s = MatMul(kept, w2)
            best = ArgMax<axis = 1, keepdims = 0>(s)
            high = Greater(s, zero)
        }""",
        {
            "w1": (8, 8),
            "b1": (8,),
            "zero": np.zeros((), np.float32),
            "w2": (8, 4),
        },
    )


@_example
def unnamed_and_fixed() -> onnx.ModelProto:
    """Fixed shapes, nodes without names, and names that only a machine gives."""
    model = _model(
        """(float[1,3,5,5] image) => (float[1,4,3,3] y) {
            a = Conv(image, w, b)
            y = Relu(a)
        }""",
        {"w": (4, 3, 3, 3), "b": (4,)},
    )
    names = {"image": "onnx::Conv_0", "w": "onnx::Conv_22", "b": "3", "a": "/5,6 7"}
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    model.graph.input[0].name = names["image"]
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    return model


@_example
def opset_9() -> onnx.ModelProto:
    """An old exporter's model: IR 3, where every weight is a graph input as well."""
    weights: _Weights = {"w": (4, 3, 3, 3), **_norm("n", 4), "fc": (5, 4)}
    model = _model(
        """(float[N,3,6,6] x) => (float[N,5] y) {
            a = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(x, w)
            b = BatchNormalization(a, n_scale, n_bias, n_mean, n_var)
            c = Relu(b)
            g = GlobalAveragePool(c)
            s = Squeeze<axes = [2, 3]>(g)
            d = Dropout<ratio = 0.5>(s)
            m = Gemm<transB = 1>(d, fc, zero)
            y = Softmax(m)
        }""",
        {**weights, "zero": np.zeros(5, np.float32)},
        opset=9,
        ir=3,
    )
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
        )
    return model
