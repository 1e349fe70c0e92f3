"""Choosing by name: what ``only=`` and ``skip=`` mean in every pass.

Tested in tests/test_base.py.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

__all__ = ["selected"]


def selected(
    names: Iterable[str], only: Sequence[str] = (), skip: Sequence[str] = ()
) -> bool:
    """Whether something known by these names is chosen by ``only`` and ``skip``.

    Args:
        names: Everything it answers to: weight name, node name, op type.
        only: Names or glob patterns; empty chooses everything.
        skip: Names or glob patterns; wins over ``only``.
    """
    known = [name for name in names if name]

    def matches(patterns: Sequence[str]) -> bool:
        return any(
            name == pattern or fnmatch.fnmatchcase(name, pattern)
            for pattern in patterns
            for name in known
        )

    return (not only or matches(only)) and not matches(skip)
