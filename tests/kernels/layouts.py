"""Layouts of a tensor `[B, N, H, D]`, with NaN between its rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def slice_of_packed(tensor: Tensor, position: int = 1) -> Tensor:
    """Return a slice of a packed projection `[B, N, 3, H, D]`."""
    batch, tokens, heads, head_dim = tensor.shape
    packed = tensor.new_full((batch, tokens, 3, heads, head_dim), float("nan"))
    packed[:, :, position] = tensor
    return packed[:, :, position]


def heads_before_tokens(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_last(tensor: Tensor) -> Tensor:
    """Store as `[B, H, D, N]`: the last dimension does not have unit stride."""
    return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def padded_rows(tensor: Tensor, before: int, after: int) -> Tensor:
    """Pad rows to `before + D + after` elements.

    If the sum is odd, every second row starts at an odd address.
    """
    columns = slice(before, before + tensor.shape[-1])
    return F.pad(tensor, (before, after), value=float("nan"))[..., columns]


def every_second_token(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=2).flatten(1, 2)[:, ::2]


def every_second_sample(tensor: Tensor) -> Tensor:
    return torch.stack([torch.full_like(tensor, float("nan")), tensor], dim=1).flatten(0, 1)[1::2]


def at_offset(tensor: Tensor, elements: int) -> Tensor:
    """Return a contiguous copy that starts `elements` elements into its storage.

    Its address is aligned to less than 16 bytes.
    """
    storage = tensor.new_full((elements + tensor.numel(),), float("nan"))
    storage[elements:] = tensor.flatten()
    return storage[elements:].view(tensor.shape)


SAME_VALUES: dict[str, Layout] = {
    "contiguous": Tensor.contiguous,
    "first slice of a packed projection": lambda tensor: slice_of_packed(tensor, 0),
    "last slice of a packed projection": lambda tensor: slice_of_packed(tensor, 2),
    "heads before tokens": heads_before_tokens,
    "tokens last": tokens_last,
    "odd row stride": lambda tensor: padded_rows(tensor, 3, 2),
    "rows with a tail": lambda tensor: padded_rows(tensor, 0, 8),
    "every second token": every_second_token,
    "every second sample": every_second_sample,
    "address that 2 elements divide": lambda tensor: at_offset(tensor, 2),
    "address that 1 element divides": lambda tensor: at_offset(tensor, 1),
}
"""Layouts that keep every value."""


def shared_by_batch(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def shared_by_heads(tensor: Tensor) -> Tensor:
    return tensor[:, :, :1].expand_as(tensor)


SHARED: dict[str, Layout] = {"shared by the batch": shared_by_batch, "shared by the heads": shared_by_heads}
"""Expanded layouts of stride 0: some values repeat."""


def one_number(tensor: Tensor) -> Tensor:
    """Return a tensor whose strides are all 0, as the gradient of `out.sum()`."""
    return tensor.flatten()[0].expand(tensor.shape)


def shared_by_tokens(tensor: Tensor) -> Tensor:
    return tensor[:, :1].expand_as(tensor)


SHARED_GRADIENT: dict[str, Layout] = {**SHARED, "shared by the tokens": shared_by_tokens, "one number": one_number}
"""Expanded layouts of an incoming gradient.

Keys and values shared by all tokens are left out: their gradients are too small to compare.
"""
