"""channels: whole channels, neurons and heads are removed; tensors get smaller."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
from onnxshrink.passes.recover import Recover
from onnxshrink.solvers.channels import refit
from onnxshrink.structure import channels, layers, thinning
from onnxshrink.structure.channels import Group
from onnxshrink.structure.shapes import macs_by_value, value_shapes
from onnxshrink.training import norms
from onnxshrink.training.channel_importance import (
    IMPORTANCES,
    LARGEST,
    Importance,
    blocks_of,
    has_free_bias,
    moments_of,
    readers_of,
    width_of,
)

__all__ = ["IMPORTANCES", "Channels", "Importance"]

Array = NDArray[Any]
Measure = Literal["bytes", "macs"]

_FITTED = 1024
"""Samples on which readers of inexact groups are fitted."""
_PROBES = 7
"""Models that are timed while a share of the latency is looked for."""
_TRIES = 100
"""Last steps that are tried for an amount of the whole model."""
_LEAST = 0.1
"""Share of a group's channels that stay at least where an amount is of the model."""
_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the channels that a plan shows the cost of."""

_RANGES = re.compile(r"\d{1,7}(-\d{1,7})?(\.\d{1,7}(-\d{1,7})?)*")


@dataclass(frozen=True, kw_only=True)
class ChannelSite(Site):
    """Channels that go together through every axis that has them.

    Attributes:
        channels: How many there are.
        kept: How many stay.
        dead: How many nothing reads any more; they go first, without any loss.
        weights: The weights that get smaller, each with the axis and, where a channel
            has several, how many positions it takes.
        order: All channels, those that matter most first.
    """

    channels: int
    kept: int
    dead: int = 0
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
    BatchNormalization statistics are estimated again. Where a norm takes the mean over
    removed channels, what is left of them changes too: the layers that read them are
    fitted to what they gave in the original model. Let ``recover`` and ``distill``
    follow; they are judged together with it. Channels that no weight reads any more, as
    ``prune`` may leave them, go first and without any loss.

    Attributes:
        keep: Share of the channels of each group that stay; 0.75 unless another
            amount is given; 1 removes only what no weight reads any more.
        bytes: Instead: share of the bytes of all weights that stays, divided among the
            groups by what each channel costs the outputs.
        macs: The same of the multiply-accumulates.
        latency: The same of the time of a run, measured on this machine.
        stay: Instead: channels that stay, by name: ``conv1.weight:0-7.12``; groups not
            named are left alone. The pass prints what repeats it.
        importance: How channels are compared: ``outputs``, what the model's outputs
            lose; ``inputs``, what the layers that read them lose once fitted anew;
            ``energy``, what they add to these; ``taylor`` and ``fisher``, what masking
            them changes, by gradients; ``norm``, their weights alone (L2); ``median``,
            how far they are from the others; ``scale``, those of BatchNormalization;
            ``auto`` is outputs with data, else norm.
        round_to: Channels stay in multiples of this, if there are more of them.
        repair: Whether layers are fitted anew, where data is given.
        steps: In how many cuts; what is left is repaired and compared anew between.
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
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        amounts = ("keep", "bytes", "macs", "latency")
        given = [name for name in amounts if getattr(self, name) is not None]
        given += ["stay"] if self.stay else []
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each say how much; give one")
        for name in given:
            value = getattr(self, name)
            if name == "keep" and value == 1:
                continue
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
        if not 1 <= self.steps <= 100:
            raise UsageError(f"steps is from 1 to 100, not {self.steps}")
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
        groups = thinning.removable(model, self.only, self.skip, ctx.skipped)
        thinning.tell_of_bodies(model, ctx.skipped)
        if not groups:
            return []
        costs = _Costs(model, ctx, groups)
        if self.stay:
            return self._as_named(groups, costs, ctx)
        dead = [thinning.dead(group) for group in groups]
        scores = self._scores(model, groups, ctx)
        share = self.bytes or self.macs or self.latency
        if share is None:
            counts = self._kept(groups, 0.75 if self.keep is None else self.keep)
        elif self.latency is not None:
            counts = self._timed(model, groups, scores, costs, ctx)
        else:
            measure: Measure = "macs" if self.macs is not None else "bytes"
            counts = self._divided(groups, scores, costs, measure, share)
            self._tell_of_limits(counts, costs, measure, share, ctx)
        sites = []
        for number, (group, score) in enumerate(zip(groups, scores, strict=True)):
            gone = int(dead[number].sum())
            count = max(1, min(counts[number], group.size - gone))
            if count >= group.size:
                ctx.skipped(group.name, f"all its {group.size} channels stay")
                continue
            order = tuple(map(int, np.argsort(-score, kind="stable")))
            sites.append(_site(group, count, order, costs, number, gone))
        return sites

    def outlook(self, model: Model, ctx: Context) -> Sequence[str]:
        """Return the costs of the model by the share of the channels that stay."""
        groups = thinning.removable(model, self.only, self.skip, lambda *_: None)
        if not groups:
            return []
        costs = _Costs(model, ctx, groups)
        lines = ["keep    bytes     MACs     time   (shares of what is there)"]
        for keep in _KEEPS:
            counts = self._kept(groups, keep)
            parts = (costs.share(counts, "bytes"), costs.share(counts, "macs"))
            macs = f"{parts[1]:8.3f}" if costs.macs_known else "       ?"
            slow = costs.slowed(counts)
            time = "       ?" if slow is None else f"{slow:8.3f}"
            lines.append(f"{keep:4.1f} {parts[0]:8.3f} {macs} {time}")
        return lines

    def _kept(self, groups: Sequence[Group], keep: float) -> list[int]:
        return [
            g.size if keep == 1 else thinning.rounded(g, g.size * keep, self.round_to)
            for g in groups
        ]

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
            way = "outputs" if ctx.has_data else "norm"
        chosen = IMPORTANCES[way]
        if getattr(chosen, "needs_data", False):
            ctx.need_data("to see what layers read", instead="importance=norm")

        def make() -> list[Array]:
            found = []
            given = chosen(model, groups, ctx)
            for group, figures in zip(groups, given, strict=True):
                score = np.asarray(figures, np.float64)
                if score.shape != (group.size,) or not np.isfinite(score).all():
                    raise ModelError(
                        f"importance {way} gives no figure for each channel of "
                        f"{group.name}"
                    )
                found.append(np.where(thinning.dead(group), -1.0, score))
            return found

        key = ("channels", fingerprint(model), way, tuple(g.name for g in groups))
        return ctx.remember(key, make)

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
        ladders, losses = [], []
        for group, score, saved in zip(groups, scores, worth, strict=True):
            step = thinning.step(group, self.round_to)
            least = max(step, math.ceil(group.size * _LEAST / step) * step)
            ascending = np.sort(np.maximum(score, 0))
            # The first removals bring the count to a multiple of the step.
            tops = list(range(group.size // step * step, least - 1, -step))
            tops = [top for top in tops if top < group.size]
            cuts = np.array([group.size - top for top in tops], np.int64)
            sums = np.concatenate([[0.0], np.cumsum(ascending)])[cuts]
            gaps = np.diff(sums, prepend=0.0) / np.diff(cuts, prepend=0)
            prices = np.maximum.accumulate(gaps / max(saved, 1e-30)) if tops else gaps
            ladders.append((tops, prices))
            losses.append(sums)

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
        if not len(every):
            return [group.size for group in groups]
        # What is taken so far: how many steps of each group. One more step of a large
        # group may save far more than is missing, so others are tried in its place.
        under = counts(float(every[low])) if low >= 0 else [g.size for g in groups]
        steps = [
            sum(top >= n for top in t) for n, (t, _) in zip(under, ladders, strict=True)
        ]
        open_ = {n for n, (tops, _) in enumerate(ladders) if steps[n] < len(tops)}

        def left(taken: Sequence[int]) -> list[int]:
            return [
                tops[n - 1] if n else group.size
                for n, group, (tops, _) in zip(taken, groups, ladders, strict=True)
            ]

        def loss(taken: Sequence[int]) -> float:
            return sum(float(s[n - 1]) for n, s in zip(taken, losses, strict=True) if n)

        best: list[int] | None = None
        for _ in range(_TRIES):
            if not open_:
                break
            number = min(open_, key=lambda n: (float(ladders[n][1][steps[n]]), n))
            tried = list(steps)
            tried[number] += 1
            if costs.share(left(tried), measure) > share:
                steps = tried
                if steps[number] == len(ladders[number][0]):
                    open_.discard(number)
                continue
            open_.discard(number)
            # Steps that are not needed any more are taken back, the dearest first.
            order = sorted(
                (n for n in range(len(tried)) if tried[n]),
                key=lambda n: -float(ladders[n][1][tried[n] - 1]),
            )
            for n in order:
                while tried[n]:
                    fewer = [count - (n == m) for m, count in enumerate(tried)]
                    if costs.share(left(fewer), measure) > share:
                        break
                    tried = fewer
            if best is None or loss(tried) < loss(best):
                best = tried
        return counts(float(every[high])) if best is None else left(best)

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
        # What comes in is the first candidate, so that nothing slower is ever kept.
        best, gap = [group.size for group in groups], 1 - self.latency
        reached = 1.0
        low, high = 0.0, 1.0
        for number in range(_PROBES):
            share = (low + high) / 2
            counts = self._divided(groups, scores, costs, measure, share)
            trial = model.copy()
            named = {
                g.name: (c, s) for g, c, s in zip(groups, counts, scores, strict=True)
            }
            kept = [
                (group, thinning.strongest(named[group.name][1], named[group.name][0]))
                for group in channels.find(trial)
                if group.name in named and named[group.name][0] < group.size
            ]
            channels.remove_all(trial, kept)
            trial.drop_unused()
            _, ratio = latencies(session(trial), base, feed)
            assert ratio is not None
            ctx.progress(number + 1, _PROBES, f"{self.name}: timing")
            if abs(ratio - self.latency) < gap and ratio < 1:
                best, gap, reached = counts, abs(ratio - self.latency), ratio
            if ratio > self.latency:
                high = share
            else:
                low = share
        if gap > 0.05:
            ctx.skipped(
                self.name,
                f"{reached:.2f} of the time was reached where {self.latency:.2f} was "
                "asked for: steps of channels are coarse, or the rest takes the time",
            )
        return best

    def _tell_of_limits(
        self,
        counts: Sequence[int],
        costs: _Costs,
        measure: Measure,
        share: float,
        ctx: Context,
    ) -> None:
        reached = costs.share(counts, measure)
        if reached > share * 1.05:
            ctx.skipped(
                self.name,
                f"{reached:.0%} of the {measure} are left where {share:.0%} were asked "
                f"for: {_LEAST:.0%} of the channels stay in every group",
            )

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Remove the channels of one group."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Fit the layers that read the channels anew, then remove these, in steps."""
        chosen = {site.where: site for site in sites if isinstance(site, ChannelSite)}
        # Channels that are there, by their numbers when the pass began.
        left = {name: np.arange(site.channels) for name, site in chosen.items()}
        steps = 1 if self.stay else self.steps
        for number in range(1, steps + 1):
            share = number / steps
            groups = [
                group
                for group in channels.find(model)
                if group.name in chosen and not group.why
            ]
            if not groups:
                return
            scores = None if number == 1 else self._scores(model, groups, ctx)
            kept: list[tuple[Group, Sequence[int]]] = []
            for place, group in enumerate(groups):
                site = chosen[group.name]
                count = site.kept
                if number < steps:
                    gone = (site.channels - site.kept) * share
                    by = thinning.step(group, self.round_to)
                    count = max(count, math.ceil((site.channels - gone) / by) * by)
                if count >= group.size:
                    continue
                if scores is None:
                    stay = sorted(site.order[:count])
                else:
                    stay = thinning.strongest(scores[place], count)
                kept.append((group, stay))
                left[group.name] = left[group.name][stay]
            if not kept:
                continue
            self._cut(model, kept, ctx)
            ctx.progress(number, steps, self.name)
        for name, site in chosen.items():
            if len(left[name]) < site.channels:
                text = f"{site.channels} -> {len(left[name])} channels"
                if site.dead:
                    text += f"; nothing read {site.dead} of them"
                ctx.did(name, text)
        if not self.stay:
            ctx.did(self.name, f"the same again: {_recipe(left)}")

    def _cut(
        self, model: Model, kept: Sequence[tuple[Group, Sequence[int]]], ctx: Context
    ) -> None:
        """Remove channels once, with repair."""
        is_lossless = all(
            thinning.dead(group)[np.setdiff1d(np.arange(group.size), stay)].all()
            for group, stay in kept
        )
        repairs = self.repair and ctx.has_data and not is_lossless
        readers = [
            part.weight.name
            for group, _ in kept
            if group.inexact
            for part in group.where
            if part.role == "consumer"
        ]
        if repairs:
            for name, lost in _refitted(model, kept, ctx):
                ctx.did(name, f"fitted anew: {lost:.2%} of its output energy is lost")
        for group, _ in kept:
            if group.inexact:
                ctx.did(group.name, f"not exact: {group.inexact}")
        channels.remove_all(model, kept)
        model.drop_unused()
        if repairs:
            samples = ctx.samples.calibration
            assert samples is not None
            found = norms.find_norms(model, (), (), lambda name, why: None)
            norms.estimate(model, found, samples, ctx)
            self._reconstruct(model, readers, ctx)

    def _reconstruct(self, model: Model, readers: Sequence[str], ctx: Context) -> None:
        """Fit readers of inexact groups to what they gave in the reference.

        What is left of a norm's inputs has another mean and variance, which shows only
        once the channels are gone.
        """
        left = {weight.name for weight in model.weights()}
        names = tuple(name for name in readers if name in left)
        if not names:
            return
        inner = replace(ctx, done=[], skips=[])
        Recover(only=names, samples=_FITTED).apply(model, inner)
        for where, what in inner.done:
            ctx.did(where, f"behind channels that are not exact: {what}")


