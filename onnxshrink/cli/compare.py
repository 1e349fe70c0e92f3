"""``onnxshrink compare``: two models side by side.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import (
    PATH,
    Share,
    batch_option,
    budget_of,
    data_option,
    input_size_option,
    json_option,
    labels_option,
    metric_option,
    option,
    outputs_option,
    runtime_options,
    shapes_option,
    splits_of,
    values_option,
    verbose_option,
)
from onnxshrink.cli.screen import Screen

if TYPE_CHECKING:
    pass

_COMPARE_EXAMPLES = """\
onnxshrink compare model.onnx model-shrunk.onnx
onnxshrink compare a.onnx b.onnx --data test.npz --labels labels
onnxshrink compare a.onnx b.onnx --data test.npz --min-agreement 99% --json
"""


@click.command("compare", cls=Command, examples=_COMPARE_EXAMPLES)
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@data_option
@labels_option
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
    section="Checks",
    help="Fail if the task metric of B is worse by more.",
)
@option(
    "--min-agreement",
    type=Share(),
    metavar="X",
    section="Checks",
    help="Fail if fewer samples have the same top class.",
)
@option(
    "--min-sqnr",
    type=Share(),
    metavar="DB",
    section="Checks",
    help="Fail if the signal-to-noise ratio of an output is lower.",
)
@runtime_options
@json_option
@verbose_option
def compare_(
    a: Path,
    b: Path,
    data: str | None,
    labels: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    values: tuple[tuple[str, tuple[float, ...]], ...],
    batch: int | None,
    max_input_bytes: int,
    metric: str | None,
    outputs: tuple[str, ...],
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
    verbose: bool,
) -> int:
    """Compare what two models give, their size and their latency.

    A is the reference. The exit code is 1 if inputs or outputs differ, or if a check
    that was asked for fails.
    """
    from onnxshrink.model import Model
    from onnxshrink.reporting.comparison import compare
    from onnxshrink.reporting.report import dump

    screen = Screen.open(quiet=False, verbose=verbose)
    with screen.bar("loading") as bar:
        reference = Model.load(a)
        other = Model.load(b)
        found = compare(
            reference,
            other,
            lambda: splits_of(
                reference,
                None,
                data,
                labels,
                shapes,
                seed,
                max_input_bytes,
                values,
                batch,
            ),
            budget=budget_of(max_drop, min_agreement, min_sqnr),
            metric=metric,
            outputs=outputs,
            providers=providers or ("CPUExecutionProvider",),
            threads=threads,
            seed=seed,
            progress=bar,
        )
    if as_json:
        screen.text(dump(found.to_json()))
    else:
        found.render(screen.out)
    return 0 if found.ok else 1
