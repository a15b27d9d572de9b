"""Tiles that `beit-fast tune` tries for each kernel."""

from __future__ import annotations

from collections.abc import Iterable

Tile = tuple[int, ...]

STAGES = range(1, 5)
PROGRAMS_PER_SM = (2, 4, 8)


def attention_tiles(kernel: str, arithmetic: str, shipped: Tile) -> list[Tile]:
    """List candidate tiles of an attention kernel.

    They are the tiles for every GPU and head dimension, and the shipped tile with other numbers of stages.

    Args:
        kernel: One of kernels.attention.configs.KERNELS.
        arithmetic: One of kernels.common.gpu.ARITHMETICS.
        shipped: The tile of this GPU, which comes first.
    """
    from ..kernels.attention.tiles import TILES

    listed = [tiles for (name, kind, _, _), tiles in TILES.items() if (name, kind) == (kernel, arithmetic)]
    return _unique([shipped, *(tile for tiles in listed for tile in tiles), *_with_stages(shipped)])


def linear_gelu_tiles(arithmetic: str, shipped: Tile) -> list[Tile]:
    """List candidate tiles of the linear layer with GELU.

    They are the tiles for every GPU and number of rows, and the shipped tile with other numbers of stages.
    """
    from ..kernels.linear_gelu.configs import TILES

    listed = [tiles for (kind, _), tiles in TILES.items() if kind == arithmetic]
    return _unique([shipped, *(tile for tiles in listed for tile in tiles), *_with_stages(shipped)])


def residual_norm_tiles(kernel: str, shipped: Tile) -> list[Tile]:
    """List candidate configurations of residual and LayerNorm.

    They have half, equal or twice the warps; in the backward each with several numbers of programs.
    """
    warps = [count for count in (shipped[0] // 2, shipped[0], 2 * shipped[0]) if 1 <= count <= 32]
    if kernel == "residual_norm":
        return _unique([shipped, *((count,) for count in warps)])
    return _unique([shipped, *((count, programs) for count in warps for programs in PROGRAMS_PER_SM)])


def _with_stages(tile: Tile) -> list[Tile]:
    return [(*tile[:-1], stages) for stages in STAGES]


def _unique(tiles: Iterable[Iterable[int]]) -> list[Tile]:
    return list(dict.fromkeys(tuple(tile) for tile in tiles))
