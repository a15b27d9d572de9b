"""How the operators behave under autocast and `torch.vmap`: registered when the package is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import attention_backward_op, attention_op, library, patch_embed_op
from .linear_gelu import linear_gelu_op
from .residual_norm import residual_norm_op


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    eligible = tensor.dtype.is_floating_point and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor


def _register_autocast(device_type: str) -> None:
    """Cast q, k, v (pixels and weight) as autocast casts a matrix product; the bias table and positions stay.

    `residual_norm` writes its rows in the type of the matrix products that read them.
    A linear layer is cast whole, as torch's is.
    """
    key = f"Autocast{torch._C._dispatch_key_for_device(device_type)}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return attention_op(_cast(q, dtype), _cast(k, dtype), _cast(v, dtype), *rest)

    def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            bias = None if bias is None else _cast(bias, dtype)
            return patch_embed_op(_cast(pixels, dtype), _cast(weight, dtype), bias, *rest)

    def residual_norm(
        residual: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        keep: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        if dtype is None and residual.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return residual_norm_op(residual, branch, scale, keep, weight, bias, eps, dtype)

    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            bias = None if bias is None else _cast(bias, dtype)
            return linear_gelu_op(_cast(x, dtype), _cast(weight, dtype), bias)

    library.impl("rel_pos_attention", attention, key)
    library.impl("patch_embed", patch_embed, key)
    library.impl("residual_norm", residual_norm, key)
    library.impl("linear_gelu", linear_gelu, key)


for _device_type in ("cpu", "cuda"):
    _register_autocast(_device_type)


def _loop(op: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Call `op` once for each of the `size` entries of the mapped dimension and stack what comes back."""
    results = [op(*(_entry(x, dim, place) for x, dim in zip(args, in_dims, strict=True))) for place in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])


def _entry(x: Any, dim: Any, place: int) -> Any:
    return x.select(dim, place) if isinstance(x, Tensor) and dim is not None else x


def _fold(x: Any, dim: int | None, size: int) -> Any:
    """Put the mapped dimension into the batch: `[B, ...]` or its mapped form to `[size * B, ...]`."""
    if not isinstance(x, Tensor):
        return x
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, x.shape[0] // size))


def _refuse_unset_randomness(info: Any, dropout_p: float) -> None:
    if dropout_p > 0 and info.randomness != "same":
        raise RuntimeError(
            f"beit_fast::rel_pos_attention drops the same weights for one seed: with dropout_p={dropout_p} call "
            f"torch.vmap(..., randomness='same'), not {info.randomness!r}"
        )


@torch.library.register_vmap("beit_fast::rel_pos_attention", lib=library)
def _attention_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    dropout_p = args[7] if len(args) > 7 else 0.0
    _refuse_unset_randomness(info, dropout_p)
    size = info.batch_size
    if in_dims[3] is not None or dropout_p > 0:  # a table each, or masks that depend on the place in the batch
        return _loop(attention_op, size, in_dims, args)
    q, k, v = (_fold(x, dim, size) for x, dim in zip(args[:3], in_dims[:3], strict=True))
    key_mask = _fold(args[4], in_dims[4], size)
    out, lse = attention_op(q, k, v, args[3], key_mask, *args[5:])
    return (_unfold(out, size), _unfold(lse, size)), (0, 0)


@torch.library.register_vmap("beit_fast::rel_pos_attention_backward", lib=library)
def _attention_backward_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    *tensors, window, scale, dropout_p, seed, output_mask = args
    _refuse_unset_randomness(info, dropout_p)
    size = info.batch_size
    table_is_mapped = in_dims[4] is not None
    if table_is_mapped or dropout_p > 0 or output_mask[3]:  # a table gradient each
        return _loop(attention_backward_op, size, in_dims, args)
    folded = [
        x if place == 4 else _fold(x, dim, size)
        for place, (x, dim) in enumerate(zip(tensors, in_dims[:8], strict=True))
    ]
    grads = attention_backward_op(*folded, window, scale, dropout_p, seed, output_mask)
    split = tuple(_unfold(g, size) if n else g for g, n in zip(grads, output_mask, strict=True))
    return split, tuple(0 if n else None for n in output_mask)


@torch.library.register_vmap("beit_fast::patch_embed", lib=library)
def _patch_embed_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    only_images_are_mapped = all(in_dims[place] is None for place in (1, 2, 3, 5, 6))
    if not only_images_are_mapped:
        return _loop(patch_embed_op, size, in_dims, args)
    pixels, mask = _fold(args[0], in_dims[0], size), _fold(args[4], in_dims[4], size)
    tokens = patch_embed_op(pixels, *args[1:4], mask, *args[5:])
    return _unfold(tokens, size), 0


@torch.library.register_vmap("beit_fast::linear_gelu", lib=library)
def _linear_gelu_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    x_dim, weight_dim, bias_dim = in_dims
    if weight_dim is not None or bias_dim is not None:
        return _loop(linear_gelu_op, info.batch_size, in_dims, args)
    return linear_gelu_op(args[0].movedim(x_dim, 0), *args[1:]), 0
