"""How the command line is read: the bare command, words, sections of help.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import click

from onnxshrink.cli.ending import EXIT_CODES, Interrupted, guarded

_MODEL_SUFFIXES = (".onnx", ".onnxtxt", ".onnxz")
BARE = "shrink"
HELP = ("-h", "--help")


class Option(click.Option):
    """An option that stands in a section of the help."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Leave ranges out of the help; the error states them."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose help has sections, and examples at its end."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the options, section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                section = getattr(parameter, "section", "Options")
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_block(formatter, "Examples", self.examples)


class _BareContext(click.Context):
    """The context of the bare command, whose name is not typed."""

    @property
    def command_path(self) -> str:
        """The words typed so far."""
        return self.parent.command_path if self.parent else super().command_path


class Bare(Command):
    """The command without a word."""

    context_class = _BareContext


class Main(click.Group):
    """A group whose bare form is a command: ``onnxshrink MODEL`` and ``... inspect``.

    The first argument decides: one of the words, or else it belongs to the bare
    command. A model that is called like a word is given with its folder: ``./passes``.
    """

    def resolve(self, args: Sequence[str]) -> list[str]:
        """Return the arguments with the name of the bare command put in front."""
        if args and (args[0] in self.commands or args[0] in HELP):
            return list(args)
        return [BARE, *joined_passes(args)] if args else []

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``onnxshrink MODEL`` for ``onnxshrink shrink MODEL``."""
        return super().parse_args(ctx, self.resolve(args))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one page: the bare command with its options, then the words."""
        bare = self.commands[BARE]
        inner = click.Context(bare, info_name=ctx.info_name)
        bare.format_usage(inner, formatter)
        for name in self.list_commands(ctx):
            pieces = self.commands[name].collect_usage_pieces(
                click.Context(self.commands[name])
            )
            formatter.write_usage(
                f"{ctx.command_path} {name}", " ".join(pieces), " " * 7
            )
        bare.format_help_text(inner, formatter)
        bare.format_options(inner, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, self.commands[name].get_short_help_str(80))
                    for name in self.list_commands(ctx)
                ]
            )
        bare.format_epilog(inner, formatter)
        write_block(formatter, "Exit codes", EXIT_CODES)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click would take the end of any file for an interrupt."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error
        except EOFError as error:
            raise RuntimeError(f"a file ended early: {error}") from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the words, in the order of the help."""
        return [name for name in self.commands if name != BARE]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, print what went wrong in words, and leave with the exit code."""
        given = list(sys.argv[1:] if args is None else args)
        code = guarded(
            lambda: super(Main, self).main(
                given,
                prog_name or "onnxshrink",
                complete_var,
                standalone_mode=False,
                **extra,
            ),
            verbose=any(re.fullmatch(r"-q?v+q?|--verbose", word) for word in given),
        )
        sys.exit(code)


def joined_passes(args: Sequence[str]) -> list[str]:
    """Let ``--passes fold prune sparsity=0.9`` take all its words.

    They end at the next option, and at a word that names a model.
    """
    joined: list[str] = []
    words = iter(args)
    collecting = False
    for word in words:
        if word == "--":
            return [*joined, word, *words]
        if word == "--passes" or word.startswith("--passes="):
            joined.append(word)
            if word == "--passes":
                joined += [value for value in [next(words, None)] if value is not None]
            collecting = True
        elif word.startswith("-"):
            joined.append(word)
            collecting = False
        elif collecting and not _names_model(word):
            joined.extend(["--passes", word])
        else:
            joined.append(word)
    return joined


def _names_model(word: str) -> bool:
    if word.endswith(_MODEL_SUFFIXES) and ("=" not in word or os.path.exists(word)):
        return True
    return ("/" in word or os.sep in word) and os.path.exists(word)


def write_block(formatter: click.HelpFormatter, title: str, text: str) -> None:
    """Write a titled block of the help as it is."""
    if text:
        with formatter.section(title):
            block = textwrap.indent(text.strip("\n"), " " * formatter.current_indent)
            formatter.write(block + "\n")
