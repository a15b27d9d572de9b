"""Availability of each operator's kernels on a device.

The functions return the kernel that serves, or the reasons why a kernel cannot.

`attn_implementation="triton"` names one operator; its kernel depends on the device and is one of `KERNELS`. Patch
embedding has `PATCH_EMBED_KERNELS`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from ... import native

KernelName = Literal["triton", "triton-interpret", "cpp", "torch"]

KERNELS: tuple[KernelName, ...] = get_args(KernelName)
"""Attention kernels: Triton on CUDA; Triton's interpreter, the native library and PyTorch operations on CPU."""

TRITON_KERNELS: tuple[KernelName, ...] = ("triton", "triton-interpret")
"""Kernels written in Triton; the other operators have Triton kernels on the same devices."""

PatchEmbedKernelName = Literal["cuda", "cpp", "torch"]

PATCH_EMBED_KERNELS: tuple[PatchEmbedKernelName, ...] = get_args(PatchEmbedKernelName)
"""Patch embedding kernels: the native libraries on CUDA and CPU, PyTorch operations on any device."""

HEAD_DIMS = range(8, 129, 8)
"""Head dimensions that the Triton kernels support."""

LARGEST_ROW_SIZE = 4096
LARGEST_ROW_COUNT = 2**30
"""Largest token size and token count that the Triton kernels of residual and LayerNorm support."""

LARGEST_OUTPUT_COUNT = 2**24 - 1
"""Largest number of rows of a weight that the Triton kernel of linear and GELU supports."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether CPU tensors run the Triton kernels in Triton's interpreter; read when the package is imported."""

_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

FLOAT_DTYPES = (*_GPU_DTYPES, torch.float64)
"""Floating-point dtypes of the native library on CPU, and of patch embedding on any device."""

_FUSED: tuple[KernelName, ...] = ("triton", "cpp")


@functools.cache
def has_triton() -> bool:
    """Whether the package `triton` can be imported; this does not import it."""
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


def attention_unsupported_reasons(
    kernel: KernelName, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, ...]:
    """List why `kernel` cannot serve attention on `device`. `dtype` and `head_dim` are those of the queries."""
    if kernel == "triton":
        return (
            _cuda_reasons(device) + _compiler_reasons(device) + _triton_reasons(dtype, head_dim) + _variable_reasons()
        )
    if kernel == "triton-interpret":
        reasons = () if INTERPRETED else ("TRITON_INTERPRET=1 was not set when beit_fast was imported",)
        return _wrong_device(device, "cpu") + reasons + _triton_reasons(dtype, head_dim) + _variable_reasons()
    if kernel == "cpp":
        return _wrong_device(device, "cpu") + _cpp_reasons() + dtype_reasons([dtype], FLOAT_DTYPES)
    reasons = ("TRITON_INTERPRET=1 routes CPU tensors to Triton's interpreter",) if INTERPRETED else ()
    return _wrong_device(device, "cpu", "meta") + reasons + _replaced_reasons(device) + _float_reasons(dtype)


def serving_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelName | None:
    """Return the kernel of `"triton"` on `device`; None if no kernel can serve.

    Raises:
        ValueError: If an environment variable of this package cannot be honored.
    """
    native.check_variables(device.type)
    for kernel in KERNELS:
        if not attention_unsupported_reasons(kernel, device, dtype, head_dim):
            return kernel
    return None


def onnx_unsupported_reasons() -> tuple[str, ...]:
    """Return the reasons why no operator can serve in an ONNX export.

    They hold on every device. Outside an export the result is empty.
    """
    captured = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if not captured or not torch.onnx.is_in_onnx_export():
        return ()
    return ("the model is being exported to ONNX, which has none of beit_fast's operators",)


# Dynamo would treat is_in_onnx_export() as False; see attention.choose.
onnx_unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_fused(kernel: str | None) -> bool:
    """Return whether `kernel` is fast and never stores a `[N, N]` matrix."""
    return kernel in _FUSED


def patch_embed_unsupported_reasons(
    kernel: PatchEmbedKernelName,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (),
    normalized_channels: int = 0,
) -> tuple[str, ...]:
    """List why `kernel` cannot serve patch embedding on `device`.

    Args:
        kernel: one of `PATCH_EMBED_KERNELS`.
        device: device of the tensors.
        dtypes: dtypes of the floating-point tensors.
        normalized_channels: number of channels if mean or std is given, else 0.
    """
    if kernel == "cuda":
        reasons = _cuda_reasons(device) + _library_reasons("_C_cuda") + dtype_reasons(dtypes, _GPU_DTYPES)
        return reasons if normalized_channels <= 128 else (*reasons, "mean and std have more than 128 channels")
    if kernel == "cpp":
        return _wrong_device(device, "cpu") + _cpp_reasons() + dtype_reasons(dtypes, FLOAT_DTYPES)
    return _replaced_reasons(device)


def patch_embed_kernel(
    device: torch.device, dtypes: Sequence[torch.dtype] = (), normalized_channels: int = 0
) -> PatchEmbedKernelName:
    """The kernel that serves patch embedding; arguments as in `patch_embed_unsupported_reasons`.

    Raises:
        ValueError: If an environment variable of this package cannot be honored.
    """
    native.check_variables(device.type)
    for kernel in PATCH_EMBED_KERNELS[:-1]:
        if not patch_embed_unsupported_reasons(kernel, device, dtypes, normalized_channels):
            return kernel
    return PATCH_EMBED_KERNELS[-1]


