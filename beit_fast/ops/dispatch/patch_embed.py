"""Choose between the convolution and the operator for patch embedding.

If the operator cannot serve, the error lists the reasons. `"conv"` is the reference, `nn.Conv2d` and the steps after
it; `"fused"` is the operator `beit_fast::patch_embed`, from pixels to tokens in one call. None means `"fused"` if
attention runs `"triton"`, else `"conv"`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.messages import join_choices
from ...utils.names import PATCH_EMBED_IMPLEMENTATIONS, PatchEmbedImplementation
from . import attention, availability


def check_implementation(name: str | None) -> PatchEmbedImplementation | None:
    """Return `name` if it is an implementation of patch embedding or None.

    Raises:
        ValueError: If the name is unknown.
    """
    if name is None:
        return None
    for known in PATCH_EMBED_IMPLEMENTATIONS:
        if name == known:
            return known
    accepted = join_choices((*PATCH_EMBED_IMPLEMENTATIONS, None))
    raise ValueError(f"patch_embed_implementation={name!r} is not supported (expected {accepted})")


def resolve(
    implementation: str | None,
    attn_implementation: str | None,
    weight: Tensor,
    head_dim: int,
    unsupported_reasons: list[str],
    attention_backend: str | None = None,
) -> str:
    """Resolve an implementation; None follows attention for the device and dtype of `weight`.

    Args:
        implementation: requested implementation of patch embedding.
        attn_implementation: requested attention implementation.
        weight: a parameter of the embedding.
        head_dim: head dimension of attention.
        unsupported_reasons: why the operator cannot replace the modules of this model.
        attention_backend: the resolved attention implementation, if the caller has chosen it.

    Raises:
        ValueError: If `"fused"` was requested but cannot serve, or attention cannot be resolved.
    """
    unsupported_reasons = [*unsupported_reasons, *availability.onnx_unsupported_reasons()]
    if implementation is None:
        if attention_backend is None:
            attention_backend = attention.resolve(attn_implementation, weight.device, weight.dtype, head_dim)
        return "fused" if attention_backend == "triton" and not unsupported_reasons else "conv"
    if implementation == "fused" and unsupported_reasons:
        raise ValueError(
            f"patch_embed_implementation='fused' cannot serve this model: {'; '.join(unsupported_reasons)}. "
            "Use 'conv', or None, which follows attention if the operator can serve."
        )
    return implementation


def kernel_name(resolved: str, pixels: Tensor, weight: Tensor) -> str:
    """The kernel of a resolved implementation: `"conv"`, or for `"fused"` one of `PATCH_EMBED_KERNELS`."""
    if resolved != "fused":
        return resolved
    if pixels.dtype == torch.uint8:
        return availability.patch_embed_kernel(pixels.device, [weight.dtype], pixels.shape[1])
    return availability.patch_embed_kernel(pixels.device, [weight.dtype, pixels.dtype])


@dataclass(frozen=True)
class PatchEmbedReport:
    """Patch embedding that ran in a model, and why others cannot.

    `str()` returns a readable summary.

    Attributes:
        requested: `patch_embed_implementation`, None if it follows attention.
        ran: what ran last, `"conv"` or a kernel of `"fused"`; None if nothing has run outside `torch.compile`.
        would_run: what would run on float pixels of the parameters' dtype, on their device.
        unsupported_reasons: for each kernel of `"fused"`, why it cannot serve there; empty if it can.
    """

    requested: str | None
    ran: str | None
    would_run: str
    unsupported_reasons: dict[str, tuple[str, ...]]

    @property
    def kernel(self) -> str:
        """The kernel that ran; if none has run, the kernel that would run."""
        return self.would_run if self.ran is None else self.ran

    def __str__(self) -> str:
        state = "has not run yet, would run" if self.ran is None else "ran"
        lines = [f"patch embedding: {self.kernel} ({state}; patch_embed_implementation={self.requested!r})"]
        lines += [
            f"  {name}: {'; '.join(reasons) or 'available'}" for name, reasons in self.unsupported_reasons.items()
        ]
        return "\n".join(lines)


def report(
    requested: str | None,
    ran: str | None,
    attn_implementation: str | None,
    weight: Tensor,
    head_dim: int,
    unsupported_reasons: list[str],
) -> PatchEmbedReport:
    """Report on a model with parameters like `weight`; arguments as in `resolve`."""
    reasons: dict[str, tuple[str, ...]] = {
        name: (*availability.patch_embed_unsupported_reasons(name, weight.device, [weight.dtype]), *unsupported_reasons)
        for name in availability.PATCH_EMBED_KERNELS
    }
    try:
        would_run = kernel_name(
            resolve(requested, attn_implementation, weight, head_dim, unsupported_reasons), weight, weight
        )
    except ValueError:
        would_run = "none"
    return PatchEmbedReport(requested, ran, would_run, reasons)
