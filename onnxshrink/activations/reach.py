"""Which weights the samples reach, and which they leave untouched.

A branch that no sample takes, an expert that no sample is routed to, a layer that sees
nothing but NaN: whatever a pass does to their weights, no figure shows it. They are
found by running an instrumented copy of the model until every place was seen, which
for most models is one sample.

A place is out of reach if its body never runs (If, Loop, Scan, nested in any way), if
no row of finite values gets to it, or if nothing that it gives is used: the side of a
Where that is never taken, a factor of what is zero on every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.activations.gathering import SLICE_BYTES, _groups, _sizes
from onnxshrink.model import Model, Node
from onnxshrink.model.topology import Variable
from onnxshrink.samples import Samples
from onnxshrink.structure import layers

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["unreached"]

Array = NDArray[Any]

NEVER = "no calibration sample reached it, so nothing would show damage"
SILENT = "on calibration samples it sees nothing but NaN or infinity"
_BATCH = 16
_SEEN = "reached_places"
_ROUTES = frozenset(
    [
        *("TopK", "OneHot", "Equal", "Greater", "GreaterOrEqual", "Less"),
        *("LessOrEqual", "Where", "NonZero", "ScatterElements", "ScatterND", "Scatter"),
        *("ArgMax", "And", "Or", "Not", "Hardmax"),
    ]
)
"""Operators by which values become zeros on purpose."""
_BACK = 10
"""Nodes behind a factor that are looked at for such operators."""


@dataclass(eq=False)
class _Watch:
    """A value that must be seen in some way for a place to be reached."""

    value: str
    sees: Callable[[Array], bool]
    seen: bool = False


def unreached(
    model: Model, samples: Iterable[Samples | None], ctx: Context
) -> dict[str, str]:
    """Return the weights of layers that no sample reached, each with the reason.

    Args:
        model: The model; it is not changed.
        samples: What it runs on, until every place was seen.
        ctx: Session options.

    Raises:
        ModelError: The model does not run on the samples.
    """
    known = [some for some in samples if some is not None and some.used]
    found = [
        layer
        for layer in layers.find(model, roles=("weight", "table"), fused=True)
        if layer.uses and not layer.why_not
    ]
    if not known or not found:
        return {}
    places = _Places(model, found)
    places.run(known, ctx)
    return places.unreached()


class _Places:
    """What is watched in a model, and what follows from what was seen."""

    def __init__(self, model: Model, found: Sequence[layers.LinearWeight]) -> None:
        self.model, self.found = model, found
        main = model.graph
        self.inside = {id(node) for node in main.nodes}
        self.bodies = [g for g in _bodies(main) if g is not main]
        self.ran = np.zeros(len(self.bodies), bool)
        self.watches: dict[tuple[str, str], _Watch] = {}
        self.rows: dict[int, list[_Watch]] = {}
        self.edges: dict[tuple[int, int], _Watch] = {}
        for layer in found:
            for use in layer.uses:
                if id(use.node) in self.inside:
                    self._watch_rows(use)
        for node in main.nodes:
            if node.op == "Where":
                self._watch_condition(node)
            elif node.op == "Mul":
                self._watch_factors(node)

    # --- what to watch --------------------------------------------------------------

    def _watch_rows(self, use: layers.Use) -> None:
        node = use.node
        tensor = use.input
        if tensor is None:
            others = [t for i, t in enumerate(node.inputs) if i != use.index and t.name]
            tensor = others[0] if use.role == "table" and others else None
        if tensor is None or self._is_constant(tensor):
            return
        axis = 1 if "Conv" in node.op else -1
        for how, sees in (
            ("any", lambda value: value.size > 0),
            (f"rows{axis}", lambda value: _has_finite_row(value, axis)),
        ):
            watch = self._watch(tensor.name, how, sees)
            self.rows.setdefault(id(node), []).append(watch)

    def _watch_condition(self, node: Node) -> None:
        condition = node.inputs[0]
        if self._is_constant(condition):
            return
        self.edges[id(node), 1] = self._watch(
            condition.name, "true", lambda value: bool(value.any())
        )
        self.edges[id(node), 2] = self._watch(
            condition.name, "false", lambda value: not value.all()
        )

    def _watch_factors(self, node: Node) -> None:
        for index, tensor in enumerate(node.inputs):
            if self._is_constant(tensor) or not _is_routed(tensor):
                continue
            other = 1 - index
            if not self._is_constant(node.inputs[other]):
                self.edges[id(node), other] = self._watch(
                    tensor.name, "factor", lambda value: bool(np.any(value != 0))
                )

    def _watch(self, name: str, how: str, sees: Callable[[Array], bool]) -> _Watch:
        return self.watches.setdefault((name, how), _Watch(name, sees))

    def _is_constant(self, tensor: gs.Tensor) -> bool:
        return not tensor.name or self.model.constant(tensor) is not None

    # --- running --------------------------------------------------------------------

    def run(self, samples: Sequence[Samples], ctx: Context) -> None:
        """Run over the samples until everything was seen."""
        instrumented = self.model.copy()
        flags = ""
        if self.bodies:
            twins = list(_bodies(instrumented.graph))
            numbers = {id(g): number for number, g in enumerate(twins[1:])}
            made = _Instrument(instrumented, numbers).graph(instrumented.graph)
            if made is not None:
                flags = made.name
        for feed in _feeds(samples):
            pending = {w.value for w in self.watches.values() if not w.seen}
            ask = flags if flags and not self.ran.all() else ""
            if not pending and not ask:
                return
            for watch in self.watches.values():
                if watch.value in feed:
                    watch.seen = watch.seen or watch.sees(feed[watch.value])
            sizes = _sizes(self.model, feed)
            wanted = {n: sizes.get(n, 0) for n in pending if n not in feed}
            groups = list(_groups(wanted, SLICE_BYTES))
            if ask:
                groups = [(*(groups[0] if groups else ()), ask), *groups[1:]]
            for group in groups:
                self._look(instrumented, group, ask, feed, ctx)

    def _look(
        self,
        model: Model,
        group: Sequence[str],
        flags: str,
        feed: Mapping[str, Array],
        ctx: Context,
    ) -> None:
        session = runtime.session(
            model,
            threads=ctx.threads,
            providers=ctx.providers,
            expose=group,
            only_exposed=True,
        )
        values = session.run(feed)
        if flags in group:
            self.ran |= np.asarray(values.pop(flags)).astype(bool)
        for watch in self.watches.values():
            value = values.get(watch.value)
            if not watch.seen and isinstance(value, np.ndarray):
                watch.seen = watch.sees(value)

    # --- what follows ---------------------------------------------------------------

    def unreached(self) -> dict[str, str]:
        """Return the weights that no sample reached, with the reason."""
        silent = {
            id(g) for g, ran in zip(self.bodies, self.ran, strict=True) if not ran
        }
        dead = {
            id(node)
            for body in self.bodies
            if id(body) in silent
            for graph in _bodies(body)
            for node in graph.nodes
        }
        dead |= self._unused(silent)
        reasons: dict[str, str] = {}
        for layer in self.found:
            whys = [self._why(use.node, dead) for use in layer.uses]
            if all(whys):
                reasons[layer.name] = SILENT if SILENT in whys else NEVER
        return reasons

    def _why(self, node: Node, dead: set[int]) -> str:
        if id(node) in dead:
            return NEVER
        watches = self.rows.get(id(node), ())
        if all(watch.seen for watch in watches):
            return ""
        return SILENT if any(watch.seen for watch in watches) else NEVER

    def _unused(self, silent: set[int]) -> set[int]:
        """Return nodes of the main graph from which no used value leads to an output.

        Those inside a body that only such a node has are among them.
        """
        main = self.model.graph
        live: set[int] = set()
        waiting: list[gs.Tensor] = list(main.outputs)
        seen = {id(tensor) for tensor in waiting}
        while waiting:
            for node in waiting.pop().inputs:
                if id(node) in live or id(node) not in self.inside:
                    continue
                live.add(id(node))
                for tensor in self._used(node, silent):
                    if id(tensor) not in seen:
                        seen.add(id(tensor))
                        waiting.append(tensor)
        dead = [node for node in main.nodes if id(node) not in live]
        return {
            id(inner)
            for node in dead
            for inner in (node, *(n for g in _below(node) for n in g.nodes))
        }

    def _used(self, node: Node, silent: set[int]) -> Iterator[gs.Tensor]:
        for index, tensor in enumerate(node.inputs):
            watch = self.edges.get((id(node), index))
            if watch is None or watch.seen:
                yield tensor
        for _, body in _subgraphs(node):
            if id(body) in silent:
                continue
            yield from body.outputs
            for inner in body.nodes:
                yield from self._used(inner, silent)


class _Instrument:
    """Lets a model tell which of its bodies ran, as int64 [bodies] of its own.

    Each If, Loop and Scan gets one more output, the sum over what ran inside.
    """

    def __init__(self, model: Model, numbers: Mapping[int, int]) -> None:
        self.model, self.numbers = model, numbers

    def graph(self, graph: gs.Graph) -> gs.Tensor | None:
        """Instrument a graph; return what its bodies say together."""
        flags: list[gs.Tensor] = []
        for node in list(graph.nodes):
            bodies = list(_subgraphs(node))
            if node.op == "If" and len(bodies) == 2:
                for _, body in bodies:
                    body.outputs.append(self._inside(body))
                flags.append(self._output(node, len(node.outputs)))
            elif node.op in ("Loop", "Scan") and len(bodies) == 1:
                flags.append(self._loop(graph, node, bodies[0][1]))
        if not flags:
            return None
        total = flags[0]
        for one in flags[1:]:
            total = self._sum(graph, total, one)
        return total

    def _inside(self, body: gs.Graph) -> gs.Tensor:
        """Return what a body says: that it runs, and what runs in it."""
        mine = np.zeros(len(self.numbers), np.int64)
        mine[self.numbers[id(body)]] = 1
        made = self._constant(body, mine)
        below = self.graph(body)
        return made if below is None else self._sum(body, made, below)

    def _loop(self, graph: gs.Graph, node: Node, body: gs.Graph) -> gs.Tensor:
        """Give a loop one more state."""
        if node.op == "Loop":
            at, first = len(node.inputs), 1
            states = len(node.inputs) - 2
            inner = len(body.inputs)
        else:
            at = states = len(node.inputs) - int(node.attrs["num_scan_inputs"])
            inner, first = states, 0
        flag = self._inside(body)
        before = Variable(self.model.fresh(_SEEN), np.int64, [len(self.numbers)])
        body.inputs.insert(inner, before)
        body.outputs.insert(first + states, self._sum(body, before, flag))
        nothing = np.zeros(len(self.numbers), np.int64)
        node.inputs.insert(at, self._constant(graph, nothing))
        return self._output(node, states)

    def _output(self, node: Node, at: int) -> gs.Tensor:
        made = Variable(self.model.fresh(_SEEN), np.int64, [len(self.numbers)])
        node.outputs.insert(at, made)
        return made

    def _constant(self, graph: gs.Graph, values: Array) -> gs.Tensor:
        node = self.model.add_node(
            "Identity", [self.model.add_weight(_SEEN, values, graph)], graph=graph
        )
        return self._typed(node)

    def _sum(self, graph: gs.Graph, one: gs.Tensor, two: gs.Tensor) -> gs.Tensor:
        return self._typed(self.model.add_node("Add", [one, two], graph=graph))

    def _typed(self, node: Node) -> gs.Tensor:
        made = node.outputs[0]
        made.dtype, made.shape = np.int64, [len(self.numbers)]
        return made


def _subgraphs(node: Node) -> Iterator[tuple[str, gs.Graph]]:
    for key, value in node.attrs.items():
        if isinstance(value, gs.Graph):
            yield key, value


def _bodies(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Yield a graph and those inside it, in the order of the nodes."""
    yield graph
    for node in graph.nodes:
        yield from _below(node)


