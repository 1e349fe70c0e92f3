"""What normalisations say about the size of channels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxshrink.model import Model
from onnxshrink.structure.gains import squares_of

SHIFT = "<float[3] g = {1, 2, -3}, float[3] b = {0, 1, 0}>"


@pytest.mark.parametrize(
    ("body", "squares"),
    [
        ("y = LayerNormalization(x, g)", [1, 4, 9]),
        ("y = LayerNormalization(x, g, b)", [1, 5, 9]),
        ("s = ReduceL2<axes = [-1]>(x) n = Div(x, s) y = Mul(n, g)", [1, 4, 9]),
        ("s = ReduceL2<axes = [-1]>(x) n = Div(x, s) y = Mul(g, n)", [1, 4, 9]),
        ("y = Mul(x, g)", None),
        ("n = Relu(x) y = Mul(n, g)", None),
        ("y = Relu(x)", None),
    ],
)
def test_a_gain_is_the_size_of_its_channel(
    body: str, squares: list[float] | None
) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y)'
    model = Model.load(onnx.parser.parse_model(f"{text} {SHIFT} {{ {body} }}"))
    found = squares_of(model, model.graph.outputs[0], 3)
    assert (None if found is None else found.tolist()) == squares
    assert squares_of(model, model.graph.outputs[0], 4) is None


def test_the_sizes_are_those_of_data() -> None:
    x = np.random.default_rng(0).normal(size=(4000, 3))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    y = x * [1, 2, -3] + [0, 1, 0]
    np.testing.assert_allclose(np.square(y).mean(0), [1, 5, 9], rtol=0.06)
