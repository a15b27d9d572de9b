"""The one dispatcher of attention: a name chooses a function, and a backend that cannot serve says why.

`"eager"` and `"sdpa"` are the readable references and materialise the bias; `"triton"` is the operator
`beit_fast::rel_pos_attention`. None means `"triton"` where a fused kernel serves the device and dtype, else `"sdpa"`,
as in an export to ONNX, which has no such operator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...utils.messages import join_choices
from ...utils.names import ATTENTION_IMPLEMENTATIONS
from . import availability


def check_implementation(name: str | None) -> str | None:
    """`name` itself if it is an attention implementation or None, else ValueError."""
    if name is not None and name not in ATTENTION_IMPLEMENTATIONS:
        accepted = join_choices((*ATTENTION_IMPLEMENTATIONS, None))
        raise ValueError(f"attn_implementation={name!r} is not supported (expected {accepted})")
    return name


def resolve(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The implementation that will run: None is decided by device and dtype, `"triton"` is checked.

    Raises:
        ValueError: the name is unknown, or `"triton"` was asked for and no kernel serves; lists every kernel's reasons.
    """
    return choose(implementation, device, dtype, head_dim)[0]


def kernel_name(implementation: str | None, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """What runs in the end: `"eager"`, `"sdpa"`, or the kernel behind `"triton"`, such as `"triton/cuda"`."""
    return choose(implementation, torch.device(device), dtype, head_dim)[1]


def choose(implementation: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Choose (implementation, kernel): the same throughout a process, except in an export to ONNX."""
    refusals = availability.onnx_refusals()
    if not refusals or implementation in ("eager", "sdpa"):
        return _decide(implementation, device, dtype, head_dim)
    if check_implementation(implementation) is None:
        return "sdpa", "sdpa"
    raise ValueError(
        f"attn_implementation={implementation!r} cannot serve: {'; '.join(refusals)}. "
        "Use 'sdpa' or 'eager', or None, which takes 'sdpa' there."
    )


# What torch.compiler.assume_constant_result sets; calling that imports Dynamo, which takes a second.
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
            f"\n  {name}: {'; '.join(availability.kernel_refusals(name, device, dtype, head_dim))}"
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
    """Every kernel behind `"triton"` as (name, whether it serves, why not); each on its own device type if None."""

    def place(kernel: str) -> torch.device:
        return torch.device(device or ("cuda" if kernel == "triton/cuda" else "cpu"))

    rows = [
        (kernel, availability.kernel_refusals(kernel, place(kernel), dtype, head_dim))
        for kernel in availability.KERNELS
    ]
    return [(kernel, not reasons, reasons) for kernel, reasons in rows]


@dataclass(frozen=True)
class AttentionReport:
    """Which attention ran in a model, and why others did not; `str()` is for people.

    Attributes:
        requested: the `attn_implementation` asked for, None if left to device and dtype.
        layers: the kernel that last ran in each layer, None where a layer has not run outside `torch.compile`.
        would_run: the kernel that would run for the parameters' device and dtype.
        refusals: for every kernel behind `"triton"`, why it does not serve there; empty where it does.
    """

    requested: str | None
    layers: tuple[str | None, ...]
    would_run: str
    refusals: dict[str, tuple[str, ...]]

    @property
    def kernel(self) -> str:
        """The kernel that ran, several joined by commas, or the one that would run where none has."""
        ran = sorted({kernel for kernel in self.layers if kernel is not None})
        return ", ".join(ran) if ran else self.would_run

    def __str__(self) -> str:
        count = sum(kernel is not None for kernel in self.layers)
        state = f"ran in {count} of {len(self.layers)} layers" if count else "has not run yet, would run"
        lines = [f"attention: {self.kernel} ({state}; attn_implementation={self.requested!r})"]
        lines += [f"  {name}: {'; '.join(reasons) or 'available'}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def report(
    requested: str | None,
    layers: Sequence[str | None],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> AttentionReport:
    """The report of a model with these parameters' device and dtype."""
    refusals = {name: availability.kernel_refusals(name, device, dtype, head_dim) for name in availability.KERNELS}
    try:
        would_run = kernel_name(requested, device, dtype, head_dim)
    except ValueError:
        would_run = "none"
    return AttentionReport(requested, tuple(layers), would_run, refusals)
