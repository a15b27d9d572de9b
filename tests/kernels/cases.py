"""Cases on the device of the attention kernels, and the results of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import beit_fast

from ..support.cases import Case, attention_case, check_results
from ..support.devices import kernel_device, kernels_are_native

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES)

if kernels_are_native():
    attention_forward = beit_fast.ops.attention_op
    attention_backward = beit_fast.ops.attention_backward_op
else:
    from beit_fast.kernels.attention.launch import attention_backward, attention_forward

triton_only = pytest.mark.skipif(kernels_are_native(), reason="tests the Triton kernels or their launcher")

OutputMask = tuple[bool, bool, bool, bool]
EVERYTHING: OutputMask = (True, True, True, True)


def device() -> torch.device:
    """Return the device of the kernels in this process.

    Without one, conftest.py collects nothing and a file that is named on the command line is skipped.
    """
    found = kernel_device()
    if found is None:
        pytest.skip("the kernels need CUDA, TRITON_INTERPRET=1 or the native library", allow_module_level=True)
    return found


def make_case(
    window: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 2,
    head_dim: int = 32,
    **options: Any,
) -> Case:
    """Draw a case on the device of the kernels; its tensors do not require gradients.

    The options are those of `attention_case`.
    """
    return attention_case(
        window, dtype, heads=heads, head_dim=head_dim, device=device(), requires_grad=False, **options
    )


def run_forward(case: Case) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the kernels."""
    return attention_forward(
        case.query,
        case.key,
        case.value,
        case.table,
        case.key_mask,
        case.window,
        case.scale,
        case.dropout_p,
        case.seed,
    )


def run_backward(
    case: Case, out: Tensor, lse: Tensor, output_mask: OutputMask = EVERYTHING
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv, dtable) of the kernels."""
    return attention_backward(
        case.grad_out,
        case.query,
        case.key,
        case.value,
        case.table,
        case.key_mask,
        out,
        lse,
        case.window,
        case.scale,
        case.dropout_p,
        case.seed,
        output_mask,
    )


def run_kernels(case: Case) -> list[Tensor]:
    """Return out, lse, dq, dk, dv and dtable of the kernels."""
    out, lse = run_forward(case)
    return [out, lse, *run_backward(case, out, lse)]


def check_parity(case: Case) -> None:
    """Compare the kernels with the fp64 oracle.

    The budget is the error of eager attention in the same dtype. The inputs must not change.
    """
    with inputs_unchanged(case):
        out, lse = run_forward(case)
        gradients = run_backward(case, out, lse)
    check_results(case, out, gradients)


@contextmanager
def inputs_unchanged(case: Case) -> Iterator[None]:
    """Check that the storages of the case do not change.

    The bytes between strided rows are included.
    """
    before = {name: storage_bytes(tensor).clone() for name, tensor in case.tensors().items()}
    yield
    for name, tensor in case.tensors().items():
        assert torch.equal(storage_bytes(tensor), before[name]), f"{name} or the memory around it was modified"


def storage_bytes(tensor: Tensor) -> Tensor:
    """Return the whole storage of `tensor`, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Compare shape, dtype and bits; -inf equals -inf, NaN equals nothing."""
    return left.dtype == right.dtype and torch.equal(left, right)


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(bitwise_equal(*pair) for pair in zip(left, right, strict=True))


def assert_same_results(left: Case, right: Case) -> None:
    """Check for equal bits; the results of the second case are contiguous."""
    results = run_kernels(right)
    assert_same_bits(run_kernels(left), results)
    assert all(tensor.is_contiguous() for tensor in results)
