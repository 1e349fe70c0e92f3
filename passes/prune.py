"""prune: set the least important weights to zero."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxshrink.base import Context, Memory, Promise, Savings, Site, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model, Weight
from onnxshrink.samples import Splits
from onnxshrink.solvers.magnitude import (
    Pattern,
    Source,
    choose_smallest,
    smallest,
    zero_smallest,
)
from onnxshrink.solvers.obs import (
    Curvature,
    Removal,
    allocate,
    pattern_mask,
    refit,
    removal_order,
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
"""Samples to study inputs on: more calibration images than a run sets aside pay off."""
SAMPLE_BYTES = 64 << 20
"""Bytes of samples that are still read beyond the calibration samples."""

_PATTERN = re.compile(r"(\d{1,5}):(\d{1,5})|(\d{1,5})x(\d{1,5})")
_ROLES: tuple[Role, ...] = ("weight", "table", "bias")


@dataclass(frozen=True, kw_only=True)
class PruneSite(Site):
    """A weight to prune, and how far it is pruned on the way there.

    Attributes:
        sparsity: Share of its entries, or blocks, that are zero afterwards.
        threshold: Below which magnitude they are, if that is how it was asked for.
        pattern: The N:M pattern or the blocks, if there are such.
        importance: By which they are chosen.
        path: Zeros at strengths 0, 1/32, ..., 1, in entries or in blocks; empty if
            there is nothing in between.
        total: Entries or blocks it has.
    """

    sparsity: float
    threshold: float | None = None
    pattern: str = ""
    importance: Measure = "magnitude"
    path: tuple[int, ...] = field(default=(), repr=False)
    total: int = field(default=0, repr=False)


@dataclass(frozen=True, eq=False)
class _Study:
    """What is known of a weight's inputs, from the model as it was given.

    Attributes:
        tensor: The weight as it was.
        measure: How importance is judged.
        squares: For wanda: sum of squares of each input, [groups, inputs].
        curvature: For obs.
        mean: For obs: mean input, [groups, inputs], if a bias makes up for it.
        removal: For obs without an N:M pattern.
        mask: For obs with one: what goes.
    """

    tensor: LazyTensor
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
        also: ``tables`` that Gather reads; ``biases``, and scale and shift of
            normalisations.
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "prune"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "prune:sparsity=0.8,scope=global"

    sparsity: float | None = None
    threshold: float | None = None
    scope: Literal["local", "global"] = "global"
    pattern: str = ""
    importance: Literal["auto", "magnitude", "wanda", "obs", "sparsegpt"] = "auto"
    also: tuple[Literal["tables", "biases"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity is a fraction from 0 to 1, not {self.sparsity}")
        if self.zeros.of and self.sparsity is not None:
            raise UsageError(f"pattern {self.pattern} leaves no choice of sparsity")
        if self.threshold is None:
            return
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise UsageError(f"threshold is a number from 0 on, not {self.threshold}")
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
        studies = self._studies(model, found, ctx)
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
            sites.append(self._site(layer, study, tuple(path), zero))
        return sites

    def _site(
        self, layer: LinearWeight, study: _Study, path: tuple[int, ...], zero: int
    ) -> Site:
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
        for layer in layers.find(model, only=self.only, skip=self.skip, roles=roles):
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
        """Return what is compared within a layer and, in global scope, among layers."""
        if study.squares is not None:
            return _Energies(layer.weight.tensor, layer.layout, study, self.zeros)
        if self.zeros.is_blocks:
            return _Energies(layer.weight.tensor, layer.layout, None, self.zeros)
        return layer.weight.tensor

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
            mask = self.zeros.drop(_energy(matrices, study))
        return bool((matrices[mask] != 0).any())

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with fewer zeros.

        The share of weights that stays goes from all to as listed in equal ratios, not
        in equal steps: what a file's size depends on is what stays. Under
        ``scope=global`` all sites at one strength are the global choice at a lower
        sparsity. An N:M pattern has nothing in between.
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
        has_data = ctx.samples.calibration is not None and not ctx.samples.random
        if self.importance == "auto":
            return "obs" if has_data and self.threshold is None else "magnitude"
        wanted: Measure = "obs" if self.importance == "sparsegpt" else self.importance
        if wanted != "magnitude" and not has_data:
            raise UsageError(
                f"importance={self.importance} needs calibration data; give --data, or "
                "importance=magnitude"
            )
        return wanted

    def _studies(
        self, model: Model, found: Sequence[LinearWeight], ctx: Context
    ) -> dict[str, _Study]:
        """Study each layer's inputs, all in one run; what was studied is remembered."""
        measure = self._measure(ctx)
        studies: dict[str, _Study] = {}
        unknown: list[LinearWeight] = []
        for layer in found:
            key = self._key(layer, measure)
            if key in ctx.cache:
                studies[layer.name] = ctx.cache[key]
                continue
            studies[layer.name] = _Study(layer.weight.tensor)
            if measure != "magnitude":
                unknown.append(layer)
        if not unknown:
            return studies
        # Gram matrices are large and the studies keep what they need of them.
        once = replace(ctx, memory=Memory(0), samples=_most_samples(ctx.samples))
        inputs = once.inputs(unknown, grams=measure == "obs")
        watched = [layer for layer in unknown if layer.name in inputs]
        tasks = [self._task(layer, inputs[layer.name]) for layer in watched]
        with threadpool_limits(1):
            done = ctx.map(_study, tasks, "studying weights")
        for layer, study in zip(watched, done, strict=True):
            study = replace(study, tensor=layer.weight.tensor)
            ctx.cache[self._key(layer, measure)] = study
            studies[layer.name] = study
        return studies

    def _key(self, layer: LinearWeight, measure: Measure) -> tuple[object, ...]:
        # The study holds the tensor, so its identity is not used again.
        adjusts = "biases" not in self.also
        return ("prune", id(layer.weight.tensor), measure, self.pattern, adjusts)

    def _task(self, layer: LinearWeight, inputs: InputStatistics) -> _Task:
        tensor, layout = layer.weight.tensor, layer.layout
        if inputs.gram is None:
            study = _Study(tensor, "wanda", inputs.squares)
            return _Task(tensor, layout, study, self.zeros)
        if not inputs.is_finite:  # the model itself overflows on this data
            return _Task(tensor, layout, _Study(tensor), self.zeros)
        adjusts = "biases" not in self.also and layers.free_bias(layer) is not None
        mean = inputs.mean if adjusts else None
        study = _Study(
            tensor,
            "obs",
            curvature=Curvature.of(inputs.gram, mean, inputs.count),
            mean=mean,
        )
        return _Task(tensor, layout, study, self.zeros)

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Zero one weight's least important entries."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Zero the least important entries of several weights."""
        found = {layer.name: layer for layer in layers.find(model, roles=_ROLES)}
        # What is seen of activations must not depend on which sites were done before.
        everything = self._layers(model, replace(ctx, skips=[]))
        studies = self._studies(model, everything, ctx)
        tasks = []
        for site in sites:
            assert isinstance(site, PruneSite)
            layer, study = found[site.where], studies[site.where]
            zeros = round(site.sparsity * self._total(layer))
            tasks.append(
                _Task(layer.weight.tensor, layer.layout, study, self.zeros, zeros)
            )
        # Back-off asks for the same weight at the same strength again and again.
        memo = ctx.cache.setdefault(("prune", "results"), _Memo())
        keys = [
            (*self._key(found[s.where], t.study.measure), t.count)
            for s, t in zip(sites, tasks, strict=True)
        ]
        new = [
            (key, task)
            for key, task in zip(keys, tasks, strict=True)
            if key not in memo
        ]
        with threadpool_limits(1):
            fresh = ctx.map(_prune, [task for _, task in new], self.name)
        results = dict(zip((key for key, _ in new), fresh, strict=True))
        for site, task, key in zip(sites, tasks, keys, strict=True):
            values, shift = results[key] if key in results else memo[key]
            memo.keep(key, (values, shift))
            layer = found[site.where]
            model.set_weight(layer.weight, values)
            zeros = _count_zeros(layer.weight.tensor)
            words = f"{zeros / layer.weight.size:.1%} zero, by {task.study.measure}"
            bias = layers.free_bias(layer) if shift is not None else None
            if bias is not None and bias.weight is not None and shift is not None:
                bias.add(shift)
                words += f"; {bias.weight.name} adjusted"
            ctx.did(layer.name, words)


