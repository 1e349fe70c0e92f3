"""prune: set the least important weights to zero."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Memory, Promise, Savings, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Weight
from onnxshrink.samples import Splits
from onnxshrink.solvers.magnitude import (
    Pattern,
    Source,
    choose_smallest,
    energies,
    smallest,
    smallest_of_rows,
    zero_smallest,
)
from onnxshrink.solvers.obs import (
    Curvature,
    Removal,
    allocate,
    pattern_mask,
    removal_order,
    remove_entries,
)
from onnxshrink.structure import layers
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import Layout, LinearWeight, Role
from onnxshrink.tensors import ArrayTensor, LazyTensor, bits_of

__all__ = ["Prune"]

Array = NDArray[Any]
Measure = Literal["magnitude", "wanda", "obs"]

STEPS = 32
"""Points of a site's path from untouched to as listed."""
SAMPLES = 2048
"""Samples to study inputs on; more than a run sets aside for calibration pay off."""
SAMPLE_BYTES = 64 << 20
"""Bytes of samples that are still read beyond the calibration samples."""

_PATTERN = re.compile(r"(\d{1,5}):(\d{1,5})|(\d{1,5})x(\d{1,5})")
_ROLES: tuple[Role, ...] = ("weight", "table", "bias")


@dataclass(frozen=True, kw_only=True)
class PruneSite(Site):
    """A weight to prune, with its weaker forms.

    Attributes:
        sparsity: Share of its entries, or blocks, that are zero afterwards.
        threshold: Below which magnitude they are, if that is how it was asked for.
        pattern: The N:M pattern or the blocks, if there are such.
        importance: By which they are chosen.
        path: Number of zero entries or blocks at strengths 0, 1/32, ..., 1; empty if
            there are no weaker forms.
        total: Entries or blocks it has.
        seen_in: Fingerprint of the model that the plan was made on. Its activations
            decide what goes, whatever other sites have changed since.
    """

    sparsity: float
    threshold: float | None = None
    pattern: str = ""
    importance: Measure = "magnitude"
    path: tuple[int, ...] = field(default=(), repr=False)
    total: int = field(default=0, repr=False)
    seen_in: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class _Study:
    """What is known of a weight, for any sparsity.

    Attributes:
        measure: How importance is judged.
        squares: For wanda: sum of squares of each input, [groups, inputs].
        curvature: For obs.
        mean: For obs: mean input, [groups, inputs], if a bias may be shifted.
        removal: For obs without an N:M pattern: the order in which entries go.
        mask: For obs with one: what goes.
    """

    measure: Measure = "magnitude"
    squares: Array | None = None
    curvature: Curvature | None = None
    mean: Array | None = None
    removal: Removal | None = None
    mask: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Prune(SitePass):
    """Set the least important weights to zero.

    Pruned are the weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN, in
    the graph, its subgraphs and functions. Weights keep their type. Zeros that are
    there stay and count.

    Importance: ``magnitude`` is ``|w|``. ``wanda`` is ``|w| * ||x||`` with the norm of
    the input it multiplies, compared within each output (Sun et al. 2023). ``obs``
    removes what the layer's outputs feel least and changes what stays to make up for
    it, and the layer's bias if it has one (Optimal Brain Surgeon, layer by layer:
    Frantar, Singh and Alistarh 2022; large layers as SparseGPT: Frantar and Alistarh
    2023). The last two need data: calibration samples, or training samples where these
    are more, up to 2,048. A layer whose inputs cannot be watched
    (in a subgraph, a table) is pruned by magnitude.

    Scope ``global`` divides the zeros among the weights: by magnitude, the smallest of
    all; by wanda, the smallest share of a layer's output energy; by obs, so that the
    sum of the layers' relative output errors is least.

    Attributes:
        sparsity: Fraction of the weights that are zero afterwards; 0.5 unless a
            threshold or an N:M pattern says otherwise. Of blocks, if whole blocks go.
        threshold: Instead: zero every weight smaller in magnitude than this.
        scope: ``local`` gives each weight tensor that sparsity, ``global`` all of them
            together.
        pattern: ``2:4`` keeps at most 2 of 4 neighbours along the inputs (of a Conv:
            channel, then kernel); ``4x1`` sets blocks of 4 outputs x 1 input to zero.
            Empty leaves zeros free.
        importance: ``auto`` is obs where there is real calibration data, else
            magnitude; ``sparsegpt`` is another name of obs.
        cost: What an entry that stays costs, for obs: the ``same`` everywhere; or the
            ``bits`` that a coder needs for it, fewer where its row and column are full.
            The file, a package above all, is smaller at the same loss.
        also: ``tables`` that Gather reads; ``biases``, and scale and shift of
            normalisations.
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "prune"
    promise: ClassVar[Promise] = Promise.CLOSE
    folds: ClassVar[Literal["", "weights", "fused"]] = "weights"
    example: ClassVar[str] = "prune:sparsity=0.8,scope=global"

    sparsity: float | None = None
    threshold: float | None = None
    scope: Literal["local", "global"] = "global"
    pattern: str = ""
    importance: Literal["auto", "magnitude", "wanda", "obs", "sparsegpt"] = "auto"
    cost: Literal["same", "bits"] = "same"
    also: tuple[Literal["tables", "biases"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity is a fraction from 0 to 1, not {self.sparsity}")
        if self.zeros.of and self.sparsity is not None:
            raise UsageError(f"pattern {self.pattern} leaves no choice of sparsity")
        if self.cost == "bits" and (
            self.pattern or self.importance not in ("auto", "obs", "sparsegpt")
        ):
            raise UsageError("cost=bits goes with importance=obs and no pattern only")
        if self.threshold is None:
            return
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise UsageError(f"threshold is a number from 0 on, not {self.threshold}")
        if self.cost == "bits":
            raise UsageError("threshold is one of magnitude; leave out cost=bits")
        if self.sparsity is not None or self.pattern:
            raise UsageError("threshold goes with neither sparsity nor pattern")
        if self.importance not in ("auto", "magnitude"):
            raise UsageError("threshold is one of magnitude; leave out importance")

    @cached_property
    def zeros(self) -> Pattern:
        """The pattern, read."""
        if not self.pattern:
            return Pattern()
        found = _PATTERN.fullmatch(self.pattern)
        if found is None:
            raise UsageError(
                f"pattern is N:M such as 2:4, or blocks such as 4x1, not "
                f"{self.pattern[:40]!r}"
            )
        keep, of, rows, columns = (int(part or 0) for part in found.groups())
        if of:
            if not 0 < keep < of <= 1024:
                raise UsageError(f"pattern {self.pattern}: N:M needs 0 < N < M <= 1024")
            return Pattern(keep=keep, of=of)
        if not (0 < rows <= 4096 and 0 < columns <= 4096):
            raise UsageError(f"pattern {self.pattern}: blocks are 1x1 to 4096x4096")
        return Pattern(rows=rows, columns=columns)

    @property
    def target(self) -> float:
        """The sparsity asked for, or its default."""
        return 0.5 if self.sparsity is None else self.sparsity

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the weights to prune, each with its share of the zeros.

        Raises:
            UsageError: The importance asked for needs data that is not there.
        """
        found = self._layers(model, ctx)
        seen_in = fingerprint(model)
        studies = self._studies(model, seen_in, found, ctx)
        sources = [self._source(layer, studies[layer.name]) for layer in found]
        present = [_count_zeros(source) for source in sources]
        paths = self._paths(found, studies, sources, present, ctx)
        sites = []
        for layer, path, zero in zip(found, paths, present, strict=True):
            study = studies[layer.name]
            total = self._total(layer)
            if self.zeros.of and not self._breaks_pattern(layer, study):
                ctx.skipped(layer.name, f"it keeps {self.pattern} already")
                continue
            if not self.zeros.of and path[-1] <= zero:
                share = f"its share is {path[-1] / total:.1%} zeros"
                ctx.skipped(layer.name, f"{share}, and it has {zero / total:.1%}")
                continue
            site = self._site(layer, study, tuple(path), zero)
            sites.append(replace(site, seen_in=seen_in))
        return sites

    def _site(
        self, layer: LinearWeight, study: _Study, path: tuple[int, ...], zero: int
    ) -> PruneSite:
        total = self._total(layer)
        bits = bits_of(layer.weight.data_type)
        size = layer.weight.size
        before = _stored_bytes(size, size * zero // total, bits)
        after = _stored_bytes(size, size * path[-1] // total, bits)
        return PruneSite(
            layer.name,
            layer.kind,
            Savings(bytes=max(0, before - after)),
            sparsity=path[-1] / total,
            threshold=self.threshold,
            pattern=self.pattern,
            importance=study.measure,
            path=() if self.zeros.of else path,
            total=total,
        )

    def _layers(self, model: Model, ctx: Context) -> list[LinearWeight]:
        roles: list[Role] = ["weight"]
        roles += ["table"] if "tables" in self.also else []
        roles += ["bias"] if "biases" in self.also else []
        found = []
        seen = False
        for layer in layers.find(
            model, only=self.only, skip=self.skip, roles=roles, fused=True
        ):
            seen = True
            why = layer.why_not or self._unfit(layer) or _unusable(layer.weight)
            if why:
                ctx.skipped(layer.name, why)
            else:
                found.append(layer)
        if not seen:
            what = "only and skip choose" if self.only or self.skip else "there is"
            kinds = " or ".join(["Conv, Gemm, MatMul, recurrent node", *self.also])
            ctx.skipped(self.name, f"{what} no weight of a {kinds}")
        return found

    def _unfit(self, layer: LinearWeight) -> str:
        """Return why the pattern does not go with the layer."""
        if not self.pattern:
            return ""
        if any(use.layout != layer.layout for use in layer.uses):
            return "its uses read it along different axes, so no pattern serves all"
        _, _, inputs = layer.layout.matrices_shape
        if self.zeros.of and inputs <= self.zeros.keep:
            return f"it has {inputs} inputs, too few for {self.pattern}"
        return ""

    def _total(self, layer: LinearWeight) -> int:
        """Return how many entries, or blocks, a layer has."""
        if self.zeros.is_blocks:
            return math.prod(self.zeros.blocks(layer.layout.matrices_shape))
        return layer.weight.size

    def _source(self, layer: LinearWeight, study: _Study) -> Source:
        """Return the values that choose what goes, within a layer and among layers."""
        if study.squares is None and not self.zeros.is_blocks:
            return layer.weight.tensor
        tensor = layer.weight.tensor
        return _Energies(tensor, layer.layout, study.squares, self.zeros)

    def _paths(
        self,
        found: Sequence[LinearWeight],
        studies: Mapping[str, _Study],
        sources: Sequence[Source],
        present: Sequence[int],
        ctx: Context,
    ) -> list[Sequence[int]]:
        """Return for each layer its zeros at strengths 0, 1/32, ..., 1."""
        if self.zeros.of:
            return [[layer.weight.size - self._kept(layer)] for layer in found]
        if self.threshold is not None:
            return [
                _counts(source.size, zero, _share_below(source, self.threshold))
                for source, zero in zip(sources, present, strict=True)
            ]
        paths: list[Sequence[int]] = [
            _counts(source.size, zero, self.target)
            for source, zero in zip(sources, present, strict=True)
        ]
        if self.scope == "local":
            return paths
        measures = {studies[layer.name].measure for layer in found}
        for measure in sorted(measures):
            mine = [
                i for i, s in enumerate(found) if studies[s.name].measure == measure
            ]
            totals = _counts(
                sum(sources[i].size for i in mine),
                sum(present[i] for i in mine),
                self.target,
            )
            removals = [studies[found[i].name].removal for i in mine]
            known = [removal for removal in removals if removal is not None]
            if measure == "obs":
                divisions = allocate(known, totals)
            else:
                divisions = smallest([sources[i] for i in mine], totals, ctx.map)
            for column, i in enumerate(mine):
                paths[i] = [division[column] for division in divisions]
        return paths

    def _kept(self, layer: LinearWeight) -> int:
        """Return how many entries an N:M pattern keeps at most."""
        groups, outputs, inputs = layer.layout.matrices_shape
        runs, rest = divmod(inputs, self.zeros.of)
        keep = self.zeros.keep
        return groups * outputs * (runs * keep + min(rest, keep))

    def _breaks_pattern(self, layer: LinearWeight, study: _Study) -> bool:
        matrices = layer.layout.matrices(layer.weight.read())
        mask = study.mask
        if mask is None:
            mask = self.zeros.drop(energies(matrices, study.squares))
        return bool((matrices[mask] != 0).any())

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with fewer zeros.

        The share of weights that stays falls in equal ratios, not in equal steps,
        because the size of a file depends on what stays. Under ``scope=global`` all
        sites at one strength are the global choice at a lower sparsity. An N:M pattern
        has no weaker form.
        """
        if strength >= 1:
            return site
        if strength <= 0 or not isinstance(site, PruneSite) or not site.path:
            return None
        at = np.interp(strength * STEPS, np.arange(len(site.path)), site.path)
        zeros = int(at)
        if zeros <= site.path[0]:
            return None
        return replace(
            site,
            savings=Savings(bytes=int(site.savings.bytes * strength)),
            sparsity=zeros / site.total,
            threshold=None,
        )

    # --- what activations say -----------------------------------------------------

    def _measure(self, ctx: Context) -> Measure:
        if self.cost == "bits":
            ctx.need_data(
                "to see what weights multiply (cost=bits)", instead="cost=same"
            )
            return "obs"
        if self.importance == "auto":
            return "obs" if ctx.has_data and self.threshold is None else "magnitude"
        wanted: Measure = "obs" if self.importance == "sparsegpt" else self.importance
        if wanted != "magnitude":
            ctx.need_data(
                f"to see what weights multiply (importance={self.importance})",
                instead="importance=magnitude",
            )
        return wanted

    def _studies(
        self, model: Model, seen_in: str, found: Sequence[LinearWeight], ctx: Context
    ) -> dict[str, _Study]:
        """Study layers, each once in a step; one run shows the inputs of all.

        A study does not depend on the sparsity asked for, so every attempt at the step
        uses the same one.

        Args:
            model: The model.
            seen_in: Fingerprint of the model that the plan was made on.
            found: Layers of the model.
            ctx: Samples and memory.

        Returns:
            What is known of each layer, by the name of its weight.
        """
        measure = self._measure(ctx)
        if measure == "magnitude":
            return {layer.name: _Study() for layer in found}
        keys = {layer.name: self._key("study", seen_in, layer, ctx) for layer in found}
        known = {name: ctx.memory.get(key) for name, key in keys.items()}
        studies = {name: one for name, one in known.items() if one is not None}
        missing = [layer for layer in found if layer.name not in studies]
        fresh = self._studied(model, missing, measure, ctx) if missing else {}
        for name, study in fresh.items():
            ctx.memory.put(keys[name], study)
        return {**studies, **fresh}

    def _studied(
        self,
        model: Model,
        missing: Sequence[LinearWeight],
        measure: Measure,
        ctx: Context,
    ) -> dict[str, _Study]:
        """Look at the inputs of layers and study their weights."""
        studies = {layer.name: _Study() for layer in missing}
        # Gram matrices are large and the studies keep what they need of them.
        once = replace(ctx, memory=Memory(0), samples=_most_samples(ctx.samples))
        inputs = once.inputs(missing, grams=measure == "obs")
        curvatures = _Curvatures()
        for layer in missing:
            if layer.name not in inputs:
                continue
            seen = inputs[layer.name]
            if seen.gram is None:
                studies[layer.name] = _Study("wanda", seen.squares)
            elif (
                seen.is_finite and seen.count
            ):  # else the model itself overflows on this data
                adjusts = self._adjusts and layers.free_bias(layer) is not None
                study = _Study(
                    "obs",
                    curvature=curvatures.of(layer, seen, adjusts),
                    mean=seen.mean if adjusts else None,
                )
                studies[layer.name] = study
        del inputs
        tasks = {
            layer.name: _StudyTask(
                layer.weight.tensor,
                layer.layout,
                curvature,
                self.zeros,
                self.cost == "bits",
            )
            for layer in missing
            if (curvature := studies[layer.name].curvature) is not None
        }
        done = ctx.map(_study, tasks.values(), "studying weights")
        for name, one in zip(tasks, done, strict=True):
            study = studies[name]
            if isinstance(one, Removal):
                studies[name] = replace(study, removal=one)
            else:
                studies[name] = replace(study, mask=one)
        return studies

    @property
    def _adjusts(self) -> bool:
        """Whether biases may move to make up for what goes."""
        return "biases" not in self.also

    def _key(
        self, what: str, seen_in: str, layer: LinearWeight, ctx: Context
    ) -> tuple[Hashable, ...]:
        """Return what an entry of the memory is found by: all that it depends on."""
        how = (self._measure(ctx), self.pattern, self._adjusts, self.cost)
        samples = (ctx.samples.calibration, ctx.samples.training)
        return ("prune", what, seen_in, layer.name, *how, *samples)

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Zero one weight's least important entries."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Zero the least important entries of several weights."""
        found = {
            layer.name: layer for layer in layers.find(model, roles=_ROLES, fused=True)
        }
        chosen = [site for site in sites if isinstance(site, PruneSite)]
        plans: dict[str, list[LinearWeight]] = {}
        for site in chosen:
            plans.setdefault(site.seen_in, []).append(found[site.where])
        studies: dict[str, _Study] = {}
        for seen_in, some in plans.items():
            studies |= self._studies(model, seen_in, some, ctx)
        tasks = {}
        for site in chosen:
            layer = found[site.where]
            count = round(site.sparsity * self._total(layer))
            tasks[site.where] = _PruneTask(
                layer.weight.tensor,
                layer.layout,
                studies[site.where],
                self.zeros,
                count,
            )
        # Back-off asks for the same weight at the same strength again and again.
        keys = {
            site.where: (
                *self._key("values", site.seen_in, found[site.where], ctx),
                tasks[site.where].count,
            )
            for site in chosen
        }
        known = {name: ctx.memory.get(key) for name, key in keys.items()}
        results = {name: one for name, one in known.items() if one is not None}
        new = {name: task for name, task in tasks.items() if name not in results}
        fresh = ctx.map(_pruned, new.values(), self.name)
        for name, one in zip(new, fresh, strict=True):
            ctx.memory.put(keys[name], one)
            results[name] = one
        for name, task in tasks.items():
            values, shift = results[name]
            layer = found[name]
            model.set_weight(layer.weight, values)
            zeros = _count_zeros(layer.weight.tensor)
            words = f"{zeros / layer.weight.size:.1%} zero, by {task.study.measure}"
            bias = layers.free_bias(layer) if shift is not None else None
            if bias is not None and bias.weight is not None and shift is not None:
                bias.add(shift)
                words += f"; {bias.weight.name} adjusted"
            ctx.did(name, words)


class _Curvatures:
    """Curvatures of layers; those that read the same inputs share one."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Curvature] = {}

    def of(
        self, layer: LinearWeight, seen: InputStatistics, adjusts: bool
    ) -> Curvature:
        """Return a layer's curvature, around the mean input if its bias adjusts."""
        assert seen.gram is not None
        read = layer.statistics_for("gram") or ()
        key = (
            tuple((tensor.name, str(statistic.key)) for tensor, statistic in read),
            layer.layout.matrices_shape[::2],
            adjusts,
        )
        if key not in self.known:
            mean = seen.mean if adjusts else None
            self.known[key] = Curvature.of(seen.gram, mean, seen.count)
        return self.known[key]


# --- one weight -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _StudyTask:
    """One weight to study, with all that this takes."""

    tensor: LazyTensor
    layout: Layout
    curvature: Curvature
    zeros: Pattern
    by_bits: bool


def _study(task: _StudyTask) -> Removal | Array:
    """Return the order in which obs removes entries; for an N:M pattern, which go."""
    matrices = task.layout.matrices(task.tensor.read()).astype(np.float64)
    if task.zeros.of:
        return pattern_mask(matrices, task.curvature, task.zeros)
    blocks = task.zeros if task.zeros.is_blocks else None
    return removal_order(matrices, task.curvature, blocks, by_bits=task.by_bits)


@dataclass(frozen=True, eq=False)
class _PruneTask:
    """One weight to prune, with all that this takes; ``count`` entries go."""

    tensor: LazyTensor
    layout: Layout
    study: _Study
    zeros: Pattern
    count: int


def _pruned(task: _PruneTask) -> tuple[Array, Array | None]:
    """Return a weight's new values, and what its bias gains."""
    study, tensor, zeros = task.study, task.tensor, task.zeros
    if study.measure == "magnitude" and not (zeros.of or zeros.is_blocks):
        flat = zero_smallest(tensor, task.count, tensor.dtype)
        return flat.reshape(tensor.shape), None
    matrices = task.layout.matrices(tensor.read())
    gone = _gone(task, matrices)
    if study.curvature is None:
        new = np.where(gone, np.zeros((), matrices.dtype), matrices)
        return task.layout.array(new), None
    new, shift = remove_entries(matrices, gone, study.curvature, study.mean)
    return task.layout.array(new), shift


def _gone(task: _PruneTask, matrices: Array) -> Array:
    """Return which entries of [groups, outputs, inputs] go."""
    study, zeros = task.study, task.zeros
    if study.mask is not None:
        return study.mask
    if study.removal is not None:
        first = study.removal.rank < task.count
        return zeros.spread(first, matrices.shape) if zeros.is_blocks else first
    energy = energies(matrices, study.squares)
    if zeros.of:
        return zeros.drop(energy)
    if zeros.is_blocks:
        scores = zeros.scores(energy)
        chosen = choose_smallest(ArrayTensor(scores), task.count)
        return zeros.spread(chosen.reshape(scores.shape), matrices.shape)
    return smallest_of_rows(energy, task.count)


@dataclass(frozen=True, eq=False)
class _Energies:
    """Energy of a layer's entries or blocks, read in flat pieces.

    By wanda they are shares of the layer's energy, so that layers compare. Magnitudes
    compare as they are.
    """

    tensor: LazyTensor
    layout: Layout
    squares: Array | None
    zeros: Pattern

    @property
    def size(self) -> int:
        """Number of entries or blocks."""
        shape = self.layout.matrices_shape
        return math.prod(self.zeros.blocks(shape) if self.zeros.is_blocks else shape)

    def chunks(self, _: int) -> Iterator[Array]:
        """Yield them in one piece."""
        energy = energies(self.layout.matrices(self.tensor.read()), self.squares)
        if self.squares is not None:
            energy /= float(energy.sum(dtype=np.float64)) or 1.0
        if self.zeros.is_blocks:
            energy = self.zeros.scores(energy)
        yield energy.reshape(-1)


def _most_samples(splits: Splits) -> Splits:
    """Let training samples calibrate where they are more, up to ``SAMPLES``."""
    few, many = splits.calibration, splits.training
    if few is None or many is None or len(few) >= min(SAMPLES, len(many)):
        return splits
    size = sum(array.nbytes for array in many.read([0]).values())
    count = min(SAMPLES, len(many), SAMPLE_BYTES // max(size, 1))
    if count <= len(few):
        return splits
    return replace(splits, calibration=many.take(slice(0, count)))


def _count_zeros(source: Source) -> int:
    return sum(int((chunk == 0).sum()) for chunk in source.chunks(8 << 20))


def _share_below(source: Source, threshold: float) -> float:
    below = sum(int((np.abs(c) < threshold).sum()) for c in source.chunks(8 << 20))
    return below / source.size


def _unusable(weight: Weight) -> str:
    for chunk in weight.chunks():
        wide = chunk if chunk.dtype.itemsize >= 4 else chunk.astype(np.float32)
        if not np.isfinite(wide).all():
            return "it holds NaN or infinity"
    return ""


def _counts(size: int, present: int, sparsity: float) -> list[int]:
    """Return the number of zeros at strengths 0, 1/32, ..., 1.

    The number that stays falls in equal ratios: to what the sparsity leaves, or to a
    single weight if it leaves none.
    """
    end = max(present, math.floor(sparsity * size + 0.5))
    left, last = size - present, size - end
    if not left:
        return [size] * (STEPS + 1)
    ratio = max(last, 1) / left
    return [*(size - round(left * ratio ** (k / STEPS)) for k in range(STEPS)), end]


def _stored_bytes(size: int, zeros: int, bits: int) -> int:
    """Estimate what a tensor takes in a file: plain, bit mask, or gaps."""
    left = size - zeros
    values = left * bits
    gaps = [left * g + values + size * g // (1 << g) for g in (4, 8)]
    return min(size * bits, size + values, *gaps) // 8
