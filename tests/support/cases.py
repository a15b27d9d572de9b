"""Random inputs of attention, and the check of its results against the oracle.

Tables are N(0, 1) like query, key and value, so that a missing bias is detected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .oracle import assert_within_budget, attention_oracle, philox_keep

GRADIENT_NAMES = ("dq", "dk", "dv", "dtable")
FORWARD_FACTOR = 2
BACKWARD_FACTOR = 3


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

    def leaves(self) -> list[Tensor]:
        """Return query, key, value and, if present, the table."""
        return [tensor for tensor in (self.query, self.key, self.value, self.table) if tensor is not None]

    def to(self, dtype: torch.dtype) -> Case:
        """Convert to another dtype, the table too, as new leaves that require gradients."""
        leaves = {
            name: tensor.detach().to(dtype).requires_grad_()
            for name, tensor in self.tensors().items()
            if name in ("query", "key", "value", "table")
        }
        return replace(self, **leaves, grad_out=self.grad_out.to(dtype))

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Copy the case with `function` applied to query, key, value and grad_out."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("query", "key", "value", "grad_out")})


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
    case = Case(query, key, value, grad_out, table, window or (1, 1), key_mask, dropout_p, seed)
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


def run_eager(case: Case, reference: list[Tensor]) -> list[Tensor]:
    """Return the results of eager attention in the dtype of the case, whose errors are the budget.

    In fp64 eager attention equals the `reference`, so the error of fp32 is scaled down to fp64 rounding. The tensors of
    the case must then hold fp32 numbers, or the budget would include the rounding of the inputs.
    """
    dtype = case.query.dtype
    if dtype != torch.float64:
        return run_oracle(case, dtype)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    rounded_case, tensors = case.to(torch.float32), case.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in rounded_case.to(dtype).tensors().items())
    single = run_oracle(rounded_case, torch.float32)
    return [exact + (rounded.double() - exact) * ratio for rounded, exact in zip(single, reference, strict=True)]


def check_results(case: Case, out: Tensor, gradients: Sequence[Tensor]) -> None:
    """Compare `out` and the gradients with the fp64 oracle; check dtypes and layouts.

    The budget is the error of eager attention in the same dtype. Without a table, its gradient is empty or left out.
    """
    reference = run_oracle(case, torch.float64)
    eager = run_eager(case, reference)
    assert_within_budget("out", out, reference[0], eager[0], FORWARD_FACTOR)
    for name, actual, expected, budget in zip(GRADIENT_NAMES, gradients, reference[1:], eager[1:], strict=False):
        coarsest = max(case.query.dtype, budget.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(name, actual, expected, budget, BACKWARD_FACTOR, coarsest)
    assert all(tensor.is_contiguous() for tensor in (out, *gradients))
    assert all(tensor.dtype == case.query.dtype for tensor in (out, *gradients[:3]))
    if case.table is None:
        assert all(tensor.numel() == 0 for tensor in gradients[3:])
    else:
        assert gradients[3].dtype == case.table.dtype
