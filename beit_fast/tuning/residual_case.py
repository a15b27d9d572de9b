"""Random inputs of residual and LayerNorm, with fused and eager results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.residual_norm import residual_norm
from .operator_case import OperatorCase

EPS = 1e-12
"""The epsilon of BEiT configurations."""


@dataclass
class ResidualCase(OperatorCase):
    """Inputs of one call, and the gradients of its outputs."""

    FIXED: ClassVar[tuple[str, ...]] = ("drop_path_scale",)

    residual: Tensor  # [B, N, E]
    branch: Tensor | None
    scale: Tensor | None  # [E]
    drop_path_scale: Tensor | None  # [B]
    weight: Tensor | None  # [E]
    bias: Tensor | None
    grad_sum: Tensor | None  # [B, N, E]
    grad_normalized: Tensor | None


ROWS = ("residual", "branch", "grad_sum", "grad_normalized")
LEAVES = ("residual", "branch", "scale", "weight", "bias")


def residual_case(
    batch: int = 3,
    tokens: int = 5,
    size: int = 40,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    without: tuple[str, ...] = (),
    seed: int = 0,
) -> ResidualCase:
    """Draw N(0, 1) inputs, equal on all devices.

    Drop path drops a third of the samples. Fields in `without` are None.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows = {name: normal(batch, tokens, size) for name in ROWS}
    vectors = {name: normal(size) for name in ("scale", "weight", "bias")}
    drop_path_scale = ((torch.arange(batch) % 3 != 1) / 0.7).float().to(device)
    without = (*without, "scale", "drop_path_scale") if "branch" in without else without
    absent: dict[str, Any] = dict.fromkeys(without)
    return replace(ResidualCase(drop_path_scale=drop_path_scale, **rows, **vectors), **absent)


def leaves_of(case: ResidualCase) -> dict[str, Tensor]:
    """Return the tensors that require gradients by name, with their strides."""
    return {name: x.detach().requires_grad_() for name, x in case.tensors().items() if name in LEAVES}


def eager(case: ResidualCase) -> dict[str, Tensor]:
    """Compute sum, normalized rows and gradients like the modules of a block."""
    leaves = leaves_of(case)
    total = leaves["residual"]
    if "branch" in leaves:
        branch = leaves["branch"] if case.scale is None else leaves["scale"] * leaves["branch"]
        if case.drop_path_scale is not None:
            branch = branch * case.drop_path_scale.to(branch.dtype)[:, None, None]
        total = total + branch
    dtype = total.dtype
    weight, bias = (None if name not in leaves else leaves[name].to(dtype) for name in ("weight", "bias"))
    return differentiate(case, leaves, total, F.layer_norm(total, total.shape[-1:], weight, bias, eps=EPS))


def eager_sum(case: ResidualCase) -> dict[str, Tensor]:
    """Compute the sum without the norm in plain PyTorch."""
    results = eager(replace(case, grad_normalized=None, weight=None, bias=None))
    del results["normalized"]
    return results


def fused(case: ResidualCase, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Compute sum, normalized rows and gradients with the operator."""
    leaves = leaves_of(case)
    residual, branch, scale, weight, bias = (leaves.get(name) for name in LEAVES)
    assert residual is not None
    total, normalized = residual_norm(residual, branch, scale, case.drop_path_scale, weight, bias, EPS, dtype)
    return differentiate(case, leaves, total, normalized)


def differentiate(
    case: ResidualCase, leaves: dict[str, Tensor], total: Tensor, normalized: Tensor
) -> dict[str, Tensor]:
    """Differentiate both outputs.

    Without a branch the sum is the residual, and its gradient is added to the gradient of the norm.
    """
    pairs = [(total, case.grad_sum), (normalized, case.grad_normalized)]
    pairs = [(out, grad.to(out.dtype)) for out, grad in pairs if grad is not None and out.requires_grad]
    outputs, incoming = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True)
    results = {"sum": total.detach(), "normalized": normalized.detach()}
    named = zip((f"d{name}" for name in leaves), gradients, strict=True)
    return results | {name: gradient for name, gradient in named if gradient is not None}
