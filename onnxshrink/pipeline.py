"""Pipeline: the passes of a run as plain data; text, TOML and Python say the same.

Text is a list of tokens, separated by commas or white space:
``prune:sparsity=0.8,scope=global,quantize:weights=int8``. A token ``key=value`` is an
option of the step before it; anything else starts a step, ``name`` or
``name:key=value``. A repeated key builds a tuple. How a value is written is in
``onnxshrink.options``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from onnxshrink import registry
from onnxshrink.base import Pass
from onnxshrink.errors import UsageError, nearest
from onnxshrink.options import build, options, shorten, unknown_option

__all__ = ["Pipeline"]

BUDGET = ("max_drop", "min_agreement", "min_sqnr")

_TOKEN = re.compile(r"[^,\s]+")
_OPTION = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)
_STEP = re.compile(r"([^:=]+)(?:(:)(.*))?", re.DOTALL)
_RECIPE_LIMIT = 1 << 18
_DEEPEST_KEY = 8
"""Parts of a dotted key, which tomllib takes quadratic time for."""
_WINDOW = 72


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order they run, and nothing that runs.

    Every pipeline can be written down: ``Pipeline.parse(str(pipeline)) == pipeline``
    for passes the registry knows. A value that has no text is refused here.

    Attributes:
        passes: The passes with their options.
        description: What a recipe says it is for; no part of equality.
        budget: ``max_drop``, ``min_agreement`` or ``min_sqnr`` that a recipe proposes;
            no part of equality.
    """

    passes: tuple[Pass, ...] = ()
    description: str = field(default="", compare=False)
    budget: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "budget", MappingProxyType(dict(self.budget)))
        _check_budget(self.budget)
        steps: tuple[object, ...] = self.passes
        for step in steps:
            if not isinstance(step, Pass):
                raise UsageError(f"a pipeline holds passes, not {shorten(repr(step))}")
            if not registry.is_name(step.name):
                raise UsageError(f"{step.name!r} is no name that text can hold")
            _texts(step)
            _toml_values(step)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def trains(self) -> bool:
        """Whether some pass learns from training samples."""
        return any(step.trains for step in self.passes)

    def __str__(self) -> str:
        """Return the text that ``parse`` reads, without options at their default."""
        steps = []
        for step in self.passes:
            pairs = ",".join(f"{name}={text}" for name, text in _texts(step))
            steps.append(f"{step.name}:{pairs}" if pairs else step.name)
        return ",".join(steps)

    def with_target(self, target: str) -> Pipeline:
        """Return the pipeline for a processor: where a pass has that option unset.

        Raises:
            UsageError: No pass has it, or there is no such target.
        """
        changed = []
        for step in self.passes:
            known = options(type(step))
            if (
                "target" in known
                and step.options()["target"] == known["target"].default
            ):
                words: dict[str, Any] = {"target": target}
                step = dataclasses.replace(step, **words)
            changed.append(step)
        if not any("target" in options(type(step)) for step in self.passes):
            raise UsageError(
                f"target={target} is for passes that write for a processor, such as "
                f"quantize; {self} has none"
            )
        return dataclasses.replace(self, passes=tuple(changed))

    @classmethod
    def parse(
        cls,
        text: str | Sequence[str],
        passes: Mapping[str, type[Pass]] | None = None,
    ) -> Pipeline:
        """Return the pipeline that a text says.

        Args:
            text: One text, or several that are read one after the other.
            passes: The passes there are; by default those of the registry.

        Raises:
            UsageError: If the text cannot be read. The message names the token and
                shows where it stands.
        """
        source = text if isinstance(text, str) else " ".join(text)
        return cls(tuple(step.build() for step in _steps(source, passes)))

    @classmethod
    def from_toml(
        cls,
        path: str | Path,
        passes: Mapping[str, type[Pass]] | None = None,
    ) -> Pipeline:
        """Return the pipeline of a recipe file.

        Args:
            path: A TOML file of ``[[pass]]`` tables, each with a ``name`` and the
                options of that pass; optionally ``description`` and ``[budget]``.
            passes: The passes there are; by default those of the registry.

        Raises:
            UsageError: If the file cannot be read as a recipe.
        """
        if Path(path).exists() and not Path(path).is_file():
            raise UsageError(f"recipe {path} is no regular file")
        try:
            with open(path, "rb") as file:
                content = file.read(_RECIPE_LIMIT + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"cannot read recipe {path}: {reason}") from error
        if len(content) > _RECIPE_LIMIT:
            raise UsageError(f"recipe {path} is larger than {_RECIPE_LIMIT} bytes")
        if re.search(rb"(?:[\w\"'-]\s*\.\s*){%d}" % _DEEPEST_KEY, content):
            raise UsageError(
                f"recipe {path} has a key of more than {_DEEPEST_KEY} parts"
            )
        try:
            return _from_table(tomllib.loads(content.decode("utf-8")), passes)
        except (UsageError, ValueError, RecursionError) as error:
            # TOMLDecodeError and UnicodeDecodeError are ValueErrors.
            raise UsageError(f"recipe {path}: {error}") from error

    def to_toml(self) -> str:
        """Return the text of a recipe file; options at their default are left out."""
        lines = []
        if self.description:
            lines += [f"description = {_toml(self.description)}", ""]
        if self.budget:
            lines += ["[budget]"]
            lines += [f"{key} = {_toml(value)}" for key, value in self.budget.items()]
            lines += [""]
        for step in self.passes:
            lines += ["[[pass]]", f"name = {_toml(step.name)}"]
            lines += [f"{key} = {_toml(value)}" for key, value in _toml_values(step)]
            lines += [""]
        return "\n".join(lines)


