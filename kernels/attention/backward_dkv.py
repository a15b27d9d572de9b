"""dK and dV of the attention backward: one pass over the queries, on transposed tiles."""

import triton
import triton.language as tl

from ..common.primitives import matmul, split_program_id
from .backward_preprocess import score_gradient
from .bias import bias_rows, load_cls_bias
from .primitives import (
    RUNTIME_INTEGERS,
    biased_scores,
    dropout_keep,
    head_base,
    load_cls,
    load_key_validity,
    load_patches,
    load_rows,
    patch_base,
    reload_rows,
    row_indices,
    row_tokens,
    store_rows,
    token_stride,
)


@triton.jit
def backward_dkv_step(
    key_acc,  # [N, D] fp32; without KEY a number, which stays as it is
    value_acc,  # as key_acc, without VALUE
    start,  # first query patch of this step
    k,  # [N, D]
    v,  # [N, D]
    keys,  # [N] tokens
    key,  # pointers to token 0 of the head
    value,
    query,  # pointers to patch `start` of the head
    grad_out,
    lse_base,  # pointer to the lse of the head's patch 0
    delta_base,  # as lse_base
    row_pointers,
    column_offsets,
    key_strides,
    value_strides,
    query_strides,
    grad_strides,
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
    BLOCK_M: tl.constexpr,
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Return (key_acc, value_acc) after BLOCK_M more queries."""
    # Tiles are [keys, queries], so that the sums over queries need no transposed product.
    k = reload_rows(k, key, keys, key_strides, HEAD_DIM, BLOCK_D)
    v = reload_rows(v, value, keys, value_strides, HEAD_DIM, BLOCK_D)
    q = load_patches(query, start, patch_count, query_strides, BLOCK_M, HEAD_DIM, BLOCK_D, TAIL)  # [M, D]
    do = load_patches(grad_out, start, patch_count, grad_strides, BLOCK_M, HEAD_DIM, BLOCK_D, TAIL)
    scores = biased_scores(
        k, q, row_pointers, column_offsets, start, BLOCK_M, BIAS_LAYOUT, BIAS_VECTOR, PRECISION, UPCAST, FENCE
    )  # [N, M]
    patches = start + tl.arange(0, BLOCK_M)
    # Masked keys need no mask here: their rows of dK and dV are set to 0 after the loop.
    p = tl.exp2(scores * scale_log2 - tl.load(lse_base + patches)[None, :])
    if TAIL:
        p = tl.where((patches < patch_count)[None, :], p, 0.0)
    keep = None
    if DROPOUT:
        keep = dropout_keep(
            patches[None, :] + 1, keys[:, None], batch, head, head_count, seed_low, seed_high, drop_threshold
        )
    if VALUE:
        # dV sees the weights after dropout; ds needs those before it.
        dropped = p
        if DROPOUT:
            dropped = tl.where(keep, p * drop_scale, 0.0)
        value_acc += matmul(dropped.to(do.dtype), do, PRECISION, UPCAST)
    if KEY:
        dp = matmul(v, tl.trans(do), PRECISION, UPCAST)  # [N, M]
        ds = score_gradient(p, dp, tl.load(delta_base + patches)[None, :], keep, drop_scale, DROPOUT)
        key_acc += matmul(ds.to(q.dtype), q, PRECISION, UPCAST)
    return key_acc, value_acc


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_dkv_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    packed_bias,  # [head_count, packed_size] fp32, flipped, or None
    column_offsets,  # [patch_count] int32 for the layout "extended", else None
    key_mask,  # [batch_size, patch_count + 1] bool, or None
    lse_log2,  # [batch_size, head_count, lse_stride] fp32
    delta,  # as lse_log2
    grad_key,  # contiguous, as key, written; None if not needed
    grad_value,  # contiguous, as value, written; None if not needed
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
    scale,
    scale_log2,  # scale * log2(e), positive
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a step
    BLOCK_N: tl.constexpr,  # keys of a program
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,  # see compiler_hazards.py
):
    """Compute dK and dV of BLOCK_N keys of one head. Grid: (batch, key blocks, heads) flattened."""
    # Batch is fastest, so that programs which run together read the same head's bias.
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(patch_count + 1, BLOCK_N))
    rows = row_indices(block, BLOCK_N, BIAS_LAYOUT)
    keys = row_tokens(rows, patch_count)
    key = head_base(key, batch, head, key_strides)
    value = head_base(value, batch, head, value_strides)
    k = load_rows(key, keys, key_strides, HEAD_DIM, BLOCK_D)  # [N, D]
    v = load_rows(value, keys, value_strides, HEAD_DIM, BLOCK_D)
    query = head_base(query, batch, head, query_strides)
    grad_out = head_base(grad_out, batch, head, grad_strides)
    lse_base = lse_log2 + (batch * head_count + head) * lse_stride
    delta_base = delta + (batch * head_count + head) * lse_stride

    # The CLS query initializes both sums: it needs no matrix product, and the loop covers patches alone.
    cls_query = load_cls(query, HEAD_DIM, BLOCK_D)[None, :]
    cls_gradient = load_cls(grad_out, HEAD_DIM, BLOCK_D)[None, :]
    scores = tl.sum(k.to(tl.float32) * cls_query, 1)  # [N], of the CLS query
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
    # CLS is fourth from the end: see backward_preprocess_kernel.
    p = tl.exp2(scores * scale_log2 - tl.load(lse_base + lse_stride - 4))
    keep = None
    dropped = p
    if DROPOUT:
        keep = dropout_keep(0, keys, batch, head, head_count, seed_low, seed_high, drop_threshold)
        dropped = tl.where(keep, p * drop_scale, 0.0)
    # Triton's loops carry tensors and never None: a sum that is not needed is a number.
    if grad_value is not None:  # noqa: SIM108 - compiled
        value_acc = dropped[:, None] * cls_gradient  # [N, D]
    else:
        value_acc = tl.full((), 0.0, tl.float32)
    if grad_key is not None:
        dp = tl.sum(v.to(tl.float32) * cls_gradient, 1)
        cls_delta = tl.load(delta_base + lse_stride - 4)
        key_acc = score_gradient(p, dp, cls_delta, keep, drop_scale, DROPOUT)[:, None] * cls_query
    else:
        key_acc = tl.full((), 0.0, tl.float32)

    query = patch_base(query, 0, query_strides)
    grad_out = patch_base(grad_out, 0, grad_strides)
    # Only a ragged last tile checks bounds; it is compiled separately.
    whole = patch_count - (patch_count % BLOCK_M)
    for start in range(0, whole, BLOCK_M):
        key_acc, value_acc = backward_dkv_step(
            key_acc, value_acc, start, k, v, keys, key, value, query, grad_out, lse_base, delta_base, row_pointers,
            column_offsets, key_strides, value_strides, query_strides, grad_strides, batch, head, head_count,
            patch_count, scale_log2, drop_threshold, drop_scale, seed_low, seed_high, HEAD_DIM, BLOCK_D, BLOCK_M,
            BIAS_LAYOUT, BIAS_VECTOR, DROPOUT, PRECISION, UPCAST, FENCE, grad_key is not None, grad_value is not None,
            False,
        )  # fmt: skip
        query += BLOCK_M * token_stride(query_strides, tl.int64)
        grad_out += BLOCK_M * token_stride(grad_strides, tl.int64)
    if whole < patch_count:
        key_acc, value_acc = backward_dkv_step(
            key_acc, value_acc, whole, k, v, keys, key, value, query, grad_out, lse_base, delta_base, row_pointers,
            column_offsets, key_strides, value_strides, query_strides, grad_strides, batch, head, head_count,
            patch_count, scale_log2, drop_threshold, drop_scale, seed_low, seed_high, HEAD_DIM, BLOCK_D, BLOCK_M,
            BIAS_LAYOUT, BIAS_VECTOR, DROPOUT, PRECISION, UPCAST, FENCE, grad_key is not None, grad_value is not None,
            True,
        )  # fmt: skip

    # Masked keys have weights of 0, and so do their gradients.
    if key_mask is not None:
        valid = load_key_validity(key_mask, batch, keys, mask_strides)[:, None]
    if grad_key is not None:
        if key_mask is not None:
            key_acc = tl.where(valid, key_acc, 0.0)
        store_rows(grad_key, key_acc * scale, batch, head, rows, patch_count, head_count, HEAD_DIM, BLOCK_D)
    if grad_value is not None:
        if key_mask is not None:
            value_acc = tl.where(valid, value_acc, 0.0)
        store_rows(grad_value, value_acc, batch, head, rows, patch_count, head_count, HEAD_DIM, BLOCK_D)
