"""codebook: replace the weights of a layer by a few values that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxshrink.activations.gathering import fingerprint
from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.model import Model, attribute
from onnxshrink.quantization.weightonly import SMALL_TABLE, home, within_reach
from onnxshrink.solvers import codebook, kmeans
from onnxshrink.solvers.allocation import share_out
from onnxshrink.structure import layers
from onnxshrink.structure.inputs import InputStatistics
from onnxshrink.structure.layers import Layout, LinearWeight, Role, Use
from onnxshrink.tensors import LazyTensor, bits_of
from onnxshrink.training.importance import output_metrics

__all__ = ["Codebook", "CodebookSite"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

COUNTS = (2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 96, 128, 256)
"""Numbers of values a budget chooses from: those whose codes pack without a gap."""
_PRUNED = 1 / 64
"""Share of zeros from which a weight counts as pruned: they stay zero."""
_HELD = 256 << 20
"""Bytes of Gram matrices that are worked on together."""
_REPEATS = 16
"""How often each value of a bias occurs at least: so often ``distill`` ties it."""
_REFITS = 2
"""How often codes and table take turns where the inputs are known."""
_PROBED = 64
"""Samples on which it is measured what errors cost the outputs."""
_SPARSE = 0.5
"""Share of zeros from which the error of a weight is not fed on to others."""
_DESCENDED = 1 << 34
"""Products that a sweep over a layer's columns may take."""
_SCALINGS = 4
"""How often scales and table take turns."""

_DECODER = 400
"""Bytes that the nodes of a decoder take about, at most."""

_CODED = "it has a codebook already"


@dataclass(frozen=True, kw_only=True)
class CodebookSite(Site):
    """A weight whose entries are to share values.

    Attributes:
        values: How many values there are.
        dim: Weights that one code stands for, if more than one.
        group: Output channels that share a table, if not all do.
        block: Weights that share a table, if not all do.
        scale: ``channel`` if each output channel has a factor of its own.
        trade: Share of the outputs' energy that a bit is worth, if there is a rate.
    """

    values: int = 16
    dim: int | None = None
    group: int | None = None
    block: int | None = None
    scale: str = ""
    trade: float | None = None


