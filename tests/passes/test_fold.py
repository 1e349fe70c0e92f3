"""Fold against onnxruntime: the same outputs, less of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.passes.fold import Fold
from onnxshrink.rewriting.constants import file_bytes
from onnxshrink.testing import apply

Array = np.ndarray[Any, Any]


def model(
    text: str, *, opset: int = 17, weights: dict[str, Array] | None = None
) -> Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    proto = onnx.parser.parse_model(f"{header} example {text}")
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.load(proto)


def run(made: Model, feeds: dict[str, Array]) -> dict[str, Array]:
    return runtime.session(made, threads=1, optimize="off").run(feeds)


def folded(before: Model, **options: Any) -> tuple[Model, Context]:
    return apply(Fold(**options), before)


def ops(made: Model) -> list[str]:
    return [node.op for node in made.nodes()]


def check_same(before: Model, feeds: dict[str, Array], **options: Any) -> Model:
    """Fold, compare outputs in onnxruntime, and return the result."""
    after, _ = folded(before, **options)
    after.check()
    wanted, got = run(before, feeds), run(after, feeds)
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)
    return after


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def norm(rng: np.random.Generator, channels: int) -> dict[str, Array]:
    return {
        "scale": rng.uniform(-2, 2, channels).astype(np.float32),
        "shift": rng.standard_normal(channels).astype(np.float32),
        "mean": rng.standard_normal(channels).astype(np.float32),
        "var": rng.uniform(0.1, 2, channels).astype(np.float32),
    }


# --- arithmetic -------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    groups=st.sampled_from([1, 2, 3]),
    each=st.integers(1, 3),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    has_bias=st.booleans(),
    transposed=st.booleans(),
)
def test_batch_normalization_behind_any_convolution(
    seed: int,
    groups: int,
    each: int,
    pads: list[int],
    has_bias: bool,
    transposed: bool,
) -> None:
    rng = draws(seed)
    channels = groups * each
    shape = (groups * 2, each, 3, 2) if transposed else (channels, 2, 3, 2)
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    weights |= norm(rng, channels)
    if has_bias:
        weights["b"] = rng.standard_normal(channels).astype(np.float32)
    op = "ConvTranspose" if transposed else "Conv"
    pads = [min(pad, 1) for pad in pads] if transposed else pads
    before = model(
        f"""(float[N,{groups * 2},5,6] x) => (float[N,C,H,W] y) {{
            a = {op}<group = {groups}, pads = {pads}>(x, w{", b" * has_bias})
            y = BatchNormalization<epsilon = 0.001>(a, scale, shift, mean, var)
        }}""",
        weights=weights,
    )
    x = rng.standard_normal((2, groups * 2, 5, 6)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert ops(after) == [op]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    groups=st.sampled_from([1, 2]),
    pad=st.integers(0, 1),
    has_bias=st.booleans(),
)
def test_batch_normalization_in_front_of_a_convolution(
    seed: int, groups: int, pad: int, has_bias: bool
) -> None:
    rng = draws(seed)
    weights = {"w": rng.standard_normal((4, 4 // groups, 2, 2)).astype(np.float32)}
    weights |= norm(rng, 4)
    if has_bias:
        weights["b"] = rng.standard_normal(4).astype(np.float32)
    before = model(
        f"""(float[N,4,3,3] x) => (float[N,C,H,W] y) {{
            a = BatchNormalization(x, scale, shift, mean, var)
            y = Conv<group = {groups}, pads = [0, {pad}, 0, 0]>(a, w{", b" * has_bias})
        }}""",
        weights=weights,
    )
    x = rng.standard_normal((2, 4, 3, 3)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert ops(after) == (["BatchNormalization", "Conv"] if pad else ["Conv"])


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    trans=st.sampled_from([0, 1]),
    alpha=st.sampled_from([1.0, 0.5, 3.0]),
    beta=st.sampled_from([1.0, 0.25]),
    bias=st.sampled_from([None, (), (1,), (3,), (1, 3)]),
    steps=st.lists(st.sampled_from(["Mul", "Add", "Sub", "Div"]), max_size=3),
)
def test_arithmetic_behind_gemm(
    seed: int,
    trans: int,
    alpha: float,
    beta: float,
    bias: tuple[int, ...] | None,
    steps: list[str],
) -> None:
    rng = draws(seed)
    shape = (3, 4) if trans else (4, 3)
    weights: dict[str, Array] = {"w": rng.standard_normal(shape).astype(np.float32)}
    if bias is not None:
        weights["b"] = np.asarray(rng.standard_normal(bias), np.float32)
    attrs = f"transB = {trans}, alpha = {alpha}, beta = {beta}"
    inputs = "x, w" if bias is None else "x, w, b"
    lines, value = [f"v = Gemm<{attrs}>({inputs})"], "v"
    for number, op in enumerate(steps):
        name = f"c{number}"
        weights[name] = rng.uniform(0.5, 2, 3).astype(np.float32)
        lines.append(f"{value}{number} = {op}({value}, {name})")
        value = f"{value}{number}"
    lines.append(f"y = Tanh({value})")
    text = "(float[N,4] x) => (float[N,3] y) { " + "\n".join(lines) + " }"
    before = model(text, weights=weights)
    after = check_same(before, {"x": rng.standard_normal((5, 4)).astype(np.float32)})
    assert ops(after) == ["Gemm", "Tanh"]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    own=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    what=st.sampled_from(["Conv", "AveragePool", "MaxPool"]),
    counts=st.booleans(),
    positive=st.booleans(),
    opset=st.sampled_from([10, 13, 18]),
)
def test_pad_into_what_follows(
    seed: int,
    pads: list[int],
    own: list[int],
    what: str,
    counts: bool,
    positive: bool,
    opset: int,
) -> None:
    rng = draws(seed)
    full = [0, 0, *pads[:2], 0, 0, *pads[2:]]
    pad = f"p = Pad<pads = {full}>(a)"
    weights: dict[str, Array] = {}
    if opset >= 11:
        pad = "p = Pad(a, pads)"
        weights["pads"] = np.array(full, np.int64)
    attrs = f"kernel_shape = [3, 3], pads = {own}"
    inputs = "p"
    if what == "Conv":
        inputs = "p, w"
        weights["w"] = rng.standard_normal((2, 2, 3, 3)).astype(np.float32)
    elif what == "AveragePool":
        attrs += f", count_include_pad = {int(counts)}"
    before = model(
        f"""(float[N,2,5,5] x) => (float[N,C,H,W] y) {{
            a = {"Relu" if positive else "Neg"}(x)
            {pad}
            y = {what}<{attrs}>({inputs})
        }}""",
        weights=weights,
        opset=opset,
    )
    x = rng.standard_normal((2, 2, 5, 5)).astype(np.float32)
    after = check_same(before, {"x": x})
    if what == "Conv":
        assert "Pad" not in ops(after)


def test_a_shift_that_would_cost_precision_stays_in_front() -> None:
    before = model(
        """(float[N,1,2,2] x) => (float[N,1,2,2] y) {
            a = Sub(x, far)
            y = Conv(a, w)
        }""",
        weights={
            "far": np.full((1, 1, 1), 1e7, np.float32),
            "w": np.ones((1, 1, 1, 1), np.float32),
        },
    )
    x = np.float32(1e7) + np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    after = check_same(before, {"x": x})
    assert ops(after) == ["Sub", "Conv"]


def test_weights_that_would_overflow_stay() -> None:
    before = model(
        """(float16[N,2] x) => (float16[N,2] y) {
            a = MatMul(x, w)
            y = Mul(a, c)
        }""",
        weights={
            "w": np.full((2, 2), 1e4, np.float16),
            "c": np.array(100, np.float16),
        },
    )
    after, context = folded(before)
    assert ops(after) == ["MatMul", "Mul"]
    assert "overflow" in context.skips[0][1]


def test_a_channel_that_arithmetic_repeats_is_not_lost() -> None:
    before = model(
        """(float[N,1,2,2] x) => (float[N,1,2,2] y) {
            a = Mul(x, c)
            y = Conv(a, w)
        }""",
        weights={
            "c": np.arange(3, dtype=np.float32).reshape(3, 1, 1),
            "w": np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1),
        },
    )
    check_same(before, {"x": np.ones((1, 1, 2, 2), np.float32)})


def test_a_folded_weight_keeps_its_name() -> None:
    rng = draws(0)
    before = model(
        """(float[N,2,3,3] x) => (float[N,2,3,3] y) {
            a = Conv(x, w)
            y = BatchNormalization(a, scale, shift, mean, var)
        }""",
        weights={"w": np.ones((2, 2, 1, 1), np.float32), **norm(rng, 2)},
    )
    after, _ = folded(before)
    assert {weight.name for weight in after.weights()} == {"w", "a_bias"}


# --- constants and sizes ----------------------------------------------------------


def test_a_huge_constant_is_never_made() -> None:
    before = model(
        """(float[N] x) => (float[N] y)
        <int64[3] shape = {100000, 100000, 100000}, int64[1] one = {1}> {
            a = ConstantOfShape(shape)
            b = Expand(one, shape)
            c = ReduceMax<keepdims = 0>(a)
            d = Cast<to = 1>(b)
            e = ReduceMax<keepdims = 0>(d)
            f = Add(x, c)
            y = Add(f, e)
        }"""
    )
    after, context = folded(before, bytes=1e12)
    assert {"ConstantOfShape", "Expand"} <= set(ops(after))
    assert any("would take" in why for _, why in context.skips)


@pytest.mark.parametrize("op", ["Tile", "Expand"])
def test_a_constant_that_would_grow_the_file_is_left_to_the_runtime(op: str) -> None:
    weights = {
        "a": np.arange(1000, dtype=np.float32).reshape(1, 1000),
        "times": np.array([500, 1], np.int64),
    }
    before = model(
        f"""(float[N,500] x) => (float[N,1000] y) {{
            b = {op}(a, times)
            y = MatMul(x, b)
        }}""",
        weights=weights,
    )
    after, _ = folded(before)
    assert op in ops(after)
    after, _ = folded(before, bytes=1000)
    assert ops(after) == ["MatMul"]


def test_the_file_grows_to_the_share_of_its_bytes_at_most() -> None:
    tiles = "".join(
        f"b{n} = Tile(a, t{n}) x{n} = Slice(x, zero, t{n}, one) "
        f"y{n} = MatMul(x{n}, b{n}) "
        for n in (2, 5, 20)
    )
    weights = {
        "a": np.arange(1000, dtype=np.float32).reshape(1, 1000),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        **{f"t{n}": np.array([n, 1], np.int64) for n in (2, 5, 20)},
        **{f"s{n}": np.array([n], np.int64) for n in (2, 5, 20)},
    }
    before = model(
        "(float[N,20] x) => (float[N,1000] y) { "
        + tiles.replace("zero, t", "zero, s")
        + "z = Add(y2, y5) y = Add(z, y20) }",
        weights=weights,
    )
    size = file_bytes(before)
    left = []
    for share in (0, 1, 3.5, 9, 50):
        after, _ = folded(before, bytes=share)
        left.append(ops(after).count("Tile"))
        assert file_bytes(after) <= max(1, share) * size
    # 4 kB are there; 8, 20 and 80 kB would be added.
    assert left == [3, 3, 2, 1, 0]


def test_the_file_does_not_grow_where_constants_are_filled_in() -> None:
    before = model(
        """(float[N,64] x) => (float[N,64] y)
        <int64[2] shape = {64, 64}, int64[1] size = {64}> {
            w = ConstantOfShape<value = float[1] {0.5}>(shape)
            v = ConstantOfShape<value = float[1] {0.5}>(shape)
            b = ConstantOfShape<value = float[1] {2}>(size)
            a = Gemm(x, w, b)
            y = Gemm(a, v, b)
        }"""
    )
    x = draws(0).standard_normal((2, 64)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert ops(after).count("ConstantOfShape") <= 2
    assert len(after.to_bytes()) < len(before.to_bytes())
    large = check_same(before, {"x": x}, bytes=1000)
    assert ops(large) == ["Gemm", "Gemm"]


def test_a_quantized_weight_is_not_decoded() -> None:
    weights = {
        "w": np.arange(4, dtype=np.int8).reshape(2, 2),
        "s": np.array(0.5, np.float32),
    }
    before = model(
        """(float[N,2] x) => (float[N,2] y) {
            a = DequantizeLinear(w, s)
            y = MatMul(x, a)
        }""",
        weights=weights,
    )
    after, context = folded(before)
    assert ops(after) == ["DequantizeLinear", "MatMul"]
    assert not context.done


def test_strings_are_constants_too() -> None:
    proto = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Concat", ["a", "b"], ["c"], axis=0),
                helper.make_node("Gather", ["c", "i"], ["y"]),
            ],
            "g",
            [helper.make_tensor_value_info("i", TensorProto.INT64, ["N"])],
            [helper.make_tensor_value_info("y", TensorProto.STRING, ["N"])],
            [
                helper.make_tensor("a", TensorProto.STRING, [1], [b"one"]),
                helper.make_tensor("b", TensorProto.STRING, [1], [b"two"]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    after, _ = folded(Model.load(proto))
    assert ops(after) == ["Gather"]
    assert list(run(after, {"i": np.array([1, 0])})["y"]) == ["two", "one"]


# --- structure --------------------------------------------------------------------


def test_what_a_branch_takes_from_outside_is_folded_there() -> None:
    before = model(
        """(bool on, float[N,2] x) => (float[N,2] y)
        <float[2] c = {1, 2}> {
            d = Neg(c)
            y = If(on)<
                then_branch = t () => (float[N,2] a) { e = Mul(d, d) a = Mul(x, e) },
                else_branch = f () => (float[N,2] b) { g = Identity(x) b = Add(g, d) }
            >
        }"""
    )
    x = draws(0).standard_normal((2, 2)).astype(np.float32)
    for on in (True, False):
        after = check_same(before, {"on": np.array(on), "x": x})
    assert sorted(ops(after)) == ["Add", "If", "Mul"]


def test_branches_with_equal_inner_names_do_not_mix_up_shapes() -> None:
    before = model(
        """(bool on, float[2,3] x) => (float[A,B] y)
        <int64[2] wide = {1, 6}, int64[2] tall = {6, 1}> {
            y = If(on)<
                then_branch = t () => (float[A,B] r) {
                    v = Reshape(x, wide) s = Shape(v) r = Reshape(x, s) },
                else_branch = f () => (float[A,B] q) {
                    v = Reshape(x, tall) s = Shape(v) q = Reshape(x, s) }
            >
        }"""
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for on in (True, False):
        check_same(before, {"on": np.array(on), "x": x})


def test_an_inlined_branch_does_not_take_names_that_are_used() -> None:
    before = model(
        """(float[N,2] x) => (float[N,2] y)
        <bool yes = {1}, float[2] w = {3, 4}> {
            b = If(yes)<
                then_branch = t () => (float[N,2] r)
                <float[2] w = {1, 2}> { u = Mul(x, w) r = Exp(u) },
                else_branch = f () => (float[N,2] q) { q = Abs(x) }
            >
            u = Tanh(b)
            c = Mul(u, w)
            y = Sin(c)
        }"""
    )
    x = draws(0).standard_normal((2, 2)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert ops(after) == ["Mul", "Exp", "Tanh", "Mul", "Sin"]


def test_an_input_with_a_default_can_still_be_overridden_if_kept() -> None:
    before = model(
        """(float[N,2] x, float[2] c = {1, 1}) => (float[N,2] y) {
            a = Mul(x, c)
            y = Tanh(a)
        }"""
    )
    after, _ = folded(before, keep_defaults=True)
    feeds = {"x": np.ones((1, 2), np.float32), "c": np.zeros(2, np.float32)}
    assert not run(after, feeds)["y"].any()


def test_a_shape_that_is_an_input_can_still_be_overridden_if_kept() -> None:
    before = model(
        """(float[2,3] x, int64[2] s = {3, 2}) => (float[A,B] y) {
            a = Reshape(x, s)
            b = Shape(a)
            c = Reshape(x, b)
            y = Tanh(c)
        }"""
    )
    after, _ = folded(before, keep_defaults=True)
    feeds = {"x": np.ones((2, 3), np.float32), "s": np.array([6, 1], np.int64)}
    assert run(after, feeds)["y"].shape == (6, 1)


def test_functions_stay_if_asked() -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    proto = onnx.parser.parse_model(
        f"""{header} example (float[N,2] x) => (float[N,2] y) {{
            a = local.twice(x)
            b = Identity(a)
            y = local.twice(b)
        }}
        <domain: "local", opset_import: ["" : 17]>
        twice (u) => (v) {{ w = Identity(u) v = Add(w, w) }}"""
    )
    before = Model.load(proto)
    x = np.ones((1, 2), np.float32)
    after = check_same(before, {"x": x}, inline=False)
    assert ops(after) == ["twice", "twice", "Add"]
    inlined = check_same(before, {"x": x})
    assert ops(inlined) == ["Add", "Add"]


def test_dynamic_shapes_are_proved_not_guessed() -> None:
    before = model(
        """(float[A,B] x, float[A,B] z, float[C,D] t) => (float[A,B] y, float[E,F] u) {
            s = Shape(z)
            v = Reshape(x, s)
            y = Relu(v)
            r = Shape(x)
            u = Reshape(t, r)
        }"""
    )
    x = draws(0).standard_normal((2, 3)).astype(np.float32)
    feeds = {"x": x, "z": x, "t": x.reshape(6, 1)}
    after = check_same(before, feeds)
    # y has the shape of x already; what u has follows from x at run time only.
    assert ops(after).count("Reshape") == 1


def test_gelu_and_layer_norm_stay_if_asked() -> None:
    before = model(
        """(float[N,2] x) => (float[N,2] y)
        <float root = {1.41421354}, float one = {1}, float half = {0.5}> {
            a = Div(x, root)
            b = Erf(a)
            c = Add(b, one)
            d = Mul(x, c)
            y = Mul(d, half)
        }""",
        opset=20,
    )
    x = draws(0).standard_normal((2, 2)).astype(np.float32)
    assert len(ops(check_same(before, {"x": x}, fuse=False))) == 5
    assert ops(check_same(before, {"x": x})) == ["Gelu"]


def chain(length: int) -> Model:
    nodes, value = [], "x"
    for index in range(length):
        op = ("Identity", "Tanh", "Mul")[index % 3]
        inputs = [value, "c"] if op == "Mul" else [value]
        nodes.append(helper.make_node(op, inputs, [f"v{index}"]))
        value = f"v{index}"
    nodes.append(helper.make_node("Relu", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array([1, 2], np.float32), "c")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return Model.load(helper.make_model(graph, opset_imports=opsets, ir_version=8))


@pytest.mark.slow
def test_ten_thousand_nodes_are_no_trouble() -> None:
    after, _ = folded(chain(9_999))
    assert len(ops(after)) == 6_667


def test_folding_twice_changes_nothing_more() -> None:
    once, _ = folded(chain(30))
    twice, context = folded(once)
    assert not context.done
    assert twice.to_bytes() == once.to_bytes()


_PARTS = """(float[N,64] x) => (float[N,64] y) {
    zero = Constant<value = int64[1] {0}>()
    half = Constant<value = int64[1] {32}>()
    full = Constant<value = int64[1] {64}>()
    first = Slice(w, zero, half, zero)
    second = Slice(w, half, full, zero)
    swapped = Concat<axis = 0>(second, first)
    y = MatMul(x, swapped)
    %s
}"""


def test_parts_of_a_weight_in_another_order_take_its_place() -> None:
    rng = draws(3)
    before = model(
        _PARTS % "", weights={"w": rng.normal(size=(64, 64)).astype(np.float32)}
    )
    after = check_same(
        before, {"x": rng.normal(size=(2, 64)).astype(np.float32)}, bytes=0
    )
    assert ops(after) == ["MatMul"]


def test_parts_of_a_weight_with_another_reader_would_add_to_the_file() -> None:
    rng = draws(3)
    text = (_PARTS % "z = MatMul(x, w)").replace("y) {", "y, float[N,64] z) {")
    before = model(text, weights={"w": rng.normal(size=(64, 64)).astype(np.float32)})
    after = check_same(
        before, {"x": rng.normal(size=(2, 64)).astype(np.float32)}, bytes=0
    )
    assert sorted(ops(after)) == ["Concat", "MatMul", "MatMul", "Slice", "Slice"]


@pytest.mark.parametrize("share", [-1, float("nan"), float("inf")])
def test_a_share_of_bytes_that_means_nothing_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="bytes is a share from 0 on"):
        Fold(bytes=share)


# --- random graphs ----------------------------------------------------------------


_STEPS: dict[str, Sequence[str]] = {
    "affine": ("Mul", "Add", "Sub", "Div"),
    "copy": ("Identity", "Dropout"),
    "unary": ("Relu", "Tanh", "Neg"),
}


@settings(deadline=None, max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**16), dynamic=st.booleans())
def test_random_chains_keep_their_outputs(
    data: st.DataObject, seed: int, dynamic: bool
) -> None:
    rng = draws(seed)
    shape = [2, 2, 4, 3]
    lines: list[str] = []
    weights: dict[str, Array] = {"zero": np.array([0], np.int64)}
    value = "x"
    kinds = [*_STEPS, "norm", "conv", "transpose", "flip", "squeeze", "reshape"]
    for number in range(data.draw(st.integers(2, 10))):
        kind = data.draw(st.sampled_from(kinds))
        out = f"v{number}"
        if kind in _STEPS:
            op = data.draw(st.sampled_from(_STEPS[kind]))
            inputs = value
            if kind == "affine":
                size = data.draw(st.sampled_from([(), (shape[1], 1, 1), (shape[3],)]))
                weights[f"c{number}"] = np.asarray(
                    rng.uniform(0.5, 2, size), np.float32
                )
                inputs = f"{value}, c{number}"
            lines.append(f"{out} = {op}({inputs})")
        elif kind == "norm":
            names = [f"{name}{number}" for name in ("scale", "shift", "mean", "var")]
            found = norm(rng, shape[1]).values()
            weights |= dict(zip(names, found, strict=True))
            lines.append(f"{out} = BatchNormalization({value}, {', '.join(names)})")
        elif kind == "conv":
            made = (shape[1], shape[1], 1, 3)
            weights[f"w{number}"] = rng.standard_normal(made).astype(np.float32) / 2
            lines.append(f"{out} = Conv<pads = [0, 1, 0, 1]>({value}, w{number})")
        elif kind == "transpose":
            lines.append(f"{out} = Transpose<perm = [0, 1, 3, 2]>({value})")
            shape[2], shape[3] = shape[3], shape[2]
        elif kind == "flip":
            lines.append(f"{out}a = Unsqueeze({value}, zero)")
            lines.append(f"{out} = Squeeze({out}a, zero)")
        elif kind == "squeeze":
            lines.append(f"{out}a = Flatten<axis = 2>({value})")
            lines.append(f"{out}s = Shape({value})")
            lines.append(f"{out} = Reshape({out}a, {out}s)")
        else:
            weights[f"s{number}"] = np.array([0, 0, -1, shape[3]], np.int64)
            lines.append(f"{out} = Reshape({value}, s{number})")
        value = out
    lines.append(f"y = Sigmoid({value})")
    dims = "N,2,H,W" if dynamic else "2,2,4,3"
    before = model(
        f"(float[{dims}] x) => (float[A,B,C,D] y) {{ " + "\n".join(lines) + " }",
        weights=weights,
    )
    x = rng.standard_normal((2, 2, 4, 3)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert len(after.to_bytes()) <= len(before.to_bytes())


def test_notes_of_the_exporter_go_and_others_stay() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> '
        "g (float[N] x) => (float[N] y) { h = Relu(x) y = Exp(h) }"
    )
    for node in proto.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="x" * 999)
        node.metadata_props.add(key="namespace", value="module/layer")
        node.metadata_props.add(key="mine", value="kept")
    before = Model.load(proto)
    size = len(before.to_bytes())

    kept, _ = folded(before, keep_traces=True)
    after, ctx = folded(before)

    assert len(kept.to_bytes()) == size
    assert len(after.to_bytes()) < size - 2 * 999
    assert [p.key for p in after.to_proto().graph.node[0].metadata_props] == ["mine"]
    assert len(before.to_bytes()) == size
    assert any("stack traces" in where for where, _ in ctx.done)


def test_weights_below_normal_numbers_become_zero_where_products_read_them() -> None:
    before = Model.load(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[N,2] x) => (float[N,2] y, float[N,2] z)
            <float[2,2] w = {1, 2, 3, 4}, float[2] d = {1, 2}>
            { y = MatMul(x, w) z = Div(x, d) }"""
        )
    )
    tiny = np.float32([[1, 1e-40], [-1e-39, 1.2e-38]])
    before.set_weight("w", tiny)
    before.set_weight("d", np.float32([1e-40, 1]))
    after, _ = folded(before)
    np.testing.assert_array_equal(
        after.weight("w").read(), np.float32([[1, 0], [0, 1.2e-38]])
    )
    assert after.weight("d").read()[0] == np.float32(1e-40)


@pytest.mark.parametrize(("opset", "left"), [(22, 6), (23, 1)])
@pytest.mark.parametrize("form", ["Mul(x, Reciprocal_s)", "Div(x, s)"])
def test_rms_normalisation_by_hand_is_one_operator_where_the_opset_has_it(
    form: str, opset: int, left: int
) -> None:
    inverse = "Reciprocal_s = Reciprocal(s)" if "Reciprocal" in form else ""
    before = Model.load(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : {opset}]>
            g (float[N,4] x) => (float[N,4] y)
            <float[4] w = {{1, 2, 3, 4}}, float eps = {{0.00001}},
            float two = {{2}}, int64[1] axis = {{-1}}>
            {{ q = Pow(x, two) m = ReduceMean(q, axis) a = Add(m, eps) s = Sqrt(a)
               {inverse} d = {form} y = Mul(d, w) }}"""
        )
    )
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    after = check_same(before, {"x": x})
    assert len(ops(after)) == left
    assert "Reciprocal" not in ops(after)
