"""The command line: ``onnxshrink MODEL ...``, passes, inspect, compare and teacher.

Results go to stdout, everything else to stderr. Exit codes: 0 written (or shown), 1 a
user's error or a broken promise, 2 a command line that cannot be read, 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from onnxshrink.errors import OnnxshrinkError, OutputError, UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.base import Context
    from onnxshrink.model import Model
    from onnxshrink.pipeline import Pipeline
    from onnxshrink.quantization.sensitivity import Sensitivity
    from onnxshrink.quantization.timings import Kernels
    from onnxshrink.report import Step
    from onnxshrink.samples import Splits
    from onnxshrink.terminal import Bar
    from onnxshrink.validate import Budget

__all__ = ["main"]

DEFAULT_PASSES = "fold"
"""What runs where nobody says which passes: safe for every model."""
_MODEL_SUFFIXES = (".onnx", ".onnxtxt")
_BARE = "shrink"
_HELP = ("-h", "--help")


# --- how the command line is read -------------------------------------------------


class _Option(click.Option):
    """An option that stands in a section of the help."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Leave out ranges, which nobody needs to know before breaking them."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class _Command(click.Command):
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
        _write_block(formatter, "Examples", self.examples)


class _BareContext(click.Context):
    """Names the bare command as one types it: not at all."""

    @property
    def command_path(self) -> str:
        """The words typed so far."""
        return self.parent.command_path if self.parent else super().command_path


class _Bare(_Command):
    """The command without a word."""

    context_class = _BareContext


class _Main(click.Group):
    """A group whose bare form is a command: ``onnxshrink MODEL`` and ``... inspect``.

    The first argument decides: one of the words, or else it belongs to the bare
    command. A model that is called like a word is given with its folder: ``./passes``.
    """

    def resolve(self, args: Sequence[str]) -> list[str]:
        """Return the arguments with the name of the bare command put in front."""
        if args and (args[0] in self.commands or args[0] in _HELP):
            return list(args)
        return [_BARE, *_joined_passes(args)] if args else []

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``onnxshrink MODEL`` for ``onnxshrink shrink MODEL``."""
        return super().parse_args(ctx, self.resolve(args))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one page: the bare command with its options, then the words."""
        bare = self.commands[_BARE]
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
        _write_block(formatter, "Exit codes", _EXIT_CODES)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the words, in the order of the help."""
        return [name for name in self.commands if name != _BARE]

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
        code = _guarded(
            lambda: super(_Main, self).main(
                given,
                prog_name or "onnxshrink",
                complete_var,
                standalone_mode=False,
                **extra,
            ),
            verbose=any(re.fullmatch(r"-q?v+q?|--verbose", word) for word in given),
        )
        sys.exit(code)


def _joined_passes(args: Sequence[str]) -> list[str]:
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


def _write_block(formatter: click.HelpFormatter, title: str, text: str) -> None:
    if text:
        with formatter.section(title):
            block = textwrap.indent(text.strip("\n"), " " * formatter.current_indent)
            formatter.write(block + "\n")


# --- how it ends ------------------------------------------------------------------

_EXIT_CODES = """\
0    written, or shown
1    an error of the request, the model or the data, or a broken promise;
     nothing was written and nothing is lost
