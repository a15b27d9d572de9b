"""Checks of the operators' arguments, the same for every kernel: one error lists every reason."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from ..position_bias import Window, table_rows, token_count
from .arguments import (
    AttentionArguments,
    AttentionBackwardArguments,
    LinearGeluArguments,
    PatchEmbedArguments,
    ResidualAddArguments,
    ResidualAddBackwardArguments,
    ResidualNormArguments,
    ResidualNormBackwardArguments,
)
from .dispatch.availability import FLOAT_DTYPES, join_dtypes


def attention_errors(arguments: AttentionArguments) -> list[str]:
    """Return the errors of the arguments of `rel_pos_attention`. Symbolic sizes are checked at run time."""
    q, k, v, table, key_mask, window, _, dropout_p, seed = arguments
    errors = attention_tensor_errors(q, k, v, table, key_mask) + _window_errors(q, table, window)
    if not 0.0 <= dropout_p < 1.0:
        errors.append(f"dropout_p is {dropout_p}, not in [0, 1)")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        errors.append(f"seed is {seed}, not in [0, 2**63)")
    return errors


def attention_backward_errors(arguments: AttentionBackwardArguments) -> list[str]:
    """Return the errors of the arguments of `rel_pos_attention_backward`."""
    errors = attention_errors(arguments.forward)
    grad_out, q, out, lse = arguments.grad_out, arguments.q, arguments.out, arguments.lse
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            errors.append(f"{name} must have the shape and dtype of q")
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != lse_dtype or q.ndim != 4 or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        errors.append(f"lse must be {str(lse_dtype).removeprefix('torch.')} [B, H, N]")
    if any(x.device != q.device for x in (grad_out, out, lse)):
        errors.append("grad_out, out and lse must be on the device of q")
    return errors


def attention_tensor_errors(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, key_mask: Tensor | None
) -> list[str]:
    """Return the errors of the attention tensors: ranks, sizes, dtypes, devices and heads."""
    errors = []
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        errors.append("q, k and v must have one shape [B, N, H, D]")
    elif 0 in _known(q.shape[1], q.shape[3]):
        errors.append("q, k and v must have at least one token and one number a head")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        errors.append("q, k and v must have one floating-point dtype")
    if any(x is not None and x.device != q.device for x in (k, v, table, key_mask)):
        errors.append("all tensors must be on one device")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.ndim != 2):
        errors.append("key_mask must be bool [B, N], True where a key may be attended to")
    elif key_mask is not None and q.ndim == 4 and key_mask.shape != q.shape[:2]:
        errors.append(f"key_mask must be [B, N] = {list(q.shape[:2])}")
    if table is not None and (table.ndim != 2 or not table.dtype.is_floating_point):
        errors.append("table must be a floating-point matrix [rows, H]")
    elif table is not None and q.ndim == 4 and table.shape[1] != q.shape[2]:
        errors.append(f"table must have one column for each of the {q.shape[2]} heads")
    return errors


def _window_errors(q: Tensor, table: Tensor | None, window: Window) -> list[str]:
    if table is None or q.ndim != 4 or table.ndim != 2 or len(_known(*window)) != len(window):
        return []
    if len(window) != 2 or min(window) < 1:
        return [f"window must be two positive numbers (height, width) of patches, not {tuple(window)}"]
    errors = []
    if any(tokens != token_count(window) for tokens in _known(q.shape[1])):
        errors.append(f"a window {tuple(window)} has {token_count(window)} tokens, not {q.shape[1]}")
    if any(rows != table_rows(window) for rows in _known(table.shape[0])):
        errors.append(f"a window {tuple(window)} has {table_rows(window)} table rows, not {table.shape[0]}")
    return errors


def _known(*sizes: int) -> list[int]:
    """Return the sizes that are ints: comparing a symbolic size would add a guard."""
    return [size for size in sizes if isinstance(size, int)]


def patch_embed_errors(arguments: PatchEmbedArguments) -> list[str]:
    """Return the errors of the arguments of `patch_embed`. Symbolic sizes are checked at run time."""
    pixels, weight, *_, mean, std = arguments
    tensors: dict[str, Tensor | None] = dict(zip(arguments._fields[:-2], arguments[:-2], strict=True))
    if pixels.ndim != 4 or weight.ndim != 4:
        return ["pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]"]
    if 0 in _known(*weight.shape[1:]):
        return ["weight must have at least one channel, row and column"]
    errors = _dtype_errors(tensors) + _pixel_errors(pixels, weight, mean, std)
    if any(x is not None and x.device != pixels.device for x in tensors.values()):
        errors.append("all tensors must be on one device")
    return errors + _token_errors(tensors, pixels, weight)


_FLOAT_NAMES = join_dtypes(FLOAT_DTYPES)


def _dtype_errors(tensors: dict[str, Tensor | None]) -> list[str]:
    errors = []
    for name, tensor in tensors.items():
        if name == "mask" or tensor is None or tensor.dtype in FLOAT_DTYPES:
            continue
        if name != "pixels":
            errors.append(f"{name} must be {_FLOAT_NAMES}")
        elif tensor.dtype != torch.uint8:
            errors.append(f"pixels must be uint8, {_FLOAT_NAMES}")
    return errors


def _pixel_errors(
    pixels: Tensor, weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[str]:
    errors = []
    channels = pixels.shape[1]
    if _differ(channels, weight.shape[1]):
        errors.append(f"pixels have {channels} channels, weight takes {weight.shape[1]}")
    sides = zip(pixels.shape[2:], weight.shape[2:], strict=True)
    if any(len(_known(*side)) == 2 and side[0] < side[1] for side in sides):
        errors.append("the image is smaller than one patch")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and _differ(len(values), channels):
            errors.append(f"{name} must have one number for each of the {channels} channels")
    if std is not None and any(value == 0 for value in std):
        errors.append("std must not contain 0")
    if pixels.dtype == torch.uint8 and (mean is None or std is None):
        errors.append("uint8 pixels need mean and std")
    return errors


def _token_errors(tensors: dict[str, Tensor | None], pixels: Tensor, weight: Tensor) -> list[str]:
    errors = []
    embed = weight.shape[0]
    for name in ("bias", "cls", "mask_token"):
        tensor = tensors[name]
        if tensor is not None and _differ(tensor.numel(), embed):
            errors.append(f"{name} must hold {embed} numbers, as weight has {embed} output channels")
    mask, pos = tensors["mask"], tensors["pos"]
    if (mask is None) != (tensors["mask_token"] is None):
        errors.append("mask and mask_token go together: give both or neither")
    patches = (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    if 0 in _known(patches):  # already reported; mask and pos cannot be checked without patches
        return errors
    shape = [pixels.shape[0], patches]
    if mask is not None and (mask.dtype != torch.bool or shapes_differ(mask, shape)):
        errors.append(f"mask must be bool [B, patches] = {shape}")
    shape = [1, patches + (tensors["cls"] is not None), embed]
    if pos is not None and shapes_differ(pos, shape):
        errors.append(f"pos must be [1, tokens, E] = {shape}")
    return errors


def linear_gelu_errors(arguments: LinearGeluArguments) -> list[str]:
    """Return the errors of the arguments of `linear_gelu`. Symbolic sizes are checked at run time."""
    x, weight, bias = arguments
    others = (weight,) if bias is None else (weight, bias)
    errors = []
    if weight.ndim != 2 or x.ndim == 0:
        errors.append("x must be [..., inputs] and weight [outputs, inputs]")
    elif _differ(x.shape[-1], weight.shape[1]):
        errors.append(f"x has {x.shape[-1]} inputs, weight takes {weight.shape[1]}")
    if bias is not None and weight.ndim == 2 and shapes_differ(bias, weight.shape[:1]):
        errors.append(f"bias must be [outputs] = {list(weight.shape[:1])}")
    if not x.dtype.is_floating_point or any(tensor.dtype != x.dtype for tensor in others):
        errors.append("x, weight and bias must have one floating-point dtype")
    if any(tensor.device != x.device for tensor in others):
        errors.append("all tensors must be on one device")
    return errors


def _differ(size: int, other: int) -> bool:
    """Whether two sizes are numbers, and not the same."""
    return len(set(_known(size, other))) == 2


def shapes_differ(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor has another shape. Sizes are compared if both are numbers."""
    return tensor.ndim != len(shape) or any(map(_differ, tensor.shape, shape))


