"""A pass that damages is judged after the passes that repair it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxshrink import (
    Budget,
    Context,
    Model,
    Pass,
    PassManager,
    Pipeline,
    Promise,
    PromiseError,
    Samples,
    Savings,
    Site,
    SitePass,
    Splits,
)
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.manager import OnBreach
from onnxshrink.search.backoff import Plan, blend, nothing

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
one (float[N,4] x) => (float[N,4] logits) { logits = MatMul(x, w1) }
"""


def classifier() -> Model:
    """Return a model of four classes: the class is the largest input."""
    proto = parser.parse_model(TEXT)
    one = np.eye(4, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(one, "w1"))
    return Model.load(proto)


def manager(
    *passes: Pass, on_breach: OnBreach = "back-off", budget: Budget | None = None
) -> PassManager:
    labels = np.arange(400) % 4
    noise = 0.1 * np.random.default_rng(0).normal(size=(400, 4))
    samples = {"x": (np.eye(4)[labels] + noise).astype(np.float32), "labels": labels}
    return PassManager(
        Pipeline(passes),
        splits=Splits.build(classifier(), samples),
        budget=budget or Budget(max_drop=1.0),
        on_breach=on_breach,
        jobs=1,
        measure_latency=False,
        measure_memory=False,
    )


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiply ``w1``: the class stays, the outputs do not."""

    name: ClassVar[str] = "test-scale"
    promise: ClassVar[Promise] = Promise.CLOSE

    def apply(self, model: Model, ctx: Context) -> None:
        model.set_weight("w1", model.weight("w1").read() * np.float32(2))


@dataclass(frozen=True, kw_only=True)
class Liar(Scale):
    """Promises the same outputs and breaks that."""

    name: ClassVar[str] = "test-liar"
    promise: ClassVar[Promise] = Promise.SAME


@dataclass(frozen=True, kw_only=True)
class Tidy(Pass):
    """Give the only node a name, which changes no output."""

    name: ClassVar[str] = "test-tidy"
    promise: ClassVar[Promise] = Promise.SAME

    def apply(self, model: Model, ctx: Context) -> None:
        model.graph.nodes[0].name = "tidied"
        ctx.did("graph", "tidied")


@dataclass(frozen=True, kw_only=True)
class Swap(SitePass):
    """Rotate the columns of ``w1``, all or nothing."""

    name: ClassVar[str] = "test-swap"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        return [Site("w1", "MatMul")]

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        one = np.eye(4, dtype=np.float32)
        model.set_weight("w1", np.roll(one, 1, axis=1))


@dataclass(frozen=True, kw_only=True)
class Mend(Pass):
    """Take back the rotation of ``w1`` if it is not turned by more than it can."""

    name: ClassVar[str] = "test-mend"
    promise: ClassVar[Promise] = Promise.CLOSE
    repairs: ClassVar[bool] = True
    most: float = 1.0

    def apply(self, model: Model, ctx: Context) -> None:
        values = model.weight("w1").read()
        turned = float(1 - np.diag(values).mean())
        if 0.05 < turned <= self.most:
            model.set_weight("w1", np.eye(4, dtype=np.float32))
            ctx.did("w1", f"mended {turned:.2f}")


@dataclass(frozen=True, kw_only=True)
class Half(Mend):
    """Take back half of the rotation of ``w1``."""

    name: ClassVar[str] = "test-half"

    def apply(self, model: Model, ctx: Context) -> None:
        values = model.weight("w1").read()
        model.set_weight("w1", (values + np.eye(4, dtype=np.float32)) / 2)
        ctx.did("w1", f"half of {float(1 - np.diag(values).mean()):.2f}")


@dataclass(frozen=True, kw_only=True)
class Spoil(Mend):
    """Means to repair and makes everything worse."""

    name: ClassVar[str] = "test-spoil"

    def apply(self, model: Model, ctx: Context) -> None:
        model.set_weight("w1", 9 * model.weight("w1").read())


@dataclass(frozen=True, kw_only=True)
class Turned(Site):
    """How far ``w1`` is turned."""

    turn: float


@dataclass(frozen=True, kw_only=True)
class Turn(SitePass):
    """Mix ``w1`` with its rotation: nothing at strength 0, all of it at 1."""

    name: ClassVar[str] = "test-turn"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        return [Turned("w1", "Gemm", Savings(bytes=100), turn=1.0)]

    def weaken(self, site: Site, strength: float) -> Site | None:
        savings = Savings(bytes=round(100 * strength))
        return Turned("w1", "Gemm", savings, turn=strength)

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        assert isinstance(site, Turned)
        turn = np.float32(site.turn)
        one = np.eye(4, dtype=np.float32)
        model.set_weight("w1", one * (1 - turn) + np.roll(one, 1, axis=1) * turn)
        ctx.did("w1", f"turned {turn:.2f}")


@dataclass(frozen=True, kw_only=True)
class Student(Swap):
    """Keeps nothing but inputs and outputs."""

    name: ClassVar[str] = "test-student"
    promise: ClassVar[Promise] = Promise.SIGNATURE

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        model.set_weight("w1", np.roll(np.eye(4, dtype=np.float32), 2, axis=1))


@pytest.mark.parametrize("on_breach", ["back-off", "rollback", "abort", "keep"])
def test_damage_that_is_repaired_is_kept_in_full(on_breach: OnBreach) -> None:
    model = classifier()

    result = manager(Turn(), Mend(), on_breach=on_breach).run(model)

    turn, mend = result.report.steps
    assert turn.accepted
    assert mend.accepted
    assert turn.did == (("w1", "turned 1.00"),)
    assert mend.did == (("w1", "mended 1.00"),)
    assert turn.left_out == ()
    if on_breach != "keep":
        assert turn.reason.startswith("repaired by test-mend: top1 went from")


def test_damage_beyond_repair_is_weakened_until_it_can_be_repaired() -> None:
    model = classifier()

    result = manager(Turn(), Mend(most=0.8)).run(model)

    turn, mend = result.report.steps
    strength = float(turn.did[0][1].split()[1])
    assert 0.5 < strength <= 0.8  # alone, the classes change from one half on
    assert mend.did == (("w1", f"mended {strength:.2f}"),)
    assert turn.left_out[0][0] == "w1"


def test_a_weaker_form_that_is_repaired_is_tried_stronger_once_more() -> None:
    model = classifier()

    alone = manager(Turn()).run(model).report.steps[0]
    turn, mend = manager(Turn(), Mend(most=0.9)).run(model).report.steps

    # Halfway from what holds alone to 1 is repaired, and then three quarters of it.
    least, most = (float(step.did[0][1].split()[1]) for step in (alone, turn))
    assert most == pytest.approx(least + 0.75 * (1 - least), abs=0.006)
    assert mend.did == (("w1", f"mended {most:.2f}"),)


def test_damage_that_nothing_repairs_is_weakened_as_if_alone() -> None:
    model = classifier()

    alone = manager(Turn()).run(model).report.steps[0]
    turn, mend = manager(Turn(), Mend(most=0.1)).run(model).report.steps

    assert turn.did == alone.did
    assert turn.verdict is not None
    assert turn.verdict.ok
    assert mend.accepted
    assert mend.did == ()


def test_sites_that_cannot_be_weakened_come_back_where_repair_allows() -> None:
    model = classifier()

    swap, mend = manager(Swap(), Mend()).run(model).report.steps

    assert swap.accepted
    assert swap.left_out == ()
    assert mend.did == (("w1", "mended 1.00"),)


def test_two_passes_that_damage_wait_for_one_that_repairs() -> None:
    model = classifier()

    report = manager(Turn(), Student(), Mend()).run(model).report

    assert [step.accepted for step in report.steps] == [True, True, True]
    assert all("repaired by" in step.reason for step in report.steps[:2])


def test_a_repair_that_makes_it_worse_is_rolled_back_and_the_next_one_tried() -> None:
    model = classifier()

    report = manager(Turn(), Spoil(), Mend()).run(model).report

    assert [step.accepted for step in report.steps] == [True, False, True]


def test_a_liar_between_damage_and_repair_is_not_kept() -> None:
    model = classifier()

    report = manager(Turn(), Liar(), Mend()).run(model).report

    assert [step.accepted for step in report.steps] == [True, False, True]


def test_a_repair_is_waited_for_beyond_a_pass_that_changes_no_output() -> None:
    model = classifier()

    report = manager(Turn(), Tidy(), Mend()).run(model).report

    assert [step.accepted for step in report.steps] == [True, True, True]
    assert report.steps[0].reason.startswith("repaired by test-mend")
    assert report.steps[0].left_out == ()


def test_what_no_repair_mends_gives_way_beyond_a_pass_that_changes_no_output() -> None:
    model = classifier()

    report = manager(Turn(), Tidy(), Mend(most=0.8)).run(model).report

    turn, tidy, mend = report.steps
    assert tidy.accepted
    strength = float(turn.did[0][1].split()[1])
    assert 0.5 < strength <= 0.8
    assert mend.did == (("w1", f"mended {strength:.2f}"),)


def test_two_repairs_with_a_pass_between_that_changes_no_output_are_one_chain() -> None:
    model = classifier()

    report = manager(Turn(), Half(), Tidy(), Mend(most=0.6)).run(model).report

    turn, half, tidy, mend = report.steps
    assert turn.did == (("w1", "turned 1.00"),)
    assert half.did == (("w1", "half of 1.00"),)
    assert tidy.accepted
    assert mend.did == (("w1", "mended 0.50"),)


def test_without_repair_the_pair_is_rolled_back() -> None:
    model = classifier()

    result = manager(Turn(), Mend(most=0.1), Scale(), on_breach="rollback").run(model)

    assert [step.accepted for step in result.report.steps] == [False, True, True]
    assert result.report.steps[0].reason.startswith("rolled back: top1")


def test_abort_names_both_steps(tmp_path: Path) -> None:
    model = classifier()

    with pytest.raises(PromiseError, match=r"step 1 \(test-turn\).*nothing was"):
        manager(Turn(), Mend(most=0.1), on_breach="abort").run(
            model, tmp_path / "out.onnx"
        )

    assert list(tmp_path.iterdir()) == []


def test_a_student_that_nothing_teaches_is_rolled_back() -> None:
    model = classifier()

    step = manager(Student()).run(model).report.steps[0]

    assert not step.accepted


def test_the_same_pair_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        model = classifier()
        manager(Turn(), Mend(most=0.8)).run(model, folder / "out.onnx")
        assert [file.name for file in folder.iterdir()] == ["out.onnx"]
        written.append((folder / "out.onnx").read_bytes())

    assert written[0] == written[1]


@dataclass(frozen=True, kw_only=True)
class Studious(Turn):
    """Studies ``w1`` before it turns it."""

    name: ClassVar[str] = "test-studious"

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        def study() -> str:
            STUDIES.append("w1")
            return "as it should be"

        assert ctx.remember((self.name, fingerprint(model)), study) == "as it should be"
        return super().sites(model, ctx)


STUDIES: list[str] = []


def test_what_a_pass_works_out_is_there_for_all_attempts_of_its_step() -> None:
    STUDIES.clear()
    result = manager(Studious(), Mend(most=0.8), Studious()).run(classifier())

    # The first is tried in full, backed off, and weakened before repairs; the last is
    # a step of its own.
    first, _, last = result.report.steps
    assert first.left_out
    assert first.accepted
    assert len(STUDIES) == 2, last.reason


def test_a_blend_gives_back_the_least_damaging_sites_first() -> None:
    sites = tuple(Site(f"w{i}", "Gemm") for i in range(5))
    plan = Plan(sites, (0.0, 1.0, 0.0, 0.0, 0.0), order=(2, 0, 3, 4, 1))

    half = blend(Swap(), plan, 0.5)

    assert half.strengths == (0.0, 1.0, 0.0, 1.0, 1.0)
    assert blend(Swap(), plan, 0.0) == plan
    assert blend(Swap(), plan, 1.0).strengths == (1.0,) * 5
    assert blend(Swap(), nothing(sites), 0.0).strengths == (0.0,) * 5


def test_a_blend_of_strengths_lies_between() -> None:
    plan = Plan((Site("w1", "Gemm"),), (0.4,), (0,))

    assert blend(Turn(), plan, 0.5).strengths == pytest.approx((0.7,))


@dataclass(frozen=True, kw_only=True)
class Teach(Pass):
    """Teach another order of the classes than the model knew."""

    name: ClassVar[str] = "test-teach"
    promise: ClassVar[Promise] = Promise.CLOSE
    turn: float = 1.0

    def apply(self, model: Model, ctx: Context) -> None:
        Turn().rewrite(model, Turned("w1", "MatMul", turn=self.turn), ctx)

    def answers(
        self, model: Model, samples: Samples, ctx: Context
    ) -> Mapping[str, Any] | None:
        x = samples.read(np.arange(len(samples)))["x"]
        return {"logits": np.roll(x, 1, axis=1)}


def test_what_another_teacher_taught_is_accepted_and_holds_for_what_follows() -> None:
    model = classifier()

    report = manager(Teach(), Scale(), Turn()).run(model).report

    assert [step.accepted for step in report.steps] == [True, True, True]
    assert report.steps[0].reason.startswith("nearer to what was taught: ")
    assert report.steps[2].verdict is not None
    assert report.steps[2].verdict.quality()["agreement"] == 1
    assert any("another teacher" in note for note in report.notes)


def test_what_moves_away_from_the_teacher_is_rolled_back() -> None:
    model = classifier()

    passes = Teach(turn=1.0), Teach(turn=0.0)
    budget = Budget(min_agreement=0.98)

    report = manager(*passes, budget=budget).run(model).report

    assert [step.accepted for step in report.steps] == [True, False]


@dataclass(frozen=True, kw_only=True)
class Swell(Turn):
    """Do damage and make the file larger."""

    name: ClassVar[str] = "test-swell"

    def weaken(self, site: Site, strength: float) -> Site | None:
        return None if strength < 1 else site

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        super().rewrite(model, site, ctx)
        model.metadata["ballast"] = "x" * 10_000


@pytest.mark.parametrize("before", [(), (Turn(),)])
def test_a_file_that_grew_does_not_wait_for_repair(before: tuple[Pass, ...]) -> None:
    model = classifier()

    report = manager(*before, Swell(), Mend()).run(model).report

    accepted = [step.accepted for step in report.steps]
    assert accepted == [True] * len(before) + [False, True]
