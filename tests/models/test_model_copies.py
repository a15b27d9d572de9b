"""Copies, saved files and moves of models give equal outputs with the same kernels."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import beit_fast
from beit_fast import optimize_for_inference

from ..support.models import MEAN, STD, build, byte_images, images
from ..support.transformers_reference import CLASSES, POSITIONS, TINY, options_for

ATTENTION = torch.ops.beit_fast.rel_pos_attention.default


class AttentionCalls(TorchDispatchMode):
    """Count calls of the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is ATTENTION
        return func(*args, **(kwargs or {}))


def outputs_of(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(pixels)) if isinstance(leaf, Tensor)]


def assert_equal_outputs(model: nn.Module, original: nn.Module, pixels: Tensor) -> None:
    """Check bit-exact outputs and the number of calls of the fused operator."""
    with AttentionCalls() as calls:
        actual = outputs_of(model, pixels)
    assert calls.count == len(original.base_model.encoder.layer)
    for mine, expected in zip(actual, outputs_of(original, pixels), strict=True):
        assert torch.equal(mine, expected)


def save_and_load(value: Any, **options: Any) -> Any:
    """Save the value with `torch.save` and load it with `torch.load`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def copy_by_state_dict(model: nn.Module) -> nn.Module:
    """Build a model from the configuration and load the saved state dict."""
    again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(save_and_load(model.state_dict(), weights_only=True), strict=True)
    return again


def copy_by_meta(model: nn.Module) -> nn.Module:
    """Build a model on meta and assign the tensors of the original."""
    with torch.device("meta"):
        again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    return again


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: save_and_load(model, weights_only=False),
    "state dict": copy_by_state_dict,
    "meta": copy_by_meta,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", CLASSES)
def test_copy_gives_equal_outputs(name: str, way: str) -> None:
    model = build(name, "both", attn_implementation="triton")
    outputs_of(model, images())
    again = COPIES[way](model)
    assert type(again) is type(model)
    assert not again.training
    assert again.attn_implementation == "triton"
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert_equal_outputs(again, model, images(3, 3, 40, 24))


@pytest.mark.parametrize("way", [way for way in COPIES if way != "meta"])
@pytest.mark.parametrize("position", POSITIONS)
def test_copy_is_independent(position: str, way: str) -> None:
    """Changes to the copy have no effect on the original, bias tables included."""
    model = build(position=position, attn_implementation="triton")
    again, pixels = COPIES[way](model), images()
    before = outputs_of(model, pixels)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    again.set_attn_implementation("eager")
    again.config.update({"pixel_mean": MEAN, "pixel_std": STD})
    assert torch.equal(outputs_of(model, pixels)[0], before[0])
    assert not torch.equal(outputs_of(again, pixels)[0], before[0])
    assert model.attn_implementation == "triton"
    assert model.config.pixel_mean is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copy_keeps_settings(way: str) -> None:
    model = build("BeitForMaskedImageModeling", attn_implementation="triton").train()
    model.set_patch_embed_implementation("conv")
    model.set_pixel_normalization(MEAN, STD)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.beit.embeddings.requires_grad_(False)
    again = COPIES[way](model)
    assert again.training
    assert again.is_gradient_checkpointing
    assert again.beit.encoder.checkpoint_options == {"use_reentrant": True}
    assert again.patch_embed_implementation == "conv"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
    pixels = byte_images()
    assert torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)
    assert again.patch_embed_report().ran == "conv"


LOAD = """
import sys, torch
torch.set_num_threads(1)
model = torch.load(sys.argv[1], weights_only=False)
pixels, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(pixels).logits, expected)
print(model.attention_report().kernel)
"""


def test_torch_load_in_fresh_process_gives_equal_logits(tmp_path: Path) -> None:
    model, pixels = build("BeitForSemanticSegmentation", attn_implementation="triton"), images(1, 3, 32, 48)
    torch.save(model, tmp_path / "model.pt")
    torch.save((pixels, outputs_of(model, pixels)[0]), tmp_path / "data.pt")
    path = os.pathsep.join(filter(None, [str(Path(beit_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "data.pt")]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == model.attention_report().kernel


def test_torch_load_weights_only_of_model_raises() -> None:
    """Unpickling a module runs code, so `weights_only=True`, the default, rejects it."""
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        save_and_load(build())


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.float16),
    "double half float": lambda model: model.double().half().float(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", CLASSES)
def test_move_after_run_equals_fresh_model(name: str, move: str) -> None:
    """The fresh model has not run: no index, bias or position of another size or dtype may stay cached."""
    used = build(name, "both", use_absolute_position_embeddings=True, attn_implementation="triton")
    fresh = copy.deepcopy(used)
    for size in ((2, 3, 32, 32), (1, 3, 40, 24)):
        outputs_of(used, images(*size))
    used, fresh = MOVES[move](used), MOVES[move](fresh)
    for size in ((2, 3, 40, 24), (1, 3, 48, 16), (2, 3, 32, 32)):
        pixels = images(*size).to(fresh.dtype)
        assert_equal_outputs(used, fresh, pixels)
        assert {x.dtype for x in outputs_of(used, pixels)} == {fresh.dtype}


@pytest.mark.parametrize("name", CLASSES)
def test_init_weights_after_meta_equals_constructor(name: str) -> None:
    """Parameters and batch norm statistics have the values of a model built on the CPU."""
    config = beit_fast.BeitConfig(**(TINY | POSITIONS["both"] | options_for(name)), attn_implementation="triton")
    with torch.device("meta"):
        model = getattr(beit_fast, name)(config).eval()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(113)  # a value that uninitialized memory may have
    model.init_weights()
    built = getattr(beit_fast, name)(config).state_dict()
    for key, tensor in model.state_dict().items():
        mine, expected = tensor.double(), built[key].double()
        assert not (mine == 113).any(), key
        if expected.numel() == 1 or expected.std() == 0:
            assert torch.equal(mine, expected), key
        elif expected.numel() > 500:  # random initial values
            torch.testing.assert_close(mine.std(), expected.std(), rtol=0.2, atol=0)
    assert all(torch.isfinite(x).all() for x in outputs_of(model, images()))


@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("name", CLASSES)
def test_meta_model_gives_equal_shapes(name: str, implementation: str | None) -> None:
    model = build(name, attn_implementation=implementation)
    pixels = images(2, 3, 40, 24)
    expected = outputs_of(model, pixels)
    for mine, plain in zip(outputs_of(model.to("meta"), pixels.to("meta")), expected, strict=True):
        assert mine.is_meta
        assert (mine.shape, mine.dtype) == (plain.shape, plain.dtype)


@pytest.mark.parametrize("name", CLASSES)
def test_optimized_model_save_and_load_gives_equal_outputs(name: str) -> None:
    """The file stores the original weights, because packed weights cannot be saved; loading folds them again."""
    model = build(name, "both", attn_implementation="triton")
    optimized = optimize_for_inference(model, torch.bfloat16)
    outputs_of(optimized, images().bfloat16())
    again = save_and_load(optimized, weights_only=False)
    assert type(again) is type(optimized)
    pixels = images(1, 3, 40, 24).bfloat16()
    for mine, expected in zip(outputs_of(again, pixels), outputs_of(optimized, pixels), strict=True):
        assert torch.equal(mine, expected)
    state = save_and_load(optimized.state_dict(), weights_only=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_optimize_for_inference_again_after_move() -> None:
    """An optimized model keeps its dtype after the original changes."""
    model, pixels = build(attn_implementation="triton"), images()
    optimized = optimize_for_inference(model)
    before = outputs_of(optimized, pixels)[0]
    model.bfloat16()
    assert torch.equal(outputs_of(optimized, pixels)[0], before)
    assert outputs_of(optimize_for_inference(model), pixels.bfloat16())[0].dtype == torch.bfloat16
