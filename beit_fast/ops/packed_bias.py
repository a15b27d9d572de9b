"""Triton attention with a packed bias, for inference. The bias is packed once and reused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..position_bias import Window


def pack_bias(table: Tensor | None, window: Window, scale: float, heads_like: Tensor) -> Any:
    """Pack a bias table as the forward kernel reads it.

    The result copies the table; rebuild it after the table changes.

    Args:
        table: `[(2 * height - 1) * (2 * width - 1) + 3, H]` in any float dtype, or None for no bias.
        window: `(height, width)` in patches.
        scale: positive factor of `q k^T`.
        heads_like: a tensor with the shape `[B, N, H, D]`, dtype and device of the later q, k and v.
    """
    from ..kernels.attention import launch

    return launch.forward_bias(table, window, scale, heads_like)


def packed_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    scale: float,
    packed_bias: Any,
) -> Tensor:
    """Compute attention `[B, N, H, D]` with a packed bias.

    `packed_bias` is the result of `pack_bias`. Gradients and dropout are not supported.
    """
    from ..kernels.attention import launch

    return launch.attention_forward(q, k, v, table, key_mask, window, scale, 0.0, 0, bias=packed_bias)[0]
