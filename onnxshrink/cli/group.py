"""The group of all commands.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import click

from onnxshrink.cli.commands import BARE, HELP, Main


@click.group("onnxshrink", cls=Main, context_settings={"help_option_names": list(HELP)})
def main() -> None:
    """Make an ONNX model smaller, checked with onnxruntime after every pass."""


def words() -> list[str]:
    """Return the words that are commands."""
    return [name for name in main.commands if name != BARE]
