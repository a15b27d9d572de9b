"""Gradient of the bias table: score gradients summed over the batch, then along diagonals.

The scratch between both steps is bounded: a launch covers some heads or rows, see configs.plan_backward_dbias.
"""

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
    row_indices,
    row_tokens,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_dbias_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    packed_bias,  # [head_count, packed_size] fp32
    column_offsets,  # [patch_count] int32 for the layout "extended", else None
    key_mask,  # [batch_size, patch_count + 1] bool, or None
    lse_log2,  # [batch_size, head_count, lse_stride] fp32
    delta,  # as lse_log2
    scratch,  # [num_splits, chunk_heads, row_end - row_start, scratch_stride] fp32, written
    grad_strides,  # (batch, token, head), elements
    query_strides,
    key_strides,
    value_strides,
    mask_strides,  # (batch, token), elements
    head_start,  # first head of this launch
    chunk_heads,  # heads of this launch
    row_start,  # rows of this launch, a multiple of BLOCK_M
    row_end,
    batches_per_split,
    scratch_stride,  # patch_count rounded up to a multiple of 4
    batch_size,
    patch_count,
    head_count,
    lse_stride,
    packed_size,
    window_height,
    window_width,
    scale_log2,  # |scale| * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a program
    BLOCK_N: tl.constexpr,  # keys of a program
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,  # see compiler_hazards.py
):
    """Sum the score gradient of one tile of one head over samples. The [BLOCK_M, BLOCK_N] sum is in registers.

    Grid: (key blocks, query blocks of the launch, heads of the launch, splits of the batch) flattened.
    """
    key_block, query_block, outer = split_program_id(
        tl.program_id(0), tl.cdiv(patch_count, BLOCK_N), tl.cdiv(row_end - row_start, BLOCK_M)
    )
    chunk_head = outer % chunk_heads
    split = outer // chunk_heads
    head = head_start + chunk_head
    start = key_block.to(tl.int32) * BLOCK_N
    rows = row_indices(row_start // BLOCK_M + query_block, BLOCK_M, BIAS_LAYOUT)
    queries = row_tokens(rows, patch_count)
    row_pointers = bias_rows(
        packed_bias, head, rows, patch_count, packed_size, window_height, window_width, BIAS_LAYOUT, BIAS_VECTOR
    )

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = (split * batches_per_split).to(tl.int32)
    for step in range(first, tl.minimum(first + batches_per_split, batch_size)):
        batch = tl.cast(step, tl.int64)
        # Add an opaque 0. Otherwise the compiler hoists the bias load, which costs 32 registers.
        row_pointers += drop_threshold >> 31
        q = load_rows(head_base(query, batch, head, query_strides), queries, query_strides, HEAD_DIM, BLOCK_D)
        do = load_rows(head_base(grad_out, batch, head, grad_strides), queries, grad_strides, HEAD_DIM, BLOCK_D)
        keys = patch_base(head_base(key, batch, head, key_strides), start, key_strides)
        values = patch_base(head_base(value, batch, head, value_strides), start, value_strides)
        # Every tile has the mask of a ragged one: there is one per program, and the loop is over samples.
        k = load_patches(keys, start, patch_count, key_strides, BLOCK_N, HEAD_DIM, BLOCK_D, True)  # [N, D]
        v = load_patches(values, start, patch_count, value_strides, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        row_lse = load_row_values(lse_log2, batch, head, rows, patch_count, head_count, lse_stride)
        row_delta = load_row_values(delta, batch, head, rows, patch_count, head_count, lse_stride)
        scores = biased_scores(
            q, k, row_pointers, column_offsets, start, BLOCK_N, BIAS_LAYOUT, BIAS_VECTOR, PRECISION, UPCAST, FENCE
        )  # [M, N]
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        if key_mask is not None:
            p = tl.where(patch_validity(key_mask, batch, start, patch_count, mask_strides, BLOCK_N)[None, :], p, 0.0)
        keep = None
        if DROPOUT:
            tokens = start + tl.arange(0, BLOCK_N) + 1
            keep = dropout_keep(
                queries[:, None], tokens[None, :], batch, head, head_count, seed_low, seed_high, drop_threshold
            )
        dp = matmul(do, tl.trans(v), PRECISION, UPCAST)  # [M, N]
        acc += score_gradient(p, dp, row_delta[:, None], keep, drop_scale, DROPOUT)

    patches = start + tl.arange(0, BLOCK_N)
    # int64, because splits * heads * rows * scratch_stride may pass 2**31.
    lines = outer * (row_end - row_start) + (rows - row_start).to(tl.int64)
    inside = (rows < row_end)[:, None] & (patches < patch_count)[None, :]
    tl.store(scratch + lines[:, None] * scratch_stride + patches[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dbias_cls_column_kernel(
    grad_out,  # [batch_size, patch_count + 1, head_count, HEAD_DIM]
    query,  # as grad_out
    key,  # as grad_out
    value,  # as grad_out
    packed_bias,  # [head_count, packed_size] fp32
    key_mask,  # [batch_size, patch_count + 1] bool, or None
    lse_log2,  # [batch_size, head_count, lse_stride] fp32
    delta,  # as lse_log2
    cls_column,  # [batch_size, head_count, patch_count + 1] fp32, written: patches first, CLS last
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
    scale_log2,  # |scale| * log2(e)
    drop_threshold,  # int(dropout_p * 2**31)
    drop_scale,  # 1 / (1 - dropout_p)
    seed_low,  # low and high word of the seed, as signed 32-bit integers
    seed_high,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Compute the score gradient of BLOCK_M queries with the CLS key. Grid: (batch, query blocks, heads) flattened."""
    batch, block, head = split_program_id(tl.program_id(0), batch_size, tl.cdiv(patch_count + 1, BLOCK_M))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = row_tokens(rows, patch_count)
    # One column, so that sums of elementwise products replace matrix products.
    q = load_rows(head_base(query, batch, head, query_strides), queries, query_strides, HEAD_DIM, BLOCK_D)  # [M, D]
    do = load_rows(head_base(grad_out, batch, head, grad_strides), queries, grad_strides, HEAD_DIM, BLOCK_D)
    cls_key = load_cls(head_base(key, batch, head, key_strides), HEAD_DIM, BLOCK_D)[None, :]
    cls_value = load_cls(head_base(value, batch, head, value_strides), HEAD_DIM, BLOCK_D)[None, :]
    scores = tl.sum(q.to(tl.float32) * cls_key, 1)
    scores += load_cls_bias(packed_bias, head, rows, patch_count, packed_size)
    row_lse = load_row_values(lse_log2, batch, head, rows, patch_count, head_count, lse_stride)
    row_delta = load_row_values(delta, batch, head, rows, patch_count, head_count, lse_stride)
    p = tl.exp2(scores * scale_log2 - row_lse)
    if key_mask is not None:
        p = tl.where(cls_validity(key_mask, batch, mask_strides), p, 0.0)
    keep = None
    if DROPOUT:
        keep = dropout_keep(queries, 0, batch, head, head_count, seed_low, seed_high, drop_threshold)
    dp = tl.sum(do.to(tl.float32) * cls_value, 1)
    ds = score_gradient(p, dp, row_delta, keep, drop_scale, DROPOUT)
    tl.store(cls_column + (batch * head_count + head) * (patch_count + 1) + rows, ds, mask=rows <= patch_count)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dtable_patches_kernel(
    scratch,  # [num_splits, heads of this launch, row_end - row_start, scratch_stride] fp32
    grad_table,  # contiguous [(2 * window_height - 1) * (2 * window_width - 1) + 3, head_count] fp32, written
    accumulate,  # 0: store the sums; 1: add them to those of an earlier launch
    num_splits,
    chunk_heads,
    row_start,
    row_end,
    scratch_stride,
    head_start,
    head_count,
    window_height,
    window_width,
    BLOCK_P: tl.constexpr,  # query patches of a step
    BLOCK_V: tl.constexpr,  # column differences of a program
):
    """Sum the scratch along diagonals into the table: BLOCK_V column differences of one row difference.

    Grid: (blocks of column differences, row differences, heads of this launch) flattened, the first fastest.
    """
    differences = 2 * window_width - 1
    difference_block, row_difference, chunk_head = split_program_id(
        tl.program_id(0), tl.cdiv(differences, BLOCK_V), 2 * window_height - 1
    )
    columns_apart = difference_block.to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows_apart = row_difference - (window_height - 1)
    # Queries that have a key `rows_apart` rows above are consecutive patches; some may be in another launch.
    first_patch = tl.maximum(tl.maximum(rows_apart, 0) * window_width, row_start)
    last_patch = tl.minimum(tl.minimum(window_height, window_height + rows_apart) * window_width, row_end)

    # Each query reads its key row backwards, which is contiguous memory. A program adds in registers and reduces over
    # queries once, so that the order of the sum is fixed and no atomics are needed.
    acc = tl.zeros([BLOCK_P, BLOCK_V], tl.float32)
    for split in range(0, num_splits):
        lines = (split * chunk_heads + chunk_head) * (row_end - row_start) - row_start
        for start in range(first_patch, last_patch, BLOCK_P):
            patches = start + tl.arange(0, BLOCK_P)
            key_columns = (patches % window_width)[:, None] - columns_apart[None, :] + (window_width - 1)
            keys = (patches // window_width - rows_apart)[:, None] * window_width + key_columns
            inside = (patches < last_patch)[:, None] & (columns_apart < differences)[None, :]
            inside = inside & (key_columns >= 0) & (key_columns < window_width)
            offsets = (lines + patches.to(tl.int64)[:, None]) * scratch_stride + keys
            acc += tl.load(scratch + offsets, mask=inside, other=0.0)

    table_rows = row_difference * differences + columns_apart
    addresses = grad_table + table_rows.to(tl.int64) * head_count + head_start + chunk_head
    exists = columns_apart < differences
    sums = tl.sum(acc, 0)
    if accumulate != 0:
        sums += tl.load(addresses, mask=exists, other=0.0)
    tl.store(addresses, sums, mask=exists)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def dtable_cls_kernel(
    scratch,  # as for dtable_patches_kernel; its last row is the CLS query's
    cls_column,  # [batch_size, head_count, patch_count + 1] fp32
    grad_table,  # contiguous [.., head_count] fp32; its last three rows are written
    table_row,  # first of the last three rows
    num_splits,
    chunk_heads,
    row_start,
    row_end,
    scratch_stride,
    head_start,
    batch_size,
    patch_count,
    head_count,
    BLOCK: tl.constexpr,
):
    """Write the last three table rows: CLS to patch, patch to CLS, CLS to CLS. Grid: heads of the launch."""
    chunk_head = tl.program_id(0).to(tl.int64)
    head = head_start + chunk_head
    as_query = tl.zeros([BLOCK], tl.float32)
    # The CLS query is the last row of the scratch.
    for split in range(0, num_splits):
        lines = (split * chunk_heads + chunk_head + 1) * (row_end - row_start) - 1
        for start in range(0, patch_count, BLOCK):
            patches = start + tl.arange(0, BLOCK)
            as_query += tl.load(scratch + lines * scratch_stride + patches, mask=patches < patch_count, other=0.0)
    as_key = tl.zeros([BLOCK], tl.float32)
    both = tl.zeros([BLOCK], tl.float32)
    # The CLS column has the patches first and CLS last.
    for batch in range(0, batch_size):
        column = cls_column + (tl.cast(batch, tl.int64) * head_count + head) * (patch_count + 1)
        for start in range(0, patch_count + 1, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            values = tl.load(column + rows, mask=rows <= patch_count, other=0.0)
            as_key += tl.where(rows < patch_count, values, 0.0)
            both += tl.where(rows == patch_count, values, 0.0)
    first = grad_table + tl.cast(table_row, tl.int64) * head_count + head
    tl.store(first, tl.sum(as_query, 0))
    tl.store(first + head_count, tl.sum(as_key, 0))
    tl.store(first + 2 * head_count, tl.sum(both, 0))
