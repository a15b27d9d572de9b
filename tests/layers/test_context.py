"""One choice of kernels for each forward pass, passed to the blocks."""

import pytest
import torch

import beit_fast
from beit_fast.layers.context import BlockContext, choose_kernels
from beit_fast.ops.dispatch import patch_embed

from ..support.attention_spy import record_choices
from ..support.models import build, images
from ..support.transformers_reference import CLASSES, POSITIONS, random_inputs

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def choices(monkeypatch):
    """Record the calls of the dispatchers.

    Attention records (device type, dtype), patch embedding the resolved name.
    """
    calls = {"attention": record_choices(monkeypatch), "patch_embed": []}
    resolve = patch_embed.resolve

    def resolve_patch_embed(*arguments):
        resolved = resolve(*arguments)
        calls["patch_embed"].append(resolved)
        return resolved

    monkeypatch.setattr(patch_embed, "resolve", resolve_patch_embed)
    return calls


CASES = [*((name, "both") for name in CLASSES), *(("BeitModel", position) for position in POSITIONS)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "position"), dict.fromkeys(CASES))
def test_forward_any_model_calls_dispatchers_once(choices, name, position, training):
    model = build(name, position, patch_embed_implementation="conv")
    inputs = random_inputs(name, model)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    if training:
        model.train().gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()  # maps of one pixel have no variance
    for implementation, output_attentions in (("sdpa", False), ("triton", False), (None, True)):
        model.set_attn_implementation(implementation)
        for calls in choices.values():
            calls.clear()
        model(**inputs, output_attentions=output_attentions)
        assert choices == {"attention": [("cpu", torch.float32)], "patch_embed": ["conv"]}


def test_forward_optimized_model_calls_dispatchers_once(choices):
    model = beit_fast.optimize_for_inference(build(patch_embed_implementation="conv"))
    for _ in range(2):  # the first call of a window also makes the biases of every layer
        for calls in choices.values():
            calls.clear()
        model(images())
        assert choices == {"attention": [("cpu", torch.float32)], "patch_embed": ["conv"]}


@pytest.mark.parametrize("optimized", [False, True])
def test_forward_default_patch_embed_calls_dispatchers_once(choices, optimized):
    model = beit_fast.optimize_for_inference(build()) if optimized else build()
    for calls in choices.values():
        calls.clear()
    model(images())
    assert choices == {"attention": [("cpu", torch.float32)], "patch_embed": ["fused"]}


def test_forward_autocast_chooses_for_dtype_of_queries(choices):
    with torch.autocast("cpu", torch.bfloat16):
        build(patch_embed_implementation="conv")(images())
    assert choices["attention"] == [("cpu", torch.bfloat16)]


def test_forward_block_of_another_dtype_chooses_again(choices):
    model, pixels = build(patch_embed_implementation="conv"), images()
    expected = model(pixels).logits
    choices["attention"].clear()
    layer = model.beit.encoder.layer[1].double()
    layer.register_forward_pre_hook(lambda module, args: (args[0].double(), *args[1:]))
    layer.register_forward_hook(lambda module, args, output: (output[0].float(), *output[1:]))
    torch.testing.assert_close(model(pixels).logits, expected)
    assert choices["attention"] == [("cpu", torch.float32), ("cpu", torch.float64)]


def test_serving_the_same_queries_returns_itself(choices):
    kernels = choose_kernels("triton", CPU, torch.float32, 16)
    context = BlockContext((2, 2), None, None, None, kernels)
    assert kernels.serving(CPU, torch.float32) is kernels
    assert context.serving(torch.empty(1, 5, 32)) is context
    assert len(choices["attention"]) == 1


def test_serving_another_device_chooses_again():
    kernels = choose_kernels(None, CPU, torch.float32, 16)
    context = BlockContext((2, 2), None, None, None, kernels)
    moved = context.serving(torch.empty(1, 5, 32, device=META)).kernels
    assert (moved.device, moved.attention, moved.gemm) == (META, "sdpa", None)
    assert (moved.requested, moved.head_dim) == (None, 16)