def _below(node: Node) -> Iterator[gs.Graph]:
    for _, body in _subgraphs(node):
        yield from _bodies(body)


def _feeds(samples: Sequence[Samples]) -> Iterator[dict[str, Array]]:
    """Yield one sample, then the others in batches."""
    first, *others = samples
    unit = first.batch or 1
    for some in (first.take(slice(0, unit)), first.take(slice(unit, None)), *others):
        if some.used:
            yield from some.batches(_BATCH)


def _is_routed(tensor: gs.Tensor) -> bool:
    """Whether what decides between ways is a few nodes behind a value."""
    seen: set[int] = set()
    waiting = [tensor]
    for _ in range(_BACK):
        behind: list[gs.Tensor] = []
        for one in waiting:
            for node in one.inputs:
                if node.op in _ROUTES:
                    return True
                if id(node) not in seen and len(seen) < 4 * _BACK:
                    seen.add(id(node))
                    behind.extend(node.inputs)
        waiting = behind
    return False


def _has_finite_row(value: Array, axis: int) -> bool:
    """Whether some row, the values along an axis, has no NaN and no infinity."""
    if not value.size:
        return False
    if value.dtype.kind not in "f" and value.dtype.name != "bfloat16":
        return True
    finite = np.isfinite(value.astype(np.float32, copy=False))
    if not -value.ndim <= axis < value.ndim:
        return bool(finite.all())
    return bool(finite.all(axis=axis).any())