class _Memo(OrderedDict[tuple[object, ...], tuple[Array, "Array | None"]]):
    """The latest results, as many as fit into a bounded amount of memory."""

    limit = 256 << 20
    nbytes = 0

    def keep(self, key: tuple[object, ...], result: tuple[Array, Array | None]) -> None:
        """Remember a result as the latest; forget the oldest ones for it."""
        if key in self:
            self.move_to_end(key)
            return
        self[key] = result
        self.nbytes += result[0].nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self.popitem(last=False)[1][0].nbytes


# --- one weight -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Task:
    """One weight to study or to prune, with all that this takes."""

    tensor: LazyTensor
    layout: Layout
    study: _Study
    zeros: Pattern
    count: int = 0


def _study(task: _Task) -> _Study:
    """Find what obs will remove; wanda needs nothing more."""
    study, curvature = task.study, task.study.curvature
    if curvature is None:
        return study
    matrices = task.layout.matrices(task.tensor.read()).astype(np.float64)
    if task.zeros.of:
        return replace(study, mask=pattern_mask(matrices, curvature, task.zeros))
    blocks = task.zeros if task.zeros.is_blocks else None
    return replace(study, removal=removal_order(matrices, curvature, blocks))


def _prune(task: _Task) -> tuple[Array, Array | None]:
    """Return a weight's new values, and what its bias gains."""
    study, tensor, zeros = task.study, task.tensor, task.zeros
    if study.measure == "magnitude" and not (zeros.of or zeros.is_blocks):
        flat = zero_smallest(tensor, task.count, tensor.dtype)
        return flat.reshape(tensor.shape), None
    matrices = task.layout.matrices(tensor.read())
    mask = _mask(task, matrices)
    if study.curvature is None:
        pruned = np.where(mask, np.zeros((), matrices.dtype), matrices)
        return task.layout.array(pruned), None
    wide = matrices.astype(np.float64)
    values = refit(wide, study.curvature, ~mask)
    new = values.astype(matrices.dtype)
    # Half precision has little room: where the new values do not fit, the old ones do.
    if not np.isfinite(new.astype(np.float64)).all():
        new = np.where(mask, np.zeros((), matrices.dtype), matrices)
    if study.mean is None:
        return task.layout.array(new), None
    shift = np.einsum("goi,gi->go", wide - new.astype(np.float64), study.mean)
    return task.layout.array(new), shift


