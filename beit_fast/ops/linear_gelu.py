"""`beit_fast::linear_gelu`: a linear layer followed by the exact GELU, for inference.

CUDA runs one Triton kernel, which is imported at the first call. Other devices run PyTorch's two operations, or
Triton's interpreter if `TRITON_INTERPRET=1` was set before this import. BEiT's GELU uses the error function; the GELU
that cuBLASLt fuses uses the tanh approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import LINEAR_GELU, LinearGeluArguments
from .dispatch import availability
from .functorch import raise_on_forward_mode
from .library import TYPE_ERRORS, Autograd, Kernel, register_op
from .transforms import cast_first, map_entries
from .validation import linear_gelu_errors, raise_type_errors


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu(x @ weight.T + bias)` with the exact GELU, for inference.

    Args:
        x: `[..., inputs]`, any strides.
        weight: `[outputs, inputs]` in the dtype of x, any strides.
        bias: `[outputs]` in the dtype of x, or None.

    Returns:
        `[..., outputs]`, contiguous, in the dtype of x. On CUDA sums and GELU are fp32 and rounded once; products of
        fp32 follow `torch.backends.cuda.matmul.fp32_precision`.

    Raises:
        TypeError: If arguments have a wrong type; the error lists all of them.
        ValueError: If shapes, dtypes or devices do not fit, or no kernel serves them; the error lists every reason.
        RuntimeError: If a derivative is requested, backward or forward.
    """
    raise_on_forward_mode(x, weight, bias)
    try:
        return linear_gelu_op(x, weight, bias)
    except TYPE_ERRORS:
        raise_type_errors("linear_gelu", LinearGeluArguments(x, weight, bias))
        raise


def lacks_matrix_instructions(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether the kernel multiplies number by number.

    Then two operations are faster: docs/counts.md has the counts.
    """
    return device_type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def _fallback(arguments: LinearGeluArguments) -> Tensor:
    return F.gelu(F.linear(*arguments)).contiguous()


def _unsupported_reasons(arguments: LinearGeluArguments) -> Sequence[str]:
    x, weight, _ = arguments
    return availability.linear_gelu_unsupported_reasons(x.device, x.dtype, weight.shape[0] if weight.ndim == 2 else 0)


def _launch(arguments: LinearGeluArguments) -> Tensor:
    from ..kernels.linear_gelu import launch

    return launch.linear_gelu(*arguments)


def _fake(arguments: LinearGeluArguments) -> Tensor:
    x, weight, _ = arguments
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _raise_on_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::linear_gelu is for inference and has no gradient; train with nn.Linear followed by nn.GELU"
    )


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    x_dim, weight_dim, bias_dim = in_dims
    if weight_dim is not None or bias_dim is not None:
        return map_entries(linear_gelu_op, info.batch_size, in_dims, args)
    return linear_gelu_op(args[0].movedim(x_dim, 0), *args[1:]), 0


linear_gelu_op = register_op(
    LINEAR_GELU,
    LinearGeluArguments,
    errors=linear_gelu_errors,
    fallback=Kernel(_fallback),
    triton=Kernel(_launch, _unsupported_reasons),
    fake=_fake,
    autograd=Autograd(_raise_on_backward),
    vmap=_vmap,
    autocast=cast_first(3),  # as autocast casts a linear layer
)
