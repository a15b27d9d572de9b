"""Choose tiles, bias layout and splits of the attention kernels from tables. A launch tunes nothing."""

from typing import NamedTuple

from ..common.gpu import INTERPRETER, SM100
from .tiles import TILES, TileConfig


class BiasLayout(NamedTuple):
    """Layout in which a kernel reads the bias: see bias.load_bias_tile."""

    name: str  # "paired", "plain", "extended" or "none"
    vector: int  # entries that one instruction loads; 0 for tl.load


class DbiasPlan(NamedTuple):
    """The part of the bias gradient that one launch computes."""

    num_splits: int  # splits of the batch, each with its own sum
    heads: int
    rows: int


NO_BIAS = BiasLayout("none", 0)

KERNELS = ("forward", "backward_dkv", "backward_dq", "backward_dbias")
HEAD_DIMS = (16, 32, 64, 128)

LARGEST_PATCH_BYTES = 2**20
"""Largest size of one head's patches in the layouts paired and plain. Larger windows read the extended table."""
SCRATCH_BYTES = 2**26
"""Largest size of the bias gradient before its reduction. A launch computes as many heads or rows as that holds."""
PACKED_MARGIN = 256
"""Entries behind the packed bias that the last tile of columns may read: 127 columns, two entries apart."""

PACK_BLOCK = 1024
PREPROCESS_BLOCK = 16
COMBINE_BLOCK = 16
DIAGONAL_BLOCK_PATCHES = 32
DIAGONAL_BLOCK_DIFFERENCES = 32
CLS_BLOCK = 256

_INTERPRETED = TileConfig(64, 32, 4, 1)


def padded_head_dim(head_dim: int) -> int:
    """Round up to a power of two that matrix instructions accept."""
    return max(16, 1 << (head_dim - 1).bit_length())


def select(kernel: str, architecture: str, block_d: int, arithmetic: str, dropout: bool) -> TileConfig:
    """Return the tiles of a kernel.

    Args:
        kernel: One of KERNELS.
        architecture: One of gpu.ARCHITECTURES, or gpu.INTERPRETER.
        block_d: Padded head dimension, one of HEAD_DIMS.
        arithmetic: One of gpu.ARITHMETICS.
        dropout: Whether attention weights are dropped, which takes registers.
    """
    if architecture == INTERPRETER:
        return _INTERPRETED
    return TILES[kernel, arithmetic, dropout, architecture][HEAD_DIMS.index(block_d)]


def bias_layout(architecture: str, element_size: int, window: tuple[int, int]) -> BiasLayout:
    """Return how a kernel reads the bias of a window `(height, width)`."""
    # Vector loads rely on the register layout of 16-bit tensor core products; fp32 and the interpreter use tl.load.
    in_mma_layout = architecture != INTERPRETER and element_size == 2
    if packed_patch_bytes(window) > LARGEST_PATCH_BYTES:
        return BiasLayout("extended", 1 if in_mma_layout else 0)
    if window[1] % 2:
        return BiasLayout("plain", 1 if in_mma_layout else 0)
    # On sm_100 a thread holds one row of the tile; elsewhere it holds parts of two, which "paired" interleaves.
    if architecture == SM100:
        return BiasLayout("plain", 2 if in_mma_layout else 0)
    return BiasLayout("paired", 4 if in_mma_layout else 0)


def packed_patch_bytes(window: tuple[int, int]) -> int:
    """Return the bytes of one head's patches. The layout is paired or plain."""
    height, width = window
    return 4 * (2 * height - 1) * width * width


def packed_size(layout: str, window: tuple[int, int]) -> int:
    """Return the fp32 entries of one head's packed bias."""
    # Patches, the constant row of CLS, and two entries of the CLS column.
    height, width = window
    patches = height * width
    if layout == "extended":
        table = (2 * height - 1) * (2 * width - 1)
        entries = table + (table - 1) // 2 + 1
    else:
        entries = packed_patch_bytes(window) // 4 + patches * (2 if layout == "paired" else 1)
    # A multiple of 4 aligns every head to 16 bytes.
    return (entries + 2 + 3) // 4 * 4


def lse_stride(patch_count: int) -> int:
    """Return the entries per head of the padded lse and delta."""
    # Patches, padding to the end of any tile (128 columns at most), and four entries for CLS.
    return (patch_count + 127) // 128 * 128 + 4


def scratch_stride(patch_count: int) -> int:
    """Return the entries per row of the bias gradient's scratch."""
    # A multiple of 4 allows 16-byte stores.
    return (patch_count + 3) // 4 * 4


def num_splits(programs: int, patch_count: int, block_n: int, num_sms: int) -> int:
    """Return the number of key splits that gives every SM work.

    Args:
        programs: Size of the grid without splits.
        patch_count: Keys without CLS.
        block_n: Keys of a step; each split has at least four steps.
        num_sms: Number of SMs, or 0 for one split.
    """
    wanted = -(-2 * num_sms // programs)
    return max(1, min(wanted, patch_count // (4 * block_n), 8))


def plan_backward_dbias(
    batch_size: int, patch_count: int, head_count: int, config: TileConfig, num_sms: int
) -> DbiasPlan:
    """Plan launches that fit SCRATCH_BYTES and fill the GPU."""
    row_bytes = 4 * scratch_stride(patch_count)
    rows = patch_count + 1
    heads = min(head_count, SCRATCH_BYTES // (row_bytes * rows))
    if heads == 0:
        # Not even one head fits: some rows of a head at a time, a multiple of the tile.
        rows = max(1, SCRATCH_BYTES // (row_bytes * config.block_m)) * config.block_m
        return DbiasPlan(1, 1, rows)
    tiles = -(-rows // config.block_m) * -(-patch_count // config.block_n) * heads
    # Too few tiles for the GPU: split the batch, as far as the scratch holds.
    splits = min(-(-2 * num_sms // tiles), batch_size, SCRATCH_BYTES // (row_bytes * rows * heads))
    return DbiasPlan(max(1, splits), heads, rows)