@dataclass(frozen=True, kw_only=True)
class Codebook(SitePass):
    """Replace the weights of a layer by a few shared values: a table and codes.

    Weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN and tables that
    Gather reads are changed in the graph, its subgraphs and functions (Han, Mao and
    Dally, "Deep Compression", ICLR 2016, section 3). They keep their type: the pass
    changes values, and the file stores a table and packed codes, exactly. Rows of a
    large table are gathered before they are decoded. Zeros of a pruned weight stay
    zero. The values are those of the least squared error there is, not of the nearest
    local minimum. With data, errors count as much as the inputs they multiply, and the
    error of the weights coded already is pushed into those to come (GPTQ, Frantar et
    al. 2023; GPTVQ, van Baalen et al. 2024). ``distill`` behind it trains the values.

    Attributes:
        bits: Bits of a code, 1 to 8: a table of ``2**bits`` values. 4 unless another
            option says otherwise.
        values: Or the number of values, 2 to 256. 3 makes the weight ternary, with an
            exact zero.
        dim: Weights that one code stands for: 1, or vectors of 2, 4 or 8 neighbours
            (product quantization).
        granularity: What has a table of its own: the whole tensor, a group of output
            channels, or a block of neighbours.
        group: Output channels in a group.
        block: Weights in a block, in the order in which they are stored.
        scale: ``channel`` gives each output channel a factor of its own, multiplied at
            load.
        rounding: ``nearest``, or ``gptq``: later weights make up for earlier ones;
            ``auto`` is gptq where there is real calibration data.
        initial: ``optimal``; or Lloyd's iteration from values spread evenly over the
            range (``linear``) or over the weights (``quantile``).
        bytes: Share of their bytes that all weights together may take: values are
            divided among them, and bits and values are not given. Without any of the
            three, a budget of bytes (``--max-bytes``) leaves them what the rest of the
            file does not take.
        rate: Bits a weight that an ideal coder may take for the codes of all weights
            together: frequent codes are preferred to nearer ones, in all weights by as
            much as the outputs lose by a bit saved.
        also: ``biases``, which get as many values, if each stands for 16 entries, or
            fp16 where a table is larger.
        only: Act only on these weights or nodes: names, glob patterns or op types.
        skip: Leave these weights or nodes alone: names, glob patterns or op types.
    """

    name: ClassVar[str] = "codebook"
    promise: ClassVar[Promise] = Promise.CLOSE
    folds: ClassVar[Literal["", "weights", "fused"]] = "weights"
    example: ClassVar[str] = "codebook:bits=4"

    bits: int | None = None
    values: int | None = None
    dim: Literal[1, 2, 4, 8] = 1
    granularity: Literal["tensor", "channel", "block"] = "tensor"
    group: int = 1
    block: int = 1024
    scale: Literal["none", "channel"] = "none"
    rounding: Literal["auto", "nearest", "gptq"] = "auto"
    initial: kmeans.Initial = "optimal"
    bytes: float | None = None
    rate: float | None = None
    also: tuple[Literal["biases"], ...] = ()

    def __post_init__(self) -> None:
        """Refuse options that make no sense, alone or together."""
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise UsageError(f"bits is from 1 to 8, not {self.bits}")
        if self.values is not None and not 2 <= self.values <= 256:
            raise UsageError(f"values is from 2 to 256, not {self.values}")
        if self.bits is not None and self.values is not None:
            raise UsageError("bits and values say the same; give one of them")
        if self.group < 1 or self.block < 2:
            raise UsageError("group is from 1 on, and block from 2 on")
        if self.bytes is not None and not 0 < self.bytes <= 1:
            raise UsageError(f"bytes is a share above 0 and up to 1, not {self.bytes}")
        if self.bytes is not None and (self.bits or self.values):
            raise UsageError("bytes chooses the values; leave out bits and values")
        if self.rate is not None and not 0 < self.rate <= 8:
            raise UsageError(f"rate is above 0 and up to 8 bits, not {self.rate}")
        if self.rate is not None and (
            self.granularity != "tensor" or self.scale != "none"
        ):
            raise UsageError("rate goes with granularity=tensor and scale=none only")
        if self.dim == 1:
            return
        for name, plain in (
            ("granularity", "tensor"),
            ("scale", "none"),
            ("initial", "optimal"),
        ):
            if getattr(self, name) != plain:
                raise UsageError(f"dim={self.dim} goes with {name}={plain} only")
        if self.rate is not None:
            raise UsageError("rate is for single weights; leave out dim")

    @property
    def count(self) -> int:
        """How many values a table has unless a budget says so."""
        if self.values is not None:
            return self.values
        if self.bits is not None:
            return int(2**self.bits)
        return 64 if self.rate is not None else 256 if self.dim > 1 else 16

    # --- plan ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the weights to code, each with its number of values.

        Raises:
            UsageError: ``rounding=gptq`` is asked for without data.
        """
        if self.rounding == "gptq":
            ctx.need_data(
                "to see what layers read (rounding=gptq)", instead="rounding=nearest"
            )
        found = list(self._layers(model, ctx))
        counts = {layer.name: self.count for layer in found}
        room = self._room(model, found, ctx)
        if room is not None:
            counts = self._divided(model, found, room, ctx)
        trades: dict[str, float] = {}
        if self.rate is not None and found:
            trades = self._traded(model, found, counts, ctx)
        sites = []
        for layer in found:
            count = counts[layer.name]
            before = layer.weight.nbytes
            after = self._stored(layer, count)
            if after >= before:
                ctx.skipped(
                    layer.name,
                    f"a table of {count} and codes take {after:,} bytes, its "
                    f"{layer.weight.size:,} entries {before:,}",
                )
                continue
            sites.append(
                CodebookSite(
                    layer.name,
                    layer.kind,
                    Savings(bytes=before - after),
                    values=count,
                    dim=self.dim if self.dim > 1 else None,
                    group=self.group if self.granularity == "channel" else None,
                    block=self.block if self.granularity == "block" else None,
                    scale=self.scale if self.scale != "none" else "",
                    trade=trades.get(layer.name),
                )
            )
        return sites

    def _layers(self, model: Model, ctx: Context) -> Iterator[LinearWeight]:
        roles: list[Role] = ["weight", "table"]
        roles += ["bias"] if "biases" in self.also else []
        seen = False
        for layer in layers.find(model, only=self.only, skip=self.skip, roles=roles):
            seen = True
            why = layer.why_not or self._unfit(layer) or _unusable(layer.weight.tensor)
            if why:
                ctx.skipped(layer.name, why)
            else:
                yield layer
        if not seen:
            what = "only and skip choose" if self.only or self.skip else "there is"
            ctx.skipped(
                self.name,
                f"{what} no weight of a Conv, Gemm, MatMul, Gather or recurrent node",
            )

    def _unfit(self, layer: LinearWeight) -> str:
        """Return why a layer cannot have such a codebook, or nothing."""
        weight, size = layer.weight, layer.weight.size
        if _is_bias(layer):
            return ""
        if size % self.dim:
            return f"its {size:,} entries do not divide into vectors of {self.dim}"
        if self.granularity == "block" and (size % self.block or size == self.block):
            return f"its {size:,} entries do not divide into blocks of {self.block}"
        by_channel = self.granularity == "channel" or self.scale == "channel"
        if by_channel and any(use.layout != layer.layout for use in layer.uses):
            return "its uses read it along different axes, so it has no channels"
        groups, outputs, _ = layer.layout.matrices_shape
        if self.granularity == "channel" and groups * outputs % self.group:
            return f"{groups * outputs} channels do not divide by {self.group}"
        if _few(weight.tensor, self.count, self.dim):
            return _CODED
        return ""

    def _tables(self, layer: LinearWeight) -> int:
        """Return how many tables a layer gets."""
        groups, outputs, _ = layer.layout.matrices_shape
        if _is_bias(layer) or self.granularity == "tensor":
            return 1
        if self.granularity == "channel":
            return groups * outputs // self.group
        return layer.weight.size // self.block

    def _stored(self, layer: LinearWeight, count: int) -> int:
        """Estimate the bytes a layer takes with ``count`` values in a table."""
        weight = layer.weight
        item = bits_of(weight.data_type) // 8
        if _is_bias(layer):
            count = max(2, min(count, weight.size // _REPEATS))
            return min(2 * weight.size, _coded_bytes(weight.size, 0, count, item))
        zeros = 0 if self.dim > 1 else _zeros(weight.tensor)
        found = _coded_bytes(weight.size // self.dim, zeros, count, item * self.dim)
        found += (self._tables(layer) - 1) * count * item
        if self.scale == "channel":
            groups, outputs, _ = layer.layout.matrices_shape
            found += groups * outputs * item
        return found

    def _room(
        self, model: Model, found: Sequence[LinearWeight], ctx: Context
    ) -> float | None:
        """Return the bytes that weights may take together, if these are bounded."""
        if not found:
            return None
        total = sum(layer.weight.nbytes for layer in found)
        if self.bytes is not None:
            return self.bytes * total
        if ctx.max_bytes is None or self.bits is not None or self.values is not None:
            return None
        rest = model.plain_nbytes() - total + _DECODER * len(found)
        return max(0.0, float(ctx.max_bytes - rest))

    def _divided(
        self, model: Model, found: Sequence[LinearWeight], room: float, ctx: Context
    ) -> dict[str, int]:
        """Divide values among layers so that the sum of errors is least.

        With data the error is what the model's outputs lose of their energy, else what
        each weight loses of its own.
        """
        curves: dict[str, list[float]] = {}
        weights = _output_weights(model, found, ctx) if ctx.has_data else {}
        for batch in self._studies(found, ctx):
            batch = [replace(one, weights=weights.get(one.name)) for one in batch]
            done = ctx.map(_error_curve, batch, "studying weights")
            curves.update(zip((one.name for one in batch), done, strict=True))
        items = [
            [
                (float(self._stored(layer, count)), error)
                for count, error in zip(COUNTS, curves[layer.name], strict=True)
            ]
            for layer in found
        ]
        total = sum(layer.weight.nbytes for layer in found)
        places = share_out(items, room)
        chosen = {
            layer.name: COUNTS[place]
            for layer, place in zip(found, places, strict=True)
        }
        spent = sum(self._stored(layer, chosen[layer.name]) for layer in found)
        if spent > room:
            ctx.skipped(
                "bytes",
                f"two values for each weight still take {spent / total:.3f} of the "
                f"bytes, more than {room / total:.3f}",
            )
        steps = ",".join(
            f"codebook:values={count},only={name}" for name, count in chosen.items()
        )
        ctx.did("bytes", f"as a pipeline: {steps}")
        return chosen

    def _traded(
        self,
        model: Model,
        found: Sequence[LinearWeight],
        counts: Mapping[str, int],
        ctx: Context,
    ) -> dict[str, float]:
        """Return what a bit is worth to each layer, as a share of its energy.

        To the model's outputs it is worth the same in all of them (Lagrange).
        """
        assert self.rate is not None
        weights = _output_weights(model, found, ctx) if ctx.has_data else {}
        curves: dict[str, codebook.RateCurve] = {}
        worth: dict[str, float] = {}
        for batch in self._studies(found, ctx):
            for one in batch:
                if one.bias:
                    continue
                array = one.tensor.read()
                count = counts[one.name]
                zero = _keeps_zero(array, count)
                curves[one.name] = codebook.RateCurve(array, count, zero)
                worth[one.name] = _energy_share(one, array, weights.get(one.name))
        if not curves:
            return {}
        size = sum(curve.size for curve in curves.values())

        def rate(trade: float) -> float:
            bits = 0.0
            for name, curve in curves.items():
                bits += curve.bits(trade / worth[name] * curve.energy)
            return bits / size

        trade = codebook.trade_for(rate, self.rate, 1.0)
        if rate(trade) > 1.05 * self.rate:
            ctx.skipped("rate", f"{self.rate:g} bits a weight are too few for these")
        return {name: trade / worth[name] for name in curves}

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with more values, up to 256, in equal ratios."""
        if strength >= 1:
            return site
        if strength <= 0 or not isinstance(site, CodebookSite):
            return None
        count = round(256 * (site.values / 256) ** strength)
        if count <= site.values:
            return site
        share = math.log2(256 / count) / max(math.log2(256 / site.values), 1e-9)
        trade = None if site.trade is None else site.trade * 1e-3 ** (1 - strength)
        return replace(
            site,
            values=count,
            trade=trade,
            savings=Savings(bytes=int(site.savings.bytes * (0.75 + 0.25 * share))),
        )

    # --- act ----------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Code one weight."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Code several weights."""
        roles: Sequence[Role] = ("weight", "table", "bias")
        by_name = {layer.name: layer for layer in layers.find(model, roles=roles)}
        wanted = {site.where: site for site in sites if isinstance(site, CodebookSite)}
        found = [by_name[name] for name in wanted]
        mark = fingerprint(model) if found else ""
        # Back-off asks for the same weight with as many values again and again.
        keys = {
            name: ("codebook", str(self), mark, name, site.values, site.trade)
            for name, site in wanted.items()
        }
        results = {name: ctx.memory.get(key) for name, key in keys.items()}
        missing = [layer for layer in found if results[layer.name] is None]
        for batch in self._studies(missing, ctx):
            tasks = [
                replace(
                    one, count=wanted[one.name].values, trade=wanted[one.name].trade
                )
                for one in batch
            ]
            for task, result in zip(
                tasks, ctx.map(_share, tasks, self.name), strict=True
            ):
                ctx.memory.put(keys[task.name], result)
                results[task.name] = result
        for layer in found:
            self._write(model, layer, results[layer.name], ctx)

    def _studies(
        self, found: Sequence[LinearWeight], ctx: Context
    ) -> Iterator[list[_Study]]:
        """Yield what is known of layers, a bounded number at a time."""
        wants = self.rounding != "nearest" and ctx.has_data and bool(found)
        seen = ctx.inputs(found) if wants else {}
        batch: list[_Study] = []
        held = 0
        for layer in found:
            known = seen.get(layer.name)
            if known is not None and not (known.is_finite and known.count):
                known = None  # it overflows on this data, or sees nothing of it
            one = _Study.of(self, layer, known)
            size = 0 if known is None else known.nbytes
            if batch and held + size > _HELD:
                yield batch
                batch, held = [], 0
            batch.append(one)
            held += size
        if batch:
            yield batch

    def _write(
        self, model: Model, layer: LinearWeight, result: _Result, ctx: Context
    ) -> None:
        words = result.words
        if result.scale is not None:
            _scaled(model, layer, result.values, result.scale)
        elif result.codes is not None and _is_looked_up(model, layer):
            for use in layer.uses:
                _gathered(model, layer, use, result.codes, result.table)
            words += "; rows are decoded after they are gathered"
        else:
            model.set_weight(layer.weight, result.values)
        ctx.did(layer.name, words)


