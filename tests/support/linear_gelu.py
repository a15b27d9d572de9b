"""Error budget for a linear layer with GELU.

Tests also import inputs of `beit_fast.tuning.linear_case` from here.
"""

from __future__ import annotations

from torch import Tensor

from beit_fast.tuning.linear_case import make_layer, plain

from .oracle import compare_results

__all__ = ["check_layer", "make_layer", "plain"]


def check_layer(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check `actual` against fp64, within the error of the two operations."""
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double())
    compare_results({"out": actual}, {"out": exact}, {"out": plain(x, weight, bias)})
    assert actual.is_contiguous()
