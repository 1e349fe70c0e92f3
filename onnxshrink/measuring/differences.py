"""How outputs differ from the reference's: stores and running comparisons.

Tested in tests/validation/test_validator.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.samples.columns import Array

__all__ = [
    "EMPTY",
    "Difference",
    "OutputMetrics",
    "Seen",
    "Store",
    "is_float",
    "matrix",
    "plain",
]

EMPTY = "empty: there was no value to compare"
"""The note of an output without values."""
_IN_MEMORY = 32 << 20
"""Bytes of a model's outputs from which they are kept on disk."""
_FILL = 1e30
"""Values beyond this are fills of a mask: they are compared as infinities are."""


@dataclass(frozen=True)
class OutputMetrics:
    """How one output differs from the reference, over all samples.

    Values that are infinite, NaN or beyond 1e30 in both at the same place take no part.

    Attributes:
        max_abs: Largest absolute error.
        max_rel: ``max_abs`` over the largest absolute value of the reference.
        sqnr_db: ``10 log10(sum ref^2 / sum (out - ref)^2)``; infinite if exact.
        cosine: Mean over samples of the cosine between output and reference.
        agreement: Share of samples with the same top class, where the output is class
            scores; share of equal values where it is integers, booleans or strings.
        nan: Values that are NaN here and not in the reference.
        inf: Values that are infinite here and not in the reference.
        reshaped: Batches whose shape differs; they count as if the output were zero.
        note: Why the output is not compared, if so.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    sqnr_db: float = math.inf
    cosine: float | None = None
    agreement: float | None = None
    nan: int = 0
    inf: int = 0
    reshaped: int = 0
    note: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the figures; an infinite SQNR, which is an exact output, is null."""
        data = dataclasses.asdict(self)
        for key, value in data.items():
            if isinstance(value, float) and not math.isfinite(value):
                data[key] = None
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputMetrics:
        """Read what ``to_json`` gave."""
        known = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        for key in ("max_abs", "max_rel", "sqnr_db"):
            known[key] = math.inf if known[key] is None else known[key]
        return cls(**known)


class Store:
    """Outputs of every batch, in memory up to 32 MB and in a temporary file beyond."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Any]] = []
        self._memory = 0
        self._file: Any = None

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Append one batch."""
        kept: dict[str, Any] = {}
        for name, value in outputs.items():
            plain = isinstance(value, np.ndarray) and not value.dtype.hasobject
            if not plain or self._memory + value.nbytes <= _IN_MEMORY:
                self._memory += value.nbytes if plain else 0
                kept[name] = value
                continue
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # finalizer
                weakref.finalize(self, self._file.close)
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(value).tobytes())
            kept[name] = _OnDisk(at, value.shape, value.dtype)
        self._batches.append(kept)

    def read(self, index: int) -> dict[str, Any]:
        """Return one batch."""
        return {
            name: self._load(value) if isinstance(value, _OnDisk) else value
            for name, value in self._batches[index].items()
        }

    def _load(self, where: _OnDisk) -> Array:
        self._file.seek(where.offset)
        data = self._file.read(math.prod(where.shape) * where.dtype.itemsize)
        return np.frombuffer(data, where.dtype).reshape(where.shape)


@dataclass(frozen=True)
class _OnDisk:
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


# --- comparing --------------------------------------------------------------------


def is_float(value: object) -> bool:
    """Whether a value is an array of floats."""
    return isinstance(value, np.ndarray) and (
        value.dtype.kind == "f" or value.dtype.name in ("bfloat16",)
    )


def matrix(value: Array) -> Array:
    """View [samples, classes, 1, ...] as [samples, classes]."""
    return value.reshape(value.shape[0], value.shape[1])


def _scores_shape(value: object, samples: int) -> bool:
    """Whether a value has the shape of class scores: [samples, classes >= 2, 1...]."""
    return (
        is_float(value)
        and isinstance(value, np.ndarray)
        and value.ndim >= 2
        and value.shape[0] == samples
        and value.shape[1] >= 2
        and all(size == 1 for size in value.shape[2:])
    )


