"""Values that do not depend on any input: computing, merging and counting them.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxshrink.errors import ModelError
from onnxshrink.model import MAX_IR_VERSION, Model
from onnxshrink.model.exporter import _node_proto, export, is_function
from onnxshrink.model.topology import (
    Constant,
    Node,
    Variable,
    is_onnx,
    subgraphs_of,
    tensor_of,
)
from onnxshrink.rewriting.rewriter import (
    Rewriter,
    compacted,
    in_function,
    is_plain,
    is_uniform,
    stored_bytes,
)
from onnxshrink.structure.symbolic import as_array, static
from onnxshrink.tensors import (
    ArrayTensor,
    LazyTensor,
    bits_of,
    plain_bytes,
    same_bits,
)

__all__ = [
    "RANDOM",
    "adopt_constant_nodes",
    "file_bytes",
    "fold_constants",
    "fold_known_values",
    "merge_constants",
    "merge_nodes",
    "merge_values",
    "unfold_uniform",
]

Array = np.ndarray[Any, Any]

RANDOM = frozenset(
    {
        *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
        *("Multinomial", "Bernoulli"),
    }
)
"""Operators whose output differs from run to run."""
_NEVER = RANDOM | {
    # DequantizeLinear of constants is how a compressed weight is stored.
    *("Constant", "DequantizeLinear", "If", "Loop", "Scan", "SequenceMap", "Dropout"),
    *("Optional", "OptionalGetElement", "OptionalHasElement"),
    *("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"),
    *("SequenceAt", "SequenceLength", "SplitToSequence", "ConcatFromSequence"),
}
_FRAME = 3
"""About how many bytes a file has around an initializer."""
_UNFOLDED = 100
"""About how many bytes a ConstantOfShape node and its shape take, without names."""
_UNIFORM_LIMIT = 1 << 30
"""Bytes up to which a tensor of one repeated value becomes a constant."""
_WORK_LIMIT = 256 << 20
"""Largest value in between, in bytes, that onnxruntime is asked to compute."""
_INLINE = 1024
_NODE = 48
"""About the fewest bytes that a node takes in a file."""
_NATIVE = frozenset(
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    for name in (
        *("float16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
)
_BOUNDED = frozenset({"NonZero", "Compress", "Unique", "Where", "Gather", "Slice"})
"""Operators whose output is never much larger than their inputs."""


# --- Constant nodes ---------------------------------------------------------------


def adopt_constant_nodes(rewriter: Rewriter) -> int:
    """Turn Constant nodes of the main graph and its subgraphs into initializers.

    A node stays if its value is an output of its graph, or if it is in a function.
    """
    count = 0
    for graph, node in rewriter.ordered():
        if node.op != "Constant" or not is_plain(node) or is_function(graph):
            continue
        output = node.outputs[0]
        if rewriter.is_result(output):
            continue
        value = rewriter.model._constant_value(node)
        if value is None:
            continue
        constant = Constant(output.name, tensor_of(value))
        if rewriter.replace(output, constant):
            count += 1
    rewriter.flush()
    return count


# --- what follows from shapes -----------------------------------------------------


def fold_known_values(rewriter: Rewriter) -> int:
    """Replace integers that follow from static shapes alone by constants."""
    count = 0
    facts = rewriter.facts
    for _, node in rewriter.ordered():
        if not rewriter.is_live(node) or not is_onnx(node.domain):
            continue
        if node.op == "Constant" or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        value, dims = facts.values.get(output), facts.dims.get(output)
        kind = facts.types.get(output, 0)
        if value is None or dims is None or len(dims) > 1:
            continue
        if kind not in _NATIVE or rewriter.is_result(output) or not output.outputs:
            continue
        if not all(isinstance(item, int) for item in value):
            continue
        if dims and dims != (len(value),):
            continue
        constant = Constant(
            output.name, ArrayTensor(as_array(value, len(dims), kind), kind)
        )
        if rewriter.replace(output, constant):
            rewriter.note("fixed shapes made constant")
            count += 1
    rewriter.flush()
    return count


# --- evaluation -------------------------------------------------------------------


@dataclass
class _Computable:
    """What can be computed now.

    Attributes:
        nodes: Nodes whose inputs are known, producers first.
        wanted: Their outputs that other nodes or the graph's outputs read.
    """

    nodes: list[Node]
    wanted: list[gs.Tensor]


def fold_constants(rewriter: Rewriter) -> int:
    """Compute what depends on constants alone, with onnxruntime, in one go.

    Returns:
        How many nodes went.
    """
    done = _fold_uniform(rewriter)
    budget = rewriter.budget
    found = _computable(rewriter)
    if not found.wanted:
        return done
    results = _evaluate(rewriter, found.nodes, found.wanted)
    freed = _freed(rewriter, found)
    for tensor in found.wanted:
        array = results.get(tensor)
        if array is None or not tensor.inputs:
            continue
        node = tensor.inputs[0]
        values = _tensor_of_result(rewriter, tensor, array)
        added = stored_bytes(values) - freed[tensor]
        if not budget.take(added):
            why = f"its constant result would add {added} bytes, more than allowed"
            rewriter.refuse(node, why)
            continue
        before = len(rewriter.home)
        if _place(rewriter, tensor, values):
            count = max(1, before - len(rewriter.home))
            done += count
            for _ in range(count):
                rewriter.note("constant nodes computed")
    rewriter.flush()
    return done


def _place(rewriter: Rewriter, tensor: gs.Tensor, values: LazyTensor) -> bool:
    """Put a constant where a computed value was."""
    constant = Constant(tensor.name, values)
    if rewriter.replace(tensor, constant):
        return True
    node = tensor.inputs[0]
    if len(node.outputs) != 1:
        return False
    rewriter.become(node, "Constant", [], {"value": Constant("", values)})
    return True


def _tensor_of_result(
    rewriter: Rewriter, tensor: gs.Tensor, array: Array
) -> LazyTensor:
    array = np.asarray(array)
    if array.dtype.kind in "OSU":
        return ArrayTensor(array.astype(object), onnx.TensorProto.STRING)
    return ArrayTensor(compacted(array))


def _fold_uniform(rewriter: Rewriter) -> int:
    """Keep ConstantOfShape and what only reshapes it as one value with a shape."""
    count = 0
    for graph, node in rewriter.ordered():
        if not rewriter.is_live(node) or not is_plain(node) or is_function(graph):
            continue
        if len(node.outputs) != 1 or rewriter.is_result(node.outputs[0]):
            continue
        made = _uniform(rewriter, node)
        if made is None:
            continue
        name = node.outputs[0].name
        constant = Constant(name, made)
        if rewriter.replace(node.outputs[0], constant):
            rewriter.note("constant nodes computed")
            count += 1
    rewriter.flush()
    return count


def _uniform(rewriter: Rewriter, node: Node) -> LazyTensor | None:
    if node.op == "ConstantOfShape":
        shape = rewriter.integers(node.inputs[0])
        filler = node.attrs.get("value")
        if shape is None or any(dim < 0 for dim in shape):
            return None
        value: Array = np.zeros(1, np.float32)
        kind: int = onnx.TensorProto.FLOAT
        if isinstance(filler, gs.Constant):
            values = tensor_of(filler)
            value, kind = values.read().reshape(-1), values.data_type
        if value.size != 1 or kind not in _NATIVE:
            return None
    elif node.op in ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten"):
        source = rewriter.constant(node.inputs[0])
        known = static(rewriter.shape(node.outputs[0]))
        if source is None or not is_uniform(source) or known is None:
            return None
        value, kind, shape = source.read(), source.data_type, list(known)
        value = value[(slice(0, 1),) * value.ndim].reshape(-1)
    elif node.op == "Expand":
        source, wanted = (rewriter.constant(t) for t in node.inputs[:2])
        known = static(rewriter.shape(node.outputs[0]))
        if source is None or wanted is None or known is None or source.size != 1:
            return None
        value, kind, shape = source.read().reshape(-1), source.data_type, list(known)
    else:
        return None
    if plain_bytes(tuple(shape), kind) > _UNIFORM_LIMIT:
        rewriter.skip(
            node.name or node.op,
            f"its constant result would take {plain_bytes(tuple(shape), kind)} bytes",
        )
        return None
    one = value.reshape((1,) * len(shape))
    return ArrayTensor(np.broadcast_to(one, shape), kind)


def _computable(rewriter: Rewriter) -> _Computable:
    budget = rewriter.budget
    known: dict[gs.Tensor, int] = {}
    nodes: list[Node] = []
    for graph, node in rewriter.ordered():
        if node in budget.refused or not _foldable(rewriter, graph, node):
            continue
        size = 0
        for tensor in node.inputs:
            if not tensor.name and not isinstance(tensor, gs.Constant):
                continue
            values = rewriter.constant(tensor)
            if values is not None:
                size += values.nbytes
            elif tensor in known:
                size += known[tensor]
            else:
                break
        else:
            bounds = _output_bytes(rewriter, node, size)
            if bounds is None:
                continue  # a later round may know more
            if max(bounds, default=0) > max(_WORK_LIMIT, 2 * size):
                why = f"its constant result would take {max(bounds)} bytes"
                rewriter.refuse(node, why)
                continue
            nodes.append(node)
            for tensor, nbytes in zip(node.outputs, bounds, strict=True):
                known[tensor] = nbytes
    planned = set(nodes)
    wanted = [
        tensor
        for node in nodes
        for tensor in node.outputs
        if tensor.name
        and (
            rewriter.is_result(tensor)
            or any(reader not in planned for reader in tensor.outputs)
        )
    ]
    return _Computable(nodes, wanted)


def _foldable(rewriter: Rewriter, graph: gs.Graph, node: Node) -> bool:
    if node.op in _NEVER or not is_plain(node) or not node.inputs:
        return False
    if is_function(graph) or rewriter.opset(node) != rewriter.model.opset:
        return False
    if any(True for _ in subgraphs_of(node)):
        return False
    return not (rewriter.is_result(node.outputs[0]) and len(node.outputs) != 1)


def _output_bytes(rewriter: Rewriter, node: Node, read: int) -> list[int] | None:
    """Return an upper bound of the bytes of each output, ``None`` if there is none."""
    bounds: list[int] = []
    for tensor in node.outputs:
        if not tensor.name:
            bounds.append(0)
            continue
        dims = static(rewriter.shape(tensor))
        kind = rewriter.type(tensor)
        if dims is not None and kind:
            if any(dim < 0 for dim in dims):
                return None
            try:
                bounds.append(plain_bytes(dims, kind))
            except ModelError:
                return None
        elif node.op in _BOUNDED:
            bounds.append(64 * max(read, 64))
        elif node.op == "Range":
            ends = [rewriter.scalar(t) for t in node.inputs]
            if any(end is None for end in ends):
                return None
            start, limit, step = (float(end) for end in ends if end is not None)
            if not step or not np.isfinite([start, limit, step]).all():
                return None
            bounds.append(8 * max(0, int((limit - start) / step) + 1))
        else:
            return None
    return bounds


def _freed(rewriter: Rewriter, found: _Computable) -> dict[gs.Tensor, int]:
    """Return the bytes that go when each wanted value is computed.

    These are the nodes and constants that serve no other value. Where four Slices put
    the parts of a weight into another order, the Slices go and the weight goes too.
    """
    wanted = set(found.wanted)
    serves: dict[Node, gs.Tensor | None] = {}

    def only(readers: Sequence[Node]) -> gs.Tensor | None:
        """Return the one value that all these nodes serve."""
        found = {serves.get(reader) for reader in readers}
        return found.pop() if len(found) == 1 else None

    freed = dict.fromkeys(found.wanted, 0)
    counted: set[gs.Tensor] = set()
    for node in reversed(found.nodes):
        ends = {
            tensor if tensor in wanted else only(tensor.outputs)
            for tensor in node.outputs
            if tensor in wanted or tensor.outputs
        }
        serves[node] = ends.pop() if len(ends) == 1 else None
    for node in found.nodes:
        end = serves[node]
        if end is None:
            continue
        freed[end] += _NODE
        for tensor in node.inputs:
            values = rewriter.constant(tensor)
            if values is None or tensor in counted or rewriter.is_result(tensor):
                continue
            if only(tensor.outputs) is end:
                counted.add(tensor)
                freed[end] += stored_bytes(values)
    return freed


def _evaluate(
    rewriter: Rewriter,
    nodes: Sequence[Node],
    wanted: Sequence[gs.Tensor],
) -> dict[gs.Tensor, Array]:
    """Compute values in one session; if that fails, each half of them, down to one."""
    from onnxshrink.runtime import run_proto

    if not wanted:
        return {}
    proto, feeds, outputs = _program(rewriter, nodes, wanted)
    try:
        values = run_proto(proto, feeds)
    except ModelError as error:
        if len(wanted) == 1:
            node = wanted[0].inputs[0]
            rewriter.refuse(node, f"not computed: {error}")
            return {}
        middle = len(wanted) // 2
        return {
            **_evaluate(rewriter, nodes, wanted[:middle]),
            **_evaluate(rewriter, nodes, wanted[middle:]),
        }
    return {
        tensor: value
        for tensor, value in zip(outputs, values, strict=True)
        if isinstance(value, np.ndarray)
    }


def _program(
    rewriter: Rewriter, nodes: Sequence[Node], wanted: Sequence[gs.Tensor]
) -> tuple[onnx.ModelProto, dict[str, Array], list[gs.Tensor]]:
    """Return a model that computes the wanted values, and what to feed it."""
    needed: set[gs.Node] = set()
    stack = [tensor.inputs[0] for tensor in wanted]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        for tensor in node.inputs:
            if rewriter.constant(tensor) is None:
                stack.extend(tensor.inputs)
    graph = onnx.GraphProto(name="constants")
    feeds: dict[str, Array] = {}
    names: dict[gs.Tensor, str] = {}

    def name_of(tensor: gs.Tensor) -> str:
        if not tensor.name and not isinstance(tensor, gs.Constant):
            return ""
        known = names.get(tensor)
        if known is not None:
            return known
        name = names[tensor] = f"t{len(names)}"
        values = rewriter.constant(tensor)
        if values is None:
            return name
        if values.nbytes > _INLINE and values.data_type in _NATIVE:
            graph.input.append(
                onnx.helper.make_tensor_value_info(name, values.data_type, values.shape)
            )
            feeds[name] = np.ascontiguousarray(values.read())
        else:
            graph.initializer.append(_tensor_proto(name, values))
        return name

    for node in nodes:
        if node not in needed:
            continue
        proto = graph.node.add()
        proto.CopyFrom(_node_proto(node))
        proto.name = proto.doc_string = ""
        del proto.input[:]
        del proto.output[:]
        proto.input.extend(name_of(tensor) for tensor in node.inputs)
        proto.output.extend(name_of(tensor) for tensor in node.outputs)
    for tensor in wanted:
        graph.output.add(name=names[tensor])
    model = onnx.ModelProto(
        ir_version=min(max(rewriter.model.ir_version, 4), MAX_IR_VERSION), graph=graph
    )
    for domain, version in rewriter.model.opsets.items():
        model.opset_import.add(domain=domain, version=version)
    return model, feeds, list(wanted)


def _tensor_proto(name: str, values: LazyTensor) -> onnx.TensorProto:
    if values.data_type == onnx.TensorProto.STRING:
        proto = onnx.TensorProto(
            name=name, dims=values.shape, data_type=values.data_type
        )
        for text in values.read().reshape(-1):
            proto.string_data.append(
                text if isinstance(text, bytes) else str(text).encode()
            )
        return proto
    proto = onnx.TensorProto(name=name, dims=values.shape, data_type=values.data_type)
    if bits_of(values.data_type) < 8:
        return numpy_helper.from_array(np.ascontiguousarray(values.read()), name)
    proto.raw_data = b"".join(bytes(chunk) for chunk in values.raw_chunks())
    return proto


# --- bytes ------------------------------------------------------------------------


def file_bytes(model: Model, *, uniform: bool = True) -> int:
    """Return about how many bytes the model takes with plain weights.

    Args:
        model: The model.
        uniform: Count tensors of one repeated value in full, else as ConstantOfShape.
    """
    parts = export(model)
    total = parts.head.ByteSize() + parts.tail.ByteSize()
    for piece in parts.pieces:
        total += piece.header.ByteSize() + _FRAME
        if piece.tensor is None:
            continue
        nbytes = piece.tensor.nbytes
        if not uniform and is_uniform(piece.tensor):
            nbytes = min(nbytes, _UNFOLDED + 3 * len(piece.header.name))
        total += nbytes
    return total


def unfold_uniform(rewriter: Rewriter, excess: int) -> int:
    """Write tensors of one repeated value as ConstantOfShape, until a file fits.

    Args:
        rewriter: The model; equal constants have been merged.
        excess: Bytes that have to go; the largest tensors go first.

    Returns:
        How many nodes were put in.
    """
    if rewriter.model.opset < 9:
        return 0
    found: dict[gs.Constant, LazyTensor] = {}
    for node in rewriter.nodes():
        for tensor in node.inputs:
            values = rewriter.constant(tensor)
            if (
                values is not None
                and isinstance(tensor, gs.Constant)
                and is_uniform(values)
                and values.data_type in _NATIVE
            ):
                found[tensor] = values
    count = 0
    order = sorted(found, key=lambda tensor: (-found[tensor].nbytes, tensor.name))
    for tensor in order:
        values = found[tensor]
        gain = values.nbytes - _UNFOLDED - 3 * len(tensor.name)
        if excess <= 0 or gain <= 0:
            break
        readers = [node for node in tensor.outputs if rewriter.is_live(node)]
        if any(in_function(rewriter, node) for node in readers):
            continue
        _unfold(rewriter, tensor, values)
        excess -= gain
        count += 1
    return count


def _unfold(rewriter: Rewriter, tensor: gs.Constant, values: LazyTensor) -> None:
    model = rewriter.model
    name = tensor.name
    tensor.name = model.fresh(name)
    shape = rewriter.add_constant(f"{name}_shape", np.array(values.shape, np.int64))
    one = ArrayTensor(np.array(values.read().reshape(-1)[:1]), values.data_type)
    output = Variable(name)
    node = Node(
        "ConstantOfShape",
        "",
        {"value": Constant("", one)},
        [shape],
        [output],
    )
    # In front, so that it is computed before whatever reads it.
    model.graph.nodes.insert(0, node)
    rewriter.home[node] = model.graph
    rewriter.is_sorted = False
    rewriter.facts.describe(output, values.data_type, values.shape)
    rewriter.replace(tensor, output)


# --- merging ----------------------------------------------------------------------


def merge_constants(rewriter: Rewriter) -> int:
    """Merge constants of the same type, shape and bits.

    Only those that agree in shape and in their first bytes are read whole.
    """
    model = rewriter.model
    owner: dict[gs.Tensor, gs.Graph] = {}
    found: dict[gs.Tensor, None] = {}
    inside: set[gs.Tensor] = set()
    for graph in model.graphs():
        for constant in getattr(graph, "initializers", {}).values():
            owner[constant] = graph
    for node in rewriter.nodes():
        for tensor in node.inputs:
            if rewriter.constant(tensor) is None or not isinstance(tensor, gs.Constant):
                continue
            found.setdefault(tensor)
            if is_function(rewriter._root[rewriter.home[node]]):
                inside.add(tensor)
    groups: dict[Any, list[gs.Constant]] = {}
    for tensor in found:
        if rewriter.is_result(tensor) or tensor in inside:
            continue
        values = tensor_of(tensor)
        key = (values.data_type, values.shape, _first_bytes(values))
        groups.setdefault(key, []).append(tensor)
    count = 0
    for group in groups.values():
        if len(group) < 2:
            continue
        main = model.graph
        kept: dict[bytes, list[gs.Constant]] = {}
        # What the main graph owns is visible everywhere.
        group.sort(key=lambda tensor: owner.get(tensor, main) is not main)
        for tensor in group:
            candidates = kept.setdefault(_digest(tensor_of(tensor)), [])
            for other in candidates:
                visible = owner.get(other, main) in (main, owner.get(tensor, main))
                if visible and same_bits(tensor_of(other), tensor_of(tensor)):
                    rewriter.replace(tensor, other)
                    rewriter.note("equal constants merged")
                    count += 1
                    break
            else:
                candidates.append(tensor)
    return count


def _first_bytes(values: LazyTensor) -> bytes:
    if values.data_type == onnx.TensorProto.STRING:
        return repr(values.read().reshape(-1)[:4].tolist()).encode()
    if is_uniform(values):
        flat = values.read().reshape(-1)[:512]
        return flat.tobytes()[:512]
    for chunk in values.raw_chunks(512):
        return bytes(chunk)[:512]
    return b""


def _digest(values: LazyTensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if values.data_type == onnx.TensorProto.STRING:
        digest.update(repr(values.read().tolist()).encode())
    elif is_uniform(values):
        # The digest is that of a copy of all elements, and there is no copy.
        one = values.read().reshape(-1)[:1].tobytes()
        whole, rest = divmod(values.size, 1 << 16)
        piece = one * (1 << 16)
        for _ in range(whole):
            digest.update(piece)
        digest.update(one * rest)
    else:
        for chunk in values.raw_chunks():
            digest.update(chunk)
    return digest.digest()


def _attribute_key(value: Any) -> Any:
    """Return something hashable that is equal for equal attribute values."""
    if isinstance(value, gs.Graph):
        raise TypeError("a graph is not compared")
    if isinstance(value, gs.Constant):
        values = tensor_of(value)
        return values.data_type, values.shape, _digest(values)
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        return tuple(_attribute_key(item) for item in value)
    if isinstance(value, onnx.AttributeProto):
        return value.SerializeToString(deterministic=True)
    return type(value), value


def _input_key(rewriter: Rewriter, tensor: gs.Tensor) -> Any:
    if not tensor.name and not isinstance(tensor, gs.Constant):
        return None
    values = rewriter.constant(tensor)
    if values is None or values.nbytes > 1024 or not isinstance(tensor, gs.Constant):
        return tensor
    if values.data_type == onnx.TensorProto.STRING:
        return tensor
    array = rewriter.array(tensor)
    assert array is not None
    return values.data_type, values.shape, array.tobytes()


def merge_nodes(rewriter: Rewriter) -> int:
    """Merge nodes of a graph that have the same operator, attributes and inputs."""
    count = 0
    seen: dict[Any, Node] = {}
    for graph, node in rewriter.ordered():
        if not rewriter.is_live(node) or not is_plain(node):
            continue
        if node.op in RANDOM or node.op in ("Dropout", "Constant"):
            continue
        try:
            attrs = tuple(
                (name, _attribute_key(value))
                for name, value in sorted(node.attrs.items())
            )
        except TypeError:
            continue
        inputs = tuple(_input_key(rewriter, tensor) for tensor in node.inputs)
        key = (graph, node.op, attrs, inputs, len(node.outputs))
        other = seen.setdefault(key, node)
        if other is node or not rewriter.is_live(other):
            seen[key] = node
            continue
        used = rewriter.outputs_used(node)
        pairs = [(node.outputs[index], other.outputs[index]) for index in used]
        fits = all(
            twin.name and rewriter.can_replace(tensor, twin) for tensor, twin in pairs
        )
        if not fits:
            continue
        for tensor, twin in pairs:
            rewriter.replace(tensor, twin)
        rewriter.note("equal nodes merged")
        count += 1
    rewriter.flush()
    return count


def merge_values(rewriter: Rewriter) -> int:
    """Merge integer tensors that hold the same dimensions, however computed."""
    count = 0
    facts = rewriter.facts
    seen: dict[Any, gs.Tensor] = {}
    for graph, node in rewriter.ordered():
        if not rewriter.is_live(node) or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        value, dims = facts.values.get(output), facts.dims.get(output)
        kind = facts.types.get(output, 0)
        if value is None or dims is None or not kind or len(dims) > 1:
            continue
        key = (graph, kind, len(dims), value)
        other = seen.setdefault(key, output)
        if other is output or not other.inputs:
            seen[key] = output  # the other node went with an earlier merge
            continue
        if rewriter.replace(output, other):
            rewriter.note("equal shapes merged")
            count += 1
    rewriter.flush()
    return count


_FLUSHED_BY = frozenset(
    {"Add", "Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}
)
"""Operators to which a number below 1.2e-38 adds nothing that float32 could show."""


def flush_subnormals(model: Model) -> int:
    """Set float32 weights to zero that are too small to be normal numbers.

    A processor takes a hundred times as long for each product with one of them. Only
    weights are touched that products and sums alone read.

    Returns:
        How many entries are zero now.
    """
    count = 0
    for weight in list(model.weights()):
        if weight.data_type != onnx.TensorProto.FLOAT or weight.is_input:
            continue
        readers = [node for node, _ in weight.uses]
        if weight.is_output or not readers:
            continue
        if not all(n.op in _FLUSHED_BY and is_onnx(n.domain) for n in readers):
            continue
        found = sum(int(_subnormal(chunk).sum()) for chunk in weight.chunks())
        if found:
            values = weight.read().copy()
            values[_subnormal(values)] = 0
            model.set_weight(weight, values)
            count += found
    return count


def _subnormal(values: Array) -> Array:
    smallest = np.finfo(np.float32).smallest_normal
    return np.asarray((values != 0) & (np.abs(values) < smallest))