@dataclass
class _Step:
    """A step while it is read: its pass, its options so far, and where it stands."""

    source: str
    cls: type[Pass]
    span: tuple[int, int]
    texts: dict[str, list[str]] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, text: str, start: int) -> None:
        """Take the option ``key=value`` that starts at ``start`` of the source."""
        match = _OPTION.fullmatch(text)
        known = options(self.cls)
        name = self.cls.name
        if match is None:
            word = text.replace("-", "_")
            hint = f"; for a switch write {word}=true" if word in known else ""
            raise _error(
                f"{shorten(text)!r} after {name}: is not key=value{hint}",
                self.source,
                (start, start + len(text)),
            )
        key = match[1].replace("-", "_")
        if key not in known:
            raise _error(
                unknown_option(self.cls, match[1]),
                self.source,
                (start, start + len(match[1])),
            )
        self.texts.setdefault(key, []).append(match[2])
        self.spans[key] = (start, start + len(text))

    def build(self) -> Pass:
        """Return the pass with the options that were read."""
        known = options(self.cls)
        values = {}
        for key, texts in self.texts.items():
            try:
                values[key] = known[key].read(texts)
            except UsageError as error:
                raise _error(
                    f"{self.cls.name}: {error}", self.source, self.spans[key]
                ) from error
        try:
            return build(self.cls, values)
        except UsageError as error:
            raise _error(str(error), self.source, self.span) from error


def _steps(source: str, passes: Mapping[str, type[Pass]] | None) -> list[_Step]:
    steps: list[_Step] = []
    for match in _TOKEN.finditer(source):
        token, span = match[0], match.span()
        if _OPTION.fullmatch(token):
            if not steps:
                raise _error(
                    f"{shorten(token)!r} is an option, and no pass stands before it",
                    source,
                    span,
                )
            steps[-1].add(token, span[0])
            steps[-1].span = (steps[-1].span[0], span[1])
            continue
        parts = _STEP.fullmatch(token)
        if parts is None:
            raise _error(
                f"{shorten(token)!r} is neither a pass nor key=value", source, span
            )
        name_span = (span[0], span[0] + len(parts[1]))
        try:
            step = _Step(source, _lookup(parts[1], passes), span)
        except UsageError as error:
            raise _error(str(error), source, name_span) from error
        if parts[2]:
            step.add(parts[3], span[0] + len(parts[1]) + 1)
        steps.append(step)
    return steps


