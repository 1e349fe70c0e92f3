"""Task metrics: fed with outputs and labels batch by batch, then read.

Tested in tests/validation/test_validator.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.errors import ModelError, UsageError, nearest
from onnxshrink.measuring.differences import matrix
from onnxshrink.samples.columns import Array, Spool
from onnxshrink.validation.tokens import Tokens

__all__ = [
    "BUILT_IN",
    "Custom",
    "Metric",
    "MetricChange",
    "NextToken",
    "Perplexity",
    "Spearman",
    "Squared",
    "Task",
    "Top",
    "fingerprint_of",
    "imported",
]

Metric = str | Callable[[Mapping[str, Any], Any], float] | None
"""A built-in name, ``module:function``, ``file.py:function``, a callable, or none."""


@dataclass(frozen=True)
class MetricChange:
    """The task metric before and after.

    Attributes:
        name: Name of the metric.
        before: Of the reference.
        after: Of the candidate.
        lower_is_better: Whether a smaller value is better, as for an error.
    """

    name: str
    before: float
    after: float
    lower_is_better: bool = False

    @property
    def drop(self) -> float:
        """How much worse it became; negative if it became better."""
        change = self.before - self.after
        return -change if self.lower_is_better else change

    def to_json(self) -> dict[str, object]:
        """Return the figures for a report."""
        return {**dataclasses.asdict(self), "drop": self.drop}


class Task(ABC):
    """A task metric: fed with outputs and labels, then read.

    Attributes:
        name: Its name.
        lower_is_better: Whether a smaller value is better.
        percent: Whether it is in percent.
        reads: Names of the outputs it looks at; ``None`` if that may be any.
        wants_inputs: Whether it looks at inputs.
    """

    name: str
    lower_is_better = False
    percent = False
    reads: frozenset[str] | None = None
    wants_inputs = False

    @abstractmethod
    def start(self) -> None:
        """Forget what was fed."""

    @abstractmethod
    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""

    def read(self, inputs: Mapping[str, Array]) -> None:  # noqa: B027  # few need it
        """Look at the inputs of the batch that is fed next."""

    @abstractmethod
    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""


class Top(Task):
    """Percent of samples whose label is among the ``k`` highest scores."""

    percent = True

    def __init__(self, output: str, k: int) -> None:
        self.name, self._output, self._k = f"top{k}", output, k
        self.reads = frozenset([output])
        self.start()

    def start(self) -> None:
        """Forget what was fed."""
        self._hits = self._count = 0

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        assert labels is not None
        scores = matrix(outputs[self._output])
        wanted = labels.reshape(-1).astype(np.int64)
        rows = np.arange(len(scores))
        if len(wanted) != len(scores):
            raise ModelError(
                f"{len(wanted)} labels for {len(scores)} rows of {self._output!r}"
            )
        if self._k == 1:
            hit = scores.argmax(axis=1) == wanted
        else:
            mine = scores[rows, wanted]
            hit = (scores > mine[:, None]).sum(axis=1) < self._k
        # A NaN score is never a hit, though it sorts as the largest.
        hit &= ~np.isnan(scores).any(axis=1)
        self._hits += int(hit.sum())
        self._count += len(scores)

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        return 100.0 * self._hits / max(1, self._count)


class Squared(Task):
    """Mean squared error of an output against labels of the same size."""

    name = "mse"
    lower_is_better = True

    def __init__(self, output: str) -> None:
        self._output = output
        self.reads = frozenset([output])
        self.start()

    def start(self) -> None:
        """Forget what was fed."""
        self._sum, self._count = 0.0, 0

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        assert labels is not None
        out = np.asarray(outputs[self._output], np.float64).reshape(len(labels), -1)
        wanted = labels.reshape(len(labels), -1).astype(np.float64)
        self._sum += float(np.square(out - wanted).sum())
        self._count += out.size

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        return self._sum / max(1, self._count)


class Spearman(Task):
    """Spearman's rank correlation of an output, one value a sample, with labels."""

    name = "spearman"

    def __init__(self, output: str) -> None:
        self._output = output
        self.reads = frozenset([output])
        self.start()

    def start(self) -> None:
        """Forget what was fed."""
        self._values: list[Array] = []

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        self._values.append(np.asarray(outputs[self._output], np.float64).reshape(-1))

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        from scipy.stats import rankdata

        assert labels is not None
        one = rankdata(np.concatenate(self._values))
        two = rankdata(labels.reshape(-1)[: len(one)])
        one, two = one - one.mean(), two - two.mean()
        scale = math.sqrt(float(one @ one) * float(two @ two))
        return float(one @ two) / scale if scale else 0.0


