"""Random inputs for attention.

Tables are N(0, 1) like q, k and v, so that a missing bias is detected.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit_fast.position_bias import table_rows, token_count

from .oracle import attention_oracle


@dataclass
class AttentionCase:
    """Inputs of one attention call, and the gradient `grad_out` of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    window: tuple[int, int] | None
    key_mask: Tensor | None
    grad_out: Tensor

    def to(self, dtype: torch.dtype) -> AttentionCase:
        """Convert to another dtype, as new leaves that require gradients."""
        q, k, v, table = (
            None if x is None else x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v, self.table)
        )
        return AttentionCase(q, k, v, table, self.window, self.key_mask, self.grad_out.to(dtype))

    def leaves(self) -> list[Tensor]:
        """Return q, k, v and, if present, the table."""
        return [x for x in (self.q, self.k, self.v, self.table) if x is not None]


def attention_case(
    window: tuple[int, int],
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    biased: bool = True,
    seed: int = 0,
) -> AttentionCase:
    """Draw a case.

    If `masked`, about a third of the keys and all keys of the last sample are masked.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    tokens = token_count(window)
    q, k, v = (normal(batch, tokens, heads, head_dim) for _ in range(3))
    table = normal(table_rows(window), heads) if biased else None
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, tokens, generator=generator) > 0.3
        key_mask[-1] = False
    return AttentionCase(q, k, v, table, window, key_mask, normal(batch, tokens, heads, head_dim).detach())


def oracle_gradients(case: AttentionCase, **dropout: object) -> tuple[Tensor, list[Tensor]]:
    """Return output and gradients of the dense oracle in the dtype of the case."""
    out = attention_oracle(case.q, case.k, case.v, case.table, case.window, case.key_mask, **dropout)
    return out.detach(), list(torch.autograd.grad(out, case.leaves(), case.grad_out))
