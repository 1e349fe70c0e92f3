"""channels: whole channels, neurons and heads are removed; tensors get smaller."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink import runtime
from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.measuring.measure import latencies
from onnxshrink.model import Model
from onnxshrink.solvers.channels import block_losses, energies, refit
from onnxshrink.structure import channels, layers
from onnxshrink.structure.channels import Group, Slices
from onnxshrink.structure.inferred import value_infos
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import LinearWeight
from onnxshrink.structure.selection import selected
from onnxshrink.structure.shapes import macs_by_value
from onnxshrink.training import norms
from onnxshrink.training.importance import output_metrics

__all__ = ["IMPORTANCES", "Channels"]

Array = NDArray[Any]
Measure = Literal["bytes", "macs"]

_LARGEST = 4608
"""Inputs of a layer up to which removed ones are made up for."""
_SEEN = 64
"""Samples that gradients are taken on."""
_PROBES = 7
"""Models that are timed while a share of the latency is looked for."""
_LEAST = 0.1
"""Share of a group's channels that stay at least where an amount is of the model."""
_EPSILON = 1e-5
"""Added to a variance of BatchNormalization before its root is taken."""

_RANGES = re.compile(r"\d{1,7}(-\d{1,7})?(\.\d{1,7}(-\d{1,7})?)*")


@dataclass(frozen=True, kw_only=True)
class ChannelSite(Site):
    """Channels that go together through every axis that has them.

    Attributes:
        channels: How many there are.
        kept: How many stay.
        weights: The weights that get smaller, each with the axis.
        order: All channels, those that matter most first.
    """

    channels: int
    kept: int
    weights: str = ""
    order: tuple[int, ...] = field(default=(), repr=False)

    @property
    def stay(self) -> list[int]:
        """The channels that stay, in their order."""
        return sorted(self.order[: self.kept])


