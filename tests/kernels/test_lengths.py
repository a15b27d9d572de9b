"""Every number of tokens from 1 to 70, and 197, in windows of every shape: odd lengths are where kernels break.

NaN or wrong numbers at lengths that a block does not divide: Dao-AILab/flash-attention#334 and #443,
pytorch/pytorch#153799, facebookresearch/xformers#631 and #813.
"""

from __future__ import annotations

import pytest
import torch

from .cases import DTYPES, HALF_DTYPES, check_parity, make_case

LENGTHS = range(2, 71)
AROUND_BLOCKS = (2, 3, 5, 16, 17, 18, 31, 32, 33, 34, 48, 49, 50, 63, 64, 65, 66, 70)


def squarest(patches: int) -> tuple[int, int]:
    """The window (height, width) of `patches` patches whose sides differ least, the smaller one first."""
    height = max(side for side in range(1, patches + 1) if patches % side == 0 and side * side <= patches)
    return height, patches // height


def turned(window: tuple[int, int]) -> tuple[int, int]:
    return window[1], window[0]


def upright_or_not(tokens: int) -> tuple[int, int]:
    """The squarest window, turned at every second length."""
    window = squarest(tokens - 1)
    return turned(window) if tokens % 2 else window


def sizes_of(tokens: int) -> dict[str, int]:
    """A few (sample, head) planes where one has little to say about rounding."""
    return {"batch": 2, "heads": 2} if tokens < 10 else {"batch": 1, "heads": 1}


def test_the_windows_are_those_meant() -> None:
    assert [squarest(patches) for patches in (1, 7, 12, 16, 36, 196)] == [
        (1, 1),
        (1, 7),
        (3, 4),
        (4, 4),
        (6, 6),
        (14, 14),
    ]
    assert {upright_or_not(tokens)[0] > upright_or_not(tokens)[1] for tokens in LENGTHS} == {True, False}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_single_precision(tokens: int) -> None:
    check_parity(make_case(upright_or_not(tokens), head_dim=16, **sizes_of(tokens)))


@pytest.mark.parametrize("tokens", AROUND_BLOCKS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision(tokens: int, dtype: torch.dtype) -> None:
    check_parity(make_case(turned(upright_or_not(tokens)), dtype, head_dim=32, **sizes_of(tokens)))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_without_a_table(tokens: int) -> None:
    """One token: see test_parity.py."""
    check_parity(make_case(None, DTYPES[tokens % 3], tokens=tokens, head_dim=16, **sizes_of(tokens)))


@pytest.mark.parametrize("window", [(14, 14), (1, 196)])
def test_as_many_tokens_as_an_image_of_224_pixels(window: tuple[int, int]) -> None:
    check_parity(make_case(window, torch.bfloat16, batch=1, heads=1, head_dim=64))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(14, 14), (1, 196), (7, 28)])
def test_as_many_tokens_in_every_dtype(window: tuple[int, int], dtype: torch.dtype) -> None:
    check_parity(make_case(window, dtype, batch=1, heads=2, head_dim=16))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [*AROUND_BLOCKS, 197])
@pytest.mark.parametrize("is_row", [True, False])
def test_single_precision_in_one_row_or_column(is_row: bool, tokens: int) -> None:
    window = (1, tokens - 1) if is_row else (tokens - 1, 1)
    check_parity(make_case(window, head_dim=16, **sizes_of(tokens)))
