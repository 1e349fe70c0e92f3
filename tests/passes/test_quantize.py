from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, numpy_helper

from onnxshrink import cli, runtime, testing
from onnxshrink.activations import kept
from onnxshrink.base import Context
from onnxshrink.engine import make_context
from onnxshrink.errors import UsageError
from onnxshrink.manager import PassManager
from onnxshrink.measuring import measure
from onnxshrink.model import Model
from onnxshrink.passes.quantize import Quantize
from onnxshrink.pipeline import Pipeline
from onnxshrink.quantization import weightonly
from onnxshrink.samples import Samples, Splits
from onnxshrink.validation import Budget

Array = np.ndarray[Any, Any]
MODELS = Path(__file__).parents[2] / "models"


def model(body: str, inputs: str = "float[N,3,8,8] x", **weights: Array) -> Model:
    """A graph of the given nodes with output y of the rank of x."""
    flat = "Gemm" in body or any(text in inputs for text in ("[N,8]", "[N,64]", "[N] "))
    dims = "A, B" if flat else "A, B, C, D"
    text = (
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g ({inputs}) => (float[{dims}] y) {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(pass_: str, made: Model, **arrays: Array) -> tuple[Model, Context]:
    """Apply a pass with these calibration samples."""
    samples = Samples.from_arrays(arrays).bind(made.inputs)
    (step,) = Pipeline.parse(pass_).passes
    return testing.apply(step, made, splits=Splits(calibration=samples))


def run(made: Model, optimize: runtime.Optimize = "all", **feeds: Array) -> Array:
    session = runtime.session(made, threads=1, optimize=optimize)
    return np.asarray(session.run(feeds)["y"])


def snr(wanted: Array, got: Array) -> float:
    """Signal over noise in dB."""
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))


def types(made: Model) -> set[int]:
    return {weight.data_type for weight in made.weights()}


CONVS = "a = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(a) y = Conv(r, v)"


def convolutions(**options: Array) -> Model:
    weights = {"w": draw(16, 3, 3, 3), "b": draw(16), "v": draw(8, 16, 1, 1, seed=1)}
    weights |= options
    return model(CONVS, "float[N,3,8,8] x", **weights)


def test_convolutions_run_on_codes_close_to_floats() -> None:
    x = draw(16, 3, 8, 8, seed=2)
    after, context = quantized("quantize", convolutions(), x=x)
    assert [node.op for node in after.graph.nodes].count("QuantizeLinear") == 3
    assert snr(run(convolutions(), x=x), run(after, x=x)) > 32
    assert not context.skips
    assert any("target" in what for _, what in context.done)


@pytest.mark.parametrize("target", ["avx2", "any"])
def test_sums_never_clip_whatever_the_processor(target: str) -> None:
    # All products are large and of one sign: 8-bit codes would clip every sum.
    made = convolutions(w=np.abs(draw(16, 3, 3, 3)) + 3, b=np.zeros(16, np.float32))
    x = np.abs(draw(8, 3, 8, 8, seed=2))
    after, context = quantized(f"quantize:target={target}", made, x=x)
    exact, seen = run(after, "off", x=x), run(after, x=x)
    step = float(np.abs(exact).max()) / 255
    assert np.abs(exact - seen).max() < 1.5 * step
    assert any("fit 16 bits" in what for _, what in context.done)


def test_biases_take_up_the_shift_of_the_mean() -> None:
    x = np.abs(draw(64, 3, 8, 8, seed=2)) + 2
    wanted = run(convolutions(), x=x).mean(axis=(0, 2, 3))
    shifts = []
    for answer in ("true", "false"):
        text = f"quantize:rounding=nearest,weights=int4,bias_correction={answer}"
        after, _ = quantized(text, convolutions(), x=x)
        shifts.append(np.abs(run(after, x=x).mean(axis=(0, 2, 3)) - wanted).mean())
    assert shifts[0] < 0.5 * shifts[1]


