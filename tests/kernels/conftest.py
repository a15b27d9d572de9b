"""Tests of the kernels: Triton on CUDA or in its interpreter, else the native library.

Triton interprets its kernels if `TRITON_INTERPRET=1` is set. A process without any of these collects nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ..support.devices import INTERPRETER_VARIABLE, kernel_device, kernels_are_native

collect_ignore_glob = ["test_*.py"] if kernel_device() is None else []
if kernels_are_native():
    # Tests of Triton internals, or of kernels that the native library does not have.
    collect_ignore_glob += ["test_arguments.py", "test_bias.py", "test_bias_layouts.py", "test_launcher.py"]
    collect_ignore_glob += ["test_linear_gelu.py", "test_residual_norm.py", "test_training_blocks.py"]
if os.environ.get(INTERPRETER_VARIABLE) == "1":
    from .interpreter import patch_once_per_launch, skip_overflow_checks

    patch_once_per_launch()
    skip_overflow_checks()

# Deterministic mode warns about cuBLAS if this variable is not set.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    """Fill new memory with NaN, so that an element not written is noticed.

    Deterministic mode does this. It only warns of nondeterministic operators, such as the gradient of a bilinear
    resize on CUDA.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
