"""What training may touch: codes, scales, biases of codes, tied values, zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.quantization.schemes import Scheme, affine, quantize
from onnxshrink.training import TrainingStep, mse
from onnxshrink.training.fakequant import is_pruned
from onnxshrink.training.gradients import gradients
from onnxshrink.training.preparation import prepare
from onnxshrink.training.rules_quant import lsq_factor
from onnxshrink.training.trainable import (
    Assigned,
    Bias,
    Codes,
    Scale,
    Tied,
    Trainable,
    attach,
    find_trainable,
    summary,
    write,
)

Array = np.ndarray[Any, Any]
T = onnx.TensorProto

LOW_BITS = {
    "int8": (T.INT8, -127, 127),
    "uint8": (T.UINT8, 0, 255),
    "int4": (T.INT4, -7, 7),
    "uint4": (T.UINT4, 0, 15),
    "int2": (T.INT2, -1, 1),
    "uint2": (T.UINT2, 0, 3),
    "int16": (T.INT16, -32767, 32767),
}


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_of(text: str, opset: Any = 21, **weights: Array) -> Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return Model.load(proto)


def coded(
    weight: Array, kind: str, axis: int | None = None, block: int = 0
) -> dict[str, Array]:
    """Return codes, scale and zero point of a weight."""
    data_type, low, high = LOW_BITS[kind]
    scheme = Scheme(data_type, low, high, kind[0] != "u", axis, block)
    if block:
        along = axis or 0
        cuts = range(block, weight.shape[along], block)
        parts = np.array_split(weight, cuts, along)
        lows = np.stack([part.min(along) for part in parts], along)
        highs = np.stack([part.max(along) for part in parts], along)
    elif axis is None:
        lows, highs = weight.min(), weight.max()
    else:
        others = tuple(a for a in range(weight.ndim) if a != axis)
        lows, highs = weight.min(others), weight.max(others)
    if kind.endswith("2"):  # the largest would leave nothing but zeros
        lows, highs = np.clip(lows, -1.2, 0), np.clip(highs, 0, 1.2)
    scale, zero = affine(lows, highs, scheme)
    return {"q": quantize(weight, scale, zero, scheme), "s": scale, "z": zero}


def found(model: Model, **options: Any) -> list[Trainable]:
    notes: list[tuple[str, str]] = []
    outputs = [tensor.name for tensor in model.outputs]
    made = find_trainable(
        model, outputs, (), (), lambda a, b: notes.append((a, b)), **options
    )
    assert not notes, notes
    return made


def whys(model: Model, **options: Any) -> dict[str, str]:
    notes: dict[str, str] = {}
    outputs = [tensor.name for tensor in model.outputs]
    find_trainable(model, outputs, (), (), notes.__setitem__, **options)
    return notes


def outputs_of(model: Model, **feeds: Array) -> Array:
    # Fused kernels would round activations too.
    session = runtime.session(model, threads=1, optimize="off")
    return next(iter(session.run(feeds).values()))


def same_start(model: Model, chosen: list[Trainable], x: Array) -> None:
    """Hold the training copy to what the model gives, and the start to the codes."""
    copy = model.copy()
    attach(copy, chosen)
    copy.check()
    np.testing.assert_allclose(
        outputs_of(copy, x=x), outputs_of(model, x=x), rtol=1e-5, atol=1e-5
    )
    for one in chosen:
        weight = copy.weight(one.name)
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight.read(), one.start)
    again = model.copy()
    assert write(again, chosen, {one.name: one.start for one in chosen}) == 0


def step_of(
    model: Model, chosen: list[Trainable], x: Array, width: int, clip: Any = None
) -> TrainingStep:
    work = model.copy()
    attach(work, chosen)
    return TrainingStep(
        work,
        {"x": x.shape},
        [one.name for one in chosen],
        lambda ctx, values: mse(ctx, values["y"], values["t"]),
        targets={"t": (np.float32, (len(x), width))},
        clip=clip,
        threads=1,
    )


def trained(
    model: Model,
    chosen: list[Trainable],
    width: int,
    steps: int = 60,
    rate: float = 0.02,
) -> tuple[Model, list[float]]:
    """Teach a linear model another one's answers."""
    x = draw(7, 64, 8)
    step = step_of(model, chosen, x, width)
    target = x @ draw(8, 8, width) * np.float32(0.5)
    losses = [step({"x": x, "t": target}, rate) for _ in range(steps)]
    after = model.copy()
    write(after, chosen, step.weights)
    after.check()
    # What is written computes what was trained.
    copy = model.copy()
    attach(copy, chosen)
    for one in chosen:
        copy.set_weight(one.name, step.weights[one.name])
    np.testing.assert_allclose(
        outputs_of(after, x=x), outputs_of(copy, x=x), rtol=1e-4, atol=1e-4
    )
    return after, losses