class Seen:
    """What the reference pass learns about one output.

    Attributes:
        scale: Largest absolute value.
        power: Sum of squares.
        scores: Whether the output still has the shape of class scores.
        classes: Number of classes, if so.
        values: How many values were looked at.
        dtype: Dtype of the output.
        stable: Whether the reference repeats itself.
    """

    def __init__(self) -> None:
        self.scale = 0.0
        self.power = 0.0
        self.scores = True
        self.classes = 0
        self.values = 0
        self.dtype: np.dtype[Any] | None = None
        self.stable = True
        self._unit = True
        self._negative = False

    def update(self, name: str, value: Any, samples: int) -> None:
        """Take in one batch."""
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            self.scores = False
            for item in value:
                self.update(name, item, samples)
            return
        if isinstance(value, (float, int)):
            value = np.asarray(value)
        if not isinstance(value, np.ndarray):
            self.scores = False
            return
        self.dtype = value.dtype
        self.values += value.size
        if not is_float(value):
            self.scores = False
            return
        wide = plain(value.astype(np.float64))
        if wide.size:
            self.scale = max(self.scale, float(np.abs(wide).max()))
            self.power += float(wide @ wide)
        if not _scores_shape(value, samples) or _EMBEDDING.search(name):
            self.scores = False
            return
        rows = matrix(value).astype(np.float64)
        self.classes = rows.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.sqrt(np.square(rows).sum(axis=1))
        self._unit &= bool(np.all(np.abs(length - 1) < 1e-3))
        self._negative |= bool((rows < 0).any())

    @property
    def is_scores(self) -> bool:
        """Whether the output may be taken for class scores where nobody says.

        [samples, classes] floats may, unless the name speaks of an embedding or every
        row is a unit vector with negative entries, as normalised embeddings are. A
        verdict goes by ``onnxshrink.validation.kinds`` instead.
        """
        return self.scores and not (self._unit and self._negative)


_EMBEDDING = re.compile(r"embed|hidden|feature|pooler|pooled", re.IGNORECASE)


