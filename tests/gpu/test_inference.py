"""Optimized models on a GPU: fused norms and GELU, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch

from beit_fast import optimize_for_inference

from ..kernels.cases import device
from ..kernels.test_model import build
from ..support.oracle import FORWARD_FACTOR, assert_within_budget
from ..support.transformers_reference import POSITIONS
from . import calls  # noqa: F401  skips this file without a GPU


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_optimize_for_inference_matches_fp64(position: str, dtype: torch.dtype, graphs: bool) -> None:
    model = build(**POSITIONS[position]).to(dtype)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for reference in (eager, exact):
        reference.set_attn_implementation("eager")
    optimized = optimize_for_inference(model, graphs=graphs)
    for size in ((2, 3, 32, 32), (2, 3, 24, 40), (5, 3, 32, 32), (2, 3, 32, 32)):
        pixels = torch.randn(size, device=device()).to(dtype)
        with torch.no_grad():
            expected, budget = exact(pixels.double()).logits, eager(pixels).logits
        assert_within_budget("logits", optimized(pixels).logits, expected, budget, FORWARD_FACTOR)
    report = optimized.graph_report()
    assert (report is not None) is graphs
    if report is not None:
        assert (report.captured, report.replayed, report.plain) == (3, 4, {})
    assert optimized.attention_report().kernel == "triton"
    assert optimized.inference_report().linears == "torch, triton"


def test_optimize_for_inference_graphs_keep_biases_alive() -> None:
    """Use more windows than biases or graphs are cached.

    Each replay must still read its own memory.
    """
    model = build(**POSITIONS["per layer"])
    plain, optimized = optimize_for_inference(model, graphs=False), optimize_for_inference(model)
    pixels = [torch.randn(1, 3, 32, 8 * columns, device=device()) for columns in range(1, 13)]
    for _ in range(2):
        for x in pixels:
            expected = plain(x).logits
            for _ in range(2):
                torch.testing.assert_close(optimized(x).logits, expected)
