"""The three kinds of error a user can meet; anything else is a bug.

``UsageError`` cannot read the request, ``ModelError`` cannot take the model or its
data, ``PromiseError`` broke a promise: a pass or a budget did not hold. All print as
one line and end the command line with exit code 1.

Tested in tests/test_registry.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxshrinkError(Exception):
    """Base of every error that is meant for the user's eyes.

    Attributes:
        exit_code: How the command line ends.
    """

    exit_code = 1


class UsageError(OnnxshrinkError):
    """The request cannot be read: an unknown pass, option, name or value."""


class ModelError(OnnxshrinkError):
    """The model, its external data or the samples cannot be taken as they are."""


class OutputError(OnnxshrinkError):
    """The output cannot be written: no space, no permission, or it is the input."""


class Cancelled(OnnxshrinkError):  # noqa: N818  # nothing went wrong
    """The caller asked to stop; nothing was written."""


class PromiseError(OnnxshrinkError):
    """A pass broke its promise or the user's budget."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""
