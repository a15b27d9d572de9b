"""What the backward kernels share: row statistics, and the gradient of the scores.

One program sums each element of each gradient, in one order: no atomics, and two runs agree bit for bit.
"""

import triton
import triton.language as tl

from ..common.primitives import LOG2_E, split_program_id
from .primitives import RUNTIME_INTEGERS, head_base, load_owned


@triton.jit
def score_gradient(
    p,  # [...] fp32 attention weights
    weight_gradient,  # [...] fp32 gradient of the weights after dropout
    delta,  # fp32, broadcasts
    keep,  # bool, broadcasts; unused unless DROPOUT
    drop_scale,
    DROPOUT: tl.constexpr,
):
    """[...] fp32 gradient of the scores, bias included."""
    if DROPOUT:
        weight_gradient = tl.where(keep, weight_gradient * drop_scale, 0.0)
    return p * (weight_gradient - delta)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def row_statistics_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    out,  # as grad_out
    lse,  # contiguous [batch_size, head_count, patch_count + 1] fp32
    row_lse,  # [batch_size, head_count, statistic_pitch] fp32, written: base 2, +inf where there is no weight
    row_delta,  # as row_lse, written: rowsum(grad_out * out)
    grad_strides,  # (batch, token, head), elements
    out_strides,
    batch_size,
    patch_count,
    head_count,
    statistic_pitch,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What every row needs in the backward: patches first, padding that weighs nothing, CLS fourth from the end."""
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(statistic_pitch, BLOCK_M))
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_cls = places == statistic_pitch - 4
    tokens = tl.where(is_cls, 0, tl.minimum(places, patch_count - 1) + 1)
    exists = is_cls | (places < patch_count)
    gradient = load_owned(head_base(grad_out, batch, head, grad_strides), tokens, grad_strides, HEAD_DIM, BLOCK_D)
    output = load_owned(head_base(out, batch, head, out_strides), tokens, out_strides, HEAD_DIM, BLOCK_D)
    delta = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    plane = batch * head_count + head
    log_sum = tl.load(lse + plane * (patch_count + 1) + tokens)
    log_sum = tl.where(exists & (log_sum != float("-inf")), log_sum * LOG2_E, float("inf"))
    inside = places < statistic_pitch
    tl.store(row_lse + plane * statistic_pitch + places, log_sum, mask=inside)
    tl.store(row_delta + plane * statistic_pitch + places, tl.where(exists, delta, 0.0), mask=inside)
