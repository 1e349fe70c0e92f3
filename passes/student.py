"""student: a smaller model of the same kind, with the original's weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Node, Weight
from onnxshrink.structure import blocks, channels, layers, thinning
from onnxshrink.structure.blocks import Block, Run
from onnxshrink.structure.channels import Group
from onnxshrink.structure.layers import NORMALISATIONS, LinearWeight
from onnxshrink.structure.selection import selected
from onnxshrink.structure.shapes import macs_by_value

__all__ = ["Student"]

Array = NDArray[Any]
Start = Literal["normal", "zero", "one"]
"""How a fresh weight begins."""

_FRESH = "values of "
"""The name of a site where a weight begins anew: this, then the weight's name."""
_EPSILON = 1e-5
"""Added to a variance of BatchNormalization before its root is taken."""


@dataclass(frozen=True, kw_only=True)
class BlockSite(Site):
    """A block to leave out.

    Attributes:
        start: Name of the value it begins with.
        nodes: How many it has.
    """

    start: str
    nodes: int


@dataclass(frozen=True, kw_only=True)
class ChannelsSite(Site):
    """A group of channels that becomes smaller.

    Attributes:
        channels: How many there are.
        kept: How many stay.
    """

    channels: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class FreshSite(Site):
    """A weight that begins anew.

    Attributes:
        start: How it begins.
    """

    start: Start


