"""Pack the bias table into the fp32 layout of the attention kernels. See ../README.md for the layouts."""

import triton
import triton.language as tl

from ..common.primitives import split_program_id
from .primitives import RUNTIME_INTEGERS


@triton.jit
def patch_table_rows(entries, window_height, window_width, BIAS_LAYOUT: tl.constexpr):
    """Return the table row of each entry of the patch part."""
    line_size = (2 * window_height - 1) * window_width
    # Entry (row column, u, key column) of "plain"; "paired" weaves two row columns together, two key columns at a time.
    if BIAS_LAYOUT == "paired":
        rest = entries % (2 * line_size)
        row_column = entries // (2 * line_size) * 2 + ((rest >> 1) & 1)
        position = ((rest >> 2) << 1) | (rest & 1)
    else:
        row_column = entries // line_size
        position = entries % line_size
    down = position // window_width
    rows = (
        (2 * window_height - 2 - down) * (2 * window_width - 1)
        + row_column
        - position % window_width
        + window_width
        - 1
    )
    if BIAS_LAYOUT == "extended":
        rows = entries
    return rows


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def pack_bias_kernel(
    table,  # [(2 * window_height - 1) * (2 * window_width - 1) + 3, heads], any float type
    packed_bias,  # [heads, packed_size] fp32, written
    table_strides,  # (row, head), elements
    flipped,  # 0: rows are queries and columns keys; 1: rows are keys and columns queries
    inverse_scale,  # 1 / scale
    packed_size,
    window_height,
    window_width,
    BIAS_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of one head's packed bias, divided by the scale. Grid: (entry blocks, heads) flattened."""
    _, block, head = split_program_id(tl.program_id(0), 1, tl.cdiv(packed_size, BLOCK))
    entries = block * BLOCK + tl.arange(0, BLOCK)
    patch_rows = (2 * window_height - 1) * (2 * window_width - 1)
    patch_part = patch_rows if BIAS_LAYOUT == "extended" else (2 * window_height - 1) * window_width * window_width
    rows = patch_table_rows(tl.minimum(entries, patch_part - 1), window_height, window_width, BIAS_LAYOUT)
    # Exchanging query and key negates both differences, which reads the patch rows backwards, and swaps the CLS rows.
    rows = tl.where(flipped != 0, patch_rows - 1 - rows, rows)
    cls_row = patch_rows + flipped
    cls_column = patch_rows + 1 - flipped
    # Behind the patches: the constant row of CLS, then the CLS column for patches and for CLS.
    rows = tl.where(entries < patch_part, rows, cls_row)
    rows = tl.where(entries == packed_size - 2, cls_column, rows)
    rows = tl.where(entries == packed_size - 1, patch_rows + 2, rows)
    inside = entries < packed_size
    offsets = rows.to(tl.int64) * table_strides[0] + head * table_strides[1]
    values = tl.load(table + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(packed_bias + head * packed_size + entries, values * inverse_scale, mask=inside)
