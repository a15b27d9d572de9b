"""Launches the kernel: on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1.

The caller has validated shapes, dtypes and devices.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..common.device import architecture_of, device_of, dot_precision
from ..common.gpu import arithmetic
from . import configs
from .kernel import linear_gelu_kernel


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(x @ weight.T + bias)` with the exact GELU, summed and finished in fp32 and rounded once.

    Args:
        x: `[..., inputs]`, fp16, bf16 or fp32, any strides; copied where it is not `addressable`.
        weight: `[outputs, inputs]` in x's dtype, likewise; fewer than 2**24 outputs, since offsets within a tile of
            the result are int32.
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
        input_count = weight.shape[1]
        precision = dot_precision(x)
        tile = configs.select(architecture_of(x), arithmetic(x.element_size(), precision), row_count, output_count)
        blocks = triton.cdiv(row_count, tile.block_m) * triton.cdiv(output_count, tile.block_n)
        linear_gelu_kernel[(blocks,)](
            rows,
            weight,
            bias,
            out,
            rows.stride(0),
            weight.stride(0),
            0 if bias is None else bias.stride(0),
            row_count,
            output_count,
            input_count,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP=configs.GROUP,
            WHOLE_STEPS=input_count % tile.block_k == 0,
            PRECISION=precision,
            UPCAST=not x.is_cuda and x.dtype != torch.float32,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def addressable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy with zeros behind its rows where the kernel could not load 16 bytes at a time.

    Rows have to be a multiple of 16 numbers long and apart, of unit stride, and begin at a multiple of 16 bytes.
    """
    row_count, columns = matrix.shape
    row_stride, stride = matrix.stride()
    if stride == 1 and row_stride % 16 == columns % 16 == matrix.data_ptr() % 16 == 0:
        return matrix
    padded = matrix.new_zeros(row_count, -(-columns // 16) * 16)
    padded[:, :columns] = matrix
    return padded