def test_gptq_is_closer_than_nearest() -> None:
    mixed = np.einsum("nchw,cd->ndhw", draw(64, 3, 8, 8, seed=2), draw(3, 3, seed=3))
    x = np.ascontiguousarray(mixed, np.float32)
    wanted = run(convolutions(), x=x)
    found = [
        snr(wanted, run(quantized(text, convolutions(), x=x)[0], x=x))
        for text in (
            "quantize:weights=int4",
            "quantize:weights=int4,rounding=nearest,bias_correction=false",
        )
    ]
    assert found[0] > found[1] + 1


@pytest.mark.parametrize("rounding", ["gptq", "adaround", "learned"])
def test_weights_alone_are_rounded_by_what_they_multiply(rounding: str) -> None:
    mixed = draw(256, 8, seed=2) @ draw(8, 64, seed=3)
    x = mixed + 0.1 * draw(256, 64, seed=4)
    made = model("y = Gemm(x, w)", "float[N,64] x", w=draw(64, 32, seed=5))
    found = [
        snr(run(made, x=x), run(quantized(text, made, x=x)[0], x=x))
        for text in (
            f"quantize:activations=none,weights=int4,rounding={rounding}",
            "quantize:activations=none,weights=int4,rounding=mse",
        )
    ]
    assert found[0] > found[1] + 3


@pytest.mark.parametrize("form", ["static", "none"])
def test_a_layer_that_reads_infinity_gets_codes_for_its_weight_alone(form: str) -> None:
    x = draw(16, 3, 8, 8, seed=2)
    x[3, 1] = np.inf
    made = convolutions(w=draw(64, 3, 3, 3), b=draw(64), v=draw(8, 64, 1, 1))
    _, ctx = quantized(f"quantize:activations={form}", made, x=x)
    assert "255 levels" in dict(ctx.done)["w"]
    if form == "static":
        assert "values beyond 1e30" in dict(ctx.skips)["w"]


@pytest.mark.parametrize(
    "option", ["rounding=gptq", "rounding=adaround", "rounding=learned"]
)
def test_rounding_by_activations_without_any_is_refused(option: str) -> None:
    (step,) = Pipeline.parse(f"quantize:activations=none,{option}").passes
    with pytest.raises(UsageError, match=rf"to see activations \({option}\).*--data"):
        testing.apply(step, convolutions())


@pytest.mark.parametrize(
    "method", ["minmax", "moving-average", "percentile", "entropy", "mse"]
)
def test_every_way_to_calibrate_gives_a_usable_range(method: str) -> None:
    x = draw(16, 3, 8, 8, seed=2)
    after, _ = quantized(f"quantize:calibration={method}", convolutions(), x=x)
    assert snr(run(convolutions(), x=x), run(after, x=x)) > 15


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
def test_activations_have_the_type_asked_for(kind: str) -> None:
    x = draw(16, 3, 8, 8, seed=2)
    text = f"quantize:activation_type={kind}"
    after, _ = quantized(text, convolutions(), x=x)
    assert getattr(TensorProto, kind.upper()) in types(after)
    assert after.opset >= (21 if "16" in kind else 13)
    least = 38 if "16" in kind else 32
    assert snr(run(convolutions(), x=x), run(after, "off", x=x)) > least


def test_zero_points_are_zero_on_a_gpu() -> None:
    x = draw(16, 3, 8, 8, seed=2) + 1
    after, _ = quantized("quantize:target=gpu", convolutions(), x=x)
    points = [w for w in after.weights() if w.name.startswith("zero_point")]
    assert points
    assert not any(point.read().any() for point in points)


def test_a_row_of_zeros_keeps_its_bias() -> None:
    weight = draw(16, 3, 3, 3)
    weight[3] = 0
    x = draw(16, 3, 8, 8, seed=2)
    made = model("y = Conv(x, w, b)", w=weight, b=np.full(16, 0.25, np.float32))
    after, _ = quantized("quantize:activations=static", made, x=x)
    step = float(np.ptp(run(made, x=x))) / 255
    assert np.abs(run(after, x=x)[:, 3] - 0.25).max() <= 0.51 * step


