"""Requested gradients, empty batches, deterministic results, independent samples."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..support.cases import Case
from .cases import assert_same_bits, bitwise_equal, make_case, run_backward, run_forward, run_kernels


@pytest.mark.parametrize("output_mask", list(itertools.product([False, True], repeat=4)))
def test_backward_output_mask_returns_only_requested_gradients(output_mask: tuple[bool, bool, bool, bool]) -> None:
    """Include the table alone, an illegal access in pytorch/pytorch#148476."""
    case = make_case((3, 4), torch.bfloat16, heads=2, head_dim=16)
    out, lse = run_forward(case)
    everything = run_backward(case, out, lse)
    some = run_backward(case, out, lse, output_mask)
    for wanted, partial, full in zip(output_mask, some, everything, strict=True):
        assert partial.dtype == full.dtype
        if wanted:
            assert bitwise_equal(partial, full)
        else:
            assert partial.shape == (0,)


@pytest.mark.parametrize("window", [(3, 4), None])
def test_attention_empty_batch_returns_empty_results(window: tuple[int, int] | None) -> None:
    """Bugs elsewhere: Dao-AILab/flash-attention#1159, pytorch/pytorch#133780."""
    case = make_case(window, torch.float16, batch=0, heads=2, head_dim=16, tokens=13)
    out, lse = run_forward(case)
    assert out.shape == (0, 13, 2, 16)
    assert lse.shape == (0, 2, 13)
    dq, dk, dv, dtable = run_backward(case, out, lse)
    assert dq.shape == dk.shape == dv.shape == out.shape
    if case.table is None:
        assert dtable.shape == (0,)
    else:
        assert torch.equal(dtable, torch.zeros_like(case.table))


def test_backward_empty_batch_without_table_gradient() -> None:
    case = make_case((3, 4), batch=0)
    out, lse = run_forward(case)
    assert run_backward(case, out, lse, (True, True, True, False))[3].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_two_runs_same_bits(dtype: torch.dtype) -> None:
    case = make_case((5, 7), dtype, dropout_p=0.25, seed=3)
    assert_same_bits(run_kernels(case), run_kernels(case))


def samples(case: Case, chosen: slice) -> Case:
    return case.map_rows(lambda tensor: tensor[chosen])


def test_attention_sample_independent_of_batch() -> None:
    case = make_case((4, 4), torch.float32, batch=3)
    *together, _ = run_kernels(case)
    *alone, _ = run_kernels(samples(case, slice(1, 2)))
    assert_same_bits(alone, [tensor[1:2] for tensor in together])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_nan_in_one_image_stays_in_it(dtype: torch.dtype, masked: bool) -> None:
    """Exclude the gradient of the table, which sums over images."""
    mask = torch.rand(3, 24, generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    case = make_case(None if masked else (4, 5), dtype, batch=3, tokens=24, key_mask=mask)
    poisoned = case.map_rows(Tensor.clone)
    for tensor in (poisoned.query, poisoned.key, poisoned.value, poisoned.grad_out):
        tensor[1] = float("nan")
    *clean, _ = run_kernels(case)
    *results, _ = run_kernels(poisoned)
    assert_same_bits([tensor[::2] for tensor in results], [tensor[::2] for tensor in clean])
    assert results[0][1].isnan().all()


def test_attention_nan_in_one_head_stays_in_it() -> None:
    case = make_case((4, 5), heads=3)
    assert case.table is not None
    poisoned = replace(case, table=case.table.clone())
    poisoned.table[:, 1] = float("nan")
    out, lse, dq, dk, dv, dtable = run_kernels(case)
    heads = [0, 2]
    expected = [lse[:, heads], dtable[:, heads], *(tensor[:, :, heads] for tensor in (out, dq, dk, dv))]
    out, lse, dq, dk, dv, dtable = run_kernels(poisoned)
    assert_same_bits(
        [lse[:, heads], dtable[:, heads], *(tensor[:, :, heads] for tensor in (out, dq, dk, dv))], expected
    )
    assert out[:, :, 1].isnan().all()
