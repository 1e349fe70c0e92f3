"""IR versions and opsets: raising them, and fitting them to the runtime.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError

from onnxshrink.errors import ModelError
from onnxshrink.model.exporter import partial
from onnxshrink.model.importer import Importer
from onnxshrink.model.topology import Constant, Graph, own, tensor_of

if TYPE_CHECKING:
    from onnxshrink.model.model import Model

__all__ = [
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "fit_runtime",
    "require_ir",
    "require_opset",
    "take_over",
]

MAX_IR_VERSION = 13
"""Newest IR version that onnxruntime 1.31 loads."""
MAX_OPSET = 26
"""Newest ai.onnx opset that onnxruntime 1.31 runs."""
_NEWEST_TYPES = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in ("FLOAT6E2M3", "FLOAT6E3M2")
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118  # an enum, no mapping
)
"""Element types that an IR version above MAX_IR_VERSION brought."""


def require_ir(model: Model, version: int) -> None:
    """Do what ``Model.require_ir`` says."""
    if model.ir_version >= version:
        return
    if model.ir_version < 4 <= version:
        model.freeze_inputs()
    model.ir_version = version


def require_opset(model: Model, version: int) -> None:
    """Do what ``Model.require_opset`` says."""
    if model.opset >= version:
        return
    if version > MAX_OPSET:
        raise ModelError(f"opset {version} is newer than onnxruntime's {MAX_OPSET}")
    before = model.opset
    hint = (
        f"the model's opset {before} cannot be raised to {version}; "
        f"export it again with opset {version} or later"
    )
    if model.graph.functions:
        raise ModelError(f"{hint} (model-local functions cannot be converted)")
    ir_version = max(model.ir_version, 4)
    stripped, kept = model._skeleton()
    if ir_version > model.ir_version:
        # What had to be listed as an input before IR version 4 need not any more.
        kept = [(constant, False) for constant, _ in kept]
        small = {tensor.name for tensor in stripped.graph.initializer}
        inputs = [info for info in stripped.graph.input if info.name not in small]
        del stripped.graph.input[:]
        stripped.graph.input.extend(inputs)
    stripped.ir_version = min(ir_version, MAX_IR_VERSION)
    try:
        converted = _converted(stripped, version)
        if not model.objection:
            onnx.checker.check_model(converted)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        onnx.version_converter.ConvertError,
        DecodeError,
        EncodeError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(f"{hint} ({reason})") from error
    names = [info.name for info in converted.graph.output]
    if names != [tensor.name for tensor in model.graph.outputs]:
        raise ModelError(f"{hint} (its outputs would change)")
    converted.ir_version = min(ir_version, MAX_IR_VERSION)
    _keep_notes(stripped.graph, converted.graph)
    take_over(model, converted, kept, hint)


def _converted(stripped: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Convert; if the shapes that the file states are wrong, convert without them."""
    try:
        return onnx.version_converter.convert_version(stripped, version)
    except onnx.shape_inference.InferenceError:
        bare = onnx.ModelProto()
        bare.CopyFrom(stripped)
        del bare.graph.value_info[:]
        for info in bare.graph.output:
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")
        return onnx.version_converter.convert_version(bare, version)


def take_over(
    model: Model,
    proto: onnx.ModelProto,
    kept: Sequence[tuple[gs.Constant, bool]],
    hint: str,
) -> None:
    """Replace the graph of a model by what a tool made of its skeleton.

    Args:
        model: The model.
        proto: What was made of ``model._skeleton()``; functions are not looked at.
        kept: The large weights, as the skeleton named them.
        hint: How an error begins.

    Raises:
        ModelError: The inputs of the model would change.
    """
    graph = Importer(proto, None, {}).model()
    for constant, was_input in kept:
        _put_back(graph, constant, was_input)
    required = [t.name for t in graph.inputs if not isinstance(t, gs.Constant)]
    if required != [info.name for info in model.inputs]:
        raise ModelError(f"{hint} (its inputs would change)")
    model.graph = graph
    model.ir_version = proto.ir_version
    origin = partial(model._origin, ("graph", "functions", "opset_import"))
    origin.opset_import.extend(proto.opset_import)
    model._origin = origin
    model._names = None


def _put_back(graph: Graph, constant: gs.Constant, was_input: bool) -> None:
    """Put a weight back in the place of the input that stood for it."""
    placeholder = next((t for t in graph.inputs if t.name == constant.name), None)
    if placeholder is None:
        return
    twin = Constant(constant.name, tensor_of(constant))
    for node in list({id(node): node for node in placeholder.outputs}.values()):
        for index, tensor in enumerate(node.inputs):
            if tensor is placeholder:
                node.inputs[index] = twin
    graph.outputs = [twin if t is placeholder else t for t in graph.outputs]
    graph.inputs = [
        twin if t is placeholder else t
        for t in graph.inputs
        if was_input or t is not placeholder
    ]
    twin.origin = getattr(constant, "origin", None)
    twin.origin_tensor = getattr(constant, "origin_tensor", None)
    own(graph, twin)
    if constant.outputs:
        graph.used_at_load |= {twin.name}


def fit_runtime(model: Model) -> None:
    """Do what ``Model.fit_runtime`` says."""
    newest = max(
        [
            model.opset,
            *(
                function.opset or 0
                for function in model.graph.functions
                if function.opset is not None
            ),
        ]
    )
    if newest > MAX_OPSET:
        raise ModelError(
            f"the model has opset {newest}, and onnxruntime runs at most "
            f"{MAX_OPSET}; export it again with an older opset"
        )
    if model.ir_version <= MAX_IR_VERSION:
        return
    types = {weight.data_type for weight in model.weights()}
    types.update(info.data_type for info in (*model.inputs, *model.outputs))
    for data_type in sorted(types & _NEWEST_TYPES):
        raise ModelError(
            f"the model has IR version {model.ir_version} and uses "
            f"{onnx.TensorProto.DataType.Name(data_type)}; onnxruntime loads IR "
            f"version {MAX_IR_VERSION} at most, which has no such type"
        )
    model.ir_version = MAX_IR_VERSION


def _keep_notes(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Restore the notes of graph and nodes, which the version converter drops."""
    if before.HasField("doc_string") and not after.doc_string:
        after.doc_string = before.doc_string
    if not after.metadata_props:
        after.metadata_props.extend(before.metadata_props)
    if not after.quantization_annotation:
        after.quantization_annotation.extend(before.quantization_annotation)
    notes = {tuple(node.output): node for node in before.node if node.output}
    for node in after.node:
        old = notes.get(tuple(node.output))
        if old is None or old.op_type != node.op_type:
            continue
        if old.HasField("name") and not node.name:
            node.name = old.name
        if old.HasField("doc_string") and not node.doc_string:
            node.doc_string = old.doc_string
        if not node.metadata_props:
            node.metadata_props.extend(old.metadata_props)
    for ours, theirs in ((before.input, after.input), (before.output, after.output)):
        infos = {info.name: info for info in ours}
        for info in theirs:
            if info.name in infos:
                info.CopyFrom(infos[info.name])
