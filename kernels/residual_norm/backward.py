"""Gradients of the rows, and of scale, weight and bias.

All rows share scale, weight and bias, so their gradients are summed in two stages. One program sums each element of
each gradient, in a fixed order and without atomics: results are deterministic.
"""

import triton
import triton.language as tl

from .forward import RUNTIME_INTEGERS, row_offset


@triton.jit
def load_rows(
    base,  # [.., SIZE], any type
    rows,  # [ROWS] int32
    token_count,
    strides,  # (batch, token), elements
    columns,  # [BLOCK]
    inside,  # [ROWS, BLOCK] bool
):
    """Load [ROWS, BLOCK] as fp32; 0 outside."""
    addresses = base + row_offset(rows, token_count, strides)[:, None] + columns[None, :]
    return tl.load(addresses, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def residual_norm_backward_kernel(
    grad_total,  # [batch_size, token_count, SIZE] gradient of the sum itself, or None
    grad_normalized,  # as grad_total, or None
    total,  # as grad_total: the normalized sum; None without grad_normalized
    branch,  # as grad_total; None without partial_scale
    scale,  # [SIZE], or None for 1
    drop_path_scale,  # [batch_size] fp32, or None for 1
    weight,  # [SIZE], or None for 1
    mean,  # [batch_size * token_count] fp32; None without grad_normalized
    rstd,  # as mean
    grad_residual,  # contiguous, as grad_total, written, or None
    grad_branch,  # contiguous, as grad_total, written, or None
    partial_scale,  # [programs, SIZE] fp32, written, or None
    partial_weight,  # as partial_scale; None without grad_normalized
    partial_bias,  # as partial_weight
    grad_total_strides,  # (batch, token), elements
    grad_normalized_strides,
    total_strides,
    branch_strides,
    token_count,
    row_count,  # batch_size * token_count
    rows_per_program,  # a multiple of ROWS
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # SIZE rounded up to a power of two
    ROWS: tl.constexpr,  # rows of a step
):
    """Compute the gradients of consecutive rows. Sum their part of the gradients of scale, weight and bias.

    Grid: programs of configs.share_rows.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    exists = columns < SIZE
    # Sums of a program stay in registers over all its rows; sum_partials_kernel adds up programs.
    scale_sum = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(0, rows_per_program, ROWS):
        rows = program * rows_per_program + step + tl.arange(0, ROWS)
        inside = (rows < row_count)[:, None] & exists[None, :]
        # int64: the gradients may have more than 2**31 elements.
        starts = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        gradient = tl.zeros([ROWS, BLOCK], tl.float32)
        if grad_normalized is not None:
            dy = load_rows(grad_normalized, rows, token_count, grad_normalized_strides, columns, inside)
            x = load_rows(total, rows, token_count, total_strides, columns, inside)
            average = tl.load(mean + rows, mask=rows < row_count, other=0.0)[:, None]
            inverse = tl.load(rstd + rows, mask=rows < row_count, other=0.0)[:, None]
            # Recomputed, because storing it would cost a pass over memory.
            x = (x - average) * inverse
            # dy is 0 outside the rows and columns that exist, so these sums need no mask. x is not 0 there.
            weight_sum += tl.sum(dy * x, 0)
            bias_sum += tl.sum(dy, 0)
            if weight is not None:
                dy *= tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
            # LayerNorm ignores shifts and scalings of a row, so dy loses its mean and its part along x.
            dy_mean = tl.sum(dy, 1)[:, None] / SIZE
            along_x = tl.sum(dy * x, 1)[:, None] / SIZE
            gradient = (dy - dy_mean - x * along_x) * inverse
        if grad_total is not None:
            gradient += load_rows(grad_total, rows, token_count, grad_total_strides, columns, inside)
        if grad_residual is not None:
            tl.store(grad_residual + starts, gradient, mask=inside)
        # From here on the gradient of the branch: drop path first, because the gradient of scale includes it.
        if drop_path_scale is not None:
            gradient *= tl.load(drop_path_scale + rows // token_count, mask=rows < row_count, other=0.0)[:, None]
        if partial_scale is not None:
            added = load_rows(branch, rows, token_count, branch_strides, columns, inside)
            scale_sum += tl.sum(gradient * added, 0)
        if grad_branch is not None:
            if scale is not None:
                gradient *= tl.load(scale + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
            tl.store(grad_branch + starts, gradient, mask=inside)

    shares = program.to(tl.int64) * SIZE + columns
    if partial_scale is not None:
        tl.store(partial_scale + shares, scale_sum, mask=exists)
    if partial_weight is not None:
        tl.store(partial_weight + shares, weight_sum, mask=exists)
    if partial_bias is not None:
        tl.store(partial_bias + shares, bias_sum, mask=exists)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def sum_partials_kernel(
    partial_scale,  # [program_count, SIZE] fp32, or None
    partial_weight,  # as partial_scale
    partial_bias,  # as partial_scale
    grad_scale,  # [SIZE], written; None without partial_scale
    grad_weight,  # [SIZE], written; None without partial_weight
    grad_bias,  # [SIZE], written; None without partial_bias
    program_count,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,  # programs of a step
    BLOCK_C: tl.constexpr,  # columns of a program
):
    """Add up BLOCK_C columns of the programs' sums. Grid: blocks of columns."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    # The programs of a step are added up once, after the loop, which then has no reduction.
    scale_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    weight_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, program_count, BLOCK_P):
        programs = start + tl.arange(0, BLOCK_P)
        offsets = programs.to(tl.int64)[:, None] * SIZE + columns[None, :]
        inside = (programs < program_count)[:, None] & (columns < SIZE)[None, :]
        if partial_scale is not None:
            scale_sum += tl.load(partial_scale + offsets, mask=inside, other=0.0)
        if partial_weight is not None:
            weight_sum += tl.load(partial_weight + offsets, mask=inside, other=0.0)
        if partial_bias is not None:
            bias_sum += tl.load(partial_bias + offsets, mask=inside, other=0.0)
    if grad_scale is not None:
        tl.store(grad_scale + columns, tl.sum(scale_sum, 0), mask=columns < SIZE)
    if grad_weight is not None:
        tl.store(grad_weight + columns, tl.sum(weight_sum, 0), mask=columns < SIZE)
    if grad_bias is not None:
        tl.store(grad_bias + columns, tl.sum(bias_sum, 0), mask=columns < SIZE)