def test_values_that_are_always_zero_stay_float() -> None:
    made = convolutions(b=np.full(16, -1e3, np.float32))
    after, context = quantized("quantize", made, x=draw(8, 3, 8, 8))
    assert any("is 0 in all calibration samples" in why for _, why in context.skips)
    x = draw(8, 3, 8, 8)
    assert np.isfinite(run(after, x=x)).all()


def test_float_weights_never_stay_in_the_file() -> None:
    made = model(
        "a = Conv<pads = [1, 1, 1, 1]>(x, w) y = Conv<pads = [1, 1, 1, 1]>(a, w)",
        w=draw(3, 3, 3, 3),
    )
    after, _ = quantized("quantize", made, x=draw(8, 3, 8, 8))
    big = [w for w in after.weights() if w.size == 81]
    assert [w.data_type for w in big] == [TensorProto.INT8]


def test_only_and_skip_choose_weights() -> None:
    x = draw(8, 3, 8, 8)
    after, _ = quantized("quantize:skip=w", convolutions(), x=x)
    assert after.weight("w").data_type == TensorProto.FLOAT
    assert "v" not in {weight.name for weight in after.weights()}


def test_static_without_data_says_what_to_give() -> None:
    with pytest.raises(UsageError, match=r"give --data.*allow_random=true"):
        testing.apply(Quantize(activations="static"), convolutions())
    after, context = testing.apply(
        Quantize(activations="static", allow_random=True), convolutions()
    )
    assert TensorProto.INT8 in types(after)
    assert ("calibration", "random inputs: ranges are those of noise") in context.skips


@pytest.mark.parametrize("equalize", ["smooth", "awq"])
def test_equalization_of_activations_needs_data(equalize: str) -> None:
    (step,) = Pipeline.parse(f"quantize:equalize={equalize}").passes
    with pytest.raises(UsageError, match=r"needed to see activations .*--data"):
        testing.apply(step, convolutions())


