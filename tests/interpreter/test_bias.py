"""The bias alone: the extended table against the paper's gather, and wrong biases that must be noticed."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.attention import launch
from beit_fast.kernels.attention.primitives import key_bias_offsets, load_bias_tile, query_bias_offsets

from ..support.oracle import dense_bias
from .cases import check_parity, make_case

WINDOWS = [(height, width) for height in range(1, 6) for width in range(1, 6)] + [
    (1, 69),
    (69, 1),
    (14, 14),
    (7, 11),
]


@triton.jit
def bias_matrix_kernel(bias_table, result, token_count, window_width, span, BLOCK: tl.constexpr):
    tokens = tl.arange(0, BLOCK)
    query_offsets = query_bias_offsets(tokens, token_count, window_width, span)
    key_offsets = key_bias_offsets(tokens, token_count, window_width, span)
    tile = load_bias_tile(bias_table, query_offsets[:, None], key_offsets[None, :])
    inside = (tokens < token_count)[:, None] & (tokens < token_count)[None, :]
    tl.store(result + tokens[:, None] * token_count + tokens[None, :], tile, mask=inside)


@pytest.mark.parametrize("window", WINDOWS)
def test_extended_table_is_the_gather(window: tuple[int, int]) -> None:
    height, width = window
    tokens = height * width + 1
    table = torch.randn((2 * height - 1) * (2 * width - 1) + 3, 2, generator=torch.Generator().manual_seed(1))
    span = launch._span(height, width)
    extended = launch._expand_table(table, span)
    assert extended.shape == (2, 5 * span + 4)
    expected = dense_bias(table * torch.tensor(math.log2(math.e)), window)
    for head in range(2):
        result = torch.empty(tokens, tokens)
        block = triton.next_power_of_2(tokens + 1)
        bias_matrix_kernel[(1,)](extended[head], result, tokens, width, span, BLOCK=block)
        assert torch.equal(result, expected[head])


@pytest.mark.parametrize("window", WINDOWS)
def test_every_address_lies_inside_the_extended_table(window: tuple[int, int]) -> None:
    height, width = window
    span = launch._span(height, width)
    patches = [row * (2 * width - 1) + column for row in range(height) for column in range(width)]
    queries = [4 * span + 2] + [patch + span for patch in patches]
    keys = [-(span + 1), *patches]
    addresses = {query - key for query in queries for key in keys}
    assert min(addresses) >= 0
    assert max(addresses) == 5 * span + 3


def dropped(table: Tensor, window: tuple[int, int]) -> Tensor:
    return torch.zeros_like(table)


def transposed(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The table whose bias matrix is the transpose: differences negated, the two CLS directions swapped."""
    return torch.cat([table[:-3].flip(0), table[[-2, -3, -1]]])


def window_swapped(table: Tensor, window: tuple[int, int]) -> Tensor:
    height, width = window
    patches = table[:-3].reshape(2 * height - 1, 2 * width - 1, -1).transpose(0, 1).reshape(-1, table.shape[1])
    return torch.cat([patches, table[-3:]])


def cls_rows_swapped(table: Tensor, window: tuple[int, int]) -> Tensor:
    return torch.cat([table[:-3], table[[-2, -3, -1]]])


@pytest.mark.parametrize("mutate", [dropped, transposed, window_swapped, cls_rows_swapped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_bias_fails_the_parity_check(mutate, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((3, 5), dtype)
    check_parity(case)
    expand_table = launch._expand_table

    def wrong_table(table: Tensor, span: int) -> Tensor:
        return expand_table(mutate(table, case.window), span)

    monkeypatch.setattr(launch, "_expand_table", wrong_table)
    with pytest.raises(AssertionError, match="out: relative error"):
        check_parity(case)


@pytest.mark.parametrize("mutate", [dropped, transposed, window_swapped, cls_rows_swapped])
def test_a_wrong_table_gradient_fails_the_parity_check(mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((3, 5), torch.bfloat16)
    launch_table_gradient = launch._launch_table_gradient

    def wrong_gradient(arguments, dtable: Tensor, window: tuple[int, int]) -> None:
        launch_table_gradient(arguments, dtable, window)
        dtable.copy_(mutate(dtable, window))

    monkeypatch.setattr(launch, "_launch_table_gradient", wrong_gradient)
    with pytest.raises(AssertionError, match="dtable: relative error"):
        check_parity(case)
