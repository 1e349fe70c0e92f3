"""lowrank: layers written as two or three smaller ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Cost, Costs, Promise, Savings, Site, SitePass
from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.model import Model, Weight, attribute
from onnxshrink.rewriting import splitting
from onnxshrink.solvers import allocation, decompose
from onnxshrink.solvers.decompose import Chain, Form
from onnxshrink.solvers.svd import Split, moment, split
from onnxshrink.solvers.threads import one_thread
from onnxshrink.statistics import Counts
from onnxshrink.structure import layers
from onnxshrink.structure.bias import addend, give_bias, takes_bias
from onnxshrink.structure.layers import Layout, LinearWeight, Role
from onnxshrink.structure.selection import selected
from onnxshrink.structure.shapes import value_shapes
from onnxshrink.tensors import LazyTensor
from onnxshrink.training.importance import output_metrics

__all__ = ["Lowrank"]

Array = NDArray[Any]
Kind = Literal["product", "kernel", "transposed", "table", "recurrent"]
Metric = Literal["outputs", "inputs", "weights"]
Ranks = tuple[int, ...]
Unit = Literal["values", "macs", "seconds"]

HELD_BYTES = 256 << 20
"""Moments of inputs that are held while layers are studied together."""
KEPT_BYTES = 512 << 20
"""What is known of how layers split that is kept between the plan and the work. Layers
beyond that are studied a second time."""
NARROW = 16
"""Layers with fewer inputs or outputs gain no time by being split."""
NODE_SECONDS = 1e-6
"""What one more node may take."""
PAYS = 0.9
"""Share of a layer's time from which on factors are not worth it; where the time is not
known, of its parameters."""
UNSEEN = 0.2
"""Share of the weight of a table that its rows have alike, however often they came."""
MADE_BIAS = 0.1
"""Share of the output energy that the mean input has, if a bias is made for it."""

_PRODUCTS = frozenset({"FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
_SIZES = re.compile(r"[1-9]\d{0,6}(x[1-9]\d{0,6})?")


@dataclass(frozen=True, kw_only=True)
class LowrankSite(Site):
    """A weight, or several that read one input, and the ranks of its factors.

    Attributes:
        rank: Channels between the factors, in words.
        form: What it becomes.
        by: What its error is measured by.
        members: Names of the weights.
        ranks: Channels between the factors.
        choices: Ranks that save parameters, ascending; ``ranks`` is among them.
    """

    rank: str
    form: str
    by: Metric
    members: tuple[str, ...] = field(repr=False)
    ranks: Ranks = field(repr=False)
    choices: tuple[Ranks, ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class _Source:
    """What splitting a place needs to know of it: no part of a model.

    It may go to another process; weights are read there.

    Attributes:
        where: Name of the site.
        tensors: Values of the weights.
        layouts: How each is read.
        kind: How they are read.
        form: Of a kernel.
        groups: Matrices or kernels of one shape.
        shape: Of each.
        choices: Ranks that save parameters, ascending.
        is_one_of: Whether others may read the same value, so that its moment is needed
            again.
    """

    where: str
    tensors: tuple[LazyTensor, ...]
    layouts: tuple[Layout, ...]
    kind: Kind
    form: Form
    groups: int
    shape: tuple[int, ...]
    choices: tuple[Ranks, ...]
    is_one_of: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.tensors[0].dtype

    def arrays(self) -> list[Array]:
        """Read the matrices or kernels, one for each group."""
        if self.kind == "kernel":
            return list(self.tensors[0].read().reshape(self.groups, *self.shape))
        if self.kind in ("table", "recurrent"):
            return [self.tensors[0].read().reshape(self.shape)]
        pairs = zip(self.tensors, self.layouts, strict=True)
        parts = [layout.matrices(tensor.read()) for tensor, layout in pairs]
        return list(np.concatenate(parts, axis=1))


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a layer can be split, before anything is known of its inputs.

    Attributes:
        members: The weight; several that read one input share the first factor.
        kind: How it is read.
        form: Of a kernel; everything else is a matrix, and ``channel`` is its SVD.
        groups: Matrices or kernels of one shape.
        shape: Of each, [outputs, inputs] or [outputs, inputs, k1, ..., kn].
        strides: Of a convolution.
    """

    members: tuple[LinearWeight, ...]
    kind: Kind
    form: Form
    groups: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """Name of the site."""
        return "+".join(layer.name for layer in self.members)

    @property
    def weight(self) -> Weight:
        """The first weight."""
        return self.members[0].weight

    @property
    def dense(self) -> int:
        """Parameters as it is."""
        return sum(layer.weight.size for layer in self.members)

    def parameters(self, ranks: Ranks) -> int:
        """Return the parameters of its factors."""
        return self.groups * decompose.parameters(self.form, self.shape, ranks)

    def macs_share(self, ranks: Ranks) -> float:
        """Return the multiply-accumulates of its factors, as a share of its own."""
        if self.kind == "table":
            return math.inf  # looking up rows has none
        outputs, inputs, *kernel = self.shape
        size = math.prod(kernel)
        steps = self.strides or (1,) * len(kernel)
        dense = outputs * inputs * size
        if self.form == "spatial":
            across = math.prod(steps[1:])
            rest = math.prod(kernel[1:])
            return ranks[0] * (inputs * kernel[0] * across + outputs * rest) / dense
        if self.form == "cp":
            before = inputs * math.prod(steps) + size + outputs
            return ranks[0] * before / dense
        if self.form == "tucker":
            few, many = ranks
            before = inputs * few * math.prod(steps)
            return (before + few * many * size + many * outputs) / dense
        return self.parameters(ranks) / self.dense

    @cached_property
    def choices(self) -> tuple[Ranks, ...]:
        """Ranks that save parameters, ascending: multiples of 8, of small ones fewer.

        Ranks that are no multiple of 8 take 3 to 10 % longer.
        """
        full = decompose.full_ranks(self.form, self.shape)
        least = min(full)
        step = next((s for s in (8, 4, 2) if least >= 8 * s), 1)
        found: dict[Ranks, None] = {}
        for level in range(step, max(full) + 1, step):
            if self.form != "tucker":
                found[(level,)] = None
                continue
            both = (max(1, round(level * rank / max(full) / step)) for rank in full)
            few, many = (min(f, n * step) for f, n in zip(full, both, strict=True))
            found[few, many] = None
        return tuple(ranks for ranks in found if self.parameters(ranks) < self.dense)

    @property
    def names(self) -> tuple[str, ...]:
        """All that ``only`` and ``skip`` may call it: also each of its members."""
        names = (name for layer in self.members for name in layer.names)
        return tuple(dict.fromkeys((self.where, *names)))

    @property
    def source(self) -> _Source:
        """What splitting it needs to know."""
        return _Source(
            self.where,
            tuple(layer.weight.tensor for layer in self.members),
            tuple(layer.layout for layer in self.members),
            self.kind,
            self.form,
            self.groups,
            self.shape,
            self.choices,
            _may_share(self),
        )