def test_without_data_weights_alone_become_codes() -> None:
    made = model("y = Conv(x, w)", w=draw(64, 3, 3, 3))
    after, _ = testing.apply(Quantize(), made)
    assert TensorProto.INT8 in types(after)
    assert not [node for node in after.graph.nodes if "Quantize" in node.op]
    x = draw(4, 3, 8, 8)
    assert snr(run(made, x=x), run(after, x=x)) > 35


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the runs of sessions."""
    made: list[str] = []
    real = runtime.Session.run

    def run(self: Any, feeds: Any, *rest: Any) -> Any:
        made.append("run")
        return real(self, feeds, *rest)

    monkeypatch.setattr(runtime.Session, "run", run)
    return made


@pytest.mark.parametrize("form", ["static", "dynamic", "none"])
def test_a_kept_calibration_is_read_by_a_later_run(
    tmp_path: Path, runs: list[str], form: str
) -> None:
    made = model("y = MatMul(x, w)", "float[N,8] x", w=draw(8, 200))
    made = convolutions() if form == "static" else made
    x = draw(16, 3, 8, 8, seed=2) if form == "static" else draw(32, 8)
    text = f"quantize:activations={form},equalize=none"
    plain, _ = quantized(text, made, x=x)
    first, _ = quantized(f"{text},cache={tmp_path}", made, x=x)
    assert list(tmp_path.glob("calibration-*.npz"))
    runs.clear()
    second, _ = quantized(f"{text},cache={tmp_path}", made, x=x)
    assert not runs
    assert plain.to_bytes() == first.to_bytes() == second.to_bytes()
    other, context = quantized(f"{text},cache={tmp_path}", made, x=x + 1)
    assert other.to_bytes() != first.to_bytes()
    assert not [where for where, _ in context.skips if "calibration" in where]


def test_an_interrupted_calibration_goes_on(
    tmp_path: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SAVE_SECONDS", "SAVE_SHARE"):
        monkeypatch.setattr(kept, name, 0.0)
    made, x = convolutions(), draw(80, 3, 8, 8, seed=2)
    samples = Samples.from_arrays({"x": x}).bind(made.inputs)
    wanted, _ = quantized("quantize", made, x=x)
    ahead = len(runs)
    runs.clear()

    def stop(done: int, total: int, what: str) -> None:
        if what == "calibration" and done == total - 1:
            raise KeyboardInterrupt

    def apply(progress: Any) -> Model:
        copied = made.copy()
        Quantize().apply(
            copied,
            make_context(
                samples=Splits(calibration=samples),
                reference=made,
                folder=tmp_path,
                progress=progress,
            ),
        )
        return copied

    with pytest.raises(KeyboardInterrupt):
        apply(stop)
    assert len(runs) == ahead - 1
    runs.clear()
    after = apply(lambda done, total, what: None)
    assert len(runs) == 1
    assert [w.read().tobytes() for w in after.weights()] == [
        w.read().tobytes() for w in wanted.weights()
    ]


def test_matmul_has_the_form_asked_for() -> None:
    made = model("y = MatMul(x, w)", "float[N,8] x", w=draw(8, 200))
    for text, operator in (
        ("quantize:activations=dynamic", "MatMulInteger"),
        ("quantize:activations=static", "QuantizeLinear"),
        ("quantize:activations=none", "Mul"),
    ):
        after, _ = quantized(text, made, x=draw(32, 8))
        assert operator in [node.op for node in after.graph.nodes], text


def test_integer_kernels_that_cannot_take_few_bits_say_so() -> None:
    made = model("y = MatMul(x, w)", "float[N,8] x", w=draw(8, 200))
    after, ctx = quantized(
        "quantize:activations=dynamic,weights=int4", made, x=draw(32, 8)
    )
    assert "MatMulInteger" in [node.op for node in after.graph.nodes]
    assert any("int4 is not for layers" in why for _, why in ctx.skips)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("quantize:block=8", "from 16 to 256"),
        ("quantize:percentile=20", "above 50"),
        ("quantize:activations=static,granularity=block", "no blocks"),
        ("quantize:activations=static,weights=binary", "code for 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Pipeline.parse(text)


IMAGES, ROWS = "float[N,3,8,8] x", "float[N,64] x"
BEHIND = {
    "nothing": (IMAGES, "y = Conv(a, v)"),
    "AveragePool": (IMAGES, "r = AveragePool<kernel_shape=[2,2]>(a) y = Conv(r, v)"),
    "MaxPool": (IMAGES, "r = MaxPool<kernel_shape=[2,2]>(a) y = Conv(r, v)"),
    "Resize": (IMAGES, "r = Resize(a, , double) y = Conv(r, v)"),
    "Resize, linear": (IMAGES, 'r = Resize<mode="linear">(a, , double) y = Conv(r, v)'),
    "Add of a constant": (IMAGES, "r = Add(a, one) y = Conv(r, v)"),
    "Mul": (IMAGES, "s = Sigmoid(a) r = Mul(a, s) y = Conv(r, v)"),
    "Concat": (IMAGES, "b = Conv(x, w) r = Concat<axis=1>(a, b) y = Conv(r, v2)"),
    "Transpose": (IMAGES, "r = Transpose<perm=[0,1,3,2]>(a) y = Conv(r, v)"),
    "HardSwish": (IMAGES, "r = HardSwish(a) y = Conv(r, v)"),
    "ConvTranspose": (IMAGES, "y = ConvTranspose(a, v3)"),
    "Softmax": (ROWS, "r = Softmax(a) y = MatMul(r, m)"),
    "LayerNormalization": (ROWS, "r = LayerNormalization(a, g) y = MatMul(r, m)"),
    "Erf": (ROWS, "r = Erf(a) y = MatMul(r, m)"),
}
"""What stands between two layers: the input, and the nodes behind the first layer."""
WEIGHTS = {
    "w": draw(16, 3, 3, 3),
    "v": draw(8, 16, 3, 3, seed=1),
    "v2": draw(8, 32, 3, 3, seed=1),
    "v3": draw(16, 8, 3, 3, seed=1),
    "m": draw(64, 64, seed=3) / 8,
    "g": np.ones(64, np.float32),
    "one": np.ones((16, 1, 1), np.float32),
    "double": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.parametrize("form", ["auto", "static", "dynamic", "none"])
@pytest.mark.parametrize("name", BEHIND)
def test_layers_become_codes_whatever_stands_between_them(name: str, form: str) -> None:
    inputs, behind = BEHIND[name]
    first = "a = Conv(x, w)" if inputs == IMAGES else "a = MatMul(x, m)"
    body = f"{first} {behind}"
    dims = "A, B, C, D" if inputs == IMAGES else "A, B"
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        f"g ({inputs}) => (float[{dims}] y) {{ {body} }}"
    )
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(WEIGHTS[name], name)
        for name in sorted(read.intersection(WEIGHTS))
    )
    made = Model.load(proto)
    x = draw(16, 64, seed=2) if inputs == ROWS else draw(16, 3, 8, 8, seed=2)
    after, context = quantized(f"quantize:activations={form}", made, x=x)
    assert snr(run(made, x=x), run(after, x=x)) > 27
    left = dict(context.skips)
    for weight in ("w", "v", "v2", "v3", "m"):
        kept = any(w.name == weight and w.data_type == 1 for w in after.weights())
        # What stays as it was is named, and why.
        assert not kept or left[weight]


def test_recurrent_weights_and_tables_become_codes() -> None:
    recurrent = model(
        "h, last = GRU<hidden_size = 32>(x, w, r) y = Identity(h)",
        "float[5,N,32] x",
        w=draw(1, 96, 32) / 4,
        r=draw(1, 96, 32, seed=1) / 4,
    )
    after, _ = testing.apply(Quantize(), recurrent)
    assert [w.data_type for w in after.weights()].count(TensorProto.INT8) == 2
    x = draw(5, 4, 32)
    assert snr(run(recurrent, x=x), run(after, x=x)) > 30


def test_only_the_layer_that_hurts_is_left_out() -> None:
    # The weight that stretches the one scale of w2 meets an input that is always 0.
    w1, w2 = draw(64, 64), draw(64, 64, seed=1)
    bias = np.zeros(64, np.float32)
    bias[0], w2[0, 0] = -100, 1000
    made = model(
        "a = Gemm(x, w1, b) h = Relu(a) y = Gemm(h, w2)",
        "float[N,64] x",
        w1=w1,
        w2=w2,
        b=bias,
    )
    manager = PassManager(
        Pipeline.parse("quantize:granularity=tensor"),
        splits=Splits.build(made, {"x": draw(400, 64, seed=2)}),
        budget=Budget(min_sqnr=25),
        jobs=1,
        measure_latency=False,
        measure_memory=False,
    )
    result = manager.run(made)
    types = {w.name: w.data_type for w in result.model.weights()}
    assert types["w2"] == TensorProto.FLOAT
    assert "w1" not in types
    assert "w2" in str(result.report.to_json())


# On the command line.


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure neither latency nor memory: these tests look at neither."""
    monkeypatch.setattr(measure, "latencies", lambda one, two, *feeds: (0.1, 1.0))
    monkeypatch.setattr(runtime, "load_cost", lambda *args, **kwargs: None)


