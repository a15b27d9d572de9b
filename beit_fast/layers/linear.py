"""Call fp32 linear layers on CPU: by the GEMM of `ops.cpu_linear.choice`, or by calling the module."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..ops.cpu_linear.choice import CpuLinear, GemmChoice, choose_gemm
from ..ops.functorch import transforms_are_active
from .module_hooks import runs_as_written

_CPU_KERNELS = ("cpp", "torch")


def choose_linear_gemm(kernel: str, device: torch.device, dtype: torch.dtype) -> GemmChoice | None:
    """Choose the GEMM for fp32 linear layers on CPU.

    Args:
        kernel: The attention kernel of this forward pass.
        device, dtype: Of the layers' outputs.

    Returns:
        None if the modules are to be called: on other devices and dtypes, with `"eager"` or `"sdpa"`, under autocast,
        compilation, tracing, `torch.func` transforms and forward-mode differentiation.
    """
    if dtype != torch.float32 or device.type != "cpu" or kernel not in _CPU_KERNELS or not runs_eagerly():
        return None
    choice = choose_gemm()
    return None if choice.function is None else choice


def runs_eagerly() -> bool:
    """Return whether fp32 modules run as Python calls them, in fp32.

    False under autocast, compilation, tracing, `torch.func` transforms and forward-mode differentiation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return not transforms_are_active() and torch.autograd.forward_ad._current_level < 0


def apply_linear(module: nn.Module, x: Tensor, gemm: GemmChoice | None) -> Tensor:
    """Compute `module(x)`, by `gemm` if possible.

    `gemm` serves a plain `nn.Linear`. It packs the weight in each call, because writes through `.data` do not change
    a parameter's version: no copy of the weight outlives the call.

    Args:
        module: Any module of one tensor. Modules that were replaced or have hooks are called.
        x: `[..., inputs]`. Tensor subclasses and inputs of few rows go to the module.
        gemm: The choice of `choose_linear_gemm`, or None to call the module.
    """
    if torch.compiler.is_compiling() or gemm is None or gemm.function is None:
        return module(x)
    if x.numel() < gemm.min_rows * x.shape[-1] or not _is_plain(module, x):
        return module(x)
    weight, bias = module.weight, module.bias
    tracked = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if tracked and torch.is_grad_enabled():
        return CpuLinear.apply(x, weight, bias, gemm.function)
    return gemm.function(x, weight, bias)


def _is_plain(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether `module(x)` is `F.linear` of fp32 tensors on CPU."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if type(module) is not nn.Linear or not runs_as_written(module):
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    fits = x.shape[-1] == module.weight.shape[-1]  # the module's own error names the shapes
    return fits and all(type(t) is nn.Parameter and t.dtype == x.dtype and t.device == x.device for t in tensors)
