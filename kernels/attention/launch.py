"""Launches the attention kernels: on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1.

The caller has validated shapes, dtypes and devices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.device import device_of, num_sms_of
from . import backward_dbias, backward_dkv, backward_dq, backward_preprocess, configs, forward
from .arguments import (
    Inputs,
    addressable,
    bias_arguments,
    drop_scale,
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
    bias: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the relative position bias of `table` read inside the kernel.

    Args:
        q, k, v: `[B, N, H, D]`, fp16, bf16 or fp32, any strides (a copy is made unless the last one is 1).
        table: `[(2*Wh-1)*(2*Ww-1)+3, H]` in any float type, or None for no bias.
        key_mask: `[B, N]` bool, True = attend, or None.
        window: `(Wh, Ww)` patches, `N = Wh*Ww + 1`; ignored without a table.
        scale: multiplies `q @ k`.
        dropout_p: probability of dropping an attention weight.
        seed: 64-bit seed of the dropout mask.
        bias: what `forward_bias` gave for this table, window and scale, where the caller keeps it.

    Returns:
        out `[B, N, H, D]` contiguous in q's dtype, and lse `[B, H, N]` fp32, the natural log-sum-exp of the
        scores. A query with no key to attend to gets 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with device_of(q):
        inputs = prepare(q, k, v, table, key_mask, window, scale, dropout_p, seed)
        arguments = score_arguments(inputs) | (bias_arguments(inputs, flipped=False) if bias is None else bias)
        config = tile_config("forward", arguments)
        programs = batch * triton.cdiv(tokens, config.block_m) * heads
        splits = configs.num_splits(programs, tokens - 1, config.block_n, num_sms_of(q))
        if splits == 1:
            _launch_forward(arguments, config, programs, dropout_p, out, lse)
        else:
            _launch_split_forward(arguments, config, programs, dropout_p, out, lse, splits)
    return out, lse


def forward_bias(table: Tensor | None, window: tuple[int, int], scale: float, heads_like: Tensor) -> dict[str, Any]:
    """The bias as `attention_forward` reads it for q, k, v that are like `heads_like`, `[B, N, H, D]`.

    It holds a copy of the table, so it is made anew when the table changes. `scale` is positive.
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
    """Gradients of `attention_forward`, deterministic.

    Args:
        grad_out: `[B, N, H, D]` in q's dtype, any strides, 0 included.
        out, lse: what `attention_forward` returned.
        output_mask: which of the gradients of q, k, v and table are wanted.
        The others: as they went into `attention_forward`.

    Returns:
        dq, dk, dv `[B, N, H, D]` contiguous in the inputs' dtype, dtable as table; a zero-element tensor in
        place of each gradient that is not wanted, and of dtable when there is no table.
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
        arguments = _backward_arguments(inputs, addressable(grad_out), addressable(out), lse.contiguous())
        if want_k or want_v:
            arguments.update(bias_arguments(inputs, flipped=True))
            _launch_backward_dkv(arguments, inputs.scale, dk if want_k else None, dv if want_v else None)
        if want_q or want_table:
            arguments.update(bias_arguments(inputs, flipped=False))
        if want_q:
            _launch_backward_dq(arguments, inputs.scale * inputs.sign, dq)
        if want_table:
            _launch_backward_dbias(arguments, dtable)
    return dq, dk, dv, dtable


def _launch_forward(
    arguments: dict[str, Any], config: configs.TileConfig, programs: int, dropout_p: float, out: Tensor, lse: Tensor
) -> None:
    forward.attention_forward_kernel[(programs,)](
        **arguments,
        **_tile(config),
        drop_scale=drop_scale(dropout_p),
        keys_per_split=arguments["patch_count"],
        out=out,
        lse=lse,
        SPLIT=False,
    )


def _launch_split_forward(
    arguments: dict[str, Any],
    config: configs.TileConfig,
    programs: int,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    splits: int,
) -> None:
    """Each part of the keys on its own, then one result from all."""
    batch, tokens, heads, head_dim = out.shape
    partial_out = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    partial_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=out.device)
    forward.attention_forward_kernel[(programs * splits,)](
        **arguments,
        **_tile(config),
        drop_scale=drop_scale(dropout_p),
        keys_per_split=triton.cdiv(triton.cdiv(tokens - 1, splits), config.block_n) * config.block_n,
        out=partial_out,
        lse=partial_lse,
        SPLIT=True,
    )
    forward.combine_splits_kernel[(batch * triton.cdiv(tokens, configs.COMBINE_BLOCK) * heads,)](
        partial_out,
        partial_lse,
        out,
        lse,
        batch,
        tokens,
        heads,
        splits,
        HEAD_DIM=head_dim,
        BLOCK_D=arguments["BLOCK_D"],
        BLOCK_M=configs.COMBINE_BLOCK,
    )


def _backward_arguments(inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> dict[str, Any]:
    """The score arguments, the gradient, and the row statistics that are computed here."""
    batch, tokens, heads, head_dim = out.shape
    arguments = score_arguments(inputs)
    stride = configs.lse_stride(tokens - 1)
    lse_log2 = torch.empty((batch, heads, stride), dtype=torch.float32, device=out.device)
    delta = torch.empty_like(lse_log2)
    grid = (batch * triton.cdiv(stride, configs.PREPROCESS_BLOCK) * heads,)
    backward_preprocess.backward_preprocess_kernel[grid](
        grad_out,
        out,
        lse,
        lse_log2,
        delta,
        grad_out.stride()[:3],
        out.stride()[:3],
        batch,
        tokens - 1,
        heads,
        stride,
        HEAD_DIM=head_dim,
        BLOCK_D=arguments["BLOCK_D"],
        BLOCK_M=configs.PREPROCESS_BLOCK,
    )
    arguments.update(
        grad_out=grad_out,
        grad_strides=grad_out.stride()[:3],
        lse_log2=lse_log2,
        delta=delta,
        lse_stride=stride,
        drop_scale=drop_scale(inputs.dropout_p),
    )
    return arguments


def _launch_backward_dkv(arguments: dict[str, Any], scale: float, dk: Tensor | None, dv: Tensor | None) -> None:
    config = tile_config("backward_dkv", arguments)
    key_blocks = triton.cdiv(arguments["patch_count"] + 1, config.block_n)
    grid = (arguments["batch_size"] * key_blocks * arguments["head_count"],)
    backward_dkv.backward_dkv_kernel[grid](**arguments, **_tile(config), grad_key=dk, grad_value=dv, scale=scale)


def _launch_backward_dq(arguments: dict[str, Any], scale: float, dq: Tensor) -> None:
    config = tile_config("backward_dq", arguments)
    query_blocks = triton.cdiv(arguments["patch_count"] + 1, config.block_m)
    grid = (arguments["batch_size"] * query_blocks * arguments["head_count"],)
    backward_dq.backward_dq_kernel[grid](**arguments, **_tile(config), grad_query=dq, scale=scale)


def _launch_backward_dbias(arguments: dict[str, Any], dtable: Tensor) -> None:
    """Score gradients summed over the batch, some heads or rows at a time, each then summed along diagonals."""
    config = tile_config("backward_dbias", arguments)
    batch, patches, heads = arguments["batch_size"], arguments["patch_count"], arguments["head_count"]
    plan = configs.plan_backward_dbias(batch, patches, heads, config, num_sms_of(dtable))
    stride = configs.scratch_stride(patches)
    scratch = torch.empty((plan.num_splits, plan.heads, plan.rows, stride), dtype=torch.float32, device=dtable.device)
    total = dtable if dtable.dtype == torch.float32 else torch.empty_like(dtable, dtype=torch.float32)
    cls_column = _launch_dbias_cls_column(arguments)
    for head_start in range(0, heads, plan.heads):
        chunk_heads = min(plan.heads, heads - head_start)
        for row_start in range(0, patches + 1, plan.rows):
            part = {
                "chunk_heads": chunk_heads,
                "head_start": head_start,
                "row_start": row_start,
                "row_end": min(row_start + plan.rows, patches + 1),
                "scratch_stride": stride,
                "scratch": scratch,
            }
            _launch_dbias(arguments, config, part, triton.cdiv(batch, plan.num_splits), plan.num_splits)
            _launch_dtable_patches(arguments, part, plan.num_splits, total)
        backward_dbias.dtable_cls_kernel[(chunk_heads,)](
            **part,
            cls_column=cls_column,
            grad_table=total,
            table_row=dtable.shape[0] - 3,
            num_splits=plan.num_splits,
            batch_size=batch,
            patch_count=patches,
            head_count=heads,
            BLOCK=configs.CLS_BLOCK,
        )
    if total is not dtable:
        dtable.copy_(total)


def _launch_dbias(
    arguments: dict[str, Any], config: configs.TileConfig, part: dict[str, Any], batches: int, splits: int
) -> None:
    """Fill the scratch with one part's score gradients."""
    key_blocks = triton.cdiv(arguments["patch_count"], config.block_n)
    query_blocks = triton.cdiv(part["row_end"] - part["row_start"], config.block_m)
    backward_dbias.backward_dbias_kernel[(key_blocks * query_blocks * part["chunk_heads"] * splits,)](
        **arguments, **part, **_tile(config), batches_per_split=batches
    )


