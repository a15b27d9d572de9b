"""The operators as functions for people: defaults, refusals and `torch.func` transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..position_bias import Window
from . import attention
from .linear_gelu import linear_gelu_op
from .validation import raise_problems, tensor_problems


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Attention with a learned 2-D relative position bias, `softmax(scale * q k^T + bias) v`.

    Args:
        q, k, v: `[B, N, H, D]`, one dtype, any strides; slices of one packed projection go in without a copy.
        table: bias table `[(2 * height - 1) * (2 * width - 1) + 3, H]` in any float dtype, or None for no bias.
        window: `(height, width)` in patches, with `N = height * width + 1`; needed with a table.
        key_mask: bool `[B, N]`, True where a key may be attended to. A query left with no key gives zeros.
        scale: factor of `q k^T`; `D ** -0.5` if None.
        dropout_p: probability of dropping an attention weight, in `[0, 1)`.
        seed: chooses the dropped weights, the same ones in the backward pass, in `[0, 2**63)`.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of q. Arithmetic is fp32 (fp64 for fp64 inputs, on CPU).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no kernel serves them here; every reason is listed.
        RuntimeError: forward-mode or double differentiation, which the operator does not have.
    """
    if table is not None and window is None:
        problems = [*tensor_problems(q, k, v, table, key_mask), "a table needs window=(height, width)"]
        raise_problems("rel_pos_attention", problems, q=q, k=k, v=v, table=table, key_mask=key_mask)
    refuse_forward_mode(q, k, v, table)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.ndim == 4 and q.shape[-1] != 0 else 1.0  # any other q is refused
    window = (1, 1) if window is None else window
    if torch.jit.is_tracing():  # sizes are tensors there, and an operator's integers must be constants
        window = (int(window[0]), int(window[1]))
    arguments = (q, k, v, table, key_mask, window, scale, dropout_p, seed)
    if transforms_are_active():
        return RelPosAttention.apply(*arguments)[0]
    return attention.attention_op(*arguments)[0]


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cls: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pos: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Pixels to tokens in one operator: normalise, project patches, put in mask tokens, CLS and positions.

    Args:
        pixels: `[B, C, H, W]`, uint8 or floating point, any strides; what does not fill a patch is cropped.
        weight: `[E, C, ph, pw]`, the weight of a convolution with stride = kernel = patch size.
        bias, cls, mask_token: E numbers each. Like weight and pos float16, bfloat16, float32 or float64.
        mask: bool `[B, P]`, True where the patch is replaced by `mask_token`.
        pos: `[1, 1 + P, E]`, or `[1, P, E]` without `cls`.
        mean, std: one number a channel in the units of the pixels (0 to 255 for uint8): `(pixels - mean) / std`. uint8
            needs both; for floating-point pixels each may be left out, as 0 and 1.

    Returns:
        `[B, 1 + P, E]`, or `[B, P, E]` without `cls`, in the widest dtype of weight, cls, mask_token and pos.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; every reason is listed.
    """
    refuse_forward_mode(pixels, weight, bias, cls, mask_token, pos)
    arguments = (pixels, weight, bias, cls, mask, mask_token, pos, mean, std)
    if transforms_are_active():
        return PatchEmbed.apply(*arguments)
    return attention.patch_embed_op(*arguments)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(x @ weight.T + bias)` with the exact GELU, for inference.

    Args:
        x: `[..., inputs]`, any strides.
        weight: `[outputs, inputs]` in the dtype of x, any strides.
        bias: `[outputs]` in the dtype of x, or None.

    Returns:
        `[..., outputs]`, contiguous, in the dtype of x. On CUDA sums and GELU are fp32 and rounded once; products of
        fp32 follow `torch.backends.cuda.matmul.fp32_precision`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no kernel serves them here; every reason is listed.
        RuntimeError: a derivative is asked for, backward or forward.
    """
    refuse_forward_mode(x, weight, bias)
    return linear_gelu_op(x, weight, bias)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """RuntimeError where a tensor has a tangent, which the operators would lose without a word."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(x is not None and unpack(x).tangent is not None for x in tensors):
        raise RuntimeError("beit_fast operators have no forward-mode derivative; use attn_implementation='eager'")


def transforms_are_active() -> bool:
    """Whether a `torch.func` transform or `torch.vmap` is running, outside `torch.compile`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class RelPosAttention(torch.autograd.Function):
    """`beit_fast::rel_pos_attention` under `torch.func`, which refuses what `register_autograd` makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return attention.attention_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        attention.save_attention(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return attention.attention_grad(ctx, grad_out, grad_lse, RelPosAttentionBackward.apply)


class RelPosAttentionBackward(torch.autograd.Function):
    """`beit_fast::rel_pos_attention_backward`, which has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return attention.attention_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        attention.refuse_double_backward(ctx, *grads)


class PatchEmbed(torch.autograd.Function):
    """`beit_fast::patch_embed`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return attention.patch_embed_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        attention.save_patch_embed(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return attention.patch_embed_grad(ctx, grad)
