"""Which kernel serves the operators on a device, and why another does not: facts only, a leaf.

`attn_implementation="triton"` names one operator; the kernel behind it depends on the device and is one of `KERNELS`.
Patch embedding has `PATCH_EMBED_KERNELS`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence

import torch

from ... import native

KERNELS = ("triton/cuda", "triton/interpreter", "triton/c++", "triton/composite")
"""Triton on CUDA; the same kernels interpreted on CPU tensors; the native library's kernels and PyTorch operations on
CPU tensors."""

TRITON_KERNELS = ("triton/cuda", "triton/interpreter")
"""Those of `KERNELS` that are Triton's; the other operators have Triton kernels on the same devices."""

PATCH_EMBED_KERNELS = ("fused/cuda", "fused/c++", "fused/composite")
"""The native libraries' kernels on CUDA and CPU; PyTorch operations on any device."""

HEAD_DIMS = range(8, 129, 8)
"""Head dimensions that the Triton kernels take."""

LARGEST_ROW_SIZE = 4096
LARGEST_ROW_COUNT = 2**30
"""Numbers of a token, and tokens of a batch, that the Triton kernels of residual and LayerNorm take."""

LARGEST_OUTPUT_COUNT = 2**24 - 1
"""Rows of a weight that the Triton kernel of linear and GELU takes."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether CPU tensors go through the Triton kernels in Triton's interpreter; fixed when the package is imported."""

_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float64)
_FUSED = ("triton/cuda", "triton/c++")


@functools.cache
def has_triton() -> bool:
    """Whether the package `triton` can be imported; it is not imported to find out."""
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