2    the command line cannot be read
130  interrupted
"""


def _guarded(work: Callable[[], Any], *, verbose: bool) -> int:
    """Run the command line; return the exit code, having said what went wrong."""
    with suppress(ValueError):  # not in the main thread
        # As for an interrupt, what was begun is tidied up.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = work()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return 130
    except OnnxshrinkError as error:
        if verbose and error.__cause__ is not None:
            _trace(error)
        _complain(str(error))
        return 1
    except OSError as error:
        if verbose:
            _trace(error)
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}")
        return 1
    except MemoryError:
        _complain("there is not enough memory; nothing was written")
        return 1
    except Exception as error:  # the last line of defence: a bug, said in one line
        if verbose:
            _trace(error)
        hint = "" if verbose else "; -v shows where"
        _complain(
            f"this is a bug of onnxshrink or of a pass: {type(error).__name__}: "
            f"{error}{hint}"
        )
        return 1
    return code if isinstance(code, int) else 0


def _complain(message: str) -> None:
    """Print an error; lines are kept, control characters are not."""
    from onnxshrink.terminal import clean, console

    lines = [clean(line, 2000) for line in message.splitlines() or [""]]
    console(stderr=True).print(
        "\n".join(["error: " + lines[0], *lines[1:]]), soft_wrap=True
    )


def _trace(error: BaseException) -> None:
    from onnxshrink.terminal import console

    console(stderr=True).print(
        "".join(traceback.format_exception(error)).rstrip(), soft_wrap=True
    )


# --- what all commands share ------------------------------------------------------


@dataclass(frozen=True)
class _Screen:
    """Where things are shown.

    Attributes:
        out: Results.
        err: Everything else.
        verbose: Show details.
    """

    out: Console
    err: Console
    verbose: bool

    @classmethod
    def open(cls, *, quiet: bool, verbose: bool) -> _Screen:
        """Return the screen of this process."""
        from onnxshrink.terminal import console

        return cls(console(quiet=quiet), console(stderr=True, quiet=quiet), verbose)

    @contextmanager
    def bar(self, what: str) -> Iterator[Bar]:
        """Yield what shows progress."""
        from onnxshrink.terminal import Bar

        with Bar(self.err, quiet=self.err.quiet) as bar:
            bar(0, 0, what)
            yield bar

    def text(self, text: str, *, err: bool = False) -> None:
        """Print text as it is; a terminal wraps it, a file does not."""
        (self.err if err else self.out).print(text, soft_wrap=True)


class _Share(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
    """A number; ``99%`` is 0.99."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number.

        Raises:
            click.BadParameter: It is none.
        """
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            number = float("nan")
        if number != number or number in (float("inf"), float("-inf")):
            self.fail(f"{text!r} is not a number such as 0.99 or 99%", param, ctx)
        return number


class _Shape(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
    """``name=2x128``: the shape of one input."""

    name = "shape"
    form: ClassVar[re.Pattern[str]] = re.compile(r"(.+)=(\d+(?:[x,]\d+)*)?")

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Return name and shape.

        Raises:
            click.BadParameter: It is not of that form.
        """
        if isinstance(value, tuple):
            return value
        match = self.form.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{value!r} is not name=shape, such as input_ids=2x128 "
                "(name= for a scalar)",
                param,
                ctx,
            )
        dims = re.findall(r"\d+", match[2] or "")
        if any(len(dim) > 12 or int(dim) < 1 for dim in dims):
            self.fail(f"{value!r} has a dimension out of range", param, ctx)
        return match[1], tuple(int(dim) for dim in dims)


_PATH = click.Path(path_type=Path, readable=False)  # what reads it says why it cannot
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _option(*names: str, section: str = "Options", **settings: Any) -> _Decorator:
    return click.option(*names, cls=_Option, section=section, **settings)


def _together(*decorators: _Decorator) -> _Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return decorate


_verbose = _option(
    "-v", "--verbose", is_flag=True, help="Say more; show where bugs are."
)
_json = _option("--json", "as_json", is_flag=True, help="Print JSON.")
_shapes = _option(
    "--shape",
    "shapes",
    type=_Shape(),
    metavar="NAME=2x128",
    multiple=True,
    section="Samples",
    help="Shape of an input that leaves dimensions open. Repeat it for each input.",
)
_data = _option(
    "--data",
    metavar="FILE|DIR",
    section="Samples",
    help="Samples: .npz with one array per input, .npy, or a folder of them; "
    "FILE:input=array/255,labels=other names and scales arrays. Without it seeded "
    "random inputs are used: a smoke test, no measurement.",
)
_labels = _option(
    "--labels",
    metavar="KEY",
    section="Samples",
    help="Array of the data that holds the labels. [default: labels]",
)
_metric = _option(
    "--metric",
    metavar="NAME",
    section="Samples",
    help="Task metric: top1, top5, mse, spearman, or module:function or "
    "file.py:function of (outputs, labels). [default: top1 where labels fit]",
)
_machine = _together(
    _option(
        "--provider",
        "providers",
        metavar="NAME",
        multiple=True,
        section="Running",
        help="onnxruntime execution provider. Repeat it in order of preference.",
    ),
    _option(
        "--threads",
        type=click.IntRange(0, 1024),
        default=0,
        metavar="N",
        section="Running",
        help="Threads of onnxruntime; 0 lets it choose.",
    ),
)
_runtime = _together(
    _machine,
    _option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        metavar="N",
        section="Running",
        help="Seed of every random draw.",
        show_default=True,
    ),
)


