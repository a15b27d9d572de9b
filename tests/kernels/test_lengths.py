"""Attention of 2 to 70 and of 197 tokens, in windows of every shape.

NaN or wrong values at lengths that a block does not divide: Dao-AILab/flash-attention#334 and #443,
pytorch/pytorch#153799, facebookresearch/xformers#631 and #813.
"""

from __future__ import annotations

import pytest
import torch

from .cases import DTYPES, HALF_DTYPES, check_parity, make_case

LENGTHS = range(2, 71)
AROUND_BLOCKS = (2, 3, 5, 16, 17, 18, 31, 32, 33, 34, 48, 49, 50, 63, 64, 65, 66, 70)


def squarest(patches: int) -> tuple[int, int]:
    """Return the (height, width) of `patches` patches that is closest to a square.

    The smaller side comes first.
    """
    height = max(side for side in range(1, patches + 1) if patches % side == 0 and side * side <= patches)
    return height, patches // height


def transposed(window: tuple[int, int]) -> tuple[int, int]:
    return window[1], window[0]


def alternating_window(tokens: int) -> tuple[int, int]:
    """Return the squarest window, transposed at every second length."""
    window = squarest(tokens - 1)
    return transposed(window) if tokens % 2 else window


def batch_and_heads(tokens: int) -> dict[str, int]:
    """Choose several (sample, head) planes if there are few tokens.

    A single plane of few tokens has too few roundings to compare errors.
    """
    return {"batch": 2, "heads": 2} if tokens < 10 else {"batch": 1, "heads": 1}


def test_squarest_and_alternating_window_shapes() -> None:
    assert [squarest(patches) for patches in (1, 7, 12, 16, 36, 196)] == [
        (1, 1),
        (1, 7),
        (3, 4),
        (4, 4),
        (6, 6),
        (14, 14),
    ]
    assert {alternating_window(tokens)[0] > alternating_window(tokens)[1] for tokens in LENGTHS} == {True, False}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_fp32_every_length_matches_oracle(tokens: int) -> None:
    check_parity(make_case(alternating_window(tokens), head_dim=16, **batch_and_heads(tokens)))


@pytest.mark.parametrize("tokens", AROUND_BLOCKS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_attention_half_precision_lengths_match_oracle(tokens: int, dtype: torch.dtype) -> None:
    check_parity(make_case(transposed(alternating_window(tokens)), dtype, head_dim=32, **batch_and_heads(tokens)))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_without_table_every_length_matches_oracle(tokens: int) -> None:
    """Lengths from 2; test_parity.py has a single token."""
    check_parity(make_case(None, DTYPES[tokens % 3], tokens=tokens, head_dim=16, **batch_and_heads(tokens)))


@pytest.mark.parametrize("window", [(14, 14), (1, 196)])
def test_attention_197_tokens_matches_oracle(window: tuple[int, int]) -> None:
    check_parity(make_case(window, torch.bfloat16, batch=1, heads=1, head_dim=64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "dtype"), [((14, 14), torch.float32), ((1, 196), torch.float16), ((7, 28), torch.float32)]
)
def test_attention_197_tokens_two_heads_match_oracle(window: tuple[int, int], dtype: torch.dtype) -> None:
    check_parity(make_case(window, dtype, batch=1, heads=2, head_dim=16))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [*AROUND_BLOCKS, 197])
@pytest.mark.parametrize("is_row", [True, False])
def test_attention_fp32_one_row_or_column_matches_oracle(is_row: bool, tokens: int) -> None:
    window = (1, tokens - 1) if is_row else (tokens - 1, 1)
    check_parity(make_case(window, head_dim=16, **batch_and_heads(tokens)))
