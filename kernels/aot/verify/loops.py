"""Which kernels of a case count as checked.

Only a kernel that runs its loop at least twice and then a ragged step counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...attention import configs
from ...linear_gelu import configs as linear_configs
from ...residual_norm import configs as norm_configs
from .cases import DTYPES, AttentionCase, Case, LinearCase, NormCase, PatchCase, architecture_of, arithmetic_of

SPLIT_SMS = 1000
"""SMs of cases with splits: as many splits as the sizes allow."""


PATCH_TILES = {"large": (128, 128, 1), "small": (64, 64, 2)}
"""Patches, columns and slabs of a tile of patch embedding: see csrc/cuda/patch_embed/arguments.cuh."""
SLAB_BYTES = 64
"""Bytes of depth in a slab."""


def steps_to_count(capability: int) -> int:
    """Return whole steps after which a loop with products counts as checked."""
    # For sm_100, Triton takes the first and the last product out of the loop, which two steps do not enter.
    return 3 if capability == 100 else 2


class Loop(NamedTuple):
    """One kernel's loop: steps that are whole, and whether a partial one ends it."""

    kernel: str
    tile: tuple[int, ...]
    whole_steps: int
    is_ragged: bool
    needed_steps: int = 2

    @property
    def counts(self) -> bool:
        return self.whole_steps >= self.needed_steps and self.is_ragged


def loops(case: Case) -> list[Loop]:
    """Return the loops of the case's kernels, by kernel and tile. Kernels without a loop are left out."""
    if isinstance(case, AttentionCase):
        return list(_attention_loops(case))
    if isinstance(case, LinearCase):
        return [_linear_loop(case)]
    return [_patch_loop(case)] if isinstance(case, PatchCase) else list(_norm_loops(case))


def attention_tile(case: AttentionCase, kernel: str) -> configs.TileConfig:
    """Return the tile that the launcher chooses."""
    block_d = configs.padded_head_dim(case.head_dim)
    return configs.select(kernel, architecture_of(case.capability), block_d, arithmetic_of(case.dtype), case.dropout)


def num_sms_of(case: AttentionCase) -> int:
    """Return the number of SMs for the splits of the case. With it, the launcher splits as the case says."""
    if not case.split:
        return 1
    if not case.backward:
        return SPLIT_SMS
    # Two parts of the batch in the bias gradient: each has a loop over half the samples.
    tile = attention_tile(case, "backward_dbias")
    return _ceil(case.patch_count + 1, tile.block_m) * _ceil(case.patch_count, tile.block_n) * case.heads


def _attention_loops(case: AttentionCase) -> Iterator[Loop]:
    patches = case.patch_count
    forward = attention_tile(case, "forward")
    keys, splits = patches, 1
    if case.split:
        programs = case.batch * _ceil(patches + 1, forward.block_m) * case.heads
        splits = configs.num_splits(programs, patches, forward.block_n, num_sms_of(case))
        per_split = _ceil(_ceil(patches, splits), forward.block_n) * forward.block_n
        keys = patches - (splits - 1) * per_split  # of the last split, which has the fewest
    needed = steps_to_count(case.capability)
    yield _over("forward", forward, keys, forward.block_n, needed)
    if splits > 1:
        ragged = (patches + 1) % configs.COMBINE_BLOCK != 0
        yield Loop("combine_splits", (configs.COMBINE_BLOCK,), splits, ragged)
    if not case.backward:
        return
    tile = attention_tile(case, "backward_dkv")
    yield _over("backward_dkv", tile, patches, tile.block_m, needed)
    if case.gradients in ("dk", "dv"):
        return
    tile = attention_tile(case, "backward_dq")
    yield _over("backward_dq", tile, patches, tile.block_n, needed)
    if case.layout == "none":
        return
    # The loop is over samples; the tile itself is the ragged part.
    tile = attention_tile(case, "backward_dbias")
    plan = configs.plan_backward_dbias(case.batch, patches, case.heads, tile, num_sms_of(case))
    samples = _ceil(case.batch, plan.num_splits)
    ragged = patches % tile.block_n != 0 and (patches + 1) % tile.block_m != 0
    yield Loop("backward_dbias", tuple(tile), samples, ragged, needed)


def _over(kernel: str, tile: configs.TileConfig, patches: int, step: int, needed: int) -> Loop:
    return Loop(kernel, tuple(tile), patches // step, patches % step != 0, needed)


def linear_tile(case: LinearCase) -> linear_configs.LinearTile:
    """Return the tile that the launcher chooses."""
    return linear_configs.select(architecture_of(case.capability), arithmetic_of(case.dtype), case.rows, case.outputs)


def _linear_loop(case: LinearCase) -> Loop:
    tile = linear_tile(case)
    inputs = _ceil(case.inputs, 16) * 16  # the launcher pads
    # A step of 16 inputs is never partial: there the last block of rows and outputs is.
    ragged = inputs % tile.block_k != 0 or (
        tile.block_k == 16 and case.rows % tile.block_m != 0 and case.outputs % tile.block_n != 0
    )
    return Loop("linear_gelu", tuple(tile), inputs // tile.block_k, ragged, steps_to_count(case.capability))


def _norm_loops(case: NormCase) -> Iterator[Loop]:
    rows = case.batch * case.tokens
    share = norm_configs.share_rows(rows, case.num_sms)
    steps = share.rows_per_program // norm_configs.BACKWARD_ROWS
    last = rows - (share.programs - 1) * share.rows_per_program
    tile = (norm_configs.backward_warps(case.size), norm_configs.BACKWARD_ROWS)
    yield Loop("residual_norm_backward", tile, steps, last % norm_configs.BACKWARD_ROWS != 0)
    if case.form != "frozen":
        block = norm_configs.PARTIALS_BLOCK
        ragged = share.programs % block != 0 and case.size % norm_configs.COLUMNS_BLOCK != 0
        yield Loop("sum_partials", (block, norm_configs.COLUMNS_BLOCK), share.programs // block, ragged)


def _patch_loop(case: PatchCase) -> Loop:
    rows, columns, slabs = PATCH_TILES[case.tile]
    step = slabs * SLAB_BYTES // DTYPES[case.dtype].itemsize
    depth = 3 * case.patch[0] * case.patch[1]
    return Loop("patch_embed", (rows, columns, step), depth // step, depth % step != 0)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def checked_kernels(case: Case) -> list[tuple[object, ...]]:
    """Return what the case checks, one entry for each kernel that counts: kernel, tile and every property of it."""
    # An operator's tensors and sizes, without the numbers of samples, rows and heads.
    if isinstance(case, AttentionCase):
        properties: tuple[object, ...] = (*case[: case._fields.index("backward")], case.gradients)
    elif isinstance(case, LinearCase):
        properties = (case.capability, case.dtype, case.inputs, case.outputs, case.bias)
    elif isinstance(case, PatchCase):
        properties = case[: case._fields.index("batch")]
    else:
        properties = (case.capability, case.dtype, case.row_dtype, case.size, case.form)
    return [(loop.kernel, loop.tile, *properties) for loop in loops(case) if loop.counts]
