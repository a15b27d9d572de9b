"""Models on a GPU with autocast, `torch.compile` and uint8 pixels."""

from __future__ import annotations

import pytest
import torch

from ..kernels.cases import device
from ..kernels.test_model import build, train_step, with_attention
from ..support.models import MEAN, STD, byte_images, normalized
from ..support.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_within_budget
from ..support.transformers_reference import POSITIONS
from . import calls  # noqa: F401  skips this file without a GPU


@pytest.mark.parametrize("position", ["per layer", "shared", "both"])
def test_model_autocast_matches_fp64(position: str) -> None:
    dtype = torch.bfloat16
    model, pixels = build(**POSITIONS[position]), torch.randn(2, 3, 24, 40).to(device())
    with torch.autocast("cuda", dtype=dtype):
        eager, eager_gradients = train_step(with_attention("eager", model), pixels)
        fused, fused_gradients = train_step(with_attention("triton", model), pixels)
    exact, exact_gradients = train_step(with_attention("eager", model).double(), pixels.double())
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR, dtype)
    for name, gradient in fused_gradients.items():
        assert_within_budget(name, gradient, exact_gradients[name], eager_gradients[name], BACKWARD_FACTOR, dtype)


@pytest.mark.parametrize("position", ["per layer", "shared"])
def test_model_compile_fullgraph_matches_fp64(position: str) -> None:
    torch.compiler.reset()
    model, pixels = build(**POSITIONS[position]), torch.randn(2, 3, 32, 32).to(device())
    eager, eager_gradients = train_step(with_attention("eager", model), pixels)
    compiled = torch.compile(with_attention("triton", model), fullgraph=True)
    fused, fused_gradients = train_step(compiled, pixels)
    exact, exact_gradients = train_step(with_attention("eager", model).double(), pixels.double())
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR)
    for name, gradient in fused_gradients.items():
        plain = name.removeprefix("_orig_mod.")
        assert_within_budget(name, gradient, exact_gradients[plain], eager_gradients[plain], BACKWARD_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["per layer", "absolute"])
def test_model_uint8_pixels_match_fp64(position: str, dtype: torch.dtype) -> None:
    """uint8 pixels by the operator, against float pixels by the convolution."""
    model = build(**POSITIONS[position]).to(dtype)
    model.set_pixel_normalization(MEAN, STD)
    pixels = byte_images(2, 3, 35, 40).to(device())
    with torch.no_grad():
        fused = with_attention("triton", model)(pixels).logits
        assert model.patch_embed_report().kernel == "cuda"
        floats = normalized(pixels)
        eager = with_attention("eager", model)(floats.to(dtype)).logits
        exact = with_attention("eager", model).double()(floats).logits
    assert_within_budget("logits", fused, exact, eager, FORWARD_FACTOR, dtype)
