"""A smaller model of the same kind: what stays, what it costs, what it can become."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink import runtime, testing
from onnxshrink.base import Site
from onnxshrink.errors import UsageError
from onnxshrink.manager import shrink
from onnxshrink.measuring.measure import count_parameters
from onnxshrink.model import Model
from onnxshrink.passes.student import Student
from onnxshrink.pipeline import Pipeline
from onnxshrink.testing import laws

MODELS = Path(__file__).parent.parent.parent / "models"
EXAMPLES = testing.example_models()
Array = np.ndarray[Any, Any]


def load(name: str) -> Model:
    return Model.load(MODELS / f"{name}.onnx")


def sites_of(student: Student, model: Model) -> list[Site]:
    return list(student.sites(model, laws.context_of(model, 0)))


def perceptron(*widths: int) -> Model:
    """Return a perceptron with Relu between layers of these widths, as PyTorch's."""
    rng = np.random.default_rng(0)
    nodes, weights, left = [], [], "x"
    for at, (before, after) in enumerate(itertools.pairwise(widths)):
        matrix = rng.standard_normal((after, before)).astype(np.float32)
        weights += [
            numpy_helper.from_array(matrix, f"w{at}"),
            numpy_helper.from_array(np.zeros(after, np.float32), f"b{at}"),
        ]
        inputs = [left, f"w{at}", f"b{at}"]
        nodes.append(helper.make_node("Gemm", inputs, [f"h{at}"], transB=1))
        left = f"h{at}"
        if at + 2 < len(widths):
            nodes.append(helper.make_node("Relu", [left], [f"r{at}"]))
            left = f"r{at}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])
        for name, width in (("x", widths[0]), (left, widths[-1]))
    ]
    graph = helper.make_graph(nodes, "perceptron", ends[:1], ends[1:], weights)
    return Model.load(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        )
    )


def test_two_thirds_of_1200_features_are_800() -> None:
    student, _ = testing.apply(
        Student(keep=1, width=0.6667), perceptron(784, 1200, 1200, 10)
    )
    shapes = [student.weight(f"w{at}").shape for at in range(3)]
    assert shapes == [(800, 784), (800, 800), (10, 800)]


OPTIONS = [
    Student(width=0.5, keep=0),
    Student(width=0.3, keep=1, round_to=1, inherit=False),
]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("student", OPTIONS, ids=lambda s: str(Pipeline((s,))))
def test_the_laws_hold_for_other_options(student: Student, name: str) -> None:
    testing.check_laws(student, {name: EXAMPLES[name]})


@pytest.mark.parametrize("name", ["residual-cnn", "vit"])
def test_the_laws_hold_for_trained_models(name: str) -> None:
    testing.check_laws(Student(keep=0, width=0.5), {name: load(name)})


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "residual-cnn", "vit"])
def test_half_as_wide_is_much_smaller_and_keeps_its_signature(name: str) -> None:
    teacher = load(name)
    student, context = testing.apply(Student(width=0.5), teacher)
    assert context.done
    assert (student.inputs, student.outputs) == (teacher.inputs, teacher.outputs)
    assert count_parameters(student)[0] < 0.6 * count_parameters(teacher)[0]
    feed = {"image": np.zeros((2, 1, 28, 28), np.float32)}
    logits = runtime.session(student, threads=1).run(feed)["logits"]
    assert logits.shape == (2, 10)


def test_the_plan_says_what_a_layer_saves() -> None:
    teacher = load("vit")
    first = sites_of(Student(), teacher)[0]
    block = sum(w.nbytes for w in teacher.weights() if w.name.startswith("blocks.1."))
    assert first.where == "/blocks.1/Add_1_output_0"
    # Beside the layer's weights, exporters give each layer constants of its own.
    assert block <= first.savings.bytes < 1.01 * block
    tokens, width, hidden = 25, 64, 192
    linear = tokens * (4 * width * width + 2 * width * hidden)
    # Made-up samples come two at a time.
    assert first.savings.macs == 2 * (linear + 2 * tokens * tokens * width)


def test_the_plan_says_what_thinner_layers_save() -> None:
    found = {s.where: s for s in sites_of(Student(width=0.5), load("lenet-5"))}
    # Half of 20, 50 and 500, to the nearest multiple of 8.
    assert found["conv1.weight"].how() == {"channels": 20, "kept": 8}
    assert found["conv2.weight"].how() == {"channels": 50, "kept": 24}
    assert found["fc1.weight"].how() == {"channels": 500, "kept": 248}
    assert all(s.savings.bytes > 0 < s.savings.macs for s in found.values())


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({}, [0, 2]),
        ({"keep": 0.5}, [0, 2]),
        ({"keep": 1 / 3}, [0, 3]),
        ({"keep": 0.333}, [0, 3]),
        ({"keep": 0.75}, [0, 1, 2]),
        ({"keep": 0.25}, [0]),
        ({"keep": 0}, []),
        ({"choose": "first"}, [0, 1]),
        ({"choose": "last"}, [2, 3]),
        ({"keep": 1 / 3, "choose": "last"}, [2, 3]),
        ({"skip": ("/blocks.1/*",)}, [0, 1, 2]),
        ({"only": ("/blocks.1/*",)}, [0, 2, 3]),
    ],
)
def test_which_layers_stay(options: dict[str, Any], stay: list[int]) -> None:
    student, _ = testing.apply(Student(**options), load("vit"))
    names = {weight.name for weight in student.weights()}
    found = [at for at in range(4) if f"blocks.{at}.fc1.weight" in names]
    assert found == stay