LINEAR = "g (float[N,8] x) => (float[N,6] y) {{ {decode}  y = MatMul(x, w) }}"


# --- codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(LOW_BITS))
@pytest.mark.parametrize(
    ("axis", "block"), [(None, 0), (1, 0), (0, 0), (0, 4), (0, 3), (1, 2)]
)
def test_codes_of_every_width_and_granularity_are_trained_as_codes(
    kind: str, axis: int | None, block: int
) -> None:
    parts = coded(draw(1, 8, 6), kind, axis, block)
    named = f"<axis = {axis or 0}{f', block_size = {block}' if block else ''}>"
    model = model_of(
        LINEAR.format(decode=f"w = DequantizeLinear{named}(q, s, z)"),
        opset=25 if kind.endswith("2") else 21,
        **parts,
    )
    chosen = found(model, scales="fixed")
    assert [type(one) for one in chosen] == [Codes]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6)
    codes = after.weight("q").read()
    assert codes.dtype == parts["q"].dtype
    assert codes.shape == parts["q"].shape
    before = parts["q"].astype(int)
    assert (codes.astype(int) != before).any()
    assert before.min() <= codes.astype(int).min()
    assert codes.astype(int).max() <= before.max()
    np.testing.assert_array_equal(after.weight("s").read(), parts["s"])
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "decode",
    [
        "c = Cast<to = 1>(q)  w = Mul(c, s)",
        "c = Cast<to = 1>(q)  w = Mul(s, c)",
        "c = Cast<to = 1>(q)  d = Sub(c, z)  w = Mul(d, s)",
        "i = Identity(q)  c = Cast<to = 1>(i)  w = Mul(c, s)",
        "c = Cast<to = 1>(q)  e = Mul(c, s)  w = Identity(e)",
    ],
)
def test_codes_behind_cast_and_mul_are_trained(decode: str) -> None:
    parts = coded(draw(1, 8, 6), "uint8", 1)
    has_zero = "Sub" in decode
    model = model_of(
        LINEAR.format(decode=decode),
        opset=13,
        q=parts["q"],
        s=parts["s"].reshape(1, 6),
        z=parts["z"].astype(np.float32).reshape(1, 6),
    )
    chosen = found(model, scales="learned")
    assert [type(one) for one in chosen] == [Scale, Codes]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6)
    assert after.weight("q").dtype == np.uint8
    assert losses[-1] < (0.5 if has_zero else 0.9) * losses[0]


def test_codes_that_are_moved_before_they_are_decoded_go_back_to_their_places() -> None:
    weight = draw(1, 8, 6)
    parts = coded(weight.T.reshape(6, 2, 4), "int4", 1)
    model = model_of(
        LINEAR.format(
            decode="t = Transpose<perm = [1, 2, 0]>(q)  c = Cast<to = 1>(t)  "
            "d = Mul(c, s)  w = Reshape(d, shape)"
        ),
        q=parts["q"],
        s=parts["s"].reshape(2, 1, 1),
        shape=np.array([8, 6]),
    )
    chosen = found(model)
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6)
    assert after.weight("q").shape == (6, 2, 4)
    assert losses[-1] < 0.8 * losses[0]


