"""Rewriting a graph by rules: an index of who reads what, edits, and a worklist.

A rule is a function of one operator: it looks at a node and what surrounds it, and
either changes the graph and says so, or leaves it alone. Rules are run until none has
anything left to do; only the neighbourhood of a change is looked at again.

Tested in tests/passes/test_fold.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxshrink.model import Model, Node
from onnxshrink.model.exporter import in_order, is_function
from onnxshrink.model.topology import (
    Constant,
    Variable,
    is_onnx,
    subgraphs_of,
    tensor_of,
)
from onnxshrink.structure.symbolic import Dims, Facts, facts_of
from onnxshrink.tensors import ArrayTensor, LazyTensor, SparseTensor

__all__ = ["Budget", "Rewriter", "Rule", "RuleSet", "is_uniform", "stored_bytes"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rule:
    """A rewrite and the operators it starts from.

    Attributes:
        name: What it does, in a few words; notes are counted under it.
        ops: Operators of the node it is called with.
        apply: ``apply(rewriter, node)`` returns whether it changed the graph.
    """

    name: str
    ops: tuple[str, ...]
    apply: Callable[[Rewriter, Node], bool]


class RuleSet:
    """A table of rules by operator."""

    def __init__(self) -> None:
        """Start without rules."""
        self.rules: list[Rule] = []

    def rule(
        self, name: str, *ops: str
    ) -> Callable[[Callable[[Rewriter, Node], bool]], Callable[[Rewriter, Node], bool]]:
        """Register the decorated function for nodes of these operators."""

        def register(
            function: Callable[[Rewriter, Node], bool],
        ) -> Callable[[Rewriter, Node], bool]:
            self.rules.append(Rule(name, ops, function))
            return function

        return register


def is_uniform(tensor: LazyTensor) -> bool:
    """Whether one stored value stands for all elements (strides are zero)."""
    return (
        isinstance(tensor, ArrayTensor)
        and tensor.size > 1
        and not any(
            stride
            for stride, dim in zip(tensor.array.strides, tensor.shape, strict=True)
            if dim > 1
        )
    )


def stored_bytes(tensor: LazyTensor) -> int:
    """Return the bytes a constant takes; a uniform one takes those of one element.

    A uniform tensor can be written as a single value and ConstantOfShape.
    """
    if isinstance(tensor, SparseTensor):
        return int(tensor.tensor.ByteSize())
    return tensor.dtype.itemsize if is_uniform(tensor) else tensor.nbytes


def compacted(array: Array) -> Array:
    """Return a broadcast view of one element where all elements have the same bits."""
    if array.size < 64 or array.dtype.kind == "O":
        return array
    flat = array.reshape(-1)
    raw = flat[:64].tobytes()
    if raw != raw[: array.itemsize] * 64:
        return array
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.itemsize)
    if width is None:
        return array
    bits = np.ascontiguousarray(flat).view(width)
    if (bits != bits[0]).any():
        return array
    return np.broadcast_to(flat[:1].reshape((1,) * array.ndim), array.shape)


class Budget:
    """How many bytes constants may still add to the file.

    Attributes:
        left: Bytes that may still be added.
        refused: Nodes that are not to be computed.
        is_final: Whether a refusal is for good, so that it is said.
    """

    def __init__(self, left: int = 1 << 62, *, is_final: bool = True) -> None:
        """Start with so many bytes."""
        self.left = left
        self.refused: set[gs.Node] = set()
        self.is_final = is_final

    def take(self, added: int) -> bool:
        """Spend bytes if there are as many; what saves bytes is always allowed."""
        if added > max(0, self.left):
            return False
        self.left -= max(0, added)
        return True


class Rewriter:
    """A model that is being rewritten, and an index of what rules ask about it.

    Attributes:
        model: The model, edited in place.
        facts: Types, shapes and small values; call ``refresh`` to infer them again.
        home: The graph each live node stands in.
        counts: How often each kind of rewrite was done.
        budget: What constants may still add to the file.
        overridable: Inputs with a default value, which count as unknown.
    """

    def __init__(
        self, model: Model, skipped: Callable[[str, str], None] | None = None
    ) -> None:
        """Index a model."""
        self.model = model
        self.counts: dict[str, int] = {}
        self.budget = Budget()
        self.home: dict[gs.Node, gs.Graph] = {}
        self.facts = Facts()
        self._opsets: dict[gs.Graph, int] = {}
        self._root: dict[gs.Graph, gs.Graph] = {}
        self._results: dict[gs.Tensor, list[gs.Graph]] = {}
        self._dead: set[gs.Node] = set()
        self._said: set[tuple[str, str]] = set()
        self._skipped = skipped
        self._queue: deque[gs.Node] = deque()
        self._queued: set[gs.Node] = set()
        self._values: dict[gs.Tensor, Array] = {}
        self.is_sorted = False
        self.overridable = {
            tensor for tensor in model.graph.inputs if isinstance(tensor, gs.Constant)
        }
        self.index()

    # --- index --------------------------------------------------------------------

    def index(self) -> None:
        """Look at the whole model again, after an edit that went around this class."""
        self.is_sorted = False
        self.home.clear()
        self._results.clear()
        self._opsets.clear()
        self._root.clear()

        def visit(graph: gs.Graph, root: gs.Graph, opset: int) -> None:
            self._opsets[graph] = opset
            self._root[graph] = root
            for tensor in graph.outputs:
                self._results.setdefault(tensor, []).append(graph)
            for node in graph.nodes:
                self.home[node] = graph
                for subgraph in subgraphs_of(node):
                    visit(subgraph, root, opset)

        main = self.model.graph
        visit(main, main, self.model.opset)
        for function in main.functions:
            opset = getattr(function, "opset", None) or self.model.opset
            visit(function, function, int(opset))

    def refresh(self) -> None:
        """Infer types, shapes and values of the model as it is now."""
        self.flush()
        self.facts = facts_of(self.model, self.overridable)

    def flush(self) -> None:
        """Take erased nodes out of the graphs' lists, all at once."""
        if not self._dead:
            return
        for graph in list(self._opsets):
            if any(node in self._dead for node in graph.nodes):
                graph.nodes.keep([n for n in graph.nodes if n not in self._dead])
        self._dead.clear()

    def ordered(self) -> list[tuple[gs.Graph, Node]]:
        """Return every node with its graph, each behind what it reads.

        Nodes of a subgraph stand behind the node that has it. Bodies of model-local
        functions come last, without the subgraphs inside them.
        """
        self.flush()
        found: list[tuple[gs.Graph, Node]] = []

        def visit(graph: gs.Graph, inner: bool) -> None:
            if not self.is_sorted:
                order = list(in_order(graph.nodes))
                if any(a is not b for a, b in zip(order, graph.nodes, strict=True)):
                    graph.nodes[:] = order
            for node in graph.nodes:
                found.append((graph, node))
                if inner:
                    for subgraph in subgraphs_of(node):
                        visit(subgraph, True)

        visit(self.model.graph, True)
        for function in self.model.graph.functions:
            visit(function, False)
        self.is_sorted = True
        return found

    def opset(self, node: gs.Node) -> int:
        """Return the ai.onnx opset a node is written in."""
        return self._opsets[self.home[node]]

    def nodes(self) -> list[Node]:
        """Return all live nodes, of all graphs."""
        return [node for node in self.home if node not in self._dead]

    def is_live(self, node: gs.Node) -> bool:
        """Whether a node is still in the model."""
        return node in self.home and node not in self._dead

    # --- looking ------------------------------------------------------------------

    def shape(self, tensor: gs.Tensor) -> Dims | None:
        """Return a tensor's dimensions, ``None`` for unknown rank."""
        return self.facts.shape(tensor)

    def rank(self, tensor: gs.Tensor) -> int | None:
        """Return a tensor's rank if known."""
        dims = self.facts.shape(tensor)
        return None if dims is None else len(dims)

    def type(self, tensor: gs.Tensor) -> int:
        """Return a tensor's element type, 0 if unknown."""
        return self.facts.type(tensor)

    def constant(self, tensor: gs.Tensor | None) -> LazyTensor | None:
        """Return the values of a tensor that nobody can override, else ``None``."""
        if isinstance(tensor, gs.Constant):
            return None if tensor in self.overridable else tensor_of(tensor)
        node = self.producer(tensor, "Constant")
        value = None if node is None else node.attrs.get("value")
        return tensor_of(value) if isinstance(value, gs.Constant) else None

    def array(self, tensor: gs.Tensor | None, limit: int = 1 << 40) -> Array | None:
        """Return a constant's values if it takes at most ``limit`` bytes.

        Small ones are kept, so asking again costs nothing.
        """
        values = self.constant(tensor)
        if values is None or tensor is None or values.nbytes > limit:
            return None
        found = self._values.get(tensor)
        if found is None:
            found = values.read()
            if values.nbytes <= 4096:
                self._values[tensor] = found
        return found

    def scalar(self, tensor: gs.Tensor | None) -> float | None:
        """Return the one value of a numeric constant with a single element."""
        values = self.constant(tensor)
        if values is None or values.size != 1 or values.dtype.kind in "Ocb":
            return None
        found = self.array(tensor)
        return None if found is None else float(found.reshape(-1)[0])

    def integers(self, tensor: gs.Tensor | None) -> list[int] | None:
        """Return a small integer constant as a list."""
        values = self.constant(tensor)
        if values is None or values.size > 4096 or values.dtype.kind not in "iu":
            return None
        found = self.array(tensor)
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def input(self, node: gs.Node, index: int) -> gs.Tensor | None:
        """Return an input, ``None`` where it is absent or left out."""
        if index >= len(node.inputs):
            return None
        tensor = node.inputs[index]
        return tensor if tensor.name or isinstance(tensor, gs.Constant) else None

    def producer(self, tensor: gs.Tensor | None, op: str = "") -> Node | None:
        """Return the node a tensor comes from, if it is of ONNX's own operator ``op``.

        ``None`` if nothing in the model computes it, or if attributes of the node are
        references to those of a function.
        """
        if tensor is None or isinstance(tensor, gs.Constant) or not tensor.inputs:
            return None
        node: Node = tensor.inputs[0]
        if op and not (node.op == op and is_plain(node)):
            return None
        return node

    def is_result(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is an output of a graph."""
        return tensor in self._results

    def only_reader(self, tensor: gs.Tensor) -> Node | None:
        """Return the node that alone reads a tensor, in the graph of its producer.

        ``None`` if there is no such node; an output of a graph has other readers.
        """
        if tensor in self._results or len(tensor.outputs) != 1:
            return None
        reader: Node = tensor.outputs[0]
        if tensor.inputs and self.home.get(tensor.inputs[0]) is not self.home.get(
            reader
        ):
            return None
        return reader

    def is_only_for(self, tensor: gs.Tensor, node: gs.Node) -> bool:
        """Whether a tensor is computed for ``node`` alone, in the same graph."""
        return self.only_reader(tensor) is node

    def outputs_used(self, node: gs.Node) -> list[int]:
        """Return the indices of outputs that something reads."""
        return [
            index
            for index, tensor in enumerate(node.outputs)
            if tensor.name and (tensor.outputs or tensor in self._results)
        ]

    # --- editing ------------------------------------------------------------------

    def note(self, what: str) -> None:
        """Count a rewrite under its name."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def skip(self, where: str, why: str) -> None:
        """Say once that something was left alone, and why."""
        if self._skipped is not None and (where, why) not in self._said:
            self._said.add((where, why))
            self._skipped(where, why)

    def refuse(self, node: gs.Node, why: str) -> None:
        """Leave a node alone as long as the budget is the same."""
        self.budget.refused.add(node)
        if self.budget.is_final:
            self.skip(node.name or node.op, why)

    def add_constant(self, name: str, array: Array | LazyTensor) -> Constant:
        """Make a constant under an unused name; it is written if something reads it."""
        values = array if isinstance(array, LazyTensor) else ArrayTensor(array)
        return Constant(self.model.fresh(name), values)

    def touch(self, *nodes: gs.Node) -> None:
        """Have rules look at nodes again."""
        for node in nodes:
            if node not in self._queued and self.is_live(node):
                self._queued.add(node)
                self._queue.append(node)

    def touch_around(self, node: gs.Node) -> None:
        """Have rules look at a node, what it reads and what reads it."""
        self.touch(node)
        for tensor in node.inputs:
            self.touch(*tensor.inputs)
        for tensor in node.outputs:
            self.touch(*tensor.outputs)

    def set_input(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Let a node read another tensor; erase what only computed the old one."""
        old = node.inputs[index]
        if old is tensor:
            return
        self.is_sorted = False
        node.inputs[index] = tensor
        self.touch(node)
        self.sweep(old)

    def set_array(
        self, node: gs.Node, index: int, array: Array, name: str = ""
    ) -> None:
        """Let a node read these values instead of a constant, or as another input.

        A constant that nothing else reads keeps its name. Elsewhere a new one is made
        from its name, or from ``name`` where there was none.
        """
        old = node.inputs[index] if index < len(node.inputs) else None
        known = isinstance(old, gs.Constant)
        if old is None or not (known or old.name):
            constant = self.add_constant(name, array)
            if old is None:
                node.inputs.append(constant)
            else:
                node.inputs[index] = constant
            self.touch(node)
        elif (
            known
            and len(old.outputs) == 1
            and not (old in self.overridable or old in self._results)
        ):
            old._values = ArrayTensor(array)
            self._values.pop(old, None)
            self.facts.values.pop(old, None)
            self.touch(node)
        else:
            self.set_input(node, index, self.add_constant(old.name, array))

    def set_inputs(self, node: gs.Node, tensors: Sequence[gs.Tensor]) -> None:
        """Give a node other inputs; erase what only computed the old ones."""
        old = list(node.inputs)
        self.is_sorted = False
        node.inputs.clear()
        node.inputs.extend(tensors)
        self.touch(node)
        for tensor in old:
            self.sweep(tensor)

    def sweep(self, tensor: gs.Tensor) -> None:
        """Erase the producer of a tensor that nothing reads, and so on upwards."""
        stack = [tensor]
        while stack:
            current = stack.pop()
            if current.outputs or current in self._results:
                if len(current.outputs) == 1:
                    # A rule may now apply to the one reader that is left.
                    self.touch(*current.outputs, *current.inputs)
                continue
            for node in list(current.inputs):
                if self.is_live(node) and not self.outputs_used(node):
                    stack.extend(self._erase(node))

    def _erase(self, node: gs.Node) -> list[gs.Tensor]:
        read = list(node.inputs)
        for graph in subgraphs_of(node):
            for tensor in graph.outputs:
                self._results.pop(tensor, None)
                read.append(tensor)
            for inner in list(graph.nodes):
                if self.is_live(inner):
                    read.extend(self._erase(inner))
        self._dead.add(node)
        self.home.pop(node, None)
        node.inputs.clear()
        node.outputs.clear()
        return read

    def erase(self, node: gs.Node) -> None:
        """Erase a node that nothing needs, and what only computed its inputs."""
        for tensor in self._erase(node):
            self.sweep(tensor)

    def can_replace(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Whether everything that reads ``old`` could read ``new`` instead."""
        results = self._results.get(old, [])
        if not results:
            return True
        if isinstance(new, gs.Constant) or not new.inputs or new in self._results:
            return False
        home = self.home.get(new.inputs[0])
        return len(results) == 1 and results[0] is home

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Let everything that reads ``old`` read ``new``; erase what computed ``old``.

        An output of the model keeps its name: the new tensor takes it over. A new
        tensor that a rule made is what ``old`` was, see ``Lineage``; where ``new`` was
        there before and means something else from now on, call ``supplant``.

        Returns:
            Whether it was possible. It is not where ``old`` is an output and ``new`` is
            a constant, an input, from another graph or an output itself.
        """
        if old is new or not self.can_replace(old, new):
            return False
        if self.model.lineage.is_new(new.name):
            self.model.lineage.replace(old.name, new.name)
        for graph in self._results.pop(old, []):
            for index, tensor in enumerate(graph.outputs):
                if tensor is old:
                    graph.outputs[index] = new
            self._results.setdefault(new, []).append(graph)
            self._take_name(old, new)
        self.is_sorted = False
        for node in list(dict.fromkeys(old.outputs)):
            # Some nodes read thousands of tensors, so let the list itself search.
            for _ in range(node.inputs.count(old)):
                node.inputs[node.inputs.index(old)] = new
            self.touch(node)
        for node in list(new.inputs):
            self.touch(node)
        self.sweep(old)
        return True

    def supplant(self, old: gs.Tensor, new: gs.Tensor) -> bool:
        """Replace ``old`` by ``new``, which was there before and now equals ``old``.

        The output of a Conv does, once the BatchNormalization behind it is folded in.
        """
        if not self.can_replace(old, new):
            return False
        self.model.lineage.replace(old.name, new.name)
        return self.replace(old, new)

    def _take_name(self, old: gs.Tensor, new: gs.Tensor) -> None:
        name = old.name
        old.name = self.model.fresh(name)
        self.model.lineage.replace(name, old.name)
        new.name = name
        if isinstance(old, Variable) and isinstance(new, Variable):
            new.dtype, new.shape = old.dtype, old.shape
            new.origin, new.origin_info = old.origin, old.origin_info

    def insert(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        near: gs.Node,
        *,
        attrs: Mapping[str, Any] | None = None,
        data_type: int = 0,
        dims: Dims | None = None,
    ) -> Variable:
        """Add a node to the graph of ``near`` and return its one output."""
        graph = self.home[near]
        label = self.model.fresh(f"{near.name or near.op}/{op}")
        output = Variable(self.model.fresh(f"{label}_out"))
        node = Node(op, label, dict(attrs or {}), list(inputs), [output], None)
        graph.nodes.append(node)
        self.is_sorted = False
        self.home[node] = graph
        self.facts.describe(output, data_type, dims)
        self.touch_around(node)
        return output

    def become(
        self,
        node: gs.Node,
        op: str,
        inputs: Sequence[gs.Tensor],
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Change operator, inputs and attributes of a node; its outputs stay."""
        node.op = op
        node.domain = None
        node.attrs.clear()
        node.attrs.update(attrs or {})
        self.set_inputs(node, inputs)
        self.touch_around(node)

    # --- running ------------------------------------------------------------------

    def run(self, rules: Iterable[Rule], start: Iterable[gs.Node] | None = None) -> int:
        """Apply rules until none has anything left to do; return how many were done."""
        table: dict[str, list[Rule]] = {}
        for rule in rules:
            for op in rule.ops:
                table.setdefault(op, []).append(rule)
        self.touch(*(self.nodes() if start is None else start))
        done = 0
        # Two rules that undo each other are a bug, which must not run for ever.
        patience = 200 * (len(self._queue) + 100)
        while self._queue and patience > 0:
            patience -= 1
            node = self._queue.popleft()
            self._queued.discard(node)
            if not self.is_live(node) or not is_plain(node):
                continue
            if (
                in_function(self, node)
                and self._root[self.home[node]] is not self.home[node]
            ):
                continue  # there is no place to put a new constant
            for rule in table.get(node.op, ()):
                if rule.apply(self, node):
                    done += 1
                    self.note(rule.name)
                    if self.is_live(node):
                        self.touch_around(node)
                    break
        self._queue.clear()
        self._queued.clear()
        self.flush()
        return done


def is_plain(node: gs.Node) -> bool:
    """Whether a node is of ONNX's own domain and its attributes are all known."""
    return is_onnx(node.domain) and not any(
        isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values()
    )


def in_function(rewriter: Rewriter, node: gs.Node) -> bool:
    """Whether a node stands in the body of a model-local function."""
    return is_function(rewriter._root[rewriter.home[node]])


def float_type(data_type: int) -> bool:
    """Whether an element type is one of the floats that arithmetic is folded for."""
    return data_type in (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    )