# --- one weight -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Study:
    """One weight to code, with all that this takes.

    Attributes:
        name: Its name.
        tensor: Its values.
        layout: How they are rows.
        gram: Of the layer's inputs, [groups, inputs, inputs], if known.
        squares: Mean square of each input, [groups, inputs], if known.
        weights: What a squared error of each output costs the model's outputs,
            [groups * outputs], if known.
        options: The pass.
        bias: Whether it is a bias.
        tables: How many tables it gets.
        count: Values in a table.
        trade: Share of the layer's energy that a bit is worth, if there is a rate.
        shares_rows: Whether codes are wanted beside values.
    """

    name: str
    tensor: LazyTensor
    layout: Layout
    gram: Float64 | None
    squares: Float64 | None
    options: Codebook
    bias: bool
    tables: int
    count: int = 0
    trade: float | None = None
    shares_rows: bool = False
    weights: Float64 | None = None

    @classmethod
    def of(
        cls, options: Codebook, layer: LinearWeight, seen: InputStatistics | None
    ) -> _Study:
        return cls(
            layer.name,
            layer.weight.tensor,
            layer.layout,
            None if seen is None else seen.gram,
            None if seen is None else seen.squares / max(seen.count, 1),
            options,
            _is_bias(layer),
            options._tables(layer),
            shares_rows=_may_be_looked_up(layer),
        )

    def importance(self) -> Float64 | None:
        """Return the weight of each entry's error, in the order of the array."""
        if self.squares is None:
            return None
        diagonal = np.maximum(self.squares, 0.0)
        mean = float(diagonal.mean()) or 1.0
        # What multiplies nothing still counts a little, where nothing else decides.
        shares = diagonal / mean + 1e-6
        shape = self.layout.matrices_shape
        spread = np.broadcast_to(shares[:, None, :], shape)
        return _narrowed(self.layout.array(spread), self.layout.shape)


