"""Every gradient rule against central differences in float64.

The gradient graph runs in onnxruntime in float32, as in training. The reference is the
forward operator alone, computed by onnx's own evaluator in float64.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from scipy import special

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.training import gradients, prepare

Array = np.ndarray[Any, Any]
STEP = 1e-5
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Op:
    """One operator with inputs; those of float type are differentiated.

    An input is a shape (drawn at random), an array, or ``None`` where it is absent.
    """

    op: str
    inputs: Sequence[Any]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 20
    outputs: int = 1
    frozen: Sequence[int] = ()
    low: float = -2.0
    high: float = 2.0
    domain: str = ""
    forward: Callable[..., Array] | None = None
    note: str = ""

    def __str__(self) -> str:
        """Return what tells it from the other cases."""
        shapes = "-".join(
            "x".join(map(str, np.shape(i) if isinstance(i, np.ndarray) else i or "_"))
            if i is not None
            else "none"
            for i in self.inputs
        )
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items() if k != "name")
        return f"{self.op}[{shapes}]{attrs}{self.note}".replace(" ", "")


def drawn(case: Op) -> list[Array | None]:
    """Return the inputs; no two random values lie close to each other or to a kink."""
    random = np.random.default_rng(zlib.crc32(str(case).encode()))
    found: list[Array | None] = []
    for item in case.inputs:
        if item is None or isinstance(item, np.ndarray):
            found.append(item)
            continue
        size = int(np.prod(item))
        grid = (np.arange(size) + 0.25 + 0.5 * random.random(size)) / max(1, size)
        values = case.low + (case.high - case.low) * random.permutation(grid)
        found.append(values.reshape(item).astype(np.float32))
    return found


def built(case: Op, inputs: Sequence[Array | None], dtype: Any) -> onnx.ModelProto:
    """Return a model of one node; float inputs are inputs, the others constants."""
    feeds, constants, names = [], [], []
    for index, value in enumerate(inputs):
        name = f"x{index}" if value is not None else ""
        names.append(name)
        if value is None:
            continue
        if value.dtype.kind == "f" and index not in case.frozen:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            feeds.append(helper.make_tensor_value_info(name, kind, value.shape))
        else:
            cast = value.astype(dtype) if value.dtype.kind == "f" else value
            if case.op == "Resize":
                cast = value
            constants.append(numpy_helper.from_array(cast, name))
    while names and not names[-1]:
        names.pop()
    outs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(
        case.op, names, outs, name="it", domain=case.domain, **case.attrs
    )
    graph = helper.make_graph(
        [node],
        "g",
        feeds,
        [
            helper.make_tensor_value_info(
                o, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None
            )
            for o in outs
        ],
        constants,
    )
    imports = [helper.make_opsetid("", case.opset)]
    if case.domain:
        imports.append(helper.make_opsetid(case.domain, 1))
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for info in inferred.graph.output:
        if not info.type.tensor_type.HasField("shape"):
            # Of GroupNormalization, which has the shape of its first input.
            info.type.CopyFrom(feeds[0].type)
    return inferred


def check(case: Op, *, most: int = 30) -> None:
    """Compare the gradients of a weighted sum of the outputs."""
    inputs = drawn(case)
    feeds = {
        f"x{i}": v
        for i, v in enumerate(inputs)
        if v is not None and v.dtype.kind == "f" and i not in case.frozen
    }
    proto = built(case, inputs, np.float32)
    exact = None
    if case.forward is None:
        exact = ReferenceEvaluator(built(case, inputs, np.float64))

    def forward(values: Mapping[str, Array]) -> list[Array]:
        if case.forward is not None:
            return [case.forward(*values.values(), **case.attrs)]
        assert exact is not None
        # The evaluator's operators may write into their inputs.
        return [
            np.asarray(y)
            for y in exact.run(None, {k: v.copy() for k, v in values.items()})
        ]

    point = {name: value.astype(np.float64) for name, value in feeds.items()}
    outs = forward(point)
    random = np.random.default_rng(7)
    pulls = [random.normal(size=y.shape).astype(np.float32) for y in outs]
    # Where both engines agree on the forward pass, the reference is worth something.
    mine = runtime.session(proto, threads=1, optimize="off").run(feeds)
    for y, (name, value) in zip(outs, mine.items(), strict=True):
        np.testing.assert_allclose(value, y, rtol=1e-3, atol=1e-4, err_msg=name)

    model = prepare(Model.load(proto), {n: v.shape for n, v in feeds.items()})
    upstream = {
        f"y{i}": model.add_weight(f"pull{i}", pull) for i, pull in enumerate(pulls)
    }
    found = gradients(model, upstream, list(feeds))
    assert set(found) == set(feeds)
    exposed = [tensor.name for tensor in found.values()]
    kept = [tensor.name for tensor in model.graph.outputs]
    session = runtime.session(model, threads=1, expose=exposed)
    answer = session.run(feeds)
    for name, value in zip(kept, outs, strict=True):
        np.testing.assert_allclose(answer[name], value, rtol=1e-3, atol=1e-4)

    def loss(values: Mapping[str, Array]) -> float:
        ys = forward(values)
        return sum(float(np.sum(y * p)) for y, p in zip(ys, pulls, strict=True))

    for name, tensor in found.items():
        grad = answer[tensor.name]
        assert grad.shape == feeds[name].shape
        assert grad.dtype == np.float32
        places = np.arange(grad.size)
        if grad.size > most:
            places = random.choice(grad.size, most, replace=False)
        expected = []
        for place in places:
            ends = []
            for step in (STEP, -STEP):
                moved = {k: v.copy() for k, v in point.items()}
                moved[name].reshape(-1)[place] += step
                ends.append(loss(moved))
            expected.append((ends[0] - ends[1]) / (2 * STEP))
        scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
        np.testing.assert_allclose(
            grad.reshape(-1)[places] / scale,
            np.asarray(expected) / scale,
            atol=TOLERANCE,
            err_msg=name,
        )


def cases(*found: Op) -> Any:
    return pytest.mark.parametrize("case", found, ids=[str(c) for c in found])


I64 = np.int64


def ints(*values: int) -> Array:
    return np.array(values, I64)


# Where onnx's evaluator computes in float32, or not at all.


def erf(x: Array) -> Array:
    return np.asarray(special.erf(x))


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + special.erf(x / np.sqrt(2))))


def swish(x: Array, alpha: float) -> Array:
    return x / (1 + np.exp(-alpha * x))


def group_norm(x: Array, scale: Array, bias: Array, num_groups: int) -> Array:
    inner = x.reshape(x.shape[0], num_groups, -1)
    centred = inner - inner.mean(2, keepdims=True)
    hat = centred / np.sqrt(inner.var(2, keepdims=True) + 1e-5)
    wide = (1, -1, *[1] * (x.ndim - 2))
    return np.asarray(hat.reshape(x.shape) * scale.reshape(wide) + bias.reshape(wide))


def transposed(
    x: Array,
    w: Array,
    group: int,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    output_padding: Sequence[int] = (0, 0),
) -> Array:
    """Add a scaled kernel to the output for every input element."""
    n, c, h, wide = x.shape
    each, kh, kw = w.shape[1:]
    sh, sw = strides
    out = np.zeros((n, each * group, (h - 1) * sh + kh, (wide - 1) * sw + kw))
    for i, j, a, b in np.ndindex(n, c, h, wide):
        first = (j // (c // group)) * each
        rows = slice(a * sh, a * sh + kh), slice(b * sw, b * sw + kw)
        out[(i, slice(first, first + each), *rows)] += x[i, j, a, b] * w[j]
    top, left, bottom, right = pads
    more = np.pad(out, ((0, 0), (0, 0), *((0, extra) for extra in output_padding)))
    return more[:, :, top : more.shape[2] - bottom, left : more.shape[3] - right]


def cropped(x: Array, w: Array, strides: Sequence[int], output_shape: Any) -> Array:
    full = transposed(x, w, 1, strides)
    rows, columns = np.array(full.shape[2:]) - output_shape
    first = rows - rows // 2, columns - columns // 2
    return full[:, :, first[0] :, first[1] :][..., : output_shape[0], : output_shape[1]]


def pad_and_cut(x: Array) -> Array:
    return np.pad(x, ((0, 0), (1, 0)))[1:, :-2]


# --- elementwise ------------------------------------------------------------------


@cases(
    *(
        Op(op, shapes)
        for op in ("Add", "Sub", "Mul")
        for shapes in ([(2, 3), (2, 3)], [(2, 3, 4), (3, 1)], [(4,), (2, 1, 4)])
    ),
    Op("Mul", [(2, 3), ()]),
    Op("Div", [(2, 3), np.array([[0.5], [-2]], np.float32)]),
    Op("Div", [(1, 3), (2, 3)], low=0.5),
    Op("Sum", [(2, 3), (3,), (1, 1)]),
    Op("Mean", [(2, 3), (3,), (1, 1)]),
    Op("Max", [(2, 3), (3,), (2, 1)]),
    Op("Min", [(2, 3), (3,), (2, 1)]),
    Op("Min", [(2, 3)]),
    Op("Pow", [(2, 3), np.array(2, np.float32)], frozen=[1]),
    Op("Pow", [(2, 3), np.array(3, np.float32)], frozen=[1]),
    Op("Pow", [(2, 3), np.array(-0.5, np.float32)], frozen=[1], low=0.5),
    Op("Pow", [(2, 3), np.array(2, I64)]),
    Op("Pow", [(2, 3), (3,)], low=0.5),
    Op("Where", [np.array([[True], [False]]), (2, 3), (3,)]),
    Op("Clip", [(3, 4), np.array(-1, np.float32), np.array(1, np.float32)]),
    Op("Clip", [(3, 4), None, np.array(1, np.float32)], frozen=[2]),
    Op("Clip", [(3, 4), np.array(-1, np.float32)], frozen=[1]),
    Op("Clip", [(3, 4)]),
    Op("PRelu", [(2, 3, 4), (3, 1)]),
    Op("PRelu", [(2, 3), ()]),
    Op("PRelu", [(2, 3, 2, 2), (3, 1, 1)]),
    Op("Identity", [(2, 3)]),
    Op("Dropout", [(2, 3)]),
    Op("Abs", [(3, 4)]),
    Op("Neg", [(3, 4)]),
    Op("Exp", [(3, 4)]),
    Op("Log", [(3, 4)], low=0.2),
    Op("Sqrt", [(3, 4)], low=0.2),
    Op("Reciprocal", [(3, 4)], low=0.4),
    Op("Erf", [(3, 4)], forward=erf),
    Op("Sin", [(3, 4)]),
    Op("Cos", [(3, 4)]),
    Op("Atan", [(3, 4)]),
    Op("Relu", [(3, 4)]),
    Op("LeakyRelu", [(3, 4)], {"alpha": 0.2}),
    Op("LeakyRelu", [(3, 4)]),
    Op("ThresholdedRelu", [(3, 4)], {"alpha": 0.3}),
    Op("Sigmoid", [(3, 4)]),
    Op("HardSigmoid", [(5, 4)], {"alpha": 0.4, "beta": 0.45}),
    Op("HardSigmoid", [(5, 4)], low=-4, high=4),
    Op("HardSwish", [(5, 4)], low=-5, high=5),
    Op("Tanh", [(3, 4)]),
    Op("Elu", [(3, 4)], {"alpha": 0.7}),
    Op("Selu", [(3, 4)]),
    Op("Selu", [(3, 4)], {"alpha": 1.5, "gamma": 0.8}),
    Op("Celu", [(3, 4)], {"alpha": 0.6}),
    Op("Softplus", [(3, 4)]),
    Op("Softsign", [(3, 4)]),
    Op("Mish", [(3, 4)]),
    Op("Gelu", [(3, 4)], forward=gelu),
    Op("Gelu", [(3, 4)], {"approximate": "tanh"}),
    Op("Gelu", [(3, 4)], domain="com.microsoft", forward=gelu, note="-microsoft"),
    Op("Swish", [(3, 4)], {"alpha": 1.5}, opset=24, forward=swish),
    Op("Softmax", [(3, 4)]),
    Op("Softmax", [(2, 3, 4)], {"axis": 1}),
    Op("LogSoftmax", [(3, 4)]),
    Op("LogSoftmax", [(2, 3, 4)], {"axis": 0}),
)
def test_elementwise(case: Op) -> None:
    check(case)


# --- linear -----------------------------------------------------------------------


@cases(
    *(
        Op("MatMul", shapes)
        for shapes in (
            [(2, 3), (3, 4)],
            [(5, 2, 3), (3, 4)],
            [(2, 5, 2, 3), (5, 3, 4)],
            [(1, 2, 3), (4, 3, 2)],
            [(2, 3), (4, 3, 2)],
            [(3,), (3,)],
            [(3,), (3, 2)],
            [(2, 3), (3,)],
            [(4, 2, 3), (3,)],
            [(3,), (4, 3, 2)],
        )
    ),
    *(
        Op(
            "Gemm",
            [(3, 2) if ta else (2, 3), (4, 3) if tb else (3, 4), bias],
            {"transA": ta, "transB": tb, "alpha": 0.5, "beta": 1.5},
        )
        for ta in (0, 1)
        for tb in (0, 1)
        for bias in ((4,), (2, 1))
    ),
    Op("Gemm", [(2, 3), (3, 4)]),
    Op("Gemm", [(2, 3), (3, 4), ()]),
    *(
        Op("Einsum", shapes, {"equation": equation})
        for equation, shapes in {
            "ij,jk->ik": [(2, 3), (3, 4)],
            "bij,bjk->bik": [(2, 2, 3), (2, 3, 2)],
            "bhid,bhjd->bhij": [(2, 2, 3, 2), (2, 2, 4, 2)],
            "ij,jk": [(2, 3), (3, 4)],
            "...ij,...jk->...ik": [(2, 1, 2, 3), (1, 3, 3, 2)],
            "ij,kl->ik": [(2, 3), (4, 2)],
            "i,j->ij": [(2,), (3,)],
            "ij->ji": [(2, 3)],
            "ij->i": [(2, 3)],
            "ij,ij->": [(2, 3), (2, 3)],
            "ij,j,jk->ik": [(2, 3), (3,), (3, 2)],
        }.items()
    ),
)
def test_linear(case: Op) -> None:
    check(case)


# --- convolution ------------------------------------------------------------------

CONVS = [
    Op("Conv", [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    Op("Conv", [(2, 3, 5, 5), (4, 3, 3, 3)], {"pads": [1, 1, 1, 1]}),
    Op("Conv", [(1, 2, 6, 5), (3, 2, 3, 2), (3,)], {"pads": [0, 1, 2, 0]}),
    Op("Conv", [(2, 2, 6, 7), (3, 2, 3, 3)], {"strides": [2, 2], "pads": [1] * 4}),
    Op("Conv", [(2, 2, 7, 7), (3, 2, 3, 3)], {"strides": [2, 3]}),
    Op("Conv", [(1, 2, 7, 8), (2, 2, 3, 3)], {"dilations": [2, 2], "pads": [2] * 4}),
    Op("Conv", [(1, 2, 9, 8), (2, 2, 3, 3)], {"dilations": [2, 1], "strides": [2, 3]}),
    Op("Conv", [(2, 4, 5, 5), (6, 2, 3, 3), (6,)], {"group": 2, "pads": [1] * 4}),
    Op("Conv", [(2, 4, 6, 6), (4, 2, 3, 3)], {"group": 2, "strides": [2, 2]}),
    Op("Conv", [(2, 3, 5, 5), (3, 1, 3, 3), (3,)], {"group": 3, "pads": [1] * 4}),
    Op(
        "Conv",
        [(2, 3, 7, 7), (3, 1, 5, 5)],
        {"group": 3, "strides": [2, 2], "pads": [2] * 4},
    ),
    Op("Conv", [(2, 3, 5, 5), (6, 1, 3, 3)], {"group": 3}),
    Op("Conv", [(2, 3, 5, 5), (3, 1, 1, 1)], {"group": 3}),
    Op("Conv", [(2, 3, 4, 4), (5, 3, 1, 1), (5,)]),
    Op("Conv", [(2, 3, 5, 6), (5, 3, 1, 1)], {"strides": [2, 2]}),
    Op("Conv", [(2, 3, 4, 4), (5, 3, 1, 1)], {"pads": [1] * 4}),
    Op("Conv", [(2, 4, 4, 4), (6, 2, 1, 1)], {"group": 2, "strides": [2, 2]}),
    Op("Conv", [(8, 6, 2, 2), (8, 6, 3, 3)], {"pads": [1] * 4}),
    *(
        Op("Conv", [(1, 2, 6, 5), (2, 2, 3, 2)], {"auto_pad": mode, "strides": [2, 2]})
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    Op("Conv", [(1, 2, 5, 5), (2, 2, 2, 2)], {"auto_pad": "SAME_LOWER"}),
    Op("Conv", [(2, 2, 11, 19), (3, 2, 3, 3)], {"pads": [1] * 4}),
    Op(
        "Conv",
        [(2, 2, 16, 22), (3, 2, 2, 3)],
        {"pads": [2, 1, 0, 2], "dilations": [3, 2]},
    ),
    Op("Conv", [(2, 2, 150), (3, 2, 3)], {"pads": [2, 1], "dilations": [2]}),
    Op("Conv", [(1, 2, 3, 22, 12), (2, 2, 2, 2, 2)], {"pads": [1, 0, 0, 0, 1, 1]}),
    Op("Conv", [(2, 3, 7), (4, 3, 3), (4,)], {"strides": [2], "pads": [1, 0]}),
    Op("Conv", [(2, 4, 7), (4, 1, 3)], {"group": 4, "dilations": [2]}),
    Op("Conv", [(1, 2, 4, 4, 4), (3, 2, 2, 3, 2), (3,)], {"pads": [1, 0, 0, 0, 1, 0]}),
    Op("Conv", [(1, 2, 5, 4, 4), (2, 1, 3, 2, 2)], {"group": 2, "strides": [2, 1, 2]}),
    # The kernel's gradient from copies of both sides, at its limits.
    Op(
        "Conv",
        [(2, 3, 6, 8), (4, 3, 3, 3)],
        {"strides": [2, 1], "pads": [1, 0, 1, 3], "dilations": [1, 2]},
    ),
    Op("Conv", [(2, 6, 4, 5), (2, 6, 1, 3)], {"pads": [1, 1, 0, 1]}),
    Op("Conv", [(2, 6, 5, 5), (2, 6, 1, 3)], {"strides": [2, 1]}),
    Op("Conv", [(1, 4, 4, 4), (4, 4, 3, 3)], {"pads": [3] * 4}),
    Op("Conv", [(1, 4, 9), (2, 4, 5)], {"pads": [2, 1]}),
    Op("Conv", [(1, 4, 3, 4, 4), (4, 2, 2, 2, 2)], {"group": 2, "pads": [1] * 6}),
]

TRANSPOSED = [
    Op("ConvTranspose", [(2, 3, 4, 4), (3, 2, 3, 3), (2,)]),
    Op(
        "ConvTranspose",
        [(2, 3, 4, 4), (3, 2, 3, 3)],
        {"strides": [2, 2], "pads": [1] * 4},
    ),
    Op(
        "ConvTranspose",
        [(1, 3, 3, 4), (3, 2, 3, 3), (2,)],
        {"strides": [2, 2], "pads": [1, 0, 0, 1], "output_padding": [1, 1]},
    ),
    Op(
        "ConvTranspose",
        [(1, 4, 3, 3), (4, 2, 2, 2)],
        {"group": 2, "strides": [2, 2]},
        forward=transposed,
    ),
    Op(
        "ConvTranspose",
        [(2, 4, 3, 3), (4, 3, 3, 3)],
        {
            "group": 2,
            "strides": [2, 2],
            "pads": [1, 1, 1, 0],
            "output_padding": [1, 0],
        },
        forward=transposed,
    ),
    Op(
        "ConvTranspose", [(2, 3, 3, 3), (3, 1, 3, 3)], {"group": 3, "dilations": [2, 1]}
    ),
    Op("ConvTranspose", [(1, 2, 5), (2, 3, 3), (3,)], {"strides": [3]}),
    Op("ConvTranspose", [(1, 2, 2, 3, 2), (2, 2, 2, 2, 2)], {"strides": [2, 1, 1]}),
    Op("ConvTranspose", [(1, 2, 3, 3), (2, 2, 1, 1)], {"strides": [2, 2]}),
    *(
        Op(
            "ConvTranspose",
            [(1, 2, 3, 4), (2, 2, 3, 3)],
            {"strides": [2, 2], "auto_pad": mode},
        )
        for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    Op(
        "ConvTranspose",
        [(1, 2, 3, 3), (2, 2, 3, 3)],
        {"strides": [3, 3], "output_shape": [8, 7]},
        forward=cropped,
    ),
]


@cases(*CONVS)
def test_conv(case: Op) -> None:
    check(case, most=10)


@pytest.mark.parametrize("most", [1, 200, 700])
def test_conv_in_pieces_of_the_batch(most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("onnxshrink.training.rules_conv._MOST_COLUMNS", most)
    check(Op("Conv", [(6, 2, 4, 4), (3, 2, 3, 3)], {"pads": [1] * 4}), most=10)
    check(Op("Conv", [(4, 2, 4, 4), (4, 1, 3, 3)], {"group": 2}), most=10)


@cases(*TRANSPOSED)
def test_conv_transpose(case: Op) -> None:
    check(case, most=10)


# --- pooling ----------------------------------------------------------------------


@cases(
    Op("MaxPool", [(2, 2, 4, 4)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Op("MaxPool", [(2, 2, 5, 5)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Op(
        "MaxPool",
        [(1, 2, 5, 5)],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4},
    ),
    Op("MaxPool", [(1, 2, 5, 5)], {"kernel_shape": [3, 2]}),
    Op("MaxPool", [(1, 2, 6, 6)], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Op(
        "MaxPool",
        [(1, 2, 5, 5)],
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    ),
    Op("MaxPool", [(1, 2, 5, 5)], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    Op("MaxPool", [(2, 2, 7)], {"kernel_shape": [3], "strides": [2]}),
    Op("MaxPool", [(1, 1, 4, 4, 4)], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
    Op("AveragePool", [(2, 2, 4, 4)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Op("AveragePool", [(2, 2, 5, 5)], {"kernel_shape": [2, 2], "strides": [2, 2]}),
    Op("AveragePool", [(1, 2, 5, 5)], {"kernel_shape": [3, 3], "pads": [1] * 4}),
    Op(
        "AveragePool",
        [(1, 2, 5, 5)],
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    ),
    Op(
        "AveragePool",
        [(1, 2, 6, 6)],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]},
    ),
    Op(
        "AveragePool",
        [(1, 2, 5, 5)],
        {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    Op("AveragePool", [(1, 2, 6)], {"kernel_shape": [3], "strides": [2]}),
    Op(
        "AveragePool",
        [(1, 2, 7)],
        {"kernel_shape": [2], "strides": [2], "ceil_mode": 1},
    ),
    Op("AveragePool", [(1, 1, 4, 4, 4)], {"kernel_shape": [2, 2, 2]}),
    Op("AveragePool", [(1, 2, 7, 7)], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Op("GlobalAveragePool", [(2, 3, 4, 3)]),
    Op("GlobalMaxPool", [(2, 3, 4, 3)]),
)
def test_pool(case: Op) -> None:
    check(case, most=25)


# --- reductions -------------------------------------------------------------------


@cases(
    *(
        Op(f"Reduce{kind}", inputs, attrs, low=0.3)
        for kind in (
            "Sum",
            "Mean",
            "Max",
            "Min",
            "Prod",
            "L1",
            "L2",
            "SumSquare",
            "LogSum",
            "LogSumExp",
        )
        for inputs, attrs in (
            ([(2, 3, 4), ints(1)], {"keepdims": 0}),
            ([(2, 3, 2), ints(0, -1)], {"keepdims": 1}),
            ([(2, 3)], {}),
        )
    ),
    Op("ReduceSum", [(2, 3)], {"noop_with_empty_axes": 1}),
    Op("ReduceL1", [(2, 3)], note="-signed"),
    Op("ReduceProd", [np.array([[0, 2, 3], [0, 0, 4]], np.float32), ints(1)]),
    *(
        Op("CumSum", [(2, 4), np.array(1, I64)], {"exclusive": e, "reverse": r})
        for e in (0, 1)
        for r in (0, 1)
    ),
    Op("CumSum", [(2, 3, 2), np.array(-2, I64)], {"reverse": 1}),
)
def test_reduction(case: Op) -> None:
    check(case)


# --- shapes -----------------------------------------------------------------------


@cases(
    Op("Reshape", [(2, 6), ints(3, -1)]),
    Op("Reshape", [(2, 6), ints(0, 2, 3)]),
    Op("Flatten", [(2, 3, 2)], {"axis": 1}),
    Op("Squeeze", [(1, 3, 1), ints(0)]),
    Op("Squeeze", [(1, 3, 1)]),
    Op("Unsqueeze", [(2, 3), ints(0, -1)]),
    Op("Transpose", [(2, 3, 4)], {"perm": [2, 0, 1]}),
    Op("Transpose", [(2, 3)]),
    Op("Concat", [(2, 1), (2, 3), (2, 2)], {"axis": 1}),
    Op("Concat", [(2, 1)], {"axis": -1}),
    Op("Split", [(2, 5), ints(2, 3)], {"axis": 1}, outputs=2),
    Op("Split", [(4, 2)], {"num_outputs": 2}, outputs=2),
    Op("Slice", [(4, 5), ints(1), ints(3), ints(1)]),
    Op("Slice", [(4, 5), ints(0, -3), ints(9, -1)]),
    Op("Slice", [(2, 7), ints(1), ints(7), ints(-1), ints(2)]),
    Op("Slice", [(2, 7), ints(0), ints(6), ints(1), ints(3)]),
    Op("Slice", [(5, 2), ints(-1), ints(-9), ints(0), ints(-2)]),
    Op("Slice", [(5, 4), ints(3, 0), ints(0, 4), ints(0, 1), ints(-1, 2)]),
    Op("Slice", [(5, 4), ints(3), ints(1)], note="-empty"),
    Op("Pad", [(2, 3), ints(0, 1, 1, 2)]),
    Op("Pad", [(3, 4), ints(-1, 1, 0, -2)], forward=pad_and_cut),
    Op("Pad", [(2, 3), ints(1, 2), None, ints(1)]),
    *(
        Op("Pad", [(2, 4), ints(0, 2, 1, 1)], {"mode": mode}, opset=19)
        for mode in ("reflect", "edge", "wrap")
    ),
    Op("Pad", [(1, 2, 3, 3), ints(0, 0, 1, 1, 0, 0, 2, 1)], {"mode": "reflect"}),
    Op("Expand", [(3, 1), ints(2, 3, 4)]),
    Op("Expand", [(2, 3), ints(1, 3)]),
    Op("Tile", [(2, 3), ints(2, 1)]),
    Op("Tile", [(2, 3), ints(3, 2)]),
    Op("DepthToSpace", [(1, 8, 2, 3)], {"blocksize": 2}),
    Op("DepthToSpace", [(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    Op("SpaceToDepth", [(1, 2, 4, 6)], {"blocksize": 2}),
    Op("Trilu", [(3, 3)], {"upper": 0}),
    Op("Trilu", [(3, 4), np.array(1, I64)]),
)
def test_shape(case: Op) -> None:
    check(case)


def scales(*values: float) -> Array:
    return np.array(values, np.float32)


RESIZES = [
    Op(
        "Resize",
        [(1, 2, 3, 3), None, scales(1, 1, 2, 2)],
        {"mode": "nearest"},
        frozen=[2],
    ),
    Op(
        "Resize",
        [(1, 2, 4, 4), None, scales(1, 1, 0.5, 1.5)],
        {"mode": "nearest"},
        frozen=[2],
    ),
    *(
        Op(
            "Resize",
            [(1, 1, 3, 4), None, None, ints(1, 1, 6, 7)],
            {"mode": mode, "coordinate_transformation_mode": coordinates},
        )
        for mode in ("nearest", "linear", "cubic")
        for coordinates in ("half_pixel", "align_corners", "asymmetric")
    ),
    Op("Resize", [(1, 1, 6, 5), None, None, ints(1, 1, 3, 3)], {"mode": "linear"}),
    Op(
        "Resize",
        [(1, 1, 6, 5), None, None, ints(3, 3)],
        {"mode": "linear", "axes": [2, 3]},
    ),
    Op(
        "Resize",
        [(1, 1, 3, 3), None, None, ints(1, 1, 5, 5)],
        {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5},
    ),
]


@cases(*RESIZES)
def test_resize(case: Op) -> None:
    check(case)


# --- indices ----------------------------------------------------------------------


@cases(
    Op("Gather", [(5, 3), np.array([[0, 2], [2, -1]], I64)]),
    Op("Gather", [(2, 5, 3), np.array([4, 4, 0], np.int32)], {"axis": 1}),
    Op("Gather", [(2, 3, 4), np.array([[3, 0], [1, 3]], I64)], {"axis": -1}),
    Op("Gather", [(2, 5, 3), np.array(2, I64)], {"axis": 1}),
    Op("Gather", [(2, 5, 3), np.array([-1], I64)], {"axis": 1}),
    Op("GatherElements", [(3, 3), np.array([[0, 1, 2], [0, 0, -1]], I64)]),
    Op("GatherElements", [(2, 3), np.array([[0, 0], [2, 1]], I64)], {"axis": 1}),
    Op("GatherND", [(2, 3, 2), np.array([[0, 1], [1, 2], [0, 1]], I64)]),
    Op("GatherND", [(2, 3, 2), np.array([[1], [2]], I64)], {"batch_dims": 1}),
    Op("ScatterElements", [(3, 3), np.array([[1, 0, 2]], I64), (1, 3)]),
    Op("ScatterElements", [(2, 4), np.array([[3], [1]], I64), (2, 1)], {"axis": 1}),
    Op(
        "ScatterElements",
        [(2, 3), np.array([[1, 1], [0, 2]], I64), (2, 2)],
        {"axis": 1, "reduction": "add"},
    ),
    *(
        Op(
            "ScatterElements",
            [(2, 3), np.array([[1, 1], [0, 2]], I64), (2, 2)],
            {"axis": 1, "reduction": kind},
        )
        for kind in ("max", "min")
    ),
    Op("ScatterND", [(4, 2), np.array([[1], [3]], I64), (2, 2)]),
    *(
        Op(
            "ScatterND",
            [(4, 2), np.array([[1], [3]], I64), (2, 2)],
            {"reduction": kind},
        )
        for kind in ("max", "min")
    ),
    Op(
        "ScatterND",
        [(4, 2), np.array([[1], [1]], I64), (2, 2)],
        {"reduction": "add"},
    ),
)
def test_index(case: Op) -> None:
    check(case)


# --- normalization ----------------------------------------------------------------

POSITIVE = np.array([0.5, 1.5, 2.5], np.float32)


@cases(
    Op("LayerNormalization", [(2, 3, 4), (4,), (4,)]),
    Op("LayerNormalization", [(2, 3, 4), (3, 4)], {"axis": 1, "epsilon": 1e-2}),
    Op("InstanceNormalization", [(2, 3, 2, 2), (3,), (3,)], {"epsilon": 1e-2}),
    Op("InstanceNormalization", [(2, 3, 5), (3,), (3,)]),
    Op(
        "GroupNormalization",
        [(2, 4, 2, 2), (4,), (4,)],
        {"num_groups": 2},
        opset=21,
        forward=group_norm,
    ),
    Op("BatchNormalization", [(2, 3, 2, 2), (3,), (3,), (3,), POSITIVE]),
    Op("BatchNormalization", [(4, 3), (3,), (3,), (3,), POSITIVE], {"epsilon": 1e-2}),
    Op("LpNormalization", [(2, 3)]),
    Op("LpNormalization", [(2, 3, 2)], {"axis": 1}),
    Op("RMSNormalization", [(2, 3, 4), (4,)], opset=23),
    Op("RMSNormalization", [(2, 3, 4), (3, 4)], {"axis": 1, "epsilon": 1e-2}, opset=23),
)
def test_normalization(case: Op) -> None:
    check(case)
