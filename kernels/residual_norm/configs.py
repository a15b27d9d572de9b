"""Warps and rows per program, and number of programs, by plain arithmetic."""

from typing import NamedTuple

LARGEST_SIZE = 4096
"""Largest row: a program holds it in registers."""
LARGEST_ROW_COUNT = 2**30
"""Largest number of rows: row numbers are int32."""

FORWARD_WARP_COLUMNS = 1024
"""Columns per warp: 32 elements per lane. Up to this width the sums of a row need no shared memory."""
BACKWARD_WARP_COLUMNS = 256
"""Columns per warp, of two rows: 16 elements per lane. With 128, the rows lie in different warps: their sums would pass
through shared memory."""
BACKWARD_ROWS = 2
"""Rows per step: their loads and sums hide each other's latency."""

PROGRAMS_PER_SM = 4
INTERPRETED_PROGRAMS = 3

PARTIALS_BLOCK = 128
"""Programs whose sums one step adds."""
COLUMNS_BLOCK = 32
PARTIALS_WARPS = 8


class RowShare(NamedTuple):
    """The programs of the backward, and the rows of each."""

    programs: int
    rows_per_program: int  # a multiple of BACKWARD_ROWS


def padded_size(size: int) -> int:
    """Round up to a power of two."""
    return 1 << (size - 1).bit_length()


def forward_warps(size: int) -> int:
    return max(1, padded_size(size) // FORWARD_WARP_COLUMNS)


def backward_warps(size: int) -> int:
    return max(1, padded_size(size) // BACKWARD_WARP_COLUMNS)


def share_rows(row_count: int, num_sms: int, programs_per_sm: int = PROGRAMS_PER_SM) -> RowShare:
    """Divide the rows into equal parts of whole steps; `num_sms` is 0 on a CPU."""
    steps = -(-row_count // BACKWARD_ROWS)
    wanted = programs_per_sm * num_sms or INTERPRETED_PROGRAMS
    rows_per_program = -(-steps // min(steps, wanted)) * BACKWARD_ROWS
    return RowShare(-(-row_count // rows_per_program), rows_per_program)
