"""The command line: ``onnxshrink MODEL ...`` and the words beside it.

Results go to stdout, everything else to stderr. Exit codes: 0 written (or shown), 1 a
user's error or a broken promise, 2 a command line that cannot be read, 130 interrupted.
"""

from __future__ import annotations

from onnxshrink.cli.compare import compare_
from onnxshrink.cli.group import main
from onnxshrink.cli.inspect import inspect_
from onnxshrink.cli.pack import pack_
from onnxshrink.cli.passes import passes_
from onnxshrink.cli.shrink import shrink
from onnxshrink.cli.teacher import teacher_
from onnxshrink.cli.unpack import unpack_

__all__ = ["main"]

for _command in (  # as the help lists
    shrink,
    passes_,
    inspect_,
    compare_,
    teacher_,
    pack_,
    unpack_,
):
    main.add_command(_command)
