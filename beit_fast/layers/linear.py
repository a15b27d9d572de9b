"""Call linear layers in training on CPU: by the GEMM of `ops.cpu_linear.choice`, or by calling the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cpu_linear.choice import CpuLinear, Gemm, choose_gemm
from ..ops.dispatch import attention
from ..ops.functorch import transforms_are_active
from .module_hooks import runs_as_written

_CPU_KERNELS = ("triton/c++", "triton/composite")


def apply_linear(module: nn.Module, x: Tensor, attn_implementation: str | None = None) -> Tensor:
    """Compute `module(x)`, by the chosen GEMM if `module` is a plain `nn.Linear` in fp32 training on CPU.

    Otherwise the module is called: inference, other dtypes and devices, autocast, compilation and tracing,
    `torch.func` transforms, forward-mode differentiation, modes that intercept operators, tensor subclasses, modules
    that were replaced or have hooks, and attention that does not resolve to `"triton"` with a kernel on CPU.
    """
    gemm = None if torch.compiler.is_compiling() else _gemm_for(module, x, attn_implementation)
    if gemm is None:
        return module(x)
    return CpuLinear.apply(x, module.weight, module.bias, gemm)


def _gemm_for(module: nn.Module, x: Tensor, attn_implementation: str | None) -> Gemm | None:
    """The GEMM to use in place of `module`, or None to call the module."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return None
    if torch.jit.is_tracing() or transforms_are_active() or torch.autograd.forward_ad._current_level >= 0:
        return None
    choice = choose_gemm()
    if choice.function is None or x.numel() < choice.min_rows * x.shape[-1]:
        return None
    if torch.is_autocast_enabled("cpu") or not _is_plain(module, x):
        return None
    kernel = attention.kernel_name(attn_implementation, x.device, x.dtype, head_dim=64)  # any, on CPU
    return choice.function if kernel in _CPU_KERNELS else None


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling `module` is `F.linear` on x of a fp32 weight on CPU, and something needs a gradient."""
    if type(module) is not nn.Linear or not runs_as_written(module) or nn.modules.module._has_any_global_hook():
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    fits = x.shape[-1] == module.weight.shape[-1]  # the module's own error names the shapes
    plain = all(type(t) is nn.Parameter and t.dtype == x.dtype and t.device == x.device for t in tensors)
    return fits and plain and (x.requires_grad or any(t.requires_grad for t in tensors))
