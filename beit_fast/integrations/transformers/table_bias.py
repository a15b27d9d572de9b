"""Relative position biases in layers of other libraries that pass them on: as a table, or dense."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...position_bias import Window, gather_bias
from ..bias_handle import BiasHandle, acts_as_dense

_MASKED = -1e4
"""Added to the score of a masked key; this value or less leaves no weight in any dtype."""


@acts_as_dense
class _Dense(BiasHandle):
    """A handle that other layers take for its dense bias."""


class Bias(_Dense):
    """A relative position bias and a padding mask.

    It is for layers that only add biases and pass them on. A padding mask that is added becomes the key mask. The sum
    with a dense bias is dense.

    Attributes:
        key_mask: bool `[B, N]` or `[1, N]`, True = attend, or None.
    """

    key_mask: Tensor | None

    @abstractmethod
    def with_key_mask(self, key_mask: Tensor | None) -> Bias:
        """Return the bias with another key mask."""

    @abstractmethod
    def plus(self, other: Bias) -> Bias:
        """Return the sum with another bias, without key masks."""

    @abstractmethod
    def unmasked(self) -> Tensor:
        """Return the dense bias `[1, H, N, N]` without the key mask."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Return the number of heads."""

    def __add__(self, other: Bias | Tensor) -> Bias | Tensor:
        if not isinstance(other, Bias):
            if not isinstance(other, Tensor) or is_dense_bias(other, self.heads):
                return self.dense() + other
            return self.with_key_mask(_both(self.key_mask, key_mask_of(other)))
        return self.plus(other).with_key_mask(_both(self.key_mask, other.key_mask))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handle the sum under torch.compile, and with the mask on the left; else call with dense biases."""
        if func.__name__ not in ("add", "__add__", "__radd__") or kwargs or len(args) != 2:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[misc]
        first, second = args
        return first.__add__(second) if isinstance(first, Bias) else second.__add__(first)

    def dense(self) -> Tensor:
        """Return the dense bias `[1, H, N, N]`.

        If there is a key mask, the shape is `[B, H, N, N]`.
        """
        bias = self.unmasked()
        if self.key_mask is None:
            return bias
        return bias.masked_fill(~self.key_mask[:, None, None, :], torch.finfo(bias.dtype).min)


class TableBias(Bias):
    """A bias table that replaces a dense bias `[1, H, N, N]`.

    The gather is linear, so the sum of two biases of one window is the bias of the sum of their tables.

    Attributes:
        table: `[(2 * height - 1) * (2 * width - 1) + 3, H]`.
        window: `(height, width)` in patches.
        key_mask: bool `[B, N]` or `[1, N]`, True = attend, or None.
    """

    def __init__(self, table: Tensor, window: Window, key_mask: Tensor | None = None) -> None:
        self.table = table
        self.window = window
        self.key_mask = key_mask

    def with_key_mask(self, key_mask: Tensor | None) -> TableBias:
        """Return the bias with another key mask."""
        return TableBias(self.table, self.window, key_mask)

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.table.shape[1]

    def plus(self, other: Bias) -> Bias:
        """Return the sum of the tables, or of dense biases."""
        if isinstance(other, TableBias):
            return TableBias(self.table + other.table, self.window)
        return DenseBias(self.unmasked() + other.unmasked())

    def unmasked(self) -> Tensor:
        """Gather the dense bias `[1, H, N, N]`."""
        return gather_bias(self.table, self.window).unsqueeze(0)

    def to(self, *args: Any, **kwargs: Any) -> TableBias:
        """Move or cast the tensors, as in `Tensor.to`.

        Libraries that place layers on several devices call this method.
        """
        return TableBias(self.table.to(*args, **kwargs), self.window, _moved(self.key_mask, args, kwargs))


class DenseBias(Bias):
    """A dense bias, as the hooks of a module returned it.

    Attributes:
        bias: `[1, H, N, N]`.
        key_mask: bool `[B, N]` or `[1, N]`, True = attend, or None.
    """

    def __init__(self, bias: Tensor, key_mask: Tensor | None = None) -> None:
        self.bias = bias
        self.key_mask = key_mask

    def with_key_mask(self, key_mask: Tensor | None) -> DenseBias:
        """Return the bias with another key mask."""
        return DenseBias(self.bias, key_mask)

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.bias.shape[1]

    def plus(self, other: Bias) -> DenseBias:
        """Return the dense sum."""
        return DenseBias(self.bias + other.unmasked())

    def unmasked(self) -> Tensor:
        """Return the bias."""
        return self.bias

    def to(self, *args: Any, **kwargs: Any) -> DenseBias:
        """Move or cast the tensors, as in `Tensor.to`."""
        return DenseBias(self.bias.to(*args, **kwargs), _moved(self.key_mask, args, kwargs))


def is_dense_bias(mask: Tensor, heads: int) -> bool:
    """Return whether a tensor is a bias, not an attention mask.

    Modules that are not accelerated pass such a bias `[B or 1, H, N, N]`. With one head its values decide, except under
    torch.compile, where they are taken for a mask and checked.
    """
    if mask.ndim != 4 or not mask.is_floating_point() or mask.shape[1] != heads:
        return False
    return heads > 1 or not (torch.compiler.is_compiling() or bool(((mask == 0) | (mask <= _MASKED)).all()))


def key_mask_of(mask: Tensor) -> Tensor:
    """Convert an attention mask `[B, 1, N, N]` to a key mask.

    The key mask is bool `[B, N]`. A bool mask is True for keys to attend to. A floating-point mask is added to scores:
    0 for keys to attend to, -1e4 or less for others.

    Raises:
        ValueError: If the shape or dtype is not supported, or the mask differs between queries or has other values.
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"an attention mask of {mask.dtype} {list(mask.shape)} is not supported (expected [batch, 1, queries, "
            "keys], bool or floating-point). Layers that are not accelerated pass a dense bias: accelerate the whole "
            "model"
        )
    keep = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool:
        _require((keep | (mask <= _MASKED)).all(), f"has values other than 0 and {_MASKED:g} or less")
    if keep.shape[2] > 1 and keep.stride(2) != 0:
        _require((keep == keep[:, :, :1]).all(), "differs between queries")
    return keep[:, 0, 0]


def _require(condition: Tensor, otherwise: str) -> None:
    message = f"the attention mask {otherwise}; the kernel supports key masks only"
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _moved(mask: Tensor | None, args: Any, kwargs: Any) -> Tensor | None:
    return None if mask is None else mask.to(*args, **kwargs)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b
