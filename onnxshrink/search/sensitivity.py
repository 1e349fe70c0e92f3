"""How much each layer alone moves the model's own output when it becomes coarse.

One layer at a time is changed, the model runs on the same few samples, and its outputs
are compared with the untouched model's. Nothing is derived from weights or activations:
a layer that hurts is one whose change shows at the end. Ranking by measured damage is
what back-off does with the sites of a pass, and it is the same function here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from onnxshrink.base import Context, Promise, SitePass
from onnxshrink.errors import UsageError
from onnxshrink.model import Model
from onnxshrink.pipeline import Pipeline
from onnxshrink.samples import Samples
from onnxshrink.search.backoff import rank as rank_by
from onnxshrink.solvers.rounding import decode, fit, nearest
from onnxshrink.structure.layers import LinearWeight, find
from onnxshrink.terminal import clean, middle, size_text, table
from onnxshrink.validation import Budget, Validator, Verdict

__all__ = ["Effect", "Sensitivity", "of_pass", "of_weights", "rank", "rounded"]

SAMPLES = 32
"""Samples in each measurement, unless it is said otherwise."""
MOST = 128
"""Most places measured one by one; of more, neighbours share a measurement."""


@dataclass(frozen=True)
class Effect:
    """What changing one place does to the outputs.

    Attributes:
        where: The weight, node or site.
        kind: Operator type, or kind of the site.
        bytes_saved: Estimate of the bytes the change saves.
        damage: Noise-to-signal amplitude ratio of the worst float output, and where
            there is none, the share of values or classes that change; infinite if the
            model breaks.
        sqnr_db: The same in dB; ``None`` if outputs stayed exact, or none is float.
        agreement: Least share of samples with the same top class, or of equal values;
            ``None`` where no output has classes.
    """

    where: str
    kind: str
    bytes_saved: int
    damage: float
    sqnr_db: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The places of a model, those that hurt most first.

    Attributes:
        change: What was done at each, in words.
        samples: How many samples were compared.
        random: Whether they were random: then the order is a guess.
        effects: One for each place.
        together: All places at once; ``None`` if there is none.
        skipped: Places that were not measured, and why.
    """

    change: str
    samples: int
    random: bool
    effects: tuple[Effect, ...]
    together: Effect | None
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON can hold; infinite damage is null."""
        data = dataclasses.asdict(self)
        for effect in [*data["effects"], data["together"] or {}]:
            if math.isinf(effect.get("damage", 0.0)):
                effect["damage"] = None
        return data

    def render(self, console: Console, *, top: int = 15) -> None:
        """Print the ``top`` places that hurt most; 0 prints all."""
        console.print(
            f"Sensitivity: {clean(self.change)}, one place at a time, on "
            f"{self.samples} {'random ' if self.random else ''}samples"
            + (" (a smoke test: give --data)" if self.random else ""),
            soft_wrap=True,
        )
        made = table(["place", "kind", "saves", "SQNR dB", "agreement"], left=(0, 1))
        for effect in self.effects[: top or None]:
            made.add_row(*_row(effect))
        if self.together is not None:
            made.add_section()
            made.add_row(*_row(self.together))
        console.print(made)
        hidden = len(self.effects) - (top or len(self.effects))
        if hidden > 0:
            console.print(f"{hidden} more hurt less; --top 0 shows them")
        for where, why in self.skipped[: top or None]:
            console.print(f"not measured: {clean(where)}: {clean(why)}")


def _row(effect: Effect) -> list[str]:
    broken = math.isinf(effect.damage)
    sqnr = "exact" if effect.damage == 0 else "-"
    if effect.sqnr_db is not None:
        sqnr = f"{effect.sqnr_db:.1f}"
    agreement = "-" if effect.agreement is None else f"{effect.agreement:.1%}"
    return [
        middle(effect.where, 60),
        clean(effect.kind, 30),
        size_text(effect.bytes_saved),
        "broken" if broken else sqnr,
        agreement,
    ]


# --- measuring --------------------------------------------------------------------

_BATCH = 4
"""Samples in a run: every measurement opens a session, whose memory is new each time,
and pages of it cost more than larger batches save."""
Place = tuple[str, str, int]
"""Where, kind, and bytes saved."""
Act = Callable[[Model, Sequence[int]], None]
"""Changes a copy of the model at the places of these indices."""


class _Probe:
    """Changes copies of a model and compares what they give, on a few samples."""

    def __init__(
        self, model: Model, act: Act, ctx: Context, samples: Samples | None
    ) -> None:
        chosen = ctx.samples.validation or ctx.samples.calibration
        if samples is None and chosen is not None:
            samples = chosen.take(slice(0, SAMPLES))
        if samples is None or not samples.used:
            raise UsageError(
                "sensitivity needs samples, and there are none; give --data"
            )
        self.count = samples.used
        self.verdicts: dict[int, Verdict] = {}
        self._model = model
        self._act = act
        self._ctx = ctx
        self._validator = Validator(
            model,
            dataclasses.replace(ctx.samples, evaluation=samples),
            Budget(),
            threads=ctx.threads,
            providers=ctx.providers,
            batch_size=_BATCH,
        )

    def together(self, indices: Sequence[int]) -> Verdict:
        """Change some places at once, and compare."""
        trial = self._model.copy()
        self._act(trial, indices)
        return self._validator.check(trial, Promise.CLOSE)

    def ranked(self, count: int) -> tuple[int, ...]:
        """Change each of ``count`` places alone; return them, the worst first."""

        def damage(indices: Sequence[int]) -> float:
            verdict = self.together(indices)
            self.verdicts.update(dict.fromkeys(indices, verdict))
            self._ctx.progress(len(self.verdicts), count, "sensitivity")
            return _damage(verdict)

        order, _ = rank_by(range(count), damage, MOST)
        return order


def _damage(verdict: Verdict) -> float:
    if verdict.problem in ("broken", "signature"):
        return math.inf
    if verdict.noise > 0:
        return verdict.noise
    return 1.0 - verdict.quality().get("agreement", 1.0)


def _effect(place: Place, verdict: Verdict) -> Effect:
    quality = verdict.quality()
    noise, agreement = quality.get("sqnr_db"), quality.get("agreement")
    return Effect(*place, _damage(verdict), noise, agreement)


def _measured(
    change: str,
    places: Sequence[Place],
    skipped: Sequence[tuple[str, str]],
    probe: _Probe,
    ctx: Context,
) -> Sensitivity:
    order = probe.ranked(len(places))
    effects = tuple(_effect(places[i], probe.verdicts[i]) for i in order)
    together = None
    if places:
        saved = sum(place[2] for place in places)
        verdict = probe.together(range(len(places)))
        together = _effect(("all together", "", saved), verdict)
    return Sensitivity(
        change, probe.count, ctx.samples.random, effects, together, tuple(skipped)
    )


# --- what is changed --------------------------------------------------------------


def rounded(model: Model, layer: LinearWeight, bits: int, block: int = 0) -> None:
    """Round the weights of a layer to symmetric codes, in place.

    Args:
        model: The model, or a copy of the one the layer was found in.
        layer: The layer.
        bits: 2 to 8.
        block: Inputs that share a scale; 0: each output has one.

    Raises:
        UsageError: There are no codes of so many bits.
        ModelError: A weight is not finite.
    """
    if not 2 <= bits <= 8:
        raise UsageError(f"bits is from 2 to 8, not {bits}")
    weight = model.weight(layer.name)
    top = 2 ** (bits - 1) - 1
    matrices = layer.layout.matrices(weight.read())
    rows = matrices.reshape(-1, matrices.shape[2])
    grid = fit(rows, -top, top, block=block)
    values = decode(nearest(rows, grid), grid).reshape(matrices.shape)
    model.set_weight(weight, layer.layout.array(values).astype(weight.dtype))


def rank(
    model: Model,
    layers: Sequence[LinearWeight],
    ctx: Context,
    change: Callable[[Model, LinearWeight], None] | None = None,
    *,
    bits: int = 8,
    samples: Samples | None = None,
) -> list[tuple[LinearWeight, float]]:
    """Order layers by what changing each alone does to the model's output.

    Args:
        model: The model; it is not changed.
        layers: Its layers.
        ctx: Samples, session options and progress.
        change: Makes one layer of a copy of the model coarse; by default its weights
            are rounded, as ``rounded`` does.
        bits: Of that rounding.
        samples: What to measure on; by default 32 of the samples for validation, or
            else for calibration.

    Returns:
        (layer, damage) with the most damaging first; damage as in ``Effect``.

    Raises:
        UsageError: There are no samples.
        ModelError: The model does not run on them.
    """

    def act(trial: Model, indices: Sequence[int]) -> None:
        for index in indices:
            if change is None:
                rounded(trial, layers[index], bits)
            else:
                change(trial, layers[index])

    probe = _Probe(model, act, ctx, samples)
    order = probe.ranked(len(layers))
    return [(layers[index], _damage(probe.verdicts[index])) for index in order]


def of_weights(
    model: Model,
    ctx: Context,
    *,
    bits: int = 8,
    samples: Samples | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Sensitivity:
    """Measure what rounding the weights of each layer does.

    Args:
        model: The model; it is not changed.
        ctx: Samples, session options and progress.
        bits: 2 to 8; symmetric, with a scale for each output.
        samples: What to measure on, as for ``rank``.
        only: Only these weights or nodes: names, glob patterns or op types.
        skip: Not these.

    Raises:
        UsageError: There are no samples, or no codes of so many bits.
        ModelError: The model does not run on the samples, or a weight is not finite.
    """
    everything = list(find(model, only=only, skip=skip, roles=("weight", "table")))
    layers = [layer for layer in everything if not layer.why_not]
    skipped = [(layer.name, layer.why_not) for layer in everything if layer.why_not]

    def act(trial: Model, indices: Sequence[int]) -> None:
        for index in indices:
            rounded(trial, layers[index], bits)

    places = [
        (one.name, one.kind, one.weight.nbytes - one.weight.size * bits // 8)
        for one in layers
    ]
    probe = _Probe(model, act, ctx, samples)
    return _measured(f"weights rounded to {bits} bits", places, skipped, probe, ctx)


def of_pass(
    pass_: SitePass, model: Model, ctx: Context, *, samples: Samples | None = None
) -> Sensitivity:
    """Measure what a pass does at each of its sites.

    Args:
        pass_: The pass.
        model: The model; it is not changed.
        ctx: Samples, session options and progress; its calibration samples are the
            pass's.
        samples: What to measure on, as for ``rank``.

    Raises:
        UsageError: There are no samples, or the pass cannot work with them.
        ModelError: The model does not run on the samples.
    """
    prepared = model.copy()
    prepared.require_opset(pass_.opset)
    sites = list(pass_.sites(prepared, ctx))
    skipped = list(ctx.skips)
    quiet = dataclasses.replace(ctx, progress=_silent, done=[], skips=[])

    def act(trial: Model, indices: Sequence[int]) -> None:
        pass_.rewrite_all(trial, [sites[index] for index in indices], quiet)

    places = [(site.where, site.kind, site.savings.bytes) for site in sites]
    probe = _Probe(prepared, act, ctx, samples)
    return _measured(str(Pipeline((pass_,))), places, skipped, probe, ctx)


def _silent(done: int, total: int, what: str) -> None:
    """Discard the progress of one trial among many."""
