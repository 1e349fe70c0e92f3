"""quantize: weights and activations as integer codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxshrink import base
from onnxshrink.activations.gathering import fingerprint, values_digest
from onnxshrink.base import Context, Promise, Savings, Site, SitePass
from onnxshrink.errors import ModelError, UsageError
from onnxshrink.measuring.costs import LayerCosts
from onnxshrink.model import Model
from onnxshrink.passes.fold import fold_first
from onnxshrink.quantization import (
    correction,
    dynamic,
    inputs,
    placement,
    processors,
    smoothing,
    static,
    tying,
    weightonly,
)
from onnxshrink.quantization.calibration import Method
from onnxshrink.quantization.coding import Coding, CodingTask, code_weights
from onnxshrink.quantization.inputs import Seen
from onnxshrink.quantization.placement import Planner
from onnxshrink.quantization.processors import Processor
from onnxshrink.quantization.schemes import MIN_OPSET, Scheme, limits
from onnxshrink.quantization.smoothing import Smoothed
from onnxshrink.quantization.static import Recipe
from onnxshrink.solvers.rounding import Grid
from onnxshrink.statistics import Range
from onnxshrink.structure import gains, layers
from onnxshrink.structure.layers import LinearWeight

__all__ = ["Quantize"]

Form = Literal["static", "dynamic", "none"]
_KERNELS: Mapping[Form, base.Form] = {
    "static": "static",
    "dynamic": "dynamic",
    "none": "codes",
}
"""How the forms compute, in the words of ``ctx.costs``."""
_T = onnx.TensorProto

_QUANTIZED = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QuantizeLinear",
    }
)
"""Operators that only a quantized model has, besides QLinearConv and its like."""
_TYPES = {
    "uint8": _T.UINT8,
    "int8": _T.INT8,
    "uint16": _T.UINT16,
    "int16": _T.INT16,
}
_ROLES: tuple[layers.Role, ...] = ("weight", "table")
"""Readings of weights that become codes."""
_WIDEST = 8192
"""Inputs up to which a layer's weights are weighed by the gain of what it reads."""
_TOGETHER = 8
"""Layers that are rounded at a time."""
SMALLEST = 1024
"""Weights of fewer entries save less than the nodes around them cost."""