def test_a_float_master_moves_a_code_when_it_crosses_the_middle() -> None:
    model = model_of(
        "g (float[N,1] x) => (float[N,2] y) { w = DequantizeLinear(q, s) "
        "y = MatMul(x, w) }",
        q=np.array([[1, -3]], np.int8),
        s=np.asarray(0.5, np.float32),
    )
    (one,) = found(model, scales="fixed")
    np.testing.assert_array_equal(one.start, [[0.5, -1.5]])
    after = model.copy()
    assert write(after, [one], {"q": np.array([[0.24, -1.3]], np.float32)}) == 1
    np.testing.assert_array_equal(after.weight("q").read(), [[0, -3]])


def test_masters_at_the_outermost_codes_are_free_to_move() -> None:
    parts = coded(draw(1, 8, 6), "int4", 1)
    model = model_of(
        LINEAR.format(decode="w = DequantizeLinear<axis = 1>(q, s, z)"), **parts
    )
    chosen = found(model, scales="fixed")
    work = model.copy()
    attach(work, chosen)
    work = prepare(work, {"x": (3, 8)}, keep=["q"])
    name = gradients(work, {"y": None}, ["q"])["q"].name
    x = draw(3, 3, 8)
    grad = runtime.session(work, threads=1, expose=[name]).run({"x": x})[name]
    np.testing.assert_allclose(
        grad, np.broadcast_to(x.sum(0)[:, None], (8, 6)), rtol=1e-5
    )


def test_a_gradient_stops_where_a_master_is_clipped() -> None:
    model = model_of(
        "g (float[N,1] x) => (float[N,3] y) { w = DequantizeLinear(q, s) "
        "y = MatMul(x, w) }",
        q=np.array([[-4, 1, 4]], np.int8),
        s=np.asarray(0.5, np.float32),
    )
    chosen = found(model, scales="fixed")
    work = model.copy()
    attach(work, chosen)
    work.set_weight("q", np.array([[-2.3, 1.1, 2.2]], np.float32))
    work = prepare(work, {"x": (1, 1)}, keep=["q"])
    name = gradients(work, {"y": None}, ["q"])["q"].name
    answer = runtime.session(work, threads=1, expose=[name]).run(
        {"x": np.ones((1, 1), np.float32)}
    )
    # -2.3 is 4.6 steps, beyond the middle between codes 4 and 5; 2.2 is 4.4 steps.
    np.testing.assert_array_equal(answer[name], [[0, 1, 1]])
    np.testing.assert_allclose(answer["y"], [[-2, 1, 2]])


def test_codes_that_are_looked_up_and_multiplied_are_one_weight() -> None:
    parts = coded(draw(1, 12, 8), "uint8", 0)
    model = model_of(
        """g (int64[N] x) => (float[N,12] y) {
          c = Gather(q, x)  f = Cast<to = 1>(c)
          zg = Gather(z, x)  zf = Cast<to = 1>(zg)  m = Sub(f, zf)
          sg = Gather(s, x)  rows = Mul(m, sg)
          f2 = Cast<to = 1>(q)  zf2 = Cast<to = 1>(z)  m2 = Sub(f2, zf2)
          all = Mul(m2, s)  w = Transpose(all)
          y = MatMul(rows, w)
        }""",
        q=parts["q"],
        s=parts["s"].reshape(12, 1),
        z=parts["z"].reshape(12, 1),
    )
    chosen = found(model, scales="learned")
    assert [type(one) for one in chosen] == [Scale, Codes]
    x = np.arange(12)
    same_start(model, chosen, x)
    step = step_of(model, chosen, x, 12)
    target = np.eye(12, dtype=np.float32)
    losses = [step({"x": x, "t": target}, 0.02) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    after = model.copy()
    write(after, chosen, step.weights)
    got = np.square(outputs_of(after, x=x) - target).mean()
    assert got == pytest.approx(step({"x": x, "t": target}, 0), rel=1e-3)


def test_codes_behind_activations_of_dynamic_range_are_trained() -> None:
    parts = coded(draw(1, 8, 6), "int8", 1)
    model = model_of(
        """g (float[N,8] x) => (float[N,6] y) {
          xq, xs, xz = DynamicQuantizeLinear(x)
          i = MatMulInteger(xq, q, xz)
          f = Cast<to = 1>(i)
          t = Mul(xs, s)
          m = Mul(f, t)
          y = Add(m, b)
        }""",
        opset=17,
        q=parts["q"] // 2,  # sums of larger ones saturate without VNNI
        s=parts["s"],
        b=np.zeros(6, np.float32),
    )
    chosen = found(model, scales="learned")
    assert [type(one) for one in chosen] == [Scale, Codes, Trainable]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6)
    assert losses[-1] < 0.8 * losses[0]
    assert [n.op for n in after.graph.nodes] == [n.op for n in model.graph.nodes]


