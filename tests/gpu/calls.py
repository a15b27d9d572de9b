"""Calls of `beit_fast.rel_pos_attention` on CUDA, and helpers of the GPU tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import beit_fast
from beit_fast import native

from ..support.cases import Case
from ..support.devices import cuda_unsupported_reason

if _reason := cuda_unsupported_reason():
    pytest.skip(_reason, allow_module_level=True)

LONG = 10**9
"""Clock cycles for `torch.cuda._sleep`, about half a second.

This is several thousand times the duration of a launch.
"""

needs_cuda_library = pytest.mark.skipif(
    native.unsupported_reason("_C_cuda") is not None,
    reason=f"the CUDA library is not available: {native.unsupported_reason('_C_cuda')}",
)


@contextmanager
def forbid_synchronization() -> Iterator[None]:
    """Raise if an operation of PyTorch waits for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def leaves_of(case: Case) -> list[Tensor]:
    """Copy q, k, v and the table, if any; the copies require gradients."""
    tensors = (case.query, case.key, case.value, case.table)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors if tensor is not None]


def attend(case: Case, leaves: list[Tensor], function: Callable[..., Tensor] = beit_fast.rel_pos_attention) -> Tensor:
    """Return out `[B, N, H, D]` of `leaves` with the options of `case`."""
    table = leaves[3] if len(leaves) == 4 else None
    return function(*leaves[:3], table, case.window, case.key_mask, dropout_p=case.dropout_p, seed=case.seed)


def attend_and_differentiate(
    case: Case, leaves: list[Tensor] | None = None, function: Callable[..., Tensor] = beit_fast.rel_pos_attention
) -> list[Tensor]:
    """Return out, dq, dk, dv and dtable."""
    leaves = leaves_of(case) if leaves is None else leaves
    out = attend(case, leaves, function)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out)]


def need_free_memory(size: int) -> None:
    """Skip the test unless the device has `size` free bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of device memory ({free / 2**30:.0f} GiB are free)")
