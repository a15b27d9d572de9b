"""Many planes, results above 2^31 elements, and the memory of a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit_fast.testing.memory import peak_memory

from ..kernels.cases import check_parity, make_case, run_backward, run_forward
from ..support.cases import Case
from .calls import attend_and_differentiate, leaves_of, need_free_memory

SCRATCH_LIMIT = 2**26  # bytes of scratch memory for the gradient of the table


@pytest.mark.parametrize(("batch", "heads"), [(35_000, 2), (1, 70_000)])
def test_attention_above_65535_planes_matches_oracle(batch: int, heads: int) -> None:
    """CUDA limits y and z of a grid to 65535.

    Bugs elsewhere: fla-org/flash-linear-attention#172 and #1077, flashinfer-ai/flashinfer#3125.
    """
    check_parity(make_case((2, 2), torch.float16, batch=batch, heads=heads, head_dim=8))


def test_attention_results_above_2_31_elements() -> None:
    """Expand one image to a batch, so that only the results take memory.

    All samples of the results are equal.
    """
    case = make_case((4, 4), torch.float16, batch=1, heads=8, head_dim=128)
    batch = 2**31 // case.query.numel() + 2
    need_free_memory(2 * 4 * batch * case.query.numel() + 2**31)
    many = case.map_rows(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))
    out, lse = run_forward(many)
    assert out.numel() > 2**31
    *gradients, _ = run_backward(many, out, lse, (True, True, True, False))
    expected, lse = run_forward(case)
    assert all_samples_equal(out, expected)
    for gradient, wanted in zip(gradients, run_backward(case, expected, lse)[:3], strict=True):
        assert all_samples_equal(gradient, wanted)


def all_samples_equal(samples: Tensor, sample: Tensor) -> bool:
    return all(torch.equal(part, sample.expand_as(part)) for part in samples.split(1024))


def case_of_640_pixels(batch: int) -> Case:
    return make_case((40, 40), torch.bfloat16, batch=batch, heads=12, head_dim=64)


def peak_bytes(case: Case) -> int:
    """Return the peak bytes of forward and backward beyond the inputs."""
    leaves = leaves_of(case)
    attend_and_differentiate(case, leaves)
    return peak_memory(lambda: attend_and_differentiate(case, leaves), case.query.device)


def plane_elements(case: Case) -> int:
    """Return H * N * N, the number of scores of one image."""
    _, tokens, heads, _ = case.query.shape
    return heads * tokens * tokens


def test_attention_peak_memory_below_scores() -> None:
    """Allow one byte per score, half the size of the smallest dtype."""
    case = case_of_640_pixels(batch=2)
    scores = 2 * plane_elements(case)
    without_table, with_table = peak_bytes(replace(case, table=None)), peak_bytes(case)
    assert without_table < scores
    assert with_table < scores + min(SCRATCH_LIMIT, 4 * plane_elements(case))


def test_attention_memory_growth_with_batch_below_scores() -> None:
    few = case_of_640_pixels(batch=2)
    growth = peak_bytes(case_of_640_pixels(batch=8)) - peak_bytes(few)
    assert growth < 6 * plane_elements(few)
