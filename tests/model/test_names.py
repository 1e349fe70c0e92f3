"""Short names: nothing but names changes, and inputs and outputs keep theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from onnxshrink import cli, runtime
from onnxshrink.model import Model
from onnxshrink.samples import Samples
from onnxshrink.testing import example_models

MODELS = Path(__file__).parents[2] / "models"
EXAMPLES = example_models()


@pytest.mark.parametrize("name", EXAMPLES)
def test_outputs_and_their_names_stay(name: str) -> None:
    model = Model.load(EXAMPLES[name])
    samples = Samples.random_for(model, seed=0, count=2)
    feeds = samples.read([0]) if samples.whole else samples.read([0, 1])
    before = runtime.session(model, threads=1).run(feeds)
    ends = [t.name for t in [*model.inputs, *model.outputs]]
    size = len(model.to_bytes("auto"))
    model.shorten_names()
    model.check()
    assert [t.name for t in [*model.inputs, *model.outputs]] == ends
    after = runtime.session(model, threads=1).run(feeds)
    assert list(after) == list(before)
    for label, values in before.items():
        np.testing.assert_array_equal(after[label], values)
    written = model.to_bytes("auto")
    assert len(written) <= size
    assert Model.load(written).to_bytes("auto") == written


def test_the_command_line_writes_short_names_and_no_record(tmp_path: Path) -> None:
    sizes = {}
    for names in ("keep", "short"):
        path = tmp_path / f"{names}.onnx"
        arguments = [str(MODELS / "lenet-300-100.onnx"), "--passes", "codebook:bits=2"]
        arguments += ["--names", names, "-o", str(path), "--on-breach", "keep"]
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == 0, result.output
        sizes[names] = path.stat().st_size
    short = Model.load(tmp_path / "short.onnx")
    assert not short.metadata
    assert all(not node.name for node in short.nodes())
    assert max(len(weight.name) for weight in short.weights()) == 1
    assert [tensor.name for tensor in short.inputs] == ["image"]
    assert sizes["short"] < sizes["keep"] - 400
