"""Which attention kernels this process tests, and where: settled when the package and Triton are first imported."""

from __future__ import annotations

import os

import torch

from beit_fast import native

INTERPRETER_VARIABLE = "TRITON_INTERPRET"
NATIVE_VARIABLE = "BEIT_FAST_TEST_NATIVE"

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
    """Whether tests/kernels runs the native library's kernels: where `BEIT_FAST_TEST_NATIVE=1` asks for them."""
    return os.environ.get(NATIVE_VARIABLE) == "1" and native.is_loaded("_C")


def kernel_device() -> torch.device | None:
    """CPU for native and interpreted kernels, else CUDA where there is a device, else None: the kernels run nowhere."""
    if os.environ.get(INTERPRETER_VARIABLE) == "1" or kernels_are_native():
        return torch.device("cpu")
    return None if why_no_cuda() else torch.device("cuda", torch.cuda.current_device())
