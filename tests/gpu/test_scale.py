"""Many planes, results of more than 2^31 elements, and how much memory a call takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit_fast.testing.memory import peak_memory

from ..kernels.cases import Case, check_parity, make_case, run_backward, run_forward
from .calls import attend_and_differentiate, leaves_of, need_free_memory

SCRATCH_LIMIT = 2**26  # bytes that the gradient of the table may take beside the results


@pytest.mark.parametrize(("batch", "heads"), [(35_000, 2), (1, 70_000)])
def test_more_than_65535_planes(batch: int, heads: int) -> None:
    """CUDA limits a grid's y and z: fla-org/flash-linear-attention#172 and #1077, flashinfer-ai/flashinfer#3125."""
    check_parity(make_case((2, 2), torch.float16, batch=batch, heads=heads, head_dim=8))


def test_results_of_more_than_two_to_the_31_elements() -> None:
    """All images are one image, expanded, so only the results take memory, and all of their samples are equal."""
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


def image_of_640_pixels(batch: int) -> Case:
    return make_case((40, 40), torch.bfloat16, batch=batch, heads=12, head_dim=64)


def peak_of(case: Case) -> int:
    """Bytes that forward and backward take above the inputs."""
    leaves = leaves_of(case)
    attend_and_differentiate(case, leaves)
    peak = peak_memory(lambda: attend_and_differentiate(case, leaves), case.query.device)
    assert peak is not None
    return peak


def plane_elements(case: Case) -> int:
    """H * N * N, the scores of one image."""
    _, tokens, heads, _ = case.query.shape
    return heads * tokens * tokens


def test_no_buffer_has_the_size_of_the_scores() -> None:
    """One byte a score would be half of what the smallest type takes."""
    case = image_of_640_pixels(batch=2)
    scores = 2 * plane_elements(case)
    without_table, with_table = peak_of(replace(case, table=None)), peak_of(case)
    assert without_table < scores
    assert with_table < scores + min(SCRATCH_LIMIT, 4 * plane_elements(case))


def test_no_buffer_of_scores_grows_with_the_batch() -> None:
    few = image_of_640_pixels(batch=2)
    growth = peak_of(image_of_640_pixels(batch=8)) - peak_of(few)
    assert growth < 6 * plane_elements(few)
