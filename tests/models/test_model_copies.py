"""Copies, files and moves of whole models: what comes back computes what was there, by the same kernels."""

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
    """Counts calls of the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is ATTENTION
        return func(*args, **(kwargs or {}))


def outputs_of(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(pixels)) if isinstance(leaf, Tensor)]


def assert_computes_the_same(model: nn.Module, original: nn.Module, pixels: Tensor) -> None:
    """The same bits by the fused operator, at sizes that neither may have seen."""
    with AttentionCalls() as calls:
        actual = outputs_of(model, pixels)
    assert calls.count == len(original.base_model.encoder.layer)
    for mine, expected in zip(actual, outputs_of(original, pixels), strict=True):
        assert torch.equal(mine, expected)


def through_a_file(value: Any, **options: Any) -> Any:
    """What `torch.load` makes of what `torch.save` wrote."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def through_a_state_dict(model: nn.Module) -> nn.Module:
    """A model built anew from the configuration, with the weights of a file that holds nothing but tensors."""
    again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(through_a_file(model.state_dict(), weights_only=True), strict=True)
    return again


def through_meta(model: nn.Module) -> nn.Module:
    """Built without memory, then given the original's tensors themselves."""
    with torch.device("meta"):
        again = type(model)(copy.deepcopy(model.config)).eval()
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    return again


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: through_a_file(model, weights_only=False),
    "state dict": through_a_state_dict,
    "meta": through_meta,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_computes_the_same(name: str, way: str) -> None:
    model = build(name, "both", attn_implementation="triton")
    outputs_of(model, images())
    again = COPIES[way](model)
    assert type(again) is type(model)
    assert not again.training
    assert again.attn_implementation == "triton"
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert_computes_the_same(again, model, images(3, 3, 40, 24))


@pytest.mark.parametrize("way", [way for way in COPIES if way != "meta"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_copy_is_its_own(position: str, way: str) -> None:
    """Nothing is shared, the tables of the bias included: what is done to the copy stays with it."""
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
def test_a_copy_keeps_what_was_set(way: str) -> None:
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


def test_a_saved_model_loads_in_a_fresh_process_that_imports_torch(tmp_path: Path) -> None:
    model, pixels = build("BeitForSemanticSegmentation", attn_implementation="triton"), images(1, 3, 32, 48)
    torch.save(model, tmp_path / "model.pt")
    torch.save((pixels, outputs_of(model, pixels)[0]), tmp_path / "data.pt")
    path = os.pathsep.join(filter(None, [str(Path(beit_fast.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "data.pt")]
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == model.attention_report().kernel


def test_a_whole_model_is_no_file_of_weights() -> None:
    """Unpickling a module runs code, so torch's default refuses it; a state dict is tensors."""
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        through_a_file(build())


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.float16),
    "there and back": lambda model: model.double().half().float(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", CLASSES)
def test_what_ran_leaves_nothing_behind_when_it_is_moved(name: str, move: str) -> None:
    """Against one that has never run: no index, bias or position of another size or dtype is kept."""
    used = build(name, "both", use_absolute_position_embeddings=True, attn_implementation="triton")
    fresh = copy.deepcopy(used)
    for size in ((2, 3, 32, 32), (1, 3, 40, 24)):
        outputs_of(used, images(*size))
    used, fresh = MOVES[move](used), MOVES[move](fresh)
    for size in ((2, 3, 40, 24), (1, 3, 48, 16), (2, 3, 32, 32)):
        pixels = images(*size).to(fresh.dtype)
        assert_computes_the_same(used, fresh, pixels)
        assert {x.dtype for x in outputs_of(used, pixels)} == {fresh.dtype}


@pytest.mark.parametrize("name", CLASSES)
def test_built_on_meta_and_initialised(name: str) -> None:
    """The numbers of a model that was built with memory, statistics of batch norms among them."""
    config = beit_fast.BeitConfig(**(TINY | POSITIONS["both"] | options_for(name)), attn_implementation="triton")
    with torch.device("meta"):
        model = getattr(beit_fast, name)(config).eval()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(113)  # what fresh memory may hold
    model.init_weights()
    built = getattr(beit_fast, name)(config).state_dict()
    for key, tensor in model.state_dict().items():
        mine, expected = tensor.double(), built[key].double()
        assert not (mine == 113).any(), key
        if expected.numel() == 1 or expected.std() == 0:
            assert torch.equal(mine, expected), key
        elif expected.numel() > 500:  # drawn at random
            torch.testing.assert_close(mine.std(), expected.std(), rtol=0.2, atol=0)
    assert all(torch.isfinite(x).all() for x in outputs_of(model, images()))


@pytest.mark.parametrize("implementation", ["triton", None])
@pytest.mark.parametrize("name", CLASSES)
def test_shapes_without_memory(name: str, implementation: str | None) -> None:
    model = build(name, attn_implementation=implementation)
    pixels = images(2, 3, 40, 24)
    expected = outputs_of(model, pixels)
    for mine, plain in zip(outputs_of(model.to("meta"), pixels.to("meta")), expected, strict=True):
        assert mine.is_meta
        assert (mine.shape, mine.dtype) == (plain.shape, plain.dtype)


@pytest.mark.parametrize("name", CLASSES)
def test_an_optimised_model_in_a_file(name: str) -> None:
    """Packed weights are no tensors that can be saved: the file holds the originals, and loading folds them again."""
    model = build(name, "both", attn_implementation="triton")
    optimized = optimize_for_inference(model, torch.bfloat16)
    outputs_of(optimized, images().bfloat16())
    again = through_a_file(optimized, weights_only=False)
    assert type(again) is type(optimized)
    pixels = images(1, 3, 40, 24).bfloat16()
    for mine, expected in zip(outputs_of(again, pixels), outputs_of(optimized, pixels), strict=True):
        assert torch.equal(mine, expected)
    state = through_a_file(optimized.state_dict(), weights_only=True)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_what_was_optimised_may_be_moved_and_optimised_again() -> None:
    """The original is free to change; its optimised forms keep the type that they were made with."""
    model, pixels = build(attn_implementation="triton"), images()
    optimized = optimize_for_inference(model)
    before = outputs_of(optimized, pixels)[0]
    model.bfloat16()
    assert torch.equal(outputs_of(optimized, pixels)[0], before)
    assert outputs_of(optimize_for_inference(model), pixels.bfloat16())[0].dtype == torch.bfloat16