@dataclass(frozen=True, kw_only=True)
class Student(SitePass):
    """Build a smaller model from the one given: fewer blocks, thinner layers.

    Its first answers are wrong. Let ``recover`` follow, which fits thinner layers to
    what they gave, or ``distill``, which teaches the student what the original answers
    (Hinton, Vinyals and Dean 2015). A student that begins with weights of its teacher
    needs far less training (DistilBERT, Sanh et al. 2019).

    Blocks that repeat are left out: residual blocks, whole transformer layers, and
    layers in a row that are alike. Channels go that matter least. What counts is the
    norm of the weights that make a channel, times the norm of those that read it. A
    channel goes everywhere that the graph ties it to (branches that are added, norms,
    depthwise kernels, whole attention heads, whole groups). Inputs and outputs of the
    model stay as they are.

    Attributes:
        keep: Share of the blocks that stay, of each run of blocks that are alike,
            rounded up; 0 leaves all out.
        choose: Which stay: ``spread`` evenly from the first on (of 0.5, every second),
            the ``first``, or the ``last``.
        width: Share of the channels, features and heads that stay.
        round_to: Channels stay in multiples of this, if there are more of them.
        inherit: Whether what stays keeps its weights. If not, it begins anew: weights
            normal with variance 2 / inputs (He et al. 2015), biases 0, norms 1.
        only: Act only on these blocks, nodes or weights: names, glob patterns or op
            types.
        skip: Leave these alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "student"
    promise: ClassVar[Promise] = Promise.SIGNATURE
    folds: ClassVar[Literal["", "weights", "fused"]] = "fused"
    example: ClassVar[str] = "student:keep=0.5,width=0.75 distill"

    keep: float = 0.5
    choose: Literal["spread", "first", "last"] = "spread"
    width: float = 1.0
    round_to: int = 8
    inherit: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 0 <= self.keep <= 1:
            is_step = self.keep >= 2 and self.keep == int(self.keep)
            share = f"{1 / self.keep:.3g}" if is_step else ""
            hint = (
                f"; for one block in {self.keep:g} write keep={share}" if share else ""
            )
            raise UsageError(f"keep is a share from 0 to 1, not {self.keep:g}{hint}")
        if not 0 < self.width <= 1:
            raise UsageError(f"width is a share above 0 and up to 1, not {self.width}")
        if not 1 <= self.round_to <= 4096:
            raise UsageError(f"round_to is from 1 to 4096, not {self.round_to}")

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List blocks to leave out, channels to remove and weights to begin anew."""
        costs = _Costs(model, ctx)
        gone = self._surplus(model, ctx)
        sites: list[Site] = [costs.of_block(block) for block in gone]
        rest = model.copy()
        if gone:
            named = {block.name for block in gone}
            blocks.remove(rest, [b for b in _all(blocks.find(rest)) if b.name in named])
            rest.drop_unused()
        if self.width < 1:
            sites += [
                costs.of_group(group, self._kept(group))
                for group in self._groups(rest, ctx)
            ]
        if not self.inherit:
            sites += [
                FreshSite(_FRESH + weight.name, "weight", start=start)
                for weight, start, _ in self._fresh(rest, ctx.skipped)
            ]
        if self.keep == 1 and self.width == 1 and self.inherit:
            ctx.skipped(self.name, "keep=1 and width=1 leave everything as it is")
        thinning.tell_of_bodies(model, ctx.skipped)
        return sites

    def _surplus(self, model: Model, ctx: Context) -> list[Block]:
        """Return the blocks that go, in graph order."""
        if self.keep == 1:
            return []
        gone: list[Block] = []
        runs = blocks.find(model)
        for run in runs:
            stay = self._stay(len(run.units))
            for number, block in enumerate(run.units):
                if number in stay or not selected(block.names, self.only, self.skip):
                    continue
                gone.append(block)
            if len(stay) == len(run.units):
                count = len(stay)
                why = f"of a run of {count}, keep={self.keep:g} keeps {count}"
                ctx.skipped(run.units[0].name, f"the block stays: {why}")
        if not runs:
            why = "no residual block and no layers in a row that are alike"
            ctx.skipped(self.name, f"there is {why}")
        elif not gone:
            ctx.skipped(self.name, "keep, only and skip leave every block")
        return gone

    def _stay(self, count: int) -> set[int]:
        """Return which of ``count`` blocks stay."""
        # A share of 0.7 of 10 is 7, whatever binary fractions make of it.
        number = min(count, int(np.ceil(count * self.keep - 1e-9)))
        if self.choose == "first":
            return set(range(number))
        if self.choose == "last":
            return set(range(count - number, count))
        return {int(place / self.keep + 1e-9) for place in range(number)}

    def _groups(self, model: Model, ctx: Context) -> list[Group]:
        """Return the groups of channels that become fewer."""
        found = []
        for group in thinning.removable(model, self.only, self.skip, ctx.skipped):
            if self._kept(group) == group.size:
                ctx.skipped(group.name, f"all its {group.size} channels stay")
            else:
                found.append(group)
        return found

    def _kept(self, group: Group) -> int:
        """Return how many channels of a group stay."""
        return thinning.rounded(group, group.size * self.width, self.round_to)

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Keep more channels; a block or a fresh weight is all or nothing."""
        if strength >= 1:
            return site
        if not isinstance(site, ChannelsSite):
            return None
        size, kept = site.channels, site.kept
        # A site of few channels, or of many positions each, was not rounded either.
        is_rounded = size > self.round_to and kept % self.round_to == 0
        step = self.round_to if is_rounded else 1
        more = round((size - (size - kept) * strength) / step) * step
        if more >= size:
            return None
        share = (size - more) / (size - kept)
        return replace(site, savings=site.savings * share, kept=more)

    def _fresh(
        self, model: Model, skipped: Callable[[str, str], None] = lambda *_: None
    ) -> Iterator[tuple[Weight, Start, int]]:
        """Yield the weights to begin anew, each with how many inputs it sums up."""
        roles: tuple[layers.Role, ...] = ("weight", "table", "bias")
        for layer in layers.find(model, only=self.only, skip=self.skip, roles=roles):
            use = layer.uses[0] if layer.uses else None
            if use is None or layer.why_not:
                skipped(layer.name, layer.why_not or "nothing known reads it")
            elif use.role != "bias":
                yield layer.weight, "normal", _inputs(layer, use.role)
            elif use.node.op in NORMALISATIONS and use.index == 1:
                yield layer.weight, "one", 1
            else:
                yield layer.weight, "zero", 1
        seen: set[int] = set()
        for node in model.nodes():
            if node.op != "BatchNormalization":
                continue
            starts: tuple[Start, Start] = ("zero", "one")
            for tensor, start in zip(node.inputs[3:5], starts, strict=False):
                weight = model.constant(tensor)
                if weight is None or weight.is_input or weight.is_output:
                    continue
                names = [weight.name, node.name, node.op]
                if not selected(names, self.only, self.skip):
                    continue
                if id(weight.constant) not in seen:
                    seen.add(id(weight.constant))
                    yield weight, start, 1

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Act at one site."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Leave out blocks, then remove channels, then begin weights anew."""
        chosen = {site.where: site for site in sites}
        read = {id(t) for t in model.graph.inputs if _is_weight(t) and t.outputs}
        gone = [b for b in _all(blocks.find(model)) if b.name in chosen]
        for block in gone:
            ctx.did(block.name, f"block left out: {len(block.nodes)} nodes")
        if gone:
            blocks.remove(model, gone)
            model.drop_unused()
            model.forget_shapes()
        if self.width < 1:
            self._thin(model, chosen, ctx)
        if not self.inherit:
            self._restart(model, chosen, ctx)
        idle = [t for t in model.graph.inputs if id(t) in read and not t.outputs]
        if idle:  # weights that a caller might have set, of blocks that went
            left = {id(t) for t in idle}
            model.graph.inputs = [t for t in model.graph.inputs if id(t) not in left]
            model.drop_unused()
            for tensor in idle:
                ctx.did(tensor.name, "an input with a default that nothing reads now")

    def _thin(self, model: Model, chosen: Mapping[str, Site], ctx: Context) -> None:
        kept = []
        for group in channels.find(model):
            site = chosen.get(group.name)
            if site is None or group.why:
                continue
            assert isinstance(site, ChannelsSite)
            count = site.kept
            if site.channels != group.size:
                # A block that the plan leaves out is still there.
                count = self._kept(group)
            kept.append((group, thinning.strongest(thinning.norms(group), count)))
        if not kept:
            return
        channels.remove_all(model, kept)
        for group, stay in kept:
            ctx.did(group.name, f"{group.size} -> {len(stay)} channels")
        model.drop_unused()

    def _restart(self, model: Model, chosen: Mapping[str, Site], ctx: Context) -> None:
        for weight, start, inputs in list(self._fresh(model)):
            site = chosen.get(_FRESH + weight.name)
            if site is None:
                continue
            values = np.full(weight.shape, start == "one", weight.dtype)
            if start == "normal":
                seed = [ctx.seed, zlib.crc32(weight.name.encode())]
                draws = np.random.default_rng(seed).standard_normal(weight.shape)
                values = (draws * np.sqrt(2 / inputs)).astype(weight.dtype)
            model.set_weight(weight, values)
            ctx.did(site.where, start)