def kernel_refusals(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Every reason why `kernel` cannot serve attention on `device` with this dtype and head dimension."""
    if kernel == "triton/cuda":
        return _cuda_refusals(device) + _triton_refusals(dtype, head_dim)
    if kernel == "triton/interpreter":
        reasons = () if INTERPRETED else ("TRITON_INTERPRET=1 was not set when beit_fast was imported",)
        return _wrong_device(device, "cpu") + reasons + _triton_refusals(dtype, head_dim)
    if kernel == "triton/c++":
        return _wrong_device(device, "cpu") + _library_refusals("_C") + _dtype_refusals([dtype], _CPU_DTYPES)
    reasons = ("TRITON_INTERPRET=1 sends CPU tensors to Triton's interpreter",) if INTERPRETED else ()
    return _wrong_device(device, "cpu", "meta") + reasons + _replaced_refusals(device) + _float_refusals(dtype)


def serving_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The kernel that serves `"triton"` here, or None where none does."""
    for kernel in KERNELS:
        if not kernel_refusals(kernel, device, dtype, head_dim):
            return kernel
    return None


def onnx_refusals() -> tuple[str, ...]:
    """Why no operator of this package can serve now, whatever the device: the model is being exported to ONNX."""
    captured = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if not captured or not torch.onnx.is_in_onnx_export():
        return ()
    return ("the model is being exported to ONNX, which has none of beit_fast's operators",)


# Dynamo would take is_in_onnx_export() for False; see attention.choose.
onnx_refusals._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_fused(kernel: str | None) -> bool:
    """Whether `kernel` computes attention without ever holding a `[N, N]` matrix, and is meant to be fast."""
    return kernel in _FUSED


def patch_embed_refusals(
    kernel: str, device: torch.device, dtypes: Sequence[torch.dtype] = (), normalized_channels: int = 0
) -> tuple[str, ...]:
    """Every reason why `kernel` cannot serve patch embedding on `device`.

    `dtypes` are those of the floating-point tensors; `normalized_channels` counts channels where mean or std is given.
    """
    if kernel == "fused/cuda":
        reasons = _cuda_refusals(device) + _library_refusals("_C_cuda") + _dtype_refusals(dtypes, _GPU_DTYPES)
        return reasons if normalized_channels <= 128 else (*reasons, "mean and std of more than 128 channels")
    if kernel == "fused/c++":
        return _wrong_device(device, "cpu") + _library_refusals("_C") + _dtype_refusals(dtypes, _CPU_DTYPES)
    return _replaced_refusals(device)


def patch_embed_kernel(device: torch.device, dtypes: Sequence[torch.dtype] = (), normalized_channels: int = 0) -> str:
    """The kernel that serves patch embedding here; see `patch_embed_refusals`."""
    for kernel in PATCH_EMBED_KERNELS[:-1]:
        if not patch_embed_refusals(kernel, device, dtypes, normalized_channels):
            return kernel
    return PATCH_EMBED_KERNELS[-1]


def residual_norm_refusals(
    device: torch.device, dtypes: Sequence[torch.dtype], row_size: int, row_count: int
) -> tuple[str, ...]:
    """Every reason why the Triton kernels cannot add a residual or normalise `row_count` rows of `row_size` numbers."""
    reasons = _triton_place_refusals(device) + _triton_type_refusals(dtypes)
    if row_size > LARGEST_ROW_SIZE:
        reasons += (f"rows of {row_size} numbers are longer than {LARGEST_ROW_SIZE}",)
    if row_count > LARGEST_ROW_COUNT:
        reasons += (f"{row_count} rows are more than {LARGEST_ROW_COUNT}",)
    return reasons


def triton_takes_rows(row_size: int, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the Triton kernels take such rows, where they run at all."""
    return row_size <= LARGEST_ROW_SIZE and all(dtype in _GPU_DTYPES for dtype in dtypes)


def linear_gelu_refusals(device: torch.device, dtype: torch.dtype, output_count: int) -> tuple[str, ...]:
    """Every reason why the Triton kernel cannot serve a linear layer with GELU on `device`."""
    reasons = _triton_place_refusals(device) + _triton_type_refusals([dtype])
    if output_count > LARGEST_OUTPUT_COUNT:
        reasons += (f"{output_count} outputs are more than {LARGEST_OUTPUT_COUNT}",)
    return reasons


def _library_refusals(library: str) -> tuple[str, ...]:
    reason = native.refusal(library)
    return () if reason is None else (reason,)


def _replaced_refusals(device: torch.device) -> tuple[str, ...]:
    return ("the native library serves CPU tensors",) if device.type == "cpu" and native.is_loaded("_C") else ()


def _wrong_device(device: torch.device, *accepted: str) -> tuple[str, ...]:
    return () if device.type in accepted else (f"serves {accepted[0]} tensors, not {device.type}",)


def _dtype_refusals(dtypes: Sequence[torch.dtype], accepted: Sequence[torch.dtype]) -> tuple[str, ...]:
    refused = [dtype for dtype in dict.fromkeys(dtypes) if dtype not in accepted]
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted) if refused else ""
    return tuple(f"dtype {dtype} is none of {names}" for dtype in refused)


def _float_refusals(dtype: torch.dtype) -> tuple[str, ...]:
    return () if dtype.is_floating_point else (f"dtype {dtype} is not a floating-point type",)


def _triton_refusals(dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    reasons = _triton_type_refusals([dtype])
    if head_dim not in HEAD_DIMS:
        reasons += (f"head dimension {head_dim} is not a multiple of 8 from 8 to 128",)
    return reasons


def _triton_place_refusals(device: torch.device) -> tuple[str, ...]:
    return () if device.type == "cpu" and INTERPRETED else _cuda_refusals(device)


def _triton_type_refusals(dtypes: Sequence[torch.dtype]) -> tuple[str, ...]:
    reasons = () if has_triton() else ("the package triton is not installed",)
    return reasons + _dtype_refusals(dtypes, _GPU_DTYPES)


def _cuda_refusals(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return _wrong_device(device, "cuda")
    if torch.version.hip is not None:
        return ("the kernels are written for NVIDIA GPUs, and this is a ROCm build of torch",)
    return _capability_refusals(device.index)


@functools.cache
def _capability_refusals(index: int | None) -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ("torch finds no CUDA device",)
    major, minor = torch.cuda.get_device_capability(index)
    return () if major >= 8 else (f"compute capability {major}.{minor} is below 8.0",)
