"""The parameters of each attention kernel, as NamedTuples.

Field names are parameter names, and the kernels document them. A misspelt field is an error where the tuple is built,
on any machine, and not at a launch on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Strides = tuple[int, ...]


class ScoreArguments(NamedTuple):
    """Parameters of every kernel that computes scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    query_strides: Strides
    key_strides: Strides
    value_strides: Strides
    mask_strides: Strides
    batch_size: int
    patch_count: int
    head_count: int
    scale_log2: float
    drop_threshold: int
    drop_scale: float
    seed_low: int
    seed_high: int
    HEAD_DIM: int
    BLOCK_D: int
    DROPOUT: bool


class MatmulArguments(NamedTuple):
    """Parameters of every kernel that multiplies matrices."""

    PRECISION: str
    UPCAST: bool
    FENCE: bool


class PackedBias(NamedTuple):
    """The bias of all heads in one layout."""

    packed_bias: Tensor | None
    packed_size: int


class BiasArguments(NamedTuple):
    """Parameters of every kernel that reads tiles of the bias."""

    packed: PackedBias
    column_offsets: Tensor | None
    window_height: int
    window_width: int
    BIAS_LAYOUT: str
    BIAS_VECTOR: int


class TileArguments(NamedTuple):
    """Queries and keys of a tile."""

    BLOCK_M: int
    BLOCK_N: int


class GradientArguments(NamedTuple):
    """Parameters of every kernel that computes gradients of the scores."""

    grad_out: Tensor
    grad_strides: Strides
    lse_log2: Tensor
    delta: Tensor
    lse_stride: int


class ChunkArguments(NamedTuple):
    """Heads and rows of one launch of the bias gradient, with scratch."""

    scratch: Tensor
    scratch_stride: int
    head_start: int
    chunk_heads: int
    row_start: int
    row_end: int


class PackBiasArguments(NamedTuple):
    """Parameters of `pack_bias_kernel`."""

    table: Tensor
    packed: PackedBias
    table_strides: Strides
    flipped: int
    inverse_scale: float
    window_height: int
    window_width: int
    BIAS_LAYOUT: str
    BLOCK: int


class ForwardArguments(NamedTuple):
    """Parameters of `attention_forward_kernel`."""

    scores: ScoreArguments
    matmul: MatmulArguments
    bias: BiasArguments
    tile: TileArguments
    out: Tensor
    lse: Tensor
    keys_per_split: int
    SPLIT: bool


class CombineSplitsArguments(NamedTuple):
    """Parameters of `combine_splits_kernel`."""

    partial_out: Tensor
    partial_lse: Tensor
    out: Tensor
    lse: Tensor
    batch_size: int
    token_count: int
    head_count: int
    num_splits: int
    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int


class BackwardPreprocessArguments(NamedTuple):
    """Parameters of `backward_preprocess_kernel`."""

    gradients: GradientArguments
    out: Tensor
    lse: Tensor
    out_strides: Strides
    batch_size: int
    patch_count: int
    head_count: int
    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int


class BackwardDkvArguments(NamedTuple):
    """Parameters of `backward_dkv_kernel`."""

    scores: ScoreArguments
    matmul: MatmulArguments
    bias: BiasArguments
    tile: TileArguments
    gradients: GradientArguments
    grad_key: Tensor | None
    grad_value: Tensor | None
    scale: float


class BackwardDqArguments(NamedTuple):
    """Parameters of `backward_dq_kernel`."""

    scores: ScoreArguments
    matmul: MatmulArguments
    bias: BiasArguments
    tile: TileArguments
    gradients: GradientArguments
    grad_query: Tensor
    scale: float


class BackwardDbiasArguments(NamedTuple):
    """Parameters of `backward_dbias_kernel`."""

    scores: ScoreArguments
    matmul: MatmulArguments
    bias: BiasArguments
    tile: TileArguments
    gradients: GradientArguments
    chunk: ChunkArguments
    batches_per_split: int


class DbiasClsColumnArguments(NamedTuple):
    """Parameters of `dbias_cls_column_kernel`."""

    scores: ScoreArguments
    packed: PackedBias
    gradients: GradientArguments
    cls_column: Tensor
    BLOCK_M: int


class DtablePatchesArguments(NamedTuple):
    """Parameters of `dtable_patches_kernel`."""

    chunk: ChunkArguments
    grad_table: Tensor
    accumulate: int
    num_splits: int
    head_count: int
    window_height: int
    window_width: int
    BLOCK_P: int
    BLOCK_V: int


class DtableClsArguments(NamedTuple):
    """Parameters of `dtable_cls_kernel`."""

    chunk: ChunkArguments
    cls_column: Tensor
    grad_table: Tensor
    table_row: int
    num_splits: int
    batch_size: int
    patch_count: int
    head_count: int
    BLOCK: int
