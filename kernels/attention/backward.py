"""Backward kernels of the attention: delta, dK/dV, dQ, and the gradient of the bias down to the table.

One program sums each element of each gradient, in one order: no atomics, and two runs agree bit for bit.
"""

import triton
import triton.language as tl

from .primitives import (
    RUNTIME_INTEGERS,
    dropout_keep,
    key_bias_offsets,
    load_key_validity,
    load_lse_base_two,
    load_row_statistic,
    load_rows,
    matmul,
    query_bias_offsets,
    split_program_id,
    store_rows,
    tile_score_gradient,
    tile_weights,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def delta_kernel(
    grad_out,  # [batch_size, token_count, head_count, HEAD_DIM]
    out,  # as grad_out, contiguous
    delta,  # [batch_size, head_count, token_count] fp32, written
    grad_strides,  # (batch, token, head), elements
    out_strides,
    batch_size,
    token_count,
    head_count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(grad_out * out), BLOCK_M queries of one head a program."""
    batch, block, head = split_program_id(batch_size, tl.cdiv(token_count, BLOCK_M))
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    gradient = load_rows(grad_out, batch, head, queries, token_count, grad_strides, HEAD_DIM, BLOCK_D)
    output = load_rows(out, batch, head, queries, token_count, out_strides, HEAD_DIM, BLOCK_D)
    values = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    offsets = (batch * head_count + head) * token_count + queries
    tl.store(delta + offsets, values, mask=queries < token_count)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def key_value_gradient_kernel(
    grad_out,  # [batch_size, token_count, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    bias_table,  # [head_count, 5 * span + 4] fp32, times log2(e), or None
    key_mask,  # [batch_size, token_count] bool, or None
    lse,  # [batch_size, head_count, token_count] fp32
    delta,  # as lse; None when COMPUTE_KEY is false
    grad_key,  # contiguous, as key, written; None when COMPUTE_KEY is false
    grad_value,  # contiguous, as value, written; None when COMPUTE_VALUE is false
    grad_strides,  # (batch, token, head), elements
    query_strides,
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    batch_size,
    token_count,
    head_count,
    window_width,
    span,
    scale,
    scale_log2,  # scale * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    COMPUTE_KEY: tl.constexpr,
    COMPUTE_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a step
    BLOCK_N: tl.constexpr,  # keys of a program
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of one head: one pass over the queries, on transposed tiles."""
    batch, block, head = split_program_id(batch_size, tl.cdiv(token_count, BLOCK_N))
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(key, batch, head, keys, token_count, key_strides, HEAD_DIM, BLOCK_D)  # [N, D]
    if COMPUTE_KEY:
        v = load_rows(value, batch, head, keys, token_count, value_strides, HEAD_DIM, BLOCK_D)  # [N, D]
    valid = load_key_validity(key_mask, batch, keys, token_count, mask_strides)[:, None]
    key_offsets = key_bias_offsets(keys, token_count, window_width, span)[:, None]
    head_table = bias_table
    if bias_table is not None:
        head_table = bias_table + head * (5 * span + 4)

    key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, token_count, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q = load_rows(query, batch, head, queries, token_count, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
        gradient = load_rows(grad_out, batch, head, queries, token_count, grad_strides, HEAD_DIM, BLOCK_D)
        row_lse = load_lse_base_two(lse, batch, head, queries, token_count, head_count)[None, :]
        query_offsets = query_bias_offsets(queries, token_count, window_width, span)[None, :]
        p = tile_weights(
            k, q, head_table, query_offsets, key_offsets, row_lse, valid, scale_log2, PRECISION, UPCAST
        )  # [N, M]
        keep = valid
        if DROPOUT:
            keep = dropout_keep(
                queries[None, :], keys[:, None], batch, head, head_count, seed_low, seed_high, drop_threshold
            )
        if COMPUTE_VALUE:
            dropped = p
            if DROPOUT:
                dropped = tl.where(keep, p * drop_scale, 0.0)
            value_acc += matmul(dropped.to(grad_out.dtype.element_ty), gradient, PRECISION, UPCAST)
        if COMPUTE_KEY:
            row_delta = load_row_statistic(delta, batch, head, queries, token_count, head_count, 0.0)[None, :]
            ds = tile_score_gradient(p, v, gradient, row_delta, keep, drop_scale, DROPOUT, PRECISION, UPCAST)  # [N, M]
            key_acc += matmul(ds.to(query.dtype.element_ty), q, PRECISION, UPCAST)

    if COMPUTE_KEY:
        store_rows(grad_key, key_acc * scale, batch, head, keys, token_count, head_count, HEAD_DIM, BLOCK_D)
    if COMPUTE_VALUE:
        store_rows(grad_value, value_acc, batch, head, keys, token_count, head_count, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def query_gradient_kernel(
    grad_out,  # [batch_size, token_count, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    bias_table,  # [head_count, 5 * span + 4] fp32, times log2(e), or None
    key_mask,  # [batch_size, token_count] bool, or None
    lse,  # [batch_size, head_count, token_count] fp32
    delta,  # as lse
    grad_query,  # contiguous, as query, written
    grad_strides,  # (batch, token, head), elements
    query_strides,
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    batch_size,
    token_count,
    head_count,
    window_width,
    span,
    scale,
    scale_log2,  # scale * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a step
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dQ of BLOCK_M queries of one head: one pass over the keys."""
    batch, block, head = split_program_id(batch_size, tl.cdiv(token_count, BLOCK_M))
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(query, batch, head, queries, token_count, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
    gradient = load_rows(grad_out, batch, head, queries, token_count, grad_strides, HEAD_DIM, BLOCK_D)
    row_lse = load_lse_base_two(lse, batch, head, queries, token_count, head_count)[:, None]
    row_delta = load_row_statistic(delta, batch, head, queries, token_count, head_count, 0.0)[:, None]
    query_offsets = query_bias_offsets(queries, token_count, window_width, span)[:, None]
    head_table = bias_table
    if bias_table is not None:
        head_table = bias_table + head * (5 * span + 4)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, token_count, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, batch, head, keys, token_count, key_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_rows(value, batch, head, keys, token_count, value_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        valid = load_key_validity(key_mask, batch, keys, token_count, mask_strides)[None, :]
        key_offsets = key_bias_offsets(keys, token_count, window_width, span)[None, :]
        p = tile_weights(
            q, k, head_table, query_offsets, key_offsets, row_lse, valid, scale_log2, PRECISION, UPCAST
        )  # [M, N]
        keep = valid
        if DROPOUT:
            keep = dropout_keep(
                queries[:, None], keys[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
            )
        ds = tile_score_gradient(p, gradient, v, row_delta, keep, drop_scale, DROPOUT, PRECISION, UPCAST)
        acc += matmul(ds.to(key.dtype.element_ty), k, PRECISION, UPCAST)
    store_rows(grad_query, acc * scale, batch, head, queries, token_count, head_count, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def bias_gradient_kernel(
    grad_out,  # [batch_size, token_count, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    bias_table,  # [head_count, 5 * span + 4] fp32, times log2(e)
    key_mask,  # [batch_size, token_count] bool, or None
    lse,  # [batch_size, head_count, token_count] fp32
    delta,  # as lse
    grad_bias,  # [heads of this launch, token_count, token_count] fp32, written
    grad_strides,  # (batch, token, head), elements
    query_strides,
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    head_start,  # first head of this launch
    batch_size,
    token_count,
    head_count,
    window_width,
    span,
    scale_log2,  # scale * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a program
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The score gradient of one [BLOCK_M, BLOCK_N] tile of one head, summed over the batch in registers."""
    key_block, query_block, chunk_head = split_program_id(tl.cdiv(token_count, BLOCK_N), tl.cdiv(token_count, BLOCK_M))
    head = head_start + chunk_head
    queries = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = key_block.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    query_offsets = query_bias_offsets(queries, token_count, window_width, span)[:, None]
    key_offsets = key_bias_offsets(keys, token_count, window_width, span)[None, :]
    head_table = bias_table + head * (5 * span + 4)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, batch_size):
        batch = tl.cast(step, tl.int64)
        q = load_rows(query, batch, head, queries, token_count, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
        k = load_rows(key, batch, head, keys, token_count, key_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_rows(value, batch, head, keys, token_count, value_strides, HEAD_DIM, BLOCK_D)  # [N, D]
        gradient = load_rows(grad_out, batch, head, queries, token_count, grad_strides, HEAD_DIM, BLOCK_D)
        row_lse = load_lse_base_two(lse, batch, head, queries, token_count, head_count)[:, None]
        row_delta = load_row_statistic(delta, batch, head, queries, token_count, head_count, 0.0)[:, None]
        valid = load_key_validity(key_mask, batch, keys, token_count, mask_strides)[None, :]
        p = tile_weights(
            q, k, head_table, query_offsets, key_offsets, row_lse, valid, scale_log2, PRECISION, UPCAST
        )  # [M, N]
        keep = valid
        if DROPOUT:
            keep = dropout_keep(
                queries[:, None], keys[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
            )
        acc += tile_score_gradient(p, gradient, v, row_delta, keep, drop_scale, DROPOUT, PRECISION, UPCAST)

    rows = chunk_head * token_count + queries.to(tl.int64)
    inside = (queries < token_count)[:, None] & (keys < token_count)[None, :]
    tl.store(grad_bias + rows[:, None] * token_count + keys[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def patch_rows_gradient_kernel(
    grad_bias,  # [heads of this launch, token_count, token_count] fp32
    grad_table,  # contiguous [(2 * window_height - 1) * (2 * window_width - 1) + 3, head_count], written
    head_start,
    head_count,
    window_height,
    window_width,
    BLOCK_P: tl.constexpr,  # query patches of a step
    BLOCK_V: tl.constexpr,  # column differences of a program
):
    """Patch rows of the table: sums along diagonals, BLOCK_V column differences a program.

    Grid: (blocks of column differences, row differences, heads of this launch) flattened, the first fastest.
    """
    differences = 2 * window_width - 1
    difference_block, row_difference, chunk_head = split_program_id(
        tl.cdiv(differences, BLOCK_V), 2 * window_height - 1
    )
    columns_apart = difference_block.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows_apart = row_difference - (window_height - 1)
    token_count = window_height * window_width + 1
    head_matrix = grad_bias + chunk_head * token_count * token_count

    acc = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
    first_patch = tl.maximum(rows_apart, 0) * window_width
    last_patch = tl.minimum(window_height, window_height + rows_apart) * window_width
    for start in range(first_patch, last_patch, BLOCK_P):
        patches = start + tl.arange(0, BLOCK_P)
        key_columns = (patches % window_width)[:, None] - columns_apart[None, :] + (window_width - 1)
        keys = (patches // window_width - rows_apart)[:, None] * window_width + key_columns + 1
        inside = (patches < last_patch)[:, None] & (columns_apart < differences)[None, :]
        inside = inside & (key_columns >= 0) & (key_columns < window_width)
        queries = (patches + 1).to(tl.int64)[:, None]
        acc += tl.load(head_matrix + queries * token_count + keys, mask=inside, other=0.0)

    table_rows = row_difference * differences + columns_apart
    addresses = grad_table + table_rows.to(tl.int64) * head_count + head_start + chunk_head
    values = tl.sum(acc, 0).to(grad_table.dtype.element_ty)
    tl.store(addresses, values, mask=columns_apart < differences)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def cls_rows_gradient_kernel(
    grad_bias,  # [heads of this launch, token_count, token_count] fp32
    grad_table,  # contiguous [2 * span + 4, head_count], written
    head_start,
    token_count,
    head_count,
    span,
    BLOCK: tl.constexpr,
):
    """The last three rows of the table (CLS to patch, patch to CLS, CLS to CLS), one head a program."""
    chunk_head = tl.program_id(0).to(tl.int64)
    head_matrix = grad_bias + chunk_head * token_count * token_count
    as_query = tl.zeros([BLOCK], tl.float32)
    as_key = tl.zeros([BLOCK], tl.float32)
    for start in range(1, token_count, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        inside = tokens < token_count
        as_query += tl.load(head_matrix + tokens, mask=inside, other=0.0)
        as_key += tl.load(head_matrix + tokens.to(tl.int64) * token_count, mask=inside, other=0.0)
    first = grad_table + tl.cast(2 * span + 1, tl.int64) * head_count + head_start + chunk_head
    tl.store(first, tl.sum(as_query, 0).to(grad_table.dtype.element_ty))
    tl.store(first + head_count, tl.sum(as_key, 0).to(grad_table.dtype.element_ty))
    tl.store(first + 2 * head_count, tl.load(head_matrix).to(grad_table.dtype.element_ty))
