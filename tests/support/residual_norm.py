"""Inputs and eager reference for residual, layer scale, drop path and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.ops.residual_norm import residual_add, residual_norm

from .operator_case import OperatorCase
from .oracle import compare_results

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
    return replace(ResidualCase(drop_path_scale=drop_path_scale, **rows, **vectors), **dict.fromkeys(without))


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
    vectors = [None if name not in leaves else leaves[name].to(dtype) for name in ("weight", "bias")]
    return _differentiate(case, leaves, total, F.layer_norm(total, total.shape[-1:], *vectors, eps=EPS))


def fused(case: ResidualCase, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Compute sum, normalized rows and gradients with the operator."""
    leaves = leaves_of(case)
    optional = [leaves.get(name) for name in ("branch", "scale")]
    vectors = [leaves.get(name) for name in ("weight", "bias")]
    total, normalized = residual_norm(leaves["residual"], *optional, case.drop_path_scale, *vectors, EPS, dtype)
    return _differentiate(case, leaves, total, normalized)


def eager_sum(case: ResidualCase) -> dict[str, Tensor]:
    """Compute the sum without the norm in plain PyTorch."""
    results = eager(replace(case, grad_normalized=None, weight=None, bias=None))
    del results["normalized"]
    return results


def fused_sum(case: ResidualCase) -> dict[str, Tensor]:
    """Compute the sum without the norm with its operator."""
    leaves = leaves_of(replace(case, weight=None, bias=None))
    total = residual_add(leaves["residual"], leaves["branch"], leaves.get("scale"), case.drop_path_scale)
    gradients = torch.autograd.grad(total, list(leaves.values()), case.grad_sum)
    return {"sum": total.detach()} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def _differentiate(
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


def check_parity(
    case: ResidualCase,
    run: Callable[[ResidualCase], dict[str, Tensor]] = fused,
    reference: Callable[[ResidualCase], dict[str, Tensor]] = eager,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Check `run` against `reference` in fp64.

    The error budget is the error of `reference` in the dtypes of the case. `dtype` is the coarsest dtype if the case
    mixes several.
    """
    results = run(case)
    compare_results(results, reference(case.to(torch.float64)), reference(case), dtype)
    for name, actual in results.items():
        assert actual.is_contiguous(), name
    return results
