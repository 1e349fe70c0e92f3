"""``onnxshrink pack``: one entropy-coded file of a model.

Tested in tests/package/test_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import PATH, option
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import UsageError

_PACK_EXAMPLES = """\
onnxshrink pack model.onnx
onnxshrink pack model.onnx -o small.onnxz
onnxshrink pack pruned.onnx -o small.onnxz --storage plain --tiny
onnxshrink model.onnx --passes fold,prune:sparsity=0.9 --data samples.npz -o small.onnxz
"""


@click.command("pack", cls=Command, examples=_PACK_EXAMPLES)
@click.argument("model", type=PATH)
@option(
    "-o",
    "--output",
    "target",
    type=PATH,
    metavar="FILE.onnxz",
    help="Where to write. [default: MODEL.onnxz beside MODEL]",
)
@option(
    "--storage",
    type=click.Choice(["keep", "plain"]),
    default="keep",
    show_default=True,
    help="Keep the file byte for byte; or undo encodings in the graph first, which is "
    "smaller and loads faster: the weights are the same, bit for bit.",
)
@option(
    "--tiny",
    is_flag=True,
    help="Try coders that take microseconds a weight to decode as well.",
)
def pack_(
    model: Path, target: Path | None, storage: Literal["keep", "plain"], tiny: bool
) -> None:
    """Write a model as a package: smaller, lossless, and onnxshrink opens it.

    Every tensor is coded by what suits it best, external data comes along. A package
    goes wherever a model goes here; ``unpack`` gives the ordinary file back.
    """
    from onnxshrink.model import Model
    from onnxshrink.package import SUFFIX, is_package, pack_file
    from onnxshrink.runtime import file_bytes

    screen = Screen.open(quiet=False, verbose=False)
    if target is None:
        target = model.with_name(f"{model.stem or model.name}{SUFFIX}")
    elif target.is_dir():
        target = target / f"{model.stem or model.name}{SUFFIX}"
    if target.suffix != SUFFIX:
        raise UsageError(f"a package is called *{SUFFIX}, and {target} is not")
    if model.is_file() and is_package(model):
        raise UsageError(f"{model} is a package already")
    with screen.bar(f"packing {model.name}"):
        loaded = Model.load(model)
        if storage == "plain" or model.suffix == ".onnxtxt":
            loaded.save(target, storage="tiny" if tiny else "plain")
        else:
            loaded.write_beside(target, pack_file(model, tiny=tiny))
    before, after = file_bytes(model), target.stat().st_size
    screen.text(f"wrote {target}: {before:,} -> {after:,} bytes ({after / before:.1%})")