@click.group(
    "onnxshrink", cls=_Main, context_settings={"help_option_names": list(_HELP)}
)
def main() -> None:
    """Make an ONNX model smaller, checked with onnxruntime after every pass."""


# --- onnxshrink MODEL -------------------------------------------------------------

_SHRINK_EXAMPLES = """\
onnxshrink model.onnx
onnxshrink model.onnx --passes fold,prune:sparsity=0.8 --data samples.npz -o small.onnx
onnxshrink model.onnx --passes fold prune:sparsity=0.9,scope=global \\
    --data train.npz --labels labels --max-drop 0.1 --report run.json
onnxshrink model.onnx --recipe mine.toml --plan
"""


@main.command(
    _BARE,
    cls=_Bare,
    hidden=True,
    options_metavar="[OPTIONS]",
    examples=_SHRINK_EXAMPLES,
    no_args_is_help=True,
)
@click.argument("model", type=_PATH)
@_option(
    "--passes",
    metavar="TEXT",
    multiple=True,
    section="Passes",
    help="Passes and their options: fold,prune:sparsity=0.8,scope=global. Several "
    f"words are read one after the other. [default: {DEFAULT_PASSES}]",
)
@_option(
    "--recipe",
    metavar="NAME|FILE.toml",
    section="Passes",
    help="Passes from a recipe: a file, or one that ships (see: onnxshrink passes).",
)
@_option(
    "--plan", is_flag=True, section="Passes", help="Say what would be done; do nothing."
)
@_data
@_labels
@_option(
    "--eval",
    "evaluation",
    metavar="FILE|DIR",
    section="Samples",
    help="Samples that measure and do nothing else. [default: 40 % of the data]",
)
@_shapes
@_metric
@_option(
    "--max-drop",
    type=_Share(),
    metavar="X",
    section="Budget",
    help="Most that the task metric may get worse, in its own unit: 0.1 is a tenth "
    "of a point of top1. [default: 1 with labels]",
)
@_option(
    "--min-agreement",
    type=_Share(),
    metavar="X",
    section="Budget",
    help="Least share of samples with the same top class as before: 0.99 or 99%. "
    "[default: 98% without labels]",
)
@_option(
    "--min-sqnr",
    type=_Share(),
    metavar="DB",
    section="Budget",
    help="Least signal-to-noise ratio of every output, in dB.",
)
@_option(
    "--max-latency",
    type=_Share(),
    metavar="X",
    section="Budget",
    help="Most time of a run, in multiples of the model's as it came; noisy below 1.1.",
)
@_option(
    "--on-breach",
    type=click.Choice(["back-off", "rollback", "abort", "keep"]),
    default="back-off",
    show_default=True,
    section="Budget",
    help="When a pass breaks the budget: leave out its most damaging places, go on "
    "without it, stop, or keep it.",
)
@_option(
    "-o",
    "--output",
    type=_PATH,
    metavar="OUT",
    section="Output",
    help="Where to write: a file, or a folder for a file of the same name. "
    "[default: MODEL-shrunk.onnx beside MODEL]",
)
@_option(
    "--storage",
    type=click.Choice(["auto", "plain"]),
    default="auto",
    show_default=True,
    section="Output",
    help="How weights are written: in the smallest exact encoding, or plain.",
)
@_option(
    "--external",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    show_default=True,
    section="Output",
    help="Whether weights go into a second file: as they came, or where one is too "
    "small.",
)
@_option(
    "--max-decode-ratio",
    type=float,
    metavar="X",
    section="Output",
    help="Write a weight plain if decoding it at load takes more than X times its "
    "bytes.  [default: 10]",
)
@_option(
    "--report",
    "reports",
    type=_PATH,
    multiple=True,
    metavar="FILE",
    section="Output",
    help="Write a report: .json, .md or .html. Can be repeated.",
)
@_option(
    "--resume",
    is_flag=True,
    section="Output",
    help="Continue an interrupted run after its last accepted pass.",
)
@_runtime
@_option(
    "--jobs",
    type=click.IntRange(0, 1024),
    default=0,
    metavar="N",
    section="Running",
    help="Threads that passes share work among; 0 is one for each processor.",
)
@_option("-q", "--quiet", is_flag=True, section="Running", help="Print only errors.")
@_option(
    "-v",
    "--verbose",
    is_flag=True,
    section="Running",
    help="Print what every pass did and left alone.",
)
@_option(
    "-h",
    "--help",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    section="Running",
    help="Show this page.",
    callback=lambda ctx, param, value: _show_page(ctx) if value else None,
)
@click.version_option(
    package_name="onnxshrink",
    message="%(prog)s %(version)s",
    cls=_Option,
    section="Running",
    help="Show the version.",
)
def shrink(
    model: Path,
    passes: tuple[str, ...],
    recipe: str | None,
    plan: bool,
    data: str | None,
    labels: str | None,
    evaluation: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    metric: str | None,
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    max_latency: float | None,
    on_breach: Any,
    output: Path | None,
    storage: Any,
    max_decode_ratio: float | None,
    external: Any,
    reports: tuple[Path, ...],
    resume: bool,
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    jobs: int,
    quiet: bool,
    verbose: bool,
) -> None:
    """Make an ONNX model smaller, checked with onnxruntime after every pass.

    A pass that does not stay within the budget is weakened or left out. The output is
    an ordinary ONNX file that any runtime opens; the input is never changed.
    """
    if passes and recipe is not None:
        raise click.UsageError("give either --passes or --recipe, not both")
    if quiet and verbose:
        raise click.UsageError("give either -q or -v, not both")
    if not model.name:
        raise UsageError(f"{str(model)!r} names no file; give a model")
    pipeline = _pipeline(passes, recipe)
    target = model
    if not plan:
        target = _target(model, output)
        for report in reports:
            _check_report(report, model, target)

    from onnxshrink.manager import PassManager
    from onnxshrink.model import Model
    from onnxshrink.report import render_plan, step_line

    screen = _Screen.open(quiet=quiet, verbose=verbose)
    accepted = []

    def on_step(step: Step) -> None:
        accepted.append(step.accepted)
        screen.text(step_line(step), err=True)

    with screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        manager = PassManager(
            pipeline,
            splits=_splits(loaded, data, evaluation, labels, shapes, seed),
            budget=_budget(max_drop, min_agreement, min_sqnr, max_latency),
            metric=metric,
            on_breach=on_breach,
            storage=storage,
            max_decode_ratio=max_decode_ratio,
            external=external,
            providers=providers or ("CPUExecutionProvider",),
            threads=threads,
            seed=seed,
            jobs=jobs,
            shapes=dict(shapes),
            progress=bar,
            on_step=on_step,
        )
        if plan:
            planned = manager.plan(loaded)
        else:
            try:
                result = manager.run(loaded, target, resume=resume)
            except KeyboardInterrupt:
                if any(accepted):
                    hint = "the same command with --resume continues from here"
                    screen.text(hint, err=True)
                raise
    if plan:
        render_plan(screen.out, str(pipeline), planned, verbose=verbose)
        return
    for path in reports:
        result.report.write(path)
    result.report.render(screen.out, verbose=verbose)


