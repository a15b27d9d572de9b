"""Random inputs of `patch_embed`, and its result by a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("pixels", "weight", "bias", "cls", "mask", "mask_token", "pos", "mean", "std")
LAYOUTS = ("contiguous", "channels_last", "cropped", "transposed", "expanded")


def make_inputs(
    image: tuple[int, int],
    patch: tuple[int, int],
    *,
    batch: int = 2,
    channels: int = 3,
    embed: int = 40,
    pixel_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    token_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    absent: tuple[str, ...] = (),
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Draw all arguments by name; those in `absent` are None.

    CLS, mask token and positions have `token_dtype` (None: `dtype`). Pixels are uint8, or about N(0.3, 1), and mean and
    std have the same units.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    tokens = patches + ("cls" not in absent)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, to)

    is_bytes = pixel_dtype == torch.uint8
    pixels = torch.randint(0, 256, (batch, channels, *image), generator=generator, dtype=torch.uint8)
    if not is_bytes:
        pixels = torch.randn(batch, channels, *image, generator=generator, dtype=torch.float64) + 0.3
    values = {
        "pixels": arrange(pixels.to(device, pixel_dtype), layout),
        "weight": normal(embed, channels, *patch) * (channels * patch[0] * patch[1]) ** -0.5,
        "bias": normal(embed),
        "cls": normal(1, 1, embed, to=token_dtype or dtype),
        "mask": (torch.rand(batch, patches, generator=generator) > 0.6).to(device),
        "mask_token": normal(1, 1, embed, to=token_dtype or dtype),
        "pos": normal(1, tokens, embed, to=token_dtype or dtype),
        "mean": [100.0 + 9 * n if is_bytes else 0.1 * n for n in range(channels)],
        "std": [60.0 + 7 * n if is_bytes else 0.6 + 0.1 * n for n in range(channels)],
    }
    return {name: None if name in absent else values[name] for name in NAMES}


def arrange(pixels: Tensor, layout: str) -> Tensor:
    """Copy pixels to another memory layout; "expanded" repeats the first image."""
    if layout == "channels_last":
        return pixels.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":  # a window of larger images, at an unaligned address
        room = pixels.new_zeros(*pixels.shape[:2], pixels.shape[2] + 3, pixels.shape[3] + 5)
        window = room[:, :, 1:-2, 3:-2]
        return window.copy_(pixels)
    if layout == "transposed":
        return pixels.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return pixels[:1].expand_as(pixels)
    return pixels.contiguous()


def in_precision(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert all floating-point tensors to `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def convolution(
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
    """Normalize in fp32 or fp64, convolve, and add the other tokens."""
    precise = pixels.to(torch.promote_types(weight.dtype, torch.float32))
    if mean is not None:
        precise = precise - precise.new_tensor(mean)[:, None, None]
    if std is not None:
        precise = precise / precise.new_tensor(std)[:, None, None]
    tokens = project(precise.to(weight.dtype), weight, bias)
    if mask is not None and mask_token is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token, tokens)
    if cls is not None:
        dtype = torch.promote_types(cls.dtype, tokens.dtype)
        tokens = torch.cat([cls.expand(tokens.shape[0], -1, -1).to(dtype), tokens.to(dtype)], dim=1)
    return tokens if pos is None else tokens + pos


def project(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve to `[B, P, E]`."""
    patch = weight.shape[2:]
    if weight.device.type == "cpu" and weight.dtype in (torch.float16, torch.bfloat16):
        # With one channel, conv2d of PyTorch 2.13 sometimes returns NaN for bf16 on a CPU with AMX.
        patches = torch.nn.functional.unfold(pixels.float(), patch, stride=patch).transpose(1, 2)
        return torch.nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), bias)
    return torch.nn.functional.conv2d(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2)
