"""Attention kernels and device of this process, fixed at import."""

from __future__ import annotations

import os

import torch

from beit_fast import native

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

CPU_ATTENTION = "cpp" if native.is_loaded("_C") else "torch"
"""The kernel of `"triton"` on CPU tensors, if Triton does not interpret."""

DEFAULT_ATTENTION = "cpp" if native.is_loaded("_C") else "sdpa"
"""The kernel of `attn_implementation=None` on CPU tensors."""


def cuda_unsupported_reason() -> str | None:
    """Return why this process cannot run compiled kernels, or None if it can."""
    if os.environ.get(INTERPRETER_VARIABLE, "0") not in ("", "0"):
        return f"{INTERPRETER_VARIABLE} is set: Triton interprets its kernels and compiles none"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def kernels_are_native() -> bool:
    """Return whether tests/kernels runs the native library instead of Triton."""
    return native.is_loaded("_C") and cuda_unsupported_reason() is not None


def kernel_device() -> torch.device | None:
    """Return the device of the tested kernels, or None if no kernel can run."""
    if os.environ.get(INTERPRETER_VARIABLE) == "1" or kernels_are_native():
        return torch.device("cpu")
    return None if cuda_unsupported_reason() else torch.device("cuda", torch.cuda.current_device())
