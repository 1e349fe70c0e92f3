"""Golden cases: a model as ONNX text, and what a pipeline makes of it.

Tested in tests/test_cases.py.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxshrink import runtime
from onnxshrink.base import Pass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.model.topology import is_onnx
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples, Splits
from onnxshrink.testing.laws import apply

__all__ = ["Case", "check_case", "normalised"]


@dataclass(frozen=True)
class Case:
    """A golden case: a file of ONNX text with the pipeline in its first line.

    ::

        # prune:sparsity=0.5
        <ir_version: 8, opset_import: ["" : 17]>
        example (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {1, 2, 3, 4}>
        { y = MatMul(x, w) }
        # output
        <ir_version: 8, opset_import: ["" : 17]>
        example (float[N,2] x) => (float[N,2] y)
        <float[2,2] w = {0, 0, 3, 4}>
        { y = MatMul(x, w) }

    Without ``# output`` the pipeline must leave the model alone. Further lines may
    follow the first:

    - ``# skipped w: is shared``: the pass says so of ``w``;
    - ``# calibration: {"x": [[1, 0], [0, 1]]}``: the samples the passes see.

    Attributes:
        path: The file.
        pipeline: Text of the pipeline.
        before: Text of the model.
        after: Text of the expected model.
        skipped: (where, part of why) that must have been said.
        calibration: Samples by input name, or none.
    """

    path: Path
    pipeline: str
    before: str
    after: str
    skipped: tuple[tuple[str, str], ...] = ()
    calibration: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Case:
        """Read a case file.

        Raises:
            UsageError: It is not a case.
        """
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        if not first.startswith("# "):
            raise UsageError(f"{path}: the first line must be '# ' and a pipeline")
        skipped: list[tuple[str, str]] = []
        calibration = None
        parts: list[list[str]] = [[]]
        for line in lines:
            if line == "# output":
                parts.append([])
            elif match := re.fullmatch(r"# skipped (.+?): (.+)", line):
                skipped.append((match[1], match[2]))
            elif match := re.fullmatch(r"# calibration: (.+)", line):
                calibration = json.loads(match[1])
            elif not line.startswith("#"):
                parts[-1].append(line)
        texts = ["\n".join(part) for part in parts]
        if len(texts) > 2:
            raise UsageError(f"{path}: there is more than one '# output'")
        return cls(
            path, first[2:].strip(), texts[0], texts[-1], tuple(skipped), calibration
        )


def check_case(
    source: Case | Path, passes: Mapping[str, type[Pass]] | None = None
) -> None:
    """Check a golden case.

    Models are compared by what they compute from: opsets, inputs, outputs, weights,
    nodes and attributes; not by the names of nodes, documentation or recorded shapes.

    Args:
        source: The case or its file.
        passes: The passes there are; by default those of the registry.

    Raises:
        AssertionError: The model is another one; shows the difference.
    """
    case = source if isinstance(source, Case) else Case.read(source)
    model = Model.load(_parsed(case.path, case.before))
    wanted = _parsed(case.path, case.after)
    # If the expected model cannot run, the case itself is wrong.
    runtime.session(Model.load(wanted), threads=1)
    skipped: list[tuple[str, str]] = []
    start = model
    for pass_ in Pipeline.parse(case.pipeline, passes):
        samples = _samples(case, model)
        model, context = apply(pass_, model, splits=samples, reference=start)
        skipped += context.skips
    expected, found = normalised(wanted), normalised(model.to_proto())
    if expected != found:
        difference = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), "expected", "found", lineterm=""
        )
        raise AssertionError("\n".join([f"{case.path}:", *difference]))
    for where, why in case.skipped:
        if not any(name == where and why in said for name, said in skipped):
            raise AssertionError(
                f"{case.path}: no pass said of {where} that it {why!r}; said: {skipped}"
            )


def _samples(case: Case, model: Model) -> Splits | None:
    if case.calibration is None:
        return None
    types = {info.name: info.data_type for info in model.inputs}
    arrays = {
        name: np.asarray(
            values, onnx.helper.tensor_dtype_to_np_dtype(types.get(name, 1))
        )
        for name, values in case.calibration.items()
    }
    samples = Samples.from_arrays(arrays).bind(model.inputs)
    return Splits(
        calibration=samples, training=samples, validation=samples, evaluation=samples
    )


def _parsed(path: Path, text: str) -> onnx.ModelProto:
    try:
        proto = onnx.parser.parse_model(text)
        onnx.checker.check_model(proto)
    except (onnx.parser.ParseError, onnx.checker.ValidationError) as error:
        raise UsageError(f"{path}: {error}") from error
    return proto


def normalised(proto: onnx.ModelProto) -> str:
    """Return a text that is equal for models that differ in documentation only.

    Left out are versions of IR and producer, metadata, documentation, node names and
    recorded shapes; weights come in the order of their names. Function bodies and
    subgraphs are part of it.
    """
    imports = sorted((entry.domain, entry.version) for entry in proto.opset_import)
    lines = [f"opset {domain or 'ai.onnx'} {version}" for domain, version in imports]
    lines += _graph_lines(proto.graph, "")
    for function in sorted(proto.functions, key=lambda f: (f.domain, f.name)):
        lines.append(
            f"function {function.domain}.{function.name}"
            f"({', '.join(function.input)}) => ({', '.join(function.output)})"
        )
        for node in function.node:
            lines += _node_lines(node, "  ")
    return "\n".join(lines)


def _graph_lines(graph: onnx.GraphProto, indent: str) -> list[str]:
    lines = [f"{indent}input {_value(info)}" for info in graph.input]
    lines += [f"{indent}output {_value(info)}" for info in graph.output]
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        lines.append(f"{indent}weight {tensor.name} = {_tensor(tensor)}")
    for sparse in sorted(graph.sparse_initializer, key=lambda s: s.values.name):
        lines.append(
            f"{indent}sparse {sparse.values.name} = {_tensor(sparse.values)} "
            f"at {_tensor(sparse.indices)} of {list(sparse.dims)}"
        )
    for node in graph.node:
        lines += _node_lines(node, indent)
    return lines


def _node_lines(node: onnx.NodeProto, indent: str) -> list[str]:
    domain = f"{node.domain}." if not is_onnx(node.domain) else ""
    plain, nested = [], []
    for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
        if attribute.ref_attr_name:
            plain.append(f"{attribute.name} = @{attribute.ref_attr_name}")
            continue
        value: Any = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.GraphProto):
            nested.append(f"{indent}  {attribute.name}:")
            nested += _graph_lines(value, indent + "    ")
        else:
            plain.append(f"{attribute.name} = {_attribute(value)}")
    options_ = f"<{', '.join(plain)}>" if plain else ""
    inputs, outputs = ", ".join(node.input), ", ".join(node.output)
    return [f"{indent}{outputs} = {domain}{node.op_type}{options_}({inputs})", *nested]


def _attribute(value: Any) -> str:
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    if isinstance(value, bytes):
        return repr(value.decode("utf-8", "backslashreplace"))
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, str | int):
        return repr(value)
    if hasattr(value, "SerializeToString"):
        return " ".join(str(value).split())
    return "[" + ", ".join(_attribute(entry) for entry in value) + "]"


def _tensor(tensor: onnx.TensorProto) -> str:
    array = numpy_helper.to_array(tensor)
    show: Callable[[Any], str] = str
    if array.dtype.kind == "f" or array.dtype.kind == "V":
        show = _shortest
    values = ", ".join(show(value) for value in array.reshape(-1))
    return f"{_type(tensor.data_type)}{list(tensor.dims)} {{{values}}}"


def _shortest(value: Any) -> str:
    return f"{float(value):.9g}"


def _value(info: onnx.ValueInfoProto) -> str:
    if not info.type.HasField("tensor_type"):
        return f"{info.name}: {' '.join(str(info.type).split())}"
    tensor = info.type.tensor_type
    dims = "?"
    if tensor.HasField("shape"):
        dims = ", ".join(
            dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?")
            for dim in tensor.shape.dim
        )
    return f"{info.name}: {_type(tensor.elem_type)}[{dims}]"


def _type(data_type: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(data_type)
    return name.lower()