def test_a_binary_weight_stays_binary() -> None:
    weight = draw(1, 8, 6)
    model = model_of(
        LINEAR.format(decode="c = Cast<to = 1>(q)  w = Mul(c, s)"),
        q=np.where(weight > 0, 1, -1).astype(np.int8),
        s=np.abs(weight).mean(0, keepdims=True),
    )
    chosen = found(model)
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6)
    codes = after.weight("q").read()
    assert set(np.unique(codes)) == {-1, 1}
    assert (codes != model.weight("q").read()).any()
    assert losses[-1] < 0.9 * losses[0]


# --- scales ---------------------------------------------------------------------------


def test_scales_that_a_half_can_hold_stay_such() -> None:
    parts = coded(draw(1, 8, 6), "int4", 1)
    half = parts["s"].astype(np.float16).astype(np.float32)
    decode = "w = DequantizeLinear<axis = 1>(q, s)"
    model = model_of(LINEAR.format(decode=decode), q=parts["q"], s=half)
    chosen = found(model)
    after = model.copy()
    write(after, chosen, {"q": chosen[1].start, chosen[0].name: draw(3, 6)})
    scale = after.weight("s").read()
    assert (scale != half).all()
    np.testing.assert_array_equal(scale.astype(np.float16).astype(np.float32), scale)


@pytest.mark.parametrize(("axis", "block"), [(None, 0), (1, 0), (0, 4), (0, 3)])
def test_the_gradient_of_a_scale_is_that_of_lsq(axis: int | None, block: int) -> None:
    weight = draw(1, 8, 6)
    parts = coded(weight, "int4", axis, block)
    named = f"<axis = {axis or 0}{f', block_size = {block}' if block else ''}>"
    model = model_of(
        LINEAR.format(decode=f"w = DequantizeLinear{named}(q, s, z)"), **parts
    )
    chosen = found(model)
    (scale, codes) = chosen
    assert isinstance(scale, Scale)
    assert isinstance(codes, Codes)
    work = model.copy()
    attach(work, chosen)
    values = weight * np.float32(1.2)  # between codes, and some of it clipped
    work.set_weight("q", values)
    names = [scale.name, "q"]
    work = prepare(work, {"x": (5, 8)}, keep=names)
    made = {name: t.name for name, t in gradients(work, {"y": None}, names).items()}
    x = draw(3, 5, 8)
    session = runtime.session(work, threads=1, expose=list(made.values()))
    answer = session.run({"x": x})
    upstream = np.broadcast_to(x.sum(0)[:, None], (8, 6)).astype(np.float64)
    s = parts["s"].astype(np.float64)
    wide = s if axis is None else s[None] if not block else np.repeat(s, block, 0)[:8]
    ratio = values / wide
    low, high = (int(parts["q"].astype(int).min()), int(parts["q"].astype(int).max()))
    inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
    assert not inside.all()
    assert inside.any()
    # Esser et al. 2020, equation 3, and s = s_0 exp(slope t), so ds = s slope dt.
    slope = np.where(inside, np.rint(ratio) - ratio, np.clip(np.rint(ratio), low, high))
    each = slope * upstream * wide
    if axis is None:
        expected = each.sum().reshape(s.shape)
    elif not block:
        expected = each.sum(0)
    else:
        parts_ = np.array_split(each, range(block, 8, block), 0)
        expected = np.stack([part.sum(0) for part in parts_])
    count, largest = 48 / s.size, high
    root = lsq_factor(int(count), largest) ** 0.5
    np.testing.assert_allclose(scale.slope, root)
    np.testing.assert_allclose(
        answer[made[scale.name]], root * expected, rtol=2e-3, atol=2e-3
    )
    np.testing.assert_allclose(answer[made["q"]], upstream * inside, rtol=1e-5)