@dataclass(frozen=True, kw_only=True)
class Channels(SitePass):
    """Remove whole channels, neurons and attention heads.

    Tensors really get smaller: the file shrinks, and an unmodified onnxruntime is
    faster. Channels go everywhere that the graph ties them together (branches that are
    added, norms, depthwise kernels, whole attention heads, whole groups); inputs and
    outputs of the model stay as they are. Counts stay multiples of 8, which kernels
    like: cutting channels one by one can make a model slower.

    With data, channels go first whose loss costs the model's outputs least once the
    layers that read them are fitted anew (Optimal Brain Surgeon for whole channels:
    Hassibi and Stork 1993; what an error costs the outputs is found by gradients), and
    these layers are fitted anew to what they gave (He et al. 2017; Luo et al. 2017).
    BatchNormalization statistics are estimated again. Let ``recover`` and ``distill``
    follow; they are judged together with it.

    Attributes:
        keep: Share of the channels of each group that stay; 0.75 unless another
            amount is given.
        bytes: Instead: share of the bytes of all weights that stays, divided among the
            groups by what each channel costs the outputs.
        macs: The same of the multiply-accumulates.
        latency: The same of the time of a run, measured on this machine.
        stay: Instead: channels that stay, by name: ``conv1.weight:0-7.12``; groups not
            named are left alone. The pass prints what repeats it.
        importance: How channels are compared: ``outputs``, what the model's outputs
            lose; ``inputs``, what the layers that read them lose once fitted anew;
            ``energy``, what they add to these; ``norm``, their weights alone (L2);
            ``auto`` is outputs with data, else norm.
        round_to: Channels stay in multiples of this, if there are more of them.
        repair: Whether layers are fitted anew, where data is given.
        only: Act only on these groups, nodes or weights: names, glob patterns or op
            types.
        skip: Leave these alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "channels"
    promise: ClassVar[Promise] = Promise.SIGNATURE
    folds: ClassVar[Literal["", "weights", "fused"]] = "fused"
    example: ClassVar[str] = "channels:macs=0.5 recover distill"

    keep: float | None = None
    bytes: float | None = None
    macs: float | None = None
    latency: float | None = None
    stay: tuple[str, ...] = ()
    importance: str = "auto"
    round_to: int = 8
    repair: bool = True

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        amounts = ("keep", "bytes", "macs", "latency")
        given = [name for name in amounts if getattr(self, name) is not None]
        given += ["stay"] if self.stay else []
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each say how much; give one")
        for name in given:
            value = getattr(self, name)
            if name != "stay" and not 0 < value < 1:
                raise UsageError(f"{name} is a share between 0 and 1, not {value}")
        known = ["auto", *IMPORTANCES]
        if self.importance not in known:
            raise UsageError(
                f"importance is one of {', '.join(known)}, not {self.importance!r}."
                f"{nearest(self.importance, known)}"
            )
        if not 1 <= self.round_to <= 4096:
            raise UsageError(f"round_to is from 1 to 4096, not {self.round_to}")
        _ = self.named  # refuses what is no list of channels

    @cached_property
    def named(self) -> Mapping[str, tuple[int, ...]]:
        """Channels that stay, by name of the group."""
        found: dict[str, tuple[int, ...]] = {}
        for text in self.stay:
            name, _, ranges = text.rpartition(":")
            if not name or not _RANGES.fullmatch(ranges):
                raise UsageError(
                    "stay is name:channels, such as conv1.weight:0-7.12, "
                    f"not {text[:60]!r}"
                )
            numbers: set[int] = set()
            for part in ranges.split("."):
                first, _, last = part.partition("-")
                numbers.update(range(int(first), int(last or first) + 1))
            found[name] = tuple(sorted(numbers))
        return found

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the groups of channels that become fewer.

        Raises:
            UsageError: What is asked for needs data that is not there.
        """
        groups = self._groups(model, ctx)
        if not groups:
            return []
        costs = _Costs(model, ctx, groups)
        if self.stay:
            return self._as_named(groups, costs, ctx)
        scores = self._scores(model, groups, ctx)
        share = self.bytes or self.macs or self.latency
        if share is None:
            keep = 0.75 if self.keep is None else self.keep
            counts = [self._rounded(g, g.size * keep) for g in groups]
        elif self.latency is not None:
            counts = self._timed(model, groups, scores, costs, ctx)
        else:
            measure: Measure = "macs" if self.macs is not None else "bytes"
            counts = self._divided(groups, scores, costs, measure, share)
        if share is not None:
            self._tell_of_limits(counts, groups, costs, share, ctx)
        sites = []
        for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
            if counts[number] >= group.size:
                ctx.skipped(group.name, f"all its {group.size} channels stay")
                continue
            order = np.argsort(-score, kind="stable")
            sites.append(
                _site(group, counts[number], tuple(map(int, order)), costs, number)
            )
        return sites

    def _groups(self, model: Model, ctx: Context) -> list[Group]:
        """Return the groups whose channels may become fewer; say why others may not."""
        found, stopped = [], []
        for group in channels.find(model):
            if not selected(group.names, self.only, self.skip):
                continue
            if group.why:
                stopped.append(group)
            elif not any(part.role == "producer" for part in group.where):
                ctx.skipped(group.name, "its channels are not made by a weight")
            else:
                found.append(group)
        for group in stopped:
            sizes = {id(p.weight.constant): p.weight.size for p in group.where}
            ctx.skipped(
                group.name,
                f"its {group.size} channels stay, {sum(sizes.values()):,} parameters: "
                f"{group.why}",
            )
        for weight in model.weights():
            if weight.graph is not model.graph and layers.is_float(weight):
                ctx.skipped(weight.name, "it is inside a branch, a body or a function")
        if not found and not stopped:
            ctx.skipped(self.name, "there are no channels that could be fewer")
        return found

    def _as_named(
        self, groups: Sequence[Group], costs: _Costs, ctx: Context
    ) -> list[Site]:
        names = [group.name for group in groups]
        for name in self.named:
            if name not in names:
                raise UsageError(
                    f"stay names {name!r}, which has no channels that could be fewer."
                    f"{nearest(name, names)}"
                )
        sites: list[Site] = []
        for number, group in enumerate(groups):
            stay = self.named.get(group.name)
            if stay is None:
                ctx.skipped(group.name, "stay does not name it")
            elif stay[-1] >= group.size:
                raise UsageError(
                    f"stay keeps channel {stay[-1]} of {group.name}, which has "
                    f"{group.size}, counted from 0"
                )
            else:
                rest = [c for c in range(group.size) if c not in set(stay)]
                order = (*stay, *rest)
                sites.append(_site(group, len(stay), order, costs, number))
        return sites

    def _rounded(self, group: Group, wanted: float) -> int:
        """Round to a multiple, unless channels are few or many positions each."""
        size = group.size
        step = self.round_to if group.width == 1 and size > self.round_to else 1
        return min(size, max(step, int(wanted / step + 0.5) * step))

    def _step(self, group: Group) -> int:
        return self.round_to if group.width == 1 and group.size > self.round_to else 1

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Keep more channels."""
        assert isinstance(site, ChannelSite)
        if strength >= 1:
            return site
        size, kept = site.channels, site.kept
        step = self.round_to if size > self.round_to else 1
        more = min(size, math.ceil((size - (size - kept) * strength) / step) * step)
        if more >= size:
            return None
        share = (size - more) / (size - kept)
        return replace(site, kept=more, savings=site.savings * share)

    # --- how channels are compared --------------------------------------------------

    def _scores(
        self, model: Model, groups: Sequence[Group], ctx: Context
    ) -> list[Array]:
        """Return what each channel of each group is worth, found once in a step."""
        way = self.importance
        if way == "auto":
            way = "outputs" if _has_data(ctx) else "norm"
        if way in ("outputs", "inputs", "energy"):
            ctx.need_data("to see what layers read", "calibration")
        key = ("channels", fingerprint(model), way, tuple(g.name for g in groups))
        return ctx.remember(key, lambda: IMPORTANCES[way](model, groups, ctx))

    def _divided(
        self,
        groups: Sequence[Group],
        scores: Sequence[Array],
        costs: _Costs,
        measure: Measure,
        share: float,
    ) -> list[int]:
        """Return counts that take a share of what all take, at the least loss.

        One price for what a channel saves decides: a step of channels goes if it loses
        less than the price of what it saves. The price is found by bisection.
        """
        worth = [costs.each(number, measure) for number in range(len(groups))]
        ladders = []
        for group, score, saved in zip(groups, scores, worth, strict=True):
            step = self._step(group)
            least = max(step, math.ceil(group.size * _LEAST / step) * step)
            ascending = np.sort(score)
            # The first removals bring the count to a multiple of the step.
            tops = list(range(group.size // step * step, least - 1, -step))
            tops = [top for top in tops if top < group.size]
            cuts = np.array([group.size - top for top in tops], np.int64)
            sums = np.concatenate([[0.0], np.cumsum(ascending)])[cuts]
            gaps = np.diff(sums, prepend=0.0) / np.diff(cuts, prepend=0)
            prices = np.maximum.accumulate(gaps / max(saved, 1e-30)) if tops else gaps
            ladders.append((tops, prices))

        def counts(price: float) -> list[int]:
            chosen = []
            for group, (tops, prices) in zip(groups, ladders, strict=True):
                taken = int(np.searchsorted(prices, price, side="right"))
                chosen.append(tops[taken - 1] if taken else group.size)
            return chosen

        every = np.unique(np.concatenate([prices for _, prices in ladders]))
        low, high = -1, len(every) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if costs.share(counts(float(every[middle])), measure) <= share:
                high = middle
            else:
                low = middle
        return counts(float(every[high])) if len(every) else [g.size for g in groups]

    def _timed(
        self,
        model: Model,
        groups: Sequence[Group],
        scores: Sequence[Array],
        costs: _Costs,
        ctx: Context,
    ) -> list[int]:
        """Return counts with which a run takes the share asked for, by timing it."""
        assert self.latency is not None
        samples = ctx.samples.calibration or ctx.samples.evaluation
        assert samples is not None
        feed = samples.read(np.arange(samples.batch or 1))
        session = partial(runtime.session, threads=ctx.threads or 1)
        base = session(model)
        measure: Measure = "macs" if costs.macs_known else "bytes"
        best, gap = [group.size for group in groups], math.inf
        low, high = 0.0, 1.0
        for number in range(_PROBES):
            share = (low + high) / 2
            counts = self._divided(groups, scores, costs, measure, share)
            trial = model.copy()
            named = {
                g.name: (c, s) for g, c, s in zip(groups, counts, scores, strict=True)
            }
            kept = [
                (group, _strongest(named[group.name][1], named[group.name][0]))
                for group in channels.find(trial)
                if group.name in named and named[group.name][0] < group.size
            ]
            channels.remove_all(trial, kept)
            trial.drop_unused()
            _, ratio = latencies(session(trial), base, feed)
            assert ratio is not None
            ctx.progress(number + 1, _PROBES, f"{self.name}: timing")
            if abs(ratio - self.latency) < gap:
                best, gap = counts, abs(ratio - self.latency)
            if ratio > self.latency:
                high = share
            else:
                low = share
        return best

    def _tell_of_limits(
        self,
        counts: Sequence[int],
        groups: Sequence[Group],
        costs: _Costs,
        share: float,
        ctx: Context,
    ) -> None:
        if self.latency is not None:
            return
        measure: Measure = "macs" if self.macs is not None else "bytes"
        reached = costs.share(counts, measure)
        if reached > share * 1.05:
            ctx.skipped(
                self.name,
                f"{reached:.0%} of the {measure} are left where {share:.0%} were asked "
                f"for: {_LEAST:.0%} of the channels stay in every group",
            )
        del groups

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Remove the channels of one group."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Fit the layers that read the channels anew, then remove these."""
        chosen = {site.where: site for site in sites if isinstance(site, ChannelSite)}
        kept = [
            (group, chosen[group.name].stay)
            for group in channels.find(model)
            if group.name in chosen and not group.why
        ]
        if not kept:
            return
        if self.repair and _has_data(ctx):
            for name, lost in _refitted(model, kept, ctx):
                ctx.did(name, f"fitted anew: {lost:.2%} of its output energy is lost")
        channels.remove_all(model, kept)
        for group, stay in kept:
            inexact = f"; {group.inexact}" if group.inexact else ""
            ctx.did(group.name, f"{group.size} -> {len(stay)} channels{inexact}")
        model.drop_unused()
        if self.repair and _has_data(ctx):
            samples = ctx.samples.calibration
            assert samples is not None
            found = norms.find_norms(model, (), (), lambda name, why: None)
            norms.estimate(model, found, samples, ctx)
        if not self.stay:
            ctx.did(self.name, f"the same again: {_recipe(kept)}")


