"""A folder of models is written whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

from onnxshrink import cli
from onnxshrink.testing.decoders import decoder

PASSES = ("--passes", "quantize:activations=none,weights=int4", "--measure", "none")


def shrink(*words: object) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, one with external data and one below, and what lies beside them."""
    found = tmp_path / "exported"
    (found / "onnx").mkdir(parents=True)
    onnx.save(
        decoder(vocabulary=300),
        found / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=1024,
    )
    onnx.save(decoder(vocabulary=200, past=True), found / "onnx" / "past.onnx")
    (found / "genai_config.json").write_text('{"model": "model.onnx"}')
    (found / "onnx" / "LICENSE").write_text("free")
    return found


def test_models_are_shrunk_and_the_rest_is_copied(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = tmp_path / "new" / "smaller"
    result = shrink(folder, "-o", out, *PASSES)
    assert result.exit_code == 0, result.output
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    kept = {"model.onnx", "onnx/past.onnx", "genai_config.json", "onnx/LICENSE"}
    assert kept <= names
    assert "model.onnx_data" not in names
    assert (out / "genai_config.json").read_text() == '{"model": "model.onnx"}'
    assert (out / "onnx" / "LICENSE").read_text() == "free"
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert total < 0.5 * sum(len(content) for content in before.values())
    ids = np.zeros((1, 4), np.int64)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert session.run(None, {"input_ids": ids})[0].shape == (1, 4, 300)
    assert {path: path.read_bytes() for path in before} == before
    again = shrink(folder, "-o", out, *PASSES)
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_a_broken_model_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "other.onnx").write_bytes(b"no model")
    result = shrink(folder, "-o", tmp_path / "out", *PASSES)
    assert result.exit_code == 1
    assert "other.onnx" in result.output
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"exported"}


@pytest.mark.parametrize("where", ["exported", "exported/out", "."])
def test_a_folder_inside_the_other_is_refused(
    folder: Path, tmp_path: Path, where: str
) -> None:
    result = shrink(folder, "-o", tmp_path / where, *PASSES)
    assert result.exit_code == 1
    assert "inside one another" in result.output


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = shrink(tmp_path / "empty", *PASSES)
    assert result.exit_code == 1
    assert "without an .onnx file" in result.output