def shrink(tmp_path: Path, made: Model, text: str, **arrays: Array) -> Result:
    """Run the bare command; the result is in ``out.onnx``."""
    made.save(tmp_path / "in.onnx")
    words = [str(tmp_path / "in.onnx"), "--passes", text, "--on-breach", "keep"]
    words += ["--output", str(tmp_path / "out.onnx")]
    words += ["--report", str(tmp_path / "report.json")]
    if arrays:
        np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
        words += ["--data", str(tmp_path / "data.npz")]
    return CliRunner().invoke(cli.main, words)


STATIC = "quantize:activations=static"
GOOD = draw(10, 3, 8, 8, seed=2)


@pytest.mark.parametrize(
    ("text", "arrays", "says"),
    [
        (STATIC, {}, "needs samples of real inputs"),
        (STATIC, {"x": GOOD[:1]}, "more samples than measuring takes"),
        (STATIC, {"x": GOOD[:0]}, "holds no samples"),
        (STATIC, {"x": GOOD[:, :2]}, "do not fit the input"),
        (STATIC, {"x": GOOD * np.float32(np.nan)}, "holds NaN"),
        (STATIC, {"x": np.array(["a"] * 10)}, "takes float32"),
        (STATIC, {"a": GOOD, "b": GOOD}, "nothing for input"),
        ("quantize:activation_type=int4", {"x": GOOD}, "activation_type takes"),
    ],
)
def test_data_that_cannot_calibrate_is_an_error_in_words(
    tmp_path: Path, text: str, arrays: dict[str, Array], says: str
) -> None:
    result = shrink(tmp_path, convolutions(), text, **arrays)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("text", "arrays", "says"),
    [
        (f"{STATIC},allow_random=true", {}, "ranges are those of noise"),
        (STATIC, {"x": 0 * GOOD}, "0 in all calibration samples"),
    ],
)
def test_data_that_says_little_is_named_in_the_report(
    tmp_path: Path, text: str, arrays: dict[str, Array], says: str
) -> None:
    result = shrink(tmp_path, convolutions(v=draw(64, 16, 1, 1)), text, **arrays)
    assert result.exit_code == 0
    assert says in (tmp_path / "report.json").read_text()
    x = GOOD[:2]
    after = Model.load(tmp_path / "out.onnx")
    assert np.isfinite(run(after, x=x)).all()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("opset", "form"), [(7, "auto"), (8, "none"), (10, "none"), (12, "auto")]
)
def test_old_opsets_are_raised(tmp_path: Path, opset: int, form: str) -> None:
    proto = convolutions(v=draw(64, 16, 1, 1)).to_proto()
    proto.opset_import[0].version, proto.ir_version = opset, 4
    text = f"quantize:activations={form}"
    made = Model.load(proto)
    assert shrink(tmp_path, made, text, x=GOOD).exit_code == 0
    after = Model.load(tmp_path / "out.onnx")
    assert after.opset >= 13
    assert snr(run(made, x=GOOD), run(after, x=GOOD)) > 27


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "text",
    [
        STATIC,
        "quantize:activations=dynamic",
        "quantize:activations=none",
        "quantize:activations=none,weights=int4",
    ],
)
def test_a_model_quantized_before_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    x = draw(16, 64, seed=2)
    made = model("y = Gemm(x, w)", "float[N,64] x", w=draw(64, 96))
    once, _ = quantized(text, made, x=x)
    twice, context = quantized("quantize", once, x=x)
    assert twice.to_bytes() == once.to_bytes()
    assert context.skips
    result = shrink(tmp_path, once, "quantize", x=x)
    assert result.exit_code == 0
    assert np.array_equal(run(once, x=x), run(Model.load(tmp_path / "out.onnx"), x=x))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["quantize:activations=static", "quantize"])
