"""Tiles of the kernel by arithmetic, architecture class and number of rows: see ../README.md."""

from typing import NamedTuple

from ..common.gpu import INTERPRETER, SM80, SM90, SM100, SMALL

GROUP = 8
"""Rows of blocks that run together and share tiles of the weight in L2."""

FEW, SOME, MANY = "few", "some", "many"
ROW_CLASSES = (FEW, SOME, MANY)
LARGEST_ROWS = {FEW: 640, SOME: 4096}
"""Largest number of rows of a class: one image of 384 pixels, about twenty of 224; MANY has no limit."""


class LinearTile(NamedTuple):
    """Tile sizes and compiler options."""

    block_m: int  # rows
    block_n: int  # outputs
    block_k: int  # inputs of a step
    num_warps: int
    num_stages: int


_INTERPRETED = LinearTile(32, 64, 32, 4, 1)

# rows x outputs x inputs x warps x stages
_32x32x16x4x2 = LinearTile(32, 32, 16, 4, 2)
_64x64x16x4x3 = LinearTile(64, 64, 16, 4, 3)
_64x64x16x8x2 = LinearTile(64, 64, 16, 8, 2)
_64x64x32x4x4 = LinearTile(64, 64, 32, 4, 4)
_64x64x64x4x3 = LinearTile(64, 64, 64, 4, 3)
_64x64x64x4x4 = LinearTile(64, 64, 64, 4, 4)
_64x128x16x8x3 = LinearTile(64, 128, 16, 8, 3)
_64x128x32x4x3 = LinearTile(64, 128, 32, 4, 3)
_64x128x32x8x3 = LinearTile(64, 128, 32, 8, 3)
_64x128x64x4x3 = LinearTile(64, 128, 64, 4, 3)
_128x128x32x4x4 = LinearTile(128, 128, 32, 4, 4)
_128x128x32x8x3 = LinearTile(128, 128, 32, 8, 3)
_128x128x64x4x3 = LinearTile(128, 128, 64, 4, 3)

TILES = {
    # arithmetic, architecture class: few, some, many rows
    ("half", SMALL): (_64x64x64x4x3, _64x128x32x4x3, _128x128x32x8x3),
    ("half", SM80): (_64x64x64x4x4, _64x128x64x4x3, _128x128x32x4x4),
    ("half", SM90): (_64x64x64x4x4, _64x128x64x4x3, _128x128x64x4x3),
    ("half", SM100): (_64x64x64x4x4, _64x128x64x4x3, _128x128x64x4x3),
    ("tf32", SMALL): (_64x64x16x4x3, _64x128x16x8x3, _64x128x16x8x3),
    ("tf32", SM80): (_64x64x32x4x4, _64x128x32x8x3, _128x128x32x8x3),
    ("tf32", SM90): (_64x64x32x4x4, _64x128x32x4x3, _128x128x32x8x3),
    ("tf32", SM100): (_64x64x32x4x4, _64x128x32x4x3, _128x128x32x8x3),
    ("ieee", SMALL): (_32x32x16x4x2, _64x64x16x8x2, _64x64x16x8x2),
    ("ieee", SM80): (_32x32x16x4x2, _64x64x16x8x2, _64x64x16x8x2),
    ("ieee", SM90): (_32x32x16x4x2, _64x64x16x8x2, _64x64x16x8x2),
    ("ieee", SM100): (_32x32x16x4x2, _64x64x16x8x2, _64x64x16x8x2),
}


def row_class(row_count: int) -> str:
    """Return the class, one of ROW_CLASSES."""
    return next((name for name, largest in LARGEST_ROWS.items() if row_count <= largest), MANY)


def select(architecture: str, arithmetic: str, row_count: int, output_count: int) -> LinearTile:
    """Return the tiles of a launch.

    Args:
        architecture: One of gpu.ARCHITECTURES, or gpu.INTERPRETER.
        arithmetic: One of gpu.ARITHMETICS.
        row_count: Rows of x.
        output_count: Rows of the weight.
    """
    if architecture == INTERPRETER:
        return _INTERPRETED
    few, some, many = TILES[arithmetic, architecture]
    # Unaligned outputs take more registers: the tiles for many rows would spill.
    return {FEW: few, SOME: some, MANY: some if output_count % 16 else many}[row_class(row_count)]
