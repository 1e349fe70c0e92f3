"""The options of a pass: read from its dataclass fields, written as text and as TOML.

Text is what the command line takes after ``key=``. A comma, white space and ``%`` are
written as in an address, ``%2C``, ``%20``, ``%25``, so that no shell needs quotes; any
``%XX`` is read that way. ``none`` stands for ``None`` and for the empty tuple; a string
that would be read as something else has its first character written as ``%XX``. TOML
takes values as they are, and ``[]`` for ``None``.

Tested in tests/test_pipeline.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Union

from onnxshrink.base import Pass
from onnxshrink.errors import UsageError, nearest

__all__ = ["REQUIRED", "Option", "build", "options", "shorten", "unknown_option"]


class _Required(Enum):
    REQUIRED = "required"

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required.REQUIRED
"""Default of an option that has none."""

_YES = frozenset({"true", "yes", "on", "1"})
_NO = frozenset({"false", "no", "off", "0"})
_NONE = "none"
_ESCAPES = re.compile("(?:%[0-9A-Fa-f]{2})+")


@dataclass(frozen=True)
class Option:
    """One option of a pass.

    Attributes:
        name: As one types it.
        kind: Reads and writes values of the annotated type.
        default: ``REQUIRED`` if it has none.
        doc: From the ``Attributes:`` section of the pass's docstring.
    """

    name: str
    kind: Kind
    default: object
    doc: str

    @property
    def type(self) -> str:
        """What one may type, for help: ``int``, ``local|global``, ``text ...``."""
        return self.kind.label

    @property
    def default_text(self) -> str:
        """The default as one would type it, or ``required``."""
        if self.default is REQUIRED:
            return "required"
        try:
            return " ".join(self.kind.write(self.default)) or '""'
        except _CannotError:
            return repr(self.default)

    def read(self, texts: Sequence[str]) -> object:
        """Return the value of the texts given after ``name=``, one for each mention.

        Raises:
            UsageError: If they are no value of this option.
        """
        try:
            return self.kind.read(texts)
        except _CannotError as error:
            raise UsageError(f"{self.name} {error}") from error

    def write(self, value: object) -> list[str]:
        """Return the texts that ``read`` turns into ``value`` again.

        Raises:
            UsageError: If there are none.
        """
        try:
            texts = self.kind.write(value)
            if _same(self.kind.read(texts), value):
                return texts
        except _CannotError as error:
            raise UsageError(f"{self.name} {error}") from error
        raise UsageError(
            f"{self.name} takes {self.type}; {_shown(value)} is a "
            f"{type(value).__name__}, which cannot be written as text and read back"
        )

    def read_toml(self, value: object) -> object:
        """Return the value that a TOML value stands for.

        Raises:
            UsageError: If it is no value of this option.
        """
        try:
            return self.kind.read_toml(value)
        except _CannotError as error:
            raise UsageError(f"{self.name} {error}") from error

    def write_toml(self, value: object) -> object:
        """Return the TOML value (bool, int, float, str, list) that stands for it.

        Raises:
            UsageError: If there is none.
        """
        try:
            written = self.kind.write_toml(value)
            if _same(self.kind.read_toml(written), value):
                return written
        except _CannotError as error:
            raise UsageError(f"{self.name} {error}") from error
        raise UsageError(f"{self.name} cannot hold {_shown(value)} in TOML")


@cache
def options(cls: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by name, in declaration order.

    Raises:
        UsageError: If the annotations of the pass cannot be resolved.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        raise UsageError(
            f"the options of pass {cls.__name__} have types that cannot be found: "
            f"{error}"
        ) from error
    docs = _attribute_docs(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default: object = REQUIRED
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Option(
            field.name, _kind(hints[field.name]), default, docs.get(field.name, "")
        )
    return found


def build(cls: type[Pass], values: dict[str, object]) -> Pass:
    """Return the pass with these options; what is missing has its default.

    Raises:
        UsageError: If the pass refuses a value or lacks one it needs.
    """
    missing = [
        option.name
        for option in options(cls).values()
        if option.default is REQUIRED and option.name not in values
    ]
    if missing:
        raise UsageError(f"{cls.name} needs {', '.join(missing)}")
    try:
        return cls(**values)
    except UsageError as error:
        message = str(error)
        if message.startswith(cls.name):
            raise
        raise UsageError(f"{cls.name}: {message}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{cls.name}: {error}") from error


def unknown_option(cls: type[Pass], name: str) -> str:
    """Return the message about an option that the pass does not have."""
    if now := cls.renamed.get(name.replace("-", "_")):
        return f"{cls.name} has no option {name} any more; write {now}"
    known = list(options(cls))
    has = f"it has {', '.join(known)}" if known else "it has none"
    name = shorten(name)
    return f"{cls.name} has no option {name}; {has}.{nearest(name, known)}"


def shorten(text: str, limit: int = 60) -> str:
    """Return the text on one line, printable and of bounded length, for a message."""
    # Nothing in front of the limit depends on what comes far behind it.
    text = text[: 4 * limit]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def escape(text: str) -> str:
    """Return the text with what the grammar would misread written as ``%XX``."""
    return "".join(
        c if c.isprintable() and not c.isspace() and c not in ",%" else _percent(c)
        for c in text
    )


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in _utf8(text).encode())


def _unescape(text: str) -> str:
    def decoded(match: re.Match[str]) -> str:
        return bytes.fromhex(match[0].replace("%", "")).decode()

    try:
        return _utf8(_ESCAPES.sub(decoded, text))
    except UnicodeDecodeError as error:
        raise _CannotError(f"is not UTF-8 text: {shorten(text)}") from error


def _utf8(text: str) -> str:
    """Return the text; refuse a lone surrogate, as a file name may hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _CannotError(f"is not UTF-8 text: {shorten(text)}") from error
    return text


