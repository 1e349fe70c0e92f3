"""What the outputs of a model are, told by how the graph makes and reads them.

Class scores are rows that a softmax or a sigmoid made, or that an argmax, a top-k or a
softmax reads. State is what a caller hands back in the next run: keys and values behind
a past, the last state of a recurrent layer. Neither is told by numbers, which look the
same for scores and for an embedding.

Tested in tests/validation/test_kinds.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from onnxshrink.errors import ModelError
from onnxshrink.model import Model, ValueInfo
from onnxshrink.package import skeleton_of
from onnxshrink.validation.signature import Source

__all__ = ["Kinds", "kinds_of"]

_VIEWS = frozenset(
    [
        "Identity",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Cast",
        "CastLike",
        "Dropout",
        "Transpose",
        "QuantizeLinear",
        "DequantizeLinear",
    ]
)
"""Operators that show the same numbers in another form."""
_SHARES = frozenset(["Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Hardmax"])
_MIXES = frozenset(
    [
        "Concat",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Sum",
        "Mean",
        "Min",
        "Max",
        "Clip",
        "Log",
        "Exp",
        "Neg",
        "Pow",
        "Normalizer",
    ]
)
"""What scores are put together with; every operand must be scores or a constant."""
_CLASSIFIERS = frozenset(
    ["LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"]
)
_READERS = frozenset(["ArgMax", "TopK", "Softmax", "LogSoftmax", "Hardmax"])
_RECURRENT = frozenset(["LSTM", "GRU", "RNN"])
_CACHED = frozenset(
    [
        "Attention",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "DecoderMaskedSelfAttention",
        "DecoderMaskedMultiHeadAttention",
        "SparseAttention",
        "PagedAttention",
        "LinearAttention",
    ]
)
_DEPTH = 64
_NEW_OR_OLD = frozenset(
    [
        "past",
        "present",
        "prev",
        "previous",
        "next",
        "new",
        "old",
        "in",
        "out",
        "input",
        "output",
        "cur",
        "current",
        "init",
        "initial",
        "last",
        "updated",
        "final",
    ]
)


@dataclass(frozen=True)
class Kinds:
    """Which outputs are what.

    Attributes:
        scores: Outputs made or read as class scores, in any shape.
        state: Outputs that are handed back as inputs of the next run.
    """

    scores: frozenset[str] = frozenset()
    state: frozenset[str] = frozenset()


def kinds_of(
    source: Source, inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo]
) -> Kinds:
    """Return what the outputs of a model are.

    Args:
        source: The model.
        inputs: What it is fed with.
        outputs: What it gives.
    """
    model = _proto(source)
    if model is None:
        return Kinds()
    functions = {(f.domain, f.name): f for f in model.functions}
    scope = _Scope.of(model.graph.node, functions)
    scope.constants.update(t.name for t in model.graph.initializer)
    scope.constants.update(t.values.name for t in model.graph.sparse_initializer)
    given = {info.name for info in inputs}
    # Weights of a skeleton stand among the inputs.
    scope.constants.update(i.name for i in model.graph.input if i.name not in given)
    scores = {info.name for info in outputs if _is_scores(info.name, scope)}
    state = {info.name for info in outputs if _is_fed_back(info.name, scope, given)}
    state |= _paired(inputs, outputs)
    if len(state) == len(outputs):
        state = set()
    return Kinds(frozenset(scores - state), frozenset(state))


def _proto(source: Source) -> onnx.ModelProto | None:
    """Return the graph of a source; its weights may be missing."""
    if isinstance(source, onnx.ModelProto):
        return source
    try:
        if isinstance(source, Path) and source.suffix != ".onnxtxt":
            return skeleton_of(source)
        model = source if isinstance(source, Model) else Model.load(source)
        return model.skeleton()
    except ModelError:
        return None  # the session that is opened next says more


@dataclass
class _Scope:
    """Nodes of a graph, found by what they make and read."""

    makers: dict[str, tuple[onnx.NodeProto, int]]
    readers: dict[str, list[onnx.NodeProto]]
    functions: Mapping[tuple[str, str], onnx.FunctionProto]
    constants: set[str] = field(default_factory=set)
    outer: _Scope | None = None

    @classmethod
    def of(
        cls,
        nodes: Sequence[onnx.NodeProto],
        functions: Mapping[tuple[str, str], onnx.FunctionProto],
        outer: _Scope | None = None,
    ) -> _Scope:
        made: dict[str, tuple[onnx.NodeProto, int]] = {}
        read: dict[str, list[onnx.NodeProto]] = {}
        constants: set[str] = set()
        for node in nodes:
            for index, name in enumerate(node.output):
                made[name] = node, index
            for name in node.input:
                read.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                constants.update(node.output)
        return cls(made, read, functions, constants, outer)

    def maker(self, name: str) -> tuple[_Scope, onnx.NodeProto, int] | None:
        if name in self.makers:
            return self, *self.makers[name]
        return self.outer.maker(name) if self.outer is not None else None

    def is_constant(self, name: str) -> bool:
        if name in self.constants:
            return True
        found = self.maker(name)
        if found is None:
            return self.outer is not None and self.outer.is_constant(name)
        scope, node, _ = found
        return node.op_type in _VIEWS and scope.is_constant(node.input[0])

    def bodies(self, node: onnx.NodeProto, index: int) -> Iterator[tuple[_Scope, str]]:
        """Yield where an output of a node with bodies is made inside them."""
        function = self.functions.get((node.domain, node.op_type))
        if function is not None and index < len(function.output):
            inside = _Scope.of(function.node, self.functions)
            yield inside, function.output[index]
        if node.op_type == "If":
            for entry in node.attribute:
                graph = entry.g
                if index < len(graph.output):
                    inside = _Scope.of(graph.node, self.functions, self)
                    inside.constants.update(t.name for t in graph.initializer)
                    yield inside, graph.output[index].name


def _is_scores(name: str, scope: _Scope) -> bool:
    return _is_read(name, scope) or _is_made(name, scope, _DEPTH)


def _is_made(name: str, scope: _Scope, depth: int) -> bool:
    """Whether a softmax or sigmoid made a value, up to its form and mixtures."""
    found = scope.maker(name)
    if found is None or not depth:
        return False
    scope, node, index = found
    if node.op_type in _SHARES:
        return index == 0
    if node.op_type in _CLASSIFIERS:
        return index == 1
    if node.op_type in _VIEWS:
        return _is_made(node.input[0], scope, depth - 1)
    bodies = list(scope.bodies(node, index))
    if bodies:
        return all(_is_made(inner, inside, depth - 1) for inside, inner in bodies)
    if node.op_type in _MIXES:
        operands = [i for i in node.input if i and not scope.is_constant(i)]
        return bool(operands) and all(_is_made(i, scope, depth - 1) for i in operands)
    return False


def _is_read(name: str, scope: _Scope) -> bool:
    """Whether an argmax, top-k or softmax reads a value, in whatever form."""
    start = name
    for _ in range(_DEPTH):
        found = scope.makers.get(start)
        if found is None or found[0].op_type not in _VIEWS:
            break
        start = found[0].input[0]
    seen, waiting = {start}, [start]
    while waiting:
        value = waiting.pop()
        for node in scope.readers.get(value, ()):
            if node.input[0] != value:
                continue
            if node.op_type in _READERS:
                return True
            if node.op_type in _VIEWS and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append(node.output[0])
    return False


def _is_fed_back(name: str, scope: _Scope, given: set[str]) -> bool:
    """Whether an output goes on from an input: a grown past, a last state."""
    found = _behind_views(name, scope)
    if found is None:
        return False
    scope, node, index = found
    if node.op_type in _RECURRENT:
        return index >= 1 and any(_is_input(i, scope, given) for i in node.input[5:7])
    if node.op_type in _CACHED:
        return index >= 1 and any(_is_input(i, scope, given) for i in node.input[3:])
    if node.op_type == "Concat" and len(node.input) == 2:
        return _is_input(node.input[0], scope, given) and "past" in node.input[0]
    return False


def _behind_views(
    name: str, scope: _Scope
) -> tuple[_Scope, onnx.NodeProto, int] | None:
    for _ in range(_DEPTH):
        found = scope.maker(name)
        if found is None or found[1].op_type not in _VIEWS:
            return found
        name = found[1].input[0]
    return None


def _is_input(name: str, scope: _Scope, given: set[str]) -> bool:
    for _ in range(_DEPTH):
        if name in given:
            return True
        found = scope.maker(name)
        if found is None or found[1].op_type not in {*_VIEWS, "Slice", "Gather"}:
            return False
        name = found[1].input[0]
    return False


def _paired(inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo]) -> set[str]:
    """Return outputs named as the next value of an input of the same type and rank."""
    stems = {_stem(info.name): info for info in inputs}
    found = set()
    for info in outputs:
        stem = _stem(info.name)
        other = stems.get(stem)
        if not stem or other is None or other.name == info.name:
            continue
        alike = (other.kind, other.data_type) == (info.kind, info.data_type)
        ranks = {len(i.shape) for i in (info, other) if i.shape is not None}
        if alike and len(ranks) < 2:
            found.add(info.name)
    return found


def _stem(name: str) -> str:
    """Return what past_key_values.0.key and present.0.key have in common."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words = words.replace("past_key_values", "past").replace("present_key_values", "")
    parts = [part for part in re.split(r"[^a-z0-9]+", words) if part]
    left = [part for part in parts if part not in _NEW_OR_OLD]
    if len(left) == 1 and re.fullmatch(r"(h|c|state)_?[0n]?", left[0]):
        return left[0].rstrip("0n")
    if len(left) == 2 and re.fullmatch(r"h|c|state", left[0]) and left[1] in "0n":
        return left[0]
    return ".".join(left)
