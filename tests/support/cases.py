"""Check of attention results against the oracle.

Tests also import cases of `beit_fast.tuning.attention_case` from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import beit_fast
from beit_fast.tuning.attention_case import GRADIENT_NAMES, Case, attention_case, dropout_mask, run_oracle

from .oracle import compare_results

__all__ = [
    "GRADIENT_NAMES",
    "Case",
    "attention_case",
    "check_operator",
    "check_results",
    "dropout_mask",
    "run_eager",
    "run_operator",
    "run_oracle",
]


def run_eager(case: Case) -> list[Tensor]:
    """Return the results of eager attention in the dtype of the case, whose errors are the budget.

    In fp64 eager attention equals the reference, so the error of fp32 is scaled down to fp64 rounding. The tensors of
    the case must then hold fp32 numbers, or the budget would include the rounding of the inputs.
    """
    dtype = case.query.dtype
    if dtype != torch.float64:
        return run_oracle(case, dtype)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    rounded_case, tensors = case.to(torch.float32), case.tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in rounded_case.to(dtype).tensors().items())
    pairs = zip(run_oracle(rounded_case, torch.float32), run_oracle(case, dtype), strict=True)
    return [exact + (rounded.double() - exact) * ratio for rounded, exact in pairs]


def run_operator(case: Case) -> list[Tensor]:
    """Return out, dq, dk, dv (and dtable) of the operator."""
    out = beit_fast.rel_pos_attention(
        case.query,
        case.key,
        case.value,
        case.table,
        case.window,
        case.key_mask,
        case.chosen_scale,
        dropout_p=case.dropout_p,
        seed=case.seed,
    )
    return [out.detach(), *torch.autograd.grad(out, case.leaves(), case.grad_out)]


def check_operator(case: Case) -> None:
    """Compare the operator with the fp64 oracle."""
    out, *gradients = run_operator(case)
    check_results(case, out, gradients)


def check_results(case: Case, out: Tensor, gradients: Sequence[Tensor]) -> None:
    """Compare `out` and the gradients with the fp64 oracle; check dtypes and layouts.

    The budget is the error of eager attention in the same dtype. Without a table, its gradient is empty or left out.
    """
    if case.table is None:
        assert all(tensor.numel() == 0 for tensor in gradients[3:])
        gradients = gradients[:3]
    results, exact, eager = (
        dict(zip(("out", *GRADIENT_NAMES), tensors, strict=False))
        for tensors in ((out, *gradients), run_oracle(case, torch.float64), run_eager(case))
    )
    compare_results(results, exact, eager, case.query.dtype)
    assert all(tensor.is_contiguous() for tensor in results.values())
