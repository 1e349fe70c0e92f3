"""Model: a graph to edit, tensors that stay where they are, lossless load and save."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.files import followed, write_file
from onnxshrink.lineage import Lineage
from onnxshrink.model import saving, versions
from onnxshrink.model.clone import clone_graph
from onnxshrink.model.encodings import recognise
from onnxshrink.model.exporter import (
    export,
    is_function,
    stray_constants,
)
from onnxshrink.model.importer import Importer, check_functions, check_order
from onnxshrink.model.reading import SupportsModelProto, read_source
from onnxshrink.model.saving import External, Storage
from onnxshrink.model.topology import (
    Constant,
    FunctionList,
    Graph,
    Node,
    Variable,
    adopt_graph,
    call_key,
    domain_key,
    function_key,
    is_onnx,
    own,
    returned_by,
    subgraphs_of,
)
from onnxshrink.model.weight import ValueInfo, Weight
from onnxshrink.tensors import ArrayTensor, LazyTensor

__all__ = ["Model"]

_LARGE = 1024
_LONGEST = 1000
"""Identity nodes and calls that ``constant`` looks through before it gives up."""


class Model:
    """An ONNX model whose topology is a graphsurgeon graph and whose tensors are lazy.

    Load and save without a change gives back the same graph, byte for byte: what
    graphsurgeon cannot hold is kept in the protos the objects came from.

    Attributes:
        graph: The topology, free to edit.
        source: The file it was loaded from, if any.
        metadata: The model's ``metadata_props``.
        ir_version: The IR version it is written with.
        external: Whether its tensors came as external data.
        lineage: What each value was in the model that a run started from.
        objection: What onnx.checker says against a model that onnxruntime opens all
            the same; empty if nothing.
        unreached: Weights that no sample reached, by name, and why: layers are to leave
            them alone. A run finds them out before a pass that may change outputs.
    """

    def __init__(self, graph: Graph, origin: onnx.ModelProto) -> None:
        """Use ``Model.load``; this is for the engine."""
        self.graph = graph
        self._origin = origin
        self.source: Path | None = None
        self.metadata = {entry.key: entry.value for entry in origin.metadata_props}
        self.ir_version = origin.ir_version
        self.external = False
        self.lineage = Lineage()
        self.objection = ""
        self.unreached: Mapping[str, str] = {}
        self._files: frozenset[Path] = frozenset()
        self._names: set[str] | None = None
        self._numbers: dict[str, int] = {}

    # --- load ---------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | bytes | onnx.ModelProto | SupportsModelProto,
        *,
        check: bool = True,
    ) -> Model:
        """Load a model.

        Args:
            source: A path (``.onnx``, a package ``.onnxz``, or ONNX text in
                ``.onnxtxt``), the bytes of a file, a ModelProto, or an object with
                ``model_proto`` (an attribute or a method), such as the result of a
                framework's exporter.
                A proto is not copied; do not change it while the model is in use.
            check: Run onnx.checker, and ask onnxruntime where it objects. Switch it off
                only for what was just checked.

        Raises:
            ModelError: It is not a valid ONNX model and onnxruntime does not open it,
                or its external data is refused.
        """
        proto, ranges, package, path = read_source(source)
        label = str(path) if path is not None else "the model"
        if not proto.HasField("graph"):
            raise ModelError(f"{label} is not an ONNX model: it has no graph")
        # Absolute, so that the model outlives a change of the working directory.
        place = None if path is None else path.absolute()
        try:
            if check:
                check_order(proto.graph)
                check_functions(proto)
            importer = Importer(proto, place, ranges, package)
            model = cls(importer.model(), proto)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        except (RecursionError, UnicodeDecodeError, ValueError, OSError) as error:
            raise ModelError(f"{label} cannot be read: {error}") from error
        model.source = path
        model.external = importer.external
        model._files = frozenset(importer.external_files)
        if place is not None:
            model._files |= {place}
        if check:
            model._check_with_judge(label)
        try:
            recognise(model.graph)
        except UnicodeDecodeError as error:
            raise ModelError(f"{label} cannot be read: {error}") from error
        return model

    def check(self, label: str = "the model") -> None:
        """Run onnx.checker over the graph, without its large tensors.

        Raises:
            ModelError: What the checker refuses.
        """
        reason = self._checkers_word(label)
        if reason:
            raise ModelError(f"{label} is not a valid ONNX model: {reason}")

    def _checkers_word(self, label: str) -> str:
        """Return what onnx.checker says against the graph, or ``""``.

        Raises:
            ModelError: The graph cannot be written.
        """
        try:
            skeleton = self.skeleton()
            # What a newer IR version adds arrives as unknown fields, which are kept.
            if skeleton.ir_version > onnx.IR_VERSION:
                skeleton.ir_version = onnx.IR_VERSION
            onnx.checker.check_model(skeleton)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error
        except (
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
            DecodeError,
            EncodeError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return lines[0] if lines else type(error).__name__
        return ""

    def _check_with_judge(self, label: str) -> None:
        """Let onnxruntime judge a model that onnx.checker objects to.

        Raises:
            ModelError: Neither takes it.
        """
        reason = self._checkers_word(label)
        if not reason:
            return
        # The judge lives above this room, and is asked only where the checker objects.
        runtime = importlib.import_module("onnxshrink.runtime")
        try:
            runtime.session(self, threads=1, optimize="basic")
        except ModelError as error:
            raise ModelError(
                f"{label} is not a valid ONNX model: {reason}; {error}"
            ) from error
        self.objection = reason

    def copy(self) -> Model:
        """Return an independent model that shares the tensors' values."""
        twin = Model(clone_graph(self.graph), self._origin)
        twin.source = self.source
        twin.metadata = dict(self.metadata)
        twin.ir_version = self.ir_version
        twin.external = self.external
        twin.lineage = self.lineage.copy()
        twin.objection = self.objection
        twin.unreached = self.unreached
        twin._files = self._files
        return twin

    def become(self, other: Model) -> None:
        """Become what another model is, but for ``source``; tensors are shared.

        Nodes, tensors and weights of this model that were held before belong to no
        model afterwards. New names are chosen as they would be in ``other``.

        Args:
            other: A model that was worked out from a copy of this one; it is not
                changed.
        """
        twin = other.copy()
        twin.source = self.source
        twin._names = None if other._names is None else set(other._names)
        twin._numbers = dict(other._numbers)
        self.__dict__.update(twin.__dict__)

    # --- what is there ------------------------------------------------------------

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operator set."""
        return int(self.graph.opset)

    @opset.setter
    def opset(self, version: int) -> None:
        for graph in self.graphs():
            if not is_function(graph):
                graph.opset = version

    @property
    def opsets(self) -> dict[str, int]:
        """Operator set versions by domain; ``""`` is ai.onnx."""
        found = {
            domain_key(entry.domain): entry.version
            for entry in self.graph.import_domains or []
        }
        if "" in found or not found:
            found[""] = self.opset
        return found

    def import_domain(self, domain: str, version: int) -> None:
        """Declare an operator domain unless the model already does."""
        if domain not in self.opsets:
            entry = onnx.OperatorSetIdProto(domain=domain, version=version)
            self.graph.import_domains = [*(self.graph.import_domains or []), entry]

    def graphs(self) -> Iterator[gs.Graph]:
        """Yield the main graph, the subgraphs inside it, then functions with theirs."""

        def below(graph: gs.Graph) -> Iterator[gs.Graph]:
            adopt_graph(graph)  # of a pass that sets attributes itself
            yield graph
            for node in list(graph.nodes):
                for subgraph in subgraphs_of(node):
                    yield from below(subgraph)

        yield from below(self.graph)
        for function in self.graph.functions:
            yield from below(function)

    def nodes(self) -> Iterator[Node]:
        """Yield the nodes of all graphs."""
        for graph in self.graphs():
            yield from list(graph.nodes)

    def weights(self) -> Iterator[Weight]:
        """Yield every initializer and every Constant node's tensor, of all graphs."""
        self._adopt_strays()
        taken: set[str] = set()
        for number, graph in enumerate(self.graphs()):
            found: list[tuple[str, gs.Constant, Node | None]] = [
                (constant.name, constant, None)
                for constant in graph.initializers.values()
                if isinstance(constant, gs.Constant)
            ]
            for node in graph.nodes:
                if node.op == "Constant" and is_onnx(node.domain) and node.outputs:
                    value = self._constant_value(node)
                    if value is not None:
                        found.append((node.outputs[0].name, value, node))
            for name, constant, node in found:
                label = name
                if name in taken:
                    label = f"{graph.name or 'graph'}#{number}/{name}"
                taken.add(label)
                yield Weight(self, label, constant, node, graph)

    def weight(self, name: str) -> Weight:
        """Return a weight by its name.

        Raises:
            UsageError: There is none of that name.
        """
        first = self.graph.initializers.get(name)
        if isinstance(first, gs.Constant) and first.name == name:
            return Weight(self, name, first, None, self.graph)
        names = []
        for weight in self.weights():
            if weight.name == name:
                return weight
            names.append(weight.name)
        raise UsageError(f"the model has no weight {name!r}.{nearest(name, names)}")

    def constant(self, tensor: gs.Tensor) -> Weight | None:
        """Return the known value of a tensor, or ``None``.

        Known are initializers, outputs of Constant nodes, and Identity of these. Inside
        a model-local function a formal input is known if the function is called once.
        """
        for _ in range(_LONGEST):
            if isinstance(tensor, gs.Constant):
                return Weight(self, tensor.name, tensor, None)
            if not tensor.name:
                return None
            if not tensor.inputs:
                outer = self._actual(tensor)
                if outer is None:
                    return None
                tensor = outer
                continue
            node = tensor.inputs[0]
            if not is_onnx(node.domain):
                return None
            if node.op == "Constant":
                value = self._constant_value(node)
                return None if value is None else Weight(self, tensor.name, value, node)
            if node.op != "Identity" or len(node.inputs) != 1:
                return None
            tensor = node.inputs[0]
        return None

    @property
    def inputs(self) -> tuple[ValueInfo, ...]:
        """The inputs a caller must give: graph inputs without a default value."""
        return self._signature(self.graph.inputs, self.graph.input_info)

    @property
    def outputs(self) -> tuple[ValueInfo, ...]:
        """The graph's outputs."""
        return self._signature(self.graph.outputs, self.graph.output_info)

    def _signature(
        self, tensors: Sequence[gs.Tensor], infos: Mapping[str, onnx.ValueInfoProto]
    ) -> tuple[ValueInfo, ...]:
        from onnxshrink.model.exporter import _value_info

        described = []
        for tensor in tensors:
            if isinstance(tensor, gs.Constant) and tensors is self.graph.inputs:
                continue
            proto = infos.get(tensor.name) or _value_info(tensor, None)
            described.append(ValueInfo.from_proto(proto))
        return tuple(described)

    def infer_shapes(self) -> dict[str, ValueInfo]:
        """Return type and shape of every value that ONNX shape inference knows.

        Large tensors take no part, so this is cheap whatever the model's size.
        """
        try:
            inferred = onnx.shape_inference.infer_shapes(
                self.skeleton(), data_prop=True
            )
        except (
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
            RuntimeError,
            ValueError,
        ):
            inferred = self.skeleton()
        found: dict[str, ValueInfo] = {}

        def visit(graph: onnx.GraphProto) -> None:
            for info in [*graph.input, *graph.output, *graph.value_info]:
                found.setdefault(info.name, ValueInfo.from_proto(info))
            for tensor in graph.initializer:
                found[tensor.name] = ValueInfo(
                    tensor.name, tensor.data_type, tuple(tensor.dims)
                )
            for node in graph.node:
                for attr in node.attribute:
                    if attr.type == onnx.AttributeProto.GRAPH:
                        visit(attr.g)

        visit(inferred.graph)
        return found

    def value_names(self) -> Iterator[str]:
        """Yield the names of the main graph's values: inputs, weights, outputs."""
        yield from (tensor.name for tensor in self.graph.inputs)
        yield from (c.name for c in self.graph.initializers.values())
        for node in self.graph.nodes:
            yield from (tensor.name for tensor in node.outputs if tensor.name)

    # --- edit ---------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """Return ``name``, or ``name_1``, ``name_2``, ... if it is taken."""
        shared = self.graph._functions
        if self._names is None:
            self._names = set()
            if isinstance(shared, FunctionList):
                shared.arrivals.clear()
            for graph in self.graphs():
                self._names.update(c.name for c in graph.initializers.values())
                self._names.update(graph.initializers)
                self._names.update(tensor.name for tensor in graph.inputs)
                self._names.update(tensor.name for tensor in graph.outputs)
                self._names.update(info.name for info in graph.value_infos)
                for node in graph.nodes:
                    self._note_names(node)
        elif isinstance(shared, FunctionList) and shared.arrivals:
            for node in shared.arrivals:
                self._note_names(node)
            shared.arrivals.clear()
        base = name or "value"
        candidate = base
        number = self._numbers.get(base, 0)
        while candidate in self._names:
            number += 1
            candidate = f"{base}_{number}"
        if number:
            self._numbers[base] = number
        self._names.add(candidate)
        self.lineage.add(candidate)
        return candidate

    def _note_names(self, node: gs.Node) -> None:
        assert self._names is not None
        self._names.add(node.name)
        self._names.update(tensor.name for tensor in node.inputs)
        self._names.update(tensor.name for tensor in node.outputs)

    def set_weight(self, weight: str | Weight, array: np.ndarray[Any, Any]) -> None:
        """Give a weight new values; shape and dtype may change with them.

        Raises:
            UsageError: There is no such weight.
            ModelError: The dtype has no ONNX element type.
        """
        if isinstance(weight, str):
            weight = self.weight(weight)
        weight.constant._values = ArrayTensor(np.asarray(array, order="C"))
        weight.constant._export_dtype = None
        if weight.node is not None and "value" not in weight.node.attrs:
            weight.node.attrs.clear()
            weight.node.attrs["value"] = weight.constant

    def add_weight(
        self,
        name: str,
        array: np.ndarray[Any, Any] | LazyTensor,
        graph: gs.Graph | None = None,
    ) -> Constant:
        """Add an initializer under an unused name made from ``name``.

        In the body of a function, which has no initializers, it is written as a
        Constant node.
        """
        values = array if isinstance(array, LazyTensor) else ArrayTensor(array)
        constant = Constant(self.fresh(name), values)
        owner = self.graph if graph is None else graph
        adopt_graph(owner)
        own(owner, constant)
        constant.__dict__["_is_new"] = True
        if not is_function(owner) and self.ir_version < 4:
            self.require_ir(4)
        return constant

    def add_node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        *,
        outputs: int | Sequence[gs.Tensor] = 1,
        attrs: Mapping[str, Any] | None = None,
        name: str = "",
        domain: str = "",
        graph: gs.Graph | None = None,
        before: gs.Node | None = None,
        after: gs.Node | None = None,
    ) -> Node:
        """Add a node; nodes are put into a runnable order when the model is written.

        Args:
            op: Operator type.
            inputs: Tensors it reads.
            outputs: Tensors it produces, or how many new ones to make.
            attrs: Attribute values by name.
            name: Name of the node and of its new outputs; made from ``op`` if empty.
            domain: Operator domain.
            graph: Where to add it; the main graph if ``None``.
            before: Insert it before this node of ``graph``.
            after: Insert it after this node of ``graph``.
        """
        owner = self.graph if graph is None else graph
        label = self.fresh(name or op)
        if isinstance(outputs, int):
            made = [Variable(self.fresh(f"{label}_out")) for _ in range(outputs)]
        else:
            made = list(outputs)
        node = Node(op, label, dict(attrs or {}), list(inputs), made, domain or None)
        if before is not None:
            owner.nodes.insert(owner.nodes.index(before), node)
        elif after is not None:
            owner.nodes.insert(owner.nodes.index(after) + 1, node)
        else:
            owner.nodes.append(node)
        return node

    def remove(self, node: gs.Node, graph: gs.Graph | None = None) -> None:
        """Take a node out of its graph and cut its edges."""
        owner = graph if graph is not None else self._graph_of(node)
        owner.nodes.remove(node)
        _disconnect(node)

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let everything that reads ``old`` read ``new``, graph outputs included.

        Nodes inside subgraphs count; the node that produces ``new`` does not. A graph
        output keeps its name: the new tensor takes it over, or an Identity node carries
        it where the new tensor cannot be renamed. An output of the main graph that is
        itself an input of it stays what it is. A ``new`` that a pass made is from then
        on what ``old`` was, see ``Lineage``.
        """
        if old is new:
            return
        if self.lineage.is_new(new.name):
            self.lineage.replace(old.name, new.name)
        makers = {id(node) for node in new.inputs}
        readers = list(old.outputs)
        list.__setitem__(
            old.outputs, slice(None), [n for n in readers if id(n) in makers]
        )
        others = {id(node): node for node in readers if id(node) not in makers}
        for node in others.values():
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    # Past the list's bookkeeping, which searches all readers each time.
                    list.__setitem__(node.inputs, index, new)
                    list.append(new.outputs, node)
        for graph in returned_by(old):
            for index, tensor in enumerate(graph.outputs):
                if tensor is old:
                    graph.outputs[index] = self._as_output(graph, old, new)

    def _as_output(self, graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> gs.Tensor:
        """Return the tensor that replaces the output ``old`` of a graph."""
        is_input = any(tensor is old for tensor in graph.inputs)
        if is_input and graph is self.graph:
            return old
        produced = bool(new.inputs) and new.inputs[0] in graph.nodes
        free = produced and isinstance(new, gs.Variable) and not returned_by(new)
        name = old.name
        shape = None if old.shape is None else list(old.shape)
        here = not is_input and (
            (bool(old.inputs) and old.inputs[0] in graph.nodes)
            or any(old is constant for constant in graph.initializers.values())
        )
        if here:
            self._rename(old, self.fresh(name))
        elif produced:
            return new  # of a subgraph or function, where outputs go by position
        else:
            name = self.fresh(name)
        target = new if free else Variable(name)
        target.name, target.dtype, target.shape = name, old.dtype, shape
        if isinstance(old, Variable) and isinstance(target, Variable):
            target.origin, target.origin_info = old.origin, old.origin_info
        if not free:
            self.add_node("Identity", [new], outputs=[target], name=name, graph=graph)
        return target

    def _rename(self, tensor: gs.Tensor, name: str) -> None:
        self.lineage.replace(tensor.name, name)
        home = tensor.__dict__.get("_home")
        if isinstance(tensor, gs.Constant) and home is not None:
            home.initializers = {
                name if constant is tensor else key: constant
                for key, constant in home.initializers.items()
            }
        tensor.name = name

    def shorten_names(self) -> int:
        """Give inner values and weights the shortest names, and nodes no names.

        Inputs and outputs, of functions too, keep theirs; what is recorded of the
        types and shapes of values inside goes. Annotations by name prevent it.

        Returns:
            How many names are new.
        """
        from onnxshrink.model.names import shorten

        return shorten(self)

    def drop_metadata(self, prefix: str) -> int:
        """Drop metadata of nodes and values whose key has a prefix.

        Args:
            prefix: Beginning of the keys in ``metadata_props``.

        Returns:
            Bytes of the entries that are gone.
        """
        dropped = 0

        def without(entry: Any) -> Any:
            nonlocal dropped
            going = [p for p in entry.metadata_props if p.key.startswith(prefix)]
            if not going:
                return entry
            dropped += sum(p.ByteSize() for p in going)
            # Copies of a model share what they were read from.
            kept = type(entry)()
            kept.CopyFrom(entry)
            del kept.metadata_props[:]
            kept.metadata_props.extend(
                p for p in entry.metadata_props if not p.key.startswith(prefix)
            )
            return kept

        for graph in self.graphs():
            for node in graph.nodes:
                if node.origin is not None:
                    node.origin = without(node.origin)
                for tensor in node.outputs:
                    if isinstance(tensor.origin, onnx.ValueInfoProto):
                        tensor.origin = without(tensor.origin)
            graph.value_infos = [without(info) for info in graph.value_infos]
            for listed in ("input_info", "output_info"):
                infos = getattr(graph, listed, {})
                infos.update({name: without(info) for name, info in infos.items()})
        return dropped

    def drop_unused(self) -> int:
        """Remove nodes and initializers that no output depends on.

        Returns:
            How many nodes and initializers went.
        """
        dropped = 0
        for _ in self.graphs():
            pass  # what a pass put in may be plain graphsurgeon

        def sweep(graph: gs.Graph) -> int:
            count = 0
            for node in graph.nodes:
                for subgraph in subgraphs_of(node):
                    count += sweep(subgraph)
            needed: set[int] = set()
            stack: list[gs.Tensor] = list(graph.outputs)
            here = {id(node) for node in graph.nodes}
            while stack:
                tensor = stack.pop()
                for node in tensor.inputs:
                    if id(node) in here and id(node) not in needed:
                        needed.add(id(node))
                        stack.extend(_all_reads(node))
            kept = [node for node in graph.nodes if id(node) in needed]
            if len(kept) < len(graph.nodes):
                _disconnect(*(n for n in graph.nodes if id(n) not in needed))
                count += len(graph.nodes) - len(kept)
                graph.nodes.keep(kept)
            return count

        before = -1
        while dropped > before:  # a dead node may have been a function's last call
            before = dropped
            for graph in [self.graph, *self.graph.functions]:
                dropped += sweep(graph)
            called = {call_key(node) for node in self.nodes()}
            functions = [f for f in self.graph.functions if function_key(f) in called]
            if len(functions) < len(self.graph.functions):
                dropped += len(self.graph.functions) - len(functions)
                self.graph.functions = functions
        for graph in self.graphs():
            pinned = {id(t) for t in [*graph.inputs, *graph.outputs]}
            for name, constant in list(graph.initializers.items()):
                if not constant.outputs and id(constant) not in pinned:
                    del graph.initializers[name]
                    dropped += 1
        return dropped

    def forget_shapes(self) -> None:
        """Drop recorded shapes of inner values, after a pass changed some."""
        for graph in self.graphs():
            graph.value_infos = []
            fixed = {id(t) for t in [*graph.inputs, *graph.outputs]}
            for node in graph.nodes:
                for tensor in node.outputs:
                    if isinstance(tensor, gs.Variable) and id(tensor) not in fixed:
                        tensor.shape = None

    def freeze_inputs(self) -> list[str]:
        """Make graph inputs that have a default value plain initializers.

        Returns:
            The names of those inputs.
        """
        graph = self.graph
        frozen = [t.name for t in graph.inputs if isinstance(t, gs.Constant)]
        graph.inputs = [t for t in graph.inputs if not isinstance(t, gs.Constant)]
        return frozen

    def require_ir(self, version: int) -> None:
        """Raise the IR version to at least ``version``, keeping the meaning.

        Before IR version 4 every initializer had to be listed as an input without
        being one that callers set; those entries go.
        """
        versions.require_ir(self, version)

    def require_opset(self, version: int) -> None:
        """Raise the ai.onnx opset to at least ``version``.

        Raises:
            ModelError: onnx's version converter cannot, or the runtime knows no such
                opset.
        """
        versions.require_opset(self, version)

    def fit_runtime(self) -> None:
        """Lower the IR version to one that onnxruntime loads, where nothing needs more.

        Raises:
            ModelError: The opset or an element type is newer than the runtime.
        """
        versions.fit_runtime(self)

    # --- write --------------------------------------------------------------------

    def skeleton(self) -> onnx.ModelProto:
        """Return a valid proto in which large weights of the main graph are inputs.

        It is small whatever the model's size: for the checker and shape inference.
        """
        return self._skeleton()[0]

    def _skeleton(
        self,
    ) -> tuple[onnx.ModelProto, list[tuple[gs.Constant, bool]]]:
        parts = export(self)
        listed = {info.name for info in parts.tail.input}
        kept: list[tuple[gs.Constant, bool]] = []
        proto = onnx.ModelProto()
        proto.CopyFrom(parts.template)
        if 0 < proto.ir_version < 4:
            if proto.ir_version < 3 and not proto.opset_import:
                proto.opset_import.add(domain="", version=1)
            proto.ir_version = 4
        graph = proto.graph
        graph.CopyFrom(parts.head)
        for piece in parts.pieces:
            if piece.data_bytes <= _LARGE:
                graph.initializer.append(piece.whole())
                continue
            header = piece.header
            kept.append((piece.constant, header.name in listed))
            if header.name not in listed:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(
                        header.name, header.data_type, header.dims
                    )
                )
        graph.MergeFrom(parts.tail)
        names = {info.name for info in graph.input}
        if names:
            infos = [i for i in graph.value_info if i.name not in names]
            if len(infos) != len(graph.value_info):
                del graph.value_info[:]
                graph.value_info.extend(infos)
        return proto, kept

    def to_proto(self, storage: Storage = "plain") -> onnx.ModelProto:
        """Return the model as one proto with all data inline.

        Raises:
            ModelError: It would exceed protobuf's 2 GiB.
        """
        return saving.encoded(self, storage).proto()

    def to_bytes(self, storage: Storage = "plain") -> bytes:
        """Return the bytes of ``to_proto(storage)``."""
        return self.to_proto(storage).SerializeToString(deterministic=True)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        storage: Storage = "auto",
        external: External = "auto",
        max_decode_ratio: float | None = None,
    ) -> tuple[Path, ...]:
        """Write the model, atomically: the file is either whole or not there.

        A symbolic link is followed: the file it leads to is replaced.

        Args:
            path: Where to; ``.onnxz`` writes a package, ``.onnxtxt`` ONNX text, which
                has no place for notes and is refused where it would not read back as
                the same model.
            storage: ``auto`` writes every initializer in its smallest exact encoding,
                ``plain`` as it is. A package has coders of its own: ``auto`` and
                ``plain`` are the same, ``tiny`` tries those that take microseconds a
                weight to decode as well.
            external: Put weights into a second file: ``auto`` if the source did or if
                they exceed protobuf's 2 GiB, ``never`` or ``always``.
            max_decode_ratio: A weight whose decoding would take more than this multiple
                of its plain bytes when the model is loaded is written plain; ``None``
                is ``storage.MAX_DECODE_RATIO``. In a package, what decoding one of its
                blocks holds at a time counts, the block included.

        Returns:
            The files written, the model first.

        Raises:
            OutputError: It cannot be written, or it would overwrite its own input.
            ModelError: It does not fit into one file and ``external`` is ``never``.
        """
        return saving.save(self, path, storage, external, max_decode_ratio)

    def plain_nbytes(self) -> int:
        """Return the bytes of the file if weights are written as they are."""
        parts = saving.encoded(self, "plain").parts()
        return sum(p.nbytes if isinstance(p, LazyTensor) else len(p) for p in parts)

    @property
    def files(self) -> frozenset[Path]:
        """The files that the model came from, with those of external data."""
        return self._files

    def check_target(self, target: str | os.PathLike[str]) -> None:
        """Refuse an output that cannot be written, before any work is done.

        Raises:
            OutputError: It is the input itself, a folder, a device, or its folder is
                missing.
        """
        saving.check_target(self, target)

    def publish(
        self, files: Sequence[Path], target: str | os.PathLike[str]
    ) -> tuple[Path, ...]:
        """Move what ``save`` wrote elsewhere on the same file system to its place.

        Args:
            files: What ``save`` returned; the model was saved under the target's name.
            target: Where the model goes; data files go beside it, before it.

        Raises:
            OutputError: It cannot be moved there.
        """
        return saving.publish(self, files, target)

    def is_unchanged(self) -> bool:
        """Whether the model is still what its source file holds."""
        return saving.is_unchanged(self)

    def write_beside(
        self, path: str | os.PathLike[str], content: Iterable[bytes | memoryview]
    ) -> Path:
        """Write a file made of this model, never over the model itself.

        Args:
            path: Where to.
            content: Its bytes.

        Raises:
            OutputError: It cannot be written, or it would overwrite the input.
        """
        self.check_target(path)
        return write_file(followed(path), content, self.source)

    # --- bookkeeping --------------------------------------------------------------

    def _constant_value(self, node: gs.Node) -> gs.Constant | None:
        """Return the value of a Constant node, made lazily for scalar attributes."""
        value = node.attrs.get("value")
        if isinstance(value, gs.Constant):
            return value
        if isinstance(value, np.ndarray):
            constant = Constant("", ArrayTensor(value))
            node.attrs["value"] = constant
            return constant
        made = node.__dict__.get("_scalar_value")
        if made is not None:
            return made
        for key, dtype in (
            ("value_float", np.float32),
            ("value_floats", np.float32),
            ("value_int", np.int64),
            ("value_ints", np.int64),
        ):
            found = node.attrs.get(key)
            if found is not None and not isinstance(found, gs.Node.AttributeRef):
                constant = Constant("", ArrayTensor(np.asarray(found, dtype)))
                node.__dict__["_scalar_value"] = constant
                return constant
        return None

    def _graph_of(self, node: gs.Node) -> gs.Graph:
        home = node.__dict__.get("_home")
        if home is not None and node in home.nodes:
            return home
        for graph in self.graphs():
            if any(other is node for other in graph.nodes):
                return graph
        raise ModelError(f"node {node.name or node.op!r} is in no graph of the model")

    def _owner(self, constant: gs.Constant) -> gs.Graph:
        home = constant.__dict__.get("_home")
        if home is not None and home.initializers.get(constant.name) is constant:
            return home
        for graph in self.graphs():
            if any(other is constant for other in graph.initializers.values()):
                return graph
        return self.graph

    def _callers(self, function: gs.Graph) -> list[gs.Node]:
        """Return the nodes that call a function."""
        shared = self.graph._functions
        key = function_key(function)
        if not isinstance(shared, FunctionList):
            return [node for node in self.nodes() if call_key(node) == key]
        if shared.calls is None or shared.calls[0] != shared.edits:
            keys = {function_key(function) for function in shared}
            calls: dict[Any, list[gs.Node]] = {}
            for node in self.nodes():
                if call_key(node) in keys:
                    calls.setdefault(call_key(node), []).append(node)
            shared.calls = shared.edits, calls
        return [n for n in shared.calls[1].get(key, ()) if call_key(n) == key]

    def _actual(self, tensor: gs.Tensor) -> gs.Tensor | None:
        """Return what a function's formal input stands for, if it is called once."""
        for function in self.graph.functions:
            for index, formal in enumerate(function.inputs):
                if formal is not tensor:
                    continue
                calls = self._callers(function)
                if len(calls) == 1 and index < len(calls[0].inputs):
                    actual: gs.Tensor = calls[0].inputs[index]
                    return actual
        return None

    def _uses(self, tensor: gs.Tensor) -> Iterator[tuple[Node, int]]:
        functions = {
            function_key(function): function for function in self.graph.functions
        }
        stack = [tensor]
        seen: set[int] = set()
        while stack:
            current = stack.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            for node in {id(node): node for node in current.outputs}.values():
                function = functions.get(call_key(node)) if functions else None
                for index, read in enumerate(node.inputs):
                    if read is not current:
                        continue
                    if function is not None:
                        if index < len(function.inputs):
                            stack.append(function.inputs[index])
                    elif node.op == "Identity" and is_onnx(node.domain):
                        stack.append(node.outputs[0])
                    else:
                        yield node, index

    def _name_strays(self) -> None:
        """Give new constants that clash with another name an unused one."""
        roots = [self.graph, *self.graph.functions]
        strays = [constant for root in roots for constant in stray_constants(root)]
        if not strays:
            return
        taken = {c.name for g in self.graphs() for c in g.initializers.values()}
        for constant in strays:
            if not constant.name or constant.name in taken:
                constant.name = self.fresh(constant.name or "constant")
            taken.add(constant.name)

    def _adopt_strays(self) -> None:
        """Enter new constants that nodes read among their graph's initializers."""
        self._name_strays()
        for root in [self.graph, *self.graph.functions]:
            for constant in stray_constants(root):
                own(root, constant)
                constant.__dict__["_is_new"] = True


