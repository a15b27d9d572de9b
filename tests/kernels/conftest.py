"""Tests of the kernels, the same for all: Triton's in its interpreter or on CUDA, else those of the native library.

Triton interprets its kernels under `TRITON_INTERPRET=1`. A process without any of these collects nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ..support.devices import kernel_device, kernels_are_native

collect_ignore_glob = ["test_*.py"] if kernel_device() is None else []
if kernels_are_native():
    # Inside Triton's kernels, or what the native library has no kernels for.
    collect_ignore_glob += ["test_arguments.py", "test_bias.py", "test_launcher.py", "test_routes.py"]
    collect_ignore_glob += ["test_linear_gelu.py", "test_residual_norm.py", "test_training_blocks.py"]

# Deterministic mode complains about cuBLAS without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN: what a kernel forgets to write cannot look right.

    It only warns of what else it does not like, such as the gradient of a bilinear resize on CUDA.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