@dataclass(frozen=True, eq=False)
class _Study:
    """What is known of a place: how it splits at any rank.

    Attributes:
        by: What its error is measured by.
        splits: Of matrices, one for each group.
        moments: Of kernels: second moment of the patches, one for each group.
        weights: What an error of each output weighs, [groups, outputs].
        mean: Mean input, [groups, inputs], where a bias takes up what it loses.
        lost: What each of the choices loses, as ``by`` measures it.
        total: What there is to lose.
        is_light: Whether splits and moments were left out for want of room.
    """

    by: Metric
    splits: tuple[Split, ...] = ()
    moments: Array | None = None
    weights: Array | None = None
    mean: Array | None = None
    lost: tuple[float, ...] = ()
    total: float = 0.0
    is_light: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of what takes many."""
        each = {id(array): array for s in self.splits for array in (s.basis, s.dual)}
        size = sum(array.nbytes for array in each.values())
        return size + (0 if self.moments is None else self.moments.nbytes)

    def light(self) -> _Study:
        """Return it without that."""
        return replace(self, splits=(), moments=None, is_light=True)


@dataclass(frozen=True, kw_only=True)
class Lowrank(SitePass):
    """Write layers as two smaller ones, of low rank.

    MatMul and Gemm become two products (truncated SVD), Conv two or three
    convolutions, ConvTranspose a 1 x 1 Conv before it; LSTM, GRU and RNN read inputs
    that a product made fewer. Products that read one input, as queries, keys and values
    do, share the first factor where that fits better. Biases stay, weights keep their
    type, and a weight that several nodes read is split once. Recurrent weights are left
    alone: what they multiply is known inside the operator only.

    With data, factors minimise what layers give on it, not the error of their weights:
    inputs are whitened by their Gram matrix (Wang et al. 2024) about their mean, which
    the bias takes up. Errors of outputs count by what the model's outputs lose by them,
    found by gradients (``metric=outputs``), and so are the ranks shared out among all
    layers. What layers read is seen before any is split: that later ones see what split
    ones give was no better (on MiniLM cosine .9162 with, .9170 without).

    ``conv=spatial`` is 3x1 then 1x3 (Jaderberg et al. 2014), ``channel`` 3x3 to few
    channels then 1x1 (Zhang et al. 2016), ``tucker`` 1x1, 3x3, 1x1 (Kim et al. 2016),
    ``cp`` the same with a 3x3 of each channel by itself (Lebedev et al. 2015).
    Kernels with one axis, 1x1 and ConvTranspose are always split by ``channel``.

    Attributes:
        keep: Share of the parameters that stay, of all layers that are split together
            or, in local scope, of each; 0.5 unless another amount is given.
        macs: The same of multiply-accumulates.
        latency: The same of the time these layers take, as measured on this machine.
        energy: Instead: share of its output energy that each layer keeps, by the
            smallest rank that does.
        rank: Instead: a rank for all layers, or ``name:rank`` for single ones, with
            ``name:4x6`` for the two of tucker; layers not named are left alone.
        scope: ``global`` shares the parameters out by what the model's outputs lose,
            ``local`` gives each layer the same share; ``auto`` is global where
            ``metric`` is outputs.
        metric: What is minimised: the error of the model's ``outputs``, of the layer's
            output on real ``inputs``, or of the ``weights``; ``auto`` is the first
            where there is real data, else the last.
        conv: How kernels are split.
        also: ``tables`` that Gather reads, rows weighed by how often they are read.
        decode: Split quantized weights too, as the floats that their codes stand for.
        only: Act only on these weights or nodes: names, glob patterns or op types.
            Layers that share a factor are one, and each name of one is a name of all.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "lowrank"
    promise: ClassVar[Promise] = Promise.CLOSE
    folds: ClassVar[Literal["", "weights", "fused"]] = "fused"
    example: ClassVar[str] = "lowrank:keep=0.5"

    keep: float | None = None
    macs: float | None = None
    latency: float | None = None
    energy: float | None = None
    rank: tuple[str, ...] = ()
    scope: Literal["auto", "local", "global"] = "auto"
    metric: Literal["auto", "outputs", "inputs", "weights"] = "auto"
    conv: Form = "spatial"
    also: tuple[Literal["tables"], ...] = ()
    decode: bool = False

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        shares = ("keep", "macs", "latency", "energy")
        given = [name for name in shares if getattr(self, name) is not None]
        given += ["rank"] if self.rank else []
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each say how much; give one")
        for name in given:
            value = getattr(self, name)
            if name != "rank" and not 0 < value < 1:
                raise UsageError(f"{name} is a share between 0 and 1, not {value}")
        if self.scope == "global" and self.metric in ("inputs", "weights"):
            raise UsageError(
                f"scope=global compares layers by what the model's outputs lose; "
                f"metric={self.metric} does not say"
            )
        if self.scope == "global" and given and given[0] in ("energy", "rank"):
            raise UsageError(f"{given[0]} is of each layer; leave out scope")
        _ = self.named  # refuses what is no rank

    @cached_property
    def named(self) -> Mapping[str, Ranks]:
        """Ranks by name of the site; ``""`` for all of them."""
        found: dict[str, Ranks] = {}
        for text in self.rank:
            name, _, size = text.rpartition(":")
            if not _SIZES.fullmatch(size):
                raise UsageError(
                    f"rank is a number, name:number or name:4x6, not {text[:40]!r}"
                )
            if name in found:
                raise UsageError(f"rank is given twice for {name or 'all layers'}")
            found[name] = tuple(int(part) for part in size.split("x"))
        if "" in found and len(found) > 1:
            raise UsageError("rank is one for all layers or by name, not both")
        return found

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the layers to split, each with its ranks.

        Raises:
            UsageError: What is asked for needs data that is not there, or a rank is
                given for a layer that has none of that size.
        """
        model = self._decoded(model)
        prices = self._prices(model, ctx)
        places = []
        for place in self._places(model, ctx):
            why = "" if self.rank else prices.why_not(place)
            if not why:
                places.append(place)
            elif self._is_chosen(place):
                ctx.skipped(place.where, why)
        studies = self._studies(model, places, ctx)
        places = self._shared(places, studies, ctx)
        places = self._left(places, ctx)
        chosen = self._chosen(places, studies, prices, ctx)
        sites = []
        for place in places:
            ranks = chosen.get(place.where)
            if ranks is not None:
                before, savings = prices.costs_of(place, ranks)
                study = studies[place.where]
                sites.append(_site(place, ranks, study, before, savings))
        return sites

    def _prices(self, model: Model, ctx: Context) -> _Prices:
        """Return what layers and factors cost, on one sample."""
        samples = ctx.samples.calibration
        shapes: Mapping[str, Sequence[int]] = {}
        if samples is not None and samples.used:
            feed = next(iter(samples.batches(1)))
            sizes = {name: array.shape for name, array in feed.items()}
            shapes = value_shapes(model, sizes)
        costs = ctx.costs.measured() if self.latency is not None else ctx.costs
        unit: Unit = "macs" if self.macs is not None else "values"
        return _Prices(shapes, costs, "seconds" if self.latency is not None else unit)

    def _places(self, model: Model, ctx: Context) -> list[_Place]:
        """Return what is chosen and can be split, and what may share a factor with it.

        Whether it does is known later; a site is then chosen by each of its members.
        """
        everything = self._layers(model)
        factors = _factors(everything)
        chosen = {layer.name for layer in everything if self._selects(layer)}
        # A name of several, as the plan shows it, chooses or leaves out all of them.
        by_group = any("+" in pattern for pattern in (*self.only, *self.skip))
        near = _neighbours(everything)
        found: list[_Place] = []
        for layer in everything:
            is_chosen = layer.name in chosen
            others = near.get(layer.name, frozenset())
            if not is_chosen and not (others & chosen or (by_group and others)):
                continue
            place = None
            why = layer.why_not or self._why_coded(layer) or _unusable(layer)
            why = why or factors.get(layer.name, "")
            if not why:
                place = _place_of(model, layer, self.conv)
                why = place if isinstance(place, str) else self._why_small(place)
            if isinstance(place, _Place) and not why:
                found.append(place)
            elif is_chosen:
                ctx.skipped(layer.name, why)
        return found

    def _layers(self, model: Model) -> list[LinearWeight]:
        roles: list[Role] = ["weight"]
        if self.also:
            roles.append("table")
        return list(layers.find(model, roles=roles, codes=True, fused=True))

    def _left(self, places: Sequence[_Place], ctx: Context) -> list[_Place]:
        """Return the places that are chosen; say why of what goes with others."""
        found = []
        for place in places:
            if self._is_chosen(place):
                found.append(place)
            elif any(self._selects(layer) for layer in place.members):
                ctx.skipped(place.where, "they share a factor, and skip names one")
        if not found and not ctx.skips:
            what = "only and skip choose" if self.only or self.skip else "there is"
            ctx.skipped(self.name, f"{what} no weight of a Conv, Gemm, MatMul or LSTM")
        return found

    def _is_chosen(self, place: _Place) -> bool:
        return selected(place.names, self.only, self.skip)

    def _selects(self, layer: LinearWeight) -> bool:
        return selected(layer.names, self.only, self.skip)

    def _decoded(self, model: Model) -> Model:
        """Return the model, or one whose quantized weights are floats, if asked for."""
        if not self.decode:
            return model
        copy = model.copy()
        for layer in self._layers(copy):
            if layer.codes is not None and not self._why_coded(layer):
                splitting.decode(copy, layer)
        copy.drop_unused()
        return copy

    def _why_coded(self, layer: LinearWeight) -> str:
        """Return why a quantized weight is not split; it is decoded where asked."""
        if layer.codes is None or layer.why_not:
            return ""
        if not self.decode:
            return "it is quantized; decode=true splits what its codes stand for"
        return splitting.why_not_decoded(layer)

    def _why_small(self, place: _Place) -> str:
        """Return why a place is not worth it, whatever its ranks."""
        inputs = place.shape[1]
        if not place.choices:
            sizes = " x ".join(str(size) for size in place.shape)
            return f"{sizes} has no rank that saves parameters"
        if self.rank:
            return ""
        if place.kind == "kernel" and inputs == 1 and place.groups > 1:
            return "each of its channels has a kernel of its own"
        return ""

    def _shared(
        self, places: Sequence[_Place], studies: dict[str, _Study], ctx: Context
    ) -> list[_Place]:
        """Let products that read one input share a factor where that fits better."""
        named = [name for name in self.named if "+" in name]
        if (self.rank and not named) or self.energy is not None:
            return list(places)
        found = list(places)
        for group in _groups(places):
            joined = _joined(group)
            if self.rank and joined.where not in named:
                continue
            if not self.rank and studies[group[0].where].by == "weights":
                continue  # of weights alone it said so and made MiniLM much worse
            means = {studies[place.where].mean is None for place in group}
            if len(means) > 1:
                continue  # some have a bias to take up the mean, and some have none
            if any(studies[place.where].is_light for place in group):
                continue  # what they read is not known any more
            study = self._joined_study(joined, group, studies, ctx)
            if not self.rank:
                alone = [_at_share(place, self._amount) for place in group]
                together = _at_share(joined, self._amount)
                if together is None or None in alone:
                    continue
                apart = sum(
                    _lost(place, studies[place.where], ranks or ())
                    for place, ranks in zip(group, alone, strict=True)
                )
                if _lost(joined, study, together) >= apart:
                    continue
            studies[joined.where] = study
            at = min(found.index(place) for place in group)
            found = [place for place in found if place not in group]
            found.insert(at, joined)
        return found

    @property
    def _amount(self) -> float:
        """The share asked for."""
        given = (self.macs, self.latency, self.keep)
        return next((share for share in given if share is not None), 0.5)

    def _chosen(
        self,
        places: Sequence[_Place],
        studies: Mapping[str, _Study],
        prices: _Prices,
        ctx: Context,
    ) -> dict[str, Ranks]:
        """Return the ranks of each place that is split, by name."""
        if self.rank:
            return self._as_named(places, ctx)
        if self.energy is not None:
            return self._by_energy(places, studies, prices, ctx)
        local, shared = list(places), []
        if self.scope != "local":
            shared = [p for p in places if studies[p.where].by == "outputs"]
            local = [p for p in places if studies[p.where].by != "outputs"]
        found: dict[str, Ranks] = {}
        for place in local:
            fits = [
                ranks
                for ranks in place.choices
                if prices.of(place, ranks) <= self._amount * prices.of(place)
            ]
            if not fits:
                ctx.skipped(place.where, f"no rank of it fits {self._asked}")
            elif not prices.pays(place, fits[-1]):
                ctx.skipped(place.where, _too_little(place, fits[-1]))
            else:
                found[place.where] = fits[-1]
        found.update(self._shared_out(shared, studies, prices, ctx))
        return found

    @property
    def _asked(self) -> str:
        names = [n for n in ("macs", "latency") if getattr(self, n) is not None]
        return f"{(names or ['keep'])[0]}={self._amount:g}"

    def _as_named(self, places: Sequence[_Place], ctx: Context) -> dict[str, Ranks]:
        known = {place.where: place for place in places}
        for name in self.named:
            if name and name not in known:
                said = [why for where, why in ctx.skips if where == name]
                raise UsageError(
                    f"rank is given for {name!r}, "
                    + (f"but {said[0]}" if said else "which is no layer to split")
                    + ("" if said else f".{nearest(name, known)}")
                )
        found: dict[str, Ranks] = {}
        for place in places:
            ranks = self.named.get(place.where, self.named.get(""))
            if ranks is None:
                continue
            full = decompose.full_ranks(place.form, place.shape)
            if len(ranks) == 1:
                ranks = (
                    tuple(min(ranks[0], rank) for rank in full)
                    if len(full) > 1
                    else ranks
                )
            why = ""
            if len(ranks) != len(full):
                why = f"{'x'.join(map(str, ranks))} is no rank of its one factor"
            elif any(r > f for r, f in zip(ranks, full, strict=True)):
                most = "x".join(map(str, place.choices[-1]))
                why = (
                    f"rank {_shown(ranks)} is above its full rank {_shown(full)}; "
                    f"ranks up to {most} save something"
                )
            elif place.parameters(ranks) >= place.dense:
                why = (
                    f"rank {_shown(ranks)} saves nothing; ranks up to "
                    f"{_shown(place.choices[-1])} do"
                )
            if why and place.where in self.named:
                raise UsageError(f"rank of {place.where!r}: {why}")
            if why:
                ctx.skipped(place.where, why)
            else:
                found[place.where] = ranks
        return found

    def _by_energy(
        self,
        places: Sequence[_Place],
        studies: Mapping[str, _Study],
        prices: _Prices,
        ctx: Context,
    ) -> dict[str, Ranks]:
        assert self.energy is not None
        found: dict[str, Ranks] = {}
        for place in places:
            study = studies[place.where]
            limit = (1 - self.energy) * study.total
            fits = [
                ranks
                for ranks, lost in zip(place.choices, study.lost, strict=True)
                if lost <= limit
            ]
            if not fits:
                ctx.skipped(
                    place.where,
                    f"no rank that saves parameters keeps {self.energy:.7g} of its "
                    "energy",
                )
            elif not prices.pays(place, fits[0]):
                ctx.skipped(place.where, _too_little(place, fits[0]))
            else:
                found[place.where] = fits[0]
        return found

    def _shared_out(
        self,
        places: Sequence[_Place],
        studies: Mapping[str, _Study],
        prices: _Prices,
        ctx: Context,
    ) -> dict[str, Ranks]:
        """Share an amount out among places by what outputs lose."""
        items, usable = [], []
        for place in places:
            lost = studies[place.where].lost
            pairs = zip(place.choices, lost, strict=True)
            paying = [(r, loss) for r, loss in pairs if prices.pays(place, r)]
            usable.append([ranks for ranks, _ in paying])
            items.append(
                [
                    (prices.of(place), 0.0),
                    *((prices.of(place, ranks), loss) for ranks, loss in paying),
                ]
            )
        whole = sum(prices.of(place) for place in places)
        chosen = allocation.share_out(items, self._amount * whole)
        spent = sum(item[index][0] for item, index in zip(items, chosen, strict=True))
        if spent > self._amount * whole:
            ctx.skipped(
                self.name,
                f"{self._asked} is out of reach: the lowest ranks come to "
                f"{spent / whole:.3g}",
            )
        found: dict[str, Ranks] = {}
        for place, index, ranks in zip(places, chosen, usable, strict=True):
            if index:
                found[place.where] = ranks[index - 1]
            else:
                ctx.skipped(
                    place.where,
                    "the outputs feel it more than others; it keeps full rank",
                )
        return found

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with higher ranks.

        From what is asked for to the highest that saves parameters, in equal steps of
        parameters.
        """
        if strength >= 1:
            return site
        if strength <= 0 or not isinstance(site, LowrankSite):
            return None
        at = site.choices.index(site.ranks)
        further = len(site.choices) - at
        ranks = at + round((1 - strength) * further)
        if ranks >= len(site.choices):
            return None
        return replace(
            site,
            savings=site.savings * (1 - (ranks - at) / further),
            rank=_shown(site.choices[ranks]),
            ranks=site.choices[ranks],
        )

    # --- what activations and gradients say ---------------------------------------

    def _metric(self, ctx: Context) -> Metric:
        if self.metric == "weights" or (self.metric == "auto" and not ctx.has_data):
            if self.scope == "global":
                ctx.need_data("to see what the outputs lose (scope=global)")
            return "weights"
        asked = "outputs" if self.metric == "auto" else self.metric
        ctx.need_data(f"to see what layers read (metric={asked})")
        return asked

    def _studies(
        self, model: Model, places: Sequence[_Place], ctx: Context
    ) -> dict[str, _Study]:
        """Study each place; what was studied is remembered."""
        metric = self._metric(ctx)
        mark = fingerprint(model)
        keys = {place.where: self._key(place, metric, mark) for place in places}
        known = {where: ctx.memory.get(key) for where, key in keys.items()}
        found = {where: study for where, study in known.items() if study is not None}
        missing = [place for place in places if place.where not in found]
        weights = {}
        if metric == "outputs" and missing:
            weights = self._weights(model, missing, ctx)
        kept = sum(study.nbytes for study in found.values())
        for part in self._tasks(model, missing, metric, weights, ctx):
            for task, study in zip(part, _all_studied(part, ctx), strict=True):
                kept += study.nbytes
                study = study.light() if kept > KEPT_BYTES else study
                found[task.source.where] = study
                ctx.memory.put(keys[task.source.where], study)
        return found

    def _key(self, place: _Place, metric: Metric, mark: str) -> tuple[object, ...]:
        return ("lowrank", mark, place.where, place.form, metric)

    def _tasks(
        self,
        model: Model,
        places: Sequence[_Place],
        metric: Metric,
        weights: Mapping[str, Array],
        ctx: Context,
    ) -> Iterator[list[_Task]]:
        """Yield places to study with what is known of them, some at a time."""
        if metric == "weights" or not places:
            yield from ([_Task(place.source, metric)] for place in places)
            return
        linear = [place.members[0] for place in places if place.kind != "table"]
        inputs = ctx.inputs(linear)
        counts = _counts(model, places, ctx)
        tasks: list[_Task] = []
        held = 0
        for place in places:
            weight = weights.get(place.where)
            task = _Task(place.source, metric, bias=_takes_mean(model, place))
            name = place.members[0].name
            if place.where in counts:
                task = replace(task, counts=counts[place.where], weight=weight)
            elif place.kind != "table" and name in inputs:
                seen = inputs[name]
                if seen.gram is not None and seen.count and seen.is_finite:
                    task = replace(
                        task,
                        gram=seen.gram,
                        mean=seen.mean,
                        rows=seen.count,
                        weight=weight,
                    )
                    held += seen.nbytes
            tasks.append(task)
            if held > HELD_BYTES:
                yield tasks
                tasks, held = [], 0
        yield tasks

    def _weights(
        self, model: Model, places: Sequence[_Place], ctx: Context
    ) -> dict[str, Array]:
        """Return what an error of each output weighs, by place."""
        values: dict[str, int] = {}
        names: dict[str, list[tuple[str, float]]] = {}
        inside = {id(node) for node in model.graph.nodes}
        for place in places:
            for use in place.members[0].uses:
                axis = -1 if place.kind == "table" else use.output_channels
                if place.kind == "recurrent" or id(use.node) not in inside:
                    continue
                values[use.output.name] = axis
                names.setdefault(place.where, []).append((use.output.name, use.alpha))
        if not values:
            return {}
        samples = ctx.samples.calibration
        assert samples is not None
        try:
            seen = output_metrics(
                model, values, samples, seed=ctx.seed, threads=ctx.threads
            )
        except (ModelError, UsageError) as error:
            ctx.skipped(
                self.name,
                "what outputs lose is not known, so layers are weighed alike and have "
                f"the same share: {error}",
            )
            return {}
        found = {}
        for where, tensors in names.items():
            total = np.sum([seen[n] * factor**2 for n, factor in tensors], axis=0)
            if total.size and np.isfinite(total).all() and total.max() > 0:
                found[where] = total
        return found

    def _joined_study(
        self,
        joined: _Place,
        group: Sequence[_Place],
        studies: Mapping[str, _Study],
        ctx: Context,
    ) -> _Study:
        """Study products with one input as one: their Gram matrix is the same."""
        parts = [studies[place.where] for place in group]
        weight = None
        if all(part.weights is not None for part in parts):
            weight = np.concatenate([part.weights[0] for part in parts])  # type: ignore[index]
        first = parts[0]
        task = _Task(
            joined.source,
            first.by,
            weight=weight,
            gram=first.moments,
            mean=first.mean,
            rows=1,
            is_moment=True,
        )
        key = self._key(joined, first.by, fingerprint(joined.weight.model))
        return ctx.remember(key, lambda: _studied(task))

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Split one layer."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Split several layers, and say the ranks so that they can be had again."""
        quiet = replace(ctx, skips=[])
        chosen = [site for site in sites if isinstance(site, LowrankSite)]
        wanted = {name for site in chosen for name in site.members}
        # Sites were found in the model with all codes decoded; only theirs are here.
        source = self._decoded(model)
        places = [p for p in self._places(source, quiet) if p.where in wanted]
        studies = self._studies(source, places, quiet)
        known = {place.where: place for place in places}
        for site in chosen:
            if len(site.members) > 1:
                group = [known[name] for name in site.members]
                joined = known[site.where] = _joined(group)
                studies[site.where] = self._joined_study(joined, group, studies, quiet)
        results = self._factors(source, chosen, known, studies, quiet)
        targets = known if source is model else self._targets(model, chosen)
        for site in chosen:
            place, study = targets[site.where], studies[site.where]
            result = results[site.where]
            _write(model, place, result)
            share = place.parameters(site.ranks) / place.dense
            ctx.did(
                site.where,
                f"{site.form} of rank {site.rank}: {share:.1%} of "
                f"its values, {result.lost:.2%} of its energy lost by {study.by}",
            )
        if chosen:
            model.drop_unused()
        if chosen and not self.rank:
            ctx.did(self.name, f"the same again: {self._recipe(chosen)}")

    def _targets(self, model: Model, sites: Sequence[LowrankSite]) -> dict[str, _Place]:
        """Decode the weights of sites in the model itself; return where they stand."""
        wanted = {name for site in sites for name in site.members}
        for layer in self._layers(model):
            if layer.name in wanted and layer.codes is not None:
                splitting.decode(model, layer)
        model.drop_unused()
        found: dict[str, _Place] = {}
        for layer in self._layers(model):
            if layer.name in wanted:
                place = _place_of(model, layer, self.conv)
                assert isinstance(place, _Place)
                found[layer.name] = place
        for site in sites:
            if len(site.members) > 1:
                found[site.where] = _joined([found[name] for name in site.members])
        return found

    def _factors(
        self,
        model: Model,
        sites: Sequence[LowrankSite],
        places: Mapping[str, _Place],
        studies: Mapping[str, _Study],
        ctx: Context,
    ) -> dict[str, _Result]:
        """Find the factors of all sites before any of them is written."""
        ranks = {site.where: site.ranks for site in sites}
        found: dict[str, _Result] = {}

        def work(tasks: list[_Split]) -> None:
            done = ctx.map(_factored, tasks, self.name)
            found.update(
                (task.source.where, one) for task, one in zip(tasks, done, strict=True)
            )

        known = [where for where in ranks if not studies[where].is_light]
        work([_Split(places[w].source, studies[w], ranks[w]) for w in known])
        again = [places[where] for where in ranks if studies[where].is_light]
        if again:
            weights = {
                where: study.weights.reshape(-1)
                for where, study in studies.items()
                if study.weights is not None
            }
            metric = self._metric(ctx)
            for part in self._tasks(model, again, metric, weights, ctx):
                full = _all_studied(part, ctx)
                pairs = zip(part, full, strict=True)
                work([_Split(t.source, s, ranks[t.source.where]) for t, s in pairs])
        return found

    def _recipe(self, sites: Sequence[LowrankSite]) -> str:
        """Return a recipe that gives these layers these ranks."""
        ranks = [f"{site.where}:{_shown(site.ranks)}" for site in sites]
        lines = ["[[pass]]", 'name = "lowrank"', f"rank = {json.dumps(ranks)}"]
        lines += [f'conv = "{self.conv}"'] if self.conv != "spatial" else []
        lines += [f'metric = "{self.metric}"'] if self.metric != "auto" else []
        lines += ['also = ["tables"]'] if self.also else []
        lines += ["decode = true"] if self.decode else []
        return "\n".join(lines)


