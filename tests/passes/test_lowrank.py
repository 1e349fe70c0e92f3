from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxshrink import runtime, testing
from onnxshrink.base import Context, Cost
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.measuring.costs import FixedCosts
from onnxshrink.model import Model
from onnxshrink.passes import lowrank
from onnxshrink.passes.lowrank import Lowrank, LowrankSite
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.solvers import decompose
from onnxshrink.structure import layers
from onnxshrink.structure.shapes import macs

Array = np.ndarray[Any, Any]
MODELS = testing.example_models()
RNG = np.random.default_rng


def draw(shape: tuple[int, ...], seed: int = 0) -> Array:
    return RNG(seed).standard_normal(shape).astype(np.float32)


def parsed(text: str, opset: int = 17, **weights: Array) -> Model:
    domains = f'"" : {opset}, "com.microsoft" : 1'
    header = f"<ir_version: 8, opset_import: [{domains}]>\n"
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Array:
    return draw((shape[0], rank), seed) @ draw((rank, shape[1]), seed + 1)


def with_data(model: Model, **arrays: Array) -> Context:
    samples = Samples.from_arrays(arrays).bind(model.inputs)
    splits = dataclasses.replace(
        Splits.build(model, seed=0), calibration=samples, random=False
    )
    return make_context(splits, model, threads=1)


def run(model: Model, feeds: dict[str, Array]) -> dict[str, Any]:
    return runtime.session(model, threads=1, optimize="off").run(feeds)


def at_full_rank(model: Model, conv: decompose.Form) -> list[str]:
    """Write every layer as factors of full rank, which saves nothing but shows all."""
    done = []
    for layer in list(layers.find(model, roles=("weight", "table"), fused=True)):
        if layer.why_not:
            continue
        place = lowrank._place_of(model, layer, conv)
        if isinstance(place, str):
            continue
        study = lowrank._studied(lowrank._Task(place.source, "weights"))
        ranks = decompose.full_ranks(place.form, place.shape)
        task = lowrank._Split(place.source, study, ranks)
        lowrank._write(model, place, lowrank._factored(task))
        done.append(layer.name)
    return done


# --- laws -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_keeps_the_laws(name: str, data: bool) -> None:
    pass_ = Lowrank(rank=("2",), also=("tables",))
    testing.check_laws(pass_, {name: MODELS[name]}, data=data)


@pytest.mark.parametrize("form", ["channel", "tucker", "cp"])
@pytest.mark.parametrize("name", ["convolutions", "grouped_convolutions"])
def test_other_forms_keep_the_laws(name: str, form: decompose.Form) -> None:
    testing.check_laws(Lowrank(rank=("1",), conv=form), {name: MODELS[name]}, data=True)


