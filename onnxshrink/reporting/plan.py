"""What a pipeline would do, before it does anything.

Tested in tests/reporting/test_report.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxshrink.base import Pass, Site

__all__ = ["Planned"]


@dataclass(frozen=True)
class Planned:
    """What a pass would do.

    Attributes:
        pass_: The pass.
        sites: Where it would act; ``None`` if it does not list places.
        skipped: (where, why) of what it would leave alone.
        note: What the plan cannot say.
    """

    pass_: Pass
    sites: tuple[Site, ...] | None
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
