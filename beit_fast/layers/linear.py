"""The linears of training on CPU: an autograd function over a matrix product of choice, and when it takes a module's
place.

`F.linear` on CPU is BLAS, mostly MKL, which runs AVX2 kernels on CPUs that are not Intel's. oneDNN runs AVX-512 there,
at the price of packing the right operand of each of the three products of a step: the weight forward and, transposed,
for the input's gradient, the input for the weight's. That pays where the CPU's AVX-512 is twice as wide as its AVX2,
which is AMD from family 26 on (Zen 5; Zen 4 splits each AVX-512 instruction in two), and for enough rows. On Intel's
CPUs both multiply alike and packing would be lost; where they have AMX, the package's own kernel multiplies fp32 in
parts on their tiles (`parts_linear`). `choose_product` is the one place that decides, from facts about the machine and
never by timing.

Query, key and value stay three products: one of their concatenated weights copies weights and gradients, which costs
more than it saves.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cpu_linear import onednn, split_bf16
from ..ops.dispatch import attention
from ..ops.functorch import transforms_are_active
from .module_hooks import runs_as_written

PRODUCTS = ("blas", "onednn", "parts")
"""What can multiply, and what `BEIT_FAST_CPU_LINEAR` may name; it is read when this module is imported."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function like `F.linear`: left `[..., inner]`, right `[columns, inner]` and bias `[columns]`, of any strides."""

_REQUESTED = os.environ.get("BEIT_FAST_CPU_LINEAR")
_FEWEST_PACKED_ROWS = 320  # below, packing the weights costs what an oneDNN 1.5 times as fast as MKL saves
_FEWEST_ROWS_IN_PARTS = 128  # below, packing costs what the tiles save
_WIDE_AVX512_FAMILY = 26  # AMD's Zen 5
_CPU_KERNELS = ("triton/c++", "triton/composite")


@dataclass(frozen=True)
class ProductChoice:
    """What multiplies in training: a name of `PRODUCTS`, why, and the function, None where the modules do.

    `fewest_rows` is the size of input from which on the function pays; smaller ones go to the modules.
    """

    name: str
    reason: str
    multiply: Product | None = None
    fewest_rows: int = 0


def choose_product() -> ProductChoice:
    """What multiplies the fp32 linears of training on this CPU.

    Raises:
        ValueError: `BEIT_FAST_CPU_LINEAR` names no product.
    """
    preferred = _preferred(_REQUESTED)
    refusal = None
    if preferred.name == "onednn":
        refusal = onednn.packing_refusal("cpu", torch.float32)
    elif preferred.name == "parts":
        refusal = split_bf16.refusal()
    return preferred if refusal is None else ProductChoice("blas", refusal)


def apply_linear(module: nn.Module, x: Tensor, attn_implementation: str | None = None) -> Tensor:
    """`module(x)`, by the chosen product where `module` is a plain `nn.Linear` in fp32 training on CPU.

    Everything else calls the module: inference, other dtypes and devices, autocast, compilation and tracing,
    `torch.func` transforms, forward-mode differentiation, modes that intercept operators, tensor subclasses, modules
    that were replaced or have hooks, and attention that does not resolve to `"triton"` with a kernel on CPU.
    """
    multiply = None if torch.compiler.is_compiling() else _product_for(module, x, attn_implementation)
    if multiply is None:
        return module(x)
    return CpuLinear.apply(x, module.weight, module.bias, multiply)


class CpuLinear(torch.autograd.Function):
    """`F.linear(x, weight, bias)` and its gradients by `multiply`; keeps x and weight, as autograd's own does.

    The second derivative goes through torch's own operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.multiply = multiply
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else ctx.multiply
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [R, in], [R, out]
        return (
            multiply(grad, weight.t(), None) if needs_x else None,
            multiply(grad_rows.t(), rows.t(), None) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
            None,
        )


def multiply_packed(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The product by oneDNN, with a packed copy of `right` for as long as it takes."""
    if left.numel() == 0 or right.numel() == 0:
        return F.linear(left, right, bias)
    packed = onednn.pack(right, left.numel() // left.shape[-1])
    return onednn.packed_linear(left, packed, bias)


def multiply_parts(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The product by the package's own kernel, with a copy of `right` in parts for as long as it takes."""
    return split_bf16.matmul_parts(left, right, split_bf16.parts_for_precision(), bias)


def _product_for(module: nn.Module, x: Tensor, attn_implementation: str | None) -> Product | None:
    """The function that multiplies in the place of `module`, or None where the module is to be called."""
    if type(x) is not Tensor or x.dtype != torch.float32 or x.device.type != "cpu" or not torch.is_grad_enabled():
        return None
    if torch.jit.is_tracing() or transforms_are_active() or torch.autograd.forward_ad._current_level >= 0:
        return None
    choice = choose_product()
    if choice.multiply is None or x.numel() < choice.fewest_rows * x.shape[-1]:
        return None
    if torch.is_autocast_enabled("cpu") or not _is_plain(module, x):
        return None
    kernel = attention.kernel_name(attn_implementation, x.device, x.dtype, head_dim=64)  # any, on CPU
    return choice.multiply if kernel in _CPU_KERNELS else None


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling `module` is `F.linear` on x of a fp32 weight on CPU, and something needs a gradient."""
    if type(module) is not nn.Linear or not runs_as_written(module) or nn.modules.module._has_any_global_hook():
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    fits = x.shape[-1] == module.weight.shape[-1]  # the module's own error names the shapes
    plain = all(type(t) is nn.Parameter and t.dtype == x.dtype and t.device == x.device for t in tensors)
    return fits and plain and (x.requires_grad or any(t.requires_grad for t in tensors))


@functools.cache
def _preferred(requested: str | None) -> ProductChoice:
    """What multiplies as far as a request or else the machine decides, before a request's obstacles are looked at."""
    if requested and requested not in PRODUCTS:
        accepted = ", ".join(map(repr, PRODUCTS))
        raise ValueError(f"BEIT_FAST_CPU_LINEAR is {requested!r}; accepted are {accepted}, or leave it unset")
    asked = f"BEIT_FAST_CPU_LINEAR={requested} was set when beit_fast was imported" if requested else None
    if requested == "parts" or (not requested and split_bf16.refusal() is None):
        reason = asked or "the CPU has AMX tiles, on which fp32 in three parts of bf16 is faster than on vectors"
        return ProductChoice("parts", reason, multiply_parts, _FEWEST_ROWS_IN_PARTS)
    against = _reason_for_blas()
    if requested == "blas" or (not requested and against is not None):
        return ProductChoice("blas", asked or str(against))
    reason = asked or "MKL runs AVX2 kernels on AMD CPUs, oneDNN AVX-512"
    return ProductChoice("onednn", reason, multiply_packed, _FEWEST_PACKED_ROWS)


def _reason_for_blas() -> str | None:
    """Why oneDNN would not pay on this machine, or None where it does."""
    if not torch.backends.mkl.is_available():
        return "torch's BLAS is not MKL"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU has no AVX-512"
    vendor, family = _cpu_identity()
    if vendor != "AuthenticAMD":
        return f"MKL is no slower than oneDNN on CPUs of {vendor}"
    if family < _WIDE_AVX512_FAMILY:
        return f"AVX-512 is no wider than AVX2 on AMD CPUs of family {family}"
    return None


def _cpu_identity() -> tuple[str, int]:
    """The CPU's vendor, such as `"GenuineIntel"`, and family, as Linux gives them; `("unknown make", 0)` elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        fields = {}
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    return facts.get("vendor_id", "unknown make"), int(facts.get("cpu family", 0))
