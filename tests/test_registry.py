"""The registry: built-in passes, passes of other packages, recipes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxshrink import registry
from onnxshrink.base import Promise
from onnxshrink.errors import UsageError
from onnxshrink.pipeline import Pipeline

Install = Callable[..., None]

PASS = '''\
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxshrink.base import Context, Promise, SitePass


@dataclass(frozen=True, kw_only=True)
class Round(SitePass):
    """Round each weight to a few bits.

    Large weights only.

    Attributes:
        bits: Bits that stay,
            sign included.
        mode: Which way to round.
    """

    name: ClassVar[str] = "round"
    promise: ClassVar[Promise] = Promise.CLOSE
    example: ClassVar[str] = "round:bits=4"

    bits: int = 8
    mode: Literal["even", "up"] = "even"

    def sites(self, model, ctx):
        return ()

    def rewrite(self, model, site, ctx):
        raise AssertionError
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a package with a pass where Python finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, source: str, entry: str) -> None:
        (tmp_path / f"{package}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[{registry.GROUP}]\n{entry}\n", encoding="utf-8"
        )
        importlib.invalidate_caches()
        # The same module name may hold another source in the next test.
        monkeypatch.delitem(sys.modules, package, raising=False)

    return put


def refusal(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        registry.get(name)
    return str(caught.value)


def built_in_passes() -> list[str]:
    root = Path(__file__).parent.parent / "passes"
    return sorted(path.stem for path in root.glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("name", built_in_passes())
def test_a_built_in_pass_bears_the_name_of_its_file(name: str) -> None:
    cls = registry.get(name)
    assert cls.name == name
    assert cls.__module__ == f"onnxshrink.passes.{name}"


@pytest.mark.parametrize("name", built_in_passes())
def test_a_built_in_pass_documents_itself(name: str) -> None:
    described = registry.describe(registry.get(name))
    assert described.origin == "built-in"
    assert described.summary.endswith(".")
    undocumented = [option.name for option in described.options if not option.doc]
    assert undocumented == []
    # The example parses, and shows the pass it belongs to.
    assert name in [step.name for step in Pipeline.parse(described.example)]


def test_built_in_passes_are_listed_and_none_is_broken() -> None:
    assert list(registry.passes())[: len(built_in_passes())] == built_in_passes()
    assert registry.broken() == {}


def test_only_the_pass_asked_for_is_imported(install: Install) -> None:
    install("loud", "raise SystemExit('imported')", "loud = loud:Loud")
    with pytest.raises(UsageError, match="no pass 'lowd'"):
        registry.get("lowd")


def test_an_unknown_pass_gets_the_nearest_name(install: Install) -> None:
    install("rounding", PASS, "round = rounding:Round")
    assert "no pass 'ruond'; there are " in refusal("ruond")
    assert "Did you mean 'round'?" in refusal("ruond")


def test_a_pass_of_another_package_is_found_and_parsed(install: Install) -> None:
    install("rounding", PASS, "round = rounding:Round")
    cls = registry.get("round")
    assert "round" in registry.passes()
    assert Pipeline.parse("round:bits=4,skip=head").passes == (
        cls(bits=4, skip=("head",)),  # type: ignore[call-arg] # its own options
    )


def test_a_description_tells_options_with_types_defaults_and_meaning(
    install: Install,
) -> None:
    install("rounding", PASS, "round = rounding:Round")
    described = registry.describe(registry.get("round"))
    assert described.summary == "Round each weight to a few bits."
    assert described.text == "Large weights only."
    assert described.promise is Promise.CLOSE
    assert described.example == "round:bits=4"
    assert described.origin == "rounding 1.2"
    rows = {o.name: (o.type, o.default_text, o.doc) for o in described.options}
    assert rows["bits"] == ("int", "8", "Bits that stay, sign included.")
    assert rows["mode"] == ("even|up", "even", "Which way to round.")
    assert rows["skip"][:2] == ("text ...", "none")
    assert rows["skip"][2].startswith("Leave these weights")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import absent_module", "does not load: ModuleNotFoundError: No module named"),
        ("def", "does not load: SyntaxError"),
        ("1 / 0", "does not load: ZeroDivisionError"),
        ("raise SystemExit", "does not load: SystemExit"),
        ("Other = 1", "does not load: AttributeError"),
        ("Round = 3", "is not a subclass of onnxshrink.Pass"),
        (PASS.replace('"round"', '"ruond"'), "calls itself 'ruond'"),
        (PASS.replace("def rewrite", "def rewritten"), "lacks rewrite"),
        (PASS.replace("Promise.CLOSE", '"close"'), "states no promise"),
        (
            PASS.replace("@dataclass(frozen=True, kw_only=True)", ""),
            "is not decorated with @dataclass(frozen=True, kw_only=True)",
        ),
    ],
)
def test_a_broken_package_is_named_and_harms_no_other_pass(
    install: Install, source: str, message: str
) -> None:
    install("broken_one", source, "round = broken_one:Round")
    assert message in refusal("round")
    assert "broken_one 1.2" in refusal("round")
    assert list(registry.passes()) == built_in_passes()
    assert list(registry.broken()) == ["round"]


def test_two_packages_that_claim_one_name_are_both_named(install: Install) -> None:
    install("rounding", PASS, "round = rounding:Round")
    install("second", PASS, "round = second:Round")
    assert refusal("round") == (
        "pass 'round' is claimed by rounding 1.2 and second 1.2; uninstall one"
    )


@pytest.mark.parametrize("name", built_in_passes())
def test_a_package_that_claims_a_built_in_name_is_named(
    install: Install, name: str
) -> None:
    install("rounding", PASS.replace('"round"', repr(name)), f"{name} = rounding:Round")
    assert "is claimed by onnxshrink and rounding 1.2" in refusal(name)


@pytest.mark.parametrize("name", registry.recipes())
def test_a_shipped_recipe_reads_and_says_what_it_is_for(name: str) -> None:
    pipeline = Pipeline.from_toml(registry.recipe(name))
    assert len(pipeline) > 0
    assert pipeline.description.endswith(".")


def test_a_recipe_is_found_by_name_or_path(tmp_path: Path) -> None:
    assert registry.recipe("lossless") == registry.recipes()["lossless"]
    assert registry.recipe("mine.toml") == Path("mine.toml")
    assert registry.recipe(str(tmp_path / "mine")) == tmp_path / "mine"


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'lossless'"):
        registry.recipe("losless")


SHARES = ("keep", "bytes", "macs", "latency")
NUMBERS = ("bits", "values", "edge")


@pytest.mark.parametrize("name", registry.passes())
def test_amounts_have_one_vocabulary(name: str) -> None:
    """A share of what came in is a fraction; what is absolute is a whole number."""
    for option in registry.describe(registry.get(name)).options:
        kinds = set(option.type.split("|")) - {"none"}
        if option.name in SHARES:
            assert kinds == {"float"}, option
        if option.name in NUMBERS:
            assert kinds == {"int"}, option


@pytest.mark.parametrize("name", registry.passes())
def test_an_option_that_went_is_answered_with_one_there_is(name: str) -> None:
    found = registry.get(name)
    known = {option.name for option in registry.describe(found).options}
    for old, now in found.renamed.items():
        assert old not in known
        assert now.partition("=")[0] in known
