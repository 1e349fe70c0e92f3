"""Pipeline: text, TOML and Python say the same, and only UsageError comes out."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxshrink.base import Context, Pass, Promise
from onnxshrink.errors import UsageError
from onnxshrink.pipeline import Pipeline


class Scope(Enum):
    LOCAL = "local"
    GLOBAL = "global"


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    name: ClassVar[str] = "fold"
    promise: ClassVar[Promise] = Promise.SAME

    def apply(self, model: object, ctx: Context) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prune(Fold):
    name: ClassVar[str] = "prune"
    renamed: ClassVar[Mapping[str, str]] = {"max_zeros": "sparsity=SHARE"}

    sparsity: float = 0.5
    scope: Scope = Scope.LOCAL
    kind: Literal["magnitude", "wanda", 4, None] = "magnitude"
    bits: int = 8
    biases: bool = False
    min_size: int | Literal["auto"] = "auto"
    label: str | None = None
    table: Path | None = None
    code: int | str = 0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ("head",)
    levels: tuple[int | None, ...] = ()
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise UsageError(f"sparsity must be from 0 to 1, not {self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class Quantize(Fold):
    name: ClassVar[str] = "quantize"

    weights: str
    scale: Any = None


PASSES: dict[str, type[Pass]] = {"fold": Fold, "prune": Prune, "quantize": Quantize}


def parse(*text: str) -> Pipeline:
    return Pipeline.parse(text, PASSES)


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text)
    return str(caught.value)


def test_key_value_belongs_to_the_step_before_it() -> None:
    assert parse("prune:sparsity=0.8,scope=global,quantize:weights=int8") == Pipeline(
        (Prune(sparsity=0.8, scope=Scope.GLOBAL), Quantize(weights="int8"))
    )


@pytest.mark.parametrize(
    "text",
    [
        "fold,prune:bits=4",
        "fold prune bits=4",
        " fold,\n prune ,bits=4,",
        "fold,prune,bits=4",
    ],
)
def test_steps_and_options_are_separated_by_commas_or_spaces(text: str) -> None:
    assert parse(text) == Pipeline((Fold(), Prune(bits=4)))


def test_several_texts_are_read_one_after_the_other() -> None:
    assert parse("fold", "prune:bits=4") == parse("fold,prune:bits=4")


def test_a_repeated_key_builds_a_tuple() -> None:
    assert parse("prune:only=a,only=b").passes == (Prune(only=("a", "b")),)


def test_a_single_value_may_not_be_repeated() -> None:
    assert "bits is given twice" in refusal("prune:bits=4,bits=8")


def test_values_hold_colons_slashes_dots_and_at_signs() -> None:
    value = "user@host:/a/b.c=d"
    assert parse(f"prune:label={value}").passes == (Prune(label=value),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("biases=yes", Prune(biases=True)),
        ("biases=0", Prune()),
        ("sparsity=80%", Prune(sparsity=0.8)),
        ("scope=GLOBAL", Prune(scope=Scope.GLOBAL)),
        ("kind=4", Prune(kind=4)),
        ("kind=none", Prune(kind=None)),
        ("min-size=100", Prune(min_size=100)),
        ("min_size=auto", Prune()),
        ("label=none", Prune(label=None)),
        ("label=%6Eone", Prune(label="none")),
        ("label=a%2Cb%20c", Prune(label="a,b c")),
        ("table=a/b", Prune(table=Path("a/b"))),
        ("skip=none", Prune(skip=())),
        ("skip=", Prune(skip=("",))),
        ("code=8", Prune(code=8)),
        ("code=%38", Prune(code="8")),
        ("block=4,block=1", Prune(block=(4, 1))),
        ("levels=1,levels=none", Prune(levels=(1, None))),
    ],
)
def test_types_come_from_the_annotations(text: str, expected: Prune) -> None:
    assert parse("prune:" + text).passes == (expected,)


def test_only_options_off_their_default_are_printed() -> None:
    text = "fold,prune:sparsity=0.8,only=a%2Cb,only=c"
    assert str(Pipeline((Fold(), Prune(sparsity=0.8, only=("a,b", "c"))))) == text


def test_carets_stand_under_the_token() -> None:
    assert refusal("fold,prune:sparsty=0.8").splitlines()[-2:] == [
        "  fold,prune:sparsty=0.8",
        "             ^^^^^^^",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prnue", "no pass 'prnue'; there are fold, prune, quantize. Did you mean 'pr"),
        (
            "prune:sparsty=1",
            "prune has no option sparsty; it has sparsity, scope, kind",
        ),
        ("prune:sparsty=1", "Did you mean 'sparsity'?"),
        ("fold:x=1", "fold has no option x; it has none."),
        (
            "prune:max-zeros=1",
            "prune has no option max-zeros any more; write sparsity=SHARE",
        ),
        ("bits=3", "'bits=3' is an option, and no pass stands before it"),
        (
            "prune:biases",
            "'biases' after prune: is not key=value; for a switch write b",
        ),
        ("prune:", "'' after prune: is not key=value"),
        ("=3", "'=3' is neither a pass nor key=value"),
        ("prune:bits=x", "prune: bits takes int, not 'x'"),
        ("prune:sparsity=nan", "prune: sparsity takes float, not 'nan'"),
        ("prune:sparsity=1e999", "prune: sparsity takes float, not '1e999'"),
        ("prune:sparsity=2", "prune: sparsity must be from 0 to 1, not 2.0"),
        (
            "prune:scope=globl",
            "takes local|global, not 'globl'. Did you mean 'global'?",
        ),
        ("prune:min_size=x", "min_size takes auto|int, not 'x'"),
        ("prune:block=1", "block is given 1 times, and takes 2 values"),
        ("quantize:weights=%FF", "weights is not UTF-8 text"),
        ("quantize", "quantize needs weights"),
        ("quantize:weights=a,scale=3", "scale is a Any, which has no text"),
    ],
)
def test_errors_name_the_token_and_what_would_have_worked(
    text: str, message: str
) -> None:
    assert message in refusal(text)


def test_long_text_is_shown_around_the_token() -> None:
    message = refusal(",".join(["fold"] * 1000) + ",prun," + ",".join(["fold"] * 1000))
    *_, shown, carets = message.splitlines()
    assert len(shown) < 100
    assert shown[carets.index("^") : carets.index("^") + 4] == "prun"


@pytest.mark.parametrize(
    "step",
    [
        Prune(only=["a"]),  # type: ignore[arg-type] # the mistake that is tested
        Prune(bits=10**5000),
        Prune(bits=True),
        Prune(biases="yes"),  # type: ignore[arg-type]
        Prune(label="\ud800"),
        Quantize(weights="a", scale=print),
        "prune",
    ],
)
def test_a_value_that_cannot_be_written_down_is_refused(step: Any) -> None:
    with pytest.raises(UsageError):
        Pipeline((step,))


texts = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.text(string.punctuation + " \n"),
    st.sampled_from(["none", "true", "8", "0.5", "auto", "4", "%2C", "%", "é"]),
)
paths = texts.filter(lambda text: "\0" not in text).map(Path)
prunes = st.builds(
    Prune,
    sparsity=st.floats(0, 1) | st.integers(0, 1),
    scope=st.sampled_from(Scope),
    kind=st.sampled_from(["magnitude", "wanda", 4, None]),
    bits=st.integers(),
    biases=st.booleans(),
    min_size=st.integers() | st.just("auto"),
    label=st.none() | texts,
    table=st.none() | paths,
    code=st.integers() | texts.filter(bool),
    only=st.lists(texts).map(tuple),
    skip=st.lists(texts).map(tuple),
    levels=st.lists(st.integers() | st.none(), min_size=2).map(tuple),
    block=st.tuples(st.integers(), st.integers()),
)
steps = st.one_of(st.just(Fold()), prunes, st.builds(Quantize, weights=texts))
pipelines = st.lists(steps, max_size=4).map(lambda found: Pipeline(tuple(found)))


@given(pipelines)
def test_text_reads_back_as_the_same_pipeline(pipeline: Pipeline) -> None:
    assert parse(str(pipeline)) == pipeline


@given(pipeline=pipelines)
def test_toml_reads_back_as_the_same_pipeline(
    pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(pipeline.to_toml(), encoding="utf-8", newline="")
    assert Pipeline.from_toml(path, PASSES) == pipeline


words = st.sampled_from(
    ["fold", "prune", "quantize", ":", "=", ",", " ", "bits", "sparsity", "scope", "%"]
)
garbage = st.lists(words | st.text(max_size=3)).map("".join)


@given(garbage | st.text())
@example("prune:sparsity=" + "9" * 5000)
@example("prune:bits=" + "9" * 5000)
@example("\ud800=\ud800,prune:label=\ud800")
def test_text_is_a_pipeline_or_a_usage_error(text: str) -> None:
    try:
        pipeline = parse(text)
    except UsageError:
        return
    assert parse(str(pipeline)) == pipeline


@given(content=st.binary() | garbage.map(lambda text: text.encode("utf-8", "replace")))
@example(content=b"[" * 100_000)
@example(content=b"pass = " + b"[" * 100_000)
@example(content=b"a = " + b"9" * 5000)
@example(content=b'[[pass]]\nname = "prune"\nbits = 0x' + b"f" * 50_000)
@example(content=b'[[pass]]\nname = "prune"\nsparsity = 0x' + b"f" * 50_000)
@example(content=b"[budget]\nmax_drop = 0x" + b"f" * 50_000)
def test_a_file_is_a_recipe_or_a_usage_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.toml"
    path.write_bytes(content)
    try:
        Pipeline.from_toml(path, PASSES)
    except UsageError:
        return


def recipe(folder: Path, text: str) -> Pipeline:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return Pipeline.from_toml(path, PASSES)


def test_a_recipe_holds_passes_a_description_and_a_budget(tmp_path: Path) -> None:
    text = """\
