"""Batched gradients: `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)`.

Both run the backward formulas under PyTorch's older vmap, which lacks rules for some operators.
"""

import pytest
import torch
from torch import Tensor

import beit_fast
from beit_fast.ops.cpu_linear.choice import CpuLinear, gemm_onednn, gemm_split_bf16
from beit_fast.ops.cpu_linear.onednn import unsupported_reason as onednn_reason
from beit_fast.ops.cpu_linear.split_bf16 import unsupported_reason as split_bf16_reason
from beit_fast.ops.residual_norm import residual_add, residual_norm

from ..support.models import build, images
from ..support.oracle import relative_error
from ..support.transformers_reference import CLASSES, POSITIONS

MASK = torch.tensor([[True, False, False, True]])
DROPPED = torch.tensor([2.0, 0.0])


def patch_embed_with(mean=None, std=None):
    def call(pixels, weight, bias, cls, mask_token, pos):
        return beit_fast.patch_embed(pixels, weight, bias, cls, MASK, mask_token, pos, mean, std)

    return call


PATCH_SIZES = [(1, 3, 9, 8), (8, 3, 4, 4), (8,), (1, 1, 8), (8,), (1, 5, 8)]
ROWS = (2, 5, 8)
OPERATORS = {
    "attention": (lambda *x: beit_fast.rel_pos_attention(*x, (2, 2)), [(2, 5, 2, 8)] * 3 + [(12, 2)]),
    "attention without bias": (lambda *x: beit_fast.rel_pos_attention(*x, None, (2, 2)), [(2, 5, 2, 8)] * 3),
    "patch_embed": (patch_embed_with(), PATCH_SIZES),
    "patch_embed with std": (patch_embed_with(std=[0.5, 0.25, 2.0]), PATCH_SIZES),
    "patch_embed with mean and std": (patch_embed_with([0.5] * 3, [0.5, 0.25, 2.0]), PATCH_SIZES),
    "residual_norm": (lambda x, y, s, w, b: residual_norm(x, y, s, DROPPED, w, b), [ROWS, ROWS, (8,), (8,), (8,)]),
    "residual_norm alone": (lambda x, w, b: residual_norm(x, weight=w, bias=b)[1], [ROWS, (8,), (8,)]),
    "residual_add": (lambda x, y, s: residual_add(x, y, s, DROPPED), [ROWS, ROWS, (8,)]),
}
GEMMS = {
    "onednn": (gemm_onednn, onednn_reason("cpu", torch.float32)),
    "split_bf16": (gemm_split_bf16, split_bf16_reason()),
}


def assert_batched_gradients_equal_single_ones(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    directions = [torch.randn(3, *output.shape, dtype=output.dtype) for output in outputs]
    options = {"retain_graph": True, "allow_unused": True}
    batched = torch.autograd.grad(outputs, inputs, directions, is_grads_batched=True, **options)
    single = [torch.autograd.grad(outputs, inputs, [d[entry] for d in directions], **options) for entry in range(3)]
    assert any(gradient is not None for gradient in batched)
    for ours, theirs in zip(batched, zip(*single, strict=True), strict=True):
        if ours is not None:
            assert relative_error(ours, torch.stack(theirs)) <= 1e-5


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_batched_gradients_equal_single_gradients(name):
    function, sizes = OPERATORS[name]
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    outputs = function(*inputs)
    assert_batched_gradients_equal_single_ones([outputs] if isinstance(outputs, Tensor) else list(outputs), inputs)


@pytest.mark.parametrize("name", GEMMS)
def test_linear_batched_gradients_equal_single_gradients(name):
    gemm, reason = GEMMS[name]
    if reason is not None:
        pytest.skip(reason)
    inputs = [torch.randn(size, requires_grad=True) for size in ((2, 40, 64), (32, 64), (32,))]
    assert_batched_gradients_equal_single_ones([CpuLinear.apply(*inputs, gemm)], inputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_model_batched_gradients_equal_single_gradients(name, position, implementation):
    model = build(name, position)
    model.set_attn_implementation(implementation)
    pixels = images(2, 3, 40, 32).requires_grad_()
    output = model(pixels, return_dict=False)[0]
    outputs = [output] if isinstance(output, Tensor) else list(output)
    assert_batched_gradients_equal_single_ones(outputs, [pixels, *model.parameters()])


def test_patch_embed_batched_gradient_of_weight_alone():
    weight = torch.randn(8, 3, 4, 4, requires_grad=True)
    output = beit_fast.patch_embed(torch.randn(1, 3, 8, 8, requires_grad=True), weight)
    (gradient,) = torch.autograd.grad(output, weight, torch.randn(5, *output.shape), is_grads_batched=True)
    assert gradient.shape == (5, 8, 3, 4, 4)


def test_model_vectorized_jacobian_equals_plain_jacobian():
    model = build(attn_implementation="triton")
    pixels = images(1, 3, 32, 32)
    plain, vectorized = (
        torch.autograd.functional.jacobian(lambda x: model(x).logits, pixels, vectorize=flag) for flag in (False, True)
    )
    assert relative_error(vectorized, plain) <= 1e-5