_MAY_OVERFLOW = frozenset(
    [
        *("Div", "Exp", "IsNaN", "IsInf", "Log", "LogSoftmax", "Pow", "ReduceMean"),
        *("Reciprocal", "Softmax", "Sqrt", "Where"),
    ]
)
"""Operators that make NaN and infinity, or show that a model knows them."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSite(Site):
    """A weight to store as codes.

    Attributes:
        form: What becomes of the activations it multiplies.
        bits: Bits of a code.
        packed: Whether codes of a weight alone stay codes at run time.
        alone: Bits of its codes if the weight alone becomes codes, which then happens
            where activations as codes cost too much; 0 if that cannot be.
    """

    form: Form
    bits: float
    packed: bool = False
    alone: int = field(default=0, repr=False)


@dataclass(frozen=True, kw_only=True)
class Quantize(SitePass):
    """Store weights as integer codes, and compute with codes where that is faster.

    Each layer gets one of three forms. static: activations are codes too, with scales
    found on calibration data; convolutions and everything around them run in integers.
    dynamic: the scale of a MatMul's activations is found at each run. none: the weight
    alone becomes codes, and is decoded before it is used. Left to itself the pass takes
    static for Conv and Gemm and dynamic for MatMul where there is data, and codes for
    weights alone where there is none. The model is folded first: BatchNormalization and
    Pad between layers would keep them from running in integers. When the result breaks
    the budget, the layers that do most damage stay as they were (mixed precision).

    Attributes:
        activations: static, dynamic or none; auto chooses for each layer.
        activation_type: Codes of activations in the static form: uint8, int8, uint16
            or int16 (16 bits are computed in float, and the way there and back takes
            longer than the layer does: 2.8 to 5 times fp32 for EfficientNet-Lite0); a
            layer that hurts is left in float instead; auto: what is fast on the target.
        weights: Codes of weights: int8, uint8, int4, int2, ternary (-1, 0, 1) or binary
            (-1, 1); auto: int8. Layers whose form is dynamic always have int8.
        granularity: What shares a scale: the whole tensor, each channel, or blocks of
            a row (weights alone); auto: each channel.
        block: Values in a block, 16 to 256.
        zero_points: Whether rows or blocks have zero points of their own; auto: where
            codes have four bits or two.
        form: What becomes of codes of weights alone. packed: MatMul multiplies codes
            (MatMulNBits), which takes a quarter of float's memory or less and is fast
            for one token; decoded: at load, fast for many rows; auto: packed from
            4 million weights of 4 bits on, and from 262,144 where samples have no more
            than two rows.
        accuracy: Of packed products: 4 rounds activations to int8, 1 multiplies floats;
            written as com.microsoft's MatMulNBits. 0: standard ONNX, and the session
            decides (onnxruntime: 4).
        calibration: How ranges of activations are found: minmax, moving-average,
            percentile, entropy or mse; auto: mse.
        percentile: Percent of the values within the range, for that method.
        rounding: How weights are rounded: nearest; mse or hqq (scales that lose least);
            learned (scales that lose least at the outputs); gptq; adaround; auto: gptq
            with data, mse without.
        bias_correction: Whether biases take up the shift of the mean in the static
            form; auto: yes.
        equalize: What is moved between neighbours first: cross-layer (ranges of weights
            of two layers), smooth (large activations into weights, SmoothQuant), awq
            (weights that large activations multiply); auto: smooth where the form is
            dynamic and there is data.
        target: The processor: any, avx2 (x86 without VNNI), vnni, arm, gpu; auto: this
            machine's. One that is not any is said in the last lines.
        allow_random: Calibrate with random inputs where there is no data.
        cache: Folder to keep what calibration saw in, which a later run of the same
            model and samples reads; nothing is kept if it is not given.
    """

    name: ClassVar[str] = "quantize"
    promise: ClassVar[Promise] = Promise.CLOSE
    gradual: ClassVar[bool] = False
    example: ClassVar[str] = "quantize:activations=none,weights=int4"
    opset: ClassVar[int] = 13

    activations: Literal["auto", "static", "dynamic", "none"] = "auto"
    activation_type: Literal["auto", "uint8", "int8", "uint16", "int16"] = "auto"
    weights: Literal["auto", "int8", "uint8", "int4", "int2", "ternary", "binary"] = (
        "auto"
    )
    granularity: Literal["auto", "tensor", "channel", "block"] = "auto"
    block: int = 32
    zero_points: Literal["auto", "true", "false"] = "auto"
    form: Literal["auto", "packed", "decoded"] = "auto"
    accuracy: int = 0
    calibration: Literal[
        "auto", "minmax", "moving-average", "percentile", "entropy", "mse"
    ] = "auto"
    percentile: float = 99.99
    rounding: Literal[
        "auto", "nearest", "mse", "hqq", "learned", "gptq", "adaround"
    ] = "auto"
    bias_correction: Literal["auto", "true", "false"] = "auto"
    equalize: Literal["auto", "none", "cross-layer", "smooth", "awq"] = "auto"
    target: Literal["auto", "avx2", "vnni", "arm", "gpu", "any"] = "any"
    allow_random: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range and options that exclude each other."""
        if not 16 <= self.block <= 256:
            raise UsageError(f"block is from 16 to 256 values, not {self.block}")
        if not 50 < self.percentile <= 100:
            raise UsageError(
                f"percentile is above 50 and at most 100, not {self.percentile:g}"
            )
        if not 0 <= self.accuracy <= 4:
            raise UsageError(
                f"accuracy is 1 (floats) to 4 (int8), or 0, not {self.accuracy}"
            )
        weightonly.levels_of(self._weights, self._zero_points)
        if self.activations != "static":
            return
        if self.granularity == "block":
            raise UsageError(
                "integer kernels have no blocks: granularity=block goes with "
                "activations=none"
            )
        if self.weights == "binary":
            raise UsageError(
                "static weights need a code for 0: weights=ternary, or binary with "
                "activations=none"
            )

    # --- what the options come to ---------------------------------------------------

    def _has_data(self, ctx: Context) -> bool:
        """Whether ranges can be calibrated.

        Raises:
            UsageError: They have to be, and cannot.
        """
        samples = ctx.samples.calibration
        usable = samples is not None and bool(samples.used)
        random = ctx.samples.random and not self.allow_random
        if self.activations == "static" and (random or not usable):
            raise UsageError(
                "activations=static needs samples of real inputs to find the ranges of "
                "activations: give --data with more samples than measuring takes, or "
                "activations=dynamic or none, which need none; allow_random=true takes "
                "random inputs, whose ranges are those of noise"
            )
        for option, value, looks in (
            ("equalize", self.equalize, ("smooth", "awq")),
            ("rounding", self.rounding, ("learned", "gptq", "adaround")),
        ):
            if value in looks and (random or not usable):
                ctx.need_data(f"to see activations ({option}={value})")
        return usable and not random

    def _form(
        self, layer: LinearWeight, static_ok: bool, dynamic_ok: bool, data: bool
    ) -> Form:
        kind = layer.kind if layer.uses else ""
        pays = self.activations == "static" or kind in ("Conv", "Gemm")
        if self.activations == "auto" and placement.loses(layer):
            pays = False
        if self.activations in ("auto", "static") and static_ok and data and pays:
            return "static"
        wanted = self.activations == "dynamic" or (self.activations == "auto" and data)
        if wanted and dynamic_ok:
            return "dynamic"
        return "none"

    def _recipe(self, processor: Processor) -> Recipe:
        data_type = _TYPES.get(self.activation_type, processor.activation)
        low, high = limits(data_type)
        symmetric = processor.symmetric_activations
        if symmetric and low < 0:
            low += 1
        method: Method = "mse" if self.calibration == "auto" else self.calibration
        rounded = "gptq" if self.rounding == "auto" else self.rounding
        return Recipe(
            activation=Scheme(data_type, low, high, symmetric),
            weights=self._weights,
            per_channel=self.granularity != "tensor",
            method=method,
            percentile=self.percentile,
            rounding=rounded,
            bias_correction=self.bias_correction != "false",
            processor=processor,
            cache=self.cache,
        )

    # --- places ---------------------------------------------------------------------

    def sites(self, model: Model, ctx: Context) -> Sequence[Site]:
        """List the weights, each with the form it would get."""
        data = self._has_data(ctx)
        found = _quantized_already(model)
        if found:
            ctx.skipped("model", f"it is quantized already: it has {found}")
            return []
        prepared = model.copy()
        self._prepare(prepared, ctx)
        planner = Planner(prepared)
        static_ok = {one.layer.name for one in planner.linear}
        static_ok -= {name for name, _ in planner.skips}
        reasons = dict(planner.skips)
        costs = LayerCosts(prepared, ctx)
        odd = self._not_finite(prepared, ctx) if data else frozenset()
        sites = []
        for layer in layers.find(
            prepared, only=self.only, skip=self.skip, roles=_ROLES, turned=True
        ):
            is_static = layer.name in static_ok
            site = self._site(prepared, layer, is_static, data, odd, costs, ctx)
            if site is not None:
                saved = dataclasses.replace(
                    site.savings, seconds=_saved(layer, site, costs)
                )
                sites.append(dataclasses.replace(site, savings=saved))
                if self.activations == "static" and site.form != "static":
                    why = reasons.get(
                        layer.name, "it is no operator of the static form"
                    )
                    ctx.skipped(layer.name, f"activations stay float: {why}")
        if not sites:
            ctx.skipped("model", "no weight is large enough, of float32 and selected")
        return sites

    def _not_finite(self, model: Model, ctx: Context) -> frozenset[str]:
        """Return activations with NaN, infinity or fills of a mask in some sample."""
        makes = any(node.op in _MAY_OVERFLOW for node in model.nodes())
        if self.activations not in ("auto", "dynamic") or not makes:
            return frozenset()
        read = {
            use.node.inputs[0].name
            for layer in layers.find(model, only=self.only, skip=self.skip)
            if not dynamic.why_not(model, layer)
            for use in layer.uses
        }
        seen = ctx.statistics(model, {name: Range() for name in read})
        return frozenset(
            name
            for name, one in seen.items()
            if isinstance(one, Range) and one.nan + one.inf + one.fills
        )

    def _site(
        self,
        model: Model,
        layer: LinearWeight,
        static_ok: bool,
        data: bool,
        odd: Collection[str],
        costs: LayerCosts,
        ctx: Context,
    ) -> QuantizeSite | None:
        dynamic_ok = not dynamic.why_not(model, layer)
        if dynamic_ok and any(use.node.inputs[0].name in odd for use in layer.uses):
            dynamic_ok = False
            ctx.skipped(
                layer.name,
                "activations stay float: they hold NaN, infinity or values beyond "
                "1e30, which a range found at run time would follow",
            )
        if self.activations == "auto":
            dynamic_ok = dynamic_ok and dynamic.pays(layer)
        form = self._form(layer, static_ok, dynamic_ok, data)
        why = weightonly.why_not(layer) if form == "none" else ""
        if not why and form == "none" and layer.weight.size < SMALLEST:
            why = f"it has {layer.weight.size} entries; codes would save nothing"
        if why:
            ctx.skipped(layer.name, why)
            return None
        bits = _bits(self._weights_of(layer) if form != "dynamic" else "int8")
        small = weightonly.why_not(layer) or layer.weight.size < SMALLEST
        milder = form != "none" and self.activations == "auto" and not small
        saved = layer.weight.nbytes - layer.weight.size * bits // 8
        return QuantizeSite(
            layer.name,
            layer.kind,
            Savings(bytes=max(0, saved)),
            form=form,
            bits=bits,
            packed=form == "none" and self._packs(model, layer, costs, ctx),
            alone=int(_bits(self._weights_of(layer))) if milder else 0,
        )

    def weaken(self, site: Site, strength: float) -> Site | None:
        """Return the site with its activations in float, if they were to be codes."""
        assert isinstance(site, QuantizeSite)
        if strength >= 1:
            return site
        if not site.alone:
            return None
        saved = dataclasses.replace(site.savings, seconds=0.0)
        return dataclasses.replace(
            site, savings=saved, form="none", bits=site.alone, alone=0
        )

    def _packs(
        self, model: Model, layer: LinearWeight, costs: LayerCosts, ctx: Context
    ) -> bool:
        """Whether the codes of a weight alone stay codes where they are multiplied."""
        layer = weightonly.multiplied(layer)
        if self.form == "decoded" or not layer.uses:
            return False
        levels, block = self._levels_and_block(layer)
        why = weightonly.why_not_packed(layer, levels, block)
        if not all(weightonly.within_reach(model, layer, use) for use in layer.uses):
            why = why or "it is handed to a function"
        if self.form == "packed":
            if why:
                ctx.skipped(layer.name, f"decoded at load: {why}")
            return not why
        known = None if ctx.samples.random else costs.of(layer)
        rows = None if known is None else known.macs // layer.weight.size
        return not why and weightonly.packing_pays(layer, levels, rows)

    def _levels_and_block(self, layer: LinearWeight) -> tuple[weightonly.Levels, int]:
        weights = self._weights_of(layer)
        width = layer.layout.matrices_shape[2]
        wanted = self.block if self._in_blocks_of(weights) else 0
        levels = weightonly.levels_of(weights, self._zero_points)
        return levels, weightonly.block_of(width, wanted)

    def _prepare(self, model: Model, ctx: Context) -> tuple[str, ...]:
        """Fold a model, so that layers are neighbours, and tie heads to their tables.

        Returns:
            What that did.
        """

        def prepare() -> _Prepared:
            made = model.copy()
            words = [text for text in [fold_first(made, ctx)] if text]
            gone = tying.tie(made, only=self.only, skip=self.skip)
            if gone:
                words.append(
                    f"{', '.join(gone)}: a table turned, which is read instead"
                )
            return _Prepared(made, tuple(words))

        names = tuple(str(node.name) for node in model.nodes())
        chosen = (self.only, self.skip)
        key = ("quantize", "folded", fingerprint(model), model.opset, names, chosen)
        found = ctx.remember(key, prepare)
        model.become(found.model)
        return found.words

    # --- acting ---------------------------------------------------------------------

    def rewrite(self, model: Model, site: Site, ctx: Context) -> None:
        """Quantize one weight."""
        self.rewrite_all(model, [site], ctx)

    def rewrite_all(self, model: Model, sites: Sequence[Site], ctx: Context) -> None:
        """Quantize the weights of some sites, those of one form together."""
        if not sites:
            return
        for words in self._prepare(model, ctx):
            ctx.did("model", words)
        names: dict[str, list[str]] = {"static": [], "dynamic": [], "none": []}
        packed = set()
        for site in sites:
            assert isinstance(site, QuantizeSite)
            names[site.form].append(site.where)
            if site.packed:
                packed.add(site.where)
        processor, note = processors.resolve(self.target)
        if names["static"] or names["dynamic"]:
            ctx.did("model", note)
            if processor.name != "any":
                ctx.warn(f"quantized for one kind of processor: {note}")
        if self.equalize == "cross-layer":
            correction.equalize(model, ctx)
        # Attempts of a step smooth different layers of this model.
        start = fingerprint(model)
        smoothed = self._smoothed(model, names, processor, ctx)
        seen = Seen.of(start, smoothed, ctx)
        if names["dynamic"] and self._weights != "int8":
            ctx.skipped(
                "weights",
                f"{self._weights} is not for layers whose activations are coded at run "
                f"time, of which there are {len(names['dynamic'])}: MatMulInteger "
                "multiplies int8",
            )
        if names["dynamic"] and self.granularity == "block":
            ctx.skipped("granularity", "dynamic layers have a scale for each channel")
        if names["static"]:
            if ctx.samples.random:
                ctx.skipped("calibration", "random inputs: ranges are those of noise")
            recipe = self._recipe(processor)
            if recipe.activation.opset > model.opset:
                model.require_opset(MIN_OPSET[recipe.activation.data_type])
            left = static.quantize_static(model, names["static"], recipe, ctx, seen)
            for name, why in left.items():
                ctx.skipped(name, f"not static: {why}")
            names["none"] += [
                name for name in left if model.weight(name).size >= SMALLEST
            ]
        self._others(model, names, packed, processor, ctx, seen)
        model.drop_unused()
        model.forget_shapes()

    def _smoothed(
        self,
        model: Model,
        names: Mapping[str, Sequence[str]],
        processor: Processor,
        ctx: Context,
    ) -> Sequence[Smoothed]:
        """Move scales between activations and weights; return which."""
        pairs = processor.saturation != "never"
        coded = [*names["static"], *names["dynamic"]]
        if self.equalize == "smooth" and coded:
            return smoothing.smooth(model, ctx, only=coded, pairs=pairs)
        if self.equalize == "auto" and names["dynamic"] and self._has_data(ctx):
            return smoothing.smooth(model, ctx, only=names["dynamic"], pairs=pairs)
        if self.equalize == "awq" and names["none"]:
            levels = weightonly.levels_of(self._weights, self._zero_points)
            block = self.block if self._in_blocks else 0
            return smoothing.awq(model, ctx, levels, block=block, only=names["none"])
        if self.equalize in ("smooth", "awq"):
            kind = "coded" if self.equalize == "smooth" else "float"
            ctx.skipped(
                "equalize", f"{self.equalize} needs layers whose activations are {kind}"
            )
        return ()

    @property
    def _weights(self) -> str:
        """Key of ``weightonly.LEVELS``."""
        return "int8" if self.weights == "auto" else self.weights

    def _weights_of(self, layer: LinearWeight) -> str:
        """The same for one weight.

        A table that also scores has 8 bits: few cost the most there (SmolLM2-135M, 4
        bits: perplexity 2.5 higher), and one copy serves two layers.
        """
        if weightonly.is_tied(layer) and _bits(self._weights) < 8:
            return "int8"
        return self._weights

    @property
    def _zero_points(self) -> bool | None:
        return None if self.zero_points == "auto" else self.zero_points == "true"

    @property
    def _in_blocks(self) -> bool:
        """Whether blocks of a weight that is alone in codes have their own scales."""
        return self._in_blocks_of(self._weights)

    def _in_blocks_of(self, weights: str) -> bool:
        levels = weightonly.LEVELS[weights]
        few = levels.high - levels.low < 16
        return self.granularity == "block" or (self.granularity == "auto" and few)

    def _others(
        self,
        model: Model,
        names: Mapping[str, Sequence[str]],
        packed: set[str],
        processor: Processor,
        ctx: Context,
        seen: Seen,
    ) -> None:
        """Quantize weights whose activations get no scale beforehand."""
        wanted = {*names["dynamic"], *names["none"]}
        if not wanted:
            return
        packed = self._raise_opset(model, packed, ctx)
        chosen = [
            layer
            for layer in layers.find(model, roles=_ROLES, turned=True)
            if layer.name in wanted
        ]
        at_run_time = set(names["dynamic"])
        codings = {
            layer.name: self._coding(
                layer, "dynamic" if layer.name in at_run_time else "none", processor
            )
            for layer in chosen
        }
        usable = [
            layer
            for layer in chosen
            if codings[layer.name].form == "dynamic" or not weightonly.why_not(layer)
        ]
        for layer, grid, codes in self._coded(model, usable, codings, ctx, seen):
            if codings[layer.name].form == "dynamic":
                ctx.did(layer.name, dynamic.rewrite(model, layer, grid, codes))
                continue
            form: weightonly.Form = "packed" if layer.name in packed else "decoded"
            words = weightonly.rewrite(
                model, layer, grid, codes, form=form, accuracy=self.accuracy
            )
            ctx.did(layer.name, words)

    def _coding(
        self,
        layer: LinearWeight,
        form: Literal["dynamic", "none"],
        processor: Processor,
    ) -> Coding:
        """Return how a weight becomes codes."""
        weights = self._weights_of(layer)
        return Coding(
            form,
            weights,
            self.block if self._in_blocks_of(weights) else 0,
            self.granularity == "tensor",
            self.rounding,
            processor.saturation != "never",
            self._zero_points,
        )

    def _coded(
        self,
        model: Model,
        chosen: Sequence[LinearWeight],
        codings: Mapping[str, Coding],
        ctx: Context,
        seen: Seen,
    ) -> Iterator[tuple[LinearWeight, Grid, NDArray[Any]]]:
        """Yield layers with their codes; each is worked out once in a step.

        Where rounding looks at inputs, these are gathered by the first attempt of the
        step, for all that follow. What takes more room than one run may is gathered by
        each attempt: a part of the layers at a time, and the next part in the model as
        it is by then.
        """
        by_inputs = self.rounding in ("auto", "learned", "gptq", "adaround")
        wants = by_inputs and self._has_data(ctx)
        left = {layer.name: layer for layer in chosen}
        groups = list(inputs.groups(chosen)) if wants else []
        keeps = len(groups) == 1
        for group in groups:
            now = () if keeps else (fingerprint(model), ctx.samples.calibration)
            seen_as: dict[str, Hashable] = {
                layer.name: seen.of_inputs(layer.name) if keeps else now
                for layer in group
            }
            part = _LayersToCode(group, codings, ctx, seen_as)
            read, _ = inputs.input_grams(
                model,
                part.missing,
                ctx,
                seen=seen if keeps else None,
                cache=self.cache,
            )
            grams = {name: one.gram for name, one in read.items()}
            del read
            yield from part.coded(grams)
            for layer in group:
                del left[layer.name]
        yield from _LayersToCode(list(left.values()), codings, ctx).coded({})

    def _raise_opset(self, model: Model, names: set[str], ctx: Context) -> set[str]:
        """Raise the opset where matrices need it to stay packed; return these."""
        needed = model.opset
        for layer in layers.find(model, roles=_ROLES, turned=True):
            if layer.name in names:
                one = weightonly.multiplied(layer)
                levels, block = self._levels_and_block(layer)
                needed = max(needed, weightonly.opset_for(one, levels, block))
        try:
            model.require_opset(needed)
        except ModelError as error:
            ctx.skipped("model", f"matrices are decoded at load: {error}")
            return set()
        return names