def test_the_gradient_of_a_tied_value_and_of_a_smooth_scale_is_the_slope() -> None:
    # Integers times a scale: with the codes held, the output is linear in the scale.
    model = model_of(
        "g (float[N,8] x) => (float[N,6] y) { e = Exp(u)  w = Mul(v, e) "
        "y = MatMul(x, w) }",
        v=np.tile(np.array([0.5, -1, 2], np.float32), 16).reshape(8, 6),
        u=np.zeros((1, 6), np.float32),
    )
    (tied,) = [one for one in found(model) if one.name == "v"]
    assert isinstance(tied, Tied)
    work = model.copy()
    attach(work, [tied])
    ready = prepare(work, {"x": (5, 8)}, keep=["v"])
    name = gradients(ready, {"y": None}, ["v"])["v"].name
    x = draw(3, 5, 8)
    got = runtime.session(ready, threads=1, expose=[name]).run({"x": x})[name]
    for at in range(3):
        ends = []
        for change in (-0.01, 0.01):
            moved = tied.start.copy()
            moved[at] += np.float32(change)
            copy = model.copy()
            tied.write(copy, moved)
            ends.append(outputs_of(copy, x=x).sum(dtype=np.float64))
        np.testing.assert_allclose(got[at], (ends[1] - ends[0]) / 0.02, rtol=1e-3)


@pytest.mark.parametrize("kind", ["int4", "uint4", "int2", "int8"])
def test_learned_scales_stay_positive_and_do_better_than_fixed_ones(kind: str) -> None:
    parts = coded(draw(1, 8, 6) * np.float32(3), kind, 1)
    model = model_of(
        LINEAR.format(decode="w = DequantizeLinear<axis = 1>(q, s, z)"),
        opset=25,
        **parts,
    )
    fixed = trained(model, found(model, scales="fixed"), 6, 200)[1]
    after, learned = trained(model, found(model, scales="learned"), 6, 200)
    scale = after.weight("s").read()
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    assert (scale != parts["s"]).any()
    if kind != "int8":
        assert min(learned[-20:]) < min(fixed[-20:])


def test_automatic_scales_are_those_of_few_levels() -> None:
    for kind, count in [("int8", 1), ("int4", 2)]:
        model = model_of(
            LINEAR.format(decode="w = DequantizeLinear<axis = 1>(q, s, z)"),
            **coded(draw(1, 8, 6), kind, 1),
        )
        assert len(found(model)) == count


QDQ = """g (float[N,8] x) => (float[N,6] y) {
  xq = QuantizeLinear(x, xs, xz)  xd = DequantizeLinear(xq, xs, xz)
  w = DequantizeLinear<axis = 0>(q, s, z)
  b = DequantizeLinear<axis = 0>(bq, bs)
  g = Gemm<transB = 1>(xd, w, b)
  r = Relu(g)
  rq = QuantizeLinear(r, rs, rz)  rd = DequantizeLinear(rq, rs2, rz)
  y = Identity(rd)
}"""


def qdq() -> Model:
    parts = coded(draw(1, 6, 8), "int8", 0)
    xs = np.asarray(0.03, np.float32)
    return model_of(
        QDQ,
        **parts,
        xs=xs,
        xz=np.asarray(128, np.uint8),
        bq=(np.arange(6) * 1000 - 2500).astype(np.int32),
        bs=parts["s"] * xs,
        rs=np.asarray(0.05, np.float32),
        rs2=np.asarray(0.05, np.float32),
        rz=np.asarray(0, np.uint8),
    )


