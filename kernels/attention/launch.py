"""Launches the attention kernels: on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1.

The caller has validated shapes, dtypes and devices.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import backward, configs, forward

BIAS_SCRATCH_BYTES = 2**28


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

    Returns:
        out `[B, N, H, D]` contiguous in q's dtype, and lse `[B, H, N]` fp32, the natural log-sum-exp of the
        scores. A query with no key to attend to gets 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with _device_of(q):
        arguments = _score_arguments(q, k, v, table, key_mask, window, scale, dropout_p, seed)
        config = _config("forward", q)
        grid = (batch * triton.cdiv(tokens, config.block_m) * heads,)
        forward.attention_forward_kernel[grid](**arguments, **_tile(config), out=out, lse=lse)
    return out, lse


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

    with _device_of(q):
        arguments = _score_arguments(q, k, v, table, key_mask, window, scale, dropout_p, seed)
        grad_out = _unit_stride(grad_out)
        arguments.update(grad_out=grad_out, grad_strides=grad_out.stride()[:3], lse=lse.contiguous(), delta=None)
        if want_q or want_k or want_table:
            arguments["delta"] = _delta(grad_out, out, lse, arguments)
        if want_k or want_v:
            _launch_key_value_gradient(arguments, scale, dk if want_k else None, dv if want_v else None)
        if want_q:
            _launch_query_gradient(arguments, scale, dq)
        if want_table:
            _launch_table_gradient(arguments, dtable, window)
    return dq, dk, dv, dtable


def _score_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: tuple[int, int],
    scale: float,
    dropout_p: float,
    seed: int,
) -> dict[str, Any]:
    """The kernel arguments that the forward and the score-recomputing backward kernels share, by name."""
    batch, tokens, heads, head_dim = q.shape
    height, width = window if table is not None else (1, 1)
    span = _span(height, width)
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    on_cpu = q.device.type == "cpu"
    return {
        "query": q,
        "key": k,
        "value": v,
        "bias_table": None if table is None else _expand_table(table, span),
        "key_mask": key_mask,
        "query_strides": q.stride()[:3],
        "key_strides": k.stride()[:3],
        "value_strides": v.stride()[:3],
        "mask_strides": (0, 0) if key_mask is None else key_mask.stride(),
        "batch_size": batch,
        "token_count": tokens,
        "head_count": heads,
        "window_width": width,
        "span": span,
        "scale_log2": scale * math.log2(math.e),
        "drop_threshold": min(int(dropout_p * 2**31), 2**31 - 1),
        "drop_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "seed_low": _signed_word(seed),
        "seed_high": _signed_word(seed >> 32),
        "HEAD_DIM": head_dim,
        "BLOCK_D": configs.padded_head_dim(head_dim),
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": _dot_precision(q),
        "UPCAST": on_cpu and q.dtype != torch.float32,
    }


def _expand_table(table: Tensor, span: int) -> Tensor:
    """The extended table `[H, 5 * span + 4]` fp32, times log2(e)."""
    heads, size = table.shape[1], 5 * span + 4
    extended = torch.empty((heads, size), dtype=torch.float32, device=table.device)
    grid = (heads * triton.cdiv(size, configs.EXPAND_BLOCK),)
    forward.expand_table_kernel[grid](table, extended, table.stride(), span, BLOCK=configs.EXPAND_BLOCK)
    return extended


def _delta(grad_out: Tensor, out: Tensor, lse: Tensor, arguments: dict[str, Any]) -> Tensor:
    """rowsum(grad_out * out), `[B, H, N]` fp32."""
    batch, tokens, heads, head_dim = grad_out.shape
    out = _unit_stride(out)
    delta = torch.empty_like(lse)
    backward.delta_kernel[(batch * triton.cdiv(tokens, configs.DELTA_BLOCK) * heads,)](
        grad_out,
        out,
        delta,
        grad_out.stride()[:3],
        out.stride()[:3],
        batch,
        tokens,
        heads,
        HEAD_DIM=head_dim,
        BLOCK_D=arguments["BLOCK_D"],
        BLOCK_M=configs.DELTA_BLOCK,
    )
    return delta


def _launch_key_value_gradient(arguments: dict[str, Any], scale: float, dk: Tensor | None, dv: Tensor | None) -> None:
    config = _config("key_value_gradient", arguments["query"])
    key_blocks = triton.cdiv(arguments["token_count"], config.block_n)
    grid = (arguments["batch_size"] * key_blocks * arguments["head_count"],)
    backward.key_value_gradient_kernel[grid](
        **arguments,
        **_tile(config),
        grad_key=dk,
        grad_value=dv,
        scale=scale,
        COMPUTE_KEY=dk is not None,
        COMPUTE_VALUE=dv is not None,
    )


def _launch_query_gradient(arguments: dict[str, Any], scale: float, dq: Tensor) -> None:
    config = _config("query_gradient", arguments["query"])
    query_blocks = triton.cdiv(arguments["token_count"], config.block_m)
    grid = (arguments["batch_size"] * query_blocks * arguments["head_count"],)
    backward.query_gradient_kernel[grid](**arguments, **_tile(config), grad_query=dq, scale=scale)


def _launch_table_gradient(arguments: dict[str, Any], dtable: Tensor, window: tuple[int, int]) -> None:
    """Score gradients summed over the batch into a scratch of some heads at a time, then along diagonals."""
    config = _config("bias_gradient", arguments["query"])
    tokens, heads, span = arguments["token_count"], arguments["head_count"], arguments["span"]
    height, width = window
    chunk = max(1, min(heads, BIAS_SCRATCH_BYTES // (4 * tokens * tokens)))
    scratch = torch.empty((chunk, tokens, tokens), dtype=torch.float32, device=dtable.device)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(tokens, config.block_n)
    difference_blocks = triton.cdiv(2 * width - 1, configs.DIAGONAL_BLOCK_DIFFERENCES) * (2 * height - 1)
    for start in range(0, heads, chunk):
        count = min(chunk, heads - start)
        backward.bias_gradient_kernel[(tiles * count,)](
            **arguments, **_tile(config), grad_bias=scratch, head_start=start
        )
        backward.patch_rows_gradient_kernel[(difference_blocks * count,)](
            scratch,
            dtable,
            start,
            heads,
            height,
            width,
            BLOCK_P=configs.DIAGONAL_BLOCK_PATCHES,
            BLOCK_V=configs.DIAGONAL_BLOCK_DIFFERENCES,
        )
        backward.cls_rows_gradient_kernel[(count,)](
            scratch, dtable, start, tokens, heads, span, BLOCK=configs.CLS_BLOCK
        )


def _span(height: int, width: int) -> int:
    """Half of the number of patch rows of the table, rounded down."""
    return ((2 * height - 1) * (2 * width - 1) - 1) // 2


def _signed_word(value: int) -> int:
    """The low 32 bits as a signed integer, so that Triton sees an int32 whatever the seed is."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _gradient_like(tensor: Tensor, wanted: bool) -> Tensor:
    return torch.empty(tensor.shape if wanted else 0, dtype=tensor.dtype, device=tensor.device)


def _dot_precision(q: Tensor) -> str:
    """tf32 only where torch's own fp32 matrix products on CUDA may use it."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def _config(kernel: str, q: Tensor) -> configs.TileConfig:
    architecture = _architecture(q.device.index) if q.is_cuda else configs.INTERPRETER
    return configs.select(kernel, architecture, configs.padded_head_dim(q.shape[-1]), q.element_size())


@functools.cache
def _architecture(device_index: int) -> str:
    if torch.version.hip is not None:
        return configs.SMALL
    return configs.architecture_class(*torch.cuda.get_device_capability(device_index))


def _tile(config: configs.TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
