"""Small random models and their pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import beit_fast

from .transformers_reference import POSITIONS, TINY, options_for, randomize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def build(name: str = "BeitForImageClassification", position: str = "per layer", **options: object) -> Any:
    """Build a random model in evaluation mode; `position` is one of `POSITIONS`."""
    values = TINY | POSITIONS[position] | options_for(name) | options
    model = getattr(beit_fast, name)(beit_fast.BeitConfig(**values)).eval()
    randomize(model)
    return model


def images(*size: int) -> Tensor:
    """Floating-point pixels, `[2, 3, 32, 32]` unless a size is given."""
    return torch.randn(*(size or (2, 3, 32, 32)))


def byte_images(*size: int) -> Tensor:
    """uint8 pixels, `[2, 3, 32, 32]` unless a size is given."""
    return torch.randint(0, 256, size or (2, 3, 32, 32), dtype=torch.uint8)


def normalized(pixels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalize uint8 pixels as an image processor with `MEAN` and `STD`."""
    mean, std = (torch.tensor(numbers, dtype=dtype, device=pixels.device).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (pixels.to(dtype) / 255 - mean) / std


def align_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """Copy the parameters and buffers to aligned memory, and return the model.

    Tensors that were read from a file are not aligned, and a GEMM or a convolution may then round differently.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
