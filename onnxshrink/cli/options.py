"""Options that several commands share, and what is made of them.

Tested in tests/cli/test_cli.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from onnxshrink.cli.commands import Option
from onnxshrink.errors import UsageError, nearest

if TYPE_CHECKING:
    from onnxshrink.model import Model
    from onnxshrink.samples import Splits
    from onnxshrink.validation import Budget


class Share(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
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


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
    """A number of bytes: ``500000000``, ``500MB``, ``2GB``, ``1.5GiB``."""

    name = "bytes"
    units: ClassVar[dict[str, int]] = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number of bytes.

        Raises:
            click.BadParameter: It is none, or not positive.
        """
        if isinstance(value, int):
            return value
        match = re.fullmatch(
            r"(\d{1,15}(?:\.\d*)?) *([kmg]?i?b?)", str(value).strip().lower()
        )
        unit = self.units.get(match.group(2)) if match else None
        size = int(float(match.group(1)) * unit) if match and unit else 0
        if size <= 0:
            self.fail(f"{value!r} is not a size such as 500MB or 2GB", param, ctx)
        return size


class Shape(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
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


class Value(click.ParamType):  # type: ignore[type-arg]  # generic in new click only
    """``name=3`` or ``name=1,2,3``: numbers for one input."""

    name = "value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[float, ...]]:
        """Return name and numbers.

        Raises:
            click.BadParameter: It is not of that form.
        """
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).rpartition("=")
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if not (name and equals and numbers) or len(numbers) > 1 << 16:
            self.fail(
                f"{value!r} is not name=number, such as sample_rate=16000 or "
                "sizes=224,224",
                param,
                ctx,
            )
        return name, numbers


PATH = click.Path(path_type=Path, readable=False)  # whoever reads it says why not
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(*names: str, section: str = "Options", **settings: Any) -> Decorator:
    """Return ``click.option`` of an option that stands in a section of the help."""
    return click.option(*names, cls=Option, section=section, **settings)


def together(*decorators: Decorator) -> Decorator:
    """Return one decorator that does what several do, in order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return decorate


verbose_option = option(
    "-v", "--verbose", is_flag=True, help="Say more; show where bugs are."
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
shapes_option = option(
    "--shape",
    "shapes",
    type=Shape(),
    metavar="NAME=2x128",
    multiple=True,
    section="Samples",
    help="Shape of an input that leaves dimensions open. Repeat it for each input.",
)
input_size_option = option(
    "--max-input-bytes",
    type=Size(),
    default=1 << 30,
    metavar="SIZE",
    section="Samples",
    help="Most bytes of one set of random inputs that the model may ask for: 500MB. "
    "[default: 1.07GB]",
)
values_option = option(
    "--value",
    "values",
    type=Value(),
    metavar="NAME=N",
    multiple=True,
    section="Samples",
    help="Number (or numbers, with commas) for an input, beside --data or random "
    "inputs: a sample rate, a size, a mask of ones. Repeat it for each input.",
)
batch_option = option(
    "--batch",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    section="Samples",
    help="Samples in every run of the model. [default: what the model takes]",
)
data_option = option(
    "--data",
    metavar="FILE|DIR",
    section="Samples",
    help="Samples: .npz or .safetensors with one array per input, .npy, .csv, "
    ".parquet, a folder of images or of files that are a sample each; "
    "FILE:input=array/255,labels=other names and scales arrays; synthetic makes up "
    "images. Without it seeded random inputs are used: a smoke test, no measurement.",
)
labels_option = option(
    "--labels",
    metavar="KEY",
    section="Samples",
    help="Array of the data that holds the labels. [default: labels]",
)
metric_option = option(
    "--metric",
    metavar="NAME",
    section="Samples",
    help="Task metric: top1, top5, mse, spearman, next-token, perplexity, or "
    "module:function or file.py:function of (outputs, labels). [default: top1 where "
    "labels fit, perplexity where token ids and logits are there]",
)
outputs_option = option(
    "--outputs",
    metavar="NAME",
    multiple=True,
    section="Budget",
    help="Output that limits bound, by name or pattern; repeatable. [default: all but "
    "state that goes into the next run]",
)


def _custom_operators(
    context: click.Context, _parameter: click.Parameter, libraries: tuple[Path, ...]
) -> None:
    if libraries:
        from onnxshrink.runtime import custom_operators

        context.with_resource(custom_operators(libraries))


machine_options = together(
    option(
        "--custom-ops",
        type=PATH,
        metavar="LIB",
        multiple=True,
        expose_value=False,
        callback=_custom_operators,
        section="Running",
        help="Shared library with operators of the model's own, for onnxruntime. Can "
        "be repeated.",
    ),
    option(
        "--provider",
        "providers",
        metavar="NAME",
        multiple=True,
        section="Running",
        help="onnxruntime execution provider. Repeat it in order of preference.",
    ),
    option(
        "--threads",
        type=click.IntRange(0, 1024),
        default=0,
        metavar="N",
        section="Running",
        help="Threads of onnxruntime; 0 lets it choose.",
    ),
)
runtime_options = together(
    machine_options,
    option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        metavar="N",
        section="Running",
        help="Seed of every random draw.",
        show_default=True,
    ),
)


def budget_of(
    max_drop: float | None,
    min_agreement: float | None,
    min_sqnr: float | None,
    max_latency: float | None = None,
    max_bytes: int | None = None,
) -> Budget | None:
    """Return the budget that the options name, or ``None`` where they name none."""
    from onnxshrink.validation import Budget

    limits = (max_drop, min_agreement, min_sqnr, max_latency, max_bytes)
    if all(limit is None for limit in limits):
        return None
    return Budget(
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_sqnr=min_sqnr,
        max_latency_ratio=max_latency,
        max_bytes=max_bytes,
    )


def splits_of(
    model: Model,
    data: str | None,
    evaluation: str | None,
    labels: str | None,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    seed: int,
    max_input_bytes: int = 1 << 30,
    values: Sequence[tuple[str, tuple[float, ...]]] = (),
    batch: int | None = None,
    *,
    trains: bool = True,
) -> Splits:
    """Return the samples that the options name, divided for what is done with them."""
    from onnxshrink.samples import Splits

    if labels is not None and data is None and evaluation is None:
        raise UsageError("--labels names an array of the data; add --data")
    return Splits.build(
        model,
        data,
        evaluation,
        labels=labels,
        seed=seed,
        shapes=dict(shapes) or None,
        max_input_bytes=max_input_bytes,
        trains=trains,
        values=dict(values),
        batch=batch,
    )


def check_shapes(model: Model, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a shape whose input the model does not have, or has in another shape."""
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
