"""Rules of single operators: which channels they leave free, and that these can go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.structure import channels
from onnxshrink.structure.channels import Group

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A graph from ``x`` to ``y`` in which the weight ``w`` makes the channels.

    Attributes:
        text: Nodes.
        weights: Constants by name, random ones by their shape.
        why: Part of the reason why they are fixed; empty if they are free.
        inexact: Part of the reason why outputs change although nothing weighs them.
        x: Shape of the input.
        opset: Version of ai.onnx.
        size: How many channels there are.
        runs: Whether onnxruntime survives it.
    """

    text: str
    weights: Mapping[str, Sequence[int] | Array] = field(default_factory=dict)
    why: str = ""
    inexact: str = ""
    x: str = "N,3"
    opset: int = 17
    size: int = 4
    runs: bool = True

    def model(self) -> Model:
        text = self.text
        if "w" not in self.weights and "(x, w" not in text:
            text = "h = MatMul(x, w) " + text
        inputs = f"float[{self.x}] x"
        proto = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {self.opset}]> '
            f"example ({inputs}) => (float[] y) {{ {text} }}"
        )
        rng = np.random.default_rng(0)
        for name, value in {"w": (3, 4), **self.weights}.items():
            array = (
                value
                if isinstance(value, np.ndarray)
                else rng.standard_normal(value).astype(np.float32)
            )
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        known = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        shape = known.graph.output[0].type.tensor_type.shape
        proto.graph.output[0].type.tensor_type.shape.CopyFrom(shape)
        return Model.load(proto)


