"""Attention against the fp64 oracle for images of 224 to 2048 pixels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ..kernels.cases import DTYPES, bitwise_equal, check_parity, make_case, run_backward, run_forward
from ..support.cases import Case
from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget
from . import calls  # noqa: F401  skips this file without a GPU

WINDOWS = {197: (14, 14), 577: (24, 24), 1025: (32, 32), 1601: (40, 40)}


@pytest.fixture
def fp32_matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the fp32 matmul precision of torch to the parameter of the test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tokens", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_square_images_match_oracle(tokens: int, dtype: torch.dtype) -> None:
    check_parity(make_case(WINDOWS[tokens], dtype, batch=2, heads=3, head_dim=64))


@pytest.mark.parametrize("tokens", WINDOWS)
@pytest.mark.parametrize("fp32_matmul_precision", ["high"], indirect=True)
def test_attention_square_images_in_tf32_match_oracle(tokens: int, fp32_matmul_precision: None) -> None:
    """The budget is the error of eager attention with TF32."""
    check_parity(make_case(WINDOWS[tokens], torch.float32, batch=2, heads=3, head_dim=64))


def test_attention_tf32_only_if_torch_allows_it() -> None:
    case = make_case((14, 14), torch.float32, head_dim=64)
    before = torch.get_float32_matmul_precision()
    results = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            results[precision], _ = run_forward(case)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not bitwise_equal(results["highest"], results["high"])


@pytest.mark.parametrize("head_dim", [32, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_head_dims_match_oracle(head_dim: int, dtype: torch.dtype) -> None:
    check_parity(make_case((24, 24), dtype, batch=2, heads=3, head_dim=head_dim))


@pytest.mark.parametrize("window", [(23, 25), (25, 23), (30, 40), (40, 30), (1, 577), (577, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rectangular_images_match_oracle(window: tuple[int, int], dtype: torch.dtype) -> None:
    check_parity(make_case(window, dtype, batch=2, heads=2, head_dim=64))


@pytest.mark.parametrize("tokens", [577, 1601])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_without_table_matches_oracle(tokens: int, dtype: torch.dtype) -> None:
    check_parity(make_case(None, dtype, tokens=tokens, batch=2, heads=3, head_dim=64))


@pytest.mark.parametrize("window", [(24, 24), (40, 40), None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_key_mask_matches_oracle(window: tuple[int, int] | None, dtype: torch.dtype) -> None:
    tokens = 700 if window is None else window[0] * window[1] + 1
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(6)) > 0.5
    mask[1, tokens // 3 :] = False
    mask[2] = False
    check_parity(make_case(window, dtype, tokens=tokens, batch=3, heads=2, head_dim=64, key_mask=mask))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1025, 1601])
def test_attention_few_programs_match_oracle(tokens: int, batch: int) -> None:
    """Keys are split, since one head alone leaves most SMs idle."""
    check_parity(make_case(WINDOWS[tokens], torch.bfloat16, batch=batch, heads=1, head_dim=64))


def bias_index(window: tuple[int, int], queries: Tensor) -> Tensor:
    """Return the table rows of `queries` and all keys, int64 `[queries, N]`."""
    height, width = window
    rows = (2 * height - 1) * (2 * width - 1) + 3
    keys = torch.arange(height * width + 1, device=queries.device) - 1  # patch numbers, CLS is -1
    patches = (queries - 1)[:, None]
    down = patches // width - keys // width + height - 1
    right = patches % width - keys % width + width - 1
    index = down * (2 * width - 1) + right
    index[:, 0] = rows - 2
    index[queries == 0] = rows - 3
    index[queries == 0, 0] = rows - 1
    return index


def query_oracle(case: Case, queries: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return out at `queries` with dq, dk, dv and dtable.

    The incoming gradient is 0 at the other queries.
    """
    assert case.table is not None
    q, k, v = (tensor.to(dtype).requires_grad_() for tensor in (case.query, case.key, case.value))
    table = case.table.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_()
    bias = table[bias_index(case.window, queries)].permute(2, 0, 1)  # [H, queries, N]
    scores = torch.einsum("bihd,bjhd->bhij", q[:, queries], k) * case.scale + bias.to(dtype)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, table), case.grad_out[:, queries].to(dtype))]


@pytest.mark.parametrize("window", [(128, 128), (127, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_images_of_2048_pixels_match_oracle(window: tuple[int, int], dtype: torch.dtype) -> None:
    """Compare a selection of queries: 16385 tokens have 268 million scores per head.

    The incoming gradient is 0 at the other queries.
    """
    case = make_case(window, dtype, batch=1, heads=2, head_dim=64)
    tokens = case.query.shape[1]
    generator = torch.Generator().manual_seed(8)
    others = torch.randperm(tokens - 3, generator=generator)[:100] + 2
    queries = torch.cat([torch.tensor([0, 1, tokens - 1]), others.sort().values]).unique().to(case.query.device)
    unselected = torch.ones(tokens, dtype=torch.bool, device=queries.device).index_fill(0, queries, False)
    case.grad_out[:, unselected] = 0
    out, lse = run_forward(case)
    gradients = run_backward(case, out, lse)
    reference = query_oracle(case, queries, torch.float64)
    eager = query_oracle(case, queries, dtype)
    assert_within_budget("out", out[:, queries], reference[0], eager[0], FORWARD_FACTOR)
    for name, *tensors in zip(("dq", "dk", "dv", "dtable"), gradients, reference[1:], eager[1:], strict=True):
        assert_within_budget(name, *tensors, BACKWARD_FACTOR, dtype)
    assert torch.count_nonzero(gradients[0][:, unselected]) == 0
