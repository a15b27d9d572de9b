"""The reference itself, against published numbers."""

from __future__ import annotations

import pytest
import torch

from beit_fast.tuning.reference import philox_keep

FIRST_WORD = 0x6627E8D5
"""Of Philox4x32-10 for key 0 and counter 0 (Random123, known-answer tests)."""


@pytest.mark.parametrize(("above", "kept"), [(0, True), (1, False)])
def test_philox_keep_of_the_published_counter_compares_its_first_word(above: int, kept: bool) -> None:
    probability = ((FIRST_WORD >> 1) + above) / 2**31
    assert philox_keep(0, probability, 1, 1, 1).item() is kept


def test_philox_keep_differs_between_rows_columns_planes_and_seeds() -> None:
    keep = philox_keep(2**40 + 12345, 0.2, 2, 4, 33)
    assert keep.shape == (2, 4, 33, 33)
    assert keep.dtype == torch.bool
    assert abs(keep.double().mean().item() - 0.8) < 0.02
    for other in (keep.mT, keep.flip(0), keep.flip(1), philox_keep(12345, 0.2, 2, 4, 33)):
        assert abs((keep == other).double().mean().item() - 0.68) < 0.03  # 0.8 * 0.8 + 0.2 * 0.2
