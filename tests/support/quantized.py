"""Quantized models: PyTorch's dynamic quantization, and weights that are a tensor subclass, as torchao makes them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Weight(Tensor):
    """A weight of int8 numbers and one scale, without storage of its own."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.numbers * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Int8Weight does not support {function}")


def with_int8_weights(model: nn.Module) -> nn.Module:
    """Replace the weights of all linear layers in place, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax() / 127
            numbers = (weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Int8Weight(numbers, scale), requires_grad=False)
    return model


def dynamically_quantized(model: nn.Module) -> nn.Module:
    """Return a copy with PyTorch's dynamically quantized linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
