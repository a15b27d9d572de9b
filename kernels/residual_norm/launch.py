"""Launch the kernels of residual and LayerNorm on CUDA tensors.

CPU tensors need TRITON_INTERPRET=1. The caller validates shapes, dtypes and devices, and allocates the tensors that are
filled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuned_tiles
from ..common.device import device_of, num_sms_of
from ..common.launch import launch_kernel
from . import backward, configs, forward

Strides = tuple[int, int]


class ForwardArguments(NamedTuple):
    """Parameters of `residual_norm_kernel`, which documents them."""

    residual: Tensor
    branch: Tensor | None
    scale: Tensor | None
    drop_path_scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    total: Tensor | None
    normalized: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    residual_strides: Strides
    branch_strides: Strides
    token_count: int
    eps: float
    SIZE: int
    BLOCK: int


class BackwardRows(NamedTuple):
    """Rows that the backward reads."""

    grad_total: Tensor | None
    grad_normalized: Tensor | None
    total: Tensor | None
    branch: Tensor | None
    grad_total_strides: Strides
    grad_normalized_strides: Strides
    total_strides: Strides
    branch_strides: Strides


class Partials(NamedTuple):
    """Each program's sums over its rows."""

    partial_scale: Tensor | None
    partial_weight: Tensor | None
    partial_bias: Tensor | None


class BackwardArguments(NamedTuple):
    """Parameters of `residual_norm_backward_kernel`, which documents them."""

    rows: BackwardRows
    scale: Tensor | None
    drop_path_scale: Tensor | None
    weight: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    grad_residual: Tensor | None
    grad_branch: Tensor | None
    partials: Partials
    token_count: int
    row_count: int
    rows_per_program: int
    SIZE: int
    BLOCK: int
    ROWS: int


class SumPartialsArguments(NamedTuple):
    """Parameters of `sum_partials_kernel`, which documents them."""

    partials: Partials
    grad_scale: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    program_count: int
    SIZE: int
    BLOCK_P: int
    BLOCK_C: int


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
    """Fill `total` with the residual sum, and `normalized` with its LayerNorm.

    The sum is `residual + drop_path_scale * scale * branch`.

    Args:
        residual, branch: `[B, N, E]`, fp16, bf16 or fp32, any strides; copied unless the last stride is 1.
        scale, weight, bias: `[E]` in any of these dtypes, or None.
        drop_path_scale: `[B]` fp32, the factor of each sample's branch, or None.
        eps: Added to the variance.
        total: `[B, N, E]` contiguous, in any of these dtypes; None if branch is None.
        normalized: Like total; None for the sum alone.
        mean, rstd: `[B, N]` contiguous fp32, one for each row; None if normalized is None.
    """
    batch, tokens, size = residual.shape
    if residual.numel() == 0:
        return
    with device_of(residual):
        # The kernel takes strides for rows only: the copy of a vector [E] costs little beside them.
        residual, branch = _rows(residual), None if branch is None else _rows(branch)
        arguments = ForwardArguments(
            residual=residual,
            branch=branch,
            scale=_contiguous(scale),
            drop_path_scale=_contiguous(drop_path_scale),
            weight=_contiguous(weight),
            bias=_contiguous(bias),
            total=total,
            normalized=normalized,
            mean=mean,
            rstd=rstd,
            residual_strides=_strides(residual),
            branch_strides=_strides(branch),
            token_count=tokens,
            eps=eps,
            SIZE=size,
            BLOCK=configs.padded_size(size),
        )
        (num_warps,) = _tuned("residual_norm", residual) or (configs.forward_warps(size),)
        launch_kernel(forward.residual_norm_kernel, batch * tokens, arguments, num_warps=num_warps)


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
    """Fill the gradients that are not None. Results are deterministic.

    Args:
        grad_total, grad_normalized: `[B, N, E]`, fp16, bf16 or fp32, any strides, 0 included; one may be None.
        total: The normalized sum, `[B, N, E]`. Like weight, mean and rstd, not read if grad_normalized is None.
        branch: As for the forward; needed for the gradient of scale.
        scale, drop_path_scale, weight, mean, rstd: As for the forward.
        gradients: Of residual, branch, scale, weight and bias, contiguous; the last two None without grad_normalized.
    """
    incoming = grad_total if grad_normalized is None else grad_normalized
    assert incoming is not None
    grad_residual, grad_branch, *shared = gradients
    if incoming.numel() == 0:
        # No program would run, and a sum over no rows is 0.
        for gradient in shared:
            if gradient is not None:
                gradient.zero_()
        return
    if grad_normalized is None:  # None compiles a kernel without what is not needed
        total = weight = mean = rstd = None
    if shared[0] is None:
        branch = None
    _, tokens, size = incoming.shape
    row_count = incoming.numel() // size
    with device_of(incoming):
        num_warps, share = _backward_plan(incoming)
        partials = Partials(*(None if tensor is None else _partial(share.programs, tensor) for tensor in shared))
        arguments = BackwardArguments(
            rows=_backward_rows(grad_total, grad_normalized, total, branch),
            scale=_contiguous(scale),
            drop_path_scale=_contiguous(drop_path_scale),
            weight=_contiguous(weight),
            mean=_contiguous(mean),
            rstd=_contiguous(rstd),
            grad_residual=grad_residual,
            grad_branch=grad_branch,
            partials=partials,
            token_count=tokens,
            row_count=row_count,
            rows_per_program=share.rows_per_program,
            SIZE=size,
            BLOCK=configs.padded_size(size),
            ROWS=configs.BACKWARD_ROWS,
        )
        launch_kernel(backward.residual_norm_backward_kernel, share.programs, arguments, num_warps=num_warps)
        if any(tensor is not None for tensor in shared):
            _sum_partials(partials, shared, share.programs, size)


