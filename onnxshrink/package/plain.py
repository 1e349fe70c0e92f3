"""The format once more: a decoder in plain Python and numpy that shares no code.

``docs/package-format.md`` as a program, one number at a time: slow, and the proof that
the page says enough. Run ``python -m onnxshrink.package.plain X.onnxz OUT.onnx``.
"""

from __future__ import annotations

import lzma
import math
import struct
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from onnxshrink.package.words import WORDS


class _Stream:
    """Bytes read in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("damaged: bytes are missing")
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift


def _unlzma(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 22}]
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=filters)


def decode_files(package: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file; the model comes first and has no name."""
    length, checksum = struct.unpack("<II", package[-8:])
    index = _Stream(package[-8 - length : -8])
    if package[:6] != b"ONNXZ\x01" or zlib.crc32(index.data) != checksum:
        raise ValueError("no package of version 1, or damaged")
    if method := index.take(1)[0]:
        index.number()
        rest = index.data[index.at :]
        inflate = zlib.decompressobj(-15, zdict=WORDS)
        index = _Stream(inflate.decompress(rest) if method == 1 else _unlzma(rest))
    files = []
    for _ in range(index.number()):
        name = index.take(index.number()).decode()
        files.append((name, [index.number() for _ in range(index.number())]))
    at, tensors = 6, []
    for _ in range(index.number()):
        size, blocks = index.number(), index.number()
        each = index.number() if blocks > 1 else size
        places = []
        for _ in range(blocks):
            stored = index.number()
            places.append((at, stored, *struct.unpack("<I", index.take(4))))
            at += stored
        tensors.append((size, each, places))
    for name, pieces in files:
        out = b""
        for piece in pieces:
            if not piece & 1:
                out += index.take(piece >> 1)
                continue
            size, each, places = tensors[piece >> 1]
            for place, (start, stored, checksum) in enumerate(places):
                coded = _Stream(package[start : start + stored])
                raw = block(coded, min(each, size - place * each))
                if zlib.crc32(raw) != checksum:
                    raise ValueError(f"damaged: checksum of tensor {piece >> 1}")
                out += raw
        yield name, out