def test_biases_of_codes_follow_the_scales_they_are_made_of() -> None:
    model = qdq()
    chosen = found(model, scales="learned")
    assert {type(one) for one in chosen} == {Scale, Codes, Bias}
    assert sorted(n for o in chosen if isinstance(o, Scale) for n in o.names) == [
        "rs",
        "rs2",
        "s",
        "xs",
    ]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 6, 100)
    scales = {n: after.weight(n).read() for n in ("xs", "s", "bs", "rs", "rs2")}
    for name, scale in scales.items():
        assert (scale != model.weight(name).read()).any()
    np.testing.assert_array_equal(scales["bs"], scales["xs"] * scales["s"])
    np.testing.assert_array_equal(scales["rs"], scales["rs2"])
    assert after.weight("bq").dtype == np.int32
    assert losses[-1] < 0.9 * losses[0]


def test_a_bias_that_is_left_alone_holds_the_scales_it_is_made_of() -> None:
    model = qdq()
    chosen = find_trainable(
        model, ["y"], (), ("bq",), lambda *_: None, scales="learned"
    )
    names = [n for one in chosen if isinstance(one, Scale) for n in one.names]
    assert sorted(names) == ["rs", "rs2"]


def test_activations_are_learned_by_lsq_too() -> None:
    model = qdq()
    chosen = found(model, scales="learned")
    (scale,) = [o for o in chosen if isinstance(o, Scale) and "xs" in o.names]
    # 8 values of a sample, and codes up to 127 above the zero point.
    np.testing.assert_allclose(scale.slope**2, 1 / np.sqrt(8 * 127))


# --- zeros ----------------------------------------------------------------------------


def codes_of(values: Array, levels: int) -> Array:
    step = np.abs(values).max() / levels
    made: Array = np.rint(values / step).astype(np.int8)
    return made


@pytest.mark.parametrize("levels", [1, 3, 7, 31, 127])
@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform", "student"])
def test_zeros_that_rounding_makes_are_not_taken_for_pruned(
    levels: int, shape: str
) -> None:
    random = np.random.default_rng(levels)
    values = {
        "normal": random.normal(size=20_000),
        "laplace": random.laplace(size=20_000),
        "uniform": random.uniform(-1, 1, size=20_000),
        "student": random.standard_t(4, size=20_000),
    }[shape]
    if levels < 31:
        # So wide a step leaves nothing else; a real quantizer clips.
        values = np.clip(values, -2, 2)
    assert not is_pruned(codes_of(values, levels), np.zeros(()))


@pytest.mark.parametrize("levels", [7, 31, 127])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_zeros_of_magnitude_pruning_are_seen(levels: int, share: float) -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    values[np.abs(values) < np.quantile(np.abs(values), share)] = 0
    assert is_pruned(codes_of(values, levels), np.zeros(()))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_zeros_of_random_pruning_are_seen_in_8_bit_codes(share: float) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=20_000) * (random.random(20_000) > share)
    assert is_pruned(codes_of(values, 127) + np.int8(3), np.full((), 3))


def test_zeros_of_pruned_codes_stay_and_those_of_ternary_codes_move() -> None:
    weight = draw(1, 8, 6)
    holes = np.where(np.abs(weight) < 0.8, np.float32(0), weight)
    for kind, values, stays in [("int8", holes, True), ("int2", weight, False)]:
        parts = coded(values, kind, 1)
        model = model_of(
            LINEAR.format(decode="w = DequantizeLinear<axis = 1>(q, s, z)"),
            opset=25,
            **parts,
        )
        zeros = parts["q"].astype(int) == 0
        assert zeros.mean() > 0.3
        chosen = found(model)
        after, _ = trained(model, chosen, 6, 100)
        now = after.weight("q").read().astype(int)
        assert bool((now[zeros] == 0).all()) == stays
        assert ("zeros kept" in summary(chosen)) == stays


# --- tied values ----------------------------------------------------------------------


