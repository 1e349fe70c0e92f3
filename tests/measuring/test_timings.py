"""Timings of kernels: what is measured, and what is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxshrink import runtime
from onnxshrink.cli import main
from onnxshrink.measuring import figures, timings
from onnxshrink.measuring.figures import cache_folder
from onnxshrink.measuring.timings import Timings, structure
from onnxshrink.model import Model
from onnxshrink.quantization.processors import PROCESSORS
from onnxshrink.structure.layers import find
from onnxshrink.testing import example_models

EXAMPLES = example_models()
X = {"x": np.zeros((2, 12), np.float32)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Count measurements; how long something takes is not for a test to say."""
    taken: list[float] = []

    def latencies(one: object, two: object, *feeds: object) -> tuple[float, float]:
        for session, feed in zip((one, two), (*feeds, feeds[0]), strict=False):
            assert isinstance(session, runtime.Session)
            session.run(feed if feed is not None else feeds[0])  # type: ignore[arg-type]
        taken.append(0.5 + len(taken))
        return 1.0, taken[-1]

    monkeypatch.setattr(timings, "latencies", latencies)
    return taken


def perceptron() -> Model:
    return Model.load(EXAMPLES["perceptron"])


def test_a_ratio_is_measured_once(tmp_path: Path, quick: list[float]) -> None:
    model = perceptron()
    first = Timings(tmp_path).ratio(model, model, X)
    assert Timings(tmp_path).ratio(model, model, X) == first == 0.5
    other = {"x": np.zeros((3, 12), np.float32)}
    assert Timings(tmp_path).ratio(model, model, other) == 1.5
    assert Timings(tmp_path, threads=1).ratio(model, model, X) == 2.5
    assert len(quick) == 3


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"format": 0, "ratios": {}}',
        b'{"format": 1, "ratios": 3}',
        b"[" * 100_000,
    ],
)
def test_a_broken_cache_is_as_good_as_none(
    text: bytes, tmp_path: Path, quick: list[float]
) -> None:
    (tmp_path / "timings.json").write_bytes(text)
    model = perceptron()
    assert Timings(tmp_path).ratio(model, model, X) == 0.5
    assert Timings(tmp_path).ratio(model, model, X) == 0.5
    assert len(quick) == 1


def test_ratios_that_cannot_be_are_measured_again(
    tmp_path: Path, quick: list[float]
) -> None:
    model = perceptron()
    Timings(tmp_path).ratio(model, model, X)
    file = tmp_path / "timings.json"
    data = json.loads(file.read_text())
    for value in (-1.0, 0.0, "fast", None):
        data["ratios"] = dict.fromkeys(data["ratios"], value)
        file.write_text(json.dumps(data))
        Timings(tmp_path).ratio(model, model, X)
    assert len(quick) == 5


def test_where_nothing_can_be_written_it_is_measured_each_time(
    tmp_path: Path, quick: list[float]
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        Timings(tmp_path / "file").ratio(perceptron(), perceptron(), X)
    assert len(quick) == 2


def test_a_structure_has_shapes_and_no_values_or_names() -> None:
    marks = {name: structure(Model.load(proto)) for name, proto in EXAMPLES.items()}
    assert len(set(marks.values())) == len(marks)
    model = perceptron()
    model.set_weight("fc1_weight", np.zeros((16, 12), np.float32))
    model.graph.nodes[0].outputs[0].name = "other"
    assert structure(model) == marks["perceptron"]
    model.set_weight("fc2_bias", np.zeros((1, 4), np.float32))
    assert structure(model) != marks["perceptron"]


def test_a_shape_that_is_a_constant_is_part_of_the_structure() -> None:
    marks = set()
    for shape in ("{2, 6}", "{3, 4}"):
        proto = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            example (float[12] x) => (float[A,B] y)
            <int64[2] shape = {shape}> {{ y = Reshape(x, shape) }}"""
        )
        marks.add(structure(Model.load(proto)))
    assert len(marks) == 2


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("target", ["avx2", "gpu"])
def test_every_layer_is_timed_or_says_why_not(
    name: str, target: str, tmp_path: Path
) -> None:
    from onnxshrink.samples import Samples

    model = Model.load(EXAMPLES[name])
    feed = Samples.random_for(model, seed=0, count=1).read([0])
    found = Timings(tmp_path, threads=1).layers(model, feed, PROCESSORS[target])
    names = [kernel.where for kernel in found.kernels] + [n for n, _ in found.skipped]
    assert sorted(names) == sorted(layer.name for layer in find(model))
    assert all(why for _, why in found.skipped)
    if name == "convolutions":
        assert len(found.kernels) >= 3


def test_the_cache_is_where_the_system_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(figures.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "onnxshrink"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "onnxshrink"
    monkeypatch.setattr(figures.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "onnxshrink"


def test_inspect_shows_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = str(tmp_path / "model.onnx")
    perceptron().save(path)
    result = CliRunner().invoke(main, ["inspect", path, "--kernels", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["kernels"]["kernels"]
    assert [kernel["where"] for kernel in found] == ["fc1_weight", "fc2_weight"]
    assert (tmp_path / "onnxshrink" / "timings.json").is_file()
    result = CliRunner().invoke(main, ["inspect", path, "--kernels"])
    assert "Layers alone in integers" in result.output
