"""Cases of the patch embedding benchmark: shapes, inputs, fp64 reference and error budgets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.tuning.reference import FORWARD_FACTOR, error_budget

from .cases import DTYPE_NAMES, Reference

FLOAT, BYTES = "float pixels", "uint8 pixels"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of bytes
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PatchCase:
    """One shape.

    Attributes:
        mode: `FLOAT` or `BYTES`, the kind of pixels.
        batch: Number of images.
        dtype: Of parameters, tokens and float pixels.
        image: Height and width in pixels.
        patch: Side of a patch.
        embed: Width of a token.
        channels: Channels of the pixels.
    """

    mode: str
    batch: int
    dtype: str
    image: int = 224
    patch: int = 16
    embed: int = 768
    channels: int = 3

    def __str__(self) -> str:
        return f"{self.mode.split()[0]}-{self.batch}x{self.image}-{self.dtype}"

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.patches * self.embed * self.channels * self.patch**2


@dataclass(frozen=True)
class PatchInputs:
    """Inputs of a patch embedding."""

    pixels: Tensor  # [B, C, H, W]
    weight: Tensor  # [E, C, p, p]
    bias: Tensor  # [E]
    cls: Tensor  # [1, 1, E]
    pos: Tensor | None  # [1, 1 + P, E] for uint8 pixels


def draw(case: PatchCase) -> PatchInputs:
    """Draw the inputs of a case from a fixed seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DTYPES[case.dtype])

    shape = (case.batch, case.channels, case.image, case.image)
    is_bytes = case.mode == BYTES
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) if is_bytes else normal(*shape)
    fan_in = case.channels * case.patch**2
    weight = normal(case.embed, case.channels, case.patch, case.patch, scale=fan_in**-0.5)
    pos = normal(1, 1 + case.patches, case.embed) if is_bytes else None
    return PatchInputs(pixels, weight, normal(case.embed), normal(1, 1, case.embed), pos)


def with_cls_and_positions(tokens: Tensor, inputs: PatchInputs) -> Tensor:
    """Prepend CLS and add positions: `[B, P, E]` to `[B, 1 + P, E]`."""
    tokens = torch.cat([inputs.cls.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if inputs.pos is None else tokens + inputs.pos


def convolution(pixels: Tensor, inputs: PatchInputs) -> Tensor:
    """Compute tokens by a convolution whose stride is its kernel size."""
    maps = F.conv2d(pixels, inputs.weight, inputs.bias, stride=inputs.weight.shape[2:])
    return with_cls_and_positions(maps.flatten(2).transpose(1, 2), inputs)


def normalized(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize uint8 pixels as an image processor does; compute in fp32 or wider, in place."""
    wide = pixels.to(torch.promote_types(dtype, torch.float32))
    mean, std = (wide.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (MEAN, STD))
    return wide.sub_(mean).div_(std).to(dtype)


def reference(case: PatchCase) -> Reference:
    """Compute fp64 tokens; the budget is twice the error of the convolution in the dtype, plus four eps."""
    inputs = draw(case)
    wide = PatchInputs(*(None if x is None else x.double() for x in vars(inputs).values()))  # type: ignore[arg-type]
    is_bytes = case.mode == BYTES
    pixels = normalized(inputs.pixels, torch.float64) if is_bytes else wide.pixels
    exact = convolution(pixels, wide)
    rounded = convolution(normalized(inputs.pixels, inputs.weight.dtype) if is_bytes else inputs.pixels, inputs)
    budget = error_budget(exact, rounded, FORWARD_FACTOR, DTYPES[case.dtype])
    return Reference({"tokens": exact}, {"tokens": budget})
