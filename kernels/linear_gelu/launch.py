"""Launch the kernel on CUDA tensors, or on CPU tensors with TRITON_INTERPRET=1.

The caller validates shapes, dtypes and devices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuned_tiles
from ..common.device import architecture_of, device_of, dot_precision, needs_copy_fence
from ..common.gpu import arithmetic
from ..common.launch import launch_kernel
from . import configs
from .kernel import linear_gelu_kernel


class LinearGeluArguments(NamedTuple):
    """Parameters of `linear_gelu_kernel`, which documents them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    row_stride: int
    weight_stride: int
    bias_stride: int
    row_count: int
    output_count: int
    input_count: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    WHOLE_STEPS: bool
    PRECISION: str
    UPCAST: bool
    FENCE: bool


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `gelu(x @ weight.T + bias)` with the exact GELU.

    Sums and GELU are fp32 and rounded once.

    Args:
        x: `[..., inputs]`, fp16, bf16 or fp32, any strides; copied if it is not `addressable`.
        weight: `[outputs, inputs]` in x's dtype, copied like x; fewer than 2**24 outputs.
        bias: `[outputs]` in x's dtype, or None.

    Returns:
        `[..., outputs]` contiguous, in x's dtype.
    """
    output_count, input_count = weight.shape
    out = torch.empty((*x.shape[:-1], output_count), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    row_count = math.prod(x.shape[:-1])
    with device_of(x):
        rows, weight = addressable(x.reshape(row_count, input_count)), addressable(weight)
        # Both matrices are padded to a multiple of 16 inputs; the zeros add nothing to the sums.
        input_count = weight.shape[1]
        precision = dot_precision(x)
        tile = _tile(rows, row_count, output_count, precision)
        blocks = triton.cdiv(row_count, tile.block_m) * triton.cdiv(output_count, tile.block_n)
        arguments = LinearGeluArguments(
            x=rows,
            weight=weight,
            bias=bias,
            out=out,
            row_stride=rows.stride(0),
            weight_stride=weight.stride(0),
            bias_stride=0 if bias is None else bias.stride(0),
            row_count=row_count,
            output_count=output_count,
            input_count=input_count,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP=configs.GROUP,
            WHOLE_STEPS=input_count % tile.block_k == 0,
            PRECISION=precision,
            UPCAST=not x.is_cuda and x.dtype != torch.float32,
            FENCE=needs_copy_fence(x),
        )
        launch_kernel(linear_gelu_kernel, blocks, arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)
    return out


def _tile(x: Tensor, row_count: int, output_count: int, precision: str) -> configs.LinearTile:
    variant = f"{tuned_tiles.dtype_name(x)}-{precision}-{x.shape[1]}x{output_count}"
    tuned = tuned_tiles.find("linear_gelu", variant, row_count, x)
    if tuned is not None:
        return configs.LinearTile(*tuned)
    return configs.select(architecture_of(x), arithmetic(x.element_size(), precision), row_count, output_count)


def addressable(matrix: Tensor) -> Tensor:
    """Return the matrix, or a zero-padded copy for 16-byte loads."""
    row_count, columns = matrix.shape
    row_stride, stride = matrix.stride()
    # Multiples of 16 elements are what Triton specializes on; 16-byte loads need no less of fp32.
    if stride == 1 and row_stride % 16 == columns % 16 == matrix.data_ptr() % 16 == 0:
        return matrix
    padded = matrix.new_zeros(row_count, -(-columns // 16) * 16)
    padded[:, :columns] = matrix
    return padded
