"""Delta and lse of every row, and the gradient of the scores.

The backward kernels read delta and lse. One program sums each element of each gradient, in a fixed order and without
atomics: results are deterministic.
"""

import triton
import triton.language as tl

from ..common.primitives import LOG2_E, split_program_id
from .primitives import RUNTIME_INTEGERS, head_base, load_rows


@triton.jit
def score_gradient(
    p,  # [...] fp32 attention weights
    dp,  # [...] fp32 gradient of the weights after dropout
    delta,  # fp32, broadcasts
    keep,  # bool, broadcasts; unused unless DROPOUT
    drop_scale,
    DROPOUT: tl.constexpr,
):
    """Return the fp32 gradient of the scores. It is the gradient of the bias too."""
    if DROPOUT:
        dp = tl.where(keep, dp * drop_scale, 0.0)
    return p * (dp - delta)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_preprocess_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    out,  # as grad_out
    lse,  # contiguous [batch_size, head_count, patch_count + 1] fp32
    lse_log2,  # [batch_size, head_count, lse_stride] fp32, written: base 2, +inf for rows without a key
    delta,  # as lse_log2, written: rowsum(grad_out * out)
    grad_strides,  # (batch, token, head), elements
    out_strides,
    batch_size,
    patch_count,
    head_count,
    lse_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write delta and lse of BLOCK_M rows of one head. Grid: (batch, row blocks, heads) flattened."""
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(lse_stride, BLOCK_M))
    # Patches come first, so that dK and dV load them without a shift. Padding up to the end of any tile follows; CLS is
    # fourth from the end, which keeps heads aligned to 16 bytes.
    positions = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_cls = positions == lse_stride - 4
    tokens = tl.where(is_cls, 0, tl.minimum(positions, patch_count - 1) + 1)
    exists = is_cls | (positions < patch_count)
    gradient = load_rows(head_base(grad_out, batch, head, grad_strides), tokens, grad_strides, HEAD_DIM, BLOCK_D)
    output = load_rows(head_base(out, batch, head, out_strides), tokens, out_strides, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    plane = batch * head_count + head
    row_lse = tl.load(lse + plane * (patch_count + 1) + tokens)
    # exp2(score - inf) = 0: the weights of padding, and of rows without a key, vanish without a mask.
    row_lse = tl.where(exists & (row_lse != float("-inf")), row_lse * LOG2_E, float("inf"))
    inside = positions < lse_stride
    tl.store(lse_log2 + plane * lse_stride + positions, row_lse, mask=inside)
    tl.store(delta + plane * lse_stride + positions, tl.where(exists, row_delta, 0.0), mask=inside)
