"""The HTML page and the terminal: any width, both colour schemes, nothing cut."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from onnxshrink.measuring.measure import Stats
from onnxshrink.reporting.page import bars, page, steps_chart
from onnxshrink.reporting.proof import LayerSize, Proof
from onnxshrink.reporting.report import Report, Step

LAYERS = tuple(LayerSize(f"layer{n}.<w>", 10_000 - n, 5_000 - n) for n in range(40))


def report() -> Report:
    before = Stats(1_720_000, 431_080, 431_080, 2_293_000, 0.2, None, 9_000_000)
    before = dataclasses.replace(before, metric={"top1": 99.2})
    after = dataclasses.replace(
        before, metric={"top1": 98.9, "agreement": 0.99}, file_bytes=150_000
    )
    long = "a-pass-whose-name-is-quite-long"
    step = Step(long, {}, True, "ok", 1.0, before, after)
    return Report(
        model="m.onnx",
        onnxshrink="0.1.0",
        pipeline="fold",
        seed=0,
        baseline=before,
        steps=(step, step),
        final=after,
        notes=("x" * 300,),
        proof=Proof(layers=LAYERS, sha256={"/a/" + "b" * 200: "c" * 64}),
    )


class Checked(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "circle", "polyline"):
            return
        assert self.open.pop() == tag


def test_the_page_is_sound_and_loads_nothing() -> None:
    text = report().to_html()
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert "layer0.&lt;w&gt;" in text
    assert "16 more" in text


def test_charts_draw_what_there_is() -> None:
    assert bars(()) == ""
    assert steps_chart([("before", {})]) == ""
    chart = steps_chart([("before", {"top1": 90.0}), ("prune", {"top1": 80.0})])
    assert 'points="0.0,24.0 360.0,84.0"' in chart
    widths = re.findall(r'<rect x="0" y="\d+" width="([\d.]+)"', bars(LAYERS[:1]))
    assert widths == ["360.0", "180.0"]
    assert (
        page("t", "s", ["a"], [["1"]], [], ["<w>"], [], [], []).count("&lt;w&gt;") == 1
    )


def test_a_notebook_shows_the_table() -> None:
    shown = report()._repr_html_()
    assert shown.count("<tr>") == 5
    assert "<script" not in shown


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_nothing_is_cut_on_a_narrow_terminal(width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, markup=False)
    report().render(screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    joined = re.sub(r"\s", "", shown)
    for word in ("a-pass-whose-name-is-quite-long", "1.72MB", "150kB", "431k", "99.00"):
        assert word in joined
    assert "…" not in shown
    table = shown.split("budget")[0].split("x" * 300)[0]
    assert all(len(line) <= width for line in table.splitlines())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_real_browser(tmp_path: Path, width: int, scheme: str) -> None:
    assert CHROMIUM is not None
    text = report().to_html()
    probe = (
        "<script>addEventListener('load', () => { document.title = "
        "document.documentElement.scrollWidth + ' ' + innerWidth + ' ' + "
        "getComputedStyle(document.body).backgroundColor })</script>"
    )
    # A frame of that width: a window of Chromium is never narrower than 500 pixels.
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"))
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" style="border:0;width:{width}px;height:900px">'
        "</iframe><script>addEventListener('load', () => setTimeout(() => { "
        "document.title = document.getElementById('f').contentDocument.title; "
        "document.body.textContent = document.title }, 200))</script>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [
            *[CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"],
            *["--allow-file-access-from-files", "--window-size=1400,1000", *dark],
            "--virtual-time-budget=3000",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<body>(\d+) (\d+) (rgb\([^)]*\))", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert int(found[1]) <= int(found[2]) == width
    color = "rgb(13, 17, 23)" if scheme == "dark" else "rgb(255, 255, 255)"
    assert found[3] == color
