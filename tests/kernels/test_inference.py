"""An optimized model on the kernels: its outputs, and the bias packed once per window."""

from __future__ import annotations

import copy

import pytest
import torch

from beit_fast import optimize_for_inference

from ..support.oracle import FORWARD_FACTOR, assert_within_budget
from ..support.transformers_reference import POSITIONS
from .cases import device, triton_only
from .test_model import KERNEL, build


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimize_for_inference_matches_fp64(position: str, dtype: torch.dtype) -> None:
    model = build(**POSITIONS[position]).to(dtype)
    model.set_attn_implementation("triton")
    optimized = optimize_for_inference(model, graphs=False)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for reference in (eager, exact):
        reference.set_attn_implementation("eager")
    for size in ((32, 32), (24, 40), (32, 32)):
        pixels = torch.randn(2, 3, *size).to(device(), dtype)
        attended = torch.rand(2, size[0] * size[1] // 64 + 1, device=device()) < 0.7
        with torch.no_grad():
            expected = exact(pixels.double(), attention_mask=attended).logits
            budget = eager(pixels, attention_mask=attended).logits
        actual = optimized(pixels, attention_mask=attended).logits
        assert_within_budget("logits", actual, expected, budget, FORWARD_FACTOR)
    assert optimized.attention_report().kernel == KERNEL[device().type]
    assert optimized.inference_report().windows == 2


@triton_only
def test_optimize_for_inference_packs_bias_once_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from beit_fast.kernels.attention import launch

    layouts = []
    lay_out = launch.bias_arguments

    def counted(*arguments: object, **named: object) -> object:
        layouts.append(arguments)
        return lay_out(*arguments, **named)

    monkeypatch.setattr(launch, "bias_arguments", counted)
    model = build(**POSITIONS["per layer"])
    model.set_attn_implementation("triton")
    optimized = optimize_for_inference(model, graphs=False)
    pixels = torch.randn(1, 3, 32, 32, device=device())
    first = optimized(pixels).logits
    assert len(layouts) == 2, "packed once per layer"
    assert torch.equal(optimized(pixels).logits, first)
    assert len(layouts) == 2, "cached for the second call"
