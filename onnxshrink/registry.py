"""Which passes and recipes there are: the built-in ones, and what packages bring.

A built-in pass is the one class of a module of ``onnxshrink.passes`` that bears its
name. Another package brings a pass through the entry-point group ``onnxshrink.passes``,
under the name of the pass. A package that is broken is named when its pass is asked for
and gets in the way of nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import onnxshrink.passes
from onnxshrink.base import Pass, Promise
from onnxshrink.errors import UsageError, nearest
from onnxshrink.options import Option, options, shorten

__all__ = [
    "GROUP",
    "Description",
    "broken",
    "describe",
    "get",
    "is_name",
    "passes",
    "recipe",
    "recipes",
    "unknown_pass",
]

GROUP = "onnxshrink.passes"
_NAME = re.compile(r"[A-Za-z][\w.-]*")


@dataclass(frozen=True)
class Description:
    """What there is to say about a pass, for help.

    Attributes:
        name: As one types it.
        summary: First line of the docstring.
        text: The docstring below the first line, without its ``Attributes:``.
        promise: What the pass leaves as it was.
        options: Its options with type, default and meaning.
        example: Pipeline text that uses it.
        origin: ``built-in``, or the distribution that brings it.
    """

    name: str
    summary: str
    text: str
    promise: Promise
    options: tuple[Option, ...]
    example: str
    origin: str


def get(name: str) -> type[Pass]:
    """Return the pass of that name; only its own module is imported.

    Raises:
        UsageError: If there is none, if two packages claim the name, or if the package
            that brings it does not load.
    """
    built_in = name in _modules()
    claims = _entry_points().get(name, [])
    if built_in + len(claims) > 1:
        owners = ["onnxshrink"] * built_in + [_distribution(claim) for claim in claims]
        raise UsageError(
            f"pass {name!r} is claimed by {' and '.join(owners)}; uninstall one"
        )
    if built_in:
        return _built_in(name)
    if claims:
        return _load(claims[0])
    raise UsageError(unknown_pass(name, [*_modules(), *_entry_points()]))


def passes() -> dict[str, type[Pass]]:
    """Return every pass that works by name: the built-in ones first, then others."""
    found = {}
    for name in [*_modules(), *_entry_points()]:
        try:
            found[name] = get(name)
        except UsageError:
            continue
    return found


def broken() -> dict[str, str]:
    """Return why each pass that is installed but does not work does not."""
    found = {}
    for name in [*_modules(), *_entry_points()]:
        try:
            get(name)
        except UsageError as error:
            found[name] = str(error)
    return found


def describe(cls: type[Pass]) -> Description:
    """Return what the class says about itself.

    Raises:
        UsageError: If the types of its options cannot be resolved.
    """
    docstring = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    if docstring.startswith(f"{cls.__name__}("):
        docstring = ""  # what @dataclass writes where there is none
    summary, _, text = docstring.partition("\n")
    text = re.sub(r"^Attributes:\n((?:[ \t]+.*\n|\n)*)", "", text + "\n", flags=re.M)
    origins = {
        claim.value: _distribution(claim)
        for claims in _entry_points().values()
        for claim in claims
    }
    built_in = cls.__module__.startswith(onnxshrink.passes.__name__ + ".")
    location = f"{cls.__module__}:{cls.__qualname__}"
    return Description(
        name=cls.name,
        summary=summary,
        text=text.strip(),
        promise=cls.promise,
        options=tuple(options(cls).values()),
        example=cls.example or cls.name,
        origin="built-in" if built_in else origins.get(location, cls.__module__),
    )


def recipes() -> dict[str, Path]:
    """Return the recipes that ship, by name."""
    folder = resources.files("onnxshrink.recipes")
    return {
        path.name.removesuffix(".toml"): Path(str(path))
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.name.endswith(".toml")
    }


def recipe(name: str) -> Path:
    """Return the file of a recipe: one that ships by its name, or a path to a file.

    Raises:
        UsageError: If it is neither.
    """
    known = recipes()
    if name in known:
        return known[name]
    if name.endswith(".toml") or "/" in name or "\\" in name:
        return Path(name)
    raise UsageError(
        f"no recipe {shorten(name)!r}; there are {', '.join(known)}, or name a .toml "
        f"file.{nearest(shorten(name), known)}"
    )


def is_name(name: str) -> bool:
    """Whether pipeline text can hold this name of a pass."""
    return _NAME.fullmatch(name) is not None


def unknown_pass(name: str, known: Iterable[str]) -> str:
    """Return the message about a pass that there is not."""
    known = list(dict.fromkeys(known))
    name = shorten(name)
    listed = ", ".join(known) or "none"
    return f"no pass {name!r}; there are {listed}.{nearest(name, known)}"


def _modules() -> list[str]:
    return sorted(
        module.name
        for module in pkgutil.iter_modules(onnxshrink.passes.__path__)
        if not module.name.startswith("_")
    )


def _built_in(name: str) -> type[Pass]:
    try:
        module = importlib.import_module(f"{onnxshrink.passes.__name__}.{name}")
    except ImportError as error:
        raise UsageError(f"built-in pass {name!r} does not load: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise UsageError(
            f"{module.__name__} must hold one pass and holds "
            f"{', '.join(cls.__name__ for cls in found) or 'none'}"
        )
    return _checked(found[0], name, module.__name__)


def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Return the claims on each name; one claim that is found twice counts once."""
    found: dict[str, dict[str, metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, {})[entry.value] = entry
    return {name: list(found[name].values()) for name in sorted(found)}


def _distribution(entry: metadata.EntryPoint) -> str:
    if entry.dist is None:
        return entry.value
    return f"{entry.dist.name} {entry.dist.version}"


def _load(entry: metadata.EntryPoint) -> type[Pass]:
    owner = _distribution(entry)
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"pass {entry.name!r} of {owner} does not load: "
            f"{type(error).__name__}: {shorten(str(error), 200)}"
        ) from error
    return _checked(loaded, entry.name, f"{entry.value} of {owner}")


def _checked(cls: object, name: str, where: str) -> type[Pass]:
    """Return the class if it can be used as the pass of that name."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise UsageError(f"pass {name!r}: {where} is not a subclass of onnxshrink.Pass")
    fault = ""
    if inspect.isabstract(cls):
        fault = f"lacks {', '.join(sorted(cls.__abstractmethods__))}"
    elif getattr(cls, "name", None) != name:
        fault = f"calls itself {getattr(cls, 'name', None)!r}"
    elif not is_name(name):
        fault = "has a name that pipeline text cannot hold"
    elif not isinstance(getattr(cls, "promise", None), Promise):
        fault = "states no promise"
    elif "__dataclass_params__" not in cls.__dict__:
        fault = "is not decorated with @dataclass(frozen=True, kw_only=True)"
    if fault:
        raise UsageError(f"pass {name!r}: {where} {fault}")
    return cls
