"""Resize the position parameters of a checkpoint: bias tables and absolute embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..position_bias import CLS_ROWS, Window, resize_position_embeddings, resize_table, table_rows, token_count

TABLE = "relative_position_bias_table"
EMBEDDINGS = "position_embeddings"


def is_position(key: str) -> bool:
    """Whether the shape of the parameter `key` depends on the window."""
    return key.endswith((TABLE, EMBEDDINGS))


def fits_window(key: str, tensor: Tensor, window: Window) -> bool:
    """Return whether a position parameter has the shape for `window`.

    The parameter is a table `[rows, H]` or embeddings `[1, N, E]`.
    """
    return tensor.shape[0] == table_rows(window) if key.endswith(TABLE) else tensor.shape[1] == token_count(window)


def square_window(key: str, tensor: Tensor) -> Window | None:
    """Infer the square window of a table or embeddings; None if there is none of that size."""
    if key.endswith(TABLE):
        side = (math.isqrt(max(tensor.shape[0] - CLS_ROWS, 0)) + 1) // 2
    else:
        side = math.isqrt(max(tensor.shape[1] - 1, 0))
    return (side, side) if side > 0 and fits_window(key, tensor, (side, side)) else None


def resize_positions(
    state: Mapping[str, Tensor], old_window: Window, new_window: Window, interpolation: str
) -> dict[str, Tensor]:
    """Resize all tables and absolute embeddings in `state`. CLS rows and dtypes do not change.

    Args:
        state: Tensors by their names.
        old_window: (Wh, Ww) of `state`.
        new_window: (Wh, Ww) of the result.
        interpolation: `"bilinear"` resamples tables uniformly, as in MiDaS and Transformers (arXiv 2307.14460).
            `"geometric"` resamples them as in unilm and timm, see `resize_table_geometric`. Absolute embeddings
            are always resampled bicubically.
    """
    resize = resize_table_geometric if interpolation == "geometric" else resize_table
    resized = dict(state)
    for key, tensor in state.items():
        if key.endswith(TABLE):
            resized[key] = resize(_wide(tensor), old_window, new_window).to(tensor.dtype)
        elif key.endswith(EMBEDDINGS):
            resized[key] = resize_position_embeddings(_wide(tensor), old_window, new_window).to(tensor.dtype)
    return resized


def resize_table_geometric(table: Tensor, old_window: Window, new_window: Window) -> Tensor:
    """Resize a table `[rows(old), H]` with rows in geometric progression.

    The rows are placed around the center. Neighboring offsets stay one patch apart and distant ones spread out, so the
    bias of short distances does not change (microsoft/unilm, `beit/run_class_finetuning.py`). Interpolation is linear,
    as in timm.
    """
    if tuple(old_window) == tuple(new_window):
        return table
    old_size, new_size = ([2 * side - 1 for side in window] for window in (old_window, new_window))
    by_row, by_column = (
        _interpolation_matrix(old, new).to(table) for old, new in zip(old_size, new_size, strict=True)
    )  # [new, old]
    grid = table[:-CLS_ROWS].t().unflatten(1, old_size)  # [H, 2Wh-1, 2Ww-1]
    resized = by_row @ grid @ by_column.t()
    return torch.cat([resized.flatten(1).t(), table[-CLS_ROWS:]])


def _interpolation_matrix(old: int, new: int) -> Tensor:
    """Return the interpolation matrix `[new, old]` at evenly spaced positions.

    The positions of the interpolated values are in geometric progression.
    """
    known = torch.tensor(_geometric_coordinates(old, new), dtype=torch.float64)
    if old == 1:
        return known.new_ones(new, 1)
    wanted = torch.arange(new, dtype=torch.float64) - new // 2
    right = torch.bucketize(wanted, known).clamp(1, old - 1)
    share = ((wanted - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
    matrix = known.new_zeros(new, old)
    rows = torch.arange(new)
    matrix[rows, right - 1] = 1 - share
    matrix[rows, right] = share
    return matrix


def _geometric_coordinates(old: int, new: int) -> list[float]:
    """Return `old` coordinates around 0 in geometric progression.

    Their steps grow by a constant ratio. The largest coordinate is about `new // 2`.
    """
    low, high, ratio = 1.01, 1.5, 1.255
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    distances, distance = [], 1.0
    for step in range(old // 2):
        distances.append(distance)
        distance += ratio ** (step + 1)
    return [-distance for distance in reversed(distances)] + [0.0] + distances


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