class _LayersToCode:
    """Layers that are coded together, and what the step knows of their codes."""

    def __init__(
        self,
        layers: Sequence[LinearWeight],
        codings: Mapping[str, Coding],
        ctx: Context,
        seen_as: Mapping[str, Hashable] | None = None,
    ) -> None:
        """Look up what is known.

        Args:
            layers: The layers.
            codings: How they become codes, by the name of the weight.
            ctx: Memory and executor.
            seen_as: What tells their inputs from others, if rounding looks at these.
        """
        self.layers, self.codings, self.ctx = layers, codings, ctx
        self.keys: dict[str, Hashable] = {
            layer.name: (
                "quantize",
                None if seen_as is None else seen_as[layer.name],
                layer.name,
                values_digest(layer.weight.tensor),
                layer.layout,
                codings[layer.name],
            )
            for layer in layers
        }
        known = {name: ctx.memory.get(key) for name, key in self.keys.items()}
        self.known = {name: one for name, one in known.items() if one is not None}

    @staticmethod
    def _squares(layer: LinearWeight) -> NDArray[np.float64] | None:
        """How large the inputs of a matrix are, as far as a normalisation says."""
        _, _, inputs = layer.layout.matrices_shape
        if layer.is_shared or layer.groups > 1 or inputs > _WIDEST:
            return None
        if layer.kind not in ("Gemm", "MatMul") or layer.input is None:
            return None
        if layer.uses[0].input_channels != -1:
            return None
        return gains.squares_of(layer.weight.model, layer.input, inputs)

    @property
    def missing(self) -> list[LinearWeight]:
        """Layers whose codes are not known yet."""
        return [layer for layer in self.layers if layer.name not in self.known]

    def coded(
        self, grams: dict[str, NDArray[np.float64] | None]
    ) -> Iterator[tuple[LinearWeight, Grid, NDArray[Any]]]:
        """Yield each layer with its codes, some at a time.

        Args:
            grams: Of the inputs of layers that are missing; those that were used are
                taken out and make room.
        """
        for start in range(0, len(self.layers), _TOGETHER):
            some = self.layers[start : start + _TOGETHER]
            tasks = {
                layer.name: CodingTask(
                    layer.weight.tensor,
                    layer.layout,
                    self.codings[layer.name],
                    grams.pop(layer.name, None),
                    self._squares(layer),
                )
                for layer in some
                if layer.name not in self.known
            }
            alike: dict[Hashable, list[str]] = {}
            for name, task in tasks.items():
                place = name if task.gram is None else _place(task.gram)
                alike.setdefault((place, task.coding.form), []).append(name)
            parts = [tuple(tasks[name] for name in names) for names in alike.values()]
            results = self.ctx.map(code_weights, parts, "rounding")
            for names, found in zip(alike.values(), results, strict=True):
                for name, one in zip(names, found, strict=True):
                    self.known[name] = one
                    self.ctx.memory.put(self.keys[name], one)
            for layer in some:
                grid, codes = self.known.pop(layer.name)
                yield layer, grid, codes


