"""Device functions that the forward and the backward attention kernels share.

A tile has rows and columns. Rows are what a program owns, columns what it passes over: queries and keys, or keys and
queries in the kernel of dK and dV. Rows are numbered patches first, CLS last; columns are patches only, because CLS
is taken in before the loop.
"""

import triton
import triton.language as tl

from .bias import load_bias_tile

# Triton compiles a kernel anew for integers that are 1 or multiples of 16, which is of no use for these.
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
    """[BLOCK] int32 row numbers; paired rows 2t and 2t+1 sit where one thread holds both, at t and t + 8 of 16."""
    lanes = tl.arange(0, BLOCK)
    if BIAS_LAYOUT == "paired":
        lanes = (lanes & -16) | ((lanes & 7) << 1) | ((lanes >> 3) & 1)
    return block * BLOCK + lanes


@triton.jit
def row_tokens(rows, patch_count):
    """The token of a row: patches in order, then CLS; rows beyond read CLS again, so that no load needs a mask."""
    return tl.where(rows < patch_count, rows + 1, 0)


@triton.jit
def head_base(base, batch, head, strides):
    """Pointer to token 0 of one head; `strides` are those of (batch, token, head) in elements, multiples of 8."""
    return base + tl.multiple_of(batch * strides[0] + head * strides[2], 8)


@triton.jit
def token_stride(strides, dtype: tl.constexpr):
    """Elements between tokens, as `dtype`; 16 bytes divide it, which Triton sees by itself for multiples of 16 only."""
    return tl.multiple_of(tl.cast(strides[1], dtype), 8)


@triton.jit
def patch_base(base, start, strides):
    """Pointer to patch `start`, from one to token 0 of the head."""
    return base + tl.cast(start + 1, tl.int64) * token_stride(strides, tl.int64)


@triton.jit
def load_rows(base, tokens, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] rows of existing tokens; columns beyond HEAD_DIM read as 0."""
    columns = tl.arange(0, BLOCK_D)
    addresses = base + tokens.to(tl.int64)[:, None] * token_stride(strides, tl.int64) + columns[None, :]
    if HEAD_DIM == BLOCK_D:
        values = tl.load(addresses)
    else:
        values = tl.load(addresses, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    return values


@triton.jit
def reload_rows(
    values,  # [BLOCK, BLOCK_D], what load_rows gave
    base,  # pointer to token 0 of a head
    tokens,
    strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same rows; read again for fp32, where products keep their operands in registers and would spill."""
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
    TAIL: tl.constexpr,  # whether patches may lie beyond the last, which then read as 0
):
    """[BLOCK, BLOCK_D] rows of consecutive patches. Offsets within the tile are int32: see the launcher."""
    lanes = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
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
    """[BLOCK_D] fp32: the CLS token of a head."""
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
    """Round rows to the tensor's dtype and store those that exist."""
    columns = tl.arange(0, BLOCK_D)
    tokens = row_tokens(rows, patch_count).to(tl.int64)
    lines = (batch * (patch_count + 1) + tokens) * head_count + head
    mask = (rows <= patch_count)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(base + lines[:, None] * HEAD_DIM + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_key_validity(key_mask, batch, tokens, mask_strides):
    """[BLOCK] bool: the key may be attended to. `tokens` exist; `mask_strides` are those of (batch, token)."""
    return tl.load(key_mask + batch * mask_strides[0] + tokens.to(tl.int64) * mask_strides[1]) != 0


@triton.jit
def cls_validity(key_mask, batch, mask_strides):
    """Whether CLS may be attended to as a key, a scalar."""
    return tl.load(key_mask + batch * mask_strides[0]) != 0


@triton.jit
def patch_validity(key_mask, batch, start, patch_count, mask_strides, BLOCK: tl.constexpr):
    """[BLOCK] bool: the patch exists and may be attended to as a key."""
    patches = start + tl.arange(0, BLOCK)
    valid = patches < patch_count
    if key_mask is not None:
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
):
    """[A, B] fp32 scores divided by the scale: the bias is what the matrix product starts from."""
    if UPCAST:
        rows = rows.to(tl.float32)
        columns = columns.to(tl.float32)
    if BIAS_LAYOUT == "none":
        products = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    else:
        bias = load_bias_tile(row_pointers, column_offsets, start, BLOCK, BIAS_LAYOUT, BIAS_VECTOR)
        products = tl.dot(rows, tl.trans(columns), bias, input_precision=PRECISION)
    return products


@triton.jit
def dropout_keep(queries, keys, batch, head, head_count, seed_low, seed_high, threshold):
    """Which attention weights are kept: Philox4x32-10 of (query, key, plane), bool in the broadcast shape.

    `queries` and `keys` are int32 tokens and broadcast against each other; the seed comes as two int32 words.
    """
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    plane = (batch * head_count + head).to(tl.int32)
    first_word, _, _, _ = tl.philox((high << 32) | low, queries, keys, plane, 0)
    return (first_word >> 1).to(tl.int32) >= threshold


@triton.jit
def load_row_values(pointer, batch, head, rows, patch_count, head_count, lse_stride):
    """[BLOCK] fp32 of a [batch, head, lse_stride] tensor: patches first, CLS fourth from the end."""
    places = tl.where(rows < patch_count, rows, lse_stride - 4)
    return tl.load(pointer + (batch * head_count + head) * lse_stride + places)
