"""Model: a graph to edit, tensors that stay where they are, lossless load and save."""

from __future__ import annotations

from onnxshrink.model.model import (
    MAX_IR_VERSION,
    MAX_OPSET,
    External,
    Model,
    Storage,
    SupportsModelProto,
    ValueInfo,
    Weight,
    attribute,
)
from onnxshrink.model.topology import (
    Constant,
    Function,
    Graph,
    Node,
    Variable,
)

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
