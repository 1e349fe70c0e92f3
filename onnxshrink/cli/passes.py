"""``onnxshrink passes``: what passes there are.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from onnxshrink.cli.commands import Command
from onnxshrink.cli.options import (
    verbose_option,
)
from onnxshrink.cli.screen import Screen
from onnxshrink.errors import UsageError, nearest

if TYPE_CHECKING:
    pass

_PASSES_EXAMPLES = """\
onnxshrink passes
onnxshrink passes prune
"""


@click.command("passes", cls=Command, examples=_PASSES_EXAMPLES)
@click.argument("name", required=False)
@verbose_option
def passes_(name: str | None, verbose: bool) -> None:
    """List the passes and recipes there are, or explain one.

    NAME is a pass or a recipe that ships.
    """
    from onnxshrink import registry

    screen = Screen.open(quiet=False, verbose=verbose)
    if name is None:
        _list_passes(screen)
        return
    recipes = registry.recipes()
    if name in recipes and name not in registry.passes():
        screen.text(recipes[name].read_text(encoding="utf-8").rstrip())
        return
    try:
        found = registry.get(name)
    except UsageError as error:
        known = [*registry.passes(), *recipes]
        if name in registry.broken():
            raise
        raise UsageError(
            f"no pass or recipe {name!r}; there are {', '.join(known)}."
            f"{nearest(name, known)}"
        ) from error
    _explain(screen, registry.describe(found))


def _list_passes(screen: Screen) -> None:
    from onnxshrink import registry
    from onnxshrink.pipeline import Pipeline

    described = [registry.describe(cls) for cls in registry.passes().values()]
    blocks = []
    for pass_ in described:
        options = " ".join(
            f"{option.name}={option.default_text}" for option in pass_.options
        )
        origin = "" if pass_.origin == "built-in" else f" ({pass_.origin})"
        lines = [f"{pass_.name}{origin}  {pass_.summary}"]
        lines += textwrap.wrap(
            options,
            84,
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        blocks.append("\n".join(lines))
    screen.text("Passes, and their options with defaults:\n")
    screen.text("\n".join(blocks) or "none")
    for name, why in registry.broken().items():
        screen.text(f"{name}  does not work: {why}")
    recipes = registry.recipes()
    if recipes:
        screen.text("\nRecipes, for --recipe NAME:\n")
        for name, path in recipes.items():
            try:
                recipe = Pipeline.from_toml(path)
            except UsageError as error:  # it may use a pass that is broken
                screen.text(f"{name}  does not work: {error}")
                continue
            screen.text(f"{name}  {recipe.description or recipe}")
    screen.text("\nonnxshrink passes NAME explains one.")


def _explain(screen: Screen, pass_: Any) -> None:
    """Print everything about one pass; ``pass_`` is a ``registry.Description``."""
    promises = {
        "same": "The outputs stay the same up to float noise.",
        "close": "The outputs move, within the budget.",
        "signature": "Only names, types and shapes of inputs and outputs are kept.",
    }
    screen.text(f"{pass_.name}  {pass_.summary}\n")
    if pass_.text:
        screen.text(f"{pass_.text}\n")
    screen.text(f"Promise: {promises[pass_.promise.value]}")
    if pass_.origin != "built-in":
        screen.text(f"From: {pass_.origin}")
    if pass_.options:
        screen.text("\nOptions:")
    for option in pass_.options:
        screen.text(f"  {option.name}={option.type}  [default: {option.default_text}]")
        for line in textwrap.wrap(option.doc, 80, break_on_hyphens=False):
            screen.text(f"      {line}")
    screen.text(f"\nExample:\n  onnxshrink model.onnx --passes {pass_.example}")
