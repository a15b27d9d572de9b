"""Fallback of residual, layer scale, drop path and LayerNorm in PyTorch operations.

Arithmetic is fp32, or fp64 if a tensor is fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_dtype(residual: Tensor, branch: Tensor | None, scale: Tensor | None) -> torch.dtype:
    """The type of `residual + scale * branch`, by PyTorch's type promotion."""
    dtype = residual.dtype
    for other in (branch, scale):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def residual_add(residual: Tensor, branch: Tensor, scale: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    """`residual + drop_path_scale * scale * branch`, `[B, N, E]`."""
    dtype = sum_dtype(residual, branch, scale)
    wide = _wide(dtype)
    return (residual.to(wide) + _scaled(branch.to(wide), scale, drop_path_scale)).to(
        dtype, memory_format=torch.contiguous_format
    )


def layer_norm(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute LayerNorm of the rows in `dtype`.

    Return also the mean and the inverse standard deviation of the rows, `[B, N]`.
    """
    wide = _wide(total.dtype)
    variance, mean = torch.var_mean(total.to(wide), -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    normalized = (total.to(wide) - mean) * rstd
    if weight is not None:
        normalized = normalized * weight.to(wide)
    if bias is not None:
        normalized = normalized + bias.to(wide)
    normalized = normalized.to(dtype, memory_format=torch.contiguous_format)
    return normalized, mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()


def layer_norm_backward(
    grad_normalized: Tensor, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the input rows, weight and bias. They are not yet rounded."""
    grad = grad_normalized.to(mean.dtype)
    x = (total.to(mean.dtype) - mean[..., None]) * rstd[..., None]
    weighted = grad if weight is None else grad * weight.to(mean.dtype)
    along_x = (weighted * x).mean(-1, keepdim=True)
    grad_total = (weighted - weighted.mean(-1, keepdim=True) - x * along_x) * rstd[..., None]
    return grad_total, (grad * x).sum((0, 1)), grad.sum((0, 1))


def branch_backward(
    grad: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    drop_path_scale: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of branch and scale from that of the sum.

    They are not yet rounded, and None if not needed.
    """
    grad = _scaled(grad.to(_wide(grad.dtype)), None, drop_path_scale)
    needs_branch, needs_scale = output_mask
    grad_scale = (grad * branch).sum((0, 1)) if needs_scale and branch is not None else None
    return _scaled(grad, scale, None) if needs_branch else None, grad_scale


def _scaled(branch: Tensor, scale: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    if scale is not None:
        branch = branch * scale.to(branch.dtype)
    return branch if drop_path_scale is None else branch * drop_path_scale.to(branch.dtype)[:, None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
