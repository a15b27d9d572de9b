"""Attention forward with an online softmax, and the combination of splits. The softmax is in base 2."""

import triton
import triton.language as tl

from ..common.primitives import LN_2, matmul, split_program_id
from .bias import bias_rows, load_cls_bias
from .primitives import (
    RUNTIME_INTEGERS,
    biased_scores,
    cls_validity,
    dropout_keep,
    head_base,
    load_cls,
    load_patches,
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
def softmax_step(
    scores,  # [M, N] fp32, divided by the scale
    valid,  # [N] bool; unused unless MASKED
    m_i,  # [M] fp32 running maximum of scores * scale * log2(e)
    l_i,  # [M] fp32 running sum of 2 ** (scores * scale_log2 - m_i)
    scale_log2,
    MASKED: tl.constexpr,
    GUARD: tl.constexpr,  # whether a row may have seen only -inf so far
):
    """Return (p, rescaling of earlier sums, m_i, l_i) after one more tile."""
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale_log2)
    m_safe = m_new
    # -inf - -inf is NaN; a row without a key so far gets weights of 0.
    if GUARD:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    # One fused multiply-add: the scale is applied here, and not to the tile of scores before the maximum.
    p = tl.exp2(scores * scale_log2 - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def forward_step(
    m_i,
    l_i,
    acc,  # [M, D] fp32
    start,  # first patch of this step
    q,  # [M, D]
    queries,  # [M] tokens
    query,  # pointer to token 0 of the head
    key,  # pointers to patch `start` of the head
    value,
    row_pointers,
    column_offsets,
    key_mask,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    batch,
    head,
    head_count,
    patch_count,
    scale_log2,
    drop_threshold,
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
    GUARD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Return (m_i, l_i, acc) after BLOCK_N more keys."""
    q = reload_rows(q, query, queries, query_strides, HEAD_DIM, BLOCK_D)
    k = load_patches(key, start, patch_count, key_strides, BLOCK_N, HEAD_DIM, BLOCK_D, TAIL)  # [N, D]
    scores = biased_scores(
        q, k, row_pointers, column_offsets, start, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR, PRECISION, UPCAST, FENCE
    )  # [M, N]
    MASKED: tl.constexpr = TAIL or key_mask is not None
    valid = None
    if MASKED:
        valid = patch_validity(key_mask, batch, start, patch_count, mask_strides, BLOCK_N)
    p, alpha, m_i, l_i = softmax_step(scores, valid, m_i, l_i, scale_log2, MASKED, GUARD)
    if DROPOUT:
        keys = start + tl.arange(0, BLOCK_N) + 1
        keep = dropout_keep(
            queries[:, None], keys[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
        )
        # l_i has the sum of all weights; those that are dropped are missing from acc alone.
        p = tl.where(keep, p, 0.0)
    v = load_patches(value, start, patch_count, value_strides, BLOCK_N, HEAD_DIM, BLOCK_D, TAIL)  # [N, D]
    acc = acc * alpha[:, None] + matmul(p.to(v.dtype), v, PRECISION, UPCAST)
    return m_i, l_i, acc


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def attention_forward_kernel(
    query,  # [batch_size, patch_count + 1, head_count, HEAD_DIM] fp16, bf16 or fp32
    key,  # as query
    value,  # as query
    packed_bias,  # [head_count, packed_size] fp32, or None
    column_offsets,  # [patch_count] int32 for the layout "extended", else None
    key_mask,  # [batch_size, patch_count + 1] bool, or None
    out,  # contiguous, as query; with SPLIT [num_splits, ...] fp32; written
    lse,  # [batch_size, head_count, patch_count + 1] fp32, natural logarithm; with SPLIT [num_splits, ...]; written
    query_strides,  # (batch, token, head), elements
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    batch_size,
    patch_count,
    head_count,
    packed_size,
    window_height,
    window_width,
    keys_per_split,  # patches, a multiple of BLOCK_N; not read without SPLIT
    scale_log2,  # scale * log2(e), positive
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a step
    BIAS_LAYOUT: tl.constexpr,  # "paired", "plain", "extended", or "none"
    BIAS_VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,  # how tl.dot multiplies fp32
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,  # see compiler_hazards.py
):
    """Compute `out` and `lse` of BLOCK_M queries of one head. Grid: (batch, query blocks, heads, splits) flattened."""
    # CLS makes m_i finite from the start, unless a mask or a split excludes it.
    GUARD: tl.constexpr = SPLIT or key_mask is not None
    # Batch is fastest, so that programs which run together read the same head's bias.
    batch, block, outer = split_program_id(tl.program_id(0), batch_size, tl.cdiv(patch_count + 1, BLOCK_M))
    head = outer % head_count
    split = outer // head_count
    rows = row_indices(block, BLOCK_M, BIAS_LAYOUT)
    queries = row_tokens(rows, patch_count)
    query = head_base(query, batch, head, query_strides)
    q = load_rows(query, queries, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
    key = head_base(key, batch, head, key_strides)
    value = head_base(value, batch, head, value_strides)

    # The CLS key initializes the online softmax: its column needs no matrix product, and the loop covers patches alone.
    m_i = tl.sum(q.to(tl.float32) * load_cls(key, HEAD_DIM, BLOCK_D)[None, :], 1)
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
        m_i += load_cls_bias(packed_bias, head, rows, patch_count, packed_size)
    m_i *= scale_log2
    l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + load_cls(value, HEAD_DIM, BLOCK_D)[None, :]
    if DROPOUT:
        keep = dropout_keep(queries, 0, batch, head, head_count, seed_low, seed_high, drop_threshold)
        acc = tl.where(keep[:, None], acc, 0.0)
    # The first split takes CLS.
    if GUARD:
        takes_cls = split == 0
        if key_mask is not None:
            takes_cls = takes_cls & cls_validity(key_mask, batch, mask_strides)
        m_i = tl.where(takes_cls, m_i, float("-inf"))
        l_i = tl.where(takes_cls, l_i, 0.0)
        acc = tl.where(takes_cls, acc, 0.0)

    if SPLIT:
        first = (split * keys_per_split).to(tl.int32)
        last = tl.minimum(first + keys_per_split, patch_count)
    else:
        first = 0
        last = patch_count
    key = patch_base(key, first, key_strides)
    value = patch_base(value, first, value_strides)
    # Only a ragged last tile checks bounds; it is compiled separately.
    whole = last - (last % BLOCK_N)
    for start in range(first, whole, BLOCK_N):
        m_i, l_i, acc = forward_step(
            m_i, l_i, acc, start, q, queries, query, key, value, row_pointers, column_offsets, key_mask,
            query_strides, key_strides, value_strides, mask_strides, batch, head, head_count, patch_count,
            scale_log2, drop_threshold, seed_low, seed_high, HEAD_DIM, BLOCK_D, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR,
            DROPOUT, PRECISION, UPCAST, FENCE, GUARD, False,
        )  # fmt: skip
        key += BLOCK_N * token_stride(key_strides, tl.int64)
        value += BLOCK_N * token_stride(value_strides, tl.int64)
    # The last splits may have no keys at all.
    if (whole < last) & (first <= whole):
        m_i, l_i, acc = forward_step(
            m_i, l_i, acc, whole, q, queries, query, key, value, row_pointers, column_offsets, key_mask,
            query_strides, key_strides, value_strides, mask_strides, batch, head, head_count, patch_count,
            scale_log2, drop_threshold, seed_low, seed_high, HEAD_DIM, BLOCK_D, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR,
            DROPOUT, PRECISION, UPCAST, FENCE, GUARD, True,
        )  # fmt: skip

    # A row without a key: lse is -inf, and out is 0 and not 0 / 0.
    row_lse = (m_i + tl.log2(l_i)) * LN_2
    if GUARD:
        no_key = l_i == 0.0
        row_lse = tl.where(no_key, float("-inf"), row_lse)
        l_i = tl.where(no_key, 1.0, l_i)
    acc = acc / l_i[:, None]
    if DROPOUT:
        acc *= drop_scale
    store_rows(out, acc, split * batch_size + batch, head, rows, patch_count, head_count, HEAD_DIM, BLOCK_D)
    row = ((split * batch_size + batch) * head_count + head) * (patch_count + 1) + queries
    tl.store(lse + row, row_lse, mask=rows <= patch_count)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def combine_splits_kernel(
    partial_out,  # [num_splits, batch_size, token_count, head_count, HEAD_DIM] fp32
    partial_lse,  # [num_splits, batch_size, head_count, token_count] fp32
    out,  # [batch_size, token_count, head_count, HEAD_DIM], written
    lse,  # [batch_size, head_count, token_count] fp32, written
    batch_size,
    token_count,
    head_count,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Combine the splits of BLOCK_M queries of one head. Grid: (batch, query blocks, heads) flattened."""
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(token_count, BLOCK_M))
    tokens = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = tokens < token_count
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    lse_offsets = (batch * head_count + head) * token_count + tokens
    lines = (batch * token_count + tokens) * head_count + head
    offsets = lines[:, None] * HEAD_DIM + columns[None, :]
    lse_size = batch_size.to(tl.int64) * head_count * token_count

    # Splits are read in order, so that the sum is deterministic.
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, num_splits):
        part = tl.load(partial_lse + split * lse_size + lse_offsets, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, part)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(0, num_splits):
        part = tl.load(partial_lse + split * lse_size + lse_offsets, mask=inside, other=float("-inf"))
        # A split weighs as much as its share of the softmax's sum.
        share = tl.exp(part - safe)
        total += share
        acc += share[:, None] * tl.load(partial_out + split * lse_size * HEAD_DIM + offsets, mask=mask, other=0.0)
    # No split has a key for this row.
    no_key = total == 0.0
    acc = acc / tl.where(no_key, 1.0, total)[:, None]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + lse_offsets, tl.where(no_key, float("-inf"), safe + tl.log(total)), mask=inside)
