"""Random inputs of attention, and the check of its results against the oracle.

Tables are N(0, 1) like query, key and value, so that a missing bias is detected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

import beit_fast

from .operator_case import OperatorCase
from .oracle import attention_oracle, compare_results, philox_keep

GRADIENT_NAMES = ("dq", "dk", "dv", "dtable")


@dataclass
class Case(OperatorCase):
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

    chosen_scale: float | None = None

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.chosen_scale is None else self.chosen_scale

    def leaves(self) -> list[Tensor]:
        """Return query, key, value and, if present, the table."""
        return [tensor for tensor in (self.query, self.key, self.value, self.table) if tensor is not None]

    def to(self, dtype: torch.dtype) -> Self:
        """Convert to another dtype, the table too, as new leaves that require gradients."""
        converted = super().to(dtype)
        for leaf in converted.leaves():
            leaf.requires_grad_()
        return converted

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Copy the case with `function` applied to query, key, value and grad_out."""
        return self.map(function, "query", "key", "value", "grad_out")


def attention_case(
    window: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    tokens: int | None = None,
    biased: bool = True,
    table_dtype: torch.dtype | None = None,
    masked: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    scale: float | None = None,
    device: torch.device | str = "cpu",
    requires_grad: bool = True,
) -> Case:
    """Draw N(0, 1) inputs and a table, the same on every device.

    If `window` is None, the case has no table and `tokens` tokens. If not `biased`, it has a window but no table.
    The table is fp32, and fp64 if `dtype` is, unless `table_dtype` is given.
    If `masked`, about a third of the keys and all keys of the last sample are masked.
    """
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    table = None
    if window is not None:
        tokens = window[0] * window[1] + 1
        if biased:
            table = normal((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads)
            table = table.to(device, table_dtype or torch.promote_types(dtype, torch.float32))
    assert tokens is not None
    query, key, value, grad_out = (normal(batch, tokens, heads, head_dim).to(device, dtype) for _ in range(4))
    if masked:
        key_mask = torch.rand(batch, tokens, generator=generator) > 0.3
        key_mask[-1] = False
    key_mask = None if key_mask is None else key_mask.to(device)
    case = Case(query, key, value, grad_out, table, window or (1, 1), key_mask, dropout_p, seed, scale)
    for leaf in case.leaves():
        leaf.requires_grad_(requires_grad)
    return case


def run_oracle(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return out, dq, dk, dv (and dtable) of the dense oracle in `dtype`.

    The result in fp64 is the reference.
    """
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (case.query, case.key, case.value)]
    table = None
    if case.table is not None:
        table = case.table.detach()
        table = table.double() if dtype == torch.float64 else table.clone()
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


def run_eager(case: Case) -> list[Tensor]:
    """Return the results of eager attention in the dtype of the case, whose errors are the budget.

    In fp64 eager attention equals the reference, so the error of fp32 is scaled down to fp64 rounding. The tensors of
    the case must then hold fp32 numbers, or the budget would include the rounding of the inputs.
    """
    dtype = case.query.dtype
    if dtype != torch.float64:
        return run_oracle(case, dtype)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    rounded_case, tensors = case.to(torch.float32), case.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in rounded_case.to(dtype).tensors().items())
    pairs = zip(run_oracle(rounded_case, torch.float32), run_oracle(case, dtype), strict=True)
    return [exact + (rounded.double() - exact) * ratio for rounded, exact in pairs]


def run_operator(case: Case) -> list[Tensor]:
    """Return out, dq, dk, dv (and dtable) of the operator."""
    out = beit_fast.rel_pos_attention(
        case.query,
        case.key,
        case.value,
        case.table,
        case.window,
        case.key_mask,
        case.chosen_scale,
        dropout_p=case.dropout_p,
        seed=case.seed,
    )
    return [out.detach(), *torch.autograd.grad(out, case.leaves(), case.grad_out)]


def check_operator(case: Case) -> None:
    """Compare the operator with the fp64 oracle."""
    out, *gradients = run_operator(case)
    check_results(case, out, gradients)


def check_results(case: Case, out: Tensor, gradients: Sequence[Tensor]) -> None:
    """Compare `out` and the gradients with the fp64 oracle; check dtypes and layouts.

    The budget is the error of eager attention in the same dtype. Without a table, its gradient is empty or left out.
    """
    if case.table is None:
        assert all(tensor.numel() == 0 for tensor in gradients[3:])
        gradients = gradients[:3]
    results, exact, eager = (
        dict(zip(("out", *GRADIENT_NAMES), tensors, strict=False))
        for tensors in ((out, *gradients), run_oracle(case, torch.float64), run_eager(case))
    )
    compare_results(results, exact, eager, case.query.dtype)
    assert all(tensor.is_contiguous() for tensor in results.values())
