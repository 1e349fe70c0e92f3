"""The command line: what it reads, prints, writes, and which exit code it leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from onnxshrink import cli, registry, runtime
from onnxshrink.cli.commands import joined_passes
from onnxshrink.manager import PassManager
from onnxshrink.measuring import measure

ROOT = Path(__file__).resolve().parents[2]
AS_ROOT = getattr(os, "geteuid", lambda: 1)() == 0
COMMAND = Path(sys.executable).with_name("onnxshrink")

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
tiny (float[N,4] x) => (float[N,3] y)
<float[4,3] w = {1, 0, 0, 0, 2, 0, 0, 0, 3, 1, 1, 1}, float[3] b = {0, 1, 0}>
{
  same = Identity(x)
  h = MatMul(same, w)
  y = Add(h, b)
}
"""


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def flat(text: str) -> str:
    return " ".join(text.split())


def text_model(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure neither latency nor memory: these tests look at neither."""
    monkeypatch.setattr(measure, "latencies", lambda one, two, *feeds: (0.1, 1.0))
    monkeypatch.setattr(runtime, "load_cost", lambda *args, **kwargs: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return text_model(TEXT, tmp_path / "tiny.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    x = random.standard_normal((40, 4)).astype(np.float32)
    np.savez(path, x=x, labels=random.integers(0, 3, 40))
    return path


# --- what is read -----------------------------------------------------------------


def test_help_names_every_option_of_the_bare_command_and_every_word() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    for option in [
        "--passes",
        "--recipe",
        "--output",
        "--data",
        "--labels",
        "--eval",
        "--metric",
        "--max-drop",
        "--min-agreement",
        "--min-sqnr",
        "--on-breach",
        "--storage",
        "--external",
        "--provider",
        "--threads",
        "--seed",
        "--jobs",
        "--report",
        "--plan",
        "--resume",
        "--quiet",
        "--verbose",
        "--shape",
    ]:
        assert option in shown.stdout
    for word in ("passes", "inspect", "compare", "teacher"):
        assert f"onnxshrink {word}" in shown.stdout


@pytest.mark.parametrize("word", ["passes", "inspect", "compare", "teacher"])
def test_every_word_has_examples_in_its_help(word: str) -> None:
    shown = run(word, "--help")
    assert shown.exit_code == 0
    assert f"Examples:\n  onnxshrink {word}" in shown.stdout


def test_no_arguments_show_the_help_as_a_usage_error() -> None:
    shown = run()
    assert shown.exit_code == 2
    assert "Usage: onnxshrink" in shown.stderr


def test_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"onnxshrink {version('onnxshrink')}\n"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("m --passes a b:c=1 d=2 -q", "m --passes a --passes b:c=1 --passes d=2 -q"),
        ("--passes a b m.onnx", "--passes a --passes b m.onnx"),
        ("--passes=a b m.onnx", "--passes=a --passes b m.onnx"),
        ("--passes a t=x.onnx m.onnx", "--passes a --passes t=x.onnx m.onnx"),
        ("--passes a -q m", "--passes a -q m"),
        ("--passes a -- b", "--passes a -- b"),
        ("m.onnx --passes", "m.onnx --passes"),
    ],
)
def test_words_after_passes_belong_to_it_until_an_option_or_a_model(
    given: str, read: str
) -> None:
    assert joined_passes(given.split()) == read.split()


@pytest.mark.parametrize(
    "args",
    [
        ["--no-such-option"],
        ["--seed", "-1"],
        ["--on-breach", "panic"],
        ["--storage", "zip"],
        ["--shape", "x"],
        ["--shape", "x=0x3"],
        ["--max-drop", "little"],
        ["--min-agreement", "nan"],
        ["--passes", "fold", "--recipe", "lossless"],
        ["-q", "-v"],
        ["second.onnx"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read_is_exit_code_2(
    args: list[str], model: Path
) -> None:
    shown = run(model, *args)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("Usage: onnxshrink [OPTIONS] MODEL\n")
    assert "Error: " in shown.stderr
    assert shown.stdout == ""


# --- errors -----------------------------------------------------------------------


def fails(*args: object, says: str, tmp_path: Path, code: int = 1) -> str:
    before = sorted(tmp_path.iterdir())
    shown = run(*args)
    assert shown.exit_code == code, shown.output
    assert re.search(says, flat(shown.stderr)), shown.stderr
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in shown.output
    assert shown.stdout == ""
    assert sorted(tmp_path.iterdir()) == before
    return shown.stderr


def test_an_unknown_pass_is_named_with_the_nearest(model: Path, tmp_path: Path) -> None:
    shown = fails(
        model,
        "--passes",
        "fold,prun:sparsity=0.5",
        says="no pass 'prun'.* Did you mean 'prune'",
        tmp_path=tmp_path,
        code=2,
    )
    assert "  fold,prun:sparsity=0.5\n       ^^^^" in shown


def test_an_unknown_option_of_a_pass_is_named_with_the_nearest(
    model: Path, tmp_path: Path
) -> None:
    says = "prune has no option sparsty; .* Did you mean 'sparsity'"
    fails(model, "--passes", "prune:sparsty=1", says=says, tmp_path=tmp_path, code=2)


def test_an_empty_pipeline_is_an_error(model: Path, tmp_path: Path) -> None:
    fails(model, "--passes", "", says="there is no pass to run", tmp_path=tmp_path)


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_what_cannot_name_a_model_is_an_error(name: str, tmp_path: Path) -> None:
    fails(name, says="names no file|is not a", tmp_path=tmp_path)


def test_an_unknown_recipe_is_named_with_the_nearest(
    model: Path, tmp_path: Path
) -> None:
    says = "no recipe 'losless'.* Did you mean 'lossless'"
    fails(model, "--recipe", "losless", says=says, tmp_path=tmp_path, code=2)


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    fails(tmp_path / "no.onnx", says="does not exist", tmp_path=tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x08\x08", b"PK\x03\x04 a zip", b"\xff" * 99]
)
def test_a_file_that_is_no_model_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    fails(path, says="bad.onnx", tmp_path=tmp_path)


def test_a_truncated_model_is_an_error(model: Path, tmp_path: Path) -> None:
    model.write_bytes(model.read_bytes()[:-7])
    fails(model, says="tiny.onnx", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--data", "missing.npz", "missing.npz"),
        ("--data", "tiny.onnx", "tiny.onnx"),
        ("--eval", "missing.npz", "missing.npz"),
        ("--labels", "y", "--data"),
        ("--shape", "z=2x4", "no input 'z'"),
        ("--shape", "x=2x5", "does not fit"),
        ("--provider", "CPUExecutionProvder", "Did you mean 'CPUExecutionProvider'"),
        ("--report", "run.pdf", ".json, .md, .html"),
        ("--report", "tiny.onnx/run.json", "cannot make the folder"),
        ("-o", "tiny.onnx/out.onnx", "cannot make the folder"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_and_nothing_is_written(
    option: str,
    value: str,
    says: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(model, option, value, says=re.escape(says), tmp_path=tmp_path)


def test_data_of_the_wrong_shape_is_an_error(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, x=np.zeros((10, 5), np.float32))
    fails(model, "--data", path, says="wrong.npz", tmp_path=tmp_path)


def test_the_input_is_never_overwritten(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    fails(model, "-o", model, says="never overwritten", tmp_path=tmp_path)
    assert model.read_bytes() == before


def test_a_report_never_replaces_a_model(model: Path, tmp_path: Path) -> None:
    path = model.rename(model.with_suffix(".json"))
    fails(path, "--report", path, says="it is a model", tmp_path=tmp_path)


@pytest.mark.skipif(AS_ROOT, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(model: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    fails(model, "-o", locked / "x.onnx", says="no permission", tmp_path=tmp_path)


@pytest.mark.skipif(AS_ROOT, reason="root may read everything")
def test_a_model_without_permission_is_an_error(model: Path, tmp_path: Path) -> None:
    model.chmod(0)
    fails(model, says="cannot read .*ermission", tmp_path=tmp_path)


def test_a_word_that_comes_too_late_is_explained(tmp_path: Path) -> None:
    fails("-q", "passes", says="onnxshrink passes", tmp_path=tmp_path)


def test_verbose_shows_what_each_changed_value_was(tmp_path: Path) -> None:
    file = text_model(
        """<ir_version: 8, opset_import: ["": 17]>
        thin (float[N,1] x) => (float[N,1] y)
        <float[1,4] w = {1, 9, 8, 1}, float[4,1] v = {1, 1, 1, 1}>
        { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }""",
        tmp_path / "thin.onnx",
    )
    arguments = (file, "--passes", "student:keep=1,width=0.5,round_to=1")
    arguments += ("--on-breach", "keep")
    shown = run(*arguments, "-v")
    assert shown.exit_code == 0, shown.stderr
    lines = [s for s in shown.stdout.splitlines() if s.startswith("lineage: ")]
    assert lines == [
        "lineage: w: was w, axis 1: 1-2",
        "lineage: v: was v, axis 0: 1-2",
        "lineage: h: was h, axis 1: 1-2",
        "lineage: r: was r, axis 1: 1-2",
    ]
    assert "lineage" not in run(*arguments).stdout


def test_a_bug_is_one_line_and_verbose_shows_where(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("wires crossed")

    monkeypatch.setattr(PassManager, "run", broken)
    shown = run(model)
    assert shown.exit_code == 1
    assert len(shown.stderr.splitlines()) == 1
    assert "RuntimeError: wires crossed; -v shows where" in shown.stderr
    shown = run(model, "-v")
    assert shown.exit_code == 1
    assert "Traceback" in shown.stderr


def test_an_interrupt_is_exit_code_130(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PassManager, "run", interrupted)
    shown = run(model)
    assert shown.exit_code == 130
    assert "interrupted" in shown.stderr
    assert list(tmp_path.iterdir()) == [model]


def test_an_interrupted_run_resumes_after_the_last_accepted_pass(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    args = [model, "--passes", "fold", "prune:sparsity=0.5,importance=magnitude"]
    args += ["--data", data, "--on-breach", "keep", "-o", tmp_path / "out.onnx"]
    prune = registry.get("prune")
    with monkeypatch.context() as context:
        context.setattr(prune, "sites", interrupted)
        shown = run(*args)
    assert shown.exit_code == 130
    assert "--resume" in shown.stderr
    assert not (tmp_path / "out.onnx").exists()
    shown = run(*args, "--resume")
    assert shown.exit_code == 0, shown.output
    assert not re.search("^fold: ", shown.stderr, re.MULTILINE)
    assert re.search("^prune: ", shown.stderr, re.MULTILINE)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tiny.onnx", "data.npz", "out.onnx"}


# --- the run ----------------------------------------------------------------------

REPORT = ["model", "onnxshrink", "pipeline", "seed", "baseline", "steps", "final"]
STEP = [
    *["pass", "options", "accepted", "reason", "seconds", "before", "after"],
    *["verdict", "did", "skipped"],
]
STATS = [
    *["file_bytes", "parameters", "nonzeros", "macs", "latency_ms"],
    *["latency_ratio", "peak_memory_bytes", "metric"],
]


@pytest.mark.parametrize(
    ("words", "steps", "ends", "memory"),
    [
        ([], False, True, True),
        (["--max-latency", "100"], True, True, True),
        (["--measure", "latency"], False, True, False),
        (["--measure", "memory"], False, False, True),
        (["--measure", "none"], False, False, False),
    ],
)
def test_what_is_measured(
    words: list[str],
    steps: bool,
    ends: bool,
    memory: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = runtime.LoadCost(0.1, 1 << 20)
    monkeypatch.setattr(runtime, "load_cost", lambda *args, **kwargs: cost)
    report = tmp_path / "run.json"
    shown = run(model, *words, "--report", report)
    assert shown.exit_code == 0, shown.output
    data = json.loads(report.read_text())
    assert (data["steps"][0]["after"]["latency_ms"] is not None) is steps
    for place in ("baseline", "final"):
        assert (data[place]["latency_ms"] is not None) is ends
        assert (data[place]["peak_memory_bytes"] is not None) is memory


def test_a_bound_on_latency_needs_its_measurement(model: Path) -> None:
    shown = run(model, "--max-latency", "1.5", "--measure", "none")
    assert shown.exit_code == 2
    assert "--max-latency needs --measure latency" in shown.stderr


def test_the_bare_command_folds_and_writes_beside_the_model(model: Path) -> None:
    before = model.read_bytes()
    shown = run(model)
    assert shown.exit_code == 0, shown.output
    written = model.with_name("tiny-shrunk.onnx")
    session = onnxruntime.InferenceSession(written)
    x = np.ones((2, 4), np.float32)
    assert session.run(None, {"x": x})[0].tolist() == [[2, 4, 4]] * 2
    assert "Identity" not in {node.op_type for node in onnx.load(written).graph.node}
    assert model.read_bytes() == before
    assert "smoke test" in shown.stdout
    assert "\x1b" not in shown.output


def test_the_report_has_exactly_the_documented_keys(
    model: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    out = tmp_path / "out.onnx"
    args = ["--passes", "fold", "prune:sparsity=0.5,importance=magnitude"]
    args += ["--data", data, "-o", out]
    shown = run(model, *args, "--report", path, "--on-breach", "keep")
    assert shown.exit_code == 0, shown.output
    report = json.loads(path.read_text())
    assert list(report)[: len(REPORT) + 1] == ["schema", *REPORT]
    assert [step["pass"] for step in report["steps"]] == ["fold", "prune"]
    for step in report["steps"]:
        assert list(step)[: len(STEP)] == STEP
        assert list(step["before"]) == list(step["after"]) == STATS
    assert list(report["baseline"]) == list(report["final"]) == STATS
    assert report["final"]["file_bytes"] == out.stat().st_size
    assert report["baseline"]["file_bytes"] == model.stat().st_size


def test_the_same_command_writes_the_same_bytes(
    model: Path, data: Path, tmp_path: Path
) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out = tmp_path / name / "out.onnx"
        shown = run(model, "--passes", "fold", "--data", data, "-o", out, "--seed", 3)
        assert shown.exit_code == 0, shown.output
        written.append(out.read_bytes())
    assert written[0] == written[1]


def test_quiet_prints_nothing_but_errors(model: Path, tmp_path: Path) -> None:
    shown = run(model, "-q")
    assert (shown.exit_code, shown.output) == (0, "")
    shown = run(tmp_path / "no.onnx", "-q")
    assert shown.exit_code == 1
    assert "does not exist" in shown.stderr


def test_an_output_folder_takes_a_file_of_the_same_name(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    assert run(model, "-o", folder, "-q").exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["tiny.onnx"]


def test_a_plan_names_sites_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    shown = run(
        model, "--passes", "fold", "prune:sparsity=0.5,importance=magnitude", "--plan"
    )
    assert shown.exit_code == 0, shown.output
    assert "prune" in shown.stdout
    assert re.search(r"\bw\b", shown.stdout)
    assert list(tmp_path.iterdir()) == [model]


def test_a_broken_budget_with_abort_writes_nothing(
    model: Path, data: Path, tmp_path: Path
) -> None:
    args = ["--passes", "prune:sparsity=0.95,importance=magnitude"]
    args += ["--data", data, "--min-sqnr", 60]
    fails(model, *args, "--on-breach", "abort", says="prune", tmp_path=tmp_path)


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_reports_for_readers_are_written_by_suffix(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"run{suffix}"
    assert run(model, "-q", "--report", path).exit_code == 0
    assert "tiny.onnx" in path.read_text().replace("\\", "")


# --- passes -----------------------------------------------------------------------


def test_passes_lists_every_pass_and_recipe_with_options() -> None:
    shown = run("passes")
    assert shown.exit_code == 0
    for name, cls in registry.passes().items():
        assert f"\n{name}  {registry.describe(cls).summary}\n" in shown.stdout
    for name in registry.recipes():
        assert f"\n{name}  " in shown.stdout
    assert "does not work" not in shown.stdout


@pytest.mark.parametrize("name", sorted(registry.passes()))
def test_passes_explains_every_option_of_a_pass(name: str) -> None:
    shown = run("passes", name)
    assert shown.exit_code == 0
    described = registry.describe(registry.get(name))
    for option in described.options:
        assert f"  {option.name}={option.type}  [default: " in shown.stdout
        assert flat(option.doc) in flat(shown.stdout)
    assert f"--passes {described.example}" in shown.stdout


def test_passes_shows_a_recipe_by_name() -> None:
    shown = run("passes", "lossless")
    assert shown.exit_code == 0
    assert shown.stdout.rstrip() == registry.recipe("lossless").read_text().rstrip()


def test_passes_names_the_nearest(tmp_path: Path) -> None:
    fails("passes", "foldd", says="Did you mean 'fold'", tmp_path=tmp_path)


# --- inspect ----------------------------------------------------------------------


def test_inspect_shows_weights_and_operators(model: Path) -> None:
    shown = run("inspect", model)
    assert shown.exit_code == 0, shown.output
    assert "MatMul" in shown.stdout
    assert "4x3" in shown.stdout
    assert "input x: float [N, 4]" in shown.stdout


def test_inspect_prints_json(model: Path) -> None:
    found = json.loads(run("inspect", model, "--json").stdout)
    weight = found["weights"][0]
    assert weight["name"] == "w"
    assert (weight["size"], weight["nonzeros"], weight["distinct"]) == (12, 6, 4)
    assert found["macs"] == 12


def test_inspect_says_what_the_top_leaves_out(model: Path) -> None:
    assert (
        "1 more weights; --top 0 shows all" in run("inspect", model, "--top", 1).stdout
    )
    assert "more weights" not in run("inspect", model, "--top", 0).stdout


def test_inspect_refuses_a_shape_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    says = "--shape: input 'x' takes Nx4, not 2x5"
    fails("inspect", model, "--shape", "x=2x5", says=says, tmp_path=tmp_path)


def test_names_of_a_model_cannot_steer_the_terminal(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer[0].name = "\x1b[31m[red]w"
    proto.graph.node[1].input[1] = "\x1b[31m[red]w"
    path = tmp_path / "evil.onnx"
    onnx.save(proto, path)
    shown = run("inspect", path)
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.stdout
    assert "\\x1b[31m[red]w" in shown.stdout


# --- compare ----------------------------------------------------------------------


def test_compare_of_a_model_with_itself_is_equal(model: Path, data: Path) -> None:
    shown = run("compare", model, model, "--data", data, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["ok"] is True
    assert found["differences"] == []


def test_compare_without_data_is_labelled_a_smoke_test(model: Path) -> None:
    shown = run("compare", model, model)
    assert shown.exit_code == 0, shown.output
    assert "smoke test" in shown.stdout


def test_compare_of_other_outputs_is_exit_code_1(model: Path, tmp_path: Path) -> None:
    other = text_model(
        TEXT.replace("float[N,3] y", "float[N,3] z").replace("y =", "z ="),
        tmp_path / "other.onnx",
    )
    shown = run("compare", model, other)
    assert shown.exit_code == 1
    assert "output 'y' is missing" in shown.stdout
    assert "output 'z' is new" in shown.stdout


def test_compare_checks_what_is_asked(model: Path, data: Path, tmp_path: Path) -> None:
    other = text_model(TEXT.replace("0, 1, 0", "0, 9, 0"), tmp_path / "other.onnx")
    args = ["compare", model, other, "--data", data]
    assert run(*args).exit_code == 0
    shown = run(*args, "--min-agreement", "99%")
    assert shown.exit_code == 1, shown.output
    assert run(*args, "--min-agreement", "1%").exit_code == 0
    assert run(*args, "--min-sqnr", "40").exit_code == 1


# --- the installed command --------------------------------------------------------


def installed(*args: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **settings,  # type: ignore[call-overload]
    )


def test_a_reader_that_leaves_early_makes_no_noise() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [COMMAND, "passes"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_help_imports_neither_onnx_nor_onnxruntime() -> None:
    code = (
        "import sys\n"
        "from onnxshrink.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'onnx_graphsurgeon'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_stops_with_130_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from onnxshrink import cli\n"
        "from onnxshrink.validation import Validator\n"
        # A shell starts background jobs with SIGINT ignored, and children inherit it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def stop(*args, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "Validator.check = stop\n"
        f"cli.main([{str(model)!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny-shrunk.onnx").exists()
    assert done.stdout == ""


@pytest.mark.slow
def test_the_installed_command_shrinks_a_real_model_on_real_data(
    tmp_path: Path,
) -> None:
    model = ROOT / "models" / "lenet-300-100.onnx"
    data = ROOT / "models" / "mnist.npz"
    out, report = tmp_path / "out.onnx", tmp_path / "run.json"
    done = installed(
        *[model, "--passes", "fold", "prune:sparsity=0.9"],
        *["--data", f"{data}:image=train_x/255,labels=train_y"],
        *["--eval", f"{data}:image=test_x/255,labels=test_y"],
        *["--max-drop", "0.5", "--report", report, "-o", out],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "run.json"]
    found = json.loads(report.read_text())
    assert found["final"]["file_bytes"] == out.stat().st_size
    assert out.stat().st_size < model.stat().st_size / 2
    session = onnxruntime.InferenceSession(out)
    with np.load(data) as arrays:
        images = arrays["test_x"].astype(np.float32).reshape(-1, 1, 28, 28) / 255
        labels = arrays["test_y"]
    logits = session.run(None, {"image": images})[0]
    error = 100 * float(np.mean(logits.argmax(1) != labels))
    assert error < 3
