"""The whole path: a model whose attention is the Triton kernels, through the operator and its autograd."""

import pytest
import torch

import beit_fast
from beit_fast import backends

from ..support.oracle import assert_within_budget
from ..support.transformers_reference import POSITIONS, TINY, randomize


def build(**options):
    config = beit_fast.BeitConfig(**(TINY | {"num_hidden_layers": 2} | options))
    model = beit_fast.BeitForImageClassification(config)
    randomize(model)
    return model.eval()


def run(model, implementation, pixels, dtype):
    model.to(dtype).set_attn_implementation(implementation)
    model.zero_grad()
    output = model(pixels.to(dtype), labels=torch.tensor([0, 1]))
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


@pytest.mark.parametrize("position", ["per layer", "shared", "none"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_model_on_interpreted_kernels(position, size):
    assert backends.INTERPRETED
    model, pixels = build(**POSITIONS[position]), torch.randn(2, 3, *size)
    eager, eager_grads = run(model, "eager", pixels, torch.float32)
    fused, fused_grads = run(model, "triton", pixels, torch.float32)
    assert model.attention_report().kernel == "triton/interpreter"
    exact, exact_grads = run(model, "eager", pixels, torch.float64)
    assert_within_budget("logits", fused, exact, eager, 2)
    assert fused_grads.keys() == eager_grads.keys()
    for name, grad in fused_grads.items():
        assert_within_budget(name, grad, exact_grads[name], eager_grads[name], 3)


def test_what_the_kernels_do_not_take_is_refused_with_reasons():
    q = torch.randn(1, 5, 2, 12, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"none of float16, bfloat16, float32; head dimension 12 is not a multiple of 8"
    ):
        beit_fast.rel_pos_attention(q, q, q)
