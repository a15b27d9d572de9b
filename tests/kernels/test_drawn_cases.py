"""Combinations of all options of the operator, drawn by Hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from ..support.cases import Case, check_results
from .cases import OutputMask, bitwise_equal, device, inputs_unchanged, run_backward, run_forward
from .strategies import attention_cases, output_masks

# On a GPU nearly every example compiles its kernels; the interpreter does not compile.
FEW, MANY = (12, 100) if device().type == "cuda" else (20, 120)


def check(case: Case, wanted: OutputMask) -> None:
    """Check the budgets; requested gradients have equal bits, inputs do not change."""
    with inputs_unchanged(case):
        out, lse = run_forward(case)
        gradients = run_backward(case, out, lse)
        some = run_backward(case, out, lse, wanted)
    check_results(case, out, gradients)
    for flag, partial, full in zip(wanted, some, gradients, strict=True):
        assert bitwise_equal(partial, full) if flag else partial.numel() == 0


@given(attention_cases(), output_masks())
@settings(derandomize=True, deadline=None, max_examples=FEW, suppress_health_check=[HealthCheck.too_slow])
def test_attention_drawn_cases_stay_within_their_budgets(case: Case, wanted: OutputMask) -> None:
    check(case, wanted)


@pytest.mark.slow
@given(attention_cases(), output_masks())
@settings(derandomize=True, deadline=None, max_examples=MANY, suppress_health_check=[HealthCheck.too_slow])
def test_attention_many_drawn_cases_stay_within_their_budgets(case: Case, wanted: OutputMask) -> None:
    check(case, wanted)
