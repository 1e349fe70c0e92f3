"""What is installed is what is in the tree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from onnxshrink import registry
from onnxshrink.model import Model
from onnxshrink.pipeline import Pipeline
from onnxshrink.testing import Case, apply, check_case, check_laws, example_models

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "passes" / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> str:
    """Return the first block of that language of the page on writing a pass."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return next(text for name, text in blocks if name == language)


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def packages() -> dict[str, Path]:
    """Return the folder of each package, by its dotted name."""
    found = {"onnxshrink.passes": ROOT / "passes"}
    for path in sorted((ROOT / "onnxshrink").rglob("*.py")):
        if "passes" not in path.relative_to(ROOT).parts:
            found[".".join(path.parent.relative_to(ROOT).parts)] = path.parent
    return found


def test_the_link_to_passes_is_a_link() -> None:
    link = ROOT / "onnxshrink" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "passes")


def test_every_package_is_named_to_the_build() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages())
    for folder in packages().values():
        assert (folder / "__init__.py").is_file()


def test_passes_are_imported_from_passes() -> None:
    import onnxshrink.passes

    folder = Path(next(iter(onnxshrink.passes.__path__)))
    assert folder.resolve() == (ROOT / "passes").resolve()


def test_every_import_is_a_declared_dependency() -> None:
    declared = {
        re.split(r"[<>=\[; ]", requirement)[0].lower().replace("-", "_")
        for requirement in PROJECT["project"]["dependencies"]
    }
    # protobuf is onnx's own interface, and onnx depends on it and on ml_dtypes.
    known = declared | set(sys.stdlib_module_names) | {"onnxshrink", "google"}
    known |= {"ml_dtypes"}
    known |= {
        "distributed",
        "PIL",
        "pyarrow",
    }  # of extras, imported where they are used
    found = {}
    for folder in packages().values():
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                for name in names:
                    found[name.partition(".")[0]] = path.name
    assert {name: where for name, where in found.items() if name not in known} == {}
    assert declared - set(found) == set()


def test_the_command_and_the_module_are_the_same_program() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="onnxshrink")
    assert script.value == "onnxshrink.cli:main"
    shown = subprocess.run(
        [sys.executable, "-m", "onnxshrink", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert metadata.version("onnxshrink") in shown.stdout


def build(target: Path, source: Path) -> Path:
    """Build a wheel with the setuptools that is installed; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command += ["--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def tree(target: Path) -> Path:
    """Copy what the build reads, links kept, so that it leaves nothing behind."""
    for name in ("onnxshrink", "passes"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def test_a_wheel_holds_every_module_and_recipe(tmp_path: Path) -> None:
    wheel = build(tmp_path / "dist", tree(tmp_path / "source"))
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"onnxshrink/py.typed"}
    for package, folder in packages().items():
        wanted |= {f"{package.replace('.', '/')}/{name}" for name in modules(folder)}
    wanted |= {f"onnxshrink/recipes/{p.name}" for p in registry.recipes().values()}
    assert wanted - held == set()
    # Nothing else of the tree: no tests, tools or models.
    assert {name.split("/")[0] for name in held - wanted} <= {
        "onnxshrink",
        wheel.name.split("-py3")[0] + ".dist-info",
    }


@pytest.mark.slow
def test_an_unpacked_wheel_runs_without_the_tree(tmp_path: Path) -> None:
    wheel = build(tmp_path / "dist", tree(tmp_path / "source"))
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = (
        "import onnxshrink, onnxshrink.registry as r; print(onnxshrink.__file__);"
        "print(*r.passes()); print(*r.recipes())"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[0].startswith(str(tmp_path / "installed"))
    assert shown[1].split() == list(registry.passes())
    assert shown[2].split() == list(registry.recipes())


@pytest.fixture
def example_package(tmp_path: Path) -> Path:
    """Return the source of a package with the pass of passes/README.md."""
    source = tmp_path / "source"
    (source / "your_package").mkdir(parents=True)
    (source / "your_package" / "__init__.py").touch()
    (source / "your_package" / "thin.py").write_text(fenced("python"), encoding="utf-8")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n'
        'build-backend = "setuptools.build_meta"\n\n'
        '[project]\nname = "your-package"\nversion = "1.0"\n\n' + fenced("toml"),
        encoding="utf-8",
    )
    return source


def test_a_pass_of_an_installed_package_runs_from_the_command_line(
    example_package: Path, tmp_path: Path
) -> None:
    wheel = build(tmp_path / "dist", example_package)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    model = tmp_path / "model.onnx"
    model.write_bytes(example_models()["perceptron"].SerializeToString())

    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [str(tmp_path / "installed"), *known]))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "onnxshrink", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "thin" in run("passes")
    assert "Columns of the first factor" in run("passes", "thin")
    run("model.onnx", "--passes", "thin:rank=2,skip=fc2_weight", "-o", "out.onnx")
    before, after = Model.load(model), Model.load(tmp_path / "out.onnx")
    assert {2, 16} == set(after.weight("fc1_weight").shape)
    kept = before.weight("fc2_weight").read() == after.weight("fc2_weight").read()
    assert kept.all()


@pytest.fixture
def thin(example_package: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.syspath_prepend(example_package)
    monkeypatch.delitem(sys.modules, "your_package", raising=False)
    from your_package.thin import Thin

    found: type = Thin
    return found


def test_the_example_pass_does_what_its_page_says(thin: type, tmp_path: Path) -> None:
    path = tmp_path / "case.onnxtxt"
    path.write_text(fenced(""), encoding="utf-8")
    assert Case.read(path).pipeline == "thin:rank=1"
    check_case(path, {"thin": thin})


@pytest.mark.parametrize("name", example_models())
def test_the_example_pass_keeps_the_laws(thin: type, name: str) -> None:
    check_laws(thin, {name: example_models()[name]})


def test_pipelines_take_the_example_pass(thin: type) -> None:
    pipeline = Pipeline.parse("thin:rank=1", {"thin": thin})
    model = Model.load(example_models()["perceptron"])
    _, context = apply(pipeline.passes[0], model)
    assert ("fc1_weight", "a product of rank 1") in context.done
