"""Reference for all kernels: dense attention in the precision of its inputs, and error budgets.

This file imports nothing of the package. Its relative index loops over token pairs, so that it cannot share a mistake
with the index arithmetic of the package.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORWARD_FACTOR = 2
BACKWARD_FACTOR = 3
"""Allowed multiples of the error of eager operations in the same dtype."""
ROUNDING_FLOOR = 4
"""Machine epsilons that are always allowed."""


@functools.lru_cache(maxsize=256)
def _paper_index(window: tuple[int, int]) -> Tensor:
    height, width = window
    patches = [(row, column) for row in range(height) for column in range(width)]
    rows = (2 * height - 1) * (2 * width - 1) + 3
    from_patches = [
        [rows - 2]
        + [
            (row_i - row_j + height - 1) * (2 * width - 1) + column_i - column_j + width - 1
            for row_j, column_j in patches
        ]
        for row_i, column_i in patches
    ]
    index = torch.tensor([[rows - 3] * (len(patches) + 1), *from_patches])
    index[0, 0] = rows - 1
    return index


def paper_index(window: tuple[int, int]) -> Tensor:
    """Return the table row of each (query, key): int64 `[N, N]`."""
    return _paper_index(tuple(window)).clone()


def dense_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the bias matrix `[H, N, N]` of a table `[(2Wh-1)(2Ww-1)+3, H]`."""
    return table[_paper_index(tuple(window)).to(table.device)].permute(2, 0, 1)


def philox_keep(seed: int, dropout_p: float, batch: int, heads: int, tokens: int) -> Tensor:
    """Compute the dropout mask of Philox4x32-10: bool `[B, H, N, N]`.

    The generator is by Salmon et al., SC 2011. Only numpy computes it, so that it shares no code
    with the tensor and Triton versions.
    """
    threshold = int(dropout_p * 2**31)
    plane, row, column = np.ogrid[: batch * heads, :tokens, :tokens]
    words = _philox_first_words(seed, row, column, plane)
    return torch.from_numpy((words >> 1) >= threshold).reshape(batch, heads, tokens, tokens)


def _philox_first_words(seed: int, *counters: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the first of four words for three words of a counter; its last word is 0."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2 = (counter.astype(np.uint64) for counter in counters)
    c3 = np.zeros_like(c0)
    for step in range(10):
        k0, k1 = (
            np.uint64(((seed >> place) + step * weyl) % 2**32) for place, weyl in ((0, 0x9E3779B9), (32, 0xBB67AE85))
        )
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low, (first >> shift) ^ c3 ^ k1, first & low
    return c0


def attention_oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None = None,
    window: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute dense attention with relative position bias.

    Inputs and output are `[B, N, H, D]`. With fp64 inputs this is the reference. With inputs of the tested dtype,
    its error is the error budget. A query whose keys are all masked gives zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale  # [B, H, N, N]
    if table is not None:
        assert window is not None
        scores = scores + dense_bias(table, window).to(scores.dtype)
    if key_mask is not None:
        allowed = key_mask[:, None, None, :]
        scores = scores.masked_fill(~allowed, float("-inf"))
        weights = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0).softmax(-1)
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    else:
        weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights.to(value.dtype), value)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return `norm(actual - expected) / norm(expected)` in fp64; 0 if both are empty or 0."""
    expected = expected.double()
    difference = torch.linalg.vector_norm(actual.double() - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    return difference / size if size else difference


def error_budget(reference: Tensor, eager: Tensor, factor: float, dtype: torch.dtype | None = None) -> float:
    """Return the relative error that a kernel may have.

    Args:
        reference: Result in fp64.
        eager: Result of eager operations in the kernel's dtype.
        factor: FORWARD_FACTOR or BACKWARD_FACTOR.
        dtype: The dtype to which inputs are rounded; None for the dtype of `eager`.
    """
    return factor * relative_error(eager, reference) + ROUNDING_FLOOR * torch.finfo(dtype or eager.dtype).eps


def error_budgets(
    reference: Mapping[str, Tensor], eager: Mapping[str, Tensor], outputs: Collection[str], dtype: torch.dtype
) -> dict[str, float]:
    """Return the budget of each result by name: that of an output for `outputs`, that of a gradient for the others."""
    factors = {name: FORWARD_FACTOR if name in outputs else BACKWARD_FACTOR for name in reference}
    return {name: error_budget(exact, eager[name], factors[name], dtype) for name, exact in reference.items()}
