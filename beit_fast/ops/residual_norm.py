"""The operators between attention and MLP: residual, layer scale, drop path and LayerNorm in one. Torch only.

`residual_norm` gives `sum = residual + keep * scale * branch` and its LayerNorm; `residual_add` gives the sum alone.
CUDA runs Triton's kernels, imported at the first call; CPU runs composites, or Triton's interpreter where
`TRITON_INTERPRET=1` was set before this import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import library
from .dispatch import availability
from .fallback import residual_norm as composite
from .fallback.residual_norm import sum_dtype
from .functorch import refuse_forward_mode
from .validation import (
    check_residual_add,
    check_residual_add_backward,
    check_residual_norm,
    check_residual_norm_backward,
)

SCHEMAS = (
    "residual_norm(Tensor residual, Tensor? branch, Tensor? scale, Tensor? keep, Tensor? weight, Tensor? bias, "
    "float eps, ScalarType? dtype=None) -> (Tensor sum, Tensor normalized, Tensor mean, Tensor rstd)",
    "residual_norm_backward(Tensor? grad_sum, Tensor? grad_normalized, Tensor sum, Tensor? branch, Tensor? scale, "
    "Tensor? keep, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, ScalarType branch_dtype, "
    "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "residual_add(Tensor residual, Tensor branch, Tensor? scale, Tensor? keep) -> Tensor",
    "residual_add_backward(Tensor grad, Tensor? branch, Tensor? scale, Tensor? keep, ScalarType branch_dtype, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
)
for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

residual_norm_op = torch.ops.beit_fast.residual_norm.default
residual_norm_backward_op = torch.ops.beit_fast.residual_norm_backward.default
residual_add_op = torch.ops.beit_fast.residual_add.default
residual_add_backward_op = torch.ops.beit_fast.residual_add_backward.default


def residual_norm(
    residual: Tensor,
    branch: Tensor | None = None,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`sum = residual + keep * scale * branch` and `LayerNorm(sum) * weight + bias` in one operator.

    Args:
        residual, branch: `[B, N, E]` in any float types, any strides; without a branch residual is the sum.
        scale: layer scale `[E]`, or None for 1.
        keep: fp32 `[B]`, what drop path multiplies the branch of each sample by: 0 or 1 / keep_prob. None for 1. It
            has no gradient.
        weight, bias: `[E]`, or None for 1 and 0.
        eps: added to the variance.
        dtype: of the normalised rows; that of the sum if None. Autocast fills in the type that it gives to matrix
            products: eager's LayerNorm gives fp32 there, which the next product rounds to just that.

    Returns:
        The sum, in the type that torch promotes residual, branch and scale to, and the normalised rows; `[B, N, E]`
        contiguous, but the sum is residual itself without a branch. Arithmetic is fp32 (fp64 for fp64, on CPU), and
        what is normalised is the sum as it was rounded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or no kernel serves them here; every reason is listed.
        RuntimeError: forward-mode or double differentiation, which the operator does not have.
    """
    refuse_forward_mode(residual, branch, scale, weight, bias)
    total, normalized, _, _ = residual_norm_op(residual, branch, scale, keep, weight, bias, eps, dtype)
    return (residual if branch is None else total), normalized


