"""`beit_fast::residual_norm` and `residual_add`: residual, layer scale, drop path and LayerNorm in one operator.

`residual_norm` computes `sum = residual + drop_path_scale * scale * branch` and its LayerNorm; `residual_add` computes
the sum alone. CUDA runs Triton kernels, which are imported at the first call. CPU runs PyTorch operations, or Triton's
interpreter if `TRITON_INTERPRET=1` was set before this import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    RESIDUAL_ADD,
    RESIDUAL_ADD_BACKWARD,
    RESIDUAL_NORM,
    RESIDUAL_NORM_BACKWARD,
    ResidualAddArguments,
    ResidualAddBackwardArguments,
    ResidualNormArguments,
    ResidualNormBackwardArguments,
)
from .dispatch import availability
from .fallback import residual_norm as fallback
from .fallback.residual_norm import sum_dtype
from .functorch import raise_on_forward_mode
from .library import TYPE_ERRORS, Autograd, Kernel, register_op
from .validation import (
    raise_type_errors,
    residual_add_backward_errors,
    residual_add_errors,
    residual_norm_backward_errors,
    residual_norm_errors,
)


def residual_norm(
    residual: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual branch and apply LayerNorm to the sum.

    The results are `sum = residual + drop_path_scale * scale * branch` and `LayerNorm(sum) * weight + bias`.

    Args:
        residual, branch: `[B, N, E]` in any float dtypes, any strides; without a branch residual is the sum.
        scale: layer scale `[E]`, or None for 1.
        drop_path_scale: fp32 `[B]`, the factor of drop path for the branch of each sample: 0 or 1 / keep_prob. None for
            1. It has no gradient.
        weight, bias: `[E]`, or None for 1 and 0.
        eps: added to the variance.
        dtype: of the normalized rows; that of the sum if None. Autocast sets the dtype of matrix products: eager's
            LayerNorm returns fp32 there, which the next product rounds to that dtype.

    Returns:
        The sum, in the dtype that PyTorch promotes residual, branch and scale to, and the normalized rows. Both are
        `[B, N, E]` and contiguous, but the sum is residual itself without a branch. Arithmetic is fp32 (fp64 for fp64,
        on CPU), and the rounded sum is what is normalized.

    Raises:
        TypeError: If arguments have a wrong type; the error lists all of them.
        ValueError: If shapes, dtypes or devices do not fit, or no kernel serves them; the error lists every reason.
        RuntimeError: If forward-mode or double differentiation is requested.
    """
    raise_on_forward_mode(residual, branch, scale, weight, bias)
    try:
        total, normalized, _, _ = residual_norm_op(residual, branch, scale, drop_path_scale, weight, bias, eps, dtype)
    except TYPE_ERRORS:
        arguments = ResidualNormArguments(residual, branch, scale, drop_path_scale, weight, bias, eps, dtype)
        raise_type_errors("residual_norm", arguments)
        raise
    return (residual if branch is None else total), normalized


def residual_add(
    residual: Tensor, branch: Tensor, scale: Tensor | None = None, drop_path_scale: Tensor | None = None
) -> Tensor:
    """`residual + drop_path_scale * scale * branch`; arguments, result and errors as in `residual_norm`."""
    raise_on_forward_mode(residual, branch, scale)
    try:
        return residual_add_op(residual, branch, scale, drop_path_scale)
    except TYPE_ERRORS:
        raise_type_errors("residual_add", ResidualAddArguments(residual, branch, scale, drop_path_scale))
        raise


