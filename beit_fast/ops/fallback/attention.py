"""Fallback of attention with relative position bias: PyTorch operations for CPU tensors without a native kernel.

Arithmetic is fp32 (fp64 for fp64 inputs) for any input dtype. One sample and a few heads are computed at a time. The
temporary memory is therefore at most 2**20 scores at a time, or the scores of one head if these are more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import native
from ...position_bias import gather_bias, reduce_bias, relative_position_index
from ..arguments import AttentionArguments, AttentionBackwardArguments

_GROUP_ELEMENTS = 2**20


def attention_forward(arguments: AttentionArguments) -> tuple[Tensor, Tensor]:
    """`beit_fast::rel_pos_attention`: see `beit_fast.rel_pos_attention` for shapes and meaning."""
    q, k, v, table, key_mask, window, scale, dropout_p, seed = arguments
    if q.device.type == "cpu":
        native.warn_of_missing_kernels()
    _resolve_vector_math()
    batch, tokens, heads, _ = q.shape
    compute = _compute_dtype(q)
    out = q.new_empty(q.shape)  # [B, N, H, D]
    lse = q.new_empty(batch, heads, tokens, dtype=compute)
    index = None if table is None else relative_position_index(window, table.device)
    for group in _head_groups(heads, tokens):
        bias = None if table is None else gather_bias(table[:, group].to(compute), window, index)  # [G, N, N]
        for sample in range(batch):
            query, key, value = (_heads_first(x[sample, :, group], compute) for x in (q, k, v))  # [G, N, D]
            scores = _scores(query, key, bias, None if key_mask is None else key_mask[sample], scale)
            highest = scores.amax(-1, keepdim=True)
            highest = highest.masked_fill(highest == float("-inf"), 0.0)
            weights = scores.sub_(highest).exp_()  # [G, N, N], not yet normalized
            total = weights.sum(-1, keepdim=True)
            lse[sample, group] = (highest + total.log()).squeeze(-1)
            if dropout_p > 0:
                weights.mul_(_dropout_factor(seed, dropout_p, sample * heads + group.start, weights))
            mixed = torch.bmm(weights, value).div_(total.masked_fill(total == 0, 1.0))
            out[sample, :, group] = mixed.transpose(0, 1)
    return out, lse


def attention_backward(arguments: AttentionBackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and table; those that are not needed are returned as empty tensors."""
    grad_out, q, k, v, table, key_mask, out, lse, window, scale, dropout_p, seed, output_mask = arguments
    _resolve_vector_math()
    need_q, need_k, need_v, need_table = output_mask
    batch, tokens, heads, _ = q.shape
    compute = _compute_dtype(q)
    grad_q, grad_k, grad_v = (q.new_empty(q.shape if needed else 0) for needed in output_mask[:3])
    grad_table = q.new_empty(0) if table is None else table.new_empty(table.shape if need_table else 0)
    index = None if table is None else relative_position_index(window, table.device)
    for group in _head_groups(heads, tokens):
        bias = None if table is None else gather_bias(table[:, group].to(compute), window, index)  # [G, N, N]
        grad_bias = torch.zeros_like(bias) if need_table and bias is not None else None
        for sample in range(batch):
            query, key, value, grad, mixed = (
                _heads_first(x[sample, :, group], compute) for x in (q, k, v, grad_out, out)
            )
            weights = _scores(query, key, bias, None if key_mask is None else key_mask[sample], scale)
            row_lse = lse[sample, group].unsqueeze(-1)
            weights.sub_(row_lse.masked_fill(row_lse == float("-inf"), 0.0)).exp_()  # [G, N, N]
            grad_weights = torch.bmm(grad, value.transpose(1, 2))
            kept_weights = weights
            if dropout_p > 0:
                factor = _dropout_factor(seed, dropout_p, sample * heads + group.start, weights)
                kept_weights, grad_weights = weights * factor, grad_weights.mul_(factor)
            if need_v:
                grad_v[sample, :, group] = torch.bmm(kept_weights.transpose(1, 2), grad).transpose(0, 1)
            delta = (grad * mixed).sum(-1, keepdim=True)
            grad_scores = weights.mul_(grad_weights.sub_(delta))
            if need_q:
                grad_q[sample, :, group] = torch.bmm(grad_scores, key).mul_(scale).transpose(0, 1)
            if need_k:
                grad_k[sample, :, group] = torch.bmm(grad_scores.transpose(1, 2), query).mul_(scale).transpose(0, 1)
            if grad_bias is not None:
                grad_bias += grad_scores
        if grad_bias is not None:
            grad_table[:, group] = reduce_bias(grad_bias, window).to(grad_table.dtype)
    return grad_q, grad_k, grad_v, grad_table


@functools.cache
def _resolve_vector_math() -> None:
    """Call exp and log once on a single element, in one thread.

    oneMKL selects the kernel of such a function at its first call. If several threads make that call together, one of
    them may run a low-precision kernel, once (pytorch/pytorch#188792).
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        one.exp()
        one.log()


def _head_groups(heads: int, tokens: int) -> list[slice]:
    """Group the heads to limit the size of their scores.

    The `[G, N, N]` scores of a group are about as large as a core's cache.
    """
    size = max(1, min(heads, _GROUP_ELEMENTS // (tokens * tokens)))
    return [slice(start, min(start + size, heads)) for start in range(0, heads, size)]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _heads_first(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.transpose(0, 1).to(dtype)  # [H, N, D]


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """Compute the masked scores `scale * query @ key^T + bias`.

    They are minus infinity at masked keys. The result is a new `[H, N, N]`.
    """
    if bias is None:
        scores = torch.bmm(query * scale, key.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    return scores if key_mask is None else scores.masked_fill_(~key_mask, float("-inf"))


def _dropout_factor(seed: int, dropout_p: float, first_plane: int, like: Tensor) -> Tensor:
    """Compute the dropout factor of each attention weight, `[G, N, N]`.

    It is `1 / (1 - p)` if the weight is kept and 0 if it is dropped. Planes count `b * H + h`.
    """
    heads, queries, keys = like.shape
    planes = torch.arange(first_plane, first_plane + heads, device=like.device)
    counter = torch.meshgrid(
        planes,
        torch.arange(queries, device=like.device),
        torch.arange(keys, device=like.device),
        indexing="ij",
    )
    word = _philox_first_word(seed, counter[1], counter[2], counter[0])
    return ((word >> 1) >= int(dropout_p * 2**31)).to(like.dtype) / (1 - dropout_p)


def _philox_first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word of Philox4x32-10 for counter (c0, c1, c2, 0).

    The result is int64 in `[0, 2^32)` (Salmon et al., SC 2011).
    """
    low = 0xFFFFFFFF
    c3 = torch.zeros_like(c0)
    key_low, key_high = seed & low, (seed >> 32) & low
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & low) ^ c1 ^ key_low, second & low
        c2, c3 = ((first >> 32) & low) ^ c3 ^ key_high, first & low
        key_low, key_high = (key_low + 0x9E3779B9) & low, (key_high + 0xBB67AE85) & low
    return c0
