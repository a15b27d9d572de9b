"""Native CPU attention: image sizes, threads, memory and large logits.

tests/kernels has the checks that all attention kernels share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import beit_fast
from beit_fast import native
from beit_fast.position_bias import table_rows, token_count

from ..support.benchmarks import import_benchmarks
from ..support.cases import Case, attention_case, check_operator, run_eager, run_operator, run_oracle
from ..support.oracle import compare_results

import_benchmarks()

from benchmarks.harness import memory  # noqa: E402  needs the package above

pytestmark = pytest.mark.skipif(
    not native.is_loaded("_C"), reason=f"no native library: {native.unsupported_reason('_C')}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_case(
    window: tuple[int, int],
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    some_keys: bool = False,
    **options: Any,
) -> Case:
    """Draw a case; if `some_keys`, about a third of the keys of each sample are masked."""
    key_mask = torch.rand(batch, token_count(window)) > 0.3 if some_keys else None
    options |= {"batch": batch, "heads": heads, "head_dim": head_dim, "key_mask": key_mask}
    if dtype == torch.float64:  # its budget needs fp32 numbers
        return attention_case(window, torch.float32, **options).to(dtype)
    return attention_case(window, dtype, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(14, 14), (24, 24), (10, 40)])
def test_attention_of_image_sizes_matches_oracle(window: tuple[int, int], dtype: torch.dtype, masked: bool) -> None:
    check_operator(make_case(window, dtype, batch=2 if window == (14, 14) else 1, some_keys=masked))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(32, 32), (40, 40), (48, 36)])
def test_attention_of_large_images_matches_oracle(window: tuple[int, int], dtype: torch.dtype) -> None:
    check_operator(make_case(window, dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 3, 20, 33, 100, 130, 200])
def test_attention_of_odd_head_dimensions_matches_oracle(head_dim: int, dtype: torch.dtype) -> None:
    check_operator(make_case((5, 6), dtype, batch=2, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [24, 72, 128])
def test_attention_of_many_tokens_matches_oracle(head_dim: int) -> None:
    """From 257 tokens, the fp32 backward uses tiles if the CPU has them."""
    check_operator(make_case((12, 23), torch.float32, head_dim=head_dim, some_keys=True))


@pytest.mark.parametrize("window", [(14, 14), (24, 24), (32, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_two_threads_returns_same_bits(window: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_case(window, dtype, heads=3, some_keys=window == (32, 18))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_operator(case)
        torch.set_num_threads(2)
        together = run_operator(case)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", [0.0, 300.0, -300.0])
def test_attention_of_growing_logits_matches_oracle(dtype: torch.dtype, growth: float) -> None:
    """Sums are rescaled if logits exceed the first logits by 2^60."""
    window = (9, 12)
    case = make_case(window, dtype)
    ramp = torch.linspace(0, growth, table_rows(window) - 3)[:, None]
    ramp = torch.cat([ramp, torch.zeros(3, 1)])
    case = case.map(lambda table: (table.detach() + ramp).requires_grad_(), "table")
    out, exact, eager = (
        results[0] for results in (run_operator(case), run_oracle(case, torch.float64), run_eager(case))
    )
    compare_results({"out": out}, {"out": exact}, {"out": eager}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_first_keys_masked_matches_oracle(dtype: torch.dtype) -> None:
    """Keys 1 to 80 are masked, and all logits are far below 0."""
    key_mask = (torch.arange(122) == 0) | (torch.arange(122) > 80)
    case = make_case((11, 11), dtype)
    case = replace(case, key_mask=key_mask[None])
    check_operator(case.map(lambda table: (table.detach() - 900).requires_grad_(), "table"))


@pytest.mark.parametrize("scale", [-0.25, 0.0, 0.7])
def test_attention_of_any_scale_matches_oracle(scale: float) -> None:
    check_operator(make_case((6, 7), torch.float32, batch=2, scale=scale))


@pytest.mark.skipif(memory.memory_unsupported_reason() is not None, reason=str(memory.memory_unsupported_reason()))
def test_attention_memory_is_below_one_matrix() -> None:
    window, heads = (40, 40), 12
    case = make_case(window, torch.float32, heads=heads, requires_grad=False)
    one_matrix = token_count(window) ** 2 * 4
    arguments = (*case.leaves(), window)
    beit_fast.rel_pos_attention(*arguments)
    results = case.query.nbytes + heads * token_count(window) * 4
    assert memory.peak_memory(lambda: beit_fast.rel_pos_attention(*arguments)) - results < one_matrix / 2
    for leaf in case.leaves():
        leaf.requires_grad_()
    run_operator(case)
    assert memory.peak_memory(lambda: run_operator(case)) < heads * one_matrix / 2