description = "what it is for"

[budget]
max_drop = 0.1

[[pass]]
name = "fold"

[[pass]]
name = "prune"
sparsity = 0.8
only = ["a,b", "none"]
"""
    pipeline = recipe(tmp_path, text)
    assert pipeline.passes == (Fold(), Prune(sparsity=0.8, only=("a,b", "none")))
    assert pipeline.description == "what it is for"
    assert pipeline.budget == {"max_drop": 0.1}
    assert pipeline.to_toml() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pas = 1",
            "'pas' is unknown at the top; there are description, budget, pass.",
        ),
        ("pass = 1", "each pass must be a table of its own: [[pass]]"),
        ("[[pass]]", 'number 1 needs name = "..."'),
        ("[[pass]]\nname='prnue'", "Did you mean 'prune'?"),
        ("[[pass]]\nname='prune'\nbit=1", "Did you mean 'bits'?"),
        ("[[pass]]\nname='prune'\nbits='4'", "bits takes int, not '4'"),
        ("[[pass]]\nname='prune'\nbits=true", "bits takes int, not True"),
        ("[[pass]]\nname='prune'\nsparsity=nan", "sparsity takes float, not 'nan'"),
        ("[[pass]]\nname='prune'\nbiases=1", "biases takes true|false, not 1"),
        ("[budget]\nmax_dorp=1", "Did you mean 'max_drop'?"),
        ("[budget]\nmax_drop='a'", "max_drop of the budget must be a finite number"),
        ("description = 1", "description must be a string"),
        ("a = \n", "at line 1"),
    ],
)
def test_a_faulty_recipe_is_refused_with_its_path(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(tmp_path, text)
    assert message in str(caught.value)
    assert "recipe.toml" in str(caught.value)


def test_a_recipe_that_is_missing_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Pipeline.from_toml(tmp_path / "absent.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(UsageError, match="larger than"):
        Pipeline.from_toml(tmp_path / "huge.toml")
