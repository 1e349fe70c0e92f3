"""What layers read: Gram matrices of their inputs, a bounded number at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxshrink.activations import kept
from onnxshrink.activations.gathering import SLICE_BYTES, fingerprint, gather
from onnxshrink.model import Model
from onnxshrink.statistics import Multi, Statistic, Stored
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight

if TYPE_CHECKING:
    from onnxshrink.base import Context

__all__ = [
    "Inputs",
    "gather_inputs",
    "gram_bytes",
    "groups_of",
    "seen_from_outside",
]

LARGEST = 512 << 20
"""Bytes of a Gram matrix from which only norms are gathered: above 8,192 inputs."""
HELD = 256 << 20
"""Bytes of Gram matrices that one run gathers, and that a step keeps."""


class Inputs(Mapping[str, InputStatistics]):
    """What layers read, by the name of the weight, gathered a bounded part at a time.

    All of it is gathered at once where it is at most ``HELD`` bytes, and kept for the
    attempts of the step. Otherwise it is cut into groups in the order of the layers,
    and each is gathered when it is asked for and dropped for the next: whoever takes
    the layers in order runs the model once for each group. What is gathered is read
    from the model as it is by then.
    """

    def __init__(
        self,
        ctx: Context,
        layers: Iterable[LinearWeight],
        *,
        largest: int = LARGEST,
    ) -> None:
        """Look at the layers; run the model if all of them go together.

        Args:
            ctx: Samples, session options, memory and progress.
            layers: Layers of one model.
            largest: Bytes of a Gram matrix from which there are norms only; 0: always.
        """
        seen = list(seen_from_outside(layers))
        self._ctx = ctx
        self._largest = largest
        self._groups = list(groups_of(seen, HELD, largest))
        self._at = {
            layer.name: number
            for number, group in enumerate(self._groups)
            for layer in group
        }
        self._number = -1
        self._held: Mapping[str, InputStatistics] = {}
        if len(self._groups) == 1:
            self._gather(0)

    def __getitem__(self, name: str) -> InputStatistics:
        """Return what a layer reads."""
        self._gather(self._at[name])
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        """Whether the inputs of a layer can be seen; runs nothing."""
        return name in self._at

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the weights in the order in which they were given."""
        return iter(self._at)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._at)

    def _gather(self, number: int) -> None:
        if number == self._number:
            return
        self._held = {}
        found, _ = gather_inputs(
            self._ctx,
            self._groups[number],
            largest=self._largest,
            keeps=len(self._groups) == 1,
        )
        self._held, self._number = found, number


def seen_from_outside(layers: Iterable[LinearWeight]) -> Iterator[LinearWeight]:
    """Yield the layers of one model whose inputs a run can show.

    These are inputs of the main graph and what its nodes make. Others multiply nothing
    that a statistic covers, a constant, or what is inside a subgraph or function.
    """
    visible: set[int] = set()
    for layer in layers:
        if not visible:
            graph = layer.weight.model.graph
            visible = {id(tensor) for tensor in graph.inputs}
            visible |= {id(t) for node in graph.nodes for t in node.outputs}
        wanted = layer.statistics_for("norm")
        if wanted is not None and all(id(tensor) in visible for tensor, _ in wanted):
            yield layer


def groups_of(
    layers: Iterable[LinearWeight], held: int = HELD, largest: int = LARGEST
) -> Iterator[list[LinearWeight]]:
    """Cut layers into groups whose Gram matrices take so many bytes at most.

    Args:
        layers: Layers whose inputs can be seen.
        held: Bytes of a group, unless one layer alone takes more.
        largest: Bytes from which a layer's norms are gathered instead.
    """
    group: list[LinearWeight] = []
    total, counted = 0, set[object]()
    for layer in layers:
        size = gram_bytes(layer)
        # Layers that read one value in one way share the matrix.
        read = [
            (tensor.name, s.key) for tensor, s in layer.statistics_for("gram") or ()
        ]
        shared = tuple(read)
        size = 0 if size > largest or shared in counted else size
        if group and size and total + size > held:
            yield group
            group, total, counted = [], 0, set()
            size = 0 if gram_bytes(layer) > largest else gram_bytes(layer)
        group.append(layer)
        counted.add(shared)
        total += size
    if group:
        yield group


