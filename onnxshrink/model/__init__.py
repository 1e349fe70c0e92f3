"""Model: a graph to edit, tensors that stay where they are, lossless load and save."""

from __future__ import annotations

from onnxshrink.model.model import Model
from onnxshrink.model.reading import SupportsModelProto
from onnxshrink.model.saving import External, Storage
from onnxshrink.model.topology import (
    Constant,
    Function,
    Graph,
    Node,
    Variable,
)
from onnxshrink.model.versions import MAX_IR_VERSION, MAX_OPSET
from onnxshrink.model.weight import ValueInfo, Weight, attribute

__all__ = [
    "Constant",
    "External",
    "Function",
    "Graph",
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "Model",
    "Node",
    "Storage",
    "SupportsModelProto",
    "ValueInfo",
    "Variable",
    "Weight",
    "attribute",
]