def _is_weight(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


def _all(runs: Iterable[Run]) -> list[Block]:
    return [block for run in runs for block in run.units]


def _inputs(layer: LinearWeight, role: layers.Role) -> int:
    """Return how many inputs an output of a layer sums up; of a table, its width."""
    count = (
        layer.weight.shape[-1] if role == "table" else layer.layout.matrices_shape[2]
    )
    return max(1, count)


class _Costs:
    """What blocks and channels take, for the plan."""

    def __init__(self, model: Model, ctx: Context) -> None:
        samples = ctx.samples.calibration or ctx.samples.training
        self.model = model
        self.macs: dict[str, int | None] = {}
        if samples is not None and samples.used:
            feed = samples.read(np.arange(samples.batch or 1))
            self.macs = macs_by_value(model, feed)

    def _macs(self, nodes: Iterable[Node]) -> int:
        names = [tensor.name for node in nodes for tensor in node.outputs]
        return sum(self.macs.get(name) or 0 for name in names)

    def of_block(self, block: Block) -> Site:
        inside = {id(node) for node in block.nodes}
        weights: dict[int, Weight] = {}
        for node in block.nodes:
            for tensor in node.inputs:
                weight = self.model.constant(tensor) if tensor.name else None
                if weight is not None:
                    weights[id(weight.constant)] = weight
        freed = [
            weight.nbytes
            for weight in weights.values()
            if all(id(node) in inside for node, _ in weight.uses)
        ]
        return BlockSite(
            block.name,
            block.kind,
            Savings(sum(freed), self._macs(block.nodes)),
            start=block.start.name,
            nodes=len(block.nodes),
        )

    def of_group(self, group: Group, kept: int) -> Site:
        share = 1 - kept / group.size
        sizes = {id(p.weight.constant): p.weight.nbytes for p in group.where}
        return ChannelsSite(
            group.name,
            group.nodes[0].op,
            Savings(sum(sizes.values()), self._macs(group.nodes)) * share,
            channels=group.size,
            kept=kept,
        )
