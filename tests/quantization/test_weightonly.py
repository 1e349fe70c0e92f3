"""Weights as codes: the forms compute what their codes say, and fuse or fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxshrink import runtime
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.quantization import weightonly
from onnxshrink.quantization.weightonly import LEVELS, block_of, quantized, rewrite
from onnxshrink.samples import Splits
from onnxshrink.solvers.rounding import Grid, decode
from onnxshrink.structure.layers import LinearWeight, find
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
Array = np.ndarray[Any, Any]


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(text: str, opset: int = 21, **weights: Array) -> Model:
    graph = onnx.parser.parse_graph(f"g {text}")
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    return Model.load(proto)


def layer_of(model: Model, name: str = "w") -> LinearWeight:
    layers = find(model, roles=("weight", "table"))
    return next(layer for layer in layers if layer.name == name)


def coded(
    layer: LinearWeight, weights: str = "int8", block: int = 0
) -> tuple[Grid, Array, Array]:
    """Return a grid, codes, and the array they stand for."""
    matrices = layer.layout.matrices(layer.weight.read())
    rows = np.ascontiguousarray(matrices).reshape(-1, matrices.shape[2])
    grid, codes = quantized(rows, LEVELS[weights], block=block)
    real = decode(codes, grid).reshape(matrices.shape)
    return grid, codes, layer.layout.array(real)


def optimized(model: Model, tmp_path: Path) -> list[str]:
    """Return the operators onnxruntime really runs."""
    options = runtime._options(1, "all")
    target = tmp_path / "optimized.onnx"
    options.optimized_model_filepath = str(target)
    runtime._open(model.to_bytes(), options, ("CPUExecutionProvider",), "it")
    return [node.op_type for node in onnx.load(target).graph.node]


def run(model: Model, **feeds: Array) -> Array:
    model.drop_unused()
    session = runtime.session(model, threads=1)
    result: Array = next(iter(session.run(feeds).values()))
    return result


READERS = {
    "matmul": ("{ y = MatMul(x, w) }", (5, 64), (64, 24)),
    "matmul left": ("{ y = MatMul(w, x) }", (64, 5), (24, 64)),
    "stack": ("{ y = MatMul(x, w) }", (3, 5, 32), (3, 32, 8)),
    "gemm": ("{ y = Gemm(x, w) }", (5, 64), (64, 24)),
    "gemm transposed": ("{ y = Gemm<transB = 1>(x, w) }", (5, 64), (24, 64)),
    "gemm scaled": (
        "{ y = Gemm<transA = 1, alpha = 0.5>(x, w) }",
        (64, 5),
        (64, 24),
    ),
    "conv": ("{ y = Conv(x, w) }", (2, 16, 6, 6), (8, 16, 3, 3)),
    "conv grouped": ("{ y = Conv<group = 4>(x, w) }", (2, 64, 6, 6), (8, 16, 2, 2)),
    "conv turned": ("{ y = ConvTranspose(x, w) }", (2, 32, 4, 4), (32, 4, 2, 2)),
    "conv turned, grouped": (
        "{ y = ConvTranspose<group = 2>(x, w) }",
        (2, 64, 4, 4),
        (64, 4, 2, 2),
    ),
    "lstm": (
        "{ y, h, c = LSTM<hidden_size = 4>(x, w, r) }",
        (5, 2, 32),
        (1, 16, 32),
    ),
}


def reader(kind: str, opset: int = 21) -> tuple[Model, Array]:
    body, shape, weight = READERS[kind]
    x = values(*shape, seed=1)
    dims = ",".join(map(str, shape))
    given = {"w": values(*weight)}
    if kind == "lstm":
        given["r"] = values(1, 16, 4)
    text = f"(float[{dims}] x) => (float y) {body}"
    return model_of(text, opset, **given), x


@pytest.mark.parametrize("weights", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("kind", READERS)
def test_a_folded_weight_computes_what_its_codes_say_in_plain_kernels(
    kind: str, block: int, weights: str, tmp_path: Path
) -> None:
    plain, x = reader(kind)
    model = plain.copy()
    layer = layer_of(model)
    grid, codes, real = coded(layer, weights, block)
    rewrite(model, layer, grid, codes, form="folded")
    plain.set_weight("w", real)
    np.testing.assert_array_equal(run(model, x=x), run(plain, x=x))
    assert optimized(model, tmp_path) == optimized(plain, tmp_path)


@pytest.mark.parametrize("kind", ["matmul", "gemm", "gemm transposed"])
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("weights", ["int8", "uint8", "int4", "int2", "binary"])
def test_packed_codes_run_as_matmulnbits(
    weights: str, block: int, kind: str, tmp_path: Path
) -> None:
    plain, x = reader(kind, opset=25 if weights in ("int2", "binary") else 21)
    model = plain.copy()
    layer = layer_of(model)
    grid, codes, real = coded(layer, weights, block)
    rewrite(model, layer, grid, codes, form="packed")
    plain.set_weight("w", real)
    wanted = run(plain, x=x)
    # Activations are rounded to int8 inside the kernel.
    assert np.abs(run(model, x=x) - wanted).max() < 0.03 * np.abs(wanted).max()
    assert optimized(model, tmp_path) == ["MatMulNBits"]


def test_a_gemm_with_a_bias_becomes_matmul_and_add(tmp_path: Path) -> None:
    text = "(float[5,64] x) => (float[5,24] y) { y = Gemm(x, w, b) }"
    plain = model_of(text, w=values(64, 24), b=values(24))
    model = plain.copy()
    layer = layer_of(model)
    grid, codes, real = coded(layer, "int4", 32)
    rewrite(model, layer, grid, codes, form="packed")
    plain.set_weight("w", real)
    x = values(5, 64, seed=1)
    wanted = run(plain, x=x)
    assert np.abs(run(model, x=x) - wanted).max() < 0.03 * np.abs(wanted).max()
    assert "MatMulNBits" in optimized(model, tmp_path)


TABLE = "(int64[N,S] i) => (float[N,S,64] y) { y = Gather(w, i) }"


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
@pytest.mark.parametrize(
    "text",
    [TABLE, TABLE.replace("{ y = Gather(w, i)", "{ a = Neg(i) y = Gather(w, a)")],
)
def test_rows_of_a_table_are_gathered_before_they_are_decoded(
    text: str, weights: str, block: int, tmp_path: Path
) -> None:
    model = model_of(text, w=values(50, 64))
    layer = layer_of(model)
    grid, codes, real = coded(layer, weights, block)
    rewrite(model, layer, grid, codes, form="packed")
    i = np.array([[3, 49, 0], [7, 7, -1]])
    rows = -i if "Neg" in text else i
    np.testing.assert_array_equal(run(model, i=i), real[rows])
    assert "Cast" in optimized(model, tmp_path)
    assert not any(weight.size == 50 * 64 * 4 for weight in model.weights())


def test_a_small_table_is_decoded_at_load(tmp_path: Path) -> None:
    model = model_of(TABLE, w=values(50, 64))
    layer = layer_of(model)
    grid, codes, real = coded(layer)
    rewrite(model, layer, grid, codes)
    i = np.array([[3, 49]])
    np.testing.assert_array_equal(run(model, i=i), real[i])
    assert optimized(model, tmp_path) == ["Gather"]


def test_a_table_that_also_scores_keeps_one_set_of_codes() -> None:
    model = model_of(
        """(int64[N] i) => (float[N,50] y) {
            a = Gather(w, i)
            y = Gemm<transB = 1>(a, w)
        }""",
        w=values(50, 64),
    )
    layer = layer_of(model)
    assert not weightonly.why_not(layer)
    grid, codes, real = coded(layer)
    rewrite(model, layer, grid, codes)
    i = np.array([3, 49])
    np.testing.assert_allclose(run(model, i=i), real[i] @ real.T, rtol=1e-4, atol=1e-4)
    assert sum(weight.size == 50 * 64 for weight in model.weights()) == 1


TIED = {
    "gemm": ("a = Gather(w, i) y = Gemm<transB = 1>(a, w)", (50, 64)),
    "gemm with a bias": ("a = Gather(w, i) y = Gemm<transB = 1>(a, w, b)", (50, 64)),
    "turned": ("a = Gather(w, i) t = Transpose(w) y = MatMul(a, t)", (50, 64)),
    "turned, gemm": (
        "a = Gather(w, i) t = Transpose<perm = [1, 0]>(w) y = Gemm(a, t)",
        (50, 64),
    ),
    "turned table": ("t = Transpose(w) a = Gather(t, i) y = MatMul(a, w)", (64, 50)),
}


@pytest.mark.parametrize("form", ["folded", "decoded", "packed"])
@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("kind", TIED)
def test_a_table_that_also_scores_has_one_copy_of_codes_in_any_form(
    kind: str,
    block: int,
    weights: str,
    form: weightonly.Form,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weightonly, "SMALL_TABLE", 0)
    body, shape = TIED[kind]
    given = {"w": values(*shape)}
    given |= {"b": values(50, seed=3)} if "b)" in body else {}
    model = model_of(f"(int64[N] i) => (float[N,50] y) {{ {body} }}", **given)
    layer = next(find(model, roles=("weight", "table"), turned=True))
    assert weightonly.is_tied(layer)
    grid, codes, real = coded(layer, weights, block)
    table = real if shape == (50, 64) else real.T
    i = np.array([3, 49, 7])
    wanted = table[i] @ table.T + given.get("b", 0)
    rewrite(model, layer, grid, codes, form=form)
    found = run(model, i=i)
    near = 0.03 if form == "packed" else 1e-5
    assert np.abs(found - wanted).max() < near * np.abs(wanted).max()
    assert sum(weight.size == 50 * 64 for weight in model.weights()) == 1
    ran = optimized(model, tmp_path)
    assert ("MatMulNBits" in ran) == (form == "packed")
    assert "DequantizeLinear" not in ran
    assert "Transpose" not in ran


def test_a_turned_weight_that_something_else_reads_too_is_left_alone() -> None:
    model = model_of(
        """(int64[N] i) => (float[N,50] y, float[64,50] s) {
            a = Gather(w, i)
            t = Transpose(w)
            y = MatMul(a, t)
            s = Sin(t)
        }""",
        w=values(50, 64),
    )
    (layer,) = find(model, roles=("weight", "table"), turned=True)
    assert "Transpose" in weightonly.why_not(layer)


def test_a_table_read_along_another_axis_is_refused() -> None:
    model = model_of(
        """(int64[N] i) => (float[N,64] y) {
            a = Gather(w, i)
            y = MatMul(a, w)
        }""",
        w=values(64, 64),
    )
    layer = layer_of(model)
    assert "different axes" in weightonly.why_not(layer)
    grid, codes, _ = coded(layer)
    with pytest.raises(UsageError, match="different axes"):
        rewrite(model, layer, grid, codes)


def test_a_weight_that_is_also_an_output_is_refused() -> None:
    model = model_of(
        "(float[N,64] x) => (float[N,24] y, float[64,24] w) { y = MatMul(x, w) }",
        w=values(64, 24),
    )
    assert "also an output" in weightonly.why_not(layer_of(model))


def test_scales_of_few_codes_fit_half_precision() -> None:
    grid, _ = quantized(values(8, 64), LEVELS["int4"], block=16)
    assert (grid.scale == grid.scale.astype(np.float16)).all()


def test_scales_too_small_for_half_precision_stay() -> None:
    grid, codes = quantized(values(8, 64) * 1e-7, LEVELS["int4"], block=16)
    error = np.abs(decode(codes, grid) - values(8, 64) * 1e-7).max()
    assert 0 < error < 0.5e-7


@pytest.mark.parametrize(
    ("inputs", "wanted", "block"),
    [(64, 32, 32), (784, 32, 28), (64, 0, 0), (64, 64, 0), (97, 32, 0), (96, 64, 48)],
)
def test_blocks_cut_rows_into_equal_parts(inputs: int, wanted: int, block: int) -> None:
    assert block_of(inputs, wanted) == block


def test_a_block_that_leaves_a_rest_is_refused_with_one_that_does_not() -> None:
    model, _ = reader("matmul")
    layer = layer_of(model)
    grid, codes, _ = coded(layer, block=24)
    with pytest.raises(UsageError, match=r"blocks of 24 .* equal parts; 32 would"):
        rewrite(model, layer, grid, codes)


@pytest.mark.parametrize(
    ("kind", "opset", "reason"),
    [
        ("conv", 21, "not a matrix"),
        ("matmul left", 21, "on the right"),
        ("gemm scaled", 21, "transposes its activations"),
        ("matmul", 17, "needs opset 21"),
    ],
)
def test_what_cannot_stay_packed_says_why(kind: str, opset: int, reason: str) -> None:
    model, _ = reader(kind, opset)
    layer = layer_of(model)
    grid, codes, _ = coded(layer, "int4")
    with pytest.raises(UsageError, match=reason):
        rewrite(model, layer, grid, codes, form="packed")


def test_a_weight_outside_its_reader_s_graph_is_decoded() -> None:
    model = model_of(
        """(float[5,64] x, bool go) => (float[5,24] y) {
            y = If(go) <
                then_branch = yes () => (float[5,24] a) { a = MatMul(x, w) },
                else_branch = no () => (float[5,24] b) { b = MatMul(x, w) }
            >
        }""",
        w=values(64, 24),
    )
    layer = layer_of(model)
    grid, codes, real = coded(layer)
    rewrite(model, layer, grid, codes)
    x = values(5, 64, seed=1)
    found = run(model, x=x, go=np.array(True))
    np.testing.assert_allclose(found, x @ real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4), ("int2", 2)])
def test_a_file_takes_the_bits_of_its_codes(
    weights: str, bits: int, tmp_path: Path
) -> None:
    model = Model.load(MODELS / "lenet-300-100.onnx")
    for layer in list(find(model)):
        inputs = layer.layout.matrices_shape[2]
        grid, codes, _ = coded(layer, weights, block_of(inputs, 32) if bits < 8 else 0)
        rewrite(model, layer, grid, codes)
    model.drop_unused()
    model.save(tmp_path / "it.onnx")
    entries = 266_200
    parameters = entries // 32 * 3 if bits < 8 else 0
    size = (tmp_path / "it.onnx").stat().st_size
    assert size < entries * bits / 8 + parameters + 8_000


@pytest.mark.parametrize("form", ["folded", "auto"])
@pytest.mark.parametrize("name", sorted(example_models()))
def test_any_model_computes_what_its_codes_say(
    name: str, form: weightonly.Form
) -> None:
    plain = Model.load(example_models()[name])
    model = plain.copy()
    calibration = Splits.build(model, seed=0).calibration
    assert calibration is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for layer in list(find(model, roles=("weight", "table"))):
        if weightonly.why_not(layer):
            continue
        grid, codes, real = coded(layer)
        kind = layer.weight.dtype
        if kind.itemsize == 2:  # scales and values are rounded to it
            tolerance = {"rtol": 1e-2, "atol": 1e-2}
        rewrite(model, layer, grid, codes, form=form)
        plain.set_weight(layer.name, real.astype(kind))
    model.drop_unused()
    feeds = next(calibration.batches(8))
    found = runtime.session(model, threads=1).run(feeds)
    wanted = runtime.session(plain, threads=1).run(feeds)
    for key, value in wanted.items():
        if np.asarray(value).dtype.kind == "f":
            np.testing.assert_allclose(found[key], value, **tolerance)
        else:
            np.testing.assert_array_equal(found[key], value)


def test_large_matrices_of_few_codes_stay_packed_by_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(weightonly, "PACKED_FROM", 64 * 24)
    model, _ = reader("matmul", opset=17)
    assert weightonly.opset_for(layer_of(model), LEVELS["int4"], 16) == 21
    assert weightonly.opset_for(layer_of(model), LEVELS["int2"]) == 25
    assert weightonly.opset_for(layer_of(model), LEVELS["int8"]) == 13
    assert weightonly.packing_pays(layer_of(model), LEVELS["int4"])
    assert not weightonly.packing_pays(layer_of(model), LEVELS["int8"])
    model.require_opset(21)
    layer = layer_of(model)
    grid, codes, _ = coded(layer, "int4", 16)
    rewrite(model, layer, grid, codes)
    model.drop_unused()
    assert optimized(model, tmp_path) == ["MatMulNBits"]


@pytest.mark.parametrize("first", ["MatMul(x, w)", "Gemm(x, w, b)"])
@pytest.mark.parametrize("clip", ["Relu", "Clip"])
def test_codes_in_front_of_a_relu_are_decoded_at_load(
    clip: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weightonly, "PACKED_FROM", 1)
    model = model_of(
        f"(float[5,64] x) => (float[5,64] y) "
        f"{{ a = {first} r = {clip}(a) y = MatMul(r, v) }}",
        w=values(64, 64),
        v=values(64, 64, seed=1),
        b=values(64, seed=2),
    )
    for layer in list(find(model)):
        grid, codes, _ = coded(layer, "int4", 32)
        rewrite(model, layer, grid, codes)
    model.drop_unused()
    ran = optimized(model, tmp_path)
    assert "DequantizeLinear" not in ran
    assert "MatMulNBits" in ran


def test_zeros_of_a_pruned_matrix_are_code_zero():
    weight = np.random.default_rng(0).normal(1, 1, (8, 64)).astype(np.float32)
    weight[:, ::2] = 0
    weight[0, :8] = 0

    grid, codes = weightonly.quantized(weight, weightonly.LEVELS["int4"], block=32)

    assert np.all(codes[weight == 0] == 0)
    assert np.all(grid.zero == 0)


def test_few_rows_are_worth_packing_from_a_certain_size_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = reader("matmul")
    layer = layer_of(model)
    assert not weightonly.packing_pays(layer, LEVELS["int8"], 1)
    monkeypatch.setattr(weightonly, "FEW_FROM", 64 * 24)
    assert weightonly.packing_pays(layer, LEVELS["int8"], 1)
    assert not weightonly.packing_pays(layer, LEVELS["int8"], 64)


@pytest.mark.parametrize(("accuracy", "near"), [(1, 1e-5), (4, 0.03)])
@pytest.mark.parametrize("kind", ["matmul", "gemm transposed", "odd"])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("weights", ["int8", "uint8", "int4"])
def test_an_accuracy_level_is_written_into_the_operator(
    weights: str, block: int, kind: str, accuracy: int, near: float, tmp_path: Path
) -> None:
    if kind == "odd":
        if block:
            pytest.skip("blocks do not cut 50 inputs")
        x = values(5, 50, seed=1)
        text = "(float[5,50] x) => (float[5,24] y) { y = Gemm(x, w, b) }"
        plain = model_of(text, w=values(50, 24), b=values(24))
    else:
        plain, x = reader(kind)
    model = plain.copy()
    layer = layer_of(model)
    grid, codes, real = coded(layer, weights, block)
    rewrite(model, layer, grid, codes, form="packed", accuracy=accuracy)
    plain.set_weight("w", real)
    wanted = run(plain, x=x)
    error = np.abs(run(model, x=x) - wanted).max()
    assert error < near * np.abs(wanted).max()
    assert (error > 1e-4 * np.abs(wanted).max()) == (accuracy == 4)
    assert "MatMulNBits" in optimized(model, tmp_path)


def test_zero_points_are_a_choice() -> None:
    weight = values(8, 64) + 1
    for name in ("int8", "uint8", "int4", "int2"):
        for answer in (False, True):
            levels = weightonly.levels_of(name, answer)
            grid, codes = quantized(weight, levels)
            assert (np.ptp(grid.zero) > 0) == answer
            assert grid.low <= codes.min() <= codes.max() <= grid.high
    with pytest.raises(UsageError, match="int2"):
        weightonly.levels_of("ternary", True)
