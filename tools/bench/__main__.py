"""Run a named benchmark: ``python tools/bench NAME [arguments]``; no name lists them.

A benchmark is a module of this folder. The first line of its docstring says what it
measures, and its ``main(arguments)`` prints a table.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, Path]:
    """Return the file of each benchmark by the name one types."""
    return {
        path.stem.replace("_", "-"): path
        for path in sorted(FOLDER.glob("*.py"))
        if not path.stem.startswith("_")
    }


def summary(path: Path) -> str:
    """Return the first line of the docstring without importing the file."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that is named first and return the exit code."""
    known = benchmarks()
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__.partition("\n")[0])
        for name, path in known.items():
            print(f"  {name:18} {summary(path)}")
        return 0
    name, *rest = arguments
    if name.replace("_", "-") not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(known) or "none yet"
        print(f"no benchmark {name!r}; there are: {listed}.{hint}", file=sys.stderr)
        return 2
    # Run as a folder, Python puts the folder itself first on the path, not the root.
    sys.path[0] = str(FOLDER.parent.parent)
    module = importlib.import_module("tools.bench." + name.replace("-", "_"))
    module.main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