def _same(left: object, right: object) -> bool:
    """Whether two option values are equal without being of different kinds."""
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    try:
        return bool(left == right)
    except (TypeError, ValueError):  # an array, for one
        return False


def _shown(value: object) -> str:
    """Return a value for a message; Python refuses to print very long integers."""
    try:
        return shorten(repr(value))
    except ValueError:
        return f"a {type(value).__name__} that is too long to print"


class _CannotError(Exception):
    """A value is not of a kind; the message continues ``<option> ...``."""


class Kind(ABC):
    """How values of one annotated type are read and written."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What one may type, for help."""

    @abstractmethod
    def read(self, texts: Sequence[str]) -> object:
        """Return the value of one text for each mention of the option."""

    @abstractmethod
    def write(self, value: object) -> list[str]:
        """Return the texts for a value; ``read`` decides whether they hold it."""

    @abstractmethod
    def read_toml(self, value: object) -> object:
        """Return the value a TOML value stands for."""

    @abstractmethod
    def write_toml(self, value: object) -> object:
        """Return the TOML value for a value."""


class _One(Kind):
    """A kind whose value is a single text."""

    _label: ClassVar[str] = ""

    @property
    def label(self) -> str:
        return self._label

    @abstractmethod
    def parse(self, text: str) -> object:
        """Return the value of a text in which escapes are not yet resolved."""

    def print(self, value: object) -> str:
        """Return the text for a value."""
        try:
            return escape(str(value))
        except ValueError as error:
            raise self.cannot(value) from error

    def read(self, texts: Sequence[str]) -> object:
        if len(texts) != 1:
            raise _CannotError("is given twice, and takes one value")
        return self.parse(texts[0])

    def write(self, value: object) -> list[str]:
        return [self.print(value)]

    def read_toml(self, value: object) -> object:
        if isinstance(value, str):
            return self.parse(escape(value))
        raise self.cannot(value)

    def write_toml(self, value: object) -> object:
        return value

    def cannot(self, value: object) -> _CannotError:
        """Return the error for something that is not of this kind."""
        shown = repr(shorten(value)) if isinstance(value, str) else _shown(value)
        return _CannotError(f"takes {self.label}, not {shown}")


class _Bool(_One):
    _label = "true|false"

    def parse(self, text: str) -> bool:
        if text.lower() in _YES:
            return True
        if text.lower() in _NO:
            return False
        raise self.cannot(text)

    def print(self, value: object) -> str:
        return escape(str(value).lower())

    def read_toml(self, value: object) -> object:
        if isinstance(value, bool):
            return value
        raise self.cannot(value)


