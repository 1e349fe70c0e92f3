"""``onnxshrink inspect``: where the bytes are, and what could be saved.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import (
    PATH,
    batch_option,
    check_shapes,
    data_option,
    json_option,
    option,
    runtime_options,
    shapes_option,
    splits_of,
    values_option,
    verbose_option,
)
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import UsageError

if TYPE_CHECKING:
    from onnxshrink.base import Context
    from onnxshrink.measuring.timings import Kernels
    from onnxshrink.model import Model
    from onnxshrink.search.sensitivity import Sensitivity

_INSPECT_EXAMPLES = """\
onnxshrink inspect model.onnx
onnxshrink inspect model.onnx --top 50
onnxshrink inspect model.onnx --json | jq .weights[0]
onnxshrink inspect model.onnx --sensitivity --bits 4 --data photos.npz
onnxshrink inspect model.onnx --sensitivity --by half:mode=compute --data photos.npz
"""


@click.command("inspect", cls=Command, examples=_INSPECT_EXAMPLES)
@click.argument("model", type=PATH)
@option(
    "--top",
    type=click.IntRange(0),
    default=15,
    show_default=True,
    metavar="N",
    help="Rows of each table; 0 shows all.",
)
@option(
    "--sensitivity",
    is_flag=True,
    section="Sensitivity",
    help="Make one layer after the other coarse, and rank them by what that does to "
    "the outputs.",
)
@option(
    "--bits",
    type=click.IntRange(2, 8),
    metavar="N",
    section="Sensitivity",
    help="Round weights to so many bits, with a scale for each output.  [default: 8]",
)
@option(
    "--by",
    metavar="STEP",
    section="Sensitivity",
    help="Do what a pass does instead: quantize:weights=int4, half:mode=compute.",
)
@option(
    "--samples",
    "count",
    type=click.IntRange(1),
    metavar="N",
    section="Sensitivity",
    help="Samples in each measurement.  [default: 32]",
)
@option(
    "--kernels",
    is_flag=True,
    section="Sensitivity",
    help="Time each kind of layer in integers and in float on this processor; what was "
    "timed once is remembered.",
)
@data_option
@shapes_option
@values_option
@batch_option
@runtime_options
@json_option
@verbose_option
def inspect_(
    model: Path,
    top: int,
    kernels: bool,
    sensitivity: bool,
    bits: int | None,
    by: str | None,
    count: int | None,
    data: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    values: tuple[tuple[str, tuple[float, ...]], ...],
    batch: int | None,
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show where the bytes and multiply-accumulates of a model are.

    For every weight: type, zeros, distinct values, and what its smallest exact
    encoding would take. --sensitivity also ranks layers by what coarse weights in them
    do to the outputs; --kernels shows which layers are faster in integers.
    """
    from onnxshrink.engine import make_context
    from onnxshrink.model import Model
    from onnxshrink.reporting.inventory import inventory
    from onnxshrink.reporting.report import dump

    asked = {"--bits": bits, "--by": by, "--samples": count}
    for name, value in asked.items():
        if value is not None and not sensitivity:
            raise UsageError(f"{name} is for --sensitivity; add that")
    if data is not None and not (sensitivity or kernels):
        raise UsageError("--data is for --sensitivity or --kernels; add one of them")
    if bits is not None and by is not None:
        raise UsageError("--bits rounds weights and --by runs a pass; take one of them")
    screen = Screen.open(quiet=False, verbose=verbose)
    parts: dict[str, Sensitivity | Kernels] = {}
    with screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        check_shapes(loaded, shapes)
        if sensitivity or kernels:
            # Only a pass needs samples of its own to calibrate with.
            shared, held = (None, data) if by is None else (data, None)
            given = () if data is not None else shapes
            context = make_context(
                samples=splits_of(
                    loaded,
                    shared,
                    held,
                    None,
                    given,
                    seed,
                    values=values,
                    batch=batch,
                ),
                reference=loaded,
                seed=seed,
                threads=threads,
                providers=providers or ("CPUExecutionProvider",),
                progress=bar,
            )
            if sensitivity:
                parts["sensitivity"] = _effects(loaded, context, bits, by, count)
            if kernels:
                parts["kernels"] = _kernels(loaded, context)
        found = inventory(loaded, shapes=dict(shapes), progress=bar)
    if as_json:
        extra = {name: part.to_json() for name, part in parts.items()}
        screen.text(dump(found.to_json() | extra))
        return
    found.render(screen.out, top=top)
    for part in parts.values():
        part.render(screen.out, top=top)


def _kernels(model: Model, ctx: Context) -> Kernels:
    """Time the layers on one sample, in the integer types of this processor."""
    from onnxshrink.measuring.timings import Timings
    from onnxshrink.quantization.processors import resolve

    samples = ctx.samples.evaluation
    assert samples is not None
    timings = Timings(threads=ctx.threads, providers=ctx.providers)
    feed = samples.read(range(samples.batch or 1))
    return timings.layers(model, feed, resolve("auto")[0], progress=ctx.progress)


def _effects(
    model: Model, ctx: Context, bits: int | None, by: str | None, count: int | None
) -> Sensitivity:
    """Measure sensitivity on the samples held out from what calibrates a pass."""
    from onnxshrink.base import SitePass
    from onnxshrink.pipeline import Pipeline
    from onnxshrink.search.sensitivity import SAMPLES, of_pass, of_weights

    held = ctx.samples.evaluation
    samples = None if held is None else held.take(slice(0, count or SAMPLES))
    if by is None:
        return of_weights(model, ctx, bits=bits or 8, samples=samples)
    passes = Pipeline.parse(by).passes
    if len(passes) != 1 or not isinstance(passes[0], SitePass):
        raise UsageError(f"--by takes one pass that acts at sites, not {by!r}")
    return of_pass(passes[0], model, ctx, samples=samples)
