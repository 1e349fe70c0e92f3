"""Changes that make few samples many: images moved, mirrored and mixed.

Every function takes a feed (arrays by input name, the first axis samples) and a
generator, and returns a new feed of the same shapes and dtypes; the arrays it was given
stay as they are. All but ``mixup`` leave it open what a sample is an example of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxshrink.errors import UsageError

__all__ = ["crop", "flip", "mixed", "mixup", "shift"]

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]


def shift(feed: Feed, most: int, random: np.random.Generator) -> dict[str, Array]:
    """Move every image by some pixels; its border is repeated.

    Args:
        feed: The samples.
        most: Most pixels that an image moves, down or right or back.
        random: Where it goes.

    Raises:
        UsageError: No input is images, float [samples, channels, height, width].
    """
    return _windows(feed, most, random, "shift moves", is_border_repeated=True)


def crop(feed: Feed, most: int, random: np.random.Generator) -> dict[str, Array]:
    """Surround every image by zeros and cut a window of its size out of that.

    Args:
        feed: The samples.
        most: Pixels of zeros on every side.
        random: Where the window is.

    Raises:
        UsageError: No input is images, float [samples, channels, height, width].
    """
    return _windows(feed, most, random, "crop cuts", is_border_repeated=False)


def flip(feed: Feed, random: np.random.Generator) -> dict[str, Array]:
    """Mirror every second image, left to right; which ones is drawn.

    Where several inputs are images, a sample's are mirrored together.

    Raises:
        UsageError: No input is images, float [samples, channels, height, width].
    """
    images = _images(feed, "flip mirrors")
    made = dict(feed)
    chosen = random.random(len(feed[images[0]])) < 0.5
    for name in images:
        made[name] = np.where(
            chosen[:, None, None, None], feed[name][..., ::-1], feed[name]
        )
    return made


def mixup(
    feed: Feed, strength: float, random: np.random.Generator
) -> tuple[dict[str, Array], Array, Array]:
    """Mix every sample with another one of the batch.

    Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR
    2018, equation 1, with a share drawn from Beta(strength, strength) for each pair.

    Args:
        feed: The samples.
        strength: Parameter of the distribution; small values hardly mix.
        random: Who is mixed with whom, and how much.

    Returns:
        The mixed feed; the position of each sample's partner, int64 [samples]; and the
        share that the sample itself has, float32 [samples].

    Raises:
        UsageError: An input is not floats.
    """
    for name, values in feed.items():
        if values.dtype.kind != "f":
            raise UsageError(
                f"mixup mixes samples of floats, and input {name!r} is {values.dtype}"
            )
    count = len(next(iter(feed.values())))
    partner = random.permutation(count)
    share = random.beta(strength, strength, count).astype(np.float32)
    made = {name: mixed(values, partner, share) for name, values in feed.items()}
    return made, partner, share


def mixed(values: Array, partner: Array, share: Array) -> Array:
    """Return ``share`` of each row plus the rest of its partner's, of the same dtype.

    Args:
        values: Floats, [samples, ...].
        partner: Rows, int64 [samples].
        share: From 0 to 1, [samples].
    """
    part = share.reshape(-1, *[1] * (values.ndim - 1))
    made: Array = (part * values + (1 - part) * values[partner]).astype(values.dtype)
    return made


def _images(feed: Feed, what: str) -> list[str]:
    images = [k for k, v in feed.items() if v.ndim == 4 and v.dtype.kind == "f"]
    if not images:
        raise UsageError(
            f"{what} images, float [samples, channels, height, width], and no input is "
            "that"
        )
    return images


def _windows(
    feed: Feed,
    most: int,
    random: np.random.Generator,
    what: str,
    *,
    is_border_repeated: bool,
) -> dict[str, Array]:
    made = dict(feed)
    for name in _images(feed, what):
        batch = feed[name]
        count, _, height, width = batch.shape
        down = random.integers(-most, most + 1, (count, 1))
        right = random.integers(-most, most + 1, (count, 1))
        rows, columns = down + np.arange(height), right + np.arange(width)
        moved = batch[
            np.arange(count)[:, None, None],
            :,
            rows.clip(0, height - 1)[:, :, None],
            columns.clip(0, width - 1)[:, None, :],
        ].transpose(0, 3, 1, 2)
        if not is_border_repeated:
            inside = (rows == rows.clip(0, height - 1))[:, :, None] & (
                columns == columns.clip(0, width - 1)
            )[:, None, :]
            moved = np.where(inside[:, None], moved, moved.dtype.type(0))
        made[name] = np.ascontiguousarray(moved)
    return made
