"""The manager holds passes to promises and budgets, backs off and resumes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import parser
from rich.console import Console

from onnxshrink import (
    Budget,
    Context,
    Model,
    ModelError,
    OutputError,
    Pass,
    PassManager,
    Pipeline,
    Promise,
    PromiseError,
    Savings,
    Site,
    SitePass,
    Splits,
    UsageError,
    runtime,
    shrink,
)
from onnxshrink.manager import OnBreach
from onnxshrink.validation import Validator

QUICK: dict[str, Any] = {"measure_latency": False, "measure_memory": False, "jobs": 1}

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
two (float[N,4] x) => (float[N,4] logits)
{
  hidden = Gemm(x, w1)
  logits = Gemm(hidden, w2)
}
"""


def classifier() -> Model:
    """Four classes; the class is the largest input, and 1 % of a neighbour leaks in."""
    proto = parser.parse_model(TEXT)
    leak = np.eye(4, dtype=np.float32) + 0.01 * np.eye(4, k=1, dtype=np.float32)
    for name in ("w1", "w2"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(leak, name))
    return Model.load(proto)


def samples(count: int = 400) -> dict[str, Any]:
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "labels": x.argmax(axis=1)}


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiply ``w1``: the class stays, the outputs do not."""

    name: ClassVar[str] = "test-scale"
    promise: ClassVar[Promise] = Promise.CLOSE
    factor: float = 2.0

    def apply(self, model: Model, ctx: Context) -> None:
        model.set_weight("w1", model.weight("w1").read() * np.float32(self.factor))
        ctx.did("w1", f"times {self.factor}")


@dataclass(frozen=True, kw_only=True)
class Liar(Scale):
    """Promises the same outputs and breaks that."""

    name: ClassVar[str] = "test-liar"
    promise: ClassVar[Promise] = Promise.SAME


@dataclass(frozen=True, kw_only=True)
class Broken(Pass):
    """Fails after it has changed something."""

    name: ClassVar[str] = "test-broken"
    promise: ClassVar[Promise] = Promise.CLOSE

    def apply(self, model: Model, ctx: Context) -> None:
        Scale().apply(model, ctx)
        raise ZeroDivisionError("a bug")


@dataclass(frozen=True, kw_only=True)
class Swap(SitePass):
    """Rotate the columns of ``w1``, which ruins it, and tidy ``w2``, which does not."""

    name: ClassVar[str] = "test-swap"
    promise: ClassVar[Promise] = Promise.CLOSE

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        ctx.skipped("bias", "there is none")
        return [Site("w1", "Gemm"), Site("w2", "Gemm")]

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        values = model.weight(site.where).read()
        new = np.roll(values, 1, axis=1) if site.where == "w1" else np.eye(4)
        model.set_weight(site.where, new.astype(np.float32))
        ctx.did(site.where, "swapped")


def manager(*passes: Pass, model: Model, **options: Any) -> PassManager:
    options.setdefault("budget", Budget(max_drop=1.0))
    options.setdefault("splits", Splits.build(model, samples()))
    return PassManager(Pipeline(passes), **QUICK, **options)


def test_the_model_given_is_not_changed() -> None:
    model = classifier()
    before = model.to_bytes()

    result = manager(Scale(), model=model).run(model)

    assert model.to_bytes() == before
    assert result.model.weight("w1").read()[0, 0] == 2
    assert result.report.steps[0].accepted


@pytest.mark.parametrize("on_breach", ["back-off", "rollback", "keep"])
def test_a_pass_that_promises_the_same_and_lies_is_stopped(on_breach: OnBreach) -> None:
    model = classifier()

    result = manager(Liar(), model=model, on_breach=on_breach).run(model)

    step = result.report.steps[0]
    assert not step.accepted
    assert "same" in step.reason.lower()
    assert result.model.weight("w1").read()[0, 0] == 1


def test_back_off_leaves_out_the_damaging_site_and_names_it() -> None:
    model = classifier()

    result = manager(Swap(), model=model).run(model)

    step = result.report.steps[0]
    assert step.accepted
    assert step.left_out == (("w1", "left out"),)
    assert step.did == (("w2", "swapped"),)
    assert step.skipped == (("bias", "there is none"),)


def test_rollback_goes_on_without_the_pass() -> None:
    model = classifier()

    result = manager(Swap(), Scale(), model=model, on_breach="rollback").run(model)

    assert [step.accepted for step in result.report.steps] == [False, True]
    assert result.report.steps[0].did == ()


def test_abort_writes_nothing(tmp_path: Path) -> None:
    model = classifier()

    with pytest.raises(PromiseError, match="step 1"):
        manager(Swap(), model=model, on_breach="abort").run(model, tmp_path / "o.onnx")

    assert list(tmp_path.iterdir()) == []


def test_keep_keeps_and_says_so() -> None:
    model = classifier()

    result = manager(Swap(), model=model, on_breach="keep").run(model)

    step = result.report.steps[0]
    assert step.accepted
    assert step.reason.startswith("kept although")


def test_an_exception_in_a_pass_names_the_step_and_keeps_its_cause(
    tmp_path: Path,
) -> None:
    model = classifier()

    with pytest.raises(PromiseError, match=r"step 2 \(test-broken\).*w1") as caught:
        manager(Scale(), Broken(), model=model).run(model, tmp_path / "o.onnx")

    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_never_kept() -> None:
    model = classifier()

    result = manager(
        Scale(factor=float("3e38")), Scale(factor=10), model=model, on_breach="keep"
    ).run(model)

    assert [step.accepted for step in result.report.steps] == [False, True]


def test_figures_are_those_of_the_written_file(tmp_path: Path) -> None:
    model = classifier()
    output = tmp_path / "out.onnx"

    result = manager(Scale(), model=model).run(model, output)

    assert result.files == (output,)
    assert result.report.final.file_bytes == output.stat().st_size
    assert list(tmp_path.iterdir()) == [output]
    assert Model.load(output).metadata["onnxshrink.pipeline"] == "test-scale"


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        model = classifier()
        manager(Swap(), Scale(), model=model).run(model, folder / "out.onnx")
        written.append((folder / "out.onnx").read_bytes())

    assert written[0] == written[1]


def test_results_do_not_depend_on_the_executor() -> None:
    class Counting(ThreadPoolExecutor):
        calls = 0

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return super().submit(*args, **kwargs)

    @dataclass(frozen=True, kw_only=True)
    class Mapped(Scale):
        """Ask the context to map something."""

        name: ClassVar[str] = "test-mapped"

        def apply(self, model: Model, ctx: Context) -> None:
            assert ctx.map(abs, range(-3, 1)) == [3, 2, 1, 0]

    model = classifier()
    pool: Executor
    with Counting(2) as pool:
        manager(Mapped(), model=model, executor=pool).run(model)
    assert Counting.calls == 4
    manager(Mapped(), model=model, executor=None).run(model)


def test_without_data_it_is_labelled_a_smoke_test() -> None:
    result = shrink(classifier(), Pipeline((Scale(),)), **QUICK)

    assert any("smoke test" in note for note in result.report.notes)


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    classifier().save(path)
    before = path.read_bytes()

    with pytest.raises(OutputError, match="input itself"):
        shrink(path, Pipeline((Scale(),)), output=path)

    assert path.read_bytes() == before


def test_resume_without_output_or_state_is_refused(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(UsageError, match="output"):
        manager(Scale(), model=model).run(model, resume=True)


def test_an_unknown_way_out_is_refused() -> None:
    with pytest.raises(UsageError, match="back-off, rollback, abort or keep"):
        PassManager(Pipeline(()), on_breach="panic")  # type: ignore[arg-type]


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from test_manager import Scale, Swap, classifier, manager
from pathlib import Path

class Killed(Scale):
    def apply(self, model, ctx):
        if Path(sys.argv[2]).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        super().apply(model, ctx)

class Counted(Scale):
    def apply(self, model, ctx):
        with open(sys.argv[1] + ".log", "a") as log:
            log.write("x")
        super().apply(model, ctx)

model = classifier()
run = manager(Counted(), Killed(factor=3.0), model=model)
run.run(model, sys.argv[1], resume=not Path(sys.argv[2]).exists())
"""


