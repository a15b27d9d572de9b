"""Sum of residual and branch, and its LayerNorm, in one kernel."""

import triton
import triton.language as tl

# Triton recompiles a kernel for integers that are 1 or multiples of 16, which does not make these kernels faster.
RUNTIME_INTEGERS = ["program_count", "row_count", "rows_per_program", "token_count"]


@triton.jit
def row_offset(row, token_count, strides):
    """Return the int64 offset of a row; `strides` are (batch, token), in elements."""
    # Two strides, because slices of a wider tensor are not evenly spaced across samples.
    sample = (row // token_count).to(tl.int64)
    token = (row % token_count).to(tl.int64)
    return sample * strides[0] + token * strides[1]


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def residual_norm_kernel(
    residual,  # [batch_size, token_count, SIZE]
    branch,  # as residual, or None for the norm of residual alone
    scale,  # [SIZE] layer scale, or None for 1
    drop_path_scale,  # [batch_size] fp32, 0 or 1 / keep_prob, or None for 1
    weight,  # [SIZE], or None for 1
    bias,  # [SIZE], or None for 0
    total,  # contiguous, as residual, written: residual + drop_path_scale * scale * branch; None without a branch
    normalized,  # contiguous, as residual, written; None for the sum alone
    mean,  # [batch_size * token_count] fp32, written; None without normalized
    rstd,  # as mean
    residual_strides,  # (batch, token), elements
    branch_strides,
    token_count,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # SIZE rounded up to a power of two
):
    """Add and normalize one row (token), held in registers. Grid: batch_size * token_count."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    start = row.to(tl.int64) * SIZE

    x = tl.load(residual + row_offset(row, token_count, residual_strides) + columns, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if branch is not None:
        added = tl.load(branch + row_offset(row, token_count, branch_strides) + columns, mask=inside, other=0.0)
        added = added.to(tl.float32)
        if scale is not None:
            added *= tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
        if drop_path_scale is not None:
            added *= tl.load(drop_path_scale + row // token_count)
        # The norm is that of the rounded sum, because the backward reads the rounded one.
        rounded = (x + added).to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if normalized is not None:
        average = tl.sum(x, 0) / SIZE
        # Correct the mean once, which makes it exact for rows of equal numbers: 1 / sqrt(eps) = 1e6 amplifies its
        # error.
        average += tl.sum(tl.where(inside, x - average, 0.0), 0) / SIZE
        # Deviations and not E[x^2] - mean^2, which cancels.
        centred = tl.where(inside, x - average, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps)
        tl.store(mean + row, average)
        tl.store(rstd + row, inverse)
        y = centred * inverse
        if weight is not None:
            y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(normalized + start + columns, y, mask=inside)
