"""Which attention kernels this process tests, and where: settled when the package and Triton are first imported."""

from __future__ import annotations

import os

import torch

from beit_fast import native

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

CPU_ATTENTION = "cpp" if native.is_loaded("_C") else "torch"
"""The kernel behind `"triton"` on CPU tensors in this process, where Triton does not interpret."""

DEFAULT_ATTENTION = "cpp" if native.is_loaded("_C") else "sdpa"
"""What `attn_implementation=None` comes to on the CPU in this process."""


def why_no_cuda() -> str | None:
    """The reason why this process cannot run compiled kernels, or None where it can."""
    if os.environ.get(INTERPRETER_VARIABLE, "0") not in ("", "0"):
        return f"{INTERPRETER_VARIABLE} is set: Triton interprets its kernels and compiles none"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def kernels_are_native() -> bool:
    """Whether tests/kernels runs the kernels of the native library: if it is loaded and Triton has no CUDA device."""
    return native.is_loaded("_C") and why_no_cuda() is not None


def kernel_device() -> torch.device | None:
    """CPU for native and interpreted kernels, CUDA for compiled kernels, None if no kernel can run."""
    if os.environ.get(INTERPRETER_VARIABLE) == "1" or kernels_are_native():
        return torch.device("cpu")
    return None if why_no_cuda() else torch.device("cuda", torch.cuda.current_device())
