"""Forward kernels: the extended bias table, and attention with an online softmax in base 2."""

import triton
import triton.language as tl

from .primitives import (
    LN_2,
    LOG2_E,
    RUNTIME_INTEGERS,
    dropout_keep,
    key_bias_offsets,
    load_bias_tile,
    load_key_validity,
    load_rows,
    matmul,
    query_bias_offsets,
    split_program_id,
    store_rows,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def expand_table_kernel(
    table,  # [2 * span + 4, heads], any float type
    extended,  # [heads, 5 * span + 4] fp32, written
    table_strides,  # (row, head), elements
    span,  # half of the number of patch rows, rounded down
    BLOCK: tl.constexpr,
):
    """Write the extended table, times log2(e). Grid: (blocks of one head, heads) flattened, block fastest."""
    size = 5 * span + 4
    block_count = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    head = (program // block_count).to(tl.int64)
    columns = (program % block_count) * BLOCK + tl.arange(0, BLOCK)
    patch_rows = 2 * span + 1
    rows = tl.where(
        columns < patch_rows,
        columns,
        tl.where(
            columns < patch_rows + span + 1,
            patch_rows + 1,
            tl.where(columns < patch_rows + 2 * span + 2, patch_rows, patch_rows + 2),
        ),
    )
    inside = columns < size
    offsets = rows.to(tl.int64) * table_strides[0] + head * table_strides[1]
    values = tl.load(table + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(extended + head * size + columns, values * LOG2_E, mask=inside)


@triton.jit
def softmax_step(scores, m_i, l_i):
    """One step of the online softmax in base 2: (weights, rescaling of what came before, m_i, l_i).

    `scores` [M, N] fp32; a row that has seen only -inf keeps m_i = -inf and l_i = 0 without producing NaN.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def attention_forward_kernel(
    query,  # [batch_size, token_count, head_count, HEAD_DIM] fp16, bf16 or fp32
    key,  # as query
    value,  # as query
    bias_table,  # [head_count, 5 * span + 4] fp32, times log2(e), or None
    key_mask,  # [batch_size, token_count] bool, or None
    out,  # contiguous, as query, written
    lse,  # [batch_size, head_count, token_count] fp32, natural logarithm, written
    query_strides,  # (batch, token, head), elements
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    batch_size,
    token_count,
    head_count,
    window_width,  # patches in a row of the window
    span,  # half of the number of patch rows of the table, rounded down
    scale_log2,  # scale * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a step
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,  # how tl.dot multiplies fp32
    UPCAST: tl.constexpr,
):
    """One program computes `out` and `lse` of BLOCK_M queries of one head, in one pass over the keys."""
    batch, block, head = split_program_id(batch_size, tl.cdiv(token_count, BLOCK_M))
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(query, batch, head, queries, token_count, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
    if bias_table is not None:
        head_table = bias_table + head * (5 * span + 4)
        query_offsets = query_bias_offsets(queries, token_count, window_width, span)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, token_count, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, batch, head, keys, token_count, key_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        scores = matmul(q, tl.trans(k), PRECISION, UPCAST) * scale_log2  # [M, N]
        if bias_table is not None:
            key_offsets = key_bias_offsets(keys, token_count, window_width, span)
            scores += load_bias_tile(head_table, query_offsets[:, None], key_offsets[None, :])
        valid = load_key_validity(key_mask, batch, keys, token_count, mask_strides)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        p, alpha, m_i, l_i = softmax_step(scores, m_i, l_i)
        if DROPOUT:
            keep = dropout_keep(
                queries[:, None], keys[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
            )
            p = tl.where(keep, p, 0.0)
        v = load_rows(value, batch, head, keys, token_count, value_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        acc = acc * alpha[:, None] + matmul(p.to(value.dtype.element_ty), v, PRECISION, UPCAST)

    no_key = l_i == 0.0
    l_safe = tl.where(no_key, 1.0, l_i)
    acc = tl.where(no_key[:, None], 0.0, acc / l_safe[:, None])
    if DROPOUT:
        acc *= drop_scale
    store_rows(out, acc, batch, head, queries, token_count, head_count, HEAD_DIM, BLOCK_D)
    row = (batch * head_count + head) * token_count + queries
    row_lse = tl.where(no_key, float("-inf"), (m_i + tl.log2(l_safe)) * LN_2)
    tl.store(lse + row, row_lse, mask=queries < token_count)
