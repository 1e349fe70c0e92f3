"""onnxshrink: make an ONNX model smaller and faster, with proof.

``shrink(model, passes, data=...)`` is the command line in one call; ``Model``,
``Pipeline`` and ``PassManager`` are its parts. Whoever writes a pass imports from
``onnxshrink.base``.

Tested in tests/test_packaging.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from onnxshrink._version import __version__

if TYPE_CHECKING:
    from onnxshrink.base import Context, Pass, Promise, Savings, Site, SitePass
    from onnxshrink.errors import (
        ModelError,
        OnnxshrinkError,
        OutputError,
        PromiseError,
        UsageError,
    )
    from onnxshrink.manager import PassManager, Result, shrink
    from onnxshrink.model import Model, Weight
    from onnxshrink.pipeline import Pipeline
    from onnxshrink.reporting.report import Report
    from onnxshrink.runtime import open_session
    from onnxshrink.samples import Samples, Splits
    from onnxshrink.validation import Budget, Verdict

# Read by onnxruntime when it is first imported, here and in every child.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "Budget": "validation",
    "Context": "base",
    "Model": "model",
    "ModelError": "errors",
    "OnnxshrinkError": "errors",
    "OutputError": "errors",
    "Pass": "base",
    "PassManager": "manager",
    "Pipeline": "pipeline",
    "Promise": "base",
    "PromiseError": "errors",
    "Report": "reporting.report",
    "Result": "manager",
    "Samples": "samples",
    "Savings": "base",
    "Site": "base",
    "SitePass": "base",
    "Splits": "samples",
    "UsageError": "errors",
    "Verdict": "validation",
    "Weight": "model",
    "open_session": "runtime",
    "shrink": "manager",
}

__all__ = [
    "Budget",
    "Context",
    "Model",
    "ModelError",
    "OnnxshrinkError",
    "OutputError",
    "Pass",
    "PassManager",
    "Pipeline",
    "Promise",
    "PromiseError",
    "Report",
    "Result",
    "Samples",
    "Savings",
    "Site",
    "SitePass",
    "Splits",
    "UsageError",
    "Verdict",
    "Weight",
    "__version__",
    "open_session",
    "shrink",
]


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``--help`` stays fast."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'onnxshrink' has no attribute {name!r}")
    return getattr(import_module(f"onnxshrink.{_HOME[name]}"), name)
