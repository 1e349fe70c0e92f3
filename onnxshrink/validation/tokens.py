"""Logits of language models: which output they are, and which positions count.

Logits are floats [samples, positions, vocabulary] of a model that is fed token ids
[samples, positions], each less than the vocabulary. Positions that an attention mask
leaves out do not count. What is said of the next token only holds where the model is
causal: no position sees the tokens behind it, which one run with another last token
shows.

Tested in tests/validation/test_tokens.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.measuring.differences import is_float
from onnxshrink.samples.columns import Array

__all__ = ["Tokens", "may_be_tokens", "tokens_of"]

_NO_TOKENS = ("mask", "position", "type", "segment", "length", "len", "cache")
"""Words in the names of whole-numbered inputs that are no token ids."""
_MASKS = ("attention_mask", "input_mask", "padding_mask")
_NOISE = 1e-3
"""Share of the largest logit by which a position may move by float noise."""


@dataclass(frozen=True)
class Tokens:
    """Where a model has token ids and logits.

    Attributes:
        ids: Input with the token ids.
        logits: Output with the logits.
        is_causal: Whether logits depend on no token behind their position.
    """

    ids: str
    logits: str
    is_causal: bool

    def rows(self, feed: Mapping[str, Array], logits: Array) -> Array:
        """Return the logits of positions that count, [rows, vocabulary]."""
        real = self.real(feed)
        if real is None or real.shape != logits.shape[:2]:
            return logits.reshape(-1, logits.shape[-1])
        return np.asarray(logits[real])

    def real(self, feed: Mapping[str, Array]) -> NDArray[np.bool_] | None:
        """Return which positions count, [samples, positions]; ``None`` is all.

        A mask may be longer than the ids by a past, which comes first.
        """
        ids = feed[self.ids]
        for name, value in feed.items():
            if not name.endswith(_MASKS) or value.ndim != 2:
                continue
            if len(value) == len(ids) and value.shape[1] >= ids.shape[1]:
                return np.asarray(value[:, value.shape[1] - ids.shape[1] :] != 0)
        return None

    def next_tokens(
        self, feed: Mapping[str, Array], logits: Array
    ) -> tuple[Array, NDArray[np.int64]]:
        """Return logits with a known next token, and these tokens.

        Returns:
            Float [rows, vocabulary] and int64 [rows], all samples below each other.
        """
        ids = feed[self.ids].astype(np.int64)
        real = self.real(feed)
        known = np.ones(ids.shape, np.bool_) if real is None else real
        both = known[:, 1:] & known[:, :-1]
        return logits[:, :-1][both], ids[:, 1:][both]


def tokens_of(
    feed: Mapping[str, Array],
    outputs: Mapping[str, Any],
    run: Callable[[Mapping[str, Array]], Mapping[str, Any]],
) -> Tokens | None:
    """Return where a model has token ids and logits; ``None`` if it has none.

    Args:
        feed: One batch of inputs.
        outputs: What the model gives for it.
        run: Runs the model once more, to see whether it is causal.
    """
    for name, ids in _ids(feed).items():
        for output, value in outputs.items():
            if not (is_float(value) and value.ndim == 3):
                continue
            if value.shape[:2] != ids.shape or value.shape[2] <= ids.max(initial=0):
                continue
            if "hidden" in output or value.shape[2] < 2:
                continue
            causal = _is_causal(name, output, feed, value, run)
            return Tokens(name, output, causal)
    return None


def may_be_tokens(feed: Mapping[str, Array]) -> bool:
    """Whether one of the inputs may be token ids."""
    return bool(_ids(feed))


def _ids(feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return the inputs that may be token ids, the likeliest first."""
    found = {
        name: value
        for name, value in feed.items()
        if value.dtype.kind in "iu"
        and value.ndim == 2
        and not any(word in name.lower() for word in _NO_TOKENS)
    }
    return dict(sorted(found.items(), key=lambda item: "id" not in item[0].lower()))


def _is_causal(
    ids: str,
    output: str,
    feed: Mapping[str, Array],
    logits: Array,
    run: Callable[[Mapping[str, Array]], Mapping[str, Any]],
) -> bool:
    given = feed[ids]
    if given.shape[1] < 2:
        return True
    changed = given.copy()
    changed[:, -1] = np.where(
        given[:, -1] == given[:, 0], given[:, -1] ^ 1, given[:, 0]
    )
    changed[:, -1] = np.minimum(changed[:, -1], logits.shape[2] - 1)
    other = run({**feed, ids: changed})[output]
    before = np.asarray(logits[:, :-1], np.float32)
    moved = np.abs(np.asarray(other[:, :-1], np.float32) - before)
    return bool(moved.max(initial=0) <= _NOISE * np.abs(before).max(initial=0))
