"""A model run on samples in stages, front to back, each part of its graph once.

A pass that changes layers one after the other needs, for each, what the changed layers
before it give. Running the whole model for every layer takes time quadratic in their
number. A ``StagedRun`` holds the values at a cut through the graph instead, and runs
only the part from there to the next layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.model import Model
from onnxshrink.model.topology import Variable, subgraphs_of
from onnxshrink.samples import Samples

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = ["HELD_BYTES", "Span", "StagedRun", "batches"]

Array = NDArray[Any]

HELD_BYTES = 512 << 20
"""Bytes of values that a staged run holds. Samples whose values do not fit are run from
the last cut whose values did, or from the inputs."""


@dataclass(frozen=True)
class Span:
    """A batch of samples.

    Attributes:
        samples: Where they are.
        start: First one.
        stop: First one after it.
    """

    samples: Samples
    start: int
    stop: int

    def __len__(self) -> int:
        """Number of samples."""
        return self.stop - self.start

    def is_in(self, other: Span) -> bool:
        """Whether these samples are among others."""
        is_here = self.samples is other.samples
        return is_here and other.start <= self.start and self.stop <= other.stop

    def read(self) -> dict[str, Array]:
        """Return the feed."""
        return self.samples.read(np.arange(self.start, self.stop))


def batches(stretches: Iterable[Span], size: int) -> list[Span]:
    """Cut stretches of samples into batches that no end of a stretch lies inside.

    Args:
        stretches: They may overlap.
        size: Samples of a batch, where they have no fixed batch size.

    Returns:
        Batches that cover each of the stretches, without overlap; batches in which
        there are too few samples for a fixed batch size are left out.
    """
    asked = list(stretches)
    found = []
    for samples in {id(some.samples): some.samples for some in asked}.values():
        mine = [some for some in asked if some.samples is samples]
        step = samples.batch or max(1, size)
        marks = sorted({end for some in mine for end in (some.start, some.stop)})
        for left, right in pairwise(marks):
            for first, last in samples.alike(left, right):
                for start in range(first, last, step):
                    made = Span(samples, start, min(start + step, last))
                    is_full = samples.batch in (None, len(made))
                    if is_full and any(made.is_in(some) for some in mine):
                        found.append(made)
    return found


@dataclass
class _Stage:
    """What is run from a cut on.

    Attributes:
        session: The part of the model; ``None`` if there is nothing to run.
        needs: Names of the values to start with, held or fed.
        keep: Names of the values at the next cut.
    """

    session: runtime.Session | None
    needs: frozenset[str]
    keep: frozenset[str]


@dataclass(eq=False)
class StagedRun:
    """Runs a model from cut to cut. Each batch of samples has a cut of its own.

    Attributes:
        model: The model. Between calls, weights behind the settled values may change.
            Nodes stay where they are.
        ctx: Session options.
        limit: Bytes of values held at most.
    """

    model: Model
    ctx: Context
    limit: int = HELD_BYTES
    _cuts: dict[Span, dict[str, Array]] = field(default_factory=dict)
    _held: int = 0

    def values(
        self,
        names: Sequence[str],
        settled: Sequence[str],
        later: Sequence[str],
        samples: Sequence[Span],
    ) -> Iterator[dict[str, Array]]:
        """Yield, for each batch, what values are.

        Args:
            names: The values; inputs of the graph and outputs of its nodes.
            settled: Values that no later change of a weight has an effect on. What
                leads to them is not run again.
            later: Values that will be asked for after this.
            samples: The batches, in the order they come in.

        Raises:
            ModelError: The model does not run on the samples.
        """
        graph = _Graph.of(self.model)
        stages: dict[frozenset[str], _Stage] = {}
        for span in samples:
            held = self._cuts.get(span, {})
            start = frozenset(held)
            if start not in stages:
                stages[start] = self._stage(graph, held, names, settled, later)
            stage = stages[start]
            values: dict[str, Any] = dict(held)
            if not stage.needs <= start:
                values |= span.read()
            if stage.session is not None:
                taken = {i.name: values[i.name] for i in stage.session.inputs}
                values |= stage.session.run(taken)
            self._hold(span, {name: values[name] for name in stage.keep})
            yield {name: values[name] for name in names}

    def _hold(self, span: Span, values: dict[str, Any]) -> None:
        """Hold the values of a batch instead of those held now, if there is room."""
        arrays = [v for v in values.values() if isinstance(v, np.ndarray)]
        if len(arrays) < len(values) or any(v.dtype == object for v in arrays):
            return  # a sequence, or strings: no input of a part can be one
        before = self._cuts.get(span, {})
        size = sum(v.nbytes for v in values.values())
        change = size - sum(v.nbytes for v in before.values())
        if self._held + change <= self.limit:
            self._cuts[span] = values
            self._held += change

    def _stage(
        self,
        graph: _Graph,
        held: dict[str, Array],
        names: Sequence[str],
        settled: Sequence[str],
        later: Sequence[str],
    ) -> _Stage:
        known = set(held)
        done, _ = graph.nodes_before(settled, known)
        made = {name for node in done for name in graph.gives(node)}
        _, keep = graph.nodes_before(later, made | known)
        keep -= graph.fed
        wanted = sorted(keep.union(names))
        _, needs = graph.nodes_before(wanted, known)
        watched = [name for name in wanted if name not in needs]
        session = None
        if watched:
            session = runtime.session(
                _part(self.model, watched, {n: held.get(n) for n in needs}),
                threads=self.ctx.threads,
                providers=self.ctx.providers,
                expose=watched,
                only_exposed=True,
            )
        return _Stage(session, frozenset(needs), frozenset(keep))


def _part(
    model: Model, outputs: Sequence[str], inputs: Mapping[str, Array | None]
) -> Model:
    """Return the part of a model that leads from some values to others.

    Args:
        model: The model; it is not changed.
        outputs: Values that nodes give.
        inputs: Values to start from, with an example; inputs of the graph without.
    """
    part = model.copy()
    graph = part.graph
    graph.inputs = [
        tensor
        for tensor in graph.inputs
        if tensor.name in inputs or isinstance(tensor, gs.Constant)
    ]
    given = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    graph.outputs = [given[name] for name in outputs]
    for name, example in inputs.items():
        if example is None:
            continue
        tensor = given[name]
        node = tensor.inputs[0]
        place = next(i for i, other in enumerate(node.outputs) if other is tensor)
        node.outputs[place] = Variable(part.fresh(f"{name}_before"))
        tensor.dtype = example.dtype
        # Another batch may have other sizes.
        tensor.shape = [part.fresh(f"{name}_{axis}") for axis in range(example.ndim)]
        graph.inputs.append(tensor)
    part.drop_unused()
    return part


@dataclass(frozen=True, eq=False)
class _Graph:
    """Who makes and reads what in a main graph.

    Attributes:
        fed: Names of its inputs.
        makers: The node that gives each value that follows from an input.
        others: The node that gives each of the other values. Those are not held: they
            follow from weights alone, and change when these do.
    """

    fed: frozenset[str]
    makers: dict[str, gs.Node]
    others: dict[str, gs.Node]

    @classmethod
    def of(cls, model: Model) -> _Graph:
        """Look at a model's main graph."""
        fed = frozenset(info.name for info in model.inputs)
        makers: dict[str, gs.Node] = {}
        others: dict[str, gs.Node] = {}
        for node in model.graph.nodes:
            varies = any(name in makers or name in fed for name in _reads(node))
            into = makers if varies else others
            into.update({t.name: node for t in node.outputs if t.name})
        return cls(fed, makers, others)

    def gives(self, node: gs.Node) -> Iterator[str]:
        """Yield the names of what a node gives that follows from an input."""
        yield from (t.name for t in node.outputs if t.name in self.makers)

    def nodes_before(
        self, names: Iterable[str], known: set[str]
    ) -> tuple[list[gs.Node], set[str]]:
        """Return the nodes that values need, and which known values or inputs."""
        needed: dict[int, gs.Node] = {}
        met: set[str] = set()
        seen: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in known or name in self.fed:
                met.add(name)
                continue
            node = self.makers.get(name) or self.others.get(name)
            if node is not None and id(node) not in needed:
                needed[id(node)] = node
                stack += _reads(node)
        return list(needed.values()), met


def _reads(node: gs.Node) -> list[str]:
    """Return the names of all that a node reads, inside its subgraphs too."""
    names = [tensor.name for tensor in node.inputs]
    for graph in subgraphs_of(node):
        names += [tensor.name for tensor in graph.outputs]
        for inner in graph.nodes:
            names += _reads(inner)
    return [name for name in names if name]
