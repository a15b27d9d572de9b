"""Inputs for the interpreted kernels, and the kernels' and the oracle's results on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.kernels.attention import launch

from ..support.oracle import assert_within_budget, attention_oracle

GRADIENT_NAMES = ("dq", "dk", "dv", "dtable")
FORWARD_FACTOR = 2
BACKWARD_FACTOR = 3


@dataclass
class Case:
    """Everything one attention call needs, and the gradient that comes back into it."""

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
    """Seeded N(0, 1) inputs, table included. Without a window: no table, and `tokens` says how many."""
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    table = None
    if window is not None:
        tokens = window[0] * window[1] + 1
        table = normal((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads).to(table_dtype)
    assert tokens is not None
    query, key, value, grad_out = (normal(batch, tokens, heads, head_dim).to(dtype) for _ in range(4))
    return Case(query, key, value, grad_out, table, window or (1, 1), key_mask, dropout_p, seed)


def run_forward(case: Case) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernels."""
    return launch.attention_forward(
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
    case: Case,
    out: Tensor,
    lse: Tensor,
    output_mask: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dtable) of the kernels."""
    return launch.attention_backward(
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


def run_oracle(case: Case, dtype: torch.dtype, keep: Tensor | None = None) -> list[Tensor]:
    """out, dq, dk, dv (and dtable) of the dense oracle in `dtype`; fp64 makes it the reference."""
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
        keep=keep,
        dropout_p=case.dropout_p,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad_out.to(dtype))]


def check_parity(case: Case, keep: Tensor | None = None) -> None:
    """Kernels against the fp64 oracle, within the budgets that same-dtype eager sets."""
    out, lse = run_forward(case)
    gradients = run_backward(case, out, lse)
    reference = run_oracle(case, torch.float64, keep)
    eager = run_oracle(case, case.query.dtype, keep)
    assert_within_budget("out", out, reference[0], eager[0], FORWARD_FACTOR)
    for name, actual, expected, budget in zip(GRADIENT_NAMES, gradients, reference[1:], eager[1:], strict=False):
        assert_within_budget(name, actual, expected, budget, BACKWARD_FACTOR)
        assert actual.is_contiguous()
    assert out.is_contiguous()
    assert out.dtype == gradients[0].dtype == case.query.dtype
    if case.table is None:
        assert gradients[3].numel() == 0
    else:
        assert gradients[3].dtype == case.table.dtype


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Same shape, dtype and bits; -inf equals -inf, and NaN equals nothing."""
    return left.dtype == right.dtype and torch.equal(left, right)
