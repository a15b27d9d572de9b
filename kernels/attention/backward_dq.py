"""dQ of the attention backward: one pass over the keys."""

import triton
import triton.language as tl

from ..common.primitives import matmul, split_program_id
from .backward_preprocess import score_gradient
from .bias import bias_rows, load_cls_bias
from .primitives import (
    RUNTIME_INTEGERS,
    biased_scores,
    cls_validity,
    dropout_keep,
    head_base,
    load_cls,
    load_patches,
    load_row_values,
    load_rows,
    patch_base,
    patch_validity,
    reload_rows,
    row_indices,
    row_tokens,
    store_rows,
    token_stride,
)


@triton.jit
def backward_dq_step(
    acc,  # [M, D] fp32
    start,  # first key patch of this step
    q,  # [M, D]
    do,  # [M, D]
    queries,  # [M] tokens
    lse,  # [M] fp32, base 2
    delta,  # [M] fp32
    query,  # pointers to token 0 of the head
    grad_out,
    key,  # pointers to patch `start` of the head
    value,
    row_pointers,
    column_offsets,
    key_mask,
    query_strides,
    grad_strides,
    key_strides,
    value_strides,
    mask_strides,
    batch,
    head,
    head_count,
    patch_count,
    scale_log2,
    drop_threshold,
    drop_scale,
    seed_low,
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Return acc after BLOCK_N more keys."""
    q = reload_rows(q, query, queries, query_strides, HEAD_DIM, BLOCK_D)
    do = reload_rows(do, grad_out, queries, grad_strides, HEAD_DIM, BLOCK_D)
    k = load_patches(key, start, patch_count, key_strides, BLOCK_N, HEAD_DIM, BLOCK_D, TAIL)  # [N, D]
    v = load_patches(value, start, patch_count, value_strides, BLOCK_N, HEAD_DIM, BLOCK_D, TAIL)
    scores = biased_scores(
        q, k, row_pointers, column_offsets, start, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR, PRECISION, UPCAST, FENCE
    )  # [M, N]
    # lse is +inf for rows without a key, whose weights are 0 here. Other rows may still have masked keys.
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    if TAIL or key_mask is not None:
        p = tl.where(patch_validity(key_mask, batch, start, patch_count, mask_strides, BLOCK_N)[None, :], p, 0.0)
    keep = None
    if DROPOUT:
        keys = start + tl.arange(0, BLOCK_N) + 1
        keep = dropout_keep(
            queries[:, None], keys[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
        )
    dp = matmul(do, tl.trans(v), PRECISION, UPCAST)  # [M, N]
    ds = score_gradient(p, dp, delta[:, None], keep, drop_scale, DROPOUT)
    # Rounded to the inputs' dtype for the tensor cores, as p is in the forward.
    return acc + matmul(ds.to(k.dtype), k, PRECISION, UPCAST)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_dq_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    packed_bias,  # [head_count, packed_size] fp32, or None
    column_offsets,  # [patch_count] int32 for the layout "extended", else None
    key_mask,  # [batch_size, patch_count + 1] bool, or None
    lse_log2,  # [batch_size, head_count, lse_stride] fp32
    delta,  # as lse_log2
    grad_query,  # contiguous, as query, written
    grad_strides,  # (batch, token, head), elements
    query_strides,
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    batch_size,
    patch_count,
    head_count,
    lse_stride,
    packed_size,
    window_height,
    window_width,
    scale,  # of the result, signed
    scale_log2,  # |scale| * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a step
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,  # see compiler_hazards.py
):
    """Compute dQ of BLOCK_M queries of one head. Grid: (batch, query blocks, heads) flattened."""
    # Batch is fastest, so that programs which run together read the same head's bias.
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(patch_count + 1, BLOCK_M))
    rows = row_indices(block, BLOCK_M, BIAS_LAYOUT)
    queries = row_tokens(rows, patch_count)
    query = head_base(query, batch, head, query_strides)
    grad_out = head_base(grad_out, batch, head, grad_strides)
    q = load_rows(query, queries, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
    do = load_rows(grad_out, queries, grad_strides, HEAD_DIM, BLOCK_D)
    row_lse = load_row_values(lse_log2, batch, head, rows, patch_count, head_count, lse_stride)
    row_delta = load_row_values(delta, batch, head, rows, patch_count, head_count, lse_stride)
    key = head_base(key, batch, head, key_strides)
    value = head_base(value, batch, head, value_strides)

    # The CLS key initializes acc: its column needs no matrix product, and the loop covers patches alone.
    cls_key = load_cls(key, HEAD_DIM, BLOCK_D)[None, :]
    scores = tl.sum(q.to(tl.float32) * cls_key, 1)  # [M], with the CLS key
    row_pointers = None
    if BIAS_LAYOUT != "none":
        row_pointers = bias_rows(
            packed_bias,
            head,
            rows,
            patch_count,
            packed_size,
            window_height,
            window_width,
            BIAS_LAYOUT,
            BIAS_VECTOR,
        )
        scores += load_cls_bias(packed_bias, head, rows, patch_count, packed_size)
    p = tl.exp2(scores * scale_log2 - row_lse)
    if key_mask is not None:
        p = tl.where(cls_validity(key_mask, batch, mask_strides), p, 0.0)
    keep = None
    if DROPOUT:
        keep = dropout_keep(queries, 0, batch, head, head_count, seed_low, seed_high, drop_threshold)
    dp = tl.sum(do.to(tl.float32) * load_cls(value, HEAD_DIM, BLOCK_D)[None, :], 1)
    acc = score_gradient(p, dp, row_delta, keep, drop_scale, DROPOUT)[:, None] * cls_key  # [M, D]

    key = patch_base(key, 0, key_strides)
    value = patch_base(value, 0, value_strides)
    # Only a ragged last tile checks bounds; it is compiled separately.
    whole = patch_count - (patch_count % BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        acc = backward_dq_step(
            acc, start, q, do, queries, row_lse, row_delta, query, grad_out, key, value, row_pointers,
            column_offsets, key_mask, query_strides, grad_strides, key_strides, value_strides, mask_strides,
            batch, head, head_count, patch_count, scale_log2, drop_threshold, drop_scale, seed_low, seed_high,
            HEAD_DIM, BLOCK_D, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR, DROPOUT, PRECISION, UPCAST, FENCE, False,
        )  # fmt: skip
        key += BLOCK_N * token_stride(key_strides, tl.int64)
        value += BLOCK_N * token_stride(value_strides, tl.int64)
    if whole < patch_count:
        acc = backward_dq_step(
            acc, whole, q, do, queries, row_lse, row_delta, query, grad_out, key, value, row_pointers,
            column_offsets, key_mask, query_strides, grad_strides, key_strides, value_strides, mask_strides,
            batch, head, head_count, patch_count, scale_log2, drop_threshold, drop_scale, seed_low, seed_high,
            HEAD_DIM, BLOCK_D, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR, DROPOUT, PRECISION, UPCAST, FENCE, True,
        )  # fmt: skip
    # The scale multiplies the sum once, and not every tile of ds.
    store_rows(grad_query, acc * scale, batch, head, rows, patch_count, head_count, HEAD_DIM, BLOCK_D)