def residual_add(residual: Tensor, branch: Tensor, scale: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """`residual + keep * scale * branch` in one operator: arguments, result and errors as in `residual_norm`."""
    refuse_forward_mode(residual, branch, scale)
    return residual_add_op(residual, branch, scale, keep)


def _refusals(rows: Tensor, *others: Tensor | None) -> tuple[str, ...]:
    """Why the Triton kernels cannot take these tensors, `[B, N, E]` first."""
    dtypes = [rows.dtype, *(tensor.dtype for tensor in others if tensor is not None)]
    size = rows.shape[-1] if rows.ndim else 1
    return availability.residual_norm_refusals(rows.device, dtypes, size, rows.numel() // max(size, 1))


def _norm_results(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, normalised rows, mean and inverse deviation, to be filled. Without a branch the sum has no elements."""
    promoted = sum_dtype(residual, branch, scale)
    total = residual.new_empty(0 if branch is None else residual.shape, dtype=promoted)
    normalized = residual.new_empty(residual.shape, dtype=dtype or promoted)
    mean = residual.new_empty(residual.shape[:2], dtype=torch.promote_types(promoted, torch.float32))
    return total, normalized, mean, torch.empty_like(mean)


def _norm_gradients(*arguments: Any) -> list[Tensor]:
    """To be filled, for the arguments of `residual_norm_backward`: of residual, branch, scale, weight and bias."""
    _, _, total, _, scale, _, weight, bias, _, _, branch_dtype, output_mask = arguments
    of_rows = _row_gradients(total, (total.dtype, branch_dtype), output_mask[:2])
    return of_rows + _vector_gradients(total, (scale, weight, bias), output_mask[2:])


def _add_gradients(*arguments: Any) -> list[Tensor]:
    """To be filled, for the arguments of `residual_add_backward`: of branch and scale."""
    grad, _, scale, _, branch_dtype, (of_branch, of_scale) = arguments
    return _row_gradients(grad, (branch_dtype,), [of_branch]) + _vector_gradients(grad, (scale,), [of_scale])


def _row_gradients(like: Tensor, dtypes: Sequence[torch.dtype], output_mask: Sequence[bool]) -> list[Tensor]:
    """Contiguous, of the shape of `like`; without elements where nobody wants them."""
    return [
        like.new_empty(like.shape if wanted else 0, dtype=dtype)
        for dtype, wanted in zip(dtypes, output_mask, strict=True)
    ]


def _vector_gradients(rows: Tensor, vectors: Sequence[Tensor | None], output_mask: Sequence[bool]) -> list[Tensor]:
    """Contiguous, in the types of the vectors; without elements where nobody wants them."""
    return [
        rows.new_empty(0) if x is None else rows.new_empty(x.shape if wanted else 0, dtype=x.dtype)
        for x, wanted in zip(vectors, output_mask, strict=True)
    ]


def _wanted(gradients: Sequence[Tensor], output_mask: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if flag else None for gradient, flag in zip(gradients, output_mask, strict=True)]


def _copied(
    gradients: Sequence[Tensor], output_mask: Sequence[bool], values: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients, those that are wanted filled from `values`."""
    for gradient, value in zip(_wanted(gradients, output_mask), values, strict=True):
        if gradient is not None and value is not None:
            gradient.copy_(value)
    return tuple(gradients)


def _norm(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_residual_norm(residual, branch, scale, keep, weight, bias, eps, dtype)
    total = residual if branch is None else composite.residual_add(residual, branch, scale, keep)
    normalized = composite.layer_norm(total, weight, bias, eps, dtype or total.dtype)
    return residual.new_empty(0) if branch is None else total, *normalized


def _norm_triton(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (residual, branch, scale, keep, weight, bias, eps)
    check_residual_norm(*arguments, dtype, refusals=_refusals(residual, branch, scale, weight, bias))
    from ..kernels.residual_norm import launch

    results = _norm_results(residual, branch, scale, dtype)
    launch.fill_forward(*arguments, None if branch is None else results[0], *results[1:])
    return results


def _norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    check_residual_norm_backward(*arguments)
    grad_sum, grad_normalized, total, branch, scale, keep, weight, _, mean, rstd, _, output_mask = arguments
    grad, grad_weight, grad_bias = grad_sum, None, None
    if grad_normalized is not None:
        grad, grad_weight, grad_bias = composite.layer_norm_backward(grad_normalized, total, weight, mean, rstd)
        grad = grad if grad_sum is None else grad + grad_sum
    from_branch = composite.branch_backward(grad, branch, scale, keep, output_mask[1:3])
    return _copied(_norm_gradients(*arguments), output_mask, (grad, *from_branch, grad_weight, grad_bias))


def _norm_backward_triton(*arguments: Any) -> tuple[Tensor, ...]:
    grad_sum, grad_normalized, total, branch, scale, keep, weight, bias, mean, rstd, _, output_mask = arguments
    refusals = _refusals(total, grad_sum, grad_normalized, branch, scale, weight, bias)
    check_residual_norm_backward(*arguments, refusals=refusals)
    from ..kernels.residual_norm import launch

    gradients = _norm_gradients(*arguments)
    rows = (grad_sum, grad_normalized, total, branch)
    launch.fill_backward(*rows, scale, keep, weight, mean, rstd, _wanted(gradients, output_mask))
    return tuple(gradients)


def _add(residual: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    check_residual_add(residual, branch, scale, keep)
    return composite.residual_add(residual, branch, scale, keep)


def _add_triton(residual: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    check_residual_add(residual, branch, scale, keep, refusals=_refusals(residual, branch, scale))
    from ..kernels.residual_norm import launch

    total = residual.new_empty(residual.shape, dtype=sum_dtype(residual, branch, scale))
    launch.fill_forward(residual, branch, scale, keep, None, None, 0.0, total, None, None, None)
    return total


def _add_backward(*arguments: Any) -> tuple[Tensor, ...]:
    check_residual_add_backward(*arguments)
    grad, branch, scale, keep, _, output_mask = arguments
    values = composite.branch_backward(grad, branch, scale, keep, output_mask)
    return _copied(_add_gradients(*arguments), output_mask, values)


def _add_backward_triton(*arguments: Any) -> tuple[Tensor, ...]:
    grad, branch, scale, keep, _, output_mask = arguments
    check_residual_add_backward(*arguments, refusals=_refusals(grad, branch, scale))
    from ..kernels.residual_norm import launch

    gradients = _add_gradients(*arguments)
    wanted = (None, *_wanted(gradients, output_mask), None, None)
    launch.fill_backward(grad, None, None, branch, scale, keep, None, None, None, wanted)
    return tuple(gradients)


_IMPLEMENTATIONS = {
    "residual_norm": (_norm, _norm_triton),
    "residual_norm_backward": (_norm_backward, _norm_backward_triton),
    "residual_add": (_add, _add_triton),
    "residual_add_backward": (_add_backward, _add_backward_triton),
}
for _name, (_composite, _triton) in _IMPLEMENTATIONS.items():
    library.impl(_name, _composite, "CompositeExplicitAutograd")
    for _key in ("CUDA", "CPU") if availability.INTERPRETED else ("CUDA",):
        library.impl(_name, _triton, _key)


@torch.library.register_fake("beit_fast::residual_norm", lib=library)
def _norm_fake(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_residual_norm(residual, branch, scale, keep, weight, bias, eps, dtype)
    return _norm_results(residual, branch, scale, dtype)


@torch.library.register_fake("beit_fast::residual_norm_backward", lib=library)
def _norm_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    check_residual_norm_backward(*arguments)
    return tuple(_norm_gradients(*arguments))


@torch.library.register_fake("beit_fast::residual_add", lib=library)
def _add_fake(residual: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    check_residual_add(residual, branch, scale, keep)
    return residual.new_empty(residual.shape, dtype=sum_dtype(residual, branch, scale))


@torch.library.register_fake("beit_fast::residual_add_backward", lib=library)
def _add_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    check_residual_add_backward(*arguments)
    return tuple(_add_gradients(*arguments))


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Branch is kept for the gradient of scale alone."""
    residual, branch, scale, keep, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((mean, rstd, total) if branch is None else (mean, rstd)))
    ctx.residual_dtype = residual.dtype
    ctx.branch_dtype = residual.dtype if branch is None else branch.dtype
    rows = (residual, None) if branch is None else (total, branch if ctx.needs_input_grad[2] else None)
    ctx.save_for_backward(*rows, scale, keep, weight, bias, mean, rstd)


def _norm_grad(ctx: Any, grad_sum: Tensor | None, grad_normalized: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    of_residual, of_branch, of_scale, _, of_weight, of_bias, *_ = ctx.needs_input_grad
    is_normalized = grad_normalized is not None
    needed = [of_residual, of_branch, of_scale, of_weight and is_normalized, of_bias and is_normalized]
    if (grad_sum is None and not is_normalized) or not any(needed):
        return (None,) * 8
    gradients = residual_norm_backward_op(grad_sum, grad_normalized, *ctx.saved_tensors, ctx.branch_dtype, needed)
    residual, branch, scale, weight, bias = _wanted(gradients, needed)
    residual = None if residual is None else residual.to(ctx.residual_dtype)
    return residual, branch, scale, None, weight, bias, None, None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, branch, scale, keep = inputs
    ctx.residual_dtype, ctx.branch_dtype = residual.dtype, branch.dtype
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, scale, keep)


def _add_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_residual, *needed, _ = ctx.needs_input_grad
    residual = grad.to(ctx.residual_dtype) if of_residual else None
    if not any(needed):
        return residual, None, None, None
    gradients = residual_add_backward_op(grad, *ctx.saved_tensors, ctx.branch_dtype, needed)
    return residual, *_wanted(gradients, needed), None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::residual_norm and residual_add have no second derivative; use attn_implementation='eager' for "
        "double backward"
    )


for _name, _grad, _save in (("residual_norm", _norm_grad, _save_norm), ("residual_add", _add_grad, _save_add)):
    torch.library.register_autograd(f"beit_fast::{_name}", _grad, setup_context=_save, lib=library)
    torch.library.register_autograd(f"beit_fast::{_name}_backward", _refuse_double_backward, lib=library)
