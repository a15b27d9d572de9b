"""Launch the attention kernels on CUDA tensors.

CPU tensors need TRITON_INTERPRET=1. The caller validates shapes, dtypes and devices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common.compiler_hazards import DV_ALONE
from ..common.device import device_of, num_sms_of
from ..common.launch import launch_kernel
from . import backward_dbias, backward_dkv, backward_dq, backward_preprocess, configs, forward
from .arguments import (
    BackwardDbiasArguments,
    BackwardDkvArguments,
    BackwardDqArguments,
    BackwardPreprocessArguments,
    BiasArguments,
    ChunkArguments,
    CombineSplitsArguments,
    DbiasClsColumnArguments,
    DtableClsArguments,
    DtablePatchesArguments,
    ForwardArguments,
    GradientArguments,
    MatmulArguments,
    ScoreArguments,
    TileArguments,
)
from .inputs import (
    AttentionInputs,
    addressable,
    bias_arguments,
    matmul_arguments,
    prepare,
    score_arguments,
    tile_config,
)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: tuple[int, int],
    scale: float,
    dropout_p: float,
    seed: int,
    bias: BiasArguments | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with the relative position bias of `table`.

    Args:
        q, k, v: `[B, N, H, D]`, fp16, bf16 or fp32, any strides; copied if the kernels cannot address them.
        table: `[(2*Wh-1)*(2*Ww-1)+3, H]` in any float type, or None for no bias.
        key_mask: `[B, N]` bool, True = attend, or None.
        window: `(Wh, Ww)` patches, `N = Wh*Ww + 1`; not read if table is None.
        scale: Factor of `q @ k`.
        dropout_p: Probability of dropping an attention weight.
        seed: 64-bit seed of the dropout mask.
        bias: Result of `forward_bias` for this table, window and scale, if the caller caches it.

    Returns:
        out `[B, N, H, D]` contiguous in q's dtype, and lse `[B, H, N]` fp32, the natural log-sum-exp of the scores. A
        query whose keys are all masked gets 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with device_of(q):
        inputs = prepare(q, k, v, table, key_mask, window, scale, dropout_p, seed)
        _launch_forward(inputs, bias_arguments(inputs, flipped=False) if bias is None else bias, out, lse)
    return out, lse


def forward_bias(table: Tensor | None, window: tuple[int, int], scale: float, heads_like: Tensor) -> BiasArguments:
    """Pack the bias for `attention_forward`.

    The result copies the table; rebuild it after the table changes.

    Args:
        table, window: As for `attention_forward`.
        scale: As for `attention_forward`, positive.
        heads_like: A tensor with the shape, dtype and device of q, k and v.
    """
    with device_of(heads_like):
        inputs = prepare(heads_like, heads_like, heads_like, table, None, window, scale, 0.0, 0)
        return bias_arguments(inputs, flipped=False)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    scale: float,
    dropout_p: float,
    seed: int,
    output_mask: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `attention_forward`. Results are deterministic.

    Args:
        grad_out: `[B, N, H, D]` in q's dtype, any strides, 0 included.
        out, lse: Results of `attention_forward`.
        output_mask: Which of the gradients of q, k, v and table to compute.
        The others: As for `attention_forward`.

    Returns:
        dq, dk, dv `[B, N, H, D]` contiguous in the inputs' dtype, and dtable like table. Gradients that are not
        needed, and dtable if table is None, are empty tensors.
    """
    want_q, want_k, want_v, want_table = output_mask
    want_table = want_table and table is not None
    dq = _gradient_like(q, want_q)
    dk = _gradient_like(k, want_k)
    dv = _gradient_like(v, want_v)
    dtable = _gradient_like(q if table is None else table, want_table)
    if q.numel() == 0:
        return dq, dk, dv, dtable.zero_()
    if not (want_q or want_k or want_v or want_table):
        return dq, dk, dv, dtable

    with device_of(q):
        inputs = prepare(q, k, v, table, key_mask, window, scale, dropout_p, seed)
        shared = _launch_preprocess(inputs, addressable(grad_out), addressable(out), lse.contiguous())
        if want_k or want_v:
            # Tiles of dK and dV have keys as rows.
            bias = bias_arguments(inputs, flipped=True)
            _launch_dkv(inputs, shared, bias, dk if want_k else None, dv if want_v else None)
        if want_q or want_table:
            bias = bias_arguments(inputs, flipped=False)
            if want_q:
                _launch_dq(inputs, shared, bias, dq)
            if want_table:
                _launch_dtable(inputs, shared, bias, dtable)
    return dq, dk, dv, dtable


class _Shared(NamedTuple):
    """Arguments that all backward kernels with tiles share."""

    scores: ScoreArguments
    matmul: MatmulArguments
    gradients: GradientArguments


