"""Resizing and cropping as in Pillow, for arrays and tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .options import RESAMPLING_NAMES

Size = tuple[int, int]
Pixels = TypeVar("Pixels", Tensor, np.ndarray)
NEAREST = RESAMPLING_NAMES.index("nearest")


@functools.cache
def _interpolate_modes() -> frozenset[int]:
    """Filters of torch's antialiased `interpolate`; torch 2.13 has Lanczos too."""
    modes = ["bilinear", "bicubic"]
    try:
        F.interpolate(torch.zeros(1, 3, 2, 2), size=(1, 1), mode="lanczos", antialias=True)
        modes.append("lanczos")
    except (NotImplementedError, RuntimeError, ValueError):
        pass
    return frozenset(map(RESAMPLING_NAMES.index, modes))


def resized_size(height: int, width: int, size: Mapping[str, int]) -> Size:
    """Return the (height, width) of an image after resizing.

    The keys of `size` select the rule, as in Transformers.
    """
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    short, long = sorted((height, width))
    target, target_long = size["shortest_edge"], float(size["shortest_edge"])
    if long / short * target > size.get("longest_edge", math.inf):
        target_long = size["longest_edge"] * short / long  # the short edge for which the long one fits
        target = max(1, round(target_long))
    if short == target:
        return height, width
    other = max(1, int(target_long * long / short))
    return (other, target) if width <= height else (target, other)


def nearest_positions(source: int, target: int, device: torch.device | None = None) -> Tensor:
    """Return the source index of each pixel of a resized axis.

    The indices are int64 `[target]` and belong to the centers of the pixels.
    """
    steps = np.full(target, source / target)
    steps[0] /= 2
    centres = np.add.accumulate(steps)  # Pillow sums, and rounding decides between two pixels
    return torch.from_numpy(np.minimum(centres.astype(np.int64), source - 1)).to(device)


def resize_nearest(images: Tensor, size: Size) -> Tensor:
    """Resize images `[..., H, W]` by nearest neighbor.

    The result has the shape `[..., *size]`. All dtypes are supported.
    """
    rows = nearest_positions(images.shape[-2], size[0], images.device)
    columns = nearest_positions(images.shape[-1], size[1], images.device)
    return images[..., rows[:, None], columns]


def resize_array(pixels: np.ndarray, size: Size, resample: int) -> np.ndarray:
    """Resize uint8 `[H, W, C]` to `[*size, C]` with Pillow; channels other than RGB one by one."""
    from PIL import Image

    filter_ = Image.Resampling(resample)
    if pixels.shape[:2] == size:
        return pixels
    if pixels.shape[2] == 3:
        resized = Image.fromarray(np.ascontiguousarray(pixels)).resize((size[1], size[0]), filter_)
        return np.asarray(resized)
    planes = (np.ascontiguousarray(pixels[..., channel]) for channel in range(pixels.shape[2]))
    return np.stack([np.asarray(Image.fromarray(plane).resize((size[1], size[0]), filter_)) for plane in planes], -1)


