"""Choice of the GEMM for fp32 linear layers on CPU. The GEMM is chosen by CPU model and not by autotuning.

`F.linear` on CPU is BLAS, usually MKL, which runs AVX2 kernels on AMD CPUs. oneDNN runs AVX-512 kernels there, but it
packs the right operand of each product. It is the weight in the forward, the transposed weight for the gradient of the
input, and the input for the gradient of the weight. oneDNN pays for enough rows, on CPUs whose AVX-512 is twice as wide
as their AVX2. These are AMD from family 26 on (Zen 5; Zen 4 splits each AVX-512 instruction in two). BLAS and oneDNN
are equally fast on Intel CPUs. If the CPU has AMX, the kernel of `split_bf16` is faster than both.

Query, key and value stay three products: concatenating their weights copies weights and gradients, which costs more
than it saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils import variables
from . import onednn, split_bf16

GemmName = Literal["blas", "onednn", "split_bf16"]

GEMMS: tuple[GemmName, ...] = get_args(GemmName)
"""The GEMMs, which `BEIT_FAST_CPU_LINEAR` may name."""

Gemm = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function like `F.linear`: left `[..., inner]`, right `[columns, inner]` and bias `[columns]`, of any strides."""

_MIN_ROWS_ONEDNN = 320  # with fewer, packing costs more than oneDNN saves (1.5 times as fast as MKL)
_MIN_ROWS_SPLIT_BF16 = 128  # with fewer, packing costs more than the tiles save
_WIDE_AVX512_FAMILY = 26  # AMD's Zen 5


@dataclass(frozen=True)
class GemmChoice:
    """The GEMM for fp32 linear layers.

    Attributes:
        name: which GEMM.
        reason: why it was chosen.
        function: the GEMM, or None to call the module.
        min_rows: smallest number of input rows for which the function is faster; fewer rows call the module.
    """

    name: GemmName
    reason: str
    function: Gemm | None = None
    min_rows: int = 0


def choose_gemm() -> GemmChoice:
    """Choose the GEMM for fp32 linear layers on this CPU.

    While a mode intercepts torch's operators, as in a FLOP counter, oneDNN gives way to BLAS even on request.

    Raises:
        ValueError: If `BEIT_FAST_CPU_LINEAR` is not the name of a GEMM, or names one that cannot serve on this CPU.
    """
    requested = variables.choice(variables.CPU_LINEAR, GEMMS)
    preferred = _preferred(requested)
    reason = None
    if preferred.name == "onednn":
        reason = onednn.unsupported_reason("cpu", torch.float32)
    elif preferred.name == "split_bf16":
        reason = split_bf16.unsupported_reason()
    intercepted = preferred.name == "onednn" and torch._C._len_torch_dispatch_stack() > 0
    if reason is not None and requested is not None and not intercepted:
        raise variables.cannot_serve(variables.CPU_LINEAR, reason)
    return preferred if reason is None else GemmChoice("blas", reason)


class CpuLinear(torch.autograd.Function):
    """`F.linear(x, weight, bias)` and its gradients by a given GEMM; saves x and weight, as autograd does.

    The second derivative uses PyTorch's own operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gemm: Gemm) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gemm = gemm
        return gemm(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gemm = F.linear if torch.is_grad_enabled() else ctx.gemm
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [R, in], [R, out]
        return (
            gemm(grad, weight.t(), None) if needs_x else None,
            gemm(grad_rows.t(), rows.t(), None) if needs_weight else None,
            grad_rows.sum(0) if needs_bias else None,
            None,
        )


def gemm_onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by oneDNN, with a temporary packed copy of `right`."""
    if left.numel() == 0 or right.numel() == 0:
        return F.linear(left, right, bias)
    packed = onednn.pack(right, left.numel() // left.shape[-1])
    return onednn.packed_linear(left, packed, bias)


def gemm_split_bf16(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply on bf16 tiles, with a temporary packed copy of `right`."""
    return split_bf16.matmul(left, right, split_bf16.terms_for_precision(), bias)


@functools.cache
def _preferred(requested: str | None) -> GemmChoice:
    """Return the requested GEMM, or else that of the CPU model. `choose_gemm` then checks that it can serve."""
    by_request = f"BEIT_FAST_CPU_LINEAR={requested} was set when beit_fast was imported" if requested else None
    if requested == "split_bf16" or (not requested and split_bf16.unsupported_reason() is None):
        reason = by_request or "the CPU has AMX tiles, on which fp32 as three bf16 terms is faster than fp32 vectors"
        return GemmChoice("split_bf16", reason, gemm_split_bf16, _MIN_ROWS_SPLIT_BF16)
    reason_for_blas = _reason_for_blas()
    if requested == "blas" or (not requested and reason_for_blas is not None):
        return GemmChoice("blas", by_request or str(reason_for_blas))
    reason = by_request or "MKL runs AVX2 kernels on AMD CPUs, oneDNN AVX-512"
    return GemmChoice("onednn", reason, gemm_onednn, _MIN_ROWS_ONEDNN)


def _reason_for_blas() -> str | None:
    """Return the reason to prefer BLAS to oneDNN on this machine; None if oneDNN is faster."""
    if not torch.backends.mkl.is_available():
        return "torch's BLAS is not MKL"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU has no AVX-512"
    vendor, family = _cpu_identity()
    if vendor != "AuthenticAMD":
        return f"MKL is as fast as oneDNN on CPUs of {vendor}"
    if family < _WIDE_AVX512_FAMILY:
        return f"AVX-512 is not wider than AVX2 on AMD CPUs of family {family}"
    return None


def _cpu_identity() -> tuple[str, int]:
    """The CPU's vendor (such as `"GenuineIntel"`) and family; `("unknown make", 0)` on systems other than Linux."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        fields = {}
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    return facts.get("vendor_id", "unknown make"), int(facts.get("cpu family", 0))