def _show_page(ctx: click.Context) -> None:
    group = ctx.parent.command if ctx.parent is not None else ctx.command
    click.echo(group.get_help(ctx.parent or ctx))
    ctx.exit()


def _pipeline(passes: Sequence[str], recipe: str | None) -> Pipeline:
    from onnxshrink import registry
    from onnxshrink.pipeline import Pipeline

    if recipe is not None:
        pipeline = Pipeline.from_toml(registry.recipe(recipe))
    else:
        pipeline = Pipeline.parse(list(passes) or DEFAULT_PASSES)
    if not pipeline.passes:
        raise UsageError("there is no pass to run; name one, such as --passes fold")
    return pipeline


def _target(model: Path, output: Path | None) -> Path:
    """Return the file to write, refusing early what would fail late."""
    if str(model) in _words() and not model.is_file():
        raise UsageError(
            f"{model} does not exist; as a command it must come first: "
            f"onnxshrink {model} ..."
        )
    if output is None:
        output = model.with_name(f"{model.stem or model.name}-shrunk.onnx")
    elif output.is_dir():
        output = output / model.with_suffix(".onnx").name
    if not output.parent.is_dir():
        raise OutputError(f"cannot write {output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {output}: no permission to write to {output.parent}; "
            "choose another place with -o"
        )
    return output


