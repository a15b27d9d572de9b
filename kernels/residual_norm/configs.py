"""How many warps and rows a program takes, and how many programs share the rows: plain arithmetic.

Nothing is tuned at run time.
"""

from typing import NamedTuple

LARGEST_SIZE = 4096
"""Numbers of a row: a program holds it in registers."""
LARGEST_ROW_COUNT = 2**30
"""Row numbers are int32."""

FORWARD_WARP_COLUMNS = 1024
"""Columns of a warp: 32 numbers a lane. Up to that width a row's sums need no shared memory."""
BACKWARD_WARP_COLUMNS = 128
"""Columns of a warp, of two rows: 8 numbers a lane. Three sums over rows stay in registers beside them."""
BACKWARD_WIDE_WARP_COLUMNS = 256
"""The same of rows of more than 1024 numbers. Found with every Triton that is tested: neither spills anywhere."""
BACKWARD_ROWS = 2
"""Rows of a step: their loads and sums hide each other's latency."""

PROGRAMS_PER_SM = 4
INTERPRETED_PROGRAMS = 3

PARTIALS_BLOCK = 128
"""Programs whose sums are added in one step."""
COLUMNS_BLOCK = 32
PARTIALS_WARPS = 8


class RowShare(NamedTuple):
    """How the rows are shared between the programs of the backward."""

    programs: int
    rows_per_program: int  # a multiple of BACKWARD_ROWS


def padded_size(size: int) -> int:
    """Columns of a tile: a power of two."""
    return 1 << (size - 1).bit_length()


def forward_warps(size: int) -> int:
    return max(1, padded_size(size) // FORWARD_WARP_COLUMNS)


def backward_warps(size: int) -> int:
    columns = padded_size(size)
    return max(1, columns // (BACKWARD_WARP_COLUMNS if columns <= 1024 else BACKWARD_WIDE_WARP_COLUMNS))


def share_rows(row_count: int, num_sms: int) -> RowShare:
    """Equal parts of whole steps; `num_sms` is 0 where more programs gain nothing."""
    steps = -(-row_count // BACKWARD_ROWS)
    wanted = PROGRAMS_PER_SM * num_sms or INTERPRETED_PROGRAMS
    rows_per_program = -(-steps // min(steps, wanted)) * BACKWARD_ROWS
    return RowShare(-(-row_count // rows_per_program), rows_per_program)
