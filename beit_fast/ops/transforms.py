"""Helpers for the operators' rules under autocast and `torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: floating-point tensors other than fp64."""
    eligible = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def cast_first(count: int) -> Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]]:
    """Autocast rule that casts the first `count` arguments."""

    def rule(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        operands = (None if x is None else cast(x, dtype) for x in arguments[:count])
        return (*operands, *arguments[count:])

    return rule


def map_entries(op: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Call `op` for each mapped entry and stack the results. The mapped dimension has `size` entries."""
    results = [op(*(_entry(x, dim, place) for x, dim in zip(args, in_dims, strict=True))) for place in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def _entry(x: Any, dim: Any, place: int) -> Any:
    return x.select(dim, place) if isinstance(x, Tensor) and dim is not None else x


def fold(x: Any, dim: int | None, size: int) -> Any:
    """Fold the mapped dimension into the batch: `[B, ...]` or its mapped form to `[size * B, ...]`."""
    if not isinstance(x, Tensor):
        return x
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1)


def unfold(x: Tensor, size: int) -> Tensor:
    """Undo `fold`: `[size * B, ...]` to `[size, B, ...]`."""
    return x.unflatten(0, (size, x.shape[0] // size))
