"""Inputs of the attention kernels, with the results of kernels and oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

import beit_fast

from ..support.devices import kernel_device, kernels_are_native
from ..support.oracle import assert_within_budget, attention_oracle, philox_keep

GRADIENT_NAMES = ("dq", "dk", "dv", "dtable")
FORWARD_FACTOR = 2
BACKWARD_FACTOR = 3
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


@dataclass
class Case:
    """Inputs of one attention call, with the incoming gradient."""

    query: Tensor  # [B, N, H, D]
    key: Tensor
    value: Tensor
    grad_out: Tensor
    table: Tensor | None  # [(2Wh-1)(2Ww-1)+3, H]
    window: tuple[int, int]
    key_mask: Tensor | None = None  # [B, N] bool
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Copy the case with `function` applied to query, key, value and grad_out."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("query", "key", "value", "grad_out")})


def make_case(
    window: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 32,
    tokens: int | None = None,
    table_dtype: torch.dtype = torch.float32,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Case:
    """Draw N(0, 1) inputs and a table, the same on every device.

    If `window` is None, the case has no table and `tokens` tokens.
    """
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    table = None
    if window is not None:
        tokens = window[0] * window[1] + 1
        table = normal((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads).to(device(), table_dtype)
    assert tokens is not None
    query, key, value, grad_out = (normal(batch, tokens, heads, head_dim).to(device(), dtype) for _ in range(4))
    key_mask = None if key_mask is None else key_mask.to(device())
    return Case(query, key, value, grad_out, table, window or (1, 1), key_mask, dropout_p, seed)


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


def run_oracle(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return out, dq, dk, dv (and dtable) of the dense oracle in `dtype`.

    The result in fp64 is the reference.
    """
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (case.query, case.key, case.value)]
    table = None
    if case.table is not None:
        table = case.table.double() if dtype == torch.float64 else case.table.clone()
        leaves.append(table.requires_grad_())
    out = attention_oracle(
        *leaves[:3],
        table,
        case.window,
        key_mask=case.key_mask,
        scale=case.scale,
        keep=dropout_mask(case),
        dropout_p=case.dropout_p,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]


def dropout_mask(case: Case) -> Tensor | None:
    """Return the dropout mask, bool [B, H, N, N]; None without dropout."""
    if case.dropout_p == 0.0:
        return None
    batch, tokens, heads, _ = case.query.shape
    return philox_keep(case.seed, case.dropout_p, batch, heads, tokens).to(case.query.device)


def check_parity(case: Case) -> None:
    """Compare the kernels with the fp64 oracle.

    The budget is the error of eager attention in the same dtype. The inputs must not change.
    """
    with inputs_unchanged(case):
        out, lse = run_forward(case)
        gradients = run_backward(case, out, lse)
    check_results(case, out, gradients)


def check_results(case: Case, out: Tensor, gradients: tuple[Tensor, ...]) -> None:
    """Compare `out` and the gradients with the fp64 oracle; check dtypes and layouts."""
    reference = run_oracle(case, torch.float64)
    eager = run_oracle(case, case.query.dtype)
    assert_within_budget("out", out, reference[0], eager[0], FORWARD_FACTOR)
    for name, actual, expected, budget in zip(GRADIENT_NAMES, gradients, reference[1:], eager[1:], strict=False):
        coarsest = max(case.query.dtype, budget.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(name, actual, expected, budget, BACKWARD_FACTOR, coarsest)
    assert all(tensor.is_contiguous() for tensor in (out, *gradients))
    assert out.dtype == gradients[0].dtype == case.query.dtype
    if case.table is None:
        assert gradients[3].numel() == 0
    else:
        assert gradients[3].dtype == case.table.dtype


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
