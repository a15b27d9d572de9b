"""Sums and rows of all processes of `torch.distributed`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(counts: Tensor) -> Tensor:
    """Sum a tensor over all processes; the argument is not changed."""
    if not _is_distributed():
        return counts.clone()
    total = counts.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(counts.device)


def rows_of_processes(rows: Tensor) -> Tensor:
    """Join the rows `[n, ...]` of all processes; their numbers may differ.

    Args:
        rows: The rows of this process; shape and dtype of a row are the same in all processes.

    Returns:
        The rows of rank 0, then those of rank 1 and so on, `[sum of n, ...]`.
    """
    if not _is_distributed():
        return rows
    device = _device()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    padded = torch.zeros(int(counts.max()), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).to(rows.device)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    """Return a device whose tensors the backend exchanges."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
