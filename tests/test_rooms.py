"""The rooms of the house stand in an order, and each imports from those below only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "onnxshrink"
PASSES = Path(__file__).parents[1] / "passes"

ORDER = (
    ("_version", "errors", "terminal"),
    ("files",),
    ("tensors",),
    ("storage",),
    ("package",),
    ("lineage",),
    ("model",),
    ("runtime",),
    ("isolation",),
    ("samples",),
    ("statistics",),
    ("structure",),
    ("solvers",),
    ("base", "options"),
    ("activations",),
    ("rewriting",),
    ("quantization",),
    ("measuring",),
    ("training",),
    ("passes", "recipes"),
    ("registry", "pipeline"),
    ("validation",),
    ("reporting",),
    ("search",),
    ("engine", "executors", "manager", "state"),
    ("cli", "testing", "__main__"),
)
"""From the ground up; rooms on one floor may import from each other."""

FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def modules() -> list[tuple[str, Path]]:
    """(room, file) of every module."""
    found = [("passes", path) for path in sorted(PASSES.glob("*.py"))]
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] == "passes" or place.name == place.parts[0] == "__init__.py":
            continue  # the link; and the public names, which are of every room
        found.append((place.parts[0].removesuffix(".py"), path))
    return found


def rooms_imported(path: Path) -> set[str]:
    """Rooms that a module imports from, anywhere in it, for type checking included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] != "onnxshrink":
                continue
            rooms |= {parts[1]} if parts[1:] else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            rooms |= {
                parts[1] for parts in names if parts[0] == "onnxshrink" if parts[1:]
            }
    return {"_version" if room == "__version__" else room for room in rooms}


MODULES = modules()


@pytest.mark.parametrize(
    ("room", "path"), MODULES, ids=[f"{room}/{path.stem}" for room, path in MODULES]
)
def test_a_module_imports_from_rooms_below_its_own(room: str, path: Path) -> None:
    above = {
        other
        for other in rooms_imported(path)
        if other != room and FLOOR[other] > FLOOR[room]
    }
    assert not above, f"{path.name} in {room} imports from {sorted(above)} above it"


def test_every_room_has_its_place_and_a_line_in_the_guide() -> None:
    guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in {room for room, _ in MODULES} - {"_version", "__main__"}:
        assert room in FLOOR
        assert f"{room}/`" in guide or f"{room}.py`" in guide, room


def test_solvers_know_no_model() -> None:
    for room, path in MODULES:
        if room == "solvers":
            assert rooms_imported(path) <= {"errors", "solvers"}, path.name


def defines(path: Path) -> bool:
    """Whether a module has functions or classes of its own."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, kinds) for node in body)


def test_a_module_has_a_test_file_of_its_name_or_says_where_it_is_tested() -> None:
    root = PACKAGE.parent
    silent, wrong = [], []
    for path in [*PACKAGE.rglob("*.py"), *PASSES.glob("*.py")]:
        place = path.relative_to(root if path.parent == PASSES else PACKAGE)
        if (place.parts[0] == "passes") != (path.parent == PASSES):
            continue  # seen through the link
        own = root / "tests" / place.parent / f"test_{place.name}"
        if own.exists() or not defines(path):
            continue
        words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        named = re.findall(r"tests/\S+\.py", words.partition("Tested in ")[2])
        if not named:
            silent.append(f"{place}: neither {own.relative_to(root)} nor 'Tested in'")
        wrong += [f"{place}: {name}" for name in named if not (root / name).exists()]
    assert not silent, "end the docstring with 'Tested in tests/....py.'"
    assert not wrong
