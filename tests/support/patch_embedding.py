"""Exact reference of `patch_embed`, and its error budget.

Tests also import inputs of `beit_fast.tuning.patch_case` from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit_fast.tuning.patch_case import LAYOUTS, NAMES, arrange, convolution, in_precision, make_inputs, project

from .oracle import compare_results

__all__ = [
    "LAYOUTS",
    "NAMES",
    "arrange",
    "as_longdouble",
    "check_gradients",
    "check_tokens",
    "convolution",
    "differentiate",
    "exact_convolution",
    "in_precision",
    "make_inputs",
    "project",
]


def exact_convolution(arguments: dict[str, Any]) -> Tensor:
    """Compute `convolution` in fp64, or for fp64 weights in extended precision, then round to fp64."""
    if arguments["weight"].dtype != torch.float64:
        return convolution(**in_precision(arguments, torch.float64))
    wide = {name: as_longdouble(value) for name, value in arguments.items()}
    pixels = wide["pixels"]
    if wide["mean"] is not None:
        pixels = pixels - wide["mean"][:, None, None]
    if wide["std"] is not None:
        pixels = pixels / wide["std"][:, None, None]
    embed, channels, height, width = wide["weight"].shape
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    patches = pixels[:, :, : rows * height, : columns * width].reshape(-1, channels, rows, height, columns, width)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), rows * columns, -1)  # [B, P, C * ph * pw]
    tokens = patches @ wide["weight"].reshape(embed, -1).T
    if wide["bias"] is not None:
        tokens = tokens + wide["bias"]
    if arguments["mask"] is not None and wide["mask_token"] is not None:
        tokens = np.where(arguments["mask"].numpy()[..., None], wide["mask_token"], tokens)
    if wide["cls"] is not None:
        tokens = np.concatenate([np.broadcast_to(wide["cls"], (len(tokens), 1, embed)), tokens], axis=1)
    tokens = tokens if wide["pos"] is None else tokens + wide["pos"]
    return torch.from_numpy(tokens.astype(np.float64))


def check_tokens(tokens: Tensor, arguments: dict[str, Any]) -> None:
    """Compare `tokens` with fp64. The budget is the error of a convolution in the dtype of the weight."""
    exact, eager = exact_convolution(arguments), convolution(**arguments)
    # A bf16 weight rounds the pixels, even if tokens are fp32.
    compare_results({"tokens": tokens}, {"tokens": exact}, {"tokens": eager}, arguments["weight"].dtype)
    assert tokens.is_contiguous()


def check_gradients(function: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    """Compare the gradients of `function` with fp64. The budget is the error of a convolution."""
    precise = in_precision(arguments, torch.float64)
    compare_results(
        differentiate(function, arguments),
        differentiate(convolution, precise),
        differentiate(convolution, arguments),
        arguments["weight"].dtype,
    )


def differentiate(function: Callable[..., Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients of all floating-point tensors: "d" and the name of the argument.

    The incoming gradient is the same in every precision.
    """
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    tokens = function(**(arguments | leaves))
    generator = torch.Generator().manual_seed(5)
    incoming = torch.randn(tokens.shape, generator=generator, dtype=torch.float64).bfloat16().to(tokens)
    gradients = torch.autograd.grad(tokens, list(leaves.values()), incoming)
    return dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def as_longdouble(value: Any) -> Any:
    """Convert a tensor or a list to numpy's widest float; None stays None."""
    if value is None:
        return None
    array = value.detach().double().numpy() if isinstance(value, Tensor) else np.array(value, dtype=np.float64)
    return array.astype(np.longdouble)