@dataclass(frozen=True, eq=False)
class _Result:
    """What became of a weight.

    Attributes:
        values: Its values, without the scale.
        words: What was done.
        scale: Factor of each channel, in a shape that broadcasts, if there is one.
        table: Values of the codes, where these are wanted.
        codes: uint8 of the weight's shape, where rows are looked up.
    """

    values: Array
    words: str
    scale: Array | None = None
    table: Array | None = None
    codes: Array | None = None


def _narrowed(spread: Array, shape: Sequence[int]) -> Float64:
    """Keep one entry along each axis on which nothing changes."""
    array = np.asarray(spread, np.float64)
    for axis in range(len(shape)):
        first = np.take(array, [0], axis=axis)
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _share(task: _Study) -> _Result:
    """Choose table and codes of one weight."""
    array = task.tensor.read()
    options = task.options
    if task.bias:
        return _shared_bias(array, task.count)
    if options.dim > 1:
        return _shared_vectors(task, array)
    if options.granularity == "block":
        return _shared_blocks(task, array)
    if options.scale == "channel" or options.granularity == "channel":
        return _shared_channels(task, array)
    importance = task.importance()
    zero = _keeps_zero(array, task.count)
    table, lengths, trade = _fitted(task, array, zero, importance)
    if task.gram is None:
        if lengths is None:
            codes = kmeans.assign(array, table)
        else:
            codes = codebook.assign_by_rate(array, table, lengths, trade)
    else:
        codes, table = _fed_back(task, array, table, lengths)
    table = _narrow(table, array.dtype)
    values = table[codes]
    words = _words(array, values, len(np.unique(table)), task.gram, task.layout)
    if lengths is not None:
        bits = codebook.entropy(np.bincount(codes.reshape(-1)))
        words += f", {bits:.2f} bits a weight"
    wanted = codes if task.shares_rows else None
    return _Result(values, words, table=table, codes=wanted)


