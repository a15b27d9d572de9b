"""Geometry of BEiT's learned 2-D relative position bias (arXiv 2106.08254, section 2.1).

A window is `(height, width)` in patches. Token 0 is CLS, token `1 + row * width + column` is a patch, so a window has
`N = height * width + 1` tokens. A table holds one row per relative position and one column per head. The first
`(2 * height - 1) * (2 * width - 1)` rows are for pairs of patches. The last three are for CLS to patch, patch to CLS
and CLS to CLS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int]

CLS_ROWS = 3
"""Rows at the table's end: CLS query to patch key, patch query to CLS key, CLS to CLS."""


def table_rows(window: Window) -> int:
    """Rows of the table of `window`: `(2 * height - 1) * (2 * width - 1) + 3`."""
    height, width = window
    return (2 * height - 1) * (2 * width - 1) + CLS_ROWS


def token_count(window: Window) -> int:
    """Tokens of `window`, CLS included: `height * width + 1`."""
    height, width = window
    return height * width + 1


def relative_position_index(window: Window, device: torch.device | str | None = None) -> Tensor:
    """Index of the table row for every pair of tokens.

    The result is int64 `[N, N]` (query, key).

    The index of two patches is affine: `a(i) - a(j) + const` with `a = row * (2 * width - 1) + column`. Each call
    computes it, because a cached index would be stale after a change of size or device.
    """
    height, width = window
    rows = torch.arange(height, device=device) * (2 * width - 1)
    position = (rows[:, None] + torch.arange(width, device=device)).flatten()  # [P]
    center = (height - 1) * (2 * width - 1) + width - 1
    patches = position[:, None] - position[None, :] + center  # [P, P]
    from_cls, to_cls, cls_to_cls = (position.new_full((1,), table_rows(window) - row) for row in (3, 2, 1))
    keys_of_cls = torch.cat([cls_to_cls, from_cls.expand(height * width)])  # [N]
    keys_of_patches = torch.cat([to_cls.expand(height * width, 1), patches], dim=1)  # [P, N]
    return torch.cat([keys_of_cls[None], keys_of_patches])


def gather_bias(table: Tensor, window: Window, index: Tensor | None = None) -> Tensor:
    """Gather the dense bias `[H, N, N]` from a table. Eager attention and SDPA use the dense bias.

    Args:
        table: `[rows, H]`.
        window: `(height, width)` in patches.
        index: `relative_position_index(window)`, computed if None.
    """
    tokens = token_count(window)
    index = relative_position_index(window, table.device) if index is None else index
    return table.t().index_select(1, index.flatten()).view(-1, tokens, tokens)


def resize_table(table: Tensor, old_window: Window, new_window: Window) -> Tensor:
    """Resize a table from `old_window` to `new_window`.

    The shape `[rows(old), H]` becomes `[rows(new), H]`. The dtype is kept. The patch rows are resized as an image of
    `(2 * height - 1, 2 * width - 1)` pixels, bilinearly with `align_corners=False` (MiDaS v3.1, arXiv 2307.14460); the
    CLS rows are kept. Differentiable. If both windows are equal and plain integers, the table itself is returned.
    Symbolic sizes are always resized, so that an exported program has no guard on its size.
    """
    if _same_window(old_window, new_window):
        return table
    old_height, old_width = (2 * side - 1 for side in old_window)
    new_size = [2 * side - 1 for side in new_window]
    grid = table[:-CLS_ROWS].t().reshape(1, -1, old_height, old_width)  # [1, H, 2Wh-1, 2Ww-1]
    resized = F.interpolate(grid, size=new_size, mode="bilinear", align_corners=False)
    return torch.cat([resized.flatten(2)[0].t(), table[-CLS_ROWS:]])


def resize_position_embeddings(embeddings: Tensor, old_window: Window, new_window: Window) -> Tensor:
    """Resize absolute position embeddings bicubically, `[1, N(old), E]` to `[1, N(new), E]`; CLS is kept."""
    if _same_window(old_window, new_window):
        return embeddings
    height, width = old_window
    grid = embeddings[:, 1:].transpose(1, 2).reshape(1, -1, height, width)  # [1, E, Wh, Ww]
    resized = F.interpolate(grid, size=list(new_window), mode="bicubic", align_corners=False)
    return torch.cat([embeddings[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def _same_window(old_window: Window, new_window: Window) -> bool:
    symbolic = any(isinstance(side, torch.SymInt) for side in new_window)
    return not symbolic and tuple(old_window) == tuple(new_window)


def reduce_bias(dense: Tensor, window: Window) -> Tensor:
    """Adjoint of `gather_bias`: sum `[H, N, N]` over the entries that read each row, `[rows, H]`.

    The sums run along diagonals in a fixed order, so the result is deterministic.
    """
    height, width = window
    heads = dense.shape[0]
    patches = dense[:, 1:, 1:].reshape(heads, height, width, height, width)
    by_column = _diagonal_sums(patches.permute(0, 1, 3, 2, 4))  # [H, Wh, Wh, 2Ww-1]
    by_row = _diagonal_sums(by_column.permute(0, 3, 1, 2))  # [H, 2Ww-1, 2Wh-1]
    rows = by_row.permute(2, 1, 0).reshape(-1, heads)
    cls_rows = torch.stack([dense[:, 0, 1:].sum(-1), dense[:, 1:, 0].sum(-1), dense[:, 0, 0]])
    return torch.cat([rows, cls_rows])


def _diagonal_sums(square: Tensor) -> Tensor:
    """Sum the diagonals of `square`: `[..., n, n]` to `[..., 2n - 1]`.

    Sum `d` is over `square[..., i, j]` with `i - j + n - 1 = d`.
    """
    side = square.shape[-1]
    padded = F.pad(square.flip(-1), (0, side))  # [..., n, 2n]
    # Reading rows of 2n numbers as rows of 2n - 1 shifts each row one further right: diagonals become columns.
    skewed = padded.flatten(-2)[..., :-side].unflatten(-1, (side, 2 * side - 1))
    return skewed.sum(-2)