class _Int(_One):
    _label = "int"

    def parse(self, text: str) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise self.cannot(text) from error

    def read_toml(self, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self.cannot(value)


class _Float(_One):
    _label = "float"

    def parse(self, text: str) -> float:
        try:
            value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError as error:
            raise self.cannot(text) from error
        if not math.isfinite(value):
            raise self.cannot(text)
        return value

    def print(self, value: object) -> str:
        return repr(float(value)) if isinstance(value, float) else super().print(value)

    def read_toml(self, value: object) -> object:
        if isinstance(value, str):
            return super().read_toml(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.cannot(value)
        try:
            return self.parse(repr(value))
        except ValueError as error:  # an integer of thousands of digits
            raise _CannotError("is too large for a float") from error


class _Text(_One):
    _label = "text"

    def parse(self, text: str) -> str:
        return _unescape(text)

    def read_toml(self, value: object) -> object:
        if not isinstance(value, str):
            raise self.cannot(value)
        return value

    def write_toml(self, value: object) -> object:
        return _utf8(value) if isinstance(value, str) else value


class _Path(_One):
    _label = "path"

    def parse(self, text: str) -> Path:
        plain = _unescape(text)
        if "\0" in plain:
            raise self.cannot(plain)
        return Path(plain)

    def write_toml(self, value: object) -> object:
        return _utf8(str(value)) if isinstance(value, Path) else value


@dataclass(frozen=True)
class _Choice(_One):
    """A ``Literal`` or an ``Enum``: a few values, each known by one text."""

    values: tuple[object, ...]

    @property
    def label(self) -> str:
        return "|".join(self.print(value) for value in self.values)

    def parse(self, text: str) -> object:
        for value in self.values:
            if self.print(value) == text:
                return value
        for value in self.values:
            names = [self.print(value)]
            if isinstance(value, Enum):
                names.append(value.name)
            if text.lower() in [name.lower() for name in names]:
                return value
        known = [self.print(value) for value in self.values]
        raise _CannotError(
            f"takes {self.label}, not {shorten(text)!r}.{nearest(shorten(text), known)}"
        )

    def print(self, value: object) -> str:
        if isinstance(value, Enum):
            value = value.value if isinstance(value.value, str) else value.name
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return escape(str(value))

    def read_toml(self, value: object) -> object:
        for choice in self.values:
            if not isinstance(choice, Enum) and _same(choice, value):
                return choice
        return super().read_toml(value)

    def write_toml(self, value: object) -> object:
        if isinstance(value, Enum) or value is None:
            return self.print(value)
        return value


class _Nothing(_One):
    _label = _NONE

    def parse(self, text: str) -> None:
        if text != _NONE:
            raise self.cannot(text)

    def print(self, value: object) -> str:
        if value is not None:
            raise self.cannot(value)
        return _NONE

    def read_toml(self, value: object) -> object:
        if value != []:
            raise self.cannot(value)
        return None

    def write_toml(self, value: object) -> object:
        if value is not None:
            raise self.cannot(value)
        return []


@dataclass(frozen=True)
class _Tuple(Kind):
    """``tuple[T, ...]``: the option is repeated, once for each entry."""

    entry: Kind

    @property
    def label(self) -> str:
        return f"{self.entry.label} ..."

    def read(self, texts: Sequence[str]) -> object:
        if list(texts) == [_NONE]:
            return ()
        return tuple(self.entry.read([text]) for text in texts)

    def write(self, value: object) -> list[str]:
        if not isinstance(value, tuple):
            raise _CannotError(f"takes a tuple, not {_shown(value)}")
        if not value:
            return [_NONE]
        texts = [text for entry in value for text in self.entry.write(entry)]
        if texts == [_NONE]:
            # The string "none", not the empty tuple.
            return [_percent(_NONE[0]) + _NONE[1:]]
        return texts

    def read_toml(self, value: object) -> object:
        entries = value if isinstance(value, list) else [value]
        return tuple(self.entry.read_toml(entry) for entry in entries)

    def write_toml(self, value: object) -> object:
        if not isinstance(value, tuple):
            raise _CannotError(f"takes a tuple, not {_shown(value)}")
        return [self.entry.write_toml(entry) for entry in value]


@dataclass(frozen=True)
class _Pair(Kind):
    """``tuple[A, B]``: the option is repeated exactly so many times."""

    entries: tuple[Kind, ...]

    @property
    def label(self) -> str:
        return " ".join(entry.label for entry in self.entries)

    def _count(self, found: int) -> None:
        if found != len(self.entries):
            raise _CannotError(
                f"is given {found} times, and takes {len(self.entries)} values"
            )

    def read(self, texts: Sequence[str]) -> object:
        self._count(len(texts))
        pairs = zip(self.entries, texts, strict=True)
        return tuple(entry.read([text]) for entry, text in pairs)

    def write(self, value: object) -> list[str]:
        if not isinstance(value, tuple):
            raise _CannotError(f"takes a tuple, not {_shown(value)}")
        self._count(len(value))
        pairs = zip(self.entries, value, strict=True)
        return [text for entry, item in pairs for text in entry.write(item)]

    def read_toml(self, value: object) -> object:
        if not isinstance(value, list):
            raise _CannotError(f"takes a list, not {_shown(value)}")
        self._count(len(value))
        pairs = zip(self.entries, value, strict=True)
        return tuple(entry.read_toml(item) for entry, item in pairs)

    def write_toml(self, value: object) -> object:
        if not isinstance(value, tuple):
            raise _CannotError(f"takes a tuple, not {_shown(value)}")
        self._count(len(value))
        pairs = zip(self.entries, value, strict=True)
        return [entry.write_toml(item) for entry, item in pairs]


@dataclass(frozen=True)
class _Union(Kind):
    """The first member that can read it does, the strictest member first."""

    members: tuple[Kind, ...]

    @property
    def label(self) -> str:
        return "|".join(member.label for member in self.members)

    def _first(self, step: str, value: Any, wanted: object = REQUIRED) -> Any:
        for member in self.members:
            try:
                result = getattr(member, step)(value)
                if wanted is REQUIRED or _same(self.read(result), wanted):
                    return result
            except _CannotError:
                continue
        shown = " ".join(value) if isinstance(value, list | tuple) else value
        raise _CannotError(f"takes {self.label}, not {shorten(str(shown))!r}")

    def read(self, texts: Sequence[str]) -> object:
        return self._first("read", list(texts))

    def write(self, value: object) -> list[str]:
        if isinstance(value, str | Path) and (text := str(value)):
            # "8" the string, or a file of that name, where an int is possible too.
            texts = [escape(text)]
            if _same(self.read(texts), value):
                return texts
            return [_percent(text[0]) + escape(text[1:])]
        written: list[str] = self._first("write", value, wanted=value)
        return written

    def read_toml(self, value: object) -> object:
        return self._first("read_toml", value)

    def write_toml(self, value: object) -> object:
        for member in self.members:
            try:
                written = member.write_toml(value)
                if _same(self.read_toml(written), value):
                    return written
            except _CannotError:
                continue
        raise _CannotError(f"cannot hold {_shown(value)} in TOML")


@dataclass(frozen=True)
class _Unsupported(Kind):
    """An annotation that has no text: the option keeps its default."""

    hint: str

    @property
    def label(self) -> str:
        return self.hint

    def _refuse(self) -> _CannotError:
        return _CannotError(f"is a {self.hint}, which has no text")

    def read(self, texts: Sequence[str]) -> object:
        raise self._refuse()

    def write(self, value: object) -> list[str]:
        raise self._refuse()

    def read_toml(self, value: object) -> object:
        raise self._refuse()

    def write_toml(self, value: object) -> object:
        raise self._refuse()


_SIMPLE: dict[object, type[_One]] = {
    bool: _Bool,
    int: _Int,
    float: _Float,
    str: _Text,
    Path: _Path,
    type(None): _Nothing,
}
_STRICTEST_FIRST: tuple[type, ...] = (
    _Nothing,
    _Choice,
    _Bool,
    _Int,
    _Float,
    _Pair,
    _Tuple,
    _Path,
    _Text,
)


def _kind(hint: Any) -> Kind:
    if hint in _SIMPLE:
        return _SIMPLE[hint]()
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Choice(tuple(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _Choice(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _Tuple(_kind(arguments[0]))
    if origin is tuple and arguments:
        return _Pair(tuple(map(_kind, arguments)))
    if origin is Union or origin is types.UnionType:
        kinds = [_kind(argument) for argument in arguments]
        supported = [kind for kind in kinds if not isinstance(kind, _Unsupported)]
        if supported:
            rank: dict[type, int] = {
                cls: index for index, cls in enumerate(_STRICTEST_FIRST)
            }
            return _Union(tuple(sorted(supported, key=lambda kind: rank[type(kind)])))
    return _Unsupported(getattr(hint, "__name__", str(hint)))


def _attribute_docs(cls: type) -> dict[str, str]:
    """Return what the ``Attributes:`` sections of a class and its bases say."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs.update(_section(inspect.cleandoc(base.__dict__.get("__doc__") or "")))
    return docs


def _section(docstring: str) -> dict[str, str]:
    """Return the entries of the ``Attributes:`` section of a Google docstring."""
    match = re.search(r"^Attributes:\n((?:[ \t]+.*\n|\n)*)", docstring + "\n", re.M)
    entries: dict[str, str] = {}
    name = ""
    body = inspect.cleandoc("\n" + match[1]) if match else ""
    for line in body.splitlines():
        start = re.match(r"(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if start and not line[0].isspace():
            name = start[1]
            entries[name] = start[2]
        elif name and line.strip():
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries
