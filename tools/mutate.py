"""Mutation check: which small changes of a file do its tests not notice?

    python tools/mutate.py onnxshrink/search/backoff.py
    python tools/mutate.py passes/prune.py -t tests/passes/test_prune.py --most 40

A change is a comparison turned round or made strict, a term dropped, a sum made a
difference, a whole number off by one, a condition negated, or a statement left out.
Each is made in a copy of the tree, whose tests then run until the first failure. What
passes all of them is printed: it wants a test, or is the same program. The changes are
drawn with a seed; the file itself is never touched.

Tested in tests/tools/test_mutate.py.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
}
_SECONDS = 600


@dataclass(frozen=True)
class Mutation:
    """One change: bytes ``start`` to ``stop`` of the file become ``text``."""

    line: int
    start: int
    stop: int
    text: str
    what: str

    def applied(self, source: bytes) -> bytes:
        """Return the file with the change."""
        return source[: self.start] + self.text.encode() + source[self.stop :]


def mutations(source: bytes) -> list[Mutation]:
    """Return every change of a file that is still a program, in order."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, text, what in _changes(tree, source.decode()):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        made = Mutation(node.lineno, start, stop, text, what)
        try:
            ast.parse(made.applied(source))
        except SyntaxError:
            continue
        found.append(made)
    return sorted(found, key=lambda one: (one.start, one.stop, one.text))


def _changes(
    tree: ast.Module, source: str
) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    def words(node: ast.AST) -> str:
        return f"({ast.get_source_segment(source, node)})"

    idle = _of_types_and_texts(tree)
    for node in ast.walk(tree):
        if node in idle:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            sign = _COMPARISONS[type(node.ops[0])]
            left, right = words(node.left), words(node.comparators[0])
            yield node, f"({left} {sign} {right})", f"comparison is {sign}"
        elif isinstance(node, ast.BinOp):
            left, right = words(node.left), words(node.right)
            if isinstance(node.op, (ast.Add, ast.Sub)):
                yield node, left, "second term dropped"
            if type(node.op) in _ARITHMETIC:
                sign = _ARITHMETIC[type(node.op)]
                yield node, f"({left} {sign} {right})", f"operator is {sign}"
        elif isinstance(node, ast.BoolOp):
            sign = "or" if isinstance(node.op, ast.And) else "and"
            parts = [words(value) for value in node.values]
            yield node, f"({f' {sign} '.join(parts)})", f"operator is {sign}"
            yield node, f"({f' {sign} '.join(parts[:1])})", "only the first condition"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, words(node.operand), "not dropped"
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node.test, f"(not {words(node.test)})", "condition negated"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, str(node.value + 1), "whole number off by one"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, str(not node.value), "truth turned round"
        elif isinstance(node, (ast.AugAssign, ast.Continue, ast.Break)):
            yield node, "pass", "statement left out"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "pass", "call left out"


def _of_types_and_texts(tree: ast.Module) -> set[ast.AST]:
    """Return what no run looks at: annotations, docstrings, what is raised in words."""
    idle: set[ast.AST] = set()
    for node in ast.walk(tree):
        inside: list[ast.AST | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            inside.append(node.annotation)
        elif isinstance(node, ast.Raise):
            inside.append(node.exc)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            inside.append(node)
        for part in inside:
            if part is not None:
                idle.update(ast.walk(part))
    return idle


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def tests_of(path: Path) -> list[str]:
    """Return the test file of a module, or those that its docstring names."""
    place = path.relative_to(ROOT)
    parts = place.parts[1:] if place.parts[0] == "onnxshrink" else place.parts
    own = Path("tests", *parts[:-1], f"test_{place.name}")
    if (ROOT / own).is_file():
        return [str(own)]
    words = (ast.get_docstring(ast.parse(path.read_bytes())) or "").split()
    named = [word.strip(".,()") for word in words if word.startswith("tests/")]
    return [name for name in named if (ROOT / name).exists()]


def copied(folder: Path) -> Path:
    """Copy what the tests need to a folder; return the copy's root."""
    skipped = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", "out", "build"
    )
    return Path(shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=skipped))


def passes(tree: Path, tests: list[str], seconds: float = _SECONDS) -> bool:
    """Whether the tests of a copy pass; a change that never ends is noticed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(words: list[str] | None = None) -> int:
    """Run the check; return 1 if a change survived."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Exit code 1: a change survived. 2: the check could not be made.",
    )
    parser.add_argument("file", type=Path, help="module to change")
    parser.add_argument(
        "-t", "--tests", nargs="+", help="what pytest runs; by default the module's own"
    )
    parser.add_argument("--most", type=int, default=25, help="changes tried at most")
    parser.add_argument("--seed", type=int, default=0, help="which of them are drawn")
    options = parser.parse_args(words)
    path = options.file.resolve()
    if not path.is_file() or not path.is_relative_to(ROOT):
        print(f"mutate: {options.file} is no file of this project", file=sys.stderr)
        return 2
    tests = options.tests or tests_of(path)
    if not tests:
        print(f"mutate: no tests are known for {path.name}; give -t", file=sys.stderr)
        return 2
    source = path.read_bytes()
    found = mutations(source)
    drawn = random.Random(options.seed).sample(found, min(options.most, len(found)))
    survivors = []
    with tempfile.TemporaryDirectory(prefix="onnxshrink-mutate-") as folder:
        tree = copied(Path(folder))
        target = tree / path.relative_to(ROOT)
        if not passes(tree, tests):
            print("mutate: the tests fail as they are", file=sys.stderr)
            return 2
        for number, one in enumerate(sorted(drawn, key=lambda m: m.start), 1):
            target.write_bytes(one.applied(source))
            survived = passes(tree, tests)
            word = "SURVIVED" if survived else "noticed"
            print(f"{number}/{len(drawn)} {path.name}:{one.line} {one.what}: {word}")
            if survived:
                survivors.append(one)
        target.write_bytes(source)
    print(f"{len(drawn)} of {len(found)} changes tried, {len(survivors)} survived")
    for one in survivors:
        was = source[one.start : one.stop].decode()
        print(f"  {path.relative_to(ROOT)}:{one.line}: {one.what}: {was}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
