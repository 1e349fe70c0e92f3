"""The golden cases: ``tests/cases/<pass>/<claim>.onnxtxt``."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxshrink.errors import UsageError
from onnxshrink.pipeline import Pipeline
from onnxshrink.testing import Case, check_case

FOLDER = Path(__file__).parent / "cases"
CASES = sorted(FOLDER.rglob("*.onnxtxt"))

MODEL = """\
<ir_version: 8, opset_import: ["" : 17]>
example (float[N,2] x) => (float[N,2] y)
<float[2,2] w = {4, 3, 2, 1}>
{ y = MatMul(x, w) }
"""


@pytest.mark.parametrize(
    "path", CASES, ids=[f"{path.parent.name}/{path.stem}" for path in CASES]
)
def test_case(path: Path) -> None:
    check_case(path)


def test_a_case_lies_in_the_folder_of_a_pass_it_runs() -> None:
    for path in CASES:
        names = [step.name for step in Pipeline.parse(Case.read(path).pipeline)]
        assert path.parent.name in names


def case(folder: Path, *parts: str) -> Path:
    path = folder / "case.onnxtxt"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def test_a_case_that_is_met_passes(tmp_path: Path) -> None:
    after = MODEL.replace("4, 3, 2, 1", "4, 3, 0, 0")
    check_case(case(tmp_path, "# prune:sparsity=0.5", MODEL, "# output", after))


def test_a_case_that_is_not_met_shows_the_difference(tmp_path: Path) -> None:
    after = MODEL.replace("4, 3, 2, 1", "4, 0, 0, 1")
    path = case(tmp_path, "# prune:sparsity=0.5", MODEL, "# output", after)
    with pytest.raises(AssertionError) as caught:
        check_case(path)
    lines = str(caught.value).splitlines()
    assert "-weight w = float[2, 2] {4, 0, 0, 1}" in lines
    assert "+weight w = float[2, 2] {4, 3, 0, 0}" in lines


def test_a_case_without_output_fails_when_the_model_changes(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected"):
        check_case(case(tmp_path, "# prune:sparsity=0.5", MODEL))


def test_a_reason_that_is_not_given_fails_the_case(tmp_path: Path) -> None:
    path = case(tmp_path, "# prune:skip=w", "# skipped w: is made of cheese", MODEL)
    with pytest.raises(AssertionError, match="made of cheese"):
        check_case(path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "first line"),
        ((MODEL,), "first line"),
        (("# prune", MODEL, "# output", MODEL, "# output", MODEL), "more than one"),
        (("# prune", MODEL.replace("MatMul", "MatMull")), "MatMull"),
        (("# prune", MODEL, "# output", "cheese"), "ParseError"),
    ],
)
def test_a_file_that_is_no_case_is_refused(
    tmp_path: Path, parts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_case(case(tmp_path, *parts))
