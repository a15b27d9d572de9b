"""What the operators accept, checked once for every kernel: each failure is one error that lists all its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..position_bias import Window, table_rows, token_count


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    dropout_p: float,
    seed: int,
    *,
    refusals: Sequence[str] = (),
) -> None:
    """Raise ValueError unless the arguments of `rel_pos_attention` fit together (see there for shapes).

    `refusals` are further reasons, of the kernel that would serve. Sizes may be symbolic: those are left to run time.
    """
    problems = _attention_problems(q, k, v, table, key_mask, window, dropout_p, seed)
    if problems or refusals:
        given = {"q": q, "k": k, "v": v, "table": table, "key_mask": key_mask}
        raise_problems("rel_pos_attention", [*problems, *refusals], **given)


def check_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    dropout_p: float,
    seed: int,
    output_mask: Sequence[bool],
    *,
    refusals: Sequence[str] = (),
) -> None:
    """Raise ValueError unless the arguments of `rel_pos_attention_backward` fit together, as `check_attention` does."""
    problems = _attention_problems(q, k, v, table, key_mask, window, dropout_p, seed)
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            problems.append(f"{name} must have the shape and dtype of q")
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != lse_dtype or q.ndim != 4 or lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        problems.append(f"lse must be {str(lse_dtype).removeprefix('torch.')} [B, H, N]")
    if any(x.device != q.device for x in (grad_out, out, lse)):
        problems.append("grad_out, out and lse must be on the device of q")
    if problems or refusals:
        given = {"grad_out": grad_out, "q": q, "k": k, "v": v, "table": table, "key_mask": key_mask}
        raise_problems("rel_pos_attention_backward", [*problems, *refusals], **given, out=out, lse=lse)


def _attention_problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    key_mask: Tensor | None,
    window: Window,
    dropout_p: float,
    seed: int,
) -> list[str]:
    problems = tensor_problems(q, k, v, table, key_mask) + _window_problems(q, table, window)
    if not 0.0 <= dropout_p < 1.0:
        problems.append(f"dropout_p is {dropout_p}, not in [0, 1)")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        problems.append(f"seed is {seed}, not in [0, 2**63)")
    return problems


def tensor_problems(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, key_mask: Tensor | None) -> list[str]:
    """What is wrong with the tensors of attention: ranks, sizes, dtypes, devices and heads."""
    problems = []
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        problems.append("q, k and v must have one shape [B, N, H, D]")
    elif 0 in _known(q.shape[1], q.shape[3]):
        problems.append("q, k and v must have at least one token and one number a head")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        problems.append("q, k and v must have one floating-point dtype")
    if any(x is not None and x.device != q.device for x in (k, v, table, key_mask)):
        problems.append("all tensors must be on one device")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.ndim != 2):
        problems.append("key_mask must be bool [B, N], True where a key may be attended to")
    elif key_mask is not None and q.ndim == 4 and key_mask.shape != q.shape[:2]:
        problems.append(f"key_mask must be [B, N] = {list(q.shape[:2])}")
    if table is not None and (table.ndim != 2 or not table.dtype.is_floating_point):
        problems.append("table must be a floating-point matrix [rows, H]")
    elif table is not None and q.ndim == 4 and table.shape[1] != q.shape[2]:
        problems.append(f"table must have one column for each of the {q.shape[2]} heads")
    return problems


def _window_problems(q: Tensor, table: Tensor | None, window: Window) -> list[str]:
    if table is None or q.ndim != 4 or table.ndim != 2 or len(_known(*window)) != len(window):
        return []
    if len(window) != 2 or min(window) < 1:
        return [f"window must be two positive numbers (height, width) of patches, not {tuple(window)}"]
    problems = []
    if any(tokens != token_count(window) for tokens in _known(q.shape[1])):
        problems.append(f"a window {tuple(window)} has {token_count(window)} tokens, not {q.shape[1]}")
    if any(rows != table_rows(window) for rows in _known(table.shape[0])):
        problems.append(f"a window {tuple(window)} has {table_rows(window)} table rows, not {table.shape[0]}")
    return problems


def _known(*sizes: int) -> list[int]:
    """The sizes that are numbers: comparing a symbolic one would bind a traced program to it."""
    return [size for size in sizes if isinstance(size, int)]


def check_patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls: Tensor | None,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Raise ValueError unless the arguments of `patch_embed` fit together (see there for shapes).

    Sizes may be symbolic: those are left to run time. `csrc/cpu/patch_embed/arguments.cpp` says the same.
    """
    tensors = {"pixels": pixels, "weight": weight, "bias": bias, "cls": cls, "mask": mask}
    tensors |= {"mask_token": mask_token, "pos": pos}
    if pixels.ndim != 4 or weight.ndim != 4:
        problems = ["pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]"]
    elif 0 in _known(*weight.shape[1:]):
        problems = ["weight must have at least one channel, row and column"]
    else:
        problems = _type_problems(tensors) + _pixel_problems(pixels, weight, mean, std)
        if any(x is not None and x.device != pixels.device for x in tensors.values()):
            problems.append("all tensors must be on one device")
        problems += _token_problems(tensors, pixels, weight)
    if problems:
        raise_problems("patch_embed", problems, **tensors)


