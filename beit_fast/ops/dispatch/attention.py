"""Choose the attention implementation and its kernel.

If none can serve, the error lists the reasons. `"eager"` and `"sdpa"` are references that materialize the bias;
`"triton"` is the operator `beit_fast::rel_pos_attention`. None means `"triton"` if a fused kernel serves the device and
dtype, else `"sdpa"`. In an export to ONNX, which has no such operator, None means `"sdpa"`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...utils.messages import join_choices
from ...utils.names import ATTENTION_IMPLEMENTATIONS, AttentionImplementation
from . import availability


def check_implementation(name: str | None) -> AttentionImplementation | None:
    """Return `name` if it is an attention implementation or None.

    Raises:
        ValueError: If the name is unknown.
    """
    if name is None:
        return None
    for known in ATTENTION_IMPLEMENTATIONS:
        if name == known:
            return known
    accepted = join_choices((*ATTENTION_IMPLEMENTATIONS, None))
    raise ValueError(f"attn_implementation={name!r} is not supported (expected {accepted})")


def resolve(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Resolve an implementation: None by device and dtype, `"triton"` if a kernel can serve.

    Raises:
        ValueError: If the name is unknown, or no kernel serves `"triton"`; the error lists every kernel's reasons.
    """
    return choose(implementation, device, dtype, head_dim)[0]


def kernel_name(implementation: str | None, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel of an implementation: `"eager"`, `"sdpa"`, or for `"triton"` one of `availability.KERNELS`."""
    return choose(implementation, torch.device(device), dtype, head_dim)[1]


def choose(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return the (implementation, kernel) to run. Both are constant within a process, except in an export to ONNX."""
    reasons = availability.onnx_unsupported_reasons()
    if not reasons or implementation in ("eager", "sdpa"):
        return _decide(implementation, device, dtype, head_dim)
    if check_implementation(implementation) is None:
        return "sdpa", "sdpa"
    raise ValueError(
        f"attn_implementation={implementation!r} cannot serve: {'; '.join(reasons)}. "
        "Use 'sdpa' or 'eager', or None, which selects 'sdpa' there."
    )


# torch.compiler.assume_constant_result sets this attribute, but importing Dynamo for it takes a second.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    check_implementation(implementation)
    if implementation in ("eager", "sdpa"):
        return implementation, implementation
    kernel = availability.serving_kernel(device, dtype, head_dim)
    if implementation is None and not availability.is_fused(kernel):
        return "sdpa", "sdpa"
    if kernel is None:
        reasons = "".join(
            f"\n  {name}: {'; '.join(availability.attention_unsupported_reasons(name, device, dtype, head_dim))}"
            for name in availability.KERNELS
        )
        raise ValueError(
            f"attn_implementation='triton' cannot serve {dtype} with head dimension {head_dim} on {device}:{reasons}\n"
            "Use 'sdpa' or 'eager', or None to choose by device and dtype."
        )
    return "triton", kernel


def describe_kernels(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> list[tuple[str, bool, tuple[str, ...]]]:
    """List the kernels of `"triton"` and whether each can serve.

    An entry is (name, whether it can serve, reasons why not). If `device` is None, each kernel is described on its own
    device type.
    """

    def device_of(kernel: str) -> torch.device:
        return torch.device(device or ("cuda" if kernel == "triton" else "cpu"))

    rows = [
        (kernel, availability.attention_unsupported_reasons(kernel, device_of(kernel), dtype, head_dim))
        for kernel in availability.KERNELS
    ]
    return [(kernel, not reasons, reasons) for kernel, reasons in rows]


@dataclass(frozen=True)
class AttentionReport:
    """Attention kernels that ran in a model, and why others cannot.

    `str()` returns a readable summary.

    Attributes:
        requested: `attn_implementation`, None if device and dtype decide.
        layers: the kernel that last ran in each layer; None for a layer that has not run outside `torch.compile`.
        would_run: the kernel that would run for the parameters' device and dtype.
        unsupported_reasons: for each kernel of `"triton"`, why it cannot serve there; empty if it can.
    """

    requested: str | None
    layers: tuple[str | None, ...]
    would_run: str
    unsupported_reasons: dict[str, tuple[str, ...]]

    @property
    def has_run(self) -> bool:
        """Whether attention has run in a layer, outside `torch.compile`."""
        return any(kernel is not None for kernel in self.layers)

    @property
    def kernel(self) -> str:
        """The kernels that ran, joined by commas; if none has run, the kernel that would run."""
        ran = sorted({kernel for kernel in self.layers if kernel is not None})
        return ", ".join(ran) if ran else self.would_run

    def __str__(self) -> str:
        count = sum(kernel is not None for kernel in self.layers)
        state = f"ran in {count} of {len(self.layers)} layers" if count else "has not run yet, would run"
        lines = [f"attention: {self.kernel} ({state}; attn_implementation={self.requested!r})"]
        lines += [
            f"  {name}: {'; '.join(reasons) or 'available'}" for name, reasons in self.unsupported_reasons.items()
        ]
        return "\n".join(lines)


def report(
    requested: str | None,
    layers: Sequence[str | None],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> AttentionReport:
    """Report on a model with parameters of this device and dtype."""
    reasons: dict[str, tuple[str, ...]] = {
        name: availability.attention_unsupported_reasons(name, device, dtype, head_dim) for name in availability.KERNELS
    }
    try:
        would_run = kernel_name(requested, device, dtype, head_dim)
    except ValueError:
        would_run = "none"
    return AttentionReport(requested, tuple(layers), would_run, reasons)
