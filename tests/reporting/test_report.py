"""The report: its figures, its words, and the files it writes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from onnxshrink.base import Promise, Savings, Site
from onnxshrink.errors import OutputError, UsageError
from onnxshrink.measuring.measure import Stats
from onnxshrink.reporting.report import (
    Report,
    Step,
    dump,
    plain,
    step_line,
)
from onnxshrink.terminal import (
    Bar,
    clean,
    console,
    count_text,
    middle,
    percent_text,
    size_text,
)
from onnxshrink.validation import MetricChange, OutputMetrics, Verdict

EVIL = "<b>|`\x1b[31m[red]\n*x*"


def verdict(**changes: Any) -> Verdict:
    return Verdict(
        ok=True,
        outputs={"logits": OutputMetrics(0.5, 0.1, 33.0, 0.99, 0.998)},
        metric=MetricChange("top1", 99.2, 99.14),
        samples=10_000,
        damage=0.6,
        **changes,
    )


def report(**changes: Any) -> Report:
    before = Stats(1_720_000, 431_080, 431_080, 2_293_000, 0.2, None, 9_000_000)
    before = dataclasses.replace(before, metric={"top1": 99.2})
    after = Stats(150_500, 431_080, 43_108, 2_293_000, 0.2, 0.98, 9_500_000)
    quality = {"top1": 99.14, "agreement": 0.998, "sqnr_db": 33.0}
    after = dataclasses.replace(after, metric=quality)
    fold = Step(
        "fold", {"limit": 1}, True, "ok", 0.5, before, before, verdict(), (("a", "b"),)
    )
    prune = Step(
        "prune",
        {"only": ("a", "b"), "sparsity": 0.9},
        True,
        "ok",
        2.0,
        before,
        after,
        verdict(),
        (("fc1", "90 % zero"),),
        (("fc2", "too small"),),
        (("fc3", "left out"),),
    )
    refused = Step(
        *["quantize", {}, False, "rolled back: top1 fell", 1.0, after, after],
        dataclasses.replace(verdict(), ok=False, damage=math.inf, problem="budget"),
    )
    made = Report(
        model="models/lenet-5.onnx",
        onnxshrink="0.1.0",
        pipeline="fold,prune:sparsity=0.9,quantize",
        seed=7,
        baseline=before,
        steps=(fold, prune, refused),
        final=after,
        notes=("samples: evaluation 10,000",),
        output=("out.onnx",),
    )
    return dataclasses.replace(made, **changes)


def rendered(made: Report, width: int = 160, **settings: Any) -> str:
    screen = Console(file=io.StringIO(), width=width, markup=False)
    made.render(screen, **settings)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(shown, str)
    return shown


# --- JSON -------------------------------------------------------------------------


def test_json_has_the_documented_keys_in_order() -> None:
    data = report().to_json()
    wanted = ["model", "onnxshrink", "pipeline", "seed", "baseline", "steps", "final"]
    wanted = ["schema", *wanted, "notes", "output", "warnings", "advice"]
    assert list(data)[: len(wanted)] == wanted
    step = ["pass", "options", "accepted", "reason", "seconds", "before", "after"]
    step += ["verdict", "did", "skipped"]
    assert list(data["steps"][0]) == [*step, "left_out"]


def test_a_report_reads_back_from_its_json() -> None:
    made = report()
    text = dump(made.to_json())
    again = Report.from_json(json.loads(text))
    assert dump(again.to_json()) == text
    assert again.steps[1].did == made.steps[1].did
    assert again.steps[1].verdict == made.steps[1].verdict
    assert again.final == made.final


@pytest.mark.parametrize(
    "data", [{}, [], None, {"model": 1}, {**report().to_json(), "steps": [1]}]
)
def test_what_is_no_report_is_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="not a report"):
        Report.from_json(data)


def test_json_is_strict_whatever_the_values() -> None:
    values = {
        "numbers": [math.inf, -math.inf, math.nan, np.float32(0.5), np.int64(3)],
        "others": [Promise.SAME, Path("a/b"), {2}, (1, None), np.arange(2), "\udc80é"],
        3: Site("w", "Gemm", Savings(bytes=1)),
    }
    text = dump(values)
    assert text.isascii()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert found["numbers"] == ["inf", "-inf", "nan", 0.5, 3]
    assert found["others"] == ["same", "a/b", [2], [1, None], [0, 1], "\udc80é"]
    assert found["3"]["where"] == "w"
    assert plain(True) is True


# --- words ------------------------------------------------------------------------


def test_the_summary_says_what_became_smaller_and_what_it_cost() -> None:
    assert report().summary() == (
        "1.72 MB -> 150 kB (11.4x smaller), error 0.80 % -> 0.86 % on 10,000 samples "
        "no pass has seen, 0.98x the latency; wrote out.onnx"
    )


def test_the_summary_of_a_smoke_test_says_so() -> None:
    steps = report().steps
    random = dataclasses.replace(steps[0], verdict=verdict(smoke_test=True))
    assert (
        "10,000 made-up inputs, a smoke test only" in report(steps=(random,)).summary()
    )


def test_a_larger_file_is_never_called_smaller() -> None:
    grown = dataclasses.replace(report().baseline, file_bytes=2_000_000)
    assert "(no smaller)" in report(final=grown).summary()


def test_agreement_below_one_never_reads_100_percent() -> None:
    final = dataclasses.replace(report().final, metric={"agreement": 0.99999})
    assert "agrees 99.99 %" in report(final=final).summary()


def test_the_table_has_a_row_for_each_pass_between_start_and_end() -> None:
    rows = report().rows()
    assert [row[0] for row in rows] == [
        *["before", "fold", "prune", "quantize", "after"]
    ]
    assert [row[-1] for row in rows] == ["", "yes", "partly", "no", ""]
    assert rows[2][1:] == [
        *["150 kB", "431 k", "43.1 k", "2.29 M", "0.98x"],
        *["error 0.86 %, agrees 99.80 %, 33.0 dB", "partly"],
    ]


def test_what_was_refused_or_weakened_is_named() -> None:
    lines = report().remarks()
    assert "quantize: rolled back: top1 fell" in lines
    assert "prune, to stay within the budget: fc3: left out" in lines
    assert "samples: evaluation 10,000" in lines


def test_a_step_that_did_nothing_says_why() -> None:
    idle = dataclasses.replace(report().steps[1], did=(), left_out=())
    made = report(steps=(idle,))
    assert "prune: left fc2 alone: too small" in rendered(made)
    assert rendered(made, verbose=True).count("left fc2 alone") == 1
    assert "left fc2 alone" not in rendered(report())
    none = report(steps=(dataclasses.replace(idle, skipped=(("prune", "no such"),)),))
    assert "prune: no such" in none.remarks(12)
    places = tuple((f"w{index}", "too small") for index in range(50))
    long = report(steps=(dataclasses.replace(idle, skipped=places),))
    assert "... and 38 more; -v names all" in rendered(long)


def test_many_weakened_places_are_cut_short_and_all_named_with_verbose() -> None:
    places = tuple((f"w{index}", "left out") for index in range(50))
    step = dataclasses.replace(report().steps[1], left_out=places)
    made = report(steps=(step,))
    assert "... and 38 more" in rendered(made)
    assert "w49" not in rendered(made)
    assert "w49: left out" in rendered(made, verbose=True)


def test_verbose_says_what_was_done_and_left_alone() -> None:
    shown = rendered(report(), verbose=True)
    assert "prune: fc1: 90 % zero" in shown
    assert "prune: left fc2 alone: too small" in shown
    assert "90 % zero" not in rendered(report())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_its_terminal_and_loses_no_figure(width: int) -> None:
    shown = rendered(report(), width)
    table = shown[: shown.index("prune, to stay")]
    assert max(map(len, table.splitlines())) <= width
    for figure in ("1.72 MB", "2.29 M", "0.98x", "agrees 99.80 %", "33.0 dB"):
        assert figure in table


def test_a_step_is_one_line() -> None:
    assert step_line(report().steps[1]) == "prune: 1.72 MB -> 150 kB (2.0 s)"
    assert step_line(report().steps[2]) == "quantize: rolled back: top1 fell (1.0 s)"


# --- files ------------------------------------------------------------------------


def evil() -> Report:
    step = dataclasses.replace(report().steps[1], did=((EVIL, EVIL),), reason=EVIL)
    return report(model=EVIL, steps=(step,), notes=(EVIL,), pipeline=EVIL)


def test_markdown_is_a_table_whatever_the_names() -> None:
    lines = evil().to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {9}
    assert "\x1b" not in "".join(lines)
    outside_code = re.sub("`[^`]*`", "", "".join(lines).replace("\\`", ""))
    assert "<b" not in outside_code.replace("\\<", "")


def test_html_is_well_formed_and_escapes_every_name() -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.seen.add(tag)
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    tags = Tags()
    tags.feed(evil().to_html())
    tags.close()
    assert tags.open == []
    assert "b" not in tags.seen
    assert "script" not in tags.seen


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_a_report_is_written_whole_and_replaces_the_old_one(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"run{suffix}"
    path.write_text("old")
    report().write(path)
    assert "lenet-5.onnx" in path.read_text().replace("\\", "")
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.json, \.md, \.html"):
        report().write(tmp_path / "run.pdf")
    with pytest.raises(OutputError, match="cannot write"):
        report().write(tmp_path / "missing" / "run.json")
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        report().write(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# --- the terminal -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *[(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1234, "1.23 kB")],
        *[(99_960, "100 kB"), (999_499, "999 kB"), (999_600, "1.00 MB")],
        *[(12_345_678, "12.3 MB"), (6_700_000_000, "6.70 GB"), (-1500, "-1.50 kB")],
    ],
)
def test_sizes_have_three_digits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_counts_and_shares_read_well() -> None:
    assert [count_text(n) for n in (None, 0, 12, 431_080)] == ["-", "0", "12", "431 k"]
    assert [percent_text(n, 1000) for n in (0, 1, 99, 999, 1000)] == [
        *["0 %", "0.1 %", "9.9 %", "100 %", "100 %"]
    ]
    assert percent_text(1, 0) == "-"


def test_text_of_a_model_is_made_harmless_and_short() -> None:
    assert clean("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"
    assert clean("é字") == "é字"
    assert len(clean("x" * 10_000, 50)) == 50
    assert middle("encoder/layer.11/output/weight", 20) == "encode...tput/weight"


def test_a_stream_that_cannot_say_a_letter_writes_an_escape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    screen = console()
    screen.print("字")
    screen.file.flush()
    assert raw.getvalue() == b"\\u5b57\n"


def test_nothing_moves_where_nobody_watches() -> None:
    screen = Console(file=io.StringIO())
    with Bar(screen) as bar:
        bar._start()
        bar(1, 2, "x")
    with Bar(Console(file=io.StringIO(), force_terminal=True), quiet=True) as bar:
        assert bar._timer is None


def test_the_bar_shows_what_is_going_on_in_a_terminal() -> None:
    file = io.StringIO()
    with Bar(Console(file=file, force_terminal=True, width=100, _environ={})) as bar:
        bar(1, 4, "pruning")
        bar._start()
        bar(2, 4, "pruning")
    assert "pruning" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
