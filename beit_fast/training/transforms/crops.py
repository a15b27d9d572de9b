"""Random crops."""

from __future__ import annotations

import math
from typing import NamedTuple

from .random_numbers import Draw

_ATTEMPTS = 10  # crops to draw before the center is taken


class Crop(NamedTuple):
    """Rectangle of pixels, and whether it is flipped from left to right."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool


def draw_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_probability: float,
    draw: Draw,
) -> Crop:
    """Draw a crop of an image, to be resized; the largest center crop if none fits.

    Args:
        height, width: Size of the image.
        scale: Range of the area of the crop, as a fraction of the image.
        ratio: Range of the aspect ratio of the crop, width by height; log-uniform.
        flip_probability: Probability of a horizontal flip.
        draw: Draws uniform numbers.
    """
    is_flipped = draw(0, 1) < flip_probability
    low, high = ratio
    for _ in range(_ATTEMPTS):
        area = draw(*scale) * height * width
        aspect = math.exp(draw(math.log(low), math.log(high)))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(draw(0, height - crop_height + 1))
            left = int(draw(0, width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width, is_flipped)
    crop_height, crop_width = height, width
    if width < low * height:
        crop_height = max(1, min(height, round(width / low)))
    elif width > high * height:
        crop_width = max(1, min(width, round(height * high)))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, is_flipped)