def residual_norm_errors(arguments: ResidualNormArguments) -> list[str]:
    """Return the errors of the arguments of `residual_norm`. Symbolic sizes are checked at run time."""
    residual, branch, scale, drop_path_scale, weight, bias, eps, dtype = arguments
    rows = {"residual": residual, "branch": branch}
    errors = _row_errors(rows, {"scale": scale, "weight": weight, "bias": bias}, drop_path_scale)
    if branch is None and (scale is not None or drop_path_scale is not None):
        errors.append("scale and drop_path_scale need a branch")
    if not eps >= 0.0:
        errors.append(f"eps is {eps}, not at least 0")
    if dtype is not None and not dtype.is_floating_point:
        errors.append(f"dtype is {dtype}, not a floating-point type")
    return errors


def residual_norm_backward_errors(arguments: ResidualNormBackwardArguments) -> list[str]:
    """Return the errors of the arguments of `residual_norm_backward`."""
    total, grad_normalized, needed = arguments.sum, arguments.grad_normalized, arguments.output_mask
    rows = {"sum": total, "grad_sum": arguments.grad_sum, "grad_normalized": grad_normalized}
    rows["branch"] = arguments.branch
    vectors = {"scale": arguments.scale, "weight": arguments.weight, "bias": arguments.bias}
    errors = _row_errors(rows, vectors, arguments.drop_path_scale)
    errors += _missing_input_errors({"branch": arguments.branch, **vectors}, needed[2:])
    if arguments.grad_sum is None and grad_normalized is None:
        errors.append("grad_sum or grad_normalized must be given")
    if grad_normalized is None and any(needed[3:]):
        errors.append("the gradients of weight and bias need grad_normalized")
    wide = torch.promote_types(total.dtype, torch.float32)
    for name, tensor in (("mean", arguments.mean), ("rstd", arguments.rstd)):
        if tensor.dtype != wide or tensor.device != total.device or shapes_differ(tensor, total.shape[:2]):
            errors.append(f"{name} must be {str(wide).removeprefix('torch.')} [B, N] on the device of sum")
    return errors


