"""Augmentation: what it does to images, checked against all that it may do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxshrink.errors import UsageError
from onnxshrink.training import augment

Array = np.ndarray[Any, Any]
IMAGE = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


def images(count: int = 60) -> Array:
    """Return [count, 2, 3, 4]: the second channel is minus the first."""
    return np.stack([IMAGE, -IMAGE])[None].repeat(count, axis=0)


def random() -> np.random.Generator:
    return np.random.default_rng(0)


def kinds(moved: Array) -> set[bytes]:
    return {one.tobytes() for one in moved}


@pytest.mark.parametrize(
    ("change", "padding"), [(augment.shift, "edge"), (augment.crop, "constant")]
)
def test_windows_are_those_of_the_padded_image(change: Any, padding: Any) -> None:
    moved = change({"x": images(), "n": np.arange(60)}, 1, random())
    padded = np.pad(IMAGE, 1, mode=padding)
    allowed = [padded[r : r + 3, c : c + 4] for r in range(3) for c in range(3)]
    assert kinds(moved["x"][:, 0]) == kinds(np.stack(allowed))
    np.testing.assert_array_equal(moved["x"][:, 1], -moved["x"][:, 0])
    np.testing.assert_array_equal(moved["n"], np.arange(60))
    assert moved["x"].flags.c_contiguous


def test_a_window_may_lie_outside_of_the_image() -> None:
    moved = augment.crop({"x": images(500)}, 5, random())["x"]
    assert kinds(np.zeros((1, 2, 3, 4), np.float32)) <= kinds(moved)


def test_half_of_the_images_are_mirrored() -> None:
    moved = augment.flip({"x": images(400)}, random())["x"]
    assert kinds(moved) == kinds(np.stack([images(1)[0], images(1)[0][..., ::-1]]))
    share = np.mean([np.array_equal(one[0], IMAGE) for one in moved])
    assert 0.4 < share < 0.6


def test_images_of_one_sample_are_mirrored_together() -> None:
    moved = augment.flip({"a": images(), "b": 2 * images()}, random())
    np.testing.assert_array_equal(moved["b"], 2 * moved["a"])


def test_mixup_mixes_pairs_by_shares_of_the_beta_distribution() -> None:
    x = np.random.default_rng(1).normal(size=(20000, 2)).astype(np.float32)
    made, partner, share = augment.mixup({"x": x}, 0.4, random())
    for at in (0, 7, 19999):
        expected = share[at] * x[at] + (1 - share[at]) * x[partner[at]]
        np.testing.assert_allclose(made["x"][at], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.sort(partner), np.arange(20000))
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert share.var() == pytest.approx(1 / (4 * 1.8), rel=0.03)


@pytest.mark.parametrize(
    "change",
    [
        lambda feed, rng: augment.shift(feed, 1, rng),
        lambda feed, rng: augment.crop(feed, 1, rng),
        augment.flip,
        lambda feed, rng: augment.mixup(feed, 0.5, rng)[0],
    ],
)
def test_a_seed_repeats_it_and_the_samples_stay(change: Any) -> None:
    x = images()
    one, two = (change({"x": x}, np.random.default_rng(3))["x"] for _ in range(2))
    other = change({"x": x[:, :, ::-1].copy()}, np.random.default_rng(4))["x"]
    assert one.tobytes() == two.tobytes() != other.tobytes()
    assert (one.dtype, one.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(x, images())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda feed: augment.shift(feed, 1, random()), "shift moves images"),
        (lambda feed: augment.crop(feed, 1, random()), "crop cuts images"),
        (lambda feed: augment.flip(feed, random()), "flip mirrors images"),
        (lambda feed: augment.mixup(feed, 1, random()), "'x' is int64"),
    ],
)
def test_what_is_not_an_image_is_refused(change: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        change({"x": np.arange(6)})
