"""Half: weights and arithmetic in 16-bit floating point."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnxshrink import runtime
from onnxshrink.base import Context
from onnxshrink.model import Model
from onnxshrink.passes.half import Half
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing import apply, check_laws, example_models

MODELS = Path(__file__).parents[2] / "models"
EXAMPLES = example_models()


def model_of(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> example {text}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.load(proto)


def product(weight: np.ndarray) -> Model:
    return model_of(
        f"(float[N,{len(weight)}] x) => (float[N,{weight.shape[1]}] y) "
        "{ y = MatMul(x, w) }",
        w=weight.astype(np.float32),
    )


def images(count: int) -> np.ndarray:
    with np.load(MODELS / "mnist.npz") as data:
        return (data["test_x"][:count, None] / 255).astype(np.float32)


def reasons(context: Context) -> dict[str, str]:
    return dict(context.skips)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("pass_", [Half(mode="compute", float32=()), Half(type="bf16")])
def test_the_laws_hold_for_arithmetic_and_bfloat16(pass_: Half, name: str) -> None:
    check_laws(pass_, {name: EXAMPLES[name]})


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_rounding_is_to_the_nearest_and_happens_once(kind: str) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    dtype = np.float16 if kind == "fp16" else ml_dtypes.bfloat16
    once, _ = apply(Half(type=kind), product(weight))
    np.testing.assert_array_equal(
        once.weight("w").read(), weight.astype(dtype).astype(np.float32)
    )
    twice, context = apply(Half(type=kind), once)
    assert twice.to_bytes() == once.to_bytes()
    assert not context.done


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_rounded_weight_takes_half_the_file(kind: str, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    rounded, _ = apply(Half(type=kind), product(weight))
    rounded.save(tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < weight.nbytes / 2 + 400


def test_a_weight_beyond_the_range_stays_unless_bfloat16_holds_it() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)) * 1e5
    _, context = apply(Half(), product(weight))
    assert "beyond the range of float16" in reasons(context)["w"]
    _, context = apply(Half(type="bf16"), product(weight))
    assert context.done
    top = np.full((8, 8), np.finfo(np.float32).max) * np.linspace(0.9, 1, 8)
    _, context = apply(Half(type="bf16"), product(top))
    assert "beyond the range of bfloat16" in reasons(context)["w"]


def test_a_weight_that_would_vanish_stays() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)) * 1e-7
    _, context = apply(Half(), product(weight))
    assert reasons(context)["w"] == "holds values too small for float16"
    weight[0] = 1.0  # what is lost beside these does not show
    _, context = apply(Half(), product(weight))
    assert context.done


def test_what_codes_store_better_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    few = rng.choice(rng.standard_normal(4), (64, 64))
    _, context = apply(Half(), product(few))
    assert "already (" in reasons(context)["w"]


def test_scales_of_quantized_values_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    model = model_of(
        """(float[N,8] x) => (float[N,64] y) {
            w = DequantizeLinear<axis = 1>(codes, scales)
            y = MatMul(x, w)
        }""",
        codes=rng.integers(-127, 128, (8, 64)).astype(np.int8),
        scales=rng.random(64).astype(np.float32),
    )
    _, context = apply(Half(), model)
    assert reasons(context)["scales"] == "is a scale of quantized values"
    assert not context.done


def test_activations_beyond_the_range_keep_their_nodes_in_float() -> None:
    model = model_of(
        """(float[N,4] x) => (float[N,4] y) {
            big = Mul(x, thousand)
            small = Mul(big, thousandth)
            y = Relu(small)
        }""",
        thousand=np.float32(1000).reshape(1),
        thousandth=np.float32(0.001).reshape(1),
    )
    for top, kept in ((10.0, set()), (100.0, {"big", "small"})):
        x = np.linspace(-top, top, 4 * 40, dtype=np.float32).reshape(40, 4)
        splits = Splits.build(model, Samples.from_arrays({"x": x}))
        half, context = apply(Half(mode="compute"), model, splits=splits)
        left = {where for where, why in context.skips if "too near to 65504" in why}
        assert left == kept
        got = runtime.session(half).run({"x": x})["y"]
        np.testing.assert_allclose(got, np.maximum(x, 0), rtol=3e-3, atol=1e-2)


def test_a_node_left_out_alone_meets_halves_behind_casts() -> None:
    model = Model.load(EXAMPLES["perceptron"])
    half, _ = apply(Half(mode="compute", skip=("Relu",)), model)
    ops = [node.op for node in half.graph.nodes]
    assert sorted(ops) == ["Cast"] * 4 + ["Gemm", "Gemm", "Relu"]


def test_bfloat16_arithmetic_is_refused_where_there_are_no_kernels() -> None:
    model = Model.load(EXAMPLES["perceptron"])
    same, context = apply(Half(mode="compute", type="bf16"), model)
    assert "no bfloat16 kernels of arithmetic" in reasons(context)["model"]
    assert same.to_bytes() == model.to_bytes()


def test_functions_keep_their_types_and_say_so() -> None:
    _, context = apply(Half(mode="compute"), Model.load(EXAMPLES["function_weights"]))
    assert "run fold first" in reasons(context)["functions"]


@pytest.mark.parametrize("name", ["vit", "residual-cnn"])
@pytest.mark.parametrize("mode", ["storage", "compute"])
def test_real_models_halve_and_answer_alike(
    name: str, mode: str, tmp_path: Path
) -> None:
    path = MODELS / f"{name}.onnx"
    x = images(200)
    splits = Splits.build(Model.load(path), Samples.from_arrays({"image": x[:40]}))
    half, context = apply(Half(mode=mode), Model.load(path), splits=splits)
    assert context.done
    half.save(tmp_path / "half.onnx")
    size = (tmp_path / "half.onnx").stat().st_size
    assert size < 0.54 * path.stat().st_size
    feed = {"image": x}
    (wanted,) = runtime.session(path, threads=1).run(feed).values()
    (got,) = runtime.session(tmp_path / "half.onnx", threads=1).run(feed).values()
    assert (got.argmax(1) == wanted.argmax(1)).all()
    noise = float(((got - wanted) ** 2).sum() / (wanted**2).sum())
    assert 10 * np.log10(noise) < -60


def test_int8_regions_leaky_relu_and_depthwise_convolutions_keep_floats() -> None:
    model = model_of(
        "(float[N,4,8,8] x) => (float[N,A,B,C] y) "
        "<float s = {0.1}, uint8 z = {0}> {"
        "  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        "  a = Conv(d, w) p = QuantizeLinear(a, s, z) e = DequantizeLinear(p, s, z)"
        "  b = Neg(e) l = LeakyRelu(b) c = Conv<group = 4>(l, v) y = Conv(c, w)"
        "}",
        w=np.ones((4, 4, 1, 1), np.float32),
        v=np.ones((4, 1, 3, 3), np.float32),
    )
    half, context = apply(Half(mode="compute"), model)
    done = {where for where, _ in context.done}
    assert len(done) == 1  # the last Conv
    whys = list(reasons(context).values())
    assert whys.count("it computes with codes, or between them") == 2
    assert "fp16 kernels of depthwise Conv are slow" in whys
    assert "1 of them stay; float32= says which do" in whys
    (warning,) = context.warnings
    assert "half:mode=compute pays on GPUs" in warning
    runtime.session(half)