class NextToken(Task):
    """Percent of positions whose most likely next token is the reference's."""

    name = "next-token"
    wants_inputs = True
    percent = True

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.reads = frozenset({tokens.logits})
        self._wanted: list[Array] = []
        self._is_known = False
        self.start()

    def start(self) -> None:
        """Forget what was fed, but for the reference, which is fed first."""
        self._hits = self._count = self._batch = 0
        self._inputs: Mapping[str, Array] = {}

    def read(self, inputs: Mapping[str, Array]) -> None:
        """Look at the inputs of the batch that is fed next."""
        self._inputs = inputs

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        rows = self._tokens.rows(self._inputs, outputs[self._tokens.logits])
        best = rows.argmax(axis=-1)
        # A NaN score is never a hit, though it sorts as the largest.
        best = np.where(np.isnan(rows).any(axis=-1), -1, best)
        if not self._is_known:
            self._wanted.append(best)
        self._hits += int((best == self._wanted[self._batch]).sum())
        self._count += len(best)
        self._batch += 1

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        self._is_known = True
        return 100.0 * self._hits / max(1, self._count)


class Perplexity(Task):
    """Perplexity of the text that was fed: e to the mean negative log-likelihood."""

    name = "perplexity"
    wants_inputs = True
    lower_is_better = True

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.reads = frozenset({tokens.logits})
        self.start()

    def start(self) -> None:
        """Forget what was fed."""
        self._sum, self._count = 0.0, 0
        self._inputs: Mapping[str, Array] = {}

    def read(self, inputs: Mapping[str, Array]) -> None:
        """Look at the inputs of the batch that is fed next."""
        self._inputs = inputs

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        logits = outputs[self._tokens.logits]
        rows, wanted = self._tokens.next_tokens(self._inputs, logits)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].astype(np.float32)
            mine = part[np.arange(len(part)), wanted[start : start + _ROWS]]
            top = part.max(axis=1)
            with np.errstate(over="ignore", invalid="ignore"):
                total = np.exp(part - top[:, None]).sum(axis=1, dtype=np.float64)
                self._sum += float((np.log(total) + top - mine).sum())
        self._count += len(rows)

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        mean = self._sum / max(1, self._count)
        return math.exp(mean) if mean < _MOST_NATS else math.inf


class Custom(Task):
    """A user's function of all outputs and all labels."""

    def __init__(self, function: Callable[[Mapping[str, Any], Any], float]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.lower_is_better = bool(getattr(function, "lower_is_better", False))
        self._function = function
        self.start()

    def start(self) -> None:
        """Forget what was fed."""
        self._spools: dict[str, Spool] = {}
        self._others: dict[str, list[Any]] = {}
        self._batches = 0

    def feed(self, outputs: Mapping[str, Any], labels: Array | None) -> None:
        """Take in one batch."""
        for name, value in outputs.items():
            if (
                isinstance(value, np.ndarray)
                and value.ndim
                and not value.dtype.hasobject
            ):
                if name not in self._spools:
                    self._spools[name] = Spool(name)
                self._spools[name].add(value, self._batches)
            else:
                self._others.setdefault(name, []).append(value)
        self._batches += 1

    def value(self, labels: Array | None) -> float:
        """Return the metric over what was fed."""
        outputs: dict[str, Any] = dict(self._others)
        for name, spool in self._spools.items():
            outputs[name] = spool.whole()
        try:
            found = float(self._function(outputs, labels))
        except Exception as error:
            raise ModelError(
                f"metric {self.name} failed: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(found):
            raise ModelError(f"metric {self.name} gave {found}, not a finite number")
        return found


BUILT_IN = ("top1", "top5", "mse", "spearman", "next-token", "perplexity")
TOKENS = ("next-token", "perplexity")
"""Those that read token ids instead of labels."""
_ROWS = 64
"""Rows of logits that are looked at together."""
_MOST_NATS = 700.0


def fingerprint_of(metric: Metric) -> str:
    """Return what tells a metric from another: its name, and the code behind it."""
    if metric is None:
        return ""
    function: Any = metric
    text = ""
    if isinstance(metric, str):
        if ":" not in metric:
            return metric
        function, text = imported(metric), metric
    with suppress(OSError, TypeError, KeyError, AttributeError):
        code = inspect.getsource(sys.modules[function.__module__])
        text += hashlib.sha256(code.encode()).hexdigest()
    with suppress(OSError, TypeError):
        text += hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    file = metric.rpartition(":")[0] if isinstance(metric, str) else ""
    if file.endswith(".py"):
        text += hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return text or repr(type(function))


def imported(text: str) -> Callable[[Mapping[str, Any], Any], float]:
    """Return the function of ``module:function`` or ``file.py:function``."""
    where, _, name = text.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            if spec is None or spec.loader is None:
                raise ImportError(f"cannot import {where}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            here = os.getcwd()
            if here not in sys.path:
                sys.path.append(here)
            module = importlib.import_module(where)
    except Exception as error:
        raise UsageError(
            f"metric {text!r}: cannot import {where}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value)]
        raise UsageError(
            f"metric {text!r}: {where} has no function {name!r}.{nearest(name, known)}"
        )
    return function  # type: ignore[no-any-return]  # whatever the user's module holds
