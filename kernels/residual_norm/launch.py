"""Launches the kernels of residual and LayerNorm: on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1.

The caller has validated shapes, dtypes and devices, and gives the tensors that are filled here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..common.device import device_of, num_sms_of
from . import backward, configs, forward


def fill_forward(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    drop_path_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    normalized: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Fill `total` with `residual + drop_path_scale * scale * branch`, and `normalized` with the LayerNorm of that.

    Args:
        residual, branch: `[B, N, E]`, fp16, bf16 or fp32, any strides (a copy is made unless the last one is 1).
        scale, weight, bias: `[E]` in any of these types, or None.
        drop_path_scale: `[B]` fp32, what the branch of each sample is multiplied by, or None.
        eps: added to the variance.
        total: `[B, N, E]` contiguous, in any of these types; None where branch is: residual is normalised as it is.
        normalized: as total; None for the sum alone.
        mean, rstd: `[B, N]` contiguous fp32, of the rows; None where normalized is.
    """
    batch, tokens, size = residual.shape
    if residual.numel() == 0:
        return
    with device_of(residual):
        residual, branch = _rows(residual), None if branch is None else _rows(branch)
        forward.residual_norm_kernel[(batch * tokens,)](
            residual,
            branch,
            *map(_contiguous, (scale, drop_path_scale, weight, bias)),
            total,
            normalized,
            mean,
            rstd,
            _strides(residual),
            _strides(branch),
            tokens,
            eps,
            SIZE=size,
            BLOCK=configs.padded_size(size),
            num_warps=configs.forward_warps(size),
        )


def fill_backward(
    grad_total: Tensor | None,
    grad_normalized: Tensor | None,
    total: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    drop_path_scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> None:
    """Fill the gradients of residual, branch, scale, weight and bias, as far as they are there. Deterministic.

    Args:
        grad_total, grad_normalized: `[B, N, E]`, fp16, bf16 or fp32, any strides, 0 included; one may be None.
        total: what was normalised, `[B, N, E]`; like weight, mean and rstd not looked at without grad_normalized.
        branch: as it went into the forward; needed for the gradient of scale.
        scale, drop_path_scale, weight: as they went into the forward.
        mean, rstd: as the forward filled them.
        gradients: contiguous, in any of these types; the last two are None without grad_normalized.
    """
    incoming = grad_total if grad_normalized is None else grad_normalized
    assert incoming is not None
    grad_residual, grad_branch, *shared = gradients
    if incoming.numel() == 0:
        for gradient in shared:
            if gradient is not None:
                gradient.zero_()
        return
    if grad_normalized is None:
        total = weight = mean = rstd = None
    if shared[0] is None:
        branch = None
    _, tokens, size = incoming.shape
    row_count = incoming.numel() // size
    with device_of(incoming):
        rows = [None if tensor is None else _rows(tensor) for tensor in (grad_total, grad_normalized, total, branch)]
        share = configs.share_rows(row_count, num_sms_of(incoming))
        partials = [None if tensor is None else _partials(share.programs, size, tensor.device) for tensor in shared]
        backward.residual_norm_backward_kernel[(share.programs,)](
            *rows,
            *map(_contiguous, (scale, drop_path_scale, weight, mean, rstd)),
            grad_residual,
            grad_branch,
            *partials,
            *map(_strides, rows),
            tokens,
            row_count,
            share.rows_per_program,
            SIZE=size,
            BLOCK=configs.padded_size(size),
            ROWS=configs.BACKWARD_ROWS,
            num_warps=configs.backward_warps(size),
        )
        if any(tensor is not None for tensor in shared):
            _sum_partials(partials, shared, share.programs, size)


def _sum_partials(
    partials: Sequence[Tensor | None], gradients: Sequence[Tensor | None], programs: int, size: int
) -> None:
    backward.sum_partials_kernel[(triton.cdiv(size, configs.COLUMNS_BLOCK),)](
        *partials,
        *gradients,
        programs,
        SIZE=size,
        BLOCK_P=configs.PARTIALS_BLOCK,
        BLOCK_C=configs.COLUMNS_BLOCK,
        num_warps=configs.PARTIALS_WARPS,
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where the numbers of a row are no neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Those of batch and token."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _partials(programs: int, size: int, device: torch.device) -> Tensor:
    """Room for each program's sum over its rows."""
    return torch.empty((programs, size), dtype=torch.float32, device=device)
