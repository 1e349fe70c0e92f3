"""Small files that ask for much end in a clear error, soon and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink.errors import UsageError
from onnxshrink.pipeline import Pipeline

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
from onnxshrink import cli
cli.main([*sys.argv[1:], "-q", "--measure", "none"])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")


def refused(*args: object) -> str:
    """Return what the command line says about a file that it refuses."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("error: ")
    assert "bug" not in done.stderr
    return done.stderr


def test_functions_that_laugh_are_refused(tmp_path: Path) -> None:
    functions = []
    for level in range(12):
        inner = ("Relu", "") if level == 0 else (f"f{level - 1}", "local")
        nodes = [
            helper.make_node(
                inner[0],
                ["x" if place == 0 else f"v{place - 1}"],
                ["y" if place == 9 else f"v{place}"],
                domain=inner[1],
            )
            for place in range(10)
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        functions.append(
            helper.make_function("local", f"f{level}", ["x"], ["y"], nodes, opsets)
        )
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("f11", ["x"], ["y"], domain="local")],
        "g",
        *[[v] for v in value],
    )
    onnx.save(
        helper.make_model(graph, functions=functions, opset_imports=opsets),
        tmp_path / "m.onnx",
    )
    said = refused(tmp_path / "m.onnx")
    assert "its functions unfold to 1,000,000,000,000 nodes" in said


def test_a_file_that_is_all_holes_is_refused_before_the_work(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=[25 * 10**9], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        *[[v] for v in value],
        initializer=[tensor],
    )
    opsets = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(100 * 10**9)
    assert "--max-model-bytes" in refused(tmp_path / "m.onnx")


def test_deep_keys_of_recipes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    for text in (".".join("a" * 50_000) + " = 1", "[" + " . ".join("a" * 9) + "]"):
        path.write_text(text)
        with pytest.raises(UsageError, match="a key of more than 8 parts"):
            Pipeline.from_toml(path)
    path.write_text("a = " + "[" * 50_000)
    with pytest.raises(UsageError, match="recipe"):
        Pipeline.from_toml(path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "r.toml"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="no regular file"):
        Pipeline.from_toml(pipe)
    model = tmp_path / "m.onnx"
    os.mkfifo(model)
    assert "m.onnx" in refused(model)
