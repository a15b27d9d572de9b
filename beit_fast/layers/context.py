"""Shared inputs and kernels of all blocks of one forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cpu_linear.choice import GemmChoice
from ..ops.dispatch import attention, availability
from ..ops.functorch import transforms_are_active
from ..position_bias import Window
from .linear import choose_linear_gemm


class Kernels(NamedTuple):
    """Kernels of one forward pass. The queries have one device and dtype.

    Attributes:
        requested: The requested `attn_implementation`, or None.
        head_dim: The head dimension.
        device, dtype: Of the queries for which the kernels were chosen.
        attention: `"eager"`, `"sdpa"` or `"triton"`.
        name: The name that reports show: that of `attention`, or of the kernel behind `"triton"`.
        gemm: The GEMM for fp32 linear layers on CPU, or None to call the modules.
        fuse_residual_norm: Whether residual, drop path and LayerNorm run in one operator.
    """

    requested: str | None
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    attention: str
    name: str
    gemm: GemmChoice | None
    fuse_residual_norm: bool

    def eager(self) -> Kernels:
        """Kernels of a forward pass that returns attention weights. Such a pass requires `"eager"`."""
        return self._replace(requested="eager", attention="eager", name="eager", gemm=None, fuse_residual_norm=False)

    def serving(self, device: torch.device, dtype: torch.dtype) -> Kernels:
        """The kernels for queries of this device and dtype: `self` unless they differ."""
        if device == self.device and dtype == self.dtype:
            return self
        return choose_kernels(self.requested, device, dtype, self.head_dim)


class BlockContext(NamedTuple):
    """The inputs that all blocks of a forward pass share.

    A tuple, so that hooks which move or cast inputs reach its tensors.

    Attributes:
        window: Patches `(height, width)` of the image.
        table: The shared bias table `[rows, H]` for this window, or None.
        bias: The dense bias `[H, N, N]` of `table` if all blocks would gather it, or None.
        key_mask: bool `[B, N]`, True where a key may be attended to, or None.
        kernels: The kernels of this forward pass.
        output_attentions: Whether attention returns its weights; `kernels` are then those of `"eager"`.
    """

    window: Window
    table: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    kernels: Kernels
    output_attentions: bool = False

    def serving(self, hidden_states: Tensor) -> BlockContext:
        """Context for the input of a block. The input may be on another device than that of the first block."""
        kernels = self.kernels.serving(hidden_states.device, query_dtype(hidden_states))
        if kernels is self.kernels:
            return self
        return BlockContext(self.window, self.table, self.bias, self.key_mask, kernels, self.output_attentions)


def choose_kernels(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Choose the kernels for queries of this device and dtype.

    Raises:
        ValueError: If the implementation is unknown, or `"triton"` is requested and no kernel serves.
    """
    backend, name = attention.choose(implementation, device, dtype, head_dim)
    gemm = choose_linear_gemm(name, device, dtype)
    fuse_residual_norm = name in availability.TRITON_KERNELS and not transforms_are_active()
    return Kernels(implementation, head_dim, device, dtype, backend, name, gemm, fuse_residual_norm)


def kernels_for(hidden_states: Tensor, implementation: str | None, head_dim: int) -> Kernels:
    """Choose the kernels for queries that are computed from `hidden_states`."""
    return choose_kernels(implementation, hidden_states.device, query_dtype(hidden_states), head_dim)


def query_dtype(hidden_states: Tensor) -> torch.dtype:
    """The dtype of queries that a linear layer computes from `hidden_states`: autocast may change it."""
    device_type = hidden_states.device.type
    dtype = hidden_states.dtype
    if device_type not in ("cpu", "cuda") or dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return dtype
    return torch.get_autocast_dtype(device_type)