def _words() -> list[str]:
    """Return the words that are commands."""
    return [name for name in main.commands if name != _BARE]


def _check_report(path: Path, model: Path, target: Path) -> None:
    from onnxshrink.report import SUFFIXES

    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"a report is written by its suffix, and {path} has none of "
            f"{', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise OutputError(f"cannot write {path}: no permission, or it is a folder")
    if path.resolve() in (model.resolve(), target.resolve()):
        raise OutputError(f"cannot write the report to {path}: it is a model")


def _budget(
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    max_latency: float | None = None,
) -> Budget | None:
    from onnxshrink.validate import Budget

    limits = (max_drop, min_agreement, min_sqnr, max_latency)
    if all(limit is None for limit in limits):
        return None
    return Budget(
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_sqnr=min_sqnr,
        max_latency_ratio=max_latency,
    )


def _splits(
    model: Model,
    data: str | None,
    evaluation: str | None,
    labels: str | None,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    seed: int,
) -> Splits:
    from onnxshrink.samples import Splits

    if labels is not None and data is None and evaluation is None:
        raise UsageError("--labels names an array of the data; add --data")
    return Splits.build(
        model, data, evaluation, labels=labels, seed=seed, shapes=dict(shapes) or None
    )


def _check_shapes(model: Model, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    known = {info.name: info for info in model.inputs}
    for name, shape in shapes:
        info = known.get(name)
        if info is None:
            raise UsageError(
                f"--shape: the model has no input {name!r}; it has "
                f"{', '.join(known) or 'none'}.{nearest(name, known)}"
            )
        if info.shape is None:
            continue
        fits = len(info.shape) == len(shape) and all(
            not isinstance(dim, int) or dim == given
            for dim, given in zip(info.shape, shape, strict=True)
        )
        if not fits:
            takes = "x".join("?" if dim is None else str(dim) for dim in info.shape)
            raise UsageError(
                f"--shape: input {name!r} takes {takes or 'a scalar'}, "
                f"not {'x'.join(map(str, shape)) or 'a scalar'}"
            )


# --- onnxshrink passes ------------------------------------------------------------

_PASSES_EXAMPLES = """\
onnxshrink passes
onnxshrink passes prune
"""


@main.command("passes", cls=_Command, examples=_PASSES_EXAMPLES)
@click.argument("name", required=False)
@_verbose
def passes_(name: str | None, verbose: bool) -> None:
    """List the passes and recipes there are, or explain one.

    NAME is a pass or a recipe that ships.
    """
    from onnxshrink import registry

    screen = _Screen.open(quiet=False, verbose=verbose)
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


def _list_passes(screen: _Screen) -> None:
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


def _explain(screen: _Screen, pass_: Any) -> None:
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


# --- onnxshrink inspect -----------------------------------------------------------

_INSPECT_EXAMPLES = """\
onnxshrink inspect model.onnx
onnxshrink inspect model.onnx --top 50
onnxshrink inspect model.onnx --json | jq .weights[0]
onnxshrink inspect model.onnx --sensitivity --bits 4 --data photos.npz
onnxshrink inspect model.onnx --sensitivity --by half:mode=compute --data photos.npz
"""


@main.command("inspect", cls=_Command, examples=_INSPECT_EXAMPLES)
@click.argument("model", type=_PATH)
@_option(
    "--top",
    type=click.IntRange(0),
    default=15,
    show_default=True,
    metavar="N",
    help="Rows of each table; 0 shows all.",
)
@_option(
    "--sensitivity",
    is_flag=True,
    section="Sensitivity",
    help="Make one layer after the other coarse, and rank them by what that does to "
    "the outputs.",
)
@_option(
    "--bits",
    type=click.IntRange(2, 8),
    metavar="N",
    section="Sensitivity",
    help="Round weights to so many bits, with a scale for each output.  [default: 8]",
)
@_option(
    "--by",
    metavar="STEP",
    section="Sensitivity",
    help="Do what a pass does instead: quantize:weights=int4, half:mode=compute.",
)
@_option(
    "--samples",
    "count",
    type=click.IntRange(1),
    metavar="N",
    section="Sensitivity",
    help="Samples in each measurement.  [default: 32]",
)
@_option(
    "--kernels",
    is_flag=True,
    section="Sensitivity",
    help="Time each kind of layer in integers and in float on this processor; what was "
    "timed once is remembered.",
)
@_data
@_shapes
@_runtime
@_json
@_verbose
def inspect_(
    model: Path,
    top: int,
    kernels: bool,
    sensitivity: bool,
    bits: int | None,
    by: str | None,
    count: int | None,
    data: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
    verbose: bool,
) -> None:
    """Show where the bytes and multiply-accumulates of a model are.

    For every weight: type, zeros, distinct values, and what its smallest exact
    encoding would take. With --sensitivity also: which layers bear to be made coarse;
    with --kernels: which gain by integers.
    """
    from onnxshrink.analysis.inventory import inventory
    from onnxshrink.base import Context
    from onnxshrink.model import Model
    from onnxshrink.report import dump

    asked = {"--bits": bits, "--by": by, "--samples": count}
    for name, value in asked.items():
        if value is not None and not sensitivity:
            raise UsageError(f"{name} is for --sensitivity; add that")
    if data is not None and not (sensitivity or kernels):
        raise UsageError("--data is for --sensitivity or --kernels; add one of them")
    if bits is not None and by is not None:
        raise UsageError("--bits rounds weights and --by runs a pass; take one of them")
    screen = _Screen.open(quiet=False, verbose=verbose)
    parts: dict[str, Sensitivity | Kernels] = {}
    with screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        _check_shapes(loaded, shapes)
        if sensitivity or kernels:
            # Only a pass needs samples of its own to calibrate with.
            shared, held = (None, data) if by is None else (data, None)
            given = () if data is not None else shapes
            context = Context(
                samples=_splits(loaded, shared, held, None, given, seed),
                reference=loaded,
                seed=seed,
                threads=threads,
                providers=providers or ("CPUExecutionProvider",),
                progress=bar,
            )
            if sensitivity:
                parts["sensitivity"] = _effects(loaded, context, bits, by, count)
            if kernels:
                parts["kernels"] = _kernels(loaded, context)
        found = inventory(loaded, shapes=dict(shapes), progress=bar)
    if as_json:
        extra = {name: part.to_json() for name, part in parts.items()}
        screen.text(dump(found.to_json() | extra))
        return
    found.render(screen.out, top=top)
    for part in parts.values():
        part.render(screen.out, top=top)


def _kernels(model: Model, ctx: Context) -> Kernels:
    """Time the layers of a model on one sample, for the types this machine likes."""
    from onnxshrink.quantization.targets import resolve
    from onnxshrink.quantization.timings import Timings

    samples = ctx.samples.evaluation
    assert samples is not None
    timings = Timings(threads=ctx.threads, providers=ctx.providers)
    feed = samples.read(range(samples.batch or 1))
    return timings.layers(model, feed, resolve("auto")[0], progress=ctx.progress)


def _effects(
    model: Model, ctx: Context, bits: int | None, by: str | None, count: int | None
) -> Sensitivity:
    """Measure sensitivity on the samples held out from what calibrates a pass."""
    from onnxshrink.base import SitePass
    from onnxshrink.pipeline import Pipeline
    from onnxshrink.quantization.sensitivity import SAMPLES, of_pass, of_weights

    held = ctx.samples.evaluation
    samples = None if held is None else held.take(slice(0, count or SAMPLES))
    if by is None:
        return of_weights(model, ctx, bits=bits or 8, samples=samples)
    passes = Pipeline.parse(by).passes
    if len(passes) != 1 or not isinstance(passes[0], SitePass):
        raise UsageError(f"--by takes one pass that acts at sites, not {by!r}")
    return of_pass(passes[0], model, ctx, samples=samples)


# --- onnxshrink compare -----------------------------------------------------------

_COMPARE_EXAMPLES = """\
onnxshrink compare model.onnx model-shrunk.onnx
onnxshrink compare a.onnx b.onnx --data test.npz --labels labels
onnxshrink compare a.onnx b.onnx --data test.npz --min-agreement 99% --json
"""


@main.command("compare", cls=_Command, examples=_COMPARE_EXAMPLES)
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@_data
@_labels
@_shapes
@_metric
@_option(
    "--max-drop",
    type=_Share(),
    metavar="X",
    section="Checks",
    help="Fail if the task metric of B is worse by more.",
)
@_option(
    "--min-agreement",
    type=_Share(),
    metavar="X",
    section="Checks",
    help="Fail if fewer samples have the same top class.",
)
@_option(
    "--min-sqnr",
    type=_Share(),
    metavar="DB",
    section="Checks",
    help="Fail if the signal-to-noise ratio of an output is lower.",
)
@_runtime
@_json
@_verbose
def compare_(
    a: Path,
    b: Path,
    data: str | None,
    labels: str | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    metric: str | None,
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    providers: tuple[str, ...],
    threads: int,
    seed: int,
    as_json: bool,
    verbose: bool,
) -> int:
    """Compare what two models give, their size and their latency.

    A is the reference. The exit code is 1 if inputs or outputs differ, or if a check
    that was asked for fails.
    """
    from onnxshrink.comparison import compare
    from onnxshrink.model import Model
    from onnxshrink.report import dump

    screen = _Screen.open(quiet=False, verbose=verbose)
    with screen.bar("loading") as bar:
        reference = Model.load(a)
        other = Model.load(b)
        found = compare(
            reference,
            other,
            lambda: _splits(reference, None, data, labels, shapes, seed),
            budget=_budget(max_drop, min_agreement, min_sqnr),
            metric=metric,
            providers=providers or ("CPUExecutionProvider",),
            threads=threads,
            seed=seed,
            progress=bar,
        )
    if as_json:
        screen.text(dump(found.to_json()))
    else:
        found.render(screen.out)
    return 0 if found.ok else 1


# --- onnxshrink teacher -----------------------------------------------------------

_TEACHER_EXAMPLES = """\
onnxshrink teacher big.onnx --data photos.npz -o logits.npz
onnxshrink teacher big.onnx --data photos.npz -o logits.npz --half --keep logits
onnxshrink teacher language.onnx --data text.npz -o logits.npz --top-k 64
onnxshrink teacher big.onnx --data photos.npz -o logits.npz --tensor 'block*_out'
onnxshrink small.onnx --data photos.npz --passes prune distill:teacher=logits.npz
"""


@main.command("teacher", cls=_Command, examples=_TEACHER_EXAMPLES)
@click.argument("model", type=_PATH)
@_data
@_labels
@_option(
    "-o",
    "--output",
    "target",
    type=_PATH,
    metavar="FILE.npz",
    required=True,
    help="Where the answers go.",
)
@_option(
    "--keep",
    "names",
    metavar="NAME",
    multiple=True,
    help="Output to keep. Repeat it for more. [default: every output of floats]",
)
@_option(
    "--tensor",
    "tensors",
    metavar="NAME",
    multiple=True,
    help="Value inside of the model to keep as well, for distill:match=NAME; a glob "
    "pattern stands for several. Repeat it for more.",
)
@_option(
    "--top-k",
    type=click.IntRange(1),
    metavar="K",
    help="Keep only the K largest scores of an output that has more, and the mass of "
    "all others together: for large vocabularies.",
)
@_option("--half", is_flag=True, help="Store float16: half the bytes.")
@_machine
@_verbose
def teacher_(
    model: Path,
    data: str | None,
    labels: str | None,
    target: Path,
    names: tuple[str, ...],
    tensors: tuple[str, ...],
    top_k: int | None,
    half: bool,
    providers: tuple[str, ...],
    threads: int,
    verbose: bool,
) -> None:
    """Write what a model answers to data, for distill:teacher=FILE.npz.

    The file holds one row for each sample, in the order of the data, and checksums of
    the samples and the model. Memory does not grow with the number of samples.
    """
    import numpy as np

    from onnxshrink.model import Model
    from onnxshrink.samples import Samples
    from onnxshrink.teacher import write

    if data is None:
        raise UsageError("a teacher needs samples to answer; add --data")
    screen = _Screen.open(quiet=False, verbose=verbose)
    with screen.bar(f"loading {model.name}") as bar:
        loaded = Model.load(model)
        samples = Samples.from_path(data, labels).bind(loaded.inputs)
        shapes = write(
            target,
            loaded,
            samples,
            names=names,
            tensors=tensors,
            top_k=top_k or 0,
            dtype=np.float16 if half else None,
            threads=threads,
            providers=providers or ("CPUExecutionProvider",),
            progress=bar,
        )
    for name, shape in shapes.items():
        screen.text(f"{name}: {' x '.join(map(str, shape))}")
    screen.text(f"wrote {target} ({target.stat().st_size:,} bytes)")