# --- fitting anew ---------------------------------------------------------------------


def _refitted(
    model: Model, kept: Sequence[tuple[Group, Sequence[int]]], ctx: Context
) -> Iterator[tuple[str, float]]:
    """Fit the layers that read channels to do without some; say what each loses."""
    readers = readers_of(model, [group for group, _ in kept])
    small = [layer for layer in readers.values() if width_of(layer) <= LARGEST]
    seen = ctx.inputs(small) if small else {}
    gone: dict[str, Array] = {}
    for group, stay in kept:
        out = np.setdiff1d(np.arange(group.size), stay)
        for part in group.where:
            if part.role == "consumer" and part.weight.name in seen:
                layer = readers[part.weight.name]
                places = gone.setdefault(layer.name, np.zeros(width_of(layer), bool))
                places[blocks_of(layer, part)[out].reshape(-1)] = True
    for name in seen:
        layer, inputs = readers[name], seen[name]
        moments = moments_of(layer, inputs) if name in gone else None
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
        if has_free_bias(layer) and layer.bias is not None:
            layer.bias.add(layer.uses[0].alpha * (gap @ inputs.mean[0]))
        yield name, lost / total if total > 0 else 0.0


def _most(dtype: np.dtype[Any]) -> float:
    return 65504.0 if dtype.itemsize == 2 else 1e30


