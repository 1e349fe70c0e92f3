"""Any runtime opens what is written: the reference evaluator, and OpenVINO if there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxshrink import runtime, shrink

PASSES = (
    "fold",
    "prune:sparsity=0.6",
    "quantize",
    "quantize:activations=none,weights=int4",
    "quantize:activations=dynamic",
    "lowrank:rank=4",
    "codebook:bits=3",
    "half",
    "half:mode=compute",
    "channels:keep=0.75",
    "separable",
    "prune:sparsity=0.5,recover",
    "prune:sparsity=0.5,distill:epochs=1",
)

IMAGES = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 4, 12, 12] x) => (float[N, 10] y)
{
  a = Conv<pads = [1, 1, 1, 1]>(x, w, b)
  r = Relu(a)
  c = Conv(r, v)
  s = Relu(c)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  h = MatMul(f, m)
  t = Tanh(h)
  y = Gemm<transB = 1>(t, k)
}
"""


def images() -> tuple[onnx.ModelProto, np.ndarray]:
    """A small network with every kind of layer, and images for it."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(IMAGES)
    shapes = {
        "w": (32, 4, 3, 3),
        "b": (32,),
        "v": (32, 32, 3, 3),
        "m": (32, 64),
        "k": (10, 64),
    }
    for name, shape in shapes.items():
        size = np.prod(shape[1:]) if len(shape) > 1 else 1
        values = (rng.normal(size=shape) / size**0.5).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto, rng.normal(size=(160, 4, 12, 12)).astype(np.float32)


def written(passes: str, storage: str, folder: Path) -> tuple[Path, Any, Any]:
    """Return a written model, an input, and what onnxruntime makes of it."""
    proto, x = images()
    path = folder / "small.onnx"
    options: dict[str, Any] = {"storage": storage, "on_breach": "keep"}
    shrink(
        proto,
        passes,
        data={"x": x},
        output=path,
        measure_latency=False,
        measure_memory=False,
        **options,
    )
    few = x[:4]
    (expected,) = runtime.session(path, optimize="off").run({"x": few}).values()
    return path, few, expected


def same(found: Any, expected: Any) -> bool:
    noise = float(np.square(found - expected, dtype=np.float64).sum())
    return noise <= 1e-4 * float(np.square(expected, dtype=np.float64).sum())


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["auto", "plain"])
@pytest.mark.parametrize("passes", PASSES)
def test_the_reference_evaluator_gives_the_same(
    passes: str, storage: str, tmp_path: Path
) -> None:
    path, x, expected = written(passes, storage, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    (found,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["auto", "plain"])
@pytest.mark.parametrize("passes", PASSES)
def test_openvino_gives_the_same(passes: str, storage: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip(
        "openvino", reason="openvino is no dependency; pip install openvino runs this"
    )
    path, x, expected = written(passes, storage, tmp_path)
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (found,) = compiled({"x": x}).values()
    assert same(found, expected)
