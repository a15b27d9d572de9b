"""The public operator on the kernels: errors, empty batches, NaN in one sample."""

from __future__ import annotations

import pytest
import torch

import beit_fast
from beit_fast.position_bias import table_rows

from .cases import triton_only


@triton_only
@pytest.mark.parametrize("head_dim", [7, 12, 136])
def test_attention_unsupported_head_dim_raises_every_reason(head_dim: int) -> None:
    q = torch.zeros(2, 7, 3, head_dim)
    with pytest.raises(ValueError, match="rel_pos_attention cannot serve") as error:
        beit_fast.rel_pos_attention(q, q, q, torch.zeros(17, 3), (2, 3), torch.ones(2, 6, dtype=torch.bool))
    for reason in (
        f"head dimension {head_dim} is not a multiple of 8 from 8 to 128",
        "a window (2, 3) has 18 table rows, not 17",
        "key_mask must be [B, N] = [2, 7]",
        f"float32[2, 7, 3, {head_dim}] on cpu",
    ):
        assert reason in str(error.value)


@triton_only
def test_attention_unsupported_dtype_raises() -> None:
    q = torch.zeros(2, 7, 3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected float16, bfloat16 or float32"):
        beit_fast.rel_pos_attention(q, q, q)


@triton_only
def test_attention_backward_unsupported_inputs_raise() -> None:
    q, lse = torch.zeros(2, 7, 3, 12), torch.zeros(2, 3, 7)
    with pytest.raises(ValueError, match=r"lse must be float32 .*; head dimension 12 is not a multiple of 8"):
        torch.ops.beit_fast.rel_pos_attention_backward(
            q, q, q, q, None, None, q, lse[:, :, :6], (1, 1), 0.25, 0.0, 0, [True] * 4
        )


@pytest.mark.parametrize("biased", [False, True])
def test_attention_empty_batch_differentiates(biased: bool) -> None:
    q, k, v = (torch.zeros(0, 7, 3, 16, requires_grad=True) for _ in range(3))
    table = torch.zeros(18, 3, requires_grad=True) if biased else None
    out = beit_fast.rel_pos_attention(q, k, v, table, (2, 3))
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape
    if table is not None:
        assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "grad_out"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_nan_in_one_sample_stays_in_it(poisoned: str, masked: bool) -> None:
    """Exclude the gradient of the table, which sums over samples."""
    tensors = {name: torch.randn(3, 7, 2, 16) for name in ("q", "k", "v", "grad_out")}
    table = torch.randn(table_rows((2, 3)), 2)
    key_mask = torch.rand(3, 7) > 0.3 if masked else None

    def run() -> list[torch.Tensor]:
        leaves = [tensors[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out = beit_fast.rel_pos_attention(*leaves, table.clone().requires_grad_(), (2, 3), key_mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors["grad_out"])]

    clean = run()
    tensors[poisoned] = tensors[poisoned].clone()
    tensors[poisoned][1] = float("nan")
    dirty = run()
    assert any(result[1].isnan().any() for result in dirty)
    for result, expected in zip(dirty, clean, strict=True):
        assert torch.equal(result[[0, 2]], expected[[0, 2]])
