"""Options of an image processor from timm's `pretrained_cfg`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..utils.messages import describe, join_choices, raise_value_error
from .options import RESAMPLING_NAMES

RESIZE_KEYS = ("interpolation", "crop_pct", "crop_mode")
"""Entries of `pretrained_cfg` about resizing and cropping."""

_CROP_MODES = ("center", "squash")
# timm's values for entries that are missing.
_DEFAULTS: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def resize_entries(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries about resizing and cropping that are set."""
    return {key: pretrained_cfg[key] for key in RESIZE_KEYS if pretrained_cfg.get(key) is not None}


def normalization_entries(pretrained_cfg: Mapping[str, Any], channels: int) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation of each channel.

    The result is None if they are missing, or not for this number of channels.
    """
    found = [pretrained_cfg.get(key) for key in ("mean", "std")]
    mean, std = (list(numbers) if isinstance(numbers, (list, tuple)) else [] for numbers in found)
    return (mean, std) if len(mean) == len(std) == channels else None


def resize_options(pretrained_cfg: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the processor's options for timm's evaluation transform.

    An image is resized to `image_size / crop_pct`, then its center is cropped. `"center"` keeps the aspect ratio,
    `"squash"` does not.

    Args:
        pretrained_cfg: timm's dict; missing entries have timm's defaults.
        image_size: (height, width) of the model's images.

    Raises:
        ValueError: If the processor cannot represent the entries, with every reason.
    """
    entries = _DEFAULTS | resize_entries(pretrained_cfg)
    raise_value_error("the preprocessing in timm's pretrained_cfg is not supported", _errors(entries, image_size))
    height, width = (math.floor(side / entries["crop_pct"]) for side in image_size)
    is_squashed = entries["crop_mode"] == "squash"
    return {
        "resample": entries["interpolation"],
        "size": {"height": height, "width": width} if is_squashed else {"shortest_edge": height},
        "do_center_crop": not is_squashed or (height, width) != image_size,
        "crop_size": {"height": image_size[0], "width": image_size[1]},
    }


def _errors(entries: Mapping[str, Any], image_size: tuple[int, int]) -> list[str]:
    name, crop, mode = (entries[key] for key in RESIZE_KEYS)
    errors = []
    if name not in RESAMPLING_NAMES:
        errors.append(f"{describe('interpolation', name)} (expected {join_choices(RESAMPLING_NAMES)})")
    if not isinstance(crop, (int, float)) or isinstance(crop, bool) or not 0 < crop <= 1:
        errors.append(f"{describe('crop_pct', crop)} (expected a number above 0 and up to 1)")
    if mode not in _CROP_MODES:
        errors.append(f"{describe('crop_mode', mode)} (expected {join_choices(_CROP_MODES)})")
    elif mode == "center" and image_size[0] != image_size[1]:
        errors.append(f"crop_mode='center' with images of {image_size[0]}x{image_size[1]} (expected square images)")
    return errors
