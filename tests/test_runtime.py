"""Sessions: every source gives the same outputs, every error says what would work."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxshrink import runtime, shrink
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model

TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  h = MatMul(x, w)
  y = Relu(h)
}
"""
X = np.array([[1, -1], [0, 1]], np.float32)
Y = [[0, 0], [3, 4]]


def proto(text: str = TEXT, **changes: Any) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def sources(folder: Path) -> dict[str, Any]:
    path = folder / "m.onnx"
    onnx.save(proto(), path)
    (folder / "m.onnxtxt").write_text(TEXT)
    return {
        "path": path,
        "str": str(path),
        "text": folder / "m.onnxtxt",
        "bytes": path.read_bytes(),
        "proto": proto(),
        "model": Model.load(path),
    }


@pytest.mark.parametrize("kind", ["path", "str", "text", "bytes", "proto", "model"])
def test_every_source_gives_the_same_outputs(tmp_path: Path, kind: str):
    made = runtime.session(sources(tmp_path)[kind])
    assert made.run({"x": X})["y"].tolist() == Y
    assert [info.name for info in made.inputs] == ["x"]
    assert made.inputs[0].shape == ("N", 2)
    assert made.outputs[0].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "proto", "model"])
def test_a_value_inside_the_graph_can_be_exposed(tmp_path: Path, kind: str):
    source = sources(tmp_path)[kind]
    outputs = runtime.session(source, expose=["h"]).run({"x": X})
    assert list(outputs) == ["y", "h"]
    assert outputs["h"].tolist() == [[-2, -2], [3, 4]]
    alone = runtime.session(source, expose=["h"], only_exposed=True)
    assert list(alone.run({"x": X})) == ["h"]


@pytest.mark.parametrize("optimize", ["all", "basic", "off"])
def test_every_level_of_optimisation_gives_the_same(optimize: Any):
    made = runtime.session(proto(), optimize=optimize, threads=1)
    assert made.run({"x": X})["y"].tolist() == Y


def test_some_outputs_can_be_asked_for():
    made = runtime.session(proto(), expose=["h"])
    assert list(made.run({"x": X}, ["h"])) == ["h"]


# Feeds


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"no array for input 'x'; the model takes 'x' \(float32 \[N, 2\]\)"),
        ({"x": X, "xx": X}, r"no input 'xx'; it takes 'x'\. Did you mean 'x'"),
        ({"x": X.astype(np.float64)}, r"'x' \(float32 \[N, 2\]\) was given float64"),
        ({"x": X[:, :1]}, r"'x' \(float32 \[N, 2\]\) was given float32 \[2, 1\]"),
        ({"x": X[0]}, r"was given float32 \[2\]"),
        ({"x": [[1, 2]]}, "takes a numpy array, not list"),
    ],
)
def test_feeds_that_do_not_fit_are_refused(feeds: Any, message: str):
    with pytest.raises(ModelError, match=message):
        runtime.session(proto()).run(feeds)


def test_a_failure_while_running_names_the_node():
    model = proto(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (float[a, b] x, float[c, d] z) => (float[e, f] y)
        { y = MatMul(x, z) }
        """
    )
    model.graph.node[0].name = "mul"
    with pytest.raises(ModelError, match=r"MatMul node 'mul': .*dimension mismatch"):
        runtime.session(model).run({"x": X, "z": np.ones((3, 2), np.float32)})


def test_an_input_with_a_default_need_not_be_given():
    model = proto()
    model.graph.input.add().CopyFrom(
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2])
    )
    made = runtime.session(model)
    assert [info.name for info in made.inputs] == ["x"]
    assert [info.name for info in made.optional] == ["w"]
    assert made.run({"x": X})["y"].tolist() == Y
    zero = np.zeros((2, 2), np.float32)
    assert made.run({"x": X, "w": zero})["y"].tolist() == [[0, 0], [0, 0]]


def test_strings_go_in_and_out():
    model = proto(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (string[N] x) => (string[N] y) { y = Identity(x) }
        """
    )
    out = runtime.session(model).run({"x": np.array(["a", "b"])})
    assert out["y"].tolist() == ["a", "b"]


