"""The operator `beit_fast::linear_gelu`: a linear layer with the exact GELU behind it, for inference.

CUDA runs one Triton kernel, imported at the first call; other devices run PyTorch's two operations, or Triton's
interpreter where `TRITON_INTERPRET=1` was set before this import. BEiT's GELU has the error function; the one that
cuBLASLt fuses has the tanh form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import library
from .dispatch import availability
from .validation import check_linear_gelu

library.define("linear_gelu(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
linear_gelu_op = torch.ops.beit_fast.linear_gelu.default


def _composite(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear_gelu(x, weight, bias)
    return F.gelu(F.linear(x, weight, bias)).contiguous()


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs = weight.shape[0] if weight.ndim == 2 else 0
    check_linear_gelu(x, weight, bias, refusals=availability.linear_gelu_refusals(x.device, x.dtype, outputs))
    from ..kernels.linear_gelu import launch

    return launch.linear_gelu(x, weight, bias)


library.impl("linear_gelu", _composite, "CompositeExplicitAutograd")
for _key in ("CUDA", "CPU") if availability.INTERPRETED else ("CUDA",):
    library.impl("linear_gelu", _triton, _key)


@torch.library.register_fake("beit_fast::linear_gelu", lib=library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear_gelu(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::linear_gelu is for inference and has no gradient; train with nn.Linear followed by nn.GELU"
    )


torch.library.register_autograd("beit_fast::linear_gelu", _refuse_backward, lib=library)
