"""`beit_fast::rel_pos_attention`: attention with BEiT's relative position bias (arXiv 2106.08254).

`softmax(scale * q k^T + bias) v`, with the bias read from its table. The second result is the log-sum-exp of every row,
for the backward pass. CUDA runs Triton kernels, which are imported at the first call. CPU runs the kernels of `_C`, the
fallback if `_C` was not built, or Triton's interpreter if `TRITON_INTERPRET=1` was set before this import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..position_bias import Window
from .arguments import (
    REL_POS_ATTENTION,
    REL_POS_ATTENTION_BACKWARD,
    AttentionArguments,
    AttentionBackwardArguments,
)
from .dispatch import availability
from .fallback import attention as fallback
from .functorch import autograd_function, raise_on_forward_mode, transforms_are_active
from .library import Autograd, Kernel, call_op, register_op
from .transforms import cast_first, fold, map_entries, unfold
from .validation import (
    attention_backward_errors,
    attention_errors,
    attention_tensor_errors,
    raise_errors,
    raise_type_errors,
)


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None = None,
    window: Window | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Compute attention with a learned 2-D relative position bias. The result is `softmax(scale * q k^T + bias) v`.

    Args:
        q, k, v: `[B, N, H, D]`, one dtype, any strides; slices of one packed projection are not copied.
        table: bias table `[(2 * height - 1) * (2 * width - 1) + 3, H]` in any float dtype, or None for no bias.
        window: `(height, width)` in patches, with `N = height * width + 1`; required with a table.
        key_mask: bool `[B, N]`, True where a key may be attended to. A query without any such key gives zeros.
        scale: factor of `q k^T`; `D ** -0.5` if None.
        dropout_p: probability of dropping an attention weight, in `[0, 1)`.
        seed: selects the dropped weights, the same ones in the backward pass, in `[0, 2**63)`.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of q. Arithmetic is fp32 (fp64 for fp64 inputs, on CPU).

    Raises:
        TypeError: If arguments have a wrong type; the error lists all of them.
        ValueError: If shapes, dtypes or devices do not fit, or no kernel serves them; the error lists every reason.
        RuntimeError: If forward-mode or double differentiation is requested.
    """
    if table is not None and window is None:
        raise_type_errors("rel_pos_attention", AttentionArguments(q, k, v, table, key_mask, (1, 1), 1.0))
        errors = [*attention_tensor_errors(q, k, v, table, key_mask), "a table needs window=(height, width)"]
        raise_errors("rel_pos_attention", errors, AttentionArguments(q, k, v, table, key_mask, (1, 1), 1.0))
    raise_on_forward_mode(q, k, v, table)
    if scale is None:
        is_valid = isinstance(q, Tensor) and q.ndim == 4 and q.shape[-1] != 0
        scale = q.shape[-1] ** -0.5 if is_valid else 1.0  # the operator rejects any other q
    window = (1, 1) if window is None else window
    if torch.jit.is_tracing():  # sizes are tensors there, and an operator's integers must be constants
        window = (int(window[0]), int(window[1]))
    arguments = AttentionArguments(q, k, v, table, key_mask, window, scale, dropout_p, seed)
    op = _RelPosAttention.apply if transforms_are_active() else attention_op
    return call_op(op, "rel_pos_attention", arguments, attention_errors)[0]


def _unsupported_reasons(arguments: AttentionArguments | AttentionBackwardArguments) -> Sequence[str]:
    q = arguments.q
    kernel: availability.KernelName = "triton" if q.is_cuda else "triton-interpret"
    return availability.attention_unsupported_reasons(kernel, q.device, q.dtype, q.shape[-1] if q.ndim else 0)


def _launch(arguments: AttentionArguments) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import launch

    return launch.attention_forward(*arguments)


def _launch_backward(arguments: AttentionBackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.attention import launch

    return launch.attention_backward(*arguments)


def _fake(arguments: AttentionArguments) -> tuple[Tensor, Tensor]:
    q = arguments.q
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=lse_dtype)