def residual_norm_unsupported_reasons(
    device: torch.device, dtypes: Sequence[torch.dtype], row_size: int, row_count: int
) -> tuple[str, ...]:
    """List why the Triton kernels cannot add or normalize these rows.

    There are `row_count` rows of `row_size` numbers.
    """
    reasons = _triton_place_reasons(device) + _triton_type_reasons(dtypes)
    if row_size > LARGEST_ROW_SIZE:
        reasons += (f"rows of {row_size} numbers are longer than {LARGEST_ROW_SIZE}",)
    if row_count > LARGEST_ROW_COUNT:
        reasons += (f"{row_count} rows are more than {LARGEST_ROW_COUNT}",)
    return reasons


def triton_takes_rows(row_size: int, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the Triton kernels support this row size and these dtypes. The device is not checked."""
    return row_size <= LARGEST_ROW_SIZE and all(dtype in _GPU_DTYPES for dtype in dtypes)


def linear_gelu_unsupported_reasons(device: torch.device, dtype: torch.dtype, output_count: int) -> tuple[str, ...]:
    """List why the Triton kernel cannot serve `linear_gelu` on `device`."""
    reasons = _triton_place_reasons(device) + _compiler_reasons(device) + _triton_type_reasons([dtype])
    if output_count > LARGEST_OUTPUT_COUNT:
        reasons += (f"{output_count} outputs are more than {LARGEST_OUTPUT_COUNT}",)
    return reasons


def _library_reasons(library: str) -> tuple[str, ...]:
    reason = native.unsupported_reason(library)
    return () if reason is None else (reason,)


def _cpp_reasons() -> tuple[str, ...]:
    error = native.instruction_set_error()
    return _library_reasons("_C") if error is None else (error,)


def _replaced_reasons(device: torch.device) -> tuple[str, ...]:
    is_replaced = device.type == "cpu" and native.is_loaded("_C")
    return (("the native library serves CPU tensors",) if is_replaced else ()) + _variable_reasons()


def _variable_reasons() -> tuple[str, ...]:
    error = native.variable_error()  # every call raises it
    return () if error is None else (error,)


def _wrong_device(device: torch.device, *accepted: str) -> tuple[str, ...]:
    return () if device.type in accepted else (f"serves {accepted[0]} tensors, not {device.type}",)


def dtype_reasons(dtypes: Sequence[torch.dtype], accepted: Sequence[torch.dtype]) -> tuple[str, ...]:
    """List the dtypes that are not among those accepted."""
    unsupported = [dtype for dtype in dict.fromkeys(dtypes) if dtype not in accepted]
    if not unsupported:
        return ()
    return tuple(f"dtype {dtype} is not supported (expected {join_dtypes(accepted)})" for dtype in unsupported)


def join_dtypes(dtypes: Sequence[torch.dtype]) -> str:
    """Join the names of dtypes as in "float16, bfloat16 or float32"."""
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}"


def _float_reasons(dtype: torch.dtype) -> tuple[str, ...]:
    return () if dtype.is_floating_point else (f"dtype {dtype} is not a floating-point type",)


def _triton_reasons(dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    reasons = _triton_type_reasons([dtype])
    if head_dim not in HEAD_DIMS:
        reasons += (f"head dimension {head_dim} is not a multiple of 8 from 8 to 128",)
    return reasons


def _triton_place_reasons(device: torch.device) -> tuple[str, ...]:
    return () if device.type == "cpu" and INTERPRETED else _cuda_reasons(device)


def _triton_type_reasons(dtypes: Sequence[torch.dtype]) -> tuple[str, ...]:
    reasons = () if has_triton() else ("the package triton is not installed",)
    return reasons + dtype_reasons(dtypes, _GPU_DTYPES)


def _cuda_reasons(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return _wrong_device(device, "cuda")
    if torch.version.hip is not None:
        return ("the kernels are written for NVIDIA GPUs, and this is a ROCm build of torch",)
    return _capability_reasons(device.index)


def _compiler_reasons(device: torch.device) -> tuple[str, ...]:
    return () if _hazards_are_ignored else compiler_hazards_of(device)


_hazards_are_ignored = False


@contextmanager
def ignore_compiler_hazards() -> Iterator[None]:
    """Allow wrongly compiled Triton kernels inside the context.

    The self-test measures such a pair of GPU and Triton. Models have to be built outside: their choices are cached.
    """
    global _hazards_are_ignored
    before, _hazards_are_ignored = _hazards_are_ignored, True
    try:
        yield
    finally:
        _hazards_are_ignored = before


def compiler_hazards_of(device: torch.device) -> tuple[str, ...]:
    """List faults of the installed Triton for this device.

    They affect kernels with matrix products.
    """
    if device.type != "cuda" or _cuda_reasons(device) or not has_triton():
        return ()
    return _compiler_hazards(device.index)


@functools.cache
def _compiler_hazards(index: int | None) -> tuple[str, ...]:
    # The distribution that brings the package may have another name, so the version is that of the package.
    import triton

    from ...kernels.common.compiler_hazards import compiler_hazards

    major, minor = torch.cuda.get_device_capability(index)
    return tuple(compiler_hazards(10 * major + minor, triton.__version__))


@functools.cache
def _capability_reasons(index: int | None) -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ("torch finds no CUDA device",)
    major, minor = torch.cuda.get_device_capability(index)
    return () if major >= 8 else (f"compute capability {major}.{minor} is below 8.0",)