def _backward_rows(*tensors: Tensor | None) -> BackwardRows:
    grad_total, grad_normalized, total, branch = (None if tensor is None else _rows(tensor) for tensor in tensors)
    return BackwardRows(
        grad_total=grad_total,
        grad_normalized=grad_normalized,
        total=total,
        branch=branch,
        grad_total_strides=_strides(grad_total),
        grad_normalized_strides=_strides(grad_normalized),
        total_strides=_strides(total),
        branch_strides=_strides(branch),
    )


def _sum_partials(partials: Partials, gradients: Sequence[Tensor | None], programs: int, size: int) -> None:
    """Sum the programs' partial gradients of scale, weight and bias."""
    grad_scale, grad_weight, grad_bias = gradients
    arguments = SumPartialsArguments(
        partials=partials,
        grad_scale=grad_scale,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        program_count=programs,
        SIZE=size,
        BLOCK_P=configs.PARTIALS_BLOCK,
        BLOCK_C=configs.COLUMNS_BLOCK,
    )
    blocks = triton.cdiv(size, configs.COLUMNS_BLOCK)
    launch_kernel(backward.sum_partials_kernel, blocks, arguments, num_warps=configs.PARTIALS_WARPS)


def _rows(tensor: Tensor) -> Tensor:
    """Return rows whose elements are adjacent: the tensor, or a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _strides(tensor: Tensor | None) -> Strides:
    """Strides of batch and token."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _partial(programs: int, gradient: Tensor) -> Tensor:
    """Allocate each program's sum over its rows."""
    # fp32 whatever the dtype of the gradient, which is rounded once, after all programs are added.
    return torch.empty((programs, *gradient.shape), dtype=torch.float32, device=gradient.device)


def _backward_plan(rows: Tensor) -> tuple[int, configs.RowShare]:
    """Return warps and programs of the backward for rows `[B, N, E]`."""
    size = rows.shape[-1]
    shipped = (configs.backward_warps(size), configs.PROGRAMS_PER_SM)
    num_warps, programs_per_sm = _tuned("residual_norm_backward", rows) or shipped
    return num_warps, configs.share_rows(rows.numel() // size, num_sms_of(rows), programs_per_sm)


def _tuned(kernel: str, rows: Tensor) -> tuned_tiles.Tile | None:
    """Return the tuned tile for rows `[B, N, E]`."""
    size = rows.shape[-1]
    return tuned_tiles.find(kernel, f"{tuned_tiles.dtype_name(rows)}-e{size}", rows.numel() // size, rows)
