"""Where this process can run the Triton kernels, which is settled when Triton is first imported."""

from __future__ import annotations

import os

import torch

INTERPRETER_VARIABLE = "TRITON_INTERPRET"


def why_no_cuda() -> str | None:
    """The reason why this process cannot run compiled kernels, or None where it can."""
    if os.environ.get(INTERPRETER_VARIABLE, "0") not in ("", "0"):
        return f"{INTERPRETER_VARIABLE} is set: Triton interprets its kernels and compiles none"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def kernel_device() -> torch.device | None:
    """CPU under `TRITON_INTERPRET=1`, else CUDA where there is a device, else None: the kernels run nowhere."""
    if os.environ.get(INTERPRETER_VARIABLE) == "1":
        return torch.device("cpu")
    return None if why_no_cuda() else torch.device("cuda", torch.cuda.current_device())
