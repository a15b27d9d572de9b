"""The operators `torch.ops.beit_fast.*`: schemas, fakes, devices, autograd, autocast and vmap. Torch only.

`rel_pos_attention` is attention with BEiT's relative position bias (arXiv 2106.08254) read from its table:
`softmax(scale * q k^T + bias) v`, with the log-sum-exp of every row beside it for the backward pass.
`patch_embed` turns pixels into tokens: patches, projection, mask tokens, CLS and position embeddings.

Both are opaque to `torch.compile` and `torch.export`. CUDA runs Triton's attention and `_C_cuda`'s patch embedding,
which are imported and loaded at the first call. CPU runs the kernels of `_C`, the composites where that was not built,
or Triton's interpreter where `TRITON_INTERPRET=1` was set before this import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..position_bias import Window
from .dispatch import availability
from .fallback import attention, patch_embed
from .validation import check_attention, check_attention_backward, check_patch_embed

library = torch.library.Library("beit_fast", "FRAGMENT")

SCHEMAS = (
    "rel_pos_attention(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? key_mask, SymInt[2] window, "
    "float scale, float dropout_p=0., SymInt seed=0) -> (Tensor out, Tensor lse)",
    "rel_pos_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? key_mask, "
    "Tensor out, Tensor lse, SymInt[2] window, float scale, float dropout_p, SymInt seed, bool[4] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "patch_embed(Tensor pixels, Tensor weight, Tensor? bias, Tensor? cls, Tensor? mask, Tensor? mask_token, "
    "Tensor? pos, float[]? mean, float[]? std) -> Tensor",
    "_patch_embed_cuda(Tensor pixels, Tensor weight, Tensor? bias, Tensor? cls, Tensor? mask, Tensor? mask_token, "
    "Tensor? pos, float[]? mean, float[]? std, bool allow_tf32) -> Tensor",
)
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

attention_op = torch.ops.beit_fast.rel_pos_attention.default
attention_backward_op = torch.ops.beit_fast.rel_pos_attention_backward.default
patch_embed_op = torch.ops.beit_fast.patch_embed.default


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, table, key_mask, window, dropout_p, seed)
    return attention.attention_forward(q, k, v, table, key_mask, window, scale, dropout_p, seed)


def _attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention_backward(*args)
    return attention.attention_backward(*args)


def _attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, table, key_mask, window, dropout_p, seed, refusals=_triton_refusals(q))
    from ..kernels.attention import launch

    return launch.attention_forward(q, k, v, table, key_mask, window, scale, dropout_p, seed)


def _attention_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention_backward(*args, refusals=_triton_refusals(args[1]))
    from ..kernels.attention import launch

    return launch.attention_backward(*args)


def _triton_refusals(q: Tensor) -> tuple[str, ...]:
    kernel = "triton/cuda" if q.is_cuda else "triton/interpreter"
    return availability.kernel_refusals(kernel, q.device, q.dtype, q.shape[-1] if q.ndim else 0)


def _patch_embed(*arguments: Any) -> Tensor:
    check_patch_embed(*arguments)
    return patch_embed.patch_embed(*arguments)


def _patch_embed_cuda(*arguments: Any) -> Tensor:
    check_patch_embed(*arguments)
    pixels, weight, bias, cls, _, mask_token, pos, mean, std = arguments
    tensors = (weight, bias, cls, mask_token, pos, None if pixels.dtype == torch.uint8 else pixels)
    dtypes = [x.dtype for x in tensors if x is not None]
    normalized = 0 if mean is None and std is None else pixels.shape[1]
    kernel = availability.patch_embed_kernel(pixels.device, dtypes, normalized)
    if kernel == "fused/cuda" and native.load("_C_cuda"):
        allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return torch.ops.beit_fast._patch_embed_cuda.default(*arguments, allow_tf32)
    return patch_embed.patch_embed(*arguments)


# CompositeExplicitAutograd rather than CPU: the native library adds CPU kernels without overriding anything.
library.impl("rel_pos_attention", _attention, "CompositeExplicitAutograd")
library.impl("rel_pos_attention_backward", _attention_backward, "CompositeExplicitAutograd")
library.impl("patch_embed", _patch_embed, "CompositeExplicitAutograd")
for _key in ("CUDA", "CPU") if availability.INTERPRETED else ("CUDA",):
    library.impl("rel_pos_attention", _attention_triton, _key)
    library.impl("rel_pos_attention_backward", _attention_backward_triton, _key)
library.impl("patch_embed", _patch_embed_cuda, "CUDA")
native.load("_C")


@torch.library.register_fake("beit_fast::rel_pos_attention", lib=library)
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, table, key_mask, window, dropout_p, seed)
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=lse_dtype)


@torch.library.register_fake("beit_fast::rel_pos_attention_backward", lib=library)
def _attention_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    dropout_p: float,
    seed: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention_backward(grad_out, q, k, v, table, key_mask, out, lse, window, scale, dropout_p, seed, output_mask)
    inputs = (q, k, v, table)
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape if needed else 0)
        for x, needed in zip(inputs, output_mask, strict=True)
    )  # type: ignore[return-value]


@torch.library.register_fake("beit_fast::patch_embed", lib=library)
def _patch_embed_fake(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls: Tensor | None,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    check_patch_embed(pixels, weight, bias, cls, mask, mask_token, pos, mean, std)
    patches = (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    dtype = weight.dtype
    for other in (mask_token, cls, pos):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return weight.new_empty(pixels.shape[0], patches + (cls is not None), weight.shape[0], dtype=dtype)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.dropout_p, ctx.seed = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def attention_grad(
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    backward: Callable[..., Any] = attention_backward_op,
) -> tuple[Tensor | None, ...]:
    needed = [bool(flag) for flag in ctx.needs_input_grad[:4]]
    if grad_out is None or not any(needed):
        return (None,) * 9
    q, k, v, table, key_mask, out, lse = ctx.saved_tensors
    grads = backward(
        grad_out, q, k, v, table, key_mask, out, lse, ctx.window, ctx.scale, ctx.dropout_p, ctx.seed, needed
    )
    return (*(grad if flag else None for grad, flag in zip(grads, needed, strict=True)), *(None,) * 5)


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::rel_pos_attention has no second derivative; use attn_implementation='eager' for double backward"
    )


torch.library.register_autograd(
    "beit_fast::rel_pos_attention", attention_grad, setup_context=save_attention, lib=library
)
torch.library.register_autograd("beit_fast::rel_pos_attention_backward", refuse_double_backward, lib=library)


def save_patch_embed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(*tensors)


def patch_embed_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pixels, weight, *optional = ctx.saved_tensors
    return patch_embed.patch_embed_backward(grad, pixels, weight, optional, ctx.mean, ctx.std, ctx.needs_input_grad)


torch.library.register_autograd("beit_fast::patch_embed", patch_embed_grad, setup_context=save_patch_embed, lib=library)
