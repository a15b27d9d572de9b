"""Activations of `config.hidden_act`, under the names of Transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional


class Elementwise(nn.Module):
    """An elementwise function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)

    def extra_repr(self) -> str:
        return self.function.__name__


def quick_gelu(values: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""
    return values * torch.sigmoid(1.702 * values)


def clipped_gelu(values: Tensor) -> Tensor:
    """GELU limited to [-10, 10] for quantization (arXiv 2004.09602)."""
    return functional.gelu(values).clamp(-10, 10)


def laplace(values: Tensor) -> Tensor:
    """Laplace attention function (arXiv 2209.10655): 0.5 (1 + erf((x - mu) / (sigma sqrt(2))))."""
    return 0.5 * (1 + torch.erf((values - 0.707107) / (0.282095 * math.sqrt(2))))


def squared_relu(values: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668)."""
    return functional.relu(values).square()


def sqrt_softplus(values: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x)))."""
    return functional.softplus(values).sqrt()


_gelu_tanh = partial(nn.GELU, approximate="tanh")

# The five tanh forms of Transformers are one formula with different rounding.
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "gelu": nn.GELU,
        "gelu_python": nn.GELU,
        "gelu_accurate": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_new": _gelu_tanh,
        "gelu_python_tanh": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "gelu_10": partial(Elementwise, clipped_gelu),
        "quick_gelu": partial(Elementwise, quick_gelu),
        "hardswish": nn.Hardswish,
        "laplace": partial(Elementwise, laplace),
        "leaky_relu": nn.LeakyReLU,
        "linear": nn.Identity,
        "mish": nn.Mish,
        "relu": nn.ReLU,
        "relu2": partial(Elementwise, squared_relu),
        "relu6": nn.ReLU6,
        "sigmoid": nn.Sigmoid,
        "silu": nn.SiLU,
        "sqrtsoftplus": partial(Elementwise, sqrt_softplus),
        "swish": nn.SiLU,
        "tanh": nn.Tanh,
    }
)
"""A module factory for each name. `prelu` and `xielu` of Transformers have parameters and are not supported."""