def block(stream: _Stream, count: int) -> bytes:
    """Return ``count`` bytes of a tensor."""
    form = stream.take(1)[0]
    if form < 2:
        return _unlzma(stream.take(stream.number())) if form else stream.take(count)
    size = stream.take(1)[0]
    if form == 5:  # elements of 1, 2 or 4 bits, the lowest first
        small = np.frombuffer(block(stream, count * (8 // size)), np.uint8)
        whole = small.reshape(count, -1) << np.arange(0, 8, size)
        return bytes(whole.sum(axis=1).tolist())
    rotated, size = size >> 7, size & 127
    items = count // size
    if form == 2:  # planes, the highest byte first
        planes = [symbols(stream, items, 256) for _ in range(size)][::-1]
        bytes_ = np.array(planes, np.uint8).reshape(size, items).T
        values = np.ascontiguousarray(bytes_).view(f"<u{size}")
        one, top = values.dtype.type(1), values.dtype.type(8 * size - 1)
        return bytes(values >> one | values << top if rotated else values)
    if form in (3, 6):  # a table, or one for each part, and codes
        number = stream.take(1)[0] + 1
        parts, behind = [stream.number() if form == 6 else n for n in (1, items)]
        table = block(stream, parts * number * size)
        codes = enumerate(symbols(stream, items, number))
        rows = [(n // behind % parts * number + code) * size for n, code in codes]
        return b"".join(table[at : at + size] for at in rows)
    if form == 4:  # where values are not zero, and those that are not
        others, mask = stream.number(), symbols(stream, items, 2)
        rest = _Stream(block(stream, others * size))
        return b"".join(rest.take(size) if bit else bytes(size) for bit in mask)
    raise ValueError(f"damaged: form {form}")


def symbols(stream: _Stream, count: int, alphabet: int) -> list[int]:
    """Return ``count`` numbers below ``alphabet``."""
    coder = stream.take(1)[0]
    if coder == 0:  # packed in 1, 2, 4 or 8 bits, the lowest first
        bits = next(b for b in (1, 2, 4, 8) if alphabet <= 1 << b)
        data = stream.take((count * bits + 7) // 8)
        places = [place * bits for place in range(count)]
        return [data[at // 8] >> at % 8 & (1 << bits) - 1 for at in places]
    if coder == 1:  # all the same
        return [*stream.take(1) * count]
    if coder in (4, 7):
        data = stream.take(stream.number())
        return [*(_unlzma(data) if coder == 4 else zlib.decompress(data, -15))]
    if coder == 6:
        width = min(stream.number(), count) or max(1, count)
        bits_of = _Arithmetic(stream.take(stream.number()))
        bits = (alphabet - 1).bit_length() or 1
        model = mask_of if alphabet == 2 else partial(tree_of, bits)
        return model(bits_of, count, width)
    used: list[int] = []
    for _ in range(stream.number() + 1):  # runs of symbols that occur
        start = (used[-1] + 1 if used else 0) + stream.number()
        used += range(start, start + stream.number() + 1)
    if coder == 5:
        return [used[code] for code in huffman(stream, count, len(used))]
    contexts, where = 1, [0] * count
    if coder == 3:
        width, contexts = stream.number(), stream.take(1)[0] + 1
        rows = symbols(stream, count // width, contexts)
        columns = symbols(stream, width, contexts)
        where = [min(contexts - 1, row + column) for row in rows for column in columns]
    return [used[code] for code in rans(stream, len(used), contexts, where)]


def rans(stream: _Stream, alphabet: int, contexts: int, where: list[int]) -> list[int]:
    """Return a number below ``alphabet`` for each context in ``where``."""
    tables = []
    for _ in range(contexts):
        freqs = [stream.number() for _ in range(alphabet - 1)]
        freqs.append(4096 - sum(freqs))
        tables.append([(c, f, low) for c, f in enumerate(freqs) for low in range(f)])
    lanes, size = stream.number(), stream.number()
    states = [*struct.unpack(f"<{lanes}I", stream.take(4 * lanes))]
    words = iter(struct.unpack(f"<{size}H", stream.take(2 * size)))
    bits = max(1, (alphabet - 1).bit_length())
    tail, out = 16 // bits, []
    for place in range(len(where) - lanes * tail):
        state = states[place % lanes]
        code, freq, below = tables[where[place]][state % 4096]
        state = state // 4096 * freq + below
        states[place % lanes] = state if state >> 16 else state << 16 | next(words)
        out.append(code)
    for place in range(tail):  # the last numbers stand in the states
        out += [state - 65536 >> place * bits & (1 << bits) - 1 for state in states]
    return out


def huffman(stream: _Stream, count: int, alphabet: int) -> list[int]:
    """Return ``count`` numbers below ``alphabet`` from canonical Huffman codes."""
    halves = stream.take((alphabet + 1) // 2)
    lengths = [byte >> shift & 15 for byte in halves for shift in (0, 4)][:alphabet]
    table: list[tuple[int, int]] = []
    for length, code in sorted((length, code) for code, length in enumerate(lengths)):
        table += [(code, length)] * (1 << 12 - length)
    lanes, size = stream.number(), stream.number()
    words = iter(struct.unpack(f"<{size}H", stream.take(2 * size)))
    windows, held, out = [0] * lanes, [0] * lanes, []
    for place in range(count):
        lane = place % lanes
        if held[lane] < 12:
            windows[lane] = windows[lane] << 16 | next(words)
            held[lane] += 16
        code, length = table[windows[lane] >> held[lane] - 12 & 4095]
        held[lane] -= length
        out.append(code)
    return out


class _Arithmetic:
    """Reads bits of known probability, in 1/65536, from an interval of 32 bits."""

    def __init__(self, data: bytes) -> None:
        self.low, self.high, self.data = 0, 2**32 - 1, iter(data[4:])
        self.value = int.from_bytes(data[:4].ljust(4, b"\0"))

    def bit(self, one: int) -> int:
        middle = self.low + ((self.high - self.low) * one >> 16)
        bit = int(self.value <= middle)
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        while self.low >> 24 == self.high >> 24:
            self.low = (self.low & 0xFFFFFF) << 8
            self.high = (self.high & 0xFFFFFF) << 8 | 255
            self.value = (self.value & 0xFFFFFF) << 8 | next(self.data, 0)
        return bit


def _limited(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


_LOGITS = range(-2047, 2048)
_SQUASH = [
    _limited(round(65536 / (1 + math.exp(-x / 256))), 32, 65504) for x in _LOGITS
]
_STRETCH = np.searchsorted(_SQUASH, 4 * np.arange(16384) + 2).clip(0, 4094) - 2047


def coded(arithmetic: _Arithmetic, guesses: list[list[int]], weights: list[int]) -> int:
    """Return a bit; weights and guesses (probability, times asked, limit) learn it."""
    mixed, logits = _limited(guesses[0][0], 16, 65500), []
    if len(guesses) > 1:
        shares = [mixed, *(guess[0] for guess in guesses[1:])]
        logits = [int(_STRETCH[share >> 2]) for share in shares]
        total = sum(w * s for w, s in zip(weights, logits, strict=True)) >> 16
        mixed = _SQUASH[_limited(total, -2047, 2047) + 2047]
    bit = arithmetic.bit(mixed)
    for place, logit in enumerate(logits):
        weights[place] += logit * (65535 * bit - mixed) >> 16
    for guess in guesses:
        guess[0] += (65535 * bit - guess[0]) * 2 // (2 * guess[1] + 3)
        guess[1] = min(guess[1] + 1, guess[2])
    return bit


def tree_of(bits: int, reader: _Arithmetic, count: int, width: int) -> list[int]:
    """Return numbers of ``bits`` bits, each read from its highest bit on."""
    out = []
    alone = [[32768, 0, 1020] for _ in range(1 << bits)]
    weights = [[65536, 0, 0] for _ in range(1 << bits)]
    known: dict[tuple[str, int, int], list[int]] = {}
    for place in range(count):
        node = 1
        while not node >> bits:
            guesses = [alone[node]]
            for axis, line in (("column", place % width), ("row", place // width)):
                if width < count:
                    fresh = [_limited(alone[node][0], 16, 65500), 4, 255]
                    guesses.append(known.setdefault((axis, line, node), fresh))
            node = node << 1 | coded(reader, guesses, weights[node])
        out.append(node - (1 << bits))
    return out


def mask_of(reader: _Arithmetic, count: int, width: int) -> list[int]:
    """Return zeros and ones, row by row."""
    out: list[int] = []
    ones, weights = [0] * width, [50000, 12000, 12000]
    known: dict[tuple[int, ...], list[int]] = {}

    def seen(row: int, column: int) -> int:
        return out[row * width + column] if row >= 0 and 0 <= column < width else 0

    share = expected = here = 0
    for place in range(count):
        row, column = divmod(place, width)
        if column == 0:
            share = (2 * sum(out) + 1 << 16) // (2 * place + 2)
            expected = here = 0
        own = ((ones[column] << 16) + 10 * share) // (row + 10)
        odds = own * ((here << 16) + 160 * share)
        against = (65536 - own) * (expected + 160 * share)
        guess = _limited((odds << 16) // (odds + against or 1), 16, 65500)
        logit = int(_STRETCH[guess >> 2])
        left = [seen(row, column - back) for back in (1, 2, 3)]
        up = [seen(row - 1, column + beside) for beside in (-1, 0, 1)]
        first = (1, logit >> 6, *left[:2], *up[1:])
        second = (2, logit >> 7, sum(left), seen(row - 2, column), sum(up))
        near = [known.setdefault(key, [guess, 4, 255]) for key in (first, second)]
        bit = coded(reader, [[guess, 0, 0], *near], weights)
        expected += own
        here += bit
        ones[column] += bit
        out.append(bit)
    return out


if __name__ == "__main__":
    for name, content in decode_files(Path(sys.argv[1]).read_bytes()):
        Path(sys.argv[2]).parent.joinpath(name or sys.argv[2]).write_bytes(content)