def test_tied_values_move_together_and_zeros_stay() -> None:
    values = np.array([-1, 0, 0.25, 0.5], np.float32)
    index = np.random.default_rng(0).integers(0, 4, (8, 32))
    model = model_of(
        "g (float[N,8] x) => (float[N,32] y) { y = MatMul(x, w) }", w=values[index]
    )
    chosen = found(model)
    assert [type(one) for one in chosen] == [Tied]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 32)
    now = after.weight("w").read()
    assert losses[-1] < losses[0]
    for at, value in enumerate(values):
        (one,) = np.unique(now[index == at])
        assert (one == 0) == (value == 0)
        assert one != value or value == 0
    assert summary(chosen) == f"1 of tied values, {(index == 1).sum()} zeros kept"
    free = found(model, ties=False)
    assert type(free[0]) is Trainable
    assert len(np.unique(trained(model, free, 32)[0].weight("w").read())) > 4


def test_entries_go_over_to_other_values_and_zeros_stay() -> None:
    values = np.array([-1, 0, 0.25, 0.5], np.float32)
    index = np.random.default_rng(0).integers(0, 4, (8, 32))
    model = model_of(
        "g (float[N,8] x) => (float[N,32] y) { y = MatMul(x, w) }", w=values[index]
    )
    chosen = find_trainable(model, ["y"], (), (), lambda *_: None, reassign=True)
    assert [type(one) for one in chosen] == [Assigned]
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 32, steps=150, rate=0.03)
    tied = found(model)
    _, others = trained(model, tied, 32, steps=150, rate=0.03)
    assert losses[-1] < 0.8 * others[-1]
    now = after.weight("w").read()
    assert len(np.unique(now)) <= 4
    assert (now[index == 1] == 0).all()
    # Some of what was one value is another now.
    assert len(np.unique(now[index == 2])) > 1