def _fake_backward(arguments: AttentionBackwardArguments) -> tuple[Tensor, ...]:
    q = arguments.q
    inputs = (q, arguments.k, arguments.v, arguments.table)
    return tuple(
        q.new_empty(0) if x is None else x.new_empty(x.shape if needed else 0)
        for x, needed in zip(inputs, arguments.output_mask, strict=True)
    )


_GRADIENTS = 4  # q, k, v and table, the first arguments
_TENSORS = 5  # and key_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:_TENSORS], *output)


def _gradient(op: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return the backward function that calls `op`. `op` is the backward operator or its `autograd.Function`."""

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        others = (None,) * (len(AttentionArguments._fields) - _GRADIENTS)
        needed = [bool(flag) for flag in ctx.needs_input_grad[:_GRADIENTS]]
        if grad_out is None or not any(needed):
            return (None,) * _GRADIENTS + others
        grads = op(grad_out, *ctx.saved_tensors, *ctx.options, needed)
        return (*(grad if flag else None for grad, flag in zip(grads, needed, strict=True)), *others)

    return backward


def _raise_on_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "beit_fast::rel_pos_attention has no second derivative; use attn_implementation='eager' for double backward"
    )


def _check_randomness(info: Any, dropout_p: float) -> None:
    if dropout_p > 0 and info.randomness != "same":
        raise RuntimeError(
            f"beit_fast::rel_pos_attention drops the same weights for one seed: with dropout_p={dropout_p} call "
            f"torch.vmap(..., randomness='same'), not {info.randomness!r}"
        )


def _vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    given = AttentionArguments(*args)
    _check_randomness(info, given.dropout_p)
    size = info.batch_size
    dims = dict(zip(AttentionArguments._fields, in_dims, strict=False))
    if dims["table"] is not None or given.dropout_p > 0:  # a table per entry, or masks that depend on the batch index
        return map_entries(attention_op, size, in_dims, args)
    folded = {name: fold(getattr(given, name), dims[name], size) for name in ("q", "k", "v", "key_mask")}
    out, lse = attention_op(*given._replace(**folded))
    return (unfold(out, size), unfold(lse, size)), (0, 0)


def _vmap_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    given, dims = AttentionBackwardArguments(*args), AttentionBackwardArguments(*in_dims)
    _check_randomness(info, given.dropout_p)
    size = info.batch_size
    if dims.table is not None or given.dropout_p > 0 or given.output_mask[3]:  # a table gradient per entry
        return map_entries(attention_backward_op, size, in_dims, args)
    names = ("grad_out", "q", "k", "v", "key_mask", "out", "lse")
    folded = {name: fold(getattr(given, name), getattr(dims, name), size) for name in names}
    grads = attention_backward_op(*given._replace(**folded))
    split = tuple(unfold(grad, size) if flag else grad for grad, flag in zip(grads, given.output_mask, strict=True))
    return split, tuple(0 if flag else None for flag in given.output_mask)


attention_backward_op = register_op(
    REL_POS_ATTENTION_BACKWARD,
    AttentionBackwardArguments,
    errors=attention_backward_errors,
    fallback=Kernel(fallback.attention_backward),
    triton=Kernel(_launch_backward, _unsupported_reasons),
    fake=_fake_backward,
    autograd=Autograd(_raise_on_double_backward),
    vmap=_vmap_backward,
)
attention_op = register_op(
    REL_POS_ATTENTION,
    AttentionArguments,
    errors=attention_errors,
    fallback=Kernel(fallback.attention_forward),
    triton=Kernel(_launch, _unsupported_reasons),
    fake=_fake,
    autograd=Autograd(_gradient(attention_backward_op), _setup_context),
    vmap=_vmap,
    autocast=cast_first(3),  # q, k and v as autocast casts a matrix product; the bias table stays
)
_RelPosAttentionBackward = autograd_function(
    "RelPosAttentionBackward", attention_backward_op, Autograd(_raise_on_double_backward)
)
_RelPosAttention = autograd_function(
    "RelPosAttention", attention_op, Autograd(_gradient(_RelPosAttentionBackward.apply), _setup_context)
)
