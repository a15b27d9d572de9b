"""How the attention kernels are tiled, and which table layout they read: plain tables, looked up at launch.

Nothing is tuned at run time.
"""

from typing import NamedTuple

from ..common.gpu import INTERPRETER, SM100
from .tiles import TILES, TileConfig


class BiasLayout(NamedTuple):
    """Where the bias is read from, and how: see bias.load_bias_tile."""

    name: str  # "paired", "plain", "extended" or "none"
    vector: int  # entries that one instruction loads; 0 for tl.load


class DbiasPlan(NamedTuple):
    """What one launch of the bias gradient covers, so that its scratch is bounded."""

    num_splits: int  # parts of the batch, summed apart
    heads: int
    rows: int


NO_BIAS = BiasLayout("none", 0)

KERNELS = ("forward", "backward_dkv", "backward_dq", "backward_dbias")
HEAD_DIMS = (16, 32, 64, 128)


LARGEST_PATCH_BYTES = 2**20
"""Of one head's packed patches, paired or plain: larger windows read the extended table, which needs few bytes."""
SCRATCH_BYTES = 2**26
"""Of the bias gradient before it is summed along diagonals; a launch covers as many heads or rows as that holds."""
PACKED_MARGIN = 256
"""Entries that the last tile of columns may read beyond the packed bias: 127 columns, two entries apart."""

PACK_BLOCK = 1024
PREPROCESS_BLOCK = 16
COMBINE_BLOCK = 16
DIAGONAL_BLOCK_PATCHES = 32
DIAGONAL_BLOCK_DIFFERENCES = 32
CLS_BLOCK = 256

_INTERPRETED = TileConfig(64, 32, 4, 1)


def padded_head_dim(head_dim: int) -> int:
    """Columns of the tiles: a power of two that matrix instructions accept."""
    return max(16, 1 << (head_dim - 1).bit_length())


def select(kernel: str, architecture: str, block_d: int, multiplies: str, dropout: bool) -> TileConfig:
    """The tiles of a kernel.

    Args:
        kernel: one of KERNELS.
        architecture: one of gpu.ARCHITECTURES, or gpu.INTERPRETER.
        block_d: padded head dimension, one of HEAD_DIMS.
        multiplies: one of gpu.ARITHMETICS.
        dropout: whether attention weights are dropped, which takes registers.
    """
    if architecture == INTERPRETER:
        return _INTERPRETED
    return TILES[kernel, multiplies, dropout, architecture][HEAD_DIMS.index(block_d)]


def bias_layout(architecture: str, element_size: int, window: tuple[int, int]) -> BiasLayout:
    """How the bias of a window `(height, width)` is read.

    Vector loads are for the layouts of the tensor cores: fp32 reads entry by entry through tl.load, and so does the
    interpreter. On sm_100 a thread holds a row of the tile, elsewhere parts of two.
    """
    in_mma_layout = architecture != INTERPRETER and element_size == 2
    if packed_patch_bytes(window) > LARGEST_PATCH_BYTES:
        return BiasLayout("extended", 1 if in_mma_layout else 0)
    if window[1] % 2:
        return BiasLayout("plain", 1 if in_mma_layout else 0)
    if architecture == SM100:
        return BiasLayout("plain", 2 if in_mma_layout else 0)
    return BiasLayout("paired", 4 if in_mma_layout else 0)


def packed_patch_bytes(window: tuple[int, int]) -> int:
    """Bytes of one head's patches in the layouts paired and plain."""
    height, width = window
    return 4 * (2 * height - 1) * width * width


def packed_size(layout: str, window: tuple[int, int]) -> int:
    """fp32 entries of one head: patch rows, the row of CLS, two for the CLS column; a multiple of 4 for alignment."""
    height, width = window
    patches = height * width
    if layout == "extended":
        table = (2 * height - 1) * (2 * width - 1)
        entries = table + (table - 1) // 2 + 1
    else:
        entries = packed_patch_bytes(window) // 4 + patches * (2 if layout == "paired" else 1)
    return (entries + 2 + 3) // 4 * 4


def lse_stride(patch_count: int) -> int:
    """Entries of a row of statistics: patches, padding up to any tile's end, and four of which the first is CLS's."""
    return (patch_count + 127) // 128 * 128 + 4


def scratch_stride(patch_count: int) -> int:
    """Entries of a row of the bias gradient's scratch."""
    return (patch_count + 3) // 4 * 4


def num_splits(programs: int, patch_count: int, block_n: int, num_sms: int) -> int:
    """Parts of the keys that a forward of `programs` programs is split into, so that every multiprocessor has work.

    Each part has at least four steps; `num_sms` is 0 where splitting is of no use.
    """
    wanted = -(-2 * num_sms // programs)
    return max(1, min(wanted, patch_count // (4 * block_n), 8))


def plan_backward_dbias(
    batch_size: int, patch_count: int, head_count: int, config: TileConfig, num_sms: int
) -> DbiasPlan:
    """Heads and rows of a launch from SCRATCH_BYTES; splits of the batch where tiles are too few for the GPU."""
    row_bytes = 4 * scratch_stride(patch_count)
    rows = patch_count + 1
    heads = min(head_count, SCRATCH_BYTES // (row_bytes * rows))
    if heads == 0:
        rows = max(1, SCRATCH_BYTES // (row_bytes * config.block_m)) * config.block_m
        return DbiasPlan(1, 1, rows)
    tiles = -(-rows // config.block_m) * -(-patch_count // config.block_n) * heads
    splits = min(-(-2 * num_sms // tiles), batch_size, SCRATCH_BYTES // (row_bytes * rows * heads))
    return DbiasPlan(max(1, splits), heads, rows)
