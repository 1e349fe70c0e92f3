"""Range asymmetric numeral systems in many lanes, each step of all lanes at once.

Duda, "Asymmetric numeral systems", arXiv:1311.2540; lanes that share one sequence of
words as in Giesen, "Interleaved entropy coders", arXiv:1402.3392. A state has 32 bits
and stays at or above 2**16; frequencies of a context sum to 2**12; words have 16 bits.
Symbol ``i`` belongs to lane ``i % lanes``. What a lane has as its last symbols is kept
in the 16 bits below the bound of its state, so that a lane costs about a byte.

Tested in tests/package/test_coders.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.package.reading import Damaged

__all__ = ["PRECISION", "TOTAL", "decode", "encode", "frequencies", "tail_symbols"]

PRECISION = 12
TOTAL = 1 << PRECISION
"""Sum of the frequencies of a context."""
_LOW = 1 << 16
_FEW = 12
"""Lanes up to which plain Python numbers are faster than arrays."""

Array = np.ndarray[Any, Any]


def frequencies(counts: Array) -> Array:
    """Return frequencies that sum to ``TOTAL``, at least 1 for all that occurs.

    Args:
        counts: How often each symbol occurs, int64 [symbols], at most 4096 above 0.
    """
    total = int(counts.sum())
    if total == 0:
        unused = np.zeros(counts.size, np.int64)
        unused[0] = TOTAL
        return unused
    result: Array = np.maximum(counts * TOTAL // total, counts > 0).astype(np.int64)
    missing = TOTAL - int(result.sum())
    if missing > 0:
        # Where one more is worth most: by what the rounding took away.
        rest = counts * TOTAL / total - result
        rest[counts == 0] = -np.inf
        order = np.argsort(-rest, kind="stable")
        present = int((counts > 0).sum())
        while missing > 0:
            chosen = order[: min(missing, present)]
            result[chosen] += 1
            missing -= chosen.size
    while missing < 0:
        place = int(result.argmax())
        taken = min(-missing, max(1, int(result[place]) // 8))
        result[place] -= taken
        missing += taken
    return result


def tail_symbols(symbols: int) -> tuple[int, int]:
    """Return the bits of a plain symbol, and how many a state holds at its end."""
    bits = max(1, (symbols - 1).bit_length())
    return bits, 16 // bits


def encode(
    symbols: Array, freqs: Array, lanes: int, contexts: Array | None = None
) -> tuple[Array, Array]:
    """Return states and words.

    Args:
        symbols: uint8 [count]; at least ``lanes * tail`` of them (``tail_symbols``).
        freqs: Frequencies, int64 [contexts, alphabet]; above 0 for all that occurs.
        lanes: States that take turns.
        contexts: Context of each symbol, uint8 [count]; all 0 if left out.

    Returns:
        States, uint32 [lanes], and words, uint16, in the order they are read.
    """
    starts = (np.cumsum(freqs, axis=1) - freqs).astype(np.uint32)
    table = freqs.astype(np.uint32)
    bits, tail = tail_symbols(freqs.shape[1])
    body = symbols.size - lanes * tail
    state = np.zeros(lanes, np.uint64)
    for place, row in enumerate(symbols[body:].reshape(tail, lanes)):
        state |= row.astype(np.uint64) << np.uint64(bits * place)
    state += np.uint64(_LOW)
    if lanes <= _FEW:
        return _encode_few(symbols[:body], table, starts, state, contexts)
    words: list[Array] = []
    full = np.uint64(32 - PRECISION)
    for start in range(-(-body // lanes) * lanes - lanes, -1, -lanes):
        stop = min(start + lanes, body)
        chosen = symbols[start:stop]
        if contexts is None:
            freq, base = table[0][chosen], starts[0][chosen]
        else:
            context = contexts[start:stop]
            freq, base = table[context, chosen], starts[context, chosen]
        now = state[: stop - start]
        spilling = np.flatnonzero(now >= (freq.astype(np.uint64) << full))
        words.append(now[spilling].astype(np.uint16))
        now[spilling] >>= np.uint64(16)
        quotient, rest = np.divmod(now.astype(np.uint32), freq)
        now[:] = (quotient.astype(np.uint64) << np.uint64(PRECISION)) + rest + base
    flat = np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)
    return state.astype(np.uint32), flat


def _encode_few(
    symbols: Array, table: Array, starts: Array, state: Array, contexts: Array | None
) -> tuple[Array, Array]:
    """Encode symbol by symbol, which is faster for a few lanes."""
    lanes = state.size
    now: list[int] = state.tolist()
    where = symbols.astype(np.int64)
    if contexts is not None:
        where += contexts[: symbols.size].astype(np.int64) * table.shape[1]
    freqs: list[int] = table.reshape(-1)[where].tolist()
    bases: list[int] = starts.reshape(-1)[where].tolist()
    words: list[int] = []
    for place in range(symbols.size - 1, -1, -1):
        lane = place % lanes
        freq, value = freqs[place], now[lane]
        if value >= freq << 32 - PRECISION:
            words.append(value & 0xFFFF)
            value >>= 16
        quotient, rest = divmod(value, freq)
        now[lane] = (quotient << PRECISION) + rest + bases[place]
    return np.array(now, np.uint32), np.array(words[::-1], np.uint16)


def decode(
    states: Array,
    words: Array,
    freqs: Array,
    count: int,
    contexts: Array | None = None,
) -> Array:
    """Return the symbols, uint8 [count]; the inverse of ``encode``.

    Raises:
        Damaged: There are too few or too many words, or impossible states.
    """
    lanes = states.size
    bits, tail = tail_symbols(freqs.shape[1])
    body = count - lanes * tail
    if body < 0:
        raise Damaged(f"{lanes} lanes cannot hold {count} symbols")
    if lanes and int(states.min()) < _LOW:
        raise Damaged("a state is out of its bounds")
    flat = freqs.reshape(-1)
    owners = np.repeat(np.arange(flat.size, dtype=np.int64), flat)
    alphabet = freqs.shape[1]
    names = (owners % alphabet).astype(np.uint8)
    starts = (np.cumsum(freqs, axis=1) - freqs).reshape(-1)
    bias = np.arange(owners.size) % TOTAL - starts[owners]
    table = (flat[owners] | bias << 16).astype(np.uint32)
    out = np.empty(count, np.uint8)
    walk = _few if lanes <= _FEW else _many
    state = walk(states, words, table, names, body, contexts, out)
    for place in range(tail):
        part = (state >> (bits * place)) & ((1 << bits) - 1)
        if int(part.max(initial=0)) >= alphabet:
            raise Damaged("a symbol is outside its alphabet")
        out[body + place * lanes : body + (place + 1) * lanes] = part
    return out


def _few(
    states: Array,
    words: Array,
    table: Array,
    names: Array,
    body: int,
    contexts: Array | None,
    out: Array,
) -> Array:
    """Decode the body symbol by symbol; return the states less their bound."""
    state: list[int] = states.tolist()
    lanes = len(state)
    supply = iter(words.tolist())
    entries: list[int] = table.tolist()
    offsets = contexts.tolist() if contexts is not None else None
    slots: list[int] = []
    lane = 0
    try:
        for place in range(body):
            value = state[lane]
            slot = value & TOTAL - 1
            if offsets is not None:
                slot |= offsets[place] << PRECISION
            slots.append(slot)
            entry = entries[slot]
            value = (value >> PRECISION) * (entry & 0xFFFF) + (entry >> 16)
            if value < _LOW:
                value = value << 16 | next(supply)
            state[lane] = value
            lane = lane + 1 if lane + 1 < lanes else 0
    except StopIteration:
        raise Damaged("the words of a stream end early") from None
    out[:body] = names[np.array(slots, np.int64)]
    return _ended(np.array(state, np.uint32), next(supply, None) is None)


def _many(
    states: Array,
    words: Array,
    table: Array,
    names: Array,
    body: int,
    contexts: Array | None,
    out: Array,
) -> Array:
    """Decode the body, all lanes at once; return the states less their bound."""
    lanes = states.size
    now = state = states.astype(np.uint32)
    steps = -(-body // lanes)
    at = 0
    low, shift, half = np.uint32(TOTAL - 1), np.uint32(PRECISION), np.uint32(16)
    mask, bound = np.uint32(0xFFFF), np.uint32(_LOW)
    both, take, less = np.bitwise_and, table.take, np.less
    slot, entry = np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
    below = np.empty(lanes, np.bool_)
    # Symbols are looked up for many steps together; so many fit the second cache.
    group = max(1, (1 << 16) // lanes)
    slots = np.empty((group, lanes), np.uint32)
    for first in range(0, steps, group):
        last = min(first + group, steps)
        begin, end = first * lanes, min(last * lanes, body)
        if contexts is not None:
            offsets = contexts[begin:end].astype(np.uint32)
            offsets <<= shift
        for row in range(last - first):
            width = end - begin - row * lanes
            if width < lanes:  # the last step of all
                now, slot, entry = state[:width], slot[:width], entry[:width]
                below = below[:width]
            both(now, low, slot)
            if contexts is not None:
                slot |= offsets[row * lanes : row * lanes + lanes]
            slots[row, :width] = slot
            take(slot, None, entry, "wrap")
            now >>= shift
            both(entry, mask, slot)
            now *= slot
            entry >>= half
            now += entry
            less(now, bound, below)
            short = below.nonzero()[0]
            if short.size:
                stop = at + short.size
                if stop > words.size:
                    raise Damaged("the words of a stream end early")
                now[short] = now[short] << half | words[at:stop]
                at = stop
        found = slots.reshape(-1)[: end - begin]
        out[begin:end] = names.take(found, mode="wrap")
    return _ended(state, at == words.size)


def _ended(state: Array, used_up: bool) -> Array:
    if not used_up:
        raise Damaged("words of a stream are left over")
    below = state - np.uint32(_LOW)
    if state.size and int(below.max()) >= _LOW:
        raise Damaged("a stream does not end where it began")
    return below
