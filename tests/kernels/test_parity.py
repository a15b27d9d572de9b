"""Attention kernels against the fp64 oracle: dtypes, head dimensions, masks, dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ..support.cases import Case, dropout_mask
from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget, dense_bias
from .cases import DTYPES, check_parity, make_case, run_backward, run_forward, triton_only


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_attention_every_head_dim_matches_oracle(head_dim: int) -> None:
    """In turn with every dtype; test_drawn_cases.py draws the others."""
    check_parity(make_case((4, 9), DTYPES[head_dim // 8 % 3], batch=3, heads=2, head_dim=head_dim))


@pytest.mark.parametrize("window", [(1, 1), (1, 40), (40, 1), (3, 13), (13, 3), (7, 7)])
def test_attention_batch_and_heads_match_oracle(window: tuple[int, int]) -> None:
    check_parity(make_case(window, torch.float32, batch=3, heads=2))


def check_against_one_key(case: Case, position: int) -> None:
    """Check a case whose queries attend to a single key.

    The gradient of its score is a difference of equal values, so its error is measured relative to these values.
    """
    out, lse = run_forward(case)
    dq, dk, dv, _ = run_backward(case, out, lse)
    alone = slice(position, position + 1)
    value = case.value[:, alone].expand_as(out)
    assert_within_budget("out", out, value, value, FORWARD_FACTOR)
    dv_expected = torch.zeros_like(dv, dtype=torch.float64)
    dv_expected[:, alone] = case.grad_out.double().sum(1, keepdim=True)
    assert_within_budget("dv", dv, dv_expected, dv_expected.to(dv.dtype), BACKWARD_FACTOR)
    grad_weight = case.grad_out.double().norm() * case.value[:, alone].double().norm()
    rounding = 4 * torch.finfo(torch.float32).eps * grad_weight * case.scale
    assert dq.double().norm() <= rounding * case.key[:, alone].double().norm()
    assert dk.double().norm() <= rounding * case.query.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_single_token_attends_to_itself(dtype: torch.dtype) -> None:
    check_against_one_key(make_case(None, dtype, tokens=1, head_dim=24), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 40])
def test_attention_key_mask_with_one_key_returns_its_value(dtype: torch.dtype, position: int) -> None:
    mask = (torch.arange(41) == position).expand(2, 41)
    check_against_one_key(make_case(None, dtype, tokens=41, head_dim=24, key_mask=mask), position)


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_table_dtypes_match_oracle(table_dtype: torch.dtype) -> None:
    check_parity(make_case((3, 4), torch.float32, table_dtype=table_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_lse_matches_oracle(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype)
    lse = run_forward(case)[1]

    def expected(precision: torch.dtype) -> torch.Tensor:
        query, key = case.query.to(precision), case.key.to(precision)
        assert case.table is not None
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * case.scale
        return (scores + dense_bias(case.table, case.window).to(precision)).logsumexp(-1)

    assert lse.dtype == torch.float32
    assert_within_budget("lse", lse, expected(torch.float64), expected(torch.float32), 2)


def masked_case(dtype: torch.dtype, head_dim: int = 40) -> Case:
    """Mask no key of sample 0, some of sample 1, all of sample 2."""
    case = make_case((5, 8), dtype, batch=3, head_dim=head_dim)
    mask = torch.rand(3, 41, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[0] = True
    mask[2] = False
    return replace(case, key_mask=mask.to(case.query.device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_key_mask_matches_oracle(dtype: torch.dtype) -> None:
    check_parity(masked_case(dtype))


def test_attention_sample_without_keys_returns_zeros() -> None:
    case = masked_case(torch.float32)
    out, lse = run_forward(case)
    dq, dk, dv, _ = run_backward(case, out, lse)
    assert torch.isfinite(lse[:2]).all()
    assert (lse[2] == float("-inf")).all()
    for tensor in (out, dq, dk, dv):
        assert torch.count_nonzero(tensor[2]) == 0


def test_attention_batch_without_keys_has_zero_gradients() -> None:
    case = make_case((3, 3), torch.bfloat16, key_mask=torch.zeros(2, 10, dtype=torch.bool))
    out, lse = run_forward(case)
    for tensor in (out, *run_backward(case, out, lse)):
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 + 5, 2**63 - 1])
def test_attention_dropout_mask_equals_philox(seed: int, dropout_p: float) -> None:
    tokens = 24
    case = make_case(None, tokens=tokens, head_dim=tokens, dropout_p=dropout_p, seed=seed)
    case.query = torch.zeros_like(case.query)
    case.value = torch.eye(tokens, device=case.value.device)[None, :, None, :].expand_as(case.value).contiguous()
    weights = run_forward(case)[0].permute(0, 2, 1, 3)  # [B, H, N, N]
    keep = dropout_mask(case)
    assert keep is not None
    assert torch.equal(weights != 0, keep)
    torch.testing.assert_close(weights, keep / (tokens * (1 - dropout_p)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_dropout_matches_oracle(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype, dropout_p=0.3, seed=7 * 2**32 + 2**31 + 9)
    check_parity(case)


def test_attention_dropout_with_key_mask_matches_oracle() -> None:
    case = masked_case(torch.float32)
    case.dropout_p, case.seed = 0.2, 11
    check_parity(case)


@triton_only
def test_attention_dropout_of_everything_returns_zeros() -> None:
    case = make_case((3, 3), dropout_p=1.0)
    out, lse = run_forward(case)
    for tensor in (out, *run_backward(case, out, lse)):
        assert torch.equal(tensor, torch.zeros_like(tensor))
