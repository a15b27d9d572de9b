"""Linear layers for inference, with fused activation or residual: one class per GEMM library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cpu_linear import onednn, split_bf16
from ..ops.dispatch import availability
from ..ops.linear_gelu import lacks_matrix_instructions, linear_gelu
from .folding import Affine


class InferenceLinear(nn.Module):
    """Compute `x W^T + b` with `F.linear`; subclasses pack the weight and fuse the next operation.

    `forward` applies `activation`. `add` adds a residual and applies no activation. If the library `has_gelu`, exact
    GELU is part of the GEMM: `gelu` is then True and `activation` is None.
    """

    library = "torch"
    has_gelu = False

    def __init__(self, affine: Affine, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = (
            affine.weight,
            affine.bias,
        )  # not buffers: not in the state_dict
        self.gelu = self.has_gelu and is_exact_gelu(activation)
        self.activation = None if self.gelu else activation

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for `[..., in]`."""
        out = F.linear(x, self.weight, self.bias)
        return out if self.activation is None else self.activation(out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return `residual + x W^T + b`."""
        return residual + F.linear(x, self.weight, self.bias)

    def weight_bytes(self) -> int:
        """Return the bytes of the packed weight and the bias."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.weight, self.bias))


class PackedLinear(InferenceLinear):
    """A oneDNN linear layer with a packed weight; exact GELU and the residual are fused."""

    library = "onednn"
    has_gelu = True

    def __init__(self, affine: Affine, activation: nn.Module | None, rows: int) -> None:
        super().__init__(affine, activation)
        self._weight_bytes = super().weight_bytes()
        self.weight = onednn.pack(affine.weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        out = onednn.packed_linear(x, self.weight, self.bias, "gelu" if self.gelu else "none")
        return out if self.activation is None else self.activation(out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return onednn.packed_linear_add(x, self.weight, self.bias, residual)

    def weight_bytes(self) -> int:
        return self._weight_bytes


class SplitBf16Linear(InferenceLinear):
    """An fp32 linear layer as split bf16 on AMX; exact GELU and the residual are fused."""

    library = "cpp"
    has_gelu = True

    def __init__(self, affine: Affine, activation: nn.Module | None) -> None:
        super().__init__(affine, activation)
        self.outputs, self.terms = affine.weight.shape[0], split_bf16.terms_for_precision()
        self.weight = split_bf16.pack(affine.weight, self.terms)

    def forward(self, x: Tensor) -> Tensor:
        out = split_bf16.linear(x, self.weight, self.outputs, self.terms, self.bias, gelu=self.gelu)
        return out if self.activation is None else self.activation(out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return split_bf16.linear(x, self.weight, self.outputs, self.terms, self.bias, residual)


class GeluLinear(InferenceLinear):
    """A linear layer with exact GELU in one Triton kernel.

    Where the kernel lacks matrix instructions, two operations run.
    """

    library = "triton"
    has_gelu = True

    def forward(self, x: Tensor) -> Tensor:
        if lacks_matrix_instructions(x.device.type, x.dtype):
            return F.gelu(F.linear(x, self.weight, self.bias))
        return linear_gelu(x, self.weight, self.bias)


def is_exact_gelu(activation: nn.Module | None) -> bool:
    """Whether `activation` is GELU with erf, not the tanh approximation."""
    return type(activation) is nn.GELU and activation.approximate == "none"


def build_linear(affine: Affine, rows: int, activation: nn.Module | None = None) -> InferenceLinear:
    """Build the linear layer for the fastest library that supports its weight.

    If the library packs the weight, it is packed for `rows` inputs.
    """
    device, dtype = affine.weight.device, affine.weight.dtype
    if is_exact_gelu(activation) and not availability.linear_gelu_unsupported_reasons(
        device, dtype, affine.weight.shape[0]
    ):
        return GeluLinear(affine, activation)
    if device.type == "cpu" and dtype == torch.float32 and split_bf16.unsupported_reason() is None:
        return SplitBf16Linear(affine, activation)
    if onednn.unsupported_reason(device, dtype) is None:
        return PackedLinear(affine, activation, rows)
    return InferenceLinear(affine, activation)
