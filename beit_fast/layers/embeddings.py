"""Embeddings: pixels to tokens, by a convolution or by one operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..ops.dispatch import patch_embed as patch_embed_dispatch
from ..ops.fallback.patch_embed import normalize_pixels
from ..ops.patch_embed import patch_embed
from ..position_bias import Window, resize_position_embeddings
from ..utils.messages import full_name
from ..utils.tensors import layout_reason, unreadable_reason
from .module_hooks import hook_reasons

Normalization = tuple[list[float], list[float]]
"""Mean and standard deviation of each channel, in units of uint8 pixels."""

_LARGEST_PIXEL = 255


def window_of(pixel_values: Tensor, patch_size: int) -> Window:
    """Count the whole patches of an image `[B, C, H, W]`.

    The result is `(height, width)`; the rest of the image is cropped.

    Raises:
        ValueError: If the image is smaller than one patch.
    """
    height, width = pixel_values.shape[-2:]
    if height < patch_size or width < patch_size:
        raise ValueError(f"images of {height}x{width} pixels are smaller than one patch of {patch_size}x{patch_size}")
    return height // patch_size, width // patch_size


def check_pixel_shape(pixel_values: Tensor, channels: int) -> None:
    """Check that pixels are dense and `[B, channels, H, W]`.

    Raises:
        ValueError: If they are not. If the channels are last or one image has no batch, the error says what to pass.
    """
    if reason := layout_reason(pixel_values):
        raise ValueError(f"pixel_values {reason}")
    shape = pixel_values.shape
    if pixel_values.ndim == 4 and shape[1] == channels:
        return
    hint = ""
    if pixel_values.ndim in (3, 4) and shape[-1] == channels and shape[-3] != channels:
        order = "0, 3, 1, 2" if pixel_values.ndim == 4 else "2, 0, 1"
        hint = (
            f"; the channels are last: pass pixel_values.permute({order}){'' if pixel_values.ndim == 4 else '[None]'}"
        )
    elif pixel_values.ndim == 3 and shape[0] == channels:
        hint = "; for one image, pass pixel_values[None]"
    raise ValueError(f"pixel_values must be [batch, {channels}, height, width], not {list(shape)}{hint}")


class BeitPatchEmbeddings(nn.Module):
    """Patches to tokens, `[B, C, H, W]` to `[B, P, E]`: a convolution with stride = kernel size."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.num_patches = config.num_patches
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class BeitEmbeddings(nn.Module):
    """Embeddings of CLS, patches and optional absolute positions: `[B, 1 + P, E]`.

    The mask token replaces some patches.

    `patch_embed_implementation` is `"conv"`, `"fused"` or None, which follows `attn_implementation`. `"fused"` is one
    operator for all steps. It reads the parameters of `patch_embeddings.projection` and calls neither module. If one of
    them was replaced or has hooks, `"fused"` is an error and None runs `"conv"`, which calls both.

    `last_kernel` is the name of the kernel that ran last, None before the first call outside `torch.compile`.
    """

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.native_window = config.window
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size)) if config.use_mask_token else None
        self.patch_embeddings = BeitPatchEmbeddings(config)
        self.position_embeddings = (
            nn.Parameter(torch.zeros(1, config.num_patches + 1, size))
            if config.use_absolute_position_embeddings
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attn_implementation: str | None = None
        self.patch_embed_implementation: str | None = None
        self.last_kernel: str | None = None

    def forward(
        self,
        pixel_values: Tensor,
        window: Window,
        bool_masked_pos: Tensor | None = None,
        attention_backend: str | None = None,
    ) -> Tensor:
        check_pixel_shape(pixel_values, self.config.num_channels)
        if pixel_values.is_meta and not self.cls_token.is_meta:
            raise ValueError(f"pixel_values {unreadable_reason(pixel_values)}")
        normalization = normalization_of(pixel_values, self.config.pixel_mean, self.config.pixel_std)
        mask = self._mask(bool_masked_pos, (pixel_values.shape[0], window[0] * window[1]))
        positions: Tensor | None = self.position_embeddings
        if positions is not None:
            positions = resize_position_embeddings(positions, self.native_window, window)
        resolved = patch_embed_dispatch.resolve(
            self.patch_embed_implementation,
            self.attn_implementation,
            self.cls_token,
            self.config.attention_head_dim,
            self.unsupported_reasons(),
            attention_backend,
        )
        embed = self._fuse if resolved == "fused" else self._convolve
        tokens = embed(pixel_values, normalization, mask, positions)
        if not torch.compiler.is_compiling():
            self.last_kernel = patch_embed_dispatch.kernel_name(resolved, pixel_values, self.cls_token)
        return self.dropout(tokens)

    def unsupported_reasons(self) -> list[str]:
        """Return the reasons why the operator cannot replace the modules here. The list is empty if it can."""
        return unsupported_reasons(self.patch_embeddings, BeitPatchEmbeddings)

    def _fuse(
        self, pixels: Tensor, normalization: Normalization | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        projection = self.patch_embeddings.projection
        mask_token = None if mask is None else self.mask_token
        mean, std = (None, None) if normalization is None else normalization
        return patch_embed(
            pixels, projection.weight, projection.bias, self.cls_token, mask, mask_token, positions, mean, std
        )

    def _convolve(
        self, pixels: Tensor, normalization: Normalization | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        dtypes = (p.dtype for p in self.patch_embeddings.parameters() if p.is_floating_point())
        dtype = next(dtypes, self.cls_token.dtype)
        tokens = self.patch_embeddings(float_pixels(pixels, normalization, dtype))
        if mask is not None and self.mask_token is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens if positions is None else tokens + positions

    def _mask(self, bool_masked_pos: Tensor | None, accepted: tuple[int, int]) -> Tensor | None:
        """Convert `bool_masked_pos` to bool `[B, P]`. The argument is `[B, P]` or `[B, h, w]` of any dtype."""
        if bool_masked_pos is None:
            return None
        if self.mask_token is None:
            raise ValueError("bool_masked_pos requires a mask token: build the model with use_mask_token=True")
        masked = bool_masked_pos.flatten(1).bool()
        if masked.shape != accepted:
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = {list(accepted)}, not {list(bool_masked_pos.shape)}"
            )
        return masked


def unsupported_reasons(patch_embeddings: nn.Module, expected: type[nn.Module]) -> list[str]:
    """List why the operator cannot replace `patch_embeddings`.

    The operator reads the parameters of a plain convolution.
    """
    if type(patch_embeddings) is not expected:
        return [f"patch_embeddings is a {full_name(type(patch_embeddings))}, not a {full_name(expected)}"]
    projection = patch_embeddings.projection
    if type(projection) is not nn.Conv2d:
        return [f"patch_embeddings.projection is a {full_name(type(projection))}, not a {full_name(nn.Conv2d)}"]
    reasons = []
    if (
        projection.stride != projection.kernel_size
        or projection.padding != (0, 0)
        or projection.dilation != (1, 1)
        or projection.groups != 1
    ):
        reasons.append("patch_embeddings.projection is not a plain convolution with stride = kernel size")
    modules = {"patch_embeddings": patch_embeddings, "patch_embeddings.projection": projection}
    return reasons + hook_reasons(modules)


def float_pixels(pixels: Tensor, normalization: Normalization | None, dtype: torch.dtype) -> Tensor:
    """Convert pixels to `dtype` for the convolution; uint8 pixels are normalized."""
    if normalization is None:
        return pixels.to(dtype)
    return normalize_pixels(pixels, *normalization, dtype)


def normalization_of(
    pixels: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalization | None:
    """Scale the mean and standard deviation to uint8 pixels.

    They are those of pixels in 0..1. The result is None for float pixels.

    Raises:
        ValueError: If uint8 pixels come without mean and std, or pixels are of another integer dtype.
    """
    if pixels.dtype.is_floating_point:
        return None
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixel_values must be normalized floating point, or uint8, not {str(pixels.dtype).removeprefix('torch.')}"
        )
    if mean is None or std is None:
        raise ValueError(
            "uint8 pixel_values need a mean and standard deviation: call model.set_pixel_normalization(mean, std) with "
            "the image_mean and image_std of an image processor, or pass normalized floating-point pixels"
        )
    return [_LARGEST_PIXEL * number for number in mean], [_LARGEST_PIXEL * number for number in std]
