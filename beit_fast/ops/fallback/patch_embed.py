"""Fallback of patch embedding in PyTorch operations. Its backward pass serves every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ..arguments import PatchEmbedArguments


def patch_embed(arguments: PatchEmbedArguments) -> Tensor:
    """`beit_fast::patch_embed`: see `beit_fast.patch_embed` for shapes and meaning."""
    pixels, weight, bias, cls, mask, mask_token, pos, mean, std = arguments
    native.check_variables(pixels.device.type)
    patches = extract_patches(normalize_pixels(pixels, mean, std, weight.dtype), weight.shape[2:])
    bias = None if bias is None else bias.reshape(-1).to(weight.dtype)
    tokens = F.linear(patches, weight.flatten(1), bias)  # [B, P, E]
    if mask is not None and mask_token is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token.reshape(1, 1, -1), tokens)
    if cls is not None:
        first = cls.reshape(1, 1, -1).expand(tokens.shape[0], 1, -1)
        dtype = torch.promote_types(first.dtype, tokens.dtype)
        tokens = torch.cat([first.to(dtype), tokens.to(dtype)], dim=1)  # [B, 1 + P, E]
    return tokens if pos is None else tokens + pos


def normalize_pixels(
    pixels: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """Compute `(pixels - mean) / std` per channel.

    The arithmetic is in at least fp32, and the result is in `dtype`. `mean` and `std` are in the units of the pixels.
    """
    if mean is None and std is None:
        return pixels.to(dtype)
    precise = pixels.to(torch.promote_types(dtype, torch.float32))
    constants = [None if values is None else precise.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std)]
    if constants[0] is not None:
        precise = precise - constants[0]
    if constants[1] is not None:
        precise = precise / constants[1] if mean is None else precise.div_(constants[1])
    return precise.to(dtype)


def extract_patches(pixels: Tensor, patch: tuple[int, int] | torch.Size) -> Tensor:
    """Extract non-overlapping patches as rows: `[B, C, H, W]` to `[B, P, C * ph * pw]`.

    Incomplete patches are cropped.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch[0], width // patch[1]
    cropped = pixels[:, :, : rows * patch[0], : columns * patch[1]]
    blocks = cropped.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch[0] * patch[1])


def merge_patches(patches: Tensor, pixels_shape: torch.Size, patch: tuple[int, int] | torch.Size) -> Tensor:
    """Adjoint of `extract_patches`: `[B, P, C * ph * pw]` to `[B, C, H, W]`, with zeros in the cropped part."""
    batch, channels, height, width = pixels_shape
    rows, columns = height // patch[0], width // patch[1]
    blocks = patches.reshape(batch, rows, columns, channels, patch[0], patch[1]).permute(0, 3, 1, 4, 2, 5)
    image = blocks.reshape(batch, channels, rows * patch[0], columns * patch[1])
    cropped = (0, width - columns * patch[1], 0, height - rows * patch[0])
    return image if all(isinstance(size, int) and size == 0 for size in cropped) else F.pad(image, cropped)


def patch_embed_backward(
    grad: Tensor, arguments: PatchEmbedArguments, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of all arguments from `grad` `[B, tokens, E]`; None for those not `needed`."""
    pixels, weight, bias, cls, mask, mask_token, pos, mean, std = arguments
    need_pixels, need_weight, need_bias, need_cls, _, need_mask_token, need_pos = needed[:7]
    grad_pos = grad.sum(0, keepdim=True).to(pos.dtype) if need_pos and pos is not None else None
    grad_cls = grad[:, 0].sum(0).view(cls.shape).to(cls.dtype) if need_cls and cls is not None else None
    grad_patches = grad if cls is None else grad[:, 1:]  # [B, P, E]
    grad_mask_token = None
    if mask is not None and mask_token is not None:
        masked = mask.unsqueeze(-1)
        if need_mask_token:
            grad_mask_token = (
                grad_patches.masked_fill(~masked, 0).sum((0, 1)).view(mask_token.shape).to(mask_token.dtype)
            )
        grad_patches = grad_patches.masked_fill(masked, 0)
    grad_bias = grad_patches.sum((0, 1)).view(bias.shape).to(bias.dtype) if need_bias and bias is not None else None
    grad_patches = grad_patches.to(weight.dtype)
    grad_weight = None
    if need_weight:
        patches = extract_patches(normalize_pixels(pixels, mean, std, weight.dtype), weight.shape[2:])
        # not flatten: batched gradients (`is_grads_batched=True`) have rules for reshape and view only
        rows, grad_rows = (x.reshape(-1, x.shape[-1]) for x in (patches, grad_patches))
        grad_weight = (grad_rows.t() @ rows).view(weight.shape)
    grad_pixels = None
    if need_pixels:
        grad_input = grad_patches @ weight.flatten(1)  # [B, P, C * ph * pw]
        if std is not None:
            divisors = torch.tensor(std, dtype=grad_input.dtype, device=weight.device).unsqueeze(-1)
            grad_input.view(*grad_input.shape[:2], len(std), weight[0, 0].numel()).div_(divisors)
        grad_pixels = merge_patches(grad_input, pixels.shape, weight.shape[2:]).to(pixels.dtype)
    return grad_pixels, grad_weight, grad_bias, grad_cls, None, grad_mask_token, grad_pos, None, None