def _unsupported_reasons(arguments: Any) -> Sequence[str]:
    """Return the reasons why the Triton kernels cannot serve these arguments.

    The arguments are those of any of the four operators.
    """
    named = arguments._asdict()
    rows = next(named[name] for name in ("residual", "sum", "grad") if name in named)  # [B, N, E]
    vectors_and_rows = (named.get(name) for name in _FLOATS)
    dtypes = [rows.dtype, *(tensor.dtype for tensor in vectors_and_rows if tensor is not None)]
    size = rows.shape[-1] if rows.ndim else 1
    return availability.residual_norm_unsupported_reasons(rows.device, dtypes, size, rows.numel() // max(size, 1))


_FLOATS = ("branch", "scale", "weight", "bias", "grad_sum", "grad_normalized")  # may have a dtype of their own


def _empty_norm(arguments: ResidualNormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty sum, normalized rows, mean and inverse deviation. Without a branch the sum has no elements."""
    residual, branch, scale = arguments[:3]
    promoted = sum_dtype(residual, branch, scale)
    total = residual.new_empty(0 if branch is None else residual.shape, dtype=promoted)
    normalized = residual.new_empty(residual.shape, dtype=arguments.dtype or promoted)
    mean = residual.new_empty(residual.shape[:2], dtype=torch.promote_types(promoted, torch.float32))
    return total, normalized, mean, torch.empty_like(mean)


def _empty_norm_gradients(arguments: ResidualNormBackwardArguments) -> tuple[Tensor, ...]:
    """Empty gradients of residual, branch, scale, weight and bias."""
    total, needed = arguments.sum, arguments.output_mask
    of_rows = _empty_row_gradients(total, (total.dtype, arguments.branch_dtype), needed[:2])
    vectors = (arguments.scale, arguments.weight, arguments.bias)
    return (*of_rows, *_empty_vector_gradients(total, vectors, needed[2:]))


def _empty_add_gradients(arguments: ResidualAddBackwardArguments) -> tuple[Tensor, ...]:
    """Empty gradients of branch and scale."""
    grad, (of_branch, of_scale) = arguments.grad, arguments.output_mask
    of_rows = _empty_row_gradients(grad, (arguments.branch_dtype,), [of_branch])
    return (*of_rows, *_empty_vector_gradients(grad, (arguments.scale,), [of_scale]))


def _empty_row_gradients(like: Tensor, dtypes: Sequence[torch.dtype], needed: Sequence[bool]) -> list[Tensor]:
    """Contiguous tensors of the shape of `like`, without elements if not needed."""
    return [like.new_empty(like.shape if flag else 0, dtype=dtype) for dtype, flag in zip(dtypes, needed, strict=True)]


def _empty_vector_gradients(rows: Tensor, vectors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Contiguous tensors like the vectors, without elements if not needed."""
    return [
        rows.new_empty(0) if x is None else rows.new_empty(x.shape if flag else 0, dtype=x.dtype)
        for x, flag in zip(vectors, needed, strict=True)
    ]


def _needed(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if flag else None for gradient, flag in zip(gradients, needed, strict=True)]


def _fill(gradients: Sequence[Tensor], needed: Sequence[bool], values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Copy `values` into the gradients that are needed, and return all gradients."""
    for gradient, value in zip(_needed(gradients, needed), values, strict=True):
        if gradient is not None and value is not None:
            gradient.copy_(value)
    return tuple(gradients)


def _norm_fallback(arguments: ResidualNormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, branch, scale, drop_path_scale, weight, bias, eps, dtype = arguments
    total = residual if branch is None else fallback.residual_add(residual, branch, scale, drop_path_scale)
    normalized = fallback.layer_norm(total, weight, bias, eps, dtype or total.dtype)
    return residual.new_empty(0) if branch is None else total, *normalized


def _norm_launch(arguments: ResidualNormArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.residual_norm import launch

    results = _empty_norm(arguments)
    total = None if arguments.branch is None else results[0]
    launch.fill_forward(*arguments[:7], total, *results[1:])
    return results


def _norm_backward_fallback(arguments: ResidualNormBackwardArguments) -> tuple[Tensor, ...]:
    grad_sum, grad_normalized, total, branch, scale, drop_path_scale, weight, _, mean, rstd, _, needed = arguments
    grad, grad_weight, grad_bias = grad_sum, None, None
    if grad_normalized is not None:
        grad, grad_weight, grad_bias = fallback.layer_norm_backward(grad_normalized, total, weight, mean, rstd)
        grad = grad if grad_sum is None else grad + grad_sum
    assert grad is not None  # `residual_norm_backward_errors`
    of_branch, of_scale = fallback.branch_backward(grad, branch, scale, drop_path_scale, needed[1:3])
    return _fill(_empty_norm_gradients(arguments), needed, (grad, of_branch, of_scale, grad_weight, grad_bias))


def _norm_backward_launch(arguments: ResidualNormBackwardArguments) -> tuple[Tensor, ...]:
    from ..kernels.residual_norm import launch

    grad_sum, grad_normalized, total, branch, scale, drop_path_scale, weight, _, mean, rstd, _, needed = arguments
    gradients = _empty_norm_gradients(arguments)
    rows = (grad_sum, grad_normalized, total, branch)
    launch.fill_backward(*rows, scale, drop_path_scale, weight, mean, rstd, _needed(gradients, needed))
    return gradients


def _add_fallback(arguments: ResidualAddArguments) -> Tensor:
    return fallback.residual_add(*arguments)


def _add_launch(arguments: ResidualAddArguments) -> Tensor:
    from ..kernels.residual_norm import launch

    total = _empty_sum(arguments)
    launch.fill_forward(*arguments, None, None, 0.0, total, None, None, None)
    return total


def _empty_sum(arguments: ResidualAddArguments) -> Tensor:
    residual, branch, scale, _ = arguments
    return residual.new_empty(residual.shape, dtype=sum_dtype(residual, branch, scale))


def _add_backward_fallback(arguments: ResidualAddBackwardArguments) -> tuple[Tensor, ...]:
    grad, branch, scale, drop_path_scale, _, needed = arguments
    values = fallback.branch_backward(grad, branch, scale, drop_path_scale, needed)
    return _fill(_empty_add_gradients(arguments), needed, values)


def _add_backward_launch(arguments: ResidualAddBackwardArguments) -> tuple[Tensor, ...]:
    from ..kernels.residual_norm import launch

    grad, branch, scale, drop_path_scale, _, needed = arguments
    gradients = _empty_add_gradients(arguments)
    outputs = (None, *_needed(gradients, needed), None, None)
    launch.fill_backward(grad, None, None, branch, scale, drop_path_scale, None, None, None, outputs)
    return gradients


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save for backward; branch only if scale needs a gradient."""
    residual, branch, scale, drop_path_scale, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((mean, rstd, total) if branch is None else (mean, rstd)))
    ctx.residual_dtype = residual.dtype
    ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
    rows = (residual, None) if branch is None else (total, branch if ctx.needs_input_grad[2] else None)
    ctx.save_for_backward(*rows, scale, drop_path_scale, weight, bias, mean, rstd)


def _norm_backward(
    ctx: Any, grad_sum: Tensor | None, grad_normalized: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    of_residual, of_branch, of_scale, _, of_weight, of_bias, *_ = ctx.needs_input_grad
    is_normalized = grad_normalized is not None
    needed = [of_residual, of_branch, of_scale, of_weight and is_normalized, of_bias and is_normalized]
    if (grad_sum is None and not is_normalized) or not any(needed):
        return (None,) * 8
    gradients = residual_norm_backward_op(grad_sum, grad_normalized, *ctx.saved_tensors, ctx.branch_dtype, needed)
    residual, branch, scale, weight, bias = _needed(gradients, needed)
    residual = None if residual is None else residual.to(ctx.residual_dtype)
    return residual, branch, scale, None, weight, bias, None, None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, branch, scale, drop_path_scale = inputs
    ctx.residual_dtype, ctx.branch_dtype = residual.dtype, branch.dtype
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, scale, drop_path_scale)


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_residual, *needed, _ = ctx.needs_input_grad
    residual = grad.to(ctx.residual_dtype) if of_residual else None
    if not any(needed):
        return residual, None, None, None
    gradients = residual_add_backward_op(grad, *ctx.saved_tensors, ctx.branch_dtype, needed)
    return residual, *_needed(gradients, needed), None


def _raise_on_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::residual_norm and residual_add have no second derivative; use attn_implementation='eager' for "
        "double backward"
    )


def _autocast(arguments: ResidualNormArguments, dtype: torch.dtype) -> ResidualNormArguments:
    """Set the dtype of the normalized rows to that of autocast.

    It is the dtype of the matrix products that read them.
    """
    chosen = arguments.dtype is not None or arguments.residual.dtype == torch.float64
    return arguments if chosen else arguments._replace(dtype=dtype)


residual_norm_op = register_op(
    RESIDUAL_NORM,
    ResidualNormArguments,
    errors=residual_norm_errors,
    fallback=Kernel(_norm_fallback),
    triton=Kernel(_norm_launch, _unsupported_reasons),
    fake=_empty_norm,
    autograd=Autograd(_norm_backward, _save_norm),
    autocast=_autocast,
)
residual_norm_backward_op = register_op(
    RESIDUAL_NORM_BACKWARD,
    ResidualNormBackwardArguments,
    errors=residual_norm_backward_errors,
    fallback=Kernel(_norm_backward_fallback),
    triton=Kernel(_norm_backward_launch, _unsupported_reasons),
    fake=_empty_norm_gradients,
    autograd=Autograd(_raise_on_double_backward),
)
residual_add_op = register_op(
    RESIDUAL_ADD,
    ResidualAddArguments,
    errors=residual_add_errors,
    fallback=Kernel(_add_fallback),
    triton=Kernel(_add_launch, _unsupported_reasons),
    fake=_empty_sum,
    autograd=Autograd(_add_backward, _save_add),
)
residual_add_backward_op = register_op(
    RESIDUAL_ADD_BACKWARD,
    ResidualAddBackwardArguments,
    errors=residual_add_backward_errors,
    fallback=Kernel(_add_backward_fallback),
    triton=Kernel(_add_backward_launch, _unsupported_reasons),
    fake=_empty_add_gradients,
    autograd=Autograd(_raise_on_double_backward),
)
