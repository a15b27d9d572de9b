"""Device functions that the forward and the backward attention kernels share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton compiles a kernel anew for integers that are 1 or multiples of 16, which is of no use for these.
RUNTIME_INTEGERS = [
    "batch_size",
    "token_count",
    "head_count",
    "head_start",
    "chunk_heads",
    "window_height",
    "window_width",
    "span",
    "drop_threshold",
    "seed_low",
    "seed_high",
]


@triton.jit
def split_program_id(batch_size, block_count):
    """(batch, block, head) of this program in a one-dimensional grid, batch fastest; batch and head int64."""
    program = tl.program_id(0)
    batch = program % batch_size
    block = (program // batch_size) % block_count
    head = program // (batch_size * block_count)
    return batch.to(tl.int64), block, head.to(tl.int64)


@triton.jit
def row_offsets(batch, head, tokens, strides):
    """Element offsets of rows of a [batch, token, head, column] tensor, int64 in the shape of `tokens`.

    `batch` and `head` are int64 scalars, `tokens` int32, `strides` those of (batch, token, head) in elements.
    """
    return batch * strides[0] + head * strides[2] + tokens.to(tl.int64) * strides[1]


@triton.jit
def tile_mask(tokens, token_count, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a [BLOCK, BLOCK_D] tile of rows exist."""
    inside = (tokens < token_count)[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return inside


@triton.jit
def load_rows(
    base,  # pointer to [batch, token, head, HEAD_DIM], unit stride in the last dimension
    batch,
    head,
    tokens,  # [BLOCK] int32
    token_count,
    strides,  # (batch, token, head), elements
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D] rows; what lies outside the tensor reads as 0."""
    addresses = base + row_offsets(batch, head, tokens, strides)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(addresses, mask=tile_mask(tokens, token_count, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_rows(
    base,  # pointer to a contiguous [batch, token_count, head_count, HEAD_DIM]
    values,  # [BLOCK, BLOCK_D] fp32
    batch,
    head,
    tokens,  # [BLOCK] int32
    token_count,
    head_count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round rows to the tensor's dtype and store those that exist."""
    rows = (batch * token_count + tokens.to(tl.int64)) * head_count + head
    addresses = base + rows[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
    mask = tile_mask(tokens, token_count, HEAD_DIM, BLOCK_D)
    tl.store(addresses, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_key_validity(
    key_mask,  # pointer to [batch, token] bool, or None
    batch,
    keys,  # [BLOCK] int32
    token_count,
    mask_strides,  # (batch, token), elements
):
    """[BLOCK] bool: the key exists and may be attended to."""
    valid = keys < token_count
    if key_mask is not None:
        offsets = batch * mask_strides[0] + keys.to(tl.int64) * mask_strides[1]
        valid = valid & (tl.load(key_mask + offsets, mask=valid, other=0) != 0)
    return valid


@triton.jit
def query_bias_offsets(tokens, token_count, window_width, span):
    """A(i): what a query contributes to its address in the extended table, int32 in the shape of `tokens`."""
    patches = tl.maximum(tl.minimum(tokens, token_count - 1) - 1, 0)
    affine = patches + (patches // window_width) * (window_width - 1)
    return tl.where(tokens == 0, 4 * span + 2, affine + span)


@triton.jit
def key_bias_offsets(tokens, token_count, window_width, span):
    """B(j): what a key takes from that address, int32 in the shape of `tokens`."""
    patches = tl.maximum(tl.minimum(tokens, token_count - 1) - 1, 0)
    affine = patches + (patches // window_width) * (window_width - 1)
    return tl.where(tokens == 0, -(span + 1), affine)


@triton.jit
def load_bias_tile(head_table, query_offsets, key_offsets):
    """The bias of every (query, key) pair, times log2(e), fp32.

    `head_table` points to one head's row of the extended table; the offsets are [M, 1] and [1, N], or for a
    transposed tile [1, M] and [N, 1].
    """
    return tl.load(head_table + (query_offsets - key_offsets))


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 `a @ b`. UPCAST is for the interpreter, which multiplies bf16 as integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dropout_keep(queries, keys, batch, head, head_count, seed_low, seed_high, threshold):
    """Which attention weights are kept: Philox4x32-10 of (query, key, plane), bool in the broadcast shape.

    `queries` and `keys` are int32 and broadcast against each other; the seed comes as two int32 words.
    """
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    plane = (batch * head_count + head).to(tl.int32)
    first_word, _, _, _ = tl.philox((high << 32) | low, queries, keys, plane, 0)
    return (first_word >> 1).to(tl.int32) >= threshold


@triton.jit
def load_row_statistic(pointer, batch, head, queries, token_count, head_count, OTHER: tl.constexpr):
    """[BLOCK] fp32 of a contiguous [batch, head, token] tensor, OTHER outside."""
    offsets = (batch * head_count + head) * token_count + queries
    return tl.load(pointer + offsets, mask=queries < token_count, other=OTHER)


@triton.jit
def load_lse_base_two(lse, batch, head, queries, token_count, head_count):
    """[BLOCK] fp32 log-sum-exp in base 2; +inf (all weights 0) for a query that has no key or is outside."""
    row_lse = load_row_statistic(lse, batch, head, queries, token_count, head_count, float("inf"))
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)


@triton.jit
def tile_weights(
    left,  # [A, D], queries or keys
    right,  # [B, D], keys or queries
    head_table,  # pointer to one head's row of the extended table, or None
    query_offsets,  # int32, broadcasts with key_offsets to [A, B]
    key_offsets,
    lse_base_two,  # fp32, broadcasts to [A, B]
    key_valid,  # bool, broadcasts to [A, B]
    scale_log2,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[A, B] fp32 attention weights, recomputed; 0 where the key is masked or the query has no key."""
    scores = matmul(left, tl.trans(right), PRECISION, UPCAST) * scale_log2
    if head_table is not None:
        scores += load_bias_tile(head_table, query_offsets, key_offsets)
    return tl.where(key_valid, tl.exp2(scores - lse_base_two), 0.0)


@triton.jit
def tile_score_gradient(
    weights,  # [A, B] fp32
    left,  # [A, D], grad_out or value
    right,  # [B, D], value or grad_out
    delta,  # fp32, broadcasts to [A, B]
    keep,  # bool [A, B]; unused when DROPOUT is false
    drop_scale,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[A, B] fp32 gradient of the scores, bias included."""
    weight_gradient = matmul(left, tl.trans(right), PRECISION, UPCAST)
    if DROPOUT:
        weight_gradient = tl.where(keep, weight_gradient * drop_scale, 0.0)
    return weights * (weight_gradient - delta)
