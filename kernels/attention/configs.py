"""Tile sizes of the attention kernels: a plain table, looked up at launch. Nothing is tuned at run time."""

from typing import NamedTuple


class TileConfig(NamedTuple):
    """How one kernel is tiled and compiled."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


INTERPRETER = "interpreter"
SMALL = "small"
SM80 = "sm80"
SM90 = "sm90"
SM100 = "sm100"

SHARED_MEMORY_LIMIT = {SMALL: 99 * 1024, SM80: 163 * 1024, SM90: 227 * 1024, SM100: 227 * 1024}
"""Bytes of shared memory that one program may use, by architecture class."""

EXPAND_BLOCK = 1024
DELTA_BLOCK = 64
DIAGONAL_BLOCK_PATCHES = 32
DIAGONAL_BLOCK_DIFFERENCES = 32
CLS_BLOCK = 256

_WIDE = TileConfig(64, 64, 8, 2)
_SQUARE = TileConfig(64, 64, 4, 2)
_SHORT = TileConfig(64, 32, 4, 2)
_TALL = TileConfig(32, 64, 4, 2)
_LITTLE = TileConfig(32, 32, 4, 2)
_SINGLE = TileConfig(32, 32, 4, 1)
_SINGLE_WIDE = TileConfig(32, 32, 8, 1)
_SINGLE_SHORT = TileConfig(32, 16, 8, 1)
_INTERPRETED = TileConfig(64, 32, 4, 1)

_HALF_PRECISION = {
    # kernel, architecture class: padded head dimension 16, 32, 64, 128
    ("forward", SMALL): (_SQUARE, _SQUARE, _SQUARE, _WIDE),
    ("forward", SM80): (_SQUARE, _SQUARE, _SQUARE, _WIDE),
    ("forward", SM90): (_SQUARE, _SQUARE, _SQUARE, _WIDE),
    ("forward", SM100): (_WIDE, _WIDE, _WIDE, _WIDE),
    ("key_value_gradient", SMALL): (_SQUARE, _SHORT, _SHORT, _LITTLE),
    ("key_value_gradient", SM80): (_SQUARE, _SHORT, _SHORT, _LITTLE),
    ("key_value_gradient", SM90): (_SQUARE, _SQUARE, _SQUARE, _WIDE),
    ("key_value_gradient", SM100): (_WIDE, _WIDE, _TALL, _TALL),
    ("query_gradient", SMALL): (_SQUARE, _SHORT, _SHORT, _WIDE),
    ("query_gradient", SM80): (_SQUARE, _SHORT, _SHORT, _WIDE),
    ("query_gradient", SM90): (_SQUARE, _SQUARE, _SQUARE, _WIDE),
    ("query_gradient", SM100): (_WIDE, _WIDE, _WIDE, _WIDE),
    ("bias_gradient", SMALL): (_SHORT, _SHORT, _SHORT, _TALL),
    ("bias_gradient", SM80): (_SHORT, _SHORT, _SHORT, _TALL),
    ("bias_gradient", SM90): (_WIDE, _WIDE, _SQUARE, _WIDE),
    ("bias_gradient", SM100): (_WIDE, _WIDE, _WIDE, _WIDE),
}

_SINGLE_PRECISION = {
    # kernel, on every architecture: padded head dimension 16, 32, 64, 128
    "forward": (_SINGLE, _SINGLE, _SINGLE_WIDE, _SINGLE_SHORT),
    "key_value_gradient": (_SINGLE, _SINGLE, _SINGLE_WIDE, _SINGLE_WIDE),
    "query_gradient": (_SINGLE, _SINGLE, _SINGLE_WIDE, _SINGLE_SHORT),
    "bias_gradient": (_SINGLE, _SINGLE, _SINGLE_WIDE, _SINGLE_SHORT),
}


def padded_head_dim(head_dim: int) -> int:
    """Columns of the tiles: a power of two that matrix instructions accept."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture_class(major: int, minor: int) -> str:
    """Class of a CUDA compute capability; the one with the least shared memory if it is not known."""
    if (major, minor) == (8, 0):
        return SM80
    return {9: SM90, 10: SM100}.get(major, SMALL)


def select(kernel: str, architecture: str, block_d: int, element_size: int) -> TileConfig:
    """The tiles of a kernel.

    Args:
        kernel: "forward", "key_value_gradient", "query_gradient" or "bias_gradient".
        architecture: what `architecture_class` gave, or INTERPRETER.
        block_d: padded head dimension, 16 to 128.
        element_size: bytes of an element of q, k and v.
    """
    if architecture == INTERPRETER:
        return _INTERPRETED
    by_head_dim = _SINGLE_PRECISION[kernel] if element_size == 4 else _HALF_PRECISION[kernel, architecture]
    return by_head_dim[block_d.bit_length() - 5]
