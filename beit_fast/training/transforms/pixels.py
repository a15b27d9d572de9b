"""Pixels of one image: crop, colors, resizing and normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...image_processing.options import RESAMPLING_NAMES, Resampling
from ...image_processing.resampling import Size, resize_pixels
from .crops import Crop
from .random_numbers import Draw

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


def cropped(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """Crop and flip `[H, W, C]` to a contiguous copy."""
    pixels = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return np.array(pixels[:, ::-1] if crop.is_flipped else pixels, order="C")


def resized(pixels: np.ndarray, size: Size, interpolation: Resampling) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` to `[*size, 3]`.

    Values are within 2 levels of Pillow's.
    """
    return resize_pixels(pixels, size, RESAMPLING_NAMES.index(interpolation))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 `[H, W, 3]` to float32 `[3, H, W]`.

    The result is from 0 to 1.
    """
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0))).float().div_(255)


def normalized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize each channel of `[3, H, W]`."""
    means, deviations = (torch.tensor(list(numbers))[:, None, None] for numbers in (mean, std))
    return (view - means).div_(deviations)


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


def distort(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of uint8 `[H, W, 3]`.

    Each change is made half of the time, by a uniform amount: brightness by up to 32 levels, contrast and saturation
    by a factor from 0.5 to 1.5, hue by up to 18 of 180 steps. Contrast is changed before saturation and hue, or after
    them. These are the distortions that are usual for segmentation.
    """
    values = pixels.astype(np.float64)
    if draw(0, 1) < 0.5:
        values = values + draw(-32, 32)
    is_contrast_first = draw(0, 1) < 0.5
    contrast = draw(0.5, 1.5) if draw(0, 1) < 0.5 else 1.0
    if is_contrast_first:
        values = _clipped(values) * contrast
    values = _with_color(_levels(values), draw).astype(np.float64)
    return _levels(values if is_contrast_first else values * contrast)


def _with_color(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Change saturation and hue."""
    from PIL import Image

    saturation = draw(0.5, 1.5) if draw(0, 1) < 0.5 else 1.0
    hue = round(draw(-18, 18) / 180 * 256) if draw(0, 1) < 0.5 else 0
    if saturation == 1.0 and hue == 0:
        return pixels
    channels = np.array(Image.fromarray(pixels).convert("HSV"))
    channels[..., 0] = (channels[..., 0].astype(np.int64) + hue) % 256
    channels[..., 1] = _levels(channels[..., 1] * np.float32(saturation))
    return np.asarray(Image.fromarray(channels, mode="HSV").convert("RGB"))


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255)


def _levels(values: np.ndarray) -> np.ndarray:
    """Round to uint8."""
    return np.rint(_clipped(values)).astype(np.uint8)
