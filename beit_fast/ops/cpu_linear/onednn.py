"""oneDNN's packed linears, which torch keeps private: the one file that calls private operators, behind a check.

`torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise` are what Inductor's freezing uses. They may change in
any release of torch, so `packing_refusal` runs them once on small matrices before anybody relies on them, and every
caller has a path on public operators for where it gives a reason. None of them has a derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": ("none", ""), "gelu": ("gelu", "none")}
"""What `packed_linear` can apply to its output, as oneDNN's name and algorithm; `"gelu"` is the exact form, by erf."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHECK_TOLERANCE = 64  # eps of the dtype, of the largest output; a wrong layout or activation is off by far more


def packing_refusal(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why weights of `dtype` cannot be packed for oneDNN on `device`, or None where they can.

    Ask before the other functions here are used. The first question for a dtype runs the operators once.
    """
    if torch.device(device).type != "cpu":
        return f"oneDNN serves cpu tensors, not {torch.device(device).type}"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is none of {', '.join(str(known).removeprefix('torch.') for known in _DTYPES)}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if torch._C._len_torch_dispatch_stack() > 0:  # the check would see fake or recorded tensors
        return "a mode that intercepts torch's operators is active"
    return _check(dtype)


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of `weight`, `[out, in]` with any strides, in oneDNN's layout for inputs of about `rows` rows.

    The copy is opaque: `shape` and `dtype` are the weight's, its memory is oneDNN's own and it cannot be deep-copied
    or saved. It serves inputs of any number of rows, fastest those it was packed for, and later changes of `weight`
    do not reach it.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"pack takes a weight [out, in] that is not empty, not one of shape {list(weight.shape)}")
    return _operators()[0](weight.detach(), max(rows, 1))


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """`activation(x W^T + bias)`, `[..., in]` to a contiguous `[..., out]`; `activation` is a name of `ACTIVATIONS`.

    The bias is `[out]`, and x, bias and weight have one dtype; x may have any strides.

    Raises:
        ValueError: sizes or dtypes do not fit, or the activation is unknown.
        RuntimeError: a gradient would be needed.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted are {', '.join(map(repr, ACTIVATIONS))}")
    _refuse_misfits(x, packed, bias)
    name, algorithm = ACTIVATIONS[activation]
    return _operators()[1](x, packed, bias, name, [], algorithm)


def packed_linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x W^T + bias + residual`, the sum in the same pass; residual is `[..., out]` and is not written to.

    Otherwise as `packed_linear`.
    """
    _refuse_misfits(x, packed, bias, residual)
    return _operators()[2](x, residual, packed, bias, "add")


def _refuse_misfits(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> None:
    """oneDNN's own errors name neither shapes nor dtypes, and autograd would drop the gradient with a warning."""
    width, size = packed.shape
    expected = {
        "x": (x, (*x.shape[:-1], size)),
        "bias": (bias, (width,)),
        "residual": (residual, (*x.shape[:-1], width)),
    }
    problems = []
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
        if tensor.dtype != packed.dtype:
            problems.append(f"{name} is {tensor.dtype}, not {packed.dtype}")
    if problems:
        raise ValueError(f"a packed linear of weight {[width, size]}: {'; '.join(problems)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual)):
        raise RuntimeError("a packed linear has no derivative: call it under torch.no_grad() or on detached tensors")


@functools.cache
def _operators() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(pack, linear, linear with a residual); AttributeError where this torch lacks one."""
    operators = torch.ops.mkldnn
    pointwise = operators._linear_pointwise
    return operators._reorder_linear_weight.default, pointwise.default, pointwise.binary


@functools.cache
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _check(dtype: torch.dtype) -> str | None:
    """Why the operators cannot be relied on for `dtype`, found by running them on small numbers, exact in any dtype."""
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
