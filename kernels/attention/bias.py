"""Device functions that read the packed bias. See ../README.md for the layouts."""

import triton
import triton.language as tl


@triton.jit
def bias_rows(
    packed_bias,  # pointer to [head_count, packed_size] fp32
    head,
    rows,  # [BLOCK] int32
    patch_count,
    packed_size,
    window_height,
    window_width,
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
):
    """Return [BLOCK] pointers to the bias of each row with column 0."""
    head_bias = packed_bias + head * packed_size
    # CLS, the last row, reads the constant region behind the patches.
    patches = tl.minimum(rows, patch_count - 1)
    is_patch = rows < patch_count
    line = patches // window_width
    column = patches - line * window_width
    line_size = (2 * window_height - 1) * window_width
    if BIAS_LAYOUT == "extended":
        # The table itself: the address of (row, column) is affine, so that columns only subtract an offset.
        span = ((2 * window_height - 1) * (2 * window_width - 1) - 1) // 2
        offsets = tl.where(is_patch, patches + line * (window_width - 1) + span, 3 * span + 1)
    elif BIAS_LAYOUT == "paired":
        # Two columns of one row (8 bytes) are a unit, so that pointer + column number is an address.
        units = (column // 2) * line_size + (window_height - 1 - line) * window_width
        units = tl.where(is_patch, units, (window_width // 2) * line_size)
        if BIAS_VECTOR == 4:
            head_bias = head_bias.to(tl.pointer_type(tl.int64), bitcast=True)
            offsets = units
        else:
            offsets = 2 * units + tl.where(is_patch, 2 * (column & 1), 0)
    else:
        offsets = column * line_size + (window_height - 1 - line) * window_width
        offsets = tl.where(is_patch, offsets, window_width * line_size)
    return head_bias + offsets


@triton.jit
def load_bias_tile(
    row_pointers,  # [BLOCK] from bias_rows
    column_offsets,  # pointer to int32 [patch_count] for "extended", else None
    start,  # first patch of the columns
    BLOCK: tl.constexpr,  # columns
    BIAS_LAYOUT: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,  # entries that one instruction loads in the mma layout; 0 for tl.load
):
    """Return the [rows, BLOCK] fp32 bias divided by the scale. Columns beyond the last patch are arbitrary values."""
    patches = start + tl.arange(0, BLOCK)
    if BIAS_LAYOUT == "extended":
        addresses = row_pointers[:, None] - load_column_offsets(column_offsets + patches, BIAS_VECTOR)[None, :]
    elif BIAS_LAYOUT == "paired" and BIAS_VECTOR == 0:
        addresses = row_pointers[:, None] + (2 * patches - (patches & 1))[None, :]
    else:
        addresses = row_pointers[:, None] + patches[None, :]
    # A vector load fills adjacent registers of a thread. They must hold, as ttgir_layouts.py checks: for 2, two
    # adjacent columns of a row; for 4, two adjacent columns of tile row m, then those of tile row m + 8.
    if BIAS_VECTOR == 4:
        bias = tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l,l,l,l",
            [addresses],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    elif BIAS_VECTOR == 2:
        bias = tl.inline_asm_elementwise(
            "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l,l", [addresses], dtype=tl.float32, is_pure=True, pack=2
        )
    elif BIAS_VECTOR == 1:
        bias = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [addresses], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        bias = tl.load(addresses)
    return bias


@triton.jit
def load_column_offsets(addresses, BIAS_VECTOR: tl.constexpr):
    """Return the int32 values at consecutive addresses."""
    # Pairs are adjacent columns, as in load_bias_tile.
    if BIAS_VECTOR == 0:
        offsets = tl.load(addresses)
    else:
        offsets = tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l,l", [addresses], dtype=tl.int32, is_pure=True, pack=2
        )
    return offsets


@triton.jit
def load_cls_bias(packed_bias, head, rows, patch_count, packed_size):
    """Return the [BLOCK] fp32 bias of each row with the CLS column. It is divided by the scale."""
    # The last two entries of a head: one for patches, one for CLS.
    return tl.load(packed_bias + head * packed_size + packed_size - 2 + tl.where(rows < patch_count, 0, 1))