HW = "1,3,5,5"
CONV = "h = Conv(x, w) "
OUT: dict[str, Any] = {"out": (4, 2)}
IMAGE: dict[str, Any] = {"w": (4, 3, 1, 1), "out": (2, 4, 1, 1)}
SEQUENCE = "N,6,3"
POSITIVE = np.array([1, 2, 3, 4], np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


CASES = {
    "a bias of Gemm": Case(
        "h = Gemm(x, w, b) y = MatMul(h, out)", {"w": (3, 4), "b": (4,), **OUT}
    ),
    "Gemm with both transposed": Case(
        "h = Gemm<transA = 1, transB = 1>(x, w) y = Gemm<transB = 1>(h, out)",
        {"w": (4, 3), "out": (2, 4)},
        x="3,N",
    ),
    "a vector behind": Case("y = MatMul(h, out)", {"out": (4,)}),
    "a vector in front": Case(
        "t = Transpose<perm = [1, 0]>(h) y = MatMul(out, t)", {"out": (4,)}
    ),
    "a stack of matrices": Case(
        "h = MatMul(x, w) y = MatMul(h, out)",
        {"w": (2, 3, 4), "out": (2, 4, 2)},
        x="2,5,3",
    ),
    "a product of two values": Case(
        "t = Transpose<perm = [0, 2, 1]>(h) y = MatMul(h, t)",
        inexact="MatMul sums products of two values along it",
        x=SEQUENCE,
    ),
    "Einsum": Case('y = Einsum<equation = "nc,cd->nd">(h, out)', OUT),
    "Einsum with blanks": Case('y = Einsum<equation = " nc , cd -> nd ">(h, out)', OUT),
    "Einsum that keeps them": Case(
        'k = Einsum<equation = "nc,c->nc">(h, g) y = MatMul(k, out)', {"g": (4,), **OUT}
    ),
    "Einsum of two values": Case(
        'y = Einsum<equation = "nc,nc->n">(h, h)',
        inexact="Einsum sums products of two values along it",
    ),
    "Einsum with an ellipsis": Case(
        'y = Einsum<equation = "...c,cd->...d">(h, out)', OUT, x=SEQUENCE
    ),
    "Einsum without an arrow": Case(
        'y = Einsum<equation = "nc,cd">(h, out)', OUT, "equation that is not followed"
    ),
    "Einsum of a diagonal": Case(
        't = MatMul(s, h) y = Einsum<equation = "cc->c">(t)',
        {"s": (4, 3)},
        "equation that is not followed",
        x="3,3",
    ),
    "BatchNormalization": Case(
        "b = BatchNormalization(h, g, g, g, v) y = MatMul(b, out)",
        {"g": (4,), "v": POSITIVE, **OUT},
    ),
    "BatchNormalization in training": Case(
        "b, m, s = BatchNormalization<training_mode = 1>(h, g, g, g, v) "
        "y = MatMul(b, out)",
        {"g": (4,), "v": POSITIVE, **OUT},
        "is in training mode",
    ),
    "InstanceNormalization": Case(
        CONV + "b = InstanceNormalization(h, g, g) y = Conv(b, out)",
        {"g": (4,), **IMAGE},
        x=HW,
    ),
    "LayerNormalization": Case(
        "b = LayerNormalization(h, g) y = MatMul(b, out)",
        {"g": (4,), **OUT},
        inexact="LayerNormalization takes the variance along it",
    ),
    "LayerNormalization of other axes": Case(
        "t = Transpose<perm = [0, 2, 1]>(h) b = LayerNormalization(t, g) "
        "u = Transpose<perm = [0, 2, 1]>(b) y = MatMul(u, out)",
        {"g": (6,), **OUT},
        x=SEQUENCE,
    ),
    "a mean of LayerNormalization that is read": Case(
        "b, m = LayerNormalization(h, g) c = MatMul(b, out) y = Add(c, m)",
        {"g": (4,), **OUT},
        inexact="LayerNormalization takes the variance along it",
    ),
    "a sum over other axes": Case(
        "r = ReduceSum<keepdims = 0>(h, axes) y = MatMul(r, out)",
        {"axes": ints(1), **OUT},
        x=SEQUENCE,
    ),
    "a mean that keeps axes": Case(
        "r = ReduceMean<axes = [-2]>(h) y = MatMul(r, out)", OUT, x=SEQUENCE
    ),
    "a sum over them": Case(
        "y = ReduceSum(h, axes)",
        {"axes": ints(-1)},
        inexact="ReduceSum runs along it",
        x=SEQUENCE,
    ),
    "a sum over all axes": Case(
        "y = ReduceSum<keepdims = 0>(h)", inexact="ReduceSum runs along it"
    ),
    "a sum over no axes": Case(
        "r = ReduceSum<noop_with_empty_axes = 1>(h) y = MatMul(r, out)", OUT
    ),
    "Softmax of other axes": Case(
        "s = Softmax<axis = 1>(h) y = MatMul(s, out)", OUT, x=SEQUENCE
    ),
    "Softmax of the axes from one on": Case(
        "s = Softmax<axis = 1>(h) y = MatMul(s, out)",
        OUT,
        "Softmax divides by the sum",
        x=SEQUENCE,
        opset=12,
    ),
    "Pad of other axes": Case(
        "p = Pad(h, pads) y = MatMul(p, out)",
        {"pads": ints(0, 1, 0, 0, 2, 0), **OUT},
        x=SEQUENCE,
    ),
    "Pad of theirs": Case(
        "p = Pad(h, pads) y = MatMul(p, out)",
        {"pads": ints(0, 1, 0, 0), "out": (5, 2)},
    ),
    "Pad of chosen axes": Case(
        "p = Pad(h, pads, , axes) y = MatMul(p, out)",
        {"pads": ints(1, 0), "axes": ints(1), "out": (5, 2)},
        opset=18,
    ),
    "Pad that repeats the border": Case(
        'p = Pad<mode = "edge">(h, pads) y = MatMul(p, out)',
        {"pads": ints(0, 1, 0, 0), "out": (5, 2)},
        "Pad extends it",
    ),
    "Pad by numbers that are computed": Case(
        "pads = Add(one, one) p = Pad(h, pads) y = MatMul(p, out)",
        {"one": ints(0, 1, 0, 0), "out": (6, 2)},
        "Pad extends it",
    ),
    "Pad that takes away": Case(
        "p = Pad(h, pads) y = MatMul(p, out)",
        {"pads": ints(0, -1, 0, 0), "out": (3, 2)},
        "Pad extends it",
    ),
    "channels of zeros beside a residual": Case(
        "p = Pad(h, pads) k = MatMul(x, more) s = Add(p, k) r = Relu(s) "
        "y = MatMul(r, out)",
        {"pads": ints(0, 2, 0, 2), "more": (3, 8), "out": (8, 2)},
    ),
    "Slice of other axes": Case(
        "s = Slice(h, starts, ends, axes) y = MatMul(s, out)",
        {"starts": ints(1), "ends": ints(3), "axes": ints(-2), **OUT},
        x=SEQUENCE,
    ),
    "Slice of the first axes": Case(
        "s = Slice(h, starts, ends) y = MatMul(s, out)",
        {"starts": ints(0, 1), "ends": ints(9, 3), **OUT},
        x=SEQUENCE,
    ),
    "Slice of theirs": Case(
        "s = Slice(h, starts, ends, axes) y = MatMul(s, out)",
        {"starts": ints(0), "ends": ints(3), "axes": ints(-1), "out": (3, 2)},
        size=3,
    ),
    "Slice of every second": Case(
        "s = Slice(h, starts, ends, axes, steps) y = MatMul(s, out)",
        {
            "starts": ints(0),
            "ends": ints(4),
            "axes": ints(-1),
            "steps": ints(2),
            "out": (2, 2),
        },
        "Slice takes a part of it",
    ),
    "Slice from the end": Case(
        "s = Slice(h, starts, ends, axes) y = MatMul(s, out)",
        {"starts": ints(-3), "ends": ints(99), "axes": ints(1), "out": (3, 2)},
        size=3,
    ),
    "Gather of one from another axis": Case(
        "g = Gather<axis = 1>(h, at) y = MatMul(g, out)",
        {"at": np.array(2), **OUT},
        x=SEQUENCE,
    ),
    "Gather of some from another axis": Case(
        "g = Gather<axis = -2>(h, at) y = MatMul(g, out)",
        {"at": ints(2, 0), **OUT},
        x=SEQUENCE,
    ),
    "Gather of them": Case(
        "g = Gather<axis = 1>(h, at) y = MatMul(g, out)",
        {"at": ints(2, 0), "out": (2, 2)},
        "Gather picks from it by number",
    ),
    "Split that leaves out an output": Case(
        'p, "" = Split<axis = 1>(h, sizes) y = MatMul(p, out)',
        {"sizes": ints(2, 2), "out": (2, 2)},
        "leaves out an output",
        runs=False,
    ),
    "Concat with a part of unknown size": Case(
        "u = Compress<axis = 1>(x, picked) c = Concat<axis = 1>(h, u) "
        "y = MatMul(c, out)",
        {"picked": np.array([True, False, True]), "out": (6, 2)},
        "has parts of unknown size",
    ),
    "Expand to a stated size": Case(
        "u = Unsqueeze(h, axis) e = Expand(u, wanted) y = MatMul(e, out)",
        {"axis": ints(1), "wanted": ints(1, 5, 1), **OUT},
        x="2,3",
    ),
    "Expand that states their size": Case(
        "e = Expand(h, wanted) y = MatMul(e, out)",
        {"wanted": ints(2, 4), **OUT},
        x="2,3",
    ),
    "Expand by sizes that Shape gives": Case(
        "s = Shape(h) c = Concat<axis = 0>(two, s) e = Expand(h, c) y = MatMul(e, out)",
        {"two": ints(2), **OUT},
    ),
    "Expand by a product of sizes": Case(
        "s = Shape(h) t = Mul(s, one) e = Expand(h, t) y = MatMul(e, out)",
        {"one": ints(1, 1), **OUT},
        "the graph reads off its size",
    ),
    "Tile of other axes": Case(
        "t = Tile(h, repeats) y = MatMul(t, out)",
        {"repeats": ints(1, 2, 1), **OUT},
        x=SEQUENCE,
    ),
    "Tile of theirs": Case(
        "t = Tile(h, repeats) y = MatMul(t, out)",
        {"repeats": ints(1, 2), "out": (8, 2)},
    ),
    "a tensor of one value": Case(
        "z = ConstantOfShape(sizes) a = Add(h, z) y = MatMul(a, out)",
        {"sizes": ints(4), **OUT},
    ),
    "a tensor of one value and their size": Case(
        "s = Shape(h) z = ConstantOfShape(s) a = Add(h, z) y = MatMul(a, out)", OUT
    ),
    "Reshape by sizes that Shape gives": Case(
        "s = Shape(h) f = Reshape(h, flat) r = Relu(f) b = Reshape(r, s) "
        "y = MatMul(b, out)",
        {"flat": ints(0, -1), **OUT},
        x=SEQUENCE,
    ),
    "Reshape by one size that Shape gives": Case(
        "s = Shape(h) n = Gather(s, two) u = Unsqueeze(n, at) "
        "c = Concat<axis = 0>(ones, u) b = Reshape(h, c) y = MatMul(b, out)",
        {"two": np.array(2), "at": ints(0), "ones": ints(0, -1), **OUT},
        x=SEQUENCE,
    ),
    "groups of channels that are normalised as rows": Case(
        CONV + "f = Reshape(h, rows) i = InstanceNormalization(f, g, b) "
        "k = Reshape(i, back) y = Conv(k, out)",
        {
            "w": (4, 3, 1, 1),
            "rows": ints(0, 2, -1),
            "back": ints(0, 4, 5, 5),
            "g": (2,),
            "b": (2,),
            "out": (2, 4, 1, 1),
        },
        x=HW,
        size=2,
    ),
    "DepthToSpace": Case(
        CONV + "d = DepthToSpace<blocksize = 2>(h) y = Conv(d, out)",
        {"w": (8, 3, 1, 1), "out": (2, 2, 1, 1)},
        x=HW,
        size=2,
    ),
    "DepthToSpace by columns": Case(
        CONV + 'd = DepthToSpace<blocksize = 2, mode = "CRD">(h) y = Conv(d, out)',
        {"w": (8, 3, 1, 1), "out": (2, 2, 1, 1)},
        x=HW,
        size=2,
    ),
    "SpaceToDepth": Case(
        CONV + "d = SpaceToDepth<blocksize = 2>(h) y = Conv(d, out)",
        {"w": (4, 3, 1, 1), "out": (2, 16, 1, 1)},
        x="1,3,4,4",
    ),
    "Resize to sizes that Shape gives": Case(
        CONV + "s = Shape(h) n = Slice(s, zero, two) c = Concat<axis = 0>(n, more) "
        'd = Resize(h, "", "", c) y = Conv(d, out)',
        {"zero": ints(0), "two": ints(2), "more": ints(10, 10), **IMAGE},
        x=HW,
    ),
    "Resize to stated sizes": Case(
        CONV + 'd = Resize(h, "", "", c) y = Conv(d, out)',
        {"c": ints(1, 4, 10, 10), **IMAGE},
        x=HW,
    ),
    "GridSample": Case(
        CONV + "d = GridSample(h, places) y = Conv(d, out)",
        {"places": (1, 2, 2, 2), **IMAGE},
        x=HW,
    ),
    "LpNormalization": Case(
        "d = LpNormalization(h) y = MatMul(d, out)",
        OUT,
        inexact="LpNormalization runs along it",
    ),
    "a cumulative sum along another axis": Case(
        "c = CumSum(h, axis) y = MatMul(c, out)",
        {"axis": np.array(1, np.int32), **OUT},
        x=SEQUENCE,
    ),
    "Flatten": Case(
        CONV + "f = Flatten(h) y = MatMul(f, out)",
        {"w": (4, 3, 1, 1), "out": (100, 2)},
        x=HW,
    ),
    "Squeeze": Case(
        CONV + "p = GlobalMaxPool(h) s = Squeeze(p, axes) y = MatMul(s, out)",
        {"w": (4, 3, 1, 1), "axes": ints(2, 3), **OUT},
        x=HW,
    ),
    "Transpose without an order": Case(
        "t = Transpose(h) y = MatMul(out, t)", {"out": (2, 4)}
    ),
    "a bias of Conv": Case(
        "h = Conv(x, w, b) y = Conv(h, out)", {"b": (4,), **IMAGE}, x=HW
    ),
    "ConvTranspose": Case(
        "h = ConvTranspose(x, w, b) y = ConvTranspose(h, out)",
        {"w": (3, 4, 2, 2), "b": (4,), "out": (4, 2, 1, 1)},
        x=HW,
    ),
    "whole groups of ConvTranspose": Case(
        CONV + "g = ConvTranspose<group = 2>(h, up) y = Conv(g, out)",
        {"w": (4, 3, 1, 1), "up": (4, 3, 2, 2), "out": (2, 6, 1, 1)},
        x=HW,
        size=2,
    ),
    "a depthwise convolution": Case(
        CONV + "d = Conv<group = 4, pads = [1, 1, 1, 1]>(h, each) y = Conv(d, out)",
        {"each": (4, 1, 3, 3), **IMAGE},
        x=HW,
    ),
    "a kernel in one dimension": Case(
        CONV + "y = Conv(h, out)", {"w": (4, 3, 2), "out": (2, 4, 1)}, x="1,3,7"
    ),
    "positions that MaxPool counts": Case(
        CONV + "p, i = MaxPool<kernel_shape = [2, 2]>(h) f = Cast<to = 1>(i) "
        "a = Add(p, f) y = Conv(a, out)",
        IMAGE,
        "MaxPool counts positions in it",
        x=HW,
    ),
    "Clip with bounds": Case(
        "c = Clip(h, low, high) y = MatMul(c, out)",
        {"low": np.array(-1, np.float32), "high": np.array(4, np.float32), **OUT},
    ),
    "PRelu with a slope for each": Case(
        "p = PRelu(h, slope) y = MatMul(p, out)", {"slope": (4,), **OUT}
    ),
    "Where with a broadcast condition": Case(
        "m = ReduceMax<axes = [1]>(x) c = Greater(m, zero) z = Where(c, h, zero) "
        "y = MatMul(z, out)",
        {"zero": np.array(0, np.float32), **OUT},
    ),
    "codes with a scale for each": Case(
        "q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, out)",
        {"s": POSITIVE / 16, "z": np.zeros(4, np.int8), **OUT},
    ),
    "a weight on the left": Case(
        "h = MatMul(w, x) y = MatMul(out, h)", {"w": (4, 3), "out": (2, 4)}, x="3,5"
    ),
    "a weight times a vector": Case(
        "h = MatMul(w, x) y = MatMul(out, h)", {"w": (4, 3), "out": (2, 4)}, x="3"
    ),
    "Gemm that reads them transposed": Case(
        "t = Transpose(h) y = Gemm<transA = 1>(t, out)", OUT
    ),
    "Einsum that makes them": Case(
        'h = Einsum<equation = "nc,cd->nd">(x, w) y = MatMul(h, out)', OUT
    ),
    "Concat along another axis": Case(
        "c = Concat<axis = 1>(h, h) y = MatMul(c, out)", OUT, x=SEQUENCE
    ),
    "Gather behind their axis": Case(
        CONV + "g = Gather<axis = 2>(h, at) y = Conv(g, out)",
        {"at": ints(2, 0), **IMAGE},
        x=HW,
    ),
    "a sum over axes that are computed": Case(
        "axes = Add(one, one) y = ReduceSum(h, axes)",
        {"one": ints(1)},
        inexact="ReduceSum runs along it",
        x=SEQUENCE,
    ),
    "Softmax of the last axis by default": Case(
        "t = Transpose<perm = [0, 2, 1]>(h) s = Softmax(t) "
        "u = Transpose<perm = [0, 2, 1]>(s) y = MatMul(u, out)",
        OUT,
        x=SEQUENCE,
    ),
    "Softmax of the axes from one on by default": Case(
        "t = Transpose<perm = [0, 2, 1]>(h) s = Softmax(t) "
        "u = Transpose<perm = [0, 2, 1]>(s) y = MatMul(u, out)",
        OUT,
        "Softmax divides by the sum",
        x=SEQUENCE,
        opset=12,
    ),
    "Pad of all axes in another order": Case(
        "p = Pad(h, pads, , axes) y = MatMul(p, out)",
        {"pads": ints(1, 0, 0, 0), "axes": ints(1, 0), "out": (5, 2)},
        opset=18,
    ),
    "Pad behind theirs": Case(
        "p = Pad(h, pads) y = MatMul(p, out)",
        {"pads": ints(0, 0, 0, 1), "out": (5, 2)},
    ),
    "a convolution along them": Case(
        "y = Conv(h, kernel)", {"kernel": (2, 6, 2)}, "Conv moves along it", x="1,6,3"
    ),
    "a pool along them": Case(
        "p = MaxPool<kernel_shape = [2]>(h) y = MatMul(p, out)",
        {"out": (3, 2)},
        "MaxPool moves along it",
        x="1,6,3",
    ),
    "a cumulative sum": Case(
        "c = CumSum(h, axis) y = MatMul(c, out)",
        {"axis": np.array(1, np.int32), **OUT},
        "CumSum counts along it",
    ),
}


def made_by(model: Model, weight: str) -> Group:
    return next(
        one
        for one in channels.find(model)
        for part in one.where
        if part.weight.name == weight and part.role == "producer"
    )


def run(model: Model) -> Array:
    info = model.inputs[0]
    shape = [dim if isinstance(dim, int) else 2 for dim in info.shape or ()]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    found = runtime.session(model, threads=1, optimize="off").run({info.name: x})
    return np.asarray(found["y"])


@pytest.mark.parametrize("name", CASES)
def test_a_rule_says_what_is_free(name: str) -> None:
    case = CASES[name]
    model = case.model()
    one = made_by(model, "w")
    assert one.size == case.size or case.why
    assert case.why in one.why
    assert bool(one.why) == bool(case.why)
    assert case.inexact in one.inexact
    assert bool(one.inexact) == bool(case.inexact)
    if case.runs:
        run(model)
    if case.why:
        return
    # Channels that nothing weighs can go without a change of the outputs.
    for part in one.where:
        if part.role == "consumer":
            values = part.weight.read().copy()
            np.moveaxis(values, part.axis, 0)[part.offsets[1].ravel()] = 0
            model.set_weight(part.weight.name, values)
    wanted = run(model)
    one = made_by(model, "w")
    channels.remove(model, one, [i for i in range(one.size) if i != 1])
    model.check()
    found = run(model)
    assert found.shape == wanted.shape
    if not case.inexact:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_roles_say_what_a_weight_does_with_a_channel() -> None:
    model = Case(
        "a = Mul(h, g) b = Add(a, s) c = Sub(b, s2) d = Max(c, low) "
        "n = BatchNormalization(d, bg, bs, bm, bv) y = MatMul(n, out)",
        {
            **dict.fromkeys(("g", "s", "s2", "low", "bg", "bs", "bm"), (4,)),
            "bv": POSITIVE,
            **OUT,
        },
    ).model()
    roles = {part.weight.name: part.role for part in made_by(model, "w").where}
    assert roles == {
        "w": "producer",
        "g": "scale",
        "s": "shift",
        "s2": "shift",
        "bg": "scale",
        "bs": "shift",
        "bm": "shift",
        "bv": "variance",
        "out": "consumer",
    }


def test_a_depthwise_kernel_filters() -> None:
    model = CASES["a depthwise convolution"].model()
    roles = {part.weight.name: part.role for part in made_by(model, "w").where}
    assert roles == {"w": "producer", "each": "filter", "out": "consumer"}