def residual_add_errors(arguments: ResidualAddArguments) -> list[str]:
    """Return the errors of the arguments of `residual_add`."""
    residual, branch, scale, drop_path_scale = arguments
    return _row_errors({"residual": residual, "branch": branch}, {"scale": scale}, drop_path_scale)


def residual_add_backward_errors(arguments: ResidualAddBackwardArguments) -> list[str]:
    """Return the errors of the arguments of `residual_add_backward`."""
    grad, branch, scale, drop_path_scale, _, needed = arguments
    errors = _row_errors({"grad": grad, "branch": branch}, {"scale": scale}, drop_path_scale)
    return errors + _missing_input_errors({"branch": branch, "scale": scale}, needed[1:])


def _row_errors(
    rows: dict[str, Tensor | None], vectors: dict[str, Tensor | None], drop_path_scale: Tensor | None
) -> list[str]:
    """Return the errors of rows, vectors and `drop_path_scale`.

    Rows are `[B, N, E]` and the first is not None. Vectors are `[E]`, and `drop_path_scale` is `[B]`.
    """
    (first, leader), *others = rows.items()
    assert leader is not None
    if leader.ndim != 3 or 0 in _known(leader.shape[2]):
        return [f"{first} must be [B, N, E] with at least one number a token"]
    errors = []
    batch, _, size = leader.shape
    for name, tensor in others:
        if tensor is not None and shapes_differ(tensor, leader.shape):
            errors.append(f"{name} must have the shape of {first}")
    for name, tensor in vectors.items():
        if tensor is not None and shapes_differ(tensor, [size]):
            errors.append(f"{name} must be [E] = [{size}]")
    for name, tensor in (rows | vectors).items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            errors.append(f"{name} must be floating point")
    if drop_path_scale is not None and (
        drop_path_scale.dtype != torch.float32 or shapes_differ(drop_path_scale, [batch])
    ):
        errors.append(f"drop_path_scale must be float32 [B] = [{batch}]")
    if any(x is not None and x.device != leader.device for x in (*rows.values(), *vectors.values(), drop_path_scale)):
        errors.append("all tensors must be on one device")
    return errors


def _missing_input_errors(inputs: dict[str, Tensor | None], needed: Sequence[bool]) -> list[str]:
    """Return an error for each missing input of the `needed` gradients.

    `inputs` are the branch, then the tensors whose gradients are `needed`. A missing input is None.
    """
    (_, branch), *vectors = inputs.items()
    errors = [
        f"the gradient of {name} needs {name}"
        for (name, tensor), flag in zip(vectors, needed, strict=True)
        if flag and tensor is None
    ]
    if needed[0] and branch is None:
        errors.append("the gradient of scale needs branch")
    return errors


_EXPECTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Tensor: ("a tensor", lambda value: isinstance(value, Tensor)),
    Tensor | None: ("a tensor or None", lambda value: value is None or isinstance(value, Tensor)),
    Window: ("two integers (height, width)", lambda value: _are_numbers(value, "__index__")),
    int: ("an integer", lambda value: hasattr(value, "__index__")),
    float: ("a number", lambda value: hasattr(value, "__float__")),
    Sequence[float] | None: ("numbers or None", lambda value: value is None or _are_numbers(value, "__float__")),
    torch.dtype | None: ("a torch.dtype or None", lambda value: value is None or isinstance(value, torch.dtype)),
}
"""What a public argument of each type may be, and a function that accepts it."""


def _are_numbers(values: Any, method: str) -> bool:
    return isinstance(values, Sequence) and all(hasattr(value, method) for value in values)


def raise_type_errors(operator: str, arguments: Any) -> None:
    """Raise one TypeError that lists every argument of a wrong type.

    The operators call it after torch has rejected a call, so that a correct call does not pay for the check. It does
    nothing in a traced call: Dynamo of torch 2.14 follows the handler of an error, but not type hints.
    """
    if torch.compiler.is_compiling():
        return
    errors = []
    for name, kind in get_type_hints(type(arguments)).items():
        expected, accepts = _EXPECTED[kind]
        value = getattr(arguments, name)
        if not accepts(value):
            plain = isinstance(value, (str, int, float, tuple, list, type(None)))
            given = reprlib.repr(value) if plain else f"of type {type(value).__name__}"
            errors.append(f"{name} is {given} (expected {expected})")
    if errors:
        raise TypeError(f"beit_fast::{operator} cannot serve these arguments: {'; '.join(errors)}")


def raise_errors(operator: str, errors: Sequence[str], arguments: Any) -> NoReturn:
    """Raise one ValueError that lists every error. It also describes the tensors among the operator's arguments."""
    given = ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        for name, tensor in arguments._asdict().items()
        if isinstance(tensor, Tensor)
    )
    raise ValueError(f"beit_fast::{operator} cannot serve {given}: {'; '.join(errors)}")
