"""Laws that hold for every pass, example models, and golden cases in ONNX text.

They serve the project's own tests and those of a pass in another package::

    from onnxshrink.testing import check_case, check_laws, example_models

    @pytest.mark.parametrize("name", example_models())
    def test_laws(name: str) -> None:
        check_laws(MyPass(), {name: example_models()[name]})

    @pytest.mark.parametrize("path", Path("tests/cases").rglob("*.onnxtxt"), ids=str)
    def test_case(path: Path) -> None:
        check_case(path)
"""

from __future__ import annotations

from onnxshrink.engine import make_context
from onnxshrink.testing.cases import Case, check_case, normalised
from onnxshrink.testing.examples import example_models
from onnxshrink.testing.laws import apply, check_laws

__all__ = [
    "Case",
    "apply",
    "check_case",
    "check_laws",
    "example_models",
    "make_context",
    "normalised",
]
