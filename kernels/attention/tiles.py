"""Tiles of the attention kernels, chosen by instruction counts, not by timing: see ../README.md."""

from typing import NamedTuple

from ..common.gpu import SM80, SM90, SM100, SMALL


class TileConfig(NamedTuple):
    """Tile sizes and compiler options of one kernel."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# queries x keys x warps x stages
_16x16x4x1 = TileConfig(16, 16, 4, 1)
_16x32x8x1 = TileConfig(16, 32, 8, 1)
_16x128x8x2 = TileConfig(16, 128, 8, 2)
_32x16x2x2 = TileConfig(32, 16, 2, 2)
_32x16x4x1 = TileConfig(32, 16, 4, 1)
_32x16x8x1 = TileConfig(32, 16, 8, 1)
_32x32x4x2 = TileConfig(32, 32, 4, 2)
_32x32x8x1 = TileConfig(32, 32, 8, 1)
_32x32x8x2 = TileConfig(32, 32, 8, 2)
_32x64x4x2 = TileConfig(32, 64, 4, 2)
_32x64x8x1 = TileConfig(32, 64, 8, 1)
_32x64x8x2 = TileConfig(32, 64, 8, 2)
_32x128x8x2 = TileConfig(32, 128, 8, 2)
_64x32x4x2 = TileConfig(64, 32, 4, 2)
_64x32x8x1 = TileConfig(64, 32, 8, 1)
_64x32x8x2 = TileConfig(64, 32, 8, 2)
_64x64x4x2 = TileConfig(64, 64, 4, 2)
_64x64x8x2 = TileConfig(64, 64, 8, 2)
_64x128x8x2 = TileConfig(64, 128, 8, 2)
_128x16x8x2 = TileConfig(128, 16, 8, 2)
_128x32x8x2 = TileConfig(128, 32, 8, 2)
_128x64x4x3 = TileConfig(128, 64, 4, 3)
_128x64x8x2 = TileConfig(128, 64, 8, 2)
_128x64x8x3 = TileConfig(128, 64, 8, 3)

TILES = {
    # kernel, arithmetic, dropout, architecture class: tiles for padded head dimensions 16, 32, 64, 128
    # 16 bits, without dropout
    ("forward", "half", False, SMALL): (_64x64x4x2, _64x64x4x2, _128x64x8x2, _128x32x8x2),
    ("forward", "half", False, SM80): (_64x64x4x2, _64x64x4x2, _64x64x4x2, _128x16x8x2),
    ("forward", "half", False, SM90): (_128x64x4x3, _128x64x4x3, _128x64x8x3, _128x64x8x2),
    ("forward", "half", False, SM100): (_128x64x8x2, _128x64x8x2, _128x64x8x2, _64x64x8x2),
    ("backward_dkv", "half", False, SMALL): (_64x64x4x2, _64x64x4x2, _32x128x8x2, _32x32x8x2),
    ("backward_dkv", "half", False, SM80): (_64x64x4x2, _64x64x4x2, _32x128x8x2, _32x32x8x2),
    ("backward_dkv", "half", False, SM90): (_64x128x8x2, _64x128x8x2, _64x128x8x2, _32x128x8x2),
    ("backward_dkv", "half", False, SM100): (_64x128x8x2, _64x128x8x2, _64x128x8x2, _64x128x8x2),
    ("backward_dq", "half", False, SMALL): (_64x64x4x2, _64x64x4x2, _128x64x8x2, _128x16x8x2),
    ("backward_dq", "half", False, SM80): (_64x64x4x2, _64x64x4x2, _128x32x8x2, _128x16x8x2),
    ("backward_dq", "half", False, SM90): (_128x64x8x2, _128x64x8x2, _128x64x8x2, _128x64x8x2),
    ("backward_dq", "half", False, SM100): (_64x64x8x2, _128x64x8x2, _128x64x8x2, _128x64x8x2),
    ("backward_dbias", "half", False, SMALL): (_64x64x4x2, _32x128x8x2, _32x64x4x2, _32x16x2x2),
    ("backward_dbias", "half", False, SM80): (_128x64x8x2, _64x64x4x2, _32x64x4x2, _64x32x4x2),
    ("backward_dbias", "half", False, SM90): (_128x64x8x2, _128x64x8x2, _128x64x8x2, _64x64x8x2),
    ("backward_dbias", "half", False, SM100): (_32x64x4x2, _32x64x4x2, _32x64x4x2, _32x32x4x2),
    # 16 bits, with dropout
    ("forward", "half", True, SMALL): (_64x64x4x2, _64x64x4x2, _64x64x4x2, _128x16x8x2),
    ("forward", "half", True, SM80): (_64x64x4x2, _64x64x4x2, _64x64x4x2, _128x16x8x2),
    ("forward", "half", True, SM90): (_128x64x4x3, _128x64x8x2, _128x64x8x2, _128x64x8x2),
    ("forward", "half", True, SM100): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _64x64x8x2),
    ("backward_dkv", "half", True, SMALL): (_64x64x4x2, _64x64x4x2, _32x128x8x2, _32x16x8x1),
    ("backward_dkv", "half", True, SM80): (_64x64x4x2, _64x64x4x2, _32x128x8x2, _32x16x8x1),
    ("backward_dkv", "half", True, SM90): (_64x128x8x2, _64x128x8x2, _32x128x8x2, _16x128x8x2),
    ("backward_dkv", "half", True, SM100): (_64x128x8x2, _64x128x8x2, _64x128x8x2, _64x64x8x2),
    ("backward_dq", "half", True, SMALL): (_64x64x4x2, _64x64x4x2, _64x32x4x2, _128x16x8x2),
    ("backward_dq", "half", True, SM80): (_64x64x4x2, _64x64x4x2, _64x32x4x2, _128x16x8x2),
    ("backward_dq", "half", True, SM90): (_128x64x8x2, _128x64x8x2, _32x128x8x2, _128x32x8x2),
    ("backward_dq", "half", True, SM100): (_128x64x8x2, _128x64x8x2, _128x64x8x2, _64x64x8x2),
    ("backward_dbias", "half", True, SMALL): (_64x32x4x2, _64x32x4x2, _32x128x8x2, _32x16x2x2),
    ("backward_dbias", "half", True, SM80): (_32x64x4x2, _64x32x4x2, _32x128x8x2, _64x32x4x2),
    ("backward_dbias", "half", True, SM90): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _64x64x8x2),
    ("backward_dbias", "half", True, SM100): (_32x64x4x2, _32x64x4x2, _32x64x4x2, _32x16x4x1),
    # fp32 by tf32, without dropout
    ("forward", "tf32", False, SMALL): (_64x64x4x2, _64x64x4x2, _64x32x4x2, _64x32x8x1),
    ("forward", "tf32", False, SM80): (_64x64x4x2, _64x64x4x2, _64x32x8x2, _64x32x8x1),
    ("forward", "tf32", False, SM90): (_64x64x4x2, _64x64x4x2, _64x64x8x2, _64x32x8x2),
    ("forward", "tf32", False, SM100): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _64x32x8x2),
    ("backward_dkv", "tf32", False, SMALL): (_64x64x8x2, _32x64x4x2, _64x32x8x2, _32x32x8x1),
    ("backward_dkv", "tf32", False, SM80): (_64x64x4x2, _32x64x4x2, _64x32x8x1, _64x32x8x1),
    ("backward_dkv", "tf32", False, SM90): (_64x64x4x2, _64x64x8x2, _64x64x8x2, _64x32x8x1),
    ("backward_dkv", "tf32", False, SM100): (_64x64x4x2, _64x64x8x2, _64x64x8x2, _64x32x8x1),
    ("backward_dq", "tf32", False, SMALL): (_64x64x8x2, _64x32x4x2, _32x64x8x2, _64x32x8x1),
    ("backward_dq", "tf32", False, SM80): (_64x64x4x2, _64x64x8x2, _64x32x8x2, _64x32x8x1),
    ("backward_dq", "tf32", False, SM90): (_64x64x4x2, _64x64x4x2, _64x64x8x2, _64x32x8x2),
    ("backward_dq", "tf32", False, SM100): (_64x64x4x2, _64x64x4x2, _64x64x8x2, _64x32x8x2),
    ("backward_dbias", "tf32", False, SMALL): (_64x32x8x2, _64x32x4x2, _32x64x8x1, _32x64x8x1),
    ("backward_dbias", "tf32", False, SM80): (_64x64x8x2, _64x32x4x2, _32x64x8x1, _32x64x8x1),
    ("backward_dbias", "tf32", False, SM90): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _64x32x4x2),
    ("backward_dbias", "tf32", False, SM100): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _32x16x4x1),
    # fp32 by tf32, with dropout
    ("forward", "tf32", True, SMALL): (_64x64x4x2, _64x64x8x2, _64x32x4x2, _32x64x8x1),
    ("forward", "tf32", True, SM80): (_64x64x4x2, _64x64x8x2, _64x32x8x2, _32x64x8x1),
    ("forward", "tf32", True, SM90): (_64x64x4x2, _64x64x4x2, _64x32x4x2, _32x64x8x1),
    ("forward", "tf32", True, SM100): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _64x32x8x2),
    ("backward_dkv", "tf32", True, SMALL): (_32x64x4x2, _32x64x8x1, _64x32x8x2, _32x32x8x1),
    ("backward_dkv", "tf32", True, SM80): (_64x64x8x2, _32x64x4x2, _64x32x8x1, _64x32x8x1),
    ("backward_dkv", "tf32", True, SM90): (_64x64x8x2, _32x64x4x2, _64x32x8x2, _64x32x8x1),
    ("backward_dkv", "tf32", True, SM100): (_64x64x8x2, _64x64x8x2, _64x32x8x2, _64x32x8x1),
    ("backward_dq", "tf32", True, SMALL): (_64x32x4x2, _64x32x4x2, _32x64x8x2, _32x64x8x1),
    ("backward_dq", "tf32", True, SM80): (_64x64x8x2, _64x32x4x2, _32x64x8x1, _32x64x8x1),
    ("backward_dq", "tf32", True, SM90): (_64x64x8x2, _64x32x4x2, _64x32x8x2, _64x32x8x2),
    ("backward_dq", "tf32", True, SM100): (_64x64x8x2, _64x64x8x2, _64x32x8x2, _32x64x8x1),
    ("backward_dbias", "tf32", True, SMALL): (_64x32x4x2, _64x32x4x2, _32x64x8x1, _32x64x8x1),
    ("backward_dbias", "tf32", True, SM80): (_64x32x4x2, _64x32x4x2, _32x64x8x1, _32x64x8x1),
    ("backward_dbias", "tf32", True, SM90): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _32x16x4x1),
    ("backward_dbias", "tf32", True, SM100): (_64x64x8x2, _64x64x8x2, _64x64x8x2, _32x16x4x1),
    # fp32, without dropout
    ("forward", "ieee", False, SMALL): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("forward", "ieee", False, SM80): (_32x16x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("forward", "ieee", False, SM90): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("forward", "ieee", False, SM100): (_32x16x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dkv", "ieee", False, SMALL): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dkv", "ieee", False, SM80): (_32x32x8x1, _32x16x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dkv", "ieee", False, SM90): (_32x16x8x1, _32x32x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dkv", "ieee", False, SM100): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dq", "ieee", False, SMALL): (_32x32x8x1, _32x16x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dq", "ieee", False, SM80): (_32x32x8x1, _32x16x8x1, _32x16x8x1, _16x16x4x1),
    ("backward_dq", "ieee", False, SM90): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dq", "ieee", False, SM100): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", False, SMALL): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", False, SM80): (_64x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", False, SM90): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", False, SM100): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
    # fp32, with dropout
    ("forward", "ieee", True, SMALL): (_32x32x8x1, _32x32x8x1, _16x32x8x1, _32x16x8x1),
    ("forward", "ieee", True, SM80): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("forward", "ieee", True, SM90): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("forward", "ieee", True, SM100): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dkv", "ieee", True, SMALL): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x16x4x1),
    ("backward_dkv", "ieee", True, SM80): (_32x16x8x1, _32x16x8x1, _32x16x8x1, _16x16x4x1),
    ("backward_dkv", "ieee", True, SM90): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dkv", "ieee", True, SM100): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x32x8x1),
    ("backward_dq", "ieee", True, SMALL): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dq", "ieee", True, SM80): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _16x16x4x1),
    ("backward_dq", "ieee", True, SM90): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dq", "ieee", True, SM100): (_32x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", True, SMALL): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", True, SM80): (_64x32x8x1, _32x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", True, SM90): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
    ("backward_dbias", "ieee", True, SM100): (_64x32x8x1, _64x32x8x1, _32x16x8x1, _32x16x8x1),
}
