"""Checks of the pixels of a visual tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.embeddings import check_pixel_shape

_LARGEST_PIXEL = 255
_DALLE_MARGIN = 0.1


def dalle_pixels(pixels: Tensor) -> Tensor:
    """Map pixels in 0..1 to 0.1..0.9, as DALL-E's encoder requires.

    No pixel is then at the bounds of the logit-Laplace distribution (arXiv 2102.12092).
    """
    return (1 - 2 * _DALLE_MARGIN) * pixels + _DALLE_MARGIN


def unit_pixels(pixels: Tensor, channels: int) -> Tensor:
    """Convert pixels to float32 in 0..1.

    Args:
        pixels: `[B, channels, H, W]`, uint8 in 0..255 or floating point in 0..1.
        channels: The expected number of channels.

    Raises:
        TypeError: If `pixels` is not a tensor.
        ValueError: If its shape, dtype or values do not fit. Values are checked on a CPU only.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"pixels are of type {type(pixels).__name__} (expected a torch.Tensor)")
    check_pixel_shape(pixels, channels)
    if pixels.dtype == torch.uint8:
        return pixels.float() / _LARGEST_PIXEL
    if not pixels.is_floating_point():
        name = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"pixels of dtype {name} are not supported (expected uint8, or floating point in 0..1)")
    if pixels.device.type == "cpu" and pixels.numel():
        low, high = (bound.item() for bound in pixels.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels are from {low:.4g} to {high:.4g} (expected 0..1: the tokenizer normalizes them itself, "
                "so pass them without mean and standard deviation; clamp(0, 1) removes the overshoot of resizing)"
            )
    return pixels.float()


def check_values(values: Tensor, channels: int) -> None:
    """Check the output of `preprocess`, `[B, channels, H, W]` float32.

    Raises:
        TypeError: If `values` is not a tensor.
        ValueError: If its shape or dtype differs.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values are of type {type(values).__name__} (expected a torch.Tensor)")
    check_pixel_shape(values, channels)
    if values.dtype != torch.float32:
        name = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"values of dtype {name} are not supported (expected float32, the output of preprocess)")


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image.

    Args:
        image_size: Height and width, or one number for both.
        patch_size: Height and width of a patch.

    Raises:
        ValueError: If patches do not divide the image, or it is smaller than one patch.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"images of {height}x{width} pixels do not divide into patches of {patch_size}x{patch_size} "
            f"(expected multiples of {patch_size}, at least {patch_size})"
        )
    return height // patch_size, width // patch_size