def _launch_dtable_patches(arguments: dict[str, Any], part: dict[str, Any], splits: int, total: Tensor) -> None:
    """Sum one part's scratch along diagonals into the patch rows of the table."""
    height, width = arguments["window_height"], arguments["window_width"]
    programs = triton.cdiv(2 * width - 1, configs.DIAGONAL_BLOCK_DIFFERENCES) * (2 * height - 1) * part["chunk_heads"]
    backward_dbias.dtable_patches_kernel[(programs,)](
        **part,
        grad_table=total,
        accumulate=int(part["row_start"] > 0),
        num_splits=splits,
        head_count=arguments["head_count"],
        window_height=height,
        window_width=width,
        BLOCK_P=configs.DIAGONAL_BLOCK_PATCHES,
        BLOCK_V=configs.DIAGONAL_BLOCK_DIFFERENCES,
    )


def _launch_dbias_cls_column(arguments: dict[str, Any]) -> Tensor:
    """`[B, H, N]` fp32: the gradient of every query's score with the CLS key, CLS as query last."""
    batch, tokens, heads = arguments["batch_size"], arguments["patch_count"] + 1, arguments["head_count"]
    column = torch.empty((batch, heads, tokens), dtype=torch.float32, device=arguments["query"].device)
    kernel = backward_dbias.dbias_cls_column_kernel
    taken = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    grid = (batch * triton.cdiv(tokens, configs.PREPROCESS_BLOCK) * heads,)
    kernel[grid](**taken, cls_column=column, BLOCK_M=configs.PREPROCESS_BLOCK)
    return column


def _gradient_like(tensor: Tensor, wanted: bool) -> Tensor:
    return torch.empty(tensor.shape if wanted else 0, dtype=tensor.dtype, device=tensor.device)


def _tile(config: configs.TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
