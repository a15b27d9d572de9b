"""Error budget for residual, layer scale, drop path and LayerNorm.

Tests also import cases of `beit_fast.tuning.residual_case` from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from beit_fast.ops.residual_norm import residual_add
from beit_fast.tuning.residual_case import (
    EPS,
    LEAVES,
    ROWS,
    ResidualCase,
    eager,
    eager_sum,
    fused,
    leaves_of,
    residual_case,
)

from .oracle import compare_results

__all__ = [
    "EPS",
    "LEAVES",
    "ROWS",
    "ResidualCase",
    "check_parity",
    "eager",
    "eager_sum",
    "fused",
    "fused_sum",
    "leaves_of",
    "residual_case",
]


def fused_sum(case: ResidualCase) -> dict[str, Tensor]:
    """Compute the sum without the norm with its operator."""
    leaves = leaves_of(replace(case, weight=None, bias=None))
    total = residual_add(leaves["residual"], leaves["branch"], leaves.get("scale"), case.drop_path_scale)
    gradients = torch.autograd.grad(total, list(leaves.values()), case.grad_sum)
    return {"sum": total.detach()} | dict(zip((f"d{name}" for name in leaves), gradients, strict=True))


def check_parity(
    case: ResidualCase,
    run: Callable[[ResidualCase], dict[str, Tensor]] = fused,
    reference: Callable[[ResidualCase], dict[str, Tensor]] = eager,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Check `run` against `reference` in fp64.

    The error budget is the error of `reference` in the dtypes of the case. `dtype` is the coarsest dtype if the case
    mixes several.
    """
    results = run(case)
    compare_results(results, reference(case.to(torch.float64)), reference(case), dtype)
    for name, actual in results.items():
        assert actual.is_contiguous(), name
    return results