def test_a_trained_network_keeps_its_answers(text: str) -> None:
    data = np.load(MODELS / "mnist.npz")
    made = Model.load(MODELS / "residual-cnn.onnx")
    (info,) = made.inputs
    assert info.shape is not None
    rest = [dim for dim in info.shape[1:] if isinstance(dim, int)]

    def images(part: Array) -> Array:
        return (part.astype(np.float32) / 255).reshape(-1, *rest)

    after, _ = quantized(text, made, **{info.name: images(data["train_x"][:128])})
    test = {info.name: images(data["test_x"][:2000])}
    right = [
        float((next(iter(found.values())).argmax(1) == data["test_y"][:2000]).mean())
        for found in (runtime.session(m, threads=1).run(test) for m in (made, after))
    ]
    assert right[1] >= right[0] - 0.003
    assert len(after.to_bytes()) < 0.4 * len(made.to_bytes())


@pytest.mark.parametrize("reader", ["y = MatMul(x, w)", "y = Gemm<transB=1>(x, w)"])
@pytest.mark.parametrize("weights", ["int8", "uint8", "int4", "ternary"])
def test_one_scale_for_the_whole_tensor_is_one_number(
    reader: str, weights: str
) -> None:
    made = model(reader, "float[N,64] x", w=draw(64, 64))
    x = draw(9, 64, seed=1)
    before = run(made, x=x)
    text = f"quantize:activations=none,granularity=tensor,weights={weights}"
    (pass_,) = Pipeline.parse(text)
    pass_.apply(made, make_context(Splits(random=True), made))
    assert made.weight("w_scale").shape == ()
    assert all(w.shape == () for w in made.weights() if "zero" in w.name)
    after = run(made, x=x)
    lost = ((after - before) ** 2).sum() / (before**2).sum()
    assert lost < {"int8": 2e-4, "uint8": 2e-4, "int4": 0.03, "ternary": 0.3}[weights]


