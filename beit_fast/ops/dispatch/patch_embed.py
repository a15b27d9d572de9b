"""The dispatcher of patch embedding: the convolution or the operator, and why the operator cannot take its place.

`"conv"` is the readable reference, `nn.Conv2d` and the steps after it; `"fused"` is the operator
`beit_fast::patch_embed`, from pixels to tokens in one call. None means `"fused"` where attention runs `"triton"`, else
`"conv"`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.messages import join_choices
from ...utils.names import PATCH_EMBED_IMPLEMENTATIONS
from . import attention, availability


def check_implementation(name: str | None) -> str | None:
    """`name` itself if it is an implementation of patch embedding or None, else ValueError."""
    if name is not None and name not in PATCH_EMBED_IMPLEMENTATIONS:
        accepted = join_choices((*PATCH_EMBED_IMPLEMENTATIONS, None))
        raise ValueError(f"patch_embed_implementation={name!r} is not supported (expected {accepted})")
    return name


def resolve(
    implementation: str | None, attn_implementation: str | None, weight: Tensor, head_dim: int, obstacles: list[str]
) -> str:
    """The implementation that will run; None follows attention as it runs for `weight`'s device and dtype.

    Raises:
        ValueError: `"fused"` was asked for and something stands in its way, or attention cannot be resolved.
    """
    obstacles = [*obstacles, *availability.onnx_refusals()]
    if implementation is None:
        attends = attention.resolve(attn_implementation, weight.device, weight.dtype, head_dim)
        return "fused" if attends == "triton" and not obstacles else "conv"
    if implementation == "fused" and obstacles:
        raise ValueError(
            f"patch_embed_implementation='fused' cannot serve this model: {'; '.join(obstacles)}. "
            "Use 'conv', or None to follow attention where nothing stands in the way."
        )
    return implementation


def kernel_name(resolved: str, pixels: Tensor, weight: Tensor) -> str:
    """What runs in the end: `"conv"`, or the kernel behind `"fused"`, such as `"fused/c++"`."""
    if resolved != "fused":
        return resolved
    if pixels.dtype == torch.uint8:
        return availability.patch_embed_kernel(pixels.device, [weight.dtype], pixels.shape[1])
    return availability.patch_embed_kernel(pixels.device, [weight.dtype, pixels.dtype])


@dataclass(frozen=True)
class PatchEmbedReport:
    """Which patch embedding ran in a model, and why others did not; `str()` is for people.

    Attributes:
        requested: the `patch_embed_implementation` asked for, None if it follows attention.
        ran: what ran last, `"conv"` or a kernel behind `"fused"`; None if nothing has outside `torch.compile`.
        would_run: what would run on float pixels of the parameters' dtype, on their device.
        refusals: for every kernel behind `"fused"`, why it does not serve there; empty where it does.
    """

    requested: str | None
    ran: str | None
    would_run: str
    refusals: dict[str, tuple[str, ...]]

    @property
    def kernel(self) -> str:
        """What ran, or what would run where nothing has."""
        return self.would_run if self.ran is None else self.ran

    def __str__(self) -> str:
        state = "has not run yet, would run" if self.ran is None else "ran"
        lines = [f"patch embedding: {self.kernel} ({state}; patch_embed_implementation={self.requested!r})"]
        lines += [f"  {name}: {'; '.join(reasons) or 'available'}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def report(
    requested: str | None,
    ran: str | None,
    attn_implementation: str | None,
    weight: Tensor,
    head_dim: int,
    obstacles: list[str],
) -> PatchEmbedReport:
    """The report of a model whose parameters are like `weight`."""
    refusals = {
        name: (*availability.patch_embed_refusals(name, weight.device, [weight.dtype]), *obstacles)
        for name in availability.PATCH_EMBED_KERNELS
    }
    try:
        would_run = kernel_name(resolve(requested, attn_implementation, weight, head_dim, obstacles), weight, weight)
    except ValueError:
        would_run = "none"
    return PatchEmbedReport(requested, ran, would_run, refusals)