def _all_reads(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from node.inputs
    for graph in subgraphs_of(node):
        yield from graph.outputs
        for inner in graph.nodes:
            yield from _all_reads(inner)


def _disconnect(*nodes: gs.Node) -> None:
    """Cut all edges of nodes and of what is inside them, in one go."""
    gone: dict[int, gs.Node] = {}

    def visit(node: gs.Node) -> None:
        gone[id(node)] = node
        for graph in subgraphs_of(node):
            for inner in graph.nodes:
                # A node may have moved to another graph and be listed here still.
                if inner.__dict__.get("_home") in (graph, None):
                    visit(inner)

    for node in nodes:
        visit(node)
    if len(gone) == 1:
        nodes[0].inputs.clear()
        nodes[0].outputs.clear()
        return
    read = {id(t): t for node in gone.values() for t in node.inputs}
    made = {id(t): t for node in gone.values() for t in node.outputs}
    for tensor in read.values():
        kept = [node for node in tensor.outputs if id(node) not in gone]
        list.__setitem__(tensor.outputs, slice(None), kept)
    for tensor in made.values():
        kept = [node for node in tensor.inputs if id(node) not in gone]
        list.__setitem__(tensor.inputs, slice(None), kept)
    for node in gone.values():
        list.clear(node.inputs)
        list.clear(node.outputs)