# --- places ---------------------------------------------------------------------------


def _place_of(model: Model, layer: LinearWeight, conv: Form) -> _Place | str:
    """Return how a layer can be split, or why it cannot."""
    use, shape = layer.uses[0], layer.weight.shape
    if any(
        (other.layout, other.index, other.role) != (use.layout, use.index, use.role)
        for other in layer.uses
    ):
        return "its uses read it in different ways"
    for other in layer.uses:
        why = splitting.why_not_here(model, layer.weight, other.node)
        if why:
            return why
    node, groups = use.node, layer.layout.matrices_shape[0]
    op = use.product
    if use.role == "table":
        if len(shape) != 2 or any(attribute(u.node, "axis", 0) for u in layer.uses):
            return "only tables whose rows are looked up along axis 0 are split"
        return _Place((layer,), "table", "channel", 1, shape)
    if node.op in layers.RECURRENT:
        if use.index == 2:
            return "it multiplies the state, which is known inside the operator only"
        rows = shape[0] * shape[1]
        return _Place((layer,), "recurrent", "channel", 1, (rows, shape[2]))
    if op in ("MatMul", "Gemm"):
        why = splitting.why_not_product(model, use)
        if why:
            return why
        return _Place(
            (layer,), "product", "channel", groups, layer.layout.matrices_shape[1:]
        )
    form: Form = "channel" if op == "ConvTranspose" else conv
    kernel = shape[2:]
    if form == "spatial" and sum(size > 1 for size in kernel) < 2:
        form = "channel"
    if form in ("tucker", "cp") and math.prod(kernel) == 1:
        form = "channel"
    for other in layer.uses:
        why = splitting.why_not_conv(other.node, form)
        if why:
            return why
    if op == "ConvTranspose":
        return _Place(
            (layer,), "transposed", "channel", groups, layer.layout.matrices_shape[1:]
        )
    strides = tuple(int(step) for step in node.attrs.get("strides") or ())
    size = (shape[0] // groups, *shape[1:])
    return _Place((layer,), "kernel", form, groups, size, strides)


def _factors(found: Sequence[LinearWeight]) -> dict[str, str]:
    """Return, for weights that are factors of one another already, words for it.

    Two linear layers in a row without a bias between them are, where they have fewer
    parameters than what they compute together.
    """
    makers: dict[int, LinearWeight] = {}
    for layer in found:
        if len(layer.uses) != 1 or layer.uses[0].role == "bias":
            continue
        use = layer.uses[0]
        node = use.node
        linear = use.role == "table" or (
            node.op in ("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul")
            and addend(node) is None
        )
        if linear and node.outputs:
            makers[id(node.outputs[0])] = layer
    words: dict[str, str] = {}
    for layer in found:
        for use in layer.uses:
            at = 1 - use.index if use.product in ("MatMul", "Gemm") else 0
            if use.role != "weight" or use.index > 1 or at >= len(use.node.inputs):
                continue
            maker = makers.get(id(use.node.inputs[at]))
            if maker is None or maker is layer:
                continue
            groups, outputs, inputs = maker.layout.matrices_shape
            rank = inputs if maker.uses[0].role == "table" else outputs
            if maker.kind == "ConvTranspose":
                rank = maker.weight.shape[1]
            rank *= groups
            one, two = maker.weight.size, layer.weight.size
            if (one + two) * rank * rank < one * two * groups:
                for either, other in ((maker, layer), (layer, maker)):
                    words[either.name] = (
                        f"it and {other.name} are factors of rank {rank} already"
                    )
    return words


def _neighbours(found: Sequence[LinearWeight]) -> dict[str, frozenset[str]]:
    """Return, for each weight, others that are multiplied with the same value."""
    by_input: dict[int, set[str]] = {}
    for layer in found:
        data = layer.uses[0].input if len(layer.uses) == 1 else None
        if data is not None and layer.uses[0].product in ("MatMul", "Gemm"):
            by_input.setdefault(id(data), set()).add(layer.name)
    return {
        name: frozenset(names - {name})
        for names in by_input.values()
        for name in names
        if len(names) > 1
    }


def _groups(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Yield products that read one value, and nothing else does with them."""
    by_input: dict[tuple[int, int], list[_Place]] = {}
    for place in places:
        layer = place.members[0]
        use = layer.uses[0]
        node = use.node
        if place.kind != "product" or len(layer.uses) > 1 or place.groups > 1:
            continue
        if not use.index or len(layer.weight.shape) != 2:
            continue
        if use.input_channels != -1:
            continue
        key = (id(node.inputs[0]), layer.weight.data_type)
        by_input.setdefault(key, []).append(place)
    for group in by_input.values():
        owners = {id(place.weight.graph) for place in group}
        if len(group) > 1 and len(owners) == 1:
            yield group


def _joined(group: Sequence[_Place]) -> _Place:
    """Return the place that several products of one input are together."""
    return replace(
        group[0],
        members=tuple(place.members[0] for place in group),
        shape=(sum(place.shape[0] for place in group), group[0].shape[1]),
    )


def _unusable(layer: LinearWeight) -> str:
    for chunk in layer.weight.chunks():
        wide = chunk if chunk.dtype.itemsize >= 4 else chunk.astype(np.float32)
        if not np.isfinite(wide).all():
            return "it holds NaN or infinity"
    return ""


def _at_share(place: _Place, share: float) -> Ranks | None:
    """Return the highest ranks with at most a share of the place's parameters."""
    fits = [r for r in place.choices if place.parameters(r) <= share * place.dense]
    return fits[-1] if fits else None


def _lost(place: _Place, study: _Study, ranks: Ranks) -> float:
    lost = study.lost[place.choices.index(ranks)]
    return lost if study.by == "outputs" else lost / max(study.total, 1e-300)


def _too_little(place: _Place, ranks: Ranks) -> str:
    share = place.parameters(ranks) / place.dense
    return f"rank {_shown(ranks)} has {share:.0%} of its values and takes as long"


def _site(
    place: _Place, ranks: Ranks, study: _Study, before: Cost, savings: Savings
) -> LowrankSite:
    form: str = place.form if place.kind == "kernel" else "product"
    if place.kind == "table":
        form = "table"
    if len(place.members) > 1:
        form = "shared product"
    choices = tuple(sorted({*place.choices, ranks}, key=place.parameters))
    return LowrankSite(
        place.where,
        place.members[0].kind,
        savings,
        cost=before,
        rank=_shown(ranks),
        form=form,
        by=study.by,
        members=tuple(layer.name for layer in place.members),
        ranks=ranks,
        choices=choices,
    )


def _shown(ranks: Sequence[int]) -> str:
    return "x".join(str(rank) for rank in ranks)


# --- costs ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Prices:
    """What layers and their factors cost, on one sample.

    Attributes:
        shapes: Of values, as far as they are known.
        costs: Of layer forms.
        unit: What an amount is a share of.
    """

    shapes: Mapping[str, Sequence[int]]
    costs: Costs
    unit: Unit

    def of(self, place: _Place, ranks: Ranks | None = None) -> float:
        """Return what a place costs as it is or as factors, in the unit.

        Where shapes are not known, parameters stand for it.
        """
        values = place.dense if ranks is None else place.parameters(ranks)
        if self.unit == "values":
            return float(values)
        cost = self.cost(place, ranks)
        if self.unit == "macs":
            if cost is not None:
                return float(cost.macs)
            return place.dense * (1 if ranks is None else place.macs_share(ranks))
        if cost is None or cost.seconds is None:
            return values * 1e-9
        return cost.seconds

    def pays(self, place: _Place, ranks: Ranks) -> bool:
        """Whether factors take less time; of values alone, whether fewer take no more.

        A node more takes time of its own, which is nothing against a run.
        """
        before, after = self.cost(place), self.cost(place, ranks)
        fewer = place.parameters(ranks) <= PAYS * place.dense
        if before is None or after is None or not before.seconds or not after.seconds:
            return fewer
        if self.unit == "values" and not self.costs.is_measured:
            return fewer and after.seconds <= before.seconds + NODE_SECONDS
        return after.seconds <= PAYS * before.seconds

    def why_not(self, place: _Place) -> str:
        """Return why no factors of a place pay."""
        outputs, inputs, *kernel = place.shape
        least = min(outputs, inputs * math.prod(kernel))
        if least < NARROW:
            return f"it has only {least} channels; splitting pays from {NARROW} on"
        if any(self.pays(place, ranks) for ranks in place.choices):
            return ""
        cost = self.cost(place)
        words = "its factors take as long as it does"
        if cost is None or cost.seconds is None:
            return words
        return f"{words}, {1e6 * cost.seconds:.3g} us"

    def costs_of(self, place: _Place, ranks: Ranks) -> tuple[Cost, Savings]:
        """Return what a place costs, and what factors save of it."""
        size = place.weight.nbytes / max(1, place.weight.size)
        nbytes = round((place.dense - place.parameters(ranks)) * size)
        dense = round(place.dense * size)
        before, after = self.cost(place), self.cost(place, ranks)
        if before is None or after is None:
            return Cost(bytes=dense), Savings(bytes=nbytes)
        saved = before - after
        return replace(before, bytes=dense), replace(saved, bytes=nbytes)

    def cost(self, place: _Place, ranks: Ranks | None = None) -> Cost | None:
        """Return the cost of a place as it is or as factors, if shapes are known."""
        total = Cost(seconds=0.0)
        for number, layer in enumerate(place.members):
            for use in layer.uses:
                shape = self.shapes.get(use.output.name)
                if shape is None or 0 in shape:
                    return None
                is_first = number == 0
                if place.kind == "product":
                    outputs = layer.layout.matrices_shape[1]
                    rows = max(1, math.prod(shape) // outputs)
                    if place.groups > 1:
                        return None
                    total += self._product(place, ranks, rows, outputs, is_first)
                elif place.kind == "kernel":
                    read = self.shapes.get(use.node.inputs[0].name)
                    if read is None or len(read) != len(shape):
                        return None
                    total += self._kernel(place, ranks, shape, read)
                else:
                    return None
        return total

    def _product(
        self,
        place: _Place,
        ranks: Ranks | None,
        rows: int,
        outputs: int,
        is_first: bool,
    ) -> Cost:
        inputs = place.shape[1]
        if ranks is None:
            return self.costs.matmul(rows, inputs, outputs)
        (rank,) = ranks
        second = self.costs.matmul(rows, rank, outputs)
        return self.costs.matmul(rows, inputs, rank) + second if is_first else second

    def _kernel(
        self,
        place: _Place,
        ranks: Ranks | None,
        shape: Sequence[int],
        read: Sequence[int],
    ) -> Cost:
        """Return the cost of one convolution, or of those in its place."""
        outputs, inputs, *kernel = place.shape
        groups, made, given = place.groups, list(shape[2:]), list(read[2:])
        ones = [1] * len(kernel)
        chain: list[tuple[int, int, list[int], list[int]]]
        if ranks is None:
            chain = [(inputs, outputs, kernel, made)]
        elif place.form == "channel":
            chain = [
                (inputs, ranks[0], kernel, made),
                (ranks[0], outputs, ones, made),
            ]
        elif place.form == "spatial":
            first, rest = [kernel[0], *ones[1:]], [1, *kernel[1:]]
            between = [made[0], *given[1:]]
            chain = [
                (inputs, ranks[0], first, between),
                (ranks[0], outputs, rest, made),
            ]
        else:
            few, many = ranks if place.form == "tucker" else ranks * 2
            chain = [
                (inputs, few, ones, given),
                (few, many, kernel, made),
                (many, outputs, ones, made),
            ]
        total = Cost(seconds=0.0)
        for number, (ins, outs, size, where) in enumerate(chain):
            alone = groups
            if ranks is not None and place.form == "cp" and number == 1:
                alone = ins * groups
            total += self.costs.conv(
                ins * groups, outs * groups, size, where, groups=alone
            )
        return total


# --- inputs ---------------------------------------------------------------------------


def _counts(
    model: Model, places: Sequence[_Place], ctx: Context
) -> dict[str, NDArray[np.int64]]:
    """Return how often each row of each table is looked up."""
    wanted: dict[str, Counts] = {}
    tables = [place for place in places if place.kind == "table"]
    for place in tables:
        for use in place.members[0].uses:
            indices = use.node.inputs[1]
            if model.constant(indices) is None:
                wanted[indices.name] = Counts(place.shape[0])
    if not wanted:
        return {}
    # One table alone may be read by a value: others of another size are left out.
    fed = ctx.statistics(model, wanted)
    found = {}
    for place in tables:
        names = [use.node.inputs[1].name for use in place.members[0].uses]
        parts = [fed.get(name) for name in names]
        counts = [
            part.counts
            for part in parts
            if isinstance(part, Counts) and part.rows == place.shape[0]
        ]
        if counts and len(counts) == len(names) and np.sum(counts):
            found[place.where] = np.sum(counts, axis=0)
    return found


def _takes_mean(model: Model, place: _Place) -> Literal["kept", "made", ""]:
    """Return whether a bias can take up what is lost of the mean input."""
    layer = place.members[0]
    if layer.is_shared or place.kind not in ("product", "kernel"):
        return ""
    use = layer.uses[0]
    if use.index != 1 or (place.groups > 1 and place.kind == "product"):
        return ""
    if layers.free_bias(layer) is not None:
        return "kept"
    if layer.bias is not None or use.alpha != 1.0:
        return ""
    if takes_bias(use.node):
        return "kept"
    return "made" if use.product == "MatMul" else ""


# --- one place ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Task:
    """A place to study, with all that is known of its inputs and outputs."""

    source: _Source
    metric: Metric
    bias: Literal["kept", "made", ""] = ""
    gram: Array | None = None
    mean: Array | None = None
    rows: int = 0
    counts: Array | None = None
    weight: Array | None = None
    is_moment: bool = False


def _all_studied(tasks: Sequence[_Task], ctx: Context) -> list[_Study]:
    return ctx.map(_studied, tasks, "studying layers")


@one_thread
def _studied(task: _Task) -> _Study:
    """Find out what each choice of ranks loses."""
    place = task.source
    arrays = [_wide(array) for array in place.arrays()]
    if place.kind == "table":
        return _studied_table(task, arrays[0])
    outputs = len(arrays[0])
    weights: Array | None = None
    if task.weight is not None:
        weights = task.weight.reshape(-1)
        each = place.groups * outputs
        if each % len(weights):
            weights = None
        else:  # of a ConvTranspose each output stands for all of its kernel
            weights = np.repeat(weights, each // len(weights)).reshape(-1, outputs)
    moments: Array | None = None
    mean: Array | None = None
    by: Metric = "weights"
    if task.gram is not None:
        mean = task.mean
        moments = task.gram
        by = "outputs" if weights is not None else "inputs"
        if not task.is_moment:
            centred = _is_centred(task, arrays)
            assert mean is not None
            moments = moment(moments, mean, task.rows, centred=centred)
            mean = mean if centred else None
    else:
        weights = None
    lost = np.zeros(len(place.choices))
    total = 0.0
    splits = []
    for group, array in enumerate(arrays):
        inner = None if moments is None else moments[group]
        outer = None if weights is None else weights[group]
        if place.kind != "kernel":
            found = split(array, inputs=inner, outputs=outer)
            splits.append(found)
            lost += [found.lost(ranks[0]) for ranks in place.choices]
            total += found.total
            continue
        lost += decompose.losses(place.form, array, place.choices, inner, outer)
        total += _energy(array.reshape(outputs, -1), inner, outer)
    keeps = place.kind == "kernel" or place.is_one_of
    return _Study(
        by,
        tuple(splits),
        moments if keeps else None,
        weights,
        mean,
        tuple(float(value) for value in lost),
        total,
    )


def _wide(array: Array) -> Array:
    """Return values in a type that numpy multiplies fast."""
    wide = array.dtype.itemsize >= 4 and array.dtype.kind == "f"
    return array if wide else array.astype(np.float32)


def _may_share(place: _Place) -> bool:
    """Whether others may read the same value, so that its moment is needed again."""
    layer = place.members[0]
    if place.kind != "product" or len(layer.uses) != 1:
        return False
    data = layer.uses[0].node.inputs[0]
    return sum(node.op in _PRODUCTS for node in data.outputs) > 1


def _is_centred(task: _Task, arrays: Sequence[Array]) -> bool:
    """Whether a bias takes up what is lost of the mean: one that is there, or pays."""
    if task.bias != "made":
        return bool(task.bias)
    assert task.gram is not None
    assert task.mean is not None
    flat = arrays[0].reshape(len(arrays[0]), -1)
    steady = float(np.square(flat @ task.mean[0]).sum())
    whole = _energy(flat, task.gram[0] / max(task.rows, 1), None)
    return steady > MADE_BIAS * whole


def _energy(matrix: Array, inner: Array | None, outer: Array | None) -> float:
    """Return ``E |F^(1/2) W x|^2``."""
    wide = np.asarray(matrix, np.float64)
    rows = wide if inner is None else wide @ inner
    each = np.einsum("oi,oi->o", rows, wide)
    return float(each.sum() if outer is None else each @ outer)


def _studied_table(task: _Task, table: Array) -> _Study:
    """Study a table: rows weigh as often as they are read, and some if never."""
    by: Metric = "weights"
    rows = np.full(len(table), 1 / len(table))
    columns = None
    if task.counts is not None:
        by = "inputs"
        rows = (1 - UNSEEN) * task.counts / task.counts.sum() + UNSEEN * rows
        if task.weight is not None:
            by, columns = "outputs", task.weight
    found = split(table, inputs=columns, outputs=rows, damping=1e-6)
    lost = tuple(found.lost(ranks[0]) for ranks in task.source.choices)
    weights = None if columns is None else columns[None]
    return _Study(by, (found,), weights=weights, lost=lost, total=found.total)


@dataclass(frozen=True, eq=False)
class _Split:
    """A place to split."""

    source: _Source
    study: _Study
    ranks: Ranks


@dataclass(frozen=True, eq=False)
class _Result:
    """What to write.

    Attributes:
        factors: Of matrices, ``left`` and ``right`` for each group.
        chains: Of kernels, one for each group.
        shift: What the bias gains, [groups * outputs].
        lost: Share of the energy that is lost.
    """

    factors: list[tuple[Array, Array]] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    shift: Array | None = None
    lost: float = 0.0


@one_thread
def _factored(task: _Split) -> _Result:
    """Find the factors of a place."""
    place, study = task.source, task.study
    arrays = [_wide(array) for array in place.arrays()]
    chains: list[Chain] = []
    factors: list[tuple[Array, Array]] = []
    shift: list[Array] = []
    lost = 0.0
    if place.kind == "kernel":
        chains = decompose.decomposed(
            place.form, arrays, task.ranks, study.moments, study.weights
        )
    for group, array in enumerate(arrays):
        if place.kind == "kernel":
            missing = (array - chains[group].composed()).reshape(len(array), -1)
            inner = None if study.moments is None else study.moments[group]
            outer = None if study.weights is None else study.weights[group]
            lost += _energy(missing, inner, outer)
        else:
            found = study.splits[group]
            left, right = found.factors(array, task.ranks[0])
            factors.append((_narrow(place, left), _narrow(place, right)))
            lost += found.lost(task.ranks[0])
            if study.mean is not None:
                missing = np.asarray(array - left @ right)
        if study.mean is not None:
            shift.append(missing @ study.mean[group])
    return _Result(
        factors,
        [
            replace(chain, kernels=tuple(_narrow(place, k) for k in chain.kernels))
            for chain in chains
        ],
        np.concatenate(shift) if shift else None,
        lost / max(study.total, 1e-300),
    )


def _narrow(place: _Source, array: Array) -> Array:
    """Return values in the type they will be written in, where they fit it."""
    with np.errstate(over="ignore"):
        narrow = array.astype(place.dtype)
    return narrow if np.isfinite(narrow.astype(np.float64)).all() else array


def _write(model: Model, place: _Place, result: _Result) -> None:
    layer, weight = place.members[0], place.weight
    if place.kind == "kernel":
        splitting.place_kernels(model, weight, layer.uses, result.chains)
    elif place.kind == "transposed":
        splitting.place_transposed(model, weight, layer.uses, result.factors)
    elif place.kind == "table":
        ((left, right),) = result.factors
        splitting.place_table(model, weight, layer.uses, left, right)
    elif place.kind == "recurrent":
        ((left, right),) = result.factors
        splitting.place_recurrent(model, weight, layer.uses, left, right)
    else:
        _write_products(model, place, result)
        return
    if result.shift is not None:
        _shift(model, layer, result.shift)


def _write_products(model: Model, place: _Place, result: _Result) -> None:
    if len(place.members) == 1:
        layer = place.members[0]
        # Its bias is found by its only node, which changes.
        if result.shift is not None:
            _shift(model, layer, result.shift)
        splitting.place_matrices(model, place.weight, layer.uses, result.factors)
        return
    ((left, right),) = result.factors
    shared = None
    start = 0
    for layer in place.members:
        outputs = layer.layout.matrices_shape[1]
        rows = slice(start, start + outputs)
        start += outputs
        if result.shift is not None:
            _shift(model, layer, result.shift[rows])
        shared = splitting.place_matrices(
            model, layer.weight, layer.uses, [(left[rows], right)], shared
        )


def _shift(model: Model, layer: LinearWeight, shift: Array) -> None:
    """Add to the outputs of a layer through its bias, or a new one."""
    bias = layers.free_bias(layer)
    if bias is not None:
        bias.add(shift)
        return
    node = layer.uses[0].node
    name = f"{layer.name}_bias"
    values = shift.astype(layer.weight.dtype)
    if layer.uses[0].product == "Conv":
        made = model.add_weight(name, values, layer.weight.graph)
        give_bias(node, made)
        return
    splitting.add_to_output(model, node, values, name)
