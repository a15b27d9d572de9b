"""Tests of the Triton kernels: on CPU tensors under `TRITON_INTERPRET=1`, else on CUDA where there is a device.

In any other process nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ..support.devices import kernel_device

collect_ignore_glob = ["test_*.py"] if kernel_device() is None else []

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
