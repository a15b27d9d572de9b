"""Random inputs of a linear layer with GELU, and the eager result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def make_layer(
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    biased: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw x `[*rows, inputs]`, weight and bias, equal on all devices."""
    generator = torch.Generator().manual_seed(99)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight, bias = normal(*rows, inputs), normal(outputs, inputs) / max(inputs, 1) ** 0.5, normal(outputs)
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight, bias))
    return x, weight, bias if biased else None


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the two operations that the operator replaces."""
    return F.gelu(F.linear(x, weight, bias))
