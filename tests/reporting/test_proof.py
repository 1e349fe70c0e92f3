"""The report is the proof: what was asked for, of which files, where and when."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxshrink import shrink
from onnxshrink.manager import Result
from onnxshrink.reporting.proof import Proof, layer_sizes
from onnxshrink.reporting.report import Report

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proof")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    random = np.random.default_rng(0)
    w = random.normal(size=(16, 64)).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,16] x) => (float[N,64] y) '
        "{ y = MatMul(x, w) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    onnx.save(proto, folder / "m.onnx")
    np.savez(folder / "d.npz", x=random.normal(size=(40, 16)).astype(np.float32))
    return shrink(
        folder / "m.onnx",
        "fold,prune:sparsity=0.5,importance=magnitude",
        data=str(folder / "d.npz"),
        budget={"min_sqnr": 3},
        output=folder / "o.onnx",
        report=folder / "r" / "run.json",
        measure_latency=False,
        measure_memory=False,
        command="onnxshrink m.onnx",
    )


def check(value: Any, schema: dict[str, Any], where: str = "report") -> None:
    """Hold a value to the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        check(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
        return
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    fits = any(
        isinstance(value, types[kind])
        and (kind == "boolean" or not isinstance(value, bool))
        for kind in kinds
    )
    assert fits or not kinds, (where, value, kinds)
    if "enum" in schema:
        assert value in schema["enum"], where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        known = schema.get("properties", {})
        for key, entry in value.items():
            rest = schema.get("additionalProperties", {})
            assert key in known or rest is not False, f"{where}.{key} is not in it"
            check(entry, known.get(key, rest), f"{where}.{key}")
    if isinstance(value, list):
        for number, entry in enumerate(value):
            check(entry, schema.get("items", {}), f"{where}[{number}]")


def test_the_json_report_is_what_the_schema_says(result: Result, folder: Path) -> None:
    said = json.loads((folder / "r" / "run.json").read_text())
    check(said, SCHEMA)
    with pytest.raises(AssertionError):
        check({**said, "unknown": 1}, SCHEMA)
    with pytest.raises(AssertionError):
        check({**said, "seed": "0"}, SCHEMA)
    assert Report.from_json(said).to_json() == result.report.to_json()


def test_it_says_of_what_where_and_when(result: Result, folder: Path) -> None:
    proof = result.report.proof
    model, output = folder / "m.onnx", folder / "o.onnx"
    assert proof.sha256 == {str(model): sha256(model), str(output): sha256(output)}
    assert proof.data["calibration"]["sha256"] == sha256(folder / "d.npz")
    assert proof.data["evaluation"]["samples"] == 16
    assert proof.budget["min_sqnr"] == 3
    assert proof.command == "onnxshrink m.onnx"
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(
        proof.date
    )
    assert abs(age.total_seconds()) < 3600
    assert proof.date.encode() not in output.read_bytes()
    for text in (result.report.to_markdown(), result.report.to_html()):
        for fact in (sha256(model), sha256(folder / "d.npz"), proof.date):
            assert fact in text
        assert "outputs at least 3 dB above their change" in text


def test_the_default_budget_is_said_on_the_terminal_too(folder: Path) -> None:
    made = shrink(
        folder / "m.onnx", "fold", measure_latency=False, measure_memory=False
    )
    assert any(
        line.startswith("budget (by default):") for line in made.report.remarks()
    )


def test_sizes_of_layers_are_those_of_the_files(result: Result, folder: Path) -> None:
    (layer,) = [one for one in result.report.proof.layers if one.name == "w"]
    assert layer.before == 16 * 64 * 4
    assert 0 < layer.after < layer.before
    assert layer_sizes({}, folder / "none.onnx") == ()
    (folder / "bad.onnx").write_bytes(b"\xff\xff\xff")
    assert layer_sizes({}, folder / "bad.onnx") == ()


def test_a_report_of_an_older_version_is_read(result: Result) -> None:
    said = result.report.to_json()
    for key in Proof().to_json():
        del said[key]
    assert Report.from_json(said).proof == Proof()