def test_rows_of_a_table_with_one_scale_are_gathered_as_codes() -> None:
    table = draw(6000, 64)
    made = model("y = Gather(w, i)", "int64[N] i", w=table)
    text = "quantize:activations=none,granularity=tensor"
    (pass_,) = Pipeline.parse(text)
    pass_.apply(made, make_context(Splits(random=True), made))
    assert made.weight("w_scale").shape == ()
    index = np.array([5, 5999], np.int64)
    rows = run(made, i=index)
    np.testing.assert_allclose(rows, table[index], atol=0.05)


# --- what it saves ----------------------------------------------------------------


def test_the_plan_says_which_layers_gain_time() -> None:
    made = model(
        "a = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(a) "
        "y = Conv<pads = [1, 1, 1, 1]>(r, v)",
        "float[N,1,16,16] x",
        w=draw(64, 1, 3, 3),
        v=draw(64, 64, 3, 3),
    )
    samples = Samples.from_arrays({"x": draw(4, 1, 16, 16)}).bind(made.inputs)
    ctx = make_context(samples=Splits(calibration=samples), reference=made)

    # Integer kernels gain from many channels and lose where there is one.
    (only,) = Quantize().sites(made, ctx)
    assert only.where == "v"
    every = Quantize(activations="static").sites(made, ctx)
    saved = {s.where: s.savings.seconds for s in every}
    assert saved["w"] is not None
    assert saved["v"] is not None
    assert saved["w"] < 0 < saved["v"]
    # A convolution with weights alone in codes computes in floats as before.
    alone = Quantize(activations="none", weights="int4").sites(made, ctx)
    assert {site.where: site.savings.seconds for site in alone} == {"v": 0.0}


def tied(kind: str, opset: int = 17) -> Model:
    """A table of 300 rows that also scores."""
    body = {
        "turned": "t = Transpose<perm = [1, 0]>(w) y = MatMul(r, t)",
        "gemm": "y = Gemm<transB = 1>(r, w)",
        "copy": "y = MatMul(r, h)",
    }[kind]
    inputs, outputs = ("[N,T]", "[N,T,300]") if kind != "gemm" else ("[N]", "[N,300]")
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
        f"g (int64{inputs} i) => (float{outputs} y) {{ a = Gather(w, i) "
        f"m = MatMul(a, v) r = Tanh(m) {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    weights = {"w": draw(300, 64), "v": draw(64, 64, seed=1)}
    if kind == "copy":
        weights["h"] = np.ascontiguousarray(weights["w"].T)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


@pytest.mark.parametrize("kind", ["turned", "gemm", "copy"])
@pytest.mark.parametrize("accuracy", [0, 1])
def test_codes_stay_packed_if_asked(kind: str, accuracy: int, tmp_path: Path) -> None:
    shape = (32,) if kind == "gemm" else (32, 4)
    i = np.random.default_rng(2).integers(0, 300, shape)
    text = f"quantize:activations=none,weights=int4,form=packed,accuracy={accuracy}"
    after, _ = quantized(text, tied(kind), i=i)
    path = tmp_path / "packed.onnx"
    after.save(path)
    options = runtime._options(1, "all")
    target = tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(target)
    runtime._open(path, options, ("CPUExecutionProvider",), "it")
    nodes = [node for node in onnx.load(target).graph.node if "NBits" in node.op_type]
    bits = {
        next(a.i for a in node.attribute if a.name == "bits"): node for node in nodes
    }
    assert sorted(bits) == [4, 8]
    assert path.stat().st_size < 300 * 64 + 64 * 64 + 4000
    assert snr(run(tied(kind), i=i), run(Model.load(path), i=i)) > 12


