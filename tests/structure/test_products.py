"""Which linear operators together stand for one."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.solvers.least_squares import compose
from onnxshrink.structure import layers, products
from onnxshrink.structure.products import Product

Array = np.ndarray[Any, Any]


def built(text: str, **weights: tuple[int, ...]) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> example {text}'
    )
    for name, shape in weights.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return Model.load(proto)


def found(model: Model, inner: str, output: str = "y") -> Product | str:
    """Look for the product that gives a value; ``inner`` may be inside of one."""
    by_node = {
        id(layer.node): layer
        for layer in layers.find(model, codes=True)
        if not layer.why_not and not layer.is_shared
    }
    tensor = next(
        t for node in model.graph.nodes for t in node.outputs if t.name == output
    )
    names = inner.split()
    return products.find(model, tensor, by_node, lambda name: name in names)


def dense(product: Product) -> Array:
    """Return the product's matrices for each tap."""
    factors = []
    for index, places in enumerate(product.factors):
        values = np.zeros(product.shape(index))
        for place in places:
            values[place.slices] = place.dense(place.layer.weight.read())
        factors.append(values)
    return compose(factors)


def names(product: Product | str) -> list[list[str]]:
    assert isinstance(product, Product), product
    return [[place.layer.name for place in factor] for factor in product.factors]


MATRICES = "(float[N,3,6] x) => (float[N,3,4] y) {{ {} }}"


def test_two_matrices_in_a_row_are_a_product() -> None:
    model = built(
        MATRICES.format("h = MatMul(x, a) z = MatMul(h, b) y = Add(z, c)"),
        a=(6, 2),
        b=(2, 4),
        c=(4,),
    )
    product = found(model, "h z")
    assert names(product) == [["a"], ["b"]]
    assert isinstance(product, Product)
    assert product.input.name == "x"
    assert [layer.name for layer in product.last] == ["b"]
    a, b = (model.weight(name).read() for name in "ab")
    np.testing.assert_allclose(dense(product), (a @ b).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "inner", "why"),
    [
        ("h = MatMul(x, a) y = MatMul(h, b)", "", ""),  # h is what it was
        ("h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)", "h r", ""),
        ("h = MatMul(x, a) k = Add(h, d) y = MatMul(k, b)", "h k", ""),
    ],
)
def test_what_stands_between_is_new_and_plain(text: str, inner: str, why: str) -> None:
    model = built(MATRICES.format(text), a=(6, 2), b=(2, 4), d=(2,))
    assert found(model, inner) == why


def test_a_value_that_others_read_too_ends_a_product() -> None:
    model = built(
        "(float[N,6] x) => (float[N,4] y, float[N,4] z) "
        "{ h = MatMul(x, a) y = MatMul(h, b) z = MatMul(h, c) }",
        a=(6, 2),
        b=(2, 4),
        c=(2, 4),
    )
    assert found(model, "h") == ""


def test_what_several_read_is_the_first_factor_of_all() -> None:
    model = built(
        "(float[N,6] x) => (float[N,4] y, float[N,3] z) "
        "{ h = MatMul(x, a) y = MatMul(h, b) z = Gemm<transB = 1, alpha = 2.0>(h, c) }",
        a=(6, 2),
        b=(2, 4),
        c=(3, 2),
    )
    by_name = {layer.name: layer for layer in layers.find(model)}
    product = products.fan(by_name["a"], [by_name["b"], by_name["c"]])
    assert names(product) == [["a"], ["b", "c"]]
    assert isinstance(product, Product)
    a, b, c = (model.weight(name).read() for name in "abc")
    expected = np.concatenate([(a @ b).T, 2 * c @ a.T])
    np.testing.assert_allclose(dense(product), expected, rtol=1e-5)


def test_a_bias_in_between_is_a_reason() -> None:
    model = built(
        "(float[N,6] x) => (float[N,4] y) "
        "{ h = Gemm(x, a, d) y = Gemm<transB = 1, alpha = 2.0>(h, b) }",
        a=(6, 2),
        b=(4, 2),
        d=(2,),
    )
    assert "adds a bias in between" in str(found(model, "h"))


def test_gemm_is_read_with_its_attributes() -> None:
    model = built(
        "(float[N,6] x) => (float[N,4] y) "
        "{ h = MatMul(x, a) y = Gemm<transB = 1, alpha = 2.0>(h, b) }",
        a=(6, 2),
        b=(4, 2),
    )
    product = found(model, "h")
    assert isinstance(product, Product)
    a, b = (model.weight(name).read() for name in "ab")
    np.testing.assert_allclose(dense(product), 2 * b @ a.T, rtol=1e-5)
    (place,) = product.factors[1]
    np.testing.assert_allclose(place.weight(place.dense(b)), b)