def _launch_forward(inputs: AttentionInputs, bias: BiasArguments, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`. If the keys are split, combine partial results."""
    batch, tokens, heads, _ = out.shape
    tile = tile_config("forward", inputs)
    # One image of few heads leaves SMs without a program: then several programs share the keys of its queries.
    programs = batch * triton.cdiv(tokens, tile.block_m) * heads
    num_splits = configs.num_splits(programs, tokens - 1, tile.block_n, num_sms_of(out))
    # Partial results are fp32: they are rounded once, after they are combined.
    part_out, part_lse = out, lse
    if num_splits > 1:
        part_out = torch.empty((num_splits, *out.shape), dtype=torch.float32, device=out.device)
        part_lse = torch.empty((num_splits, *lse.shape), dtype=torch.float32, device=out.device)
    arguments = ForwardArguments(
        scores=score_arguments(inputs),
        matmul=matmul_arguments(inputs),
        bias=bias,
        tile=_tile(tile),
        out=part_out,
        lse=part_lse,
        keys_per_split=triton.cdiv(triton.cdiv(tokens - 1, num_splits), tile.block_n) * tile.block_n,
        SPLIT=num_splits > 1,
    )
    launch_kernel(forward.attention_forward_kernel, programs * num_splits, arguments, **_options(tile))
    if num_splits > 1:
        _launch_combine_splits(part_out, part_lse, out, lse, num_splits)


def _launch_combine_splits(partial_out: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, num_splits: int) -> None:
    batch, tokens, heads, head_dim = out.shape
    arguments = CombineSplitsArguments(
        partial_out=partial_out,
        partial_lse=partial_lse,
        out=out,
        lse=lse,
        batch_size=batch,
        token_count=tokens,
        head_count=heads,
        num_splits=num_splits,
        HEAD_DIM=head_dim,
        BLOCK_D=configs.padded_head_dim(head_dim),
        BLOCK_M=configs.COMBINE_BLOCK,
    )
    programs = batch * triton.cdiv(tokens, configs.COMBINE_BLOCK) * heads
    launch_kernel(forward.combine_splits_kernel, programs, arguments)


def _launch_preprocess(inputs: AttentionInputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> _Shared:
    """Compute delta and the padded lse of every row."""
    batch, tokens, heads, head_dim = out.shape
    stride = configs.lse_stride(tokens - 1)
    lse_log2 = torch.empty((batch, heads, stride), dtype=torch.float32, device=out.device)
    gradients = GradientArguments(
        grad_out=grad_out,
        grad_strides=grad_out.stride()[:3],
        lse_log2=lse_log2,
        delta=torch.empty_like(lse_log2),
        lse_stride=stride,
    )
    arguments = BackwardPreprocessArguments(
        gradients=gradients,
        out=out,
        lse=lse,
        out_strides=out.stride()[:3],
        batch_size=batch,
        patch_count=tokens - 1,
        head_count=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=inputs.block_d,
        BLOCK_M=configs.PREPROCESS_BLOCK,
    )
    programs = batch * triton.cdiv(stride, configs.PREPROCESS_BLOCK) * heads
    launch_kernel(backward_preprocess.backward_preprocess_kernel, programs, arguments)
    return _Shared(score_arguments(inputs), matmul_arguments(inputs), gradients)


def _launch_dkv(
    inputs: AttentionInputs, shared: _Shared, bias: BiasArguments, dk: Tensor | None, dv: Tensor | None
) -> None:
    batch, tokens, heads, _ = inputs.query.shape
    tile = tile_config("backward_dkv", inputs, DV_ALONE if dk is None else None)
    arguments = BackwardDkvArguments(
        scores=shared.scores,
        matmul=shared.matmul,
        bias=bias,
        tile=_tile(tile),
        gradients=shared.gradients,
        grad_key=dk,
        grad_value=dv,
        scale=inputs.scale,
    )
    programs = batch * triton.cdiv(tokens, tile.block_n) * heads
    launch_kernel(backward_dkv.backward_dkv_kernel, programs, arguments, **_options(tile))


def _launch_dq(inputs: AttentionInputs, shared: _Shared, bias: BiasArguments, dq: Tensor) -> None:
    batch, tokens, heads, _ = inputs.query.shape
    tile = tile_config("backward_dq", inputs)
    arguments = BackwardDqArguments(
        scores=shared.scores,
        matmul=shared.matmul,
        bias=bias,
        tile=_tile(tile),
        gradients=shared.gradients,
        grad_query=dq,
        # `prepare` moved the sign into q, and dq takes it back; dK multiplies the signed q itself.
        scale=inputs.scale * inputs.sign,
    )
    programs = batch * triton.cdiv(tokens, tile.block_m) * heads
    launch_kernel(backward_dq.backward_dq_kernel, programs, arguments, **_options(tile))


def _launch_dtable(inputs: AttentionInputs, shared: _Shared, bias: BiasArguments, dtable: Tensor) -> None:
    """Compute the gradient of the table in chunks of heads or rows."""
    tile = tile_config("backward_dbias", inputs)
    batch, patches, heads = shared.scores.batch_size, shared.scores.patch_count, shared.scores.head_count
    # A [N, N] scratch for all heads would take the memory that these kernels avoid; chunks reuse a bounded one.
    plan = configs.plan_backward_dbias(batch, patches, heads, tile, num_sms_of(dtable))
    stride = configs.scratch_stride(patches)
    scratch = torch.empty((plan.num_splits, plan.heads, plan.rows, stride), dtype=torch.float32, device=dtable.device)
    # Parts are added in fp32, whatever the dtype of the table is.
    total = dtable if dtable.dtype == torch.float32 else torch.empty_like(dtable, dtype=torch.float32)
    cls_column = _launch_cls_column(shared, bias)
    for head_start in range(0, heads, plan.heads):
        chunk_heads = min(plan.heads, heads - head_start)
        for row_start in range(0, patches + 1, plan.rows):
            row_end = min(row_start + plan.rows, patches + 1)
            chunk = ChunkArguments(scratch, stride, head_start, chunk_heads, row_start, row_end)
            _launch_dbias(shared, bias, tile, chunk, plan.num_splits)
            _launch_dtable_patches(bias, chunk, plan.num_splits, total)
        # The last chunk of rows ends with the CLS query, which these rows of the table need.
        _launch_dtable_cls(shared.scores, chunk, plan.num_splits, cls_column, total)
    if total is not dtable:
        dtable.copy_(total)


def _launch_dbias(
    shared: _Shared, bias: BiasArguments, tile: configs.TileConfig, chunk: ChunkArguments, num_splits: int
) -> None:
    """Fill the scratch with the score gradients of one chunk."""
    arguments = BackwardDbiasArguments(
        scores=shared.scores,
        matmul=shared.matmul,
        bias=bias,
        tile=_tile(tile),
        gradients=shared.gradients,
        chunk=chunk,
        batches_per_split=triton.cdiv(shared.scores.batch_size, num_splits),
    )
    key_blocks = triton.cdiv(shared.scores.patch_count, tile.block_n)
    query_blocks = triton.cdiv(chunk.row_end - chunk.row_start, tile.block_m)
    programs = key_blocks * query_blocks * chunk.chunk_heads * num_splits
    launch_kernel(backward_dbias.backward_dbias_kernel, programs, arguments, **_options(tile))


def _launch_dtable_patches(bias: BiasArguments, chunk: ChunkArguments, num_splits: int, total: Tensor) -> None:
    """Sum the scratch along diagonals into the patch rows of the table."""
    height, width = bias.window_height, bias.window_width
    arguments = DtablePatchesArguments(
        chunk=chunk,
        grad_table=total,
        # The first chunk of rows overwrites `total`, whose memory is not initialized.
        accumulate=int(chunk.row_start > 0),
        num_splits=num_splits,
        head_count=total.shape[1],
        window_height=height,
        window_width=width,
        BLOCK_P=configs.DIAGONAL_BLOCK_PATCHES,
        BLOCK_V=configs.DIAGONAL_BLOCK_DIFFERENCES,
    )
    blocks = triton.cdiv(2 * width - 1, configs.DIAGONAL_BLOCK_DIFFERENCES)
    programs = blocks * (2 * height - 1) * chunk.chunk_heads
    launch_kernel(backward_dbias.dtable_patches_kernel, programs, arguments)


def _launch_dtable_cls(
    scores: ScoreArguments, chunk: ChunkArguments, num_splits: int, cls_column: Tensor, total: Tensor
) -> None:
    """Fill the last three rows of the table."""
    arguments = DtableClsArguments(
        chunk=chunk,
        cls_column=cls_column,
        grad_table=total,
        table_row=total.shape[0] - 3,
        num_splits=num_splits,
        batch_size=scores.batch_size,
        patch_count=scores.patch_count,
        head_count=scores.head_count,
        BLOCK=configs.CLS_BLOCK,
    )
    launch_kernel(backward_dbias.dtable_cls_kernel, chunk.chunk_heads, arguments)


def _launch_cls_column(shared: _Shared, bias: BiasArguments) -> Tensor:
    """Return the fp32 gradient of scores with the CLS key. It is `[B, H, N]`."""
    scores = shared.scores
    batch, tokens, heads = scores.batch_size, scores.patch_count + 1, scores.head_count
    column = torch.empty((batch, heads, tokens), dtype=torch.float32, device=scores.query.device)
    arguments = DbiasClsColumnArguments(
        scores=scores,
        packed=bias.packed,
        gradients=shared.gradients,
        cls_column=column,
        BLOCK_M=configs.PREPROCESS_BLOCK,
    )
    programs = batch * triton.cdiv(tokens, configs.PREPROCESS_BLOCK) * heads
    launch_kernel(backward_dbias.dbias_cls_column_kernel, programs, arguments)
    return column


def _gradient_like(tensor: Tensor, wanted: bool) -> Tensor:
    return torch.empty(tensor.shape if wanted else 0, dtype=tensor.dtype, device=tensor.device)


def _tile(tile: configs.TileConfig) -> TileArguments:
    return TileArguments(tile.block_m, tile.block_n)


def _options(tile: configs.TileConfig) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
