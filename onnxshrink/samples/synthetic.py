"""Images made up for calibration where there are none: dead leaves.

Discs of random sizes and colours cover each other until nothing is left bare (Lee,
Mumford and Huang 2001). Such images have edges, surfaces and a spectrum like those of
photographs, so that ranges of activations come out much as on real images, where noise
gives others. What they show is nothing, so that they prove nothing.

Tested in tests/samples/test_synthetic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxshrink.errors import UsageError
from onnxshrink.samples.columns import Array
from onnxshrink.samples.records import Made

if TYPE_CHECKING:
    from onnxshrink.model import ValueInfo

__all__ = ["DeadLeaves", "image_inputs", "leaves"]

_LEAVES = 600
"""Discs of an image: more than cover it, but for corners that are filled anyway."""
_SMALLEST = 0.02
"""Radius of the smallest disc, as a share of the shorter side."""
_DEFAULT_EDGE = 224


def leaves(seed: Sequence[int], high: int, wide: int, channels: int) -> Array:
    """Return an image of dead leaves.

    Args:
        seed: Seed of the draws.
        high: Rows.
        wide: Columns.
        channels: Values of a pixel; 1 is grey.

    Returns:
        uint8 [high, wide, channels].
    """
    random = np.random.default_rng(seed)
    edge = max(1, min(high, wide))
    smallest = max(_SMALLEST * edge, 0.5)
    largest = max(edge / 2, smallest * 1.01)
    # Radii by a power law of exponent 3, the one that is scale invariant.
    low, top = smallest**-2.0, largest**-2.0
    radii = (low - random.random(_LEAVES) * (low - top)) ** -0.5
    places = random.random((_LEAVES, 2)) * (high, wide)
    # Colours around one of the image, as in a scene under one light.
    light = random.normal(127, 40, channels)
    colours = light + random.normal(0, 45, (_LEAVES, 1))
    colours = colours + random.normal(0, 20, (_LEAVES, channels))
    image = np.empty((high, wide, channels), np.float64)
    image[:] = light
    for radius, (y, x), colour in zip(radii, places, colours, strict=True):
        top_, left = max(0, int(y - radius)), max(0, int(x - radius))
        rows = np.arange(top_, min(high, int(y + radius) + 2))
        columns = np.arange(left, min(wide, int(x + radius) + 2))
        inside = (rows[:, None] - y) ** 2 + (columns[None] - x) ** 2 <= radius**2
        image[top_ : top_ + len(rows), left : left + len(columns)][inside] = colour
    # Shade and the grain of a camera.
    slope = random.normal(0, 20, 2)
    shade = np.linspace(-1, 1, high)[:, None] * slope[0]
    shade = shade + np.linspace(-1, 1, wide)[None] * slope[1]
    image += shade[..., None] + random.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


class DeadLeaves(Made):
    """Images made when they are read: uint8 [high, wide, channels] or [high, wide]."""

    def __init__(self, seed: int, count: int, shape: tuple[int, ...]) -> None:
        """Make up images.

        Args:
            seed: Seed of the draws.
            count: Images.
            shape: Of one; two axes are a grey image.
        """
        super().__init__(count, shape, np.dtype(np.uint8))
        self._seed = seed

    def make(self, index: int) -> Array:
        """Return one image."""
        high, wide = self.shape[:2]
        channels = self.shape[2] if len(self.shape) > 2 else 1
        return leaves((self._seed, index), high, wide, channels).reshape(self.shape)


def image_inputs(inputs: Sequence[ValueInfo]) -> dict[str, tuple[int, int, int, bool]]:
    """Return the inputs that are images: height, width, channels, channels first.

    Raises:
        UsageError: There is none.
    """
    found = {}
    for info in inputs:
        if info.kind != "tensor" or info.shape is None or len(info.shape) != 4:
            continue
        _, first, _, last = info.shape
        is_first = first in (1, 3, 4)
        if not is_first and last not in (1, 3, 4):
            continue
        channels = first if is_first else last
        sides = info.shape[2:] if is_first else info.shape[1:3]
        high, wide = (s if isinstance(s, int) else _DEFAULT_EDGE for s in sides)
        assert isinstance(channels, int)
        found[info.name] = (high, wide, channels, is_first)
    if not found:
        names = ", ".join(repr(info.name) for info in inputs)
        raise UsageError(
            "synthetic data are images, [samples, 3, height, width] or [samples, "
            f"height, width, 3], and the model takes none: its inputs are {names}"
        )
    return found
