"""Group images by their size, so that each group is one batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def group_by_size(images: Iterable[tuple[int, Tensor]]) -> list[tuple[list[int], Tensor]]:
    """Stack images that have one size.

    Args:
        images: The index of each image, and its pixels `[1, C, H, W]`.

    Returns:
        For each size, the indices and the pixels `[n, C, H, W]`.
    """
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for index, pixels in images:
        groups.setdefault(pixels.shape, []).append((index, pixels))
    return [([index for index, _ in group], torch.cat([pixels for _, pixels in group])) for group in groups.values()]
