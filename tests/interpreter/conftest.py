"""Tests that run the Triton kernels on CPU tensors: `TRITON_INTERPRET=1` must be set before Triton loads.

In any other process nothing here is collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN: what a kernel forgets to write cannot look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
