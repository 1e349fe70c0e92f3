"""``onnxshrink MODEL``: run passes and write a smaller model.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxshrink.cli.commands import BARE, Bare, Option
from onnxshrink.cli.group import words
from onnxshrink.cli.options import (
    PATH,
    Share,
    Size,
    batch_option,
    budget_of,
    data_option,
    input_size_option,
    labels_option,
    metric_option,
    option,
    outputs_option,
    runtime_options,
    shapes_option,
    splits_of,
    values_option,
)
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import ModelError, OutputError, UsageError
from onnxshrink.files import keep_apart, made_folders

if TYPE_CHECKING:
    from onnxshrink.pipeline import Pipeline
    from onnxshrink.reporting.report import Step

DEFAULT_PASSES = "fold"
"""What runs where nobody says which passes: safe for every model."""

_SHRINK_EXAMPLES = """\
onnxshrink model.onnx
onnxshrink model.onnx --passes fold,prune:sparsity=0.8 --data samples.npz -o small.onnx
onnxshrink model.onnx --passes fold prune:sparsity=0.9,scope=global \\
    --data train.npz --labels labels --max-drop 0.1 --report run.json
onnxshrink model.onnx --recipe mine.toml --plan
onnxshrink exported/ --passes quantize:activations=none,weights=int4 -o smaller/
"""


@click.command(
    BARE,
    cls=Bare,
    hidden=True,
    options_metavar="[OPTIONS]",
    examples=_SHRINK_EXAMPLES,
    no_args_is_help=True,
)
@click.argument("model", type=PATH)
@option(
    "--passes",
    metavar="TEXT",
    multiple=True,
    section="Passes",
    help="Passes and their options: fold,prune:sparsity=0.8,scope=global. Several "
    f"words are read one after the other. [default: {DEFAULT_PASSES}]",
)
@option(
    "--recipe",
    metavar="NAME|FILE.toml",
    section="Passes",
    help="Passes from a recipe: a file, or one that ships (see: onnxshrink passes).",
)
@option(
    "--target",
    "target_name",
    metavar="NAME",
    section="Passes",
    help="Processor to write for: vnni, avx2, arm, any. [default: this machine's]",
)
@option(
    "--plan", is_flag=True, section="Passes", help="Say what would be done; do nothing."
)
@data_option
@labels_option
@option(
    "--eval",
    "evaluation",
    metavar="FILE|DIR",
    section="Samples",
    help="Samples that measure and do nothing else. [default: 40 % of the data]",
)
@shapes_option
@values_option
@batch_option
@input_size_option
@metric_option
@outputs_option
@option(
    "--max-drop",
    type=Share(),
    metavar="X",
    section="Budget",
    help="Most that the task metric may get worse, in its own unit: 0.1 is a tenth "
    "of a point of top1. [default: 1 with labels]",
)
@option(
    "--min-agreement",
    type=Share(),
    metavar="X",
    section="Budget",
    help="Least share of samples with the same top class as before: 0.99 or 99%. "
    "[default: 98% without labels]",
)
@option(
    "--min-sqnr",
    type=Share(),
    metavar="DB",
    section="Budget",
    help="Least signal-to-noise ratio of every output, in dB.",
)
@option(
    "--max-latency",
    type=Share(),
    metavar="X",
    section="Budget",
    help="Most time of a run, in multiples of the model's as it came; noisy below 1.1.",
)
@option(
    "--max-bytes",
    type=Size(),
    metavar="N",
    section="Budget",
    help="Most bytes of all that is written, such as 300kB: codebook without bits "
    "divides them among layers, and nothing larger is written.",
)
@option(
    "--on-breach",
    type=click.Choice(["back-off", "rollback", "abort", "keep"]),
    default="back-off",
    show_default=True,
    section="Budget",
    help="When a pass breaks the budget: leave out its most damaging places, go on "
    "without it, stop, or keep it.",
)
@option(
    "-o",
    "--output",
    type=PATH,
    metavar="OUT",
    section="Output",
    help="Where to write: a file, a package (.onnxz), or a folder for a file of the "
    "same name. "
    "[default: MODEL-shrunk.onnx beside MODEL]",
)
@option(
    "--storage",
    type=click.Choice(["auto", "plain", "tiny"]),
    default="auto",
    show_default=True,
    section="Output",
    help="How weights are written: in the smallest exact encoding, or plain; tiny is "
    "for a package, with coders that decode slowly.",
)
@option(
    "--names",
    type=click.Choice(["keep", "short"]),
    default="keep",
    show_default=True,
    section="Output",
    help="Names inside the model: as they are, or as short as can be, without a record "
    "of the run. Inputs and outputs keep theirs.",
)
@option(
    "--external",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    show_default=True,
    section="Output",
    help="Whether weights go into a second file: as they came, or where one is too "
    "small.",
)
@option(
    "--max-decode-ratio",
    type=float,
    metavar="X",
    section="Output",
    help="Write a weight plain if decoding it at load takes more than X times its "
    "bytes.  [default: 10]",
)
@option(
    "--report",
    "reports",
    type=PATH,
    multiple=True,
    metavar="FILE",
    section="Output",
    help="Write a report: .json, .md or .html. Can be repeated.",
)
@option(
    "--resume",
    is_flag=True,
    section="Output",
    help="Continue an interrupted run after its last accepted pass.",
)
@runtime_options
@option(
    "--jobs",
    type=click.IntRange(0, 1024),
    default=0,
    metavar="N",
    section="Running",
    help="Threads that passes share work among; 0 is one for each processor.",
)
@option(
    "--executor",
    metavar="WHERE",
    default="threads",
    show_default=True,
    section="Running",
    help="Who does the work that passes share: threads, processes, or dask:ADDRESS of "
    "a scheduler whose workers have onnxshrink and see the model's files.",
)
@option(
    "--measure",
    type=click.Choice(["latency,memory", "latency", "memory", "none"]),
    default="latency,memory",
    show_default=True,
    section="Running",
    help="What is measured of the model that came in and the one that is written. "
    "Between passes, latency is measured only under --max-latency.",
)
@option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    section="Running",
    help="Most time that onnxruntime may take to open a model or to run it on one "
    "batch; a pass whose model takes longer is rolled back. [default: 300]",
)
@option(
    "--memory-limit",
    type=Size(),
    metavar="BYTES",
    section="Running",
    help="Most memory of the process that runs the models, such as 2GB; a pass whose "
    "model needs more is rolled back.",
)
@option(
    "--max-model-bytes",
    type=Size(),
    default=32 * 10**9,
    metavar="SIZE",
    section="Running",
    help="Most bytes of weights that are worked on.  [default: 32GB]",
)
@option("-q", "--quiet", is_flag=True, section="Running", help="Print only errors.")
@option(
    "-v",
    "--verbose",
    is_flag=True,
    section="Running",
    help="Print what every pass did and left alone.",
)
@option(
    "-h",
    "--help",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    section="Running",
    help="Show this page.",
    callback=lambda ctx, param, value: _show_page(ctx) if value else None,
)
@click.version_option(
    package_name="onnxshrink",
    message="%(prog)s %(version)s",
    cls=Option,
    section="Running",
    help="Show the version.",
)
def shrink(
    model: Path,
    passes: tuple[str, ...],
    recipe: str | None,
    target_name: str | None,
    plan: bool,
    data: str | None,
    labels: str | None,
    evaluation: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    values: tuple[tuple[str, tuple[float, ...]], ...],
    batch: int | None,
    max_input_bytes: int,
    metric: str | None,
    outputs: tuple[str, ...],
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    max_latency: float | None,
    max_bytes: int | None,
    on_breach: Any,
    output: Path | None,
    storage: Any,
    names: Any,
    max_decode_ratio: float | None,
    external: Any,
    reports: tuple[Path, ...],
    resume: bool,
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    jobs: int,
    executor: str,
    measure: str,
    time_limit: float | None,
    memory_limit: int | None,
    max_model_bytes: int,
    quiet: bool,
    verbose: bool,
) -> int:
    """Make an ONNX model smaller, checked with onnxruntime after every pass.

    A pass that does not stay within the budget is weakened or left out. The output is
    an ordinary ONNX file that any runtime opens; the input is never changed. A folder
    is taken whole: every .onnx file in it is shrunk, the rest is copied.
    """
    if passes and recipe is not None:
        raise click.UsageError("give either --passes or --recipe, not both")
    if quiet and verbose:
        raise click.UsageError("give either -q or -v, not both")
    if max_latency is not None and "latency" not in measure:
        raise click.UsageError("--max-latency needs --measure latency")
    if not model.name:
        raise UsageError(f"{str(model)!r} names no file; give a model")
    if str(model) in words() and not model.is_file():
        raise UsageError(
            f"{model} does not exist; as a command it must come first: "
            f"onnxshrink {model} ..."
        )
    if model.is_dir() and not plan:
        return _shrink_folder(model, output, reports, resume=resume)
    pipeline = _pipeline(passes, recipe)
    if target_name is not None:
        pipeline = pipeline.with_target(target_name)
    target = model
    if not plan:
        target = _target(model, output)
        given = _given(pipeline, model, data, evaluation, recipe, metric)
        keep_apart(target, given)
        for report in reports:
            _check_report(report, model, target)
            keep_apart(report, given)

    from onnxshrink.manager import PassManager
    from onnxshrink.model import Model
    from onnxshrink.reporting.plan import render_plan
    from onnxshrink.reporting.report import step_line

    screen = Screen.open(quiet=quiet, verbose=verbose)
    accepted = []

    def on_step(step: Step) -> None:
        accepted.append(step.accepted)
        screen.text(step_line(step), err=True)

    with screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        manager = PassManager(
            pipeline,
            splits=splits_of(
                loaded,
                data,
                evaluation,
                labels,
                shapes,
                seed,
                max_input_bytes,
                values,
                batch,
                trains=pipeline.trains,
            ),
            budget=budget_of(max_drop, min_agreement, min_sqnr, max_latency, max_bytes),
            metric=metric,
            outputs=outputs,
            on_breach=on_breach,
            storage=storage,
            names=names,
            max_decode_ratio=max_decode_ratio,
            external=external,
            providers=providers or ("CPUExecutionProvider",),
            threads=threads,
            seed=seed,
            jobs=jobs,
            executor=executor,
            shapes=dict(shapes),
            values=dict(values),
            batch=batch,
            progress=bar,
            on_step=on_step,
            measure_latency="latency" in measure,
            measure_memory="memory" in measure,
            time_limit=time_limit,
            memory_limit=memory_limit,
            max_model_bytes=max_model_bytes,
            command=shlex.join(["onnxshrink", *sys.argv[1:]]),
        )
        if plan:
            planned = manager.plan(loaded)
        else:
            try:
                result = manager.run(loaded, target, resume=resume)
            except (KeyboardInterrupt, SystemExit):
                if any(accepted):
                    hint = "the same command with --resume continues from here"
                    screen.text(hint, err=True)
                raise
    if plan:
        render_plan(screen.out, str(pipeline), planned, verbose=verbose)
        return 0
    result.report.render(screen.out, verbose=verbose)
    if verbose:
        for line in result.model.lineage.words(result.model.value_names()):
            screen.text(f"lineage: {line}")
    for path in reports:
        try:
            with made_folders(path.parent):
                result.report.write(path)
        except OutputError as error:
            raise OutputError(
                f"{error}; the model was written to {result.files[0]}"
            ) from error
    steps = result.report.steps
    return 3 if steps and not any(step.accepted for step in steps) else 0


def _shrink_folder(
    folder: Path, output: Path | None, reports: Sequence[Path], *, resume: bool
) -> int:
    """Run the same command for each model of a folder."""
    from onnxshrink.cli.folder import shrink_folder

    if reports or resume:
        raise UsageError("--report and --resume are for one model, not a folder")
    context = click.get_current_context()

    def one(model: Path, target: Path) -> int:
        given = {**context.params, "model": model, "output": target}
        return int(context.invoke(context.command, **given) or 0)

    return shrink_folder(folder, output, one)


def _show_page(ctx: click.Context) -> None:
    group = ctx.parent.command if ctx.parent is not None else ctx.command
    click.echo(group.get_help(ctx.parent or ctx))
    ctx.exit()


def _pipeline(passes: Sequence[str], recipe: str | None) -> Pipeline:
    from onnxshrink import registry
    from onnxshrink.pipeline import Pipeline

    try:
        if recipe is not None:
            pipeline = Pipeline.from_toml(registry.recipe(recipe))
        else:
            pipeline = Pipeline.parse(list(passes) or DEFAULT_PASSES)
    except UsageError as error:
        error.exit_code = 2
        raise
    if not pipeline.passes:
        raise UsageError("there is no pass to run; name one, such as --passes fold")
    return pipeline


def _given(
    pipeline: Pipeline,
    model: Path,
    data: str | None,
    evaluation: str | None,
    recipe: str | None,
    metric: str | None,
) -> dict[str, Path | None]:
    """Return all files that are read, by what to call them."""
    from onnxshrink.samples.sources import split_path

    given: dict[str, Path | None] = {"the input itself": model}
    for what, text in (("the data", data), ("the evaluation data", evaluation)):
        if text is not None and not text.startswith("synthetic"):
            with suppress(ModelError):  # said when it is read
                given[what] = split_path(text)[0]
    given["the recipe"] = None if recipe is None else Path(recipe)
    if metric is not None and ":" in metric:
        given["the metric"] = Path(metric.rpartition(":")[0])
    for pass_ in pipeline:
        for name, value in pass_.options().items():
            if isinstance(value, Path):
                given[f"the {name} of {pass_.name}"] = value
    return given


def _target(model: Path, output: Path | None) -> Path:
    """Return the file to write; refuse now what would fail at the end."""
    if output is None:
        output = model.with_name(f"{model.stem or model.name}-shrunk.onnx")
    elif output.is_dir():
        output = output / model.with_suffix(".onnx").name
    _check_folder(output)
    return output


def _check_report(path: Path, model: Path, target: Path) -> None:
    from onnxshrink.reporting.report import SUFFIXES

    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"a report is written by its suffix, and {path} has none of "
            f"{', '.join(SUFFIXES)}"
        )
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    _check_folder(path)
    if path.resolve() in (model.resolve(), target.resolve()):
        raise OutputError(f"cannot write the report to {path}: it is a model")


def _check_folder(path: Path) -> None:
    """Refuse a file whose folder cannot be made or written to."""
    at = path.parent
    while not at.exists() and at != at.parent:
        at = at.parent
    if not at.is_dir():
        raise OutputError(
            f"cannot make the folder {path.parent} of {path.name}: {at} is a file"
        )
    if not os.access(at, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {path}: no permission to write to {at}; choose another place"
        )