class Difference:
    """Running comparison of one output with its reference.

    Attributes:
        max_abs: Largest absolute error of floats.
        noise: Sum of squared errors.
        values: How many values of the reference were compared.
        far: Values that are another integer, boolean or string, for 8-bit ones by more
            than one step, and floats that are finite only here.
    """

    def __init__(self, scores: bool) -> None:
        self._scores = scores
        self.max_abs = 0.0
        self.noise = 0.0
        self._cosine = 0.0
        self._samples = 0
        self._same = 0
        self._compared = 0
        self.nan = self.inf = self.reshaped = 0
        self.note = ""
        self.far = 0
        self.values = 0

    def update(self, reference: Any, value: Any, samples: int) -> None:
        """Take in one batch."""
        if not isinstance(reference, np.ndarray) or not isinstance(value, np.ndarray):
            self._compare_objects(reference, value, samples)
            return
        self.values += reference.size
        if reference.shape != value.shape:
            self.reshaped += 1
            self._compared += reference.size
            if is_float(reference):
                wide = plain(reference.astype(np.float64))
                self.noise += float(wide @ wide)
                self.max_abs = max(self.max_abs, float(np.abs(wide).max(initial=0)))
            return
        if not is_float(reference):
            self._compare_equal(reference, value)
            return
        self._compare_floats(
            reference.astype(np.float64), value.astype(np.float64), samples
        )

    def _compare_objects(self, reference: Any, value: Any, samples: int) -> None:
        """Compare sequences and maps item by item, as far as they correspond."""
        if isinstance(reference, (list, tuple)) and isinstance(value, (list, tuple)):
            if len(reference) != len(value):
                self.reshaped += 1
            for one, two in zip(reference, value, strict=False):
                self.update(one, two, samples)
        elif isinstance(reference, dict) and isinstance(value, dict):
            if reference.keys() != value.keys():
                self.reshaped += 1
            for key in reference.keys() & value.keys():
                self.update(np.asarray(reference[key]), np.asarray(value[key]), samples)
        elif reference is None and value is None:
            return
        elif isinstance(reference, (float, int)) and isinstance(value, (float, int)):
            self.update(np.asarray(reference), np.asarray(value), samples)
        else:
            self.note = (
                f"{type(reference).__name__} cannot be compared with "
                f"{type(value).__name__}"
            )

    def _compare_equal(self, reference: Array, value: Array) -> None:
        same = reference == value
        self._compared += reference.size
        self._same += int(np.count_nonzero(same))
        if reference.dtype.kind in "iu" and reference.dtype.itemsize == 1:
            # 8-bit values are quantized floats: one step is the rounding of a tie.
            step = np.abs(reference.astype(np.int64) - value.astype(np.int64))
            self.far += int((step > 1).sum())
        else:
            self.far += reference.size - int(np.count_nonzero(same))

    def _compare_floats(self, ref: Array, out: Array, samples: int) -> None:
        nan = np.isnan(out) & ~np.isnan(ref)
        inf = np.isinf(out) & ~(np.isinf(ref) & (np.sign(ref) == np.sign(out)))
        self.nan += int(nan.sum())
        self.inf += int(inf.sum())
        special = ~(np.isfinite(ref) & np.isfinite(out))
        self.far += int((~np.isfinite(ref) & np.isfinite(out)).sum())
        fills = (np.abs(ref) >= _FILL) & (np.abs(out) >= _FILL)
        special |= fills & (np.sign(ref) == np.sign(out))
        if special.any():
            ref, out = np.where(special, 0, ref), np.where(special, 0, out)
        with np.errstate(over="ignore"):
            error = out - ref
            self.max_abs = max(self.max_abs, float(np.abs(error).max(initial=0)))
            self.noise += float(np.square(error).sum())
        if ref.ndim and ref.shape[0] == samples and ref.size:
            self._compare_rows(
                ref.reshape(samples, -1), out.reshape(samples, -1), samples
            )

    def _compare_rows(self, ref: Array, out: Array, samples: int) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            dot = np.einsum("ij,ij->i", ref, out)
            size = np.sqrt(np.square(ref).sum(1) * np.square(out).sum(1))
            equal = np.all(ref == out, axis=1)
            cosine = np.where(equal, 1.0, dot / np.where(size > 0, size, np.inf))
        self._cosine += float(np.nan_to_num(cosine).sum())
        self._samples += samples
        if self._scores:
            best = ref.max(axis=1)
            # A tie of the reference, up to float noise, may fall either way.
            slack = 1e-6 * np.abs(ref).max(axis=1)
            chosen = ref[np.arange(samples), out.argmax(axis=1)]
            self._same += int((chosen >= best - slack).sum())
            self._compared += samples

    def result(self, seen: Seen) -> OutputMetrics:
        """Return the metrics."""
        if not seen.stable:
            return OutputMetrics(
                note="random: the reference differs from itself",
                nan=self.nan,
                inf=self.inf,
            )
        if not self.values and not self.note and not self.reshaped:
            return OutputMetrics(note=EMPTY)
        if self.noise == 0:
            sqnr = math.inf
        elif seen.power == 0 or not math.isfinite(self.noise):
            sqnr = -math.inf
        else:
            sqnr = 10 * math.log10(seen.power / self.noise)
        return OutputMetrics(
            max_abs=self.max_abs,
            max_rel=self.max_abs / seen.scale if seen.scale else self.max_abs,
            sqnr_db=sqnr,
            cosine=self._cosine / self._samples if self._samples else None,
            agreement=self._same / self._compared if self._compared else None,
            nan=self.nan,
            inf=self.inf,
            reshaped=self.reshaped,
            note=self.note,
        )


def plain(values: Array) -> Array:
    """Return the finite values that are no mask's fill."""
    return values[np.isfinite(values) & (np.abs(values) < _FILL)]
