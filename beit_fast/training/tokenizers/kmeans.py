"""k-means clustering that gives the same centers for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1 << 24
"""Distances of one chunk, 128 MiB in float64."""


def nearest_center(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest center of each point and the squared distance.

    Ties go to the first center. Points are compared in chunks, so memory does not grow with their number.

    Args:
        points: `[N, D]`, floating point.
        centers: `[K, D]`, of the same dtype.

    Returns:
        `[N]` int64 and `[N]` of the dtype of `points`.
    """
    lengths = centers.square().sum(1)  # [K]
    indices, distances = [], []
    for chunk in points.split(max(_ROWS_AT_ONCE // len(centers), 1)):
        least, index = (lengths - 2 * chunk @ centers.mT).min(1)
        indices.append(index)
        distances.append((least + chunk.square().sum(1)).clamp_min(0))
    return torch.cat(indices), torch.cat(distances)


def cluster(points: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    """Return `count` centers of `points` by Lloyd's algorithm.

    It runs in float64 on the CPU and starts from distinct points. A center without points moves to the point that is
    farthest from its center.

    Args:
        points: `[N, D]`, floating point.
        count: The number of centers.
        iterations: The most rounds; the algorithm stops earlier if no point changes its center.
        seed: Of the choice of the first centers.

    Returns:
        `[count, D]`, float64.

    Raises:
        ValueError: If there are fewer distinct points than centers.
    """
    points = points.detach().to("cpu", torch.float64)
    distinct = points.unique(dim=0)
    if len(distinct) < count:
        raise ValueError(
            f"there are only {len(distinct)} distinct patches (expected at least {count}, one for each id)"
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    centers = distinct[order[:count]]
    previous: Tensor | None = None
    for _ in range(iterations):
        index, distance = nearest_center(points, centers)
        if previous is not None and torch.equal(index, previous):
            break
        previous = index
        sizes = torch.bincount(index, minlength=count)
        sums = torch.zeros_like(centers).index_add_(0, index, points)
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centers)
        empty = torch.nonzero(sizes == 0).flatten()
        if len(empty):
            centers[empty] = points[distance.argsort(descending=True, stable=True)[: len(empty)]]
    return centers