def resize_pixels(pixels: np.ndarray, size: Size, resample: int) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` to `[*size, 3]` on a CPU.

    torch's vectorized kernel is several times faster than Pillow, and its values are within 2 levels of Pillow's.
    Filters that torch lacks are Pillow's.
    """
    if resample not in _interpolate_modes():
        return resize_array(pixels, size, resample)
    can_share = pixels.flags.writeable and min(pixels.strides) >= 0
    image = torch.from_numpy(pixels if can_share else pixels.copy(order="C"))
    return resize_tensor(image.permute(2, 0, 1)[None], size, resample)[0].permute(1, 2, 0).numpy()


def resize_tensor(images: Tensor, size: Size, resample: int) -> Tensor:
    """Resize uint8 `[B, C, H, W]` to `[B, C, *size]`.

    Values are within 2 levels of Pillow's.
    """
    if tuple(images.shape[-2:]) == size:
        return images
    if resample == NEAREST:
        return resize_nearest(images, size)
    if images.device.type != "cpu" or resample not in _interpolate_modes():
        return resize_by_matrices(images, size, resample)
    if is_resized_vertically_first(images.shape[-2], images.shape[-1], size):
        images = _interpolate(images, (size[0], images.shape[-1]), resample)
    return _interpolate(images, size, resample)


def _interpolate(images: Tensor, size: Size, resample: int) -> Tensor:
    return F.interpolate(images, size=size, mode=RESAMPLING_NAMES[resample], antialias=True)


def is_resized_vertically_first(height: int, width: int, size: Size) -> bool:
    """Whether Pillow resizes the height before the width.

    The order changes pixels if a filter overshoots black or white. Pillow 13 and later (python-pillow/Pillow#9549)
    resize the height first if that is much less work; earlier versions never do.
    """
    from PIL import __version__

    return int(__version__.split(".")[0]) >= 13 and height > size[0] and height - size[0] > 2 * (width - size[1])


def resize_by_matrices(images: Tensor, size: Size, resample: int) -> Tensor:
    """Resize as in `resize_tensor`, by two matrix products.

    The order and the intermediate rounding are those of Pillow.
    """
    height, width = images.shape[-2:]
    rows = resampling_matrix(height, size[0], resample, images.device)  # [h, H]
    columns = resampling_matrix(width, size[1], resample, images.device)  # [w, W]
    levels = images.float()
    vertical_first = is_resized_vertically_first(height, width, size)
    for is_vertical in (vertical_first, not vertical_first):
        with torch.autocast(images.device.type, enabled=False):
            if is_vertical and height != size[0]:
                levels = (rows @ levels).round_().clamp_(0, 255)
            elif not is_vertical and width != size[1]:
                levels = (levels @ columns.T).round_().clamp_(0, 255)
    return levels.to(torch.uint8)


def resampling_matrix(source: int, target: int, resample: int, device: torch.device | None = None) -> Tensor:
    """Pillow's filter weights float32 `[target, source]`; the support grows with the scale."""
    kernel, support = _FILTERS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    places = torch.arange(source, dtype=torch.float64)
    first = (centres - support * stretch + 0.5).floor()
    end = (centres + support * stretch + 0.5).floor()
    weights = kernel((places - centres + 0.5) / stretch)
    weights = weights.masked_fill((places < first) | (places >= end), 0.0)
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0.0)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = 1 + x * x * (1.5 * x - 2.5), 2 + x * (-4 + x * (2.5 - 0.5 * x))  # Keys' kernel, a = -1/2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


_FILTERS: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {
    RESAMPLING_NAMES.index("lanczos"): (_lanczos, 3.0),
    RESAMPLING_NAMES.index("bilinear"): (_bilinear, 1.0),
    RESAMPLING_NAMES.index("bicubic"): (_bicubic, 2.0),
    RESAMPLING_NAMES.index("box"): (_box, 0.5),
    RESAMPLING_NAMES.index("hamming"): (_hamming, 1.0),
}


def center_crop(images: Pixels, size: Size, fill: int = 0) -> Pixels:
    """Crop the center of `[..., H, W]` to `[..., *size]`.

    Smaller images are padded with `fill`. If the margin is odd, the additional row or column is cut at the end or
    padded at the start.
    """
    top, left = ((image - crop) // 2 for image, crop in zip(images.shape[-2:], size, strict=True))
    inside = images[..., max(top, 0) : max(top, 0) + size[0], max(left, 0) : max(left, 0) + size[1]]
    if tuple(inside.shape[-2:]) == size:
        return inside
    shape = (*images.shape[:-2], *size)
    padded = images.new_full(shape, fill) if isinstance(images, Tensor) else np.full(shape, fill, images.dtype)
    top, left = max(-top, 0), max(-left, 0)
    padded[..., top : top + inside.shape[-2], left : left + inside.shape[-1]] = inside
    return padded
