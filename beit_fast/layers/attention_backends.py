"""The attention backends: eager, SDPA and the fused operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import rel_pos_attention
from ..position_bias import Window, gather_bias


def run_attention(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Run attention by a resolved backend; shapes as in `beit_fast.rel_pos_attention`.

    Dropout draws from the CPU generator of torch (`"triton"`) or from that of the device (`"eager"`, `"sdpa"`).

    Args:
        backend: `"eager"`, `"sdpa"` or `"triton"`.
        bias: The dense bias `[H, N, N]` of `table` if the caller has it. `"triton"` does not read it.
    """
    if backend == "triton":
        seed = int(torch.randint(2**62, ()).item()) if dropout_p > 0 else 0
        return rel_pos_attention(q, k, v, table, window, key_mask, scale, dropout_p, seed)
    if bias is None and table is not None and window is not None:
        bias = dense_bias(table, window)
    if backend == "sdpa":
        return _sdpa(q, k, v, bias, key_mask, scale, dropout_p)
    return eager_attention(q, k, v, bias, key_mask, scale, dropout_p)[0]


def dense_bias(table: Tensor, window: Window) -> Tensor:
    """Gather the bias `[H, N, N]` in at least fp32. Its gradient is then summed in fp32."""
    return gather_bias(table.to(torch.promote_types(table.dtype, torch.float32)), window)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute attention and its weights with PyTorch operations.

    Products run in the dtype of q, softmax in fp32 (fp64 for fp64 inputs).

    Args:
        bias: The dense bias `[H, N, N]`, or None.

    Returns:
        The output `[B, N, H, D]`, and the weights `[B, H, N, N]` after softmax and dropout.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [B, H, N, N]
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~_non_empty(key_mask)[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)  # [1, H, N, N]
    if key_mask is not None:
        allowed = _non_empty(key_mask)[:, None, None, :]
        mask = allowed if mask is None else mask.masked_fill(~allowed, float("-inf"))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if key_mask is not None:
        out = out.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)
    out = out.transpose(1, 2)
    if torch.compiler.is_exporting():  # the graph needs a copy: a decomposition of SDPA may have other strides
        return out.clone(memory_format=torch.contiguous_format)
    return out.contiguous()


def _non_empty(key_mask: Tensor) -> Tensor:
    """Set the mask of samples without any key to True: softmax stays finite, and their output is zeroed later."""
    return key_mask | ~key_mask.any(-1, keepdim=True)