CHAINS = {
    "spatial": (
        "h = Conv<pads = [1, 0, 1, 0], strides = [2, 1]>(x, a) "
        "y = Conv<pads = [0, 2, 0, 1], dilations = [1, 2]>(h, b)",
        {"a": (3, 4, 3, 1), "b": (5, 3, 1, 2)},
        [["a"], ["b"]],
    ),
    "the last one steps": (
        "h = Conv<pads = [1, 1, 1, 1]>(x, a) y = Conv<strides = [2, 2]>(h, b)",
        {"a": (3, 4, 3, 3), "b": (5, 3, 1, 1)},
        [["a"], ["b"]],
    ),
    "tucker": (
        "h = Conv(x, a) k = Conv<pads = [0, 1, 0, 1]>(h, b) y = Conv(k, c)",
        {"a": (2, 4, 1, 1), "b": (3, 2, 3, 3), "c": (5, 3, 1, 1)},
        [["a"], ["b"], ["c"]],
    ),
    "canonical polyadic": (
        "h = Conv(x, a) i = Conv<group = 3, pads = [1, 0, 1, 0]>(h, b) "
        "j = Conv<group = 3, strides = [1, 2]>(i, c) y = Conv(j, d)",
        {"a": (3, 4, 1, 1), "b": (3, 1, 3, 1), "c": (3, 1, 1, 2), "d": (5, 3, 1, 1)},
        [["a"], ["b"], ["c"], ["d"]],
    ),
    "same padding": (
        'h = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, a) y = Conv(h, b)',
        {"a": (3, 4, 3, 2), "b": (5, 3, 1, 1)},
        [["a"], ["b"]],
    ),
    "depthwise first": (
        "h = Conv<group = 4, pads = [1, 1, 1, 1]>(x, a) y = Conv(h, b)",
        {"a": (4, 1, 3, 3), "b": (5, 4, 1, 1)},
        [["a"], ["b"]],
    ),
    "two branches, pointwise first": (
        "h = Conv(x, a) k = Conv<group = 5>(h, b) "
        "i = Conv(x, c) j = Conv<group = 5>(i, d) y = Add(k, j)",
        {"a": (5, 4, 1, 1), "b": (5, 1, 3, 3), "c": (5, 4, 1, 1), "d": (5, 1, 3, 3)},
        [["a", "c"], ["b", "d"]],
    ),
    "groups": (
        "h = Conv<group = 2>(x, a) y = Conv<group = 2, pads = [1, 1, 1, 1]>(h, b)",
        {"a": (4, 2, 1, 1), "b": (6, 2, 3, 3)},
        [["a"], ["b"]],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_convolutions_in_a_row_are_one_convolution(name: str) -> None:
    text, weights, expected = CHAINS[name]
    model = built(f"(float[N,4,8,9] x) => (float[N,C,H,W] y) {{ {text} }}", **weights)

    product = found(model, "h i j k")

    assert names(product) == expected
    assert isinstance(product, Product)
    window = product.window
    assert window is not None
    kernel = np.moveaxis(dense(product), (-2, -1), (0, 1)).astype(np.float32)
    pads = f"pads = {list(window.pads)}"
    if window.auto_pad != "NOTSET":
        pads = f'auto_pad = "{window.auto_pad}"'
    one = built(
        "(float[N,4,8,9] x) => (float[N,C,H,W] y) { y = Conv<"
        f"{pads}, strides = {list(window.strides)}, "
        f"dilations = {list(window.dilations)}>(x, w) }}",
        w=kernel.shape,
    )
    one.set_weight("w", kernel)
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 9)).astype(np.float32)
    outputs = [runtime.session(m, threads=1).run({"x": x})["y"] for m in (model, one)]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-4)
    for factor in product.factors:
        for place in factor:
            values = place.layer.weight.read()
            np.testing.assert_array_equal(place.weight(place.dense(values)), values)


@pytest.mark.parametrize(
    ("text", "weights", "why"),
    [
        (
            "h = Conv(x, a) y = Conv(h, b)",
            {"a": (3, 4, 3, 3), "b": (5, 3, 3, 3)},
            "the same axis",
        ),
        (
            "h = Conv<strides = [2, 2]>(x, a) y = Conv<pads = [1, 1, 1, 1]>(h, b)",
            {"a": (3, 4, 1, 1), "b": (5, 3, 3, 3)},
            "is not its input",
        ),
        (
            "h = Conv(x, a) k = Conv<group = 5>(h, b) j = Conv(x, c) y = Add(k, j)",
            {"a": (5, 4, 1, 1), "b": (5, 1, 3, 3), "c": (5, 4, 3, 3)},
            "different lengths",
        ),
        (
            "h = Conv(x, a) k = Conv(h, b) i = Conv<pads = [1, 1, 1, 1]>(x, c) "
            "l = Conv(i, d) j = Slice(l, s, e, axes) y = Add(k, j)",
            {
                "a": (5, 4, 3, 3),
                "b": (5, 5, 1, 1),
                "c": (5, 4, 3, 3),
                "d": (5, 5, 1, 1),
            },
            "",
        ),
    ],
)
def test_what_is_no_single_convolution_is_said(
    text: str, weights: dict[str, tuple[int, ...]], why: str
) -> None:
    if "Slice" in text:
        text = (
            "s = Constant<value_ints = [1, 1]>() e = Constant<value_ints = [7, 8]>() "
            "axes = Constant<value_ints = [2, 3]>() " + text
        )
    model = built(f"(float[N,4,8,9] x) => (float[N,C,H,W] y) {{ {text} }}", **weights)
    product = found(model, "h i j k l")
    assert isinstance(product, str)
    assert why in product
