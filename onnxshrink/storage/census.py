"""What values a tensor holds: the counts that decide how it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from onnxshrink.tensors import CHUNK, LazyTensor, numpy_type

__all__ = ["MAX_CODES", "Census", "Codes", "casts_of"]

Array = np.ndarray[Any, Any]

MAX_CODES = 256
"""Most distinct values that a codebook holds."""
_SAMPLE = 4096
_HELD = 64 << 20
"""Tensors up to this size are read once and kept while they are encoded."""
_MISS = MAX_CODES

_T = onnx.TensorProto
_INTS = (_T.INT8, _T.UINT8, _T.INT16, _T.UINT16)
_CASTS: dict[int, tuple[int, ...]] = {
    _T.FLOAT: (_T.INT8, _T.UINT8, _T.FLOAT16, _T.BFLOAT16, _T.INT16, _T.UINT16),
    _T.DOUBLE: (*_INTS, _T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.INT32),
    _T.FLOAT16: (_T.INT8, _T.UINT8),
    _T.INT64: (*_INTS, _T.INT32),
    _T.UINT64: (_T.UINT8, _T.UINT16),
    _T.INT32: _INTS,
    _T.UINT32: (_T.UINT8, _T.UINT16),
    _T.INT16: (_T.INT8, _T.UINT8),
    _T.UINT16: (_T.UINT8,),
}


def cast_type(data_type: int) -> np.dtype[Any]:
    """Return the numpy type of an element type that ``casts_of`` may name."""
    return numpy_type(data_type)


def casts_of(data_type: int, opset: int) -> tuple[int, ...]:
    """Return smaller element types that a Cast may widen to ``data_type``."""
    kinds = _CASTS.get(data_type, ())
    return tuple(kind for kind in kinds if kind != _T.BFLOAT16 or opset >= 13)


def survives(values: Array, data_type: int) -> bool:
    """Whether every value comes back with the same bits from a smaller type.

    A NaN never does: a Cast may change its payload.
    """
    small = cast_type(data_type)
    with np.errstate(all="ignore"):
        back = values.astype(small).astype(values.dtype)
    if values.dtype.kind == "f" and np.isnan(values).any():
        return False
    return bool(np.array_equal(bits_view(back), bits_view(values)))


def bits_view(values: Array) -> Array:
    """Return values as unsigned integers of their bit patterns."""
    values = np.ascontiguousarray(values)
    patterns: Array = values.view(f"u{values.dtype.itemsize}")
    return patterns


class Codes:
    """A dictionary from bit patterns to their rank, for whole arrays at once.

    Patterns of 32 and 64 bits are hashed by one multiplication to 16 bits; multipliers
    are tried until no two of the at most 256 patterns collide.
    """

    def __init__(self, keys: Array) -> None:
        """Take sorted distinct bit patterns."""
        self.keys = keys
        width = 8 * keys.dtype.itemsize
        self._wide = width > 16
        if not self._wide:
            self._ranks = np.full(1 << width, _MISS, np.uint16)
            self._ranks[keys] = np.arange(keys.size, dtype=np.uint16)
            return
        self._shift = keys.dtype.type(width - 16)
        multiplier = 0x9E3779B97F4A7C15
        while True:
            self._multiplier = keys.dtype.type((multiplier & (2**width - 1)) | 1)
            places = self._places(keys)
            if np.unique(places).size == keys.size:
                break
            multiplier = (
                multiplier * 6364136223846793005 + 1442695040888963407
            ) % 2**64
        self._ranks = np.full(1 << 16, _MISS, np.uint16)
        self._ranks[places] = np.arange(keys.size, dtype=np.uint16)
        filled = keys if keys.size else np.zeros(1, keys.dtype)
        self._patterns = np.full(1 << 16, filled[0], keys.dtype)
        self._patterns[places] = keys

    def _places(self, patterns: Array) -> Array:
        with np.errstate(over="ignore"):
            places: Array = (patterns * self._multiplier) >> self._shift
        return places

    def ranks(self, patterns: Array) -> Array:
        """Return the rank of each pattern, all of which must be known; uint16."""
        ranks: Array = self._ranks[self._places(patterns) if self._wide else patterns]
        return ranks

    def unknown(self, patterns: Array) -> Array:
        """Return those of the patterns that are not in the dictionary."""
        places = self._places(patterns) if self._wide else patterns
        known = self._ranks[places] != _MISS
        if self._wide:
            known &= self._patterns[places] == patterns
        missing: Array = patterns[~known]
        return missing


class Census:
    """Counts of a tensor's values, gathered chunk by chunk.

    Attributes:
        size: Number of elements.
        dtype: Type of the values; bit patterns are unsigned integers of its size.
        codes: Dictionary of the distinct bit patterns, if there are at most 256.
        default: The bit pattern that sparse forms leave out: the most frequent one,
            or zero bits if there are too many distinct ones to count.
        stored: Number of elements of any other bit pattern.
        casts: Smaller element types that hold every value exactly, smallest first and
            one for each size.
    """

    def __init__(self, tensor: LazyTensor, opset: int) -> None:
        """Read the tensor, twice if it has few distinct values."""
        self._tensor = tensor
        self._held: Array | None = None
        if tensor.nbytes <= _HELD or not tensor.cheap_to_reread:
            self._held = np.ascontiguousarray(tensor.read()).reshape(-1)
        self.size = tensor.size
        self.dtype = tensor.dtype
        self.unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
        self.codes: Codes | None = None
        self.default = 0
        kinds = list(casts_of(tensor.data_type, opset))
        keys = self._distinct_or_sample(kinds)
        if keys is not None:
            self._count_codes(keys, kinds)
        else:
            self._count_defaults(kinds)
        self.casts = _one_of_each_size(kinds)

    def chunks(self) -> Iterator[Array]:
        """Yield the values, flat."""
        if self._held is None:
            yield from self._tensor.chunks()
            return
        step = max(1, CHUNK // self.dtype.itemsize)
        for start in range(0, self.size, step):
            yield self._held[start : start + step]

    def patterns(self) -> Iterator[Array]:
        """Yield the bit patterns, flat."""
        for chunk in self.chunks():
            yield bits_view(chunk)

    def _distinct_or_sample(self, kinds: list[int]) -> Array | None:
        """Return all distinct patterns, or ``None`` once more than 256 turn up.

        In the latter case casts that the sample disproves are struck off ``kinds``.
        """
        keys = np.empty(0, self.unsigned)
        for number, patterns in enumerate(self.patterns()):
            if number == 0:
                sample = np.ascontiguousarray(
                    patterns[:: max(1, patterns.size // _SAMPLE)]
                )
                keys = np.unique(sample)
                values = sample.view(self.dtype)
                kinds[:] = [kind for kind in kinds if survives(values, kind)]
                if keys.size > MAX_CODES:
                    return None
                codes = Codes(keys)
            missing = codes.unknown(patterns)
            while missing.size:
                keys = np.union1d(keys, missing[:_SAMPLE])
                if keys.size > MAX_CODES:
                    return None
                codes = Codes(keys)
                missing = codes.unknown(missing)
        return keys

    def _count_codes(self, keys: Array, kinds: list[int]) -> None:
        self.codes = Codes(keys)
        counts = np.zeros(keys.size, np.int64)
        for patterns in self.patterns():
            counts += np.bincount(self.codes.ranks(patterns), minlength=keys.size)
        commonest = int(counts.argmax())
        self.default = int(keys[commonest])
        self.stored = self.size - int(counts[commonest])
        values = keys.view(self.dtype)
        kinds[:] = [kind for kind in kinds if survives(values, kind)]

    def _count_defaults(self, kinds: list[int]) -> None:
        self.stored = 0
        for chunk in self.chunks():
            self.stored += int(np.count_nonzero(bits_view(chunk)))
            kinds[:] = [kind for kind in kinds if survives(chunk, kind)]

    def entries(self) -> Array:
        """Return the bit patterns that are not the default, in order."""
        parts = [patterns[patterns != self.default] for patterns in self.patterns()]
        return np.concatenate(parts)

    def mask(self) -> Array:
        """Return one bit for each element, 1 where it is not the default; uint8."""
        marks = np.empty(self.size, bool)
        start = 0
        for patterns in self.patterns():
            marks[start : start + patterns.size] = patterns != self.default
            start += patterns.size
        return np.packbits(marks, bitorder="little")

    def ranks(self) -> Array:
        """Return each element's rank among the distinct values; uint8."""
        assert self.codes is not None
        ranks = np.empty(self.size, np.uint8)
        start = 0
        for patterns in self.patterns():
            ranks[start : start + patterns.size] = self.codes.ranks(patterns)
            start += patterns.size
        return ranks

    def steps(self) -> Array:
        """Return the distance of each stored element from the one before; int64.

        The first counts from an imagined element before the first.
        """
        parts = []
        start, last = 0, -1
        for patterns in self.patterns():
            places = np.flatnonzero(patterns != self.default)
            if places.size:
                places += start
                parts.append(np.diff(places, prepend=last).astype(np.uint32))
                last = int(places[-1])
            start += patterns.size
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def _one_of_each_size(kinds: list[int]) -> tuple[int, ...]:
    chosen: dict[int, int] = {}
    for kind in kinds:
        chosen.setdefault(cast_type(kind).itemsize, kind)
    return tuple(chosen[size] for size in sorted(chosen))