# --- costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Timed:
    """A layer whose time is known.

    Attributes:
        shape: Inputs and outputs, of all groups.
        ins: Groups of channels that are its inputs, each with its share of them.
        outs: The same of outputs.
        kernel: Of a convolution, else empty.
        size: Positions of the output; rows of a product.
        groups: Groups of a convolution.
    """

    shape: tuple[int, int]
    ins: tuple[tuple[int, float], ...]
    outs: tuple[tuple[int, float], ...]
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    groups: int


def _timed_layers(
    model: Model,
    ctx: Context,
    places: Mapping[int, Mapping[int, Mapping[int, float]]],
) -> list[_Timed]:
    """Return the layers whose time is known, with what cuts them."""
    samples = ctx.samples.calibration or ctx.samples.evaluation
    if samples is None or not samples.used:
        return []
    feed = samples.read(np.arange(samples.batch or 1))
    shapes = value_shapes(model, {n: a.shape for n, a in feed.items()})
    found = []
    for layer in layers.find(model):
        use = layer.uses[0] if layer.uses else None
        given = shapes.get(layer.output.name) if use is not None else None
        if use is None or not given or 0 in given or layer.output_axis is None:
            continue
        axes = places.get(id(layer.weight.constant), {})
        ins, outs = (
            tuple(axes.get(axis, {}).items())
            for axis in (layer.input_axis, layer.output_axis)
        )
        groups, outputs, inputs = layer.layout.matrices_shape
        if layer.kind == "Conv":
            kernel = layer.weight.shape[2:]
            shape = (inputs * groups // math.prod(kernel), outputs * groups)
            found.append(_Timed(shape, ins, outs, kernel, tuple(given[2:]), groups))
        elif layer.kind in ("Gemm", "MatMul") and groups == 1:
            rows = math.prod(given) // outputs
            found.append(_Timed((inputs, outputs), ins, outs, (), (rows,), 1))
    return found


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
        self._costs = ctx.costs
        self._layers = _timed_layers(model, ctx, places)
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

    def seconds(self, counts: Sequence[int]) -> float | None:
        """Return the time of all products with so many channels in each group."""
        if not self._layers:
            return None
        gone = [1 - c / g.size for c, g in zip(counts, self.groups, strict=True)]
        total = 0.0
        for one in self._layers:
            ins, outs = (
                max(1, round(size * (1 - sum(gone[n] * share for n, share in cuts))))
                for size, cuts in zip(one.shape, (one.ins, one.outs), strict=True)
            )
            if not one.kernel:
                total += self._costs.matmul(one.size[0], ins, outs).seconds or 0.0
                continue
            groups = one.groups
            if groups > 1:
                # Whole groups go: both sides shrink by the same share.
                groups = max(1, round(groups * outs / one.shape[1]))
                ins = one.shape[0] // one.groups * groups
            cost = self._costs.conv(ins, outs, one.kernel, one.size, groups=groups)
            total += cost.seconds or 0.0
        return total

    def slowed(self, counts: Sequence[int]) -> float | None:
        """Return the time of all products as a share of what they take now."""
        now = self.seconds([group.size for group in self.groups])
        then = self.seconds(counts)
        return None if not now or then is None else then / now

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
        now, then = self.seconds([g.size for g in self.groups]), self.seconds(counts)
        seconds = None if now is None or then is None else max(0.0, now - then)
        return Savings(round(self.bytes - nbytes), round(self.macs - macs), seconds)


def _site(
    group: Group,
    kept: int,
    order: tuple[int, ...],
    costs: _Costs,
    number: int,
    dead: int = 0,
) -> ChannelSite:
    return ChannelSite(
        group.name,
        group.nodes[0].op,
        costs.saved(number, kept),
        channels=group.size,
        kept=kept,
        dead=dead,
        weights=" ".join(group.members),
        order=order,
    )


def _recipe(left: Mapping[str, Array]) -> str:
    """Return a recipe that keeps the same channels."""
    texts = [f"{name}:{_ranges(list(stay))}" for name, stay in left.items()]
    return "\n".join(["[[pass]]", 'name = "channels"', f"stay = {json.dumps(texts)}"])


def _ranges(numbers: Sequence[int]) -> str:
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = np.split(np.asarray(numbers), cuts)
    return ".".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
