"""Linear layers on oneDNN with packed weights.

They call private operators of PyTorch, which Inductor's freezing also uses: `torch.ops.mkldnn._reorder_linear_weight`
and `_linear_pointwise`. The operators may change in any release of torch, so `unsupported_reason` checks them once on
small matrices. Every caller falls back to public operators if it returns a reason. The operators have no derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...utils.messages import join_choices
from ..dispatch.availability import dtype_reasons

ACTIVATIONS = {"none": ("none", ""), "gelu": ("gelu", "none")}
"""oneDNN's name and algorithm for each activation of `packed_linear`; `"gelu"` is the exact form, by erf."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHECK_TOLERANCE = 64  # eps of the dtype, of the largest output; a wrong layout or activation is off by far more


def unsupported_reason(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return the reason why oneDNN cannot pack weights of `dtype` on `device`; None if it can.

    Call it before the other functions here. The first call for a dtype runs the operators once.
    """
    if torch.device(device).type != "cpu":
        return f"oneDNN serves cpu tensors, not {torch.device(device).type}"
    for reason in dtype_reasons([dtype], _DTYPES):
        return reason
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if torch._C._len_torch_dispatch_stack() > 0:  # the check would see fake or recorded tensors
        return "a mode that intercepts torch's operators is active"
    return _check(dtype)


def pack(weight: Tensor, rows: int) -> Tensor:
    """Copy `weight` to oneDNN's layout for inputs of about `rows` rows.

    The weight is `[out, in]` with any strides. The copy is opaque: it has the shape and dtype of the weight, but it
    cannot be deep-copied or saved. It accepts inputs with any number of rows and is fastest for `rows`. Later changes
    to `weight` have no effect on it.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [out, in] and not empty, not of shape {list(weight.shape)}")
    return _operators()[0](weight.detach(), max(rows, 1))


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """`activation(x W^T + bias)`, `[..., in]` to a contiguous `[..., out]`; `activation` is a name of `ACTIVATIONS`.

    The bias is `[out]`, and x, bias and weight have one dtype; x may have any strides.

    Raises:
        ValueError: If sizes or dtypes do not fit, or the activation is unknown.
        RuntimeError: If a gradient is required.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not supported (expected {join_choices(ACTIVATIONS)})")
    _check_arguments(x, packed, bias)
    name, algorithm = ACTIVATIONS[activation]
    return _operators()[1](x, packed, bias, name, [], algorithm)


def packed_linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x W^T + bias + residual`, the sum in the same pass; residual is `[..., out]` and is not written to.

    Otherwise as `packed_linear`.
    """
    _check_arguments(x, packed, bias, residual)
    return _operators()[2](x, residual, packed, bias, "add")


def _check_arguments(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> None:
    """Check shapes, dtypes and gradients: oneDNN's errors name no shapes, and autograd would only warn."""
    width, size = packed.shape
    expected = {
        "x": (x, (*x.shape[:-1], size)),
        "bias": (bias, (width,)),
        "residual": (residual, (*x.shape[:-1], width)),
    }
    errors = []
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            errors.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != packed.dtype:
            errors.append(f"{name} is {tensor.dtype}, not {packed.dtype}")
    if errors:
        raise ValueError(f"a packed linear layer with weight {[width, size]} cannot serve: {'; '.join(errors)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual)):
        raise RuntimeError("a packed linear has no derivative: call it under torch.no_grad() or on detached tensors")


@functools.cache
def _operators() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return the operators (pack, linear, linear with a residual).

    Raises:
        AttributeError: If this version of torch lacks one.
    """
    operators = torch.ops.mkldnn
    pointwise = operators._linear_pointwise
    return operators._reorder_linear_weight.default, pointwise.default, pointwise.binary


@functools.cache
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _check(dtype: torch.dtype) -> str | None:
    """Run the operators on small numbers, which are exact in any dtype; return why they are unusable, or None."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight, bias, residual = (
        torch.randint(-4, 5, shape, generator=generator, device="cpu").to(dtype) / 4
        for shape in ((2, 5, 48), (40, 48), (40,), (2, 5, 40))
    )
    plain = F.linear(x.float(), weight.float(), bias.float())
    try:
        packed = pack(weight, 10)
        computed = {
            "a linear": (packed_linear(x, packed, bias), plain),
            "a linear with GELU": (packed_linear(x, packed, bias, "gelu"), F.gelu(plain)),
            "a linear with a residual": (packed_linear_add(x, packed, bias, residual), plain + residual.float()),
        }
    except (AttributeError, RuntimeError) as error:
        return f"oneDNN's packed linears cannot run in {dtype}: {str(error).splitlines()[0]}"
    limit = _CHECK_TOLERANCE * torch.finfo(dtype).eps
    wrong = [
        name
        for name, (got, expected) in computed.items()
        if not bool((got.float() - expected).abs().max() <= limit * expected.abs().max())
    ]
    return f"oneDNN's packed linears are wrong in {dtype}: {', '.join(wrong)}" if wrong else None
