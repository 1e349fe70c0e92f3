"""``onnxshrink unpack``: the model that a package was made of.

Tested in tests/package/test_models.py.
"""

from __future__ import annotations

from pathlib import Path

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import PATH, option
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import OutputError, UsageError

_UNPACK_EXAMPLES = """\
onnxshrink unpack model.onnxz
onnxshrink unpack model.onnxz -o copy.onnx
"""


@click.command("unpack", cls=Command, examples=_UNPACK_EXAMPLES)
@click.argument("package", type=PATH)
@option(
    "-o",
    "--output",
    "target",
    type=PATH,
    metavar="FILE.onnx",
    help="Where to write. [default: PACKAGE.onnx beside PACKAGE]",
)
def unpack_(package: Path, target: Path | None) -> None:
    """Write the model in a package as an ordinary file, byte for byte as it was.

    External data goes beside it, by the names that the model knows it by; data of the
    same name that belongs to another model is never overwritten.
    """
    from onnxshrink.errors import ModelError
    from onnxshrink.package import SUFFIX, Package, unpack

    if not package.is_file():
        raise ModelError(f"{package} does not exist or is not a file")
    screen = Screen.open(quiet=False, verbose=False)
    if target is None:
        target = package.with_name(f"{package.stem or package.name}.onnx")
    elif target.is_dir():
        target = target / f"{package.stem or package.name}.onnx"
    if target.suffix == SUFFIX:
        raise UsageError(f"{target} is called like a package; name a .onnx file")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: there is no folder {target.parent}")
    if target.resolve() == package.resolve():
        raise OutputError(f"cannot write {target}: it is the input")
    with screen.bar(f"unpacking {package.name}"):
        files = unpack(Package(package), target)
    for file in files:
        screen.text(f"wrote {file} ({file.stat().st_size:,} bytes)")