def _fitted(
    task: _Study, array: Array, zero: bool, importance: Float64 | None
) -> tuple[Float64, Float64 | None, float]:
    """Return a table, and lengths and trade-off if there is a rate."""
    if task.trade is not None:
        energy = float(np.square(array, dtype=np.float64).sum())
        return codebook.fit_by_rate(
            array, task.count, trade=task.trade * energy, zero=zero
        )
    table = kmeans.fit(
        array,
        task.count,
        importance=importance,
        zero=zero,
        initial=task.options.initial,
    )
    return table, None, 0.0


def _fed_back(
    task: _Study,
    array: Array,
    table: Float64,
    lengths: Float64 | None,
) -> tuple[Array, Float64]:
    """Choose codes by what the layer's outputs lose, and refit the table to them."""
    assert task.gram is not None
    matrices = task.layout.matrices(array)
    rows = np.ascontiguousarray(matrices, np.float64).reshape(-1, matrices.shape[2])

    def placed(codes: Array) -> Array:
        return task.layout.array(codes.reshape(matrices.shape))

    gram = task.gram

    def lost(codes: Array, values: Array) -> float:
        return codebook.output_error(rows, values[codes], gram)

    trade = 0.0
    if task.trade is not None:
        trade = task.trade * codebook.output_error(rows, np.zeros_like(rows), gram)
    share = np.broadcast_to(np.asarray(task.importance()), array.shape)
    mean = float(np.einsum("gii->", gram)) / max(1, gram.shape[0] * gram.shape[1])
    diagonal = mean * task.layout.matrices(share).reshape(rows.shape)
    if lengths is None:
        codes = kmeans.assign(rows, table)
    else:
        codes = codebook.assign_by_rate(rows, table, lengths, trade, diagonal)
    best = (lost(codes, table), codes, table)
    bits = lengths
    # What is zero makes up for nothing: a pruned layer has too little left to feed on.
    feeds = lengths is None and float(np.mean(rows == 0)) < _SPARSE
    descends = rows.size * rows.shape[1] <= _DESCENDED
    for _ in range(_REFITS + 1):
        if feeds:
            codes = codebook.feedback(rows, gram, table)
        if descends:
            codes = codebook.descend(
                rows, gram, table, codes, lengths=bits, trade=trade
            )
        if bits is not None:
            counts = np.bincount(codes.reshape(-1), minlength=len(table))
            bits = codebook.lengths_of(np.maximum(counts, 0.5))
        refitted = codebook.refit(rows, gram, table, codes)
        error = lost(codes, refitted)
        if error < best[0] or bits is not None:
            best = (error, codes, refitted)
        order = np.argsort(refitted, kind="stable")
        table = refitted[order]
        codes = np.argsort(order).astype(np.uint8)[codes]
        bits = None if bits is None else bits[order]
    return placed(best[1]), best[2]


