"""The values of a block in the form that is shortest, bit for bit.

Bit patterns are all that counts: a negative zero, a NaN with a payload and any dtype
come back as they were.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxshrink.package.reading import Damaged, Reader, varint
from onnxshrink.package.symbols import (
    decode_symbols,
    encode_symbols,
    repeats,
    squeeze,
    unlzma,
)
from onnxshrink.storage.census import VECTORS, group_tables, vector_table

__all__ = ["Layout", "decode_block", "encode_block"]

Array = np.ndarray[Any, Any]

RAW, LZMA, PLANES, TABLE, MASK, BITS, PARTS = range(7)
_DEEPEST = 4
_MOST_ITEMS = 1 << 26
_WORTH = 0.98
_MASKED = 0.05
"""Share of zeros from which keeping them apart is tried."""
_PIECE = 1 << 16
_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """How the bytes of a block are to be seen.

    Attributes:
        size: Bytes of an element: 1, 2, 4 or 8.
        floating: Whether an element is a sign, an exponent and a mantissa.
        width: Elements in a row, if the block is a matrix; 0 if not.
        inner: Dimensions of a row, of which ``width`` is the product.
        bits: Bits of an element if they are fewer than 8, else 8.
    """

    size: int
    floating: bool = False
    width: int = 0
    bits: int = 8
    inner: tuple[int, ...] = ()


def encode_block(
    data: Array, layout: Layout, *, tiny: bool = False, most: float = math.inf
) -> bytes:
    """Return the shortest form of ``data``, uint8 [bytes].

    Args:
        data: The bytes, little-endian elements in C order.
        layout: What they are; bytes that do not fit it are plain bytes.
        tiny: Try coders that decode slowly as well.
        most: Bytes that decoding may hold at a time; plain bytes need no leave.
    """
    if layout.bits < 8:
        return _encode_bits(data, layout, tiny, most)
    if data.size % layout.size:
        layout = Layout(1)
    items = data.view(f"<u{layout.size}")
    return _encode(items, layout, tiny, inside=False, most=most)


def decode_nbytes(form: int, size: int, count: int) -> int:
    """Return the most bytes that decoding a block holds at a time, result included.

    Args:
        form: First byte of the block.
        size: Bytes of an element.
        count: Bytes of the block when decoded.
    """
    # Symbols, their contexts, and what becomes of them: up to four bytes each.
    numbers = 4 * (count // size)
    if form == RAW:
        return count
    if form == LZMA:
        return count + (4 << 20)
    if form == BITS:
        return 4 * count
    return numbers + (count if form in (TABLE, PARTS) else 2 * count)


def decode_block(reader: Reader, count: int) -> Array:
    """Return the next ``count`` bytes of a tensor, uint8.

    Raises:
        Damaged: The form is not what ``encode_block`` writes.
    """
    return _decode(reader, count, 0)


def _encode_bits(data: Array, layout: Layout, tiny: bool, most: float) -> bytes:
    bits = layout.bits
    group = 8 // bits
    elements = np.empty((data.size, group), np.uint8)
    for place in range(group):
        elements[:, place] = data >> (bits * place) & ((1 << bits) - 1)
    apart = Layout(1, width=layout.width if layout.width % group == 0 else 0)
    left = most - decode_nbytes(BITS, 1, data.size)
    split = _encode(elements.reshape(-1), apart, tiny, inside=False, most=left)
    whole = _encode(data, Layout(1), tiny, inside=False, most=most)
    if elements.size + decode_nbytes(BITS, 1, data.size) > most:
        return whole
    return min(bytes([BITS, bits]) + split, whole, key=len)


def _encode(
    items: Array, layout: Layout, tiny: bool, inside: bool, most: float = math.inf
) -> bytes:
    """Return the shortest form of ``items``; ``inside``: they are part of one."""
    raw = items.view(np.uint8)
    found = [bytes([RAW]) + raw.tobytes()]
    if items.size < 2:
        return found[0]
    table = _distinct(items, layout) if layout.size > 1 else None
    width = layout.width
    zeros = items.size - int(np.count_nonzero(items))
    # A bit for each zero is all that the slow coder should spend on it.
    slow = tiny and (inside or 2 * zeros < items.size)
    if table is not None:
        found.append(_table(items, table, layout, slow))
    else:
        found.append(_planes(items, layout, slow))
        if layout.size > 1 and not inside:
            found += _shared(items, layout, tiny)
    if not inside and _MASKED * items.size <= zeros < items.size:
        mask = (items != 0).view(np.uint8)
        rest = items[items != 0]
        out = bytes([MASK, layout.size]) + varint(rest.size)
        out += encode_symbols(mask, 2, width, tiny=tiny)
        plain = Layout(layout.size, layout.floating)
        out += _encode(rest, plain, tiny, inside=True)
        # Two passes take longer than one.
        if tiny or len(out) < 0.99 * len(found[-1]):
            found.append(out)
    best = min(
        (
            form
            for form in found
            if form[0] == RAW or decode_nbytes(form[0], layout.size, raw.size) <= most
        ),
        key=len,
    )
    if decode_nbytes(LZMA, layout.size, raw.size) > most:
        return best
    if layout.size > 1 and repeats(raw, len(best) / raw.size):
        coded = squeeze(raw.tobytes())
        best = min(best, bytes([LZMA]) + varint(len(coded)) + coded, key=len)
    return best


def _distinct(items: Array, layout: Layout) -> Array | None:
    """Return the values that occur, in numeric order, if they are at most 256."""
    step = max(1, items.size // 4096)
    if np.unique(items[::step]).size > 256:
        return None
    found: Array = np.zeros(0, items.dtype)
    for start in range(0, items.size, 1 << 20):
        part = np.unique(items[start : start + (1 << 20)])
        found = np.union1d(found, part)
        if found.size > 256:
            return None
    if found.size > items.size // 2:
        return None
    if layout.floating:
        sign = found >> np.array(8 * layout.size - 1, items.dtype) != 0
        found = np.concatenate([found[sign][::-1], found[~sign]])
    return found


def _table(items: Array, table: Array, layout: Layout, tiny: bool) -> bytes:
    order = np.argsort(table, kind="stable")
    place = np.searchsorted(table[order], items)
    codes = order.astype(np.uint8)[place]
    plain = Layout(layout.size, layout.floating)
    out = bytes([TABLE, layout.size, table.size - 1])
    out += _encode(np.ascontiguousarray(table), plain, False, inside=True)
    return out + encode_symbols(codes, table.size, layout.width, tiny=tiny)


def _shared(items: Array, layout: Layout, tiny: bool) -> list[bytes]:
    """Return forms by tables of vectors, or of parts, where there are such."""
    found = []
    for dim in VECTORS:
        if (made := vector_table(items, dim)) is not None:
            table, codes = made
            size = dim * layout.size
            out = bytes([TABLE, size, len(table) - 1])
            plain = Layout(layout.size, layout.floating)
            out += _encode(table.reshape(-1), plain, False, inside=True)
            width = layout.width // dim if layout.width % dim == 0 else 0
            out += encode_symbols(codes, len(table), width, tiny=tiny)
            found.append(out)
    rows = items.size // layout.width if layout.width else 0
    if rows and rows * math.prod(layout.inner) == items.size:
        groups = group_tables(items, (rows, *layout.inner))
    else:
        groups = group_tables(items, (items.size,))
    if groups is not None:
        _, parts, behind = groups.split
        number = groups.tables.shape[1]
        out = bytes([PARTS, layout.size, number - 1]) + varint(parts) + varint(behind)
        tables = np.ascontiguousarray(groups.tables.reshape(-1))
        plain = Layout(layout.size, layout.floating)
        out += _encode(tables, plain, False, inside=True)
        codes = groups.ranks.reshape(-1)
        found.append(out + encode_symbols(codes, number, layout.width, tiny=tiny))
    return found


def _planes(items: Array, layout: Layout, tiny: bool) -> bytes:
    size = layout.size
    if layout.floating:
        top = np.array(8 * size - 1, items.dtype)
        items = items << np.array(1, items.dtype) | items >> top
    rows = np.ascontiguousarray(items).view(np.uint8).reshape(-1, size)
    out = bytes([PLANES, size | layout.floating << 7])
    for place in reversed(range(size)):
        plane = np.ascontiguousarray(rows[:, place])
        beside = items.nbytes - items.size
        # Mantissas are all but random: a percent less is not worth a slow plane.
        worth = 0.995 if tiny or size == 1 else _WORTH
        out += encode_symbols(
            plane, 256, layout.width, around=beside, worth=worth, tiny=tiny
        )
    return out


def _decode(reader: Reader, count: int, depth: int) -> Array:
    form = reader.byte()
    if depth > _DEEPEST:
        raise Damaged("forms stand inside each other too often")
    if form == RAW:
        return reader.array(count, "u1")
    if form == LZMA:
        data = reader.take(reader.number(reader.left))
        return np.frombuffer(unlzma(data, count), np.uint8)
    if form == BITS:
        return _decode_bits(reader, count, depth)
    if form not in (PLANES, TABLE, MASK, PARTS):
        raise Damaged(f"there is no form {form}")
    size = reader.byte()
    rotated, size = size >> 7, size & 127
    if not size or count % size or (form in (PLANES, MASK) and size not in _SIZES):
        raise Damaged(f"{count} bytes are no elements of {size}")
    items = count // size
    kind = f"<u{size}"
    if form == PLANES:
        rows = np.empty((items, size), np.uint8)
        for place in reversed(range(size)):
            rows[:, place] = decode_symbols(reader, items, 256)
        values = rows.reshape(-1).view(kind)
        if rotated:
            sign = values << np.array(8 * size - 1, values.dtype)
            values >>= np.array(1, values.dtype)
            values |= sign
        return values.view(np.uint8)
    if form in (TABLE, PARTS):
        number = reader.byte() + 1
        parts, behind = 1, max(1, items)
        if form == PARTS:
            parts, behind = reader.number(max(1, items)), reader.number(max(1, items))
            if (
                not parts * behind
                or items % (parts * behind)
                or parts * number * size > count
            ):
                raise Damaged(f"{items} elements are not {parts} parts of {behind}")
        table = _decode(reader, parts * number * size, depth + 1)
        codes = decode_symbols(reader, items, number)
        return _looked_up(table.reshape(-1, size), codes, parts, behind)
    others = reader.number(items)
    mask = decode_symbols(reader, items, 2).view(np.bool_)
    if int(np.count_nonzero(mask)) != others:
        raise Damaged("a mask does not have the ones it should have")
    out = np.zeros(items, kind)
    out[mask] = _decode(reader, others * size, depth + 1).view(kind)
    return out.view(np.uint8)


def _looked_up(table: Array, codes: Array, parts: int, behind: int) -> Array:
    """Return the bytes of values; ``table`` has the rows of one part after another."""
    size = table.shape[1]
    values = np.ascontiguousarray(table).view(f"V{size}").reshape(parts, -1)
    if parts == 1:
        flat = np.empty(codes.size, values.dtype)
        # numpy makes eight bytes of every place: a piece at a time.
        for start in range(0, codes.size, _PIECE):
            stop = start + _PIECE
            flat[start:stop] = values[0].take(codes[start:stop])
        return flat.view(np.uint8)
    split = codes.reshape(-1, parts, behind)
    out = np.empty(split.shape, values.dtype)
    for part, own in enumerate(values):
        out[:, part] = own.take(split[:, part])
    return out.reshape(-1).view(np.uint8)


def _decode_bits(reader: Reader, count: int, depth: int) -> Array:
    bits = reader.byte()
    if bits not in (1, 2, 4) or depth:
        raise Damaged(f"there are no elements of {bits} bits here")
    group = 8 // bits
    if count * group > _MOST_ITEMS:
        raise Damaged(f"a block has more than {_MOST_ITEMS} elements")
    elements = _decode(reader, count * group, depth + 1).reshape(count, group)
    if int(elements.max(initial=0)) >> bits:
        raise Damaged(f"an element has more than {bits} bits")
    out = np.zeros(count, np.uint8)
    for place in range(group):
        out |= elements[:, place] << np.uint8(bits * place)
    return out
