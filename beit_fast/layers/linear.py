"""Call linear layers in training on CPU: by the GEMM of `ops.cpu_linear.choice`, or by calling the module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cpu_linear.choice import CpuLinear, GemmChoice, choose_gemm
from ..ops.functorch import transforms_are_active
from .module_hooks import runs_as_written

_CPU_KERNELS = ("cpp", "torch")


def choose_training_gemm(kernel: str, device: torch.device, dtype: torch.dtype) -> GemmChoice | None:
    """Choose the GEMM for fp32 linear layers in training on CPU.

    Args:
        kernel: The attention kernel of this forward pass.
        device, dtype: Of the layers' outputs.

    Returns:
        None if the modules are to be called: in inference, on other devices and dtypes, with `"eager"` or `"sdpa"`,
        under autocast, compilation, tracing, `torch.func` transforms and forward-mode differentiation.
    """
    if dtype != torch.float32 or device.type != "cpu" or kernel not in _CPU_KERNELS or not trains_eagerly():
        return None
    choice = choose_gemm()
    return None if choice.function is None else choice


def trains_eagerly() -> bool:
    """Return whether fp32 modules run eagerly and may need gradients.

    False under autocast, compilation, tracing, `torch.func` transforms and forward-mode differentiation.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not transforms_are_active() and torch.autograd.forward_ad._current_level < 0


def apply_linear(module: nn.Module, x: Tensor, gemm: GemmChoice | None) -> Tensor:
    """Compute `module(x)`, by `gemm` if possible.

    `gemm` serves a plain `nn.Linear` whose output needs a gradient.

    Args:
        module: Any module of one tensor. Modules that were replaced or have hooks are called.
        x: `[..., inputs]`. Tensor subclasses and inputs of few rows go to the module.
        gemm: The choice of `choose_training_gemm`, or None to call the module.
    """
    if torch.compiler.is_compiling() or gemm is None or gemm.function is None:
        return module(x)
    if x.numel() < gemm.min_rows * x.shape[-1] or not _is_plain(module, x):
        return module(x)
    return CpuLinear.apply(x, module.weight, module.bias, gemm.function)


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether `module(x)` is `F.linear` of fp32 tensors on CPU. The result must also need a gradient."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if type(module) is not nn.Linear or not runs_as_written(module) or nn.modules.module._has_any_global_hook():
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    fits = x.shape[-1] == module.weight.shape[-1]  # the module's own error names the shapes
    plain = all(type(t) is nn.Parameter and t.dtype == x.dtype and t.device == x.device for t in tensors)
    return fits and plain and (x.requires_grad or any(t.requires_grad for t in tensors))