def test_a_sequence_comes_out_as_a_list():
    model = proto(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x, x) }
        """
    )
    made = runtime.session(model)
    assert made.outputs[0].kind == "sequence"
    assert [v.tolist() for v in made.run({"x": X[0]})["y"]] == [[1, -1], [1, -1]]


# Models that do not load


def test_a_newer_ir_version_is_named():
    with pytest.raises(ModelError, match=r"IR version is 99, .* takes at most \d+"):
        runtime.session(proto(ir_version=99))


def test_a_newer_opset_is_named():
    model = proto()
    model.opset_import[0].version = 99
    with pytest.raises(ModelError, match=r"opset of ai.onnx is 99.* at most \d+"):
        runtime.session(model)


def test_a_custom_operator_is_named():
    model = proto()
    model.graph.node[1].op_type = "Foo"
    model.graph.node[1].domain = "my.domain"
    model.opset_import.add(domain="my.domain", version=1)
    with pytest.raises(ModelError, match=r"operator Foo of domain my\.domain"):
        runtime.session(model)


def test_an_unknown_operator_is_named():
    model = proto()
    model.graph.node[1].op_type = "Foo"
    with pytest.raises(ModelError, match="no operator Foo in opset 17"):
        runtime.session(model)


def test_a_missing_kernel_is_named():
    model = proto(
        """
        <ir_version: 10, opset_import: ["" : 17]>
        g (bfloat16[N] x) => (bfloat16[N] y) { y = Relu(x) }
        """
    )
    with pytest.raises(ModelError, match="no kernel of Relu"):
        runtime.session(model)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x08\x0a"])
def test_bytes_that_are_no_model_are_refused(data: bytes):
    with pytest.raises(ModelError, match="not an ONNX model"):
        runtime.session(data)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"none\.onnx does not exist"):
        runtime.session(tmp_path / "none.onnx")


def test_an_error_names_no_source_file_of_onnxruntime():
    with pytest.raises(ModelError) as caught:
        runtime.session(proto(ir_version=99))
    assert "onnxruntime_src" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_provider_lists_what_there_is(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match=r"Providers'.*it has.*Did you mean"):
        runtime.session(proto(), providers=["CPUExecutionProviders"])
    assert capfd.readouterr() == ("", "")


def test_bad_options_are_refused():
    with pytest.raises(UsageError, match="optimize is one of"):
        runtime.session(proto(), optimize="much")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="negative"):
        runtime.session(proto(), threads=-1)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]):
    runtime.session(proto()).run({"x": X})
    with pytest.raises(ModelError):
        runtime.session(b"garbage")
    assert capfd.readouterr() == ("", "")


# Large models


def large(folder: Path) -> Path:
    """Two MatMuls whose weights are external data, 4096-aligned by onnx."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("MatMul", ["h", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [
            onnx.numpy_helper.from_array(w, n)
            for w, n in zip(weights, "ab", strict=True)
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    path = folder / "large.onnx"
    onnx.save(model, path, save_as_external_data=True, location="large.bin")
    return path


@pytest.mark.parametrize("changed", [[], ["a"], ["a", "b"]])
def test_a_large_model_is_handed_over_through_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: list[str]
):
    model = Model.load(large(tmp_path))
    for name in changed:
        model.set_weight(name, np.eye(64, dtype=np.float32))
    a, b = (model.weight(name).read() for name in "ab")
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    monkeypatch.setattr(runtime, "_SPILL", 20_000)
    monkeypatch.setattr(runtime, "NO_PREPACKING", 20_000)
    out = runtime.session(model, expose=["h"]).run({"x": x})
    np.testing.assert_allclose(out["h"], x @ a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out["y"], x @ a @ b, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.bin", "large.onnx"]


def test_a_model_with_external_data_opens_by_path(tmp_path: Path):
    made = runtime.session(large(tmp_path))
    assert made.run({"x": np.zeros((1, 64), np.float32)})["y"].shape == (1, 64)


def test_external_data_of_any_name_makes_a_model_large(tmp_path: Path):
    path = large(tmp_path)
    assert (
        runtime.file_bytes_or_less(path)
        > (tmp_path / "large.bin").stat().st_size
        > 30_000
    )


# Helpers


def test_run_proto_gives_the_outputs_in_order():
    assert runtime.run_proto(proto(), {"x": X})[0].tolist() == Y


def test_load_cost_is_measured_in_another_process(tmp_path: Path):
    big = np.zeros((2048, 2048), np.float32)
    model = Model.load(proto())
    model.set_weight("w", np.ones((2, 2), np.float32))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2048])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2048])],
        [onnx.numpy_helper.from_array(big, "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
        ),
        path,
    )
    cost = runtime.load_cost(path, threads=1)
    assert cost is not None
    assert cost.seconds > 0
    # The 16 MB of weights are read at least once.
    assert 16e6 < cost.peak_memory_bytes < 500e6


def test_load_cost_of_what_does_not_load_is_none(tmp_path: Path):
    (tmp_path / "bad.onnx").write_bytes(b"garbage")
    assert runtime.load_cost(tmp_path / "bad.onnx") is None


@pytest.mark.parametrize(
    "text",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned "
        "while running Add node. Name:'/grouped/Add' Status Message: "
        "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
        "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate "
        "memory for requested buffer of size 3211264",
        "std::bad_alloc",
    ],
)
def test_memory_that_is_short_is_said_in_the_same_words_everywhere(text: str) -> None:
    # Passes that can do with smaller batches look for these.
    assert runtime._reason(RuntimeError(text)) == "it needs more memory than there is"


_LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
void* RegisterCustomOps(void* options, void* api) {
    FILE* log = fopen(getenv("OPS_LOG"), "a");
    fputc('x', log);
    fclose(log);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_every_session_of_a_run_registers_the_library_of_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "ops.c", tmp_path / "ops.so"
    source.write_text(_LIBRARY)
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=60
    )
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("OPS_LOG", str(log))
    path = tmp_path / "model.onnx"
    Model.load(proto()).save(path)
    with runtime.custom_operators([library]):
        assert log.stat().st_size == 1
        runtime.session(path)
        assert log.stat().st_size == 2
        assert runtime.load_cost(path) is not None
        assert log.stat().st_size == 3
    runtime.session(path)
    assert log.stat().st_size == 3
    shrink(path, "fold", custom_ops=[library], measure_memory=False)
    assert log.stat().st_size > 4


def test_a_library_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="does not exist"),
        runtime.custom_operators([tmp_path / "no.so"]),
    ):
        pass
    (tmp_path / "no.so").write_bytes(b"no library")
    with (
        pytest.raises(UsageError, match="cannot take it as a library"),
        runtime.custom_operators([tmp_path / "no.so"]),
    ):
        pass