def test_a_killed_run_resumes_after_the_last_accepted_pass(tmp_path: Path) -> None:
    output, trigger = tmp_path / "out.onnx", tmp_path / "kill"
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(output), str(trigger)]
    command.append(str(Path(__file__).parent))
    trigger.touch()

    killed = subprocess.run(command, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    trigger.unlink()
    subprocess.run(command, check=True, env=os.environ)

    assert (tmp_path / "out.onnx.log").read_text() == "x"
    assert Model.load(output).weight("w1").read()[0, 0] == 6


def test_a_resume_that_does_not_fit_keeps_the_interrupted_state(tmp_path: Path) -> None:
    class Interrupted(Scale):
        def apply(self, model: Model, ctx: Context) -> None:
            raise KeyboardInterrupt

    model, output = classifier(), tmp_path / "out.onnx"
    state = tmp_path / ".out.onnx.onnxshrink" / "state.json"
    with pytest.raises(KeyboardInterrupt):
        manager(Scale(), Interrupted(), model=model).run(model, output)
    before = state.read_bytes()

    with pytest.raises(UsageError, match=r"another one \(other passes\)"):
        manager(Scale(factor=5.0), model=model).run(model, output, resume=True)

    assert state.read_bytes() == before


@dataclass(frozen=True, kw_only=True)
class FailsWeakened(Swap):
    """Fails at a single site, as back-off asks for."""

    name: ClassVar[str] = "test-fails"

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        if len(sites) < 2:
            raise ZeroDivisionError("a bug")
        super().rewrite_all(model, sites, ctx)


def test_a_bug_that_shows_while_a_pass_backs_off_names_the_step() -> None:
    model = classifier()
    with pytest.raises(PromiseError, match=r"step 2 \(test-fails\) failed.*Zero"):
        manager(Scale(), FailsWeakened(), model=model).run(model)


def test_a_plan_that_fails_names_the_step() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needs(Swap):
        name: ClassVar[str] = "test-needs"

        def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
            ctx.need_data("to see what layers read")
            return ()

    model = classifier()
    without = {"splits": Splits.build(model), "budget": Budget()}
    made = manager(Scale(), Needs(), model=model, **without)
    wanted = r"step 2 \(test-needs\): calibration samples are needed to see.*--data"
    with pytest.raises(UsageError, match=wanted):
        made.plan(model)
    with pytest.raises(UsageError, match=wanted):
        made.run(model)


def test_a_site_pass_whose_sites_share_a_name_is_refused() -> None:
    class Twice(Swap):
        def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
            return [Site("w1", "Gemm"), Site("w1", "Gemm")]

    model = classifier()
    with pytest.raises(PromiseError, match="same site twice"):
        manager(Twice(), model=model).run(model)


def test_a_model_that_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(ModelError):
        shrink(b"no model", "fold")


@dataclass(frozen=True, kw_only=True)
class Patient(Scale):
    """Leave a mark in the step's folder, and fail the first time."""

    name: ClassVar[str] = "patient"

    def apply(self, model: Model, ctx: Context) -> None:
        assert ctx.folder is not None
        mark = ctx.folder / "mark"
        ctx.did("here", "found it" if mark.exists() else "new")
        if not mark.exists():
            mark.touch()
            raise KeyboardInterrupt
        super().apply(model, ctx)


def test_a_step_finds_its_folder_again_after_a_resume(tmp_path: Path) -> None:
    model, output = classifier(), tmp_path / "out.onnx"
    with pytest.raises(KeyboardInterrupt):
        manager(Patient(), model=model).run(model, output)
    result = manager(Patient(), model=model).run(model, output, resume=True)
    assert ("here", "found it") in result.report.steps[0].did
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_step_without_an_output_has_no_folder() -> None:
    model = classifier()
    with pytest.raises(PromiseError, match="AssertionError"):
        manager(Patient(), model=model).run(model)


def test_labels_that_fit_no_output_are_said_to_take_no_part() -> None:
    model = classifier()
    odd = {**samples(), "labels": np.full(400, 99)}

    result = manager(
        Scale(), model=model, budget=None, splits=Splits.build(model, odd)
    ).run(model)

    assert any("labels take no part" in note for note in result.report.notes)


# --- what the budget asks for -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timed(SitePass):
    """Shrink one output of each layer; one of the two saves no time."""

    name: ClassVar[str] = "test-timed"
    promise: ClassVar[Promise] = Promise.CLOSE
    seen: ClassVar[list[bool]] = []

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        self.seen.append(ctx.costs.is_measured)
        return [
            Site("w1", "Gemm", Savings(bytes=10, seconds=1e-3)),
            Site("w2", "Gemm", Savings(bytes=20, seconds=0.0)),
        ]

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        # Of four outputs, one is wrong by 0.6 or by 0.5: 10.5 or 12 dB, both 8.2 dB.
        column, factor = {"w1": (0, 0.4), "w2": (1, 0.5)}[site.where]
        values = model.weight(site.where).read().copy()
        values[:, column] *= np.float32(factor)
        model.set_weight(site.where, values)
        ctx.did(site.where, f"times {factor}")


@pytest.mark.parametrize("latency", [None, 1000.0])
def test_a_latency_budget_gives_up_the_site_that_saves_no_time(
    latency: float | None,
) -> None:
    model = classifier()
    budget = Budget(min_sqnr=9.5, max_latency_ratio=latency)
    splits = Splits.build(model, samples(4000))
    result = manager(Timed(), model=model, budget=budget, splits=splits).run(model)

    (step,) = result.report.steps
    assert step.accepted
    assert dict(step.left_out) == {"w2" if latency else "w1": "left out"}
    assert Timed.seen[-1] == (latency is not None)


def test_a_model_that_is_to_be_faster_is_so_after_the_last_pass_that_changes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As it came 1.0; the second pass makes it faster, the first could not.
    def ratio(self: Validator, session: runtime.Session) -> float:
        factor = session.run({"x": np.eye(4, dtype=np.float32)})["logits"][0, 0]
        return 0.8 if factor > 3 else 1.04

    monkeypatch.setattr(Validator, "_latency_ratio", ratio)
    model = classifier()
    budget = Budget(max_drop=1.0, max_latency_ratio=0.9)

    result = manager(Scale(), Scale(), model=model, budget=budget).run(model)
    assert [step.accepted for step in result.report.steps] == [True, True]
    # Alone, the first is the last, and is held to the budget.
    with pytest.raises(PromiseError, match=r"1\.04 of the reference's, more than 0\.9"):
        manager(Scale(), model=model, budget=budget, on_breach="abort").run(model)


HIDDEN = """
<ir_version: 8, opset_import: ["" : 17]>
hidden (float[N,8] x) => (float[N,8] y)
<int64[2] zeros = {0, 0}, int64[2] cut = {8, 8}, int64[2] axes = {0, 1}>
{
  half = Slice(w, zeros, cut, axes)
  turned = Transpose<perm = [1, 0]>(half)
  h = MatMul(x, turned)
  y = Relu(h)
}
"""


def _hidden() -> Model:
    proto = onnx.parser.parse_model(HIDDEN)
    values = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return Model.load(proto)


@pytest.mark.parametrize("passes", ["prune:sparsity=0.5", "lowrank:rank=2"])
def test_weights_behind_slice_and_transpose_are_found(passes: str) -> None:
    result = shrink(_hidden(), passes, budget=Budget(min_sqnr=-20))
    (step,) = result.report.steps
    folded = [what for where, what in step.did if where == "model"]
    assert folded == [
        "folded first: 4 nodes -> 2, since w: it reaches MatMul through Slice"
    ]
    assert len(step.did) > 1


GAIN = """
<ir_version: 8, opset_import: ["" : 17]>
gain (float[N,2] x, float gain = {2}) => (float[N,2] y)
<float[2,2] w = {1, 2, 3, 4}>
{ h = MatMul(x, w) y = Mul(h, gain) }
"""


@pytest.mark.parametrize("passes", ["fold", "quantize", "prune", "half", "lowrank"])
def test_an_input_with_a_default_stays_one(passes: str) -> None:
    result = shrink(onnx.parser.parse_model(GAIN), passes)
    assert [t.name for t in result.model.graph.inputs] == ["x", "gain"]
    assert not any("inputs any more" in note for note in result.report.notes)


def test_inputs_that_a_run_takes_away_are_named() -> None:
    result = shrink(onnx.parser.parse_model(GAIN), "fold:keep_defaults=false")
    assert "no inputs any more, with what was their default built in: gain" in (
        result.report.notes
    )


def few(count: int, **options: Any) -> Any:
    """Prune a classifier of three classes on so many samples."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> '
        "g (float[N, 8] x) => (float[N, 3] y) { h = MatMul(x, w) y = Softmax(h) }"
    )
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    x = rng.normal(size=(count, 8)).astype(np.float32)
    data = (
        {"x": x, "labels": (x @ weight).argmax(1)}
        if options.pop("labels", 0)
        else {"x": x}
    )
    return shrink(
        model,
        "prune:sparsity=0.2",
        data=data,
        measure_memory=False,
        measure_latency=False,
        **options,
    ).report


def test_few_samples_are_a_warning_in_the_last_lines() -> None:
    warnings = few(40).warnings
    assert any("only 11 samples calibrated" in line for line in warnings)
    assert any("16 evaluation samples cannot tell an agree" in w for w in warnings)
    warnings = few(40, labels=True, budget=Budget(max_drop=0.5)).warnings
    assert any(
        "cannot tell a drop of 0.5 points: one sample is 6.25" in w for w in warnings
    )
    assert few(400).warnings == ()
    console = io.StringIO()
    few(40).render(Console(file=console, width=200))
    *_, warning, last = console.getvalue().strip().splitlines()
    assert warning.startswith("warning: 16 evaluation samples")
    assert "smaller" in last


def test_a_run_that_gains_nothing_says_why_and_writes_nothing_bigger(
    tmp_path: Path,
) -> None:
    given = tmp_path / "given.onnx"
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, given)
    result = shrink(given, "student:keep=0.5", output=tmp_path / "out.onnx")
    (step,) = result.report.steps
    assert step.reason.startswith("nothing to do: there is no residual block")
    assert (tmp_path / "out.onnx").stat().st_size <= given.stat().st_size
    assert result.report.rows()[1][-1] == "nothing to do"
    assert "int8 would save about 7" in result.report.summary()
