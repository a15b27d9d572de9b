"""Inputs and error budget for a linear layer with GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .oracle import compare_results


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


def check_layer(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check `actual` against fp64, within the error of the two operations."""
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double())
    compare_results({"out": actual}, {"out": exact}, {"out": plain(x, weight, bias)})
    assert actual.is_contiguous()
