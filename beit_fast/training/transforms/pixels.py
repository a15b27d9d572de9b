"""Pixels of one image: crop, colors, resizing and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...image_processing.options import RESAMPLING_NAMES, Resampling
from ...image_processing.resampling import Size, resize_array
from .crops import Crop
from .random_numbers import Draw

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def cropped(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """Crop and flip `[H, W, C]`, without a copy."""
    pixels = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return pixels[:, ::-1] if crop.is_flipped else pixels


def resized(pixels: np.ndarray, size: Size, interpolation: Resampling) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` to `[*size, 3]` with Pillow."""
    return resize_array(pixels, size, RESAMPLING_NAMES.index(interpolation))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 `[H, W, 3]` to float32 `[3, H, W]`.

    The result is from 0 to 1.
    """
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0))).float() / 255


def normalized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize each channel of `[3, H, W]`."""
    means, deviations = (torch.tensor(list(numbers))[:, None, None] for numbers in (mean, std))
    return (view - means) / deviations


def jitter(pixels: np.ndarray, strength: float, draw: Draw) -> np.ndarray:
    """Change brightness, contrast and saturation in random order.

    The pixels are uint8 `[H, W, 3]`. Each factor is uniform from `1 - strength` to `1 + strength`.
    """
    from PIL import Image, ImageEnhance

    image: PillowImage = Image.fromarray(pixels)
    steps = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while steps:
        step = steps.pop(int(draw(0, len(steps))))
        image = step(image).enhance(draw(1 - strength, 1 + strength))
    return np.asarray(image)
