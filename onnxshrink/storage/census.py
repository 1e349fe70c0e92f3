"""What values a tensor holds: the counts that decide how it is stored.

Tested in tests/storage/test_storage.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxshrink.tensors import CHUNK, LazyTensor, numpy_type

__all__ = [
    "MAX_CODES",
    "VECTORS",
    "Census",
    "Codes",
    "Groups",
    "casts_of",
    "group_tables",
    "vector_table",
]

Array = np.ndarray[Any, Any]

MAX_CODES = 256
"""Most distinct values that a codebook holds."""
VECTORS = (8, 4, 2)
"""Lengths of vectors that may share a table, the longest first."""
_SAMPLE = 4096
MAX_PARTS = 1 << 14
"""Most parts of a tensor that have tables of their own."""
_HELD = 64 << 20
"""Tensors up to this size are read once and kept while they are encoded."""
_WHOLE = 1 << 30
"""Tensors up to this size are searched for tables of vectors."""
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

    def vectors(self) -> list[tuple[int, Array, Array]]:
        """Return length, table and ranks of each kind of vector that has few values."""
        first = next(self.patterns(), np.empty(0, self.unsigned))
        dims = [
            dim
            for dim in VECTORS
            if self.size % dim == 0
            and first.size >= dim
            and len(
                _distinct_rows(
                    first[: min(_SAMPLE * dim, first.size // dim * dim)].reshape(
                        -1, dim
                    )
                )
            )
            <= MAX_CODES
        ]
        if not dims or self._tensor.nbytes > _WHOLE:
            return []
        flat = self._flat()
        found = []
        for dim in dims:
            made = vector_table(flat, dim)
            if made is not None:
                found.append((dim, *made))
        return found

    def groups(self) -> Groups | None:
        """Return tables of parts of the tensor, if these have few distinct values."""
        if self._held is None:
            return None
        return group_tables(bits_view(self._held), self._tensor.shape)

    def _flat(self) -> Array:
        """Return all bit patterns."""
        if self._held is None:
            return np.concatenate(list(self.patterns()))
        return bits_view(self._held)

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


# --- tables of vectors, and tables of parts of a tensor -------------------------------


def vector_table(patterns: Array, dim: int) -> tuple[Array, Array] | None:
    """Find out whether neighbours come in few combinations.

    Args:
        patterns: Bit patterns, flat.
        dim: Length of a vector.

    Returns:
        The distinct vectors [at most 256, dim] and which of them comes where, uint8
        [n / dim]; ``None`` if there are more than 256, or ``dim`` does not divide.
    """
    if not patterns.size or patterns.size % dim:
        return None
    vectors = patterns.reshape(-1, dim)
    step = max(1, len(vectors) // _SAMPLE)
    if len(_distinct_rows(vectors[::step])) > MAX_CODES:
        return None
    mix = np.array([0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64 for i in range(dim)])
    odd = mix.astype(np.uint64) | np.uint64(1)
    keys: Array = np.empty(0, np.uint64)
    hashes = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].astype(np.uint64)
        hashed = np.zeros(len(part), np.uint64)
        with np.errstate(over="ignore"):
            for column in range(dim):
                hashed = (hashed ^ part[:, column]) * odd[column]
                hashed ^= hashed >> np.uint64(29)
        hashes[start : start + CHUNK] = hashed
        missing = Codes(keys).unknown(hashed) if keys.size else hashed
        while missing.size:
            keys = np.union1d(keys, missing[:_SAMPLE])
            if keys.size > MAX_CODES:
                return None
            missing = Codes(keys).unknown(missing)
    ranks = Codes(keys).ranks(hashes).astype(np.uint8)
    table = np.zeros((keys.size, dim), patterns.dtype)
    table[ranks] = vectors
    # Different vectors with one hash show here.
    for start in range(0, len(vectors), CHUNK):
        own = slice(start, start + CHUNK)
        if not np.array_equal(table[ranks[own]], vectors[own]):
            return None
    return table, ranks


def _distinct_rows(vectors: Array) -> Array:
    return np.unique(np.ascontiguousarray(vectors), axis=0)


@dataclass(frozen=True, eq=False)
class Groups:
    """Tables of parts of a tensor, which is read as [before, parts, behind].

    Attributes:
        split: That shape.
        tables: Bit patterns [parts, values], each row ascending, filled up with its
            last value.
        ranks: Which value of its part's table each element is, uint8 of that shape.
    """

    split: tuple[int, int, int]
    tables: Array
    ranks: Array


def group_tables(patterns: Array, shape: Sequence[int]) -> Groups | None:
    """Find out whether parts of a tensor each have few distinct values.

    Tried are the positions along every axis, groups of neighbouring positions, and
    blocks of neighbours in storage order.

    Args:
        patterns: Bit patterns, flat.
        shape: Of the tensor.

    Returns:
        Parts whose tables and packed ranks take fewest bytes, if that is less than
        half of what the patterns take; else ``None``.
    """
    best: tuple[float, tuple[int, int, int], list[Array]] | None = None
    for split in _splits(patterns.size, shape):
        found = _tables_of(patterns.reshape(split))
        if found is None:
            continue
        for width in _divisors(split[1]):
            tables = _joined(found, width)
            if tables is None:
                continue
            count = max(len(table) for table in tables)
            bits = patterns.size * max(1.0, np.log2(count)) / 8
            nbytes = bits + len(tables) * count * patterns.itemsize
            if best is None or nbytes < best[0]:
                joined = (split[0], split[1] // width, split[2] * width)
                best = (nbytes, joined, tables)
    if best is None or best[0] * 2 > patterns.nbytes:
        return None
    _, split, chosen = best
    count = max(len(table) for table in chosen)
    filled = np.stack(
        [np.pad(table, (0, count - len(table)), mode="edge") for table in chosen]
    )
    view = patterns.reshape(split)
    ranks = np.empty(split, np.uint8)
    for part, table in enumerate(chosen):
        ranks[:, part] = np.searchsorted(table, view[:, part])
    return Groups(split, filled, ranks)


def _splits(size: int, shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    seen = set()
    for axis, parts in enumerate(shape):
        before = int(np.prod(shape[:axis], dtype=np.int64))
        split = (before, parts, size // max(before * parts, 1))
        if 1 < parts <= MAX_PARTS and split not in seen:
            seen.add(split)
            yield split
    blocks = 1 << 16
    while blocks >= 64:
        split = (1, size // blocks, blocks)
        fits = size % blocks == 0 and 1 < size // blocks <= MAX_PARTS
        if fits and split not in seen:
            yield split
        blocks //= 2


def _tables_of(view: Array) -> list[Array] | None:
    """Return the distinct values of each part; ``None`` once there are too many."""
    each = view.shape[0] * view.shape[2]
    limit = min(MAX_CODES, each // 4)
    found = []
    for part in range(view.shape[1]):
        own = view[:, part].reshape(-1)
        if len(np.unique(own[: 4 * limit])) > limit:
            return None
        table = np.unique(own)
        if len(table) > limit:
            return None
        found.append(table)
    return found


def _divisors(parts: int) -> list[int]:
    """Return the numbers of neighbouring parts that may be joined."""
    return [n for n in range(1, parts // 2 + 1) if parts % n == 0]


def _joined(found: list[Array], width: int) -> list[Array] | None:
    """Join every ``width`` tables into one; ``None`` if one grows too large."""
    if width == 1:
        return found
    tables = []
    for start in range(0, len(found), width):
        table = np.unique(np.concatenate(found[start : start + width]))
        if len(table) > MAX_CODES:
            return None
        tables.append(table)
    return tables


def _one_of_each_size(kinds: list[int]) -> tuple[int, ...]:
    chosen: dict[int, int] = {}
    for kind in kinds:
        chosen.setdefault(cast_type(kind).itemsize, kind)
    return tuple(chosen[size] for size in sorted(chosen))