_PATCH_EMBED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PATCH_EMBED_TYPE_NAMES = "float16, bfloat16, float32 or float64"


def _type_problems(tensors: dict[str, Tensor | None]) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        if name == "mask" or tensor is None or tensor.dtype in _PATCH_EMBED_TYPES:
            continue
        if name != "pixels":
            problems.append(f"{name} must be {_PATCH_EMBED_TYPE_NAMES}")
        elif tensor.dtype != torch.uint8:
            problems.append(f"pixels must be uint8, {_PATCH_EMBED_TYPE_NAMES}")
    return problems


def _pixel_problems(
    pixels: Tensor, weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[str]:
    problems = []
    channels = pixels.shape[1]
    if _differ(channels, weight.shape[1]):
        problems.append(f"pixels have {channels} channels, weight takes {weight.shape[1]}")
    sides = zip(pixels.shape[2:], weight.shape[2:], strict=True)
    if any(len(_known(*side)) == 2 and side[0] < side[1] for side in sides):
        problems.append("the image is smaller than one patch")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and _differ(len(values), channels):
            problems.append(f"{name} must have one number for each of the {channels} channels")
    if std is not None and any(value == 0 for value in std):
        problems.append("std must not contain 0")
    if pixels.dtype == torch.uint8 and (mean is None or std is None):
        problems.append("uint8 pixels need mean and std")
    return problems


def _token_problems(tensors: dict[str, Tensor | None], pixels: Tensor, weight: Tensor) -> list[str]:
    problems = []
    embed = weight.shape[0]
    for name in ("bias", "cls", "mask_token"):
        tensor = tensors[name]
        if tensor is not None and _differ(tensor.numel(), embed):
            problems.append(f"{name} must hold {embed} numbers, as weight has {embed} output channels")
    mask, pos = tensors["mask"], tensors["pos"]
    if (mask is None) != (tensors["mask_token"] is None):
        problems.append("mask and mask_token go together: give both or neither")
    patches = (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])
    if 0 in _known(patches):  # said before; what must have a token each is not judged
        return problems
    shape = [pixels.shape[0], patches]
    if mask is not None and (mask.dtype != torch.bool or shapes_differ(mask, shape)):
        problems.append(f"mask must be bool [B, patches] = {shape}")
    shape = [1, patches + (tensors["cls"] is not None), embed]
    if pos is not None and shapes_differ(pos, shape):
        problems.append(f"pos must be [1, tokens, E] = {shape}")
    return problems


def check_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, refusals: Sequence[str] = ()) -> None:
    """Raise ValueError unless the arguments of `linear_gelu` fit together (see there for shapes).

    `refusals` are further reasons, of the kernel that would serve. Sizes may be symbolic: those are left to run time.
    """
    given = (weight,) if bias is None else (weight, bias)
    problems = []
    if weight.ndim != 2 or x.ndim == 0:
        problems.append("x must be [..., inputs] and weight [outputs, inputs]")
    elif _differ(x.shape[-1], weight.shape[1]):
        problems.append(f"x has {x.shape[-1]} inputs, weight takes {weight.shape[1]}")
    if bias is not None and weight.ndim == 2 and shapes_differ(bias, weight.shape[:1]):
        problems.append(f"bias must be [outputs] = {list(weight.shape[:1])}")
    if not x.dtype.is_floating_point or any(tensor.dtype != x.dtype for tensor in given):
        problems.append("x, weight and bias must have one floating-point dtype")
    if any(tensor.device != x.device for tensor in given):
        problems.append("all tensors must be on one device")
    if problems or refusals:
        raise_problems("linear_gelu", [*problems, *refusals], x=x, weight=weight, bias=bias)


def _differ(size: int, other: int) -> bool:
    """Whether two sizes are numbers, and not the same."""
    return len(set(_known(size, other))) == 2


