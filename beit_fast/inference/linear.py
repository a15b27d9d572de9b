"""A linear layer for inference with what follows it: one class for each library that can multiply its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cpu_linear import onednn, split_bf16
from ..ops.dispatch import availability
from ..ops.linear_gelu import linear_gelu
from .folding import Affine


class InferenceLinear(nn.Module):
    """`x W^T + b`, plainly; subclasses hold the weight in another form and fuse what follows.

    `activation` is applied to the result by `forward`; `add` gives the result plus a residual and has no activation.
    Where the library `has_gelu`, exact GELU is left to its product: `gelu` is then true, and `activation` None.
    """

    library = "torch"
    has_gelu = False

    def __init__(self, affine: Affine, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = affine.weight, affine.bias  # no buffers: what is packed is not for others to read
        self.gelu = self.has_gelu and is_exact_gelu(activation)
        self.activation = None if self.gelu else activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        out = F.linear(x, self.weight, self.bias)
        return out if self.activation is None else self.activation(out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual + x W^T + b`."""
        return residual + F.linear(x, self.weight, self.bias)

    def weight_bytes(self) -> int:
        """Bytes of weight and bias as they are held here."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.weight, self.bias))


class PackedLinear(InferenceLinear):
    """On oneDNN, the weight laid out for it; exact GELU and the residual are part of the product."""

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
    """fp32 on a CPU's bf16 tiles, by the package's own kernel; exact GELU and the residual are part of the product."""

    library = "c++"
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
    """A linear layer and exact GELU in one Triton kernel."""

    library = "triton"
    has_gelu = True

    def forward(self, x: Tensor) -> Tensor:
        return linear_gelu(x, self.weight, self.bias)


def is_exact_gelu(activation: nn.Module | None) -> bool:
    """Whether `activation` is GELU with erf, not its tanh form."""
    return type(activation) is nn.GELU and activation.approximate == "none"


def build_linear(affine: Affine, rows: int, activation: nn.Module | None = None) -> InferenceLinear:
    """The linear layer on the fastest library that takes its weight; `rows` is how many inputs it is packed for."""
    device, dtype = affine.weight.device, affine.weight.dtype
    if is_exact_gelu(activation) and not availability.linear_gelu_refusals(device, dtype, affine.weight.shape[0]):
        return GeluLinear(affine, activation)
    if device.type == "cpu" and dtype == torch.float32 and split_bf16.unsupported_reason() is None:
        return SplitBf16Linear(affine, activation)
    if onednn.packing_refusal(device, dtype) is None:
        return PackedLinear(affine, activation, rows)
    return InferenceLinear(affine, activation)