def _lookup(name: str, passes: Mapping[str, type[Pass]] | None) -> type[Pass]:
    if passes is None:
        return registry.get(name)
    if name not in passes:
        raise UsageError(registry.unknown_pass(name, passes))
    return passes[name]


def _error(message: str, source: str, span: tuple[int, int]) -> UsageError:
    """Return the error with the text below it and carets under the token."""
    start, end = span
    left = max(0, min(start - 20, len(source) - _WINDOW))
    right = left + _WINDOW
    end = max(min(end, right), start + 1)
    shown = "".join(c if c.isprintable() else " " for c in source[left:right])
    before = "..." if left else ""
    after = "..." if right < len(source) else ""
    pad = " " * (len(before) + start - left)
    return UsageError(
        f"{message}\n  {before}{shown}{after}\n  {pad}{'^' * (end - start)}"
    )


def _texts(step: Pass) -> list[tuple[str, str]]:
    """Return each option that is not at its default, once for each text it takes."""
    pairs = []
    for option in options(type(step)).values():
        value = getattr(step, option.name)
        if _is_default(option.default, value):
            continue
        try:
            pairs += [(option.name, text) for text in option.write(value)]
        except UsageError as error:
            raise UsageError(f"{step.name}: {error}") from error
    return pairs


def _toml_values(step: Pass) -> list[tuple[str, object]]:
    pairs = []
    for option in options(type(step)).values():
        value = getattr(step, option.name)
        if _is_default(option.default, value):
            continue
        try:
            pairs.append((option.name, option.write_toml(value)))
        except UsageError as error:
            raise UsageError(f"{step.name}: {error}") from error
    return pairs


def _is_default(default: object, value: object) -> bool:
    if type(default) is not type(value):
        return False
    try:
        return bool(default == value)
    except (TypeError, ValueError):  # an array, for one; writing it will refuse it
        return False


def _toml(value: object) -> str:
    """Return a TOML value; strings as basic strings, which are JSON's but for DEL."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    return repr(value)


def _from_table(
    table: dict[str, Any], passes: Mapping[str, type[Pass]] | None
) -> Pipeline:
    known = ("description", "budget", "pass")
    for key in table:
        if key not in known:
            raise UsageError(
                f"{shorten(key)!r} is unknown at the top; there are "
                f"{', '.join(known)}.{nearest(shorten(key), known)}"
            )
    description = table.get("description", "")
    budget = table.get("budget", {})
    steps = table.get("pass", [])
    if not isinstance(description, str):
        raise UsageError("description must be a string")
    if not isinstance(budget, dict):
        raise UsageError("budget must be a table: [budget]")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise UsageError("each pass must be a table of its own: [[pass]]")
    return Pipeline(
        tuple(_from_step(index + 1, step, passes) for index, step in enumerate(steps)),
        description,
        budget,
    )


def _from_step(
    number: int, table: dict[str, Any], passes: Mapping[str, type[Pass]] | None
) -> Pass:
    name = table.get("name")
    if not isinstance(name, str):
        raise UsageError(f'[[pass]] number {number} needs name = "..."')
    cls = _lookup(name, passes)
    known = options(cls)
    values = {}
    for key, value in table.items():
        if key == "name":
            continue
        if key not in known:
            raise UsageError(unknown_option(cls, key))
        try:
            values[key] = known[key].read_toml(value)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    return build(cls, values)


def _check_budget(budget: Mapping[str, float]) -> None:
    for key, value in budget.items():
        if key not in BUDGET:
            raise UsageError(
                f"the budget has no {shorten(key)!r}; it has {', '.join(BUDGET)}."
                f"{nearest(shorten(key), BUDGET)}"
            )
        try:
            finite = math.isfinite(value) and not isinstance(value, bool)
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise UsageError(f"{key} of the budget must be a finite number")