def gram_bytes(layer: LinearWeight) -> int:
    """Bytes of the float64 Gram matrices of a layer's inputs."""
    stacks, _, inputs = layer.layout.matrices_shape
    return stacks * inputs * inputs * 8


def gather_inputs(
    ctx: Context,
    layers: Sequence[LinearWeight],
    beside: Mapping[str, Stored] | None = None,
    *,
    model: Model | None = None,
    largest: int = LARGEST,
    slice_bytes: int = SLICE_BYTES,
    folder: Path | None = None,
    keeps: bool = False,
) -> tuple[dict[str, InputStatistics], dict[str, Statistic]]:
    """Gather what layers read in one run over the calibration samples.

    Args:
        ctx: Samples, session options, memory and progress.
        layers: Layers of one model.
        beside: Further statistics, by the name of their tensor, for the same run.
        model: Their model, if there may be no layers.
        largest: Bytes of a Gram matrix from which there are norms only.
        slice_bytes: Bytes of activations held at a time.
        folder: Where to keep what is gathered. Without one it is kept in the folder
            of the context until the step is done, if there is such.
        keeps: Whether the attempts of the step that follow find it in memory.

    Returns:
        What each layer reads, by the name of its weight; a layer whose inputs cannot
        be seen from outside is absent. And the statistics of ``beside``.
    """
    if model is None:
        if not layers:
            return {}, {}
        model = layers[0].weight.model
    samples = ctx.samples.calibration
    count = len(samples) if samples is not None else 1
    wanted: dict[str, dict[str, Statistic]] = {
        name: {"beside": one} for name, one in (beside or {}).items()
    }
    places: dict[str, list[tuple[str, str]]] = {}
    by_name = {layer.name: layer for layer in seen_from_outside(layers)}
    for layer in by_name.values():
        what: Literal["gram", "norm"] = "gram"
        if gram_bytes(layer) > largest:
            what = "norm"
        for tensor, statistic in layer.statistics_for(what, count) or ():
            # Layers that read the same values in the same way share the matrix.
            label = str(statistic.key)
            wanted.setdefault(tensor.name, {})[label] = statistic
            places.setdefault(layer.name, []).append((tensor.name, label))
    mark = ("inputs", fingerprint(model) if keeps else "", samples)
    known: dict[tuple[str, str], Statistic] = {}
    if keeps:
        for tensor_name, parts in wanted.items():
            for label in list(parts):
                one = ctx.memory.get((*mark, tensor_name, label))
                if one is not None and label != "beside":
                    known[tensor_name, label] = one
                    del parts[label]
    asked = {name: Multi(**parts) for name, parts in wanted.items() if parts}
    found = _run(model, asked, ctx, folder, slice_bytes) if asked else {}
    for name, multi in found.items():
        assert isinstance(multi, Multi)
        for label, part in multi.parts.items():
            known[name, label] = part
            if keeps and label != "beside":
                ctx.memory.put((*mark, name, label), part)
    seen = {
        name: InputStatistics.of(by_name[name], [known[place] for place in at])
        for name, at in places.items()
        if all(place in known for place in at)
    }
    others = {
        name: known[name, "beside"]
        for name in beside or {}
        if (name, "beside") in known
    }
    return seen, others


def _run(
    model: Model,
    asked: Mapping[str, Multi],
    ctx: Context,
    folder: Path | None,
    slice_bytes: int,
) -> dict[str, Statistic]:
    """Run over the samples, or read what an earlier run has kept."""
    samples = ctx.samples.calibration
    place = folder or ctx.folder
    is_stored = all(
        isinstance(part, Stored)
        for one in asked.values()
        for part in one.parts.values()
    )
    if place is None or samples is None or samples.random or not is_stored:
        # One use is all they are for: they are not put into the cache of the context.
        alone = dataclasses.replace(ctx, cache={})
        return gather(model, asked, alone, slice_bytes=slice_bytes)
    # What is deleted with the step is worth writing only where it took long.
    least = 0.0 if folder is not None else kept.SAVE_SECONDS
    return kept.gather_cached(
        model, asked, ctx, place, slice_bytes=slice_bytes, least=least
    )
