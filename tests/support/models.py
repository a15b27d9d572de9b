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

    Tensors that were read from a safetensors file are aligned to 8 bytes. MKL's fp64 GEMM rounds differently if an
    operand is not aligned to 16 bytes. On an AMD EPYC, torch 2.13.0 and 2.14.1, this prints False:

        x, weight = torch.randn(34, 32).double(), torch.randn(48, 32).double()
        moved = torch.empty(48 * 32 + 1).double()[1:].view(48, 32).copy_(weight)
        print(torch.equal(F.linear(x, weight), F.linear(x, moved)))
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
