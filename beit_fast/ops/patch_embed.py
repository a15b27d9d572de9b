"""`beit_fast::patch_embed`: pixels to tokens, with mask tokens, CLS and position embeddings.

CUDA runs the kernel of `_C_cuda`, which is loaded at the first call. CPU runs the kernels of `_C`. The fallback serves
if these were not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from .arguments import PATCH_EMBED, PATCH_EMBED_CUDA, PatchEmbedArguments
from .dispatch import availability
from .fallback import patch_embed as fallback
from .functorch import autograd_function, raise_on_forward_mode, transforms_are_active
from .library import Autograd, Kernel, call_op, library, register_op
from .transforms import cast_first, fold, map_entries, unfold
from .validation import patch_embed_errors


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
    """Embed pixels as tokens: normalize, project patches, insert mask tokens, CLS and positions.

    Args:
        pixels: `[B, C, H, W]`, uint8 or floating point, any strides; incomplete patches are cropped.
        weight: `[E, C, ph, pw]`, the weight of a convolution with stride = kernel = patch size.
        bias, cls, mask_token: E numbers each. Like weight and pos float16, bfloat16, float32 or float64.
        mask: bool `[B, P]`, True where the patch is replaced by `mask_token`.
        pos: `[1, 1 + P, E]`, or `[1, P, E]` without `cls`.
        mean, std: one number per channel in the units of the pixels (0 to 255 for uint8): `(pixels - mean) / std`.
            uint8 needs both; for floating-point pixels each may be omitted, which means 0 and 1.

    Returns:
        `[B, 1 + P, E]`, or `[B, P, E]` without `cls`, in the widest dtype of weight, cls, mask_token and pos.

    Raises:
        TypeError: If arguments have a wrong type; the error lists all of them.
        ValueError: If shapes, dtypes or devices do not fit; the error lists every reason.
    """
    raise_on_forward_mode(pixels, weight, bias, cls, mask_token, pos)
    arguments = PatchEmbedArguments(pixels, weight, bias, cls, mask, mask_token, pos, mean, std)
    op = _PatchEmbed.apply if transforms_are_active() else patch_embed_op
    return call_op(op, "patch_embed", arguments, patch_embed_errors)


def _run_cuda(arguments: PatchEmbedArguments) -> Tensor:
    """Run the kernel of `_C_cuda` if it can serve, else the fallback."""
    pixels, weight, bias, cls, _, mask_token, pos, mean, std = arguments
    tensors = (weight, bias, cls, mask_token, pos, None if pixels.dtype == torch.uint8 else pixels)
    dtypes = [x.dtype for x in tensors if x is not None]
    normalized = 0 if mean is None and std is None else pixels.shape[1]
    kernel = availability.patch_embed_kernel(pixels.device, dtypes, normalized)
    if kernel == "cuda" and native.load("_C_cuda"):
        allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return torch.ops.beit_fast._patch_embed_cuda.default(*arguments, allow_tf32)
    return fallback.patch_embed(arguments)


def _fake(arguments: PatchEmbedArguments) -> Tensor:
    pixels, weight, cls = arguments.pixels, arguments.weight, arguments.cls
    patches = (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    dtype = weight.dtype
    for other in (arguments.mask_token, cls, arguments.pos):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return weight.new_empty(pixels.shape[0], patches + (cls is not None), weight.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = PatchEmbedArguments._make((*ctx.saved_tensors, ctx.mean, ctx.std))
    return fallback.patch_embed_backward(grad, arguments, ctx.needs_input_grad)


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    given, dims = PatchEmbedArguments(*args), PatchEmbedArguments(*in_dims)
    parameters = (dims.weight, dims.bias, dims.cls, dims.mask_token, dims.pos)
    if any(dim is not None for dim in parameters):
        return map_entries(patch_embed_op, size, in_dims, args)
    folded = {name: fold(getattr(given, name), getattr(dims, name), size) for name in ("pixels", "mask")}
    return unfold(patch_embed_op(*given._replace(**folded)), size), 0


library.define(PATCH_EMBED_CUDA, tags=(torch.Tag.pt2_compliant_tag,))  # `_C_cuda` has its kernel
patch_embed_op = register_op(
    PATCH_EMBED,
    PatchEmbedArguments,
    errors=patch_embed_errors,
    fallback=Kernel(fallback.patch_embed),
    cuda=Kernel(_run_cuda),
    fake=_fake,
    autograd=Autograd(_backward, _setup_context),
    vmap=_vmap,
    autocast=cast_first(3),  # pixels, weight and bias as autocast casts a convolution; positions stay
)
_PatchEmbed = autograd_function("PatchEmbed", patch_embed_op, Autograd(_backward, _setup_context))
