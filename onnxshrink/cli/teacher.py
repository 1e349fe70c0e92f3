"""``onnxshrink teacher``: store what a model answers.

Tested in tests/training/test_teacher.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import (
    PATH,
    data_option,
    labels_option,
    machine_options,
    option,
    verbose_option,
)
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import UsageError
from onnxshrink.files import keep_apart, made_folders

if TYPE_CHECKING:
    pass

_TEACHER_EXAMPLES = """\
onnxshrink teacher big.onnx --data photos.npz -o logits.npz
onnxshrink teacher big.onnx --data photos.npz -o logits.npz --half --keep logits
onnxshrink teacher language.onnx --data text.npz -o logits.npz --top-k 64
onnxshrink teacher big.onnx --data photos.npz -o logits.npz --tensor 'block*_out'
onnxshrink small.onnx --data photos.npz --passes prune distill:teacher=logits.npz
"""


@click.command("teacher", cls=Command, examples=_TEACHER_EXAMPLES)
@click.argument("model", type=PATH)
@data_option
@labels_option
@option(
    "-o",
    "--output",
    "target",
    type=PATH,
    metavar="FILE.npz",
    required=True,
    help="Where the answers go.",
)
@option(
    "--keep",
    "names",
    metavar="NAME",
    multiple=True,
    help="Output to keep. Repeat it for more. [default: every output of floats]",
)
@option(
    "--tensor",
    "tensors",
    metavar="NAME",
    multiple=True,
    help="Value inside of the model to keep as well, for distill:match=NAME; a glob "
    "pattern stands for several. Repeat it for more.",
)
@option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="Keep only the K largest scores of an output that has more, and the mass of "
    "all others together: for large vocabularies.",
)
@option("--half", is_flag=True, help="Store float16: half the bytes.")
@machine_options
@verbose_option
def teacher_(
    model: Path,
    data: str | None,
    labels: str | None,
    target: Path,
    names: tuple[str, ...],
    tensors: tuple[str, ...],
    top_k: int | None,
    half: bool,
    providers: tuple[str, ...],
    threads: int,
    verbose: bool,
) -> None:
    """Write what a model answers to data, for distill:teacher=FILE.npz.

    The file holds one row for each sample, in the order of the data, and checksums of
    the samples and the model. Memory does not grow with the number of samples.
    """
    import numpy as np

    from onnxshrink.model import Model
    from onnxshrink.samples import Samples
    from onnxshrink.samples.sources import split_path
    from onnxshrink.training.teacher import write

    if data is None:
        raise UsageError("a teacher needs samples to answer; add --data")
    keep_apart(target, {"the model": model, "the data": split_path(data)[0]})
    screen = Screen.open(quiet=False, verbose=verbose)
    with made_folders(target.parent), screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        samples = Samples.from_path(data, labels).bind(loaded.inputs)
        shapes = write(
            target,
            loaded,
            samples,
            names=names,
            tensors=tensors,
            top_k=top_k or 0,
            dtype=np.float16 if half else None,
            threads=threads,
            providers=providers or ("CPUExecutionProvider",),
            progress=bar,
        )
    for name, shape in shapes.items():
        screen.text(f"{name}: {' x '.join(map(str, shape))}")
    screen.text(f"wrote {target} ({target.stat().st_size:,} bytes)")
