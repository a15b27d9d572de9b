"""Models whose attention runs on the kernels, through the operator and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import beit_fast

from ..support.devices import kernels_are_native
from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget
from ..support.transformers_reference import POSITIONS, TINY, randomize
from .cases import device, triton_only

KERNEL = {"cpu": "cpp" if kernels_are_native() else "triton-interpret", "cuda": "triton"}


def build(**options: Any) -> beit_fast.BeitForImageClassification:
    config = beit_fast.BeitConfig(**(TINY | {"num_hidden_layers": 2} | options))
    model = beit_fast.BeitForImageClassification(config)
    randomize(model)
    return model.to(device()).eval()


def with_attention(
    implementation: str, model: beit_fast.BeitForImageClassification
) -> beit_fast.BeitForImageClassification:
    """Set the attention implementation of the model and return it."""
    model.set_attn_implementation(implementation)
    return model


def train_step(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of two images and the gradient of every parameter."""
    model.zero_grad()
    output = model(pixels, labels=torch.tensor([0, 1], device=pixels.device))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


@pytest.mark.parametrize(
    ("position", "size", "dtype"),
    [
        ("per layer", (32, 32), torch.float32),
        ("shared", (24, 40), torch.float32),
        ("none", (32, 32), torch.float32),
        ("per layer", (24, 40), torch.bfloat16),
        ("shared", (32, 32), torch.bfloat16),
    ],
)
def test_model_triton_attention_matches_fp64(position: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = build(**POSITIONS[position]).to(dtype)
    pixels = torch.randn(2, 3, *size).to(device(), dtype)
    eager, eager_gradients = train_step(with_attention("eager", model), pixels)
    fused, fused_gradients = train_step(with_attention("triton", model), pixels)
    assert model.attention_report().kernel == KERNEL[device().type]
    exact, exact_gradients = train_step(with_attention("eager", model).double(), pixels.double())
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR)
    assert fused_gradients.keys() == eager_gradients.keys() == exact_gradients.keys()
    for name, gradient in fused_gradients.items():
        assert_within_budget(name, gradient, exact_gradients[name], eager_gradients[name], BACKWARD_FACTOR)


@triton_only
def test_attention_unsupported_inputs_raise_every_reason() -> None:
    q = torch.randn(1, 5, 2, 12, dtype=torch.float64, device=device())
    with pytest.raises(
        ValueError, match=r"expected float16, bfloat16 or float32\); head dimension 12 is not a multiple of 8"
    ):
        beit_fast.rel_pos_attention(q, q, q)