def _mask(task: _Task, matrices: Array) -> Array:
    """Return which entries of [groups, outputs, inputs] go."""
    study, zeros = task.study, task.zeros
    if study.mask is not None:
        return study.mask
    if study.removal is not None:
        gone = study.removal.rank < task.count
        return zeros.spread(gone, matrices.shape) if zeros.is_blocks else gone
    energy = _energy(matrices, study)
    if zeros.of:
        return zeros.drop(energy)
    if zeros.is_blocks:
        scores = zeros.scores(energy)
        chosen = choose_smallest(ArrayTensor(scores), task.count)
        return zeros.spread(chosen.reshape(scores.shape), matrices.shape)
    return _by_row(energy, task.count)


def _by_row(energy: Array, count: int) -> Array:
    """Choose the smallest of each row, as many in each, ``count`` together."""
    mask = np.zeros(energy.shape, np.bool_)
    rows = energy.reshape(-1, energy.shape[-1])
    flat = mask.reshape(rows.shape)
    each, more = divmod(count, len(rows))
    for index, row in enumerate(rows):
        wanted = each + (index < more)
        flat[index, np.argsort(row, kind="stable")[:wanted]] = True
    return mask


def _energy(matrices: Array, study: _Study | None) -> Array:
    """Return what each entry is worth, float32: ``w^2``, times ``||x||^2`` if known."""
    energy = np.square(matrices.astype(np.float32))
    if study is not None and study.squares is not None:
        energy = energy * study.squares[:, None, :].astype(np.float32)
    return np.asarray(energy)


@dataclass(frozen=True, eq=False)
class _Energies:
    """Worth of a layer's entries or blocks, as shares of all of it where data says so.

    By magnitude they are comparable among layers as they are.
    """

    tensor: LazyTensor
    layout: Layout
    study: _Study | None
    zeros: Pattern

    @property
    def size(self) -> int:
        """Number of entries or blocks."""
        shape = self.layout.matrices_shape
        return math.prod(self.zeros.blocks(shape) if self.zeros.is_blocks else shape)

    def chunks(self, _: int) -> Iterator[Array]:
        """Yield them in one piece."""
        energy = _energy(self.layout.matrices(self.tensor.read()), self.study)
        if self.study is not None:
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
    """Return the zeros at strengths 0, 1/32, ..., 1 on the way to a sparsity.

    What stays goes down in equal ratios; to nothing, in ratios to a single weight.
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
