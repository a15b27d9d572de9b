"""Assertions against the fp64 reference of `beit_fast.tuning.reference`, whose functions tests import from here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from beit_fast.tuning.reference import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    attention_oracle,
    dense_bias,
    error_budget,
    paper_index,
    philox_keep,
    relative_error,
)

__all__ = [
    "BACKWARD_FACTOR",
    "FORWARD_FACTOR",
    "assert_within_budget",
    "attention_oracle",
    "compare_results",
    "dense_bias",
    "paper_index",
    "philox_keep",
    "relative_error",
]


def assert_within_budget(
    name: str, actual: Tensor, reference: Tensor, eager: Tensor, factor: float, dtype: torch.dtype | None = None
) -> None:
    """Assert that the error of `actual` is within `factor` times the error of `eager`.

    Both errors are relative to the fp64 `reference`. A floor is added: four times the machine epsilon of `dtype`, the
    dtype to which inputs are rounded (None: the dtype of `eager`). NaN and infinity always fail.
    """
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    budget = error_budget(reference, eager, factor, dtype)
    error = relative_error(actual, reference)
    assert error <= budget, f"{name}: relative error {error:.3e} is over the budget {budget:.3e}"


def compare_results(
    results: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    rounded_to: torch.dtype | None = None,
) -> None:
    """Compare all results of one operator with an fp64 reference.

    Args:
        results: The results by name. The names of gradients start with "d".
        exact: The same results of the reference in fp64.
        eager: The same results of the reference in the dtypes of the inputs. Their errors are the budget.
        rounded_to: The coarsest dtype to which inputs are rounded (None: the dtype of each result).
    """
    assert results.keys() == exact.keys() == eager.keys()
    for name, actual in results.items():
        assert actual.dtype == eager[name].dtype, f"{name}: {actual.dtype}, not {eager[name].dtype}"
        factor = BACKWARD_FACTOR if name.startswith("d") else FORWARD_FACTOR
        coarsest = max(rounded_to or actual.dtype, actual.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(name, actual, exact[name], eager[name], factor, coarsest)
