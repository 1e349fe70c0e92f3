"""An independent copy of a topology that shares the values of its tensors.

Tested in tests/model/test_model.py.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from onnxshrink.model.topology import (
    Constant,
    Function,
    FunctionList,
    Graph,
    Node,
    Variable,
    adopt_graph,
    own,
    tensor_of,
)

__all__ = ["clone_graph"]


def clone_graph(graph: gs.Graph) -> Graph:
    """Return a copy of a main graph with its subgraphs and functions."""
    functions = FunctionList()
    for function in graph.functions:
        adopt_graph(function)
        mapping: dict[int, Any] = {}
        twin = Function(
            function.name,
            domain=function.domain,
            doc_string=function.doc_string,
            opset=function.opset,
            import_domains=function.import_domains,
            attrs=dict(function.attrs),
        )
        twin.origin = getattr(function, "origin", None)
        twin.overload = getattr(function, "overload", "")
        twin.value_infos = list(function.value_infos)
        _fill(twin, function, mapping, functions)
        functions.append(twin)
    twin_graph = _graph(graph, {}, functions)
    twin_graph.opset = graph.opset
    twin_graph.import_domains = graph.import_domains
    twin_graph.ir_version = graph.ir_version
    twin_graph.producer_name = graph.producer_name
    twin_graph.producer_version = graph.producer_version
    return twin_graph


def _tensor(tensor: gs.Tensor, mapping: dict[int, Any]) -> gs.Tensor:
    if not tensor.name and not isinstance(tensor, gs.Constant):
        return Variable.empty()
    found = mapping.get(id(tensor))
    if found is not None:
        return found
    if isinstance(tensor, gs.Constant):
        twin: Any = Constant(tensor.name, tensor_of(tensor))
        twin.__dict__["origin"] = getattr(tensor, "origin", None)
        twin.__dict__["origin_tensor"] = getattr(tensor, "origin_tensor", None)
        if "_is_new" in tensor.__dict__:
            twin.__dict__["_is_new"] = True
    else:
        shape = None if tensor.shape is None else list(tensor.shape)
        twin = Variable(tensor.name, tensor.dtype, shape)
        twin.__dict__["origin"] = getattr(tensor, "origin", None)
        twin.__dict__["origin_info"] = getattr(tensor, "origin_info", None)
    mapping[id(tensor)] = twin
    return twin


def _graph(
    graph: gs.Graph, mapping: dict[int, Any], functions: list[Function]
) -> Graph:
    adopt_graph(graph)
    twin = Graph(name=graph.name, doc_string=graph.doc_string)
    twin.opset = graph.opset
    twin.origin = graph.origin
    twin.used_at_load = graph.used_at_load
    twin.input_info = dict(graph.input_info)
    twin.output_info = dict(graph.output_info)
    twin.value_infos = list(graph.value_infos)
    _fill(twin, graph, mapping, functions)
    return twin


def _fill(
    twin: Graph | Function,
    graph: gs.Graph,
    mapping: dict[int, Any],
    functions: list[Function],
) -> None:
    twin._functions = functions
    for key, constant in graph.initializers.items():
        own(twin, _tensor(constant, mapping), key)
    twin.inputs = [_tensor(tensor, mapping) for tensor in graph.inputs]
    for node in graph.nodes:
        for tensor in node.outputs:
            _tensor(tensor, mapping)
    nodes: list[Node] = []
    for node in graph.nodes:
        copied = Node(
            node.op,
            node.name,
            {k: _value(v, mapping, functions) for k, v in node.attrs.items()},
            [_tensor(tensor, mapping) for tensor in node.inputs],
            [_tensor(tensor, mapping) for tensor in node.outputs],
            node.domain,
        )
        copied.__dict__["origin"] = getattr(node, "origin", None)
        overload = getattr(node, "overload", "")
        if overload:
            copied.overload = overload
        before = getattr(node, "origin_attrs", None)
        if before is not None:
            copied.origin_attrs = {
                key: copied.attrs[key]
                if value is node.attrs.get(key) and isinstance(value, gs.Constant)
                else value
                for key, value in before.items()
            }
        nodes.append(copied)
    twin.nodes.load(nodes)
    twin.outputs = [_tensor(tensor, mapping) for tensor in graph.outputs]


def _value(value: Any, mapping: dict[int, Any], functions: list[Function]) -> Any:
    if isinstance(value, gs.Graph):
        return _graph(value, mapping, functions)
    if isinstance(value, gs.Constant):
        return _tensor(value, {})
    if isinstance(value, list):
        return [_value(item, mapping, functions) for item in value]
    return value