@pytest.mark.parametrize("rows", [1, 64])
def test_codes_stay_packed_where_samples_have_few_rows(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weightonly, "FEW_FROM", 64 * 64)
    i = np.random.default_rng(2).integers(0, 300, (32, rows))
    text = "quantize:activations=none,weights=int4"
    after, _ = quantized(text, tied("turned"), i=i)
    packed = "DequantizeLinear" in {node.op for node in after.graph.nodes}
    assert packed == (rows == 1)
    after, _ = quantized(f"{text},form=decoded", tied("turned"), i=i)
    assert "DequantizeLinear" not in {node.op for node in after.graph.nodes}


@pytest.mark.parametrize(
    ("text", "operator", "near"),
    [
        ("quantize", "MatMulInteger", 25),
        ("quantize:activations=none", "MatMul", 30),
        ("quantize:activations=none,weights=int4,skip=v", "MatMul", 30),
    ],
)
@pytest.mark.parametrize("kind", ["turned", "gemm", "copy"])
def test_a_table_that_also_scores_becomes_one_copy_of_int8_codes(
    kind: str, text: str, operator: str, near: float
) -> None:
    shape = (32,) if kind == "gemm" else (32, 4)
    i = np.random.default_rng(2).integers(0, 300, shape)
    after, context = quantized(text, tied(kind), i=i)
    assert not [where for where, _ in context.skips if where in ("w", "h")]
    large = [weight for weight in after.weights() if weight.size == 300 * 64]
    assert [weight.data_type for weight in large] == [TensorProto.INT8]
    kinds = {node.op for node in after.graph.nodes}
    assert kinds & {operator, "Gemm"}
    assert snr(run(tied(kind), i=i), run(after, i=i)) > near


# --- NaN ------------------------------------------------------------------------------

MASKED = """
<ir_version: 10, opset_import: ["" : 17]>
attention (float[N, 6, 64] x, bool[N, 6] mask) => (float[N, 6, 64] o)
<int64[1] a1 = {1}, float ninf = {-inf}, float zero = {0}>
{
  q = MatMul(x, wq)
  kt = Transpose<perm = [0, 2, 1]>(q)
  s = MatMul(q, kt)
  mu = Unsqueeze(mask, a1)
  sm = Where(mu, s, ninf)
  p = Softmax<axis = -1>(sm)
  h = MatMul(p, x)
  y = MatMul(h, w1)
  isn = IsNaN(y)
  o = Where(isn, zero, y)
}
"""


def masked() -> onnx.ModelProto:
    """Attention whose empty masks make rows of NaN, which a Where takes out."""
    text = MASKED.replace(
        "bool[N, 6] mask)", "bool[N, 6] mask, float[64, 64] wq, float[64, 64] w1)"
    ).replace("float ninf = {-inf}, ", "")
    text = text.replace(
        "{\n  q =",
        "{\n  one = Constant<value_float = 1.0>()\n"
        "  big = Neg(one)\n  ninf = Div(big, zero)\n  q =",
    )
    proto = onnx.parser.parse_model(text)
    del proto.graph.input[2:]
    rng = np.random.default_rng(0)
    for name in ("wq", "w1"):
        values = rng.normal(size=(64, 64), scale=0.125).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


@pytest.mark.parametrize(
    ("passes", "name"),
    [
        ("quantize", "w1"),
        ("quantize:activations=static", "wq"),
        ("quantize:activations=none,weights=int8", "w1"),
        ("prune:sparsity=0.3,recover", "w1"),
    ],
)
def test_rows_of_nan_do_not_stop_a_run(passes: str, name: str) -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((64, 6)) < 0.7
    mask[::3] = False
    x = rng.normal(size=(64, 6, 64)).astype(np.float32)
    from onnxshrink.manager import shrink as whole_run

    result = whole_run(
        masked(), passes, data={"x": x, "mask": mask}, measure_memory=False
    )
    assert any(name in where for step in result.report.steps for where, _ in step.did)
    assert result.report.final.metric["sqnr_db"] > 20