@pytest.mark.parametrize("conv", decompose.FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_gives_every_layer_back(name: str, conv: decompose.Form) -> None:
    model = Model.load(MODELS[name])
    before = model.copy()
    if not at_full_rank(model, conv):
        return
    model.check()
    samples = Samples.random_for(before, seed=1, count=4)
    for feeds in samples.batches(4):
        wanted, got = run(before, feeds), run(model, feeds)
        for output, value in wanted.items():
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                continue
            room = 5e-3 if name == "half_precision" else 2e-5
            scale = float(np.abs(value.astype(np.float64)).max(initial=1e-3))
            np.testing.assert_allclose(got[output], value, rtol=0, atol=room * scale)


@given(
    conv=st.sampled_from(decompose.FORMS),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    auto_pad=st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    group=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_full_rank_gives_every_convolution_back(
    conv: decompose.Form,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, ...],
    auto_pad: str,
    group: int,
    transposed: bool,
    bias: bool,
) -> None:
    op = "ConvTranspose" if transposed else "Conv"
    if transposed:
        auto_pad = "NOTSET"  # its SAME depends on the size of the output alone
    if auto_pad.startswith("SAME"):
        dilations = (1, 1)  # more is nothing that onnxruntime runs
    window = f"pads = {list(pads)}"
    if auto_pad != "NOTSET":
        window = f'auto_pad = "{auto_pad}"'
    attrs = (
        f"group = {group}, strides = {list(strides)}, dilations = {list(dilations)}, "
        f"{window}"
    )
    shape = (4, 3 * group, *kernel) if transposed else (6, 4 // group, *kernel)
    if transposed:
        shape = (4, 3, *kernel)
    outputs = 3 * group if transposed else 6
    model = parsed(
        f"g (float[N,4,9,8] x) => (float[N,M,H,W] y) "
        f"{{ y = {op}<{attrs}>(x, w{', b' if bias else ''}) }}",
        w=draw(shape),
        **({"b": draw((outputs,), 2)} if bias else {}),
    )
    before = model.copy()
    assert at_full_rank(model, conv) == ["w"]
    feeds = {"x": draw((2, 4, 9, 8), 3)}
    wanted = run(before, feeds)["y"]
    np.testing.assert_allclose(run(model, feeds)["y"], wanted, atol=2e-4)


@pytest.mark.parametrize("conv", decompose.FORMS)
@pytest.mark.parametrize("kernel", ["[5]", "[3,2,3]"])
def test_full_rank_gives_other_numbers_of_axes_back(
    conv: decompose.Form, kernel: str
) -> None:
    sizes = [int(size) for size in kernel.strip("[]").split(",")]
    dims = ",".join("9" for _ in sizes)
    steps = [2, *([1] * (len(sizes) - 1))]
    model = parsed(
        f"g (float[N,4,{dims}] x) => (float[N,M,{','.join('ABC'[: len(sizes)])}] y) "
        f"{{ y = Conv<strides = {steps}>(x, w) }}",
        w=draw((6, 4, *sizes)),
    )
    before = model.copy()
    at_full_rank(model, conv)
    feeds = {"x": draw((2, 4, *([9] * len(sizes))))}
    wanted = run(before, feeds)["y"]
    np.testing.assert_allclose(run(model, feeds)["y"], wanted, atol=2e-4)


@pytest.mark.parametrize(
    ("conv", "ranks", "parameters", "multiplications"),
    [
        # outputs 24, inputs 20, 3x3, strides 2 along both axes, 9 x 9 output positions,
        # 19 x 19 padded to be read: Jaderberg et al. 2014, section 2.2.
        ("spatial", "8", 8 * (20 * 3 + 24 * 3), 8 * (9 * 19 * 20 * 3 + 81 * 24 * 3)),
        ("channel", "8", 8 * (20 * 9 + 24), 81 * 8 * (20 * 9 + 24)),
        (
            "tucker",
            "8x6",
            20 * 8 + 8 * 6 * 9 + 6 * 24,
            19 * 19 * 20 * 8 + 81 * (8 * 6 * 9 + 6 * 24),
        ),
        (
            "cp",
            "8",
            8 * (20 + 9 + 24),
            19 * 19 * 20 * 8 + 81 * (8 * 9 + 8 * 24),
        ),
    ],
)
def test_parameters_and_macs_are_those_of_the_papers(
    conv: decompose.Form, ranks: str, parameters: int, multiplications: int
) -> None:
    model = parsed(
        "g (float[N,20,19,19] x) => (float[N,24,9,9] y) "
        "{ y = Conv<strides = [2, 2]>(x, w) }",
        w=draw((24, 20, 3, 3)),
    )
    found, _ = testing.apply(Lowrank(rank=(ranks,), conv=conv), model)
    assert sum(weight.size for weight in found.weights()) == parameters
    assert macs(found, {"x": draw((1, 20, 19, 19))}) == multiplications


# --- products -------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize(
    ("trans_a", "trans_b", "left"), list(itertools.product([0, 1], [0, 1], [0, 1]))
)
def test_every_gemm_of_a_low_rank_weight_keeps_its_outputs(
    trans_a: int, trans_b: int, left: int, opset: int
) -> None:
    weight = low_rank((12, 9), 2)
    if left:
        weight = weight.T if trans_a else weight
        inputs, x = "w, x", (4, 9) if trans_b else (9, 4)
    else:
        weight = weight.T if trans_b else weight
        inputs, x = "x, w", (12, 4) if trans_a else (4, 12)
    model = parsed(
        f"g (float[{x[0]},{x[1]}] x) => (float[A,B] y) "
        f"{{ y = Gemm<transA = {trans_a}, transB = {trans_b}, alpha = 0.5, "
        f"beta = 2.0>({inputs}, b) }}",
        opset,
        w=np.ascontiguousarray(weight),
        b=draw((1,), 5),
    )
    found, ctx = testing.apply(Lowrank(rank=("2",)), model)
    assert [where for where, _ in ctx.done] == ["w"]
    feeds = {"x": draw(x, 7)}
    wanted = run(model, feeds)["y"]
    np.testing.assert_allclose(run(found, feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("op", "trans_a", "trans_b"),
    [
        ("FusedGemm", 0, 0),
        ("FusedGemm", 1, 1),
        ("FusedMatMul", 0, 1),
        ("FusedMatMul", 1, 0),
    ],
)
def test_fused_products_of_a_low_rank_weight_keep_their_outputs(
    op: str, trans_a: int, trans_b: int, left: bool
) -> None:
    weight = low_rank((12, 9), 2)
    if left:
        weight = weight.T if trans_a else weight
        inputs, x = "w, x", (4, 9) if trans_b else (9, 4)
    else:
        weight = weight.T if trans_b else weight
        inputs, x = "x, w", (12, 4) if trans_a else (4, 12)
    more = ', activation = "Relu"' if op == "FusedGemm" else ""
    inputs += ", b" if op == "FusedGemm" else ""
    model = parsed(
        f"g (float[{x[0]},{x[1]}] x) => (float[A,B] y) "
        f"{{ y = com.microsoft.{op}<transA = {trans_a}, transB = {trans_b}, "
        f"alpha = 0.5{more}>({inputs}) }}",
        w=np.ascontiguousarray(weight),
        b=draw((1,), 5),
    )
    found, ctx = testing.apply(Lowrank(rank=("2",)), model)
    assert [where for where, _ in ctx.done] == ["w"]
    feeds = {"x": draw(x, 7)}
    wanted = run(model, feeds)["y"]
    np.testing.assert_allclose(run(found, feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", decompose.FORMS)
@pytest.mark.parametrize("inputs", ["x, w", "x, w, b", "x, w, , z", "x, w, b, z"])
def test_a_fused_convolution_keeps_its_activation_and_what_it_adds(
    inputs: str, form: decompose.Form
) -> None:
    model = parsed(
        "g (float[N,16,9,9] x, float[N,16,5,5] z) => (float[N,16,5,5] y) "
        '{ y = com.microsoft.FusedConv<activation = "Relu", pads = [1,1,1,1], '
        f"strides = [2,2]>({inputs}) }}",
        w=draw((16, 16, 3, 3)),
        b=draw((16,), 5),
    )
    twin = model.copy()
    assert at_full_rank(twin, form) == ["w"]
    feeds = {"x": draw((2, 16, 9, 9), 7), "z": draw((2, 16, 5, 5), 8)}
    wanted = run(model, feeds)["y"]
    assert (wanted == 0).any()
    np.testing.assert_allclose(run(twin, feeds)["y"], wanted, rtol=1e-3, atol=1e-3)


def test_the_bias_of_a_fused_convolution_takes_up_the_mean() -> None:
    model = parsed(
        "g (float[N,16,9,9] x) => (float[N,16,9,9] y) { y = com.microsoft.FusedConv<"
        'activation = "LeakyRelu", activation_params = [0.5], pads = [1,1,1,1]>(x, w)}',
        w=draw((16, 16, 3, 3)),
    )
    x = 3 + 0.01 * draw((64, 16, 9, 9), 7)
    errors = []
    for metric in ("weights", "inputs"):
        found = model.copy()
        Lowrank(rank=("8",), metric=metric).apply(found, with_data(model, x=x))
        feeds = {"x": 3 + 0.01 * draw((4, 16, 9, 9), 8)}
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        missing = run(found, feeds)["y"] - run(model, feeds)["y"]
        errors.append(float(np.square(missing[inner]).mean()))
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    "nodes",
    [
        "d = DequantizeLinear<axis = 1>(w, s, o) y = MatMul(x, d)",
        "c = Cast<to = 1>(w) r = Sub(c, f) d = Mul(r, s) y = MatMul(x, d)",
        "r = Reshape(w, blocks) d = DequantizeLinear<axis = 0>(r, t, p) "
        "e = Reshape(d, whole) y = MatMul(x, e)",
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_codes_are_decoded_first_only_if_asked(nodes: str, data: bool) -> None:
    codes = np.clip(np.rint(6 * low_rank((40, 30), 3)), -100, 100).astype(np.int8)
    model = parsed(
        f"g (float[N,40] x) => (float[N,30] y) {{ {nodes} }}",
        w=codes,
        s=np.abs(draw((30,), 5)) + 0.5,
        o=np.arange(30).astype(np.int8),
        f=np.arange(30).astype(np.float32),
        blocks=np.array([4, 300]),
        whole=np.array([40, 30]),
        t=np.abs(draw((4,), 6)) + 0.5,
        p=np.zeros(4, np.int8),
    )
    x = draw((64, 40), 7)
    ctx = with_data(model, x=x) if data else make_context(Splits.build(model), model)
    assert not Lowrank(rank=("28",)).sites(model, ctx)
    assert ("w", "it is quantized; decode=true splits what its codes stand for") in (
        ctx.skips
    )
    found = model.copy()
    Lowrank(rank=("16",), decode=True).apply(found, ctx)
    assert [(w.name, w.dtype) for w in found.weights() if len(w.shape) == 2] == [
        ("w_in", np.float32),
        ("w_out", np.float32),
    ]
    assert [node.op for node in found.graph.nodes][-2:] == ["MatMul", "MatMul"]
    assert not any("Dequant" in n.op or n.op == "Cast" for n in found.graph.nodes)
    wanted = run(model, {"x": x})["y"]
    missing = np.square(run(found, {"x": x})["y"] - wanted).mean()
    assert missing < 0.02 * np.square(wanted).mean()


def test_codes_of_layers_that_are_left_alone_stay_codes() -> None:
    model = parsed(
        "g (int64[N] i) => (float[N,32] z) { t = Gather(e, i) c = Cast<to = 1>(t) "
        "x = Mul(c, s) d = DequantizeLinear(v, s) y = MatMul(x, d) "
        "f = DequantizeLinear(w, s) z = MatMul(y, f) }",
        e=np.rint(20 * draw((200, 32))).astype(np.int8),
        v=np.rint(20 * draw((32, 32), 1)).astype(np.int8),
        w=np.rint(20 * draw((32, 32), 2)).astype(np.int8),
        s=np.array(0.05, np.float32),
    )
    found, ctx = testing.apply(Lowrank(rank=("v:8",), decode=True), model)
    assert [where for where, _ in ctx.done] == ["v"]
    kinds = {weight.name: weight.dtype for weight in found.weights()}
    assert kinds["e"] == kinds["w"] == np.int8
    assert kinds["v_in"] == kinds["v_out"] == np.float32
    tables = Lowrank(rank=("e:31",), decode=True, also=("tables",), only=("e",))
    found, ctx = testing.apply(dataclasses.replace(tables, rank=("e:24",)), model)
    feeds = {"i": np.arange(200)}
    assert {w.name: w.shape for w in found.weights() if w.dtype == np.float32} == {
        "e_in": (200, 24),
        "e_out": (24, 32),
        "s": (),
    }
    wanted, got = run(model, feeds)["z"], run(found, feeds)["z"]
    assert np.square(got - wanted).mean() < 0.2 * np.square(wanted).mean()


def test_a_scale_that_is_computed_keeps_codes() -> None:
    model = parsed(
        "g (float[N,32] x, float s) => (float[N,32] y) "
        "{ d = DequantizeLinear(w, s) y = MatMul(x, d) }",
        w=np.rint(20 * draw((32, 32), 1)).astype(np.int8),
    )
    _, ctx = testing.apply(Lowrank(rank=("8",), decode=True), model)
    assert ("w", "the scale of its codes is computed") in ctx.skips


def test_stacked_weights_are_split_matrix_by_matrix() -> None:
    weight = np.stack([low_rank((12, 9), 2, seed) for seed in range(3)])
    model = parsed(
        "g (float[3,4,12] x) => (float[3,4,9] y) { y = MatMul(x, w) }", w=weight
    )
    found, _ = testing.apply(Lowrank(rank=("2",)), model)
    assert {w.name: w.shape for w in found.weights()} == {
        "w_in": (3, 12, 2),
        "w_out": (3, 2, 9),
    }
    feeds = {"x": draw((3, 4, 12), 7)}
    wanted = run(model, feeds)["y"]
    np.testing.assert_allclose(run(found, feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


def test_both_directions_of_an_lstm_share_a_product() -> None:
    weight = low_rank((2 * 32, 12), 3).reshape(2, 32, 12)
    model = parsed(
        "g (float[5,N,12] x) => (float[5,2,N,8] y) "
        '{ y = LSTM<hidden_size = 8, direction = "bidirectional">(x, w, r) }',
        w=weight,
        r=draw((2, 32, 8), 3) * 0.3,
    )
    found, ctx = testing.apply(Lowrank(rank=("3",)), model)
    assert [where for where, _ in ctx.done] == ["w"]
    assert (
        "r",
        "it multiplies the state, which is known inside the operator only",
    ) in (ctx.skips)
    feeds = {"x": draw((5, 2, 12), 7)}
    wanted = run(model, feeds)["y"]
    np.testing.assert_allclose(run(found, feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_half_precision() -> None:
    weight = low_rank((40, 30), 4).astype(np.float16)
    model = parsed(
        "g (float16[N,40] x) => (float16[N,30] y) { y = MatMul(x, w) }", w=weight
    )
    found, _ = testing.apply(Lowrank(rank=("4",)), model)
    assert {w.dtype for w in found.weights()} == {np.dtype(np.float16)}
    feeds = {"x": draw((4, 40)).astype(np.float16)}
    wanted = run(model, feeds)["y"].astype(np.float32)
    got = run(found, feeds)["y"].astype(np.float32)
    assert np.abs(got - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_external_weights_are_split(tmp_path: Path) -> None:
    model = parsed(
        "g (float[N,40] x) => (float[N,30] y) { y = MatMul(x, w) }",
        w=low_rank((40, 30), 4),
    )
    model.save(tmp_path / "a.onnx", storage="plain", external="always")
    loaded = Model.load(tmp_path / "a.onnx")
    found, _ = testing.apply(Lowrank(rank=("4",)), loaded)
    found.save(tmp_path / "b.onnx", storage="plain", external="always")
    feeds = {"x": draw((4, 40))}
    wanted = run(model, feeds)["y"]
    got = run(Model.load(tmp_path / "b.onnx"), feeds)["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


# --- data -----------------------------------------------------------------------------


def narrow_inputs(rows: int, seed: int = 0) -> Array:
    """Inputs of 48 channels that live in 6 directions about a mean far from zero."""
    return (draw((rows, 6), seed) @ draw((6, 48), 9) + 3.0).astype(np.float32)


def test_data_makes_outputs_better_and_the_bias_takes_up_the_mean() -> None:
    model = parsed(
        "g (float[N,48] x) => (float[N,40] y) { h = MatMul(x, w) y = Add(h, b) }",
        w=draw((48, 40)),
        b=draw((40,), 3),
    )
    ctx = with_data(model, x=narrow_inputs(64))
    errors = []
    for metric in ("weights", "inputs", "outputs"):
        twin = model.copy()
        Lowrank(rank=("6",), metric=metric).apply(twin, ctx)
        feeds = {"x": narrow_inputs(50, 5)}
        missing = run(twin, feeds)["y"] - run(model, feeds)["y"]
        errors.append(float(np.square(missing).mean()))
    assert errors[0] > 1
    assert errors[1] < 1e-4
    assert errors[2] < 1e-4


def test_a_bias_is_made_where_the_mean_is_large() -> None:
    model = parsed(
        "g (float[N,48] x) => (float[N,40] y) { y = MatMul(x, w) }", w=draw((48, 40))
    )
    for shift, made in ((0.0, False), (3.0, True)):
        twin = model.copy()
        data = narrow_inputs(64)
        ctx = with_data(model, x=data - data.mean(axis=0) + np.float32(shift))
        Lowrank(rank=("4",), metric="inputs").apply(twin, ctx)
        assert [node.op for node in twin.graph.nodes] == (
            ["MatMul", "MatMul", "Add"] if made else ["MatMul", "MatMul"]
        )


def two_layers() -> Model:
    """The first layer feeds the output at full size, the second hardly at all."""
    return parsed(
        "g (float[N,64] x) => (float[N,64] y) "
        "{ a = MatMul(x, one) n = Neg(x) b = MatMul(n, two) c = Tanh(b) "
        "d = Mul(c, small) y = Add(a, d) }",
        one=draw((64, 64)),
        two=draw((64, 64), 1) * 3,
        small=np.array(0.01, np.float32),
    )


def test_ranks_go_where_the_outputs_feel_them() -> None:
    model = two_layers()
    ctx = with_data(model, x=draw((128, 64), 5))
    pass_ = Lowrank(keep=0.5, skip=("nothing",))
    ranks = {}
    for site in pass_.sites(model, ctx):
        assert isinstance(site, LowrankSite)
        ranks[site.where] = site.ranks[0]
    assert "one" not in ranks or ranks["one"] >= 3 * ranks["two"]
    errors = {}
    for scope in ("local", "global"):
        twin = model.copy()
        Lowrank(keep=0.5, scope=scope).apply(twin, ctx)  # type: ignore[arg-type]
        size = sum(w.size for w in twin.weights() if len(w.shape) == 2)
        assert size <= 0.5 * 2 * 64 * 64
        feeds = {"x": draw((50, 64), 6)}
        missing = run(twin, feeds)["y"] - run(model, feeds)["y"]
        errors[scope] = float(np.square(missing).mean())
    assert errors["global"] < 0.7 * errors["local"]


def test_queries_and_keys_of_one_subspace_share_a_factor() -> None:
    inner = draw((64, 16), 2)
    model = parsed(
        "g (float[N,64] x) => (float[N,64] y, float[N,64] z) "
        "{ y = MatMul(x, q) z = MatMul(x, k) }",
        q=inner @ draw((16, 64), 3),
        k=inner @ draw((16, 64), 4),
    )
    found = model.copy()
    ctx = with_data(model, x=draw((64, 64), 7))
    Lowrank(keep=0.375).apply(found, ctx)
    assert ctx.done[0][0] == "q+k"
    assert [node.op for node in found.graph.nodes] == ["MatMul"] * 3
    feeds = {"x": draw((4, 64), 7)}
    for name, value in run(model, feeds).items():
        np.testing.assert_allclose(run(found, feeds)[name], value, atol=1e-3)
    alone, _ = testing.apply(Lowrank(keep=0.375), model)
    assert len(alone.graph.nodes) == 4


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({"only": ("k",)}, ["q+k"]),
        ({"only": ("q+k",)}, ["q+k"]),
        ({"only": ("w",)}, ["w"]),
        ({"only": ("MatMul",), "skip": ("w",)}, ["q+k"]),
        ({"skip": ("q",)}, ["w"]),
        ({"skip": ("q+*",)}, ["w"]),
        ({"only": ("q",), "skip": ("k",)}, []),
        ({"only": ("k",), "metric": "weights"}, ["k"]),
        ({"only": ("k",), "keep": None, "rank": ("q+k:16",)}, ["q+k"]),
    ],
)
def test_each_member_of_a_shared_factor_names_it(
    options: dict[str, Any], sites: list[str]
) -> None:
    inner = draw((64, 16), 2)
    model = parsed(
        "g (float[N,64] x) => (float[N,64] y, float[N,64] z) "
        "{ y = MatMul(x, q) k_out = MatMul(x, k) z = MatMul(k_out, w) }",
        q=inner @ draw((16, 64), 3),
        k=inner @ draw((16, 64), 4),
        w=low_rank((64, 64), 16, 5),
    )
    ctx = with_data(model, x=draw((64, 64), 7))
    pass_ = Lowrank(**{"keep": 0.375, "scope": "local", **options})
    found = pass_.sites(model, ctx)
    assert [site.where for site in found] == sites
    whole = ("q+k", "they share a factor, and skip names one")
    assert (whole in ctx.skips) == (options.get("skip", ("w",)) != ("w",))
    assert bool(found) or bool(ctx.skips)
    copy = model.copy()
    pass_.rewrite_all(copy, found, ctx)
    names = {weight.name for weight in copy.weights()}
    left = {"q", "k", "w"} - {name for site in sites for name in site.split("+")}
    assert left == names & {"q", "k", "w"}


def test_rows_of_a_table_weigh_as_often_as_they_are_read() -> None:
    table = draw((200, 32))
    model = parsed("g (int64[N] x) => (float[N,32] y) { y = Gather(t, x) }", t=table)
    often = np.arange(8).repeat(20)
    ctx = with_data(model, x=often)
    twin = model.copy()
    Lowrank(rank=("8",), also=("tables",)).apply(twin, ctx)
    values = run(twin, {"x": np.arange(200)})["y"] - table
    error = np.square(values).mean(axis=1)
    assert error[:8].mean() < 0.15 * error[8:].mean()


def test_the_recipe_that_is_printed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = two_layers()
    ctx = with_data(model, x=draw((64, 64), 5))
    twin, again = model.copy(), model.copy()
    Lowrank(keep=0.4).apply(twin, ctx)
    (said,) = [what for where, what in ctx.done if where == "lowrank"]
    recipe = tmp_path / "again.toml"
    recipe.write_text(said.partition(": ")[2])
    (pass_,) = Pipeline.from_toml(recipe).passes
    fresh = with_data(model, x=draw((64, 64), 5))
    pass_.apply(again, fresh)
    assert again.to_bytes() == twin.to_bytes()


def test_backing_off_raises_ranks_until_nothing_is_saved() -> None:
    model = parsed(
        "g (float[N,160] x) => (float[N,160] y) { y = MatMul(x, w) }",
        w=draw((160, 160)),
    )
    ctx = make_context(Splits.build(model, seed=0), model, threads=1)
    pass_ = Lowrank(keep=0.3)
    (site,) = pass_.sites(model, ctx)
    strengths = [1.0, 0.75, 0.5, 0.25, 0.01]
    weaker = [pass_.weaken(site, strength) for strength in strengths]
    ranks = [s.ranks[0] for s in weaker if isinstance(s, LowrankSite)]
    assert ranks == [24, 40, 56, 64]
    assert weaker[-1] is None
    twin = model.copy()
    kept = weaker[2]
    assert kept is not None
    pass_.rewrite_all(twin, [kept], ctx)
    assert twin.weight("w_in").shape == (160, 56)


@pytest.mark.parametrize("amount", ["energy=0.5", "macs=0.4", "keep=0.4"])
def test_every_amount_is_kept_to(amount: str) -> None:
    model = parsed(
        "g (float[N,32,8,8] x) => (float[N,48,6,6] y) { y = Conv(x, w) }",
        w=draw((48, 32, 3, 3)),
    )
    (pass_,) = Pipeline.parse(f"lowrank:{amount}").passes
    ctx = with_data(model, x=draw((16, 32, 8, 8)))
    twin = model.copy()
    pass_.apply(twin, ctx)
    feeds = {"x": draw((4, 32, 8, 8), 5)}
    one = {"x": feeds["x"][:1]}
    size = sum(w.size for w in twin.weights() if len(w.shape) > 1)
    wanted, got = run(model, feeds)["y"], run(twin, feeds)["y"]
    if amount.startswith("energy"):
        assert np.square(got - wanted).sum() < 0.6 * np.square(wanted).sum()
        assert size < 48 * 32 * 9
    elif amount.startswith("macs"):
        # The first of the two also computes what padding is not there to add.
        assert (macs(twin, one) or 0) <= 1.2 * 0.4 * (macs(model, one) or 0)
    else:
        assert 0.25 * 48 * 32 * 9 < size <= 0.4 * 48 * 32 * 9


def test_an_operator_without_gradient_gives_all_layers_the_same_share() -> None:
    model = parsed(
        "g (float[N,64] x) => (float[N,64] y) "
        "{ a = MatMul(x, one) b = Det(sq) c = Mul(a, b) d = ReverseSequence"
        "<batch_axis = 1, time_axis = 0>(c, n) y = MatMul(d, two) }",
        one=draw((64, 64)),
        two=draw((64, 64), 1),
        sq=np.eye(2, dtype=np.float32),
        n=np.ones(64, np.int64),
    )
    ctx = with_data(model, x=draw((16, 64), 5))
    sites = Lowrank(keep=0.5).sites(model, ctx)
    if ctx.skips:
        assert "have the same share" in ctx.skips[0][1]
    assert {str(site.how()["rank"]) for site in sites} == {"16"}


def test_layers_that_do_not_fit_into_memory_are_studied_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bytes_of() -> bytes:
        model = two_layers()
        ctx = with_data(model, x=draw((64, 64), 5))
        Lowrank(keep=0.4).apply(model, ctx)
        return model.to_bytes()

    wanted = bytes_of()
    monkeypatch.setattr(lowrank, "KEPT_BYTES", 0)
    monkeypatch.setattr(lowrank, "HELD_BYTES", 0)
    assert bytes_of() == wanted


def test_time_is_measured_where_an_amount_is_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Costs(FixedCosts):
        """A machine on which products with 64 inputs are slow."""

        is_measured = True

        def matmul(self, rows: int, inputs: int, outputs: int, **how: Any) -> Cost:
            slow = 10 if inputs == 64 else 1
            return Cost(4 * inputs * outputs, inputs * outputs, slow * outputs * 1e-6)

    monkeypatch.setattr(FixedCosts, "measured", lambda self: Costs())
    model = parsed(
        "g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=draw((64, 64))
    )
    ctx = with_data(model, x=draw((64, 64), 5))
    (site,) = Lowrank(latency=0.4).sites(model, ctx)
    # 10 r + 64 us are at most 256 of the 640 that it takes.
    assert site.how()["rank"] == "16"
    assert site.savings.seconds == pytest.approx((640 - 10 * 16 - 64) * 1e-6)
    (least,) = Lowrank(latency=0.1).sites(model, ctx)
    assert least.how()["rank"] == "8"
    assert ctx.skips == [
        ("lowrank", "latency=0.1 is out of reach: the lowest ranks come to 0.225")
    ]


def test_what_takes_as_long_in_two_is_left_alone() -> None:
    model = parsed(
        "g (float[N,16,2,2] x) => (float[N,16,2,2] y) "
        "{ y = Conv<pads = [0, 1, 0, 1]>(x, w) }",
        w=draw((16, 16, 1, 3)),
    )
    found, ctx = testing.apply(Lowrank(macs=0.7), model)
    assert "take as long as it does" in ctx.skips[0][1]
    assert found.to_bytes() == model.to_bytes()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": 0.01, "metric": "weights"}, "no rank of it fits keep=0.01"),
        ({"macs": 0.01, "scope": "local"}, "its factors take as long as it does"),
        ({"energy": 0.9999999}, "no rank that saves parameters keeps 0.9999999 of its"),
        ({"rank": ("64",)}, "rank 64 saves nothing; ranks up to 24 do"),
        ({"rank": ("65",)}, "rank 65 is above its full rank 64; ranks up to 24 save"),
    ],
)
def test_an_amount_that_saves_nothing_is_said_and_changes_nothing(
    options: dict[str, Any], why: str
) -> None:
    model = two_layers()
    ctx = with_data(model, x=draw((64, 64), 5))
    found = model.copy()
    Lowrank(**options).apply(found, ctx)
    assert not ctx.done
    assert any(words.startswith(why) for _, words in ctx.skips)
    assert found.to_bytes() == model.to_bytes()


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lowrank:keep=0.5,macs=0.5", "keep and macs each say how much"),
        ("lowrank:latency=0.5,energy=0.5", "latency and energy each say how much"),
        ("lowrank:keep=1.5", "keep is a share between 0 and 1"),
        ("lowrank:keep=0", "keep is a share between 0 and 1"),
        ("lowrank:rank=0", "rank is a number, name:number or name:4x6, not '0'"),
        ("lowrank:rank=w", "rank is a number"),
        ("lowrank:rank=4,rank=w:4", "not both"),
        ("lowrank:rank=w:4,rank=w:5", "given twice for w"),
        ("lowrank:scope=global,metric=inputs", "does not say"),
        ("lowrank:scope=global,energy=0.9", "leave out scope"),
        ("lowrank:conv=fft", "conv"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    ("pass_", "why"),
    [
        (
            Lowrank(metric="inputs"),
            "to see what layers read (metric=inputs), and there is no data; give",
        ),
        (
            Lowrank(scope="global"),
            "to see what the outputs lose (scope=global), and there is no data",
        ),
        (Lowrank(rank=("won:4",)), "no layer to split. Did you mean"),
        (Lowrank(rank=("one:65",)), "above its full rank 64; ranks up to 24 save"),
        (Lowrank(rank=("one:40",)), "saves nothing; ranks up to 24 do"),
        (Lowrank(rank=("one:4x4",)), "4x4 is no rank of its one factor"),
    ],
)
def test_requests_that_do_not_fit_the_model_say_what_would(
    pass_: Lowrank, why: str
) -> None:
    with pytest.raises(UsageError) as error:
        testing.apply(pass_, two_layers())
    assert why in str(error.value)
