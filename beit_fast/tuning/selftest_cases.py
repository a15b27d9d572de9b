"""The checks of the self-test on each kind of device.

On a GPU they compile about 95 kernels: 68 with matrix products and 26 small ones. The 68 are 45 of attention (three
dtypes, four layouts, head dimension 64), 17 for its cases with more options, and 6 linear layers. Sizes give every loop
two steps and a ragged end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ops.dispatch import availability
from ..position_bias import Window
from . import problems
from .problems import Problem

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Check:
    """One case of one operator.

    Attributes:
        kernel: The operator.
        case: Sizes and options, for people.
        dtype: dtype of the operands.
        bias: Layout of the bias; "-" for operators without one.
        served_by: The kernel that serves.
        build: Draws the problem on a device.
        tf32: Whether fp32 products use tf32.
        refused: Why the dispatcher refuses this kernel on the device.
    """

    kernel: str
    case: str
    dtype: torch.dtype
    bias: str
    served_by: str
    build: Callable[[torch.device], Problem]
    tf32: bool = False
    refused: tuple[str, ...] = ()

    @property
    def dtype_label(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Sizes:
    """Sizes that a kind of device checks in a short time."""

    batch: int
    heads: int
    head_dim: int
    windows: tuple[Window, Window, Window]  # of even width, of odd width, too large for a row of each head
    rows: tuple[int, int, int]  # [B, N, E] of the residual norm
    linear: tuple[tuple[int, int, int], ...]  # rows, inputs, outputs
    patches: tuple[int, int, int, int]  # image, patch, batch, embedding


# 14x18 and 15x15 leave 60 and 33 keys for the last step. 2x298 reads the extended table.
_GPU = Sizes(
    16, 12, 64, ((14, 18), (15, 15), (2, 298)), (16, 253, 768), ((253, 768, 3072), (8097, 768, 3072)), (224, 16, 4, 768)
)
_CPU = Sizes(2, 4, 64, ((14, 18), (15, 15), (2, 298)), (2, 253, 768), ((253, 768, 3072),), (224, 16, 2, 256))
_INTERPRETED = Sizes(1, 1, 16, ((6, 12), (9, 9), (1, 514)), (2, 7, 40), ((40, 48, 72),), (32, 8, 1, 40))


def sizes_of(kernel: str) -> Sizes:
    """Return the sizes for an attention kernel of `availability.KERNELS`."""
    return {"triton": _GPU, "triton-interpret": _INTERPRETED}.get(kernel, _CPU)


def checks_for(device: torch.device, kernel: str) -> list[Check]:
    """List the checks.

    Args:
        device: The device of the kernels.
        kernel: The attention kernel that serves there, of `availability.KERNELS`.

    Returns:
        The checks. Those of a pair of GPU and Triton that the dispatcher refuses are labeled. Run them inside
        `availability.ignore_compiler_hazards`.
    """
    sizes = sizes_of(kernel)
    layouts = (*((window, True) for window in sizes.windows), (sizes.windows[0], False))
    checks = [
        _attention(kernel, sizes, window, dtype, biased=biased)
        for dtype in GPU_DTYPES
        for window, biased in layouts
        # The interpreter takes half a minute for a window that needs the extended table.
        if kernel != "triton-interpret" or dtype == torch.float32 or window != sizes.windows[2]
    ]
    checks += _attention_options(kernel, sizes)
    checks += [_linear_gelu(device, shape, dtype) for dtype in GPU_DTYPES for shape in sizes.linear]
    # The kernels so far have matrix products, of which the known faults are.
    refused = availability.compiler_hazards_of(device)
    checks = [replace(check, refused=refused if check.served_by == "triton" else ()) for check in checks]
    checks += [_residual_norm(device, sizes, dtype) for dtype in GPU_DTYPES]
    return checks + [_patch_embed(device, sizes, *dtypes) for dtypes in _PATCH_DTYPES]


_PATCH_DTYPES = (
    *((dtype, dtype) for dtype in GPU_DTYPES),
    (torch.uint8, torch.bfloat16),
)
"""dtypes of pixels and weights."""


def _attention_options(kernel: str, sizes: Sizes) -> list[Check]:
    """List the cases with more options than dtype and layout."""
    window, half = sizes.windows[0], torch.bfloat16
    # Of a batch of two or more, the last sample has no key at all.
    masked: dict[str, Any] = {"masked": True, "batch": max(2, sizes.batch)}
    checks = [
        _attention(kernel, sizes, window, torch.float16, head_dim=32),
        _attention(kernel, sizes, window, half, head_dim=min(80, sizes.head_dim + 16), **masked),
        # The reference computes the dropout mask of each weight in Python.
        _attention(kernel, sizes, window, half, dropout_p=0.25, batch=1, heads=1),
    ]
    if kernel == "triton":
        # One image of 676 patches: the forward splits the keys and combines the results.
        checks.append(_attention(kernel, sizes, (26, 26), half, batch=1))
        checks.append(_attention(kernel, sizes, window, torch.float32, tf32=True))
    return checks


def _attention(
    kernel: str, sizes: Sizes, window: Window, dtype: torch.dtype, tf32: bool = False, **options: Any
) -> Check:
    given: dict[str, Any] = {"batch": sizes.batch, "heads": sizes.heads, "head_dim": sizes.head_dim, **options}
    extra = [f"D={given['head_dim']}"] if given["head_dim"] != sizes.head_dim else []
    extra += ["key mask"] if given.get("masked") else []
    extra += ["dropout"] if given.get("dropout_p") else []
    name = " ".join([f"{given['batch']}x{window[0] * window[1] + 1}x{given['heads']}", *extra])
    layout = _layout(kernel, window, dtype) if given.get("biased", True) else "none"
    build = functools.partial(_build_attention, window, dtype, given)
    return Check("attention", name, dtype, layout, kernel, build, tf32)


def _build_attention(window: Window, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> Problem:
    return problems.attention_problem(window, dtype, device, **options)


def _layout(kernel: str, window: Window, dtype: torch.dtype) -> str:
    """Return the layout in which a kernel reads the bias."""
    if kernel not in availability.TRITON_KERNELS:
        return "packed" if kernel == "cpp" else "table"
    from ..kernels.attention import configs
    from ..kernels.common import device

    interpreted = kernel == "triton-interpret"
    example = torch.empty(0, dtype=dtype, device="cpu" if interpreted else "cuda")
    return configs.bias_layout(device.architecture_of(example), dtype.itemsize, window).name


def _residual_norm(device: torch.device, sizes: Sizes, dtype: torch.dtype) -> Check:
    batch, tokens, size = sizes.rows
    reasons = availability.residual_norm_unsupported_reasons(device, [dtype], size, batch * tokens)
    build = functools.partial(_build_residual_norm, sizes.rows, dtype)
    return Check("residual norm", f"{batch}x{tokens}x{size}", dtype, "-", _triton_or_torch(device, reasons), build)


def _build_residual_norm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    return problems.residual_norm_problem(shape, dtype, device)


def _linear_gelu(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> Check:
    rows, inputs, outputs = shape
    reasons = availability.linear_gelu_unsupported_reasons(device, dtype, outputs)
    build = functools.partial(_build_linear_gelu, shape, dtype)
    case = f"{rows}x{inputs}x{outputs}"
    return Check("linear + GELU", case, dtype, "-", _triton_or_torch(device, reasons), build)


def _build_linear_gelu(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    return problems.linear_gelu_problem(*shape, dtype, device)


def _patch_embed(device: torch.device, sizes: Sizes, pixels: torch.dtype, dtype: torch.dtype) -> Check:
    image, _, batch, _ = sizes.patches
    dtypes = [dtype] if pixels == torch.uint8 else [dtype, pixels]
    served_by = availability.patch_embed_kernel(device, dtypes, 3)
    build = functools.partial(_build_patch_embed, sizes.patches, pixels, dtype)
    name = f"{batch}x{image}x{image}" + (" uint8 pixels" if pixels == torch.uint8 else "")
    return Check("patch embedding", name, dtype, "-", served_by, build)


def _build_patch_embed(
    shape: tuple[int, int, int, int], pixels: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Problem:
    return problems.patch_embed_problem(*shape, pixels, dtype, device)


def _triton_or_torch(device: torch.device, reasons: tuple[str, ...]) -> str:
    if reasons:
        return "torch"
    return "triton" if device.type == "cuda" else "triton-interpret"