def test_what_stays_has_the_teachers_weights() -> None:
    teacher = load("vit")
    student, _ = testing.apply(Student(), teacher)
    for at in (0, 2):
        name = f"blocks.{at}.fc1.weight"
        np.testing.assert_array_equal(
            student.weight(name).read(), teacher.weight(name).read()
        )


def test_a_fresh_student_is_drawn_from_the_seed() -> None:
    fresh = Student(keep=1, inherit=False)
    one, _ = testing.apply(fresh, load("lenet-5"), seed=1)
    two, _ = testing.apply(fresh, load("lenet-5"), seed=2)
    again, _ = testing.apply(fresh, load("lenet-5"), seed=1)
    assert one.to_bytes() == again.to_bytes()
    drawn = one.weight("fc1.weight").read()
    assert not np.array_equal(drawn, two.weight("fc1.weight").read())
    # 400,000 draws: 800 inputs give a deviation of 0.05.
    assert drawn.std() == pytest.approx(0.05, rel=0.01)
    assert not one.weight("fc1.bias").read().any()


def test_channels_that_a_norm_silences_go_first() -> None:
    model = load("residual-cnn")
    scale = model.weight("mix.norm.weight")
    values = scale.read().copy()
    values[:64] = 0
    model.set_weight(scale, values)
    student, _ = testing.apply(Student(keep=1, width=0.5), model)
    assert (student.weight("mix.norm.weight").read() != 0).all()


def test_a_weaker_site_keeps_more_channels() -> None:
    student, model = Student(width=0.5), load("vit")
    sites = {site.where: site for site in sites_of(student, model)}
    hidden = student.weaken(sites["blocks.0.fc1.weight"], 0.5)
    assert hidden is not None
    assert hidden.how() == {"channels": 192, "kept": 144}
    listed = sites["blocks.0.fc1.weight"]
    assert 0 < hidden.savings.bytes < listed.savings.bytes
    heads = student.weaken(sites["blocks.0.attention.query.weight"], 0.5)
    assert heads is not None
    assert heads.how()["kept"] == 3
    assert student.weaken(sites["blocks.0.fc1.weight"], 0.01) is None
    assert student.weaken(sites["/blocks.1/Add_1_output_0"], 0.5) is None
    student.rewrite_all(model, [hidden, heads], laws.context_of(model, 0))
    assert model.weight("blocks.0.fc1.weight").shape == (64, 144)
    assert model.weight("blocks.0.attention.query.weight").shape == (64, 48)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": -0.1},
        {"keep": 1.5},
        {"keep": 2},
        {"keep": 2.5},
        {"keep": float("nan")},
        {"width": 0},
        {"width": 1.1},
        {"width": float("nan")},
        {"round_to": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Student(**options)


def test_every_kth_block_is_answered_with_the_share() -> None:
    with pytest.raises(UsageError, match="for one block in 3 write keep="):
        Student(keep=3)


def test_nothing_to_do_is_said() -> None:
    _, context = testing.apply(Student(keep=1), load("lenet-5"))
    assert not context.done
    assert ("student", "keep=1 and width=1 leave everything as it is") in context.skips


def digits(count: int) -> tuple[dict[str, Array], Array]:
    with np.load(MODELS / "mnist.npz") as data:
        images = data["train_x"][:count, None].astype(np.float32) / 255
        return {"image": images}, data["test_x"][:1000, None].astype(np.float32) / 255


def agreement(one: Model, two: Model, images: Array) -> float:
    answers = [
        runtime.session(model, threads=1).run({"image": images})["logits"].argmax(1)
        for model in (one, two)
    ]
    return float((answers[0] == answers[1]).mean())


@pytest.mark.slow
def test_a_student_learns_from_the_model_it_was_made_of() -> None:
    data, images = digits(1500)
    teacher = load("lenet-5")
    student, _ = testing.apply(Student(width=0.25), teacher)
    result = shrink(
        teacher,
        "student:width=0.25,distill:epochs=4",
        data=data,
        on_breach="keep",
        threads=1,
        measure_latency=False,
        measure_memory=False,
    )
    before = agreement(teacher, student, images)
    after = agreement(teacher, result.model, images)
    assert after > 0.9
    assert after > before + 0.05
    assert result.model.weight("conv1.weight").shape == (8, 1, 5, 5)


def test_what_it_makes_is_an_ordinary_file(tmp_path: Path) -> None:
    student, _ = testing.apply(Student(width=0.5), load("vit"))
    student.save(tmp_path / "student.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "student.onnx"), full_check=True)


def test_blocks_that_go_take_weights_with_them_that_were_inputs() -> None:
    model = perceptron(16, 16, 16, 16, 4)
    given = [t.name for t in model.graph.inputs]
    for weight in list(model.weights()):
        model.graph.inputs.append(weight.constant)
    student, _ = testing.apply(Student(keep=0.34), model)
    left = {weight.name for weight in student.weights()}
    assert count_parameters(student) < count_parameters(model)
    assert {t.name for t in student.graph.inputs} == left | set(given)
