"""Compare resized pixels with Pillow's."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_LEVELS, MOST_CHANGED = 2, 0.02


def assert_near_pillow(pixels: Tensor, expected: Tensor, std: float | Tensor = 1.0) -> None:
    """Assert that pixels from 0 to 1, divided by `std`, are those of Pillow.

    At most 2% of the values may differ, by at most 2 levels of 255.
    """
    assert pixels.shape == expected.shape
    levels = (pixels - expected).abs() * std * 255
    assert levels.max() < MOST_LEVELS + 0.01, levels.max()
    share = (levels > 0.01).double().mean()
    assert share <= MOST_CHANGED, share
    assert torch.isfinite(pixels).all()