def _place(array: NDArray[Any]) -> tuple[int, tuple[int, ...]]:
    """Return where an array's values are, which views of one matrix share."""
    return array.__array_interface__["data"][0], array.shape


def _quantized_already(model: Model) -> str:
    """Name what shows that a model was quantized before."""
    operators = {str(node.op) for node in model.nodes()}
    found = {op for op in operators if op in _QUANTIZED or op.startswith("QLinear")}
    return ", ".join(sorted(found))


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A folded model, for all attempts of a step; it is never changed.

    Attributes:
        model: The model.
        words: What folding did, and what was tied.
    """

    model: Model
    words: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that count for the memory of the step: values are shared."""
        return 1024 * sum(1 for _ in self.model.nodes())


def _saved(layer: LinearWeight, site: QuantizeSite, costs: LayerCosts) -> float | None:
    """Return the seconds saved; codes of weights alone are decoded but for MatMul."""
    if site.form == "none" and layer.kind != "MatMul":
        return 0.0
    if weightonly.is_tied(layer):
        layer = weightonly.multiplied(layer)
    before = costs.of(layer)
    after = costs.of(layer, _KERNELS[site.form], site.bits / 8)
    saved = None if before is None or after is None else (before - after).seconds
    if saved is not None and site.form == "static":
        saved += costs.conversions(layer)
    return saved


def _bits(weights: str) -> int:
    bits = {"int4": 4, "int2": 2, "ternary": 2, "binary": 1}
    return bits.get(weights, 8)
