"""Device functions that the forward and backward attention kernels share.

A program owns the rows of a tile and loops over its columns. Rows are queries and columns keys, except for dK and dV,
where rows are keys and columns queries. Rows are patches first and CLS last. Columns are patches only: each kernel adds
the CLS column before its loop.
"""

import triton
import triton.language as tl

from ..common.primitives import fence_copies
from .bias import load_bias_tile

# Triton recompiles a kernel for integers that are 1 or multiples of 16, which does not make these kernels faster.
RUNTIME_INTEGERS = [
    "accumulate",
    "batch_size",
    "batches_per_split",
    "chunk_heads",
    "drop_threshold",
    "flipped",
    "head_count",
    "head_start",
    "keys_per_split",
    "patch_count",
    "packed_size",
    "row_end",
    "row_start",
    "scratch_stride",
    "seed_high",
    "seed_low",
    "num_splits",
    "lse_stride",
    "table_row",
    "token_count",
    "window_height",
    "window_width",
]


@triton.jit
def row_indices(block, BLOCK: tl.constexpr, BIAS_LAYOUT: tl.constexpr):
    """Return the [BLOCK] int32 row numbers of a tile."""
    lanes = tl.arange(0, BLOCK)
    # One thread of an mma instruction holds tile rows t and t + 8 of 16. Rows 2t and 2t+1, whose bias is woven together
    # in the paired layout, go there, so that one 16-byte load fills four registers.
    if BIAS_LAYOUT == "paired":
        lanes = (lanes & -16) | ((lanes & 7) << 1) | ((lanes >> 3) & 1)
    return block * BLOCK + lanes


@triton.jit
def row_tokens(rows, patch_count):
    """Return the token of each row: patches in order, then CLS."""
    # Rows beyond the last read CLS again, so that no load needs a mask.
    return tl.where(rows < patch_count, rows + 1, 0)


@triton.jit
def head_base(base, batch, head, strides):
    """Return a pointer to token 0 of one head; `strides` are (batch, token, head), in elements."""
    # The launcher guarantees multiples of 8, which Triton needs to know for 16-byte loads.
    return base + tl.multiple_of(batch * strides[0] + head * strides[2], 8)


@triton.jit
def token_stride(strides, dtype: tl.constexpr):
    """Return the number of elements between tokens, as `dtype`."""
    # Triton detects divisibility by 16 only; 8 elements of 16 bits are enough for 16-byte loads.
    return tl.multiple_of(tl.cast(strides[1], dtype), 8)


@triton.jit
def patch_base(base, start, strides):
    """Return the pointer to patch `start`. `base` points to token 0 of the head."""
    return base + tl.cast(start + 1, tl.int64) * token_stride(strides, tl.int64)


