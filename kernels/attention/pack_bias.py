"""The bias in the form that the attention kernels read: one record of fp32 entries a head. See ../README.md."""

import triton
import triton.language as tl

from ..common.primitives import split_program_id
from .primitives import RUNTIME_INTEGERS


@triton.jit
def patch_table_rows(entries, window_height, window_width, BIAS_LAYOUT: tl.constexpr):
    """Which row of the table each entry of the patch part holds."""
    line_size = (2 * window_height - 1) * window_width
    if BIAS_LAYOUT == "paired":
        rest = entries % (2 * line_size)
        row_column = entries // (2 * line_size) * 2 + ((rest >> 1) & 1)
        place = ((rest >> 2) << 1) | (rest & 1)
    else:
        row_column = entries // line_size
        place = entries % line_size
    down = place // window_width
    rows = (
        (2 * window_height - 2 - down) * (2 * window_width - 1) + row_column - place % window_width + window_width - 1
    )
    if BIAS_LAYOUT == "extended":
        rows = entries
    return rows


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def pack_bias_kernel(
    table,  # [(2 * window_height - 1) * (2 * window_width - 1) + 3, heads], any float type
    packed_bias,  # [heads, packed_size] fp32, written
    table_strides,  # (row, head), elements
    flipped,  # 0: rows are queries, columns keys; 1: the other way round
    inverse_scale,  # 1 / scale
    packed_size,
    window_height,
    window_width,
    BIAS_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one head's packed bias: patch rows, the constant row of CLS, and the two entries of the CLS column."""
    _, block, head = split_program_id(tl.program_id(0), 1, tl.cdiv(packed_size, BLOCK))
    entries = block * BLOCK + tl.arange(0, BLOCK)
    patch_rows = (2 * window_height - 1) * (2 * window_width - 1)
    patch_part = patch_rows if BIAS_LAYOUT == "extended" else (2 * window_height - 1) * window_width * window_width
    rows = patch_table_rows(tl.minimum(entries, patch_part - 1), window_height, window_width, BIAS_LAYOUT)
    rows = tl.where(flipped != 0, patch_rows - 1 - rows, rows)
    cls_row = patch_rows + flipped
    cls_column = patch_rows + 1 - flipped
    rows = tl.where(entries < patch_part, rows, cls_row)
    rows = tl.where(entries == packed_size - 2, cls_column, rows)
    rows = tl.where(entries == packed_size - 1, patch_rows + 2, rows)
    inside = entries < packed_size
    offsets = rows.to(tl.int64) * table_strides[0] + head * table_strides[1]
    values = tl.load(table + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(packed_bias + head * packed_size + entries, values * inverse_scale, mask=inside)
