"""A relative position bias on its way through somebody else's layers, as its table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...position_bias import Window, gather_bias

_MASKED = -1e4
"""What is added to the score of a key that is not to be seen: this much or less leaves it no weight in any dtype."""


class TableBias:
    """What takes the place of a dense bias `[1, H, N, N]` where layers only add biases up and hand them on.

    The gather is linear, so the sum of two biases of one window is that of the sum of their tables; a padding mask
    that is added is kept as a key mask.

    Attributes:
        table: `[(2 * height - 1) * (2 * width - 1) + 3, H]`.
        window: `(height, width)` in patches.
        key_mask: bool `[B, N]` or `[1, N]`, True where a key may be attended to, or None.
    """

    def __init__(self, table: Tensor, window: Window, key_mask: Tensor | None = None) -> None:
        self.table = table
        self.window = window
        self.key_mask = key_mask

    def __add__(self, other: TableBias | Tensor) -> TableBias:
        if not isinstance(other, TableBias):
            return TableBias(self.table, self.window, _both(self.key_mask, key_mask_of(other)))
        return TableBias(self.table + other.table, self.window, _both(self.key_mask, other.key_mask))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The sum with a mask once more: torch.compile, and a mask on the left, ask here for it."""
        if func.__name__ not in ("add", "__add__", "__radd__"):
            return NotImplemented
        first, second = args
        return first.__add__(second) if isinstance(first, TableBias) else second.__add__(first)

    def to(self, *args: Any, **kwargs: Any) -> TableBias:
        """As `Tensor.to`: libraries that place layers on several devices move what is handed between them."""
        key_mask = None if self.key_mask is None else self.key_mask.to(*args, **kwargs)
        return TableBias(self.table.to(*args, **kwargs), self.window, key_mask)

    def dense(self) -> Tensor:
        """`[1, H, N, N]`, or with a key mask `[B, H, N, N]`: what this stands for, for attention that needs it."""
        bias = gather_bias(self.table, self.window).unsqueeze(0)
        if self.key_mask is None:
            return bias
        return bias.masked_fill(~self.key_mask[:, None, None, :], torch.finfo(bias.dtype).min)


def key_mask_of(mask: Tensor) -> Tensor:
    """The keys that a mask `[B, 1, N, N]` lets every query attend to, bool `[B, N]`.

    A bool mask is True where a key may be attended to; a floating-point one is added to scores and is 0 there, -1e4 or
    less elsewhere.

    Raises:
        ValueError: the mask is of another shape or type, differs between queries, or holds other numbers.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            "attention with a relative position bias in its kernel takes a mask [batch, 1, queries, keys], bool or "
            f"floating-point, not {mask.dtype} {list(mask.shape)}; a dense bias comes from layers that were not "
            "accelerated: accelerate the whole model"
        )
    keep = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        _require((keep | (mask <= _MASKED)).all(), f"is neither 0 nor {_MASKED:g} or less somewhere")
    if keep.shape[2] > 1 and keep.stride(2) != 0:
        _require((keep == keep[:, :, :1]).all(), "differs between queries")
    return keep[:, 0, 0]


def _require(condition: Tensor, otherwise: str) -> None:
    message = f"the attention mask {otherwise}, and the kernel takes a mask of keys alone"
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b