def shapes_differ(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether a tensor has another shape, as far as both sizes of a dimension are numbers."""
    return tensor.ndim != len(shape) or any(map(_differ, tensor.shape, shape))


def check_residual_norm(
    residual: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    *,
    refusals: Sequence[str] = (),
) -> None:
    """Raise ValueError unless the arguments of `residual_norm` fit together (see there for shapes).

    `refusals` are further reasons, of the kernel that would serve. Sizes may be symbolic: those are left to run time.
    """
    rows = {"residual": residual, "branch": branch}
    vectors = {"scale": scale, "weight": weight, "bias": bias}
    problems = _row_problems(rows, vectors, keep)
    if branch is None and (scale is not None or keep is not None):
        problems.append("scale and keep need a branch")
    if not eps >= 0.0:
        problems.append(f"eps is {eps}, not at least 0")
    if dtype is not None and not dtype.is_floating_point:
        problems.append(f"dtype is {dtype}, not a floating-point type")
    if problems or refusals:
        raise_problems("residual_norm", [*problems, *refusals], **rows, **vectors, keep=keep)


def check_residual_norm_backward(
    grad_sum: Tensor | None,
    grad_normalized: Tensor | None,
    total: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    refusals: Sequence[str] = (),
) -> None:
    """Raise ValueError unless the arguments of `residual_norm_backward` fit together, as `check_residual_norm` does."""
    rows = {"sum": total, "grad_sum": grad_sum, "grad_normalized": grad_normalized, "branch": branch}
    vectors = {"scale": scale, "weight": weight, "bias": bias}
    problems = _row_problems(rows, vectors, keep)
    problems += _wanted_problems({"branch": branch, **vectors}, output_mask[2:])
    if grad_sum is None and grad_normalized is None:
        problems.append("grad_sum or grad_normalized must be given")
    if grad_normalized is None and any(output_mask[3:]):
        problems.append("the gradients of weight and bias need grad_normalized")
    wide = torch.promote_types(total.dtype, torch.float32)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor.dtype != wide or tensor.device != total.device or shapes_differ(tensor, total.shape[:2]):
            problems.append(f"{name} must be {str(wide).removeprefix('torch.')} [B, N] on the device of sum")
    if problems or refusals:
        given = {**rows, **vectors, "keep": keep, "mean": mean, "rstd": rstd}
        raise_problems("residual_norm_backward", [*problems, *refusals], **given)


def check_residual_add(
    residual: Tensor, branch: Tensor, scale: Tensor | None, keep: Tensor | None, *, refusals: Sequence[str] = ()
) -> None:
    """Raise ValueError unless the arguments of `residual_add` fit together, as `check_residual_norm` does."""
    rows: dict[str, Tensor | None] = {"residual": residual, "branch": branch}
    problems = [*_row_problems(rows, {"scale": scale}, keep), *refusals]
    if problems:
        raise_problems("residual_add", problems, **rows, scale=scale, keep=keep)


def check_residual_add_backward(
    grad: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    branch_dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    refusals: Sequence[str] = (),
) -> None:
    """Raise ValueError unless the arguments of `residual_add_backward` fit together, as `check_residual_norm` does."""
    rows = {"grad": grad, "branch": branch}
    problems = _row_problems(rows, {"scale": scale}, keep)
    problems += [*_wanted_problems({"branch": branch, "scale": scale}, output_mask[1:]), *refusals]
    if problems:
        raise_problems("residual_add_backward", problems, **rows, scale=scale, keep=keep)


def _row_problems(rows: dict[str, Tensor | None], vectors: dict[str, Tensor | None], keep: Tensor | None) -> list[str]:
    """What is wrong with rows `[B, N, E]`, the first of which is there, vectors `[E]`, and what is kept of samples."""
    (first, leader), *others = rows.items()
    assert leader is not None
    if leader.ndim != 3 or 0 in _known(leader.shape[2]):
        return [f"{first} must be [B, N, E] with at least one number a token"]
    problems = []
    batch, _, size = leader.shape
    for name, tensor in others:
        if tensor is not None and shapes_differ(tensor, leader.shape):
            problems.append(f"{name} must have the shape of {first}")
    for name, tensor in vectors.items():
        if tensor is not None and shapes_differ(tensor, [size]):
            problems.append(f"{name} must be [E] = [{size}]")
    for name, tensor in (rows | vectors).items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            problems.append(f"{name} must be floating point")
    if keep is not None and (keep.dtype != torch.float32 or shapes_differ(keep, [batch])):
        problems.append(f"keep must be float32 [B] = [{batch}]")
    if any(x is not None and x.device != leader.device for x in (*rows.values(), *vectors.values(), keep)):
        problems.append("all tensors must be on one device")
    return problems


def _wanted_problems(inputs: dict[str, Tensor | None], wanted: Sequence[bool]) -> list[str]:
    """What is missing of `inputs`, branch first, for the gradients that are wanted of the others."""
    (_, branch), *vectors = inputs.items()
    problems = [
        f"the gradient of {name} needs {name}"
        for (name, tensor), flag in zip(vectors, wanted, strict=True)
        if flag and tensor is None
    ]
    if wanted[0] and branch is None:
        problems.append("the gradient of scale needs branch")
    return problems


def raise_problems(operator: str, problems: Sequence[str], **tensors: Tensor | None) -> NoReturn:
    """Raise one ValueError with what was given and every reason why it is refused."""
    given = ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        for name, tensor in tensors.items()
        if tensor is not None
    )
    raise ValueError(f"beit_fast::{operator} cannot serve {given}: {'; '.join(problems)}")