@pytest.mark.parametrize("kind", ["vectors", "parts"])
def test_tables_of_vectors_and_of_parts_move_together(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "vectors":
        table = rng.normal(size=(8, 4)).astype(np.float32)
        values = table[rng.integers(0, 8, (8, 64))].reshape(8, 256)
    else:
        table = rng.normal(size=(4, 8)).astype(np.float32)
        codes = rng.integers(0, 8, (256, 8))
        values = table[np.arange(8) // 2, codes].T.copy()
    model = model_of(
        "g (float[N,8] x) => (float[N,256] y) { y = MatMul(x, w) }", w=values
    )
    chosen = found(model)
    assert [type(one) for one in chosen] == [Tied]
    assert chosen[0].start.size == 32
    same_start(model, chosen, draw(2, 4, 8))
    after, losses = trained(model, chosen, 256)
    now = after.weight("w").read()
    assert losses[-1] < losses[0]
    assert not np.array_equal(now, values)
    rows = values.reshape(-1, 4) if kind == "vectors" else values.reshape(4, -1)
    moved = now.reshape(rows.shape)
    if kind == "vectors":
        assert len(np.unique(moved, axis=0)) == 8
    else:
        assert [len(np.unique(row)) for row in moved] == [8] * 4


@pytest.mark.parametrize(
    "values",
    [
        np.ones((64,), np.float32),  # a scale that starts at one
        np.ones((64, 1, 1), np.float32),
        np.tile(np.array([1, 2, 3, 4], np.float32), 8).reshape(4, 8),  # 8 of each
        np.full((16, 16), 2, np.float32),
    ],
)
def test_vectors_and_weights_with_many_values_are_not_tied(values: Array) -> None:
    sizes = ",".join(map(str, values.shape))
    model = model_of(f"g (float t) => (float[{sizes}] y) {{ y = Mul(w, t) }}", w=values)
    (one,) = found(model)
    assert type(one) is Trainable


def test_a_table_of_values_in_the_graph_is_trained_as_it_is() -> None:
    model = model_of(
        LINEAR.format(decode="i = Cast<to = 6>(c)  w = Gather(table, i)"),
        c=np.random.default_rng(0).integers(0, 4, (8, 6)).astype(np.uint8),
        table=np.array([0, 1, -1, 0.5], np.float32),
    )
    chosen = found(model)
    assert [one.name for one in chosen] == ["table"]
    after, losses = trained(model, chosen, 6)
    assert losses[-1] < losses[0]
    assert after.weight("table").read()[0] == 0


# --- what is frozen -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "why"),
    [
        ("c = Abs(t)  w = DequantizeLinear(q, c)", "computed from data"),
        ("w = DequantizeLinear(q, s)  v = DequantizeLinear(q, s2)", "several nodes"),
        ("r = Gather(q, i)  w = DequantizeLinear(r, s)", "before they are decoded"),
        ("w = MatMulInteger(k, q, e)", "MatMulInteger"),
        ("h = Cast<to = 10>(q)  w = Cast<to = 1>(h)", "another type"),
        ("w = DequantizeLinear(q, n)", "not above zero"),
        ("w = DequantizeLinear(q, half)  ", "float16"),
    ],
)
def test_codes_that_cannot_be_trained_say_why(decode: str, why: str) -> None:
    last = "y = MatMul(x, v)" if "v =" in decode else "y = MatMul(x, w)"
    if "Integer" in decode:
        last = "v = Cast<to = 1>(w)  y = Mul(v, s)"
    elif "half" in decode:
        last = "h = Cast<to = 10>(x)  m = MatMul(h, w)  y = Cast<to = 1>(m)"
    model = model_of(
        f"g (float[N,8] x, float t) => (float[N,6] y, float z) "
        f"{{ {decode} {last} z = Abs(t) }}",
        q=np.arange(48, dtype=np.int8).reshape(8, 6),
        s=np.asarray(0.5, np.float32),
        n=np.asarray(-0.5, np.float32),
        s2=np.asarray(0.25, np.float32),
        half=np.asarray(0.5, np.float16),
        k=np.ones((1, 8), np.uint8),
        e=np.zeros((), np.uint8),
        i=np.arange(8),
    )
    assert why in whys(model)["q"]


def test_a_weight_that_is_also_an_output_stays() -> None:
    model = model_of(
        "g (float[N,8] x) => (float[N,6] y, float[8,6] w) { y = MatMul(x, w) }",
        w=draw(1, 8, 6),
    )
    notes: dict[str, str] = {}
    assert not find_trainable(model, ["y"], (), (), notes.__setitem__)
    assert "also an output" in notes["w"]


@pytest.mark.parametrize("returned", ["s", "xs", "rs2"])
def test_a_scale_that_is_also_an_output_stays(returned: str) -> None:
    model = qdq()
    model.graph.outputs.append(model.weight(returned).value)
    chosen = find_trainable(model, ["y"], (), (), lambda *_: None, scales="learned")
    names = {n for one in chosen if isinstance(one, Scale) for n in one.names}
    assert returned not in names
    assert names


@pytest.mark.parametrize("broken", ["s", "z", "shape"])
def test_parameters_that_do_not_fit_are_refused_in_words(broken: str) -> None:
    model = model_of(
        LINEAR.format(
            decode="r = Reshape(q, shape)  "
            "w = DequantizeLinear<axis = 0, block_size = 4>(r, s, z)"
        ),
        **coded(draw(1, 8, 6), "int4", 0, 4),
        shape=np.array([8, 6]),
    )
    wrong: dict[str, Array] = {
        "s": np.ones((2, 5), np.float32),
        "z": np.zeros(3, np.int8),
    }
    model.set_weight(broken, wrong.get(broken, np.array([5, -1, 7])))
    assert "fit" in whys(model)["q"]


def test_the_same_training_gives_the_same_bytes() -> None:
    model = model_of(
        LINEAR.format(decode="w = DequantizeLinear<axis = 1>(q, s, z)"),
        **coded(draw(1, 8, 6), "int4", 1),
    )
    one, two = (trained(model, found(model), 6)[0].to_bytes() for _ in range(2))
    assert one == two