@triton.jit
def load_rows(base, tokens, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [BLOCK, BLOCK_D] rows of existing tokens; columns beyond HEAD_DIM are 0."""
    columns = tl.arange(0, BLOCK_D)
    addresses = base + tokens.to(tl.int64)[:, None] * token_stride(strides, tl.int64) + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        values = tl.load(addresses)
    else:
        values = tl.load(addresses, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return values


@triton.jit
def reload_rows(
    values,  # [BLOCK, BLOCK_D] from load_rows
    base,  # pointer to token 0 of a head
    tokens,
    strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the same rows, for fp32 by loading them again."""
    # Triton keeps both operands of an fp32 product in registers: held through the loop, they would spill. The load is
    # volatile, or the compiler would hoist it out of the loop.
    if values.dtype == tl.float32:
        columns = tl.arange(0, BLOCK_D)
        addresses = base + tokens.to(tl.int64)[:, None] * token_stride(strides, tl.int64) + columns[None, :]
        values = tl.load(addresses, mask=(columns < HEAD_DIM)[None, :], other=0.0, volatile=True)
    return values


@triton.jit
def load_patches(
    base,  # pointer to patch `start` of a head
    start,
    patch_count,
    strides,  # (batch, token, head), elements
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr,  # whether patches may lie beyond the last; these are 0
):
    """Load [BLOCK, BLOCK_D] rows of consecutive patches."""
    lanes = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    # int32 offsets save instructions; the launcher copies tensors whose token stride is too large for them.
    offsets = lanes[:, None] * token_stride(strides, tl.int32) + columns[None, :]
    addresses = base + offsets
    if TAIL:
        inside = (start + lanes < patch_count)[:, None] & (columns < HEAD_DIM)[None, :]
        values = tl.load(addresses, mask=inside, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        values = tl.load(addresses)
    else:
        values = tl.load(addresses, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return values


@triton.jit
def load_cls(base, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the [BLOCK_D] CLS token of a head, as fp32."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(base + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    base,  # pointer to a contiguous [batch, token_count, head_count, HEAD_DIM]
    values,  # [BLOCK, BLOCK_D] fp32
    batch,
    head,
    rows,  # [BLOCK] int32
    patch_count,
    head_count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round rows to the tensor's dtype, and store those that exist."""
    columns = tl.arange(0, BLOCK_D)
    tokens = row_tokens(rows, patch_count).to(tl.int64)
    lines = (batch * (patch_count + 1) + tokens) * head_count + head
    mask = (rows <= patch_count)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + lines[:, None] * HEAD_DIM + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_key_validity(key_mask, batch, tokens, mask_strides):
    """Load [BLOCK] bool, True = attend, for existing tokens; `mask_strides` are (batch, token)."""
    return tl.load(key_mask + batch * mask_strides[0] + tokens.to(tl.int64) * mask_strides[1]) != 0


@triton.jit
def cls_validity(key_mask, batch, mask_strides):
    """Load one bool: whether queries may attend to the CLS key."""
    return tl.load(key_mask + batch * mask_strides[0]) != 0


@triton.jit
def patch_validity(key_mask, batch, start, patch_count, mask_strides, BLOCK: tl.constexpr):
    """Return [BLOCK] bool: the patch exists, and queries may attend to it."""
    patches = start + tl.arange(0, BLOCK)
    valid = patches < patch_count
    if key_mask is not None:
        # Patches beyond the last read the last one's mask, which is a valid address.
        valid &= load_key_validity(key_mask, batch, tl.minimum(patches, patch_count - 1) + 1, mask_strides)
    return valid


@triton.jit
def biased_scores(
    rows,  # [A, D]
    columns,  # [B, D]
    row_pointers,  # [A] from bias_rows; unused without a bias
    column_offsets,
    start,  # first patch of the columns
    BLOCK: tl.constexpr,  # B
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Return [A, B] fp32 scores divided by the scale, bias included."""
    # Triton's interpreter multiplies the bit patterns of bf16 as integers.
    if UPCAST:
        rows = rows.to(tl.float32)
        columns = columns.to(tl.float32)
    # Every tile of a step was copied before its first product: one fence is enough.
    fence_copies(FENCE)
    if BIAS_LAYOUT == "none":
        products = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    else:
        # The bias is the accumulator that the product starts from, so that adding it costs no instruction.
        bias = load_bias_tile(row_pointers, column_offsets, start, BLOCK, BIAS_LAYOUT, BIAS_VECTOR)
        products = tl.dot(rows, tl.trans(columns), bias, input_precision=PRECISION)
    return products


@triton.jit
def dropout_keep(queries, keys, batch, head, head_count, seed_low, seed_high, threshold):
    """Return bool, True = keep, of attention weights; `queries` and `keys` are int32 tokens that broadcast."""
    # Philox4x32-10 of (query, key, plane), so that the backward recomputes the mask. The seed is two int32 words,
    # because Triton would pass some seeds as int32 and others as int64.
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    plane = (batch * head_count + head).to(tl.int32)
    first_word, _, _, _ = tl.philox((high << 32) | low, queries, keys, plane, 0)
    return (first_word >> 1).to(tl.int32) >= threshold


@triton.jit
def load_row_values(pointer, batch, head, rows, patch_count, head_count, lse_stride):
    """Load the [BLOCK] fp32 lse or delta of rows from `backward_preprocess_kernel`."""
    # Patches come first; CLS is the fourth entry from the end.
    positions = tl.where(rows < patch_count, rows, lse_stride - 4)
    return tl.load(pointer + (batch * head_count + head) * lse_stride + positions)
