"""Random inputs of attention, and its results by the fp64 reference.

Tables are N(0, 1) like query, key and value, so that a missing bias is detected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .operator_case import OperatorCase
from .reference import attention_oracle, philox_keep

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
        """Convert to another dtype, table included, as leaves that require gradients."""
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
    """Compute the output and gradients of the dense oracle in `dtype`.

    Returns out, dq, dk, dv and, with a bias, dtable. The result in fp64 is the reference.
    """
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (case.query, case.key, case.value)]
    table = None
    if case.table is not None:
        table = case.table.detach()
        table = table.double() if dtype == torch.float64 else table.clone()
        leaves.append(table.requires_grad_())
    query, key, value = leaves[:3]
    out = attention_oracle(
        query,
        key,
        value,
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


def oracle_by_sample(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return the results of `run_oracle`; memory holds the scores of one sample."""
    if case.dropout_p > 0:  # the mask depends on the number of the sample
        return run_oracle(case, dtype)
    parts = []
    for sample in range(case.query.shape[0]):
        rows = slice(sample, sample + 1)
        one = case.map_rows(lambda x, rows=rows: x[rows])  # type: ignore[misc]
        mask = None if case.key_mask is None else case.key_mask[rows]
        parts.append(run_oracle(replace(one, key_mask=mask), dtype))
    results = [torch.cat(values) for values in list(zip(*parts, strict=True))[:4]]
    if case.table is None:
        return results
    return [*results, torch.stack([part[4] for part in parts]).sum(0)]
