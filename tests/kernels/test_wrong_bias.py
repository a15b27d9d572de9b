"""The parity check must fail for wrong biases and table gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..support.cases import check_results
from .cases import DTYPES, check_parity, make_case, run_backward, run_forward


def dropped(table: Tensor, window: tuple[int, int]) -> Tensor:
    return torch.zeros_like(table)


def transposed(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the table whose bias matrix is the transpose.

    The differences are negated and the two CLS directions swapped.
    """
    return torch.cat([table[:-3].flip(0), table[[-2, -3, -1]]])


def window_swapped(table: Tensor, window: tuple[int, int]) -> Tensor:
    height, width = window
    patches = table[:-3].reshape(2 * height - 1, 2 * width - 1, -1).transpose(0, 1).reshape(-1, table.shape[1])
    return torch.cat([patches, table[-3:]])


def cls_rows_swapped(table: Tensor, window: tuple[int, int]) -> Tensor:
    return torch.cat([table[:-3], table[[-2, -3, -1]]])


MUTATIONS = [dropped, transposed, window_swapped, cls_rows_swapped]


@pytest.mark.parametrize("mutate", MUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_results_wrong_bias_raises(mutate, dtype: torch.dtype) -> None:
    case = make_case((3, 5), dtype)
    check_parity(case)
    assert case.table is not None
    wrong = replace(case, table=mutate(case.table, case.window))
    out, lse = run_forward(wrong)
    with pytest.raises(AssertionError, match="out: relative error"):
        check_results(case, out, run_backward(wrong, out, lse))


@pytest.mark.parametrize("mutate", MUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_results_wrong_table_gradient_raises(mutate, dtype: torch.dtype) -> None:
    case = make_case((3, 5), dtype)
    out, lse = run_forward(case)
    *gradients, dtable = run_backward(case, out, lse)
    with pytest.raises(AssertionError, match="dtable: relative error"):
        check_results(case, out, (*gradients, mutate(dtable, case.window)))