# --- importance -----------------------------------------------------------------------

Importance = Callable[[Model, Sequence[Group], Context], "list[Array]"]
"""Returns for each group what each channel is worth, float64 [channels], at least 0.

Figures of different groups are compared where an amount is of the whole model.
"""


def _by_norm(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """Norm of what makes a channel times norm of what reads it; shares of a group."""
    found = []
    for group in groups:
        score = np.ones(group.size)
        for role in ("producer", "consumer", "filter", "scale"):
            parts = [part for part in group.where if part.role == role]
            if parts:
                score *= sum(_slice_energy(part) for part in parts)
        for part in group.where:
            if part.role == "variance":
                variance = np.abs(part.weight.read().astype(np.float64))
                score /= variance[part.offsets].mean(1) + _EPSILON
        total = float(score.sum())
        found.append(score / total if total > 0 else score)
    return found


def _by_energy(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What channels add to the layers that read them, as a share of what these give."""
    return _by_consumers(model, groups, ctx, fits=False, counts=None)


def _by_inputs(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What the layers that read channels lose once they are fitted anew; a share."""
    return _by_consumers(model, groups, ctx, fits=True, counts=None)


def _by_outputs(model: Model, groups: Sequence[Group], ctx: Context) -> list[Array]:
    """What the model's outputs lose once the layers that read channels are fitted."""
    samples = ctx.need_data("to see what errors cost the outputs", "calibration")
    readers = _readers(model, groups)
    values = {
        layer.output.name: layer.uses[0].output_channels
        for layer in readers.values()
        if not layer.is_shared and layer.kind in ("Conv", "Gemm", "MatMul")
    }
    shapes = value_infos(model)
    places = {}
    for name, axis in values.items():
        info = shapes.get(name)
        rank = None if info is None or info.shape is None else len(info.shape)
        if axis >= 0 or rank is not None:
            places[name] = axis if axis >= 0 else (rank or 0) + axis
    try:
        counts = output_metrics(
            model,
            places,
            samples.take(slice(0, _SEEN)),
            seed=ctx.seed,
            threads=ctx.threads,
        )
    except ModelError as error:
        ctx.skipped("channels", f"layers are compared by their own outputs: {error}")
        counts = {}
    return _by_consumers(model, groups, ctx, fits=True, counts=counts or None)


IMPORTANCES: dict[str, Importance] = {
    "outputs": _by_outputs,
    "inputs": _by_inputs,
    "energy": _by_energy,
    "norm": _by_norm,
}
"""Ways to compare channels, by name; another package may add its own."""


def _by_consumers(
    model: Model,
    groups: Sequence[Group],
    ctx: Context,
    *,
    fits: bool,
    counts: Mapping[str, Array] | None,
) -> list[Array]:
    readers = _readers(model, groups)
    small = [layer for layer in readers.values() if _width(layer) <= _LARGEST]
    seen = ctx.inputs(small) if small else {}
    totals = [np.zeros(group.size) for group in groups]
    known = [False] * len(groups)
    by_weight: dict[str, list[tuple[int, Slices]]] = {}
    for number, group in enumerate(groups):
        for part in group.where:
            if part.role == "consumer":
                by_weight.setdefault(part.weight.name, []).append((number, part))
    for name in seen:
        layer, inputs = readers[name], seen[name]
        moments = _moments(layer, inputs)
        if moments is None:
            continue
        weights = layer.layout.matrices(layer.weight.read())[0].astype(np.float64)
        output = None
        if counts is not None:
            output = counts.get(layer.output.name)
            if output is not None and output.shape != (len(weights),):
                output = None
        if output is None:
            total = float(np.einsum("oi,ij,oj->", weights, moments, weights))
            mean = np.mean([c.mean() for c in counts.values()]) if counts else 1.0
            output = np.full(len(weights), float(mean) / max(total, 1e-30))
            if counts:
                output *= max(total, 1e-30)
        for number, part in by_weight[name]:
            blocks = _blocks(layer, part)
            loss = block_losses if fits else energies
            totals[number] += loss(weights, moments, blocks, output)
            known[number] = True
    plain = _by_norm(model, groups, ctx)
    some = [float(t.sum()) for t, k in zip(totals, known, strict=True) if k]
    typical = float(np.median(some)) if some else 1.0
    return [
        total if is_known else norm * typical
        for total, norm, is_known in zip(totals, plain, known, strict=True)
    ]


def _readers(model: Model, groups: Sequence[Group]) -> dict[str, LinearWeight]:
    """Return the layers that sum up channels of groups, by the name of the weight."""
    wanted = {
        id(part.weight.constant)
        for group in groups
        for part in group.where
        if part.role == "consumer"
    }
    return {
        layer.name: layer
        for layer in layers.find(model)
        if id(layer.weight.constant) in wanted
        and not layer.why_not
        and layer.groups == 1
        and layer.kind in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and not any(use.layout != layer.layout for use in layer.uses)
    }


def _moments(layer: LinearWeight, seen: InputStatistics) -> Array | None:
    """Return second moments of inputs, about their mean if the bias is free."""
    if seen.gram is None or not seen.count or not seen.is_finite:
        return None
    moments = seen.gram[0] / seen.count
    if _free_bias(layer):
        mean = seen.mean[0]
        moments = moments - np.outer(mean, mean)
    return np.asarray(moments)


def _free_bias(layer: LinearWeight) -> bool:
    bias = layer.bias
    return bias is not None and not bias.why_not


def _blocks(layer: LinearWeight, part: Slices) -> Array:
    """Return which inputs of a layer each channel is, int64 [channels, inputs each]."""
    shape = [1] * len(layer.weight.shape)
    shape[part.axis] = -1
    along = np.arange(layer.weight.shape[part.axis]).reshape(shape)
    places = layer.layout.matrices(np.broadcast_to(along, layer.weight.shape))[0, 0]
    order = np.argsort(places, kind="stable").reshape(layer.weight.shape[part.axis], -1)
    return order[part.offsets].reshape(len(part.offsets), -1)


def _slice_energy(part: Slices) -> Array:
    """Return the sum of squares of each channel's slice."""
    values = part.weight.read().astype(np.float64)
    others = tuple(axis for axis in range(values.ndim) if axis != part.axis)
    energy: Array = np.square(values).sum(others)[part.offsets].sum(1)
    return energy


# --- fitting anew ---------------------------------------------------------------------


def _refitted(
    model: Model, kept: Sequence[tuple[Group, Sequence[int]]], ctx: Context
) -> Iterator[tuple[str, float]]:
    """Fit the layers that read channels to do without some; say what each loses."""
    readers = _readers(model, [group for group, _ in kept])
    small = [layer for layer in readers.values() if _width(layer) <= _LARGEST]
    seen = ctx.inputs(small) if small else {}
    gone: dict[str, Array] = {}
    for group, stay in kept:
        out = np.setdiff1d(np.arange(group.size), stay)
        for part in group.where:
            if part.role == "consumer" and part.weight.name in seen:
                layer = readers[part.weight.name]
                places = gone.setdefault(layer.name, np.zeros(_width(layer), bool))
                places[_blocks(layer, part)[out].reshape(-1)] = True
    for name in seen:
        layer, inputs = readers[name], seen[name]
        moments = _moments(layer, inputs) if name in gone else None
        if moments is None or layer.kind == "ConvTranspose":
            continue  # one bias is added to all positions that a kernel makes
        values = layer.weight.read()
        dense = layer.layout.matrices(values)[0].astype(np.float64)
        fitted = refit(dense, moments, ~gone[name])
        gap = dense - fitted
        total = float(np.einsum("oi,ij,oj->", dense, moments, dense))
        lost = float(np.einsum("oi,ij,oj->", gap, moments, gap))
        if not np.isfinite(fitted).all() or np.abs(fitted).max() > _most(values.dtype):
            continue
        model.set_weight(
            layer.weight, layer.layout.array(fitted[None]).astype(values.dtype)
        )
        if _free_bias(layer) and layer.bias is not None:
            layer.bias.add(layer.uses[0].alpha * (gap @ inputs.mean[0]))
        yield name, lost / total if total > 0 else 0.0


def _most(dtype: np.dtype[Any]) -> float:
    return 65504.0 if dtype.itemsize == 2 else 1e30


def _width(layer: LinearWeight) -> int:
    return layer.layout.matrices_shape[2]


# --- costs ----------------------------------------------------------------------------


class _Costs:
    """What weights and nodes take once groups have fewer channels."""

    def __init__(self, model: Model, ctx: Context, groups: Sequence[Group]) -> None:
        samples = ctx.samples.calibration or ctx.samples.evaluation
        macs: Mapping[str, int | None] = {}
        if samples is not None and samples.used:
            macs = macs_by_value(model, samples.read(np.arange(samples.batch or 1)))
        self.groups = groups
        self.macs_known = any(macs.values())
        # (bytes, MACs, groups along each axis) of each weight of the model.
        self._parts: list[tuple[int, int, list[list[tuple[int, float]]]]] = []
        places: dict[int, dict[int, dict[int, float]]] = {}
        for number, group in enumerate(groups):
            for part in group.where:
                axes = places.setdefault(id(part.weight.constant), {})
                share = part.offsets.size / part.weight.shape[part.axis]
                axes.setdefault(part.axis, {})[number] = share
        counted: set[int] = set()
        others = sum(count or 0 for count in macs.values())
        for weight in model.weights():
            if weight.graph is not model.graph:
                continue
            done = 0
            for node, index in weight.uses:
                name = node.outputs[0].name
                if index <= 1 and id(node) not in counted and len(weight.shape) > 1:
                    counted.add(id(node))
                    done += macs.get(name) or 0
            others -= done
            axes = places.get(id(weight.constant), {})
            cuts = [list(numbers.items()) for numbers in axes.values()]
            self._parts.append((weight.nbytes, done, cuts))
        self._parts.append((0, others, []))
        self.bytes = sum(nbytes for nbytes, _, _ in self._parts)
        self.macs = sum(macs for _, macs, _ in self._parts)

    def left(self, counts: Sequence[int]) -> tuple[float, float]:
        """Return bytes and multiply-accumulates with so many channels in each group."""
        gone = [1 - c / g.size for c, g in zip(counts, self.groups, strict=True)]
        nbytes = macs = 0.0
        for size, work, cuts in self._parts:
            share = 1.0
            for numbers in cuts:
                share *= 1 - sum(gone[number] * part for number, part in numbers)
            nbytes += size * share
            macs += work * share
        return nbytes, macs

    def share(self, counts: Sequence[int], measure: Measure) -> float:
        """Return what is left, as a share of what there is."""
        nbytes, macs = self.left(counts)
        if measure == "macs":
            return macs / max(self.macs, 1)
        return nbytes / max(self.bytes, 1)

    def each(self, number: int, measure: Measure) -> float:
        """Return what one channel of a group takes while all others are there."""
        counts = [group.size for group in self.groups]
        counts[number] -= 1
        nbytes, macs = self.left(counts)
        return self.macs - macs if measure == "macs" else self.bytes - nbytes

    def saved(self, number: int, kept: int) -> Savings:
        """Return what is saved where one group keeps some of its channels."""
        counts = [group.size for group in self.groups]
        counts[number] = kept
        nbytes, macs = self.left(counts)
        return Savings(round(self.bytes - nbytes), round(self.macs - macs))


def _site(
    group: Group, kept: int, order: tuple[int, ...], costs: _Costs, number: int
) -> ChannelSite:
    weights = [f"{part.weight.name}[{part.axis}]" for part in group.where]
    return ChannelSite(
        group.name,
        group.nodes[0].op,
        costs.saved(number, kept),
        channels=group.size,
        kept=kept,
        weights=" ".join(dict.fromkeys(weights)),
        order=order,
    )


def _strongest(score: Array, count: int) -> list[int]:
    return sorted(int(c) for c in np.argsort(-score, kind="stable")[:count])


def _has_data(ctx: Context) -> bool:
    samples = ctx.samples.calibration
    return samples is not None and bool(samples.used) and not ctx.samples.random


def _recipe(kept: Iterable[tuple[Group, Sequence[int]]]) -> str:
    """Return a recipe that keeps the same channels."""
    texts = [f"{group.name}:{_ranges(stay)}" for group, stay in kept]
    return "\n".join(["[[pass]]", 'name = "channels"', f"stay = {json.dumps(texts)}"])


def _ranges(numbers: Sequence[int]) -> str:
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = np.split(np.asarray(numbers), cuts)
    return ".".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