def _shared_bias(array: Array, count: int) -> _Result:
    size, item = array.size, array.dtype.itemsize
    count = min(count, size // _REPEATS)
    half = array.astype(np.float16) if item > 2 else array
    fits = bool(np.isfinite(half.astype(np.float64)).all())
    count = max(count, 2) if not fits else count
    if fits and (count < 2 or 2 * size <= _coded_bytes(size, 0, count, item)):
        return _Result(half.astype(array.dtype), "rounded to fp16")
    table = kmeans.fit(array, count, zero=_keeps_zero(array, count))
    narrow = _narrow(table, array.dtype)
    values = narrow[kmeans.assign(array, table)]
    return _Result(values, _words(array, values, len(table), None, None))


def _shared_vectors(task: _Study, array: Array) -> _Result:
    dim = task.options.dim
    vectors = array.reshape(-1, dim)
    importance = task.importance()
    flat = None
    if importance is not None:
        spread = np.broadcast_to(importance, array.shape)
        flat = np.ascontiguousarray(spread).reshape(-1, dim)
    zero = _keeps_zero(np.asarray(vectors.any(axis=1)), task.count)
    table = kmeans.fit_vectors(vectors, task.count, importance=flat, zero=zero)
    codes = kmeans.assign_vectors(vectors, table, flat)
    decoded = table[codes].reshape(array.shape)
    if task.gram is not None:
        decoded = _vectors_fed_back(task, array, table, codes)
    values = _narrow(decoded, array.dtype)
    words = _words(array, values, len(table), task.gram, task.layout)
    return _Result(values, words.replace("values", f"vectors of {dim}"))


def _vectors_fed_back(
    task: _Study, array: Array, table: Float64, nearest: Array
) -> Array:
    """Return decoded values; those of nearest vectors where no feedback is possible."""
    assert task.gram is not None
    dim, layout = task.options.dim, task.layout
    groups, outputs, width = layout.matrices_shape
    flat = np.arange(array.size).reshape(array.shape)
    place = layout.matrices(flat).reshape(-1, width)
    along = width % dim == 0 and bool(
        (place.reshape(-1, dim)[:, -1] - place.reshape(-1, dim)[:, 0] == dim - 1).all()
    )
    columns = np.ascontiguousarray(place.T)
    across = outputs % dim == 0 and bool(
        (
            columns.reshape(-1, dim)[:, -1] - columns.reshape(-1, dim)[:, 0] == dim - 1
        ).all()
    )
    plain = table[nearest].reshape(array.shape)
    if not along and not across:
        return plain
    rows = np.ascontiguousarray(layout.matrices(array), np.float64).reshape(-1, width)

    def decoded(codes: Array, values: Float64) -> Array:
        if along:
            return np.asarray(values[codes].reshape(rows.shape))
        entries = values[codes].transpose(0, 2, 1)
        return np.asarray(entries.reshape(rows.shape))

    best = layout.matrices(plain).reshape(rows.shape)
    least = codebook.output_error(rows, best, task.gram)
    for _ in range(_REFITS):
        codes = codebook.feedback(rows, task.gram, table, across=not along)
        index = codes.astype(np.int64)[:, :, None] * dim + np.arange(dim)
        if not along:
            index = index.transpose(0, 2, 1)
        table = codebook.refit(
            rows,
            task.gram,
            table,
            index.reshape(rows.shape),
            held=np.broadcast_to(~table.any(axis=1, keepdims=True), table.shape),
        )
        found = decoded(codes, table)
        error = codebook.output_error(rows, found, task.gram)
        if error < least:
            best, least = found, error
    return layout.array(best.reshape(groups, outputs, width))


def _shared_blocks(task: _Study, array: Array) -> _Result:
    blocks = array.reshape(-1, task.options.block)
    importance = task.importance()
    spread = None
    if importance is not None:
        spread = np.broadcast_to(importance, array.shape).reshape(blocks.shape)
    values = np.empty_like(blocks)
    zero = _keeps_zero(array, task.count)
    for index, block in enumerate(blocks):
        table = kmeans.fit(
            block,
            task.count,
            importance=None if spread is None else spread[index],
            zero=zero,
            initial=task.options.initial,
        )
        values[index] = _narrow(table, array.dtype)[kmeans.assign(block, table)]
    whole = values.reshape(array.shape)
    words = _words(array, whole, task.count, task.gram, task.layout)
    return _Result(whole, f"{words}, in each of {len(blocks)} blocks")


def _shared_channels(task: _Study, array: Array) -> _Result:
    """Give each group of channels a table, or each channel a scale, or both."""
    options, layout = task.options, task.layout
    matrices = layout.matrices(array)
    shape = matrices.shape
    rows = np.ascontiguousarray(matrices, np.float64).reshape(-1, shape[2])
    importance = np.ones(rows.shape)
    known = task.importance()
    if known is not None:
        spread = np.broadcast_to(known, array.shape)
        importance = np.ascontiguousarray(layout.matrices(spread)).reshape(rows.shape)
    zero = _keeps_zero(array, task.count)
    owner = np.zeros(len(rows), np.intp)
    if options.granularity == "channel":
        owner = np.arange(len(rows)) // options.group
    scale = np.ones((len(rows), 1))
    if options.scale == "channel":
        squares = (importance * rows**2).sum(axis=1, keepdims=True)
        mean = squares / np.maximum(importance.sum(axis=1, keepdims=True), 1e-300)
        scale = np.where(mean > 0, np.sqrt(mean), 1.0)
    turns = _SCALINGS if options.scale == "channel" else 1
    tables = codes = np.empty(0)
    for turn in range(turns):
        if turn == 0 or task.gram is None:
            tables = _row_tables(task, rows / scale, importance * scale**2, owner, zero)
        else:
            tables = _row_refit(task, rows, scale, tables, codes, owner)
        codes = _row_codes(task, rows / scale, tables, owner)
        if options.scale == "channel" and turn < turns - 1:
            scale = _rescaled(task, rows, scale, tables, codes, owner, importance)
            scale = _narrow(scale, array.dtype).astype(np.float64)
    if task.gram is not None:
        tables = _row_refit(task, rows, scale, tables, codes, owner)
    narrow = _narrow(tables, array.dtype)
    decoded = np.take_along_axis(narrow[owner], codes.astype(np.intp), 1)
    values = layout.array(decoded.reshape(shape))
    whole = decoded.astype(np.float64) * scale
    full = layout.array(whole.reshape(shape))
    words = _words(array, full, task.count, task.gram, layout)
    if options.granularity == "channel":
        words += f", in each of {len(tables)} groups of channels"
    if options.scale != "channel":
        return _Result(values, words)
    spread = np.broadcast_to(scale.reshape(shape[0], shape[1], 1), shape)
    factor = _narrowed(layout.array(spread), layout.shape).astype(array.dtype)
    return _Result(values, f"{words}, times a scale of each channel", scale=factor)


def _row_tables(
    task: _Study, rows: Float64, importance: Float64, owner: Array, zero: bool
) -> Float64:
    """Return the table of each owner, filled up where there are fewer values."""
    count = int(owner[-1]) + 1
    tables = np.empty((count, task.count))
    for index in range(count):
        mine = owner == index
        found = kmeans.fit(
            rows[mine],
            task.count,
            importance=importance[mine],
            zero=zero,
            initial=task.options.initial,
        )
        tables[index] = np.pad(found, (0, task.count - found.size), mode="edge")
    return tables


def _row_refit(
    task: _Study,
    rows: Float64,
    scale: Float64,
    tables: Float64,
    codes: Array,
    owner: Array,
) -> Float64:
    """Move tables to where codes, as they are, change the outputs least."""
    assert task.gram is not None
    index = owner[:, None] * tables.shape[1] + codes
    if (scale == 1).all():
        return codebook.refit(rows, task.gram, tables, index)
    # A row counts as the square of its scale.
    found = codebook.refit(rows / scale, task.gram, tables, index, share=scale)
    return found


def _rescaled(
    task: _Study,
    rows: Float64,
    scale: Float64,
    tables: Float64,
    codes: Array,
    owner: Array,
    importance: Float64,
) -> Float64:
    """Return the factor of each row that loses least with its codes as they are."""
    decoded = np.take_along_axis(tables[owner], codes.astype(np.intp), 1)
    image = importance * decoded
    if task.gram is not None:
        groups, _, width = task.layout.matrices_shape
        image = (decoded.reshape(groups, -1, width) @ task.gram).reshape(rows.shape)
    over = (image * rows).sum(axis=1, keepdims=True)
    under = (image * decoded).sum(axis=1, keepdims=True)
    moved = np.divide(over, under, out=scale.copy(), where=under > 0)
    return np.where(moved > 0, moved, scale)


def _row_codes(task: _Study, rows: Float64, tables: Float64, owner: Array) -> Array:
    nearest = np.empty(rows.shape, np.uint8)
    for index, table in enumerate(tables):
        mine = owner == index
        nearest[mine] = kmeans.assign(rows[mine], table)
    if task.gram is None:
        return nearest
    codes = codebook.feedback(rows, task.gram, tables, owner=owner)
    groups = len(task.gram)
    for index in range(groups):
        own = slice(index * len(rows) // groups, (index + 1) * len(rows) // groups)
        lost = [
            codebook.output_error(
                rows[own],
                np.take_along_axis(tables[owner[own]], one[own].astype(np.intp), 1),
                task.gram[index],
            )
            for one in (codes, nearest)
        ]
        if lost[0] > lost[1]:
            codes[own] = nearest[own]
    return codes


# --- what is known of a weight --------------------------------------------------------


def _is_bias(layer: LinearWeight) -> bool:
    return all(use.role == "bias" for use in layer.uses)


def _zeros(tensor: LazyTensor) -> int:
    return sum(int((chunk == 0).sum()) for chunk in tensor.chunks())


def _keeps_zero(array: Array, count: int) -> bool:
    """Whether 0 must be a value: of a pruned weight, and of a ternary one."""
    return count == 3 or bool(np.mean(array == 0) >= _PRUNED)


def _unusable(tensor: LazyTensor) -> str:
    for chunk in tensor.chunks():
        wide = chunk if chunk.dtype.itemsize >= 4 else chunk.astype(np.float32)
        if not np.isfinite(wide).all():
            return "it holds NaN or infinity"
    return ""


def _few(tensor: LazyTensor, count: int, dim: int) -> bool:
    """Whether there are no more than ``count`` distinct values, or vectors."""
    known = np.empty((0, dim), tensor.dtype)
    rest = np.empty(0, tensor.dtype)
    for chunk in tensor.chunks():
        flat = np.concatenate([rest, chunk.reshape(-1)])
        whole = flat.size // dim * dim
        vectors, rest = flat[:whole].reshape(-1, dim), flat[whole:]
        some = vectors[: 1 << 14]
        if len(np.unique(some, axis=0)) > count:
            return False
        known = np.unique(np.concatenate([known, vectors]), axis=0)
        if len(known) > count:
            return False
    return True


def _narrow(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values in the weight's type; zero stays zero."""
    return np.asarray(values).astype(dtype)


def _words(
    array: Array, values: Array, count: int, gram: Float64 | None, layout: Layout | None
) -> str:
    """Say how many values there are and what they cost."""
    if gram is not None and layout is not None:
        shape = layout.matrices_shape
        rows = layout.matrices(array).reshape(-1, shape[2]).astype(np.float64)
        now = layout.matrices(values).reshape(-1, shape[2]).astype(np.float64)
        energy = codebook.output_error(rows, np.zeros_like(rows), gram)
        lost = codebook.output_error(rows, now, gram)
        what = "of its outputs' energy"
    else:
        energy = lost = 0.0
        flat, new = array.reshape(-1), values.reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            own = flat[start : start + (1 << 20)].astype(np.float64)
            missed = own - new[start : start + (1 << 20)].astype(np.float64)
            energy += float(own @ own)
            lost += float(missed @ missed)
        what = "of its energy"
    share = lost / energy if energy else 0.0
    return f"{count} values, {share:.2g} {what} lost"


def _coded_bytes(size: int, zeros: int, count: int, item: int) -> int:
    """Estimate what codes and their table take: packed, or beside a mask or gaps."""
    bits = math.log2(count)
    table = count * item
    dense = size * bits
    left = size - zeros
    if not zeros or left * 2 > size:
        return int(min(dense, size + left * bits) / 8) + table
    gaps = [left * (g + bits) + size * g / (1 << g) for g in (2, 3, 4, 6, 8)]
    return int(min(dense, size + left * bits, *gaps) / 8) + table


def _error_curve(task: _Study) -> list[float]:
    """Return the relative error with each of ``COUNTS`` values."""
    array: Array = task.tensor.read()
    dim = task.options.dim
    importance = task.importance()
    absolute = task.squares is not None and task.weights is not None
    if task.squares is not None and task.weights is not None:
        groups, outputs, width = task.layout.matrices_shape
        rows = task.weights.reshape(groups, outputs, 1)
        cost = np.broadcast_to(
            rows * task.squares[:, None, :], (groups, outputs, width)
        )
        importance = _narrowed(task.layout.array(cost), task.layout.shape)
    given = np.ones(1) if importance is None else importance
    share: Array = np.broadcast_to(given, array.shape)
    energy = float((share * array.astype(np.float64) ** 2).sum()) or 1.0
    energy = 1.0 if absolute else energy
    if dim > 1 and not task.bias:
        vectors = array.reshape(-1, dim)
        flat = np.ascontiguousarray(share).reshape(-1, dim)
        curve = []
        for count in COUNTS:
            found = kmeans.fit_vectors(vectors, count, importance=flat)
            decoded = found[kmeans.assign_vectors(vectors, found, flat)]
            curve.append(float((flat * (vectors - decoded) ** 2).sum()) / energy)
        return curve
    errors = kmeans.errors(
        array, 256, importance=importance, zero=_keeps_zero(array, 256)
    )
    return [float(errors[count - 1]) / energy for count in COUNTS]


def _energy_share(one: _Study, array: Array, weights: Float64 | None) -> float:
    """Return what the model's outputs lose if all of a weight goes; 1 if not known."""
    if weights is None or one.squares is None:
        return 1.0
    matrices = np.square(one.layout.matrices(array), dtype=np.float64)
    groups, outputs, _ = one.layout.matrices_shape
    energies = np.einsum("goi,gi->go", matrices, one.squares)
    share = float((energies * weights.reshape(groups, outputs)).sum())
    return max(share, 1e-12)


def _output_weights(
    model: Model, found: Sequence[LinearWeight], ctx: Context
) -> dict[str, Float64]:
    """Return what an error of each output of layers costs the model's outputs."""
    inside = {id(node) for node in model.graph.nodes}
    values: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for layer in found:
        for use in layer.uses:
            if use.role != "weight" or id(use.node) not in inside:
                continue
            if use.node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                values[use.output.name] = use.output_channels
                names.setdefault(layer.name, []).append(use.output.name)
    samples = ctx.samples.calibration
    if not values or samples is None:
        return {}
    few = samples.take(slice(0, _PROBED))
    try:
        seen = output_metrics(model, values, few, seed=ctx.seed, threads=ctx.threads)
    except (ModelError, UsageError) as error:
        ctx.skipped("bytes", f"layers are weighed by their own outputs alone: {error}")
        return {}
    weights = {}
    for layer in found:
        groups, outputs, _ = layer.layout.matrices_shape
        parts = [seen[name] for name in names.get(layer.name, ())]
        if parts and all(part.size == groups * outputs for part in parts):
            total = np.sum(parts, axis=0)
            if np.isfinite(total).all() and total.max() > 0:
                weights[layer.name] = total
    return weights


# --- writing --------------------------------------------------------------------------


def _scaled(model: Model, layer: LinearWeight, values: Array, scale: Array) -> None:
    """Let readers have the values times a scale: a product of constants."""
    graph, name = layer.weight.graph, layer.weight.value.name or "weight"
    old = layer.weight.value
    model.set_weight(layer.weight, values)
    factor = model.add_weight(f"{name}_scale", scale, graph)
    node = model.add_node("Mul", [factor, factor], name=f"{name}_scaled", graph=graph)
    model.replace_uses(old, node.outputs[0])
    node.inputs[0] = old


def _may_be_looked_up(layer: LinearWeight) -> bool:
    """Whether rows of a large table are all that is read of a weight."""
    return layer.weight.size > SMALL_TABLE and all(
        use.role == "table"
        and len(use.layout.shape) == 2
        and int(attribute(use.node, "axis", 0)) % 2 == 0
        for use in layer.uses
    )


def _is_looked_up(model: Model, layer: LinearWeight) -> bool:
    return _may_be_looked_up(layer) and all(
        within_reach(model, layer, use) for use in layer.uses
    )


def _gathered(
    model: Model, layer: LinearWeight, use: Use, codes: Array, table: Array | None
) -> None:
    """Let a lookup gather codes and look these up in the table."""
    assert table is not None
    graph, node = home(model, use.node), use.node
    name = layer.weight.value.name or "weight"
    stored = model.add_weight(f"{name}_codes", codes, layer.weight.graph)
    book = model.add_weight(f"{name}_values", table, layer.weight.graph)

    def added(op: str, read: Sequence[gs.Tensor], **attrs: Any) -> gs.Tensor:
        made = model.add_node(op, read, attrs=attrs, name=f"{name}_{op}", graph=graph)
        return made.outputs[0]

    rows = added("Gather", [stored, node.inputs[1]], axis=0)
    rows = added("Cast", [rows], to=onnx.TensorProto.INT32)
    model.replace_uses(node.outputs[0], added("Gather", [book, rows]))
    model.remove(node, graph)
